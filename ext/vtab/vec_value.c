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

/* The first of n numbers that is NaN or Inf; n when all are finite. */
static size_t first_not_finite(const float *v, size_t n) {
  if (kern_get()->all_finite_f32(v, n)) return n;
  for (size_t i = 0; i < n; i++)
    if (!isfinite(v[i])) return i;
  return n;
}

/* By magic and length both: see vec_value.h. */
static int is_packed(const void *p, size_t n) {
  return n >= 4 && n % 4 == VEC_PACK_LENGTH_MOD_4 && !memcmp(p, VEC_PACK_MAGIC, 4);
}

static vs_rc from_blob(sqlite3_value *v, const float **vec, uint32_t *dim, float **owned, int copy, vs_err *err) {
  const void *p = sqlite3_value_blob(v);
  size_t n = (size_t)sqlite3_value_bytes(v);
  if (p && is_packed(p, n))
    return vs_fail(err, VS_INVALID, "one vector is wanted here, this BLOB is a batch from vec_pack()");
  if (n == 0 || n % 4)
    return vs_fail(err, VS_INVALID, "a vector BLOB has 4 bytes per element; this one has %zu bytes", n);
  if (n / 4 > VEC_MAX_DIM)
    return vs_fail(err, VS_INVALID, "a vector has at most %d elements, this one has %zu", VEC_MAX_DIM, n / 4);
  if (!p) return vs_nomem(err);
  if (copy || (uintptr_t)p % sizeof(float)) {
    if (!(*owned = sqlite3_malloc64(n))) return vs_nomem(err);
    p = memcpy(*owned, p, n);
  }
  size_t bad = first_not_finite(p, n / 4);
  if (bad < n / 4) {
    sqlite3_free(*owned), *owned = NULL;
    return vs_fail(err, VS_INVALID, "the vector has NaN or Inf at element %zu", bad);
  }
  *vec = p, *dim = (uint32_t)(n / 4);
  return VS_OK;
}

float vec_parse_float(const char *text) {
  pthread_once(&locale_once, make_locale);
  return c_locale ? (float)strtod_l(text, NULL, c_locale) : 0;
}

static const char *skip_space(const char *p) { return p + strspn(p, " \t\r\n"); }

/* Not isdigit(): that one may depend on the locale. */
static int is_digit(char c) { return c >= '0' && c <= '9'; }
static const char *skip_digits(const char *p) {
  while (is_digit(*p)) p++;
  return p;
}

/* The end of the JSON number at p, NULL when there is none: strtod alone would take nan, inf, 0x10, "+1", "1.". */
static const char *number_end(const char *p) {
  if (*p == '-') p++;
  if (!is_digit(*p)) return NULL;
  p = *p == '0' ? p + 1 : skip_digits(p); /* no digit may follow a leading 0 */
  if (*p == '.') {
    if (!is_digit(*++p)) return NULL;
    p = skip_digits(p);
  }
  if (*p == 'e' || *p == 'E') {
    p++;
    if (*p == '+' || *p == '-') p++;
    if (!is_digit(*p)) return NULL;
    p = skip_digits(p);
  }
  return p;
}

/* text ends with a NUL, at which every test below stops. Characters are counted from 0; up to the first wrong one all
 * are ASCII, so that bytes are characters. */
static vs_rc parse_numbers(const char *text, float *out, size_t room, uint32_t *n, vs_err *err) {
  const char *p = skip_space(text);
  uint32_t count = 0;
  if (*p != '[') return vs_fail(err, VS_INVALID, "a vector as text is a JSON array of numbers, [1,2,...]");
  p = skip_space(p + 1);
  if (*p == ']') return vs_fail(err, VS_INVALID, "the vector is empty");
  for (;; p = skip_space(p + 1)) {
    const char *end = number_end(p);
    if (!end) return vs_fail(err, VS_INVALID, "vector text: a number is missing at character %td", p - text);
    if (count == room) return vs_fail(err, VS_INVALID, "a vector has at most %d elements", VEC_MAX_DIM);
    float f = (float)strtod_l(p, NULL, c_locale);
    if (!isfinite(f)) return vs_fail(err, VS_INVALID, "vector text: element %u does not fit float32", count);
    out[count++] = f;
    p = skip_space(end);
    if (*p != ',') break;
  }
  if (*p != ']') return vs_fail(err, VS_INVALID, "vector text: \",\" or \"]\" is missing at character %td", p - text);
  p = skip_space(p + 1);
  if (*p) return vs_fail(err, VS_INVALID, "vector text: unknown characters behind \"]\" at character %td", p - text);
  *n = count;
  return VS_OK;
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

static vs_rc from_value(sqlite3_value *v, const float **vec, uint32_t *dim, float **owned, int copy, vs_err *err) {
  vs_rc rc;
  *vec = *owned = NULL, *dim = 0;
  switch (sqlite3_value_type(v)) {
    case SQLITE_NULL: return VS_OK;
    case SQLITE_BLOB: return from_blob(v, vec, dim, owned, copy, err);
    case SQLITE_TEXT:
      rc = from_text(v, owned, dim, err);
      *vec = *owned;
      return rc;
    default: return vs_fail(err, VS_INVALID, "a vector is a float32 BLOB or JSON text, not a number");
  }
}

vs_rc vec_from_value(sqlite3_value *v, float **vec, uint32_t *dim, vs_err *err) {
  const float *same;
  return from_value(v, &same, dim, vec, 1, err);
}

vs_rc vec_borrow(sqlite3_value *v, const float **vec, uint32_t *dim, float **owned, vs_err *err) {
  return from_value(v, vec, dim, owned, 0, err);
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
    size_t left = (size_t)(end - p), size = type == VEC_KEY_NULL ? 0 : 8;
    if (type > VEC_KEY_BLOB) return NULL;
    if (type == VEC_KEY_TEXT || type == VEC_KEY_BLOB) {
      if (left < 4) return NULL;
      size = 4 + (size_t)u32_at(p);
    }
    if (size > left) return NULL;
    p += size;
  }
  return p;
}

/* Whether [p, end) is what vec_pack() puts behind the last key. */
static int is_padding(const uint8_t *p, const uint8_t *end) {
  if (end - p > 3) return 0;
  while (p < end)
    if (*p++) return 0;
  return 1;
}

/* The caller frees *out on failure. */
static vs_rc unpack(const uint8_t *p, size_t n, vec_batch *out, vs_err *err) {
  const char *damaged = "this BLOB is neither a vector nor what vec_pack() makes";
  if (n < VEC_PACK_HEADER + VEC_PACK_LENGTH_MOD_4) return vs_fail(err, VS_INVALID, "%s: its header is cut", damaged);
  uint32_t version = u32_at(p + 4), dim = u32_at(p + 8), count = u32_at(p + 12), flags = u32_at(p + 16);
  if (version != VEC_PACK_VERSION)
    return vs_fail(err, VS_UNSUPPORTED, "a BLOB packed by version %u of vec_pack(); this one reads version %d", version,
                   VEC_PACK_VERSION);
  if ((flags & ~(uint32_t)VEC_PACK_KEYS) || u32_at(p + 20))
    return vs_fail(err, VS_INVALID, "%s: unknown flags", damaged);
  if (dim < 1 || dim > VEC_MAX_DIM || count < 1)
    return vs_fail(err, VS_INVALID, "%s: %u vectors of %u dimensions", damaged, count, dim);
  uint64_t bytes = (uint64_t)dim * count * 4; /* below 2^48, since dim is in range */
  if (bytes > n - VEC_PACK_HEADER)
    return vs_fail(err, VS_INVALID, "%s: %u vectors of %u dimensions do not fit its %zu bytes", damaged, count, dim, n);
  const uint8_t *keys = p + VEC_PACK_HEADER + bytes, *end = p + n, *behind = keys;
  if (flags & VEC_PACK_KEYS) {
    /* before the allocation: as every key has a byte, the count cannot ask for more than the BLOB's own size */
    if (count > (size_t)(end - keys)) return vs_fail(err, VS_INVALID, "%s: keys are missing", damaged);
    if (!(out->key_at = sqlite3_malloc64((uint64_t)count * sizeof *out->key_at))) return vs_nomem(err);
    behind = walk_keys(keys, end, count, out->key_at);
    if (!behind) return vs_fail(err, VS_INVALID, "%s: a key is cut", damaged);
    if (!(out->keys = sqlite3_malloc64((uint64_t)(behind - keys)))) return vs_nomem(err);
    memcpy(out->keys, keys, (size_t)(behind - keys));
  }
  if (!is_padding(behind, end)) return vs_fail(err, VS_INVALID, "%s: something follows its last byte", damaged);
  if (!(out->vectors = sqlite3_malloc64(bytes))) return vs_nomem(err);
  memcpy(out->vectors, p + VEC_PACK_HEADER, bytes);
  size_t bad = first_not_finite(out->vectors, bytes / 4);
  if (bad < bytes / 4)
    return vs_fail(err, VS_INVALID, "a packed BLOB has NaN or Inf in vector %zu (from 0), element %zu", bad / dim,
                   bad % dim);
  out->dim = dim, out->n = count;
  return VS_OK;
}

vs_rc vec_batch_from_value(sqlite3_value *v, vec_batch *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  if (sqlite3_value_type(v) == SQLITE_BLOB) {
    const void *p = sqlite3_value_blob(v); /* NULL when empty, or when a zeroblob() could not be made real */
    size_t n = (size_t)sqlite3_value_bytes(v);
    if (p && is_packed(p, n)) {
      vs_rc rc = unpack(p, n, out, err);
      if (rc) vec_batch_free(out);
      return rc;
    }
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
    case VEC_KEY_INT:
      memcpy(&whole, p, 8);
      sqlite3_result_int64(ctx, whole);
      break;
    case VEC_KEY_REAL:
      memcpy(&real, p, 8);
      sqlite3_result_double(ctx, real);
      break;
    case VEC_KEY_TEXT: sqlite3_result_text64(ctx, (const char *)p + 4, u32_at(p), SQLITE_TRANSIENT, SQLITE_UTF8); break;
    case VEC_KEY_BLOB: sqlite3_result_blob64(ctx, p + 4, u32_at(p), SQLITE_TRANSIENT); break;
    default: break; /* VEC_KEY_NULL */
  }
}

void vec_batch_free(vec_batch *b) {
  sqlite3_free(b->vectors), sqlite3_free(b->keys), sqlite3_free(b->key_at);
  memset(b, 0, sizeof *b);
}
