/* ivfpq_batch.h - many queries on one segment: each gets the very rows that it would get alone.
 *
 * In steps, as a scan (ivfpq_search.h), so that segments in stores share their rounds of reads: the groups that any query ranks are
 * one round, the partitions that any of them probes are the next, each read once. A local segment takes one step.
 */
#ifndef IVFPQ_BATCH_H
#define IVFPQ_BATCH_H
#include "ivfpq_search.h"

typedef struct ivfpq_batch_plan {
  ivfpq_query query;    /* what all queries share: everything but `vector`; no probe. stop: asked on any thread. */
  const float *vectors; /* n x params.dim */
  size_t n;
  int threads;          /* 0: vs_threads() */
  uint64_t held_bytes;  /* of partitions in a store that may be held at once; more rounds when all take more */
  /* Takes the best estimates of one query (distances, when exact), unordered. Called once per query, from several threads. */
  vs_rc (*take)(void *ctx, size_t query, const uint64_t *keys, size_t n, vs_err *err);
  void *take_ctx;
} ivfpq_batch_plan;

/* s, the vectors and stats must outlive the batch; the plan is copied. */
typedef struct ivfpq_batch ivfpq_batch;
vs_rc ivfpq_batch_open(ivfpq_segment *s, const ivfpq_batch_plan *p, ivfpq_stats *stats, ivfpq_batch **out, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_batch_step(ivfpq_batch *b, int *more, vs_err *err) VS_WARN_UNUSED;
void ivfpq_batch_close(ivfpq_batch *b); /* NULL is legal */

#endif
