/* vs_pool.c - see vs_pool.h.
 *
 * Active runs stand in a list; a worker takes the first run that still has indices to hand out and room for a worker. A
 * run lives on its caller's stack: the caller takes it off the list when no index is left and then waits for the
 * workers still inside. One mutex guards the list and the counts of workers; indices are claimed with an atomic add.
 * Workers are detached and sleep on static conditions when idle, so exit() neither joins them nor takes anything away
 * from under them.
 */
#include "vs_pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vs_scope.h"

enum { MAX_THREADS = 256, STOP_POLL_MS = 20 };

typedef struct pool_run {
  vs_task fn;
  void *ctx;
  vs_scope *scope;      /* the caller's, entered by its workers */
  size_t n, next;       /* next: atomic */
  int room;             /* workers that may still join */
  int inside;           /* workers in it now */
  struct pool_run *link;
} pool_run;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;
static pool_run *runs;
static int n_workers;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

/* The child has none of the threads and starts with an empty pool of its own. A run that was under way on the forking
 * thread itself cannot be finished in the child: its indices went to threads that are not there. */
static void child(void) {
  pthread_mutex_init(&lock, NULL);
  pthread_cond_init(&work, NULL);
  pthread_cond_init(&left, NULL);
  runs = NULL, n_workers = 0;
}
static void guard_fork(void) { pthread_atfork(NULL, NULL, child); }

static void take_indices(pool_run *r) {
  for (;;) {
    size_t i = __atomic_fetch_add(&r->next, 1, __ATOMIC_RELAXED);
    if (i >= r->n) return;
    r->fn(r->ctx, i);
  }
}

/* Call with the lock held. */
static pool_run *joinable(void) {
  for (pool_run *r = runs; r; r = r->link)
    if (r->room > 0 && __atomic_load_n(&r->next, __ATOMIC_RELAXED) < r->n) return r;
  return NULL;
}

static void *worker(void *unused) {
  (void)unused;
  pthread_setname_np(pthread_self(), VS_THREAD_NAME " pool");
  pthread_mutex_lock(&lock);
  for (;;) {
    pool_run *r = joinable();
    if (!r) {
      pthread_cond_wait(&work, &lock);
      continue;
    }
    r->room--, r->inside++;
    pthread_mutex_unlock(&lock);
    vs_scope_enter(r->scope);
    take_indices(r);
    vs_scope_enter(NULL);
    pthread_mutex_lock(&lock);
    if (--r->inside == 0) pthread_cond_broadcast(&left);
  }
  return NULL;
}

/* Call with the lock held. Failing to start a thread is no error: the callers do the work. */
static void start_workers(int want) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  while (n_workers < want && n_workers < MAX_THREADS) {
    pthread_t t;
    if (pthread_create(&t, NULL, worker, NULL)) break;
    pthread_detach(t);
    n_workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Waits for the workers of r, with the lock held. They may wait for a network, and whether to stop is asked on the caller's
 * thread only. */
static void wait_for_workers(const pool_run *r) {
  while (r->inside) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += STOP_POLL_MS * 1000000;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    if (pthread_cond_timedwait(&left, &lock, &until) != ETIMEDOUT) continue;
    pthread_mutex_unlock(&lock);
    vs_scope_stopped();
    pthread_mutex_lock(&lock);
  }
}

void vs_pool_run(size_t n, int threads, vs_task fn, void *ctx) {
  if (threads <= 0) threads = vs_threads();
  if ((size_t)threads > n) threads = (int)n;
  if (threads <= 1) {
    for (size_t i = 0; i < n; i++) fn(ctx, i);
    return;
  }
  pthread_once(&fork_once, guard_fork);
  pool_run r = {.fn = fn, .ctx = ctx, .scope = vs_scope_current(), .n = n, .room = threads - 1};
  pthread_mutex_lock(&lock);
  start_workers(threads - 1);
  r.link = runs, runs = &r;
  pthread_cond_broadcast(&work);
  pthread_mutex_unlock(&lock);
  take_indices(&r);
  pthread_mutex_lock(&lock);
  for (pool_run **at = &runs; *at; at = &(*at)->link)
    if (*at == &r) {
      *at = r.link;
      break;
    }
  wait_for_workers(&r); /* r is on this stack: no worker may still look at it */
  pthread_mutex_unlock(&lock);
}

/* ---- how many ---- */

/* Whole processors in a quota, rounded up; 0: no limit. */
static int processors(long long quota, long long period) {
  if (quota <= 0 || period <= 0) return 0;
  long long n = (quota - 1) / period + 1;
  return n < MAX_THREADS ? (int)n : MAX_THREADS;
}

/* Reads up to two numbers from a file of a control group; how many there were. */
static int read_numbers(const char *root, const char *group, const char *file, long long *a, long long *b) {
  char path[4400];
  if (snprintf(path, sizeof path, "%s%s/%s", root, group, file) >= (int)sizeof path) return 0;
  FILE *f = fopen(path, "re");
  if (!f) return 0;
  int n = fscanf(f, "%lld %lld", a, b); /* 0 for "max 100000" */
  fclose(f);
  return n;
}

static int limit_v2(const char *group) {
  long long quota, period;
  return read_numbers("/sys/fs/cgroup", group, "cpu.max", &quota, &period) == 2 ? processors(quota, period) : 0;
}

static int limit_v1(const char *group) {
  long long quota, period, unused;
  return read_numbers("/sys/fs/cgroup/cpu", group, "cpu.cfs_quota_us", &quota, &unused) == 1 &&
                 read_numbers("/sys/fs/cgroup/cpu", group, "cpu.cfs_period_us", &period, &unused) == 1
             ? processors(quota, period)
             : 0;
}

/* The least limit of a group and the groups around it: each of them binds. Inside a container the path may be the
 * host's and not exist here; the walk then ends at the root of the mount, which is the container's own group. Cuts
 * `group` to "". */
static int least_limit(char *group, int (*limit_of)(const char *)) {
  for (int least = 0;;) {
    int n = limit_of(group);
    if (n && (!least || n < least)) least = n;
    char *slash = strrchr(group, '/');
    if (!slash) return least;
    *slash = 0;
  }
}

/* A line of /proc/self/cgroup is "0::/group" (version 2) or "7:cpu,cpuacct:/group" (version 1). */
static int line_limit(char *line) {
  char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
  if (!group) return 0;
  *group++ = 0, controllers++;
  group[strcspn(group, "\n")] = 0;
  if (!*controllers) return least_limit(group, limit_v2);
  for (char *save, *c = strtok_r(controllers, ",", &save); c; c = strtok_r(NULL, ",", &save))
    if (!strcmp(c, "cpu")) return least_limit(group, limit_v1);
  return 0;
}

static int cgroup_limit(void) {
  char line[4200];
  int least = 0;
  FILE *f = fopen("/proc/self/cgroup", "re");
  while (f && fgets(line, sizeof line, f)) {
    int n = line_limit(line);
    if (n && (!least || n < least)) least = n;
  }
  if (f) fclose(f);
  return least;
}

/* The kernel refuses a mask smaller than its own: on a large machine cpu_set_t is too small, so the mask grows. */
static int affinity_count(void) {
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    size_t n_bytes = CPU_ALLOC_SIZE(cpus);
    cpu_set_t *set = CPU_ALLOC(cpus);
    if (!set) return 1;
    int failed = sched_getaffinity(0, n_bytes, set) ? errno : 0, n = failed ? 1 : CPU_COUNT_S(n_bytes, set);
    CPU_FREE(set);
    if (failed != EINVAL) return n;
  }
  return 1;
}

static int count_threads(void) {
  const char *env = getenv("VECSHARD_THREADS");
  long asked = env ? strtol(env, NULL, 10) : 0;
  if (asked > 0) return asked < MAX_THREADS ? (int)asked : MAX_THREADS;
  int n = affinity_count(), limit = cgroup_limit();
  if (limit && limit < n) n = limit;
  return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

static int n_threads;
static pthread_once_t count_once = PTHREAD_ONCE_INIT;
static void count(void) { n_threads = count_threads(); }

int vs_threads(void) {
  pthread_once(&count_once, count);
  return n_threads;
}
