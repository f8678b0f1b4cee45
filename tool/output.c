/* output.c - see output.h. */
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static vs_rc io_fail(vs_err *err, const char *path, const char *what) {
  return vs_fail(err, VS_IO, "%s: cannot %s: %s", path, what, strerror(errno));
}

/* ---- files ---- */

vs_rc output_open(const char *path, output *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  if (!path) {
    out->file = stdout;
    return VS_OK;
  }
  struct stat st;
  int special = !stat(path, &st) && !S_ISREG(st.st_mode); /* a device or a pipe: written as it is, never renamed over */
  char *real = special ? NULL : realpath(path, NULL);     /* behind a link, so that the link stays */
  out->path = tool_format("%s", real ? real : path);
  out->temporary = special ? NULL : tool_format("%s.%ld.tmp", out->path, (long)getpid());
  free(real);
  int fd = open(special ? path : out->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  out->file = fd < 0 ? NULL : fdopen(fd, "w");
  if (out->file) return VS_OK;
  vs_rc rc = io_fail(err, path, "be written");
  if (fd >= 0) close(fd);
  if (fd >= 0 && !special) unlink(out->temporary);
  free(out->path), free(out->temporary);
  memset(out, 0, sizeof *out);
  return rc;
}

vs_rc output_close(output *out, vs_rc rc, vs_err *err) {
  const char *name = out->path ? out->path : "standard output";
  if (!out->file) return rc;
  if (!rc && (fflush(out->file) || ferror(out->file))) rc = io_fail(err, name, "write");
  if (out->path) {
    if (!rc && out->temporary && fsync(fileno(out->file))) rc = io_fail(err, name, "sync");
    if (fclose(out->file) && !rc) rc = io_fail(err, name, "close");
    if (!rc && out->temporary && rename(out->temporary, out->path)) rc = io_fail(err, name, "name");
    if (rc && out->temporary) unlink(out->temporary);
  }
  free(out->path), free(out->temporary);
  memset(out, 0, sizeof *out);
  return rc;
}

vs_rc output_read_text(const char *path, size_t limit, char **text, vs_err *err) {
  struct stat st;
  vs_rc rc = VS_OK;
  *text = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return io_fail(err, path, "open");
  if (fstat(fd, &st)) rc = io_fail(err, path, "open");
  else if (!S_ISREG(st.st_mode)) rc = vs_fail(err, VS_INVALID, "%s: is no regular file", path);
  else if ((uint64_t)st.st_size > limit)
    rc = vs_fail(err, VS_INVALID, "%s: %lld bytes are more than this file can need", path, (long long)st.st_size);
  else {
    char *buf = tool_alloc((size_t)st.st_size + 1, 1);
    ssize_t n = pread(fd, buf, (size_t)st.st_size, 0);
    if (n == st.st_size && !memchr(buf, 0, (size_t)n)) *text = buf;
    else rc = n < 0 ? io_fail(err, path, "read") : vs_fail(err, VS_INVALID, "%s: is no text", path), free(buf);
  }
  close(fd);
  return rc;
}

/* ---- folders ---- */

/* The end of each leading part of the path in turn: "a/b" gives "a", "a/b". */
static int next_part(const char *path, size_t *end) {
  size_t at = *end;
  while (path[at] == '/') at++;
  if (!path[at]) return 0;
  while (path[at] && path[at] != '/') at++;
  *end = at;
  return 1;
}

static int make_parts(const char *path, int *n_made) {
  for (size_t end = 0; next_part(path, &end);) {
    char *part = tool_format("%.*s", (int)end, path);
    int rc = mkdir(part, 0777), made = !rc, why = errno;
    struct stat st;
    if (rc && why == EEXIST && !stat(part, &st) && !S_ISDIR(st.st_mode)) why = ENOTDIR;
    free(part);
    /* Every existing part breaks the row of those that were made. */
    *n_made = made ? *n_made + 1 : 0;
    if (rc && why != EEXIST) return errno = why, -1;
  }
  return 0;
}

vs_rc output_make_folder(const char *path, int *n_made, vs_err *err) {
  /* Another job that fails may remove an empty parent between two of our steps: begin again then. */
  for (int attempt = 0; attempt < 5; attempt++) {
    *n_made = 0;
    if (!make_parts(path, n_made)) return VS_OK;
    if (errno != ENOENT) break;
  }
  *n_made = 0;
  return io_fail(err, path, "make the folder");
}

void output_drop_folder(const char *path, int n_made) {
  char *part = tool_format("%s", path);
  for (size_t len = strlen(part); n_made > 0; n_made--) {
    while (len && part[len - 1] == '/') part[--len] = 0;
    if (!len || rmdir(part)) break;
    while (len && part[len - 1] != '/') part[--len] = 0;
  }
  free(part);
}

vs_rc output_sync_folder(const char *path, vs_err *err) {
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  vs_rc rc = fd < 0 || fsync(fd) ? io_fail(err, path, "sync the folder") : VS_OK;
  if (fd >= 0) close(fd);
  return rc;
}

/* ---- space ---- */

const char *output_size(uint64_t n_bytes, char buf[32]) {
  static const char *const units[] = {"bytes", "kB", "MB", "GB", "TB", "PB", "EB"};
  double v = (double)n_bytes;
  size_t u = 0;
  while (v >= 1000 && u + 1 < sizeof units / sizeof *units) v /= 1000, u++;
  snprintf(buf, 32, u ? "%.1f %s" : "%.0f %s", v, units[u]);
  return buf;
}

static vs_rc free_bytes(const char *folder, uint64_t *n, dev_t *device, vs_err *err) {
  struct statvfs v;
  struct stat st;
  if (statvfs(folder, &v) || stat(folder, &st)) return io_fail(err, folder, "tell the free space");
  *n = (uint64_t)v.f_bavail * v.f_frsize, *device = st.st_dev;
  return VS_OK;
}

static vs_rc no_space(const char *folder, uint64_t need, const char *what, uint64_t have, const char *advice,
                      vs_err *err) {
  char a[32], b[32];
  return vs_fail(err, VS_IO, "%s: needs about %s %s and has %s free; %s", folder, output_size(need, a), what,
                 output_size(have, b), advice);
}

vs_rc output_check_space(const char *out, uint64_t n_out, const char *temp, uint64_t n_temp, vs_err *err) {
  uint64_t out_free, temp_free;
  dev_t out_device, temp_device;
  vs_rc rc = free_bytes(out, &out_free, &out_device, err);
  if (!rc) rc = free_bytes(temp, &temp_free, &temp_device, err);
  if (rc) return rc;
  if (n_temp && out_device == temp_device && n_out + n_temp > out_free)
    return no_space(out, n_out + n_temp, "for the shard and temporary files", out_free,
                    "--tmpdir names another disk for those", err);
  if (n_out > out_free)
    return no_space(out, n_out, "for the shard", out_free, "make room or choose another place", err);
  if (n_temp > temp_free)
    return no_space(temp, n_temp, "for temporary files", temp_free, "--tmpdir names another disk", err);
  return VS_OK;
}

uint64_t output_allocated(const char *path) {
  struct stat st;
  if (stat(path, &st)) return 0;
  uint64_t blocks = (uint64_t)st.st_blocks * 512, size = (uint64_t)st.st_size;
  return blocks < size ? blocks : size; /* a file that is not filled yet has holes */
}
