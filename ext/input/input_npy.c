/* input_npy.c - the header of NumPy's .npy files, versions 1 to 3; the rows behind it are read by input_raw.c.
 *
 *   off  size
 *   0    6     93 'NUMPY'
 *   6    2     version: major 1, 2 or 3, minor 0
 *   8    2|4   header length, little-endian (4 bytes from version 2 on)
 *   ..         a Python dict literal with exactly the keys 'descr', 'fortran_order' and 'shape', padded by blanks, then \n
 *   ..         the array
 *
 * The dict is parsed by its own little grammar, not evaluated: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "input_int.h"

/* numpy.load itself refuses longer headers by default (10,000); those of 2-D arrays have 118 bytes. */
#define HEADER_MAX 10000u

typedef struct npy_header {
  const char *at; /* parse position; the text ends with a NUL */
  char descr[16];
  int has_descr, has_order, has_shape, structured;
  int fortran;
  uint64_t shape[2];
  int rank; /* dimensions in the tuple, also those beyond two */
} npy_header;

static void skip_blanks(npy_header *h) {
  while (*h->at == ' ' || *h->at == '\n' || *h->at == '\t') h->at++;
}

static int take(npy_header *h, char c) {
  skip_blanks(h);
  if (*h->at != c) return 0;
  h->at++;
  return 1;
}

static int take_string(npy_header *h, char *out, size_t cap) {
  size_t n = 0;
  char quote;
  skip_blanks(h);
  quote = *h->at;
  if (quote != '\'' && quote != '"') return 0;
  for (h->at++; *h->at && *h->at != quote; h->at++) {
    if (n + 1 >= cap || *h->at == '\\') return 0;
    out[n++] = *h->at;
  }
  out[n] = 0;
  if (*h->at != quote) return 0;
  h->at++;
  return 1;
}

static int take_number(npy_header *h, uint64_t *out) {
  uint64_t v = 0;
  skip_blanks(h);
  if (*h->at < '0' || *h->at > '9') return 0;
  for (; *h->at >= '0' && *h->at <= '9'; h->at++) {
    if (v > UINT64_MAX / 10 - 1) return 0;
    v = v * 10 + (uint64_t)(*h->at - '0');
  }
  *out = v;
  return 1;
}

static int take_bool(npy_header *h, int *out) {
  skip_blanks(h);
  if (!strncmp(h->at, "True", 4)) *out = 1, h->at += 4;
  else if (!strncmp(h->at, "False", 5)) *out = 0, h->at += 5;
  else return 0;
  return 1;
}

static int take_shape(npy_header *h) {
  if (!take(h, '(')) return 0;
  while (!take(h, ')')) {
    uint64_t n;
    if (!take_number(h, &n)) return 0;
    if (h->rank < 2) h->shape[h->rank] = n;
    h->rank++;
    if (!take(h, ',')) return take(h, ')');
  }
  return 1;
}

/* 1 when the whole text is such a dict. A structured dtype stops the parse early: it is refused anyway. */
static int parse_dict(npy_header *h) {
  if (!take(h, '{')) return 0;
  while (!take(h, '}')) {
    char key[32];
    if (!take_string(h, key, sizeof key) || !take(h, ':')) return 0;
    skip_blanks(h);
    if (!strcmp(key, "descr") && !h->has_descr) {
      h->has_descr = 1;
      h->structured = *h->at == '[' || *h->at == '{' || *h->at == '(';
      if (h->structured) return 1;
      if (!take_string(h, h->descr, sizeof h->descr)) return 0;
    } else if (!strcmp(key, "fortran_order") && !h->has_order) {
      h->has_order = 1;
      if (!take_bool(h, &h->fortran)) return 0;
    } else if (!strcmp(key, "shape") && !h->has_shape) {
      h->has_shape = 1;
      if (!take_shape(h)) return 0;
    } else {
      return 0;
    }
    if (take(h, ',')) continue;
    if (!take(h, '}')) return 0;
    break;
  }
  skip_blanks(h);
  return !*h->at && h->has_descr && h->has_order && h->has_shape;
}

/* Reads and parses the header; *data_off is where the array starts. */
static vs_rc read_header(const char *path, int fd, uint64_t n_bytes, npy_header *h, char text[HEADER_MAX + 1],
                         uint64_t *data_off, vs_err *err) {
  unsigned char head[12] = {0};
  uint32_t n, lead;
  vs_rc rc;
  if (n_bytes < 12) return vs_corrupt(err, "%s: ends within the .npy header", path);
  rc = input_pread(fd, path, head, sizeof head, 0, err);
  if (rc) return rc;
  if (head[6] < 1 || head[6] > 3 || head[7])
    return vs_fail(err, VS_UNSUPPORTED, "%s: .npy version %u.%u; 1.0, 2.0 and 3.0 can be read", path, head[6],
                   head[7]);
  lead = head[6] == 1 ? 10 : 12;
  n = (uint32_t)head[8] | (uint32_t)head[9] << 8;
  if (lead == 12) n |= (uint32_t)head[10] << 16 | (uint32_t)head[11] << 24;
  if (n > HEADER_MAX) return vs_corrupt(err, "%s: a .npy header of %u bytes (limit %u)", path, n, HEADER_MAX);
  if (n_bytes - lead < n && n_bytes >= lead) return vs_corrupt(err, "%s: ends within the .npy header", path);
  rc = input_pread(fd, path, text, n, lead, err);
  if (rc) return rc;
  text[n] = 0;
  h->at = text;
  *data_off = (uint64_t)lead + n;
  if (strlen(text) != n || !parse_dict(h))
    return vs_corrupt(err,
                      "%s: the .npy header is not a dict of descr, fortran_order "
                      "and shape",
                      path);
  return VS_OK;
}

/* What dtype and shape must be; fills the layout. */
static vs_rc check_header(const char *path, const npy_header *h, const input_options *opt, uint64_t n_data,
                          input_raw_layout *at, vs_err *err) {
  char shown[INPUT_SHOW];
  const char *d = h->descr;
  if (h->structured)
    return vs_fail(err, VS_INVALID, "%s: a structured array; save the vectors alone as a 2-D float array", path);
  if ((d[0] != '<' && d[0] != '>') || d[1] != 'f' || (strcmp(d + 2, "2") && strcmp(d + 2, "4") && strcmp(d + 2, "8")))
    return vs_fail(err, VS_INVALID,
                   "%s: dtype '%s'; float16, float32 or float64 are needed: save a.astype('float32')", path,
                   input_show(shown, d, strlen(d)));
  at->num = d[2] == '2' ? (d[0] == '>' ? INPUT_F16_BE : INPUT_F16)
            : d[2] == '4' ? (d[0] == '>' ? INPUT_F32_BE : INPUT_F32)
                          : (d[0] == '>' ? INPUT_F64_BE : INPUT_F64);
  if (h->rank != 2)
    return vs_fail(err, VS_INVALID, "%s: has %d dimension(s); a 2-D array (rows, dimension) is needed", path,
                   h->rank);
  if (h->fortran)
    return vs_fail(err, VS_INVALID,
                   "%s: is in Fortran order (column after column): save "
                   "np.ascontiguousarray(a)",
                   path);
  if (!h->shape[1] || h->shape[1] > INPUT_DIM_MAX)
    return vs_fail(err, VS_INVALID, "%s: shape (%llu, %llu): the dimension must be 1 to %u", path,
                   (unsigned long long)h->shape[0], (unsigned long long)h->shape[1], INPUT_DIM_MAX);
  if (opt->dim && opt->dim != h->shape[1])
    return vs_fail(err, VS_INVALID, "%s: has dimension %llu, not %u", path, (unsigned long long)h->shape[1],
                   opt->dim);
  if (h->shape[0] > INPUT_ROWS_MAX)
    return vs_corrupt(err, "%s: claims %llu rows", path, (unsigned long long)h->shape[0]);
  at->n_rows = h->shape[0];
  at->dim = (uint32_t)h->shape[1];
  if (at->n_rows * at->dim * input_num_bytes(at->num) != n_data)
    return vs_corrupt(err, "%s: shape (%llu, %u) of '%s' needs %llu bytes of data, the file has %llu: %s", path,
                      (unsigned long long)at->n_rows, at->dim, d,
                      (unsigned long long)(at->n_rows * at->dim * input_num_bytes(at->num)), (unsigned long long)n_data,
                      n_data < at->n_rows * at->dim * input_num_bytes(at->num) ? "it was cut" : "several arrays in one file?");
  return VS_OK;
}

vs_rc input_npy_open(const char *path, int fd, uint64_t n_bytes, const input_options *opt, input **out, vs_err *err) {
  input_raw_layout at = {0};
  npy_header h = {0};
  char text[HEADER_MAX + 1];
  vs_rc rc = read_header(path, fd, n_bytes, &h, text, &at.data_off, err);
  if (!rc) rc = check_header(path, &h, opt, n_bytes - at.data_off, &at, err);
  if (!rc) return input_raw_open(path, fd, &at, opt->threads, out, err);
  close(fd);
  return rc;
}
