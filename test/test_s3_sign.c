/* test_s3_sign.c - ext/s3vfs/s3_sign.c against known answers, without SQLite and network.
 *
 * Proves: every case of the published test suite that applies to S3 gives its canonical request, string to sign, signature
 * and Authorization header, byte by byte, and so do the examples of the S3 manual; order and case of headers and the order
 * of a query do not matter; incomplete input is an error; percent encoding is its own inverse; dates are right at the ends
 * of years, of February and of what the form can say. Reads test/sigv4 below the current folder.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants these four first */
#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/s3vfs/s3_sign.h"

#define CASES "test/sigv4/cases"
enum { TEXT_MAX = 8192, HEADERS_MAX = 16, APPLICABLE_CASES = 31 };

/* ---- the published suite ---- */

typedef struct sigv4_case {
  char name[100];
  char context[TEXT_MAX], request[TEXT_MAX];
  char secret[200], access[200], token[2000], region[100], service[100], date[100];
  char method[20];
  char *path, query[TEXT_MAX];
  char hash[65];
  s3_header headers[HEADERS_MAX];
  size_t n_headers;
} sigv4_case;

static size_t read_file(const char *folder, const char *name, char out[TEXT_MAX]) {
  char path[400];
  snprintf(path, sizeof path, CASES "/%s/%s", folder, name);
  FILE *f = fopen(path, "rb");
  if (!f) fail_msg("%s: cannot open; the test runs in the folder of the Makefile", path);
  size_t n = fread(out, 1, TEXT_MAX - 1, f);
  assert_true(feof(f));
  fclose(f);
  out[n] = 0;
  return n;
}

/* The text of "name": "text" in a JSON file that has each name once and no escapes; "" when it is not there. */
static void json_text(const char *json, const char *name, char *out, size_t room) {
  char quoted[100];
  snprintf(quoted, sizeof quoted, "\"%s\": \"", name);
  const char *at = strstr(json, quoted);
  out[0] = 0;
  if (!at) return;
  at += strlen(quoted);
  size_t n = strcspn(at, "\"");
  assert_true(n < room && !memchr(at, '\\', n));
  memcpy(out, at, n), out[n] = 0;
}
static int json_true(const char *json, const char *name) {
  char text[100];
  snprintf(text, sizeof text, "\"%s\": true", name);
  return strstr(json, text) != NULL;
}

static void add_header(sigv4_case *c, const char *name, const char *value) {
  assert_true(c->n_headers < HEADERS_MAX);
  c->headers[c->n_headers++] = (s3_header){name, value};
}

/* The suite has raw UTF-8 and escapes in queries; a request line has only escapes. */
static void encode_query(const char *raw, char out[TEXT_MAX]) {
  size_t n = 0;
  for (; *raw; raw++) n += (size_t)snprintf(out + n, TEXT_MAX - n, *raw < 0 ? "%%%02X" : "%c", (unsigned char)*raw);
  out[n] = 0;
}

/* "GET /a b?x=y HTTP/1.1" */
static void parse_request_line(sigv4_case *c, char *line) {
  char *target = strchr(line, ' '), *version = strrchr(line, ' ');
  assert_true(target && version > target);
  *target++ = 0, *version = 0;
  char *query = strchr(target, '?');
  if (query) *query++ = 0;
  snprintf(c->method, sizeof c->method, "%s", line);
  assert_null(strchr(target, '%'));
  c->path = s3_encode(target, 1);
  encode_query(query ? query : "", c->query);
}

/* Lines "Name:value", continued by lines that begin with a blank, up to an empty one. Returns the body. */
static char *parse_headers(sigv4_case *c, char *at) {
  while (*at && *at != '\n') {
    char *end = at + strcspn(at, "\n"), *colon = strchr(at, ':');
    while (end[0] && (end[1] == ' ' || end[1] == '\t')) end += 1 + strcspn(end + 1, "\n");
    assert_true(colon && colon < end);
    *colon = 0;
    add_header(c, at, colon + 1);
    at = end + (*end == '\n');
    *end = 0;
  }
  return at + (*at == '\n');
}

/* "2015-08-30T12:36:00Z" */
static void parse_date(const char *text, char out[17]) {
  int year, month, day, hour, minute, second;
  assert_int_equal(sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2dZ", &year, &month, &day, &hour, &minute, &second), 6);
  snprintf(out, 100, "%04d%02d%02dT%02d%02d%02dZ", year, month, day, hour, minute, second);
}

static void load_case(sigv4_case *c, const char *name) {
  char timestamp[100];
  memset(c, 0, sizeof *c);
  snprintf(c->name, sizeof c->name, "%s", name);
  read_file(name, "context.json", c->context);
  read_file(name, "request.txt", c->request);
  json_text(c->context, "access_key_id", c->access, sizeof c->access);
  json_text(c->context, "secret_access_key", c->secret, sizeof c->secret);
  json_text(c->context, "token", c->token, sizeof c->token);
  json_text(c->context, "region", c->region, sizeof c->region);
  json_text(c->context, "service", c->service, sizeof c->service);
  json_text(c->context, "timestamp", timestamp, sizeof timestamp);
  parse_date(timestamp, c->date);
  char *line_end = strchr(c->request, '\n');
  assert_non_null(line_end);
  *line_end = 0;
  parse_request_line(c, c->request);
  const char *body = parse_headers(c, line_end + 1);
  s3_sha256_hex(body, strlen(body), c->hash);
  add_header(c, "X-Amz-Date", c->date);
  if (c->token[0] && !json_true(c->context, "omit_session_token")) add_header(c, "X-Amz-Security-Token", c->token);
  if (json_true(c->context, "sign_body")) add_header(c, "x-amz-content-sha256", c->hash);
}

static s3_sign_input input_of(const sigv4_case *c) {
  return (s3_sign_input){.method = c->method, .path = c->path, .query = c->query, .headers = c->headers, .n_headers = c->n_headers,
                         .payload_hash = c->hash, .date = c->date, .region = c->region, .service = c->service,
                         .access_key = c->access, .secret_key = c->secret};
}

static void expect_file(const sigv4_case *c, const char *file, const char *got) {
  char want[TEXT_MAX];
  read_file(c->name, file, want);
  if (strcmp(want, got) != 0) fail_msg("%s, %s:\n%s\n-- got --\n%s", c->name, file, want, got);
}

static void run_case(const char *name) {
  static sigv4_case c;
  char *canonical, *to_sign, *authorization, signed_request[TEXT_MAX];
  vs_err err = {0};
  load_case(&c, name);
  const s3_sign_input in = input_of(&c);
  assert_int_equal(s3_sign_explain(&in, &canonical, &to_sign, &err), VS_OK);
  assert_int_equal(s3_sign(&in, &authorization, &err), VS_OK);
  expect_file(&c, "header-canonical-request.txt", canonical);
  expect_file(&c, "header-string-to-sign.txt", to_sign);
  const char *signature = strstr(authorization, "Signature=");
  assert_non_null(signature);
  expect_file(&c, "header-signature.txt", signature + 10);
  read_file(name, "header-signed-request.txt", signed_request);
  char *line = strstr(signed_request, "\nAuthorization:");
  assert_non_null(line);
  line += 15, line[strcspn(line, "\n")] = 0;
  assert_string_equal(authorization, line);
  free(canonical), free(to_sign), free(authorization), free(c.path);
}

/* Normalising a path is for other services: S3 takes "/a/../b" as a key. */
static int applies(const char *name) {
  const size_t n = strlen(name);
  return name[0] != '.' && !(n > 11 && !strcmp(name + n - 11, "-normalized"));
}

static void published_answers(void **state) {
  (void)state;
  int ran = 0;
  DIR *folder = opendir(CASES);
  if (!folder) fail_msg(CASES ": cannot open; the test runs in the folder of the Makefile");
  for (struct dirent *e; (e = readdir(folder));) {
    if (!applies(e->d_name)) continue;
    run_case(e->d_name);
    ran++;
  }
  closedir(folder);
  assert_int_equal(ran, APPLICABLE_CASES);
}

/* ---- the examples of the S3 manual: "Authenticating Requests: Using the Authorization Header" ---- */

static s3_sign_input manual_request(const char *method, const char *path, const char *query, const s3_header *headers, size_t n,
                                    const char *hash) {
  return (s3_sign_input){.method = method, .path = path, .query = query, .headers = headers, .n_headers = n, .payload_hash = hash,
                         .date = "20130524T000000Z", .region = "us-east-1", .service = "s3", .access_key = "AKIAIOSFODNN7EXAMPLE",
                         .secret_key = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"};
}
#define MANUAL_HOST {"Host", "examplebucket.s3.amazonaws.com"}
#define MANUAL_DATE {"x-amz-date", "20130524T000000Z"}

static void expect_signature(const s3_sign_input *in, const char *want) {
  char *got;
  vs_err err = {0};
  assert_int_equal(s3_sign(in, &got, &err), VS_OK);
  assert_string_equal(strstr(got, "Signature=") + 10, want);
  free(got);
}

static void manual_examples(void **state) {
  (void)state;
  const s3_header get[] = {MANUAL_HOST, {"Range", "bytes=0-9"}, {"x-amz-content-sha256", S3_EMPTY_SHA256}, MANUAL_DATE};
  s3_sign_input in = manual_request("GET", "/test.txt", "", get, 4, S3_EMPTY_SHA256);
  expect_signature(&in, "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");

  char hash[65], *path = s3_encode("/test$file.text", 1);
  s3_sha256_hex("Welcome to Amazon S3.", 21, hash);
  const s3_header put[] = {{"Date", "Fri, 24 May 2013 00:00:00 GMT"}, MANUAL_HOST, MANUAL_DATE,
                           {"x-amz-storage-class", "REDUCED_REDUNDANCY"}, {"x-amz-content-sha256", hash}};
  in = manual_request("PUT", path, "", put, 5, hash);
  expect_signature(&in, "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd");
  free(path);

  const s3_header list[] = {MANUAL_HOST, {"x-amz-content-sha256", S3_EMPTY_SHA256}, MANUAL_DATE};
  in = manual_request("GET", "/", "lifecycle", list, 3, S3_EMPTY_SHA256);
  expect_signature(&in, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543");
  in = manual_request("GET", "/", "prefix=J&max-keys=2", list, 3, S3_EMPTY_SHA256);
  expect_signature(&in, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7");
}

/* ---- order, case, incomplete input ---- */

static void order_does_not_matter(void **state) {
  (void)state;
  const s3_header one[] = {MANUAL_HOST, {"Range", "bytes=0-9"}, MANUAL_DATE}, two[] = {MANUAL_DATE, {"RANGE", "  bytes=0-9\t"}, MANUAL_HOST};
  const s3_sign_input a = manual_request("GET", "/k", "uploads&a-b=1&a=2&a=1&A=3", one, 3, S3_UNSIGNED_PAYLOAD);
  const s3_sign_input b = manual_request("GET", "/k", "A=3&&a=1&uploads=&a-b=1&a=2&", two, 3, S3_UNSIGNED_PAYLOAD);
  char *text_a, *text_b;
  vs_err err = {0};
  assert_int_equal(s3_sign_explain(&a, &text_a, NULL, &err), VS_OK);
  assert_int_equal(s3_sign_explain(&b, &text_b, NULL, &err), VS_OK);
  assert_string_equal(text_a, text_b);
  assert_non_null(strstr(text_a, "\nA=3&a=1&a=2&a-b=1&uploads=\n"));
  assert_non_null(strstr(text_a, "\n" S3_UNSIGNED_PAYLOAD));
  free(text_a), free(text_b);
}

static void expect_refused(const s3_sign_input *in, vs_rc want) {
  char *got = (char *)1;
  vs_err err = {0};
  assert_int_equal(s3_sign(in, &got, &err), want);
  assert_null(got);
  assert_true(err.text[0]);
}

static void incomplete_input_is_refused(void **state) {
  (void)state;
  const s3_header headers[] = {MANUAL_HOST, MANUAL_DATE}, broken[] = {{"Host", NULL}};
  const s3_sign_input good = manual_request("GET", "/", "", headers, 2, S3_EMPTY_SHA256);
  const size_t fields[] = {offsetof(s3_sign_input, method), offsetof(s3_sign_input, path), offsetof(s3_sign_input, query),
                           offsetof(s3_sign_input, headers), offsetof(s3_sign_input, payload_hash), offsetof(s3_sign_input, date),
                           offsetof(s3_sign_input, region), offsetof(s3_sign_input, service), offsetof(s3_sign_input, access_key),
                           offsetof(s3_sign_input, secret_key)};
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
    s3_sign_input in = good;
    const void *none = NULL;
    memcpy((char *)&in + fields[i], &none, sizeof none);
    expect_refused(&in, VS_INVALID);
  }
  expect_refused(NULL, VS_INVALID);
  s3_sign_input in = good;
  in.headers = broken, in.n_headers = 1;
  expect_refused(&in, VS_INVALID);
  const char *dates[] = {"", "20130524", "20130524T000000", "20130524T000000Z ", "2013-05-24T00:00", "20130524t000000z", "2013052xT000000Z"};
  for (size_t i = 0; i < sizeof dates / sizeof *dates; i++) {
    in = good, in.date = dates[i];
    expect_refused(&in, VS_INVALID);
  }
  in = good, in.payload_hash = "";
  expect_refused(&in, VS_NOMEM);
  in = good, in.headers = NULL, in.n_headers = 0; /* odd, but complete */
  char *got;
  assert_int_equal(s3_sign(&in, &got, NULL), VS_OK);
  free(got);
}

/* ---- dates and hashes ---- */

static void dates(void **state) {
  (void)state;
  const struct { int64_t t; const char *text; } known[] = {
      {0, "19700101T000000Z"},          {1369353600, "20130524T000000Z"}, {1440938160, "20150830T123600Z"},
      {951782399, "20000228T235959Z"},  {951782400, "20000229T000000Z"},  {4107542399, "21000228T235959Z"},
      {4107542400, "21000301T000000Z"}, {1735689599, "20241231T235959Z"}, {253402300799, "99991231T235959Z"},
      {INT64_MAX, "99991231T235959Z"},  {-1, "19700101T000000Z"},         {INT64_MIN, "19700101T000000Z"},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    char got[17];
    s3_sign_date(known[i].t, got);
    assert_string_equal(got, known[i].text);
  }
}

static void hashes(void **state) {
  (void)state;
  char got[65];
  s3_sha256_hex(NULL, 0, got);
  assert_string_equal(got, S3_EMPTY_SHA256);
  s3_sha256_hex("abc", 3, got);
  assert_string_equal(got, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

/* ---- percent encoding ---- */

static void encoding(void **state) {
  (void)state;
  const struct { const char *plain; int keep_slash; const char *encoded; } known[] = {
      {"", 0, ""},
      {"a/b c+d", 1, "a/b%20c%2Bd"},
      {"a/b c+d", 0, "a%2Fb%20c%2Bd"},
      {"-._~AZaz09", 0, "-._~AZaz09"},
      {"!*'()=&?#%", 1, "%21%2A%27%28%29%3D%26%3F%23%25"},
      {"\xe1\x88\xb4\x7f\x01", 1, "%E1%88%B4%7F%01"},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    char *got = s3_encode(known[i].plain, known[i].keep_slash);
    assert_string_equal(got, known[i].encoded);
    free(got);
  }
}

static void decoding_reverses(void **state) {
  (void)state;
  char all[256];
  for (int i = 0; i < 255; i++) all[i] = (char)(i + 1);
  all[255] = 0;
  for (int keep_slash = 0; keep_slash < 2; keep_slash++) {
    char *encoded = s3_encode(all, keep_slash), *plain;
    assert_int_equal(s3_decode(encoded, strlen(encoded), &plain, NULL), VS_OK);
    assert_string_equal(plain, all);
    free(encoded), free(plain);
  }
  char *plain;
  assert_int_equal(s3_decode("%e1%88%B4+/rest", 10, &plain, NULL), VS_OK); /* n ends it, '+' is no space */
  assert_string_equal(plain, "\xe1\x88\xb4+");
  free(plain);
  assert_int_equal(s3_decode("", 0, &plain, NULL), VS_OK);
  assert_string_equal(plain, "");
  free(plain);
}

/* From memory that ends where the text ends, so that the sanitizer sees a byte read too much. */
static void malformed_escapes_are_refused(void **state) {
  (void)state;
  const struct { const char *text; size_t n; } bad[] = {{"%", 1},   {"a%", 2},   {"%4", 2},    {"%4g", 3},  {"%g4", 3},
                                                        {"%%41", 4}, {"%00", 3}, {"a\0b", 3}, {"%-1", 3}, {"%+1", 3}};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    char *copy = malloc(bad[i].n), *plain = (char *)1;
    memcpy(copy, bad[i].text, bad[i].n);
    vs_err err = {0};
    assert_int_equal(s3_decode(copy, bad[i].n, &plain, &err), VS_INVALID);
    assert_null(plain);
    assert_true(err.text[0]);
    free(copy);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(published_answers), cmocka_unit_test(manual_examples),   cmocka_unit_test(order_does_not_matter),
      cmocka_unit_test(incomplete_input_is_refused), cmocka_unit_test(dates),   cmocka_unit_test(hashes),
      cmocka_unit_test(encoding),          cmocka_unit_test(decoding_reverses), cmocka_unit_test(malformed_escapes_are_refused),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
