/* s3_profile.c - see s3_profile.h.
 *
 * The format (AWS SDKs and Tools Reference Guide, "Format of the config and credentials files"): [section] lines, `name = value`
 * lines, comments behind # or ; at the start of a line or behind a blank, and nested settings: lines that are indented under a
 * `name =` without value. A file is read line by line and each setting told to a callback with its section and parent.
 */
#include "s3_profile.h"

#include <ctype.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FILE = 1 << 20, MAX_LINE = 8192 };

const char *s3_env(const char *name) {
  const char *v = getenv(name);
  return v && *v ? v : NULL;
}

/* ---- lines ---- */

typedef vs_rc (*setting_fn)(void *ctx, const char *section, const char *parent, const char *name, const char *value, vs_err *err);

static char *trim(char *s) {
  while (isspace((unsigned char)*s)) s++;
  for (size_t n = strlen(s); n && isspace((unsigned char)s[n - 1]);) s[--n] = 0;
  return s;
}

/* A comment behind a value needs a blank before it: keys may hold # and ;. */
static void cut_comment(char *s) {
  for (char *p = s; *p; p++)
    if ((*p == '#' || *p == ';') && (p == s || isspace((unsigned char)p[-1]))) {
      *p = 0;
      return;
    }
}

typedef struct reader { setting_fn fn; void *ctx; char section[256], parent[256]; } reader;

static vs_rc take_line(reader *r, char *line, vs_err *err) {
  int indented = *line == ' ' || *line == '\t';
  cut_comment(line);
  char *s = trim(line), *eq;
  if (*s == '[') {
    char *end = strchr(s, ']');
    if (end) *end = 0;
    snprintf(r->section, sizeof r->section, "%s", trim(s + 1));
    r->parent[0] = 0;
    return r->fn(r->ctx, r->section, "", "", "", err);
  }
  if (!(eq = strchr(s, '='))) return VS_OK;
  *eq = 0;
  char *name = trim(s), *value = trim(eq + 1);
  if (!indented) snprintf(r->parent, sizeof r->parent, "%s", *value ? "" : name);
  return *value ? r->fn(r->ctx, r->section, indented ? r->parent : "", name, value, err) : VS_OK;
}

static vs_rc read_file(const char *path, setting_fn fn, void *ctx, vs_err *err) {
  char line[MAX_LINE];
  reader r = {.fn = fn, .ctx = ctx};
  size_t total = 0;
  vs_rc rc = VS_OK;
  FILE *f = fopen(path, "re");
  if (!f) return errno == ENOENT || errno == ENOTDIR ? VS_OK : vs_fail(err, VS_IO, "%s: %s", path, strerror(errno));
  for (int first = 1; !rc && fgets(line, sizeof line, f); first = 0) {
    char *s = first && !memcmp(line, "\xEF\xBB\xBF", 3) ? line + 3 : line;
    if ((total += strlen(line)) > MAX_FILE || strlen(line) == sizeof line - 1)
      rc = vs_fail(err, VS_INVALID, "%s: too large for a profile file", path);
    else rc = take_line(&r, s, err);
  }
  if (!rc && ferror(f)) rc = vs_fail(err, VS_IO, "%s: cannot be read", path);
  fclose(f);
  OPENSSL_cleanse(line, sizeof line);
  return rc;
}

static vs_rc file_path(const char *variable, const char *name, char out[4096], vs_err *err) {
  const char *given = s3_env(variable), *home = s3_env("HOME");
  struct passwd *pw = home ? NULL : getpwuid(getuid());
  if (!home) home = pw && pw->pw_dir ? pw->pw_dir : "";
  int n = given && given[0] == '~' && given[1] == '/' ? snprintf(out, 4096, "%s%s", home, given + 1)
          : given                                     ? snprintf(out, 4096, "%s", given)
                                                      : snprintf(out, 4096, "%s/.aws/%s", home, name);
  return n < 4096 ? VS_OK : vs_fail(err, VS_INVALID, "%s: path too long", variable);
}

/* ---- settings ---- */

typedef struct search { s3_profile *out; const char *profile; const char *services; int is_config; char found_services[256]; } search;

static vs_rc keep(char **slot, const char *value, vs_err *err) {
  if (*slot) return VS_OK; /* the first one wins: the credentials file is read first */
  *slot = strdup(value);
  return *slot ? VS_OK : vs_nomem(err);
}

/* [default], [profile NAME] (config) or [NAME] (credentials). */
static int is_profile(const search *s, const char *section) {
  if (!strcmp(section, s->profile) && (!s->is_config || !strcmp(section, "default"))) return 1;
  if (!s->is_config || strncmp(section, "profile", 7) || !isspace((unsigned char)section[7])) return 0;
  section += 7;
  while (isspace((unsigned char)*section)) section++;
  return !strcmp(section, s->profile);
}

static vs_rc profile_setting(void *ctx, const char *section, const char *parent, const char *name, const char *value, vs_err *err) {
  search *s = ctx;
  s3_profile *p = s->out;
  if (!is_profile(s, section)) return VS_OK;
  p->found = 1;
  if (!strcmp(parent, "s3")) return strcmp(name, "addressing_style") ? VS_OK : keep(&p->addressing_style, value, err);
  if (*parent) return VS_OK;
  if (!strcmp(name, "aws_access_key_id")) return keep(&p->access_key, value, err);
  if (!strcmp(name, "aws_secret_access_key")) return keep(&p->secret_key, value, err);
  if (!strcmp(name, "aws_session_token")) return keep(&p->session_token, value, err);
  if (!strcmp(name, "region")) return keep(&p->region, value, err);
  if (!strcmp(name, "endpoint_url")) return keep(&p->endpoint_url, value, err);
  if (!strcmp(name, "ca_bundle")) return keep(&p->ca_bundle, value, err);
  if (!strcmp(name, "services")) snprintf(s->found_services, sizeof s->found_services, "%s", value);
  return VS_OK;
}

/* [services NAME], s3 =, endpoint_url = ...: for S3 before the profile's own. */
static vs_rc services_setting(void *ctx, const char *section, const char *parent, const char *name, const char *value, vs_err *err) {
  search *s = ctx;
  if (strncmp(section, "services", 8) || !isspace((unsigned char)section[8]) || strcmp(parent, "s3") || strcmp(name, "endpoint_url"))
    return VS_OK;
  section += 8;
  while (isspace((unsigned char)*section)) section++;
  if (strcmp(section, s->services)) return VS_OK;
  free(s->out->endpoint_url);
  s->out->endpoint_url = NULL;
  return keep(&s->out->endpoint_url, value, err);
}

vs_rc s3_profile_load(const char *name, s3_profile *out, vs_err *err) {
  char credentials[4096], config[4096];
  search s = {.out = out, .profile = name};
  memset(out, 0, sizeof *out);
  vs_rc rc = file_path("AWS_SHARED_CREDENTIALS_FILE", "credentials", credentials, err);
  if (!rc) rc = file_path("AWS_CONFIG_FILE", "config", config, err);
  if (!rc) rc = read_file(credentials, profile_setting, &s, err);
  s.is_config = 1;
  if (!rc) rc = read_file(config, profile_setting, &s, err);
  s.services = s.found_services;
  if (!rc && *s.services) rc = read_file(config, services_setting, &s, err);
  if (rc) s3_profile_reset(out);
  return rc;
}

static void wipe(char *s) {
  if (s) OPENSSL_cleanse(s, strlen(s));
  free(s);
}

void s3_profile_reset(s3_profile *p) {
  wipe(p->access_key), wipe(p->secret_key), wipe(p->session_token);
  free(p->region), free(p->endpoint_url), free(p->addressing_style), free(p->ca_bundle);
  memset(p, 0, sizeof *p);
}
