/* ivfpq_exact.c - true distances of given rows, filters over a whole segment, and the keys of the nearest; see ivfpq_search.h. */
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
#include "ivfpq_search.h"

enum {
  ROWS_PER_ROUND = 4096,
  AHEAD_BYTES = 4096,       /* of mapped rows asked for before they are needed */
  LARGE_ROW = 1024          /* bytes of a row that is asked for piece by piece: of a small one it gains nothing */
};

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

static int bit(const uint64_t *bitmap, size_t i) { return bitmap[i / 64] >> i % 64 & 1; }

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

/* Asks for a row; returns its vector when that is large and better asked for piece by piece, in between. */
static inline const void *ask_for(const ivfpq_segment *s, uint32_t row) {
  const uint8_t *p = s->mapped_rows + (uint64_t)row * s->params.row_bytes;
  if (s->params.store || s->params.row_bytes < LARGE_ROW) {
    ivfpq_row_prefetch(s, row);
    return NULL;
  }
  __builtin_prefetch(p + s->params.row_bytes - 1); /* what is behind the vector */
  return p;
}

vs_rc ivfpq_distance_mapped(ivfpq_segment *s, const float *query, uint32_t row, const uint32_t *next, float *out, vs_err *err) {
  float buf[IVFPQ_MAX_DIM]; /* written when rows are stored as halves only */
  const void *soon = next ? ask_for(s, *next) : NULL;
  const uint8_t *record;
  vs_rc rc = ivfpq_row_at(s, row, &record, err);
  if (rc) return rc;
  *out = (float)ivfpq_distance_by(kern_get(), (ivfpq_metric)s->params.metric, query, vector_at(s, record, buf), s->params.dim, soon);
  return VS_OK;
}

vs_rc ivfpq_distances_mapped(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *out, vs_err *err) {
  const ivfpq_params *p = &s->params;
  const kern *k = kern_get();
  size_t ahead = AHEAD_BYTES / p->row_bytes + 1;
  float buf[IVFPQ_MAX_DIM]; /* written when rows are stored as halves only */
  for (size_t i = 0; i < n; i++) ivfpq_row_want(s, rows[i]);
  for (size_t i = 0; i < ahead && i < n; i++) ivfpq_row_prefetch(s, rows[i]);
  for (size_t i = 0; i < n; i++) {
    const uint8_t *record;
    const void *soon = i + ahead < n ? ask_for(s, rows[i + ahead]) : NULL;
    vs_rc rc = ivfpq_row_at(s, rows[i], &record, err);
    if (rc) return rc;
    out[i] = (float)ivfpq_distance_by(k, (ivfpq_metric)p->metric, query, vector_at(s, record, buf), p->dim, soon);
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
