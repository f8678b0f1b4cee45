/* kern_scalar.c - the definition of every kernel: plain C, one accumulator per sum, additions in array order.
 *
 * Compiled for the baseline CPU at -O2, so what the tests compare with does not depend on an instruction set. The sums
 * of pq_scan are 32-bit: at most 256 * 255 + 65535 before they are cut to 16 bits.
 */
#include <math.h>
#include <string.h>
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

/* ------------------------------------------------------------------ PQ scan */

static size_t pq_scan(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                      uint16_t term_mul, uint32_t threshold, uint32_t *out_row, uint16_t *out_sum) {
  size_t n_out = 0;
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

static uint64_t select_u64(uint64_t *a, size_t n, size_t want, uint64_t *scratch) {
  return kern_select_by(split_u64, a, n, want, scratch);
}

const kern kern_table_scalar = {
  .name = "scalar",
  .dot_f32 = dot_f32,
  .l2sq_f32 = l2sq_f32,
  .cosine_f32 = cosine_f32,
  .f16_to_f32 = f16_to_f32,
  .f32_to_f16 = f32_to_f16,
  .all_finite_f32 = all_finite_f32,
  .scores_f32 = scores_f32,
  .argmax_f32 = argmax_f32,
  .pq_scan = pq_scan,
  .select_u64 = select_u64,
};
