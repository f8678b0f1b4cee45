/* union_table.c - `shard_union`: the nearest rows over many shards, as a function and as a table.
 *
 *   SELECT shard, id, distance FROM shard_union('./db', :q, 10);                  -- every shard in the folder
 *   SELECT shard, id, distance FROM shard_union('["db/a","other/b"]', :q, 10);    -- named paths
 *   SELECT shard, id, distance FROM shard_union('proteins,b7', :q, 10);           -- tables of this connection
 *   SELECT query_no, query_key, id FROM shard_union('./db', (SELECT vec_pack(e, name) FROM queries), 5);
 *   CREATE VIRTUAL TABLE everything USING shard_union(source='./db');             -- with the metadata columns and filters
 *   SELECT id, organism FROM everything WHERE embedding MATCH :q AND length > 300 AND k = 10;
 *
 * Columns: shard, id, distance, query_no, query_key, embedding, row (JSON of the metadata), then, in the table form, the
 * metadata columns; hidden: source, query, k, nprobe, refine, recall, exact. idxNum and idxStr: plan.h.
 * xCreate is xConnect (SQLite wants that of a module that is a function too); a call as a function has no arguments of its own.
 * The table form keeps its source and columns in <table>_config, so that connecting touches no shard.
 * Limitations: read-only; a query is needed; several queries at once need k.
 */
#include <stdlib.h>
#include <string.h>

#include "many.h"
#include "modules.h"
#include "plan.h"
#include "schema.h"
#include "vec_value.h"
SQLITE_EXTENSION_INIT3

enum { COL_SHARD, COL_ID, COL_DISTANCE, COL_QUERY_NO, COL_QUERY_KEY, COL_EMBEDDING, COL_ROW, N_FIXED };
enum { HID_SOURCE, HID_QUERY, HID_K, HID_NPROBE, HID_REFINE, HID_RECALL, HID_EXACT };

typedef struct union_table {
  sqlite3_vtab base;
  conn *c;
  char *schema, *name;
  char *source;      /* table form; NULL: the function form */
  char *full_source; /* its paths resolved against the database file; NULL until first needed */
  char **paths;      /* as stored, n_paths */
  size_t n_paths;
  int from_schema;   /* somebody else's file may have named the source */
  shard_manifest m;  /* table form: id type and metadata columns */
} union_table;

typedef struct union_cursor {
  sqlite3_vtab_cursor base;
  statement statement;
  shard_set set;
  plan_search plan;
  vec_batch batch;
  stream hits;        /* of one query */
  many answers;       /* of several */
  int many, eof;
  row_values values;  /* of the current row */
} union_cursor;

/* ---- connecting ---- */

static vs_rc sql_failed(sqlite3 *db, vs_err *err) { return vs_fail(err, VS_IO, "%s", sqlite3_errmsg(db)); }

static int config_exists(sqlite3 *db, const char *schema, const char *name) {
  char *table = sqlite3_mprintf("%s_config", name);
  int found = table && sqlite3_table_column_metadata(db, schema, table, NULL, NULL, NULL, NULL, NULL, NULL) == SQLITE_OK;
  sqlite3_free(table);
  return found;
}

static vs_rc parse_source(int argc, const char *const *argv, char **out, vs_err *err) {
  *out = NULL;
  if (argc != 1 || sqlite3_strnicmp(argv[0], "source", 6))
    return vs_fail(err, VS_INVALID, "write USING shard_union(source='db'): one source is needed");
  const char *p = argv[0] + 6;
  while (*p == ' ') p++;
  if (*p != '=') return vs_fail(err, VS_INVALID, "write USING shard_union(source='db')");
  do p++; while (*p == ' ');
  size_t n = strlen(p), used = 0;
  int quoted = n >= 2 && (*p == '\'' || *p == '"') && p[n - 1] == *p;
  if (!(*out = malloc(n + 1))) return vs_nomem(err);
  for (size_t i = quoted ? 1 : 0; i < n - (quoted ? 1 : 0); i++) {
    (*out)[used++] = p[i];
    if (quoted && p[i] == *p && p[i + 1] == *p) i++;
  }
  (*out)[used] = 0;
  return VS_OK;
}

void result_json_text(sqlite3_str *s, const char *text, uint32_t n) {
  sqlite3_str_appendchar(s, 1, '"');
  for (uint32_t i = 0; i < n; i++) {
    unsigned char ch = (unsigned char)text[i];
    if (ch == '"' || ch == '\\') sqlite3_str_appendf(s, "\\%c", ch);
    else if (ch < 0x20) sqlite3_str_appendf(s, "\\u%04x", ch);
    else sqlite3_str_appendchar(s, 1, (char)ch);
  }
  sqlite3_str_appendchar(s, 1, '"');
}

/* ---- the source of the table form ---- */

static vs_rc resolve_source(union_table *t, vs_err *err) {
  sqlite3_str *s = sqlite3_str_new(NULL);
  vs_rc rc = t->paths ? VS_OK : shard_source_split(t->source, &t->paths, &t->n_paths, err);
  int is_list = t->source[0] == '[';
  for (size_t i = 0; i < t->n_paths && !rc; i++) {
    char *full;
    rc = conn_path_resolve(t->c, t->schema, t->paths[i], &full, err);
    if (!rc && is_list) sqlite3_str_appendchar(s, 1, i ? ',' : '['), result_json_text(s, full, (uint32_t)strlen(full));
    else if (!rc) sqlite3_str_appendall(s, full);
    free(full);
  }
  if (is_list) sqlite3_str_appendchar(s, 1, ']');
  char *text = sqlite3_str_finish(s);
  if (!rc && (!text || !(t->full_source = strdup(text)))) rc = vs_nomem(err);
  sqlite3_free(text);
  return rc;
}

static vs_rc check_trust(const union_table *t, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < t->n_paths && !rc && t->from_schema; i++) {
    char *full;
    rc = conn_path_resolve(t->c, t->schema, t->paths[i], &full, err);
    if (!rc) rc = conn_path_check_trust(t->c, t->name, t->paths[i], full, err);
    free(full);
  }
  return rc;
}

static vs_rc open_stored(union_table *t, shard_set *out, vs_err *err) {
  vs_rc rc = VS_OK;
  memset(out, 0, sizeof *out);
  if (!shard_source_is_path(t->source)) return conn_any_open(t->c, t->source, out, err);
  if (!t->full_source) rc = resolve_source(t, err);
  if (!rc) rc = check_trust(t, err);
  return rc ? rc : conn_any_open(t->c, t->full_source, out, err);
}

/* The table form shows the first shard's columns; every shard must have the same. */
static vs_rc same_columns(const shard_set *set, vs_err *err) {
  for (size_t i = 1; i < set->n; i++)
    if (!schema_same_columns(&set->shards[0]->manifest, &set->shards[i]->manifest))
      return vs_fail(err, VS_INVALID, "%s and %s have different metadata columns: use the function form", set->shards[0]->path,
                     set->shards[i]->path);
  return VS_OK;
}

static vs_rc create_config(union_table *t, vs_err *err) {
  shard_set set;
  char *json = NULL;
  vs_rc rc = open_stored(t, &set, err);
  if (rc) return rc;
  rc = same_columns(&set, err);
  if (!rc) {
    shard_manifest copy = set.shards[0]->manifest;
    copy.n_segments = 0, copy.segments = NULL;
    rc = shard_manifest_print(&copy, &json, err);
  }
  shard_set_reset(&set);
  if (!rc) {
    char *sql = sqlite3_mprintf("CREATE TABLE \"%w\".\"%w_config\"(k TEXT PRIMARY KEY, v) WITHOUT ROWID;"
                                "INSERT INTO \"%w\".\"%w_config\" VALUES('columns', %Q)",
                                t->schema, t->name, t->schema, t->name, json);
    if (!sql || sqlite3_exec(t->c->db, sql, NULL, NULL, NULL)) rc = sql_failed(t->c->db, err);
    sqlite3_free(sql);
  }
  free(json);
  return rc;
}

static vs_rc read_config(union_table *t, vs_err *err) {
  sqlite3_stmt *stmt = NULL;
  char *sql = sqlite3_mprintf("SELECT v FROM \"%w\".\"%w_config\" WHERE k = 'columns'", t->schema, t->name);
  vs_rc rc = sql && !sqlite3_prepare_v2(t->c->db, sql, -1, &stmt, NULL) ? VS_OK : sql_failed(t->c->db, err);
  sqlite3_free(sql);
  if (!rc && sqlite3_step(stmt) != SQLITE_ROW) rc = vs_fail(err, VS_CORRUPT, "%s_config does not describe a shard_union table: if it is your own, choose another name; else DROP and create it again", t->name);
  if (!rc) {
    const char *json = (const char *)sqlite3_column_text(stmt, 0);
    rc = json ? shard_manifest_parse(json, (size_t)sqlite3_column_bytes(stmt, 0), "the _config table", &t->m, err) : vs_nomem(err);
  }
  sqlite3_finalize(stmt);
  return rc;
}

static void union_free(union_table *t) {
  shard_manifest_reset(&t->m);
  shard_names_free(t->paths, t->n_paths);
  free(t->schema), free(t->name), free(t->source), free(t->full_source);
  conn_release(t->c);
  sqlite3_free(t);
}

static vs_rc declare(union_table *t, vs_err *err) {
  static const char *const types[] = {"", "INTEGER", "REAL", "TEXT"};
  static const char *const taken[] = {"shard", "id",     "distance", "query_no", "query_key", "embedding", "row",
                                      "source", "query", "k",        "nprobe",   "refine",    "recall",    "exact"};
  sqlite3_str *s = sqlite3_str_new(t->c->db);
  vs_rc rc = VS_OK;
  sqlite3_str_appendf(s, "CREATE TABLE x(shard TEXT, id %s, distance REAL, query_no INTEGER, query_key, embedding BLOB, row TEXT",
                      !t->source ? "" : t->m.id_text ? "TEXT" : "INTEGER");
  for (size_t i = 0; i < t->m.n_columns && !rc; i++) {
    for (size_t j = 0; j < sizeof taken / sizeof *taken; j++)
      if (!sqlite3_stricmp(taken[j], t->m.columns[i].name))
        rc = vs_fail(err, VS_INVALID, "the shards' column %s has the name of a column of shard_union: use the function form", taken[j]);
    sqlite3_str_appendf(s, ", \"%w\" %s", t->m.columns[i].name, types[t->m.columns[i].type]);
  }
  sqlite3_str_appendall(s, ", source HIDDEN, query HIDDEN, k HIDDEN, nprobe HIDDEN, refine HIDDEN, recall HIDDEN, exact HIDDEN)");
  char *sql = sqlite3_str_finish(s);
  if (!rc && (!sql || sqlite3_declare_vtab(t->c->db, sql))) rc = sql_failed(t->c->db, err);
  sqlite3_free(sql);
  return rc;
}

static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  vs_err err = {0};
  union_table *t = sqlite3_malloc64(sizeof *t);
  if (!t) return SQLITE_NOMEM;
  memset(t, 0, sizeof *t);
  t->c = aux, t->c->refs++;
  t->schema = strdup(argv[1]), t->name = strdup(argv[2]);
  vs_rc rc = t->schema && t->name ? VS_OK : vs_nomem(&err);
  if (!rc && argc > 3) {
    rc = parse_source(argc - 3, argv + 3, &t->source, &err);
    t->from_schema = config_exists(db, t->schema, t->name);
    if (!rc && !t->from_schema) rc = create_config(t, &err);
    if (!rc) rc = read_config(t, &err);
  } else if (!rc) sqlite3_vtab_config(db, SQLITE_VTAB_DIRECTONLY); /* it reads any path that SQL names */
  if (!rc) rc = declare(t, &err);
  if (rc) {
    union_free(t);
    int changed = err.rc == VS_IO && sqlite3_errcode(db) == SQLITE_SCHEMA; /* by another connection: SQLite reads it and tries again */
    return changed ? SQLITE_SCHEMA : conn_error(&err, message);
  }
  *out = &t->base;
  return SQLITE_OK;
}

static int x_disconnect(sqlite3_vtab *v) {
  union_free((union_table *)v);
  return SQLITE_OK;
}

static int x_destroy(sqlite3_vtab *v) {
  union_table *t = (union_table *)v;
  char *sql = sqlite3_mprintf("DROP TABLE IF EXISTS \"%w\".\"%w_config\"", t->schema, t->name);
  int rc = sql ? sqlite3_exec(t->c->db, sql, NULL, NULL, NULL) : SQLITE_NOMEM;
  sqlite3_free(sql);
  if (rc == SQLITE_OK) union_free(t);
  return rc;
}

static int x_rename(sqlite3_vtab *v, const char *name) {
  union_table *t = (union_table *)v;
  char *sql = sqlite3_mprintf("ALTER TABLE \"%w\".\"%w_config\" RENAME TO \"%w_config\"", t->schema, t->name, name);
  int rc = sql ? sqlite3_exec(t->c->db, sql, NULL, NULL, NULL) : SQLITE_NOMEM;
  sqlite3_free(sql);
  return rc;
}

static int x_shadow_name(const char *suffix) { return !sqlite3_stricmp(suffix, "config"); }

/* ---- planning ---- */

static int hidden_of(const union_table *t, int column) { return column - N_FIXED - (int)t->m.n_columns; }

static int is_query(const union_table *t, const struct sqlite3_index_constraint *c) {
  return (c->iColumn == COL_EMBEDDING && c->op == SQLITE_INDEX_CONSTRAINT_MATCH) ||
         (hidden_of(t, c->iColumn) == HID_QUERY && plan_gives(c));
}

static shard_type column_type(void *ctx, int column) {
  const union_table *t = ctx;
  return column == FILTER_ID ? (t->m.id_text ? SHARD_TEXT : SHARD_INTEGER) : t->m.columns[column].type;
}

static void use_constraint(plan *p, union_table *t, int i) {
  static const char *const entries[] = {"s", "q", "k", "n", "r", "R", "x"};
  const struct sqlite3_index_constraint *c = &p->info->aConstraint[i];
  int h = hidden_of(t, c->iColumn), eq = c->op == SQLITE_INDEX_CONSTRAINT_EQ;
  if (is_query(t, c)) plan_use(p, i, 1, "q");
  else if (h >= 0 && plan_gives(c) && !(h == HID_SOURCE && t->source)) plan_use(p, i, 1, entries[h]); /* a table has one source */
  else if (c->iColumn == COL_SHARD && eq && !sqlite3_vtab_in(p->info, i, -1) && !sqlite3_stricmp(sqlite3_vtab_collation(p->info, i), "BINARY"))
    plan_use(p, i, 0, "S");
  else if (c->iColumn == COL_DISTANCE) plan_bound(p, i);
  else if (t->source && c->iColumn == COL_ID) plan_filter(p, i, FILTER_ID, column_type(t, FILTER_ID));
  else if (c->iColumn >= N_FIXED && h < 0) plan_filter(p, i, c->iColumn - N_FIXED, column_type(t, c->iColumn - N_FIXED));
}

/* Rows come by query, then distance; *sorted: by distance alone. */
static int consumes_order(sqlite3_index_info *info, int *sorted) {
  const struct sqlite3_index_orderby *o = info->aOrderBy;
  *sorted = plan_by_distance(info, 0, COL_DISTANCE);
  int by_query = info->nOrderBy >= 1 && o[0].iColumn == COL_QUERY_NO && !o[0].desc;
  return *sorted || (by_query && (info->nOrderBy == 1 || plan_by_distance(info, 1, COL_DISTANCE)));
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info) {
  union_table *t = (union_table *)v;
  int queries = 0, sources = t->source != NULL, sorted;
  plan p;
  for (int i = 0; i < info->nConstraint; i++) {
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    int h = hidden_of(t, c->iColumn);
    if ((is_query(t, c) || (h >= 0 && plan_gives(c))) && !c->usable) return SQLITE_CONSTRAINT;
    queries += is_query(t, c);
    sources += h == HID_SOURCE && plan_gives(c);
  }
  if (queries > 1) {
    sqlite3_free(v->zErrMsg);
    v->zErrMsg = sqlite3_mprintf("two queries in one search; several at once go through vec_pack()");
    return SQLITE_ERROR;
  }
  if (!queries || !sources) return plan_without(info, queries ? "source" : "query");
  if (plan_misused(info, N_FIXED + (int)t->m.n_columns + HID_K, &v->zErrMsg)) return SQLITE_ERROR;
  plan_begin(&p, info);
  for (int i = 0; i < info->nConstraint; i++)
    if (info->aConstraint[i].usable) use_constraint(&p, t, i);
  info->orderByConsumed = consumes_order(info, &sorted);
  return plan_end(&p, PLAN_SEARCH | (sorted ? PLAN_SORTED : 0), PLAN_SEARCH_COST, 10);
}

/* ---- cursors ---- */

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out) {
  union_cursor *c = calloc(1, sizeof *c);
  if (!c) return SQLITE_NOMEM;
  statement_open(&c->statement, ((union_table *)v)->c);
  *out = &c->base;
  return SQLITE_OK;
}

static void cursor_reset(union_cursor *c) {
  row_values_reset(&c->values);
  stream_reset(&c->hits);
  many_reset(&c->answers);
  plan_search_reset(&c->plan);
  vec_batch_free(&c->batch);
  memset(&c->batch, 0, sizeof c->batch);
  shard_set_reset(&c->set);
  c->many = 0, c->eof = 1;
}

static int x_close(sqlite3_vtab_cursor *v) {
  cursor_reset((union_cursor *)v);
  statement_close(&((union_cursor *)v)->statement);
  free(v);
  return SQLITE_OK;
}

static stream_options options_of(const union_cursor *c, const union_table *t) {
  return (stream_options){.query = c->batch.vectors, .dim = c->batch.dim, .has_k = c->plan.has_k, .k = c->plan.k,
                          .nprobe = c->plan.nprobe, .refine = c->plan.refine, .recall = c->plan.recall, .exact = c->plan.exact,
                          .filter = &c->plan.filter, .floor = c->plan.floor, .limit = c->plan.limit, .threads = t->c->threads};
}

/* `shard = ...`: the others are not searched. */
static void keep_shard(shard_set *set, const char *name) {
  size_t n = 0;
  for (size_t i = 0; i < set->n; i++) {
    if (name && !strcmp(set->names[i], name)) set->shards[n] = set->shards[i], set->names[n++] = set->names[i];
    else shard_close(set->shards[i]), free(set->names[i]);
  }
  set->n = n;
}

static vs_rc search(union_cursor *c, union_table *t, int idx_num, vs_err *err) {
  uint32_t dim = c->set.shards[0]->manifest.dim;
  for (size_t i = 0; t->source && i < c->set.n; i++) {
    const shard_manifest *m = &c->set.shards[i]->manifest;
    if (m->id_text != t->m.id_text || !schema_same_columns(m, &t->m))
      return vs_fail(err, VS_INVALID, "%s has other columns than %s had when it was created: DROP the table and create it again",
                     c->set.shards[i]->path, t->name);
  }
  if (c->batch.dim != dim) return vs_fail(err, VS_INVALID, "the query has %u dimensions, %s has %u", c->batch.dim, c->set.shards[0]->path, dim);
  stream_options o = options_of(c, t);
  vs_rc rc;
  c->many = c->batch.n > 1;
  if (c->many) rc = many_open(&c->answers, &c->statement, c->set.shards, c->set.n, &o, c->batch.n, (idx_num & PLAN_SORTED) != 0, err);
  else rc = stream_open(&c->hits, &c->statement, c->set.shards, c->set.n, &o, err);
  c->eof = c->many ? many_eof(&c->answers) : stream_eof(&c->hits);
  return rc;
}

static vs_rc no_query(const union_table *t, const char *missing, vs_err *err) {
  if (t->source) return vs_fail(err, VS_INVALID, "%s needs a query: WHERE embedding MATCH :vector AND k = 10", t->name);
  return vs_fail(err, VS_INVALID, "%s needs a %s: write shard_union(source, query, k)", t->name, missing);
}

static int x_filter(sqlite3_vtab_cursor *v, int idx_num, const char *idx_str, int argc, sqlite3_value **argv) {
  union_cursor *c = (union_cursor *)v;
  union_table *t = (union_table *)v->pVtab;
  vs_err err;
  vs_err_reset(&err);
  cursor_reset(c);
  vs_rc rc = (idx_num & PLAN_KIND) == PLAN_NO_QUERY ? no_query(t, idx_str, &err)
                                                    : plan_decode(idx_str, argc, argv, column_type, t, &c->plan, &err);
  const char *source = t->source;
  statement_enter(&c->statement, PHASE_OPEN);
  statement_trace_begin(&c->statement);
  if (!rc && c->plan.source) source = (const char *)sqlite3_value_text(c->plan.source);
  if (!rc && source && sqlite3_value_type(c->plan.query) != SQLITE_NULL) {
    rc = vec_batch_from_value(c->plan.query, &c->batch, &err);
    if (!rc) rc = c->plan.source ? conn_any_open(t->c, source, &c->set, &err) : open_stored(t, &c->set, &err);
    if (!rc && c->plan.shard) keep_shard(&c->set, (const char *)sqlite3_value_text(c->plan.shard));
    statement_phase(&c->statement, PHASE_SCAN);
    if (!rc && c->batch.n && c->set.n) rc = search(c, t, idx_num, &err);
  }
  statement_leave(&c->statement);
  c->plan.query = c->plan.source = c->plan.shard = NULL;
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int next_batch(union_cursor *c) {
  vs_err err = {0};
  statement_enter(&c->statement, PHASE_SCAN);
  vs_rc rc = c->many ? many_next(&c->answers, &err) : stream_next(&c->hits, &err);
  statement_leave(&c->statement);
  return rc ? conn_error(&err, &c->base.pVtab->zErrMsg) : SQLITE_OK;
}

static int x_next(sqlite3_vtab_cursor *v) {
  union_cursor *c = (union_cursor *)v;
  c->values.valid = 0;
  int rc = (c->many ? many_step(&c->answers) : stream_step(&c->hits)) ? SQLITE_OK : next_batch(c);
  c->eof = c->many ? many_eof(&c->answers) : stream_eof(&c->hits);
  return rc;
}

static int x_eof(sqlite3_vtab_cursor *v) { return ((union_cursor *)v)->eof; }

static const shard_hit *current(const union_cursor *c) { return c->many ? many_hit(&c->answers) : stream_hit(&c->hits); }

/* {"organism":"E. coli","length":312} */
static vs_rc result_row(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, vs_err *err) {
  uint8_t *buf = NULL;
  ivfpq_value *values = malloc((s->params.n_columns + 1) * sizeof *values);
  vs_rc rc = values ? ivfpq_row_columns(s, record, values, &buf, err) : vs_nomem(err);
  if (!rc) {
    sqlite3_str *out = sqlite3_str_new(NULL);
    for (uint32_t c = 0; c < s->params.n_columns; c++) {
      sqlite3_str_appendchar(out, 1, c ? ',' : '{');
      result_json_text(out, s->columns[c].name, (uint32_t)strlen(s->columns[c].name));
      sqlite3_str_appendchar(out, 1, ':');
      if (values[c].tag == IVFPQ_INTEGER) sqlite3_str_appendf(out, "%lld", values[c].i);
      else if (values[c].tag == IVFPQ_REAL) sqlite3_str_appendf(out, "%!.17g", values[c].r);
      else if (values[c].tag == IVFPQ_TEXT) result_json_text(out, values[c].text, values[c].len);
      else sqlite3_str_appendall(out, "null");
    }
    sqlite3_str_appendall(out, s->params.n_columns ? "}" : "{}");
    char *text = sqlite3_str_finish(out);
    if (text) sqlite3_result_text(ctx, text, -1, sqlite3_free);
    else rc = vs_nomem(err);
  }
  free(values), free(buf);
  return rc;
}

static vs_rc stored_column(union_cursor *c, sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, int column, vs_err *err) {
  int ok = 1;
  if (column == COL_ID) ok = result_id(ctx, s, record, err);
  else if (column == COL_EMBEDDING) ok = result_vector(ctx, s, record);
  else if (column == COL_ROW) return result_row(ctx, s, record, err);
  else ok = result_column(ctx, s, record, (uint32_t)(column - N_FIXED), &c->values, err);
  return ok ? VS_OK : err->rc;
}

static vs_rc row_column(union_cursor *c, sqlite3_context *ctx, int column, vs_err *err) {
  ivfpq_segment *s;
  const uint8_t *record;
  vs_rc rc;
  sqlite3_int64 id;
  if (column == COL_ID && (c->many ? many_id_at_hand(&c->answers, &id) : stream_id_at_hand(&c->hits, &id))) {
    sqlite3_result_int64(ctx, id);
    return VS_OK;
  }
  stream_want want = column == COL_EMBEDDING ? STREAM_VECTOR : STREAM_ID;
  int with_columns = column == COL_ROW || column >= N_FIXED;
  if (c->many ? many_row_at_hand(&c->answers, &s, &record, &rc, err) : stream_row_at_hand(&c->hits, want, &s, &record, &rc, err))
    return rc ? rc : stored_column(c, ctx, s, record, column, err);
  statement_enter(&c->statement, PHASE_ROWS);
  rc = c->many ? many_row(&c->answers, with_columns, &s, &record, err) : stream_row(&c->hits, with_columns, &s, &record, err);
  if (!rc) rc = stored_column(c, ctx, s, record, column, err);
  statement_leave(&c->statement);
  return rc;
}

static void hidden_column(union_cursor *c, union_table *t, sqlite3_context *ctx, int hidden) {
  switch (hidden) {
    case HID_SOURCE:
      if (t->source) sqlite3_result_text(ctx, t->source, -1, SQLITE_TRANSIENT);
      break;
    case HID_K: plan_result_number(ctx, c->plan.has_k ? (int64_t)c->plan.k : -1); break;
    case HID_NPROBE: plan_result_number(ctx, c->plan.nprobe); break;
    case HID_REFINE: plan_result_number(ctx, c->plan.refine); break;
    case HID_RECALL: plan_result_recall(ctx, c->plan.recall); break;
    case HID_EXACT: sqlite3_result_int(ctx, c->plan.exact); break;
    default: break;
  }
}

static int x_column(sqlite3_vtab_cursor *v, sqlite3_context *ctx, int column) {
  union_cursor *c = (union_cursor *)v;
  union_table *t = (union_table *)v->pVtab;
  vs_err err;
  vs_rc rc = VS_OK;
  vs_err_reset(&err);
  uint32_t query_no = c->many ? many_query_no(&c->answers) : 0;
  if (hidden_of(t, column) >= 0) hidden_column(c, t, ctx, hidden_of(t, column));
  else if (column == COL_SHARD) sqlite3_result_text(ctx, c->set.names[current(c)->shard], -1, SQLITE_TRANSIENT);
  else if (column == COL_DISTANCE) sqlite3_result_double(ctx, current(c)->distance);
  else if (column == COL_QUERY_NO) sqlite3_result_int64(ctx, query_no);
  else if (column == COL_QUERY_KEY) vec_batch_key(&c->batch, query_no, ctx);
  else rc = row_column(c, ctx, column, &err);
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int x_rowid(sqlite3_vtab_cursor *v, sqlite3_int64 *rowid) {
  union_cursor *c = (union_cursor *)v;
  const shard_hit *h = current(c); /* of one query: the row's place, by which OR over two searches leaves out doubles */
  *rowid = (sqlite3_int64)(c->many ? c->answers.row_no : (uint64_t)h->shard << 48 | (uint64_t)h->segment << 32 | h->row);
  return SQLITE_OK;
}

static const sqlite3_module module = {
    .iVersion = 3, .xCreate = x_connect, .xConnect = x_connect, .xBestIndex = x_best_index, .xDisconnect = x_disconnect,
    .xDestroy = x_destroy, .xOpen = x_open, .xClose = x_close, .xFilter = x_filter, .xNext = x_next, .xEof = x_eof,
    .xColumn = x_column, .xRowid = x_rowid, .xRename = x_rename, .xShadowName = x_shadow_name};

int union_table_register(conn *c) {
  c->refs++;
  return sqlite3_create_module_v2(c->db, "shard_union", &module, c, conn_release);
}
