/* input_concat.c - see input_concat.h.
 *
 * Opening looks at each file once and notes its shape; reading opens them again one after the other. A file whose shape
 * has changed in between is an error: its rows would land under wrong numbers.
 *
 * While the caller works on the last rows of a file the next one is opened and its first rows are loaded. What goes wrong there
 * is reported when these rows are asked for.
 */
#include "input_concat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

typedef struct part {
  char *path;
  uint64_t first, n_rows; /* first: number of its row 0 in the whole */
} part;

typedef struct concat {
  input base;
  input_options opt;
  part *parts;
  size_t n_parts;
  input_type *types;
  input *open;       /* NULL, or the input of parts[at] */
  size_t at;         /* the part that the next read starts in; n_parts at the end */
  input *next;       /* NULL, or the input of parts[next_at], loading */
  size_t next_at;    /* the part that was last opened ahead, or tried */
  input_value *ids;  /* of the last batch, where row numbers had to be moved */
  size_t ids_room;
} concat;

static vs_rc differ(const concat *c, const part *p, const char *what, vs_err *err) {
  return vs_fail(err, VS_INVALID, "%s and %s differ in %s: one shard holds one kind", c->parts[0].path, p->path, what);
}

static const char *id_words(input_id_kind k) {
  return k == INPUT_ID_TEXT ? "text ids" : k == INPUT_ID_INT ? "integer ids" : "row numbers as ids";
}

static const char *type_words(input_type t) {
  return t == INPUT_TEXT ? "text" : t == INPUT_INT ? "integers" : t == INPUT_REAL ? "reals" : "nothing";
}

/* Is this file like the first one? */
static vs_rc compare(const concat *c, const part *p, const input *in, vs_err *err) {
  const input *b = &c->base;
  char what[300];
  if (in->n_columns != c->opt.n_columns)
    return vs_fail(err, VS_INVALID, "%s: --column reads HDF5 files only", p->path);
  if (in->dim != b->dim) {
    snprintf(what, sizeof what, "dimension (%u and %u)", b->dim, in->dim);
    return differ(c, p, what, err);
  }
  if (in->id_kind != b->id_kind) {
    snprintf(what, sizeof what, "ids (%s and %s)", id_words(b->id_kind), id_words(in->id_kind));
    return differ(c, p, what, err);
  }
  for (size_t i = 0; i < in->n_columns; i++)
    if (in->column_types[i] != c->types[i]) {
      snprintf(what, sizeof what, "column %.200s (%s and %s)", c->opt.columns[i], type_words(c->types[i]),
               type_words(in->column_types[i]));
      return differ(c, p, what, err);
    }
  return VS_OK;
}

static void take_shape(concat *c, const input *in) {
  c->base.dim = in->dim, c->base.id_kind = in->id_kind, c->base.n_columns = in->n_columns;
  c->types = tool_alloc(in->n_columns, sizeof *c->types);
  if (in->n_columns) memcpy(c->types, in->column_types, in->n_columns * sizeof *c->types);
  c->base.column_types = c->types;
}

/* Makes parts[i] the open one. */
static vs_rc open_part(concat *c, size_t i, vs_err *err) {
  part *p = &c->parts[i];
  if (c->open && c->at == i) return VS_OK;
  vs_rc rc = VS_OK;
  input_close(c->open);
  c->open = NULL, c->at = i;
  if (c->next && c->next_at == i) c->open = c->next, c->next = NULL;
  input_close(c->next);
  c->next = NULL, c->next_at = 0;
  if (!c->open) rc = input_open(p->path, &c->opt, &c->open, err);
  if (!rc && (c->open->n_rows != p->n_rows || compare(c, p, c->open, NULL)))
    rc = vs_fail(err, VS_IO, "%s: changed while it was read", p->path);
  if (rc) input_close(c->open), c->open = NULL;
  return rc;
}

/* The part that holds a row: the last one that starts at or before it and is not empty; n_parts at the end. */
static size_t find_part(const concat *c, uint64_t row) {
  size_t lo = 0, hi = c->n_parts;
  while (lo < hi) {
    size_t mid = (lo + hi) / 2;
    if (c->parts[mid].first + c->parts[mid].n_rows <= row) lo = mid + 1;
    else hi = mid;
  }
  return lo;
}

/* When all rows of the open part are loaded or being loaded: opens the next part that has any. */
static void open_ahead(concat *c, size_t max_rows) {
  size_t i = c->at + 1;
  if (!c->open->start || c->open->loaded_end < c->open->n_rows) return;
  while (i < c->n_parts && !c->parts[i].n_rows) i++;
  if (i >= c->n_parts || c->next_at == i) return;
  input_close(c->next);
  c->next = NULL, c->next_at = i;
  if (!input_open(c->parts[i].path, &c->opt, &c->next, NULL) && c->next->start) c->next->start(c->next, max_rows);
}

static vs_rc concat_seek(input *in, uint64_t row, vs_err *err) {
  concat *c = (concat *)in;
  if (row > in->n_rows) return vs_fail(err, VS_INVALID, "%s: there is no row %llu", in->path, (unsigned long long)row);
  size_t i = find_part(c, row);
  if (i == c->n_parts) {
    input_close(c->open);
    c->open = NULL, c->at = i;
    return VS_OK;
  }
  vs_rc rc = open_part(c, i, err);
  return rc ? rc : c->open->seek(c->open, row - c->parts[i].first, err);
}

/* Row numbers of later files run on from those of the earlier ones. */
static void move_ids(concat *c, input_batch *batch) {
  if (batch->n > c->ids_room) {
    free(c->ids);
    c->ids = tool_alloc(batch->n, sizeof *c->ids), c->ids_room = batch->n;
  }
  for (size_t i = 0; i < batch->n; i++)
    c->ids[i] = (input_value){.type = INPUT_INT, .i = (int64_t)(batch->first_row + i)};
  batch->ids = c->ids;
}

static vs_rc concat_read(input *in, size_t max_rows, input_batch *batch, vs_err *err) {
  concat *c = (concat *)in;
  memset(batch, 0, sizeof *batch);
  for (; c->at < c->n_parts;) {
    part *p = &c->parts[c->at];
    if (!p->n_rows) {
      c->at++;
      continue;
    }
    vs_rc rc = open_part(c, c->at, err);
    if (!rc) rc = c->open->read(c->open, max_rows, batch, err);
    if (rc) return rc;
    batch->first_row += p->first;
    if (batch->n) {
      if (in->id_kind == INPUT_ID_ROW && p->first) move_ids(c, batch);
      open_ahead(c, max_rows);
      return VS_OK;
    }
    input_close(c->open);
    c->open = NULL, c->at++;
  }
  return VS_OK;
}

static void concat_close(input *in) {
  concat *c = (concat *)in;
  input_close(c->open);
  input_close(c->next);
  for (size_t i = 0; i < c->n_parts; i++) free(c->parts[i].path);
  free(c->parts), free(c->types), free(c->ids), free(c);
}

static vs_rc look_at(concat *c, size_t i, vs_err *err) {
  part *p = &c->parts[i];
  input *in;
  vs_rc rc = input_open(p->path, &c->opt, &in, err);
  if (rc) return rc;
  if (i == 0) take_shape(c, in);
  rc = compare(c, p, in, err);
  p->first = c->base.n_rows, p->n_rows = in->n_rows;
  c->base.n_rows += in->n_rows;
  input_close(in);
  return rc;
}

vs_rc input_concat_open(char *const *paths, size_t n, const input_options *opt,
                        void (*progress)(void *ctx, const char *stage, uint64_t done, uint64_t total), input **out,
                        vs_err *err) {
  concat *c = tool_alloc(1, sizeof *c);
  vs_rc rc = n ? VS_OK : vs_fail(err, VS_INVALID, "no input files");
  c->base = (input){.read = concat_read, .seek = concat_seek, .close = concat_close};
  c->opt = *opt;
  c->parts = tool_alloc(n, sizeof *c->parts);
  for (size_t i = 0; i < n; i++) c->parts[i].path = tool_format("%s", paths[i]);
  c->n_parts = n;
  c->base.path = n ? c->parts[0].path : "";
  for (size_t i = 0; i < n && !rc; i++) {
    if (progress && n > 1) progress(NULL, "open", i, n);
    rc = tool_stop(NULL) ? vs_fail(err, VS_INTERRUPT, "interrupted") : look_at(c, i, err);
  }
  if (rc) concat_close(&c->base), c = NULL;
  *out = c ? &c->base : NULL;
  return rc;
}

void input_concat_describe(const input *in, uint64_t row, char *buf, size_t n) {
  const concat *c = (const concat *)in;
  size_t i = find_part(c, row);
  if (i == c->n_parts) snprintf(buf, n, "row %llu", (unsigned long long)row);
  else snprintf(buf, n, "%s: row %llu", c->parts[i].path, (unsigned long long)(row - c->parts[i].first));
}
