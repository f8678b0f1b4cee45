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
#define ARENA_MAX ((size_t)32 << 20)  /* texts of one window */
#define STRING_MAX ((size_t)64 << 20) /* one text; a window may have one that is longer than ARENA_MAX */
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
    a->full = n > STRING_MAX || (a->used && (cap > ARENA_MAX || a->used > ARENA_MAX - cap));
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

static void arena_free(input_h5_arena *a) {
  while (a->blocks) {
    struct input_h5_block *b = a->blocks;
    a->blocks = b->next;
    free(b);
  }
  memset(a, 0, sizeof *a);
}

/* Keeps one block: the next window's texts most often fit. */
static void arena_reset(input_h5_arena *a) {
  struct input_h5_block *b = a->blocks;
  if (b && b->cap == ARENA_BLOCK) a->blocks = b->next;
  else b = NULL;
  arena_free(a);
  if (!b) return;
  b->next = NULL;
  b->used = 0;
  a->blocks = b;
  a->used = b->cap;
}

size_t input_h5_text_len(const char *s, size_t n, H5T_str_t pad) {
  if (pad == H5T_STR_NULLTERM) return strnlen(s, n);
  while (n && (!s[n - 1] || (pad == H5T_STR_SPACEPAD && s[n - 1] == ' '))) n--;
  return n;
}

/* Chooses kind and memory type from the dataset's type. */
static vs_rc choose_kind(input_h5_file *f, int is_id, const int *cancel, input_h5_series *s, vs_err *err) {
  size_t size = H5Tget_size(s->ds.type);
  const char *what = is_id ? "ids" : "a metadata column";
  const char *wanted = is_id ? "integers or strings" : "integers, floats or strings";
  if (s->ds.class == H5T_STRING) {
    s->pad = H5Tget_strpad(s->ds.type);
    s->kind = H5Tis_variable_str(s->ds.type) > 0 ? H5_KIND_VLEN : H5_KIND_FIXED;
    s->elem = sizeof(text_ref);
    if (s->kind == H5_KIND_VLEN) return input_h5_vlen_open(f, &s->ds, cancel, &s->vlen, err);
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

vs_rc input_h5_series_open(input_h5_file *f, const char *name, int is_id, const int *cancel, input_h5_series *s,
                           vs_err *err) {
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
  rc = choose_kind(f, is_id, cancel, s, err);
  /* Numbers are widened in place, so they must not be wider in the file. */
  if (!rc && !s->vlen && s->ds.elem <= s->elem) rc = input_h5_chunks_open(f, &s->ds, 0, 1, cancel, &s->chunks, err);
  if (rc) goto fail;
  return VS_OK;
fail:
  input_h5_series_close(s);
  return rc;
}

void input_h5_series_close(input_h5_series *s) {
  if (s->mem >= 0) H5Tclose(s->mem);
  input_h5_vlen_close(s->vlen);
  input_h5_chunks_close(s->chunks);
  input_h5_dataset_close(&s->ds);
  memset(s, 0, sizeof *s);
  s->mem = s->ds.id = s->ds.type = -1;
}

void input_h5_values_free(input_h5_values *v) {
  arena_free(&v->arena);
  free(v->buf);
  free(v->digits);
  free(v->flags);
  memset(v, 0, sizeof *v);
}

static vs_rc reserve(const input_h5_series *s, input_h5_values *v, size_t n, vs_err *err) {
  if (n <= v->cap) return VS_OK;
  input_h5_values_free(v);
  v->buf = malloc(n * s->elem);
  v->digits = malloc(s->as_text ? n * DIGITS : 1);
  v->flags = malloc(n);
  if (!v->buf || !v->digits || !v->flags) return vs_nomem(err);
  v->cap = n;
  return VS_OK;
}

/* Turns the references in buf into texts in the arena. */
static vs_rc fetch_texts(input_h5_series *s, input_h5_values *v, uint64_t row, size_t *n, vs_err *err) {
  for (size_t i = 0; i < *n; i++) {
    text_ref ref;
    char *copy;
    vs_rc rc = input_h5_vlen_text(&s->ds, s->vlen, v->buf + i * sizeof ref, &ref.text, &ref.len, err);
    if (rc) {
      *n = i;
      return rc;
    }
    copy = arena_get(&v->arena, ref.len);
    if (!copy) {
      *n = i;
      if (!v->arena.full) return vs_nomem(err);
      if (i) return VS_OK;
      return vs_fail(err, VS_INVALID, "%s: row %llu of '%s' is a string of more than %zu MiB", s->ds.path,
                     (unsigned long long)row, s->ds.shown, STRING_MAX >> 20);
    }
    memcpy(copy, ref.text, ref.len);
    ref.text = copy;
    memcpy(v->buf + i * sizeof ref, &ref, sizeof ref);
  }
  return VS_OK;
}

/* Numbers and fixed strings as they are in the file become what s->mem says, in place. */
static vs_rc convert(const input_h5_series *s, input_h5_values *v, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  input_h5_lock();
  if (H5Tequal(s->ds.type, s->mem) <= 0 && H5Tconvert(s->ds.type, s->mem, n, v->buf, NULL, H5P_DEFAULT) < 0)
    rc = input_h5_fail(err, VS_CORRUPT, "%s: cannot convert rows of '%s'", s->ds.path, s->ds.shown);
  input_h5_unlock();
  return rc;
}

static vs_rc read_values(input_h5_series *s, input_h5_values *v, uint64_t row, size_t *n, vs_err *err) {
  vs_rc rc;
  if (s->vlen) return input_h5_vlen_refs(&s->ds, s->vlen, row, n, v->buf, v->flags, err);
  if (s->chunks) {
    rc = input_h5_chunks_read(s->chunks, row, n, NULL, v->buf, v->flags, err);
    if (!*n) return rc;
    vs_rc converted = convert(s, v, *n, err);
    return rc ? rc : converted;
  }
  memset(v->flags, 0, *n);
  input_h5_lock();
  input_h5_find_holes(&s->ds, row, *n, v->flags);
  rc = input_h5_read_rows(&s->ds, s->mem, row, *n, v->buf, err);
  input_h5_unlock();
  if (rc) *n = 0;
  return rc;
}

vs_rc input_h5_series_read(input_h5_series *s, input_h5_values *v, uint64_t row, size_t *n, vs_err *err) {
  vs_rc rc = reserve(s, v, *n, err);
  vs_err why = {0};
  if (rc) {
    *n = 0;
    return rc;
  }
  arena_reset(&v->arena);
  rc = read_values(s, v, row, n, &why);
  if (*n && s->vlen) {
    size_t asked = *n;
    vs_rc text_rc = fetch_texts(s, v, row, n, err);
    if (text_rc || *n < asked) return text_rc; /* of an earlier row than rc's, if there is one */
  }
  for (size_t i = 0; s->as_text && i < *n; i++) {
    uint64_t u;
    memcpy(&u, v->buf + i * s->elem, 8);
    snprintf(v->digits + i * DIGITS, DIGITS, "%llu", (unsigned long long)u);
  }
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

static input_fault text_value(const char *text, size_t n, input_value *v) {
  if (!input_utf8_ok(text, n)) return INPUT_ID_UTF8;
  *v = (input_value){.type = INPUT_TEXT, .text = text, .len = n};
  return INPUT_FINE;
}

input_fault input_h5_series_value(const input_h5_series *s, const input_h5_values *v, size_t i, input_value *out) {
  const unsigned char *at = v->buf + i * s->elem;
  const char *text;
  *out = (input_value){.type = INPUT_NULL};
  if (v->flags[i]) return INPUT_HOLE;
  switch (s->kind) {
  case H5_KIND_INT:
    out->type = INPUT_INT;
    memcpy(&out->i, at, 8);
    return INPUT_FINE;
  case H5_KIND_UINT:
    if (s->as_text) return text_value(v->digits + i * DIGITS, strlen(v->digits + i * DIGITS), out);
    memcpy(&out->i, at, 8);
    if (out->i < 0) return INPUT_OVERFLOW;
    out->type = INPUT_INT;
    return INPUT_FINE;
  case H5_KIND_REAL:
    memcpy(&out->r, at, 8);
    if (!isnan(out->r)) out->type = INPUT_REAL;
    return INPUT_FINE;
  case H5_KIND_FIXED: text = (const char *)at; return text_value(text, input_h5_text_len(text, s->elem, s->pad), out);
  case H5_KIND_VLEN: {
    text_ref ref;
    memcpy(&ref, at, sizeof ref);
    return text_value(ref.text, input_h5_text_len(ref.text, ref.len, H5T_STR_NULLPAD), out);
  }
  }
  return INPUT_FINE;
}

vs_rc input_h5_series_exceeds(input_h5_series *s, int *exceeds, vs_err *err) {
  input_h5_values v = {0};
  vs_rc rc = VS_OK;
  *exceeds = 0;
  if (s->kind != H5_KIND_UINT || s->ds.elem < 8) return VS_OK;
  for (uint64_t row = 0; row < s->ds.dims[0] && !*exceeds && !rc;) {
    uint64_t left = s->ds.dims[0] - row;
    size_t n = left < INPUT_WINDOW_ROWS ? (size_t)left : INPUT_WINDOW_ROWS;
    rc = input_h5_series_read(s, &v, row, &n, err);
    for (size_t i = 0; i < n && !*exceeds; i++) {
      uint64_t u;
      memcpy(&u, v.buf + i * s->elem, 8);
      *exceeds = u > INT64_MAX;
    }
    row += n;
  }
  input_h5_values_free(&v);
  return rc;
}

input_type input_h5_series_type(const input_h5_series *s) {
  if (s->kind == H5_KIND_REAL) return INPUT_REAL;
  return s->kind >= H5_KIND_FIXED || s->as_text ? INPUT_TEXT : INPUT_INT;
}
