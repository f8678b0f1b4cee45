/* info_tables.c - table-valued functions that describe a source (the path of a shard or database, a JSON list, table names):
 *
 *   SELECT * FROM shard_list('./db');        -- shard, path, rows, version, dim, metric, id_type, segments
 *   SELECT * FROM shard_info('./db');        -- per segment: shard, segment, rows, deleted, unindexed, nlist, M, bits, bytes, version,
 *                                           -- calibrated (rows that served to), beta, reach (at the default nprobe)
 *   SELECT * FROM shard_partitions('./db');  -- per partition: shard, segment, partition, rows, row0, code_bytes, column_bytes
 *   SELECT * FROM shard_verify('./db');      -- shard (its path), segment, fault: no row when sound
 *   SELECT * FROM shard_trace;               -- what the connection's last search did, phase by phase, and in all
 *
 * All results are computed when the query starts and then handed out. They read any path that SQL names: SQLITE_DIRECTONLY.
 */
#include <stdlib.h>
#include <string.h>

#include "../ivfpq/ivfpq_setting.h"
#include "../shard/shard_verify.h"
#include "modules.h"
#include "statement.h"
SQLITE_EXTENSION_INIT3

typedef struct cell { char *text; sqlite3_int64 i; double r; int is_real; } cell; /* text NULL: a number */

typedef struct rows { cell *cells; size_t n, room; int width; } rows;

typedef struct info_kind {
  const char *name, *columns;
  int width;
  vs_rc (*fill)(conn *, const char *source, rows *, vs_err *);
} info_kind;

typedef struct info_table { conn_vtab base; const info_kind *kind; } info_table;
typedef struct info_cursor { sqlite3_vtab_cursor base; rows rows; size_t at; } info_cursor;

static void rows_reset(rows *r) {
  for (size_t i = 0; i < r->n * (size_t)r->width; i++) free(r->cells[i].text);
  free(r->cells);
  *r = (rows){.width = r->width};
}

/* format: one letter per cell, t text, i sqlite3_int64, r double. */
static vs_rc add_row(rows *r, vs_err *err, const char *format, ...) {
  va_list ap;
  vs_rc rc = VS_OK;
  if (r->n == r->room) {
    size_t room = r->room ? 2 * r->room : 64;
    cell *grown = realloc(r->cells, room * (size_t)r->width * sizeof *grown);
    if (!grown) return vs_nomem(err);
    r->cells = grown, r->room = room;
  }
  cell *out = r->cells + r->n * (size_t)r->width;
  memset(out, 0, (size_t)r->width * sizeof *out);
  va_start(ap, format);
  for (int i = 0; format[i]; i++) {
    if (format[i] == 'i') out[i].i = va_arg(ap, sqlite3_int64);
    else if (format[i] == 'r') out[i].r = va_arg(ap, double), out[i].is_real = 1;
    else if (!(out[i].text = strdup(va_arg(ap, const char *)))) rc = vs_nomem(err);
  }
  va_end(ap);
  r->n++;
  return rc;
}

/* ---- what each function lists ---- */

static vs_rc fill_list(conn *c, const char *source, rows *out, vs_err *err) {
  static const char *const metrics[] = {"l2", "cosine", "dot"};
  shard_set set;
  vs_rc rc = conn_each_open(c, source, &set, err);
  if (rc) return rc;
  for (size_t i = 0; i < set.n && !rc; i++) {
    const shard_manifest *m = &set.shards[i]->manifest;
    rc = add_row(out, err, "ttiiitti", set.names[i], set.shards[i]->path, (sqlite3_int64)m->n_rows, (sqlite3_int64)m->version,
                 (sqlite3_int64)m->dim, metrics[m->metric], m->id_text ? "TEXT" : "INTEGER", (sqlite3_int64)m->n_segments);
  }
  shard_set_reset(&set);
  return rc;
}

static vs_rc fill_info(conn *c, const char *source, rows *out, vs_err *err) {
  shard_set set;
  vs_rc rc = conn_each_open(c, source, &set, err);
  if (rc) return rc;
  for (size_t i = 0; i < set.n && !rc; i++)
    for (size_t g = 0; g < set.shards[i]->manifest.n_segments && !rc; g++) {
      const shard_manifest *m = &set.shards[i]->manifest;
      const ivfpq_params *p = &set.shards[i]->segments[g]->params;
      /* nothing is deleted or waiting in a shard that was built as a whole */
      const ivfpq_segment *s = set.shards[i]->segments[g];
      rc = add_row(out, err, "ttiiiiiiiiirr", set.names[i], m->segments[g].file, (sqlite3_int64)p->n_rows, (sqlite3_int64)0, (sqlite3_int64)0,
                   (sqlite3_int64)p->nlist, (sqlite3_int64)ivfpq_subs(p->m, p->bits), (sqlite3_int64)p->bits,
                   (sqlite3_int64)m->segments[g].n_bytes, (sqlite3_int64)m->version,
                   (sqlite3_int64)(s->calibration ? s->calibration->n_queries : 0), (double)p->beta,
                   (double)ivfpq_reach_for(s, ivfpq_default_nprobe(p->nlist)));
    }
  shard_set_reset(&set);
  return rc;
}

static vs_rc list_group(rows *out, const char *shard_name, const char *file, ivfpq_segment *s, uint32_t g, vs_err *err) {
  ivfpq_group_view v;
  vs_rc rc = ivfpq_groups_fetch(s, &g, 1, &v, err);
  if (rc) return rc;
  for (uint32_t i = 0; i < v.n && !rc; i++)
    rc = add_row(out, err, "ttiiiii", shard_name, file, (sqlite3_int64)(v.first + i), (sqlite3_int64)v.entries[i].n_rows,
                 (sqlite3_int64)v.entries[i].row0, (sqlite3_int64)ivfpq_code_bytes(v.entries[i].n_rows, s->params.m),
                 (sqlite3_int64)v.entries[i].column_bytes);
  ivfpq_groups_release(s, &v, 1);
  return rc;
}

static vs_rc fill_partitions(conn *c, const char *source, rows *out, vs_err *err) {
  shard_set set;
  vs_rc rc = conn_each_open(c, source, &set, err);
  if (rc) return rc;
  for (size_t i = 0; i < set.n && !rc; i++)
    for (size_t n = 0; n < set.shards[i]->manifest.n_segments && !rc; n++) {
      ivfpq_segment *s = set.shards[i]->segments[n];
      for (uint32_t g = 0; g < s->params.n_groups && !rc; g++)
        rc = list_group(out, set.names[i], set.shards[i]->manifest.segments[n].file, s, g, err);
    }
  shard_set_reset(&set);
  return rc;
}

/* ---- the last search ---- */

/* What Amazon asks for 1,000 GET requests in us-east-1 (S3 Standard, 2024); reading within the region costs nothing more. */
#define DOLLARS_PER_1000_GETS 0.0004

static vs_rc add_phase(rows *out, const char *phase, const conn_trace *t, vs_err *err) {
  return add_row(out, err, "tiiiiiiirr", phase, (sqlite3_int64)t->partitions, (sqlite3_int64)t->rows, (sqlite3_int64)t->requests,
                 (sqlite3_int64)t->retries, (sqlite3_int64)t->rounds, (sqlite3_int64)t->bytes, (sqlite3_int64)t->hits,
                 (double)t->us / 1000, (double)t->requests * DOLLARS_PER_1000_GETS / 1000);
}

static vs_rc fill_trace(conn *c, const char *source, rows *out, vs_err *err) {
  static const char *const names[N_PHASES] = {"open", "scan", "refine", "rows"};
  conn_trace sum = {0};
  vs_rc rc = VS_OK;
  (void)source;
  for (int i = 0; i < N_PHASES && !rc; i++) {
    const conn_trace *t = &c->trace.phases[i];
    rc = add_phase(out, names[i], t, err);
    sum.partitions += t->partitions, sum.requests += t->requests, sum.retries += t->retries, sum.rounds += t->rounds;
    sum.rows += t->rows, sum.bytes += t->bytes, sum.hits += t->hits, sum.us += t->us;
  }
  return rc ? rc : add_phase(out, "total", &sum, err);
}

typedef struct verify_ctx { rows *out; vs_err *err; vs_rc rc; } verify_ctx;

static int add_fault(void *ctx, const char *path, const char *segment, const char *text) {
  verify_ctx *v = ctx;
  v->rc = add_row(v->out, v->err, "ttt", path, segment, text);
  return v->rc != VS_OK;
}
static int verify_stop(void *ctx) {
  (void)ctx;
  return vs_scope_stopped();
}

static vs_rc fill_verify(conn *c, const char *source, rows *out, vs_err *err) {
  verify_ctx v = {.out = out, .err = err};
  shard_verifier verifier = {.ctx = &v, .fault = add_fault, .stop = verify_stop};
  shard_set set = {0};
  char **paths = NULL;
  size_t n = 0;
  int named = !shard_source_is_path(source); /* paths are not opened here: a shard that does not open is a fault, not an error */
  vs_rc rc = named ? conn_each_open(c, source, &set, err) : shard_source_split(source, &paths, &n, err);
  for (size_t i = 0; i < (named ? set.n : n) && !rc; i++) rc = shard_verify(named ? set.shards[i]->path : paths[i], &verifier, err);
  shard_names_free(paths, n);
  shard_set_reset(&set);
  return rc ? rc : v.rc;
}

static const info_kind kinds[] = {
    {"shard_list", "shard TEXT, path TEXT, rows INTEGER, version INTEGER, dim INTEGER, metric TEXT, id_type TEXT, segments INTEGER", 8,
     fill_list},
    {"shard_info",
     "shard TEXT, segment TEXT, rows INTEGER, deleted INTEGER, unindexed INTEGER, nlist INTEGER, M INTEGER, bits INTEGER, "
     "bytes INTEGER, version INTEGER, calibrated INTEGER, beta REAL, reach REAL", 13, fill_info},
    {"shard_partitions",
     "shard TEXT, segment TEXT, partition INTEGER, rows INTEGER, row0 INTEGER, code_bytes INTEGER, column_bytes INTEGER", 7,
     fill_partitions},
    {"shard_verify", "shard TEXT, segment TEXT, fault TEXT", 3, fill_verify},
    {"shard_trace",
     "phase TEXT, partitions INTEGER, rows INTEGER, requests INTEGER, retries INTEGER, rounds INTEGER, bytes INTEGER, "
     "cache_hits INTEGER, ms REAL, dollars REAL", 10, fill_trace},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

/* ---- the module ---- */

static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  const info_kind *kind = NULL;
  (void)db, (void)argc, (void)message;
  for (size_t i = 0; i < N_KINDS; i++)
    if (!sqlite3_stricmp(argv[0], kinds[i].name)) kind = &kinds[i];
  if (!kind) return SQLITE_ERROR;
  char *sql = sqlite3_mprintf("CREATE TABLE x(%s, source HIDDEN)", kind->columns);
  int rc = sql ? conn_vtab_open(aux, sql, sizeof(info_table), out) : SQLITE_NOMEM;
  sqlite3_free(sql);
  if (!rc) ((info_table *)*out)->kind = kind;
  return rc;
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info) {
  int source_column = ((info_table *)v)->kind->width;
  for (int i = 0; i < info->nConstraint; i++) {
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    if (c->iColumn != source_column || c->op != SQLITE_INDEX_CONSTRAINT_EQ) continue;
    if (!c->usable) return SQLITE_CONSTRAINT;
    info->aConstraintUsage[i].argvIndex = 1;
    info->aConstraintUsage[i].omit = 1;
    info->estimatedCost = 100;
    return SQLITE_OK;
  }
  if (((info_table *)v)->kind->fill == fill_trace) return SQLITE_OK;
  return SQLITE_CONSTRAINT;
}

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out) {
  info_cursor *c = sqlite3_malloc64(sizeof *c);
  (void)v;
  if (!c) return SQLITE_NOMEM;
  memset(c, 0, sizeof *c);
  *out = &c->base;
  return SQLITE_OK;
}

static int x_close(sqlite3_vtab_cursor *v) {
  rows_reset(&((info_cursor *)v)->rows);
  sqlite3_free(v);
  return SQLITE_OK;
}

static int x_filter(sqlite3_vtab_cursor *v, int idx_num, const char *idx_str, int argc, sqlite3_value **argv) {
  info_cursor *c = (info_cursor *)v;
  info_table *t = (info_table *)v->pVtab;
  vs_err err = {0};
  (void)idx_num, (void)idx_str;
  rows_reset(&c->rows);
  c->rows.width = t->kind->width, c->at = 0;
  const char *source = argc ? (const char *)sqlite3_value_text(argv[0]) : "";
  conn_trace last[N_PHASES]; /* of the search before: this is none */
  statement s;
  memcpy(last, t->base.c->trace.phases, sizeof last);
  statement_open(&s, t->base.c);
  statement_enter(&s, PHASE_OPEN);
  vs_rc rc = source ? t->kind->fill(t->base.c, source, &c->rows, &err) : VS_OK;
  statement_leave(&s);
  statement_close(&s);
  memcpy(t->base.c->trace.phases, last, sizeof last);
  return rc ? conn_error(&err, &v->pVtab->zErrMsg) : SQLITE_OK;
}

static int x_next(sqlite3_vtab_cursor *v) {
  ((info_cursor *)v)->at++;
  return SQLITE_OK;
}
static int x_eof(sqlite3_vtab_cursor *v) { return ((info_cursor *)v)->at >= ((info_cursor *)v)->rows.n; }

static int x_column(sqlite3_vtab_cursor *v, sqlite3_context *ctx, int column) {
  info_cursor *c = (info_cursor *)v;
  if (column >= c->rows.width) return SQLITE_OK; /* source */
  const cell *x = &c->rows.cells[c->at * (size_t)c->rows.width + (size_t)column];
  if (x->text) sqlite3_result_text(ctx, x->text, -1, SQLITE_TRANSIENT);
  else if (x->is_real) sqlite3_result_double(ctx, x->r);
  else sqlite3_result_int64(ctx, x->i);
  return SQLITE_OK;
}

static int x_rowid(sqlite3_vtab_cursor *v, sqlite3_int64 *rowid) {
  *rowid = (sqlite3_int64)((info_cursor *)v)->at;
  return SQLITE_OK;
}

static const sqlite3_module module = {.xConnect = x_connect, .xBestIndex = x_best_index, .xDisconnect = conn_vtab_close,
                                      .xDestroy = conn_vtab_close, .xOpen = x_open, .xClose = x_close, .xFilter = x_filter,
                                      .xNext = x_next, .xEof = x_eof, .xColumn = x_column, .xRowid = x_rowid};

int info_tables_register(conn *c) {
  int rc = SQLITE_OK;
  for (size_t i = 0; i < N_KINDS && !rc; i++) {
    c->refs++;
    rc = sqlite3_create_module_v2(c->db, kinds[i].name, &module, c, conn_release);
  }
  return rc;
}
