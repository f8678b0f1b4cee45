/* ivfpq_state.c - see ivfpq_state.h. */
#include "ivfpq_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "ivfpq_int.h"

enum { BUFFER = 1 << 18, HEAD = 16, CHECK = 16 };
static const char magic[8] = "VSBUILD";

struct ivfpq_state {
  int fd, folder;
  char *path, *temporary; /* temporary: NULL when reading */
  uint64_t off, end;      /* of the file; end: of the values, when reading */
  size_t have, at;        /* bytes in buf; of which were read */
  int failed;             /* reading: a get went behind the end */
  vs_rc rc;
  vs_err err;
  XXH3_state_t *hash;
  uint8_t buf[BUFFER];
};

static void free_state(ivfpq_state *s) {
  if (s->fd >= 0) close(s->fd);
  if (s->folder >= 0) close(s->folder);
  XXH3_freeState(s->hash);
  free(s->path), free(s->temporary), free(s);
}

static vs_rc new_state(const char *folder, const char *name, int writing, ivfpq_state **out, vs_err *err) {
  ivfpq_state *s = calloc(1, sizeof *s);
  *out = NULL;
  if (!s) return vs_nomem(err);
  s->fd = s->folder = -1;
  s->hash = XXH3_createState();
  if (asprintf(&s->path, "%s/%s", folder, name) < 0) s->path = NULL;
  if (writing && asprintf(&s->temporary, "%s/%s.tmp", folder, name) < 0) s->temporary = NULL;
  if (!s->hash || !s->path || (writing && !s->temporary)) {
    free_state(s);
    return vs_nomem(err);
  }
  XXH3_128bits_reset(s->hash);
  *out = s;
  return VS_OK;
}

static void head_of(const char *key, uint8_t head[HEAD]) {
  uint64_t hash = XXH3_64bits(key, strlen(key));
  memcpy(head, magic, 8), memcpy(head + 8, &hash, 8);
}

/* ---- writing ---- */

vs_rc ivfpq_state_create(const char *folder, const char *name, const char *key, ivfpq_state **out, vs_err *err) {
  uint8_t head[HEAD];
  ivfpq_state *s;
  vs_rc rc = new_state(folder, name, 1, &s, err);
  *out = NULL;
  if (rc) return rc;
  s->folder = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  s->fd = open(s->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (s->fd < 0 || s->folder < 0) {
    rc = vs_fail(err, VS_IO, "%s: cannot create: %s", s->temporary, strerror(errno));
    free_state(s);
    return rc;
  }
  head_of(key, head);
  ivfpq_state_put(s, head, sizeof head);
  *out = s;
  return VS_OK;
}

static void flush(ivfpq_state *s) {
  XXH3_128bits_update(s->hash, s->buf, s->have);
  if (!s->rc) s->rc = ivfpq_pwrite(s->fd, s->buf, s->have, s->off, s->temporary, &s->err);
  s->off += s->have, s->have = 0;
}

void ivfpq_state_put(ivfpq_state *s, const void *p, size_t n) {
  const uint8_t *from = p;
  while (n) {
    size_t m = n < BUFFER - s->have ? n : BUFFER - s->have;
    memcpy(s->buf + s->have, from, m);
    s->have += m, from += m, n -= m;
    if (s->have == BUFFER) flush(s);
  }
}

vs_rc ivfpq_state_commit(ivfpq_state *s, vs_err *err) {
  flush(s);
  XXH128_hash_t h = XXH3_128bits_digest(s->hash);
  uint64_t check[2] = {h.low64, h.high64};
  vs_rc rc = s->rc ? vs_fail(err, s->rc, "%s", s->err.text) : ivfpq_pwrite(s->fd, check, sizeof check, s->off, s->temporary, err);
  if (!rc && (fsync(s->fd) || rename(s->temporary, s->path) || fsync(s->folder)))
    rc = vs_fail(err, VS_IO, "%s: cannot be made durable: %s", s->path, strerror(errno));
  if (rc) unlink(s->temporary);
  free_state(s);
  return rc;
}

void ivfpq_state_abort(ivfpq_state *s) {
  if (!s) return;
  unlink(s->temporary);
  free_state(s);
}

/* ---- reading ---- */

/* The hash of the first n bytes of a file, on top of what the state has seen. */
static vs_rc hash_file(int fd, XXH3_state_t *hash, uint64_t n, uint8_t *buf, const char *name, vs_err *err) {
  vs_rc rc = VS_OK;
  for (uint64_t at = 0; at < n && !rc;) {
    size_t m = n - at < BUFFER ? (size_t)(n - at) : BUFFER;
    rc = ivfpq_pread(fd, buf, m, at, name, err);
    if (!rc) XXH3_128bits_update(hash, buf, m);
    at += m;
  }
  return rc;
}

static vs_rc check_whole(ivfpq_state *s, const char *key, vs_err *err) {
  struct stat st;
  uint8_t head[HEAD], want[HEAD];
  uint64_t check[2];
  if (fstat(s->fd, &st) || !S_ISREG(st.st_mode) || st.st_size < HEAD + CHECK) return vs_corrupt(err, "%s: is too short", s->path);
  s->end = (uint64_t)st.st_size - CHECK, s->off = HEAD;
  head_of(key, want);
  vs_rc rc = ivfpq_pread(s->fd, head, sizeof head, 0, s->path, err);
  if (!rc) rc = ivfpq_pread(s->fd, check, sizeof check, s->end, s->path, err);
  if (!rc && memcmp(head, want, sizeof head)) return vs_fail(err, VS_INVALID, "%s: belongs to another build", s->path);
  if (!rc) rc = hash_file(s->fd, s->hash, s->end, s->buf, s->path, err);
  if (rc) return rc;
  XXH128_hash_t h = XXH3_128bits_digest(s->hash);
  return h.low64 == check[0] && h.high64 == check[1] ? VS_OK : vs_corrupt(err, "%s: is damaged", s->path);
}

vs_rc ivfpq_state_open(const char *folder, const char *name, const char *key, ivfpq_state **out, vs_err *err) {
  ivfpq_state *s;
  vs_rc rc = new_state(folder, name, 0, &s, err);
  *out = NULL;
  if (rc) return rc;
  s->fd = open(s->path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (s->fd < 0) rc = vs_fail(err, errno == ENOENT ? VS_NOTFOUND : VS_IO, "%s: cannot open: %s", s->path, strerror(errno));
  else rc = check_whole(s, key, err);
  if (rc) free_state(s);
  else *out = s;
  return rc;
}

void ivfpq_state_get(ivfpq_state *s, void *p, size_t n) {
  uint8_t *to = p;
  if (n > ivfpq_state_left(s)) s->failed = 1;
  if (s->failed) {
    memset(p, 0, n);
    return;
  }
  while (n) {
    if (s->at == s->have) {
      s->have = s->end - s->off < BUFFER ? (size_t)(s->end - s->off) : BUFFER, s->at = 0;
      if (!s->rc) s->rc = ivfpq_pread(s->fd, s->buf, s->have, s->off, s->path, &s->err);
      if (s->rc) s->failed = 1, memset(s->buf, 0, s->have);
      s->off += s->have;
    }
    size_t m = n < s->have - s->at ? n : s->have - s->at;
    memcpy(to, s->buf + s->at, m);
    s->at += m, to += m, n -= m;
  }
}

uint64_t ivfpq_state_left(const ivfpq_state *s) { return s->failed ? 0 : s->end - s->off + (s->have - s->at); }

vs_rc ivfpq_state_close(ivfpq_state *s, vs_err *err) {
  vs_rc rc = s->rc ? vs_fail(err, s->rc, "%s", s->err.text)
             : s->failed || ivfpq_state_left(s) ? vs_corrupt(err, "%s: has other contents than it should", s->path)
                                                : VS_OK;
  free_state(s);
  return rc;
}

vs_rc ivfpq_file_check(const char *path, uint64_t *size, char hex[33], vs_err *err) {
  struct stat st;
  uint8_t *buf = malloc(BUFFER);
  XXH3_state_t *hash = XXH3_createState();
  int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  vs_rc rc = buf && hash ? VS_OK : vs_nomem(err);
  *size = 0, *hex = 0;
  if (!rc && (fd < 0 || fstat(fd, &st)))
    rc = vs_fail(err, errno == ENOENT ? VS_NOTFOUND : VS_IO, "%s: cannot open: %s", path, strerror(errno));
  if (!rc) {
    XXH3_128bits_reset(hash);
    rc = hash_file(fd, hash, *size = (uint64_t)st.st_size, buf, path, err);
  }
  if (!rc) {
    XXH128_hash_t h = XXH3_128bits_digest(hash);
    snprintf(hex, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
  }
  if (fd >= 0) close(fd);
  XXH3_freeState(hash), free(buf);
  return rc;
}
