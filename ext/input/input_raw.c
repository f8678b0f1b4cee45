/* input_raw.c - .fvecs and .f32, and the reader of equal-length rows that .npy shares with them.
 *
 *   .f32    float32 little-endian, row after row; the dimension comes from the caller
 *   .fvecs  per row an int32 dimension, the same in every row, then that many float32
 *
 * Rows are read by pread into one buffer of at most INPUT_WINDOW_BYTES, whatever the file's size; ids are row numbers.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "input_int.h"

typedef struct raw_input {
  input base; /* first: the caller's pointer is to this */
  input_raw_layout at;
  size_t stride; /* bytes of one row in the file */
  size_t max_rows;
  uint64_t pos; /* row of the next read */
  int fd;
  unsigned char *buf; /* rows as they are in the file */
  size_t buf_rows;
  input_rows rows;
} raw_input;

static void swap_bytes(unsigned char *p, size_t n, uint32_t width) {
  for (size_t i = 0; i < n; i++, p += width)
    for (uint32_t a = 0, b = width - 1; a < b; a++, b--) {
      unsigned char t = p[a];
      p[a] = p[b];
      p[b] = t;
    }
}

/* The numbers of one row, from the file's form to floats. */
static input_fault decode_row(const raw_input *in, unsigned char *src, float *out) {
  uint32_t dim = in->at.dim;
  if (in->at.big_endian) swap_bytes(src, dim, in->at.elem_bytes);
  if (in->at.elem_bytes == 8) return input_narrow_row(src, out, dim);
  if (in->at.elem_bytes == 2) input_widen_half(src, out, dim);
  else memcpy(out, src, (size_t)dim * 4);
  return input_check_row(out, dim);
}

static vs_rc raw_read(input *base, size_t max_rows, input_batch *batch, vs_err *err) {
  raw_input *in = (raw_input *)base;
  uint64_t left = base->n_rows - in->pos;
  size_t n = max_rows < in->max_rows ? max_rows : in->max_rows;
  vs_rc rc;
  memset(batch, 0, sizeof *batch);
  batch->first_row = in->pos;
  if (n > left) n = (size_t)left;
  if (!n) return VS_OK;
  if (n > in->buf_rows) {
    free(in->buf);
    in->buf_rows = 0;
    in->buf = malloc(n * in->stride);
    if (!in->buf) return vs_nomem(err);
    in->buf_rows = n;
  }
  rc = input_rows_reserve(&in->rows, n, base->dim, sizeof(float), 0, err);
  if (!rc) rc = input_pread(in->fd, base->path, in->buf, n * in->stride, in->at.data_off + in->pos * in->stride, err);
  if (rc) return rc;
  for (size_t i = 0; i < n; i++) {
    unsigned char *src = in->buf + i * in->stride;
    if (in->at.lead_bytes) {
      uint32_t dim;
      memcpy(&dim, src, 4);
      if (dim != base->dim)
        return vs_corrupt(err, "%s: row %llu says %ld dimensions, row 0 has %u: all rows of a .fvecs file must agree",
                          base->path, (unsigned long long)(in->pos + i), (long)(int32_t)dim, base->dim);
    }
    in->rows.faults[i] = (uint8_t)decode_row(in, src + in->at.lead_bytes, in->rows.vectors + i * base->dim);
    in->rows.ids[i] = (input_value){.type = INPUT_INT, .i = (int64_t)(in->pos + i)};
  }
  batch->n = n;
  batch->vectors = in->rows.vectors;
  batch->ids = in->rows.ids;
  batch->columns = in->rows.columns;
  batch->faults = in->rows.faults;
  in->pos += n;
  return VS_OK;
}

static vs_rc raw_seek(input *base, uint64_t row, vs_err *err) {
  if (row > base->n_rows)
    return vs_fail(err, VS_INVALID, "%s: no row %llu, the file has %llu", base->path, (unsigned long long)row,
                   (unsigned long long)base->n_rows);
  ((raw_input *)base)->pos = row;
  return VS_OK;
}

static void raw_close(input *base) {
  raw_input *in = (raw_input *)base;
  close(in->fd);
  input_rows_free(&in->rows);
  free(in->buf);
  free((char *)base->path);
  free(in);
}

vs_rc input_raw_open(const char *path, int fd, const input_raw_layout *layout, input **out, vs_err *err) {
  raw_input *in = calloc(1, sizeof *in);
  if (in) in->base.path = strdup(path);
  if (!in || !in->base.path) {
    free(in);
    close(fd);
    return vs_nomem(err);
  }
  in->at = *layout;
  in->fd = fd;
  in->stride = (size_t)layout->lead_bytes + (size_t)layout->dim * layout->elem_bytes;
  /* dim <= INPUT_DIM_MAX makes a row at most 128 KiB, so this is never 0. */
  in->max_rows = INPUT_WINDOW_BYTES / in->stride;
  if (in->max_rows > INPUT_WINDOW_ROWS) in->max_rows = INPUT_WINDOW_ROWS;
  in->base.n_rows = layout->n_rows;
  in->base.dim = layout->dim;
  in->base.id_kind = INPUT_ID_ROW;
  in->base.read = raw_read;
  in->base.seek = raw_seek;
  in->base.close = raw_close;
  *out = &in->base;
  return VS_OK;
}

vs_rc input_f32_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out, vs_err *err) {
  input_raw_layout at = {.dim = opt->dim, .elem_bytes = 4};
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
  return input_raw_open(path, fd, &at, out, err);
}

vs_rc input_fvecs_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out,
                       vs_err *err) {
  input_raw_layout at = {.elem_bytes = 4, .lead_bytes = 4};
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
  return input_raw_open(path, fd, &at, out, err);
fail:
  close(fd);
  return rc;
}
