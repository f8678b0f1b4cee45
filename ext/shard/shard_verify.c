/* shard_verify.c - see shard_verify.h. */
#include "shard_verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../s3vfs/io_local.h"
#include "shard.h"

enum { HASH_STEP = 1 << 22 };

typedef struct walk {
  const shard_verifier *v;
  const char *shard;   /* path */
  const char *segment; /* file, or "" */
  int stopped, interrupted;
} walk;

static void fault(walk *w, const char *text) {
  if (!w->stopped && w->v->fault(w->v->ctx, w->shard, w->segment, text)) w->stopped = 1;
}

static int report_segment(void *ctx, const char *text) {
  walk *w = ctx;
  fault(w, text);
  if (w->v->stop && w->v->stop(w->v->ctx)) w->stopped = w->interrupted = 1;
  return w->stopped;
}

/* The hash that the manifest gives covers every byte; the walk inside tells where a fault is. */
static vs_rc check_hash(walk *w, vs_io *io, const shard_segment_ref *ref, vs_err *err) {
  XXH3_state_t *state = XXH3_createState();
  char hex[33];
  vs_rc rc = state ? VS_OK : vs_nomem(err);
  if (!rc) XXH3_128bits_reset(state);
  for (uint64_t at = 0; at < io->size && !rc; at += HASH_STEP) {
    vs_range r = {.off = at, .len = io->size - at < HASH_STEP ? io->size - at : HASH_STEP};
    if ((rc = vs_io_fetch(io, &r, 1, err))) break;
    XXH3_128bits_update(state, r.ptr, r.len);
    vs_io_release(io, &r, 1);
    if (w->v->stop && w->v->stop(w->v->ctx)) {
      w->stopped = w->interrupted = 1;
      break;
    }
  }
  if (!rc && !w->stopped) {
    XXH128_hash_t h = XXH3_128bits_digest(state);
    snprintf(hex, sizeof hex, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
    if (strcmp(hex, ref->checksum)) fault(w, "the file's checksum is not the one in the manifest");
  }
  XXH3_freeState(state);
  return rc;
}

static vs_rc verify_segment(walk *w, const shard_manifest *m, const shard_segment_ref *ref) {
  vs_err err = {0};
  char path[4400];
  vs_io *io = NULL;
  ivfpq_segment *s = NULL;
  w->segment = ref->file;
  snprintf(path, sizeof path, "%s/%s", w->shard, ref->file);
  vs_rc rc = io_local_open(path, 0, &io, &err); /* not mapped: a file that is cut meanwhile is an error, not a SIGBUS */
  if (!rc && io->size != ref->n_bytes) fault(w, "the file has not the size that the manifest states");
  if (!rc) rc = check_hash(w, io, ref, &err);
  if (rc) vs_io_close(io);
  else if (w->stopped) vs_io_close(io);
  else rc = ivfpq_segment_open(io, &s, &err);
  if (!rc && s) {
    if (s->params.n_rows != ref->n_rows || s->params.dim != m->dim || (int)s->params.metric != (int)m->metric)
      fault(w, "manifest and segment disagree about rows, dimension or metric");
    rc = ivfpq_verify(s, report_segment, w, &err);
  }
  ivfpq_segment_close(s);
  if (rc) fault(w, err.text);
  return rc == VS_NOMEM ? rc : VS_OK;
}

static vs_rc verify_shard(const shard_verifier *v, const char *path, int *stopped, vs_err *err) {
  walk w = {.v = v, .shard = path, .segment = ""};
  vs_err local = {0};
  shard_manifest m;
  vs_rc rc = shard_manifest_read(path, 0, &m, &local);
  if (rc) {
    fault(&w, local.text);
    *stopped = w.stopped;
    return rc == VS_NOMEM ? vs_nomem(err) : VS_OK;
  }
  for (size_t i = 0; i < m.n_segments && !rc && !w.stopped; i++) rc = verify_segment(&w, &m, &m.segments[i]);
  shard_manifest_reset(&m);
  *stopped = w.stopped;
  if (rc) return vs_nomem(err);
  return w.interrupted ? vs_fail(err, VS_INTERRUPT, "interrupted") : VS_OK;
}

vs_rc shard_verify(const char *source, const shard_verifier *v, vs_err *err) {
  char **names = NULL;
  size_t n = 0;
  int stopped = 0;
  if (shard_dir_is_shard(source)) return verify_shard(v, source, &stopped, err);
  vs_rc rc = shard_dir_list(source, &names, &n, err);
  if (!rc && !n) rc = vs_fail(err, VS_NOTFOUND, "%s holds no shard", source);
  for (size_t i = 0; i < n && !rc && !stopped; i++) {
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", source, names[i]);
    rc = verify_shard(v, path, &stopped, err);
  }
  shard_names_free(names, n);
  return rc;
}
