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
  EXACT_QUERIES = 16,       /* that meet a row while it lies in the cache */
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

/* One stretch of rows against a few queries. */
typedef struct exact_job {
  ivfpq_segment *s;
  const ivfpq_query *q;
  const float *vectors;   /* n_q queries */
  size_t n_q;
  const uint64_t *after;
  const uint64_t *bitmap;
  const uint8_t *records;
  uint32_t first, n, stretch;
  uint64_t *key;          /* per query a stretch */
  uint64_t *worst;        /* per query; nothing above it can matter */
  ivfpq_keys *out;
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
    for (size_t j = 0; j < e->n_q; j++) {
      float d = (float)ivfpq_distance((ivfpq_metric)p->metric, e->vectors + j * p->dim, v, p->dim);
      e->key[j * e->stretch + at] = kern_key(d, e->first + at);
    }
  }
  free(buf);
}

/* Appends one query's keys of a stretch that can still matter. */
static void exact_take(void *ctx, size_t j) {
  exact_job *e = ctx;
  ivfpq_keys *out = &e->out[j];
  const uint64_t *key = e->key + j * e->stretch;
  for (uint32_t i = 0; i < e->n; i++) {
    if (key[i] >= e->worst[j] || (e->after && key[i] <= *e->after)) continue;
    if (e->bitmap && !bit(e->bitmap, e->first + i)) continue;
    if (out->n == out->room && ivfpq_keys_room(out, out->n + 1024, NULL)) {
      __atomic_store_n(&e->failed, 1, __ATOMIC_RELAXED);
      return;
    }
    out->key[out->n++] = key[i];
    if (keys_full(out, e->q->n_candidates)) e->worst[j] = ivfpq_keys_cut(out, e->q->n_candidates);
  }
}

/* While one stretch is compared the next one travels. */
static vs_rc begin_stretch(ivfpq_segment *s, uint64_t first, uint32_t n, vs_range *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  if (s->io->local || first >= p->n_rows) return VS_OK;
  if (n > p->n_rows - first) n = (uint32_t)(p->n_rows - first);
  *out = (vs_range){.off = s->section[IVFPQ_ROWS].off + first * p->row_bytes, .len = (uint64_t)n * p->row_bytes};
  return vs_io_begin(s->io, out, 1, err);
}

/* A stretch against all n queries, some at a time. */
static vs_rc exact_stretch(exact_job e, const float *vectors, size_t n, int threads, uint64_t *worst, ivfpq_keys *out, vs_err *err) {
  const ivfpq_query *q = e.q;
  for (size_t at = 0; at < n; at += EXACT_QUERIES) {
    e.n_q = n - at < EXACT_QUERIES ? n - at : EXACT_QUERIES;
    e.vectors = vectors + at * e.s->params.dim, e.worst = worst + at, e.out = out + at;
    vs_pool_run((e.n + EXACT_SLICE - 1) / EXACT_SLICE, threads, exact_slice, &e);
    if (!e.failed) vs_pool_run(e.n_q, threads, exact_take, &e);
    if (e.failed) return vs_nomem(err);
    if (q->stop && q->stop(q->stop_ctx)) return vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  return VS_OK;
}

static vs_rc exact_rows(exact_job e, const float *vectors, size_t n, int threads, uint64_t *worst, ivfpq_keys *out, vs_err *err) {
  ivfpq_segment *s = e.s;
  uint32_t n_rows = (uint32_t)s->params.n_rows;
  vs_range next = {0};
  vs_rc rc = VS_OK;
  for (uint64_t at = 0; at < n_rows && !rc; at += e.stretch) {
    ivfpq_row rows;
    vs_range held = next;
    e.first = (uint32_t)at, e.n = n_rows - at < e.stretch ? n_rows - (uint32_t)at : e.stretch;
    rc = ivfpq_rows_fetch_range(s, e.first, e.n, &rows, err);
    if (held.owner) vs_io_release(s->io, &held, 1);
    next = (vs_range){0};
    if (rc || (rc = begin_stretch(s, at + e.stretch, e.stretch, &next, err))) {
      if (rows.range.owner) ivfpq_rows_release(s, &rows, 1);
      break;
    }
    e.records = rows.record;
    rc = exact_stretch(e, vectors, n, threads, worst, out, err);
    ivfpq_rows_release(s, &rows, 1);
  }
  if (next.owner) vs_io_release(s->io, &next, 1);
  return rc;
}

static vs_rc exact(ivfpq_segment *s, const ivfpq_query *q, const float *vectors, size_t n, const uint64_t *after, int threads,
                   ivfpq_keys *out, ivfpq_stats *stats, vs_err *err) {
  if (!s->params.n_rows || !q->n_candidates || !n) return VS_OK;
  exact_job e = {.s = s, .q = q, .after = after, .stretch = ivfpq_stretch_rows(&s->params)};
  size_t at_once = n < EXACT_QUERIES ? n : EXACT_QUERIES;
  uint64_t *bitmap = NULL, *worst = malloc(n * sizeof *worst);
  e.key = malloc(at_once * e.stretch * sizeof *e.key);
  vs_rc rc = e.key && worst ? VS_OK : vs_nomem(err);
  if (!rc && q->filter) rc = ivfpq_filter_all(s, q->filter, &bitmap, err);
  for (size_t i = 0; i < n && !rc; i++) worst[i] = UINT64_MAX;
  e.bitmap = bitmap;
  if (!rc) rc = exact_rows(e, vectors, n, threads, worst, out, err);
  for (size_t i = 0; i < n && !rc; i++) ivfpq_keys_cut(&out[i], q->n_candidates);
  stats->rows += s->params.n_rows * n;
  free(e.key), free(bitmap), free(worst);
  return rc;
}

vs_rc ivfpq_exact(ivfpq_segment *s, const ivfpq_query *q, const uint64_t *after, int threads, ivfpq_keys *out, ivfpq_stats *stats,
                  vs_err *err) {
  return exact(s, q, q->vector, 1, after, threads, out, stats, err);
}

vs_rc ivfpq_exact_many(ivfpq_segment *s, const ivfpq_query *q, const float *vectors, size_t n, int threads, ivfpq_keys *out,
                       ivfpq_stats *stats, vs_err *err) {
  return exact(s, q, vectors, n, NULL, threads, out, stats, err);
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

static const float *vector_at(const ivfpq_segment *s, const uint8_t *record, float *buf) {
  return !s->params.store && (uintptr_t)record % sizeof(float) == 0 ? (const float *)record : ivfpq_row_vector(s, record, buf);
}

vs_rc ivfpq_distance_mapped(ivfpq_segment *s, const float *query, uint32_t row, float *out, vs_err *err) {
  float buf[IVFPQ_MAX_DIM]; /* written when rows are stored as halves only */
  const uint8_t *record;
  vs_rc rc = ivfpq_row_at(s, row, &record, err);
  if (!rc) *out = (float)ivfpq_distance((ivfpq_metric)s->params.metric, query, vector_at(s, record, buf), s->params.dim);
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
    out[i] = (float)ivfpq_distance_by(k, (ivfpq_metric)p->metric, query, vector_at(s, record, buf), p->dim);
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
