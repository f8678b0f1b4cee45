/* kern_scalar.c - the definition of every kernel: plain C, one accumulator per sum, additions in array order.
 *
 * Compiled for the baseline CPU at -O2, so what the tests compare with does not depend on an instruction set. The sums
 * of pq_scan are 32-bit: at most 256 * 255 + 65535 before they are cut to 16 bits.
 */
#include <math.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "kern_int.h"

static float dot_f32(const float *a, const float *b, size_t n) {
  float sum = 0;
  for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static float l2sq_f32(const float *a, const float *b, size_t n) {
  float sum = 0;
  for (size_t i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

static void cosine_f32(const float *a, const float *b, size_t n, float out[3]) {
  float ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < n; i++) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  out[0] = ab;
  out[1] = aa;
  out[2] = bb;
}

KERN_AHEAD_F32

/* ------------------------------------------------------------------ half floats */

static uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
static float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

/* NaNs keep sign and payload and become quiet, in both directions, because that is what the F16C instructions do. */
static void f16_to_f32(const uint16_t *in, float *out, size_t n) {
  for (size_t i = 0; i < n; i++) {
    uint32_t sign = (uint32_t)(in[i] & 0x8000) << 16, exponent = in[i] >> 10 & 31, mantissa = in[i] & 0x3ff;
    if (exponent == 31)
      out[i] = float_of(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    else if (exponent)
      out[i] = float_of(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
    else /* zero or subnormal: a multiple of 2^-24, exact as a float */
      out[i] = float_of(sign | bits_of((float)mantissa * 0x1p-24f));
  }
}

static void f32_to_f16(const float *in, uint16_t *out, size_t n) {
  for (size_t i = 0; i < n; i++) {
    uint32_t u = bits_of(in[i]), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff, half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00 | (magnitude >> 13 & 0x3ff);
    } else if (magnitude >= 0x477ff000) { /* 65520 lies halfway between the largest half and 2^16; even is up */
      half = 0x7c00;
    } else if (magnitude >= 0x38800000) { /* 2^-14: normal; a carry out of the mantissa is the next exponent */
      half = (magnitude + 0xfff + (magnitude >> 13 & 1) - ((uint32_t)(127 - 15) << 23)) >> 13;
    } else { /* adding 0.5, whose last bit is worth 2^-24, lets the FPU round to a multiple of 2^-24 */
      half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    }
    out[i] = (uint16_t)(sign | half);
  }
}

static float dot_f16(const float *a, const uint16_t *b, size_t n) {
  float sum = 0;
  for (size_t i = 0; i < n; i++) {
    float v;
    f16_to_f32(b + i, &v, 1);
    sum += a[i] * v;
  }
  return sum;
}

static float l2sq_f16(const float *a, const uint16_t *b, size_t n) {
  float sum = 0;
  for (size_t i = 0; i < n; i++) {
    float v;
    f16_to_f32(b + i, &v, 1);
    sum += (a[i] - v) * (a[i] - v);
  }
  return sum;
}

static int all_finite_f32(const float *a, size_t n) {
  for (size_t i = 0; i < n; i++)
    if ((bits_of(a[i]) & 0x7f800000) == 0x7f800000) return 0;
  return 1;
}

/* ------------------------------------------------------------------ packed matrices */

/* The sixteen scores of one group. */
static void group_scores(const float *x, size_t dim, const float *group, const float *bias, float *out) {
  for (int lane = 0; lane < KERN_LANES; lane++) out[lane] = bias[lane];
  for (size_t j = 0; j < dim; j++, group += KERN_LANES)
    for (int lane = 0; lane < KERN_LANES; lane++) out[lane] += x[j] * group[lane];
}

static void scores_f32(const float *x, size_t dim, const float *packed, const float *bias, size_t n_c, float *out) {
  for (size_t c = 0; c < n_c; c += KERN_LANES) group_scores(x, dim, packed + c * dim, bias + c, out + c);
}

/* A NaN score never wins; a row without any score above -Inf gets centroid 0 and -Inf. */
static void argmax_f32(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                       size_t n_c, uint32_t *id, float *best) {
  for (size_t r = 0; r < n_x; r++) {
    uint32_t winner = 0;
    float top = -INFINITY, score[KERN_LANES];
    for (size_t c = 0; c < n_c; c++) {
      if (c % KERN_LANES == 0) group_scores(x + r * stride, dim, packed + c * dim, bias + c, score);
      if (score[c % KERN_LANES] > top) {
        top = score[c % KERN_LANES];
        winner = (uint32_t)c;
      }
    }
    id[r] = winner;
    if (best) best[r] = top;
  }
}

static void scores_many_f32(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                            size_t n_c, float *out, size_t out_stride) {
  for (size_t r = 0; r < n_x; r++) scores_f32(x + r * stride, dim, packed, bias, n_c, out + r * out_stride);
}

/* ------------------------------------------------------------------ bytes */

static float quantize_i8(const float *x, size_t n, int8_t *out) {
  float m = 0;
  for (size_t i = 0; i < n; i++) m = fabsf(x[i]) > m ? fabsf(x[i]) : m;
  float inv = m >= 1e-30f ? 127 / m : 0;
  for (size_t i = 0; i < n; i++) out[i] = (int8_t)lrintf(x[i] * inv); /* the rounding mode is to nearest even */
  return inv > 0 ? m / 127 : 0;
}

static void scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                      size_t out_stride) {
  for (size_t r = 0; r < n_q; r++)
    for (size_t c = 0; c < (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES; c++) {
      int32_t sum = 0;
      for (size_t j = 0; j < dim; j++) sum += q[r * q_stride + j] * ((int)packed[kern_i8_offset(dim, c, j)] - 128);
      out[r * out_stride + c] = sum;
    }
}

static int32_t dot_i8(const int8_t *q, const uint8_t *row, size_t n) {
  int32_t sum = 0;
  for (size_t i = 0; i < n; i++) sum += q[i] * ((int)row[i] - 128);
  return sum;
}

static size_t keys_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, uint32_t first,
                      uint64_t limit, uint64_t *out) {
  size_t n_out = 0;
  for (size_t i = 0; i < n; i++) {
    uint64_t key = kern_key((norm2[i] + base) + (mul * scale[i]) * (float)score[i], first + (uint32_t)i);
    out[n_out] = key;
    n_out += key <= limit;
  }
  return n_out;
}

static void least_i8(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, float *least,
                     size_t n_least, size_t at) {
  for (size_t i = 0; i < n; i++) {
    float v = (norm2[i] + base) + (mul * scale[i]) * (float)score[i], *slot = &least[(at + i) & (n_least - 1)];
    if (v < *slot) *slot = v;
  }
}

static void keys_u16(const uint16_t *sum, const uint32_t *row, size_t n, float base, float step, uint32_t first, uint64_t *out) {
  for (size_t i = 0; i < n; i++) out[i] = kern_key(base + step * (float)sum[i], first + row[i]);
}

/* ------------------------------------------------------------------ PQ scan */

static float pq_table_raw(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim, float *raw,
                          float *low) {
  float widest = 0;
  for (size_t j = 0; j < m; j++, raw += 256) {
    int32_t score[256];
    scores_i8(q + j * sub_dim, 1, 0, sub_dim, words + j * 256 * sub_dim, 256, score, 0);
    float lowest = INFINITY, highest = -INFINITY;
    for (int w = 0; w < 256; w++) {
      raw[w] = factor[j] * (float)score[w];
      lowest = raw[w] < lowest ? raw[w] : lowest, highest = raw[w] > highest ? raw[w] : highest;
    }
    low[j] = lowest;
    widest = highest - lowest > widest ? highest - lowest : widest;
  }
  return widest;
}

static void pq_table(const float *raw, const float *low, size_t m, float inv, uint8_t *table) {
  for (size_t i = 0; i < m * 256; i++) {
    float v = (raw[i] - low[i / 256]) * inv;
    table[i] = v < 255 ? (uint8_t)lrintf(v) : 255;
  }
}

static size_t pq_scan(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                      uint16_t term_mul, uint32_t threshold, const uint8_t *next, uint32_t *out_row, uint16_t *out_sum) {
  size_t n_out = 0;
  kern_want_codes(next, n_rows * m);
  for (size_t r = 0; r < n_rows; r++) {
    uint32_t sum = (uint32_t)terms[r] * term_mul >> 16;
    for (size_t j = 0; j < m; j++) sum += table[j * 256 + codes[kern_code_offset(n_rows, m, r, j)]];
    if (sum > 65535) sum = 65535;
    if (sum < threshold) {
      out_row[n_out] = (uint32_t)r;
      out_sum[n_out++] = (uint16_t)sum;
    }
  }
  return n_out;
}

/* ------------------------------------------------------------------ selection */

static size_t split_u64(uint64_t *a, size_t n, uint64_t pivot, uint64_t *spill) {
  size_t n_low = 0, n_high = 0;
  for (size_t i = 0; i < n; i++) { /* both stores always, so that no branch depends on the data */
    uint64_t key = a[i];
    size_t is_low = key <= pivot;
    a[n_low] = key;
    spill[n_high] = key;
    n_low += is_low;
    n_high += 1 - is_low;
  }
  memcpy(a + n_low, spill, n_high * sizeof *a);
  return n_low;
}

uint64_t kern_scalar_select_u64(uint64_t *a, size_t n, size_t want, uint64_t *scratch) {
  enum { SELECT_FEW = 24 }; /* a split of a few dozen keys is cheaper than sorting them */
  return kern_select_by(split_u64, kern_sort_insertion, SELECT_FEW, a, n, want, scratch);
}

static size_t not_below_f32(const float *a, size_t n, float limit, uint32_t *out) {
  size_t n_out = 0;
  for (size_t i = 0; i < n; i++) {
    out[n_out] = (uint32_t)i;
    n_out += !(a[i] < limit);
  }
  return n_out;
}

static uint64_t xxh3(const void *p, size_t n) { return XXH3_64bits(p, n); }

const kern kern_table_scalar = {
  .name = "scalar",
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
  .select_u64 = kern_scalar_select_u64,
  .not_below_f32 = not_below_f32,
  .xxh3 = xxh3,
};
