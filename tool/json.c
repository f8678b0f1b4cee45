/* json.c - see json.h. */
#include "json.h"

#include <sqlite3.h>
#include <string.h>

void json_put(FILE *to, const char *text, size_t len) {
  fputc('"', to);
  for (size_t i = 0; i < len; i++) {
    unsigned char c = (unsigned char)text[i];
    if (c == '"' || c == '\\') fprintf(to, "\\%c", c);
    else if (c < 0x20 || c == 0x7f) fprintf(to, "\\u%04x", c);
    else fputc(c, to);
  }
  fputc('"', to);
}

void json_put_text(FILE *to, const char *text) { json_put(to, text, strlen(text)); }

/* Prepares sql with ?1 = json and ?2 = path on a private connection. */
static vs_rc prepare(const char *sql, const char *json, const char *path, sqlite3 **db, sqlite3_stmt **stmt,
                     vs_err *err) {
  *stmt = NULL;
  int rc = sqlite3_open_v2(":memory:", db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL);
  if (!rc) rc = sqlite3_prepare_v2(*db, sql, -1, stmt, NULL);
  if (!rc) rc = sqlite3_bind_text(*stmt, 1, json, -1, SQLITE_STATIC);
  if (!rc) rc = sqlite3_bind_text(*stmt, 2, path, -1, SQLITE_STATIC);
  return rc ? vs_fail(err, VS_IO, "SQLite: %s", *db ? sqlite3_errmsg(*db) : "out of memory") : VS_OK;
}

vs_rc json_length(const char *json, const char *path, const char *name, uint64_t *n, vs_err *err) {
  sqlite3 *db = NULL;
  sqlite3_stmt *stmt;
  *n = 0;
  vs_rc rc = prepare("SELECT json_array_length(?1, ?2), json_type(?1, ?2)", json, path, &db, &stmt, err);
  if (!rc && sqlite3_step(stmt) != SQLITE_ROW) rc = vs_fail(err, VS_INVALID, "%s: %s", name, sqlite3_errmsg(db));
  if (!rc) {
    const char *type = (const char *)sqlite3_column_text(stmt, 1);
    *n = (uint64_t)sqlite3_column_int64(stmt, 0);
    if (!type) rc = vs_fail(err, VS_NOTFOUND, "%s: has no %s", name, path);
    else if (strcmp(type, "array")) rc = vs_fail(err, VS_INVALID, "%s: %s is no array", name, path);
  }
  sqlite3_finalize(stmt);
  sqlite3_close(db);
  return rc;
}

vs_rc json_texts(const char *json, const char *path, const char *name, tool_list *out, vs_err *err) {
  sqlite3 *db = NULL;
  sqlite3_stmt *stmt = NULL;
  uint64_t n;
  vs_rc rc = json_length(json, path, name, &n, err);
  if (!rc) rc = prepare("SELECT type, value FROM json_each(?1, ?2)", json, path, &db, &stmt, err);
  while (!rc) {
    int step = sqlite3_step(stmt);
    if (step == SQLITE_DONE) break;
    if (step != SQLITE_ROW) rc = vs_fail(err, VS_INVALID, "%s: %s", name, sqlite3_errmsg(db));
    else if (strcmp((const char *)sqlite3_column_text(stmt, 0), "text"))
      rc = vs_fail(err, VS_INVALID, "%s: %s holds something that is no text", name, path);
    else tool_list_add(out, (const char *)sqlite3_column_text(stmt, 1));
  }
  sqlite3_finalize(stmt);
  sqlite3_close(db);
  return rc;
}
