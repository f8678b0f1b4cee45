/* shard_search_int.h - what one search (shard_search.c) and many (shard_batch.c) share. */
#ifndef SHARD_SEARCH_INT_H
#define SHARD_SEARCH_INT_H
#include <pthread.h>

#include "shard.h"

/* What a search may spend: the same for every query. */
typedef struct shard_spend {
  const shard_search *q;
  uint64_t n_rows, k, n_candidates;
  size_t n_segments;
} shard_spend;
vs_rc shard_spend_init(shard_spend *s, const shard_search *q, vs_err *err) VS_WARN_UNUSED; /* VS_INVALID: another dimension */
/* What a segment is asked; vector and stop are left to the caller. */
ivfpq_query shard_spend_query(const shard_spend *s, uint32_t shard_no, const ivfpq_segment *segment);
/* Brute force over shards in stores that cannot end well is refused before it reads a byte. */
vs_rc shard_spend_check_exact(const shard_spend *s, vs_err *err) VS_WARN_UNUSED;
/* VS_INVALID for a query that has no neighbours. */
vs_rc shard_check_query(const shard_search *q, const float *query, vs_err *err) VS_WARN_UNUSED;

/* Is the search to stop? Asked on any thread; the scope of the caller's thread only there, because it may ask SQLite. */
typedef struct shard_stop {
  vs_scope inner, *outer; /* inner: what is done meanwhile */
  pthread_t caller;
  int stop;
} shard_stop;
void shard_stop_enter(shard_stop *s);
void shard_stop_leave(shard_stop *s);
int shard_stop_poll(void *ctx);

/* The n_best hits with the smallest estimates, in any order. */
vs_rc shard_keep_best(shard_hit *hits, size_t *n, uint64_t n_best, vs_err *err) VS_WARN_UNUSED;
/* Equal distances within a shard come in the order of their ids. */
vs_rc shard_order_ties(const shard_search *q, shard_hit *hits, size_t n, vs_err *err) VS_WARN_UNUSED;
/* 1: some of it lies in a store, and will be read anew. */
int shard_forget_remote(const shard_search *q);

/* Counts what the refining between the two calls takes. */
void shard_refine_begin(shard_stats *stats, vs_traffic *before, int64_t *start_us);
void shard_refine_end(shard_stats *stats, const vs_traffic *before, int64_t start_us);

#endif
