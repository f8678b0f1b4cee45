/* input_hdf5_series.c - a 1-D HDF5 dataset of ids or of one metadata column, read a block of rows at a time.
 *
 *   stored as                     delivered as
 *   signed or unsigned integers   INPUT_INT; unsigned above 2^63-1: ids become decimal text (all of them), columns an error
 *   floats (columns only)         INPUT_REAL; NaN becomes NULL, as SQLite stores it
 *   enumerations (columns only)   INPUT_INT, the number behind the name (h5py's bool: 0 and 1)
 *   fixed-length strings          INPUT_TEXT without padding; null-terminated ones end at their first NUL
 *   variable-length strings       INPUT_TEXT
 *
 * Variable-length strings are copied into an arena, which is limited as a whole, because a small file can name one long
 * string a million times, and freed at once.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "input_hdf5_int.h"

#define ARENA_BLOCK ((size_t)1 << 20)
#define ARENA_MAX ((size_t)64 << 20)
#define FIXED_MAX ((size_t)1 << 20) /* bytes of a fixed-length string */
#define DIGITS 21                   /* 2^64-1 has 20, and a NUL */

/* A row of H5_KIND_VLEN in buf: first as libhdf5's 16-byte reference, then as this. */
typedef struct text_ref {
  const char *text;
  size_t len;
} text_ref;
_Static_assert(sizeof(text_ref) == 16, "takes the place of a reference");

struct input_h5_block {
  struct input_h5_block *next;
  size_t used, cap;
  unsigned char bytes[];
};

/* NULL with a->full set: the limit is met. */
static void *arena_get(input_h5_arena *a, size_t n) {
  struct input_h5_block *b = a->blocks;
  void *p;
  if (!b || b->cap - b->used < n) {
    size_t cap = n > ARENA_BLOCK ? n : ARENA_BLOCK;
    a->full = cap > ARENA_MAX || a->used > ARENA_MAX - cap;
    if (a->full) return NULL;
    b = malloc(sizeof *b + cap);
    if (!b) return NULL;
    b->next = a->blocks;
    b->used = 0;
    b->cap = cap;
    a->blocks = b;
    a->used += cap;
  }
  p = b->bytes + b->used;
  b->used += n;
  return p;
}

static void arena_reset(input_h5_arena *a) {
  while (a->blocks) {
    struct input_h5_block *b = a->blocks;
    a->blocks = b->next;
    free(b);
  }
  a->used = 0;
  a->full = 0;
}

size_t input_h5_text_len(const char *s, size_t n, H5T_str_t pad) {
  if (pad == H5T_STR_NULLTERM) return strnlen(s, n);
  while (n && (!s[n - 1] || (pad == H5T_STR_SPACEPAD && s[n - 1] == ' '))) n--;
  return n;
}

/* Chooses kind and memory type from the dataset's type. */
static vs_rc choose_kind(const input_h5_file *f, int is_id, input_h5_series *s, vs_err *err) {
  size_t size = H5Tget_size(s->ds.type);
  const char *what = is_id ? "ids" : "a metadata column";
  const char *wanted = is_id ? "integers or strings" : "integers, floats or strings";
  if (s->ds.class == H5T_STRING) {
    s->pad = H5Tget_strpad(s->ds.type);
    s->kind = H5Tis_variable_str(s->ds.type) > 0 ? H5_KIND_VLEN : H5_KIND_FIXED;
    s->elem = sizeof(text_ref);
    if (s->kind == H5_KIND_VLEN) return input_h5_vlen_open(f, &s->ds, &s->vlen, err);
    s->mem = H5Tcopy(s->ds.type);
    if (s->kind == H5_KIND_FIXED && size > FIXED_MAX)
      return vs_fail(err, VS_INVALID, "%s: '%s' holds strings of %zu bytes; %zu are the limit", f->path, s->ds.shown,
                     size, FIXED_MAX);
  } else if (s->ds.class == H5T_INTEGER && size <= 8) {
    s->kind = H5Tget_sign(s->ds.type) == H5T_SGN_NONE ? H5_KIND_UINT : H5_KIND_INT;
    s->mem = H5Tcopy(s->kind == H5_KIND_UINT ? H5T_NATIVE_UINT64 : H5T_NATIVE_INT64);
  } else if (s->ds.class == H5T_ENUM && !is_id && size <= 8) {
    s->kind = H5_KIND_INT;
    s->mem = H5Tcopy(H5T_NATIVE_INT64);
  } else if (s->ds.class == H5T_FLOAT && !is_id && size <= 8) {
    s->kind = H5_KIND_REAL;
    s->mem = H5Tcopy(H5T_NATIVE_DOUBLE);
  } else {
    return vs_fail(err, VS_INVALID, "%s: '%s' cannot serve as %s: %s are needed", f->path, s->ds.shown, what, wanted);
  }
  if (s->mem < 0) return input_h5_fail(err, VS_NOMEM, "%s: cannot make a memory type for '%s'", f->path, s->ds.shown);
  s->elem = H5Tget_size(s->mem);
  return VS_OK;
}

vs_rc input_h5_series_open(const input_h5_file *f, const char *name, int is_id, input_h5_series *s, vs_err *err) {
  vs_rc rc;
  memset(s, 0, sizeof *s);
  s->mem = -1;
  rc = input_h5_dataset_open(f, name, &s->ds, err);
  if (rc) return rc;
  if (s->ds.rank != 1) {
    char shape[INPUT_SHOW];
    rc = vs_fail(err, VS_INVALID, "%s: '%s' has the shape %s; %s must be one-dimensional", f->path, s->ds.shown,
                 input_h5_shape(&s->ds, shape), is_id ? "ids" : "a metadata column");
    goto fail;
  }
  rc = choose_kind(f, is_id, s, err);
  if (rc) goto fail;
  return VS_OK;
fail:
  input_h5_series_close(s);
  return rc;
}

void input_h5_series_close(input_h5_series *s) {
  if (s->mem >= 0) H5Tclose(s->mem);
  input_h5_vlen_close(s->vlen);
  input_h5_dataset_close(&s->ds);
  arena_reset(&s->arena);
  free(s->buf);
  free(s->digits);
  free(s->holes);
  memset(s, 0, sizeof *s);
  s->mem = s->ds.id = s->ds.type = -1;
}

static vs_rc reserve(input_h5_series *s, size_t n, vs_err *err) {
  if (n <= s->cap) return VS_OK;
  free(s->buf);
  free(s->digits);
  free(s->holes);
  s->cap = 0;
  s->buf = malloc(n * s->elem);
  s->digits = malloc(s->as_text ? n * DIGITS : 1);
  s->holes = malloc(n);
  if (!s->buf || !s->digits || !s->holes) return vs_nomem(err);
  s->cap = n;
  return VS_OK;
}

/* Turns the references in buf into texts in the arena. */
static vs_rc fetch_texts(const char *path, input_h5_series *s, uint64_t row, size_t n, int *too_big, vs_err *err) {
  for (size_t i = 0; i < n; i++) {
    text_ref ref;
    char *copy;
    vs_rc rc = input_h5_vlen_text(path, &s->ds, s->vlen, s->buf + i * sizeof ref, &ref.text, &ref.len, err);
    if (rc) return rc;
    copy = arena_get(&s->arena, ref.len);
    if (!copy && !s->arena.full) return vs_nomem(err);
    if (!copy) {
      *too_big = n > 1;
      if (*too_big) return VS_OK;
      return vs_fail(err, VS_INVALID, "%s: row %llu of '%s' is a string of more than %zu MiB", path,
                     (unsigned long long)row, s->ds.shown, ARENA_MAX >> 20);
    }
    memcpy(copy, ref.text, ref.len);
    ref.text = copy;
    memcpy(s->buf + i * sizeof ref, &ref, sizeof ref);
  }
  return VS_OK;
}

vs_rc input_h5_series_read(const char *path, input_h5_series *s, uint64_t row, size_t n, int *too_big, vs_err *err) {
  vs_rc rc = reserve(s, n, err);
  *too_big = 0;
  if (rc) return rc;
  arena_reset(&s->arena);
  memset(s->holes, 0, n);
  input_h5_find_holes(&s->ds, row, n, s->holes);
  if (s->vlen) rc = input_h5_vlen_refs(path, &s->ds, s->vlen, row, n, s->buf, err);
  else rc = input_h5_read_rows(path, &s->ds, s->mem, H5P_DEFAULT, row, n, s->buf, err);
  if (!rc && s->vlen) return fetch_texts(path, s, row, n, too_big, err);
  if (rc) return rc;
  if (s->as_text)
    for (size_t i = 0; i < n; i++) {
      uint64_t u;
      memcpy(&u, s->buf + i * s->elem, 8);
      snprintf(s->digits + i * DIGITS, DIGITS, "%llu", (unsigned long long)u);
    }
  return VS_OK;
}

static input_fault text_value(const char *text, size_t n, input_value *v) {
  if (!input_utf8_ok(text, n)) return INPUT_ID_UTF8;
  *v = (input_value){.type = INPUT_TEXT, .text = text, .len = n};
  return INPUT_FINE;
}

input_fault input_h5_series_value(const input_h5_series *s, size_t i, input_value *v) {
  const unsigned char *at = s->buf + i * s->elem;
  const char *text;
  *v = (input_value){.type = INPUT_NULL};
  if (s->holes[i]) return INPUT_HOLE;
  switch (s->kind) {
  case H5_KIND_INT:
    v->type = INPUT_INT;
    memcpy(&v->i, at, 8);
    return INPUT_FINE;
  case H5_KIND_UINT:
    if (s->as_text) return text_value(s->digits + i * DIGITS, strlen(s->digits + i * DIGITS), v);
    memcpy(&v->i, at, 8);
    if (v->i < 0) return INPUT_OVERFLOW;
    v->type = INPUT_INT;
    return INPUT_FINE;
  case H5_KIND_REAL:
    memcpy(&v->r, at, 8);
    if (!isnan(v->r)) v->type = INPUT_REAL;
    return INPUT_FINE;
  case H5_KIND_FIXED: text = (const char *)at; return text_value(text, input_h5_text_len(text, s->elem, s->pad), v);
  case H5_KIND_VLEN: {
    text_ref ref;
    memcpy(&ref, at, sizeof ref);
    return text_value(ref.text, input_h5_text_len(ref.text, ref.len, H5T_STR_NULLPAD), v);
  }
  }
  return INPUT_FINE;
}

vs_rc input_h5_series_exceeds(const char *path, input_h5_series *s, int *exceeds, vs_err *err) {
  *exceeds = 0;
  if (s->kind != H5_KIND_UINT || H5Tget_size(s->ds.type) < 8) return VS_OK;
  for (uint64_t row = 0; row < s->ds.dims[0] && !*exceeds;) {
    uint64_t left = s->ds.dims[0] - row, first = row;
    size_t n = left < INPUT_WINDOW_ROWS ? (size_t)left : INPUT_WINDOW_ROWS;
    int too_big;
    vs_rc rc;
    input_h5_align(&s->ds, s->ds.dims[0], INPUT_WINDOW_ROWS, &first, &n);
    rc = input_h5_series_read(path, s, first, n, &too_big, err);
    if (rc) return rc;
    for (size_t i = 0; i < n && !*exceeds; i++) {
      uint64_t u;
      memcpy(&u, s->buf + i * s->elem, 8);
      *exceeds = u > INT64_MAX;
    }
    row = first + n;
  }
  /* The digits' room depends on as_text, which the caller sets from this answer. */
  s->cap = 0;
  return VS_OK;
}

input_type input_h5_series_type(const input_h5_series *s) {
  if (s->kind == H5_KIND_REAL) return INPUT_REAL;
  return s->kind >= H5_KIND_FIXED || s->as_text ? INPUT_TEXT : INPUT_INT;
}
