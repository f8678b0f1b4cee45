/* kern_tiles512.h - products of rows of bytes, 32 by 32 at a time, by AMX or VNNI: what kern_nearest_avx512.c and kern_grouped_avx512.c
 * share. Only files with the wider instructions may use it.
 *
 * Rows are cut into steps of 64 bytes; one side of a product lies [step][row][64], the other [step][half][four dimensions][row][4].
 */
#ifndef KERN_TILES512_H
#define KERN_TILES512_H
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "kern_int.h"

enum {
  STEP = 64,              /* dimensions (bytes) per tile */
  LANES = 32,             /* rows of either side that meet at once */
  PAIR = 2048             /* bytes of two tiles */
};

KERN_INLINE __mmask16 tail16(size_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xffff; }

static inline size_t steps_of(size_t dim) { return (dim + STEP - 1) / STEP; }

/* ------------------------------------------------------------------ rows as bytes */

KERN_INLINE __m128i bytes16(__m512 x, __m512 inv) { return _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, inv))); }

/* One step's bytes of a row: x * inv, rounded to nearest; n of them are there, a constant STEP where this matters. */
KERN_INLINE __m512i bytes_of(const float *x, size_t n, __m512 inv) {
  __m512 v[4];
  KERN_UNROLL
  for (size_t i = 0; i < 4; i++) {
    if (n >= STEP) v[i] = _mm512_loadu_ps(x + 16 * i);
    else v[i] = n > 16 * i ? _mm512_maskz_loadu_ps(tail16(n - 16 * i), x + 16 * i) : _mm512_setzero_ps();
  }
  __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes16(v[0], inv)), bytes16(v[1], inv), 1);
  __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes16(v[2], inv)), bytes16(v[3], inv), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* The scale of a row: its largest element is 127 of it. */
KERN_INLINE float scale_of(const float *x, size_t dim) {
  __m512 top = _mm512_setzero_ps();
  for (size_t j = 0; j < dim; j += 16) top = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(tail16(dim - j), x + j)), top);
  float m = _mm512_reduce_max_ps(top);
  return m >= 1e-30f ? m / 127 : 0;
}

/* 16 x 16 elements of 32 bits. */
KERN_INLINE void transpose16(__m512i v[16]) {
  __m512i a[16], b[16];
  KERN_UNROLL
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  KERN_UNROLL
  for (int i = 0; i < 4; i++) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  KERN_UNROLL
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  KERN_UNROLL
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

KERN_INLINE void make_step(const float *const *from, const float *inv, size_t u, size_t n, uint8_t flip, uint8_t *to) {
  for (size_t half = 0; half < 2; half++) {
    __m512i v[16];
    KERN_UNROLL
    for (size_t r = 0; r < 16; r++) v[r] = bytes_of(from[16 * half + r] + u * STEP, n, _mm512_set1_ps(inv[16 * half + r]));
    transpose16(v);
    KERN_UNROLL
    for (size_t r = 0; r < 16; r++) _mm512_storeu_si512(to + half * 1024 + r * 64, _mm512_xor_si512(v[r], _mm512_set1_epi8((char)flip)));
  }
}

/* Points as a block: [step][half][four dimensions][point][4]. rows: their numbers, NULL for 0, 1, ...; a block that n_x does not
 * fill repeats its first point. `flip` is 0 for signed bytes, 128 for bytes plus 128. */
static inline void make_block(const float *x, size_t stride, size_t dim, const uint32_t *rows, size_t n_x, uint8_t flip, uint8_t *block,
                       float *scale) {
  float inv[LANES];
  const float *from[LANES];
  size_t u = 0;
  for (size_t i = 0; i < LANES; i++) {
    size_t at = i < n_x ? i : 0;
    from[i] = x + (rows ? rows[at] : at) * stride;
    scale[i] = i < n_x ? scale_of(from[i], dim) : scale[0];
    inv[i] = scale[i] > 0 ? 1 / scale[i] : 0;
  }
  for (; (u + 1) * STEP <= dim; u++) make_step(from, inv, u, STEP, flip, block + u * PAIR);
  if (u * STEP < dim) make_step(from, inv, u, dim - u * STEP, flip, block + u * PAIR);
}

/* ------------------------------------------------------------------ products */

/* out: [centroid half][point half][centroid][point]. The points are bytes plus 128, zero takes what that adds off again. */
static inline void vnni_product(const int8_t *strip, const uint8_t *block, size_t n_steps, const int32_t *zero, int32_t *out) {
  enum { ROWS = 8 };
  for (size_t c = 0; c < LANES; c += ROWS) {
    __m512i sum[ROWS][2];
    KERN_UNROLL
    for (size_t r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(zero[c + r]);
    for (size_t u = 0; u < n_steps; u++) {
      const int8_t *row = strip + u * PAIR + c * STEP;
      const uint8_t *point = block + u * PAIR;
      for (size_t j = 0; j < 16; j++) {
        __m512i low = _mm512_loadu_si512(point + j * 64), high = _mm512_loadu_si512(point + 1024 + j * 64);
        KERN_UNROLL
        for (size_t r = 0; r < ROWS; r++) {
          int32_t four;
          memcpy(&four, row + r * STEP + j * 4, 4);
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], low, _mm512_set1_epi32(four));
          sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], high, _mm512_set1_epi32(four));
        }
      }
    }
    KERN_UNROLL
    for (size_t r = 0; r < ROWS; r++)
      for (size_t h = 0; h < 2; h++) _mm512_storeu_si512(out + c / 16 * 512 + h * 256 + (c % 16 + r) * 16, sum[r][h]);
  }
}

/* Eight tiles of 16 rows of 64 bytes. A constant: gcc 12 thinks that LDTILECFG reads eight bytes, and drops stores to the others. */
static const struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} config = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static inline void tiles_open(void) { _tile_loadconfig(&config); }

static inline void tiles_close(void) { _tile_release(); }

KERN_INLINE void tiles_zero(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

KERN_INLINE void tiles_step(const int8_t *strip, const uint8_t *block) {
  _tile_loadd(4, strip, 64);
  _tile_loadd(6, block, 64);
  _tile_loadd(5, strip + 1024, 64);
  _tile_loadd(7, block + 1024, 64);
  _tile_dpbssd(0, 4, 6);
  _tile_dpbssd(1, 4, 7);
  _tile_dpbssd(2, 5, 6);
  _tile_dpbssd(3, 5, 7);
}

static inline void tile_product(const int8_t *strip, const uint8_t *block, size_t n_steps, int32_t *out) {
  tiles_zero();
  for (size_t u = 0; u < n_steps; u++) tiles_step(strip + u * PAIR, block + u * PAIR);
  _tile_stored(0, out, 64);
  _tile_stored(1, out + 256, 64);
  _tile_stored(2, out + 512, 64);
  _tile_stored(3, out + 768, 64);
}

#endif
