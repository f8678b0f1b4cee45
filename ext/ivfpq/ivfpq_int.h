/* ivfpq_int.h - what only ext/ivfpq needs, by the file that implements it. */
#ifndef IVFPQ_INT_H
#define IVFPQ_INT_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"
#include "../kernels/kern.h"
#include "ivfpq_format.h"

/* ---- ivfpq_train.c: deterministic for a seed, whatever the number of threads ---- */

/* A random stream of its own: splitmix64 (Steele, Lea, Flood 2014). */
typedef struct ivfpq_rng { uint64_t state; } ivfpq_rng;
uint64_t ivfpq_rng_next(ivfpq_rng *r);
uint64_t ivfpq_rng_below(ivfpq_rng *r, uint64_t n);

typedef int (*ivfpq_stop)(void *ctx); /* non-zero: stop with VS_INTERRUPT; called on the caller's thread only */

/* Centroids made ready for many searches; they must stay. */
typedef struct ivfpq_finder {
  kern_nearest m;
  kern_grouped grouped; /* n_groups 0: m is used */
  void *mem;
} ivfpq_finder;
vs_rc ivfpq_finder_open(ivfpq_finder *f, const float *c, size_t k, size_t dim, vs_err *err) VS_WARN_UNUSED;
void ivfpq_finder_close(ivfpq_finder *f);
/* See kern_nearest_find, and kern_grouped_find where there are many centroids: then `exact` is not looked at. On this thread; */
vs_rc ivfpq_finder_find(const ivfpq_finder *f, const float *x, size_t n, size_t stride, int exact, uint32_t *id, vs_err *err) VS_WARN_UNUSED;
/* on several, stopping within a fraction of a second when asked to (stop may be NULL). */
vs_rc ivfpq_finder_find_all(const ivfpq_finder *f, const float *x, size_t n, size_t stride, int exact, int threads, ivfpq_stop stop,
                            void *stop_ctx, uint32_t *id, vs_err *err) VS_WARN_UNUSED;

/* k-means on n x dim rows (stride floats apart): k row-major centroids into c (k x dim). See ivfpq_train.c. k may exceed n: the rest
 * repeat rows. */
typedef struct ivfpq_kmeans {
  const float *x;
  size_t n, stride, dim, k;
  int iterations, threads; /* iterations over all rows; some over parts of them come before */
  uint64_t seed;
  ivfpq_stop stop;
  void *stop_ctx;
} ivfpq_kmeans;
vs_rc ivfpq_kmeans_run(const ivfpq_kmeans *p, float *c, vs_err *err) VS_WARN_UNUSED;

/* The same for code words: k is 16 or 256. On this thread; `threads` and `stop` are not looked at. */
vs_rc ivfpq_words_run(const ivfpq_kmeans *p, float *c, vs_err *err) VS_WARN_UNUSED;

/* bias[i] = -|c_i|^2/2 for n rows, padded to a multiple of 16 with zeros. */
void ivfpq_half_norms(const float *c, size_t n, size_t dim, float *bias);

/* ---- ivfpq_sort.c: external sort of fixed-size records ---- */
typedef struct ivfpq_record { uint64_t hi, lo, value; } ivfpq_record; /* ordered by (hi, lo, value) */
typedef struct ivfpq_sorter ivfpq_sorter;
/* Keeps at most `memory` bytes, spills sorted runs to unnamed temporary files in dir. */
vs_rc ivfpq_sorter_open(const char *dir, size_t memory, ivfpq_sorter **out, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_sorter_add(ivfpq_sorter *s, ivfpq_record r, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_sorter_finish(ivfpq_sorter *s, vs_err *err) VS_WARN_UNUSED; /* before the first next */
vs_rc ivfpq_sorter_next(ivfpq_sorter *s, ivfpq_record *r, int *more, vs_err *err) VS_WARN_UNUSED;
void ivfpq_sorter_close(ivfpq_sorter *s);
/* n bytes in large pages where there are any, to free(): these are cleared and mapped in a five-hundredth of the calls. */
void *ivfpq_large_alloc(size_t n);
/* An unnamed file that goes away with its descriptor. */
int ivfpq_tmpfile(const char *dir, vs_err *err);
vs_rc ivfpq_pwrite(int fd, const void *p, size_t n, uint64_t off, const char *name, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_pread(int fd, void *p, size_t n, uint64_t off, const char *name, vs_err *err) VS_WARN_UNUSED;

#endif
