/* test_base.c - ext/base and local files behind vs_io, without SQLite.
 *
 * Proves: a run calls every index exactly once, also nested, from many threads at once, after fork, and with more
 * threads asked for than there are; its cap holds; pool threads block signals; exit with a run under way neither hangs
 * nor crashes; vs_threads follows the environment and the affinity mask. A local file gives the same bytes mapped and
 * read, with readable zeros behind the last one at every size around a page; what is no regular file, missing, out of
 * range or cut short is the right error. Runs under the address and thread sanitizers. Some tests start this program
 * again with a word.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants these four first */
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../ext/base/vs_err.h"
#include "../ext/base/vs_pool.h"
#include "../ext/s3vfs/io_local.h"

enum { PATIENCE_MS = 10000 };
static char folder[64];

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
/* Its runtime does not support threads in a forked child ("dup thread with used id"); the other builds run these tests.
 */
#ifdef UNDER_TSAN
enum { FORKED_THREADS = 0 };
#else
enum { FORKED_THREADS = 1 };
#endif

static void pause_ms(int ms) { usleep((useconds_t)ms * 1000); }

/* Waits for a child of ours, killing it when it hangs: -1 then, else its exit status (128 + signal when killed). */
static int wait_child(pid_t pid) {
  int status;
  for (int ms = 0; ms < 3 * PATIENCE_MS; ms += 5, pause_ms(5))
    if (waitpid(pid, &status, WNOHANG) == pid) return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  kill(pid, SIGKILL);
  waitpid(pid, &status, 0);
  return -1;
}

/* Starts this program again as `word`; its exit status. env may be NULL: VECSHARD_THREADS unset. */
static int rerun(const char *word, const char *env) {
  pid_t pid = fork();
  if (!pid) {
    if (env) setenv("VECSHARD_THREADS", env, 1);
    else unsetenv("VECSHARD_THREADS");
    execl("/proc/self/exe", "test_base", word, (char *)NULL);
    _exit(99);
  }
  return wait_child(pid);
}

/* ---- errors ---- */

static void errors_keep_the_first(void **state) {
  (void)state;
  vs_err err = {0};
  assert_int_equal(vs_fail(&err, VS_IO, "first %d", 1), VS_IO);
  assert_int_equal(vs_corrupt(&err, "second"), VS_CORRUPT);
  assert_string_equal(err.text, "first 1");
  vs_err_reset(&err);
  assert_int_equal(err.rc, VS_OK);
  assert_int_equal(vs_nomem(NULL), VS_NOMEM);
}

/* ---- pool ---- */

typedef struct counts {
  int seen[5000]; /* how often each index came; atomic */
  int inside, most;
} counts;

static void count_task(void *ctx, size_t i) {
  counts *c = ctx;
  __atomic_fetch_add(&c->seen[i], 1, __ATOMIC_RELAXED);
}

/* cmocka's assertions belong to the main thread: threads and children return verdicts instead. */
static int each_once(size_t n, int threads) {
  counts *c = calloc(1, sizeof *c);
  vs_pool_run(n, threads, count_task, c);
  int good = 1;
  for (size_t i = 0; i < 5000; i++) good &= c->seen[i] == (i < n);
  free(c);
  return good;
}

static void pool_calls_each_index_once(void **state) {
  (void)state;
  const size_t sizes[] = {0, 1, 2, 3, 7, 64, 1000, 5000};
  const int threads[] = {-1, 0, 1, 2, 4, 16, 1000};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) assert_true(each_once(sizes[s], threads[t]));
}

/* Plain memory: that the results are visible to the caller afterwards is what the thread sanitizer checks. */
static void square_task(void *ctx, size_t i) { ((uint64_t *)ctx)[i] = (uint64_t)i * i; }

static void pool_results_are_visible(void **state) {
  (void)state;
  static uint64_t out[4000];
  for (int round = 0; round < 20; round++) {
    memset(out, 0xff, sizeof out);
    vs_pool_run(4000, 4, square_task, out);
    for (size_t i = 0; i < 4000; i++) assert_int_equal(out[i], i * i);
  }
}

static void inner_task(void *ctx, size_t i) { __atomic_fetch_add((uint64_t *)ctx, i + 1, __ATOMIC_RELAXED); }
static void middle_task(void *ctx, size_t i) {
  (void)i;
  vs_pool_run(10, 4, inner_task, ctx);
}
static void outer_task(void *ctx, size_t i) {
  (void)i;
  vs_pool_run(10, 4, middle_task, ctx);
}
static int nested_sum(void) {
  uint64_t sum = 0;
  vs_pool_run(20, 4, outer_task, &sum);
  return sum == 20 * 10 * 55;
}
static void pool_runs_nest(void **state) {
  (void)state;
  for (int i = 0; i < 20; i++) assert_true(nested_sum());
}

static void *crowd_member(void *unused) {
  (void)unused;
  int good = 1;
  for (int i = 0; i < 20; i++) good &= each_once(500, 4) && nested_sum();
  return (void *)(intptr_t)good;
}
static void pool_serves_many_threads(void **state) {
  (void)state;
  pthread_t t[8];
  for (int i = 0; i < 8; i++) assert_int_equal(pthread_create(&t[i], NULL, crowd_member, NULL), 0);
  for (int i = 0; i < 8; i++) {
    void *good;
    pthread_join(t[i], &good);
    assert_true(good != NULL);
  }
}

/* Each of the two waits for the other: only a second thread can let them pass. */
static void meet_task(void *ctx, size_t i) {
  int *here = ctx;
  (void)i;
  __atomic_fetch_add(here, 1, __ATOMIC_SEQ_CST);
  for (int ms = 0; ms < PATIENCE_MS && __atomic_load_n(here, __ATOMIC_SEQ_CST) < 2; ms++) pause_ms(1);
}
static int two_at_once(void) {
  int here = 0;
  vs_pool_run(2, 2, meet_task, &here);
  return here == 2;
}
static void pool_works_in_parallel(void **state) {
  (void)state;
  struct timespec a, b;
  clock_gettime(CLOCK_MONOTONIC, &a);
  assert_true(two_at_once());
  clock_gettime(CLOCK_MONOTONIC, &b);
  assert_true(b.tv_sec - a.tv_sec < PATIENCE_MS / 1000); /* met, and did not just lose patience */
}

static void crowding_task(void *ctx, size_t i) {
  counts *c = ctx;
  int now = __atomic_add_fetch(&c->inside, 1, __ATOMIC_SEQ_CST), most = __atomic_load_n(&c->most, __ATOMIC_SEQ_CST);
  (void)i;
  while (now > most && !__atomic_compare_exchange_n(&c->most, &most, now, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
    continue;
  pause_ms(1);
  __atomic_fetch_sub(&c->inside, 1, __ATOMIC_SEQ_CST);
}
static void pool_keeps_the_cap(void **state) {
  (void)state;
  counts *c = calloc(1, sizeof *c);
  vs_pool_run(64, 16, crowding_task, c); /* so that there are threads to spare */
  c->most = 0;
  vs_pool_run(200, 3, crowding_task, c);
  assert_in_range(c->most, 1, 3);
  free(c);
}

typedef struct mask_check {
  pthread_t caller;
  int others, open; /* calls on pool threads; of these, with a signal not blocked; atomic */
} mask_check;
static void mask_task(void *ctx, size_t i) {
  mask_check *m = ctx;
  sigset_t now;
  (void)i;
  pause_ms(2);
  if (pthread_equal(pthread_self(), m->caller)) return;
  pthread_sigmask(SIG_SETMASK, NULL, &now);
  __atomic_fetch_add(&m->others, 1, __ATOMIC_RELAXED);
  const int signals[] = {SIGINT, SIGTERM, SIGUSR1, SIGALRM, SIGCHLD, SIGPIPE};
  for (size_t s = 0; s < sizeof signals / sizeof *signals; s++)
    if (!sigismember(&now, signals[s])) __atomic_fetch_add(&m->open, 1, __ATOMIC_RELAXED);
}
static void pool_threads_block_signals(void **state) {
  (void)state;
  mask_check m = {.caller = pthread_self()};
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, NULL, &before);
  for (int i = 0; i < 100 && !m.others; i++) vs_pool_run(64, 4, mask_task, &m);
  pthread_sigmask(SIG_SETMASK, NULL, &after);
  assert_true(m.others > 0);
  assert_int_equal(m.open, 0);
  for (int s = 1; s < 32; s++) assert_int_equal(sigismember(&before, s), sigismember(&after, s));
}

static void pool_works_after_fork(void **state) {
  (void)state;
  if (!FORKED_THREADS) skip();
  assert_true(two_at_once()); /* the parent has threads */
  for (int i = 0; i < 5; i++) {
    pid_t pid = fork();
    if (!pid) _exit(two_at_once() && each_once(1000, 4) && nested_sum() ? 0 : 1);
    assert_int_equal(wait_child(pid), 0);
  }
  assert_true(each_once(1000, 4));
}

/* Forks while other threads hold the pool's lock every few microseconds: the child must not inherit it locked. */
static int stop_churning; /* atomic */
static void *churn(void *unused) {
  (void)unused;
  while (!__atomic_load_n(&stop_churning, __ATOMIC_RELAXED)) each_once(8, 4);
  return NULL;
}
static void pool_works_after_fork_in_a_run(void **state) {
  (void)state;
  if (!FORKED_THREADS) skip();
  pthread_t t[4];
  __atomic_store_n(&stop_churning, 0, __ATOMIC_RELAXED);
  for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&t[i], NULL, churn, NULL), 0);
  int bad = 0;
  for (int i = 0; i < 40; i++) {
    pid_t pid = fork();
    if (!pid) {
      uint64_t out[100];
      vs_pool_run(100, 4, square_task, out);
      _exit(out[99] == 99 * 99 && out[1] == 1 ? 0 : 1);
    }
    bad += wait_child(pid) != 0;
  }
  __atomic_store_n(&stop_churning, 1, __ATOMIC_RELAXED);
  for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
  assert_int_equal(bad, 0);
}

static void slow_task(void *ctx, size_t i) {
  (void)ctx, (void)i;
  pause_ms(2);
}
static void *slow_run(void *unused) {
  (void)unused;
  vs_pool_run(1000000, 4, slow_task, NULL);
  return NULL;
}
static int exit_while_running(void) {
  pthread_t t;
  if (!each_once(100, 4) || pthread_create(&t, NULL, slow_run, NULL)) return 1;
  pthread_detach(t);
  pause_ms(20);
  return 0; /* from main: atexit handlers and destructors run under the working threads */
}
static void exit_neither_hangs_nor_crashes(void **state) {
  (void)state;
  for (int i = 0; i < 5; i++) assert_int_equal(rerun("exit-while-running", NULL), 0);
}

static void threads_follow_environment_and_mask(void **state) {
  (void)state;
  cpu_set_t mask;
  assert_int_equal(sched_getaffinity(0, sizeof mask, &mask), 0);
  int cpus = CPU_COUNT(&mask);
  assert_int_equal(rerun("threads", "3"), 3);
  assert_int_equal(rerun("threads", "1"), 1);
  assert_int_equal(rerun("threads", "99999999999999999999"),
                   200); /* clipped to 256; the exit status says 200 for more */
  int by_default = rerun("threads", NULL);
  assert_in_range(by_default, 1, cpus);
  assert_int_equal(rerun("threads", "0"), by_default);
  assert_int_equal(rerun("threads", "-4"), by_default);
  assert_int_equal(rerun("threads", "many"), by_default);
  assert_int_equal(rerun("threads-on-one-cpu", NULL), 1);
}
static int report_threads(int one_cpu) {
  cpu_set_t mask;
  if (one_cpu && !sched_getaffinity(0, sizeof mask, &mask)) {
    int first = 0;
    while (!CPU_ISSET(first, &mask)) first++;
    CPU_ZERO(&mask);
    CPU_SET(first, &mask);
    if (sched_setaffinity(0, sizeof mask, &mask)) return 98;
  }
  int n = vs_threads();
  return n == 256 ? 200 : n > 256 ? 97 : n;
}

/* ---- local files ---- */

static uint8_t byte_at(uint64_t i) { return (uint8_t)(i * 7 + (i >> 8) + 1); }

static void make_file(char path[128], const char *name, size_t n) {
  snprintf(path, 128, "%s/%s", folder, name);
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  for (size_t i = 0; i < n; i++) fputc(byte_at(i), f);
  assert_int_equal(fclose(f), 0);
}

static void check_range(vs_io *io, uint64_t off, uint64_t len) {
  vs_err err = {0};
  vs_range r = {.off = off, .len = len};
  assert_int_equal(vs_io_fetch(io, &r, 1, &err), VS_OK);
  assert_non_null(r.ptr);
  for (uint64_t i = 0; i < len; i++) assert_int_equal(r.ptr[i], byte_at(off + i));
  /* A map shows the file's next bytes here; behind the end both ways show zeros. */
  unsigned sum = 0;
  for (uint64_t i = 0; i < VS_IO_PAD; i++) sum += r.ptr[len + i];
  if (off + len == io->size) assert_int_equal(sum, 0);
  vs_io_release(io, &r, 1);
}

static void files_of_every_size(void **state) {
  (void)state;
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const size_t sizes[] = {
      0,        1,        63,           64, page - 65, page - 64, page - 63, page - 1, page, page + 1, 2 * page - 64,
      2 * page, 3 * page, 3 * page + 17};
  char path[128];
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    for (int map = 0; map <= 1; map++) {
      size_t n = sizes[s];
      vs_err err = {0};
      vs_io *io;
      make_file(path, "sized", n);
      assert_int_equal(io_local_open(path, map, &io, &err), VS_OK);
      assert_int_equal(io->size, n);
      assert_int_equal(io->stable, map);
      assert_string_equal(io->name, path);
      const uint64_t offs[] = {0, n / 3, n > 64 ? n - 64 : 0, n ? n - 1 : 0, n};
      for (size_t o = 0; o < 5; o++) check_range(io, offs[o], n - offs[o]), check_range(io, offs[o], 0);
      vs_io_close(io);
    }
}

static void many_ranges_at_once(void **state) {
  (void)state;
  char path[128];
  make_file(path, "ranges", 10000);
  for (int map = 0; map <= 1; map++) {
    vs_err err = {0};
    vs_io *io;
    vs_range r[50];
    assert_int_equal(io_local_open(path, map, &io, &err), VS_OK);
    for (size_t i = 0; i < 50; i++) r[i] = (vs_range){.off = i * 190, .len = i * 10};
    assert_int_equal(vs_io_fetch(io, r, 50, &err), VS_OK);
    for (size_t i = 0; i < 50; i++)
      for (uint64_t j = 0; j < r[i].len; j++) assert_int_equal(r[i].ptr[j], byte_at(r[i].off + j));
    vs_io_release(io, r, 50);
    vs_io_close(io);
  }
}

static void ranges_outside_are_corrupt(void **state) {
  (void)state;
  char path[128];
  make_file(path, "outside", 100);
  const vs_range outside[] = {{.off = 101},
                              {.off = 100, .len = 1},
                              {.off = 50, .len = 51},
                              {.off = UINT64_MAX, .len = 2},
                              {.off = 2, .len = UINT64_MAX}};
  for (int map = 0; map <= 1; map++)
    for (size_t i = 0; i < sizeof outside / sizeof *outside; i++) {
      vs_err err = {0};
      vs_io *io;
      assert_int_equal(io_local_open(path, map, &io, &err), VS_OK);
      vs_range r[2] = {{.off = 0, .len = 10}, outside[i]};
      assert_int_equal(vs_io_fetch(io, r, 2, &err), VS_CORRUPT);
      assert_non_null(strstr(err.text, path));
      vs_io_close(io);
    }
}

static void short_read_names_file_and_offset(void **state) {
  (void)state;
  char path[128];
  vs_err err = {0};
  vs_io *io;
  make_file(path, "cut", 5000);
  assert_int_equal(io_local_open(path, 0, &io, &err), VS_OK);
  assert_int_equal(truncate(path, 3000), 0);
  vs_range r[2] = {{.off = 10, .len = 20}, {.off = 2000, .len = 3000}}; /* the first succeeds and must be freed */
  assert_int_equal(vs_io_fetch(io, r, 2, &err), VS_IO);
  assert_non_null(strstr(err.text, path));
  assert_non_null(strstr(err.text, "3000"));
  vs_io_close(io);
}

static void expect_open_error(const char *path, vs_rc want) {
  for (int map = -1; map <= 1; map++) {
    vs_err err = {0};
    vs_io *io = (vs_io *)&err;
    assert_int_equal(io_local_open(path, map, &io, &err), want);
    assert_null(io);
    assert_int_equal(err.rc, want);
    assert_non_null(strstr(err.text, path));
  }
}
static void what_is_no_file_is_refused(void **state) {
  (void)state;
  char path[128];
  snprintf(path, sizeof path, "%s/missing", folder);
  expect_open_error(path, VS_NOTFOUND);
  expect_open_error(folder, VS_INVALID);
  expect_open_error("/dev/zero", VS_INVALID);
  snprintf(path, sizeof path, "%s/fifo", folder);
  assert_int_equal(mkfifo(path, 0600), 0);
  expect_open_error(path, VS_INVALID); /* and does not wait for a writer */
  unlink(path);
}

static int count_fds(void) {
  int n = 0;
  for (int fd = 0; fd < 1000; fd++) n += fcntl(fd, F_GETFD) != -1;
  return n;
}
static void environment_chooses_and_no_handle_leaks(void **state) {
  (void)state;
  char path[128];
  vs_err err = {0};
  vs_io *io;
  make_file(path, "env", 100);
  int before = count_fds();
  const struct { const char *value; int stable; } cases[] = {{NULL, 1}, {"1", 1}, {"0", 0}};
  for (size_t i = 0; i < 3; i++) {
    if (cases[i].value) setenv("VECSHARD_MMAP", cases[i].value, 1);
    else unsetenv("VECSHARD_MMAP");
    assert_int_equal(io_local_open(path, -1, &io, &err), VS_OK);
    assert_int_equal(io->stable, cases[i].stable);
    assert_int_equal(count_fds(), before + !cases[i].stable);
    vs_io_close(io);
    assert_int_equal(count_fds(), before);
  }
  unsetenv("VECSHARD_MMAP");
  expect_open_error(folder, VS_INVALID);
  assert_int_equal(count_fds(), before);
  vs_io_close(NULL);
}

/* Of a map that is not in memory, what is wanted is read, and not all that lies around it. Where a file cannot be put out of memory
 * (tmpfs) there is only the first to see. */
static void what_is_wanted_is_read(void **state) {
  (void)state;
  enum { SIZE = 8 << 20, FROM = 3 << 20, LENGTH = 9000, FAR = 300 * 4096 };
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  char path[512];
  uint8_t *bytes = malloc(SIZE);
  static unsigned char in[SIZE / 4096];
  vs_err err = {0};
  vs_io *io;
  for (size_t i = 0; i < SIZE; i++) bytes[i] = byte_at(i);
  snprintf(path, sizeof path, "%s/want", folder);
  int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
  assert_int_equal(write(fd, bytes, SIZE), SIZE);
  assert_int_equal(fsync(fd), 0);
  assert_int_equal(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
  close(fd);
  assert_int_equal(io_local_open(path, 1, &io, &err), VS_OK);
  vs_range r = {.off = 0, .len = 1};
  assert_int_equal(vs_io_fetch(io, &r, 1, &err), VS_OK);
  void *map = (void *)(uintptr_t)r.ptr;
  assert_int_equal(mincore(map, SIZE, in), 0);
  int dropped = !(in[FROM / page] & 1), resident = 0;
  vs_io_want(io, FROM, LENGTH);
  for (int turn = 0; turn < 500 && !resident; turn++) { /* it is read in the background */
    assert_int_equal(mincore(map, SIZE, in), 0);
    resident = in[FROM / page] & in[(FROM + LENGTH - 1) / page] & 1;
    if (!resident) usleep(10000);
  }
  assert_true(resident);
  if (dropped) assert_false(in[(FROM + FAR) / page] & 1);
  for (int i = 0; i < 1000; i++) vs_io_want(io, (uint64_t)i * 8000, 100); /* more and more of it is in memory */
  vs_io_want(io, 0, SIZE);
  vs_io_want(io, SIZE - 1, 1);
  r = (vs_range){.off = FROM, .len = LENGTH};
  assert_int_equal(vs_io_fetch(io, &r, 1, &err), VS_OK);
  assert_memory_equal(r.ptr, bytes + FROM, LENGTH);
  vs_io_close(io);
  free(bytes);
  unlink(path);
}

typedef struct shared_io {
  vs_io *io;
  int wrong; /* atomic */
} shared_io;
static void fetch_task(void *ctx, size_t i) {
  shared_io *s = ctx;
  vs_range r = {.off = i * 16, .len = 333};
  int wrong = vs_io_fetch(s->io, &r, 1, NULL) != VS_OK;
  for (uint64_t j = 0; !wrong && j < r.len; j++) wrong = r.ptr[j] != byte_at(r.off + j);
  if (r.ptr) vs_io_release(s->io, &r, 1);
  __atomic_fetch_add(&s->wrong, wrong, __ATOMIC_RELAXED);
}
static void fetches_from_many_threads(void **state) {
  (void)state;
  char path[128];
  make_file(path, "threads", 20000);
  for (int map = 0; map <= 1; map++) {
    vs_err err = {0};
    shared_io s = {0};
    assert_int_equal(io_local_open(path, map, &s.io, &err), VS_OK);
    vs_pool_run(1000, 4, fetch_task, &s);
    assert_int_equal(s.wrong, 0);
    vs_io_close(s.io);
  }
}

static int make_folder(void **state) {
  (void)state;
  strcpy(folder, "/tmp/vs_test_base-XXXXXX");
  return mkdtemp(folder) ? 0 : -1;
}
static int remove_folder(void **state) {
  static const char *const names[] = {"sized", "ranges", "outside", "cut", "env", "threads"};
  char path[128];
  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    snprintf(path, sizeof path, "%s/%s", folder, names[i]);
    unlink(path);
  }
  return rmdir(folder);
}

int main(int argc, char **argv) {
  if (argc == 2 && !strcmp(argv[1], "exit-while-running")) return exit_while_running();
  if (argc == 2 && !strcmp(argv[1], "threads")) return report_threads(0);
  if (argc == 2 && !strcmp(argv[1], "threads-on-one-cpu")) return report_threads(1);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(errors_keep_the_first),
      cmocka_unit_test(pool_calls_each_index_once),
      cmocka_unit_test(pool_results_are_visible),
      cmocka_unit_test(pool_runs_nest),
      cmocka_unit_test(pool_serves_many_threads),
      cmocka_unit_test(pool_works_in_parallel),
      cmocka_unit_test(pool_keeps_the_cap),
      cmocka_unit_test(pool_threads_block_signals),
      cmocka_unit_test(pool_works_after_fork),
      cmocka_unit_test(pool_works_after_fork_in_a_run),
      cmocka_unit_test(exit_neither_hangs_nor_crashes),
      cmocka_unit_test(threads_follow_environment_and_mask),
      cmocka_unit_test(files_of_every_size),
      cmocka_unit_test(many_ranges_at_once),
      cmocka_unit_test(ranges_outside_are_corrupt),
      cmocka_unit_test(short_read_names_file_and_offset),
      cmocka_unit_test(what_is_no_file_is_refused),
      cmocka_unit_test(environment_chooses_and_no_handle_leaks),
      cmocka_unit_test(what_is_wanted_is_read),
      cmocka_unit_test(fetches_from_many_threads),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
