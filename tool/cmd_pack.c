/* cmd_pack.c - assigns files to buckets of at most N rows, so that every bucket becomes one shard.
 *
 * Best fit decreasing: files from large to small, each into the fullest bucket that still has room for it, else into a
 * new one. Equal files keep the order in which they were given, so that the plan follows from the arguments alone. A
 * file larger than N has a bucket of its own: files are not cut.
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
    "files.",
    "  vecshard pack part*.h5 --bucket-rows 10000000 --out plan.json\n"
    "  seq $(jq '.buckets | length' plan.json) | parallel vecshard build --plan plan.json --bucket {} --out db",
    1,
    SIZE_MAX,
    rows,
    sizeof rows / sizeof *rows};

typedef struct pack_file {
  char *path; /* absolute: jobs run anywhere */
  uint64_t n_rows;
  size_t number, bucket;
} pack_file;

typedef struct pack_plan {
  pack_file *files;
  uint64_t *bucket_rows; /* filled rows */
  size_t n_files, n_buckets;
  uint32_t dim;
  uint64_t n_rows;
} pack_plan;

/* ---- the files ---- */

static int by_path(const void *a, const void *b) {
  return strcmp(((const pack_file *)a)->path, ((const pack_file *)b)->path);
}
static int by_number(const void *a, const void *b) {
  size_t x = ((const pack_file *)a)->number, y = ((const pack_file *)b)->number;
  return (x > y) - (x < y);
}
static int by_rows(const void *a, const void *b) {
  uint64_t x = ((const pack_file *)a)->n_rows, y = ((const pack_file *)b)->n_rows;
  return x != y ? (x < y ? 1 : -1) : by_number(a, b);
}

static vs_rc resolve(pack_plan *p, const tool_list *names, vs_err *err) {
  p->files = tool_alloc(names->n, sizeof *p->files);
  p->n_files = names->n;
  for (size_t i = 0; i < names->n; i++) {
    p->files[i].number = i;
    if (!(p->files[i].path = realpath(names->items[i], NULL)))
      return vs_fail(err, VS_NOTFOUND, "%s: %s", names->items[i], strerror(errno));
  }
  qsort(p->files, p->n_files, sizeof *p->files, by_path);
  for (size_t i = 1; i < p->n_files; i++)
    if (!strcmp(p->files[i].path, p->files[i - 1].path))
      return vs_fail(err, VS_INVALID, "%s: given twice", p->files[i].path);
  qsort(p->files, p->n_files, sizeof *p->files, by_number);
  return VS_OK;
}

static vs_rc measure(pack_plan *p, const pack_options *o, vs_err *err) {
  input_options opt = {.embedding_dataset = o->embedding_dataset, .id_dataset = o->id_dataset, .dim = (uint32_t)o->dim};
  for (size_t i = 0; i < p->n_files; i++) {
    pack_file *f = &p->files[i];
    uint32_t dim;
    progress_show(NULL, "look at files", i, p->n_files);
    if (tool_stop(NULL)) return vs_fail(err, VS_INTERRUPT, "interrupted");
    vs_rc rc = input_shape(f->path, &opt, &f->n_rows, &dim, err);
    if (rc) return rc;
    if (i == 0) p->dim = dim;
    if (dim != p->dim)
      return vs_fail(err, VS_INVALID, "%s has dimension %u and %s has %u: a database holds one", p->files[0].path,
                     p->dim, f->path, dim);
    p->n_rows += f->n_rows;
  }
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
  p->bucket_rows = tool_alloc(p->n_files, sizeof *p->bucket_rows);
  qsort(p->files, p->n_files, sizeof *p->files, by_rows);
  for (size_t i = 0; i < p->n_files; i++) {
    pack_file *f = &p->files[i];
    f->bucket = best_bucket(p, f->n_rows, capacity);
    if (f->bucket == p->n_buckets) p->n_buckets++;
    p->bucket_rows[f->bucket] += f->n_rows;
  }
  qsort(p->files, p->n_files, sizeof *p->files, by_number);
}

/* ---- the plan and the report ---- */

static vs_rc write_plan(const pack_plan *p, const char *path, vs_err *err) {
  output out;
  vs_rc rc = output_open(path, &out, err);
  if (rc) return rc;
  fprintf(out.file, "{\"buckets\":[");
  for (size_t b = 0; b < p->n_buckets; b++) {
    const char *comma = "";
    fprintf(out.file, "%s\n{\"files\":[", b ? "," : "");
    for (size_t i = 0; i < p->n_files; i++) {
      if (p->files[i].bucket != b) continue;
      fputs(comma, out.file);
      json_put_text(out.file, p->files[i].path);
      comma = ",";
    }
    fprintf(out.file, "],\"rows\":%llu}", (unsigned long long)p->bucket_rows[b]);
  }
  fprintf(out.file, "]}\n");
  return output_close(&out, VS_OK, err);
}

static void report(const pack_plan *p, const pack_options *o) {
  uint64_t capacity = (uint64_t)o->bucket_rows;
  for (size_t i = 0; i < p->n_files; i++)
    if (p->files[i].n_rows > capacity)
      tool_note("%s: its %llu rows are more than --bucket-rows; it has bucket %zu alone", p->files[i].path,
                (unsigned long long)p->files[i].n_rows, p->files[i].bucket + 1);
  if (o->json) {
    printf("{\"plan\":");
    json_put_text(stdout, o->out);
    printf(",\"buckets\":%zu,\"files\":%zu,\"rows\":%llu,\"dim\":%u}\n", p->n_buckets, p->n_files,
           (unsigned long long)p->n_rows, p->dim);
    return;
  }
  size_t *n_files = tool_alloc(p->n_buckets, sizeof *n_files);
  for (size_t i = 0; i < p->n_files; i++) n_files[p->files[i].bucket]++;
  for (size_t b = 0; b < p->n_buckets; b++)
    printf("bucket %zu: %zu files, %llu rows, %.1f %% full\n", b + 1, n_files[b], (unsigned long long)p->bucket_rows[b],
           100.0 * (double)p->bucket_rows[b] / (double)capacity);
  printf("%s: %zu buckets for %zu files, %llu rows of dimension %u\n", o->out, p->n_buckets, p->n_files,
         (unsigned long long)p->n_rows, p->dim);
  free(n_files);
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
    if (!rc) rc = write_plan(&p, o.out, &err);
    status = tool_report(&err);
    if (!rc) report(&p, &o);
  }
  for (size_t i = 0; i < p.n_files; i++) free(p.files[i].path);
  free(p.files), free(p.bucket_rows);
  tool_list_reset(&names);
  return status;
}
