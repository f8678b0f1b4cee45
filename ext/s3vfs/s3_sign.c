/* s3_sign.c - see s3_sign.h. The texts are built with open_memstream; the key that is derived from the secret is wiped. */
#include "s3_sign.h"

#include <ctype.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum { HASH = 32 };
#define ALGORITHM "AWS4-HMAC-SHA256"

static void to_hex(const uint8_t *p, char out[2 * HASH + 1]) {
  static const char digits[] = "0123456789abcdef";
  for (int i = 0; i < HASH; i++) out[2 * i] = digits[p[i] >> 4], out[2 * i + 1] = digits[p[i] & 15];
  out[2 * HASH] = 0;
}

void s3_sha256_hex(const void *p, size_t n, char out[65]) {
  uint8_t hash[HASH] = {0};
  EVP_Digest(n ? p : "", n, hash, NULL, EVP_sha256(), NULL);
  to_hex(hash, out);
}

void s3_sign_date(int64_t unix_seconds, char out[17]) {
  time_t t = (time_t)unix_seconds;
  struct tm utc;
  gmtime_r(&t, &utc);
  strftime(out, 17, "%Y%m%dT%H%M%SZ", &utc);
}

static int is_date(const char *d) {
  if (strlen(d) != 16) return 0;
  for (int i = 0; i < 16; i++)
    if (i == 8 ? d[i] != 'T' : i == 15 ? d[i] != 'Z' : d[i] < '0' || d[i] > '9') return 0;
  return 1;
}

/* ---- the canonical request ---- */

static int by_name(const void *pa, const void *pb) {
  const s3_header *a = *(const s3_header *const *)pa, *b = *(const s3_header *const *)pb;
  int c = strcasecmp(a->name, b->name);
  return c ? c : a < b ? -1 : a > b; /* of one name: in the order given */
}

/* Trimmed, each run of blanks one space. */
static void put_value(FILE *f, const char *v) {
  while (isspace((unsigned char)*v)) v++;
  for (; *v; v++) {
    if (!isspace((unsigned char)*v)) fputc(*v, f);
    else if (v[1] && !isspace((unsigned char)v[1])) fputc(' ', f);
  }
}

static void put_lower(FILE *f, const char *s) {
  for (; *s; s++) fputc(tolower((unsigned char)*s), f);
}

static int same_name(const s3_header *const *h, size_t i) { return i && !strcasecmp(h[i]->name, h[i - 1]->name); }

static void put_headers(FILE *f, const s3_header *const *h, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (same_name(h, i)) fputc(',', f);
    else {
      if (i) fputc('\n', f);
      put_lower(f, h[i]->name), fputc(':', f);
    }
    put_value(f, h[i]->value);
  }
  if (n) fputc('\n', f);
}

static void put_names(FILE *f, const s3_header *const *h, size_t n) {
  for (size_t i = 0; i < n; i++) {
    if (same_name(h, i)) continue;
    if (i) fputc(';', f);
    put_lower(f, h[i]->name);
  }
}

typedef struct parameter { const char *text; size_t name_len, len; } parameter;

static int compare_bytes(const char *a, size_t n_a, const char *b, size_t n_b) {
  int c = memcmp(a, b, n_a < n_b ? n_a : n_b);
  return c ? c : n_a < n_b ? -1 : n_a > n_b;
}

static int by_parameter(const void *pa, const void *pb) {
  const parameter *a = pa, *b = pb;
  int c = compare_bytes(a->text, a->name_len, b->text, b->name_len);
  return c ? c : compare_bytes(a->text + a->name_len, a->len - a->name_len, b->text + b->name_len, b->len - b->name_len);
}

/* The parameters as they are, sorted by name, then by value; one without '=' gets it. 0: no memory. */
static int put_query(FILE *f, const char *query) {
  size_t n = 1, at = 0;
  for (const char *p = query; *p; p++) n += *p == '&';
  parameter *list = calloc(n, sizeof *list);
  if (!list) return 0;
  for (const char *p = query; at < n; at++) {
    size_t len = strcspn(p, "&");
    list[at] = (parameter){p, strcspn(p, "=&"), len};
    p += len + (p[len] == '&');
  }
  qsort(list, n, sizeof *list, by_parameter);
  int first = 1;
  for (size_t i = 0; i < n; i++) {
    if (!list[i].len) continue;
    fprintf(f, "%s%.*s%s", first ? "" : "&", (int)list[i].len, list[i].text, list[i].name_len == list[i].len ? "=" : "");
    first = 0;
  }
  free(list);
  return 1;
}

/* Closes a memory stream; NULL, with nothing left behind, when it ran out of memory. */
static char *finish(FILE *f, char **text, int ok) {
  ok = ok && !ferror(f);
  if (fclose(f) || !ok) free(*text), *text = NULL;
  return *text;
}

static char *canonical(const s3_sign_input *in, const s3_header *const *h, const char *names) {
  char *text = NULL;
  size_t n;
  FILE *f = open_memstream(&text, &n);
  if (!f) return NULL;
  fprintf(f, "%s\n%s\n", in->method, in->path);
  int ok = put_query(f, in->query);
  fputc('\n', f);
  put_headers(f, h, in->n_headers);
  fprintf(f, "\n%s\n%s", names, in->payload_hash);
  return finish(f, &text, ok);
}

/* ---- the signature ---- */

static int hmac(const uint8_t *key, size_t n_key, const char *text, uint8_t out[HASH]) {
  return HMAC(EVP_sha256(), key, (int)n_key, (const uint8_t *)text, strlen(text), out, NULL) != NULL;
}

/* HMAC of HMAC of ...: date, region, service, then the text. */
static int sign_text(const s3_sign_input *in, const char *text, char hex[65]) {
  char day[9], *first;
  uint8_t key[HASH] = {0};
  int n = asprintf(&first, "AWS4%s", in->secret_key);
  if (n < 0) return 0;
  snprintf(day, sizeof day, "%.8s", in->date);
  int ok = hmac((uint8_t *)first, (size_t)n, day, key) && hmac(key, HASH, in->region, key) && hmac(key, HASH, in->service, key) &&
           hmac(key, HASH, "aws4_request", key) && hmac(key, HASH, text, key);
  to_hex(key, hex);
  OPENSSL_cleanse(first, (size_t)n);
  OPENSSL_cleanse(key, sizeof key);
  free(first);
  return ok;
}

typedef struct texts { const s3_header **headers; char *names, *request, *to_sign; } texts;

static void free_texts(texts *t) { free(t->headers), free(t->names), free(t->request), free(t->to_sign); }

static int is_complete(const s3_sign_input *in) {
  return in->method && in->path && in->query && (in->headers || !in->n_headers) && in->payload_hash && in->date && in->region && in->service &&
         in->access_key && in->secret_key;
}

static vs_rc build(const s3_sign_input *in, texts *t, vs_err *err) {
  char hash[65];
  size_t n;
  memset(t, 0, sizeof *t);
  if (!is_complete(in) || !is_date(in->date)) return vs_fail(err, VS_INVALID, "a request without all that its signature needs");
  if (!(t->headers = malloc((in->n_headers + 1) * sizeof *t->headers))) return vs_nomem(err);
  for (size_t i = 0; i < in->n_headers; i++) t->headers[i] = &in->headers[i];
  qsort(t->headers, in->n_headers, sizeof *t->headers, by_name);
  FILE *f = open_memstream(&t->names, &n);
  if (!f) return vs_nomem(err);
  put_names(f, t->headers, in->n_headers);
  if (!finish(f, &t->names, 1) || !(t->request = canonical(in, t->headers, t->names))) return vs_nomem(err);
  s3_sha256_hex(t->request, strlen(t->request), hash);
  if (asprintf(&t->to_sign, ALGORITHM "\n%s\n%.8s/%s/%s/aws4_request\n%s", in->date, in->date, in->region, in->service, hash) < 0) {
    t->to_sign = NULL;
    return vs_nomem(err);
  }
  return VS_OK;
}

vs_rc s3_sign(const s3_sign_input *in, char **authorization, vs_err *err) {
  texts t;
  char hex[65];
  *authorization = NULL;
  vs_rc rc = build(in, &t, err);
  if (!rc && !sign_text(in, t.to_sign, hex)) rc = vs_nomem(err);
  if (!rc && asprintf(authorization, ALGORITHM " Credential=%s/%.8s/%s/%s/aws4_request, SignedHeaders=%s, Signature=%s", in->access_key,
                      in->date, in->region, in->service, t.names, hex) < 0) {
    *authorization = NULL;
    rc = vs_nomem(err);
  }
  free_texts(&t);
  return rc;
}

vs_rc s3_sign_explain(const s3_sign_input *in, char **canonical_request, char **string_to_sign, vs_err *err) {
  texts t;
  vs_rc rc = build(in, &t, err);
  if (canonical_request) *canonical_request = rc ? NULL : t.request;
  if (string_to_sign) *string_to_sign = rc ? NULL : t.to_sign;
  if (!rc && canonical_request) t.request = NULL;
  if (!rc && string_to_sign) t.to_sign = NULL;
  free_texts(&t);
  return rc;
}

/* ---- percent-encoding (RFC 3986) ---- */

char *s3_encode(const char *text, int keep_slash) {
  static const char digits[] = "0123456789ABCDEF";
  char *out = malloc(3 * strlen(text) + 1), *p = out;
  if (!out) return NULL;
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || strchr("-._~", c) || (keep_slash && c == '/')) *p++ = (char)c;
    else *p++ = '%', *p++ = digits[c >> 4], *p++ = digits[c & 15];
  }
  *p = 0;
  return out;
}

static int hex_value(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; }

vs_rc s3_decode(const char *text, size_t n, char **out, vs_err *err) {
  char *p = *out = malloc(n + 1);
  if (!p) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) {
    int high = text[i] == '%' && n - i > 2 ? hex_value(text[i + 1]) : -1, low = high >= 0 ? hex_value(text[i + 2]) : -1;
    if (text[i] == '%' ? low < 0 || !(high | low) : !text[i]) {
      free(*out), *out = NULL;
      return vs_fail(err, VS_INVALID, "a malformed percent-encoding");
    }
    *p++ = text[i] == '%' ? (char)(high << 4 | low) : text[i];
    if (text[i] == '%') i += 2;
  }
  *p = 0;
  return VS_OK;
}
