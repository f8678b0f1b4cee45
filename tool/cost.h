/* cost.h - what a database of a planned size takes: bytes, build time, requests, dollars. */
#ifndef COST_H
#define COST_H
#include "../ext/ivfpq/ivfpq_size.h"

typedef struct cost_prices {
  double gb_month;              /* stored; a GB is 2^30 bytes */
  double gets_1000, puts_1000;  /* requests; LIST costs what PUT does */
  double vcpu_hour;
} cost_prices;

typedef struct cost_question {
  ivfpq_build_options build;    /* metric, store_f16, nlist, subs, bits */
  int sqrt_nlist;               /* nlist: the root of a shard's rows */
  ivfpq_outline rows;           /* of the whole database */
  uint64_t bucket_rows, k;
  int64_t nprobe, refine;       /* -1: the defaults */
  double vectors_per_cpu_second; /* 0: estimated */
  cost_prices prices;
} cost_question;

typedef struct cost_reads { double rounds, requests, lists, bytes, dollars; } cost_reads; /* requests: all, lists among them */

typedef struct cost_answer {
  uint64_t n_shards;
  ivfpq_outline shard;          /* the rows of one: all are taken to be of one size */
  ivfpq_params params;          /* of its segment */
  uint64_t section[IVFPQ_N_SECTIONS];
  uint64_t segment_bytes, hint_bytes, shard_bytes, temp_bytes;
  double n_bytes;               /* all shards, as published */
  double storage_dollars;       /* a month */
  double vectors_per_cpu_second, cpu_hours, build_dollars;
  uint32_t measured_dim, measured_nlist; /* the build that the speed was scaled from; 0: it was given */
  double put_requests, put_dollars;      /* publishing */
  uint32_t nprobe;
  uint64_t n_candidates;
  double rows_scanned, query_cpu_s, query_cpu_dollars;
  cost_reads cold, warm;        /* a query of the whole database; with dollars of requests alone */
} cost_answer;

/* VS_INVALID for what cannot be built. */
vs_rc cost_estimate(const cost_question *q, cost_answer *out, vs_err *err) VS_WARN_UNUSED;

#endif
