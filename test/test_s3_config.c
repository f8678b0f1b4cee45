/* test_s3_config.c - ext/s3vfs/s3_config.c and s3_profile.c, without SQLite and network.
 *
 * Proves: URIs, environment and profile files give the location and the credentials that the AWS SDKs would use, with their
 * precedence; what is wrong is refused with a message that names the setting and never holds a secret; profile files may
 * hold anything (a seeded loop of mutations, read from memory without slack under the address sanitizer). Works in a
 * temporary HOME with an environment of its own.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants these four first */
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../ext/s3vfs/s3_config.h"

enum { SEED = 20240607, MUTATIONS = 20000 };
#define SECRET "sEcReT/kEy+1234567890" /* in no message, whatever happens */
#define TOKEN "tOkEn=="
#define ACCESS "AKIDTESTTESTTEST"
#define CONFIG ".aws/config"
#define CREDENTIALS ".aws/credentials"

static char home[64];

/* ---- environment and files ---- */

static const char *const variables[] = {
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE",
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_CA_BUNDLE", "AWS_NO_SIGN_REQUEST"};

static const char *in_home(const char *name) {
  static char path[200];
  snprintf(path, sizeof path, "%s/%s", home, name);
  return path;
}

/* Nothing set, no files. */
static void clean(void) {
  for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) unsetenv(variables[i]);
  setenv("HOME", home, 1);
  chmod(in_home(CONFIG), 0600);
  unlink(in_home(CONFIG));
  unlink(in_home(CREDENTIALS));
}

/* A new file each time: some file systems wait for the disk when an old one is cut and written again. */
static void write_bytes(const char *name, const void *bytes, size_t n) {
  unlink(in_home(name));
  FILE *f = fopen(in_home(name), "wb");
  assert_non_null(f);
  assert_int_equal(fwrite(bytes, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}
static void write_text(const char *name, const char *text) { write_bytes(name, text, strlen(text)); }

static int make_home(void **state) {
  (void)state;
  snprintf(home, sizeof home, "/tmp/test_s3_config.XXXXXX");
  return !mkdtemp(home) || mkdir(in_home(".aws"), 0700);
}
static int remove_home(void **state) {
  (void)state;
  clean();
  unlink(in_home("other"));
  return rmdir(in_home(".aws")) || rmdir(home);
}
static int setup(void **state) {
  (void)state;
  clean();
  return 0;
}

/* ---- expectations ---- */

static void no_secret_in(const char *text) {
  static const char *const secrets[] = {SECRET, TOKEN, ACCESS, "pa55word"};
  for (size_t i = 0; i < sizeof secrets / sizeof *secrets; i++)
    if (strstr(text, secrets[i])) fail_msg("a secret is in \"%s\"", text);
}

static void same(const char *what, const char *got, const char *want) {
  if (!got != !want || (got && strcmp(got, want) != 0)) fail_msg("%s: \"%s\", expected \"%s\"", what, got ? got : "NULL", want ? want : "NULL");
}

/* "origin|base_path|key|region" */
static void expect_place(const char *uri, const char *want) {
  s3_location l;
  char *key, got[4096];
  vs_err err = {0};
  if (s3_locate(uri, &l, &key, &err)) fail_msg("%s: %s", uri, err.text);
  snprintf(got, sizeof got, "%s|%s|%s|%s", l.origin, l.base_path, key, l.region);
  same(uri, got, want);
  same("the origin ends in the host", strstr(l.origin, "://") + 3, l.host);
  s3_location_reset(&l);
  free(key);
}

static void expect_refused(const char *uri, const char *part) {
  s3_location l;
  char *key = (char *)1;
  vs_err err = {0};
  assert_int_equal(s3_locate(uri, &l, &key, &err), VS_INVALID);
  assert_null(key);
  assert_null(l.origin);
  if (!strstr(err.text, part)) fail_msg("%s: \"%s\" does not say \"%s\"", uri ? uri : "NULL", err.text, part);
  no_secret_in(err.text);
}

static void expect_credentials(const char *access, const char *secret, const char *token) {
  s3_credentials c;
  vs_err err = {0};
  if (s3_credentials_load(&c, &err)) fail_msg("%s", err.text);
  same("access key", c.access_key, access);
  same("secret key", c.secret_key, secret);
  same("token", c.session_token, token);
  s3_credentials_reset(&c);
  assert_null(c.secret_key);
}

static void expect_no_credentials(vs_rc want, const char *part) {
  s3_credentials c;
  vs_err err = {0};
  vs_rc rc = s3_credentials_load(&c, &err);
  if (rc != want || !strstr(err.text, part)) fail_msg("%d \"%s\" is not %d with \"%s\"", (int)rc, err.text, (int)want, part);
  assert_null(c.access_key);
  assert_null(c.secret_key);
  assert_null(c.session_token);
  no_secret_in(err.text);
}

/* ---- URIs ---- */

static void uris_are_told_apart(void **state) {
  (void)state;
  const char *yes[] = {"s3://b", "http://h", "https://h/x", "S3://b", "HTTPS://h"};
  const char *no[] = {"", "s3:/b", "/s3://b", "file:s3://b", "s3a://b", "ftp://h", "httpx://h", "http"};
  for (size_t i = 0; i < sizeof yes / sizeof *yes; i++) assert_true(s3_is_uri(yes[i]));
  for (size_t i = 0; i < sizeof no / sizeof *no; i++) assert_false(s3_is_uri(no[i]));
  assert_false(s3_is_uri(NULL));
}

static void amazon_places(void **state) {
  (void)state;
  expect_place("s3://bucket/a/key.db", "https://bucket.s3.us-east-1.amazonaws.com||a/key.db|us-east-1");
  expect_place("s3://bucket", "https://bucket.s3.us-east-1.amazonaws.com|||us-east-1");
  expect_place("s3://bucket/", "https://bucket.s3.us-east-1.amazonaws.com|||us-east-1");
  expect_place("S3://bucket//a b?c#d%20+\xc3\xa4", "https://bucket.s3.us-east-1.amazonaws.com||/a b?c#d%20+\xc3\xa4|us-east-1");
  setenv("AWS_REGION", "eu-west-1", 1);
  expect_place("s3://my.bucket/k", "https://s3.eu-west-1.amazonaws.com|/my.bucket|k|eu-west-1");
  expect_place("s3://Old_Bucket/k", "https://s3.eu-west-1.amazonaws.com|/Old_Bucket|k|eu-west-1");
  setenv("AWS_REGION", "cn-north-1", 1);
  expect_place("s3://bucket/k", "https://bucket.s3.cn-north-1.amazonaws.com.cn||k|cn-north-1");
  expect_place("s3://my.bucket/k", "https://s3.cn-north-1.amazonaws.com.cn|/my.bucket|k|cn-north-1");
}

static void bucket_names(void **state) {
  (void)state;
  char longest[80] = "s3://";
  memset(longest + 5, 'b', 63);
  expect_place("s3://a-1", "https://a-1.s3.us-east-1.amazonaws.com|||us-east-1");
  s3_location l;
  char *key;
  assert_int_equal(s3_locate(longest, &l, &key, NULL), VS_OK);
  s3_location_reset(&l), free(key);
  longest[5 + 63] = 'b';
  expect_refused(longest, "3 to 63 characters, not 64");
  expect_refused("s3://", "3 to 63 characters, not 0");
  expect_refused("s3:///key", "s3://bucket/key");
  expect_refused("s3://ab/key", "3 to 63");
  const char *edges[] = {"s3://-ab/k", "s3://ab-/k", "s3://.ab/k", "s3://ab./k", "s3://a..b/k"};
  for (size_t i = 0; i < sizeof edges / sizeof *edges; i++) expect_refused(edges[i], "begins and ends with a letter or a digit");
  const char *odd[] = {"s3://buck et/k", "s3://bucket?x=1", "s3://b\xc3\xbc/k", "s3://buc\nket/k", "s3://arn:aws:s3/k", "s3://b%20b/k"};
  for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) expect_refused(odd[i], "a character other than");
  expect_refused("s3://" ACCESS ":pa55word@bucket/key", "AWS_SECRET_ACCESS_KEY");
  expect_refused("bucket/key", "s3://bucket/key");
  expect_refused("", "s3://bucket/key");
  expect_refused(NULL, "s3://bucket/key");
}

static void keys_have_a_limit(void **state) {
  (void)state;
  char uri[1100] = "s3://bucket/";
  memset(uri + 12, 'k', 1024);
  s3_location l;
  char *key;
  assert_int_equal(s3_locate(uri, &l, &key, NULL), VS_OK);
  assert_int_equal(strlen(key), 1024);
  s3_location_reset(&l), free(key);
  uri[12 + 1024] = 'k';
  expect_refused(uri, "at most 1024 bytes, not 1025");
}

static void plain_urls(void **state) {
  (void)state;
  expect_place("https://Host.Example/a%20b?X-Amz-Signature=1&b", "https://host.example||a%20b?X-Amz-Signature=1&b|us-east-1");
  expect_place("http://h", "http://h|||us-east-1");
  expect_place("http://h/", "http://h|||us-east-1");
  expect_place("http://h?q=1", "http://h||?q=1|us-east-1");
  expect_place("http://h:80/x", "http://h||x|us-east-1");
  expect_place("https://h:443//x@y:z", "https://h||/x@y:z|us-east-1");
  expect_place("https://h:80/x", "https://h:80||x|us-east-1");
  expect_place("http://127.0.0.1:9000/x", "http://127.0.0.1:9000||x|us-east-1");
  expect_place("http://[::1]:9000/x", "http://[::1]:9000||x|us-east-1");
  expect_place("https://[2001:DB8::1]/x", "https://[2001:db8::1]||x|us-east-1");
  expect_place("http://mini_o-1:9000/x", "http://mini_o-1:9000||x|us-east-1");
}

static void plain_urls_ask_no_profile(void **state) {
  (void)state;
  s3_location l;
  char *key;
  setenv("AWS_PROFILE", "missing", 1);
  setenv("AWS_ENDPOINT_URL", "no address", 1);
  setenv("AWS_CA_BUNDLE", "/ca.pem", 1);
  assert_int_equal(s3_locate("https://h/x", &l, &key, NULL), VS_OK);
  assert_null(l.bucket);
  assert_true(l.anonymous);
  assert_string_equal(l.ca_bundle, "/ca.pem");
  s3_location_reset(&l), free(key);
  s3_location_reset(&l); /* again: legal */
}

/* What is wrong with an address, for URLs and endpoints alike. */
static const struct { const char *address, *says; } wrong_addresses[] = {
    {"http://", "no host"},
    {"http:///x", "no host"},
    {"http://:9000", "no host"},
    {"http://user:pa55word@h/", "AWS_SECRET_ACCESS_KEY"},
    {"http://pa55word@h", "AWS_SECRET_ACCESS_KEY"},
    {"http://user:pa55word/x@h/", "port"},
    {"http://h:", "port"},
    {"http://h:0", "65535"},
    {"http://h:65536", "65535"},
    {"http://h:9000000", "port"},
    {"http://h:90a", "port"},
    {"http://h:-1", "port"},
    {"http://[::1", "character"},
    {"http://[::1]9000", "port"},
    {"http://[::1]:", "port"},
    {"http://[]", "IPv6"},
    {"http://[h]", "IPv6"},
    {"http://[::1%25eth0]", "IPv6"},
    {"http://[1:2:3:4:5:6:7:8:9:10:11:12:13:14:15:16:17:18:19:20:21:22:23:24]", "IPv6"},
    {"http://::1", "no host"},
    {"http://fe80::1", "port"},
    {"http://h h/", "character"},
    {"http://h\n/", "character"},
    {"http://h\\x/", "character"},
    {"http://h/a b", "%20"},
    {"http://h/a\r\nX-Evil: 1", "control character"},
    {"http://h/a#b", "%23"},
    {"http://h#b", "%23"},
};

static void wrong_urls(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof wrong_addresses / sizeof *wrong_addresses; i++)
    expect_refused(wrong_addresses[i].address, wrong_addresses[i].says);
  char longest[400] = "http://";
  memset(longest + 7, 'h', 253);
  s3_location l;
  char *key;
  strcpy(longest + 7 + 253, ":65535/");
  assert_int_equal(s3_locate(longest, &l, &key, NULL), VS_OK);
  assert_int_equal(strlen(l.host), 253 + 6);
  s3_location_reset(&l), free(key);
  strcpy(longest + 7 + 253, "h/");
  expect_refused(longest, "too long");
}

/* ---- endpoints ---- */

static void endpoints(void **state) {
  (void)state;
  const struct { const char *endpoint, *place; } known[] = {
      {"http://127.0.0.1:9000", "http://127.0.0.1:9000|/bucket|k|us-east-1"},
      {"HTTP://LocalHost:80/", "http://localhost|/bucket|k|us-east-1"},
      {"https://h/prefix", "https://h|/prefix/bucket|k|us-east-1"},
      {"https://h:8443/a%20b/c///", "https://h:8443|/a%20b/c/bucket|k|us-east-1"},
      {"http://[::1]:9000/", "http://[::1]:9000|/bucket|k|us-east-1"},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    setenv("AWS_ENDPOINT_URL", known[i].endpoint, 1);
    expect_place("s3://bucket/k", known[i].place);
  }
}

static void wrong_endpoints(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof wrong_addresses / sizeof *wrong_addresses; i++) {
    setenv("AWS_ENDPOINT_URL_S3", wrong_addresses[i].address, 1);
    expect_refused("s3://bucket/k", wrong_addresses[i].says);
    expect_refused("s3://bucket/k", "AWS_ENDPOINT_URL_S3: it");
    expect_refused("s3://bucket/k", "a right one looks like http://127.0.0.1:9000");
  }
  unsetenv("AWS_ENDPOINT_URL_S3");
  const char *no_scheme[] = {"localhost:9000", "user:pa55word@h", "//h", "ftp://h", "s3://h", "http:/h"};
  for (size_t i = 0; i < sizeof no_scheme / sizeof *no_scheme; i++) {
    setenv("AWS_ENDPOINT_URL", no_scheme[i], 1);
    expect_refused("s3://bucket/k", "AWS_ENDPOINT_URL: it does not begin with http:// or https://");
  }
  setenv("AWS_ENDPOINT_URL", "http://h/x?pa55word", 1);
  expect_refused("s3://bucket/k", "query");
  unsetenv("AWS_ENDPOINT_URL");
  write_text(CONFIG, "[default]\nendpoint_url = localhost:9000\n");
  expect_refused("s3://bucket/k", "endpoint_url of profile \"default\"");
}

static void endpoint_precedence(void **state) {
  (void)state;
  write_text(CONFIG,
             "[default]\nendpoint_url = http://profile\nservices = mine\n\n"
             "[services mine]\ndynamodb =\n  endpoint_url = http://other\ns3 =\n  endpoint_url = http://services\n"
             "[profile plain]\nendpoint_url = http://plain\n");
  setenv("AWS_ENDPOINT_URL_S3", "http://env-s3", 1);
  setenv("AWS_ENDPOINT_URL", "http://env", 1);
  expect_place("s3://bucket/k", "http://env-s3|/bucket|k|us-east-1");
  setenv("AWS_ENDPOINT_URL_S3", "", 1);
  expect_place("s3://bucket/k", "http://env|/bucket|k|us-east-1");
  setenv("AWS_ENDPOINT_URL", "", 1);
  expect_place("s3://bucket/k", "http://services|/bucket|k|us-east-1");
  setenv("AWS_PROFILE", "plain", 1);
  expect_place("s3://bucket/k", "http://plain|/bucket|k|us-east-1");
  setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "false", 1);
  expect_place("s3://bucket/k", "http://plain|/bucket|k|us-east-1");
  setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "True", 1);
  setenv("AWS_ENDPOINT_URL", "http://env", 1);
  expect_place("s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1");
  unsetenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"), unsetenv("AWS_ENDPOINT_URL");
  write_text(CONFIG, "[profile plain]\nendpoint_url = http://plain\nignore_configured_endpoint_urls = true\n");
  expect_place("s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1");
}

static void services_must_exist(void **state) {
  (void)state;
  write_text(CONFIG, "[default]\nservices = gone\nendpoint_url = http://h\n[services other]\ns3 =\n  endpoint_url = http://other\n");
  expect_refused("s3://bucket/k", "profile \"default\" names a services section that is not in ");
  write_text(CONFIG, "[services mine]\nec2 =\n  endpoint_url = http://ec2\n[default]\nservices = mine\nendpoint_url = http://h\n");
  expect_place("s3://bucket/k", "http://h|/bucket|k|us-east-1");
}

static void addressing_styles(void **state) {
  (void)state;
  const struct { const char *style, *endpoint, *uri, *place; } known[] = {
      {"path", NULL, "s3://bucket/k", "https://s3.us-east-1.amazonaws.com|/bucket|k|us-east-1"},
      {"auto", NULL, "s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1"},
      {"virtual", NULL, "s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1"},
      {"virtual", NULL, "s3://my.bucket/k", "https://s3.us-east-1.amazonaws.com|/my.bucket|k|us-east-1"},
      {"auto", "http://h:9000/p", "s3://bucket/k", "http://h:9000|/p/bucket|k|us-east-1"},
      {"virtual", "http://h:9000/p/", "s3://bucket/k", "http://bucket.h:9000|/p|k|us-east-1"},
      {"virtual", "http://h", "s3://my.bucket/k", "http://h|/my.bucket|k|us-east-1"},
      {"virtual", "http://h", "s3://My_Bucket/k", "http://h|/My_Bucket|k|us-east-1"},
      {"virtual", "http://10.0.0.1:9000", "s3://bucket/k", "http://10.0.0.1:9000|/bucket|k|us-east-1"},
      {"virtual", "http://[::1]:9000", "s3://bucket/k", "http://[::1]:9000|/bucket|k|us-east-1"},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    char text[100];
    snprintf(text, sizeof text, "[default]\ns3 =\n  addressing_style = %s\n", known[i].style);
    write_text(CONFIG, text);
    if (known[i].endpoint) setenv("AWS_ENDPOINT_URL", known[i].endpoint, 1);
    expect_place(known[i].uri, known[i].place);
  }
  write_text(CONFIG, "[default]\ns3 =\n  addressing_style = dns\n");
  expect_refused("s3://bucket/k", "path, virtual or auto");
}

/* ---- region and the rest ---- */

static void regions(void **state) {
  (void)state;
  write_text(CONFIG, "[default]\nregion = eu-north-1\n");
  expect_place("s3://bucket/k", "https://bucket.s3.eu-north-1.amazonaws.com||k|eu-north-1");
  setenv("AWS_DEFAULT_REGION", "eu-south-1", 1);
  expect_place("s3://bucket/k", "https://bucket.s3.eu-south-1.amazonaws.com||k|eu-south-1");
  setenv("AWS_REGION", "eu-east-1", 1);
  expect_place("s3://bucket/k", "https://bucket.s3.eu-east-1.amazonaws.com||k|eu-east-1");
  const char *wrong[] = {"US-EAST-1", "us east 1", "eu-west-1\n", "evil.com/", "-a", "a-", "\xc3\xa4",
                         "a2345678901234567890123456789012345678901234567890123456789012345"};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    setenv("AWS_REGION", wrong[i], 1);
    expect_refused("s3://bucket/k", "AWS_REGION is no name of a region");
  }
  unsetenv("AWS_REGION"), unsetenv("AWS_DEFAULT_REGION");
  write_text(CONFIG, "[default]\nregion = evil.com/\n");
  expect_refused("s3://bucket/k", "the profile's region is no name");
}

static void anonymous_and_ca_bundle(void **state) {
  (void)state;
  const struct { const char *value; int anonymous; } known[] = {{"1", 1}, {"YES", 1}, {"true", 1}, {"True", 1}, {"0", 0}, {"no", 0}, {"", 0}, {"11", 0}};
  s3_location l;
  char *key;
  write_text(CONFIG, "[default]\nca_bundle = /profile.pem\n");
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    setenv("AWS_NO_SIGN_REQUEST", known[i].value, 1);
    assert_int_equal(s3_locate("s3://bucket", &l, &key, NULL), VS_OK);
    assert_int_equal(l.anonymous, known[i].anonymous);
    assert_string_equal(l.bucket, "bucket");
    assert_string_equal(l.ca_bundle, "/profile.pem");
    s3_location_reset(&l), free(key);
  }
  setenv("AWS_CA_BUNDLE", "/env.pem", 1);
  assert_int_equal(s3_locate("s3://bucket", &l, &key, NULL), VS_OK);
  assert_string_equal(l.ca_bundle, "/env.pem");
  s3_location_reset(&l), free(key);
}

/* ---- another region ---- */

static void expect_moved(const char *uri, const char *region, const char *origin, const char *base_path) {
  s3_location l;
  char *key;
  assert_int_equal(s3_locate(uri, &l, &key, NULL), VS_OK);
  assert_int_equal(s3_relocate(&l, region, NULL), VS_OK);
  same("origin", l.origin, origin);
  same("host", l.host, strstr(origin, "://") + 3);
  same("base path", l.base_path, base_path);
  same("region", l.region, region);
  s3_location_reset(&l), free(key);
}

static void buckets_move(void **state) {
  (void)state;
  expect_moved("s3://bucket/k", "eu-west-1", "https://bucket.s3.eu-west-1.amazonaws.com", "");
  expect_moved("s3://my.bucket/k", "eu-west-1", "https://s3.eu-west-1.amazonaws.com", "/my.bucket");
  expect_moved("s3://us-east-1/k", "eu-west-1", "https://us-east-1.s3.eu-west-1.amazonaws.com", "");
  expect_moved("https://x.us-east-1.y/k", "eu-west-1", "https://x.us-east-1.y", "");
  setenv("AWS_ENDPOINT_URL", "http://s3.us-east-1.store.example:9000", 1);
  expect_moved("s3://bucket/k", "eu-west-1", "http://s3.eu-west-1.store.example:9000", "/bucket");
  setenv("AWS_ENDPOINT_URL", "http://store-us-east-1.example", 1);
  expect_moved("s3://bucket/k", "eu-west-1", "http://store-us-east-1.example", "/bucket");
  write_text(CONFIG, "[default]\ns3 =\n addressing_style = virtual\n");
  setenv("AWS_ENDPOINT_URL", "http://store.example/p", 1);
  expect_moved("s3://us-east-1/k", "eu-west-1", "http://us-east-1.store.example", "/p");
}

static void a_wrong_region_changes_nothing(void **state) {
  (void)state;
  s3_location l;
  char *key;
  vs_err err = {0};
  assert_int_equal(s3_locate("s3://bucket/k", &l, &key, NULL), VS_OK);
  assert_int_equal(s3_relocate(&l, "evil.example/", &err), VS_INVALID);
  assert_int_equal(s3_relocate(&l, "", NULL), VS_INVALID);
  same("origin", l.origin, "https://bucket.s3.us-east-1.amazonaws.com");
  same("region", l.region, "us-east-1");
  s3_location_reset(&l), free(key);
}

/* ---- credentials ---- */

static void credentials_of_the_environment(void **state) {
  (void)state;
  write_text(CREDENTIALS, "[default]\naws_access_key_id = FILE\naws_secret_access_key = file\naws_session_token = filetoken\n");
  setenv("AWS_ACCESS_KEY_ID", ACCESS, 1);
  expect_no_credentials(VS_INVALID, "AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not");
  setenv("AWS_SECRET_ACCESS_KEY", "", 1);
  expect_no_credentials(VS_INVALID, "AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not");
  setenv("AWS_SECRET_ACCESS_KEY", SECRET, 1);
  expect_credentials(ACCESS, SECRET, NULL);
  setenv("AWS_SESSION_TOKEN", TOKEN, 1);
  expect_credentials(ACCESS, SECRET, TOKEN);
  setenv("AWS_PROFILE", "missing", 1);
  expect_credentials(ACCESS, SECRET, TOKEN);
  setenv("AWS_SESSION_TOKEN", TOKEN "\r\nX-Evil: 1", 1);
  expect_no_credentials(VS_INVALID, "AWS_SESSION_TOKEN holds a line break");
  setenv("AWS_SECRET_ACCESS_KEY", SECRET "\n", 1);
  expect_no_credentials(VS_INVALID, "AWS_SECRET_ACCESS_KEY holds a line break");
  setenv("AWS_ACCESS_KEY_ID", "\x7f" ACCESS, 1);
  expect_no_credentials(VS_INVALID, "AWS_ACCESS_KEY_ID holds a line break");
  unsetenv("AWS_ACCESS_KEY_ID");
  expect_no_credentials(VS_INVALID, "AWS_SECRET_ACCESS_KEY is set, but AWS_ACCESS_KEY_ID is not");
  setenv("AWS_SECRET_ACCESS_KEY", "", 1), setenv("AWS_PROFILE", "", 1);
  expect_credentials("FILE", "file", "filetoken");
}

static void credentials_of_files(void **state) {
  (void)state;
  write_text(CREDENTIALS, "[default]\naws_access_key_id=A1\naws_secret_access_key=s1==\n[two]\naws_access_key_id=A2\naws_secret_access_key=s2\n"
                          "[profile three]\naws_access_key_id=no\naws_secret_access_key=no\n");
  write_text(CONFIG, "[default]\naws_access_key_id=C1\naws_secret_access_key=c1\naws_session_token=ct\n"
                     "[profile three]\naws_access_key_id=A3\naws_secret_access_key=s3\n[four]\naws_access_key_id=no\naws_secret_access_key=no\n"
                     "[profile \"with space\"]\naws_access_key_id=A5\naws_secret_access_key=s5\n[profile empty]\nregion = eu-west-1\n");
  expect_credentials("A1", "s1==", NULL); /* the token of the other file does not belong to it */
  setenv("AWS_PROFILE", "two", 1);
  expect_credentials("A2", "s2", NULL);
  setenv("AWS_PROFILE", "three", 1);
  expect_credentials("A3", "s3", NULL);
  setenv("AWS_PROFILE", "with space", 1);
  expect_credentials("A5", "s5", NULL);
  setenv("AWS_PROFILE", "four", 1);
  expect_no_credentials(VS_INVALID, "AWS_PROFILE is \"four\"");
  setenv("AWS_PROFILE", "ne\nver]", 1);
  expect_no_credentials(VS_INVALID, "neither [ne?ver]] in ");
  expect_refused("s3://bucket/k", "AWS_PROFILE is \"ne?ver]\"");
  setenv("AWS_PROFILE", "empty", 1);
  expect_no_credentials(VS_NOTFOUND, "profile \"empty\" has no keys in ");
}

static void half_a_pair_in_a_file(void **state) {
  (void)state;
  write_text(CONFIG, "[default]\naws_secret_access_key = " SECRET "\n");
  expect_no_credentials(VS_INVALID, "has aws_secret_access_key, but no aws_access_key_id");
  write_text(CREDENTIALS, "[default]\naws_access_key_id = " ACCESS "\n");
  expect_no_credentials(VS_INVALID, ".aws/credentials has aws_access_key_id, but no aws_secret_access_key");
}

static void nothing_anywhere(void **state) {
  (void)state;
  expect_no_credentials(VS_NOTFOUND, ".aws/credentials (No such file or directory) or ");
  expect_no_credentials(VS_NOTFOUND, "AWS_NO_SIGN_REQUEST=1");
  setenv("AWS_PROFILE", "default", 1);
  expect_no_credentials(VS_INVALID, "AWS_PROFILE is \"default\", but there is neither [default] in ");
  unsetenv("AWS_PROFILE"), unsetenv("HOME");
  expect_no_credentials(VS_NOTFOUND, "HOME is not set");
  expect_place("s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1");
}

/* ---- files ---- */

static void files_named_by_the_environment(void **state) {
  (void)state;
  write_text("other", "[default]\naws_access_key_id=O\naws_secret_access_key=o\n");
  write_text(CREDENTIALS, "[default]\naws_access_key_id=H\naws_secret_access_key=h\n");
  setenv("AWS_SHARED_CREDENTIALS_FILE", in_home("other"), 1);
  expect_credentials("O", "o", NULL);
  setenv("AWS_SHARED_CREDENTIALS_FILE", "~/other", 1);
  expect_credentials("O", "o", NULL);
  setenv("AWS_SHARED_CREDENTIALS_FILE", in_home("none"), 1);
  expect_no_credentials(VS_NOTFOUND, "/none (No such file or directory)");
  setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null", 1);
  expect_no_credentials(VS_NOTFOUND, "/dev/null");
  setenv("AWS_SHARED_CREDENTIALS_FILE", in_home(".aws"), 1);
  expect_no_credentials(VS_INVALID, "not a regular file");
  setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/zero", 1);
  expect_no_credentials(VS_INVALID, "larger than 1 MiB");
  expect_refused("s3://bucket/k", "larger than 1 MiB");
}

static void files_have_a_limit(void **state) {
  (void)state;
  const size_t limit = 1 << 20;
  const char tail[] = "\n[default]\nregion = eu-west-1";
  char *text = malloc(limit + 1);
  memset(text, '#', limit + 1);
  memcpy(text + limit - strlen(tail), tail, strlen(tail));
  write_bytes(CONFIG, text, limit);
  expect_place("s3://bucket/k", "https://bucket.s3.eu-west-1.amazonaws.com||k|eu-west-1");
  write_bytes(CONFIG, text, limit + 1);
  expect_refused("s3://bucket/k", "larger than 1 MiB");
  free(text);
}

static void files_that_may_not_be_read(void **state) {
  (void)state;
  if (!geteuid()) return; /* root may read all */
  write_text(CONFIG, "[default]\nregion = eu-west-1\n");
  chmod(in_home(CONFIG), 0);
  expect_place("s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1");
  expect_no_credentials(VS_NOTFOUND, ".aws/config (Permission denied)");
  setenv("AWS_CONFIG_FILE", in_home(CONFIG), 1);
  expect_no_credentials(VS_IO, "AWS_CONFIG_FILE: cannot open");
}

/* ---- what a file may look like ---- */

static void forms_of_files(void **state) {
  (void)state;
  const char *same_meaning[] = {
      "[default]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n",
      "\xef\xbb\xbf[default]\r\nregion = eu-west-1\r\ns3 =\r\n  addressing_style = path\r\n",
      "[default]\nregion=eu-west-1\ns3=\n\taddressing_style=path",
      "# x\n; y\n\n  # z\n[ default ] # here\nregion = eu-west-1 # there\ns3 = # nested\n  # in\n\n  addressing_style = path ; too\n",
      "[profile default]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n[default]\nregion = no\ns3 =\n  addressing_style = no\n",
      "[default]\nregion = no-1\n[profile x]\nregion = no-2\n[default]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n",
      "  [default]\n  region = eu-west-1\n  s3 =\n    max_queue_size = 1\n    addressing_style = path\n",
      "[default]\ns3 =\n  addressing_style = path\n  region = no\nregion = eu-west-1\n",
      "[profile x]\nregion = no\n[default]\nnonsense\n= no\nregion = eu-west-1\ns3 =\n  addressing_style = path\n[broken\nregion = no\n",
      "region = no\n[default]\nregion = eu-west-1\ns3 =\n  addressing_style = path\n[sso-session default]\nregion = no\n[profiledefault]\nregion = no\n",
      "[default]\nregion = eu-west-1\ncredential_process = x\n  region = no\ns3 =\n  addressing_style = path\n",
  };
  for (size_t i = 0; i < sizeof same_meaning / sizeof *same_meaning; i++) {
    write_text(CONFIG, same_meaning[i]);
    expect_place("s3://bucket/k", "https://s3.eu-west-1.amazonaws.com|/bucket|k|eu-west-1");
  }
}

static void not_nested_is_not_found(void **state) {
  (void)state;
  const char *without_style[] = {
      "[default]\naddressing_style = path\n", "[default]\ns3 =\naddressing_style = path\n",
      "[default]\ns3 = x\n  addressing_style = path\n", "[default]\ns3 =\n[other]\n  addressing_style = path\n",
      "[default]\ns4 =\n  addressing_style = path\n", "[default]\ns3 =\n  addressing_style =\n",
  };
  for (size_t i = 0; i < sizeof without_style / sizeof *without_style; i++) {
    write_text(CONFIG, without_style[i]);
    expect_place("s3://bucket/k", "https://bucket.s3.us-east-1.amazonaws.com||k|us-east-1");
  }
}

static void control_characters_in_values(void **state) {
  (void)state;
  const char nul[] = "[default]\naws_access_key_id = A\naws_secret_access_key = " SECRET "\0x\n";
  write_bytes(CREDENTIALS, nul, sizeof nul - 1);
  expect_no_credentials(VS_INVALID, "aws_secret_access_key holds a control character");
  write_text(CREDENTIALS, "[default]\naws_access_key_id = " ACCESS "\rX-Evil: 1\naws_secret_access_key = x\n");
  expect_no_credentials(VS_INVALID, "aws_access_key_id holds a control character");
  write_text(CREDENTIALS, "[default]\nregion = a\x1b[2J\n");
  expect_refused("s3://bucket/k", "region holds a control character");
}

/* xorshift: the same bytes on every machine. */
static uint32_t next_random(uint32_t *state) {
  uint32_t x = *state;
  x ^= x << 13, x ^= x >> 17, x ^= x << 5;
  return *state = x;
}

/* Sets, doubles, removes bytes of a good file, with a liking for those that have a meaning. */
static size_t mutate(char *text, size_t n, size_t room, uint32_t *random) {
  static const char meant[] = "[]=#;\n\r\t \"'\0\xef/:@%.";
  for (uint32_t changes = 1 + next_random(random) % 8; changes; changes--) {
    const size_t at = n ? next_random(random) % n : 0, length = 1 + next_random(random) % 16;
    const uint32_t kind = next_random(random) % 4;
    if (kind == 0 && n) text[at] = (char)next_random(random);
    else if (kind == 1 && n) text[at] = meant[next_random(random) % (sizeof meant - 1)];
    else if (kind == 2 && at + length <= n) memmove(text + at, text + at + length, n - at - length), n -= length;
    else if (kind == 3 && at + length <= n && n + length <= room) memmove(text + at + length, text + at, n - at), n += length;
  }
  return n;
}

/* Whatever a file holds: an error with a text and without the secret, or a location without control characters. */
static void load_both(void) {
  s3_location l;
  s3_credentials c;
  char *key;
  vs_err err = {0};
  if (!s3_locate("s3://bucket/k", &l, &key, &err)) {
    for (const char *p = l.origin; *p; p++) assert_true(*p > ' ' && *p < 0x7f);
    s3_location_reset(&l), free(key);
  } else {
    assert_true(err.text[0]);
    no_secret_in(err.text);
  }
  vs_err_reset(&err);
  if (!s3_credentials_load(&c, &err)) s3_credentials_reset(&c);
  else no_secret_in(err.text);
}

static void hostile_files(void **state) {
  (void)state;
  static const char good[] =
      "\xef\xbb\xbf# comment\r\n[default]\nregion = eu-west-1\nservices = mine\naws_access_key_id = " ACCESS "\naws_secret_access_key = " SECRET
      "\naws_session_token = " TOKEN "\ns3 =\n  addressing_style = virtual\n[services mine]\ns3 =\n  endpoint_url = http://[::1]:9000/p\n"
      "[profile \"x\"]\nendpoint_url = https://h\n";
  enum { ROOM = 1024 };
  char text[ROOM];
  uint32_t random = SEED;
  print_message("seed %d\n", SEED);
  for (int i = 0; i < MUTATIONS; i++) {
    memcpy(text, good, sizeof good - 1);
    const size_t n = mutate(text, sizeof good - 1, ROOM, &random);
    write_bytes(i % 4 ? CONFIG : CREDENTIALS, text, n);
    if (i % 8 == 0) setenv("AWS_PROFILE", "x", 1);
    else unsetenv("AWS_PROFILE");
    load_both();
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(uris_are_told_apart, setup),
      cmocka_unit_test_setup(amazon_places, setup),
      cmocka_unit_test_setup(bucket_names, setup),
      cmocka_unit_test_setup(keys_have_a_limit, setup),
      cmocka_unit_test_setup(plain_urls, setup),
      cmocka_unit_test_setup(plain_urls_ask_no_profile, setup),
      cmocka_unit_test_setup(wrong_urls, setup),
      cmocka_unit_test_setup(endpoints, setup),
      cmocka_unit_test_setup(wrong_endpoints, setup),
      cmocka_unit_test_setup(endpoint_precedence, setup),
      cmocka_unit_test_setup(services_must_exist, setup),
      cmocka_unit_test_setup(addressing_styles, setup),
      cmocka_unit_test_setup(regions, setup),
      cmocka_unit_test_setup(anonymous_and_ca_bundle, setup),
      cmocka_unit_test_setup(buckets_move, setup),
      cmocka_unit_test_setup(a_wrong_region_changes_nothing, setup),
      cmocka_unit_test_setup(credentials_of_the_environment, setup),
      cmocka_unit_test_setup(credentials_of_files, setup),
      cmocka_unit_test_setup(half_a_pair_in_a_file, setup),
      cmocka_unit_test_setup(nothing_anywhere, setup),
      cmocka_unit_test_setup(files_named_by_the_environment, setup),
      cmocka_unit_test_setup(files_have_a_limit, setup),
      cmocka_unit_test_setup(files_that_may_not_be_read, setup),
      cmocka_unit_test_setup(forms_of_files, setup),
      cmocka_unit_test_setup(not_nested_is_not_found, setup),
      cmocka_unit_test_setup(control_characters_in_values, setup),
      cmocka_unit_test_setup(hostile_files, setup),
  };
  return cmocka_run_group_tests(tests, make_home, remove_home);
}
