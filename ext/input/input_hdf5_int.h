/* input_hdf5_int.h - what the input_hdf5*.c files share. All of it is called with the lock held (input_h5_lock).
 *
 * Who opens what: input_hdf5.c the file and the layout "one matrix", input_hdf5_named.c the layout "one dataset per id",
 * input_hdf5_dataset.c any dataset (after looking at its links, storage and filters), input_hdf5_series.c 1-D datasets of
 * ids or metadata.
 */
#ifndef INPUT_HDF5_INT_H
#define INPUT_HDF5_INT_H
#include <hdf5.h>

#include "input_int.h"

/* ---- input_hdf5.c ---- */

/* One lock for the process: libhdf5 is built thread-safe in Debian but not everywhere. It also silences libhdf5's own
 * printing of errors for the calling thread and puts the setting back, because a host may use libhdf5 itself. */
void input_h5_lock(void);
void input_h5_unlock(void);
/* vs_fail plus ": " plus the innermost description on libhdf5's error stack, when there is one. */
vs_rc input_h5_fail(vs_err *err, vs_rc rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* What is known of a file while it is being opened. */
typedef struct input_h5_file {
  const char *path;
  uint64_t n_bytes;
  hid_t id;
} input_h5_file;

/* ---- input_hdf5_dataset.c ---- */

typedef enum input_h5_written { H5_WRITTEN_ALL, H5_WRITTEN_PART, H5_WRITTEN_NONE } input_h5_written;

typedef struct input_h5_dataset {
  hid_t id, type; /* < 0: closed */
  H5T_class_t class;
  int rank;
  hsize_t dims[H5S_MAX_RANK];
  hsize_t chunk[2]; /* rank 1 and 2 only; 0: not chunked */
  int filtered;     /* chunks pass through filters: reading part of one decodes all of it */
  int fd;           /* contiguous: libhdf5's descriptor and where the data lies, checked; -1: read through libhdf5 */
  uint64_t data_off;
  input_h5_written written; /* chunks that the file does not have */
  char shown[INPUT_SHOW];   /* name, for messages */
} input_h5_dataset;

/* Finds the object that name stands for inside this file, following soft links by hand; an external or user-defined link
 * anywhere on the way is refused before libhdf5 gets to follow it. parent and last (malloc'ed) may be NULL; they name the
 * hard link that leads to the object. */
vs_rc input_h5_resolve(const input_h5_file *f, const char *name, hid_t *obj, hid_t *parent, char **last,
                       vs_err *err) VS_WARN_UNUSED;
/* Opens a dataset by name; refuses groups, virtual and external storage, and filters that are missing here. */
vs_rc input_h5_dataset_open(const input_h5_file *f, const char *name, input_h5_dataset *d,
                            vs_err *err) VS_WARN_UNUSED;
/* The same for an object that is open already; takes obj over, also on failure. */
vs_rc input_h5_dataset_take(const input_h5_file *f, hid_t obj, const char *name, input_h5_dataset *d,
                            vs_err *err) VS_WARN_UNUSED;
void input_h5_dataset_close(input_h5_dataset *d);

/* "(60, 300)" */
const char *input_h5_shape(const input_h5_dataset *d, char out[INPUT_SHOW]);
/* How to read the dataset's numbers: IEEE half as it is, other floats by libhdf5 to float or double. Refuses the rest,
 * with a remedy. The caller closes *mem. */
typedef enum input_h5_float { H5_FLOAT_HALF = 2, H5_FLOAT_SINGLE = 4, H5_FLOAT_DOUBLE = 8 } input_h5_float;
vs_rc input_h5_float_type(const input_h5_file *f, const input_h5_dataset *d, input_h5_float *kind, hid_t *mem,
                          vs_err *err) VS_WARN_UNUSED;
/* Reads rows [row, row+n) of a dataset of rank 1 or 2. */
vs_rc input_h5_read_rows(const char *path, const input_h5_dataset *d, hid_t mem, hid_t transfer, uint64_t row,
                         size_t n, void *out, vs_err *err) VS_WARN_UNUSED;
/* Sets faults[i] to INPUT_HOLE for the rows of [row, row+n) that lie in a chunk that was never written. */
void input_h5_find_holes(const input_h5_dataset *d, uint64_t row, size_t n, uint8_t *faults);
/* Rounds [row, row+n) outwards to whole chunks, when that stays within max_rows. */
void input_h5_align(const input_h5_dataset *d, uint64_t n_rows, size_t max_rows, uint64_t *row, size_t *n);

/* ---- input_hdf5_vlen.c ---- */

/* Variable-length strings: 16-byte references first, then the text behind each. The text is good until the next call. */
typedef struct input_h5_vlen input_h5_vlen;
vs_rc input_h5_vlen_open(const input_h5_file *f, const input_h5_dataset *d, input_h5_vlen **out,
                         vs_err *err) VS_WARN_UNUSED;
void input_h5_vlen_close(input_h5_vlen *v);
vs_rc input_h5_vlen_refs(const char *path, const input_h5_dataset *d, input_h5_vlen *v, uint64_t row, size_t n,
                         void *out, vs_err *err) VS_WARN_UNUSED;
vs_rc input_h5_vlen_text(const char *path, const input_h5_dataset *d, input_h5_vlen *v, const void *ref,
                         const char **text, size_t *len, vs_err *err) VS_WARN_UNUSED;

/* ---- input_hdf5_series.c ---- */

typedef enum input_h5_kind { H5_KIND_INT, H5_KIND_UINT, H5_KIND_REAL, H5_KIND_FIXED, H5_KIND_VLEN } input_h5_kind;

/* Memory for the texts of variable-length strings: bounded, and freed as one. */
typedef struct input_h5_arena {
  struct input_h5_block *blocks;
  size_t used; /* bytes in all blocks */
  int full;    /* a request met the limit since the last reset */
} input_h5_arena;

/* A 1-D dataset of ids or of one metadata column. */
typedef struct input_h5_series {
  input_h5_dataset ds;
  input_h5_kind kind;
  H5T_str_t pad; /* fixed strings */
  hid_t mem;     /* type in buf; none for variable-length strings */
  size_t elem;   /* bytes per row in buf */
  unsigned char *buf;
  size_t cap;  /* rows there is room for in buf and in digits */
  int as_text; /* H5_KIND_UINT: deliver decimal text */
  char *digits;
  uint8_t *holes;
  input_h5_vlen *vlen; /* variable-length strings; then buf holds a pointer into arena and a length per row */
  input_h5_arena arena;
} input_h5_series;

vs_rc input_h5_series_open(const input_h5_file *f, const char *name, int is_id, input_h5_series *s,
                           vs_err *err) VS_WARN_UNUSED;
void input_h5_series_close(input_h5_series *s);
/* Reads rows [row, row+n) into the series' own memory. VS_OK with *too_big set: the strings exceed the arena, ask for
 * fewer rows. */
vs_rc input_h5_series_read(const char *path, input_h5_series *s, uint64_t row, size_t n, int *too_big,
                           vs_err *err) VS_WARN_UNUSED;
/* Value of the i-th row read. INPUT_OVERFLOW: an unsigned number above 2^63-1 that is not to be text. INPUT_ID_UTF8: no
 * valid text. INPUT_HOLE: never written. Then *v is NULL. */
input_fault input_h5_series_value(const input_h5_series *s, size_t i, input_value *v);
/* 1 when some value of an unsigned 64-bit series does not fit int64; reads it all, a block at a time. */
vs_rc input_h5_series_exceeds(const char *path, input_h5_series *s, int *exceeds, vs_err *err) VS_WARN_UNUSED;
input_type input_h5_series_type(const input_h5_series *s);
/* Cuts the padding of a fixed-length string, or trailing NULs of any other; the rest may still hold a NUL. */
size_t input_h5_text_len(const char *s, size_t n, H5T_str_t pad);

/* ---- input_hdf5_named.c ---- */

/* One dataset per id in the group. Takes f->id over when it succeeds. dim: 0 or what it must be. row_ids: number the rows
 * instead of naming them. */
vs_rc input_h5_named_open(const input_h5_file *f, const char *group, int row_ids, uint32_t dim, input **out,
                          vs_err *err) VS_WARN_UNUSED;

#endif
