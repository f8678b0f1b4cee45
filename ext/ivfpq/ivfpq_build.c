/* ivfpq_build.c - builds a segment from an input of any size.
 *
 * Passes, what each reads and writes:
 *   1 sample   reads short stretches of rows, evenly over the input -> memory
 *   2 train    the sample -> mean, coarse centroids, code words (ivfpq_model.c)
 *   3 stream   reads all rows once: assign, encode; two records per row -> runs in temporary files (ivfpq_runs.c), ids -> sorter
 *   4 SCAN     scan records, partition by partition -> codes, terms, filterable columns
 *   5 ROWS     row records, partition by partition -> vectors with ids, long ids, columns; ids -> sorter -> id directory
 *   6 the small sections, footer                    (4 to 6: ivfpq_sections.c)
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
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_build_int.h"

enum {
  SAMPLE_PER_CENTROID = 40,
  SAMPLE_MIN = 32768,
  SAMPLE_STRETCH = 16,         /* rows read in a row while sampling: a chunked file is inflated once at most */
  BATCH_BYTES = 16 << 20,
  ENCODE_SLICE = 256,
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
static vs_rc take_sample(builder *b, float *sample, uint64_t *seq, size_t want, size_t *n_out) {
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
        memcpy(sample + have * dim, batch.vectors + i * dim, dim * 4), seq[have++] = batch.first_row + i;
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
  uint64_t *seq = malloc((want + 1) * sizeof *seq);
  vs_rc rc = raw && padded && seq ? take_sample(b, raw, seq, want, &n) : vs_nomem(b->err);
  if (!rc && n == 0) rc = vs_fail(b->err, VS_INVALID, "%s: no row can be indexed", b->in->path);
  if (!rc) {
    ivfpq_learn p = {.sample = raw, .n = n, .seed = b->opt->seed, .threads = b->threads, .stop = b->opt->stop,
                     .ctx = b->opt->ctx, .progress = b->opt->progress};
    rc = ivfpq_model_learn(m, &p, padded, b->err);
  }
  if (!rc && b->opt->open) rc = ivfpq_truth_open(m, raw, seq, n, &b->truth, b->err);
  free(raw), free(padded), free(seq);
  return rc;
}

/* ---- pass 3: stream ---- */

typedef struct encode_job {
  const ivfpq_model *m;
  const input_batch *batch;
  float *x;
  uint32_t *centroid;
  uint8_t *codes;
  float *terms, *err2;
  ivfpq_truth *truth;
  uint64_t *seq;
  vs_err *err;
  vs_rc rc;
  pthread_mutex_t lock;
} encode_job;

static void encode_failed(encode_job *e, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&e->lock);
  if (!e->rc) e->rc = vs_fail(e->err, rc, "%s", err->text);
  pthread_mutex_unlock(&e->lock);
}

static void encode_slice(void *ctx, size_t s) {
  encode_job *e = ctx;
  const ivfpq_model *m = e->m;
  ivfpq_near *near = NULL;
  vs_err err = {0};
  vs_rc rc = VS_OK;
  size_t at = s * ENCODE_SLICE, n = e->batch->n - at < ENCODE_SLICE ? e->batch->n - at : ENCODE_SLICE;
  float *x = e->x + at * m->dim_padded;
  for (size_t i = 0; i < n; i++) ivfpq_model_prepare(m, e->batch->vectors + (at + i) * m->dim, x + i * m->dim_padded);
  kern_get()->argmax_f32(x, n, m->dim_padded, m->dim_padded, m->packed, m->bias, m->nlist, e->centroid + at, NULL);
  if (e->truth) rc = ivfpq_truth_see(e->truth, x, n, e->seq + at, &near, &err);
  ivfpq_model_encode(m, x, n, e->centroid + at, e->codes + at * m->m, e->terms + at, e->err2 + at);
  if (near) rc = ivfpq_truth_add(e->truth, near, e->codes + at * m->m, e->centroid + at, e->terms + at, e->err2 + at, &err);
  if (rc) encode_failed(e, rc, &err);
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

static vs_rc add_row(builder *b, const input_batch *batch, size_t i, uint32_t centroid, const uint8_t *codes, float term, float err2) {
  const input_value *id = &batch->ids[i], *cols = batch->columns + i * b->in->n_columns;
  const float *x = batch->vectors + i * b->in->dim;
  uint64_t seq = batch->first_row + i;
  uint32_t id_bytes = id->type == INPUT_TEXT ? (uint32_t)id->len : 8, column_bytes = columns_size(b, cols);
  uint8_t *scan, *row;
  vs_rc rc = note_id(b, id, seq);
  if (!rc) rc = ivfpq_runs_add(b->runs, centroid, id_bytes, column_bytes, &scan, &row, b->err);
  if (rc) return rc;
  ivfpq_scan_head sh = {seq, term, err2, column_bytes, 0};
  ivfpq_row_head rh = {seq, id_bytes, column_bytes};
  memcpy(scan, &sh, sizeof sh);
  if (codes) memcpy(scan + sizeof sh, codes, b->model.m);
  put_columns(b, cols, scan + sizeof sh + b->model.m);
  memcpy(row, &rh, sizeof rh);
  row += sizeof rh;
  if (b->opt->store_f16) kern_get()->f32_to_f16(x, (uint16_t *)row, b->in->dim);
  else memcpy(row, x, build_vector_bytes(b));
  row += build_vector_bytes(b);
  memcpy(row, id->type == INPUT_TEXT ? (const void *)id->text : (const void *)&id->i, id_bytes);
  put_columns(b, cols, row + id_bytes);
  for (size_t j = 0; j < IVFPQ_BETAS; j++) {
    float t = term - ivfpq_beta(j) * err2;
    b->term_min[j] = t < b->term_min[j] ? t : b->term_min[j], b->term_max[j] = t > b->term_max[j] ? t : b->term_max[j];
  }
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
  for (size_t i = 0; i < batch->n; i++) {
    const char *why = batch->faults[i] ? NULL : row_fault(b, batch->vectors + i * b->in->dim, 0);
    e->seq[i] = batch->faults[i] || why ? UINT64_MAX : batch->first_row + i; /* no neighbour of any row */
  }
  if (m) vs_pool_run((batch->n + ENCODE_SLICE - 1) / ENCODE_SLICE, b->threads, encode_slice, e);
  rc = e->rc;
  for (size_t i = 0; i < batch->n && !rc; i++) {
    const char *why = row_fault(b, batch->vectors + i * b->in->dim, batch->faults[i]);
    if (!why) why = text_fault(b, &batch->ids[i], batch->columns + i * b->in->n_columns);
    if (why) rc = bad_row(b, batch->first_row + i, why);
    else rc = add_row(b, batch, i, m ? e->centroid[i] : 0, m ? e->codes + i * m : NULL, m ? e->terms[i] : 0, m ? e->err2[i] : 0);
  }
  return rc;
}

static vs_rc stream(builder *b) {
  const ivfpq_model *m = &b->model;
  size_t max = BATCH_BYTES / (m->dim_padded * 4) + 1;
  if (max > 16384) max = 16384;
  encode_job e = {.m = m, .x = malloc(m->m ? max * m->dim_padded * 4 : 1), .centroid = malloc(max * 4),
                  .codes = malloc(max * m->m + 1), .terms = malloc(max * 4), .err2 = malloc(max * 4), .truth = b->truth,
                  .seq = malloc(max * sizeof *e.seq), .err = b->err, .lock = PTHREAD_MUTEX_INITIALIZER};
  vs_rc rc = e.x && e.centroid && e.codes && e.terms && e.err2 && e.seq ? VS_OK : vs_nomem(b->err);
  uint64_t done = 0;
  for (size_t i = 0; i < IVFPQ_BETAS; i++) b->term_min[i] = INFINITY, b->term_max[i] = -INFINITY;
  if (!rc) rc = ivfpq_runs_open(b->opt->tmpdir, m->nlist, m->m, build_vector_bytes(b), b->memory / 2, &b->runs, b->err);
  if (!rc) rc = ivfpq_sorter_open(b->opt->tmpdir, b->memory / 8, &b->sorter, b->err);
  if (!rc && b->in->n_rows) rc = b->in->seek(b->in, 0, b->err);
  while (!rc && done < b->in->n_rows) {
    input_batch batch;
    rc = b->in->read(b->in, max, &batch, b->err);
    if (rc || !batch.n) break;
    rc = stream_batch(b, &batch, &e);
    done += batch.n;
    build_progress(b, "encode", done, b->in->n_rows);
    if (!rc) rc = build_stopped(b);
  }
  if (!rc && done != b->in->n_rows)
    rc = vs_fail(b->err, VS_IO, "%s: ended after %llu of %llu rows", b->in->path, (unsigned long long)done,
                 (unsigned long long)b->in->n_rows);
  if (!rc) rc = ivfpq_runs_finish(b->runs, b->err);
  free(e.x), free(e.centroid), free(e.codes), free(e.terms), free(e.err2), free(e.seq);
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
  b->path = path;
  if ((rc = ivfpq_writer_open(path, &b->writer, b->err))) return rc;
  if ((rc = build_write_scan(b)) || (rc = build_write_rows(b)) || (rc = build_write_small(b))) return rc;
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
  ivfpq_truth_close(b.truth);
  free(b.dropped), free(b.parts), free(b.calibration);
  return rc;
}
