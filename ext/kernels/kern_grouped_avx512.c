/* kern_grouped_avx512.c - the nearest row of a large matrix whose rows are in groups: a point meets the groups with near centres only.
 *
 * A thousand points at a time become bytes. They meet all centres; each is put on the lists of the groups that it will see. Then,
 * group by group, the points of its list are gathered in blocks of 32, which meet its members 32 at a time. Here points are the rows of
 * the products and members their columns (kern_nearest_avx512.c has it the other way round): to gather a point is then to copy
 * its bytes, and members are turned round once, when the matrix is made ready. A point keeps sixteen winners, one per column of a tile;
 * the last step takes the best of them.
 *
 * Which groups. Those whose centre's squared distance is that of the nearest one and REACH times the mean of all at most. Points
 * that miss their nearest row when .20 and .28 of all rows are seen, with 4,000 rows of 128 in 94 groups and 2,191 of 960 in 70: .018 and
 * .006, .026 and .011. A part of the difference between mean and nearest misses .021 .007, .038 .017; of the nearest .024 .008,
 * .029 .013; the same number of groups for every point .017 .007, .030 .012, and that many have to be found. Distances less what
 * a group's own spread is were no better. What it costs in recall: ivfpq_train.c.
 */
#if defined(__x86_64__)
#include "kern_tiles512.h"

enum {
  POINTS = KERN_NEAREST_ROWS, /* at a time */
  POINT_BYTES = 1 << 20       /* of them at most: they stay in the L2 */
};
#define REACH .38f

static size_t blocks_of(size_t n) { return (n + LANES - 1) / LANES; }

/* ------------------------------------------------------------------ the matrix */

/* Packs the n rows that order names (NULL: the first ones) as the columns from block `first` on; returns the next block. */
static size_t put_columns(kern_grouped *m, const float *rows, const uint32_t *order, size_t n, size_t first) {
  size_t size = steps_of(m->dim) * PAIR;
  for (size_t at = 0; at < n; at += LANES, first++) {
    uint32_t *id = m->id + first * LANES;
    size_t some = n - at < LANES ? n - at : LANES;
    for (size_t i = 0; i < LANES; i++) {
      id[i] = i >= some ? UINT32_MAX : order ? order[at + i] : (uint32_t)(at + i);
      const float *x = rows + id[i < some ? i : 0] * m->dim;
      m->bias[first * LANES + i] = i < some ? -.5f * kern_get()->dot_f32(x, x, m->dim) : -INFINITY;
    }
    make_block(rows, m->dim, m->dim, id, some, m->amx ? 0 : 128, m->bytes + first * size, m->scale + first * LANES);
  }
  return first;
}

size_t kern_grouped512_bytes(size_t n_c, size_t n_groups, size_t dim) {
  size_t blocks = blocks_of(n_groups) + blocks_of(n_c) + n_groups; /* each group may begin one more */
  return blocks * (steps_of(dim) * PAIR + LANES * 12) + (n_groups + 1) * 8 + 64;
}

void kern_grouped512_pack(kern_grouped *m, const float *rows, const uint32_t *order, const uint32_t *start, const float *centres) {
  size_t blocks = blocks_of(m->n_groups) + blocks_of(start[m->n_groups]) + m->n_groups;
  m->scale = (float *)(m->bytes + blocks * steps_of(m->dim) * PAIR), m->bias = m->scale + blocks * LANES;
  m->id = (uint32_t *)(m->bias + blocks * LANES), m->first = m->id + blocks * LANES, m->count = m->first + m->n_groups;
  size_t at = put_columns(m, centres, NULL, m->n_groups, 0);
  for (size_t g = 0; g < m->n_groups; g++) {
    m->first[g] = (uint32_t)at, m->count[g] = start[g + 1] - start[g];
    at = put_columns(m, rows, order + start[g], m->count[g], at);
  }
}

/* ------------------------------------------------------------------ scratch */

/* What one call works with; points are numbered from the first of the thousand. */
typedef struct {
  size_t n_points, row_bytes;
  int8_t *bytes;        /* of the points, row by row */
  float *scale, *norm2; /* norm2: |x|^2 */
  int32_t *zero;        /* -128 * the sum of the bytes */
  float *best;          /* sixteen per point */
  int32_t *who;         /* the half block (16 columns) that it came from */
  float *score;         /* of LANES points with all centres */
  uint16_t *list;       /* per group POINTS + LANES */
  uint32_t *n_list;
  int8_t *block;        /* gathered points */
} work;

static size_t points_of(size_t dim) {
  size_t n = POINT_BYTES / (steps_of(dim) * STEP) / LANES * LANES;
  return n < LANES ? LANES : n > POINTS ? POINTS : n;
}

/* See kern_grouped512_scratch. */
static void lay_out(const kern_grouped *m, work *w, uint8_t *p) {
  size_t n = points_of(m->dim);
  w->n_points = n, w->row_bytes = steps_of(m->dim) * STEP;
  w->bytes = (int8_t *)p, p += n * w->row_bytes;
  w->block = (int8_t *)p, p += LANES * w->row_bytes;
  w->best = (float *)p, p += n * 64;
  w->who = (int32_t *)p, p += n * 64;
  w->score = (float *)p, p += LANES * blocks_of(m->n_groups) * LANES * 4;
  w->scale = (float *)p, p += n * 4;
  w->norm2 = (float *)p, p += n * 4;
  w->zero = (int32_t *)p, p += n * 4;
  w->n_list = (uint32_t *)p, p += (m->n_groups + 15) / 16 * 64;
  w->list = (uint16_t *)p;
}

size_t kern_grouped512_scratch(const kern_grouped *m) {
  size_t n = points_of(m->dim), groups = blocks_of(m->n_groups) * LANES;
  return (n + LANES) * steps_of(m->dim) * STEP + n * (64 + 64 + 4 + 4 + 4) + groups * (LANES * 4 + 4 + (POINTS + LANES) * 2) + 64;
}

/* ------------------------------------------------------------------ products */

/* LANES rows [step][row][64], and columns. */
static void product(const kern_grouped *m, const int8_t *rows, const int32_t *zero, size_t block, int32_t *out) {
  size_t n_steps = steps_of(m->dim);
  const uint8_t *columns = m->bytes + block * n_steps * PAIR;
  if (m->amx) tile_product(rows, columns, n_steps, out);
  else vnni_product(rows, columns, n_steps, zero, out);
}

/* Row r of a product: the scores of its columns of one half. */
KERN_INLINE __m512 score_of(const int32_t *sum, size_t r, int half, __m512 row_scale, __m512 scale, __m512 bias) {
  __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(sum + r / 16 * 512 + (size_t)half * 256 + r % 16 * 16));
  return _mm512_fmadd_ps(_mm512_mul_ps(product, scale), row_scale, bias);
}

/* Copies the bytes of LANES points into rows for a product. */
KERN_INLINE void gather(const work *w, const uint16_t *point, int8_t *to) {
  for (size_t r = 0; r < LANES; r++) {
    const int8_t *from = w->bytes + point[r] * w->row_bytes;
    for (size_t u = 0; u * STEP < w->row_bytes; u++) _mm512_store_si512(to + u * PAIR + r * STEP, _mm512_load_si512(from + u * STEP));
  }
}

/* ------------------------------------------------------------------ which groups */

/* Puts a point on the lists of its groups. */
static void choose(const kern_grouped *m, work *w, const float *score, uint16_t point) {
  __m512 best = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  size_t n = m->n_groups;
  for (size_t g = 0; g < n; g += 16) {
    __m512 v = _mm512_load_ps(score + g);
    best = _mm512_max_ps(v, best), sum = _mm512_mask_add_ps(sum, tail16(n - g), sum, v);
  }
  float top = _mm512_reduce_max_ps(best), mean = _mm512_reduce_add_ps(sum) / (float)n;
  __m512 limit = _mm512_set1_ps(top - REACH * .5f * (w->norm2[point] - 2 * mean));
  for (size_t g = 0; g < n; g += 16)
    for (unsigned hits = _mm512_mask_cmp_ps_mask(tail16(n - g), _mm512_load_ps(score + g), limit, _CMP_GE_OQ); hits; hits &= hits - 1) {
      size_t to = g + (size_t)__builtin_ctz(hits);
      w->list[to * (POINTS + LANES) + w->n_list[to]++] = point;
    }
}

static void choose_all(const kern_grouped *m, work *w, size_t n) {
  _Alignas(64) int32_t sum[LANES * LANES];
  size_t blocks = blocks_of(m->n_groups);
  memset(w->n_list, 0, m->n_groups * sizeof *w->n_list);
  for (size_t p = 0; p < n; p += LANES) {
    uint16_t point[LANES];
    int32_t zero[LANES];
    for (size_t r = 0; r < LANES; r++) point[r] = (uint16_t)(p + r < n ? p + r : p), zero[r] = w->zero[point[r]];
    gather(w, point, w->block);
    for (size_t b = 0; b < blocks; b++) {
      product(m, w->block, zero, b, sum);
      for (int half = 0; half < 2; half++) {
        size_t at = b * LANES + 16 * (size_t)half;
        __m512 scale = _mm512_loadu_ps(m->scale + at), bias = _mm512_loadu_ps(m->bias + at);
        for (size_t r = 0; r < LANES; r++)
          _mm512_store_ps(w->score + r * blocks * LANES + at, score_of(sum, r, half, _mm512_set1_ps(w->scale[point[r]]), scale, bias));
      }
    }
    for (size_t r = 0; r < LANES && p + r < n; r++) choose(m, w, w->score + r * blocks * LANES, point[r]);
  }
}

/* ------------------------------------------------------------------ winners */

/* A product that is to meet the winners of its points. */
typedef struct {
  const int32_t *sum;
  const uint16_t *point;
  size_t block;          /* of its columns */
  int halves;
} encounter;

/* Rows from..to, constants. A NaN never wins. */
KERN_INLINE void meet(const kern_grouped *m, const work *w, const encounter *e, const int halves, const size_t from, const size_t to) {
  const float *scale = m->scale + e->block * LANES, *bias = m->bias + e->block * LANES;
  KERN_UNROLL
  for (size_t r = from; r < to; r++) {
    size_t p = e->point[r];
    __m512 row_scale = _mm512_set1_ps(w->scale[p]), best = _mm512_load_ps(w->best + p * 16);
    __m512i who = _mm512_load_si512(w->who + p * 16);
    KERN_UNROLL
    for (int half = 0; half < halves; half++) {
      __m512 v = score_of(e->sum, r, half, row_scale, _mm512_loadu_ps(scale + 16 * half), _mm512_loadu_ps(bias + 16 * half));
      __mmask16 wins = _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ);
      best = _mm512_max_ps(v, best), who = _mm512_mask_set1_epi32(who, wins, (int)(e->block * 2) + half);
    }
    _mm512_store_ps(w->best + p * 16, best), _mm512_store_si512(w->who + p * 16, who);
  }
}
KERN_INLINE void meet_some(const kern_grouped *m, const work *w, const encounter *e, const size_t from, const size_t to) {
  if (e->halves == 2) meet(m, w, e, 2, from, to);
  else if (e->halves) meet(m, w, e, 1, from, to);
}

/* One step of a product of which only the first half of the columns is wanted. */
KERN_INLINE void half_step(const int8_t *rows, const uint8_t *columns) {
  _tile_loadd(4, rows, 64);
  _tile_loadd(6, columns, 64);
  _tile_loadd(5, rows + 1024, 64);
  _tile_dpbssd(0, 4, 6);
  _tile_dpbssd(2, 5, 6);
}
KERN_INLINE void tiles_steps(const int8_t *rows, const uint8_t *columns, size_t from, size_t to, const int halves) {
  for (size_t u = from; u < to; u++) {
    if (halves == 2) tiles_step(rows + u * PAIR, columns + u * PAIR);
    else half_step(rows + u * PAIR, columns + u * PAIR);
  }
}

/* The next product by tiles, with the one before it met in between; see kern_nearest_avx512.c. */
KERN_INLINE void tiles_and_meet(const kern_grouped *m, const work *w, const int8_t *rows, size_t block, int32_t *out, const encounter *e,
                                const int halves) {
  size_t n_steps = steps_of(m->dim), second = n_steps > 1 ? 2 : 1;
  const uint8_t *columns = m->bytes + block * n_steps * PAIR;
  tiles_zero();
  tiles_steps(rows, columns, 0, 1, halves);
  meet_some(m, w, e, 0, 8);
  tiles_steps(rows, columns, 1, second, halves);
  meet_some(m, w, e, 8, 16);
  tiles_steps(rows, columns, second, n_steps, halves);
  _tile_stored(0, out, 64);
  meet_some(m, w, e, 16, 21);
  if (halves == 2) _tile_stored(1, out + 256, 64);
  meet_some(m, w, e, 21, 26);
  _tile_stored(2, out + 512, 64);
  meet_some(m, w, e, 26, 32);
  if (halves == 2) _tile_stored(3, out + 768, 64);
}

/* The points on the lists meet the members of their groups. */
static void meet_groups(const kern_grouped *m, work *w) {
  _Alignas(64) int32_t sum[2][LANES * LANES];
  encounter e = {.halves = 0};
  size_t turn = 0;
  for (size_t g = 0; g < m->n_groups; g++) {
    uint16_t *list = w->list + g * (POINTS + LANES);
    size_t n = w->n_list[g];
    for (size_t r = n; r % LANES; r++) list[r] = list[0]; /* once more, to fill the block */
    for (size_t at = 0; at < n; at += LANES) {
      int32_t zero[LANES];
      for (size_t r = 0; r < LANES && !m->amx; r++) zero[r] = w->zero[list[at + r]];
      gather(w, list + at, w->block);
      for (size_t b = 0; b < blocks_of(m->count[g]); b++, turn++) {
        size_t block = m->first[g] + b;
        int halves = m->count[g] - b * LANES > 16 ? 2 : 1;
        if (m->amx && halves == 2) tiles_and_meet(m, w, w->block, block, sum[turn & 1], &e, 2);
        else if (m->amx) tiles_and_meet(m, w, w->block, block, sum[turn & 1], &e, 1);
        else product(m, w->block, zero, block, sum[turn & 1]), meet_some(m, w, &e, 0, 16), meet_some(m, w, &e, 16, 32);
        e = (encounter){sum[turn & 1], list + at, block, halves};
      }
    }
  }
  meet_some(m, w, &e, 0, 16), meet_some(m, w, &e, 16, 32);
}

/* The best of a point's sixteen; the lowest number among equals. */
static uint32_t winner(const kern_grouped *m, const work *w, size_t p) {
  __m512 best = _mm512_load_ps(w->best + p * 16);
  float top = _mm512_reduce_max_ps(best);
  uint32_t least = UINT32_MAX;
  if (!(top > -INFINITY)) return 0;
  for (unsigned hits = _mm512_cmp_ps_mask(best, _mm512_set1_ps(top), _CMP_EQ_OQ); hits; hits &= hits - 1) {
    unsigned lane = (unsigned)__builtin_ctz(hits);
    uint32_t id = m->id[(size_t)w->who[p * 16 + lane] * 16 + lane];
    least = id < least ? id : least;
  }
  return least;
}

/* ------------------------------------------------------------------ all points */

/* A point's bytes and what belongs to them. */
static void take_point(const kern_grouped *m, work *w, const float *x, size_t p) {
  float scale = scale_of(x, m->dim);
  __m512 inv = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
  __m512i sum = _mm512_setzero_si512();
  int8_t *to = w->bytes + p * w->row_bytes;
  size_t u = 0;
  for (; (u + 1) * STEP <= m->dim; u++) _mm512_store_si512(to + u * STEP, bytes_of(x + u * STEP, STEP, inv));
  if (u * STEP < m->dim) _mm512_store_si512(to + u * STEP, bytes_of(x + u * STEP, m->dim - u * STEP, inv));
  for (u = 0; u * STEP < w->row_bytes && !m->amx; u++) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(to + u * STEP));
  w->norm2[p] = kern_get()->dot_f32(x, x, m->dim);
  w->scale[p] = scale, w->zero[p] = m->amx ? 0 : -128 * _mm512_reduce_add_epi32(sum);
  _mm512_store_ps(w->best + p * 16, _mm512_set1_ps(-INFINITY)), _mm512_store_si512(w->who + p * 16, _mm512_setzero_si512());
}

void kern_grouped512_find(const kern_grouped *m, const float *x, size_t n_x, size_t stride, uint32_t *id, uint8_t *scratch) {
  work w;
  lay_out(m, &w, scratch);
  if (m->amx) tiles_open();
  for (size_t first = 0; first < n_x; first += w.n_points) {
    size_t n = n_x - first < w.n_points ? n_x - first : w.n_points;
    for (size_t p = 0; p < n; p++) take_point(m, &w, x + (first + p) * stride, p);
    choose_all(m, &w, n);
    meet_groups(m, &w);
    for (size_t p = 0; p < n; p++) id[first + p] = winner(m, &w, p);
  }
  if (m->amx) tiles_close();
}
#else
typedef int kern_grouped_avx512_is_empty; /* ISO C wants a declaration in every file */
#endif
