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

/* The arrays behind an input_batch, kept between reads. elem_bytes is the room per vector component: 4, or 8 where libhdf5
 * leaves doubles that are narrowed in place. */
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

/* pread until n bytes are there; a shorter file is an error that names it. */
vs_rc input_pread(int fd, const char *path, void *buf, size_t n, uint64_t off, vs_err *err) VS_WARN_UNUSED;

/* ---- input_floats.c: numbers as files hold them to floats. Kept here and not taken from ext/kernels, so that
 * vecshard_hdf5.so needs no kernel files. ---- */

typedef enum input_num { INPUT_F16, INPUT_F16_BE, INPUT_F32, INPUT_F32_BE, INPUT_F64, INPUT_F64_BE } input_num;
size_t input_num_bytes(input_num kind);
/* Bits: what a row's numbers are, and whether they exist. */
enum { INPUT_HAS_NAN = 1, INPUT_HAS_OVERFLOW = 2, INPUT_HAS_HOLE = 4 };
/* n numbers to floats; returns INPUT_HAS_NAN and INPUT_HAS_OVERFLOW bits. out may lie on in where going from front to back
 * never writes what is yet to be read: the same place, or halves in the upper half of out's own memory. */
unsigned input_to_floats(input_num kind, const void *in, float *out, size_t n);
unsigned input_check_floats(const float *row, size_t n);
/* Bits to faults, in place; rows with a fault are zeroed, so that no caller computes with them by mistake. */
void input_judge_rows(float *rows, uint32_t dim, uint8_t *flags, size_t n);

/* ---- input_region.c: rows of equal length in one piece of a file ---- */

typedef struct input_region {
  int fd;
  const char *path;
  uint64_t off;        /* of row 0 */
  uint32_t dim;
  uint32_t lead_bytes; /* before each row's numbers: 4 in .fvecs, holding dim; else 0 */
  input_num num;
  int threads;
} input_region;
/* Rows [row, row + *n) to out and their bits to flags. On failure *n says how many rows from `row` on are good. */
vs_rc input_region_read(const input_region *r, uint64_t row, size_t *n, float *out, uint8_t *flags, vs_err *err) VS_WARN_UNUSED;

/* ---- input_ahead.c: an input as windows of rows, of which the next is loaded ahead ---- */

typedef struct input_window {
  uint64_t row; /* the first one in it */
  size_t n;     /* 0: holds nothing */
  input_rows rows;
  void *own;    /* the loader's: what texts of ids and columns lie in */
} input_window;

typedef struct input_ahead input_ahead;
struct input_ahead {
  input base; /* first: the caller's pointer is to this */

  /* Set by the format before input_ahead_init. */
  /* Fills w with rows that include `row`, and if it can be the `want` rows from there on. A failure beyond `row` is none yet:
   * w ends before it. One load at a time, on the reader's thread or the caller's. */
  vs_rc (*load)(input_ahead *, input_window *w, uint64_t row, size_t want, vs_err *);
  void (*free_own)(void *own);
  void (*destroy)(input_ahead *); /* all of the format's own, and the struct */
  size_t window_max;              /* rows */
  int threads;                    /* 0: vs_threads(); 1: everything on the caller's thread */
  int no_reader;                  /* what load calls must not run beside the host's own threads */
  int cancel;                     /* read by the loader, atomically: the load under way is not wanted any more */

  /* Of input_ahead.c. */
  uint64_t pos; /* row of the next read */
  input_window window[2];
  int front;  /* the one that the caller reads from; the other is the reader's */
  int streak; /* windows one behind the other */
  input_rows across; /* a small batch out of several windows, and what its texts lie in */
  struct input_text_block *texts;
  struct input_reader *reader;
};
void input_ahead_init(input_ahead *a);

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
  uint32_t lead_bytes;
  input_num num;
} input_raw_layout;
vs_rc input_raw_open(const char *path, int fd, const input_raw_layout *layout, int threads, input **out,
                     vs_err *err) VS_WARN_UNUSED;

#endif
