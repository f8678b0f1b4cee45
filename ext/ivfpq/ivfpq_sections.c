/* ivfpq_sections.c - passes 4 to 6 of a build: the runs become the sections of a segment file, front to back.
 *
 *   4 SCAN     scan records, partition by partition -> codes, terms, filterable columns
 *   5 ROWS     row records, partition by partition -> vectors with ids, long ids, columns; ids -> sorter -> id directory
 *   6 the small sections
 * Memory: see ivfpq_build.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/kern.h"
#include "ivfpq_build_int.h"
#include "ivfpq_sketch.h"

/* ---- pass 4: SCAN ---- */

typedef struct scan_piece {
  uint8_t *data;       /* records, one after another */
  size_t used, room;
  size_t *at;          /* where each starts */
  size_t n, at_room;
} scan_piece;

static vs_rc piece_add(scan_piece *p, const uint8_t *record, size_t size, vs_err *err) {
  if (p->used + size > p->room) {
    size_t room = (p->used + size) * 2;
    uint8_t *grown = realloc(p->data, room);
    if (!grown) return vs_nomem(err);
    p->data = grown, p->room = room;
  }
  if (p->n == p->at_room) {
    size_t room = p->at_room ? 2 * p->at_room : 256, *grown = realloc(p->at, room * sizeof *grown);
    if (!grown) return vs_nomem(err);
    p->at = grown, p->at_room = room;
  }
  memcpy(p->data + p->used, record, size);
  p->at[p->n++] = p->used;
  p->used += size;
  return VS_OK;
}

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

typedef struct bytes { uint8_t *p; size_t n, room; } bytes;
static vs_rc bytes_add(bytes *b, const void *p, size_t n, vs_err *err) {
  if (b->n + n > b->room) {
    size_t room = (b->n + n) * 2 + 64;
    uint8_t *grown = realloc(b->p, room);
    if (!grown) return vs_nomem(err);
    b->p = grown, b->room = room;
  }
  if (n) memcpy(b->p + b->n, p, n);
  b->n += n;
  return VS_OK;
}

static vs_rc put_column_block(builder *b, const scan_piece *piece, size_t c, bytes *out) {
  static const uint8_t zero[8];
  size_t nulls = out->n, skip = sizeof(ivfpq_scan_head) + b->model.m;
  int text = b->in->column_types[c] == INPUT_TEXT;
  uint32_t end = 0, len;
  const uint8_t *value;
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < piece->n && !rc; i += 8) rc = bytes_add(out, zero, 1, b->err);
  for (size_t i = 0; i < piece->n && !rc; i++) {
    int tag = column_of(piece->data + piece->at[i] + skip, c, &value, &len);
    if (!tag) out->p[nulls + i / 8] |= (uint8_t)(1u << i % 8);
    if (text) {
      end += tag ? len : 0;
      rc = bytes_add(out, &end, 4, b->err);
    } else rc = bytes_add(out, tag ? value : zero, 8, b->err);
  }
  for (size_t i = 0; i < piece->n && !rc && text; i++)
    if (column_of(piece->data + piece->at[i] + skip, c, &value, &len)) rc = bytes_add(out, value, len, b->err);
  if (!rc && out->n > UINT32_MAX) rc = vs_fail(b->err, VS_INVALID, "a partition has over 4 GiB of column text");
  return rc;
}

static vs_rc add_entry(builder *b, part_entry e) {
  if (b->n_parts == b->parts_room) {
    size_t room = b->parts_room ? 2 * b->parts_room : 256;
    part_entry *grown = realloc(b->parts, room * sizeof *grown);
    if (!grown) return vs_nomem(b->err);
    b->parts = grown, b->parts_room = room;
  }
  b->parts[b->n_parts++] = e;
  return VS_OK;
}

static vs_rc write_piece(builder *b, const scan_piece *piece, uint32_t centroid) {
  size_t m = b->model.m, n = piece->n, code_bytes = ivfpq_code_bytes(n, (uint32_t)m);
  uint8_t *codes = calloc(1, code_bytes + 8);
  bytes cols = {0};
  part_entry e = {.centroid = centroid};
  vs_rc rc = codes ? ivfpq_writer_pad(b->writer, 64, b->err) : vs_nomem(b->err);
  if (!rc && m) {
    uint16_t *terms = (uint16_t *)(codes + ivfpq_term_offset(n, (uint32_t)m));
    for (size_t i = 0; i < n; i++) {
      ivfpq_scan_head h;
      const uint8_t *r = piece->data + piece->at[i];
      memcpy(&h, r, sizeof h);
      for (size_t j = 0; j < m; j++) codes[kern_code_offset(n, m, i, j)] = r[sizeof h + j];
      terms[i] = quantize_term(b, h.term - b->model.beta * h.err2);
      if (b->truth) ivfpq_truth_place(b->truth, h.seq, (uint32_t)(b->params.n_rows + i));
    }
  }
  for (size_t c = 0; c < b->in->n_columns && !rc; c++)
    if (b->opt->column_flags[c] & IVFPQ_FILTER) rc = put_column_block(b, piece, c, &cols);
  if (!rc) {
    e.p = (ivfpq_partition){.off = ivfpq_writer_tell(b->writer), .row0 = b->params.n_rows, .n_rows = (uint32_t)n,
                            .column_bytes = (uint32_t)cols.n, .check = ivfpq_check(codes, code_bytes),
                            .column_check = ivfpq_check(cols.p, cols.n)};
    rc = ivfpq_writer_put(b->writer, codes, ivfpq_round(code_bytes, 8), b->err);
  }
  if (!rc) rc = ivfpq_writer_put(b->writer, cols.p, cols.n, b->err);
  if (!rc) rc = add_entry(b, e);
  b->params.n_rows += n;
  free(codes), free(cols.p);
  return rc;
}

static vs_rc write_centroid(builder *b, uint32_t centroid, scan_piece *piece) {
  const uint8_t *record;
  vs_rc rc;
  int wrote = 0;
  ivfpq_runs_rewind(b->runs, IVFPQ_RUN_SCAN, centroid);
  piece->n = piece->used = 0;
  for (;;) {
    if ((rc = ivfpq_runs_next(b->runs, &record, b->err))) return rc;
    if (!record) break;
    ivfpq_scan_head h;
    memcpy(&h, record, sizeof h);
    if (build_is_dropped(b, h.seq)) continue;
    if ((rc = piece_add(piece, record, sizeof h + b->model.m + h.column_bytes, b->err))) return rc;
    if (piece->n == IVFPQ_MAX_PARTITION) {
      if ((rc = write_piece(b, piece, centroid))) return rc;
      piece->n = piece->used = 0, wrote = 1;
    }
  }
  return piece->n || !wrote ? write_piece(b, piece, centroid) : VS_OK;
}

vs_rc build_write_scan(builder *b) {
  scan_piece piece = {0};
  size_t beta = b->truth ? ivfpq_truth_beta(b->truth) : IVFPQ_USUAL_BETA;
  float low = b->term_min[beta], high = b->term_max[beta];
  b->model.beta = ivfpq_beta(beta);
  if (b->model.m && low < high) b->params.term0 = low, b->params.term_step = (high - low) / 65535;
  vs_rc rc = ivfpq_writer_begin(b->writer, IVFPQ_SCAN, b->err);
  for (uint32_t c = 0; c < b->model.nlist && !rc; c++) {
    rc = write_centroid(b, c, &piece);
    build_progress(b, "write codes", c + 1, b->model.nlist);
    if (!rc && c % 64 == 0) rc = build_stopped(b);
  }
  ivfpq_writer_end(b->writer);
  free(piece.data), free(piece.at);
  return rc;
}

/* ---- pass 5: ROWS, IDHEAP, COLUMNS, IDDIR ---- */

typedef struct side_file { int fd; uint64_t n; bytes buf; const char *dir; } side_file;

static vs_rc side_flush(side_file *f, vs_err *err) {
  vs_rc rc = ivfpq_pwrite(f->fd, f->buf.p, f->buf.n, f->n - f->buf.n, f->dir, err);
  f->buf.n = 0;
  return rc;
}
static vs_rc side_bytes(side_file *f, const void *p, uint32_t n, vs_err *err) {
  vs_rc rc = f->buf.n > 1 << 20 ? side_flush(f, err) : VS_OK;
  if (!rc) rc = bytes_add(&f->buf, p, n, err);
  f->n += n;
  return rc;
}
/* Appends p and its check32. */
static vs_rc side_put(side_file *f, const void *p, uint32_t n, vs_err *err) {
  uint32_t check = ivfpq_check32(p, n);
  vs_rc rc = side_bytes(f, p, n, err);
  return rc ? rc : side_bytes(f, &check, 4, err);
}

typedef struct rows_pass {
  side_file heap, columns, sketches;
  uint8_t *record, *sketch;
  float *x;    /* the row in the model's space */
  float *raw;  /* the row as floats, when it is stored as halves */
  int8_t *q;
  uint32_t n_rows;
} rows_pass;

static vs_rc put_sketch(builder *b, rows_pass *p, const uint8_t *vector) {
  const float *raw = (const float *)vector;
  if (b->opt->store_f16) kern_get()->f16_to_f32((const uint16_t *)vector, p->raw, b->in->dim), raw = p->raw;
  ivfpq_model_prepare(&b->model, raw, p->x);
  ivfpq_sketch_make(b->model.metric, p->x, b->model.dim_padded, p->sketch, p->q);
  return side_bytes(&p->sketches, p->sketch, b->params.sketch_bytes, b->err);
}

static vs_rc write_row(builder *b, rows_pass *p, const uint8_t *r) {
  ivfpq_row_head h;
  size_t vec = build_vector_bytes(b), at = vec;
  const uint8_t *id, *cols;
  ivfpq_record entry = {0, 0, p->n_rows};
  vs_rc rc = VS_OK;
  memcpy(&h, r, sizeof h);
  r += sizeof h, id = r + vec, cols = id + h.id_bytes;
  memcpy(p->record, r, vec);
  if (b->params.sketch_bytes && (rc = put_sketch(b, p, p->record))) return rc;
  if (!build_text_ids(b)) {
    int64_t i;
    memcpy(&i, id, 8);
    memcpy(p->record + at, id, 8);
    entry.hi = ivfpq_key_int(i), at += 8;
  } else {
    memcpy(p->record + at, &h.id_bytes, 4);
    memset(p->record + at + 4, 0, b->params.id_width);
    if (h.id_bytes <= b->params.id_width) memcpy(p->record + at + 4, id, h.id_bytes);
    else {
      memcpy(p->record + at + 4, &p->heap.n, 8);
      rc = side_put(&p->heap, id, h.id_bytes, b->err);
    }
    entry.hi = ivfpq_key_text(id, h.id_bytes), at += 4 + b->params.id_width;
  }
  if (!rc && b->in->n_columns) {
    uint32_t size = h.column_bytes + 4;
    memcpy(p->record + at, &p->columns.n, 8), memcpy(p->record + at + 8, &size, 4);
    rc = side_put(&p->columns, cols, h.column_bytes, b->err);
    at += 12;
  }
  uint32_t check = ivfpq_check32(p->record, at);
  memcpy(p->record + at, &check, 4);
  if (!rc) rc = ivfpq_writer_put(b->writer, p->record, at + 4, b->err);
  if (!rc) rc = ivfpq_sorter_add(b->sorter, entry, b->err);
  p->n_rows++;
  return rc;
}

static vs_rc write_rows_section(builder *b, rows_pass *p) {
  vs_rc rc = ivfpq_writer_begin(b->writer, IVFPQ_ROWS, b->err);
  for (uint32_t c = 0; c < b->model.nlist && !rc; c++) {
    const uint8_t *record;
    ivfpq_runs_rewind(b->runs, IVFPQ_RUN_ROWS, c);
    while (!(rc = ivfpq_runs_next(b->runs, &record, b->err)) && record) {
      uint64_t seq;
      memcpy(&seq, record, 8);
      if (!build_is_dropped(b, seq) && (rc = write_row(b, p, record))) break;
    }
    build_progress(b, "write rows", p->n_rows, b->params.n_rows);
    if (!rc) rc = build_stopped(b);
  }
  ivfpq_writer_end(b->writer);
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

static vs_rc write_iddir(builder *b) {
  uint64_t pages[8] = {0}, *fences;
  uint8_t *page = calloc(1, IVFPQ_PAGE);
  uint32_t n = 0;
  size_t n_fences = 0;
  b->params.iddir_levels = ivfpq_iddir_levels(b->params.n_rows, pages);
  fences = malloc(pages[0] * 8 + 8);
  vs_rc rc = page && fences ? ivfpq_sorter_finish(b->sorter, b->err) : vs_nomem(b->err);
  if (!rc) rc = ivfpq_writer_begin(b->writer, IVFPQ_IDDIR, b->err);
  while (!rc) {
    ivfpq_record r;
    int more;
    rc = ivfpq_sorter_next(b->sorter, &r, &more, b->err);
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

static vs_rc open_rows_pass(builder *b, rows_pass *p) {
  side_file *side[] = {&p->heap, &p->columns, &p->sketches};
  size_t coded = ivfpq_round(b->model.dim_padded, 4);
  p->record = malloc(b->params.row_bytes), p->sketch = malloc(ivfpq_sketch_bytes((uint32_t)coded));
  p->x = malloc(coded * sizeof *p->x), p->raw = malloc(coded * sizeof *p->raw), p->q = malloc(coded);
  vs_rc rc = p->record && p->sketch && p->x && p->raw && p->q ? VS_OK : vs_nomem(b->err);
  for (int i = 0; i < 3; i++) *side[i] = (side_file){.fd = -1, .dir = b->opt->tmpdir};
  for (int i = 0; i < 3 && !rc; i++)
    if ((side[i]->fd = ivfpq_tmpfile(b->opt->tmpdir, b->err)) < 0) rc = VS_IO;
  return rc;
}

static void close_rows_pass(rows_pass *p) {
  side_file *side[] = {&p->heap, &p->columns, &p->sketches};
  for (int i = 0; i < 3; i++) {
    if (side[i]->fd >= 0) close(side[i]->fd);
    free(side[i]->buf.p);
  }
  free(p->record), free(p->sketch), free(p->x), free(p->raw), free(p->q);
}

vs_rc build_write_rows(builder *b) {
  rows_pass p = {.heap.fd = -1, .columns.fd = -1, .sketches.fd = -1};
  ivfpq_params *h = &b->params;
  h->id_text = (uint32_t)build_text_ids(b);
  h->id_width = h->id_text ? ivfpq_id_width(b->id_max ? b->id_max : 1) : 0;
  h->dim = b->model.dim, h->dim_padded = b->model.dim_padded, h->m = b->model.m;
  h->store = b->opt->store_f16 != 0, h->n_columns = (uint32_t)b->in->n_columns;
  h->row_bytes = (uint32_t)ivfpq_row_bytes(h);
  h->sketch_bytes = ivfpq_default_sketch(h);
  vs_rc rc = ivfpq_sorter_open(b->opt->tmpdir, b->memory / 8, &b->sorter, b->err);
  if (!rc) rc = open_rows_pass(b, &p);
  if (!rc) rc = write_rows_section(b, &p);
  if (!rc) rc = write_side(b, &p.sketches, IVFPQ_SKETCH);
  if (!rc) rc = write_side(b, &p.heap, IVFPQ_IDHEAP);
  if (!rc) rc = write_side(b, &p.columns, IVFPQ_COLUMNS);
  if (!rc) rc = write_iddir(b);
  close_rows_pass(&p);
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
  int8_t *words = malloc(m->m * chunk + 1);
  float *scale = malloc((m->m + 1) * sizeof *scale);
  vs_rc rc = words && scale ? VS_OK : vs_nomem(b->err);
  for (size_t j = 0; j < m->m && !rc; j++) scale[j] = kern_get()->quantize_i8(m->words + j * chunk, chunk, words + j * chunk);
  if (!rc) rc = write_model_part(b, IVFPQ_CODEBOOK, words, m->m * chunk, scale, m->m);
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
    h->descriptor_bytes = (uint32_t)desc.n, h->seed = b->opt->seed, h->project = m->project;
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
    rc = ivfpq_truth_measure(b->truth, s, b->threads, b->opt->stop, b->opt->ctx, &b->calibration, &b->params.calibration_bytes, b->err);
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
