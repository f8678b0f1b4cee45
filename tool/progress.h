/* progress.h - one line on a terminal: stage, share done, rows per second, time left. Silent when stderr is no
 * terminal, but for lines of JSON when a program asked for these: one object a line,
 *   {"stage":"encode","done":65536,"total":1000000,"rows_per_second":250000,"mb_per_second":128.0,"seconds_left":4}
 * when a stage begins and ends and once a second; rates where the stage counts rows, mb_per_second of vectors as they are read. */
#ifndef PROGRESS_H
#define PROGRESS_H
#include <stdint.h>

/* Fits the `progress` callback of a build; ctx is not used. Redraws at most ten times a second. */
void progress_show(void *ctx, const char *stage, uint64_t done, uint64_t total);
void progress_bytes(const char *stage, uint64_t done, uint64_t total); /* the same, in bytes */
void progress_json(int on);                                    /* lines on stderr instead of a bar */
void progress_plan(uint64_t n_rows, uint64_t row_bytes);       /* for MB/s; n_rows: 0 is unknown */
/* What is about to be done: a line on a terminal, {"plan":"..."} as JSON. */
void progress_say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void progress_count(const char *stage, uint64_t done, uint64_t total, const char *unit); /* in "files" */
void progress_clear(void); /* before other output, and at the end */

#endif
