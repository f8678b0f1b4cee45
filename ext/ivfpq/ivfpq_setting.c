/* ivfpq_setting.c - see ivfpq_setting.h. */
#include "ivfpq_setting.h"

#include <math.h>
#include <string.h>

/* The first level that reaches r; NULL: none does. */
static const ivfpq_level *level_for(const ivfpq_calibration *c, size_t curve, double recall) {
  const ivfpq_level *l = ivfpq_levels(c) + curve * c->n_levels;
  for (uint32_t i = 0; i < c->n_levels; i++)
    if (l[i].nprobe && l[i].recall >= (float)recall) return &l[i];
  return NULL;
}

static double between(double a, double b, double w) { return a * pow(b / a, w); }

int ivfpq_setting_for(const ivfpq_segment *s, uint64_t k, double recall, ivfpq_setting *out) {
  const ivfpq_calibration *c = s->calibration;
  size_t high = 0, low;
  if (!c || !k) return 0;
  while (high + 1 < IVFPQ_CURVES && c->k[high] < k) high++;
  low = high && c->k[high] > k ? high - 1 : high;
  const ivfpq_level *a = level_for(c, low, recall), *b = level_for(c, high, recall);
  if (!a || !b) return 0;
  /* between two curves on the scale of log k; beyond the last one the neighbours fill ever more partitions */
  double w = low == high ? 0 : log((double)k / c->k[low]) / log((double)c->k[high] / c->k[low]);
  double nprobe = between(a->nprobe, b->nprobe, w), candidates = between(a->n_candidates, b->n_candidates, w);
  if (k > c->k[high]) nprobe *= (double)k / c->k[high], candidates *= (double)k / c->k[high];
  out->nprobe = nprobe < s->params.nlist ? (uint32_t)ceil(nprobe) : s->params.nlist;
  out->n_candidates = candidates < (double)s->params.n_rows ? (uint64_t)ceil(candidates) : s->params.n_rows;
  out->reach = a->reach == 0 || b->reach == 0 ? 0 : a->reach > b->reach ? a->reach : b->reach;
  return 1;
}

float ivfpq_reach_for(const ivfpq_segment *s, uint32_t nprobe) {
  const ivfpq_calibration *c = s->calibration;
  if (!c) return 0;
  const ivfpq_reach *r = ivfpq_reaches(c);
  for (uint32_t i = 0; i < c->n_reach; i++)
    if (r[i].nprobe >= nprobe) return r[i].reach;
  return 0;
}
