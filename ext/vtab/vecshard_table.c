/* vecshard_table.c - the virtual table `vecshard`: one local shard as a table.
 *
 *   CREATE VIRTUAL TABLE proteins USING vecshard(path='db/proteins');          -- columns come from the shard
 *   SELECT id, distance FROM proteins WHERE embedding MATCH :q AND k = 10;
 *   SELECT id, distance FROM proteins WHERE embedding MATCH :q ORDER BY distance LIMIT 10;
 *   SELECT id, distance FROM proteins(:q, 10);
 *   SELECT * FROM proteins WHERE id = 'P12345';
 *
 * Schema: the id, the vector, the shard's metadata columns, then hidden: <table>, k, nprobe, refine, recall, exact, distance.
 * idxNum and idxStr: plan.h. xCreate opens the shard once and keeps its columns in the shadow table <table>_config, so that
 * xConnect touches no file of the shard: DROP and table lists work when it is gone. Without a path the shard lies in the folder
 * <database file>.vecshard/<table>; RENAME leaves it there and notes the old name in <table>_config. A statement pins the
 * version that was the newest when its cursor was first filtered.
 *
 * rowid: the id itself for integer ids, else segment * 2^32 + row, stable within a version.
 * Limitations: read-only; id and metadata conditions without a query are checked by SQLite row by row, but id = and rowid =.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../s3vfs/s3_config.h"
#include "modules.h"
#include "plan.h"
#include "schema.h"
#include "vec_value.h"
SQLITE_EXTENSION_INIT3

enum { SCAN_BYTES = 1 << 20 }; /* of a scan in a store, read at once */

typedef struct table {
  sqlite3_vtab base; /* first: SQLite's view */
  conn_table entry;
  conn *c;
  shard_manifest m;  /* columns only: no segments */
  char *path;        /* as stored; NULL: the default one */
  char *folder;      /* the last part of the default path, since the table was renamed; NULL: the table's name */
  char *full_path;   /* resolved against the database file; NULL until first needed */
  uint64_t version;  /* 0: the newest */
  int from_schema;   /* xConnect: somebody else's file may have named the path */
  shard *open;       /* what the last statement used */
} table;

typedef struct cursor {
  sqlite3_vtab_cursor base;
  statement statement;
  shard *s;
  int kind;            /* PLAN_... */
  plan_search plan;
  stream hits;
  row_values values;     /* of the current row */
  uint32_t segment, row; /* scan and look-up */
  ivfpq_row stretch;     /* records read for them: stretch_rows from stretch_first on */
  uint32_t stretch_segment, stretch_first, stretch_rows;
  vs_range *stretch_extras;    /* two a row: what its record refers to, or NULL */
  int eof;
} cursor;

static table *table_of(sqlite3_vtab *v) { return (table *)v; }

/* ---- the shadow table ---- */

static vs_rc sql_failed(sqlite3 *db, vs_err *err) { return vs_fail(err, VS_IO, "%s", sqlite3_errmsg(db)); }

static vs_rc config_write(table *t, vs_err *err) {
  sqlite3 *db = t->c->db;
  char *json = NULL, *sql;
  sqlite3_stmt *stmt = NULL;
  shard_manifest copy = t->m;
  copy.n_segments = 0, copy.segments = NULL;
  vs_rc rc = shard_manifest_print(&copy, &json, err);
  if (rc) return rc;
  sql = sqlite3_mprintf("CREATE TABLE \"%w\".\"%w_config\"(k TEXT PRIMARY KEY, v) WITHOUT ROWID", t->entry.schema, t->entry.name);
  if (!sql || sqlite3_exec(db, sql, NULL, NULL, NULL)) rc = sql_failed(db, err);
  sqlite3_free(sql);
  sql = rc ? NULL : sqlite3_mprintf("INSERT INTO \"%w\".\"%w_config\" VALUES('path',?1),('version',?2),('columns',?3)", t->entry.schema,
                                    t->entry.name);
  if (!rc && (!sql || sqlite3_prepare_v2(db, sql, -1, &stmt, NULL))) rc = sql_failed(db, err);
  if (!rc) {
    if (t->path) sqlite3_bind_text(stmt, 1, t->path, -1, SQLITE_STATIC);
    sqlite3_bind_int64(stmt, 2, (sqlite3_int64)t->version);
    sqlite3_bind_text(stmt, 3, json, -1, SQLITE_STATIC);
    if (sqlite3_step(stmt) != SQLITE_DONE) rc = sql_failed(db, err);
  }
  sqlite3_finalize(stmt);
  sqlite3_free(sql);
  free(json);
  return rc;
}

static vs_rc config_row(table *t, const char *key, sqlite3_stmt *stmt, vs_err *err) {
  const char *text = (const char *)sqlite3_column_text(stmt, 1);
  if (!strcmp(key, "path") && text && !(t->path = strdup(text))) return vs_nomem(err);
  if (!strcmp(key, "folder") && text && !(t->folder = strdup(text))) return vs_nomem(err);
  if (!strcmp(key, "version")) t->version = (uint64_t)sqlite3_column_int64(stmt, 1);
  if (!strcmp(key, "columns") && text && !t->m.dim)
    return shard_manifest_parse(text, (size_t)sqlite3_column_bytes(stmt, 1), "the _config table", &t->m, err);
  return VS_OK;
}

static vs_rc config_read(table *t, vs_err *err) {
  sqlite3_stmt *stmt = NULL;
  char *sql = sqlite3_mprintf("SELECT k, v FROM \"%w\".\"%w_config\"", t->entry.schema, t->entry.name);
  vs_rc rc = sql && !sqlite3_prepare_v2(t->c->db, sql, -1, &stmt, NULL) ? VS_OK : sql_failed(t->c->db, err);
  sqlite3_free(sql);
  while (!rc && sqlite3_step(stmt) == SQLITE_ROW) {
    const char *key = (const char *)sqlite3_column_text(stmt, 0);
    rc = key ? config_row(t, key, stmt, err) : VS_OK;
  }
  if (sqlite3_finalize(stmt) && !rc) rc = sql_failed(t->c->db, err);
  if (!rc && !t->m.dim) rc = vs_fail(err, VS_CORRUPT, "%s_config does not describe the table: DROP and create it again", t->entry.name);
  return rc;
}

/* ---- paths ---- */

static const char *folder_of(const table *t) { return t->folder ? t->folder : t->entry.name; }

static vs_rc resolve_path(table *t, vs_err *err) {
  const char *file = sqlite3_db_filename(t->c->db, t->entry.schema);
  if (t->full_path) return VS_OK;
  if (t->path) return conn_path_resolve(t->c, t->entry.schema, t->path, &t->full_path, err);
  if (!file || !*file) return vs_fail(err, VS_INVALID, "a table in memory needs a path: USING vecshard(path='db/NAME')");
  if (asprintf(&t->full_path, "%s.vecshard/%s", file, folder_of(t)) < 0) {
    t->full_path = NULL;
    return vs_nomem(err);
  }
  return VS_OK;
}

/* A database file that was copied without what lies beside it is how a default path comes to lead nowhere. */
static vs_rc open_shard(table *t, shard **out, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = shard_open(t->full_path, t->version, out, &why);
  if (rc != VS_NOTFOUND || t->path || shard_dir_is_shard(t->full_path)) return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
  return vs_fail(err, rc, "%s. Without path= a table's shard lies there, beside the database file: copy or move the folder along "
                 "with the file, or DROP the table and CREATE it with path='...'", why.text);
}

/* ---- connecting ---- */

static void table_free(table *t) {
  conn_table_remove(t->c, &t->entry);
  shard_close(t->open);
  shard_manifest_reset(&t->m);
  free(t->entry.schema), free(t->entry.name), free(t->path), free(t->folder), free(t->full_path);
  conn_release(t->c);
  sqlite3_free(t);
}

static vs_rc table_open(conn_table *entry, shard **out, vs_err *err) {
  table *t = (table *)((char *)entry - offsetof(table, entry));
  *out = NULL;
  if (!t->open || (!t->version && !shard_is_fresh(t->open))) {
    shard *s;
    vs_rc rc = resolve_path(t, err);
    if (!rc && t->from_schema) rc = conn_path_check_trust(t->c, t->entry.name, t->path ? t->path : folder_of(t), t->full_path, err);
    if (!rc) rc = open_shard(t, &s, err);
    if (!rc && !schema_same(&s->manifest, &t->m)) {
      shard_close(s);
      rc = vs_fail(err, VS_INVALID, "%s: the shard now has other columns than when the table was created: DROP and create it again",
                   t->full_path);
    }
    if (rc) return rc;
    shard_close(t->open);
    t->open = s;
  }
  *out = shard_share(t->open);
  return VS_OK;
}

static vs_rc create(table *t, int argc, const char *const *argv, vs_err *err) {
  schema_def def;
  shard *s = NULL;
  statement st;
  vs_rc rc = schema_parse(argc, argv, &def, err);
  if (rc) return rc;
  statement_open(&st, t->c);
  statement_enter(&st, PHASE_OPEN);
  t->path = def.path, def.path = NULL;
  t->version = def.version;
  rc = resolve_path(t, err);
  if (!rc) rc = open_shard(t, &s, err);
  if (!rc) rc = schema_compare(&def, &s->manifest, err);
  if (!rc) {
    shard_manifest copy = s->manifest; /* printed and parsed: a deep copy without the segments */
    char *json;
    copy.n_segments = 0, copy.segments = NULL;
    rc = shard_manifest_print(&copy, &json, err);
    if (!rc) rc = shard_manifest_parse(json, strlen(json), t->full_path, &t->m, err);
    free(json);
  }
  t->open = s;
  schema_reset(&def);
  statement_leave(&st);
  statement_close(&st);
  return rc;
}

static int is_remote(const table *t) { return t->path && s3_is_uri(t->path); }

static int connect_table(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message, int creating) {
  vs_err err = {0};
  char *sql = NULL;
  table *t = sqlite3_malloc64(sizeof *t);
  if (!t) return SQLITE_NOMEM;
  memset(t, 0, sizeof *t);
  t->c = aux, t->c->refs++;
  t->entry.open = table_open, t->from_schema = !creating;
  t->entry.schema = strdup(argv[1]), t->entry.name = strdup(argv[2]);
  vs_rc rc = t->entry.schema && t->entry.name ? VS_OK : vs_nomem(&err);
  if (!rc && creating) rc = create(t, argc - 3, argv + 3, &err);
  else if (!rc) rc = config_read(t, &err);
  if (!rc) rc = schema_declare(&t->m, t->entry.name, &sql, &err);
  if (!rc && creating) rc = config_write(t, &err);
  if (!rc && sqlite3_declare_vtab(db, sql)) rc = sql_failed(db, &err);
  sqlite3_free(sql);
  if (!rc && is_remote(t)) sqlite3_vtab_config(db, SQLITE_VTAB_DIRECTONLY);
  if (rc) {
    table_free(t);
    int changed = err.rc == VS_IO && sqlite3_errcode(db) == SQLITE_SCHEMA; /* by another connection: SQLite reads it and tries again */
    return changed ? SQLITE_SCHEMA : conn_error(&err, message);
  }
  conn_table_add(t->c, &t->entry);
  *out = &t->base;
  return SQLITE_OK;
}

static int x_create(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  return connect_table(db, aux, argc, argv, out, message, 1);
}
static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  return connect_table(db, aux, argc, argv, out, message, 0);
}
static int x_disconnect(sqlite3_vtab *v) {
  table_free(table_of(v));
  return SQLITE_OK;
}

static int x_destroy(sqlite3_vtab *v) {
  table *t = table_of(v);
  char *sql = sqlite3_mprintf("DROP TABLE IF EXISTS \"%w\".\"%w_config\"", t->entry.schema, t->entry.name);
  int rc = sql ? sqlite3_exec(t->c->db, sql, NULL, NULL, NULL) : SQLITE_NOMEM;
  sqlite3_free(sql);
  if (rc == SQLITE_OK) table_free(t);
  return rc;
}

/* The shard stays where it is: a table at the default path keeps the name that the path was made from. */
static char *rename_sql(const table *t, const char *name) {
  sqlite3_str *s = sqlite3_str_new(t->c->db);
  sqlite3_str_appendf(s, "ALTER TABLE \"%w\".\"%w_config\" RENAME TO \"%w_config\";", t->entry.schema, t->entry.name, name);
  if (!t->path && !t->folder)
    sqlite3_str_appendf(s, "INSERT OR REPLACE INTO \"%w\".\"%w_config\" VALUES('folder', %Q)", t->entry.schema, name, t->entry.name);
  return sqlite3_str_finish(s);
}

static int x_rename(sqlite3_vtab *v, const char *name) {
  table *t = table_of(v);
  vs_err err = {0};
  char *declared = NULL;
  vs_rc fit = schema_declare(&t->m, name, &declared, &err); /* the new name becomes a column, too */
  sqlite3_free(declared);
  if (fit) return conn_error(&err, &v->zErrMsg);
  char *sql = rename_sql(t, name), *copy = strdup(name);
  int rc = sql && copy ? sqlite3_exec(t->c->db, sql, NULL, NULL, NULL) : SQLITE_NOMEM;
  sqlite3_free(sql);
  if (rc != SQLITE_OK) {
    free(copy);
    return rc;
  }
  if (!t->path && !t->folder) t->folder = t->entry.name;
  else free(t->entry.name);
  t->entry.name = copy;
  return SQLITE_OK;
}

static int x_shadow_name(const char *suffix) { return !sqlite3_stricmp(suffix, "config"); }

/* ---- planning ---- */

/* Column numbers: 0 id, 1 vector, 2... metadata, then the hidden ones. */
static int hidden_of(const table *t, int column) { return column - 2 - (int)t->m.n_columns; }
static int is_search_column(const table *t, int column) {
  int h = hidden_of(t, column);
  return h >= HIDDEN_QUERY && h <= HIDDEN_EXACT;
}

static int is_query(const table *t, const struct sqlite3_index_constraint *c) {
  return (c->iColumn == 1 && c->op == SQLITE_INDEX_CONSTRAINT_MATCH) ||
         (hidden_of(t, c->iColumn) == HIDDEN_QUERY && plan_gives(c));
}

static int plan_refuse(sqlite3_vtab *v, const char *text) {
  sqlite3_free(v->zErrMsg);
  v->zErrMsg = sqlite3_mprintf("%s", text);
  return SQLITE_ERROR;
}

static shard_type column_type(void *ctx, int column) {
  const shard_manifest *m = ctx;
  return column == FILTER_ID ? (m->id_text ? SHARD_TEXT : SHARD_INTEGER) : m->columns[column].type;
}

static void use_search_argument(plan *p, table *t, int i) {
  static const char *const entries[] = {"q", "k", "n", "r", "R", "x"};
  const struct sqlite3_index_constraint *c = &p->info->aConstraint[i];
  int h = hidden_of(t, c->iColumn);
  if (is_query(t, c)) plan_use(p, i, 1, "q");
  else if (is_search_column(t, c->iColumn) && plan_gives(c)) plan_use(p, i, 1, entries[h]);
  else if (h == HIDDEN_DISTANCE) plan_bound(p, i);
  else if (c->iColumn == 0 || (c->iColumn == -1 && !t->m.id_text)) plan_filter(p, i, FILTER_ID, column_type(&t->m, FILTER_ID));
  else if (c->iColumn >= 2 && c->iColumn < 2 + (int)t->m.n_columns)
    plan_filter(p, i, c->iColumn - 2, column_type(&t->m, c->iColumn - 2));
}

static int plan_search_query(table *t, sqlite3_index_info *info) {
  plan p;
  if (plan_misused(info, 2 + (int)t->m.n_columns + HIDDEN_K, &t->base.zErrMsg)) return SQLITE_ERROR;
  for (int i = 0; i < info->nConstraint; i++) {
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    if ((is_query(t, c) || (is_search_column(t, c->iColumn) && plan_gives(c))) && !c->usable)
      return SQLITE_CONSTRAINT; /* another join order must come first */
  }
  plan_begin(&p, info);
  for (int i = 0; i < info->nConstraint; i++)
    if (info->aConstraint[i].usable) use_search_argument(&p, t, i);
  info->orderByConsumed = plan_by_distance(info, 0, 2 + (int)t->m.n_columns + HIDDEN_DISTANCE);
  return plan_end(&p, PLAN_SEARCH | (info->orderByConsumed ? PLAN_SORTED : 0), PLAN_SEARCH_COST, 10);
}

static int plan_without_query(table *t, sqlite3_index_info *info) {
  static const char *const names[] = {"", "k", "nprobe", "refine", "recall", "exact"};
  plan p;
  for (int i = 0; i < info->nConstraint; i++) { /* they go with a query */
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    if (!is_search_column(t, c->iColumn) || c->op != SQLITE_INDEX_CONSTRAINT_EQ) continue;
    return c->usable ? plan_without(info, names[hidden_of(t, c->iColumn)]) : SQLITE_CONSTRAINT;
  }
  plan_begin(&p, info);
  for (int i = 0; i < info->nConstraint; i++) {
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    if (!c->usable || c->op != SQLITE_INDEX_CONSTRAINT_EQ || c->iColumn > 0) continue;
    const char *collation = sqlite3_vtab_collation(info, i);
    if (c->iColumn == 0 && collation && sqlite3_stricmp(collation, "BINARY")) continue;
    plan_use(&p, i, 0, c->iColumn == 0 ? "i" : "w");
    info->idxFlags = SQLITE_INDEX_SCAN_UNIQUE;
    return plan_end(&p, c->iColumn == 0 ? PLAN_ID : PLAN_ROWID, PLAN_LOOKUP_COST, 1);
  }
  return plan_end(&p, PLAN_SCAN, PLAN_SCAN_COST, 1000000);
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info) {
  table *t = table_of(v);
  int queries = 0;
  for (int i = 0; i < info->nConstraint; i++) queries += is_query(t, &info->aConstraint[i]);
  if (queries > 1) return plan_refuse(v, "two queries in one search: one MATCH (or one table argument) is possible");
  return queries ? plan_search_query(t, info) : plan_without_query(t, info);
}

/* ---- cursors ---- */

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out) {
  cursor *c = calloc(1, sizeof *c);
  if (!c) return SQLITE_NOMEM;
  statement_open(&c->statement, table_of(v)->c);
  *out = &c->base;
  return SQLITE_OK;
}

static void drop_stretch(cursor *c);

static void cursor_reset(cursor *c) {
  drop_stretch(c);
  stream_reset(&c->hits);
  row_values_reset(&c->values);
  plan_search_reset(&c->plan);
  shard_close(c->s);
  c->s = NULL;
  c->eof = 1;
}

static int x_close(sqlite3_vtab_cursor *v) {
  cursor_reset((cursor *)v);
  statement_close(&((cursor *)v)->statement);
  free(v);
  return SQLITE_OK;
}

static vs_rc start_search(cursor *c, table *t, vs_err *err) {
  const float *query;
  float *owned;
  uint32_t dim;
  vs_rc rc = vec_borrow(c->plan.query, &query, &dim, &owned, err);
  if (!rc && query) {
    stream_options o = {.query = query, .dim = dim, .has_k = c->plan.has_k, .k = c->plan.k, .nprobe = c->plan.nprobe,
                        .refine = c->plan.refine, .recall = c->plan.recall, .exact = c->plan.exact, .filter = &c->plan.filter, .floor = c->plan.floor,
                        .limit = c->plan.limit, .threads = t->c->threads};
    if (dim != t->m.dim) rc = vs_fail(err, VS_INVALID, "the query has %u dimensions, %s has %u", dim, t->entry.name, t->m.dim);
    if (!rc) rc = stream_open(&c->hits, &c->statement, &c->s, 1, &o, err);
  }
  sqlite3_free(owned);
  c->eof = !rc && stream_eof(&c->hits);
  return rc;
}

/* The id as SQLite hands it over, with the affinity of the id column. */
static int id_of_value(sqlite3_value *v, int is_text, ivfpq_id *id) {
  memset(id, 0, sizeof *id);
  id->is_text = is_text;
  if (sqlite3_value_type(v) == SQLITE_NULL || sqlite3_value_type(v) == SQLITE_BLOB) return 0;
  if (is_text) {
    id->text = (const char *)sqlite3_value_text(v);
    id->len = (uint32_t)sqlite3_value_bytes(v);
    return id->text != NULL;
  }
  int type = sqlite3_value_numeric_type(v);
  id->i = sqlite3_value_int64(v);
  return type == SQLITE_INTEGER || (type == SQLITE_FLOAT && sqlite3_value_double(v) == (double)id->i);
}

static vs_rc start_lookup(cursor *c, table *t, vs_err *err) {
  int found = 0;
  ivfpq_id id;
  vs_rc rc = VS_OK;
  if (c->kind == PLAN_ID || !t->m.id_text) {
    if (id_of_value(c->kind == PLAN_ID ? c->plan.id : c->plan.rowid, t->m.id_text, &id))
      rc = shard_find(c->s, &id, &c->segment, &c->row, &found, err);
  } else {
    uint64_t rowid = (uint64_t)sqlite3_value_int64(c->plan.rowid);
    c->segment = (uint32_t)(rowid >> 32), c->row = (uint32_t)rowid;
    found = sqlite3_value_numeric_type(c->plan.rowid) == SQLITE_INTEGER && c->segment < c->s->manifest.n_segments &&
            c->row < c->s->manifest.segments[c->segment].n_rows;
  }
  c->eof = !found;
  return rc;
}

/* Leaves (segment, row) at an existing row, or ends the scan. */
static void settle_scan(cursor *c) {
  while (c->segment < c->s->manifest.n_segments && c->row >= c->s->manifest.segments[c->segment].n_rows) c->segment++, c->row = 0;
  c->eof = c->segment >= c->s->manifest.n_segments;
}

static int x_filter(sqlite3_vtab_cursor *v, int idx_num, const char *idx_str, int argc, sqlite3_value **argv) {
  cursor *c = (cursor *)v;
  table *t = table_of(v->pVtab);
  vs_err err;
  vs_err_reset(&err);
  cursor_reset(c);
  c->kind = idx_num & PLAN_KIND;
  c->segment = c->row = 0;
  vs_rc rc = c->kind == PLAN_NO_QUERY
                 ? vs_fail(&err, VS_INVALID, "%s needs a query: %s MATCH :vector", idx_str, t->m.vector_name)
                 : plan_decode(idx_str, argc, argv, column_type, &t->m, &c->plan, &err);
  statement_enter(&c->statement, PHASE_OPEN);
  if (c->kind == PLAN_SEARCH) statement_trace_begin(&c->statement);
  if (!rc) rc = table_open(&t->entry, &c->s, &err);
  statement_phase(&c->statement, PHASE_SCAN);
  if (!rc && c->kind == PLAN_SEARCH) rc = start_search(c, t, &err);
  else if (!rc && c->kind == PLAN_SCAN) settle_scan(c);
  else if (!rc) rc = start_lookup(c, t, &err);
  statement_leave(&c->statement);
  c->plan.query = c->plan.id = c->plan.rowid = NULL; /* SQLite owns them until xFilter returns */
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int next_batch(cursor *c) {
  vs_err err = {0};
  statement_enter(&c->statement, PHASE_SCAN);
  vs_rc rc = stream_next(&c->hits, &err);
  statement_leave(&c->statement);
  return rc ? conn_error(&err, &c->base.pVtab->zErrMsg) : SQLITE_OK;
}

static int x_next(sqlite3_vtab_cursor *v) {
  cursor *c = (cursor *)v;
  int rc = SQLITE_OK;
  c->values.valid = 0;
  if (c->kind == PLAN_SEARCH) {
    if (!stream_step(&c->hits)) rc = next_batch(c);
    c->eof = stream_eof(&c->hits);
  } else if (c->kind == PLAN_SCAN) {
    c->row++;
    settle_scan(c);
  } else c->eof = 1;
  return rc;
}

static int x_eof(sqlite3_vtab_cursor *v) { return ((cursor *)v)->eof; }

static vs_rc stored_column(cursor *c, sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, int column, vs_err *err) {
  int ok = column == 0   ? result_id(ctx, s, record, err)
           : column == 1 ? result_vector(ctx, s, record)
                         : result_column(ctx, s, record, (uint32_t)(column - 2), &c->values, err);
  return ok ? VS_OK : err->rc;
}

static void hidden_column(cursor *c, sqlite3_context *ctx, int hidden) {
  if (c->kind != PLAN_SEARCH) return;
  switch (hidden) {
    case HIDDEN_K: plan_result_number(ctx, c->plan.has_k ? (int64_t)c->plan.k : -1); break;
    case HIDDEN_NPROBE: plan_result_number(ctx, c->plan.nprobe); break;
    case HIDDEN_REFINE: plan_result_number(ctx, c->plan.refine); break;
    case HIDDEN_RECALL: plan_result_recall(ctx, c->plan.recall); break;
    case HIDDEN_EXACT: sqlite3_result_int(ctx, c->plan.exact); break;
    case HIDDEN_DISTANCE: sqlite3_result_double(ctx, stream_hit(&c->hits)->distance); break;
    default: break;
  }
}

static void drop_stretch(cursor *c) {
  if (!c->stretch_rows) return;
  ivfpq_segment *s = c->s->segments[c->stretch_segment];
  if (c->stretch_extras) vs_io_release(s->io, c->stretch_extras, 2 * (size_t)c->stretch_rows);
  free(c->stretch_extras);
  ivfpq_rows_release(s, &c->stretch, 1);
  c->stretch_extras = NULL, c->stretch_rows = 0;
}

/* Asks for what the records of the stretch refer to: their column values lie side by side, and so travel together. */
static vs_rc stretch_columns(cursor *c, vs_err *err) {
  ivfpq_segment *s = c->s->segments[c->stretch_segment];
  if (s->io->local || c->stretch_extras || c->stretch_rows < 2) return VS_OK;
  vs_range *r = calloc(2 * (size_t)c->stretch_rows, sizeof *r);
  if (!r) return vs_nomem(err);
  for (uint32_t i = 0; i < c->stretch_rows; i++) ivfpq_row_extras(s, c->stretch.record + (size_t)i * s->params.row_bytes, r + 2 * (size_t)i);
  vs_rc rc = vs_io_begin(s->io, r, 2 * (size_t)c->stretch_rows, err);
  if (rc) free(r);
  else c->stretch_extras = r;
  return rc;
}

/* The record of a scan's or look-up's row, until the next call: of a scan in a store with those that follow it. */
static vs_rc scan_row(cursor *c, int with_columns, const uint8_t **record, vs_err *err) {
  ivfpq_segment *s = c->s->segments[c->segment];
  uint32_t n = 1;
  if (!c->stretch_rows || c->stretch_segment != c->segment || c->row < c->stretch_first || c->row - c->stretch_first >= c->stretch_rows) {
    drop_stretch(c);
    if (c->kind == PLAN_SCAN && !s->io->local) n = SCAN_BYTES / s->params.row_bytes + 1;
    if (n > s->params.n_rows - c->row) n = (uint32_t)s->params.n_rows - c->row;
    vs_rc rc = ivfpq_rows_fetch_range(s, c->row, n, &c->stretch, err);
    if (rc) return rc;
    c->stretch_segment = c->segment, c->stretch_first = c->row, c->stretch_rows = n;
  }
  *record = c->stretch.record + (size_t)(c->row - c->stretch_first) * s->params.row_bytes;
  return with_columns || s->params.id_text ? stretch_columns(c, err) : VS_OK;
}

/* The current row where reading it is no work, as in a mapped file; 0: it has to be fetched, by a statement. */
static int row_at_hand(cursor *c, stream_want want, ivfpq_segment **s, const uint8_t **record, vs_rc *rc, vs_err *err) {
  if (c->kind == PLAN_SEARCH) return stream_row_at_hand(&c->hits, want, s, record, rc, err);
  *s = c->s->segments[c->segment];
  if (!ivfpq_rows_mapped(*s)) return 0;
  *rc = ivfpq_row_at(*s, c->row, record, err);
  return 1;
}

static vs_rc fetch_row(cursor *c, int with_columns, ivfpq_segment **s, const uint8_t **record, vs_err *err) {
  if (c->kind == PLAN_SEARCH) return stream_row(&c->hits, with_columns, s, record, err);
  *s = c->s->segments[c->segment];
  return scan_row(c, with_columns, record, err);
}

static int x_column(sqlite3_vtab_cursor *v, sqlite3_context *ctx, int column) {
  cursor *c = (cursor *)v;
  int hidden = hidden_of(table_of(v->pVtab), column);
  ivfpq_segment *s;
  const uint8_t *record;
  vs_err err;
  vs_rc rc;
  if (hidden >= 0) {
    hidden_column(c, ctx, hidden);
    return SQLITE_OK;
  }
  sqlite3_int64 id;
  if (column == 0 && c->kind == PLAN_SEARCH && stream_id_at_hand(&c->hits, &id)) {
    sqlite3_result_int64(ctx, id);
    return SQLITE_OK;
  }
  vs_err_reset(&err);
  if (row_at_hand(c, column == 1 ? STREAM_VECTOR : STREAM_ID, &s, &record, &rc, &err)) {
    if (!rc) rc = stored_column(c, ctx, s, record, column, &err);
  } else {
    statement_enter(&c->statement, PHASE_ROWS);
    rc = fetch_row(c, column > 1, &s, &record, &err);
    if (!rc) rc = stored_column(c, ctx, s, record, column, &err);
    statement_leave(&c->statement);
  }
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int x_rowid(sqlite3_vtab_cursor *v, sqlite3_int64 *rowid) {
  cursor *c = (cursor *)v;
  table *t = table_of(v->pVtab);
  uint32_t segment = c->kind == PLAN_SEARCH ? stream_hit(&c->hits)->segment : c->segment;
  uint32_t number = c->kind == PLAN_SEARCH ? stream_hit(&c->hits)->row : c->row;
  *rowid = (sqlite3_int64)((uint64_t)segment << 32 | number);
  if (t->m.id_text || (c->kind == PLAN_SEARCH && stream_id_at_hand(&c->hits, rowid))) return SQLITE_OK;
  vs_err err;
  vs_rc rc;
  ivfpq_id id;
  ivfpq_segment *s;
  const uint8_t *record;
  vs_err_reset(&err);
  if (!row_at_hand(c, STREAM_ID, &s, &record, &rc, &err)) {
    statement_enter(&c->statement, PHASE_ROWS);
    rc = fetch_row(c, 0, &s, &record, &err);
    statement_leave(&c->statement);
  }
  if (!rc) rc = ivfpq_row_id(s, record, &id, &err);
  if (!rc) *rowid = id.i;
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static const sqlite3_module module = {
    .iVersion = 3, .xCreate = x_create, .xConnect = x_connect, .xBestIndex = x_best_index, .xDisconnect = x_disconnect,
    .xDestroy = x_destroy, .xOpen = x_open, .xClose = x_close, .xFilter = x_filter, .xNext = x_next, .xEof = x_eof,
    .xColumn = x_column, .xRowid = x_rowid, .xRename = x_rename, .xShadowName = x_shadow_name};

int vecshard_table_register(conn *c) {
  c->refs++;
  return sqlite3_create_module_v2(c->db, "vecshard", &module, c, conn_release);
}
