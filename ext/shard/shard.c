/* shard.c - handles of open shards, shared by the whole process; see shard.h.
 *
 * The list of handles is guarded by one mutex, never held over I/O: a shard is read first and then put into the list, where a
 * handle that another thread made in the meantime wins if it reads the very same files. A folder's stamp (device, inode, mtime)
 * tells whether it may have a new version; a stamp younger than STAMP_SETTLE_NS at the time it was taken proves nothing, because
 * a second change within one clock tick leaves the mtime as it is, so such a folder is listed again. A shard in a store is known
 * by URI and the ETag of its manifest, and is asked about again when it was last looked at some time ago.
 */
#include "shard.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "../s3vfs/io_local.h"
#include "../s3vfs/s3_config.h"
#include "../s3vfs/s3_engine.h"
#include "shard_int.h"
#include "shard_remote.h"

#define STAMP_SETTLE_NS 50000000ll
enum { REFRESH_MS = 5000 };

typedef struct handle {
  shard s;               /* first: a shard is its handle */
  char *key;             /* real path, or URI */
  shard_stamp stamp;     /* of a local folder */
  shard_stamp *files;    /* of its segments */
  s3_place *place;       /* of a shard in a store */
  char etag[S3_ETAG_MAX];
  int64_t checked_ms;    /* when the store was last asked for a newer version; 0: opened by its number, never fresh */
  int refs;
  struct handle *next;
} handle;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static handle *handles;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

/* A child must not inherit the mutex locked by a thread that it does not have. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }
static void guard_fork(void) {
  s3_place_guard_fork(); /* first, so that a fork takes our lock before that one, as find() does */
  pthread_atfork(before_fork, after_fork, after_fork);
}

int shard_stamp_take(const char *path, shard_stamp *out) {
  struct stat st;
  struct timespec now;
  memset(out, 0, sizeof *out);
  if (stat(path, &st)) return 0;
  clock_gettime(CLOCK_REALTIME, &now);
  out->device = st.st_dev, out->inode = st.st_ino;
  out->mtime_ns = st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec, out->size = st.st_size;
  out->settled = now.tv_sec * 1000000000ll + now.tv_nsec - out->mtime_ns > STAMP_SETTLE_NS;
  return 1;
}

int shard_stamp_holds(const char *path, const shard_stamp *then) {
  struct stat st;
  return then->settled && !stat(path, &st) && st.st_dev == then->device && st.st_ino == then->inode &&
         st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec == then->mtime_ns;
}

static void free_handle(handle *h) {
  for (size_t i = 0; h->s.segments && i < h->s.manifest.n_segments; i++) ivfpq_segment_close(h->s.segments[i]);
  free(h->s.segments), free(h->s.path), free(h->key), free(h->files);
  s3_place_close(h->place);
  shard_manifest_reset(&h->s.manifest);
  free(h);
}

/* The newest cached handle of a key, or that of a version; counted. Of several of one version the last that was opened. */
static handle *find(const char *key, const s3_place *place, uint64_t version) {
  handle *best = NULL;
  pthread_mutex_lock(&lock);
  for (handle *h = handles; h; h = h->next)
    if (!strcmp(h->key, key) && (!place || s3_place_same(h->place, place)) && (version ? h->s.manifest.version == version && !best
                                         : !best || h->s.manifest.version > best->s.manifest.version))
      best = h;
  if (best) best->refs++;
  pthread_mutex_unlock(&lock);
  return best;
}

/* The newest cached handle of a folder whose stamp still holds, counted. */
static handle *find_fresh(const char *key) {
  handle *best = find(key, NULL, 0);
  if (best && !shard_is_fresh(&best->s)) shard_close(&best->s), best = NULL;
  return best;
}

vs_rc shard_check_segment(const shard_manifest *m, const shard_segment_ref *ref, const ivfpq_segment *s, vs_err *err) {
  const ivfpq_params *p = &s->params;
  const char *what = NULL;
  if (s->io->size != ref->n_bytes) what = "size";
  else if (p->n_rows != ref->n_rows) what = "rows";
  else if (p->dim != m->dim) what = "dimension";
  else if ((int)p->metric != (int)m->metric) what = "metric";
  else if ((int)p->store != (int)m->store) what = "store";
  else if ((int)p->id_text != m->id_text) what = "id type";
  else if (p->n_columns != m->n_columns) what = "columns";
  for (uint32_t c = 0; !what && c < p->n_columns; c++)
    if (strcmp(s->columns[c].name, m->columns[c].name) || (int)s->columns[c].type != (int)m->columns[c].type) what = "columns";
  return what ? vs_corrupt(err, "%s: damaged: manifest and segment disagree about %s", s->io->name, what) : VS_OK;
}

static vs_rc open_segments(handle *h, vs_err *err) {
  const shard_manifest *m = &h->s.manifest;
  vs_rc rc = VS_OK;
  h->s.segments = calloc(m->n_segments + 1, sizeof *h->s.segments);
  h->files = calloc(m->n_segments + 1, sizeof *h->files);
  if (!h->s.segments || !h->files) return vs_nomem(err);
  for (size_t i = 0; i < m->n_segments && !rc; i++) {
    char path[4400];
    vs_io *io;
    if (snprintf(path, sizeof path, "%s/%s", h->s.path, m->segments[i].file) >= (int)sizeof path)
      return vs_fail(err, VS_INVALID, "%s: path too long", h->s.path);
    shard_stamp_take(path, &h->files[i]);
    rc = io_local_open(path, -1, &io, err);
    if (!rc) rc = ivfpq_segment_open(io, &h->s.segments[i], err);
    if (!rc) rc = shard_check_segment(m, &m->segments[i], h->s.segments[i], err);
  }
  return rc;
}

static int same_file(const shard_stamp *a, const shard_stamp *b) {
  return a->device == b->device && a->inode == b->inode && a->size == b->size && a->mtime_ns == b->mtime_ns;
}

/* Do both read the same files? A shard that was damaged, then repaired or built anew, has the same version in other ones. */
static int same_shard(const handle *a, const handle *b) {
  const shard_manifest *x = &a->s.manifest, *y = &b->s.manifest;
  if (x->version != y->version || strcmp(a->key, b->key) || strcmp(x->uuid, y->uuid) || x->n_segments != y->n_segments) return 0;
  if (!a->files || !b->files) return !a->files == !b->files && !strcmp(a->etag, b->etag) && s3_place_same(a->place, b->place);
  for (size_t i = 0; i < x->n_segments; i++)
    if (!same_file(&a->files[i], &b->files[i])) return 0;
  return 1;
}

/* Puts a finished handle into the list, or takes the one that is already there. */
static handle *publish_handle(handle *made) {
  pthread_mutex_lock(&lock);
  handle *have = handles;
  while (have && !same_shard(have, made)) have = have->next;
  if (have) {
    have->refs++;
    if (made->stamp.settled) have->stamp = made->stamp;
    if (made->checked_ms > have->checked_ms) have->checked_ms = made->checked_ms;
  } else {
    made->refs = 1, made->next = handles, handles = made;
    have = made;
  }
  pthread_mutex_unlock(&lock);
  if (have != made) free_handle(made);
  return have;
}

static vs_rc open_local(const char *path, uint64_t version, shard **out, vs_err *err) {
  char *real = realpath(path, NULL);
  if (!real) {
    if (errno == ENOMEM) return vs_nomem(err);
    return vs_fail(err, VS_NOTFOUND, "%s is not a shard: %s", path, strerror(errno));
  }
  handle *h = version ? NULL : find_fresh(real);
  if (h) {
    free(real);
    *out = &h->s;
    return VS_OK;
  }
  handle *made = calloc(1, sizeof *made);
  if (!made) {
    free(real);
    return vs_nomem(err);
  }
  made->key = real;
  shard_stamp_take(real, &made->stamp); /* before the listing: a later change makes it stale, never the other way round */
  vs_rc rc = (made->s.path = strdup(path)) ? shard_manifest_read(path, version, &made->s.manifest, err) : vs_nomem(err);
  if (version) made->stamp.settled = 0; /* says nothing about the newest version */
  if (!rc) rc = open_segments(made, err);
  if (rc) {
    free_handle(made);
    return rc;
  }
  *out = &publish_handle(made)->s;
  return VS_OK;
}

vs_rc shard_open(const char *path, uint64_t version, shard **out, vs_err *err) {
  *out = NULL;
  pthread_once(&fork_once, guard_fork);
  if (!s3_is_uri(path)) return open_local(path, version, out, err);
  remote_shard r = {0}, *at = &r;
  vs_rc rc = remote_shard_init(&r, path, NULL, err);
  r.want = version;
  if (!rc) rc = shard_open_remote(&at, 1, 0, out, err);
  remote_shard_reset(&r);
  return rc;
}

void shard_close(shard *s) {
  handle *h = (handle *)s;
  if (!s) return;
  pthread_mutex_lock(&lock);
  int last = --h->refs == 0;
  for (handle **at = &handles; last && *at; at = &(*at)->next)
    if (*at == h) {
      *at = h->next;
      break;
    }
  pthread_mutex_unlock(&lock);
  if (last) free_handle(h);
}

shard *shard_share(shard *s) {
  pthread_mutex_lock(&lock);
  ((handle *)s)->refs++;
  pthread_mutex_unlock(&lock);
  return s;
}

int shard_is_fresh(const shard *s) {
  const handle *h = (const handle *)s;
  if (h->place) return shard_remote_fresh((shard *const *)&s, 1, NULL, 0);
  pthread_mutex_lock(&lock);
  shard_stamp stamp = h->stamp;
  pthread_mutex_unlock(&lock);
  return shard_stamp_holds(h->key, &stamp);
}

vs_rc shard_find(shard *s, const ivfpq_id *id, uint32_t *segment, uint32_t *row, int *found, vs_err *err) {
  *found = 0;
  for (uint32_t i = 0; i < s->manifest.n_segments && !*found; i++) {
    vs_rc rc = ivfpq_find_id(s->segments[i], id, row, found, err);
    if (rc) return rc;
    *segment = i;
  }
  return VS_OK;
}

/* ---- shards in stores ---- */

int shard_recently(int64_t checked_ms) {
  const char *text = getenv("VECSHARD_REFRESH_MS");
  char *end;
  long long ms = text && *text ? strtoll(text, &end, 10) : REFRESH_MS;
  if (text && *text && (*end || ms < 0)) ms = REFRESH_MS;
  return checked_ms && s3_clock_ms() - checked_ms < ms;
}

static int64_t checked_ms(const handle *h) {
  pthread_mutex_lock(&lock);
  int64_t t = h->checked_ms;
  pthread_mutex_unlock(&lock);
  return t;
}

static void set_checked(handle *h, int64_t now) {
  pthread_mutex_lock(&lock);
  h->checked_ms = now;
  pthread_mutex_unlock(&lock);
}

/* A cached handle that needs no network: the newest one if it was looked at recently, or the version asked for. */
static shard *cached(const remote_shard *r) {
  handle *h = find(r->uri, r->place, r->want);
  if (h && (r->want || shard_recently(checked_ms(h)))) return &h->s;
  if (h) shard_close(&h->s);
  return NULL;
}

/* A cached handle of what was just found. */
static shard *cached_version(const remote_shard *r, int64_t now) {
  handle *h = find(r->uri, r->place, r->version);
  if (h && !strcmp(h->etag, r->etag)) {
    set_checked(h, now);
    return &h->s;
  }
  if (h) shard_close(&h->s);
  return NULL;
}

/* Makes a handle of what was loaded. */
static vs_rc adopt(remote_shard *r, int64_t now, shard **out, vs_err *err) {
  handle *made = calloc(1, sizeof *made);
  if (!made || !(made->key = strdup(r->uri)) || !(made->s.path = strdup(r->uri))) {
    if (made) free_handle(made);
    return vs_nomem(err);
  }
  made->s.manifest = r->manifest, made->s.segments = r->segments;
  memset(&r->manifest, 0, sizeof r->manifest), r->segments = NULL;
  strcpy(made->etag, r->etag);
  made->place = s3_place_share(r->place);
  made->checked_ms = r->want ? 0 : now;
  *out = &publish_handle(made)->s;
  return VS_OK;
}

/* Loads those without a shard yet. */
static vs_rc load_rest(remote_shard **at, size_t n, int optional, int64_t now, shard **out, vs_err *err) {
  remote_shard **todo = malloc((n + 1) * sizeof *todo);
  size_t m = 0;
  vs_rc rc = todo ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < n && !rc; i++) {
    if (out[i] || (!at[i]->version && (optional || at[i]->look_below))) continue;
    if (!at[i]->version) rc = remote_no_shard(at[i]->uri, err);
    else todo[m++] = at[i];
  }
  if (!rc) rc = remote_load(todo, m, err);
  for (size_t i = 0; i < n && !rc; i++)
    if (!out[i] && at[i]->version) rc = adopt(at[i], now, &out[i], err);
  free(todo);
  return rc;
}

vs_rc shard_open_remote(remote_shard **at, size_t n, int optional, shard **out, vs_err *err) {
  remote_shard **todo = malloc((n + 1) * sizeof *todo);
  size_t m = 0;
  int64_t now = s3_clock_ms();
  if (!todo) return vs_nomem(err);
  pthread_once(&fork_once, guard_fork);
  for (size_t i = 0; i < n; i++) {
    out[i] = cached(at[i]);
    if (!out[i]) todo[m++] = at[i];
  }
  vs_rc rc = remote_find(todo, m, 1, err);
  for (size_t i = 0; i < n && !rc; i++)
    if (!out[i] && at[i]->version) out[i] = cached_version(at[i], now);
  if (!rc) rc = load_rest(at, n, optional, now, out, err);
  for (size_t i = 0; rc && i < n; i++) shard_close(out[i]), out[i] = NULL;
  free(todo);
  return rc;
}

static int same_names(char **a, size_t n_a, char **b, size_t n_b) {
  for (size_t i = 0; n_a == n_b && i < n_a; i++)
    if (strcmp(a[i], b[i])) return 0;
  return n_a == n_b;
}

/* Everything that was not looked at recently, to be asked about; 0 without memory. */
static int gather(shard *const *shards, size_t n, shard_folder *folders, size_t n_folders, remote_shard *r, remote_shard **at, size_t *m) {
  vs_err ignored = {0};
  for (size_t i = 0; i < n; i++) {
    const handle *h = (const handle *)shards[i];
    if (!h->place || shard_recently(checked_ms(h))) continue;
    if (remote_shard_init(&r[i], h->key, h->place, &ignored)) return 0;
    at[(*m)++] = &r[i];
  }
  for (size_t i = 0; i < n_folders; i++) {
    remote_shard *x = &r[n + i];
    if (!folders[i].checked_ms || shard_recently(folders[i].checked_ms)) continue;
    if (remote_shard_init(x, folders[i].path, NULL, &ignored)) return 0;
    x->look_below = !folders[i].no_shard, at[(*m)++] = x;
  }
  return 1;
}

int shard_remote_fresh(shard *const *shards, size_t n, shard_folder *folders, size_t n_folders) {
  remote_shard *r = calloc(n + n_folders + 1, sizeof *r), **at = calloc(n + n_folders + 1, sizeof *at);
  size_t m = 0;
  vs_err ignored = {0};
  int64_t now = s3_clock_ms();
  int fresh = r && at && gather(shards, n, folders, n_folders, r, at, &m);
  if (fresh && m) fresh = remote_find(at, m, 0, &ignored) == VS_OK;
  for (size_t i = 0; fresh && m && i < n; i++) {
    handle *h = (handle *)shards[i];
    if (!r[i].uri) continue;
    fresh = r[i].version == h->s.manifest.version && !strcmp(r[i].etag, h->etag);
    if (fresh) set_checked(h, now);
  }
  for (size_t i = 0; fresh && m && i < n_folders; i++) {
    const remote_shard *x = &r[n + i];
    if (!x->uri) continue;
    fresh = !x->version && (folders[i].no_shard || same_names(x->children, x->n_children, folders[i].children, folders[i].n_children));
    if (fresh) folders[i].checked_ms = now;
  }
  for (size_t i = 0; r && i < n + n_folders; i++) remote_shard_reset(&r[i]);
  free(r), free(at);
  return fresh;
}
