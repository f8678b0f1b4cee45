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
 * A collection is walked once, when it is loaded, and the place of every object is written down by its index; libhdf5 makes
 * collections of 4 KiB and fills them in writing order, so that rows in order find each of them once. The file is read in
 * pieces of AHEAD_BYTES while one collection follows the other, and collection by collection otherwise. (1,000,000 ids of 9
 * bytes: 9.2 s when each is sought from the collection's start, 0.13 s so.)
 *
 * References are read from the file when they are contiguous, chunks of them by input_hdf5_chunks.c. Where filters need
 * libhdf5, a chunk's bytes go as they are into a chunk of a dataset of 16-byte opaque elements with the same filters, in a
 * file in memory, and come out decoded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "input_hdf5_int.h"

enum { REF = 16, COLLECTION_HEAD = 16, OBJECT_HEAD = 16, INDEXES = 65536 };
#define COLLECTION_MAX ((uint64_t)128 << 20)
#define COLLECTION_USUAL ((size_t)4096)
#define AHEAD_BYTES ((size_t)256 << 10)

/* Where an object lies in the collection; good when `load` is that of the collection held. */
typedef struct heap_object {
  uint32_t load, at;
} heap_object;

/* Memory: 512 KiB of places, of which few pages are ever touched, the piece of the file held (AHEAD_BYTES or one collection), a
 * chunk of references where libhdf5 decodes them. */
struct input_h5_vlen {
  int fd;        /* libhdf5's own */
  uint64_t base; /* of addresses: the user block's length */
  uint64_t n_bytes;
  uint64_t data_off;               /* contiguous references */
  input_h5_chunks *chunks;         /* chunked ones; NULL: contiguous, or by way of scratch */
  hid_t scratch_file, scratch;     /* where libhdf5 decodes chunks; -1: it does not */
  uint64_t chunk_rows, chunk_held; /* rows per chunk; which chunk `refs` holds */
  uint8_t chunk_flags;
  unsigned char *refs;
  unsigned char *piece; /* of the file, from piece_off on */
  size_t piece_cap, piece_n;
  uint64_t piece_off;
  uint64_t heap_at; /* address of the collection held; 0: none */
  const unsigned char *heap;
  size_t heap_size;
  uint32_t load; /* counts collections */
  heap_object *object;
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
  input_h5_chunks_close(v->chunks);
  free(v->refs);
  free(v->piece);
  free(v->object);
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
    char name[40]; /* libhdf5 knows files in memory by their names: two readers need two */
    snprintf(name, sizeof name, "vecshard-in-memory-%p", (void *)v);
    v->scratch_file = H5Fcreate(name, H5F_ACC_TRUNC, H5P_DEFAULT, access);
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

vs_rc input_h5_vlen_open(input_h5_file *f, const input_h5_dataset *d, const int *cancel, input_h5_vlen **out,
                         vs_err *err) {
  input_h5_vlen *v = calloc(1, sizeof *v);
  hid_t props = H5Fget_create_plist(f->id);
  size_t n_addr = 0, n_size = 0;
  hsize_t user_block = 0;
  haddr_t at = d->chunk[0] ? 0 : H5Dget_offset(d->id);
  vs_rc rc = VS_OK;
  *out = NULL;
  if (v) v->scratch = v->scratch_file = -1;
  if (!v || props < 0) rc = vs_nomem(err);
  else if (H5Pget_sizes(props, &n_addr, &n_size) < 0 || n_addr != 8 || n_size != 8 ||
           H5Pget_userblock(props, &user_block) < 0)
    rc = vs_fail(err, VS_UNSUPPORTED, "%s: uses %zu-byte addresses; rewrite it with h5repack", f->path, n_addr);
  else if (d->fd < 0)
    rc = input_h5_fail(err, VS_IO, "%s: no file descriptor", f->path);
  else if (d->dims[0] && at == HADDR_UNDEF && d->written != H5_WRITTEN_NONE)
    rc = vs_fail(err, VS_UNSUPPORTED, "%s: '%s' has compact storage; rewrite it with `h5repack -l CONTI`", f->path,
                 d->shown);
  if (!rc) {
    v->fd = d->fd;
    v->base = user_block;
    v->n_bytes = f->n_bytes;
    v->data_off = at;
    v->chunk_rows = d->chunk[0];
    v->chunk_held = UINT64_MAX;
    v->object = calloc(INDEXES, sizeof *v->object);
    rc = v->object ? input_h5_chunks_open(f, d, 0, 1, cancel, &v->chunks, err) : vs_nomem(err);
  }
  if (!rc && v->chunk_rows && !v->chunks) {
    v->refs = v->chunk_rows <= SIZE_MAX / REF ? malloc((size_t)v->chunk_rows * REF) : NULL;
    if (!v->refs) rc = vs_nomem(err);
    else if (d->filtered && !make_scratch(d, v))
      rc = input_h5_fail(err, VS_UNSUPPORTED, "%s: cannot decode the chunks of '%s'", f->path, d->shown);
  }
  if (props >= 0) H5Pclose(props);
  if (rc) input_h5_vlen_close(v);
  else *out = v;
  return rc;
}

/* Decoded references of one chunk into v->refs, by libhdf5; with the lock held. */
static vs_rc load_chunk(const input_h5_dataset *d, input_h5_vlen *v, uint64_t chunk, vs_err *err) {
  hsize_t at[2] = {chunk * v->chunk_rows, 0}, zero = 0, n = 0;
  size_t full = (size_t)v->chunk_rows * REF;
  uint32_t mask = 0;
  unsigned char *raw;
  int ok, found = input_h5_chunk_size(d->id, at, &n);
  v->chunk_held = UINT64_MAX;
  memset(v->refs, 0, full);
  v->chunk_flags = found ? 0 : INPUT_HAS_HOLE;
  if (found < 0) return input_h5_fail(err, VS_CORRUPT, "%s: cannot find the chunk of rows from %llu on of '%s'", d->path,
                                      (unsigned long long)at[0], d->shown);
  if (!found) {
    v->chunk_held = chunk;
    return VS_OK;
  }
  if (n > v->n_bytes || (v->scratch < 0 && n != full))
    return vs_corrupt(err, "%s: a chunk of '%s' claims %llu bytes", d->path, d->shown, (unsigned long long)n);
  raw = v->scratch < 0 ? v->refs : malloc((size_t)n);
  if (!raw) return vs_nomem(err);
  ok = H5Dread_chunk(d->id, H5P_DEFAULT, at, &mask, raw) >= 0;
  if (v->scratch >= 0) {
    hid_t type = ok ? H5Dget_type(v->scratch) : -1;
    ok = ok && H5Dwrite_chunk(v->scratch, H5P_DEFAULT, mask, &zero, (size_t)n, raw) >= 0 &&
         H5Dread(v->scratch, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, v->refs) >= 0;
    if (type >= 0) H5Tclose(type);
  }
  if (!ok)
    input_h5_fail(err, VS_CORRUPT, "%s: cannot read rows %llu to %llu of '%s'", d->path, (unsigned long long)at[0],
                  (unsigned long long)(at[0] + v->chunk_rows - 1), d->shown);
  if (raw != v->refs) free(raw);
  if (!ok) return VS_CORRUPT;
  v->chunk_held = chunk;
  return VS_OK;
}

vs_rc input_h5_vlen_refs(const input_h5_dataset *d, input_h5_vlen *v, uint64_t row, size_t *n, void *out, uint8_t *flags,
                         vs_err *err) {
  unsigned char *to = out;
  size_t done = 0;
  vs_rc rc = VS_OK;
  if (v->chunks) return input_h5_chunks_read(v->chunks, row, n, NULL, out, flags, err);
  memset(flags, 0, *n);
  if (d->written == H5_WRITTEN_NONE) {
    memset(out, 0, *n * REF);
    memset(flags, INPUT_HAS_HOLE, *n);
    return VS_OK;
  }
  if (!v->chunk_rows) {
    rc = input_pread(v->fd, d->path, out, *n * REF, v->data_off + row * REF, err);
    if (rc) *n = 0;
    return rc;
  }
  while (done < *n && !rc) {
    uint64_t chunk = (row + done) / v->chunk_rows, skip = (row + done) % v->chunk_rows;
    size_t m = v->chunk_rows - skip < *n - done ? (size_t)(v->chunk_rows - skip) : *n - done;
    input_h5_lock();
    if (chunk != v->chunk_held) rc = load_chunk(d, v, chunk, err);
    input_h5_unlock();
    if (rc) break;
    memcpy(to + done * REF, v->refs + skip * REF, m * REF);
    memset(flags + done, v->chunk_flags, m);
    done += m;
  }
  *n = done;
  return rc;
}

/* ---- the heap ---- */

static vs_rc heap_damaged(const input_h5_dataset *d, uint64_t off, vs_err *err) {
  return vs_corrupt(err, "%s: the strings of '%s' are damaged near byte %llu", d->path, d->shown, (unsigned long long)off);
}

/* Makes v->piece hold the n bytes at off, which lie in the file, and up to `more` bytes behind them. */
static vs_rc hold_piece(const input_h5_dataset *d, input_h5_vlen *v, uint64_t off, size_t n, size_t more, vs_err *err) {
  size_t left = v->n_bytes - off - n < more ? (size_t)(v->n_bytes - off - n) : more;
  if (off >= v->piece_off && off - v->piece_off <= v->piece_n && v->piece_n - (off - v->piece_off) >= n) return VS_OK;
  v->piece_n = 0;
  if (n + left > v->piece_cap) {
    free(v->piece);
    v->piece_cap = 0;
    v->piece = malloc(n + left);
    if (!v->piece) return vs_nomem(err);
    v->piece_cap = n + left;
  }
  vs_rc rc = input_pread(v->fd, d->path, v->piece, n + left, off, err);
  if (rc) return rc;
  v->piece_off = off, v->piece_n = n + left;
  return VS_OK;
}

/* Writes the place of every object down. What follows a damaged object is not there, and found missing when it is asked for. */
static void walk_collection(input_h5_vlen *v) {
  if (++v->load == 0) { /* 2^32 collections: every old mark could be taken for a new one */
    memset(v->object, 0, INDEXES * sizeof *v->object);
    v->load = 1;
  }
  for (size_t at = COLLECTION_HEAD; v->heap_size - at >= OBJECT_HEAD;) {
    uint64_t id = get_le(v->heap + at, 2), size = get_le(v->heap + at + 8, 8), room = v->heap_size - at - OBJECT_HEAD;
    if (!id || size > room) break;
    if (v->object[id].load != v->load) v->object[id] = (heap_object){v->load, (uint32_t)at};
    size = (size + 7) / 8 * 8;
    if (size > room) break;
    at += OBJECT_HEAD + (size_t)size;
  }
}

static vs_rc load_collection(const input_h5_dataset *d, input_h5_vlen *v, uint64_t addr, vs_err *err) {
  uint64_t off = addr + v->base, size;
  /* Other blocks may lie between two collections. */
  int follows = v->heap_at && addr > v->heap_at && addr - v->heap_at - v->heap_size < 4 * COLLECTION_USUAL;
  size_t more = follows ? AHEAD_BYTES : COLLECTION_USUAL - COLLECTION_HEAD;
  vs_rc rc;
  v->heap_at = 0;
  if (off < addr || off > v->n_bytes || v->n_bytes - off < COLLECTION_HEAD)
    return vs_corrupt(err, "%s: a string of '%s' lies beyond the end of the file", d->path, d->shown);
  rc = hold_piece(d, v, off, COLLECTION_HEAD, more, err);
  if (rc) return rc;
  v->heap = v->piece + (off - v->piece_off);
  size = get_le(v->heap + 8, 8);
  if (memcmp(v->heap, "GCOL\1", 5) || size < COLLECTION_HEAD || size > v->n_bytes - off || size > COLLECTION_MAX)
    return heap_damaged(d, off, err);
  rc = hold_piece(d, v, off, (size_t)size, follows ? AHEAD_BYTES : 0, err);
  if (rc) return rc;
  v->heap = v->piece + (off - v->piece_off);
  v->heap_size = (size_t)size;
  v->heap_at = addr;
  walk_collection(v);
  return VS_OK;
}

vs_rc input_h5_vlen_text(const input_h5_dataset *d, input_h5_vlen *v, const void *ref, const char **text, size_t *len,
                         vs_err *err) {
  const unsigned char *r = ref;
  uint64_t n = get_le(r, 4), addr = get_le(r + 4, 8), index = get_le(r + 12, 4);
  *text = "";
  *len = 0;
  if (!n || !addr || addr == UINT64_MAX) return VS_OK;
  if (addr != v->heap_at) {
    vs_rc rc = load_collection(d, v, addr, err);
    if (rc) return rc;
  }
  if (!index || index >= INDEXES || v->object[index].load != v->load) return heap_damaged(d, addr + v->base, err);
  const unsigned char *object = v->heap + v->object[index].at;
  if (n > get_le(object + 8, 8)) return heap_damaged(d, addr + v->base, err);
  *text = (const char *)object + OBJECT_HEAD;
  *len = (size_t)n;
  return VS_OK;
}
