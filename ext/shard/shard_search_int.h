/* shard_search_int.h - what one search (shard_search.c) and many (shard_batch.c) share. */
#ifndef SHARD_SEARCH_INT_H
#define SHARD_SEARCH_INT_H
#include <pthread.h>

#include "shard.h"

/* VS_INVALID for a query that has no neighbours, and for one of another dimension than a shard's. */
vs_rc shard_check_query(const shard_search *q, const float *query, vs_err *err) VS_WARN_UNUSED;
vs_rc shard_check_dims(const shard_search *q, size_t *n_segments, uint64_t *n_rows, vs_err *err) VS_WARN_UNUSED;
/* Brute force over shards in stores that cannot end well is refused before it reads a byte. */
vs_rc shard_check_bytes(uint64_t bytes, vs_err *err) VS_WARN_UNUSED;

/* Is the search to stop? Asked on any thread; the scope of the caller's thread only there, because it may ask SQLite. */
typedef struct shard_stop {
  vs_scope inner, *outer; /* inner: that of the search */
  pthread_t caller;
  int stop;               /* set once by the caller's thread, read by all */
} shard_stop;
void shard_stop_enter(shard_stop *s);
void shard_stop_leave(shard_stop *s);
int shard_stop_poll(void *ctx); /* a shard_stop */

/* The n_best hits with the smallest estimates, in the order they had. */
vs_rc shard_keep_best(shard_hit *hits, size_t *n, uint64_t n_best, ivfpq_keys *work, vs_err *err) VS_WARN_UNUSED;
/* Equal distances within a shard come in the order of their ids. */
vs_rc shard_order_ties(const shard_search *q, shard_hit *hits, size_t n, vs_err *err) VS_WARN_UNUSED;
/* 1: some of it lies in a store, and will be read anew. */
int shard_forget_remote(const shard_search *q);

/* Counts what the refining between the two calls takes. */
typedef struct shard_refine_mark { vs_traffic traffic; int64_t us; } shard_refine_mark;
void shard_refine_begin(shard_refine_mark *m);
void shard_refine_end(const shard_refine_mark *m, shard_stats *stats);

#endif
