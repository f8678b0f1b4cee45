/* ivfpq_scan.c - estimates by codes; see ivfpq_search.h and the estimate in ivfpq_format.h.
 *
 * A scan, stage by stage (a step ends where reads were begun that are worth waiting for together with other segments'):
 * prepare the query; rank the centroids by 8-bit scores; make the query's table; scan the partitions, nearest
 * first, keeping the best n_candidates: the buffer is cut back by selection when full, which tightens the threshold that the
 * scan kernel rejects by.
 *
 * Ranking. The centroids are bytes, the query is rounded to bytes: what that leaves out moves a distance by about a thousandth
 * of |q|^2 (128 dims), far less than codes do, so no second look with floats is needed (measured on sets of 128 to 1,536
 * dimensions: recall equal in the third digit). Where a projection holds the centroids' energy, all of them are ranked in
 * its few dimensions and the leaders once more in full.
 *
 * When to stop. Partitions come nearest first. One that lies beyond `reach` of the k-th best estimate so far ends the scan: about half
 * of the partitions of an average query are never touched.
 *
 * A scan's memory is kept in the segment for the next scan: allocating it costs as much as ranking.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
#include "ivfpq_scan_int.h"

enum {
  SCAN_ROWS = 16 * KERN_BLOCK,  /* rows between two looks at the threshold */
  PARTS_BYTES = IVFPQ_PARTS_BYTES,
  CHUNK = 16,                   /* partitions put in order, and looked up, at once: most queries stop early */
  RESERVE = 16,                 /* projected ranks that are looked at in full before they can be due */
  FILTERED = 128                /* ranks kept beyond nprobe when a filter may want more */
};

uint32_t ivfpq_default_nprobe(uint32_t nlist) {
  double n = ceil(2 * sqrt((double)nlist)) + 16; /* small segments need a larger share */
  return (uint32_t)n;
}

static int stopped(const ivfpq_query *q) { return q->stop && q->stop(q->stop_ctx); }
static vs_rc interrupted(vs_err *err) { return vs_fail(err, VS_INTERRUPT, "interrupted"); }

static int bit(const uint64_t *bitmap, size_t i) { return bitmap[i / 64] >> i % 64 & 1; }

typedef struct ivfpq_scan_state scan;

/* Nothing is to be gained from reading many partitions at once. */
static int at_hand(const scan *c) { return c->s->io->local || c->held; }

/* ---- memory ---- */

static void scan_free(void *p) {
  scan *c = p;
  if (!c) return;
  ivfpq_table_reset(&c->table);
  free(c->order), free(c->views), free(c->place), free(c->projected), free(c->projected8), free(c->score);
  free(c->slots), free(c->rank), free(c->rank_scratch), free(c->out_row), free(c->out_sum), free(c->bitmap);
  free(c->parts), free(c->part_keys), free(c->flat), free(c->done);
  free(c);
}

static vs_rc scan_allocate(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  size_t lanes = c->s->first_lane[p->n_groups];
  vs_rc rc = ivfpq_table_allocate(p, &c->table, err);
  if (rc) return rc;
  c->order = malloc((p->n_groups + 1) * sizeof *c->order), c->place = malloc((p->n_groups + 1) * sizeof *c->place);
  c->views = calloc(p->n_groups + 1, sizeof *c->views);
  c->projected = calloc(p->project + 16, sizeof *c->projected), c->projected8 = calloc(p->project + 64, 1);
  c->score = malloc((lanes + p->project + 16) * sizeof *c->score);
  c->slots = malloc(IVFPQ_RANKING_SLOTS * sizeof *c->slots), c->rank = malloc((lanes + 32) * sizeof *c->rank);
  c->rank_scratch = malloc((2 * lanes + 3 * IVFPQ_RANKING_SLOTS) * sizeof *c->rank_scratch);
  c->out_row = malloc(SCAN_ROWS * sizeof *c->out_row), c->out_sum = malloc(SCAN_ROWS * sizeof *c->out_sum);
  c->parts_room = CHUNK;
  c->parts = malloc(c->parts_room * sizeof *c->parts), c->part_keys = malloc(c->parts_room * sizeof *c->part_keys);
  int ok = c->order && c->place && c->views && c->projected && c->projected8 && c->score && c->slots && c->rank && c->rank_scratch &&
           c->out_row && c->out_sum && c->parts && c->part_keys;
  return ok ? VS_OK : vs_nomem(err);
}

/* To the state before a scan. */
static void scan_reset(scan *c) {
  c->resident = NULL, c->elsewhere = c->held = 0;
  c->n_views = c->n_ranked = c->next = c->settled = c->scored = 0, c->cut = 0;
  c->seen = 0, c->pending = IVFPQ_NOTHING, c->has_table = c->has_done = c->probed = c->arrived = 0;
  c->n_begun = c->to_probe = c->n_parts = c->n_flat = 0;
  memset(c->codebook, 0, sizeof c->codebook);
}

scan *ivfpq_scan_take(ivfpq_segment *s) {
  scan *c = __atomic_exchange_n((scan **)&s->spare, NULL, __ATOMIC_ACQ_REL);
  if (!c && (c = calloc(1, sizeof *c))) c->s = s;
  if (c) scan_reset(c);
  return c;
}

static void scan_give_back(scan *c) {
  scan *none = NULL;
  ivfpq_segment *s = c->s;
  __atomic_store_n(&s->free_spare, scan_free, __ATOMIC_RELAXED);
  if (!__atomic_compare_exchange_n((scan **)&s->spare, &none, c, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) scan_free(c);
}

/* ---- ranking ---- */

static const ivfpq_group_view *view_of(const scan *c, uint32_t group) {
  return c->resident ? &c->resident[group] : &c->views[c->place[group]];
}

int ivfpq_ranks_all(const ivfpq_segment *s, const ivfpq_query *q) {
  return s->section[IVFPQ_GROUPS].size <= IVFPQ_ALL_GROUPS_BYTES || q->n_candidates > s->params.n_rows / 8;
}

/* All groups in their order, and how many of them to read at first. Groups are rough: on two clustered sets (1,000,000 x 128 and
 * 300,000 x 960, nprobe 20) the nearest half of the centroids holds .997 of the recall that all of them give, a quarter .96. So
 * all are read while that is cheap, the nearest half or more else. The same for files and stores: they give the same rows. */
vs_rc ivfpq_choose_groups(const ivfpq_segment *s, const ivfpq_query *q, const float *x, uint32_t *order, uint32_t *place, size_t *n,
                          vs_err *err) {
  const ivfpq_params *p = &s->params;
  uint64_t lanes = ivfpq_round(p->n_groups, 16), enough = ivfpq_enough_centroids(p->nlist, q->nprobe), have = 0;
  *n = p->n_groups;
  for (uint32_t g = 0; g < p->n_groups; g++) order[g] = place[g] = g;
  if (ivfpq_ranks_all(s, q)) return VS_OK;
  float *score = malloc(lanes * sizeof *score + 64);
  uint64_t *key = malloc(2 * (p->n_groups + 1) * sizeof *key);
  if (!score || !key) {
    free(score), free(key);
    return vs_nomem(err);
  }
  kern_get()->scores_f32(x, p->dim_padded, s->group_centroids, s->group_bias, p->n_groups, score);
  for (uint32_t g = 0; g < p->n_groups; g++) key[g] = kern_key(-score[g], g);
  kern_sort_u64(key, p->n_groups, key + p->n_groups + 1);
  *n = 0;
  for (uint32_t i = 0; i < p->n_groups; i++) {
    uint32_t g = kern_key_number(key[i]);
    order[i] = g, place[g] = i;
    if (have < enough) ++*n;
    have += s->groups[g].n;
  }
  free(score), free(key);
  return VS_OK;
}

static vs_rc choose_groups(scan *c, size_t *n, vs_err *err) {
  return ivfpq_choose_groups(c->s, c->q, c->table.x, c->order, c->place, n, err);
}

float ivfpq_project(const ivfpq_segment *s, const ivfpq_table *t, int32_t *score, float *projected, int8_t *out) {
  uint32_t n = s->params.project;
  kern_get()->scores_i8(t->bytes, 1, 0, ivfpq_coded_dim(&s->params), s->projection, n, score, 0);
  for (uint32_t u = 0; u < n; u++) projected[u] = t->step8 * s->projection_scale[u] * (float)score[u];
  return kern_get()->quantize_i8(projected, n, out);
}

size_t ivfpq_ranks_wanted(const ivfpq_segment *s, const ivfpq_query *q) {
  size_t lanes = s->first_lane[s->params.n_groups], n = q->nprobe + (s->params.project ? RESERVE : 0) + (q->filter ? FILTERED : 0);
  return n < lanes ? n : lanes;
}

void ivfpq_ranking_begin_look(ivfpq_ranking *r, size_t lanes) {
  enum { FEWEST = 128, PER_RANK = 4, PER_SLOT = 4 }; /* slots; slots per wanted lane; lanes per slot */
  r->n_slots = FEWEST, r->at = 0;
  while (r->n_slots < PER_RANK * r->want && r->n_slots < IVFPQ_RANKING_SLOTS) r->n_slots *= 2;
  if (r->n_slots < PER_RANK * r->want || lanes < PER_SLOT * r->n_slots || r->limit != UINT64_MAX) r->n_slots = 0;
  for (size_t i = 0; i < r->n_slots; i++) r->slots[i] = INFINITY;
}

void ivfpq_ranking_look(ivfpq_ranking *r, const int32_t *score, const float *scale, const float *norm2, uint32_t lanes) {
  if (!r->n_slots) return;
  kern_get()->least_i8(score, scale, norm2, lanes, -2 * r->step, r->qq, r->slots, r->n_slots, r->at);
  r->at += ivfpq_round(lanes, 16);
}

void ivfpq_ranking_end_look(ivfpq_ranking *r) {
  if (!r->n_slots) return;
  for (size_t i = 0; i < r->n_slots; i++) r->scratch[i] = kern_key(r->slots[i], UINT32_MAX);
  r->limit = kern_get()->select_u64(r->scratch, r->n_slots, r->want, r->scratch + r->n_slots);
}

void ivfpq_ranking_add(ivfpq_ranking *r, const int32_t *score, const float *scale, const float *norm2, uint32_t lanes, uint32_t first) {
  r->n += kern_get()->keys_i8(score, scale, norm2, lanes, -2 * r->step, r->qq, first, r->limit, r->key + r->n);
  if (r->n < 2 * r->want + 128) return;
  r->limit = kern_get()->select_u64(r->key, r->n, r->want, r->scratch);
  r->n = r->want;
}

void ivfpq_ranking_end(ivfpq_ranking *r) {
  if (r->n > r->want) kern_get()->select_u64(r->key, r->n, r->want, r->scratch), r->n = r->want;
}

/* How many lanes lie side by side from those of the i-th group of c->order on; *next: the group behind them. */
static uint32_t lanes_together(const scan *c, size_t i, size_t end, size_t *next) {
  const uint32_t *first_lane = c->s->first_lane;
  const ivfpq_group_view *v = view_of(c, c->order[i]);
  uint32_t first = first_lane[c->order[i]], lanes = first_lane[c->order[i] + 1] - first;
  for (*next = i + 1; *next < end; ++*next) {
    uint32_t g = c->order[*next];
    const ivfpq_group_view *w = view_of(c, g);
    if (first_lane[g] != first + lanes || w->scale != v->scale + lanes || w->norm2 != v->norm2 + lanes) break;
    lanes += first_lane[g + 1] - first_lane[g];
  }
  return lanes;
}

/* Ranks n groups of c->order, from the at-th on, behind what is ranked already; keeps the nearest `want`. */
static void rank_groups(scan *c, size_t at, size_t n, size_t want) {
  const ivfpq_params *p = &c->s->params;
  uint32_t width = p->project ? p->project : ivfpq_coded_dim(p);
  float step = p->project ? ivfpq_project(c->s, &c->table, c->score, c->projected, c->projected8) : c->table.step8;
  const int8_t *q = p->project ? c->projected8 : c->table.bytes;
  const uint32_t *first_lane = c->s->first_lane;
  ivfpq_ranking r = {.key = c->rank + c->next, .scratch = c->rank_scratch, .n = c->n_ranked - c->next, .want = want, .step = step,
                     .qq = c->table.qq, .limit = UINT64_MAX, .slots = c->slots};
  size_t seen = r.n;
  for (size_t i = at; i < at + n; i++) seen += first_lane[c->order[i] + 1] - first_lane[c->order[i]];
  ivfpq_ranking_begin_look(&r, seen - r.n);
  for (size_t i = at; i < at + n; i++) {
    uint32_t g = c->order[i];
    const ivfpq_group_view *v = view_of(c, g);
    kern_get()->scores_i8(q, 1, 0, width, v->packed, v->n, c->score + first_lane[g], 0);
  }
  for (size_t i = at, next; i < at + n; i = next) {
    const ivfpq_group_view *v = view_of(c, c->order[i]);
    ivfpq_ranking_look(&r, c->score + first_lane[c->order[i]], v->scale, v->norm2, lanes_together(c, i, at + n, &next));
  }
  ivfpq_ranking_end_look(&r);
  for (size_t i = at, next; i < at + n; i = next) {
    const ivfpq_group_view *v = view_of(c, c->order[i]);
    uint32_t first = first_lane[c->order[i]];
    ivfpq_ranking_add(&r, c->score + first, v->scale, v->norm2, lanes_together(c, i, at + n, &next), first);
  }
  ivfpq_ranking_end(&r);
  c->n_ranked = c->next + r.n;
  if (r.n < seen) c->cut = 1;
}

/* Full distances of the projected leaders, rank[from, to). */
static void rank_again(scan *c, size_t from, size_t to) {
  const ivfpq_params *p = &c->s->params;
  const kern *k = kern_get();
  uint32_t width = ivfpq_coded_dim(p);
  for (size_t i = from; i < to; i++) {
    uint32_t lane = kern_key_number(c->rank[i]), g = c->s->lane_group[lane], in = lane - c->s->first_lane[g];
    const ivfpq_group_view *v = view_of(c, g);
    if (i + 2 < to) {
      uint32_t next = kern_key_number(c->rank[i + 2]), ng = c->s->lane_group[next];
      const ivfpq_group_view *nv = view_of(c, ng);
      if (next - c->s->first_lane[ng] < nv->n)
        for (uint32_t z = 0; z < width; z += 64) __builtin_prefetch(nv->rows + (size_t)(next - c->s->first_lane[ng]) * width + z);
    }
    if (in >= v->n) continue;
    float product = c->table.step8 * v->row_scale[in] * (float)k->dot_i8(c->table.bytes, v->rows + (size_t)in * width, width);
    c->rank[i] = kern_key(v->norm2[in] + c->table.qq - 2 * product, lane);
  }
}

static vs_rc begin_ranking(scan *c, vs_err *err) {
  size_t n;
  vs_rc rc = ivfpq_resident(c->s, &c->resident, err);
  if (!rc) rc = choose_groups(c, &n, err);
  if (!rc && !c->resident) rc = ivfpq_groups_begin(c->s, c->order, n, c->views, err);
  if (!rc) c->pending = IVFPQ_GROUPS_COME, c->n_begun = n;
  return rc;
}

/* What was ranked elsewhere has to be known here to go on: which groups that were. */
static vs_rc know_groups(scan *c, vs_err *err) {
  if (!c->elsewhere) return VS_OK;
  ivfpq_table_query(c->s, c->q->vector, &c->table);
  vs_rc rc = choose_groups(c, &c->n_views, err);
  if (!rc && c->s->resident != c->resident) rc = ivfpq_groups_fetch(c->s, c->order, c->n_views, c->views, err);
  if (rc) c->n_views = 0;
  else if (c->s->resident != c->resident) c->resident = NULL;
  c->elsewhere = 0;
  return rc;
}

/* A strict filter may use up the groups that were chosen: twice as many then. */
static vs_rc begin_more_groups(scan *c, vs_err *err) {
  vs_rc rc = know_groups(c, err);
  if (rc) return rc;
  size_t left = c->s->params.n_groups - c->n_views, n = left < c->n_views ? left : c->n_views;
  rc = c->resident ? VS_OK : ivfpq_groups_begin(c->s, c->order + c->n_views, n, c->views + c->n_views, err);
  if (!rc) c->pending = IVFPQ_GROUPS_COME, c->n_begun = n;
  return rc;
}

/* What was cut off is ranked after all, without what was probed. */
static vs_rc rank_rest(scan *c, vs_err *err) {
  uint32_t lanes = c->s->first_lane[c->s->params.n_groups];
  vs_rc rc = know_groups(c, err);
  if (rc) return rc;
  if (!c->done && !(c->done = malloc((lanes / 64 + 1) * sizeof *c->done))) return vs_nomem(err);
  if (!c->has_done) memset(c->done, 0, (lanes / 64 + 1) * sizeof *c->done);
  c->has_done = 1;
  for (size_t i = 0; i < c->next; i++) c->done[kern_key_number(c->rank[i]) / 64] |= 1ull << kern_key_number(c->rank[i]) % 64;
  c->n_ranked = c->next = c->settled = c->scored = 0, c->cut = 0;
  rank_groups(c, 0, c->n_views, lanes);
  size_t n = 0;
  for (size_t i = 0; i < c->n_ranked; i++)
    if (!bit(c->done, kern_key_number(c->rank[i]))) c->rank[n++] = c->rank[i];
  c->n_ranked = n;
  return VS_OK;
}

/* Puts a chunk more in order. Projected ranks are rough: a partition is due only when it is the nearest of a few more that were
 * looked at in full. In chunks of one size everywhere, so that files and stores come to the same order. */
static void settle_chunk(scan *c) {
  const kern *k = kern_get();
  int rough = c->s->params.project != 0;
  size_t left = c->n_ranked - c->scored, n = CHUNK + (rough && c->scored == c->settled ? RESERVE : 0);
  if (n > left) n = left;
  if (n < left) k->select_u64(c->rank + c->scored, left, n, c->rank_scratch);
  if (rough) rank_again(c, c->scored, c->scored + n);
  c->scored += n;
  kern_sort_u64(c->rank + c->settled, c->scored - c->settled, c->rank_scratch);
  c->settled = rough && c->scored < c->n_ranked ? c->settled + CHUNK : c->scored;
}

/* The next m partitions, nearest first; sorts only what is reached. */
static size_t next_ranked(scan *c, size_t m, const uint64_t **keys) {
  while (c->settled - c->next < m && c->settled < c->n_ranked) settle_chunk(c);
  if (m > c->settled - c->next) m = c->settled - c->next;
  *keys = c->rank + c->next;
  c->next += m;
  return m;
}

/* ---- scanning ---- */

/* Sums below this can enter the result; 65536: all. */
static uint32_t threshold_of(const scan *c, float base) {
  if (c->worst == UINT64_MAX) return 65536;
  float units = (kern_key_value(c->worst) - base) / c->table.step;
  if (!(units >= 0)) return units < 0 ? 0 : 65536;
  return units >= 65534 ? 65536 : (uint32_t)units + 1;
}

/* Worth cutting: selection is linear, so it pays once the buffer has about twice what is wanted. */
static void cut_when_full(scan *c) {
  uint64_t want = c->q->n_candidates;
  if (c->out->n < want + (want > 256 ? want : 256)) return;
  uint64_t kth = c->worst = ivfpq_keys_cut(c->out, want);
  if (!(c->q->reach > 0)) return;
  if (c->q->k < want) {
    memcpy(c->out->scratch, c->out->key, want * sizeof *c->out->key);
    kth = kern_get()->select_u64(c->out->scratch, want, c->q->k, c->out->scratch + want);
  }
  c->limit = ivfpq_table_reach(c->s, &c->table, c->q->reach, kern_key_value(kth));
}

static vs_rc take_survivors(scan *c, size_t n, uint32_t first_row, const uint64_t *bitmap, uint32_t at, float base, vs_err *err) {
  if (!n) return VS_OK;
  vs_rc rc = ivfpq_keys_room(c->out, c->out->n + n + 16, err);
  if (rc) return rc;
  if (bitmap) {
    size_t m = 0;
    for (size_t i = 0; i < n; i++)
      if (bit(bitmap, at + c->out_row[i])) c->out_row[m] = c->out_row[i], c->out_sum[m++] = c->out_sum[i];
    n = m;
  }
  kern_get()->keys_u16(c->out_sum, c->out_row, n, base, c->table.step, first_row + at, c->out->key + c->out->n);
  c->out->n += n;
  cut_when_full(c);
  return VS_OK;
}

static vs_rc eval_filter(scan *c, const ivfpq_part *part, vs_err *err) {
  uint32_t n = part->entry.n_rows;
  memset(c->bitmap, 0, ivfpq_round(n, 64) / 8);
  vs_rc rc = c->q->filter->eval(c->q->filter->ctx, c->s, part, c->bitmap, err);
  for (uint32_t i = 0; i < n && !rc; i += 64) c->seen += (uint64_t)__builtin_popcountll(c->bitmap[i / 64]);
  return rc;
}

/* next: the part to be scanned after this one, or NULL. */
static vs_rc scan_part(scan *c, const ivfpq_part *part, const ivfpq_part *next, float coarse, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  uint32_t n = part->entry.n_rows;
  float base = ivfpq_table_base(c->s, &c->table, coarse);
  const uint64_t *bitmap = NULL;
  vs_rc rc = VS_OK;
  uint64_t seen = c->seen;
  if (c->q->filter) {
    rc = eval_filter(c, part, err);
    if (rc || c->seen == seen) return rc;
    bitmap = c->bitmap;
  } else c->seen += n;
  c->stats->partitions++, c->stats->rows += n;
  if (c->q->visit && c->q->visit(c->q->visit_ctx, part, coarse)) c->arrived = 1;
  for (uint32_t at = 0; at < n && !rc; at += SCAN_ROWS) {
    uint32_t m = n - at < SCAN_ROWS ? n - at : SCAN_ROWS, threshold = threshold_of(c, base);
    if (!threshold) break;
    const uint8_t *soon = next && at < next->entry.n_rows ? next->codes + (size_t)at * p->m : NULL;
    size_t hits = kern_get()->pq_scan(part->codes + (size_t)at * p->m, p->m, part->terms + at, m, c->table.table, c->table.term_mul,
                                      threshold, soon, c->out_row, c->out_sum);
    rc = take_survivors(c, hits, (uint32_t)part->entry.row0, bitmap, at, base, err);
  }
  return rc;
}

static int seen_enough(const scan *c) {
  uint64_t rows = c->s->params.n_rows;
  return c->seen >= (c->q->n_candidates < rows ? c->q->n_candidates : rows);
}

/* Does this partition, and so every later one, lie out of reach? */
static int out_of_reach(const scan *c, float coarse) {
  return coarse > c->limit && seen_enough(c);
}

static vs_rc parts_room(scan *c, size_t n, vs_err *err) {
  if (n <= c->parts_room) return VS_OK;
  free(c->parts), free(c->part_keys);
  c->parts = malloc(n * sizeof *c->parts), c->part_keys = malloc(n * sizeof *c->part_keys);
  c->parts_room = c->parts && c->part_keys ? n : 0;
  return c->parts_room ? VS_OK : vs_nomem(err);
}

/* Starts reading the nearest of the partitions that are still to be probed: all of them, or as many as may be held at once. */
static vs_rc begin_parts(scan *c, vs_err *err) {
  const uint64_t *keys;
  size_t want = at_hand(c) && c->to_probe > CHUNK ? CHUNK : c->to_probe;
  size_t n = next_ranked(c, want, &keys), m = 0, taken = 0;
  int what = IVFPQ_WANT_CODES | (c->q->filter ? IVFPQ_WANT_COLUMNS : 0);
  uint64_t bytes = 0;
  vs_rc rc = parts_room(c, n, err);
  if (rc) return rc;
  for (size_t i = 0; i < n; i++) { /* each lies in a cache line of its own */
    uint32_t lane = kern_key_number(keys[i]), g = c->s->lane_group[lane];
    __builtin_prefetch(view_of(c, g)->entries + (lane - c->s->first_lane[g]));
  }
  for (; taken < n && (m < 1 || bytes < PARTS_BYTES); taken++) {
    uint32_t lane = kern_key_number(keys[taken]), g = c->s->lane_group[lane], at = lane - c->s->first_lane[g];
    const ivfpq_group_view *v = view_of(c, g);
    if (at >= v->n) continue; /* padding: these rank last */
    c->parts[m].number = v->first + at, c->parts[m].entry = v->entries[at];
    c->part_keys[m++] = keys[taken];
    bytes += ivfpq_code_bytes(v->entries[at].n_rows, c->s->params.m) + v->entries[at].column_bytes;
  }
  c->next -= n - taken; /* they stay sorted */
  c->to_probe = c->next < c->n_ranked && taken < c->to_probe ? c->to_probe - taken : 0;
  rc = ivfpq_parts_begin(c->s, what, c->parts, m, err);
  if (!rc) c->pending = IVFPQ_PARTS_COME, c->n_parts = m;
  return rc;
}

static vs_rc scan_parts(scan *c, vs_err *err) {
  size_t n = c->n_parts;
  c->pending = IVFPQ_NOTHING, c->n_parts = 0;
  vs_rc rc = ivfpq_parts_wait(c->s, c->parts, n, err);
  if (rc) return rc;
  if (!c->has_table) ivfpq_table_make(c->s, &c->table), c->has_table = 1;
  for (size_t i = 0; i < n && !rc; i++) {
    float coarse = kern_key_value(c->part_keys[i]);
    if (out_of_reach(c, coarse)) {
      c->arrived = 1;
      break;
    }
    rc = scan_part(c, &c->parts[i], i + 1 < n ? &c->parts[i + 1] : NULL, coarse, err);
    if (c->arrived) break;
  }
  if (!rc && stopped(c->q)) rc = interrupted(err);
  ivfpq_parts_release(c->s, c->parts, n);
  return rc;
}

/* Once the first groups and the codebook are there. */
static vs_rc finish_ranking(scan *c, vs_err *err) {
  size_t n = c->n_begun;
  c->pending = IVFPQ_NOTHING, c->n_begun = 0;
  vs_rc rc = c->resident ? VS_OK : ivfpq_groups_wait(c->s, c->views + c->n_views, n, err);
  int held = !rc && !c->resident;
  if (!rc && c->codebook[0].len) {
    rc = ivfpq_codebook_wait(c->s, c->codebook, err);
    memset(c->codebook, 0, sizeof c->codebook);
  }
  if (rc) {
    if (held) ivfpq_groups_release(c->s, c->views + c->n_views, n);
    if (!c->resident) memset(c->views + c->n_views, 0, n * sizeof *c->views);
    return rc;
  }
  rank_groups(c, c->n_views, n, ivfpq_ranks_wanted(c->s, c->q));
  c->n_views += n;
  return VS_OK;
}

/* What to read next: the rest of this round, more partitions while the filter let too few rows through, more groups; nothing
 * (pending stays IVFPQ_NOTHING) when enough was seen. */
static vs_rc begin_next(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  if (c->arrived) return VS_OK;
  if (!c->to_probe && !c->probed) c->to_probe = c->q->nprobe;
  else if (!c->to_probe && !seen_enough(c)) c->to_probe = c->q->nprobe < 64 ? 64 : c->q->nprobe, c->held = 0;
  c->probed = 1;
  if (c->to_probe && c->next < c->n_ranked) return begin_parts(c, err);
  if (seen_enough(c)) return VS_OK;
  if (c->cut) {
    vs_rc rc = rank_rest(c, err);
    c->to_probe = c->q->nprobe < 64 ? 64 : c->q->nprobe, c->held = 0;
    return rc ? rc : begin_parts(c, err);
  }
  c->to_probe = 0;
  return c->n_views < p->n_groups ? begin_more_groups(c, err) : VS_OK;
}

static vs_rc step_coded(scan *c, int *more, vs_err *err) {
  vs_rc rc = VS_OK;
  do {
    rc = c->pending == IVFPQ_GROUPS_COME ? finish_ranking(c, err) : c->pending == IVFPQ_PARTS_COME ? scan_parts(c, err) : VS_OK;
    if (!rc) rc = begin_next(c, err);
  } while (!rc && c->pending != IVFPQ_NOTHING && at_hand(c));
  *more = !rc && c->pending != IVFPQ_NOTHING;
  if (!rc && !*more) ivfpq_keys_cut(c->out, c->q->n_candidates);
  return rc;
}

static vs_rc ready_memory(scan *c, vs_err *err) {
  vs_rc rc = c->rank ? VS_OK : scan_allocate(c, err);
  if (!rc && c->q->filter && !c->bitmap && !(c->bitmap = malloc(IVFPQ_MAX_PARTITION / 8 + 64))) rc = vs_nomem(err);
  return rc;
}

static vs_rc open_coded(scan *c, vs_err *err) {
  vs_rc rc = ready_memory(c, err);
  if (rc) return rc;
  ivfpq_table_query(c->s, c->q->vector, &c->table);
  rc = ivfpq_codebook_begin(c->s, c->codebook, err);
  return rc ? rc : begin_ranking(c, err);
}

/* Are its estimates true distances, on the scale of the others? A flat segment has no codes. */
static int compares_vectors(const scan *c) { return ivfpq_is_flat(c->s) || c->q->brute; }

/* The rows of a flat segment are read ahead in the stretches that ivfpq_exact will ask for. */
static vs_rc open_flat(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  uint32_t stretch = ivfpq_stretch_rows(p);
  if (c->s->io->local) return VS_OK;
  c->n_flat = (p->n_rows + stretch - 1) / stretch;
  if (!c->flat && !(c->flat = calloc(c->n_flat + 1, sizeof *c->flat))) {
    c->n_flat = 0;
    return vs_nomem(err);
  }
  for (size_t i = 0; i < c->n_flat; i++) {
    uint64_t first = i * (uint64_t)stretch, n = p->n_rows - first < stretch ? p->n_rows - first : stretch;
    c->flat[i] = (vs_range){.off = c->s->section[IVFPQ_ROWS].off + first * p->row_bytes, .len = n * p->row_bytes};
  }
  vs_rc rc = vs_io_begin(c->s->io, c->flat, c->n_flat, err);
  if (rc) c->n_flat = 0;
  return rc;
}

void ivfpq_flat_estimates(const ivfpq_segment *s, ivfpq_keys *k) {
  for (size_t i = 0; i < k->n; i++) {
    float d = kern_key_value(k->key[i]);
    k->key[i] = kern_key(s->params.metric == IVFPQ_L2 ? d * d : 2 * d, kern_key_number(k->key[i]));
  }
}

static vs_rc step_flat(scan *c, vs_err *err) {
  vs_rc rc = ivfpq_exact(c->s, c->q, NULL, c->q->brute ? c->q->threads : 1, c->out, c->stats, err);
  if (!rc) ivfpq_flat_estimates(c->s, c->out);
  return rc;
}

/* Gives back what was read or begun. */
static void scan_release(scan *c) {
  if (c->pending == IVFPQ_PARTS_COME) ivfpq_parts_release(c->s, c->parts, c->n_parts);
  if (c->views && !c->resident) ivfpq_groups_release(c->s, c->views, c->n_views + c->n_begun);
  for (int i = 0; i < 2; i++)
    if (c->codebook[i].len) vs_io_release(c->s->io, &c->codebook[i], 1);
  if (c->n_flat) vs_io_release(c->s->io, c->flat, c->n_flat);
}

static void scan_begin(scan *c, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats) {
  c->q = q, c->out = out, c->stats = stats, c->worst = UINT64_MAX, c->limit = INFINITY;
}

vs_rc ivfpq_scan_ranked(scan *c, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, const ivfpq_ranked *r, vs_err *err) {
  scan_release(c);
  scan_reset(c);
  scan_begin(c, q, out, stats);
  vs_rc rc = ready_memory(c, err);
  if (rc) return rc;
  c->resident = r->views, c->elsewhere = 1, c->held = 1;
  memcpy(c->table.bytes, r->bytes, ivfpq_coded_dim(&c->s->params));
  if (c->s->params.turn) memcpy(c->table.turned8, r->turned8, c->s->params.turn);
  c->table.step8 = r->step8, c->table.turned_step = r->turned_step, c->table.qq = r->qq, c->table.constant = r->constant, c->table.term_scale = r->term_scale;
  memcpy(c->rank, r->key, r->n * sizeof *r->key);
  c->n_ranked = r->n, c->cut = r->cut, c->n_views = r->n_groups;
  return VS_OK;
}

size_t ivfpq_scan_first(scan *c, size_t n, const uint64_t **keys) { return next_ranked(c, n, keys); }

vs_rc ivfpq_scan_open(ivfpq_segment *s, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, ivfpq_scan_state **scan_out,
                      vs_err *err) {
  scan *c = ivfpq_scan_take(s);
  *scan_out = c;
  if (!c) return vs_nomem(err);
  scan_begin(c, q, out, stats);
  if (!s->params.n_rows || !q->n_candidates) return VS_OK;
  vs_rc rc = ivfpq_is_flat(s) ? open_flat(c, err) : q->brute ? VS_OK : open_coded(c, err);
  if (rc) ivfpq_scan_close(c), *scan_out = NULL;
  return rc;
}

vs_rc ivfpq_scan_step(ivfpq_scan_state *c, int *more, vs_err *err) {
  *more = 0;
  if (!c->s->params.n_rows || !c->q->n_candidates) return VS_OK;
  return compares_vectors(c) ? step_flat(c, err) : step_coded(c, more, err);
}

void ivfpq_scan_close(ivfpq_scan_state *c) {
  if (!c) return;
  scan_release(c);
  if (c->rank || c->flat) scan_give_back(c);
  else scan_free(c);
}

vs_rc ivfpq_scan(ivfpq_segment *s, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, vs_err *err) {
  ivfpq_scan_state *c;
  int more = 1;
  vs_rc rc = ivfpq_scan_open(s, q, out, stats, &c, err);
  while (!rc && more) rc = ivfpq_scan_step(c, &more, err);
  ivfpq_scan_close(c);
  return rc;
}
