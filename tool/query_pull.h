/* query_pull.h - is it cheaper to get the shards out of the store before they are asked? */
#ifndef QUERY_PULL_H
#define QUERY_PULL_H
#include "../ext/shard/shard.h"

/* Compares what n_queries like q would read of the shards in q (open, from the store) with what DIR does not hold of them yet, says
 * both on stderr, and pulls when that is the cheaper way. *local: the source to be searched then, for free; NULL: the store is. A single
 * shard goes to DIR/NAME, so that it keeps its name in the answer. */
vs_rc query_pull(const char *source, const char *dir, const shard_search *q, uint64_t n_queries, char **local, vs_err *err) VS_WARN_UNUSED;

#endif
