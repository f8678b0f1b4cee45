/* s3_config.c - see s3_config.h.
 *
 * A URI is cut, settings are gathered (environment, then profile files), and both become a location: origin, Host header and
 * what stands before the key. The environment and the files are read at each call and nothing is kept: a host that changes
 * them sees the change with the next object it opens.
 *
 * Addresses, profile values and what stands where a bucket's name should be are never repeated in messages: people put
 * passwords there. The message names the setting instead.
 */
#include "s3_config.h"

#include <arpa/inet.h>
#include <openssl/crypto.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "s3_profile.h"

#define RIGHT_URI "s3://bucket/key or https://host/path"
#define RIGHT_ENDPOINT "http://127.0.0.1:9000 or https://host/prefix"

enum {
  HOST_MAX = 253,   /* characters of a DNS name */
  BUCKET_MIN = 3,
  BUCKET_MAX = 63,
  REGION_MAX = 63,  /* a label of a host's name */
  KEY_MAX = 1024    /* bytes, of all stores that we know */
};

static char *text_of(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static char *text_of(const char *fmt, ...) {
  char *out;
  va_list ap;
  va_start(ap, fmt);
  if (vasprintf(&out, fmt, ap) < 0) out = NULL;
  va_end(ap);
  return out;
}

/* ---- characters, without the host's locale ---- */

static char lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c; }
static int is_digit(char c) { return c >= '0' && c <= '9'; }
static int is_lower_or_digit(char c) { return (c >= 'a' && c <= 'z') || is_digit(c); }

/* prefix in lower case. Returns its length when text begins with it in any case, else 0. */
static size_t begins(const char *text, const char *prefix) {
  size_t n = 0;
  while (prefix[n] && lower(text[n]) == prefix[n]) n++;
  return prefix[n] ? 0 : n;
}

static int is_word(const char *text, const char *word) {
  const size_t n = begins(text, word);
  return n && !text[n];
}
static int is_on(const char *value) { return value && (is_word(value, "1") || is_word(value, "true") || is_word(value, "yes")); }

int s3_is_uri(const char *path) { return path && (begins(path, "s3://") || begins(path, "http://") || begins(path, "https://")); }

/* ---- addresses ---- */

typedef struct url {
  const char *scheme;       /* "http" or "https" */
  char host[HOST_MAX + 10]; /* lower case, IPv6 in brackets, ":port" unless it is the scheme's */
  int is_number;            /* an IP address: no name can stand before it */
  const char *path;         /* inside the text: from '/', '?' or the end */
} url;

/* "", or ":port" at the end of a host. Appends it unless it is the default. */
static const char *parse_port(const char *at, size_t n, url *u) {
  long port = 0;
  if (!n) return NULL;
  if (at[0] != ':' || n < 2 || n > 6) return "it has no port number behind its host";
  for (size_t i = 1; i < n; i++) {
    if (!is_digit(at[i])) return "it has no port number behind its host";
    port = port * 10 + (at[i] - '0');
  }
  if (port < 1 || port > 65535) return "its port is not in 1 .. 65535";
  const size_t used = strlen(u->host);
  if (port != (u->scheme[4] ? 443 : 80)) snprintf(u->host + used, sizeof u->host - used, ":%ld", port);
  return NULL;
}

/* n characters between the brackets. */
static int is_ipv6(const char *text, size_t n) {
  char copy[INET6_ADDRSTRLEN];
  struct in6_addr address;
  if (n >= sizeof copy) return 0;
  memcpy(copy, text, n), copy[n] = 0;
  return strlen(copy) == n && inet_pton(AF_INET6, copy, &address) == 1;
}

static const char *parse_host(const char *at, size_t n, url *u) {
  struct in_addr address;
  const char *close = at[0] == '[' ? memchr(at, ']', n) : NULL, *colon = memchr(at, ':', n);
  const size_t name_chars = close ? (size_t)(close - at) + 1 : colon ? (size_t)(colon - at) : n;
  if (!name_chars) return "it names no host";
  if (name_chars > HOST_MAX) return "its host is too long";
  if (close && !is_ipv6(at + 1, name_chars - 2)) return "it has no IPv6 address in its brackets";
  for (size_t i = 0; i < name_chars; i++) {
    u->host[i] = lower(at[i]);
    if (!close && !is_lower_or_digit(u->host[i]) && !strchr(".-_", u->host[i])) return "its host holds a character that no name has";
  }
  u->host[name_chars] = 0;
  u->is_number = close || inet_pton(AF_INET, u->host, &address) == 1;
  return parse_port(at + name_chars, n - name_chars, u);
}

/* NULL, or what is wrong: a sentence that begins with "it" and does not repeat the text. */
static const char *parse_url(const char *text, url *u) {
  memset(u, 0, sizeof *u);
  const size_t scheme_chars = begins(text, "https://") ? 8 : begins(text, "http://");
  if (!scheme_chars) return "it does not begin with http:// or https://";
  u->scheme = scheme_chars == 8 ? "https" : "http";
  const char *at = text + scheme_chars;
  const size_t n = strcspn(at, "/?#");
  if (memchr(at, '@', n)) return "it holds a user name or a password; those belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY";
  u->path = at + n;
  for (const char *p = u->path; *p; p++) {
    if ((unsigned char)*p <= ' ' || *p == 0x7f) return "it holds a space or a control character, which is written %20 and so on";
    if (*p == '#') return "it holds a '#', which is written %23";
  }
  return parse_host(at, n, u);
}

/* ---- settings ---- */

typedef struct settings {
  char *region;        /* never NULL once gathered */
  char *endpoint;      /* NULL: Amazon's */
  char *style;         /* "path", "virtual", "auto" or NULL */
  char *ca_bundle;     /* NULL: the system's */
  char endpoint_from[160]; /* for messages: the variable, or the property with its profile */
} settings;

static void settings_reset(settings *s) {
  free(s->region), free(s->endpoint), free(s->style), free(s->ca_bundle);
  memset(s, 0, sizeof *s);
}

static vs_rc copy(const char *text, char **out, vs_err *err) { return (*out = strdup(text)) ? VS_OK : vs_nomem(err); }

/* The first variable that is set, else the profile's property. second may be NULL. */
static vs_rc setting(const char *first, const char *second, const s3_profile *p, const char *property, char **out, vs_err *err) {
  const char *value = s3_env(first);
  if (!value && second) value = s3_env(second);
  return value ? copy(value, out, err) : s3_profile_get(p, NULL, property, out, err);
}

/* Endpoints may be told to be ignored, by the environment or the profile. */
static vs_rc ignores_endpoints(const s3_profile *p, int *out, vs_err *err) {
  char *value = NULL;
  vs_rc rc = setting("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", NULL, p, "ignore_configured_endpoint_urls", &value, err);
  *out = is_on(value);
  free(value);
  return rc;
}

static vs_rc gather_endpoint(const s3_profile *p, settings *s, vs_err *err) {
  int ignored;
  vs_rc rc = ignores_endpoints(p, &ignored, err);
  if (rc || ignored) return rc;
  const char *variable = s3_env("AWS_ENDPOINT_URL_S3") ? "AWS_ENDPOINT_URL_S3" : "AWS_ENDPOINT_URL", *value = s3_env(variable);
  if (value) {
    snprintf(s->endpoint_from, sizeof s->endpoint_from, "%s", variable);
    return copy(value, &s->endpoint, err);
  }
  snprintf(s->endpoint_from, sizeof s->endpoint_from, "endpoint_url of profile \"%s\"", p->shown);
  rc = s3_profile_service_endpoint(p, &s->endpoint, err);
  return rc || s->endpoint ? rc : s3_profile_get(p, NULL, "endpoint_url", &s->endpoint, err);
}

static vs_rc check_region(const char *what, const char *region, vs_err *err) {
  size_t n = 0;
  while (is_lower_or_digit(region[n]) || region[n] == '-') n++;
  if (!region[n] && n && n <= REGION_MAX && region[0] != '-' && region[n - 1] != '-') return VS_OK;
  return vs_fail(err, VS_INVALID, "%s is no name of a region: one looks like us-east-1, of a-z, 0-9 and '-'", what);
}

static vs_rc gather_region(const s3_profile *p, settings *s, vs_err *err) {
  const char *what = s3_env("AWS_REGION") ? "AWS_REGION" : s3_env("AWS_DEFAULT_REGION") ? "AWS_DEFAULT_REGION" : "the profile's region";
  vs_rc rc = setting("AWS_REGION", "AWS_DEFAULT_REGION", p, "region", &s->region, err);
  if (!rc && !s->region) rc = copy("us-east-1", &s->region, err);
  return rc ? rc : check_region(what, s->region, err);
}

static vs_rc gather_style(const s3_profile *p, settings *s, vs_err *err) {
  vs_rc rc = s3_profile_get(p, "s3", "addressing_style", &s->style, err);
  if (rc || !s->style || is_word(s->style, "path") || is_word(s->style, "virtual") || is_word(s->style, "auto")) return rc;
  return vs_fail(err, VS_INVALID, "addressing_style of profile \"%s\" is path, virtual or auto", p->shown);
}

static vs_rc gather(settings *s, vs_err *err) {
  s3_profile p;
  vs_rc rc = s3_profile_load(&p, err);
  if (rc) return rc;
  rc = gather_region(&p, s, err);
  if (!rc) rc = gather_endpoint(&p, s, err);
  if (!rc) rc = gather_style(&p, s, err);
  if (!rc) rc = setting("AWS_CA_BUNDLE", NULL, &p, "ca_bundle", &s->ca_bundle, err);
  s3_profile_reset(&p);
  return rc;
}

/* ---- buckets ---- */

/* What S3 allows, and what it allowed until 2018: upper case and '_'. */
static vs_rc check_bucket(const char *name, size_t n, vs_err *err) {
  if (memchr(name, '@', n))
    return vs_fail(err, VS_INVALID, "an s3:// URI holds no credentials; those belong into AWS_ACCESS_KEY_ID and "
                                    "AWS_SECRET_ACCESS_KEY, and the URI is " RIGHT_URI);
  for (size_t i = 0; i < n; i++)
    if (!is_lower_or_digit(lower(name[i])) && !strchr(".-_", name[i]))
      return vs_fail(err, VS_INVALID, "in an s3:// URI the name of the bucket holds a character other than letters, digits, '.', '-' "
                                      "and '_'; a right one is " RIGHT_URI);
  if (n < BUCKET_MIN || n > BUCKET_MAX)
    return vs_fail(err, VS_INVALID, "the name of a bucket has 3 to 63 characters, not %zu as in this s3:// URI; a right one is " RIGHT_URI, n);
  if (strchr(".-", name[0]) || strchr(".-", name[n - 1]) || memmem(name, n, "..", 2))
    return vs_fail(err, VS_INVALID, "\"%.*s\" is no bucket: a name begins and ends with a letter or a digit and holds no \"..\"", (int)n, name);
  return VS_OK;
}

/* The certificate for *.s3.REGION.amazonaws.com covers one label, and a host's name has no upper case and no '_'. */
static int fits_host(const char *bucket) {
  while (is_lower_or_digit(*bucket) || *bucket == '-') bucket++;
  return !*bucket;
}

/* Sets host, origin and base_path. in_host: the bucket stands before the host, else at the end of the path. */
static vs_rc set_place(s3_location *l, const char *scheme, int in_host, const char *host, const char *path, vs_err *err) {
  l->host = in_host ? text_of("%s.%s", l->bucket, host) : strdup(host);
  l->origin = l->host ? text_of("%s://%s", scheme, l->host) : NULL;
  l->base_path = in_host ? strdup(path) : text_of("%s/%s", path, l->bucket);
  return l->origin && l->base_path ? VS_OK : vs_nomem(err);
}

static vs_rc place_at_amazon(s3_location *l, const settings *s, vs_err *err) {
  char host[REGION_MAX + 32];
  const int in_china = begins(s->region, "cn-") != 0, by_path = s->style && is_word(s->style, "path");
  snprintf(host, sizeof host, "s3.%s.amazonaws.com%s", s->region, in_china ? ".cn" : "");
  return set_place(l, "https", !by_path && fits_host(l->bucket), host, "", err);
}

/* Path style unless asked for otherwise: a server of one's own rarely has a name per bucket. */
static vs_rc place_at_endpoint(s3_location *l, const settings *s, vs_err *err) {
  url u;
  const char *wrong = parse_url(s->endpoint, &u);
  if (!wrong && strchr(u.path, '?')) wrong = "it holds a query";
  if (wrong) return vs_fail(err, VS_INVALID, "%s: %s; a right one looks like " RIGHT_ENDPOINT, s->endpoint_from, wrong);
  size_t n = strlen(u.path);
  while (n && u.path[n - 1] == '/') n--;
  char *path = strndup(u.path, n);
  if (!path) return vs_nomem(err);
  const int in_host = s->style && is_word(s->style, "virtual") && !u.is_number && fits_host(l->bucket);
  vs_rc rc = set_place(l, u.scheme, in_host, u.host, path, err);
  free(path);
  return rc;
}

/* at: behind "s3://" */
static vs_rc locate_bucket(const char *at, s3_location *l, char **key, vs_err *err) {
  settings s = {0};
  const size_t n = strcspn(at, "/");
  const char *rest = at + n + (at[n] == '/');
  vs_rc rc = check_bucket(at, n, err);
  if (rc) return rc;
  if (strlen(rest) > KEY_MAX) return vs_fail(err, VS_INVALID, "the key of an s3:// URI has at most %d bytes, not %zu", KEY_MAX, strlen(rest));
  l->bucket = strndup(at, n);
  *key = strdup(rest);
  rc = l->bucket && *key ? gather(&s, err) : vs_nomem(err);
  if (!rc) rc = s.endpoint ? place_at_endpoint(l, &s, err) : place_at_amazon(l, &s, err);
  l->region = s.region, l->ca_bundle = s.ca_bundle;
  s.region = s.ca_bundle = NULL;
  l->anonymous = is_on(s3_env("AWS_NO_SIGN_REQUEST"));
  settings_reset(&s);
  return rc;
}

/* A plain URL asks no profile: it needs nothing of it, and a damaged file is no reason to refuse it. */
static vs_rc locate_url(const char *uri, s3_location *l, char **key, vs_err *err) {
  url u;
  const char *wrong = parse_url(uri, &u), *ca_bundle = s3_env("AWS_CA_BUNDLE");
  if (wrong) return vs_fail(err, VS_INVALID, "this URL cannot be opened: %s; a right one is " RIGHT_URI, wrong);
  l->host = strdup(u.host);
  l->origin = text_of("%s://%s", u.scheme, u.host);
  l->base_path = strdup("");
  l->region = strdup("us-east-1");
  *key = strdup(u.path + (u.path[0] == '/'));
  l->anonymous = 1;
  if (!l->host || !l->origin || !l->base_path || !l->region || !*key) return vs_nomem(err);
  return ca_bundle ? copy(ca_bundle, &l->ca_bundle, err) : VS_OK;
}

vs_rc s3_locate(const char *uri, s3_location *out, char **key, vs_err *err) {
  vs_rc rc;
  memset(out, 0, sizeof *out);
  *key = NULL;
  const size_t n = uri ? begins(uri, "s3://") : 0;
  if (n) rc = locate_bucket(uri + n, out, key, err);
  else if (s3_is_uri(uri)) rc = locate_url(uri, out, key, err);
  else rc = vs_fail(err, VS_INVALID, "this is no address of an object: a right one is " RIGHT_URI);
  if (rc) {
    s3_location_reset(out);
    free(*key), *key = NULL;
  }
  return rc;
}

void s3_location_reset(s3_location *l) {
  free(l->bucket), free(l->origin), free(l->host), free(l->base_path), free(l->region), free(l->ca_bundle);
  memset(l, 0, sizeof *l);
}

/* ---- another region ---- */

/* Where the host holds the region as a label of its own, NULL when nowhere. The bucket's label does not count: it may have
 * a region's name. */
static char *region_in_host(const s3_location *l) {
  const size_t n = strlen(l->region), bucket_chars = l->bucket ? strlen(l->bucket) : 0, path_chars = strlen(l->base_path);
  const int by_path = path_chars > bucket_chars && l->base_path[path_chars - bucket_chars - 1] == '/' &&
                      !strcmp(l->base_path + path_chars - bucket_chars, l->bucket);
  char *from = l->host + (by_path ? 0 : bucket_chars), *found = NULL;
  for (char *at = from; (at = strstr(at, l->region)); at++)
    if ((at == l->host || at[-1] == '.') && (at[n] == '.' || at[n] == ':' || !at[n])) found = at;
  return found;
}

vs_rc s3_relocate(s3_location *l, const char *region, vs_err *err) {
  vs_rc rc = check_region("what the store names as the bucket's region", region, err);
  if (rc) return rc;
  const char *at = l->bucket ? region_in_host(l) : NULL;
  const int scheme_chars = (int)strcspn(l->origin, ":");
  char *copied = strdup(region);
  char *host = at ? text_of("%.*s%s%s", (int)(at - l->host), l->host, region, at + strlen(l->region)) : strdup(l->host);
  char *origin = host ? text_of("%.*s://%s", scheme_chars, l->origin, host) : NULL;
  if (!copied || !host || !origin) {
    free(copied), free(host), free(origin);
    return vs_nomem(err);
  }
  free(l->region), free(l->host), free(l->origin);
  l->region = copied, l->host = host, l->origin = origin;
  return VS_OK;
}

/* ---- credentials ---- */

static vs_rc check_credential(const char *name, const char *value, vs_err *err) {
  if (!s3_has_control(value, strlen(value))) return VS_OK;
  return vs_fail(err, VS_INVALID, "%s holds a line break or another control character", name);
}

/* Leaves *out empty when neither key is set. */
static vs_rc from_environment(s3_credentials *out, vs_err *err) {
  static const char *const names[] = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"};
  char **const to[] = {&out->access_key, &out->secret_key, &out->session_token};
  const char *access = s3_env(names[0]), *secret = s3_env(names[1]);
  if (!access && !secret) return VS_OK;
  if (!access || !secret)
    return vs_fail(err, VS_INVALID, "%s is set, but %s is not: set both, or neither", names[access ? 0 : 1], names[access ? 1 : 0]);
  vs_rc rc = VS_OK;
  for (int i = 0; i < 3 && !rc; i++) {
    const char *value = s3_env(names[i]);
    if (!value) continue;
    rc = check_credential(names[i], value, err);
    if (!rc) rc = copy(value, to[i], err);
  }
  return rc;
}

/* All from one file: a key of one and a secret of the other would fit nothing. */
static vs_rc from_file(const s3_profile *p, int file, s3_credentials *out, vs_err *err) {
  vs_rc rc = s3_profile_get_from(p, file, NULL, "aws_access_key_id", &out->access_key, err);
  if (!rc) rc = s3_profile_get_from(p, file, NULL, "aws_secret_access_key", &out->secret_key, err);
  if (rc || (!out->access_key && !out->secret_key)) return rc;
  if (!out->access_key || !out->secret_key)
    return vs_fail(err, VS_INVALID, "profile \"%s\" in %.300s has %s, but no %s", p->shown, p->file[file].path,
                   out->access_key ? "aws_access_key_id" : "aws_secret_access_key",
                   out->access_key ? "aws_secret_access_key" : "aws_access_key_id");
  return s3_profile_get_from(p, file, NULL, "aws_session_token", &out->session_token, err);
}

/* " (No such file or directory)", or nothing for a file that was read. */
static void describe(const s3_profile_file *f, char *out, size_t room) {
  if (!f->path) snprintf(out, room, "no file (HOME is not set)");
  else snprintf(out, room, "%.150s%s%s%s", f->path, f->failure ? " (" : "", f->failure ? strerror(f->failure) : "", f->failure ? ")" : "");
}

static vs_rc not_found(const s3_profile *p, vs_err *err) {
  char credentials[250], config[250];
  describe(&p->file[S3_PROFILE_CREDENTIALS], credentials, sizeof credentials);
  describe(&p->file[S3_PROFILE_CONFIG], config, sizeof config);
  return vs_fail(err, VS_NOTFOUND,
                 "no credentials for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set, and profile \"%s\" has no keys in %s "
                 "or %s. Set the two variables, or AWS_PROFILE, or AWS_NO_SIGN_REQUEST=1 for a public bucket; for a role or single "
                 "sign-on: eval \"$(aws configure export-credentials --format env)\"",
                 p->shown, credentials, config);
}

static vs_rc from_profile(s3_credentials *out, vs_err *err) {
  s3_profile p;
  vs_rc rc = s3_profile_load(&p, err);
  if (rc) return rc;
  rc = from_file(&p, S3_PROFILE_CREDENTIALS, out, err);
  if (!rc && !out->access_key) rc = from_file(&p, S3_PROFILE_CONFIG, out, err);
  if (!rc && !out->access_key) rc = not_found(&p, err);
  s3_profile_reset(&p);
  return rc;
}

vs_rc s3_credentials_load(s3_credentials *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  vs_rc rc = from_environment(out, err);
  if (!rc && !out->access_key) rc = from_profile(out, err);
  if (rc) s3_credentials_reset(out);
  return rc;
}

static void wipe(char *text) {
  if (text) OPENSSL_cleanse(text, strlen(text));
  free(text);
}

void s3_credentials_reset(s3_credentials *c) {
  wipe(c->access_key), wipe(c->secret_key), wipe(c->session_token);
  memset(c, 0, sizeof *c);
}
