/* input_hdf5_named.c - the HDF5 layout "one dataset per id" (UniProt per-protein files, bio_embeddings, biotrainer).
 *
 * Every child of the group is a float dataset of the shape (D,) or (1,D); its name is the id, unless it has a string or
 * integer attribute `original_id`. Row order is the order of the names by bytes (libhdf5's name index), the same on every
 * machine.
 *
 * At opening, every dataset's header is looked at, some 12 us each (measured: 100,000 datasets in 1.2 s, HDF5 1.10, warm):
 * so an unsuitable file is refused before a build starts, and dim can be the most common length; rows of another length
 * are delivered as INPUT_DIM. Names are kept (memory grows with what the file really holds, not with what it claims).
 */
#include <stdlib.h>
#include <string.h>

#include "input_hdf5_int.h"

#define ID_ATTRIBUTE "original_id"
#define ID_BYTES_MAX ((size_t)1 << 20)

typedef struct named_input {
  input_ahead ahead; /* first */
  input_h5_file file;
  hid_t group;
  int row_ids;
  char *names; /* NUL-terminated, one after another */
  size_t names_used, names_cap;
  size_t *offs; /* of each row's name in names */
  size_t n, offs_cap;
  int list_rc; /* what stopped list_child */
  char refused[INPUT_SHOW];
} named_input;

/* A window's own: malloc'ed texts of ids, NULL where the name serves. */
typedef struct named_ids {
  size_t cap;
  char *text[];
} named_ids;

static const char *name_of(const named_input *in, uint64_t row) { return in->names + in->offs[row]; }

static int grow(void **p, size_t *cap, size_t want, size_t elem) {
  size_t n = *cap ? *cap : 1024;
  void *more;
  if (want <= *cap) return 1;
  while (n < want) n *= 2;
  more = realloc(*p, n * elem);
  if (!more) return 0;
  *p = more;
  *cap = n;
  return 1;
}

enum { LIST_NOMEM = 1, LIST_LINK };

static herr_t list_child(hid_t group, const char *name, const H5L_info_t *info, void *user) {
  named_input *in = user;
  size_t len = strlen(name) + 1;
  (void)group;
  if (info->type != H5L_TYPE_HARD) {
    in->list_rc = LIST_LINK;
    input_show(in->refused, name, len - 1);
    return -1;
  }
  if (!grow((void **)&in->offs, &in->offs_cap, in->n + 1, sizeof *in->offs) ||
      !grow((void **)&in->names, &in->names_cap, in->names_used + len, 1)) {
    in->list_rc = LIST_NOMEM;
    return -1;
  }
  memcpy(in->names + in->names_used, name, len);
  in->offs[in->n++] = in->names_used;
  in->names_used += len;
  return 0;
}

static vs_rc list_names(named_input *in, vs_err *err) {
  hsize_t from = 0;
  if (H5Literate(in->group, H5_INDEX_NAME, H5_ITER_INC, &from, list_child, in) >= 0) return VS_OK;
  if (in->list_rc == LIST_NOMEM) return vs_nomem(err);
  if (in->list_rc == LIST_LINK)
    return vs_fail(err, VS_INVALID,
                   "%s: '%s' is a link; with one dataset per id every child must be a dataset of its own",
                   in->file.path, in->refused);
  return input_h5_fail(err, VS_CORRUPT, "%s: cannot list the datasets", in->file.path);
}

/* What a user may have meant by a file that is neither layout: its first children, by name. */
static vs_rc no_layout(const named_input *in, const char *why, vs_err *err) {
  char list[400] = "", shown[INPUT_SHOW];
  for (size_t i = 0; i < in->n && i < 6 && strlen(list) + INPUT_SHOW + 8 < sizeof list; i++) {
    strcat(list, i ? ", '" : "'");
    strcat(list, input_show(shown, name_of(in, i), strlen(name_of(in, i))));
    strcat(list, "'");
  }
  return vs_fail(err, VS_INVALID,
                 "%s: no dataset named embedding, embeddings, vectors, vector, emb or train, and not one float "
                 "dataset per id either: %s. The file has %zu object(s) at this level: %s%s. Name the vectors with "
                 "--embedding-dataset",
                 in->file.path, why, in->n, list, in->n > 6 ? ", ..." : "");
}

/* Looks at one dataset. *len is the vector's length. */
static vs_rc open_row(const named_input *in, uint64_t row, input_h5_dataset *d, uint64_t *len, vs_err *err) {
  const char *name = name_of(in, row);
  char shown[INPUT_SHOW], shape[INPUT_SHOW];
  hid_t obj = H5Oopen(in->group, name, H5P_DEFAULT);
  vs_rc rc;
  d->id = d->type = -1;
  *len = 0;
  if (obj < 0)
    return input_h5_fail(err, VS_CORRUPT, "%s: cannot open '%s'", in->file.path,
                         input_show(shown, name, strlen(name)));
  rc = input_h5_dataset_take(&in->file, obj, name, d, err);
  if (rc) return rc;
  if (d->rank == 1 || (d->rank == 2 && d->dims[0] == 1)) {
    *len = d->dims[d->rank - 1];
    return VS_OK;
  }
  rc =
      vs_fail(err, VS_INVALID,
              d->rank == 2
                  ? "%s: '%s' has the shape %s. One dataset per id with a row per residue or token? "
                    "Mean-pool each to one vector first. All vectors in one dataset? Name it with --embedding-dataset"
                  : "%s: '%s' has the shape %s; a vector (D,) or (1, D) is needed",
              in->file.path, d->shown, input_h5_shape(d, shape));
  input_h5_dataset_close(d);
  return rc;
}

/* The most common length: one counter per length. */
static vs_rc choose_dim(named_input *in, vs_err *err) {
  uint32_t *count = calloc(INPUT_DIM_MAX + 1, sizeof *count);
  vs_rc rc = VS_OK;
  if (!count) return vs_nomem(err);
  for (uint64_t row = 0; row < in->n && !rc; row++) {
    input_h5_dataset d;
    input_h5_float number = {.mem = -1};
    uint64_t len;
    vs_err why = {0};
    rc = open_row(in, row, &d, &len, &why);
    if (!rc) rc = input_h5_float_type(&in->file, &d, &number, &why);
    if (number.mem >= 0) H5Tclose(number.mem);
    input_h5_dataset_close(&d);
    if (rc == VS_NOMEM || rc == VS_CORRUPT || rc == VS_UNSUPPORTED || (rc && row)) vs_fail(err, rc, "%s", why.text);
    else if (rc) rc = no_layout(in, why.text + strlen(in->file.path) + 2, err);
    else if (len && len <= INPUT_DIM_MAX) count[len]++;
  }
  for (uint32_t dim = 1; dim <= INPUT_DIM_MAX; dim++)
    if (count[dim] > (in->ahead.base.dim ? count[in->ahead.base.dim] : 0)) in->ahead.base.dim = dim;
  free(count);
  if (!rc && !in->ahead.base.dim)
    rc = vs_fail(err, VS_INVALID, "%s: no dataset has a length between 1 and %u", in->file.path, INPUT_DIM_MAX);
  return rc;
}

/* Text of the attribute original_id; *text stays NULL when there is none. The caller frees. */
static vs_rc read_attribute(const named_input *in, const input_h5_dataset *d, char **text, size_t *len, vs_err *err) {
  hid_t attr, type = -1, space = -1;
  htri_t there = H5Aexists(d->id, ID_ATTRIBUTE);
  int ok = 0;
  *text = NULL;
  if (!there) return VS_OK;
  attr = there < 0 ? -1 : H5Aopen(d->id, ID_ATTRIBUTE, H5P_DEFAULT);
  if (attr >= 0) type = H5Aget_type(attr), space = H5Aget_space(attr);
  if (type >= 0 && space >= 0 && H5Sget_simple_extent_npoints(space) == 1) {
    size_t size = H5Tget_size(type);
    H5T_class_t class = H5Tget_class(type);
    if (class == H5T_STRING && H5Tis_variable_str(type) > 0) {
      char *s = NULL;
      ok = H5Aread(attr, type, &s) >= 0;
      if (ok) {
        *len = s ? strlen(s) : 0;
        *text = s && *len <= ID_BYTES_MAX ? strdup(s) : NULL;
        if (!s) *text = calloc(1, 1);
        H5Dvlen_reclaim(type, space, H5P_DEFAULT, &s);
      }
    } else if (class == H5T_STRING && size <= ID_BYTES_MAX) {
      *text = calloc(1, size + 1);
      ok = *text && H5Aread(attr, type, *text) >= 0;
      if (ok) *len = input_h5_text_len(*text, size, H5Tget_strpad(type));
    } else if (class == H5T_INTEGER && size <= 8) {
      long long i = 0;
      ok = H5Aread(attr, H5T_NATIVE_LLONG, &i) >= 0 && asprintf(text, "%lld", i) >= 0;
      if (ok) *len = strlen(*text);
    }
  }
  if (space >= 0) H5Sclose(space);
  if (type >= 0) H5Tclose(type);
  if (attr >= 0) H5Aclose(attr);
  if (ok && *text) return VS_OK;
  free(*text);
  *text = NULL;
  return input_h5_fail(err, VS_INVALID, "%s: the attribute " ID_ATTRIBUTE " of '%s' is not one string", in->file.path,
                       d->shown);
}

/* The numbers of one open dataset, as they are stored or as libhdf5 converts them: *kind says which. */
static vs_rc read_numbers(named_input *in, const input_h5_dataset *d, const input_h5_float *number, void *out, input_num *kind,
                          vs_err *err) {
  uint8_t flags[INPUT_DIM_MAX]; /* of what counts as a row there: a number, when the dataset has one axis */
  size_t n = (size_t)d->dims[0];
  input_h5_chunks *chunks = NULL;
  vs_rc rc = VS_OK;
  *kind = number->stored;
  if (number->plain && d->contiguous) return input_pread(d->fd, d->path, out, in->ahead.base.dim * d->elem, d->data_off, err);
  input_h5_lock();
  if (number->plain) rc = input_h5_chunks_open(&in->file, d, n, 1, &in->ahead.cancel, &chunks, err);
  if (!rc && !chunks) rc = input_h5_read_rows(d, number->mem, 0, n, out, err);
  input_h5_unlock();
  if (!chunks) {
    *kind = number->as_mem;
    return rc;
  }
  rc = input_h5_chunks_read(chunks, 0, &n, NULL, out, flags, err);
  input_h5_lock();
  input_h5_chunks_close(chunks);
  input_h5_unlock();
  return rc;
}

/* Reads the vector of one open dataset of the right length; its bits to *flags. */
static vs_rc read_vector(named_input *in, const input_h5_dataset *d, float *out, uint8_t *flags, vs_err *err) {
  uint32_t dim = in->ahead.base.dim;
  input_h5_float number;
  input_num kind = INPUT_F32;
  input_h5_lock();
  vs_rc rc = input_h5_float_type(&in->file, d, &number, err);
  input_h5_unlock();
  if (rc) return rc;
  double wide[256], *tmp = dim <= 256 ? wide : malloc((size_t)dim * 8);
  rc = tmp ? read_numbers(in, d, &number, tmp, &kind, err) : vs_nomem(err);
  if (!rc) *flags |= (uint8_t)input_to_floats(kind, tmp, out, dim);
  if (tmp != wide) free(tmp);
  input_h5_lock();
  H5Tclose(number.mem);
  input_h5_unlock();
  return rc;
}

/* Row number `row` into place i of the window. */
static vs_rc read_row(named_input *in, input_window *w, uint64_t row, size_t i, vs_err *err) {
  uint32_t dim = in->ahead.base.dim;
  float *out = w->rows.vectors + i * dim;
  named_ids *ids = w->own;
  const char *text = name_of(in, row);
  input_h5_dataset d;
  uint64_t len;
  size_t n_text = strlen(text);
  uint8_t *fault = w->rows.faults + i;
  input_h5_lock();
  vs_rc rc = open_row(in, row, &d, &len, err);
  if (!rc && !in->row_ids) rc = read_attribute(in, &d, &ids->text[i], &n_text, err);
  input_h5_unlock();
  *fault = 0;
  if (!rc && ids->text[i]) text = ids->text[i];
  w->rows.ids[i] = (input_value){.type = INPUT_TEXT, .text = text, .len = n_text};
  if (in->row_ids) w->rows.ids[i] = (input_value){.type = INPUT_INT, .i = (int64_t)row};
  if (!rc && len == dim) {
    if (d.written != H5_WRITTEN_ALL) *fault = INPUT_HAS_HOLE;
    else rc = read_vector(in, &d, out, fault, err);
    if (!rc) input_judge_rows(out, dim, fault, 1);
  } else if (!rc) {
    *fault = INPUT_DIM;
    memset(out, 0, (size_t)dim * 4);
  }
  if (!rc && !in->row_ids && !input_utf8_ok(text, n_text)) {
    if (!*fault) *fault = INPUT_ID_UTF8;
    memset(out, 0, (size_t)dim * 4);
    w->rows.ids[i] = (input_value){.type = INPUT_NULL};
  }
  input_h5_lock();
  input_h5_dataset_close(&d);
  input_h5_unlock();
  return rc;
}

static void free_ids(void *own) {
  named_ids *ids = own;
  for (size_t i = 0; ids && i < ids->cap; i++) free(ids->text[i]);
  free(ids);
}

static vs_rc reserve_ids(input_window *w, size_t n, vs_err *err) {
  named_ids *ids = w->own;
  if (!ids || n > ids->cap) {
    free_ids(ids);
    w->own = ids = calloc(1, sizeof *ids + n * sizeof ids->text[0]);
    if (!ids) return vs_nomem(err);
    ids->cap = n;
  }
  for (size_t i = 0; i < ids->cap; i++) {
    free(ids->text[i]);
    ids->text[i] = NULL;
  }
  return VS_OK;
}

static vs_rc named_load(input_ahead *a, input_window *w, uint64_t row, size_t want, vs_err *err) {
  named_input *in = (named_input *)a;
  size_t n = 0;
  vs_err why = {0};
  vs_rc rc = reserve_ids(w, want, err);
  if (!rc) rc = input_rows_reserve(&w->rows, want, a->base.dim, sizeof(float), 0, err);
  if (rc) return rc;
  for (; n < want && !rc && !__atomic_load_n(&a->cancel, __ATOMIC_RELAXED); n += !rc) rc = read_row(in, w, row + n, n, &why);
  if (!n) return rc ? vs_fail(err, rc, "%s", why.text) : vs_fail(err, VS_INTERRUPT, "interrupted");
  w->row = row;
  w->n = n;
  return VS_OK;
}

/* All but libhdf5's handles. */
static void named_free(named_input *in) {
  free(in->names);
  free(in->offs);
  free((char *)in->ahead.base.path);
  free(in);
}

static void named_destroy(input_ahead *a) {
  named_input *in = (named_input *)a;
  input_h5_lock();
  H5Oclose(in->group);
  if (in->file.lookup >= 0) H5Fclose(in->file.lookup);
  H5Fclose(in->file.id);
  input_h5_unlock();
  named_free(in);
}

vs_rc input_h5_named_open(const input_h5_file *f, const char *group, int row_ids, const input_options *opt, input **out,
                          vs_err *err) {
  named_input *in = calloc(1, sizeof *in);
  vs_rc rc;
  if (!in) return vs_nomem(err);
  in->group = -1;
  in->row_ids = row_ids;
  in->file = *f;
  in->file.path = in->ahead.base.path = strdup(f->path);
  rc = in->ahead.base.path ? input_h5_resolve(f, group, &in->group, NULL, NULL, err) : vs_nomem(err);
  if (rc) goto fail;
  rc = list_names(in, err);
  if (!rc && !in->n) rc = vs_fail(err, VS_INVALID, "%s: has no datasets", f->path);
  if (!rc) rc = choose_dim(in, err);
  if (!rc && opt->dim && opt->dim != in->ahead.base.dim)
    rc = vs_fail(err, VS_INVALID, "%s: has dimension %u, not %u", f->path, in->ahead.base.dim, opt->dim);
  if (rc) goto fail;
  in->ahead.base.n_rows = in->n;
  in->ahead.base.id_kind = row_ids ? INPUT_ID_ROW : INPUT_ID_TEXT;
  in->ahead.threads = opt->threads;
  in->ahead.no_reader = !input_h5_threadsafe();
  in->ahead.window_max = INPUT_WINDOW_BYTES / ((size_t)in->ahead.base.dim * 4);
  if (in->ahead.window_max > INPUT_WINDOW_ROWS) in->ahead.window_max = INPUT_WINDOW_ROWS;
  in->ahead.load = named_load;
  in->ahead.free_own = free_ids;
  in->ahead.destroy = named_destroy;
  input_ahead_init(&in->ahead);
  *out = &in->ahead.base;
  return VS_OK;
fail:
  if (in->group >= 0) H5Oclose(in->group);
  named_free(in);
  return rc;
}
