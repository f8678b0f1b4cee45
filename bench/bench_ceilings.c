/* bench_ceilings.c - what one core of this machine can do, so that a kernel's speed has something to stand beside.
 *
 *   bench_ceilings            one line of JSON: name -> number per second of CPU time; 0: this CPU has no such thing
 *
 *   fma_f32      floating point operations: multiply and add in registers, the widest vectors there are
 *   dot_i8       operations: products of u8 and s8 summed in 32 bits (VNNI)
 *   lookup_u8    bytes looked up in a table of 256 bytes that lies in registers (VBMI: two vpermi2b and a blend per 64)
 *   tile_i8      operations: tile products of 16 x 64 by 64 x 16 bytes (AMX)
 *   read_dram    bytes read in order from an array that no cache holds
 *   read_l3      the same from 16 MiB
 *   read_l2      the same from 512 KiB
 *   rows_512, rows_4096   bytes of rows of that size, read in random order, the next ones prefetched: what refining does
 *
 * Every figure is the best of some turns of about 50 ms.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(isa) __attribute__((target(isa)))
#endif

#define INLINE static inline __attribute__((always_inline))
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

enum { TURNS = 5, ROUND = 10000, SMALL = 1 << 19, MIDDLE = 1 << 24, AHEAD = 6, ROWS = 20000 };
static const double TURN_S = 0.05;
static const size_t BIG = (size_t)1 << 30;

static volatile float sink_f;
static volatile uint64_t sink_u;
static uint8_t *memory; /* BIG bytes */

static double cpu_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Work per second, for a function that does some work and says how much. */
static double rate(double (*some)(void)) {
  double best = 0;
  for (int turn = 0; turn < TURNS && some; turn++) {
    double start = cpu_s(), now, done = 0;
    do done += some();
    while ((now = cpu_s()) - start < TURN_S);
    if (done / (now - start) > best) best = done / (now - start);
  }
  return best;
}

/* ---- the same lines for every width: the compiler cuts 64 bytes into the vectors of the function that they are inlined in ---- */

/* n independent chains hide the latency; more than the registers hold would spill. -ffp-contract=fast makes it FMA. */
INLINE double fma_chains(const int n) {
  f32x16 sum[12], a, b;
  for (int i = 0; i < 16; i++) a[i] = 1.0000001f, b[i] = 1e-9f;
#pragma GCC unroll 12
  for (int c = 0; c < n; c++) sum[c] = a * (float)c;
  for (int r = 0; r < ROUND; r++) {
#pragma GCC unroll 12
    for (int c = 0; c < n; c++) sum[c] = sum[c] * a + b;
  }
#pragma GCC unroll 12
  for (int c = 1; c < n; c++) sum[0] += sum[c];
  for (int i = 0; i < 16; i++) sink_f = sum[0][i];
  return 32.0 * n * ROUND;
}

INLINE double read_in_order(const uint8_t *p, size_t n_bytes) {
  u64x8 a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i < n_bytes; i += 256) {
    a ^= *(const u64x8 *)(p + i), b ^= *(const u64x8 *)(p + i + 64);
    c ^= *(const u64x8 *)(p + i + 128), d ^= *(const u64x8 *)(p + i + 192);
  }
  a ^= b ^ c ^ d;
  for (int i = 0; i < 8; i++) sink_u = a[i];
  return (double)n_bytes;
}
/* Pieces of the large array, one after another. */
INLINE double read_piece(void) {
  static size_t at;
  const size_t piece = BIG / 16;
  at = (at + piece) % BIG;
  return read_in_order(memory + at, piece);
}

INLINE double read_rows(const size_t row_bytes) {
  static uint64_t x = 88172645463325252u;
  const uint8_t *next[AHEAD] = {0};
  double n = 0;
  for (int i = 0; i < ROWS + AHEAD; i++) {
    const uint8_t *now = next[i % AHEAD];
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    const uint8_t *row = memory + x % (BIG / row_bytes) * row_bytes;
    for (size_t j = 0; j < row_bytes && j < 1024; j += 64) __builtin_prefetch(row + j);
    next[i % AHEAD] = row;
    if (now) n += read_in_order(now, row_bytes);
  }
  return n;
}

typedef double work(void);
typedef struct ways { work *fma, *dot_i8, *lookup, *tile, *dram, *l3, *l2, *rows_512, *rows_4096; } ways;

static double fma_plain(void) { return fma_chains(5); }
static double dram_plain(void) { return read_piece(); }
static double l3_plain(void) { return read_in_order(memory, MIDDLE); }
static double l2_plain(void) { return read_in_order(memory, SMALL); }
static double rows_512_plain(void) { return read_rows(512); }
static double rows_4096_plain(void) { return read_rows(4096); }
static const ways plain = {.fma = fma_plain, .dram = dram_plain, .l3 = l3_plain, .l2 = l2_plain, .rows_512 = rows_512_plain,
                           .rows_4096 = rows_4096_plain};

#if defined(__x86_64__)
TARGET("avx2,fma") static double fma_avx2(void) { return fma_chains(6); }
TARGET("avx2,fma") static double dram_avx2(void) { return read_piece(); }
TARGET("avx2,fma") static double l3_avx2(void) { return read_in_order(memory, MIDDLE); }
TARGET("avx2,fma") static double l2_avx2(void) { return read_in_order(memory, SMALL); }
TARGET("avx2,fma") static double rows_512_avx2(void) { return read_rows(512); }
TARGET("avx2,fma") static double rows_4096_avx2(void) { return read_rows(4096); }

#define WIDE "avx512f,avx512bw,avx512vl,prefer-vector-width=512"
TARGET(WIDE) static double fma_avx512(void) { return fma_chains(12); }
TARGET(WIDE) static double dram_avx512(void) { return read_piece(); }
TARGET(WIDE) static double l3_avx512(void) { return read_in_order(memory, MIDDLE); }
TARGET(WIDE) static double l2_avx512(void) { return read_in_order(memory, SMALL); }
TARGET(WIDE) static double rows_512_avx512(void) { return read_rows(512); }
TARGET(WIDE) static double rows_4096_avx512(void) { return read_rows(4096); }

TARGET("avx512f,avx512vnni") static double dot_i8_vnni(void) {
  __m512i sum[12], a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x01010101);
#pragma GCC unroll 12
  for (int c = 0; c < 12; c++) sum[c] = _mm512_set1_epi32(c);
  for (int r = 0; r < ROUND; r++) {
    __asm__ volatile("" : "+v"(a));
#pragma GCC unroll 12
    for (int c = 0; c < 12; c++) sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
  }
#pragma GCC unroll 12
  for (int c = 1; c < 12; c++) sum[0] = _mm512_add_epi32(sum[0], sum[c]);
  sink_u = (uint64_t)_mm512_reduce_add_epi32(sum[0]);
  return 128.0 * 12 * ROUND;
}

/* Codes come out of the table again, so that nothing can be left out; four chains of them. */
TARGET("avx512f,avx512bw,avx512vbmi") static double lookup_vbmi(void) {
  __m512i low0 = _mm512_loadu_si512(memory), low1 = _mm512_loadu_si512(memory + 64);
  __m512i high0 = _mm512_loadu_si512(memory + 128), high1 = _mm512_loadu_si512(memory + 192), code[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++) code[c] = _mm512_loadu_si512(memory + 256 + 64 * c);
  for (int r = 0; r < ROUND; r++) {
#pragma GCC unroll 8
    for (int c = 0; c < 8; c++) {
      __m512i low = _mm512_permutex2var_epi8(low0, code[c], low1), high = _mm512_permutex2var_epi8(high0, code[c], high1);
      code[c] = _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(code[c]), high);
    }
  }
#pragma GCC unroll 8
  for (int c = 1; c < 8; c++) code[0] = _mm512_xor_si512(code[0], code[c]);
  sink_u = (uint64_t)_mm512_reduce_add_epi32(code[0]);
  return 64.0 * 8 * ROUND;
}

typedef struct tile_config { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } tile_config;
TARGET("amx-tile,amx-int8") static double tile_amx(void) {
  tile_config how = {.palette = 1};
  for (int i = 0; i < 8; i++) how.row_bytes[i] = 64, how.rows[i] = 16;
  __asm__ volatile("" : : "r"(&how) : "memory"); /* the intrinsic names 8 bytes of it only */
  _tile_loadconfig(&how);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int r = 0; r < ROUND / 10; r++) { /* two by two, from the second cache, as a matrix product does it */
    const uint8_t *a = memory + (r & 63) * 4096;
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + 1024, 64);
    _tile_loadd(6, a + 2048, 64);
    _tile_loadd(7, a + 3072, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4 * 16 * 16 * 64 * 2.0 * (ROUND / 10);
}

/* Linux gives the tile registers to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
static int may_use_tiles(void) {
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 24 & 1) && (d >> 25 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

static ways choose(void) {
  ways w = plain;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    w.fma = fma_avx2, w.dram = dram_avx2, w.l3 = l3_avx2, w.l2 = l2_avx2, w.rows_512 = rows_512_avx2, w.rows_4096 = rows_4096_avx2;
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    w = (ways){.fma = fma_avx512, .dram = dram_avx512, .l3 = l3_avx512, .l2 = l2_avx512, .rows_512 = rows_512_avx512,
               .rows_4096 = rows_4096_avx512};
  if (__builtin_cpu_supports("avx512vnni")) w.dot_i8 = dot_i8_vnni;
  if (__builtin_cpu_supports("avx512vbmi")) w.lookup = lookup_vbmi;
  if (may_use_tiles()) w.tile = tile_amx;
  return w;
}
#else
static ways choose(void) { return plain; }
#endif

int main(void) {
  ways w = choose();
  memory = mmap(NULL, BIG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    perror("bench_ceilings: 1 GiB of memory");
    return 1;
  }
  madvise(memory, BIG, MADV_HUGEPAGE);
  for (size_t i = 0; i < BIG; i += 8) *(uint64_t *)(memory + i) = i * 0x9e3779b97f4a7c15u;
  printf("{\"fma_f32\":%.4g,\"dot_i8\":%.4g,\"lookup_u8\":%.4g,\"tile_i8\":%.4g,\"read_dram\":%.4g,\"read_l3\":%.4g,"
         "\"read_l2\":%.4g,\"rows_512\":%.4g,\"rows_4096\":%.4g}\n", rate(w.fma), rate(w.dot_i8), rate(w.lookup), rate(w.tile),
         rate(w.dram), rate(w.l3), rate(w.l2), rate(w.rows_512), rate(w.rows_4096));
  return 0;
}
