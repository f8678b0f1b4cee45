/* stream.c - see stream.h. */
#include "stream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
SQLITE_EXTENSION_INIT3

enum {
  FIRST_BATCH = 16,    /* LIMIT 10 is the common case: hardly dearer than k = 10 */
  WIDEN = 4,
  MOST = STREAM_MOST,  /* rows in one batch, and of the first phase */
  APPROXIMATE_PART = 8, /* up to this part of the rows an approximate search reads less than brute force */
  PREFETCH = 12,       /* rows between asking for a row's bytes and handing it out */
  PREFETCH_FROM = 64,  /* results; fewer are still in the caches from being compared */
  IDS_FROM = 1024,     /* results from which on it pays to read ids together */
  IDS_AT_ONCE = 1 << 16
};

static shard_search search_of(stream *s, uint64_t k) {
  return (shard_search){.shards = s->shards, .n_shards = s->n_shards, .query = s->opt.query, .dim = s->opt.dim, .k = k,
                        .nprobe = s->opt.nprobe, .refine = s->opt.refine, .recall = s->opt.recall, .exact = s->opt.exact,
                        .filters = s->filters, .threads = s->opt.threads};
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
  s->ids_first = s->ids_end = 0, s->no_ids = 0;
  free(s->hits), s->hits = NULL;
  s->at = s->n = 0;
  vs_rc rc = shard_search_run(q, &s->hits, &s->n, &stats, err);
  statement_trace_search(s->statement, &stats);
  return rc;
}

/* ---- bounds of distance ---- */

/* Keeps the hits within the bounds; 1: one lies beyond the limit, and so will all that follow. */
static int keep_within(stream *s) {
  const stream_bound *floor = &s->opt.floor, *limit = &s->opt.limit;
  size_t n = 0;
  for (size_t i = 0; i < s->n; i++) {
    double d = s->hits[i].distance;
    if (limit->given && (limit->open ? d >= limit->at : d > limit->at)) {
      s->n = n;
      return 1;
    }
    if (!floor->given || (floor->open ? d > floor->at : d >= floor->at)) s->hits[n++] = s->hits[i];
  }
  s->n = n;
  return 0;
}

/* Where brute force starts with a floor: behind the greatest float below it. 0: at the nearest row. */
static int start_at_floor(const stream_bound *floor, shard_hit *after) {
  if (!floor->given || floor->at == -INFINITY) return 0;
  float d = (float)floor->at + 0.0f; /* -0 sorts before 0 though it equals it */
  if (floor->open ? d > floor->at : d >= floor->at) d = nextafterf(d, -INFINITY);
  *after = (shard_hit){d, UINT32_MAX, UINT32_MAX, UINT32_MAX};
  return 1;
}

/* ---- rows given out by approximate batches ---- */

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

/* Keeps the hits that were not given out; with `behind` those at or before it are passed over. */
static void keep_new(stream *s, const shard_hit *behind) {
  size_t n = 0;
  for (size_t i = 0; i < s->n; i++)
    if (!(behind && search_order(&s->hits[i], behind) <= 0) && !was_seen(s, &s->hits[i])) s->hits[n++] = s->hits[i];
  s->n = n;
}

/* ---- batches ---- */

static uint64_t most_approximate(const stream *s) {
  uint64_t n = s->n_rows / APPROXIMATE_PART;
  return s->opt.exact ? 0 : n < MOST ? n : MOST;
}

/* An approximate search starts from the nearest row again, with more of everything; brute force goes on behind its last row. */
static vs_rc run_batch(stream *s, uint64_t want, vs_err *err) {
  uint64_t k = s->brute ? want : s->given + want;
  shard_search q = search_of(s, k);
  if (s->brute) q.exact = 1, q.after = s->has_last ? &s->last : NULL;
  vs_rc rc = run(s, &q, err);
  if (rc) return rc;
  s->exhausted = s->n < k;
  const shard_hit before = s->last, *behind = s->brute || s->exhausted || !s->has_last ? NULL : &before;
  for (size_t i = 0; i < s->n; i++)
    if (!s->has_last || search_order(&s->hits[i], &s->last) > 0) s->last = s->hits[i], s->has_last = 1;
  keep_new(s, behind);
  s->given += s->n;
  if (!s->brute) rc = note_seen(s, err);
  if (keep_within(s)) s->exhausted = 1;
  return rc;
}

static vs_rc next_batch(stream *s, vs_err *err) {
  do {
    if (!s->brute && s->given + s->batch > most_approximate(s)) s->brute = 1, s->has_last = start_at_floor(&s->opt.floor, &s->last);
    vs_rc rc = run_batch(s, s->batch, err);
    if (rc) return rc;
    s->batch = s->batch * WIDEN < MOST ? s->batch * WIDEN : MOST;
  } while (!s->n && !s->exhausted);
  if (s->n > s->left) s->n = (size_t)s->left;
  s->left -= s->n;
  s->done = s->exhausted || !s->left;
  return VS_OK;
}

/* ---- k rows ---- */

static vs_rc search_k(stream *s, vs_err *err) {
  shard_search q = search_of(s, s->opt.k);
  vs_rc rc = run(s, &q, err);
  if (!rc) keep_within(s);
  return rc;
}

/* The k nearest from a floor on. How many rows lie before it nobody knows: more and more are looked for, then brute force
 * starts there. */
static vs_rc search_k_beyond(stream *s, vs_err *err) {
  for (uint64_t want = s->opt.k;; want *= WIDEN) {
    shard_search q = search_of(s, want);
    shard_hit start;
    if (want > most_approximate(s)) q.exact = 1, q.k = s->opt.k, q.after = start_at_floor(&s->opt.floor, &start) ? &start : NULL;
    vs_rc rc = run(s, &q, err);
    if (rc) return rc;
    int all = q.exact || s->n < want;
    if (keep_within(s)) all = 1;
    if (s->n > s->opt.k) s->n = (size_t)s->opt.k;
    if (all || s->n == s->opt.k) return VS_OK;
  }
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
  if (!rc && found) rc = ivfpq_distances(sh->segments[h.segment], s->opt.query, &h.row, 1, &h.distance, err);
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
  s->n = n;
  keep_within(s);
  if (s->opt.has_k && s->n > s->opt.k) s->n = (size_t)s->opt.k;
  s->done = 1;
  return rc;
}

static void drop_row(stream *s) {
  if (s->has_row) ivfpq_rows_release(s->segment, &s->row, 1);
  s->has_row = 0;
}

vs_rc stream_open(stream *s, statement *owner, shard *const *shards, size_t n_shards, const stream_options *opt, vs_err *err) {
  memset(s, 0, sizeof *s);
  s->shards = shards, s->n_shards = n_shards, s->opt = *opt;
  s->statement = owner;
  for (size_t i = 0; i < n_shards; i++) s->n_rows += shards[i]->manifest.n_rows;
  if (opt->recall >= 1 && opt->nprobe < 0 && opt->refine < 0) s->opt.exact = 1;
  const filter_term *ids = opt->filter ? filter_by_id(opt->filter) : NULL;
  if (ids) return search_named(s, ids, err);
  if (opt->filter && opt->filter->n) {
    if (!(s->filters = malloc((n_shards + 1) * sizeof *s->filters))) return vs_nomem(err);
    for (size_t i = 0; i < n_shards; i++) s->filters[i] = &opt->filter->base;
  }
  if (opt->has_k && opt->k > s->n_rows) s->opt.k = s->n_rows;
  s->done = opt->has_k && s->opt.k <= MOST;
  if (s->done) return opt->floor.given && s->opt.k ? search_k_beyond(s, err) : search_k(s, err);
  if (!(s->query = malloc(opt->dim * sizeof *s->query + 1))) return vs_nomem(err);
  s->opt.query = memcpy(s->query, opt->query, opt->dim * sizeof *s->query);
  s->left = opt->has_k ? s->opt.k : UINT64_MAX;
  s->batch = opt->has_k ? MOST : FIRST_BATCH;
  if (opt->has_k) s->opt.exact = 1;
  return next_batch(s, err);
}

vs_rc stream_next(stream *s, vs_err *err) {
  drop_row(s);
  s->at++;
  return s->at < s->n || s->done ? VS_OK : next_batch(s, err);
}

/* Results lie all over the file: each would be waited for. */
static void prefetch(const stream *s, size_t at) {
  if (at >= s->n || s->n < PREFETCH_FROM || s->want == STREAM_NOTHING) return;
  const shard_hit *h = &s->hits[at];
  const ivfpq_segment *segment = s->shards[h->shard]->segments[h->segment];
  if (!ivfpq_rows_mapped(segment)) return;
  if (s->want == STREAM_VECTOR) ivfpq_row_prefetch(segment, h->row);
  else ivfpq_row_id_prefetch(segment, h->row);
}

int stream_step(stream *s) {
  if (s->has_row || (s->at + 1 >= s->n && !s->done)) return 0;
  s->at++;
  prefetch(s, s->at + PREFETCH);
  return 1;
}

int stream_row_at_hand(stream *s, stream_want want, ivfpq_segment **segment, const uint8_t **record, vs_rc *rc, vs_err *err) {
  const shard_hit *h = stream_hit(s);
  *segment = s->shards[h->shard]->segments[h->segment];
  if (!ivfpq_rows_mapped(*segment)) return 0;
  if (s->want < want) {
    s->want = want;
    for (size_t i = 1; i <= PREFETCH; i++) prefetch(s, s->at + i);
  }
  *rc = ivfpq_row_at(*segment, h->row, record, err);
  return 1;
}

/* Results come by distance, so that each id lies in another page of memory than the one before, and is waited for although it was
 * asked for ahead (80 ns on a set of 512 MB, 170 on one of 1.1 GB). Page after page they take a third of that, sorting included.
 * 0: something stands against it; reading row by row will tell. */
static int gather_ids(stream *s) {
  enum { PLACE = 16, PAGE = 12 }; /* a key is an address and, in its low bits, a place in the list */
  size_t n = s->n - s->at < IDS_AT_ONCE ? s->n - s->at : IDS_AT_ONCE;
  const shard_hit *h = s->hits + s->at;
  if (n < IDS_FROM) return 0;
  uint64_t *key = malloc(2 * n * sizeof *key);
  if (!s->ids) s->ids = malloc(IDS_AT_ONCE * sizeof *s->ids);
  int ok = key && s->ids;
  for (size_t i = 0; i < n && ok; i++) {
    const ivfpq_segment *segment = s->shards[h[i].shard]->segments[h[i].segment];
    uint64_t at = ivfpq_rows_mapped(segment) && !segment->params.id_text ? (uint64_t)(uintptr_t)ivfpq_row_id_place(segment, h[i].row) : 0;
    ok = at && at >> 48 == 0;
    key[i] = at << PLACE | i;
  }
  if (ok) kern_sort_u64_from(key, n, PLACE + PAGE, key + n);
  for (size_t i = 0; i < n && ok; i++) {
    const shard_hit *row = &h[key[i] & (IDS_AT_ONCE - 1)];
    const uint8_t *unused;
    if (i + PREFETCH < n) __builtin_prefetch((const void *)(uintptr_t)(key[i + PREFETCH] >> PLACE));
    ok = !ivfpq_row_at(s->shards[row->shard]->segments[row->segment], row->row, &unused, NULL);
    if (ok) memcpy(&s->ids[row - h], (const void *)(uintptr_t)(key[i] >> PLACE), sizeof *s->ids);
  }
  free(key);
  if (ok) s->ids_first = s->at, s->ids_end = s->at + n;
  return ok;
}

int stream_id_at_hand(stream *s, sqlite3_int64 *id) {
  if (s->at - s->ids_first >= s->ids_end - s->ids_first) {
    if (s->no_ids || s->n - s->at < IDS_FROM || s->want == STREAM_VECTOR) return 0;
    s->no_ids = !gather_ids(s);
    if (s->no_ids) return 0;
  }
  *id = s->ids[s->at - s->ids_first];
  return 1;
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
  free(s->hits), free(s->query), free(s->filters), free(s->seen), free(s->ids);
  memset(s, 0, sizeof *s);
}
