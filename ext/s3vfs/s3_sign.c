/* s3_sign.c - see s3_sign.h.
 *
 * In stages, each a function: the canonical request (method, path, sorted query, sorted headers, their names, hash of the
 * body), the string to sign (its hash with date and scope), the key (four HMACs from the secret), the signature. What held
 * key material is wiped. SHA-256 and HMAC are libcrypto's; they can fail only for want of memory, and that is what a
 * failure is reported as.
 *
 * The query is sorted but not re-encoded: whoever writes it uses s3_encode, which is the form that the store computes.
 */
#include "s3_sign.h"

#include <limits.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/sha.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { HASH_BYTES = 32, DATE_CHARS = 16, DAY_CHARS = 8 };

/* ---- text that grows; once memory lacked, adding does nothing and failed stays set ---- */

typedef struct text {
  char *p; /* NUL terminated when not NULL */
  size_t n, room;
  int failed;
} text;

static void add(text *t, const char *s, size_t n) {
  if (t->failed) return;
  if (!t->p || n >= t->room - t->n) {
    const size_t room = (t->n + n + 64) * 2; /* of strings in memory: cannot wrap */
    char *p = realloc(t->p, room);
    if (!p) {
      t->failed = 1;
      return;
    }
    t->p = p, t->room = room;
  }
  if (n) memcpy(t->p + t->n, s, n);
  t->p[t->n += n] = 0;
}
static void add_str(text *t, const char *s) { add(t, s, strlen(s)); }

/* ASCII only: tolower follows the host's locale, and in some of them 'I' has no 'i'. */
static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c; }
static void add_lower(text *t, const char *s) {
  for (; *s; s++) {
    const char c = lower(*s);
    add(t, &c, 1);
  }
}
static int compare_lower(const char *a, const char *b) {
  while (*a && lower(*a) == lower(*b)) a++, b++;
  return (unsigned char)lower(*a) - (unsigned char)lower(*b);
}

/* ---- canonical request ---- */

typedef struct parameter { const char *name, *value; size_t name_chars, value_chars; } parameter;

static int compare_slices(const char *a, size_t a_chars, const char *b, size_t b_chars) {
  const int c = memcmp(a, b, a_chars < b_chars ? a_chars : b_chars);
  return c ? c : (a_chars > b_chars) - (a_chars < b_chars);
}
/* By name, then by value. Not as whole "name=value" texts: '-' sorts before '=', and "a-b=1" would come before "a=1". */
static int compare_parameters(const void *a, const void *b) {
  const parameter *x = a, *y = b;
  const int c = compare_slices(x->name, x->name_chars, y->name, y->name_chars);
  return c ? c : compare_slices(x->value, x->value_chars, y->value, y->value_chars);
}

/* Cuts a query at '&'; a parameter without '=' has an empty value, an empty one is left out. Returns how many. */
static size_t split_query(const char *query, parameter *out) {
  size_t count = 0;
  while (*query) {
    const size_t chars = strcspn(query, "&");
    const char *equals = memchr(query, '=', chars);
    const size_t name_chars = equals ? (size_t)(equals - query) : chars;
    if (chars)
      out[count++] = (parameter){query, equals ? equals + 1 : query + chars, name_chars, equals ? chars - name_chars - 1 : 0};
    query += chars + (query[chars] == '&');
  }
  return count;
}

static void add_query(text *t, const char *query) {
  size_t most = 1;
  for (const char *p = query; *p; p++) most += *p == '&';
  parameter *list = calloc(most, sizeof *list);
  if (!list) {
    t->failed = 1;
    return;
  }
  const size_t count = split_query(query, list);
  qsort(list, count, sizeof *list, compare_parameters);
  for (size_t i = 0; i < count; i++) {
    if (i) add(t, "&", 1);
    add(t, list[i].name, list[i].name_chars);
    add(t, "=", 1);
    add(t, list[i].value, list[i].value_chars);
  }
  free(list);
}

static int is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

/* Without blanks at the ends; runs of them inside (a value may go over several lines) become one space. */
static void add_header_value(text *t, const char *value) {
  int any = 0;
  while (*value) {
    while (is_blank(*value)) value++;
    const char *word = value;
    while (*value && !is_blank(*value)) value++;
    if (value == word) return;
    if (any) add(t, " ", 1);
    add(t, word, (size_t)(value - word));
    any = 1;
  }
}

/* By name; headers of one name keep their order: all are elements of the caller's array. */
static int compare_headers(const void *a, const void *b) {
  const s3_header *x = *(const s3_header *const *)a, *y = *(const s3_header *const *)b;
  const int c = compare_lower(x->name, y->name);
  return c ? c : (x > y) - (x < y);
}

/* "name:value\n" lines, and the names joined with ';'. Headers of one name become one line, values joined with ','. */
static void add_headers(const s3_sign_input *in, text *lines, text *names) {
  const s3_header **sorted = calloc(in->n_headers + 1, sizeof *sorted);
  if (!sorted) {
    lines->failed = 1;
    return;
  }
  for (size_t i = 0; i < in->n_headers; i++) sorted[i] = &in->headers[i];
  qsort(sorted, in->n_headers, sizeof *sorted, compare_headers);
  for (size_t i = 0; i < in->n_headers; i++) {
    const int again = i && !compare_lower(sorted[i - 1]->name, sorted[i]->name);
    if (again) {
      add(lines, ",", 1);
    } else {
      if (i) add(lines, "\n", 1), add(names, ";", 1);
      add_lower(names, sorted[i]->name);
      add_lower(lines, sorted[i]->name);
      add(lines, ":", 1);
    }
    add_header_value(lines, sorted[i]->value);
  }
  add(lines, "\n", 1);
  free(sorted);
}

/* ---- stages ---- */

typedef struct stages {
  text canonical; /* the canonical request */
  text names;     /* of the signed headers, "host;x-amz-date" */
  text to_sign;
} stages;

static void stages_reset(stages *s) {
  free(s->canonical.p), free(s->names.p), free(s->to_sign.p);
  memset(s, 0, sizeof *s);
}

static int is_date(const char *date) {
  static const char form[] = "dddddddd" "T" "dddddd" "Z";
  if (strlen(date) != DATE_CHARS) return 0;
  for (int i = 0; i < DATE_CHARS; i++)
    if (form[i] == 'd' ? date[i] < '0' || date[i] > '9' : date[i] != form[i]) return 0;
  return 1;
}

static vs_rc check_input(const s3_sign_input *in, vs_err *err) {
  if (!in || !in->method || !in->path || !in->query || (in->n_headers && !in->headers) || !in->payload_hash || !in->date ||
      !in->region || !in->service || !in->access_key || !in->secret_key)
    return vs_fail(err, VS_INVALID, "a request to sign lacks a part");
  for (size_t i = 0; i < in->n_headers; i++)
    if (!in->headers[i].name || !in->headers[i].value) return vs_fail(err, VS_INVALID, "a header to sign lacks name or value");
  if (!is_date(in->date)) return vs_fail(err, VS_INVALID, "a date to sign has the form YYYYMMDDTHHMMSSZ");
  return in->payload_hash[0] ? VS_OK : vs_nomem(err); /* what s3_sha256_hex leaves without memory */
}

static void make_canonical(const s3_sign_input *in, stages *s) {
  text *t = &s->canonical;
  add_str(t, in->method);
  add(t, "\n", 1);
  add_str(t, in->path);
  add(t, "\n", 1);
  add_query(t, in->query);
  add(t, "\n", 1);
  add_headers(in, t, &s->names);
  add(t, "\n", 1);
  add(t, s->names.p, s->names.n);
  add(t, "\n", 1);
  add_str(t, in->payload_hash);
}

static void make_string_to_sign(const s3_sign_input *in, stages *s) {
  char hash[65];
  text *t = &s->to_sign;
  s3_sha256_hex(s->canonical.p, s->canonical.n, hash);
  if (!hash[0]) t->failed = 1;
  add_str(t, "AWS4-HMAC-SHA256\n");
  add(t, in->date, DATE_CHARS);
  add(t, "\n", 1);
  add(t, in->date, DAY_CHARS);
  add(t, "/", 1);
  add_str(t, in->region);
  add(t, "/", 1);
  add_str(t, in->service);
  add_str(t, "/aws4_request\n");
  add_str(t, hash);
}

static vs_rc make_stages(const s3_sign_input *in, stages *s, vs_err *err) {
  vs_rc rc = check_input(in, err);
  if (rc) return rc;
  make_canonical(in, s);
  if (!s->canonical.failed && !s->names.failed) make_string_to_sign(in, s);
  return s->canonical.failed || s->names.failed || s->to_sign.failed ? vs_nomem(err) : VS_OK;
}

/* ---- signature ---- */

static void to_hex(const uint8_t *bytes, char out[65]) {
  static const char digits[] = "0123456789abcdef";
  for (int i = 0; i < HASH_BYTES; i++) out[2 * i] = digits[bytes[i] >> 4], out[2 * i + 1] = digits[bytes[i] & 15];
  out[2 * HASH_BYTES] = 0;
}

static int hmac(const void *key, size_t key_bytes, const char *data, size_t n, uint8_t out[HASH_BYTES]) {
  unsigned int out_bytes = HASH_BYTES;
  return key_bytes <= INT_MAX && HMAC(EVP_sha256(), key, (int)key_bytes, (const unsigned char *)data, n, out, &out_bytes) != NULL;
}

/* "AWS4" + secret, then day, region, service, "aws4_request", each the data under the key made before. */
static int make_key(const s3_sign_input *in, uint8_t key[HASH_BYTES]) {
  const size_t n = strlen(in->secret_key) + 4;
  uint8_t day[HASH_BYTES], region[HASH_BYTES], service[HASH_BYTES];
  char *first = malloc(n + 1);
  if (!first) return 0;
  memcpy(first, "AWS4", 4);
  memcpy(first + 4, in->secret_key, n - 4 + 1);
  const int good = hmac(first, n, in->date, DAY_CHARS, day) && hmac(day, HASH_BYTES, in->region, strlen(in->region), region) &&
                   hmac(region, HASH_BYTES, in->service, strlen(in->service), service) &&
                   hmac(service, HASH_BYTES, "aws4_request", 12, key);
  OPENSSL_cleanse(first, n);
  OPENSSL_cleanse(day, sizeof day), OPENSSL_cleanse(region, sizeof region), OPENSSL_cleanse(service, sizeof service);
  free(first);
  return good;
}

static int make_signature(const s3_sign_input *in, const stages *s, char out[65]) {
  uint8_t key[HASH_BYTES], signature[HASH_BYTES];
  const int good = make_key(in, key) && hmac(key, sizeof key, s->to_sign.p, s->to_sign.n, signature);
  if (good) to_hex(signature, out);
  OPENSSL_cleanse(key, sizeof key);
  return good;
}

vs_rc s3_sign(const s3_sign_input *in, char **authorization, vs_err *err) {
  stages s = {0};
  char signature[65];
  *authorization = NULL;
  vs_rc rc = make_stages(in, &s, err);
  if (!rc && (!make_signature(in, &s, signature) ||
              asprintf(authorization, "AWS4-HMAC-SHA256 Credential=%s/%.*s/%s/%s/aws4_request, SignedHeaders=%s, Signature=%s",
                       in->access_key, DAY_CHARS, in->date, in->region, in->service, s.names.p ? s.names.p : "", signature) < 0)) {
    *authorization = NULL; /* what asprintf leaves there is not defined */
    rc = vs_nomem(err);
  }
  stages_reset(&s);
  return rc;
}

vs_rc s3_sign_explain(const s3_sign_input *in, char **canonical_request, char **string_to_sign, vs_err *err) {
  stages s = {0};
  if (canonical_request) *canonical_request = NULL;
  if (string_to_sign) *string_to_sign = NULL;
  vs_rc rc = make_stages(in, &s, err);
  if (!rc && canonical_request) *canonical_request = s.canonical.p, s.canonical.p = NULL;
  if (!rc && string_to_sign) *string_to_sign = s.to_sign.p, s.to_sign.p = NULL;
  stages_reset(&s);
  return rc;
}

/* ---- dates and hashes ---- */

void s3_sign_date(int64_t unix_seconds, char out[17]) {
  const int64_t last = 253402300799; /* the end of 9999: the year has four digits */
  const time_t t = (time_t)(unix_seconds < 0 ? 0 : unix_seconds > last ? last : unix_seconds);
  struct tm tm;
  if (!gmtime_r(&t, &tm) || strftime(out, DATE_CHARS + 1, "%Y%m%dT%H%M%SZ", &tm) != DATE_CHARS) out[0] = 0;
}

/* Leaves "" when libcrypto has no memory: s3_sign then says so. */
void s3_sha256_hex(const void *p, size_t n, char out[65]) {
  uint8_t hash[HASH_BYTES];
  if (SHA256(n ? p : (const void *)"", n, hash)) to_hex(hash, out);
  else out[0] = 0;
}

/* ---- percent encoding ---- */

static int is_unreserved(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_' || c == '~';
}

char *s3_encode(const char *plain, int keep_slash) {
  static const char digits[] = "0123456789ABCDEF"; /* upper case: the form that is signed */
  const size_t n = strlen(plain);
  if (n > (SIZE_MAX - 1) / 3) return NULL;
  char *out = malloc(3 * n + 1), *to = out;
  if (!out) return NULL;
  for (size_t i = 0; i < n; i++) {
    const unsigned char c = (unsigned char)plain[i];
    if (is_unreserved(plain[i]) || (keep_slash && c == '/')) *to++ = plain[i];
    else *to++ = '%', *to++ = digits[c >> 4], *to++ = digits[c & 15];
  }
  *to = 0;
  return out;
}

static int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

static vs_rc decode_into(const char *encoded, size_t n, char *to, vs_err *err) {
  for (size_t i = 0; i < n; i++) {
    int c = (unsigned char)encoded[i];
    if (c == '%') {
      const int high = n - i > 2 ? hex_value(encoded[i + 1]) : -1, low = high < 0 ? -1 : hex_value(encoded[i + 2]);
      if (low < 0) return vs_fail(err, VS_INVALID, "percent encoding: %% without two hex digits at character %zu", i);
      c = high * 16 + low, i += 2;
    }
    if (!c) return vs_fail(err, VS_INVALID, "percent encoding: a NUL at character %zu", i);
    *to++ = (char)c;
  }
  *to = 0;
  return VS_OK;
}

vs_rc s3_decode(const char *encoded, size_t n, char **out, vs_err *err) {
  *out = NULL;
  char *plain = n < SIZE_MAX ? malloc(n + 1) : NULL;
  if (!plain) return vs_nomem(err);
  vs_rc rc = decode_into(encoded, n, plain, err);
  if (rc) free(plain);
  else *out = plain;
  return rc;
}
