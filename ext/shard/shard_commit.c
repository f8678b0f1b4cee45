/* shard_commit.c - manifests as files: finding the newest, committing the next one exclusively; see shard_manifest.h.
 *
 * A commit writes .manifest-<digits>.tmp-<pid>-<random>, syncs it, links it to its final name and syncs the folder. The
 * name with a dot is no manifest name, so a reader never sees a half-written one, and nothing is left of a commit that
 * failed.
 */
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

uint64_t shard_manifest_version(const char *name) {
  uint64_t inverted = 0;
  if (strncmp(name, "manifest-", 9) || strlen(name) != 34 || strcmp(name + 29, ".json")) return 0;
  for (int i = 9; i < 29; i++) {
    unsigned digit = (unsigned)(name[i] - '0');
    if (digit > 9 || inverted > (UINT64_MAX - digit) / 10) return 0;
    inverted = inverted * 10 + digit;
  }
  return UINT64_MAX - inverted;
}

/* A folder that is missing is one answer; one that cannot be listed (no handles, no permission) is a failure. */
static vs_rc cannot_list(const char *dir, const char *what, vs_err *err) {
  return vs_fail(err, errno == ENOENT || errno == ENOTDIR ? VS_NOTFOUND : VS_IO, "%s%s: %s", dir, what,
                 strerror(errno));
}

/* readdir that tells the end from an error: half a listing would pass an old version for the newest. */
static struct dirent *next_entry(DIR *d, const char *dir, vs_rc *rc, vs_err *err) {
  errno = 0;
  struct dirent *e = *rc ? NULL : readdir(d);
  if (!e && !*rc && errno) *rc = vs_fail(err, VS_IO, "%s: cannot list: %s", dir, strerror(errno));
  return e;
}

static vs_rc find_newest(const char *dir, uint64_t *version, vs_err *err) {
  DIR *d = opendir(dir);
  vs_rc rc = VS_OK;
  *version = 0;
  if (!d) return cannot_list(dir, " is not a shard", err);
  for (struct dirent *e; (e = next_entry(d, dir, &rc, err));) {
    uint64_t v = shard_manifest_version(e->d_name);
    if (v > *version) *version = v;
  }
  closedir(d);
  if (!rc && !*version)
    return vs_fail(err, VS_NOTFOUND,
                   "%s is not a shard: it holds no manifest; build one with `vecshard build FILES --out %s`", dir, dir);
  return rc;
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
  if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
    return vs_fail(err, VS_INVALID, "%s: path too long", dir);
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

/* The text of m, proven readable: what a reader would refuse must not become the newest version. */
static vs_rc print_checked(const char *dir, const shard_manifest *m, char **json, vs_err *err) {
  shard_manifest back;
  vs_err why = {0};
  vs_rc rc = shard_manifest_print(m, json, err);
  if (rc) return rc;
  rc = shard_manifest_parse(*json, strlen(*json), "the new manifest", &back, &why);
  if (!rc) shard_manifest_reset(&back);
  else free(*json), *json = NULL;
  return rc == VS_CORRUPT ? vs_fail(err, VS_INVALID, "%s: nothing committed: %s", dir, why.text)
         : rc             ? vs_fail(err, rc, "%s", why.text)
                          : VS_OK;
}

static vs_rc write_temp(const char *dir, char *temp, const char *json, vs_err *err) {
  int fd = mkostemp(temp, O_CLOEXEC); /* implies O_EXCL */
  if (fd < 0) return vs_fail(err, VS_IO, "%s: cannot write: %s", dir, strerror(errno));
  vs_rc rc =
      fchmod(fd, 0644) ? vs_fail(err, VS_IO, "%s: %s", temp, strerror(errno)) : write_synced(fd, json, temp, err);
  close(fd);
  if (rc) unlink(temp);
  return rc;
}

/* link, unlike rename, never replaces: of two writers the second is told. */
static vs_rc publish(const char *dir, const char *temp, const char *final, uint64_t version, vs_err *err) {
  vs_rc rc = VS_OK;
  if (link(temp, final))
    rc = errno == EEXIST
             ? vs_fail(err, VS_EXISTS,
                       "%s: another writer committed version %" PRIu64 " first; nothing is lost: run the command again",
                       dir, version)
             : vs_fail(err, VS_IO, "%s: cannot create: %s", final, strerror(errno));
  unlink(temp);
  if (rc) return rc;
  rc = sync_dir(dir, err);
  if (rc) unlink(final); /* ours; the caller takes an error for "not committed" and removes the files it names */
  return rc;
}

vs_rc shard_manifest_commit_text(const char *dir, uint64_t version, const char *json, vs_err *err) {
  char name[64], final[4400], temp[4460];
  shard_manifest_file(version, name);
  if (snprintf(final, sizeof final, "%s/%s", dir, name) >= (int)sizeof final)
    return vs_fail(err, VS_INVALID, "%s: path too long", dir);
  snprintf(temp, sizeof temp, "%s/.%.29s.tmp-%d-XXXXXX", dir, name, (int)getpid());
  vs_rc rc = write_temp(dir, temp, json, err);
  return rc ? rc : publish(dir, temp, final, version, err);
}

vs_rc shard_manifest_commit(const char *dir, const shard_manifest *m, vs_err *err) {
  char *json = NULL;
  vs_rc rc = print_checked(dir, m, &json, err);
  if (!rc) rc = shard_manifest_commit_text(dir, m->version, json, err);
  free(json);
  return rc;
}

/* ---- folders ---- */

int shard_dir_is_shard(const char *dir) {
  DIR *d = opendir(dir);
  int found = 0;
  if (!d) return 0;
  for (struct dirent *e; !found && (e = readdir(d));) found = shard_manifest_version(e->d_name) != 0;
  closedir(d);
  return found;
}

void shard_names_free(char **names, size_t n) {
  for (size_t i = 0; names && i < n; i++) free(names[i]);
  free(names);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static vs_rc add_child(const char *dir, const char *name, int shards_only, char ***names, size_t *n, vs_err *err) {
  char path[4400];
  if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path || (shards_only && !shard_dir_is_shard(path))) return VS_OK;
  char **grown = realloc(*names, (*n + 1) * sizeof *grown), *copy = strdup(name);
  if (grown) *names = grown;
  if (!grown || !copy) {
    free(copy);
    return vs_nomem(err);
  }
  grown[(*n)++] = copy;
  return VS_OK;
}

static vs_rc list_children(const char *dir, int shards_only, char ***names, size_t *n, vs_err *err) {
  *names = NULL, *n = 0;
  DIR *d = opendir(dir);
  vs_rc rc = VS_OK;
  if (!d) return cannot_list(dir, "", err);
  for (struct dirent *e; (e = next_entry(d, dir, &rc, err));)
    if (e->d_name[0] != '.' && e->d_type != DT_REG) rc = add_child(dir, e->d_name, shards_only, names, n, err);
  closedir(d);
  if (rc) shard_names_free(*names, *n), *names = NULL, *n = 0;
  else if (*n) qsort(*names, *n, sizeof **names, by_name);
  return rc;
}

vs_rc shard_dir_list(const char *dir, char ***names, size_t *n, vs_err *err) { return list_children(dir, 1, names, n, err); }
vs_rc shard_dir_children(const char *dir, char ***names, size_t *n, vs_err *err) { return list_children(dir, 0, names, n, err); }
