/* io_local.c - see io_local.h. No cache of our own: the page cache is one.
 *
 * Mapped: fetch hands out addresses, and the bytes behind the file read as zeros (the kernel's, up to the end of its
 * last page, then a reserved page of ours). Read: each range is a malloc of its own, padded with zeros, that release
 * frees. A file cut short while mapped raises SIGBUS; read, it is an error that names file and offset. No lock: nothing
 * changes once open.
 *
 * A map may be larger than memory, so searches touch pages that have to be read: the kernel is told not to read around each of them,
 * and what a search is about to touch is asked for before, all of it at once (`want`). 1,000,000 x 128, nothing in memory, a batch of
 * 20 queries: 427 MB and 30 ms a query with the kernel's read-ahead (8 MiB on that machine), 17 MB and 2.6 ms so. Large ranges are
 * read in sequence.
 */
#include "io_local.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
  HUGE_PAGE = 2 << 20,
  LARGE = 256 << 10,   /* a range so long is asked for as a whole, whether it is in memory or not */
  SURE = 64, EVERY = 16 /* after SURE ranges that all were in memory, only one in EVERY is looked up */
};

typedef struct local_io {
  vs_io base;
  int fd;           /* -1 once mapped */
  uint8_t *map;     /* NULL: pread */
  size_t map_bytes; /* with the page behind the file */
  size_t page;
  unsigned in_memory; /* ranges in a row that were */
  char name[];
} local_io;

/* Looking up whether pages are in memory costs a fifth of a microsecond, reading them a hundred times that. */
static void want_mapped(vs_io *io, uint64_t off, uint64_t len) {
  local_io *l = (local_io *)io;
  unsigned run = __atomic_load_n(&l->in_memory, __ATOMIC_RELAXED), cached = 1;
  unsigned char in[LARGE / 4096 + 2];
  uint8_t *from = l->map + off / l->page * l->page;
  size_t n = (size_t)(l->map + off + len - from), n_pages = (n + l->page - 1) / l->page;
  if (n_pages > sizeof in) {
    (void)madvise(from, n, MADV_WILLNEED);
    return;
  }
  if (run < SURE || run % EVERY == 0) {
    if (mincore(from, n, in)) return;
    for (size_t i = 0; i < n_pages; i++) cached &= in[i];
    if (!cached) (void)madvise(from, n, MADV_WILLNEED);
  }
  __atomic_store_n(&l->in_memory, cached ? run + 1 : 0, __ATOMIC_RELAXED);
}

static vs_rc fetch_mapped(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  const local_io *l = (const local_io *)io;
  (void)err;
  for (size_t i = 0; i < n; i++) {
    r[i].ptr = l->map + r[i].off;
    if (r[i].len >= LARGE) want_mapped(io, r[i].off, r[i].len);
  }
  return VS_OK;
}
static void release_mapped(vs_io *io, vs_range *r, size_t n) { (void)io, (void)r, (void)n; }

static void release_read(vs_io *io, vs_range *r, size_t n) {
  (void)io;
  for (size_t i = 0; i < n; i++) {
    free(r[i].owner);
    r[i].owner = NULL, r[i].ptr = NULL;
  }
}

static vs_rc read_range(const local_io *l, vs_range *r, vs_err *err) {
  uint8_t *buf = malloc(r->len + VS_IO_PAD);
  if (!buf) return vs_nomem(err);
  r->owner = buf, r->ptr = buf;
  for (uint64_t have = 0; have < r->len;) {
    ssize_t n = pread(l->fd, buf + have, r->len - have, (off_t)(r->off + have));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      return vs_fail(err, VS_IO, "%s: cannot read at %llu: %s", l->name, (unsigned long long)(r->off + have),
                     n ? strerror(errno) : "the file was cut short");
    have += (uint64_t)n;
  }
  memset(buf + r->len, 0, VS_IO_PAD);
  return VS_OK;
}

static vs_rc fetch_read(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  for (size_t i = 0; i < n; i++) {
    vs_rc rc = read_range((const local_io *)io, &r[i], err);
    if (rc) {
      release_read(io, r, i + 1);
      return rc;
    }
  }
  return VS_OK;
}

static void close_local(vs_io *io) {
  local_io *l = (local_io *)io;
  if (l->map) munmap(l->map, l->map_bytes);
  if (l->fd >= 0) close(l->fd);
  free(l);
}

/* Reserves n bytes of addresses. Large ones start at a multiple of HUGE_PAGE: where the kernel holds a file in large folios it then maps
 * them whole. */
static uint8_t *reserve(size_t n) {
  size_t spare = n >= HUGE_PAGE ? HUGE_PAGE : 0;
  uint8_t *at = mmap(NULL, n + spare, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED || !spare) return at;
  size_t before = (HUGE_PAGE - (uintptr_t)at % HUGE_PAGE) % HUGE_PAGE;
  if (before) munmap(at, before);
  if (spare - before) munmap(at + before + n, spare - before);
  return at + before;
}

/* Reserves one page more than the file needs, so that what lies behind the last byte can be read, and maps the file
 * over it. */
static int map_file(local_io *l) {
  /* cannot wrap: off_t is signed, so size is below 2^63 */
  size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (size_t)l->base.size, whole = (size + page - 1) / page * page;
  uint8_t *at = reserve(whole + page);
  if (at == MAP_FAILED) return 0;
  if (size && mmap(at, size, PROT_READ, MAP_SHARED | MAP_FIXED, l->fd, 0) == MAP_FAILED) {
    munmap(at, whole + page);
    return 0;
  }
  if (size) (void)madvise(at, size, MADV_RANDOM);
  l->map = at, l->map_bytes = whole + page, l->page = page;
  l->base.stable = 1, l->base.begin = fetch_mapped, l->base.release = release_mapped, l->base.want = want_mapped;
  close(l->fd), l->fd = -1;
  return 1;
}

vs_rc io_local_open(const char *path, int use_mmap, vs_io **out, vs_err *err) {
  struct stat st;
  *out = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return vs_fail(err, errno == ENOENT ? VS_NOTFOUND : VS_IO, "%s: cannot open: %s", path, strerror(errno));
  if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
    close(fd);
    return vs_fail(err, VS_INVALID, "%s: not a regular file", path);
  }
  local_io *l = calloc(1, sizeof *l + strlen(path) + 1);
  if (!l) {
    close(fd);
    return vs_nomem(err);
  }
  strcpy(l->name, path);
  l->fd = fd;
  l->base = (vs_io){.size = (uint64_t)st.st_size,
                    .name = l->name,
                    .local = 1,
                    .begin = fetch_read,
                    .release = release_read,
                    .close = close_local};
  const char *env = getenv("VECSHARD_MMAP");
  if (use_mmap > 0 || (use_mmap < 0 && !(env && !strcmp(env, "0")))) map_file(l);
  *out = &l->base;
  return VS_OK;
}
