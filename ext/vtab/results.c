/* results.c - values of a stored row as SQL results. */
#include <stdlib.h>

#include "../kernels/kern.h"
#include "modules.h"
SQLITE_EXTENSION_INIT3

int result_id(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, vs_err *err) {
  ivfpq_id id;
  if (ivfpq_row_id(s, record, &id, err)) return 0;
  if (id.is_text) sqlite3_result_text64(ctx, id.text, id.len, SQLITE_TRANSIENT, SQLITE_UTF8);
  else sqlite3_result_int64(ctx, id.i);
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

int result_column(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, uint32_t c, vs_err *err) {
  uint8_t *buf;
  ivfpq_value *values = malloc((s->params.n_columns + 1) * sizeof *values);
  if (!values) {
    vs_nomem(err);
    return 0;
  }
  if (ivfpq_row_columns(s, record, values, &buf, err)) {
    free(values);
    return 0;
  }
  const ivfpq_value *v = &values[c];
  if (v->tag == IVFPQ_INTEGER) sqlite3_result_int64(ctx, v->i);
  else if (v->tag == IVFPQ_REAL) sqlite3_result_double(ctx, v->r);
  else if (v->tag == IVFPQ_TEXT) sqlite3_result_text64(ctx, v->text, v->len, SQLITE_TRANSIENT, SQLITE_UTF8);
  free(values), free(buf);
  return 1;
}
