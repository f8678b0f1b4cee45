/* input_concat.h - several files as one input: rows run on from file to file. */
#ifndef INPUT_CONCAT_H
#define INPUT_CONCAT_H
#include "../ext/input/input.h"

/* Opens the files in order; all must have one dimension, one kind of ids and the same types of columns, else VS_INVALID
 * naming two that differ. Row-number ids run on as well. One file is open at a time, and near
 * its end the next one, so a thousand files cost the memory of two. progress may be NULL. */
vs_rc input_concat_open(char *const *paths, size_t n, const input_options *opt,
                        void (*progress)(void *ctx, const char *stage, uint64_t done, uint64_t total), input **out,
                        vs_err *err) VS_WARN_UNUSED;
/* "FILE: row N", counted from 0 in its own file. */
void input_concat_describe(const input *in, uint64_t row, char *buf, size_t n);

#endif
