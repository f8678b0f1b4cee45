/* conn.c - see conn.h.
 *
 *   SELECT vecshard_config('threads', 4);        -- threads a query may use; 0: all that the machine gives this process
 *   SELECT vecshard_config('threads');           -- the value in force
 *   SELECT vecshard_config('allow', '/data/');   -- path prefix that a stored table may name although trusted_schema is off
 *   SELECT vecshard_config('cache_mb', 256);     -- RAM that what was read from stores may take, in the whole process
 *   SELECT vecshard_config('timeout_ms', 10000); -- for one network operation with its retries; 0: VECSHARD_TIMEOUT_MS, else 60,000
 *   SELECT vecshard_config('max_bytes', 1000000000);    -- that a statement may read from stores; 0: no limit
 */
#include "../s3vfs/io_s3.h"
#include "../s3vfs/s3_engine.h"
#include "conn.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../base/vs_pool.h"
#include "../s3vfs/db_interrupt.h"
#include "../shard/shard_files.h"
SQLITE_EXTENSION_INIT3

enum { POLL_MS = 5 };

conn *conn_new(sqlite3 *db) {
  conn *c = calloc(1, sizeof *c);
  if (c) c->db = db, c->refs = 1;
  return c;
}

static void source_reset(conn_source *s) {
  free(s->name), s->name = NULL;
  shard_set_reset(&s->set);
}

void conn_release(void *p) {
  conn *c = p;
  if (--c->refs) return;
  for (int i = 0; i < CONN_SOURCES; i++) source_reset(&c->sources[i]);
  for (size_t i = 0; i < c->n_allowed; i++) free(c->allowed[i]);
  free(c->allowed), free(c);
}

int conn_vtab_open(conn *c, const char *declaration, size_t size, sqlite3_vtab **out) {
  int rc = sqlite3_declare_vtab(c->db, declaration);
  if (rc) return rc;
  sqlite3_vtab_config(c->db, SQLITE_VTAB_DIRECTONLY);
  conn_vtab *t = sqlite3_malloc64(size);
  if (!t) return SQLITE_NOMEM;
  memset(t, 0, size);
  t->c = c, c->refs++;
  *out = &t->base;
  return SQLITE_OK;
}

int conn_vtab_close(sqlite3_vtab *v) {
  conn_release(((conn_vtab *)v)->c);
  sqlite3_free(v);
  return SQLITE_OK;
}

/* ---- tables ---- */

void conn_table_add(conn *c, conn_table *t) { t->next = c->tables, c->tables = t; }

void conn_table_remove(conn *c, conn_table *t) {
  for (conn_table **at = &c->tables; *at; at = &(*at)->next)
    if (*at == t) {
      *at = t->next;
      return;
    }
}

static conn_table *find_connected(conn *c, const char *schema, const char *name) {
  conn_table *t = c->tables;
  while (t && (sqlite3_stricmp(t->schema, schema) || sqlite3_stricmp(t->name, name))) t = t->next;
  return t;
}

/* Does schema.name exist? SQLite connects a table when a statement first names it; preparing one is enough. Asked also for
 * tables in the list: cached statements keep a dropped table connected. */
static int table_exists(conn *c, const char *schema, const char *name) {
  sqlite3_stmt *stmt = NULL;
  char *sql = sqlite3_mprintf("SELECT 1 FROM \"%w\".\"%w\"", schema, name);
  int found = sql && sqlite3_prepare_v2(c->db, sql, -1, &stmt, NULL) == SQLITE_OK;
  sqlite3_finalize(stmt);
  sqlite3_free(sql);
  return found;
}

conn_table *conn_table_find(conn *c, const char *name) {
  static const int order[] = {1, 0}; /* temp, main, then the attached ones */
  const char *schema;
  for (int i = 0; (schema = sqlite3_db_name(c->db, i < 2 ? order[i] : i)); i++)
    if (table_exists(c, schema, name)) return find_connected(c, schema, name);
  const char *dot = strchr(name, '.');
  char *qualifier = dot ? strndup(name, (size_t)(dot - name)) : NULL;
  conn_table *t = qualifier && table_exists(c, qualifier, dot + 1) ? find_connected(c, qualifier, dot + 1) : NULL;
  free(qualifier);
  return t;
}

/* ---- paths that a schema names ---- */

vs_rc conn_path_resolve(const conn *c, const char *schema, const char *path, char **full, vs_err *err) {
  const char *file = sqlite3_db_filename(c->db, schema), *slash = file ? strrchr(file, '/') : NULL;
  int is_relative = path[0] != '/' && !strstr(path, "://");
  if (asprintf(full, "%.*s%s", is_relative && slash ? (int)(slash + 1 - file) : 0, slash ? file : "", path) >= 0) return VS_OK;
  *full = NULL;
  return vs_nomem(err);
}

/* Is path the folder `prefix` or inside it? */
static int is_inside(const char *path, const char *prefix) {
  size_t n = strlen(prefix);
  return !strncmp(path, prefix, n) && (!path[n] || path[n] == '/' || (n && prefix[n - 1] == '/'));
}

vs_rc conn_path_check_trust(const conn *c, const char *table, const char *path, const char *full, vs_err *err) {
  int trusted = 1, allowed = 0;
  sqlite3_db_config(c->db, SQLITE_DBCONFIG_TRUSTED_SCHEMA, -1, &trusted);
  if (trusted || (path[0] != '/' && !strstr(path, "..") && !strstr(path, "://"))) return VS_OK;
  char *real = realpath(full, NULL);
  const char *shown = real ? real : full;
  for (size_t i = 0; i < c->n_allowed && !allowed; i++)
    allowed = is_inside(shown, c->allowed[i]) || (is_inside(path, c->allowed[i]) && !strstr(path, ".."));
  vs_rc rc = allowed ? VS_OK
                     : vs_fail(err, VS_INVALID, "%s: the schema names the path %s and trusted_schema is off: allow it with SELECT "
                               "vecshard_config('allow', '%s')", table, path, shown);
  free(real);
  return rc;
}

/* ---- sources ---- */

static vs_rc copy_set(const shard_set *from, shard_set *out, vs_err *err) {
  memset(out, 0, sizeof *out);
  out->shards = calloc(from->n + 1, sizeof *out->shards);
  out->names = calloc(from->n + 1, sizeof *out->names);
  if (!out->shards || !out->names) {
    shard_set_reset(out);
    return vs_nomem(err);
  }
  for (size_t i = 0; i < from->n; i++) {
    if (!(out->names[i] = strdup(from->names[i]))) {
      shard_set_reset(out);
      return vs_nomem(err);
    }
    out->shards[i] = shard_share(from->shards[i]);
    out->n++;
  }
  return VS_OK;
}

static vs_rc open_kept(conn *c, const char *source, shard_set *out, vs_err *err) {
  conn_source *slot = &c->sources[0];
  memset(out, 0, sizeof *out);
  for (int i = 0; i < CONN_SOURCES; i++) {
    conn_source *s = &c->sources[i];
    if (s->name && !strcmp(s->name, source)) {
      slot = s;
      break;
    }
    if (s->used < slot->used) slot = s;
  }
  slot->used = ++c->clock;
  if (slot->name && !strcmp(slot->name, source) && shard_set_is_fresh(&slot->set)) return copy_set(&slot->set, out, err);
  shard_set opened; /* opened before the old one is closed, so that unchanged shards stay open */
  vs_rc rc = shard_set_open(source, &opened, err);
  source_reset(slot);
  if (rc) return rc;
  slot->set = opened;
  if (!(slot->name = strdup(source))) {
    source_reset(slot);
    return vs_nomem(err);
  }
  return copy_set(&slot->set, out, err);
}

/* A path is opened, kept and shown without slashes at its end. */
static vs_rc open_path(conn *c, const char *source, shard_set *out, vs_err *err) {
  size_t n = strlen(source);
  while (n > 1 && source[n - 1] == '/' && !strstr(source, "://")) n--;
  char *path = strndup(source, n);
  memset(out, 0, sizeof *out);
  vs_rc rc = path ? open_kept(c, path, out, err) : vs_nomem(err);
  free(path);
  return rc;
}

/* The n bytes of a name in a list of names, without the blanks around them; NULL when memory is short. */
static char *trimmed(const char *name, size_t n) {
  while (n && *name == ' ') name++, n--;
  while (n && name[n - 1] == ' ') n--;
  return strndup(name, n);
}

/* Takes the name over. */
static vs_rc add_table(conn *c, shard_set *out, char *name, vs_err *err) {
  shard **shards = realloc(out->shards, (out->n + 1) * sizeof *shards);
  if (shards) out->shards = shards;
  char **list = realloc(out->names, (out->n + 1) * sizeof *list);
  if (list) out->names = list;
  conn_table *t = shards && list ? conn_table_find(c, name) : NULL;
  vs_rc rc = t ? t->open(t, &out->shards[out->n], err) : VS_OK;
  if (!shards || !list) rc = vs_nomem(err);
  else if (!t) rc = vs_fail(err, VS_NOTFOUND, "%s is not a vecshard table of this connection (a path contains a '/', as ./%s)", name, name);
  if (!rc) out->names[out->n++] = name;
  else free(name);
  return rc;
}

static vs_rc open_tables(conn *c, const char *names, shard_set *out, vs_err *err) {
  vs_rc rc = VS_OK;
  memset(out, 0, sizeof *out);
  if (!names[strspn(names, " ")])
    return vs_fail(err, VS_INVALID, "the source is empty: give a folder, a JSON list of paths, or table names");
  for (const char *at = names, *end; at && !rc; at = *end ? end + 1 : NULL) {
    end = at + strcspn(at, ",");
    char *name = trimmed(at, (size_t)(end - at));
    if (name && *name) rc = add_table(c, out, name, err);
    else {
      rc = name ? vs_fail(err, VS_INVALID, "source '%.200s': a table's name is missing at a comma", names) : vs_nomem(err);
      free(name);
    }
  }
  if (rc) shard_set_reset(out);
  return rc;
}

vs_rc conn_any_open(conn *c, const char *source, shard_set *out, vs_err *err) {
  if (shard_source_is_path(source)) return open_path(c, source, out, err);
  vs_rc rc = open_tables(c, source, out, err);
  if (!rc) rc = shard_set_check(out->shards, out->n, err);
  if (rc) shard_set_reset(out);
  return rc;
}

/* Opens one shard as a set of its own, which gives it its name, and moves it to the others. */
static vs_rc add_alone(shard_set *all, const char *path, vs_err *err) {
  shard_set one;
  vs_rc rc = shard_set_open(path, &one, err);
  if (rc) return rc;
  shard **shards = realloc(all->shards, (all->n + 1) * sizeof *shards);
  if (shards) all->shards = shards;
  char **names = realloc(all->names, (all->n + 1) * sizeof *names);
  if (names) all->names = names;
  if (!shards || !names) rc = vs_nomem(err);
  else {
    shards[all->n] = shard_share(one.shards[0]), names[all->n++] = one.names[0];
    one.names[0] = NULL;
  }
  shard_set_reset(&one);
  return rc;
}

/* Where two shards have one name, all of that name get their paths. */
static vs_rc tell_apart(shard_set *set, vs_err *err) {
  for (size_t i = 0; i < set->n; i++) {
    char *name = set->names[i];
    int twice = 0;
    for (size_t j = i + 1; j < set->n; j++) {
      if (strcmp(name, set->names[j])) continue;
      char *path = strdup(set->shards[j]->path);
      if (!path) return vs_nomem(err);
      free(set->names[j]), set->names[j] = path;
      twice = 1;
    }
    if (!twice) continue;
    if (!(set->names[i] = strdup(set->shards[i]->path))) {
      set->names[i] = name;
      return vs_nomem(err);
    }
    free(name);
  }
  return VS_OK;
}

static vs_rc open_each_path(const char *source, shard_set *out, vs_err *err) {
  char **paths = NULL;
  size_t n = 0;
  memset(out, 0, sizeof *out);
  vs_rc rc = shard_source_split(source, &paths, &n, err);
  for (size_t i = 0; i < n && !rc; i++) {
    char **below = NULL;
    size_t n_below = 0;
    rc = shard_paths(paths[i], &below, &n_below, err);
    for (size_t j = 0; j < n_below && !rc; j++) rc = add_alone(out, below[j], err);
    shard_names_free(below, n_below);
  }
  shard_names_free(paths, n);
  if (!rc) rc = tell_apart(out, err);
  if (rc) shard_set_reset(out);
  return rc;
}

/* All at once first: what lies in stores is then opened in the same rounds, and stays open. */
vs_rc conn_each_open(conn *c, const char *source, shard_set *out, vs_err *err) {
  vs_err why = {0};
  if (!shard_source_is_path(source)) return open_tables(c, source, out, err);
  vs_rc rc = open_path(c, source, out, &why);
  if (rc == VS_INVALID) return open_each_path(source, out, err);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

/* ---- stopping ---- */

static int64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t); /* a few ms off, and several times cheaper */
  return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void conn_stop_init(conn_stop *s, sqlite3 *db) { *s = (conn_stop){.db = db, .last_ms = now_ms()}; }

int conn_stop_poll(void *p) {
  conn_stop *s = p;
  if (s->hit) return 1;
  int64_t now = now_ms();
  if (now - s->last_ms < POLL_MS) return 0;
  s->last_ms = now;
  s->hit = db_is_interrupted(s->db);
  return s->hit;
}

/* ---- errors ---- */

int conn_error(const vs_err *err, char **message) {
  sqlite3_free(*message);
  *message = err->text[0] ? sqlite3_mprintf("%s", err->text) : NULL;
  switch (err->rc) {
    case VS_OK: return SQLITE_OK;
    case VS_NOMEM: return SQLITE_NOMEM;
    case VS_INTERRUPT: return SQLITE_INTERRUPT;
    case VS_CORRUPT: return SQLITE_CORRUPT_VTAB;
    default: return SQLITE_ERROR; /* SQLITE_IOERR would roll the application's whole transaction back */
  }
}

/* ---- vecshard_config ---- */

static void config_threads(conn *c, sqlite3_context *ctx, sqlite3_value *value) {
  if (value) {
    sqlite3_int64 n = sqlite3_value_int64(value);
    if (sqlite3_value_numeric_type(value) != SQLITE_INTEGER || n < 0 || n > 4096) {
      sqlite3_result_error(ctx, "vecshard_config: threads must be an integer from 0 (as the machine gives) to 4096", -1);
      return;
    }
    c->threads = (int)n;
  }
  sqlite3_result_int(ctx, c->threads ? c->threads : vs_threads());
}

static void config_allow(conn *c, sqlite3_context *ctx, sqlite3_value *value) {
  if (value && sqlite3_value_type(value) != SQLITE_NULL) {
    const char *text = (const char *)sqlite3_value_text(value);
    char **grown = text ? realloc(c->allowed, (c->n_allowed + 1) * sizeof *grown) : NULL;
    if (grown) c->allowed = grown;
    if (!grown || !(grown[c->n_allowed] = strdup(text))) {
      sqlite3_result_error_nomem(ctx);
      return;
    }
    c->n_allowed++;
  }
  sqlite3_result_int64(ctx, (sqlite3_int64)c->n_allowed);
}

/* A whole number from 0 to max; -1, with an error as result, for anything else. */
static sqlite3_int64 config_number(sqlite3_context *ctx, sqlite3_value *value, const char *name, sqlite3_int64 max) {
  sqlite3_int64 n = sqlite3_value_int64(value);
  if (sqlite3_value_numeric_type(value) == SQLITE_INTEGER && n >= 0 && n <= max) return n;
  char *text = sqlite3_mprintf("vecshard_config: %s must be an integer from 0 to %lld", name, max);
  sqlite3_result_error(ctx, text ? text : "vecshard_config: out of range", -1);
  sqlite3_free(text);
  return -1;
}

/* The RAM cache is the process's: this setting holds for every connection. */
static void config_cache(conn *c, sqlite3_context *ctx, sqlite3_value *value) {
  sqlite3_int64 mb = value ? config_number(ctx, value, "cache_mb", 1 << 30) : 0;
  (void)c;
  if (mb < 0) return;
  if (value) io_s3_cache_limit((uint64_t)mb << 20);
  sqlite3_result_int64(ctx, (sqlite3_int64)(io_s3_cache_state().limit >> 20));
}

static void config_timeout(conn *c, sqlite3_context *ctx, sqlite3_value *value) {
  sqlite3_int64 ms = value ? config_number(ctx, value, "timeout_ms", 86400000) : 0;
  if (ms < 0) return;
  if (value) c->timeout_ms = ms;
  sqlite3_result_int64(ctx, c->timeout_ms ? c->timeout_ms : s3_timeout_ms());
}

static void config_max_bytes(conn *c, sqlite3_context *ctx, sqlite3_value *value) {
  sqlite3_int64 n = value ? config_number(ctx, value, "max_bytes", INT64_MAX) : 0;
  if (n < 0) return;
  if (value) c->max_bytes = n ? (uint64_t)n : UINT64_MAX;
  uint64_t now = c->max_bytes ? c->max_bytes : io_s3_max_bytes();
  sqlite3_result_int64(ctx, now == UINT64_MAX ? 0 : (sqlite3_int64)now);
}

static const struct {
  const char *name;
  void (*apply)(conn *, sqlite3_context *, sqlite3_value *); /* value NULL: only read */
} settings[] = {{"threads", config_threads}, {"allow", config_allow}, {"cache_mb", config_cache},
                {"timeout_ms", config_timeout}, {"max_bytes", config_max_bytes}};

static void config(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  const char *name = (const char *)sqlite3_value_text(argv[0]);
  for (size_t i = 0; name && i < sizeof settings / sizeof *settings; i++)
    if (!sqlite3_stricmp(name, settings[i].name)) {
      settings[i].apply(sqlite3_user_data(ctx), ctx, argc > 1 ? argv[1] : NULL);
      return;
    }
  sqlite3_result_error(ctx, "vecshard_config: unknown setting; known are threads, allow, cache_mb, timeout_ms, max_bytes", -1);
}

int conn_config_register(conn *c) {
  int flags = SQLITE_UTF8 | SQLITE_DIRECTONLY;
  c->refs++; /* one for each registration: SQLite calls the destructor once for each, also when it fails */
  int rc = sqlite3_create_function_v2(c->db, "vecshard_config", 1, flags, c, config, NULL, NULL, conn_release);
  if (rc) return rc;
  c->refs++;
  return sqlite3_create_function_v2(c->db, "vecshard_config", 2, flags, c, config, NULL, NULL, conn_release);
}
