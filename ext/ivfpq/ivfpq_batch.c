/* ivfpq_batch.c - see ivfpq_batch.h.
 *
 * 1 rank   A slice of the queries meets every group of centroids while the group lies in the L1 cache (a matrix product of bytes).
 *          What stays of a query is its bytes and its nearest lanes: a few hundred bytes.
 * 2 order  The queries are put in the order of their nearest lane. Partitions that lie near one another have near numbers, so
 *          queries that follow one another probe much the same partitions, and find the codes in the L2 cache.
 * 3 scan   One query after another, by the code of a single search: the same order of partitions, the same thresholds, the same stop,
 *          and so the same rows, whatever the number of threads and of queries.
 *
 * What gained nothing: AMX tiles for the products (kern_scores_i8), which are a twentieth of a batch; a copy of the codes in huge pages
 * (2 to 4 %, for the memory of all codes).
 * What was not done: going through the partitions, each for all its queries. Code tables live in registers, loaded once per (query,
 * partition), and are larger than a partition's codes (15 KB against 8 KB at 960 dimensions), so a partition's codes in the L1
 * buy nothing that the order above does not, while thresholds and the stop need every query's partitions nearest first.
 *
 * In a store the partitions of all queries (or as many as may be held) are begun together, after the order is known, and
 * released when their queries are done. A query whose filter wants more goes on by itself, in rounds shared with others like it.
 */
#include "ivfpq_batch.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_scan_int.h"

enum {
  SLICE = 64,        /* queries ranked together: their wishes are bits of a word */
  SCAN_SLICE = 16,   /* queries per task of a scan */
  LANES_AT_ONCE = 2048 /* ranked together; their scores stay in the L2 cache */
};

/* What one thread works with. */
typedef struct bench {
  struct bench *link;
  ivfpq_table t;          /* x; bytes point into the batch */
  int8_t *tile;           /* SLICE queries as ranked: bytes of some, or projected bytes */
  int8_t *projected;
  float *projected_f32;
  int32_t *score;         /* SLICE x LANES_AT_ONCE */
  float *slots;
  uint64_t *rank, *scratch;
  ivfpq_scan_state *scan;
  ivfpq_keys keys;
} bench;

typedef struct seed { float step8, turned_step, qq, constant, term_scale; uint32_t n, n_groups; int cut; } seed;

/* A query whose filter let too few rows through, with what its scan points to. */
typedef struct waiting { size_t query; ivfpq_scan_state *scan; ivfpq_keys keys; ivfpq_query q; ivfpq_stats stats; } waiting;

typedef enum stage { RANK, PROBE, DONE } stage;

struct ivfpq_batch {
  ivfpq_segment *s;
  ivfpq_batch_plan p;
  ivfpq_stats *stats;
  stage stage;
  size_t want, stride;         /* lanes kept per query; bytes from one query's bytes to the next */
  seed *seeds;
  int8_t *bytes;
  size_t turned_stride;
  int8_t *turned8;             /* the queries along the codes' directions, as bytes */
  uint64_t *keys;              /* n x want */
  uint64_t *order;             /* (nearest lane, query) ascending; scratch behind it */
  uint64_t *wishes;            /* per slice and group: which queries rank it. NULL: all do */
  const ivfpq_group_view *views;
  ivfpq_group_view *own_views; /* by number; those with a range are ours */
  uint32_t *group_list;
  ivfpq_group_view *begun;
  size_t n_begun;
  vs_range codebook[2];
  size_t from, to;             /* order[from, to): the queries whose partitions are held, or begun, and not scanned yet */
  ivfpq_part *parts;
  size_t n_parts;
  uint64_t *part_seen;         /* a bit per partition */
  waiting **waiting;           /* NULL: done */
  size_t n_waiting, waiting_room;
  ivfpq_scan_state *flat;      /* holds a flat segment's rows */
  /* filters are asked once per partition */
  ivfpq_filter filter;
  uint64_t *bitmap;
  unsigned char *has_bitmap;
  bench *benches;              /* free ones */
  vs_rc rc;                    /* first failure of a task */
  vs_err err;
  pthread_mutex_t lock;        /* of benches, waiting, rc, err, stats */
};

/* ---- failures and benches ---- */

static void fail(ivfpq_batch *b, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&b->lock);
  if (!b->rc) b->err = *err;
  if (!b->rc) __atomic_store_n(&b->rc, rc, __ATOMIC_RELAXED);
  pthread_mutex_unlock(&b->lock);
}
static int failed(ivfpq_batch *b) { return __atomic_load_n(&b->rc, __ATOMIC_RELAXED) != VS_OK; }

static vs_rc run(ivfpq_batch *b, size_t n, vs_task task, vs_err *err) {
  vs_pool_run(n, b->p.threads, task, b);
  return b->rc ? vs_fail(err, b->rc, "%s", b->err.text) : VS_OK;
}

static void bench_free(bench *w) {
  if (!w) return;
  free(w->t.x), free(w->tile), free(w->projected), free(w->projected_f32), free(w->score), free(w->slots), free(w->rank), free(w->scratch);
  ivfpq_scan_close(w->scan);
  ivfpq_keys_reset(&w->keys);
  free(w);
}

static bench *bench_make(const ivfpq_batch *b) {
  const ivfpq_params *p = &b->s->params;
  bench *w = calloc(1, sizeof *w);
  size_t room = ivfpq_ranking_room(b->want, LANES_AT_ONCE), project = ivfpq_round(p->project, 64);
  size_t widest = project > b->turned_stride ? project : b->turned_stride;
  if (!w) return NULL;
  w->t.x = calloc(b->stride + 16, sizeof *w->t.x);
  w->tile = malloc(SLICE * b->stride + 64), w->projected = malloc(SLICE * project + 64);
  w->projected_f32 = malloc((SLICE * widest + 16) * sizeof(float));
  w->score = malloc(SLICE * (size_t)LANES_AT_ONCE * sizeof(int32_t));
  w->slots = malloc(IVFPQ_RANKING_SLOTS * sizeof *w->slots), w->rank = malloc(SLICE * room * sizeof *w->rank);
  w->scratch = malloc((2 * room + 3 * IVFPQ_RANKING_SLOTS) * sizeof *w->scratch);
  w->scan = ivfpq_scan_take(b->s);
  if (w->t.x && w->tile && w->projected && w->projected_f32 && w->score && w->slots && w->rank && w->scratch && w->scan) return w;
  bench_free(w);
  return NULL;
}

static bench *bench_take(ivfpq_batch *b) {
  pthread_mutex_lock(&b->lock);
  bench *w = b->benches;
  if (w) b->benches = w->link;
  pthread_mutex_unlock(&b->lock);
  if (!w && !(w = bench_make(b))) {
    vs_err err = {0};
    fail(b, vs_nomem(&err), &err);
  }
  return w;
}

static void bench_give_back(ivfpq_batch *b, bench *w) {
  pthread_mutex_lock(&b->lock);
  w->link = b->benches, b->benches = w;
  pthread_mutex_unlock(&b->lock);
}

/* ---- filters ---- */

/* Where the bitmap of a partition lies: whole words each, so that threads do not meet in one. */
static uint64_t *part_bitmap(ivfpq_batch *b, const ivfpq_part *part) { return b->bitmap + part->entry.row0 / 64 + part->number; }

static vs_rc eval_once(void *ctx, ivfpq_segment *s, const ivfpq_part *part, uint64_t *bitmap, vs_err *err) {
  ivfpq_batch *b = ctx;
  size_t bytes = ivfpq_round(part->entry.n_rows, 64) / 8;
  unsigned char *has = &b->has_bitmap[part->number], none = 0;
  if (__atomic_load_n(has, __ATOMIC_ACQUIRE) == 2) {
    memcpy(bitmap, part_bitmap(b, part), bytes);
    return VS_OK;
  }
  vs_rc rc = b->p.query.filter->eval(b->p.query.filter->ctx, s, part, bitmap, err);
  /* one thread writes it down */
  if (!rc && __atomic_compare_exchange_n(has, &none, 1, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    memcpy(part_bitmap(b, part), bitmap, bytes);
    __atomic_store_n(has, 2, __ATOMIC_RELEASE);
  }
  return rc;
}

/* ---- ranking ---- */

static size_t slice_size(const ivfpq_batch *b, size_t slice) {
  return b->p.n - slice * SLICE < SLICE ? b->p.n - slice * SLICE : SLICE;
}

/* The queries of a slice along n directions, as bytes: ivfpq_project, or what a table is made of, for all of them at once. */
static void turn_slice(ivfpq_batch *b, bench *w, size_t slice, const uint8_t *packed, const float *scale, uint32_t n, size_t stride,
                       int8_t *out, float *step) {
  size_t m = slice_size(b, slice);
  for (uint32_t at = 0; at < n; at += LANES_AT_ONCE) {
    uint32_t part = n - at < LANES_AT_ONCE ? n - at : LANES_AT_ONCE, width = ivfpq_coded_dim(&b->s->params);
    kern_get()->scores_i8(b->bytes + slice * SLICE * b->stride, m, b->stride, width, packed + (size_t)at * width, part, w->score, LANES_AT_ONCE);
    for (size_t i = 0; i < m; i++)
      for (uint32_t u = 0; u < part; u++)
        w->projected_f32[i * stride + at + u] = b->seeds[slice * SLICE + i].step8 * scale[at + u] * (float)w->score[i * LANES_AT_ONCE + u];
  }
  for (size_t i = 0; i < m; i++) step[i] = kern_get()->quantize_i8(w->projected_f32 + i * stride, n, out + i * stride);
}

/* The queries of a slice as bytes; with a projection, in its directions too. step: what the centroids are scored with. */
static void prepare_slice(ivfpq_batch *b, bench *w, size_t slice, float *step) {
  const ivfpq_params *p = &b->s->params;
  for (size_t i = 0; i < slice_size(b, slice); i++) {
    size_t at = slice * SLICE + i;
    w->t.bytes = b->bytes + at * b->stride;
    ivfpq_table_query(b->s, b->p.vectors + at * p->dim, &w->t);
    b->seeds[at] = (seed){.step8 = w->t.step8, .qq = w->t.qq, .constant = w->t.constant, .term_scale = w->t.term_scale};
    step[i] = w->t.step8;
  }
  if (p->turn) {
    const ivfpq_codebook *c = ivfpq_codebook_of(b->s);
    float turned_step[SLICE];
    turn_slice(b, w, slice, c->turn, c->turn_scale, p->turn, b->turned_stride, b->turned8 + slice * SLICE * b->turned_stride, turned_step);
    for (size_t i = 0; i < slice_size(b, slice); i++) b->seeds[slice * SLICE + i].turned_step = turned_step[i];
  }
  if (p->project)
    turn_slice(b, w, slice, b->s->projection, b->s->projection_scale, p->project, ivfpq_round(p->project, 64), w->projected, step);
}

/* The scores of the lanes [from, to) of a group, by which of its wishers a query is. */
static void score_lanes(ivfpq_batch *b, bench *w, size_t slice, uint32_t g, uint32_t from, uint32_t to, uint64_t wish, int32_t *score) {
  const ivfpq_params *p = &b->s->params;
  size_t n = slice_size(b, slice), stride = p->project ? ivfpq_round(p->project, 64) : b->stride, m = 0;
  uint32_t width = p->project ? p->project : ivfpq_coded_dim(p);
  const int8_t *q = p->project ? w->projected : b->bytes + slice * SLICE * b->stride;
  if (wish) {
    for (size_t i = 0; i < n; i++)
      if (wish >> i & 1) memcpy(w->tile + m++ * stride, q + i * stride, width);
    q = w->tile;
  } else m = n;
  kern_get()->scores_i8(q, m, stride, width, b->views[g].packed + (size_t)(from - b->s->first_lane[g]) * width, to - from, score, LANES_AT_ONCE);
}

/* Some of the lanes that are ranked together, side by side: scale and norm2 of the first. */
typedef struct { const float *scale, *norm2; uint32_t from, to; uint64_t wish; } piece;

/* Shows the lanes [first, end) to the queries of a slice that rank them. */
static void rank_lanes(ivfpq_batch *b, bench *w, size_t slice, uint32_t first, uint32_t end, ivfpq_ranking *ranks) {
  piece pieces[LANES_AT_ONCE / 16];
  size_t n_pieces = 0;
  for (uint32_t at = first; at < end;) {
    uint32_t g = b->s->lane_group[at], to = b->s->first_lane[g + 1] < end ? b->s->first_lane[g + 1] : end;
    uint64_t wish = b->wishes ? b->wishes[slice * b->s->params.n_groups + g] : 0;
    if (wish || !b->wishes) {
      score_lanes(b, w, slice, g, at, to, wish, w->score + (at - first));
      piece next = {b->views[g].scale + (at - b->s->first_lane[g]), b->views[g].norm2 + (at - b->s->first_lane[g]), at, to, wish};
      piece *last = n_pieces ? &pieces[n_pieces - 1] : NULL;
      if (last && !b->wishes && last->scale + (at - last->from) == next.scale && last->norm2 + (at - last->from) == next.norm2) last->to = to;
      else pieces[n_pieces++] = next;
    }
    at = to;
  }
  for (size_t i = 0; i < slice_size(b, slice); i++) {
    size_t mine = 0, lanes = 0;
    const int32_t *score[LANES_AT_ONCE / 16];
    const piece *p[LANES_AT_ONCE / 16];
    for (size_t j = 0; j < n_pieces; j++) {
      uint64_t wish = pieces[j].wish;
      if (wish && !(wish >> i & 1)) continue;
      size_t row = wish ? (size_t)__builtin_popcountll(wish & ((1ull << i) - 1)) : i;
      p[mine] = &pieces[j], score[mine++] = w->score + row * LANES_AT_ONCE + (pieces[j].from - first);
      lanes += pieces[j].to - pieces[j].from;
    }
    ivfpq_ranking_begin_look(&ranks[i], lanes);
    for (size_t j = 0; j < mine; j++) ivfpq_ranking_look(&ranks[i], score[j], p[j]->scale, p[j]->norm2, p[j]->to - p[j]->from);
    ivfpq_ranking_end_look(&ranks[i]);
    for (size_t j = 0; j < mine; j++) ivfpq_ranking_add(&ranks[i], score[j], p[j]->scale, p[j]->norm2, p[j]->to - p[j]->from, p[j]->from);
    b->seeds[slice * SLICE + i].n += (uint32_t)lanes;
  }
}

static void rank_slice(void *ctx, size_t slice) {
  ivfpq_batch *b = ctx;
  float step[SLICE];
  ivfpq_ranking ranks[SLICE];
  bench *w = failed(b) ? NULL : bench_take(b);
  if (!w) return;
  size_t room = ivfpq_ranking_room(b->want, LANES_AT_ONCE), n = slice_size(b, slice);
  uint32_t lanes = b->s->first_lane[b->s->params.n_groups];
  prepare_slice(b, w, slice, step);
  for (size_t i = 0; i < n; i++)
    ranks[i] = (ivfpq_ranking){.key = w->rank + i * room, .scratch = w->scratch, .want = b->want, .step = step[i],
                               .qq = b->seeds[slice * SLICE + i].qq, .limit = UINT64_MAX, .slots = w->slots};
  for (size_t i = 0; i < n; i++) {
    uint32_t n_groups = b->s->params.n_groups, *wished = &b->seeds[slice * SLICE + i].n_groups;
    *wished = b->wishes ? 0 : n_groups;
    for (uint32_t g = 0; b->wishes && g < n_groups; g++) *wished += b->wishes[slice * n_groups + g] >> i & 1;
  }
  for (uint32_t at = 0; at < lanes; at += LANES_AT_ONCE)
    rank_lanes(b, w, slice, at, lanes - at < LANES_AT_ONCE ? lanes : at + LANES_AT_ONCE, ranks);
  for (size_t i = 0; i < n; i++) {
    size_t at = slice * SLICE + i;
    uint64_t nearest = UINT64_MAX;
    ivfpq_ranking_end(&ranks[i]);
    b->seeds[at].cut = ranks[i].n < b->seeds[at].n;
    b->seeds[at].n = (uint32_t)ranks[i].n;
    memcpy(b->keys + at * b->want, ranks[i].key, ranks[i].n * sizeof *b->keys);
    for (size_t j = 0; j < ranks[i].n; j++) nearest = ranks[i].key[j] < nearest ? ranks[i].key[j] : nearest;
    b->order[at] = (uint64_t)kern_key_number(nearest) << 32 | (uint32_t)at;
  }
  bench_give_back(b, w);
  if (b->p.query.stop && b->p.query.stop(b->p.query.stop_ctx)) {
    vs_err err = {0};
    fail(b, vs_fail(&err, VS_INTERRUPT, "interrupted"), &err);
  }
}

/* Which groups are ranked by which query: all mostly. */
static vs_rc choose(ivfpq_batch *b, unsigned char *any, vs_err *err) {
  const ivfpq_params *p = &b->s->params;
  size_t n_slices = (b->p.n + SLICE - 1) / SLICE, n;
  memset(any, 1, p->n_groups);
  if (ivfpq_ranks_all(b->s, &b->p.query)) return VS_OK;
  memset(any, 0, p->n_groups);
  ivfpq_table t = {.x = calloc(b->stride + 16, sizeof *t.x), .bytes = b->bytes};
  uint32_t *order = malloc(2 * (p->n_groups + 1) * sizeof *order);
  b->wishes = calloc(n_slices * p->n_groups + 1, sizeof *b->wishes);
  vs_rc rc = t.x && order && b->wishes ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < b->p.n && !rc; i++) {
    ivfpq_table_query(b->s, b->p.vectors + i * p->dim, &t);
    rc = ivfpq_choose_groups(b->s, &b->p.query, t.x, order, order + p->n_groups + 1, &n, err);
    for (size_t j = 0; j < n && !rc; j++)
      b->wishes[i / SLICE * p->n_groups + order[j]] |= 1ull << i % SLICE, any[order[j]] = 1;
  }
  free(t.x), free(order);
  return rc;
}

static vs_rc begin_groups(ivfpq_batch *b, vs_err *err) {
  const ivfpq_params *p = &b->s->params;
  unsigned char *any = malloc(p->n_groups + 1);
  vs_rc rc = any ? choose(b, any, err) : vs_nomem(err);
  if (!rc) rc = ivfpq_resident(b->s, &b->views, err);
  if (!rc && !b->views) {
    b->own_views = calloc(p->n_groups + 1, sizeof *b->own_views), b->begun = calloc(p->n_groups + 1, sizeof *b->begun);
    b->group_list = malloc((p->n_groups + 1) * sizeof *b->group_list);
    if (!b->own_views || !b->begun || !b->group_list) rc = vs_nomem(err);
    size_t n = 0;
    for (uint32_t g = 0; g < p->n_groups && !rc; g++)
      if (any[g]) b->group_list[n++] = g;
    if (!rc) rc = ivfpq_groups_begin(b->s, b->group_list, n, b->begun, err);
    if (!rc) b->n_begun = n, b->views = b->own_views;
  }
  free(any);
  return rc;
}

static vs_rc take_groups(ivfpq_batch *b, vs_err *err) {
  size_t n = b->n_begun;
  b->n_begun = 0;
  vs_rc rc = n ? ivfpq_groups_wait(b->s, b->begun, n, err) : VS_OK;
  for (size_t i = 0; i < n && !rc; i++) b->own_views[b->begun[i].group] = b->begun[i];
  if (!rc && b->codebook[0].len) {
    rc = ivfpq_codebook_wait(b->s, b->codebook, err);
    memset(b->codebook, 0, sizeof b->codebook);
  }
  return rc;
}

static vs_rc rank(ivfpq_batch *b, vs_err *err) {
  vs_rc rc = take_groups(b, err);
  if (!rc) rc = run(b, (b->p.n + SLICE - 1) / SLICE, rank_slice, err);
  if (!rc) kern_sort_u64(b->order, b->p.n, b->order + b->p.n);
  return rc;
}

/* ---- scanning ---- */

static size_t query_at(const ivfpq_batch *b, size_t place) { return (uint32_t)b->order[place]; }

static ivfpq_query query_of(ivfpq_batch *b, size_t query) {
  ivfpq_query q = b->p.query;
  q.vector = b->p.vectors + query * b->s->params.dim;
  if (q.filter) q.filter = &b->filter;
  return q;
}

static vs_rc open_scan(ivfpq_batch *b, size_t query, ivfpq_scan_state *c, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats,
                       vs_err *err) {
  const seed *sd = &b->seeds[query];
  ivfpq_ranked r = {.views = b->views, .n_groups = sd->n_groups, .bytes = b->bytes + query * b->stride, .step8 = sd->step8,
                    .qq = sd->qq, .constant = sd->constant, .term_scale = sd->term_scale, .key = b->keys + query * b->want,
                    .n = sd->n, .cut = sd->cut, .turned8 = b->turned8 + query * b->turned_stride, .turned_step = sd->turned_step};
  out->n = 0;
  return ivfpq_scan_ranked(c, q, out, stats, &r, err);
}

static void count(ivfpq_batch *b, const ivfpq_stats *stats) {
  pthread_mutex_lock(&b->lock);
  b->stats->partitions += stats->partitions, b->stats->rows += stats->rows;
  pthread_mutex_unlock(&b->lock);
}

static void waiting_free(waiting *x) {
  if (!x) return;
  ivfpq_scan_close(x->scan);
  ivfpq_keys_reset(&x->keys);
  free(x);
}

static vs_rc add_waiting(ivfpq_batch *b, waiting *x, vs_err *err) {
  vs_rc rc = VS_OK;
  pthread_mutex_lock(&b->lock);
  if (b->n_waiting == b->waiting_room) {
    waiting **grown = realloc(b->waiting, (b->waiting_room * 2 + 16) * sizeof *grown);
    if (grown) b->waiting = grown, b->waiting_room = b->waiting_room * 2 + 16;
    else rc = vs_nomem(err);
  }
  if (!rc) b->waiting[b->n_waiting++] = x;
  pthread_mutex_unlock(&b->lock);
  return rc;
}

/* The scan goes on in rounds of its own; the bench gets another one. */
static vs_rc put_aside(ivfpq_batch *b, bench *w, size_t query, vs_err *err) {
  waiting *x = calloc(1, sizeof *x);
  ivfpq_scan_state *fresh = x ? ivfpq_scan_take(b->s) : NULL;
  vs_rc rc = fresh ? add_waiting(b, x, err) : vs_nomem(err);
  if (rc) {
    ivfpq_scan_close(fresh), free(x);
    return rc;
  }
  *x = (waiting){.query = query, .scan = w->scan, .keys = w->keys, .q = query_of(b, query)};
  x->scan->q = &x->q, x->scan->out = &x->keys, x->scan->stats = &x->stats;
  w->scan = fresh;
  memset(&w->keys, 0, sizeof w->keys);
  return VS_OK;
}

static void scan_slice(void *ctx, size_t slice) {
  ivfpq_batch *b = ctx;
  vs_err err = {0};
  ivfpq_stats stats = {0};
  vs_rc rc = VS_OK;
  bench *w = failed(b) ? NULL : bench_take(b);
  if (!w) return;
  size_t at = b->from + slice * SCAN_SLICE, end = at + SCAN_SLICE < b->to ? at + SCAN_SLICE : b->to;
  for (; at < end && !rc; at++) {
    size_t query = query_at(b, at);
    ivfpq_query q = query_of(b, query);
    int more = 0;
    rc = open_scan(b, query, w->scan, &q, &w->keys, &stats, &err);
    if (!rc) rc = ivfpq_scan_step(w->scan, &more, &err);
    if (!rc && more) rc = put_aside(b, w, query, &err);
    else if (!rc) rc = b->p.take(b->p.take_ctx, query, w->keys.key, w->keys.n, &err);
  }
  if (rc) fail(b, rc, &err);
  count(b, &stats);
  bench_give_back(b, w);
}

static vs_rc scan(ivfpq_batch *b, vs_err *err) { return run(b, (b->to - b->from + SCAN_SLICE - 1) / SCAN_SLICE, scan_slice, err); }

/* ---- rounds of a store ---- */

/* Notes the first partitions of one query that nobody of this round wants yet. */
static vs_rc want_parts(ivfpq_batch *b, bench *w, size_t query, size_t *room, uint64_t *bytes, vs_err *err) {
  const ivfpq_params *p = &b->s->params;
  ivfpq_stats none = {0};
  ivfpq_query q = query_of(b, query);
  const uint64_t *keys;
  vs_rc rc = open_scan(b, query, w->scan, &q, &w->keys, &none, err);
  if (rc) return rc;
  size_t n = ivfpq_scan_first(w->scan, q.nprobe, &keys);
  if (b->n_parts + n > *room) {
    ivfpq_part *grown = realloc(b->parts, (2 * *room + n) * sizeof *grown);
    if (!grown) return vs_nomem(err);
    b->parts = grown, *room = 2 * *room + n;
  }
  for (size_t i = 0; i < n; i++) {
    uint32_t lane = kern_key_number(keys[i]), g = b->s->lane_group[lane], at = lane - b->s->first_lane[g], number;
    const ivfpq_group_view *v = &b->views[g];
    if (at >= v->n) continue; /* padding */
    number = v->first + at;
    if (b->part_seen[number / 64] >> number % 64 & 1) continue;
    b->part_seen[number / 64] |= 1ull << number % 64;
    b->parts[b->n_parts++] = (ivfpq_part){.number = number, .entry = v->entries[at]};
    *bytes += ivfpq_code_bytes(v->entries[at].n_rows, p->m) + (q.filter ? v->entries[at].column_bytes : 0);
  }
  return VS_OK;
}

/* Begins to read what the next queries probe: all of them, or as many as may be held. */
static vs_rc hold_next(ivfpq_batch *b, vs_err *err) {
  uint64_t bytes = 0;
  size_t room = 0;
  int what = IVFPQ_WANT_CODES | (b->p.query.filter ? IVFPQ_WANT_COLUMNS : 0);
  bench *w = bench_take(b);
  vs_rc rc = w ? VS_OK : vs_nomem(err);
  b->from = b->to, b->n_parts = 0;
  memset(b->part_seen, 0, (b->s->params.nlist / 64 + 1) * sizeof *b->part_seen);
  free(b->parts), b->parts = NULL;
  for (; b->to < b->p.n && (b->to == b->from || bytes < b->p.held_bytes) && !rc; b->to++)
    rc = want_parts(b, w, query_at(b, b->to), &room, &bytes, err);
  if (w) bench_give_back(b, w);
  if (!rc) rc = ivfpq_parts_begin(b->s, what, b->parts, b->n_parts, err);
  if (rc) b->n_parts = 0;
  return rc;
}

/* What was begun has come: its queries are scanned, by whom it was wanted. */
static vs_rc scan_held(ivfpq_batch *b, vs_err *err) {
  size_t n = b->n_parts;
  b->n_parts = 0;
  vs_rc rc = ivfpq_parts_wait(b->s, b->parts, n, err);
  if (rc) return rc;
  rc = scan(b, err);
  b->from = b->to;
  ivfpq_parts_release(b->s, b->parts, n);
  return rc;
}

static void step_waiting(void *ctx, size_t i) {
  ivfpq_batch *b = ctx;
  waiting *x = b->waiting[i];
  vs_err err = {0};
  int more = 0;
  if (!x || failed(b)) return;
  vs_rc rc = ivfpq_scan_step(x->scan, &more, &err);
  if (!rc && more) return;
  if (!rc) rc = b->p.take(b->p.take_ctx, x->query, x->keys.key, x->keys.n, &err);
  if (rc) fail(b, rc, &err);
  count(b, &x->stats);
  waiting_free(x);
  b->waiting[i] = NULL;
}

static vs_rc go_on(ivfpq_batch *b, vs_err *err) {
  size_t n = 0;
  vs_rc rc = b->n_waiting ? run(b, b->n_waiting, step_waiting, err) : VS_OK;
  for (size_t i = 0; i < b->n_waiting; i++)
    if (b->waiting[i]) b->waiting[n++] = b->waiting[i];
  b->n_waiting = n;
  return rc;
}

/* ---- flat segments ---- */

/* They have no codes: every row is compared. */
static vs_rc step_flat(ivfpq_batch *b, vs_err *err) {
  ivfpq_keys *keys = calloc(b->p.n + 1, sizeof *keys);
  vs_rc rc = keys ? ivfpq_exact_many(b->s, &b->p.query, b->p.vectors, b->p.n, b->p.threads, keys, b->stats, err) : vs_nomem(err);
  for (size_t i = 0; i < b->p.n && !rc; i++) {
    ivfpq_flat_estimates(b->s, &keys[i]);
    rc = b->p.take(b->p.take_ctx, i, keys[i].key, keys[i].n, err);
  }
  for (size_t i = 0; keys && i < b->p.n; i++) ivfpq_keys_reset(&keys[i]);
  free(keys);
  return rc;
}

/* ---- the whole ---- */

static vs_rc allocate(ivfpq_batch *b, vs_err *err) {
  const ivfpq_params *p = &b->s->params;
  size_t n = b->p.n;
  b->want = ivfpq_ranks_wanted(b->s, &b->p.query);
  b->stride = ivfpq_round(ivfpq_coded_dim(p), 64);
  b->turned_stride = ivfpq_round(p->turn, 64);
  b->seeds = malloc(n * sizeof *b->seeds), b->bytes = calloc(n * b->stride + 64, 1), b->turned8 = malloc(n * b->turned_stride + 64);
  b->keys = malloc((n * b->want + 1) * sizeof *b->keys), b->order = malloc(2 * n * sizeof *b->order);
  b->part_seen = b->s->io->local ? NULL : malloc((p->nlist / 64 + 1) * sizeof *b->part_seen);
  if (!b->seeds || !b->bytes || !b->turned8 || !b->keys || !b->order || (!b->part_seen && !b->s->io->local)) return vs_nomem(err);
  if (!b->p.query.filter) return VS_OK;
  b->filter = (ivfpq_filter){.ctx = b, .eval = eval_once};
  b->bitmap = malloc((p->n_rows / 64 + p->nlist + 1) * sizeof *b->bitmap), b->has_bitmap = calloc(p->nlist + 1, 1);
  return b->bitmap && b->has_bitmap ? VS_OK : vs_nomem(err);
}

static vs_rc open_any(ivfpq_batch *b, vs_err *err) {
  const ivfpq_params *p = &b->s->params;
  if (!b->p.n || !p->n_rows || !b->p.query.n_candidates) {
    b->stage = DONE;
    return VS_OK;
  }
  if (ivfpq_is_flat(b->s) || b->p.query.brute) {
    b->p.query.vector = b->p.vectors;
    return ivfpq_scan_open(b->s, &b->p.query, NULL, b->stats, &b->flat, err); /* begins to read the rows */
  }
  vs_rc rc = allocate(b, err);
  if (!rc) rc = ivfpq_codebook_begin(b->s, b->codebook, err);
  return rc ? rc : begin_groups(b, err);
}

vs_rc ivfpq_batch_open(ivfpq_segment *s, const ivfpq_batch_plan *p, ivfpq_stats *stats, ivfpq_batch **out, vs_err *err) {
  ivfpq_batch *b = calloc(1, sizeof *b);
  *out = NULL;
  if (!b) return vs_nomem(err);
  b->s = s, b->p = *p, b->stats = stats;
  pthread_mutex_init(&b->lock, NULL);
  vs_rc rc = open_any(b, err);
  if (rc) ivfpq_batch_close(b);
  else *out = b;
  return rc;
}

vs_rc ivfpq_batch_step(ivfpq_batch *b, int *more, vs_err *err) {
  vs_rc rc = VS_OK;
  *more = 0;
  if (b->stage == DONE) return VS_OK;
  if (b->flat) {
    b->stage = DONE;
    return step_flat(b, err);
  }
  if (b->stage == RANK) {
    rc = rank(b, err);
    b->stage = PROBE;
    if (!rc && b->s->io->local) b->to = b->p.n, rc = scan(b, err), b->from = b->to;
  } else {
    rc = go_on(b, err);
    if (!rc && b->from < b->to) rc = scan_held(b, err);
  }
  if (!rc && b->to < b->p.n) rc = hold_next(b, err);
  *more = !rc && (b->from < b->to || b->n_waiting);
  if (!*more) b->stage = DONE;
  return rc;
}

void ivfpq_batch_close(ivfpq_batch *b) {
  if (!b) return;
  for (size_t i = 0; i < b->n_waiting; i++) waiting_free(b->waiting[i]);
  for (bench *w = b->benches, *next; w; w = next) next = w->link, bench_free(w);
  if (b->n_parts) ivfpq_parts_release(b->s, b->parts, b->n_parts);
  if (b->n_begun) ivfpq_groups_release(b->s, b->begun, b->n_begun);
  for (uint32_t g = 0; b->own_views && g < b->s->params.n_groups; g++)
    if (b->own_views[g].range.len) ivfpq_groups_release(b->s, &b->own_views[g], 1);
  for (int i = 0; i < 2; i++)
    if (b->codebook[i].len) vs_io_release(b->s->io, &b->codebook[i], 1);
  ivfpq_scan_close(b->flat);
  free(b->seeds), free(b->bytes), free(b->turned8), free(b->keys), free(b->order), free(b->wishes), free(b->own_views), free(b->group_list);
  free(b->begun), free(b->parts), free(b->part_seen), free(b->waiting), free(b->bitmap), free(b->has_bitmap);
  pthread_mutex_destroy(&b->lock);
  free(b);
}
