/* ivfpq_runs.c - see ivfpq_runs.h. Memory: the staging area, 16 bytes per staged row, and two offsets per centroid and run. */
#include "ivfpq_runs.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ivfpq_int.h"

enum { READ_BUFFER = 1 << 20 };

typedef struct staged { uint32_t centroid, scan_size, row_size; size_t scan_at, row_at; } staged;

typedef struct run { uint64_t *start[2]; } run; /* n_centroids + 1 file offsets of each kind */

struct ivfpq_runs {
  char *dir;
  uint32_t n_centroids;
  size_t code_bytes, vector_bytes, memory;
  uint8_t *area[2];
  size_t used[2], room[2];
  staged *rows;
  size_t n_rows, rows_room;
  int fd[2];
  uint64_t end[2]; /* bytes in the files */
  run *runs;
  size_t n_runs;
  /* reading */
  int kind;
  uint32_t centroid;
  size_t at_run;
  uint64_t off, stop; /* file range still to read */
  uint8_t *buf;
  size_t buf_room, buf_at, buf_have;
};

vs_rc ivfpq_runs_open(const char *dir, uint32_t n_centroids, size_t code_bytes, size_t vector_bytes, size_t memory,
                      ivfpq_runs **out, vs_err *err) {
  ivfpq_runs *r = calloc(1, sizeof *r);
  *out = NULL;
  if (!r) return vs_nomem(err);
  r->fd[0] = r->fd[1] = -1;
  r->n_centroids = n_centroids, r->code_bytes = code_bytes, r->vector_bytes = vector_bytes, r->memory = memory;
  vs_rc rc = (r->dir = strdup(dir)) ? VS_OK : vs_nomem(err);
  for (int k = 0; k < 2 && !rc; k++)
    if ((r->fd[k] = ivfpq_tmpfile(dir, err)) < 0) rc = VS_IO;
  if (rc) ivfpq_runs_close(r);
  else *out = r;
  return rc;
}

/* Writes one kind's staged records, sorted by centroid (stable), through a small buffer. */
static vs_rc spill_kind(ivfpq_runs *r, int kind, const uint32_t *order, uint64_t *start, vs_err *err) {
  uint8_t *out = malloc(READ_BUFFER);
  size_t have = 0;
  uint32_t c = 0;
  vs_rc rc = out ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < r->n_rows && !rc; i++) {
    const staged *s = &r->rows[order[i]];
    size_t size = kind ? s->row_size : s->scan_size;
    const uint8_t *p = r->area[kind] + (kind ? s->row_at : s->scan_at);
    while (c <= s->centroid) start[c++] = r->end[kind] + have;
    if (have + size > READ_BUFFER) {
      rc = ivfpq_pwrite(r->fd[kind], out, have, r->end[kind], r->dir, err);
      r->end[kind] += have, have = 0;
    }
    if (!rc && size > READ_BUFFER) {
      rc = ivfpq_pwrite(r->fd[kind], p, size, r->end[kind], r->dir, err);
      r->end[kind] += size;
    } else if (!rc) {
      memcpy(out + have, p, size);
      have += size;
    }
  }
  if (!rc) rc = ivfpq_pwrite(r->fd[kind], out, have, r->end[kind], r->dir, err);
  r->end[kind] += have;
  while (c <= r->n_centroids) start[c++] = r->end[kind];
  free(out);
  return rc;
}

static vs_rc spill(ivfpq_runs *r, vs_err *err) {
  size_t k = r->n_centroids;
  run *runs = realloc(r->runs, (r->n_runs + 1) * sizeof *runs);
  if (!runs) return vs_nomem(err);
  r->runs = runs;
  run *x = &runs[r->n_runs];
  x->start[0] = malloc((k + 1) * 8), x->start[1] = malloc((k + 1) * 8);
  r->n_runs++;
  uint32_t *order = malloc(r->n_rows * 4 + 4), *at = calloc(k + 1, 4);
  vs_rc rc = x->start[0] && x->start[1] && order && at ? VS_OK : vs_nomem(err);
  if (!rc) {
    for (size_t i = 0; i < r->n_rows; i++) at[r->rows[i].centroid + 1]++;
    for (size_t c = 0; c < k; c++) at[c + 1] += at[c];
    for (size_t i = 0; i < r->n_rows; i++) order[at[r->rows[i].centroid]++] = (uint32_t)i;
    for (int kind = 0; kind < 2 && !rc; kind++) rc = spill_kind(r, kind, order, x->start[kind], err);
  }
  free(order), free(at);
  r->n_rows = 0, r->used[0] = r->used[1] = 0;
  return rc;
}

static vs_rc reserve(void **p, size_t *room, size_t need, size_t unit, vs_err *err) {
  if (need <= *room) return VS_OK;
  size_t n = *room + *room / 2 + 1024 > need ? *room + *room / 2 + 1024 : need;
  void *grown = realloc(*p, n * unit);
  if (!grown) return vs_nomem(err);
  *p = grown, *room = n;
  return VS_OK;
}

vs_rc ivfpq_runs_add(ivfpq_runs *r, uint32_t centroid, uint32_t id_bytes, uint32_t column_bytes, uint8_t **scan, uint8_t **row,
                     vs_err *err) {
  size_t scan_size = sizeof(ivfpq_scan_head) + r->code_bytes + column_bytes;
  size_t row_size = sizeof(ivfpq_row_head) + r->vector_bytes + id_bytes + column_bytes;
  size_t total = r->used[0] + r->used[1] + scan_size + row_size + (r->n_rows + 1) * (sizeof(staged) + 4);
  vs_rc rc = VS_OK;
  if (r->n_rows && (total > r->memory || r->n_rows == UINT32_MAX)) rc = spill(r, err);
  if (!rc) rc = reserve((void **)&r->area[0], &r->room[0], r->used[0] + scan_size, 1, err);
  if (!rc) rc = reserve((void **)&r->area[1], &r->room[1], r->used[1] + row_size, 1, err);
  if (!rc) rc = reserve((void **)&r->rows, &r->rows_room, r->n_rows + 1, sizeof *r->rows, err);
  if (rc) return rc;
  r->rows[r->n_rows++] = (staged){centroid, (uint32_t)scan_size, (uint32_t)row_size, r->used[0], r->used[1]};
  *scan = r->area[0] + r->used[0], *row = r->area[1] + r->used[1];
  r->used[0] += scan_size, r->used[1] += row_size;
  return VS_OK;
}

vs_rc ivfpq_runs_finish(ivfpq_runs *r, vs_err *err) {
  vs_rc rc = r->n_rows ? spill(r, err) : VS_OK;
  for (int k = 0; k < 2; k++) free(r->area[k]), r->area[k] = NULL, r->room[k] = 0;
  free(r->rows), r->rows = NULL, r->rows_room = 0;
  return rc;
}

void ivfpq_runs_rewind(ivfpq_runs *r, int kind, uint32_t centroid) {
  r->kind = kind, r->centroid = centroid, r->at_run = 0;
  r->off = r->stop = 0, r->buf_at = r->buf_have = 0;
}

/* Makes n bytes available at buf + buf_at; *ok = 0 at the end of this run. */
static vs_rc need(ivfpq_runs *r, size_t n, int *ok, vs_err *err) {
  *ok = 1;
  if (r->buf_have - r->buf_at >= n) return VS_OK;
  *ok = 0;
  if (r->buf_have - r->buf_at + (r->stop - r->off) < n) return VS_OK;
  if (r->buf_have > r->buf_at) memmove(r->buf, r->buf + r->buf_at, r->buf_have - r->buf_at);
  r->buf_have -= r->buf_at, r->buf_at = 0;
  size_t want = n > READ_BUFFER ? n : READ_BUFFER;
  vs_rc rc = reserve((void **)&r->buf, &r->buf_room, want, 1, err);
  if (rc) return rc;
  size_t m = want - r->buf_have;
  if (m > r->stop - r->off) m = r->stop - r->off;
  rc = ivfpq_pread(r->fd[r->kind], r->buf + r->buf_have, m, r->off, r->dir, err);
  r->off += m, r->buf_have += m;
  *ok = !rc;
  return rc;
}

vs_rc ivfpq_runs_next(ivfpq_runs *r, const uint8_t **record, vs_err *err) {
  size_t head = r->kind ? sizeof(ivfpq_row_head) : sizeof(ivfpq_scan_head), size;
  int ok;
  *record = NULL;
  while (r->buf_at == r->buf_have && r->off == r->stop) {
    if (r->at_run == r->n_runs) return VS_OK;
    const uint64_t *start = r->runs[r->at_run++].start[r->kind];
    r->off = start[r->centroid], r->stop = start[r->centroid + 1];
    r->buf_at = r->buf_have = 0;
  }
  vs_rc rc = need(r, head, &ok, err);
  if (rc) return rc;
  if (!ok) return vs_fail(err, VS_IO, "%s: a temporary file was changed", r->dir);
  if (r->kind) {
    ivfpq_row_head h;
    memcpy(&h, r->buf + r->buf_at, sizeof h);
    size = head + r->vector_bytes + h.id_bytes + h.column_bytes;
  } else {
    ivfpq_scan_head h;
    memcpy(&h, r->buf + r->buf_at, sizeof h);
    size = head + r->code_bytes + h.column_bytes;
  }
  if ((rc = need(r, size, &ok, err))) return rc;
  if (!ok) return vs_fail(err, VS_IO, "%s: a temporary file was changed", r->dir);
  *record = r->buf + r->buf_at;
  r->buf_at += size;
  return VS_OK;
}

uint64_t ivfpq_runs_bytes(const ivfpq_runs *r) { return r->end[0] + r->end[1]; }

void ivfpq_runs_close(ivfpq_runs *r) {
  if (!r) return;
  for (int k = 0; k < 2; k++) {
    if (r->fd[k] >= 0) close(r->fd[k]);
    free(r->area[k]);
  }
  for (size_t i = 0; i < r->n_runs; i++) free(r->runs[i].start[0]), free(r->runs[i].start[1]);
  free(r->runs), free(r->rows), free(r->buf), free(r->dir), free(r);
}
