/* cmd_pack.c - assigns files to buckets of at most N rows, so that every bucket becomes one shard.
 *
 * Best fit decreasing: files from large to small, each into the fullest bucket that still has room for it, else into a
 * new one. Files of equal size go by name, and the files of a bucket stand by name: the same files, in whatever order they
 * were given, make the same plan. A file larger than N has a bucket of its own: files are not cut.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/input/input.h"
#include "../ext/ivfpq/ivfpq_format.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"

enum { FAULTS_SHOWN = 20 };

typedef struct pack_options {
  int json;
  int64_t bucket_rows, dim;
  const char *out, *embedding_dataset, *id_dataset;
} pack_options;

static const option_row rows[] = {
    {"--bucket-rows", OPTION_COUNT, "N", 1, INT64_MAX, NULL, 1, offsetof(pack_options, bucket_rows),
     "rows of a full bucket"},
    {"--out", OPTION_TEXT, "FILE", 0, 0, NULL, 1, offsetof(pack_options, out), "where the plan goes"},
    {"--dim", OPTION_COUNT, "N", 1, IVFPQ_MAX_DIM, NULL, 0, offsetof(pack_options, dim), "dimension of .f32 files"},
    OPTION_EMBEDDING(pack_options),
    OPTION_ID(pack_options),
    OPTION_JSON(pack_options),
};
static const option_command command = {
    "pack",
    "FILE... --bucket-rows N --out plan.json",
    "Assigns files to buckets of about N rows. Each bucket is then built into a shard, on any machine that sees the "
    "files. The same files make the same plan, in whatever order they are given. Building a bucket that is there does "
    "nothing, so whatever was lost is made good by running the same again.",
    "  vecshard pack part*.h5 --bucket-rows 10000000 --out plan.json\n"
    "  vecshard verify db --plan plan.json --missing lines | \\\n"
    "    parallel --retries 3 vecshard build --plan plan.json --bucket {} --threads 1 --memory 2G --out db\n"
    "  vecshard verify db --plan plan.json --quick && vecshard publish db s3://my-bucket/db\n"
    "  tool/slurm-build.sh --plan plan.json --out db      the same on a Slurm cluster",
    1,
    SIZE_MAX,
    rows,
    sizeof rows / sizeof *rows};

typedef struct pack_file {
  char *path; /* absolute: jobs run anywhere */
  uint64_t n_rows;
  uint32_t dim;
  size_t bucket;
} pack_file;

typedef struct pack_plan {
  pack_file *files;      /* by name; once assigned, by bucket and name */
  uint64_t *bucket_rows; /* filled rows */
  size_t n_files, n_buckets;
  uint32_t dim;
  uint64_t n_rows;
} pack_plan;

/* ---- the files ---- */

static int by_path(const void *a, const void *b) {
  return strcmp(((const pack_file *)a)->path, ((const pack_file *)b)->path);
}
static int by_rows(const void *a, const void *b) {
  uint64_t x = ((const pack_file *)a)->n_rows, y = ((const pack_file *)b)->n_rows;
  return x != y ? (x < y ? 1 : -1) : by_path(a, b);
}
static int by_bucket(const void *a, const void *b) {
  size_t x = ((const pack_file *)a)->bucket, y = ((const pack_file *)b)->bucket;
  return x != y ? (x > y ? 1 : -1) : by_path(a, b);
}

static vs_rc resolve(pack_plan *p, const tool_list *names, vs_err *err) {
  p->files = tool_alloc(names->n, sizeof *p->files);
  p->n_files = names->n;
  for (size_t i = 0; i < names->n; i++)
    if (!(p->files[i].path = realpath(names->items[i], NULL)))
      return vs_fail(err, VS_NOTFOUND, "%s: %s", names->items[i], strerror(errno));
  qsort(p->files, p->n_files, sizeof *p->files, by_path);
  for (size_t i = 1; i < p->n_files; i++)
    if (!strcmp(p->files[i].path, p->files[i - 1].path))
      return vs_fail(err, VS_INVALID, "%s: given twice", p->files[i].path);
  return VS_OK;
}

/* Of many files several may be bad: all are named, so that one look is enough. */
static vs_rc measure(pack_plan *p, const pack_options *o, vs_err *err) {
  input_options opt = {.embedding_dataset = o->embedding_dataset, .id_dataset = o->id_dataset, .dim = (uint32_t)o->dim};
  size_t n_bad = 0;
  for (size_t i = 0; i < p->n_files; i++) {
    pack_file *f = &p->files[i];
    vs_err why = {0};
    progress_count("look at files", i, p->n_files, "files");
    if (tool_stop(NULL)) return vs_fail(err, VS_INTERRUPT, "interrupted");
    vs_rc rc = input_shape(f->path, &opt, &f->n_rows, &f->dim, &why);
    if (!rc && f->n_rows > UINT32_MAX)
      rc = vs_fail(&why, VS_INVALID, "%s: its %llu rows are more than a shard takes (2^32 - 1); cut it", f->path,
                   (unsigned long long)f->n_rows);
    if (!rc) p->n_rows += f->n_rows;
    else if (p->n_files == 1) return vs_fail(err, why.rc, "%s", why.text);
    else if (n_bad++ < FAULTS_SHOWN) tool_note("%s", why.text);
  }
  if (n_bad)
    return vs_fail(err, VS_INVALID, "%zu of %zu files cannot be read; no plan was made", n_bad, p->n_files);
  p->dim = p->files[0].dim;
  for (size_t i = 1; i < p->n_files; i++)
    if (p->files[i].dim != p->dim)
      return vs_fail(err, VS_INVALID, "%s has dimension %u and %s has %u: a database holds one", p->files[0].path,
                     p->dim, p->files[i].path, p->files[i].dim);
  return VS_OK;
}

/* ---- the buckets ---- */

static size_t best_bucket(const pack_plan *p, uint64_t n_rows, uint64_t capacity) {
  size_t best = p->n_buckets;
  for (size_t b = 0; b < p->n_buckets; b++)
    if (p->bucket_rows[b] <= capacity && n_rows <= capacity - p->bucket_rows[b] &&
        (best == p->n_buckets || p->bucket_rows[b] > p->bucket_rows[best]))
      best = b;
  return best;
}

static void assign(pack_plan *p, uint64_t capacity) {
  if (capacity > UINT32_MAX) capacity = UINT32_MAX; /* what a segment can hold */
  p->bucket_rows = tool_alloc(p->n_files, sizeof *p->bucket_rows);
  qsort(p->files, p->n_files, sizeof *p->files, by_rows);
  for (size_t i = 0; i < p->n_files; i++) {
    pack_file *f = &p->files[i];
    f->bucket = best_bucket(p, f->n_rows, capacity);
    if (f->bucket == p->n_buckets) p->n_buckets++;
    p->bucket_rows[f->bucket] += f->n_rows;
  }
  qsort(p->files, p->n_files, sizeof *p->files, by_bucket);
}

/* ---- the plan and the report ---- */

static void put_text_key(FILE *to, const char *key, const char *text) {
  if (!text) return;
  fprintf(to, "\"%s\":", key);
  json_put_text(to, text);
  fputc(',', to);
}

static vs_rc write_plan(const pack_plan *p, const pack_options *o, vs_err *err) {
  output out;
  vs_rc rc = output_open(o->out, &out, err);
  if (rc) return rc;
  fprintf(out.file, "{\"bucket_rows\":%lld,\"dim\":%u,", (long long)o->bucket_rows, p->dim);
  put_text_key(out.file, "embedding_dataset", o->embedding_dataset);
  put_text_key(out.file, "id_dataset", o->id_dataset);
  fprintf(out.file, "\"buckets\":[");
  for (size_t b = 0, i = 0; b < p->n_buckets; b++) {
    fprintf(out.file, "%s\n{\"files\":[", b ? "," : "");
    for (size_t first = i; i < p->n_files && p->files[i].bucket == b; i++) {
      if (i > first) fputc(',', out.file);
      json_put_text(out.file, p->files[i].path);
    }
    fprintf(out.file, "],\"rows\":%llu}", (unsigned long long)p->bucket_rows[b]);
  }
  fprintf(out.file, "]}\n");
  return output_close(&out, VS_OK, err);
}

static void note_large_files(const pack_plan *p, uint64_t capacity) {
  for (size_t i = 0; i < p->n_files; i++)
    if (p->files[i].n_rows > capacity)
      tool_note("%s: its %llu rows are more than --bucket-rows; it has bucket %zu alone", p->files[i].path,
                (unsigned long long)p->files[i].n_rows, p->files[i].bucket + 1);
}

/* The buckets' fill, and what stands out. */
static void report(const pack_plan *p, const pack_options *o) {
  double capacity = (double)o->bucket_rows;
  size_t *n_files = tool_alloc(p->n_buckets, sizeof *n_files), least = 0, most = 0;
  for (size_t i = 0; i < p->n_files; i++) n_files[p->files[i].bucket]++;
  if (o->json) {
    printf("{\"plan\":");
    json_put_text(stdout, o->out);
    printf(",\"buckets\":%zu,\"files\":%zu,\"rows\":%llu,\"dim\":%u,\"bucket_rows\":%lld,\"fill\":[", p->n_buckets,
           p->n_files, (unsigned long long)p->n_rows, p->dim, (long long)o->bucket_rows);
  }
  for (size_t b = 0; b < p->n_buckets; b++) {
    unsigned long long n = p->bucket_rows[b];
    if (n < p->bucket_rows[least]) least = b;
    if (n > p->bucket_rows[most]) most = b;
    if (o->json)
      printf("%s{\"bucket\":%zu,\"files\":%zu,\"rows\":%llu,\"full\":%.4f}", b ? "," : "", b + 1, n_files[b], n,
             (double)n / capacity);
    else
      printf("bucket %zu: %zu file%s, %llu rows, %.1f %% full\n", b + 1, n_files[b], n_files[b] == 1 ? "" : "s", n,
             100 * (double)n / capacity);
  }
  free(n_files);
  if (o->json) {
    printf("],\"smallest\":%zu,\"largest\":%zu}\n", least + 1, most + 1);
    return;
  }
  printf("smallest: bucket %zu with %llu rows, largest: bucket %zu with %llu rows\n", least + 1,
         (unsigned long long)p->bucket_rows[least], most + 1, (unsigned long long)p->bucket_rows[most]);
  printf("%s: %zu bucket%s for %zu file%s, %llu rows of dimension %u, %.1f %% of the buckets' room\n", o->out, p->n_buckets,
         p->n_buckets == 1 ? "" : "s", p->n_files, p->n_files == 1 ? "" : "s", (unsigned long long)p->n_rows, p->dim,
         100 * (double)p->n_rows / (capacity * (double)p->n_buckets));
}

int cmd_pack(int argc, char **argv) {
  pack_options o = {0};
  pack_plan p = {0};
  tool_list names = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &names);
  if (status < 0) {
    vs_rc rc = resolve(&p, &names, &err);
    if (!rc) rc = measure(&p, &o, &err);
    if (!rc) assign(&p, (uint64_t)o.bucket_rows);
    if (!rc) rc = write_plan(&p, &o, &err);
    status = tool_report(&err);
    if (!rc) note_large_files(&p, (uint64_t)o.bucket_rows), report(&p, &o);
  }
  for (size_t i = 0; i < p.n_files; i++) free(p.files[i].path);
  free(p.files), free(p.bucket_rows);
  tool_list_reset(&names);
  return status;
}
