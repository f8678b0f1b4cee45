/* cmd_pull.c - gets a shard, or every shard of a database, out of a store.
 *
 *   1 look      the listing says whether it is a shard or holds some; then each one's listing and newest manifest
 *   2 compare   with what the folders hold. Whatever forbids pulling, and a disk that is too small, ends the run here
 *   3 fetch     shard after shard: the segments that are not there (download.c), then the manifest
 * A reader sees a shard when it is complete, and not before. What is there is not fetched again, so an interrupted run
 * is continued by the same command. Names of folders and files come from the store: none leaves DIR.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../ext/base/vs_pool.h"
#include "../ext/s3vfs/s3_config.h"
#include "../ext/shard/shard_manifest.h"
#include "download.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "pull.h"
#include "store_folder.h"

enum { LOOKS_AT_ONCE = 16 };

typedef struct pull_options { int json; int64_t jobs; } pull_options;

static const option_row rows[] = {
    {"--jobs", OPTION_COUNT, "N", 1, 64, "8", 0, offsetof(pull_options, jobs),
     "requests at once, each with some 16 MiB in memory"},
    OPTION_JSON(pull_options),
};
static const option_command command = {
    "pull", "s3://bucket/prefix DIR",
    "Gets a shard into DIR, or a database (a prefix with shards below it) into folders in DIR. Each file is verified.\n"
    "Running the command again continues, and does nothing once all is there.",
    "  vecshard pull s3://my-bucket/db db", 2, 2, rows, sizeof rows / sizeof *rows};

typedef struct item {
  store_folder from;
  char *dir;
  shard_manifest m;       /* version 0: it is no shard */
  char *text;             /* of the manifest */
  shard_manifest have;    /* the folder's newest; version 0: none */
  int present;            /* that is the same */
  unsigned char *done;    /* by segment: the file is there */
  vs_rc rc;
  vs_err err;
} item;

typedef struct pull_job {
  int jobs;
  int (*worth)(void *ctx, uint64_t missing); /* NULL: always */
  void *worth_ctx;
  int declined;
  item *items;
  size_t n;
  uint64_t done, total, n_received, n_found, n_files, n_present;
} pull_job;

static void add_progress(void *ctx, uint64_t n_bytes, int is_new) {
  pull_job *j = ctx;
  if (is_new) j->done += n_bytes, j->n_received += n_bytes;
  else j->total -= n_bytes, j->n_found += n_bytes; /* or it would pass for speed */
  progress_bytes("pull", j->done, j->total);
}

/* ---- looking ---- */

static vs_rc read_manifest(item *x, vs_err *err) {
  char name[64], tag[S3_ETAG_MAX];
  uint64_t version = x->from.newest;
  vs_rc rc = store_folder_manifest(&x->from, version, &x->text, tag, err);
  if (rc) return rc;
  shard_manifest_file(version, name);
  char *path = tool_format("%s/%s", x->from.uri, name);
  rc = shard_manifest_parse(x->text, strlen(x->text), path, &x->m, err);
  if (!rc && x->m.version != version)
    rc = vs_corrupt(err, "%s: damaged manifest: it states version %" PRIu64, path, x->m.version);
  for (size_t i = 0; i < x->m.n_segments && !rc; i++) {
    const shard_segment_ref *ref = &x->m.segments[i];
    const store_object *o = store_folder_find(&x->from, ref->file);
    if (!store_is_segment_name(ref->file)) rc = vs_corrupt(err, "%s: damaged manifest: a segment is called %s", path, ref->file);
    else if (!o) rc = vs_corrupt(err, "%s/%s: there is no such object, but the manifest names it", x->from.uri, ref->file);
    else if (o->size != ref->n_bytes)
      rc = vs_corrupt(err, "%s/%s: damaged: the object has %" PRIu64 " bytes, %" PRIu64 " in the manifest", x->from.uri,
                      ref->file, o->size, ref->n_bytes);
  }
  free(path);
  return rc;
}

/* The first listing is that of the source itself. */
static void look(void *ctx, size_t i) {
  item *x = &((pull_job *)ctx)->items[i];
  x->rc = x->from.newest ? VS_OK : store_folder_list(&x->from, &x->err);
  if (!x->rc && x->from.newest) x->rc = read_manifest(x, &x->err);
}

/* A folder's name must stay in DIR, and be found there: those with a dot in front are no shards to any command. */
static vs_rc check_name(const store_folder *source, const char *name, vs_err *err) {
  if (*name && *name != '.' && strlen(name) <= 255) return VS_OK;
  return vs_fail(err, VS_INVALID, "%s/%s: a folder in DIR cannot have this name; pull the shards one by one",
                 source->uri, name);
}

/* One item for a shard; for what may be a database one for each folder in it. */
static vs_rc make_items(pull_job *j, store_folder *source, const char *dir, vs_err *err) {
  vs_rc rc = VS_OK;
  j->n = source->newest ? 1 : source->folders.n;
  j->items = tool_alloc(j->n, sizeof *j->items);
  if (source->newest) {
    j->items[0].from = *source, j->items[0].dir = tool_format("%s", dir);
    memset(source, 0, sizeof *source);
    return VS_OK;
  }
  for (size_t i = 0; i < j->n && !rc; i++) {
    const char *name = source->folders.items[i];
    char *uri = tool_format("%s/%s", source->uri, name);
    j->items[i].dir = tool_format("%s/%s", dir, name);
    rc = store_folder_open(uri, source->place, &j->items[i].from, err);
    free(uri);
  }
  return rc;
}

static vs_rc look_at_source(pull_job *j, const char *uri, const char *dir, vs_err *err) {
  store_folder source = {0};
  vs_rc rc = store_folder_open(uri, NULL, &source, err);
  size_t n_shards = 0;
  if (!rc) rc = store_folder_list(&source, err);
  if (!rc) rc = make_items(j, &source, dir, err);
  if (!rc) vs_pool_run(j->n, LOOKS_AT_ONCE, look, j);
  for (size_t i = 0; i < j->n && !rc; i++) {
    item *x = &j->items[i];
    n_shards += x->m.version != 0;
    if (x->rc) rc = vs_fail(err, x->rc, "%s", x->err.text);
    else if (x->m.version && source.uri) rc = check_name(&source, source.folders.items[i], err);
  }
  if (!rc && !n_shards)
    rc = vs_fail(err, VS_NOTFOUND, "%s is not a shard and holds none: there is no manifest; is the path right?",
                 source.uri);
  store_folder_reset(&source);
  return rc;
}

/* ---- comparing ---- */

static vs_rc read_local_text(const item *x, char **text, vs_err *err) {
  char name[64];
  shard_manifest_file(x->have.version, name);
  char *path = tool_format("%s/%s", x->dir, name);
  vs_rc rc = output_read_text(path, SHARD_MAX_MANIFEST, text, err);
  free(path);
  return rc;
}

/* A later version, another shard or a database must not be touched. */
static vs_rc compare_folder(item *x, vs_err *err) {
  char **names, *text = NULL;
  size_t n;
  vs_err ignored = {0};
  if (!shard_dir_is_shard(x->dir)) {
    if (shard_dir_list(x->dir, &names, &n, &ignored)) return VS_OK;
    shard_names_free(names, n);
    return n ? vs_fail(err, VS_EXISTS, "%s is a database of %zu shards: pull into %s/NAME", x->dir, n, x->dir) : VS_OK;
  }
  vs_rc rc = shard_manifest_read(x->dir, 0, &x->have, err);
  if (rc) return rc;
  if (strcmp(x->have.uuid, x->m.uuid))
    return vs_fail(err, VS_EXISTS, "%s holds another shard: pull into a folder of its own", x->dir);
  if (x->have.version > x->m.version)
    return vs_fail(err, VS_EXISTS, "%s is at version %" PRIu64 ", newer than version %" PRIu64 " of %s: nothing pulled",
                   x->dir, x->have.version, x->m.version, x->from.uri);
  if (x->have.version < x->m.version) return VS_OK;
  rc = read_local_text(x, &text, err);
  x->present = !rc && !strcmp(text, x->text);
  free(text);
  if (rc || x->present) return rc;
  return vs_fail(err, VS_EXISTS, "%s holds another version %" PRIu64 " of the shard: pull into a folder of its own",
                 x->dir, x->m.version);
}

static download download_of(pull_job *j, const item *x, size_t i) {
  const shard_segment_ref *ref = &x->m.segments[i];
  return (download){.place = x->from.place,
                    .key = store_folder_key(&x->from, ref->file),
                    .etag = store_folder_find(&x->from, ref->file)->etag,
                    .path = tool_format("%s/%s", x->dir, ref->file),
                    .size = ref->n_bytes,
                    .checksum = ref->checksum,
                    .jobs = j->jobs,
                    .progress = add_progress,
                    .ctx = j};
}

static void reset_download(download *d) {
  free((char *)(uintptr_t)d->key);
  free((char *)(uintptr_t)d->path);
}

/* A file that the folder's manifest names was verified when it came; one of a run that did not finish is read again. */
static vs_rc look_for_segment(const item *x, const download *d, const shard_segment_ref *ref, unsigned char *done,
                              vs_err *err) {
  struct stat st;
  int found = 0;
  if (stat(d->path, &st) || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != d->size) return VS_OK;
  for (size_t i = 0; i < x->have.n_segments && !*done; i++)
    *done = !strcmp(x->have.segments[i].file, ref->file) && !strcmp(x->have.segments[i].checksum, ref->checksum);
  if (*done) return VS_OK;
  vs_rc rc = download_is_done(d, &found, err);
  *done = (unsigned char)found;
  return rc;
}

static vs_rc compare_all(pull_job *j, uint64_t *missing, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < j->n && !rc; i++) {
    item *x = &j->items[i];
    if (!x->m.version) continue;
    rc = compare_folder(x, err);
    x->done = tool_alloc(x->m.n_segments, 1);
    for (size_t g = 0; g < x->m.n_segments && !rc; g++) {
      download d = download_of(j, x, g);
      rc = look_for_segment(x, &d, &x->m.segments[g], &x->done[g], err);
      if (!x->done[g]) *missing += download_missing(&d), j->total += d.size;
      reset_download(&d);
    }
  }
  return rc;
}

/* ---- fetching ---- */

static vs_rc fetch_segments(pull_job *j, item *x, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < x->m.n_segments && !rc; i++) {
    if (x->done[i]) continue;
    download d = download_of(j, x, i);
    rc = download_file(&d, err);
    j->n_files += !rc;
    reset_download(&d);
  }
  return rc;
}

static vs_rc pull_item(pull_job *j, item *x, vs_err *err) {
  int n_made = 0;
  vs_rc rc = output_make_folder(x->dir, &n_made, err);
  if (!rc) rc = fetch_segments(j, x, err);
  if (!rc && !x->present) rc = output_sync_folder(x->dir, err);
  if (!rc && !x->present) rc = shard_manifest_commit_text(x->dir, x->m.version, x->text, err);
  if (!rc) download_drop_leftovers(x->dir);
  else output_drop_folder(x->dir, n_made);
  j->n_present += !rc && x->present;
  return rc;
}

static vs_rc pull(pull_job *j, const char *from, const char *dir, vs_err *err) {
  uint64_t missing = 0;
  int n_made = 0;
  vs_rc rc = look_at_source(j, from, dir, err);
  if (!rc && j->n && strcmp(j->items[0].dir, dir) && shard_dir_is_shard(dir))
    rc = vs_fail(err, VS_EXISTS, "%s is a shard, and shards cannot lie in one: pull %s into another folder", dir, from);
  if (!rc) rc = compare_all(j, &missing, err);
  if (!rc && j->worth && !j->worth(j->worth_ctx, missing)) {
    j->declined = 1;
    return VS_OK;
  }
  if (!rc) rc = output_make_folder(dir, &n_made, err);
  if (!rc) rc = output_check_room(dir, missing, "for what is to come", "make room or choose another folder", err);
  for (size_t i = 0; i < j->n && !rc; i++)
    if (j->items[i].m.version) rc = pull_item(j, &j->items[i], err);
  if (rc) output_drop_folder(dir, n_made);
  return rc;
}

/* ---- the whole ---- */

static size_t count_shards(const pull_job *j) {
  size_t n = 0;
  for (size_t i = 0; i < j->n; i++) n += j->items[i].m.version != 0;
  return n;
}

static void print_result(const pull_job *j, int json, const char *dir, double seconds) {
  char received[32], found[32];
  size_t n = count_shards(j);
  if (json) {
    printf("{\"to\":");
    json_put_text(stdout, dir);
    printf(",\"shards\":%zu,\"present\":%" PRIu64 ",\"files_received\":%" PRIu64 ",\"bytes_received\":%" PRIu64
           ",\"bytes_reused\":%" PRIu64 ",\"seconds\":%.3f}\n",
           n, j->n_present, j->n_files, j->n_received, j->n_found, seconds);
    return;
  }
  printf("%s: %zu shard%s", dir, n, n == 1 ? "" : "s");
  if (j->n_present == n && !j->n_files) printf(", already there\n");
  else {
    printf(", %s received in %.1f s", output_size(j->n_received, received), seconds);
    if (j->n_found) printf(", %s were there", output_size(j->n_found, found));
    putchar('\n');
  }
}

static void reset(pull_job *j) {
  for (size_t i = 0; i < j->n; i++) {
    item *x = &j->items[i];
    shard_manifest_reset(&x->m), shard_manifest_reset(&x->have);
    store_folder_reset(&x->from);
    free(x->dir), free(x->text), free(x->done);
  }
  free(j->items);
}

static vs_rc run_pull(pull_job *j, const char *from, const char *dir, vs_err *err) {
  vs_rc rc = pull(j, from, dir, err);
  if (rc != VS_INTERRUPT) return rc;
  vs_err_reset(err);
  return vs_fail(err, VS_INTERRUPT, "interrupted; what arrived stays: run the command again to continue");
}

vs_rc pull_when_worth(const char *from, const char *dir, int (*worth)(void *ctx, uint64_t missing), void *ctx, int *pulled, vs_err *err) {
  pull_job j = {.jobs = 8, .worth = worth, .worth_ctx = ctx};
  vs_rc rc = run_pull(&j, from, dir, err);
  *pulled = !rc && !j.declined;
  reset(&j);
  return rc;
}

static int run(const pull_options *o, const char *from, const char *dir) {
  pull_job j = {.jobs = (int)o->jobs};
  vs_err err = {0};
  double started = tool_seconds();
  vs_rc rc = run_pull(&j, from, dir, &err);
  int status = (int)tool_report(&err);
  if (!rc) print_result(&j, o->json, dir, tool_seconds() - started);
  reset(&j);
  return status;
}

int cmd_pull(int argc, char **argv) {
  pull_options o = {0};
  tool_list args = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0 && (!store_is_uri(args.items[0]) || s3_is_uri(args.items[1]) || !*args.items[1]))
    status = (int)options_wrong(&command, "it is `vecshard pull s3://bucket/prefix DIR`");
  if (status < 0) status = run(&o, args.items[0], args.items[1]);
  tool_list_reset(&args);
  return status;
}
