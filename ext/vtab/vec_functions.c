/* vec_functions.c - functions on vectors, named and behaving as in sqlite-vec where it has them.
 *
 *   SELECT vec_to_json(vec_normalize('[3,4]'));              -- [0.6,0.8]
 *   SELECT vec_distance_l2('[0,0]', '[3,4]');                -- 5.0; also _cosine and _dot (the negative inner product)
 *   SELECT vec_length(x'0000803f'), vec_to_json(vec_slice('[1,2,3]', 0, 2)), vec_to_json(vec_add('[1]', '[2]'));
 *   SELECT vec_pack(embedding, name) FROM queries;           -- many queries for shard_union in one BLOB
 *   SELECT vecshard_version(), vecshard_cpu();
 *
 * A NULL argument gives NULL. The cosine distance to a zero vector is NULL: it has no direction.
 */
#include "vec_functions.h"

#include <math.h>
#include <string.h>

#include "../ivfpq/ivfpq_format.h"
#include "../kernels/kern.h"
#include "../vecshard.h"
#include "vec_value.h"
SQLITE_EXTENSION_INIT3

static void fail(sqlite3_context *ctx, const vs_err *err) {
  if (err->rc == VS_NOMEM) sqlite3_result_error_nomem(ctx);
  else sqlite3_result_error(ctx, err->text, -1);
}

/* The argument as a vector; NULL with the result set when it is none (an error, or SQL NULL). */
static float *argument(sqlite3_context *ctx, sqlite3_value *v, uint32_t *dim) {
  vs_err err = {0};
  float *vec;
  if (vec_from_value(v, &vec, dim, &err)) fail(ctx, &err);
  return vec;
}

/* Takes v. */
static void result_vec(sqlite3_context *ctx, float *v, uint32_t dim) {
  sqlite3_result_blob64(ctx, v, (sqlite3_uint64)dim * sizeof *v, sqlite3_free);
  sqlite3_result_subtype(ctx, VEC_SUBTYPE_F32);
}

static void f32(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  float *v = argument(ctx, argv[0], &dim);
  (void)argc;
  if (v) result_vec(ctx, v, dim);
}

static void to_json(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  float *v = argument(ctx, argv[0], &dim);
  (void)argc;
  if (!v) return;
  sqlite3_str *s = sqlite3_str_new(sqlite3_context_db_handle(ctx));
  for (uint32_t i = 0; i < dim; i++) {
    char text[32]; /* the shortest digits that give the same float back */
    for (int digits = 6; digits <= 9; digits++) {
      sqlite3_snprintf(sizeof text, text, "%.*g", digits, v[i]);
      if (vec_parse_float(text) == v[i]) break;
    }
    sqlite3_str_appendf(s, "%s%s", i ? "," : "[", text);
  }
  sqlite3_str_appendall(s, "]");
  sqlite3_free(v);
  char *text = sqlite3_str_finish(s);
  if (!text) sqlite3_result_error_nomem(ctx);
  else {
    sqlite3_result_text(ctx, text, -1, sqlite3_free);
    sqlite3_result_subtype(ctx, 'J'); /* JSON functions take it as JSON, not as text */
  }
}

static void length(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  float *v = argument(ctx, argv[0], &dim);
  (void)argc;
  if (v) sqlite3_result_int64(ctx, dim);
  sqlite3_free(v);
}

static void normalize(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  double sum = 0;
  float *v = argument(ctx, argv[0], &dim);
  (void)argc;
  if (!v) return;
  for (uint32_t i = 0; i < dim; i++) sum += (double)v[i] * v[i];
  if (sum > 0)
    for (uint32_t i = 0; i < dim; i++) v[i] = (float)(v[i] / sqrt(sum));
  result_vec(ctx, v, dim);
}

/* Both arguments, of one dimension. */
static int two(sqlite3_context *ctx, sqlite3_value **argv, float **a, float **b, uint32_t *dim) {
  uint32_t other;
  *b = NULL;
  if (!(*a = argument(ctx, argv[0], dim))) return 0;
  if ((*b = argument(ctx, argv[1], &other)) && other == *dim) return 1;
  if (*b) {
    char *text = sqlite3_mprintf("the vectors have %u and %u dimensions", *dim, other);
    if (text) sqlite3_result_error(ctx, text, -1);
    else sqlite3_result_error_nomem(ctx);
    sqlite3_free(text);
  }
  sqlite3_free(*a), sqlite3_free(*b);
  return 0;
}

static void combine(sqlite3_context *ctx, sqlite3_value **argv, float sign) {
  float *a, *b;
  uint32_t dim;
  if (!two(ctx, argv, &a, &b, &dim)) return;
  for (uint32_t i = 0; i < dim; i++) a[i] += sign * b[i];
  sqlite3_free(b);
  result_vec(ctx, a, dim);
}
static void add(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, combine(ctx, argv, 1); }
static void sub(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, combine(ctx, argv, -1); }

static void slice(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  sqlite3_int64 from = sqlite3_value_int64(argv[1]), to = sqlite3_value_int64(argv[2]);
  float *v = argument(ctx, argv[0], &dim);
  (void)argc;
  if (!v) return;
  if (from < 0 || to > dim || from >= to) {
    char *text = sqlite3_mprintf("vec_slice: start and end must satisfy 0 <= start < end <= %u", dim);
    if (text) sqlite3_result_error(ctx, text, -1);
    else sqlite3_result_error_nomem(ctx);
    sqlite3_free(text), sqlite3_free(v);
    return;
  }
  memmove(v, v + from, (size_t)(to - from) * sizeof *v);
  result_vec(ctx, v, (uint32_t)(to - from));
}

static int is_zero(const float *v, uint32_t dim) {
  for (uint32_t i = 0; i < dim; i++)
    if (v[i] != 0) return 0;
  return 1;
}

static void distance(sqlite3_context *ctx, sqlite3_value **argv, ivfpq_metric metric) {
  float *a, *b;
  uint32_t dim;
  if (!two(ctx, argv, &a, &b, &dim)) return;
  if (metric != IVFPQ_COSINE || !(is_zero(a, dim) || is_zero(b, dim))) sqlite3_result_double(ctx, ivfpq_distance(metric, a, b, dim));
  sqlite3_free(a), sqlite3_free(b);
}
static void distance_l2(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, distance(ctx, argv, IVFPQ_L2); }
static void distance_cosine(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, distance(ctx, argv, IVFPQ_COSINE); }
static void distance_dot(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, distance(ctx, argv, IVFPQ_DOT); }

static void version(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, (void)argv;
  sqlite3_result_text(ctx, VECSHARD_VERSION, -1, SQLITE_STATIC);
}

static void cpu(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, (void)argv;
  sqlite3_result_text(ctx, kern_get()->name, -1, SQLITE_STATIC);
}

/* ---- vec_pack ---- */

typedef struct packing {
  sqlite3_str *vectors, *keys; /* made with the first row */
  uint32_t dim, n;
} packing;

static void append_key(sqlite3_str *s, sqlite3_value *v) {
  int type = sqlite3_value_type(v);
  char code = type == SQLITE_INTEGER ? 1 : type == SQLITE_FLOAT ? 2 : type == SQLITE_TEXT ? 3 : type == SQLITE_BLOB ? 4 : 0;
  sqlite3_int64 whole = code == 1 ? sqlite3_value_int64(v) : 0;
  double real = code == 2 ? sqlite3_value_double(v) : 0;
  const void *bytes = code == 3 ? (const void *)sqlite3_value_text(v) : code == 4 ? sqlite3_value_blob(v) : NULL;
  uint32_t n = code >= 3 ? (uint32_t)sqlite3_value_bytes(v) : 0;
  sqlite3_str_append(s, &code, 1);
  if (code == 1) sqlite3_str_append(s, (const char *)&whole, 8);
  else if (code == 2) sqlite3_str_append(s, (const char *)&real, 8);
  else if (code >= 3) {
    sqlite3_str_append(s, (const char *)&n, 4);
    if (n && bytes) sqlite3_str_append(s, bytes, (int)n);
  }
}

static void pack_step(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  packing *p = sqlite3_aggregate_context(ctx, sizeof *p);
  uint32_t dim;
  if (!p) {
    sqlite3_result_error_nomem(ctx);
    return;
  }
  float *v = argument(ctx, argv[0], &dim);
  if (!v) return; /* NULL vectors are left out, as aggregates do */
  if (!p->vectors) p->vectors = sqlite3_str_new(NULL), p->keys = argc > 1 ? sqlite3_str_new(NULL) : NULL, p->dim = dim;
  if (dim != p->dim) {
    char *text = sqlite3_mprintf("vec_pack: one vector has %u dimensions, another has %u", p->dim, dim);
    if (text) sqlite3_result_error(ctx, text, -1);
    else sqlite3_result_error_nomem(ctx);
    sqlite3_free(text);
  } else {
    sqlite3_str_append(p->vectors, (const char *)v, (int)(dim * sizeof *v));
    if (p->keys) append_key(p->keys, argv[1]);
    p->n++;
  }
  sqlite3_free(v);
}

/* No row gives NULL, which searches nothing. */
static void pack_final(sqlite3_context *ctx) {
  packing *p = sqlite3_aggregate_context(ctx, 0);
  if (!p || !p->vectors) return;
  uint32_t head[6] = {0, 1, p->dim, p->n, p->keys != NULL, 0};
  memcpy(head, "VSPK", 4);
  sqlite3_str *out = sqlite3_str_new(sqlite3_context_db_handle(ctx));
  int failed = sqlite3_str_errcode(p->vectors) || (p->keys && sqlite3_str_errcode(p->keys));
  sqlite3_str_append(out, (const char *)head, sizeof head);
  sqlite3_str_append(out, sqlite3_str_value(p->vectors), sqlite3_str_length(p->vectors));
  if (p->keys && sqlite3_str_length(p->keys)) sqlite3_str_append(out, sqlite3_str_value(p->keys), sqlite3_str_length(p->keys));
  while (sqlite3_str_length(out) % 4 != 2) {
    if (sqlite3_str_errcode(out)) break;
    sqlite3_str_append(out, "", 1);
  }
  int n = sqlite3_str_length(out), rc = sqlite3_str_errcode(out);
  char *bytes = sqlite3_str_finish(out);
  sqlite3_free(sqlite3_str_finish(p->vectors));
  if (p->keys) sqlite3_free(sqlite3_str_finish(p->keys));
  p->vectors = p->keys = NULL;
  if (failed || rc || !bytes) {
    sqlite3_free(bytes);
    if (rc == SQLITE_TOOBIG) sqlite3_result_error_toobig(ctx);
    else sqlite3_result_error_nomem(ctx);
  } else sqlite3_result_blob(ctx, bytes, n, sqlite3_free);
}

/* ---- registration ---- */

static const struct {
  const char *name;
  int n_args;
  void (*call)(sqlite3_context *, int, sqlite3_value **);
} functions[] = {
    {"vec_f32", 1, f32},
    {"vec_to_json", 1, to_json},
    {"vec_length", 1, length},
    {"vec_normalize", 1, normalize},
    {"vec_add", 2, add},
    {"vec_sub", 2, sub},
    {"vec_slice", 3, slice},
    {"vec_distance_l2", 2, distance_l2},
    {"vec_distance_cosine", 2, distance_cosine},
    {"vec_distance_dot", 2, distance_dot},
    {"vecshard_version", 0, version},
    {"vecshard_cpu", 0, cpu},
};

int vec_functions_register(sqlite3 *db) {
  int flags = SQLITE_UTF8 | SQLITE_DETERMINISTIC | SQLITE_INNOCUOUS, rc = SQLITE_OK;
  for (size_t i = 0; i < sizeof functions / sizeof *functions && !rc; i++)
    rc = sqlite3_create_function_v2(db, functions[i].name, functions[i].n_args, flags, NULL, functions[i].call, NULL, NULL, NULL);
  for (int n = 1; n <= 2 && !rc; n++)
    rc = sqlite3_create_function_v2(db, "vec_pack", n, flags, NULL, NULL, pack_step, pack_final, NULL);
  return rc;
}
