/* progress.h - one line on a terminal: stage, share done, rows per second, time left. Silent when stderr is no
 * terminal. */
#ifndef PROGRESS_H
#define PROGRESS_H
#include <stdint.h>

/* Fits the `progress` callback of a build; ctx is not used. Redraws at most ten times a second. */
void progress_show(void *ctx, const char *stage, uint64_t done, uint64_t total);
void progress_bytes(const char *stage, uint64_t done, uint64_t total); /* the same, in bytes */
void progress_count(const char *stage, uint64_t done, uint64_t total, const char *unit); /* in "files" */
void progress_clear(void); /* before other output, and at the end */

#endif
