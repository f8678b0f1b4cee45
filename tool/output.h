/* output.h - files that appear whole or not at all, and the folders and disks they need. */
#ifndef OUTPUT_H
#define OUTPUT_H
#include "tool.h"

/* A file under a temporary name in its folder, or stdout when path is NULL. */
typedef struct output {
  FILE *file;
  char *path, *temporary; /* NULL: stdout */
} output;
vs_rc output_open(const char *path, output *out, vs_err *err) VS_WARN_UNUSED;
/* Syncs and gives the file its name, or removes it when rc (or writing) failed; frees all. Returns the first failure.
 */
vs_rc output_close(output *out, vs_rc rc, vs_err *err) VS_WARN_UNUSED;

/* The whole of a text file of at most `limit` bytes, malloc'ed and NUL terminated. */
vs_rc output_read_text(const char *path, size_t limit, char **text, vs_err *err) VS_WARN_UNUSED;

/* mkdir -p. *n_made is the number of folders it made, the last components of the path. */
vs_rc output_make_folder(const char *path, int *n_made, vs_err *err) VS_WARN_UNUSED;
/* Removes the last n_made components of the path again, as far as they are empty. */
void output_drop_folder(const char *path, int n_made);
vs_rc output_sync_folder(const char *path, vs_err *err) VS_WARN_UNUSED;

/* Is there room for n_out bytes in `out` and n_temp bytes in `temp`, together when both are on one file system? */
vs_rc output_check_space(const char *out, uint64_t n_out, const char *temp, uint64_t n_temp,
                         vs_err *err) VS_WARN_UNUSED;

/* Bytes that a file takes on its disk; 0 when there is none. */
uint64_t output_allocated(const char *path);

/* "23.4 MB", decimal. */
const char *output_size(uint64_t n_bytes, char buf[32]);

#endif
