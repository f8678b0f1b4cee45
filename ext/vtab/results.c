/* results.c - values of a stored row as SQL results. */
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
#include "modules.h"
SQLITE_EXTENSION_INIT3

int result_id(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, vs_err *err) {
  ivfpq_id id;
  if (!s->params.id_text) {
    sqlite3_int64 number;
    memcpy(&number, record + ivfpq_vector_bytes(s), sizeof number);
    sqlite3_result_int64(ctx, number);
    return 1;
  }
  if (ivfpq_row_id(s, record, &id, err)) return 0;
  sqlite3_result_text64(ctx, id.text, id.len, SQLITE_TRANSIENT, SQLITE_UTF8);
  ivfpq_id_free(&id);
  return 1;
}

/* The stored bytes; float16 rows come back as the float32 that every function takes. */
int result_vector(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record) {
  size_t n = s->params.dim, bytes = n * sizeof(float);
  if (!s->params.store) {
    sqlite3_result_blob64(ctx, record, bytes, SQLITE_TRANSIENT);
    return 1;
  }
  float *v = sqlite3_malloc64(bytes);
  if (!v) {
    sqlite3_result_error_nomem(ctx);
    return 1;
  }
  kern_get()->f16_to_f32((const uint16_t *)record, v, n);
  sqlite3_result_blob64(ctx, v, bytes, sqlite3_free);
  return 1;
}

void row_values_reset(row_values *v) {
  free(v->values), free(v->buf);
  *v = (row_values){0};
}

/* Every segment of a shard, and every shard that a table may name, has the columns of the first. */
static vs_rc decode(ivfpq_segment *s, const uint8_t *record, row_values *kept, vs_err *err) {
  if (kept->valid) return VS_OK;
  if (!kept->values && !(kept->values = malloc((s->params.n_columns + 1) * sizeof *kept->values))) return vs_nomem(err);
  free(kept->buf), kept->buf = NULL;
  vs_rc rc = ivfpq_row_columns(s, record, kept->values, &kept->buf, err);
  kept->valid = !rc;
  return rc;
}

int result_column(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, uint32_t c, row_values *kept, vs_err *err) {
  if (decode(s, record, kept, err)) return 0;
  const ivfpq_value *v = &kept->values[c];
  if (v->tag == IVFPQ_INTEGER) sqlite3_result_int64(ctx, v->i);
  else if (v->tag == IVFPQ_REAL) sqlite3_result_double(ctx, v->r);
  else if (v->tag == IVFPQ_TEXT) sqlite3_result_text64(ctx, v->text, v->len, SQLITE_TRANSIENT, SQLITE_UTF8);
  return 1;
}
