/* stream.h - the rows of one search, handed out one by one: what the cursors of vecshard and shard_union share.
 *
 * With k (up to a million) the search runs once. A larger k is answered exactly, in batches.
 *
 * Without k the stream is lazy, in two phases. First approximate searches, in batches that widen as more is asked for: distance
 * ascends, and a row that an early batch missed is passed over when a later one finds it before what was given out already.
 * Once a batch would take a good part of the rows, brute force: it starts at the nearest row again and leaves out what was
 * given, so that first the rows passed over come, late, and then the others. So every row comes exactly once, and distance
 * falls at one place at most, which only who asks for that many rows sees. A batch that finds fewer rows than it asked for has
 * looked at every partition: it ends the stream, with the rows passed over.
 *
 * What else was considered. Never giving those rows out: then `+id = ?`, which SQLite checks itself, may find no row. Giving
 * them out with the next batch: LIMIT 100 would show distances out of order, where now it merely has the recall of a search.
 * Brute force from the second batch on: LIMIT 100 would read every vector, of a shard in a store more than a statement may.
 * SQLite relies on the order for LIMIT alone as long as DISTINCT and GROUP BY, which want equal distances side by side, are
 * not told that there is one (plan_by_distance).
 */
#ifndef VTAB_STREAM_H
#define VTAB_STREAM_H
#include "conn.h"
#include "ahead.h"
#include "filter.h"
#include "statement.h"

enum { STREAM_MOST = 1 << 20 }; /* rows that one search is asked for: bounds the memory of a query without end */

/* A bound of distance. open: rows at that distance are not meant. */
typedef struct stream_bound { int given, open; double at; } stream_bound;

typedef struct stream_options {
  const float *query;
  uint32_t dim;
  int has_k;
  uint64_t k;
  int64_t nprobe, refine; /* -1: not given */
  double recall;          /* 0: not given */
  int exact;
  const filter *filter;   /* on every shard; NULL or n == 0: none */
  stream_bound floor, limit; /* only rows from floor on, up to limit; k counts these */
  int threads;
} stream_options;

/* Of the rows that come next, what to have in the processor's caches in time. */
typedef enum stream_want { STREAM_NOTHING, STREAM_ID, STREAM_VECTOR } stream_want;

typedef struct stream {
  shard *const *shards;
  size_t n_shards;
  stream_options opt;
  float *query;           /* own copy, for batches to come */
  const ivfpq_filter **filters;
  statement *statement;   /* entered by the caller of every function here */
  uint64_t n_rows;
  shard_hit *hits;        /* of one batch, nearest first but for ties, which come by id */
  size_t n, at;
  uint64_t given;         /* rows that the batches brought */
  uint64_t batch;         /* rows of the next one */
  uint64_t left;          /* rows that k still allows */
  int brute;              /* in the second phase */
  shard_hit last;         /* greatest of the rows that this phase found, in search order */
  int has_last;
  int exhausted;          /* the last batch reached the end */
  int done;               /* no batch will follow */
  shard_hit *seen;        /* rows of the first phase, by storage order */
  size_t n_seen;
  /* the current row, read on demand; rows of a mapped file are addressed and never held */
  ivfpq_segment *segment;
  ivfpq_row row;
  int has_row;
  stream_want want;       /* what was asked of rows so far */
  sqlite3_int64 *ids;     /* of results from ids_first to ids_end, read together; NULL: none */
  size_t ids_first, ids_end;
  int no_ids;             /* these results' ids are read one by one */
  ahead ahead;
} stream;

/* shards and the owner must outlive the stream; the query is copied where it is needed later. Searches at once; at the end when
 * stream_eof. */
vs_rc stream_open(stream *s, statement *owner, shard *const *shards, size_t n_shards, const stream_options *opt, vs_err *err) VS_WARN_UNUSED;
vs_rc stream_next(stream *s, vs_err *err) VS_WARN_UNUSED;
static inline int stream_eof(const stream *s) { return s->at >= s->n; }
static inline const shard_hit *stream_hit(const stream *s) { return &s->hits[s->at]; }
/* The record of the current row, until the next call of stream_next; its metadata columns will be wanted, too. */
vs_rc stream_row(stream *s, int with_columns, ivfpq_segment **segment, const uint8_t **record, vs_err *err) VS_WARN_UNUSED;

/* The same where there is nothing to wait for, to compute or to count, and so no statement to be entered: most calls for results
 * of a mapped file. 0: it has to be done by the other function. */
int stream_step(stream *s);
int stream_row_at_hand(stream *s, stream_want want, ivfpq_segment **segment, const uint8_t **record, vs_rc *rc, vs_err *err);
/* The current row's id, where it is a number, lies in a mapped file and there are many results; 0: read the row. */
int stream_id_at_hand(stream *s, sqlite3_int64 *id);
void stream_reset(stream *s); /* legal on a zeroed stream */

#endif
