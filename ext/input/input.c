/* input.c - opens a file of vectors by what it contains, else by its extension, and holds what all formats share.
 *
 *   first bytes                                      format
 *   89 'HDF' 0d 0a 1a 0a at 0, 512, 1024, 2048, ...  HDF5 (later places: behind a user block)
 *   93 'NUMPY'                                       .npy
 *   anything else                                    by extension: .fvecs, .f32; other known contents are named in the error
 *
 * Only regular files: a FIFO or a device would block or never end.
 */
#include "input_int.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)

/* Chunks that stand side by side are put into a window's rows one after the other: each row is then on a page of its own, and
 * with small pages the processor spends an eighth of the time looking them up (300,000 x 960 in chunks of 2,344 x 15). */
static void *alloc_vectors(size_t n_bytes) {
  void *p;
  if (n_bytes < 2 * HUGE_PAGE) return malloc(n_bytes);
  n_bytes = (n_bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  p = aligned_alloc(HUGE_PAGE, n_bytes);
  if (p) madvise(p, n_bytes, MADV_HUGEPAGE);
  return p;
}

vs_rc input_rows_reserve(input_rows *r, size_t n, uint32_t dim, size_t elem_bytes, size_t n_columns, vs_err *err) {
  if (n <= r->cap) return VS_OK;
  input_rows_free(r);
  r->vectors = alloc_vectors(n * dim * elem_bytes);
  r->ids = calloc(n, sizeof *r->ids);
  r->columns = calloc(n * n_columns + 1, sizeof *r->columns);
  r->faults = calloc(n, 1);
  if (!r->vectors || !r->ids || !r->columns || !r->faults) {
    input_rows_free(r);
    return vs_nomem(err);
  }
  r->cap = n;
  return VS_OK;
}

void input_rows_free(input_rows *r) {
  free(r->vectors);
  free(r->ids);
  free(r->columns);
  free(r->faults);
  memset(r, 0, sizeof *r);
}

/* Length of the valid UTF-8 sequence at s, 0 when there is none within n bytes. */
static size_t utf8_len(const unsigned char *s, size_t n) {
  size_t len = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
  if (!len || len > n) return 0;
  for (size_t i = 1; i < len; i++)
    if ((s[i] & 0xc0) != 0x80) return 0;
  /* Overlong forms, surrogates and what lies beyond U+10FFFF show in the second byte. */
  if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f)) return 0;
  if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f)) return 0;
  return len;
}

int input_utf8_ok(const char *text, size_t n) {
  const unsigned char *s = (const unsigned char *)text;
  for (size_t i = 0, len; i < n; i += len) {
    len = utf8_len(s + i, n - i);
    if (!len || !s[i]) return 0;
  }
  return 1;
}

const char *input_show(char out[INPUT_SHOW], const char *text, size_t n) {
  const unsigned char *s = (const unsigned char *)text;
  size_t at = 0, i = 0;
  while (i < n && at + 8 < INPUT_SHOW) {
    size_t len = s[i] < 0x20 || s[i] == 0x7f ? 0 : utf8_len(s + i, n - i);
    if (len) memcpy(out + at, s + i, len);
    else out[at] = '?';
    at += len ? len : 1;
    i += len ? len : 1;
  }
  if (i < n) memcpy(out + at, "...", 3), at += 3;
  out[at] = 0;
  return out;
}

vs_rc input_pread(int fd, const char *path, void *buf, size_t n, uint64_t off, vs_err *err) {
  size_t at = 0;
  while (at < n) {
    ssize_t got = pread(fd, (char *)buf + at, n - at, (off_t)(off + at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      return vs_fail(err, VS_IO, "%s: cannot read at byte %llu: %s", path, (unsigned long long)(off + at),
                     strerror(errno));
    if (!got)
      return vs_fail(err, VS_CORRUPT, "%s: ends at byte %llu, where more was expected: it was cut while being read",
                     path, (unsigned long long)(off + at));
    at += (size_t)got;
  }
  return VS_OK;
}

/* Contents that people hand us by mistake, with what to do about them. */
static const struct {
  const char *magic;
  size_t n;
  const char *what;
} known_contents[] = {
    {"version https://git-lfs", 23, "a git-lfs pointer, not the data: run `git lfs pull`"},
    {"PK\3\4", 4, "a zip archive (.npz?): unpack it and give the .npy inside"},
    {"\x1f\x8b", 2, "gzip-compressed: gunzip it first"},
    {"\x28\xb5\x2f\xfd", 4, "zstd-compressed: decompress it first"},
    {"PAR1", 4, "a Parquet file: export its vectors to .npy or HDF5 first"},
    {"SQLite format 3", 16, "a SQLite database"},
    {"\x0e\x03\x13\x01", 4, "an HDF4 file: convert it with h4toh5"},
    {"<", 1, "text (HTML or XML: a failed download?)"},
};

/* A user block's length is a power of two from 512 on; libhdf5 looks at the same places. */
static int is_hdf5(int fd, uint64_t n_bytes) {
  static const char magic[8] = {(char)0x89, 'H', 'D', 'F', '\r', '\n', 0x1a, '\n'};
  for (uint64_t off = 0; off < n_bytes && n_bytes - off >= sizeof magic; off = off ? off * 2 : 512) {
    char got[sizeof magic];
    if (pread(fd, got, sizeof got, (off_t)off) == (ssize_t)sizeof got && !memcmp(got, magic, sizeof magic)) return 1;
    if (off > (uint64_t)1 << 60) break;
  }
  return 0;
}

static int ends_with(const char *path, const char *suffix) {
  size_t n = strlen(path), m = strlen(suffix);
  return n > m && !strcasecmp(path + n - m, suffix);
}

static vs_rc refuse_content(const char *path, const char *head, size_t n_head, uint64_t n_bytes, vs_err *err) {
  int h5 = ends_with(path, ".h5") || ends_with(path, ".hdf5") || ends_with(path, ".he5");
  if (!n_bytes) return vs_fail(err, VS_INVALID, "%s: the file is empty (0 bytes)", path);
  for (size_t i = 0; i < sizeof known_contents / sizeof *known_contents; i++)
    if (n_head >= known_contents[i].n && !memcmp(head, known_contents[i].magic, known_contents[i].n))
      return vs_fail(err, VS_INVALID, "%s: is %s", path, known_contents[i].what);
  if (h5)
    return vs_fail(err, VS_INVALID, "%s: is not an HDF5 file (no HDF5 signature in its %llu bytes)", path,
                   (unsigned long long)n_bytes);
  if (ends_with(path, ".npy"))
    return vs_fail(err, VS_INVALID, "%s: is not a .npy file (it does not start with \\x93NUMPY)", path);
  if (ends_with(path, ".bvecs") || ends_with(path, ".ivecs"))
    return vs_fail(err, VS_INVALID, "%s: holds integers; convert the vectors to float32 (.fvecs or .npy)", path);
  return vs_fail(err, VS_INVALID, "%s: unknown format; HDF5, .npy, .fvecs and .f32 (with its dimension) can be read",
                 path);
}

static vs_rc open_mode(const char *path, const input_options *opt, int shape_only, input **out, vs_err *err) {
  static const input_options none;
  struct stat st;
  char head[64];
  uint64_t n_bytes;
  ssize_t n_head;
  int fd;
  *out = NULL;
  if (!opt) opt = &none;
  /* O_NONBLOCK: opening a FIFO must not wait for its writer. */
  fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0)
    return vs_fail(err, errno == ENOENT ? VS_NOTFOUND : VS_IO, "%s: cannot open: %s", path, strerror(errno));
  if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
    close(fd);
    return vs_fail(err, VS_INVALID, "%s: is %s, not a file of vectors", path,
                   S_ISDIR(st.st_mode) ? "a directory" : "not a regular file");
  }
  n_bytes = (uint64_t)st.st_size;
  if (is_hdf5(fd, n_bytes)) {
    close(fd);
    return input_hdf5_open(path, n_bytes, opt, shape_only, out, err);
  }
  if (opt->n_columns || opt->embedding_dataset || (opt->id_dataset && strcmp(opt->id_dataset, "none"))) {
    n_head = pread(fd, head, sizeof head, 0);
    close(fd);
    if (ends_with(path, ".npy") || ends_with(path, ".fvecs") || ends_with(path, ".f32"))
      return vs_fail(err, VS_INVALID, "%s: dataset and column names can only be given for HDF5 files", path);
    return refuse_content(path, head, n_head > 0 ? (size_t)n_head : 0, n_bytes, err);
  }
  n_head = pread(fd, head, sizeof head, 0);
  if (n_head < 0) {
    int e = errno;
    close(fd);
    return vs_fail(err, VS_IO, "%s: cannot read: %s", path, strerror(e));
  }
  if (n_head >= 6 && !memcmp(head, "\x93NUMPY", 6)) return input_npy_open(path, fd, n_bytes, opt, out, err);
  if (ends_with(path, ".fvecs")) return input_fvecs_open(path, fd, n_bytes, opt, out, err);
  if (ends_with(path, ".f32")) return input_f32_open(path, fd, n_bytes, opt, out, err);
  close(fd);
  return refuse_content(path, head, (size_t)n_head, n_bytes, err);
}

vs_rc input_open(const char *path, const input_options *opt, input **out, vs_err *err) {
  return open_mode(path, opt, 0, out, err);
}

vs_rc input_shape(const char *path, const input_options *opt, uint64_t *n_rows, uint32_t *dim, vs_err *err) {
  input *in;
  vs_rc rc = open_mode(path, opt, 1, &in, err);
  *n_rows = rc ? 0 : in->n_rows;
  *dim = rc ? 0 : in->dim;
  input_close(in);
  return rc;
}
