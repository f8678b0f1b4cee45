/* bench_kernels.c - the time of each kernel of ext/kernels, for every variant that this machine can run.
 *
 *   bench_kernels             one line of JSON per kernel and shape:
 *                             {"kernel","shape","unit","work","bytes","ns":{"scalar":...,"avx2":...}}
 *
 * What stands beside the table of variants (nearest rows, nearest words) is timed as the process runs it, and once more as "amx" where
 * the system gives tiles to a process that asks.
 *
 * ns is CPU time per call, the best of some turns. work counts `unit`s per call: flop (fp32 operations, a multiply and an add are
 * two), op (the same of bytes), lookup (bytes looked up in a table), or byte; bytes is what a call reads when that comes from
 * memory, else 0. A kernel that is added is one function and one row of the table here.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../ext/kernels/kern.h"

enum {
  DIM = 960, ROWS = 1024, MANY = 256, FEW = 64,   /* a matrix of ROWS x DIM, queries */
  LONG = 16384,                                   /* elements of what walks along arrays */
  M_WIDE = 60, M_SLIM = 16, SUB_DIM = 16,         /* sub-quantizers: of 960 and of 128 dimensions */
  PART = 512, BIG_ROWS = 1 << 20,                 /* rows of a partition, and more than caches hold */
  KEYS = 100000, WANT = 1000,
  TURNS = 5
};
static const double TURN_S = 0.01, ENOUGH_S = 0.25;

static float *rows, *queries, *packed, *bias, *out, *words_factor, *raw, *low, least[1024];
static uint16_t *halves, *terms, *sums;
static int8_t *query_bytes;
static uint8_t *packed_bytes, *row_bytes, *words, *table, *codes;
static int32_t *scores;
static uint32_t *numbers, some_rows[FEW];
static uint64_t *keys, *many_keys, *scratch;
static kern_nearest nearest_matrix;
static kern_grouped grouped_matrix;
static kern_words word_matrix;
static void *nearest_memory, *nearest_scratch, *word_memory, *grouped_memory, *grouped_scratch;
static uint8_t *found_codes;
static float *many_rows;
static volatile double sink;

static double cpu_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t rnd(void) {
  static uint64_t x = 88172645463325252u;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x;
}

static void *room(size_t n_bytes) {
  void *p = NULL;
  if (posix_memalign(&p, 64, n_bytes + 128)) {
    fprintf(stderr, "bench_kernels: out of memory\n");
    exit(1);
  }
  memset(p, 0, n_bytes + 128);
  return p;
}
static float *random_floats(size_t n) {
  float *a = room(n * sizeof *a);
  for (size_t i = 0; i < n; i++) a[i] = (float)(int32_t)(rnd() >> 40) * 0x1p-23f;
  return a;
}
static void *random_bytes(size_t n) {
  uint8_t *a = room(n);
  for (size_t i = 0; i < n; i++) a[i] = (uint8_t)(rnd() >> 30);
  return a;
}

static void prepare(void) {
  rows = random_floats((size_t)ROWS * DIM), queries = random_floats((size_t)MANY * DIM);
  packed = room(kern_packed_len(ROWS, DIM) * sizeof(float));
  kern_pack_f32(rows, ROWS, DIM, packed);
  bias = random_floats(ROWS), out = room((size_t)MANY * ROWS * sizeof(float));
  halves = room(LONG * sizeof *halves);
  kern_get()->f32_to_f16(rows, halves, LONG);
  int8_t *signed_rows = random_bytes((size_t)ROWS * DIM);
  packed_bytes = room((size_t)ROWS * DIM);
  kern_pack_i8(signed_rows, ROWS, DIM, packed_bytes);
  free(signed_rows);
  query_bytes = random_bytes((size_t)MANY * DIM), row_bytes = random_bytes(DIM), scores = room((size_t)MANY * ROWS * sizeof *scores);
  for (size_t i = 0; i < LONG; i++) scores[i] = (int32_t)(rnd() >> 40);
  words = random_bytes((size_t)M_WIDE * 256 * SUB_DIM), words_factor = random_floats(M_WIDE);
  raw = room((size_t)M_WIDE * 256 * sizeof *raw), low = room(M_WIDE * sizeof *low);
  table = random_bytes((size_t)M_WIDE * 256);
  for (size_t i = 0; i < (size_t)M_WIDE * 256; i++) table[i] /= 2; /* sums of 60 stay well below 65,535 */
  codes = random_bytes((size_t)BIG_ROWS * M_WIDE), terms = random_bytes(BIG_ROWS * sizeof *terms);
  sums = room(BIG_ROWS * sizeof *sums), numbers = room(BIG_ROWS * sizeof *numbers);
  for (uint32_t i = 0; i < BIG_ROWS; i++) numbers[i] = i, sums[i] = (uint16_t)(rnd() >> 40);
  for (size_t i = 0; i < FEW; i++) some_rows[i] = (uint32_t)(rnd() >> 40) % ROWS;
  keys = room((LONG + 16) * sizeof *keys), many_keys = room(KEYS * sizeof *many_keys);
  scratch = room((3 * KEYS + 64) * sizeof *scratch);
  for (size_t i = 0; i < KEYS; i++) many_keys[i] = kern_key((float)(rnd() >> 40), (uint32_t)i);
}

/* Groups of rows that follow one another, each around its first row. */
static void prepare_grouped(void) {
  enum { GROUPS = 48 };
  uint32_t order[ROWS], start[GROUPS + 1];
  float *centres = room((size_t)GROUPS * DIM * sizeof *centres);
  for (uint32_t i = 0; i < ROWS; i++) order[i] = i;
  for (uint32_t g = 0; g <= GROUPS; g++) start[g] = g * ROWS / GROUPS;
  for (uint32_t g = 0; g < GROUPS; g++) memcpy(centres + (size_t)g * DIM, rows + (size_t)start[g] * DIM, DIM * sizeof *centres);
  if (!grouped_memory) grouped_memory = room(kern_grouped_bytes(ROWS, GROUPS, DIM));
  kern_grouped_init(&grouped_matrix, rows, DIM, order, start, centres, GROUPS, grouped_memory);
  free(grouped_scratch);
  grouped_scratch = room(kern_grouped_scratch(&grouped_matrix));
  free(centres);
}

/* What the nearest ones are prepared for depends on whether tiles are used: again after they were granted. */
static void prepare_nearest(void) {
  if (!many_rows) {
    many_rows = random_floats((size_t)KERN_NEAREST_ROWS * DIM);
    nearest_memory = room(kern_nearest_bytes(ROWS, DIM)), word_memory = room(kern_words_bytes(M_WIDE, 256, SUB_DIM));
    found_codes = room((size_t)KERN_NEAREST_ROWS * M_WIDE);
  }
  kern_nearest_init(&nearest_matrix, rows, ROWS, DIM, nearest_memory);
  free(nearest_scratch);
  nearest_scratch = room(kern_nearest_scratch(&nearest_matrix));
  kern_words_init(&word_matrix, rows, M_WIDE, 256, SUB_DIM, word_memory);
  if (kern_grouped_works()) prepare_grouped();
}

/* ---- one call each ---- */

static void dot_f32(const kern *k) { sink = k->dot_f32(rows, queries, DIM); }
static void l2sq_f32(const kern *k) { sink = k->l2sq_f32(rows, queries, DIM); }
static void cosine_f32(const kern *k) {
  float three[3];
  k->cosine_f32(rows, queries, DIM, three);
  sink = three[0];
}
/* Rows here and there, as a search compares them, the one after next asked for. */
static const float *scattered(size_t i) { return rows + i % ROWS * 389 % ROWS * DIM; }
static void dot_ahead(const kern *k) {
  for (size_t i = 0; i < ROWS; i++) sink = k->dot_ahead_f32(queries, scattered(i), DIM, scattered(i + 2));
}
static void l2sq_ahead(const kern *k) {
  for (size_t i = 0; i < ROWS; i++) sink = k->l2sq_ahead_f32(queries, scattered(i), DIM, scattered(i + 2));
}
static void cosine_ahead(const kern *k) {
  float three[3];
  for (size_t i = 0; i < ROWS; i++) k->cosine_ahead_f32(queries, scattered(i), DIM, scattered(i + 2), three);
  sink = three[0];
}
static void dot_f16(const kern *k) { sink = k->dot_f16(queries, halves, DIM); }
static void l2sq_f16(const kern *k) { sink = k->l2sq_f16(queries, halves, DIM); }
static void f16_to_f32(const kern *k) { k->f16_to_f32(halves, out, LONG); }
static void f32_to_f16(const kern *k) { k->f32_to_f16(rows, halves, LONG); }
static void all_finite_f32(const kern *k) { sink = k->all_finite_f32(rows, LONG); }
static void scores_f32(const kern *k) { k->scores_f32(queries, DIM, packed, bias, ROWS, out); }
static void scores_many_f32(const kern *k) { k->scores_many_f32(queries, MANY, DIM, DIM, packed, bias, ROWS, out, ROWS); }
static void argmax_f32(const kern *k) { k->argmax_f32(queries, MANY, DIM, DIM, packed, bias, ROWS, numbers, NULL); }
static void quantize_i8(const kern *k) { sink = k->quantize_i8(queries, DIM, query_bytes); }
static void scores_i8(const kern *k) { k->scores_i8(query_bytes, 1, DIM, DIM, packed_bytes, ROWS, scores, ROWS); }
static void scores_many_i8(const kern *k) { k->scores_i8(query_bytes, FEW, DIM, DIM, packed_bytes, ROWS, scores, ROWS); }
static void dot_i8(const kern *k) { sink = k->dot_i8(query_bytes, row_bytes, DIM); }
static void xxh3(const kern *k) {
  for (size_t i = 0; i < LONG; i += 8) sink = (double)k->xxh3(rows + 130 * i / 8, 520);
}
static void not_below_f32(const kern *k) { sink = (double)k->not_below_f32(rows, LONG, 2, numbers); }
static void least_i8(const kern *k) { k->least_i8(scores, rows, rows + LONG, LONG, 1, 0, least, sizeof least / sizeof *least, 0); }
static void keys_i8(const kern *k) { sink = (double)k->keys_i8(scores, rows, rows + LONG, LONG, 1, 0, 0, UINT64_MAX / 2, keys); }
static void keys_u16(const kern *k) { k->keys_u16(sums, numbers, LONG, 1, 0.5f, 0, keys); }
static void pq_table_raw(const kern *k) { sink = k->pq_table_raw(query_bytes, words, words_factor, M_WIDE, SUB_DIM, raw, low); }
static void pq_table(const kern *k) { k->pq_table(raw, low, M_WIDE, 100, table); }
/* A threshold that lets few rows through, as in a search. */
static void pq_scan_wide(const kern *k) { sink = (double)k->pq_scan(codes, M_WIDE, terms, PART, table, 16, 2500, NULL, numbers, sums); }
static void pq_scan_slim(const kern *k) { sink = (double)k->pq_scan(codes, M_SLIM, terms, PART, table, 16, 500, NULL, numbers, sums); }
static void pq_scan_memory(const kern *k) { sink = (double)k->pq_scan(codes, M_WIDE, terms, BIG_ROWS, table, 16, 2500, NULL, numbers, sums); }
static void select_u64(const kern *k) {
  memcpy(scratch, many_keys, KEYS * sizeof *scratch);
  sink = (double)k->select_u64(scratch, KEYS, WANT, scratch + KEYS);
}
static void sort_few_u64(const kern *k) {
  memcpy(scratch, many_keys, KERN_FEW * sizeof *scratch);
  k->sort_few_u64(scratch, KERN_FEW);
}
static void sort_u64_from(const kern *k) {
  (void)k;
  memcpy(scratch, many_keys, KEYS * sizeof *scratch);
  kern_sort_u64_from(scratch, KEYS, 32, scratch + KEYS);
}
static void sort_u64(const kern *k) {
  (void)k;
  memcpy(scratch, many_keys, KEYS * sizeof *scratch);
  kern_sort_u64(scratch, KEYS, scratch + KEYS);
}

static void nearest_exact(const kern *k) {
  (void)k;
  kern_nearest_find(&nearest_matrix, many_rows, KERN_NEAREST_ROWS, DIM, 1, numbers, nearest_scratch);
}
static void nearest_to_train(const kern *k) {
  (void)k;
  kern_nearest_find(&nearest_matrix, many_rows, KERN_NEAREST_ROWS, DIM, 0, numbers, nearest_scratch);
}
static void nearest_grouped(const kern *k) {
  (void)k;
  if (grouped_scratch) kern_grouped_find(&grouped_matrix, many_rows, KERN_NEAREST_ROWS, DIM, numbers, grouped_scratch);
}
static void scores_by_tiles(const kern *k) {
  (void)k;
  kern_scores_i8(query_bytes, MANY, DIM, DIM, packed_bytes, ROWS, scores, ROWS);
}
static void nearest_words(const kern *k) {
  (void)k;
  kern_words_find(&word_matrix, many_rows, KERN_NEAREST_ROWS, DIM, found_codes, M_WIDE);
}
static void sum_rows(const kern *k) {
  (void)k;
  kern_sum_rows_f32(rows, DIM, some_rows, FEW, DIM, out);
}
static void scale_sub(const kern *k) {
  (void)k;
  kern_scale_sub_f32(rows, 0.5f, queries, DIM, out);
}

typedef struct kernel_case {
  const char *kernel, *shape, *unit;
  double work, bytes;
  void (*call)(const kern *);
} kernel_case;

#define PRODUCT(n, c) (2.0 * (n) * (c) * DIM)
static const kernel_case cases[] = {
    {"dot_f32", "960", "flop", 2 * DIM, 0, dot_f32},
    {"l2sq_f32", "960", "flop", 3 * DIM, 0, l2sq_f32},
    {"cosine_f32", "960", "flop", 6 * DIM, 0, cosine_f32},
    {"dot_ahead_f32", "1024 x 960, scattered", "flop", 2.0 * ROWS * DIM, 0, dot_ahead},
    {"l2sq_ahead_f32", "1024 x 960, scattered", "flop", 3.0 * ROWS * DIM, 0, l2sq_ahead},
    {"cosine_ahead_f32", "1024 x 960, scattered", "flop", 6.0 * ROWS * DIM, 0, cosine_ahead},
    {"dot_f16", "960", "flop", 2 * DIM, 0, dot_f16},
    {"l2sq_f16", "960", "flop", 3 * DIM, 0, l2sq_f16},
    {"f16_to_f32", "16384", "byte", 2.0 * LONG, 0, f16_to_f32},
    {"f32_to_f16", "16384", "byte", 4.0 * LONG, 0, f32_to_f16},
    {"all_finite_f32", "16384", "byte", 4.0 * LONG, 0, all_finite_f32},
    {"scores_f32", "1 x 960 x 1024", "flop", PRODUCT(1, ROWS), 4.0 * ROWS * DIM, scores_f32},
    {"scores_many_f32", "256 x 960 x 1024", "flop", PRODUCT(MANY, ROWS), 0, scores_many_f32},
    {"argmax_f32", "256 x 960 x 1024", "flop", PRODUCT(MANY, ROWS), 0, argmax_f32},
    {"quantize_i8", "960", "byte", 4 * DIM, 0, quantize_i8},
    {"scores_i8", "1 x 960 x 1024", "op", PRODUCT(1, ROWS), 0, scores_i8},
    {"scores_i8", "64 x 960 x 1024", "op", PRODUCT(FEW, ROWS), 0, scores_many_i8},
    {"dot_i8", "960", "op", 2 * DIM, 0, dot_i8},
    {"keys_i8", "16384", "byte", 12.0 * LONG, 0, keys_i8},
    {"least_i8", "16384", "byte", 12.0 * LONG, 0, least_i8},
    {"not_below_f32", "16384", "byte", 4.0 * LONG, 0, not_below_f32},
    {"keys_u16", "16384", "byte", 6.0 * LONG, 0, keys_u16},
    {"pq_table_raw", "60 x 16", "op", 2.0 * M_WIDE * 256 * SUB_DIM, 0, pq_table_raw},
    {"pq_table", "60 x 256", "byte", 4.0 * M_WIDE * 256, 0, pq_table},
    {"pq_scan", "512 x 60", "lookup", (double)PART * M_WIDE, 0, pq_scan_wide},
    {"pq_scan", "512 x 16", "lookup", (double)PART * M_SLIM, 0, pq_scan_slim},
    {"pq_scan", "1048576 x 60", "lookup", (double)BIG_ROWS * M_WIDE, (double)BIG_ROWS * (M_WIDE + 2), pq_scan_memory},
    {"select_u64", "1000 of 100000", "byte", 8.0 * KEYS, 0, select_u64},
    {"xxh3", "520 bytes", "byte", 520.0 * LONG / 8, 0, xxh3},
    {"sort_few_u64", "64", "byte", 8.0 * KERN_FEW, 0, sort_few_u64},
};
static const kernel_case whole_cases[] = {
    {"kern_sort_u64", "100000", "byte", 8.0 * KEYS, 0, sort_u64},
    {"kern_sort_u64_from", "100000, by the high half", "byte", 8.0 * KEYS, 0, sort_u64_from},
    {"kern_nearest_find", "1024 x 960 x 1024", "op", PRODUCT(KERN_NEAREST_ROWS, ROWS), 0, nearest_exact},
    {"kern_nearest_find", "the same, to train", "op", PRODUCT(KERN_NEAREST_ROWS, ROWS), 0, nearest_to_train},
    {"kern_grouped_find", "the same, near groups", "op", PRODUCT(KERN_NEAREST_ROWS, ROWS), 0, nearest_grouped},
    {"kern_scores_i8", "256 x 960 x 1024", "op", PRODUCT(MANY, ROWS), 0, scores_by_tiles},
    {"kern_words_find", "1024 x 60 x 256 x 16", "flop", 2.0 * KERN_NEAREST_ROWS * M_WIDE * 256 * SUB_DIM, 0, nearest_words},
    {"kern_sum_rows_f32", "64 x 960", "byte", 4.0 * FEW * DIM, 0, sum_rows},
    {"kern_scale_sub_f32", "960", "byte", 8.0 * DIM, 0, scale_sub},
};
enum { N_CASES = sizeof cases / sizeof *cases, N_WHOLE = sizeof whole_cases / sizeof *whole_cases };

static double ns_per_call(const kernel_case *c, const kern *k) {
  double best = 1e30, begun = cpu_s();
  c->call(k);
  for (int turn = 0; turn < TURNS && (turn < 1 || cpu_s() - begun < ENOUGH_S); turn++) {
    double start = cpu_s(), now;
    long n = 0;
    do {
      long some = n / 4 + 1; /* the clock is asked ever more rarely: it takes longer than the shortest kernels */
      for (long i = 0; i < some; i++) c->call(k);
      n += some;
    } while ((now = cpu_s()) - start < TURN_S);
    if ((now - start) / (double)n < best) best = (now - start) / (double)n;
  }
  return best * 1e9;
}

static void print_case(const kernel_case *c) {
  printf("{\"kernel\":\"%s\",\"shape\":\"%s\",\"unit\":\"%s\",\"work\":%.0f,\"bytes\":%.0f,\"ns\":{", c->kernel, c->shape,
         c->unit, c->work, c->bytes);
}

int main(void) {
  static const char *const variants[] = {"scalar", "neon", "dotprod", "avx2", "avx512"};
  double without[N_WHOLE];
  prepare();
  for (size_t i = 0; i < N_CASES; i++) {
    const char *comma = "";
    print_case(&cases[i]);
    for (size_t v = 0; v < sizeof variants / sizeof *variants; v++) {
      const kern *k = kern_variant(variants[v]);
      if (!k) continue;
      printf("%s\"%s\":%.2f", comma, k->name, ns_per_call(&cases[i], k));
      comma = ",";
    }
    printf("}}\n");
  }
  prepare_nearest();
  for (size_t i = 0; i < N_WHOLE; i++) without[i] = ns_per_call(&whole_cases[i], NULL);
  int tiles = kern_amx_request();
  prepare_nearest();
  for (size_t i = 0; i < N_WHOLE; i++) {
    print_case(&whole_cases[i]);
    printf("\"%s\":%.2f", kern_get()->name, without[i]);
    if (tiles) printf(",\"amx\":%.2f", ns_per_call(&whole_cases[i], NULL));
    printf("}}\n");
  }
  return 0;
}
