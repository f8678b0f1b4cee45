/* cmd_publish.c - puts a shard, or every shard of a database, into a store.
 *
 * The segments first, then the manifest, which only one writer can create, then `latest`: a reader sees a version when it is
 * complete, and not before. What is there already is not sent again, so an interrupted run is continued by the same command.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/s3vfs/s3_config.h"
#include "../ext/shard/shard_files.h"
#include "../ext/shard/shard_hint.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "upload.h"

typedef struct publish_options { int json, only_writer; int64_t jobs, part_size; } publish_options;

static const option_row rows[] = {
    {"--jobs", OPTION_COUNT, "N", 1, 64, "8", 0, offsetof(publish_options, jobs), "parts sent at once; each is held in memory"},
    {"--part-size", OPTION_SIZE, "SIZE", 5 << 20, (int64_t)5 << 30, NULL, 0, offsetof(publish_options, part_size),
     "of a multipart upload (16M, more for objects above 160 GB)"},
    {"--only-writer", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(publish_options, only_writer),
     "nobody else publishes there: for stores without If-None-Match"},
    OPTION_JSON(publish_options),
};
static const option_command command = {
    "publish", "DIR s3://bucket/prefix",
    "Puts a shard, or a database (a folder of shards), into an S3 store. Each file is verified while it is sent; running the "
    "command again continues, and does nothing once all is there. Settings as the AWS SDKs read them: AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_PROFILE, AWS_ENDPOINT_URL for other stores.",
    "  vecshard publish db s3://my-bucket/db\n"
    "  vecshard query s3://my-bucket/db --queries q.npy -k 10",
    2, 2, rows, sizeof rows / sizeof *rows};

typedef struct there { shard_manifest *m; uint64_t newest; char newest_etag[S3_ETAG_MAX]; uint64_t *sizes; int has_hint; size_t skip; } there;

typedef struct publish_job {
  const publish_options *o;
  s3_place *place;
  uint64_t done, total;         /* bytes, of all shards */
  uint64_t n_sent, n_bytes, n_reused, n_shards, n_present;
} publish_job;

static void add_progress(void *ctx, uint64_t bytes) {
  publish_job *j = ctx;
  j->done += bytes;
  progress_bytes("publish", j->done, j->total);
}

/* ---- what is there ---- */

static vs_rc note_object(void *ctx, const s3_entry *e, vs_err *err) {
  there *t = ctx;
  const char *name = e->key + t->skip;
  uint64_t v = shard_manifest_version(name);
  (void)err;
  if (v > t->newest) t->newest = v, snprintf(t->newest_etag, sizeof t->newest_etag, "%s", e->etag);
  if (!strcmp(name, SHARD_HINT_NAME)) t->has_hint = 1;
  for (size_t i = 0; i < t->m->n_segments; i++)
    if (!strcmp(t->m->segments[i].file, name)) t->sizes[i] = e->size;
  return VS_OK;
}

static vs_rc look(publish_job *j, const char *prefix, shard_manifest *m, there *t, vs_err *err) {
  *t = (there){.m = m, .skip = strlen(prefix), .sizes = tool_alloc(m->n_segments, sizeof *t->sizes)};
  for (size_t i = 0; i < m->n_segments; i++) t->sizes[i] = UINT64_MAX;
  return s3_list(j->place, prefix, "/", NULL, 0, note_object, t, err);
}

/* ---- one shard ---- */

static vs_rc send_segments(publish_job *j, const char *dir, const char *prefix, const there *t, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < t->m->n_segments && !rc; i++) {
    const shard_segment_ref *ref = &t->m->segments[i];
    if (t->sizes[i] == ref->n_bytes) { /* the name comes from the content */
      add_progress(j, ref->n_bytes);
      continue;
    }
    char *key = tool_format("%s%s", prefix, ref->file), *path = tool_format("%s/%s", dir, ref->file);
    upload u = {.place = j->place, .key = key, .path = path, .size = ref->n_bytes, .checksum = ref->checksum, .jobs = (int)j->o->jobs,
                .part_size = (uint64_t)j->o->part_size, .progress = add_progress, .ctx = j};
    rc = upload_file(&u, err);
    if (!rc) j->n_sent++, j->n_bytes += ref->n_bytes - u.n_reused, j->n_reused += u.n_reused;
    free(key), free(path);
  }
  return rc;
}

/* Is the manifest that is there the one that would be written? */
static vs_rc same_manifest(publish_job *j, const char *key, const char *text, int *same, char *tag, vs_err *err) {
  uint8_t *body;
  size_t n;
  s3_meta meta;
  vs_rc rc = s3_get(j->place, key, 0, UINT64_MAX, NULL, SHARD_MAX_MANIFEST, &body, &n, &meta, err);
  if (rc) return rc;
  *same = n == strlen(text) && !memcmp(body, text, n);
  strcpy(tag, meta.etag);
  free(body);
  return VS_OK;
}

/* Without the condition: look, then write. Two writers at the same moment would not see each other. */
static vs_rc put_as_only_writer(publish_job *j, const char *key, const char *text, char *tag, vs_err *err) {
  s3_meta meta;
  vs_err ignored = {0};
  vs_rc rc = s3_head(j->place, key, &meta, &ignored);
  if (rc == VS_OK) return vs_fail(err, VS_EXISTS, "there");
  if (rc != VS_NOTFOUND) return vs_fail(err, rc, "%s", ignored.text);
  return s3_put(j->place, key, text, strlen(text), 0, tag, err);
}

static vs_rc put_manifest(publish_job *j, const char *key, const char *text, uint64_t version, char *tag, vs_err *err) {
  vs_err why = {0};
  int same = 0;
  vs_rc rc = j->o->only_writer ? put_as_only_writer(j, key, text, tag, &why) : s3_put(j->place, key, text, strlen(text), 1, tag, &why);
  if (rc == VS_UNSUPPORTED)
    return vs_fail(err, rc, "%s\nThis store does not know If-None-Match, which keeps two writers apart. If nobody else publishes there, "
                            "run the command again with --only-writer.", why.text);
  if (rc != VS_EXISTS) return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
  vs_err_reset(&why);
  if ((rc = same_manifest(j, key, text, &same, tag, &why))) return vs_fail(err, rc, "%s", why.text);
  if (same) return VS_OK;
  char *name = s3_place_name(j->place, key);
  rc = vs_fail(err, VS_EXISTS, "%s: another writer published version %llu of another shard first; nothing is lost: publish to a place of its own",
               name ? name : key, (unsigned long long)version);
  free(name);
  return rc;
}

/* A reader without the hint needs more rounds, nothing else: no reason to fail. */
static void put_hint(publish_job *j, const char *dir, const char *prefix, const shard_manifest *m, const char *tag) {
  vs_err err = {0};
  uint8_t *body = NULL;
  size_t n = 0;
  char *key = tool_format("%s%s", prefix, SHARD_HINT_NAME);
  vs_rc rc = shard_hint_make(dir, m, tag, &body, &n, &err);
  if (!rc) rc = s3_put(j->place, key, body, n, 0, NULL, &err);
  if (rc) tool_note("warning: %s (readers will need more requests)", err.text);
  free(body), free(key);
}

static vs_rc publish_there(publish_job *j, const char *dir, const char *prefix, shard_manifest *m, const char *text, vs_err *err) {
  there t;
  char name[64], tag[S3_ETAG_MAX] = "";
  int present = 0;
  shard_manifest_file(m->version, name);
  char *key = tool_format("%s%s", prefix, name);
  vs_rc rc = look(j, prefix, m, &t, err);
  if (!rc && t.newest > m->version)
    rc = vs_fail(err, VS_EXISTS, "version %llu is published there already, and %s is at version %llu: pull it first, or publish to another place",
                 (unsigned long long)t.newest, dir, (unsigned long long)m->version);
  if (!rc && t.newest == m->version) rc = same_manifest(j, key, text, &present, tag, err);
  if (!rc && t.newest == m->version && !present)
    rc = vs_fail(err, VS_EXISTS, "another shard is published there at the same version: publish %s to a place of its own", dir);
  if (!rc) rc = send_segments(j, dir, prefix, &t, err);
  if (!rc && !present) rc = put_manifest(j, key, text, m->version, tag, err);
  if (!rc && (!present || !t.has_hint)) put_hint(j, dir, prefix, m, tag);
  j->n_shards += !rc, j->n_present += !rc && present;
  free(t.sizes), free(key);
  return rc;
}

static vs_rc read_manifest(const char *dir, shard_manifest *m, char **text, vs_err *err) {
  char name[64];
  vs_rc rc = shard_manifest_read(dir, 0, m, err);
  if (rc) return rc;
  shard_manifest_file(m->version, name);
  char *path = tool_format("%s/%s", dir, name);
  rc = output_read_text(path, SHARD_MAX_MANIFEST, text, err);
  free(path);
  return rc;
}

static vs_rc publish_shard(publish_job *j, const char *dir, const char *uri, vs_err *err) {
  shard_manifest m = {0};
  char *text = NULL, *key = NULL;
  vs_err why = {0};
  s3_place_close(j->place);
  j->place = NULL;
  vs_rc rc = read_manifest(dir, &m, &text, &why);
  if (!rc) rc = s3_place_open(uri, &j->place, &key, &why);
  if (!rc) {
    char *prefix = tool_format("%s%s", key, *key ? "/" : "");
    rc = publish_there(j, dir, prefix, &m, text, &why);
    free(prefix);
  }
  free(key), free(text);
  shard_manifest_reset(&m);
  if (!rc) return VS_OK;
  if (rc == VS_INTERRUPT) return vs_fail(err, rc, "interrupted: run the command again to continue");
  return strncmp(why.text, "s3://", 5) && rc == VS_EXISTS ? vs_fail(err, rc, "%s: %s", uri, why.text) : vs_fail(err, rc, "%s", why.text);
}

/* ---- all of them ---- */

static const char *last_part(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

static vs_rc measure(publish_job *j, char **dirs, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    shard_manifest m = {0};
    rc = shard_manifest_read(dirs[i], 0, &m, err);
    for (size_t g = 0; g < m.n_segments; g++) j->total += m.segments[g].n_bytes;
    shard_manifest_reset(&m);
  }
  return rc;
}

static vs_rc publish(publish_job *j, const char *dir, const char *to, vs_err *err) {
  char **dirs;
  size_t n, len = strlen(to);
  if (s3_is_uri(dir)) return vs_fail(err, VS_INVALID, "%s: publish takes a local folder first, then where it goes", dir);
  while (len && to[len - 1] == '/') len--;
  vs_rc rc = shard_paths(dir, &dirs, &n, err);
  int single = !rc && shard_dir_is_shard(dir);
  if (!rc) rc = measure(j, dirs, n, err);
  for (size_t i = 0; i < n && !rc; i++) {
    char *uri = single ? tool_format("%.*s", (int)len, to) : tool_format("%.*s/%s", (int)len, to, last_part(dirs[i]));
    rc = publish_shard(j, dirs[i], uri, err);
    free(uri);
  }
  shard_names_free(dirs, n);
  s3_place_close(j->place);
  return rc;
}

static void print_result(const publish_job *j, const char *to, double seconds) {
  char sent[32];
  if (j->o->json) {
    printf("{\"to\":");
    json_put_text(stdout, to);
    printf(",\"shards\":%llu,\"present\":%llu,\"files_sent\":%llu,\"bytes_sent\":%llu,\"bytes_reused\":%llu,\"seconds\":%.3f}\n",
           (unsigned long long)j->n_shards, (unsigned long long)j->n_present, (unsigned long long)j->n_sent,
           (unsigned long long)j->n_bytes, (unsigned long long)j->n_reused, seconds);
    return;
  }
  printf("%s: %llu shard%s", to, (unsigned long long)j->n_shards, j->n_shards == 1 ? "" : "s");
  if (j->n_present == j->n_shards) printf(", already published\n");
  else printf(" published, %s sent in %.1f s\n", output_size(j->n_bytes, sent), seconds);
}

int cmd_publish(int argc, char **argv) {
  publish_options o = {0};
  publish_job j = {.o = &o};
  tool_list args = {0};
  vs_err err = {0};
  double started = tool_seconds();
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0 && strncmp(args.items[1], "s3://", 5)) status = (int)options_wrong(&command, "where it goes must be like s3://bucket/prefix");
  if (status < 0) {
    vs_rc rc = publish(&j, args.items[0], args.items[1], &err);
    status = tool_report(&err);
    if (!rc) print_result(&j, args.items[1], tool_seconds() - started);
  }
  tool_list_reset(&args);
  return status;
}
