/* s3_engine.c - see s3_engine.h.
 *
 * One mutex guards the queue of new jobs, the cancel marks and the ends of jobs; it is held for a few instructions, never
 * over I/O. Everything else of a job belongs to the engine's thread from s3_submit until it is finished.
 */
#include "s3_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../base/vs_pool.h"
#include "../base/vs_scope.h"
#include "s3_exchange.h"

enum {
  MAX_CONNECTIONS = 512,     /* and a third of the descriptors that this process may have */
  MIN_CONNECTIONS = 16,
  KEEP_EASY = 64,            /* idle easy handles kept for later jobs */
  CONNECT_TIMEOUT_MS = 5000,
  STALL_SECONDS = 10,        /* not a byte for so long: a new attempt */
  BACKOFF_MS = 50,           /* bound of the first delay; doubles */
  BACKOFF_MAX_MS = 5000,
  CONNECT_TRIES = 4,         /* a host that refuses or has no address will hardly appear within the deadline */
  DEFAULT_TIMEOUT_MS = 60000,
  QUEUED_JOB_MS = 20,        /* more for each job that is under way already, ... */
  SLOW_BYTES_PER_MS = 125,   /* ... and for their bytes, at 1 Mbit/s */
  STOP_POLL_MS = 20
};

static struct {
  pthread_mutex_t lock;
  pthread_cond_t finished;
  s3_job *queue;              /* submitted, newest first */
  int running, stopping, cancels;
  uint64_t n_jobs, n_bytes;   /* under way */
  pthread_t thread;
  CURLM *multi;
  int *sockets;               /* open ones, for a forked child to close */
  size_t n_sockets, room_sockets;
} E = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The engine thread's own. */
static struct {
  s3_job *active, *waiting;
  CURL *idle[KEEP_EASY];
  size_t n_idle;
  uint64_t random;
} T;

static pthread_once_t init_once = PTHREAD_ONCE_INIT;
static int init_failed;

int64_t s3_clock_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int64_t s3_timeout_ms(void) {
  const vs_scope *s = vs_scope_current();
  if (s && s->timeout_ms > 0) return s->timeout_ms;
  const char *text = getenv("VECSHARD_TIMEOUT_MS");
  long long ms = text ? strtoll(text, NULL, 10) : 0;
  return ms > 0 && ms <= 86400000 ? ms : DEFAULT_TIMEOUT_MS;
}

/* ---- jobs ---- */

s3_job *s3_job_new(s3_place *place, s3_method method, const char *key) {
  s3_job *j = calloc(1, sizeof *j);
  char *copy = strdup(key);
  if (!j || !copy) {
    free(j), free(copy);
    return NULL;
  }
  j->place = s3_place_share(place);
  j->method = method, j->key = copy, j->len = UINT64_MAX, j->total = UINT64_MAX, j->modified = -1;
  j->max_data = SIZE_MAX, j->timeout_ms = s3_timeout_ms(), j->refs = 1;
  strcpy(j->payload_hash, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"); /* of nothing */
  return j;
}

void s3_job_release(s3_job *j) {
  if (!j) return;
  pthread_mutex_lock(&E.lock);
  int last = --j->refs == 0;
  pthread_mutex_unlock(&E.lock);
  if (!last) return;
  s3_place_close(j->place);
  free(j->key), free(j->query), free(j->pieces), free(j->data), free(j->error_body);
  free(j);
}

static uint64_t job_bytes(const s3_job *j) { return j->body_len + (j->method == S3_GET && j->len != UINT64_MAX ? j->len : 0); }

/* The job's end: tells whoever waits. */
static void finish(s3_job *j) {
  if (j->rc == VS_OK) j->err.text[0] = 0;
  if (j->done) j->done(j);
  pthread_mutex_lock(&E.lock);
  j->finished = 1;
  E.n_jobs--, E.n_bytes -= job_bytes(j);
  pthread_cond_broadcast(&E.finished);
  pthread_mutex_unlock(&E.lock);
  s3_job_release(j);
}

/* ---- sockets: known, so that a forked child can close its copies without a word to the server ---- */

static curl_socket_t on_open_socket(void *ctx, curlsocktype purpose, struct curl_sockaddr *a) {
  (void)ctx, (void)purpose;
  int fd = socket(a->family, a->socktype | SOCK_CLOEXEC, a->protocol);
  if (fd < 0) return CURL_SOCKET_BAD;
  pthread_mutex_lock(&E.lock);
  if (E.n_sockets == E.room_sockets) {
    size_t room = E.room_sockets * 2 + 16;
    int *grown = realloc(E.sockets, room * sizeof *grown);
    if (grown) E.sockets = grown, E.room_sockets = room;
  }
  if (E.n_sockets < E.room_sockets) E.sockets[E.n_sockets++] = fd;
  pthread_mutex_unlock(&E.lock);
  return fd;
}

static int on_close_socket(void *ctx, curl_socket_t fd) {
  (void)ctx;
  pthread_mutex_lock(&E.lock);
  for (size_t i = 0; i < E.n_sockets; i++)
    if (E.sockets[i] == fd) {
      E.sockets[i] = E.sockets[--E.n_sockets];
      break;
    }
  pthread_mutex_unlock(&E.lock);
  return close(fd);
}

/* ---- attempts ---- */

static void drop_easy(s3_job *j) {
  if (!j->easy) return;
  curl_multi_remove_handle(E.multi, j->easy);
  curl_easy_reset(j->easy);
  if (T.n_idle < KEEP_EASY) T.idle[T.n_idle++] = j->easy;
  else curl_easy_cleanup(j->easy);
  curl_slist_free_all(j->headers);
  j->easy = NULL, j->headers = NULL;
}

static long stall_seconds(const s3_job *j) { return j->timeout_ms < STALL_SECONDS * 1000 ? (long)(j->timeout_ms + 999) / 1000 : (long)STALL_SECONDS; }

static void start(s3_job *j) {
  s3_attempt a = {0};
  vs_err err = {0};
  exchange_forget(j);
  j->tries++;
  vs_rc rc = s3_place_sign(j->place, j, &a, &err);
  if (!rc) {
    j->easy = T.n_idle ? T.idle[--T.n_idle] : curl_easy_init();
    if (!j->easy) rc = vs_nomem(&err);
  }
  if (!rc) {
    curl_easy_setopt(j->easy, CURLOPT_OPENSOCKETFUNCTION, on_open_socket);
    curl_easy_setopt(j->easy, CURLOPT_CLOSESOCKETFUNCTION, on_close_socket);
    if (!exchange_prepare(j, &a, stall_seconds(j), CONNECT_TIMEOUT_MS) || curl_multi_add_handle(E.multi, j->easy)) rc = vs_nomem(&err);
  }
  j->generation = a.generation;
  s3_attempt_reset(&a);
  if (!rc) {
    j->next = T.active, T.active = j;
    return;
  }
  drop_easy(j);
  j->rc = rc, j->err = err;
  finish(j);
}

static uint64_t random_below(uint64_t n) {
  if (!T.random && getrandom(&T.random, sizeof T.random, GRND_NONBLOCK) != sizeof T.random) T.random = (uint64_t)s3_clock_ms() | 1;
  T.random ^= T.random << 13, T.random ^= T.random >> 7, T.random ^= T.random << 17; /* xorshift64, Marsaglia 2003 */
  return n ? T.random % n : 0;
}

/* Another attempt after a delay, if the deadline leaves room for it; else the job ends with `what`. */
static void try_again(s3_job *j, int64_t at_least_ms, vs_rc rc, const char *what) {
  unsigned shift = j->tries < 8 ? j->tries - 1 : 7;
  uint64_t bound = (uint64_t)BACKOFF_MS << shift;
  int64_t now = s3_clock_ms(), delay = (int64_t)random_below(bound < BACKOFF_MAX_MS ? bound : BACKOFF_MAX_MS);
  if (delay < at_least_ms) delay = at_least_ms;
  if (now + delay >= j->deadline || j->connect_failures >= CONNECT_TRIES) {
    exchange_fail(j, rc, what);
    finish(j);
    return;
  }
  j->not_before = now + delay;
  j->next = T.waiting, T.waiting = j;
}

/* ---- the end of an attempt ---- */

static void curl_failed(s3_job *j, CURLcode code) {
  char what[512];
  const char *text = j->curl_error[0] ? j->curl_error : curl_easy_strerror(code);
  if (code == CURLE_COULDNT_RESOLVE_PROXY) text = curl_easy_strerror(code); /* curl's own shows the proxy's password */
  if (code == CURLE_COULDNT_CONNECT || code == CURLE_COULDNT_RESOLVE_HOST || code == CURLE_COULDNT_RESOLVE_PROXY ||
      code == CURLE_SSL_CONNECT_ERROR)
    j->connect_failures++;
  else j->connect_failures = 0;
  snprintf(what, sizeof what, "no answer: %s", text);
  if (exchange_code_passes(code)) try_again(j, 0, VS_IO, what);
  else {
    exchange_fail(j, code == CURLE_OUT_OF_MEMORY ? VS_NOMEM : VS_IO, what);
    finish(j);
  }
}

static int is_one_of(const char *code, const char *const *names) {
  for (; *names; names++)
    if (!strcmp(code, *names)) return 1;
  return 0;
}

/* One wrong region, one old credential, one wrong clock can be put right. 1: try again at once. */
static int put_right(s3_job *j, const s3_xml_error *x, const char *region, const char *date) {
  static const char *const expired[] = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired", "InvalidToken", NULL};
  if (region && !j->fixed_region && (j->status == 301 || j->status == 307 || j->status == 400)) {
    j->fixed_region = 1;
    return s3_place_new_region(j->place, region, j->generation);
  }
  if (x->region[0] && !j->fixed_region && (j->status == 301 || j->status == 400)) {
    j->fixed_region = 1;
    return s3_place_new_region(j->place, x->region, j->generation);
  }
  if (!strcmp(x->code, "RequestTimeTooSkewed") && date && !j->fixed_clock) {
    j->fixed_clock = 1;
    return s3_place_set_clock(j->place, (int64_t)curl_getdate(date, NULL), j->generation);
  }
  if (is_one_of(x->code, expired) && !j->fixed_credentials) {
    j->fixed_credentials = 1;
    return s3_place_new_credentials(j->place, j->generation);
  }
  return 0;
}

static void http_failed(s3_job *j) {
  s3_xml_error x;
  char what[700], region[64] = "", date[64] = "";
  const char *r = exchange_header(j->easy, "x-amz-bucket-region"), *d = exchange_header(j->easy, "Date");
  int64_t after = exchange_retry_after_ms(j->easy);
  if (r && strlen(r) < sizeof region) strcpy(region, r);
  if (d && strlen(d) < sizeof date) strcpy(date, d);
  s3_xml_read_error(j->error_body, j->n_error, &x);
  snprintf(j->code, sizeof j->code, "%s", x.code);
  drop_easy(j);
  exchange_describe(j, &x, what, sizeof what);
  j->connect_failures = 0;
  if (put_right(j, &x, region[0] ? region : NULL, date[0] ? date : NULL)) try_again(j, 0, exchange_rc(j), what);
  else if (exchange_status_passes(j)) try_again(j, after, exchange_rc(j), what);
  else {
    exchange_fail(j, exchange_rc(j), what);
    finish(j);
  }
}

static void attempt_ended(s3_job *j, CURLcode code) {
  if (code == CURLE_OK) exchange_look_at_status(j);
  else exchange_look_at_refusal(j);
  if (code == CURLE_OK && exchange_is_ranged(j) && j->status == 200) j->total = j->have; /* a whole object, maybe of a length not told before */
  if (j->refused) {
    drop_easy(j);
    finish(j);
  } else if (j->cut) {
    drop_easy(j);
    j->connect_failures++; /* no server does this for long */
    try_again(j, 0, VS_IO, "the head of the answer was cut short");
  } else if (j->status / 100 != 2 && (code == CURLE_OK || (j->status >= 300 && !exchange_status_passes(j)))) http_failed(j);
  else if (code == CURLE_OK && exchange_is_ranged(j) && j->have < j->len && !(j->may_be_shorter && exchange_is_at_end(j))) {
    drop_easy(j);
    if (exchange_is_at_end(j)) { /* not cut on the way: there is no more */
      exchange_fail(j, VS_CORRUPT, "the object is shorter than it should be (truncated?)");
      finish(j);
    } else try_again(j, 0, VS_IO, "the answer was cut short");
  } else if (code == CURLE_OK) {
    drop_easy(j);
    j->rc = VS_OK;
    finish(j);
  } else {
    drop_easy(j);
    curl_failed(j, code);
  }
}

/* ---- the loop ---- */

static void unlink_active(s3_job *j) {
  for (s3_job **at = &T.active; *at; at = &(*at)->next)
    if (*at == j) {
      *at = j->next;
      return;
    }
}

static void collect_ends(void) {
  CURLMsg *m;
  int left;
  while ((m = curl_multi_info_read(E.multi, &left))) {
    s3_job *j = NULL;
    CURLcode code = m->data.result;
    if (m->msg != CURLMSG_DONE) continue;
    curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &j);
    unlink_active(j);
    attempt_ended(j, code);
  }
}

/* Ends a job at once: it was cancelled, or the process ends. */
static void give_up(s3_job *j) {
  drop_easy(j);
  j->rc = vs_fail(&j->err, VS_INTERRUPT, "interrupted");
  finish(j);
}

static void take_queue(int *stop, int *cancels) {
  pthread_mutex_lock(&E.lock);
  s3_job *taken = E.queue, *in_order = NULL;
  E.queue = NULL;
  *stop = E.stopping, *cancels = E.cancels;
  E.cancels = 0;
  pthread_mutex_unlock(&E.lock);
  while (taken) {
    s3_job *j = taken;
    taken = j->next, j->next = in_order, in_order = j;
  }
  while (in_order) {
    s3_job *j = in_order;
    in_order = j->next;
    if (*stop) give_up(j);
    else start(j);
  }
}

static int is_cancelled(s3_job *j) { return __atomic_load_n(&j->cancelled, __ATOMIC_ACQUIRE); }

static void drop_cancelled(s3_job **list) {
  for (s3_job **at = list; *at;) {
    s3_job *j = *at;
    if (!is_cancelled(j)) at = &j->next;
    else {
      *at = j->next;
      give_up(j);
    }
  }
}

static void give_up_all(s3_job **list) {
  while (*list) {
    s3_job *j = *list;
    *list = j->next;
    give_up(j);
  }
}

/* Starts what has waited long enough; returns the milliseconds until the next one. */
static int start_waiting(void) {
  int64_t now = s3_clock_ms(), next = 60000;
  s3_job *due = NULL;
  for (s3_job **at = &T.waiting; *at;) {
    s3_job *j = *at;
    if (j->not_before <= now) *at = j->next, j->next = due, due = j;
    else {
      if (j->not_before - now < next) next = j->not_before - now;
      at = &j->next;
    }
  }
  while (due) {
    s3_job *j = due;
    due = j->next;
    start(j);
  }
  return (int)next;
}

static void *engine_main(void *arg) {
  int stop = 0, cancels = 0, running = 0;
  (void)arg;
  pthread_setname_np(pthread_self(), VS_THREAD_NAME " net"); /* libcurl's threads for look-ups of names inherit it */
  for (;;) {
    take_queue(&stop, &cancels);
    if (stop) {
      give_up_all(&T.active), give_up_all(&T.waiting);
      return NULL; /* curl's memory goes with the process */
    }
    if (cancels) drop_cancelled(&T.active), drop_cancelled(&T.waiting);
    int timeout = start_waiting();
    curl_multi_perform(E.multi, &running);
    collect_ends();
    /* what ended may have been put off by less than timeout; the queue wakes the poll */
    if (T.waiting) {
      int again = start_waiting();
      if (again < timeout) timeout = again;
      curl_multi_perform(E.multi, &running);
      collect_ends();
    }
    curl_multi_poll(E.multi, NULL, 0, T.waiting && timeout > 50 ? 50 : timeout, NULL);
  }
}

/* ---- the thread's life ---- */

static void stop_at_exit(void) {
  pthread_mutex_lock(&E.lock);
  int running = E.running;
  E.stopping = 1;
  if (running) curl_multi_wakeup(E.multi);
  pthread_mutex_unlock(&E.lock);
  if (!running) return;
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 2;
  pthread_timedjoin_np(E.thread, NULL, &until);
}

/* Waits are counted by the monotonic clock: a clock that is set must not make them long. */
static void make_condition(void) {
  pthread_condattr_t attr;
  pthread_condattr_init(&attr);
  pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  pthread_cond_init(&E.finished, &attr);
  pthread_condattr_destroy(&attr);
}

static void before_fork(void) { pthread_mutex_lock(&E.lock); }
static void in_parent(void) { pthread_mutex_unlock(&E.lock); }
/* Jobs and curl's memory of the parent are left alone: taking them down would speak to the parent's servers. */
static void in_child(void) {
  for (size_t i = 0; i < E.n_sockets; i++) close(E.sockets[i]);
  E.n_sockets = 0, E.queue = NULL, E.running = 0, E.n_jobs = E.n_bytes = 0, E.cancels = 0, E.multi = NULL;
  memset(&T, 0, sizeof T);
  make_condition();
  pthread_mutex_unlock(&E.lock);
}

static void init(void) {
  init_failed = curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK;
  make_condition();
  pthread_atfork(before_fork, in_parent, in_child);
  atexit(stop_at_exit); /* after curl_global_init, so that it runs before OpenSSL's own exit handler */
}

/* Requests that must wait for a connection make rounds of their own, so there are many; but the host needs descriptors, too. */
static long max_connections(void) {
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur / 3 >= MAX_CONNECTIONS) return MAX_CONNECTIONS;
  return limit.rlim_cur / 3 > MIN_CONNECTIONS ? (long)limit.rlim_cur / 3 : MIN_CONNECTIONS;
}

/* Call with the lock held. 0: no thread to be had. */
static int start_thread(void) {
  sigset_t all, old;
  if (E.stopping || init_failed) return 0;
  if (E.running) return 1;
  if (!E.multi && !(E.multi = curl_multi_init())) return 0;
  curl_multi_setopt(E.multi, CURLMOPT_MAXCONNECTS, max_connections());
  curl_multi_setopt(E.multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, max_connections());
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  E.running = pthread_create(&E.thread, NULL, engine_main, NULL) == 0;
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  return E.running;
}

void s3_submit(s3_job *j) {
  pthread_once(&init_once, init);
  j->round = vs_scope_next_round();
  pthread_mutex_lock(&E.lock);
  j->refs++;
  E.n_jobs++, E.n_bytes += job_bytes(j);
  /* what is before it in a slow line is not its fault */
  j->deadline = s3_clock_ms() + j->timeout_ms + (int64_t)((E.n_jobs - 1) * QUEUED_JOB_MS + E.n_bytes / SLOW_BYTES_PER_MS);
  int started = start_thread();
  if (started) {
    j->next = E.queue, E.queue = j;
    curl_multi_wakeup(E.multi);
  }
  pthread_mutex_unlock(&E.lock);
  if (started) return;
  j->rc = vs_fail(&j->err, VS_IO, "no thread or memory for network reads");
  finish(j);
}

static int is_finished_soon(s3_job *j) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += STOP_POLL_MS * 1000000;
  if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
  pthread_mutex_lock(&E.lock);
  while (!j->finished && pthread_cond_timedwait(&E.finished, &E.lock, &until) != ETIMEDOUT) continue;
  int finished = j->finished;
  pthread_mutex_unlock(&E.lock);
  return finished;
}

static void cancel(s3_job *j) {
  pthread_mutex_lock(&E.lock);
  __atomic_store_n(&j->cancelled, 1, __ATOMIC_RELEASE);
  E.cancels = 1;
  curl_multi_wakeup(E.multi);
  pthread_mutex_unlock(&E.lock);
}

static void count(s3_job *j, uint64_t round) {
  vs_scope *s = vs_scope_current();
  if (!s || j->counted) return;
  j->counted = 1;
  __atomic_fetch_add(&s->traffic.requests, j->tries, __ATOMIC_RELAXED);
  __atomic_fetch_add(&s->traffic.retries, j->tries ? j->tries - 1 : 0, __ATOMIC_RELAXED);
  __atomic_fetch_add(&s->traffic.bytes, j->n_data, __ATOMIC_RELAXED);
  vs_scope_round(round);
}

vs_rc s3_job_wait(s3_job *j, vs_err *err) {
  while (!is_finished_soon(j))
    if (!j->cancelled && vs_scope_stopped()) cancel(j);
  count(j, j->round);
  return j->rc ? vs_fail(err, j->rc, "%s", j->err.text) : VS_OK;
}
