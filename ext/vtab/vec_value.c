/* vec_value.c - see vec_value.h. */
#include "vec_value.h"

#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
SQLITE_EXTENSION_INIT3

/* Numbers have a point whatever the host's locale says. */
static locale_t c_locale;
static pthread_once_t locale_once = PTHREAD_ONCE_INIT;
static void make_locale(void) { c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0); }

static vs_rc check_finite(const float *v, size_t n, vs_err *err) {
  if (kern_get()->all_finite_f32(v, n)) return VS_OK;
  for (size_t i = 0; i < n; i++)
    if (!isfinite(v[i])) return vs_fail(err, VS_INVALID, "the vector has NaN or Inf at element %zu", i);
  return VS_OK;
}

static vs_rc from_blob(sqlite3_value *v, float **vec, uint32_t *dim, vs_err *err) {
  const void *p = sqlite3_value_blob(v);
  size_t n = (size_t)sqlite3_value_bytes(v);
  if (n == 0 || n % 4) return vs_fail(err, VS_INVALID, "a vector BLOB has 4 bytes per element; this one has %zu bytes", n);
  if (n / 4 > VEC_MAX_DIM) return vs_fail(err, VS_INVALID, "a vector has at most %d elements, this one has %zu", VEC_MAX_DIM, n / 4);
  float *copy = sqlite3_malloc64(n);
  if (!copy || !p) {
    sqlite3_free(copy);
    return vs_nomem(err);
  }
  memcpy(copy, p, n);
  vs_rc rc = check_finite(copy, n / 4, err);
  if (rc) sqlite3_free(copy);
  else *vec = copy, *dim = (uint32_t)(n / 4);
  return rc;
}

float vec_parse_float(const char *text) {
  pthread_once(&locale_once, make_locale);
  return c_locale ? (float)strtod_l(text, NULL, c_locale) : 0;
}

static const char *skip_space(const char *p) { return p + strspn(p, " \t\r\n"); }

/* A JSON number only: strtod alone would take nan, inf, hex and a leading plus. */
static int starts_number(const char *p) {
  if (*p == '-') p++;
  return *p >= '0' && *p <= '9' && !(p[0] == '0' && (p[1] == 'x' || p[1] == 'X'));
}

static vs_rc parse_numbers(const char *text, float *out, size_t room, uint32_t *n, vs_err *err) {
  const char *p = skip_space(text);
  *n = 0;
  if (*p != '[') return vs_fail(err, VS_INVALID, "a vector as text is a JSON array of numbers, [1,2,...]");
  p = skip_space(p + 1);
  for (;; p = skip_space(p + 1)) {
    char *end;
    if (!starts_number(p)) return vs_fail(err, VS_INVALID, "vector text: a number is missing at character %td", p - text);
    if (*n == room) return vs_fail(err, VS_INVALID, "a vector has at most %d elements", VEC_MAX_DIM);
    double d = strtod_l(p, &end, c_locale);
    float f = (float)d;
    if (!isfinite(f)) return vs_fail(err, VS_INVALID, "vector text: element %u does not fit float32", *n);
    out[(*n)++] = f;
    p = skip_space(end);
    if (*p != ',') break;
  }
  if (*p != ']') return vs_fail(err, VS_INVALID, "vector text: \",\" or \"]\" is missing at character %td", p - text);
  p = skip_space(p + 1);
  return *p ? vs_fail(err, VS_INVALID, "vector text: unknown characters behind \"]\" at character %td", p - text) : VS_OK;
}

static vs_rc from_text(sqlite3_value *v, float **vec, uint32_t *dim, vs_err *err) {
  const char *text = (const char *)sqlite3_value_text(v);
  if (!text) return vs_nomem(err);
  size_t length = (size_t)sqlite3_value_bytes(v), room = length / 2 + 1;
  if (strlen(text) != length) return vs_fail(err, VS_INVALID, "vector text has a NUL inside");
  if (room > VEC_MAX_DIM) room = VEC_MAX_DIM;
  pthread_once(&locale_once, make_locale);
  float *out = sqlite3_malloc64(room * sizeof *out);
  if (!out || !c_locale) {
    sqlite3_free(out);
    return vs_nomem(err);
  }
  vs_rc rc = parse_numbers(text, out, room, dim, err);
  if (rc) sqlite3_free(out);
  else *vec = out;
  return rc;
}

vs_rc vec_from_value(sqlite3_value *v, float **vec, uint32_t *dim, vs_err *err) {
  *vec = NULL, *dim = 0;
  switch (sqlite3_value_type(v)) {
    case SQLITE_NULL: return VS_OK;
    case SQLITE_BLOB: return from_blob(v, vec, dim, err);
    case SQLITE_TEXT: return from_text(v, vec, dim, err);
    default: return vs_fail(err, VS_INVALID, "a vector is a float32 BLOB or JSON text, not a number");
  }
}

/* ---- batches ---- */

static uint32_t u32_at(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

/* Walks the keys, noting where each starts; NULL when they run over the end. */
static const uint8_t *walk_keys(const uint8_t *p, const uint8_t *end, uint32_t n, uint32_t *at) {
  const uint8_t *start = p;
  for (uint32_t i = 0; i < n; i++) {
    if (p == end) return NULL;
    at[i] = (uint32_t)(p - start);
    int type = *p++;
    size_t left = (size_t)(end - p), size = type == 0 ? 0 : 8;
    if (type > 4) return NULL;
    if (type >= 3) {
      if (left < 4) return NULL;
      size = 4 + (size_t)u32_at(p);
    }
    if (size > left) return NULL;
    p += size;
  }
  return p;
}

static vs_rc unpack(const uint8_t *p, size_t n, vec_batch *out, vs_err *err) {
  const char *damaged = "this BLOB is neither a vector nor what vec_pack() makes";
  if (n < 26) return vs_fail(err, VS_INVALID, "%s", damaged);
  uint32_t dim = u32_at(p + 8), count = u32_at(p + 12), flags = u32_at(p + 16);
  uint64_t bytes = (uint64_t)dim * count * 4;
  if (u32_at(p + 4) != 1 || flags > 1 || u32_at(p + 20) || dim < 1 || dim > VEC_MAX_DIM || bytes > n - 24)
    return vs_fail(err, VS_INVALID, "%s", damaged);
  const uint8_t *keys = p + 24 + bytes, *end = p + n, *behind = keys;
  out->vectors = sqlite3_malloc64(bytes + 4);
  out->key_at = sqlite3_malloc64((uint64_t)count * 4 + 4);
  if (!out->vectors || !out->key_at) return vs_nomem(err);
  memcpy(out->vectors, p + 24, bytes);
  if (flags) {
    behind = walk_keys(keys, end, count, out->key_at);
    if (!behind) return vs_fail(err, VS_INVALID, "%s", damaged);
    if (!(out->keys = sqlite3_malloc64((uint64_t)(behind - keys) + 1))) return vs_nomem(err);
    memcpy(out->keys, keys, (size_t)(behind - keys));
  }
  if (end - behind > 3) return vs_fail(err, VS_INVALID, "%s", damaged);
  out->dim = dim, out->n = count;
  return check_finite(out->vectors, (size_t)dim * count, err);
}

vs_rc vec_batch_from_value(sqlite3_value *v, vec_batch *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  size_t n = sqlite3_value_type(v) == SQLITE_BLOB ? (size_t)sqlite3_value_bytes(v) : 0;
  if (n >= 4 && n % 4 == 2 && !memcmp(sqlite3_value_blob(v), "VSPK", 4)) {
    vs_rc rc = unpack(sqlite3_value_blob(v), n, out, err);
    if (rc) vec_batch_free(out);
    return rc;
  }
  vs_rc rc = vec_from_value(v, &out->vectors, &out->dim, err);
  out->n = out->vectors != NULL;
  return rc;
}

void vec_batch_key(const vec_batch *b, uint32_t i, sqlite3_context *ctx) {
  if (!b->keys || i >= b->n) return;
  const uint8_t *p = b->keys + b->key_at[i];
  sqlite3_int64 whole;
  double real;
  switch (*p++) {
    case 1:
      memcpy(&whole, p, 8);
      sqlite3_result_int64(ctx, whole);
      break;
    case 2:
      memcpy(&real, p, 8);
      sqlite3_result_double(ctx, real);
      break;
    case 3: sqlite3_result_text64(ctx, (const char *)p + 4, u32_at(p), SQLITE_TRANSIENT, SQLITE_UTF8); break;
    case 4: sqlite3_result_blob64(ctx, p + 4, u32_at(p), SQLITE_TRANSIENT); break;
    default: break;
  }
}

void vec_batch_free(vec_batch *b) {
  sqlite3_free(b->vectors), sqlite3_free(b->keys), sqlite3_free(b->key_at);
  memset(b, 0, sizeof *b);
}
