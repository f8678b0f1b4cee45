/* shard_batch.c - many queries at once: what shard_search.c does for one; see there, and ivfpq_batch.c.
 *
 * Phase 1 scans segment after segment, each for all queries; segments in stores go in steps, so that all share their rounds.
 * The threads divide the queries, never one query: so the rows do not depend on their number.
 * Phase 2 compares the best candidates of all queries by stored vectors (shard_refine_many.c).
 */
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../ivfpq/ivfpq_batch.h"
#include "../kernels/kern.h"
#include "shard_refine.h"
#include "shard_search_int.h"
#include "shard_spend.h"

enum {
  MOST = 4096,                 /* queries at once */
  FILTERED_MOST = 256,         /* with a filter over stores: each may have to go on by itself, and keeps its partitions */
  BATCH_BYTES = 128 << 20,     /* of candidates and of what a scan keeps of a query */
  HELD_BYTES = 256 << 20,      /* of partitions in stores */
  CUT_FROM = 4,                /* times n_candidates: then the candidates of a query are cut in between */
  SLICE = 64
};

typedef struct run run;
typedef struct segment_task {
  run *r;
  ivfpq_segment *segment;
  uint32_t shard, number;
  ivfpq_setting spend;
  ivfpq_batch *batch;
  int more;
} segment_task;

struct run {
  const shard_batch *b;
  shard_search q;              /* with the first of the queries */
  uint64_t n_rows, k, n_candidates;
  int exact;
  shard_found *found;          /* by query */
  segment_task *tasks;
  size_t n_tasks;
  ivfpq_stats stats;
  shard_stop stop;
  int64_t *ids;                /* of the answers, while they are filled in */
  const shard_answers *out;
  vs_rc rc;                    /* of a task */
  vs_err err;
  pthread_mutex_t lock;
};

static void fail(run *r, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&r->lock);
  if (!r->rc) r->rc = rc, r->err = *err;
  pthread_mutex_unlock(&r->lock);
}

/* ---- what to spend ---- */

/* The tasks, and what each may spend. */
static vs_rc make_tasks(run *r, vs_err *err) {
  const shard_search *q = &r->q;
  size_t n = 0;
  vs_rc rc = shard_check_dims(q, &n, &r->n_rows, err);
  if (rc) return rc;
  ivfpq_segment **segments = malloc((n + 1) * sizeof *segments);
  ivfpq_setting *spend = malloc((n + 1) * sizeof *spend);
  r->tasks = calloc(n + 1, sizeof *r->tasks);
  if (!segments || !spend || !r->tasks) rc = vs_nomem(err);
  for (uint32_t i = 0; i < q->n_shards && !rc; i++)
    for (uint32_t g = 0; g < q->shards[i]->manifest.n_segments; g++) {
      segments[r->n_tasks] = q->shards[i]->segments[g];
      r->tasks[r->n_tasks++] = (segment_task){.r = r, .segment = q->shards[i]->segments[g], .shard = i, .number = g};
    }
  if (!rc) {
    r->k = q->k < r->n_rows ? q->k : r->n_rows;
    shard_spend all = shard_spend_plan(q, r->k, r->n_rows, segments, n, spend);
    r->exact = q->exact || all.exact, r->n_candidates = r->exact ? r->k : all.n_candidates;
    for (size_t i = 0; i < n; i++) r->tasks[i].spend = spend[i];
  }
  free(segments), free(spend);
  return rc;
}

size_t shard_batch_most(const shard_search *q) {
  run r = {.q = *q};
  vs_err ignored = {0};
  size_t most = MOST;
  if (make_tasks(&r, &ignored)) r.n_tasks = 0; /* the search itself will say why */
  uint64_t per_query = (r.n_tasks < CUT_FROM ? r.n_tasks + 1 : CUT_FROM + 1) * r.n_candidates * sizeof(shard_hit);
  for (size_t i = 0; i < r.n_tasks; i++) {
    const segment_task *t = &r.tasks[i];
    per_query += t->segment->params.dim_padded + t->segment->params.turn + 8ull * t->spend.nprobe + 64;
    if (q->filters && q->filters[t->shard] && !t->segment->io->local) most = FILTERED_MOST;
  }
  free(r.tasks);
  uint64_t n = BATCH_BYTES / (per_query + 1);
  return n < 1 ? 1 : n < most ? (size_t)n : most;
}

/* ---- phase 1 ---- */

static vs_rc add_found(shard_found *f, const segment_task *t, const uint64_t *keys, size_t n, vs_err *err) {
  if (f->n + n > f->room) {
    shard_hit *grown = realloc(f->hits, (f->n + n) * sizeof *grown);
    if (!grown) return vs_nomem(err);
    f->hits = grown, f->room = f->n + n;
  }
  for (size_t i = 0; i < n; i++)
    f->hits[f->n++] = (shard_hit){kern_key_value(keys[i]), t->shard, t->number, kern_key_number(keys[i])};
  return VS_OK;
}

static vs_rc keep_best(const run *r, shard_found *f, vs_err *err) {
  ivfpq_keys work = {0};
  vs_rc rc = r->exact ? shard_hits_nearest(f->hits, &f->n, r->k, &work, err) : shard_keep_best(f->hits, &f->n, r->n_candidates, &work, err);
  ivfpq_keys_reset(&work);
  return rc;
}

/* One segment's best of one query; no two calls for one query at a time, since segments are scanned one after another. */
static vs_rc take(void *ctx, size_t query, const uint64_t *keys, size_t n, vs_err *err) {
  const segment_task *t = ctx;
  shard_found *f = &t->r->found[query];
  vs_rc rc = add_found(f, t, keys, n, err);
  if (!rc && f->n > CUT_FROM * t->r->n_candidates) rc = keep_best(t->r, f, err);
  return rc;
}

static ivfpq_query segment_query(run *r, const segment_task *t) {
  return (ivfpq_query){.nprobe = t->spend.nprobe, .k = r->k, .reach = t->spend.reach,
                       .n_candidates = r->exact ? r->k : t->spend.n_candidates, .brute = !t->spend.nprobe, .threads = r->q.threads,
                       .filter = r->q.filters ? r->q.filters[t->shard] : NULL, .stop = shard_stop_poll, .stop_ctx = &r->stop};
}

static vs_rc run_scans(run *r, vs_err *err) {
  vs_rc rc = VS_OK;
  size_t n_remote = 0;
  int more = 1;
  for (size_t i = 0; i < r->n_tasks; i++) n_remote += !r->tasks[i].segment->io->local;
  for (size_t i = 0; i < r->n_tasks && !rc; i++) {
    segment_task *t = &r->tasks[i];
    ivfpq_batch_plan p = {.query = segment_query(r, t), .vectors = r->b->queries, .n = r->b->n, .threads = r->q.threads,
                          .held_bytes = HELD_BYTES / (n_remote + 1), .take = take, .take_ctx = t};
    rc = ivfpq_batch_open(t->segment, &p, &r->stats, &t->batch, err);
    t->more = 1;
  }
  while (!rc && more) {
    more = 0;
    for (size_t i = 0; i < r->n_tasks && !rc; i++) {
      segment_task *t = &r->tasks[i];
      if (!t->more) continue;
      rc = ivfpq_batch_step(t->batch, &t->more, err);
      more |= t->more;
      if (!t->more) ivfpq_batch_close(t->batch), t->batch = NULL;
    }
  }
  for (size_t i = 0; i < r->n_tasks; i++) ivfpq_batch_close(r->tasks[i].batch), r->tasks[i].batch = NULL;
  return rc;
}

static vs_rc run_exact(run *r, vs_err *err) {
  ivfpq_keys *keys = calloc(r->b->n + 1, sizeof *keys);
  vs_rc rc = keys ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < r->n_tasks && !rc; i++) {
    segment_task *t = &r->tasks[i];
    ivfpq_query q = segment_query(r, t);
    rc = ivfpq_exact_many(t->segment, &q, r->b->queries, r->b->n, r->q.threads, keys, &r->stats, err);
    for (size_t j = 0; j < r->b->n && !rc; j++) {
      kern_sort_u64(keys[j].key, keys[j].n, keys[j].scratch);
      rc = add_found(&r->found[j], t, keys[j].key, keys[j].n, err);
    }
    for (size_t j = 0; j < r->b->n; j++) ivfpq_keys_reset(&keys[j]);
  }
  for (size_t j = 0; keys && j < r->b->n; j++) ivfpq_keys_reset(&keys[j]);
  free(keys);
  return rc;
}

/* ---- phase 2 ---- */

static void cut_slice(void *ctx, size_t slice) {
  run *r = ctx;
  vs_err err = {0};
  vs_rc rc = VS_OK;
  for (size_t i = slice * SLICE; i < r->b->n && i < (slice + 1) * SLICE && !rc; i++) {
    shard_found *f = &r->found[i];
    if (r->exact ? r->n_tasks > 1 : f->n > r->n_candidates) rc = keep_best(r, f, &err);
  }
  if (rc) fail(r, rc, &err);
}

static vs_rc run_tasks(run *r, vs_task task, vs_err *err) {
  vs_pool_run((r->b->n + SLICE - 1) / SLICE, r->q.threads, task, r);
  return r->rc ? vs_fail(err, r->rc, "%s", r->err.text) : VS_OK;
}

static vs_rc refine(run *r, shard_stats *stats, vs_err *err) {
  shard_refine f = {.q = &r->q, .k = r->k, .stop = shard_stop_poll, .stop_ctx = &r->stop};
  shard_refine_mark mark;
  shard_refine_begin(&mark);
  vs_rc rc = shard_refine_many(&f, r->b->queries, r->found, r->b->n, &stats->refined, err);
  shard_refine_end(&mark, stats);
  return rc;
}

/* ---- answers ---- */

/* Numbers as ids, of rows at fixed addresses that were looked at a moment ago: no read. */
static int has_ids(const run *r) {
  for (size_t i = 0; i < r->n_tasks; i++)
    if (r->tasks[i].segment->params.id_text || !ivfpq_rows_mapped(r->tasks[i].segment)) return 0;
  return 1;
}

/* Copies the hits of some queries to their place, with their ids. */
static void answer_slice(void *ctx, size_t slice) {
  enum { AHEAD = 16 };
  run *r = ctx;
  size_t from = slice * SLICE, to = from + SLICE < r->b->n ? from + SLICE : r->b->n;
  vs_err err = {0};
  vs_rc rc = VS_OK;
  for (size_t i = from; i < to && !rc; i++) {
    shard_found *f = &r->found[i];
    rc = shard_order_ties(&r->q, f->hits, f->n, &err);
    if (f->n) memcpy(r->out->hits + r->out->first[i], f->hits, f->n * sizeof *f->hits);
  }
  const shard_hit *h = r->out->hits + r->out->first[from];
  size_t n = r->out->first[to] - r->out->first[from];
  for (size_t i = 0; i < n + AHEAD && !rc && r->ids; i++) {
    if (i < n) ivfpq_row_id_prefetch(r->q.shards[h[i].shard]->segments[h[i].segment], h[i].row);
    if (i < AHEAD) continue;
    const shard_hit *x = &h[i - AHEAD];
    const uint8_t *record;
    ivfpq_segment *s = r->q.shards[x->shard]->segments[x->segment];
    rc = ivfpq_row_at(s, x->row, &record, &err);
    if (!rc) memcpy(&r->ids[r->out->first[from] + i - AHEAD], record + ivfpq_vector_bytes(s), sizeof *r->ids);
  }
  if (rc) fail(r, rc, &err);
}

static vs_rc answer(run *r, shard_answers *out, vs_err *err) {
  for (size_t i = 0; i < r->b->n; i++) out->first[i + 1] = out->first[i] + r->found[i].n;
  size_t n = out->first[r->b->n];
  out->n = r->b->n;
  out->hits = malloc((n + 1) * sizeof *out->hits);
  if (has_ids(r)) out->ids = malloc((n + 1) * sizeof *out->ids); /* no need to have it */
  if (!out->hits) return vs_nomem(err);
  r->out = out, r->ids = out->ids;
  return run_tasks(r, answer_slice, err);
}

void shard_answers_reset(shard_answers *a) {
  free(a->hits), free(a->first), free(a->ids);
  memset(a, 0, sizeof *a);
}

/* ---- the whole ---- */

static vs_rc prepare(run *r, vs_err *err) {
  const shard_search *q = &r->q;
  uint64_t bytes = 0;
  vs_rc rc = make_tasks(r, err);
  for (size_t i = 0; i < r->b->n && !rc; i++) {
    vs_err why = {0};
    if (shard_check_query(q, r->b->queries + i * q->dim, &why)) rc = vs_fail(err, why.rc, "query %llu: %s", (unsigned long long)(r->b->first + i), why.text);
  }
  for (size_t i = 0; i < r->n_tasks && !rc; i++) {
    const segment_task *t = &r->tasks[i];
    if (!t->segment->io->local && (r->exact || !t->spend.nprobe)) bytes += t->segment->section[IVFPQ_ROWS].size;
  }
  if (!rc && r->k) rc = shard_check_bytes(bytes, err);
  if (!rc && !(r->found = calloc(r->b->n + 1, sizeof *r->found))) rc = vs_nomem(err);
  return rc;
}

static vs_rc batch_once(const shard_batch *b, shard_answers *out, shard_stats *stats, vs_err *err) {
  run r = {.b = b, .q = b->search, .lock = PTHREAD_MUTEX_INITIALIZER};
  memset(out, 0, sizeof *out), memset(stats, 0, sizeof *stats);
  r.q.query = b->queries;
  shard_stop_enter(&r.stop);
  vs_rc rc = prepare(&r, err);
  if (!rc && !(out->first = calloc(b->n + 1, sizeof *out->first))) rc = vs_nomem(err);
  if (!rc && r.k && b->n) {
    rc = r.exact ? run_exact(&r, err) : run_scans(&r, err);
    if (!rc) rc = run_tasks(&r, cut_slice, err);
    if (!rc && !r.exact) rc = refine(&r, stats, err);
  }
  if (!rc) rc = answer(&r, out, err);
  shard_stop_leave(&r.stop);
  stats->partitions = r.stats.partitions, stats->rows = r.stats.rows;
  for (size_t i = 0; r.found && i < b->n; i++) free(r.found[i].hits);
  free(r.found), free(r.tasks);
  if (rc) shard_answers_reset(out);
  return rc;
}

vs_rc shard_batch_run(const shard_batch *b, shard_answers *out, shard_stats *stats, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = batch_once(b, out, stats, &why);
  if (rc == VS_CORRUPT && shard_forget_remote(&b->search)) { /* bytes may have been damaged on their way */
    vs_err_reset(&why);
    rc = batch_once(b, out, stats, &why);
    if (rc == VS_CORRUPT) shard_forget_remote(&b->search);
  }
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}
