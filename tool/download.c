/* download.c - see download.h.
 *
 * Workers fetch steps of STEP bytes and write them where they belong; .NAME.map has a byte per step, set after the step
 * was written. It need not be true after a crash of the machine: the checksum of the whole decides, and a file that
 * fails it is fetched anew once. The checksum wants the bytes in order: whoever has written a step takes what has
 * become contiguous into it, mostly from the system's cache, so that nothing is left to read when the last step
 * arrives.
 *
 * .NAME.part is locked while a process works on it. No file of a shard begins with a dot, so neither is ever taken for
 * one.
 */
#include "download.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../ext/base/vs_pool.h"
#include "output.h"
#include "progress.h"
#include "tool.h"
#include "transfer.h"

enum { STEP = 8 << 20, HASH_BYTES = 1 << 20 };

typedef struct fetching {
  const download *d;
  char *part, *map;        /* paths */
  int fd, map_fd;
  uint64_t n_steps;
  unsigned char *have;     /* by step: written; `lock` guards what follows */
  uint64_t next;           /* to fetch */
  uint64_t hashed;         /* steps that the checksum covers */
  int hashing;             /* somebody is at it */
  transfer_hash *hash;     /* of whoever is at it */
  vs_rc rc;
  vs_err err;
  pthread_mutex_t lock;
} fetching;

static char *hidden(const char *path, const char *suffix) {
  const char *slash = strrchr(path, '/');
  int dir = slash ? (int)(slash + 1 - path) : 0;
  return tool_format("%.*s.%s%s", dir, path, path + dir, suffix);
}

static uint64_t step_bytes(const download *d, uint64_t i) {
  uint64_t left = d->size - i * STEP;
  return left < STEP ? left : STEP;
}

/* ---- the checksum ---- */

static vs_rc hash_range(int fd, const char *path, uint64_t off, uint64_t len, transfer_hash *h, vs_err *err) {
  uint8_t *buf = malloc(HASH_BYTES);
  vs_rc rc = buf ? VS_OK : vs_nomem(err);
  while (len && !rc) {
    ssize_t n = pread(fd, buf, len < HASH_BYTES ? len : HASH_BYTES, (off_t)off);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) rc = vs_fail(err, VS_IO, "%s: %s", path, n ? strerror(errno) : "cut short while it was read");
    else transfer_hash_add(h, buf, (size_t)n), off += (uint64_t)n, len -= (uint64_t)n;
  }
  free(buf);
  return rc;
}

vs_rc download_is_done(const download *d, int *done, vs_err *err) {
  struct stat st;
  vs_rc rc = VS_OK;
  *done = 0;
  int fd = open(d->path, O_RDONLY | O_CLOEXEC);
  transfer_hash *h =
      fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != d->size ? NULL : transfer_hash_new();
  for (uint64_t at = 0; h && at < d->size && !rc; at += STEP) {
    progress_bytes("check", at, d->size);
    rc = tool_stop(NULL) ? vs_fail(err, VS_INTERRUPT, "interrupted")
                         : hash_range(fd, d->path, at, step_bytes(d, at / STEP), h, err);
  }
  *done = h && !rc && transfer_hash_is(h, d->checksum);
  transfer_hash_free(h);
  if (fd >= 0) close(fd);
  return rc;
}

/* Takes what is contiguous into the checksum, unless another worker does. Call with the lock held. */
static void follow(fetching *f) {
  if (f->hashing) return;
  f->hashing = 1;
  while (!f->rc && f->hashed < f->n_steps && f->have[f->hashed]) {
    uint64_t i = f->hashed;
    vs_err err = {0};
    pthread_mutex_unlock(&f->lock);
    vs_rc rc = tool_stop(NULL) ? vs_fail(&err, VS_INTERRUPT, "interrupted")
                               : hash_range(f->fd, f->part, i * STEP, step_bytes(f->d, i), f->hash, &err);
    pthread_mutex_lock(&f->lock);
    if (!rc) f->hashed++;
    else if (!f->rc) f->rc = rc, f->err = err;
  }
  f->hashing = 0;
}

/* ---- steps ---- */

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
  static const uint8_t one = 1;
  const download *d = f->d;
  uint64_t len = step_bytes(d, i);
  uint8_t *body;
  size_t n;
  vs_rc rc = s3_get(d->place, d->key, i * STEP, len, d->etag, len, &body, &n, NULL, err);
  if (rc) return rc;
  if (n != len) rc = vs_fail(err, VS_IO, "%s: %zu bytes arrived instead of %llu", d->key, n, (unsigned long long)len);
  if (!rc) rc = write_all(f->fd, body, n, i * STEP, f->part, err);
  free(body);
  return rc ? rc : write_all(f->map_fd, &one, 1, i, f->map, err);
}

/* The next step that is missing; 0: there is none, or it failed. Call with the lock held. */
static int take_step(fetching *f, uint64_t *i) {
  if (!f->rc && tool_stop(NULL)) f->rc = vs_fail(&f->err, VS_INTERRUPT, "interrupted");
  while (!f->rc && f->next < f->n_steps && f->have[f->next]) f->next++;
  if (f->rc || f->next >= f->n_steps) return 0;
  *i = f->next++;
  return 1;
}

static void fetch_steps(void *ctx, size_t worker) {
  fetching *f = ctx;
  uint64_t i;
  pthread_mutex_lock(&f->lock);
  if (!worker) follow(f); /* what an earlier run left */
  while (take_step(f, &i)) {
    vs_err err = {0};
    pthread_mutex_unlock(&f->lock);
    vs_rc rc = fetch_step(f, i, &err);
    pthread_mutex_lock(&f->lock);
    if (rc && !f->rc) f->rc = rc, f->err = err;
    if (rc) break;
    f->have[i] = 1;
    f->d->progress(f->d->ctx, step_bytes(f->d, i), 1);
    follow(f);
  }
  pthread_mutex_unlock(&f->lock);
}

/* ---- the file ---- */

static vs_rc io_fail(const char *path, vs_err *err) { return vs_fail(err, VS_IO, "%s: %s", path, strerror(errno)); }

/* Opens and locks the part. Another run may have given it its name in between: then our lock is on the finished file. */
static vs_rc open_part(fetching *f, vs_err *err) {
  struct stat ours, named;
  f->fd = open(f->part, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (f->fd < 0) return vs_fail(err, VS_IO, "%s: cannot write: %s", f->part, strerror(errno));
  int locked = !flock(f->fd, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK; /* a file system without locks: go on without */
  if (!locked || fstat(f->fd, &ours) || stat(f->part, &named) || ours.st_ino != named.st_ino)
    return vs_fail(err, VS_EXISTS, "%s: another process is pulling this file; run the command again when it has ended",
                   f->part);
  f->map_fd = open(f->map, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
  return f->map_fd < 0 ? vs_fail(err, VS_IO, "%s: cannot write: %s", f->map, strerror(errno)) : VS_OK;
}

/* Which steps an earlier run left; 0: none, or of another object. */
static int read_map(const download *d, int part_fd, int map_fd, unsigned char *have, uint64_t n_steps) {
  struct stat st;
  if (fstat(part_fd, &st) || (uint64_t)st.st_size != d->size) return 0;
  ssize_t n = pread(map_fd, have, n_steps, 0);
  for (ssize_t i = 0; i < n; i++) have[i] = have[i] == 1;
  return n > 0;
}

static vs_rc prepare(fetching *f, vs_err *err) {
  if (!read_map(f->d, f->fd, f->map_fd, f->have, f->n_steps) &&
      (ftruncate(f->map_fd, 0) || ftruncate(f->fd, 0) || ftruncate(f->fd, (off_t)f->d->size)))
    return io_fail(f->part, err);
  for (uint64_t i = 0; i < f->n_steps; i++)
    if (f->have[i]) f->d->progress(f->d->ctx, step_bytes(f->d, i), 0);
  return VS_OK;
}

static vs_rc fetch_all(fetching *f, vs_err *err) {
  size_t jobs = (uint64_t)f->d->jobs < f->n_steps ? (size_t)f->d->jobs : (size_t)f->n_steps;
  if (!(f->hash = transfer_hash_new())) return vs_nomem(err);
  int64_t before = transfer_allow_time(jobs * (uint64_t)STEP);
  vs_pool_run(jobs, (int)jobs, fetch_steps, f);
  transfer_reset_time(before);
  if (f->rc) return vs_fail(err, f->rc, "%s", f->err.text);
  if (transfer_hash_is(f->hash, f->d->checksum)) return VS_OK;
  unlink(f->part), unlink(f->map); /* which bytes are wrong, nobody knows */
  char *name = s3_place_name(f->d->place, f->d->key);
  vs_rc rc = vs_corrupt(err, "%s: damaged: what arrived has not the checksum that the manifest states",
                        name ? name : f->d->key);
  free(name);
  return rc;
}

static vs_rc attempt(const download *d, vs_err *err) {
  fetching f = {.d = d, .fd = -1, .map_fd = -1, .n_steps = (d->size + STEP - 1) / STEP, .lock = PTHREAD_MUTEX_INITIALIZER};
  f.part = hidden(d->path, ".part"), f.map = hidden(d->path, ".map");
  f.have = tool_alloc(f.n_steps, 1);
  vs_rc rc = open_part(&f, err);
  if (!rc) rc = prepare(&f, err);
  if (!rc) rc = fetch_all(&f, err);
  if (!rc && (fsync(f.fd) || rename(f.part, d->path))) rc = io_fail(f.part, err);
  if (!rc) unlink(f.map);
  if (f.map_fd >= 0) close(f.map_fd);
  if (f.fd >= 0) close(f.fd);
  transfer_hash_free(f.hash);
  free(f.part), free(f.map), free(f.have);
  return rc;
}

vs_rc download_file(const download *d, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = attempt(d, &why);
  if (rc == VS_CORRUPT) {
    vs_err_reset(&why);
    rc = attempt(d, &why);
  }
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

uint64_t download_missing(const download *d) {
  uint64_t n_steps = (d->size + STEP - 1) / STEP, missing = d->size;
  char *part = hidden(d->path, ".part"), *map = hidden(d->path, ".map");
  unsigned char *have = tool_alloc(n_steps, 1);
  int part_fd = open(part, O_RDONLY | O_CLOEXEC), map_fd = open(map, O_RDONLY | O_CLOEXEC);
  if (part_fd >= 0 && map_fd >= 0 && read_map(d, part_fd, map_fd, have, n_steps))
    for (uint64_t i = 0; i < n_steps; i++) missing -= have[i] ? step_bytes(d, i) : 0;
  if (part_fd >= 0) close(part_fd);
  if (map_fd >= 0) close(map_fd);
  free(part), free(map), free(have);
  return missing;
}

/* name: ".NAME.part" */
static void drop_part(const char *dir, const char *name) {
  char *part = tool_format("%s/%s", dir, name), *map = tool_format("%s/%.*s.map", dir, (int)strlen(name) - 5, name);
  int fd = open(part, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd >= 0 && !flock(fd, LOCK_EX | LOCK_NB)) unlink(part), unlink(map);
  if (fd >= 0) close(fd);
  free(part), free(map);
}

void download_drop_leftovers(const char *dir) {
  DIR *d = opendir(dir);
  for (struct dirent *e; d && (e = readdir(d));) {
    size_t n = strlen(e->d_name);
    if (e->d_name[0] == '.' && n > 6 && !strcmp(e->d_name + n - 5, ".part")) drop_part(dir, e->d_name);
  }
  if (d) closedir(d);
}
