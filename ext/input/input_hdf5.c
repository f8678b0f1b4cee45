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
 * Reading: rows are decoded into windows (input_ahead.c), whole chunks where there are chunks, and handed out in slices of what
 * the caller asks for. The first window is no larger than needed for one call, so that a caller who seeks about reads little.
 *
 * Memory of an open file, whatever it claims: two windows of at most INPUT_WINDOW_BYTES and INPUT_WINDOW_ROWS each (32 MiB;
 * twice that for doubles that libhdf5 converts), texts of variable length, 32 MiB for each window and series; for the vectors
 * what input_hdf5_chunks.c needs (<= 48 + 64 MiB unless a single chunk is larger), for ids and each column one decoded chunk;
 * libhdf5's own cache, one row of chunks (64 MiB at most), where only libhdf5 can decode.
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

/* A child must not inherit libhdf5 with one of our threads inside it. */
static void fork_prepare(void) { pthread_mutex_lock(&lock); }
static void fork_parent(void) { pthread_mutex_unlock(&lock); }
static void fork_child(void) { pthread_mutex_init(&lock, NULL); }
static void guard_fork(void) { pthread_atfork(fork_prepare, fork_parent, fork_child); }
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

void input_h5_lock(void) {
  pthread_once(&fork_once, guard_fork);
  pthread_mutex_lock(&lock);
  if (H5Eget_auto2(H5E_DEFAULT, &host_print, &host_print_data) < 0) host_print = NULL, host_print_data = NULL;
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

void input_h5_unlock(void) {
  H5Eclear2(H5E_DEFAULT); /* what lies on a thread's stack when it ends is never freed (1.10) */
  H5Eset_auto2(H5E_DEFAULT, host_print, host_print_data);
  pthread_mutex_unlock(&lock);
}

int input_h5_threadsafe(void) {
  hbool_t safe = 0;
  return H5is_library_threadsafe(&safe) >= 0 && safe;
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
  if (stack_says("close degree"))
    return vs_fail(err, VS_INVALID, "%s: this process has the file open, for writing or in another way: close it there first",
                   f->path);
  if (stack_says("truncated file"))
    return input_h5_fail(err, VS_CORRUPT, "%s: was cut at %llu bytes (an interrupted copy?)", f->path,
                         (unsigned long long)f->n_bytes);
  return input_h5_fail(err, VS_CORRUPT, "%s: damaged or cut HDF5 file of %llu bytes", f->path,
                       (unsigned long long)f->n_bytes);
}

static vs_rc open_file(input_h5_file *f, vs_err *err) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  unsigned intent = 0;
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
  /* libhdf5 shares a file within a process, with what it has not written yet; we read what is written. */
  if (!rc && (H5Fget_intent(f->id, &intent) < 0 || intent & H5F_ACC_RDWR))
    rc = vs_fail(err, VS_INVALID, "%s: this process has the file open for writing: close it there first", f->path);
  return rc;
}

/* ---- one matrix ---- */

typedef struct matrix_input {
  input_ahead ahead; /* first */
  input_h5_file file;
  input_h5_dataset vectors;
  input_h5_float number;
  input_h5_chunks *chunks;        /* of vectors; NULL: contiguous, or read by libhdf5 */
  input_h5_series *ids, *columns; /* ids: NULL for row numbers */
  input_type *types;
} matrix_input;

/* What a window's ids and columns lie in. */
typedef struct matrix_values {
  size_t n;
  input_h5_values of[]; /* ids, then the columns */
} matrix_values;

static void free_values(void *own) {
  matrix_values *v = own;
  for (size_t i = 0; v && i < v->n; i++) input_h5_values_free(&v->of[i]);
  free(v);
}

static vs_rc make_values(const matrix_input *in, input_window *w, vs_err *err) {
  size_t n = 1 + in->ahead.base.n_columns;
  matrix_values *v;
  if (w->own) return VS_OK;
  v = calloc(1, sizeof *v + n * sizeof v->of[0]);
  if (!v) return vs_nomem(err);
  v->n = n;
  w->own = v;
  return VS_OK;
}

/* Ids and columns of rows [row, row + *n). On failure, and where texts are too long, *n says how many there are. */
static vs_rc read_series(matrix_input *in, matrix_values *v, uint64_t row, size_t *n, vs_err *err) {
  vs_rc rc = VS_OK;
  if (in->ids) rc = input_h5_series_read(in->ids, &v->of[0], row, n, err);
  for (size_t c = 0; c < in->ahead.base.n_columns && *n; c++) {
    size_t m = *n;
    vs_err why = {0};
    vs_rc failed = input_h5_series_read(in->columns + c, &v->of[1 + c], row, &m, &why);
    if (m < *n && failed) { /* an earlier row than what failed before */
      if (err) vs_err_reset(err);
      rc = vs_fail(err, failed, "%s", why.text);
    } else if (m < *n) {
      rc = VS_OK;
    }
    *n = m;
  }
  return rc;
}

/* Vectors of rows [row, row + *n) and their faults. On failure *n says how many there are. */
static vs_rc read_vectors(matrix_input *in, input_window *w, uint64_t row, size_t *n, vs_err *err) {
  uint32_t dim = in->ahead.base.dim;
  float *out = w->rows.vectors;
  uint8_t *flags = w->rows.faults;
  vs_rc rc;
  if (in->chunks) {
    rc = input_h5_chunks_read(in->chunks, row, n, &in->number.stored, out, flags, err);
  } else if (in->vectors.contiguous && in->number.plain) {
    input_region r = {.fd = in->vectors.fd, .path = in->file.path, .off = in->vectors.data_off, .dim = dim,
                      .num = in->number.stored, .threads = in->ahead.threads};
    rc = input_region_read(&r, row, n, out, flags, err);
  } else {
    /* Halves are read into the upper half of the room. */
    size_t bytes = input_num_bytes(in->number.as_mem);
    const char *stored = bytes == 2 ? (char *)out + *n * dim * 2 : (char *)out;
    memset(flags, 0, *n);
    input_h5_lock();
    rc = input_h5_read_rows(&in->vectors, in->number.mem, row, *n, (void *)stored, err);
    if (!rc) input_h5_find_holes(&in->vectors, row, *n, flags);
    input_h5_unlock();
    if (rc) *n = 0;
    for (size_t i = 0; i < *n; i++)
      flags[i] |= (uint8_t)input_to_floats(in->number.as_mem, stored + i * dim * bytes, out + i * dim, dim);
  }
  input_judge_rows(out, dim, flags, *n);
  return rc;
}

/* Values of the rows from what was read. On failure *n says how many there are. */
static vs_rc load_values(matrix_input *in, input_window *w, uint64_t row, size_t *n, vs_err *err) {
  size_t n_columns = in->ahead.base.n_columns;
  uint32_t dim = in->ahead.base.dim;
  const matrix_values *v = w->own;
  for (size_t i = 0; i < *n; i++) {
    input_value *id = w->rows.ids + i;
    input_fault fault = INPUT_FINE;
    if (in->ids) fault = input_h5_series_value(in->ids, &v->of[0], i, id);
    else *id = (input_value){.type = INPUT_INT, .i = (int64_t)(row + i)};
    if (fault && !w->rows.faults[i]) {
      w->rows.faults[i] = (uint8_t)fault;
      memset(w->rows.vectors + i * dim, 0, (size_t)dim * 4);
    }
    for (size_t c = 0; c < n_columns; c++) {
      fault = input_h5_series_value(in->columns + c, &v->of[1 + c], i, w->rows.columns + i * n_columns + c);
      if (fault != INPUT_OVERFLOW && fault != INPUT_ID_UTF8) continue;
      *n = i;
      return vs_fail(err, VS_INVALID, "%s: row %llu of '%s' %s", in->file.path, (unsigned long long)(row + i),
                     in->columns[c].ds.shown,
                     fault == INPUT_OVERFLOW ? "is above 2^63-1: store the column as strings"
                                             : "is not valid UTF-8, or has an embedded NUL");
    }
  }
  return VS_OK;
}

/* Rows [row, row + *n), or fewer with the reason why. */
static vs_rc load_rows(matrix_input *in, input_window *w, uint64_t row, size_t *n, vs_err *err) {
  size_t room = in->chunks || (in->vectors.contiguous && in->number.plain) ? 4 : input_num_bytes(in->number.as_mem);
  vs_err why[3] = {{0}, {0}, {0}};
  vs_rc rc[3];
  if (room < 4) room = 4;
  rc[0] = make_values(in, w, err);
  if (!rc[0]) rc[0] = input_rows_reserve(&w->rows, *n, in->ahead.base.dim, room, in->ahead.base.n_columns, err);
  if (rc[0]) {
    *n = 0;
    return rc[0];
  }
  /* Each step may end before the one before it; the last that did says why. */
  rc[0] = read_series(in, w->own, row, n, &why[0]);
  rc[1] = *n ? read_vectors(in, w, row, n, &why[1]) : VS_OK;
  rc[2] = *n ? load_values(in, w, row, n, &why[2]) : VS_OK;
  for (int i = 2; i >= 0; i--)
    if (rc[i]) return vs_fail(err, rc[i], "%s", why[i].text);
  return VS_OK;
}

static vs_rc matrix_load(input_ahead *a, input_window *w, uint64_t row, size_t want, vs_err *err) {
  matrix_input *in = (matrix_input *)a;
  uint64_t from = row;
  size_t n = want, got;
  vs_err why = {0};
  vs_rc rc;
  int whole = in->chunks ? input_h5_chunks_whole(in->chunks) : in->vectors.filtered;
  /* Chunks that are too tall for the window, and not held either, are decoded once per window: then make it a full one. */
  if (whole && in->vectors.chunk[0] > a->window_max) n = a->window_max;
  if (n > a->base.n_rows - row) n = (size_t)(a->base.n_rows - row);
  if (whole)
    input_h5_align(&in->vectors, a->base.n_rows, a->window_max, &from, &n);
  got = n;
  rc = load_rows(in, w, from, &got, &why);
  if (from + got <= row && from < row) { /* something before the row that is wanted: not now */
    vs_err_reset(&why);
    n = got = n - (size_t)(row - from);
    from = row;
    rc = load_rows(in, w, from, &got, &why);
  }
  if (rc && !got) return vs_fail(err, rc, "%s", why.text);
  w->row = from;
  w->n = got;
  return VS_OK;
}

/* All but the file, with the lock held. */
static void matrix_free(matrix_input *in) {
  input_h5_chunks_close(in->chunks);
  if (in->ids) input_h5_series_close(in->ids);
  for (size_t c = 0; in->columns && c < in->ahead.base.n_columns; c++) input_h5_series_close(in->columns + c);
  if (in->number.mem >= 0) H5Tclose(in->number.mem);
  input_h5_dataset_close(&in->vectors);
  if (in->file.lookup >= 0) H5Fclose(in->file.lookup);
  free(in->ids);
  free(in->columns);
  free(in->types);
  free((char *)in->ahead.base.path);
  free(in);
}

static void matrix_destroy(input_ahead *a) {
  matrix_input *in = (matrix_input *)a;
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
  input *base = &in->ahead.base;
  in->columns = calloc(opt->n_columns + 1, sizeof *in->columns);
  in->types = calloc(opt->n_columns + 1, sizeof *in->types);
  if (!in->columns || !in->types) return vs_nomem(err);
  base->column_types = in->types;
  for (size_t c = 0; c < opt->n_columns; c++) {
    input_h5_series *s = in->columns + c;
    vs_rc rc = input_h5_series_open(&in->file, opt->columns[c], 0, &in->ahead.cancel, s, err);
    if (rc) return rc;
    base->n_columns = c + 1; /* what matrix_free closes */
    in->types[c] = input_h5_series_type(s);
    if (s->ds.dims[0] != base->n_rows)
      return vs_fail(err, VS_INVALID, "%s: '%s' has %llu rows but the column '%s' has %llu", in->file.path,
                     in->vectors.shown, (unsigned long long)base->n_rows, s->ds.shown, (unsigned long long)s->ds.dims[0]);
  }
  return VS_OK;
}

/* Rows that fit a window: vectors, ids and columns as they are stored and as they are delivered. */
static size_t window_rows(const matrix_input *in) {
  size_t n_columns = in->ahead.base.n_columns, row = (size_t)in->ahead.base.dim * (in->number.as_mem == INPUT_F64 ? 8 : 4), n;
  if (in->ids) row += in->ids->elem;
  for (size_t c = 0; c < n_columns; c++) row += in->columns[c].elem;
  row += sizeof(input_value) * (1 + n_columns);
  n = INPUT_WINDOW_BYTES / row;
  return n < 1 ? 1 : n > INPUT_WINDOW_ROWS ? INPUT_WINDOW_ROWS : n;
}

/* Some ids have to be looked at before their kind is known. Reading takes the lock itself. */
static vs_rc look_at_ids(matrix_input *in, vs_err *err) {
  input_h5_unlock();
  vs_rc rc = input_h5_series_exceeds(in->ids, &in->ids->as_text, err);
  input_h5_lock();
  return rc;
}

/* vectors and ids are names inside the file; ids NULL: row numbers. */
static vs_rc matrix_open(const input_h5_file *f, const char *vectors, const char *ids, const input_options *opt,
                         int shape_only, input **out, vs_err *err) {
  matrix_input *in = calloc(1, sizeof *in);
  input *base;
  vs_rc rc;
  if (!in) return vs_nomem(err);
  base = &in->ahead.base;
  in->number.mem = in->vectors.id = in->vectors.type = -1;
  in->file = *f;
  in->file.path = base->path = strdup(f->path);
  rc = base->path ? input_h5_dataset_open(&in->file, vectors, &in->vectors, err) : vs_nomem(err);
  if (!rc) rc = input_h5_float_type(&in->file, &in->vectors, &in->number, err);
  if (!rc && ids) {
    in->ids = calloc(1, sizeof *in->ids);
    if (in->ids) in->ids->mem = in->ids->ds.id = in->ids->ds.type = -1;
    rc = in->ids ? input_h5_series_open(&in->file, ids, 1, &in->ahead.cancel, in->ids, err) : vs_nomem(err);
  }
  if (!rc) rc = check_shape(in, in->ids ? in->ids->ds.dims[0] : 0, opt->dim, err);
  if (rc) goto fail;
  base->n_rows = in->vectors.dims[0];
  base->dim = (uint32_t)in->vectors.dims[1];
  rc = open_columns(in, opt, err);
  if (!rc && in->ids && !shape_only) rc = look_at_ids(in, err);
  if (rc) goto fail;
  base->id_kind = !in->ids                                      ? INPUT_ID_ROW
                  : input_h5_series_type(in->ids) == INPUT_TEXT ? INPUT_ID_TEXT
                                                                : INPUT_ID_INT;
  in->ahead.threads = opt->threads;
  in->ahead.no_reader = !input_h5_threadsafe();
  in->ahead.window_max = window_rows(in);
  in->ahead.load = matrix_load;
  in->ahead.free_own = free_values;
  in->ahead.destroy = matrix_destroy;
  input_ahead_init(&in->ahead);
  if (in->number.plain)
    rc = input_h5_chunks_open(&in->file, &in->vectors, in->ahead.window_max, in->ahead.threads, &in->ahead.cancel,
                              &in->chunks, err);
  if (rc) goto fail;
  *out = base;
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
  return input_h5_named_open(f, group, row_ids, opt, out, err);
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
  input_h5_file f = {.path = path, .n_bytes = n_bytes, .id = -1, .lookup = -1};
  vs_rc rc;
  *out = NULL;
  input_h5_lock();
  rc = open_file(&f, err);
  if (!rc) rc = choose_layout(&f, opt, shape_only, out, err);
  if (rc && f.id >= 0) H5Fclose(f.id);
  input_h5_unlock();
  return rc;
}
