/* input_raw.c - .fvecs and .f32, and the input of equal-length rows that .npy shares with them.
 *
 *   .f32    float32 little-endian, row after row; the dimension comes from the caller
 *   .fvecs  per row an int32 dimension, the same in every row, then that many float32
 *
 * Ids are row numbers. Memory: two windows of at most INPUT_WINDOW_BYTES, whatever the file's size.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "input_int.h"

typedef struct raw_input {
  input_ahead ahead; /* first */
  input_region rows;
} raw_input;

static vs_rc raw_load(input_ahead *a, input_window *w, uint64_t row, size_t want, vs_err *err) {
  raw_input *in = (raw_input *)a;
  size_t n = want;
  vs_rc rc = input_rows_reserve(&w->rows, n, a->base.dim, sizeof(float), 0, err);
  if (rc) return rc;
  vs_err why = {0};
  rc = input_region_read(&in->rows, row, &n, w->rows.vectors, w->rows.faults, &why);
  if (!n) return vs_fail(err, rc, "%s", why.text);
  input_judge_rows(w->rows.vectors, a->base.dim, w->rows.faults, n);
  for (size_t i = 0; i < n; i++) w->rows.ids[i] = (input_value){.type = INPUT_INT, .i = (int64_t)(row + i)};
  w->row = row;
  w->n = n;
  return VS_OK;
}

static void raw_destroy(input_ahead *a) {
  raw_input *in = (raw_input *)a;
  close(in->rows.fd);
  free((char *)a->base.path);
  free(in);
}

vs_rc input_raw_open(const char *path, int fd, const input_raw_layout *layout, int threads, input **out, vs_err *err) {
  raw_input *in = calloc(1, sizeof *in);
  size_t stride = (size_t)layout->lead_bytes + (size_t)layout->dim * input_num_bytes(layout->num);
  input *base = in ? &in->ahead.base : NULL;
  if (in) base->path = strdup(path);
  if (!in || !base->path) {
    free(in);
    close(fd);
    return vs_nomem(err);
  }
  base->n_rows = layout->n_rows;
  base->dim = layout->dim;
  base->id_kind = INPUT_ID_ROW;
  in->ahead.load = raw_load;
  in->ahead.destroy = raw_destroy;
  in->ahead.threads = threads;
  /* dim <= INPUT_DIM_MAX makes a row at most 128 KiB, so this is never 0. */
  in->ahead.window_max = INPUT_WINDOW_BYTES / (stride > (size_t)layout->dim * 4 ? stride : (size_t)layout->dim * 4);
  if (in->ahead.window_max > INPUT_WINDOW_ROWS) in->ahead.window_max = INPUT_WINDOW_ROWS;
  input_ahead_init(&in->ahead);
  in->rows = (input_region){.fd = fd, .path = base->path, .off = layout->data_off, .dim = layout->dim, .num = layout->num,
                            .lead_bytes = layout->lead_bytes, .threads = in->ahead.threads};
  *out = base;
  return VS_OK;
}

vs_rc input_f32_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out, vs_err *err) {
  input_raw_layout at = {.dim = opt->dim, .num = INPUT_F32};
  uint64_t row = (uint64_t)opt->dim * 4;
  vs_rc rc = VS_OK;
  if (!opt->dim) rc = vs_fail(err, VS_INVALID, "%s: a .f32 file does not say its dimension: give --dim", path);
  else if (opt->dim > INPUT_DIM_MAX)
    rc = vs_fail(err, VS_INVALID, "%s: dimension %u is above the limit of %u", path, opt->dim, INPUT_DIM_MAX);
  else if (n_bytes % row)
    rc = vs_fail(err, VS_INVALID,
                 "%s: its %llu bytes are not a whole number of rows of %u float32 (%llu bytes): wrong "
                 "--dim, or a cut file",
                 path, (unsigned long long)n_bytes, opt->dim, (unsigned long long)row);
  else if (n_bytes / row > INPUT_ROWS_MAX) rc = vs_fail(err, VS_INVALID, "%s: too many rows", path);
  if (rc) {
    close(fd);
    return rc;
  }
  at.n_rows = n_bytes / row;
  return input_raw_open(path, fd, &at, opt->threads, out, err);
}

vs_rc input_fvecs_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out,
                       vs_err *err) {
  input_raw_layout at = {.num = INPUT_F32, .lead_bytes = 4};
  int32_t dim = (int32_t)opt->dim;
  uint64_t row;
  vs_rc rc = VS_OK;
  if (n_bytes >= 4) rc = input_pread(fd, path, &dim, 4, 0, err);
  else if (n_bytes || !opt->dim)
    rc = vs_fail(err, VS_INVALID, "%s: %s: no .fvecs row to take the dimension from", path,
                 n_bytes ? "is shorter than one row" : "the file is empty (0 bytes)");
  row = ((uint64_t)(dim > 0 ? dim : 0) + 1) * 4;
  if (rc) goto fail;
  if (dim < 1 || (uint32_t)dim > INPUT_DIM_MAX)
    rc = vs_fail(err, VS_CORRUPT, "%s: row 0 says %ld dimensions (1 to %u are possible): not a .fvecs file?", path,
                 (long)dim, INPUT_DIM_MAX);
  else if (opt->dim && opt->dim != (uint32_t)dim)
    rc = vs_fail(err, VS_INVALID, "%s: has dimension %ld, not %u", path, (long)dim, opt->dim);
  else if (n_bytes % row)
    rc = vs_fail(err, VS_CORRUPT,
                 "%s: its %llu bytes are not a whole number of rows of 4 + 4 x %ld bytes: cut, or rows of "
                 "different lengths",
                 path, (unsigned long long)n_bytes, (long)dim);
  else if (n_bytes / row > INPUT_ROWS_MAX) rc = vs_fail(err, VS_INVALID, "%s: too many rows", path);
  if (rc) goto fail;
  at.dim = (uint32_t)dim;
  at.n_rows = n_bytes / row;
  return input_raw_open(path, fd, &at, opt->threads, out, err);
fail:
  close(fd);
  return rc;
}
