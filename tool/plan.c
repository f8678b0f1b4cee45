/* plan.c - see plan.h. The text is taken apart by SQLite's JSON functions, bucket by bucket. */
#include "plan.h"

#include <inttypes.h>
#include <sqlite3.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../ext/ivfpq/ivfpq_format.h"
#include "json.h"
#include "output.h"

static vs_rc sql_failed(const plan *p, sqlite3 *db, vs_err *err) {
  return vs_fail(err, VS_INVALID, "%s: %s", p->path, db ? sqlite3_errmsg(db) : "out of memory");
}

static int is_type(sqlite3_stmt *s, int col, const char *type) {
  const char *have = (const char *)sqlite3_column_text(s, col);
  return have && !strcmp(have, type);
}

static vs_rc prepare(const plan *p, sqlite3 *db, const char *json, const char *sql, sqlite3_stmt **s, vs_err *err) {
  *s = NULL;
  int failed = sqlite3_prepare_v2(db, sql, -1, s, NULL) || sqlite3_bind_text(*s, 1, json, -1, SQLITE_STATIC);
  return failed ? sql_failed(p, db, err) : VS_OK;
}

static char *text_or_null(sqlite3_stmt *s, int col) {
  return is_type(s, col, "text") ? tool_format("%s", (const char *)sqlite3_column_text(s, col + 1)) : NULL;
}

static vs_rc read_head(plan *p, sqlite3 *db, const char *json, vs_err *err) {
  sqlite3_stmt *s;
  vs_rc rc = prepare(p, db, json,
                     "SELECT json_type(?1,'$.dim'), json_extract(?1,'$.dim'), json_type(?1,'$.embedding_dataset'),"
                     " json_extract(?1,'$.embedding_dataset'), json_type(?1,'$.id_dataset'), json_extract(?1,'$.id_dataset')",
                     &s, err);
  if (!rc && sqlite3_step(s) != SQLITE_ROW) rc = sql_failed(p, db, err);
  if (!rc && sqlite3_column_type(s, 0) != SQLITE_NULL) {
    sqlite3_int64 dim = sqlite3_column_int64(s, 1);
    if (!is_type(s, 0, "integer") || dim < 1 || dim > IVFPQ_MAX_DIM)
      rc = vs_fail(err, VS_INVALID, "%s: $.dim is no whole number from 1 to %d", p->path, IVFPQ_MAX_DIM);
    else p->dim = (uint32_t)dim;
  }
  if (!rc) p->embedding_dataset = text_or_null(s, 2), p->id_dataset = text_or_null(s, 4);
  sqlite3_finalize(s);
  return rc;
}

static vs_rc read_bucket(plan *p, sqlite3_stmt *s, plan_bucket *b, vs_err *err) {
  char *name = tool_format("%s: bucket %zu", p->path, (size_t)(b - p->buckets) + 1);
  const char *json = (const char *)sqlite3_column_text(s, 1);
  vs_rc rc = VS_OK;
  b->n_rows = PLAN_ROWS_UNKNOWN;
  if (!is_type(s, 0, "object") || !json) rc = vs_fail(err, VS_INVALID, "%s is no object", name);
  else rc = json_texts(json, "$.files", name, &b->files, err);
  if (!rc && sqlite3_column_type(s, 2) != SQLITE_NULL) {
    sqlite3_int64 n = sqlite3_column_int64(s, 3);
    if (!is_type(s, 2, "integer") || sqlite3_column_type(s, 3) != SQLITE_INTEGER || n < 0)
      rc = vs_fail(err, VS_INVALID, "%s: \"rows\" is no whole number", name);
    else b->n_rows = (uint64_t)n;
  }
  free(name);
  return rc;
}

static vs_rc read_buckets(plan *p, sqlite3 *db, const char *json, vs_err *err) {
  sqlite3_stmt *s;
  uint64_t n;
  vs_rc rc = json_length(json, "$.buckets", p->path, &n, err);
  if (rc) return rc;
  p->buckets = tool_alloc(n, sizeof *p->buckets);
  rc = prepare(p, db, json,
               "SELECT type, value, json_type(value,'$.rows'), json_extract(value,'$.rows') FROM (SELECT type, "
               "CASE WHEN type = 'object' THEN value ELSE '{}' END AS value FROM json_each(?1,'$.buckets'))",
               &s, err);
  while (!rc && p->n < n && sqlite3_step(s) == SQLITE_ROW) rc = read_bucket(p, s, &p->buckets[p->n++], err);
  if (!rc && p->n != n) rc = sql_failed(p, db, err);
  sqlite3_finalize(s);
  return rc;
}

/* A plan that was edited may name a file twice: its rows would be found twice. */
typedef struct place { const char *file; size_t bucket; } place;
static int by_file(const void *a, const void *b) {
  const place *x = a, *y = b;
  int c = strcmp(x->file, y->file);
  return c ? c : (x->bucket > y->bucket) - (x->bucket < y->bucket);
}

static vs_rc check_files(const plan *p, vs_err *err) {
  size_t n = 0, at = 0;
  vs_rc rc = VS_OK;
  for (size_t b = 0; b < p->n; b++) n += p->buckets[b].files.n;
  place *all = tool_alloc(n, sizeof *all);
  for (size_t b = 0; b < p->n; b++)
    for (size_t i = 0; i < p->buckets[b].files.n; i++) all[at++] = (place){p->buckets[b].files.items[i], b};
  qsort(all, n, sizeof *all, by_file);
  for (size_t i = 1; i < n && !rc; i++)
    if (!strcmp(all[i].file, all[i - 1].file))
      rc = vs_fail(err, VS_INVALID, "%s: %s is in bucket %zu and in bucket %zu", p->path, all[i].file, all[i - 1].bucket + 1,
                   all[i].bucket + 1);
  free(all);
  return rc;
}

vs_rc plan_read(const char *path, plan *out, vs_err *err) {
  char *text = NULL;
  sqlite3 *db = NULL;
  *out = (plan){.path = tool_format("%s", path)};
  vs_rc rc = output_read_text(path, PLAN_MAX_BYTES, &text, err);
  if (!rc && sqlite3_open_v2(":memory:", &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_NOMUTEX, NULL)) rc = sql_failed(out, db, err);
  if (!rc) rc = read_buckets(out, db, text, err);
  if (!rc) rc = read_head(out, db, text, err);
  if (!rc) rc = check_files(out, err);
  sqlite3_close(db);
  free(text);
  if (rc) plan_reset(out);
  return rc;
}

void plan_reset(plan *p) {
  for (size_t b = 0; b < p->n; b++) tool_list_reset(&p->buckets[b].files);
  free(p->buckets), free(p->path), free(p->embedding_dataset), free(p->id_dataset);
  memset(p, 0, sizeof *p);
}

static void print_hash(XXH128_hash_t h, char hash[33]) { snprintf(hash, 33, "%016" PRIx64 "%016" PRIx64, h.high64, h.low64); }

void plan_hash(const plan_bucket *b, char hash[33]) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  for (size_t i = 0; i < b->files.n; i++) XXH3_128bits_update(&state, b->files.items[i], strlen(b->files.items[i]) + 1);
  XXH3_128bits_update(&state, &b->n_rows, sizeof b->n_rows);
  print_hash(XXH3_128bits_digest(&state), hash);
}

void plan_hash_text(const char *text, char hash[33]) { print_hash(XXH3_128bits(text, strlen(text)), hash); }
