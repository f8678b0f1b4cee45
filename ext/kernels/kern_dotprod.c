/* kern_dotprod.c - dot products of bytes with SDOT (Armv8.2 and later: Neoverse N1, Apple M1), one instruction for what
 * takes kern_neon.c four; everything else of the variant is kern_neon.c's. Definitions: kern_scalar.c.
 *
 * The packed layout is made for it: a register holds four dimensions of four rows, SDOT adds up each row's four products.
 * 65536 products of bytes stay within 31 bits. Run under qemu only.
 */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>
#include "kern_int.h"

KERN_INLINE int8x16_t values16(const uint8_t *bytes) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(bytes), vdupq_n_u8(128)));
}

/* n_q queries against one group of 16. */
enum { I8_QUERIES = 4, QUARTERS = KERN_LANES / 4 };
KERN_INLINE void tile_i8(const int8_t *q, size_t q_stride, size_t dim, const uint8_t *packed, const int n_q, int32_t *out,
                         size_t out_stride) {
  int32x4_t acc[I8_QUERIES][QUARTERS];
  KERN_UNROLL
  for (int r = 0; r < I8_QUERIES; r++)
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++) acc[r][h] = vdupq_n_s32(0);
  for (size_t j = 0; j < dim; j += 4, packed += 4 * KERN_LANES) {
    int8x16_t column[QUARTERS];
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++) column[h] = values16(packed + 16 * h);
    KERN_UNROLL
    for (int r = 0; r < I8_QUERIES; r++) {
      if (r >= n_q) break;
      int32_t bytes;
      memcpy(&bytes, q + (size_t)r * q_stride + j, 4);
      int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
      KERN_UNROLL
      for (int h = 0; h < QUARTERS; h++) acc[r][h] = vdotq_s32(acc[r][h], column[h], four);
    }
  }
  KERN_UNROLL
  for (int r = 0; r < I8_QUERIES; r++)
    KERN_UNROLL
    for (int h = 0; h < QUARTERS; h++)
      if (r < n_q) vst1q_s32(out + (size_t)r * out_stride + 4 * h, acc[r][h]);
}

void kern_dotprod_scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c,
                            int32_t *out, size_t out_stride) {
  for (size_t c = 0; c < n_c; c += KERN_LANES) { /* a group stays in L1 while all queries pass */
    size_t r = 0;
    for (; r + I8_QUERIES <= n_q; r += I8_QUERIES)
      tile_i8(q + r * q_stride, q_stride, dim, packed + c * dim, I8_QUERIES, out + r * out_stride + c, out_stride);
    for (; r < n_q; r++) tile_i8(q + r * q_stride, q_stride, dim, packed + c * dim, 1, out + r * out_stride + c, out_stride);
  }
}

int32_t kern_dotprod_dot_i8(const int8_t *q, const uint8_t *row, size_t n) {
  int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) sum[u] = vdotq_s32(sum[u], vld1q_s8(q + i + 16 * u), values16(row + i + 16 * u));
  for (; i + 16 <= n; i += 16) sum[0] = vdotq_s32(sum[0], vld1q_s8(q + i), values16(row + i));
  int32_t rest = 0;
  for (; i < n; i++) rest += q[i] * ((int)row[i] - 128);
  return vaddvq_s32(vaddq_s32(vaddq_s32(sum[0], sum[1]), vaddq_s32(sum[2], sum[3]))) + rest;
}

float kern_dotprod_pq_table_raw(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim,
                                float *raw, float *low) {
  float widest = 0;
  for (size_t j = 0; j < m; j++) {
    int32_t score[256];
    kern_dotprod_scores_i8(q + j * sub_dim, 1, 0, sub_dim, words + j * 256 * sub_dim, 256, score, 0);
    float width = kern_neon_table_row(score, factor[j], raw + j * 256, low + j);
    widest = width > widest ? width : widest;
  }
  return widest;
}
#else
typedef int kern_dotprod_is_empty; /* ISO C wants a declaration in every file */
#endif
