/* kern_neon.c - AArch64 (armv8-a, where NEON is never missing). Definitions: kern_scalar.c.
 *
 * What carries the speed
 *   dot, l2sq, cosine  independent fused chains; tails go through a small buffer of zeros.
 *   argmax, scores     a register tile of 5 rows x 16 centroids, 20 accumulators of the 32 registers (gcc spills one of 24).
 *   scores_i8, dot_i8  SMULL of 8 bytes, SADALP adds the products in pairs to words: exact, also for -128 * -128. Where the CPU
 *                      has the dot product instructions, kern_dotprod.c does these two with a quarter of the instructions.
 *   pq_scan            a table row of 256 bytes is sixteen registers; four TBL/TBX look up 16 codes in its quarters. Nothing
 *                      is gathered.
 *   select             the scalar split: there is no compress, and two keys to a register do not pay.
 * Precision: f32 throughout, fused; a score of argmax is bias, then the dimensions in order, in one chain per (row,
 * centroid), whatever the tile: results do not depend on the rows that share a call, and equal scores_f32 to the bit.
 * Overflow: u16 sums of m <= 256 bytes reach 65,280; the term is added with saturation. 65536 products of bytes stay within 31
 * bits. Run under qemu only: shapes were chosen by counting instructions and registers.
 */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "kern_int.h"

/* n floats, n <= 4, the rest zeros. */
KERN_INLINE float32x4_t load4(const float *a, size_t n) {
  if (n >= 4) return vld1q_f32(a);
  float buffer[4] = {0};
  memcpy(buffer, a, n * sizeof *a);
  return vld1q_f32(buffer);
}
/* n halves, n <= 4, the rest zeros. */
KERN_INLINE float32x4_t load4_f16(const uint16_t *a, size_t n) {
  uint16_t buffer[4] = {0};
  if (n < 4) a = memcpy(buffer, a, n * sizeof *a);
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(a)));
}

KERN_INLINE float reduce_add4(const float32x4_t sum[4]) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(sum[0], sum[1]), vaddq_f32(sum[2], sum[3])));
}

/* ------------------------------------------------------------------ sums over two arrays */

static float dot_f32(const float *a, const float *b, size_t n) {
  float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) sum[u] = vfmaq_f32(sum[u], vld1q_f32(a + i + 4 * u), vld1q_f32(b + i + 4 * u));
  for (; i < n; i += 4) sum[0] = vfmaq_f32(sum[0], load4(a + i, n - i), load4(b + i, n - i));
  return reduce_add4(sum);
}

static float l2sq_f32(const float *a, const float *b, size_t n) {
  float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      float32x4_t d = vsubq_f32(vld1q_f32(a + i + 4 * u), vld1q_f32(b + i + 4 * u));
      sum[u] = vfmaq_f32(sum[u], d, d);
    }
  for (; i < n; i += 4) {
    float32x4_t d = vsubq_f32(load4(a + i, n - i), load4(b + i, n - i));
    sum[0] = vfmaq_f32(sum[0], d, d);
  }
  return reduce_add4(sum);
}

static void cosine_f32(const float *a, const float *b, size_t n, float out[3]) {
  float32x4_t ab[2] = {vdupq_n_f32(0), vdupq_n_f32(0)}, aa[2] = {ab[0], ab[0]}, bb[2] = {ab[0], ab[0]};
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    KERN_UNROLL
    for (int u = 0; u < 2; u++) {
      float32x4_t va = vld1q_f32(a + i + 4 * u), vb = vld1q_f32(b + i + 4 * u);
      ab[u] = vfmaq_f32(ab[u], va, vb);
      aa[u] = vfmaq_f32(aa[u], va, va);
      bb[u] = vfmaq_f32(bb[u], vb, vb);
    }
  for (; i < n; i += 4) {
    float32x4_t va = load4(a + i, n - i), vb = load4(b + i, n - i);
    ab[0] = vfmaq_f32(ab[0], va, vb);
    aa[0] = vfmaq_f32(aa[0], va, va);
    bb[0] = vfmaq_f32(bb[0], vb, vb);
  }
  out[0] = vaddvq_f32(vaddq_f32(ab[0], ab[1]));
  out[1] = vaddvq_f32(vaddq_f32(aa[0], aa[1]));
  out[2] = vaddvq_f32(vaddq_f32(bb[0], bb[1]));
}

KERN_AHEAD_F32

static float dot_f16(const float *a, const uint16_t *b, size_t n) {
  float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) sum[u] = vfmaq_f32(sum[u], vld1q_f32(a + i + 4 * u), load4_f16(b + i + 4 * u, 4));
  for (; i < n; i += 4) sum[0] = vfmaq_f32(sum[0], load4(a + i, n - i), load4_f16(b + i, n - i));
  return reduce_add4(sum);
}

static float l2sq_f16(const float *a, const uint16_t *b, size_t n) {
  float32x4_t sum[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
  size_t i = 0;
  for (; i + 16 <= n; i += 16)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      float32x4_t d = vsubq_f32(vld1q_f32(a + i + 4 * u), load4_f16(b + i + 4 * u, 4));
      sum[u] = vfmaq_f32(sum[u], d, d);
    }
  for (; i < n; i += 4) {
    float32x4_t d = vsubq_f32(load4(a + i, n - i), load4_f16(b + i, n - i));
    sum[0] = vfmaq_f32(sum[0], d, d);
  }
  return reduce_add4(sum);
}

/* ------------------------------------------------------------------ element-wise */

static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(out + i, load4_f16(in + i, 4));
  if (i < n) {
    float full[4];
    vst1q_f32(full, load4_f16(in + i, n - i));
    memcpy(out + i, full, (n - i) * sizeof *out);
  }
}

static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
  if (i < n) {
    uint16_t half[4];
    vst1_u16(half, vreinterpret_u16_f16(vcvt_f16_f32(load4(in + i, n - i))));
    memcpy(out + i, half, (n - i) * sizeof *out);
  }
}

static int all_finite_f32(const float *a, size_t n) {
  uint32x4_t exponent = vdupq_n_u32(0x7f800000), bad = vdupq_n_u32(0);
  for (size_t i = 0; i < n; i += 4) {
    uint32x4_t v = vreinterpretq_u32_f32(load4(a + i, n - i));
    bad = vorrq_u32(bad, vceqq_u32(vandq_u32(v, exponent), exponent));
  }
  return vmaxvq_u32(bad) == 0;
}

/* ------------------------------------------------------------------ packed matrices */

/* Rows per tile, and rows that pass over one group of 16 centroids before the next: while they do, the group stays in
 * L1 or L2 (61 KB at 960 dimensions). Their running winners take 128 bytes of stack each. */
enum { TILE_ROWS = 5, CHUNK_ROWS = 100, QUARTERS = KERN_LANES / 4 };

/* Per row and lane: the best score so far and the number of its group. */
typedef struct {
  float score[KERN_LANES];
  uint32_t group[KERN_LANES];
} winner;

/* n_rows x 16 scores into acc; n_rows is a constant where this is inlined. */
KERN_INLINE void tile_scores(const float *x, size_t stride, size_t dim, const float *packed, const float *bias,
                             const int n_rows, float32x4_t acc[TILE_ROWS][QUARTERS]) {
  KERN_UNROLL
  for (int r = 0; r < TILE_ROWS; r++)
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++)
      if (r < n_rows) acc[r][h] = vld1q_f32(bias + 4 * h);
  for (size_t j = 0; j < dim; j++, packed += KERN_LANES) {
    float32x4_t column[QUARTERS];
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++) column[h] = vld1q_f32(packed + 4 * h);
    KERN_UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
      if (r >= n_rows) break;
      float value = x[(size_t)r * stride + j];
      KERN_UNROLL
      for (int h = 0; h < QUARTERS; h++) acc[r][h] = vfmaq_n_f32(acc[r][h], column[h], value);
    }
  }
}

/* Lets the scores of one group compete with the rows' winners; n_live lanes hold a centroid. "Greater" is false for NaN
 * and for ties, so the earlier group stays. */
KERN_INLINE void tile_compete(const float *x, size_t stride, size_t dim, const float *packed, const float *bias,
                              uint32_t group, size_t n_live, const int n_rows, winner *win) {
  static const uint32_t lanes[4] = {0, 1, 2, 3};
  float32x4_t acc[TILE_ROWS][QUARTERS];
  tile_scores(x, stride, dim, packed, bias, n_rows, acc);
  uint32x4_t number = vdupq_n_u32(group), end = vdupq_n_u32(n_live < KERN_LANES ? (uint32_t)n_live : KERN_LANES);
  KERN_UNROLL
  for (int h = 0; h < QUARTERS; h++) {
    uint32x4_t live = vcltq_u32(vaddq_u32(vld1q_u32(lanes), vdupq_n_u32(4 * (uint32_t)h)), end);
    KERN_UNROLL
    for (int r = 0; r < TILE_ROWS; r++) {
      if (r >= n_rows) break;
      float32x4_t score = vld1q_f32(win[r].score + 4 * h);
      uint32x4_t owner = vld1q_u32(win[r].group + 4 * h), wins = vandq_u32(live, vcgtq_f32(acc[r][h], score));
      vst1q_f32(win[r].score + 4 * h, vbslq_f32(wins, acc[r][h], score));
      vst1q_u32(win[r].group + 4 * h, vbslq_u32(wins, number, owner));
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
      for (; r + 5 <= n_rows; r += 5) tile_compete(chunk + r * stride, stride, dim, p, h, group, n_c - c, 5, win + r);
      for (; r + 2 <= n_rows; r += 2) tile_compete(chunk + r * stride, stride, dim, p, h, group, n_c - c, 2, win + r);
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
  float32x4_t acc[STRIP_GROUPS][QUARTERS];
  KERN_UNROLL
  for (int g = 0; g < STRIP_GROUPS; g++)
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++)
      if (g < n_groups) acc[g][h] = vld1q_f32(bias + KERN_LANES * g + 4 * h);
  for (size_t j = 0; j < dim; j++) {
    float value = x[j];
    KERN_UNROLL
    for (int g = 0; g < STRIP_GROUPS; g++) {
      if (g >= n_groups) break;
      const float *column = packed + ((size_t)g * dim + j) * KERN_LANES;
      KERN_UNROLL
      for (int h = 0; h < QUARTERS; h++) acc[g][h] = vfmaq_n_f32(acc[g][h], vld1q_f32(column + 4 * h), value);
    }
  }
  KERN_UNROLL
  for (int g = 0; g < STRIP_GROUPS; g++)
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++)
      if (g < n_groups) vst1q_f32(out + KERN_LANES * g + 4 * h, acc[g][h]);
}

static void scores_f32(const float *x, size_t dim, const float *packed, const float *bias, size_t n_c, float *out) {
  size_t c = 0, n_padded = (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES;
  for (; c + STRIP_GROUPS * KERN_LANES <= n_padded; c += STRIP_GROUPS * KERN_LANES)
    strip_scores(x, dim, packed + c * dim, bias + c, STRIP_GROUPS, out + c);
  for (; c < n_padded; c += KERN_LANES) strip_scores(x, dim, packed + c * dim, bias + c, 1, out + c);
}

KERN_INLINE void tile_store(const float *x, size_t stride, size_t dim, const float *packed, const float *bias, const int n_rows,
                            float *out, size_t out_stride) {
  float32x4_t acc[TILE_ROWS][QUARTERS];
  tile_scores(x, stride, dim, packed, bias, n_rows, acc);
  KERN_UNROLL
  for (int r = 0; r < TILE_ROWS; r++)
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++)
      if (r < n_rows) vst1q_f32(out + (size_t)r * out_stride + 4 * h, acc[r][h]);
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
      for (; r + 5 <= n_rows; r += 5) tile_store(chunk + r * stride, stride, dim, p, h, 5, to + r * out_stride, out_stride);
      for (; r + 2 <= n_rows; r += 2) tile_store(chunk + r * stride, stride, dim, p, h, 2, to + r * out_stride, out_stride);
      if (r < n_rows) tile_store(chunk + r * stride, stride, dim, p, h, 1, to + r * out_stride, out_stride);
    }
  }
}

/* ------------------------------------------------------------------ bytes */

static float quantize_i8(const float *x, size_t n, int8_t *out) {
  float32x4_t top = vdupq_n_f32(0);
  for (size_t i = 0; i < n; i += 4) top = vmaxq_f32(top, vabsq_f32(load4(x + i, n - i)));
  float m = vmaxvq_f32(top);
  float32x4_t inv = vdupq_n_f32(m >= 1e-30f ? 127 / m : 0);
  for (size_t i = 0; i < n; i += 4) {
    int16x4_t words = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(load4(x + i, n - i), inv)));
    uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
    memcpy(out + i, &bytes, n - i < 4 ? n - i : 4);
  }
  return m >= 1e-30f ? m / 127 : 0;
}

/* Sixteen bytes of 128 + value as values. */
KERN_INLINE int8x16_t values16(const uint8_t *bytes) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes), vdupq_n_u8(128)));
}

/* One query against one group of 16; an accumulator holds two halves each of two rows. Two queries at once would share the
 * loads, which are not what limits it, and spill. */
KERN_INLINE void group_i8(const int8_t *q, size_t dim, const uint8_t *packed, int32_t *out) {
  int32x4_t acc[2 * QUARTERS];
  KERN_UNROLL
  for (int h = 0; h < 2 * QUARTERS; h++) acc[h] = vdupq_n_s32(0);
  for (size_t j = 0; j < dim; j += 4, packed += 4 * KERN_LANES) {
    int32_t bytes;
    memcpy(&bytes, q + j, 4);
    int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++) {
      int8x16_t v = values16(packed + 16 * h);
      acc[2 * h] = vpadalq_s16(acc[2 * h], vmull_s8(vget_low_s8(v), vget_low_s8(four)));
      acc[2 * h + 1] = vpadalq_s16(acc[2 * h + 1], vmull_high_s8(v, four));
    }
  }
  KERN_UNROLL
  for (int h = 0; h < QUARTERS; h++) vst1q_s32(out + 4 * h, vpaddq_s32(acc[2 * h], acc[2 * h + 1]));
}

static void scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                      size_t out_stride) {
  for (size_t c = 0; c < n_c; c += KERN_LANES) /* a group stays in L1 while all queries pass */
    for (size_t r = 0; r < n_q; r++) group_i8(q + r * q_stride, dim, packed + c * dim, out + r * out_stride + c);
}

static int32_t dot_i8(const int8_t *q, const uint8_t *row, size_t n) {
  int32x4_t sum[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    int8x16_t a = vld1q_s8(q + i), b = values16(row + i);
    sum[0] = vpadalq_s16(sum[0], vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    sum[1] = vpadalq_s16(sum[1], vmull_high_s8(a, b));
  }
  int32_t rest = 0;
  for (; i < n; i++) rest += q[i] * ((int)row[i] - 128);
  return vaddvq_s32(vaddq_s32(sum[0], sum[1])) + rest;
}

/* kern_key of four values: negative floats are inverted, others get their sign bit set; NaN becomes the largest. */
KERN_INLINE void keys4(float32x4_t v, uint32x4_t number, uint64x2_t key[2]) {
  uint32x4_t u = vreinterpretq_u32_f32(v);
  u = veorq_u32(u, vorrq_u32(vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(u), 31)), vdupq_n_u32(0x80000000u)));
  u = vornq_u32(u, vceqq_f32(v, v));
  key[0] = vreinterpretq_u64_u32(vzip1q_u32(number, u));
  key[1] = vreinterpretq_u64_u32(vzip2q_u32(number, u));
}

static size_t keys_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base,
                      uint32_t first, uint64_t limit, uint64_t *out) {
  static const uint32_t lanes[4] = {0, 1, 2, 3};
  const float32x4_t highest = vdupq_n_f32(kern_key_value(limit));
  const int every = limit >> 32 > 0xff800000u; /* above the key of +Inf: `highest` is a NaN */
  size_t n_out = 0, i = 0;
  for (; i + 4 <= n; i += 4) {
    float32x4_t v = vmulq_f32(vmulq_f32(vdupq_n_f32(mul), vld1q_f32(scale + i)), vcvtq_f32_s32(vld1q_s32(score + i)));
    v = vaddq_f32(vaddq_f32(vld1q_f32(norm2 + i), vdupq_n_f32(base)), v);
    if (!every && !vmaxvq_u32(vcleq_f32(v, highest))) continue; /* mostly */
    uint64x2_t pair[2];
    uint64_t key[4];
    keys4(v, vaddq_u32(vdupq_n_u32(first + (uint32_t)i), vld1q_u32(lanes)), pair);
    vst1q_u64(key, pair[0]), vst1q_u64(key + 2, pair[1]);
    for (int lane = 0; lane < 4; lane++) {
      out[n_out] = key[lane];
      n_out += key[lane] <= limit;
    }
  }
  for (; i < n; i++) {
    uint64_t key = kern_key((norm2[i] + base) + (mul * scale[i]) * (float)score[i], first + (uint32_t)i);
    out[n_out] = key;
    n_out += key <= limit;
  }
  return n_out;
}

static void least_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, float *least,
                     size_t n_least, size_t at) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    float *slot = least + ((at + i) & (n_least - 1));
    float32x4_t v = vmulq_f32(vmulq_f32(vdupq_n_f32(mul), vld1q_f32(scale + i)), vcvtq_f32_s32(vld1q_s32(score + i)));
    vst1q_f32(slot, vminnmq_f32(vaddq_f32(vaddq_f32(vld1q_f32(norm2 + i), vdupq_n_f32(base)), v), vld1q_f32(slot)));
  }
  for (; i < n; i++) {
    float v = (norm2[i] + base) + (mul * scale[i]) * (float)score[i], *slot = &least[(at + i) & (n_least - 1)];
    if (v < *slot) *slot = v;
  }
}

static void keys_u16(const uint16_t *sum, const uint32_t *row, size_t n, float base, float step, uint32_t first,
                     uint64_t *out) {
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    float32x4_t v = vcvtq_f32_u32(vmovl_u16(vld1_u16(sum + i)));
    uint64x2_t key[2];
    v = vaddq_f32(vdupq_n_f32(base), vmulq_f32(vdupq_n_f32(step), v));
    keys4(v, vaddq_u32(vdupq_n_u32(first), vld1q_u32(row + i)), key);
    vst1q_u64(out + i, key[0]), vst1q_u64(out + i + 2, key[1]);
  }
  for (; i < n; i++) out[i] = kern_key(base + step * (float)sum[i], first + row[i]);
}

/* ------------------------------------------------------------------ PQ scan */

/* Selecting by "less", unlike FMIN, lets no NaN replace what is there. */
float kern_neon_table_row(const int32_t score[256], float factor, float *raw, float *low) {
  float32x4_t lo = vdupq_n_f32(INFINITY), hi = vdupq_n_f32(-INFINITY);
  for (int w = 0; w < 256; w += 4) {
    float32x4_t v = vmulq_n_f32(vcvtq_f32_s32(vld1q_s32(score + w)), factor);
    lo = vbslq_f32(vcltq_f32(v, lo), v, lo), hi = vbslq_f32(vcgtq_f32(v, hi), v, hi);
    vst1q_f32(raw + w, v);
  }
  *low = vminvq_f32(lo);
  return vmaxvq_f32(hi) - *low;
}

static float pq_table_raw(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim, float *raw,
                          float *low) {
  float widest = 0;
  for (size_t j = 0; j < m; j++) {
    int32_t score[256];
    scores_i8(q + j * sub_dim, 1, 0, sub_dim, words + j * 256 * sub_dim, 256, score, 0);
    float width = kern_neon_table_row(score, factor[j], raw + j * 256, low + j);
    widest = width > widest ? width : widest;
  }
  return widest;
}

static void pq_table(const float *raw, const float *low, size_t m, float inv, uint8_t *table) {
  const float32x4_t top = vdupq_n_f32(255);
  for (size_t i = 0; i < m * 256; i += 16) {
    float32x4_t base = vdupq_n_f32(low[i / 256]);
    uint16x4_t words[4];
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      float32x4_t v = vmulq_n_f32(vsubq_f32(vld1q_f32(raw + i + 4 * u), base), inv);
      v = vbslq_f32(vcltq_f32(v, top), v, top); /* 255 for NaN too */
      words[u] = vmovn_u32(vcvtnq_u32_f32(v));
    }
    uint8x8_t first = vmovn_u16(vcombine_u16(words[0], words[1])), second = vmovn_u16(vcombine_u16(words[2], words[3]));
    vst1q_u8(table + i, vcombine_u8(first, second));
  }
}

/* Running sums of a group, 16 code bytes to a register. Even bytes E and odd bytes O of the entries are words E + 256 O: `both`
 * sums them modulo 2^16, `odd` sums O, and since SUM E < 2^16 it is both - 256 * odd. */
enum { N_VEC = KERN_GROUP / 16, BLOCK_GROUPS = KERN_BLOCK / KERN_GROUP };
typedef struct {
  uint16x8_t both[N_VEC], odd[N_VEC];
} group_sums;

/* Adds the entries of up to four groups of codes, side by side in memory, of one sub-quantizer. TBL gives 0 for an index above
 * 63 and TBX keeps what is there, so the quarters of the table come one after the other. */
static void add_codes(const uint8_t *codes, size_t n_groups, const uint8_t *table, group_sums *sums) {
  const uint8x16x4_t t0 = vld1q_u8_x4(table), t1 = vld1q_u8_x4(table + 64);
  const uint8x16x4_t t2 = vld1q_u8_x4(table + 128), t3 = vld1q_u8_x4(table + 192);
  const uint8x16_t quarter = vdupq_n_u8(64);
  for (size_t g = 0; g < n_groups; g++)
    KERN_UNROLL
    for (int v = 0; v < N_VEC; v++) {
      uint8x16_t code = vld1q_u8(codes + g * KERN_GROUP + 16 * v), entry = vqtbl4q_u8(t0, code);
      code = vsubq_u8(code, quarter), entry = vqtbx4q_u8(entry, t1, code);
      code = vsubq_u8(code, quarter), entry = vqtbx4q_u8(entry, t2, code);
      code = vsubq_u8(code, quarter), entry = vqtbx4q_u8(entry, t3, code);
      uint16x8_t words = vreinterpretq_u16_u8(entry);
      sums[g].both[v] = vaddq_u16(sums[g].both[v], words);
      sums[g].odd[v] = vsraq_n_u16(sums[g].odd[v], words, 8);
    }
}

/* What the survivors of one call share. */
typedef struct {
  uint16x8_t limit;
  uint16_t term_mul;
  const uint16_t *terms;
  size_t n_rows, n_out;
  uint32_t *out_row;
  uint16_t *out_sum;
} sieve;

/* Adds the terms of rows [row, min(row + 8, end)) to their sums and appends the survivors. */
KERN_INLINE void sift8(sieve *s, uint16x8_t sum, size_t row, size_t end) {
  if (row >= end) return;
  size_t left = end - row;
  uint16x8_t terms = vld1q_u16(s->terms + row);
  uint32x4_t low = vmull_n_u16(vget_low_u16(terms), s->term_mul), high = vmull_n_u16(vget_high_u16(terms), s->term_mul);
  sum = vqaddq_u16(sum, vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
  uint64_t keep = vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(vcleq_u16(sum, s->limit))), 0); /* a byte a row */
  if (left < 8) keep &= ((uint64_t)1 << 8 * left) - 1;
  if (!keep) return;
  uint16_t value[8];
  vst1q_u16(value, sum);
  for (keep &= 0x0101010101010101u; keep; keep &= keep - 1) {
    unsigned lane = (unsigned)__builtin_ctzll(keep) / 8;
    s->out_row[s->n_out] = (uint32_t)(row + lane);
    s->out_sum[s->n_out++] = value[lane];
  }
}

/* One block of `width` rows, rounded up to 2. */
static void scan_block(const uint8_t *codes, size_t m, const uint8_t *table, size_t row, size_t width, sieve *s) {
  group_sums sums[BLOCK_GROUPS];
  size_t n_groups = (width + KERN_GROUP - 1) / KERN_GROUP;
  memset(sums, 0, n_groups * sizeof *sums);
  for (size_t j = 0; j < m; j++) add_codes(codes + j * width, n_groups, table + 256 * j, sums);
  for (size_t g = 0; g < n_groups; g++) {
    size_t at = row + g * KERN_GROUP, bytes = width - g * KERN_GROUP, half = bytes < KERN_GROUP ? bytes / 2 : KERN_GROUP / 2;
    size_t middle = at + half < s->n_rows ? at + half : s->n_rows, end = at + 2 * half < s->n_rows ? at + 2 * half : s->n_rows;
    for (int v = 0; v < N_VEC; v++)
      sift8(s, vsubq_u16(sums[g].both[v], vshlq_n_u16(sums[g].odd[v], 8)), at + 8 * (size_t)v, middle);
    for (int v = 0; v < N_VEC; v++) sift8(s, sums[g].odd[v], at + half + 8 * (size_t)v, end);
  }
}

static size_t pq_scan(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                      uint16_t term_mul, uint32_t threshold, const uint8_t *next, uint32_t *out_row, uint16_t *out_sum) {
  if (threshold == 0) return 0;
  sieve s = {.limit = vdupq_n_u16(kern_pq_limit(threshold)),
             .term_mul = term_mul,
             .terms = terms,
             .n_rows = n_rows,
             .out_row = out_row,
             .out_sum = out_sum};
  kern_want_codes(next, n_rows * m);
  for (size_t row = 0; row < n_rows; row += KERN_BLOCK) {
    size_t left = n_rows - row < KERN_BLOCK ? n_rows - row : KERN_BLOCK;
    scan_block(codes + row * m, m, table, row, (left + 1) / 2 * 2, &s);
  }
  return s.n_out;
}

static size_t not_below_f32(const float *a, size_t n, float limit, uint32_t *out) {
  const float32x4_t least = vdupq_n_f32(limit);
  size_t n_out = 0, i = 0;
  for (; i + 4 <= n; i += 4) {
    if (vminvq_u32(vcltq_f32(vld1q_f32(a + i), least))) continue; /* mostly: all below */
    for (size_t j = i; j < i + 4; j++) {
      out[n_out] = (uint32_t)j;
      n_out += !(a[j] < limit);
    }
  }
  for (; i < n; i++) {
    out[n_out] = (uint32_t)i;
    n_out += !(a[i] < limit);
  }
  return n_out;
}

static uint64_t xxh3(const void *p, size_t n) { return XXH3_64bits(p, n); }

/* ------------------------------------------------------------------ tables */

/* Two tables that differ in what is made of dot products of bytes. */
#define NEON_CALLS                                                                                                        \
  .dot_f32 = dot_f32, .l2sq_f32 = l2sq_f32, .cosine_f32 = cosine_f32, .f16_to_f32 = f16_to_f32, .f32_to_f16 = f32_to_f16, \
  .dot_ahead_f32 = dot_ahead_f32, .l2sq_ahead_f32 = l2sq_ahead_f32, .cosine_ahead_f32 = cosine_ahead_f32,                 \
  .all_finite_f32 = all_finite_f32, .scores_f32 = scores_f32, .scores_many_f32 = scores_many_f32,                         \
  .argmax_f32 = argmax_f32, .dot_f16 = dot_f16, .l2sq_f16 = l2sq_f16, .quantize_i8 = quantize_i8, .keys_i8 = keys_i8,     \
  .least_i8 = least_i8, .keys_u16 = keys_u16, .pq_table = pq_table, .pq_scan = pq_scan, .xxh3 = xxh3,                     \
  .not_below_f32 = not_below_f32, .sort_few_u64 = kern_sort_insertion, .select_u64 = kern_scalar_select_u64

const kern kern_table_neon = {
  .name = "neon",
  NEON_CALLS,
  .scores_i8 = scores_i8,
  .dot_i8 = dot_i8,
  .pq_table_raw = pq_table_raw,
};
const kern kern_table_dotprod = {
  .name = "dotprod",
  NEON_CALLS,
  .scores_i8 = kern_dotprod_scores_i8,
  .dot_i8 = kern_dotprod_dot_i8,
  .pq_table_raw = kern_dotprod_pq_table_raw,
};
#else
typedef int kern_neon_is_empty; /* ISO C wants a declaration in every file */
#endif
