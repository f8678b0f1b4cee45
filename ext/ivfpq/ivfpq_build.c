/* ivfpq_build.c - builds a segment from an input of any size.
 *
 * Passes, what each reads and writes:
 *   1 sample   reads short stretches of rows, evenly over the input -> memory
 *   2 train    the sample -> mean, coarse centroids, code words (ivfpq_model.c)
 *   3 stream   reads all rows once: assign, encode; two records per row -> runs in temporary files (ivfpq_runs.c), ids -> sorter
 *   4 SCAN     scan records, partition by partition -> codes, terms, filterable columns
 *   5 ROWS     row records, partition by partition -> vectors with ids, long ids, columns; ids -> sorter -> id directory
 *   6 the small sections, footer
 * Everything is written front to back; the temporary files have no name and vanish with the process.
 *
 * Anonymous memory, with n_c = nlist * dim_padded * 4 bytes of centroids, M = options.memory:
 *   train  sample (<= M/2, twice while the mean is taken: raw and padded, each <= M/4) + 4 n_c + code words
 *   stream 2 n_c + staging (M/2) + sorter (M/8) + batch (<= 16 MiB, and its padded copy) + 16 bytes * nlist per run
 *   4, 5   1 partition of codes and columns (<= IVFPQ_MAX_PARTITION rows) + sorter (M/8) + 2 MiB of buffers
 * No term grows with the rows but the run tables: 16 * nlist * rows * (row bytes) / (M/2).
 */
#include "ivfpq_build.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_model.h"
#include "ivfpq_runs.h"
#include "ivfpq_write.h"

enum {
  SAMPLE_PER_CENTROID = 40,
  SAMPLE_MIN = 32768,
  SAMPLE_STRETCH = 16,         /* rows read in a row while sampling: a chunked file is inflated once at most */
  BATCH_BYTES = 16 << 20,
  ENCODE_SLICE = 256,
  MAX_ROW_TEXT = 1 << 30       /* bytes of column text in one row: record sizes are 32 bits wide */
};
#define DEFAULT_MEMORY ((uint64_t)1 << 30)
#define DEFAULT_BETA 1.5f       /* between 1 and 2 on every set measured; see DESIGN 5.2 */
#define MAX_NORM2 1e36f         /* squares of longer vectors leave the range of float */

uint32_t ivfpq_default_nlist(uint64_t n) {
  double root = sqrt((double)n), wide = 4 * root < 8000 ? 4 * root : 8000;
  if (wide > (double)n / 128) wide = (double)n / 128;
  double nlist = wide > root ? wide : root;
  return nlist < 1 ? 1 : nlist > IVFPQ_MAX_NLIST ? IVFPQ_MAX_NLIST : (uint32_t)lround(nlist);
}

uint32_t ivfpq_default_subs(uint32_t dim) {
  uint32_t per = dim < 512 ? 8 : 16, m = (dim + per / 2) / per;
  return m < 1 ? 1 : m > IVFPQ_MAX_M ? IVFPQ_MAX_M : m;
}

typedef struct part_entry {
  ivfpq_partition p;
  uint32_t centroid;
} part_entry;

typedef struct builder {
  input *in;
  const ivfpq_build_options *opt;
  ivfpq_build_result *out;
  vs_err *err;
  uint64_t memory;
  int threads;
  ivfpq_model model;
  ivfpq_runs *runs;
  ivfpq_sorter *sorter;
  ivfpq_writer *writer;
  uint64_t *dropped; /* sequence numbers of duplicate rows, ascending */
  size_t n_dropped, dropped_room;
  float term_min, term_max;
  uint32_t id_max;   /* bytes of the longest text id */
  part_entry *parts;
  size_t n_parts, parts_room;
  ivfpq_params params;
} builder;

/* ---- small helpers ---- */

static int text_ids(const builder *b) { return b->in->id_kind == INPUT_ID_TEXT; }
static size_t vector_bytes(const builder *b) { return (size_t)b->in->dim * (b->opt->store_f16 ? 2 : 4); }

static vs_rc stopped(builder *b) {
  return b->opt->stop && b->opt->stop(b->opt->ctx) ? vs_fail(b->err, VS_INTERRUPT, "interrupted") : VS_OK;
}
static void progress(builder *b, const char *stage, uint64_t done, uint64_t total) {
  if (b->opt->progress) b->opt->progress(b->opt->ctx, stage, done, total);
}
static void describe(builder *b, uint64_t row, char *buf, size_t n) {
  if (b->opt->describe) b->opt->describe(b->opt->ctx, row, buf, n);
  else snprintf(buf, n, "%s: row %llu", b->in->path, (unsigned long long)row);
}

/* Why a row cannot be indexed, or NULL. */
static const char *row_fault(const builder *b, const float *x, uint8_t fault) {
  if (fault) return input_fault_text(fault);
  float n2 = kern_get()->dot_f32(x, x, b->in->dim);
  if (!(n2 < MAX_NORM2)) return "the vector is longer than 1e18";
  if (b->opt->metric == IVFPQ_COSINE && n2 < 1e-30f) {
    int zero = 1;
    for (uint32_t j = 0; j < b->in->dim && zero; j++) zero = x[j] == 0;
    if (zero) return "a zero vector has no direction (cosine)";
  }
  if (b->opt->store_f16)
    for (uint32_t j = 0; j < b->in->dim; j++)
      if (fabsf(x[j]) >= 65520) return "a value overflows float16 (--store f32 keeps it)";
  return NULL;
}

/* ---- pass 1: sample ---- */

static vs_rc take_sample(builder *b, float *sample, size_t want, size_t *n_out) {
  uint64_t n = b->in->n_rows, stretches = (want + SAMPLE_STRETCH - 1) / SAMPLE_STRETCH;
  size_t have = 0, dim = b->in->dim;
  ivfpq_rng rng = {b->opt->seed ^ 0x5a5a5a5aull};
  int all = want >= n;
  vs_rc rc = all ? b->in->seek(b->in, 0, b->err) : VS_OK;
  for (uint64_t s = 0; !rc && have < want; s++) {
    input_batch batch;
    if (!all) {
      if (s == stretches) break;
      uint64_t lo = (uint64_t)((double)s * (double)n / (double)stretches), hi = (uint64_t)((double)(s + 1) * (double)n / (double)stretches);
      uint64_t room = hi - lo > SAMPLE_STRETCH ? hi - lo - SAMPLE_STRETCH : 0;
      rc = b->in->seek(b->in, lo + ivfpq_rng_below(&rng, room + 1), b->err);
    }
    if (!rc) rc = b->in->read(b->in, all ? 4096 : SAMPLE_STRETCH, &batch, b->err);
    if (rc || !batch.n) break;
    for (size_t i = 0; i < batch.n && have < want; i++)
      if (!row_fault(b, batch.vectors + i * dim, batch.faults[i])) memcpy(sample + have++ * dim, batch.vectors + i * dim, dim * 4);
    if (s % 64 == 0) {
      progress(b, "sample", have, want);
      rc = stopped(b);
    }
  }
  *n_out = have;
  return rc;
}

/* ---- pass 2: train ---- */

static void shape_model(builder *b) {
  ivfpq_model *m = &b->model;
  uint64_t n = b->in->n_rows;
  m->metric = b->opt->metric, m->dim = m->dim_padded = b->in->dim, m->nlist = 1, m->beta = DEFAULT_BETA;
  if (n == 0 || (n < IVFPQ_FLAT_ROWS && !b->opt->nlist)) return;
  m->nlist = b->opt->nlist ? b->opt->nlist : ivfpq_default_nlist(n);
  m->bits = b->opt->bits ? b->opt->bits : 8;
  m->subs = b->opt->subs ? b->opt->subs : ivfpq_default_subs(m->dim) * (m->bits == 4 ? 2 : 1);
  if (m->bits == 4) m->subs = m->subs < 2 ? 2 : (m->subs + 1) / 2 * 2;
  m->sub_dim = (m->dim + m->subs - 1) / m->subs;
  if (!b->opt->subs && m->bits == 8) m->subs = (m->dim + m->sub_dim - 1) / m->sub_dim; /* none of padding alone */
  m->m = m->bits == 4 ? m->subs / 2 : m->subs;
  m->dim_padded = m->subs * m->sub_dim;
}

static vs_rc train(builder *b) {
  ivfpq_model *m = &b->model;
  uint64_t row = (uint64_t)m->dim_padded * 4, fixed = 4 * m->nlist * row + (uint64_t)m->subs * 256 * m->sub_dim * 8;
  size_t want = (size_t)m->nlist * SAMPLE_PER_CENTROID, n = 0;
  if (!m->m) return ivfpq_model_learn(m, &(ivfpq_learn){0}, NULL, b->err);
  if (fixed > b->memory)
    return vs_fail(b->err, VS_INVALID, "%u partitions of %u dimensions need --memory %lluM at least", m->nlist, m->dim,
                   (unsigned long long)(fixed >> 20) + 1);
  if (want < SAMPLE_MIN) want = SAMPLE_MIN;
  if (want > b->memory / 4 / row) want = b->memory / 4 / row;
  if (want > b->in->n_rows) want = b->in->n_rows;
  float *raw = malloc(want * (size_t)m->dim * 4 + 4), *padded = malloc(want * (size_t)row + 4);
  vs_rc rc = raw && padded ? take_sample(b, raw, want, &n) : vs_nomem(b->err);
  if (!rc && n == 0) rc = vs_fail(b->err, VS_INVALID, "%s: no row can be indexed", b->in->path);
  if (!rc) {
    ivfpq_learn p = {.sample = raw, .n = n, .seed = b->opt->seed, .threads = b->threads, .stop = b->opt->stop,
                     .ctx = b->opt->ctx, .progress = b->opt->progress};
    rc = ivfpq_model_learn(m, &p, padded, b->err);
  }
  free(raw), free(padded);
  return rc;
}

/* ---- pass 3: stream ---- */

typedef struct encode_job {
  const ivfpq_model *m;
  const input_batch *batch;
  float *x;
  uint32_t *centroid;
  uint8_t *codes;
  float *terms;
} encode_job;

static void encode_slice(void *ctx, size_t s) {
  const encode_job *e = ctx;
  const ivfpq_model *m = e->m;
  size_t at = s * ENCODE_SLICE, n = e->batch->n - at < ENCODE_SLICE ? e->batch->n - at : ENCODE_SLICE;
  float *x = e->x + at * m->dim_padded;
  for (size_t i = 0; i < n; i++) ivfpq_model_prepare(m, e->batch->vectors + (at + i) * m->dim, x + i * m->dim_padded);
  kern_get()->argmax_f32(x, n, m->dim_padded, m->dim_padded, m->packed, m->bias, m->nlist, e->centroid + at, NULL);
  ivfpq_model_encode(m, x, n, e->centroid + at, e->codes + at * m->m, e->terms + at);
}

static uint32_t columns_size(const builder *b, const input_value *v) {
  uint64_t n = 0;
  for (size_t c = 0; c < b->in->n_columns; c++) n += v[c].type == INPUT_NULL ? 1 : v[c].type == INPUT_TEXT ? 5 + v[c].len : 9;
  return (uint32_t)n;
}

/* Values take the type of their column: an integer in a real column becomes real. */
static uint8_t *put_columns(const builder *b, const input_value *v, uint8_t *p) {
  for (size_t c = 0; c < b->in->n_columns; c++) {
    if (v[c].type == INPUT_NULL) {
      *p++ = 0;
    } else if (v[c].type == INPUT_TEXT) {
      uint32_t len = (uint32_t)v[c].len;
      *p++ = IVFPQ_TEXT;
      memcpy(p, &len, 4), memcpy(p + 4, v[c].text, len);
      p += 4 + len;
    } else {
      double real = v[c].type == INPUT_INT ? (double)v[c].i : v[c].r;
      int is_real = b->in->column_types[c] == INPUT_REAL;
      *p++ = is_real ? IVFPQ_REAL : IVFPQ_INTEGER;
      memcpy(p, is_real ? (const void *)&real : (const void *)&v[c].i, 8);
      p += 8;
    }
  }
  return p;
}

static vs_rc note_id(builder *b, const input_value *id, uint64_t seq) {
  ivfpq_record r = {0, 0, seq};
  if (b->in->id_kind == INPUT_ID_ROW) return VS_OK; /* unique by construction */
  if (id->type == INPUT_TEXT) {
    XXH128_hash_t h = XXH3_128bits(id->text, id->len);
    r.hi = h.high64, r.lo = h.low64;
    if (id->len > b->id_max) b->id_max = (uint32_t)id->len;
  } else r.hi = ivfpq_key_int(id->i);
  return ivfpq_sorter_add(b->sorter, r, b->err);
}

static vs_rc add_row(builder *b, const input_batch *batch, size_t i, uint32_t centroid, const uint8_t *codes, float term) {
  const input_value *id = &batch->ids[i], *cols = batch->columns + i * b->in->n_columns;
  const float *x = batch->vectors + i * b->in->dim;
  uint64_t seq = batch->first_row + i;
  uint32_t id_bytes = id->type == INPUT_TEXT ? (uint32_t)id->len : 8, column_bytes = columns_size(b, cols);
  uint8_t *scan, *row;
  vs_rc rc = note_id(b, id, seq);
  if (!rc) rc = ivfpq_runs_add(b->runs, centroid, id_bytes, column_bytes, &scan, &row, b->err);
  if (rc) return rc;
  ivfpq_scan_head sh = {seq, term, column_bytes};
  ivfpq_row_head rh = {seq, id_bytes, column_bytes};
  memcpy(scan, &sh, sizeof sh);
  if (codes) memcpy(scan + sizeof sh, codes, b->model.m);
  put_columns(b, cols, scan + sizeof sh + b->model.m);
  memcpy(row, &rh, sizeof rh);
  row += sizeof rh;
  if (b->opt->store_f16) kern_get()->f32_to_f16(x, (uint16_t *)row, b->in->dim);
  else memcpy(row, x, vector_bytes(b));
  row += vector_bytes(b);
  memcpy(row, id->type == INPUT_TEXT ? (const void *)id->text : (const void *)&id->i, id_bytes);
  put_columns(b, cols, row + id_bytes);
  if (term < b->term_min) b->term_min = term;
  if (term > b->term_max) b->term_max = term;
  return VS_OK;
}

static vs_rc bad_row(builder *b, uint64_t row, const char *why) {
  char where[600];
  if (!b->opt->skip_bad) {
    describe(b, row, where, sizeof where);
    return vs_fail(b->err, VS_INVALID, "%s: %s; --bad-rows skip leaves such rows out", where, why);
  }
  b->out->n_bad++;
  if (b->opt->bad_row) b->opt->bad_row(b->opt->ctx, row, why);
  return VS_OK;
}

/* Why the id or the columns of a row cannot be stored, or NULL. */
static const char *text_fault(const builder *b, const input_value *id, const input_value *v) {
  uint64_t total = 0;
  if (id->type == INPUT_TEXT && id->len > IVFPQ_MAX_TEXT) return "the id is longer than 16 MiB";
  for (size_t c = 0; c < b->in->n_columns; c++) {
    if (v[c].type != INPUT_TEXT) continue;
    if (v[c].len > IVFPQ_MAX_TEXT) return "a column's text is longer than 16 MiB";
    total += v[c].len;
  }
  return total > MAX_ROW_TEXT ? "the columns' texts are longer than 1 GiB together" : NULL;
}

static vs_rc stream_batch(builder *b, const input_batch *batch, encode_job *e) {
  size_t m = b->model.m;
  vs_rc rc = VS_OK;
  e->batch = batch;
  if (m) vs_pool_run((batch->n + ENCODE_SLICE - 1) / ENCODE_SLICE, b->threads, encode_slice, e);
  for (size_t i = 0; i < batch->n && !rc; i++) {
    const char *why = row_fault(b, batch->vectors + i * b->in->dim, batch->faults[i]);
    if (!why) why = text_fault(b, &batch->ids[i], batch->columns + i * b->in->n_columns);
    if (why) rc = bad_row(b, batch->first_row + i, why);
    else rc = add_row(b, batch, i, m ? e->centroid[i] : 0, m ? e->codes + i * m : NULL, m ? e->terms[i] : 0);
  }
  return rc;
}

static vs_rc stream(builder *b) {
  const ivfpq_model *m = &b->model;
  size_t max = BATCH_BYTES / (m->dim_padded * 4) + 1;
  if (max > 16384) max = 16384;
  encode_job e = {.m = m, .x = malloc(m->m ? max * m->dim_padded * 4 : 1), .centroid = malloc(max * 4),
                  .codes = malloc(max * m->m + 1), .terms = malloc(max * 4)};
  vs_rc rc = e.x && e.centroid && e.codes && e.terms ? VS_OK : vs_nomem(b->err);
  uint64_t done = 0;
  b->term_min = INFINITY, b->term_max = -INFINITY;
  if (!rc) rc = ivfpq_runs_open(b->opt->tmpdir, m->nlist, m->m, vector_bytes(b), b->memory / 2, &b->runs, b->err);
  if (!rc) rc = ivfpq_sorter_open(b->opt->tmpdir, b->memory / 8, &b->sorter, b->err);
  if (!rc && b->in->n_rows) rc = b->in->seek(b->in, 0, b->err);
  while (!rc && done < b->in->n_rows) {
    input_batch batch;
    rc = b->in->read(b->in, max, &batch, b->err);
    if (rc || !batch.n) break;
    rc = stream_batch(b, &batch, &e);
    done += batch.n;
    progress(b, "encode", done, b->in->n_rows);
    if (!rc) rc = stopped(b);
  }
  if (!rc && done != b->in->n_rows)
    rc = vs_fail(b->err, VS_IO, "%s: ended after %llu of %llu rows", b->in->path, (unsigned long long)done,
                 (unsigned long long)b->in->n_rows);
  if (!rc) rc = ivfpq_runs_finish(b->runs, b->err);
  free(e.x), free(e.centroid), free(e.codes), free(e.terms);
  return rc;
}

/* ---- duplicate ids ---- */

static vs_rc drop(builder *b, uint64_t seq, uint64_t kept) {
  char one[600], two[600];
  if (b->opt->duplicates == IVFPQ_DUP_FAIL) {
    describe(b, seq, one, sizeof one), describe(b, kept, two, sizeof two);
    return vs_fail(b->err, VS_INVALID, "%.400s: same id as %.400s; --duplicates first|last keeps one of them", one, two);
  }
  if (b->n_dropped == b->dropped_room) {
    size_t room = b->dropped_room ? 2 * b->dropped_room : 64;
    uint64_t *grown = realloc(b->dropped, room * sizeof *grown);
    if (!grown) return vs_nomem(b->err);
    b->dropped = grown, b->dropped_room = room;
  }
  b->dropped[b->n_dropped++] = seq;
  b->out->n_duplicates++;
  return VS_OK;
}

static int by_number(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

/* Equal ids stand together, in input order. Text is compared by 128 bits of hash: equal hashes are equal ids. */
static vs_rc find_duplicates(builder *b) {
  ivfpq_record r, last = {0};
  int more, have = 0;
  vs_rc rc = ivfpq_sorter_finish(b->sorter, b->err);
  while (!rc) {
    rc = ivfpq_sorter_next(b->sorter, &r, &more, b->err);
    if (rc || !more) break;
    if (have && r.hi == last.hi && r.lo == last.lo) {
      if (b->opt->duplicates == IVFPQ_DUP_LAST) rc = drop(b, last.value, r.value), last = r;
      else rc = drop(b, r.value, last.value);
    } else last = r, have = 1;
  }
  ivfpq_sorter_close(b->sorter), b->sorter = NULL;
  if (!rc && b->n_dropped) qsort(b->dropped, b->n_dropped, sizeof *b->dropped, by_number);
  return rc;
}

static int is_dropped(const builder *b, uint64_t seq) {
  return b->n_dropped && bsearch(&seq, b->dropped, b->n_dropped, sizeof *b->dropped, by_number);
}

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
  size_t m = b->model.m, n = piece->n, padded = ivfpq_round(n, 64), code_bytes = ivfpq_code_bytes(n, (uint32_t)m);
  uint8_t *codes = calloc(1, code_bytes + 8);
  bytes cols = {0};
  part_entry e = {.centroid = centroid};
  vs_rc rc = codes ? ivfpq_writer_pad(b->writer, 64, b->err) : vs_nomem(b->err);
  if (!rc && m) {
    uint16_t *terms = (uint16_t *)(codes + padded * m);
    for (size_t i = 0; i < n; i++) {
      ivfpq_scan_head h;
      const uint8_t *r = piece->data + piece->at[i];
      memcpy(&h, r, sizeof h);
      for (size_t j = 0; j < m; j++) codes[kern_code_offset(n, m, i, j)] = r[sizeof h + j];
      terms[i] = quantize_term(b, h.term);
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
  b->params.n_rows += n, b->params.n_padded += padded;
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
    if (is_dropped(b, h.seq)) continue;
    if ((rc = piece_add(piece, record, sizeof h + b->model.m + h.column_bytes, b->err))) return rc;
    if (piece->n == IVFPQ_MAX_PARTITION) {
      if ((rc = write_piece(b, piece, centroid))) return rc;
      piece->n = piece->used = 0, wrote = 1;
    }
  }
  return piece->n || !wrote ? write_piece(b, piece, centroid) : VS_OK;
}

static vs_rc write_scan(builder *b) {
  scan_piece piece = {0};
  b->params.term0 = b->term_min < b->term_max ? b->term_min : 0;
  b->params.term_step = b->term_min < b->term_max ? (b->term_max - b->term_min) / 65535 : 0;
  if (!b->model.m) b->params.term0 = b->params.term_step = 0;
  vs_rc rc = ivfpq_writer_begin(b->writer, IVFPQ_SCAN, b->err);
  for (uint32_t c = 0; c < b->model.nlist && !rc; c++) {
    rc = write_centroid(b, c, &piece);
    progress(b, "write codes", c + 1, b->model.nlist);
    if (!rc && c % 64 == 0) rc = stopped(b);
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
/* Appends p and its check32. */
static vs_rc side_put(side_file *f, const void *p, uint32_t n, vs_err *err) {
  uint32_t check = ivfpq_check32(p, n);
  vs_rc rc = f->buf.n > 1 << 20 ? side_flush(f, err) : VS_OK;
  if (!rc) rc = bytes_add(&f->buf, p, n, err);
  if (!rc) rc = bytes_add(&f->buf, &check, 4, err);
  f->n += n + 4ull;
  return rc;
}

typedef struct rows_pass {
  side_file heap, columns;
  uint8_t *record;
  uint32_t n_rows;
} rows_pass;

static vs_rc write_row(builder *b, rows_pass *p, const uint8_t *r) {
  ivfpq_row_head h;
  size_t vec = vector_bytes(b), at = vec;
  const uint8_t *id, *cols;
  ivfpq_record entry = {0, 0, p->n_rows};
  vs_rc rc = VS_OK;
  memcpy(&h, r, sizeof h);
  r += sizeof h, id = r + vec, cols = id + h.id_bytes;
  memcpy(p->record, r, vec);
  if (!text_ids(b)) {
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
      if (!is_dropped(b, seq) && (rc = write_row(b, p, record))) break;
    }
    progress(b, "write rows", p->n_rows, b->params.n_rows);
    if (!rc) rc = stopped(b);
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

static vs_rc write_rows(builder *b) {
  rows_pass p = {.heap = {.fd = -1, .dir = b->opt->tmpdir}, .columns = {.fd = -1, .dir = b->opt->tmpdir}};
  ivfpq_params *h = &b->params;
  h->id_text = (uint32_t)text_ids(b);
  h->id_width = !h->id_text ? 0 : b->id_max > IVFPQ_ID_INLINE ? IVFPQ_ID_INLINE : b->id_max < 8 ? 8 : (uint32_t)ivfpq_round(b->id_max, 4);
  h->row_bytes = (uint32_t)(vector_bytes(b) + (h->id_text ? 4 + h->id_width : 8) + (b->in->n_columns ? 12 : 0) + 4);
  p.record = malloc(h->row_bytes);
  vs_rc rc = p.record ? ivfpq_sorter_open(b->opt->tmpdir, b->memory / 8, &b->sorter, b->err) : vs_nomem(b->err);
  if (!rc && (p.heap.fd = ivfpq_tmpfile(b->opt->tmpdir, b->err)) < 0) rc = VS_IO;
  if (!rc && (p.columns.fd = ivfpq_tmpfile(b->opt->tmpdir, b->err)) < 0) rc = VS_IO;
  if (!rc) rc = write_rows_section(b, &p);
  if (!rc) rc = write_side(b, &p.heap, IVFPQ_IDHEAP);
  if (!rc) rc = write_side(b, &p.columns, IVFPQ_COLUMNS);
  if (!rc) rc = write_iddir(b);
  if (p.heap.fd >= 0) close(p.heap.fd);
  if (p.columns.fd >= 0) close(p.columns.fd);
  free(p.heap.buf.p), free(p.columns.buf.p), free(p.record);
  return rc;
}

/* ---- pass 6: the small sections ---- */

/* Gathers the entries' centroids (an oversized partition has several entries with one centroid) and writes one group. */
static vs_rc write_group(builder *b, size_t first, size_t n, ivfpq_group *g) {
  const ivfpq_model *m = &b->model;
  size_t d = m->dim_padded, size = ivfpq_group_bytes((uint32_t)n, (uint32_t)d), lanes = ivfpq_round(n, 16);
  uint8_t *block = calloc(1, size);
  float *rows = malloc(n * d * 4 + 4);
  vs_rc rc = block && rows ? VS_OK : vs_nomem(b->err);
  if (!rc) {
    float *bias = (float *)(block + n * sizeof(ivfpq_partition));
    for (size_t i = 0; i < n; i++) {
      memcpy(block + i * sizeof(ivfpq_partition), &b->parts[first + i].p, sizeof(ivfpq_partition));
      memcpy(rows + i * d, m->centroids + b->parts[first + i].centroid * d, d * 4);
    }
    if (m->metric != IVFPQ_DOT) ivfpq_half_norms(rows, n, d, bias);
    kern_pack_f32(rows, n, d, bias + lanes);
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

static vs_rc write_floats(builder *b, ivfpq_section_id id, const float *v, size_t n) {
  uint64_t check = ivfpq_check(v, n * 4);
  vs_rc rc = ivfpq_writer_begin(b->writer, id, b->err);
  if (!rc && b->model.m) rc = ivfpq_writer_put(b->writer, v, n * 4, b->err);
  if (!rc && b->model.m) rc = ivfpq_writer_put(b->writer, &check, 8, b->err);
  ivfpq_writer_end(b->writer);
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
    h->descriptor_bytes = (uint32_t)desc.n, h->seed = b->opt->seed;
    if (m->metric != IVFPQ_DOT) ivfpq_half_norms(m->group_centroids, h->n_groups, d, bias);
    kern_pack_f32(m->group_centroids, h->n_groups, d, packed);
    rc = bytes_add(&out, h, sizeof *h, b->err);
  }
  if (!rc) rc = bytes_add(&out, desc.p, desc.n, b->err);
  if (!rc) rc = bytes_add(&out, zero, ivfpq_round(out.n, 64) - out.n, b->err);
  if (!rc) rc = bytes_add(&out, groups, h->n_groups * sizeof *groups, b->err);
  if (!rc) rc = bytes_add(&out, bias, lanes * 4, b->err);
  if (!rc) rc = bytes_add(&out, packed, lanes * d * 4, b->err);
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

static vs_rc write_small(builder *b) {
  const ivfpq_model *m = &b->model;
  int empty = b->params.n_rows == 0;
  b->params.nlist = empty ? 0 : (uint32_t)b->n_parts;
  b->params.n_groups = empty ? 0 : m->n_groups;
  if (b->n_parts > IVFPQ_MAX_NLIST) return vs_fail(b->err, VS_INVALID, "more than %d partitions", IVFPQ_MAX_NLIST);
  ivfpq_group *groups = calloc(m->n_groups + 1, sizeof *groups);
  vs_rc rc = groups ? write_groups(b, groups) : vs_nomem(b->err);
  if (!rc) rc = write_floats(b, IVFPQ_MEAN, m->mean, m->dim);
  if (!rc) rc = write_floats(b, IVFPQ_CODEBOOK, m->words_packed, (size_t)m->subs * ivfpq_words(m->bits) * m->sub_dim);
  if (!rc) rc = write_params(b, groups);
  free(groups);
  return rc;
}

/* ---- the whole ---- */

static vs_rc check_options(builder *b) {
  const ivfpq_build_options *o = b->opt;
  if (o->bits && o->bits != 8 && o->bits != 4) return vs_fail(b->err, VS_INVALID, "bits must be 8 or 4, not %u", o->bits);
  if (o->nlist > IVFPQ_MAX_NLIST) return vs_fail(b->err, VS_INVALID, "at most %d partitions", IVFPQ_MAX_NLIST);
  if (b->in->dim < 1 || b->in->dim > IVFPQ_MAX_DIM)
    return vs_fail(b->err, VS_INVALID, "%s: %u dimensions; 1 to %d are possible", b->in->path, b->in->dim, IVFPQ_MAX_DIM);
  uint32_t most = (o->bits == 4 ? 2 : 1) * IVFPQ_MAX_M;
  if (o->subs > most || o->subs > b->in->dim)
    return vs_fail(b->err, VS_INVALID, "sub-quantizers: 1 to %u here, not %u", most < b->in->dim ? most : b->in->dim, o->subs);
  if (b->in->n_rows >= 1ull << 32)
    return vs_fail(b->err, VS_INVALID, "%llu rows: a segment holds fewer than 2^32; use `vecshard pack` to spread files over shards",
                   (unsigned long long)b->in->n_rows);
  if (b->in->n_columns > IVFPQ_MAX_COLUMNS) return vs_fail(b->err, VS_INVALID, "at most %d columns", IVFPQ_MAX_COLUMNS);
  for (size_t c = 0; c < b->in->n_columns; c++) {
    size_t n = strlen(o->column_names[c]);
    if (n < 1 || n > UINT16_MAX) return vs_fail(b->err, VS_INVALID, "column %zu: its name has %zu bytes; 1 to 65535 are possible", c + 1, n);
  }
  return VS_OK;
}

uint64_t ivfpq_temp_bytes(const input *in, const ivfpq_build_options *opt) {
  uint32_t m = opt->subs ? opt->subs : ivfpq_default_subs(in->dim);
  uint64_t vec = (uint64_t)in->dim * (opt->store_f16 ? 2 : 4), id = in->id_kind == INPUT_ID_TEXT ? 32 : 8;
  uint64_t per_row = sizeof(ivfpq_scan_head) + m + sizeof(ivfpq_row_head) + vec + id + 2 * sizeof(ivfpq_record);
  return in->n_rows * per_row;
}

static vs_rc run_passes(builder *b, const char *path) {
  vs_rc rc = check_options(b);
  if (rc) return rc;
  shape_model(b);
  if ((rc = train(b)) || (rc = stream(b)) || (rc = find_duplicates(b))) return rc;
  b->out->temp_bytes = ivfpq_runs_bytes(b->runs);
  if ((rc = ivfpq_writer_open(path, &b->writer, b->err))) return rc;
  if ((rc = write_scan(b)) || (rc = write_rows(b)) || (rc = write_small(b))) return rc;
  b->out->n_rows = b->params.n_rows, b->out->nlist = b->params.nlist, b->out->m = b->params.m, b->out->bits = b->params.bits;
  rc = ivfpq_writer_finish(b->writer, b->out->checksum, &b->out->n_bytes, b->err);
  b->writer = NULL;
  return rc;
}

vs_rc ivfpq_build(input *in, const ivfpq_build_options *opt, const char *path, ivfpq_build_result *out, vs_err *err) {
  builder b = {.in = in, .opt = opt, .out = out, .err = err, .memory = opt->memory ? opt->memory : DEFAULT_MEMORY,
               .threads = opt->threads ? opt->threads : vs_threads()};
  memset(out, 0, sizeof *out);
  vs_rc rc = run_passes(&b, path);
  ivfpq_writer_abort(b.writer);
  ivfpq_runs_close(b.runs);
  ivfpq_sorter_close(b.sorter);
  ivfpq_model_reset(&b.model);
  free(b.dropped), free(b.parts);
  return rc;
}
