/* shard_recall.c - see shard_recall.h.
 *
 * Recall. All queries of a setting are searched together (shard_batch_run gives the rows of single searches). A query that is a
 * row of the shards finds itself first: it asks for one row more, spends what a search for k would (shard_search.own), and leaves
 * itself out by its place; so copies of a row under other ids do count.
 *
 * Cost. Then the queries run one at a time on one thread. In files: all of them, up to PASSES times, and the quickest pass counts,
 * because a machine that others use can only make a pass slower. In stores: some, each with nothing of the shards in the cache,
 * because after the first setting it would hold all that the others want; so requests, bytes and ms are those of a search in shards
 * that are open but were not searched. What is searched exactly is the truth: its recall is 1 without a look.
 *
 * Order. The targets' settings are as their calibration counts; the default comes in between by the same count, of what the
 * batches of all settings scanned and compared.
 */
#include "shard_recall.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../ivfpq/ivfpq_calibrate.h"
#include "shard_spend.h"

enum {
  PASSES = 3,
  FAR_QUERIES = 8,          /* timed in a store: each takes four rounds */
  ANSWERS_MOST = 4 << 20,   /* rows of all answers together: queries are fewer where k is large */
  FLOATS_MOST = 64 << 20    /* of rows that are queries */
};
#define FILE_SECONDS .5     /* beyond which no further pass begins; a pass ends after four times as much */
#define STORE_SECONDS 5.

static const double targets[] = {.8, .9, .95, .98, .99, .995};
enum { N_TARGETS = sizeof targets / sizeof *targets, N_RUNGS = N_TARGETS + 1 };

typedef struct rung {
  shard_recall_point point;
  ivfpq_setting *spend;     /* by segment */
  double cost;              /* nanoseconds a query, as calibration counts */
} rung;

struct shard_recall {
  shard_recall_plan plan;
  uint32_t dim;
  uint64_t n_rows, k;       /* k: wanted, not more than there are */
  size_t n;                 /* queries */
  int own;                  /* 1: rows of the shards */
  float *vectors;           /* own ones */
  shard_hit *self;          /* where they lie */
  shard_hit *truth;         /* n x k, each query's by place */
  float *last;              /* n: the distance of the k-th */
  ivfpq_segment **segments;
  size_t n_segments;
  int local;
  rung rungs[N_RUNGS];
  size_t n_rungs, at;
  int measured;             /* the rungs' recall and cost are known */
};

/* ---- hits ---- */

static int same_place(const shard_hit *a, const shard_hit *b) {
  return a->shard == b->shard && a->segment == b->segment && a->row == b->row;
}

static int by_place(const void *pa, const void *pb) {
  const shard_hit *a = pa, *b = pb;
  if (a->shard != b->shard) return a->shard < b->shard ? -1 : 1;
  if (a->segment != b->segment) return a->segment < b->segment ? -1 : 1;
  return a->row < b->row ? -1 : a->row > b->row;
}

/* An answer without the query's own row, at most k: how many are left. */
static size_t leave_out(const shard_recall *r, size_t query, shard_hit *hits, size_t n) {
  size_t at = 0;
  while (r->own && at < n && !same_place(&hits[at], &r->self[query])) at++;
  if (r->own && at < n) memmove(hits + at, hits + at + 1, (--n - at) * sizeof *hits);
  return n < r->k ? n : r->k;
}

static shard_search search_of(const shard_recall *r, const shard_recall_setting *s) {
  return (shard_search){.shards = r->plan.shards, .n_shards = r->plan.n_shards, .dim = r->dim, .k = r->k + (uint64_t)r->own,
                        .own = r->own, .nprobe = s->target > 0 ? -1 : s->nprobe, .refine = s->target > 0 ? -1 : s->refine,
                        .recall = s->target, .threads = r->plan.threads};
}

static const float *query_of(const shard_recall *r, size_t i) {
  return (r->own ? r->vectors : r->plan.queries) + i * r->dim;
}

static void tell(const shard_recall *r, const char *stage, size_t done, size_t total) {
  if (r->plan.progress) r->plan.progress(r->plan.progress_ctx, stage, done, total);
}

static vs_rc check_stop(vs_err *err) { return vs_scope_stopped() ? vs_fail(err, VS_INTERRUPT, "interrupted") : VS_OK; }

/* Searches all queries, block by block. take gets each query's answer, nearest first. */
typedef void (*take_fn)(void *ctx, size_t query, shard_hit *hits, size_t n);
static vs_rc search_all(shard_recall *r, const shard_search *q, take_fn take, void *ctx, shard_stats *sum, vs_err *err) {
  size_t most = shard_batch_most(q);
  memset(sum, 0, sizeof *sum);
  for (size_t from = 0; from < r->n; from += most) {
    shard_batch b = {.search = *q, .queries = query_of(r, from), .n = r->n - from < most ? r->n - from : most, .first = from};
    shard_answers a;
    shard_stats stats;
    vs_rc rc = check_stop(err);
    if (!rc) rc = shard_batch_run(&b, &a, &stats, err);
    if (rc) return rc;
    for (size_t i = 0; i < b.n; i++) take(ctx, from + i, a.hits + a.first[i], a.first[i + 1] - a.first[i]);
    shard_answers_reset(&a);
    sum->partitions += stats.partitions, sum->rows += stats.rows, sum->refined += stats.refined;
    if (q->exact) tell(r, "search exactly", from + b.n, r->n);
  }
  return VS_OK;
}

/* ---- queries ---- */

/* Row number `at` of all shards together. */
static shard_hit place_of(const shard_recall *r, uint64_t at) {
  for (uint32_t s = 0; s < r->plan.n_shards; s++)
    for (uint32_t g = 0; g < r->plan.shards[s]->manifest.n_segments; g++) {
      uint64_t n = r->plan.shards[s]->segments[g]->params.n_rows;
      if (at < n) return (shard_hit){.shard = s, .segment = g, .row = (uint32_t)at};
      at -= n;
    }
  return (shard_hit){0};
}

/* The vectors of some rows of one segment. */
static vs_rc read_vectors(shard_recall *r, size_t from, size_t n, vs_err *err) {
  ivfpq_segment *s = r->plan.shards[r->self[from].shard]->segments[r->self[from].segment];
  uint32_t *numbers = malloc(n * sizeof *numbers);
  ivfpq_row *rows = malloc(n * sizeof *rows);
  float *buf = malloc((r->dim + 1) * sizeof *buf);
  vs_rc rc = numbers && rows && buf ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < n && !rc; i++) numbers[i] = r->self[from + i].row;
  if (!rc && !(rc = ivfpq_rows_fetch(s, numbers, n, rows, err))) {
    for (size_t i = 0; i < n; i++)
      memcpy(r->vectors + (from + i) * r->dim, ivfpq_row_vector(s, rows[i].record, buf), r->dim * sizeof *buf);
    ivfpq_rows_release(s, rows, n);
  }
  free(numbers), free(rows), free(buf);
  return rc;
}

static vs_rc take_rows(shard_recall *r, vs_err *err) {
  vs_rc rc = VS_OK;
  r->self = malloc((r->n + 1) * sizeof *r->self);
  r->vectors = malloc((r->n * r->dim + 1) * sizeof *r->vectors);
  if (!r->self || !r->vectors) return vs_nomem(err);
  for (size_t i = 0; i < r->n; i++) /* the middles of n equal parts; n <= n_rows < 2^64 / ANSWERS_MOST */
    r->self[i] = place_of(r, (uint64_t)(((double)i + .5) / (double)r->n * (double)r->n_rows));
  for (size_t from = 0, to; from < r->n && !rc; from = to) {
    const shard_hit *one = &r->self[from];
    for (to = from + 1; to < r->n && r->self[to].shard == one->shard && r->self[to].segment == one->segment;) to++;
    rc = check_stop(err);
    if (!rc) rc = read_vectors(r, from, to - from, err);
  }
  return rc;
}

/* ---- truth and recall ---- */

static void take_truth(void *ctx, size_t query, shard_hit *hits, size_t n) {
  shard_recall *r = ctx;
  n = leave_out(r, query, hits, n);
  r->last[query] = n ? hits[n - 1].distance : -INFINITY;
  memcpy(r->truth + query * r->k, hits, n * sizeof *hits);
  for (; n < r->k; n++) r->truth[query * r->k + n] = (shard_hit){.shard = UINT32_MAX}; /* not with sound shards: nothing is there */
  qsort(r->truth + query * r->k, r->k, sizeof *hits, by_place);
}

static vs_rc find_truth(shard_recall *r, vs_err *err) {
  shard_search q = search_of(r, &(shard_recall_setting){.nprobe = -1, .refine = -1});
  shard_stats stats;
  q.exact = 1;
  r->truth = malloc((r->n * r->k + 1) * sizeof *r->truth), r->last = malloc((r->n + 1) * sizeof *r->last);
  if (!r->truth || !r->last) return vs_nomem(err);
  tell(r, "search exactly", 0, r->n);
  return search_all(r, &q, take_truth, r, &stats, err);
}

typedef struct found { const shard_recall *r; double sum, squares; } found;

static void count_found(void *ctx, size_t query, shard_hit *hits, size_t n) {
  found *f = ctx;
  const shard_recall *r = f->r;
  size_t good = 0;
  n = leave_out(r, query, hits, n);
  for (size_t i = 0; i < n; i++)
    good += hits[i].distance <= r->last[query] || bsearch(&hits[i], r->truth + query * r->k, r->k, sizeof *hits, by_place);
  double share = (double)good / (double)r->k;
  f->sum += share, f->squares += share * share;
}

/* ---- settings ---- */

static shard_spend spend_plan(const shard_recall *r, const shard_recall_setting *s, ivfpq_setting *spend) {
  shard_search q = search_of(r, s);
  return shard_spend_plan(&q, q.k < r->n_rows ? q.k : r->n_rows, r->n_rows, r->segments, r->n_segments, spend);
}

static void describe(const shard_recall *r, const shard_recall_setting *s, ivfpq_setting *spend, shard_recall_point *out) {
  shard_spend all = spend_plan(r, s, spend);
  uint64_t candidates = all.exact ? r->n_rows : all.n_candidates - (uint64_t)r->own;
  *out = (shard_recall_point){.asked = *s, .exact = all.exact, .refine = (candidates + r->k - 1) / r->k};
  for (size_t i = 0; i < r->n_segments; i++) {
    uint64_t nprobe = spend[i].nprobe && !all.exact ? spend[i].nprobe : r->segments[i]->params.nlist;
    if (nprobe > out->nprobe) out->nprobe = nprobe;
  }
}

static int same_spend(const shard_recall *r, const rung *a, const rung *b) {
  if (a->point.exact != b->point.exact || a->point.refine != b->point.refine) return 0;
  for (size_t i = 0; i < r->n_segments && !a->point.exact; i++) {
    const ivfpq_setting *x = &a->spend[i], *y = &b->spend[i];
    if (ivfpq_is_flat(r->segments[i])) continue; /* one partition, of whose rows all are compared */
    if (x->nprobe != y->nprobe || x->n_candidates != y->n_candidates || x->reach < y->reach || x->reach > y->reach) return 0;
  }
  return 1;
}

/* A setting that another one is already only gives it its target. */
static vs_rc add_rung(shard_recall *r, double target, vs_err *err) {
  rung *x = &r->rungs[r->n_rungs];
  if (!(x->spend = malloc((r->n_segments + 1) * sizeof *x->spend))) return vs_nomem(err);
  describe(r, &(shard_recall_setting){.target = target, .nprobe = -1, .refine = -1}, x->spend, &x->point);
  for (size_t i = 0; i < r->n_rungs; i++) {
    if (!same_spend(r, x, &r->rungs[i])) continue;
    if (target > 0) r->rungs[i].point.asked.target = target;
    free(x->spend), x->spend = NULL;
    return VS_OK;
  }
  r->n_rungs++;
  return VS_OK;
}

static double cost_of(const shard_recall *r, const shard_stats *s) {
  const ivfpq_params *p = &r->segments[0]->params;
  for (size_t i = 0; i < r->n_segments && !p->m; i++) p = &r->segments[i]->params;
  double ns = (double)s->rows * IVFPQ_ROW_NS(p->m) + (double)s->partitions * IVFPQ_PART_NS;
  return (ns + (double)s->refined * IVFPQ_CANDIDATE_NS(p->sketch_bytes ? p->sketch_bytes : p->row_bytes)) / (double)r->n;
}

static vs_rc measure_recall(shard_recall *r, const shard_recall_setting *s, shard_recall_point *out, double *cost, vs_err *err) {
  shard_search q = search_of(r, s);
  found f = {.r = r};
  shard_stats stats;
  *cost = INFINITY, out->recall = 1, out->error = 0;
  if (out->exact) return VS_OK;
  vs_rc rc = search_all(r, &q, count_found, &f, &stats, err);
  if (rc) return rc;
  double n = (double)r->n, spread = f.squares / n - f.sum / n * f.sum / n;
  out->recall = f.sum / n, out->error = sqrt((spread > 0 ? spread : 0) / n), *cost = cost_of(r, &stats);
  return VS_OK;
}

static vs_rc measure_rungs(shard_recall *r, vs_err *err) {
  for (size_t i = 0; i < r->n_rungs; i++) {
    rung *x = &r->rungs[i];
    tell(r, "search", i, r->n_rungs);
    vs_rc rc = measure_recall(r, &x->point.asked, &x->point, &x->cost, err);
    if (rc) return rc;
  }
  for (size_t i = 1; i < r->n_rungs; i++) { /* stable: targets keep their order where they cost the same */
    rung x = r->rungs[i];
    size_t to = i;
    for (; to && r->rungs[to - 1].cost > x.cost; to--) r->rungs[to] = r->rungs[to - 1];
    r->rungs[to] = x;
  }
  r->measured = 1;
  return VS_OK;
}

/* ---- cost ---- */

static double seconds_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void forget_all(const shard_recall *r) {
  for (size_t i = 0; i < r->n_segments; i++) vs_io_forget(r->segments[i]->io);
}

static vs_traffic traffic_now(void) {
  const vs_scope *s = vs_scope_current();
  return s ? s->traffic : (vs_traffic){0};
}

/* One query after another, until all `most` of them or the seconds are over: the mean, in seconds. */
static vs_rc time_pass(shard_recall *r, shard_search *q, size_t most, double seconds, size_t *n_done, double *mean, vs_err *err) {
  double sum = 0;
  *n_done = 0, *mean = 0;
  for (size_t i = 0; i < most && (!i || sum < seconds); i++) {
    shard_hit *hits;
    size_t n;
    shard_stats stats;
    vs_rc rc = check_stop(err);
    if (rc) return rc;
    if (!r->local) forget_all(r);
    q->query = query_of(r, i * r->n / most);
    double start = seconds_now();
    rc = shard_search_run(q, &hits, &n, &stats, err);
    if (rc) return rc;
    sum += seconds_now() - start;
    free(hits);
    *n_done = i + 1, *mean = sum / (double)(i + 1);
  }
  return VS_OK;
}

static vs_rc measure_cost(shard_recall *r, shard_recall_point *x, vs_err *err) {
  shard_search q = search_of(r, &x->asked);
  vs_traffic before = traffic_now();
  size_t most = r->local || r->n < FAR_QUERIES ? r->n : FAR_QUERIES, n = 0;
  double best = INFINITY, mean, start = seconds_now();
  vs_rc rc = VS_OK;
  q.threads = 1;
  for (int pass = 0; pass < (r->local ? PASSES : 1) && !rc && (!pass || seconds_now() - start < FILE_SECONDS); pass++) {
    rc = time_pass(r, &q, most, r->local ? 4 * FILE_SECONDS : STORE_SECONDS, &n, &mean, err);
    if (!rc && mean < best) best = mean;
  }
  if (rc) return rc;
  vs_traffic after = traffic_now();
  x->ms = best * 1e3;
  if (!r->local) {
    x->requests = (double)(after.requests - before.requests) / (double)n;
    x->bytes = (double)(after.bytes - before.bytes) / (double)n;
  }
  return VS_OK;
}

/* ---- the whole ---- */

/* Counts rows and segments; how many queries there will be. */
static vs_rc take_shape(shard_recall *r, vs_err *err) {
  const shard_recall_plan *p = &r->plan;
  for (size_t i = 0; i < p->n_shards; i++) r->n_segments += p->shards[i]->manifest.n_segments;
  if (!(r->segments = malloc((r->n_segments + 1) * sizeof *r->segments))) return vs_nomem(err);
  r->local = 1;
  for (size_t i = 0, at = 0; i < p->n_shards; i++)
    for (size_t g = 0; g < p->shards[i]->manifest.n_segments; g++) {
      ivfpq_segment *s = r->segments[at++] = p->shards[i]->segments[g];
      r->n_rows += s->params.n_rows;
      if (!s->io->local) r->local = 0;
    }
  uint64_t others = r->n_rows > (uint64_t)r->own ? r->n_rows - (uint64_t)r->own : 0, most = r->own ? r->n_rows : p->n_queries;
  r->k = p->k < others ? p->k : others;
  r->n = p->n_queries ? p->n_queries : SHARD_RECALL_QUERIES;
  if (r->n > most) r->n = (size_t)most;
  if (r->n > ANSWERS_MOST / (r->k + 1)) r->n = r->k < ANSWERS_MOST ? ANSWERS_MOST / (size_t)(r->k + 1) : 1;
  if (r->own && r->n > FLOATS_MOST / r->dim) r->n = FLOATS_MOST / r->dim;
  if (!r->k) r->n = 0;
  return VS_OK;
}

vs_rc shard_recall_open(const shard_recall_plan *plan, shard_recall **out, vs_err *err) {
  *out = NULL;
  if (!plan->k) return vs_fail(err, VS_INVALID, "k must be at least 1");
  if (!plan->n_shards) return VS_OK;
  shard_recall *r = calloc(1, sizeof *r);
  if (!r) return vs_nomem(err);
  r->plan = *plan, r->own = !plan->queries, r->dim = plan->shards[0]->manifest.dim;
  vs_rc rc = take_shape(r, err);
  if (!rc && !r->n) {
    shard_recall_close(r);
    return VS_OK;
  }
  if (!rc && r->own) rc = take_rows(r, err);
  if (!rc) rc = find_truth(r, err);
  for (size_t i = 0; i < N_TARGETS && !rc; i++) rc = add_rung(r, targets[i], err);
  if (!rc) rc = add_rung(r, 0, err);
  if (rc) shard_recall_close(r);
  else *out = r;
  return rc;
}

void shard_recall_close(shard_recall *r) {
  if (!r) return;
  for (size_t i = 0; i < N_RUNGS; i++) free(r->rungs[i].spend);
  free(r->vectors), free(r->self), free(r->truth), free(r->last), free(r->segments), free(r);
}

size_t shard_recall_n_queries(const shard_recall *r) { return r->n; }

vs_rc shard_recall_next(shard_recall *r, shard_recall_point *out, int *more, vs_err *err) {
  *more = 0;
  if (r->at == r->n_rungs) return VS_OK;
  vs_rc rc = r->measured ? VS_OK : measure_rungs(r, err);
  if (rc) return rc;
  tell(r, "time", r->at, r->n_rungs);
  shard_recall_point *x = &r->rungs[r->at].point;
  if ((rc = measure_cost(r, x, err))) return rc;
  *out = *x, *more = 1, r->at++;
  return VS_OK;
}

vs_rc shard_recall_of(shard_recall *r, const shard_recall_setting *s, shard_recall_point *out, vs_err *err) {
  ivfpq_setting *spend = malloc((r->n_segments + 1) * sizeof *spend);
  double cost;
  if (!spend) return vs_nomem(err);
  describe(r, s, spend, out);
  free(spend);
  return measure_recall(r, s, out, &cost, err);
}
