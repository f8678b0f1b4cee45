/* input_hdf5_filters.c - undoes the filters of an HDF5 chunk without libhdf5: deflate, shuffle, fletcher32.
 *
 * Why not libhdf5: it decodes under one lock, with zlib, and 1.10 reads past its buffers where a damaged chunk decodes to less
 * than its shape needs. Here every step knows how many bytes must come out, and chunks are decoded on many threads at once.
 *
 *   deflate      a zlib stream. libdeflate: whole buffers only, which chunks are, at 2.2 times the speed of zlib
 *                (A of the design document, level 1, float32: 362 against 162 MB/s on one core); its checksum is verified.
 *   shuffle      byte j of all elements, then byte j+1 of all: undone 16 elements at a time
 *   fletcher32   four bytes behind the data, a sum of big-endian 16-bit words; libhdf5 before 1.6.3 swapped its bytes
 *
 * A chunk's mask names filters that were left out when it was written (bit i: the i-th).
 */
#include <libdeflate.h>
#include <stdlib.h>
#include <string.h>

#include "input_hdf5_int.h"

const char input_h5_no_memory[] = "out of memory";

void input_h5_scratch_free(input_h5_scratch *s) {
  for (int i = 0; i < H5_SCRATCH_BUFFERS; i++) free(s->buf[i]);
  if (s->inflater) libdeflate_free_decompressor(s->inflater);
  memset(s, 0, sizeof *s);
}

unsigned char *input_h5_scratch_get(input_h5_scratch *s, int i, size_t n) {
  if (n > s->cap[i]) {
    free(s->buf[i]);
    s->cap[i] = 0;
    s->buf[i] = malloc(n);
    if (!s->buf[i]) return NULL;
    s->cap[i] = n;
  }
  return s->buf[i];
}

/* ---- shuffle ---- */

typedef uint8_t bytes16 __attribute__((vector_size(16)));

static inline bytes16 load16(const unsigned char *p) {
  bytes16 v;
  memcpy(&v, p, 16);
  return v;
}
static inline void store16(unsigned char *p, bytes16 v) { memcpy(p, &v, 16); }
static inline bytes16 low_pairs(bytes16 a, bytes16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline bytes16 high_pairs(bytes16 a, bytes16 b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* Interleaves `width` planes (a power of two from 2 to 8) of n elements, from element 0 on, 16 at a time; returns how many
 * elements were done. Pairing plane p with plane p + width/2, log2(width) times, brings the bytes of an element together. */
static size_t unshuffle_blocks(const unsigned char *in, unsigned char *out, size_t n, int width) {
  size_t at = 0;
  for (; n - at >= 16; at += 16) {
    bytes16 v[8], w[8];
    for (int p = 0; p < width; p++) v[p] = load16(in + (size_t)p * n + at);
    for (int half = 1; half < width; half *= 2) {
      for (int p = 0; p < width / 2; p++) {
        w[2 * p] = low_pairs(v[p], v[p + width / 2]);
        w[2 * p + 1] = high_pairs(v[p], v[p + width / 2]);
      }
      memcpy(v, w, (size_t)width * 16);
    }
    for (int p = 0; p < width; p++) store16(out + (at * (size_t)width) + (size_t)p * 16, v[p]);
  }
  return at;
}

void input_h5_unshuffle(const unsigned char *in, unsigned char *out, size_t n_bytes, size_t width) {
  size_t n = width ? n_bytes / width : 0, done = 0;
  if (width < 2 || n < 2) { /* as libhdf5 writes it */
    memcpy(out, in, n_bytes);
    return;
  }
  if (width == 2) done = unshuffle_blocks(in, out, n, 2);
  else if (width == 4) done = unshuffle_blocks(in, out, n, 4);
  else if (width == 8) done = unshuffle_blocks(in, out, n, 8);
  for (size_t p = 0; p < width; p++) {
    const unsigned char *from = in + p * n;
    for (size_t i = done; i < n; i++) out[i * width + p] = from[i];
  }
  memcpy(out + n * width, in + n * width, n_bytes - n * width);
}

/* ---- fletcher32 ---- */

uint32_t input_h5_fletcher32(const unsigned char *p, size_t n) {
  uint64_t a = 0, b = 0;
  size_t words = n / 2;
  while (words) {
    /* b grows by at most 65535 * i * (i + 1) / 2 in i steps: far below 2^64 */
    size_t block = words < 4096 ? words : 4096;
    words -= block;
    for (; block; block--, p += 2) a += (uint64_t)p[0] << 8 | p[1], b += a;
    a %= 65535, b %= 65535;
  }
  if (n % 2) a = (a + ((uint64_t)*p << 8)) % 65535, b = (b + a) % 65535;
  /* libhdf5 folds instead of dividing: a sum that is a multiple of 65535 stays 65535 unless all was zero. The two say the same
   * number modulo 65535, so both forms are compared modulo it, see same_sum. */
  return (uint32_t)b << 16 | (uint32_t)a;
}

static int same_sum(uint32_t stored, uint32_t sum) {
  return (stored & 0xffff) % 65535 == (sum & 0xffff) && (stored >> 16) % 65535 == sum >> 16;
}

static int checksum_agrees(const unsigned char *data, size_t n) {
  uint32_t sum = input_h5_fletcher32(data, n), stored, swapped;
  const unsigned char *p = data + n;
  stored = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
  swapped = (uint32_t)p[1] | (uint32_t)p[0] << 8 | (uint32_t)p[3] << 16 | (uint32_t)p[2] << 24;
  return same_sum(stored, sum) || same_sum(swapped, sum);
}

/* ---- a chunk ---- */

int input_h5_filters_read(hid_t props, size_t chunk_bytes, input_h5_filters *f) {
  int n = H5Pget_nfilters(props), deflates = 0;
  memset(f, 0, sizeof *f);
  f->chunk_bytes = chunk_bytes;
  if (n < 0 || n > H5_FILTERS_MAX) return 0;
  for (int i = 0; i < n; i++) {
    unsigned flags, config, values[8] = {0};
    size_t n_values = 8;
    H5Z_filter_t id = H5Pget_filter2(props, (unsigned)i, &flags, &n_values, values, 0, NULL, &config);
    switch (id) {
    case H5Z_FILTER_DEFLATE: f->step[i].what = H5_STEP_DEFLATE, deflates++; break;
    case H5Z_FILTER_FLETCHER32: f->step[i].what = H5_STEP_FLETCHER32; break;
    case H5Z_FILTER_SHUFFLE:
      /* For references to strings libhdf5 gives no width; then it leaves the filter out, and says so in each chunk's mask. */
      f->step[i].what = H5_STEP_SHUFFLE, f->step[i].width = n_values ? values[0] : 0, f->n_shuffles++;
      break;
    default: return 0;
    }
  }
  f->n = n;
  f->deflated = deflates > 0;
  return deflates <= 1; /* what the first of two gives has no size that we know */
}

/* Bytes before each step was applied, in writing order; 0: not known (behind deflate). */
static void sizes_before(const input_h5_filters *f, uint32_t mask, size_t before[H5_FILTERS_MAX]) {
  size_t size = f->chunk_bytes;
  for (int i = 0; i < f->n; i++) {
    before[i] = size;
    if (mask >> i & 1 || !size) continue;
    if (f->step[i].what == H5_STEP_DEFLATE) size = 0;
    else if (f->step[i].what == H5_STEP_FLETCHER32) size += 4;
  }
}

static const char *inflate_chunk(input_h5_scratch *s, const unsigned char *in, size_t n, unsigned char *out, size_t want) {
  size_t used, got = 0;
  if (!s->inflater) s->inflater = libdeflate_alloc_decompressor();
  if (!s->inflater) return input_h5_no_memory;
  switch (libdeflate_zlib_decompress_ex(s->inflater, in, n, out, want, &used, &got)) {
  case LIBDEFLATE_SUCCESS: return got == want ? NULL : "inflate: less data than the chunk's shape needs";
  case LIBDEFLATE_INSUFFICIENT_SPACE: return "inflate: more data than the chunk's shape has room for";
  default: return "inflate: damaged data";
  }
}

const char *input_h5_undo(const input_h5_filters *f, uint32_t mask, input_h5_scratch *s, size_t n, unsigned char *to,
                          const unsigned char **out) {
  const unsigned char *at = s->buf[0];
  size_t before[H5_FILTERS_MAX];
  int first = 0, free_buf = 1;
  sizes_before(f, mask, before);
  while (first < f->n && (mask >> first & 1 || f->step[first].what == H5_STEP_FLETCHER32)) first++;
  for (int i = f->n - 1; i >= 0; i--) {
    unsigned char *into;
    const char *why = NULL;
    if (mask >> i & 1) continue;
    if (f->step[i].what == H5_STEP_FLETCHER32) {
      if (n < 4) return "shorter than its checksum";
      n -= 4;
      if (!checksum_agrees(at, n)) return "the checksum does not agree (fletcher32)";
      continue;
    }
    if (f->step[i].what == H5_STEP_SHUFFLE && !f->step[i].width) return "shuffled by elements of unknown size";
    /* The last step to be undone writes where the caller wants it; others take turns between two buffers. */
    size_t size = f->step[i].what == H5_STEP_DEFLATE ? before[i] : n;
    if (i == first && to && size == f->chunk_bytes) into = to;
    else into = input_h5_scratch_get(s, free_buf, size), free_buf = 3 - free_buf;
    if (!into) return input_h5_no_memory;
    if (f->step[i].what == H5_STEP_DEFLATE) why = inflate_chunk(s, at, n, into, size);
    else input_h5_unshuffle(at, into, n, f->step[i].width);
    if (why) return why;
    at = into, n = size;
  }
  if (n != f->chunk_bytes) return "another size than the chunk's shape needs";
  if (to && at != to) memcpy(to, at, n);
  *out = to ? to : at;
  return NULL;
}
