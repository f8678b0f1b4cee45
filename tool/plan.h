/* plan.h - the plan that `pack` writes: which files become which bucket. Read by `build --plan` and `verify --plan`.
 *
 * {"bucket_rows":10000000,"dim":960,"embedding_dataset":"e","id_dataset":"i","buckets":[
 *  {"files":["/data/a.h5","/data/b.h5"],"rows":9876543},
 *  ...]}
 *
 * Only "buckets" with "files" must be there, so that a plan may be written by hand; "rows" is what the files held when the
 * plan was made; "dim" and the names of datasets are what `pack` was told or found, so that `build` need not be told again.
 */
#ifndef PLAN_H
#define PLAN_H
#include "tool.h"

enum { PLAN_MAX_BYTES = 1 << 30 };
#define PLAN_ROWS_UNKNOWN UINT64_MAX

typedef struct plan_bucket {
  tool_list files;
  uint64_t n_rows; /* or PLAN_ROWS_UNKNOWN */
} plan_bucket;

typedef struct plan {
  char *path;
  plan_bucket *buckets; /* bucket number I is buckets[I - 1] */
  size_t n;
  uint32_t dim;         /* 0: not said */
  char *embedding_dataset, *id_dataset; /* NULL: not said */
} plan;

/* VS_INVALID, naming the place, for what is no plan, and for a file that has two places in it. */
vs_rc plan_read(const char *path, plan *out, vs_err *err) VS_WARN_UNUSED;
void plan_reset(plan *p); /* legal on a zeroed struct */

/* 32 hex digits over the names of the files, in order, and the rows: a shard keeps them, and so tells what it was built
 * from. */
void plan_hash(const plan_bucket *b, char hash[33]);
/* The same of any text, such as the options of a build. */
void plan_hash_text(const char *text, char hash[33]);

#endif
