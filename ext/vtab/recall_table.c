/* recall_table.c - `shard_recall`: what searches of a source find and cost, measured now (shard_recall.h).
 *
 *   SELECT * FROM shard_recall('./db', 10);           -- nprobe, refine, recall, ms, requests, bytes
 *   SELECT target, * FROM shard_recall('proteins', 100, 1000);
 *
 * One row per setting, those that take the least first: what `recall = r` picks for r = .8, .9, .95, .98, .99, .995, and the
 * default. nprobe and refine are what the setting comes to; given as such they find about as much or more, because
 * `recall = r` also knows when to stop early. ms, requests and bytes are those of one search on one thread, in a store with nothing in the cache.
 *
 * Hidden columns: source (as of shard_union), k (10 when not given), queries (rows of the shards that serve as such; 400), and target,
 * the r (NULL: the default). idxNum: bit 0 k, bit 1 queries are among the arguments behind the source.
 * The truth is found before the first row, each setting is timed when its row is asked for. It reads any path that SQL names:
 * SQLITE_DIRECTONLY.
 */
#include <stdlib.h>
#include <string.h>

#include "../shard/shard_recall.h"
#include "modules.h"
#include "plan.h"
#include "statement.h"
SQLITE_EXTENSION_INIT3

enum { COL_NPROBE, COL_REFINE, COL_RECALL, COL_MS, COL_REQUESTS, COL_BYTES, COL_SOURCE, COL_K, COL_QUERIES, COL_TARGET };
enum { WITH_K = 1, WITH_QUERIES = 2, DEFAULT_K = 10 };

typedef struct recall_cursor {
  sqlite3_vtab_cursor base;
  statement statement;
  conn_trace last[N_PHASES]; /* of the search before: this is none */
  shard_set set;
  shard_recall *measure;     /* NULL: nothing to measure */
  shard_recall_point point;
  int64_t k;
  int more;
  sqlite3_int64 rowid;
} recall_cursor;

static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  (void)db, (void)argc, (void)argv, (void)message;
  return conn_vtab_open(aux, "CREATE TABLE x(nprobe INTEGER, refine INTEGER, recall REAL, ms REAL, requests REAL, bytes REAL, "
                             "source HIDDEN, k HIDDEN, queries HIDDEN, target REAL HIDDEN)", sizeof(conn_vtab), out);
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info) {
  static const int columns[] = {COL_SOURCE, COL_K, COL_QUERIES};
  int at[3] = {-1, -1, -1}, n = 0;
  for (int i = 0; i < info->nConstraint; i++)
    for (int j = 0; j < 3; j++) {
      const struct sqlite3_index_constraint *c = &info->aConstraint[i];
      if (c->iColumn != columns[j] || c->op != SQLITE_INDEX_CONSTRAINT_EQ) continue;
      if (!c->usable) return SQLITE_CONSTRAINT;
      at[j] = i;
    }
  if (at[0] < 0) {
    sqlite3_free(v->zErrMsg);
    v->zErrMsg = sqlite3_mprintf("shard_recall needs a source: write shard_recall(source, k)");
    return SQLITE_ERROR;
  }
  for (int j = 0; j < 3; j++)
    if (at[j] >= 0) info->aConstraintUsage[at[j]].argvIndex = ++n, info->aConstraintUsage[at[j]].omit = 1;
  info->idxNum = (at[1] >= 0 ? WITH_K : 0) | (at[2] >= 0 ? WITH_QUERIES : 0);
  info->estimatedCost = 1e6, info->estimatedRows = 7;
  return SQLITE_OK;
}

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out) {
  recall_cursor *c = calloc(1, sizeof *c);
  if (!c) return SQLITE_NOMEM;
  statement_open(&c->statement, ((conn_vtab *)v)->c);
  *out = &c->base;
  return SQLITE_OK;
}

static void cursor_reset(recall_cursor *c) {
  shard_recall_close(c->measure);
  shard_set_reset(&c->set);
  c->measure = NULL, c->more = 0, c->rowid = 0, c->k = -1;
}

static int x_close(sqlite3_vtab_cursor *v) {
  cursor_reset((recall_cursor *)v);
  statement_close(&((recall_cursor *)v)->statement);
  free(v);
  return SQLITE_OK;
}

static void enter(recall_cursor *c, conn *of) {
  memcpy(c->last, of->trace.phases, sizeof c->last);
  statement_enter(&c->statement, PHASE_OPEN);
}

static void leave(recall_cursor *c, conn *of) {
  statement_leave(&c->statement);
  memcpy(of->trace.phases, c->last, sizeof c->last);
}

static vs_rc decode(recall_cursor *c, int idx_num, sqlite3_value **argv, int64_t *queries, vs_err *err) {
  vs_rc rc = VS_OK;
  c->k = *queries = -1;
  if (idx_num & WITH_K) rc = plan_whole_number("k", *argv++, &c->k, err);
  if (!rc && idx_num & WITH_QUERIES) rc = plan_whole_number("queries", *argv, queries, err);
  if (rc) return rc;
  if (c->k < 0) c->k = DEFAULT_K;
  if (!c->k) return vs_fail(err, VS_INVALID, "k must be at least 1: recall is the share of the k nearest that a search finds");
  return *queries ? VS_OK : vs_fail(err, VS_INVALID, "queries must be at least 1");
}

static vs_rc measure(recall_cursor *c, conn *of, const char *source, int64_t queries, vs_err *err) {
  vs_rc rc = conn_any_open(of, source, &c->set, err);
  if (rc) return rc;
  shard_recall_plan p = {.shards = c->set.shards, .n_shards = c->set.n, .k = (uint64_t)c->k,
                         .n_queries = queries < 0 ? 0 : (size_t)queries, .threads = of->threads};
  rc = shard_recall_open(&p, &c->measure, err);
  return rc || !c->measure ? rc : shard_recall_next(c->measure, &c->point, &c->more, err);
}

static int x_filter(sqlite3_vtab_cursor *v, int idx_num, const char *idx_str, int argc, sqlite3_value **argv) {
  recall_cursor *c = (recall_cursor *)v;
  conn *of = ((conn_vtab *)v->pVtab)->c;
  vs_err err = {0};
  int64_t queries;
  (void)idx_str, (void)argc;
  cursor_reset(c);
  const char *source = (const char *)sqlite3_value_text(argv[0]);
  vs_rc rc = decode(c, idx_num, argv + 1, &queries, &err);
  if (!rc && !source && sqlite3_value_type(argv[0]) != SQLITE_NULL) rc = vs_nomem(&err);
  if (!rc && source) {
    enter(c, of);
    rc = measure(c, of, source, queries, &err);
    leave(c, of);
  }
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int x_next(sqlite3_vtab_cursor *v) {
  recall_cursor *c = (recall_cursor *)v;
  conn *of = ((conn_vtab *)v->pVtab)->c;
  vs_err err = {0};
  enter(c, of);
  vs_rc rc = shard_recall_next(c->measure, &c->point, &c->more, &err);
  leave(c, of);
  c->rowid++;
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int x_eof(sqlite3_vtab_cursor *v) { return !((recall_cursor *)v)->more; }

static int x_column(sqlite3_vtab_cursor *v, sqlite3_context *ctx, int column) {
  const recall_cursor *c = (recall_cursor *)v;
  const shard_recall_point *p = &c->point;
  switch (column) {
    case COL_NPROBE: sqlite3_result_int64(ctx, (sqlite3_int64)p->nprobe); break;
    case COL_REFINE: sqlite3_result_int64(ctx, (sqlite3_int64)p->refine); break;
    case COL_RECALL: sqlite3_result_double(ctx, p->recall); break;
    case COL_MS: sqlite3_result_double(ctx, p->ms); break;
    case COL_REQUESTS: sqlite3_result_double(ctx, p->requests); break;
    case COL_BYTES: sqlite3_result_double(ctx, p->bytes); break;
    case COL_K: sqlite3_result_int64(ctx, c->k); break;
    case COL_QUERIES: sqlite3_result_int64(ctx, (sqlite3_int64)shard_recall_n_queries(c->measure)); break;
    case COL_TARGET:
      if (p->asked.target > 0) sqlite3_result_double(ctx, p->asked.target);
      break;
    default: break;
  }
  return SQLITE_OK;
}

static int x_rowid(sqlite3_vtab_cursor *v, sqlite3_int64 *rowid) {
  *rowid = ((recall_cursor *)v)->rowid;
  return SQLITE_OK;
}

static const sqlite3_module module = {.xConnect = x_connect, .xBestIndex = x_best_index, .xDisconnect = conn_vtab_close,
                                      .xDestroy = conn_vtab_close, .xOpen = x_open, .xClose = x_close, .xFilter = x_filter,
                                      .xNext = x_next, .xEof = x_eof, .xColumn = x_column, .xRowid = x_rowid};

int recall_table_register(conn *c) {
  c->refs++;
  return sqlite3_create_module_v2(c->db, "shard_recall", &module, c, conn_release);
}
