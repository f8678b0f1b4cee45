/* cmd_verify.c - reads every byte of every shard and reports every fault (shard_verify.h); one line each, "path:
 * fault".
 *
 * A shard that cannot be opened is a fault, and the others are still checked.
 */
#include <stdlib.h>
#include <string.h>

#include "../ext/shard/shard_verify.h"
#include "json.h"
#include "options.h"
#include "progress.h"
#include "source.h"

typedef struct verify_options { int json; } verify_options;

static const option_row rows[] = {OPTION_JSON(verify_options)};
static const option_command command = {
    "verify",
    "SOURCE",
    "Reads every byte of a shard or a database and prints one line per fault. Exit status 0: sound, 1: not.",
    "  vecshard verify db",
    1,
    1,
    rows,
    sizeof rows / sizeof *rows};

typedef struct verify_job { int json; uint64_t n_faults; } verify_job;

static int on_fault(void *ctx, const char *shard, const char *segment, const char *text) {
  verify_job *j = ctx;
  char *path = tool_format("%s%s%s", shard, *segment ? "/" : "", segment);
  size_t len = strlen(path);
  progress_clear();
  /* Messages of the lower folders begin with the file already. */
  if (!strncmp(text, path, len) && !strncmp(text + len, ": ", 2)) text += len + 2;
  if (j->json) {
    printf("%s{\"path\":", j->n_faults ? "," : "");
    json_put_text(stdout, path);
    printf(",\"fault\":");
    json_put_text(stdout, text);
    putchar('}');
  } else printf("%s: %s\n", path, text);
  free(path);
  j->n_faults++;
  return 0;
}

static tool_status verify_all(verify_job *j, const tool_list *folders) {
  shard_verifier v = {.ctx = j, .fault = on_fault, .stop = tool_stop};
  vs_err err = {0};
  vs_rc rc = VS_OK;
  if (j->json) printf("{\"faults\":[");
  for (size_t i = 0; i < folders->n && !rc; i++) {
    progress_show(NULL, "verify", i, folders->n);
    rc = tool_stop(NULL) ? vs_fail(&err, VS_INTERRUPT, "interrupted") : shard_verify(folders->items[i], &v, &err);
  }
  progress_clear();
  int sound = !j->n_faults && !rc;
  if (j->json) printf("],\"sound\":%s,\"shards\":%zu}\n", sound ? "true" : "false", folders->n);
  else if (sound) printf("sound: %zu shard%s\n", folders->n, folders->n == 1 ? "" : "s");
  if (rc) return tool_report(&err);
  if (!sound) tool_note("%llu fault%s found", (unsigned long long)j->n_faults, j->n_faults == 1 ? "" : "s");
  return sound ? TOOL_DONE : TOOL_FAILED;
}

int cmd_verify(int argc, char **argv) {
  verify_options o = {0};
  tool_list args = {0}, folders = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0) {
    verify_job j = {.json = o.json};
    status = source_expand(args.items[0], &folders, &err) ? (int)tool_report(&err) : (int)verify_all(&j, &folders);
  }
  tool_list_reset(&args);
  tool_list_reset(&folders);
  return status;
}
