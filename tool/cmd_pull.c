/* cmd_pull.c - gets a shard, or every shard of a database, out of a store.
 *
 * The segments first, each verified, then the manifest: a reader sees the shard when it is complete. What is there already is
 * not fetched again, so an interrupted run is continued by the same command.
 */
#include <stdlib.h>
#include <string.h>

#include "../ext/s3vfs/s3_config.h"
#include "../ext/shard/shard_files.h"
#include "download.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"

typedef struct pull_options { int json; int64_t jobs; } pull_options;

static const option_row rows[] = {
    {"--jobs", OPTION_COUNT, "N", 1, 64, "8", 0, offsetof(pull_options, jobs), "requests at once"},
    OPTION_JSON(pull_options),
};
static const option_command command = {
    "pull", "s3://bucket/prefix DIR",
    "Gets a shard into DIR, or a database (a prefix with shards below it) into folders in DIR. Each file is verified; running the "
    "command again continues, and does nothing once all is there.",
    "  vecshard pull s3://my-bucket/db db", 2, 2, rows, sizeof rows / sizeof *rows};

typedef struct pull_job {
  const pull_options *o;
  uint64_t done, total, n_bytes, n_shards, n_present;
} pull_job;

static void add_progress(void *ctx, uint64_t bytes) {
  pull_job *j = ctx;
  j->done += bytes;
  progress_bytes("pull", j->done, j->total);
}

/* ---- one shard ---- */

/* Is the folder's newest version this very one? A later one, or another shard, must not be touched. */
static vs_rc look_at_folder(const char *dir, const shard_manifest *want, int *present, vs_err *err) {
  shard_manifest have = {0};
  vs_err ignored = {0};
  *present = 0;
  if (!shard_dir_is_shard(dir)) return VS_OK;
  vs_rc rc = shard_manifest_read(dir, 0, &have, &ignored);
  if (rc) return vs_fail(err, rc, "%s", ignored.text);
  if (strcmp(have.uuid, want->uuid)) rc = vs_fail(err, VS_EXISTS, "%s holds another shard: pull into a folder of its own", dir);
  else if (have.version > want->version)
    rc = vs_fail(err, VS_EXISTS, "%s is at version %llu, newer than what is published (%llu)", dir, (unsigned long long)have.version,
                 (unsigned long long)want->version);
  else *present = have.version == want->version;
  shard_manifest_reset(&have);
  return rc;
}

static vs_rc pull_segment(pull_job *j, const shard_files *f, size_t i, const char *dir, vs_err *err) {
  const shard_segment_ref *ref = &f->manifest.segments[i];
  char *path = tool_format("%s/%s", dir, ref->file), *key = NULL;
  s3_place *place = NULL;
  vs_rc rc = VS_OK;
  if (download_is_done(path, ref->n_bytes, ref->checksum)) add_progress(j, ref->n_bytes);
  else if (!(rc = shard_files_locate(f, i, &place, &key, err))) {
    download d = {.place = place, .key = key, .path = path, .size = ref->n_bytes, .checksum = ref->checksum, .jobs = (int)j->o->jobs,
                  .progress = add_progress, .ctx = j};
    rc = download_file(&d, err);
    if (!rc) j->n_bytes += ref->n_bytes;
  }
  s3_place_close(place);
  free(key), free(path);
  return rc;
}

static vs_rc pull_shard(pull_job *j, const shard_files *f, const char *dir, vs_err *err) {
  int n_made = 0, present = 0;
  vs_rc rc = output_make_folder(dir, &n_made, err);
  if (!rc) rc = look_at_folder(dir, &f->manifest, &present, err);
  for (size_t i = 0; i < f->manifest.n_segments && !rc; i++) rc = pull_segment(j, f, i, dir, err);
  if (!rc) rc = output_sync_folder(dir, err);
  if (!rc && !present) rc = shard_manifest_commit(dir, &f->manifest, err);
  j->n_shards += !rc, j->n_present += !rc && present;
  return rc;
}

/* ---- all of them ---- */

static const char *last_part(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

/* What is still to come, for the disk's sake: files that have their size count as there. */
static uint64_t missing_bytes(const shard_files *f, const char *dir) {
  uint64_t n = 0;
  for (size_t i = 0; i < f->manifest.n_segments; i++) {
    const shard_segment_ref *ref = &f->manifest.segments[i];
    char *path = tool_format("%s/%s", dir, ref->file), *part = tool_format("%s.part", path);
    if (output_allocated(path) < ref->n_bytes) n += ref->n_bytes > output_allocated(part) ? ref->n_bytes - output_allocated(part) : 0;
    free(path), free(part);
  }
  return n;
}

static vs_rc pull(pull_job *j, const char *from, const char *dir, vs_err *err) {
  char **uris, **dirs = NULL;
  size_t n, len = strlen(from);
  uint64_t missing = 0;
  int n_made = 0;
  while (len && from[len - 1] == '/') len--;
  vs_rc rc = shard_paths(from, &uris, &n, err);
  if (rc) return rc;
  int single = n == 1 && strlen(uris[0]) == len && !strncmp(uris[0], from, len);
  shard_files *files = tool_alloc(n, sizeof *files);
  dirs = tool_alloc(n, sizeof *dirs);
  for (size_t i = 0; i < n && !rc; i++) {
    dirs[i] = single ? tool_format("%s", dir) : tool_format("%s/%s", dir, last_part(uris[i]));
    rc = shard_files_open(uris[i], &files[i], err);
    for (size_t g = 0; !rc && g < files[i].manifest.n_segments; g++) j->total += files[i].manifest.segments[g].n_bytes;
    if (!rc) missing += missing_bytes(&files[i], dirs[i]);
  }
  if (!rc) rc = output_make_folder(dir, &n_made, err);
  if (!rc) rc = output_check_space(dir, missing, dir, 0, err);
  for (size_t i = 0; i < n && !rc; i++) rc = pull_shard(j, &files[i], dirs[i], err);
  if (rc) output_drop_folder(dir, n_made);
  for (size_t i = 0; i < n; i++) shard_files_reset(&files[i]), free(dirs[i]);
  free(files), free(dirs);
  shard_names_free(uris, n);
  return rc;
}

static void print_result(const pull_job *j, const char *dir, double seconds) {
  char got[32];
  if (j->o->json) {
    printf("{\"to\":");
    json_put_text(stdout, dir);
    printf(",\"shards\":%llu,\"present\":%llu,\"bytes_received\":%llu,\"seconds\":%.3f}\n", (unsigned long long)j->n_shards,
           (unsigned long long)j->n_present, (unsigned long long)j->n_bytes, seconds);
    return;
  }
  printf("%s: %llu shard%s", dir, (unsigned long long)j->n_shards, j->n_shards == 1 ? "" : "s");
  if (j->n_present == j->n_shards && !j->n_bytes) printf(", already there\n");
  else printf(", %s received in %.1f s\n", output_size(j->n_bytes, got), seconds);
}

int cmd_pull(int argc, char **argv) {
  pull_options o = {0};
  pull_job j = {.o = &o};
  tool_list args = {0};
  vs_err err = {0};
  double started = tool_seconds();
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0 && (!s3_is_uri(args.items[0]) || s3_is_uri(args.items[1])))
    status = (int)options_wrong(&command, "it is `vecshard pull s3://bucket/prefix DIR`");
  if (status < 0) {
    vs_rc rc = pull(&j, args.items[0], args.items[1], &err);
    if (rc == VS_INTERRUPT) vs_err_reset(&err), rc = vs_fail(&err, VS_INTERRUPT, "interrupted: run the command again to continue");
    status = tool_report(&err);
    if (!rc) print_result(&j, args.items[1], tool_seconds() - started);
  }
  tool_list_reset(&args);
  return status;
}
