/* ivfpq_format.c - the small arithmetic of the segment format; see ivfpq_format.h. */
#include "ivfpq_format.h"

#include <math.h>

#include "../kernels/kern.h"

uint64_t ivfpq_check(const void *p, size_t n) { return kern_get()->xxh3(p, n); }
uint64_t ivfpq_key_int(int64_t id) { return (uint64_t)id ^ (1ull << 63); }
uint64_t ivfpq_key_text(const void *text, size_t n) { return kern_get()->xxh3(text, n); }

uint32_t ivfpq_iddir_levels(uint64_t n_rows, uint64_t pages[8]) {
  uint32_t levels = 0;
  uint64_t n = (n_rows + IVFPQ_LEAF_MAX - 1) / IVFPQ_LEAF_MAX;
  if (!n_rows) return 0;
  pages[levels++] = n;
  while (n > 1 && levels < 8) {
    n = (n + IVFPQ_FENCE_MAX - 1) / IVFPQ_FENCE_MAX;
    pages[levels++] = n;
  }
  return levels;
}

static double slow_distance(ivfpq_metric metric, const float *a, const float *b, uint32_t dim) {
  double dot = 0, aa = 0, bb = 0, dd = 0;
  for (uint32_t j = 0; j < dim; j++) {
    double x = a[j], y = b[j];
    dot += x * y, aa += x * x, bb += y * y, dd += (x - y) * (x - y);
  }
  if (metric == IVFPQ_L2) return sqrt(dd);
  if (metric == IVFPQ_DOT) return -dot;
  return aa > 0 && bb > 0 ? 1 - dot / (sqrt(aa) * sqrt(bb)) : 1;
}

double ivfpq_distance_by(const kern *k, ivfpq_metric metric, const float *a, const float *b, uint32_t dim, const void *next) {
  if (metric == IVFPQ_L2) {
    float d = next ? k->l2sq_ahead_f32(a, b, dim, next) : k->l2sq_f32(a, b, dim);
    if (d > IVFPQ_SAFE_MIN && d < IVFPQ_SAFE_MAX) return sqrt((double)d);
  } else if (metric == IVFPQ_DOT) {
    float d = next ? k->dot_ahead_f32(a, b, dim, next) : k->dot_f32(a, b, dim);
    if (fabsf(d) < IVFPQ_SAFE_MAX) return -(double)d;
  } else {
    float d[3];
    if (next) k->cosine_ahead_f32(a, b, dim, next, d);
    else k->cosine_f32(a, b, dim, d);
    if (d[1] > IVFPQ_SAFE_MIN && d[2] > IVFPQ_SAFE_MIN && d[1] < IVFPQ_SAFE_MAX && d[2] < IVFPQ_SAFE_MAX && fabsf(d[0]) < IVFPQ_SAFE_MAX)
      return 1 - (double)d[0] / (sqrt((double)d[1]) * sqrt((double)d[2]));
  }
  return slow_distance(metric, a, b, dim);
}

double ivfpq_distance(ivfpq_metric metric, const float *a, const float *b, uint32_t dim) {
  return ivfpq_distance_by(kern_get(), metric, a, b, dim, NULL);
}
