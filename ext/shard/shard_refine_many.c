/* shard_refine_many.c - the second phase of many searches at once; see shard_refine.h and shard_refine.c, whose steps these are.
 *
 * Rows of mapped files: queries that lie near one another form a slice; its candidates are visited in the order in which they are
 * stored, first the sketches, then what is left by stored vectors. A row that several queries want comes from memory once, and
 * the rest comes nearly in sequence, which memory delivers about twice as fast as rows here and there.
 * Rows in stores: as many queries as may be held have their rows begun in one round.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../ivfpq/ivfpq_sketch.h"
#include "../kernels/kern.h"
#include "shard_refine.h"

enum {
  SLICE_QUERIES = 64,
  ORDER_BITS = 11,
  SLICE_HITS = 1 << 16,     /* a slice takes no more queries once it has so many candidates */
  AHEAD_BYTES = 8192,       /* of rows asked for before they are needed */
  HELD_BYTES = 64 << 20     /* of rows in stores, at once */
};

typedef struct job {
  const shard_refine *r;
  const float *queries;
  shard_found *found;
  size_t n;
  uint64_t *order;       /* queries by where their best candidate is stored; scratch behind */
  size_t *first;         /* of each slice, in `order`; n_slices + 1 */
  size_t n_slices;
  size_t coded;          /* the most coded dims of a segment, rounded up to 64 */
  uint64_t refined;
  vs_rc rc;
  vs_err err;
  pthread_mutex_t lock;
} job;

static void fail(job *j, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&j->lock);
  if (!j->rc) j->err = *err;
  if (!j->rc) __atomic_store_n(&j->rc, rc, __ATOMIC_RELAXED);
  pthread_mutex_unlock(&j->lock);
}
static int failed(job *j) { return __atomic_load_n(&j->rc, __ATOMIC_RELAXED) != VS_OK; }

static ivfpq_segment *segment_of(const job *j, const shard_hit *h) { return j->r->q->shards[h->shard]->segments[h->segment]; }

/* ---- one slice of queries, rows of mapped files ---- */

typedef struct slice {
  job *j;
  size_t n, n_hits;             /* queries; their candidates */
  size_t query[SLICE_QUERIES];
  size_t first[SLICE_QUERIES + 1]; /* of each query's candidates among all */
  uint8_t *who;                 /* by candidate: whose it is */
  uint64_t *key, *scratch;      /* (row, candidate) of one segment */
  float *est, *width;
  ivfpq_sketch_query *sketch;   /* by query */
  int8_t *planes;
  float *x;
} slice;

static shard_hit *candidate(const slice *s, size_t i) { return &s->j->found[s->query[s->who[i]]].hits[i - s->first[s->who[i]]]; }
static const float *vector_of(const slice *s, size_t i) { return s->j->queries + s->query[i] * s->j->r->q->dim; }

/* The candidates in one segment, as keys (row, candidate), about in the order of storage: by the highest ORDER_BITS of the row number,
 * which one pass sorts by. Stretches of a 2,048th of a segment are near enough for memory. */
static size_t of_segment(slice *s, uint32_t shard_no, uint32_t segment) {
  uint32_t n_rows = s->j->r->q->shards[shard_no]->segments[segment]->params.n_rows;
  int bits = 32 - __builtin_clz(n_rows | 1);
  size_t m = 0;
  for (size_t i = 0; i < s->n; i++) {
    const shard_found *f = &s->j->found[s->query[i]];
    for (size_t h = 0; h < f->n; h++)
      if (f->hits[h].shard == shard_no && f->hits[h].segment == segment) s->key[m++] = (uint64_t)f->hits[h].row << 32 | (s->first[i] + h);
  }
  kern_sort_u64_from(s->key, m, 32 + (bits > ORDER_BITS ? bits - ORDER_BITS : 0), s->scratch);
  return m;
}

static vs_rc look_at_sketches(slice *s, ivfpq_segment *g, size_t n, vs_err *err) {
  size_t ahead = AHEAD_BYTES / g->params.sketch_bytes + 1;
  uint64_t made = 0;
  for (size_t i = 0; i < n; i++) ivfpq_sketch_want(g, (uint32_t)(s->key[i] >> 32));
  for (size_t i = 0; i < n + ahead; i++) {
    const uint8_t *record;
    if (i < n) ivfpq_sketch_prefetch(g, (uint32_t)(s->key[i] >> 32));
    if (i < ahead) continue;
    uint32_t at = (uint32_t)s->key[i - ahead], who = s->who[at];
    if (!(made >> who & 1)) ivfpq_sketch_query_make(g, vector_of(s, who), s->x, &s->sketch[who]), made |= 1ull << who;
    vs_rc rc = ivfpq_sketch_mapped(g, (uint32_t)(s->key[i - ahead] >> 32), &record, err);
    if (rc) return rc;
    ivfpq_sketch_compare(g, &s->sketch[who], record, &s->est[at], &s->width[at]);
  }
  return VS_OK;
}

/* Leaves out the candidates of one query that are farther than its k-th nearest for sure. */
static void drop_far(slice *s, size_t i) {
  shard_found *f = &s->j->found[s->query[i]];
  const float *est = s->est + s->first[i], *width = s->width + s->first[i];
  size_t kept = 0;
  if (!shard_sketches_pay(f->n, s->j->r->k)) return;
  for (size_t h = 0; h < f->n; h++) s->key[h] = kern_key(est[h] + width[h], (uint32_t)h);
  float border = kern_key_value(kern_get()->select_u64(s->key, f->n, (size_t)s->j->r->k, s->scratch));
  for (size_t h = 0; h < f->n; h++)
    if (est[h] - width[h] <= border) f->hits[kept++] = f->hits[h];
  f->n = kept;
}

static vs_rc compare(slice *s, ivfpq_segment *g, size_t n, vs_err *err) {
  size_t ahead = AHEAD_BYTES / g->params.row_bytes + 1;
  for (size_t i = 0; i < n; i++) ivfpq_row_want(g, (uint32_t)(s->key[i] >> 32));
  for (size_t i = 0; i < n && i < ahead; i++) ivfpq_row_prefetch(g, (uint32_t)(s->key[i] >> 32));
  for (size_t i = 0; i < n; i++) {
    int more = i + ahead < n;
    uint32_t at = (uint32_t)s->key[i], next = more ? (uint32_t)(s->key[i + ahead] >> 32) : 0;
    vs_rc rc = ivfpq_distance_mapped(g, vector_of(s, s->who[at]), (uint32_t)(s->key[i] >> 32), more ? &next : NULL,
                                     &candidate(s, at)->distance, err);
    if (rc) return rc;
  }
  return VS_OK;
}

/* Numbers the candidates. */
static void number(slice *s) {
  size_t at = 0;
  for (size_t i = 0; i < s->n; i++) {
    size_t n = s->j->found[s->query[i]].n;
    s->first[i] = at;
    memset(s->who + at, (int)i, n);
    at += n;
  }
  s->first[s->n] = s->n_hits = at;
}

static int all_sketched(const slice *s) {
  for (size_t i = 0; i < s->n; i++)
    for (size_t h = 0; h < s->j->found[s->query[i]].n; h++)
      if (!ivfpq_sketches_mapped(segment_of(s->j, &s->j->found[s->query[i]].hits[h]))) return 0;
  return 1;
}

typedef vs_rc (*on_segment)(slice *s, ivfpq_segment *g, size_t n, vs_err *err);

static vs_rc each_segment(slice *s, on_segment what, vs_err *err) {
  const shard_search *q = s->j->r->q;
  vs_rc rc = VS_OK;
  for (uint32_t i = 0; i < q->n_shards && !rc; i++)
    for (uint32_t g = 0; g < q->shards[i]->manifest.n_segments && !rc; g++) {
      size_t n = of_segment(s, i, g);
      if (n) rc = what(s, q->shards[i]->segments[g], n, err);
    }
  return rc;
}

static vs_rc slice_allocate(slice *s, size_t n_hits, vs_err *err) {
  size_t coded = s->j->coded;
  s->who = malloc(n_hits + 1);
  s->key = malloc((n_hits + 16) * sizeof *s->key), s->scratch = malloc((2 * n_hits + 32) * sizeof *s->scratch);
  s->est = malloc((n_hits + 1) * sizeof *s->est), s->width = malloc((n_hits + 1) * sizeof *s->width);
  s->sketch = malloc(s->n * sizeof *s->sketch), s->planes = calloc(2 * s->n * coded, 1), s->x = calloc(coded + 16, sizeof *s->x);
  if (!s->who || !s->key || !s->scratch || !s->est || !s->width || !s->sketch || !s->planes || !s->x) return vs_nomem(err);
  for (size_t i = 0; i < s->n; i++) s->sketch[i].bytes = s->planes + 2 * i * coded, s->sketch[i].fine = s->planes + (2 * i + 1) * coded;
  return VS_OK;
}

static vs_rc run_slice(slice *s, vs_err *err) {
  size_t n_hits = 0;
  for (size_t i = 0; i < s->n; i++) n_hits += s->j->found[s->query[i]].n;
  vs_rc rc = slice_allocate(s, n_hits, err);
  if (rc) return rc;
  number(s);
  if (s->n && shard_sketches_pay(n_hits / s->n, s->j->r->k) && all_sketched(s)) {
    rc = each_segment(s, look_at_sketches, err);
    for (size_t i = 0; i < s->n && !rc; i++) drop_far(s, i);
    number(s);
  }
  if (!rc) rc = each_segment(s, compare, err);
  ivfpq_keys work = {0};
  shard_refine r = *s->j->r;
  r.work = &work;
  for (size_t i = 0; i < s->n && !rc; i++) rc = shard_keep_nearest(&r, s->j->found[s->query[i]].hits, &s->j->found[s->query[i]].n, err);
  ivfpq_keys_reset(&work);
  return rc;
}

static void mapped_slice(void *ctx, size_t i) {
  job *j = ctx;
  slice s = {.j = j};
  vs_err err = {0};
  if (failed(j)) return;
  for (size_t at = j->first[i]; at < j->first[i + 1]; at++) s.query[s.n++] = (uint32_t)j->order[at];
  vs_rc rc = run_slice(&s, &err);
  if (!rc && j->r->stop(j->r->stop_ctx)) rc = vs_fail(&err, VS_INTERRUPT, "interrupted");
  if (rc) fail(j, rc, &err);
  __atomic_fetch_add(&j->refined, s.n_hits, __ATOMIC_RELAXED);
  free(s.who), free(s.key), free(s.scratch), free(s.est), free(s.width), free(s.sketch), free(s.planes), free(s.x);
}

/* ---- all queries, rows of mapped files ---- */

static vs_rc order_queries(job *j, vs_err *err) {
  const shard_search *q = j->r->q;
  uint64_t total = 0, n_segments = 0, *base;
  for (size_t i = 0; i < q->n_shards; i++) n_segments += q->shards[i]->manifest.n_segments;
  if (!(base = malloc((n_segments + 1) * sizeof *base + (q->n_shards + 1) * sizeof(size_t)))) return vs_nomem(err);
  size_t *first = (size_t *)(base + n_segments + 1), at = 0; /* of a shard's segments */
  for (size_t i = 0; i < q->n_shards; i++) {
    first[i] = at;
    for (size_t g = 0; g < q->shards[i]->manifest.n_segments; g++) base[at++] = total, total += q->shards[i]->segments[g]->params.n_rows;
  }
  for (size_t i = 0; i < j->n; i++) {
    const shard_found *f = &j->found[i];
    const shard_hit *best = f->hits;
    for (size_t h = 1; h < f->n; h++)
      if (f->hits[h].distance < best->distance) best = &f->hits[h];
    uint64_t place = f->n ? base[first[best->shard] + best->segment] + best->row : 0;
    j->order[i] = (uint64_t)((double)place / (double)(total + 1) * 4294967295.0) << 32 | i;
  }
  kern_sort_u64(j->order, j->n, j->order + j->n);
  free(base);
  return VS_OK;
}

static void cut_slices(job *j) {
  size_t at = 0, most = j->n / (4 * (size_t)(j->r->q->threads > 0 ? j->r->q->threads : vs_threads())) + 1;
  if (most > SLICE_QUERIES) most = SLICE_QUERIES;
  while (at < j->n) {
    size_t n = 0, hits = 0;
    j->first[j->n_slices++] = at;
    for (; n < most && at < j->n && hits < SLICE_HITS; n++, at++) hits += j->found[(uint32_t)j->order[at]].n;
  }
  j->first[j->n_slices] = at;
}

static vs_rc refine_mapped(job *j, vs_err *err) {
  j->order = malloc((2 * j->n + 1) * sizeof *j->order), j->first = malloc((j->n + 1) * sizeof *j->first);
  vs_rc rc = j->order && j->first ? order_queries(j, err) : vs_nomem(err);
  if (!rc) {
    cut_slices(j);
    vs_pool_run(j->n_slices, j->r->q->threads, mapped_slice, j);
    if (j->rc) rc = vs_fail(err, j->rc, "%s", j->err.text);
  }
  free(j->order), free(j->first);
  return rc;
}

/* ---- rows elsewhere ---- */

static void refine_one(void *ctx, size_t i) {
  job *j = ctx;
  shard_search q = *j->r->q;
  shard_refine r = *j->r;
  vs_err err = {0};
  uint64_t refined = 0;
  ivfpq_keys work = {0};
  if (failed(j)) return;
  r.work = &work;
  q.query = j->queries + i * q.dim, r.q = &q;
  vs_rc rc = shard_refine_run(&r, j->found[i].hits, &j->found[i].n, &refined, &err);
  if (rc) fail(j, rc, &err);
  ivfpq_keys_reset(&work);
  __atomic_fetch_add(&j->refined, refined, __ATOMIC_RELAXED);
}

static uint64_t row_bytes(const job *j, const shard_found *f) {
  uint64_t n = 0;
  for (size_t h = 0; h < f->n; h++) n += segment_of(j, &f->hits[h])->params.row_bytes;
  return n;
}

/* Some queries' rows in one round. */
static vs_rc refine_round(job *j, vs_err *err) {
  shard_found all = {0};
  for (size_t i = 0; i < j->n; i++) all.n += j->found[i].n;
  if (!(all.hits = malloc((all.n + 1) * sizeof *all.hits))) return vs_nomem(err);
  for (size_t i = 0, at = 0; i < j->n; at += j->found[i++].n)
    if (j->found[i].n) memcpy(all.hits + at, j->found[i].hits, j->found[i].n * sizeof *all.hits);
  shard_held held = {0};
  vs_rc rc = shard_hold(j->r->q, all.hits, all.n, &held, err);
  if (!rc) {
    vs_pool_run(j->n, j->r->q->threads, refine_one, j);
    if (j->rc) rc = vs_fail(err, j->rc, "%s", j->err.text);
  }
  shard_release(j->r->q, &held);
  free(all.hits);
  return rc;
}

static vs_rc refine_read(job *j, vs_err *err) {
  size_t n = j->n;
  shard_found *found = j->found;
  const float *queries = j->queries;
  vs_rc rc = VS_OK;
  for (size_t at = 0; at < n && !rc; at += j->n) {
    uint64_t bytes = 0;
    j->found = found + at, j->queries = queries + at * j->r->q->dim;
    for (j->n = 0; at + j->n < n && (!j->n || bytes < HELD_BYTES); j->n++) bytes += row_bytes(j, &j->found[j->n]);
    rc = refine_round(j, err);
  }
  return rc;
}

vs_rc shard_refine_many(const shard_refine *r, const float *queries, shard_found *found, size_t n, uint64_t *refined, vs_err *err) {
  job j = {.r = r, .queries = queries, .found = found, .n = n, .lock = PTHREAD_MUTEX_INITIALIZER};
  int mapped = 1;
  for (size_t i = 0; i < r->q->n_shards; i++)
    for (size_t g = 0; g < r->q->shards[i]->manifest.n_segments; g++) {
      const ivfpq_segment *s = r->q->shards[i]->segments[g];
      size_t coded = ivfpq_round(ivfpq_coded_dim(&s->params), 64);
      mapped &= ivfpq_rows_mapped(s);
      if (coded > j.coded) j.coded = coded;
    }
  for (size_t i = 0; i < n && mapped; i++) mapped = found[i].n < SHARD_MANY; /* more are read in order anyway */
  vs_rc rc = mapped ? refine_mapped(&j, err) : refine_read(&j, err);
  *refined = j.refined;
  return rc;
}
