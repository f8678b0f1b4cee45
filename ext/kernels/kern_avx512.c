/* kern_avx512.c - AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI (Ice Lake, Zen 4 and later). Definitions: kern_scalar.c.
 *
 * What carries the speed
 *   dot, l2sq, cosine  four (cosine: two by three) independent fused chains hide the latency; tails are masked loads.
 *   argmax, scores     a register tile of 6 rows x 4 groups of 16 centroids, 24 accumulators; per dimension 4 loads
 *                      and 6 broadcasts feed 24 fused multiply-adds, so the L2 keeps up with the two FMA ports.
 *   pq_scan            a table row of 256 bytes is four registers; two vpermi2b look up 64 codes in its halves, bit 7
 *                      of the code picks. Nothing is gathered.
 *   select             vpcompressq into both halves.
 * Precision: f32 throughout, fused; a score of argmax is bias, then the dimensions in order, in one chain per (row,
 * centroid), whatever the tile: results do not depend on the rows that share a call and equal scores_f32 to the bit.
 * Overflow: u16 sums of m <= 256 bytes reach 65,280; the term is added with saturation.
 * Compress goes to a register and is stored whole: vpcompress to memory is microcoded on Zen 4.
 * Measured on one core of a Xeon VM (Sapphire Rapids class, 2 MiB L2), gcc 12, best of 7: argmax 185 GFLOP/s at 960
 * dimensions x 1096 centroids, 202 at 128 x 4096, 134 at 8 x 256, 162 at 16 x 256; pq_scan 39 G look-ups/s from cache.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "kern_int.h"

KERN_INLINE __mmask16 tail16(size_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xffff; }

/* ------------------------------------------------------------------ sums over two arrays */

/* next: NULL, or what is asked for meanwhile. */
KERN_INLINE float dot_with(const float *a, const float *b, size_t n, const void *next) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_loadu_ps(b + i + 16 * u), sum[u]);
      if (next) _mm_prefetch((const char *)next + 4 * (i + 16 * (size_t)u), _MM_HINT_T0);
    }
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    if (next) _mm_prefetch((const char *)next + 4 * i, _MM_HINT_T0);
    sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_maskz_loadu_ps(live, b + i), sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

KERN_INLINE float l2sq_with(const float *a, const float *b, size_t n, const void *next) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      __m512 d = _mm512_sub_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_loadu_ps(b + i + 16 * u));
      sum[u] = _mm512_fmadd_ps(d, d, sum[u]);
      if (next) _mm_prefetch((const char *)next + 4 * (i + 16 * (size_t)u), _MM_HINT_T0);
    }
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    if (next) _mm_prefetch((const char *)next + 4 * i, _MM_HINT_T0);
    __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_maskz_loadu_ps(live, b + i));
    sum[0] = _mm512_fmadd_ps(d, d, sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

KERN_INLINE void cosine_with(const float *a, const float *b, size_t n, const void *next, float out[3]) {
  __m512 ab[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 aa[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 bb[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (size_t i = 0; i < n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 2; u++) {
      size_t at = i + 16 * (size_t)u;
      if (at >= n) break;
      __mmask16 live = tail16(n - at);
      if (next) _mm_prefetch((const char *)next + 4 * at, _MM_HINT_T0);
      __m512 va = _mm512_maskz_loadu_ps(live, a + at), vb = _mm512_maskz_loadu_ps(live, b + at);
      ab[u] = _mm512_fmadd_ps(va, vb, ab[u]);
      aa[u] = _mm512_fmadd_ps(va, va, aa[u]);
      bb[u] = _mm512_fmadd_ps(vb, vb, bb[u]);
    }
  out[0] = _mm512_reduce_add_ps(_mm512_add_ps(ab[0], ab[1]));
  out[1] = _mm512_reduce_add_ps(_mm512_add_ps(aa[0], aa[1]));
  out[2] = _mm512_reduce_add_ps(_mm512_add_ps(bb[0], bb[1]));
}

static float dot_f32(const float *a, const float *b, size_t n) { return dot_with(a, b, n, NULL); }
static float l2sq_f32(const float *a, const float *b, size_t n) { return l2sq_with(a, b, n, NULL); }
static void cosine_f32(const float *a, const float *b, size_t n, float out[3]) { cosine_with(a, b, n, NULL, out); }
static float dot_ahead_f32(const float *a, const float *b, size_t n, const void *next) { return dot_with(a, b, n, next); }
static float l2sq_ahead_f32(const float *a, const float *b, size_t n, const void *next) { return l2sq_with(a, b, n, next); }
static void cosine_ahead_f32(const float *a, const float *b, size_t n, const void *next, float out[3]) { cosine_with(a, b, n, next, out); }

/* ------------------------------------------------------------------ element-wise */

static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    _mm512_mask_storeu_ps(out + i, live, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(live, in + i)));
  }
}

static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    __m256i half = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(live, in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(out + i, live, half);
  }
}

static float dot_f16(const float *a, const uint16_t *b, size_t n) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 2; u++)
      sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(b + i + 16 * u))), sum[u]);
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(live, b + i)), sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

static float l2sq_f16(const float *a, const uint16_t *b, size_t n) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 2; u++) {
      __m512 d = _mm512_sub_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(b + i + 16 * u))));
      sum[u] = _mm512_fmadd_ps(d, d, sum[u]);
    }
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(live, b + i)));
    sum[0] = _mm512_fmadd_ps(d, d, sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

static int all_finite_f32(const float *a, size_t n) {
  enum { NAN_OR_INF = 0x01 | 0x08 | 0x10 | 0x80 }; /* quiet NaN, +Inf, -Inf, signalling NaN */
  unsigned bad = 0;
  for (size_t i = 0; i < n; i += 16)
    bad |= _mm512_fpclass_ps_mask(_mm512_maskz_loadu_ps(tail16(n - i), a + i), NAN_OR_INF);
  return bad == 0;
}

/* ------------------------------------------------------------------ packed matrices */

/* Rows per tile, groups per tile, and rows that pass over one strip of 4 groups before the next strip: while they do,
 * the strip stays in L2 (245 KB at 960 dimensions). Their running winners take 128 bytes of stack each. */
enum { TILE_ROWS = 6, TILE_GROUPS = 4, CHUNK_ROWS = 192 };

/* Per row and lane: the best score so far and the number of its group. */
typedef struct {
  float score[KERN_LANES];
  uint32_t group[KERN_LANES];
} winner;

/* n_rows x n_groups scores into acc; both counts are constants where this is inlined. */
KERN_INLINE void tile_scores(const float *x, size_t stride, size_t dim, const float *packed, const float *bias,
                             const int n_rows, const int n_groups, __m512 acc[TILE_ROWS][TILE_GROUPS]) {
  KERN_UNROLL
  for (int r = 0; r < TILE_ROWS; r++)
    KERN_UNROLL
    for (int g = 0; g < TILE_GROUPS; g++)
      if (r < n_rows && g < n_groups) acc[r][g] = _mm512_loadu_ps(bias + KERN_LANES * g);
  for (size_t j = 0; j < dim; j++) {
    __m512 column[TILE_GROUPS];
    KERN_UNROLL
    for (int g = 0; g < TILE_GROUPS; g++)
      if (g < n_groups) column[g] = _mm512_loadu_ps(packed + ((size_t)g * dim + j) * KERN_LANES);
    KERN_UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
      if (r >= n_rows) break;
      __m512 value = _mm512_set1_ps(x[(size_t)r * stride + j]);
      KERN_UNROLL
      for (int g = 0; g < TILE_GROUPS; g++)
        if (g < n_groups) acc[r][g] = _mm512_fmadd_ps(value, column[g], acc[r][g]);
    }
  }
}

/* Lets the tile's scores compete with the rows' winners; `last` are the lanes of the last group that hold a centroid.
 * "Greater" is false for NaN and for ties, so the earlier group stays. */
KERN_INLINE void tile_compete(const float *x, size_t stride, size_t dim, const float *packed, const float *bias,
                              uint32_t first_group, __mmask16 last, const int n_rows, const int n_groups, winner *win) {
  __m512 acc[TILE_ROWS][TILE_GROUPS];
  tile_scores(x, stride, dim, packed, bias, n_rows, n_groups, acc);
  KERN_UNROLL
  for (int r = 0; r < TILE_ROWS; r++) {
    if (r >= n_rows) break;
    __m512 score = _mm512_loadu_ps(win[r].score);
    __m512i group = _mm512_loadu_si512(win[r].group);
    KERN_UNROLL
    for (int g = 0; g < TILE_GROUPS; g++) {
      if (g >= n_groups) break;
      __mmask16 live = g == n_groups - 1 ? last : (__mmask16)0xffff;
      __mmask16 wins = _mm512_mask_cmp_ps_mask(live, acc[r][g], score, _CMP_GT_OQ);
      score = _mm512_mask_mov_ps(score, wins, acc[r][g]);
      group = _mm512_mask_set1_epi32(group, wins, (int)(first_group + (uint32_t)g));
    }
    _mm512_storeu_ps(win[r].score, score);
    _mm512_storeu_si512(win[r].group, group);
  }
}

/* All rows of a chunk against one strip of n_groups groups. */
KERN_INLINE void strip_compete(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed,
                               const float *bias, uint32_t first_group, __mmask16 last, const int n_groups,
                               winner *win) {
  size_t r = 0;
  for (; r + 6 <= n_x; r += 6)
    tile_compete(x + r * stride, stride, dim, packed, bias, first_group, last, 6, n_groups, win + r);
  for (; r + 2 <= n_x; r += 2)
    tile_compete(x + r * stride, stride, dim, packed, bias, first_group, last, 2, n_groups, win + r);
  if (r < n_x) tile_compete(x + r * stride, stride, dim, packed, bias, first_group, last, 1, n_groups, win + r);
}

/* One row's winner over the lanes; among equal scores the lowest centroid. A winner's score is never NaN, so at least
 * one lane equals the largest. */
static uint32_t winner_lane(const winner *win, float *score) {
  __m512 all = _mm512_loadu_ps(win->score);
  float top = _mm512_reduce_max_ps(all);
  unsigned ties = _mm512_cmp_ps_mask(all, _mm512_set1_ps(top), _CMP_EQ_OQ);
  uint32_t lane = (uint32_t)__builtin_ctz(ties), lowest = win->group[lane] * KERN_LANES + lane;
  for (ties &= ties - 1; ties; ties &= ties - 1) {
    lane = (uint32_t)__builtin_ctz(ties);
    uint32_t c = win->group[lane] * KERN_LANES + lane;
    lowest = c < lowest ? c : lowest;
  }
  *score = win->score[lowest % KERN_LANES];
  return lowest;
}

static void argmax_f32(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                       size_t n_c, uint32_t *id, float *best) {
  size_t n_groups = (n_c + KERN_LANES - 1) / KERN_LANES;
  for (size_t row = 0; row < n_x; row += CHUNK_ROWS) {
    winner win[CHUNK_ROWS];
    size_t n_rows = n_x - row < CHUNK_ROWS ? n_x - row : CHUNK_ROWS, g = 0;
    const float *chunk = x + row * stride;
    for (size_t r = 0; r < n_rows; r++) {
      _mm512_storeu_ps(win[r].score, _mm512_set1_ps(-INFINITY));
      _mm512_storeu_si512(win[r].group, _mm512_setzero_si512());
    }
    while (g < n_groups) {
      const float *p = packed + g * KERN_LANES * dim, *h = bias + g * KERN_LANES;
      size_t left = n_groups - g, width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      __mmask16 last = tail16(n_c - (g + width - 1) * KERN_LANES);
      if (width == 4)
        strip_compete(chunk, n_rows, stride, dim, p, h, (uint32_t)g, last, 4, win);
      else if (width == 2)
        strip_compete(chunk, n_rows, stride, dim, p, h, (uint32_t)g, last, 2, win);
      else
        strip_compete(chunk, n_rows, stride, dim, p, h, (uint32_t)g, last, 1, win);
      g += width;
    }
    for (size_t r = 0; r < n_rows; r++) {
      float score;
      id[row + r] = winner_lane(win + r, &score);
      if (best) best[row + r] = score;
    }
  }
}

/* One row is bound by reading the matrix. */
KERN_INLINE void strip_scores(const float *x, size_t dim, const float *packed, const float *bias, const int n_groups,
                              float *out) {
  __m512 acc[TILE_ROWS][TILE_GROUPS];
  tile_scores(x, 0, dim, packed, bias, 1, n_groups, acc);
  KERN_UNROLL
  for (int g = 0; g < TILE_GROUPS; g++)
    if (g < n_groups) _mm512_storeu_ps(out + KERN_LANES * g, acc[0][g]);
}

static void scores_f32(const float *x, size_t dim, const float *packed, const float *bias, size_t n_c, float *out) {
  size_t c = 0, n_padded = (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES;
  for (; c + TILE_GROUPS * KERN_LANES <= n_padded; c += TILE_GROUPS * KERN_LANES)
    strip_scores(x, dim, packed + c * dim, bias + c, TILE_GROUPS, out + c);
  for (; c < n_padded; c += KERN_LANES) strip_scores(x, dim, packed + c * dim, bias + c, 1, out + c);
}

/* All rows of a chunk against one strip. */
KERN_INLINE void strip_scores_many(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                                   const int n_groups, float *out, size_t out_stride) {
  for (size_t r = 0; r < n_x; r += TILE_ROWS) {
    __m512 acc[TILE_ROWS][TILE_GROUPS];
    size_t left = n_x - r;
    if (left >= TILE_ROWS) tile_scores(x + r * stride, stride, dim, packed, bias, TILE_ROWS, n_groups, acc);
    else
      for (size_t one = 0; one < left; one++) {
        __m512 row[TILE_ROWS][TILE_GROUPS];
        tile_scores(x + (r + one) * stride, stride, dim, packed, bias, 1, n_groups, row);
        KERN_UNROLL
        for (int g = 0; g < TILE_GROUPS; g++)
          if (g < n_groups) _mm512_storeu_ps(out + (r + one) * out_stride + KERN_LANES * g, row[0][g]);
      }
    if (left < TILE_ROWS) break;
    KERN_UNROLL
    for (int t = 0; t < TILE_ROWS; t++)
      KERN_UNROLL
      for (int g = 0; g < TILE_GROUPS; g++)
        if (g < n_groups) _mm512_storeu_ps(out + (r + (size_t)t) * out_stride + KERN_LANES * g, acc[t][g]);
  }
}

static void scores_many_f32(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                            size_t n_c, float *out, size_t out_stride) {
  size_t n_padded = (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES;
  for (size_t row = 0; row < n_x; row += CHUNK_ROWS) {
    size_t n_rows = n_x - row < CHUNK_ROWS ? n_x - row : CHUNK_ROWS, c = 0;
    const float *chunk = x + row * stride;
    float *to = out + row * out_stride;
    for (; c + TILE_GROUPS * KERN_LANES <= n_padded; c += TILE_GROUPS * KERN_LANES)
      strip_scores_many(chunk, n_rows, stride, dim, packed + c * dim, bias + c, TILE_GROUPS, to + c, out_stride);
    for (; c < n_padded; c += KERN_LANES) strip_scores_many(chunk, n_rows, stride, dim, packed + c * dim, bias + c, 1, to + c, out_stride);
  }
}

/* ------------------------------------------------------------------ bytes */

static float quantize_i8(const float *x, size_t n, int8_t *out) {
  __m512 top = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_maskz_loadu_ps(tail16(n - i), x + i)));
  float m = _mm512_reduce_max_ps(top);
  __m512 inv = _mm512_set1_ps(m >= 1e-30f ? 127 / m : 0);
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(live, x + i), inv));
    _mm_mask_storeu_epi8(out + i, live, _mm512_cvtepi32_epi8(v));
  }
  return m >= 1e-30f ? m / 127 : 0;
}

/* VNNI multiplies unsigned by signed bytes: what the 128 in each matrix element adds is known before, 128 * SUM q. */
static int32_t zero_of(const int8_t *q, size_t dim) {
  __m512i sum = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
  for (size_t j = 0; j < dim; j += 64) {
    __mmask64 live = dim - j < 64 ? ((__mmask64)1 << (dim - j)) - 1 : ~(__mmask64)0;
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(live, q + j));
  }
  return -128 * _mm512_reduce_add_epi32(sum);
}

KERN_INLINE __m512i four_of(const int8_t *q) {
  int32_t four;
  memcpy(&four, q, 4);
  return _mm512_set1_epi32(four);
}

enum { I8_QUERIES = 4, I8_GROUPS = 4, I8_GROUPS_OF_ONE = 8 }; /* registers of sums: enough to hide their latency */

/* n_q queries against n_groups groups of 16. */
KERN_INLINE void tile_i8(const int8_t *q, size_t q_stride, const int32_t *zero, size_t dim, const uint8_t *packed, const int n_q,
                         const int n_groups, int32_t *out, size_t out_stride) {
  __m512i acc[I8_QUERIES][I8_GROUPS_OF_ONE];
  KERN_UNROLL
  for (int r = 0; r < I8_QUERIES; r++)
    KERN_UNROLL
    for (int g = 0; g < I8_GROUPS_OF_ONE; g++)
      if (r < n_q && g < n_groups) acc[r][g] = _mm512_set1_epi32(zero[r]);
  for (size_t j = 0; j < dim; j += 4) {
    __m512i column[I8_GROUPS_OF_ONE];
    KERN_UNROLL
    for (int g = 0; g < I8_GROUPS_OF_ONE; g++)
      if (g < n_groups) column[g] = _mm512_loadu_si512(packed + ((size_t)g * dim + j) * KERN_LANES);
    KERN_UNROLL
    for (int r = 0; r < I8_QUERIES; r++) {
      if (r >= n_q) break;
      __m512i value = four_of(q + (size_t)r * q_stride + j);
      KERN_UNROLL
      for (int g = 0; g < I8_GROUPS_OF_ONE; g++)
        if (g < n_groups) acc[r][g] = _mm512_dpbusd_epi32(acc[r][g], column[g], value);
    }
  }
  KERN_UNROLL
  for (int r = 0; r < I8_QUERIES; r++)
    KERN_UNROLL
    for (int g = 0; g < I8_GROUPS_OF_ONE; g++)
      if (r < n_q && g < n_groups) _mm512_storeu_si512(out + (size_t)r * out_stride + KERN_LANES * g, acc[r][g]);
}

KERN_INLINE void strip_i8(const int8_t *q, size_t q_stride, const int32_t *zero, size_t dim, const uint8_t *packed, size_t n_c,
                          const int n_q, int32_t *out, size_t out_stride) {
  const int most = n_q == 1 ? I8_GROUPS_OF_ONE : I8_GROUPS;
  size_t c = 0, left = (n_c + KERN_LANES - 1) / KERN_LANES;
  for (; left >= (size_t)most; left -= (size_t)most, c += (size_t)most * KERN_LANES)
    tile_i8(q, q_stride, zero, dim, packed + c * dim, n_q, most, out + c, out_stride);
  KERN_UNROLL
  for (int n = 1; n < I8_GROUPS_OF_ONE; n++)
    if (n < most && left == (size_t)n) tile_i8(q, q_stride, zero, dim, packed + c * dim, n_q, n, out + c, out_stride);
}

/* A stretch of the matrix that the L1 holds beside the queries meets all queries before the next one. */
enum { I8_STRETCH_BYTES = 16384 };

static void scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                      size_t out_stride) {
  size_t stretch = I8_STRETCH_BYTES / (dim + 1) / (I8_GROUPS * KERN_LANES) * (I8_GROUPS * KERN_LANES), r = 0;
  if (n_q <= I8_QUERIES) stretch = n_c;
  if (!stretch) stretch = I8_GROUPS * KERN_LANES;
  for (size_t chunk; r < n_q; r += chunk) {
    int32_t zero[64];
    chunk = n_q - r < 64 ? n_q - r : 64;
    for (size_t i = 0; i < chunk; i++) zero[i] = zero_of(q + (r + i) * q_stride, dim);
    for (size_t c = 0; c < n_c; c += stretch) {
      size_t n = n_c - c < stretch ? n_c - c : stretch, i = 0;
      const int8_t *at = q + r * q_stride;
      int32_t *to = out + r * out_stride + c;
      for (; i + I8_QUERIES <= chunk; i += I8_QUERIES)
        strip_i8(at + i * q_stride, q_stride, zero + i, dim, packed + c * dim, n, I8_QUERIES, to + i * out_stride, out_stride);
      for (; i < chunk; i++) strip_i8(at + i * q_stride, q_stride, zero + i, dim, packed + c * dim, n, 1, to + i * out_stride, out_stride);
    }
  }
}

/* Flipping the top bit of 128 + v gives v as a signed byte; of q it gives 128 + q. VNNI wants one unsigned side, so rows stay as they
 * are and 128 * SUM q is taken off: summed in the same pass. */
static int32_t dot_i8(const int8_t *q, const uint8_t *row, size_t n) {
  __m512i none = _mm512_setzero_si512(), sum[4] = {none, none, none, none}, zero[2] = {none, none}, middle = _mm512_set1_epi8((char)128);
  size_t i = 0;
  for (; i + 256 <= n; i += 256) /* four chains: one waits for itself */
    KERN_UNROLL
    for (int c = 0; c < 4; c++) {
      __m512i a = _mm512_loadu_si512(q + i + 64 * (size_t)c);
      sum[c] = _mm512_dpbusd_epi32(sum[c], _mm512_loadu_si512(row + i + 64 * (size_t)c), a);
      zero[c % 2] = _mm512_dpbusd_epi32(zero[c % 2], middle, a);
    }
  for (; i < n; i += 64) {
    __mmask64 live = n - i < 64 ? ((__mmask64)1 << (n - i)) - 1 : ~(__mmask64)0;
    __m512i a = _mm512_maskz_loadu_epi8(live, q + i);
    sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_maskz_loadu_epi8(live, row + i), a);
    zero[0] = _mm512_dpbusd_epi32(zero[0], middle, a);
  }
  __m512i both = _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3]));
  return _mm512_reduce_add_epi32(_mm512_sub_epi32(both, _mm512_add_epi32(zero[0], zero[1])));
}

/* kern_key, sixteen at a time: negative floats are inverted, others get their sign bit set; NaN becomes the largest. */
KERN_INLINE void keys16(__m512 v, __m512i number, __m512i *low, __m512i *high) {
  __m512i u = _mm512_castps_si512(v), sign = _mm512_set1_epi32((int)0x80000000u);
  u = _mm512_xor_si512(u, _mm512_or_si512(_mm512_srai_epi32(u, 31), sign));
  u = _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(-1));
  *low = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(u)), 32),
                         _mm512_cvtepu32_epi64(_mm512_castsi512_si256(number)));
  *high = _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(u, 1)), 32),
                          _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(number, 1)));
}

/* What keys_i8 calls with have in common. */
typedef struct { __m512 mul, base, highest; __m512i last; uint32_t first; int every; } key_rule;

KERN_INLINE __m512 distance16(const key_rule *r, __m512i score, __m512 scale, __m512 norm2) {
  return _mm512_add_ps(_mm512_add_ps(norm2, r->base), _mm512_mul_ps(_mm512_mul_ps(r->mul, scale), _mm512_cvtepi32_ps(score)));
}

/* Appends the keys of sixteen distances that do not exceed the limit. */
KERN_INLINE size_t append_keys(const key_rule *r, __m512 v, size_t i, __mmask16 live, uint64_t *out) {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i low, high;
  keys16(v, _mm512_add_epi32(_mm512_set1_epi32((int)(r->first + (uint32_t)i)), iota), &low, &high);
  __mmask8 keep_low = _mm512_mask_cmple_epu64_mask((__mmask8)live, low, r->last);
  __mmask8 keep_high = _mm512_mask_cmple_epu64_mask((__mmask8)(live >> 8), high, r->last);
  size_t n_low = (size_t)__builtin_popcount(keep_low);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(keep_low, low));
  _mm512_storeu_si512(out + n_low, _mm512_maskz_compress_epi64(keep_high, high));
  return n_low + (size_t)__builtin_popcount(keep_high);
}

static size_t keys_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, uint32_t first,
                      uint64_t limit, uint64_t *out) {
  key_rule r = {.mul = _mm512_set1_ps(mul), .base = _mm512_set1_ps(base), .highest = _mm512_set1_ps(kern_key_value(limit)),
                .last = _mm512_set1_epi64((long long)limit), .first = first,
                .every = limit >> 32 > 0xff800000u}; /* above the key of +Inf: `highest` is a NaN */
  size_t n_out = 0, i = 0;
  for (; i + 32 <= n; i += 32) {
    __m512 a = distance16(&r, _mm512_loadu_si512(score + i), _mm512_loadu_ps(scale + i), _mm512_loadu_ps(norm2 + i));
    __m512 b = distance16(&r, _mm512_loadu_si512(score + i + 16), _mm512_loadu_ps(scale + i + 16), _mm512_loadu_ps(norm2 + i + 16));
    __mmask16 near_a = _mm512_cmp_ps_mask(a, r.highest, _CMP_LE_OQ), near_b = _mm512_cmp_ps_mask(b, r.highest, _CMP_LE_OQ);
    if (!r.every && !(near_a | near_b)) continue; /* mostly */
    if (r.every || near_a) n_out += append_keys(&r, a, i, 0xffff, out + n_out);
    if (r.every || near_b) n_out += append_keys(&r, b, i + 16, 0xffff, out + n_out);
  }
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    __m512 v = distance16(&r, _mm512_maskz_loadu_epi32(live, score + i), _mm512_maskz_loadu_ps(live, scale + i),
                          _mm512_maskz_loadu_ps(live, norm2 + i));
    if (r.every || _mm512_cmp_ps_mask(v, r.highest, _CMP_LE_OQ)) n_out += append_keys(&r, v, i, live, out + n_out);
  }
  return n_out;
}

static void least_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, float *least,
                     size_t n_least, size_t at) {
  key_rule r = {.mul = _mm512_set1_ps(mul), .base = _mm512_set1_ps(base)};
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    float *slot = least + ((at + i) & (n_least - 1));
    __m512 v = distance16(&r, _mm512_maskz_loadu_epi32(live, score + i), _mm512_maskz_loadu_ps(live, scale + i),
                          _mm512_maskz_loadu_ps(live, norm2 + i));
    __m512 have = _mm512_loadu_ps(slot);
    _mm512_storeu_ps(slot, _mm512_mask_min_ps(have, live, v, have));
  }
}

static void keys_u16(const uint16_t *sum, const uint32_t *row, size_t n, float base, float step, uint32_t first, uint64_t *out) {
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, sum + i)));
    v = _mm512_add_ps(_mm512_set1_ps(base), _mm512_mul_ps(_mm512_set1_ps(step), v));
    __m512i low, high, number = _mm512_add_epi32(_mm512_set1_epi32((int)first), _mm512_maskz_loadu_epi32(live, row + i));
    keys16(v, number, &low, &high);
    _mm512_storeu_si512(out + i, low);
    _mm512_storeu_si512(out + i + 8, high);
  }
}

/* ------------------------------------------------------------------ PQ scan */

/* All 256 scores of a sub-quantizer stay in sixteen registers. */
static float pq_table_raw(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim, float *raw,
                          float *low) {
  float widest = 0;
  for (size_t j = 0; j < m; j++, q += sub_dim, words += 256 * sub_dim, raw += 256) {
    __m512i acc[16], zero = _mm512_set1_epi32(zero_of(q, sub_dim));
    KERN_UNROLL
    for (int g = 0; g < 16; g++) acc[g] = zero;
    for (size_t e = 0; e < sub_dim; e += 4) {
      __m512i value = four_of(q + e);
      KERN_UNROLL
      for (int g = 0; g < 16; g++)
        acc[g] = _mm512_dpbusd_epi32(acc[g], _mm512_loadu_si512(words + ((size_t)g * sub_dim + e) * KERN_LANES), value);
    }
    __m512 f = _mm512_set1_ps(factor[j]), lo = _mm512_set1_ps(INFINITY), hi = _mm512_set1_ps(-INFINITY);
    KERN_UNROLL
    for (int g = 0; g < 16; g++) {
      __m512 v = _mm512_mul_ps(f, _mm512_cvtepi32_ps(acc[g]));
      lo = _mm512_min_ps(v, lo), hi = _mm512_max_ps(v, hi); /* in this order a NaN never replaces what is there */
      _mm512_storeu_ps(raw + 16 * g, v);
    }
    low[j] = _mm512_reduce_min_ps(lo);
    float width = _mm512_reduce_max_ps(hi) - low[j];
    widest = width > widest ? width : widest;
  }
  return widest;
}

static void pq_table(const float *raw, const float *low, size_t m, float inv, uint8_t *table) {
  __m512 mul = _mm512_set1_ps(inv), top = _mm512_set1_ps(255);
  for (size_t j = 0; j < m; j++) {
    __m512 base = _mm512_set1_ps(low[j]);
    KERN_UNROLL
    for (int g = 0; g < 16; g++) {
      __m512 v = _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(raw + j * 256 + 16 * g), base), mul), top);
      _mm_storeu_si128((void *)(table + j * 256 + 16 * g), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
    }
  }
}

enum { BLOCK_GROUPS = KERN_BLOCK / KERN_GROUP };

/* What the survivors of one call share. */
typedef struct {
  __m512i term_mul, limit; /* u16 lanes */
  const uint16_t *terms;
  size_t n_rows, n_out;
  uint32_t *out_row;
  uint16_t *out_sum;
} sieve;

/* Adds the terms of rows [row, min(row + 32, end)) to their sums and appends the survivors. The whole-register stores stay
 * inside the outputs: at most `row` survivors precede these, and there is room for n_rows rounded up to 64. */
KERN_INLINE void sift32(sieve *s, __m512i sum, size_t row, size_t end) {
  if (row >= end) return;
  size_t left = end - row;
  __mmask32 live = left >= 32 ? (__mmask32)0xffffffff : (__mmask32)((1u << left) - 1);
  sum = _mm512_adds_epu16(sum, _mm512_mulhi_epu16(_mm512_loadu_si512(s->terms + row), s->term_mul));
  __mmask32 keep = _mm512_mask_cmple_epu16_mask(live, sum, s->limit);
  if (!keep) return;
  __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i first = _mm512_add_epi32(_mm512_set1_epi32((int)row), iota);
  __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(16));
  __mmask16 keep_first = (__mmask16)keep, keep_second = (__mmask16)(keep >> 16);
  uint32_t *row_at = s->out_row + s->n_out;
  _mm512_storeu_si512(s->out_sum + s->n_out, _mm512_maskz_compress_epi16(keep, sum));
  _mm512_storeu_si512(row_at, _mm512_maskz_compress_epi32(keep_first, first));
  _mm512_storeu_si512(row_at + __builtin_popcount(keep_first), _mm512_maskz_compress_epi32(keep_second, second));
  s->n_out += (size_t)__builtin_popcount(keep);
}

/* One block of `width` <= n_groups * 64 rows (rounded up to 2). A looked-up register holds even bytes E and odd bytes O as words E + 256 O. `both`
 * sums the words modulo 2^16 and `odd` sums O; since SUM E < 2^16 it is both - 256 * odd, exactly, and the loop is
 * spared the masking of the even bytes. One line of `next` is asked for with each line of codes: all at once would wait for one another. */
KERN_INLINE void scan_block(const uint8_t *codes, size_t m, const uint8_t *table, size_t row, size_t width, const int n_groups,
                            const uint8_t *next, sieve *s) {
  __m512i both[BLOCK_GROUPS], odd[BLOCK_GROUPS];
  KERN_UNROLL
  for (int g = 0; g < BLOCK_GROUPS; g++)
    if (g < n_groups) both[g] = odd[g] = _mm512_setzero_si512();
  for (size_t j = 0; j < m; j++, table += 256) {
    __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
    __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
    KERN_UNROLL
    for (int g = 0; g < BLOCK_GROUPS; g++) {
      if (g >= n_groups) break;
      size_t at = j * width + (size_t)g * KERN_GROUP;
      __m512i code = _mm512_loadu_si512(codes + at);
      _mm_prefetch(next + at, _MM_HINT_T0);
      __m512i low = _mm512_permutex2var_epi8(t0, code, t1), high = _mm512_permutex2var_epi8(t2, code, t3);
      __m512i entry = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
      both[g] = _mm512_add_epi16(both[g], entry);
      odd[g] = _mm512_add_epi16(odd[g], _mm512_srli_epi16(entry, 8));
    }
  }
  KERN_UNROLL
  for (int g = 0; g < BLOCK_GROUPS; g++) {
    if (g >= n_groups) break;
    size_t first = row + (size_t)g * KERN_GROUP, bytes = width - (size_t)g * KERN_GROUP, half = bytes < KERN_GROUP ? bytes / 2 : 32;
    sift32(s, _mm512_sub_epi16(both[g], _mm512_slli_epi16(odd[g], 8)), first, first + half < s->n_rows ? first + half : s->n_rows);
    sift32(s, odd[g], first + half, first + 2 * half < s->n_rows ? first + 2 * half : s->n_rows);
  }
}

static size_t pq_scan(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                      uint16_t term_mul, uint32_t threshold, const uint8_t *next, uint32_t *out_row, uint16_t *out_sum) {
  if (threshold == 0) return 0;
  if (!next) next = codes;
  sieve s = {.term_mul = _mm512_set1_epi16((short)term_mul),
             .limit = _mm512_set1_epi16((short)kern_pq_limit(threshold)),
             .terms = terms,
             .n_rows = n_rows,
             .out_row = out_row,
             .out_sum = out_sum};
  size_t row = 0;
  for (; row + KERN_BLOCK <= n_rows; row += KERN_BLOCK)
    scan_block(codes + row * m, m, table, row, KERN_BLOCK, BLOCK_GROUPS, next + row * m, &s);
  size_t width = (n_rows - row + 1) / 2 * 2;
  switch ((width + KERN_GROUP - 1) / KERN_GROUP) {
  case 1: scan_block(codes + row * m, m, table, row, width, 1, next + row * m, &s); break;
  case 2: scan_block(codes + row * m, m, table, row, width, 2, next + row * m, &s); break;
  case 3: scan_block(codes + row * m, m, table, row, width, 3, next + row * m, &s); break;
  case 4: scan_block(codes + row * m, m, table, row, width, 4, next + row * m, &s); break;
  default: break;
  }
  return s.n_out;
}

/* ------------------------------------------------------------------ selection */

/* In place for the low keys: what is stored at n_low <= i ends before i + 8, which has been read. */
static size_t split_u64(uint64_t *a, size_t n, uint64_t pivot, uint64_t *spill) {
  __m512i cut = _mm512_set1_epi64((long long)pivot);
  size_t n_low = 0, n_high = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    __m512i key = _mm512_loadu_si512(a + i);
    __mmask8 low = _mm512_cmple_epu64_mask(key, cut), high = (__mmask8)~low;
    _mm512_storeu_si512(a + n_low, _mm512_maskz_compress_epi64(low, key));
    _mm512_storeu_si512(spill + n_high, _mm512_maskz_compress_epi64(high, key));
    size_t k = (size_t)__builtin_popcount(low);
    n_low += k;
    n_high += 8 - k;
  }
  if (i < n) {
    __mmask8 live = (__mmask8)((1u << (n - i)) - 1);
    __m512i key = _mm512_maskz_loadu_epi64(live, a + i);
    __mmask8 low = _mm512_mask_cmple_epu64_mask(live, key, cut), high = (__mmask8)(live & ~low);
    unsigned k = (unsigned)__builtin_popcount(low);
    _mm512_mask_storeu_epi64(a + n_low, (__mmask8)((1u << k) - 1), _mm512_maskz_compress_epi64(low, key));
    _mm512_storeu_si512(spill + n_high, _mm512_maskz_compress_epi64(high, key));
    n_low += k;
    n_high += n - i - k;
  }
  memcpy(a + n_low, spill, n_high * sizeof *a);
  return n_low;
}

/* Each key goes where the number of smaller ones says. No branch depends on a key: an insertion sort of 24 keys took 500 cycles of
 * mispredictions, this takes 100. Equal keys would meet in one place: then the ranks do not add up, and the keys are sorted as ever. */
KERN_INLINE int sort_by_rank(uint64_t *a, const size_t n, const int n_regs) {
  __m512i keys[KERN_FEW / 8];
  uint64_t sorted[KERN_FEW];
  size_t sum = 0;
  KERN_UNROLL
  for (int r = 0; r < KERN_FEW / 8; r++) {
    if (r >= n_regs) break;
    size_t left = n > 8 * (size_t)r ? n - 8 * (size_t)r : 0;
    __mmask8 live = left < 8 ? (__mmask8)((1u << left) - 1) : (__mmask8)0xff;
    keys[r] = _mm512_mask_loadu_epi64(_mm512_set1_epi64(-1), live, a + 8 * r);
  }
  for (size_t i = 0; i < n; i++) {
    __m512i key = _mm512_set1_epi64((long long)a[i]);
    uint64_t smaller = 0;
    KERN_UNROLL
    for (int r = 0; r < KERN_FEW / 8; r++) {
      if (r >= n_regs) break;
      smaller |= (uint64_t)_mm512_cmplt_epu64_mask(keys[r], key) << (8 * r);
    }
    size_t rank = (size_t)__builtin_popcountll(smaller);
    sorted[rank] = a[i];
    sum += rank;
  }
  if (sum != n * (n - 1) / 2) return 0;
  memcpy(a, sorted, n * sizeof *a);
  return 1;
}

static void sort_few_u64(uint64_t *a, size_t n) {
  if (n < 2) return;
  if (!(n <= 16 ? sort_by_rank(a, n, 2) : n <= 32 ? sort_by_rank(a, n, 4) : sort_by_rank(a, n, 8))) kern_sort_insertion(a, n);
}

static uint64_t select_u64(uint64_t *a, size_t n, size_t want, uint64_t *scratch) {
  enum { SELECT_FEW = 32 };
  return kern_select_by(split_u64, sort_few_u64, SELECT_FEW, a, n, want, scratch);
}

static size_t not_below_f32(const float *a, size_t n, float limit, uint32_t *out) {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 least = _mm512_set1_ps(limit);
  size_t n_out = 0;
  for (size_t i = 0; i < n; i += 16) {
    __mmask16 live = tail16(n - i), keep = _mm512_mask_cmp_ps_mask(live, _mm512_maskz_loadu_ps(live, a + i), least, _CMP_NLT_UQ);
    if (!keep) continue; /* mostly */
    _mm512_storeu_si512(out + n_out, _mm512_maskz_compress_epi32(keep, _mm512_add_epi32(_mm512_set1_epi32((int)i), iota)));
    n_out += (size_t)__builtin_popcount(keep);
  }
  return n_out;
}

static uint64_t xxh3(const void *p, size_t n) { return XXH3_64bits(p, n); }

const kern kern_table_avx512 = {
  .name = "avx512",
  .dot_f32 = dot_f32,
  .l2sq_f32 = l2sq_f32,
  .cosine_f32 = cosine_f32,
  .dot_ahead_f32 = dot_ahead_f32,
  .l2sq_ahead_f32 = l2sq_ahead_f32,
  .cosine_ahead_f32 = cosine_ahead_f32,
  .f16_to_f32 = f16_to_f32,
  .f32_to_f16 = f32_to_f16,
  .all_finite_f32 = all_finite_f32,
  .scores_f32 = scores_f32,
  .scores_many_f32 = scores_many_f32,
  .argmax_f32 = argmax_f32,
  .dot_f16 = dot_f16,
  .l2sq_f16 = l2sq_f16,
  .quantize_i8 = quantize_i8,
  .scores_i8 = scores_i8,
  .dot_i8 = dot_i8,
  .keys_i8 = keys_i8,
  .least_i8 = least_i8,
  .keys_u16 = keys_u16,
  .pq_table_raw = pq_table_raw,
  .pq_table = pq_table,
  .pq_scan = pq_scan,
  .sort_few_u64 = sort_few_u64,
  .select_u64 = select_u64,
  .not_below_f32 = not_below_f32,
  .xxh3 = xxh3,
};
#else
typedef int kern_avx512_is_empty; /* ISO C wants a declaration in every file */
#endif
