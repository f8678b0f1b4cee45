/* ivfpq_table.c - see ivfpq_table.h and the estimate in ivfpq_format.h.
 *
 * Everything after the query is turned into bytes is integer arithmetic and single float operations, so every kernel variant makes
 * the same table. The step of the table is the widest range of a sub-quantizer / 255 (finer gains nothing, coarser loses
 * recall), but wide enough that a sum of entries and row term stays below 2^16, so that sums never saturate.
 */
#include "ivfpq_table.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"

static uint32_t table_dim(const ivfpq_params *p) {
  return (uint32_t)ivfpq_round((uint64_t)ivfpq_subs(p->m, p->bits) / p->m * p->sub_dim, 4);
}

vs_rc ivfpq_table_allocate(const ivfpq_params *p, ivfpq_table *t, vs_err *err) {
  size_t coded = ivfpq_round(p->dim_padded, 4), m = p->m;
  t->x = calloc(coded + 16, sizeof *t->x);
  t->bytes = calloc(coded + 64, 1);
  t->by_code = calloc(m * table_dim(p) + 64, 1);
  t->turn_score = malloc((p->turn + 16) * sizeof *t->turn_score), t->turned = calloc(p->turn + 16, sizeof *t->turned);
  t->turned8 = calloc(p->turn + 64, 1);
  t->raw = malloc(m * 256 * sizeof *t->raw);
  t->low = malloc(m * sizeof *t->low), t->factor = malloc(m * sizeof *t->factor);
  t->table = aligned_alloc(64, m * 256);
  return t->x && t->bytes && t->by_code && t->turn_score && t->turned && t->turned8 && t->raw && t->low && t->factor && t->table ? VS_OK : vs_nomem(err);
}

void ivfpq_table_reset(ivfpq_table *t) {
  free(t->x), free(t->bytes), free(t->by_code), free(t->turn_score), free(t->turned), free(t->turned8), free(t->raw), free(t->low), free(t->factor), free(t->table);
  memset(t, 0, sizeof *t);
}

/* The scale of a cosine query; in double where squares of ordinary floats leave the range. */
static float unit_scale(const float *v, uint32_t dim) {
  float f = kern_get()->dot_f32(v, v, dim);
  if (f > 1e-30f && f < 1e37f) return 1 / sqrtf(f);
  double s = 0;
  for (uint32_t j = 0; j < dim; j++) s += (double)v[j] * v[j];
  return s > 0 ? (float)(1 / sqrt(s)) : 0;
}

void ivfpq_table_query(const ivfpq_segment *s, const float *v, ivfpq_table *t) {
  const ivfpq_params *p = &s->params;
  const kern *k = kern_get();
  float scale = p->metric == IVFPQ_COSINE ? unit_scale(v, p->dim) : 1;
  t->qq = t->constant = 0, t->term_scale = 1;
  if (p->metric == IVFPQ_DOT) {
    memcpy(t->x, v, p->dim * sizeof *v);
    t->constant = -2 * k->dot_f32(t->x, s->mean, p->dim);
    t->term_scale = sqrtf(k->l2sq_f32(t->x, s->mean, p->dim));
  } else {
    for (uint32_t j = 0; j < p->dim; j++) t->x[j] = v[j] * scale - s->mean[j];
    t->qq = k->dot_f32(t->x, t->x, p->dim);
  }
  t->step8 = k->quantize_i8(t->x, p->dim_padded, t->bytes), t->turned_step = 0;
}

/* The query along the directions that codes are of, as bytes. */
static void turn_query(const ivfpq_segment *s, const ivfpq_codebook *c, ivfpq_table *t) {
  const kern *k = kern_get();
  uint32_t n = s->params.turn;
  k->scores_i8(t->bytes, 1, 0, ivfpq_coded_dim(&s->params), c->turn, n, t->turn_score, 0);
  for (uint32_t u = 0; u < n; u++) t->turned[u] = t->step8 * c->turn_scale[u] * (float)t->turn_score[u];
  t->turned_step = k->quantize_i8(t->turned, n, t->turned8);
}

void ivfpq_table_make(const ivfpq_segment *s, ivfpq_table *t) {
  const ivfpq_params *p = &s->params;
  const ivfpq_codebook *c = ivfpq_codebook_of(s);
  const kern *k = kern_get();
  uint32_t width = ivfpq_code_dim(p) / p->m;
  if (p->turn && !(t->turned_step > 0)) turn_query(s, c, t);
  float step8 = p->turn ? t->turned_step : t->step8;
  const int8_t *bytes = p->turn ? t->turned8 : t->bytes, *q = bytes;
  if (width != c->table_dim) {
    for (uint32_t j = 0; j < p->m; j++) memcpy(t->by_code + (size_t)j * c->table_dim, bytes + (size_t)j * width, width);
    q = t->by_code;
  }
  for (uint32_t j = 0; j < p->m; j++) t->factor[j] = -2 * step8 * c->scale[j];
  float range = k->pq_table_raw(q, c->packed, t->factor, p->m, c->table_dim, t->raw, t->low);
  float term_range = 65535 * p->term_step * t->term_scale;
  t->min_sum = 0;
  for (uint32_t j = 0; j < p->m; j++) t->min_sum += t->low[j];
  t->step = range / 255;
  if (t->step < term_range / (float)(65535 - 255 * p->m)) t->step = term_range / (float)(65535 - 255 * p->m);
  if (!(t->step > 1e-30f)) t->step = 1e-30f;
  float inv = 1 / t->step, mul = p->term_step * t->term_scale * inv * 65536;
  t->term_mul = mul >= 65535 ? 65535 : mul > 0 ? (uint16_t)lrintf(mul) : 0;
  k->pq_table(t->raw, t->low, p->m, inv, t->table);
}
