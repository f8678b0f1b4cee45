/* shard.c - handles of open shards, shared by the whole process, and sets of them; see shard.h.
 *
 * The list of handles is guarded by one mutex, never held over I/O: a shard is read first and then put into the list, where a
 * handle that another thread made in the meantime wins. A folder's stamp (device, inode, mtime) tells whether it may have a
 * new version; a stamp younger than STAMP_SETTLE_NS at the time it was taken proves nothing, because a second change within
 * one clock tick leaves the mtime as it is, so such a folder is listed again.
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
#include "shard_int.h"
#include "sqlite3ext.h"
SQLITE_EXTENSION_INIT3

#define STAMP_SETTLE_NS 50000000ll

typedef struct handle {
  shard s; /* first: a shard is its handle */
  char *real_path;
  shard_stamp stamp;
  int refs;
  struct handle *next;
} handle;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static handle *handles;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

/* A child must not inherit the mutex locked by a thread that it does not have. */
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }
static void guard_fork(void) { pthread_atfork(before_fork, after_fork, after_fork); }

int shard_stamp_take(const char *path, shard_stamp *out) {
  struct stat st;
  struct timespec now;
  memset(out, 0, sizeof *out);
  if (stat(path, &st)) return 0;
  clock_gettime(CLOCK_REALTIME, &now);
  out->device = st.st_dev, out->inode = st.st_ino;
  out->mtime_ns = st.st_mtim.tv_sec * 1000000000ll + st.st_mtim.tv_nsec;
  out->settled = now.tv_sec * 1000000000ll + now.tv_nsec - out->mtime_ns > STAMP_SETTLE_NS;
  return 1;
}

int shard_stamp_holds(const char *path, const shard_stamp *then) {
  shard_stamp now;
  return then->settled && shard_stamp_take(path, &now) && now.device == then->device && now.inode == then->inode &&
         now.mtime_ns == then->mtime_ns;
}

static void free_handle(handle *h) {
  for (size_t i = 0; h->s.segments && i < h->s.manifest.n_segments; i++) ivfpq_segment_close(h->s.segments[i]);
  free(h->s.segments), free(h->s.path), free(h->real_path);
  shard_manifest_reset(&h->s.manifest);
  free(h);
}

/* Call with the lock held. */
static handle *find(const char *real_path, uint64_t version) {
  for (handle *h = handles; h; h = h->next)
    if (h->s.manifest.version == version && !strcmp(h->real_path, real_path)) return h;
  return NULL;
}

/* The newest cached handle of a folder whose stamp still holds, counted. */
static handle *find_fresh(const char *real_path) {
  handle *best = NULL;
  shard_stamp stamp = {0};
  pthread_mutex_lock(&lock);
  for (handle *h = handles; h; h = h->next)
    if (!strcmp(h->real_path, real_path) && (!best || h->s.manifest.version > best->s.manifest.version)) best = h;
  if (best) best->refs++, stamp = best->stamp;
  pthread_mutex_unlock(&lock);
  if (best && !shard_stamp_holds(real_path, &stamp)) shard_close(&best->s), best = NULL;
  return best;
}

/* What the manifest promises of a segment must be what the segment says. */
static vs_rc check_segment(const shard_manifest *m, const shard_segment_ref *ref, const ivfpq_segment *s, vs_err *err) {
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
  if (!(h->s.segments = calloc(m->n_segments + 1, sizeof *h->s.segments))) return vs_nomem(err);
  for (size_t i = 0; i < m->n_segments && !rc; i++) {
    char path[4400];
    vs_io *io;
    if (snprintf(path, sizeof path, "%s/%s", h->s.path, m->segments[i].file) >= (int)sizeof path)
      return vs_fail(err, VS_INVALID, "%s: path too long", h->s.path);
    rc = io_local_open(path, -1, &io, err);
    if (!rc) rc = ivfpq_segment_open(io, &h->s.segments[i], err);
    if (!rc) rc = check_segment(m, &m->segments[i], h->s.segments[i], err);
  }
  return rc;
}

/* Puts a finished handle into the list, or takes the one that is already there. */
static handle *publish_handle(handle *made) {
  pthread_mutex_lock(&lock);
  handle *have = find(made->real_path, made->s.manifest.version);
  if (have && !strcmp(have->s.manifest.uuid, made->s.manifest.uuid)) {
    have->refs++;
    if (made->stamp.settled) have->stamp = made->stamp;
  } else {
    made->refs = 1, made->next = handles, handles = made;
    have = made;
  }
  pthread_mutex_unlock(&lock);
  return have;
}

static int is_remote(const char *path) { return strstr(path, "://") != NULL; }

vs_rc shard_open(const char *path, uint64_t version, shard **out, vs_err *err) {
  *out = NULL;
  if (is_remote(path)) return vs_fail(err, VS_UNSUPPORTED, "%s: this version opens local paths only", path);
  pthread_once(&fork_once, guard_fork);
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
  made->real_path = real;
  shard_stamp_take(real, &made->stamp); /* before the listing: a later change makes it stale, never the other way round */
  vs_rc rc = (made->s.path = strdup(path)) ? shard_manifest_read(path, version, &made->s.manifest, err) : vs_nomem(err);
  if (version) made->stamp.settled = 0; /* says nothing about the newest version */
  if (!rc) rc = open_segments(made, err);
  if (rc) {
    free_handle(made);
    return rc;
  }
  h = publish_handle(made);
  if (h != made) free_handle(made);
  *out = &h->s;
  return VS_OK;
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
  pthread_mutex_lock(&lock);
  shard_stamp stamp = h->stamp;
  pthread_mutex_unlock(&lock);
  return shard_stamp_holds(h->real_path, &stamp);
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

/* ---- sets ---- */

int shard_source_is_path(const char *source) { return source[0] == '[' || strpbrk(source, "/:") != NULL; }

static vs_rc grow(shard_set *set, vs_err *err) {
  shard **shards = realloc(set->shards, (set->n + 1) * sizeof *shards);
  if (shards) set->shards = shards;
  char **names = realloc(set->names, (set->n + 1) * sizeof *names);
  if (names) set->names = names;
  return shards && names ? VS_OK : vs_nomem(err);
}

static const char *last_part(const char *path, size_t *n) {
  size_t end = strlen(path);
  while (end > 1 && path[end - 1] == '/') end--;
  size_t at = end;
  while (at > 0 && path[at - 1] != '/') at--;
  *n = end - at;
  return path + at;
}

static vs_rc add_shard(shard_set *set, const char *path, vs_err *err) {
  size_t n;
  const char *name = last_part(path, &n);
  vs_rc rc = grow(set, err);
  if (rc) return rc;
  if (!(set->names[set->n] = strndup(name, n))) return vs_nomem(err);
  rc = shard_open(path, 0, &set->shards[set->n], err);
  if (rc) free(set->names[set->n]);
  else set->n++;
  return rc;
}

static vs_rc remember_folder(shard_set *set, const char *path, vs_err *err) {
  shard_folder *f = realloc(set->folders, (set->n_folders + 1) * sizeof *f);
  if (!f) return vs_nomem(err);
  set->folders = f;
  f += set->n_folders;
  shard_stamp_take(path, &f->stamp);
  if (!(f->path = strdup(path))) return vs_nomem(err);
  set->n_folders++;
  return VS_OK;
}

/* A shard, or a folder of shards. */
static vs_rc add_path(shard_set *set, const char *path, vs_err *err) {
  char **names = NULL;
  size_t n = 0;
  if (is_remote(path)) return vs_fail(err, VS_UNSUPPORTED, "%s: this version opens local paths only", path);
  if (shard_dir_is_shard(path)) return add_shard(set, path, err);
  vs_rc rc = remember_folder(set, path, err);
  if (!rc) rc = shard_dir_list(path, &names, &n, err);
  if (!rc && !n)
    rc = vs_fail(err, VS_NOTFOUND, "%s holds no shard: build one with `vecshard build FILES --out %s/NAME`", path, path);
  for (size_t i = 0; i < n && !rc; i++) {
    size_t room = strlen(path) + strlen(names[i]) + 2;
    char *child = malloc(room);
    if (!child) rc = vs_nomem(err);
    else {
      snprintf(child, room, "%s/%s", path, names[i]);
      rc = add_shard(set, child, err);
    }
    free(child);
  }
  shard_names_free(names, n);
  return rc;
}

static vs_rc add_name(char ***names, size_t *n, const char *name, vs_err *err) {
  char **grown = realloc(*names, (*n + 1) * sizeof *grown);
  if (!grown) return vs_nomem(err);
  *names = grown;
  if (!(grown[*n] = strdup(name))) return vs_nomem(err);
  ++*n;
  return VS_OK;
}

static vs_rc split_list(const char *json, char ***paths, size_t *n, vs_err *err) {
  sqlite3 *db = NULL;
  sqlite3_stmt *stmt = NULL;
  vs_rc rc = VS_OK;
  int step = SQLITE_ERROR;
  if (sqlite3_open_v2(":memory:", &db, SQLITE_OPEN_READWRITE, NULL) ||
      sqlite3_prepare_v2(db, "SELECT type, value FROM json_each(?1)", -1, &stmt, NULL) ||
      sqlite3_bind_text(stmt, 1, json, -1, SQLITE_STATIC))
    rc = vs_nomem(err);
  while (!rc && (step = sqlite3_step(stmt)) == SQLITE_ROW) {
    const char *type = (const char *)sqlite3_column_text(stmt, 0), *path = (const char *)sqlite3_column_text(stmt, 1);
    if (!type || !path || strcmp(type, "text")) rc = vs_fail(err, VS_INVALID, "source %.100s: a list of paths as JSON texts is needed", json);
    else rc = add_name(paths, n, path, err);
  }
  if (!rc && step != SQLITE_DONE) rc = vs_fail(err, VS_INVALID, "source %.100s: not valid JSON: write it as [\"db/a\",\"db/b\"]", json);
  if (!rc && !*n) rc = vs_fail(err, VS_INVALID, "source %.100s names no shard", json);
  sqlite3_finalize(stmt);
  sqlite3_close(db);
  return rc;
}

vs_rc shard_source_split(const char *source, char ***paths, size_t *n, vs_err *err) {
  *paths = NULL, *n = 0;
  vs_rc rc = source[0] == '[' ? split_list(source, paths, n, err) : add_name(paths, n, source, err);
  if (rc) shard_names_free(*paths, *n), *paths = NULL, *n = 0;
  return rc;
}

/* Where two shards would have one name, both get their paths. */
static vs_rc tell_apart(shard_set *set, vs_err *err) {
  unsigned char *twice = calloc(set->n + 1, 1);
  vs_rc rc = twice ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < set->n && !rc; i++)
    for (size_t j = i + 1; j < set->n; j++)
      if (!strcmp(set->names[i], set->names[j])) twice[i] = twice[j] = 1;
  for (size_t i = 0; i < set->n && !rc; i++) {
    char *path = twice[i] ? strdup(set->shards[i]->path) : NULL;
    if (!twice[i]) continue;
    if (!path) rc = vs_nomem(err);
    else free(set->names[i]), set->names[i] = path;
  }
  free(twice);
  return rc;
}

vs_rc shard_set_check(shard *const *shards, size_t n, vs_err *err) {
  for (size_t i = 1; i < n; i++) {
    const shard_manifest *a = &shards[0]->manifest, *b = &shards[i]->manifest;
    if (a->dim != b->dim)
      return vs_fail(err, VS_INVALID, "%s has %u dimensions, %s has %u: they cannot be searched together", shards[0]->path, a->dim,
                     shards[i]->path, b->dim);
    if (a->metric != b->metric || a->id_text != b->id_text)
      return vs_fail(err, VS_INVALID, "%s and %s differ in %s: they cannot be searched together", shards[0]->path, shards[i]->path,
                     a->metric != b->metric ? "metric" : "id type");
  }
  return VS_OK;
}

vs_rc shard_set_open(const char *source, shard_set *out, vs_err *err) {
  char **paths;
  size_t n;
  memset(out, 0, sizeof *out);
  vs_rc rc = shard_source_split(source, &paths, &n, err);
  for (size_t i = 0; i < n && !rc; i++) rc = add_path(out, paths[i], err);
  shard_names_free(paths, n);
  if (!rc) rc = shard_set_check(out->shards, out->n, err);
  if (!rc) rc = tell_apart(out, err);
  if (rc) shard_set_reset(out);
  return rc;
}

int shard_set_is_fresh(const shard_set *set) {
  for (size_t i = 0; i < set->n_folders; i++)
    if (!shard_stamp_holds(set->folders[i].path, &set->folders[i].stamp)) return 0;
  for (size_t i = 0; i < set->n; i++)
    if (!shard_is_fresh(set->shards[i])) return 0;
  return 1;
}

void shard_set_reset(shard_set *set) {
  for (size_t i = 0; i < set->n; i++) shard_close(set->shards[i]), free(set->names[i]);
  for (size_t i = 0; i < set->n_folders; i++) free(set->folders[i].path);
  free(set->shards), free(set->names), free(set->folders);
  memset(set, 0, sizeof *set);
}
