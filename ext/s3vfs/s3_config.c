/* s3_config.c - see s3_config.h. The environment is read anew each time: a process may change it between two databases. */
#include "s3_config.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "s3_profile.h"

static int starts(const char *s, const char *with) { return !strncmp(s, with, strlen(with)); }
int s3_is_uri(const char *path) { return starts(path, "s3://") || starts(path, "http://") || starts(path, "https://"); }

static int is_yes(const char *v) { return v && (!strcmp(v, "1") || !strcasecmp(v, "true") || !strcasecmp(v, "yes")); }

static vs_rc load_profile(s3_profile *p, vs_err *err) {
  const char *name = s3_env("AWS_PROFILE");
  if (!name) name = s3_env("AWS_DEFAULT_PROFILE");
  vs_rc rc = s3_profile_load(name ? name : "default", p, err);
  if (!rc && name && !p->found) {
    s3_profile_reset(p);
    return vs_fail(err, VS_NOTFOUND, "AWS_PROFILE names the profile '%.100s', which neither ~/.aws/credentials nor ~/.aws/config has", name);
  }
  return rc;
}

/* ---- credentials ---- */

void s3_credentials_reset(s3_credentials *c) {
  char *all[] = {c->access_key, c->secret_key, c->session_token};
  for (int i = 0; i < 3; i++) {
    if (all[i]) OPENSSL_cleanse(all[i], strlen(all[i]));
    free(all[i]);
  }
  memset(c, 0, sizeof *c);
}

/* They become header lines: nothing in them may begin another. */
static int is_printable(const char *s) {
  for (; s && *s; s++)
    if ((unsigned char)*s < 33 || (unsigned char)*s > 126) return 0;
  return 1;
}

static vs_rc take_credentials(const char *key, const char *secret, const char *token, const char *where, s3_credentials *out, vs_err *err) {
  if (!key || !secret)
    return vs_fail(err, VS_INVALID, "%s: there is an access key id but no secret access key, or the other way round: both are needed", where);
  if (!is_printable(key) || !is_printable(secret) || !is_printable(token))
    return vs_fail(err, VS_INVALID, "%s: credentials hold a blank, a line break or another character that cannot be in one", where);
  out->access_key = strdup(key), out->secret_key = strdup(secret), out->session_token = token ? strdup(token) : NULL;
  if (out->access_key && out->secret_key && (!token || out->session_token)) return VS_OK;
  s3_credentials_reset(out);
  return vs_nomem(err);
}

vs_rc s3_credentials_load(s3_credentials *out, vs_err *err) {
  const char *key = s3_env("AWS_ACCESS_KEY_ID"), *secret = s3_env("AWS_SECRET_ACCESS_KEY");
  s3_profile p;
  memset(out, 0, sizeof *out);
  if (key || secret) return take_credentials(key, secret, s3_env("AWS_SESSION_TOKEN"), "the environment", out, err);
  vs_rc rc = load_profile(&p, err);
  if (rc) return rc;
  if (p.access_key || p.secret_key) rc = take_credentials(p.access_key, p.secret_key, p.session_token, "the AWS profile", out, err);
  else
    rc = vs_fail(err, VS_NOTFOUND,
                 "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if you have one), or put "
                 "them into ~/.aws/credentials, or set AWS_NO_SIGN_REQUEST=1 for a public bucket");
  s3_profile_reset(&p);
  return rc;
}

/* ---- locations ---- */

void s3_location_reset(s3_location *l) {
  free(l->bucket), free(l->origin), free(l->host), free(l->base_path), free(l->region), free(l->ca_bundle);
  memset(l, 0, sizeof *l);
}

static char *format(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static char *format(const char *fmt, ...) {
  char *text = NULL;
  va_list ap;
  va_start(ap, fmt);
  int n = vasprintf(&text, fmt, ap);
  va_end(ap);
  return n < 0 ? NULL : text;
}

static int all_of(const char *s, const char *allowed) { return s[strspn(s, allowed)] == 0; }
#define LOWER "abcdefghijklmnopqrstuvwxyz"
#define UPPER "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
#define DIGITS "0123456789"

static int is_region(const char *r) { return *r && strlen(r) < 64 && all_of(r, LOWER DIGITS "-"); }

/* Letters above 'z' and '_' are from the first years of S3, and of other stores. */
static int is_bucket(const char *b) { return strlen(b) >= 3 && strlen(b) <= 255 && all_of(b, LOWER UPPER DIGITS "._-") && b[0] != '.'; }

/* May the name be a part of a host name that a certificate for *.s3... covers? */
static int fits_host(const char *b) { return strlen(b) <= 63 && all_of(b, LOWER DIGITS "-") && b[0] != '-'; }

/* The authority of a URL, as it goes into the Host header: default ports are left out. NULL without memory. */
static char *host_of(const char *url) {
  const char *at = strstr(url, "://") + 3;
  size_t n = strcspn(at, "/?#");
  if (starts(url, "http://") && n > 3 && !strncmp(at + n - 3, ":80", 3)) n -= 3;
  else if (starts(url, "https://") && n > 4 && !strncmp(at + n - 4, ":443", 4)) n -= 4;
  return strndup(at, n);
}

/* Is there a sensible authority without user or password, and nothing but printable characters? */
static int is_web_url(const char *url) {
  if (!starts(url, "http://") && !starts(url, "https://")) return 0;
  const char *at = strstr(url, "://") + 3;
  size_t n = strcspn(at, "/?#");
  if (!n || n > 300 || memchr(at, '@', n)) return 0;
  for (const char *p = url; *p; p++)
    if ((unsigned char)*p <= 32 || *p == 127) return 0;
  return at[0] == '[' || strspn(at, LOWER UPPER DIGITS ".:-_") >= n;
}

static vs_rc set_endpoint(s3_location *l, const char *endpoint, int virtual_host, vs_err *err) {
  if (!is_web_url(endpoint) || strpbrk(endpoint, "?#"))
    return vs_fail(err, VS_INVALID, "the endpoint for S3 (AWS_ENDPOINT_URL or the profile's endpoint_url) must be like https://minio.example.com:9000");
  const char *at = strstr(endpoint, "://") + 3, *path = at + strcspn(at, "/");
  size_t n = strlen(path);
  while (n && path[n - 1] == '/') n--;
  int scheme = (int)(at - endpoint), authority = (int)(path - at);
  virtual_host = virtual_host && at[0] != '[' && fits_host(l->bucket);
  if (virtual_host) {
    l->origin = format("%.*s%s.%.*s", scheme, endpoint, l->bucket, authority, at);
    l->base_path = format("%.*s", (int)n, path);
  } else {
    l->origin = format("%.*s", scheme + authority, endpoint);
    l->base_path = format("%.*s/%s", (int)n, path, l->bucket);
  }
  return l->origin && l->base_path ? VS_OK : vs_nomem(err);
}

static vs_rc set_amazon(s3_location *l, int path_style, vs_err *err) {
  const char *suffix = starts(l->region, "cn-") ? ".cn" : "";
  if (!path_style && fits_host(l->bucket)) {
    l->origin = format("https://%s.s3.%s.amazonaws.com%s", l->bucket, l->region, suffix);
    l->base_path = strdup("");
  } else {
    l->origin = format("https://s3.%s.amazonaws.com%s", l->region, suffix);
    l->base_path = format("/%s", l->bucket);
  }
  return l->origin && l->base_path ? VS_OK : vs_nomem(err);
}

static vs_rc fill(s3_location *l, const s3_profile *p, vs_err *err) {
  const char *region = s3_env("AWS_REGION"), *endpoint = s3_env("AWS_ENDPOINT_URL_S3"), *style = p->addressing_style,
             *bundle = s3_env("AWS_CA_BUNDLE");
  if (!region) region = s3_env("AWS_DEFAULT_REGION");
  if (!region) region = p->region ? p->region : "us-east-1";
  if (!is_region(region)) return vs_fail(err, VS_INVALID, "the AWS region '%.64s' is no region: one is like eu-central-1", region);
  if (!endpoint) endpoint = s3_env("AWS_ENDPOINT_URL");
  if (!endpoint) endpoint = p->endpoint_url;
  if (is_yes(s3_env("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"))) endpoint = NULL;
  if (!bundle) bundle = p->ca_bundle;
  if (!(l->region = strdup(region)) || (bundle && !(l->ca_bundle = strdup(bundle)))) return vs_nomem(err);
  l->anonymous = is_yes(s3_env("AWS_NO_SIGN_REQUEST"));
  vs_rc rc = endpoint ? set_endpoint(l, endpoint, style && !strcmp(style, "virtual"), err)
                      : set_amazon(l, style && !strcmp(style, "path"), err);
  if (!rc && !(l->host = host_of(l->origin))) rc = vs_nomem(err);
  return rc;
}

static vs_rc locate_bucket(const char *uri, s3_location *l, char **key, vs_err *err) {
  const char *bucket = uri + 5, *slash = strchr(bucket, '/');
  s3_profile p = {0};
  l->bucket = slash ? strndup(bucket, (size_t)(slash - bucket)) : strdup(bucket);
  *key = strdup(slash ? slash + 1 : "");
  if (!l->bucket || !*key) return vs_nomem(err);
  if (!is_bucket(l->bucket))
    return vs_fail(err, VS_INVALID, "%.200s: '%.100s' is no name of a bucket; write s3://bucket/path", uri, l->bucket);
  if (strlen(*key) > 1024) return vs_fail(err, VS_INVALID, "s3://%s/...: a key has at most 1,024 bytes", l->bucket);
  vs_rc rc = load_profile(&p, err);
  if (!rc) rc = fill(l, &p, err);
  s3_profile_reset(&p);
  return rc;
}

static vs_rc locate_url(const char *url, s3_location *l, char **key, vs_err *err) {
  const char *bundle = s3_env("AWS_CA_BUNDLE");
  if (!is_web_url(url)) /* not shown: what stands before an '@' may be a password */
    return vs_fail(err, VS_INVALID, "a URL must be like https://host/path, without user, password or blanks in it");
  const char *at = strstr(url, "://") + 3, *path = at + strcspn(at, "/?#");
  l->origin = strndup(url, (size_t)(path - url)), l->host = host_of(url), l->base_path = strdup(""), l->region = strdup("");
  l->anonymous = 1;
  *key = strndup(path + (*path == '/'), strcspn(path + (*path == '/'), "#"));
  if (bundle && !(l->ca_bundle = strdup(bundle))) return vs_nomem(err);
  return l->origin && l->host && l->base_path && l->region && *key ? VS_OK : vs_nomem(err);
}

vs_rc s3_locate(const char *uri, s3_location *out, char **key, vs_err *err) {
  vs_rc rc;
  memset(out, 0, sizeof *out);
  *key = NULL;
  if (starts(uri, "s3://")) rc = locate_bucket(uri, out, key, err);
  else if (s3_is_uri(uri)) rc = locate_url(uri, out, key, err);
  else rc = vs_fail(err, VS_INVALID, "%.200s: write s3://bucket/path or https://host/path", uri);
  if (rc) {
    s3_location_reset(out);
    free(*key), *key = NULL;
  }
  return rc;
}

vs_rc s3_relocate(s3_location *l, const char *region, vs_err *err) {
  if (!is_region(region)) return vs_fail(err, VS_INVALID, "S3 names a region that is none");
  char *copy = strdup(region), *old = l->origin ? strstr(l->origin, ".amazonaws.com") : NULL;
  if (!copy) return vs_nomem(err);
  free(l->region);
  l->region = copy;
  if (!old || !l->bucket) return VS_OK; /* an endpoint that was given: only the signature changes */
  s3_location moved = {.bucket = l->bucket, .region = l->region};
  vs_rc rc = set_amazon(&moved, l->base_path[0] != 0, err);
  if (!rc && !(moved.host = host_of(moved.origin))) rc = vs_nomem(err);
  if (rc) {
    free(moved.origin), free(moved.base_path);
    return rc;
  }
  free(l->origin), free(l->base_path), free(l->host);
  l->origin = moved.origin, l->base_path = moved.base_path, l->host = moved.host;
  return VS_OK;
}
