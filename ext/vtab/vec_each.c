/* vec_each.c - the elements of a vector as rows, as in sqlite-vec:
 *
 *   SELECT rowid, value FROM vec_each('[1,2,3]');            -- 0|1.0, 1|2.0, 2|3.0
 *   SELECT t.id, max(e.value) FROM t, vec_each(t.embedding) e GROUP BY t.id;
 *
 * rowid counts from 0. Without an argument there is no plan ("no query solution"); NULL is an error, as any other value
 * that is no vector. The one plan takes the vector; idxNum is unused. The hidden column reads as NULL.
 */
#include <string.h>

#include "modules.h"
#include "vec_functions.h"
#include "vec_value.h"
SQLITE_EXTENSION_INIT3

enum { COL_VALUE, COL_VECTOR };
typedef struct each_cursor { sqlite3_vtab_cursor base; float *v; uint32_t dim, at; } each_cursor;

static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  (void)aux, (void)argc, (void)argv, (void)message;
  int rc = sqlite3_declare_vtab(db, "CREATE TABLE x(value REAL, vector HIDDEN)");
  if (rc) return rc;
  sqlite3_vtab_config(db, SQLITE_VTAB_INNOCUOUS);
  if (!(*out = sqlite3_malloc64(sizeof **out))) return SQLITE_NOMEM;
  memset(*out, 0, sizeof **out);
  return SQLITE_OK;
}
static int x_disconnect(sqlite3_vtab *v) {
  sqlite3_free(v);
  return SQLITE_OK;
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info) {
  (void)v;
  for (int i = 0; i < info->nConstraint; i++) {
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    if (c->iColumn != COL_VECTOR || c->op != SQLITE_INDEX_CONSTRAINT_EQ) continue;
    if (!c->usable) return SQLITE_CONSTRAINT;
    info->aConstraintUsage[i].argvIndex = 1;
    info->aConstraintUsage[i].omit = 1;
    info->estimatedCost = 10, info->estimatedRows = 1000;
    return SQLITE_OK;
  }
  return SQLITE_CONSTRAINT;
}

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out) {
  (void)v;
  each_cursor *c = sqlite3_malloc64(sizeof *c);
  if (!c) return SQLITE_NOMEM;
  memset(c, 0, sizeof *c);
  *out = &c->base;
  return SQLITE_OK;
}
static int x_close(sqlite3_vtab_cursor *v) {
  sqlite3_free(((each_cursor *)v)->v);
  sqlite3_free(v);
  return SQLITE_OK;
}

static int x_filter(sqlite3_vtab_cursor *v, int idx_num, const char *idx_str, int argc, sqlite3_value **argv) {
  each_cursor *c = (each_cursor *)v;
  vs_err err = {0};
  (void)idx_num, (void)idx_str, (void)argc;
  sqlite3_free(c->v);
  c->v = NULL, c->at = 0, c->dim = 0;
  vs_rc rc = vec_from_value(argv[0], &c->v, &c->dim, &err);
  if (!rc && !c->v) rc = vs_fail(&err, VS_INVALID, "vec_each: a vector must not be NULL");
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}
static int x_next(sqlite3_vtab_cursor *v) {
  ((each_cursor *)v)->at++;
  return SQLITE_OK;
}
static int x_eof(sqlite3_vtab_cursor *v) { return ((each_cursor *)v)->at >= ((each_cursor *)v)->dim; }
static int x_column(sqlite3_vtab_cursor *v, sqlite3_context *ctx, int column) {
  const each_cursor *c = (const each_cursor *)v;
  if (column == COL_VALUE) sqlite3_result_double(ctx, c->v[c->at]);
  return SQLITE_OK;
}
static int x_rowid(sqlite3_vtab_cursor *v, sqlite3_int64 *rowid) {
  *rowid = ((each_cursor *)v)->at;
  return SQLITE_OK;
}

static const sqlite3_module module = {.xConnect = x_connect, .xBestIndex = x_best_index, .xDisconnect = x_disconnect,
                                      .xDestroy = x_disconnect, .xOpen = x_open, .xClose = x_close, .xFilter = x_filter,
                                      .xNext = x_next, .xEof = x_eof, .xColumn = x_column, .xRowid = x_rowid};

int vec_each_register(sqlite3 *db) { return sqlite3_create_module_v2(db, "vec_each", &module, NULL, NULL); }
