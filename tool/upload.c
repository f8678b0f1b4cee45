/* upload.c - see upload.h.
 *
 * Workers take turns to read the next part, hashing it on the way, so that the file is read once and in order; they send their
 * parts at the same time. Parts of an unfinished upload of the same object are used again when the store's ETag is the MD5 of
 * the very bytes (it is, but for encrypted buckets: then they are sent anew).
 */
#include "upload.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../ext/base/vs_pool.h"
#include "tool.h"

#define MIN_PART (16ull << 20)
#define MAX_PARTS 10000ull
#define MAX_MEMORY (1ull << 30)

uint64_t upload_part_size(uint64_t size) {
  uint64_t least = (size + MAX_PARTS - 1) / MAX_PARTS, mib = 1 << 20;
  return least <= MIN_PART ? MIN_PART : (least + mib - 1) / mib * mib;
}

typedef char etag[S3_ETAG_MAX];

typedef struct sending {
  upload *u;
  int fd;
  uint64_t part, n_parts;
  char *upload_id;
  etag *etags;          /* of finished parts */
  etag *have;           /* of an earlier upload's */
  uint64_t *have_size;
  pthread_mutex_t lock; /* guards what follows */
  uint64_t next;        /* part to read */
  XXH3_state_t *hash;
  vs_rc rc;
  vs_err err;
} sending;

static vs_rc read_part(const sending *s, uint64_t number, uint8_t *buf, size_t n, vs_err *err) {
  for (size_t at = 0; at < n;) {
    ssize_t got = pread(s->fd, buf + at, n - at, (off_t)(number * s->part + at));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return vs_fail(err, VS_IO, "%s: %s", s->u->path, got ? strerror(errno) : "the file was cut short while it was read");
    at += (size_t)got;
  }
  return VS_OK;
}

static size_t part_bytes(const sending *s, uint64_t number) {
  uint64_t left = s->u->size - number * s->part;
  return (size_t)(left < s->part ? left : s->part);
}

/* Reads the next part; 0: there is none, or the upload failed. */
static int take_part(sending *s, uint8_t *buf, uint64_t *number, size_t *n) {
  pthread_mutex_lock(&s->lock);
  int go = !s->rc && s->next < s->n_parts;
  if (go) {
    *number = s->next++, *n = part_bytes(s, *number);
    s->rc = tool_stop(NULL) ? vs_fail(&s->err, VS_INTERRUPT, "interrupted") : read_part(s, *number, buf, *n, &s->err);
    if (!s->rc) XXH3_128bits_update(s->hash, buf, *n);
    go = !s->rc;
  }
  pthread_mutex_unlock(&s->lock);
  return go;
}

static int is_there(const sending *s, uint64_t number, const uint8_t *buf, size_t n) {
  uint8_t md5[16];
  char hex[36] = "\"";
  if (s->have_size[number] != n || !EVP_Digest(buf, n, md5, NULL, EVP_md5(), NULL)) return 0;
  for (int i = 0; i < 16; i++) snprintf(hex + 1 + 2 * i, 4, "%02x%s", md5[i], i == 15 ? "\"" : "");
  return !strcmp(s->have[number], hex) || (strlen(s->have[number]) == 32 && !strncmp(s->have[number], hex + 1, 32));
}

static void part_done(sending *s, size_t n, int reused, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&s->lock);
  if (rc && !s->rc) s->rc = rc, s->err = *err;
  if (!rc && reused) s->u->n_reused += n;
  if (!rc && s->u->progress) s->u->progress(s->u->ctx, n);
  pthread_mutex_unlock(&s->lock);
}

static void send_parts(void *ctx, size_t worker) {
  sending *s = ctx;
  uint8_t *buf = malloc(s->part);
  uint64_t number;
  size_t n;
  vs_err none = {0};
  (void)worker;
  if (!buf) {
    part_done(s, 0, 0, vs_nomem(&none), &none);
    return;
  }
  while (take_part(s, buf, &number, &n)) {
    vs_err err = {0};
    vs_rc rc = VS_OK;
    int reused = is_there(s, number, buf, n);
    if (reused) strcpy(s->etags[number], s->have[number]);
    else rc = s3_multipart_part(s->u->place, s->u->key, s->upload_id, (int)number + 1, buf, n, s->etags[number], &err);
    part_done(s, n, reused, rc, &err);
  }
  free(buf);
}

/* ---- an earlier upload ---- */

typedef struct newest { char *id; int64_t started; } newest;

static vs_rc keep_newest(void *ctx, const char *id, int64_t started, vs_err *err) {
  newest *x = ctx;
  if (x->id && started <= x->started) return VS_OK;
  free(x->id);
  x->started = started;
  return (x->id = strdup(id)) ? VS_OK : vs_nomem(err);
}

static vs_rc keep_part(void *ctx, int number, uint64_t size, const char *tag, vs_err *err) {
  sending *s = ctx;
  (void)err;
  if (number < 1 || (uint64_t)number > s->n_parts || size != part_bytes(s, (uint64_t)number - 1)) return VS_OK;
  s->have_size[number - 1] = size;
  snprintf(s->have[number - 1], S3_ETAG_MAX, "%s", tag);
  return VS_OK;
}

/* Goes on with the newest unfinished upload of the object. A store that does not list them costs nothing but what was sent. */
static vs_rc begin_upload(sending *s, vs_err *err) {
  newest x = {0};
  vs_err ignored = {0};
  upload *u = s->u;
  vs_rc rc = s3_multipart_uploads(u->place, u->key, keep_newest, &x, &ignored);
  if (rc == VS_INTERRUPT) return vs_fail(err, rc, "interrupted");
  if (!rc && x.id && s3_multipart_parts(u->place, u->key, x.id, keep_part, s, &ignored)) memset(s->have_size, 0, s->n_parts * sizeof *s->have_size);
  else if (!rc && x.id) {
    s->upload_id = x.id;
    return VS_OK;
  }
  free(x.id);
  return s3_multipart_begin(u->place, u->key, &s->upload_id, err);
}

/* ---- the file ---- */

static vs_rc check_content(const sending *s, vs_err *err) {
  char hex[33];
  XXH128_hash_t h = XXH3_128bits_digest(s->hash);
  snprintf(hex, sizeof hex, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
  if (!strcmp(hex, s->u->checksum)) return VS_OK;
  return vs_corrupt(err, "%s: damaged: its checksum is not the one in the manifest; nothing of it was published", s->u->path);
}

static vs_rc send_in_parts(sending *s, vs_err *err) {
  upload *u = s->u;
  s->etags = calloc(s->n_parts, sizeof *s->etags), s->have = calloc(s->n_parts, sizeof *s->have);
  s->have_size = calloc(s->n_parts, sizeof *s->have_size);
  if (!s->etags || !s->have || !s->have_size) return vs_nomem(err);
  vs_rc rc = begin_upload(s, err);
  if (rc) return rc;
  uint64_t jobs = (uint64_t)u->jobs < s->n_parts ? (uint64_t)u->jobs : s->n_parts;
  if (jobs > 1 && jobs * s->part > MAX_MEMORY) jobs = MAX_MEMORY / s->part ? MAX_MEMORY / s->part : 1;
  vs_pool_run(jobs, (int)jobs, send_parts, s);
  if (s->rc) return vs_fail(err, s->rc, "%s", s->err.text);
  if ((rc = check_content(s, err))) {
    vs_err ignored = {0};
    if (s3_multipart_abort(u->place, u->key, s->upload_id, &ignored)) tool_note("%s", ignored.text);
    return rc;
  }
  return s3_multipart_finish(u->place, u->key, s->upload_id, s->etags, s->n_parts, NULL, err);
}

static vs_rc send_whole(sending *s, vs_err *err) {
  upload *u = s->u;
  uint8_t *buf = malloc(u->size + 1);
  vs_rc rc = buf ? read_part(s, 0, buf, (size_t)u->size, err) : vs_nomem(err);
  if (!rc) {
    XXH3_128bits_update(s->hash, buf, u->size);
    rc = check_content(s, err);
  }
  if (!rc) rc = s3_put(u->place, u->key, buf, (size_t)u->size, 0, NULL, err);
  if (!rc && u->progress) u->progress(u->ctx, u->size);
  free(buf);
  return rc;
}

vs_rc upload_file(upload *u, vs_err *err) {
  sending s = {.u = u, .fd = open(u->path, O_RDONLY | O_CLOEXEC), .part = u->part_size ? u->part_size : upload_part_size(u->size),
               .lock = PTHREAD_MUTEX_INITIALIZER, .hash = XXH3_createState()};
  struct stat st;
  s3_meta there;
  vs_rc rc = VS_OK;
  s.n_parts = (u->size + s.part - 1) / s.part;
  u->n_reused = 0;
  if (s.fd < 0 || fstat(s.fd, &st)) rc = vs_fail(err, VS_IO, "%s: %s", u->path, strerror(errno));
  else if ((uint64_t)st.st_size != u->size) rc = vs_corrupt(err, "%s: damaged: it has not the size that the manifest states", u->path);
  else if (!s.hash) rc = vs_nomem(err);
  else if (s.n_parts > MAX_PARTS)
    rc = vs_fail(err, VS_INVALID, "%s: %llu parts; a store takes 10,000: choose a larger --part-size", u->path, (unsigned long long)s.n_parts);
  if (!rc) {
    XXH3_128bits_reset(s.hash);
    rc = s.n_parts > 1 ? send_in_parts(&s, err) : send_whole(&s, err);
  }
  if (!rc) rc = s3_head(u->place, u->key, &there, err);
  if (!rc && there.size != u->size) rc = vs_fail(err, VS_IO, "%s: the store says %llu bytes, %llu were sent", u->key, (unsigned long long)there.size, (unsigned long long)u->size);
  if (s.fd >= 0) close(s.fd);
  XXH3_freeState(s.hash);
  free(s.upload_id), free(s.etags), free(s.have), free(s.have_size);
  return rc;
}
