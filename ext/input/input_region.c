/* input_region.c - rows of equal length in one piece of a file, as floats: behind .npy, .fvecs, .f32 and contiguous HDF5.
 *
 * A window of rows is cut into tasks for the pool. A task reads its piece with pread: float32 in this machine's byte order
 * straight to its place, the rest by way of a buffer of its own, and checks it while it is in the cache. No mmap: a file that
 * shrinks would end the process (SIGBUS), where pread gives an error.
 *
 * Memory, beside the caller's rows: TASK_BYTES or one row per thread.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "input_int.h"

#define TASK_BYTES ((size_t)256 << 10)
#define ADVISE_BYTES ((size_t)1 << 20) /* windows from this size on are announced to the kernel as a whole */

typedef struct region_job {
  const input_region *r;
  uint64_t row;
  size_t n, per_task, stride;
  float *out;
  uint8_t *flags;
  pthread_mutex_t m; /* guards what follows */
  size_t bad;        /* the first row that failed; n: none */
  vs_rc rc;
  vs_err err;
} region_job;

/* Rows [first, end) of the window; *at becomes the row that fails. */
static vs_rc read_piece(const region_job *j, size_t first, size_t end, size_t *at, vs_err *err) {
  const input_region *r = j->r;
  uint64_t off = r->off + (j->row + first) * j->stride;
  size_t n_bytes = (end - first) * j->stride;
  float *out = j->out + first * r->dim;
  unsigned char *buf = NULL;
  vs_rc rc;
  *at = first;
  if (r->num != INPUT_F32 || r->lead_bytes) {
    buf = malloc(n_bytes);
    if (!buf) return vs_nomem(err);
  }
  rc = input_pread(r->fd, r->path, buf ? buf : (unsigned char *)out, n_bytes, off, err);
  for (size_t i = 0; i < end - first && !rc; i++) {
    unsigned char *src = buf + i * j->stride;
    uint32_t dim = r->dim;
    *at = first + i;
    if (r->lead_bytes) memcpy(&dim, src, 4);
    if (dim != r->dim)
      rc = vs_corrupt(err, "%s: row %llu says %ld dimensions, row 0 has %u: all rows of a .fvecs file must agree", r->path,
                      (unsigned long long)(j->row + *at), (long)(int32_t)dim, r->dim);
    else if (buf) j->flags[*at] = (uint8_t)input_to_floats(r->num, src + r->lead_bytes, out + i * r->dim, r->dim);
    else j->flags[*at] = (uint8_t)input_check_floats(out + i * r->dim, r->dim);
  }
  free(buf);
  return rc;
}

static void read_task(void *ctx, size_t task) {
  region_job *j = ctx;
  size_t first = task * j->per_task, end = j->n - first < j->per_task ? j->n : first + j->per_task, at;
  vs_err err = {0};
  vs_rc rc;
  if (first > __atomic_load_n(&j->bad, __ATOMIC_RELAXED)) return;
  rc = read_piece(j, first, end, &at, &err);
  if (!rc) return;
  pthread_mutex_lock(&j->m);
  if (at < j->bad) {
    __atomic_store_n(&j->bad, at, __ATOMIC_RELAXED);
    j->rc = rc, j->err = err;
  }
  pthread_mutex_unlock(&j->m);
}

vs_rc input_region_read(const input_region *r, uint64_t row, size_t *n, float *out, uint8_t *flags, vs_err *err) {
  region_job j = {.r = r, .row = row, .n = *n, .out = out, .flags = flags, .bad = *n,
                  .stride = r->lead_bytes + (size_t)r->dim * input_num_bytes(r->num)};
  size_t n_bytes = *n * j.stride;
  if (n_bytes >= ADVISE_BYTES) posix_fadvise(r->fd, (off_t)(r->off + row * j.stride), (off_t)n_bytes, POSIX_FADV_WILLNEED);
  j.per_task = TASK_BYTES / j.stride + 1;
  pthread_mutex_init(&j.m, NULL);
  vs_pool_run((*n + j.per_task - 1) / j.per_task, r->threads, read_task, &j);
  pthread_mutex_destroy(&j.m);
  if (j.bad == j.n) return VS_OK;
  *n = j.bad;
  return vs_fail(err, j.rc, "%s", j.err.text);
}
