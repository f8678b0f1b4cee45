/* shard_recall.h - measures again, on the shards as they are, what searches of them find of the truth and what they cost.
 *
 * The queries are rows of the shards, spread evenly over all segments, each left out of its own answers; or vectors that the caller
 * has. The truth is an exact search. Settings are measured one after another: those that `recall = r` picks for a ladder of r, and
 * the default; settings that are the same are measured once.
 */
#ifndef SHARD_RECALL_H
#define SHARD_RECALL_H
#include "shard.h"

enum { SHARD_RECALL_QUERIES = 400 }; /* rows when nobody says how many: a mean of .95 is then sure to about .005 */

typedef struct shard_recall_plan {
  shard *const *shards;
  size_t n_shards;
  uint64_t k;               /* at least 1 */
  const float *queries;     /* n_queries vectors of the shards' dimension, which outlive the measurement; NULL: rows of the shards */
  size_t n_queries;         /* rows: 0 for SHARD_RECALL_QUERIES; fewer where there are not so many, or k is large */
  int threads;              /* for the truth and the recall; times are those of one thread. 0: vs_threads() */
  void (*progress)(void *ctx, const char *stage, uint64_t done, uint64_t total); /* NULL: none */
  void *progress_ctx;
} shard_recall_plan;

/* What is spent: by recall, or by nprobe and refine. */
typedef struct shard_recall_setting {
  double target;            /* 0: by nprobe and refine; where several targets pick the same setting, the highest */
  int64_t nprobe, refine;   /* -1: the defaults */
} shard_recall_setting;

typedef struct shard_recall_point {
  shard_recall_setting asked;
  uint64_t nprobe, refine;  /* that it comes to, in the segment that takes most; an exact search: all partitions, all rows */
  int exact;
  double recall;            /* mean share of the k nearest, 0 to 1; rows as near as the k-th count as one of them */
  double error;             /* its standard error, from how the queries differ */
  double ms, requests, bytes; /* of one query: see shard_recall.c */
} shard_recall_point;

typedef struct shard_recall shard_recall;

/* Takes the queries and finds the truth. *out is NULL when there is nothing to be found: no rows, or no other row. */
vs_rc shard_recall_open(const shard_recall_plan *plan, shard_recall **out, vs_err *err) VS_WARN_UNUSED;
void shard_recall_close(shard_recall *r); /* NULL is legal */
size_t shard_recall_n_queries(const shard_recall *r);

/* The next setting, those that take the least first; *more is 0 at the end, and out is not set then. */
vs_rc shard_recall_next(shard_recall *r, shard_recall_point *out, int *more, vs_err *err) VS_WARN_UNUSED;
/* Any setting; ms, requests and bytes are not measured. */
vs_rc shard_recall_of(shard_recall *r, const shard_recall_setting *s, shard_recall_point *out, vs_err *err) VS_WARN_UNUSED;

#endif
