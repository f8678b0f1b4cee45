/* shard_hint.c - see shard_hint.h. What opening a segment reads is not listed anywhere: it is recorded while one is opened. */
#include "shard_hint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../ivfpq/ivfpq_segment.h"
#include "../s3vfs/io_local.h"

#define MAGIC "VSHINT\0" /* with the terminating zero, 8 bytes */
enum { HEADER = 64, RANGE = 24, MAX_RANGES = 4096 };

typedef struct header {
  char magic[8];
  uint32_t format, n_ranges;
  uint64_t version;
  uint32_t etag_len, manifest_len;
  uint64_t check;
  uint8_t reserved[24];
} header;
_Static_assert(sizeof(header) == HEADER, "size in the object");

typedef struct range { uint32_t segment, zero; uint64_t off, len; } range;
_Static_assert(sizeof(range) == RANGE, "size in the object");

/* ---- recording ---- */

typedef struct record {
  range *ranges;
  size_t n, room;
  uint8_t *bytes;
  size_t n_bytes, max_bytes;
  uint32_t segment;
  int failed;
} record;

typedef struct recorder { vs_io io; vs_io *inner; record *record; } recorder;

static void note(record *r, const vs_range *x) {
  if (x->len > r->max_bytes - r->n_bytes || r->n >= MAX_RANGES) return; /* does not fit: the reader fetches it */
  if (r->n == r->room) {
    size_t room = r->room * 2 + 16;
    range *grown = realloc(r->ranges, room * sizeof *grown);
    if (!grown) {
      r->failed = 1;
      return;
    }
    r->ranges = grown, r->room = room;
  }
  r->ranges[r->n++] = (range){.segment = r->segment, .off = x->off, .len = x->len};
  memcpy(r->bytes + r->n_bytes, x->ptr, x->len);
  r->n_bytes += x->len;
}

static vs_rc begin(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  recorder *c = (recorder *)io;
  vs_rc rc = vs_io_fetch(c->inner, r, n, err);
  for (size_t i = 0; i < n && !rc; i++) note(c->record, &r[i]);
  return rc;
}
static void release(vs_io *io, vs_range *r, size_t n) { vs_io_release(((recorder *)io)->inner, r, n); }
static void close_recorder(vs_io *io) {
  vs_io_close(((recorder *)io)->inner);
  free(io);
}

/* Opens the segment as a reader of a store does (not `local`), and so records what that takes. */
static vs_rc record_segment(record *r, const char *path, vs_err *err) {
  ivfpq_segment *s;
  recorder *c = calloc(1, sizeof *c);
  if (!c) return vs_nomem(err);
  vs_rc rc = io_local_open(path, -1, &c->inner, err);
  if (rc) {
    free(c);
    return rc;
  }
  c->record = r;
  c->io = (vs_io){.size = c->inner->size, .name = c->inner->name, .begin = begin, .release = release, .close = close_recorder};
  if ((rc = ivfpq_segment_open(&c->io, &s, err))) return rc;
  ivfpq_segment_close(s);
  return r->failed ? vs_nomem(err) : VS_OK;
}

static vs_rc record_all(record *r, const char *dir, const shard_manifest *m, vs_err *err) {
  vs_rc rc = VS_OK;
  for (uint32_t i = 0; i < m->n_segments && !rc; i++) {
    char path[4400];
    if (snprintf(path, sizeof path, "%s/%s", dir, m->segments[i].file) >= (int)sizeof path) return vs_fail(err, VS_INVALID, "%s: path too long", dir);
    r->segment = i;
    rc = record_segment(r, path, err);
  }
  return rc;
}

/* ---- the object ---- */

static vs_rc assemble(const record *r, const shard_manifest *m, const char *etag, const char *json, uint8_t **body, size_t *n, vs_err *err) {
  size_t etag_len = strlen(etag), json_len = strlen(json), at = HEADER;
  header h = {.n_ranges = (uint32_t)r->n, .version = m->version, .etag_len = (uint32_t)etag_len, .manifest_len = (uint32_t)json_len};
  *n = HEADER + etag_len + json_len + r->n * RANGE + r->n_bytes;
  uint8_t *p = malloc(*n);
  if (!p) return vs_nomem(err);
  memcpy(h.magic, MAGIC, 8);
  memcpy(p + at, etag, etag_len), at += etag_len;
  memcpy(p + at, json, json_len), at += json_len;
  if (r->n) memcpy(p + at, r->ranges, r->n * RANGE);
  at += r->n * RANGE;
  memcpy(p + at, r->bytes, r->n_bytes);
  h.check = ivfpq_check(p + HEADER, *n - HEADER);
  memcpy(p, &h, HEADER);
  *body = p;
  return VS_OK;
}

vs_rc shard_hint_make(const char *dir, const shard_manifest *m, const char *manifest_etag, uint8_t **body, size_t *n, vs_err *err) {
  char *json = NULL;
  record r = {0};
  *body = NULL, *n = 0;
  vs_rc rc = shard_manifest_print(m, &json, err);
  size_t fixed = rc ? 0 : strlen(json) + strlen(manifest_etag) + HEADER;
  if (!rc && fixed < SHARD_HINT_MAX) r.max_bytes = SHARD_HINT_MAX - fixed;
  if (!rc && !(r.bytes = malloc(r.max_bytes + 1))) rc = vs_nomem(err);
  if (!rc) rc = record_all(&r, dir, m, err);
  if (!rc) rc = assemble(&r, m, manifest_etag, json, body, n, err);
  free(json), free(r.ranges), free(r.bytes);
  return rc;
}

int shard_hint_read(const uint8_t *body, size_t n, shard_hint *out) {
  header h;
  if (n < HEADER) return 0;
  memcpy(&h, body, HEADER);
  if (memcmp(h.magic, MAGIC, 8) || h.format || h.n_ranges > MAX_RANGES) return 0;
  uint64_t fixed = HEADER + (uint64_t)h.etag_len + h.manifest_len + (uint64_t)h.n_ranges * RANGE, bytes = 0;
  if (fixed > n || h.check != ivfpq_check(body + HEADER, n - HEADER)) return 0;
  *out = (shard_hint){.body = body, .version = h.version, .n_ranges = h.n_ranges, .etag_len = h.etag_len,
                      .manifest_len = h.manifest_len, .etag = (const char *)body + HEADER,
                      .manifest = (const char *)body + HEADER + h.etag_len,
                      .ranges = body + HEADER + h.etag_len + h.manifest_len, .bytes = body + fixed};
  for (uint32_t i = 0; i < h.n_ranges; i++) {
    range r;
    memcpy(&r, out->ranges + (size_t)i * RANGE, RANGE);
    if (r.len > n - fixed - bytes) return 0;
    bytes += r.len;
  }
  return fixed + bytes == n;
}

vs_rc shard_hint_range(const shard_hint *h, uint32_t i, uint32_t *segment, uint64_t *off, uint64_t *len, uint8_t **copy, vs_err *err) {
  const uint8_t *bytes = h->bytes;
  range r = {0};
  for (uint32_t j = 0; j <= i; j++) {
    bytes += r.len;
    memcpy(&r, h->ranges + (size_t)j * RANGE, RANGE);
  }
  *segment = r.segment, *off = r.off, *len = r.len;
  if (!(*copy = malloc(r.len + 1))) return vs_nomem(err);
  memcpy(*copy, bytes, r.len);
  return VS_OK;
}
