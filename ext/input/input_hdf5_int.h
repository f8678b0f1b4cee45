/* input_hdf5_int.h - what the input_hdf5*.c files share. What opens and closes is called with the lock held (input_h5_lock),
 * what reads rows without it, unless it says otherwise: readers take it themselves, on any thread, where they call libhdf5.
 *
 * Who opens what: input_hdf5.c the file and the layout "one matrix", input_hdf5_named.c the layout "one dataset per id",
 * input_hdf5_dataset.c any dataset (after looking at its links, storage and filters), input_hdf5_series.c 1-D datasets of
 * ids or metadata. Data comes past libhdf5 where it can: contiguous storage through input_region.c, chunks through
 * input_hdf5_chunks.c and input_hdf5_filters.c, variable-length strings through input_hdf5_vlen.c.
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
/* 1 when libhdf5 may be called beside the host's own threads. With the lock held. */
int input_h5_threadsafe(void);
/* vs_fail plus ": " plus the innermost description on libhdf5's error stack, when there is one. */
vs_rc input_h5_fail(vs_err *err, vs_rc rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

/* What is known of a file while it is being opened. path must outlive the datasets. */
typedef struct input_h5_file {
  const char *path;
  uint64_t n_bytes;
  hid_t id;
  hid_t lookup; /* the file once more, see input_hdf5_places.c; < 0: not yet. Closed by who keeps the struct. */
} input_h5_file;

/* ---- input_hdf5_dataset.c ---- */

typedef enum input_h5_written { H5_WRITTEN_ALL, H5_WRITTEN_PART, H5_WRITTEN_NONE } input_h5_written;

typedef struct input_h5_dataset {
  hid_t id, type; /* < 0: closed */
  H5T_class_t class;
  size_t elem; /* bytes of an element in the file */
  int rank;
  hsize_t dims[H5S_MAX_RANK];
  hsize_t chunk[2]; /* rank 1 and 2 only; 0: not chunked */
  int filtered;     /* chunks pass through filters: reading part of one decodes all of it */
  const char *path; /* the opener's, see input_h5_file */
  uint64_t n_bytes; /* of the file when it was opened */
  int fd;           /* libhdf5's descriptor, -1: none */
  int contiguous;   /* all data lies in one piece at data_off, inside the file */
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
/* How to read the dataset's numbers. Refuses what is no float, with a remedy. The caller closes `mem`. */
typedef struct input_h5_float {
  hid_t mem;        /* what libhdf5 is asked for: a half in this machine's byte order, or float, or double */
  input_num as_mem; /* the same as a kind of number */
  int plain;        /* stored as one of the kinds of input_num: `stored` */
  input_num stored;
} input_h5_float;
vs_rc input_h5_float_type(const input_h5_file *f, const input_h5_dataset *d, input_h5_float *t, vs_err *err) VS_WARN_UNUSED;
/* Reads rows [row, row+n) of a dataset of rank 1 or 2 by libhdf5, or from the file if contiguous. With the lock held. */
vs_rc input_h5_read_rows(const input_h5_dataset *d, hid_t mem, uint64_t row, size_t n, void *out, vs_err *err) VS_WARN_UNUSED;
/* Bytes of the chunk at this place as stored: 1 there it is, 0 never written, -1 the index is damaged. Not to be relied on for
 * unfiltered chunks. With the lock held. */
int input_h5_chunk_size(hid_t dataset, const hsize_t at[2], hsize_t *n_bytes);
/* Sets flags[i] to INPUT_HAS_HOLE for the rows of [row, row+n) that lie in a chunk that was never written. With the lock
 * held. */
void input_h5_find_holes(const input_h5_dataset *d, uint64_t row, size_t n, uint8_t *flags);
/* Rounds [row, row+n) outwards to whole chunks, when that stays within max_rows. */
void input_h5_align(const input_h5_dataset *d, uint64_t n_rows, size_t max_rows, uint64_t *row, size_t *n);

/* ---- input_hdf5_filters.c ---- */

enum { H5_FILTERS_MAX = 8, H5_SCRATCH_BUFFERS = 4 };
typedef enum input_h5_step { H5_STEP_DEFLATE, H5_STEP_SHUFFLE, H5_STEP_FLETCHER32 } input_h5_step;

/* The filters of a dataset, in writing order. */
typedef struct input_h5_filters {
  int n, n_shuffles, deflated;
  size_t chunk_bytes; /* of a decoded chunk */
  struct {
    input_h5_step what;
    size_t width; /* H5_STEP_SHUFFLE: bytes of an element */
  } step[H5_FILTERS_MAX];
} input_h5_filters;

/* What one thread decodes with, kept from chunk to chunk. */
typedef struct input_h5_scratch {
  unsigned char *buf[H5_SCRATCH_BUFFERS]; /* [0]: the chunk as it is stored; [3]: the caller's */
  size_t cap[H5_SCRATCH_BUFFERS];
  struct libdeflate_decompressor *inflater;
} input_h5_scratch;
unsigned char *input_h5_scratch_get(input_h5_scratch *s, int i, size_t n); /* NULL: no memory */
void input_h5_scratch_free(input_h5_scratch *s);

/* 0: with a filter that only libhdf5 can undo. */
int input_h5_filters_read(hid_t props, size_t chunk_bytes, input_h5_filters *f);
/* Decodes the n bytes in s->buf[0] to chunk_bytes at *out, which is `to` if that is given (it must have the room), else in s.
 * NULL: done; input_h5_no_memory, or what is wrong with them. */
extern const char input_h5_no_memory[];
const char *input_h5_undo(const input_h5_filters *f, uint32_t mask, input_h5_scratch *s, size_t n, unsigned char *to,
                          const unsigned char **out);
/* For tests. */
void input_h5_unshuffle(const unsigned char *in, unsigned char *out, size_t n_bytes, size_t width);
uint32_t input_h5_fletcher32(const unsigned char *p, size_t n);

/* ---- input_hdf5_places.c: all of it with the lock held ---- */

typedef struct input_h5_place {
  uint64_t off, size; /* in the file, unchecked */
  uint32_t mask;      /* filters that were left out */
} input_h5_place;
/* The dataset in the file opened once more, for input_h5_place_of and H5Oclose; < 0: it cannot be had. */
hid_t input_h5_places_open(input_h5_file *f, const input_h5_dataset *d);
/* 1 there it is, 0 never written, -1 the index is damaged. */
int input_h5_place_of(hid_t places, const hsize_t at[2], input_h5_place *p);

/* ---- input_hdf5_chunks.c ---- */

typedef struct input_h5_chunks input_h5_chunks;
/* *out is NULL for a dataset that only libhdf5 can read. Bands taller than window_rows are held. d must stay where it is.
 * cancel may be NULL. */
vs_rc input_h5_chunks_open(input_h5_file *f, const input_h5_dataset *d, size_t window_rows, int threads, const int *cancel,
                           input_h5_chunks **out, vs_err *err) VS_WARN_UNUSED;
void input_h5_chunks_close(input_h5_chunks *c);
extern size_t input_h5_band_max; /* bytes of a band that is held in memory; 64 MiB, less in tests */
/* 1: whole bands should be asked for. */
int input_h5_chunks_whole(const input_h5_chunks *c);
/* Rows [row, row + *n) to out, as stored or (num) as floats, and their bits to flags. On failure *n says how many rows from
 * `row` on are good. */
vs_rc input_h5_chunks_read(input_h5_chunks *c, uint64_t row, size_t *n, const input_num *num, void *out, uint8_t *flags,
                           vs_err *err) VS_WARN_UNUSED;

/* ---- input_hdf5_vlen.c ---- */

/* Variable-length strings: 16-byte references first, then the text behind each. */
typedef struct input_h5_vlen input_h5_vlen;
vs_rc input_h5_vlen_open(input_h5_file *f, const input_h5_dataset *d, const int *cancel, input_h5_vlen **out,
                         vs_err *err) VS_WARN_UNUSED;
void input_h5_vlen_close(input_h5_vlen *v);
/* References of rows [row, row + *n), and the rows' bits. On failure *n says how many rows from `row` on are good. */
vs_rc input_h5_vlen_refs(const input_h5_dataset *d, input_h5_vlen *v, uint64_t row, size_t *n, void *out, uint8_t *flags,
                         vs_err *err) VS_WARN_UNUSED;
/* The text is good until the next call. */
vs_rc input_h5_vlen_text(const input_h5_dataset *d, input_h5_vlen *v, const void *ref, const char **text, size_t *len,
                         vs_err *err) VS_WARN_UNUSED;

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
  hid_t mem;     /* type of a value in input_h5_values.buf; none for variable-length strings */
  size_t elem;   /* its bytes */
  int as_text;   /* H5_KIND_UINT: deliver decimal text */
  input_h5_chunks *chunks; /* NULL: contiguous, or read by libhdf5 */
  input_h5_vlen *vlen;     /* variable-length strings */
} input_h5_series;

/* The values of some rows of a series: one for each window, so that texts live as long as it does. All zeros at first. */
typedef struct input_h5_values {
  unsigned char *buf;
  size_t cap; /* rows there is room for */
  char *digits;
  uint8_t *flags;
  input_h5_arena arena; /* variable-length strings; then buf holds a pointer into it and a length per row */
} input_h5_values;
void input_h5_values_free(input_h5_values *v);

vs_rc input_h5_series_open(input_h5_file *f, const char *name, int is_id, const int *cancel, input_h5_series *s,
                           vs_err *err) VS_WARN_UNUSED;
void input_h5_series_close(input_h5_series *s);
/* Reads rows [row, row + *n); *n becomes less when their strings are too long to be held at once. On failure *n says how many
 * rows from `row` on are good. */
vs_rc input_h5_series_read(input_h5_series *s, input_h5_values *v, uint64_t row, size_t *n, vs_err *err) VS_WARN_UNUSED;
/* Value of the i-th row read. INPUT_OVERFLOW: an unsigned number above 2^63-1 that is not to be text. INPUT_ID_UTF8: no
 * valid text. INPUT_HOLE: never written. Then *out is NULL. */
input_fault input_h5_series_value(const input_h5_series *s, const input_h5_values *v, size_t i, input_value *out);
/* 1 when some value of an unsigned 64-bit series does not fit int64; reads it all, a block at a time. Without the lock. */
vs_rc input_h5_series_exceeds(input_h5_series *s, int *exceeds, vs_err *err) VS_WARN_UNUSED;
input_type input_h5_series_type(const input_h5_series *s);
/* Cuts the padding of a fixed-length string, or trailing NULs of any other; the rest may still hold a NUL. */
size_t input_h5_text_len(const char *s, size_t n, H5T_str_t pad);

/* ---- input_hdf5_named.c ---- */

/* One dataset per id in the group. Takes f->id over when it succeeds. row_ids: number the rows instead of naming them. */
vs_rc input_h5_named_open(const input_h5_file *f, const char *group, int row_ids, const input_options *opt, input **out,
                          vs_err *err) VS_WARN_UNUSED;

#endif
