/* kern.h - arithmetic on arrays: no SQLite, no files, no allocation.
 *
 * One table of function pointers per process, filled once and thread-safely by kern_get(): the best variant that the CPU
 * and the operating system support, capped by the environment variable VECSHARD_SIMD (scalar | avx2 | avx512, on ARM
 * scalar | neon | dotprod; a name above what the machine has means the best it has, an unknown name too). kern_variant(name) hands out one variant for tests, NULL
 * when this machine lacks it. The scalar file is the definition of every call; allowed differences:
 *   float results   relative error <= 1e-5 of the sum of absolute terms (order of additions, FMA)
 *   integer results equal, and so is everything made from integers (scores_i8, pq_table, pq_scan)
 * Pointers need no alignment unless said. Lengths may be 0. Nothing reads past its arrays.
 */
#ifndef KERN_H
#define KERN_H
#include <stddef.h>
#include <stdint.h>

/* A partition's codes are cut into blocks of KERN_BLOCK rows, a block into groups of KERN_GROUP rows; see kern_code_offset. */
enum { KERN_BLOCK = 256, KERN_GROUP = 64, KERN_LANES = 16 };
enum { KERN_FEW = 64 }; /* keys that are sorted by comparing each with each */

typedef struct kern {
  const char *name; /* "scalar", "avx2", "avx512", "neon", "dotprod" (NEON with the instructions of that name) */

  /* sum a*b, and sum (a-b)^2, over n floats. NaN and Inf propagate as in IEEE arithmetic. */
  float (*dot_f32)(const float *a, const float *b, size_t n);
  float (*l2sq_f32)(const float *a, const float *b, size_t n);
  /* out = {a.b, a.a, b.b} in one pass: what a cosine needs. */
  void (*cosine_f32)(const float *a, const float *b, size_t n, float out[3]);
  /* The same to the bit, while the n floats at `next` are brought into the cache: a line with each line that is read, for lines that
   * are all asked for at once wait for one another. They are not read, and need not be there. */
  float (*dot_ahead_f32)(const float *a, const float *b, size_t n, const void *next);
  float (*l2sq_ahead_f32)(const float *a, const float *b, size_t n, const void *next);
  void (*cosine_ahead_f32)(const float *a, const float *b, size_t n, const void *next, float out[3]);

  /* IEEE half <-> float; f32_to_f16 rounds to nearest even and gives Inf on overflow. */
  void (*f16_to_f32)(const uint16_t *in, float *out, size_t n);
  void (*f32_to_f16)(const float *in, uint16_t *out, size_t n);

  /* 1 when every one of the n floats is finite. */
  int (*all_finite_f32)(const float *a, size_t n);

  /* Scores of one vector against a packed matrix (kern_pack_f32): out[c] = x.C_c + bias[c] for c in [0, n_c padded to 16).
   * bias has that padded length too. */
  void (*scores_f32)(const float *x, size_t dim, const float *packed, const float *bias, size_t n_c, float *out);

  /* For each of n_x rows of `dim` floats (row r at x + r*stride): the c in [0, n_c) with the greatest x.C_c + bias[c], the
   * lowest such c on ties; with bias = -|C|^2/2 this is the nearest centroid. best (may be NULL) gets the score. Each row's
   * result does not depend on which rows share the call. */
  void (*argmax_f32)(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                     size_t n_c, uint32_t *id, float *best);

  /* scores_f32 of n_x rows (row r at x + r*stride) at once: row r's scores go to out + r*out_stride. Equal to scores_f32. */
  void (*scores_many_f32)(const float *x, size_t n_x, size_t stride, size_t dim, const float *packed, const float *bias,
                          size_t n_c, float *out, size_t out_stride);

  /* dot_f32 and l2sq_f32 with halves on the right. */
  float (*dot_f16)(const float *a, const uint16_t *b, size_t n);
  float (*l2sq_f16)(const float *a, const uint16_t *b, size_t n);

  /* Symmetric 8-bit quantization: out[j] = round to nearest even of x[j] * (127 / m), m the largest |x[j]|; returns m / 127, or
   * 0 (and zeros) when m is below 1e-30. x is finite. */
  float (*quantize_i8)(const float *x, size_t n, int8_t *out);

  /* Integer scores of n_q queries (query r at q + r*q_stride) against a matrix packed by kern_pack_i8:
   *   out[r*out_stride + c] = SUM_j q[r][j] * m[c][j],   c in [0, n_c padded to 16),   dim a multiple of 4, <= 65536 */
  void (*scores_i8)(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                    size_t out_stride);

  /* SUM_j q[j] * (row[j] - 128), n <= 65536. */
  int32_t (*dot_i8)(const int8_t *q, const uint8_t *row, size_t n);

  /* Scores become ranks: key[i] = kern_key((norm2[i] + base) + (mul * scale[i]) * (float)score[i], first + i), no fused
   * operations. Those <= limit go to out, in order; returns how many. out has room for n rounded up to 16. */
  size_t (*keys_i8)(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, uint32_t first,
                    uint64_t limit, uint64_t *out);

  /* The same distances, the least of those that share a slot: least[(at + i) % n_least] becomes their minimum. n_least is a power of 2
   * and a multiple of 16, `at` a multiple of 16. The w-th smallest slot is at least the w-th smallest distance. */
  void (*least_i8)(const int32_t *score, const float *scale, const float *norm2, size_t n, float mul, float base, float *least,
                   size_t n_least, size_t at);

  /* out[i] = kern_key(base + step * (float)sum[i], first + row[i]), n of them; no fused operations. out has room for n rounded up
   * to 16. */
  void (*keys_u16)(const uint16_t *sum, const uint32_t *row, size_t n, float base, float step, uint32_t first, uint64_t *out);

  /* The table of a PQ scan, in two steps. raw: sub-quantizer j scores its part of the query (q + j*sub_dim, sub_dim a
   * multiple of 4) against its 256 words (packed by kern_pack_i8, at words + j*256*sub_dim):
   *   raw[j*256 + w] = factor[j] * (float)score,   low[j] = the smallest of row j;   returns the widest (largest - low[j]).
   * table: table[i] = min(255, round to nearest even of (raw[i] - low[i/256]) * inv). No fused operations. */
  float (*pq_table_raw)(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim, float *raw,
                        float *low);
  void (*pq_table)(const float *raw, const float *low, size_t m, float inv, uint8_t *table);

  /* 8-bit PQ scan of n_rows rows of one partition, from a block border on. codes: blocks as described at
   * kern_code_offset; terms: u16 per row, in row order; table: m rows of 256 u8.
   *   sum(row) = min(65535, SUM_j table[j][code_j(row)] + (terms[row] * term_mul >> 16)),   m <= 256
   * Rows with sum < threshold are survivors (threshold above 65535: all rows); their numbers in [0, n_rows), ascending, go
   * to out_row and their sums to out_sum, both with room for n_rows rounded up to KERN_GROUP. Returns how many.
   * May read up to 64 bytes behind the codes and behind the terms.
   * next: codes that will be scanned after these, or NULL. About as many bytes of them as these have are brought into the cache in
   * the meantime; they are not read, and need not be that many. */
  size_t (*pq_scan)(const uint8_t *codes, size_t m, const uint16_t *terms, size_t n_rows, const uint8_t *table,
                    uint16_t term_mul, uint32_t threshold, const uint8_t *next, uint32_t *out_row, uint16_t *out_sum);

  /* The i in [0, n) with !(a[i] < limit), NaN among them, ascending; returns how many. out has room for n rounded up to 16. */
  size_t (*not_below_f32)(const float *a, size_t n, float limit, uint32_t *out);

  /* Sorts n <= KERN_FEW keys, ascending. */
  void (*sort_few_u64)(uint64_t *a, size_t n);

  /* Reorders a[0..n) so that its `want` smallest keys come first, in any order; a stays a permutation of itself. scratch has
   * room for 2*(n+8) keys. Expected O(n), never worse than O(n log n). Returns the largest of them (0 when want is 0; the
   * largest of all when want >= n). */
  uint64_t (*select_u64)(uint64_t *a, size_t n, size_t want, uint64_t *scratch);

  /* XXH3-64 of n bytes, by xxHash, which compiles to what each variant has. 520 bytes: SSE2 146 ns, AVX2 72, AVX-512 55. */
  uint64_t (*xxh3)(const void *p, size_t n);
} kern;

const kern *kern_get(void);
const kern *kern_variant(const char *name);

/* Ascending sort of 64-bit keys; scratch has room for n keys. Radix for long arrays, insertion for short ones. */
void kern_sort_u64(uint64_t *a, size_t n, uint64_t *scratch);
/* The same by the bits from `bit` on, stable: keys that are equal there stay as they came. */
void kern_sort_u64_from(uint64_t *a, size_t n, int bit, uint64_t *scratch);

/* Packs an n_c x dim row-major matrix for scores_f32 and argmax_f32: groups of KERN_LANES rows interleaved, element (c, j)
 * at packed[((c / 16) * dim + j) * 16 + c % 16]; the last group is filled with zeros. packed holds kern_packed_len floats. */
size_t kern_packed_len(size_t n_c, size_t dim);
void kern_pack_f32(const float *c, size_t n_c, size_t dim, float *packed);

/* Signed bytes as 128 + value, 16 rows interleaved by four dimensions: element (c, j) at
 * packed[((c / 16) * (dim / 4) + j / 4) * 64 + c % 16 * 4 + j % 4]; dim is a multiple of 4; the last group of 16 is filled with
 * zeros (128). packed holds n_c padded to 16 times dim bytes. */
static inline size_t kern_i8_offset(size_t dim, size_t c, size_t j) {
  return (c / 16 * (dim / 4) + j / 4) * 64 + c % 16 * 4 + j % 4;
}
void kern_pack_i8(const int8_t *c, size_t n_c, size_t dim, uint8_t *packed);

/* Where code j of row r of a partition of n_rows rows lies. Blocks of 256 rows are sub-quantizer-major, [m][256]; the last one
 * is [m][w], w its rows rounded up to 2: codes of n rows take (n rounded up to 2) * m bytes. A block's rows are cut into groups
 * of 64, of which the last has g = 2..64 bytes: row i < g/2 of a group is byte 2i, row i >= g/2 byte 2(i-g/2)+1, so that sums of
 * the even and of the odd bytes come out in row order. */
static inline size_t kern_code_offset(size_t n_rows, size_t m, size_t r, size_t j) {
  size_t block = r / KERN_BLOCK, in = r % KERN_BLOCK, left = n_rows - block * KERN_BLOCK;
  size_t width = left >= KERN_BLOCK ? KERN_BLOCK : (left + 1) / 2 * 2, group = in / KERN_GROUP * KERN_GROUP;
  size_t half = (width - group < KERN_GROUP ? width - group : KERN_GROUP) / 2, lane = in - group;
  return block * KERN_BLOCK * m + j * width + group + (lane < half ? 2 * lane : 2 * (lane - half) + 1);
}

/* ---- the nearest row of a matrix (kern_nearest.c, kern_nearest_avx512.c) ----
 *
 * What kern.argmax_f32 says with bias = -|c|^2/2, several times sooner where the CPU multiplies bytes: VNNI, and AMX tiles. Tiles need
 * a permission for the whole process, for good: kern_amx_request asks for it and says whether tiles are used from now on. They are
 * not without the instructions, when the system refuses, or when VECSHARD_SIMD names a lower variant than amx. */
int kern_amx_request(void);
int kern_amx_ready(void); /* has it been granted? */

enum { KERN_NEAREST_ROWS = 1024 }; /* a call with so many rows is as fast as any */

typedef struct kern_nearest {
  size_t n_c, dim;
  const float *rows;    /* n_c x dim: the caller's, which must stay */
  float *bias;          /* n_c padded to 32: -|c|^2/2, behind n_c -Inf */
  float *packed;        /* kern_pack_f32, or NULL and: */
  int amx;
  int8_t *bytes;        /* the rows in steps of their scale */
  float *scale;
  int32_t *zero;        /* -128 * the sum of the bytes */
  float longest, sigma; /* the longest row, the largest deviation of a row from its bytes */
} kern_nearest;

/* Memory for kern_nearest_init, and scratch for one call of kern_nearest_find. dim is 65536 at most. */
size_t kern_nearest_bytes(size_t n_c, size_t dim);
size_t kern_nearest_scratch(const kern_nearest *m);
/* Prepares n_c rows of dim floats in mem, which stays in use until the last find. */
void kern_nearest_init(kern_nearest *m, const float *rows, size_t n_c, size_t dim, void *mem);
/* id[r] = the row nearest to row r of x (n_x rows, stride floats apart), the lowest number on ties. exact = 1: as fp32 has it (distances
 * that differ by less than their rounding may change places); 0: to train with, as bytes have it where bytes are used. A row's
 * result does not depend on the rows beside it. */
void kern_nearest_find(const kern_nearest *m, const float *x, size_t n_x, size_t stride, int exact, uint32_t *id, void *scratch);

/* ---- about the nearest row of a large matrix in groups (kern_nearest.c, kern_grouped_avx512.c) ----
 *
 * A point meets the rows of the groups whose centres are near, in bytes: it may be told another row that is about as near, which one
 * does not depend on the rows beside it. Only where bytes are multiplied (kern_grouped_works). */
typedef struct kern_grouped {
  size_t n_groups, dim;
  int amx;
  uint8_t *bytes;       /* centres, then group by group, 32 columns a block */
  float *scale, *bias;  /* by column */
  uint32_t *id;         /* of the column's row */
  uint32_t *first, *count; /* of each group: its first block, rows */
} kern_grouped;

int kern_grouped_works(void);
size_t kern_grouped_bytes(size_t n_c, size_t n_groups, size_t dim);
size_t kern_grouped_scratch(const kern_grouped *m);
/* rows order[start[g]] .. order[start[g + 1] - 1] are group g. Neither is needed afterwards, nor are the rows and the centres. */
void kern_grouped_init(kern_grouped *m, const float *rows, size_t dim, const uint32_t *order, const uint32_t *start, const float *centres,
                       size_t n_groups, void *mem);
void kern_grouped_find(const kern_grouped *m, const float *x, size_t n_x, size_t stride, uint32_t *id, void *scratch);

/* ---- the nearest code words (kern_words.c, kern_words_avx512.c) ----
 *
 * Rows of n_subs * sub_dim floats; part j of a row is told the nearest of the n_words (16 or 256) words of sub-quantizer j: what
 * argmax_f32 says with bias = -|w|^2/2, for words that are bytes times one scale per sub-quantizer. With VNNI words that are not
 * are rounded so, and parts of up to 32 dimensions are integers of 11 to 16 bits times a power of two of the row: then distances that differ by
 * less than that may change places. A row's codes do not depend on the rows beside it. */
typedef struct kern_words {
  size_t n_subs, n_words, sub_dim;
  float *packed, *bias; /* fp32, or NULL and: */
  int16_t *pairs;       /* words in pairs of dimensions, sixteen side by side, times 256 */
  int32_t *start;       /* per sub-quantizer and level: -|w|^2/2, its number in the low byte */
  float step;           /* of the rows at level 0 */
} kern_words;

size_t kern_words_bytes(size_t n_subs, size_t n_words, size_t sub_dim);
/* words: n_subs x n_words x sub_dim; not needed afterwards. */
void kern_words_init(kern_words *w, const float *words, size_t n_subs, size_t n_words, size_t sub_dim, void *mem);
/* code[r*code_stride + j] for n rows, stride floats apart. */
void kern_words_find(const kern_words *w, const float *x, size_t n, size_t stride, uint8_t *code, size_t code_stride);

/* kern.scores_i8 for many rows: by AMX tiles where these are permitted (kern_amx_request), the same integers. out_stride is n_c
 * rounded up to 16, or more. */
void kern_scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                    size_t out_stride);

/* out[j] = SUM x[row[i]*stride + j] over the n numbers in row, added in their order, j in [0, dim): the same on every machine. */
void kern_sum_rows_f32(const float *x, size_t stride, const uint32_t *row, size_t n, size_t dim, float *out);

/* out[j] = x[j] * scale - y[j], not fused: the same on every machine. out may be x. */
void kern_scale_sub_f32(const float *x, float scale, const float *y, size_t n, float *out);

/* (distance, number) as one key whose integer order is the order of the float, then of the number; NaN sorts last. */
static inline uint64_t kern_key(float d, uint32_t number) {
  union { float f; uint32_t u; } v = {d};
  uint32_t u = d != d ? 0xffffffffu : v.u >> 31 ? ~v.u : v.u | 0x80000000u;
  return (uint64_t)u << 32 | number;
}
static inline float kern_key_value(uint64_t key) {
  uint32_t u = (uint32_t)(key >> 32);
  union { uint32_t u; float f; } v = {u >> 31 ? u & 0x7fffffffu : ~u};
  return v.f;
}
static inline uint32_t kern_key_number(uint64_t key) { return (uint32_t)key; }

#endif
