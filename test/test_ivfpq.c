/* test_ivfpq.c - ext/ivfpq without SQLite: sorter, runs, k-means, build, search, verify, and damaged files.
 *
 * Proves: a built segment holds exactly the rows that went in and verifies clean; exact search equals brute force in
 * double precision; a scan that may look at everything equals exact search; the bytes do not depend on threads or
 * memory; filters lose and add nothing; the settings that a build calibrated reach the recall that they promise; every flipped byte
 * is reported and no damage, also with forged checksums, crashes a reader. Everything is seeded; the seed is printed first.
 * IVFPQ_TEST_SEED sets another one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants these four first */
#include <cmocka.h>
#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../ext/base/vs_pool.h"
#include "../ext/ivfpq/ivfpq_build.h"
#include "../ext/ivfpq/ivfpq_int.h"
#include "../ext/ivfpq/ivfpq_model.h"
#include "../ext/ivfpq/ivfpq_runs.h"
#include "../ext/ivfpq/ivfpq_search.h"
#include "../ext/ivfpq/ivfpq_setting.h"
#include "../ext/ivfpq/ivfpq_sketch.h"
#include "../ext/ivfpq/ivfpq_write.h"
#include "../ext/kernels/kern.h"
#include "../ext/s3vfs/io_local.h"

static char folder[64];
static uint64_t seed = 20240611;

static ivfpq_rng rng_of(uint64_t salt) { return (ivfpq_rng){seed * 1000003 + salt}; }
static float rng_float(ivfpq_rng *r) { return (float)(ivfpq_rng_next(r) >> 40) / 8388608.0f - 1; }

#define assert_ok(rc, err) \
  do { \
    if ((rc) != VS_OK) fail_msg("%s", (err).text); \
  } while (0)

/* ---- data: rows in arrays, and an input over them ---- */

typedef enum shape { CLUSTERS, ALL_EQUAL, HALF_EQUAL, SKEWED, FEW_DIRECTIONS } shape;
typedef enum id_shape { ROW_IDS, INT_IDS, TEXT_IDS, LONG_TEXT_IDS } id_shape;
enum { N_COLUMNS = 4, LONG_ID = 10000 };
static const input_type column_types[N_COLUMNS] = {INPUT_INT, INPUT_REAL, INPUT_TEXT, INPUT_TEXT};
static const char *const column_names[N_COLUMNS] = {"year", "price", "colour", "note"};
static const uint8_t column_flags[N_COLUMNS] = {IVFPQ_FILTER, IVFPQ_FILTER, IVFPQ_FILTER | IVFPQ_INDEX, 0};

typedef struct set {
  input in; /* first: the input is the set */
  float *x;
  input_value *ids, *columns;
  uint8_t *faults;
  char **texts; /* owned id and note text */
  size_t n_texts;
  uint64_t at;
} set;

static vs_rc set_read(input *in, size_t max, input_batch *b, vs_err *err) {
  set *s = (set *)in;
  uint64_t left = in->n_rows - s->at;
  (void)err;
  if (max > 3000) max = 3000; /* less than asked for is legal */
  size_t n = left < max ? left : max;
  *b = (input_batch){.n = n, .first_row = s->at, .vectors = s->x + s->at * in->dim, .ids = s->ids + s->at,
                     .columns = s->columns + s->at * in->n_columns, .faults = s->faults + s->at};
  s->at += n;
  return VS_OK;
}
static vs_rc set_seek(input *in, uint64_t row, vs_err *err) {
  (void)err;
  assert_true(row <= in->n_rows);
  ((set *)in)->at = row;
  return VS_OK;
}
static void set_close(input *in) {
  set *s = (set *)in;
  for (size_t i = 0; i < s->n_texts; i++) free(s->texts[i]);
  free(s->texts), free(s->x), free(s->ids), free(s->columns), free(s->faults), free(s);
}

/* Sums of eight vectors, and a little noise. */
static void fill_few(set *s, ivfpq_rng *r) {
  enum { FEW = 8 };
  uint32_t dim = s->in.dim;
  float *base = malloc(sizeof(float) * FEW * dim);
  for (uint32_t i = 0; i < FEW * dim; i++) base[i] = rng_float(r);
  for (uint64_t i = 0; i < s->in.n_rows; i++) {
    float part[FEW];
    for (int f = 0; f < FEW; f++) part[f] = rng_float(r);
    for (uint32_t j = 0; j < dim; j++) {
      s->x[i * dim + j] = .25f + .01f * rng_float(r);
      for (int f = 0; f < FEW; f++) s->x[i * dim + j] += part[f] * base[f * dim + j];
    }
  }
  free(base);
}

static void fill_vectors(set *s, shape how, ivfpq_rng *r) {
  enum { CENTRES = 20 };
  uint32_t dim = s->in.dim;
  if (how == FEW_DIRECTIONS) {
    fill_few(s, r);
    return;
  }
  float *centre = malloc(sizeof(float) * CENTRES * dim);
  for (uint32_t i = 0; i < CENTRES * dim; i++) centre[i] = 2 * rng_float(r) + 0.25f;
  for (uint64_t i = 0; i < s->in.n_rows; i++) {
    uint64_t c = how == SKEWED && i % 10 ? 0 : ivfpq_rng_below(r, CENTRES);
    for (uint32_t j = 0; j < dim; j++) {
      float v = centre[c * dim + j] + 0.3f * (rng_float(r) + rng_float(r)); /* drawn always: rows stay comparable */
      s->x[i * dim + j] = how == ALL_EQUAL ? centre[j] : how == HALF_EQUAL && i % 2 ? s->x[(i - 1) * dim + j] : v;
    }
  }
  free(centre);
}

static const char *keep_text(set *s, char *text) {
  s->texts[s->n_texts++] = text;
  return text;
}

static void fill_ids(set *s, id_shape how) {
  for (uint64_t i = 0; i < s->in.n_rows; i++) {
    input_value *v = &s->ids[i];
    if (how == ROW_IDS || how == INT_IDS) {
      *v = (input_value){.type = INPUT_INT, .i = (int64_t)i};
      if (how == INT_IDS)
        v->i = i == 1 ? INT64_MIN : i == 2 ? INT64_MAX : ((int64_t)i - (int64_t)s->in.n_rows / 2) * 7919;
      continue;
    }
    size_t len = i == 1                                ? 0
                 : how == LONG_TEXT_IDS && i % 50 == 2 ? LONG_ID
                 : how == LONG_TEXT_IDS && i % 50 < 5  ? 60 + i % 50
                                                       : 0;
    char *t = calloc(1, LONG_ID + 32);
    if (i != 1) {
      int at = snprintf(t, 32, "d\xc3\xb6" "c-%llu", (unsigned long long)i);
      if ((size_t)at < len) memset(t + at, 'x', len - (size_t)at);
      else len = (size_t)at;
    }
    t = realloc(t, len + 1); /* so that a sanitizer sees a read past the end */
    *v = (input_value){.type = INPUT_TEXT, .text = keep_text(s, t), .len = len};
  }
}

static void fill_columns(set *s, ivfpq_rng *r) {
  static const char *const colours[] = {"red", "green", "", "ultramarine"};
  for (uint64_t i = 0; i < s->in.n_rows; i++) {
    input_value *v = s->columns + i * N_COLUMNS;
    if (i % 5) v[0] = (input_value){.type = INPUT_INT, .i = (int64_t)i - 100};
    if (i % 7) v[1] = (input_value){.type = INPUT_REAL, .r = rng_float(r) * 1e10};
    if (i % 7 == 3) v[1] = (input_value){.type = INPUT_INT, .i = 41}; /* stored as a real */
    const char *c = colours[ivfpq_rng_below(r, 4)];
    if (i % 3) v[2] = (input_value){.type = INPUT_TEXT, .text = c, .len = strlen(c)};
    size_t len = i % 64 == 9 ? 5000 : i % 9;
    char *note = malloc(len + 1);
    memset(note, 'n', len + 1);
    v[3] = (input_value){.type = INPUT_TEXT, .text = keep_text(s, note), .len = len};
  }
}

static set *set_open(uint64_t n, uint32_t dim, shape vectors, id_shape ids, int columns) {
  ivfpq_rng r = rng_of(n * 31 + dim);
  set *s = calloc(1, sizeof *s);
  s->in = (input){.path = "memory", .n_rows = n, .dim = dim, .column_types = columns ? column_types : NULL,
                  .n_columns = columns ? N_COLUMNS : 0, .read = set_read, .seek = set_seek, .close = set_close};
  s->in.id_kind = ids == ROW_IDS ? INPUT_ID_ROW : ids == INT_IDS ? INPUT_ID_INT : INPUT_ID_TEXT;
  s->x = calloc(n ? n * dim : dim, sizeof(float)), s->faults = calloc(n + 1, 1);
  s->ids = calloc(n + 1, sizeof *s->ids), s->columns = calloc(n * N_COLUMNS + 1, sizeof *s->columns);
  s->texts = malloc((2 * n + 1) * sizeof *s->texts);
  fill_vectors(s, vectors, &r);
  fill_ids(s, ids);
  if (columns) fill_columns(s, &r);
  return s;
}

static vs_rc open_to_measure(const char *path, vs_io **out, vs_err *err) { return io_local_open(path, 1, out, err); }

static ivfpq_build_options options(ivfpq_metric metric) {
  return (ivfpq_build_options){.metric = metric, .memory = 64 << 20, .threads = 2, .tmpdir = folder, .seed = 7,
                               .column_names = column_names, .column_flags = column_flags, .open = open_to_measure};
}

static const char *path_of(const char *name) {
  static char path[2][128];
  static int turn;
  turn = !turn;
  snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
  return path[turn];
}

static ivfpq_build_result build(set *s, const ivfpq_build_options *o, const char *path) {
  ivfpq_build_result out;
  vs_err err = {0};
  unlink(path);
  assert_ok(ivfpq_build(&s->in, o, path, &out, &err), err);
  return out;
}

static ivfpq_segment *open_path(const char *path, int map) {
  vs_io *io;
  vs_err err = {0};
  ivfpq_segment *s = NULL;
  assert_ok(io_local_open(path, map, &io, &err), err);
  assert_ok(ivfpq_segment_open(io, &s, &err), err);
  return s;
}

static int print_fault(void *ctx, const char *text) {
  (void)ctx;
  print_error("%s\n", text);
  return 0;
}
static int count_fault(void *ctx, const char *text) {
  assert_true(text[0]);
  ++*(int *)ctx;
  return 0;
}
static int print_and_count(void *ctx, const char *text) { return print_fault(NULL, text) + count_fault(ctx, text); }

static void assert_clean(ivfpq_segment *s) {
  vs_err err = {0};
  int n = 0;
  assert_ok(ivfpq_verify(s, print_and_count, &n, &err), err);
  assert_int_equal(n, 0);
}

/* ---- what a segment must hold ---- */

static ivfpq_id id_of(const input_value *v) {
  return v->type == INPUT_TEXT ? (ivfpq_id){.is_text = 1, .text = v->text, .len = (uint32_t)v->len}
                               : (ivfpq_id){.i = v->i};
}

static void assert_values(const input_value *want, const ivfpq_value *have) {
  for (int c = 0; c < N_COLUMNS; c++) {
    if (want[c].type == INPUT_NULL) {
      assert_int_equal(have[c].tag, 0);
      continue;
    }
    assert_int_equal(have[c].tag, column_types[c] == INPUT_INT    ? IVFPQ_INTEGER
                                  : column_types[c] == INPUT_REAL ? IVFPQ_REAL
                                                                  : IVFPQ_TEXT);
    if (have[c].tag == IVFPQ_INTEGER) assert_true(have[c].i == want[c].i);
    if (have[c].tag == IVFPQ_REAL)
      assert_true(have[c].r == (want[c].type == INPUT_INT ? (double)want[c].i : want[c].r));
    if (have[c].tag != IVFPQ_TEXT) continue;
    assert_int_equal(have[c].len, want[c].len);
    assert_memory_equal(have[c].text, want[c].text, want[c].len);
  }
}

/* Row i of the input lies in the segment, whole; returns its number there. */
static uint32_t assert_row(ivfpq_segment *s, const set *t, uint64_t i) {
  vs_err err = {0};
  ivfpq_id id = id_of(&t->ids[i]), have;
  uint32_t row;
  int found;
  ivfpq_row r;
  assert_ok(ivfpq_find_id(s, &id, &row, &found, &err), err);
  if (!found) fail_msg("row %llu is not found by its id", (unsigned long long)i);
  assert_ok(ivfpq_rows_fetch(s, &row, 1, &r, &err), err);
  const float *x = t->x + i * t->in.dim;
  if (s->params.store) {
    uint16_t half[IVFPQ_MAX_DIM];
    kern_get()->f32_to_f16(x, half, t->in.dim);
    assert_memory_equal(r.record, half, t->in.dim * 2);
  } else assert_memory_equal(r.record, x, t->in.dim * 4);
  assert_ok(ivfpq_row_id(s, r.record, &have, &err), err);
  if (id.is_text) {
    assert_int_equal(have.len, id.len);
    assert_memory_equal(have.text, id.text, id.len);
  } else assert_true(have.i == id.i);
  ivfpq_id_free(&have);
  if (t->in.n_columns) {
    ivfpq_value v[N_COLUMNS];
    uint8_t *buf;
    assert_ok(ivfpq_row_columns(s, r.record, v, &buf, &err), err);
    assert_values(t->columns + i * N_COLUMNS, v);
    free(buf);
  }
  ivfpq_rows_release(s, &r, 1);
  return row;
}

static void assert_absent(ivfpq_segment *s) {
  vs_err err = {0};
  ivfpq_id id[] = {{.i = 3}, {.i = -1000000007}, {.is_text = 1, .text = "nobody", .len = 6}};
  uint32_t row;
  int found = 1;
  for (size_t i = s->params.id_text ? 0 : 1; i < 3; i++) { /* 3 is a row number */
    assert_ok(ivfpq_find_id(s, &id[i], &row, &found, &err), err);
    assert_false(found);
  }
}

/* The filterable columns by partition say what the rows say. row_of[i] is the segment's row of input row i. */
static void assert_partition_columns(ivfpq_segment *s, const set *t, const uint32_t *row_of) {
  vs_err err = {0};
  uint64_t *input_row = calloc(s->params.n_rows + 1, sizeof *input_row);
  for (uint64_t i = 0; i < t->in.n_rows; i++) input_row[row_of[i]] = i;
  for (uint32_t g = 0; g < s->params.n_groups; g++) {
    ivfpq_group_view v;
    assert_ok(ivfpq_groups_fetch(s, &g, 1, &v, &err), err);
    for (uint32_t p = 0; p < v.n; p++) {
      ivfpq_part part = {.number = v.first + p, .entry = v.entries[p]};
      ivfpq_column_view c[3];
      if (!part.entry.n_rows) continue;
      assert_ok(ivfpq_parts_fetch(s, IVFPQ_WANT_COLUMNS | IVFPQ_WANT_CODES, &part, 1, &err), err);
      assert_ok(ivfpq_part_columns(s, &part, c, 3, &err), err);
      for (uint32_t r = 0; r < part.entry.n_rows; r++) {
        const input_value *want = t->columns + input_row[part.entry.row0 + r] * N_COLUMNS;
        for (int k = 0; k < 3; k++) {
          assert_int_equal(c[k].nulls[r / 8] >> r % 8 & 1, want[k].type == INPUT_NULL);
          if (want[k].type == INPUT_NULL) continue;
          double real;
          int64_t i;
          uint32_t end, from = 0;
          memcpy(&i, c[k].values + 8 * r * (k < 2), 8 >> (k == 2)), memcpy(&real, &i, 8);
          if (k == 0) assert_true(i == want[k].i);
          if (k == 1) assert_true(real == (want[k].type == INPUT_INT ? (double)want[k].i : want[k].r));
          if (k < 2) continue;
          memcpy(&end, c[k].ends + 4 * r, 4);
          if (r) memcpy(&from, c[k].ends + 4 * (r - 1), 4);
          assert_int_equal(end - from, want[k].len);
          assert_memory_equal(c[k].text + from, want[k].text, want[k].len);
        }
      }
      ivfpq_parts_release(s, &part, 1);
    }
    ivfpq_groups_release(s, &v, 1);
  }
  free(input_row);
}

/* The oracle: double precision over the vectors as stored. */
static double true_distance(ivfpq_metric metric, const float *q, const float *x, uint32_t dim, int half) {
  double dot = 0, qq = 0, xx = 0, dd = 0;
  for (uint32_t j = 0; j < dim; j++) {
    float v = x[j];
    if (half) {
      uint16_t h;
      kern_variant("scalar")->f32_to_f16(&v, &h, 1);
      kern_variant("scalar")->f16_to_f32(&h, &v, 1);
    }
    dot += (double)q[j] * v, qq += (double)q[j] * q[j], xx += (double)v * v,
        dd += ((double)q[j] - v) * ((double)q[j] - v);
  }
  if (metric == IVFPQ_L2) return sqrt(dd);
  if (metric == IVFPQ_DOT) return -dot;
  return qq > 0 && xx > 0 ? 1 - dot / sqrt(qq * xx) : 1;
}

static int by_double(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}
static int by_key(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

static void assert_near(double have, double want, double scale) {
  if (!(fabs(have - want) <= 2e-4 * scale)) fail_msg("distance %.9g, should be %.9g", have, want);
}

typedef vs_rc (*eval_fn)(void *, ivfpq_segment *, const ivfpq_part *, uint64_t *, vs_err *);

/* Exact search, and a scan that may look at everything, return the k nearest rows. */
static void assert_search(ivfpq_segment *s, const set *t, const uint32_t *row_of, const float *q) {
  uint64_t n = s->params.n_rows, k = n < 10 ? n : 10;
  ivfpq_metric metric = (ivfpq_metric)s->params.metric;
  double *truth = malloc((n + 1) * sizeof *truth), *by_row = malloc((n + 1) * sizeof *by_row), scale = 1e-3;
  for (uint64_t i = 0; i < n; i++) {
    truth[i] = by_row[row_of[i]] = true_distance(metric, q, t->x + i * t->in.dim, t->in.dim, (int)s->params.store);
    if (fabs(truth[i]) > scale) scale = fabs(truth[i]);
  }
  qsort(truth, n, sizeof *truth, by_double);
  vs_err err = {0};
  ivfpq_keys keys = {0}, all = {0};
  ivfpq_stats stats = {0};
  ivfpq_query query = {.vector = q, .nprobe = s->params.nlist ? s->params.nlist : 1, .n_candidates = k};
  assert_ok(ivfpq_exact(s, &query, NULL, 2, &keys, &stats, &err), err);
  assert_int_equal(keys.n, k);
  if (k) qsort(keys.key, keys.n, 8, by_key);
  for (uint64_t i = 0; i < k; i++) {
    assert_near(kern_key_value(keys.key[i]), truth[i], scale);
    assert_near(by_row[kern_key_number(keys.key[i])], truth[i], scale);
  }
  query.n_candidates = n ? n : 1;
  assert_ok(ivfpq_scan(s, &query, &all, &stats, &err), err);
  assert_int_equal(all.n, n);
  uint32_t *rows = malloc(n * 4 + 4);
  float *d = malloc(n * 4 + 4);
  for (uint64_t i = 0; i < n; i++) rows[i] = kern_key_number(all.key[i]);
  assert_ok(ivfpq_distances(s, q, rows, n, d, &err), err);
  for (uint64_t i = 0; i < n; i++) all.key[i] = kern_key(d[i], rows[i]);
  if (n) qsort(all.key, all.n, 8, by_key);
  for (uint64_t i = 0; i < k; i++) assert_true(all.key[i] == keys.key[i]);
  for (uint64_t i = 1; i < n; i++) assert_true(all.key[i - 1] != all.key[i]);
  /* pages of an exact search: what comes after the first half is the second half */
  if (k > 1) {
    ivfpq_keys rest = {0};
    query.n_candidates = k - k / 2;
    assert_ok(ivfpq_exact(s, &query, &keys.key[k / 2 - 1], 1, &rest, &stats, &err), err);
    qsort(rest.key, rest.n, 8, by_key);
    assert_int_equal(rest.n, k - k / 2);
    assert_memory_equal(rest.key, keys.key + k / 2, rest.n * 8);
    ivfpq_keys_reset(&rest);
  }
  ivfpq_keys_reset(&keys), ivfpq_keys_reset(&all);
  free(truth), free(by_row), free(rows), free(d);
}

static void assert_segment(const char *path, const set *t, int map) {
  ivfpq_segment *s = open_path(path, map);
  ivfpq_rng r = rng_of(99);
  uint32_t *row_of = calloc(t->in.n_rows + 1, sizeof *row_of);
  float *q = malloc(t->in.dim * sizeof *q);
  assert_clean(s);
  assert_int_equal(s->params.n_rows, t->in.n_rows);
  for (uint64_t i = 0; i < t->in.n_rows; i++) row_of[i] = assert_row(s, t, i);
  assert_absent(s);
  if (t->in.n_columns) assert_partition_columns(s, t, row_of);
  for (int k = 0; k < 2; k++) {
    uint64_t like = ivfpq_rng_below(&r, t->in.n_rows);
    for (uint32_t j = 0; j < t->in.dim; j++) q[j] = k && t->in.n_rows ? t->x[like * t->in.dim + j] : rng_float(&r);
    assert_search(s, t, row_of, q);
  }
  ivfpq_segment_close(s);
  free(row_of), free(q);
}

/* ---- small parts ---- */

static void test_sorter(void **state) {
  (void)state;
  for (int round = 0; round < 4; round++) {
    size_t n = round == 0 ? 0 : round == 1 ? 1000 : 50000, at = 0;
    size_t memory = round == 3 ? 30000 : 4 << 20; /* 1,250 records: 40 runs */
    ivfpq_rng r = rng_of(round);
    vs_err err = {0};
    ivfpq_sorter *s;
    ivfpq_record last = {0}, x;
    uint64_t sum = 0, back = 0;
    int more;
    assert_ok(ivfpq_sorter_open(folder, memory, &s, &err), err);
    for (size_t i = 0; i < n; i++) {
      x = (ivfpq_record){ivfpq_rng_below(&r, 50), ivfpq_rng_below(&r, 50),
                         ivfpq_rng_below(&r, 8)}; /* many equal ones */
      sum += x.hi * 10007 + x.lo * 101 + x.value + 1;
      assert_ok(ivfpq_sorter_add(s, x, &err), err);
    }
    assert_ok(ivfpq_sorter_finish(s, &err), err);
    for (;; at++) {
      assert_ok(ivfpq_sorter_next(s, &x, &more, &err), err);
      if (!more) break;
      assert_true(x.hi > last.hi ||
                  (x.hi == last.hi && (x.lo > last.lo || (x.lo == last.lo && x.value >= last.value))));
      back += x.hi * 10007 + x.lo * 101 + x.value + 1;
      last = x;
    }
    assert_int_equal(at, n);
    assert_true(sum == back);
    ivfpq_sorter_close(s);
  }
  ivfpq_sorter_close(NULL);
}

static void fill_scan_record(uint8_t *p, uint64_t seq, uint32_t column_bytes, size_t code_bytes) {
  ivfpq_scan_head h = {.seq = seq, .term = (float)seq, .err2 = 1, .column_bytes = column_bytes};
  memcpy(p, &h, sizeof h);
  memset(p + sizeof h, (int)(seq & 255), code_bytes + column_bytes);
}
static void fill_row_record(uint8_t *p, uint64_t seq, uint32_t id_bytes, uint32_t column_bytes, size_t vector_bytes) {
  ivfpq_row_head h = {seq, id_bytes, column_bytes};
  memcpy(p, &h, sizeof h);
  memset(p + sizeof h, (int)(seq * 3 & 255), vector_bytes + id_bytes + column_bytes);
}

static int skip_seventh(void *ctx, uint64_t seq) { return *(int *)ctx && seq % 7 == 0; }

/* All records of all centroids, gathered in stretches of max_rows and max_bytes, are what was added, in that order. */
typedef struct added { size_t n; uint32_t *centroid, *ids, *cols; } added;
enum { CENTROIDS = 9, CODES = 3, VECTOR = 20 };
static void check_gathered(const ivfpq_runs *runs, const added *a, size_t max_rows, size_t max_bytes, int skip) {
  uint8_t *want = malloc(4 << 20);
  uint64_t total = 0, expected = 0;
  vs_err err = {0};
  for (size_t i = 0; i < a->n; i++) expected += 2 * !(skip && i % 7 == 0);
  for (int kind = 0; kind < 2; kind++)
    for (uint32_t c = 0; c < CENTROIDS; c++) {
      uint64_t last = 0, bytes = 0;
      int more = 1;
      ivfpq_gather g = {.centroid = c};
      while (more) {
        assert_ok(ivfpq_runs_gather(runs, kind, max_rows, max_bytes, skip_seventh, &skip, &g, &more, &err), err);
        assert_true(g.n <= max_rows);
        for (size_t i = 0; i < g.n; i++) {
          const uint8_t *p = g.base + g.at[i];
          uint64_t seq;
          memcpy(&seq, p, 8);
          assert_true(seq < a->n && (!last || seq + 1 > last) && a->centroid[seq] == c && !(skip && seq % 7 == 0));
          if (kind) fill_row_record(want, seq, a->ids[seq], a->cols[seq], VECTOR);
          else fill_scan_record(want, seq, a->cols[seq], CODES);
          size_t size = kind ? sizeof(ivfpq_row_head) + VECTOR + a->ids[seq] + a->cols[seq] : sizeof(ivfpq_scan_head) + CODES + a->cols[seq];
          assert_int_equal(memcmp(p, want, size), 0);
          last = seq + 1, total++, bytes += size;
        }
      }
      if (ivfpq_runs_in_files(runs) && !skip) assert_int_equal(ivfpq_runs_size(runs, kind, c), bytes);
      ivfpq_gather_reset(&g);
    }
  assert_int_equal(total, expected);
  free(want);
}

/* Kept in files and state, and back; then with one byte of a file changed, and with a file cut. */
static void check_kept(ivfpq_runs **runs, const ivfpq_runs_shape *how, const added *a) {
  char path[1100];
  ivfpq_state *s;
  vs_err err = {0};
  assert_ok(ivfpq_state_create(folder, "rows.state", "key", &s, &err), err);
  ivfpq_runs_save(*runs, s);
  assert_ok(ivfpq_state_commit(s, &err), err);
  ivfpq_runs_close(*runs);
  assert_int_equal(ivfpq_state_open(folder, "rows.state", "other", &s, &err), VS_INVALID);
  assert_int_equal(ivfpq_state_open(folder, "none.state", "key", &s, &err), VS_NOTFOUND);
  for (int damage = 0; damage < 3; damage++) {
    vs_err_reset(&err);
    snprintf(path, sizeof path, "%s/%s", folder, ivfpq_run_files[1]);
    if (damage == 1) {
      FILE *f = fopen(path, "r+");
      fseek(f, 12345, SEEK_SET);
      int was = fgetc(f);
      fseek(f, 12345, SEEK_SET), fputc(was ^ 1, f), fclose(f);
    } else if (damage == 2) assert_int_equal(truncate(path, 100), 0);
    assert_ok(ivfpq_state_open(folder, "rows.state", "key", &s, &err), err);
    vs_rc rc = ivfpq_runs_load(how, s, runs, &err);
    assert_true(damage == 0 ? rc == VS_OK : damage == 1 ? rc == VS_CORRUPT : rc == VS_IO);
    vs_err_reset(&err);
    assert_int_equal(ivfpq_state_close(s, &err), VS_OK);
    if (damage == 0) check_gathered(*runs, a, 1000, 1 << 20, 0), ivfpq_runs_close(*runs);
  }
  *runs = NULL;
  for (int k = 0; k < 2; k++) snprintf(path, sizeof path, "%s/%s", folder, ivfpq_run_files[k]), unlink(path);
  snprintf(path, sizeof path, "%s/rows.state", folder), unlink(path);
}

/* Records of every centroid come back whole and in the order in which they were added: from memory, from one run, from many. */
static void test_runs(void **state) {
  (void)state;
  for (int round = 0; round < 5; round++) {
    size_t n = round == 0 ? 0 : 4000;
    int in_files = round >= 2;
    ivfpq_runs_shape how = {.dir = folder, .named = round == 4, .n_centroids = CENTROIDS, .code_bytes = CODES, .vector_bytes = VECTOR,
                              .memory = round >= 3 ? 20000 : 64 << 20, .threads = 2};
    ivfpq_rng r = rng_of(40 + round);
    vs_err err = {0};
    ivfpq_runs *runs;
    added a = {n, calloc(n + 1, 4), calloc(n + 1, 4), calloc(n + 1, 4)};
    uint64_t bytes = 0;
    assert_ok(ivfpq_runs_open(&how, &runs, &err), err);
    for (size_t i = 0; i < n; i++) {
      uint8_t *scan, *row;
      a.centroid[i] = (uint32_t)ivfpq_rng_below(&r, CENTROIDS - 1); /* the last one stays empty */
      a.ids[i] = (uint32_t)ivfpq_rng_below(&r, 30), a.cols[i] = (uint32_t)ivfpq_rng_below(&r, 30);
      if (i == 17 || i == 2500) a.cols[i] = 3 << 20; /* more than the staging area and than a read */
      if (i % 100 == 0) assert_ok(ivfpq_runs_reserve(runs, 50, 1500, 1500, &err), err);
      assert_ok(ivfpq_runs_add(runs, a.centroid[i], a.ids[i], a.cols[i], &scan, &row, &err), err);
      fill_scan_record(scan, i, a.cols[i], CODES), fill_row_record(row, i, a.ids[i], a.cols[i], VECTOR);
      bytes += sizeof(ivfpq_scan_head) + sizeof(ivfpq_row_head) + CODES + VECTOR + a.ids[i] + 2 * (uint64_t)a.cols[i];
    }
    assert_ok(ivfpq_runs_finish(runs, in_files, &err), err);
    assert_int_equal(ivfpq_runs_in_files(runs), in_files);
    assert_int_equal(ivfpq_runs_bytes(runs), in_files ? bytes : 0);
    check_gathered(runs, &a, SIZE_MAX, SIZE_MAX, 0);
    check_gathered(runs, &a, 13, SIZE_MAX, 1);
    check_gathered(runs, &a, SIZE_MAX, 700, 1);
    if (how.named) check_kept(&runs, &how, &a);
    ivfpq_runs_close(runs);
    free(a.centroid), free(a.ids), free(a.cols);
  }
}

static void test_kmeans(void **state) {
  (void)state;
  enum { N = 3000, DIM = 7, K = 37 };
  set *t = set_open(N, DIM, CLUSTERS, ROW_IDS, 0);
  float *c[3];
  vs_err err = {0};
  ivfpq_kmeans km = {.x = t->x, .n = N, .stride = DIM, .dim = DIM, .k = K, .iterations = 6, .seed = 5};
  for (int i = 0; i < 3; i++) {
    c[i] = malloc(K * DIM * sizeof(float));
    km.threads = 1 << i;
    assert_ok(ivfpq_kmeans_run(&km, c[i], &err), err);
    assert_memory_equal(c[i], c[0], K * DIM * sizeof(float));
  }
  /* fewer rows than clusters, and one row many times */
  km.n = 3;
  assert_ok(ivfpq_kmeans_run(&km, c[0], &err), err);
  assert_true(kern_get()->all_finite_f32(c[0], K * DIM));
  km.n = N, km.stride = 0;
  assert_ok(ivfpq_kmeans_run(&km, c[0], &err), err);
  assert_true(kern_get()->all_finite_f32(c[0], K * DIM));
  km.n = 0;
  assert_int_equal(ivfpq_kmeans_run(&km, c[0], &err), VS_INVALID);
  for (int i = 0; i < 3; i++) free(c[i]);
  input_close(&t->in);
}

static void test_defaults(void **state) {
  (void)state;
  uint64_t pages[8];
  assert_int_equal(ivfpq_default_nlist(0), 1);
  assert_int_equal(ivfpq_default_nlist(1), 1);
  for (uint64_t n = 1, last = 0; n < 1ull << 32; n += n / 3 + 1) {
    uint32_t nlist = ivfpq_default_nlist(n);
    assert_true(nlist >= last && nlist <= IVFPQ_MAX_NLIST);
    last = nlist;
    uint32_t levels = ivfpq_iddir_levels(n, pages);
    assert_true(levels >= 1 && levels <= 8 && pages[levels - 1] == 1 && pages[0] * IVFPQ_LEAF_MAX >= n);
  }
  for (uint32_t dim = 1; dim <= IVFPQ_MAX_DIM; dim++) {
    uint32_t subs = ivfpq_default_subs(dim);
    assert_true(subs >= 1 && subs <= IVFPQ_MAX_M && subs <= dim);
  }
}

/* ---- build, open, search, verify ---- */

static void run_case(uint64_t n, uint32_t dim, shape how, id_shape ids, int columns, ivfpq_build_options o) {
  set *t = set_open(n, dim, how, ids, columns);
  const char *path = path_of("case.ivf");
  ivfpq_build_result r = build(t, &o, path);
  assert_int_equal(r.n_rows, n);
  assert_segment(path, t, (int)(n + dim) & 1);
  input_close(&t->in);
}

static void test_shapes(void **state) {
  (void)state;
  static const uint64_t rows[] = {0, 1, 2, 255, 256, 257, 5000};
  static const uint32_t dims[] = {1, 2, 7, 16, 997};
  unsigned turn = 0;
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    for (size_t j = 0; j < sizeof dims / sizeof *dims; j++)
      for (int coded = 0; coded < 2; coded++, turn++) {
        int big = rows[i] == 5000 && dims[j] == 997;
        if (big && coded) continue;
        ivfpq_build_options o = options((ivfpq_metric)(turn % 3));
        o.bits = big || turn % 4 == 3 ? 4 : 8, o.store_f16 = turn % 5 == 2, o.nlist = coded ? 4 : 0;
        if (dims[j] <= 2 && o.metric == IVFPQ_COSINE) o.metric = IVFPQ_L2; /* one direction or nearly so */
        run_case(rows[i], dims[j], CLUSTERS, (id_shape)(turn / 2 % 4), turn % 3 == 0, o);
      }
}

static void test_wide(void **state) {
  (void)state;
  ivfpq_build_options o = options(IVFPQ_DOT);
  run_case(257, 4096, CLUSTERS, INT_IDS, 1, o);
  o.nlist = 3, o.bits = 4;
  run_case(255, 4096, CLUSTERS, TEXT_IDS, 0, o);
}

static void test_distributions(void **state) {
  (void)state;
  static const shape shapes[] = {ALL_EQUAL, HALF_EQUAL, SKEWED};
  for (int i = 0; i < 3; i++)
    for (int metric = 0; metric < 3; metric++) {
      ivfpq_build_options o = options((ivfpq_metric)metric);
      o.bits = metric == 1 ? 4 : 8, o.nlist = i == 2 ? 0 : 30;
      run_case(4200, 16, shapes[i], metric == 2 ? LONG_TEXT_IDS : INT_IDS, metric == 0, o);
    }
}

/* Two levels of centroids, more partitions than rows in places, and reads without a map. */
static void test_many_partitions(void **state) {
  (void)state;
  ivfpq_build_options o = options(IVFPQ_L2);
  o.nlist = 700, o.subs = 4;
  run_case(5000, 8, CLUSTERS, ROW_IDS, 1, o);
  run_case(5001, 8, CLUSTERS, TEXT_IDS, 0, o);
  run_case(300, 8, CLUSTERS, INT_IDS, 0, o);
}

/* More rows at one centroid than an entry may have, and a directory of two levels. */
static void test_oversized_partition(void **state) {
  (void)state;
  enum { N = IVFPQ_MAX_PARTITION + 5000 };
  set *t = set_open(N, 1, CLUSTERS, ROW_IDS, 0);
  ivfpq_build_options o = options(IVFPQ_L2);
  vs_err err = {0};
  ivfpq_stats stats = {0};
  enum { K = 50, QUERIES = 64 };
  uint32_t rows[K];
  float d[K];
  double sum = 0;
  o.nlist = 1;
  ivfpq_build_result r = build(t, &o, path_of("case.ivf"));
  assert_int_equal(r.nlist, 2);
  ivfpq_segment *s = open_path(path_of("case.ivf"), 1);
  assert_int_equal(s->params.iddir_levels, 2);
  assert_clean(s);
  for (uint64_t i = 0; i < N; i += 101) assert_row(s, t, i);
  for (uint64_t i = 0; i < 20; i++) assert_row(s, t, N - 1 - i);
  for (int q = 0; q < QUERIES; q++) { /* 256 words for all rows: far out they are coarse, on average near */
    ivfpq_query query = {.vector = t->x + (size_t)q * (N / QUERIES), .nprobe = 2, .n_candidates = K};
    ivfpq_keys keys = {0};
    assert_ok(ivfpq_scan(s, &query, &keys, &stats, &err), err);
    assert_int_equal(keys.n, K);
    for (int i = 0; i < K; i++) rows[i] = kern_key_number(keys.key[i]);
    assert_ok(ivfpq_distances(s, query.vector, rows, K, d, &err), err);
    for (int i = 0; i < K; i++) sum += d[i];
    ivfpq_keys_reset(&keys);
  }
  if (sum > .1 * K * QUERIES) fail_msg("candidates are %.3f away on average", sum / (K * QUERIES));
  ivfpq_query all = {.vector = t->x + N - 1, .nprobe = 2, .n_candidates = N};
  ivfpq_keys keys = {0};
  uint8_t *seen = calloc(N, 1);
  assert_ok(ivfpq_scan(s, &all, &keys, &stats, &err), err);
  assert_int_equal(keys.n, N);
  for (size_t i = 0; i < N; i++) assert_int_equal(seen[kern_key_number(keys.key[i])]++, 0);
  ivfpq_keys_reset(&keys);
  double *truth = malloc(N * sizeof *truth);
  for (size_t i = 0; i < N; i++) truth[i] = fabs((double)t->x[i] - t->x[N - 1]);
  qsort(truth, N, sizeof *truth, by_double);
  all.n_candidates = K;
  assert_ok(ivfpq_exact(s, &all, NULL, 2, &keys, &stats, &err), err);
  assert_int_equal(keys.n, K);
  qsort(keys.key, K, 8, by_key);
  for (int i = 0; i < K; i++) assert_near(kern_key_value(keys.key[i]), truth[i], .01);
  ivfpq_keys_reset(&keys);
  free(seen), free(truth);
  ivfpq_segment_close(s);
  input_close(&t->in);
}

static void test_sub_quantizers(void **state) {
  (void)state;
  for (uint32_t bits = 4; bits <= 8; bits += 4)
    for (uint32_t subs = 1; subs <= 17; subs += subs < 4 ? 1 : 6) {
      ivfpq_build_options o = options(IVFPQ_COSINE);
      o.bits = bits, o.subs = subs, o.nlist = 5;
      run_case(700, 17, CLUSTERS, ROW_IDS, 0, o);
    }
}

/* What a scan drops on its way is worse than what it keeps: `have` is the head of the scan that keeps everything. */
static void assert_best_estimates(ivfpq_segment *s, const ivfpq_query *q, const ivfpq_keys *have) {
  ivfpq_query query = *q;
  ivfpq_keys all = {0};
  ivfpq_stats stats = {0};
  vs_err err = {0};
  query.n_candidates = s->params.n_rows;
  assert_ok(ivfpq_scan(s, &query, &all, &stats, &err), err);
  qsort(all.key, all.n, 8, by_key), qsort(have->key, have->n, 8, by_key);
  for (size_t i = 0; i < have->n; i++)
    assert_true(kern_key_value(all.key[i]) == kern_key_value(have->key[i])); /* rows may tie */
  ivfpq_keys_reset(&all);
  query.n_candidates = 0;
  assert_ok(ivfpq_scan(s, &query, &all, &stats, &err), err);
  assert_ok(ivfpq_exact(s, &query, NULL, 1, &all, &stats, &err), err);
  assert_int_equal(all.n, 0);
  ivfpq_keys_reset(&all);
}

/* A budget of candidates finds most of the true neighbours. */
static void test_recall(void **state) {
  (void)state;
  enum { N = 5000, DIM = 32, QUERIES = 20, K = 10 };
  set *t = set_open(N, DIM, CLUSTERS, ROW_IDS, 0);
  for (int metric = 0; metric < 3; metric++)
    for (uint32_t bits = 4; bits <= 8; bits += 4) {
      ivfpq_build_options o = options((ivfpq_metric)metric);
      ivfpq_rng r = rng_of(7);
      vs_err err = {0};
      int hits = 0;
      o.bits = bits, o.subs = bits == 4 ? 16 : 8;
      build(t, &o, path_of("recall.ivf"));
      ivfpq_segment *s = open_path(path_of("recall.ivf"), 1);
      for (int i = 0; i < QUERIES; i++) {
        float q[DIM];
        const float *like = t->x + ivfpq_rng_below(&r, N) * DIM;
        for (int j = 0; j < DIM; j++) q[j] = like[j] + 0.1f * rng_float(&r);
        ivfpq_keys truth = {0}, have = {0};
        ivfpq_stats stats = {0};
        ivfpq_query query = {.vector = q, .nprobe = s->params.nlist, .n_candidates = K};
        assert_ok(ivfpq_exact(s, &query, NULL, 1, &truth, &stats, &err), err);
        query.n_candidates = 100;
        assert_ok(ivfpq_scan(s, &query, &have, &stats, &err), err);
        assert_int_equal(have.n, 100);
        assert_best_estimates(s, &query, &have);
        for (int a = 0; a < K; a++)
          for (size_t b = 0; b < have.n; b++) hits += kern_key_number(truth.key[a]) == kern_key_number(have.key[b]);
        ivfpq_keys_reset(&truth), ivfpq_keys_reset(&have);
      }
      ivfpq_segment_close(s);
      if (hits < QUERIES * K * 85 / 100)
        fail_msg("metric %d, %u bits: recall@10 of 100 candidates is %.3f", metric, bits, hits / 200.0);
    }
  input_close(&t->in);
}

/* The estimates themselves: close to the squared distance, on one scale for coded and flat segments. Rows of few directions: the
 * codes are of these, and far closer. */
static void estimates_of(shape vectors, uint32_t dim, uint32_t bits, double most) {
  enum { N = 2000, DIM = 64 };
  set *t = set_open(N, dim, vectors, ROW_IDS, 0);
  for (int metric = 0; metric < 3; metric++) {
    ivfpq_build_options o = options((ivfpq_metric)metric);
    float *estimate[2], q[DIM];
    double sum[2] = {0}, spread = 0;
    vs_err err = {0};
    for (uint32_t j = 0; j < dim; j++) q[j] = t->x[j] + (vectors == CLUSTERS ? 0.2f : t->x[dim + j]);
    for (int coded = 0; coded < 2; coded++) {
      o.nlist = coded ? 20 : 0, o.subs = coded ? bits == 4 ? 16 : 8 : 0, o.bits = coded ? bits : 0;
      build(t, &o, path_of("estimate.ivf"));
      ivfpq_segment *s = open_path(path_of("estimate.ivf"), 1);
      assert_int_equal(s->params.turn != 0, coded && vectors == FEW_DIRECTIONS);
      ivfpq_keys keys = {0};
      ivfpq_stats stats = {0};
      ivfpq_query query = {.vector = q, .nprobe = 1000, .n_candidates = N};
      estimate[coded] = calloc(N, sizeof(float));
      assert_ok(ivfpq_scan(s, &query, &keys, &stats, &err), err);
      for (size_t i = 0; i < keys.n; i++) {
        uint32_t row = kern_key_number(keys.key[i]);
        ivfpq_row rec;
        ivfpq_id id;
        assert_ok(ivfpq_rows_fetch(s, &row, 1, &rec, &err), err);
        assert_ok(ivfpq_row_id(s, rec.record, &id, &err), err);
        estimate[coded][id.i] = kern_key_value(keys.key[i]), sum[coded] += estimate[coded][id.i];
        ivfpq_rows_release(s, &rec, 1);
      }
      ivfpq_keys_reset(&keys);
      ivfpq_segment_close(s);
    }
    double error = 0;
    for (int i = 0; i < N; i++) {
      spread += fabs(estimate[0][i] - sum[0] / N);
      error += fabs(estimate[1][i] - estimate[0][i]);
    }
    if (error > most * spread)
      fail_msg("metric %d, %u bits: mean error of an estimate is %.3f of their mean deviation", metric, bits, error / spread);
    free(estimate[0]), free(estimate[1]);
  }
  input_close(&t->in);
}
static void test_estimates(void **state) {
  (void)state;
  estimates_of(CLUSTERS, 16, 8, .2);
  estimates_of(FEW_DIRECTIONS, 64, 8, .05);
  estimates_of(FEW_DIRECTIONS, 64, 4, .2);
}

/* ---- directions of codes ---- */

/* A model of one partition that may learn from n rows. */
static ivfpq_model new_model(uint32_t subs, uint32_t sub_dim, uint32_t bits) {
  return (ivfpq_model){.metric = IVFPQ_L2, .dim = subs * sub_dim, .dim_padded = subs * sub_dim, .nlist = 1, .bits = bits, .subs = subs,
                       .sub_dim = sub_dim, .m = subs * bits / 8};
}
static ivfpq_model learn_model(uint32_t subs, uint32_t sub_dim, uint32_t bits, const float *rows, size_t n) {
  ivfpq_model m = new_model(subs, sub_dim, bits);
  float *sample = malloc(n * m.dim * sizeof *sample);
  ivfpq_learn how = {.sample = sample, .n = n, .seed = 3, .threads = 2};
  vs_err err = {0};
  memcpy(sample, rows, n * m.dim * sizeof *sample);
  assert_ok(ivfpq_model_learn(&m, &how, &err), err);
  free(sample);
  return m;
}

/* How many directions codes are of when nearly all rows' energy lies in eight. */
static uint32_t turn_of(uint32_t subs, uint32_t sub_dim, uint64_t n) {
  set *t = set_open(n, subs * sub_dim, FEW_DIRECTIONS, ROW_IDS, 0);
  ivfpq_model m = learn_model(subs, sub_dim, 8, t->x, n);
  uint32_t turn = m.turn;
  ivfpq_model_reset(&m);
  input_close(&t->in);
  return turn;
}

/* Directions are used as long as a query's table costs no more than a quarter above that of the dimensions (225 of them: 149), are
 * fewer than the dimensions, and have rows enough to be learned from. */
static void test_turn_costs(void **state) {
  (void)state;
  assert_int_equal(turn_of(74, 3, 1000), 148);
  assert_int_equal(turn_of(75, 3, 1000), 0);
  assert_int_equal(turn_of(20, 3, 240), 40);
  assert_int_equal(turn_of(20, 3, 239), 0);
  assert_int_equal(turn_of(20, 2, 1000), 0);
}

/* Of more than 4,096 dimensions no directions are learned (a matrix of 64 MiB would be exceeded), although all rows are multiples of one. */
static void test_turn_of_wide_rows(void **state) {
  (void)state;
  enum { DIM = 4100, ROWS = 4 * DIM };
  float *x = calloc((size_t)ROWS * DIM, sizeof *x);
  ivfpq_rng r = rng_of(21);
  for (size_t i = 0; i < ROWS; i += 16) /* the others are zeros */
    for (size_t j = 0; j < DIM; j++) x[i * DIM + j] = (i % 32 ? 1.f : -1.f) * (float)(j % 7 + 1);
  for (size_t i = 0; i < ROWS; i += 16) x[i * DIM] += rng_float(&r);
  ivfpq_model m = learn_model(2, DIM / 2, 4, x, ROWS);
  assert_int_equal(m.turn, 0);
  ivfpq_model_reset(&m);
  free(x);
}

/* Saves m as having `turn` directions for its codes and `project` for its centroids, and loads that. */
static vs_rc load_with(const ivfpq_model *m, uint32_t sub_dim, uint32_t turn, uint32_t project, ivfpq_model *back) {
  ivfpq_model as = *m;
  ivfpq_state *s;
  vs_err err = {0};
  float *directions = calloc((size_t)(turn > project ? turn : project) * m->dim_padded + 1, sizeof *directions);
  if (turn != m->turn) as.turn = turn, as.turned = directions;
  if (project != m->project) as.project = project, as.directions = directions;
  assert_ok(ivfpq_state_create(folder, "turn.state", "key", &s, &err), err);
  ivfpq_model_save(&as, s);
  assert_ok(ivfpq_state_commit(s, &err), err);
  assert_ok(ivfpq_state_open(folder, "turn.state", "key", &s, &err), err);
  *back = new_model(m->subs, sub_dim, m->bits);
  vs_rc rc = ivfpq_model_load(back, s, &err);
  vs_err_reset(&err);
  vs_rc end = ivfpq_state_close(s, &err);
  if (!rc) assert_int_equal(end, VS_OK);
  vs_err_reset(&err);
  unlink(path_of("turn.state"));
  free(directions);
  return rc;
}

/* A kept model comes back as it was; one whose directions cannot be of its shape is refused, though its checksum is right. */
static void test_kept_directions(void **state) {
  (void)state;
  enum { SUBS = 8, SUB_DIM = 131, DIM = SUBS * SUB_DIM, ROWS = 600 };
  set *t = set_open(ROWS, 64, FEW_DIRECTIONS, ROW_IDS, 0), *wide = set_open(ROWS, DIM, FEW_DIRECTIONS, ROW_IDS, 0);
  ivfpq_model m = learn_model(SUBS, 8, 8, t->x, ROWS), w = learn_model(SUBS, SUB_DIM, 8, wide->x, ROWS), back;
  assert_int_equal(m.turn, 16);
  assert_int_equal(load_with(&m, 8, 16, 0, &back), VS_OK);
  assert_int_equal(back.turn, 16);
  assert_memory_equal(back.turned, m.turned, 16 * 64 * sizeof(float));
  ivfpq_model_reset(&back);
  assert_int_equal(w.turn, 0); /* too few rows */
  const struct { const ivfpq_model *m; uint32_t sub_dim, turn, project; } wrong[] = {
      {&m, 8, 17, 0}, {&m, 8, 64, 0}, {&w, SUB_DIM, IVFPQ_MAX_TURN + SUBS, 0}, {&w, SUB_DIM, 0, 129}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    vs_rc rc = load_with(wrong[i].m, wrong[i].sub_dim, wrong[i].turn, wrong[i].project, &back);
    if (rc != VS_CORRUPT) fail_msg("case %zu: %d", i, (int)rc);
    ivfpq_model_reset(&back);
  }
  ivfpq_model_reset(&m), ivfpq_model_reset(&w);
  input_close(&t->in), input_close(&wide->in);
}

/* ---- what a build measures of itself ---- */

/* The distances of the k nearest of each row from `from` to `to`, side by side. */
static float *true_borders(ivfpq_segment *s, const set *t, uint64_t from, uint64_t to, uint64_t k) {
  float *out = malloc((to - from) * k * sizeof *out);
  for (uint64_t i = from; i < to; i++) {
    ivfpq_keys truth = {0};
    ivfpq_stats unused = {0};
    vs_err err = {0};
    ivfpq_query q = {.vector = t->x + i * t->in.dim, .nprobe = 1, .n_candidates = k};
    assert_ok(ivfpq_exact(s, &q, NULL, 2, &truth, &unused, &err), err);
    assert_int_equal(truth.n, k);
    qsort(truth.key, truth.n, 8, by_key);
    for (uint64_t j = 0; j < k; j++) out[(i - from) * k + j] = kern_key_value(truth.key[j]);
    ivfpq_keys_reset(&truth);
  }
  return out;
}

/* A setting's recall@k on rows that were held out of the build, and rows it scanned on average. border: distance of the k-th nearest,
 * query by query, `stride` apart. */
static double setting_recall(ivfpq_segment *s, const set *t, uint64_t from, uint64_t to, uint64_t k, const ivfpq_setting *setting,
                             const float *border, size_t stride, double *rows_seen) {
  uint64_t hits = 0, seen = 0;
  uint32_t *rows = malloc((setting->n_candidates + 1) * sizeof *rows);
  float *d = malloc((setting->n_candidates + 1) * sizeof *d);
  for (uint64_t i = from; i < to; i++) {
    ivfpq_keys have = {0};
    ivfpq_stats stats = {0};
    vs_err err = {0};
    ivfpq_query q = {.vector = t->x + i * t->in.dim, .nprobe = setting->nprobe, .n_candidates = setting->n_candidates, .k = k,
                     .reach = setting->reach};
    assert_ok(ivfpq_scan(s, &q, &have, &stats, &err), err);
    assert_true(have.n <= setting->n_candidates);
    for (size_t j = 0; j < have.n; j++) rows[j] = kern_key_number(have.key[j]);
    assert_ok(ivfpq_distances(s, q.vector, rows, have.n, d, &err), err);
    for (size_t j = 0; j < have.n; j++) hits += d[j] <= border[(i - from) * stride];
    seen += stats.rows;
    ivfpq_keys_reset(&have);
  }
  free(rows), free(d);
  *rows_seen = (double)seen / (double)(to - from);
  return (double)hits / (double)(k * (to - from));
}

/* More recall costs more, and rows from outside get what was promised. */
static void test_calibration(void **state) {
  (void)state;
  enum { N = 8000, HELD_OUT = 400, DIM = 16, MAX_K = 300 };
  static const double wanted[] = {.7, .8, .9, .95, .98};
  static const uint64_t ks[] = {1, 3, 10, 50, 100, MAX_K};
  set *t = set_open(N + HELD_OUT, DIM, CLUSTERS, ROW_IDS, 0);
  t->in.n_rows = N;
  for (int metric = 0; metric < 3; metric++) {
    ivfpq_build_options o = options((ivfpq_metric)metric);
    build(t, &o, path_of("calibrated.ivf"));
    ivfpq_segment *s = open_path(path_of("calibrated.ivf"), 1);
    const ivfpq_calibration *c = s->calibration;
    assert_non_null(c);
    assert_true(c->n_queries >= 200 && c->n_levels > 10 && c->k[0] == 1);
    assert_true(s->params.beta >= 0 && s->params.beta <= 2);
    float *border = true_borders(s, t, N, N + HELD_OUT, MAX_K);
    for (size_t a = 0; a < sizeof ks / sizeof *ks; a++) {
      double before = 0;
      for (size_t b = 0; b < sizeof wanted / sizeof *wanted; b++) {
        ivfpq_setting x;
        double seen;
        assert_true(ivfpq_setting_for(s, ks[a], wanted[b], &x));
        assert_true(x.nprobe >= 1 && x.nprobe <= s->params.nlist && x.n_candidates >= ks[a] && x.n_candidates <= N);
        double recall = setting_recall(s, t, N, N + HELD_OUT, ks[a], &x, border + ks[a] - 1, MAX_K, &seen), cost = seen + 10 * (double)x.n_candidates;
        assert_true(cost > .5 * before); /* more recall is not cheaper, but for what measuring adds */
        before = cost;
        double queries = 1 / (1. / HELD_OUT + 1. / c->n_queries); /* those that promised are few, too */
        double error = sqrt(wanted[b] * (1 - wanted[b]) / (queries * (double)(ks[a] < 4 ? ks[a] : 4)));
        if (recall < wanted[b] - .01 - 4 * error)
          fail_msg("metric %d: recall@%d %.2f was promised with nprobe %u, %d candidates, reach %g: it is %.4f", metric, (int)ks[a],
                   wanted[b], x.nprobe, (int)x.n_candidates, x.reach, recall);
      }
    }
    free(border);
    ivfpq_setting x;
    assert_false(ivfpq_setting_for(s, 0, .9, &x));
    assert_false(ivfpq_setting_for(s, 10, 1.5, &x));
    assert_true(ivfpq_reach_for(s, 1) >= 0 && ivfpq_reach_for(s, UINT32_MAX) == 0);
    ivfpq_segment_close(s);
    o.open = NULL; /* nobody to look at it with */
    build(t, &o, path_of("calibrated.ivf"));
    s = open_path(path_of("calibrated.ivf"), 1);
    assert_null(s->calibration);
    assert_false(ivfpq_setting_for(s, 10, .5, &x));
    assert_true(ivfpq_reach_for(s, 10) == 0);
    ivfpq_segment_close(s);
  }
  input_close(&t->in);
}

/* Sketches bound the true value of what they stand for; with a projection the centroids are ranked in two steps. */
static void assert_sketches(ivfpq_segment *s, const set *t) {
  enum { ROWS = 300 };
  uint32_t rows[ROWS];
  float est[ROWS], width[ROWS], d[ROWS];
  vs_err err = {0};
  assert_true(ivfpq_sketches_mapped(s));
  for (int q = 0; q < 3; q++) {
    const float *query = t->x + (size_t)q * 77 * t->in.dim;
    for (uint32_t i = 0; i < ROWS; i++) rows[i] = (uint32_t)(i * 7 % s->params.n_rows);
    assert_ok(ivfpq_sketch_estimate(s, query, rows, ROWS, est, width, &err), err);
    assert_ok(ivfpq_distances(s, query, rows, ROWS, d, &err), err);
    float most = 0;
    for (int i = 0; i < ROWS; i++) most = fmaxf(most, fabsf(s->params.metric == IVFPQ_L2 ? d[i] * d[i] : 2 * d[i]));
    for (int i = 0; i < ROWS; i++) {
      float truth = s->params.metric == IVFPQ_L2 ? d[i] * d[i] : 2 * d[i];
      if (!(fabsf(est[i] - truth) <= width[i])) fail_msg("a sketch says %g +- %g, the truth is %g", est[i], width[i], truth);
      assert_true(width[i] < .1f * most); /* tight enough to be of use */
    }
  }
}

static void test_sketches(void **state) {
  (void)state;
  for (int metric = 0; metric < 3; metric++)
    for (int half = 0; half < 2; half++) {
      ivfpq_build_options o = options((ivfpq_metric)metric);
      set *t = set_open(900, half ? 514 : 257, CLUSTERS, INT_IDS, 0);
      o.nlist = 9, o.store_f16 = half, o.bits = half ? 4 : 8;
      build(t, &o, path_of("case.ivf"));
      assert_segment(path_of("case.ivf"), t, 1);
      ivfpq_segment *s = open_path(path_of("case.ivf"), 1);
      assert_sketches(s, t);
      ivfpq_segment_close(s);
      s = open_path(path_of("case.ivf"), 0);
      assert_false(ivfpq_sketches_mapped(s)); /* who must read them has no use for them */
      ivfpq_segment_close(s);
      input_close(&t->in);
    }
  set *t = set_open(300, 200, CLUSTERS, INT_IDS, 0); /* small rows have none */
  ivfpq_build_options o = options(IVFPQ_L2);
  o.nlist = 4;
  build(t, &o, path_of("case.ivf"));
  ivfpq_segment *s = open_path(path_of("case.ivf"), 1);
  assert_int_equal(s->params.sketch_bytes, 0);
  ivfpq_segment_close(s);
  input_close(&t->in);
}

/* ---- the same bytes ---- */

static void test_same_bytes(void **state) {
  (void)state;
  set *t = set_open(6000, 16, CLUSTERS, LONG_TEXT_IDS, 1);
  ivfpq_build_options o = options(IVFPQ_COSINE);
  char first[33];
  /* the sample takes all 6,000 rows with every one of these, the staging area fills up with the smaller ones */
  static const struct {
    int threads;
    uint64_t memory;
  } runs[] = {{1, 64 << 20}, {2, 64 << 20}, {4, 4 << 20}, {1, 2 << 20}};
  uint64_t temp = 0; /* of the first that spilled */
  for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
    o.threads = runs[i].threads, o.memory = runs[i].memory;
    ivfpq_build_result r = build(t, &o, path_of("same.ivf"));
    if (i) assert_string_equal(r.checksum, first);
    else memcpy(first, r.checksum, sizeof first);
    assert_true(i < 2 ? r.temp_bytes == 0 : i < 3 || r.temp_bytes > 0);
    if (!temp) temp = r.temp_bytes;
    assert_true(r.temp_bytes == temp);
  }
  o.memory = 300 << 10; /* another sample, tens of runs: other bytes, the same rows */
  o.nlist = 10;
  build(t, &o, path_of("same.ivf"));
  assert_segment(path_of("same.ivf"), t, 0);
  o.memory = 1000;
  ivfpq_build_result r;
  vs_err err = {0};
  unlink(path_of("same.ivf"));
  assert_int_equal(ivfpq_build(&t->in, &o, path_of("same.ivf"), &r, &err), VS_INVALID);
  assert_non_null(strstr(err.text, "--memory"));
  input_close(&t->in);
}

/* ---- rows that cannot or must not be stored twice ---- */

static void assert_no_file(const char *path) { assert_int_not_equal(access(path, F_OK), 0); }

static void test_duplicates(void **state) {
  (void)state;
  for (int text = 0; text < 2; text++) {
    set *t = set_open(5000, 4, CLUSTERS, text ? TEXT_IDS : INT_IDS, 1);
    ivfpq_build_options o = options(IVFPQ_L2);
    ivfpq_build_result r;
    vs_err err = {0};
    const char *path = path_of("dup.ivf");
    for (int i = 0; i < 1000; i++) t->ids[4000 + i] = t->ids[100 + i % 500]; /* 500 ids three times */
    unlink(path);
    assert_int_equal(ivfpq_build(&t->in, &o, path, &r, &err), VS_INVALID);
    assert_non_null(strstr(err.text, "same id"));
    assert_no_file(path);
    for (o.duplicates = IVFPQ_DUP_FIRST; o.duplicates <= IVFPQ_DUP_LAST; o.duplicates++) {
      r = build(t, &o, path);
      assert_int_equal(r.n_rows, 4000);
      assert_int_equal(r.n_duplicates, 1000);
      ivfpq_segment *s = open_path(path, 1);
      assert_clean(s);
      for (uint64_t i = 0; i < 5000; i++)
        if (o.duplicates == IVFPQ_DUP_FIRST ? i < 4000 : i < 100 || (i >= 600 && i < 4000) || i >= 4500)
          assert_row(s, t, i);
      ivfpq_segment_close(s);
    }
    input_close(&t->in);
  }
}

static void count_bad(void *ctx, uint64_t row, const char *why) {
  assert_true(row % 100 == 3 && why[0]);
  ++*(int *)ctx;
}

static void test_bad_rows(void **state) {
  (void)state;
  for (int coded = 0; coded < 2; coded++) {
    uint64_t n = coded ? 4500 : 400;
    set *t = set_open(n, 5, CLUSTERS, INT_IDS, 0);
    ivfpq_build_options o = options(IVFPQ_COSINE);
    ivfpq_build_result r;
    vs_err err = {0};
    const char *path = path_of("bad.ivf");
    int bad = 0;
    o.store_f16 = 1;
    for (uint64_t i = 3; i < n; i += 100) {
      float *x = t->x + i * 5;
      switch (i / 100 % 5) {
        case 0: t->faults[i] = INPUT_NAN; memset(x, 0, 20); break;
        case 1: memset(x, 0, 20); break;
        case 2: x[2] = 70000; break;
        case 3: x[4] = 1e20f; break;
        default: x[0] = NAN; break; /* an input should have marked it */
      }
    }
    unlink(path);
    assert_int_equal(ivfpq_build(&t->in, &o, path, &r, &err), VS_INVALID);
    assert_non_null(strstr(err.text, "row 3"));
    assert_no_file(path);
    o.skip_bad = 1, o.bad_row = count_bad, o.ctx = &bad;
    r = build(t, &o, path);
    assert_int_equal(r.n_bad, n / 100);
    assert_int_equal(bad, n / 100);
    assert_int_equal(r.n_rows, n - n / 100);
    ivfpq_segment *s = open_path(path, 1);
    assert_clean(s);
    for (uint64_t i = 0; i < n; i++) {
      ivfpq_id id = id_of(&t->ids[i]);
      uint32_t row;
      int found;
      if (i % 100 != 3) assert_row(s, t, i);
      else {
        assert_ok(ivfpq_find_id(s, &id, &row, &found, &err), err);
        assert_false(found);
      }
    }
    ivfpq_segment_close(s);
    o.bad_row = NULL;
    memset(t->faults, INPUT_NAN, n); /* nothing is left: a flat build is empty, a coded one cannot train */
    if (coded) {
      unlink(path), err = (vs_err){0};
      assert_int_equal(ivfpq_build(&t->in, &o, path, &r, &err), VS_INVALID);
    } else assert_int_equal(build(t, &o, path).n_rows, 0);
    input_close(&t->in);
  }
}

static int stop_later(void *ctx) { return --*(int *)ctx < 0; }

/* A stop at any poll ends the build without a file; so does an option that cannot be. */
static void test_refusals(void **state) {
  (void)state;
  set *t = set_open(4500, 8, CLUSTERS, INT_IDS, 0);
  ivfpq_build_options o = options(IVFPQ_L2);
  ivfpq_build_result r;
  const char *path = path_of("refused.ivf");
  vs_rc rc = VS_INTERRUPT;
  o.nlist = 70, o.stop = stop_later;
  for (int polls = 0; rc == VS_INTERRUPT; polls += 7) {
    int left = polls;
    vs_err err = {0};
    o.ctx = &left;
    unlink(path);
    rc = ivfpq_build(&t->in, &o, path, &r, &err);
    if (rc == VS_INTERRUPT) assert_no_file(path);
    else assert_ok(rc, err);
    assert_true(rc == VS_OK || polls < 1000);
  }
  o.stop = NULL;
  vs_err err = {0};
  assert_int_equal(ivfpq_build(&t->in, &o, path, &r, &err), VS_EXISTS);
  assert_int_equal(access(path, F_OK), 0);
  unlink(path);
  ivfpq_build_options bad[] = {o, o, o, o};
  bad[0].bits = 5, bad[1].subs = 9, bad[2].nlist = IVFPQ_MAX_NLIST + 1, bad[3].tmpdir = "/nowhere";
  for (int i = 0; i < 4; i++) {
    err = (vs_err){0};
    assert_int_equal(ivfpq_build(&t->in, &bad[i], path, &r, &err), i == 3 ? VS_IO : VS_INVALID);
    assert_true(err.text[0]);
    assert_no_file(path);
  }
  input_close(&t->in);
}

/* Values that no segment could hold are refused, not cut. */
static void test_column_limits(void **state) {
  (void)state;
  set *t = set_open(10, 4, CLUSTERS, INT_IDS, 1);
  ivfpq_build_options o = options(IVFPQ_L2);
  ivfpq_build_result r;
  const char *path = path_of("limits.ivf"), *names[N_COLUMNS] = {"a", "", "c", "d"};
  char *huge = calloc(1, IVFPQ_MAX_TEXT + 2);
  for (int i = 0; i < 3; i++) {
    vs_err err = {0};
    t->columns[3 * N_COLUMNS + 3] =
        (input_value){.type = INPUT_TEXT, .text = huge, .len = i == 0 ? IVFPQ_MAX_TEXT + 1 : IVFPQ_MAX_TEXT};
    if (i == 2) o.column_names = names;
    unlink(path);
    assert_int_equal(ivfpq_build(&t->in, &o, path, &r, &err), i == 1 ? VS_OK : VS_INVALID);
  }
  free(huge);
  input_close(&t->in);
}

/* ---- filters ---- */

typedef struct every { int64_t modulus; int fail; } every;

/* Lets rows pass whose id is a multiple of the modulus. */
static vs_rc eval_every(void *ctx, ivfpq_segment *s, const ivfpq_part *part, uint64_t *bitmap, vs_err *err) {
  const every *e = ctx;
  if (e->fail) return vs_fail(err, VS_INTERRUPT, "the filter said so");
  for (uint32_t r = 0; r < part->entry.n_rows; r++) {
    ivfpq_row row;
    ivfpq_id id;
    uint32_t number = (uint32_t)part->entry.row0 + r;
    vs_rc rc = ivfpq_rows_fetch(s, &number, 1, &row, err);
    if (rc) return rc;
    if (!(rc = ivfpq_row_id(s, row.record, &id, err)) && id.i % e->modulus == 0) bitmap[r / 64] |= 1ull << r % 64;
    ivfpq_rows_release(s, &row, 1);
    if (rc) return rc;
  }
  return VS_OK;
}

static void assert_filtered(ivfpq_segment *s, int64_t modulus, uint64_t want, uint32_t nprobe, const float *q) {
  every e = {modulus, 0};
  ivfpq_filter f = {&e, eval_every};
  vs_err err = {0};
  uint64_t passing = (s->params.n_rows + (uint64_t)modulus - 1) / (uint64_t)modulus;
  for (int exact = 0; exact < 2; exact++) {
    ivfpq_query query = {.vector = q, .nprobe = nprobe, .n_candidates = want, .filter = &f};
    ivfpq_keys keys = {0};
    ivfpq_stats stats = {0};
    vs_rc rc =
        exact ? ivfpq_exact(s, &query, NULL, 2, &keys, &stats, &err) : ivfpq_scan(s, &query, &keys, &stats, &err);
    assert_ok(rc, err);
    if (keys.n != (want < passing ? want : passing))
      fail_msg("modulus %d, %s, %llu wanted: %zu of %llu rows", (int)modulus, exact ? "exact" : "scan",
               (unsigned long long)want, keys.n, (unsigned long long)passing);
    for (size_t i = 0; i < keys.n; i++) {
      uint32_t row = kern_key_number(keys.key[i]);
      ivfpq_row rec;
      ivfpq_id id;
      assert_ok(ivfpq_rows_fetch(s, &row, 1, &rec, &err), err);
      assert_ok(ivfpq_row_id(s, rec.record, &id, &err), err);
      assert_int_equal(id.i % modulus, 0);
      ivfpq_rows_release(s, &rec, 1);
    }
    ivfpq_keys_reset(&keys);
    e.fail = 1;
    vs_err why = {0};
    rc = exact ? ivfpq_exact(s, &query, NULL, 2, &keys, &stats, &why) : ivfpq_scan(s, &query, &keys, &stats, &why);
    assert_int_equal(rc, VS_INTERRUPT);
    ivfpq_keys_reset(&keys);
    e.fail = 0;
  }
}

static void test_filters(void **state) {
  (void)state;
  static const uint32_t nlists[] = {0, 20, 700};
  static const uint64_t wanted[] = {1, 10, 100, 10000};
  set *t = set_open(4500, 8, CLUSTERS, ROW_IDS, 1);
  for (int i = 0; i < 3; i++)
    for (int map = 0; map < 2; map++) {
      ivfpq_build_options o = options(IVFPQ_L2);
      if ((o.nlist = nlists[i]) == 0) t->in.n_rows = 3000; /* flat */
      else t->in.n_rows = 4500;
      build(t, &o, path_of("filter.ivf"));
      ivfpq_segment *s = open_path(path_of("filter.ivf"), map);
      for (int k = 0; k < 4; k++) {
        assert_filtered(s, 2, wanted[k], 3, t->x);
        assert_filtered(s, 997, wanted[k], 3, t->x + 8 * 77);
      }
      ivfpq_segment_close(s);
    }
  input_close(&t->in);
}

/* What brute force finds, against the distances of all rows: the same keys to the bit, for one query and for many, page after page,
 * with and without a filter. */
static void assert_brute(ivfpq_segment *s, const float *queries, size_t n_queries, uint64_t want, const ivfpq_filter *filter, int64_t modulus) {
  uint64_t n = s->params.n_rows;
  uint32_t dim = s->params.dim, *rows = malloc(n * sizeof *rows);
  float *d = malloc(n * sizeof *d);
  uint64_t *all = malloc(n * sizeof *all);
  ivfpq_keys *many = calloc(n_queries, sizeof *many);
  ivfpq_stats stats = {0};
  vs_err err = {0};
  ivfpq_query q = {.n_candidates = want, .filter = filter};
  for (uint64_t i = 0; i < n; i++) rows[i] = (uint32_t)i;
  assert_ok(ivfpq_exact_many(s, &q, queries, n_queries, 2, many, &stats, &err), err);
  for (size_t i = 0; i < n_queries; i++) {
    ivfpq_keys one = {0};
    size_t m = 0;
    q.vector = queries + i * dim;
    assert_ok(ivfpq_distances(s, q.vector, rows, n, d, &err), err);
    for (uint64_t r = 0; r < n; r++) {
      const uint8_t *record;
      ivfpq_id id = {0};
      if (filter) {
        assert_ok(ivfpq_row_at(s, (uint32_t)r, &record, &err), err);
        assert_ok(ivfpq_row_id(s, record, &id, &err), err);
      }
      if (!filter || id.i % modulus == 0) all[m++] = kern_key(d[r], (uint32_t)r);
    }
    qsort(all, m, sizeof *all, by_key);
    size_t first = want < m ? want : m, next = want < m - first ? want : m - first;
    qsort(many[i].key, many[i].n, sizeof *all, by_key);
    assert_int_equal(many[i].n, first);
    assert_memory_equal(many[i].key, all, first * sizeof *all);
    assert_ok(ivfpq_exact(s, &q, NULL, 2, &one, &stats, &err), err);
    qsort(one.key, one.n, sizeof *all, by_key);
    assert_int_equal(one.n, first);
    assert_memory_equal(one.key, all, first * sizeof *all);
    one.n = 0;
    if (first) assert_ok(ivfpq_exact(s, &q, &all[first - 1], 1, &one, &stats, &err), err);
    if (one.n) qsort(one.key, one.n, sizeof *all, by_key);
    assert_int_equal(one.n, next);
    if (next) assert_memory_equal(one.key, all + first, next * sizeof *all);
    ivfpq_keys_reset(&one), ivfpq_keys_reset(&many[i]);
  }
  free(rows), free(d), free(all), free(many);
}

typedef enum { PLAIN, ALIKE, TINY, WILD, N_KINDS } row_kind;

/* ALIKE, TINY: rows that floats hardly tell apart, the latter near the end of what they can square. WILD: lengths from below what floats can square to beyond it, and zeros. */
static void fill_kind(float *x, uint64_t n, uint32_t dim, row_kind kind, float top, ivfpq_rng *r) {
  const float scale[] = {1e-25f, 1e-18f, 1e-8f, 1, 1e8f, 1e12f, top, 0};
  for (uint64_t i = 0; i < n; i++) {
    float by = kind == WILD ? scale[ivfpq_rng_below(r, 8)] : 1;
    for (uint32_t j = 0; j < dim; j++) {
      float v = rng_float(r);
      x[i * dim + j] = kind == ALIKE ? 3 + 1e-6f * v : kind == TINY ? 1e-13f * (3 + 1e-6f * v) : by * v;
    }
  }
}

static void brute_case(uint64_t n, uint32_t dim, ivfpq_metric metric, row_kind kind, int half) {
  enum { QUERIES = 70 };
  every e = {7, 0};
  ivfpq_filter seventh = {&e, eval_every};
  ivfpq_rng r = rng_of(n * 100 + (uint64_t)metric * 10 + (uint64_t)kind);
  set *t = set_open(n, dim, CLUSTERS, INT_IDS, 0);
  for (uint64_t i = 0; i < n; i++) t->ids[i].i = (int64_t)i;
  fill_kind(t->x, n, dim, kind, 1e16f, &r); /* a build takes lengths up to 1e18 */
  ivfpq_build_options o = options(metric);
  o.store_f16 = half;
  const char *path = path_of("brute.ivf");
  build(t, &o, path);
  ivfpq_segment *s = open_path(path, 1);
  float *q = malloc(QUERIES * dim * sizeof *q);
  fill_kind(q, QUERIES, dim, kind, 1e30f, &r);
  memcpy(q, t->x, dim * sizeof *q); /* one of the rows */
  if (metric != IVFPQ_COSINE) memset(q + dim, 0, dim * sizeof *q);
  assert_brute(s, q, 2, 10, NULL, 1);
  assert_brute(s, q, 3, 1, NULL, 1);
  assert_brute(s, q, 5, n < 1000 ? n + 5 : 300, NULL, 1);
  assert_brute(s, q, 4, 20, &seventh, 7);
  if (n < 1000) assert_brute(s, q, QUERIES, 10, NULL, 1);
  free(q);
  ivfpq_segment_close(s);
  input_close(&t->in);
}

static void test_brute(void **state) {
  (void)state;
  static const struct { uint64_t n; uint32_t dim; } sizes[] = {{1, 3}, {70, 17}, {700, 100}, {4500, 8}};
  for (size_t z = 0; z < sizeof sizes / sizeof *sizes; z++)
    for (int metric = 0; metric < 3; metric++)
      for (int kind = 0; kind < N_KINDS; kind++)
        for (int half = 0; half < 2; half++) {
          if ((half && kind) || (kind == WILD && metric == IVFPQ_COSINE)) continue; /* a build refuses zeros there */
          brute_case(sizes[z].n, sizes[z].dim, (ivfpq_metric)metric, (row_kind)kind, half);
        }
}

/* A case with several tasks, for the thread sanitizer. */
static void test_brute_on_threads(void **state) {
  (void)state;
  brute_case(4500, 8, IVFPQ_L2, PLAIN, 0);
}

/* ---- one segment, many threads ---- */

typedef struct crowd {
  ivfpq_segment *s;
  const set *t;
  int wrong;
} crowd;

static void search_in_crowd(void *ctx, size_t i) {
  crowd *c = ctx;
  vs_err err = {0};
  ivfpq_keys keys = {0};
  ivfpq_stats stats = {0};
  uint64_t like = i * 97 % c->t->in.n_rows;
  ivfpq_id id = id_of(&c->t->ids[like]);
  ivfpq_query query = {.vector = c->t->x + like * c->t->in.dim, .nprobe = 3, .n_candidates = 20};
  uint32_t row = 0;
  int found = 0, hit = 0;
  vs_rc rc = ivfpq_find_id(c->s, &id, &row, &found, &err);
  if (!rc)
    rc =
        i % 2 ? ivfpq_scan(c->s, &query, &keys, &stats, &err) : ivfpq_exact(c->s, &query, NULL, 2, &keys, &stats, &err);
  for (size_t k = 0; k < keys.n; k++) hit |= kern_key_number(keys.key[k]) == row;
  if (rc || !found || !hit) __atomic_fetch_add(&c->wrong, 1, __ATOMIC_RELAXED);
  ivfpq_keys_reset(&keys);
}

static void test_crowd(void **state) {
  (void)state;
  set *t = set_open(4300, 8, CLUSTERS, TEXT_IDS, 0);
  ivfpq_build_options o = options(IVFPQ_COSINE);
  build(t, &o, path_of("crowd.ivf"));
  for (int map = 0; map < 2; map++) {
    crowd c = {.s = open_path(path_of("crowd.ivf"), map), .t = t};
    vs_pool_run(60, 4, search_in_crowd, &c);
    assert_true(c.wrong <= 3); /* a scan may miss a row, rarely; the thread sanitizer looks for the rest */
    ivfpq_segment_close(c.s);
  }
  input_close(&t->in);
}

/* ---- damage ---- */

/* A file in memory. Unstable: every fetch is a fresh, exact copy, so that a sanitizer sees reads past the padding and
 * ranges that are not released. */
typedef struct memory_io {
  vs_io io;
  const uint8_t *bytes;
  int *open_ranges;
} memory_io;

/* READ: a file without a map. MAPPED. REMOTE: reads are begun long before they are waited for, and the codebook comes late. */
typedef enum io_mode { READ, MAPPED, REMOTE, N_MODES } io_mode;

static int fetches_left = -1; /* the fetch after so many fails; -1: none */

static vs_rc memory_fetch(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  memory_io *m = (memory_io *)io;
  if (fetches_left >= 0 && fetches_left-- == 0) return vs_fail(err, VS_IO, "the store is gone");
  for (size_t i = 0; i < n; i++) {
    if (io->stable) {
      r[i].ptr = m->bytes + r[i].off;
    } else {
      uint8_t *copy = calloc(1, r[i].len + VS_IO_PAD);
      if (!copy) {
        while (i-- > 0) free(r[i].owner);
        return vs_nomem(err);
      }
      memcpy(copy, m->bytes + r[i].off, r[i].len);
      r[i].ptr = r[i].owner = copy;
    }
  }
  *m->open_ranges += (int)n;
  return VS_OK;
}
static void memory_release(vs_io *io, vs_range *r, size_t n) {
  *((memory_io *)io)->open_ranges -= (int)n;
  for (size_t i = 0; i < n; i++) free(r[i].owner), r[i].owner = NULL;
}
static void memory_close(vs_io *io) { free(io); }

static vs_io *memory_open(const uint8_t *bytes, uint64_t n, io_mode mode, int *open_ranges) {
  memory_io *m = malloc(sizeof *m);
  *m = (memory_io){{.size = n,
                    .stable = mode == MAPPED,
                    .name = "damaged.ivf",
                    .local = mode != REMOTE,
                    .begin = memory_fetch,
                    .release = memory_release,
                    .close = memory_close},
                   bytes,
                   open_ranges};
  return &m->io;
}

typedef struct victim {
  uint8_t *good, *bytes; /* both with VS_IO_PAD zeros behind */
  uint64_t n;
  const set *t;
} victim;

static victim victim_open(const set *t, const char *path) {
  FILE *f = fopen(path, "rb");
  victim v = {.t = t};
  assert_non_null(f);
  fseek(f, 0, SEEK_END);
  v.n = (uint64_t)ftell(f);
  rewind(f);
  v.good = calloc(1, v.n + VS_IO_PAD), v.bytes = calloc(1, v.n + VS_IO_PAD);
  assert_int_equal(fread(v.good, 1, v.n, f), v.n);
  memcpy(v.bytes, v.good, v.n);
  fclose(f);
  return v;
}

/* A row that comes back without an error is one of the input's rows, unless checksums were forged. */
static void read_rows(ivfpq_segment *s, const victim *v, int forged) {
  for (uint64_t i = 0; i < v->t->in.n_rows; i++) {
    ivfpq_id id = id_of(&v->t->ids[i]), have;
    vs_err err = {0};
    ivfpq_row r;
    uint32_t row;
    int found;
    if (ivfpq_find_id(s, &id, &row, &found, &err) || !found) {
      assert_true(forged || err.text[0]); /* never "no such row" */
      continue;
    }
    if (ivfpq_rows_fetch(s, &row, 1, &r, &err)) continue;
    if (!forged) assert_memory_equal(r.record, v->t->x + i * v->t->in.dim, v->t->in.dim * 4);
    if (!ivfpq_row_id(s, r.record, &have, &err)) ivfpq_id_free(&have);
    if (s->params.n_columns == v->t->in.n_columns && s->params.n_columns) {
      ivfpq_value values[N_COLUMNS];
      uint8_t *buf;
      if (!ivfpq_row_columns(s, r.record, values, &buf, &err) && !forged)
        assert_values(v->t->columns + i * N_COLUMNS, values);
      free(buf);
    }
    ivfpq_rows_release(s, &r, 1);
  }
}

static vs_rc eval_columns(void *ctx, ivfpq_segment *s, const ivfpq_part *part, uint64_t *bitmap, vs_err *err) {
  ivfpq_column_view c[IVFPQ_MAX_COLUMNS];
  size_t n = 0;
  (void)ctx;
  for (uint32_t i = 0; i < s->params.n_columns; i++) n += s->columns[i].flags & IVFPQ_FILTER ? 1 : 0;
  vs_rc rc = ivfpq_part_columns(s, part, c, n, err);
  for (uint32_t r = 0; r < part->entry.n_rows && !rc && n; r++)
    if (!(c[0].nulls[r / 8] >> r % 8 & 1)) bitmap[r / 64] |= 1ull << r % 64;
  return rc;
}

static void search_damaged(ivfpq_segment *s, const float *q) {
  vs_err err = {0};
  ivfpq_filter f = {NULL, eval_columns};
  float *d, *wide = calloc(s->params.dim, sizeof *wide); /* a forged dimension may be larger */
  wide[0] = q[0];
  for (int i = 0; i < 4; i++) {
    ivfpq_query query = {.vector = wide, .nprobe = 2, .n_candidates = 5, .k = 3, .filter = i % 2 ? &f : NULL};
    ivfpq_setting setting;
    query.reach = ivfpq_reach_for(s, query.nprobe);
    assert_true(query.reach >= 0);
    if (ivfpq_setting_for(s, 5, .9, &setting)) {
      assert_true(setting.nprobe >= 1 && setting.nprobe <= s->params.nlist && setting.n_candidates <= s->params.n_rows);
      query.nprobe = setting.nprobe;
    }
    ivfpq_keys keys = {0};
    ivfpq_stats stats = {0};
    vs_rc rc =
        i < 2 ? ivfpq_scan(s, &query, &keys, &stats, &err) : ivfpq_exact(s, &query, NULL, 1, &keys, &stats, &err);
    if (!rc) {
      uint32_t rows[5];
      assert_true(keys.n <= 5);
      for (size_t k = 0; k < keys.n; k++) {
        rows[k] = kern_key_number(keys.key[k]);
        assert_true(rows[k] < s->params.n_rows);
      }
      d = malloc(10 * sizeof *d);
      rc = ivfpq_distances(s, wide, rows, keys.n, d, &err);
      if (!rc && ivfpq_sketches_mapped(s)) rc = ivfpq_sketch_estimate(s, wide, rows, keys.n, d, d + 5, &err);
      free(d);
    }
    if (rc) assert_true(err.text[0]);
    ivfpq_keys_reset(&keys);
  }
  free(wide);
}

/* Opens the damaged bytes and tries everything. Returns whether the damage was noticed, by open or by verify. */
static int try_damaged(const victim *v, uint64_t n, io_mode mode, int forged, int thorough) {
  int open_ranges = 0, faults = 0;
  vs_err err = {0};
  ivfpq_segment *s;
  vs_rc rc = ivfpq_segment_open(memory_open(v->bytes, n, mode, &open_ranges), &s, &err);
  if (rc) {
    assert_true(err.text[0] && !s);
    assert_int_equal(open_ranges, 0);
    return 1;
  }
  if (thorough) {
    read_rows(s, v, forged);
    search_damaged(s, v->t->x);
  }
  assert_ok(ivfpq_verify(s, count_fault, &faults, &err), err);
  assert_true(faults <= 1000);
  ivfpq_segment_close(s);
  assert_int_equal(open_ranges, 0);
  return faults > 0;
}

static uint64_t at_u64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
static void put_check(uint8_t *at, const uint8_t *from, size_t n) {
  uint64_t check = ivfpq_check(from, n);
  memcpy(at, &check, 8);
}
static uint8_t *section_of(const victim *v, uint8_t *bytes, uint32_t id, uint64_t *size) {
  uint8_t *t = bytes + v->n - IVFPQ_TRAILER, *f = bytes + at_u64(v->good + v->n - IVFPQ_TRAILER);
  for (; f < t; f += 32) {
    uint32_t have;
    memcpy(&have, f, 4);
    if (have == id && at_u64(f + 8) <= v->n && at_u64(f + 16) <= v->n - at_u64(f + 8)) {
      *size = at_u64(f + 16);
      return bytes + at_u64(f + 8);
    }
  }
  *size = 0;
  return bytes;
}

/* Makes every checksum right again, inside out, where the good file has it. */
static void forge(const victim *v) {
  uint64_t size, good_off = at_u64(v->good + v->n - IVFPQ_TRAILER);
  ivfpq_params h;
  uint8_t *b = v->bytes, *t = b + v->n - IVFPQ_TRAILER, *p = section_of(v, v->good, IVFPQ_PARAMS, &size);
  memcpy(&h, p, sizeof h);
  p = section_of(v, b, IVFPQ_ROWS, &size);
  for (uint64_t i = 0; i < h.n_rows && (i + 1) * h.row_bytes <= size; i++) {
    uint32_t check = ivfpq_check32(p + i * h.row_bytes, h.row_bytes - 4);
    memcpy(p + (i + 1) * h.row_bytes - 4, &check, 4);
  }
  p = section_of(v, b, IVFPQ_IDDIR, &size);
  for (uint64_t at = 0; at + IVFPQ_PAGE <= size; at += IVFPQ_PAGE)
    put_check(p + at + IVFPQ_PAGE - 8, p + at, IVFPQ_PAGE - 8);
  uint64_t scan_size;
  uint8_t *scan = section_of(v, b, IVFPQ_SCAN, &scan_size);
  p = section_of(v, b, IVFPQ_GROUPS, &size);
  for (uint32_t i = 0; i < h.nlist && (i + 1) * sizeof(ivfpq_partition) <= size; i++) { /* one group in these files */
    ivfpq_partition e;
    memcpy(&e, p + i * sizeof e, sizeof e);
    uint64_t codes = ivfpq_code_bytes(e.n_rows, h.m), at = ivfpq_round(codes, 8);
    if (e.off <= scan_size && at + e.column_bytes <= scan_size - e.off) {
      e.check = ivfpq_check(scan + e.off, codes), e.column_check = ivfpq_check(scan + e.off + at, e.column_bytes);
      memcpy(p + i * sizeof e, &e, sizeof e);
    }
  }
  uint64_t group = ivfpq_group_shape(h.nlist, ivfpq_coded_dim(&h), h.project).size;
  if (group <= size && h.n_groups == 1) put_check(p + group - 8, p, group - 8);
  p = section_of(v, b, IVFPQ_SKETCH, &size);
  for (uint64_t i = 0; i < h.n_rows && h.sketch_bytes && (i + 1) * h.sketch_bytes <= size; i++) {
    uint32_t check = ivfpq_check32(p + i * h.sketch_bytes, h.sketch_bytes - 4);
    memcpy(p + (i + 1) * h.sketch_bytes - 4, &check, 4);
  }
  for (uint32_t id = IVFPQ_MEAN; id <= IVFPQ_PROJECTION; id++) {
    p = section_of(v, b, id, &size);
    if (size >= 8) put_check(p + size - 8, p, size - 8);
  }
  for (uint8_t *f = b + good_off; f < t; f += 32)
    if (at_u64(f + 8) <= v->n && at_u64(f + 16) <= v->n - at_u64(f + 8))
      put_check(f + 24, b + at_u64(f + 8), at_u64(f + 16));
  put_check(t + 16, b + good_off, v->n - IVFPQ_TRAILER - good_off);
  put_check(t + 48, t, 48);
}

static void flip_bytes(victim *v, int n_random) {
  uint64_t size, params;
  ivfpq_rng r = rng_of(3);
  params = (uint64_t)(section_of(v, v->good, IVFPQ_PARAMS, &size) - v->good);
  uint64_t fixed = 64 + (v->n - params);
  for (uint64_t i = 0; i < fixed + (uint64_t)n_random; i++) {
    uint64_t at = i < 64 ? i : i < fixed ? params + i - 64 : ivfpq_rng_below(&r, v->n);
    uint8_t by = i < fixed ? 0xff : (uint8_t)(1u << ivfpq_rng_below(&r, 8));
    v->bytes[at] ^= by;
    if (!try_damaged(v, v->n, (io_mode)(i % N_MODES), 0, i % 8 == 0))
      fail_msg("byte %llu of %llu flipped by %02x: nobody noticed", (unsigned long long)at, (unsigned long long)v->n,
               by);
    v->bytes[at] ^= by;
  }
}

static void cut_short(victim *v) {
  ivfpq_rng r = rng_of(4);
  for (int i = 0; i < 600; i++) {
    uint64_t n = i < 200 ? (uint64_t)i : i < 400 ? v->n - 1 - (uint64_t)(i - 200) : ivfpq_rng_below(&r, v->n);
    /* a copy of its own, so that a read behind the end is seen */
    victim cut = {.bytes = calloc(1, n + VS_IO_PAD), .n = n, .t = v->t};
    memcpy(cut.bytes, v->bytes, n);
    assert_true(try_damaged(&cut, n, (io_mode)(i % N_MODES), 0, 0));
    free(cut.bytes);
  }
}

/* Changed fields with right checksums: a hostile file. Nothing may crash; whatever is refused has a text. */
static void forge_fields(victim *v, int n_tries) {
  static const uint64_t values[] = {0,          1,          2,         0x7fffffff, 0x80000000,
                                    0xffffffff, 1ull << 40, INT64_MAX, UINT64_MAX, UINT64_MAX - 63};
  static const uint32_t ids[] = {IVFPQ_PARAMS, IVFPQ_PARAMS, IVFPQ_PARAMS,  IVFPQ_GROUPS, IVFPQ_GROUPS,   IVFPQ_ROWS,
                                 IVFPQ_IDDIR,  IVFPQ_SCAN,   IVFPQ_COLUMNS, IVFPQ_IDHEAP, IVFPQ_CODEBOOK, IVFPQ_MEAN,
                                 IVFPQ_SKETCH, IVFPQ_SKETCH};
  ivfpq_rng r = rng_of(5);
  uint64_t trailer = v->n - IVFPQ_TRAILER, footer = at_u64(v->good + trailer), size;
  for (int i = 0; i < n_tries; i++) {
    for (uint64_t k = ivfpq_rng_below(&r, 3) + 1; k; k--) {
      uint64_t which = ivfpq_rng_below(&r, sizeof ids / sizeof *ids + 1), at;
      if (which == sizeof ids / sizeof *ids) at = footer + ivfpq_rng_below(&r, trailer - footer + 32);
      else {
        at = (uint64_t)(section_of(v, v->good, ids[which], &size) - v->good);
        if (!size) continue;
        if (which < 4 || ids[which] == IVFPQ_IDDIR) size = size < 512 ? size : 512; /* where the fields are */
        at += ivfpq_rng_below(&r, size);
      }
      size_t width = 1u << ivfpq_rng_below(&r, 4);
      if (width > 1) at -= at % width;
      uint64_t value = ivfpq_rng_below(&r, 3)
                           ? values[ivfpq_rng_below(&r, sizeof values / sizeof *values)]
                           : at_u64(v->good + (at < v->n - 8 ? at : v->n - 8)) + ivfpq_rng_below(&r, 5) - 2;
      memcpy(v->bytes + at, &value, at + width <= v->n ? width : 1);
    }
    forge(v);
    try_damaged(v, v->n, (io_mode)(i % N_MODES), 1, 1);
    memcpy(v->bytes, v->good, v->n);
  }
}

static void test_damage(void **state) {
  (void)state;
  static const struct { uint64_t n; uint32_t dim, nlist, bits; id_shape ids; int columns; } cases[] = {
      {40, 4, 3, 8, LONG_TEXT_IDS, 1}, {60, 3, 0, 0, INT_IDS, 1}, {90, 6, 5, 4, ROW_IDS, 0}, {0, 5, 0, 0, TEXT_IDS, 1},
      {24, 256, 2, 8, INT_IDS, 0} /* with sketches */};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    set *t = set_open(cases[i].n, cases[i].dim, CLUSTERS, cases[i].ids, cases[i].columns);
    if (cases[i].ids == LONG_TEXT_IDS) t->ids[2].len = 200; /* a long id, in a small file */
    ivfpq_build_options o = options((ivfpq_metric)(i % 3));
    o.nlist = cases[i].nlist, o.bits = cases[i].bits;
    build(t, &o, path_of("victim.ivf"));
    victim v = victim_open(t, path_of("victim.ivf"));
    for (io_mode mode = READ; mode < N_MODES; mode++) assert_false(try_damaged(&v, v.n, mode, 0, 1));
    forge(&v);
    assert_memory_equal(v.bytes, v.good, v.n); /* forging knows where the checksums are */
    flip_bytes(&v, i ? 500 : 2000);
    cut_short(&v);
    forge_fields(&v, i == 3 ? 500 : i == 4 ? 1000 : 3000);
    free(v.good), free(v.bytes);
    input_close(&t->in);
  }
}

/* The Nth read fails, for every N: each call says so, gives back what it holds, and works the next time. */
static vs_rc read_everything(const victim *v, io_mode mode, int *open_ranges, vs_err *err) {
  ivfpq_filter f = {NULL, eval_columns};
  ivfpq_query query = {.vector = v->t->x, .nprobe = 1, .n_candidates = 7, .filter = &f};
  ivfpq_keys keys = {0};
  ivfpq_stats stats = {0};
  ivfpq_id id = id_of(&v->t->ids[2]);
  ivfpq_segment *s;
  uint32_t row = 0;
  int found, faults = 0;
  float d;
  vs_rc rc = ivfpq_segment_open(memory_open(v->bytes, v->n, mode, open_ranges), &s, err);
  if (rc) return rc;
  rc = ivfpq_find_id(s, &id, &row, &found, err);
  if (!rc) rc = ivfpq_scan(s, &query, &keys, &stats, err);
  if (!rc) rc = ivfpq_exact(s, &query, NULL, 1, &keys, &stats, err);
  if (!rc) rc = ivfpq_distances(s, query.vector, &row, 1, &d, err);
  if (!rc) rc = ivfpq_verify(s, count_fault, &faults, err);
  assert_int_equal(faults, 0);
  ivfpq_keys_reset(&keys);
  ivfpq_segment_close(s);
  return rc;
}

static void test_failing_reads(void **state) {
  (void)state;
  set *t = set_open(40, 4, CLUSTERS, LONG_TEXT_IDS, 1);
  ivfpq_build_options o = options(IVFPQ_L2);
  o.nlist = 3;
  build(t, &o, path_of("victim.ivf"));
  victim v = victim_open(t, path_of("victim.ivf"));
  for (io_mode mode = READ; mode < N_MODES; mode++) {
    vs_rc rc = VS_IO;
    for (int n = 0; rc; n++) {
      vs_err err = {0};
      int open_ranges = 0;
      fetches_left = n;
      rc = read_everything(&v, mode, &open_ranges, &err);
      if (rc) assert_string_equal(err.text, "the store is gone");
      assert_true(rc == VS_OK || rc == VS_IO);
      assert_int_equal(open_ranges, 0);
      assert_true(n < 1000);
    }
  }
  fetches_left = -1;
  free(v.good), free(v.bytes);
  input_close(&t->in);
}

static int stop_at_once(void *ctx, const char *text) {
  count_fault(ctx, text);
  return 1;
}

/* Verify stops when it is told to, and after 1,000 faults. */
static void test_fault_limits(void **state) {
  (void)state;
  set *t = set_open(2000, 2, CLUSTERS, INT_IDS, 0);
  ivfpq_build_options o = options(IVFPQ_L2);
  build(t, &o, path_of("victim.ivf"));
  victim v = victim_open(t, path_of("victim.ivf"));
  uint64_t size;
  uint8_t *rows = section_of(&v, v.bytes, IVFPQ_ROWS, &size);
  for (uint64_t i = 0; i < size; i++) rows[i] ^= 1;
  for (int i = 0; i < 2; i++) {
    vs_err err = {0};
    int open_ranges = 0, faults = 0;
    ivfpq_segment *s;
    assert_ok(ivfpq_segment_open(memory_open(v.bytes, v.n, READ, &open_ranges), &s, &err), err);
    assert_ok(ivfpq_verify(s, i ? stop_at_once : count_fault, &faults, &err), err);
    assert_int_equal(faults, i ? 1 : 1000);
    ivfpq_segment_close(s);
    assert_int_equal(open_ranges, 0);
  }
  free(v.good), free(v.bytes);
  input_close(&t->in);
}

/* Nonsense under right checksums that verify must find: it is more than a walk over hashes. */
static void test_forged_faults(void **state) {
  (void)state;
  set *t = set_open(40, 4, CLUSTERS, INT_IDS, 1);
  ivfpq_build_options o = options(IVFPQ_L2);
  o.nlist = 3;
  build(t, &o, path_of("victim.ivf"));
  victim v = victim_open(t, path_of("victim.ivf"));
  static const struct { uint32_t id; uint64_t off; int add;
  } cases[] = {{IVFPQ_GROUPS, offsetof(ivfpq_partition, n_rows), -1},
               {IVFPQ_GROUPS, offsetof(ivfpq_partition, row0), 1},
               {IVFPQ_GROUPS, offsetof(ivfpq_partition, column_bytes), -1},
               {IVFPQ_GROUPS, sizeof(ivfpq_partition), -64},
               {IVFPQ_PARAMS, offsetof(ivfpq_params, dim_padded), 1},
               {IVFPQ_PARAMS, offsetof(ivfpq_params, beta) + 3, 0x40},
               {IVFPQ_ROWS, 16, 1},   /* the first row's id */
               {IVFPQ_ROWS, 3, 0x40}, /* its first value: NaN or infinite below */
               {IVFPQ_ROWS, 32, 1},   /* its size of columns */
               {IVFPQ_IDDIR, 0, -1},
               {IVFPQ_IDDIR, 4, 1},
               {IVFPQ_IDDIR, 8, 1},
               {IVFPQ_IDDIR, 16, 1},
               {IVFPQ_IDDIR, IVFPQ_PAGE - 9, 1}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    uint64_t size;
    uint8_t *p = section_of(&v, v.bytes, cases[i].id, &size) + cases[i].off;
    if (cases[i].add == 0x40) memset(p - 3, 0xff, 4); /* a NaN */
    else *p = (uint8_t)(*p + cases[i].add);
    forge(&v);
    if (!try_damaged(&v, v.n, READ, 1, 1))
      fail_msg("section %u, offset %llu: not noticed", cases[i].id, (unsigned long long)cases[i].off);
    memcpy(v.bytes, v.good, v.n);
  }
  free(v.good), free(v.bytes);
  input_close(&t->in);
}

/* Makes the text at the end of a row's columns 8 bytes longer than any writer makes one: its first number gives its room. */
static void lengthen_text(const victim *v, uint32_t row, uint32_t row_bytes) {
  uint64_t size, off;
  uint8_t *slot = section_of(v, v->bytes, IVFPQ_ROWS, &size) + (row + 1ull) * row_bytes - 16;
  uint8_t *record = section_of(v, v->bytes, IVFPQ_COLUMNS, &size);
  uint32_t n, len = IVFPQ_MAX_TEXT + 8, check;
  memcpy(&off, slot, 8), memcpy(&n, slot + 8, 4);
  record += off;
  assert_int_equal(record[0], IVFPQ_INTEGER);
  record[0] = 0;
  memmove(record + 1, record + 9, n - 4 - 9);
  memcpy(record + n - 4 - IVFPQ_MAX_TEXT - 8 - 4, &len, 4);
  check = ivfpq_check32(record, n - 4);
  memcpy(record + n - 4, &check, 4);
}

/* A text longer than any writer makes one is refused by its length, though every checksum is right. */
static void test_forged_text(void **state) {
  (void)state;
  set *t = set_open(10, 4, CLUSTERS, INT_IDS, 1);
  ivfpq_build_options o = options(IVFPQ_L2);
  char *huge = calloc(1, IVFPQ_MAX_TEXT);
  t->columns[4 * N_COLUMNS + 3] = (input_value){.type = INPUT_TEXT, .text = huge, .len = IVFPQ_MAX_TEXT};
  build(t, &o, path_of("victim.ivf"));
  victim v = victim_open(t, path_of("victim.ivf"));
  for (int forged = 0; forged < 2; forged++) {
    vs_err err = {0};
    ivfpq_id id = id_of(&t->ids[4]);
    int open_ranges = 0, found;
    ivfpq_segment *s;
    ivfpq_row r;
    ivfpq_value values[N_COLUMNS];
    uint32_t row;
    uint8_t *buf;
    if (forged) forge(&v);
    assert_ok(ivfpq_segment_open(memory_open(v.bytes, v.n, READ, &open_ranges), &s, &err), err);
    assert_ok(ivfpq_find_id(s, &id, &row, &found, &err), err);
    assert_true(found);
    assert_ok(ivfpq_rows_fetch(s, &row, 1, &r, &err), err);
    assert_int_equal(ivfpq_row_columns(s, r.record, values, &buf, &err), forged ? VS_CORRUPT : VS_OK);
    free(buf);
    ivfpq_rows_release(s, &r, 1);
    if (!forged) lengthen_text(&v, row, s->params.row_bytes);
    ivfpq_segment_close(s);
  }
  free(v.good), free(v.bytes), free(huge);
  input_close(&t->in);
}

/* Numbers of a calibration that a searcher must never meet. */
static void test_forged_calibration(void **state) {
  (void)state;
  set *t = set_open(4500, 8, CLUSTERS, INT_IDS, 0);
  ivfpq_build_options o = options(IVFPQ_L2);
  build(t, &o, path_of("victim.ivf"));
  victim v = victim_open(t, path_of("victim.ivf"));
  uint64_t size;
  ivfpq_params h;
  uint8_t *params = section_of(&v, v.bytes, IVFPQ_PARAMS, &size);
  memcpy(&h, params, sizeof h);
  uint8_t *at = params + size - 8 - h.calibration_bytes;
  ivfpq_calibration c;
  memcpy(&c, at, sizeof c);
  size_t reach = sizeof c, level = reach + c.n_reach * sizeof(ivfpq_reach);
  assert_int_equal(h.calibration_bytes, level + IVFPQ_CURVES * c.n_levels * sizeof(ivfpq_level));
  enum { WRONG, FINE };
  static const uint32_t nan = 0x7fc00000, inf = 0x7f800000, minus = 0xbf800000, two = 0x40000000, huge = UINT32_MAX, zero = 0;
#define LEVEL(i, field) (level + (i) * sizeof(ivfpq_level) + offsetof(ivfpq_level, field))
#define REACH(i, field) (reach + (i) * sizeof(ivfpq_reach) + offsetof(ivfpq_reach, field))
  const struct { size_t off; uint32_t value; int verdict; } cases[] = {
      {LEVEL(0, recall), nan, WRONG}, {LEVEL(3, recall), two, WRONG}, {LEVEL(3, recall), minus, WRONG}, {LEVEL(4, recall), zero, WRONG},
      {LEVEL(2, nprobe), zero, WRONG}, {LEVEL(2, n_candidates), zero, WRONG}, {LEVEL(5, reach), nan, WRONG}, {LEVEL(5, reach), inf, WRONG},
      {LEVEL(5, reach), minus, WRONG}, {LEVEL(5, rows), nan, WRONG}, {LEVEL(5, rows), minus, WRONG}, {REACH(1, reach), nan, WRONG},
      {REACH(1, reach), inf, WRONG}, {REACH(1, reach), minus, WRONG}, {REACH(1, nprobe), zero, WRONG}, {REACH(1, nprobe), huge, WRONG},
      {offsetof(ivfpq_calibration, n_reach), huge, WRONG}, {offsetof(ivfpq_calibration, n_levels), huge, WRONG},
      {offsetof(ivfpq_calibration, n_levels), zero, WRONG}, {offsetof(ivfpq_calibration, k), zero, WRONG},
      {offsetof(ivfpq_calibration, k) + 4, huge, WRONG}, {offsetof(ivfpq_calibration, k) + 4 * (IVFPQ_CURVES - 1), huge, FINE},
      {LEVEL(2, nprobe), huge, FINE}, {LEVEL(2, n_candidates), huge, FINE}, {LEVEL(c.n_levels + 1, nprobe), huge, FINE}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    memcpy(at + cases[i].off, &cases[i].value, 4);
    forge(&v);
    int noticed = try_damaged(&v, v.n, MAPPED, 1, 0);
    if (noticed != (cases[i].verdict == WRONG)) fail_msg("case %zu: %s", i, noticed ? "refused" : "not noticed");
    if (!noticed) {
      int open_ranges = 0;
      vs_err err = {0};
      ivfpq_segment *s;
      assert_ok(ivfpq_segment_open(memory_open(v.bytes, v.n, MAPPED, &open_ranges), &s, &err), err);
      for (uint64_t k = 1; k < 1ull << 62; k *= 11)
        for (double r = .05; r <= 1; r += .05) {
          ivfpq_setting x;
          if (ivfpq_setting_for(s, k, r, &x))
            assert_true(x.nprobe >= 1 && x.nprobe <= h.nlist && x.n_candidates >= 1 && x.n_candidates <= h.n_rows);
        }
      ivfpq_segment_close(s);
    }
    memcpy(v.bytes, v.good, v.n);
  }
  free(v.good), free(v.bytes);
  input_close(&t->in);
}

/* Many partitions of wide rows of few directions: centroids are ranked through a projection, codes are of directions. All the sections there are, each damaged in places. */
static void test_projection(void **state) {
  (void)state;
  set *t = set_open(2100, 512, FEW_DIRECTIONS, ROW_IDS, 0);
  ivfpq_build_options o = options(IVFPQ_COSINE);
  o.nlist = 600, o.subs = 32;
  build(t, &o, path_of("victim.ivf"));
  ivfpq_segment *s = open_path(path_of("victim.ivf"), 1);
  assert_true(s->params.project > 0 && s->params.turn > 0 && s->params.n_groups > 1);
  ivfpq_segment_close(s);
  assert_segment(path_of("victim.ivf"), t, 1);
  assert_segment(path_of("victim.ivf"), t, 0);
  victim v = victim_open(t, path_of("victim.ivf"));
  for (io_mode mode = READ; mode < N_MODES; mode++) assert_false(try_damaged(&v, v.n, mode, 0, 1));
  ivfpq_rng r = rng_of(12);
  for (uint32_t id = IVFPQ_SCAN; id < IVFPQ_N_SECTIONS; id++)
    for (int i = 0; i < 12; i++) {
      uint64_t size;
      uint8_t *p = section_of(&v, v.bytes, id, &size);
      if (!size) break; /* there are no columns and no long ids */
      uint64_t at = ivfpq_rng_below(&r, size);
      p[at] ^= 0x10;
      if (!try_damaged(&v, v.n, (io_mode)(i % N_MODES), 0, 1)) fail_msg("section %u, byte %llu: not noticed", id, (unsigned long long)at);
      p[at] ^= 0x10;
    }
  static const uint32_t nan = 0x7fc00000, minus = 0xbf800000;
  ivfpq_params h;
  uint64_t size;
  memcpy(&h, section_of(&v, v.bytes, IVFPQ_PARAMS, &size), sizeof h);
  uint32_t coded = ivfpq_coded_dim(&h), last = h.sketch_bytes;
  const struct { uint32_t id; uint64_t off; const uint32_t *value; } forged[] = {
      {IVFPQ_SKETCH, coded, &nan},     {IVFPQ_SKETCH, coded, &minus},         {IVFPQ_SKETCH, coded + 4, &nan},
      {IVFPQ_SKETCH, coded + 4, &minus}, {IVFPQ_SKETCH, last + 8, &nan},      {IVFPQ_PROJECTION, (uint64_t)h.project * coded, &nan},
      {IVFPQ_CODEBOOK, (uint64_t)h.m * 256 * h.sub_dim + ivfpq_turn_bytes(&h) + 4, &nan},
      {IVFPQ_CODEBOOK, (uint64_t)h.m * 256 * h.sub_dim + ivfpq_turn_bytes(&h) + 4 * (h.m + h.turn) - 4, &nan}, {IVFPQ_MEAN, 40, &nan}};
  for (size_t i = 0; i < sizeof forged / sizeof *forged; i++) {
    uint8_t *p = section_of(&v, v.bytes, forged[i].id, &size);
    assert_true(forged[i].off + 4 <= size);
    memcpy(p + forged[i].off, forged[i].value, 4);
    forge(&v);
    if (!try_damaged(&v, v.n, (io_mode)(i % N_MODES), 1, 1)) fail_msg("forged case %zu: not noticed", i);
    memcpy(v.bytes, v.good, v.n);
  }
  free(v.good), free(v.bytes);
  input_close(&t->in);
}

/* ---- the writer ---- */

static void put_section(ivfpq_writer *w, ivfpq_section_id id, int fill, size_t n) {
  uint8_t *p = malloc(n + 1);
  vs_err err = {0};
  memset(p, fill, n + 1);
  assert_ok(ivfpq_writer_begin(w, id, &err), err);
  assert_ok(ivfpq_writer_put(w, p, n, &err), err);
  ivfpq_writer_end(w);
  free(p);
}

static uint8_t *whole_file(const char *path, size_t *n) {
  FILE *f = fopen(path, "rb");
  assert_non_null(f);
  fseek(f, 0, SEEK_END);
  *n = (size_t)ftell(f);
  rewind(f);
  uint8_t *p = malloc(*n + 1);
  assert_int_equal(fread(p, 1, *n, f), *n);
  fclose(f);
  return p;
}

/* A preview is a whole file; what is written after going back leaves no trace of it, in the bytes and in their hash. */
static void test_writer(void **state) {
  (void)state;
  static const size_t before[] = {0, 1, 100, (1 << 20) - 64, 1 << 20, 3000000}, preview[] = {0, 70, 1500000};
  for (size_t i = 0; i < sizeof before / sizeof *before; i++)
    for (size_t j = 0; j < sizeof preview / sizeof *preview; j++) {
      char path[2][128], checksum[2][33];
      uint64_t n_bytes[2];
      size_t n[3];
      for (int with = 0; with < 2; with++) {
        vs_err err = {0};
        ivfpq_writer *w;
        snprintf(path[with], sizeof path[with], "%s/writer%d.ivf", folder, with);
        unlink(path[with]);
        assert_ok(ivfpq_writer_open(path[with], &w, &err), err);
        put_section(w, IVFPQ_SCAN, 'a', before[i]);
        for (int again = 0; again < 2 * with; again++) { /* twice: the mark is where it was */
          assert_ok(ivfpq_writer_mark(w, &err), err);
          put_section(w, IVFPQ_PARAMS, 'p', preview[j]);
          put_section(w, IVFPQ_MEAN, 'm', 10);
          assert_ok(ivfpq_writer_preview(w, &err), err);
          uint8_t *seen = whole_file(path[with], &n[2]);
          assert_memory_equal(seen + n[2] - 8, IVFPQ_MAGIC_END, 8);
          assert_int_equal(at_u64(seen + n[2] - IVFPQ_TRAILER + 24), n[2]);
          assert_int_equal(at_u64(seen + n[2] - IVFPQ_TRAILER + 8) & UINT32_MAX, 3);
          free(seen);
          assert_ok(ivfpq_writer_back(w, &err), err);
        }
        put_section(w, IVFPQ_PARAMS, 'q', 200);
        assert_ok(ivfpq_writer_finish(w, checksum[with], &n_bytes[with], &err), err);
      }
      uint8_t *plain = whole_file(path[0], &n[0]), *marked = whole_file(path[1], &n[1]);
      assert_int_equal(n[0], n[1]);
      assert_int_equal(n[0], n_bytes[1]);
      assert_memory_equal(plain, marked, n[0]);
      assert_string_equal(checksum[0], checksum[1]);
      free(plain), free(marked);
    }
}

/* The whole folder is empty of temporary files: they never had a name. */
static void test_nothing_left(void **state) {
  (void)state;
  DIR *d = opendir(folder);
  for (struct dirent *e; (e = readdir(d));) {
    size_t n = strlen(e->d_name);
    if (e->d_name[0] == '.' && n <= 2) continue;
    if (n < 4 || strcmp(e->d_name + n - 4, ".ivf")) fail_msg("%s was left behind", e->d_name);
    unlink(path_of(e->d_name));
  }
  closedir(d);
  assert_int_equal(rmdir(folder), 0);
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern: some of them only */
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_sorter),
                                     cmocka_unit_test(test_runs),
                                     cmocka_unit_test(test_kmeans),
                                     cmocka_unit_test(test_defaults),
                                     cmocka_unit_test(test_shapes),
                                     cmocka_unit_test(test_wide),
                                     cmocka_unit_test(test_distributions),
                                     cmocka_unit_test(test_many_partitions),
                                     cmocka_unit_test(test_oversized_partition),
                                     cmocka_unit_test(test_sub_quantizers),
                                     cmocka_unit_test(test_recall),
                                     cmocka_unit_test(test_estimates),
                                     cmocka_unit_test(test_turn_costs),
                                     cmocka_unit_test(test_turn_of_wide_rows),
                                     cmocka_unit_test(test_kept_directions),
                                     cmocka_unit_test(test_calibration),
                                     cmocka_unit_test(test_sketches),
                                     cmocka_unit_test(test_same_bytes),
                                     cmocka_unit_test(test_duplicates),
                                     cmocka_unit_test(test_bad_rows),
                                     cmocka_unit_test(test_refusals),
                                     cmocka_unit_test(test_column_limits),
                                     cmocka_unit_test(test_filters),
    cmocka_unit_test(test_brute),
    cmocka_unit_test(test_brute_on_threads),
                                     cmocka_unit_test(test_crowd),
                                     cmocka_unit_test(test_damage),
                                     cmocka_unit_test(test_failing_reads),
                                     cmocka_unit_test(test_fault_limits),
                                     cmocka_unit_test(test_forged_faults),
                                     cmocka_unit_test(test_forged_text),
                                     cmocka_unit_test(test_forged_calibration),
                                     cmocka_unit_test(test_projection),
                                     cmocka_unit_test(test_writer),
                                     cmocka_unit_test(test_nothing_left)};
  const char *set_seed = getenv("IVFPQ_TEST_SEED"), *tmp = getenv("TMPDIR");
  if (set_seed) seed = strtoull(set_seed, NULL, 10);
  printf("seed %llu\n", (unsigned long long)seed);
  snprintf(folder, sizeof folder, "%.40s/ivfpq-XXXXXX", tmp ? tmp : "/tmp");
  if (!mkdtemp(folder)) return 1;
  return cmocka_run_group_tests(tests, NULL, NULL);
}
