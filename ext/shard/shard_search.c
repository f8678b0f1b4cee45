/* shard_search.c - the query executor: many segments of many shards, one ranking.
 *
 * Phase 1 scans every segment (in parallel over segments), each keeping its best k*refine estimates. The scans of segments in
 * a store go step by step, each step of all of them before the next of any: so their reads share rounds. The estimates of all
 * segments are merged, the best k*refine of them stay. Phase 2 reads those rows, in one round, and computes true distances.
 * Exact searches have one phase, and their result is what sorting the shards' own results together would give.
 *
 * Bytes that fail their check may have been damaged on their way: a search that met some is run once more with fresh ones.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../base/vs_pool.h"
#include "../base/vs_scope.h"
#include "../kernels/kern.h"
#include "../s3vfs/io_s3.h"
#include "shard_refine.h"
#include "shard_search_int.h"
#include "shard_spend.h"

enum { SPARE_BYTES = 16 << 20 }; /* of memory kept between searches: what one for k = 50,000 takes */

typedef struct segment_task {
  ivfpq_keys keys;        /* its memory may come from an earlier search */
  ivfpq_segment *segment; /* cleared for each search from here ... */
  uint32_t shard, number;
  ivfpq_stats stats;
  ivfpq_setting spend;
  ivfpq_query query;
  ivfpq_scan_state *scan;
  int more;               /* the scan has a step to go */
  vs_rc rc;
  vs_err err;             /* ... to here: its text is the most of a task */
} segment_task;

/* What a search allocates whatever it finds, kept for the next one of the process. Asking for it anew took 0.3 us of 30 with k = 10,
 * and 3 ms of 38 with k = 50,000: the allocator gives such sizes back to the system, which clears them page by page. */
typedef struct memory {
  segment_task *tasks;
  ivfpq_segment **segments; /* of the tasks */
  ivfpq_setting *spend;
  size_t room;
} memory;
static memory *spare;

typedef struct run {
  const shard_search *q;
  uint64_t n_rows, k, n_candidates;
  int exact;
  memory *memory;
  segment_task *tasks;
  size_t n_tasks;
  shard_stop stop;
} run;

int shard_stop_poll(void *ctx) {
  shard_stop *s = ctx;
  if (pthread_equal(pthread_self(), s->caller) && s->outer && s->outer->stop && s->outer->stop(s->outer->stop_ctx))
    __atomic_store_n(&s->stop, 1, __ATOMIC_RELAXED);
  return __atomic_load_n(&s->stop, __ATOMIC_RELAXED);
}

void shard_stop_enter(shard_stop *s) {
  s->outer = vs_scope_current(), s->inner = s->outer ? *s->outer : (vs_scope){0};
  s->caller = pthread_self(), s->stop = 0;
  s->inner.stop = shard_stop_poll, s->inner.stop_ctx = s;
  vs_scope_enter(&s->inner);
}

void shard_stop_leave(shard_stop *s) {
  vs_scope_enter(s->outer);
  if (s->outer) s->outer->traffic = s->inner.traffic;
}

/* ---- memory ---- */

static void memory_free(memory *m) {
  for (size_t i = 0; i < m->room; i++) ivfpq_keys_reset(&m->tasks[i].keys);
  free(m->tasks), free(m->segments), free(m->spend), free(m);
}

/* The spare one, or a new one, with n tasks that only their key buffers are set of. */
static memory *memory_take(size_t n) {
  memory *m = __atomic_exchange_n(&spare, NULL, __ATOMIC_ACQ_REL);
  if (!m && !(m = calloc(1, sizeof *m))) return NULL;
  if (m->room < n) {
    segment_task *tasks = realloc(m->tasks, n * sizeof *tasks);
    if (tasks) m->tasks = tasks;
    ivfpq_segment **segments = realloc(m->segments, n * sizeof *segments);
    if (segments) m->segments = segments;
    ivfpq_setting *spend = realloc(m->spend, n * sizeof *spend);
    if (spend) m->spend = spend;
    if (!tasks || !segments || !spend) {
      memory_free(m);
      return NULL;
    }
    for (; m->room < n; m->room++) memset(&tasks[m->room].keys, 0, sizeof tasks->keys);
  }
  for (size_t i = 0; i < n; i++) m->tasks[i].keys.n = 0;
  return m;
}

/* Keeps it when it is small and the place is free. */
static void memory_give_back(memory *m) {
  memory *none = NULL;
  size_t bytes = 0;
  for (size_t i = 0; i < m->room; i++) bytes += sizeof *m->tasks + 3 * m->tasks[i].keys.room * sizeof *m->tasks->keys.key;
  if (bytes > SPARE_BYTES || !__atomic_compare_exchange_n(&spare, &none, m, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) memory_free(m);
}

/* ---- what to spend ---- */

static int is_zero(const float *v, uint32_t dim) {
  for (uint32_t j = 0; j < dim; j++)
    if (v[j] != 0) return 0;
  return 1;
}

vs_rc shard_check_query(const shard_search *q, const float *query, vs_err *err) {
  if (q->n_shards && q->shards[0]->manifest.metric == SHARD_COSINE && is_zero(query, q->dim))
    return vs_fail(err, VS_INVALID, "the query is a zero vector, which has no direction (the metric is cosine)");
  return VS_OK;
}

vs_rc shard_check_dims(const shard_search *q, size_t *n_segments, uint64_t *n_rows, vs_err *err) {
  *n_segments = 0, *n_rows = 0;
  for (size_t i = 0; i < q->n_shards; i++) {
    const shard *s = q->shards[i];
    if (s->manifest.dim != q->dim)
      return vs_fail(err, VS_INVALID, "the query has %u dimensions, %s has %u", q->dim, s->path, s->manifest.dim);
    *n_segments += s->manifest.n_segments;
    *n_rows += s->manifest.n_rows;
  }
  return VS_OK;
}

static void plan_spend(run *r) {
  const memory *m = r->memory;
  for (size_t i = 0; i < r->n_tasks; i++) m->segments[i] = r->tasks[i].segment;
  shard_spend all = shard_spend_plan(r->q, r->k, r->n_rows, m->segments, r->n_tasks, m->spend);
  r->exact = r->q->exact || all.exact, r->n_candidates = r->exact ? r->k : all.n_candidates;
  for (size_t i = 0; i < r->n_tasks; i++) r->tasks[i].spend = m->spend[i];
}

static vs_rc prepare(run *r, vs_err *err) {
  const shard_search *q = r->q;
  size_t n;
  vs_rc rc = shard_check_query(q, q->query, err);
  if (!rc) rc = shard_check_dims(q, &n, &r->n_rows, err);
  if (rc) return rc;
  r->k = q->k < r->n_rows ? q->k : r->n_rows;
  if (!(r->memory = memory_take(n))) return vs_nomem(err);
  r->tasks = r->memory->tasks;
  for (uint32_t i = 0; i < q->n_shards; i++)
    for (uint32_t g = 0; g < q->shards[i]->manifest.n_segments; g++) {
      segment_task *t = &r->tasks[r->n_tasks++];
      memset(&t->segment, 0, offsetof(segment_task, err) - offsetof(segment_task, segment));
      vs_err_reset(&t->err);
      t->segment = q->shards[i]->segments[g], t->shard = i, t->number = g;
    }
  plan_spend(r);
  return VS_OK;
}

/* ---- phase 1 ---- */

static ivfpq_query segment_query(run *r, const segment_task *t) {
  return (ivfpq_query){.vector = r->q->query, .nprobe = t->spend.nprobe, .k = r->k, .reach = t->spend.reach,
                       .n_candidates = r->exact ? r->k : t->spend.n_candidates, .brute = !t->spend.nprobe, .threads = r->q->threads,
                       .filter = r->q->filters ? r->q->filters[t->shard] : NULL, .stop = shard_stop_poll, .stop_ctx = &r->stop};
}

static void step_task(void *ctx, size_t i) {
  segment_task *t = &((run *)ctx)->tasks[i];
  if (!t->more) return;
  t->rc = ivfpq_scan_step(t->scan, &t->more, &t->err);
  if (t->rc) t->more = 0;
}

static void open_task(void *ctx, size_t i) {
  run *r = ctx;
  segment_task *t = &r->tasks[i];
  t->query = segment_query(r, t);
  t->rc = ivfpq_scan_open(t->segment, &t->query, &t->keys, &t->stats, &t->scan, &t->err);
  t->more = !t->rc;
  if (t->segment->io->local) step_task(ctx, i);
}

static int any_more(const run *r) {
  for (size_t i = 0; i < r->n_tasks; i++)
    if (r->tasks[i].more) return 1;
  return 0;
}

/* The keys of this segment that lie at or before `after`. */
static uint64_t after_key(const shard_hit *a, const segment_task *t) {
  if (t->shard == a->shard && t->number == a->segment) return kern_key(a->distance, a->row);
  int before = t->shard != a->shard ? t->shard < a->shard : t->number < a->segment;
  return before ? kern_key(a->distance, UINT32_MAX) : kern_key(a->distance, 0) - 1;
}

static vs_rc first_error(run *r, vs_err *err) {
  for (size_t i = 0; i < r->n_tasks; i++)
    if (r->tasks[i].rc) return vs_fail(err, r->tasks[i].rc, "%s", r->tasks[i].err.text);
  return VS_OK;
}

static vs_rc run_scans(run *r, vs_err *err) {
  vs_rc rc;
  vs_pool_run(r->n_tasks, r->q->threads, open_task, r);
  while (!(rc = first_error(r, err)) && any_more(r)) vs_pool_run(r->n_tasks, r->q->threads, step_task, r);
  for (size_t i = 0; i < r->n_tasks; i++) {
    ivfpq_scan_close(r->tasks[i].scan);
    r->tasks[i].scan = NULL;
  }
  return rc;
}

vs_rc shard_check_bytes(uint64_t bytes, vs_err *err) {
  if (bytes <= io_s3_max_bytes()) return VS_OK;
  return vs_fail(err, VS_INVALID,
                 "comparing every vector (exact = 1, a recall beyond what was measured, or more rows than an approximate search gives) would read %llu MB from the "
                 "store, more than the limit of %llu MB: ask for fewer rows with k or LIMIT, or raise VECSHARD_MAX_BYTES or "
                 "vecshard_config('max_bytes', n)",
                 (unsigned long long)(bytes >> 20), (unsigned long long)(io_s3_max_bytes() >> 20));
}

static vs_rc check_exact_bytes(const run *r, vs_err *err) {
  uint64_t bytes = 0;
  for (size_t i = 0; i < r->n_tasks; i++)
    if (!r->tasks[i].segment->io->local && (r->exact || !r->tasks[i].spend.nprobe)) bytes += r->tasks[i].segment->section[IVFPQ_ROWS].size;
  return shard_check_bytes(bytes, err);
}

static vs_rc run_exact(run *r, vs_err *err) {
  for (size_t i = 0; i < r->n_tasks; i++) {
    segment_task *t = &r->tasks[i];
    ivfpq_query q = segment_query(r, t);
    uint64_t after = r->q->after ? after_key(r->q->after, t) : 0;
    vs_rc rc = ivfpq_exact(t->segment, &q, r->q->after ? &after : NULL, r->q->threads, &t->keys, &t->stats, err);
    if (rc) return rc;
  }
  return VS_OK;
}

vs_rc shard_keep_best(shard_hit *h, size_t *n, uint64_t n_best, ivfpq_keys *work, vs_err *err) {
  vs_rc rc = ivfpq_keys_room(work, *n, err);
  if (rc) return rc;
  for (size_t i = 0; i < *n; i++) work->key[i] = kern_key(h[i].distance, (uint32_t)i);
  uint64_t last = kern_get()->select_u64(work->key, *n, n_best, work->scratch);
  size_t kept = 0;
  for (size_t i = 0; i < *n; i++)
    if (kern_key(h[i].distance, (uint32_t)i) <= last) h[kept++] = h[i];
  *n = kept;
  return VS_OK;
}

/* The keys' memory once they are hits. */
static ivfpq_keys *work_of(run *r) { return &r->tasks[0].keys; }

/* All keys as hits, segment after segment, the best n of them. Those of an exact search are sorted, ties by shard, segment, row. */
static vs_rc collect(run *r, uint64_t n_best, shard_hit **hits, size_t *n, vs_err *err) {
  size_t total = 0, at = 0;
  for (size_t i = 0; i < r->n_tasks; i++) total += r->tasks[i].keys.n;
  shard_hit *h = malloc((total + 1) * sizeof *h);
  *hits = h;
  if (!h) return vs_nomem(err);
  for (size_t i = 0; i < r->n_tasks; i++) {
    const ivfpq_keys *k = &r->tasks[i].keys;
    if (r->exact) kern_sort_u64(k->key, k->n, k->scratch);
    for (size_t j = 0; j < k->n; j++)
      h[at++] = (shard_hit){kern_key_value(k->key[j]), r->tasks[i].shard, r->tasks[i].number, kern_key_number(k->key[j])};
  }
  *n = total;
  if (total > n_best) return r->exact ? shard_hits_nearest(h, n, n_best, work_of(r), err) : shard_keep_best(h, n, n_best, work_of(r), err);
  return r->exact && r->n_tasks > 1 ? shard_hits_nearest(h, n, n_best, work_of(r), err) : VS_OK;
}

/* ---- phase 2 ---- */

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

void shard_refine_begin(shard_refine_mark *m) { m->traffic = vs_scope_current()->traffic, m->us = now_us(); }

void shard_refine_end(const shard_refine_mark *m, shard_stats *stats) {
  const vs_traffic *now = &vs_scope_current()->traffic, *before = &m->traffic;
  stats->refine_us = now_us() - m->us;
  stats->refine = (vs_traffic){.requests = now->requests - before->requests, .retries = now->retries - before->retries,
                               .rounds = now->rounds - before->rounds, .bytes = now->bytes - before->bytes,
                               .hits = now->hits - before->hits};
}

static vs_rc refine_counted(run *r, shard_hit *hits, size_t *n, shard_stats *stats, vs_err *err) {
  shard_refine refine = {.q = r->q, .k = r->k, .stop = shard_stop_poll, .stop_ctx = &r->stop, .work = work_of(r)};
  shard_refine_mark mark;
  shard_refine_begin(&mark);
  vs_rc rc = shard_refine_run(&refine, hits, n, &stats->refined, err);
  shard_refine_end(&mark, stats);
  return rc;
}

/* ---- ties ---- */

typedef struct tied { shard_hit hit; ivfpq_id id; } tied;

static int id_order(const void *pa, const void *pb) {
  const ivfpq_id *a = &((const tied *)pa)->id, *b = &((const tied *)pb)->id;
  if (!a->is_text) return a->i < b->i ? -1 : a->i > b->i;
  int c = memcmp(a->text, b->text, a->len < b->len ? a->len : b->len);
  return c ? c : a->len < b->len ? -1 : a->len > b->len;
}

/* Reads one hit's id into memory of its own. */
static vs_rc own_id(const shard_search *q, tied *t, vs_err *err) {
  ivfpq_segment *s = q->shards[t->hit.shard]->segments[t->hit.segment];
  ivfpq_row row;
  if (ivfpq_rows_mapped(s)) {
    vs_rc rc = ivfpq_row_at(s, t->hit.row, &row.record, err);
    return rc ? rc : ivfpq_row_id(s, row.record, &t->id, err);
  }
  vs_rc rc = ivfpq_rows_fetch(s, &t->hit.row, 1, &row, err);
  if (rc) return rc;
  rc = ivfpq_row_id(s, row.record, &t->id, err);
  if (!rc && t->id.is_text && !t->id.heap) {
    if (!(t->id.heap = malloc(t->id.len + 1))) rc = vs_nomem(err);
    else memcpy(t->id.heap, t->id.text, t->id.len), t->id.text = t->id.heap;
  }
  ivfpq_rows_release(s, &row, 1);
  return rc;
}

static vs_rc order_tie(const shard_search *q, shard_hit *hits, size_t n, vs_err *err) {
  tied *t = calloc(n, sizeof *t);
  vs_rc rc = t ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < n && !rc; i++) {
    t[i].hit = hits[i];
    rc = own_id(q, &t[i], err);
  }
  if (!rc) {
    qsort(t, n, sizeof *t, id_order);
    for (size_t i = 0; i < n; i++) hits[i] = t[i].hit;
  }
  for (size_t i = 0; t && i < n; i++) ivfpq_id_free(&t[i].id);
  free(t);
  return rc;
}

vs_rc shard_order_ties(const shard_search *q, shard_hit *hits, size_t n, vs_err *err) {
  for (size_t i = 0; i < n;) {
    size_t m = 1;
    while (i + m < n && hits[i + m].distance == hits[i].distance && hits[i + m].shard == hits[i].shard) m++;
    vs_rc rc = m > 1 ? order_tie(q, hits + i, m, err) : VS_OK;
    if (rc) return rc;
    i += m;
  }
  return VS_OK;
}

/* ---- the whole ---- */

/* Drops what lies at or before `after`; hits are in order. */
static size_t skip_until(const shard_hit *after, shard_hit *hits, size_t n) {
  size_t at = 0;
  while (at < n && shard_hit_order(&hits[at], after) <= 0) at++;
  memmove(hits, hits + at, (n - at) * sizeof *hits);
  return n - at;
}

static vs_rc search_once(const shard_search *q, shard_hit **hits, size_t *n, shard_stats *stats, vs_err *err) {
  run r = {.q = q};
  *hits = NULL, *n = 0;
  memset(stats, 0, sizeof *stats);
  shard_stop_enter(&r.stop);
  vs_rc rc = prepare(&r, err);
  if (!rc && r.k) rc = check_exact_bytes(&r, err);
  if (!rc && r.k && r.exact) {
    rc = run_exact(&r, err);
    if (!rc) rc = collect(&r, r.k, hits, n, err);
  } else if (!rc && r.k) {
    rc = run_scans(&r, err);
    if (!rc) rc = collect(&r, r.n_candidates, hits, n, err);
    if (!rc) rc = refine_counted(&r, *hits, n, stats, err);
    if (!rc && q->after) *n = skip_until(q->after, *hits, *n);
  }
  if (!rc) rc = shard_order_ties(q, *hits, *n, err);
  shard_stop_leave(&r.stop);
  for (size_t i = 0; i < r.n_tasks; i++) {
    stats->partitions += r.tasks[i].stats.partitions, stats->rows += r.tasks[i].stats.rows;
  }
  if (r.memory) memory_give_back(r.memory);
  if (rc) free(*hits), *hits = NULL, *n = 0;
  return rc;
}

int shard_forget_remote(const shard_search *q) {
  int any = 0;
  for (size_t i = 0; i < q->n_shards; i++)
    for (size_t g = 0; g < q->shards[i]->manifest.n_segments; g++) {
      vs_io *io = q->shards[i]->segments[g]->io;
      if (io->forget) vs_io_forget(io), any = 1;
    }
  return any;
}

vs_rc shard_search_run(const shard_search *q, shard_hit **hits, size_t *n, shard_stats *stats, vs_err *err) {
  vs_err why;
  vs_err_reset(&why);
  vs_rc rc = search_once(q, hits, n, stats, &why);
  if (rc == VS_CORRUPT && shard_forget_remote(q)) {
    vs_err_reset(&why);
    rc = search_once(q, hits, n, stats, &why);
    if (rc == VS_CORRUPT) shard_forget_remote(q);
  }
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}
