/* input_int.h - what the files of ext/input share; nobody outside includes it. Sections by implementing file. The part
 * that needs libhdf5's headers is input_hdf5_int.h. */
#ifndef INPUT_INT_H
#define INPUT_INT_H
#include "input.h"

/* ---- input.c: limits, buffers, checks ---- */

/* Above any embedding model we know of (the largest have 12,288); it bounds what one row may allocate. */
#define INPUT_DIM_MAX 16384u
/* A file may claim any number of rows; this keeps every product of rows, dimension and element size far below 2^64. */
#define INPUT_ROWS_MAX ((uint64_t)1 << 40)
/* One window of decoded rows: large enough that a read is sequential disk work, small beside any --memory. */
#define INPUT_WINDOW_BYTES ((size_t)16 << 20)
/* Rows of a window, whatever the dimension: bounds ids and columns where vectors are tiny. */
#define INPUT_WINDOW_ROWS ((size_t)65536)

/* The arrays behind an input_batch. elem_bytes is the room per vector component (4; 8 where doubles are narrowed in
 * place); everything is kept between reads. */
typedef struct input_rows {
  float *vectors;
  input_value *ids, *columns;
  uint8_t *faults;
  size_t cap; /* rows there is room for */
} input_rows;
vs_rc input_rows_reserve(input_rows *r, size_t n, uint32_t dim, size_t elem_bytes, size_t n_columns,
                         vs_err *err) VS_WARN_UNUSED;
void input_rows_free(input_rows *r);

/* Valid UTF-8 without NUL, overlong forms and surrogates. */
int input_utf8_ok(const char *s, size_t n);

/* Text from a file, made fit for an error message: unprintable and non-UTF-8 bytes become '?', long text is cut. */
enum { INPUT_SHOW = 96 };
const char *input_show(char out[INPUT_SHOW], const char *text, size_t n);

/* INPUT_NAN when a component is not finite; the row is then zeroed, so that no caller computes with it by mistake. */
input_fault input_check_row(float *row, uint32_t dim);
/* Narrowing of n doubles; INPUT_NAN or INPUT_OVERFLOW (then out is zeroed). out may be the place of in. */
input_fault input_narrow_row(const void *in, float *out, uint32_t n);
/* IEEE half to float. in may be the upper half of out's own memory: it goes front to back through a small block. Kept
 * here and not taken from ext/kernels, so that vecshard_hdf5.so needs no kernel files. */
void input_widen_half(const void *in, float *out, size_t n);

/* pread until n bytes are there; a shorter file is an error that names it. */
vs_rc input_pread(int fd, const char *path, void *buf, size_t n, uint64_t off, vs_err *err) VS_WARN_UNUSED;

/* ---- one opener per format; fd is theirs from the call on ---- */
vs_rc input_npy_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out,
                     vs_err *err) VS_WARN_UNUSED;
vs_rc input_fvecs_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out,
                       vs_err *err) VS_WARN_UNUSED;
vs_rc input_f32_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out,
                     vs_err *err) VS_WARN_UNUSED;
/* shape_only: skip what only reading needs (the look through unsigned ids). */
vs_rc input_hdf5_open(const char *path, uint64_t n_bytes, const input_options *opt, int shape_only, input **out,
                      vs_err *err) VS_WARN_UNUSED;

/* ---- input_raw.c: rows of equal length in a plain file, behind .npy, .fvecs and .f32 ---- */
typedef struct input_raw_layout {
  uint64_t data_off; /* of row 0 */
  uint64_t n_rows;
  uint32_t dim;
  uint32_t elem_bytes; /* 2, 4 or 8: IEEE half, single, double */
  uint32_t lead_bytes; /* before each row's numbers: 4 in .fvecs, holding dim; else 0 */
  int big_endian;
} input_raw_layout;
vs_rc input_raw_open(const char *path, int fd, const input_raw_layout *layout, input **out,
                     vs_err *err) VS_WARN_UNUSED;

#endif
