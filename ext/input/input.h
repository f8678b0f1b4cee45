/* input.h - streams of (id, vector, columns) out of the files people have: HDF5, .npy, .fvecs, .f32.
 *
 * Every file is hostile. An input is opened, tells its shape, and is then read in order in batches; it may be rewound.
 * Used by the tool's build and query, and by hdf5_vectors in SQL. Not for several threads at once on one handle; libhdf5
 * itself is serialised by a process-wide lock inside.
 */
#ifndef INPUT_H
#define INPUT_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

typedef struct input_options {
  const char *embedding_dataset; /* HDF5; NULL: found by the usual names */
  const char *id_dataset;        /* HDF5; NULL: found; "none": row numbers */
  const char *const *columns;    /* HDF5: names of 1-D datasets with metadata, n_columns of them */
  size_t n_columns;
  uint32_t dim;                  /* .f32: required; other formats: 0, or must agree */
  int threads;                   /* 0: vs_threads(); 1: everything on the caller's thread, nothing is read ahead */
} input_options;

typedef enum input_id_kind { INPUT_ID_ROW, INPUT_ID_INT, INPUT_ID_TEXT } input_id_kind;
typedef enum input_type { INPUT_NULL, INPUT_INT, INPUT_REAL, INPUT_TEXT } input_type;

/* Text points into the batch and lives until its next read. */
typedef struct input_value {
  input_type type;
  int64_t i;
  double r;
  const char *text;
  size_t len; /* bytes of text */
} input_value;

/* Why a row cannot be used; such rows are delivered and marked, the caller decides (fail or skip). */
typedef enum input_fault {
  INPUT_FINE = 0,
  INPUT_NAN,      /* NaN or Inf in the file */
  INPUT_OVERFLOW, /* a float64 that does not fit float32 */
  INPUT_DIM,      /* one dataset per id: another length than the rest */
  INPUT_ID_UTF8,  /* the id is not valid UTF-8, or has an embedded NUL */
  INPUT_HOLE      /* chunk never written: the file has no such data */
} input_fault;
const char *input_fault_text(input_fault f);

typedef struct input_batch {
  size_t n;               /* rows delivered, 0 at the end */
  uint64_t first_row;     /* number of the first one in this file */
  const float *vectors;   /* n x dim, row-major; zeros where fault is set */
  const input_value *ids; /* n; INPUT_INT or INPUT_TEXT, for row-number inputs INPUT_INT = row */
  const input_value *columns; /* n x n_columns, row-major */
  const uint8_t *faults;  /* n x input_fault */
} input_batch;

typedef struct input input;
struct input {
  const char *path;
  uint64_t n_rows;
  uint32_t dim;
  input_id_kind id_kind;
  const input_type *column_types; /* n_columns */
  size_t n_columns;
  uint64_t loaded_end; /* rows before this one are loaded or being loaded */
  /* In order; batch memory is owned by the input. Batches of up to 1 MiB of vectors end before max_rows only where the rows end
   * or cannot be read further; larger ones end where it suits the input. */
  vs_rc (*read)(input *, size_t max_rows, input_batch *, vs_err *);
  vs_rc (*seek)(input *, uint64_t row, vs_err *);                   /* the next read starts at this row, <= n_rows */
  /* Begins to load what the next read will ask for; NULL: the input does not read ahead. */
  void (*start)(input *, size_t max_rows);
  void (*close)(input *);
};

/* Opens by content (HDF5 and .npy signatures), else by extension (.fvecs, .f32). Errors name the file, what was found and
 * the remedy. On failure *out is NULL. */
vs_rc input_open(const char *path, const input_options *opt, input **out, vs_err *err) VS_WARN_UNUSED;
static inline void input_close(input *in) {
  if (in) in->close(in);
}
/* The number of rows and the dimension without reading data: what `pack` needs. */
vs_rc input_shape(const char *path, const input_options *opt, uint64_t *n_rows, uint32_t *dim, vs_err *err) VS_WARN_UNUSED;

/* For programs, before the first call: no clean-up by libhdf5 at exit. It loops, and says so on stderr, over what a damaged
 * file left open inside it; inputs are only read, so nothing needs flushing. Not for libraries: the host may write HDF5
 * itself. */
void input_skip_exit_cleanup(void);

#endif
