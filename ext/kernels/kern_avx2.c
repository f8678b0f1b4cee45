/* kern_avx2.c - AVX2, FMA, F16C (Haswell, Zen and later). Definitions: kern_scalar.c.
 *
 * What carries the speed
 *   dot, l2sq, cosine  independent fused chains; tails are vmaskmovps loads, which do not touch masked-out memory.
 *   argmax, scores     a register tile of 6 rows x 16 centroids, 12 accumulators of the 16 registers.
 *   scores_i8          vpmaddwd on bytes widened to words, a tile of 4 queries x 16 rows; see wide_query.
 *   pq_scan            256-entry look-ups from sixteen vpshufb for 32 codes at once; see pieces.
 *   select             a 16-entry table of permutations stands in for the compress instruction.
 * Precision: f32 throughout, fused; a score of argmax is bias, then the dimensions in order, in one chain per (row,
 * centroid), whatever the tile: results do not depend on the rows that share a call, and equal scores_f32 to the bit.
 * Overflow: u16 sums of m <= 256 bytes reach 65,280; the term is added with saturation.
 * Measured on one core of a Xeon VM (Sapphire Rapids class, 2 MiB L2), gcc 12, best of 7: argmax 112 GFLOP/s at 960
 * dimensions x 1096 centroids, 47 at 8 x 256, 67 at 16 x 256; pq_scan 5.9 G look-ups/s; scores_i8 39 G products/s.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "kern_int.h"

/* Eight words from here on: n of them all ones, n <= 8. */
static const int32_t tail_words[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
KERN_INLINE __m256i tail8(size_t n) { return _mm256_loadu_si256((const __m256i *)(tail_words + (n < 8 ? 8 - n : 0))); }

KERN_INLINE float reduce_add(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
KERN_INLINE float reduce_add4(const __m256 sum[4]) {
  return reduce_add(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

/* ------------------------------------------------------------------ sums over two arrays */

static float dot_f32(const float *a, const float *b, size_t n) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 4; u++)
      sum[u] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * u), _mm256_loadu_ps(b + i + 8 * u), sum[u]);
  for (; i < n; i += 8) {
    __m256i live = tail8(n - i);
    sum[0] = _mm256_fmadd_ps(_mm256_maskload_ps(a + i, live), _mm256_maskload_ps(b + i, live), sum[0]);
  }
  return reduce_add4(sum);
}

static float l2sq_f32(const float *a, const float *b, size_t n) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      __m256 d = _mm256_sub_ps(_mm256_loadu_ps(a + i + 8 * u), _mm256_loadu_ps(b + i + 8 * u));
      sum[u] = _mm256_fmadd_ps(d, d, sum[u]);
    }
  for (; i < n; i += 8) {
    __m256i live = tail8(n - i);
    __m256 d = _mm256_sub_ps(_mm256_maskload_ps(a + i, live), _mm256_maskload_ps(b + i, live));
    sum[0] = _mm256_fmadd_ps(d, d, sum[0]);
  }
  return reduce_add4(sum);
}

static void cosine_f32(const float *a, const float *b, size_t n, float out[3]) {
  __m256 ab[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  __m256 aa[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  __m256 bb[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (size_t i = 0; i < n; i += 16)
    KERN_UNROLL
    for (int u = 0; u < 2; u++) {
      size_t at = i + 8 * (size_t)u;
      if (at >= n) break;
      __m256i live = tail8(n - at);
      __m256 va = _mm256_maskload_ps(a + at, live), vb = _mm256_maskload_ps(b + at, live);
      ab[u] = _mm256_fmadd_ps(va, vb, ab[u]);
      aa[u] = _mm256_fmadd_ps(va, va, aa[u]);
      bb[u] = _mm256_fmadd_ps(vb, vb, bb[u]);
    }
  out[0] = reduce_add(_mm256_add_ps(ab[0], ab[1]));
  out[1] = reduce_add(_mm256_add_ps(aa[0], aa[1]));
  out[2] = reduce_add(_mm256_add_ps(bb[0], bb[1]));
}

KERN_AHEAD_F32

/* ------------------------------------------------------------------ element-wise */

static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
  if (i < n) { /* there are no 16-bit masked loads: through a buffer */
    uint16_t half[8] = {0};
    float full[8];
    memcpy(half, in + i, (n - i) * sizeof *in);
    _mm256_storeu_ps(full, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half)));
    memcpy(out + i, full, (n - i) * sizeof *out);
  }
}

static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
  enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), NEAREST));
  if (i < n) {
    uint16_t half[8];
    _mm_storeu_si128((__m128i *)half, _mm256_cvtps_ph(_mm256_maskload_ps(in + i, tail8(n - i)), NEAREST));
    memcpy(out + i, half, (n - i) * sizeof *out);
  }
}

/* n halves, n <= 8, the rest zeros. */
KERN_INLINE __m256 halves(const uint16_t *in, size_t n) {
  if (n >= 8) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)in));
  uint16_t half[8] = {0};
  memcpy(half, in, n * sizeof *in);
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half));
}

static float dot_f16(const float *a, const uint16_t *b, size_t n) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 4; u++)
      sum[u] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * u), halves(b + i + 8 * u, 8), sum[u]);
  for (; i < n; i += 8) sum[0] = _mm256_fmadd_ps(_mm256_maskload_ps(a + i, tail8(n - i)), halves(b + i, n - i), sum[0]);
  return reduce_add4(sum);
}

static float l2sq_f16(const float *a, const uint16_t *b, size_t n) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      __m256 d = _mm256_sub_ps(_mm256_loadu_ps(a + i + 8 * u), halves(b + i + 8 * u, 8));
      sum[u] = _mm256_fmadd_ps(d, d, sum[u]);
    }
  for (; i < n; i += 8) {
    __m256 d = _mm256_sub_ps(_mm256_maskload_ps(a + i, tail8(n - i)), halves(b + i, n - i));
    sum[0] = _mm256_fmadd_ps(d, d, sum[0]);
  }
  return reduce_add4(sum);
}

static int all_finite_f32(const float *a, size_t n) {
  __m256i exponent = _mm256_set1_epi32(0x7f800000), bad = _mm256_setzero_si256();
  for (size_t i = 0; i < n; i += 8) {
    __m256i v = _mm256_castps_si256(_mm256_maskload_ps(a + i, tail8(n - i)));
    bad = _mm256_or_si256(bad, _mm256_cmpeq_epi32(_mm256_and_si256(v, exponent), exponent));
  }
  return _mm256_testz_si256(bad, bad);
}

/* ------------------------------------------------------------------ packed matrices */

/* Rows per tile, and rows that pass over one group of 16 centroids before the next: while they do, the group stays in
 * L1 or L2 (61 KB at 960 dimensions). Their running winners take 128 bytes of stack each. */
enum { TILE_ROWS = 6, CHUNK_ROWS = 96 };

/* Per row and lane: the best score so far and the number of its group. */
typedef struct {
  float score[KERN_LANES];
  uint32_t group[KERN_LANES];
} winner;

/* n_rows x 16 scores into acc; n_rows is a constant where this is inlined. */
KERN_INLINE void tile_scores(const float *x, size_t stride, size_t dim, const float *packed, const float *bias,
                             const int n_rows, __m256 acc[TILE_ROWS][2]) {
  KERN_UNROLL
  for (int r = 0; r < TILE_ROWS; r++) {
    if (r >= n_rows) break;
    acc[r][0] = _mm256_loadu_ps(bias);
    acc[r][1] = _mm256_loadu_ps(bias + 8);
  }
  for (size_t j = 0; j < dim; j++, packed += KERN_LANES) {
    __m256 left = _mm256_loadu_ps(packed), right = _mm256_loadu_ps(packed + 8);
    KERN_UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
      if (r >= n_rows) break;
      __m256 value = _mm256_broadcast_ss(x + (size_t)r * stride + j);
      acc[r][0] = _mm256_fmadd_ps(value, left, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(value, right, acc[r][1]);
    }
  }
}

/* Lets the scores of one group compete with the rows' winners; n_live lanes hold a centroid. "Greater" is false for NaN
 * and for ties, so the earlier group stays. */
KERN_INLINE void tile_compete(const float *x, size_t stride, size_t dim, const float *packed, const float *bias,
                              uint32_t group, size_t n_live, const int n_rows, winner *win) {
  __m256 acc[TILE_ROWS][2];
  tile_scores(x, stride, dim, packed, bias, n_rows, acc);
  __m256 number = _mm256_castsi256_ps(_mm256_set1_epi32((int)group));
  KERN_UNROLL
  for (int half = 0; half < 2; half++) {
    size_t before = 8 * (size_t)half;
    __m256 live = _mm256_castsi256_ps(tail8(n_live > before ? n_live - before : 0));
    KERN_UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
      if (r >= n_rows) break;
      float *score_at = win[r].score + before, *group_at = (float *)(void *)(win[r].group + before);
      __m256 score = _mm256_loadu_ps(score_at), owner = _mm256_loadu_ps(group_at);
      __m256 wins = _mm256_and_ps(live, _mm256_cmp_ps(acc[r][half], score, _CMP_GT_OQ));
      _mm256_storeu_ps(score_at, _mm256_blendv_ps(score, acc[r][half], wins));
      _mm256_storeu_ps(group_at, _mm256_blendv_ps(owner, number, wins));
    }
  }
}

/* One row's winner over the lanes; among equal scores the lowest centroid. */
static uint32_t winner_lane(const winner *win, float *score) {
  uint32_t best = win->group[0] * KERN_LANES;
  float top = win->score[0];
  for (uint32_t lane = 1; lane < KERN_LANES; lane++) {
    uint32_t c = win->group[lane] * KERN_LANES + lane;
    int better = win->score[lane] > top || (win->score[lane] == top && c < best);
    top = better ? win->score[lane] : top;
    best = better ? c : best;
  }
  *score = top;
  return best;
}

static void argmax_f32(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                       size_t n_c, uint32_t *id, float *best) {
  for (size_t row = 0; row < n_x; row += CHUNK_ROWS) {
    winner win[CHUNK_ROWS];
    size_t n_rows = n_x - row < CHUNK_ROWS ? n_x - row : CHUNK_ROWS;
    const float *chunk = x + row * stride;
    for (size_t r = 0; r < n_rows; r++)
      for (int lane = 0; lane < KERN_LANES; lane++) {
        win[r].score[lane] = -INFINITY;
        win[r].group[lane] = 0;
      }
    for (size_t c = 0; c < n_c; c += KERN_LANES) {
      const float *p = packed + c * dim, *h = bias + c;
      uint32_t group = (uint32_t)(c / KERN_LANES);
      size_t r = 0;
      for (; r + 6 <= n_rows; r += 6)
        tile_compete(chunk + r * stride, stride, dim, p, h, group, n_c - c, 6, win + r);
      for (; r + 2 <= n_rows; r += 2)
        tile_compete(chunk + r * stride, stride, dim, p, h, group, n_c - c, 2, win + r);
      if (r < n_rows) tile_compete(chunk + r * stride, stride, dim, p, h, group, n_c - c, 1, win + r);
    }
    for (size_t r = 0; r < n_rows; r++) {
      float score;
      id[row + r] = winner_lane(win + r, &score);
      if (best) best[row + r] = score;
    }
  }
}

/* n_groups groups side by side: one row and one group have too few chains to hide the latency of a multiply-add. */
enum { STRIP_GROUPS = 4 };
KERN_INLINE void strip_scores(const float *x, size_t dim, const float *packed, const float *bias, const int n_groups,
                              float *out) {
  __m256 acc[STRIP_GROUPS][2];
  KERN_UNROLL
  for (int g = 0; g < STRIP_GROUPS; g++) {
    if (g >= n_groups) break;
    acc[g][0] = _mm256_loadu_ps(bias + KERN_LANES * g);
    acc[g][1] = _mm256_loadu_ps(bias + KERN_LANES * g + 8);
  }
  for (size_t j = 0; j < dim; j++) {
    __m256 value = _mm256_broadcast_ss(x + j);
    KERN_UNROLL
    for (int g = 0; g < STRIP_GROUPS; g++) {
      if (g >= n_groups) break;
      const float *column = packed + ((size_t)g * dim + j) * KERN_LANES;
      acc[g][0] = _mm256_fmadd_ps(value, _mm256_loadu_ps(column), acc[g][0]);
      acc[g][1] = _mm256_fmadd_ps(value, _mm256_loadu_ps(column + 8), acc[g][1]);
    }
  }
  KERN_UNROLL
  for (int g = 0; g < STRIP_GROUPS; g++) {
    if (g >= n_groups) break;
    _mm256_storeu_ps(out + KERN_LANES * g, acc[g][0]);
    _mm256_storeu_ps(out + KERN_LANES * g + 8, acc[g][1]);
  }
}

static void scores_f32(const float *x, size_t dim, const float *packed, const float *bias, size_t n_c, float *out) {
  size_t c = 0, n_padded = (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES;
  for (; c + STRIP_GROUPS * KERN_LANES <= n_padded; c += STRIP_GROUPS * KERN_LANES)
    strip_scores(x, dim, packed + c * dim, bias + c, STRIP_GROUPS, out + c);
  for (; c < n_padded; c += KERN_LANES) strip_scores(x, dim, packed + c * dim, bias + c, 1, out + c);
}

KERN_INLINE void tile_store(const float *x, size_t stride, size_t dim, const float *packed, const float *bias, const int n_rows,
                            float *out, size_t out_stride) {
  __m256 acc[TILE_ROWS][2];
  tile_scores(x, stride, dim, packed, bias, n_rows, acc);
  KERN_UNROLL
  for (int r = 0; r < TILE_ROWS; r++) {
    if (r >= n_rows) break;
    _mm256_storeu_ps(out + (size_t)r * out_stride, acc[r][0]);
    _mm256_storeu_ps(out + (size_t)r * out_stride + 8, acc[r][1]);
  }
}

static void scores_many_f32(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                            size_t n_c, float *out, size_t out_stride) {
  for (size_t row = 0; row < n_x; row += CHUNK_ROWS) {
    size_t n_rows = n_x - row < CHUNK_ROWS ? n_x - row : CHUNK_ROWS;
    const float *chunk = x + row * stride;
    for (size_t c = 0; c < n_c; c += KERN_LANES) {
      const float *p = packed + c * dim, *h = bias + c;
      float *to = out + row * out_stride + c;
      size_t r = 0;
      for (; r + 6 <= n_rows; r += 6) tile_store(chunk + r * stride, stride, dim, p, h, 6, to + r * out_stride, out_stride);
      for (; r + 2 <= n_rows; r += 2) tile_store(chunk + r * stride, stride, dim, p, h, 2, to + r * out_stride, out_stride);
      if (r < n_rows) tile_store(chunk + r * stride, stride, dim, p, h, 1, to + r * out_stride, out_stride);
    }
  }
}

/* ------------------------------------------------------------------ bytes */

static float quantize_i8(const float *x, size_t n, int8_t *out) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 top = _mm256_setzero_ps();
  for (size_t i = 0; i < n; i += 8)
    top = _mm256_max_ps(top, _mm256_andnot_ps(sign, _mm256_maskload_ps(x + i, tail8(n - i))));
  float lane[8], m = 0;
  _mm256_storeu_ps(lane, top);
  for (int i = 0; i < 8; i++) m = lane[i] > m ? lane[i] : m;
  const __m256 inv = _mm256_set1_ps(m >= 1e-30f ? 127 / m : 0);
  for (size_t i = 0; i < n; i += 8) {
    __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_maskload_ps(x + i, tail8(n - i)), inv));
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    uint64_t bytes = (uint64_t)_mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    memcpy(out + i, &bytes, n - i < 8 ? n - i : 8);
  }
  return m >= 1e-30f ? m / 127 : 0;
}

/* vpmaddubsw saturates (two products of 255 and 127 are too much for 16 bits), so bytes are widened: of each four dimensions
 * the first and third stay in place as words, the second and fourth are shifted down, and vpmaddwd adds two exact products. The
 * usual way around it, vpmaddubsw of |a| and b with the sign of a, takes as many instructions and breaks at -128. Queries are
 * widened once, in stretches of I8_DIMS that stay in L1; the matrix is read as unsigned, and what its 128 adds is known.
 * 65536 products of 255 and -128 stay within 31 bits. */
enum { I8_QUERIES = 4, I8_DIMS = 1024 };
typedef struct {
  int32_t even[I8_DIMS / 4], odd[I8_DIMS / 4]; /* two words each: dimensions 0 and 2, 1 and 3 of each four */
  int32_t zero;                                /* -128 * the sum of the stretch */
} wide_query;

static void widen(const int8_t *q, size_t dim, wide_query *w) {
  int32_t sum = 0;
  for (size_t j = 0; j < dim; j += 4) {
    w->even[j / 4] = (int32_t)((uint32_t)(uint16_t)q[j] | (uint32_t)(uint16_t)q[j + 2] << 16);
    w->odd[j / 4] = (int32_t)((uint32_t)(uint16_t)q[j + 1] | (uint32_t)(uint16_t)q[j + 3] << 16);
    sum += q[j] + q[j + 1] + q[j + 2] + q[j + 3];
  }
  w->zero = -128 * sum;
}

/* n_q queries against one group of 16 over one stretch of dimensions; adds to out unless the stretch is the first. */
KERN_INLINE void tile_i8(const wide_query *w, size_t dim, const uint8_t *packed, const int n_q, int is_first, int32_t *out,
                         size_t out_stride) {
  __m256i acc[I8_QUERIES][2];
  const __m256i low = _mm256_set1_epi16(255);
  KERN_UNROLL
  for (int r = 0; r < I8_QUERIES; r++)
    KERN_UNROLL
    for (int h = 0; h < 2; h++) {
      if (r >= n_q) break;
      acc[r][h] = _mm256_set1_epi32(w[r].zero);
      if (!is_first)
        acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_loadu_si256((const __m256i *)(out + (size_t)r * out_stride + 8 * h)));
    }
  for (size_t j = 0; j < dim / 4; j++, packed += 64) {
    __m256i even[2], odd[2];
    KERN_UNROLL
    for (int h = 0; h < 2; h++) {
      __m256i v = _mm256_loadu_si256((const __m256i *)(packed + 32 * h));
      even[h] = _mm256_and_si256(v, low), odd[h] = _mm256_srli_epi16(v, 8);
    }
    KERN_UNROLL
    for (int r = 0; r < I8_QUERIES; r++) {
      if (r >= n_q) break;
      __m256i q_even = _mm256_set1_epi32(w[r].even[j]), q_odd = _mm256_set1_epi32(w[r].odd[j]);
      KERN_UNROLL
      for (int h = 0; h < 2; h++) {
        acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(even[h], q_even));
        acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(odd[h], q_odd));
      }
    }
  }
  KERN_UNROLL
  for (int r = 0; r < I8_QUERIES; r++)
    KERN_UNROLL
    for (int h = 0; h < 2; h++)
      if (r < n_q) _mm256_storeu_si256((__m256i *)(out + (size_t)r * out_stride + 8 * h), acc[r][h]);
}

static void scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                      size_t out_stride) {
  for (size_t r = 0, n; r < n_q; r += n) {
    wide_query w[I8_QUERIES];
    n = n_q - r < I8_QUERIES ? 1 : I8_QUERIES;
    for (size_t j = 0; j < dim || j == 0; j += I8_DIMS) {
      size_t n_dims = dim - j < I8_DIMS ? dim - j : I8_DIMS;
      for (size_t i = 0; i < n; i++) widen(q + (r + i) * q_stride + j, n_dims, w + i);
      for (size_t c = 0; c < n_c; c += KERN_LANES) {
        const uint8_t *p = packed + c * dim + j * KERN_LANES;
        int32_t *to = out + r * out_stride + c;
        if (n == I8_QUERIES)
          tile_i8(w, n_dims, p, I8_QUERIES, j == 0, to, out_stride);
        else
          tile_i8(w, n_dims, p, 1, j == 0, to, out_stride);
      }
    }
  }
}

KERN_INLINE int32_t reduce_add_i32(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, _MM_SHUFFLE(2, 3, 0, 1))));
}

/* Sixteen products, added in pairs. */
KERN_INLINE __m256i products16(const int8_t *q, const uint8_t *row) {
  __m256i v = _mm256_sub_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)row)), _mm256_set1_epi16(128));
  return _mm256_madd_epi16(v, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)q)));
}

static int32_t dot_i8(const int8_t *q, const uint8_t *row, size_t n) {
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) sum[u] = _mm256_add_epi32(sum[u], products16(q + i + 16 * u, row + i + 16 * u));
  for (; i + 16 <= n; i += 16) sum[0] = _mm256_add_epi32(sum[0], products16(q + i, row + i));
  int32_t rest = 0;
  for (; i < n; i++) rest += q[i] * ((int)row[i] - 128);
  return rest + reduce_add_i32(_mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3])));
}

/* kern_key of eight values: negative floats are inverted, others get their sign bit set; NaN becomes the largest. */
KERN_INLINE void keys8(__m256 v, __m256i number, __m256i key[2]) {
  __m256i u = _mm256_castps_si256(v), sign = _mm256_set1_epi32((int)0x80000000u);
  u = _mm256_xor_si256(u, _mm256_or_si256(_mm256_srai_epi32(u, 31), sign));
  u = _mm256_or_si256(u, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  __m256i low = _mm256_unpacklo_epi32(number, u), high = _mm256_unpackhi_epi32(number, u);
  key[0] = _mm256_permute2x128_si256(low, high, 0x20);
  key[1] = _mm256_permute2x128_si256(low, high, 0x31);
}

/* Which 32-bit words of four keys go to the front, by the mask of the keys to keep. */
static const uint32_t gather_words[16][8] = {
  {0},
  {0, 1},
  {2, 3},
  {0, 1, 2, 3},
  {4, 5},
  {0, 1, 4, 5},
  {2, 3, 4, 5},
  {0, 1, 2, 3, 4, 5},
  {6, 7},
  {0, 1, 6, 7},
  {2, 3, 6, 7},
  {0, 1, 2, 3, 6, 7},
  {4, 5, 6, 7},
  {0, 1, 4, 5, 6, 7},
  {2, 3, 4, 5, 6, 7},
  {0, 1, 2, 3, 4, 5, 6, 7},
};
KERN_INLINE __m256i compress(__m256i key, unsigned keep) {
  return _mm256_permutevar8x32_epi32(key, _mm256_loadu_si256((const __m256i *)gather_words[keep]));
}

static size_t keys_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base,
                      uint32_t first, uint64_t limit, uint64_t *out) {
  const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i top = _mm256_set1_epi64x((long long)((uint64_t)1 << 63)); /* unsigned order from a signed comparison */
  const __m256i last = _mm256_xor_si256(_mm256_set1_epi64x((long long)limit), top);
  const __m256 highest = _mm256_set1_ps(kern_key_value(limit));
  const int every = limit >> 32 > 0xff800000u; /* above the key of +Inf: `highest` is a NaN */
  size_t n_out = 0;
  for (size_t i = 0; i < n; i += 8) {
    __m256i live = tail8(n - i), key[2];
    __m256 v = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(mul), _mm256_maskload_ps(scale + i, live)),
                             _mm256_cvtepi32_ps(_mm256_maskload_epi32(score + i, live)));
    v = _mm256_add_ps(_mm256_add_ps(_mm256_maskload_ps(norm2 + i, live), _mm256_set1_ps(base)), v);
    if (!every && !_mm256_movemask_ps(_mm256_cmp_ps(v, highest, _CMP_LE_OQ))) continue; /* mostly */
    keys8(v, _mm256_add_epi32(_mm256_set1_epi32((int)(first + (uint32_t)i)), iota), key);
    unsigned n_live = n - i < 8 ? (unsigned)(n - i) : 8;
    KERN_UNROLL
    for (int h = 0; h < 2; h++) {
      __m256i is_high = _mm256_cmpgt_epi64(_mm256_xor_si256(key[h], top), last);
      unsigned keep = ~(unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(is_high)) & ((1u << n_live) - 1) >> 4 * h & 15;
      _mm256_storeu_si256((__m256i *)(out + n_out), compress(key[h], keep));
      n_out += (size_t)__builtin_popcount(keep);
    }
  }
  return n_out;
}

static void least_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, float *least,
                     size_t n_least, size_t at) {
  for (size_t i = 0; i < n; i += 8) {
    __m256i live = tail8(n - i);
    float *slot = least + ((at + i) & (n_least - 1));
    __m256 v = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(mul), _mm256_maskload_ps(scale + i, live)),
                             _mm256_cvtepi32_ps(_mm256_maskload_epi32(score + i, live)));
    v = _mm256_add_ps(_mm256_add_ps(_mm256_maskload_ps(norm2 + i, live), _mm256_set1_ps(base)), v);
    _mm256_maskstore_ps(slot, live, _mm256_min_ps(v, _mm256_maskload_ps(slot, live)));
  }
}

static void keys_u16(const uint16_t *sum, const uint32_t *row, size_t n, float base, float step, uint32_t first,
                     uint64_t *out) {
  for (size_t i = 0; i < n; i += 8) {
    uint16_t buffer[8] = {0};
    const uint16_t *from = sum + i;
    if (n - i < 8) from = memcpy(buffer, from, (n - i) * sizeof *sum);
    __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)));
    v = _mm256_add_ps(_mm256_set1_ps(base), _mm256_mul_ps(_mm256_set1_ps(step), v));
    __m256i number = _mm256_maskload_epi32((const int *)row + i, tail8(n - i)), key[2];
    keys8(v, _mm256_add_epi32(_mm256_set1_epi32((int)first), number), key);
    _mm256_storeu_si256((__m256i *)(out + i), key[0]);
    _mm256_storeu_si256((__m256i *)(out + i + 4), key[1]);
  }
}

/* ------------------------------------------------------------------ PQ scan */

/* The order of the operands of min and max matters: a NaN never replaces what is there. */
static float pq_table_raw(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim, float *raw,
                          float *low) {
  float widest = 0;
  for (size_t j = 0; j < m; j++, q += sub_dim, words += 256 * sub_dim, raw += 256) {
    int32_t score[256];
    scores_i8(q, 1, 0, sub_dim, words, 256, score, 0);
    __m256 f = _mm256_set1_ps(factor[j]), lo = _mm256_set1_ps(INFINITY), hi = _mm256_set1_ps(-INFINITY);
    for (int w = 0; w < 256; w += 8) {
      __m256 v = _mm256_mul_ps(f, _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(score + w))));
      lo = _mm256_min_ps(v, lo), hi = _mm256_max_ps(v, hi);
      _mm256_storeu_ps(raw + w, v);
    }
    float los[8], his[8], lowest = INFINITY, highest = -INFINITY;
    _mm256_storeu_ps(los, lo), _mm256_storeu_ps(his, hi);
    for (int i = 0; i < 8; i++) lowest = los[i] < lowest ? los[i] : lowest, highest = his[i] > highest ? his[i] : highest;
    low[j] = lowest;
    widest = highest - lowest > widest ? highest - lowest : widest;
  }
  return widest;
}

static void pq_table(const float *raw, const float *low, size_t m, float inv, uint8_t *table) {
  const __m256 mul = _mm256_set1_ps(inv), top = _mm256_set1_ps(255);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (size_t i = 0; i < m * 256; i += 32) {
    __m256 base = _mm256_set1_ps(low[i / 256]);
    __m256i v[4];
    KERN_UNROLL
    for (int u = 0; u < 4; u++)
      v[u] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(raw + i + 8 * u), base), mul), top));
    __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256((__m256i *)(table + i), _mm256_permutevar8x32_epi32(bytes, in_order));
  }
}

/* vpshufb looks up 16 entries by the low nibble and gives 0 where bit 7 of the index is set. A code in 0..127 is walked down by
 * 32, thirty-two entries a step, until it turns negative: it meets pieces 0..(code >> 5) of its half, so when piece k holds
 * T[k] ^ T[k-1], what it collects by XOR telescopes to T[code >> 5]. Codes from 128 on are negative at the start and stay so
 * (saturating subtraction); flipping bit 7 lets them walk the other half while the first kind rests. Each step looks up both
 * sixteens of its thirty-two with one index, the second as its difference to the first, and bit 4 decides at the end whether
 * the difference counts: 41 cheap instructions for 32 codes, 3 more to add them up.
 *
 * G look-ups/s on the machine named above, the loop alone, m = 60: this 6.2; steps of 16, an index for every piece 3.7; steps
 * of 64 and masks for two bits 5.9; vpblendvb for bit 4 5.9; vpgatherdd of bytes 5.2 (and many times slower where microcode
 * guards gathers), of words 3.6 (a table four times as large); scalar loads, four rows side by side 3.7, eight codes per load
 * 3.5. */
typedef struct {
  uint8_t first_and_difference[8][32]; /* sixteen each, of thirty-two k */
} pieces;

KERN_INLINE void make_pieces(const uint8_t *table, pieces *p) {
  __m256i before = _mm256_setzero_si256();
  KERN_UNROLL
  for (int k = 0; k < 8; k++) {
    __m256i both = _mm256_loadu_si256((const __m256i *)(table + 32 * k));
    both = _mm256_xor_si256(both, _mm256_permute2x128_si256(both, both, 0x08)); /* 0x08: zeros, then the lower half */
    _mm256_storeu_si256((__m256i *)p->first_and_difference[k], k % 4 ? _mm256_xor_si256(both, before) : both);
    before = both;
  }
}

KERN_INLINE __m256i twice(const uint8_t *piece) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)piece)); }

/* Left to itself, gcc regroups the chains of XOR into trees and spills their leaves: 4.4 instead of 6.2 G look-ups/s. */
#define KEEP_ORDER(v) __asm__("" : "+x"(v))

/* The entries of 64 codes. With more registers of codes at once there are not enough left. */
enum { N_VEC = 2 };
KERN_INLINE void look_up(const uint8_t *codes, const pieces *p, __m256i entry[N_VEC]) {
  const __m256i step = _mm256_set1_epi8(32), zero = _mm256_setzero_si256();
  __m256i code[N_VEC], difference[N_VEC];
  KERN_UNROLL
  for (int half = 0; half < 2; half++) {
    KERN_UNROLL
    for (int v = 0; v < N_VEC; v++) {
      code[v] = _mm256_loadu_si256((const __m256i *)(codes + 32 * v));
      if (half) code[v] = _mm256_xor_si256(code[v], _mm256_set1_epi8(-128));
    }
    KERN_UNROLL
    for (int k = 4 * half; k < 4 * half + 4; k++) {
      __m256i first = twice(p->first_and_difference[k]), second = twice(p->first_and_difference[k] + 16);
      KERN_UNROLL
      for (int v = 0; v < N_VEC; v++) {
        __m256i x = _mm256_shuffle_epi8(first, code[v]), y = _mm256_shuffle_epi8(second, code[v]);
        entry[v] = k ? _mm256_xor_si256(entry[v], x) : x;
        difference[v] = k ? _mm256_xor_si256(difference[v], y) : y;
        KEEP_ORDER(entry[v]);
        KEEP_ORDER(difference[v]);
        code[v] = _mm256_subs_epi8(code[v], step);
      }
    }
  }
  KERN_UNROLL
  for (int v = 0; v < N_VEC; v++) {
    __m256i bit4 = _mm256_slli_epi16(_mm256_loadu_si256((const __m256i *)(codes + 32 * v)), 3); /* on top of each byte */
    entry[v] = _mm256_xor_si256(entry[v], _mm256_and_si256(difference[v], _mm256_cmpgt_epi8(zero, bit4)));
  }
}

/* Running sums of a group, 32 code bytes to a register. Even bytes E and odd bytes O of the entries are words E + 256 O: `both`
 * sums them modulo 2^16, `odd` sums O, and since SUM E < 2^16 it is both - 256 * odd. */
typedef struct {
  __m256i both[N_VEC], odd[N_VEC];
} group_sums;

/* Not inlined: gcc would take the pieces apart again and keep them broadcast on the stack. */
static __attribute__((noinline)) void add_codes(const uint8_t *codes, size_t n_groups, const pieces *p, group_sums *sums) {
  for (size_t g = 0; g < n_groups; g++) {
    __m256i entry[N_VEC];
    look_up(codes + g * KERN_GROUP, p, entry);
    KERN_UNROLL
    for (int v = 0; v < N_VEC; v++) {
      sums[g].both[v] = _mm256_add_epi16(sums[g].both[v], entry[v]);
      sums[g].odd[v] = _mm256_add_epi16(sums[g].odd[v], _mm256_srli_epi16(entry[v], 8));
    }
  }
}

/* What the survivors of one call share. */
typedef struct {
  __m256i term_mul, limit; /* u16 lanes */
  const uint16_t *terms;
  size_t n_rows, n_out;
  uint32_t *out_row;
  uint16_t *out_sum;
} sieve;

/* Adds the terms of rows [row, min(row + 16, end)) to their sums and appends the survivors. */
KERN_INLINE void sift16(sieve *s, __m256i sum, size_t row, size_t end) {
  if (row >= end) return;
  size_t left = end - row;
  __m256i terms = _mm256_loadu_si256((const __m256i *)(s->terms + row));
  sum = _mm256_adds_epu16(sum, _mm256_mulhi_epu16(terms, s->term_mul));
  __m256i is_low = _mm256_cmpeq_epi16(_mm256_min_epu16(sum, s->limit), sum); /* no unsigned comparison before AVX-512 */
  uint32_t keep = (uint32_t)_mm256_movemask_epi8(is_low) & 0x55555555;      /* two bits a row: keep one */
  if (left < 16) keep &= ((uint32_t)1 << 2 * left) - 1;
  if (!keep) return;
  uint16_t value[16];
  _mm256_storeu_si256((__m256i *)value, sum);
  for (; keep; keep &= keep - 1) {
    unsigned lane = (unsigned)__builtin_ctz(keep) / 2;
    s->out_row[s->n_out] = (uint32_t)(row + lane);
    s->out_sum[s->n_out++] = value[lane];
  }
}

/* Blocks that share one making of the pieces. */
enum { SCAN_ROWS = 4 * KERN_BLOCK, SCAN_GROUPS = SCAN_ROWS / KERN_GROUP, BLOCK_GROUPS = KERN_BLOCK / KERN_GROUP };

/* Rows [row, row + n_rows), n_rows <= SCAN_ROWS, from a block border on. */
static void scan_rows(const uint8_t *codes, size_t m, const uint8_t *table, size_t row, size_t n_rows, sieve *s) {
  group_sums sums[SCAN_GROUPS];
  size_t n_groups = (n_rows + KERN_GROUP - 1) / KERN_GROUP;
  memset(sums, 0, n_groups * sizeof *sums);
  for (size_t j = 0; j < m; j++) {
    pieces p;
    make_pieces(table + 256 * j, &p);
    for (size_t g = 0; g < n_groups; g += BLOCK_GROUPS) {
      size_t first = g * KERN_GROUP, width = n_rows - first < KERN_BLOCK ? (n_rows - first + 1) / 2 * 2 : KERN_BLOCK;
      add_codes(codes + first * m + j * width, (width + KERN_GROUP - 1) / KERN_GROUP, &p, sums + g);
    }
  }
  for (size_t g = 0; g < n_groups; g++) {
    size_t at = row + g * KERN_GROUP, bytes = (n_rows - g * KERN_GROUP + 1) / 2 * 2;
    size_t half = bytes < KERN_GROUP ? bytes / 2 : KERN_GROUP / 2;
    size_t middle = at + half < s->n_rows ? at + half : s->n_rows, end = at + 2 * half < s->n_rows ? at + 2 * half : s->n_rows;
    KERN_UNROLL
    for (int v = 0; v < N_VEC; v++)
      sift16(s, _mm256_sub_epi16(sums[g].both[v], _mm256_slli_epi16(sums[g].odd[v], 8)), at + 16 * (size_t)v, middle);
    KERN_UNROLL
    for (int v = 0; v < N_VEC; v++) sift16(s, sums[g].odd[v], at + half + 16 * (size_t)v, end);
  }
}

static size_t pq_scan(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                      uint16_t term_mul, uint32_t threshold, const uint8_t *next, uint32_t *out_row, uint16_t *out_sum) {
  if (threshold == 0) return 0;
  sieve s = {.term_mul = _mm256_set1_epi16((short)term_mul),
             .limit = _mm256_set1_epi16((short)kern_pq_limit(threshold)),
             .terms = terms,
             .n_rows = n_rows,
             .out_row = out_row,
             .out_sum = out_sum};
  kern_want_codes(next, n_rows * m);
  for (size_t row = 0; row < n_rows; row += SCAN_ROWS)
    scan_rows(codes + row * m, m, table, row, n_rows - row < SCAN_ROWS ? n_rows - row : SCAN_ROWS, &s);
  return s.n_out;
}

/* ------------------------------------------------------------------ selection */

/* In place for the low keys: what is stored at n_low <= i ends before i + 4, which has been read. */
static size_t split_u64(uint64_t *a, size_t n, uint64_t pivot, uint64_t *spill) {
  const __m256i top = _mm256_set1_epi64x((long long)((uint64_t)1 << 63)); /* unsigned order from a signed comparison */
  const __m256i cut = _mm256_xor_si256(_mm256_set1_epi64x((long long)pivot), top);
  size_t n_low = 0, n_high = 0, i = 0;
  for (; i + 4 <= n; i += 4) {
    __m256i key = _mm256_loadu_si256((const __m256i *)(a + i));
    __m256i is_high = _mm256_cmpgt_epi64(_mm256_xor_si256(key, top), cut);
    unsigned high = (unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(is_high));
    _mm256_storeu_si256((__m256i *)(a + n_low), compress(key, high ^ 15));
    _mm256_storeu_si256((__m256i *)(spill + n_high), compress(key, high));
    size_t k = (size_t)__builtin_popcount(high);
    n_low += 4 - k;
    n_high += k;
  }
  for (; i < n; i++) {
    uint64_t key = a[i];
    if (key <= pivot)
      a[n_low++] = key;
    else
      spill[n_high++] = key;
  }
  memcpy(a + n_low, spill, n_high * sizeof *a);
  return n_low;
}

static uint64_t select_u64(uint64_t *a, size_t n, size_t want, uint64_t *scratch) {
  enum { SELECT_FEW = 24 }; /* a split of a few dozen keys is cheaper than sorting them */
  return kern_select_by(split_u64, kern_sort_insertion, SELECT_FEW, a, n, want, scratch);
}

static size_t not_below_f32(const float *a, size_t n, float limit, uint32_t *out) {
  const __m256 least = _mm256_set1_ps(limit);
  size_t n_out = 0;
  for (size_t i = 0; i < n; i += 8) {
    __m256i live = tail8(n - i);
    unsigned keep = (unsigned)_mm256_movemask_ps(_mm256_and_ps(_mm256_cmp_ps(_mm256_maskload_ps(a + i, live), least, _CMP_NLT_UQ),
                                                               _mm256_castsi256_ps(live)));
    for (; keep; keep &= keep - 1) out[n_out++] = (uint32_t)i + (uint32_t)__builtin_ctz(keep);
  }
  return n_out;
}

static uint64_t xxh3(const void *p, size_t n) { return XXH3_64bits(p, n); }

const kern kern_table_avx2 = {
  .name = "avx2",
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
  .sort_few_u64 = kern_sort_insertion,
  .select_u64 = select_u64,
  .not_below_f32 = not_below_f32,
  .xxh3 = xxh3,
};
#else
typedef int kern_avx2_is_empty; /* ISO C wants a declaration in every file */
#endif
