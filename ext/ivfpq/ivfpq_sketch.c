/* ivfpq_sketch.c - see ivfpq_sketch.h and SKETCH in ivfpq_format.h.
 *
 * A row x in the model's space is kept as x' = scale * bytes. With e = x - x' and a query q
 *   |q - x|^2 = |q - x'|^2 + |e|^2 - 2 (q - x').e
 * The first two terms are known. e is what rounding left: independent errors, uniform within half a step, so the last term has a
 * standard deviation of 2 |q - x'| scale / sqrt(12), and is close to normal when there are hundreds of dimensions. `width` is six of
 * these: a row is passed over wrongly once in 10^9. For dot products the last term is -2 q.e.
 * A query that lies at the row itself is not independent of e: q - x' is e then, and the last term -2 |e|^2. So the true value may lie
 * up to 2 |e|^2 lower, |e|^2 being dims * scale^2 / 12: the middle moves by half of that and `width` grows by it.
 * The query is taken as two planes of bytes (16 bits), so that its own rounding does not matter.
 */
#include "ivfpq_sketch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
#include "ivfpq_table.h"

enum { AHEAD = 4 }; /* sketches asked for before they are needed */
#define SIGMAS 6

void ivfpq_sketch_make(ivfpq_metric metric, const float *x, uint32_t dim_padded, uint8_t *record, int8_t *q) {
  enum { PART = 256, WIDE = 16 }; /* loops of a known length are made of vectors at -O2 */
  const kern *k = kern_get();
  uint32_t coded = (uint32_t)ivfpq_round(dim_padded, 4);
  float tail[2] = {k->quantize_i8(x, dim_padded, q), 0}, y[PART];
  memset(q + dim_padded, 0, coded - dim_padded);
  for (uint32_t j = 0; j < coded; j += 4) {
    uint32_t four;
    memcpy(&four, q + j, 4);
    four ^= 0x80808080u; /* 128 + q */
    memcpy(record + j, &four, 4);
  }
  for (uint32_t at = 0; at < dim_padded && metric != IVFPQ_DOT; at += PART) {
    uint32_t n = dim_padded - at < PART ? dim_padded - at : PART, j = 0;
    for (; j + WIDE <= n; j += WIDE)
      for (uint32_t i = 0; i < WIDE; i++) y[j + i] = tail[0] * q[at + j + i];
    for (; j < n; j++) y[j] = tail[0] * q[at + j];
    tail[1] += k->dot_f32(y, y, n) + k->l2sq_f32(x + at, y, n);
  }
  memcpy(record + coded, tail, sizeof tail);
  uint32_t check = ivfpq_check32(record, coded + 8);
  memcpy(record + coded + 8, &check, 4);
}

void ivfpq_sketch_query_make(const ivfpq_segment *s, const float *query, float *x, ivfpq_sketch_query *out) {
  const ivfpq_params *h = &s->params;
  ivfpq_table t = {.x = x, .bytes = out->bytes};
  ivfpq_table_query(s, query, &t);
  out->step = t.step8, out->qq = t.qq, out->constant = t.constant;
  out->norm = sqrtf(kern_get()->dot_f32(x, x, h->dim));
  for (uint32_t j = 0; j < h->dim_padded; j++) x[j] -= t.step8 * t.bytes[j];
  out->fine_step = kern_get()->quantize_i8(x, h->dim_padded, out->fine);
}

void ivfpq_sketch_compare(const ivfpq_segment *s, const ivfpq_sketch_query *q, const uint8_t *record, float *est, float *width) {
  const kern *k = kern_get();
  uint32_t coded = ivfpq_coded_dim(&s->params);
  int dot = s->params.metric == IVFPQ_DOT;
  float tail[2];
  memcpy(tail, record + coded, sizeof tail);
  float product = q->step * (float)k->dot_i8(q->bytes, record, coded) + q->fine_step * (float)k->dot_i8(q->fine, record, coded);
  float d = q->qq + tail[1] - 2 * tail[0] * product, spread = dot ? q->norm : sqrtf(d > 0 ? d : 0),
        lost = dot ? 0 : (float)coded * tail[0] * tail[0] / 12;
  *est = d + q->constant - lost;
  *width = SIGMAS * 2 * spread * tail[0] / sqrtf(12) + lost + 1e-5f * (q->qq + tail[1]); /* floats round, too */
}

vs_rc ivfpq_sketch_estimate(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *est, float *width, vs_err *err) {
  size_t room = ivfpq_round(ivfpq_coded_dim(&s->params), 64);
  float *x = calloc(room + 16, sizeof *x);
  ivfpq_sketch_query q = {.bytes = calloc(room, 1), .fine = calloc(room, 1)};
  vs_rc rc = x && q.bytes && q.fine ? VS_OK : vs_nomem(err);
  if (!rc) ivfpq_sketch_query_make(s, query, x, &q);
  for (size_t i = 0; i < n; i++) ivfpq_sketch_want(s, rows[i]);
  for (size_t i = 0; i < n + AHEAD && !rc; i++) {
    const uint8_t *record;
    if (i < n) ivfpq_sketch_prefetch(s, rows[i]);
    if (i < AHEAD) continue;
    rc = ivfpq_sketch_mapped(s, rows[i - AHEAD], &record, err);
    if (!rc) ivfpq_sketch_compare(s, &q, record, &est[i - AHEAD], &width[i - AHEAD]);
  }
  free(x), free(q.bytes), free(q.fine);
  return rc;
}
