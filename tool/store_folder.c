/* store_folder.c - see store_folder.h. Listings come from a store and are hostile: names are compared, never used as
 * paths here. */
#include "store_folder.h"

#include <stdlib.h>
#include <string.h>

#include "../ext/shard/shard_hint.h"

int store_is_uri(const char *text) { return !strncmp(text, "s3://", 5) && text[5] && text[5] != '/'; }

int store_is_segment_name(const char *name) { return !shard_manifest_version(name) && strcmp(name, SHARD_HINT_NAME); }

vs_rc store_folder_open(const char *uri, s3_place *place, store_folder *out, vs_err *err) {
  char *key = NULL;
  size_t n = strlen(uri);
  memset(out, 0, sizeof *out);
  while (n && uri[n - 1] == '/') n--;
  out->uri = tool_format("%.*s", (int)n, uri);
  vs_rc rc = s3_place_open(out->uri, &out->place, &key, err); /* of a known place only the key is wanted */
  if (rc) return rc;
  if (place) s3_place_close(out->place), out->place = s3_place_share(place);
  out->prefix = tool_format("%s%s", key, *key ? "/" : "");
  free(key);
  return VS_OK;
}

/* ---- listing ---- */

static void add_object(store_folder *f, const char *name, const s3_entry *e) {
  if (f->n_objects == f->room) {
    size_t room = f->room * 2 + 16;
    store_object *grown = tool_alloc(room, sizeof *grown);
    if (f->n_objects) memcpy(grown, f->objects, f->n_objects * sizeof *grown);
    free(f->objects);
    f->objects = grown, f->room = room;
  }
  f->objects[f->n_objects++] = (store_object){tool_format("%s", name), tool_format("%s", e->etag ? e->etag : ""), e->size};
}

static vs_rc add_entry(void *ctx, const s3_entry *e, vs_err *err) {
  store_folder *f = ctx;
  size_t skip = strlen(f->prefix), n = strlen(e->key);
  (void)err;
  if (n <= skip || strncmp(e->key, f->prefix, skip)) return VS_OK; /* the prefix itself, as an empty object */
  const char *name = e->key + skip;
  if (!e->is_prefix) {
    uint64_t version = shard_manifest_version(name);
    if (version > f->newest) f->newest = version;
    add_object(f, name, e);
    return VS_OK;
  }
  char *folder = tool_format("%.*s", (int)(n - skip - 1), name);
  tool_list_add(&f->folders, folder);
  free(folder);
  return VS_OK;
}

static int by_name(const void *a, const void *b) {
  return strcmp(((const store_object *)a)->name, ((const store_object *)b)->name);
}

vs_rc store_folder_list(store_folder *f, vs_err *err) {
  vs_rc rc = s3_list(f->place, f->prefix, "/", NULL, 0, add_entry, f, err);
  if (f->n_objects) qsort(f->objects, f->n_objects, sizeof *f->objects, by_name); /* S3's order, but not every store's */
  return rc;
}

const store_object *store_folder_find(const store_folder *f, const char *name) {
  store_object wanted = {.name = (char *)(uintptr_t)name};
  return f->n_objects ? bsearch(&wanted, f->objects, f->n_objects, sizeof wanted, by_name) : NULL;
}

/* ---- objects ---- */

char *store_folder_key(const store_folder *f, const char *name) { return tool_format("%s%s", f->prefix, name); }

vs_rc store_folder_manifest(const store_folder *f, uint64_t version, char **text, char etag[S3_ETAG_MAX], vs_err *err) {
  char name[64];
  uint8_t *body;
  size_t n;
  s3_meta meta;
  shard_manifest_file(version, name);
  char *key = store_folder_key(f, name);
  *text = NULL;
  vs_rc rc = s3_get(f->place, key, 0, UINT64_MAX, NULL, SHARD_MAX_MANIFEST, &body, &n, &meta, err);
  free(key);
  if (rc) return rc;
  if (memchr(body, 0, n)) rc = vs_corrupt(err, "%s/%s: damaged manifest: a NUL character", f->uri, name);
  else *text = tool_format("%.*s", (int)n, (char *)body), strcpy(etag, meta.etag);
  free(body);
  return rc;
}

void store_folder_reset(store_folder *f) {
  for (size_t i = 0; i < f->n_objects; i++) free(f->objects[i].name), free(f->objects[i].etag);
  free(f->objects), free(f->uri), free(f->prefix);
  tool_list_reset(&f->folders);
  s3_place_close(f->place);
  memset(f, 0, sizeof *f);
}
