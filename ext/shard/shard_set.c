/* shard_set.c - sources and the sets of shards that they name; see shard.h.
 *
 * Shards of the file system are opened as they are met. Those in stores are only noted down at first, so that all of them are
 * looked for at once, then all that the databases among them hold, and then opened in the same rounds.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../s3vfs/s3_config.h"
#include "../s3vfs/s3_engine.h"
#include "shard_int.h"
#include "shard_remote.h"
#include "sqlite3ext.h"
SQLITE_EXTENSION_INIT3

int shard_source_is_path(const char *source) { return source[0] == '[' || strpbrk(source, "/:") != NULL; }

/* A shard of the set while it is opened: s, or still at r. */
typedef struct item { char *name; shard *s; remote_shard *r; } item;
typedef struct items { item *list; size_t n; } items;

static const char *last_part(const char *path, size_t *n) {
  size_t end = strlen(path);
  while (end > 1 && path[end - 1] == '/') end--;
  size_t at = end;
  while (at > 0 && path[at - 1] != '/') at--;
  *n = end - at;
  return path + at;
}

static void free_item(item *x) {
  free(x->name);
  shard_close(x->s);
  if (x->r) remote_shard_reset(x->r);
  free(x->r);
}

static void free_items(items *l) {
  for (size_t i = 0; i < l->n; i++) free_item(&l->list[i]);
  free(l->list);
}

/* Adds an item named like the last part of path. */
static vs_rc add_item(items *l, const char *path, item **out, vs_err *err) {
  size_t n;
  const char *name = last_part(path, &n);
  item *grown = realloc(l->list, (l->n + 1) * sizeof *grown);
  if (!grown) return vs_nomem(err);
  l->list = grown;
  grown[l->n] = (item){.name = strndup(name, n)};
  *out = &grown[l->n];
  if (!grown[l->n].name) return vs_nomem(err);
  l->n++;
  return VS_OK;
}

static vs_rc add_local(items *l, const char *path, vs_err *err) {
  item *x;
  vs_rc rc = add_item(l, path, &x, err);
  return rc ? rc : shard_open(path, 0, &x->s, err);
}

static vs_rc add_remote(items *l, const char *uri, s3_place *place, vs_err *err) {
  item *x;
  vs_rc rc = add_item(l, uri, &x, err);
  if (rc) return rc;
  if (!(x->r = calloc(1, sizeof *x->r))) return vs_nomem(err);
  return remote_shard_init(x->r, uri, place, err);
}

static vs_rc remember_folder(shard_set *set, const char *path, shard_folder **out, vs_err *err) {
  shard_folder *f = realloc(set->folders, (set->n_folders + 1) * sizeof *f);
  if (!f) return vs_nomem(err);
  set->folders = f;
  f += set->n_folders;
  *f = (shard_folder){.path = strdup(path)};
  if (!f->path) return vs_nomem(err);
  if (out) *out = f;
  else shard_stamp_take(path, &f->stamp);
  set->n_folders++;
  return VS_OK;
}

static char *join(const char *path, const char *name) {
  size_t n = strlen(path);
  char *whole;
  while (n > 1 && path[n - 1] == '/') n--;
  return asprintf(&whole, "%.*s/%s", (int)n, path, name) < 0 ? NULL : whole;
}

/* A child folder is stamped before it is looked at: a shard that is built into it later makes the set stale. */
static vs_rc add_child(shard_set *set, items *l, const char *path, const char *name, vs_err *err) {
  shard_stamp stamp;
  char *child = join(path, name);
  if (!child) return vs_nomem(err);
  int is_folder = shard_stamp_take(child, &stamp);
  vs_rc rc = VS_OK;
  if (shard_dir_is_shard(child)) rc = add_local(l, child, err);
  else if (is_folder && !(rc = remember_folder(set, child, NULL, err))) set->folders[set->n_folders - 1].stamp = stamp;
  free(child);
  return rc;
}

/* A local shard, or a folder of shards. */
static vs_rc add_folder(shard_set *set, items *l, const char *path, vs_err *err) {
  char **names = NULL;
  size_t n = 0, before = l->n;
  if (!*path) return vs_fail(err, VS_INVALID, "the list of sources holds an empty path");
  if (shard_dir_is_shard(path)) return add_local(l, path, err);
  vs_rc rc = remember_folder(set, path, NULL, err);
  if (!rc) rc = shard_dir_children(path, &names, &n, err);
  for (size_t i = 0; i < n && !rc; i++) rc = add_child(set, l, path, names[i], err);
  if (!rc && l->n == before)
    rc = vs_fail(err, VS_NOTFOUND, "%s holds no shard: build one with `vecshard build FILES --out %s/NAME`", path, path);
  shard_names_free(names, n);
  return rc;
}

/* ---- stores ---- */

/* Opens all that is still at a remote_shard, in the same rounds. Without a shard there, s stays NULL where that is allowed. */
static vs_rc open_remotes(items *l, int optional, vs_err *err) {
  remote_shard **at = malloc((l->n + 1) * sizeof *at);
  shard **out = calloc(l->n + 1, sizeof *out);
  size_t m = 0;
  vs_rc rc = at && out ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < l->n && !rc; i++)
    if (l->list[i].r) at[m++] = l->list[i].r;
  if (!rc && m) rc = shard_open_remote(at, m, optional, out, err);
  m = 0;
  for (size_t i = 0; i < l->n && !rc; i++)
    if (l->list[i].r) l->list[i].s = out[m++];
  free(at), free(out);
  return rc;
}

static vs_rc add_children(shard_set *set, items *below, remote_shard *r, vs_err *err) {
  shard_folder *f;
  vs_rc rc = remember_folder(set, r->uri, &f, err);
  if (rc) return rc;
  for (size_t i = 0; i < r->n_children && !rc; i++) {
    char *uri = join(r->uri, r->children[i]);
    rc = uri ? add_remote(below, uri, r->place, err) : vs_nomem(err);
    free(uri);
  }
  f->children = r->children, f->n_children = r->n_children, f->checked_ms = s3_clock_ms();
  r->children = NULL, r->n_children = 0;
  return rc;
}

/* Puts the shards of the databases in their places of the list. */
static vs_rc expand(shard_set *set, items *l, vs_err *err) {
  items below = {0}, all = {0};
  size_t *first = calloc(l->n + 2, sizeof *first), at = 0;
  vs_rc rc = first ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < l->n && !rc; i++) {
    first[i] = below.n;
    if (l->list[i].r && !l->list[i].s) rc = add_children(set, &below, l->list[i].r, err);
    first[i + 1] = below.n;
  }
  if (!rc && below.n) rc = open_remotes(&below, 1, err);
  if (!rc && !(all.list = calloc(l->n + below.n + 1, sizeof *all.list))) rc = vs_nomem(err);
  for (size_t i = 0; i < l->n && !rc; i++) {
    size_t before = all.n;
    if (l->list[i].s) {
      all.list[all.n++] = l->list[i];
      l->list[i] = (item){0};
      continue;
    }
    for (at = first[i]; at < first[i + 1]; at++)
      if (below.list[at].s) all.list[all.n++] = below.list[at], below.list[at] = (item){0};
      else if (!rc) { /* it may become one: its files come first, its manifest last */
        shard_folder *f;
        if (!(rc = remember_folder(set, below.list[at].r->uri, &f, err))) f->no_shard = 1, f->checked_ms = s3_clock_ms();
      }
    if (!rc && all.n == before)
      rc = vs_fail(err, VS_NOTFOUND, "%s holds no shard: is the path right? `vecshard publish DIR %s` puts shards there",
                   l->list[i].r->uri, l->list[i].r->uri);
  }
  free_items(&below), free_items(l), free(first);
  *l = all;
  return rc;
}

static vs_rc add_uri(items *l, const char *uri, vs_err *err) {
  vs_rc rc = add_remote(l, uri, NULL, err);
  if (!rc) l->list[l->n - 1].r->look_below = 1;
  return rc;
}

/* ---- sources ---- */

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

static vs_rc take_items(shard_set *set, items *l, vs_err *err) {
  set->shards = calloc(l->n + 1, sizeof *set->shards), set->names = calloc(l->n + 1, sizeof *set->names);
  if (!set->shards || !set->names) return vs_nomem(err);
  for (size_t i = 0; i < l->n; i++) {
    set->shards[i] = l->list[i].s, set->names[i] = l->list[i].name;
    l->list[i].s = NULL, l->list[i].name = NULL;
  }
  set->n = l->n;
  return VS_OK;
}

vs_rc shard_set_open(const char *source, shard_set *out, vs_err *err) {
  char **paths;
  size_t n, n_remote = 0;
  items l = {0};
  memset(out, 0, sizeof *out);
  vs_rc rc = shard_source_split(source, &paths, &n, err);
  for (size_t i = 0; i < n && !rc; i++) {
    int remote = s3_is_uri(paths[i]);
    rc = remote ? add_uri(&l, paths[i], err) : add_folder(out, &l, paths[i], err);
    n_remote += (size_t)remote;
  }
  shard_names_free(paths, n);
  if (!rc && n_remote) rc = open_remotes(&l, 0, err);
  if (!rc && n_remote) rc = expand(out, &l, err);
  if (!rc) rc = take_items(out, &l, err);
  free_items(&l);
  if (!rc) rc = shard_set_check(out->shards, out->n, err);
  if (!rc) rc = tell_apart(out, err);
  if (rc) shard_set_reset(out);
  return rc;
}

int shard_set_is_fresh(const shard_set *set) {
  int any_remote = 0;
  for (size_t i = 0; i < set->n_folders; i++) {
    if (set->folders[i].checked_ms) any_remote = 1;
    else if (!shard_stamp_holds(set->folders[i].path, &set->folders[i].stamp)) return 0;
  }
  for (size_t i = 0; i < set->n; i++) {
    if (s3_is_uri(set->shards[i]->path)) any_remote = 1;
    else if (!shard_is_fresh(set->shards[i])) return 0;
  }
  return !any_remote || shard_remote_fresh(set->shards, set->n, set->folders, set->n_folders);
}

void shard_set_reset(shard_set *set) {
  for (size_t i = 0; set->shards && i < set->n; i++) shard_close(set->shards[i]), free(set->names[i]);
  for (size_t i = 0; i < set->n_folders; i++) {
    free(set->folders[i].path);
    shard_names_free(set->folders[i].children, set->folders[i].n_children);
  }
  free(set->shards), free(set->names), free(set->folders);
  memset(set, 0, sizeof *set);
}
