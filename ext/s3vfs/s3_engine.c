/* s3_engine.c - see s3_engine.h.
 *
 * One mutex guards the queue of new jobs, the cancel marks and the ends of jobs; it is held for a few instructions, never
 * over I/O. Everything else of a job belongs to the engine's thread from s3_submit until it is finished.
 */
#include "s3_engine.h"

#include <curl/curl.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../base/vs_pool.h"
#include "../base/vs_scope.h"
#include "s3_xml.h"

enum {
  MAX_CONNECTIONS = 256,
  KEEP_EASY = 64,            /* idle easy handles kept for later jobs */
  CONNECT_TIMEOUT_MS = 5000,
  STALL_SECONDS = 10,        /* not a byte for so long: a new attempt */
  BACKOFF_MS = 50,           /* bound of the first delay; doubles */
  BACKOFF_MAX_MS = 5000,
  CONNECT_TRIES = 4,         /* a host that refuses or has no address will hardly appear within the deadline */
  ERROR_BODY = 65536,
  DEFAULT_TIMEOUT_MS = 60000,
  STOP_POLL_MS = 20
};

static struct {
  pthread_mutex_t lock;
  pthread_cond_t finished;
  s3_job *queue;              /* submitted, newest first */
  int running, stopping, cancels;
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

/* The job's end: tells whoever waits. */
static void finish(s3_job *j) {
  if (j->rc == VS_OK) j->err.text[0] = 0;
  if (j->done) j->done(j);
  pthread_mutex_lock(&E.lock);
  j->finished = 1;
  pthread_cond_broadcast(&E.finished);
  pthread_mutex_unlock(&E.lock);
  s3_job_release(j);
}

static void fail(s3_job *j, vs_rc rc, const char *what) {
  char *name = s3_place_name(j->place, j->key);
  vs_err_reset(&j->err);
  if (j->tries > 1) j->rc = vs_fail(&j->err, rc, "%s: %s (tried %u times)", name ? name : "S3", what, j->tries);
  else j->rc = vs_fail(&j->err, rc, "%s: %s", name ? name : "S3", what);
  free(name);
}

/* ---- what arrives ---- */

static const char *header(CURL *easy, const char *name) {
  struct curl_header *h;
  return curl_easy_header(easy, name, 0, CURLH_HEADER, -1, &h) == CURLHE_OK ? h->value : NULL;
}

static void refuse(s3_job *j, vs_rc rc, const char *what) {
  j->refused = 1;
  fail(j, rc, what);
}

static int is_ranged(const s3_job *j) { return j->method == S3_GET && j->len != UINT64_MAX; }

/* Reads "bytes 5-9/100". */
static int parse_content_range(const char *text, uint64_t *first, uint64_t *total) {
  unsigned long long a, b, t;
  int end = 0;
  if (!text || sscanf(text, "bytes %llu-%llu/%llu%n", &a, &b, &t, &end) != 3 || text[end]) return 0;
  *first = a, *total = t;
  return 1;
}

/* The head of a good answer, before its first body byte: is it what was asked for? */
static void take_head(s3_job *j) {
  const char *etag = header(j->easy, "ETag"), *modified = header(j->easy, "Last-Modified");
  uint64_t first;
  if (etag && strlen(etag) < sizeof j->etag) {
    if (j->method == S3_GET && j->etag[0] && strcmp(j->etag, etag)) {
      refuse(j, VS_IO, "the object changed while it was read: open it again");
      return;
    }
    strcpy(j->etag, etag);
  }
  if (modified) j->modified = (int64_t)curl_getdate(modified, NULL);
  if (j->status == 206 && is_ranged(j)) {
    if (!parse_content_range(header(j->easy, "Content-Range"), &first, &j->total) || first != j->off + j->have)
      refuse(j, VS_IO, "the server answered with another range than the one asked for");
    return;
  }
  curl_off_t n = -1;
  curl_easy_getinfo(j->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &n);
  if (n >= 0) j->total = (uint64_t)n;
  /* the whole object instead of a range of it: welcome where the range holds it all */
  if (is_ranged(j) && (j->off + j->have > 0 || n > (curl_off_t)j->len)) refuse(j, VS_UNSUPPORTED, "the server does not serve ranges");
}

static void take_pieces(s3_job *j, const uint8_t *p, uint64_t n) {
  uint64_t at = j->off + j->have, end = at + n;
  for (size_t i = 0; i < j->n_pieces; i++) {
    const s3_piece *x = &j->pieces[i];
    uint64_t from = at > x->off ? at : x->off, to = end < x->off + x->len ? end : x->off + x->len;
    if (from < to) memcpy(x->dst + (from - x->off), p + (from - at), to - from);
  }
}

static int take_data(s3_job *j, const void *p, size_t n) {
  if (n > j->max_data - j->n_data) {
    refuse(j, VS_INVALID, "the object is larger than this place allows");
    return 0;
  }
  if (j->n_data + n + 1 > j->room) {
    size_t room = (j->n_data + n + 1) * 2;
    uint8_t *grown = realloc(j->data, room);
    if (!grown) {
      j->refused = 1, j->rc = vs_nomem(&j->err);
      return 0;
    }
    j->data = grown, j->room = room;
  }
  memcpy(j->data + j->n_data, p, n);
  j->n_data += n;
  return 1;
}

static void take_error_text(s3_job *j, const char *p, size_t n) {
  if (!j->error_body && !(j->error_body = malloc(ERROR_BODY))) return;
  if (n > ERROR_BODY - j->n_error) n = ERROR_BODY - j->n_error;
  memcpy(j->error_body + j->n_error, p, n);
  j->n_error += n;
}

static void look_at_status(s3_job *j) {
  long status = 0;
  if (j->status) return;
  curl_easy_getinfo(j->easy, CURLINFO_RESPONSE_CODE, &status);
  j->status = (int)status;
  if (status / 100 == 2) take_head(j);
}

/* CURLOPT_WRITEFUNCTION. Another length than size * n ends the transfer. */
static size_t on_body(char *p, size_t size, size_t n, void *ctx) {
  s3_job *j = ctx;
  n *= size;
  look_at_status(j);
  if (j->refused) return 0;
  if (j->status / 100 != 2) {
    take_error_text(j, p, n);
    return n;
  }
  if (is_ranged(j) && n > j->len - j->have) {
    refuse(j, VS_IO, "the server sent more than the range asked for");
    return 0;
  }
  if (j->pieces) take_pieces(j, (uint8_t *)p, n);
  else if (!take_data(j, p, n)) return 0;
  j->have += n;
  return n;
}

static size_t on_read(char *p, size_t size, size_t n, void *ctx) {
  s3_job *j = ctx;
  size_t left = j->body_len - (size_t)j->have;
  n *= size;
  if (n > left) n = left;
  if (n) memcpy(p, j->body + j->have, n);
  j->have += n;
  return n;
}

static int on_seek(void *ctx, curl_off_t off, int origin) {
  s3_job *j = ctx;
  if (origin != SEEK_SET || off < 0 || (uint64_t)off > j->body_len) return CURL_SEEKFUNC_CANTSEEK;
  j->have = (uint64_t)off;
  return CURL_SEEKFUNC_OK;
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

static int add_header(s3_job *j, const char *line) {
  struct curl_slist *grown = curl_slist_append(j->headers, line);
  if (grown) j->headers = grown;
  return grown != NULL;
}

static void set_method(s3_job *j, CURL *easy) {
  static const char *const names[] = {"GET", "HEAD", "PUT", "POST", "DELETE"};
  if (j->method == S3_HEAD) curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
  else if (j->method == S3_PUT || j->method == S3_POST) {
    curl_easy_setopt(easy, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, names[j->method]);
    curl_easy_setopt(easy, CURLOPT_INFILESIZE_LARGE, (curl_off_t)j->body_len);
    curl_easy_setopt(easy, CURLOPT_READFUNCTION, on_read);
    curl_easy_setopt(easy, CURLOPT_READDATA, j);
    curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, on_seek);
    curl_easy_setopt(easy, CURLOPT_SEEKDATA, j);
    curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, 262144L);
  } else if (j->method == S3_DELETE) curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, "DELETE");
}

static void set_options(s3_job *j, CURL *easy, const s3_attempt *a) {
  int64_t left = j->deadline - s3_clock_ms();
  curl_easy_setopt(easy, CURLOPT_URL, a->url);
  curl_easy_setopt(easy, CURLOPT_PATH_AS_IS, 1L); /* a key may hold /../ */
  curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(easy, CURLOPT_REDIR_PROTOCOLS_STR, strncmp(a->url, "https:", 6) ? "http,https" : "https");
  curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, a->is_plain ? 1L : 0L); /* nothing signed goes to another host */
  curl_easy_setopt(easy, CURLOPT_MAXREDIRS, 5L);
  curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
  curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);
  curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
  curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, 65536L);
  curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, (long)CONNECT_TIMEOUT_MS);
  curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, (long)(left > 1 ? left : 1));
  curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
  curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, (long)STALL_SECONDS);
  curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
  curl_easy_setopt(easy, CURLOPT_WRITEDATA, j);
  curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, j->curl_error);
  curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, on_open_socket);
  curl_easy_setopt(easy, CURLOPT_CLOSESOCKETFUNCTION, on_close_socket);
  curl_easy_setopt(easy, CURLOPT_PRIVATE, j);
  if (a->ca_bundle) curl_easy_setopt(easy, CURLOPT_CAINFO, a->ca_bundle);
  set_method(j, easy);
}

/* Headers beside the signed ones. The range is among them: it needs no signature, and each attempt may have another. */
static int set_headers(s3_job *j, const s3_attempt *a) {
  char line[S3_ETAG_MAX + 100];
  int ok = 1;
  for (size_t i = 0; i < a->n_headers && ok; i++) ok = add_header(j, a->headers[i]);
  if (ok && is_ranged(j)) {
    snprintf(line, sizeof line, "Range: bytes=%llu-%llu", (unsigned long long)(j->off + j->have), (unsigned long long)(j->off + j->len - 1));
    ok = add_header(j, line);
  }
  if (ok && j->method == S3_GET && j->etag[0] && strncmp(j->etag, "W/", 2)) { /* a weak one never matches: take_head compares */
    snprintf(line, sizeof line, "If-Match: %s", j->etag);
    ok = add_header(j, line);
  }
  if (ok && (j->method == S3_PUT || j->method == S3_POST)) ok = add_header(j, "Content-Type: application/octet-stream");
  if (ok) curl_easy_setopt(j->easy, CURLOPT_HTTPHEADER, j->headers);
  return ok;
}

/* Nothing of an earlier attempt remains but the bytes of a ranged answer. */
static void forget_attempt(s3_job *j) {
  j->status = 0, j->code[0] = 0, j->refused = 0, j->n_error = 0, j->curl_error[0] = 0;
  if (!is_ranged(j)) j->have = 0, j->n_data = 0;
}

static void start(s3_job *j) {
  s3_attempt a = {0};
  vs_err err = {0};
  forget_attempt(j);
  j->tries++;
  vs_rc rc = s3_place_sign(j->place, j, &a, &err);
  if (!rc) {
    j->easy = T.n_idle ? T.idle[--T.n_idle] : curl_easy_init();
    if (!j->easy) rc = vs_nomem(&err);
  }
  if (!rc) {
    set_options(j, j->easy, &a);
    if (!set_headers(j, &a) || curl_multi_add_handle(E.multi, j->easy)) rc = vs_nomem(&err);
  }
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
    fail(j, rc, what);
    finish(j);
    return;
  }
  j->not_before = now + delay;
  j->next = T.waiting, T.waiting = j;
}

/* ---- the end of an attempt ---- */

static int is_passing(CURLcode c) {
  switch (c) {
    case CURLE_COULDNT_RESOLVE_HOST: case CURLE_COULDNT_CONNECT: case CURLE_OPERATION_TIMEDOUT: case CURLE_PARTIAL_FILE:
    case CURLE_GOT_NOTHING: case CURLE_SEND_ERROR: case CURLE_RECV_ERROR: case CURLE_SSL_CONNECT_ERROR: case CURLE_HTTP2:
    case CURLE_WEIRD_SERVER_REPLY: case CURLE_SEND_FAIL_REWIND: case CURLE_COULDNT_RESOLVE_PROXY: return 1;
    default: return 0;
  }
}

static void curl_failed(s3_job *j, CURLcode code) {
  char what[512];
  const char *text = j->curl_error[0] ? j->curl_error : curl_easy_strerror(code);
  if (code == CURLE_COULDNT_CONNECT || code == CURLE_COULDNT_RESOLVE_HOST) j->connect_failures++;
  else j->connect_failures = 0;
  snprintf(what, sizeof what, "no answer: %s", text);
  if (is_passing(code)) try_again(j, 0, VS_IO, what);
  else {
    fail(j, code == CURLE_OUT_OF_MEMORY ? VS_NOMEM : VS_IO, what);
    finish(j);
  }
}

static int64_t retry_after_ms(CURL *easy) {
  curl_off_t s = 0;
  curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &s);
  return s > 0 && s < 86400 ? (int64_t)s * 1000 : 0;
}

static vs_rc rc_of(const s3_job *j) {
  if (j->status == 404 || j->status == 410) return VS_NOTFOUND;
  if (j->status == 412 && j->exclusive) return VS_EXISTS;
  if (j->status == 501) return VS_UNSUPPORTED;
  return VS_IO;
}

/* What the store says of a refusal, fit for a terminal: no control characters, never one of our secrets. */
static void describe(s3_job *j, const s3_xml_error *x, char *what, size_t n) {
  const char *hint = "";
  if (j->status == 412 && j->method == S3_GET) {
    snprintf(what, n, "the object changed while it was read (HTTP 412): open it again");
    return;
  }
  if (!strcmp(x->code, "NoSuchBucket")) hint = ": is the bucket's name right, and AWS_ENDPOINT_URL?";
  else if (j->status == 404 && !x->code[0]) hint = " Not Found";
  else if (j->status == 403 && !x->code[0]) hint = " Forbidden: the credentials may not read this, or it does not exist";
  snprintf(what, n, "HTTP %d%s%s%s%s%s", j->status, x->code[0] ? " " : "", x->code, x->message[0] ? ": " : "", x->message, hint);
  for (char *p = what; *p; p++)
    if ((unsigned char)*p < 32 || *p == 127) *p = ' ';
  if (s3_place_knows(j->place, what)) snprintf(what, n, "HTTP %d", j->status);
}

static int is_passing_status(const s3_job *j) {
  int s = j->status;
  if (s == 429 || s == 500 || s == 502 || s == 503 || s == 504 || s == 408) return 1;
  return (s == 400 && !strcmp(j->code, "RequestTimeout")) || (s == 409 && !strcmp(j->code, "ConditionalRequestConflict"));
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
    return s3_place_new_region(j->place, region);
  }
  if (x->region[0] && !j->fixed_region && (j->status == 301 || j->status == 400)) {
    j->fixed_region = 1;
    return s3_place_new_region(j->place, x->region);
  }
  if (!strcmp(x->code, "RequestTimeTooSkewed") && date && !j->fixed_clock) {
    j->fixed_clock = 1;
    return s3_place_set_clock(j->place, (int64_t)curl_getdate(date, NULL));
  }
  if (is_one_of(x->code, expired) && !j->fixed_credentials) {
    j->fixed_credentials = 1;
    return s3_place_new_credentials(j->place);
  }
  return 0;
}

static void http_failed(s3_job *j) {
  s3_xml_error x;
  char what[700], region[64] = "", date[64] = "";
  const char *r = header(j->easy, "x-amz-bucket-region"), *d = header(j->easy, "Date");
  int64_t after = retry_after_ms(j->easy);
  if (r && strlen(r) < sizeof region) strcpy(region, r);
  if (d && strlen(d) < sizeof date) strcpy(date, d);
  s3_xml_read_error(j->error_body, j->n_error, &x);
  snprintf(j->code, sizeof j->code, "%s", x.code);
  drop_easy(j);
  describe(j, &x, what, sizeof what);
  j->connect_failures = 0;
  if (put_right(j, &x, region[0] ? region : NULL, date[0] ? date : NULL)) try_again(j, 0, rc_of(j), what);
  else if (is_passing_status(j)) try_again(j, after, rc_of(j), what);
  else {
    fail(j, rc_of(j), what);
    finish(j);
  }
}

static int is_at_end(const s3_job *j) { return j->total != UINT64_MAX && j->off + j->have >= j->total; }

static void attempt_ended(s3_job *j, CURLcode code) {
  look_at_status(j);
  if (code == CURLE_OK && is_ranged(j) && j->status == 200) j->total = j->have; /* a whole object, maybe of a length not told before */
  if (j->refused) {
    drop_easy(j);
    finish(j);
  } else if (code == CURLE_OK && j->status / 100 != 2) http_failed(j);
  else if (code == CURLE_OK && is_ranged(j) && j->have < j->len && !(j->may_be_shorter && is_at_end(j))) {
    drop_easy(j);
    if (is_at_end(j)) { /* not cut on the way: there is no more */
      fail(j, VS_CORRUPT, "the object is shorter than it should be (truncated?)");
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
    start(j);
  }
}

static int is_cancelled(s3_job *j) { return __atomic_load_n(&j->cancelled, __ATOMIC_ACQUIRE); }

static void drop_cancelled(s3_job **list) {
  for (s3_job **at = list; *at;) {
    s3_job *j = *at;
    if (!is_cancelled(j)) at = &j->next;
    else {
      *at = j->next;
      drop_easy(j);
      j->rc = vs_fail(&j->err, VS_INTERRUPT, "interrupted");
      finish(j);
    }
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
    if (stop) return NULL; /* the process ends: nobody waits, and its memory goes with it */
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
  E.n_sockets = 0, E.queue = NULL, E.running = 0, E.cancels = 0, E.multi = NULL;
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

/* Call with the lock held. 0: no thread to be had. */
static int start_thread(void) {
  sigset_t all, old;
  if (E.running) return 1;
  if (E.stopping || init_failed) return 0;
  if (!E.multi && !(E.multi = curl_multi_init())) return 0;
  curl_multi_setopt(E.multi, CURLMOPT_MAXCONNECTS, (long)MAX_CONNECTIONS);
  curl_multi_setopt(E.multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, (long)MAX_CONNECTIONS);
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  E.running = pthread_create(&E.thread, NULL, engine_main, NULL) == 0;
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  return E.running;
}

void s3_submit(s3_job *j) {
  pthread_once(&init_once, init);
  j->deadline = s3_clock_ms() + j->timeout_ms;
  j->round = vs_scope_next_round();
  pthread_mutex_lock(&E.lock);
  j->refs++;
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

static void count(const s3_job *j, uint64_t round) {
  vs_scope *s = vs_scope_current();
  if (!s) return;
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
