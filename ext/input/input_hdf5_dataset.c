/* input_hdf5_dataset.c - opens one dataset of an HDF5 file that may be hostile, and reads its rows.
 *
 * What libhdf5 would do by itself and we do not let it:
 *   external links, user-defined links   open other files: the path is walked link by link and such a link is refused
 *   external storage                     raw data from any local file: refused from the creation properties
 *   virtual datasets                     the same through source datasets; libhdf5 opens sources when the space is asked
 *                                        for, so the layout is looked at before that
 * Missing filters are named here, because libhdf5's own error names them only for the first chunk read.
 *
 * Chunks with filters that only libhdf5 can undo: reading part of one decodes all of it, so libhdf5 gets a cache that holds
 * one row of chunks (CACHE_MAX at most); sequential reading then decodes each chunk once. All others go past libhdf5's cache,
 * see input_hdf5_chunks.c.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "input_hdf5_int.h"

/* Chains of soft links longer than this are loops; libhdf5's own limit is 16 as well. */
#define SOFT_LINKS_MAX 16
#define LINK_VALUE_MAX 4096
/* Largest row of chunks worth keeping decoded; beyond, chunks are decoded again for each window of rows. */
#define CACHE_MAX ((uint64_t)64 << 20)
#define CACHE_DEFAULT ((uint64_t)1 << 20)
/* libhdf5 allocates a filtered chunk whole; this bounds what a small file can ask for. */
#define CHUNK_BYTES_MAX ((uint64_t)512 << 20)

static vs_rc refuse_link(const input_h5_file *f, hid_t group, const char *name, H5L_type_t type, const char *asked,
                         vs_err *err) {
  char shown[INPUT_SHOW], target[INPUT_SHOW] = "?";
  char value[LINK_VALUE_MAX];
  input_show(shown, asked, strlen(asked));
  if (type != H5L_TYPE_EXTERNAL)
    return vs_fail(err, VS_INVALID, "%s: '%s' leads through a user-defined link: refused", f->path, shown);
  memset(value, 0, sizeof value);
  if (H5Lget_val(group, name, value, sizeof value - 1, H5P_DEFAULT) >= 0)
    /* one byte of flags and version, then the file name */
    input_show(target, value + 1, strnlen(value + 1, sizeof value - 2));
  return vs_fail(err, VS_INVALID,
                 "%s: '%s' leads through an external link into '%s': refused, a file must hold its own data "
                 "(copy it with h5repack or h5copy)",
                 f->path, shown, target);
}

/* Puts the soft link's value before what remains of the path. */
static vs_rc splice_soft_link(const input_h5_file *f, hid_t group, const char *name, const H5L_info_t *info,
                              char **path, char **rest, const char *asked, char link[INPUT_SHOW], vs_err *err) {
  char shown[INPUT_SHOW];
  size_t n = info->u.val_size, n_rest = strlen(*rest);
  char *joined;
  if (!n || n > LINK_VALUE_MAX)
    return vs_corrupt(err, "%s: '%s': a soft link of %zu bytes", f->path, input_show(shown, asked, strlen(asked)), n);
  joined = calloc(1, n + n_rest + 2);
  if (!joined) return vs_nomem(err);
  if (H5Lget_val(group, name, joined, n, H5P_DEFAULT) < 0) {
    free(joined);
    return input_h5_fail(err, VS_CORRUPT, "%s: cannot read the soft link '%s'", f->path,
                         input_show(shown, asked, strlen(asked)));
  }
  input_show(link, joined, strlen(joined));
  strcat(joined, "/");
  strcat(joined, *rest);
  free(*path);
  *path = *rest = joined;
  return VS_OK;
}

static vs_rc no_such_object(const input_h5_file *f, const char *asked, const char *link, vs_err *err) {
  char shown[INPUT_SHOW];
  input_show(shown, asked, strlen(asked));
  if (*link)
    return vs_fail(err, VS_INVALID, "%s: '%s' is a soft link to '%s', which does not exist", f->path, shown, link);
  return vs_fail(err, VS_INVALID, "%s: has no object '%s'", f->path, shown);
}

vs_rc input_h5_resolve(const input_h5_file *f, const char *name, hid_t *obj, hid_t *parent, char **last,
                       vs_err *err) {
  char shown[INPUT_SHOW], link[INPUT_SHOW] = "";
  char *path = strdup(name), *rest = path, *tail = NULL;
  hid_t cur = H5Gopen2(f->id, "/", H5P_DEFAULT), up = -1;
  int soft_links = 0;
  vs_rc rc = VS_OK;
  *obj = -1;
  if (parent) *parent = -1, *last = NULL;
  input_show(shown, name, strlen(name));
  if (!path) rc = vs_nomem(err);
  else if (cur < 0) rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot open the root group", f->path);
  while (!rc) {
    H5L_info_t info;
    size_t n;
    char *part;
    rest += strspn(rest, "/");
    if (!*rest) break;
    part = rest;
    n = strcspn(part, "/");
    rest = part + n;
    if (*rest) *rest++ = 0;
    if (!strcmp(part, ".")) continue;
    if (H5Iget_type(cur) != H5I_GROUP) {
      rc = no_such_object(f, name, link, err);
    } else if (H5Lget_info(cur, part, &info, H5P_DEFAULT) < 0) {
      rc = no_such_object(f, name, link, err);
    } else if (info.type == H5L_TYPE_HARD) {
      hid_t next = H5Oopen(cur, part, H5P_DEFAULT);
      if (next < 0) rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot open '%s'", f->path, shown);
      if (up >= 0) H5Oclose(up);
      up = cur;
      cur = next;
      free(tail);
      tail = rc ? NULL : strdup(part);
      if (!rc && !tail) rc = vs_nomem(err);
    } else if (info.type == H5L_TYPE_SOFT) {
      if (++soft_links > SOFT_LINKS_MAX) {
        rc = vs_corrupt(err, "%s: '%s' leads through more than %d soft links (a loop?)", f->path, shown,
                        SOFT_LINKS_MAX);
        break;
      }
      rc = splice_soft_link(f, cur, part, &info, &path, &rest, name, link, err);
      if (rc) break;
      if (*path == '/') {
        H5Oclose(cur);
        cur = H5Gopen2(f->id, "/", H5P_DEFAULT);
        if (cur < 0) rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot open the root group", f->path);
      }
    } else {
      rc = refuse_link(f, cur, part, info.type, name, err);
    }
  }
  free(path);
  if (!rc && parent && tail) {
    *parent = up;
    *last = tail;
    up = -1;
    tail = NULL;
  }
  free(tail);
  if (up >= 0) H5Oclose(up);
  if (rc && cur >= 0) H5Oclose(cur);
  else if (!rc) *obj = cur;
  return rc;
}

const char *input_h5_shape(const input_h5_dataset *d, char out[INPUT_SHOW]) {
  int at = snprintf(out, INPUT_SHOW, "(");
  for (int i = 0; i < d->rank && at < INPUT_SHOW - 28; i++)
    at += snprintf(out + at, (size_t)(INPUT_SHOW - at), "%s%llu", i ? ", " : "", (unsigned long long)d->dims[i]);
  snprintf(out + at, (size_t)(INPUT_SHOW - at), d->rank == 1 ? ",)" : ")");
  return out;
}

static const struct {
  H5Z_filter_t id;
  const char *name;
} known_filters[] = {{H5Z_FILTER_SZIP, "szip"}, {307, "bzip2"}, {32000, "lzf"},  {32001, "blosc"}, {32004, "lz4"},
                     {32008, "bitshuffle"},     {32013, "zfp"}, {32015, "zstd"}, {32017, "sz"},    {32026, "blosc2"}};

static vs_rc check_filters(const input_h5_file *f, hid_t props, input_h5_dataset *d, vs_err *err) {
  int n = H5Pget_nfilters(props);
  d->filtered = n > 0;
  for (int i = 0; i < n; i++) {
    unsigned flags, config = 0;
    size_t n_values = 0;
    char own[64] = "", shown[INPUT_SHOW];
    const char *name = own;
    H5Z_filter_t id = H5Pget_filter2(props, (unsigned)i, &flags, &n_values, NULL, sizeof own - 1, own, &config);
    if (id < 0) return input_h5_fail(err, VS_CORRUPT, "%s: cannot read the filters of '%s'", f->path, d->shown);
    if (H5Zfilter_avail(id) > 0 && H5Zget_filter_info(id, &config) >= 0 &&
        (config & H5Z_FILTER_CONFIG_DECODE_ENABLED))
      continue;
    own[sizeof own - 1] = 0;
    for (size_t k = 0; k < sizeof known_filters / sizeof *known_filters; k++)
      if (known_filters[k].id == id) name = known_filters[k].name;
    return vs_fail(err, VS_UNSUPPORTED,
                   "%s: '%s' is stored with filter %d (%s), which this libhdf5 does not have: point "
                   "HDF5_PLUGIN_PATH to it, or rewrite the file with `h5repack -f GZIP=4`",
                   f->path, d->shown, (int)id, *name ? input_show(shown, name, strlen(name)) : "unnamed");
  }
  return VS_OK;
}

/* From the creation properties, before libhdf5 looks at the data: where it lies and how it is packed. */
static vs_rc check_storage(const input_h5_file *f, input_h5_dataset *d, int *contiguous, vs_err *err) {
  hid_t props = H5Dget_create_plist(d->id);
  H5D_layout_t layout;
  vs_rc rc = VS_OK;
  *contiguous = 0;
  if (props < 0) return input_h5_fail(err, VS_CORRUPT, "%s: cannot read the properties of '%s'", f->path, d->shown);
  layout = H5Pget_layout(props);
  if (layout == H5D_VIRTUAL)
    rc = vs_fail(err, VS_INVALID,
                 "%s: '%s' is a virtual dataset, whose data lies in other files: refused; copy it into one "
                 "file first",
                 f->path, d->shown);
  else if (H5Pget_external_count(props) != 0)
    rc = vs_fail(err, VS_INVALID,
                 "%s: '%s' has external storage, its data lies in other files: refused; copy it into one "
                 "file with h5repack first",
                 f->path, d->shown);
  else if (layout == H5D_CHUNKED) {
    hsize_t chunk[H5S_MAX_RANK] = {0};
    int rank = H5Pget_chunk(props, H5S_MAX_RANK, chunk);
    if (rank < 1) rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot read the chunk shape of '%s'", f->path, d->shown);
    for (int i = 0; i < rank && i < 2; i++) d->chunk[i] = chunk[i];
    if (!rc) rc = check_filters(f, props, d, err);
  } else {
    *contiguous = layout == H5D_CONTIGUOUS;
  }
  H5Pclose(props);
  return rc;
}

static uint64_t chunks_along(const input_h5_dataset *d, int axis) {
  return d->dims[axis] ? (d->dims[axis] - 1) / d->chunk[axis] + 1 : 0;
}

static herr_t says_not_allocated(unsigned n, const H5E_error2_t *e, void *unused) {
  (void)n, (void)unused;
  return e->desc && strstr(e->desc, "not allocated") != NULL;
}

/* 1.10 fails for a chunk without storage, and says why; later versions say 0 bytes. */
int input_h5_chunk_size(hid_t dataset, const hsize_t at[2], hsize_t *n_bytes) {
  *n_bytes = 0;
  if (H5Dget_chunk_storage_size(dataset, at, n_bytes) >= 0) return *n_bytes > 0;
  return H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, says_not_allocated, NULL) > 0 ? 0 : -1;
}

/* The first chunk's size as the layout has it; 1 also when that chunk was never written. */
static int chunk_size_agrees(const input_h5_dataset *d, uint64_t want) {
  hsize_t at[2] = {0, 0}, n = 0;
  return input_h5_chunk_size(d->id, at, &n) <= 0 || n == want;
}

/* How much of the dataset's claimed extent has storage. The number of elements is known to be below 2^55 here. */
static vs_rc check_extent(const input_h5_file *f, input_h5_dataset *d, hid_t space, int contiguous, vs_err *err) {
  uint64_t size = d->elem, n = d->dims[0] * (d->rank == 2 ? d->dims[1] : 1);
  d->written = H5_WRITTEN_ALL;
  if (!n) return VS_OK;
  if (d->chunk[0]) {
    uint64_t want = chunks_along(d, 0) * (d->rank == 2 ? chunks_along(d, 1) : 1);
    uint64_t bytes = size * d->chunk[0]; /* each below 2^32 in the format */
    hsize_t have = 0;
    if (d->rank == 2 && bytes <= UINT32_MAX) bytes *= d->chunk[1];
    if (d->filtered && bytes > CHUNK_BYTES_MAX)
      return vs_fail(err, VS_UNSUPPORTED,
                     "%s: '%s' is compressed in chunks of more than %llu MiB, each of which would have to "
                     "be held in memory: rewrite it with `h5repack -l %s:CHUNK=1024x...`",
                     f->path, d->shown, (unsigned long long)(CHUNK_BYTES_MAX >> 20), d->shown);
    if (H5Dget_num_chunks(d->id, space, &have) < 0)
      return input_h5_fail(err, VS_CORRUPT, "%s: cannot read the chunk index of '%s'", f->path, d->shown);
    /* libhdf5 1.10 trusts the size in the layout message, which need not agree with shape and type. (For filtered chunks
     * there is no way to ask for it.) */
    if (have && !d->filtered && !chunk_size_agrees(d, bytes))
      return vs_corrupt(err, "%s: the chunk size of '%s' does not agree with its shape", f->path, d->shown);
    d->written = !have ? H5_WRITTEN_NONE : have < want ? H5_WRITTEN_PART : H5_WRITTEN_ALL;
  } else if (contiguous) {
    haddr_t at = H5Dget_offset(d->id);
    if (at == HADDR_UNDEF) d->written = H5_WRITTEN_NONE;
    else if (H5Dget_storage_size(d->id) / size < n)
      return vs_corrupt(err, "%s: the storage of '%s' is smaller than its shape needs", f->path, d->shown);
    else if (at > f->n_bytes || n > (f->n_bytes - at) / size)
      return vs_corrupt(err,
                        "%s: '%s' needs %llu x %llu bytes from byte %llu on, but the file has %llu bytes: it was cut",
                        f->path, d->shown, (unsigned long long)n, (unsigned long long)size, (unsigned long long)at,
                        (unsigned long long)f->n_bytes);
    else {
      d->contiguous = d->fd >= 0;
      d->data_off = at;
    }
  } else if (H5Dget_storage_size(d->id) / size < n) { /* compact: inside the object header */
    return vs_corrupt(err, "%s: the storage of '%s' is smaller than its shape needs", f->path, d->shown);
  }
  return VS_OK;
}

vs_rc input_h5_dataset_take(const input_h5_file *f, hid_t obj, const char *name, input_h5_dataset *d, vs_err *err) {
  hid_t space = -1;
  int contiguous;
  void *fd = NULL;
  vs_rc rc;
  memset(d, 0, sizeof *d);
  d->id = obj;
  d->type = -1;
  d->path = f->path;
  d->n_bytes = f->n_bytes;
  d->fd = H5Fget_vfd_handle(f->id, H5P_DEFAULT, &fd) >= 0 && fd ? *(int *)fd : -1;
  input_show(d->shown, name, strlen(name));
  if (H5Iget_type(obj) != H5I_DATASET) {
    rc = vs_fail(err, VS_INVALID, "%s: '%s' is a %s, not a dataset", f->path, d->shown,
                 H5Iget_type(obj) == H5I_GROUP ? "group" : "named type");
    goto fail;
  }
  rc = check_storage(f, d, &contiguous, err);
  if (rc) goto fail;
  space = H5Dget_space(obj);
  d->type = H5Dget_type(obj);
  if (space < 0 || d->type < 0) {
    rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot read the shape and type of '%s'", f->path, d->shown);
    goto fail;
  }
  d->class = H5Tget_class(d->type);
  /* A string of variable length is a reference in the file, of 16 bytes, whatever its size in memory. */
  d->elem = d->class == H5T_STRING && H5Tis_variable_str(d->type) > 0 ? 16 : H5Tget_size(d->type);
  if (!d->elem) {
    rc = vs_corrupt(err, "%s: '%s' has elements of 0 bytes", f->path, d->shown);
    goto fail;
  }
  if (H5Sget_simple_extent_type(space) == H5S_NULL) {
    rc = vs_fail(err, VS_INVALID, "%s: '%s' is empty (a null dataspace)", f->path, d->shown);
    goto fail;
  }
  d->rank = H5Sget_simple_extent_ndims(space);
  if (d->rank < 0 || (d->rank > 0 && H5Sget_simple_extent_dims(space, d->dims, NULL) < 0)) {
    rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot read the shape of '%s'", f->path, d->shown);
    goto fail;
  }
  /* Shapes that nobody will read need no further look; for the rest, bound the products below. */
  if (d->rank < 1 || d->rank > 2 || (d->chunk[0] && d->rank == 2 && !d->chunk[1])) d->chunk[0] = d->chunk[1] = 0;
  else if (d->dims[0] > INPUT_ROWS_MAX || (d->rank == 2 && d->dims[1] > INPUT_ROWS_MAX) ||
           (d->rank == 2 && d->dims[0] > INPUT_DIM_MAX && d->dims[1] > INPUT_DIM_MAX) ||
           d->elem > 1 << 20) {
    char shape[INPUT_SHOW];
    rc = vs_fail(err, VS_INVALID,
                 "%s: '%s' claims the shape %s of elements of %zu bytes: more than can be read (dimension up "
                 "to %u)",
                 f->path, d->shown, input_h5_shape(d, shape), d->elem, INPUT_DIM_MAX);
    goto fail;
  } else {
    rc = check_extent(f, d, space, contiguous, err);
    if (rc) goto fail;
  }
  H5Sclose(space);
  return VS_OK;
fail:
  if (space >= 0) H5Sclose(space);
  input_h5_dataset_close(d);
  return rc;
}

vs_rc input_h5_dataset_open(const input_h5_file *f, const char *name, input_h5_dataset *d, vs_err *err) {
  hid_t obj, parent;
  char *last;
  uint64_t band = 0;
  int no_cache;
  vs_rc rc;
  d->id = d->type = -1;
  rc = input_h5_resolve(f, name, &obj, &parent, &last, err);
  if (rc) return rc;
  rc = input_h5_dataset_take(f, obj, name, d, err);
  if (!rc && d->chunk[0] && d->filtered && (d->rank == 1 || d->dims[1] <= INPUT_DIM_MAX))
    band = d->chunk[0] * d->elem * (d->rank == 2 ? d->chunk[1] * chunks_along(d, 1) : 1);
  /* A chunk that was never written is made up by libhdf5 when read, and from then on, while it is cached, looks as if it had
   * storage (1.10). So a dataset with holes gets no cache. */
  no_cache = !rc && d->written == H5_WRITTEN_PART;
  if (!rc && last && (no_cache || (band > CACHE_DEFAULT / 2 && band <= CACHE_MAX))) {
    /* libhdf5 takes the cache's size only while opening. Slots are a hash table: a prime well above one row of chunks. */
    hid_t access = H5Pcreate(H5P_DATASET_ACCESS), again = -1;
    size_t n_bytes = no_cache ? 0 : (size_t)band + (size_t)(band >> 2);
    H5Dclose(d->id);
    if (access >= 0 && H5Pset_chunk_cache(access, 4099, n_bytes, 1.0) >= 0) again = H5Dopen2(parent, last, access);
    if (access >= 0) H5Pclose(access);
    d->id = again;
    if (again < 0) rc = input_h5_fail(err, VS_IO, "%s: cannot open '%s' again", f->path, d->shown);
    if (rc) input_h5_dataset_close(d);
  }
  if (parent >= 0) H5Oclose(parent);
  free(last);
  return rc;
}

void input_h5_dataset_close(input_h5_dataset *d) {
  if (d->type >= 0) H5Tclose(d->type);
  if (d->id >= 0) H5Oclose(d->id);
  d->type = d->id = -1;
}

static int is_half(hid_t type) {
  size_t sign, exp_at, exp_n, frac_at, frac_n;
  return H5Tget_size(type) == 2 && H5Tget_fields(type, &sign, &exp_at, &exp_n, &frac_at, &frac_n) >= 0 &&
         sign == 15 && exp_at == 10 && exp_n == 5 && frac_at == 0 && frac_n == 10 && H5Tget_ebias(type) == 15 &&
         H5Tget_norm(type) == H5T_NORM_IMPLIED;
}

static int is_type(hid_t type, hid_t wanted) { return H5Tequal(type, wanted) > 0; }

vs_rc input_h5_float_type(const input_h5_file *f, const input_h5_dataset *d, input_h5_float *t, vs_err *err) {
  size_t size = H5Tget_size(d->type);
  t->mem = -1;
  t->plain = 1;
  switch (d->class) {
  case H5T_FLOAT: break;
  case H5T_INTEGER:
  case H5T_ENUM:
  case H5T_BITFIELD:
    return vs_fail(err, VS_INVALID,
                   "%s: '%s' holds %zu-byte integers, not floats%s: convert it to float32 if they are the "
                   "vectors",
                   f->path, d->shown, size, size == 2 ? " (bfloat16 bits stored as uint16?)" : "");
  case H5T_STRING:
    return vs_fail(err, VS_INVALID, "%s: '%s' holds strings, not floats: parse them to float32 first", f->path,
                   d->shown);
  case H5T_COMPOUND:
    return vs_fail(err, VS_INVALID,
                   "%s: '%s' is a compound table: write its vectors and ids as two datasets, 'embedding' "
                   "and 'id'",
                   f->path, d->shown);
  case H5T_VLEN:
    return vs_fail(err, VS_INVALID, "%s: '%s' holds lists of varying length: write a (rows, dimension) float dataset",
                   f->path, d->shown);
  default:
    return vs_fail(err, VS_INVALID, "%s: '%s' has an element type that is not a float: write float32", f->path,
                   d->shown);
  }
  if (is_half(d->type)) {
    /* Only the byte order is left to libhdf5: its own half conversion takes some 70 ns a number (1.10). */
    t->stored = H5Tget_order(d->type) == H5T_ORDER_BE ? INPUT_F16_BE : INPUT_F16;
    t->as_mem = INPUT_F16;
    t->mem = H5Tcopy(d->type);
    if (t->mem >= 0 && H5Tset_order(t->mem, H5T_ORDER_LE) < 0) {
      H5Tclose(t->mem);
      t->mem = -1;
    }
  } else if (size <= 4) {
    t->plain = is_type(d->type, H5T_IEEE_F32LE) || is_type(d->type, H5T_IEEE_F32BE);
    t->stored = is_type(d->type, H5T_IEEE_F32BE) ? INPUT_F32_BE : INPUT_F32;
    t->as_mem = INPUT_F32;
    t->mem = H5Tcopy(H5T_NATIVE_FLOAT);
  } else if (size <= 8) {
    t->plain = is_type(d->type, H5T_IEEE_F64LE) || is_type(d->type, H5T_IEEE_F64BE);
    t->stored = is_type(d->type, H5T_IEEE_F64BE) ? INPUT_F64_BE : INPUT_F64;
    t->as_mem = INPUT_F64;
    t->mem = H5Tcopy(H5T_NATIVE_DOUBLE);
  } else {
    return vs_fail(err, VS_INVALID, "%s: '%s' holds %zu-byte floats; float16, float32 or float64 are needed", f->path,
                   d->shown, size);
  }
  if (t->mem < 0) return input_h5_fail(err, VS_NOMEM, "%s: cannot make a memory type for '%s'", f->path, d->shown);
  return VS_OK;
}

/* Contiguous data needs libhdf5 for the conversion only. Its own read trusts the layout message (1.10: a changed byte there
 * made it read outside its buffers), while offset and size were checked here. `mem` is never narrower than the file's type. */
static vs_rc read_contiguous(const input_h5_dataset *d, hid_t mem, uint64_t row, size_t n, void *out, vs_err *err) {
  size_t per_row = d->rank == 2 ? (size_t)d->dims[1] : 1, size = H5Tget_size(d->type);
  vs_rc rc = input_pread(d->fd, d->path, out, n * per_row * size, d->data_off + row * per_row * size, err);
  if (!rc && H5Tequal(d->type, mem) <= 0 && H5Tconvert(d->type, mem, n * per_row, out, NULL, H5P_DEFAULT) < 0)
    rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot convert rows of '%s'", d->path, d->shown);
  return rc;
}

vs_rc input_h5_read_rows(const input_h5_dataset *d, hid_t mem, uint64_t row, size_t n, void *out, vs_err *err) {
  hsize_t start[2] = {row, 0}, count[2] = {n, d->rank == 2 ? d->dims[1] : 1};
  hid_t space, room;
  vs_rc rc;
  int failed;
  if (d->contiguous) return read_contiguous(d, mem, row, n, out, err);
  space = H5Dget_space(d->id);
  room = H5Screate_simple(d->rank, count, NULL);
  failed = space < 0 || room < 0 || H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
           H5Dread(d->id, mem, room, space, H5P_DEFAULT, out) < 0;
  rc = !failed ? VS_OK
               : input_h5_fail(err, VS_CORRUPT, "%s: cannot read rows %llu to %llu of '%s'", d->path,
                               (unsigned long long)row, (unsigned long long)(row + n - 1), d->shown);
  if (space >= 0) H5Sclose(space);
  if (room >= 0) H5Sclose(room);
  return rc;
}

void input_h5_find_holes(const input_h5_dataset *d, uint64_t row, size_t n, uint8_t *flags) {
  if (d->written == H5_WRITTEN_NONE) memset(flags, INPUT_HAS_HOLE, n);
  if (d->written != H5_WRITTEN_PART) return;
  for (uint64_t band = row / d->chunk[0]; band <= (row + n - 1) / d->chunk[0]; band++) {
    int hole = 0;
    uint64_t first = band * d->chunk[0], end = first + d->chunk[0];
    for (uint64_t c = 0, m = d->rank == 2 ? chunks_along(d, 1) : 1; c < m && !hole; c++) {
      hsize_t at[2] = {first, c * d->chunk[1]}, n_bytes;
      hole = input_h5_chunk_size(d->id, at, &n_bytes) <= 0;
    }
    if (!hole) continue;
    if (first < row) first = row;
    if (end > row + n) end = row + n;
    memset(flags + (first - row), INPUT_HAS_HOLE, (size_t)(end - first));
  }
}

void input_h5_align(const input_h5_dataset *d, uint64_t n_rows, size_t max_rows, uint64_t *row, size_t *n) {
  uint64_t chunk = d->chunk[0], first, end;
  if (!chunk || chunk > max_rows) return;
  first = *row / chunk * chunk;
  end = (*row + *n + chunk - 1) / chunk * chunk;
  if (end > n_rows) end = n_rows;
  if (end - first > max_rows) end = first + max_rows / chunk * chunk;
  *row = first;
  *n = (size_t)(end - first);
}
