/* vecshard.c - the command-line tool: picks the command, handles signals, and has the last word on stdout.
 *
 *   vecshard pack part*.h5 --bucket-rows 10000000 --out plan.json
 *   vecshard build --plan plan.json --bucket 1 --out db
 *   vecshard info db
 *   vecshard publish db s3://my-bucket/db
 *   vecshard query db --queries q.fvecs -k 10 > hits.csv
 *
 * Exit status: 0 done, 1 failed, 2 wrong usage.
 */
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../ext/base/vs_scope.h"
#include "../ext/input/input.h"
#include "../ext/vecshard.h"
#include "progress.h"
#include "tool.h"

typedef struct command {
  const char *name, *help;
  int (*run)(int argc, char **argv);
} command;

static const command commands[] = {
  {"pack", "assign files to buckets of about N rows", cmd_pack},
  {"build", "build a shard from files of vectors", cmd_build},
  {"publish", "put a shard or a database into an S3 store", cmd_publish},
  {"pull", "get a shard or a database out of an S3 store", cmd_pull},
  {"query", "search a shard or a database with vectors from a file", cmd_query},
  {"info", "what a shard or a database holds", cmd_info},
  {"verify", "read every byte and report every fault", cmd_verify},
  {"recall", "measure what searches find, and what they cost", cmd_recall},
  {"cost", "what a database of a planned size takes: space, time, requests, dollars", cmd_cost},
  {"dump", "print the structure of segment files", cmd_dump},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

/* ---- what the commands share ---- */

static int stop_wanted; /* atomic: set by a signal, read by any thread */

static void on_signal(int number) {
  (void)number;
  __atomic_store_n(&stop_wanted, 1, __ATOMIC_RELAXED);
}

int tool_stop(void *ctx) {
  (void)ctx;
  return __atomic_load_n(&stop_wanted, __ATOMIC_RELAXED);
}

void tool_note(const char *fmt, ...) {
  va_list args;
  progress_clear();
  fputs("vecshard: ", stderr);
  va_start(args, fmt);
  vfprintf(stderr, fmt, args);
  va_end(args);
  fputc('\n', stderr);
}

tool_status tool_report(const vs_err *err) {
  progress_clear();
  if (!err->rc) return TOOL_DONE;
  tool_note("%s", err->text);
  return TOOL_FAILED;
}

static void out_of_memory(void) {
  tool_note("out of memory");
  exit(TOOL_FAILED);
}

void *tool_alloc(size_t n, size_t size) {
  void *p = calloc(n ? n : 1, size ? size : 1);
  if (!p) out_of_memory();
  return p;
}

char *tool_format(const char *fmt, ...) {
  char *text = NULL;
  va_list args;
  va_start(args, fmt);
  int n = vasprintf(&text, fmt, args);
  va_end(args);
  if (n < 0) out_of_memory();
  return text;
}

double tool_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void tool_list_add(tool_list *list, const char *text) {
  if (list->n == list->room) {
    size_t room = list->room ? 2 * list->room : 16;
    char **grown = realloc(list->items, room * sizeof *grown);
    if (!grown) out_of_memory();
    list->items = grown, list->room = room;
  }
  list->items[list->n++] = tool_format("%s", text);
}

void tool_list_reset(tool_list *list) {
  for (size_t i = 0; i < list->n; i++) free(list->items[i]);
  free(list->items);
  memset(list, 0, sizeof *list);
}

/* ---- main ---- */

static void print_usage(FILE *to) {
  fputs("usage: vecshard COMMAND [ARGUMENTS]\n\n", to);
  for (size_t i = 0; i < N_COMMANDS; i++) fprintf(to, "  %-8s %s\n", commands[i].name, commands[i].help);
  fputs("\nvecshard COMMAND --help tells more, with an example; vecshard --version prints the version.\n"
        "Exit status: 0 done, 1 failed, 2 wrong usage.\n", to);
}

static void catch_signals(void) {
  static const int caught[] = {SIGINT, SIGTERM, SIGHUP};
  struct sigaction a = {.sa_handler = on_signal, .sa_flags = SA_RESTART | (int)SA_RESETHAND};
  for (size_t i = 0; i < sizeof caught / sizeof *caught; i++) {
    struct sigaction old;
    /* What nohup or a shell's background job ignores stays ignored. */
    if (!sigaction(caught[i], NULL, &old) && old.sa_handler != SIG_IGN) sigaction(caught[i], &a, NULL);
  }
}

static int run_command(int argc, char **argv) {
  const char *name = argv[1];
  for (size_t i = 0; i < N_COMMANDS; i++)
    if (!strcmp(name, commands[i].name)) return commands[i].run(argc - 2, argv + 2);
  tool_note("there is no command '%s'; see vecshard --help", name);
  return TOOL_USAGE;
}

int main(int argc, char **argv) {
  int status = TOOL_DONE;
  if (argc < 2) {
    print_usage(stderr);
    return TOOL_USAGE;
  }
  input_skip_exit_cleanup();
  catch_signals();
  vs_scope scope = {.stop = tool_stop, .max_bytes = UINT64_MAX}; /* who starts a tool means what it reads */
  vs_scope_enter(&scope);
  if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) print_usage(stdout);
  else if (!strcmp(argv[1], "--version")) puts("vecshard " VECSHARD_VERSION);
  else status = run_command(argc, argv);
  /* A full disk shows only when the last buffer is written. */
  int failed = ferror(stdout);
  if ((fclose(stdout) || failed) && status == TOOL_DONE) {
    tool_note("cannot write to standard output: %s", strerror(errno));
    status = TOOL_FAILED;
  }
  return status;
}
