/* many.h - the rows of many searches, query after query, each query's as stream.h gives them.
 *
 * Queries are searched in blocks, together (shard_batch_run), each block when its first row is asked for: so the memory does not
 * grow with their number. What a block cannot do (a lower bound of distance, rows named by id, a k beyond what one search gives)
 * is a stream per query. In ascending order of distance over all queries everything is found first.
 */
#ifndef VTAB_MANY_H
#define VTAB_MANY_H
#include "stream.h"

typedef struct many_row_at { shard_hit hit; uint32_t query_no; size_t rank; } many_row_at;

typedef struct many {
  shard *const *shards;
  size_t n_shards;
  stream_options opt;     /* query: that of the first */
  const float *queries;   /* n_queries, opt.dim each; the caller's */
  uint32_t n_queries;
  statement *statement;
  const ivfpq_filter **filters;
  size_t n_block;         /* queries in a block */
  uint32_t next;          /* query with which the next block begins */
  /* the block: answers, the stream of one query, or all rows in order */
  shard_answers answers;
  uint32_t first_query, query; /* of the block; the current one, from there */
  stream stream;
  int streams;
  many_row_at *all;
  size_t n_all;
  int sorted;
  size_t at, n;           /* current row of the block, rows in it */
  size_t row_no;          /* from 0 over all */
  ivfpq_segment *segment; /* the current row, read on demand */
  ivfpq_row row;
  int has_row;
  ahead ahead;
} many;

/* shards, owner, queries and the filter must outlive it. Finds the first row; at the end when many_eof. */
vs_rc many_open(many *m, statement *owner, shard *const *shards, size_t n_shards, const stream_options *opt, uint32_t n_queries, int sorted,
                vs_err *err) VS_WARN_UNUSED;
vs_rc many_next(many *m, vs_err *err) VS_WARN_UNUSED;
static inline int many_eof(const many *m) { return m->at >= m->n; }
const shard_hit *many_hit(const many *m);
uint32_t many_query_no(const many *m);
vs_rc many_row(many *m, int with_columns, ivfpq_segment **segment, const uint8_t **record, vs_err *err) VS_WARN_UNUSED; /* as stream_row */
/* The same where there is nothing to wait for, to compute or to count, as stream_step, stream_row_at_hand and stream_id_at_hand. */
int many_step(many *m);
int many_row_at_hand(many *m, ivfpq_segment **segment, const uint8_t **record, vs_rc *rc, vs_err *err);
int many_id_at_hand(const many *m, sqlite3_int64 *id);
void many_reset(many *m); /* legal on a zeroed one */

#endif
