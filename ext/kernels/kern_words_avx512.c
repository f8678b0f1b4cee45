/* kern_words_avx512.c - the nearest code words by products of 16-bit integers (VNNI). Tables and arithmetic: kern_words.c.
 *
 * Four rows meet 64 words at a time: sixteen sums that start with what the words' lengths take off, two dimensions per VPDPWSSD, and
 * then one maximum per sum; no comparison, no blending. Per code of 8 dimensions that is 80 operations of 16 words, half of what fp32
 * takes. Measured on one core of a 2.8 GHz VM: see the commit.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "kern_int.h"

enum { ROWS = 4, GROUPS = 4, CHUNK = 64 };

KERN_INLINE __mmask16 tail16(size_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xffff; }

/* The level at which a row fits, and what its elements are multiplied with. */
static size_t level_of(const kern_words *w, const float *x, float *inv) {
  size_t n = w->n_subs * w->sub_dim, level = 0;
  __m512 top = _mm512_setzero_ps();
  for (size_t j = 0; j < n; j += 16) top = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(tail16(n - j), x + j)), top);
  float most = _mm512_reduce_max_ps(top), unit = w->step, limit = 32767.f / (float)w->sub_dim;
  for (; level + 1 < KERN_WORDS_LEVELS && !(most <= limit * unit); level++) unit *= 2;
  *inv = 1 / unit;
  return level;
}

/* One part of a row as 16-bit integers; zeros behind n. Beyond the last level it is cut off: such a row is 2^15 times as long as
 * the words. */
KERN_INLINE void part_of(const float *x, size_t n, float inv, int16_t limit, int16_t *out) {
  __m256i most = _mm256_set1_epi16(limit), least = _mm256_set1_epi16((short)-limit);
  for (size_t e = 0; e < n; e += 16) {
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(tail16(n - e), x + e), _mm512_set1_ps(inv));
    v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-32768)), _mm512_set1_ps(32767));
    __m256i q = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v));
    _mm256_storeu_si256((void *)(out + e), _mm256_max_epi16(_mm256_min_epi16(q, most), least));
  }
}

KERN_INLINE __m512i pair_of(const int16_t *q) {
  int32_t both;
  memcpy(&both, q, sizeof both);
  return _mm512_set1_epi32(both);
}

/* The greatest sum of each lane, per row. start: ROWS pointers to the words' starts at the rows' levels. */
KERN_INLINE void meet(const int16_t *words, const int32_t *const *start, const int16_t (*part)[KERN_WORDS_MAX_DIM], size_t n_pairs,
                      const int n_groups, __m512i best[ROWS]) {
  __m512i sum[ROWS][GROUPS];
  KERN_UNROLL
  for (int r = 0; r < ROWS; r++)
    KERN_UNROLL
    for (int g = 0; g < GROUPS; g++)
      if (g < n_groups) sum[r][g] = _mm512_loadu_si512(start[r] + 16 * g);
  for (size_t p = 0; p < n_pairs; p++) {
    __m512i word[GROUPS];
    KERN_UNROLL
    for (int g = 0; g < GROUPS; g++)
      if (g < n_groups) word[g] = _mm512_loadu_si512(words + ((size_t)g * n_pairs + p) * 32);
    KERN_UNROLL
    for (int r = 0; r < ROWS; r++) {
      __m512i pair = pair_of(part[r] + 2 * p);
      KERN_UNROLL
      for (int g = 0; g < GROUPS; g++)
        if (g < n_groups) sum[r][g] = _mm512_dpwssd_epi32(sum[r][g], word[g], pair);
    }
  }
  KERN_UNROLL
  for (int r = 0; r < ROWS; r++)
    KERN_UNROLL
    for (int g = 0; g < GROUPS; g++)
      if (g < n_groups) best[r] = _mm512_max_epi32(best[r], sum[r][g]);
}

/* The low bytes of the four greatest sums. */
KERN_INLINE uint32_t winners(const __m512i best[ROWS]) {
  __m512i a = _mm512_max_epi32(_mm512_unpacklo_epi32(best[0], best[1]), _mm512_unpackhi_epi32(best[0], best[1]));
  __m512i b = _mm512_max_epi32(_mm512_unpacklo_epi32(best[2], best[3]), _mm512_unpackhi_epi32(best[2], best[3]));
  __m512i all = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)); /* rows 0 to 3 in each 128 bits */
  __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return (uint32_t)_mm_cvtsi128_si32(_mm_shuffle_epi8(four, _mm_set1_epi32(0x0c080400)));
}

/* One sub-quantizer, up to CHUNK rows; n_pairs is a constant where that pays. */
KERN_INLINE void find_sub(const kern_words *w, size_t j, const float *x, size_t n, size_t stride, const size_t *level, const float *inv,
                          size_t n_pairs, uint8_t *code, size_t code_stride) {
  size_t n_groups = w->n_words / 16;
  const int16_t *words = w->pairs + j * n_groups * n_pairs * 32;
  const int32_t *starts = w->start + j * KERN_WORDS_LEVELS * w->n_words;
  int16_t limit = (int16_t)(32767 / w->sub_dim);
  for (size_t r = 0; r < n; r += ROWS) {
    _Alignas(64) int16_t part[ROWS][KERN_WORDS_MAX_DIM];
    const int32_t *start[ROWS];
    __m512i best[ROWS];
    KERN_UNROLL
    for (size_t i = 0; i < ROWS; i++) {
      size_t row = r + i < n ? r + i : r;
      part_of(x + row * stride + j * w->sub_dim, w->sub_dim, inv[row], limit, part[i]);
      start[i] = starts + level[row] * w->n_words, best[i] = _mm512_set1_epi32(INT32_MIN);
    }
    size_t g = 0;
    for (; g + GROUPS <= n_groups; g += GROUPS) {
      meet(words + g * n_pairs * 32, start, (const int16_t(*)[KERN_WORDS_MAX_DIM])part, n_pairs, GROUPS, best);
      for (size_t i = 0; i < ROWS; i++) start[i] += 16 * GROUPS;
    }
    for (; g < n_groups; g++) {
      meet(words + g * n_pairs * 32, start, (const int16_t(*)[KERN_WORDS_MAX_DIM])part, n_pairs, 1, best);
      for (size_t i = 0; i < ROWS; i++) start[i] += 16;
    }
    uint32_t four = winners(best);
    for (size_t i = 0; i < ROWS && r + i < n; i++) code[(r + i) * code_stride + j] = (uint8_t)(four >> 8 * i);
  }
}

void kern_words512_find(const kern_words *w, const float *x, size_t n, size_t stride, uint8_t *code, size_t code_stride) {
  size_t n_pairs = (w->sub_dim + 1) / 2;
  for (size_t first = 0; first < n; first += CHUNK, x += CHUNK * stride, code += CHUNK * code_stride) {
    size_t level[CHUNK], rows = n - first < CHUNK ? n - first : CHUNK;
    float inv[CHUNK];
    for (size_t r = 0; r < rows; r++) level[r] = level_of(w, x + r * stride, inv + r);
    for (size_t j = 0; j < w->n_subs; j++) { /* sub-quantizer outside: its words stay in L1 */
      if (n_pairs == 4) find_sub(w, j, x, rows, stride, level, inv, 4, code, code_stride);
      else if (n_pairs == 8) find_sub(w, j, x, rows, stride, level, inv, 8, code, code_stride);
      else find_sub(w, j, x, rows, stride, level, inv, n_pairs, code, code_stride);
    }
  }
}
#else
typedef int kern_words_avx512_is_empty; /* ISO C wants a declaration in every file */
#endif
