/* ahead.h - reading result rows that lie in stores before SQLite asks for them one by one.
 *
 * When a column of a result is wanted, the rows of the next results are asked for with it, and their metadata columns in one
 * more round if those are wanted; they are held, so that the reads that follow find them in the cache. Local rows: nothing. */
#ifndef VTAB_AHEAD_H
#define VTAB_AHEAD_H
#include "../shard/shard.h"

typedef struct ahead {
  size_t first, end; /* results that were read ahead */
  int with_columns;
  ivfpq_segment **segments;
  ivfpq_row *rows;
  vs_range (*extras)[2];
} ahead;

typedef const shard_hit *(*ahead_hit)(void *ctx, size_t i);
/* Result `at` of n is wanted. */
vs_rc ahead_want(ahead *a, shard *const *shards, ahead_hit hit, void *ctx, size_t at, size_t n, int with_columns, vs_err *err) VS_WARN_UNUSED;
void ahead_reset(ahead *a); /* legal on a zeroed struct */

#endif
