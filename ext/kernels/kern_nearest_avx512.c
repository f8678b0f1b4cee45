/* kern_nearest_avx512.c - the nearest row of a matrix by products of bytes: VNNI, or AMX (kern_amx.c) where it is permitted.
 *
 * Points and centroids become bytes with one scale each. A block of 32 points meets a strip of 32 centroids: 1,024 integer sums,
 * sixteen points side by side, so that the running winners stay in vector registers without a horizontal step. The sums are
 * integers, hence VNNI and AMX agree to the bit.
 *
 * AMX (Sapphire Rapids and later): a tile register holds 16 rows of 64 bytes; TDPBSSD adds the products of 16 x 64 by 64 x 16 signed bytes to
 * 16 x 16 sums in 16 cycles, 8 times what VNNI does. Two tiles of centroids and two of points make four results from four loads.
 * Whoever opens the tiles releases them before it returns, so that the kernel has nothing more to save for the thread.
 *
 * Precision. Centroids that were rounded to bytes before are exact here. A point's element is off by up to half a step s, so the
 * difference of two scores, x.a - x.b, is off by a sum of rounding errors times (a - b): its deviation is s / sqrt(12) * |a - b|, and a
 * centroid b that may be nearer than the winner a has |a - b| <= 2 |x - a|. Every row whose runner-up lies within SIGMAS deviations
 * (or within what is possible at all, in few dimensions) meets the centroids a second time; every centroid within this
 * margin is then compared in fp32. On sets of 128 and 960 dimensions that is 1 to 3 rows of 100.
 * Overflow: 127 * 127 (VNNI: 255 * 127) * 65,536 dimensions fit 32 bits; 31 do for 65,536 dimensions of signed bytes.
 *
 * Measured on one core of a 2.8 GHz VM (gcc 12, best of 60): 0.70 us a point at 128 dimensions x 4,000 centroids, 2.1 us at 960 x
 * 2,200 with AMX, 2.0 and 6.6 us with VNNI; argmax_f32 6.5 and 30 us. bf16 tiles take 1.7 times as long (128) and twice (960).
 */
#if defined(__x86_64__)
#include "kern_tiles512.h"

enum {
  CHUNK_BYTES = 1 << 18,  /* of points that meet all centroids before the next ones: they stay in the L2 */
  SIGMAS = 6
};

size_t kern_nearest512_block(size_t dim) { return steps_of(dim) * PAIR; }
size_t kern_nearest512_chunk(size_t dim) {
  size_t blocks = CHUNK_BYTES / (kern_nearest512_block(dim) + 1);
  if (blocks > KERN_NEAREST_CHUNK / LANES) blocks = KERN_NEAREST_CHUNK / LANES;
  return (blocks ? blocks : 1) * LANES;
}

/* Centroids as strips: [step][half][centroid][64 dimensions]. Sets scale, zero = -128 * the sum of the bytes, and the deviation of the
 * worst centroid's rounding errors. */
void kern_nearest512_pack(kern_nearest *m) {
  size_t n_steps = steps_of(m->dim), lanes = (m->n_c + LANES - 1) / LANES * LANES;
  memset(m->bytes, 0, lanes * n_steps * STEP);
  for (size_t k = 0; k < lanes; k++) {
    int8_t *strip = m->bytes + k / LANES * n_steps * PAIR + k % LANES * STEP;
    const float *c = m->rows + k * m->dim;
    m->zero[k] = 0, m->scale[k] = 0;
    if (k >= m->n_c) continue;
    float s = m->scale[k] = scale_of(c, m->dim), lost2 = 0;
    for (size_t u = 0; u < n_steps; u++) {
      size_t n = m->dim - u * STEP < STEP ? m->dim - u * STEP : STEP;
      int8_t *to = strip + u * PAIR;
      _mm512_storeu_si512(to, bytes_of(c + u * STEP, n, _mm512_set1_ps(s > 0 ? 1 / s : 0)));
      for (size_t j = 0; j < n; j++) {
        float lost = c[u * STEP + j] - s * to[j];
        lost2 += lost * lost, m->zero[k] -= 128 * to[j];
      }
    }
    float sigma = sqrtf(lost2 / (float)m->dim);
    if (sigma > m->sigma) m->sigma = sigma;
  }
}

static void product(const kern_nearest *m, size_t k, const uint8_t *block, int32_t *out) {
  size_t n_steps = steps_of(m->dim);
  const int8_t *strip = m->bytes + k * n_steps * STEP;
  if (m->amx) tile_product(strip, block, n_steps, out);
  else vnni_product(strip, block, n_steps, m->zero + k, out);
}

/* ------------------------------------------------------------------ winners */

/* A block of 32 points: their scales, the best score so far, who has it, and the best score of the others. */
typedef struct {
  float scale[LANES], best[LANES], next[LANES];
  uint32_t who[LANES];
} winners;

KERN_INLINE __m512 score_of(const int32_t *sum, __m512 point_scale, float scale, float bias) {
  __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum)), _mm512_set1_ps(scale));
  return _mm512_fmadd_ps(product, point_scale, _mm512_set1_ps(bias));
}

/* Sums that are to meet the winners of their block. */
typedef struct {
  const int32_t *sum;
  const float *scale, *bias; /* of the strip's centroids */
  uint32_t first;            /* the number of the first of them */
  winners *w;
} encounter;

/* Centroids from..to of half g of a strip meet the winners; what is constant is so where this is inlined. A NaN never wins, ties go to
 * the lower number. */
KERN_INLINE void meet(const encounter *e, const uint32_t g, const uint32_t from, const uint32_t to, const int want_next) {
  __m512 point_scale[2], best[2], next[2];
  __m512i who[2];
  winners *w = e->w;
  KERN_UNROLL
  for (int h = 0; h < 2; h++) {
    point_scale[h] = _mm512_loadu_ps(w->scale + 16 * h), best[h] = _mm512_loadu_ps(w->best + 16 * h);
    next[h] = _mm512_loadu_ps(w->next + 16 * h), who[h] = _mm512_loadu_si512(w->who + 16 * h);
  }
  KERN_UNROLL
  for (uint32_t r = 0; r < 16; r++) {
    uint32_t k = 16 * g + r;
    if (r < from || r >= to) continue;
    KERN_UNROLL
    for (int h = 0; h < 2; h++) {
      __m512 v = score_of(e->sum + g * 512 + h * 256 + r * 16, point_scale[h], e->scale[k], e->bias[k]);
      __mmask16 wins = _mm512_cmp_ps_mask(v, best[h], _CMP_GT_OQ);
      if (want_next) next[h] = _mm512_max_ps(_mm512_min_ps(v, best[h]), next[h]);
      best[h] = _mm512_max_ps(v, best[h]);
      who[h] = _mm512_mask_set1_epi32(who[h], wins, (int)(e->first + k));
    }
  }
  KERN_UNROLL
  for (int h = 0; h < 2; h++) {
    _mm512_storeu_ps(w->best + 16 * h, best[h]), _mm512_storeu_si512(w->who + 16 * h, who[h]);
    if (want_next) _mm512_storeu_ps(w->next + 16 * h, next[h]);
  }
}

/* The next product by tiles, with the sums before it met in between: stores of tiles and the vector units then work at the same
 * time (448 -> 350 cycles for 32 x 32 x 128); left to itself, the CPU does one after the other. */
KERN_INLINE void tiles_and_meet(const int8_t *strip, const uint8_t *block, size_t n_steps, int32_t *out, const encounter *e,
                                const int want_next) {
  tiles_zero();
  tiles_step(strip, block);
  meet(e, 0, 0, 8, want_next);
  if (n_steps > 1) tiles_step(strip + PAIR, block + PAIR);
  meet(e, 0, 8, 16, want_next);
  for (size_t u = 2; u < n_steps; u++) tiles_step(strip + u * PAIR, block + u * PAIR);
  _tile_stored(0, out, 64);
  meet(e, 1, 0, 5, want_next);
  _tile_stored(1, out + 256, 64);
  meet(e, 1, 5, 10, want_next);
  _tile_stored(2, out + 512, 64);
  meet(e, 1, 10, 16, want_next);
  _tile_stored(3, out + 768, 64);
}

/* All points of a chunk, all centroids. */
KERN_INLINE void meet_all(const kern_nearest *m, const uint8_t *blocks, size_t n_blocks, winners *w, const int want_next, const int amx) {
  _Alignas(64) int32_t sum[2][LANES * LANES];
  size_t n_steps = steps_of(m->dim), turn = 0;
  winners nobody;
  memset(sum, 0, sizeof sum), memset(&nobody, 0, sizeof nobody);
  encounter e = {sum[1], m->scale, m->bias, 0, &nobody};
  for (size_t k = 0; k < m->n_c; k += LANES)
    for (size_t b = 0; b < n_blocks; b++, turn++) {
      int32_t *out = sum[turn & 1];
      const int8_t *strip = m->bytes + k * n_steps * STEP;
      const uint8_t *block = blocks + b * n_steps * PAIR;
      if (amx) tiles_and_meet(strip, block, n_steps, out, &e, want_next);
      else {
        vnni_product(strip, block, n_steps, m->zero + k, out);
        meet(&e, 0, 0, 16, want_next), meet(&e, 1, 0, 16, want_next);
      }
      e = (encounter){out, m->scale + k, m->bias + k, (uint32_t)k, w + b};
    }
  meet(&e, 0, 0, 16, want_next), meet(&e, 1, 0, 16, want_next);
}
static void meet_chunk(const kern_nearest *m, const uint8_t *blocks, size_t n_blocks, winners *w, int exact) {
  if (m->amx && exact) meet_all(m, blocks, n_blocks, w, 1, 1);
  else if (m->amx) meet_all(m, blocks, n_blocks, w, 0, 1);
  else if (exact) meet_all(m, blocks, n_blocks, w, 1, 0);
  else meet_all(m, blocks, n_blocks, w, 0, 0);
}

/* ------------------------------------------------------------------ near ties */

static float dot(const float *a, const float *b, size_t n) {
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  size_t i = 0;
  for (; i + 32 <= n; i += 32)
    KERN_UNROLL
    for (int u = 0; u < 2; u++) sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16 * u), _mm512_loadu_ps(b + i + 16 * u), sum[u]);
  for (; i < n; i += 16) {
    __mmask16 live = tail16(n - i);
    sum[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(live, a + i), _mm512_maskz_loadu_ps(live, b + i), sum[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

/* How far below the best score the score of a nearer centroid may lie; see the head of this file. */
static float margin_of(const kern_nearest *m, const float *x, float scale, float best) {
  float xx = dot(x, x, m->dim), norm = sqrtf(xx), root = sqrtf((float)m->dim);
  float sigmas = root < SIGMAS ? root : SIGMAS, most = .5f * root; /* rounding errors: at most s/2 each */
  float lost = sigmas * .2887f * scale < most * scale ? sigmas * .2887f * scale : most * scale, image = sigmas * m->sigma * norm;
  float rounding = 1e-6f * m->longest * (norm + m->longest);
  float from2 = xx - 2 * best + 2 * (lost * m->longest + image + rounding); /* >= |x - winner|^2 */
  return 2 * (lost * sqrtf(from2 > 0 ? from2 : 0) + image + rounding);
}

typedef struct {
  float scale[LANES], limit[LANES], best[LANES];
  uint32_t who[LANES];
  const float *x[LANES];
} closest;

/* Every centroid whose score reaches the limit is compared in fp32; the lowest number among equals wins. */
static void compare(const kern_nearest *m, const int32_t *sum, uint32_t first, closest *z) {
  for (uint32_t k = first; k < first + LANES && k < m->n_c; k++)
    for (uint32_t h = 0; h < 2; h++) {
      uint32_t g = (k - first) / 16, r = (k - first) % 16;
      __m512 v = score_of(sum + g * 512 + h * 256 + r * 16, _mm512_loadu_ps(z->scale + 16 * h), m->scale[k], m->bias[k]);
      unsigned hits = _mm512_cmp_ps_mask(v, _mm512_loadu_ps(z->limit + 16 * h), _CMP_GE_OQ);
      for (; hits; hits &= hits - 1) {
        uint32_t at = 16 * h + (uint32_t)__builtin_ctz(hits);
        float exact = dot(z->x[at], m->rows + k * m->dim, m->dim) + m->bias[k];
        if (exact > z->best[at]) z->best[at] = exact, z->who[at] = k;
      }
    }
}

/* The second passage, for up to 32 rows. */
static void settle(const kern_nearest *m, const float *x, size_t stride, const uint32_t *rows, const float *limit, size_t n,
                   uint8_t *block, uint32_t *id) {
  _Alignas(64) int32_t sum[LANES * LANES];
  closest z;
  make_block(x, stride, m->dim, rows, n, m->amx ? 0 : 128, block, z.scale);
  for (size_t i = 0; i < LANES; i++) {
    z.limit[i] = i < n ? limit[i] : INFINITY, z.best[i] = -INFINITY, z.who[i] = id[rows[i < n ? i : 0]];
    z.x[i] = x + rows[i < n ? i : 0] * stride;
  }
  for (size_t k = 0; k < m->n_c; k += LANES) {
    product(m, k, block, sum);
    compare(m, sum, (uint32_t)k, &z);
  }
  for (size_t i = 0; i < n; i++) id[rows[i]] = z.who[i];
}

/* ------------------------------------------------------------------ all rows */

/* Rows that wait for their second passage; they may come from several chunks, so that blocks fill. */
typedef struct {
  size_t n;
  uint32_t row[LANES];
  float limit[LANES];
} waiting;

/* Rows first to first + n_x, a chunk at most. */
static void find_chunk(const kern_nearest *m, const float *x, size_t stride, size_t first, size_t n_x, int exact, uint32_t *id,
                       uint8_t *scratch, waiting *open) {
  size_t n_blocks = (n_x + LANES - 1) / LANES;
  winners w[KERN_NEAREST_CHUNK / LANES];
  for (size_t b = 0; b < n_blocks; b++) {
    make_block(x + (first + b * LANES) * stride, stride, m->dim, NULL, n_x - b * LANES, m->amx ? 0 : 128,
               scratch + b * kern_nearest512_block(m->dim), w[b].scale);
    for (size_t i = 0; i < LANES; i++) w[b].best[i] = w[b].next[i] = -INFINITY, w[b].who[i] = 0;
  }
  meet_chunk(m, scratch, n_blocks, w, exact);
  for (size_t r = 0; r < n_x; r++) id[first + r] = w[r / LANES].who[r % LANES];
  for (size_t r = 0; r < n_x && exact; r++) {
    const winners *v = w + r / LANES;
    float best = v->best[r % LANES], lowest = best - margin_of(m, x + (first + r) * stride, v->scale[r % LANES], best);
    if (v->next[r % LANES] < lowest) continue;
    open->row[open->n] = (uint32_t)(first + r), open->limit[open->n++] = lowest;
    if (open->n < LANES) continue;
    settle(m, x, stride, open->row, open->limit, open->n, scratch, id);
    open->n = 0;
  }
}

void kern_nearest512_find(const kern_nearest *m, const float *x, size_t n_x, size_t stride, int exact, uint32_t *id, uint8_t *scratch) {
  size_t chunk = kern_nearest512_chunk(m->dim);
  waiting open = {.n = 0};
  if (m->amx) tiles_open();
  for (size_t r = 0; r < n_x; r += chunk) find_chunk(m, x, stride, r, n_x - r < chunk ? n_x - r : chunk, exact, id, scratch, &open);
  if (open.n) settle(m, x, stride, open.row, open.limit, open.n, scratch, id);
  if (m->amx) tiles_close();
}

/* ------------------------------------------------------------------ all products */

/* Tiles take rows as they lie and packed columns as they are: 32 rows by 16 columns at a time, of which each sum starts with what the
 * columns' 128 adds. */
void kern_tiles512_scores(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                          size_t out_stride) {
  _Alignas(64) int32_t start[LANES * 16];
  tiles_open();
  for (size_t r = 0; r < n_q; r += LANES, q += LANES * q_stride, out += LANES * out_stride) {
    for (size_t i = 0; i < LANES; i++) {
      __m512i sum = _mm512_setzero_si512();
      for (size_t j = 0; j < dim; j += STEP) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(q + i * q_stride + j));
      _mm512_store_si512(start + i * 16, _mm512_set1_epi32(-128 * _mm512_reduce_add_epi32(sum)));
    }
    for (size_t c = 0; c < n_c; c += 16) {
      const uint8_t *column = packed + c * dim;
      _tile_loadd(0, start, 64);
      _tile_loadd(1, start + 256, 64);
      for (size_t j = 0; j < dim; j += STEP) {
        _tile_loadd(4, q + j, (long)q_stride);
        _tile_loadd(6, column + j * 16, 64);
        _tile_loadd(5, q + 16 * q_stride + j, (long)q_stride);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
      }
      _tile_stored(0, out + c, (long)(out_stride * 4));
      _tile_stored(1, out + 16 * out_stride + c, (long)(out_stride * 4));
    }
  }
  tiles_close();
}

/* ------------------------------------------------------------------ element-wise */

/* 128 columns at a time stay in registers; the rows to come are fetched ahead, they lie anywhere. */
KERN_INLINE void sum_columns(const float *x, size_t stride, const uint32_t *row, size_t n, size_t n_columns, const int whole, float *out) {
  enum { AHEAD = 4 };
  __m512 sum[8];
  KERN_UNROLL
  for (size_t u = 0; u < 8; u++) sum[u] = _mm512_setzero_ps();
  for (size_t i = 0; i < n; i++) {
    const float *from = x + row[i] * stride, *next = x + row[i + AHEAD < n ? i + AHEAD : i] * stride;
    KERN_UNROLL
    for (size_t u = 0; u < 8; u++) {
      if (!whole && u * 16 >= n_columns) break;
      _mm_prefetch((const char *)(next + 16 * u), _MM_HINT_T0);
      sum[u] = _mm512_add_ps(sum[u], _mm512_maskz_loadu_ps(whole ? 0xffff : tail16(n_columns - 16 * u), from + 16 * u));
    }
  }
  KERN_UNROLL
  for (size_t u = 0; u < 8; u++) {
    if (!whole && u * 16 >= n_columns) break;
    _mm512_mask_storeu_ps(out + 16 * u, whole ? 0xffff : tail16(n_columns - 16 * u), sum[u]);
  }
}

void kern_sum_rows512(const float *x, size_t stride, const uint32_t *row, size_t n, size_t dim, float *out) {
  size_t j = 0;
  for (; j + 128 <= dim; j += 128) sum_columns(x + j, stride, row, n, 128, 1, out + j);
  if (j < dim) sum_columns(x + j, stride, row, n, dim - j, 0, out + j);
}

void kern_scale_sub512(const float *x, float scale, const float *y, size_t n, float *out) {
  __m512 mul = _mm512_set1_ps(scale);
  for (size_t j = 0; j < n; j += 16) {
    __mmask16 live = tail16(n - j);
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(live, x + j), mul);
    _mm512_mask_storeu_ps(out + j, live, _mm512_sub_ps(v, _mm512_maskz_loadu_ps(live, y + j)));
  }
}
#else
typedef int kern_nearest_avx512_is_empty; /* ISO C wants a declaration in every file */
#endif
