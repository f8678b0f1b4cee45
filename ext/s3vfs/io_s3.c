/* io_s3.c - see io_s3.h.
 *
 * One mutex guards the cache: the table of extents, their states, counts and the list by last use. It is never held over I/O.
 * An extent is LOADING from the moment its reads are submitted until the last of them is done, then READY, or FAILED with a
 * text; a failed one leaves the table at once, so that the next reader tries again. An extent belongs to those that hold it
 * (refs) and to its reads; without either it stays in the table until the limit evicts it.
 */
#include "io_s3.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../base/vs_scope.h"
#include "s3_engine.h"

enum { MERGE_GAP = IO_S3_MERGE_GAP, MERGE_MAX = IO_S3_MERGE_MAX, SPLIT = IO_S3_SPLIT, STOP_POLL_MS = 20 };
#define DEFAULT_CACHE (1ull << 30)
#define DEFAULT_MAX_BYTES (4ull << 30)

typedef enum extent_state { LOADING, READY, FAILED } extent_state;

typedef struct extent {
  struct extent *chain, *newer, *older; /* newer, older: only while evictable */
  XXH128_hash_t object;
  uint64_t off, len, round;
  extent_state state;
  int refs;       /* holders and reads under way */
  int in_table, in_list;
  size_t pending; /* reads under way */
  unsigned forks, retries; /* forks before it was made; attempts that its reads took beyond the first */
  vs_rc rc;
  char *why;
  unsigned char checked;
  uint8_t *data;  /* behind this struct */
} extent;

static struct {
  pthread_mutex_t lock;
  pthread_cond_t arrived;
  extent **table;
  size_t n_slots, n_extents;
  extent *newest, *oldest;
  uint64_t bytes, pinned, limit;
  unsigned forks; /* that led to this process: reads of before are the parent's */
} C = {.lock = PTHREAD_MUTEX_INITIALIZER};

typedef struct prime { uint64_t off, len; uint8_t *bytes; struct prime *next; } prime;

typedef struct s3_io {
  vs_io base;
  s3_place *place;
  char *key, *name;
  char etag[S3_ETAG_MAX]; /* guarded by C.lock until it is set */
  int has_etag, by_content; /* by_content: its name says what it holds, whatever the ETag */
  XXH128_hash_t object;
  prime *primes;
} s3_io;

/* ---- limits ---- */

static uint64_t read_number(const char *path) {
  unsigned long long v;
  FILE *f = fopen(path, "re");
  int ok = f && fscanf(f, "%llu", &v) == 1;
  if (f) fclose(f);
  return ok ? v : UINT64_MAX;
}

static uint64_t default_limit(void) {
  const char *text = getenv("VECSHARD_CACHE_MB");
  char *end;
  if (text && *text) {
    unsigned long long mb = strtoull(text, &end, 10);
    if (!*end && mb <= 1ull << 40) return mb << 20;
  }
  uint64_t have = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
  uint64_t v2 = read_number("/sys/fs/cgroup/memory.max"), v1 = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes");
  if (v2 < have) have = v2;
  if (v1 < have) have = v1;
  return have / 4 < DEFAULT_CACHE ? have / 4 : DEFAULT_CACHE;
}

uint64_t io_s3_max_bytes(void) {
  const vs_scope *s = vs_scope_current();
  if (s && s->max_bytes) return s->max_bytes;
  const char *text = getenv("VECSHARD_MAX_BYTES");
  char *end;
  unsigned long long v = text && *text ? strtoull(text, &end, 10) : 0;
  if (!text || !*text || *end) return DEFAULT_MAX_BYTES;
  return v ? v : UINT64_MAX;
}

/* Counts bytes that are about to be read; refuses what goes over the statement's limit. */
static vs_rc charge(const s3_io *io, uint64_t bytes, vs_err *err) {
  vs_scope *s = vs_scope_current();
  uint64_t max = io_s3_max_bytes();
  if (!s) return VS_OK;
  uint64_t total = __atomic_add_fetch(&s->traffic.bytes, bytes, __ATOMIC_RELAXED);
  if (total <= max) return VS_OK;
  return vs_fail(err, VS_INVALID,
                 "%s: this statement would read more than %llu MB from the store (%llu MB so far): raise VECSHARD_MAX_BYTES, or "
                 "vecshard_config('max_bytes', n), if that is meant",
                 io->name, (unsigned long long)(max >> 20), (unsigned long long)(total >> 20));
}

/* ---- the table; call all of this with the lock held ---- */

static size_t slot_of(const extent *e, size_t n_slots) {
  return (size_t)(e->object.low64 ^ e->off * 0x9E3779B97F4A7C15ull ^ e->len * 0xC2B2AE3D27D4EB4Full) >> 7 & (n_slots - 1);
}

static extent *lookup(const extent *like) {
  if (!C.n_slots) return NULL;
  for (extent *e = C.table[slot_of(like, C.n_slots)]; e; e = e->chain)
    if (e->off == like->off && e->len == like->len && XXH128_isEqual(e->object, like->object)) return e;
  return NULL;
}

/* Without memory for more slots the chains grow: slower, not wrong. */
static int grow_table(void) {
  size_t n = C.n_slots ? C.n_slots * 2 : 1024;
  extent **table = calloc(n, sizeof *table);
  if (!table) return C.n_slots > 0;
  for (size_t i = 0; i < C.n_slots; i++)
    for (extent *e = C.table[i], *next; e; e = next) {
      next = e->chain;
      size_t at = slot_of(e, n);
      e->chain = table[at], table[at] = e;
    }
  free(C.table);
  C.table = table, C.n_slots = n;
  return 1;
}

static int insert(extent *e) {
  if (C.n_extents >= C.n_slots && !grow_table()) return 0;
  extent **at = &C.table[slot_of(e, C.n_slots)];
  e->chain = *at, *at = e, e->in_table = 1;
  C.n_extents++, C.bytes += e->len;
  return 1;
}

static void take_from_table(extent *e) {
  if (!e->in_table) return;
  extent **at = &C.table[slot_of(e, C.n_slots)];
  while (*at != e) at = &(*at)->chain;
  *at = e->chain, e->in_table = 0;
  C.n_extents--, C.bytes -= e->len;
}

static void take_from_list(extent *e) {
  if (!e->in_list) return;
  *(e->newer ? &e->newer->older : &C.newest) = e->older;
  *(e->older ? &e->older->newer : &C.oldest) = e->newer;
  e->in_list = 0, e->newer = e->older = NULL;
}

static void put_in_list(extent *e) {
  e->older = C.newest, e->newer = NULL, e->in_list = 1;
  *(C.newest ? &C.newest->newer : &C.oldest) = e;
  C.newest = e;
}

static void destroy(extent *e) {
  free(e->why);
  free(e);
}

static void evict(void) {
  while (C.bytes > C.limit && C.oldest) {
    extent *e = C.oldest;
    take_from_list(e), take_from_table(e);
    destroy(e);
  }
}

static void hold(extent *e) {
  if (!e->refs++) C.pinned += e->len;
  take_from_list(e);
}

static void let_go(extent *e) {
  if (--e->refs) return;
  C.pinned -= e->len;
  if (!e->in_table) destroy(e);
  else put_in_list(e), evict();
}

/* ---- process-wide set-up ---- */

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_condition(void) {
  pthread_condattr_t attr;
  pthread_condattr_init(&attr);
  pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
  pthread_cond_init(&C.arrived, &attr);
  pthread_condattr_destroy(&attr);
}

static void before_fork(void) { pthread_mutex_lock(&C.lock); }
static void in_parent(void) { pthread_mutex_unlock(&C.lock); }
/* The reads under way are the parent's: nobody here would ever complete them. */
static void in_child(void) {
  for (size_t i = 0; i < C.n_slots; i++)
    for (extent *e = C.table[i], *next; e; e = next) {
      next = e->chain;
      if (e->state == LOADING) take_from_table(e);
    }
  C.forks++;
  make_condition();
  pthread_mutex_unlock(&C.lock);
}

static void set_up(void) {
  make_condition();
  if (!C.limit) C.limit = default_limit();
  pthread_atfork(before_fork, in_parent, in_child);
}

io_s3_cache io_s3_cache_state(void) {
  pthread_once(&once, set_up);
  pthread_mutex_lock(&C.lock);
  io_s3_cache s = {.limit = C.limit, .bytes = C.bytes, .extents = C.n_extents, .pinned = C.pinned};
  pthread_mutex_unlock(&C.lock);
  return s;
}

void io_s3_cache_limit(uint64_t bytes) {
  pthread_once(&once, set_up);
  pthread_mutex_lock(&C.lock);
  C.limit = bytes;
  evict();
  pthread_mutex_unlock(&C.lock);
}

/* ---- reads ---- */

/* What one job reads: extents, or parts of them, each held for it. */
typedef struct reading { s3_io *io; extent **extents; size_t n; uint64_t round; } reading;

/* Is it still the object that was opened? Where a server sends no ETag, the size is all there is to tell. */
static void check_object(s3_io *io, s3_job *j) {
  if (io->by_content && j->rc && j->status == 412) { /* the same file, sent again: its new ETag will be learnt */
    io->has_etag = 0; /* this statement fails and says so, the next one reads on; checksums guard each block */
    return;
  }
  if (j->rc) return;
  if (j->total != UINT64_MAX && j->total != io->base.size)
    j->rc = vs_fail(&j->err, VS_IO, "%s: the object has %llu bytes, not %llu: it changed, open it again", io->name,
                    (unsigned long long)j->total, (unsigned long long)io->base.size);
  if (j->rc || !j->etag[0]) return;
  if (!io->has_etag) strcpy(io->etag, j->etag), io->has_etag = 1;
  else if (strcmp(io->etag, j->etag))
    j->rc = vs_fail(&j->err, VS_IO, "%s: the object changed while it was read: open it again", io->name);
}

/* On the engine's thread. */
static void reading_done(s3_job *j) {
  reading *r = j->ctx;
  pthread_mutex_lock(&C.lock);
  check_object(r->io, j);
  for (size_t i = 0; i < r->n; i++) {
    extent *e = r->extents[i];
    e->pending--;
    if (!i && j->tries) e->retries += j->tries - 1;
    if (j->rc && !e->rc) {
      e->rc = j->rc, e->why = strdup(j->err.text);
      take_from_table(e);
    }
    if (!e->pending) e->state = e->rc ? FAILED : READY;
    let_go(e);
  }
  pthread_cond_broadcast(&C.arrived);
  pthread_mutex_unlock(&C.lock);
  vs_io_close(&r->io->base);
  free(r->extents), free(r);
}

static s3_io *share(s3_io *io);

/* A job for the bytes [off, off + len), which the given extents want; holds them. */
static s3_job *make_job(s3_io *io, extent **extents, size_t n, uint64_t off, uint64_t len) {
  s3_job *j = s3_job_new(io->place, S3_GET, io->key);
  reading *r = calloc(1, sizeof *r);
  s3_piece *pieces = calloc(n, sizeof *pieces);
  extent **own = malloc(n * sizeof *own);
  if (!j || !r || !pieces || !own) {
    s3_job_release(j);
    free(r), free(pieces), free(own);
    return NULL;
  }
  for (size_t i = 0; i < n; i++) {
    own[i] = extents[i];
    pieces[i] = (s3_piece){extents[i]->off, extents[i]->len, extents[i]->data};
  }
  *r = (reading){.io = share(io), .extents = own, .n = n};
  j->off = off, j->len = len, j->pieces = pieces, j->n_pieces = n, j->done = reading_done, j->ctx = r;
  pthread_mutex_lock(&C.lock);
  if (io->has_etag) strcpy(j->etag, io->etag);
  for (size_t i = 0; i < n; i++) hold(extents[i]), extents[i]->pending++;
  pthread_mutex_unlock(&C.lock);
  return j;
}

typedef struct plan { s3_job **jobs; size_t n, room; } plan;

static vs_rc plan_read(plan *p, s3_io *io, extent **extents, size_t n, uint64_t off, uint64_t len, vs_err *err) {
  if (p->n == p->room) {
    size_t room = p->room * 2 + 16;
    s3_job **grown = realloc(p->jobs, room * sizeof *grown);
    if (!grown) return vs_nomem(err);
    p->jobs = grown, p->room = room;
  }
  s3_job *j = make_job(io, extents, n, off, len);
  if (!j) return vs_nomem(err);
  p->jobs[p->n++] = j;
  return VS_OK;
}

static int by_offset(const void *pa, const void *pb) {
  const extent *a = *(extent *const *)pa, *b = *(extent *const *)pb;
  if (a->off != b->off) return a->off < b->off ? -1 : 1;
  return a->len < b->len ? -1 : a->len > b->len;
}

/* Which reads bring these extents, all new: neighbours together while the gaps cost less than what is wanted. */
static vs_rc plan_reads(plan *p, s3_io *io, extent **e, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  qsort(e, n, sizeof *e, by_offset);
  for (size_t i = 0; i < n && !rc;) {
    uint64_t off = e[i]->off, end = off + e[i]->len, wanted = e[i]->len, waste = 0;
    size_t m = 1;
    if (wanted > MERGE_MAX) {
      for (uint64_t at = off; at < end && !rc; at += SPLIT) rc = plan_read(p, io, &e[i], 1, at, end - at < SPLIT ? end - at : SPLIT, err);
      i++;
      continue;
    }
    for (; i + m < n; m++) {
      const extent *x = e[i + m];
      uint64_t gap = x->off > end ? x->off - end : 0, new_end = x->off + x->len > end ? x->off + x->len : end;
      if (gap > MERGE_GAP || new_end - off > MERGE_MAX || waste + gap > wanted + x->len) break;
      waste += gap, wanted += x->len, end = new_end;
    }
    rc = plan_read(p, io, e + i, m, off, end - off, err);
    i += m;
  }
  return rc;
}

static void count_requests(uint64_t requests, uint64_t hits) {
  vs_scope *s = vs_scope_current();
  if (!s) return;
  __atomic_fetch_add(&s->traffic.requests, requests, __ATOMIC_RELAXED);
  __atomic_fetch_add(&s->traffic.hits, hits, __ATOMIC_RELAXED);
}

/* Sends the planned reads, or undoes the plan. */
static void send(plan *p, const vs_err *why) {
  for (size_t i = 0; i < p->n; i++) {
    s3_job *j = p->jobs[i];
    if (!why->rc) s3_submit(j);
    else j->rc = why->rc, j->err = *why, reading_done(j);
    s3_job_release(j);
  }
  if (!why->rc) count_requests(p->n, 0);
  free(p->jobs);
}

/* ---- ranges ---- */

static extent *new_extent(const s3_io *io, const vs_range *r) {
  size_t head = (sizeof(extent) + 63) / 64 * 64;
  if (r->len > SIZE_MAX / 2) return NULL;
  extent *e = aligned_alloc(64, (head + r->len + VS_IO_PAD + 63) / 64 * 64);
  if (!e) return NULL;
  memset(e, 0, sizeof *e);
  e->object = io->object, e->off = r->off, e->len = r->len, e->round = vs_scope_next_round(), e->forks = C.forks;
  e->data = (uint8_t *)e + head;
  memset(e->data + r->len, 0, VS_IO_PAD);
  return e;
}

static const uint8_t *primed(const s3_io *io, const vs_range *r) {
  for (const prime *p = io->primes; p; p = p->next)
    if (r->off >= p->off && r->len <= p->len && r->off - p->off <= p->len - r->len) return p->bytes + (r->off - p->off);
  return NULL;
}

/* Bytes that are known already, held, and nobody else's: what a hint says is not for the cache. */
static extent *private_extent(const s3_io *io, const vs_range *r, const uint8_t *bytes) {
  extent *e = new_extent(io, r);
  if (!e) return NULL;
  if (r->len) memcpy(e->data, bytes, r->len);
  e->state = READY, e->round = 0;
  pthread_mutex_lock(&C.lock);
  hold(e);
  pthread_mutex_unlock(&C.lock);
  return e;
}

/* The extent of a range, held: found, or new (then *is_new). NULL without memory. */
static extent *claim(const s3_io *io, const vs_range *r, int *is_new) {
  extent like = {.object = io->object, .off = r->off, .len = r->len};
  const uint8_t *have = primed(io, r);
  *is_new = 0;
  if (have || !r->len) return private_extent(io, r, have);
  pthread_mutex_lock(&C.lock);
  extent *e = lookup(&like);
  if (e) hold(e);
  pthread_mutex_unlock(&C.lock);
  if (e) return e;
  extent *made = new_extent(io, r);
  if (!made) return NULL;
  pthread_mutex_lock(&C.lock);
  if (!(e = lookup(&like)) && insert(made)) {
    e = made;
    *is_new = 1;
    made = NULL;
  }
  if (e) hold(e);
  pthread_mutex_unlock(&C.lock);
  free(made);
  return e;
}

static void release(vs_io *base, vs_range *r, size_t n) {
  (void)base;
  pthread_mutex_lock(&C.lock);
  for (size_t i = 0; i < n; i++) {
    extent *e = r[i].owner;
    if (!e) continue;
    /* Who gave up waiting had a reason, a stalled read perhaps: the next reader begins anew instead of waiting for it, too. */
    if (e->state == LOADING && (size_t)e->refs == e->pending + 1) take_from_table(e);
    let_go(e);
  }
  pthread_mutex_unlock(&C.lock);
  for (size_t i = 0; i < n; i++) r[i].owner = NULL, r[i].ptr = NULL;
}

/* New extents that nobody reads yet: others may have found them already and wait. */
static void abandon(extent **fresh, size_t n, const vs_err *err) {
  pthread_mutex_lock(&C.lock);
  for (size_t i = 0; i < n; i++) {
    extent *e = fresh[i];
    if (e->pending || e->state != LOADING) continue;
    e->state = FAILED, e->rc = err->rc ? err->rc : VS_NOMEM;
    if (!e->why) e->why = strdup(err->text);
    take_from_table(e);
  }
  pthread_cond_broadcast(&C.arrived);
  pthread_mutex_unlock(&C.lock);
}

static vs_rc begin(vs_io *base, vs_range *r, size_t n, vs_err *err) {
  s3_io *io = (s3_io *)base;
  extent **fresh = malloc((n + 1) * sizeof *fresh);
  size_t n_fresh = 0;
  uint64_t bytes = 0;
  plan p = {0};
  vs_err why = {0};
  vs_rc rc = fresh ? VS_OK : vs_nomem(&why);
  for (size_t i = 0; i < n && !rc; i++) {
    int is_new;
    extent *e = claim(io, &r[i], &is_new);
    if (!e) rc = vs_nomem(&why);
    r[i].owner = e;
    if (is_new) fresh[n_fresh++] = e, bytes += r[i].len;
  }
  count_requests(0, n - n_fresh);
  if (!rc && n_fresh) rc = charge(io, bytes, &why);
  if (!rc) rc = plan_reads(&p, io, fresh, n_fresh, &why);
  send(&p, &why);
  if (rc) {
    if (fresh) abandon(fresh, n_fresh, &why);
    release(base, r, n);
  }
  free(fresh);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

/* With the lock held: 0 when the wait was long enough to ask whether to stop. */
static int wait_a_little(void) {
  struct timespec until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_nsec += STOP_POLL_MS * 1000000;
  if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
  return pthread_cond_timedwait(&C.arrived, &C.lock, &until) != ETIMEDOUT;
}

static void count_retries(extent *e) {
  vs_scope *s = vs_scope_current();
  if (s && e->retries) {
    __atomic_fetch_add(&s->traffic.retries, e->retries, __ATOMIC_RELAXED);
    __atomic_fetch_add(&s->traffic.requests, e->retries, __ATOMIC_RELAXED);
  }
  e->retries = 0;
}

static vs_rc wait_for(extent *e, uint64_t *round, vs_err *err) {
  vs_rc rc = VS_OK;
  pthread_mutex_lock(&C.lock);
  if (e->state == LOADING && e->forks != C.forks)
    rc = vs_fail(err, VS_IO, "the process was forked while this was read: run the statement again");
  while (e->state == LOADING && !rc) {
    if (wait_a_little()) continue;
    pthread_mutex_unlock(&C.lock);
    if (vs_scope_stopped()) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
    pthread_mutex_lock(&C.lock);
  }
  if (!rc && e->state == FAILED) rc = vs_fail(err, e->rc, "%s", e->why ? e->why : "out of memory");
  if (e->round > *round) *round = e->round;
  if (!rc) count_retries(e), e->round = 0; /* whoever finds it later did not wait */
  pthread_mutex_unlock(&C.lock);
  return rc;
}

static vs_rc wait_all(vs_io *base, vs_range *r, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  uint64_t round = 0;
  for (size_t i = 0; i < n && !rc; i++) {
    extent *e = r[i].owner;
    rc = wait_for(e, &round, err);
    r[i].ptr = e->data, r[i].checked = &e->checked;
  }
  vs_scope_round(round);
  if (rc) release(base, r, n);
  return rc;
}

static void forget(vs_io *base) {
  const s3_io *io = (const s3_io *)base;
  pthread_mutex_lock(&C.lock);
  for (size_t i = 0; i < C.n_slots; i++)
    for (extent *e = C.table[i], *next; e; e = next) {
      next = e->chain;
      if (!XXH128_isEqual(e->object, io->object)) continue;
      take_from_table(e);
      if (!e->refs) take_from_list(e), destroy(e);
    }
  pthread_mutex_unlock(&C.lock);
}

/* ---- objects ---- */

void io_s3_unprime(vs_io *base) {
  s3_io *io = (s3_io *)base;
  while (io->primes) {
    prime *p = io->primes;
    io->primes = p->next;
    free(p->bytes), free(p);
  }
}

vs_rc io_s3_prime(vs_io *base, uint64_t off, uint64_t len, uint8_t *bytes, vs_err *err) {
  s3_io *io = (s3_io *)base;
  prime *p = malloc(sizeof *p);
  if (!p) {
    free(bytes);
    return vs_nomem(err);
  }
  *p = (prime){.off = off, .len = len, .bytes = bytes, .next = io->primes};
  io->primes = p;
  return VS_OK;
}

/* Reads under way keep their object: closing waits for nothing. */
typedef struct counted { s3_io io; int refs; } counted;

static s3_io *share(s3_io *io) {
  __atomic_fetch_add(&((counted *)io)->refs, 1, __ATOMIC_RELAXED);
  return io;
}

static void close_io(vs_io *base) {
  s3_io *io = (s3_io *)base;
  if (__atomic_sub_fetch(&((counted *)io)->refs, 1, __ATOMIC_ACQ_REL)) return;
  io_s3_unprime(base);
  s3_place_close(io->place);
  free(io->key), free(io->name), free(io);
}

/* The name of the object's extents in the cache. */
static vs_rc identify(s3_io *io, const char *content, vs_err *err) {
  char *where = s3_place_identity(io->place, io->key), *whole = NULL;
  int n = where ? asprintf(&whole, "%s\n%llu\n%s", where, (unsigned long long)io->base.size, content) : -1;
  if (n >= 0) io->object = XXH3_128bits(whole, (size_t)n);
  free(where);
  if (n >= 0) free(whole);
  return n < 0 ? vs_nomem(err) : VS_OK;
}

vs_rc io_s3_open(s3_place *place, const char *key, const io_s3_known *known, vs_io **out, vs_err *err) {
  s3_meta meta;
  const char *etag = known ? known->etag : NULL, *content = known ? known->checksum : NULL;
  uint64_t size = known ? known->size : UINT64_MAX;
  *out = NULL;
  pthread_once(&once, set_up);
  if (size == UINT64_MAX || (!etag && !content)) {
    vs_rc rc = s3_head(place, key, &meta, err);
    if (rc) return rc;
    size = meta.size, etag = meta.etag;
  }
  counted *c = calloc(1, sizeof *c);
  if (!c) return vs_nomem(err);
  s3_io *io = &c->io;
  c->refs = 1;
  io->by_content = content != NULL && !etag;
  io->place = s3_place_share(place);
  io->key = strdup(key), io->name = s3_place_name(place, key);
  io->base = (vs_io){.size = size, .name = io->name, .begin = begin, .wait = wait_all, .release = release, .forget = forget,
                     .close = close_io};
  if (etag && strlen(etag) < sizeof io->etag) strcpy(io->etag, etag), io->has_etag = *etag != 0;
  vs_rc rc = io->key && io->name ? identify(io, content ? content : etag, err) : vs_nomem(err);
  if (rc) close_io(&io->base);
  else *out = &io->base;
  return rc;
}
