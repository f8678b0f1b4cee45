/* stream.h - the rows of one search, handed out one by one: what the cursors of vecshard and shard_union share.
 *
 * With k (up to a million) the search runs once. A larger k is answered exactly, in batches. Without k the stream is lazy, in
 * batches that widen as more is asked for: the first ones are approximate searches, and once a batch would take a good part of
 * the rows, brute force. Where ascending distance was promised (`ordered`), a row that an early batch missed and that lies
 * before what was given out already is not given out late: that is the recall of the early batches. Where nothing was
 * promised, every row comes exactly once.
 */
#ifndef VTAB_STREAM_H
#define VTAB_STREAM_H
#include "conn.h"
#include "ahead.h"
#include "filter.h"
#include "statement.h"

typedef struct stream_options {
  const float *query;
  uint32_t dim;
  int has_k;
  uint64_t k;
  int64_t nprobe, refine; /* -1: not given */
  int exact;
  int ordered;            /* 1: SQLite relies on ascending distance */
  const filter *filter;   /* on every shard; NULL or n == 0: none */
  int has_floor, floor_open; /* only rows at this distance or beyond (open: beyond it); k counts these */
  double floor;
  int threads;
} stream_options;

typedef struct stream {
  shard *const *shards;
  size_t n_shards;
  stream_options opt;
  float *query;           /* own copy */
  const ivfpq_filter **filters;
  statement *statement;   /* entered by the caller of every function here */
  uint64_t n_rows;
  shard_hit *hits;
  size_t n, at;
  uint64_t given;         /* rows of earlier batches */
  uint64_t batch;
  shard_hit last;         /* greatest of the rows given out, in search order; of brute-force batches where not ordered */
  int has_last;
  int exhausted;          /* the last batch reached the end */
  int done;               /* no batch will follow */
  uint64_t left;          /* with a floor and k: rows still to give out, else 0 */
  shard_hit *seen;        /* not ordered: rows of approximate batches, by storage order */
  size_t n_seen;
  /* the current row, read on demand */
  ivfpq_segment *segment;
  ivfpq_row row;
  int has_row;
  ahead ahead;
} stream;

/* shards and the owner must outlive the stream. Searches at once; at the end when stream_eof. */
vs_rc stream_open(stream *s, statement *owner, shard *const *shards, size_t n_shards, const stream_options *opt, vs_err *err) VS_WARN_UNUSED;
vs_rc stream_next(stream *s, vs_err *err) VS_WARN_UNUSED;
static inline int stream_eof(const stream *s) { return s->at >= s->n; }
static inline const shard_hit *stream_hit(const stream *s) { return &s->hits[s->at]; }
/* The record of the current row, until the next call of stream_next; its metadata columns will be wanted, too. */
vs_rc stream_row(stream *s, int with_columns, ivfpq_segment **segment, const uint8_t **record, vs_err *err) VS_WARN_UNUSED;
void stream_reset(stream *s); /* legal on a zeroed stream */

#endif
