/* s3_profile.c - see s3_profile.h.
 *
 * Nothing is parsed ahead: a value is looked up by one walk over the text, line by line, so that there is no structure to
 * build, to bound and to free. The files have a few lines, and a walk over the largest allowed takes a millisecond or two.
 * Texts are slices of the file: never NUL terminated until a value is copied out.
 */
#include "s3_profile.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_MAX = 1 << 20 }; /* bytes: a thousand times what people have */

const char *s3_env(const char *name) {
  const char *value = getenv(name);
  return value && value[0] ? value : NULL;
}

int s3_has_control(const char *p, size_t n) {
  for (size_t i = 0; i < n; i++)
    if ((unsigned char)p[i] < 0x20 || p[i] == 0x7f) return 1;
  return 0;
}

/* ---- slices ---- */

typedef struct slice { const char *p; size_t n; } slice;

static int is_blank(char c) { return c == ' ' || c == '\t' || c == '\r'; }

static slice trim(slice s) {
  while (s.n && is_blank(s.p[0])) s.p++, s.n--;
  while (s.n && is_blank(s.p[s.n - 1])) s.n--;
  return s;
}

static int equals(slice s, const char *word) { return s.n == strlen(word) && !memcmp(s.p, word, s.n); }

/* Cuts the next line off; 0 at the end. */
static int next_line(slice *rest, slice *line) {
  if (!rest->n) return 0;
  const char *end = memchr(rest->p, '\n', rest->n);
  const size_t n = end ? (size_t)(end - rest->p) : rest->n, taken = n + (end != NULL);
  *line = (slice){rest->p, n};
  rest->p += taken, rest->n -= taken;
  return 1;
}

/* "name = value # comment" */
static int split_property(slice line, slice *name, slice *value) {
  const char *at = memchr(line.p, '=', line.n);
  if (!at) return 0;
  *name = trim((slice){line.p, (size_t)(at - line.p)});
  *value = (slice){at + 1, line.n - (size_t)(at - line.p) - 1};
  for (size_t i = 1; i < value->n; i++)
    if ((value->p[i] == '#' || value->p[i] == ';') && is_blank(value->p[i - 1])) value->n = i;
  *value = trim(*value);
  return 1;
}

/* ---- sections ---- */

typedef struct section {
  slice text;       /* of the whole file */
  const char *kind; /* "profile", "services", or NULL: the brackets hold the name alone */
  const char *name;
} section;

/* line: trimmed, begins with '['. A header without its ']' names no section, so that what follows belongs to none. */
static int is_header_of(slice line, const section *s) {
  const char *close = memchr(line.p, ']', line.n);
  if (!close) return 0;
  slice inner = trim((slice){line.p + 1, (size_t)(close - line.p) - 1});
  if (s->kind) {
    const size_t n = strlen(s->kind);
    if (inner.n <= n || memcmp(inner.p, s->kind, n) != 0 || !is_blank(inner.p[n])) return 0;
    inner = trim((slice){inner.p + n, inner.n - n});
    const int quoted = inner.n >= 2 && (inner.p[0] == '"' || inner.p[0] == '\'') && inner.p[inner.n - 1] == inner.p[0];
    if (quoted) inner.p++, inner.n -= 2;
  }
  return equals(inner, s->name);
}

static int has_section(const section *s) {
  slice rest = s->text, line;
  while (next_line(&rest, &line)) {
    line = trim(line);
    if (line.n && line.p[0] == '[' && is_header_of(line, s)) return 1;
  }
  return 0;
}

/* The last value of a property; .p is NULL when there is none. A line is nested when it is indented deeper than the last
 * one that is not; below a property with a value it continues that value, which nothing here needs. */
static slice find(const section *s, const char *parent, const char *property) {
  slice rest = s->text, line, found = {NULL, 0}, name, value, above = {NULL, 0};
  size_t indent_above = SIZE_MAX;
  int inside = 0;
  while (next_line(&rest, &line)) {
    const slice body = trim(line);
    if (!body.n || body.p[0] == '#' || body.p[0] == ';') continue;
    if (body.p[0] == '[') {
      inside = is_header_of(body, s), indent_above = SIZE_MAX;
      continue;
    }
    if (!inside || !split_property(body, &name, &value)) continue;
    const size_t indent = (size_t)(body.p - line.p);
    const int nested = indent > indent_above;
    if (!nested) indent_above = indent, above = value.n ? (slice){NULL, 0} : name;
    const int wanted = parent ? nested && above.p && equals(above, parent) : !nested;
    if (wanted && equals(name, property)) found = value;
  }
  return found;
}

/* ---- files ---- */

/* The path that the environment names, "~/" being HOME, else the one below HOME. *path stays NULL when there is no HOME. */
static vs_rc file_path(const char *variable, const char *below_home, char **path, vs_err *err) {
  const char *given = s3_env(variable), *home = s3_env("HOME");
  if (given && strncmp(given, "~/", 2) == 0 && home) below_home = given + 2, given = NULL;
  if (!given && !home) return VS_OK;
  const size_t n = given ? strlen(given) : strlen(home) + 1 + strlen(below_home);
  if (!(*path = malloc(n + 1))) return vs_nomem(err);
  if (given) memcpy(*path, given, n + 1);
  else snprintf(*path, n + 1, "%s/%s", home, below_home);
  return VS_OK;
}

/* Up to room bytes. Read by hand: stdio would keep a copy of the secrets. */
static vs_rc read_text(int fd, s3_profile_file *f, size_t room, vs_err *err) {
  while (f->n < room) {
    const ssize_t n = read(fd, f->text + f->n, room - f->n);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return vs_fail(err, VS_IO, "%.300s: cannot read: %s", f->path, strerror(errno));
    if (!n) break;
    f->n += (size_t)n;
  }
  return VS_OK;
}

/* A character device is legal for the sake of /dev/null; a pipe could block. What is appended to a file meanwhile is not
 * read, so that the text needs no room for it. */
static vs_rc read_open(int fd, s3_profile_file *f, vs_err *err) {
  struct stat st;
  if (fstat(fd, &st) || !(S_ISREG(st.st_mode) || S_ISCHR(st.st_mode)))
    return vs_fail(err, VS_INVALID, "%.300s: not a regular file", f->path);
  const off_t room = S_ISREG(st.st_mode) && st.st_size <= FILE_MAX ? st.st_size : FILE_MAX + 1;
  if (!(f->text = malloc(room ? (size_t)room : 1))) return vs_nomem(err);
  vs_rc rc = read_text(fd, f, (size_t)room, err);
  if (rc || f->n <= FILE_MAX) return rc;
  return vs_fail(err, VS_INVALID, "%.300s: larger than 1 MiB, this is no AWS profile file", f->path);
}

static vs_rc load_file(s3_profile_file *f, const char *variable, const char *below_home, vs_err *err) {
  vs_rc rc = file_path(variable, below_home, &f->path, err);
  if (rc || !f->path) return rc;
  const int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) {
    f->failure = errno;
    /* A home folder that a service may not enter is common and no mistake; a file that somebody named is meant. */
    if (errno == ENOENT || errno == ENOTDIR || !s3_env(variable)) return VS_OK;
    return vs_fail(err, VS_IO, "%s: cannot open %.300s: %s", variable, f->path, strerror(errno));
  }
  rc = read_open(fd, f, err);
  close(fd);
  return rc;
}

/* The file's text behind a byte order mark. */
static slice text_of(const s3_profile_file *f) {
  const size_t mark = f->n >= 3 && !memcmp(f->text, "\xef\xbb\xbf", 3) ? 3 : 0;
  return f->text ? (slice){f->text + mark, f->n - mark} : (slice){"", 0};
}

/* ---- profiles ---- */

/* In the config file "[profile default]" counts before "[default]". */
static section section_of(const s3_profile *p, int file) {
  section s = {text_of(&p->file[file]), file == S3_PROFILE_CONFIG ? "profile" : NULL, p->name};
  if (file == S3_PROFILE_CONFIG && !strcmp(p->name, "default") && !has_section(&s)) s.kind = NULL;
  return s;
}

static void show(const char *name, char out[S3_SHOWN_CHARS + 1]) {
  size_t i = 0;
  for (; name[i] && i < S3_SHOWN_CHARS; i++) out[i] = name[i] < 0x20 || name[i] > 0x7e ? '?' : name[i];
  out[i] = 0;
}

static vs_rc check_profile(const s3_profile *p, vs_err *err) {
  if (!s3_env("AWS_PROFILE")) return VS_OK;
  for (int i = 0; i < S3_PROFILE_FILES; i++) {
    const section s = section_of(p, i);
    if (has_section(&s)) return VS_OK;
  }
  return vs_fail(err, VS_INVALID, "AWS_PROFILE is \"%s\", but there is neither [%s] in %.300s nor [%s%s] in %.300s", p->shown, p->shown,
                 p->file[0].path ? p->file[0].path : "a credentials file", strcmp(p->name, "default") ? "profile " : "", p->shown,
                 p->file[1].path ? p->file[1].path : "a config file");
}

vs_rc s3_profile_load(s3_profile *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  const char *name = s3_env("AWS_PROFILE");
  out->name = name ? name : "default";
  show(out->name, out->shown);
  vs_rc rc = load_file(&out->file[S3_PROFILE_CREDENTIALS], "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials", err);
  if (!rc) rc = load_file(&out->file[S3_PROFILE_CONFIG], "AWS_CONFIG_FILE", ".aws/config", err);
  if (!rc) rc = check_profile(out, err);
  if (rc) s3_profile_reset(out);
  return rc;
}

void s3_profile_reset(s3_profile *p) {
  for (int i = 0; i < S3_PROFILE_FILES; i++) {
    s3_profile_file *f = &p->file[i];
    if (f->text) OPENSSL_cleanse(f->text, f->n);
    free(f->text), free(f->path);
  }
  memset(p, 0, sizeof *p);
}

static vs_rc copy_value(slice found, const char *property, const char *path, char **value, vs_err *err) {
  if (!found.n) return VS_OK;
  if (s3_has_control(found.p, found.n))
    return vs_fail(err, VS_INVALID, "%.300s: the value of %s holds a control character", path, property);
  *value = strndup(found.p, found.n);
  return *value ? VS_OK : vs_nomem(err);
}

vs_rc s3_profile_get_from(const s3_profile *p, int file, const char *parent, const char *property, char **value, vs_err *err) {
  const section s = section_of(p, file);
  *value = NULL;
  return copy_value(find(&s, parent, property), property, p->file[file].path, value, err);
}

vs_rc s3_profile_get(const s3_profile *p, const char *parent, const char *property, char **value, vs_err *err) {
  vs_rc rc = s3_profile_get_from(p, S3_PROFILE_CREDENTIALS, parent, property, value, err);
  return rc || *value ? rc : s3_profile_get_from(p, S3_PROFILE_CONFIG, parent, property, value, err);
}

vs_rc s3_profile_service_endpoint(const s3_profile *p, char **value, vs_err *err) {
  const s3_profile_file *f = &p->file[S3_PROFILE_CONFIG];
  char *name;
  *value = NULL;
  vs_rc rc = s3_profile_get(p, NULL, "services", &name, err);
  if (rc || !name) return rc;
  const section s = {text_of(f), "services", name};
  if (has_section(&s)) rc = copy_value(find(&s, "s3", "endpoint_url"), "endpoint_url", f->path, value, err);
  else rc = vs_fail(err, VS_INVALID, "profile \"%s\" names a services section that is not in %.300s", p->shown,
                    f->path ? f->path : "a config file");
  free(name);
  return rc;
}
