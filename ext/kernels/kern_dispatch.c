/* kern_dispatch.c - picks the variant, and holds what has only one: packing, sorting, the frame of the selection.
 *
 * A variant is offered only if the CPU has every feature that its file was compiled with and the operating system saves
 * the registers; __builtin_cpu_supports answers both. F16C is the exception: clang 14 does not know its name, so its
 * CPUID bit is read here; the state it needs (ymm) is the state that the question for AVX2 has already covered. On AArch64
 * the kernel tells the features that it supports.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif
#include "kern_int.h"

/* ------------------------------------------------------------------ variants */

#if defined(__x86_64__)
static int has_f16c(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
static int has_avx2(void) {
  __builtin_cpu_init();
  /* -mavx2 turns POPCNT on as well */
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt") &&
         has_f16c();
}
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__)
static int has_neon(void) { return 1; } /* armv8-a is not without it */
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif
static int has_scalar(void) { return 1; }

/* Best first. */
static const struct {
  const kern *table;
  int (*is_here)(void);
} variants[] = {
#if defined(__x86_64__)
  {&kern_table_avx512, has_avx512},
  {&kern_table_avx2, has_avx2},
#elif defined(__aarch64__)
  {&kern_table_dotprod, has_dotprod},
  {&kern_table_neon, has_neon},
#endif
  {&kern_table_scalar, has_scalar},
};
enum { N_VARIANTS = sizeof variants / sizeof *variants };

const kern *kern_variant(const char *name) {
  for (int i = 0; i < N_VARIANTS; i++)
    if (strcmp(name, variants[i].table->name) == 0) return variants[i].is_here() ? variants[i].table : NULL;
  return NULL;
}

static pthread_once_t chosen_once = PTHREAD_ONCE_INIT;
static const kern *chosen;

static void choose(void) {
  const char *cap = getenv("VECSHARD_SIMD");
  int first = 0;
  if (cap)
    for (int i = 0; i < N_VARIANTS; i++)
      if (strcmp(cap, variants[i].table->name) == 0) first = i; /* an unknown name leaves 0: no cap */
  while (!variants[first].is_here()) first++; /* ends: the scalar one is always here */
  chosen = variants[first].table;
}

const kern *kern_get(void) {
  pthread_once(&chosen_once, choose);
  return chosen;
}

/* ------------------------------------------------------------------ packed matrices */

size_t kern_packed_len(size_t n_c, size_t dim) { return (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES * dim; }

void kern_pack_f32(const float *c, size_t n_c, size_t dim, float *packed) {
  for (size_t first = 0; first < n_c; first += KERN_LANES) {
    size_t n_lanes = n_c - first < KERN_LANES ? n_c - first : KERN_LANES;
    for (size_t j = 0; j < dim; j++, packed += KERN_LANES) {
      for (size_t lane = 0; lane < n_lanes; lane++) packed[lane] = c[(first + lane) * dim + j];
      for (size_t lane = n_lanes; lane < KERN_LANES; lane++) packed[lane] = 0;
    }
  }
}

void kern_pack_i8(const int8_t *c, size_t n_c, size_t dim, uint8_t *packed) {
  memset(packed, 128, (n_c + KERN_LANES - 1) / KERN_LANES * KERN_LANES * dim);
  for (size_t r = 0; r < n_c; r++)
    for (size_t j = 0; j < dim; j += 4) {
      uint8_t *to = packed + kern_i8_offset(dim, r, j);
      for (size_t e = 0; e < 4; e++) to[e] = (uint8_t)(128 + c[r * dim + j + e]);
    }
}

/* ------------------------------------------------------------------ sorting */

enum {
  INSERTION_MAX = KERN_FEW, /* below this counting digits costs more than the quadratic moves */
  WIDE_FROM = 4096,   /* keys from which on fewer passes with wide digits pay for their larger tables */
  NARROW = 8, WIDE = 11
};

static inline void sort_insertion_from(uint64_t *a, size_t n, int bit) {
  for (size_t i = 1; i < n; i++) {
    uint64_t key = a[i];
    size_t at = i;
    for (; at && a[at - 1] >> bit > key >> bit; at--) a[at] = a[at - 1];
    a[at] = key;
  }
}
void kern_sort_insertion(uint64_t *a, size_t n) { sort_insertion_from(a, n, 0); }

/* One pass: stable, by the digit of `width` bits from `shift` on. */
static void sort_digit(const uint64_t *from, uint64_t *to, size_t n, int shift, int width) {
  uint32_t at[1 << WIDE]; /* keys are numbered with 32 bits */
  const uint64_t mask = ((uint64_t)1 << width) - 1;
  memset(at, 0, sizeof *at << width);
  for (size_t i = 0; i < n; i++) at[from[i] >> shift & mask]++;
  uint32_t sum = 0;
  for (uint64_t v = 0; v <= mask; v++) {
    uint32_t here = at[v];
    at[v] = sum;
    sum += here;
  }
  for (size_t i = 0; i < n; i++) to[at[from[i] >> shift & mask]++] = from[i];
}

/* Least significant digit first. Digits start at bits in which keys differ: what all share (the high bits of row numbers, the
 * exponents of distances) is passed over. */
void kern_sort_u64_from(uint64_t *a, size_t n, int bit, uint64_t *scratch) {
  if (n <= INSERTION_MAX) {
    sort_insertion_from(a, n, bit);
    return;
  }
  int width = n < WIDE_FROM ? NARROW : WIDE;
  uint64_t differ = 0, *from = a, *to = scratch;
  for (size_t i = 1; i < n; i++) differ |= a[i] ^ a[0];
  differ = differ >> bit << bit;
  while (differ) {
    int shift = __builtin_ctzll(differ), above = shift + width;
    sort_digit(from, to, n, shift, width);
    differ = above < 64 ? differ >> above << above : 0;
    uint64_t *swap = from;
    from = to;
    to = swap;
  }
  if (from != a) memcpy(a, from, n * sizeof *a);
}

void kern_sort_u64(uint64_t *a, size_t n, uint64_t *scratch) {
  if (n <= KERN_FEW) kern_get()->sort_few_u64(a, n); /* made for all bits: small sorts are many */
  else kern_sort_u64_from(a, n, 0, scratch);
}

/* ------------------------------------------------------------------ selection */

enum { N_SAMPLES = 16, WORK_FACTOR = 8 };

/* A key of a[0..n) (n >= N_SAMPLES) that about `need` keys do not exceed. The sample of that rank, but one towards the
 * middle: the cut then most likely falls into the smaller part and the larger one is settled. */
static uint64_t choose_pivot(kern_sort_few_fn sort_few, const uint64_t *a, size_t n, size_t need) {
  uint64_t sample[N_SAMPLES];
  size_t step = n / N_SAMPLES, rank = (size_t)((double)need * N_SAMPLES / (double)n);
  for (size_t i = 0; i < N_SAMPLES; i++) sample[i] = a[step / 2 + i * step];
  sort_few(sample, N_SAMPLES);
  return sample[rank < N_SAMPLES / 2 ? rank + 1 : rank - 1]; /* need < n, so rank < N_SAMPLES */
}

/* Quickselect: a[0..base) is known to belong in front, a[end..n) behind, the cut lies between. Evenly spaced samples
 * make sorted and reversed input the easiest; an input made against them, or bad luck, runs into the work limit and is
 * sorted, so the worst case is linear: WORK_FACTOR splits of the array and one radix sort. */
uint64_t kern_select_by(kern_split_fn split, kern_sort_few_fn sort_few, size_t few, uint64_t *a, size_t n, size_t want,
                        uint64_t *scratch) {
  size_t base = 0, end = n, work = 0;
  if (want > n) want = n;
  while (base < want && want < end) {
    uint64_t *rest = a + base;
    size_t n_rest = end - base, need = want - base;
    if (n_rest <= few) {
      sort_few(rest, n_rest);
      break;
    }
    if (work / WORK_FACTOR > n) {
      kern_sort_u64(rest, n_rest, scratch);
      break;
    }
    uint64_t pivot = choose_pivot(sort_few, rest, n_rest, need);
    size_t n_low = split(rest, n_rest, pivot, scratch);
    work += n_rest;
    if (n_low <= need) {
      base += n_low;
    } else if (n_low < n_rest) {
      end = base + n_low;
    } else { /* the pivot is the largest key: set all of its copies apart, else many duplicates would never split */
      if (pivot == 0) break;
      n_low = split(rest, n_rest, pivot - 1, scratch);
      work += n_rest;
      if (n_low <= need) break; /* what lies behind the cut is all equal */
      end = base + n_low;
    }
  }
  uint64_t largest = 0;
  for (size_t i = 0; i < want; i++) largest = a[i] > largest ? a[i] : largest;
  return largest;
}
