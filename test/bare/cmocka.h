/* cmocka.h - as much of cmocka as test_kernels.c uses, in one header: on another CPU than this machine's there is a compiler
 * for it, and an emulator, but no library. A test ends at its first failure; the output counts as cmocka's does. */
#ifndef BARE_CMOCKA_H
#define BARE_CMOCKA_H

static jmp_buf bare_end_of_test;

#define fail_msg(...) \
  (printf("[  ERROR   ] --- %s:%d: ", __FILE__, __LINE__), printf(__VA_ARGS__), puts(""), longjmp(bare_end_of_test, 1))
#define bare_check(holds, text) ((holds) ? (void)0 : fail_msg("%s", text))
#define assert_true(c) bare_check(c, #c)
#define assert_non_null(p) bare_check((p) != NULL, #p " is NULL")
#define assert_null(p) bare_check((p) == NULL, #p " is not NULL")
#define assert_int_equal(a, b) bare_check((unsigned long long)(a) == (unsigned long long)(b), #a " is not " #b)
#define assert_memory_equal(a, b, n) bare_check(memcmp(a, b, n) == 0, #a " differs from " #b)

struct CMUnitTest {
  const char *name;
  void (*run)(void **state);
};
#define cmocka_unit_test(f) {#f, f}

static int bare_run(const struct CMUnitTest *tests, size_t n_tests) {
  volatile size_t i = 0, n_failed = 0;
  for (; i < n_tests; i++) {
    void *state = NULL;
    printf("[ RUN      ] %s\n", tests[i].name);
    fflush(stdout); /* a crash shall show where */
    if (setjmp(bare_end_of_test))
      n_failed++, printf("[  FAILED  ] %s\n", tests[i].name);
    else
      tests[i].run(&state);
  }
  printf("[  PASSED  ] %zu test(s).\n", n_tests - n_failed);
  if (n_failed) printf("[  FAILED  ] %zu test(s)\n", n_failed);
  return (int)n_failed;
}
#define cmocka_run_group_tests(tests, setup, teardown) bare_run(tests, sizeof(tests) / sizeof *(tests))

#endif
