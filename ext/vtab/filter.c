/* filter.c - see filter.h. */
#include "filter.h"

#include <stdlib.h>
#include <string.h>
SQLITE_EXTENSION_INIT3

int filter_op_of(int op, int is_in, shard_type type) {
  if (is_in) return FILTER_IN;
  switch (op) {
    case SQLITE_INDEX_CONSTRAINT_EQ: return FILTER_EQ;
    case SQLITE_INDEX_CONSTRAINT_NE: return FILTER_NE;
    case SQLITE_INDEX_CONSTRAINT_LT: return FILTER_LT;
    case SQLITE_INDEX_CONSTRAINT_LE: return FILTER_LE;
    case SQLITE_INDEX_CONSTRAINT_GT: return FILTER_GT;
    case SQLITE_INDEX_CONSTRAINT_GE: return FILTER_GE;
    case SQLITE_INDEX_CONSTRAINT_IS: return FILTER_IS;
    case SQLITE_INDEX_CONSTRAINT_ISNOT: return FILTER_ISNOT;
    case SQLITE_INDEX_CONSTRAINT_ISNULL: return FILTER_ISNULL;
    case SQLITE_INDEX_CONSTRAINT_ISNOTNULL: return FILTER_NOTNULL;
    case SQLITE_INDEX_CONSTRAINT_LIKE: return type != SHARD_REAL ? FILTER_LIKE : 0;
    case SQLITE_INDEX_CONSTRAINT_GLOB: return type != SHARD_REAL ? FILTER_GLOB : 0; /* how a real prints is SQLite's affair */
    default: return 0;
  }
}

/* ---- taking values ---- */

static vs_rc take_value(shard_type type, sqlite3_value *v, filter_value *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  out->type = type == SHARD_TEXT ? sqlite3_value_type(v) : sqlite3_value_numeric_type(v);
  if (type == SHARD_TEXT && (out->type == SQLITE_INTEGER || out->type == SQLITE_FLOAT)) out->type = SQLITE_TEXT;
  if (out->type == SQLITE_INTEGER) out->i = sqlite3_value_int64(v);
  else if (out->type == SQLITE_FLOAT) out->r = sqlite3_value_double(v);
  else if (out->type == SQLITE_TEXT) {
    const char *text = (const char *)sqlite3_value_text(v);
    if (!text) return vs_nomem(err);
    out->len = (uint32_t)sqlite3_value_bytes(v);
    if (!(out->text = malloc(out->len + 1u))) return vs_nomem(err);
    memcpy(out->text, text, out->len);
    out->text[out->len] = 0;
  }
  return VS_OK;
}

static int number_order(const filter_value *a, const filter_value *b) {
  if (a->type == SQLITE_INTEGER && b->type == SQLITE_INTEGER) return a->i < b->i ? -1 : a->i > b->i;
  /* long double holds every int64 on the platforms we run on */
  long double x = a->type == SQLITE_INTEGER ? (long double)a->i : (long double)a->r;
  long double y = b->type == SQLITE_INTEGER ? (long double)b->i : (long double)b->r;
  return x < y ? -1 : x > y;
}

/* SQLite's order of storage classes: NULL, numbers, text, blobs. */
static int class_of(const filter_value *v) {
  return v->type == SQLITE_NULL ? 0 : v->type == SQLITE_TEXT ? 2 : v->type == SQLITE_BLOB ? 3 : 1;
}

static int value_order(const void *pa, const void *pb) {
  const filter_value *a = pa, *b = pb;
  int x = class_of(a), y = class_of(b);
  if (x != y || x == 0 || x == 3) return x < y ? -1 : x > y;
  if (x == 1) return number_order(a, b);
  int c = memcmp(a->text, b->text, a->len < b->len ? a->len : b->len);
  return c ? c : a->len < b->len ? -1 : a->len > b->len;
}

static vs_rc add_value(filter_term *t, size_t *room, shard_type type, sqlite3_value *v, vs_err *err) {
  if (t->n == *room) {
    size_t more = *room ? *room * 2 : 4;
    filter_value *grown = realloc(t->values, more * sizeof *grown);
    if (!grown) return vs_nomem(err);
    t->values = grown, *room = more;
  }
  vs_rc rc = take_value(type, v, &t->values[t->n], err);
  if (!rc) t->n++;
  return rc;
}

/* ---- deciding ---- */

static int matches(const filter_term *t, const filter_value *v) {
  const filter_value *want = t->values;
  int null = v->type == SQLITE_NULL;
  switch (t->op) {
    case FILTER_ISNULL: return null;
    case FILTER_NOTNULL: return !null;
    case FILTER_IS: return want->type == SQLITE_BLOB ? 0 : value_order(v, want) == 0;
    case FILTER_ISNOT: return want->type == SQLITE_BLOB ? 1 : value_order(v, want) != 0;
    default: break;
  }
  if (null) return 0;
  if (t->op == FILTER_IN) return t->n && bsearch(v, t->values, t->n, sizeof *v, value_order) != NULL;
  if (want->type == SQLITE_NULL) return 0;
  if (t->op == FILTER_LIKE || t->op == FILTER_GLOB) {
    char digits[24];
    const char *text = v->type == SQLITE_TEXT ? v->text : sqlite3_snprintf(sizeof digits, digits, "%lld", v->i);
    if (want->type != SQLITE_TEXT) return 1;
    return (t->op == FILTER_LIKE ? sqlite3_strlike(want->text, text, 0) : sqlite3_strglob(want->text, text)) == 0;
  }
  int c = value_order(v, want);
  switch (t->op) {
    case FILTER_EQ: return c == 0;
    case FILTER_NE: return c != 0;
    case FILTER_LT: return c < 0;
    case FILTER_LE: return c <= 0;
    case FILTER_GT: return c > 0;
    default: return c >= 0;
  }
}

static uint32_t u32_at(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

/* Texts are copied: LIKE and GLOB need a NUL behind them. */
static vs_rc text_value(filter_value *v, const char *text, uint32_t len, char **buf, size_t *room, vs_err *err) {
  if ((size_t)len + 1 > *room) {
    char *grown = realloc(*buf, len * 2ull + 64);
    if (!grown) return vs_nomem(err);
    *buf = grown, *room = len * 2ull + 64;
  }
  memcpy(*buf, text, len);
  (*buf)[len] = 0;
  v->type = SQLITE_TEXT, v->text = *buf, v->len = len;
  return VS_OK;
}

static vs_rc view_value(const ivfpq_column_view *c, uint32_t i, filter_value *v, char **buf, size_t *room, vs_err *err) {
  memset(v, 0, sizeof *v);
  v->type = SQLITE_NULL;
  if (c->nulls[i / 8] >> i % 8 & 1) return VS_OK;
  if (c->type == IVFPQ_INTEGER) v->type = SQLITE_INTEGER, memcpy(&v->i, c->values + 8 * (size_t)i, 8);
  else if (c->type == IVFPQ_REAL) v->type = SQLITE_FLOAT, memcpy(&v->r, c->values + 8 * (size_t)i, 8);
  else {
    uint32_t start = i ? u32_at(c->ends + 4 * (size_t)(i - 1)) : 0;
    return text_value(v, c->text + start, u32_at(c->ends + 4 * (size_t)i) - start, buf, room, err);
  }
  return VS_OK;
}

typedef struct evaluation {
  const filter *f;
  ivfpq_segment *s;
  const ivfpq_part *part;
  uint64_t *bitmap; /* starts as all rows; terms clear bits */
  char *buf;
  size_t room;
} evaluation;

static int alive(const evaluation *e, uint32_t i) { return e->bitmap[i / 64] >> i % 64 & 1; }
static void kill_row(evaluation *e, uint32_t i) { e->bitmap[i / 64] &= ~(1ull << i % 64); }

/* Which filterable column of the partition a metadata column is; -1: it is stored with the rows only. */
static int view_of(const ivfpq_segment *s, int column) {
  int at = 0;
  if (column < 0 || !(s->columns[column].flags & IVFPQ_FILTER)) return -1;
  for (int c = 0; c < column; c++) at += (s->columns[c].flags & IVFPQ_FILTER) != 0;
  return at;
}

static vs_rc apply_view(evaluation *e, const filter_term *t, const ivfpq_column_view *view, vs_err *err) {
  filter_value v;
  for (uint32_t i = 0; i < e->part->entry.n_rows; i++) {
    if (!alive(e, i)) continue;
    vs_rc rc = view_value(view, i, &v, &e->buf, &e->room, err);
    if (rc) return rc;
    if (!matches(t, &v)) kill_row(e, i);
  }
  return VS_OK;
}

/* The value that a term looks at, from the row itself. */
static vs_rc row_value(ivfpq_segment *s, const uint8_t *record, int column, ivfpq_value *values, filter_value *v, char **buf,
                       size_t *room, vs_err *err) {
  vs_rc rc;
  memset(v, 0, sizeof *v);
  v->type = SQLITE_NULL;
  if (column == FILTER_ID) {
    ivfpq_id id = {0};
    rc = ivfpq_row_id(s, record, &id, err);
    if (!rc && id.is_text) rc = text_value(v, id.text, id.len, buf, room, err);
    else if (!rc) v->type = SQLITE_INTEGER, v->i = id.i;
    ivfpq_id_free(&id);
    return rc;
  }
  uint8_t *columns;
  rc = ivfpq_row_columns(s, record, values, &columns, err);
  const ivfpq_value *x = &values[column];
  if (!rc && x->tag == IVFPQ_TEXT) rc = text_value(v, x->text, x->len, buf, room, err);
  else if (!rc && x->tag == IVFPQ_INTEGER) v->type = SQLITE_INTEGER, v->i = x->i;
  else if (!rc && x->tag == IVFPQ_REAL) v->type = SQLITE_FLOAT, v->r = x->r;
  free(columns);
  return rc;
}

/* A term on the id or on a stored-only column: the row itself has to be read. */
static vs_rc apply_row(evaluation *e, const filter_term *t, uint32_t i, ivfpq_value *values, vs_err *err) {
  uint32_t row = (uint32_t)e->part->entry.row0 + i;
  ivfpq_row r;
  filter_value v;
  vs_rc rc = ivfpq_rows_fetch(e->s, &row, 1, &r, err);
  if (rc) return rc;
  rc = row_value(e->s, r.record, t->column, values, &v, &e->buf, &e->room, err);
  if (!rc && !matches(t, &v)) kill_row(e, i);
  ivfpq_rows_release(e->s, &r, 1);
  return rc;
}

static vs_rc apply_rows(evaluation *e, const filter_term *t, vs_err *err) {
  ivfpq_value *values = malloc((e->s->params.n_columns + 1) * sizeof *values);
  vs_rc rc = values ? VS_OK : vs_nomem(err);
  for (uint32_t i = 0; i < e->part->entry.n_rows && !rc; i++)
    if (alive(e, i)) rc = apply_row(e, t, i, values, err);
  free(values);
  return rc;
}

static vs_rc eval(void *ctx, ivfpq_segment *s, const ivfpq_part *part, uint64_t *bitmap, vs_err *err) {
  evaluation e = {.f = ctx, .s = s, .part = part, .bitmap = bitmap};
  uint32_t n = part->entry.n_rows;
  size_t n_views = 0;
  for (uint32_t c = 0; c < s->params.n_columns; c++) n_views += (s->columns[c].flags & IVFPQ_FILTER) != 0;
  ivfpq_column_view *views = malloc((n_views + 1) * sizeof *views);
  vs_rc rc = views ? VS_OK : vs_nomem(err);
  if (!rc && n_views) rc = ivfpq_part_columns(s, part, views, n_views, err);
  for (uint32_t i = 0; i < n; i++) bitmap[i / 64] |= 1ull << i % 64;
  /* the cheap terms first, so that fewer rows have to be read */
  for (int by_row = 0; by_row < 2; by_row++)
    for (size_t t = 0; t < e.f->n && !rc; t++) {
      int view = view_of(s, e.f->terms[t].column);
      if ((view < 0) != by_row) continue;
      rc = by_row ? apply_rows(&e, &e.f->terms[t], err) : apply_view(&e, &e.f->terms[t], &views[view], err);
    }
  free(views), free(e.buf);
  return rc;
}

/* ---- few rows by id ---- */

const filter_term *filter_by_id(const filter *f) {
  for (size_t i = 0; i < f->n; i++)
    if (f->terms[i].column == FILTER_ID && (f->terms[i].op == FILTER_EQ || f->terms[i].op == FILTER_IN)) return &f->terms[i];
  return NULL;
}

vs_rc filter_row(const filter *f, ivfpq_segment *s, uint32_t row, int *pass, vs_err *err) {
  ivfpq_value *values = malloc((s->params.n_columns + 1) * sizeof *values);
  ivfpq_row r;
  char *buf = NULL;
  size_t room = 0;
  *pass = 1;
  vs_rc rc = values ? ivfpq_rows_fetch(s, &row, 1, &r, err) : vs_nomem(err);
  if (!rc) {
    for (size_t t = 0; t < f->n && *pass && !rc; t++) {
      filter_value v;
      rc = row_value(s, r.record, f->terms[t].column, values, &v, &buf, &room, err);
      *pass = !rc && matches(&f->terms[t], &v);
    }
    ivfpq_rows_release(s, &r, 1);
  }
  free(values), free(buf);
  return rc;
}

/* ---- building ---- */

vs_rc filter_add(filter *f, int column, filter_op op, shard_type type, sqlite3_value *value, vs_err *err) {
  filter_term *grown = realloc(f->terms, (f->n + 1) * sizeof *grown);
  size_t room = 0;
  if (!grown) return vs_nomem(err);
  f->terms = grown;
  f->base = (ivfpq_filter){.ctx = f, .eval = eval};
  filter_term *t = &f->terms[f->n++];
  *t = (filter_term){.column = column, .op = op};
  if (op == FILTER_ISNULL || op == FILTER_NOTNULL) return VS_OK;
  int is_range = op == FILTER_LT || op == FILTER_LE || op == FILTER_GT || op == FILTER_GE;
  if (is_range && sqlite3_value_type(value) == SQLITE_TEXT && sqlite3_value_encoding(value) != SQLITE_UTF8) {
    t->op = FILTER_NOTNULL; /* UTF-16 databases order texts by other bytes than ours: SQLite decides */
    return VS_OK;
  }
  if (op == FILTER_LIKE || op == FILTER_GLOB) type = SHARD_TEXT; /* patterns stay texts */
  if (op != FILTER_IN) return add_value(t, &room, type, value, err);
  sqlite3_value *v = NULL;
  vs_rc rc = VS_OK;
  for (int at = sqlite3_vtab_in_first(value, &v); at == SQLITE_OK && v && !rc; at = sqlite3_vtab_in_next(value, &v))
    rc = add_value(t, &room, type, v, err);
  if (!rc) qsort(t->values, t->n, sizeof *t->values, value_order);
  return rc;
}

void filter_reset(filter *f) {
  for (size_t i = 0; i < f->n; i++) {
    for (size_t v = 0; v < f->terms[i].n; v++) free(f->terms[i].values[v].text);
    free(f->terms[i].values);
  }
  free(f->terms);
  memset(f, 0, sizeof *f);
}
