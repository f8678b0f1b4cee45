/* ivfpq_sort.c - external sort of 24-byte records: sorted runs in one unnamed temporary file, merged by a heap. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ivfpq_int.h"

void *ivfpq_large_alloc(size_t n) {
  enum { LARGE_PAGE = 2 << 20 };
  n = (n / LARGE_PAGE + 1) * LARGE_PAGE;
  void *p = aligned_alloc(LARGE_PAGE, n);
  if (p) (void)madvise(p, n, MADV_HUGEPAGE);
  return p;
}

int ivfpq_tmpfile(const char *dir, vs_err *err) {
  char name[4200];
  int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return fd;
  snprintf(name, sizeof name, "%s/.vecshard-XXXXXX", dir); /* file systems without O_TMPFILE */
  fd = mkostemp(name, O_CLOEXEC);
  if (fd < 0) vs_fail(err, VS_IO, "%s: cannot make a temporary file: %s", dir, strerror(errno));
  else unlink(name);
  return fd;
}

vs_rc ivfpq_pwrite(int fd, const void *p, size_t n, uint64_t off, const char *name, vs_err *err) {
  const char *at = p;
  while (n) {
    ssize_t w = pwrite(fd, at, n < (1u << 30) ? n : 1u << 30, (off_t)off);
    if (w < 0 && errno == EINTR) continue;
    if (w <= 0)
      return vs_fail(err, VS_IO, "%s: write failed: %s%s", name, strerror(errno),
                     errno == ENOSPC ? " (free some space, or set --tmpdir to a larger disk)" : "");
    at += w, n -= (size_t)w, off += (uint64_t)w;
  }
  return VS_OK;
}

vs_rc ivfpq_pread(int fd, void *p, size_t n, uint64_t off, const char *name, vs_err *err) {
  char *at = p;
  while (n) {
    ssize_t r = pread(fd, at, n < (1u << 30) ? n : 1u << 30, (off_t)off);
    if (r < 0 && errno == EINTR) continue;
    if (r <= 0) return vs_fail(err, VS_IO, "%s: read failed: %s", name, r ? strerror(errno) : "end of file");
    at += r, n -= (size_t)r, off += (uint64_t)r;
  }
  return VS_OK;
}

typedef struct sort_run {
  uint64_t off, n;        /* in the file: records left to read */
  ivfpq_record *buf;
  size_t at, have, room;
} sort_run;

struct ivfpq_sorter {
  char *dir;
  int fd;                 /* -1 until the first spill */
  ivfpq_record *buf;      /* `room` records; grown by doubling up to max */
  size_t n, room, max, at;
  uint64_t file_end;
  sort_run *runs;
  size_t n_runs;
  size_t *heap;           /* runs by their next record */
  size_t n_heap;
};

static int compare(const ivfpq_record *a, const ivfpq_record *b) {
  if (a->hi != b->hi) return a->hi < b->hi ? -1 : 1;
  if (a->lo != b->lo) return a->lo < b->lo ? -1 : 1;
  return a->value < b->value ? -1 : a->value > b->value;
}

/* ---- sorting in place: American flag sort, byte after byte from the first; short stretches by insertion ---- */

enum { FLAG_MIN = 48, RECORD_BYTES = sizeof(ivfpq_record) };

static inline unsigned byte_of(const ivfpq_record *r, unsigned at) {
  uint64_t v = at < 8 ? r->hi : at < 16 ? r->lo : r->value;
  return (unsigned)(v >> (56 - 8 * (at % 8))) & 255;
}

static void insertion_sort(ivfpq_record *a, size_t n) {
  for (size_t i = 1; i < n; i++) {
    ivfpq_record x = a[i];
    size_t j = i;
    for (; j && compare(&x, &a[j - 1]) < 0; j--) a[j] = a[j - 1];
    a[j] = x;
  }
}

/* Recursion is one level per byte of a record, at most RECORD_BYTES. */
static void flag_sort(ivfpq_record *a, size_t n, unsigned at) {
  size_t count[256], next[256], end[256];
  for (;; at++) { /* bytes that all share are passed over */
    if (n < FLAG_MIN) {
      insertion_sort(a, n);
      return;
    }
    if (at == RECORD_BYTES) return;
    memset(count, 0, sizeof count);
    for (size_t i = 0; i < n; i++) count[byte_of(&a[i], at)]++;
    if (count[byte_of(a, at)] != n) break;
  }
  for (size_t b = 0, sum = 0; b < 256; b++) next[b] = sum, end[b] = sum += count[b];
  for (size_t b = 0; b < 256; b++)
    while (next[b] < end[b]) {
      ivfpq_record x = a[next[b]];
      for (unsigned to = byte_of(&x, at); to != b; to = byte_of(&x, at)) {
        ivfpq_record y = a[next[to]];
        a[next[to]++] = x, x = y;
      }
      a[next[b]++] = x;
    }
  for (size_t b = 0, from = 0; b < 256; from += count[b++])
    if (count[b] > 1) flag_sort(a + from, count[b], at + 1);
}

vs_rc ivfpq_sorter_open(const char *dir, size_t memory, ivfpq_sorter **out, vs_err *err) {
  ivfpq_sorter *s = calloc(1, sizeof *s);
  *out = NULL;
  if (!s) return vs_nomem(err);
  s->fd = -1;
  s->max = memory / sizeof *s->buf < 1024 ? 1024 : memory / sizeof *s->buf;
  if (!(s->dir = strdup(dir))) {
    free(s);
    return vs_nomem(err);
  }
  *out = s;
  return VS_OK;
}

static vs_rc spill(ivfpq_sorter *s, vs_err *err) {
  sort_run *runs = realloc(s->runs, (s->n_runs + 1) * sizeof *runs);
  if (!runs) return vs_nomem(err);
  s->runs = runs;
  if (s->fd < 0 && (s->fd = ivfpq_tmpfile(s->dir, err)) < 0) return VS_IO;
  flag_sort(s->buf, s->n, 0);
  vs_rc rc = ivfpq_pwrite(s->fd, s->buf, s->n * sizeof *s->buf, s->file_end, s->dir, err);
  if (rc) return rc;
  s->runs[s->n_runs++] = (sort_run){.off = s->file_end, .n = s->n};
  s->file_end += s->n * sizeof *s->buf;
  s->n = 0;
  return VS_OK;
}

vs_rc ivfpq_sorter_add(ivfpq_sorter *s, ivfpq_record r, vs_err *err) {
  if (s->n == s->room) {
    if (s->room == s->max) {
      vs_rc rc = spill(s, err);
      if (rc) return rc;
    } else {
      size_t room = s->room ? s->room * 2 : 1024;
      if (room > s->max) room = s->max;
      ivfpq_record *buf = realloc(s->buf, room * sizeof *buf);
      if (!buf) return vs_nomem(err);
      s->buf = buf, s->room = room;
    }
  }
  s->buf[s->n++] = r;
  return VS_OK;
}

static vs_rc refill(ivfpq_sorter *s, sort_run *r, vs_err *err) {
  size_t n = r->n < r->room ? r->n : r->room;
  vs_rc rc = ivfpq_pread(s->fd, r->buf, n * sizeof *r->buf, r->off, s->dir, err);
  if (rc) return rc;
  r->off += n * sizeof *r->buf, r->n -= n, r->at = 0, r->have = n;
  return VS_OK;
}

static void sift_down(ivfpq_sorter *s, size_t i) {
  for (;;) {
    size_t child = 2 * i + 1, top = s->heap[i];
    if (child >= s->n_heap) return;
    const sort_run *runs = s->runs;
#define NEXT(x) (&runs[x].buf[runs[x].at])
    if (child + 1 < s->n_heap && compare(NEXT(s->heap[child + 1]), NEXT(s->heap[child])) < 0) child++;
    if (compare(NEXT(top), NEXT(s->heap[child])) <= 0) return;
#undef NEXT
    s->heap[i] = s->heap[child], s->heap[child] = top;
    i = child;
  }
}

vs_rc ivfpq_sorter_finish(ivfpq_sorter *s, vs_err *err) {
  if (!s->n_runs) {
    if (s->n) flag_sort(s->buf, s->n, 0);
    return VS_OK;
  }
  vs_rc rc = s->n ? spill(s, err) : VS_OK;
  if (rc) return rc;
  /* the sort buffer is cut into one read buffer per run */
  size_t each = s->room / s->n_runs;
  if (each < 1) return vs_fail(err, VS_INVALID, "too many sorted runs: raise --memory");
  if (!(s->heap = malloc(s->n_runs * sizeof *s->heap))) return vs_nomem(err);
  for (size_t i = 0; i < s->n_runs && !rc; i++) {
    s->runs[i].buf = s->buf + i * each, s->runs[i].room = each;
    rc = refill(s, &s->runs[i], err);
    s->heap[s->n_heap++] = i;
  }
  for (size_t i = s->n_heap; i-- > 0 && !rc;) sift_down(s, i);
  return rc;
}

vs_rc ivfpq_sorter_next(ivfpq_sorter *s, ivfpq_record *r, int *more, vs_err *err) {
  vs_rc rc = VS_OK;
  *more = s->n_runs ? s->n_heap > 0 : s->at < s->n;
  if (!*more) return VS_OK;
  if (!s->n_runs) {
    *r = s->buf[s->at++];
    return VS_OK;
  }
  sort_run *run = &s->runs[s->heap[0]];
  *r = run->buf[run->at++];
  if (run->at == run->have && run->n) rc = refill(s, run, err);
  else if (run->at == run->have) s->heap[0] = s->heap[--s->n_heap];
  if (!rc && s->n_heap) sift_down(s, 0);
  return rc;
}

void ivfpq_sorter_close(ivfpq_sorter *s) {
  if (!s) return;
  if (s->fd >= 0) close(s->fd);
  free(s->dir), free(s->buf), free(s->runs), free(s->heap), free(s);
}
