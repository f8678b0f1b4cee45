/* shard_spend.h - what a search may spend in each segment: given by nprobe and refine, by a recall that is asked for, or by default. */
#ifndef SHARD_SPEND_H
#define SHARD_SPEND_H
#include "../ivfpq/ivfpq_setting.h"
#include "shard.h"

typedef struct shard_spend {
  uint64_t n_candidates; /* of all segments together that are compared by stored vectors */
  int exact;             /* nothing but an exact search of all segments will do */
} shard_spend;

/* For the k nearest of n_rows rows in all segments. out[i]: what segment i may spend; nprobe 0: its calibration does not reach the
 * recall, only comparing all of its stored vectors does. */
shard_spend shard_spend_plan(const shard_search *q, uint64_t k, uint64_t n_rows, ivfpq_segment *const *segments, size_t n,
                             ivfpq_setting *out);

/* The defaults: candidates of a search for the k nearest of n_rows, partitions of a segment. -1: not given. */
uint64_t shard_spend_candidates(uint64_t k, int64_t refine, uint64_t n_rows);
uint32_t shard_spend_nprobe(uint64_t k, int64_t nprobe, uint32_t nlist);

#endif
