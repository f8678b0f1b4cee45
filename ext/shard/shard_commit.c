/* shard_commit.c - manifests as files: finding the newest, committing the next one exclusively; see shard_manifest.h. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shard_manifest.h"

/* The version in an exact manifest name; 0: it is none. */
static uint64_t version_of(const char *name) {
  uint64_t inverted = 0;
  if (strncmp(name, "manifest-", 9) || strlen(name) != 34 || strcmp(name + 29, ".json")) return 0;
  for (int i = 9; i < 29; i++) {
    unsigned digit = (unsigned)(name[i] - '0');
    if (digit > 9 || inverted > (UINT64_MAX - digit) / 10) return 0;
    inverted = inverted * 10 + digit;
  }
  return UINT64_MAX - inverted;
}

static vs_rc find_newest(const char *dir, uint64_t *version, vs_err *err) {
  DIR *d = opendir(dir);
  *version = 0;
  if (!d) return vs_fail(err, VS_NOTFOUND, "%s is not a shard: %s", dir, strerror(errno));
  for (struct dirent *e; (e = readdir(d));) {
    uint64_t v = version_of(e->d_name);
    if (v > *version) *version = v;
  }
  closedir(d);
  if (!*version)
    return vs_fail(err, VS_NOTFOUND, "%s is not a shard: it holds no manifest; build one with `vecshard build FILES --out %s`", dir, dir);
  return VS_OK;
}

static vs_rc read_file(const char *path, char **text, size_t *n, vs_err *err) {
  struct stat st;
  *text = NULL, *n = 0;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return vs_fail(err, errno == ENOENT ? VS_NOTFOUND : VS_IO, "%s: %s", path, strerror(errno));
  vs_rc rc = VS_OK;
  if (fstat(fd, &st) || !S_ISREG(st.st_mode)) rc = vs_fail(err, VS_CORRUPT, "%s: not a regular file", path);
  else if (st.st_size > SHARD_MAX_MANIFEST) rc = vs_corrupt(err, "%s: too large for a manifest", path);
  else if (!(*text = malloc((size_t)st.st_size + 1))) rc = vs_nomem(err);
  while (!rc && *n < (size_t)st.st_size) {
    ssize_t got = read(fd, *text + *n, (size_t)st.st_size - *n);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) rc = vs_fail(err, VS_IO, "%s: %s", path, got ? strerror(errno) : "cut short while reading");
    else *n += (size_t)got;
  }
  close(fd);
  if (rc) free(*text), *text = NULL;
  else (*text)[*n] = 0;
  return rc;
}

vs_rc shard_manifest_read(const char *dir, uint64_t version, shard_manifest *out, vs_err *err) {
  char name[64], path[4400], *text;
  size_t n;
  memset(out, 0, sizeof *out);
  vs_rc rc = version ? VS_OK : find_newest(dir, &version, err);
  if (rc) return rc;
  shard_manifest_file(version, name);
  if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path) return vs_fail(err, VS_INVALID, "%s: path too long", dir);
  vs_err local = {0};
  rc = read_file(path, &text, &n, &local);
  if (rc == VS_NOTFOUND) return vs_fail(err, rc, "%s has no version %" PRIu64, dir, version);
  if (rc) return vs_fail(err, rc, "%s", local.text);
  rc = shard_manifest_parse(text, n, path, out, err);
  free(text);
  if (!rc && out->version != version) {
    rc = vs_corrupt(err, "%s: damaged manifest: it states version %" PRIu64, path, out->version);
    shard_manifest_reset(out);
  }
  return rc;
}

/* ---- committing ---- */

static vs_rc write_synced(int fd, const char *text, const char *path, vs_err *err) {
  for (size_t n = strlen(text); n;) {
    ssize_t w = write(fd, text, n);
    if (w < 0 && errno == EINTR) continue;
    if (w <= 0) return vs_fail(err, VS_IO, "%s: write failed: %s", path, strerror(errno));
    text += w, n -= (size_t)w;
  }
  return fsync(fd) ? vs_fail(err, VS_IO, "%s: fsync: %s", path, strerror(errno)) : VS_OK;
}

static vs_rc sync_dir(const char *dir, vs_err *err) {
  int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  vs_rc rc = fd < 0 || fsync(fd) ? vs_fail(err, VS_IO, "%s: fsync: %s", dir, strerror(errno)) : VS_OK;
  if (fd >= 0) close(fd);
  return rc;
}

vs_rc shard_manifest_commit(const char *dir, const shard_manifest *m, vs_err *err) {
  char name[64], final[4400], temp[4460], *json = NULL;
  shard_manifest_file(m->version, name);
  if (snprintf(final, sizeof final, "%s/%s", dir, name) >= (int)sizeof final) return vs_fail(err, VS_INVALID, "%s: path too long", dir);
  snprintf(temp, sizeof temp, "%s/.%s.tmp-XXXXXX", dir, name);
  vs_rc rc = shard_manifest_print(m, &json, err);
  if (rc) return rc;
  int fd = mkostemp(temp, O_CLOEXEC);
  if (fd < 0) {
    free(json);
    return vs_fail(err, VS_IO, "%s: cannot write: %s", dir, strerror(errno));
  }
  rc = fchmod(fd, 0644) ? vs_fail(err, VS_IO, "%s: %s", temp, strerror(errno)) : write_synced(fd, json, temp, err);
  close(fd);
  free(json);
  if (!rc && link(temp, final))
    rc = errno == EEXIST ? vs_fail(err, VS_EXISTS, "%s: another writer committed version %" PRIu64 " first; nothing is lost: run the command again",
                                   dir, m->version)
                         : vs_fail(err, VS_IO, "%s: cannot create: %s", final, strerror(errno));
  unlink(temp);
  return rc ? rc : sync_dir(dir, err);
}

/* ---- folders ---- */

int shard_dir_is_shard(const char *dir) {
  DIR *d = opendir(dir);
  int found = 0;
  if (!d) return 0;
  for (struct dirent *e; !found && (e = readdir(d));) found = version_of(e->d_name) != 0;
  closedir(d);
  return found;
}

void shard_names_free(char **names, size_t n) {
  for (size_t i = 0; names && i < n; i++) free(names[i]);
  free(names);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static vs_rc add_child(const char *dir, const char *name, char ***names, size_t *n, vs_err *err) {
  char path[4400];
  if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path || !shard_dir_is_shard(path)) return VS_OK;
  char **grown = realloc(*names, (*n + 1) * sizeof *grown), *copy = strdup(name);
  if (grown) *names = grown;
  if (!grown || !copy) {
    free(copy);
    return vs_nomem(err);
  }
  grown[(*n)++] = copy;
  return VS_OK;
}

vs_rc shard_dir_list(const char *dir, char ***names, size_t *n, vs_err *err) {
  *names = NULL, *n = 0;
  DIR *d = opendir(dir);
  vs_rc rc = VS_OK;
  if (!d) return vs_fail(err, VS_NOTFOUND, "%s: %s", dir, strerror(errno));
  for (struct dirent *e; !rc && (e = readdir(d));)
    if (e->d_name[0] != '.' && e->d_type != DT_REG) rc = add_child(dir, e->d_name, names, n, err);
  closedir(d);
  if (rc) shard_names_free(*names, *n), *names = NULL, *n = 0;
  else if (*n) qsort(*names, *n, sizeof **names, by_name);
  return rc;
}
