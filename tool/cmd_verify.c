/* cmd_verify.c - reads every byte of every shard and reports every fault (shard_verify.h); one line each, "path:
 * fault". With a plan, first compares the database with it (plan_check.h), and ends with the buckets to build again.
 *
 * A shard that cannot be opened is a fault, and the others are still checked.
 */
#include <stdlib.h>
#include <string.h>

#include "../ext/shard/shard_verify.h"
#include "json.h"
#include "options.h"
#include "plan_check.h"
#include "progress.h"
#include "source.h"

enum { MISSING_NO = 0, MISSING_LINES, MISSING_ARRAY };

typedef struct verify_options {
  int json, quick, missing;
  const char *plan;
} verify_options;

static const option_row rows[] = {
    {"--plan", OPTION_TEXT, "FILE", 0, 0, NULL, 0, offsetof(verify_options, plan),
     "a plan of vecshard pack: SOURCE must be the database of its buckets, all of them and nothing else"},
    {"--quick", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(verify_options, quick),
     "with --plan: compare only, by manifests and sizes of files"},
    {"--missing", OPTION_CHOICE, "no|lines|array", 0, 0, "no", 0, offsetof(verify_options, missing),
     "with --plan: compare only, and print the numbers of the buckets to build (again): one a line, or like 1-3,7"},
    OPTION_JSON(verify_options)};
static const option_command command = {
    "verify",
    "SOURCE",
    "Reads every byte of a shard or a database and prints one line per fault. Exit status 0: sound, 1: not.",
    "  vecshard verify db\n"
    "  vecshard verify db --plan plan.json\n"
    "  sbatch --array=$(vecshard verify db --plan plan.json --missing array) job.sh",
    1,
    1,
    rows,
    sizeof rows / sizeof *rows};

typedef struct verify_job {
  verify_options o;
  plan plan;
  uint8_t *again; /* per bucket of the plan */
  uint64_t n_faults;
  size_t n_missing; /* not among the faults: with --missing */
} verify_job;

/* ---- faults ---- */

static void print_fault(verify_job *j, const char *path, const char *text) {
  size_t len = strlen(path);
  progress_clear();
  /* Messages of the lower folders begin with the file already. */
  if (!strncmp(text, path, len) && !strncmp(text + len, ": ", 2)) text += len + 2;
  else if (!strncmp(text, path, len) && text[len] == '/') text += len + 1;
  if (j->o.missing) tool_note("%s: %s", path, text);
  else if (j->o.json) {
    printf("%s{\"path\":", j->n_faults ? "," : "");
    json_put_text(stdout, path);
    printf(",\"fault\":");
    json_put_text(stdout, text);
    putchar('}');
  } else printf("%s: %s\n", path, text);
  j->n_faults++;
}

static int on_fault(void *ctx, const char *shard, const char *segment, const char *text) {
  char *path = tool_format("%s%s%s", shard, *segment ? "/" : "", segment);
  print_fault(ctx, path, text);
  free(path);
  return 0;
}

static void on_plan_fault(void *ctx, size_t bucket, const char *path, const char *text) {
  verify_job *j = ctx;
  if (bucket) j->again[bucket - 1] = 1;
  if (!text && j->o.missing) j->n_missing++; /* its number says it */
  else print_fault(j, path, text ? text : "is missing");
}

/* ---- the buckets to build again ---- */

/* The end of the run of such buckets that begins at b. */
static size_t run_end(const verify_job *j, size_t b) {
  while (b < j->plan.n && j->again[b]) b++;
  return b;
}

static void print_ranges(const verify_job *j) {
  const char *comma = "";
  for (size_t b = 0; b < j->plan.n; b++) {
    size_t end = run_end(j, b);
    if (end == b) continue;
    printf("%s%zu", comma, b + 1);
    if (end > b + 1) printf("-%zu", end);
    comma = ",", b = end;
  }
}

static void print_numbers(const verify_job *j, const char *between, const char *last) {
  int n = 0;
  for (size_t b = 0; b < j->plan.n; b++)
    if (j->again[b]) printf("%s%zu", n++ ? between : "", b + 1);
  if (n) fputs(last, stdout);
}

static int any_again(const verify_job *j) {
  size_t b = 0;
  while (b < j->plan.n && !j->again[b]) b++;
  return b < j->plan.n;
}

/* ---- the whole ---- */

static vs_rc verify_bytes(verify_job *j, const tool_list *folders, vs_err *err) {
  shard_verifier v = {.ctx = j, .fault = on_fault, .stop = tool_stop};
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < folders->n && !rc; i++) {
    uint64_t before = j->n_faults;
    progress_count("verify", i, folders->n, "shards");
    rc = tool_stop(NULL) ? vs_fail(err, VS_INTERRUPT, "interrupted") : shard_verify(folders->items[i], &v, err);
    size_t bucket = j->o.plan ? plan_bucket_number(&j->plan, folders->items[i]) : 0;
    if (bucket && j->n_faults > before) j->again[bucket - 1] = 1;
  }
  return rc;
}

static void print_end(const verify_job *j, size_t n_shards, int sound) {
  if (j->o.missing == MISSING_ARRAY) print_ranges(j), fputs(any_again(j) ? "\n" : "", stdout);
  else if (j->o.missing) print_numbers(j, "\n", "\n");
  else if (j->o.json) {
    printf("],\"sound\":%s,\"shards\":%zu", sound ? "true" : "false", n_shards);
    if (j->o.plan) printf(",\"buckets\":%zu,\"build_again\":[", j->plan.n), print_numbers(j, ",", ""), putchar(']');
    printf("}\n");
  } else if (!sound && any_again(j)) printf("buckets to build (again): "), print_ranges(j), putchar('\n');
  else if (sound) {
    printf("%s: %zu shard%s", j->o.quick ? "complete" : "sound", n_shards, n_shards == 1 ? "" : "s");
    printf(j->o.plan ? ", as the plan says\n" : "\n");
  }
}

static tool_status verify_all(verify_job *j, const char *source) {
  tool_list folders = {0};
  vs_err err = {0};
  vs_rc rc = VS_OK;
  int quick = j->o.quick || j->o.missing;
  plan_checker c = {.ctx = j, .fault = on_plan_fault};
  if (j->o.plan) rc = plan_read(j->o.plan, &j->plan, &err);
  j->again = tool_alloc(j->plan.n, 1);
  if (!rc && !j->o.plan) rc = source_expand(source, &folders, &err);
  if (rc) return tool_report(&err);
  if (j->o.json) printf("{\"faults\":[");
  if (j->o.plan) rc = plan_check(&j->plan, source, &c, &folders, &err);
  if (!rc && !quick) rc = verify_bytes(j, &folders, &err);
  progress_clear();
  int sound = !j->n_faults && !j->n_missing && !rc;
  if (!rc || j->o.json) print_end(j, folders.n, sound);
  tool_list_reset(&folders);
  if (rc) return tool_report(&err);
  if (j->n_faults) tool_note("%llu fault%s found", (unsigned long long)j->n_faults, j->n_faults == 1 ? "" : "s");
  return sound ? TOOL_DONE : TOOL_FAILED;
}

static tool_status check_arguments(const verify_options *o) {
  if (!o->plan && (o->quick || o->missing))
    return options_wrong(&command, "%s needs --plan", o->quick ? "--quick" : "--missing");
  if (o->missing && o->json) return options_wrong(&command, "give --missing or --json, not both");
  return TOOL_DONE;
}

int cmd_verify(int argc, char **argv) {
  verify_job j = {0};
  tool_list args = {0};
  int status = options_read(&command, argc, argv, &j.o, &args);
  if (status < 0 && !(status = (int)check_arguments(&j.o))) status = (int)verify_all(&j, args.items[0]);
  plan_reset(&j.plan);
  free(j.again);
  tool_list_reset(&args);
  return status;
}
