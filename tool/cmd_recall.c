/* cmd_recall.c - what searches of a shard or a database find of the true nearest, and what they cost (shard_recall.h): with rows of
 * the shards as queries, or with the user's own.
 *
 * A calibration holds for queries that are like the rows. Where it falls short, what reaches each target is looked for: nprobe
 * is doubled until it does, and refine with it where more partitions alone help little.
 */
#include <stdlib.h>
#include <string.h>

#include "../ext/shard/shard_recall.h"
#include "json.h"
#include "options.h"
#include "progress.h"
#include "query_input.h"

enum { SAMPLE_DEFAULT = 1000, POINTS_MOST = 16 };
#define SHORT_BY .02   /* of a target, and two standard errors: less is chance */

typedef struct recall_options {
  int json;
  int64_t k, sample, threads;
  const char *queries, *embedding_dataset;
} recall_options;

static const option_row rows[] = {
    {"-k", OPTION_COUNT, "K", 1, INT64_MAX, "10", 0, offsetof(recall_options, k), "rows per query"},
    {"--queries", OPTION_TEXT, "FILE", 0, 0, NULL, 0, offsetof(recall_options, queries),
     "HDF5, .npy, .fvecs or .f32 with query vectors of your own (default: rows of the shards, each left out of its own answer)"},
    {"--sample", OPTION_COUNT, "N", 1, 1000000, NULL, 0, offsetof(recall_options, sample),
     "so many queries, spread evenly (default: 400 rows, or at most 1000 of FILE)"},
    {"--threads", OPTION_COUNT, "N", 1, 4096, "all CPUs allowed", 0, offsetof(recall_options, threads),
     "threads that find the truth; searches are timed on one"},
    OPTION_EMBEDDING(recall_options),
    OPTION_JSON(recall_options)};
static const option_command command = {
    "recall", "SOURCE",
    "Measures, on the shards as they are, the recall and the cost of searches with recall = 0.8 ... 0.995 and by default.\n"
    "The truth is found by brute force, once. In a store requests, bytes and ms are those of a search with nothing in the\n"
    "cache.",
    "  vecshard recall db\n  vecshard recall db -k 100 --queries mine.npy", 1, 1, rows, sizeof rows / sizeof *rows};

/* A target that the queries miss, and what reaches it. */
typedef struct advice { shard_recall_point missed, reached; } advice;

typedef struct recall_job {
  const recall_options *o;
  shard_set set;
  float *vectors;           /* own queries; NULL: rows */
  size_t n;
  shard_recall *measure;    /* NULL: no rows */
  shard_recall_point points[POINTS_MOST];
  size_t n_points;
  advice advice[POINTS_MOST];
  size_t n_advice;
} recall_job;

/* ---- the user's queries ---- */

/* Queries spread evenly, one by one. */
static vs_rc read_spread(recall_job *j, input *in, vs_err *err) {
  for (size_t i = 0; i < j->n; i++) {
    size_t n = 0;
    uint64_t row = (uint64_t)((double)i / (double)j->n * (double)in->n_rows), first;
    vs_rc rc = tool_stop(NULL) ? vs_fail(err, VS_INTERRUPT, "interrupted") : in->seek(in, row, err);
    if (!rc) rc = query_input_read(in, j->o->queries, j->vectors + i * in->dim, 1, &n, &first, err);
    if (rc) return rc;
    if (!n) j->n = i; /* the file was cut meanwhile */
  }
  return VS_OK;
}

static vs_rc read_queries(recall_job *j, vs_err *err) {
  uint64_t most = j->o->sample ? (uint64_t)j->o->sample : SAMPLE_DEFAULT, first;
  input *in = NULL;
  vs_rc rc = query_input_open(j->o->queries, j->o->embedding_dataset, j->set.shards[0]->manifest.dim, &in, err);
  if (!rc && !in->n_rows) rc = vs_fail(err, VS_INVALID, "%s: holds no vectors", j->o->queries);
  if (!rc) {
    j->n = (size_t)(in->n_rows < most ? in->n_rows : most);
    j->vectors = tool_alloc(j->n * in->dim, sizeof *j->vectors);
    if (j->n < in->n_rows) rc = read_spread(j, in, err);
    else rc = query_input_read(in, j->o->queries, j->vectors, j->n, &j->n, &first, err);
  }
  input_close(in);
  return rc;
}

/* ---- queries unlike the rows ---- */

static uint32_t most_partitions(const shard_set *set) {
  uint32_t most = 1;
  for (size_t i = 0; i < set->n; i++)
    for (size_t g = 0; g < set->shards[i]->manifest.n_segments; g++)
      if (set->shards[i]->segments[g]->params.nlist > most) most = set->shards[i]->segments[g]->params.nlist;
  return most;
}

static uint64_t total_rows(const shard_set *set) {
  uint64_t n = 0;
  for (size_t i = 0; i < set->n; i++) n += set->shards[i]->manifest.n_rows;
  return n;
}

/* Goes on from `at` until its recall reaches the target: at the latest with an exact search. */
static vs_rc reach_target(recall_job *j, double target, shard_recall_point *at, vs_err *err) {
  uint32_t nlist = most_partitions(&j->set);
  uint64_t n_rows = total_rows(&j->set);
  while (at->recall < target) {
    double before = at->recall;
    shard_recall_setting s = {.nprobe = (int64_t)(2 * at->nprobe < nlist ? 2 * at->nprobe : nlist), .refine = (int64_t)at->refine};
    int all_partitions = at->nprobe >= nlist, all_rows = at->refine * (uint64_t)j->o->k >= n_rows;
    if (all_partitions && all_rows) {
      *at = (shard_recall_point){.nprobe = at->nprobe, .refine = at->refine, .exact = 1, .recall = 1};
      break;
    }
    if (all_partitions) s.refine *= 2;
    progress_count("look for nprobe", at->nprobe, nlist, "partitions");
    vs_rc rc = shard_recall_of(j->measure, &s, at, err);
    if (rc) return rc;
    if (all_partitions || at->recall - before > (target - at->recall) / 4) continue;
    s.refine *= 2;
    if ((rc = shard_recall_of(j->measure, &s, at, err))) return rc;
  }
  return VS_OK;
}

static vs_rc find_advice(recall_job *j, vs_err *err) {
  shard_recall_point at = {0};
  for (size_t i = 0; i < j->n_points; i++) {
    const shard_recall_point *p = &j->points[i];
    double target = p->asked.target;
    if (target <= 0 || p->recall >= target - SHORT_BY || p->recall + 2 * p->error >= target) continue;
    if (!j->n_advice || at.recall < p->recall) at = *p;
    vs_rc rc = reach_target(j, target, &at, err);
    if (rc) return rc;
    j->advice[j->n_advice++] = (advice){*p, at};
  }
  return VS_OK;
}

static void warn(const recall_job *j) {
  const shard_recall_point *m = &j->advice[0].missed;
  if (!j->n_advice) return;
  char *list = tool_format("%s", "");
  for (size_t i = 0; i < j->n_advice; i++) {
    const advice *a = &j->advice[i];
    char *how = a->reached.exact ? tool_format("exact = 1")
                                             : tool_format("nprobe = %llu AND refine = %llu", (unsigned long long)a->reached.nprobe,
                                                           (unsigned long long)a->reached.refine);
    char *longer = tool_format("%s%s %g: %s", list, i ? ";" : "", a->missed.asked.target, how);
    free(list), free(how);
    list = longer;
  }
  if (j->vectors)
    tool_note("warning: %s: these queries are unlike the rows of the shards: recall = %g finds %.3f of their nearest. The calibration "
              "covers queries that are like the rows; these reach%s", j->o->queries, m->asked.target, m->recall, list);
  else
    tool_note("warning: recall = %g finds %.3f of the nearest: the calibration is not that of these rows; build the shards again, or "
              "reach%s", m->asked.target, m->recall, list);
  free(list);
}

/* ---- output ---- */

static void print_header(const recall_job *j) {
  if (!j->o->json) printf("%-8s %8s %8s %8s %10s %10s %14s\n", "target", "nprobe", "refine", "recall", "ms/query", "requests", "bytes");
}

static void print_row(const shard_recall_point *p) {
  char target[32] = "default";
  if (p->asked.target > 0) snprintf(target, sizeof target, "%g", p->asked.target);
  progress_clear();
  printf("%-8s %8llu %8llu %8.4f %10.4f %10.1f %14.0f\n", target, (unsigned long long)p->nprobe, (unsigned long long)p->refine, p->recall,
         p->ms, p->requests, p->bytes);
  fflush(stdout);
}

static void print_json(const recall_job *j, const char *source) {
  printf("{\"source\":");
  json_put_text(stdout, source);
  printf(",\"k\":%lld,\"queries\":%zu,\"settings\":[", (long long)j->o->k, j->measure ? shard_recall_n_queries(j->measure) : 0);
  for (size_t i = 0; i < j->n_points; i++) {
    const shard_recall_point *p = &j->points[i];
    printf("%s{\"target\":", i ? "," : "");
    if (p->asked.target > 0) printf("%g", p->asked.target);
    else printf("null");
    printf(",\"nprobe\":%llu,\"refine\":%llu,\"exact\":%s,\"recall\":%.6f,\"ms\":%.6f,\"requests\":%.2f,\"bytes\":%.0f}",
           (unsigned long long)p->nprobe, (unsigned long long)p->refine, p->exact ? "true" : "false", p->recall, p->ms, p->requests,
           p->bytes);
  }
  printf("],\"missed\":[");
  for (size_t i = 0; i < j->n_advice; i++) {
    const advice *a = &j->advice[i];
    printf("%s{\"target\":%g,\"recall\":%.6f,", i ? "," : "", a->missed.asked.target, a->missed.recall);
    printf("\"reached\":{\"nprobe\":%llu,\"refine\":%llu,\"exact\":%s,\"recall\":%.6f}}", (unsigned long long)a->reached.nprobe,
           (unsigned long long)a->reached.refine, a->reached.exact ? "true" : "false", a->reached.recall);
  }
  printf("]}\n");
}

/* ---- the whole ---- */

static void show(void *ctx, const char *stage, uint64_t done, uint64_t total) {
  (void)ctx;
  progress_count(stage, done, total, strcmp(stage, "search exactly") ? "settings" : "queries");
}

static vs_rc measure(recall_job *j, vs_err *err) {
  shard_recall_plan p = {.shards = j->set.shards, .n_shards = j->set.n, .k = (uint64_t)j->o->k, .queries = j->vectors,
                         .n_queries = j->vectors ? j->n : (size_t)j->o->sample, .threads = (int)j->o->threads, .progress = show};
  int more = 1;
  vs_rc rc = shard_recall_open(&p, &j->measure, err);
  if (rc || !j->measure) return rc;
  while (more && !(rc = shard_recall_next(j->measure, &j->points[j->n_points], &more, err)))
    if (more) {
      if (!j->o->json) print_row(&j->points[j->n_points]);
      if (j->n_points + 1 < POINTS_MOST) j->n_points++;
    }
  return rc ? rc : find_advice(j, err);
}

static vs_rc run(recall_job *j, const char *source, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = shard_set_open(source, &j->set, err);
  if (!rc && !j->set.n) rc = vs_fail(err, VS_NOTFOUND, "%s: holds no shard", source);
  if (!rc && j->o->queries) rc = read_queries(j, err);
  if (rc) return rc;
  print_header(j);
  rc = measure(j, &why);
  progress_clear();
  if (rc == VS_INTERRUPT) return vs_fail(err, rc, "interrupted");
  if (rc) return vs_fail(err, rc, "%s%s%s", j->vectors ? j->o->queries : "", j->vectors ? ": " : "", why.text);
  if (j->o->json) print_json(j, source);
  if (!j->measure) tool_note("%s: holds no rows to find: there is nothing to measure", source);
  warn(j);
  return VS_OK;
}

int cmd_recall(int argc, char **argv) {
  recall_options o = {0};
  recall_job j = {.o = &o};
  tool_list args = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0) {
    vs_rc rc = run(&j, args.items[0], &err);
    status = rc ? (int)tool_report(&err) : TOOL_DONE;
  }
  shard_recall_close(j.measure);
  free(j.vectors);
  shard_set_reset(&j.set);
  tool_list_reset(&args);
  return status;
}
