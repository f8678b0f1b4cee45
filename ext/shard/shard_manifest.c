/* shard_manifest.c - manifests as JSON, through SQLite's own functions; see shard_manifest.h.
 *
 * Both directions run on a private in-memory connection: the application's could have other functions under these names.
 */
#include "shard_manifest.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sqlite3ext.h"
SQLITE_EXTENSION_INIT3

static const char *const metric_names[] = {"l2", "cosine", "dot"};
static const char *const store_names[] = {"f32", "f16"};
static const char *const type_names[] = {"", "integer", "real", "text"};
enum { N_METRICS = 3, N_STORES = 2, N_TYPES = 4 };

void shard_manifest_reset(shard_manifest *m) {
  for (size_t i = 0; m->columns && i < m->n_columns; i++) free(m->columns[i].name);
  free(m->columns), free(m->segments), free(m->vector_name), free(m->id_name);
  memset(m, 0, sizeof *m);
}

void shard_manifest_file(uint64_t version, char name[64]) { snprintf(name, 64, "manifest-%020" PRIu64 ".json", UINT64_MAX - version); }

/* ---- reading ---- */

typedef struct reader {
  sqlite3 *db;
  const char *json, *name;
  size_t n_bytes;
  vs_err *err;
  vs_rc rc; /* helpers do nothing once it is set */
} reader;

static void bad(reader *r, const char *what) {
  if (!r->rc) r->rc = vs_corrupt(r->err, "%s: damaged manifest: %s", r->name, what);
}

static sqlite3_stmt *query(reader *r, const char *sql, const char *path) {
  sqlite3_stmt *s = NULL;
  if (r->rc) return NULL;
  if (sqlite3_prepare_v2(r->db, sql, -1, &s, NULL) || sqlite3_bind_text64(s, 1, r->json, r->n_bytes, SQLITE_STATIC, SQLITE_UTF8) ||
      (path && sqlite3_bind_text(s, 2, path, -1, SQLITE_STATIC))) {
    sqlite3_finalize(s);
    r->rc = vs_nomem(r->err);
    return NULL;
  }
  return s;
}

/* A statement with a row holding (json_type, value) at a path, or NULL with the error set. */
static sqlite3_stmt *value_at(reader *r, const char *path, const char *type) {
  sqlite3_stmt *s = query(r, "SELECT json_type(?1, ?2), json_extract(?1, ?2)", path);
  if (!s) return NULL;
  const char *have = sqlite3_step(s) == SQLITE_ROW ? (const char *)sqlite3_column_text(s, 0) : NULL;
  if (have && !strcmp(have, type)) return s;
  bad(r, path);
  sqlite3_finalize(s);
  return NULL;
}

static uint64_t get_int(reader *r, const char *path, uint64_t lo, uint64_t hi) {
  sqlite3_stmt *s = value_at(r, path, "integer");
  sqlite3_int64 v = s && sqlite3_column_type(s, 1) == SQLITE_INTEGER ? sqlite3_column_int64(s, 1) : -1;
  sqlite3_finalize(s);
  if (v < 0 || (uint64_t)v < lo || (uint64_t)v > hi) {
    bad(r, path);
    return 0;
  }
  return (uint64_t)v;
}

static int get_bool(reader *r, const char *path) {
  sqlite3_stmt *s = query(r, "SELECT json_type(?1, ?2)", path);
  const char *have = s && sqlite3_step(s) == SQLITE_ROW ? (const char *)sqlite3_column_text(s, 0) : NULL;
  int yes = have && !strcmp(have, "true");
  if (!have || (!yes && strcmp(have, "false"))) bad(r, path);
  sqlite3_finalize(s);
  return yes;
}

static char *get_text(reader *r, const char *path, size_t max) {
  char *copy = NULL;
  sqlite3_stmt *s = value_at(r, path, "text");
  if (!s) return NULL;
  const char *text = (const char *)sqlite3_column_text(s, 1);
  size_t n = (size_t)sqlite3_column_bytes(s, 1);
  if (!text || !n || n > max || strlen(text) != n) bad(r, path);
  else if (!(copy = strdup(text))) r->rc = vs_nomem(r->err);
  sqlite3_finalize(s);
  return copy;
}

static unsigned get_word(reader *r, const char *path, const char *const *words, unsigned n) {
  char *text = get_text(r, path, 20);
  unsigned found = n;
  for (unsigned i = 0; text && i < n; i++)
    if (*words[i] && !strcmp(text, words[i])) found = i;
  free(text);
  if (found == n) bad(r, path);
  return found == n ? 0 : found;
}

static size_t get_length(reader *r, const char *path, size_t max) {
  sqlite3_stmt *s = query(r, "SELECT json_type(?1, ?2), json_array_length(?1, ?2)", path);
  const char *type = s && sqlite3_step(s) == SQLITE_ROW ? (const char *)sqlite3_column_text(s, 0) : NULL;
  sqlite3_int64 n = type && !strcmp(type, "array") ? sqlite3_column_int64(s, 1) : -1;
  sqlite3_finalize(s);
  if (n < 0 || (uint64_t)n > max) {
    bad(r, path);
    return 0;
  }
  return (size_t)n;
}

/* What a newer writer says that a reader must understand. */
static void check_required(reader *r) {
  sqlite3_stmt *s = query(r, "SELECT value FROM json_each(?1, '$.required')", NULL);
  if (s && sqlite3_step(s) == SQLITE_ROW)
    r->rc = vs_fail(r->err, VS_UNSUPPORTED, "%s: needs the feature \"%.100s\", which this build lacks: use a newer vecshard", r->name,
                    (const char *)sqlite3_column_text(s, 0));
  sqlite3_finalize(s);
}

static int valid_file(const char *name) {
  size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-");
  return n && !name[n] && n < SHARD_NAME_MAX && name[0] != '.';
}

static void read_columns(reader *r, shard_manifest *m) {
  size_t n = get_length(r, "$.columns", SHARD_MAX_COLUMNS);
  char path[64];
  if (!r->rc && !(m->columns = calloc(n + 1, sizeof *m->columns))) r->rc = vs_nomem(r->err);
  for (size_t i = 0; i < n && !r->rc; i++) {
    shard_column *c = &m->columns[m->n_columns++];
    snprintf(path, sizeof path, "$.columns[%zu].name", i);
    c->name = get_text(r, path, 255);
    snprintf(path, sizeof path, "$.columns[%zu].type", i);
    c->type = (shard_type)get_word(r, path, type_names, N_TYPES);
    snprintf(path, sizeof path, "$.columns[%zu].filter", i);
    c->filter = get_bool(r, path);
    snprintf(path, sizeof path, "$.columns[%zu].index", i);
    c->index = get_bool(r, path);
    for (size_t j = 0; j < i && !r->rc; j++)
      if (!sqlite3_stricmp(m->columns[j].name, c->name)) bad(r, "two columns have one name");
    if (!r->rc && (!sqlite3_stricmp(c->name, m->id_name) || !sqlite3_stricmp(c->name, m->vector_name))) bad(r, "two columns have one name");
  }
}

/* One pass over the array: thousands of segments would make a path look-up each quadratic. */
static void read_segments(reader *r, shard_manifest *m) {
  size_t n = get_length(r, "$.segments", SHARD_MAX_SEGMENTS);
  if (!r->rc && !(m->segments = calloc(n + 1, sizeof *m->segments))) r->rc = vs_nomem(r->err);
  sqlite3_stmt *s = query(r,
                          "SELECT json_extract(value,'$.file'), json_extract(value,'$.bytes'), json_extract(value,'$.checksum'), "
                          "json_extract(value,'$.rows'), type FROM json_each(?1, '$.segments')", NULL);
  while (s && !r->rc && sqlite3_step(s) == SQLITE_ROW && m->n_segments < n) {
    shard_segment_ref *g = &m->segments[m->n_segments++];
    const char *type = (const char *)sqlite3_column_text(s, 4), *file = (const char *)sqlite3_column_text(s, 0);
    const char *sum = (const char *)sqlite3_column_text(s, 2);
    sqlite3_int64 bytes = sqlite3_column_int64(s, 1), rows = sqlite3_column_int64(s, 3);
    if (!type || strcmp(type, "object") || sqlite3_column_type(s, 0) != SQLITE_TEXT || sqlite3_column_type(s, 2) != SQLITE_TEXT ||
        sqlite3_column_type(s, 1) != SQLITE_INTEGER || sqlite3_column_type(s, 3) != SQLITE_INTEGER || !file || !sum)
      bad(r, "a segment");
    else if (strlen(file) != (size_t)sqlite3_column_bytes(s, 0) || !valid_file(file)) bad(r, "the file name of a segment");
    else if (strspn(sum, "0123456789abcdef") != 32 || sqlite3_column_bytes(s, 2) != 32) bad(r, "the checksum of a segment");
    else if (bytes < 0 || rows < 0 || rows >= 1ll << 32) bad(r, "the size of a segment");
    else {
      strcpy(g->file, file), strcpy(g->checksum, sum);
      g->n_bytes = (uint64_t)bytes, g->n_rows = (uint64_t)rows, m->n_rows += g->n_rows;
      for (size_t j = 0; j + 1 < m->n_segments; j++)
        if (!strcmp(m->segments[j].file, file)) bad(r, "a segment appears twice");
    }
  }
  sqlite3_finalize(s);
  if (!r->rc && m->n_segments != n) bad(r, "$.segments");
}

static void read_all(reader *r, shard_manifest *m) {
  sqlite3_stmt *s = query(r, "SELECT json_valid(?1) AND json_type(?1) = 'object'", NULL);
  if (s && (sqlite3_step(s) != SQLITE_ROW || sqlite3_column_int(s, 0) != 1)) bad(r, "not JSON");
  sqlite3_finalize(s);
  uint64_t format = get_int(r, "$.format", 0, UINT32_MAX);
  if (!r->rc && format != SHARD_FORMAT)
    r->rc = vs_fail(r->err, VS_UNSUPPORTED, "%s: shard format %" PRIu64 ", this build reads format %d: use a newer vecshard", r->name,
                    format, SHARD_FORMAT);
  check_required(r);
  m->version = get_int(r, "$.version", 1, INT64_MAX);
  char *uuid = get_text(r, "$.shard", 36);
  if (uuid) snprintf(m->uuid, sizeof m->uuid, "%s", uuid);
  free(uuid);
  m->dim = (uint32_t)get_int(r, "$.dim", 1, 16384);
  m->metric = (shard_metric)get_word(r, "$.metric", metric_names, N_METRICS);
  if (!r->rc && get_length(r, "$.vectors", 1000) != 1)
    r->rc = r->rc ? r->rc : vs_fail(r->err, VS_UNSUPPORTED, "%s: this build reads shards with one vector column", r->name);
  m->vector_name = get_text(r, "$.vectors[0].name", 255);
  m->store = (shard_store)get_word(r, "$.vectors[0].store", store_names, N_STORES);
  m->id_name = get_text(r, "$.id.name", 255);
  unsigned id = get_word(r, "$.id.type", type_names, N_TYPES);
  if (!r->rc && id != SHARD_TEXT && id != SHARD_INTEGER) bad(r, "$.id.type");
  m->id_text = id == SHARD_TEXT;
  if (!r->rc && !sqlite3_stricmp(m->id_name, m->vector_name)) bad(r, "two columns have one name");
  read_columns(r, m);
  read_segments(r, m);
}

vs_rc shard_manifest_parse(const char *json, size_t n_bytes, const char *name, shard_manifest *out, vs_err *err) {
  reader r = {.json = json, .n_bytes = n_bytes, .name = name, .err = err};
  memset(out, 0, sizeof *out);
  if (sqlite3_open_v2(":memory:", &r.db, SQLITE_OPEN_READWRITE, NULL)) r.rc = vs_nomem(err);
  if (!r.rc && memchr(json, 0, n_bytes)) bad(&r, "a NUL byte");
  if (!r.rc) read_all(&r, out);
  sqlite3_close(r.db);
  if (r.rc) shard_manifest_reset(out);
  return r.rc;
}

/* ---- writing ---- */

static const char print_sql[] =
    "SELECT json_object('format', ?1, 'required', json_array(), 'optional', json_array(), 'version', ?2, 'shard', ?3, 'dim', ?4, "
    "'metric', ?5, 'vectors', json_array(json_object('name', ?6, 'dim', ?4, 'metric', ?5, 'store', ?7)), "
    "'id', json_object('name', ?8, 'type', ?9), "
    "'columns', json((SELECT json_group_array(json_object('name', name, 'type', type, 'filter', json(filter), 'index', json(idx))) FROM c)), "
    "'segments', json((SELECT json_group_array(json_object('file', file, 'bytes', bytes, 'checksum', checksum, 'rows', rows)) FROM s)))";

static int insert_columns(sqlite3 *db, const shard_manifest *m) {
  sqlite3_stmt *s = NULL;
  int rc = sqlite3_prepare_v2(db, "INSERT INTO c VALUES(?1,?2,?3,?4)", -1, &s, NULL);
  for (size_t i = 0; i < m->n_columns && !rc; i++) {
    const shard_column *c = &m->columns[i];
    sqlite3_bind_text(s, 1, c->name, -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 2, type_names[c->type], -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 3, c->filter ? "true" : "false", -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 4, c->index ? "true" : "false", -1, SQLITE_STATIC);
    rc = sqlite3_step(s) != SQLITE_DONE;
    sqlite3_reset(s);
  }
  sqlite3_finalize(s);
  return rc;
}

static int insert_segments(sqlite3 *db, const shard_manifest *m) {
  sqlite3_stmt *s = NULL;
  int rc = sqlite3_prepare_v2(db, "INSERT INTO s VALUES(?1,?2,?3,?4)", -1, &s, NULL);
  for (size_t i = 0; i < m->n_segments && !rc; i++) {
    const shard_segment_ref *g = &m->segments[i];
    sqlite3_bind_text(s, 1, g->file, -1, SQLITE_STATIC);
    sqlite3_bind_int64(s, 2, (sqlite3_int64)g->n_bytes);
    sqlite3_bind_text(s, 3, g->checksum, -1, SQLITE_STATIC);
    sqlite3_bind_int64(s, 4, (sqlite3_int64)g->n_rows);
    rc = sqlite3_step(s) != SQLITE_DONE;
    sqlite3_reset(s);
  }
  sqlite3_finalize(s);
  return rc;
}

vs_rc shard_manifest_print(const shard_manifest *m, char **json, vs_err *err) {
  sqlite3 *db = NULL;
  sqlite3_stmt *s = NULL;
  *json = NULL;
  int rc = sqlite3_open_v2(":memory:", &db, SQLITE_OPEN_READWRITE, NULL);
  if (!rc) rc = sqlite3_exec(db, "CREATE TABLE c(name, type, filter, idx); CREATE TABLE s(file, bytes, checksum, rows)", NULL, NULL, NULL);
  if (!rc) rc = insert_columns(db, m);
  if (!rc) rc = insert_segments(db, m);
  if (!rc) rc = sqlite3_prepare_v2(db, print_sql, -1, &s, NULL);
  if (!rc) {
    sqlite3_bind_int(s, 1, SHARD_FORMAT);
    sqlite3_bind_int64(s, 2, (sqlite3_int64)m->version);
    sqlite3_bind_text(s, 3, m->uuid, -1, SQLITE_STATIC);
    sqlite3_bind_int64(s, 4, m->dim);
    sqlite3_bind_text(s, 5, metric_names[m->metric], -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 6, m->vector_name, -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 7, store_names[m->store], -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 8, m->id_name, -1, SQLITE_STATIC);
    sqlite3_bind_text(s, 9, m->id_text ? "text" : "integer", -1, SQLITE_STATIC);
    const char *text = sqlite3_step(s) == SQLITE_ROW ? (const char *)sqlite3_column_text(s, 0) : NULL;
    if (text) *json = strdup(text);
  }
  sqlite3_finalize(s);
  sqlite3_close(db);
  return *json ? VS_OK : vs_nomem(err);
}
