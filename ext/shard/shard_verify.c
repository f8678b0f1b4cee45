/* shard_verify.c - see shard_verify.h.
 *
 * Every byte of a file is hashed. A local file is then walked inside. An object of a store is walked only when its hash is not
 * what the manifest states, to tell where the fault is: the walk jumps from row to row, each a request of its own.
 */
#include "shard_verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "shard.h"
#include "shard_files.h"

enum { HASH_STEP = 1 << 22, AHEAD = 8 };

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

/* The i-th of the steps in which a file is read. */
static vs_range step_of(const vs_io *io, uint64_t i) {
  uint64_t at = i * HASH_STEP;
  return (vs_range){.off = at, .len = at >= io->size ? 0 : io->size - at < HASH_STEP ? io->size - at : HASH_STEP};
}

/* Feeds the whole file to the hash; from a store several steps are under way at once. */
static vs_rc hash_file(walk *w, vs_io *io, XXH3_state_t *state, vs_err *err) {
  vs_range r[AHEAD];
  uint64_t n = (io->size + HASH_STEP - 1) / HASH_STEP, ahead = io->local ? 1 : AHEAD, begun = 0, done = 0;
  vs_rc rc = VS_OK;
  if (io->forget) vs_io_forget(io); /* what the store has now, not what the cache has */
  while (done < n && !rc && !w->stopped) {
    for (; begun < n && begun < done + ahead && !rc; begun++) {
      r[begun % AHEAD] = step_of(io, begun);
      if ((rc = vs_io_begin(io, &r[begun % AHEAD], 1, err))) break;
    }
    vs_range *x = &r[done % AHEAD];
    if (!rc) rc = vs_io_wait(io, x, 1, err);
    if (rc) break;
    XXH3_128bits_update(state, x->ptr, x->len);
    vs_io_release(io, x, 1);
    done++;
    if (w->v->stop && w->v->stop(w->v->ctx)) w->stopped = w->interrupted = 1;
  }
  for (; done < begun; done++) vs_io_release(io, &r[done % AHEAD], 1);
  return rc;
}

/* The hash that the manifest gives covers every byte; the walk inside tells where a fault is. */
static vs_rc check_hash(walk *w, vs_io *io, const shard_segment_ref *ref, int *sound, vs_err *err) {
  XXH3_state_t *state = XXH3_createState();
  char hex[33];
  vs_rc rc = state ? VS_OK : vs_nomem(err);
  if (!rc) {
    XXH3_128bits_reset(state);
    rc = hash_file(w, io, state, err);
  }
  if (!rc && !w->stopped) {
    XXH128_hash_t h = XXH3_128bits_digest(state);
    snprintf(hex, sizeof hex, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
    *sound = !strcmp(hex, ref->checksum);
    if (!*sound) fault(w, "the file's checksum is not the one in the manifest");
  }
  XXH3_freeState(state);
  return rc;
}

static vs_rc verify_segment(walk *w, const shard_files *f, size_t i) {
  const shard_manifest *m = &f->manifest;
  const shard_segment_ref *ref = &m->segments[i];
  vs_err err = {0};
  vs_io *io = NULL;
  ivfpq_segment *s = NULL;
  int sound = 0;
  w->segment = ref->file;
  vs_rc rc = shard_files_segment(f, i, &io, &err);
  if (!rc && io->size != ref->n_bytes) fault(w, "the file has not the size that the manifest states");
  if (!rc) rc = check_hash(w, io, ref, &sound, &err);
  if (rc) vs_io_close(io);
  else if (w->stopped) vs_io_close(io);
  else rc = ivfpq_segment_open(io, &s, &err);
  if (!rc && s) {
    if (s->params.n_rows != ref->n_rows || s->params.dim != m->dim || (int)s->params.metric != (int)m->metric)
      fault(w, "manifest and segment disagree about rows, dimension or metric");
    if (s->io->local || !sound) rc = ivfpq_verify(s, report_segment, w, &err);
  }
  ivfpq_segment_close(s);
  if (rc && rc != VS_INTERRUPT) fault(w, err.text);
  return rc == VS_NOMEM || rc == VS_INTERRUPT ? rc : VS_OK;
}

static vs_rc verify_shard(const shard_verifier *v, const char *path, int *stopped, vs_err *err) {
  walk w = {.v = v, .shard = path, .segment = ""};
  vs_err local = {0};
  shard_files f;
  vs_rc rc = shard_files_open(path, &f, &local);
  if (rc) {
    if (rc != VS_INTERRUPT) fault(&w, local.text);
    *stopped = w.stopped;
    return rc == VS_NOMEM || rc == VS_INTERRUPT ? vs_fail(err, rc, "%s", local.text) : VS_OK;
  }
  for (size_t i = 0; i < f.manifest.n_segments && !rc && !w.stopped; i++) rc = verify_segment(&w, &f, i);
  shard_files_reset(&f);
  *stopped = w.stopped;
  if (rc == VS_NOMEM) return vs_nomem(err);
  return rc || w.interrupted ? vs_fail(err, VS_INTERRUPT, "interrupted") : VS_OK;
}

vs_rc shard_verify(const char *source, const shard_verifier *v, vs_err *err) {
  char **paths;
  size_t n;
  int stopped = 0;
  vs_rc rc = shard_paths(source, &paths, &n, err);
  for (size_t i = 0; i < n && !rc && !stopped; i++) rc = verify_shard(v, paths[i], &stopped, err);
  shard_names_free(paths, n);
  return rc;
}
