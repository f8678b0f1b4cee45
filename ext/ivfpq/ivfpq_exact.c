/* ivfpq_exact.c - what looks at stored vectors: brute force, true distances of given rows, filters over a whole segment.
 *
 * Brute force goes through the rows in stretches; each is compared on several threads while the next one travels.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_search.h"

enum {
  STRETCH_BYTES = 16 << 20, /* of stored vectors between two looks at `stop` */
  EXACT_SLICE = 512,        /* rows per task */
  ROWS_PER_ROUND = 4096,
  AHEAD_BYTES = 4096        /* of mapped rows asked for before they are needed */
};

/* Rows of one stretch. */
uint32_t ivfpq_stretch_rows(const ivfpq_params *p) { return STRETCH_BYTES / p->row_bytes + EXACT_SLICE; }

/* ---- candidates ---- */

void ivfpq_keys_reset(ivfpq_keys *k) {
  free(k->key), free(k->scratch);
  memset(k, 0, sizeof *k);
}

vs_rc ivfpq_keys_room(ivfpq_keys *k, size_t room, vs_err *err) {
  if (room <= k->room) return VS_OK;
  size_t grown = k->room * 2 > room ? k->room * 2 : room;
  uint64_t *key = realloc(k->key, grown * sizeof *key);
  if (!key) return vs_nomem(err);
  k->key = key;
  uint64_t *scratch = realloc(k->scratch, (2 * grown + 32) * sizeof *scratch);
  if (!scratch) return vs_nomem(err);
  k->scratch = scratch, k->room = grown;
  return VS_OK;
}

uint64_t ivfpq_keys_cut(ivfpq_keys *k, uint64_t want) {
  if (k->n < want || !want) return UINT64_MAX;
  uint64_t worst = kern_get()->select_u64(k->key, k->n, (size_t)want, k->scratch);
  k->n = (size_t)want;
  return worst;
}

/* Worth cutting: selection is linear, so it pays once the buffer has twice what is wanted. */
static int keys_full(const ivfpq_keys *k, uint64_t want) { return k->n >= 2 * want + 1024; }

static int bit(const uint64_t *bitmap, size_t i) { return bitmap[i / 64] >> i % 64 & 1; }

/* ---- brute force ---- */

typedef struct exact_job {
  ivfpq_segment *s;
  const float *query;
  const uint8_t *records;
  uint32_t first, n;
  uint64_t *key;
  int failed;
} exact_job;

static void exact_slice(void *ctx, size_t i) {
  exact_job *e = ctx;
  const ivfpq_params *p = &e->s->params;
  uint32_t at = (uint32_t)i * EXACT_SLICE, end = at + EXACT_SLICE < e->n ? at + EXACT_SLICE : e->n;
  float *buf = malloc((size_t)p->dim * sizeof *buf);
  if (!buf) {
    __atomic_store_n(&e->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (; at < end; at++) {
    const float *v = ivfpq_row_vector(e->s, e->records + (size_t)at * p->row_bytes, buf);
    e->key[at] = kern_key((float)ivfpq_distance((ivfpq_metric)p->metric, e->query, v, p->dim), e->first + at);
  }
  free(buf);
}

/* Appends one stretch's keys that can still matter. */
static vs_rc exact_take(const exact_job *e, const ivfpq_query *q, const uint64_t *after, const uint64_t *bitmap, uint64_t *worst,
                        ivfpq_keys *out, vs_err *err) {
  vs_rc rc = ivfpq_keys_room(out, out->n + e->n, err);
  if (rc) return rc;
  for (uint32_t i = 0; i < e->n; i++) {
    if (e->key[i] >= *worst || (after && e->key[i] <= *after)) continue;
    if (bitmap && !bit(bitmap, e->first + i)) continue;
    out->key[out->n++] = e->key[i];
  }
  if (keys_full(out, q->n_candidates)) *worst = ivfpq_keys_cut(out, q->n_candidates);
  return VS_OK;
}

/* While one stretch is compared the next one travels. */
static vs_rc begin_stretch(ivfpq_segment *s, uint64_t first, uint32_t n, vs_range *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  if (s->io->local || first >= p->n_rows) return VS_OK;
  if (n > p->n_rows - first) n = (uint32_t)(p->n_rows - first);
  *out = (vs_range){.off = s->section[IVFPQ_ROWS].off + first * p->row_bytes, .len = (uint64_t)n * p->row_bytes};
  return vs_io_begin(s->io, out, 1, err);
}

vs_rc ivfpq_exact(ivfpq_segment *s, const ivfpq_query *q, const uint64_t *after, int threads, ivfpq_keys *out, ivfpq_stats *stats,
                  vs_err *err) {
  const ivfpq_params *p = &s->params;
  if (!p->n_rows || !q->n_candidates) return VS_OK;
  uint32_t n_rows = (uint32_t)p->n_rows, stretch = ivfpq_stretch_rows(p);
  uint64_t *key = malloc((size_t)stretch * sizeof *key), *bitmap = NULL, worst = UINT64_MAX;
  vs_rc rc = key ? VS_OK : vs_nomem(err);
  if (!rc && q->filter) rc = ivfpq_filter_all(s, q->filter, &bitmap, err);
  vs_range next = {0};
  for (uint64_t at = 0; at < n_rows && !rc; at += stretch) {
    ivfpq_row rows;
    vs_range held = next;
    exact_job e = {.s = s, .query = q->vector, .first = (uint32_t)at, .n = n_rows - at < stretch ? n_rows - (uint32_t)at : stretch,
                   .key = key};
    rc = ivfpq_rows_fetch_range(s, e.first, e.n, &rows, err);
    if (held.owner) vs_io_release(s->io, &held, 1);
    next = (vs_range){0};
    if (rc || (rc = begin_stretch(s, at + stretch, stretch, &next, err))) {
      if (rows.range.owner) ivfpq_rows_release(s, &rows, 1);
      break;
    }
    e.records = rows.record;
    vs_pool_run((e.n + EXACT_SLICE - 1) / EXACT_SLICE, threads, exact_slice, &e);
    ivfpq_rows_release(s, &rows, 1);
    rc = e.failed ? vs_nomem(err) : exact_take(&e, q, after, bitmap, &worst, out, err);
    if (!rc && q->stop && q->stop(q->stop_ctx)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  if (next.owner) vs_io_release(s->io, &next, 1);
  if (!rc) ivfpq_keys_cut(out, q->n_candidates);
  stats->rows += n_rows;
  free(key), free(bitmap);
  return rc;
}

/* ---- given rows ---- */

vs_rc ivfpq_distances(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  size_t max = n < ROWS_PER_ROUND ? n : ROWS_PER_ROUND;
  ivfpq_row *row = malloc((max + 1) * sizeof *row);
  float *buf = malloc((size_t)p->dim * sizeof *buf);
  vs_rc rc = row && buf ? VS_OK : vs_nomem(err);
  for (size_t at = 0; at < n && !rc; at += max) {
    size_t m = n - at < max ? n - at : max;
    if ((rc = ivfpq_rows_fetch(s, rows + at, m, row, err))) break;
    for (size_t i = 0; i < m; i++)
      out[at + i] = (float)ivfpq_distance((ivfpq_metric)p->metric, query, ivfpq_row_vector(s, row[i].record, buf), p->dim);
    ivfpq_rows_release(s, row, m);
  }
  free(row), free(buf);
  return rc;
}

vs_rc ivfpq_distances_mapped(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  const kern *k = kern_get();
  size_t ahead = AHEAD_BYTES / p->row_bytes + 1;
  float buf[IVFPQ_MAX_DIM]; /* written when rows are stored as halves only */
  for (size_t i = 0; i < ahead && i < n; i++) ivfpq_row_prefetch(s, rows[i]);
  for (size_t i = 0; i < n; i++) {
    const uint8_t *record;
    if (i + ahead < n) ivfpq_row_prefetch(s, rows[i + ahead]);
    vs_rc rc = ivfpq_row_at(s, rows[i], &record, err);
    if (rc) return rc;
    const float *v = !p->store && (uintptr_t)record % sizeof(float) == 0 ? (const float *)record : ivfpq_row_vector(s, record, buf);
    out[i] = (float)ivfpq_distance_by(k, (ivfpq_metric)p->metric, query, v, p->dim);
  }
  return VS_OK;
}

/* ---- filters over a whole segment ---- */

static void place_bits(uint64_t *all, uint64_t row0, const uint64_t *part, uint32_t n) {
  for (uint32_t i = 0; i < n; i++)
    if (bit(part, i)) all[(row0 + i) / 64] |= 1ull << (row0 + i) % 64;
}

static vs_rc filter_group(ivfpq_segment *s, const ivfpq_filter *f, const ivfpq_group_view *v, uint64_t *all, uint64_t *part_bits,
                          vs_err *err) {
  ivfpq_part *parts = calloc(v->n + 1, sizeof *parts);
  if (!parts) return vs_nomem(err);
  for (uint32_t i = 0; i < v->n; i++) parts[i].number = v->first + i, parts[i].entry = v->entries[i];
  vs_rc rc = ivfpq_parts_fetch(s, IVFPQ_WANT_COLUMNS, parts, v->n, err);
  int held = !rc;
  for (uint32_t i = 0; i < v->n && !rc; i++) {
    uint32_t n = parts[i].entry.n_rows;
    if (!n) continue;
    memset(part_bits, 0, ivfpq_round(n, 64) / 8);
    rc = f->eval(f->ctx, s, &parts[i], part_bits, err);
    if (!rc) place_bits(all, parts[i].entry.row0, part_bits, n);
  }
  if (held) ivfpq_parts_release(s, parts, v->n);
  free(parts);
  return rc;
}

vs_rc ivfpq_filter_all(ivfpq_segment *s, const ivfpq_filter *f, uint64_t **bitmap, vs_err *err) {
  uint64_t *all = calloc(s->params.n_rows / 64 + 2, 8), *part = malloc(IVFPQ_MAX_PARTITION / 8 + 64);
  vs_rc rc = all && part ? VS_OK : vs_nomem(err);
  for (uint32_t g = 0; g < s->params.n_groups && !rc; g++) {
    ivfpq_group_view v;
    if ((rc = ivfpq_groups_fetch(s, &g, 1, &v, err))) break;
    rc = filter_group(s, f, &v, all, part, err);
    ivfpq_groups_release(s, &v, 1);
  }
  free(part);
  *bitmap = rc ? NULL : all;
  if (rc) free(all);
  return rc;
}
