/* test_input.c - proves that ext/input delivers what a file holds, row by row, whatever the batch size, and refuses the rest.
 *
 * Every file is made here, in a folder of its own: HDF5 by libhdf5 in the layouts and damages that a C program can write,
 * .npy, .fvecs and .f32 by hand. Ends with a run over one good file with a byte changed at a time: an error or rows, never
 * a crash. Real files are in test_hdf5_real.py.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <hdf5.h>
#include <libdeflate.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "../ext/base/vs_scope.h"
#include "../ext/input/input_hdf5_int.h"
#include "../tool/input_concat.h"
#include "../tool/tool.h"

/* libhdf5 leaves memory behind on some damaged files. */
const char *__lsan_default_suppressions(void);
__attribute__((visibility("default"))) const char *__lsan_default_suppressions(void) { return "leak:libhdf5"; }

static char dir[200];

static const char *in_dir(const char *name) {
  static char path[4][300];
  static int turn;
  turn = (turn + 1) % 4;
  snprintf(path[turn], sizeof path[turn], "%s/%s", dir, name);
  return path[turn];
}

static float value_at(uint64_t row, uint32_t j) { return (float)((row * 37 + j * 11) % 1000) / 8 - 50; }

static void write_file(const char *path, const void *bytes, size_t n) {
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(bytes, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

/* ---- reading helpers ---- */

/* Small batches are whole, wherever the reader's windows end; not across files. */
static int whole_batches = 1;

/* All rows of an open input equal value_at, read max_rows at a time from row `from` on. */
static void check_rows(input *in, uint64_t from, size_t max_rows) {
  vs_err err = {0};
  uint64_t row = from;
  assert_int_equal(in->seek(in, from, &err), VS_OK);
  for (;;) {
    input_batch b;
    assert_int_equal(in->read(in, max_rows, &b, &err), VS_OK);
    if (!b.n) break;
    assert_true(b.n <= max_rows);
    if (whole_batches && max_rows * in->dim * 4 <= 1 << 20)
      assert_int_equal(b.n, in->n_rows - row < max_rows ? in->n_rows - row : max_rows);
    assert_int_equal(b.first_row, row);
    for (size_t i = 0; i < b.n; i++, row++) {
      assert_int_equal(b.faults[i], INPUT_FINE);
      for (uint32_t j = 0; j < in->dim; j++) assert_true(b.vectors[i * in->dim + j] == value_at(row, j));
      if (in->id_kind == INPUT_ID_ROW) assert_int_equal(b.ids[i].i, row);
    }
  }
  assert_int_equal(row, in->n_rows);
}

static input *open_ok(const char *path, const input_options *opt) {
  vs_err err = {0};
  input *in;
  uint64_t n;
  uint32_t dim;
  if (input_open(path, opt, &in, &err)) fail_msg("%s", err.text);
  if (input_shape(path, opt, &n, &dim, &err)) fail_msg("%s", err.text);
  assert_int_equal(n, in->n_rows);
  assert_int_equal(dim, in->dim);
  return in;
}

/* Opening (or, when that works, reading it all) fails with a text that names the file and contains `says`. */
static void refused(const char *path, const input_options *opt, const char *says) {
  vs_err err = {0};
  input *in;
  vs_rc rc = input_open(path, opt, &in, &err);
  input_batch b = {.n = 1};
  if (rc) assert_null(in);
  while (!rc && b.n) rc = in->read(in, 100, &b, &err);
  input_close(in);
  if (!rc) fail_msg("%s: was accepted", path);
  assert_int_equal(err.rc, rc);
  if (!strstr(err.text, path) || !strstr(err.text, says)) fail_msg("'%s' lacks '%s'", err.text, says);
}

static void check_all_ways(const char *path, const input_options *opt, uint64_t n, uint32_t dim) {
  input *in = open_ok(path, opt);
  assert_int_equal(in->n_rows, n);
  assert_int_equal(in->dim, dim);
  check_rows(in, 0, 1);
  check_rows(in, 0, 7);
  check_rows(in, n / 2, 100000);
  check_rows(in, n, 3);
  check_rows(in, 0, 100000);
  input_close(in);
}

/* ---- HDF5 writing helpers ---- */

typedef struct h5_maker {
  hid_t file, props; /* props: dataset creation, to be changed by the test; closed by end() */
} h5_maker;

static h5_maker begin(const char *path) {
  h5_maker m = {H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), H5Pcreate(H5P_DATASET_CREATE)};
  assert_true(m.file >= 0 && m.props >= 0);
  return m;
}
static void end(h5_maker *m) {
  H5Pclose(m->props);
  assert_true(H5Fclose(m->file) >= 0);
}

/* n x dim values of value_at, stored as `type`. rows: how many are written, the rest of the extent is left. */
static void put_matrix(h5_maker *m, const char *name, hid_t type, hsize_t n, hsize_t dim, hsize_t rows) {
  hsize_t shape[2] = {n, dim}, start[2] = {0, 0}, count[2] = {rows, dim};
  hid_t space = H5Screate_simple(2, shape, NULL), room = H5Screate_simple(2, count, NULL);
  hid_t d = H5Dcreate2(m->file, name, type, space, H5P_DEFAULT, m->props, H5P_DEFAULT);
  double *v = malloc(rows * dim * sizeof *v + 1);
  assert_true(d >= 0 && v);
  for (hsize_t i = 0; i < rows; i++)
    for (hsize_t j = 0; j < dim; j++) v[i * dim + j] = value_at(i, (uint32_t)j);
  if (rows) {
    H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL);
    assert_true(H5Dwrite(d, H5T_NATIVE_DOUBLE, room, space, H5P_DEFAULT, v) >= 0);
  }
  free(v);
  H5Dclose(d);
  H5Sclose(space);
  H5Sclose(room);
}

static void put_1d(hid_t where, const char *name, hid_t type, hid_t mem, hsize_t n, const void *data) {
  hid_t space = H5Screate_simple(1, &n, NULL);
  hid_t d = H5Dcreate2(where, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  assert_true(d >= 0 && H5Dwrite(d, mem, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0);
  H5Dclose(d);
  H5Sclose(space);
}

static void put_row_ids(h5_maker *m, hsize_t n) {
  int64_t *ids = malloc(n * 8);
  for (hsize_t i = 0; i < n; i++) ids[i] = (int64_t)i - 5;
  put_1d(m->file, "id", H5T_STD_I64LE, H5T_NATIVE_INT64, n, ids);
  free(ids);
}

enum { SHUFFLE = 1, DEFLATE = 2, CHECKSUM = 4, CHECKSUM_FIRST = 8, ALL_FILTERS = 16 };
static void put_filters(hid_t props, int which) {
  if (which & CHECKSUM_FIRST) H5Pset_fletcher32(props);
  if (which & SHUFFLE) H5Pset_shuffle(props);
  if (which & DEFLATE) H5Pset_deflate(props, 1);
  if (which & CHECKSUM) H5Pset_fletcher32(props);
}

static hid_t string_type(size_t size, H5T_str_t pad) {
  hid_t t = H5Tcopy(H5T_C_S1);
  H5Tset_size(t, size);
  H5Tset_strpad(t, pad);
  return t;
}

static hid_t half_type(H5T_order_t order) {
  hid_t t = H5Tcopy(H5T_IEEE_F32LE);
  H5Tset_fields(t, 15, 10, 5, 0, 10);
  H5Tset_size(t, 2);
  H5Tset_ebias(t, 15);
  H5Tset_order(t, order);
  return t;
}

static const input_options row_numbers = {.id_dataset = "none"};

/* ---- HDF5: one matrix ---- */

static void test_storage_kinds(void **state) {
  hid_t half_le = half_type(H5T_ORDER_LE), half_be = half_type(H5T_ORDER_BE);
  hid_t types[] = {H5T_IEEE_F32LE, H5T_IEEE_F32BE, H5T_IEEE_F64LE, H5T_IEEE_F64BE, half_le, half_be};
  /* chunk shapes; {0,0}: contiguous. 13 x 5 divides nothing. */
  hsize_t chunks[][2] = {{0, 0}, {1, 24}, {64, 24}, {13, 5}, {301, 24}, {301, 1}};
  (void)state;
  for (size_t t = 0; t < sizeof types / sizeof *types; t++)
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++)
      for (int filters = 0; filters < (chunks[c][0] ? 3 : 1); filters++) {
        const char *path = in_dir("kinds.h5");
        h5_maker m = begin(path);
        if (chunks[c][0]) H5Pset_chunk(m.props, 2, chunks[c]);
        if (filters) H5Pset_shuffle(m.props), H5Pset_deflate(m.props, 1);
        if (filters > 1) H5Pset_fletcher32(m.props);
        put_matrix(&m, "embedding", types[t], 301, 24, 301);
        end(&m);
        check_all_ways(path, &row_numbers, 301, 24);
      }
  H5Tclose(half_le);
  H5Tclose(half_be);
}

static void test_tall_chunks(void **state) {
  /* 90,000 rows of 256 floats in two chunks of 44 MiB: taller than the window, within the cache. */
  hsize_t chunk[2] = {45000, 256};
  h5_maker m = begin(in_dir("tall.h5"));
  input *in;
  (void)state;
  H5Pset_chunk(m.props, 2, chunk);
  H5Pset_deflate(m.props, 1);
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, 90000, 256, 90000);
  end(&m);
  in = open_ok(in_dir("tall.h5"), &row_numbers);
  check_rows(in, 0, 999);
  check_rows(in, 44990, 20);
  input_close(in);
}

static void test_values_that_do_not_fit(void **state) {
  double v[5][2] = {{1, 2}, {NAN, 2}, {1, -INFINITY}, {1e300, 0}, {1e-300, 3}};
  uint8_t want[5] = {INPUT_FINE, INPUT_NAN, INPUT_NAN, INPUT_OVERFLOW, INPUT_FINE};
  hsize_t shape[2] = {5, 2};
  h5_maker m = begin(in_dir("fit.h5"));
  hid_t space = H5Screate_simple(2, shape, NULL);
  hid_t d = H5Dcreate2(m.file, "embedding", H5T_IEEE_F64LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  input_batch b;
  vs_err err = {0};
  input *in;
  (void)state;
  H5Dwrite(d, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, v);
  H5Dclose(d);
  H5Sclose(space);
  end(&m);
  in = open_ok(in_dir("fit.h5"), &row_numbers);
  assert_int_equal(in->read(in, 10, &b, &err), VS_OK);
  assert_int_equal(b.n, 5);
  assert_memory_equal(b.faults, want, 5);
  assert_true(b.vectors[2] == 0 && b.vectors[6] == 0 && b.vectors[8] == 0 && b.vectors[9] == 3);
  input_close(in);
}

static void test_holes(void **state) {
  /* 100 rows in chunks of 10 x 4, 33 of them written: the chunks of rows 40 to 99 do not exist. */
  hsize_t chunk[2] = {10, 4};
  vs_err err = {0};
  (void)state;
  for (int filters = 0; filters < 2; filters++) {
    input_batch b;
    input *in;
    h5_maker m = begin(in_dir("holes.h5"));
    H5Pset_chunk(m.props, 2, chunk);
    if (filters) H5Pset_deflate(m.props, 1);
    put_matrix(&m, "embedding", H5T_IEEE_F32LE, 100, 8, 33);
    end(&m);
    in = open_ok(in_dir("holes.h5"), &row_numbers);
    for (size_t step = 1; step < 60; step += 13) {
      assert_int_equal(in->seek(in, 0, &err), VS_OK);
      for (;;) {
        assert_int_equal(in->read(in, step, &b, &err), VS_OK);
        if (!b.n) break;
        for (size_t i = 0; i < b.n; i++)
          assert_int_equal(b.faults[i], b.first_row + i < 40 ? INPUT_FINE : INPUT_HOLE);
      }
    }
    input_close(in);
    m = begin(in_dir("holes.h5"));
    H5Pset_chunk(m.props, 2, chunk);
    put_matrix(&m, "embedding", H5T_IEEE_F32LE, 100, 8, 0);
    end(&m);
    refused(in_dir("holes.h5"), &row_numbers, "no row of it was ever written");
  }
}

/* Of some rows only some chunks exist: they hold no vector. */
static void test_holes_beside(void **state) {
  hsize_t chunk[2] = {10, 4}, shape[2] = {60, 14}, start[2] = {20, 4}, count[2] = {10, 4};
  float full[60 * 14], part[40];
  (void)state;
  for (uint32_t i = 0; i < 60 * 14; i++) full[i] = value_at(i / 14, i % 14);
  for (int filters = 0; filters < 2; filters++)
    for (int threads = 1; threads < 3; threads++) {
      vs_err err = {0};
      input_batch b;
      h5_maker m = begin(in_dir("beside.h5"));
      H5Pset_chunk(m.props, 2, chunk);
      if (filters) H5Pset_deflate(m.props, 1);
      hid_t space = H5Screate_simple(2, shape, NULL), room = H5Screate_simple(2, count, NULL), top;
      hsize_t top_start[2] = {0, 0}, top_count[2] = {20, 14};
      hid_t d = H5Dcreate2(m.file, "embedding", H5T_IEEE_F32LE, space, H5P_DEFAULT, m.props, H5P_DEFAULT);
      H5Sselect_hyperslab(space, H5S_SELECT_SET, top_start, NULL, top_count, NULL);
      top = H5Screate_simple(2, top_count, NULL);
      assert_true(H5Dwrite(d, H5T_NATIVE_FLOAT, top, space, H5P_DEFAULT, full) >= 0); /* rows 0 to 19 */
      memcpy(part, full, sizeof part);
      H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL);
      assert_true(H5Dwrite(d, H5T_NATIVE_FLOAT, room, space, H5P_DEFAULT, part) >= 0); /* of rows 20 to 29, one chunk of four */
      H5Dclose(d), H5Sclose(space), H5Sclose(room), H5Sclose(top);
      end(&m);
      input *in = open_ok(in_dir("beside.h5"), &(input_options){.id_dataset = "none", .threads = threads});
      assert_int_equal(in->read(in, 100, &b, &err), VS_OK);
      assert_int_equal(b.n, 60);
      for (size_t i = 0; i < b.n * 14; i++) {
        assert_int_equal(b.faults[i / 14], i / 14 < 20 ? INPUT_FINE : INPUT_HOLE);
        assert_true(b.vectors[i] == (i / 14 < 20 ? full[i] : 0));
      }
      input_close(in);
    }
}

static void test_claims(void **state) {
  hsize_t chunk[2] = {1000, 4};
  h5_maker m = begin(in_dir("claims.h5"));
  (void)state;
  H5Pset_chunk(m.props, 2, chunk);
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, (hsize_t)1 << 41, 4, 2);
  H5Pset_layout(m.props, H5D_CONTIGUOUS);
  put_matrix(&m, "wide", H5T_IEEE_F32LE, 10, 16385, 2);
  end(&m);
  refused(in_dir("claims.h5"), &row_numbers, "claims the shape");
  refused(in_dir("claims.h5"), &(input_options){.id_dataset = "none", .embedding_dataset = "wide"},
          "dimensions up to");
  refused(in_dir("claims.h5"), &(input_options){.id_dataset = "none", .embedding_dataset = "no/such"},
          "has no object");
}

/* ---- HDF5: ids ---- */

static input *ids_input(const char *name, hid_t type, hid_t mem, hsize_t n, const void *data) {
  h5_maker m = begin(in_dir(name));
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, n, 3, n);
  put_1d(m.file, "id", type, mem, n, data);
  end(&m);
  return open_ok(in_dir(name), NULL);
}

static void expect_text(const input_batch *b, size_t i, const char *text) {
  assert_int_equal(b->faults[i], INPUT_FINE);
  assert_int_equal(b->ids[i].type, INPUT_TEXT);
  assert_int_equal(b->ids[i].len, strlen(text));
  assert_memory_equal(b->ids[i].text, text, strlen(text));
}

static void test_integer_ids(void **state) {
  int64_t small[3] = {-7, 0, INT64_MAX};
  uint64_t large[3] = {1, (uint64_t)INT64_MAX + 1, UINT64_MAX}, fits[3] = {1, 2, INT64_MAX};
  uint8_t bytes[3] = {0, 128, 255};
  vs_err err = {0};
  input_batch b;
  input *in = ids_input("i64.h5", H5T_STD_I64BE, H5T_NATIVE_INT64, 3, small);
  (void)state;
  assert_int_equal(in->id_kind, INPUT_ID_INT);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  for (int i = 0; i < 3; i++) assert_true(b.ids[i].type == INPUT_INT && b.ids[i].i == small[i]);
  input_close(in);
  in = ids_input("u64.h5", H5T_STD_U64LE, H5T_NATIVE_UINT64, 3, large);
  assert_int_equal(in->id_kind, INPUT_ID_TEXT);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  expect_text(&b, 0, "1");
  expect_text(&b, 1, "9223372036854775808");
  expect_text(&b, 2, "18446744073709551615");
  input_close(in);
  in = ids_input("u64.h5", H5T_STD_U64LE, H5T_NATIVE_UINT64, 3, fits);
  assert_int_equal(in->id_kind, INPUT_ID_INT);
  input_close(in);
  in = ids_input("u8.h5", H5T_STD_U8LE, H5T_NATIVE_UINT8, 3, bytes);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  assert_int_equal(b.ids[2].i, 255);
  input_close(in);
}

static void test_string_ids(void **state) {
  static const char fixed[5][8] = {"abc", "12345678", "a\0b", "\xff\xfe", ""};
  const char *text[4] = {"na\xc3\xafve", "", "it's", "\xed\xa0\x80"};
  hid_t pad = string_type(8, H5T_STR_NULLPAD), term = string_type(8, H5T_STR_NULLTERM);
  hid_t space = string_type(4, H5T_STR_SPACEPAD), vlen = string_type(H5T_VARIABLE, H5T_STR_NULLTERM);
  vs_err err = {0};
  input_batch b;
  input *in = ids_input("pad.h5", pad, pad, 5, fixed);
  (void)state;
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  expect_text(&b, 0, "abc");
  expect_text(&b, 1, "12345678");
  assert_int_equal(b.faults[2], INPUT_ID_UTF8);
  assert_int_equal(b.faults[3], INPUT_ID_UTF8);
  expect_text(&b, 4, "");
  input_close(in);
  in = ids_input("term.h5", term, term, 5, fixed);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  expect_text(&b, 2, "a"); /* what follows the terminator is not part of the string */
  input_close(in);
  in = ids_input("space.h5", space, space, 2, "a b d   ");
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  expect_text(&b, 0, "a b");
  expect_text(&b, 1, "d");
  input_close(in);
  in = ids_input("vlen.h5", vlen, vlen, 4, text);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  for (size_t i = 0; i < 3; i++) expect_text(&b, i, text[i]);
  assert_int_equal(b.faults[3], INPUT_ID_UTF8);
  input_close(in);
  H5Tclose(pad);
  H5Tclose(term);
  H5Tclose(space);
  H5Tclose(vlen);
}

static void test_long_ids(void **state) {
  /* 200 strings of 1 MiB: more than the reader holds at once, so it must take fewer rows at a time. */
  enum { N = 200, LEN = 1 << 20 };
  hid_t vlen = string_type(H5T_VARIABLE, H5T_STR_NULLTERM);
  char *texts[N];
  vs_err err = {0};
  input_batch b;
  input *in;
  uint64_t row = 0;
  (void)state;
  for (int i = 0; i < N; i++) {
    texts[i] = malloc(LEN + 1);
    memset(texts[i], 'a' + i % 26, LEN);
    texts[i][LEN] = 0;
  }
  in = ids_input("long.h5", vlen, vlen, N, texts);
  do {
    assert_int_equal(in->read(in, 1000, &b, &err), VS_OK);
    for (size_t i = 0; i < b.n; i++, row++) {
      assert_int_equal(b.ids[i].len, LEN);
      assert_memory_equal(b.ids[i].text, texts[row], LEN);
      assert_true(b.vectors[i * 3] == value_at(row, 0));
    }
  } while (b.n);
  assert_int_equal(row, N);
  input_close(in);
  for (int i = 0; i < N; i++) free(texts[i]);
  H5Tclose(vlen);
}

static void test_id_choices(void **state) {
  const char *path = in_dir("choice.h5");
  h5_maker m = begin(path);
  (void)state;
  put_matrix(&m, "vectors", H5T_IEEE_F32LE, 6, 4, 6);
  end(&m);
  refused(path, NULL, "--id-dataset none");
  check_all_ways(path, &row_numbers, 6, 4);
  m = begin(path);
  put_matrix(&m, "vectors", H5T_IEEE_F32LE, 6, 4, 6);
  put_matrix(&m, "emb", H5T_IEEE_F32LE, 6, 4, 6);
  put_row_ids(&m, 6);
  put_1d(m.file, "name", H5T_STD_I32LE, H5T_NATIVE_INT64, 6, (int64_t[6]){0});
  put_1d(m.file, "real", H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, 6, (float[6]){0});
  put_1d(m.file, "short", H5T_STD_I32LE, H5T_NATIVE_INT64, 4, (int64_t[4]){0});
  end(&m);
  refused(path, NULL, "choose with --embedding-dataset");
  check_all_ways(path, &(input_options){.embedding_dataset = "/emb"}, 6, 4); /* `id` leaves no doubt beside `name` */
  refused(path, &(input_options){.embedding_dataset = "emb", .id_dataset = "real"}, "integers or strings");
  refused(path, &(input_options){.embedding_dataset = "emb", .id_dataset = "short"}, "transposed");
  refused(path, &(input_options){.embedding_dataset = "emb", .id_dataset = "id", .dim = 5}, "dimension 4, not 5");
  check_all_ways(path, &(input_options){.embedding_dataset = "emb", .id_dataset = "id", .dim = 4}, 6, 4);
  m = begin(path);
  put_matrix(&m, "emb", H5T_IEEE_F32LE, 6, 4, 6);
  put_1d(m.file, "name", H5T_STD_I32LE, H5T_NATIVE_INT64, 6, (int64_t[6]){0});
  put_1d(m.file, "accession", H5T_STD_I32LE, H5T_NATIVE_INT64, 6, (int64_t[6]){0});
  end(&m);
  refused(path, NULL, "choose with --id-dataset");
  m = begin(path);
  put_matrix(&m, "train", H5T_IEEE_F32LE, 6, 4, 6);
  put_matrix(&m, "test", H5T_IEEE_F32LE, 2, 4, 2);
  end(&m);
  check_all_ways(path, NULL, 6, 4);
  check_all_ways(path, &(input_options){.embedding_dataset = "test"}, 2, 4);
}

static void test_columns(void **state) {
  const char *names[] = {"n", "x", "s"}, *bad[] = {"big"}, *missing[] = {"nope"};
  hid_t text = string_type(4, H5T_STR_NULLPAD);
  input_options opt = {.id_dataset = "none", .columns = names, .n_columns = 3};
  uint64_t big[3] = {1, UINT64_MAX, 3};
  h5_maker m = begin(in_dir("columns.h5"));
  vs_err err = {0};
  input_batch b;
  input *in;
  (void)state;
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, 3, 4, 3);
  put_1d(m.file, "n", H5T_STD_I16LE, H5T_NATIVE_INT64, 3, (int64_t[3]){-3, 0, 3});
  put_1d(m.file, "x", H5T_IEEE_F32LE, H5T_NATIVE_DOUBLE, 3, (double[3]){0.5, NAN, -2});
  put_1d(m.file, "s", text, text, 3, "ab\0\0cdefg\0\0");
  put_1d(m.file, "big", H5T_STD_U64LE, H5T_NATIVE_UINT64, 3, big);
  end(&m);
  in = open_ok(in_dir("columns.h5"), &opt);
  assert_int_equal(in->n_columns, 3);
  assert_true(in->column_types[0] == INPUT_INT && in->column_types[1] == INPUT_REAL &&
              in->column_types[2] == INPUT_TEXT);
  assert_int_equal(in->seek(in, 1, &err), VS_OK);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  assert_int_equal(b.n, 2);
  assert_int_equal(b.columns[0].i, 0);
  assert_int_equal(b.columns[1].type, INPUT_NULL);
  assert_memory_equal(b.columns[2].text, "cdef", 4);
  assert_int_equal(b.columns[3].i, 3);
  assert_true(b.columns[4].r == -2);
  input_close(in);
  refused(in_dir("columns.h5"), &(input_options){.id_dataset = "none", .columns = bad, .n_columns = 1},
          "above 2^63-1");
  refused(in_dir("columns.h5"), &(input_options){.id_dataset = "none", .columns = missing, .n_columns = 1},
          "has no object");
  H5Tclose(text);
}

/* Ids and columns of batches that windows cut: text chunks end elsewhere than those of the vectors. */
static void test_batches_across_windows(void **state) {
  enum { N = 700 };
  const char *names[] = {"n", "s"};
  hid_t vlen = string_type(H5T_VARIABLE, H5T_STR_NULLTERM);
  static char text[N][16];
  const char *ptr[N];
  int64_t number[N];
  hsize_t chunk[2] = {64, 3};
  (void)state;
  for (int i = 0; i < N; i++) {
    sprintf(text[i], "t%d", i * i);
    ptr[i] = text[i], number[i] = -i;
  }
  h5_maker m = begin(in_dir("across.h5"));
  H5Pset_chunk(m.props, 2, chunk);
  H5Pset_deflate(m.props, 1);
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, N, 3, N);
  put_1d(m.file, "id", vlen, vlen, N, ptr);
  put_1d(m.file, "n", H5T_STD_I32LE, H5T_NATIVE_INT64, N, number);
  put_1d(m.file, "s", vlen, vlen, N, ptr);
  end(&m);
  H5Tclose(vlen);
  for (int threads = 1; threads < 4; threads++)
    for (size_t batch = 1; batch < 300; batch += 23) {
      vs_err err = {0};
      input_batch b = {.n = 1};
      uint64_t row = 0;
      input *in = open_ok(in_dir("across.h5"), &(input_options){.threads = threads, .columns = names, .n_columns = 2});
      for (; b.n; row += b.n) {
        assert_int_equal(in->read(in, batch, &b, &err), VS_OK);
        assert_int_equal(b.n, N - row < batch ? N - row : batch);
        for (size_t i = 0; i < b.n; i++) {
          expect_text(&b, i, text[row + i]);
          assert_true(b.vectors[i * 3 + 1] == value_at(row + i, 1));
          assert_int_equal(b.columns[2 * i].i, -(int64_t)(row + i));
          assert_int_equal(b.columns[2 * i + 1].len, strlen(text[row + i]));
          assert_memory_equal(b.columns[2 * i + 1].text, text[row + i], strlen(text[row + i]));
        }
      }
      input_close(in);
    }
}

/* ---- HDF5: links and other files ---- */

static void test_links(void **state) {
  const char *path = in_dir("links.h5");
  h5_maker m = begin(path);
  hid_t g = H5Gcreate2(m.file, "g", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
  (void)state;
  put_matrix(&m, "g/real", H5T_IEEE_F32LE, 6, 4, 6);
  H5Lcreate_soft("real", g, "near", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/g/near", m.file, "far", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("loop", m.file, "loop", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_external("/etc/passwd", "/x", m.file, "out", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/out/x", m.file, "hidden", H5P_DEFAULT, H5P_DEFAULT);
  H5Lcreate_soft("/g/none", m.file, "dangling", H5P_DEFAULT, H5P_DEFAULT);
  H5Gclose(g);
  end(&m);
  check_all_ways(path, &(input_options){.embedding_dataset = "far", .id_dataset = "none"}, 6, 4);
  check_all_ways(path, &(input_options){.embedding_dataset = "//g/./near", .id_dataset = "none"}, 6, 4);
  check_all_ways(path, &(input_options){.embedding_dataset = "g/real", .id_dataset = "none"}, 6, 4);
  refused(path, &(input_options){.embedding_dataset = "loop", .id_dataset = "none"}, "soft links");
  refused(path, &(input_options){.embedding_dataset = "out", .id_dataset = "none"},
          "external link into '/etc/passwd'");
  refused(path, &(input_options){.embedding_dataset = "out/x", .id_dataset = "none"}, "external link");
  refused(path, &(input_options){.embedding_dataset = "hidden", .id_dataset = "none"}, "external link");
  refused(path, &(input_options){.embedding_dataset = "dangling", .id_dataset = "none"}, "which does not exist");
  refused(path, &(input_options){.embedding_dataset = "g/real/x", .id_dataset = "none"}, "has no object");
  refused(path, NULL, "is a link");
}

static void test_other_files(void **state) {
  hsize_t shape[2] = {6, 4};
  const char *path = in_dir("outside.h5");
  h5_maker m = begin(in_dir("source.h5"));
  hid_t space = H5Screate_simple(2, shape, NULL), props = H5Pcreate(H5P_DATASET_CREATE);
  (void)state;
  put_matrix(&m, "x", H5T_IEEE_F32LE, 6, 4, 6);
  end(&m);
  m = begin(path);
  H5Pset_virtual(props, space, in_dir("source.h5"), "x", space);
  H5Dclose(H5Dcreate2(m.file, "embedding", H5T_IEEE_F32LE, space, H5P_DEFAULT, props, H5P_DEFAULT));
  H5Pset_external(m.props, "/etc/hostname", 0, 96);
  H5Dclose(H5Dcreate2(m.file, "stored", H5T_IEEE_F32LE, space, H5P_DEFAULT, m.props, H5P_DEFAULT));
  H5Pclose(props);
  H5Sclose(space);
  end(&m);
  refused(path, &row_numbers, "virtual dataset");
  refused(path, &(input_options){.embedding_dataset = "stored", .id_dataset = "none"}, "external storage");
}

/* ---- HDF5: one dataset per id ---- */

static void put_named(h5_maker *m, const char *name, const char *original, hsize_t len, float first) {
  float v[16] = {0};
  v[0] = first;
  put_1d(m->file, name, H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, len, v);
  if (original) {
    hid_t text = string_type(strlen(original), H5T_STR_NULLPAD), one = H5Screate(H5S_SCALAR);
    hid_t d = H5Dopen2(m->file, name, H5P_DEFAULT);
    hid_t a = H5Acreate2(d, "original_id", text, one, H5P_DEFAULT, H5P_DEFAULT);
    H5Awrite(a, text, original);
    H5Aclose(a);
    H5Dclose(d);
    H5Sclose(one);
    H5Tclose(text);
  }
}

static void test_named(void **state) {
  const char *path = in_dir("named.h5");
  float first[5] = {1, 2, 0, 0, value_at(0, 0)};
  h5_maker m = begin(path);
  vs_err err = {0};
  input_batch b;
  input *in;
  (void)state;
  put_named(&m, "b", NULL, 16, 2);
  put_named(&m, "a", "P1|x", 16, 1);
  put_named(&m, "c", NULL, 12, 3);
  put_named(&m, "d\xff", NULL, 16, 4);
  put_matrix(&m, "e", H5T_IEEE_F64LE, 1, 16, 1);
  end(&m);
  in = open_ok(path, NULL);
  assert_true(in->n_rows == 5 && in->dim == 16 && in->id_kind == INPUT_ID_TEXT);
  for (size_t step = 1; step < 6; step++) {
    const char *want[5] = {"P1|x", "b", NULL, NULL, "e"};
    uint8_t faults[5] = {INPUT_FINE, INPUT_FINE, INPUT_DIM, INPUT_ID_UTF8, INPUT_FINE};
    assert_int_equal(in->seek(in, 0, &err), VS_OK);
    for (uint64_t row = 0; row < 5; row += b.n) {
      assert_int_equal(in->read(in, step, &b, &err), VS_OK);
      assert_true(b.n > 0);
      for (size_t i = 0; i < b.n; i++) {
        assert_int_equal(b.faults[i], faults[row + i]);
        if (want[row + i]) expect_text(&b, i, want[row + i]);
        assert_true(b.vectors[i * 16] == first[row + i]);
      }
    }
    assert_int_equal(in->read(in, step, &b, &err), VS_OK);
    assert_int_equal(b.n, 0);
  }
  input_close(in);
  refused(path, &(input_options){.dim = 12}, "dimension 16, not 12");
  refused(path, &(input_options){.id_dataset = "x"}, "ids in the names");
  m = begin(path);
  put_matrix(&m, "a", H5T_IEEE_F32LE, 1, 8, 1);
  put_matrix(&m, "b", H5T_IEEE_F32LE, 5, 8, 5);
  end(&m);
  refused(path, NULL, "Mean-pool");
  check_all_ways(path, &(input_options){.embedding_dataset = "b", .id_dataset = "none"}, 5, 8);
  /* Words as names, among them names that we look for. */
  m = begin(path);
  for (int i = 0; i < 8; i++) put_named(&m, (char[]){'w', (char)('0' + i), 0}, NULL, 16, 1);
  put_named(&m, "vector", NULL, 16, 1);
  put_named(&m, "name", NULL, 16, 1);
  end(&m);
  in = open_ok(path, NULL);
  assert_int_equal(in->n_rows, 10);
  input_close(in);
}

/* One dataset per id in every storage and type, with one axis and with two. */
static void test_named_storage(void **state) {
  hid_t half = half_type(H5T_ORDER_BE);
  hid_t types[] = {H5T_IEEE_F32LE, H5T_IEEE_F32BE, H5T_IEEE_F64BE, half};
  const char *path = in_dir("named_storage.h5");
  vs_err err = {0};
  input_batch b;
  (void)state;
  h5_maker m = begin(path);
  for (int i = 0; i < 32; i++) {
    hsize_t shape[2] = {1, 40}, flat = 40, chunk[2] = {1, 16}, flat_chunk = 16;
    int kind = i / 4 % 4, axes = 1 + i / 16;
    char name[10];
    double v[40];
    hid_t props = H5Pcreate(H5P_DATASET_CREATE), space = H5Screate_simple(axes, axes == 2 ? shape : &flat, NULL);
    if (kind == 1) H5Pset_layout(props, H5D_COMPACT);
    if (kind > 1) H5Pset_chunk(props, axes, axes == 2 ? chunk : &flat_chunk);
    if (kind == 3) put_filters(props, SHUFFLE | DEFLATE | CHECKSUM);
    sprintf(name, "p%02d", i);
    for (uint32_t j = 0; j < 40; j++) v[j] = value_at((uint64_t)i, j);
    hid_t d = H5Dcreate2(m.file, name, types[i % 4], space, H5P_DEFAULT, props, H5P_DEFAULT);
    assert_true(H5Dwrite(d, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, v) >= 0);
    H5Dclose(d), H5Sclose(space), H5Pclose(props);
  }
  end(&m);
  for (int threads = 1; threads < 3; threads++)
    for (size_t batch = 1; batch < 40; batch += 6) {
      input *in = open_ok(path, &(input_options){.threads = threads});
      uint64_t row = 0;
      assert_true(in->n_rows == 32 && in->dim == 40);
      for (b.n = 1; b.n; row += b.n) {
        assert_int_equal(in->read(in, batch, &b, &err), VS_OK);
        for (size_t i = 0; i < b.n * 40; i++) {
          assert_int_equal(b.faults[i / 40], INPUT_FINE);
          assert_true(b.vectors[i] == value_at(row + i / 40, i % 40));
        }
      }
      assert_int_equal(row, 32);
      input_close(in);
    }
  H5Tclose(half);
}

/* ---- HDF5: chunks and filters that are undone here ---- */

/* Counts what is read of the file's chunks: the readers' calls come here, libhdf5's own do not. */
static int n_chunk_reads;
herr_t H5Dread_chunk(hid_t dset, hid_t transfer, const hsize_t *offset, uint32_t *filters, void *buf) {
  herr_t (*real)(hid_t, hid_t, const hsize_t *, uint32_t *, void *) =
      (herr_t(*)(hid_t, hid_t, const hsize_t *, uint32_t *, void *))dlsym(RTLD_NEXT, "H5Dread_chunk");
  __atomic_fetch_add(&n_chunk_reads, 1, __ATOMIC_RELAXED);
  return real(dset, transfer, offset, filters, buf);
}

/* The format of chunk indexes differs by version and by whether the dataset can grow. */
static h5_maker begin_latest(const char *path) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST);
  h5_maker m = {H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access), H5Pcreate(H5P_DATASET_CREATE)};
  H5Pclose(access);
  assert_true(m.file >= 0 && m.props >= 0);
  return m;
}

static void test_filters(void **state) {
  const char *path = in_dir("filters.h5");
  hid_t types[] = {H5T_IEEE_F32LE, H5T_IEEE_F64BE};
  (void)state;
  for (int latest = 0; latest < 3; latest++) /* 2: chunks over the edge are left unfiltered */
    for (int which = 0; which < ALL_FILTERS; which++)
      for (int threads = 1; threads < 4; threads += 2) {
        hsize_t chunk[2] = {threads == 1 ? 16 : 23, which % 3 ? 9 : 4};
        h5_maker m = latest ? begin_latest(path) : begin(path);
        H5Pset_chunk(m.props, 2, chunk);
        put_filters(m.props, which);
        if (latest == 2) H5Pset_chunk_opts(m.props, H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS);
        put_matrix(&m, "embedding", types[which % 2], 150, 9, 150);
        end(&m);
        check_all_ways(path, &(input_options){.id_dataset = "none", .threads = threads}, 150, 9);
      }
}

/* Every chunk once when rows are read in order, whatever the batch size; a short stretch takes what it touches. */
static void test_chunks_are_decoded_once(void **state) {
  enum { N = 1000, TALL = 64, CHUNKS = (N + TALL - 1) / TALL, ID_CHUNKS = (N + 99) / 100 };
  const char *path = in_dir("once.h5");
  hsize_t chunk[2] = {TALL, 5}, id_chunk = 100, n_ids = N;
  size_t batches[] = {1, 7, 64, 100, 5000};
  int64_t ids[N];
  vs_err err = {0};
  input_batch b;
  input *in;
  (void)state;
  h5_maker m = begin(path);
  H5Pset_chunk(m.props, 2, chunk);
  H5Pset_deflate(m.props, 1);
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, N, 10, N);
  for (int i = 0; i < N; i++) ids[i] = i;
  hid_t space = H5Screate_simple(1, &n_ids, NULL), props = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_chunk(props, 1, &id_chunk);
  H5Pset_deflate(props, 1);
  hid_t d = H5Dcreate2(m.file, "id", H5T_STD_I32LE, space, H5P_DEFAULT, props, H5P_DEFAULT);
  H5Dwrite(d, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, ids);
  H5Dclose(d), H5Sclose(space), H5Pclose(props);
  end(&m);
  for (int threads = 1; threads < 4; threads++)
    for (size_t i = 0; i < sizeof batches / sizeof *batches; i++) {
      in = open_ok(path, &(input_options){.threads = threads});
      n_chunk_reads = 0;
      check_rows(in, 0, batches[i]);
      assert_int_equal(n_chunk_reads, 2 * CHUNKS + ID_CHUNKS);
      input_close(in);
    }
  in = open_ok(path, &(input_options){.threads = 1});
  n_chunk_reads = 0;
  assert_int_equal(in->seek(in, 70, &err), VS_OK);
  assert_int_equal(in->read(in, 16, &b, &err), VS_OK);
  assert_int_equal(b.n, 16);
  assert_int_equal(n_chunk_reads, 2 + 2); /* rows 64 to 127: ids in two chunks */
  assert_int_equal(in->seek(in, 110, &err), VS_OK);
  assert_int_equal(in->read(in, 16, &b, &err), VS_OK);
  assert_int_equal(n_chunk_reads, 4);
  input_close(in);
}

/* Chunks side by side, taller than a window: the band is held. */
static void test_tall_bands(void **state) {
  hsize_t chunk[2] = {70000, 40};
  hid_t half = half_type(H5T_ORDER_BE);
  const char *path = in_dir("tall_bands.h5");
  (void)state;
  h5_maker m = begin(path);
  H5Pset_chunk(m.props, 2, chunk);
  put_filters(m.props, SHUFFLE | DEFLATE);
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, 100000, 64, 100000);
  put_matrix(&m, "half", half, 80000, 64, 80000);
  end(&m);
  for (int threads = 1; threads < 4; threads += 2) {
    input *in = open_ok(path, &(input_options){.id_dataset = "none", .threads = threads});
    n_chunk_reads = 0;
    check_rows(in, 0, 9999);
    assert_int_equal(n_chunk_reads, 4);
    check_rows(in, 69990, 3000);
    input_close(in);
    in = open_ok(path, &(input_options){.id_dataset = "none", .embedding_dataset = "half", .threads = threads});
    check_rows(in, 0, 50000);
    input_close(in);
  }
  H5Tclose(half);
}

/* Rows [0, good) are there, then comes an error that says `says`, again and again; rows from `after` on can be read. */
static void expect_damage(const char *path, uint64_t good, uint64_t after, const char *says) {
  for (int threads = 1; threads < 5; threads++)
    for (size_t batch = 1; batch < 200; batch += 33) {
      input_options opt = {.id_dataset = "none", .threads = threads};
      input *in = open_ok(path, &opt);
      uint64_t row = 0;
      input_batch b = {.n = 1};
      vs_err err = {0};
      vs_rc rc = VS_OK;
      for (; !rc && b.n; row += b.n) {
        rc = in->read(in, batch, &b, &err);
        for (size_t i = 0; !rc && i < b.n; i++) assert_true(b.vectors[i * in->dim] == value_at(row + i, 0));
      }
      if (!rc) fail_msg("%s was read to the end", path);
      assert_int_equal(row, good);
      for (int again = 0; again < 2; again++) {
        if (!strstr(err.text, path) || !strstr(err.text, says)) fail_msg("'%s' lacks '%s'", err.text, says);
        vs_err_reset(&err);
        assert_int_equal(in->read(in, batch, &b, &err), rc);
      }
      check_rows(in, after, batch);
      input_close(in);
    }
}

static void test_damaged_chunks(void **state) {
  enum { N = 80, DIM = 6, TALL = 10, BYTES = TALL * DIM * 4 };
  const char *path = in_dir("damaged.h5");
  hsize_t chunk[2] = {TALL, DIM}, at[2] = {3 * TALL, 0};
  unsigned char plain[2 * BYTES], packed[2 * BYTES + 100], noise[BYTES];
  struct libdeflate_compressor *z = libdeflate_alloc_compressor(1);
  struct {
    int filters;
    size_t raw;      /* bytes of plain data that are packed; 0: none are */
    long cut;        /* bytes taken off, or put on, at the end */
    int flip;        /* a bit is changed */
    uint32_t mask;
    const char *says; /* NULL: it can be read */
  } cases[] = {
      {DEFLATE, BYTES, 0, 0, 0, NULL},
      {DEFLATE, BYTES, -7, 0, 0, NULL}, /* something behind the stream: libhdf5 takes no notice either */
      {DEFLATE, BYTES, 9, 0, 0, "inflate: damaged"},
      {DEFLATE, BYTES, 0, 1, 0, "inflate: damaged"},
      {DEFLATE, BYTES - 1, 0, 0, 0, "less data"},
      {DEFLATE, BYTES + 1, 0, 0, 0, "more data"},
      {DEFLATE, 2 * BYTES, 0, 0, 0, "more data"},
      {DEFLATE, 0, 0, 0, 0, "inflate: damaged"},
      {DEFLATE, 0, 0, 0, 1, NULL}, /* the mask says: not deflated */
      {DEFLATE, 0, 1, 0, 1, "another size"},
      {SHUFFLE | DEFLATE, BYTES - 4, 0, 0, 0, "less data"},
      {SHUFFLE | DEFLATE, 0, 0, 0, 3, NULL},
      {CHECKSUM, 0, BYTES - 3, 0, 0, "shorter than its checksum"},
      {CHECKSUM, 0, 0, 0, 0, "checksum does not agree"},
      {CHECKSUM, 0, 0, 0, 1, NULL},
      {DEFLATE | CHECKSUM, BYTES, 0, 0, 0, "checksum does not agree"},
      {DEFLATE | CHECKSUM, BYTES, 0, 0, 2, NULL},
      {CHECKSUM_FIRST | DEFLATE, BYTES, 0, 0, 0, "less data"},
  };
  (void)state;
  for (size_t i = 0; i < BYTES; i++) noise[i] = (unsigned char)(i * 7 + i / 3);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    h5_maker m = begin(path);
    size_t n = BYTES;
    H5Pset_chunk(m.props, 2, chunk);
    put_filters(m.props, cases[i].filters);
    put_matrix(&m, "embedding", H5T_IEEE_F32LE, N, DIM, N);
    for (uint32_t r = 0; r < TALL; r++)
      for (uint32_t j = 0; j < DIM; j++) {
        float v = value_at(3 * TALL + r, j);
        memcpy(plain + (r * DIM + j) * 4, &v, 4);
      }
    memcpy(plain + BYTES, noise, BYTES);
    memcpy(packed, plain, BYTES);
    if (cases[i].raw) n = libdeflate_zlib_compress(z, plain, cases[i].raw, packed, sizeof packed);
    assert_true(n > 0);
    if (cases[i].flip) packed[n / 2] ^= 16;
    n = (size_t)((long)n - cases[i].cut);
    hid_t d = H5Dopen2(m.file, "embedding", H5P_DEFAULT);
    assert_true(H5Dwrite_chunk(d, H5P_DEFAULT, cases[i].mask, at, n, packed) >= 0);
    H5Dclose(d);
    end(&m);
    if (cases[i].says) expect_damage(path, 3 * TALL, 4 * TALL, cases[i].says);
    else check_all_ways(path, &row_numbers, N, DIM);
    if (cases[i].says) expect_damage(path, 3 * TALL, 4 * TALL, "rows 30 to 39 of 'embedding'");
  }
  libdeflate_free_compressor(z);
}

/* Files that shrink behind an open reader: an error, no SIGBUS, no zeros taken for data. */
static void test_shrinking_files(void **state) {
  enum { N = 40000, DIM = 64 };
  const char *path[] = {in_dir("shrinks.h5"), in_dir("shrinks.f32")};
  hsize_t chunk[2] = {500, DIM};
  (void)state;
  for (int kind = 0; kind < 4; kind++) {
    const char *p = path[kind == 3];
    input_options opt = {.id_dataset = "none", .dim = DIM, .threads = 1 + kind % 2};
    vs_err err = {0};
    input_batch b = {.n = 1};
    vs_rc rc = VS_OK;
    uint64_t rows = 0;
    if (kind == 3) {
      float *v = calloc(N, DIM * sizeof *v);
      write_file(p, v, (size_t)N * DIM * sizeof *v);
      free(v);
    } else {
      h5_maker m = begin(p);
      if (kind) H5Pset_chunk(m.props, 2, chunk);
      if (kind == 2) H5Pset_deflate(m.props, 1);
      put_matrix(&m, "embedding", H5T_IEEE_F32LE, N, DIM, N);
      end(&m);
    }
    struct stat st;
    assert_int_equal(stat(p, &st), 0);
    input *in = open_ok(p, &opt);
    assert_int_equal(in->read(in, 1000, &b, &err), VS_OK);
    assert_int_equal(truncate(p, st.st_size / 2), 0);
    for (; !rc && b.n; rows += b.n) rc = in->read(in, 1000, &b, &err);
    assert_int_equal(rc, VS_CORRUPT);
    assert_true(rows < N * 3 / 4);
    if (!strstr(err.text, p) || !strstr(err.text, "it was cut while being read")) fail_msg("%s", err.text);
    input_close(in);
  }
}

/* libhdf5's shuffle is the definition: byte j of every element, then byte j + 1 of every element. */
static void test_unshuffle(void **state) {
  unsigned char in[1000], out[1000], want[1000];
  (void)state;
  for (size_t i = 0; i < sizeof in; i++) in[i] = (unsigned char)(i * 13 + i / 7);
  for (size_t width = 1; width < 20; width++)
    for (size_t n_bytes = 0; n_bytes < 300; n_bytes++) {
      size_t n = n_bytes / width;
      memcpy(want, in, n_bytes);
      for (size_t i = 0; i < n && n > 1; i++)
        for (size_t j = 0; j < width; j++) want[i * width + j] = in[j * n + i];
      memset(out, 0xee, sizeof out);
      input_h5_unshuffle(in, out, n_bytes, width);
      assert_memory_equal(out, want, n_bytes);
      assert_int_equal(out[n_bytes], 0xee);
    }
}

/* Every kind of number and length, NaN at every place, in place as well. */
static void test_numbers(void **state) {
  static const uint16_t halves[] = {0x3c00, 0xc000, 0x0001, 0x83ff, 0x7bff, 0x0400, 0x8000};
  static const float as_float[] = {1, -2, 0x1p-24f, -1023 * 0x1p-24f, 65504, 0x1p-14f, 0};
  (void)state;
  for (input_num kind = INPUT_F16; kind <= INPUT_F64_BE; kind++) {
    size_t width = input_num_bytes(kind);
    int swapped = kind % 2;
    for (size_t n = 0; n < 140; n++)
      for (size_t bad = 0; bad <= n; bad += n / 5 + 1) {
        unsigned char in[140 * 8];
        float out[141], want[140];
        for (size_t i = 0; i < n; i++) {
          float v = want[i] = width == 2 ? as_float[i % 7] : value_at(i, 3);
          double wide = v;
          unsigned char *p = in + i * width, *q = p + width - 1;
          if (i == bad) wide = width == 8 && n % 2 ? 1e300 : INFINITY, v = INFINITY;
          uint16_t h = i == bad ? 0xfc00 : halves[i % 7];
          memcpy(p, width == 2 ? (void *)&h : width == 4 ? (void *)&v : (void *)&wide, width);
          for (; swapped && p < q; p++, q--) {
            unsigned char t = *p;
            *p = *q, *q = t;
          }
        }
        out[n] = 77;
        unsigned flags = input_to_floats(kind, in, out, n);
        assert_int_equal(flags & ~(unsigned)INPUT_HAS_OVERFLOW,
                         bad < n && !(width == 8 && n % 2) ? INPUT_HAS_NAN : 0);
        assert_int_equal(!!flags, bad < n);
        for (size_t i = 0; i < n; i++)
          if (i != bad) assert_true(out[i] == want[i]);
        assert_true(out[n] == 77);
        assert_int_equal(input_check_floats(out, n), bad < n ? INPUT_HAS_NAN : 0);
      }
  }
}

/* ---- HDF5: many strings ---- */

static void id_text(char *out, int i) {
  int n = sprintf(out, "id-%d-", i);
  for (int k = 0; k < i % 23; k++) out[n++] = (char)('a' + k);
  out[n] = 0;
}

static void test_many_strings(void **state) {
  enum { N = 30000 };
  static char text[N][64];
  static const char *ptr[N];
  hid_t vlen = string_type(H5T_VARIABLE, H5T_STR_NULLTERM);
  hsize_t n = N, chunk = 700;
  char *huge = malloc(600000);
  (void)state;
  for (int i = 0; i < N; i++) id_text(text[i], i);
  memset(huge, 'h', 600000), huge[599999] = 0;
  /* 0 contiguous, 1 chunked, 2 compressed, 3 written back to front: then no collection follows the one before */
  for (int kind = 0; kind < 4; kind++)
    for (int threads = 1; threads < 3; threads++) {
      h5_maker m = begin(in_dir("strings.h5"));
      put_matrix(&m, "embedding", H5T_IEEE_F32LE, N, 2, N);
      for (int i = 0; i < N; i++) ptr[i] = i == 12345 ? huge : text[i];
      hid_t space = H5Screate_simple(1, &n, NULL), props = H5Pcreate(H5P_DATASET_CREATE);
      if (kind == 1 || kind == 2) H5Pset_chunk(props, 1, &chunk);
      if (kind == 2) put_filters(props, SHUFFLE | DEFLATE);
      hid_t d = H5Dcreate2(m.file, "id", vlen, space, H5P_DEFAULT, props, H5P_DEFAULT);
      if (kind < 3) {
        assert_true(H5Dwrite(d, vlen, H5S_ALL, H5S_ALL, H5P_DEFAULT, ptr) >= 0);
      } else {
        for (hsize_t at = N; at > 0; at -= 100) {
          hsize_t start = at - 100, count = 100;
          hid_t room = H5Screate_simple(1, &count, NULL);
          H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &count, NULL);
          assert_true(H5Dwrite(d, vlen, room, space, H5P_DEFAULT, ptr + start) >= 0);
          H5Sclose(room);
        }
      }
      H5Dclose(d), H5Sclose(space), H5Pclose(props);
      end(&m);
      input *in = open_ok(in_dir("strings.h5"), &(input_options){.threads = threads});
      vs_err err = {0};
      uint64_t row = 0;
      input_batch b = {.n = 1};
      for (; b.n; row += b.n) {
        assert_int_equal(in->read(in, 999, &b, &err), VS_OK);
        for (size_t i = 0; i < b.n; i++) expect_text(&b, i, ptr[row + i]);
      }
      assert_int_equal(row, N);
      input_close(in);
    }
  free(huge);
  H5Tclose(vlen);
}

/* A series with chunks that were never written: holes, in ids as in vectors. */
static void test_id_holes(void **state) {
  hid_t vlen = string_type(H5T_VARIABLE, H5T_STR_NULLTERM);
  hsize_t n = 50, chunk = 8, start = 16, count = 10;
  const char *text[10];
  (void)state;
  for (int i = 0; i < 10; i++) text[i] = "text";
  for (int kind = 0; kind < 4; kind++) {
    h5_maker m = begin(in_dir("id_holes.h5"));
    vs_err err = {0};
    input_batch b;
    int64_t number[10] = {0};
    put_matrix(&m, "embedding", H5T_IEEE_F32LE, 50, 2, 50);
    hid_t space = H5Screate_simple(1, &n, NULL), room = H5Screate_simple(1, &count, NULL);
    H5Pset_chunk(m.props, 1, &chunk);
    if (kind & 1) H5Pset_deflate(m.props, 1);
    hid_t d = H5Dcreate2(m.file, "id", kind & 2 ? vlen : H5T_STD_I16LE, space, H5P_DEFAULT, m.props, H5P_DEFAULT);
    H5Sselect_hyperslab(space, H5S_SELECT_SET, &start, NULL, &count, NULL);
    assert_true(H5Dwrite(d, kind & 2 ? vlen : H5T_NATIVE_INT64, room, space, H5P_DEFAULT,
                         kind & 2 ? (void *)text : (void *)number) >= 0);
    H5Dclose(d), H5Sclose(space), H5Sclose(room);
    end(&m);
    input *in = open_ok(in_dir("id_holes.h5"), NULL);
    assert_int_equal(in->read(in, 100, &b, &err), VS_OK);
    assert_int_equal(b.n, 50);
    for (size_t i = 0; i < b.n; i++) {
      assert_int_equal(b.faults[i], i < 16 || i >= 32 ? INPUT_HOLE : INPUT_FINE);
      assert_true(b.vectors[2 * i] == (i < 16 || i >= 32 ? 0 : value_at(i, 0)));
    }
    input_close(in);
  }
  H5Tclose(vlen);
}

/* ---- reading ahead ---- */

/* An input of one number per row, the row's own, whose loads can be watched, held up and made to fail. */
typedef struct fake_input {
  input_ahead ahead; /* first */
  int loads, n_loaded; /* atomic */
  int hold;            /* atomic: loads wait while it is set, unless they are cancelled */
  int cancelled;       /* atomic */
  uint64_t fail_at;    /* this row cannot be loaded */
  size_t last_want;
  pthread_t main;
  int on_main;
} fake_input;

static void fake_sleep(void) {
  struct timespec ms = {0, 1000000};
  nanosleep(&ms, NULL);
}

static vs_rc fake_load(input_ahead *a, input_window *w, uint64_t row, size_t want, vs_err *err) {
  fake_input *f = (fake_input *)a;
  __atomic_fetch_add(&f->loads, 1, __ATOMIC_SEQ_CST);
  f->last_want = want;
  if (pthread_equal(pthread_self(), f->main)) f->on_main++;
  while (__atomic_load_n(&f->hold, __ATOMIC_SEQ_CST)) {
    if (__atomic_load_n(&a->cancel, __ATOMIC_RELAXED)) {
      __atomic_fetch_add(&f->cancelled, 1, __ATOMIC_SEQ_CST);
      return vs_fail(err, VS_INTERRUPT, "cancelled");
    }
    fake_sleep();
  }
  if (row == f->fail_at) return vs_fail(err, VS_CORRUPT, "row %llu is damaged", (unsigned long long)row);
  if (row < f->fail_at && f->fail_at - row < want) want = (size_t)(f->fail_at - row);
  if (input_rows_reserve(&w->rows, want, 1, 4, 0, err)) return VS_NOMEM;
  for (size_t i = 0; i < want; i++) {
    w->rows.vectors[i] = (float)(row + i);
    w->rows.faults[i] = INPUT_FINE;
  }
  w->row = row, w->n = want;
  __atomic_fetch_add(&f->n_loaded, (int)want, __ATOMIC_SEQ_CST);
  return VS_OK;
}

static void fake_destroy(input_ahead *a) { free(a); }

static fake_input *make_fake(uint64_t n, size_t window, int threads) {
  fake_input *f = calloc(1, sizeof *f);
  assert_non_null(f);
  f->fail_at = UINT64_MAX;
  f->main = pthread_self();
  f->ahead.base.path = "fake";
  f->ahead.base.n_rows = n;
  f->ahead.base.dim = 1;
  f->ahead.load = fake_load;
  f->ahead.destroy = fake_destroy;
  f->ahead.window_max = window;
  f->ahead.threads = threads;
  input_ahead_init(&f->ahead);
  return f;
}

static vs_rc fake_next(fake_input *f, size_t max, uint64_t *row, vs_err *err) {
  input *in = &f->ahead.base;
  input_batch b;
  vs_rc rc = in->read(in, max, &b, err);
  if (rc) return rc;
  for (size_t i = 0; i < b.n; i++) assert_true(b.vectors[i] == (float)(*row + i));
  *row += b.n;
  return VS_OK;
}

static void test_ahead_order(void **state) {
  vs_err err = {0};
  unsigned seed = 5;
  (void)state;
  for (int threads = 1; threads < 4; threads++) {
    size_t batches[] = {1, 3, 10, 64, 1000};
    for (size_t i = 0; i < 5; i++) {
      fake_input *f = make_fake(1000, 64, threads);
      uint64_t row = 0;
      while (row < 1000) assert_int_equal(fake_next(f, batches[i], &row, &err), VS_OK);
      assert_int_equal(f->n_loaded, 1000); /* each row once */
      if (threads == 1) assert_int_equal(f->on_main, f->loads);
      else assert_true(f->on_main <= 2 && f->loads > 2);
      assert_true(threads == 1 || f->last_want <= 64);
      assert_int_equal(f->ahead.base.loaded_end, 1000);
      input_close(&f->ahead.base);
    }
    fake_input *f = make_fake(1000, 64, threads);
    for (int i = 0; i < 2000; i++) { /* jumps, and runs of rows */
      uint64_t row = (uint64_t)rand_r(&seed) % 1000;
      assert_int_equal(f->ahead.base.seek(&f->ahead.base, row, &err), VS_OK);
      for (int k = rand_r(&seed) % 6; k >= 0 && row < 1000; k--)
        assert_int_equal(fake_next(f, 1 + (size_t)rand_r(&seed) % 40, &row, &err), VS_OK);
    }
    input_close(&f->ahead.base);
  }
}

/* Who jumps about loads what he asks for, and nothing ahead. */
static void test_ahead_of_jumps(void **state) {
  vs_err err = {0};
  fake_input *f = make_fake(100000, 64, 4);
  (void)state;
  for (uint64_t at = 0; at < 100000; at += 100) {
    uint64_t row = at;
    assert_int_equal(f->ahead.base.seek(&f->ahead.base, at, &err), VS_OK);
    assert_int_equal(fake_next(f, 16, &row, &err), VS_OK);
  }
  assert_int_equal(f->n_loaded, 1000 * 16);
  assert_int_equal(f->on_main, f->loads);
  input_close(&f->ahead.base);
}

static void test_ahead_errors(void **state) {
  (void)state;
  for (int threads = 1; threads < 4; threads++)
    for (uint64_t bad = 0; bad < 300; bad += 37)
      for (size_t batch = 1; batch < 100; batch += 19) {
        fake_input *f = make_fake(300, 32, threads);
        uint64_t row = 0;
        vs_err err = {0};
        vs_rc rc = VS_OK;
        f->fail_at = bad;
        while (!rc) rc = fake_next(f, batch, &row, &err);
        assert_int_equal(rc, VS_CORRUPT);
        assert_int_equal(row, bad);
        assert_non_null(strstr(err.text, "is damaged"));
        f->fail_at = UINT64_MAX; /* it is not remembered beyond the answer */
        vs_err_reset(&err);
        while (row < 300) assert_int_equal(fake_next(f, batch, &row, &err), VS_OK);
        input_close(&f->ahead.base);
      }
}

/* Reads two windows, so that the reader is at work on the third, held up there. */
static fake_input *busy_fake(uint64_t *row) {
  fake_input *f = make_fake(1000, 10, 2);
  vs_err err = {0};
  assert_int_equal(fake_next(f, 10, row, &err), VS_OK);
  assert_int_equal(fake_next(f, 10, row, &err), VS_OK);
  while (__atomic_load_n(&f->n_loaded, __ATOMIC_SEQ_CST) < 30) fake_sleep();
  __atomic_store_n(&f->hold, 1, __ATOMIC_SEQ_CST);
  assert_int_equal(fake_next(f, 10, row, &err), VS_OK); /* the third; the fourth is held up */
  while (__atomic_load_n(&f->loads, __ATOMIC_SEQ_CST) < 4) fake_sleep();
  return f;
}

static int stop_now(void *ctx) { return *(int *)ctx; }

static void test_ahead_stop(void **state) {
  int asked = 1;
  vs_scope scope = {.stop = stop_now, .stop_ctx = &asked}, *before = vs_scope_enter(&scope);
  vs_err err = {0};
  uint64_t row = 0;
  (void)state;
  fake_input *f = busy_fake(&row);
  assert_int_equal(fake_next(f, 10, &row, &err), VS_INTERRUPT);
  asked = 0;
  vs_err_reset(&err);
  __atomic_store_n(&f->hold, 0, __ATOMIC_SEQ_CST);
  while (row < 1000) assert_int_equal(fake_next(f, 10, &row, &err), VS_OK);
  assert_int_equal(f->n_loaded, 1000);
  input_close(&f->ahead.base);
  vs_scope_enter(before);
}

static void *let_go_when_cancelled(void *ctx) {
  fake_input *f = ctx;
  while (!__atomic_load_n(&f->cancelled, __ATOMIC_SEQ_CST)) fake_sleep();
  __atomic_store_n(&f->hold, 0, __ATOMIC_SEQ_CST);
  return NULL;
}

/* A load that is not wanted any more is told so: by a jump, by closing. */
static void test_ahead_cancel(void **state) {
  vs_err err = {0};
  uint64_t row = 0;
  (void)state;
  fake_input *f = busy_fake(&row);
  assert_int_equal(f->ahead.base.seek(&f->ahead.base, 5, &err), VS_OK);
  row = 5;
  /* The load of row 5 would be held up as well: it is let go once the other was cancelled. */
  pthread_t helper;
  assert_int_equal(pthread_create(&helper, NULL, let_go_when_cancelled, f), 0);
  assert_int_equal(fake_next(f, 10, &row, &err), VS_OK);
  pthread_join(helper, NULL);
  while (row < 1000) assert_int_equal(fake_next(f, 10, &row, &err), VS_OK);
  input_close(&f->ahead.base);
  row = 0;
  f = busy_fake(&row);
  input_close(&f->ahead.base); /* hangs if the load is not cancelled */
}

/* What a forked child does with an open input; its exit status. */
static int in_child(int (*use)(void *), void *ctx) {
  int status = 0;
  pid_t pid = fork();
  assert_true(pid >= 0);
  if (!pid) {
    alarm(60);
    _exit(use(ctx));
  }
  assert_int_equal(waitpid(pid, &status, 0), pid);
  assert_true(WIFEXITED(status));
  return WEXITSTATUS(status);
}

static int child_is_refused(void *ctx) {
  fake_input *f = ctx;
  input_batch b;
  vs_err err = {0};
  f->ahead.pos = 500;
  vs_rc rc = f->ahead.base.read(&f->ahead.base, 10, &b, &err);
  input_close(&f->ahead.base);
  return rc == VS_IO && strstr(err.text, "forked") ? 0 : 1;
}

static int child_reads_on(void *ctx) {
  input *in = ctx;
  input_batch b = {.n = 1};
  vs_err err = {0};
  uint64_t row = in->n_rows / 2;
  if (in->seek(in, row, &err)) return 1;
  for (; b.n; row += b.n) {
    if (in->read(in, 64, &b, &err)) return 2;
    for (size_t i = 0; i < b.n; i++)
      if (b.vectors[i * in->dim] != value_at(row + i, 0)) return 3;
  }
  if (row != in->n_rows) return 4;
  input_close(in);
  return 0;
}

static void test_fork(void **state) {
#if defined(__SANITIZE_THREAD__)
  (void)state; /* the thread sanitizer ends a forked child that makes threads */
  skip();
#endif
  vs_err err = {0};
  uint64_t row = 0;
  input_batch b;
  hsize_t chunk[2] = {64, 8};
  const char *path = in_dir("fork.h5");
  (void)state;
  fake_input *f = busy_fake(&row);
  assert_int_equal(in_child(child_is_refused, f), 0);
  __atomic_store_n(&f->hold, 0, __ATOMIC_SEQ_CST);
  while (row < 1000) assert_int_equal(fake_next(f, 10, &row, &err), VS_OK);
  input_close(&f->ahead.base);

  h5_maker m = begin(path);
  H5Pset_chunk(m.props, 2, chunk);
  H5Pset_deflate(m.props, 1);
  put_matrix(&m, "embedding", H5T_IEEE_F32LE, 4000, 8, 4000);
  end(&m);
  input *in = open_ok(path, &(input_options){.id_dataset = "none", .threads = 2});
  for (int i = 0; i < 5; i++) assert_int_equal(in->read(in, 64, &b, &err), VS_OK);
  struct timespec settle = {0, 100000000};
  nanosleep(&settle, NULL); /* the reader has loaded and rests */
  assert_int_equal(in_child(child_reads_on, in), 0);
  check_rows(in, 0, 100);
  input_close(in);
}

/* ---- several files ---- */

/* What input_concat.c takes from the tool. */
int tool_stop(void *ctx) {
  (void)ctx;
  return 0;
}
void *tool_alloc(size_t n, size_t size) {
  void *p = calloc(n + 1, size);
  assert_non_null(p);
  return p;
}
char *tool_format(const char *fmt, ...) {
  char *text = NULL;
  va_list ap;
  va_start(ap, fmt);
  assert_true(vasprintf(&text, fmt, ap) >= 0);
  va_end(ap);
  return text;
}

static void put_part(const char *path, uint64_t first, hsize_t n) {
  h5_maker m = begin(path);
  hsize_t shape[2] = {n, 4}, chunk[2] = {n < 16 ? n : 16, 4};
  float *v = malloc(n * 16 + 1);
  for (hsize_t i = 0; i < n; i++)
    for (uint32_t j = 0; j < 4; j++) v[i * 4 + j] = value_at(first + i, j);
  hid_t space = H5Screate_simple(2, shape, NULL);
  H5Pset_chunk(m.props, 2, chunk);
  H5Pset_deflate(m.props, 1);
  hid_t d = H5Dcreate2(m.file, "embedding", H5T_IEEE_F32LE, space, H5P_DEFAULT, m.props, H5P_DEFAULT);
  assert_true(H5Dwrite(d, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, v) >= 0);
  H5Dclose(d), H5Sclose(space);
  free(v);
  end(&m);
}

static void test_several_files(void **state) {
  enum { PARTS = 5 };
  static const hsize_t rows[PARTS] = {100, 1, 33, 500, 16};
  char *paths[PARTS], where[400];
  uint64_t total = 0;
  vs_err err = {0};
  input *in;
  input_batch b = {.n = 1};
  (void)state;
  for (int i = 0; i < PARTS; i++) {
    char name[20];
    sprintf(name, "part%d.h5", i);
    paths[i] = strdup(in_dir(name));
    put_part(paths[i], total, rows[i]);
    total += rows[i];
  }
  for (int threads = 1; threads < 4; threads++) {
    input_options opt = {.id_dataset = "none", .threads = threads};
    assert_int_equal(input_concat_open(paths, PARTS, &opt, NULL, &in, &err), VS_OK);
    assert_int_equal(in->n_rows, total);
    whole_batches = 0;
    for (size_t batch = 1; batch < 200; batch += 31) check_rows(in, 0, batch);
    for (uint64_t row = 0; row < total; row += 13) { /* stretches, as a sample takes them */
      assert_int_equal(in->seek(in, row, &err), VS_OK);
      assert_int_equal(in->read(in, 7, &b, &err), VS_OK);
      assert_true(b.n > 0 && b.first_row == row && b.vectors[0] == value_at(row, 0));
    }
    check_rows(in, 120, 50);
    input_concat_describe(in, 140, where, sizeof where);
    assert_non_null(strstr(where, "part3.h5: row 6"));
    /* A part that is gone when its turn comes: an error there and not before. */
    assert_int_equal(in->seek(in, 0, &err), VS_OK);
    assert_int_equal(rename(paths[2], in_dir("away")), 0);
    uint64_t row = 0;
    vs_rc rc = VS_OK;
    for (b.n = 1; !rc && b.n; row += b.n) rc = in->read(in, 20, &b, &err);
    assert_int_equal(rc, VS_NOTFOUND);
    assert_int_equal(row, 101);
    assert_non_null(strstr(err.text, "part2.h5"));
    vs_err_reset(&err);
    /* Another one in its place. */
    put_part(paths[2], 101, 34);
    assert_int_equal(in->read(in, 20, &b, &err), VS_IO);
    assert_non_null(strstr(err.text, "changed while it was read"));
    vs_err_reset(&err);
    assert_int_equal(rename(in_dir("away"), paths[2]), 0);
    check_rows(in, 90, 20);
    whole_batches = 1;
    input_close(in);
  }
  for (int i = 0; i < PARTS; i++) free(paths[i]);
}

/* ---- other formats ---- */

static void put_npy(const char *path, const char *dict, const void *data, size_t n) {
  unsigned char head[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(strlen(dict)), 0};
  FILE *f = fopen(path, "wb");
  assert_non_null(f);
  fwrite(head, 1, sizeof head, f);
  fwrite(dict, 1, strlen(dict), f);
  fwrite(data, 1, n, f);
  fclose(f);
}

static void test_npy(void **state) {
  const char *path = in_dir("a.npy");
  float v[6];
  double wide[6];
  uint16_t half[5] = {0x3c00, 0x0001, 0xfbff, 0x83ff, 0x7c00}; /* 1, smallest, -65504, a negative subnormal, Inf */
  unsigned char swapped[24];
  vs_err err = {0};
  input_batch b;
  input *in;
  (void)state;
  for (uint32_t i = 0; i < 6; i++) v[i] = value_at(i / 3, i % 3), wide[i] = v[i];
  for (size_t i = 0; i < 24; i++) swapped[i] = ((unsigned char *)v)[i / 4 * 4 + 3 - i % 4];
  put_npy(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }   \n", v, 24);
  check_all_ways(path, NULL, 2, 3);
  put_npy(path, "{\"shape\":(2,3),\"fortran_order\":False,\"descr\":\">f4\"}", swapped, 24);
  check_all_ways(path, NULL, 2, 3);
  put_npy(path, "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3)}", wide, 48);
  check_all_ways(path, NULL, 2, 3);
  put_npy(path, "{'descr': '<f2', 'fortran_order': False, 'shape': (5, 1)}", half, 10);
  in = open_ok(path, NULL);
  assert_int_equal(in->read(in, 9, &b, &err), VS_OK);
  assert_true(b.vectors[0] == 1 && b.vectors[1] == 0x1p-24f && b.vectors[2] == -65504 &&
              b.vectors[3] == -1023 * 0x1p-24f);
  assert_int_equal(b.faults[4], INPUT_NAN);
  input_close(in);
  put_npy(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3)}", v, 0);
  in = open_ok(path, NULL);
  assert_int_equal(in->n_rows, 0);
  input_close(in);
  put_npy(path, "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3)}", v, 24);
  refused(path, NULL, "Fortran order");
  put_npy(path, "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3)}", v, 24);
  refused(path, NULL, "astype('float32')");
  put_npy(path, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,)}", v, 24);
  refused(path, NULL, "structured");
  put_npy(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (6,)}", v, 24);
  refused(path, NULL, "2-D");
  put_npy(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}", v, 20);
  refused(path, NULL, "was cut");
  put_npy(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 3)}", v, 24);
  refused(path, NULL, "header");
  put_npy(path, "{'descr': '<f4', 'fortran_order': False, 'shape': (6148914691236517206, 3)}", v, 24);
  refused(path, NULL, "claims");
  put_npy(path, "{'descr': '<f4', 'shape': (2, 3), 'shape': (2, 3)}", v, 24);
  refused(path, NULL, "header");
  put_npy(path, "__import__('os')", v, 24);
  refused(path, NULL, "header");
  write_file(path, "\x93NUMPY\x01\x00\xff\xff", 10);
  refused(path, NULL, "header");
  write_file(path, "nothing", 7);
  refused(path, NULL, "not a .npy file");
}

static void test_raw(void **state) {
  enum { N = 50, DIM = 7 };
  float rows[N][1 + DIM];
  int32_t dim = DIM;
  (void)state;
  for (uint32_t i = 0; i < N; i++) {
    memcpy(&rows[i][0], &dim, 4);
    for (uint32_t j = 0; j < DIM; j++) rows[i][1 + j] = value_at(i, j);
  }
  write_file(in_dir("a.fvecs"), rows, sizeof rows);
  check_all_ways(in_dir("a.fvecs"), NULL, N, DIM);
  refused(in_dir("a.fvecs"), &(input_options){.dim = 8}, "dimension 7, not 8");
  refused(in_dir("a.fvecs"), &(input_options){.id_dataset = "x"}, "only be given for HDF5");
  write_file(in_dir("a.fvecs"), rows, sizeof rows - 4);
  refused(in_dir("a.fvecs"), NULL, "whole number of rows");
  dim = 6;
  memcpy(&rows[20][0], &dim, 4);
  write_file(in_dir("a.fvecs"), rows, sizeof rows);
  refused(in_dir("a.fvecs"), NULL, "row 20 says 6 dimensions");
  dim = -1;
  memcpy(&rows[0][0], &dim, 4);
  write_file(in_dir("a.fvecs"), rows, sizeof rows);
  refused(in_dir("a.fvecs"), NULL, "row 0 says -1");
  write_file(in_dir("a.fvecs"), "", 0);
  refused(in_dir("a.fvecs"), NULL, "empty");
  {
    float v[12];
    input *in;
    for (uint32_t i = 0; i < 12; i++) v[i] = value_at(i / 4, i % 4);
    write_file(in_dir("a.f32"), v, sizeof v);
    check_all_ways(in_dir("a.f32"), &(input_options){.dim = 4}, 3, 4);
    refused(in_dir("a.f32"), NULL, "--dim");
    refused(in_dir("a.f32"), &(input_options){.dim = 5}, "whole number of rows");
    write_file(in_dir("a.f32"), "", 0);
    in = open_ok(in_dir("a.f32"), &(input_options){.dim = 4});
    assert_int_equal(in->n_rows, 0);
    input_close(in);
  }
}

static void test_not_vectors(void **state) {
  (void)state;
  write_file(in_dir("lfs.h5"), "version https://git-lfs.github.com/spec/v1\n", 43);
  refused(in_dir("lfs.h5"), NULL, "git-lfs");
  write_file(in_dir("text.h5"), "hello", 5);
  refused(in_dir("text.h5"), NULL, "not an HDF5 file");
  write_file(in_dir("empty.h5"), "", 0);
  refused(in_dir("empty.h5"), NULL, "empty");
  write_file(in_dir("what.bin"), "hello", 5);
  refused(in_dir("what.bin"), NULL, "unknown format");
  assert_int_equal(mkdir(in_dir("folder.h5"), 0700), 0);
  refused(in_dir("folder.h5"), NULL, "is a directory");
  assert_int_equal(mkfifo(in_dir("fifo.h5"), 0600), 0);
  refused(in_dir("fifo.h5"), NULL, "not a regular file");
  refused(in_dir("missing.h5"), NULL, "No such file");
}

/* ---- damage ---- */

static const H5I_type_t h5_kinds[] = {H5I_FILE, H5I_GROUP, H5I_DATASET, H5I_DATASPACE, H5I_ATTR};
static hsize_t handles_of(H5I_type_t kind) {
  hsize_t n = 0;
  H5Inmembers(kind, &n);
  return n;
}

/* Reads whatever there is; only a crash, a sanitizer's report or a wrong bound fails. */
static int read_all(const char *path, const input_options *opt) {
  vs_err err = {0};
  input_batch b = {.n = 1};
  input *in;
  vs_rc rc = input_open(path, opt, &in, &err);
  float sum = 0;
  for (int i = 0; !rc && b.n && i < 1000; i++) {
    rc = in->read(in, 64, &b, &err);
    for (size_t k = 0; !rc && k < b.n * in->dim; k++) sum += b.vectors[k];
    for (size_t k = 0; !rc && k < b.n; k++)
      if (b.ids[k].type == INPUT_TEXT && b.ids[k].len) sum += b.ids[k].text[b.ids[k].len - 1];
  }
  input_close(in);
  if (rc) assert_true(err.rc == rc && *err.text);
  /* Nothing of libhdf5's is left behind, on error paths either. */
  for (size_t t = 0; t < sizeof h5_kinds / sizeof *h5_kinds; t++)
    if (handles_of(h5_kinds[t])) fail_msg("a handle of kind %d leaked: %s", (int)h5_kinds[t], err.text);
  return rc == VS_OK && !isnan(sum);
}

/* 0: deflate, contiguous text ids; 1: the newest format, all filters, chunked integer ids; 2: no filters, chunked text ids. */
static void put_small(const char *path, int kind) {
  const char *text[20];
  int64_t number[20];
  hid_t vlen = string_type(H5T_VARIABLE, H5T_STR_NULLTERM), props = H5Pcreate(H5P_DATASET_CREATE);
  hsize_t chunk[2] = {8, 4}, n = 20;
  h5_maker m = kind == 1 ? begin_latest(path) : begin(path);
  for (int i = 0; i < 20; i++) text[i] = "some id", number[i] = i * 1000;
  H5Pset_chunk(m.props, 2, chunk);
  put_filters(m.props, kind == 0 ? DEFLATE : kind == 1 ? SHUFFLE | DEFLATE | CHECKSUM : 0);
  put_matrix(&m, "embedding", kind == 2 ? H5T_IEEE_F64LE : H5T_IEEE_F32LE, 20, 8, 20);
  if (kind) H5Pset_chunk(props, 1, chunk);
  if (kind == 1) H5Pset_deflate(props, 1);
  hid_t space = H5Screate_simple(1, &n, NULL);
  hid_t d = H5Dcreate2(m.file, "id", kind == 1 ? H5T_STD_I32LE : vlen, space, H5P_DEFAULT, props, H5P_DEFAULT);
  assert_true(H5Dwrite(d, kind == 1 ? H5T_NATIVE_INT64 : vlen, H5S_ALL, H5S_ALL, H5P_DEFAULT,
                       kind == 1 ? (void *)number : (void *)text) >= 0);
  H5Dclose(d), H5Sclose(space), H5Pclose(props), H5Tclose(vlen);
  end(&m);
}

static void test_damage(void **state) {
  const char *path = in_dir("good.h5"), *hurt = in_dir("hurt.h5");
  (void)state;
  for (int kind = 0; kind < 3; kind++) {
    unsigned char *bytes;
    long n, accepted = 0, tried = 0;
    FILE *f;
    put_small(path, kind);
    assert_true(read_all(path, NULL));
    f = fopen(path, "rb");
    assert_non_null(f);
    fseek(f, 0, SEEK_END);
    n = ftell(f);
    rewind(f);
    bytes = malloc((size_t)n);
    assert_int_equal(fread(bytes, 1, (size_t)n, f), n);
    fclose(f);
    for (long at = 0; at < n; at++) {
      unsigned char old = bytes[at];
      /* Runs of zeros are unused space; the pattern changes with the place, so that all bits get their turn. */
      if (at > 8 && !old && !bytes[at - 1] && at % 17) continue;
      bytes[at] ^= (unsigned char)(1u << at % 8 | (at % 3 ? 0 : 0x80));
      write_file(hurt, bytes, (size_t)n);
      accepted += read_all(hurt, NULL);
      tried++;
      bytes[at] = old;
    }
    for (long cut = 0; cut < n; cut += 97) {
      write_file(hurt, bytes, (size_t)cut);
      assert_false(read_all(hurt, NULL));
    }
    print_message("%ld damaged files, %ld of them still readable\n", tried, accepted);
    free(bytes);
  }
}

static void test_text_helpers(void **state) {
  char out[INPUT_SHOW];
  (void)state;
  assert_true(input_utf8_ok("\xf0\x9f\xa7\xac", 4));
  assert_false(input_utf8_ok("\xf0\x9f\xa7", 3));
  assert_false(input_utf8_ok("\xc0\x80", 2));
  assert_false(input_utf8_ok("\xf4\x90\x80\x80", 4));
  assert_false(input_utf8_ok("a\0b", 3));
  assert_true(input_utf8_ok("", 0));
  assert_string_equal(input_show(out, "a\nb\xff\xc3\xa9", 6), "a?b?\xc3\xa9");
  for (int f = INPUT_FINE; f <= INPUT_HOLE; f++)
    assert_string_not_equal(input_fault_text((input_fault)f), "unknown fault");
}

static int make_dir(void **state) {
  (void)state;
  snprintf(dir, sizeof dir, "%s/vs_input_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
  return mkdtemp(dir) ? 0 : -1;
}
static int remove_dir(void **state) {
  char command[300];
  (void)state;
  snprintf(command, sizeof command, "rm -rf '%s'", dir);
  return system(command);
}

int main(void) {
  input_skip_exit_cleanup();
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_text_helpers), cmocka_unit_test(test_storage_kinds),
      cmocka_unit_test(test_tall_chunks),  cmocka_unit_test(test_values_that_do_not_fit),
      cmocka_unit_test(test_holes),        cmocka_unit_test(test_holes_beside),
      cmocka_unit_test(test_claims),
      cmocka_unit_test(test_integer_ids),  cmocka_unit_test(test_string_ids),
      cmocka_unit_test(test_long_ids),     cmocka_unit_test(test_id_choices),
      cmocka_unit_test(test_columns),     cmocka_unit_test(test_batches_across_windows),
           cmocka_unit_test(test_links),
      cmocka_unit_test(test_other_files),  cmocka_unit_test(test_named),
      cmocka_unit_test(test_named_storage),
      cmocka_unit_test(test_filters),      cmocka_unit_test(test_chunks_are_decoded_once),
      cmocka_unit_test(test_tall_bands),   cmocka_unit_test(test_damaged_chunks),
      cmocka_unit_test(test_shrinking_files), cmocka_unit_test(test_unshuffle),
      cmocka_unit_test(test_numbers),      cmocka_unit_test(test_many_strings),
      cmocka_unit_test(test_id_holes),     cmocka_unit_test(test_ahead_order),
      cmocka_unit_test(test_ahead_of_jumps), cmocka_unit_test(test_ahead_errors),
      cmocka_unit_test(test_ahead_stop),   cmocka_unit_test(test_ahead_cancel),
      cmocka_unit_test(test_fork),         cmocka_unit_test(test_several_files),
      cmocka_unit_test(test_npy),          cmocka_unit_test(test_raw),
      cmocka_unit_test(test_not_vectors),  cmocka_unit_test(test_damage),
  };
  return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
