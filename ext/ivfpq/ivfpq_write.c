/* ivfpq_write.c - see ivfpq_write.h. */
#include "ivfpq_write.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "ivfpq_int.h"

enum { BUFFER = 1 << 20, HASH_STEP = 64 << 10 };

struct ivfpq_writer {
  int fd;
  char *path;
  uint64_t off, start; /* next byte; where the open section began */
  size_t have;
  ivfpq_section section[IVFPQ_N_SECTIONS];
  uint32_t n_sections;
  XXH3_state_t *file, *part;
  uint64_t mark_off;   /* and the state there */
  uint32_t mark_sections;
  XXH3_state_t *mark_file;
  uint8_t buf[BUFFER];
};

static vs_rc flush(ivfpq_writer *w, vs_err *err) {
  vs_rc rc = ivfpq_pwrite(w->fd, w->buf, w->have, w->off - w->have, w->path, err);
  if (!rc) XXH3_128bits_update(w->file, w->buf, w->have);
  w->have = 0;
  return rc;
}

static vs_rc put(ivfpq_writer *w, const void *p, size_t n, vs_err *err) {
  const uint8_t *at = p;
  while (n) {
    size_t m = n < BUFFER - w->have ? n : BUFFER - w->have;
    memcpy(w->buf + w->have, at, m);
    w->have += m, w->off += m, at += m, n -= m;
    if (w->have == BUFFER) {
      vs_rc rc = flush(w, err);
      if (rc) return rc;
    }
  }
  return VS_OK;
}

/* A large piece goes out as it is, without a copy, and both hashes see it while it is in the cache. */
static vs_rc put_large(ivfpq_writer *w, const uint8_t *p, size_t n, vs_err *err) {
  vs_rc rc = flush(w, err);
  for (size_t at = 0; at < n && !rc; at += HASH_STEP) {
    size_t m = n - at < HASH_STEP ? n - at : HASH_STEP;
    XXH3_64bits_update(w->part, p + at, m);
    XXH3_128bits_update(w->file, p + at, m);
  }
  if (!rc) rc = ivfpq_pwrite(w->fd, p, n, w->off, w->path, err);
  w->off += n;
  return rc;
}

vs_rc ivfpq_writer_put(ivfpq_writer *w, const void *p, size_t n, vs_err *err) {
  if (n >= BUFFER / 4) return put_large(w, p, n, err);
  if (n) XXH3_64bits_update(w->part, p, n);
  return put(w, p, n, err);
}

vs_rc ivfpq_writer_open(const char *path, ivfpq_writer **out, vs_err *err) {
  static const uint8_t header[IVFPQ_HEADER] = IVFPQ_MAGIC; /* format 0 and reserved zeros */
  *out = NULL;
  ivfpq_writer *w = calloc(1, sizeof *w);
  if (!w) return vs_nomem(err);
  w->fd = -1;
  w->file = XXH3_createState(), w->part = XXH3_createState(), w->mark_file = XXH3_createState();
  w->path = strdup(path);
  vs_rc rc = w->file && w->part && w->mark_file && w->path ? VS_OK : vs_nomem(err);
  if (!rc && (w->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644)) < 0)
    rc = vs_fail(err, errno == EEXIST ? VS_EXISTS : VS_IO, "%s: cannot create: %s", path, strerror(errno));
  if (!rc) {
    XXH3_128bits_reset(w->file);
    rc = put(w, header, sizeof header, err);
  }
  if (rc) ivfpq_writer_abort(w);
  else *out = w;
  return rc;
}

static vs_rc zeros(ivfpq_writer *w, size_t n, int in_section, vs_err *err) {
  static const uint8_t z[IVFPQ_PAGE];
  vs_rc rc = VS_OK;
  while (n && !rc) {
    size_t m = n < sizeof z ? n : sizeof z;
    rc = in_section ? ivfpq_writer_put(w, z, m, err) : put(w, z, m, err);
    n -= m;
  }
  return rc;
}

vs_rc ivfpq_writer_begin(ivfpq_writer *w, ivfpq_section_id id, vs_err *err) {
  vs_rc rc = zeros(w, ivfpq_round(w->off, IVFPQ_ALIGN) - w->off, 0, err);
  w->start = w->off;
  w->section[w->n_sections] = (ivfpq_section){.id = id, .off = w->off};
  XXH3_64bits_reset(w->part);
  return rc;
}

void ivfpq_writer_end(ivfpq_writer *w) {
  w->section[w->n_sections].size = w->off - w->start;
  w->section[w->n_sections++].check = XXH3_64bits_digest(w->part);
}

uint64_t ivfpq_writer_tell(const ivfpq_writer *w) { return w->off - w->start; }
uint64_t ivfpq_writer_start(const ivfpq_writer *w) { return w->start; }

vs_rc ivfpq_writer_pad(ivfpq_writer *w, size_t to, vs_err *err) {
  uint64_t at = ivfpq_writer_tell(w);
  return zeros(w, ivfpq_round(at, to) - at, 1, err);
}

vs_rc ivfpq_writer_ahead(ivfpq_writer *w, const void *p, size_t n, uint64_t off, vs_err *err) {
  return ivfpq_pwrite(w->fd, p, n, off, w->path, err);
}

vs_rc ivfpq_writer_adopt(ivfpq_writer *w, ivfpq_section_id id, uint64_t n, vs_err *err) {
  vs_rc rc = ivfpq_writer_begin(w, id, err);
  if (!rc) rc = flush(w, err);
  for (uint64_t at = 0; at < n && !rc;) { /* through the buffer, which is empty */
    size_t m = n - at < BUFFER ? (size_t)(n - at) : BUFFER;
    rc = ivfpq_pread(w->fd, w->buf, m, w->off, w->path, err);
    if (!rc) XXH3_64bits_update(w->part, w->buf, m), XXH3_128bits_update(w->file, w->buf, m);
    w->off += m, at += m;
  }
  ivfpq_writer_end(w);
  return rc;
}

vs_rc ivfpq_writer_copy(ivfpq_writer *w, int fd, uint64_t n, vs_err *err) {
  uint8_t *buf = malloc(BUFFER);
  vs_rc rc = buf ? VS_OK : vs_nomem(err);
  for (uint64_t at = 0; at < n && !rc;) {
    size_t m = n - at < BUFFER ? n - at : BUFFER;
    rc = ivfpq_pread(fd, buf, m, at, "temporary file", err);
    if (!rc) rc = ivfpq_writer_put(w, buf, m, err);
    at += m;
  }
  free(buf);
  return rc;
}

static void free_writer(ivfpq_writer *w) {
  if (w->fd >= 0) close(w->fd);
  XXH3_freeState(w->file), XXH3_freeState(w->part), XXH3_freeState(w->mark_file);
  free(w->path), free(w);
}

static vs_rc put_trailer(ivfpq_writer *w, vs_err *err) {
  uint8_t trailer[IVFPQ_TRAILER] = {0};
  vs_rc rc = zeros(w, ivfpq_round(w->off, IVFPQ_ALIGN) - w->off, 0, err);
  uint64_t footer_off = w->off, footer_bytes = (uint64_t)w->n_sections * sizeof(ivfpq_section);
  uint64_t footer_check = ivfpq_check(w->section, footer_bytes), size = footer_off + footer_bytes + IVFPQ_TRAILER;
  memcpy(trailer, &footer_off, 8), memcpy(trailer + 8, &w->n_sections, 4);
  memcpy(trailer + 16, &footer_check, 8), memcpy(trailer + 24, &size, 8);
  uint64_t check = ivfpq_check(trailer, 48);
  memcpy(trailer + 48, &check, 8), memcpy(trailer + 56, IVFPQ_MAGIC_END, 8);
  if (!rc) rc = put(w, w->section, footer_bytes, err);
  if (!rc) rc = put(w, trailer, sizeof trailer, err);
  return rc ? rc : flush(w, err);
}

vs_rc ivfpq_writer_mark(ivfpq_writer *w, vs_err *err) {
  vs_rc rc = flush(w, err);
  w->mark_off = w->off, w->mark_sections = w->n_sections;
  XXH3_copyState(w->mark_file, w->file);
  return rc;
}

vs_rc ivfpq_writer_preview(ivfpq_writer *w, vs_err *err) { return put_trailer(w, err); }

vs_rc ivfpq_writer_back(ivfpq_writer *w, vs_err *err) {
  w->off = w->mark_off, w->n_sections = w->mark_sections, w->have = 0;
  XXH3_copyState(w->file, w->mark_file);
  return ftruncate(w->fd, (off_t)w->off) ? vs_fail(err, VS_IO, "%s: cannot cut: %s", w->path, strerror(errno)) : VS_OK;
}

vs_rc ivfpq_writer_finish(ivfpq_writer *w, char checksum[33], uint64_t *n_bytes, vs_err *err) {
  vs_rc rc = put_trailer(w, err);
  if (!rc && fsync(w->fd)) rc = vs_fail(err, VS_IO, "%s: fsync: %s", w->path, strerror(errno));
  if (rc) {
    ivfpq_writer_abort(w);
    return rc;
  }
  XXH128_hash_t h = XXH3_128bits_digest(w->file);
  snprintf(checksum, 33, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
  *n_bytes = w->off;
  free_writer(w);
  return VS_OK;
}

void ivfpq_writer_abort(ivfpq_writer *w) {
  if (!w) return;
  if (w->fd >= 0) unlink(w->path);
  free_writer(w);
}
