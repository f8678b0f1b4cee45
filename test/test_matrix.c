/* test_matrix.c - proves the promises of kern.h on nearest rows and nearest code words, by fp32, by bytes (VNNI) and by tiles (AMX),
 * as far as this machine has them:
 *   - kern_nearest_find is exact: no row of the matrix is nearer than the one it names by more than rounding, for matrices
 *     of bytes and of any floats, for points in clusters, between centroids, far out, zero, and for duplicates;
 *   - bytes and tiles agree to the bit, and a row's answer does not depend on the rows beside it;
 *   - by groups, too, where rows seldom get another row than the nearest;
 *   - what is not finite costs that row its answer, never a crash;
 *   - code words are the nearest ones, but for differences of a few thousandths;
 *   - nothing is read or written outside the arrays: they are allocated to the byte, so run it under ASan as well.
 * Prints its seed; TEST_SEED=<n> repeats a run.
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
#include <sys/wait.h>
#include <unistd.h>
#include "../ext/kernels/kern.h"

static uint64_t rng_state = 20251128;
static uint64_t rnd(void) {
  rng_state ^= rng_state << 13;
  rng_state ^= rng_state >> 7;
  rng_state ^= rng_state << 17;
  return rng_state * 0x2545f4914f6cdd1dull;
}
static float rnd_float(void) { return (float)(int32_t)(rnd() >> 40) * 0x1p-23f - 1.0f; } /* [-1, 1) */

static void *exact(size_t n_bytes) {
  void *p = malloc(n_bytes ? n_bytes : 1);
  assert_non_null(p);
  return p;
}

/* Makes a row what a signed byte times one scale can say. */
static void round_row(float *x, size_t n) {
  int8_t *q = exact(n);
  float scale = kern_get()->quantize_i8(x, n, q);
  for (size_t j = 0; j < n; j++) x[j] = scale * q[j];
  free(q);
}

/* The definitions read nothing but what a test allocated: a sanitizer that watches them costs more than all else here. */
#define UNWATCHED __attribute__((no_sanitize("address", "undefined")))
UNWATCHED static double l2sq(const float *a, const float *b, size_t n) {
  double sum = 0;
  for (size_t j = 0; j < n; j++) sum += ((double)a[j] - b[j]) * ((double)a[j] - b[j]);
  return sum;
}
UNWATCHED static double norm2(const float *a, size_t n) {
  double sum = 0;
  for (size_t j = 0; j < n; j++) sum += (double)a[j] * a[j];
  return sum;
}

/* ------------------------------------------------------------------ nearest rows */

typedef struct {
  size_t n_c, dim, n_x, stride;
  float *c, *x;
} problem;

/* Centroids around a few middles; points of every kind that may go wrong. */
static problem make_problem(size_t n_c, size_t dim, size_t n_x, int bytes) {
  problem p = {n_c, dim, n_x, dim + n_x % 3, NULL, NULL};
  p.c = exact(n_c * dim * sizeof *p.c), p.x = exact(((n_x ? n_x - 1 : 0) * p.stride + dim) * sizeof *p.x);
  for (size_t k = 0; k < n_c; k++) {
    for (size_t j = 0; j < dim; j++) p.c[k * dim + j] = (k % 4 == j % 4 ? 2 : 0) + rnd_float();
    if (bytes) round_row(p.c + k * dim, dim);
    if (k % 7 == 5) memcpy(p.c + k * dim, p.c + (k - 1) * dim, dim * sizeof *p.c); /* twins */
  }
  for (size_t r = 0; r < n_x; r++) {
    const float *a = p.c + rnd() % n_c * dim, *b = p.c + rnd() % n_c * dim;
    float *x = p.x + r * p.stride, far = r % 11 == 3 ? 1000 : r % 11 == 4 ? 1e-20f : 1;
    for (size_t j = 0; j < dim; j++) {
      switch (r % 5) {
      case 0: x[j] = a[j]; break;
      case 1: x[j] = (a[j] + b[j]) / 2; break;
      case 2: x[j] = a[j] + .3f * rnd_float(); break;
      case 3: x[j] = rnd_float() * far; break;
      default: x[j] = r % 3 ? a[j] * .5f + b[j] * .5f + .01f * rnd_float() : 0;
      }
    }
    if (r % 13 == 6) x[rnd() % dim] = 30; /* one element dwarfs the others */
  }
  return p;
}
static void free_problem(problem *p) { free(p->c), free(p->x); }

static void find(const problem *p, int amx, int is_exact, uint32_t *id) {
  void *mem = exact(kern_nearest_bytes(p->n_c, p->dim));
  kern_nearest m;
  kern_nearest_init(&m, p->c, p->n_c, p->dim, mem);
  if (!amx) m.amx = 0;
  void *scratch = exact(kern_nearest_scratch(&m));
  kern_nearest_find(&m, p->x, p->n_x, p->stride, is_exact, id, scratch);
  for (size_t r = 0; r < p->n_x; r += 1 + p->n_x / 5) { /* alone, and at the end of a call */
    uint32_t one, *part = exact((p->n_x - r) * sizeof *part);
    kern_nearest_find(&m, p->x + r * p->stride, 1, p->stride, is_exact, &one, scratch);
    assert_int_equal(one, id[r]);
    kern_nearest_find(&m, p->x + r * p->stride, p->n_x - r, p->stride, is_exact, part, scratch);
    assert_memory_equal(part, id + r, (p->n_x - r) * sizeof *part);
    free(part);
  }
  free(scratch), free(mem);
}

static void check_exact(const problem *p, const uint32_t *id) {
  for (size_t r = 0; r < p->n_x; r++) {
    const float *x = p->x + r * p->stride;
    double best = INFINITY;
    size_t who = 0;
    for (size_t k = 0; k < p->n_c; k++) {
      double d = l2sq(x, p->c + k * p->dim, p->dim);
      if (d < best) best = d, who = k;
    }
    assert_true(id[r] < p->n_c);
    const float *got = p->c + id[r] * p->dim;
    double longest = sqrt(norm2(x, p->dim)) + sqrt(norm2(p->c + who * p->dim, p->dim)), room = 2e-6 * longest * longest;
    double d = l2sq(x, got, p->dim);
    if (d > best + room)
      fail_msg("%zu x %zu, row %zu: centroid %u at %.9g, not %zu at %.9g", p->n_c, p->dim, r, id[r], d, who, best);
    if (d == best) assert_true(id[r] >= who); /* twins: the first one */
    if (memcmp(got, p->c + who * p->dim, p->dim * sizeof *got) == 0) assert_int_equal(id[r], who);
  }
}

static const struct { size_t n_c, dim, n_x; } shapes[] = {
  {1, 1, 1},     {2, 3, 5},      {16, 4, 33},   {31, 7, 40},    {32, 63, 100}, {33, 64, 64},   {65, 65, 31},    {100, 100, 300},
  {257, 128, 700}, {300, 130, 257}, {64, 960, 520}, {500, 37, 1100}, {40, 4097, 70}, {7, 1536, 290}, {3, 16384, 40}, {1000, 8, 600},
};

static int is_scalar; /* plain loops, which take ten times as long */

static void nearest_is_exact(void **state) {
  (void)state;
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
    for (int bytes = 0; bytes < 2; bytes++) {
      problem p = make_problem(shapes[s].n_c, shapes[s].dim, is_scalar && shapes[s].n_x > 100 ? shapes[s].n_x / 8 : shapes[s].n_x, bytes);
      uint32_t *id = exact(p.n_x * sizeof *id), *other = exact(p.n_x * sizeof *id);
      find(&p, 0, 1, id);
      check_exact(&p, id);
      find(&p, 1, 1, other);
      assert_memory_equal(id, other, p.n_x * sizeof *id);
      find(&p, 0, 0, id), find(&p, 1, 0, other);
      assert_memory_equal(id, other, p.n_x * sizeof *id);
      free(id), free(other), free_problem(&p);
    }
}

/* To train with: seldom another centroid, and then one that is hardly farther. */
static void training_is_close(void **state) {
  (void)state;
  problem p = make_problem(400, 96, 2000, 0);
  uint32_t *id = exact(p.n_x * sizeof *id);
  double got = 0, best = 0;
  find(&p, 1, 0, id);
  for (size_t r = 0; r < p.n_x; r++) {
    double least = INFINITY;
    if (r % 13 == 6 || r % 5 == 3) continue;
    for (size_t k = 0; k < p.n_c; k++) {
      double d = l2sq(p.x + r * p.stride, p.c + k * p.dim, p.dim);
      least = d < least ? d : least;
    }
    got += l2sq(p.x + r * p.stride, p.c + id[r] * p.dim, p.dim), best += least;
  }
  if (got > best * 1.002) fail_msg("squared distances sum up to %g, not %g", got, best);
  free(id), free_problem(&p);
}

static void nearest_survives_specials(void **state) {
  (void)state;
  static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f};
  problem p = make_problem(90, 70, 64, 1);
  uint32_t *clean = exact(p.n_x * sizeof *clean), *id = exact(p.n_x * sizeof *id);
  for (int amx = 0; amx < 2; amx++) {
    find(&p, amx, 1, clean);
    for (size_t o = 0; o < sizeof odd / sizeof *odd; o++) {
      float kept = p.x[5 * p.stride + 9];
      void *mem = exact(kern_nearest_bytes(p.n_c, p.dim));
      kern_nearest m;
      kern_nearest_init(&m, p.c, p.n_c, p.dim, mem);
      if (!amx) m.amx = 0;
      void *scratch = exact(kern_nearest_scratch(&m));
      p.x[5 * p.stride + 9] = odd[o];
      kern_nearest_find(&m, p.x, p.n_x, p.stride, 1, id, scratch);
      for (size_t r = 0; r < p.n_x; r++) {
        assert_true(id[r] < p.n_c);
        if (r != 5) assert_int_equal(id[r], clean[r]);
      }
      p.x[5 * p.stride + 9] = kept;
      free(scratch), free(mem);
    }
  }
  free(clean), free(id), free_problem(&p);
}

/* ------------------------------------------------------------------ nearest rows by groups */

enum { GROUPS = 37 };

/* Groups of their middles' neighbours; one is empty. The answers, which must not depend on the rows beside one. */
static void find_grouped(const problem *p, uint32_t *id) {
  float *centres = exact(GROUPS * p->dim * sizeof *centres);
  uint32_t *of = exact(p->n_c * sizeof *of), *order = exact(p->n_c * sizeof *order), start[GROUPS + 1] = {0}, at = 0;
  for (size_t g = 0; g < GROUPS; g++) memcpy(centres + g * p->dim, p->c + (g * 11 % p->n_c) * p->dim, p->dim * sizeof *centres);
  for (size_t k = 0; k < p->n_c; k++) {
    of[k] = 0;
    for (uint32_t g = 1; g + 1 < GROUPS; g++)
      if (l2sq(p->c + k * p->dim, centres + g * p->dim, p->dim) < l2sq(p->c + k * p->dim, centres + of[k] * p->dim, p->dim)) of[k] = g;
  }
  for (uint32_t g = 0; g < GROUPS; g++, start[g] = at)
    for (uint32_t k = 0; k < p->n_c; k++)
      if (of[k] == g) order[at++] = k;
  void *mem = exact(kern_grouped_bytes(p->n_c, GROUPS, p->dim));
  kern_grouped m;
  kern_grouped_init(&m, p->c, p->dim, order, start, centres, GROUPS, mem);
  void *scratch = exact(kern_grouped_scratch(&m));
  kern_grouped_find(&m, p->x, p->n_x, p->stride, id, scratch);
  for (size_t r = 0; r < p->n_x; r += 1 + p->n_x / 5) {
    uint32_t *part = exact((p->n_x - r) * sizeof *part);
    kern_grouped_find(&m, p->x + r * p->stride, p->n_x - r, p->stride, part, scratch);
    assert_memory_equal(part, id + r, (p->n_x - r) * sizeof *part);
    free(part);
  }
  free(centres), free(of), free(order), free(mem), free(scratch);
}

static const struct { size_t n_c, dim, n_x; } grouped_shapes[] = {{600, 96, 2100}, {1000, 64, 1025}, {513, 131, 70}, {700, 960, 300}};
enum { N_GROUPED = sizeof grouped_shapes / sizeof *grouped_shapes };
static uint32_t *by_vnni[N_GROUPED]; /* before tiles were asked for */

/* Run twice, without tiles and with them: the answers agree to the bit. Seldom another row than the nearest, and one hardly farther. */
static void grouped_is_close(void **state) {
  (void)state;
  uint64_t kept = rng_state;
  for (size_t s = 0; s < N_GROUPED && kern_grouped_works(); s++) {
    rng_state = 77 + s;
    problem p = make_problem(grouped_shapes[s].n_c, grouped_shapes[s].dim, grouped_shapes[s].n_x, 1);
    uint32_t *id = exact(p.n_x * sizeof *id);
    double got = 0, best = 0;
    find_grouped(&p, id);
    for (size_t r = 0; r < p.n_x; r++) {
      double least = INFINITY;
      assert_true(id[r] < p.n_c);
      if (r % 13 == 6 || r % 5 == 3) continue;
      for (size_t k = 0; k < p.n_c; k++) {
        double d = l2sq(p.x + r * p.stride, p.c + k * p.dim, p.dim);
        least = d < least ? d : least;
      }
      got += l2sq(p.x + r * p.stride, p.c + id[r] * p.dim, p.dim), best += least;
    }
    if (got > best * 1.01) fail_msg("%zu x %zu: squared distances sum up to %g, not %g", p.n_c, p.dim, got, best);
    for (size_t r = 0; r < p.n_x; r += 5) /* these points are rows themselves */
      if (r % 13 != 6) assert_true(memcmp(p.x + r * p.stride, p.c + id[r] * p.dim, p.dim * sizeof *p.c) == 0);
    if (by_vnni[s]) assert_memory_equal(id, by_vnni[s], p.n_x * sizeof *id);
    free(by_vnni[s]), by_vnni[s] = id, id = NULL;
    float *odd = p.x + 5 * p.stride + 9;
    id = exact(p.n_x * sizeof *id);
    for (int i = 0; i < 3; i++) {
      *odd = i == 0 ? NAN : i == 1 ? INFINITY : 3e38f;
      find_grouped(&p, id);
      for (size_t r = 0; r < p.n_x; r++) assert_true(r == 5 ? id[r] < p.n_c : id[r] == by_vnni[s][r]);
    }
    if (kern_amx_ready()) free(by_vnni[s]), by_vnni[s] = NULL;
    free(id), free_problem(&p);
  }
  rng_state = kept;
}

/* kern_scores_i8 says what kern.scores_i8 says, with rows and columns that do not fill tiles. */
static void scores_are_equal(void **state) {
  (void)state;
  for (size_t s = 0; s < 24; s++) {
    size_t n_q = 1 + rnd() % 90, n_c = 1 + rnd() % 70, dim = s % 3 ? 64 * (1 + rnd() % 5) : 4 * (1 + rnd() % 60), lanes = (n_c + 15) / 16 * 16;
    int8_t *q = exact(n_q * dim), *c = exact(n_c * dim);
    uint8_t *packed = exact(lanes * dim);
    int32_t *a = exact(n_q * lanes * 4), *b = exact(n_q * lanes * 4);
    for (size_t i = 0; i < n_q * dim; i++) q[i] = (int8_t)(rnd() % 255 - 127);
    for (size_t i = 0; i < n_c * dim; i++) c[i] = (int8_t)(rnd() % 255 - 127);
    kern_pack_i8(c, n_c, dim, packed);
    kern_scores_i8(q, n_q, dim, dim, packed, n_c, a, lanes);
    kern_get()->scores_i8(q, n_q, dim, dim, packed, n_c, b, lanes);
    for (size_t i = 0; i < n_q; i++) assert_memory_equal(a + i * lanes, b + i * lanes, n_c * 4);
    free(q), free(c), free(packed), free(a), free(b);
  }
}

/* ------------------------------------------------------------------ code words */

static void check_words(size_t subs, size_t n_words, size_t ds, size_t n, float spread) {
  size_t d = subs * ds, stride = d + n % 2, code_stride = subs + n % 3;
  float *x = exact(((n - 1) * stride + d) * sizeof *x), *words = exact(subs * n_words * ds * sizeof *words);
  uint8_t *code = exact((n - 1) * code_stride + subs), *one = exact(subs);
  void *mem = exact(kern_words_bytes(subs, n_words, ds));
  kern_words w;
  double got = 0, best = 0;
  for (size_t i = 0; i < (n - 1) * stride + d; i++) x[i] = rnd_float() * (i / stride % 5 == 2 ? spread : 1);
  for (size_t j = 0; j < subs; j++) {
    for (size_t i = 0; i < n_words * ds; i++) words[j * n_words * ds + i] = rnd_float() * (float)(1 + j % 3);
    round_row(words + j * n_words * ds, n_words * ds);
  }
  kern_words_init(&w, words, subs, n_words, ds, mem);
  kern_words_find(&w, x, n, stride, code, code_stride);
  for (size_t r = 0; r < n; r++) {
    kern_words_find(&w, x + r * stride, 1, stride, one, subs);
    assert_memory_equal(one, code + r * code_stride, subs);
    for (size_t j = 0; j < subs; j++) {
      double least = INFINITY;
      const float *part = x + r * stride + j * ds;
      for (size_t i = 0; i < n_words; i++) {
        double e = l2sq(part, words + (j * n_words + i) * ds, ds);
        least = e < least ? e : least;
      }
      assert_true(code[r * code_stride + j] < n_words);
      double e = l2sq(part, words + (j * n_words + code[r * code_stride + j]) * ds, ds);
      double len = sqrt(norm2(x + r * stride, d)) + 3 * sqrt((double)ds), room = 4e-3 * len * sqrt(e + least);
      if (e > least + room) fail_msg("%zu words of %zu, row %zu, part %zu: %.9g, not %.9g", n_words, ds, r, j, e, least);
      got += e, best += least;
    }
  }
  if (got > best * 1.0005 + 1e-9) fail_msg("%zu x %zu words of %zu: errors sum up to %.9g, not %.9g", subs, n_words, ds, got, best);
  free(x), free(words), free(code), free(one), free(mem);
}

static void words_are_nearest(void **state) {
  (void)state;
  static const size_t dims[] = {1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 32, 33, 64, 100};
  for (size_t i = 0; i < sizeof dims / sizeof *dims; i++)
    for (size_t subs = 1; subs < 12; subs += 5) {
      check_words(subs, 256, dims[i], 70, 1);
      check_words(subs, 16, dims[i], 131, 1);
      check_words(subs, 256, dims[i], 9, 300);
      check_words(subs, 16, dims[i], 3, 1e-12f);
    }
}

static void words_survive_specials(void **state) {
  (void)state;
  static const float odd[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e30f, 1e-45f};
  enum { SUBS = 5, DS = 8, N = 20, D = SUBS * DS };
  float x[N * D], words[SUBS * 256 * DS];
  uint8_t clean[N * SUBS], code[N * SUBS];
  void *mem = exact(kern_words_bytes(SUBS, 256, DS));
  kern_words w;
  for (size_t i = 0; i < N * D; i++) x[i] = rnd_float();
  for (size_t i = 0; i < SUBS * 256 * DS; i++) words[i] = rnd_float();
  kern_words_init(&w, words, SUBS, 256, DS, mem);
  kern_words_find(&w, x, N, D, clean, SUBS);
  for (size_t o = 0; o < sizeof odd / sizeof *odd; o++) {
    float kept = x[3 * D + 1];
    x[3 * D + 1] = odd[o];
    kern_words_find(&w, x, N, D, code, SUBS);
    assert_memory_equal(code, clean, 3 * SUBS);
    assert_memory_equal(code + 4 * SUBS, clean + 4 * SUBS, (N - 4) * SUBS);
    x[3 * D + 1] = kept;
  }
  memset(words, 0, sizeof words); /* all words alike */
  kern_words_init(&w, words, SUBS, 256, DS, mem);
  kern_words_find(&w, x, N, D, code, SUBS);
  free(mem);
}

/* ------------------------------------------------------------------ element-wise */

static void sums_and_differences(void **state) {
  (void)state;
  static const size_t dims[] = {1, 7, 16, 31, 100, 127, 128, 129, 300, 960};
  enum { ROWS = 50 };
  for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
    size_t d = dims[i];
    float *x = exact(ROWS * d * sizeof *x), *out = exact(d * sizeof *out);
    uint32_t row[ROWS];
    for (size_t j = 0; j < ROWS * d; j++) x[j] = rnd_float();
    for (size_t n = 0; n <= ROWS; n += 7) {
      for (size_t r = 0; r < n; r++) row[r] = (uint32_t)(rnd() % ROWS);
      kern_sum_rows_f32(x, d, row, n, d, out);
      for (size_t j = 0; j < d; j++) {
        volatile float sum = 0;
        for (size_t r = 0; r < n; r++) sum += x[row[r] * d + j];
        assert_true(out[j] == sum);
      }
    }
    kern_scale_sub_f32(x, 1.7f, x + d, d, out);
    for (size_t j = 0; j < d; j++) {
      volatile float product = x[j] * 1.7f;
      assert_true(out[j] == product - x[d + j]);
    }
    free(x), free(out);
  }
}

/* ------------------------------------------------------------------ permission */

/* VECSHARD_SIMD below amx: no request, whatever the machine has. The answer is for good, so each runs in a process of its own. */
static void simd_caps_amx(void **state) {
  (void)state;
  static const char *const names[] = {"scalar", "avx2", "avx512"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    int status;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
      execl("/proc/self/exe", "test_matrix", names[i], (char *)NULL);
      _exit(3);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

int main(int argc, char **argv) {
  const char *seed = getenv("TEST_SEED");
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(nearest_is_exact),      cmocka_unit_test(training_is_close),     cmocka_unit_test(nearest_survives_specials),
    cmocka_unit_test(words_are_nearest),     cmocka_unit_test(words_survive_specials), cmocka_unit_test(sums_and_differences),
    cmocka_unit_test(grouped_is_close),      cmocka_unit_test(scores_are_equal),      cmocka_unit_test(simd_caps_amx),
  };
  if (argc > 1) { /* a child of simd_caps_amx: the variant named, without tiles, is exact too */
    setenv("VECSHARD_SIMD", argv[1], 1);
    is_scalar = !strcmp(argv[1], "scalar");
    if (kern_amx_request() || kern_amx_ready()) return 1;
    const struct CMUnitTest some[] = {cmocka_unit_test(nearest_is_exact), cmocka_unit_test(words_are_nearest), cmocka_unit_test(sums_and_differences)};
    return cmocka_run_group_tests_name(argv[1], some, NULL, NULL) ? 2 : 0;
  }
  if (seed) rng_state = strtoull(seed, NULL, 10) | 1;
  printf("seed %llu\n", (unsigned long long)rng_state);
  const struct CMUnitTest first[] = {cmocka_unit_test(grouped_is_close)};
  if (cmocka_run_group_tests_name("without tiles", first, NULL, NULL)) return 1;
  printf("tiles: %s\n", kern_amx_request() ? "yes" : "no");
  return cmocka_run_group_tests(tests, NULL, NULL);
}
