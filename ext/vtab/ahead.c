/* ahead.c - see ahead.h. */
#include "ahead.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_AHEAD = 256 };

void ahead_reset(ahead *a) {
  for (size_t i = 0; i < a->end - a->first; i++) {
    if (a->extras) vs_io_release(a->segments[i]->io, a->extras[i], 2);
    if (a->rows[i].range.owner) ivfpq_rows_release(a->segments[i], &a->rows[i], 1);
  }
  free(a->segments), free(a->rows), free(a->extras);
  memset(a, 0, sizeof *a);
}

static vs_rc begin_rows(ahead *a, ahead_hit hit, void *ctx, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < a->end - a->first && !rc; i++) {
    uint32_t row = hit(ctx, a->first + i)->row;
    if (!a->segments[i]->io->local) rc = ivfpq_rows_begin(a->segments[i], &row, 1, &a->rows[i], err);
  }
  return rc;
}

static vs_rc begin_extras(ahead *a, ahead_hit hit, void *ctx, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < a->end - a->first && !rc; i++) {
    ivfpq_segment *s = a->segments[i];
    uint32_t number = hit(ctx, a->first + i)->row;
    ivfpq_row row;
    if (s->io->local) continue;
    if ((rc = ivfpq_rows_fetch(s, &number, 1, &row, err))) break;
    ivfpq_row_extras(s, row.record, a->extras[i]);
    if (!a->with_columns) a->extras[i][0].len = 0; /* only the long id */
    rc = vs_io_begin(s->io, a->extras[i], 2, err);
    ivfpq_rows_release(s, &row, 1);
  }
  return rc;
}

static ivfpq_segment *segment_of(shard *const *shards, const shard_hit *h) { return shards[h->shard]->segments[h->segment]; }

vs_rc ahead_want(ahead *a, shard *const *shards, ahead_hit hit, void *ctx, size_t at, size_t n, int with_columns, vs_err *err) {
  if (segment_of(shards, hit(ctx, at))->io->local) return VS_OK;
  if (at >= a->first && at < a->end && a->with_columns >= with_columns) return VS_OK;
  ahead_reset(a);
  size_t m = n - at < MAX_AHEAD ? n - at : MAX_AHEAD;
  a->segments = calloc(m, sizeof *a->segments), a->rows = calloc(m, sizeof *a->rows);
  int extras = with_columns || segment_of(shards, hit(ctx, at))->params.id_text;
  if (extras) a->extras = calloc(m, sizeof *a->extras);
  if (!a->segments || !a->rows || (extras && !a->extras)) {
    ahead_reset(a);
    return vs_nomem(err);
  }
  a->first = at, a->end = at + m, a->with_columns = with_columns;
  for (size_t i = 0; i < m; i++) a->segments[i] = segment_of(shards, hit(ctx, at + i));
  vs_rc rc = begin_rows(a, hit, ctx, err);
  if (!rc && extras) rc = begin_extras(a, hit, ctx, err);
  if (rc) ahead_reset(a);
  return rc;
}
