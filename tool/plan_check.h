/* plan_check.h - is this shard, is this database, what the plan says? Answers from manifests and sizes of files, without
 * reading the rows: quick however large the shards, in folders and in stores. */
#ifndef PLAN_CHECK_H
#define PLAN_CHECK_H
#include "../ext/shard/shard_manifest.h"
#include "plan.h"

/* Is the shard in `folder`, which is there, what a build with this origin (its hashes) makes? Else VS_EXISTS with what it is
 * and what to do. Gives its rows and bytes. */
vs_rc plan_check_shard(const char *folder, const shard_origin *want, uint64_t *n_rows, uint64_t *n_bytes,
                       vs_err *err) VS_WARN_UNUSED;

typedef struct plan_checker {
  void *ctx;
  /* One fault; bucket 0: of a folder that is no bucket of the plan. text NULL: there is no such shard. */
  void (*fault)(void *ctx, size_t bucket, const char *path, const char *text);
} plan_checker;

/* The number in ".../bucket12"; 0 when that is no bucket of the plan. */
size_t plan_bucket_number(const plan *p, const char *path);

/* Every bucket of the plan must be a shard of `db`, built from that bucket's files, with all their rows but those that its
 * build left out; all must fit together in a search; and there must be no other shard. Says what is not so; fails only when
 * it cannot tell. Adds the shards that are there to `folders`. */
vs_rc plan_check(const plan *p, const char *db, const plan_checker *c, tool_list *folders, vs_err *err) VS_WARN_UNUSED;

#endif
