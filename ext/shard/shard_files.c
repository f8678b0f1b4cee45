/* shard_files.c - see shard_files.h. */
#include "shard_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../s3vfs/io_local.h"
#include "../s3vfs/s3_config.h"
#include "shard_remote.h"

static vs_rc add_path(char ***paths, size_t *n, const char *folder, const char *name, vs_err *err) {
  char **grown = realloc(*paths, (*n + 1) * sizeof *grown), *whole = NULL;
  if (grown) *paths = grown;
  int len = (int)strlen(folder);
  while (len > 1 && folder[len - 1] == '/') len--;
  if (!grown || asprintf(&whole, "%.*s%s%s", len, folder, name ? "/" : "", name ? name : "") < 0) return vs_nomem(err);
  (*paths)[(*n)++] = whole;
  return VS_OK;
}

static vs_rc local_paths(const char *path, char ***paths, size_t *n, vs_err *err) {
  char **names = NULL;
  size_t n_names = 0;
  if (shard_dir_is_shard(path)) return add_path(paths, n, path, NULL, err);
  vs_rc rc = shard_dir_list(path, &names, &n_names, err);
  if (!rc && !n_names) rc = vs_fail(err, VS_NOTFOUND, "%s: is no shard and holds none; vecshard build makes one", path);
  for (size_t i = 0; i < n_names && !rc; i++) rc = add_path(paths, n, path, names[i], err);
  shard_names_free(names, n_names);
  return rc;
}

/* Those of a database's folders that are shards. */
static vs_rc children(const remote_shard *r, char ***paths, size_t *n, vs_err *err) {
  remote_shard *below = calloc(r->n_children + 1, sizeof *below), **at = calloc(r->n_children + 1, sizeof *at);
  vs_rc rc = below && at ? VS_OK : vs_nomem(err);
  for (size_t i = 0; i < r->n_children && !rc; i++) {
    char *uri;
    if (asprintf(&uri, "%s/%s", r->uri, r->children[i]) < 0) rc = vs_nomem(err);
    else {
      rc = remote_shard_init(&below[i], uri, r->place, err);
      free(uri);
    }
    at[i] = &below[i];
  }
  if (!rc) rc = remote_find(at, r->n_children, 0, err);
  for (size_t i = 0; i < r->n_children && !rc; i++)
    if (below[i].version) rc = add_path(paths, n, below[i].uri, NULL, err);
  for (size_t i = 0; below && i < r->n_children; i++) remote_shard_reset(&below[i]);
  free(below), free(at);
  return rc;
}

static vs_rc remote_paths(const char *uri, char ***paths, size_t *n, vs_err *err) {
  remote_shard r = {0}, *at = &r;
  vs_rc rc = remote_shard_init(&r, uri, NULL, err);
  r.look_below = 1;
  if (!rc) rc = remote_find(&at, 1, 0, err);
  if (!rc) rc = r.version ? add_path(paths, n, r.uri, NULL, err) : children(&r, paths, n, err);
  if (!rc && !*n) rc = remote_no_shard(uri, err);
  remote_shard_reset(&r);
  return rc;
}

vs_rc shard_paths(const char *path, char ***paths, size_t *n, vs_err *err) {
  *paths = NULL, *n = 0;
  vs_rc rc = s3_is_uri(path) ? remote_paths(path, paths, n, err) : local_paths(path, paths, n, err);
  if (rc) shard_names_free(*paths, *n), *paths = NULL, *n = 0;
  return rc;
}

static vs_rc open_remote(shard_files *f, vs_err *err) {
  remote_shard *r = f->remote = calloc(1, sizeof *r);
  if (!r) return vs_nomem(err);
  vs_rc rc = remote_shard_init(r, f->path, NULL, err);
  if (!rc) rc = remote_find(&r, 1, 0, err);
  if (!rc && !r->version) rc = remote_no_shard(f->path, err);
  if (!rc) rc = remote_manifests(&r, 1, err);
  f->manifest = r->manifest;
  memset(&r->manifest, 0, sizeof r->manifest);
  return rc;
}

vs_rc shard_files_open(const char *path, shard_files *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  if (!(out->path = strdup(path))) return vs_nomem(err);
  vs_rc rc = s3_is_uri(path) ? open_remote(out, err) : shard_manifest_read(path, 0, &out->manifest, err);
  if (rc) shard_files_reset(out);
  return rc;
}

vs_rc shard_files_segment(const shard_files *f, size_t i, vs_io **out, vs_err *err) {
  char *path;
  if (f->remote) return remote_segment(f->remote, &f->manifest.segments[i], out, err);
  if (asprintf(&path, "%s/%s", f->path, f->manifest.segments[i].file) < 0) return vs_nomem(err);
  vs_rc rc = io_local_open(path, 0, out, err);
  free(path);
  return rc;
}

vs_rc shard_files_locate(const shard_files *f, size_t i, s3_place **place, char **key, vs_err *err) {
  if (!f->remote) return vs_fail(err, VS_INVALID, "%s is a folder; s3://bucket/prefix is needed", f->path);
  if (asprintf(key, "%s%s", f->remote->prefix, f->manifest.segments[i].file) < 0) return vs_nomem(err);
  *place = s3_place_share(f->remote->place);
  return VS_OK;
}

void shard_files_reset(shard_files *f) {
  free(f->path);
  shard_manifest_reset(&f->manifest);
  if (f->remote) remote_shard_reset(f->remote);
  free(f->remote);
  memset(f, 0, sizeof *f);
}
