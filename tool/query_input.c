/* query_input.c - see query_input.h. */
#include "query_input.h"

#include <string.h>

vs_rc query_input_open(const char *path, const char *embedding_dataset, uint32_t dim, input **out, vs_err *err) {
  input_options opt = {.embedding_dataset = embedding_dataset, .id_dataset = "none", .dim = dim};
  vs_rc rc = input_open(path, &opt, out, err);
  if (!rc && (*out)->dim != dim)
    rc = vs_fail(err, VS_INVALID, "%s: its vectors have dimension %u, the shards %u", path, (*out)->dim, dim);
  return rc;
}

vs_rc query_input_read(input *in, const char *path, float *vectors, size_t room, size_t *n, uint64_t *first, vs_err *err) {
  input_batch batch;
  *n = 0;
  while (*n < room) {
    vs_rc rc = in->read(in, room - *n, &batch, err);
    if (rc) return rc;
    if (!batch.n) break;
    if (!*n) *first = batch.first_row;
    for (size_t i = 0; i < batch.n; i++)
      if (batch.faults[i])
        return vs_fail(err, VS_INVALID, "%s: query %llu: %s", path, (unsigned long long)(batch.first_row + i),
                       input_fault_text(batch.faults[i]));
    memcpy(vectors + *n * in->dim, batch.vectors, batch.n * in->dim * sizeof *vectors);
    *n += batch.n;
  }
  return VS_OK;
}
