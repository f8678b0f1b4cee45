/* stream.c - see stream.h. */
#include "stream.h"

#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
SQLITE_EXTENSION_INIT3

enum {
  FIRST_BATCH = 16,    /* LIMIT 10 is the common case: hardly dearer than k = 10 */
  WIDEN = 4,
  MOST = 1 << 20       /* rows in one batch: bounds the memory of a query without end */
};

static shard_search search_of(stream *s, uint64_t k) {
  return (shard_search){.shards = s->shards, .n_shards = s->n_shards, .query = s->query, .dim = s->opt.dim, .k = k,
                        .nprobe = s->opt.nprobe, .refine = s->opt.refine, .exact = s->opt.exact, .filters = s->filters,
                        .threads = s->opt.threads};
}

static int search_order(const shard_hit *a, const shard_hit *b) {
  uint64_t x = kern_key(a->distance, a->shard), y = kern_key(b->distance, b->shard);
  if (x != y) return x < y ? -1 : 1;
  if (a->segment != b->segment) return a->segment < b->segment ? -1 : 1;
  return a->row < b->row ? -1 : a->row > b->row;
}

static vs_rc run(stream *s, const shard_search *q, vs_err *err) {
  shard_stats stats;
  ahead_reset(&s->ahead);
  free(s->hits), s->hits = NULL;
  s->at = s->n = 0;
  vs_rc rc = shard_search_run(q, &s->hits, &s->n, &stats, err);
  statement_trace_search(s->statement, &stats);
  return rc;
}

/* ---- rows given out, for streams that promised no order ---- */

static int storage_order(const void *pa, const void *pb) {
  const shard_hit *a = pa, *b = pb;
  if (a->shard != b->shard) return a->shard < b->shard ? -1 : 1;
  if (a->segment != b->segment) return a->segment < b->segment ? -1 : 1;
  return a->row < b->row ? -1 : a->row > b->row;
}

static int was_seen(const stream *s, const shard_hit *h) {
  return s->n_seen && bsearch(h, s->seen, s->n_seen, sizeof *h, storage_order) != NULL;
}

static vs_rc note_seen(stream *s, vs_err *err) {
  shard_hit *grown = realloc(s->seen, (s->n_seen + s->n + 1) * sizeof *grown);
  if (!grown) return vs_nomem(err);
  s->seen = grown;
  memcpy(s->seen + s->n_seen, s->hits, s->n * sizeof *s->hits);
  s->n_seen += s->n;
  qsort(s->seen, s->n_seen, sizeof *s->seen, storage_order);
  return VS_OK;
}

static void drop_seen(stream *s) {
  size_t n = 0;
  for (size_t i = 0; i < s->n; i++)
    if (!was_seen(s, &s->hits[i])) s->hits[n++] = s->hits[i];
  s->n = n;
}

/* ---- batches ---- */

/* Runs one batch. In an approximate one the search starts from the nearest row again, with more of everything; what was given
 * out before is left out by position where order was promised, else row by row, so that late finds are not lost. */
static vs_rc run_batch(stream *s, uint64_t want, int brute, vs_err *err) {
  shard_search q = search_of(s, brute ? want : s->given + want);
  if (brute) q.exact = 1;
  if (brute ? s->has_last : s->has_last && s->opt.ordered) q.after = &s->last;
  vs_rc rc = run(s, &q, err);
  if (rc) return rc;
  s->exhausted = brute && s->n < want;
  if (brute || s->opt.ordered)
    for (size_t i = 0; i < s->n; i++)
      if (!s->has_last || search_order(&s->hits[i], &s->last) > 0) s->last = s->hits[i], s->has_last = 1;
  if (s->opt.ordered) return VS_OK;
  drop_seen(s);
  return brute ? VS_OK : note_seen(s, err);
}

static vs_rc next_batch(stream *s, vs_err *err) {
  uint64_t limit = s->opt.has_k ? s->opt.k - s->given : UINT64_MAX;
  do {
    uint64_t want = s->batch < limit ? s->batch : limit;
    int brute = s->opt.exact || s->opt.has_k || s->given + want > s->n_rows / 8;
    vs_rc rc = run_batch(s, want, brute, err);
    if (rc) return rc;
    s->batch = s->batch * WIDEN < MOST ? s->batch * WIDEN : MOST;
  } while (!s->n && !s->exhausted);
  if (s->n > limit) s->n = (size_t)limit;
  s->given += s->n;
  s->done = s->exhausted;
  return VS_OK;
}

/* ---- rows named by id ---- */

static vs_rc add_named(stream *s, const filter_value *v, uint32_t shard_no, size_t *room, vs_err *err) {
  shard *sh = s->shards[shard_no];
  ivfpq_id id = {.is_text = v->type == SQLITE_TEXT, .i = v->i, .text = v->text, .len = v->len};
  shard_hit h = {.shard = shard_no};
  int found = 0;
  if (v->type == SQLITE_FLOAT && v->r >= -9.2e18 && v->r <= 9.2e18 && v->r == (double)(int64_t)v->r) id.i = (int64_t)v->r;
  else if (v->type != SQLITE_TEXT && v->type != SQLITE_INTEGER) return VS_OK;
  vs_rc rc = shard_find(sh, &id, &h.segment, &h.row, &found, err);
  if (!rc && found) rc = filter_row(s->opt.filter, sh->segments[h.segment], h.row, &found, err);
  if (!rc && found) rc = ivfpq_distances(sh->segments[h.segment], s->query, &h.row, 1, &h.distance, err);
  if (rc || !found) return rc;
  if (s->n == *room) {
    shard_hit *grown = realloc(s->hits, (*room * 2 + 16) * sizeof *grown);
    if (!grown) return vs_nomem(err);
    s->hits = grown, *room = *room * 2 + 16;
  }
  s->hits[s->n++] = h;
  return VS_OK;
}

static int nearest_first(const void *a, const void *b) { return search_order(a, b); }

/* The answer is among a few rows whose ids are given: exact, whatever the settings. Values are sorted and may repeat. */
static vs_rc search_named(stream *s, const filter_term *ids, vs_err *err) {
  size_t room = 0;
  shard_search none = search_of(s, 0);
  vs_rc rc = run(s, &none, err); /* finds no row, but what is wrong with the query */
  for (uint32_t i = 0; i < s->n_shards; i++)
    for (size_t v = 0; v < ids->n && !rc; v++) {
      rc = add_named(s, &ids->values[v], i, &room, err);
      if (!rc && vs_scope_stopped()) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
    }
  size_t n = 0;
  if (s->n) qsort(s->hits, s->n, sizeof *s->hits, nearest_first);
  for (size_t i = 0; i < s->n; i++)
    if (!n || search_order(&s->hits[n - 1], &s->hits[i])) s->hits[n++] = s->hits[i];
  s->n = s->opt.has_k && s->opt.k < n ? (size_t)s->opt.k : n;
  s->done = 1;
  return rc;
}

static void drop_row(stream *s) {
  if (s->has_row) ivfpq_rows_release(s->segment, &s->row, 1);
  s->has_row = 0;
}

static vs_rc step(stream *s, vs_err *err) {
  drop_row(s);
  s->at++;
  if (s->at < s->n || s->done) return VS_OK;
  if (s->opt.has_k && s->given >= s->opt.k) {
    s->done = 1;
    return VS_OK;
  }
  return next_batch(s, err);
}

/* To the first row that is not below the floor. */
static vs_rc skip_below(stream *s, vs_err *err) {
  vs_rc rc = VS_OK;
  while (!rc && !stream_eof(s)) {
    double d = stream_hit(s)->distance;
    if (s->opt.floor_open ? d > s->opt.floor : d >= s->opt.floor) break;
    rc = step(s, err);
  }
  return rc;
}

vs_rc stream_open(stream *s, statement *owner, shard *const *shards, size_t n_shards, const stream_options *opt, vs_err *err) {
  memset(s, 0, sizeof *s);
  s->shards = shards, s->n_shards = n_shards, s->opt = *opt;
  s->statement = owner;
  for (size_t i = 0; i < n_shards; i++) s->n_rows += shards[i]->manifest.n_rows;
  s->query = malloc(opt->dim * sizeof *s->query + 1);
  if (!s->query) return vs_nomem(err);
  memcpy(s->query, opt->query, opt->dim * sizeof *s->query);
  s->opt.query = s->query;
  const filter_term *ids = opt->filter ? filter_by_id(opt->filter) : NULL;
  if (ids) return search_named(s, ids, err);
  if (opt->filter && opt->filter->n) {
    if (!(s->filters = malloc((n_shards + 1) * sizeof *s->filters))) return vs_nomem(err);
    for (size_t i = 0; i < n_shards; i++) s->filters[i] = &opt->filter->base;
  }
  if (opt->has_k && opt->k > s->n_rows) s->opt.k = s->n_rows;
  if (opt->has_k && opt->has_floor && s->opt.k) { /* nobody knows how many rows lie below: a lazy stream, cut after k */
    s->left = s->opt.k, s->opt.has_k = 0, s->opt.ordered = 1;
    s->batch = s->left < MOST ? s->left : MOST;
    vs_rc rc = next_batch(s, err);
    return rc ? rc : skip_below(s, err);
  }
  if (s->opt.has_k && s->opt.k <= MOST) {
    s->done = 1;
    shard_search q = search_of(s, s->opt.k);
    return run(s, &q, err);
  }
  s->batch = opt->has_k ? MOST : FIRST_BATCH;
  return next_batch(s, err);
}

vs_rc stream_next(stream *s, vs_err *err) {
  if (s->left && !--s->left) {
    drop_row(s);
    s->at = s->n, s->done = 1;
    return VS_OK;
  }
  return step(s, err);
}

static const shard_hit *hit_at(void *ctx, size_t i) { return &((stream *)ctx)->hits[i]; }

vs_rc stream_row(stream *s, int with_columns, ivfpq_segment **segment, const uint8_t **record, vs_err *err) {
  const shard_hit *h = stream_hit(s);
  vs_rc ready = ahead_want(&s->ahead, s->shards, hit_at, s, s->at, s->n, with_columns, err);
  if (ready) return ready;
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
  ahead_reset(&s->ahead);
  free(s->hits), free(s->query), free(s->filters), free(s->seen);
  memset(s, 0, sizeof *s);
}
