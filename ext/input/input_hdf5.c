/* input_hdf5.c - vectors out of HDF5 files: the lock around libhdf5, which layout a file has, and the layout "one matrix".
 *
 *   layout              recognised by                                              ids
 *   one matrix          a dataset of shape (rows, dimension) named embedding,      a 1-D dataset named id, ids, accession,
 *                       embeddings, vectors, vector or emb                         accessions, name or names, beside it
 *   ann-benchmarks      a dataset train (test when named)                          row numbers, or such a dataset
 *   one dataset per id  none of these; every child is a float dataset (D,)|(1,D)   the names, see input_hdf5_named.c
 *
 * --embedding-dataset names the matrix in any group, or a group with one dataset per id; --id-dataset names the ids, or is
 * "none" for row numbers. Row numbers are never assumed (ann-benchmarks aside): a file that lost its ids would load with
 * wrong ones. When several names of the table are present the file is refused and the user chooses.
 *
 * Reading: rows are decoded into a window, whole chunks where they are compressed, and handed out in slices of what the
 * caller asks for. A window has at most INPUT_WINDOW_BYTES and INPUT_WINDOW_ROWS, whatever the file claims; libhdf5's cache
 * adds one row of chunks (64 MiB at most). The window is never larger than needed for one call, so that a caller who seeks
 * about reads little.
 *
 * Not read: compound tables, integers as vectors, virtual datasets, external links and storage.
 */
#include "input_hdf5_int.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the lock and libhdf5's errors ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static H5E_auto2_t host_print; /* guarded by lock, as its data */
static void *host_print_data;

void input_h5_lock(void) {
  pthread_mutex_lock(&lock);
  if (H5Eget_auto2(H5E_DEFAULT, &host_print, &host_print_data) < 0) host_print = NULL, host_print_data = NULL;
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

void input_h5_unlock(void) {
  H5Eset_auto2(H5E_DEFAULT, host_print, host_print_data);
  pthread_mutex_unlock(&lock);
}

void input_skip_exit_cleanup(void) { H5dont_atexit(); }

/* Keeps the first description of a walk from the innermost call outwards. */
static herr_t keep_innermost(unsigned n, const H5E_error2_t *e, void *user) {
  (void)n;
  if (e->desc && *e->desc) {
    input_show(user, e->desc, strlen(e->desc));
    return 1;
  }
  return 0;
}

vs_rc input_h5_fail(vs_err *err, vs_rc rc, const char *fmt, ...) {
  char text[900], why[INPUT_SHOW] = "";
  va_list ap;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_innermost, why);
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  return *why ? vs_fail(err, rc, "%s: %s", text, why) : vs_fail(err, rc, "%s", text);
}

/* ---- opening the file ---- */

static herr_t find_text(unsigned n, const H5E_error2_t *e, void *user) {
  (void)n;
  return e->desc && strstr(e->desc, (const char *)user) != NULL;
}
static int stack_says(const char *text) {
  return H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, find_text, (void *)text) > 0;
}

/* Why H5Fopen failed, with the remedy where there is one. */
static vs_rc explain_open(const input_h5_file *f, vs_err *err) {
  if (stack_says("h5clear") || stack_says("already open for write"))
    return vs_fail(err, VS_INVALID,
                   "%s: is marked as open for writing: still being written, or its writer was killed (if "
                   "so: `h5clear -s FILE`, and check what is missing)",
                   f->path);
  if (stack_says("unable to lock file"))
    return input_h5_fail(err, VS_IO, "%s: is locked by a program that has it open for writing", f->path);
  if (stack_says("truncated file"))
    return input_h5_fail(err, VS_CORRUPT, "%s: was cut at %llu bytes (an interrupted copy?)", f->path,
                         (unsigned long long)f->n_bytes);
  return input_h5_fail(err, VS_CORRUPT, "%s: damaged or cut HDF5 file of %llu bytes", f->path,
                       (unsigned long long)f->n_bytes);
}

static vs_rc open_file(input_h5_file *f, vs_err *err) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  vs_rc rc;
  if (access < 0) return vs_nomem(err);
  /* STRONG: closing the file closes whatever an error path left open; h5py uses it as well, and libhdf5 wants agreement
   * among those who have the same file open. */
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  f->id = H5Fopen(f->path, H5F_ACC_RDONLY, access);
#if H5_VERSION_GE(1, 10, 7) && !(H5_VERS_MAJOR == 1 && H5_VERS_MINOR == 12 && H5_VERS_RELEASE < 1)
  /* Some read-only and network mounts cannot lock at all. A lock that somebody holds (EAGAIN) is respected. */
  if (f->id < 0 && stack_says("unable to lock file") && !stack_says("Resource temporarily unavailable")) {
    H5Pset_file_locking(access, 0, 1);
    f->id = H5Fopen(f->path, H5F_ACC_RDONLY, access);
  }
#endif
  /* The texts first: the next call into libhdf5 clears its error stack. */
  rc = f->id >= 0 ? VS_OK : explain_open(f, err);
  H5Pclose(access);
  return rc;
}

/* ---- one matrix ---- */

typedef struct matrix_input {
  input base; /* first: the caller's pointer is to this */
  input_h5_file file;
  input_h5_dataset vectors;
  input_h5_float kind;
  hid_t mem;
  input_h5_series *ids, *columns; /* ids: NULL for row numbers */
  input_type *types;
  size_t window_max; /* rows */
  uint64_t pos;
  uint64_t window_row; /* first row of the window */
  size_t window_n;     /* rows in it, 0: none */
  input_rows rows;
} matrix_input;

/* Vectors of the window, from their stored form to floats in place; faults of rows that hold no numbers. */
static vs_rc load_vectors(matrix_input *in, uint64_t row, size_t n, vs_err *err) {
  uint32_t dim = in->base.dim;
  float *out = in->rows.vectors;
  /* Halves are read into the upper half of the room and widened front to back. */
  char *stored = in->kind == H5_FLOAT_HALF ? (char *)out + n * dim * 2 : (char *)out;
  vs_rc rc = input_h5_read_rows(in->file.path, &in->vectors, in->mem, H5P_DEFAULT, row, n, stored, err);
  if (rc) return rc;
  memset(in->rows.faults, 0, n);
  input_h5_find_holes(&in->vectors, row, n, in->rows.faults);
  if (in->kind == H5_FLOAT_HALF) input_widen_half(stored, out, n * dim);
  for (size_t i = 0; i < n; i++) {
    float *at = out + i * dim;
    input_fault fault =
        in->kind == H5_FLOAT_DOUBLE ? input_narrow_row(stored + i * dim * 8, at, dim) : input_check_row(at, dim);
    if (in->rows.faults[i]) memset(at, 0, (size_t)dim * 4); /* a fill value is no data */
    else in->rows.faults[i] = (uint8_t)fault;
  }
  return VS_OK;
}

static vs_rc load_values(matrix_input *in, uint64_t row, size_t n, vs_err *err) {
  for (size_t i = 0; i < n; i++) {
    input_value *id = in->rows.ids + i;
    input_fault fault = INPUT_FINE;
    if (in->ids) fault = input_h5_series_value(in->ids, i, id);
    else *id = (input_value){.type = INPUT_INT, .i = (int64_t)(row + i)};
    if (fault && !in->rows.faults[i]) {
      in->rows.faults[i] = (uint8_t)fault;
      memset(in->rows.vectors + i * in->base.dim, 0, (size_t)in->base.dim * 4);
    }
    for (size_t c = 0; c < in->base.n_columns; c++) {
      fault = input_h5_series_value(in->columns + c, i, in->rows.columns + i * in->base.n_columns + c);
      if (fault == INPUT_OVERFLOW || fault == INPUT_ID_UTF8)
        return vs_fail(err, VS_INVALID, "%s: row %llu of '%s' %s", in->file.path, (unsigned long long)(row + i),
                       in->columns[c].ds.shown,
                       fault == INPUT_OVERFLOW ? "is above 2^63-1: store the column as strings"
                                               : "is not valid UTF-8, or has an embedded NUL");
    }
  }
  return VS_OK;
}

/* Decodes a window that has row `pos` and, if it can be, n rows from there. */
static vs_rc load_window(matrix_input *in, size_t n, vs_err *err) {
  uint64_t row = in->pos;
  size_t room = in->kind == H5_FLOAT_DOUBLE ? 8 : 4;
  vs_rc rc;
  int too_big;
  in->window_n = 0;
  if (n > in->window_max) n = in->window_max;
  /* Chunks that are too tall for the window and for the cache are decoded once per window: then make it a full one. */
  if (in->vectors.filtered && in->vectors.chunk[0] > in->window_max) n = in->window_max;
  if (n > in->base.n_rows - row) n = (size_t)(in->base.n_rows - row);
  input_h5_align(&in->vectors, in->base.n_rows, in->window_max, &row, &n);
  do { /* fewer rows when their strings are too long; pos stays inside */
    too_big = 0;
    rc = in->ids ? input_h5_series_read(in->file.path, in->ids, row, n, &too_big, err) : VS_OK;
    for (size_t c = 0; c < in->base.n_columns && !rc && !too_big; c++)
      rc = input_h5_series_read(in->file.path, in->columns + c, row, n, &too_big, err);
    if (too_big) {
      row = in->pos - row < n / 2 ? row : in->pos;
      n /= 2;
      if (n > in->base.n_rows - row) n = (size_t)(in->base.n_rows - row);
    }
  } while (too_big && !rc);
  if (!rc) rc = input_rows_reserve(&in->rows, n, in->base.dim, room, in->base.n_columns, err);
  if (!rc) rc = load_vectors(in, row, n, err);
  if (!rc) rc = load_values(in, row, n, err);
  if (rc) return rc;
  in->window_row = row;
  in->window_n = n;
  return VS_OK;
}

static vs_rc matrix_read(input *base, size_t max_rows, input_batch *batch, vs_err *err) {
  matrix_input *in = (matrix_input *)base;
  size_t skip;
  memset(batch, 0, sizeof *batch);
  batch->first_row = in->pos;
  if (!max_rows || in->pos >= base->n_rows) return VS_OK;
  if (in->pos < in->window_row || in->pos - in->window_row >= in->window_n) {
    vs_rc rc;
    input_h5_lock();
    rc = load_window(in, max_rows, err);
    input_h5_unlock();
    if (rc) return rc;
  }
  skip = (size_t)(in->pos - in->window_row);
  batch->n = in->window_n - skip < max_rows ? in->window_n - skip : max_rows;
  batch->vectors = in->rows.vectors + skip * base->dim;
  batch->ids = in->rows.ids + skip;
  batch->columns = in->rows.columns + skip * base->n_columns;
  batch->faults = in->rows.faults + skip;
  in->pos += batch->n;
  return VS_OK;
}

static vs_rc matrix_seek(input *base, uint64_t row, vs_err *err) {
  if (row > base->n_rows)
    return vs_fail(err, VS_INVALID, "%s: no row %llu, the file has %llu", base->path, (unsigned long long)row,
                   (unsigned long long)base->n_rows);
  ((matrix_input *)base)->pos = row;
  return VS_OK;
}

/* All but the file, with the lock held. */
static void matrix_free(matrix_input *in) {
  if (in->ids) input_h5_series_close(in->ids);
  for (size_t c = 0; in->columns && c < in->base.n_columns; c++) input_h5_series_close(in->columns + c);
  if (in->mem >= 0) H5Tclose(in->mem);
  input_h5_dataset_close(&in->vectors);
  input_rows_free(&in->rows);
  free(in->ids);
  free(in->columns);
  free(in->types);
  free((char *)in->base.path);
  free(in);
}

static void matrix_close(input *base) {
  matrix_input *in = (matrix_input *)base;
  hid_t file = in->file.id;
  input_h5_lock();
  matrix_free(in);
  H5Fclose(file);
  input_h5_unlock();
}

/* Shape of the matrix, beside its ids' count (0: no ids). */
static vs_rc check_shape(const matrix_input *in, uint64_t n_ids, uint32_t dim, vs_err *err) {
  const input_h5_dataset *d = &in->vectors;
  const char *path = in->file.path;
  char shape[INPUT_SHOW];
  input_h5_shape(d, shape);
  if (d->rank != 2)
    return vs_fail(err, VS_INVALID, "%s: '%s' has the shape %s; (rows, dimension) is needed%s", path, d->shown, shape,
                   d->rank == 1   ? ": reshape it"
                   : d->rank == 3 ? ": one vector per row (mean-pool, or squeeze an axis of 1)"
                                  : "");
  if (!d->dims[1])
    return vs_fail(err, VS_INVALID, "%s: '%s' has the shape %s: its dimension is 0", path, d->shown, shape);
  if (in->ids && n_ids != d->dims[0]) {
    if (n_ids == d->dims[1])
      return vs_fail(err, VS_INVALID,
                     "%s: '%s' has the shape %s and there are %llu ids: it is transposed, write it as (rows, "
                     "dimension)",
                     path, d->shown, shape, (unsigned long long)n_ids);
    return vs_fail(err, VS_INVALID, "%s: '%s' has %llu rows but '%s' has %llu ids", path, d->shown,
                   (unsigned long long)d->dims[0], in->ids->ds.shown, (unsigned long long)n_ids);
  }
  if (!d->dims[0]) return vs_fail(err, VS_INVALID, "%s: '%s' has the shape %s: no rows", path, d->shown, shape);
  if (d->dims[1] > INPUT_DIM_MAX)
    return vs_fail(err, VS_INVALID, "%s: '%s' has the shape %s: dimensions up to %u are possible (transposed?)", path,
                   d->shown, shape, INPUT_DIM_MAX);
  if (dim && d->dims[1] != dim)
    return vs_fail(err, VS_INVALID, "%s: '%s' has dimension %llu, not %u", path, d->shown,
                   (unsigned long long)d->dims[1], dim);
  if (d->written == H5_WRITTEN_NONE)
    return vs_fail(err, VS_INVALID, "%s: '%s' was created with the shape %s, but no row of it was ever written", path,
                   d->shown, shape);
  return VS_OK;
}

static vs_rc open_columns(matrix_input *in, const input_options *opt, vs_err *err) {
  in->columns = calloc(opt->n_columns + 1, sizeof *in->columns);
  in->types = calloc(opt->n_columns + 1, sizeof *in->types);
  if (!in->columns || !in->types) return vs_nomem(err);
  in->base.column_types = in->types;
  for (size_t c = 0; c < opt->n_columns; c++) {
    input_h5_series *s = in->columns + c;
    vs_rc rc = input_h5_series_open(&in->file, opt->columns[c], 0, s, err);
    if (rc) return rc;
    in->base.n_columns = c + 1; /* what matrix_free closes */
    in->types[c] = input_h5_series_type(s);
    if (s->ds.dims[0] != in->base.n_rows)
      return vs_fail(err, VS_INVALID, "%s: '%s' has %llu rows but the column '%s' has %llu", in->file.path,
                     in->vectors.shown, (unsigned long long)in->base.n_rows, s->ds.shown,
                     (unsigned long long)s->ds.dims[0]);
  }
  return VS_OK;
}

/* Rows that fit a window: vectors, ids and columns as they are stored and as they are delivered. */
static size_t window_rows(const matrix_input *in) {
  size_t row = (size_t)in->base.dim * (in->kind == H5_FLOAT_DOUBLE ? 8 : 4), n;
  if (in->ids) row += in->ids->elem;
  for (size_t c = 0; c < in->base.n_columns; c++) row += in->columns[c].elem;
  row += sizeof(input_value) * (1 + in->base.n_columns);
  n = INPUT_WINDOW_BYTES / row;
  return n < 1 ? 1 : n > INPUT_WINDOW_ROWS ? INPUT_WINDOW_ROWS : n;
}

/* vectors and ids are names inside the file; ids NULL: row numbers. */
static vs_rc matrix_open(const input_h5_file *f, const char *vectors, const char *ids, const input_options *opt,
                         int shape_only, input **out, vs_err *err) {
  matrix_input *in = calloc(1, sizeof *in);
  vs_rc rc;
  if (!in) return vs_nomem(err);
  in->mem = in->vectors.id = in->vectors.type = -1;
  in->file = *f;
  in->base.path = strdup(f->path);
  rc = in->base.path ? input_h5_dataset_open(f, vectors, &in->vectors, err) : vs_nomem(err);
  if (rc) goto fail;
  in->file.path = in->base.path;
  rc = input_h5_float_type(f, &in->vectors, &in->kind, &in->mem, err);
  if (!rc && ids) {
    in->ids = calloc(1, sizeof *in->ids);
    if (in->ids) in->ids->mem = in->ids->ds.id = in->ids->ds.type = -1;
    rc = in->ids ? input_h5_series_open(f, ids, 1, in->ids, err) : vs_nomem(err);
  }
  if (!rc) rc = check_shape(in, in->ids ? in->ids->ds.dims[0] : 0, opt->dim, err);
  if (rc) goto fail;
  in->base.n_rows = in->vectors.dims[0];
  in->base.dim = (uint32_t)in->vectors.dims[1];
  rc = open_columns(in, opt, err);
  if (!rc && in->ids && !shape_only) rc = input_h5_series_exceeds(f->path, in->ids, &in->ids->as_text, err);
  if (rc) goto fail;
  in->base.id_kind = !in->ids                                      ? INPUT_ID_ROW
                     : input_h5_series_type(in->ids) == INPUT_TEXT ? INPUT_ID_TEXT
                                                                   : INPUT_ID_INT;
  in->window_max = window_rows(in);
  in->base.read = matrix_read;
  in->base.seek = matrix_seek;
  in->base.close = matrix_close;
  *out = &in->base;
  return VS_OK;
fail:
  matrix_free(in);
  return rc;
}

/* ---- which layout ---- */

/* The names we look for, most usual first. AnnData's X is not among them: a matrix of counts, no embedding. */
static const char *const vector_names[] = {"embedding", "embeddings", "vectors", "vector", "emb", "train", NULL};
static const char *const id_names[] = {"id", "ids", "accession", "accessions", "name", "names", NULL};

/* The one of names that the group has; *found is NULL when none, several are an error. A dataset `id` leaves no doubt: others
 * beside it, such as `name`, are metadata. */
static vs_rc find_one(const input_h5_file *f, hid_t group, const char *const *names, const char *what,
                      const char *option, const char **found, vs_err *err) {
  *found = NULL;
  for (; *names; names++) {
    if (H5Lexists(group, *names, H5P_DEFAULT) <= 0) continue;
    if (*found)
      return vs_fail(err, VS_INVALID, "%s: both '%s' and '%s' could be the %s: choose with %s", f->path, *found,
                     *names, what, option);
    *found = *names;
    if (!strcmp(*names, "id")) return VS_OK;
  }
  return VS_OK;
}

/* The path of a sibling: "/data/emb/embedding", "id" -> "/data/emb/id". */
static char *sibling(const char *path, const char *name) {
  const char *slash = strrchr(path, '/');
  int n = slash ? (int)(slash - path) + 1 : 0;
  char *out;
  return asprintf(&out, "%.*s%s", n, path, name) < 0 ? NULL : out;
}

/* Length of the float vector (D,) or (1,D) of this name; 0 when it is something else. */
static uint64_t vector_length(const input_h5_file *f, const char *name) {
  input_h5_dataset d;
  vs_err ignored = {0};
  uint64_t n = 0;
  if (input_h5_dataset_open(f, name, &d, &ignored)) return 0;
  if (d.class == H5T_FLOAT && (d.rank == 1 || (d.rank == 2 && d.dims[0] == 1))) n = d.dims[d.rank - 1];
  input_h5_dataset_close(&d);
  return n;
}

/* One dataset per id may have ids that are names of the table above (words, for example). Then the datasets of those names
 * are float vectors, and so are the file's first children, all of one length. */
static int looks_named(const input_h5_file *f, hid_t root) {
  enum { ENOUGH = 8 };
  H5G_info_t info;
  uint64_t len = 0;
  if (H5Gget_info(root, &info) < 0 || info.nlinks < ENOUGH) return 0;
  for (const char *const *name = vector_names; *name; name++) {
    uint64_t n;
    if (H5Lexists(root, *name, H5P_DEFAULT) <= 0) continue;
    n = vector_length(f, *name);
    if (!n || (len && n != len)) return 0;
    len = n;
  }
  for (hsize_t i = 0; i < ENOUGH; i++) {
    char name[256];
    ssize_t n = H5Lget_name_by_idx(root, ".", H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name, H5P_DEFAULT);
    if (n < 0 || (size_t)n >= sizeof name || vector_length(f, name) != len) return 0;
  }
  return 1;
}

/* Opens the matrix at `vectors`, with the ids that the options or its surroundings give. */
static vs_rc open_with_ids(const input_h5_file *f, const char *vectors, const input_options *opt, int shape_only,
                           input **out, vs_err *err) {
  const char *last = strrchr(vectors, '/'), *found = NULL;
  char *dir = NULL, *ids = NULL;
  hid_t group = -1;
  vs_rc rc = VS_OK;
  if (opt->id_dataset && !strcmp(opt->id_dataset, "none"))
    return matrix_open(f, vectors, NULL, opt, shape_only, out, err);
  if (opt->id_dataset) return matrix_open(f, vectors, opt->id_dataset, opt, shape_only, out, err);
  last = last ? last + 1 : vectors;
  dir = sibling(vectors, "");
  if (!dir) return vs_nomem(err);
  rc = input_h5_resolve(f, dir, &group, NULL, NULL, err);
  if (!rc && H5Iget_type(group) == H5I_GROUP) rc = find_one(f, group, id_names, "ids", "--id-dataset", &found, err);
  if (!rc && found) {
    ids = sibling(vectors, found);
    rc = ids ? VS_OK : vs_nomem(err);
  } else if (!rc && strcmp(last, "train") && strcmp(last, "test")) {
    /* What is wrong with the vectors themselves matters more than that ids are missing. */
    char shown[INPUT_SHOW];
    rc = matrix_open(f, vectors, NULL, opt, 1, out, err);
    if (!rc) {
      matrix_free((matrix_input *)*out);
      *out = NULL;
      rc = vs_fail(err, VS_INVALID,
                   "%s: no ids beside '%s' (looked for id, ids, accession, accessions, name, names): name them "
                   "with --id-dataset, or give --id-dataset none to use row numbers",
                   f->path, input_show(shown, vectors, strlen(vectors)));
    }
  }
  if (!rc) rc = matrix_open(f, vectors, ids, opt, shape_only, out, err);
  if (group >= 0) H5Oclose(group);
  free(dir);
  free(ids);
  return rc;
}

static vs_rc open_named(const input_h5_file *f, const char *group, const input_options *opt, input **out,
                        vs_err *err) {
  int row_ids = opt->id_dataset && !strcmp(opt->id_dataset, "none");
  if ((opt->id_dataset && !row_ids) || opt->n_columns)
    return vs_fail(err, VS_INVALID,
                   "%s: has no dataset named embedding, embeddings, vectors, vector, emb or train; one dataset "
                   "per id has its ids in the names and no metadata columns",
                   f->path);
  return input_h5_named_open(f, group, row_ids, opt->dim, out, err);
}

static vs_rc choose_layout(const input_h5_file *f, const input_options *opt, int shape_only, input **out,
                           vs_err *err) {
  const char *found;
  hid_t obj;
  int is_group;
  vs_rc rc;
  if (opt->embedding_dataset) {
    rc = input_h5_resolve(f, opt->embedding_dataset, &obj, NULL, NULL, err);
    if (rc) return rc;
    is_group = H5Iget_type(obj) == H5I_GROUP;
    H5Oclose(obj);
    return is_group ? open_named(f, opt->embedding_dataset, opt, out, err)
                    : open_with_ids(f, opt->embedding_dataset, opt, shape_only, out, err);
  }
  obj = H5Gopen2(f->id, "/", H5P_DEFAULT);
  if (obj < 0) return input_h5_fail(err, VS_CORRUPT, "%s: cannot open the root group", f->path);
  rc = find_one(f, obj, vector_names, "vectors", "--embedding-dataset", &found, err);
  if ((rc || found) && looks_named(f, obj)) {
    vs_err_reset(err);
    rc = VS_OK;
    found = NULL;
  }
  H5Oclose(obj);
  if (rc) return rc;
  return found ? open_with_ids(f, found, opt, shape_only, out, err) : open_named(f, "/", opt, out, err);
}

vs_rc input_hdf5_open(const char *path, uint64_t n_bytes, const input_options *opt, int shape_only, input **out,
                      vs_err *err) {
  input_h5_file f = {.path = path, .n_bytes = n_bytes, .id = -1};
  vs_rc rc;
  *out = NULL;
  input_h5_lock();
  rc = open_file(&f, err);
  if (!rc) rc = choose_layout(&f, opt, shape_only, out, err);
  if (rc && f.id >= 0) H5Fclose(f.id);
  input_h5_unlock();
  return rc;
}
