/* vec_value.h - SQL values as vectors.
 *
 * A vector is a little-endian float32 BLOB or JSON text [1,2,...]; 1 to VEC_MAX_DIM finite numbers. The text follows
 * JSON's grammar (no nan, 0x10, "+1", "01", "1.") and reads the same in every locale; too small a number becomes 0.
 *
 * Several vectors travel as the BLOB that vec_pack() makes, all fields little-endian:
 *   "VSPK" | u32 version 1 | u32 dim | u32 count | u32 flags (1: keys) | u32 reserved 0 | count x dim float32 |
 *   per key, with flag 1: u8 type (0 NULL, 1 i64, 2 f64, 3 text, 4 blob) and 8 bytes or u32 length and bytes | zeros
 * The zeros, 0 to 3 of them, make its length 2 modulo 4: a bare vector's length is 0 modulo 4, so neither is ever taken
 * for the other, even if a vector's first number happens to spell the magic. count is at least 1, every number finite,
 * and the length exactly what the header and the keys add up to; anything else is refused.
 */
#ifndef VTAB_VEC_VALUE_H
#define VTAB_VEC_VALUE_H
#include <stdint.h>

#include "../base/vs_err.h"
#include "sqlite3ext.h"

enum { VEC_MAX_DIM = 16384, VEC_SUBTYPE_F32 = 223 /* sqlite-vec's mark of a float32 vector */ };

/* The packed layout, for its writer (vec_functions.c) and its reader. */
#define VEC_PACK_MAGIC "VSPK"
enum { VEC_PACK_HEADER = 24, VEC_PACK_VERSION = 1, VEC_PACK_KEYS = 1, VEC_PACK_LENGTH_MOD_4 = 2 };
typedef enum vec_key { VEC_KEY_NULL, VEC_KEY_INT, VEC_KEY_REAL, VEC_KEY_TEXT, VEC_KEY_BLOB } vec_key;

/* *vec is sqlite3_malloc'ed, the caller's to sqlite3_free; NULL for SQL NULL and on failure. */
vs_rc vec_from_value(sqlite3_value *v, float **vec, uint32_t *dim, vs_err *err) VS_WARN_UNUSED;

/* The same without a copy where the value is a BLOB that can be read where it lies: *vec is valid as long as the value is, and as
 * *owned, which the caller frees with sqlite3_free and which is NULL where nothing was copied. */
vs_rc vec_borrow(sqlite3_value *v, const float **vec, uint32_t *dim, float **owned, vs_err *err) VS_WARN_UNUSED;

/* The float a text stands for, whatever the host's locale. */
float vec_parse_float(const char *text);

typedef struct vec_batch {
  uint32_t dim, n;
  float *vectors;        /* n x dim, owned */
  uint8_t *keys;         /* owned copy of the key bytes; NULL without keys */
  uint32_t *key_at;      /* n offsets into keys */
} vec_batch;
/* One vector (n = 1) or a packed BLOB; n = 0 for SQL NULL. On failure *out is empty. */
vs_rc vec_batch_from_value(sqlite3_value *v, vec_batch *out, vs_err *err) VS_WARN_UNUSED;
void vec_batch_key(const vec_batch *b, uint32_t i, sqlite3_context *ctx); /* the key as result; NULL without */
void vec_batch_free(vec_batch *b);

#endif
