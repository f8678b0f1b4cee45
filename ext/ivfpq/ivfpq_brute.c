/* ivfpq_brute.c - brute force over stored vectors: ivfpq_exact and ivfpq_exact_many; see ivfpq_search.h.
 *
 * Rows are gone through in stretches, each compared on several threads while the next one travels. A stretch is scored first: many
 * queries by a matrix product, one by the kernels of distances. A score is the greater the nearer a row is, and carries a known
 * error; distances are then computed as everywhere else, in double where floats end, of those rows only that may be among the
 * nearest within that error. So the result is that of comparing all, whatever the number of queries and of threads.
 *
 *   metric   score of many        score of one       a distance d as a score
 *   l2       x.q - |x|^2 / 2      -|x - q|^2         (|q|^2 - d^2) / 2, or -d^2
 *   dot      x.q                  x.q                -d
 *   cosine   x.q / (|x| |q|)      the same           1 - d
 *
 * Errors: a sum of n products in floats is off by n u SUM |x_j q_j| at most (u = 2^-24; Higham, Accuracy and Stability of Numerical
 * Algorithms, section 3.1), and SUM |x_j q_j| <= |x| |q|. With d the distance, |x| <= |q| + d: rows that are near enough to matter
 * have norms that the score itself bounds. The factor 5 covers the same error in the distances that scores stand for.
 * What leaves the range in which this holds (IVFPQ_SAFE_MIN, IVFPQ_SAFE_MAX) is scored NaN, which no limit leaves out.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_search.h"

enum {
  STRETCH_BYTES = 16 << 20, /* of stored vectors read at once */
  MANY = 3,                 /* queries for which packing rows pays */
  QUERIES = 64,             /* scored together */
  MANY_ROWS = 4096,         /* that they meet at once: the scores stay in the cache */
  SLICE = 512,              /* rows per task */
  BLOCK = 64,               /* rows packed at once */
  AHEAD_BYTES = 4096,       /* of rows asked for before they are needed */
  CHUNK = 256               /* scores between two looks at the limit */
};
#define UNIT_ROUNDOFF 5.9604645e-8f

uint32_t ivfpq_stretch_rows(const ivfpq_params *p) { return STRETCH_BYTES / p->row_bytes + SLICE; }

typedef struct asked {
  const float *vector;  /* as given */
  float norm2;
  uint64_t worst;       /* key: nothing from it on can matter; UINT64_MAX: everything can */
} asked;

typedef struct brute {
  ivfpq_segment *s;
  const kern *k;         /* looked up once, not per row */
  const ivfpq_query *q;
  const uint64_t *after, *bitmap;
  int many;
  const float *scored;   /* the queries as they are scored: for cosine of length 1 */
  asked *asked;
  ivfpq_keys *out;
  /* what tasks work on */
  const uint8_t *records;
  uint32_t first, n;     /* rows */
  size_t from, n_q;      /* queries */
  float *score;          /* n_q x stride */
  size_t stride;
  float *longest;        /* by slice: of the rows, for dot */
  int failed;
} brute;

static void fail(brute *b) { __atomic_store_n(&b->failed, 1, __ATOMIC_RELAXED); }
static int safe(float norm2) { return norm2 > IVFPQ_SAFE_MIN && norm2 < IVFPQ_SAFE_MAX; }

/* ---- scores ---- */

static float score_of(const brute *b, const float *q, const float *x) {
  const kern *k = b->k;
  uint32_t dim = b->s->params.dim;
  float d[3];
  switch ((ivfpq_metric)b->s->params.metric) {
    case IVFPQ_L2: d[0] = k->l2sq_f32(q, x, dim); return safe(d[0]) ? -d[0] : NAN;
    case IVFPQ_DOT: d[0] = k->dot_f32(q, x, dim); return fabsf(d[0]) < IVFPQ_SAFE_MAX ? d[0] : NAN;
    default:
      k->cosine_f32(q, x, dim, d);
      if (!safe(d[1]) || !safe(d[2]) || !(fabsf(d[0]) < IVFPQ_SAFE_MAX)) return NAN;
      return d[0] / (sqrtf(d[1]) * sqrtf(d[2]));
  }
}

/* Asks for what follows, across pages, where the hardware stops: a pass over 1,000,000 x 128 takes .6 of the time. */
static const float *row_at(const brute *b, uint32_t at, float *buf) {
  const uint8_t *record = b->records + (size_t)at * b->s->params.row_bytes;
  for (uint32_t z = 0; z < b->s->params.row_bytes; z += 64) __builtin_prefetch(record + AHEAD_BYTES + z);
  return ivfpq_row_vector(b->s, record, buf);
}

static void score_one(brute *b, uint32_t at, uint32_t end, float *buf) {
  for (; at < end; at++) b->score[at] = score_of(b, b->asked[b->from].vector, row_at(b, at, buf));
}

/* Memory of a task that scores many queries. */
typedef struct block { float *rows, *packed, *bias, *zero; } block;

static vs_rc block_allocate(uint32_t dim, block *w) {
  size_t room = (size_t)BLOCK * dim + 16;
  w->rows = malloc(room * sizeof(float)), w->packed = malloc((kern_packed_len(BLOCK, dim) + 16) * sizeof(float));
  w->bias = malloc((BLOCK + 16) * sizeof(float)), w->zero = calloc(dim + 16, sizeof(float));
  return w->rows && w->packed && w->bias && w->zero ? VS_OK : VS_NOMEM;
}
static void block_free(block *w) { free(w->rows), free(w->packed), free(w->bias), free(w->zero); }

/* Some rows against all queries of a turn. */
static void score_block(brute *b, block *w, uint32_t at, uint32_t n, float *longest) {
  const ivfpq_params *p = &b->s->params;
  const kern *k = b->k;
  memset(w->bias, 0, (BLOCK + 16) * sizeof *w->bias);
  for (uint32_t i = 0; i < n; i++) {
    float *to = w->rows + (size_t)i * p->dim;
    const float *x = row_at(b, at + i, to);
    float norm2 = k->dot_f32(x, x, p->dim);
    if (!safe(norm2)) w->bias[i] = NAN;
    else if (p->metric == IVFPQ_L2) w->bias[i] = -norm2 / 2;
    else if (p->metric == IVFPQ_DOT) *longest = norm2 > *longest ? norm2 : *longest;
    if (p->metric == IVFPQ_COSINE) kern_scale_sub_f32(x, safe(norm2) ? 1 / sqrtf(norm2) : 0, w->zero, p->dim, to);
    else if (x != to) memcpy(to, x, p->dim * sizeof *to);
  }
  kern_pack_f32(w->rows, n, p->dim, w->packed);
  k->scores_many_f32(b->scored + b->from * p->dim, b->n_q, p->dim, p->dim, w->packed, w->bias, n, b->score + at, b->stride);
}

static void score_slice(void *ctx, size_t i) {
  brute *b = ctx;
  uint32_t at = (uint32_t)i * SLICE, end = at + SLICE < b->n ? at + SLICE : b->n, dim = b->s->params.dim;
  block w = {0};
  b->longest[i] = 0;
  if (b->many && !block_allocate(dim, &w))
    for (; at < end; at += BLOCK) score_block(b, &w, at, end - at < BLOCK ? end - at : BLOCK, &b->longest[i]);
  else if (!b->many && (w.rows = malloc(dim * sizeof(float)))) score_one(b, at, end, w.rows);
  else fail(b);
  block_free(&w);
}

/* ---- limits ---- */

static float score_at(const brute *b, const asked *a, float distance) {
  switch ((ivfpq_metric)b->s->params.metric) {
    case IVFPQ_L2: return b->many ? (a->norm2 - distance * distance) / 2 : -distance * distance;
    case IVFPQ_DOT: return -distance;
    default: return 1 - distance;
  }
}

/* How far a score near `score` may lie from that of the true distance. */
static float error_at(const brute *b, const asked *a, float score, float longest) {
  float unit = 5 * (float)(b->s->params.dim + 8) * UNIT_ROUNDOFF;
  switch ((ivfpq_metric)b->s->params.metric) {
    case IVFPQ_L2: return b->many ? unit * (5 * a->norm2 + 4 * fabsf(score)) : unit * fabsf(score);
    case IVFPQ_DOT: return b->many ? unit * sqrtf(a->norm2) * sqrtf(longest) : 4 * UNIT_ROUNDOFF * fabsf(score);
    default: return unit;
  }
}

/* ---- the nearest ---- */

/* What a task finds of one query: rows that may matter, and the best scores of those that do for sure. */
typedef struct found {
  uint32_t *row;
  size_t n, room;
  ivfpq_keys best;
  float limit;          /* scores below it do not matter */
} found;

static void raise_limit(const brute *b, const asked *a, float longest, found *f) {
  uint64_t want = b->q->n_candidates;
  if (f->best.n < want) return;
  float score = -kern_key_value(ivfpq_keys_cut(&f->best, want)), limit = score - 2 * error_at(b, a, score, longest);
  if (limit > f->limit) f->limit = limit;
}

static vs_rc look_at_scores(const brute *b, const asked *a, const float *score, float longest, found *f) {
  uint64_t want = b->q->n_candidates;
  uint32_t near[CHUNK + 16];
  float after = b->after ? score_at(b, a, kern_key_value(*b->after)) : 0, error = b->after ? error_at(b, a, after, longest) : 0;
  f->limit = -INFINITY;
  if (a->worst != UINT64_MAX) {
    float worst = score_at(b, a, kern_key_value(a->worst));
    f->limit = worst - error_at(b, a, worst, longest);
  }
  if (!safe(a->norm2)) f->limit = -INFINITY;
  for (uint32_t at = 0; at < b->n; at += CHUNK) {
    size_t n = b->k->not_below_f32(score + at, b->n - at < CHUNK ? b->n - at : CHUNK, f->limit, near);
    for (size_t i = 0; i < n; i++) {
      uint32_t row = at + near[i];
      float v = score[row];
      if (b->bitmap && !(b->bitmap[(b->first + row) / 64] >> (b->first + row) % 64 & 1)) continue;
      if (b->after && v - error > after) continue;
      if (f->n == f->room) {
        uint32_t *grown = realloc(f->row, (2 * f->room + CHUNK) * sizeof *grown);
        if (!grown) return VS_NOMEM;
        f->row = grown, f->room = 2 * f->room + CHUNK;
      }
      f->row[f->n++] = row;
      if (!safe(a->norm2) || !(b->after ? v + error < after : v == v)) continue; /* it counts when it matters for sure */
      if (ivfpq_keys_room(&f->best, f->best.n + 1, NULL)) return VS_NOMEM;
      f->best.key[f->best.n++] = kern_key(-v, row);
    }
    if (f->best.n >= 2 * want + CHUNK) raise_limit(b, a, longest, f);
  }
  raise_limit(b, a, longest, f);
  return VS_OK;
}

/* True distances of what may matter; those that do join the query's keys. */
static vs_rc compare(brute *b, asked *a, const float *score, const found *f, float *buf, ivfpq_keys *out) {
  const ivfpq_params *p = &b->s->params;
  uint64_t want = b->q->n_candidates;
  for (size_t i = 0; i < f->n; i++) {
    uint32_t row = f->row[i];
    if (score[row] < f->limit) continue;
    const float *x = ivfpq_row_vector(b->s, b->records + (size_t)row * p->row_bytes, buf);
    uint64_t key = kern_key((float)ivfpq_distance_by(b->k, (ivfpq_metric)p->metric, a->vector, x, p->dim, NULL), b->first + row);
    if (key >= a->worst || (b->after && key <= *b->after)) continue;
    if (ivfpq_keys_room(out, out->n + 1, NULL)) return VS_NOMEM;
    out->key[out->n++] = key;
    /* selection is linear, so it pays once the buffer has twice what is wanted */
    if (out->n >= 2 * want + 1024) a->worst = ivfpq_keys_cut(out, want);
  }
  return VS_OK;
}

static void take(void *ctx, size_t j) {
  brute *b = ctx;
  asked *a = &b->asked[b->from + j];
  const float *score = b->score + j * b->stride;
  float *buf = malloc(b->s->params.dim * sizeof *buf), longest = 0;
  found f = {0};
  for (size_t i = 0; i * SLICE < b->n; i++) longest = b->longest[i] > longest ? b->longest[i] : longest;
  if (!buf || look_at_scores(b, a, score, longest, &f) || compare(b, a, score, &f, buf, &b->out[b->from + j])) fail(b);
  free(buf), free(f.row);
  ivfpq_keys_reset(&f.best);
}

/* ---- the whole ---- */

/* While one stretch is compared the next one travels. */
static vs_rc begin_stretch(ivfpq_segment *s, uint64_t first, uint32_t n, vs_range *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  if (s->io->local || first >= p->n_rows) return VS_OK;
  if (n > p->n_rows - first) n = (uint32_t)(p->n_rows - first);
  *out = (vs_range){.off = s->section[IVFPQ_ROWS].off + first * p->row_bytes, .len = (uint64_t)n * p->row_bytes};
  return vs_io_begin(s->io, out, 1, err);
}

/* Some rows of a stretch against all queries, some at a time. */
static vs_rc compare_rows(brute *b, size_t n_queries, int threads, vs_err *err) {
  for (b->from = 0; b->from < n_queries; b->from += QUERIES) {
    b->n_q = n_queries - b->from < QUERIES ? n_queries - b->from : QUERIES;
    for (size_t one = 0; one < (b->many ? 1 : b->n_q); one++) {
      brute turn = *b;
      if (!b->many) turn.from += one, turn.n_q = 1;
      vs_pool_run((b->n + SLICE - 1) / SLICE, threads, score_slice, &turn);
      if (!turn.failed) vs_pool_run(turn.n_q, threads, take, &turn);
      if (turn.failed) return vs_nomem(err);
    }
    if (b->q->stop && b->q->stop(b->q->stop_ctx)) return vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  return VS_OK;
}

static vs_rc compare_stretch(brute b, uint32_t first, uint32_t n, size_t n_queries, int threads, vs_err *err) {
  const uint8_t *records = b.records;
  uint32_t most = b.many ? MANY_ROWS : n;
  vs_rc rc = VS_OK;
  for (uint32_t at = 0; at < n && !rc; at += most) {
    b.records = records + (size_t)at * b.s->params.row_bytes, b.first = first + at, b.n = n - at < most ? n - at : most;
    rc = compare_rows(&b, n_queries, threads, err);
  }
  return rc;
}

static vs_rc all_stretches(brute *b, size_t n_queries, uint32_t stretch, int threads, vs_err *err) {
  ivfpq_segment *s = b->s;
  uint32_t n_rows = (uint32_t)s->params.n_rows;
  vs_range next = {0};
  vs_rc rc = VS_OK;
  for (uint64_t at = 0; at < n_rows && !rc; at += stretch) {
    ivfpq_row rows;
    vs_range held = next;
    uint32_t n = n_rows - at < stretch ? n_rows - (uint32_t)at : stretch;
    rc = ivfpq_rows_fetch_range(s, (uint32_t)at, n, &rows, err);
    if (held.owner) vs_io_release(s->io, &held, 1);
    next = (vs_range){0};
    if (rc || (rc = begin_stretch(s, at + stretch, stretch, &next, err))) {
      if (rows.range.owner) ivfpq_rows_release(s, &rows, 1);
      break;
    }
    b->records = rows.record;
    rc = compare_stretch(*b, (uint32_t)at, n, n_queries, threads, err);
    ivfpq_rows_release(s, &rows, 1);
  }
  if (next.owner) vs_io_release(s->io, &next, 1);
  return rc;
}

/* Their lengths, and for cosine the queries as they are scored: copies of length 1. */
static vs_rc prepare(brute *b, const float *vectors, size_t n, float **unit, vs_err *err) {
  uint32_t dim = b->s->params.dim;
  int cosine = b->many && b->s->params.metric == IVFPQ_COSINE;
  float *zero = cosine ? calloc(dim, sizeof *zero) : NULL;
  *unit = cosine ? malloc(n * dim * sizeof **unit) : NULL;
  if (cosine && (!zero || !*unit)) {
    free(zero);
    return vs_nomem(err);
  }
  for (size_t i = 0; i < n; i++) {
    const float *v = vectors + i * dim;
    b->asked[i] = (asked){.vector = v, .norm2 = b->k->dot_f32(v, v, dim), .worst = UINT64_MAX};
    if (cosine) kern_scale_sub_f32(v, safe(b->asked[i].norm2) ? 1 / sqrtf(b->asked[i].norm2) : 0, zero, dim, *unit + i * dim);
  }
  b->scored = cosine ? *unit : vectors;
  free(zero);
  return VS_OK;
}

static vs_rc exact(ivfpq_segment *s, const ivfpq_query *q, const float *vectors, size_t n, const uint64_t *after, int threads,
                   ivfpq_keys *out, ivfpq_stats *stats, vs_err *err) {
  if (!s->params.n_rows || !q->n_candidates || !n) return VS_OK;
  uint32_t stretch = ivfpq_stretch_rows(&s->params);
  brute b = {.s = s, .k = kern_get(), .q = q, .after = after, .many = n >= MANY, .out = out};
  uint64_t *bitmap = NULL;
  float *unit = NULL;
  size_t at_once = b.many ? QUERIES < n ? QUERIES : n : 1;
  b.stride = ivfpq_round(b.many && stretch > MANY_ROWS ? MANY_ROWS : stretch, 16);
  b.score = malloc((at_once * b.stride + 16) * sizeof *b.score), b.longest = malloc((b.stride / SLICE + 1) * sizeof *b.longest);
  b.asked = malloc(n * sizeof *b.asked);
  vs_rc rc = b.score && b.longest && b.asked ? prepare(&b, vectors, n, &unit, err) : vs_nomem(err);
  if (!rc && q->filter) rc = ivfpq_filter_all(s, q->filter, &bitmap, err);
  b.bitmap = bitmap;
  if (!rc) rc = all_stretches(&b, n, stretch, threads, err);
  for (size_t i = 0; i < n && !rc; i++) ivfpq_keys_cut(&out[i], q->n_candidates);
  stats->rows += s->params.n_rows * n;
  free(b.score), free(b.longest), free(b.asked), free(bitmap), free(unit);
  return rc;
}

vs_rc ivfpq_exact(ivfpq_segment *s, const ivfpq_query *q, const uint64_t *after, int threads, ivfpq_keys *out, ivfpq_stats *stats,
                  vs_err *err) {
  return exact(s, q, q->vector, 1, after, threads, out, stats, err);
}

vs_rc ivfpq_exact_many(ivfpq_segment *s, const ivfpq_query *q, const float *vectors, size_t n, int threads, ivfpq_keys *out,
                       ivfpq_stats *stats, vs_err *err) {
  return exact(s, q, vectors, n, NULL, threads, out, stats, err);
}
