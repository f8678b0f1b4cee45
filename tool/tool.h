/* tool.h - what the commands of `vecshard` share.
 *
 * A command is a function of its own file; it parses its arguments (options.h), does its work and returns the exit
 * status. Results go to stdout, everything else to stderr. Allocation failures end the process with a message: commands
 * hold nothing then that a reader could mistake for a shard.
 */
#ifndef TOOL_H
#define TOOL_H
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "../ext/base/vs_err.h"

typedef enum tool_status { TOOL_DONE = 0, TOOL_FAILED = 1, TOOL_USAGE = 2 } tool_status;

int cmd_build(int argc, char **argv);
int cmd_cost(int argc, char **argv);
int cmd_dump(int argc, char **argv);
int cmd_info(int argc, char **argv);
int cmd_pack(int argc, char **argv);
int cmd_publish(int argc, char **argv);
int cmd_pull(int argc, char **argv);
int cmd_query(int argc, char **argv);
int cmd_recall(int argc, char **argv);
int cmd_verify(int argc, char **argv);

/* ---- vecshard.c ---- */

/* One line on stderr, "vecshard: ..."; the progress bar makes way. */
void tool_note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The same for the end of a command: prints the text of err and returns TOOL_FAILED, or TOOL_DONE when there is none.
 */
tool_status tool_report(const vs_err *err);

/* Set by SIGINT, SIGTERM and SIGHUP: commands poll it, undo what they began and fail with "interrupted". A second
 * signal ends the process at once. Fits the `stop` callbacks; ctx is not used. */
int tool_stop(void *ctx);

void *tool_alloc(size_t n, size_t size); /* zeroed; never NULL */
char *tool_format(const char *fmt, ...) __attribute__((format(printf, 1, 2))); /* for free; never NULL */
double tool_seconds(void); /* monotonic */

/* Owned texts. */
typedef struct tool_list {
  char **items;
  size_t n, room;
} tool_list;
void tool_list_add(tool_list *list, const char *text);
void tool_list_reset(tool_list *list);

#endif
