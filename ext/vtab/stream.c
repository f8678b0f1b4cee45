/* stream.c - see stream.h. */
#include "stream.h"

#include <stdlib.h>
#include <string.h>
SQLITE_EXTENSION_INIT3

enum {
  FIRST_BATCH = 16,    /* LIMIT 10 is the common case: hardly dearer than k = 10 */
  WIDEN = 4,
  MOST = 1 << 20       /* rows in one batch: bounds the memory of a query without end */
};

static shard_search search_of(stream *s, uint64_t k) {
  return (shard_search){.shards = s->shards, .n_shards = s->n_shards, .query = s->query, .dim = s->opt.dim, .k = k,
                        .nprobe = s->opt.nprobe, .refine = s->opt.refine, .exact = s->opt.exact, .filters = s->filters,
                        .threads = s->opt.threads, .stop = conn_stop_poll, .stop_ctx = &s->stop};
}

static int search_order(const shard_hit *a, const shard_hit *b) {
  if (a->distance != b->distance) return a->distance < b->distance ? -1 : 1;
  if (a->shard != b->shard) return a->shard < b->shard ? -1 : 1;
  if (a->segment != b->segment) return a->segment < b->segment ? -1 : 1;
  return a->row < b->row ? -1 : a->row > b->row;
}

static vs_rc run(stream *s, const shard_search *q, vs_err *err) {
  shard_stats stats;
  free(s->hits), s->hits = NULL;
  s->at = s->n = 0;
  return shard_search_run(q, &s->hits, &s->n, &stats, err);
}

/* The next batch of a lazy stream. Approximate batches start from the nearest row again, with more of everything. */
static vs_rc next_batch(stream *s, vs_err *err) {
  vs_rc rc = VS_OK;
  uint64_t limit = s->opt.has_k ? s->opt.k - s->given : UINT64_MAX;
  for (;;) {
    int first = s->given == 0 && s->batch == FIRST_BATCH;
    uint64_t want = s->batch < limit ? s->batch : limit, reach = s->given + want;
    shard_search q = search_of(s, reach);
    int brute = s->opt.exact || reach > s->n_rows / 8;
    if (s->given) q.after = &s->last;
    if (brute) q.exact = 1, q.k = want;
    rc = run(s, &q, err);
    if (rc) return rc;
    s->batch = s->batch * WIDEN < MOST ? s->batch * WIDEN : MOST;
    if (s->n > limit) s->n = (size_t)limit;
    if (s->n) break;
    if (brute || (first && !s->n_rows)) {
      s->done = 1;
      return VS_OK;
    }
  }
  s->given += s->n;
  for (size_t i = 0; i < s->n; i++)
    if (i == 0 || search_order(&s->hits[i], &s->last) > 0) s->last = s->hits[i];
  return VS_OK;
}

vs_rc stream_open(stream *s, sqlite3 *db, shard *const *shards, size_t n_shards, const stream_options *opt, vs_err *err) {
  memset(s, 0, sizeof *s);
  s->shards = shards, s->n_shards = n_shards, s->opt = *opt, s->batch = FIRST_BATCH;
  conn_stop_init(&s->stop, db);
  for (size_t i = 0; i < n_shards; i++) s->n_rows += shards[i]->manifest.n_rows;
  s->query = malloc(opt->dim * sizeof *s->query + 1);
  if (!s->query) return vs_nomem(err);
  memcpy(s->query, opt->query, opt->dim * sizeof *s->query);
  s->opt.query = s->query;
  if (opt->filter && opt->filter->n) {
    if (!(s->filters = malloc((n_shards + 1) * sizeof *s->filters))) return vs_nomem(err);
    for (size_t i = 0; i < n_shards; i++) s->filters[i] = &opt->filter->base;
  }
  if (opt->has_k && opt->k <= MOST) {
    s->done = 1;
    shard_search q = search_of(s, opt->k);
    return run(s, &q, err);
  }
  return next_batch(s, err);
}

static void drop_row(stream *s) {
  if (s->has_row) ivfpq_rows_release(s->segment, &s->row, 1);
  s->has_row = 0;
}

vs_rc stream_next(stream *s, vs_err *err) {
  drop_row(s);
  s->at++;
  if (s->at < s->n || s->done) return VS_OK;
  if (s->opt.has_k && s->given >= s->opt.k) {
    s->done = 1;
    return VS_OK;
  }
  return next_batch(s, err);
}

vs_rc stream_row(stream *s, ivfpq_segment **segment, const uint8_t **record, vs_err *err) {
  const shard_hit *h = stream_hit(s);
  s->segment = s->shards[h->shard]->segments[h->segment];
  if (!s->has_row) {
    vs_rc rc = ivfpq_rows_fetch(s->segment, &h->row, 1, &s->row, err);
    if (rc) return rc;
    s->has_row = 1;
  }
  *segment = s->segment, *record = s->row.record;
  return VS_OK;
}

void stream_reset(stream *s) {
  drop_row(s);
  conn_stop_reset(&s->stop);
  free(s->hits), free(s->query), free(s->filters);
  memset(s, 0, sizeof *s);
}
