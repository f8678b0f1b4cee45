/* input_hdf5_vlen.c - variable-length strings of a 1-D HDF5 dataset, read past libhdf5's own conversion.
 *
 * Why not H5Dread: libhdf5 1.10 believes the sizes inside a global heap and copies whatever they say; one changed byte in a
 * file of ids crashed the process (test_input.c, test_damage). So only the 16-byte references are taken through libhdf5 or
 * straight from the file, and the heap is decoded here, with every size checked.
 *
 *   reference:   u32 length, u64 address of a heap collection, u32 index of an object in it (address 0: no string)
 *   collection:  'GCOL', u8 version 1, 3 reserved, u64 size of all of it, then objects:
 *   object:      u16 index (0: the free rest), u16 count, u32 reserved, u64 size, data padded to 8 bytes
 *
 * Contiguous references are read from the file. A chunk of references may be filtered: its bytes go as they are into a
 * chunk of a dataset of 16-byte opaque elements with the same filters, in a file in memory, and come out decoded.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "input_hdf5_int.h"

enum { REF = 16, COLLECTION_HEAD = 16, OBJECT_HEAD = 16 };
#define COLLECTION_MAX ((uint64_t)128 << 20)

/* Heap collections and chunks stay between rows: neighbours share them. */
struct input_h5_vlen {
  int fd;        /* libhdf5's own */
  uint64_t base; /* of addresses: the user block's length */
  uint64_t n_bytes;
  uint64_t data_off;               /* contiguous references */
  hid_t scratch_file, scratch;     /* where chunks are decoded; -1: contiguous */
  uint64_t chunk_rows, chunk_held; /* rows per chunk; which chunk `refs` holds */
  unsigned char *refs;
  uint64_t heap_at; /* address of the collection held; 0: none */
  unsigned char *heap;
  size_t heap_size;
};

static uint64_t get_le(const unsigned char *p, int n) {
  uint64_t v = 0;
  for (int i = n - 1; i >= 0; i--) v = v << 8 | p[i];
  return v;
}

void input_h5_vlen_close(input_h5_vlen *v) {
  if (!v) return;
  if (v->scratch >= 0) H5Dclose(v->scratch);
  if (v->scratch_file >= 0) H5Fclose(v->scratch_file);
  free(v->refs);
  free(v->heap);
  free(v);
}

/* The dataset in memory: one chunk of opaque elements, with the filters of d. */
static int make_scratch(const input_h5_dataset *d, input_h5_vlen *v) {
  hid_t access = H5Pcreate(H5P_FILE_ACCESS), props = H5Dget_create_plist(d->id), own = H5Pcreate(H5P_DATASET_CREATE);
  hid_t type = H5Tcreate(H5T_OPAQUE, REF), space = -1;
  hsize_t n = d->chunk[0];
  int ok = access >= 0 && props >= 0 && own >= 0 && type >= 0 && H5Pset_fapl_core(access, 1 << 16, 0) >= 0 &&
           H5Pset_chunk(own, 1, &n) >= 0 && (space = H5Screate_simple(1, &n, NULL)) >= 0;
  for (int i = 0, m = ok ? H5Pget_nfilters(props) : 0; i < m && ok; i++) {
    unsigned flags, config, values[32];
    size_t n_values = 32;
    H5Z_filter_t id = H5Pget_filter2(props, (unsigned)i, &flags, &n_values, values, 0, NULL, &config);
    ok = id >= 0 && n_values <= 32 && H5Pset_filter(own, id, flags, n_values, values) >= 0;
  }
  if (ok) {
    v->scratch_file = H5Fcreate("vecshard-in-memory", H5F_ACC_TRUNC, H5P_DEFAULT, access);
    if (v->scratch_file >= 0)
      v->scratch = H5Dcreate2(v->scratch_file, "refs", type, space, H5P_DEFAULT, own, H5P_DEFAULT);
    ok = v->scratch >= 0;
  }
  if (access >= 0) H5Pclose(access);
  if (props >= 0) H5Pclose(props);
  if (own >= 0) H5Pclose(own);
  if (type >= 0) H5Tclose(type);
  if (space >= 0) H5Sclose(space);
  return ok;
}

vs_rc input_h5_vlen_open(const input_h5_file *f, const input_h5_dataset *d, input_h5_vlen **out, vs_err *err) {
  input_h5_vlen *v = calloc(1, sizeof *v);
  hid_t props = H5Fget_create_plist(f->id);
  size_t n_addr = 0, n_size = 0;
  hsize_t user_block = 0;
  haddr_t at = d->chunk[0] ? 0 : H5Dget_offset(d->id);
  void *fd = NULL;
  vs_rc rc = VS_OK;
  *out = NULL;
  if (v) v->scratch = v->scratch_file = -1;
  if (!v || props < 0) rc = vs_nomem(err);
  else if (H5Pget_sizes(props, &n_addr, &n_size) < 0 || n_addr != 8 || n_size != 8 ||
           H5Pget_userblock(props, &user_block) < 0)
    rc = vs_fail(err, VS_UNSUPPORTED, "%s: uses %zu-byte addresses; rewrite it with h5repack", f->path, n_addr);
  else if (H5Fget_vfd_handle(f->id, H5P_DEFAULT, &fd) < 0 || !fd)
    rc = input_h5_fail(err, VS_IO, "%s: no file descriptor", f->path);
  else if (d->dims[0] && at == HADDR_UNDEF && d->written != H5_WRITTEN_NONE)
    rc = vs_fail(err, VS_UNSUPPORTED, "%s: '%s' has compact storage; rewrite it with `h5repack -l CONTI`", f->path,
                 d->shown);
  if (!rc) {
    v->fd = *(int *)fd;
    v->base = user_block;
    v->n_bytes = f->n_bytes;
    v->data_off = at;
    v->chunk_rows = d->chunk[0];
    v->chunk_held = UINT64_MAX;
    v->refs = malloc(v->chunk_rows ? (size_t)v->chunk_rows * REF : 1);
    if (!v->refs) rc = vs_nomem(err);
  }
  if (!rc && d->filtered && !make_scratch(d, v))
    rc = input_h5_fail(err, VS_UNSUPPORTED, "%s: cannot decode the chunks of '%s'", f->path, d->shown);
  if (props >= 0) H5Pclose(props);
  if (rc) input_h5_vlen_close(v);
  else *out = v;
  return rc;
}

/* Decoded references of one chunk into v->refs. */
static vs_rc load_chunk(const char *path, const input_h5_dataset *d, input_h5_vlen *v, uint64_t chunk, vs_err *err) {
  hsize_t at = chunk * v->chunk_rows, zero = 0, n = 0;
  size_t full = (size_t)v->chunk_rows * REF;
  uint32_t mask = 0;
  unsigned char *raw;
  int ok;
  v->chunk_held = UINT64_MAX;
  memset(v->refs, 0, full);
  if (H5Dget_chunk_storage_size(d->id, &at, &n) < 0 || !n) { /* never written: its rows are holes */
    v->chunk_held = chunk;
    return VS_OK;
  }
  if (n > v->n_bytes || (v->scratch < 0 && n != full))
    return vs_corrupt(err, "%s: a chunk of '%s' claims %llu bytes", path, d->shown, (unsigned long long)n);
  raw = v->scratch < 0 ? v->refs : malloc((size_t)n);
  if (!raw) return vs_nomem(err);
  ok = H5Dread_chunk(d->id, H5P_DEFAULT, &at, &mask, raw) >= 0;
  if (v->scratch >= 0) {
    hid_t type = ok ? H5Dget_type(v->scratch) : -1;
    ok = ok && H5Dwrite_chunk(v->scratch, H5P_DEFAULT, mask, &zero, (size_t)n, raw) >= 0 &&
         H5Dread(v->scratch, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, v->refs) >= 0;
  }
  if (!ok)
    input_h5_fail(err, VS_CORRUPT, "%s: cannot read rows %llu to %llu of '%s'", path, (unsigned long long)at,
                  (unsigned long long)(at + v->chunk_rows - 1), d->shown);
  if (raw != v->refs) free(raw);
  if (!ok) return VS_CORRUPT;
  v->chunk_held = chunk;
  return VS_OK;
}

vs_rc input_h5_vlen_refs(const char *path, const input_h5_dataset *d, input_h5_vlen *v, uint64_t row, size_t n,
                         void *out, vs_err *err) {
  unsigned char *to = out;
  if (d->written == H5_WRITTEN_NONE) {
    memset(out, 0, n * REF);
    return VS_OK;
  }
  if (!v->chunk_rows) return input_pread(v->fd, path, out, n * REF, v->data_off + row * REF, err);
  while (n) {
    uint64_t chunk = row / v->chunk_rows, skip = row % v->chunk_rows;
    size_t m = v->chunk_rows - skip < n ? (size_t)(v->chunk_rows - skip) : n;
    if (chunk != v->chunk_held) {
      vs_rc rc = load_chunk(path, d, v, chunk, err);
      if (rc) return rc;
    }
    memcpy(to, v->refs + skip * REF, m * REF);
    to += m * REF;
    row += m;
    n -= m;
  }
  return VS_OK;
}

static vs_rc load_collection(const char *path, const input_h5_dataset *d, input_h5_vlen *v, uint64_t addr,
                             vs_err *err) {
  unsigned char head[COLLECTION_HEAD];
  uint64_t off = addr + v->base, size;
  vs_rc rc;
  if (addr == v->heap_at) return VS_OK;
  v->heap_at = 0;
  if (off < addr || off > v->n_bytes || v->n_bytes - off < COLLECTION_HEAD)
    return vs_corrupt(err, "%s: a string of '%s' lies beyond the end of the file", path, d->shown);
  rc = input_pread(v->fd, path, head, sizeof head, off, err);
  if (rc) return rc;
  size = get_le(head + 8, 8);
  if (memcmp(head, "GCOL\1", 5) || size < COLLECTION_HEAD || size > v->n_bytes - off || size > COLLECTION_MAX)
    return vs_corrupt(err, "%s: the strings of '%s' are damaged at byte %llu", path, d->shown,
                      (unsigned long long)off);
  if (size > v->heap_size) {
    free(v->heap);
    v->heap_size = 0;
    v->heap = malloc((size_t)size);
    if (!v->heap) return vs_nomem(err);
  }
  v->heap_size = (size_t)size;
  rc = input_pread(v->fd, path, v->heap, (size_t)size, off, err);
  if (!rc) v->heap_at = addr;
  return rc;
}

vs_rc input_h5_vlen_text(const char *path, const input_h5_dataset *d, input_h5_vlen *v, const void *ref,
                         const char **text, size_t *len, vs_err *err) {
  const unsigned char *r = ref;
  uint64_t n = get_le(r, 4), addr = get_le(r + 4, 8), index = get_le(r + 12, 4);
  vs_rc rc;
  *text = "";
  *len = 0;
  if (!n || !addr || addr == UINT64_MAX) return VS_OK;
  rc = load_collection(path, d, v, addr, err);
  if (rc) return rc;
  for (size_t at = COLLECTION_HEAD; v->heap_size - at >= OBJECT_HEAD;) {
    uint64_t id = get_le(v->heap + at, 2), size = get_le(v->heap + at + 8, 8), room = v->heap_size - at - OBJECT_HEAD;
    if (!id || size > room) break;
    if (id == index) {
      if (n > size) break;
      *text = (const char *)v->heap + at + OBJECT_HEAD;
      *len = (size_t)n;
      return VS_OK;
    }
    size = (size + 7) / 8 * 8;
    if (size > room) break;
    at += OBJECT_HEAD + (size_t)size;
  }
  return vs_corrupt(err, "%s: the strings of '%s' are damaged near byte %llu", path, d->shown,
                    (unsigned long long)(addr + v->base));
}
