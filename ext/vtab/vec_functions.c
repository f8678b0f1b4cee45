/* vec_functions.c - functions on vectors, named and behaving as in sqlite-vec where it has them.
 *
 *   SELECT vec_to_json(vec_normalize('[3,4]'));              -- [0.6,0.8]
 *   SELECT vec_distance_l2('[0,0]', '[3,4]');                -- 5.0; also _cosine and _dot (the negative inner product)
 *   SELECT vec_length(x'0000803f'), vec_to_json(vec_slice('[1,2,3]', 0, 2)), vec_to_json(vec_add('[1]', '[2]'));
 *   SELECT vec_pack(embedding, name) FROM queries;           -- many queries for shard_union in one BLOB
 *   SELECT vecshard_version(), vecshard_cpu();               -- 0.1.0|avx512 (also: avx2, scalar)
 *
 * NULL where a vector belongs is an error, as in sqlite-vec; vec_pack() alone leaves NULLs out, as aggregates do.
 * vec_slice counts from 0 and excludes `end`. The cosine distance to a zero vector is NULL: it has no direction.
 * Otherwise than sqlite-vec: vec_to_json writes the shortest digits that read back as the same float, not six decimals;
 * vec_normalize leaves a zero vector as it is, where sqlite-vec makes NaN; a sum that float32 cannot hold is an error.
 */
#include "vec_functions.h"

#include <math.h>
#include <stdarg.h>
#include <string.h>

#include "../ivfpq/ivfpq_format.h"
#include "../kernels/kern.h"
#include "../vecshard.h"
#include "vec_value.h"
SQLITE_EXTENSION_INIT3

/* Headers before SQLite 3.45 lack the flag, such versions ignore it; later ones may refuse an unannounced subtype. */
#ifndef SQLITE_RESULT_SUBTYPE
#define SQLITE_RESULT_SUBTYPE 0x001000000
#endif

static void fail(sqlite3_context *ctx, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fail(sqlite3_context *ctx, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  char *text = sqlite3_vmprintf(fmt, ap);
  va_end(ap);
  if (text) sqlite3_result_error(ctx, text, -1);
  else sqlite3_result_error_nomem(ctx);
  sqlite3_free(text);
}

/* The argument as a vector; NULL, with the error set, when it is none. `which` opens the message, "first vector: ". */
static float *argument(sqlite3_context *ctx, sqlite3_value *v, const char *which, uint32_t *dim) {
  vs_err err = {0};
  float *vec;
  vs_rc rc = vec_from_value(v, &vec, dim, &err);
  if (rc == VS_NOMEM) sqlite3_result_error_nomem(ctx);
  else if (rc) fail(ctx, "%s%s", which, err.text);
  else if (!vec) fail(ctx, "%sa vector must not be NULL", which);
  return vec;
}

/* Takes v. */
static void result_vec(sqlite3_context *ctx, float *v, uint32_t dim) {
  sqlite3_result_blob64(ctx, v, (sqlite3_uint64)dim * sizeof *v, sqlite3_free);
  sqlite3_result_subtype(ctx, VEC_SUBTYPE_F32);
}

static void f32(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  float *v = argument(ctx, argv[0], "", &dim);
  (void)argc;
  if (v) result_vec(ctx, v, dim);
}

static void to_json(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  float *v = argument(ctx, argv[0], "", &dim);
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
  float *v = argument(ctx, argv[0], "", &dim);
  (void)argc;
  if (v) sqlite3_result_int64(ctx, dim);
  sqlite3_free(v);
}

static void normalize(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  double sum = 0;
  float *v = argument(ctx, argv[0], "", &dim);
  (void)argc;
  if (!v) return;
  for (uint32_t i = 0; i < dim; i++) sum += (double)v[i] * v[i];
  if (sum > 0)
    for (uint32_t i = 0; i < dim; i++) v[i] = (float)(v[i] / sqrt(sum));
  result_vec(ctx, v, dim);
}

/* Both arguments, of one dimension, for the caller to free; 0, with the error set and nothing to free, otherwise. */
static int two(sqlite3_context *ctx, sqlite3_value **argv, float **a, float **b, uint32_t *dim) {
  uint32_t other;
  *b = NULL;
  if (!(*a = argument(ctx, argv[0], "first vector: ", dim))) return 0;
  if ((*b = argument(ctx, argv[1], "second vector: ", &other)) && other == *dim) return 1;
  if (*b) fail(ctx, "the vectors have %u and %u dimensions", *dim, other);
  sqlite3_free(*a), sqlite3_free(*b);
  return 0;
}

static void combine(sqlite3_context *ctx, sqlite3_value **argv, float sign) {
  float *a, *b;
  uint32_t dim;
  if (!two(ctx, argv, &a, &b, &dim)) return;
  for (uint32_t i = 0; i < dim; i++) a[i] += sign * b[i];
  sqlite3_free(b);
  if (kern_get()->all_finite_f32(a, dim)) {
    result_vec(ctx, a, dim);
    return;
  }
  sqlite3_free(a);
  fail(ctx, "an element of the result does not fit float32");
}
static void add(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, combine(ctx, argv, 1); }
static void sub(sqlite3_context *ctx, int argc, sqlite3_value **argv) { (void)argc, combine(ctx, argv, -1); }

static void slice(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  uint32_t dim;
  sqlite3_int64 from = sqlite3_value_int64(argv[1]), to = sqlite3_value_int64(argv[2]);
  float *v = argument(ctx, argv[0], "", &dim);
  (void)argc;
  if (!v) return;
  if (from < 0 || to > dim || from >= to) {
    fail(ctx, "vec_slice: start and end must satisfy 0 <= start < end <= %u; they are %lld and %lld", dim, from, to);
    sqlite3_free(v);
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
  if (metric != IVFPQ_COSINE || !(is_zero(a, dim) || is_zero(b, dim)))
    sqlite3_result_double(ctx, ivfpq_distance(metric, a, b, dim));
  sqlite3_free(a), sqlite3_free(b);
}
static void distance_l2(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, distance(ctx, argv, IVFPQ_L2);
}
static void distance_cosine(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, distance(ctx, argv, IVFPQ_COSINE);
}
static void distance_dot(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, distance(ctx, argv, IVFPQ_DOT);
}

static void version(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, (void)argv;
  sqlite3_result_text(ctx, VECSHARD_VERSION, -1, SQLITE_STATIC);
}

static void cpu(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  (void)argc, (void)argv;
  /* All that any build of ours may have, best first; kern_variant answers for this build on this machine. */
  static const char *const names[] = {"avx512", "avx2", "dotprod", "neon", "scalar"};
  const char *running = kern_get()->name, *before = " (also: ";
  sqlite3_str *s = sqlite3_str_new(sqlite3_context_db_handle(ctx));
  sqlite3_str_appendall(s, running);
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    if (!strcmp(names[i], running) || !kern_variant(names[i])) continue;
    sqlite3_str_appendf(s, "%s%s", before, names[i]);
    before = ", ";
  }
  if (*before == ',') sqlite3_str_appendall(s, ")");
  char *text = sqlite3_str_finish(s);
  if (text) sqlite3_result_text(ctx, text, -1, sqlite3_free);
  else sqlite3_result_error_nomem(ctx);
}

/* ---- vec_pack ---- */

typedef struct packing {
  sqlite3_str *packed, *keys; /* made with the first row */
  uint32_t dim, n;
} packing;

/* 0 when out of memory before s could notice. */
static int append_key(sqlite3_str *s, sqlite3_value *v) {
  static const char codes[] = {[SQLITE_INTEGER] = VEC_KEY_INT, [SQLITE_FLOAT] = VEC_KEY_REAL,
                               [SQLITE_TEXT] = VEC_KEY_TEXT,   [SQLITE_BLOB] = VEC_KEY_BLOB,
                               [SQLITE_NULL] = VEC_KEY_NULL};
  char code = codes[sqlite3_value_type(v)];
  sqlite3_int64 whole = code == VEC_KEY_INT ? sqlite3_value_int64(v) : 0;
  double real = code == VEC_KEY_REAL ? sqlite3_value_double(v) : 0;
  /* only for these two: asking a number for its bytes would turn it into text in place */
  const void *bytes = NULL;
  if (code == VEC_KEY_TEXT) bytes = sqlite3_value_text(v);
  else if (code == VEC_KEY_BLOB) bytes = sqlite3_value_blob(v);
  uint32_t n = bytes ? (uint32_t)sqlite3_value_bytes(v) : 0;
  sqlite3_str_append(s, &code, 1);
  if (code == VEC_KEY_INT) sqlite3_str_append(s, (const char *)&whole, 8);
  else if (code == VEC_KEY_REAL) sqlite3_str_append(s, (const char *)&real, 8);
  else if (code != VEC_KEY_NULL) {
    if (!bytes && (code == VEC_KEY_TEXT || sqlite3_value_bytes(v))) return 0; /* only an empty BLOB has no address */
    sqlite3_str_append(s, (const char *)&n, 4);
    if (n) sqlite3_str_append(s, bytes, (int)n);
  }
  return 1;
}

static void pack_step(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  static const char head[VEC_PACK_HEADER];
  if (sqlite3_value_type(argv[0]) == SQLITE_NULL) return; /* left out, as aggregates do */
  packing *p = sqlite3_aggregate_context(ctx, sizeof *p);
  const float *v;
  float *owned = NULL;
  uint32_t dim;
  vs_err err = {0};
  if (!p) {
    sqlite3_result_error_nomem(ctx);
    return;
  }
  vs_rc rc = vec_borrow(argv[0], &v, &dim, &owned, &err);
  if (rc == VS_NOMEM) sqlite3_result_error_nomem(ctx);
  else if (rc) fail(ctx, "%s", err.text);
  if (rc) return;
  if (!p->packed) {
    p->packed = sqlite3_str_new(sqlite3_context_db_handle(ctx)), p->keys = argc > 1 ? sqlite3_str_new(NULL) : NULL, p->dim = dim;
    sqlite3_str_append(p->packed, head, sizeof head); /* filled in at the end */
  }
  if (dim != p->dim) {
    fail(ctx, "vec_pack: one vector has %u dimensions, another has %u", p->dim, dim);
  } else {
    sqlite3_str_append(p->packed, (const char *)v, (int)(dim * sizeof *v));
    if (p->keys && !append_key(p->keys, argv[1])) sqlite3_result_error_nomem(ctx);
    p->n++;
  }
  sqlite3_free(owned);
}

static void append_all(sqlite3_str *to, sqlite3_str *from) {
  if (from && sqlite3_str_length(from)) sqlite3_str_append(to, sqlite3_str_value(from), sqlite3_str_length(from));
}

/* No row gives NULL, which searches nothing. Also called, for the sake of the strings, after an error. Vectors lie where they are to
 * be from the start: many megabytes are not copied once more. */
static void pack_final(sqlite3_context *ctx) {
  packing *p = sqlite3_aggregate_context(ctx, 0);
  if (!p || !p->packed) return;
  uint32_t head[VEC_PACK_HEADER / 4] = {0, VEC_PACK_VERSION, p->dim, p->n, p->keys ? VEC_PACK_KEYS : 0, 0};
  memcpy(head, VEC_PACK_MAGIC, 4);
  int rc = p->keys ? sqlite3_str_errcode(p->keys) : SQLITE_OK;
  append_all(p->packed, p->keys);
  sqlite3_str_append(p->packed, "\0\0\0", (VEC_PACK_LENGTH_MOD_4 - sqlite3_str_length(p->packed) % 4 + 4) % 4);
  if (!rc) rc = sqlite3_str_errcode(p->packed);
  int n = sqlite3_str_length(p->packed);
  char *bytes = sqlite3_str_finish(p->packed);
  sqlite3_free(sqlite3_str_finish(p->keys));
  p->packed = p->keys = NULL;
  if (!rc && bytes) {
    memcpy(bytes, head, sizeof head);
    sqlite3_result_blob(ctx, bytes, n, sqlite3_free);
    return;
  }
  sqlite3_free(bytes);
  if (rc == SQLITE_TOOBIG) sqlite3_result_error_toobig(ctx);
  else sqlite3_result_error_nomem(ctx);
}

/* ---- registration ---- */

static const struct {
  const char *name;
  int n_args, more_flags;
  void (*call)(sqlite3_context *, int, sqlite3_value **); /* NULL: an aggregate */
  void (*step)(sqlite3_context *, int, sqlite3_value **);
  void (*final)(sqlite3_context *);
} functions[] = {
    {"vec_f32", 1, SQLITE_RESULT_SUBTYPE, f32, NULL, NULL},
    {"vec_to_json", 1, SQLITE_RESULT_SUBTYPE, to_json, NULL, NULL},
    {"vec_length", 1, 0, length, NULL, NULL},
    {"vec_normalize", 1, SQLITE_RESULT_SUBTYPE, normalize, NULL, NULL},
    {"vec_add", 2, SQLITE_RESULT_SUBTYPE, add, NULL, NULL},
    {"vec_sub", 2, SQLITE_RESULT_SUBTYPE, sub, NULL, NULL},
    {"vec_slice", 3, SQLITE_RESULT_SUBTYPE, slice, NULL, NULL},
    {"vec_distance_l2", 2, 0, distance_l2, NULL, NULL},
    {"vec_distance_cosine", 2, 0, distance_cosine, NULL, NULL},
    {"vec_distance_dot", 2, 0, distance_dot, NULL, NULL},
    {"vec_pack", 1, 0, NULL, pack_step, pack_final},
    {"vec_pack", 2, 0, NULL, pack_step, pack_final},
    {"vecshard_version", 0, 0, version, NULL, NULL},
    {"vecshard_cpu", 0, 0, cpu, NULL, NULL},
};

int vec_functions_register(sqlite3 *db) {
  enum { FLAGS = SQLITE_UTF8 | SQLITE_DETERMINISTIC | SQLITE_INNOCUOUS };
  int rc = SQLITE_OK;
  for (size_t i = 0; i < sizeof functions / sizeof *functions && !rc; i++)
    rc = sqlite3_create_function_v2(db, functions[i].name, functions[i].n_args, FLAGS | functions[i].more_flags, NULL,
                                    functions[i].call, functions[i].step, functions[i].final, NULL);
  return rc;
}
