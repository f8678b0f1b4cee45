/* cmd_publish.c - puts a shard, or every shard of a database, into a store.
 *
 *   1 read     the newest local manifest of each shard
 *   2 look     what is there, for all shards at once: one listing each. Whatever forbids publishing ends the run here
 *   3 send     shard after shard: the segments that are not there (upload.c), then the manifest, which only one writer can
 *              create, then `latest`
 * A reader sees a version when it is complete, and not before. What is there is not sent again, so an interrupted run is
 * continued by the same command.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/base/vs_pool.h"
#include "../ext/s3vfs/s3_config.h"
#include "../ext/shard/shard_files.h"
#include "../ext/shard/shard_hint.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "resources.h"
#include "store_folder.h"
#include "transfer.h"
#include "upload.h"

enum { LOOKS_AT_ONCE = 16 };

typedef struct publish_options { int json, only_writer; int64_t jobs, memory, part_size; } publish_options;

static const option_row rows[] = {
    {"--jobs", OPTION_COUNT, "N", 1, 64, NULL, 0, offsetof(publish_options, jobs),
     "requests at once, each with a part in memory (default: 8, fewer where --memory does not hold the parts)"},
    {"--memory", OPTION_SIZE, "SIZE", 5 << 20, INT64_MAX, "a quarter of the machine's, 256M to 8G", 0,
     offsetof(publish_options, memory), "for the parts under way"},
    {"--part-size", OPTION_SIZE, "SIZE", 5 << 20, (int64_t)5 << 30, NULL, 0, offsetof(publish_options, part_size),
     "larger files go in parts of this size (default: 16M; above 160 GB a 10,000th of the file)"},
    {"--only-writer", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(publish_options, only_writer),
     "nobody else publishes there: for stores without If-None-Match"},
    OPTION_JSON(publish_options),
};
static const option_command command = {
    "publish", "DIR s3://bucket/prefix",
    "Puts a shard, or a database (a folder of shards, each as prefix/NAME), into an S3 store. Each file is verified\n"
    "while it is sent. Running the command again continues, and does nothing once all is there. Settings as the AWS\n"
    "SDKs read them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_PROFILE, AWS_ENDPOINT_URL for others.",
    "  vecshard publish db s3://my-bucket/db\n"
    "  vecshard query s3://my-bucket/db --queries q.npy -k 10",
    2, 2, rows, sizeof rows / sizeof *rows};

typedef struct item {
  const char *dir;
  shard_manifest m;
  char *text;             /* of the local manifest */
  store_folder there;
  char tag[S3_ETAG_MAX];  /* of the manifest in the store */
  int is_database;        /* a prefix, not a shard of ours: may shards lie in it? */
  int present;            /* this very version is published */
  vs_rc rc;
  vs_err err;
} item;

typedef struct publish_job {
  const publish_options *o;
  item *items;            /* the shards; for a database one more, the prefix that they lie in */
  size_t n, n_items;
  uint64_t done, total, n_sent, n_reused, n_files, n_present;
} publish_job;

static void add_progress(void *ctx, uint64_t n_bytes, int is_new) {
  publish_job *j = ctx;
  if (is_new) j->done += n_bytes;
  else j->total -= n_bytes; /* or it would pass for speed */
  progress_bytes("publish", j->done, j->total);
}

/* ---- reading ---- */

static vs_rc read_manifest(item *x, vs_err *err) {
  char name[64];
  vs_rc rc = shard_manifest_read(x->dir, 0, &x->m, err);
  if (rc) return rc;
  shard_manifest_file(x->m.version, name);
  char *path = tool_format("%s/%s", x->dir, name);
  /* The very bytes: parsing drops what this build does not know. */
  rc = output_read_text(path, SHARD_MAX_MANIFEST, &x->text, err);
  free(path);
  for (size_t i = 0; i < x->m.n_segments && !rc; i++)
    if (!store_is_segment_name(x->m.segments[i].file))
      rc = vs_corrupt(err, "%s: damaged manifest: a segment is called %s", x->dir, x->m.segments[i].file);
  return rc;
}

static const char *last_part(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

static vs_rc read_items(publish_job *j, char **dirs, int is_database, const char *to, vs_err *err) {
  vs_rc rc = VS_OK;
  s3_place *place = NULL;
  int len = (int)strlen(to);
  while (to[len - 1] == '/') len--;
  j->n_items = j->n + (size_t)is_database;
  j->items = tool_alloc(j->n_items, sizeof *j->items);
  for (size_t i = 0; i < j->n_items && !rc; i++) {
    item *x = &j->items[i];
    x->is_database = i == j->n, x->dir = i < j->n ? dirs[i] : "";
    char *uri =
        i < j->n && is_database ? tool_format("%.*s/%s", len, to, last_part(dirs[i])) : tool_format("%.*s", len, to);
    if (i < j->n) rc = read_manifest(x, err);
    if (!rc) rc = store_folder_open(uri, place, &x->there, err);
    place = j->items[0].there.place; /* one for all: what is learned of region and clock holds for all */
    free(uri);
  }
  return rc;
}

/* ---- looking ---- */

/* A shard may not go where it would hide those of a database. */
static vs_rc refuse_database(const item *x, vs_err *err) {
  char **uris;
  size_t n;
  vs_err ignored = {0};
  vs_rc rc = x->there.folders.n ? shard_paths(x->there.uri, &uris, &n, &ignored) : VS_NOTFOUND;
  if (rc == VS_NOTFOUND) return VS_OK;
  if (rc) return vs_fail(err, rc, "%s", ignored.text);
  shard_names_free(uris, n);
  return vs_fail(err, VS_EXISTS, "%s is a database of %zu shards: publish to %s/NAME, a place of its own", x->there.uri,
                 n, x->there.uri);
}

static vs_rc read_published(const item *x, uint64_t version, shard_manifest *m, char **text, char *tag, vs_err *err) {
  vs_rc rc = store_folder_manifest(&x->there, version, text, tag, err);
  return rc ? rc : shard_manifest_parse(*text, strlen(*text), x->there.uri, m, err);
}

/* A manifest of the same version is there: it must be ours. */
static vs_rc compare(item *x, vs_err *err) {
  shard_manifest theirs = {0};
  char *text = NULL;
  vs_rc rc = read_published(x, x->m.version, &theirs, &text, x->tag, err);
  int is_other = !rc && strcmp(theirs.uuid, x->m.uuid);
  x->present = !rc && !strcmp(text, x->text);
  free(text);
  shard_manifest_reset(&theirs);
  if (rc || x->present) return rc;
  return vs_fail(err, VS_EXISTS, "%s: another writer published version %" PRIu64 "%s first; nothing is lost: %s",
                 x->there.uri, x->m.version, is_other ? " of another shard" : "",
                 is_other ? "publish to a place of its own" : "pull that version, or publish to a place of its own");
}

static vs_rc compare_listed(item *x, vs_err *err) {
  char name[64];
  shard_manifest_file(x->m.version, name);
  const store_object *o = store_folder_find(&x->there, name);
  x->present = strlen(o->etag) < sizeof x->tag && transfer_is_md5(o->etag, x->text, strlen(x->text));
  if (!x->present) return compare(x, err);
  strcpy(x->tag, o->etag);
  return VS_OK;
}

/* An older version must be of the same shard: else two shards would share a place. */
static vs_rc check_older(const item *x, vs_err *err) {
  shard_manifest older = {0};
  char *text = NULL, tag[S3_ETAG_MAX];
  vs_rc rc = read_published(x, x->there.newest, &older, &text, tag, err);
  if (!rc && strcmp(older.uuid, x->m.uuid))
    rc = vs_fail(err, VS_EXISTS, "%s holds another shard: publish %s to a place of its own", x->there.uri, x->dir);
  shard_manifest_reset(&older);
  free(text);
  return rc;
}

static vs_rc look_at(item *x, vs_err *err) {
  vs_rc rc = store_folder_list(&x->there, err);
  uint64_t newest = x->there.newest;
  if (rc) return rc;
  if (x->is_database)
    return newest ? vs_fail(err, VS_EXISTS, "%s is a shard, and shards cannot lie in one: publish to another place",
                            x->there.uri)
                  : VS_OK;
  if (newest > x->m.version)
    return vs_fail(err, VS_EXISTS,
                   "%s: version %" PRIu64 " is published, and %s is at version %" PRIu64
                   ": pull it first, or publish to another place",
                   x->there.uri, newest, x->dir, x->m.version);
  return !newest ? refuse_database(x, err) : newest < x->m.version ? check_older(x, err) : compare_listed(x, err);
}

static void look(void *ctx, size_t i) {
  item *x = &((publish_job *)ctx)->items[i];
  x->rc = look_at(x, &x->err);
}

static int is_there(const item *x, const shard_segment_ref *ref) {
  const store_object *o = store_folder_find(&x->there, ref->file);
  return o && o->size == ref->n_bytes; /* the name comes from the content */
}

static vs_rc look_at_all(publish_job *j, vs_err *err) {
  vs_pool_run(j->n_items, LOOKS_AT_ONCE, look, j);
  for (size_t i = 0; i < j->n_items; i++) {
    item *x = &j->items[i];
    if (x->rc) return vs_fail(err, x->rc, "%s", x->err.text);
    for (size_t g = 0; g < x->m.n_segments; g++)
      if (!is_there(x, &x->m.segments[g])) j->total += x->m.segments[g].n_bytes;
  }
  return VS_OK;
}

/* ---- sending ---- */

static vs_rc send_segments(publish_job *j, item *x, vs_err *err) {
  upload_file *files = tool_alloc(x->m.n_segments, sizeof *files);
  upload u = {.place = x->there.place,
              .files = files,
              .jobs = (int)j->o->jobs,
              .part_size = (uint64_t)j->o->part_size,
              .progress = add_progress,
              .ctx = j,
              .memory = j->o->memory ? (uint64_t)j->o->memory : resources_default_memory()};
  for (size_t i = 0; i < x->m.n_segments; i++) {
    const shard_segment_ref *ref = &x->m.segments[i];
    if (is_there(x, ref)) continue;
    files[u.n_files++] = (upload_file){store_folder_key(&x->there, ref->file), tool_format("%s/%s", x->dir, ref->file),
                                       ref->n_bytes, ref->checksum};
  }
  vs_rc rc = upload_files(&u, err);
  j->n_sent += u.n_sent, j->n_reused += u.n_reused, j->n_files += u.n_files;
  for (size_t i = 0; i < u.n_files; i++) free(files[i].key), free(files[i].path);
  free(files);
  return rc;
}

/* Without the condition: look, then write. Two writers at the same moment would not see each other. */
static vs_rc put_as_only_writer(const item *x, const char *key, char *tag, vs_err *err) {
  s3_meta meta;
  vs_err why = {0};
  vs_rc rc = s3_head(x->there.place, key, &meta, &why);
  if (!rc) return VS_EXISTS;
  if (rc != VS_NOTFOUND) return vs_fail(err, rc, "%s", why.text);
  return s3_put(x->there.place, key, x->text, strlen(x->text), 0, tag, err);
}

static vs_rc put_manifest(const publish_job *j, item *x, vs_err *err) {
  char name[64];
  vs_err why = {0};
  shard_manifest_file(x->m.version, name);
  char *key = store_folder_key(&x->there, name);
  vs_rc rc = j->o->only_writer ? put_as_only_writer(x, key, x->tag, &why)
                               : s3_put(x->there.place, key, x->text, strlen(x->text), 1, x->tag, &why);
  free(key);
  if (!rc) return VS_OK;
  if (rc == VS_EXISTS) return compare(x, err);
  if (rc == VS_UNSUPPORTED)
    return vs_fail(err, rc,
                   "%s (this store does not know If-None-Match, which keeps two writers apart; when nobody else "
                   "publishes there, run the command again with --only-writer)",
                   why.text);
  return vs_fail(err, rc, "%s", why.text);
}

/* The hint, unless it is there. A reader without it needs more rounds, nothing else: no reason to fail. */
static void put_hint(const item *x) {
  vs_err err = {0};
  uint8_t *body = NULL;
  size_t n = 0;
  const store_object *o = store_folder_find(&x->there, SHARD_HINT_NAME);
  char *key = store_folder_key(&x->there, SHARD_HINT_NAME);
  vs_rc rc = shard_hint_make(x->dir, &x->m, x->tag, &body, &n, &err);
  if (!rc && !(x->present && o && transfer_is_md5(o->etag, body, n)))
    rc = s3_put(x->there.place, key, body, n, 0, NULL, &err);
  if (rc && rc != VS_INTERRUPT) tool_note("warning: %s (readers will need more requests)", err.text);
  free(body), free(key);
}

static vs_rc publish_items(publish_job *j, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < j->n && !rc; i++) {
    item *x = &j->items[i];
    int was_present = x->present;
    rc = send_segments(j, x, err);
    if (!rc && !x->present) rc = put_manifest(j, x, err);
    if (!rc) put_hint(x);
    j->n_present += !rc && was_present;
  }
  return rc;
}

/* ---- the whole ---- */

static void reset(publish_job *j) {
  for (size_t i = 0; i < j->n_items; i++) {
    shard_manifest_reset(&j->items[i].m);
    store_folder_reset(&j->items[i].there);
    free(j->items[i].text);
  }
  free(j->items);
}

static vs_rc publish(publish_job *j, const char *dir, const char *to, vs_err *err) {
  char **dirs;
  vs_rc rc = shard_paths(dir, &dirs, &j->n, err);
  if (rc) return rc;
  rc = read_items(j, dirs, !shard_dir_is_shard(dir), to, err);
  if (!rc) rc = look_at_all(j, err);
  if (!rc) rc = publish_items(j, err);
  shard_names_free(dirs, j->n);
  return rc;
}

static void print_result(const publish_job *j, const char *to, double seconds) {
  char sent[32], reused[32];
  if (j->o->json) {
    printf("{\"to\":");
    json_put_text(stdout, to);
    printf(",\"shards\":%zu,\"present\":%" PRIu64 ",\"files_sent\":%" PRIu64 ",\"bytes_sent\":%" PRIu64
           ",\"bytes_reused\":%" PRIu64 ",\"seconds\":%.3f}\n",
           j->n, j->n_present, j->n_files, j->n_sent, j->n_reused, seconds);
    return;
  }
  printf("%s: %zu shard%s", to, j->n, j->n == 1 ? "" : "s");
  if (j->n_present == j->n && !j->n_files) printf(", already published\n");
  else {
    printf(" published, %s sent in %.1f s", output_size(j->n_sent, sent), seconds);
    if (j->n_reused) printf(", %s were there", output_size(j->n_reused, reused));
    putchar('\n');
  }
}

static int run(const publish_options *o, const char *dir, const char *to) {
  publish_job j = {.o = o};
  vs_err err = {0};
  double started = tool_seconds();
  vs_rc rc = publish(&j, dir, to, &err);
  if (rc == VS_INTERRUPT) {
    vs_err_reset(&err);
    rc = vs_fail(&err, VS_INTERRUPT, "interrupted; what was sent stays: run the command again to continue");
  }
  int status = (int)tool_report(&err);
  if (!rc) print_result(&j, to, tool_seconds() - started);
  reset(&j);
  return status;
}

int cmd_publish(int argc, char **argv) {
  publish_options o = {0};
  tool_list args = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0 && (s3_is_uri(args.items[0]) || !store_is_uri(args.items[1])))
    status = (int)options_wrong(&command, "it is `vecshard publish DIR s3://bucket/prefix`");
  if (status < 0) status = run(&o, args.items[0], args.items[1]);
  tool_list_reset(&args);
  return status;
}
