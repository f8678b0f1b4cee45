/* shard_ids.c - the ids of many hits: read ahead where they lie in memory, in two rounds (records, long ids) where they do not. */
#include <stdlib.h>
#include <string.h>

#include "shard_refine.h"

enum { AHEAD = 16, CHUNK = 1024 /* records held at once */ };

static ivfpq_segment *segment_of(const shard_search *q, const shard_hit *h) { return q->shards[h->shard]->segments[h->segment]; }

/* Begins to read what lies beside the records: ids that are too long for them. */
static vs_rc begin_long(const shard_search *q, const shard_hit *hits, size_t n, vs_range *extra, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    ivfpq_segment *s = segment_of(q, &hits[i]);
    ivfpq_row row;
    vs_range both[2];
    if (s->io->local || !s->params.id_text) continue;
    if ((rc = ivfpq_rows_fetch(s, &hits[i].row, 1, &row, err))) break;
    ivfpq_row_extras(s, row.record, both);
    if (both[1].len) rc = vs_io_begin(s->io, &both[1], 1, err);
    if (!rc && both[1].len) extra[i] = both[1];
    ivfpq_rows_release(s, &row, 1);
  }
  return rc;
}

static vs_rc take_one(ivfpq_segment *s, uint32_t number, size_t i, shard_id_fn fn, void *ctx, vs_err *err) {
  ivfpq_row row;
  ivfpq_id id = {0};
  vs_rc rc = ivfpq_rows_fetch(s, &number, 1, &row, err);
  if (rc) return rc;
  rc = ivfpq_row_id(s, row.record, &id, err);
  if (!rc) rc = fn(ctx, i, &id, err);
  ivfpq_id_free(&id);
  ivfpq_rows_release(s, &row, 1);
  return rc;
}

static vs_rc take_chunk(const shard_search *q, const shard_hit *hits, size_t at, size_t n, shard_id_fn fn, void *ctx, vs_err *err) {
  shard_held held = {0};
  vs_range *extra = calloc(n + 1, sizeof *extra);
  vs_rc rc = extra ? shard_hold(q, hits + at, n, &held, err) : vs_nomem(err);
  if (!rc) rc = begin_long(q, hits + at, n, extra, err);
  for (size_t i = 0; i < n && !rc; i++) {
    if (i + AHEAD < n && ivfpq_rows_mapped(segment_of(q, &hits[at + i + AHEAD])))
      ivfpq_row_id_prefetch(segment_of(q, &hits[at + i + AHEAD]), hits[at + i + AHEAD].row);
    rc = take_one(segment_of(q, &hits[at + i]), hits[at + i].row, at + i, fn, ctx, err);
  }
  for (size_t i = 0; extra && i < n; i++)
    if (extra[i].len) vs_io_release(segment_of(q, &hits[at + i])->io, &extra[i], 1);
  free(extra);
  shard_release(q, &held);
  return rc;
}

vs_rc shard_ids(shard *const *shards, size_t n_shards, const shard_hit *hits, size_t n, shard_id_fn fn, void *ctx, vs_err *err) {
  const shard_search q = {.shards = shards, .n_shards = n_shards};
  vs_rc rc = VS_OK;
  for (size_t at = 0; at < n && !rc; at += CHUNK) rc = take_chunk(&q, hits, at, n - at < CHUNK ? n - at : CHUNK, fn, ctx, err);
  return rc;
}
