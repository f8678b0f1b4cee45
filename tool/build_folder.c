/* build_folder.c - see build_folder.h. */
#include "build_folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "output.h"
#include "plan.h"

enum { MAX_KEY_BYTES = 1 << 28 };
static const char key_file[] = "key";

/* Calls fn for every file; the sum of what it returns. */
static uint64_t each_file(int folder, uint64_t (*fn)(int folder, const char *name)) {
  int fd = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *d = fd < 0 ? NULL : fdopendir(fd);
  uint64_t sum = 0;
  if (!d && fd >= 0) close(fd);
  for (struct dirent *e; d && (e = readdir(d));)
    if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) sum += fn(folder, e->d_name);
  if (d) closedir(d);
  return sum;
}

static uint64_t remove_one(int folder, const char *name) { return unlinkat(folder, name, 0) == 0; }
static uint64_t bytes_of(int folder, const char *name) {
  struct stat st;
  return fstatat(folder, name, &st, AT_SYMLINK_NOFOLLOW) ? 0 : (uint64_t)st.st_size;
}
static uint64_t is_state(int folder, const char *name) {
  size_t n = strlen(name);
  (void)folder;
  return n > 6 && !strcmp(name + n - 6, ".state");
}

static char *path_for(const char *tmpdir, const char *out) {
  char hash[33], *real = realpath(out, NULL);
  plan_hash_text(real ? real : out, hash);
  free(real);
  return tool_format("%s/.vecshard-build-%.16s", tmpdir, hash);
}

/* The first line in which the texts differ. */
static void say_difference(const char *path, const char *was, const char *is) {
  for (;;) {
    size_t a = strcspn(was, "\n"), b = strcspn(is, "\n");
    if (a != b || memcmp(was, is, a)) {
      tool_note("%s: starting over: what was kept there is of another build (it says '%.*s', this one '%.*s')", path, (int)a, was,
                (int)b, is);
      return;
    }
    if (!was[a] || !is[b]) return;
    was += a + 1, is += b + 1;
  }
}

static vs_rc write_key(const build_folder *f, const char *key, vs_err *err) {
  output o;
  char *path = tool_format("%s/%s", f->path, key_file);
  vs_rc rc = output_open(path, &o, err);
  if (!rc) {
    fputs(key, o.file);
    rc = output_close(&o, VS_OK, err);
  }
  free(path);
  return rc ? rc : output_sync_folder(f->path, err);
}

/* Is what is there of the same build? */
static int same_key(const build_folder *f, const char *key) {
  char *text = NULL, *path = tool_format("%s/%s", f->path, key_file);
  vs_err ignored = {0};
  vs_rc rc = output_read_text(path, MAX_KEY_BYTES, &text, &ignored);
  int same = !rc && !strcmp(text, key);
  if (rc) tool_note("%s: starting over: what was kept there does not say of which build it is", f->path);
  else if (!same) say_difference(f->path, text, key);
  free(text), free(path);
  return same;
}

static vs_rc lock_it(build_folder *f, vs_err *err) {
  struct stat st;
  f->lock = open(f->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (f->lock < 0 || fstat(f->lock, &st)) return vs_fail(err, VS_IO, "%s: cannot open the folder: %s", f->path, strerror(errno));
  if (st.st_uid != geteuid() || (st.st_mode & (S_IWGRP | S_IWOTH)))
    return vs_fail(err, VS_INVALID, "%s: others may write there; remove it, or name another --tmpdir", f->path);
  if (flock(f->lock, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
    return vs_fail(err, VS_EXISTS, "%s: another build is at work in this folder", f->path);
  return VS_OK;
}

vs_rc build_folder_open(build_folder *f, const char *tmpdir, const char *out, const char *key, int *resume, vs_err *err) {
  *f = (build_folder){.path = path_for(tmpdir, out), .lock = -1};
  int made = !mkdir(f->path, 0700);
  vs_rc rc = made || errno == EEXIST ? lock_it(f, err) : vs_fail(err, VS_IO, "%s: cannot make the folder: %s", f->path, strerror(errno));
  if (rc) { /* not ours to remove */
    if (f->lock >= 0) close(f->lock);
    free(f->path);
    *f = (build_folder){.lock = -1};
    return rc;
  }
  if (made && *resume) tool_note("nothing was kept in %s: building from the beginning", f->path);
  else if (!made && !*resume) tool_note("%s: removed what a build left that did not end (--resume goes on from there)", f->path);
  *resume = *resume && !made && same_key(f, key);
  if (*resume) return VS_OK;
  each_file(f->lock, remove_one);
  return write_key(f, key, err);
}

uint64_t build_folder_bytes(const build_folder *f) { return f->path ? each_file(f->lock, bytes_of) : 0; }

int build_folder_has(const build_folder *f, const char *name) { return f->path && !faccessat(f->lock, name, F_OK, AT_SYMLINK_NOFOLLOW); }

void build_folder_close(build_folder *f, int keep) {
  if (!f->path) return;
  if (keep && each_file(f->lock, is_state)) tool_note("kept %s: the same command goes on from there", f->path);
  else each_file(f->lock, remove_one), rmdir(f->path);
  close(f->lock), free(f->path);
  *f = (build_folder){.lock = -1};
}

void build_folder_drop(const char *tmpdir, const char *out) {
  build_folder f = {.path = path_for(tmpdir, out), .lock = -1};
  vs_err ignored = {0};
  if (access(f.path, F_OK) || lock_it(&f, &ignored)) {
    if (f.lock >= 0) close(f.lock);
    free(f.path);
  } else build_folder_close(&f, 0);
}
