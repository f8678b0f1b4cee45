/* ivfpq_build.c - builds a segment from an input of any size.
 *
 * Passes, what each reads and writes:
 *   1 sample   reads short stretches of rows, evenly over the input -> memory
 *   2 train    the sample -> mean, coarse centroids, code words (ivfpq_model.c)
 *   3 stream   reads all rows once: assign, encode; two records per row -> runs (ivfpq_runs.c), ids -> sorter
 *   4 SCAN     scan records, partition by partition -> codes, terms, filterable columns
 *   5 ROWS     row records, partition by partition -> vectors with ids, long ids, columns; ids -> id directory
 *   6 the small sections, footer                    (4 to 6: ivfpq_sections.c)
 * Everything is written front to back. What rows were staged in memory and never had to be spilled are read from there. Without
 * opt->keep the temporary files have no name and vanish with the process; with it, what 2, 3 and 6 leave can be taken up by a later
 * build (ivfpq_stages.c).
 *
 * Anonymous memory, with n_c = nlist * dim_padded * 4 bytes of centroids, M = options.memory:
 *   train  sample (<= M/2) + rows of it kept for the truth (<= M/4) + 4 n_c + code words
 *   stream 2 n_c + staging (M/2, and a batch) + sorter (M/8) + batch (<= 16 MiB, and its padded copy) + 16 bytes * nlist per run,
 *          while it spills 8 bytes * rows staged and 1 MiB per thread
 *   4, 5   staging, when nothing was spilled (M/2) + ids (M/8) + two blocks (each <= 24 MiB, or 1 partition of codes and columns)
 * No term grows with the rows but the run tables: 16 * nlist * rows * (row bytes) / (M/2).
 */
#include "ivfpq_build.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_build_int.h"
#include "ivfpq_stages.h"

enum {
  SAMPLE_PER_CENTROID = 40,
  SAMPLE_MIN = 32768,
  SAMPLE_STRETCH = 16,         /* rows read in a row while sampling: a chunked file is inflated once at most */
  BATCH_BYTES = 16 << 20,
  ENCODE_SLICE = 256,
  ASSIGN_SLICE = KERN_NEAREST_ROWS,
  MAX_ROW_TEXT = 1 << 30       /* bytes of column text in one row: record sizes are 32 bits wide */
};
#define DEFAULT_MEMORY ((uint64_t)1 << 30)
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

/* ---- small helpers ---- */

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

/* seq: where each row stands in the input. */
static vs_rc take_sample(builder *b, float *sample, size_t stride, uint64_t *seq, size_t want, size_t *n_out) {
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
      if (!row_fault(b, batch.vectors + i * dim, batch.faults[i]))
        memcpy(sample + have * stride, batch.vectors + i * dim, dim * 4), seq[have++] = batch.first_row + i;
    if (s % 64 == 0) {
      build_progress(b, "sample", have, want);
      rc = build_stopped(b);
    }
  }
  *n_out = have;
  return rc;
}

/* ---- pass 2: train ---- */

void ivfpq_build_shape(const ivfpq_build_options *opt, uint32_t dim, uint64_t n_rows, ivfpq_params *p) {
  uint32_t bits = opt->bits ? opt->bits : 8, subs = opt->subs;
  p->metric = opt->metric, p->dim = p->dim_padded = dim, p->nlist = 1, p->bits = p->m = p->sub_dim = 0;
  if (n_rows == 0 || (n_rows < IVFPQ_FLAT_ROWS && !opt->nlist)) return;
  p->nlist = opt->nlist ? opt->nlist : ivfpq_default_nlist(n_rows);
  if (!subs) subs = ivfpq_default_subs(dim) * (bits == 4 ? 2 : 1);
  if (bits == 4) subs = subs < 2 ? 2 : (subs + 1) / 2 * 2;
  p->sub_dim = (dim + subs - 1) / subs;
  if (!opt->subs && bits == 8) subs = (dim + p->sub_dim - 1) / p->sub_dim; /* none of padding alone */
  p->bits = bits, p->m = bits == 4 ? subs / 2 : subs;
  p->dim_padded = subs * p->sub_dim;
}

static void shape_model(builder *b) {
  ivfpq_model *m = &b->model;
  ivfpq_params p = {0};
  ivfpq_build_shape(b->opt, b->in->dim, b->in->n_rows, &p);
  m->metric = b->opt->metric, m->dim = p.dim, m->dim_padded = p.dim_padded, m->nlist = p.nlist, m->beta = ivfpq_beta(IVFPQ_USUAL_BETA);
  m->bits = p.bits, m->m = p.m, m->sub_dim = p.sub_dim, m->subs = ivfpq_subs(p.m, p.bits);
}

/* Some rows as they are, evenly over the sample, for the truth: training overwrites them. seq then says where these stand. */
static vs_rc keep_raw(const ivfpq_model *m, const float *sample, uint64_t *seq, size_t n, size_t keep, float **raw, vs_err *err) {
  if (!(*raw = malloc(keep * m->dim * sizeof **raw + 4))) return vs_nomem(err);
  for (size_t i = 0; i < keep; i++) {
    size_t from = (size_t)((double)i * (double)n / (double)keep);
    memcpy(*raw + i * m->dim, sample + from * m->dim_padded, m->dim * sizeof **raw), seq[i] = seq[from];
  }
  return VS_OK;
}

static vs_rc train(builder *b) {
  ivfpq_model *m = &b->model;
  uint64_t row = (uint64_t)m->dim_padded * 4;
  size_t want = (size_t)m->nlist * SAMPLE_PER_CENTROID, n = 0;
  if (!m->m) return ivfpq_model_learn(m, &(ivfpq_learn){0}, b->err);
  if (want < SAMPLE_MIN) want = SAMPLE_MIN;
  if (want > b->memory / 2 / row) want = b->memory / 2 / row;
  if (want > b->in->n_rows) want = b->in->n_rows;
  size_t keep = IVFPQ_TRUTH_SAMPLE < b->memory / 4 / row ? IVFPQ_TRUTH_SAMPLE : b->memory / 4 / row;
  float *sample = ivfpq_large_alloc(want * (size_t)row + 4), *raw = NULL;
  uint64_t *seq = malloc((want + 1) * sizeof *seq);
  vs_rc rc = sample && seq ? take_sample(b, sample, m->dim_padded, seq, want, &n) : vs_nomem(b->err);
  if (!rc && n == 0) rc = vs_fail(b->err, VS_INVALID, "%s: no row can be indexed", b->in->path);
  if (keep > n) keep = n;
  if (!rc && b->opt->open) rc = keep_raw(m, sample, seq, n, keep, &raw, b->err);
  if (!rc) {
    ivfpq_learn p = {.sample = sample, .n = n, .seed = b->opt->seed, .threads = b->threads, .stop = b->opt->stop,
                     .ctx = b->opt->ctx, .progress = b->opt->progress};
    rc = ivfpq_model_learn(m, &p, b->err);
  }
  if (!rc && b->opt->open) rc = ivfpq_truth_open(m, raw, seq, keep, b->in->n_rows, &b->truth, b->err);
  free(sample), free(raw), free(seq);
  return rc;
}

/* ---- pass 3: stream ---- */

/* One batch on its way: the pool looks at its rows and encodes them, the caller's thread gives each its place among the staged
 * records, and the pool fills these. */
typedef struct encode_job {
  builder *b;
  const input_batch *batch;
  float *x;
  uint32_t *centroid, *column_bytes;
  uint8_t *codes, **scan, **row; /* scan, row: where the records go */
  float *terms, *err2;
  const char **why;              /* the row cannot be indexed; NULL: it can */
  uint64_t *seq;
  vs_rc rc;
  pthread_mutex_t lock;
} encode_job;

static void encode_failed(encode_job *e, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&e->lock);
  if (!e->rc) e->rc = vs_fail(e->b->err, rc, "%s", err->text);
  pthread_mutex_unlock(&e->lock);
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

static uint32_t id_size(const input_value *id) { return id->type == INPUT_TEXT ? (uint32_t)id->len : 8; }

/* The two records of row i of the batch. */
static void fill_row(const encode_job *e, size_t i) {
  const builder *b = e->b;
  const input_batch *batch = e->batch;
  const input_value *id = &batch->ids[i], *cols = batch->columns + i * b->in->n_columns;
  const float *x = batch->vectors + i * b->in->dim;
  uint8_t *scan = e->scan[i], *row = e->row[i];
  size_t m = b->model.m;
  ivfpq_scan_head sh = {e->seq[i], m ? e->terms[i] : 0, m ? e->err2[i] : 0, e->column_bytes[i], 0};
  ivfpq_row_head rh = {e->seq[i], id_size(id), e->column_bytes[i]};
  memcpy(scan, &sh, sizeof sh);
  if (m) memcpy(scan + sizeof sh, e->codes + i * m, m);
  put_columns(b, cols, scan + sizeof sh + m);
  memcpy(row, &rh, sizeof rh);
  row += sizeof rh;
  if (b->opt->store_f16 && (uintptr_t)row % 2 == 0) kern_get()->f32_to_f16(x, (uint16_t *)row, b->in->dim);
  else if (b->opt->store_f16)
    for (uint32_t j = 0; j < b->in->dim; j++) {
      uint16_t half;
      kern_get()->f32_to_f16(x + j, &half, 1);
      memcpy(row + 2 * j, &half, 2);
    }
  else memcpy(row, x, build_vector_bytes(b));
  row += build_vector_bytes(b);
  memcpy(row, id->type == INPUT_TEXT ? (const void *)id->text : (const void *)&id->i, rh.id_bytes);
  put_columns(b, cols, row + rh.id_bytes);
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

/* The widest terms of a slice, by beta. */
static void widen_terms(encode_job *e, size_t from, size_t to) {
  builder *b = e->b;
  float low[IVFPQ_BETAS], high[IVFPQ_BETAS];
  for (size_t j = 0; j < IVFPQ_BETAS; j++) low[j] = INFINITY, high[j] = -INFINITY;
  for (size_t i = from; i < to; i++)
    for (size_t j = 0; j < IVFPQ_BETAS && !e->why[i]; j++) {
      float t = e->terms[i] - ivfpq_beta(j) * e->err2[i];
      low[j] = t < low[j] ? t : low[j], high[j] = t > high[j] ? t : high[j];
    }
  pthread_mutex_lock(&e->lock);
  for (size_t j = 0; j < IVFPQ_BETAS; j++) {
    b->term_min[j] = low[j] < b->term_min[j] ? low[j] : b->term_min[j];
    b->term_max[j] = high[j] > b->term_max[j] ? high[j] : b->term_max[j];
  }
  pthread_mutex_unlock(&e->lock);
}

static void look_at_row(encode_job *e, size_t i) {
  const builder *b = e->b;
  const input_batch *batch = e->batch;
  const input_value *cols = batch->columns + i * b->in->n_columns;
  e->why[i] = row_fault(b, batch->vectors + i * b->in->dim, batch->faults[i]);
  if (!e->why[i]) e->why[i] = text_fault(b, &batch->ids[i], cols);
  e->column_bytes[i] = e->why[i] ? 0 : columns_size(b, cols);
  e->seq[i] = batch->first_row + i;
}

/* Prepared rows at..at+n that know their partitions -> codes, and what the truth wants of them. */
static vs_rc encode_rows(encode_job *e, size_t at, size_t n, vs_err *err) {
  const ivfpq_model *m = &e->b->model;
  ivfpq_truth *truth = e->b->truth;
  ivfpq_near *near = NULL;
  uint64_t seen[ENCODE_SLICE];
  float *x = e->x + at * m->dim_padded;
  for (size_t i = 0; i < n; i++) seen[i] = e->why[at + i] ? UINT64_MAX : e->seq[at + i]; /* no neighbour of any row */
  vs_rc rc = truth ? ivfpq_truth_see(truth, x, n, seen, &near, err) : VS_OK;
  if (!rc) rc = ivfpq_model_encode(m, x, n, e->centroid + at, e->codes + at * m->m, e->terms + at, e->err2 + at, err);
  if (near) ivfpq_truth_add(truth, near, e->codes + at * m->m, e->centroid + at, e->terms + at, e->err2 + at);
  return rc;
}

static void encode_slice(void *ctx, size_t s) {
  encode_job *e = ctx;
  const ivfpq_model *m = &e->b->model;
  vs_err err = {0};
  size_t at = s * ASSIGN_SLICE, n = e->batch->n - at < ASSIGN_SLICE ? e->batch->n - at : ASSIGN_SLICE;
  float *x = e->x + at * m->dim_padded;
  for (size_t i = 0; i < n; i++) look_at_row(e, at + i);
  if (!m->m) return;
  for (size_t i = 0; i < n; i++) ivfpq_model_prepare(m, e->batch->vectors + (at + i) * m->dim, x + i * m->dim_padded);
  vs_rc rc = ivfpq_model_assign(m, x, n, e->centroid + at, &err);
  for (size_t i = 0; i < n && !rc; i += ENCODE_SLICE) rc = encode_rows(e, at + i, n - i < ENCODE_SLICE ? n - i : ENCODE_SLICE, &err);
  if (rc) encode_failed(e, rc, &err);
  else widen_terms(e, at, at + n);
}

static void fill_slice(void *ctx, size_t s) {
  encode_job *e = ctx;
  for (size_t i = s * ENCODE_SLICE; i < e->batch->n && i < (s + 1) * ENCODE_SLICE; i++)
    if (!e->why[i]) fill_row(e, i);
}

static vs_rc stream_batch(encode_job *e, const input_batch *batch) {
  builder *b = e->b;
  size_t slices = (batch->n + ENCODE_SLICE - 1) / ENCODE_SLICE, n = 0;
  uint64_t ids = 0, columns = 0;
  e->batch = batch;
  vs_pool_run((batch->n + ASSIGN_SLICE - 1) / ASSIGN_SLICE, b->threads, encode_slice, e);
  vs_rc rc = e->rc;
  for (size_t i = 0; i < batch->n; i++)
    if (!e->why[i]) n++, ids += id_size(&batch->ids[i]), columns += e->column_bytes[i];
  if (!rc) rc = ivfpq_runs_reserve(b->runs, n, ids, columns, b->err);
  for (size_t i = 0; i < batch->n && !rc; i++) {
    if (e->why[i]) rc = bad_row(b, e->seq[i], e->why[i]);
    else rc = note_id(b, &batch->ids[i], e->seq[i]);
    if (!rc && !e->why[i])
      rc = ivfpq_runs_add(b->runs, b->model.m ? e->centroid[i] : 0, id_size(&batch->ids[i]), e->column_bytes[i], &e->scan[i], &e->row[i], b->err);
  }
  if (!rc) vs_pool_run(slices, b->threads, fill_slice, e);
  return rc;
}

static vs_rc open_job(encode_job *e, size_t max) {
  const ivfpq_model *m = &e->b->model;
  e->x = malloc(m->m ? max * m->dim_padded * 4 : 1), e->codes = malloc(max * m->m + 1);
  e->centroid = malloc(max * 4), e->column_bytes = malloc(max * 4), e->terms = malloc(max * 4), e->err2 = malloc(max * 4);
  e->scan = malloc(max * sizeof *e->scan), e->row = malloc(max * sizeof *e->row), e->why = malloc(max * sizeof *e->why);
  e->seq = malloc(max * sizeof *e->seq);
  return e->x && e->codes && e->centroid && e->column_bytes && e->terms && e->err2 && e->scan && e->row && e->why && e->seq
             ? VS_OK
             : vs_nomem(e->b->err);
}

static void close_job(encode_job *e) {
  free(e->x), free(e->codes), free(e->centroid), free(e->column_bytes), free(e->terms), free(e->err2);
  free(e->scan), free(e->row), free(e->why), free(e->seq);
}

static vs_rc stream(builder *b) {
  size_t max = BATCH_BYTES / (b->model.dim_padded * 4) + 1;
  if (max > 16384) max = 16384;
  encode_job e = {.b = b, .lock = PTHREAD_MUTEX_INITIALIZER};
  ivfpq_runs_shape shape = build_runs_shape(b);
  uint64_t done = 0;
  for (size_t i = 0; i < IVFPQ_BETAS; i++) b->term_min[i] = INFINITY, b->term_max[i] = -INFINITY;
  vs_rc rc = open_job(&e, max);
  if (!rc) rc = ivfpq_runs_open(&shape, &b->runs, b->err);
  if (!rc) rc = ivfpq_sorter_open(b->opt->tmpdir, b->memory / 8, &b->sorter, b->err);
  if (!rc && b->in->n_rows) rc = b->in->seek(b->in, 0, b->err);
  while (!rc && done < b->in->n_rows) {
    input_batch batch;
    rc = b->in->read(b->in, max, &batch, b->err);
    if (rc || !batch.n) break;
    rc = stream_batch(&e, &batch);
    done += batch.n;
    build_progress(b, "encode", done, b->in->n_rows);
    if (!rc) rc = build_stopped(b);
  }
  if (!rc && done != b->in->n_rows)
    rc = vs_fail(b->err, VS_IO, "%s: ended after %llu of %llu rows", b->in->path, (unsigned long long)done,
                 (unsigned long long)b->in->n_rows);
  if (!rc) rc = ivfpq_runs_finish(b->runs, b->opt->keep && b->opt->keep_rows, b->err);
  close_job(&e);
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

int build_is_dropped(const builder *b, uint64_t seq) {
  return b->n_dropped && bsearch(&seq, b->dropped, b->n_dropped, sizeof *b->dropped, by_number);
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
  uint64_t least = ivfpq_least_memory(o, b->in->dim, b->in->n_rows);
  if (least > b->memory)
    return vs_fail(b->err, VS_INVALID, "partitions of %u dimensions for %llu rows need --memory %lluM at least", b->in->dim,
                   (unsigned long long)b->in->n_rows, (unsigned long long)(least >> 20) + 1);
  for (size_t c = 0; c < b->in->n_columns; c++) {
    size_t n = strlen(o->column_names[c]);
    if (n < 1 || n > UINT16_MAX) return vs_fail(b->err, VS_INVALID, "column %zu: its name has %zu bytes; 1 to 65535 are possible", c + 1, n);
  }
  return VS_OK;
}

uint64_t ivfpq_least_memory(const ivfpq_build_options *opt, uint32_t dim, uint64_t n_rows) {
  ivfpq_params p = {0};
  ivfpq_build_shape(opt, dim, n_rows, &p);
  if (!p.m) return 0;
  return 4 * (uint64_t)p.nlist * p.dim_padded * 4 + (uint64_t)ivfpq_subs(p.m, p.bits) * ivfpq_words(p.bits) * p.sub_dim * 8;
}

uint64_t ivfpq_temp_bytes(const input *in, const ivfpq_build_options *opt) {
  ivfpq_params p = {0};
  uint64_t memory = opt->memory ? opt->memory : DEFAULT_MEMORY;
  ivfpq_build_shape(opt, in->dim, in->n_rows, &p);
  uint64_t vec = (uint64_t)in->dim * (opt->store_f16 ? 2 : 4), id = in->id_kind == INPUT_ID_TEXT ? 32 : 8;
  uint64_t per_row = sizeof(ivfpq_scan_head) + p.m + sizeof(ivfpq_row_head) + vec + id;
  uint64_t runs = in->n_rows * per_row, ids = in->n_rows * 2 * sizeof(ivfpq_record), model = opt->keep ? 2 * (uint64_t)p.nlist * p.dim_padded * 4 : 0;
  int spilled = runs + in->n_rows * 40 > memory / 2 || (opt->keep && opt->keep_rows);
  return (spilled ? runs : 0) + (ids / 2 > memory / 8 ? ids : 0) + model;
}

/* Passes 1 to 3, as far as an earlier build has not done them. */
static vs_rc reach_rows(builder *b, build_stage stage) {
  static const char *const names[] = {[STAGE_MODEL] = "training", [STAGE_ROWS] = "encoding"};
  vs_rc rc = VS_OK;
  if (stage && b->opt->resumed) b->opt->resumed(b->opt->ctx, names[stage]);
  if (stage < STAGE_MODEL && ((rc = train(b)) || (rc = build_keep_model(b)))) return rc;
  if (stage < STAGE_ROWS && ((rc = stream(b)) || (rc = find_duplicates(b)) || (rc = build_keep_rows(b)))) return rc;
  return rc;
}

static vs_rc write_segment(builder *b) {
  vs_rc rc = ivfpq_writer_open(b->path, &b->writer, b->err);
  if (rc) return rc;
  if ((rc = build_write_scan(b)) || (rc = build_write_rows(b)) || (rc = build_write_small(b))) return rc;
  b->out->n_rows = b->params.n_rows, b->out->nlist = b->params.nlist, b->out->m = b->params.m, b->out->bits = b->params.bits;
  rc = ivfpq_writer_finish(b->writer, b->out->checksum, &b->out->n_bytes, b->err);
  b->writer = NULL;
  return rc ? rc : build_keep_segment(b);
}

static vs_rc run_passes(builder *b) {
  build_stage stage;
  vs_rc rc = check_options(b);
  if (rc) return rc;
  shape_model(b);
  if ((rc = build_stages_load(b, &stage))) return rc == VS_NOMEM ? vs_nomem(b->err) : rc;
  if (stage == STAGE_SEGMENT) {
    if (b->opt->resumed) b->opt->resumed(b->opt->ctx, "writing");
    return VS_OK;
  }
  if (b->opt->keep && unlink(b->path) && errno != ENOENT) return vs_fail(b->err, VS_IO, "%s: cannot remove: %s", b->path, strerror(errno));
  if ((rc = reach_rows(b, stage))) return rc;
  b->out->temp_bytes = ivfpq_runs_bytes(b->runs);
  return write_segment(b);
}

vs_rc ivfpq_build(input *in, const ivfpq_build_options *opt, const char *path, ivfpq_build_result *out, vs_err *err) {
  builder b = {.in = in, .opt = opt, .out = out, .err = err, .memory = opt->memory ? opt->memory : DEFAULT_MEMORY,
               .threads = opt->threads ? opt->threads : vs_threads(), .path = path};
  memset(out, 0, sizeof *out);
  vs_rc rc = run_passes(&b);
  ivfpq_writer_abort(b.writer);
  ivfpq_runs_close(b.runs);
  ivfpq_sorter_close(b.sorter);
  ivfpq_model_reset(&b.model);
  ivfpq_truth_close(b.truth);
  free(b.dropped), free(b.parts), free(b.calibration), free(b.row_of);
  return rc;
}
