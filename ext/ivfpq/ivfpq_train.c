/* ivfpq_train.c - k-means for coarse centroids and code words.
 *
 * Lloyd's iterations from random rows; the first ones look at a part of the rows only. The nearest centroids are found by bytes where the
 * CPU has instructions for that (kern_nearest, not exact): a row between two centroids may go to the second one, which moves neither.
 * After each iteration but the last two, the smallest clusters give up their place to rows of the largest ones: this fills empty
 * clusters and evens out the lists, of which the longest cost a query most. Measured on the set of 1,000,000 x 128 with 4,000
 * centroids (recall@10 in the 2,000 nearest rows, longest list in means): 8 plain iterations .932, 4.2; as here .939, 3.7 in 7/10 of the
 * time; 20 plain ones .940.
 *
 * Groups. From GROUPED_FROM centroids on, a row meets those of the near groups only (kern_grouped; how far it looks stands there), in
 * training and when it gets its list in the end. Rows in another list than the nearest and what they lose in squared distance, us a
 * row against all centroids (one busy core): 4,000 x 128 .7 %, .02 %, .85 against 1.53; 2,191 x 960 .6 %, .07 %, 3.3 against 4.7;
 * 14,142 x 960 .4 %, .02 %, 16 against 24. recall@10 at nprobe 32 and 64, refine 20, of 300,000 x 960 with 15 rows of sample per
 * centroid, two seeds: .9495 .9768 and .9458 .9767 with all centroids, .9520 .9751 and .9458 .9750 so; at four fifths of the reach .9456
 * .9752 and .9412 .9699. Of 1,000,000 x 128 .9756 .9878, .9752 .9878 so.
 *
 * Work is cut into slices of fixed size and sums are added up slice by slice, so the result depends on the data, the seed and
 * the kernel variant alone, never on the number of threads or on their timing.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_int.h"

enum {
  SLICE = KERN_NEAREST_ROWS, /* rows per task */
  STRETCH = 16 * SLICE,      /* rows between two looks at `stop` */
  WARM_ROWS = 8,             /* per centroid: fewer are not worth an iteration */
  GROUPED_FROM = 3072,       /* centroids: fewer meet every row, which costs little then, and loses nothing */
  GROUP_ITERATIONS = 4
};

/* The first iterations look at every fourth, then at every other row only: they move centroids far, and roughly is enough. */
static const size_t warm[] = {4, 4, 4, 2};

#define LARGE 2.5 /* times the mean size: such a cluster is cut, */
#define SMALL .25 /* and such a one gives its centroid away */

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

/* Counting sort of n rows by their cluster, stable: order, and k + 1 places in it. */
static void sort_by_cluster(const uint32_t *id, size_t n, size_t k, uint32_t *order, uint32_t *start) {
  memset(start, 0, (k + 1) * sizeof *start);
  for (size_t i = 0; i < n; i++) start[id[i] + 1]++;
  for (size_t i = 0; i < k; i++) start[i + 1] += start[i];
  for (size_t i = 0; i < n; i++) order[start[id[i]]++] = (uint32_t)i;
  memmove(start + 1, start, k * sizeof *start);
  start[0] = 0;
}

/* ---- the nearest centroid ---- */

/* About 1.5 * sqrt(k) groups of about as many centroids. */
static vs_rc open_grouped(ivfpq_finder *f, const float *c, size_t k, size_t dim, vs_err *err) {
  size_t n = (size_t)lround(1.5 * sqrt((double)k));
  ivfpq_kmeans groups = {.x = c, .n = k, .stride = dim, .dim = dim, .k = n, .iterations = GROUP_ITERATIONS, .threads = 1, .seed = k};
  float *centres = malloc(n * dim * sizeof *centres);
  uint32_t *id = malloc(k * sizeof *id), *order = malloc(k * sizeof *order), *start = malloc((n + 1) * sizeof *start);
  ivfpq_finder near = {.mem = NULL};
  f->mem = malloc(kern_grouped_bytes(k, n, dim));
  vs_rc rc = centres && id && order && start && f->mem ? ivfpq_kmeans_run(&groups, centres, err) : vs_nomem(err);
  if (!rc) rc = ivfpq_finder_open(&near, centres, n, dim, err);
  if (!rc) rc = ivfpq_finder_find_all(&near, c, k, dim, 0, 1, NULL, NULL, id, err);
  if (!rc) {
    sort_by_cluster(id, k, n, order, start);
    kern_grouped_init(&f->grouped, c, dim, order, start, centres, n, f->mem);
  }
  ivfpq_finder_close(&near);
  free(centres), free(id), free(order), free(start);
  if (rc) ivfpq_finder_close(f);
  return rc;
}

vs_rc ivfpq_finder_open(ivfpq_finder *f, const float *c, size_t k, size_t dim, vs_err *err) {
  *f = (ivfpq_finder){.mem = NULL};
  if (k >= GROUPED_FROM && kern_grouped_works()) return open_grouped(f, c, k, dim, err);
  f->mem = malloc(kern_nearest_bytes(k, dim));
  if (!f->mem) return vs_nomem(err);
  kern_nearest_init(&f->m, c, k, dim, f->mem);
  return VS_OK;
}
void ivfpq_finder_close(ivfpq_finder *f) { free(f->mem), f->mem = NULL; }

vs_rc ivfpq_finder_find(const ivfpq_finder *f, const float *x, size_t n, size_t stride, int exact, uint32_t *id, vs_err *err) {
  int grouped = f->grouped.n_groups != 0;
  void *scratch = malloc(grouped ? kern_grouped_scratch(&f->grouped) : kern_nearest_scratch(&f->m));
  if (!scratch) return vs_nomem(err);
  if (grouped) kern_grouped_find(&f->grouped, x, n, stride, id, scratch);
  else kern_nearest_find(&f->m, x, n, stride, exact, id, scratch);
  free(scratch);
  return VS_OK;
}

typedef struct find_job {
  const ivfpq_finder *f;
  const float *x;
  size_t n, stride;
  int exact, failed;
  uint32_t *id;
} find_job;

static void find_slice(void *ctx, size_t i) {
  find_job *j = ctx;
  size_t at = i * SLICE, n = j->n - at < SLICE ? j->n - at : SLICE;
  if (ivfpq_finder_find(j->f, j->x + at * j->stride, n, j->stride, j->exact, j->id + at, NULL))
    __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
}

vs_rc ivfpq_finder_find_all(const ivfpq_finder *f, const float *x, size_t n, size_t stride, int exact, int threads, ivfpq_stop stop,
                            void *stop_ctx, uint32_t *id, vs_err *err) {
  for (size_t at = 0; at < n; at += STRETCH) {
    find_job j = {f, x + at * stride, n - at < STRETCH ? n - at : STRETCH, stride, exact, 0, id + at};
    vs_pool_run((j.n + SLICE - 1) / SLICE, threads, find_slice, &j);
    if (j.failed) return vs_nomem(err);
    if (stop && stop(stop_ctx)) return vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  return VS_OK;
}

/* ---- k-means ---- */

/* Distinct random rows while there are enough (Floyd would do; a partial shuffle is as cheap here). */
static vs_rc pick_rows(const ivfpq_kmeans *p, ivfpq_rng *rng, float *c, vs_err *err) {
  uint32_t *order = malloc(p->n * sizeof *order);
  if (!order) return vs_nomem(err);
  for (size_t i = 0; i < p->n; i++) order[i] = (uint32_t)i;
  for (size_t i = 0; i < p->k; i++) {
    size_t at = i < p->n ? i + ivfpq_rng_below(rng, p->n - i) : ivfpq_rng_below(rng, p->n);
    uint32_t row = order[at];
    if (i < p->n) order[at] = order[i], order[i] = row;
    memcpy(c + i * p->dim, p->x + row * p->stride, p->dim * sizeof *c);
  }
  free(order);
  return VS_OK;
}

/* What an iteration works on: rows 0, step, 2 step, ... of p->x. */
typedef struct lloyd {
  const ivfpq_kmeans *p;
  size_t n, stride;
  float *c;
  uint32_t *id, *order, *start; /* row -> cluster; rows by cluster; k + 1 places in it */
  uint32_t *by_size;            /* clusters, the smallest first */
} lloyd;

static uint32_t size_of(const lloyd *l, size_t c) { return l->start[c + 1] - l->start[c]; }

static void mean_slice(void *ctx, size_t i) {
  const lloyd *l = ctx;
  size_t dim = l->p->dim;
  for (size_t c = i * 16; c < i * 16 + 16 && c < l->p->k; c++) {
    uint32_t n = size_of(l, c);
    float *to = l->c + c * dim, inv = n ? 1 / (float)n : 0;
    if (!n) continue;
    kern_sum_rows_f32(l->p->x, l->stride, l->order + l->start[c], n, dim, to);
    for (size_t j = 0; j < dim; j++) to[j] *= inv;
  }
}

/* Clusters by size, in place of a sort: sizes are small numbers around n / k. */
static void order_by_size(const lloyd *l, uint32_t *count) {
  size_t k = l->p->k, top = 8 * l->n / k + 1; /* larger ones share the last place */
  memset(count, 0, (top + 2) * sizeof *count);
  for (size_t c = 0; c < k; c++) count[(size_of(l, c) < top ? size_of(l, c) : top) + 1]++;
  for (size_t i = 0; i < top + 1; i++) count[i + 1] += count[i];
  for (size_t c = 0; c < k; c++) l->by_size[count[size_of(l, c) < top ? size_of(l, c) : top]++] = (uint32_t)c;
}

/* The smallest clusters give up their place to rows of the largest ones, which so are cut. */
static void reseed(const lloyd *l, ivfpq_rng *rng, uint32_t *count) {
  size_t k = l->p->k, small = 0;
  double mean = (double)l->n / (double)k;
  order_by_size(l, count);
  for (size_t b = k; b-- > 0;) {
    uint32_t big = l->by_size[b], n = size_of(l, big);
    size_t cuts = (size_t)(n / (LARGE * mean));
    for (; cuts; cuts--, small++) {
      uint32_t to = l->by_size[small];
      if (small >= b || size_of(l, to) > SMALL * mean) break;
      uint32_t row = l->order[l->start[big] + ivfpq_rng_below(rng, n)];
      memcpy(l->c + to * l->p->dim, l->p->x + row * l->stride, l->p->dim * sizeof *l->c);
    }
    if (small >= b || size_of(l, l->by_size[small]) > SMALL * mean || n <= 1) break;
  }
}

static vs_rc iterate(lloyd *l, size_t step, vs_err *err) {
  const ivfpq_kmeans *p = l->p;
  ivfpq_finder f;
  l->n = p->n / step, l->stride = p->stride * step;
  vs_rc rc = ivfpq_finder_open(&f, l->c, p->k, p->dim, err);
  if (rc) return rc;
  rc = ivfpq_finder_find_all(&f, p->x, l->n, l->stride, 0, p->threads, p->stop, p->stop_ctx, l->id, err);
  ivfpq_finder_close(&f);
  if (rc) return rc;
  sort_by_cluster(l->id, l->n, p->k, l->order, l->start); /* so that each cluster is summed by one task in row order */
  vs_pool_run((p->k + 15) / 16, p->threads, mean_slice, l);
  return VS_OK;
}

vs_rc ivfpq_kmeans_run(const ivfpq_kmeans *p, float *c, vs_err *err) {
  size_t n = p->n, k = p->k;
  lloyd l = {.p = p, .c = c, .id = malloc(n * 4 + 1), .order = malloc(n * 4 + 1), .start = malloc((k + 1) * 4), .by_size = malloc(k * 4 + 1)};
  uint32_t *count = malloc((8 * (n / (k ? k : 1) + 1) + 16) * sizeof *count);
  ivfpq_rng rng = {p->seed};
  vs_rc rc = l.id && l.order && l.start && l.by_size && count ? VS_OK : vs_nomem(err);
  if (!rc && !n) rc = vs_fail(err, VS_INVALID, "k-means needs at least one row");
  if (!rc) rc = pick_rows(p, &rng, c, err);
  for (size_t t = 0; t < sizeof warm / sizeof *warm && !rc; t++) {
    if (n / warm[t] < WARM_ROWS * k) continue;
    rc = iterate(&l, warm[t], err);
    if (!rc) reseed(&l, &rng, count);
  }
  for (int t = 0; t < p->iterations && !rc; t++) {
    rc = iterate(&l, 1, err);
    if (!rc && t + 2 < p->iterations) reseed(&l, &rng, count);
  }
  free(l.id), free(l.order), free(l.start), free(l.by_size), free(count);
  return rc;
}

/* ---- code words ---- */

/* Means of the rows of each word; a word without rows takes a random row. */
static void move_words(const float *x, size_t n, size_t dim, size_t k, const uint8_t *code, ivfpq_rng *rng, float *sum, uint32_t *count, float *c) {
  memset(sum, 0, k * dim * sizeof *sum);
  memset(count, 0, k * sizeof *count);
  for (size_t i = 0; i < n; i++, x += dim) {
    float *to = sum + code[i] * dim;
    for (size_t e = 0; e < dim; e++) to[e] += x[e];
    count[code[i]]++;
  }
  x -= n * dim;
  for (size_t w = 0; w < k; w++) {
    const float *row = x + ivfpq_rng_below(rng, n) * dim;
    float inv = count[w] ? 1 / (float)count[w] : 0;
    for (size_t e = 0; e < dim; e++) c[w * dim + e] = count[w] ? sum[w * dim + e] * inv : row[e];
  }
}

vs_rc ivfpq_words_run(const ivfpq_kmeans *p, float *c, vs_err *err) {
  enum { WARM_PART = 4, WARM = 4, WARM_WORD_ROWS = 24 };
  size_t n = p->n, dim = p->dim, k = p->k;
  float *x = malloc(n * dim * sizeof *x + 1), *sum = malloc(k * dim * sizeof *sum + 1);
  uint8_t *code = malloc(n + 1);
  uint32_t *count = malloc(k * sizeof *count + 1);
  void *mem = malloc(kern_words_bytes(1, k, dim));
  ivfpq_rng rng = {p->seed};
  vs_rc rc = x && sum && code && count && mem ? VS_OK : vs_nomem(err);
  if (!rc && !n) rc = vs_fail(err, VS_INVALID, "k-means needs at least one row");
  if (!rc) rc = pick_rows(p, &rng, c, err);
  /* side by side, and so that every WARM_PART-th row of the sample comes first */
  for (size_t first = 0, at = 0; first < WARM_PART && !rc; first++)
    for (size_t i = first; i < n; i += WARM_PART, at++) memcpy(x + at * dim, p->x + i * p->stride, dim * sizeof *x);
  int warm_up = n / WARM_PART >= WARM_WORD_ROWS * k ? WARM : 0;
  for (int t = 0; t < warm_up + p->iterations && !rc; t++) {
    size_t rows = t < warm_up ? n / WARM_PART : n;
    kern_words w;
    kern_words_init(&w, c, 1, k, dim, mem);
    kern_words_find(&w, x, rows, dim, code, 1);
    move_words(x, rows, dim, k, code, &rng, sum, count, c);
  }
  free(x), free(sum), free(code), free(count), free(mem);
  return rc;
}
