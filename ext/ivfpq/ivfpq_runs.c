/* ivfpq_runs.c - see ivfpq_runs.h. Memory: the staging area, 32 bytes per staged row, two offsets per centroid and run, 24 bytes
 * per CHUNK of named files. */
#include "ivfpq_runs.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../base/vs_pool.h"
#include "ivfpq_int.h"

enum { CHUNK = 4 << 20, WRITE_BUFFER = 1 << 20, READ_STEP = 1 << 20 };
const char *const ivfpq_run_files[2] = {"scan.runs", "row.runs"};

typedef struct staged { uint32_t centroid, scan_size, row_size; size_t scan_at, row_at; } staged;

typedef struct run { uint64_t *start[2]; } run; /* n_centroids + 1 file offsets of each kind */

typedef struct chunk { uint64_t off, size, check; } chunk; /* of a file, as it was written */

struct ivfpq_runs {
  ivfpq_runs_shape shape;
  char *dir;
  uint8_t *area[2];
  size_t used[2], room[2];
  staged *rows;
  size_t n_rows, rows_room;
  int fd[2];
  uint64_t end[2];  /* bytes in the files */
  chunk *chunks[2];
  size_t n_chunks[2];
  run *runs;
  size_t n_runs;
  int finished;
  uint32_t *order;  /* of the staged rows by centroid, when they are read from memory */
  uint32_t *first;  /* n_centroids + 1 places in order */
};

static size_t scan_bytes(const ivfpq_runs *r) { return sizeof(ivfpq_scan_head) + r->shape.code_bytes; }
static size_t row_bytes(const ivfpq_runs *r) { return sizeof(ivfpq_row_head) + r->shape.vector_bytes; }

static int open_file(const ivfpq_runs *r, int kind, int flags, vs_err *err) {
  char *path;
  if (!r->shape.named) return ivfpq_tmpfile(r->dir, err);
  if (asprintf(&path, "%s/%s", r->dir, ivfpq_run_files[kind]) < 0) return vs_nomem(err), -1;
  int fd = open(path, flags | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd < 0) vs_fail(err, VS_IO, "%s: cannot open: %s", path, strerror(errno));
  free(path);
  return fd;
}

static vs_rc new_runs(const ivfpq_runs_shape *shape, int flags, ivfpq_runs **out, vs_err *err) {
  ivfpq_runs *r = calloc(1, sizeof *r);
  *out = NULL;
  if (!r) return vs_nomem(err);
  r->fd[0] = r->fd[1] = -1;
  r->shape = *shape;
  vs_rc rc = (r->dir = strdup(shape->dir)) ? VS_OK : vs_nomem(err);
  for (int k = 0; k < 2 && !rc; k++)
    if ((r->fd[k] = open_file(r, k, flags, err)) < 0) rc = VS_IO;
  if (rc) ivfpq_runs_close(r);
  else *out = r;
  return rc;
}

vs_rc ivfpq_runs_open(const ivfpq_runs_shape *shape, ivfpq_runs **out, vs_err *err) {
  return new_runs(shape, O_RDWR | O_CREAT | O_TRUNC, out, err);
}

/* ---- spilling ---- */

/* Staged rows by centroid, stable: order, and where each centroid begins in it (n_centroids + 1). */
static vs_rc sort_staged(const ivfpq_runs *r, uint32_t **order, uint32_t **first, vs_err *err) {
  size_t k = r->shape.n_centroids;
  uint32_t *o = malloc(r->n_rows * sizeof *o + 4), *f = calloc(k + 2, sizeof *f);
  if (!o || !f) {
    free(o), free(f);
    return vs_nomem(err);
  }
  for (size_t i = 0; i < r->n_rows; i++) f[r->rows[i].centroid + 2]++;
  for (size_t c = 2; c < k + 2; c++) f[c] += f[c - 1];
  for (size_t i = 0; i < r->n_rows; i++) o[f[r->rows[i].centroid + 1]++] = (uint32_t)i;
  *order = o, *first = f;
  return VS_OK;
}

/* A stretch of one kind's sorted records that one task writes. */
typedef struct piece { int kind; size_t from, to; chunk c; } piece;
typedef struct spill_job {
  ivfpq_runs *r;
  const uint32_t *order;
  piece *pieces;
  size_t n, room;
  vs_rc rc;
  vs_err *err;
  pthread_mutex_t lock;
} spill_job;

static vs_rc write_piece(const spill_job *j, piece *p, vs_err *err) {
  ivfpq_runs *r = j->r;
  uint8_t *out = malloc(WRITE_BUFFER);
  XXH3_state_t *hash = XXH3_createState();
  uint64_t off = p->c.off;
  size_t have = 0;
  vs_rc rc = out && hash ? VS_OK : vs_nomem(err);
  if (!rc) XXH3_64bits_reset(hash);
  for (size_t i = p->from; i <= p->to && !rc; i++) {
    const staged *s = i < p->to ? &r->rows[j->order[i]] : NULL;
    size_t size = !s ? 0 : p->kind ? s->row_size : s->scan_size;
    const uint8_t *from = !s ? NULL : r->area[p->kind] + (p->kind ? s->row_at : s->scan_at);
    if (!s || have + size > WRITE_BUFFER) {
      if (r->shape.named) XXH3_64bits_update(hash, out, have);
      rc = ivfpq_pwrite(r->fd[p->kind], out, have, off, r->dir, err);
      off += have, have = 0;
    }
    if (size > WRITE_BUFFER) {
      if (r->shape.named) XXH3_64bits_update(hash, from, size);
      if (!rc) rc = ivfpq_pwrite(r->fd[p->kind], from, size, off, r->dir, err);
      off += size;
    } else if (size) {
      memcpy(out + have, from, size);
      have += size;
    }
  }
  if (!rc) p->c.check = XXH3_64bits_digest(hash);
  XXH3_freeState(hash), free(out);
  return rc;
}

static void write_task(void *ctx, size_t i) {
  spill_job *j = ctx;
  vs_err err = {0};
  if (__atomic_load_n(&j->rc, __ATOMIC_RELAXED)) return;
  vs_rc rc = write_piece(j, &j->pieces[i], &err);
  if (!rc) return;
  pthread_mutex_lock(&j->lock);
  if (!j->rc) __atomic_store_n(&j->rc, vs_fail(j->err, rc, "%s", err.text), __ATOMIC_RELAXED);
  pthread_mutex_unlock(&j->lock);
}

/* Cuts one kind's sorted records into pieces and notes where each centroid begins. */
static vs_rc plan_kind(spill_job *j, int kind, uint64_t *start, vs_err *err) {
  ivfpq_runs *r = j->r;
  uint32_t c = 0;
  piece *p = NULL;
  for (size_t i = 0; i < r->n_rows; i++) {
    const staged *s = &r->rows[j->order[i]];
    while (c <= s->centroid) start[c++] = r->end[kind];
    if (!p || p->c.size >= CHUNK) {
      if (j->n == j->room) {
        size_t room = j->room * 2 + 64;
        piece *grown = realloc(j->pieces, room * sizeof *grown);
        if (!grown) return vs_nomem(err);
        j->pieces = grown, j->room = room;
      }
      p = &j->pieces[j->n++];
      *p = (piece){.kind = kind, .from = i, .c = {.off = r->end[kind]}};
    }
    size_t size = kind ? s->row_size : s->scan_size;
    p->to = i + 1, p->c.size += size, r->end[kind] += size;
  }
  while (c <= r->shape.n_centroids) start[c++] = r->end[kind];
  return VS_OK;
}

static vs_rc keep_chunks(ivfpq_runs *r, const spill_job *j, vs_err *err) {
  size_t n[2] = {0};
  if (!r->shape.named) return VS_OK;
  for (size_t i = 0; i < j->n; i++) n[j->pieces[i].kind]++;
  for (int k = 0; k < 2; k++) {
    chunk *grown = realloc(r->chunks[k], (r->n_chunks[k] + n[k] + 1) * sizeof *grown);
    if (!grown) return vs_nomem(err);
    r->chunks[k] = grown;
  }
  for (size_t i = 0; i < j->n; i++) {
    int k = j->pieces[i].kind;
    r->chunks[k][r->n_chunks[k]++] = j->pieces[i].c;
  }
  return VS_OK;
}

static vs_rc new_run(ivfpq_runs *r, run **out, vs_err *err) {
  run *runs = realloc(r->runs, (r->n_runs + 1) * sizeof *runs);
  if (!runs) return vs_nomem(err);
  r->runs = runs;
  run *x = &runs[r->n_runs++];
  for (int k = 0; k < 2; k++) x->start[k] = calloc((size_t)r->shape.n_centroids + 1, 8);
  *out = x;
  return x->start[0] && x->start[1] ? VS_OK : vs_nomem(err);
}

static vs_rc spill(ivfpq_runs *r, vs_err *err) {
  uint32_t *order = NULL, *first = NULL;
  run *x;
  spill_job j = {.r = r, .err = err, .lock = PTHREAD_MUTEX_INITIALIZER};
  vs_rc rc = new_run(r, &x, err);
  if (!rc) rc = sort_staged(r, &order, &first, err);
  j.order = order;
  for (int kind = 0; kind < 2 && !rc; kind++) rc = plan_kind(&j, kind, x->start[kind], err);
  if (!rc) {
    vs_pool_run(j.n, r->shape.threads, write_task, &j);
    rc = j.rc;
  }
  if (!rc) rc = keep_chunks(r, &j, err);
  free(order), free(first), free(j.pieces);
  r->n_rows = 0, r->used[0] = r->used[1] = 0;
  return rc;
}

/* ---- adding ---- */

/* Grows *p for reading and small tables. */
static vs_rc reserve(void **p, size_t *room, size_t need, size_t unit, vs_err *err) {
  if (need <= *room) return VS_OK;
  size_t n = *room + *room / 2 + 1024 > need ? *room + *room / 2 + 1024 : need;
  void *grown = realloc(*p, n * unit);
  if (!grown) return vs_nomem(err);
  *p = grown, *room = n;
  return VS_OK;
}

/* The staging area of one kind is asked for once, for all rows that will be in it, each as large as the first ones are, and a sixteenth
 * more; only texts that get longer make it grow. Pages that are not used cost nothing. */
static vs_rc reserve_area(ivfpq_runs *r, int kind, size_t n_rows, size_t size, vs_err *err) {
  size_t need = r->used[kind] + size, n = need + need / 2;
  uint64_t most = r->shape.memory / (row_bytes(r) + scan_bytes(r) + sizeof(staged) + 4) + 1;
  if (need <= r->room[kind]) return VS_OK;
  if (r->shape.n_rows < most) most = r->shape.n_rows;
  if (!r->area[kind] && n_rows && most > n_rows) n = (size_t)((double)size / (double)n_rows * (double)most * 1.0625) + need;
  uint8_t *area = ivfpq_large_alloc(n);
  if (!area) return vs_nomem(err);
  if (r->used[kind]) memcpy(area, r->area[kind], r->used[kind]);
  free(r->area[kind]);
  r->area[kind] = area, r->room[kind] = n;
  return VS_OK;
}

vs_rc ivfpq_runs_reserve(ivfpq_runs *r, size_t n, uint64_t id_bytes, uint64_t column_bytes, vs_err *err) {
  uint64_t scan = n * scan_bytes(r) + column_bytes, row = n * row_bytes(r) + id_bytes + column_bytes;
  uint64_t total = r->used[0] + r->used[1] + scan + row + (r->n_rows + n) * (sizeof(staged) + 4);
  vs_rc rc = VS_OK;
  if (r->n_rows && (total > r->shape.memory || r->n_rows + n > UINT32_MAX)) rc = spill(r, err);
  if (!rc) rc = reserve_area(r, 0, n, scan, err);
  if (!rc) rc = reserve_area(r, 1, n, row, err);
  if (!rc) rc = reserve((void **)&r->rows, &r->rows_room, r->n_rows + n, sizeof *r->rows, err);
  return rc;
}

vs_rc ivfpq_runs_add(ivfpq_runs *r, uint32_t centroid, uint32_t id_bytes, uint32_t column_bytes, uint8_t **scan, uint8_t **row,
                     vs_err *err) {
  size_t scan_size = scan_bytes(r) + column_bytes, row_size = row_bytes(r) + id_bytes + column_bytes;
  if (r->n_rows == r->rows_room || r->used[0] + scan_size > r->room[0] || r->used[1] + row_size > r->room[1]) {
    vs_rc rc = ivfpq_runs_reserve(r, 1, id_bytes, column_bytes, err);
    if (rc) return rc;
  }
  r->rows[r->n_rows++] = (staged){centroid, (uint32_t)scan_size, (uint32_t)row_size, r->used[0], r->used[1]};
  *scan = r->area[0] + r->used[0], *row = r->area[1] + r->used[1];
  r->used[0] += scan_size, r->used[1] += row_size;
  return VS_OK;
}

vs_rc ivfpq_runs_finish(ivfpq_runs *r, int to_files, vs_err *err) {
  vs_rc rc = VS_OK;
  r->finished = 1;
  if (!r->n_runs && !to_files) return sort_staged(r, &r->order, &r->first, err);
  if (r->n_rows) rc = spill(r, err);
  for (int k = 0; k < 2; k++) free(r->area[k]), r->area[k] = NULL, r->room[k] = 0;
  free(r->rows), r->rows = NULL, r->rows_room = 0;
  return rc;
}

/* ---- reading ---- */

uint64_t ivfpq_runs_bytes(const ivfpq_runs *r) { return r->end[0] + r->end[1]; }
int ivfpq_runs_in_files(const ivfpq_runs *r) { return r->finished && !r->order; }

uint64_t ivfpq_runs_size(const ivfpq_runs *r, int kind, uint32_t c) {
  uint64_t n = 0;
  if (r->order) return (uint64_t)(r->first[c + 1] - r->first[c]) * (kind ? row_bytes(r) : scan_bytes(r));
  for (size_t i = 0; i < r->n_runs; i++) n += r->runs[i].start[kind][c + 1] - r->runs[i].start[kind][c];
  return n;
}

static vs_rc note(ivfpq_gather *g, size_t at, vs_err *err) {
  if (g->n == g->room) {
    size_t room = g->room * 2 + 256, *grown = realloc(g->at, room * sizeof *grown);
    if (!grown) return vs_nomem(err);
    g->at = grown, g->room = room;
  }
  g->at[g->n++] = at;
  return VS_OK;
}

static int skipped(const uint8_t *record, ivfpq_runs_skip skip, void *ctx) {
  uint64_t seq;
  if (!skip) return 0;
  memcpy(&seq, record, 8);
  return skip(ctx, seq);
}

static vs_rc gather_staged(const ivfpq_runs *r, int kind, size_t max_rows, ivfpq_runs_skip skip, void *ctx, ivfpq_gather *g, int *more,
                           vs_err *err) {
  uint64_t n = r->first[g->centroid + 1] - r->first[g->centroid];
  vs_rc rc = VS_OK;
  g->base = r->area[kind];
  for (; g->done < n && g->n < max_rows && !rc; g->done++) {
    const staged *s = &r->rows[r->order[r->first[g->centroid] + g->done]];
    size_t at = kind ? s->row_at : s->scan_at;
    if (!skipped(g->base + at, skip, ctx)) rc = note(g, at, err);
  }
  *more = g->done < n;
  return rc;
}

/* Bytes of the record of which `have` are at p; more than have when it is not whole, or its head is not. */
static size_t record_size(const ivfpq_runs *r, int kind, const uint8_t *p, size_t have) {
  ivfpq_scan_head sh;
  ivfpq_row_head rh;
  if (kind) {
    if (have < sizeof rh) return sizeof rh;
    memcpy(&rh, p, sizeof rh);
    return row_bytes(r) + rh.id_bytes + rh.column_bytes;
  }
  if (have < sizeof sh) return sizeof sh;
  memcpy(&sh, p, sizeof sh);
  return scan_bytes(r) + sh.column_bytes;
}

/* Reads on in one run, to its end at most. */
static vs_rc gather_run(const ivfpq_runs *r, int kind, uint64_t off, uint64_t stop, size_t max_rows, size_t max_bytes,
                        ivfpq_runs_skip skip, void *ctx, ivfpq_gather *g, vs_err *err) {
  size_t whole = g->used, need = 1; /* data holds whole records before `whole`; the one after them has need bytes or more */
  uint64_t at = off + g->done;
  vs_rc rc = VS_OK;
  while (!rc && g->n < max_rows && at < stop && (g->used < max_bytes || !g->n)) {
    size_t step = need > READ_STEP ? need : READ_STEP;
    if (step > stop - at) step = (size_t)(stop - at);
    if ((rc = reserve((void **)&g->data, &g->data_room, g->used + step, 1, err))) break;
    if ((rc = ivfpq_pread(r->fd[kind], g->data + g->used, step, at, r->dir, err))) break;
    g->used += step, at += step;
    while (g->n < max_rows && whole < g->used && !rc) {
      size_t size = record_size(r, kind, g->data + whole, g->used - whole);
      if (size > g->used - whole) {
        need = size - (g->used - whole);
        if (need > stop - at) rc = vs_fail(err, VS_IO, "%s: a temporary file was changed", r->dir);
        break;
      }
      if (!skipped(g->data + whole, skip, ctx)) rc = note(g, whole, err);
      whole += size;
    }
  }
  g->done = at - (g->used - whole) - off; /* what was read of an unfinished record is read again */
  g->used = whole;
  return rc;
}

vs_rc ivfpq_runs_gather(const ivfpq_runs *r, int kind, size_t max_rows, size_t max_bytes, ivfpq_runs_skip skip, void *ctx, ivfpq_gather *g,
                        int *more, vs_err *err) {
  vs_rc rc = VS_OK;
  g->n = g->used = 0;
  *more = 0;
  if (r->order) return gather_staged(r, kind, max_rows, skip, ctx, g, more, err);
  while (g->run < r->n_runs && !rc) {
    const uint64_t *start = r->runs[g->run].start[kind] + g->centroid;
    rc = gather_run(r, kind, start[0], start[1], max_rows, max_bytes, skip, ctx, g, err);
    if (g->done < start[1] - start[0]) break;
    g->run++, g->done = 0;
  }
  g->base = g->data;
  *more = g->run < r->n_runs;
  return rc;
}

void ivfpq_gather_reset(ivfpq_gather *g) {
  free(g->at), free(g->data);
  memset(g, 0, sizeof *g);
}

/* ---- state ---- */

void ivfpq_runs_save(const ivfpq_runs *r, ivfpq_state *s) {
  uint64_t head[] = {r->shape.n_centroids, r->shape.code_bytes, r->shape.vector_bytes, r->n_runs};
  ivfpq_state_put(s, head, sizeof head);
  for (int k = 0; k < 2; k++) {
    uint64_t n = r->n_chunks[k];
    ivfpq_state_put(s, &r->end[k], 8), ivfpq_state_put(s, &n, 8);
    ivfpq_state_put(s, r->chunks[k], n * sizeof *r->chunks[k]);
    for (size_t i = 0; i < r->n_runs; i++) ivfpq_state_put(s, r->runs[i].start[k], ((size_t)r->shape.n_centroids + 1) * 8);
  }
}

static vs_rc load_tables(ivfpq_runs *r, ivfpq_state *s, vs_err *err) {
  uint64_t head[4], n, table = ((uint64_t)r->shape.n_centroids + 1) * 8;
  run *x;
  vs_rc rc = VS_OK;
  ivfpq_state_get(s, head, sizeof head);
  if (head[0] != r->shape.n_centroids || head[1] != r->shape.code_bytes || head[2] != r->shape.vector_bytes ||
      head[3] > ivfpq_state_left(s) / table)
    return vs_corrupt(err, "%s: its rows are of another shape", r->dir);
  for (uint64_t i = 0; i < head[3] && !rc; i++) rc = new_run(r, &x, err);
  for (int k = 0; k < 2 && !rc; k++) {
    uint64_t last = 0;
    ivfpq_state_get(s, &r->end[k], 8), ivfpq_state_get(s, &n, 8);
    if (n > ivfpq_state_left(s) / sizeof *r->chunks[k]) return vs_corrupt(err, "%s: has too many chunks", r->dir);
    if (!(r->chunks[k] = malloc(n * sizeof *r->chunks[k] + 1))) return vs_nomem(err);
    ivfpq_state_get(s, r->chunks[k], n * sizeof *r->chunks[k]);
    r->n_chunks[k] = n;
    for (size_t i = 0; i < r->n_runs; i++) {
      uint64_t *start = r->runs[i].start[k];
      ivfpq_state_get(s, start, table);
      for (uint32_t c = 0; c <= r->shape.n_centroids; c++) {
        if (start[c] < last || start[c] > r->end[k]) return vs_corrupt(err, "%s: its runs overlap", r->dir);
        last = start[c];
      }
    }
  }
  return rc;
}

/* Chunks must cover the file from its first byte to its last. */
static vs_rc check_file(const ivfpq_runs *r, int k, vs_err *err) {
  uint8_t *buf = malloc(WRITE_BUFFER);
  XXH3_state_t *hash = XXH3_createState();
  uint64_t at = 0;
  vs_rc rc = buf && hash ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < r->n_chunks[k] && !rc; i++) {
    const chunk *c = &r->chunks[k][i];
    if (c->off != at || c->size > r->end[k] - at) rc = vs_corrupt(err, "%s: %s has gaps", r->dir, ivfpq_run_files[k]);
    XXH3_64bits_reset(hash);
    for (uint64_t done = 0; done < c->size && !rc;) {
      size_t m = c->size - done < WRITE_BUFFER ? (size_t)(c->size - done) : WRITE_BUFFER;
      rc = ivfpq_pread(r->fd[k], buf, m, at + done, ivfpq_run_files[k], err);
      if (!rc) XXH3_64bits_update(hash, buf, m);
      done += m;
    }
    if (!rc && XXH3_64bits_digest(hash) != c->check) rc = vs_corrupt(err, "%s: %s is damaged", r->dir, ivfpq_run_files[k]);
    at += c->size;
  }
  if (!rc && at != r->end[k]) rc = vs_corrupt(err, "%s: %s has gaps", r->dir, ivfpq_run_files[k]);
  XXH3_freeState(hash), free(buf);
  return rc;
}

vs_rc ivfpq_runs_load(const ivfpq_runs_shape *shape, ivfpq_state *s, ivfpq_runs **out, vs_err *err) {
  ivfpq_runs *r;
  vs_rc rc = new_runs(shape, O_RDWR, &r, err);
  *out = NULL;
  if (rc) return rc;
  r->finished = 1;
  rc = load_tables(r, s, err);
  for (int k = 0; k < 2 && !rc; k++) rc = check_file(r, k, err);
  if (rc) ivfpq_runs_close(r);
  else *out = r;
  return rc;
}

void ivfpq_runs_close(ivfpq_runs *r) {
  if (!r) return;
  for (int k = 0; k < 2; k++) {
    if (r->fd[k] >= 0) close(r->fd[k]);
    free(r->area[k]), free(r->chunks[k]);
  }
  for (size_t i = 0; i < r->n_runs; i++) free(r->runs[i].start[0]), free(r->runs[i].start[1]);
  free(r->runs), free(r->rows), free(r->order), free(r->first), free(r->dir), free(r);
}
