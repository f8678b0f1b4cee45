/* kern_nearest.c - the nearest row of a matrix: the choice between bytes and fp32, and the permission that AMX tiles need. */
#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "kern_int.h"

enum { LANES = 32, ALIGN = 64 };

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* ------------------------------------------------------------------ permission */

#if defined(__x86_64__)
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM; older headers lack the names */

/* What kern_amx.c was compiled with beyond kern_avx512.c, and that the system saves the state (bits 17 and 18 of XCR0). */
static int has_instructions(void) {
  unsigned a, b, c, d, low, high;
  if (!kern_variant("avx512")) return 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1); /* AMX-TILE, AMX-INT8 */
}

static pthread_once_t asked = PTHREAD_ONCE_INIT;
static int granted;

static void ask(void) {
  const char *cap = getenv("VECSHARD_SIMD");
  if (strcmp(kern_get()->name, "avx512") != 0 || (cap && strcmp(cap, "avx512") == 0) || !has_instructions()) return;
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) __atomic_store_n(&granted, 1, __ATOMIC_RELEASE);
}

int kern_amx_request(void) {
  pthread_once(&asked, ask);
  return kern_amx_ready();
}
int kern_amx_ready(void) { return __atomic_load_n(&granted, __ATOMIC_ACQUIRE); }
#else
int kern_amx_request(void) { return 0; }
int kern_amx_ready(void) { return 0; }
#endif

/* ------------------------------------------------------------------ matrices */

#if defined(__x86_64__)
static int use_bytes(void) { return strcmp(kern_get()->name, "avx512") == 0; }
#endif

size_t kern_nearest_bytes(size_t n_c, size_t dim) {
  size_t lanes = round_up(n_c, LANES), values = kern_packed_len(n_c, dim) * sizeof(float);
#if defined(__x86_64__)
  if (use_bytes()) values = lanes / LANES * kern_nearest512_block(dim);
#endif
  return 3 * lanes * sizeof(float) + values + ALIGN;
}

size_t kern_nearest_scratch(const kern_nearest *m) {
#if defined(__x86_64__)
  if (m->bytes) return kern_nearest512_chunk(m->dim) / LANES * kern_nearest512_block(m->dim) + ALIGN;
#endif
  return m->packed ? 1 : 0;
}

static void *aligned(void *p) { return (void *)(((uintptr_t)p + ALIGN - 1) / ALIGN * ALIGN); }

void kern_nearest_init(kern_nearest *m, const float *rows, size_t n_c, size_t dim, void *mem) {
  const kern *k = kern_get();
  size_t lanes = round_up(n_c, LANES);
  float longest2 = 0;
  *m = (kern_nearest){.n_c = n_c, .dim = dim, .rows = rows, .bias = aligned(mem)};
  for (size_t i = 0; i < lanes; i++) {
    float norm2 = i < n_c ? k->dot_f32(rows + i * dim, rows + i * dim, dim) : 2 * INFINITY;
    m->bias[i] = -0.5f * norm2;
    if (i < n_c && norm2 > longest2) longest2 = norm2;
  }
  m->longest = sqrtf(longest2), m->scale = m->bias + lanes, m->zero = (int32_t *)(m->scale + lanes);
#if defined(__x86_64__)
  if (use_bytes()) {
    m->amx = kern_amx_ready(), m->bytes = (int8_t *)(m->zero + lanes);
    kern_nearest512_pack(m);
    return;
  }
#endif
  m->packed = (float *)(m->zero + lanes);
  kern_pack_f32(rows, n_c, dim, m->packed);
}

void kern_nearest_find(const kern_nearest *m, const float *x, size_t n_x, size_t stride, int exact, uint32_t *id, void *scratch) {
#if defined(__x86_64__)
  if (m->bytes) {
    kern_nearest512_find(m, x, n_x, stride, exact, id, aligned(scratch));
    return;
  }
#endif
  (void)exact, (void)scratch;
  kern_get()->argmax_f32(x, n_x, stride, m->dim, m->packed, m->bias, m->n_c, id, NULL);
}

/* ------------------------------------------------------------------ matrices in groups */

#if defined(__x86_64__)
int kern_grouped_works(void) { return use_bytes(); }
size_t kern_grouped_bytes(size_t n_c, size_t n_groups, size_t dim) { return kern_grouped512_bytes(n_c, n_groups, dim) + ALIGN; }
size_t kern_grouped_scratch(const kern_grouped *m) { return kern_grouped512_scratch(m) + ALIGN; }

void kern_grouped_init(kern_grouped *m, const float *rows, size_t dim, const uint32_t *order, const uint32_t *start, const float *centres,
                       size_t n_groups, void *mem) {
  *m = (kern_grouped){.n_groups = n_groups, .dim = dim, .amx = kern_amx_ready(), .bytes = aligned(mem)};
  kern_grouped512_pack(m, rows, order, start, centres);
}

void kern_grouped_find(const kern_grouped *m, const float *x, size_t n_x, size_t stride, uint32_t *id, void *scratch) {
  kern_grouped512_find(m, x, n_x, stride, id, aligned(scratch));
}
#else
int kern_grouped_works(void) { return 0; } /* nobody calls the others then */
size_t kern_grouped_bytes(size_t n_c, size_t n_groups, size_t dim) { return (void)n_c, (void)n_groups, (void)dim, 0; }
size_t kern_grouped_scratch(const kern_grouped *m) { return (void)m, 0; }
void kern_grouped_init(kern_grouped *m, const float *rows, size_t dim, const uint32_t *order, const uint32_t *start, const float *centres,
                       size_t n_groups, void *mem) {
  (void)rows, (void)order, (void)start, (void)centres, (void)mem;
  *m = (kern_grouped){.n_groups = n_groups, .dim = dim};
}
void kern_grouped_find(const kern_grouped *m, const float *x, size_t n_x, size_t stride, uint32_t *id, void *scratch) {
  (void)m, (void)x, (void)stride, (void)scratch;
  memset(id, 0, n_x * sizeof *id);
}
#endif

/* ------------------------------------------------------------------ all products */

void kern_scores_i8(const int8_t *q, size_t n_q, size_t q_stride, size_t dim, const uint8_t *packed, size_t n_c, int32_t *out,
                    size_t out_stride) {
  size_t tiled = 0;
#if defined(__x86_64__)
  if (use_bytes() && kern_amx_ready() && dim % 64 == 0) {
    tiled = n_q / LANES * LANES;
    kern_tiles512_scores(q, tiled, q_stride, dim, packed, n_c, out, out_stride);
  }
#endif
  if (tiled < n_q)
    kern_get()->scores_i8(q + tiled * q_stride, n_q - tiled, q_stride, dim, packed, n_c, out + tiled * out_stride, out_stride);
}

/* ------------------------------------------------------------------ element-wise */

void kern_sum_rows_f32(const float *x, size_t stride, const uint32_t *row, size_t n, size_t dim, float *out) {
#if defined(__x86_64__)
  if (use_bytes()) {
    kern_sum_rows512(x, stride, row, n, dim, out);
    return;
  }
#endif
  memset(out, 0, dim * sizeof *out);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < dim; j++) out[j] += x[row[i] * stride + j];
}

void kern_scale_sub_f32(const float *x, float scale, const float *y, size_t n, float *out) {
#if defined(__x86_64__)
  if (use_bytes()) {
    kern_scale_sub512(x, scale, y, n, out);
    return;
  }
#endif
  for (size_t j = 0; j < n; j++) out[j] = x[j] * scale - y[j];
}
