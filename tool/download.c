/* download.c - see download.h.
 *
 * Workers fetch steps of STEP bytes and write them where they belong; PATH.map has a byte per step, set after the step was
 * written. It need not be true after a crash of the machine: the checksum of the whole decides, and a file that fails it is
 * fetched anew once.
 */
#include "download.h"

#include <errno.h>
#include <fcntl.h>
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

enum { STEP = 8 << 20, HASH_STEP = 1 << 20 };

typedef struct fetching {
  download *d;
  int fd, map;
  uint64_t n_steps;
  unsigned char *have;
  char etag[S3_ETAG_MAX];
  pthread_mutex_t lock; /* guards what follows */
  uint64_t next;
  vs_rc rc;
  vs_err err;
} fetching;

/* ---- checksums ---- */

static int has_checksum(int fd, uint64_t size, const char *checksum) {
  struct stat st;
  char hex[33] = "";
  uint8_t *buf = malloc(HASH_STEP);
  XXH3_state_t *state = XXH3_createState();
  uint64_t at = 0;
  if (buf && state && !fstat(fd, &st) && (uint64_t)st.st_size == size) {
    XXH3_128bits_reset(state);
    for (ssize_t n; at < size && (n = pread(fd, buf, HASH_STEP, (off_t)at)) > 0; at += (uint64_t)n) XXH3_128bits_update(state, buf, (size_t)n);
    XXH128_hash_t h = XXH3_128bits_digest(state);
    if (at == size) snprintf(hex, sizeof hex, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
  }
  XXH3_freeState(state);
  free(buf);
  return !strcmp(hex, checksum);
}

int download_is_done(const char *path, uint64_t size, const char *checksum) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  int done = fd >= 0 && has_checksum(fd, size, checksum);
  if (fd >= 0) close(fd);
  return done;
}

/* ---- steps ---- */

static uint64_t step_bytes(const fetching *f, uint64_t i) {
  uint64_t left = f->d->size - i * STEP;
  return left < STEP ? left : STEP;
}

static int take_step(fetching *f, uint64_t *i) {
  pthread_mutex_lock(&f->lock);
  if (!f->rc && tool_stop(NULL)) f->rc = vs_fail(&f->err, VS_INTERRUPT, "interrupted");
  while (!f->rc && f->next < f->n_steps && f->have[f->next]) f->next++;
  int go = !f->rc && f->next < f->n_steps;
  if (go) *i = f->next++;
  pthread_mutex_unlock(&f->lock);
  return go;
}

static vs_rc write_all(int fd, const uint8_t *p, size_t n, uint64_t at, const char *path, vs_err *err) {
  while (n) {
    ssize_t w = pwrite(fd, p, n, (off_t)at);
    if (w < 0 && errno == EINTR) continue;
    if (w <= 0) return vs_fail(err, VS_IO, "%s: cannot write: %s", path, strerror(errno));
    p += w, n -= (size_t)w, at += (uint64_t)w;
  }
  return VS_OK;
}

static vs_rc fetch_step(fetching *f, uint64_t i, vs_err *err) {
  uint8_t *body;
  size_t n;
  static const uint8_t one = 1;
  uint64_t len = step_bytes(f, i);
  vs_rc rc = s3_get(f->d->place, f->d->key, i * STEP, len, f->etag, len, &body, &n, NULL, err);
  if (rc) return rc;
  rc = write_all(f->fd, body, n, i * STEP, f->d->path, err);
  free(body);
  return rc ? rc : write_all(f->map, &one, 1, i, f->d->path, err);
}

static void fetch_steps(void *ctx, size_t worker) {
  fetching *f = ctx;
  uint64_t i;
  (void)worker;
  while (take_step(f, &i)) {
    vs_err err = {0};
    vs_rc rc = fetch_step(f, i, &err);
    pthread_mutex_lock(&f->lock);
    if (rc && !f->rc) f->rc = rc, f->err = err;
    if (!rc && f->d->progress) f->d->progress(f->d->ctx, step_bytes(f, i));
    pthread_mutex_unlock(&f->lock);
  }
}

/* ---- the file ---- */

static vs_rc open_file(const char *path, int *fd, vs_err *err) {
  *fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
  return *fd < 0 ? vs_fail(err, VS_IO, "%s: cannot write: %s", path, strerror(errno)) : VS_OK;
}

/* What an earlier run left, if it was for the same object. */
static vs_rc prepare(fetching *f, const char *part, const char *map, vs_err *err) {
  struct stat st;
  vs_rc rc = open_file(part, &f->fd, err);
  if (!rc) rc = open_file(map, &f->map, err);
  if (rc) return rc;
  int resumes = !fstat(f->fd, &st) && (uint64_t)st.st_size == f->d->size && pread(f->map, f->have, f->n_steps, 0) > 0;
  if (!resumes) {
    memset(f->have, 0, f->n_steps + 1);
    if (ftruncate(f->map, 0) || ftruncate(f->fd, 0) || ftruncate(f->fd, (off_t)f->d->size))
      return vs_fail(err, VS_IO, "%s: %s", part, strerror(errno));
  }
  for (uint64_t i = 0; i < f->n_steps; i++)
    if (f->have[i] && f->d->progress) f->d->progress(f->d->ctx, step_bytes(f, i));
  return VS_OK;
}

static vs_rc fetch_all(fetching *f, const char *part, const char *map, vs_err *err) {
  s3_meta meta;
  vs_rc rc = s3_head(f->d->place, f->d->key, &meta, err);
  if (!rc && meta.size != f->d->size)
    rc = vs_corrupt(err, "%s: the object has %llu bytes, its manifest says %llu", f->d->key, (unsigned long long)meta.size, (unsigned long long)f->d->size);
  if (!rc) {
    strcpy(f->etag, meta.etag);
    rc = prepare(f, part, map, err);
  }
  if (rc) return rc;
  vs_pool_run((size_t)f->d->jobs, f->d->jobs, fetch_steps, f);
  if (f->rc) return vs_fail(err, f->rc, "%s", f->err.text);
  if (!has_checksum(f->fd, f->d->size, f->d->checksum)) {
    if (ftruncate(f->map, 0)) return vs_fail(err, VS_IO, "%s: %s", map, strerror(errno));
    return vs_corrupt(err, "%s: damaged: what arrived has not the checksum that the manifest states", f->d->key);
  }
  if (fsync(f->fd) || rename(part, f->d->path)) return vs_fail(err, VS_IO, "%s: %s", f->d->path, strerror(errno));
  unlink(map);
  return VS_OK;
}

static vs_rc attempt(download *d, vs_err *err) {
  fetching f = {.d = d, .fd = -1, .map = -1, .n_steps = (d->size + STEP - 1) / STEP, .lock = PTHREAD_MUTEX_INITIALIZER};
  char *part = tool_format("%s.part", d->path), *map = tool_format("%s.map", d->path);
  f.have = tool_alloc(f.n_steps + 1, 1);
  vs_rc rc = fetch_all(&f, part, map, err);
  if (f.fd >= 0) close(f.fd);
  if (f.map >= 0) close(f.map);
  free(part), free(map), free(f.have);
  return rc;
}

vs_rc download_file(download *d, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = attempt(d, &why);
  if (rc == VS_CORRUPT) {
    vs_err_reset(&why);
    rc = attempt(d, &why);
  }
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}
