/* ivfpq_train.c - k-means for coarse centroids and code words.
 *
 * Work is cut into slices of fixed size and sums are added up slice by slice, so the result depends on the data, the seed and
 * the kernel variant alone, never on the number of threads or on their timing.
 */
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_int.h"

enum { SLICE = 512 }; /* rows per task */

uint64_t ivfpq_rng_next(ivfpq_rng *r) {
  uint64_t z = (r->state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
uint64_t ivfpq_rng_below(ivfpq_rng *r, uint64_t n) { return n ? ivfpq_rng_next(r) % n : 0; }

void ivfpq_half_norms(const float *c, size_t n, size_t dim, float *bias) {
  const kern *k = kern_get();
  memset(bias, 0, ivfpq_round(n, 16) * sizeof *bias);
  for (size_t i = 0; i < n; i++) bias[i] = -0.5f * k->dot_f32(c + i * dim, c + i * dim, dim);
}

typedef struct assign_job {
  const float *x, *packed, *bias;
  size_t n, stride, dim, k;
  uint32_t *id;
} assign_job;

static void assign_slice(void *ctx, size_t i) {
  const assign_job *a = ctx;
  size_t at = i * SLICE, n = a->n - at < SLICE ? a->n - at : SLICE;
  kern_get()->argmax_f32(a->x + at * a->stride, n, a->stride, a->dim, a->packed, a->bias, a->k, a->id + at, NULL);
}

void ivfpq_assign(const float *x, size_t n, size_t stride, size_t dim, const float *packed, const float *bias, size_t k,
                  int threads, uint32_t *id) {
  assign_job a = {x, packed, bias, n, stride, dim, k, id};
  vs_pool_run((n + SLICE - 1) / SLICE, threads, assign_slice, &a);
}

/* Distinct random rows while there are enough (Floyd would do; a partial shuffle is as cheap here). */
static vs_rc pick_rows(const ivfpq_kmeans *p, float *c, vs_err *err) {
  ivfpq_rng rng = {p->seed};
  uint32_t *order = malloc(p->n * sizeof *order);
  if (!order) return vs_nomem(err);
  for (size_t i = 0; i < p->n; i++) order[i] = (uint32_t)i;
  for (size_t i = 0; i < p->k; i++) {
    size_t at = i < p->n ? i + ivfpq_rng_below(&rng, p->n - i) : ivfpq_rng_below(&rng, p->n);
    uint32_t row = order[at];
    if (i < p->n) order[at] = order[i], order[i] = row;
    memcpy(c + i * p->dim, p->x + row * p->stride, p->dim * sizeof *c);
  }
  free(order);
  return VS_OK;
}

/* Rows sorted by cluster (counting sort), so that each cluster is summed by one task in row order. */
typedef struct mean_job {
  const ivfpq_kmeans *p;
  const uint32_t *order, *start; /* start has k + 1 entries */
  float *c;
} mean_job;

static void mean_of_cluster(void *ctx, size_t i) {
  const mean_job *m = ctx;
  size_t dim = m->p->dim, n = m->start[i + 1] - m->start[i];
  float *c = m->c + i * dim;
  if (!n) return;
  memset(c, 0, dim * sizeof *c);
  for (uint32_t at = m->start[i]; at < m->start[i + 1]; at++) {
    const float *x = m->p->x + m->order[at] * m->p->stride;
    for (size_t j = 0; j < dim; j++) c[j] += x[j];
  }
  for (size_t j = 0; j < dim; j++) c[j] /= (float)n;
}

static void mean_slice(void *ctx, size_t i) {
  const mean_job *m = ctx;
  for (size_t c = i * 16; c < i * 16 + 16 && c < m->p->k; c++) mean_of_cluster(ctx, c);
}

/* n: scratch, k counts. */
static void split_empty(const ivfpq_kmeans *p, const uint32_t *start, uint32_t *n, float *c) {
  for (size_t i = 0; i < p->k; i++) n[i] = start[i + 1] - start[i];
  for (size_t i = 0; i < p->k; i++) {
    size_t big = 0;
    if (n[i]) continue;
    for (size_t b = 1; b < p->k; b++)
      if (n[b] > n[big]) big = b;
    if (n[big] < 2) break;
    for (size_t j = 0; j < p->dim; j++) {
      float e = (j & 1 ? 1 : -1) * 1e-3f;
      c[i * p->dim + j] = c[big * p->dim + j] * (1 + e);
      c[big * p->dim + j] *= 1 - e;
    }
    n[i] = n[big] / 2, n[big] -= n[i];
  }
}

static void sort_by_cluster(const uint32_t *id, size_t n, size_t k, uint32_t *start, uint32_t *order) {
  memset(start, 0, (k + 1) * sizeof *start);
  for (size_t i = 0; i < n; i++) start[id[i] + 1]++;
  for (size_t i = 0; i < k; i++) start[i + 1] += start[i];
  for (size_t i = 0; i < n; i++) order[start[id[i]]++] = (uint32_t)i;
  memmove(start + 1, start, k * sizeof *start);
  start[0] = 0;
}

vs_rc ivfpq_kmeans_run(const ivfpq_kmeans *p, float *c, vs_err *err) {
  size_t n = p->n, lanes = ivfpq_round(p->k, 16);
  uint32_t *id = malloc(n * sizeof *id + 1), *order = malloc(n * sizeof *order + 1), *start = malloc((p->k + 1) * sizeof *start);
  uint32_t *counts = malloc(p->k * sizeof *counts + 1);
  float *packed = malloc(kern_packed_len(p->k, p->dim) * sizeof *packed), *bias = malloc(lanes * sizeof *bias);
  vs_rc rc = id && order && start && counts && packed && bias ? VS_OK : vs_nomem(err);
  if (!rc && !n) rc = vs_fail(err, VS_INVALID, "k-means needs at least one row");
  if (!rc) rc = pick_rows(p, c, err);
  for (int t = 0; t < p->iterations && !rc; t++) {
    kern_pack_f32(c, p->k, p->dim, packed);
    ivfpq_half_norms(c, p->k, p->dim, bias);
    /* in stretches, so that a Ctrl-C is seen soon */
    for (size_t at = 0; at < n && !rc; at += 16 * SLICE) {
      size_t m = n - at < 16 * SLICE ? n - at : 16 * SLICE;
      ivfpq_assign(p->x + at * p->stride, m, p->stride, p->dim, packed, bias, p->k, p->threads, id + at);
      if (p->stop && p->stop(p->stop_ctx)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
    }
    if (rc) break;
    sort_by_cluster(id, n, p->k, start, order);
    mean_job m = {p, order, start, c};
    vs_pool_run((p->k + 15) / 16, p->threads, mean_slice, &m);
    split_empty(p, start, counts, c);
  }
  free(id), free(order), free(start), free(counts), free(packed), free(bias);
  return rc;
}
