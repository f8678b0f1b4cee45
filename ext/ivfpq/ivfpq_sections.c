/* ivfpq_sections.c - passes 4 to 6 of a build: the runs become the sections of a segment file, front to back.
 *
 *   4 SCAN     scan records, partition by partition -> codes, terms, filterable columns
 *   5 ROWS     row records, partition by partition -> vectors with ids, long ids, columns; ids -> sorter -> id directory
 *   6 the small sections
 * Memory: see ivfpq_build.c.
 */
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_build_int.h"
#include "ivfpq_sketch.h"

/* ---- what passes 4 and 5 share: records by blocks ----
 *
 * A block is some partitions' records, about BLOCK_BYTES of them, or a part of one large partition. The pool gathers a block's
 * records, and then makes its bytes while the block before it is written: that one task (the first) is the only one that touches
 * the file, so what is written does not depend on the number of threads.
 */
enum { BLOCK_BYTES = 4 << 20, UNITS = 256, SLICE_ROWS = 64, SIDE_BUFFER = 1 << 20 };
_Static_assert(BLOCK_BYTES / sizeof(ivfpq_scan_head) < IVFPQ_MAX_PARTITION, "only a partition of its own block can have two pieces");

typedef struct bytes { uint8_t *p; size_t n, room; } bytes;
static vs_rc bytes_room(bytes *b, size_t n, vs_err *err) {
  if (n <= b->room) return VS_OK;
  size_t room = n + n / 4 + 64;
  uint8_t *grown = realloc(b->p, room);
  if (!grown) return vs_nomem(err);
  b->p = grown, b->room = room;
  return VS_OK;
}
static vs_rc bytes_add(bytes *b, const void *p, size_t n, vs_err *err) {
  if (b->n + n > b->room) {
    vs_rc rc = bytes_room(b, (b->n + n) * 2, err);
    if (rc) return rc;
  }
  if (n) memcpy(b->p + b->n, p, n);
  b->n += n;
  return VS_OK;
}

typedef struct unit {
  ivfpq_gather g;
  int more, continued;       /* this partition has further records; had earlier ones */
  uint64_t row0;             /* ROWS: number of its first row */
  ivfpq_partition p;         /* SCAN */
  bytes out, sketch, heap, columns;
  uint64_t *where;           /* ROWS: of each record its offsets in IDHEAP and COLUMNS */
  size_t where_room;
  uint64_t heap0, columns0;  /* offsets of this unit's bytes there */
} unit;

typedef struct slice { unit *u; size_t from, to; } slice;

typedef struct record_block {
  unit units[UNITS];
  size_t n;
  slice *slices;
  size_t n_slices, slices_room;
} record_block;

typedef struct side_file { int fd; uint64_t n; bytes buf; const char *dir; } side_file;

typedef struct pass {
  builder *b;
  int kind;                  /* IVFPQ_RUN_SCAN, IVFPQ_RUN_ROWS */
  size_t max_rows, max_bytes;
  uint32_t next;             /* centroid */
  record_block *now, *before;
  vs_rc rc;                  /* of the tasks */
  vs_err err;
  pthread_mutex_t lock;
  /* ROWS */
  side_file heap, columns;
  uint64_t heap_n, columns_n, n_rows; /* placed so far */
  uint64_t sketch_off;       /* of SKETCH in the file */
  uint64_t written;          /* rows */
} pass;

static void pass_failed(pass *p, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&p->lock);
  if (!p->rc) p->err = *err, __atomic_store_n(&p->rc, rc, __ATOMIC_RELAXED);
  pthread_mutex_unlock(&p->lock);
}

static void reset_unit(unit *u) {
  ivfpq_gather_reset(&u->g);
  free(u->out.p), free(u->sketch.p), free(u->heap.p), free(u->columns.p), free(u->where);
  memset(u, 0, sizeof *u);
}

static vs_rc open_pass(pass *p, vs_err *err) {
  p->now = calloc(1, sizeof *p->now), p->before = calloc(1, sizeof *p->before);
  return p->now && p->before ? VS_OK : vs_nomem(err);
}

static void close_pass(pass *p) {
  record_block *blocks[] = {p->now, p->before};
  for (int i = 0; i < 2 && blocks[i]; i++) {
    for (size_t u = 0; u < UNITS; u++) reset_unit(&blocks[i]->units[u]);
    free(blocks[i]->slices), free(blocks[i]);
  }
}

static void place_unit(unit *u, uint32_t centroid, size_t run, uint64_t done) {
  u->g.centroid = centroid, u->g.run = run, u->g.done = done;
  u->continued = run || done, u->more = 0;
}

/* Slots keep their buffers from block to block; where partitions differ much in size these would add up. */
static void trim_block(record_block *k) {
  size_t sum = 0;
  for (size_t i = 0; i < UNITS; i++) {
    const unit *u = &k->units[i];
    sum += u->g.data_room + u->out.room + u->sketch.room + u->heap.room + u->columns.room;
  }
  for (size_t i = 0; i < UNITS && sum > 6 * BLOCK_BYTES; i++) reset_unit(&k->units[i]);
}

/* The partitions of the next block: 0 when there are none. A partition too large for one is alone in as many as it takes. */
static size_t pick_units(pass *p) {
  record_block *k = p->now;
  const unit *last = p->before->n == 1 ? &p->before->units[0] : NULL;
  uint64_t sum = 0;
  trim_block(k);
  k->n = 0;
  if (last && last->more) {
    place_unit(&k->units[k->n++], last->g.centroid, last->g.run, last->g.done);
    return k->n;
  }
  for (; p->next < p->b->model.nlist && k->n < UNITS; p->next++) {
    uint64_t size = ivfpq_runs_size(p->b->runs, p->kind, p->next);
    if (k->n && sum + size > BLOCK_BYTES) break;
    place_unit(&k->units[k->n++], p->next, 0, 0);
    sum += size;
  }
  return k->n;
}

static int skip_dropped(void *ctx, uint64_t seq) { return build_is_dropped(ctx, seq); }

static void gather_task(void *ctx, size_t i) {
  pass *p = ctx;
  unit *u = &p->now->units[i];
  vs_err err = {0};
  vs_rc rc = ivfpq_runs_gather(p->b->runs, p->kind, p->max_rows, p->max_bytes, p->b->n_dropped ? skip_dropped : NULL, p->b, &u->g, &u->more,
                               &err);
  if (!rc && u->more && p->now->n > 1) rc = vs_fail(&err, VS_IO, "%s: a temporary file was changed", p->b->opt->tmpdir);
  if (rc) pass_failed(p, rc, &err);
}

static vs_rc add_slice(record_block *k, unit *u, size_t from, size_t to, vs_err *err) {
  if (k->n_slices == k->slices_room) {
    size_t room = k->slices_room * 2 + 256;
    slice *grown = realloc(k->slices, room * sizeof *grown);
    if (!grown) return vs_nomem(err);
    k->slices = grown, k->slices_room = room;
  }
  k->slices[k->n_slices++] = (slice){u, from, to};
  return VS_OK;
}

typedef struct block_calls {
  const char *stage;
  vs_rc (*place)(pass *p, unit *u, vs_err *err);               /* in order, on the caller's thread: adds the slices */
  vs_rc (*make)(pass *p, const slice *s, vs_err *err);         /* on any thread */
  vs_rc (*write)(pass *p, unit *u, vs_err *err);               /* in order, one at a time */
} block_calls;
typedef struct block_job { pass *p; const block_calls *calls; } block_job;

static vs_rc write_block(pass *p, const block_calls *calls, record_block *k, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < k->n && !rc; i++) rc = calls->write(p, &k->units[i], err);
  return rc;
}

static void make_task(void *ctx, size_t i) {
  block_job *j = ctx;
  vs_err err = {0};
  if (__atomic_load_n(&j->p->rc, __ATOMIC_RELAXED)) return;
  vs_rc rc = i ? j->calls->make(j->p, &j->p->now->slices[i - 1], &err) : write_block(j->p, j->calls, j->p->before, &err);
  if (rc) pass_failed(j->p, rc, &err);
}

static vs_rc run_pass(pass *p, const block_calls *calls) {
  builder *b = p->b;
  block_job job = {p, calls};
  vs_rc rc = VS_OK;
  while (!rc && pick_units(p)) {
    record_block *k = p->now;
    k->n_slices = 0;
    vs_pool_run(k->n, b->threads, gather_task, p);
    for (size_t i = 0; i < k->n && !rc && !p->rc; i++) rc = calls->place(p, &k->units[i], b->err);
    if (!rc && !p->rc) vs_pool_run(k->n_slices + 1, b->threads, make_task, &job);
    if (!rc && p->rc) rc = vs_fail(b->err, p->rc, "%s", p->err.text);
    p->now = p->before, p->before = k;
    if (!rc) rc = build_stopped(b);
    if (p->kind == IVFPQ_RUN_ROWS) build_progress(b, calls->stage, p->written, b->params.n_rows);
    else build_progress(b, calls->stage, b->params.n_rows, b->in->n_rows);
  }
  if (!rc) rc = write_block(p, calls, p->before, b->err);
  build_progress(b, calls->stage, b->params.n_rows, b->params.n_rows);
  return rc;
}

/* ---- pass 4: SCAN ---- */

static uint16_t quantize_term(const builder *b, float term) {
  if (!(b->params.term_step > 0)) return 0;
  float v = (term - b->params.term0) / b->params.term_step;
  return v <= 0 ? 0 : v >= 65535 ? 65535 : (uint16_t)lrintf(v);
}

/* The value of column c in an encoded record: its tag, with *value at the payload. */
static int column_of(const uint8_t *p, size_t c, const uint8_t **value, uint32_t *len) {
  for (;; c--) {
    int tag = *p++;
    *len = tag == IVFPQ_TEXT ? 0 : 8;
    if (tag == IVFPQ_TEXT) memcpy(len, p, 4);
    *value = tag == IVFPQ_TEXT ? p + 4 : p;
    if (!c) return tag;
    p = *value + (tag ? *len : 0);
  }
}

static const uint8_t *record_of(const unit *u, size_t i) { return u->g.base + u->g.at[i]; }

static vs_rc put_column_block(const builder *b, const unit *u, size_t c, bytes *out, size_t out0, vs_err *err) {
  static const uint8_t zero[8];
  size_t n = u->g.n, nulls = out->n, skip = sizeof(ivfpq_scan_head) + b->model.m;
  int text = b->in->column_types[c] == INPUT_TEXT;
  uint32_t end = 0, len;
  const uint8_t *value;
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i += 8) rc = bytes_add(out, zero, 1, err);
  for (size_t i = 0; i < n && !rc; i++) {
    int tag = column_of(record_of(u, i) + skip, c, &value, &len);
    if (!tag) out->p[nulls + i / 8] |= (uint8_t)(1u << i % 8);
    if (text) {
      end += tag ? len : 0;
      rc = bytes_add(out, &end, 4, err);
    } else rc = bytes_add(out, tag ? value : zero, 8, err);
  }
  for (size_t i = 0; i < n && !rc && text; i++)
    if (column_of(record_of(u, i) + skip, c, &value, &len)) rc = bytes_add(out, value, len, err);
  if (!rc && out->n - out0 > UINT32_MAX) rc = vs_fail(err, VS_INVALID, "a partition has over 4 GiB of column text");
  return rc;
}

static vs_rc place_scan(pass *p, unit *u, vs_err *err) { return add_slice(p->now, u, 0, u->g.n, err); }

/* Codes and terms, zeros to a multiple of 8, columns. */
static vs_rc make_scan(pass *p, const slice *s, vs_err *err) {
  const builder *b = p->b;
  unit *u = s->u;
  size_t m = b->model.m, n = u->g.n, code_bytes = ivfpq_code_bytes(n, (uint32_t)m), columns0 = ivfpq_round(code_bytes, 8);
  vs_rc rc = bytes_room(&u->out, columns0 + 8, err);
  if (rc) return rc;
  memset(u->out.p, 0, columns0);
  uint8_t *codes = u->out.p;
  uint16_t *terms = (uint16_t *)(codes + ivfpq_term_offset(n, (uint32_t)m));
  for (size_t i = 0; i < n && m; i++) {
    ivfpq_scan_head h;
    const uint8_t *r = record_of(u, i);
    memcpy(&h, r, sizeof h);
    for (size_t j = 0; j < m; j++) codes[kern_code_offset(n, m, i, j)] = r[sizeof h + j];
    terms[i] = quantize_term(b, h.term - b->model.beta * h.err2);
  }
  u->out.n = columns0;
  for (size_t c = 0; c < b->in->n_columns && !rc; c++)
    if (b->opt->column_flags[c] & IVFPQ_FILTER) rc = put_column_block(b, u, c, &u->out, columns0, err);
  u->p = (ivfpq_partition){.n_rows = (uint32_t)n, .column_bytes = (uint32_t)(u->out.n - columns0),
                           .check = ivfpq_check(u->out.p, code_bytes), .column_check = ivfpq_check(u->out.p + columns0, u->out.n - columns0)};
  return rc;
}

static vs_rc add_entry(builder *b, part_entry e, vs_err *err) {
  if (b->n_parts == b->parts_room) {
    size_t room = b->parts_room ? 2 * b->parts_room : 256;
    part_entry *grown = realloc(b->parts, room * sizeof *grown);
    if (!grown) return vs_nomem(err);
    b->parts = grown, b->parts_room = room;
  }
  b->parts[b->n_parts++] = e;
  return VS_OK;
}

static vs_rc write_scan(pass *p, unit *u, vs_err *err) {
  builder *b = p->b;
  if (u->continued && !u->g.n) return VS_OK; /* an empty partition has an entry, an empty rest of one has none */
  vs_rc rc = ivfpq_writer_pad(b->writer, 64, err);
  u->p.off = ivfpq_writer_tell(b->writer), u->p.row0 = b->params.n_rows;
  for (size_t i = 0; i < u->g.n && b->truth && b->model.m; i++) {
    uint64_t seq;
    memcpy(&seq, record_of(u, i), 8);
    ivfpq_truth_place(b->truth, seq, (uint32_t)(b->params.n_rows + i));
  }
  if (!rc) rc = ivfpq_writer_put(b->writer, u->out.p, u->out.n, err);
  if (!rc) rc = add_entry(b, (part_entry){.p = u->p, .centroid = u->g.centroid}, err);
  b->params.n_rows += u->g.n;
  return rc;
}

vs_rc build_write_scan(builder *b) {
  static const block_calls calls = {"write codes", place_scan, make_scan, write_scan};
  pass p = {.b = b, .kind = IVFPQ_RUN_SCAN, .max_rows = IVFPQ_MAX_PARTITION, .max_bytes = SIZE_MAX, .lock = PTHREAD_MUTEX_INITIALIZER};
  size_t beta = IVFPQ_USUAL_BETA;
  vs_rc rc = b->truth ? ivfpq_truth_beta(b->truth, &beta, b->err) : VS_OK;
  float low = b->term_min[beta], high = b->term_max[beta];
  b->model.beta = ivfpq_beta(beta);
  if (b->model.m && low < high) b->params.term0 = low, b->params.term_step = (high - low) / 65535;
  if (!rc) rc = open_pass(&p, b->err);
  if (!rc) rc = ivfpq_writer_begin(b->writer, IVFPQ_SCAN, b->err);
  if (!rc) rc = run_pass(&p, &calls);
  if (!rc) ivfpq_writer_end(b->writer);
  close_pass(&p);
  return rc;
}

/* ---- pass 5: ROWS, SKETCH, IDHEAP, COLUMNS, IDDIR ---- */

static vs_rc side_flush(side_file *f, vs_err *err) {
  vs_rc rc = f->fd < 0 && f->buf.n && (f->fd = ivfpq_tmpfile(f->dir, err)) < 0 ? VS_IO : VS_OK;
  if (!rc) rc = ivfpq_pwrite(f->fd, f->buf.p, f->buf.n, f->n - f->buf.n, f->dir, err);
  f->buf.n = 0;
  return rc;
}
static vs_rc side_bytes(side_file *f, const void *p, size_t n, vs_err *err) {
  vs_rc rc = f->buf.n > SIDE_BUFFER ? side_flush(f, err) : VS_OK;
  if (!rc) rc = bytes_add(&f->buf, p, n, err);
  f->n += n;
  return rc;
}

/* Appends p and its check32 at `at`. */
static void put_checked(uint8_t *at, const void *p, uint32_t n) {
  uint32_t check = ivfpq_check32(p, n);
  if (n) memcpy(at, p, n);
  memcpy(at + n, &check, 4);
}

/* Where the rows of a unit, and what lies outside of their records, will be. */
static vs_rc place_rows(pass *p, unit *u, vs_err *err) {
  const builder *b = p->b;
  size_t n = u->g.n;
  vs_rc rc = bytes_room(&u->out, n * b->params.row_bytes, err);
  if (!rc) rc = bytes_room(&u->sketch, n * b->params.sketch_bytes, err);
  u->out.n = n * b->params.row_bytes, u->sketch.n = n * b->params.sketch_bytes;
  u->row0 = p->n_rows, p->n_rows += n;
  u->heap0 = p->heap_n, u->columns0 = p->columns_n;
  if (!rc && n > u->where_room && (build_text_ids(b) || b->in->n_columns)) {
    uint64_t *grown = realloc(u->where, 2 * n * sizeof *grown);
    if (!grown) return vs_nomem(err);
    u->where = grown, u->where_room = n;
  }
  for (size_t i = 0; i < n && !rc && u->where; i++) {
    ivfpq_row_head h;
    memcpy(&h, record_of(u, i), sizeof h);
    u->where[2 * i] = p->heap_n, u->where[2 * i + 1] = p->columns_n;
    if (h.id_bytes > b->params.id_width && build_text_ids(b)) p->heap_n += h.id_bytes + 4;
    if (b->in->n_columns) p->columns_n += h.column_bytes + 4;
  }
  u->heap.n = p->heap_n - u->heap0, u->columns.n = p->columns_n - u->columns0;
  if (!rc) rc = bytes_room(&u->heap, u->heap.n, err);
  if (!rc) rc = bytes_room(&u->columns, u->columns.n, err);
  for (size_t at = 0; at < n && !rc; at += SLICE_ROWS) rc = add_slice(p->now, u, at, n - at < SLICE_ROWS ? n : at + SLICE_ROWS, err);
  return rc;
}

static void make_row(const pass *p, unit *u, size_t i) {
  const builder *b = p->b;
  ivfpq_row_head h;
  size_t vec = build_vector_bytes(b), at = vec;
  uint8_t *out = u->out.p + i * b->params.row_bytes;
  const uint8_t *r = record_of(u, i), *id = r + sizeof h + vec, *cols;
  memcpy(&h, r, sizeof h);
  cols = id + h.id_bytes;
  memcpy(out, r + sizeof h, vec);
  if (!build_text_ids(b)) {
    memcpy(out + at, id, 8);
    at += 8;
  } else {
    memcpy(out + at, &h.id_bytes, 4);
    memset(out + at + 4, 0, b->params.id_width);
    if (h.id_bytes <= b->params.id_width) memcpy(out + at + 4, id, h.id_bytes);
    else {
      memcpy(out + at + 4, &u->where[2 * i], 8);
      put_checked(u->heap.p + (u->where[2 * i] - u->heap0), id, h.id_bytes);
    }
    at += 4 + b->params.id_width;
  }
  if (b->in->n_columns) {
    uint32_t size = h.column_bytes + 4;
    memcpy(out + at, &u->where[2 * i + 1], 8), memcpy(out + at + 8, &size, 4);
    put_checked(u->columns.p + (u->where[2 * i + 1] - u->columns0), cols, h.column_bytes);
    at += 12;
  }
  uint32_t check = ivfpq_check32(out, at);
  memcpy(out + at, &check, 4);
}

static vs_rc make_rows(pass *p, const slice *s, vs_err *err) {
  const builder *b = p->b;
  size_t coded = ivfpq_round(b->model.dim_padded, 4), skip = sizeof(ivfpq_row_head), n_sketch = b->params.sketch_bytes;
  for (size_t i = s->from; i < s->to; i++) make_row(p, s->u, i);
  if (!n_sketch) return VS_OK;
  float *x = malloc((coded + b->in->dim) * sizeof *x), *raw = x + coded;
  int8_t *q = malloc(coded);
  vs_rc rc = x && q ? VS_OK : vs_nomem(err);
  for (size_t i = s->from; i < s->to && !rc; i++) {
    const uint8_t *vector = record_of(s->u, i) + skip;
    if (b->opt->store_f16) memcpy(x, vector, b->in->dim * 2), kern_get()->f16_to_f32((const uint16_t *)x, raw, b->in->dim);
    else memcpy(raw, vector, b->in->dim * 4);
    ivfpq_model_prepare(&b->model, raw, x);
    ivfpq_sketch_make(b->model.metric, x, b->model.dim_padded, s->u->sketch.p + i * n_sketch, q);
  }
  free(x), free(q);
  return rc;
}

/* The id directory's entry of a row. */
static vs_rc note_row(builder *b, const uint8_t *record, uint64_t row, vs_err *err) {
  ivfpq_row_head h;
  ivfpq_record entry = {0, 0, row};
  const uint8_t *id = record + sizeof h + build_vector_bytes(b);
  int64_t i;
  memcpy(&h, record, sizeof h);
  if (build_text_ids(b)) entry.hi = ivfpq_key_text(id, h.id_bytes);
  else {
    memcpy(&i, id, 8);
    entry.hi = ivfpq_key_int(i);
    if (b->row_of && (i < 0 || (uint64_t)i >= b->in->n_rows)) return vs_fail(err, VS_INVALID, "%s: row numbers do not run on", b->in->path);
    if (b->row_of) b->row_of[i] = (uint32_t)row;
  }
  return b->row_of ? VS_OK : ivfpq_sorter_add(b->sorter, entry, err);
}

static vs_rc write_rows(pass *p, unit *u, vs_err *err) {
  builder *b = p->b;
  vs_rc rc = ivfpq_writer_put(b->writer, u->out.p, u->out.n, err);
  if (!rc && u->sketch.n) rc = ivfpq_writer_ahead(b->writer, u->sketch.p, u->sketch.n, p->sketch_off + u->row0 * b->params.sketch_bytes, err);
  if (!rc && u->heap.n) rc = side_bytes(&p->heap, u->heap.p, u->heap.n, err);
  if (!rc && u->columns.n) rc = side_bytes(&p->columns, u->columns.p, u->columns.n, err);
  for (size_t i = 0; i < u->g.n && !rc; i++) rc = note_row(b, record_of(u, i), u->row0 + i, err);
  __atomic_fetch_add(&p->written, u->g.n, __ATOMIC_RELAXED);
  return rc;
}

static vs_rc write_side(builder *b, side_file *f, ivfpq_section_id id) {
  vs_rc rc = side_flush(f, b->err);
  if (!rc) rc = ivfpq_writer_begin(b->writer, id, b->err);
  if (!rc) rc = ivfpq_writer_copy(b->writer, f->fd, f->n, b->err);
  ivfpq_writer_end(b->writer);
  return rc;
}

/* Closes a directory page: count in front, check at the end. */
static vs_rc put_page(builder *b, uint8_t *page, uint32_t count) {
  memcpy(page, &count, 4);
  uint64_t check = ivfpq_check(page, IVFPQ_PAGE - 8);
  memcpy(page + IVFPQ_PAGE - 8, &check, 8);
  vs_rc rc = ivfpq_writer_put(b->writer, page, IVFPQ_PAGE, b->err);
  memset(page, 0, IVFPQ_PAGE);
  return rc;
}

static vs_rc write_fences(builder *b, uint8_t *page, uint64_t *fences, size_t n) {
  vs_rc rc = VS_OK;
  while (n > 1 && !rc) {
    size_t up = 0;
    for (size_t at = 0; at < n && !rc; at += IVFPQ_FENCE_MAX) {
      size_t m = n - at < IVFPQ_FENCE_MAX ? n - at : IVFPQ_FENCE_MAX;
      memcpy(page + 8, fences + at, m * 8);
      rc = put_page(b, page, (uint32_t)m);
      fences[up++] = fences[at];
    }
    n = up;
  }
  return rc;
}

/* The next entry by key; at: row numbers seen so far. */
static vs_rc next_id(builder *b, uint64_t *at, ivfpq_record *r, int *more) {
  if (!b->row_of) return ivfpq_sorter_next(b->sorter, r, more, b->err);
  while (*at < b->in->n_rows && b->row_of[*at] == UINT32_MAX) ++*at;
  *more = *at < b->in->n_rows;
  if (*more) *r = (ivfpq_record){ivfpq_key_int((int64_t)*at), 0, b->row_of[*at]}, ++*at;
  return VS_OK;
}

static vs_rc write_iddir(builder *b) {
  uint64_t pages[8] = {0}, *fences;
  uint8_t *page = calloc(1, IVFPQ_PAGE);
  uint32_t n = 0;
  size_t n_fences = 0;
  b->params.iddir_levels = ivfpq_iddir_levels(b->params.n_rows, pages);
  fences = malloc(pages[0] * 8 + 8);
  vs_rc rc = !page || !fences ? vs_nomem(b->err) : b->sorter ? ivfpq_sorter_finish(b->sorter, b->err) : VS_OK;
  if (!rc) rc = ivfpq_writer_begin(b->writer, IVFPQ_IDDIR, b->err);
  for (uint64_t at = 0; !rc;) {
    ivfpq_record r;
    int more;
    rc = next_id(b, &at, &r, &more);
    if (rc || !more) break;
    if (n == IVFPQ_LEAF_MAX && (rc = put_page(b, page, n), n = 0, rc)) break;
    if (!n) fences[n_fences++] = r.hi;
    uint32_t row = (uint32_t)r.value;
    memcpy(page + 8 + (size_t)n * IVFPQ_LEAF_ENTRY, &r.hi, 8), memcpy(page + 16 + (size_t)n * IVFPQ_LEAF_ENTRY, &row, 4);
    n++;
  }
  if (!rc && n) rc = put_page(b, page, n);
  if (!rc) rc = write_fences(b, page, fences, n_fences);
  ivfpq_writer_end(b->writer);
  free(page), free(fences);
  return rc;
}

/* Row numbers need no sorting, only a table: where memory has room for that. */
static vs_rc open_ids(builder *b) {
  uint64_t n = b->in->n_rows * sizeof *b->row_of;
  if (b->in->id_kind != INPUT_ID_ROW || n > b->memory / 8) return ivfpq_sorter_open(b->opt->tmpdir, b->memory / 8, &b->sorter, b->err);
  if (!(b->row_of = malloc(n + 1))) return vs_nomem(b->err);
  memset(b->row_of, 0xff, n);
  return VS_OK;
}

vs_rc build_write_rows(builder *b) {
  static const block_calls calls = {"write rows", place_rows, make_rows, write_rows};
  pass p = {.b = b, .kind = IVFPQ_RUN_ROWS, .max_bytes = BLOCK_BYTES, .lock = PTHREAD_MUTEX_INITIALIZER,
            .heap = {.fd = -1, .dir = b->opt->tmpdir}, .columns = {.fd = -1, .dir = b->opt->tmpdir}};
  ivfpq_params *h = &b->params;
  h->id_text = (uint32_t)build_text_ids(b);
  h->id_width = h->id_text ? ivfpq_id_width(b->id_max ? b->id_max : 1) : 0;
  h->dim = b->model.dim, h->dim_padded = b->model.dim_padded, h->m = b->model.m;
  h->store = b->opt->store_f16 != 0, h->n_columns = (uint32_t)b->in->n_columns;
  h->row_bytes = (uint32_t)ivfpq_row_bytes(h);
  h->sketch_bytes = ivfpq_default_sketch(h);
  p.max_rows = BLOCK_BYTES / build_vector_bytes(b) + 1;
  vs_rc rc = open_pass(&p, b->err);
  if (!rc) rc = open_ids(b);
  if (!rc) rc = ivfpq_writer_begin(b->writer, IVFPQ_ROWS, b->err);
  p.sketch_off = ivfpq_round(ivfpq_writer_start(b->writer) + h->n_rows * h->row_bytes, IVFPQ_ALIGN);
  if (!rc) rc = run_pass(&p, &calls);
  if (!rc && p.written != h->n_rows)
    rc = vs_fail(b->err, VS_IO, "%s: a temporary file was changed", b->opt->tmpdir);
  if (!rc) {
    ivfpq_writer_end(b->writer);
    rc = ivfpq_writer_adopt(b->writer, IVFPQ_SKETCH, h->n_rows * h->sketch_bytes, b->err);
  }
  if (!rc) rc = write_side(b, &p.heap, IVFPQ_IDHEAP);
  if (!rc) rc = write_side(b, &p.columns, IVFPQ_COLUMNS);
  if (!rc) rc = write_iddir(b);
  side_file *side[] = {&p.heap, &p.columns};
  for (int i = 0; i < 2; i++) {
    if (side[i]->fd >= 0) close(side[i]->fd);
    free(side[i]->buf.p);
  }
  close_pass(&p);
  return rc;
}

/* ---- pass 6: the small sections ---- */

/* Puts n rows as bytes: packed, and their scales. */
static vs_rc put_rows_i8(const float *rows, size_t n, size_t len, size_t coded, uint8_t *packed, float *scale, uint8_t *plain,
                         vs_err *err) {
  int8_t *q = calloc(n * coded + 1, 1);
  if (!q) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) scale[i] = kern_get()->quantize_i8(rows + i * len, len, q + i * coded);
  if (packed) kern_pack_i8(q, n, coded, packed);
  for (size_t i = 0; plain && i < n * coded; i++) plain[i] = (uint8_t)(128 + q[i]);
  free(q);
  return VS_OK;
}

/* The centroids of a group, in the forms that ivfpq_format.h describes. */
static vs_rc put_centroids(const builder *b, const float *rows, size_t n, uint8_t *block) {
  const ivfpq_model *m = &b->model;
  size_t d = m->dim_padded, coded = m->m ? ivfpq_round(d, 4) : 0;
  ivfpq_group_layout l = ivfpq_group_shape((uint32_t)n, (uint32_t)coded, m->project);
  float *norm2 = (float *)(block + l.norm2), *scale = (float *)(block + l.scale);
  for (size_t i = 0; i < l.lanes; i++) norm2[i] = i >= n ? IVFPQ_NOWHERE : 0;
  if (!m->m) return VS_OK; /* flat: nothing is ranked */
  if (m->metric != IVFPQ_DOT)
    for (size_t i = 0; i < n; i++) norm2[i] = kern_get()->dot_f32(rows + i * d, rows + i * d, d);
  if (!m->project) return put_rows_i8(rows, n, d, coded, block + l.packed, scale, NULL, b->err);
  float *projected = malloc(n * m->project * 4 + 4);
  if (!projected) return vs_nomem(b->err);
  for (size_t i = 0; i < n; i++)
    for (size_t u = 0; u < m->project; u++)
      projected[i * m->project + u] = kern_get()->dot_f32(rows + i * d, m->directions + u * d, d);
  vs_rc rc = put_rows_i8(projected, n, m->project, m->project, block + l.packed, scale, NULL, b->err);
  if (!rc) rc = put_rows_i8(rows, n, d, coded, NULL, (float *)(block + l.row_scale), block + l.rows, b->err);
  free(projected);
  return rc;
}

/* Gathers the entries' centroids (an oversized partition has several entries with one centroid) and writes one group. */
static vs_rc write_group(builder *b, size_t first, size_t n, ivfpq_group *g) {
  const ivfpq_model *m = &b->model;
  size_t d = m->dim_padded, size = ivfpq_group_shape((uint32_t)n, m->m ? (uint32_t)ivfpq_round(d, 4) : 0, m->project).size;
  uint8_t *block = calloc(1, size);
  float *rows = malloc(n * d * 4 + 4);
  vs_rc rc = block && rows ? VS_OK : vs_nomem(b->err);
  for (size_t i = 0; i < n && !rc; i++) {
    memcpy(block + i * sizeof(ivfpq_partition), &b->parts[first + i].p, sizeof(ivfpq_partition));
    memcpy(rows + i * d, m->centroids + b->parts[first + i].centroid * d, d * 4);
  }
  if (!rc) rc = put_centroids(b, rows, n, block);
  if (!rc) {
    uint64_t check = ivfpq_check(block, size - 8);
    memcpy(block + size - 8, &check, 8);
    *g = (ivfpq_group){.off = ivfpq_writer_tell(b->writer), .size = size, .first = (uint32_t)first, .n = (uint32_t)n};
    rc = ivfpq_writer_put(b->writer, block, size, b->err);
    if (!rc) rc = ivfpq_writer_pad(b->writer, 64, b->err);
  }
  free(block), free(rows);
  return rc;
}

static vs_rc write_groups(builder *b, ivfpq_group *groups) {
  size_t at = 0;
  vs_rc rc = ivfpq_writer_begin(b->writer, IVFPQ_GROUPS, b->err);
  for (uint32_t g = 0; g < b->params.n_groups && !rc; g++) {
    size_t first = at;
    while (at < b->n_parts && b->parts[at].centroid < b->model.group_first[g + 1]) at++;
    rc = write_group(b, first, at - first, &groups[g]);
  }
  ivfpq_writer_end(b->writer);
  return rc;
}

/* A section of bytes and floats that ends with its check. */
static vs_rc write_model_part(builder *b, ivfpq_section_id id, const void *p, size_t n, const float *v, size_t n_v) {
  bytes all = {0};
  vs_rc rc = bytes_add(&all, p, n, b->err);
  if (!rc) rc = bytes_add(&all, v, n_v * 4, b->err);
  if (!rc && all.n) {
    uint64_t check = ivfpq_check(all.p, all.n);
    rc = bytes_add(&all, &check, 8, b->err);
  }
  if (!rc) rc = ivfpq_writer_begin(b->writer, id, b->err);
  if (!rc) rc = ivfpq_writer_put(b->writer, all.p, all.n, b->err);
  ivfpq_writer_end(b->writer);
  free(all.p);
  return rc;
}

static vs_rc write_codebook(builder *b) {
  const ivfpq_model *m = &b->model;
  size_t chunk = m->m ? (size_t)m->subs / m->m * ivfpq_words(m->bits) * m->sub_dim : 0;
  size_t coded = ivfpq_round(m->dim_padded, 4), turn = ivfpq_round(m->turn, 16) * coded;
  int8_t *words = malloc(m->m * chunk + turn + 1);
  float *scale = malloc((m->m + m->turn + 1) * sizeof *scale);
  vs_rc rc = words && scale ? VS_OK : vs_nomem(b->err);
  for (size_t j = 0; j < m->m && !rc; j++) scale[j] = kern_get()->quantize_i8(m->words + j * chunk, chunk, words + j * chunk);
  if (!rc && m->turn)
    rc = put_rows_i8(m->turned, m->turn, m->dim_padded, coded, (uint8_t *)words + m->m * chunk, scale + m->m, NULL, b->err);
  if (!rc) rc = write_model_part(b, IVFPQ_CODEBOOK, words, m->m * chunk + turn, scale, m->m + m->turn);
  free(words), free(scale);
  return rc;
}

static vs_rc write_projection(builder *b) {
  const ivfpq_model *m = &b->model;
  size_t coded = ivfpq_round(m->dim_padded, 4);
  uint8_t *packed = malloc(ivfpq_round(m->project, 16) * coded + 1);
  float *scale = malloc((m->project + 1) * sizeof *scale);
  vs_rc rc = packed && scale ? VS_OK : vs_nomem(b->err);
  if (!rc && m->project) rc = put_rows_i8(m->directions, m->project, m->dim_padded, coded, packed, scale, NULL, b->err);
  if (!rc) rc = write_model_part(b, IVFPQ_PROJECTION, packed, m->project * coded, scale, m->project);
  free(packed), free(scale);
  return rc;
}

static vs_rc put_descriptors(builder *b, bytes *out) {
  static const uint8_t type_of[] = {[INPUT_INT] = IVFPQ_INTEGER, [INPUT_REAL] = IVFPQ_REAL, [INPUT_TEXT] = IVFPQ_TEXT};
  vs_rc rc = VS_OK;
  for (size_t c = 0; c < b->in->n_columns && !rc; c++) {
    uint16_t n = (uint16_t)strlen(b->opt->column_names[c]);
    uint8_t head[4] = {type_of[b->in->column_types[c]], b->opt->column_flags[c]};
    memcpy(head + 2, &n, 2);
    rc = bytes_add(out, head, 4, b->err);
    if (!rc) rc = bytes_add(out, b->opt->column_names[c], n, b->err);
  }
  return rc;
}

static vs_rc write_params(builder *b, const ivfpq_group *groups) {
  static const uint8_t zero[64];
  const ivfpq_model *m = &b->model;
  ivfpq_params *h = &b->params;
  size_t d = m->dim_padded, lanes = ivfpq_round(h->n_groups, 16);
  bytes out = {0}, desc = {0};
  float *bias = calloc(lanes + 1, 4), *packed = malloc(kern_packed_len(h->n_groups, d) * 4 + 4);
  vs_rc rc = bias && packed ? put_descriptors(b, &desc) : vs_nomem(b->err);
  if (!rc) {
    h->dim = m->dim, h->dim_padded = m->dim_padded, h->metric = m->metric, h->store = b->opt->store_f16 != 0;
    h->bits = m->m ? m->bits : 0, h->m = m->m, h->sub_dim = m->m ? m->sub_dim : 0;
    h->n_columns = (uint32_t)b->in->n_columns, h->beta = m->m ? m->beta : 0;
    h->descriptor_bytes = (uint32_t)desc.n, h->seed = b->opt->seed, h->project = m->project, h->turn = m->turn;
    if (m->metric != IVFPQ_DOT) ivfpq_half_norms(m->group_centroids, h->n_groups, d, bias);
    kern_pack_f32(m->group_centroids, h->n_groups, d, packed);
    rc = bytes_add(&out, h, sizeof *h, b->err);
  }
  if (!rc) rc = bytes_add(&out, desc.p, desc.n, b->err);
  if (!rc) rc = bytes_add(&out, zero, ivfpq_round(out.n, 64) - out.n, b->err);
  if (!rc) rc = bytes_add(&out, groups, h->n_groups * sizeof *groups, b->err);
  if (!rc) rc = bytes_add(&out, bias, lanes * 4, b->err);
  if (!rc) rc = bytes_add(&out, packed, lanes * d * 4, b->err);
  if (!rc) rc = bytes_add(&out, b->calibration, h->calibration_bytes, b->err);
  if (!rc) {
    uint64_t check = ivfpq_check(out.p, out.n);
    rc = bytes_add(&out, &check, 8, b->err);
  }
  if (!rc) rc = ivfpq_writer_begin(b->writer, IVFPQ_PARAMS, b->err);
  if (!rc) rc = ivfpq_writer_put(b->writer, out.p, out.n, b->err);
  ivfpq_writer_end(b->writer);
  free(out.p), free(desc.p), free(bias), free(packed);
  return rc;
}

/* Looks at the file as a reader will, before its last section is final. */
static vs_rc calibrate(builder *b, const ivfpq_group *groups) {
  vs_io *io = NULL;
  ivfpq_segment *s = NULL;
  if (!b->truth || !b->params.n_rows) return VS_OK;
  build_progress(b, "calibrate", 0, 1);
  vs_rc rc = ivfpq_writer_mark(b->writer, b->err);
  if (!rc) rc = write_params(b, groups);
  if (!rc) rc = ivfpq_writer_preview(b->writer, b->err);
  if (!rc) rc = b->opt->open(b->path, &io, b->err);
  if (!rc) rc = ivfpq_segment_open(io, &s, b->err);
  if (!rc)
    rc = ivfpq_calibrate(b->truth, s, b->threads, b->opt->stop, b->opt->ctx, &b->calibration, &b->params.calibration_bytes, b->err);
  if (s) ivfpq_segment_close(s);
  build_progress(b, "calibrate", 1, 1);
  return rc ? rc : ivfpq_writer_back(b->writer, b->err);
}

vs_rc build_write_small(builder *b) {
  const ivfpq_model *m = &b->model;
  int empty = b->params.n_rows == 0;
  b->params.nlist = empty ? 0 : (uint32_t)b->n_parts;
  b->params.n_groups = empty ? 0 : m->n_groups;
  if (b->n_parts > IVFPQ_MAX_NLIST) return vs_fail(b->err, VS_INVALID, "more than %d partitions", IVFPQ_MAX_NLIST);
  ivfpq_group *groups = calloc(m->n_groups + 1, sizeof *groups);
  vs_rc rc = groups ? write_groups(b, groups) : vs_nomem(b->err);
  if (!rc) rc = write_model_part(b, IVFPQ_MEAN, NULL, 0, m->mean, m->m ? m->dim : 0);
  if (!rc) rc = write_codebook(b);
  if (!rc) rc = write_projection(b);
  if (!rc) rc = calibrate(b, groups);
  if (!rc) rc = write_params(b, groups);
  free(groups);
  return rc;
}
