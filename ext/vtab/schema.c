/* schema.c - see schema.h. Column syntax follows sqlite-vec's vec0:
 *
 *   id TEXT PRIMARY KEY | id INTEGER PRIMARY KEY
 *   embedding FLOAT[960] distance_metric=cosine
 *   organism TEXT INDEXED | length INTEGER | score REAL
 *   +description TEXT                                  (stored only)
 *   path='db/proteins' | version=12
 */
#include "schema.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "sqlite3ext.h"
SQLITE_EXTENSION_INIT3

static const char *const hidden_names[] = {"k", "nprobe", "refine", "recall", "exact", "distance"};

/* ---- tokens ---- */

typedef struct tokens { const char *at; char word[512]; } tokens;

static void skip_space(tokens *t) {
  while (isspace((unsigned char)*t->at)) t->at++;
}

/* The next word: quoted by ", `, ', [], a run of letters, digits, _ and non-ASCII, or one other character. 0 at the end. */
static int next_word(tokens *t) {
  size_t n = 0;
  skip_space(t);
  char open = *t->at, close = open == '[' ? ']' : open;
  if (!open) return 0;
  if (strchr("\"`'[", open)) {
    for (t->at++; *t->at && n + 1 < sizeof t->word; t->at++) {
      if (*t->at == close && (open == '[' || t->at[1] != close)) break;
      if (*t->at == close) t->at++;
      t->word[n++] = *t->at;
    }
    if (*t->at) t->at++;
  } else if (isalnum((unsigned char)open) || open == '_' || (open & 0x80)) {
    while (*t->at && (isalnum((unsigned char)*t->at) || *t->at == '_' || (*t->at & 0x80)) && n + 1 < sizeof t->word) t->word[n++] = *t->at++;
  } else t->word[n++] = *t->at++;
  t->word[n] = 0;
  return 1;
}

static int accept(tokens *t, const char *word) {
  const char *before = t->at;
  if (next_word(t) && !sqlite3_stricmp(t->word, word)) return 1;
  t->at = before;
  return 0;
}

static int at_end(tokens *t) {
  skip_space(t);
  return *t->at == 0;
}

/* ---- options ---- */

/* 1 when arg is `key = value`; value unquoted into t->word. */
static int option(const char *arg, const char *key, tokens *t) {
  t->at = arg;
  return accept(t, key) && accept(t, "=") && next_word(t);
}

/* A path may be longer than a token: unquote it from the argument itself. */
static vs_rc long_value(const char *arg, char **out, vs_err *err) {
  const char *p = strchr(arg, '=') + 1;
  while (isspace((unsigned char)*p)) p++;
  size_t n = strlen(p), used = 0;
  while (n && isspace((unsigned char)p[n - 1])) n--;
  char quote = n >= 2 && strchr("'\"`", p[0]) && p[n - 1] == p[0] ? p[0] : 0;
  char *value = malloc(n + 1);
  if (!value) return vs_nomem(err);
  for (size_t i = quote ? 1 : 0; i < n - (quote ? 1 : 0); i++) {
    value[used++] = p[i];
    if (quote && p[i] == quote && p[i + 1] == quote) i++;
  }
  value[used] = 0;
  *out = value;
  return VS_OK;
}

static vs_rc parse_option(const char *arg, schema_def *d, int *taken, vs_err *err) {
  tokens t;
  *taken = 1;
  if (option(arg, "path", &t)) {
    if (d->path) return vs_fail(err, VS_INVALID, "path is given twice");
    return long_value(arg, &d->path, err);
  }
  if (option(arg, "version", &t)) {
    char *end;
    d->version = strtoull(t.word, &end, 10);
    if (*end || !d->version || !at_end(&t)) return vs_fail(err, VS_INVALID, "version must be a whole number from 1, not %.100s", arg);
    return VS_OK;
  }
  *taken = 0;
  return VS_OK;
}

/* ---- columns ---- */

static vs_rc wrong(const char *arg, const char *why, vs_err *err) { return vs_fail(err, VS_INVALID, "\"%.200s\": %s", arg, why); }

static vs_rc parse_vector(const char *arg, const char *name, tokens *t, schema_def *d, vs_err *err) {
  static const char *const metrics[] = {[SHARD_L2] = "l2", [SHARD_COSINE] = "cosine", [SHARD_DOT] = "dot"};
  char *end;
  if (d->want.vector_name) return wrong(arg, "one vector column is possible", err);
  if (!next_word(t)) return wrong(arg, "the dimension is missing: FLOAT[960]", err);
  unsigned long dim = strtoul(t->word, &end, 10);
  while (isspace((unsigned char)*end)) end++;
  if (*end || dim < 1 || dim > 16384) return wrong(arg, "the dimension must be from 1 to 16384", err);
  d->want.dim = (uint32_t)dim, d->want.metric = SHARD_COSINE;
  if (accept(t, "distance_metric")) {
    int found = 0;
    if (!accept(t, "=") || !next_word(t)) return wrong(arg, "write distance_metric=cosine", err);
    for (int m = 0; m < 3; m++)
      if (!sqlite3_stricmp(t->word, metrics[m])) d->want.metric = (shard_metric)m, found = 1;
    if (!found) return wrong(arg, "distance_metric must be l2, cosine or dot", err);
  }
  if (!(d->want.vector_name = strdup(name))) return vs_nomem(err);
  return at_end(t) ? VS_OK : wrong(arg, "unknown words behind the vector column", err);
}

static vs_rc add_column(schema_def *d, const char *name, shard_type type, int stored, int index, vs_err *err) {
  shard_column *grown = realloc(d->want.columns, (d->want.n_columns + 1) * sizeof *grown);
  if (!grown) return vs_nomem(err);
  d->want.columns = grown;
  grown += d->want.n_columns;
  *grown = (shard_column){.name = strdup(name), .type = type, .filter = !stored, .index = index};
  if (!grown->name) return vs_nomem(err);
  d->want.n_columns++;
  return VS_OK;
}

static vs_rc parse_column(const char *arg, schema_def *d, vs_err *err) {
  static const struct { const char *word; shard_type type; } types[] = {
      {"TEXT", SHARD_TEXT}, {"INTEGER", SHARD_INTEGER}, {"INT", SHARD_INTEGER}, {"REAL", SHARD_REAL}, {"DOUBLE", SHARD_REAL}};
  tokens t = {.at = arg};
  char name[512];
  shard_type type = 0;
  int stored = accept(&t, "+");
  if (!next_word(&t)) return wrong(arg, "an empty column definition", err);
  memcpy(name, t.word, sizeof name);
  d->n_defined++;
  if (accept(&t, "FLOAT") || accept(&t, "FLOAT32")) {
    skip_space(&t);
    return *t.at == '[' ? parse_vector(arg, name, &t, d, err) : wrong(arg, "a vector column is FLOAT[dimension]; a number is REAL", err);
  }
  for (size_t i = 0; i < sizeof types / sizeof *types && !type; i++)
    if (accept(&t, types[i].word)) type = types[i].type;
  if (!type) return wrong(arg, "the type must be FLOAT[n], TEXT, INTEGER or REAL", err);
  if (accept(&t, "PRIMARY")) {
    if (!accept(&t, "KEY") || !at_end(&t)) return wrong(arg, "write PRIMARY KEY, and nothing behind it", err);
    if (d->has_id || stored || type == SHARD_REAL) return wrong(arg, "one primary key is possible, TEXT or INTEGER", err);
    d->has_id = 1, d->want.id_text = type == SHARD_TEXT;
    return (d->want.id_name = strdup(name)) ? VS_OK : vs_nomem(err);
  }
  int index = !stored && accept(&t, "INDEXED");
  if (!at_end(&t)) return wrong(arg, "no column constraint but PRIMARY KEY is possible", err);
  return add_column(d, name, type, stored, index, err);
}

vs_rc schema_parse(int argc, const char *const *argv, schema_def *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  vs_rc rc = VS_OK;
  for (int i = 0; i < argc && !rc; i++) {
    int taken;
    const char *p = argv[i];
    while (isspace((unsigned char)*p)) p++;
    if (!*p && argc == 1) break; /* USING vecshard() */
    rc = parse_option(p, out, &taken, err);
    if (!rc && !taken) rc = parse_column(p, out, err);
  }
  if (!rc && out->n_defined && !out->want.vector_name)
    rc = vs_fail(err, VS_INVALID, "a vector column is missing, such as: embedding FLOAT[960] distance_metric=cosine");
  if (rc) schema_reset(out);
  return rc;
}

void schema_reset(schema_def *d) {
  free(d->path);
  shard_manifest_reset(&d->want);
  memset(d, 0, sizeof *d);
}

/* ---- against a shard ---- */

vs_rc schema_compare(const schema_def *d, const shard_manifest *have, vs_err *err) {
  static const char *const types[] = {"", "INTEGER", "REAL", "TEXT"}, *const metrics[] = {"l2", "cosine", "dot"};
  const shard_manifest *w = &d->want;
  if (!d->n_defined) return VS_OK;
  if (w->dim != have->dim)
    return vs_fail(err, VS_INVALID, "the shard has %u dimensions, not %u", have->dim, w->dim);
  if (w->metric != have->metric) return vs_fail(err, VS_INVALID, "the shard's distance_metric is %s", metrics[have->metric]);
  if (sqlite3_stricmp(w->vector_name, have->vector_name))
    return vs_fail(err, VS_INVALID, "the shard's vector column is called %s", have->vector_name);
  if (d->has_id && (w->id_text != have->id_text || sqlite3_stricmp(w->id_name, have->id_name)))
    return vs_fail(err, VS_INVALID, "the shard's primary key is %s %s", have->id_name, have->id_text ? "TEXT" : "INTEGER");
  if (w->n_columns != have->n_columns)
    return vs_fail(err, VS_INVALID, "the shard has %zu metadata columns, not %zu; leave the definitions out to take them all",
                   have->n_columns, w->n_columns);
  for (size_t i = 0; i < have->n_columns; i++)
    if (sqlite3_stricmp(w->columns[i].name, have->columns[i].name) || w->columns[i].type != have->columns[i].type)
      return vs_fail(err, VS_INVALID, "metadata column %zu of the shard is %s %s", i + 1, have->columns[i].name,
                     types[have->columns[i].type]);
  return VS_OK;
}

int schema_same_columns(const shard_manifest *a, const shard_manifest *b) {
  int same = a->n_columns == b->n_columns;
  for (size_t i = 0; same && i < a->n_columns; i++)
    same = !strcmp(a->columns[i].name, b->columns[i].name) && a->columns[i].type == b->columns[i].type;
  return same;
}

int schema_same(const shard_manifest *a, const shard_manifest *b) {
  return a->dim == b->dim && a->metric == b->metric && a->id_text == b->id_text && schema_same_columns(a, b);
}

static vs_rc check_name(const char *name, const char *table, const char *what, vs_err *err) {
  for (size_t i = 0; i < sizeof hidden_names / sizeof *hidden_names; i++)
    if (!sqlite3_stricmp(name, hidden_names[i]))
      return vs_fail(err, VS_INVALID, "%s may not be called %s: searches use that name", what, name);
  if (table && !sqlite3_stricmp(name, table))
    return vs_fail(err, VS_INVALID, "%s %s has the name of the table, which searches use", what, name);
  return VS_OK;
}

vs_rc schema_declare(const shard_manifest *m, const char *table, char **sql, vs_err *err) {
  static const char *const types[] = {"", "INTEGER", "REAL", "TEXT"};
  *sql = NULL;
  vs_rc rc = check_name(table, NULL, "the table", err);
  if (!rc) rc = check_name(m->id_name, table, "column", err);
  if (!rc) rc = check_name(m->vector_name, table, "column", err);
  for (size_t i = 0; i < m->n_columns && !rc; i++) rc = check_name(m->columns[i].name, table, "column", err);
  if (rc) return rc;
  sqlite3_str *s = sqlite3_str_new(NULL);
  sqlite3_str_appendf(s, "CREATE TABLE x(\"%w\" %s, \"%w\" BLOB", m->id_name, m->id_text ? "TEXT" : "INTEGER", m->vector_name);
  for (size_t i = 0; i < m->n_columns; i++) sqlite3_str_appendf(s, ", \"%w\" %s", m->columns[i].name, types[m->columns[i].type]);
  sqlite3_str_appendf(s, ", \"%w\" HIDDEN", table);
  for (size_t i = 0; i < sizeof hidden_names / sizeof *hidden_names; i++) sqlite3_str_appendf(s, ", %s HIDDEN", hidden_names[i]);
  sqlite3_str_appendall(s, ")");
  *sql = sqlite3_str_finish(s);
  return *sql ? VS_OK : vs_nomem(err);
}
