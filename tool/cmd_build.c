/* cmd_build.c - builds one shard from files of vectors.
 *
 *   1 open      all inputs, as one (input_concat.c)
 *   2 folder    make it, lock it, check the space
 *   3 segment   ivfpq_build into .seg-build.tmp, then its name by content
 *   4 commit    the manifest of version 1: from here on it is a shard
 * A bucket of a plan that is built already is left as it is, which is success: tasks may be run again at will (plan_check.h).
 * Whatever fails before 4 removes what this run made, but for what --resume can go on from (build_folder.h). A killed run leaves
 * that too, and a .seg-*.tmp, which no reader looks at; the next build into the folder uses or removes them. Locks on the folders
 * tell them from those of a build at work.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../ext/s3vfs/io_local.h"
#include "../ext/ivfpq/ivfpq_build.h"
#include "../ext/ivfpq/ivfpq_size.h"
#include "../ext/shard/shard_manifest.h"
#include "../ext/kernels/kern.h"
#include "../ext/vecshard.h"
#include "build_folder.h"
#include "input_concat.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "plan_check.h"
#include "progress.h"
#include "resources.h"

enum { BAD_ROWS_SHOWN = 20, LOCK_POLL_US = 100000 };

typedef struct build_options {
  int json, metric, bits, store, bad_rows, duplicates, resume;
  int64_t bucket, subvectors, memory, threads, seed, dim;
  const char *plan, *out, *partitions, *tmpdir, *embedding_dataset, *id_dataset;
  tool_list columns;
} build_options;

static const option_row rows[] = {
    {"--out", OPTION_TEXT, "DIR", 0, 0, NULL, 1, offsetof(build_options, out),
     "the shard's folder; with --plan the database's"},
    {"--plan", OPTION_TEXT, "FILE", 0, 0, NULL, 0, offsetof(build_options, plan), "a plan of vecshard pack"},
    {"--bucket", OPTION_COUNT, "I", 1, INT64_MAX, NULL, 0, offsetof(build_options, bucket),
     "the bucket of the plan to build, from 1; gives DIR/bucketI"},
    {"--metric", OPTION_CHOICE, "l2|cosine|dot", 0, 0, "cosine", 0, offsetof(build_options, metric), "the distance"},
    {"--partitions", OPTION_TEXT, "N|sqrt", 0, 0, NULL, 0, offsetof(build_options, partitions),
     "inverted lists; sqrt: the root of the rows (default: by the rows)"},
    {"--subvectors", OPTION_COUNT, "N", 1, 2 * IVFPQ_MAX_M, NULL, 0, offsetof(build_options, subvectors),
     "sub-vectors of the product quantizer (default: by the dimension)"},
    {"--bits", OPTION_CHOICE, "8|4", 0, 0, "8", 0, offsetof(build_options, bits), "bits of a sub-vector's code"},
    {"--store", OPTION_CHOICE, "f32|f16", 0, 0, "f32", 0, offsetof(build_options, store), "how vectors are kept"},
    {"--memory", OPTION_SIZE, "SIZE", (int64_t)16 << 20, INT64_MAX, "a quarter of the machine's, 256M to 8G", 0,
     offsetof(build_options, memory), "working memory"},
    {"--threads", OPTION_COUNT, "N", 1, 4096, "all CPUs allowed", 0, offsetof(build_options, threads), "threads"},
    {"--tmpdir", OPTION_TEXT, "DIR", 0, 0, "$TMPDIR, else --out itself", 0, offsetof(build_options, tmpdir),
     "folder of temporary files"},
    {"--seed", OPTION_COUNT, "N", 0, INT64_MAX, "0", 0, offsetof(build_options, seed), "same seed, same bytes"},
    {"--dim", OPTION_COUNT, "N", 1, IVFPQ_MAX_DIM, NULL, 0, offsetof(build_options, dim), "dimension of .f32 files"},
    OPTION_EMBEDDING(build_options),
    OPTION_ID(build_options),
    {"--column", OPTION_LIST, "NAME[:filter|:index|:stored]", 0, 0, NULL, 0, offsetof(build_options, columns),
     "HDF5: a dataset with metadata, repeatable; a filter column (the default) narrows searches"},
    {"--bad-rows", OPTION_CHOICE, "fail|skip", 0, 0, "fail", 0, offsetof(build_options, bad_rows),
     "what to do with NaN, Inf, zero vectors under cosine, broken ids"},
    {"--duplicates", OPTION_CHOICE, "fail|first|last", 0, 0, "fail", 0, offsetof(build_options, duplicates),
     "which row of one id stays"},
    {"--resume", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(build_options, resume),
     "go on after the last finished stage of a build that did not end; keep stages when this one does not"},
    OPTION_JSON(build_options),
};
static const option_command command = {
  "build", "FILE... --out DIR | --plan FILE --bucket I --out DIR",
  "Builds one shard from HDF5, .npy, .fvecs or .f32 files. The same input, options and seed give the same bytes. A bucket of "
  "a plan that is built already is left as it is, with exit status 0; a build that was "
  "killed begins anew, or with --resume after its last finished stage.",
  "  vecshard build part0.h5 part1.h5 --out db/proteins --metric cosine --column length\n"
  "  vecshard build --plan plan.json --bucket 3 --out db", 0, SIZE_MAX, rows, sizeof rows / sizeof *rows};

typedef struct build_job {
  build_options o;
  tool_list files;
  plan plan;
  const plan_bucket *bucket;   /* of the plan; NULL: files were given */
  shard_origin origin;
  int already;                 /* the bucket was built before this run */
  char *folder;                /* of the shard */
  char *temporary;             /* the segment before it has its name */
  build_folder work;
  char *key;                   /* of the work folder */
  int n_made, lock;            /* folders made; fd of the folder, -1: none */
  const char **datasets, **names; /* of the columns */
  char **owned;                /* copies of dataset names without their suffix */
  uint8_t *flags;
  shard_column *columns;
  input *in;
  uint64_t n_bad;
  ivfpq_build_options build;
  ivfpq_build_result result;
  char segment[SHARD_NAME_MAX];
} build_job;

/* ---- arguments ---- */

/* Names that a table of the shard needs for itself. */
static int is_reserved(const char *name) {
  static const char *const taken[] = {"id",     "embedding", "k",        "nprobe", "refine",
                                      "recall", "exact",     "distance", "rowid"};
  for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
    if (!strcasecmp(name, taken[i])) return 1;
  return 0;
}

/* "meta/length:index" -> dataset "meta/length", column "length", flags. */
static tool_status parse_column(build_job *j, size_t i) {
  static const struct { const char *suffix; int flags; } kinds[] = {
    {":filter", IVFPQ_FILTER}, {":index", IVFPQ_FILTER | IVFPQ_INDEX}, {":stored", 0}};
  char *dataset = j->owned[i] = tool_format("%s", j->o.columns.items[i]);
  size_t len = strlen(dataset);
  j->flags[i] = IVFPQ_FILTER;
  for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
    size_t n = strlen(kinds[k].suffix);
    if (len <= n || strcmp(dataset + len - n, kinds[k].suffix)) continue;
    dataset[len - n] = 0, j->flags[i] = (uint8_t)kinds[k].flags;
    break;
  }
  const char *slash = strrchr(dataset, '/');
  j->datasets[i] = dataset, j->names[i] = slash ? slash + 1 : dataset;
  if (!*j->names[i]) return options_wrong(&command, "--column needs a name, not '%s'", j->o.columns.items[i]);
  if (is_reserved(j->names[i]))
    return options_wrong(&command, "a column cannot be named %s: the table needs that name", j->names[i]);
  for (size_t k = 0; k < i; k++)
    if (!strcasecmp(j->names[k], j->names[i])) return options_wrong(&command, "column %s is given twice", j->names[i]);
  return TOOL_DONE;
}

static tool_status parse_columns(build_job *j) {
  size_t n = j->o.columns.n;
  tool_status status = TOOL_DONE;
  if (n > IVFPQ_MAX_COLUMNS) return options_wrong(&command, "at most %d columns", IVFPQ_MAX_COLUMNS);
  j->owned = tool_alloc(n, sizeof *j->owned);
  j->datasets = tool_alloc(n, sizeof *j->datasets);
  j->names = tool_alloc(n, sizeof *j->names);
  j->flags = tool_alloc(n, 1);
  for (size_t i = 0; i < n && !status; i++) status = parse_column(j, i);
  return status;
}

static tool_status check_arguments(build_job *j) {
  const build_options *o = &j->o;
  int64_t n;
  if (!*o->out) return options_wrong(&command, "--out names no folder");
  if (o->plan && !o->bucket) return options_wrong(&command, "--plan needs --bucket");
  if (o->bucket && !o->plan) return options_wrong(&command, "--bucket needs --plan");
  if (o->plan && j->files.n) return options_wrong(&command, "give files or --plan, not both");
  if (!o->plan && !j->files.n) return options_wrong(&command, "no input files");
  if (o->partitions && strcmp(o->partitions, "sqrt") && !options_number(o->partitions, 0, 1, IVFPQ_MAX_NLIST, &n))
    return options_wrong(&command, "--partitions is sqrt or a whole number from 1 to %d, not '%s'", IVFPQ_MAX_NLIST,
                         o->partitions);
  return parse_columns(j);
}

/* What decides the bytes of a shard besides its files; a change here makes every bucket look built otherwise. */
static void hash_options(build_job *j) {
  const build_options *o = &j->o;
  char *text = tool_format("%d %d %d %lld %s %lld %d %d %s %s", o->metric, o->store, o->bits, (long long)o->subvectors,
                           o->partitions ? o->partitions : "", (long long)o->seed, o->bad_rows, o->duplicates,
                           o->embedding_dataset ? o->embedding_dataset : "", o->id_dataset ? o->id_dataset : "");
  for (size_t i = 0; i < o->columns.n; i++) {
    char *more = tool_format("%s\n%s", text, o->columns.items[i]);
    free(text), text = more;
  }
  plan_hash_text(text, j->origin.options);
  free(text);
}

/* The files of one bucket of a plan, and what `pack` was told that this build was not. */
static vs_rc read_plan(build_job *j, vs_err *err) {
  build_options *o = &j->o;
  vs_rc rc = plan_read(o->plan, &j->plan, err);
  if (rc) return rc;
  if ((uint64_t)o->bucket > j->plan.n)
    return vs_fail(err, VS_INVALID, "%s: has %zu buckets, none with number %lld", o->plan, j->plan.n, (long long)o->bucket);
  j->bucket = &j->plan.buckets[o->bucket - 1];
  if (!j->bucket->files.n) return vs_fail(err, VS_INVALID, "%s: bucket %lld has no files", o->plan, (long long)o->bucket);
  for (size_t i = 0; i < j->bucket->files.n; i++) tool_list_add(&j->files, j->bucket->files.items[i]);
  if (!o->dim) o->dim = j->plan.dim;
  if (!o->embedding_dataset) o->embedding_dataset = j->plan.embedding_dataset;
  if (!o->id_dataset) o->id_dataset = j->plan.id_dataset;
  plan_hash(j->bucket, j->origin.files);
  hash_options(j);
  return VS_OK;
}

static vs_rc check_rows(const build_job *j, vs_err *err) {
  if (!j->bucket || j->bucket->n_rows == PLAN_ROWS_UNKNOWN || j->bucket->n_rows == j->in->n_rows) return VS_OK;
  return vs_fail(err, VS_INVALID,
                 "bucket %lld of %s: its files hold %llu rows and the plan says %llu: they changed; pack again",
                 (long long)j->o.bucket, j->o.plan, (unsigned long long)j->in->n_rows,
                 (unsigned long long)j->bucket->n_rows);
}

/* ---- the folder ---- */

/* Parts of builds that were killed: ours is the only build here while we hold the lock. */
static const char segment_temporary[] = ".seg-build.tmp";

static void remove_leftovers(const build_job *j) {
  int folder = j->lock;
  int fd = dup(folder);
  DIR *d = fd < 0 ? NULL : fdopendir(fd);
  if (!d && fd >= 0) close(fd);
  for (struct dirent *e; d && (e = readdir(d));) {
    size_t len = strlen(e->d_name);
    if (j->o.resume && !strcmp(e->d_name, segment_temporary)) continue; /* perhaps finished: the builder knows */
    int segment = len > 9 && !strncmp(e->d_name, ".seg-", 5) && !strcmp(e->d_name + len - 4, ".tmp");
    if (segment || (!strncmp(e->d_name, ".manifest-", 10) && strstr(e->d_name, ".tmp-")))
      unlinkat(folder, e->d_name, 0);
  }
  if (d) closedir(d);
}

/* A task of an array may be started twice: the second waits, and then finds the bucket built, or builds it where the
 * first died. */
static vs_rc wait_for_lock(const build_job *j, vs_err *err) {
  tool_note("%s: another build is at work in this folder; waiting for it", j->folder);
  while (flock(j->lock, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
    if (tool_stop(NULL)) return vs_fail(err, VS_INTERRUPT, "interrupted");
    usleep(LOCK_POLL_US);
  }
  return VS_OK;
}

static vs_rc lock_folder(build_job *j, vs_err *err) {
  j->lock = open(j->folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (j->lock < 0) return vs_fail(err, VS_IO, "%s: cannot open the folder: %s", j->folder, strerror(errno));
  int failed = flock(j->lock, LOCK_EX | LOCK_NB);
  if (failed && errno != EWOULDBLOCK) return VS_OK; /* a file system without locks: go on without */
  if (failed && !j->bucket) return vs_fail(err, VS_EXISTS, "%s: another build is at work in this folder", j->folder);
  return failed ? wait_for_lock(j, err) : VS_OK;
}

/* Is there the very shard that this build would make? Then there is nothing to do; any other is in the way. */
static vs_rc look_for_bucket(build_job *j, vs_err *err) {
  uint64_t n_rows = 0, n_bytes = 0;
  vs_rc rc = plan_check_shard(j->folder, &j->origin, &n_rows, &n_bytes, err);
  j->already = !rc, j->result.n_rows = n_rows, j->result.n_bytes = n_bytes;
  return rc;
}

static const char *temporary_folder(const build_job *j) {
  const char *set = getenv("TMPDIR");
  return j->o.tmpdir ? j->o.tmpdir : set && *set ? set : j->folder;
}

static vs_rc refuse_shards(build_job *j, vs_err *err) {
  char **names;
  size_t n;
  vs_err ignored = {0};
  int built = shard_dir_is_shard(j->folder);
  if (built) build_folder_drop(temporary_folder(j), j->folder); /* of a build killed after its last step but one */
  if (j->bucket && built) return look_for_bucket(j, err);
  if (built)
    return vs_fail(err, VS_EXISTS, "%s: already holds a shard; choose another --out, or remove that folder first",
                   j->folder);
  if (shard_dir_list(j->folder, &names, &n, &ignored)) return VS_OK;
  shard_names_free(names, n);
  return n ? vs_fail(err, VS_EXISTS, "%s: is a database of %zu shards; name the new one with --out %s/NAME", j->folder,
                     n, j->folder)
           : VS_OK;
}

/* Texts aside, whose lengths nobody knows yet; a tenth more for lists of unequal sizes. */
static uint64_t segment_bytes(const build_job *j) {
  const input *in = j->in;
  ivfpq_outline o = {.n_rows = in->n_rows, .dim = in->dim, .text_id = in->id_kind == INPUT_ID_TEXT ? 32 : 0};
  uint64_t bytes[IVFPQ_N_SECTIONS];
  ivfpq_params p;
  for (size_t c = 0; c < in->n_columns; c++) o.filter_numbers += in->column_types[c] != INPUT_TEXT && (j->flags[c] & IVFPQ_FILTER);
  ivfpq_size_params(&j->build, &o, &p);
  uint64_t n = ivfpq_size_sections(&p, &o, bytes) + in->n_rows * in->n_columns * 16 + (1 << 20);
  return n + n / 10;
}

/* All that decides the bytes, a line each. */
static vs_rc make_key(build_job *j, vs_err *err) {
  static const char *const metrics[] = {"l2", "cosine", "dot"};
  const build_options *o = &j->o;
  char *text = NULL;
  size_t n = 0;
  FILE *f = open_memstream(&text, &n);
  vs_rc rc = f ? VS_OK : vs_nomem(err);
  if (f) {
    fprintf(f, "version %s\nkernels %s\n--metric %s\n--partitions %s\n--subvectors %lld\n--bits %d\n--store %s\n", VECSHARD_VERSION,
            kern_get()->name, metrics[o->metric], o->partitions ? o->partitions : "", (long long)o->subvectors, o->bits ? 4 : 8,
            o->store ? "f16" : "f32");
    fprintf(f, "--memory %llu\n--seed %lld\n--bad-rows %d\n--duplicates %d\n--dim %lld\n--embedding-dataset %s\n--id-dataset %s\n",
            (unsigned long long)j->build.memory, (long long)o->seed, o->bad_rows, o->duplicates, (long long)o->dim,
            o->embedding_dataset ? o->embedding_dataset : "", o->id_dataset ? o->id_dataset : "");
    for (size_t i = 0; i < o->columns.n; i++) fprintf(f, "--column %s\n", o->columns.items[i]);
  }
  for (size_t i = 0; i < j->files.n && !rc; i++) {
    struct stat st;
    char *real = realpath(j->files.items[i], NULL);
    if (!real || stat(real, &st)) rc = vs_fail(err, VS_IO, "%s: cannot look at it: %s", j->files.items[i], strerror(errno));
    else
      fprintf(f, "input %s: %lld bytes of %lld.%09ld\n", real, (long long)st.st_size, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
    free(real);
  }
  if (f && fclose(f) && !rc) rc = vs_nomem(err);
  j->key = text;
  return rc;
}

/* A segment is of use to a later build once its stage is finished. */
static void drop_unfinished_segment(const build_job *j) {
  char *path = tool_format("%s/%s", j->folder, segment_temporary);
  if (!build_folder_has(&j->work, "segment.state")) unlink(path);
  free(path);
}

/* The working folder, and room for everything. */
static vs_rc prepare_work(build_job *j, vs_err *err) {
  char shard[32], temp[32];
  int resume = j->o.resume;
  remove_leftovers(j); /* this is no shard, so nobody else commits here */
  j->build.tmpdir = temporary_folder(j);
  vs_rc rc = make_key(j, err);
  if (!rc) rc = build_folder_open(&j->work, j->build.tmpdir, j->folder, j->key, &resume, err);
  if (rc) return rc;
  j->build.keep = j->work.path, j->build.key = j->key, j->build.resume = resume, j->build.keep_rows = j->o.resume;
  drop_unfinished_segment(j);
  uint64_t n_temp = ivfpq_temp_bytes(j->in, &j->build), have = build_folder_bytes(&j->work);
  progress_plan(j->in->n_rows, (uint64_t)j->in->dim * 4);
  progress_say("%llu rows: about %s for the shard, %s of temporary files in %s", (unsigned long long)j->in->n_rows,
               output_size(segment_bytes(j), shard), output_size(n_temp, temp), j->build.tmpdir);
  return output_check_space(j->folder, segment_bytes(j), j->build.tmpdir, n_temp > have ? n_temp - have : 0, err);
}

static vs_rc prepare_folder(build_job *j, vs_err *err) {
  vs_rc rc = refuse_shards(j, err);
  if (!rc) rc = output_make_folder(j->folder, &j->n_made, err);
  if (!rc) rc = lock_folder(j, err);
  if (!rc) rc = refuse_shards(j, err); /* a build that finished before we had the lock */
  if (rc || j->already) return rc;
  return prepare_work(j, err);
}

/* ---- the segment ---- */

static void on_bad_row(void *ctx, uint64_t row, const char *why) {
  build_job *j = ctx;
  char where[600];
  if (j->n_bad++ >= BAD_ROWS_SHOWN) return;
  input_concat_describe(j->in, row, where, sizeof where);
  tool_note("%s: skipped: %s", where, why);
  if (j->n_bad == BAD_ROWS_SHOWN) tool_note("further bad rows are counted only");
}

static void on_resumed(void *ctx, const char *stage) {
  tool_note("%s: going on after %s", ((build_job *)ctx)->work.path, stage);
}

static void on_describe(void *ctx, uint64_t row, char *buf, size_t n) {
  input_concat_describe(((build_job *)ctx)->in, row, buf, n);
}

static uint32_t partitions_wanted(const build_job *j) {
  int64_t n = 0;
  if (!j->o.partitions) return 0;
  if (options_number(j->o.partitions, 0, 1, IVFPQ_MAX_NLIST, &n)) return (uint32_t)n;
  /* sqrt: a small segment stays flat, as by default. */
  return j->in->n_rows < IVFPQ_FLAT_ROWS ? 0 : (uint32_t)lround(sqrt((double)j->in->n_rows));
}

static vs_rc open_built(const char *path, vs_io **out, vs_err *err) { return io_local_open(path, -1, out, err); }

static void fill_build(build_job *j) {
  const build_options *o = &j->o;
  j->build = (ivfpq_build_options){.metric = (ivfpq_metric)o->metric,
                                   .store_f16 = o->store,
                                   .nlist = partitions_wanted(j),
                                   .subs = (uint32_t)o->subvectors,
                                   .bits = o->bits ? 4 : 8,
                                   .memory = o->memory ? (uint64_t)o->memory : resources_default_memory(),
                                   .threads = (int)o->threads,
                                   .seed = (uint64_t)o->seed,
                                   .skip_bad = o->bad_rows,
                                   .duplicates = (ivfpq_duplicates)o->duplicates,
                                   .column_names = j->names,
                                   .column_flags = j->flags,
                                   .open = open_built,
                                   .ctx = j,
                                   .stop = tool_stop,
                                   .progress = progress_show,
                                   .resumed = on_resumed,
                                   .bad_row = on_bad_row,
                                   .describe = on_describe};
}

/* Under its final name, and durable, before a manifest may speak of it. */
static vs_rc name_segment(build_job *j, vs_err *err) {
  snprintf(j->segment, sizeof j->segment, "seg-%s.ivf", j->result.checksum);
  char *path = tool_format("%s/%s", j->folder, j->segment);
  vs_rc rc = VS_OK;
  if (rename(j->temporary, path)) rc = vs_fail(err, VS_IO, "%s: cannot rename: %s", j->temporary, strerror(errno));
  else free(j->temporary), j->temporary = path, path = NULL; /* what to remove on failure */
  free(path);
  return rc ? rc : output_sync_folder(j->folder, err);
}

/* ---- the manifest ---- */

/* A uuid (version 8: of our own making) from the segment's checksum, so that the same input gives the same bytes. */
static void content_uuid(const char checksum[33], char uuid[37]) {
  char h[33];
  memcpy(h, checksum, 33);
  h[12] = '8', h[16] = "89ab"[(unsigned char)h[16] % 4];
  snprintf(uuid, 37, "%.8s-%.4s-%.4s-%.4s-%.12s", h, h + 8, h + 12, h + 16, h + 20);
}

static vs_rc commit(build_job *j, vs_err *err) {
  static const shard_type types[] = {
      [INPUT_NULL] = SHARD_TEXT, [INPUT_INT] = SHARD_INTEGER, [INPUT_REAL] = SHARD_REAL, [INPUT_TEXT] = SHARD_TEXT};
  shard_segment_ref ref = {.n_bytes = j->result.n_bytes, .n_rows = j->result.n_rows};
  char vector[] = "embedding", id[] = "id";
  shard_manifest m = {.version = 1,
                      .dim = j->in->dim,
                      .metric = (shard_metric)j->o.metric,
                      .store = (shard_store)j->o.store,
                      .vector_name = vector,
                      .id_name = id,
                      .id_text = j->in->id_kind == INPUT_ID_TEXT,
                      .n_columns = j->in->n_columns,
                      .n_segments = 1,
                      .segments = &ref,
                      .n_rows = j->result.n_rows,
                      .origin = j->origin};
  m.origin.known = 1, m.origin.n_rows = j->in->n_rows;
  m.origin.n_skipped = j->result.n_bad, m.origin.n_duplicates = j->result.n_duplicates;
  m.columns = j->columns = tool_alloc(m.n_columns, sizeof *m.columns);
  for (size_t c = 0; c < m.n_columns; c++)
    m.columns[c] = (shard_column){(char *)(uintptr_t)j->names[c], types[j->in->column_types[c]],
                                  !!(j->flags[c] & IVFPQ_FILTER), !!(j->flags[c] & IVFPQ_INDEX)};
  content_uuid(j->result.checksum, m.uuid);
  memcpy(ref.file, j->segment, sizeof ref.file);
  memcpy(ref.checksum, j->result.checksum, sizeof ref.checksum);
  vs_rc rc = shard_manifest_commit(j->folder, &m, err);
  /* Ours now, or (when another writer was first) perhaps the winner's: names come from the content. */
  if (!rc || rc == VS_EXISTS) free(j->temporary), j->temporary = NULL;
  if (rc == VS_EXISTS && j->bucket) vs_err_reset(err), rc = look_for_bucket(j, err);
  return rc;
}

/* ---- the whole ---- */

static vs_rc build_shard(build_job *j, vs_err *err) {
  vs_rc rc = j->o.plan ? read_plan(j, err) : VS_OK;
  if (rc) return rc;
  input_options opt = {.embedding_dataset = j->o.embedding_dataset,
                       .id_dataset = j->o.id_dataset,
                       .columns = j->datasets,
                       .n_columns = j->o.columns.n,
                       .dim = (uint32_t)j->o.dim};
  j->folder = j->o.plan ? tool_format("%s/bucket%lld", j->o.out, (long long)j->o.bucket) : tool_format("%s", j->o.out);
  if (j->bucket && shard_dir_is_shard(j->folder)) return look_for_bucket(j, err); /* before anything is read */
  if ((rc = input_concat_open(j->files.items, j->files.n, &opt, progress_show, &j->in, err))) return rc;
  if ((rc = check_rows(j, err))) return rc;
  fill_build(j);
  if ((rc = prepare_folder(j, err)) || j->already) return rc;
  kern_amx_request(); /* this process is ours: it may keep the larger state that tiles need */
  char *temporary = tool_format("%s/%s", j->folder, segment_temporary);
  rc = ivfpq_build(j->in, &j->build, temporary, &j->result, err);
  if (rc) {
    free(temporary); /* removed by the builder */
    return rc;
  }
  j->temporary = temporary;
  if ((rc = name_segment(j, err))) return rc;
  if (tool_stop(NULL)) return vs_fail(err, VS_INTERRUPT, "interrupted");
  return commit(j, err);
}

/* The builder plans with --memory, and takes some for every thread: who has less must say so. */
static void advise_memory(const build_options *o, vs_err *err) {
  char now[32];
  if (err->rc != VS_NOMEM) return;
  vs_err_reset(err);
  output_size(o->memory ? (uint64_t)o->memory : resources_default_memory(), now);
  (void)vs_fail(err, VS_NOMEM,
                "out of memory: build with a smaller --memory (it was %s), with fewer --threads, or allow the process more",
                now);
}

static void print_already(const build_job *j) {
  unsigned long long n_rows = j->result.n_rows, n_bytes = j->result.n_bytes;
  char bytes[32];
  if (!j->o.json) {
    printf("%s: built already, %llu rows, %s\n", j->folder, n_rows, output_size(j->result.n_bytes, bytes));
    return;
  }
  printf("{\"path\":");
  json_put_text(stdout, j->folder);
  printf(",\"rows\":%llu,\"bytes\":%llu,\"already\":true}\n", n_rows, n_bytes);
}

static void print_result(const build_job *j, double seconds) {
  const ivfpq_build_result *r = &j->result;
  double rate = seconds > 0 ? (double)r->n_rows / seconds : 0;
  char bytes[32], peak[32];
  if (j->o.json) {
    printf("{\"path\":");
    json_put_text(stdout, j->folder);
    printf(
        ",\"rows\":%llu,\"bad_rows\":%llu,\"duplicates\":%llu,\"partitions\":%u,\"m\":%u,\"bits\":%u,\"bytes\":%llu,"
        "\"temp_bytes\":%llu,\"seconds\":%.3f,\"rows_per_second\":%.0f,\"peak_bytes\":%llu,\"segment\":\"%s\"}\n",
        (unsigned long long)r->n_rows, (unsigned long long)r->n_bad, (unsigned long long)r->n_duplicates, r->nlist,
        r->m, r->bits, (unsigned long long)r->n_bytes, (unsigned long long)r->temp_bytes, seconds, rate,
        (unsigned long long)resources_peak_bytes(), j->segment);
    return;
  }
  printf("%s: %llu rows", j->folder, (unsigned long long)r->n_rows);
  if (r->m) printf(", %u partitions, m = %u bytes of %u-bit codes", r->nlist, r->m, r->bits);
  else printf(", flat (exact)");
  printf(", %s, %.1f s, %.0f rows/s, peak memory %s", output_size(r->n_bytes, bytes), seconds, rate,
         output_size(resources_peak_bytes(), peak));
  if (r->n_bad) printf(", %llu bad rows skipped", (unsigned long long)r->n_bad);
  if (r->n_duplicates) printf(", %llu duplicates dropped", (unsigned long long)r->n_duplicates);
  putchar('\n');
}

static void reset(build_job *j, vs_rc rc) {
  if (j->temporary) unlink(j->temporary);
  free(j->temporary);
  if (rc && j->work.path) drop_unfinished_segment(j);
  build_folder_close(&j->work, rc && j->o.resume);
  free(j->key);
  if (rc && j->folder) output_drop_folder(j->folder, j->n_made);
  if (j->lock >= 0) close(j->lock);
  input_close(j->in);
  for (size_t i = 0; j->owned && i < j->o.columns.n; i++) free(j->owned[i]);
  free(j->owned), free(j->datasets), free(j->names), free(j->flags), free(j->columns), free(j->folder);
  tool_list_reset(&j->o.columns);
  tool_list_reset(&j->files);
  plan_reset(&j->plan);
}

int cmd_build(int argc, char **argv) {
  build_job j = {.lock = -1, .work.lock = -1};
  vs_err err = {0};
  double started = tool_seconds();
  vs_rc rc = VS_OK;
  int status = options_read(&command, argc, argv, &j.o, &j.files);
  if (status < 0 && !(status = check_arguments(&j))) {
    progress_json(j.o.json);
    rc = build_shard(&j, &err);
    advise_memory(&j.o, &err);
    status = tool_report(&err);
    if (!rc && j.already) print_already(&j);
    else if (!rc) print_result(&j, tool_seconds() - started);
  }
  reset(&j, rc);
  return status;
}
