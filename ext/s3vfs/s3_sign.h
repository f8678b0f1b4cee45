/* s3_sign.h - AWS Signature Version 4 as a pure function.
 *
 * Source: AWS General Reference, "Signature Version 4 signing process"; for S3 the path is taken as it is (no normalisation)
 * and encoded once. Checked against the published known answers in test/sigv4.
 */
#ifndef S3_SIGN_H
#define S3_SIGN_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

#define S3_UNSIGNED_PAYLOAD "UNSIGNED-PAYLOAD"
#define S3_EMPTY_SHA256 "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

typedef struct s3_header { const char *name, *value; } s3_header;

typedef struct s3_sign_input {
  const char *method;
  const char *path;          /* as in the request line, encoded, begins with '/' */
  const char *query;         /* as in the request line without '?'; "" for none; need not be sorted */
  const s3_header *headers;  /* all of them are signed; Host and X-Amz-Date among them (see s3_sign_date) */
  size_t n_headers;
  const char *payload_hash;  /* 64 hex digits of the body's SHA-256, or S3_UNSIGNED_PAYLOAD */
  const char *date;          /* YYYYMMDDTHHMMSSZ */
  const char *region, *service;
  const char *access_key, *secret_key;
} s3_sign_input;

/* The value of the Authorization header: malloc'ed, NUL terminated. A session token is an ordinary header (X-Amz-Security-Token)
 * that the caller adds. Fails with VS_NOMEM, or VS_INVALID for a NULL or a date of another form. */
vs_rc s3_sign(const s3_sign_input *in, char **authorization, vs_err *err) VS_WARN_UNUSED;
/* The two texts on the way, for tests: the first holds the session token, where there is one. NULL: not wanted. */
vs_rc s3_sign_explain(const s3_sign_input *in, char **canonical_request, char **string_to_sign, vs_err *err) VS_WARN_UNUSED;

void s3_sign_date(int64_t unix_seconds, char out[17]);
void s3_sha256_hex(const void *p, size_t n, char out[65]);

/* Percent-encodes all but A-Z a-z 0-9 - . _ ~ ; keep_slash leaves '/' as it is (object keys). malloc'ed; NULL without memory. */
char *s3_encode(const char *text, int keep_slash);
/* The reverse; VS_INVALID for a malformed escape or an encoded NUL. */
vs_rc s3_decode(const char *text, size_t n, char **out, vs_err *err) VS_WARN_UNUSED;

#endif
