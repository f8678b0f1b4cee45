/* s3_reader.c - see s3_reader.h.
 *
 * A reader follows a few streams: a table scan, the index that another cursor walks, and so on. A stream holds a window of
 * blocks (so that they stay in memory whatever the cache's limit) and, once it has proven to go forward, the window behind it,
 * which is asked for when the present one is half used. A block outside all windows continues the stream that it lies closely
 * behind, with a window of twice the size; otherwise it begins a stream of one block in place of the one least needed: one that
 * never went on, the least recently used of these, so that random reads do not push out a scan.
 *
 * A window travels in pieces of 1 MiB, each a request of its own: one connection to S3 carries less than a machine can take.
 */
#include "s3_reader.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io_s3.h"

enum {
  BLOCK = 64 << 10,
  PIECE = 16,       /* blocks */
  MAX_WINDOW = 128, /* blocks: 8 MiB */
  MIN_WINDOW = 4,   /* blocks that read-ahead may grow to with the smallest cache */
  STREAMS = 4
};

typedef struct window { uint64_t first; size_t n; vs_range *blocks; int arrived; } window; /* blocks; n 0: empty */
typedef struct stream { window now, next; uint64_t used; } stream;

struct s3_reader {
  vs_io *io;         /* NULL: an empty object */
  char *name;
  uint64_t size;
  uint8_t *head;     /* the first block */
  size_t n_head;
  stream streams[STREAMS];
  size_t max_window; /* blocks */
  uint64_t clock;
};

/* ---- windows ---- */

static void window_reset(s3_reader *r, window *w) {
  if (w->n) vs_io_release(r->io, w->blocks, w->n);
  free(w->blocks);
  *w = (window){0};
}

static int has_block(const window *w, uint64_t block) { return w->n && block >= w->first && block - w->first < w->n; }

/* Sends the requests for up to n blocks; w is empty after a failure. */
static vs_rc window_begin(s3_reader *r, window *w, uint64_t first, size_t n, vs_err *err) {
  uint64_t n_blocks = (r->size + BLOCK - 1) / BLOCK;
  vs_rc rc = VS_OK;
  if (n > n_blocks - first) n = (size_t)(n_blocks - first);
  *w = (window){.first = first, .blocks = calloc(n, sizeof *w->blocks)};
  if (!w->blocks) return vs_nomem(err);
  while (w->n < n && !rc) {
    size_t m = n - w->n < PIECE ? n - w->n : PIECE;
    for (size_t i = w->n; i < w->n + m; i++) {
      uint64_t off = (first + i) * BLOCK;
      w->blocks[i] = (vs_range){.off = off, .len = r->size - off < BLOCK ? r->size - off : BLOCK};
    }
    rc = vs_io_begin(r->io, w->blocks + w->n, m, err);
    if (!rc) w->n += m;
  }
  if (rc) window_reset(r, w);
  return rc;
}

static vs_rc window_wait(s3_reader *r, window *w, vs_err *err) {
  if (w->arrived) return VS_OK;
  vs_rc rc = vs_io_wait(r->io, w->blocks, w->n, err);
  w->arrived = !rc;
  if (rc) window_reset(r, w);
  return rc;
}

/* ---- streams ---- */

static int has_gone_on(const stream *s) { return s->now.n > 1; }

/* The stream that a block outside all windows belongs to, and how much to read; or one to give up for it. */
static stream *choose(s3_reader *r, uint64_t block, size_t *n) {
  stream *victim = &r->streams[0];
  for (stream *s = r->streams; s < r->streams + STREAMS; s++) {
    uint64_t end = s->now.first + s->now.n;
    if (s->now.n && block >= end && block - end < s->now.n) {
      *n = s->now.n * 2 < r->max_window ? s->now.n * 2 : r->max_window;
      return s;
    }
    if (has_gone_on(s) != has_gone_on(victim) ? has_gone_on(victim) : s->used < victim->used) victim = s;
  }
  *n = 1;
  return victim;
}

/* Nothing depends on it: without memory, or over the statement's limit, the read that needs the bytes will tell. */
static void read_ahead(s3_reader *r, stream *s, uint64_t block) {
  uint64_t end = s->now.first + s->now.n;
  vs_err ignored = {0};
  if (s->next.n || !has_gone_on(s) || block < s->now.first + s->now.n / 2 || end * BLOCK >= r->size) return;
  size_t n = s->now.n * 2 < r->max_window ? s->now.n * 2 : r->max_window;
  window_begin(r, &s->next, end, n, &ignored);
}

static vs_rc load(s3_reader *r, stream *s, uint64_t block, size_t n, vs_err *err) {
  window_reset(r, &s->next);
  window_reset(r, &s->now);
  vs_rc rc = window_begin(r, &s->now, block, n, err);
  return rc ? rc : window_wait(r, &s->now, err);
}

/* The window on its way becomes the present one. What failed long ago is asked for again. */
static vs_rc advance(s3_reader *r, stream *s, uint64_t block, vs_err *err) {
  size_t n = s->next.n;
  vs_err why = {0};
  vs_rc rc = window_wait(r, &s->next, &why);
  if (rc && rc != VS_INTERRUPT) return load(r, s, block, n, err);
  if (rc) return vs_fail(err, rc, "%s", why.text);
  window_reset(r, &s->now);
  s->now = s->next;
  s->next = (window){0};
  return VS_OK;
}

static vs_rc find_block(s3_reader *r, uint64_t block, const uint8_t **bytes, vs_err *err) {
  stream *s = NULL;
  vs_rc rc = VS_OK;
  for (int i = 0; i < STREAMS && !s; i++)
    if (has_block(&r->streams[i].now, block) || has_block(&r->streams[i].next, block)) s = &r->streams[i];
  if (s && has_block(&s->next, block)) rc = advance(r, s, block, err);
  else if (!s) {
    size_t n;
    s = choose(r, block, &n);
    rc = load(r, s, block, n, err);
  }
  if (rc) return rc;
  s->used = ++r->clock;
  *bytes = s->now.blocks[block - s->now.first].ptr;
  read_ahead(r, s, block);
  return VS_OK;
}

vs_rc s3_reader_read(s3_reader *r, uint64_t off, size_t n, void *dst, vs_err *err) {
  uint8_t *to = dst;
  while (n) {
    const uint8_t *bytes = r->head;
    size_t at = (size_t)(off % BLOCK), m = BLOCK - at < n ? BLOCK - at : n;
    vs_rc rc = off < BLOCK ? VS_OK : find_block(r, off / BLOCK, &bytes, err);
    if (rc) return rc;
    memcpy(to, bytes + at, m);
    to += m, off += m, n -= m;
  }
  return VS_OK;
}

/* ---- opening ---- */

/* Without an ETag the date stands for it in the cache; without both nothing does, and each opening reads anew. */
static vs_rc open_io(s3_reader *r, s3_place *place, const char *key, const s3_meta *m, vs_err *err) {
  static uint64_t opened;
  char instead[64];
  if (m->modified >= 0) snprintf(instead, sizeof instead, "modified %lld", (long long)m->modified);
  else snprintf(instead, sizeof instead, "opened %llu", (unsigned long long)__atomic_fetch_add(&opened, 1, __ATOMIC_RELAXED));
  io_s3_known known = {.size = m->size, .etag = m->etag, .checksum = m->etag[0] ? NULL : instead};
  return io_s3_open(place, key, &known, &r->io, err);
}

/* A share of the cache for the windows of one reader: several readers, and two windows per stream, leave room for others. */
static size_t window_limit(void) {
  uint64_t blocks = io_s3_cache_state().limit / 64 / BLOCK;
  return blocks > MAX_WINDOW ? MAX_WINDOW : blocks > MIN_WINDOW ? (size_t)blocks : MIN_WINDOW;
}

vs_rc s3_reader_open(const char *uri, s3_reader **out, vs_err *err) {
  s3_reader *r = calloc(1, sizeof *r);
  s3_place *place = NULL;
  char *key = NULL;
  s3_meta meta;
  *out = NULL;
  if (!r) return vs_nomem(err);
  vs_rc rc = s3_place_open(uri, &place, &key, err);
  if (!rc && !(r->name = s3_place_name(place, key))) rc = vs_nomem(err);
  if (!rc && !*key) rc = vs_fail(err, VS_INVALID, "%s names no object: s3://bucket/key", r->name);
  if (!rc) rc = s3_get_start(place, key, BLOCK, &r->head, &r->n_head, &meta, err);
  if (!rc && (meta.size > INT64_MAX || r->n_head < (meta.size < BLOCK ? meta.size : BLOCK)))
    rc = vs_corrupt(err, "%s: a size of %llu bytes does not fit what was sent", r->name, (unsigned long long)meta.size);
  if (!rc && meta.size) rc = open_io(r, place, key, &meta, err);
  s3_place_close(place);
  free(key);
  if (rc) {
    s3_reader_close(r);
    return rc;
  }
  r->size = meta.size, r->max_window = window_limit();
  *out = r;
  return VS_OK;
}

void s3_reader_close(s3_reader *r) {
  if (!r) return;
  for (int i = 0; i < STREAMS; i++) window_reset(r, &r->streams[i].now), window_reset(r, &r->streams[i].next);
  vs_io_close(r->io);
  free(r->head), free(r->name), free(r);
}

uint64_t s3_reader_size(const s3_reader *r) { return r->size; }
const char *s3_reader_name(const s3_reader *r) { return r->name; }
