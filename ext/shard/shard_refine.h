/* shard_refine.h - the second phase of a search: candidates of all segments are compared by their stored vectors. */
#ifndef SHARD_REFINE_H
#define SHARD_REFINE_H
#include "shard.h"

typedef struct shard_refine {
  const shard_search *q;
  uint64_t k;
  int (*stop)(void *ctx);
  void *stop_ctx;
  ivfpq_keys *work;   /* memory: what it holds is overwritten */
} shard_refine;

/* hits[0..*n): candidates in any order, `distance` their estimate. Becomes the k nearest of them by true distance, in the order of
 * shard_hit_order; *refined says how many vectors were looked at. Rows in stores are read in one round. */
vs_rc shard_refine_run(const shard_refine *r, shard_hit *hits, size_t *n, uint64_t *refined, vs_err *err) VS_WARN_UNUSED;

/* Starts reading all rows that lie in stores; what is compared before shard_release is found in the cache. */
typedef struct shard_held { shard_hit *hits; ivfpq_row *rows; size_t n; } shard_held;
vs_rc shard_hold(const shard_search *q, const shard_hit *hits, size_t n, shard_held *h, vs_err *err) VS_WARN_UNUSED;
void shard_release(const shard_search *q, shard_held *h); /* also after a failure */

/* Leaves the k nearest in the order of shard_hit_order; distances are true. */
vs_rc shard_keep_nearest(const shard_refine *r, shard_hit *hits, size_t *n, vs_err *err) VS_WARN_UNUSED;
int shard_storage_order(const void *a, const void *b); /* (shard, segment, row) */
enum {
  SHARD_MANY = 4096 /* candidates from which on it pays to read them in storage order */
};

/* Do sketches leave out enough of n candidates? Making those of a query costs as much as five rows of 960 dimensions, and of 20
 * candidates for 10 results they leave 14: then rows alone take 3 % less of a search (300,000 x 960); of 30 candidates, 1 % more. */
static inline int shard_sketches_pay(size_t n, uint64_t k) { return n > 2 * k + 8; }

/* The candidates of many queries at once. Rows that several want are read once. */
typedef struct shard_found { shard_hit *hits; size_t n, room; } shard_found; /* of one query */
vs_rc shard_refine_many(const shard_refine *r, const float *queries, shard_found *found, size_t n, uint64_t *refined,
                        vs_err *err) VS_WARN_UNUSED;

/* (distance, shard, segment, row) */
int shard_hit_order(const void *a, const void *b);
/* Leaves the k nearest in order; of equal distances those that come first in hits. */
vs_rc shard_hits_nearest(shard_hit *hits, size_t *n, uint64_t k, ivfpq_keys *work, vs_err *err) VS_WARN_UNUSED;

#endif
