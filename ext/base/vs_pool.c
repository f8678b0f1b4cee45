/* vs_pool.c - see vs_pool.h.
 *
 * Active runs stand in a list; a worker takes the first run that still has indices to hand out and room for a worker. A run
 * lives on its caller's stack: the caller takes it off the list when no index is left and then waits for the workers still
 * inside. One mutex guards the list and the counts of workers; indices are claimed with an atomic add.
 */
#include "vs_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_THREADS = 256 };

typedef struct pool_run {
  vs_task fn;
  void *ctx;
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

/* The child has none of the threads and starts with an empty pool of its own. */
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
  pthread_mutex_lock(&lock);
  for (;;) {
    pool_run *r = joinable();
    if (!r) {
      pthread_cond_wait(&work, &lock);
      continue;
    }
    r->room--, r->inside++;
    pthread_mutex_unlock(&lock);
    take_indices(r);
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

void vs_pool_run(size_t n, int threads, vs_task fn, void *ctx) {
  if (threads <= 0) threads = vs_threads();
  if ((size_t)threads > n) threads = (int)n;
  if (threads <= 1) {
    for (size_t i = 0; i < n; i++) fn(ctx, i);
    return;
  }
  pthread_once(&fork_once, guard_fork);
  pool_run r = {.fn = fn, .ctx = ctx, .n = n, .room = threads - 1};
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
  while (r.inside) pthread_cond_wait(&left, &lock);
  pthread_mutex_unlock(&lock);
}

/* ---- how many ---- */

/* Processors by the cgroup's quota, rounded up; 0 without a limit. */
static int cgroup_limit(void) {
  long long quota = 0, period = 0;
  FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
  if (f) {
    if (fscanf(f, "%lld %lld", &quota, &period) != 2) quota = 0;
    fclose(f);
  } else {
    f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "re");
    if (f && fscanf(f, "%lld", &quota) != 1) quota = 0;
    if (f) fclose(f);
    f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "re");
    if (f && fscanf(f, "%lld", &period) != 1) period = 0;
    if (f) fclose(f);
  }
  return quota > 0 && period > 0 ? (int)((quota + period - 1) / period) : 0;
}

static int count_threads(void) {
  const char *env = getenv("VECSHARD_THREADS");
  cpu_set_t set;
  if (env && atoi(env) > 0) return atoi(env) < MAX_THREADS ? atoi(env) : MAX_THREADS;
  int n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set), limit = cgroup_limit();
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
