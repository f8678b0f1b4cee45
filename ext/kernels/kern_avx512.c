/* kern_avx512.c - AVX-512 F, BW, DQ, VL, VBMI, VBMI2 (Ice Lake, Zen 4 and later). Definitions: kern_scalar.c.
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
#include "kern_int.h"

KERN_INLINE __mmask16 tail16(size_t n) { return n < 16 ? (__mmask16)((1u << n) - 1) : (__mmask16)0xffff; }

/* ------------------------------------------------------------------ sums over two arrays */

static float dot_f32(const float *a, const float *b, size_t n) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    KERN_UNROLL
    for (int u = 0; u < 4; u++)
      sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_loadu_ps(b + i + 16 * u), sum[u]);
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_maskz_loadu_ps(live, b + i), sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

static float l2sq_f32(const float *a, const float *b, size_t n) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 64 <= n; i += 64)
    KERN_UNROLL
    for (int u = 0; u < 4; u++) {
      __m512 d = _mm512_sub_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_loadu_ps(b + i + 16 * u));
      sum[u] = _mm512_fmadd_ps(d, d, sum[u]);
    }
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_maskz_loadu_ps(live, b + i));
    sum[0] = _mm512_fmadd_ps(d, d, sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

static void cosine_f32(const float *a, const float *b, size_t n, float out[3]) {
  __m512 ab[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 aa[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  __m512 bb[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (size_t i = 0; i < n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 2; u++) {
      size_t at = i + 16 * (size_t)u;
      if (at >= n) break;
      __mmask16 live = tail16(n - at);
      __m512 va = _mm512_maskz_loadu_ps(live, a + at), vb = _mm512_maskz_loadu_ps(live, b + at);
      ab[u] = _mm512_fmadd_ps(va, vb, ab[u]);
      aa[u] = _mm512_fmadd_ps(va, va, aa[u]);
      bb[u] = _mm512_fmadd_ps(vb, vb, bb[u]);
    }
  out[0] = _mm512_reduce_add_ps(_mm512_add_ps(ab[0], ab[1]));
  out[1] = _mm512_reduce_add_ps(_mm512_add_ps(aa[0], aa[1]));
  out[2] = _mm512_reduce_add_ps(_mm512_add_ps(bb[0], bb[1]));
}

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

/* ------------------------------------------------------------------ PQ scan */

enum { BLOCK_GROUPS = KERN_BLOCK / KERN_GROUP };

/* What the survivors of one call share. */
typedef struct {
  __m512i term_mul, limit; /* u16 lanes */
  const uint16_t *terms;
  size_t n_rows, n_out;
  uint32_t *out_row;
  uint16_t *out_sum;
} sieve;

/* Adds the terms of rows [row, row + 32) to their sums and appends the survivors. The whole-register stores stay inside
 * the outputs: at most `row` survivors precede these, and there is room for n_rows rounded up to 64. */
KERN_INLINE void sift32(sieve *s, __m512i sum, size_t row) {
  if (row >= s->n_rows) return;
  size_t left = s->n_rows - row;
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

/* One block of n_groups * 64 rows. A looked-up register holds even bytes E and odd bytes O as words E + 256 O. `both`
 * sums the words modulo 2^16 and `odd` sums O; since SUM E < 2^16 it is both - 256 * odd, exactly, and the loop is
 * spared the masking of the even bytes. */
KERN_INLINE void scan_block(const uint8_t *codes, size_t m, const uint8_t *table, size_t row, const int n_groups,
                            sieve *s) {
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
      __m512i code = _mm512_loadu_si512(codes + (j * (size_t)n_groups + (size_t)g) * KERN_GROUP);
      __m512i low = _mm512_permutex2var_epi8(t0, code, t1), high = _mm512_permutex2var_epi8(t2, code, t3);
      __m512i entry = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
      both[g] = _mm512_add_epi16(both[g], entry);
      odd[g] = _mm512_add_epi16(odd[g], _mm512_srli_epi16(entry, 8));
    }
  }
  KERN_UNROLL
  for (int g = 0; g < BLOCK_GROUPS; g++) {
    if (g >= n_groups) break;
    sift32(s, _mm512_sub_epi16(both[g], _mm512_slli_epi16(odd[g], 8)), row + (size_t)g * KERN_GROUP);
    sift32(s, odd[g], row + (size_t)g * KERN_GROUP + 32);
  }
}

static size_t pq_scan(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                      uint16_t term_mul, uint32_t threshold, uint32_t *out_row, uint16_t *out_sum) {
  if (threshold == 0) return 0;
  sieve s = {.term_mul = _mm512_set1_epi16((short)term_mul),
             .limit = _mm512_set1_epi16((short)kern_pq_limit(threshold)),
             .terms = terms,
             .n_rows = n_rows,
             .out_row = out_row,
             .out_sum = out_sum};
  size_t row = 0;
  for (; row + KERN_BLOCK <= n_rows; row += KERN_BLOCK) scan_block(codes + row * m, m, table, row, BLOCK_GROUPS, &s);
  switch ((n_rows - row + KERN_GROUP - 1) / KERN_GROUP) {
  case 1: scan_block(codes + row * m, m, table, row, 1, &s); break;
  case 2: scan_block(codes + row * m, m, table, row, 2, &s); break;
  case 3: scan_block(codes + row * m, m, table, row, 3, &s); break;
  case 4: scan_block(codes + row * m, m, table, row, 4, &s); break;
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

static uint64_t select_u64(uint64_t *a, size_t n, size_t want, uint64_t *scratch) {
  return kern_select_by(split_u64, a, n, want, scratch);
}

const kern kern_table_avx512 = {
  .name = "avx512",
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
#else
typedef int kern_avx512_is_empty; /* ISO C wants a declaration in every file */
#endif
