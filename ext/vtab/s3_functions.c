/* s3_functions.c - what a store holds, as SQL:
 *
 *   SELECT s3_head('s3://bucket/notes.txt');          -- {"uri":"s3://…","size":81,"etag":"9b2…","modified":"2026-01-31 23:59:59"}
 *   SELECT s3_get('s3://bucket/notes.txt');           -- a BLOB, up to the connection's limit of lengths
 *   SELECT key, size FROM s3_list('s3://bucket/db/') WHERE size > 1000000;
 *   SELECT key FROM s3_list('s3://bucket/', 0);       -- one level only: what lies deeper is one row with a NULL size, "db/"
 *
 * s3_list has the columns uri, key, size, etag, modified (UTC, as datetime() writes it) and the hidden columns source and
 * recursive (default 1), in ascending order of key. The source is a prefix, as S3 understands it: 's3://b/a' lists ab, too. Rows
 * are fetched by pages of 1,000, when they are asked for. A plain URL can be asked for its head and content, not for a list.
 *
 * NULL in, NULL out; no such object is an error. All are SQLITE_DIRECTONLY: a schema must not make its reader's machine fetch.
 * idxNum: 1: the source, 2: recursive is given; 3: both.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../base/vs_scope.h"
#include "../s3vfs/s3_client.h"
#include "modules.h"
SQLITE_EXTENSION_INIT3

enum { PAGE = 1000 /* what S3 hands out at most */, PLAN_SOURCE = 1, PLAN_RECURSIVE = 2 };
enum { COL_URI, COL_KEY, COL_SIZE, COL_ETAG, COL_MODIFIED, COL_SOURCE, COL_RECURSIVE };

/* ---- in and out ---- */

/* The work of one call on a connection: Ctrl-C ends it. */
typedef struct call { vs_scope scope, *before; conn_stop stop; } call;

static void call_enter(call *x, const conn *c) {
  *x = (call){.scope = {.stop = conn_stop_poll, .timeout_ms = c->timeout_ms}};
  conn_stop_init(&x->stop, c->db);
  x->scope.stop_ctx = &x->stop;
  x->before = vs_scope_enter(&x->scope);
}

static void call_leave(call *x) { vs_scope_enter(x->before); }

/* SQLite's own form of a time, which compares with datetime(). */
static const char *time_text(int64_t seconds, char text[32]) {
  struct tm t;
  time_t s = (time_t)seconds;
  if (seconds < 0 || !gmtime_r(&s, &t) || !strftime(text, 32, "%Y-%m-%d %H:%M:%S", &t)) return NULL;
  return text;
}

/* An ETag without its quotes, which belong to HTTP. */
static const char *etag_text(const char *etag, size_t *n) {
  *n = strlen(etag);
  if (*n < 2 || etag[0] != '"' || etag[*n - 1] != '"') return etag;
  *n -= 2;
  return etag + 1;
}

static void result_failure(sqlite3_context *ctx, const vs_err *err) {
  char *text = NULL;
  int rc = conn_error(err, &text);
  sqlite3_result_error(ctx, text ? text : "", -1);
  if (!text || rc == SQLITE_NOMEM) sqlite3_result_error_nomem(ctx);
  else if (rc != SQLITE_ERROR) sqlite3_result_error_code(ctx, rc);
  sqlite3_free(text);
}

/* ---- s3_head, s3_get ---- */

static void print_head(sqlite3_context *ctx, const s3_place *p, const char *key, const s3_meta *m) {
  char text[32];
  size_t n;
  const char *etag = etag_text(m->etag, &n), *modified = time_text(m->modified, text);
  char *name = s3_place_name(p, key);
  sqlite3_str *s = sqlite3_str_new(NULL);
  sqlite3_str_appendall(s, "{\"uri\":");
  result_json_text(s, name ? name : "", name ? (uint32_t)strlen(name) : 0);
  sqlite3_str_appendf(s, ",\"size\":%llu,\"etag\":", m->size);
  if (n) result_json_text(s, etag, (uint32_t)n);
  else sqlite3_str_appendall(s, "null");
  sqlite3_str_appendf(s, modified ? ",\"modified\":\"%s\"}" : ",\"modified\":null}", modified);
  char *json = sqlite3_str_finish(s);
  if (name && json) sqlite3_result_text(ctx, json, -1, sqlite3_free);
  else sqlite3_result_error_nomem(ctx), sqlite3_free(json);
  free(name);
}

/* A URL that is signed for GET answers nothing else: its first byte tells as much. */
static vs_rc head_of(s3_place *p, const char *key, s3_meta *m, vs_err *err) {
  uint8_t *body = NULL;
  size_t n;
  vs_err ignored = {0}, why = {0};
  vs_rc rc = s3_head(p, key, m, &why);
  if (rc == VS_IO && s3_place_is_plain(p) && !s3_get_start(p, key, 1, &body, &n, m, &ignored)) rc = VS_OK;
  free(body);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

static vs_rc open_object(const char *uri, s3_place **place, char **key, vs_err *err) {
  vs_rc rc = s3_place_open(uri, place, key, err);
  if (rc || **key) return rc;
  rc = vs_fail(err, VS_INVALID, "%s names no object: s3://bucket/key", uri);
  s3_place_close(*place);
  free(*key);
  return rc;
}

static void head(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  const char *uri = (const char *)sqlite3_value_text(argv[0]);
  s3_place *place;
  char *key;
  s3_meta meta;
  vs_err err = {0};
  call x;
  (void)argc;
  if (!uri) return;
  call_enter(&x, sqlite3_user_data(ctx));
  vs_rc rc = open_object(uri, &place, &key, &err);
  if (!rc) {
    rc = head_of(place, key, &meta, &err);
    if (!rc) print_head(ctx, place, key, &meta);
    s3_place_close(place);
    free(key);
  }
  call_leave(&x);
  if (rc) result_failure(ctx, &err);
}

static void get(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  const char *uri = (const char *)sqlite3_value_text(argv[0]);
  const conn *c = sqlite3_user_data(ctx);
  int max = sqlite3_limit(c->db, SQLITE_LIMIT_LENGTH, -1);
  s3_place *place;
  char *key;
  uint8_t *body = NULL;
  size_t n = 0;
  vs_err err = {0}, why = {0};
  call x;
  (void)argc;
  if (!uri) return;
  call_enter(&x, c);
  vs_rc rc = open_object(uri, &place, &key, &err);
  if (!rc) {
    rc = s3_get(place, key, 0, UINT64_MAX, NULL, (uint64_t)max, &body, &n, NULL, &why);
    if (rc == VS_INVALID) vs_fail(&err, rc, "%s: a value of this connection holds at most %d bytes", why.text, max);
    else if (rc) err = why;
    s3_place_close(place);
    free(key);
  }
  call_leave(&x);
  if (rc) result_failure(ctx, &err);
  else sqlite3_result_blob64(ctx, body, n, free);
}

/* ---- s3_list ---- */

typedef struct entry { char *key, *etag; int is_prefix; uint64_t size; int64_t modified; } entry;

typedef struct list_cursor {
  sqlite3_vtab_cursor base;
  s3_place *place;
  char *prefix, *last; /* last: the greatest key handed out before this page */
  int recursive, is_last_page;
  entry *page;
  size_t n, at, received;
  sqlite3_int64 rowid;
} list_cursor;

static void page_reset(list_cursor *c) {
  for (size_t i = 0; i < c->n; i++) free(c->page[i].key), free(c->page[i].etag);
  free(c->page);
  c->page = NULL, c->n = c->at = c->received = 0;
}

static void cursor_reset(list_cursor *c) {
  page_reset(c);
  s3_place_close(c->place);
  free(c->prefix), free(c->last);
  c->place = NULL, c->prefix = c->last = NULL, c->is_last_page = 1;
}

/* What was handed out comes once more: a common prefix sorts before the keys that it stands for. */
static vs_rc add_entry(void *ctx, const s3_entry *e, vs_err *err) {
  list_cursor *c = ctx;
  c->received++;
  if (c->last && strcmp(e->key, c->last) <= 0) return VS_OK;
  if (!c->page && !(c->page = calloc(PAGE, sizeof *c->page))) return vs_nomem(err);
  if (c->n == PAGE) return VS_OK;
  entry *to = &c->page[c->n++];
  size_t n;
  const char *etag = etag_text(e->etag, &n);
  *to = (entry){.key = strdup(e->key), .etag = strndup(etag, n), .is_prefix = e->is_prefix, .size = e->size,
                .modified = e->modified};
  return to->key && to->etag ? VS_OK : vs_nomem(err);
}

static int by_key(const void *a, const void *b) { return strcmp(((const entry *)a)->key, ((const entry *)b)->key); }

/* Keys and common prefixes arrive apart from one another; a page in order is a part of the list in order. */
static vs_rc next_page(list_cursor *c, vs_err *err) {
  char *last = c->n ? strdup(c->page[c->n - 1].key) : NULL;
  if (c->n && !last) return vs_nomem(err);
  page_reset(c);
  if (last) free(c->last), c->last = last;
  vs_rc rc = s3_list(c->place, c->prefix, c->recursive ? NULL : "/", c->last, PAGE, add_entry, c, err);
  if (rc) return rc;
  if (c->n) qsort(c->page, c->n, sizeof *c->page, by_key);
  c->is_last_page = c->received < PAGE;
  if (!c->n && !c->is_last_page) return vs_fail(err, VS_IO, "s3_list: the store's list does not go on behind %s", c->last);
  return VS_OK;
}

static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **message) {
  (void)db, (void)argc, (void)argv, (void)message;
  return conn_vtab_open(aux, "CREATE TABLE x(uri TEXT, key TEXT, size INTEGER, etag TEXT, modified TEXT, source HIDDEN, "
                             "recursive INTEGER HIDDEN)", sizeof(conn_vtab), out);
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info) {
  int at[2] = {-1, -1};
  (void)v;
  for (int i = 0; i < info->nConstraint; i++) {
    const struct sqlite3_index_constraint *c = &info->aConstraint[i];
    if (c->iColumn < COL_SOURCE || c->op != SQLITE_INDEX_CONSTRAINT_EQ) continue;
    if (!c->usable) return SQLITE_CONSTRAINT;
    at[c->iColumn - COL_SOURCE] = i;
  }
  if (at[0] < 0) return SQLITE_CONSTRAINT;
  for (int i = 0, n = 0; i < 2; i++)
    if (at[i] >= 0) info->aConstraintUsage[at[i]].argvIndex = ++n, info->aConstraintUsage[at[i]].omit = 1;
  info->idxNum = PLAN_SOURCE | (at[1] >= 0 ? PLAN_RECURSIVE : 0);
  info->orderByConsumed = info->nOrderBy == 1 && info->aOrderBy[0].iColumn == COL_KEY && !info->aOrderBy[0].desc;
  info->estimatedCost = 1e6, info->estimatedRows = 10000;
  return SQLITE_OK;
}

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out) {
  list_cursor *c = sqlite3_malloc64(sizeof *c);
  (void)v;
  if (!c) return SQLITE_NOMEM;
  memset(c, 0, sizeof *c);
  *out = &c->base;
  return SQLITE_OK;
}

static int x_close(sqlite3_vtab_cursor *v) {
  cursor_reset((list_cursor *)v);
  sqlite3_free(v);
  return SQLITE_OK;
}

/* Steps onto row `at`, over the end of a page. */
static int settle(list_cursor *c) {
  vs_err err = {0};
  call x;
  if (c->at < c->n || c->is_last_page) return SQLITE_OK;
  call_enter(&x, ((conn_vtab *)c->base.pVtab)->c);
  vs_rc rc = next_page(c, &err);
  call_leave(&x);
  return rc ? conn_error(&err, &c->base.pVtab->zErrMsg) : SQLITE_OK;
}

static vs_rc refuse_plain(const list_cursor *c, vs_err *err) {
  char *name = s3_place_name(c->place, c->prefix);
  vs_rc rc = vs_fail(err, VS_INVALID, "s3_list: %s is no bucket: only s3://bucket/prefix can be listed", name ? name : "this");
  free(name);
  return rc;
}

static int x_filter(sqlite3_vtab_cursor *v, int idx_num, const char *idx_str, int argc, sqlite3_value **argv) {
  list_cursor *c = (list_cursor *)v;
  const char *source = (const char *)sqlite3_value_text(argv[0]);
  vs_err err = {0};
  (void)idx_str, (void)argc;
  cursor_reset(c);
  c->rowid = 0, c->recursive = 1;
  if (!source) return SQLITE_OK;
  if (idx_num & PLAN_RECURSIVE && sqlite3_value_type(argv[1]) != SQLITE_NULL) c->recursive = sqlite3_value_int(argv[1]) != 0;
  vs_rc rc = s3_place_open(source, &c->place, &c->prefix, &err);
  if (!rc && s3_place_is_plain(c->place)) rc = refuse_plain(c, &err);
  if (rc) return conn_error(&err, &v->pVtab->zErrMsg);
  c->is_last_page = 0;
  return settle(c);
}

static int x_next(sqlite3_vtab_cursor *v) {
  list_cursor *c = (list_cursor *)v;
  c->at++, c->rowid++;
  return settle(c);
}
static int x_eof(sqlite3_vtab_cursor *v) { return ((list_cursor *)v)->at >= ((list_cursor *)v)->n; }

static int x_column(sqlite3_vtab_cursor *v, sqlite3_context *ctx, int column) {
  const list_cursor *c = (const list_cursor *)v;
  const entry *e = &c->page[c->at];
  char text[32];
  if (column == COL_URI) {
    char *name = s3_place_name(c->place, e->key);
    if (name) sqlite3_result_text(ctx, name, -1, free);
    else sqlite3_result_error_nomem(ctx);
  } else if (column == COL_KEY) sqlite3_result_text(ctx, e->key, -1, SQLITE_TRANSIENT);
  else if (e->is_prefix) return SQLITE_OK;
  else if (column == COL_SIZE) sqlite3_result_int64(ctx, (sqlite3_int64)e->size);
  else if (column == COL_ETAG) sqlite3_result_text(ctx, e->etag, -1, SQLITE_TRANSIENT);
  else if (column == COL_MODIFIED) sqlite3_result_text(ctx, time_text(e->modified, text), -1, SQLITE_TRANSIENT);
  return SQLITE_OK; /* the hidden ones read as NULL */
}

static int x_rowid(sqlite3_vtab_cursor *v, sqlite3_int64 *rowid) {
  *rowid = ((list_cursor *)v)->rowid;
  return SQLITE_OK;
}

static const sqlite3_module module = {.xConnect = x_connect, .xBestIndex = x_best_index, .xDisconnect = conn_vtab_close,
                                      .xDestroy = conn_vtab_close, .xOpen = x_open, .xClose = x_close, .xFilter = x_filter,
                                      .xNext = x_next, .xEof = x_eof, .xColumn = x_column, .xRowid = x_rowid};

int s3_functions_register(conn *c) {
  int flags = SQLITE_UTF8 | SQLITE_DIRECTONLY;
  c->refs++; /* one for each registration: SQLite calls the destructor once for each, also when it fails */
  int rc = sqlite3_create_function_v2(c->db, "s3_head", 1, flags, c, head, NULL, NULL, conn_release);
  if (rc) return rc;
  c->refs++;
  rc = sqlite3_create_function_v2(c->db, "s3_get", 1, flags, c, get, NULL, NULL, conn_release);
  if (rc) return rc;
  c->refs++;
  return sqlite3_create_module_v2(c->db, "s3_list", &module, c, conn_release);
}
