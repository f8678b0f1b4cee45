/* kern_int.h - what the files of ext/kernels share and nobody else needs. */
#ifndef KERN_INT_H
#define KERN_INT_H
#include "kern.h"

/* Unrolls the next loop completely: the register tiles only stay in registers when every index into them is constant.
 * -O3 alone gives up on the larger ones, and the two compilers spell the request differently. Give such a loop a
 * constant bound and leave it early (`if (r >= n_rows) break;`) even when n_rows is constant after inlining: clang 14
 * unrolls before it inlines; given a variable bound it unrolls by two and the tile lives in memory (argmax at 960 x
 * 1096: 53 instead of 177 GFLOP/s). */
#if defined(__clang__)
#define KERN_UNROLL _Pragma("unroll")
#else
#define KERN_UNROLL _Pragma("GCC unroll 16")
#endif
#define KERN_INLINE static inline __attribute__((always_inline))

/* ---- the tables of kern_scalar.c, kern_avx2.c, kern_avx512.c, kern_neon.c; ask the CPU before calling any but the first */
extern const kern kern_table_scalar;
#if defined(__x86_64__)
extern const kern kern_table_avx2;
extern const kern kern_table_avx512;
#elif defined(__aarch64__)
extern const kern kern_table_neon;
extern const kern kern_table_dotprod;
#endif

/* ---- kern_scalar.c: what variants without a better way use */
uint64_t kern_scalar_select_u64(uint64_t *a, size_t n, size_t want, uint64_t *scratch);

#if defined(__aarch64__)
/* ---- kern_dotprod.c: the calls of the dotprod table that are not kern_neon.c's */
void kern_dotprod_scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c,
                            int32_t *out, size_t out_stride);
int32_t kern_dotprod_dot_i8(const int8_t *q, const uint8_t *row, size_t n);
float kern_dotprod_pq_table_raw(const int8_t *q, const uint8_t *words, const float *factor, size_t m, size_t sub_dim,
                                float *raw, float *low);

/* ---- kern_neon.c: one row of kern.pq_table_raw from its scores; returns largest - *low */
float kern_neon_table_row(const int32_t score[256], float factor, float *raw, float *low);
#endif

/* ---- kern_dispatch.c: selection, of which only the split differs by instruction set */

/* Moves the keys <= pivot to the front of a and the others behind them, both in their old order; returns how many there
 * are in front. spill: n + 8 keys. */
typedef size_t (*kern_split_fn)(uint64_t *a, size_t n, uint64_t pivot, uint64_t *spill);

typedef void (*kern_sort_few_fn)(uint64_t *a, size_t n);

/* kern.select_u64 on top of one split and one small sort, of which `few` keys are worth no split any more. */
uint64_t kern_select_by(kern_split_fn split, kern_sort_few_fn sort_few, size_t few, uint64_t *a, size_t n, size_t want,
                        uint64_t *scratch);
void kern_sort_insertion(uint64_t *a, size_t n);

#if defined(__x86_64__)
/* ---- kern_nearest_avx512.c: kern_nearest by bytes; ask the CPU before calling it */
enum { KERN_NEAREST_CHUNK = 256 };
size_t kern_nearest512_block(size_t dim); /* bytes of 32 points */
size_t kern_nearest512_chunk(size_t dim); /* points that the scratch holds: KERN_NEAREST_CHUNK or fewer */
void kern_nearest512_pack(kern_nearest *m);
void kern_nearest512_find(const kern_nearest *m, const float *x, size_t n_x, size_t stride, int exact, uint32_t *id, uint8_t *scratch);

/* ---- kern_grouped_avx512.c: kern_grouped; ask the CPU before calling it */
size_t kern_grouped512_bytes(size_t n_c, size_t n_groups, size_t dim);
size_t kern_grouped512_scratch(const kern_grouped *m);
void kern_grouped512_pack(kern_grouped *m, const float *rows, const uint32_t *order, const uint32_t *start, const float *centres);
void kern_grouped512_find(const kern_grouped *m, const float *x, size_t n_x, size_t stride, uint32_t *id, uint8_t *scratch);

/* ---- kern_nearest_avx512.c: kern_scores_i8 by tiles; n_q is a multiple of 32, dim of 64 */
void kern_tiles512_scores(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                          size_t out_stride);
void kern_sum_rows512(const float *x, size_t stride, const uint32_t *row, size_t n, size_t dim, float *out);
void kern_scale_sub512(const float *x, float scale, const float *y, size_t n, float *out);

/* ---- kern_words_avx512.c: kern_words by integers; ask the CPU before calling it */
enum { KERN_WORDS_LEVELS = 16, KERN_WORDS_MAX_DIM = 32 };
void kern_words512_find(const kern_words *w, const float *x, size_t n, size_t stride, uint8_t *code, size_t code_stride);
#endif

/* ---- arithmetic every pq_scan agrees on */

/* The largest sum that survives; call it with threshold > 0. "sum < threshold" needs 17 bits to say "all rows"; "sum <=
 * limit" fits the 16-bit lanes and makes that case an ordinary one. */
static inline uint16_t kern_pq_limit(uint32_t threshold) {
  return threshold > 65536 ? 65535 : (uint16_t)(threshold - 1);
}

/* What dot_f32 and its like do for a `next`, where nothing is gained by asking in between. */
#define KERN_AHEAD_F32                                                                                         \
  static void ask_for(const void *next, size_t n) {                                                            \
    for (size_t z = 0; z < n * sizeof(float); z += 64) __builtin_prefetch((const char *)next + z);             \
  }                                                                                                            \
  static float dot_ahead_f32(const float *a, const float *b, size_t n, const void *next) {                    \
    ask_for(next, n);                                                                                          \
    return dot_f32(a, b, n);                                                                                   \
  }                                                                                                            \
  static float l2sq_ahead_f32(const float *a, const float *b, size_t n, const void *next) {                   \
    ask_for(next, n);                                                                                          \
    return l2sq_f32(a, b, n);                                                                                  \
  }                                                                                                            \
  static void cosine_ahead_f32(const float *a, const float *b, size_t n, const void *next, float out[3]) {    \
    ask_for(next, n);                                                                                          \
    cosine_f32(a, b, n, out);                                                                                  \
  }

/* Asks for the head of each page of codes: the hardware follows within a page only. */
static inline void kern_want_codes(const uint8_t *codes, size_t n) {
  enum { PAGE = 4096, HEAD = 256 };
  if (!codes) return;
  for (const uint8_t *page = codes, *end = codes + n; page < end; page = (const uint8_t *)(((uintptr_t)page | (PAGE - 1)) + 1))
    for (const uint8_t *z = page; z < page + HEAD && z < end; z += 64) __builtin_prefetch(z);
}

#endif
