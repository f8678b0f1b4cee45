/* plan_check.c - see plan_check.h.
 *
 * A shard says in its manifest what it was built from (shard_origin): hashes of the bucket's file names and rows, how many rows
 * its input had, and how many of them it left out. So a bucket that was built from another plan, by hand, or copied under
 * another bucket's name is told from the right one, also after the database went to a store and the input files are gone.
 */
#include "plan_check.h"

#include <stdlib.h>
#include <string.h>

#include "../ext/base/vs_io.h"
#include "../ext/shard/shard_files.h"
#include "options.h"
#include "progress.h"
#include "source.h"

/* ---- one shard ---- */

/* Is every file there, whole by its size? */
static vs_rc check_files(const shard_files *f, uint64_t *n_bytes, vs_err *err) {
  vs_rc rc = VS_OK;
  *n_bytes = 0;
  for (size_t i = 0; i < f->manifest.n_segments && !rc; i++) {
    const shard_segment_ref *g = &f->manifest.segments[i];
    vs_io *io = NULL;
    rc = shard_files_segment(f, i, &io, err);
    if (!rc && io->size != g->n_bytes)
      rc = vs_corrupt(err, "%s/%s: has %llu bytes, the manifest says %llu", f->path, g->file, (unsigned long long)io->size,
                      (unsigned long long)g->n_bytes);
    if (io) io->close(io);
    *n_bytes += g->n_bytes;
  }
  return rc;
}

vs_rc plan_check_shard(const char *folder, const shard_origin *want, uint64_t *n_rows, uint64_t *n_bytes, vs_err *err) {
  static const char advice[] = "choose another --out, or remove that folder first";
  shard_files f;
  vs_err why = {0};
  vs_rc rc = shard_files_open(folder, &f, &why);
  *n_rows = *n_bytes = 0;
  if (!rc) rc = check_files(&f, n_bytes, &why);
  if (rc) rc = vs_fail(err, VS_EXISTS, "%s; %s", why.text, advice);
  else if (!*f.manifest.origin.files)
    rc = vs_fail(err, VS_EXISTS, "%s: already holds a shard that was not built from a plan; %s", folder, advice);
  else if (strcmp(f.manifest.origin.files, want->files))
    rc = vs_fail(err, VS_EXISTS, "%s: already holds a shard built from other files than this bucket's; %s", folder, advice);
  else if (strcmp(f.manifest.origin.options, want->options))
    rc = vs_fail(err, VS_EXISTS, "%s: already holds this bucket, built with other options; %s", folder, advice);
  *n_rows = f.manifest.n_rows;
  shard_files_reset(&f);
  return rc;
}

/* ---- a database ---- */

typedef struct check {
  const plan *p;
  const plan_checker *c;
  uint8_t *seen;           /* per bucket */
  char *first;             /* a shard, and what the others must share with it */
  uint32_t dim;
  int metric, id_text;
} check;

size_t plan_bucket_number(const plan *p, const char *path) {
  const char *name = strrchr(path, '/');
  int64_t n;
  name = name ? name + 1 : path;
  if (strncmp(name, "bucket", 6) || name[6] == '0') return 0;
  return options_number(name + 6, 0, 1, (int64_t)p->n, &n) ? (size_t)n : 0;
}

static void tell(const check *k, size_t bucket, const char *path, char *text) {
  progress_clear();
  k->c->fault(k->c->ctx, bucket, path, text);
  free(text);
}

static void check_rows(const check *k, size_t bucket, const char *path, const shard_manifest *m) {
  const shard_origin *o = &m->origin;
  unsigned long long have = m->n_rows, input = o->n_rows, skipped = o->n_skipped, twice = o->n_duplicates;
  uint64_t planned = k->p->buckets[bucket - 1].n_rows;
  if (planned != PLAN_ROWS_UNKNOWN && planned != o->n_rows)
    tell(k, bucket, path,
         tool_format("was built from %llu rows, the plan says %llu", input, (unsigned long long)planned));
  else if (m->n_rows != o->n_rows - o->n_skipped - o->n_duplicates)
    tell(k, bucket, path,
         tool_format("holds %llu rows; its input had %llu, of which %llu were bad and %llu duplicates", have, input, skipped,
                     twice));
}

/* Shards of one database are searched together. */
static void check_alike(check *k, size_t bucket, const char *path, const shard_manifest *m) {
  if (!k->first) {
    k->first = tool_format("%s", path), k->dim = m->dim, k->metric = (int)m->metric, k->id_text = m->id_text;
    return;
  }
  if (m->dim != k->dim) tell(k, bucket, path, tool_format("has dimension %u and %s has %u", m->dim, k->first, k->dim));
  if ((int)m->metric != k->metric)
    tell(k, bucket, path,
         tool_format("has metric %s and %s has %s", source_metric((int)m->metric), k->first, source_metric(k->metric)));
  if (m->id_text != k->id_text)
    tell(k, bucket, path, tool_format("has ids of another kind than %s (text and integers)", k->first));
}

static void check_bucket(check *k, size_t bucket, const char *path) {
  char hash[33];
  shard_files f;
  vs_err why = {0};
  uint64_t n_bytes;
  vs_rc rc = shard_files_open(path, &f, &why);
  if (!rc) rc = check_files(&f, &n_bytes, &why);
  plan_hash(&k->p->buckets[bucket - 1], hash);
  if (rc) tell(k, bucket, path, tool_format("%s", why.text));
  else if (!*f.manifest.origin.files) tell(k, bucket, path, tool_format("was not built from a plan"));
  else if (strcmp(f.manifest.origin.files, hash))
    tell(k, bucket, path, tool_format("was built from other files than the plan's"));
  else check_rows(k, bucket, path, &f.manifest), check_alike(k, bucket, path, &f.manifest);
  shard_files_reset(&f);
}

static vs_rc check_folders(check *k, const tool_list *folders, vs_err *err) {
  for (size_t i = 0; i < folders->n; i++) {
    const char *path = folders->items[i];
    size_t bucket = plan_bucket_number(k->p, path);
    progress_count("compare with the plan", i, folders->n, "shards");
    if (tool_stop(NULL)) return vs_fail(err, VS_INTERRUPT, "interrupted");
    if (!bucket) tell(k, 0, path, tool_format("is no bucket of the plan"));
    else k->seen[bucket - 1] = 1, check_bucket(k, bucket, path);
  }
  progress_clear();
  return VS_OK;
}

vs_rc plan_check(const plan *p, const char *db, const plan_checker *c, tool_list *folders, vs_err *err) {
  vs_err why = {0};
  check k = {.p = p, .c = c, .seen = tool_alloc(p->n, 1)};
  size_t len = strlen(db);
  while (len > 1 && db[len - 1] == '/') len--;
  vs_rc rc = source_expand(db, folders, &why);
  /* Nothing is there yet: then every bucket is missing. */
  if (rc && rc != VS_NOTFOUND) rc = vs_fail(err, rc, "%s", why.text);
  else if (!rc && folders->n == 1 && strlen(folders->items[0]) == len && !strncmp(folders->items[0], db, len))
    rc = vs_fail(err, VS_INVALID, "%s: is a shard; --plan goes with the database that its buckets are in", db);
  else rc = check_folders(&k, folders, err);
  for (size_t b = 0; b < p->n && !rc; b++) {
    if (k.seen[b]) continue;
    char *path = tool_format("%.*s/bucket%zu", (int)len, db, b + 1);
    tell(&k, b + 1, path, NULL);
    free(path);
  }
  free(k.seen), free(k.first);
  return rc;
}
