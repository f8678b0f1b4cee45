/* ivfpq_search.c - searching one segment; see ivfpq_search.h and the estimate in ivfpq_format.h.
 *
 * A scan, stage by stage (a step ends where reads were begun that are worth waiting for together with other segments'):
 * prepare the query; rank centroids (group by group); one table for the query, in 8-bit steps
 * that all sub-quantizers share, so that sums compare; scan the partitions, nearest first, keeping the best n_candidates:
 * the buffer is cut back by selection when full, which tightens the threshold that the scan kernel rejects by.
 *
 * The step is the widest table range / 255 (finer gains nothing, coarser loses recall), but wide enough that a sum of table
 * entries and row term stays below 2^16, so that sums never saturate.
 */
#include "ivfpq_search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"

enum {
  SCAN_ROWS = 16 * KERN_BLOCK,  /* rows between two looks at the threshold */
  STRETCH_BYTES = 16 << 20,     /* of stored vectors between two looks at `stop` in a brute-force search */
  EXACT_SLICE = 512,            /* rows per task */
  ROWS_PER_ROUND = 4096,
  PARTS_BYTES = 64 << 20,       /* of partitions held at once */
  ALL_GROUPS_BYTES = 32 << 20   /* centroids: up to here all are ranked */
};

uint32_t ivfpq_default_nprobe(uint32_t nlist) {
  double n = ceil(2 * sqrt((double)nlist)) + 16; /* small segments need a larger share */
  return (uint32_t)n;
}

void ivfpq_keys_reset(ivfpq_keys *k) {
  free(k->key), free(k->scratch);
  memset(k, 0, sizeof *k);
}

static vs_rc keys_room(ivfpq_keys *k, size_t room, vs_err *err) {
  if (room <= k->room) return VS_OK;
  size_t grown = k->room * 2 > room ? k->room * 2 : room;
  uint64_t *key = realloc(k->key, grown * sizeof *key);
  if (!key) return vs_nomem(err);
  k->key = key;
  uint64_t *scratch = realloc(k->scratch, (2 * grown + 32) * sizeof *scratch);
  if (!scratch) return vs_nomem(err);
  k->scratch = scratch, k->room = grown;
  return VS_OK;
}

/* Keeps the best `want`; returns the worst key kept, or UINT64_MAX while there are fewer. */
static uint64_t keys_cut(ivfpq_keys *k, uint64_t want) {
  if (k->n < want || !want) return UINT64_MAX;
  uint64_t worst = kern_get()->select_u64(k->key, k->n, (size_t)want, k->scratch);
  k->n = (size_t)want;
  return worst;
}
/* Worth cutting: selection is linear, so it pays once the buffer has twice what is wanted. */
static int keys_full(const ivfpq_keys *k, uint64_t want) { return k->n >= 2 * want + 1024; }

static int stopped(const ivfpq_query *q) { return q->stop && q->stop(q->stop_ctx); }
static vs_rc interrupted(vs_err *err) { return vs_fail(err, VS_INTERRUPT, "interrupted"); }

/* Rows of one stretch of a brute-force search. */
static uint32_t stretch_rows(const ivfpq_params *p) { return STRETCH_BYTES / p->row_bytes + EXACT_SLICE; }

static int bit(const uint64_t *bitmap, size_t i) { return bitmap[i / 64] >> i % 64 & 1; }

/* ---- the query, prepared ---- */

typedef struct ranked { uint32_t view, at; } ranked;

/* What was begun and not yet worked on. */
typedef enum pending { NOTHING, GROUPS, PARTS } pending;

typedef struct ivfpq_scan_state scan;
struct ivfpq_scan_state {
  ivfpq_segment *s;
  const ivfpq_query *q;
  ivfpq_keys *out;
  ivfpq_stats *stats;
  float *x;            /* query in the model's space, dim_padded */
  float qq, constant;  /* |x|^2 for l2 and cosine; what dot adds for the mean */
  float term_scale;    /* what stored terms are multiplied with: 1, for dot |query - mean| */
  float *tablef;
  uint8_t *table;
  float min_sum, step;
  uint16_t term_mul;
  /* coarse ranking: groups read, keys of (distance, index into ref) */
  uint32_t *order;     /* all groups; the first n_views of them are read */
  ivfpq_group_view *views;
  size_t n_views;
  ranked *ref;         /* per ranked partition: where its entry lies */
  uint64_t *rank, *rank_scratch;
  size_t n_ranked, next;
  uint64_t seen;       /* rows that pass the filter */
  uint64_t worst;      /* key; UINT64_MAX while the buffer is not full */
  uint32_t *out_row;
  uint16_t *out_sum;
  uint64_t *bitmap;
  /* reads under way */
  pending pending;
  int has_table, probed;
  vs_range codebook;
  size_t n_begun;      /* GROUPS: views behind n_views */
  size_t to_probe;     /* partitions of this round that are not begun yet */
  ivfpq_part *parts;   /* PARTS */
  uint64_t *part_keys;
  size_t n_parts;
  vs_range *flat;      /* a flat segment's rows, stretch by stretch */
  size_t n_flat;
};

static void prepare_query(scan *c) {
  const ivfpq_params *p = &c->s->params;
  const kern *k = kern_get();
  float scale = 1;
  const float *v = c->q->vector;
  if (p->metric == IVFPQ_COSINE) {
    double s = 0;
    for (uint32_t j = 0; j < p->dim; j++) s += (double)v[j] * v[j];
    scale = s > 0 ? (float)(1 / sqrt(s)) : 0;
  }
  for (uint32_t j = 0; j < p->dim_padded; j++) c->x[j] = j < p->dim ? v[j] * scale : 0;
  if (p->metric == IVFPQ_DOT) {
    c->constant = -2 * k->dot_f32(c->x, c->s->mean, p->dim);
    c->term_scale = sqrtf(k->l2sq_f32(c->x, c->s->mean, p->dim));
  } else {
    c->term_scale = 1;
    for (uint32_t j = 0; j < p->dim; j++) c->x[j] -= c->s->mean[j];
    c->qq = k->dot_f32(c->x, c->x, p->dim);
  }
}

/* ---- ranking ---- */

/* All groups into c->order, and how many of them to read at first. Groups are rough: on two clustered sets (1,000,000 x 128 and
 * 300,000 x 960, nprobe 20) the nearest half of the centroids holds .997 of the recall that all of them give, a quarter .96. So
 * all are read while that is cheap, the nearest half or more else. The same for files and stores: they give the same rows. */
static vs_rc choose_groups(scan *c, size_t *n, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  uint64_t lanes = ivfpq_round(p->n_groups, 16), enough = (uint64_t)c->q->nprobe * 32 + 64, have = 0;
  int all = c->s->section[IVFPQ_GROUPS].size <= ALL_GROUPS_BYTES || c->q->n_candidates > p->n_rows / 8;
  float *score = malloc(lanes * sizeof *score + 64);
  uint64_t *key = malloc(2 * (p->n_groups + 1) * sizeof *key);
  *n = 0;
  if (!score || !key) {
    free(score), free(key);
    return vs_nomem(err);
  }
  if (!all) kern_get()->scores_f32(c->x, p->dim_padded, c->s->group_centroids, c->s->group_bias, p->n_groups, score);
  for (uint32_t g = 0; g < p->n_groups; g++) key[g] = all ? g : kern_key(-score[g], g);
  if (!all) kern_sort_u64(key, p->n_groups, key + p->n_groups + 1);
  if (enough < p->nlist / 2) enough = p->nlist / 2;
  for (uint32_t g = 0; g < p->n_groups; g++) {
    c->order[g] = all ? g : kern_key_number(key[g]);
    if (all || have < enough) ++*n;
    have += c->s->groups[c->order[g]].n;
  }
  free(score), free(key);
  return VS_OK;
}

/* Starts reading the next n groups of c->order. */
static vs_rc begin_groups(scan *c, size_t n, vs_err *err) {
  vs_rc rc = ivfpq_groups_begin(c->s, c->order + c->n_views, n, c->views + c->n_views, err);
  if (!rc) c->pending = GROUPS, c->n_begun = n;
  return rc;
}

/* Ranks the partitions of the groups that were begun, behind those that are ranked already. */
static vs_rc rank_groups(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  const uint32_t *groups = c->order + c->n_views;
  size_t n = c->n_begun;
  uint32_t widest = 0;
  c->pending = NOTHING, c->n_begun = 0;
  vs_rc rc = ivfpq_groups_wait(c->s, c->views + c->n_views, n, err);
  if (rc) return rc;
  for (size_t g = 0; g < n; g++)
    if (c->s->groups[groups[g]].n > widest) widest = c->s->groups[groups[g]].n;
  float *score = malloc((widest + 16) * sizeof *score);
  for (size_t end = c->n_views + n; c->n_views < end; c->n_views++) {
    const ivfpq_group_view *v = &c->views[c->n_views];
    if (!score) continue;
    kern_get()->scores_f32(c->x, p->dim_padded, v->centroids, v->bias, v->n, score);
    for (uint32_t i = 0; i < v->n; i++) {
      c->ref[c->n_ranked] = (ranked){(uint32_t)c->n_views, i};
      c->rank[c->n_ranked] = kern_key(c->qq - 2 * score[i], (uint32_t)c->n_ranked);
      c->n_ranked++;
    }
  }
  free(score);
  return score ? VS_OK : vs_nomem(err);
}

static vs_rc begin_ranking(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  size_t n;
  c->order = malloc((p->n_groups + 1) * sizeof *c->order);
  c->views = calloc(p->n_groups + 1, sizeof *c->views);
  c->ref = malloc(((size_t)p->nlist + 1) * sizeof *c->ref);
  c->rank = malloc(((size_t)p->nlist + 1) * sizeof *c->rank);
  c->rank_scratch = malloc((2 * (size_t)p->nlist + 32) * sizeof *c->rank_scratch);
  if (!c->order || !c->views || !c->ref || !c->rank || !c->rank_scratch) return vs_nomem(err);
  vs_rc rc = choose_groups(c, &n, err);
  return rc ? rc : begin_groups(c, n, err);
}

/* A strict filter may use up the groups that were chosen: twice as many then. */
static vs_rc begin_more_groups(scan *c, vs_err *err) {
  size_t left = c->s->params.n_groups - c->n_views;
  return begin_groups(c, left < c->n_views ? left : c->n_views, err);
}

/* The next m partitions, nearest first; sorts only what is reached. */
static size_t next_ranked(scan *c, size_t m, const uint64_t **keys) {
  size_t left = c->n_ranked - c->next;
  if (m > left) m = left;
  if (m < left) kern_get()->select_u64(c->rank + c->next, left, m, c->rank_scratch);
  kern_sort_u64(c->rank + c->next, m, c->rank_scratch);
  *keys = c->rank + c->next;
  c->next += m;
  return m;
}

/* ---- the table ---- */

static void table_floats(scan *c) {
  const ivfpq_params *p = &c->s->params;
  uint32_t words = ivfpq_words(p->bits), subs = ivfpq_subs(p->m, p->bits);
  static const float no_bias[256];
  const float *codebook = ivfpq_codebook(c->s);
  float t[2][256];
  for (uint32_t j = 0; j < p->m; j++) {
    float *row = c->tablef + (size_t)j * 256;
    for (uint32_t h = 0; h < subs / p->m; h++) {
      uint32_t sub = j * (subs / p->m) + h;
      kern_get()->scores_f32(c->x + (size_t)sub * p->sub_dim, p->sub_dim, codebook + (size_t)sub * words * p->sub_dim, no_bias,
                             words, t[h]);
    }
    if (p->bits == 8)
      for (int i = 0; i < 256; i++) row[i] = -2 * t[0][i];
    else
      for (int i = 0; i < 256; i++) row[i] = -2 * (t[0][i & 15] + t[1][i >> 4]);
  }
}

static void build_table(scan *c) {
  const ivfpq_params *p = &c->s->params;
  float range = 0, low[IVFPQ_MAX_M], term_range = 65535 * p->term_step * c->term_scale;
  table_floats(c);
  c->min_sum = 0;
  for (uint32_t j = 0; j < p->m; j++) {
    const float *row = c->tablef + (size_t)j * 256;
    float lo = row[0], hi = row[0];
    for (int i = 1; i < 256; i++) lo = row[i] < lo ? row[i] : lo, hi = row[i] > hi ? row[i] : hi;
    low[j] = lo, c->min_sum += lo;
    if (hi - lo > range) range = hi - lo;
  }
  c->step = range / 255;
  if (c->step < term_range / (float)(65535 - 255 * p->m)) c->step = term_range / (float)(65535 - 255 * p->m);
  if (!(c->step > 1e-30f)) c->step = 1e-30f;
  float inv = 1 / c->step, mul = p->term_step * c->term_scale * inv * 65536;
  c->term_mul = mul >= 65535 ? 65535 : (uint16_t)lrintf(mul);
  for (uint32_t j = 0; j < p->m; j++)
    for (int i = 0; i < 256; i++) {
      float v = (c->tablef[(size_t)j * 256 + i] - low[j]) * inv + 0.5f;
      c->table[(size_t)j * 256 + i] = v >= 255 ? 255 : v > 0 ? (uint8_t)v : 0;
    }
}

/* ---- scanning ---- */

/* Sums below this can enter the result; 65536: all. */
static uint32_t threshold_of(const scan *c, float base) {
  if (c->worst == UINT64_MAX) return 65536;
  float units = (kern_key_value(c->worst) - base) / c->step;
  if (!(units >= 0)) return units < 0 ? 0 : 65536;
  return units >= 65534 ? 65536 : (uint32_t)units + 1;
}

static vs_rc take_survivors(scan *c, size_t n, uint32_t first_row, const uint64_t *bitmap, uint32_t at, float base, vs_err *err) {
  vs_rc rc = keys_room(c->out, c->out->n + n, err);
  if (rc) return rc;
  for (size_t i = 0; i < n; i++) {
    if (bitmap && !bit(bitmap, at + c->out_row[i])) continue;
    c->out->key[c->out->n++] = kern_key(base + c->step * c->out_sum[i], first_row + at + c->out_row[i]);
  }
  if (keys_full(c->out, c->q->n_candidates)) c->worst = keys_cut(c->out, c->q->n_candidates);
  return VS_OK;
}

static vs_rc eval_filter(scan *c, const ivfpq_part *part, vs_err *err) {
  uint32_t n = part->entry.n_rows;
  memset(c->bitmap, 0, ivfpq_round(n, 64) / 8);
  vs_rc rc = c->q->filter->eval(c->q->filter->ctx, c->s, part, c->bitmap, err);
  for (uint32_t i = 0; i < n && !rc; i += 64) c->seen += (uint64_t)__builtin_popcountll(c->bitmap[i / 64]);
  return rc;
}

static vs_rc scan_part(scan *c, const ivfpq_part *part, float coarse, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  uint32_t n = part->entry.n_rows;
  float base = coarse + c->constant + c->min_sum + p->term0 * c->term_scale;
  const uint64_t *bitmap = NULL;
  vs_rc rc = VS_OK;
  uint64_t seen = c->seen;
  if (c->q->filter) {
    rc = eval_filter(c, part, err);
    if (rc || c->seen == seen) return rc;
    bitmap = c->bitmap;
  } else c->seen += n;
  c->stats->partitions++, c->stats->rows += n;
  for (uint32_t at = 0; at < n && !rc; at += SCAN_ROWS) {
    uint32_t m = n - at < SCAN_ROWS ? n - at : SCAN_ROWS, threshold = threshold_of(c, base);
    if (!threshold) break;
    size_t hits = kern_get()->pq_scan(part->codes + (size_t)at * p->m, p->m, part->terms + at, m, c->table, c->term_mul, threshold,
                                      c->out_row, c->out_sum);
    rc = take_survivors(c, hits, (uint32_t)part->entry.row0, bitmap, at, base, err);
  }
  return rc;
}


/* Starts reading the nearest of the partitions that are still to be probed: all of them, or as many as may be held at once. */
static vs_rc begin_parts(scan *c, vs_err *err) {
  const uint64_t *keys;
  size_t n = next_ranked(c, c->to_probe, &keys), m = 0;
  int want = IVFPQ_WANT_CODES | (c->q->filter ? IVFPQ_WANT_COLUMNS : 0);
  uint64_t bytes = 0;
  free(c->parts), free(c->part_keys);
  c->parts = calloc(n + 1, sizeof *c->parts), c->part_keys = malloc((n + 1) * sizeof *c->part_keys);
  if (!c->parts || !c->part_keys) return vs_nomem(err);
  for (; m < n && (m < 1 || bytes < PARTS_BYTES); m++) {
    ranked r = c->ref[kern_key_number(keys[m])];
    const ivfpq_partition *e = &c->views[r.view].entries[r.at];
    c->parts[m].number = c->views[r.view].first + r.at, c->parts[m].entry = *e;
    c->part_keys[m] = keys[m];
    bytes += ivfpq_code_bytes(e->n_rows, c->s->params.m) + e->column_bytes;
  }
  c->next -= n - m; /* they stay sorted */
  c->to_probe = m < n ? c->to_probe - m : 0;
  vs_rc rc = ivfpq_parts_begin(c->s, want, c->parts, m, err);
  if (!rc) c->pending = PARTS, c->n_parts = m;
  return rc;
}

static vs_rc scan_parts(scan *c, vs_err *err) {
  size_t n = c->n_parts;
  c->pending = NOTHING, c->n_parts = 0;
  vs_rc rc = ivfpq_parts_wait(c->s, c->parts, n, err);
  if (rc) return rc;
  for (size_t i = 0; i < n && !rc; i++) {
    rc = scan_part(c, &c->parts[i], kern_key_value(c->part_keys[i]), err);
    if (!rc && i % 16 == 15 && stopped(c->q)) rc = interrupted(err);
  }
  ivfpq_parts_release(c->s, c->parts, n);
  return rc;
}

static vs_rc scan_allocate(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  c->x = calloc(p->dim_padded + 16, sizeof *c->x);
  c->tablef = malloc((size_t)p->m * 256 * sizeof *c->tablef);
  c->table = aligned_alloc(64, (size_t)p->m * 256);
  c->out_row = malloc(SCAN_ROWS * sizeof *c->out_row);
  c->out_sum = malloc(SCAN_ROWS * sizeof *c->out_sum);
  c->bitmap = c->q->filter ? malloc(IVFPQ_MAX_PARTITION / 8 + 64) : NULL;
  int ok = c->x && c->tablef && c->table && c->out_row && c->out_sum && (!c->q->filter || c->bitmap);
  return ok ? VS_OK : vs_nomem(err);
}

/* Everything a coded segment's scan needs to know is there once the first groups and the codebook are: ranks, table. */
static vs_rc finish_ranking(scan *c, vs_err *err) {
  vs_rc rc = rank_groups(c, err);
  if (!rc && c->codebook.len) {
    rc = ivfpq_codebook_wait(c->s, &c->codebook, err);
    c->codebook.len = 0;
  }
  if (!rc && !c->has_table) build_table(c), c->has_table = 1;
  return rc;
}

/* What to read next: the rest of this round, more partitions while the filter let too few rows through, more groups; nothing
 * (pending stays NOTHING) when enough was seen. */
static vs_rc begin_next(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  uint64_t enough = c->q->n_candidates < p->n_rows ? c->q->n_candidates : p->n_rows;
  if (!c->to_probe && !c->probed) c->to_probe = c->q->nprobe;
  else if (!c->to_probe && c->seen < enough) c->to_probe = c->q->nprobe < 64 ? 64 : c->q->nprobe;
  c->probed = 1;
  if (c->to_probe && c->next < c->n_ranked) return begin_parts(c, err);
  c->to_probe = 0;
  return c->seen < enough && c->n_views < p->n_groups ? begin_more_groups(c, err) : VS_OK;
}

static vs_rc step_coded(scan *c, int *more, vs_err *err) {
  vs_rc rc = VS_OK;
  do {
    rc = c->pending == GROUPS ? finish_ranking(c, err) : c->pending == PARTS ? scan_parts(c, err) : VS_OK;
    if (!rc) rc = begin_next(c, err);
  } while (!rc && c->pending != NOTHING && c->s->io->local);
  *more = !rc && c->pending != NOTHING;
  if (!rc && !*more) keys_cut(c->out, c->q->n_candidates);
  return rc;
}

static vs_rc open_coded(scan *c, vs_err *err) {
  vs_rc rc = scan_allocate(c, err);
  if (rc) return rc;
  prepare_query(c);
  rc = ivfpq_codebook_begin(c->s, &c->codebook, err);
  return rc ? rc : begin_ranking(c, err);
}

/* ---- brute force ---- */

typedef struct exact_job {
  ivfpq_segment *s;
  const float *query;
  const uint8_t *records;
  uint32_t first, n;
  uint64_t *key;
  int failed;
} exact_job;

static void exact_slice(void *ctx, size_t i) {
  exact_job *e = ctx;
  const ivfpq_params *p = &e->s->params;
  uint32_t at = (uint32_t)i * EXACT_SLICE, end = at + EXACT_SLICE < e->n ? at + EXACT_SLICE : e->n;
  float *buf = malloc((size_t)p->dim * sizeof *buf);
  if (!buf) {
    __atomic_store_n(&e->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (; at < end; at++) {
    const float *v = ivfpq_row_vector(e->s, e->records + (size_t)at * p->row_bytes, buf);
    e->key[at] = kern_key((float)ivfpq_distance((ivfpq_metric)p->metric, e->query, v, p->dim), e->first + at);
  }
  free(buf);
}

/* Appends one stretch's keys that can still matter. */
static vs_rc exact_take(const exact_job *e, const ivfpq_query *q, const uint64_t *after, const uint64_t *bitmap, uint64_t *worst,
                        ivfpq_keys *out, vs_err *err) {
  vs_rc rc = keys_room(out, out->n + e->n, err);
  if (rc) return rc;
  for (uint32_t i = 0; i < e->n; i++) {
    if (e->key[i] >= *worst || (after && e->key[i] <= *after)) continue;
    if (bitmap && !bit(bitmap, e->first + i)) continue;
    out->key[out->n++] = e->key[i];
  }
  if (keys_full(out, q->n_candidates)) *worst = keys_cut(out, q->n_candidates);
  return VS_OK;
}

/* While one stretch is compared the next one travels. */
static vs_rc begin_stretch(ivfpq_segment *s, uint64_t first, uint32_t n, vs_range *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  if (s->io->local || first >= p->n_rows) return VS_OK;
  if (n > p->n_rows - first) n = (uint32_t)(p->n_rows - first);
  *out = (vs_range){.off = s->section[IVFPQ_ROWS].off + first * p->row_bytes, .len = (uint64_t)n * p->row_bytes};
  return vs_io_begin(s->io, out, 1, err);
}

vs_rc ivfpq_exact(ivfpq_segment *s, const ivfpq_query *q, const uint64_t *after, int threads, ivfpq_keys *out, ivfpq_stats *stats,
                  vs_err *err) {
  const ivfpq_params *p = &s->params;
  if (!p->n_rows || !q->n_candidates) return VS_OK;
  uint32_t n_rows = (uint32_t)p->n_rows, stretch = stretch_rows(p);
  uint64_t *key = malloc((size_t)stretch * sizeof *key), *bitmap = NULL, worst = UINT64_MAX;
  vs_rc rc = key ? VS_OK : vs_nomem(err);
  if (!rc && q->filter) rc = ivfpq_filter_all(s, q->filter, &bitmap, err);
  vs_range next = {0};
  for (uint64_t at = 0; at < n_rows && !rc; at += stretch) {
    ivfpq_row rows;
    vs_range held = next;
    exact_job e = {.s = s, .query = q->vector, .first = (uint32_t)at, .n = n_rows - at < stretch ? n_rows - (uint32_t)at : stretch,
                   .key = key};
    rc = ivfpq_rows_fetch_range(s, e.first, e.n, &rows, err);
    if (held.owner) vs_io_release(s->io, &held, 1);
    next = (vs_range){0};
    if (rc || (rc = begin_stretch(s, at + stretch, stretch, &next, err))) {
      if (rows.range.owner) ivfpq_rows_release(s, &rows, 1);
      break;
    }
    e.records = rows.record;
    vs_pool_run((e.n + EXACT_SLICE - 1) / EXACT_SLICE, threads, exact_slice, &e);
    ivfpq_rows_release(s, &rows, 1);
    rc = e.failed ? vs_nomem(err) : exact_take(&e, q, after, bitmap, &worst, out, err);
    if (!rc && stopped(q)) rc = interrupted(err);
  }
  if (next.owner) vs_io_release(s->io, &next, 1);
  if (!rc) keys_cut(out, q->n_candidates);
  stats->rows += n_rows;
  free(key), free(bitmap);
  return rc;
}

/* ---- scans ---- */

/* A flat segment has no codes: its estimates are true distances on the scale of the others. Its rows are read ahead in the
 * stretches that ivfpq_exact will ask for. */
static vs_rc open_flat(scan *c, vs_err *err) {
  const ivfpq_params *p = &c->s->params;
  uint32_t stretch = stretch_rows(p);
  if (c->s->io->local) return VS_OK;
  c->n_flat = (p->n_rows + stretch - 1) / stretch;
  if (!(c->flat = calloc(c->n_flat + 1, sizeof *c->flat))) return vs_nomem(err);
  for (size_t i = 0; i < c->n_flat; i++) {
    uint64_t first = i * (uint64_t)stretch, n = p->n_rows - first < stretch ? p->n_rows - first : stretch;
    c->flat[i].off = c->s->section[IVFPQ_ROWS].off + first * p->row_bytes, c->flat[i].len = n * p->row_bytes;
  }
  vs_rc rc = vs_io_begin(c->s->io, c->flat, c->n_flat, err);
  if (rc) c->n_flat = 0;
  return rc;
}

static vs_rc step_flat(scan *c, vs_err *err) {
  vs_rc rc = ivfpq_exact(c->s, c->q, NULL, 1, c->out, c->stats, err);
  for (size_t i = 0; i < c->out->n && !rc; i++) {
    float d = kern_key_value(c->out->key[i]);
    c->out->key[i] = kern_key(c->s->params.metric == IVFPQ_L2 ? d * d : 2 * d, kern_key_number(c->out->key[i]));
  }
  return rc;
}

vs_rc ivfpq_scan_open(ivfpq_segment *s, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, ivfpq_scan_state **scan_out,
                      vs_err *err) {
  scan *c = calloc(1, sizeof *c);
  *scan_out = c;
  if (!c) return vs_nomem(err);
  *c = (scan){.s = s, .q = q, .out = out, .stats = stats, .worst = UINT64_MAX};
  if (!s->params.n_rows || !q->n_candidates) return VS_OK;
  vs_rc rc = ivfpq_is_flat(s) ? open_flat(c, err) : open_coded(c, err);
  if (rc) ivfpq_scan_close(c), *scan_out = NULL;
  return rc;
}

vs_rc ivfpq_scan_step(ivfpq_scan_state *c, int *more, vs_err *err) {
  *more = 0;
  if (!c->s->params.n_rows || !c->q->n_candidates) return VS_OK;
  return ivfpq_is_flat(c->s) ? step_flat(c, err) : step_coded(c, more, err);
}

void ivfpq_scan_close(ivfpq_scan_state *c) {
  if (!c) return;
  if (c->pending == PARTS) ivfpq_parts_release(c->s, c->parts, c->n_parts);
  if (c->views) ivfpq_groups_release(c->s, c->views, c->n_views + c->n_begun);
  if (c->codebook.len) vs_io_release(c->s->io, &c->codebook, 1);
  if (c->n_flat) vs_io_release(c->s->io, c->flat, c->n_flat);
  free(c->x), free(c->tablef), free(c->table), free(c->out_row), free(c->out_sum), free(c->bitmap);
  free(c->order), free(c->views), free(c->ref), free(c->rank), free(c->rank_scratch);
  free(c->parts), free(c->part_keys), free(c->flat);
  free(c);
}

vs_rc ivfpq_scan(ivfpq_segment *s, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, vs_err *err) {
  ivfpq_scan_state *c;
  int more = 1;
  vs_rc rc = ivfpq_scan_open(s, q, out, stats, &c, err);
  while (!rc && more) rc = ivfpq_scan_step(c, &more, err);
  ivfpq_scan_close(c);
  return rc;
}

vs_rc ivfpq_distances(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  size_t max = n < ROWS_PER_ROUND ? n : ROWS_PER_ROUND;
  ivfpq_row *row = malloc((max + 1) * sizeof *row);
  float *buf = malloc((size_t)p->dim * sizeof *buf);
  vs_rc rc = row && buf ? VS_OK : vs_nomem(err);
  for (size_t at = 0; at < n && !rc; at += max) {
    size_t m = n - at < max ? n - at : max;
    if ((rc = ivfpq_rows_fetch(s, rows + at, m, row, err))) break;
    for (size_t i = 0; i < m; i++)
      out[at + i] = (float)ivfpq_distance((ivfpq_metric)p->metric, query, ivfpq_row_vector(s, row[i].record, buf), p->dim);
    ivfpq_rows_release(s, row, m);
  }
  free(row), free(buf);
  return rc;
}

/* ---- filters over a whole segment ---- */

static void place_bits(uint64_t *all, uint64_t row0, const uint64_t *part, uint32_t n) {
  for (uint32_t i = 0; i < n; i++)
    if (bit(part, i)) all[(row0 + i) / 64] |= 1ull << (row0 + i) % 64;
}

static vs_rc filter_group(ivfpq_segment *s, const ivfpq_filter *f, const ivfpq_group_view *v, uint64_t *all, uint64_t *part_bits,
                          vs_err *err) {
  ivfpq_part *parts = calloc(v->n + 1, sizeof *parts);
  if (!parts) return vs_nomem(err);
  for (uint32_t i = 0; i < v->n; i++) parts[i].number = v->first + i, parts[i].entry = v->entries[i];
  vs_rc rc = ivfpq_parts_fetch(s, IVFPQ_WANT_COLUMNS, parts, v->n, err);
  int held = !rc;
  for (uint32_t i = 0; i < v->n && !rc; i++) {
    uint32_t n = parts[i].entry.n_rows;
    if (!n) continue;
    memset(part_bits, 0, ivfpq_round(n, 64) / 8);
    rc = f->eval(f->ctx, s, &parts[i], part_bits, err);
    if (!rc) place_bits(all, parts[i].entry.row0, part_bits, n);
  }
  if (held) ivfpq_parts_release(s, parts, v->n);
  free(parts);
  return rc;
}

vs_rc ivfpq_filter_all(ivfpq_segment *s, const ivfpq_filter *f, uint64_t **bitmap, vs_err *err) {
  uint64_t *all = calloc(s->params.n_rows / 64 + 2, 8), *part = malloc(IVFPQ_MAX_PARTITION / 8 + 64);
  vs_rc rc = all && part ? VS_OK : vs_nomem(err);
  for (uint32_t g = 0; g < s->params.n_groups && !rc; g++) {
    ivfpq_group_view v;
    if ((rc = ivfpq_groups_fetch(s, &g, 1, &v, err))) break;
    rc = filter_group(s, f, &v, all, part, err);
    ivfpq_groups_release(s, &v, 1);
  }
  free(part);
  *bitmap = rc ? NULL : all;
  if (rc) free(all);
  return rc;
}
