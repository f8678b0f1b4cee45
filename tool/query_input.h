/* query_input.h - files of query vectors: any input, ids aside, of the dimension of the shards. */
#ifndef QUERY_INPUT_H
#define QUERY_INPUT_H
#include "../ext/input/input.h"

vs_rc query_input_open(const char *path, const char *embedding_dataset, uint32_t dim, input **out, vs_err *err) VS_WARN_UNUSED;
/* The next `room` vectors; *n is less at the end of the file. *first: the number of the first, when there is one. A row that cannot
 * be used is an error that names it. */
vs_rc query_input_read(input *in, const char *path, float *vectors, size_t room, size_t *n, uint64_t *first, vs_err *err) VS_WARN_UNUSED;

#endif
