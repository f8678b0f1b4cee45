/* test_kernels.c - proves that every variant of ext/kernels that this machine can run keeps the promises of kern.h:
 *   - float results lie within 1e-5 of the sum of absolute terms of a double-precision result, and NaN and
 *     Inf come through;
 *   - half floats, everything made from integers, scans, selections and finiteness tests equal the definition exactly;
 *   - a row's centroid and scores do not depend on the rows beside it, and ties go to the lowest number;
 *   - nothing is read or written outside the arrays, but what kern.h allows: they are allocated to the byte, so run it under
 *     ASan as well, or end at a page that may not be touched, which also catches the masked loads that ASan does not watch;
 *   - VECSHARD_SIMD caps the variant.
 * The scalar variant runs through the same checks. Prints its seed; TEST_SEED=<n> repeats a run.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "../ext/kernels/kern.h"

/* ------------------------------------------------------------------ tools */

static const char *const names[] = {"scalar", "avx2", "avx512", "neon", "dotprod"};
enum { N_NAMES = sizeof names / sizeof *names };

/* Steps through the variants that this machine has; start with *at = 0. */
static const kern *next_variant(int *at) {
  while (*at < N_NAMES) {
    const kern *k = kern_variant(names[(*at)++]);
    if (k) return k;
  }
  return NULL;
}

static uint64_t rng_state = 20240607;
static uint64_t rnd(void) {
  rng_state ^= rng_state << 13;
  rng_state ^= rng_state >> 7;
  rng_state ^= rng_state << 17;
  return rng_state * 0x2545f4914f6cdd1dull;
}
static float rnd_float(void) { return (float)(int32_t)(rnd() >> 40) * 0x1p-23f - 1.0f; } /* [-1, 1) */

/* Exactly n bytes, so that ASan sees the first one too many; never NULL. */
static void *exact(size_t n_bytes) {
  void *p = malloc(n_bytes ? n_bytes : 1);
  assert_non_null(p);
  return p;
}
static float *rnd_floats(size_t n) {
  float *a = exact(n * sizeof *a);
  for (size_t i = 0; i < n; i++) a[i] = rnd_float();
  return a;
}

/* n_bytes that end at a page that may not be touched. Every slot is one such place, used again by its next caller. */
enum { N_FENCES = 8, FENCE_BYTES = 4 << 20, FENCE_PAGE = 65536 };
static void *fenced(int slot, size_t n_bytes) {
  static uint8_t *end[N_FENCES];
  if (!end[slot]) {
    uint8_t *area = mmap(NULL, FENCE_BYTES + FENCE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(area != MAP_FAILED);
    end[slot] = area + FENCE_BYTES;
    assert_int_equal(mprotect(end[slot], FENCE_PAGE, PROT_NONE), 0);
  }
  assert_true(n_bytes <= FENCE_BYTES);
  return end[slot] - n_bytes;
}
static void *fill_bytes(void *p, size_t n) {
  uint8_t *to = p;
  for (size_t i = 0; i < n; i++) to[i] = (uint8_t)(rnd() >> 56);
  return p;
}
static float *fenced_floats(int slot, size_t n) {
  float *a = fenced(slot, n * sizeof *a);
  for (size_t i = 0; i < n; i++) a[i] = rnd_float();
  return a;
}

static const size_t long_lengths[] = {300, 384, 768, 960, 1024, 1536, 4096};
enum { N_SHORT = 130, N_LENGTHS = N_SHORT + sizeof long_lengths / sizeof *long_lengths };
static size_t length_at(size_t i) { return i < N_SHORT ? i : long_lengths[i - N_SHORT]; }

static void assert_close(float got, double want, double sum_abs, const kern *k, const char *what, size_t n) {
  double budget = 1e-5 * sum_abs + (double)(n + 1) * 0x1p-149; /* each term may underflow by one step */
  if (!(fabs((double)got - want) <= budget)) fail_msg("%s %s n=%zu: %.9g, not %.9g", k->name, what, n, got, want);
}
static uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
static float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

/* ------------------------------------------------------------------ sums over two arrays */

static void check_sums(const kern *k, const float *a, const float *b, size_t n) {
  double ab = 0, aa = 0, bb = 0, abs_ab = 0, l2 = 0;
  float c[3];
  for (size_t i = 0; i < n; i++) {
    double x = a[i], y = b[i];
    ab += x * y;
    abs_ab += fabs(x * y);
    aa += x * x;
    bb += y * y;
    l2 += (x - y) * (x - y);
  }
  assert_close(k->dot_f32(a, b, n), ab, abs_ab, k, "dot", n);
  assert_close(k->l2sq_f32(a, b, n), l2, l2, k, "l2sq", n);
  k->cosine_f32(a, b, n, c);
  /* nothing may be read there, and the bits are the same */
  const float *next = fenced(0, 0);
  float ahead[3];
  k->cosine_ahead_f32(a, b, n, next, ahead);
  for (int i = 0; i < 3; i++) assert_int_equal(float_bits(ahead[i]), float_bits(c[i]));
  assert_int_equal(float_bits(k->dot_ahead_f32(a, b, n, next)), float_bits(k->dot_f32(a, b, n)));
  assert_int_equal(float_bits(k->l2sq_ahead_f32(a, b, n, next)), float_bits(k->l2sq_f32(a, b, n)));
  assert_close(c[0], ab, abs_ab, k, "cosine a.b", n);
  assert_close(c[1], aa, aa, k, "cosine a.a", n);
  assert_close(c[2], bb, bb, k, "cosine b.b", n);
}

/* dot, l2sq and cosine at every tail length, at starts that are aligned to nothing but a float, and on zeros. */
static void sums_match_double(void **state) {
  (void)state;
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t i = 0; i < N_LENGTHS; i++)
      for (size_t skip = 0; skip < 4; skip++) {
        size_t n = length_at(i);
        float *a = rnd_floats(n + skip), *b = rnd_floats(n + 3 - skip);
        check_sums(k, a + skip, b + 3 - skip, n);
        memset(a, 0, (n + skip) * sizeof *a);
        check_sums(k, a + skip, b + 3 - skip, n);
        free(a);
        free(b);
      }
}

/* One odd value at every position of a short and of a long array comes through as IEEE arithmetic says. */
static void sums_propagate_specials(void **state) {
  (void)state;
  static const size_t lengths[] = {1, 7, 16, 33, 67, 129, 300};
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
      for (size_t at = 0; at < lengths[l]; at++) {
        size_t n = lengths[l];
        float *a = rnd_floats(n), *b = rnd_floats(n), c[3];
        b[at] = 1;
        a[at] = NAN;
        assert_true(isnan(k->dot_f32(a, b, n)) && isnan(k->dot_f32(b, a, n)) && isnan(k->l2sq_f32(a, b, n)));
        k->cosine_f32(a, b, n, c);
        assert_true(isnan(c[0]) && isnan(c[1]) && !isnan(c[2]));
        a[at] = -INFINITY;
        assert_true(k->dot_f32(a, b, n) == -INFINITY && k->l2sq_f32(a, b, n) == INFINITY);
        k->cosine_f32(a, b, n, c);
        assert_true(c[0] == -INFINITY && c[1] == INFINITY && isfinite(c[2]));
        b[at] = -INFINITY;
        assert_true(k->dot_f32(a, b, n) == INFINITY && isnan(k->l2sq_f32(a, b, n)));
        b[at] = 0;
        assert_true(isnan(k->dot_f32(a, b, n)));
        a[at] = 3e38f; /* overflows to Inf, not to NaN or a trap */
        b[at] = -3e38f;
        assert_true(k->dot_f32(a, b, n) == -INFINITY && k->l2sq_f32(a, b, n) == INFINITY);
        a[at] = b[at] = 1e-45f; /* subnormals vanish quietly */
        check_sums(k, a, b, n);
        free(a);
        free(b);
      }
}

/* ------------------------------------------------------------------ element-wise */

/* Half to float: value and bits of all 65,536, against the formula and between variants. */
static void f16_to_f32_all_values(void **state) {
  (void)state;
  enum { N = 65536 };
  uint16_t *in = exact(N * sizeof *in);
  float *want = exact(N * sizeof *want), *got = exact(N * sizeof *got);
  const kern *k;
  for (int i = 0; i < N; i++) in[i] = (uint16_t)i;
  kern_variant("scalar")->f16_to_f32(in, want, N);
  for (int i = 0; i < N; i++) {
    int exponent = i >> 10 & 31, mantissa = i & 1023;
    double value = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    if (i >> 15) value = -value;
    assert_true(isnan(value) ? isnan(want[i]) : want[i] == value);
    assert_int_equal(float_bits(want[i]) >> 31, i >> 15);
  }
  for (int v = 0; (k = next_variant(&v));) {
    memset(got, 0xee, N * sizeof *got);
    k->f16_to_f32(in, got, N);
    assert_memory_equal(got, want, N * sizeof *got);
  }
  free(in);
  free(want);
  free(got);
}

/* Float to half: every half comes back; midpoints between neighbours go to even and a hair off them to the nearer one;
 * random bit patterns agree between variants. */
static void f32_to_f16_rounds_to_even(void **state) {
  (void)state;
  enum { N_RANDOM = 200000 };
  const kern *k, *scalar = kern_variant("scalar");
  for (int v = 0; (k = next_variant(&v));)
    for (unsigned h = 0; h < 0x7c00; h++) { /* finite halves and their upper neighbours; 0x7c00 is Inf */
      uint16_t two[2] = {(uint16_t)h, (uint16_t)(h + 1)}, got[7];
      float value[2], mid;
      k->f16_to_f32(two, value, 2);
      mid = h + 1 == 0x7c00 ? 65520.0f : (value[0] + value[1]) / 2;
      float in[7] = {value[0], -value[0], mid, nextafterf(mid, 0), nextafterf(mid, 1e9f), -mid, value[1]};
      k->f32_to_f16(in, got, 7);
      uint16_t even = (uint16_t)(h + (h & 1));
      const uint16_t want[7] = {two[0], two[0] | 0x8000, even, two[0], two[1], even | 0x8000, two[1]};
      assert_memory_equal(got, want, sizeof got);
    }
  float *in = exact(N_RANDOM * sizeof *in);
  uint16_t *want = exact(N_RANDOM * sizeof *want), *got = exact(N_RANDOM * sizeof *got);
  for (size_t i = 0; i < N_RANDOM; i++) in[i] = bits_float((uint32_t)(rnd() >> 32));
  for (size_t i = 0; i < 1000; i++)
    in[i] = bits_float(0x7f800000 + (uint32_t)(i % 500) * 8191 + (uint32_t)(i & 1)); /* NaNs */
  scalar->f32_to_f16(in, want, N_RANDOM);
  for (int v = 0; (k = next_variant(&v));) {
    k->f32_to_f16(in, got, N_RANDOM);
    assert_memory_equal(got, want, N_RANDOM * sizeof *got);
  }
  free(in);
  free(want);
  free(got);
}

/* Both conversions at every tail length and odd starts; the element behind the output is not touched (ASan). */
static void f16_lengths(void **state) {
  (void)state;
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t i = 0; i < N_LENGTHS; i++) {
      size_t n = length_at(i), skip = i % 3;
      float *full = rnd_floats(n + skip), *back = exact((n + skip) * sizeof *back);
      uint16_t *half = exact((n + skip) * sizeof *half), *want = exact((n + skip) * sizeof *want);
      k->f32_to_f16(full + skip, half + skip, n);
      kern_variant("scalar")->f32_to_f16(full + skip, want + skip, n);
      assert_memory_equal(half + skip, want + skip, n * sizeof *half);
      k->f16_to_f32(half + skip, back + skip, n);
      for (size_t e = skip; e < n + skip; e++) assert_true(fabsf(back[e] - full[e]) <= 0x1p-12f);
      free(full);
      free(back);
      free(half);
      free(want);
    }
}

/* dot and l2sq with halves on the right, at every tail length, starts aligned to nothing, and with odd values in it. */
static void f16_sums_match_double(void **state) {
  (void)state;
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t i = 0; i < N_LENGTHS; i++) {
      size_t n = length_at(i);
      float *a = fenced_floats(0, n), *b = rnd_floats(n), *value = exact(n * sizeof *value);
      uint16_t *half = fenced(1, n * sizeof *half);
      double ab = 0, abs_ab = 0, l2 = 0;
      kern_variant("scalar")->f32_to_f16(b, half, n);
      kern_variant("scalar")->f16_to_f32(half, value, n);
      for (size_t e = 0; e < n; e++) {
        double x = a[e], y = value[e];
        ab += x * y, abs_ab += fabs(x * y), l2 += (x - y) * (x - y);
      }
      assert_close(k->dot_f16(a, half, n), ab, abs_ab, k, "dot_f16", n);
      assert_close(k->l2sq_f16(a, half, n), l2, l2, k, "l2sq_f16", n);
      for (size_t e = 0; e < n; e += n < N_SHORT ? 1 : 31) {
        uint16_t was = half[e];
        half[e] = 0x7e00; /* NaN */
        assert_true(isnan(k->dot_f16(a, half, n)) && isnan(k->l2sq_f16(a, half, n)));
        half[e] = 0xfc00; /* -Inf */
        a[e] = 0.5f;
        assert_true(k->dot_f16(a, half, n) == -INFINITY && k->l2sq_f16(a, half, n) == INFINITY);
        half[e] = was;
      }
      free(b);
      free(value);
    }
}

/* A NaN (quiet or signalling) or an infinity is found at every position, and the largest finite values are none. */
static void all_finite_finds_each(void **state) {
  (void)state;
  static const uint32_t bad[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001, 0xffffffff};
  static const uint32_t good[] = {0, 0x80000000, 1, 0x7f7fffff, 0xff7fffff, 0x00800000};
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t i = 0; i < N_LENGTHS; i++) {
      size_t n = length_at(i), step = n < N_SHORT ? 1 : 17;
      uint32_t *a = exact((n + 1) * sizeof *a);
      float *f = exact(n * sizeof *f);
      for (size_t e = 0; e < n; e++) a[e] = good[rnd() % 6];
      memcpy(f, a, n * sizeof *f);
      assert_int_equal(k->all_finite_f32(f, n), 1);
      for (size_t e = 0; e < n; e += step) {
        memcpy(f + e, &bad[rnd() % 5], sizeof *f);
        assert_int_equal(k->all_finite_f32(f, n), 0);
        memcpy(f + e, a + e, sizeof *f);
      }
      free(a);
      free(f);
    }
}

/* ------------------------------------------------------------------ packed matrices */

typedef struct {
  size_t n_c, dim, n_padded;
  float *rows, *packed, *bias; /* bias of the padding is chosen to win if anybody looked at it */
} matrix;

static matrix make_matrix(size_t n_c, size_t dim) {
  matrix m = {.n_c = n_c, .dim = dim, .n_padded = (n_c + 15) / 16 * 16};
  m.rows = rnd_floats(n_c * dim);
  m.packed = exact(kern_packed_len(n_c, dim) * sizeof(float));
  m.bias = rnd_floats(m.n_padded);
  for (size_t c = n_c; c < m.n_padded; c++) m.bias[c] = c % 2 ? INFINITY : 1e30f;
  kern_pack_f32(m.rows, n_c, dim, m.packed);
  return m;
}
static void free_matrix(matrix *m) {
  free(m->rows);
  free(m->packed);
  free(m->bias);
}
static double exact_score(const matrix *m, const float *x, size_t c, double *sum_abs) {
  double s = m->bias[c];
  *sum_abs = fabs(s);
  for (size_t j = 0; j < m->dim; j++) {
    double term = (double)x[j] * m->rows[c * m->dim + j];
    s += term;
    *sum_abs += fabs(term);
  }
  return s;
}

/* Packing puts (c, j) where kern.h says, zeros elsewhere, and fills exactly kern_packed_len. */
static void pack_layout(void **state) {
  (void)state;
  for (size_t n_c = 0; n_c <= 50; n_c += 1 + n_c % 4)
    for (size_t dim = 0; dim <= 9; dim++) {
      matrix m = make_matrix(n_c, dim);
      assert_int_equal(kern_packed_len(n_c, dim), m.n_padded * dim);
      for (size_t c = 0; c < m.n_padded; c++)
        for (size_t j = 0; j < dim; j++)
          assert_true(m.packed[((c / 16) * dim + j) * 16 + c % 16] == (c < n_c ? m.rows[c * dim + j] : 0));
      free_matrix(&m);
    }
}

/* Scores of all centroids within the error budget. */
static void scores_match_double(void **state) {
  (void)state;
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t n_c = 0; n_c <= 200; n_c += 1 + n_c / 3)
      for (size_t i = 0; i < N_LENGTHS; i += i < 40 ? 1 : 13) {
        matrix m = make_matrix(n_c, length_at(i));
        float *x = rnd_floats(m.dim), *out = exact(m.n_padded * sizeof *out);
        k->scores_f32(x, m.dim, m.packed, m.bias, n_c, out);
        for (size_t c = 0; c < n_c; c++) {
          double sum_abs, want = exact_score(&m, x, c, &sum_abs);
          assert_close(out[c], want, sum_abs, k, "scores", m.dim);
        }
        free(x);
        free(out);
        free_matrix(&m);
      }
}

/* Many rows at once: row by row the bits of scores_f32, nothing beside them. */
static void scores_many_equal_scores(void **state) {
  (void)state;
  static const size_t n_cs[] = {0, 1, 16, 17, 63, 64, 65, 130};
  static const size_t dims[] = {0, 1, 2, 7, 16, 33, 129, 300};
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t c = 0; c < sizeof n_cs / sizeof *n_cs; c++)
      for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        matrix m = make_matrix(n_cs[c], dims[d]);
        float *one = exact(m.n_padded * sizeof *one);
        for (size_t n_x = 0; n_x <= 13; n_x++) {
          size_t stride = m.dim + n_x % 3, out_stride = m.n_padded + n_x % 2;
          float *x = fenced_floats(0, n_x ? (n_x - 1) * stride + m.dim : 0);
          float *out = fenced_floats(1, n_x ? (n_x - 1) * out_stride + m.n_padded : 0), beside = 0;
          if (n_x > 1 && out_stride > m.n_padded) beside = out[m.n_padded];
          k->scores_many_f32(x, n_x, stride, m.dim, m.packed, m.bias, m.n_c, out, out_stride);
          for (size_t r = 0; r < n_x; r++) {
            k->scores_f32(x + r * stride, m.dim, m.packed, m.bias, m.n_c, one);
            assert_memory_equal(one, out + r * out_stride, m.n_c * sizeof *one);
          }
          if (n_x > 1 && out_stride > m.n_padded) assert_true(out[m.n_padded] == beside);
        }
        free(one);
        free_matrix(&m);
      }
  for (int v = 0; (k = next_variant(&v));) { /* more rows than a chunk of any variant, twice */
    matrix m = make_matrix(70, 24);
    enum { N_X = 431 };
    float *x = rnd_floats(N_X * m.dim), *out = exact(N_X * m.n_padded * sizeof *out), one[80];
    k->scores_many_f32(x, N_X, m.dim, m.dim, m.packed, m.bias, m.n_c, out, m.n_padded);
    for (size_t r = 0; r < N_X; r++) {
      k->scores_f32(x + r * m.dim, m.dim, m.packed, m.bias, m.n_c, one);
      assert_memory_equal(one, out + r * m.n_padded, m.n_c * sizeof *one);
    }
    free(x);
    free(out);
    free_matrix(&m);
  }
}

/* The winner's score is the largest there is (within the budget), and each row gets the same bits alone, in another
 * company, and among all. */
static void check_argmax(const kern *k, const matrix *m, size_t n_x, size_t stride) {
  size_t n_floats = n_x ? (n_x - 1) * stride + m->dim : 0;
  float *x = rnd_floats(n_floats), *best = exact(n_x * sizeof *best), one_best;
  float *scores = exact(m->n_padded * sizeof *scores);
  uint32_t *id = exact(n_x * sizeof *id), one_id;
  k->argmax_f32(x, n_x, stride, m->dim, m->packed, m->bias, m->n_c, id, best);
  for (size_t r = 0; r < n_x; r++) {
    assert_true(id[r] < m->n_c);
    double got_abs, top = -INFINITY, top_abs = 0, got = exact_score(m, x + r * stride, id[r], &got_abs);
    for (size_t c = 0; c < m->n_c; c++) {
      double sum_abs, s = exact_score(m, x + r * stride, c, &sum_abs);
      if (s > top) {
        top = s;
        top_abs = sum_abs;
      }
    }
    if (got < top - 1e-5 * (got_abs + top_abs))
      fail_msg("%s: row %zu got centroid %u, score %g of %g", k->name, r, id[r], got, top);
    assert_close(best[r], got, got_abs, k, "argmax", m->dim);
    k->argmax_f32(x + r * stride, 1, stride, m->dim, m->packed, m->bias, m->n_c, &one_id, &one_best);
    assert_int_equal(one_id, id[r]);
    assert_int_equal(float_bits(one_best), float_bits(best[r]));
    k->scores_f32(x + r * stride, m->dim, m->packed, m->bias, m->n_c, scores); /* the same chain of additions */
    assert_int_equal(float_bits(scores[id[r]]), float_bits(best[r]));
  }
  for (size_t from = 0; from < n_x; from += 1 + from) { /* other neighbours, other places in a tile; no scores wanted */
    uint32_t *part = exact((n_x - from) * sizeof *part);
    k->argmax_f32(x + from * stride, n_x - from, stride, m->dim, m->packed, m->bias, m->n_c, part, NULL);
    assert_memory_equal(part, id + from, (n_x - from) * sizeof *part);
    free(part);
  }
  free(x);
  free(best);
  free(scores);
  free(id);
}

static void argmax_finds_best(void **state) {
  (void)state;
  static const size_t n_cs[] = {1, 2, 15, 16, 17, 33, 63, 64, 65, 100, 113, 128, 256};
  static const size_t dims[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 96, 129};
  static const size_t n_xs[] = {0, 1, 2, 3, 5, 6, 7, 8, 13, 20};
  const kern *k;
  for (int v = 0; (k = next_variant(&v));) {
    for (size_t c = 0; c < sizeof n_cs / sizeof *n_cs; c++)
      for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
        matrix m = make_matrix(n_cs[c], dims[d]);
        for (size_t r = 0; r < sizeof n_xs / sizeof *n_xs; r++)
          check_argmax(k, &m, n_xs[r], m.dim + (r % 3 ? 5 * (r % 3) : 0));
        free_matrix(&m);
      }
    matrix wide = make_matrix(70, 960), deep = make_matrix(200, 24);
    check_argmax(k, &wide, 14, 960);
    check_argmax(k, &deep, 431, 24); /* more rows than a chunk of any variant, twice */
    free_matrix(&wide);
    free_matrix(&deep);
  }
}

/* Equal centroids anywhere in the matrix score equal bits: the first copy wins. -0 and +0 tie as well. */
static void argmax_ties_go_low(void **state) {
  (void)state;
  const kern *k;
  for (int v = 0; (k = next_variant(&v));)
    for (size_t n_c = 2; n_c <= 150; n_c += 1 + n_c / 5) {
      matrix m = make_matrix(n_c, 19);
      size_t first = rnd() % n_c;
      float *x = rnd_floats(7 * m.dim);
      uint32_t id[7];
      for (size_t c = 0; c < n_c; c++) { /* all alike from `first` on, hopeless before it */
        memcpy(m.rows + c * m.dim, m.rows, m.dim * sizeof *m.rows);
        m.bias[c] = c < first ? -1000 : 0.25f;
      }
      kern_pack_f32(m.rows, n_c, m.dim, m.packed);
      k->argmax_f32(x, 7, m.dim, m.dim, m.packed, m.bias, n_c, id, NULL);
      for (int r = 0; r < 7; r++) assert_int_equal(id[r], first);
      for (size_t c = 0; c < n_c; c++) m.bias[c] = c % 2 ? 0.0f : -0.0f;
      memset(x, 0, 7 * m.dim * sizeof *x);
      k->argmax_f32(x, 7, m.dim, m.dim, m.packed, m.bias, n_c, id, NULL);
      for (int r = 0; r < 7; r++) assert_int_equal(id[r], 0);
      free(x);
      free_matrix(&m);
    }
}

/* NaN scores never win, NaN rows still get a valid number and do not disturb their neighbours, and no centroid at all
 * is answered with 0. */
static void argmax_survives_specials(void **state) {
  (void)state;
  enum { N_X = 9, DIM = 5, N_C = 70 };
  const kern *k;
  for (int v = 0; (k = next_variant(&v));) {
    matrix m = make_matrix(N_C, DIM);
    float *x = rnd_floats(N_X * DIM), best[N_X], clean_best[N_X];
    uint32_t id[N_X], clean[N_X];
    m.bias[3] = NAN;
    k->argmax_f32(x, N_X, DIM, DIM, m.packed, m.bias, N_C, clean, clean_best);
    for (int r = 0; r < N_X; r++) assert_true(clean[r] < N_C && clean[r] != 3 && !isnan(clean_best[r]));
    x[4 * DIM + 2] = NAN;
    k->argmax_f32(x, N_X, DIM, DIM, m.packed, m.bias, N_C, id, best);
    for (int r = 0; r < N_X; r++) {
      assert_int_equal(id[r], r == 4 ? 0 : clean[r]);
      assert_true(best[r] == (r == 4 ? -INFINITY : clean_best[r]));
    }
    m.bias[66] = INFINITY;
    k->argmax_f32(x, 4, DIM, DIM, m.packed, m.bias, N_C, id, best);
    for (int r = 0; r < 4; r++) assert_true(id[r] == 66 && best[r] == INFINITY);
    k->argmax_f32(x, N_X, DIM, DIM, m.packed, m.bias, 0, id, best);
    for (int r = 0; r < N_X; r++) assert_true(id[r] == 0 && best[r] == -INFINITY);
    free(x);
    free_matrix(&m);
  }
}

/* ------------------------------------------------------------------ bytes */

/* Every kind of vector that is quantized: plain, all ties between two bytes, huge, tiny, too small, and nothing at all. */
static void quantize_equals_definition(void **state) {
  (void)state;
  const kern *k, *scalar = kern_variant("scalar");
  for (int v = 0; (k = next_variant(&v));)
    for (size_t i = 0; i < N_LENGTHS; i++) {
      size_t n = length_at(i);
      float *x = fenced_floats(0, n);
      int8_t *got = fenced(1, n), *want = exact(n);
      for (int kind = 0; kind < 7; kind++) {
        for (size_t e = 0; e < n; e++) switch (kind) {
          case 0: x[e] = rnd_float(); break;
          case 1: x[e] = ((float)(rnd() % 255) - 127) / 2; break; /* 63.5 and thereby 127 / m = 2: every second is a tie */
          case 2: x[e] = rnd_float() * 3e38f; break;
          case 3: x[e] = rnd_float() * 1e-29f; break;
          case 4: x[e] = rnd_float() * 9.9e-31f; break; /* too small: zeros */
          case 5: x[e] = bits_float((uint32_t)(rnd() & 0x80000fffu)); break;
          default: x[e] = -0.0f; break;
          }
        if (kind == 1 && n) x[rnd() % n] = 63.5f;
        memset(got, 99, n);
        float step = scalar->quantize_i8(x, n, want), again = k->quantize_i8(x, n, got), m = 0;
        assert_int_equal(float_bits(step), float_bits(again));
        assert_memory_equal(got, want, n);
        for (size_t e = 0; e < n; e++) m = fabsf(x[e]) > m ? fabsf(x[e]) : m;
        int is_zero = m < 1e-30f;
        assert_true(step == (is_zero ? 0 : m / 127));
        for (size_t e = 0; e < n; e++) {
          double off = fabs(want[e] * (double)step - x[e]);
          assert_true(is_zero ? want[e] == 0 : want[e] >= -127 && off <= (0.5 + 1e-4) * m / 127);
        }
      }
      free(want);
    }
}

/* Random bytes; with `extreme` all of them the largest or the smallest, so that every product is. */
static void fill_extreme(int8_t *a, size_t n, int extreme) {
  for (size_t i = 0; i < n; i++) a[i] = extreme == 0 ? (int8_t)(rnd() >> 56) : extreme == 1 ? -128 : extreme == 2 ? 127 : -127;
}

static void check_scores_i8(size_t n_q, size_t n_c, size_t dim, int extreme) {
  size_t n_padded = (n_c + 15) / 16 * 16, q_stride = dim + n_q % 3, out_stride = n_padded + n_q % 2;
  int8_t *c = exact(n_c * dim), *q = fenced(0, n_q ? (n_q - 1) * q_stride + dim : 0);
  uint8_t *packed = fenced(1, n_padded * dim);
  size_t n_out = n_q ? (n_q - 1) * out_stride + n_padded : 0;
  int32_t *out = fenced(2, n_out * sizeof *out);
  const kern *k;
  fill_extreme(q, n_q ? (n_q - 1) * q_stride + dim : 0, extreme);
  fill_extreme(c, n_c * dim, extreme ? 1 + (extreme + (int)(n_c & 1)) % 3 : 0);
  kern_pack_i8(c, n_c, dim, packed);
  for (int v = 0; (k = next_variant(&v));) {
    for (size_t i = 0; i < n_out; i++) out[i] = 12345;
    k->scores_i8(q, n_q, q_stride, dim, packed, n_c, out, out_stride);
    for (size_t r = 0; r < n_q; r++)
      for (size_t i = 0; i < out_stride; i++) {
        if (i >= n_padded && r + 1 == n_q) break;
        int64_t want = i >= n_padded ? 12345 : 0;
        for (size_t j = 0; i < n_c && j < dim; j++) want += q[r * q_stride + j] * c[i * dim + j];
        int32_t got = out[r * out_stride + i];
        if (got != want)
          fail_msg("%s scores_i8 dim=%zu query %zu row %zu: %d, not %lld", k->name, dim, r, i, got, (long long)want);
      }
  }
  free(c);
}

/* All shapes around the tiles of every variant; then the longest sums of the largest products. */
static void scores_i8_exact(void **state) {
  (void)state;
  static const size_t n_cs[] = {0, 1, 15, 16, 17, 48, 64, 65, 100, 130};
  static const size_t dims[] = {0, 4, 8, 12, 16, 20, 60, 64, 68, 128, 132, 960, 1024, 1028};
  for (size_t c = 0; c < sizeof n_cs / sizeof *n_cs; c++)
    for (size_t d = 0; d < sizeof dims / sizeof *dims; d++)
      for (size_t n_q = 0; n_q <= 9; n_q += dims[d] > 200 ? 3 : 1) check_scores_i8(n_q, n_cs[c], dims[d], 0);
  check_scores_i8(70, 33, 64, 0); /* more queries than a chunk of any variant */
  check_scores_i8(5, 300, 256, 0); /* and more of the matrix than a stretch */
  for (int extreme = 0; extreme < 4; extreme++)
    for (size_t n_c = 17; n_c <= 18; n_c++) {
      check_scores_i8(5, n_c, 2052, extreme);
      check_scores_i8(1, n_c, 65536, extreme);
    }
}

/* Bytes at every length, starts aligned to nothing, all combinations of extremes. */
static void dot_i8_exact(void **state) {
  (void)state;
  const kern *k;
  for (size_t i = 0; i <= N_LENGTHS; i++) {
    size_t n = i < N_LENGTHS ? length_at(i) : 65536;
    int8_t *q = fenced(0, n);
    uint8_t *row = fenced(1, n);
    for (int kind = 0; kind < 17; kind++) {
      int64_t want = 0;
      fill_extreme(q, n, kind % 4);
      fill_extreme((int8_t *)row, n, kind / 4 % 4);
      if (kind == 16) memset(row, 0, n), memset(q, -128, n);
      for (size_t j = 0; j < n; j++) want += q[j] * ((int)row[j] - 128);
      for (int v = 0; (k = next_variant(&v));)
        if (k->dot_i8(q, row, n) != want)
          fail_msg("%s dot_i8 n=%zu: %d, not %lld", k->name, n, k->dot_i8(q, row, n), (long long)want);
    }
  }
}

/* Values that end up as keys: mostly plain, some odd, some equal. */
static float odd_float(void) {
  static const float odd[] = {0, -0.0f, INFINITY, -INFINITY, NAN, 1e-45f, -3e38f, 1};
  return rnd() % 8 ? rnd_float() * 100 : odd[rnd() % 8];
}

/* Keys from integer scores: every limit among them, just below one, and those that mean none and all; only what the header
 * gives is written. */
static void keys_i8_equal_definition(void **state) {
  (void)state;
  const kern *k, *scalar = kern_variant("scalar");
  for (size_t i = 0; i < N_LENGTHS; i++) {
    size_t n = length_at(i), n_padded = (n + 15) / 16 * 16;
    int32_t *score = fill_bytes(fenced(0, n * sizeof *score), n * sizeof *score);
    float *scale = fenced_floats(1, n), *norm2 = fenced_floats(2, n);
    uint64_t *got = fenced(3, n_padded * sizeof *got), *want = exact(n_padded * sizeof *want);
    int is_odd = i % 2 == 1;
    for (size_t e = 0; e < n; e++) {
      if (e % 3) score[e] %= 1000;
      if (is_odd) norm2[e] = odd_float(), scale[e] = odd_float();
    }
    for (int t = 0; t < 8; t++) {
      float mul = t == 7 ? INFINITY : rnd_float(), base = t == 6 ? NAN : rnd_float() * 10;
      uint32_t first = t == 5 ? UINT32_MAX - 20 : (uint32_t)(rnd() % 1000); /* numbers may wrap */
      size_t at = n ? rnd() % n : 0;
      float one = n ? (norm2[at] + base) + (mul * scale[at]) * (float)score[at] : 0;
      uint64_t one_key = kern_key(one, first + (uint32_t)at);
      uint64_t limits[] = {0, UINT64_MAX, one_key, one_key - 1, kern_key(INFINITY, UINT32_MAX), kern_key(INFINITY, 0) - 1,
                           (uint64_t)0xff900000 << 32, (uint64_t)0xffffffff << 32, kern_key(-INFINITY, 5), kern_key(0, 7)};
      for (size_t l = 0; l < sizeof limits / sizeof *limits; l++) {
        size_t n_want = scalar->keys_i8(score, scale, norm2, n, mul, base, first, limits[l], want), n_all = 0;
        for (size_t e = 0; e < n; e++) {
          float d = (norm2[e] + base) + (mul * scale[e]) * (float)score[e];
          n_all += kern_key(d, first + (uint32_t)e) <= limits[l];
        }
        assert_int_equal(n_want, n_all);
        for (int v = 0; (k = next_variant(&v));) {
          memset(got, 0xee, n_padded * sizeof *got);
          assert_int_equal(k->keys_i8(score, scale, norm2, n, mul, base, first, limits[l], got), n_want);
          assert_memory_equal(got, want, n_want * sizeof *got);
        }
      }
    }
    free(want);
  }
}

/* The least distance of each slot, and so a bound for what a ranking looks for; only the slots are written. */
static void least_i8_equal_definition(void **state) {
  (void)state;
  static const size_t slots[] = {16, 32, 128, 1024};
  const kern *k;
  for (size_t i = 0; i < N_LENGTHS; i++) {
    size_t n = length_at(i);
    int32_t *score = fill_bytes(fenced(0, n * sizeof *score), n * sizeof *score);
    float *scale = fenced_floats(1, n), *norm2 = fenced_floats(2, n);
    for (size_t e = 0; e < n; e++) {
      if (e % 3) score[e] %= 1000;
      if (i % 2) norm2[e] = odd_float(), scale[e] = odd_float();
    }
    for (size_t t = 0; t < 4 * sizeof slots / sizeof *slots; t++) {
      size_t n_least = slots[t % 4], at = rnd() % 64 * 16;
      float mul = rnd_float(), base = t == 6 ? NAN : rnd_float() * 10, *got = fenced(3, n_least * sizeof *got), want[1024];
      for (size_t e = 0; e < n_least; e++) want[e] = e % 7 ? INFINITY : rnd_float() * 100;
      for (int v = 0; (k = next_variant(&v));) {
        memcpy(got, want, n_least * sizeof *got);
        k->least_i8(score, scale, norm2, n, mul, base, got, n_least, at);
        for (size_t e = 0; e < n_least; e++) {
          float least = want[e];
          for (size_t l = (e + n_least - at % n_least) % n_least; l < n; l += n_least) {
            float d = (norm2[l] + base) + (mul * scale[l]) * (float)score[l];
            if (d < least) least = d;
          }
          assert_true(got[e] == least);
        }
      }
    }
  }
}

static void keys_u16_equal_definition(void **state) {
  (void)state;
  const kern *k;
  for (size_t i = 0; i < N_LENGTHS; i++) {
    size_t n = length_at(i), n_padded = (n + 15) / 16 * 16;
    uint16_t *sum = fill_bytes(fenced(0, n * sizeof *sum), n * sizeof *sum);
    uint32_t *row = fill_bytes(fenced(1, n * sizeof *row), n * sizeof *row);
    uint64_t *got = fenced(2, n_padded * sizeof *got);
    for (int t = 0; t < 6; t++) {
      float base = t < 3 ? rnd_float() * 10 : odd_float(), step = t < 3 ? rnd_float() : odd_float();
      for (int v = 0; (k = next_variant(&v));) {
        k->keys_u16(sum, row, n, base, step, 1000u * (unsigned)t, got);
        for (size_t e = 0; e < n; e++)
          assert_true(got[e] == kern_key(base + step * (float)sum[e], 1000u * (unsigned)t + row[e]));
      }
    }
  }
}

/* ------------------------------------------------------------------ PQ tables */

/* Both steps equal the definition to the bit, at all widths of a sub-quantizer, with factors of both signs, zero, and those
 * that a damaged file could hold. */
static void pq_tables_equal_definition(void **state) {
  (void)state;
  static const size_t sub_dims[] = {4, 8, 12, 16, 20, 24, 32, 64, 100, 2048};
  static const float odd_factors[] = {0, -0.0f, 1e-40f, 3e38f, INFINITY, NAN};
  const kern *k, *scalar = kern_variant("scalar");
  for (size_t d = 0; d < sizeof sub_dims / sizeof *sub_dims; d++)
    for (size_t m = 0; m <= (sub_dims[d] > 100 ? 2 : 9); m++)
      for (int odd = 0; odd < 2; odd++) {
        size_t sub_dim = sub_dims[d];
        int8_t *q = fenced(0, m * sub_dim), *word = exact(256 * sub_dim);
        uint8_t *words = fenced(1, m * 256 * sub_dim), *got8 = fenced(5, m * 256), *want8 = exact(m * 256);
        float *factor = fenced_floats(2, m), *raw = fenced(3, m * 256 * sizeof *raw), *low = fenced(4, m * sizeof *low);
        float *want_raw = exact(m * 256 * sizeof *raw), *want_low = exact(m * sizeof *low);
        fill_extreme(q, m * sub_dim, (int)(m % 4));
        for (size_t j = 0; j < m; j++) {
          fill_extreme(word, 256 * sub_dim, 0);
          if (m % 5 == 4) memset(word, (int)(rnd() % 256), 128 * sub_dim); /* many alike */
          kern_pack_i8(word, 256, sub_dim, words + j * 256 * sub_dim);
          if (odd) factor[j] = odd_factors[rnd() % 6];
        }
        float want = scalar->pq_table_raw(q, words, factor, m, sub_dim, want_raw, want_low);
        for (int v = 0; (k = next_variant(&v));) {
          memset(raw, 0xee, m * 256 * sizeof *raw);
          float got = k->pq_table_raw(q, words, factor, m, sub_dim, raw, low);
          assert_int_equal(float_bits(got), float_bits(want));
          for (size_t i = 0; i < m * 256; i++) /* one NaN is as good as another */
            assert_true(float_bits(raw[i]) == float_bits(want_raw[i]) || (isnan(raw[i]) && isnan(want_raw[i])));
          for (size_t j = 0; j < m; j++) assert_true(low[j] == want_low[j]); /* a zero of either sign, after a factor of zero */
          float invs[] = {want > 0 ? 255 / want : 0, want > 0 ? 700 / want : 1, 0, 1e-30f, 1e30f, INFINITY};
          for (size_t i = 0; i < sizeof invs / sizeof *invs; i++) {
            scalar->pq_table(want_raw, want_low, m, invs[i], want8);
            memset(got8, 0xee, m * 256);
            k->pq_table(raw, low, m, invs[i], got8);
            assert_memory_equal(got8, want8, m * 256);
          }
        }
        free(word);
        free(want8);
        free(want_raw);
        free(want_low);
      }
}

/* Halves go to the even byte, 255 is the ceiling, and what is a hair below 255 still rounds to it. */
static void pq_table_rounds(void **state) {
  (void)state;
  const kern *k;
  float raw[256], low = -3;
  uint8_t got[256];
  for (int i = 0; i < 256; i++) raw[i] = low + (float)i + (i % 2 ? 0.5f : 0);
  raw[7] = 1e30f, raw[8] = low + 254.99998f, raw[9] = low + 255, raw[10] = INFINITY;
  for (int v = 0; (k = next_variant(&v));) {
    k->pq_table(raw, &low, 1, 1, got);
    for (int i = 0; i < 256; i++)
      assert_int_equal(got[i], i >= 7 && i <= 10 ? 255 : i % 2 == 0 ? i : i == 255 ? 255 : (i + 1) / 2 * 2);
  }
}

/* Which are not below a limit: NaN, the limit itself and equal zeros are not; what is a NaN for a limit leaves all. */
static void not_below_f32_equal_definition(void **state) {
  (void)state;
  const kern *k;
  for (size_t i = 0; i < N_LENGTHS; i++) {
    size_t n = length_at(i), n_padded = (n + 15) / 16 * 16;
    float *a = fenced_floats(0, n);
    uint32_t *got = fenced(1, n_padded * sizeof *got);
    for (size_t e = 0; e < n; e++)
      if (i % 2) a[e] = odd_float();
    float limits[] = {-INFINITY, INFINITY, 0, -0.0f, NAN, n ? a[n / 2] : 1, 50, 1e30f};
    for (size_t l = 0; l < sizeof limits / sizeof *limits; l++)
      for (int v = 0; (k = next_variant(&v));) {
        memset(got, 0xee, n_padded * sizeof *got);
        size_t n_got = k->not_below_f32(a, n, limits[l], got), at = 0;
        for (size_t e = 0; e < n; e++)
          if (!(a[e] < limits[l])) assert_true(at < n_got && got[at] == e), at++;
        assert_int_equal(at, n_got);
      }
  }
}

/* One function, whatever instructions it is made of; the known answers are those of xxHash 0.8.1. */
static void xxh3_known_answers(void **state) {
  (void)state;
  const kern *k, *scalar = kern_variant("scalar");
  uint8_t *p = fill_bytes(exact(70000), 70000), counting[520];
  for (int i = 0; i < 520; i++) counting[i] = (uint8_t)i;
  for (int v = 0; (k = next_variant(&v));) {
    assert_true(k->xxh3("", 0) == 0x2d06800538d394c2u);
    assert_true(k->xxh3(counting, 520) == 0xf0f856dea557b119u);
    for (size_t n = 0; n < 70000; n += n < 600 ? 1 : 997) {
      uint8_t *at = fenced(0, n);
      memcpy(at, p, n);
      assert_true(k->xxh3(at, n) == scalar->xxh3(p, n));
    }
  }
  free(p);
}

/* ------------------------------------------------------------------ PQ scan */

typedef struct {
  size_t m, n_rows, n_padded;
  uint8_t *codes, *table; /* end where nothing more may be read, so they start anywhere */
  uint16_t *terms;
  uint32_t *sum; /* of a row's entries, without its term */
} partition;
enum { SCAN_SLACK = 64 };

static void sum_entries(partition *p) {
  for (size_t r = 0; r < p->n_rows; r++) {
    p->sum[r] = 0;
    for (size_t j = 0; j < p->m; j++) p->sum[r] += p->table[j * 256 + p->codes[kern_code_offset(p->n_rows, p->m, r, j)]];
  }
}

static partition make_partition(size_t m, size_t n_rows, int extreme) {
  partition p = {.m = m, .n_rows = n_rows, .n_padded = (n_rows + KERN_GROUP - 1) / KERN_GROUP * KERN_GROUP};
  size_t n_codes = (n_rows + 1) / 2 * 2 * m;
  p.codes = fill_bytes(fenced(0, n_codes + SCAN_SLACK), n_codes);
  p.table = fill_bytes(fenced(1, m * 256), m * 256);
  p.terms = fill_bytes(fenced(2, n_rows * sizeof *p.terms + SCAN_SLACK), n_rows * sizeof *p.terms);
  if (extreme) memset(p.table, 255, m * 256), memset(p.terms, 255, n_rows * sizeof *p.terms);
  p.sum = fenced(5, n_rows * sizeof *p.sum);
  sum_entries(&p);
  return p;
}

/* What is scanned next may lie anywhere, even where nothing may be read: it is only asked for. */
static void check_scan(const kern *k, const partition *p, uint16_t term_mul, uint32_t threshold) {
  const uint8_t *next = threshold % 2 ? NULL : fenced(0, 0);
  uint32_t *row = fenced(3, p->n_padded * sizeof *row);
  uint16_t *sum = fenced(4, p->n_padded * sizeof *sum);
  size_t n = k->pq_scan(p->codes, p->m, p->terms, p->n_rows, p->table, term_mul, threshold, next, row, sum), at = 0;
  assert_true(n <= p->n_rows);
  for (size_t r = 0; r < p->n_rows; r++) {
    uint64_t want = p->sum[r] + ((uint64_t)p->terms[r] * term_mul >> 16);
    if (want > 65535) want = 65535;
    if (want >= threshold) continue;
    assert_true(at < n);
    assert_int_equal(row[at], r);
    assert_int_equal(sum[at], want);
    at++;
  }
  assert_int_equal(at, n);
}

/* All combinations of shapes, thresholds and term weights, then sums at the ceiling. */
static void pq_scan_exact(void **state) {
  (void)state;
  static const size_t ms[] = {1, 2, 7, 16, 60, 256};
  static const size_t rows[] = {0,  1,   2,   3,   31,  32,  33,  63,  64,   65,   66,  95,
                                97, 127, 192, 193, 255, 256, 257, 320, 1000, 1025, 5000};
  static const uint16_t muls[] = {0, 777, 30000, 65535};
  const kern *k;
  for (size_t i = 0; i < sizeof ms / sizeof *ms; i++)
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
      for (int extreme = 0; extreme < 2; extreme++) {
        partition p = make_partition(ms[i], rows[r], extreme);
        for (int v = 0; (k = next_variant(&v));)
          for (size_t t = 0; t < sizeof muls / sizeof *muls; t++) {
            uint32_t middle = (uint32_t)(ms[i] * 128 + muls[t] / 2), near = (uint32_t)(ms[i] * 128);
            uint32_t thresholds[] = {0, 1, near, middle, 32768, 65280, 65535, 65536, UINT32_MAX};
            for (size_t h = 0; h < sizeof thresholds / sizeof *thresholds; h++)
              check_scan(k, &p, muls[t], thresholds[h]);
          }
      }
}

/* Each of the 256 codes finds its own entry in each row of the table. */
static void pq_scan_every_code(void **state) {
  (void)state;
  const kern *k;
  partition p = make_partition(3, 256, 0);
  for (size_t j = 0; j < 3; j++)
    for (size_t r = 0; r < 256; r++) p.codes[kern_code_offset(256, 3, r, j)] = (uint8_t)(r + 85 * j);
  sum_entries(&p);
  for (int v = 0; (k = next_variant(&v));) check_scan(k, &p, 0, 65536);
}

/* kern_code_offset names every byte of a partition's code area once; the area of an odd number of rows has m bytes to spare. */
static void code_offset_is_one_to_one(void **state) {
  (void)state;
  for (size_t n = 1; n <= 700; n += n < 300 ? 1 : 23) {
    size_t m = 3, n_codes = (n + 1) / 2 * 2 * m, n_seen = 0;
    uint8_t *seen = exact(n_codes);
    memset(seen, 0, n_codes);
    for (size_t r = 0; r < n; r++)
      for (size_t j = 0; j < m; j++) {
        size_t at = kern_code_offset(n, m, r, j);
        assert_true(at < n_codes && !seen[at]);
        seen[at] = 1;
        n_seen++;
      }
    assert_int_equal(n_codes - n_seen, n % 2 * m);
    free(seen);
  }
}

/* kern_pack_i8 puts (c, j) where kern_i8_offset says, and zeros where there is no row. */
static void pack_i8_layout(void **state) {
  (void)state;
  for (size_t n_c = 0; n_c <= 50; n_c += 1 + n_c % 4)
    for (size_t dim = 0; dim <= 24; dim += 4) {
      size_t n_padded = (n_c + 15) / 16 * 16;
      int8_t *c = exact(n_c * dim);
      uint8_t *packed = fenced(0, n_padded * dim), *seen = exact(n_padded * dim);
      fill_extreme(c, n_c * dim, 0);
      kern_pack_i8(c, n_c, dim, packed);
      memset(seen, 0, n_padded * dim);
      for (size_t r = 0; r < n_padded; r++)
        for (size_t j = 0; j < dim; j++) {
          size_t at = kern_i8_offset(dim, r, j);
          assert_true(at < n_padded * dim && !seen[at]);
          seen[at] = 1;
          assert_int_equal(packed[at], r < n_c ? c[r * dim + j] + 128 : 128);
        }
      free(c);
      free(seen);
    }
}

/* ------------------------------------------------------------------ sorting and selection */

static int compare_u64(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

enum { RANDOM, DISTANCES, FEW, TWO_TOPS, EQUAL, SORTED, REVERSED, ORGAN_PIPE, ALL_ONES, N_SHAPES };

static void fill_keys(uint64_t *a, size_t n, int shape) {
  for (size_t i = 0; i < n; i++) switch (shape) {
    case RANDOM: a[i] = rnd(); break;
    case DISTANCES: a[i] = kern_key(rnd_float() * 100, (uint32_t)i); break;
    case FEW: a[i] = rnd() % 3 << 62; break;
    case TWO_TOPS: a[i] = rnd() % 16 ? 7 : rnd() % 7; break;
    case EQUAL: a[i] = 42; break;
    case SORTED: a[i] = i * 5; break;
    case REVERSED: a[i] = (n - i) << 40; break;
    case ORGAN_PIPE: a[i] = i < n / 2 ? i : n - i; break;
    default: a[i] = UINT64_MAX; break;
    }
}

static void check_select(const kern *k, const uint64_t *keys, const uint64_t *sorted, size_t n, size_t want) {
  uint64_t *a = exact(n * sizeof *a), *scratch = exact(2 * (n + 8) * sizeof *scratch);
  memcpy(a, keys, n * sizeof *a);
  size_t n_front = want < n ? want : n;
  uint64_t largest = k->select_u64(a, n, want, scratch);
  assert_true(largest == (n_front ? sorted[n_front - 1] : 0));
  qsort(a, n_front, sizeof *a, compare_u64);
  qsort(a + n_front, n - n_front, sizeof *a, compare_u64);
  assert_memory_equal(a, sorted, n * sizeof *a); /* the front is right and the whole still a permutation */
  free(a);
  free(scratch);
}

/* By the high bits alone; keys that are equal there keep their order, which their low bits tell. */
static void check_sort_from(const uint64_t *keys, size_t n, uint64_t *a, uint64_t *scratch) {
  const int bits[] = {20, 40};
  for (size_t b = 0; b < sizeof bits / sizeof *bits; b++) {
    uint64_t low = ((uint64_t)1 << bits[b]) - 1;
    for (size_t i = 0; i < n; i++) a[i] = (keys[i] & ~low) | (low - i); /* n < 2^20; descending: a full sort would turn them */
    kern_sort_u64_from(a, n, bits[b], scratch);
    for (size_t i = 1; i < n; i++) {
      assert_true(a[i - 1] >> bits[b] <= a[i] >> bits[b]);
      assert_true(a[i - 1] >> bits[b] < a[i] >> bits[b] || a[i - 1] > a[i]);
    }
    for (size_t i = 0; i < n; i++) scratch[low - (a[i] & low)] = a[i] & ~low;
    for (size_t i = 0; i < n; i++) assert_true(scratch[i] == (keys[i] & ~low)); /* each key is still there */
  }
}

static void check_order(size_t n, int shape, const size_t *wants, size_t n_wants) {
  uint64_t *keys = exact(n * sizeof *keys), *sorted = exact(n * sizeof *keys), *a = exact(n * sizeof *keys);
  uint64_t *scratch = exact(n * sizeof *keys);
  const kern *k;
  fill_keys(keys, n, shape);
  memcpy(sorted, keys, n * sizeof *keys);
  qsort(sorted, n, sizeof *sorted, compare_u64);
  memcpy(a, keys, n * sizeof *keys);
  kern_sort_u64(a, n, scratch);
  assert_memory_equal(a, sorted, n * sizeof *a);
  check_sort_from(keys, n, a, scratch);
  for (int v = 0; (k = next_variant(&v));)
    for (size_t w = 0; w < n_wants; w++) check_select(k, keys, sorted, n, wants[w]);
  free(keys);
  free(sorted);
  free(a);
  free(scratch);
}

/* Selection and sorting of every shape at every short length and at a long one. */
static void order_short(void **state) {
  (void)state;
  for (int shape = 0; shape < N_SHAPES; shape++)
    for (size_t n = 0; n <= 300; n++) {
      size_t wants[] = {0, 1, n / 7, n / 2, n ? n - 1 : 0, n, n + 1};
      check_order(n, shape, wants, sizeof wants / sizeof *wants);
    }
}
static void order_long(void **state) {
  (void)state;
  for (int shape = 0; shape < N_SHAPES; shape++)
    for (size_t n = 4093; n <= 100000; n += 95907) {
      size_t wants[] = {0, 1, 64, n / 2, n - 1, n, n + 1};
      check_order(n, shape, wants, sizeof wants / sizeof *wants);
    }
}

/* An input made against the pivot's choice, so that the work limit has to end the selection: splits keep the order of
 * the keys, and the pivot is the second smallest of 16 evenly spaced samples while need < n / 16. So two of the slots
 * sampled in each round get the two smallest keys left, and every round settles two keys only. */
static void select_against_samples(void **state) {
  (void)state;
  enum { N = 1 << 14, WANT = N / 17 };
  uint64_t *keys = exact(N * sizeof *keys), *sorted = exact(N * sizeof *keys);
  uint32_t *slot = exact(N * sizeof *slot);
  const kern *k;
  for (uint32_t i = 0; i < N; i++) slot[i] = i;
  size_t n_left = N;
  for (uint64_t key = 0; key + 2 < WANT; key += 2) {
    size_t step = n_left / 16, first = step / 2, second = first + step;
    keys[slot[first]] = key;
    keys[slot[second]] = key + 1;
    memmove(slot + second, slot + second + 1, (n_left - second - 1) * sizeof *slot);
    memmove(slot + first, slot + first + 1, (n_left - first - 2) * sizeof *slot);
    n_left -= 2;
  }
  for (size_t i = 0; i < n_left; i++) keys[slot[i]] = N + i;
  memcpy(sorted, keys, N * sizeof *keys);
  qsort(sorted, N, sizeof *sorted, compare_u64);
  for (int v = 0; (k = next_variant(&v));) check_select(k, keys, sorted, N, WANT);
  free(keys);
  free(sorted);
  free(slot);
}

/* The key's order is the order of the float, then of the number; NaN is last; value and number come back. */
static void keys_order_floats(void **state) {
  (void)state;
  static const float rising[] = {-INFINITY, -3e38f, -1, -1e-45f, 0, 1e-45f, 1, 3e38f, INFINITY, NAN};
  enum { N = sizeof rising / sizeof *rising };
  for (int i = 0; i < N; i++) {
    uint64_t key = kern_key(rising[i], 77);
    assert_int_equal(kern_key_number(key), 77);
    assert_true(isnan(rising[i]) ? isnan(kern_key_value(key)) : kern_key_value(key) == rising[i]);
    assert_true(kern_key(rising[i], 76) < key);
    if (i) assert_true(kern_key(rising[i - 1], UINT32_MAX) < key);
  }
}

/* ------------------------------------------------------------------ dispatch */

/* The variant a fresh process gets under VECSHARD_SIMD=value (NULL: unset); kern_get decides once, hence the fork. */
static int chosen_under(const char *value, const char *expected) {
  int status = -1;
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    if (value)
      setenv("VECSHARD_SIMD", value, 1);
    else
      unsetenv("VECSHARD_SIMD");
    _exit(strcmp(kern_get()->name, expected) != 0 || kern_get() != kern_variant(expected));
  }
  assert_int_equal(waitpid(child, &status, 0), child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* The best variant, unless capped; a cap above the machine and an unknown name mean the best. */
static void simd_cap(void **state) {
  (void)state;
  static const char *const rising[] = {"scalar", "neon", "dotprod", "avx2", "avx512"};
  const char *best = NULL;
  for (size_t i = 0; i < sizeof rising / sizeof *rising; i++) best = kern_variant(rising[i]) ? rising[i] : best;
  assert_non_null(kern_variant("scalar"));
  assert_null(kern_variant("sse9"));
  assert_true(chosen_under(NULL, best));
  assert_true(chosen_under("", best));
  assert_true(chosen_under("sse9", best));
  assert_true(chosen_under("avx512", best));
  assert_true(chosen_under("avx2", kern_variant("avx2") ? "avx2" : best));
  assert_true(chosen_under("neon", kern_variant("neon") ? "neon" : best));
  assert_true(chosen_under("scalar", "scalar"));
}

int main(void) {
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(simd_cap), /* first: nothing else here calls kern_get */
    cmocka_unit_test(sums_match_double),
    cmocka_unit_test(sums_propagate_specials),
    cmocka_unit_test(f16_to_f32_all_values),
    cmocka_unit_test(f32_to_f16_rounds_to_even),
    cmocka_unit_test(f16_lengths),
    cmocka_unit_test(f16_sums_match_double),
    cmocka_unit_test(all_finite_finds_each),
    cmocka_unit_test(pack_layout),
    cmocka_unit_test(pack_i8_layout),
    cmocka_unit_test(scores_match_double),
    cmocka_unit_test(scores_many_equal_scores),
    cmocka_unit_test(argmax_finds_best),
    cmocka_unit_test(argmax_ties_go_low),
    cmocka_unit_test(argmax_survives_specials),
    cmocka_unit_test(quantize_equals_definition),
    cmocka_unit_test(scores_i8_exact),
    cmocka_unit_test(dot_i8_exact),
    cmocka_unit_test(keys_i8_equal_definition),
    cmocka_unit_test(least_i8_equal_definition),
    cmocka_unit_test(keys_u16_equal_definition),
    cmocka_unit_test(pq_tables_equal_definition),
    cmocka_unit_test(pq_table_rounds),
    cmocka_unit_test(not_below_f32_equal_definition),
    cmocka_unit_test(xxh3_known_answers),
    cmocka_unit_test(pq_scan_exact),
    cmocka_unit_test(pq_scan_every_code),
    cmocka_unit_test(code_offset_is_one_to_one),
    cmocka_unit_test(order_short),
    cmocka_unit_test(order_long),
    cmocka_unit_test(select_against_samples),
    cmocka_unit_test(keys_order_floats),
  };
  const char *seed = getenv("TEST_SEED");
  if (seed && strtoull(seed, NULL, 0)) rng_state = strtoull(seed, NULL, 0);
  printf("seed %llu\n", (unsigned long long)rng_state);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
