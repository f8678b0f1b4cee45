/* shard_manifest.c - manifests as JSON, through SQLite's own functions; see shard_manifest.h.
 *
 * Both directions run on a private in-memory connection: the application's could have other functions under these
 * names. Reading takes four statements whatever the text: is it JSON, the single values, the columns, the segments.
 * Every value is asked for together with its JSON type and checked by one of the *_of helpers; nothing is believed
 * before. Unknown keys are skipped, so that a newer writer may add some: what a reader must not skip it names in
 * "required".
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

void shard_manifest_file(uint64_t version, char name[64]) {
  snprintf(name, 64, "manifest-%020" PRIu64 ".json", UINT64_MAX - version);
}

/* SQLite refused: out of memory, or (a library built without JSON, say) what it says itself. */
static vs_rc sql_failed(sqlite3 *db, const char *name, vs_err *err) {
  if (!db || sqlite3_errcode(db) == SQLITE_NOMEM) return vs_nomem(err);
  return vs_fail(err, VS_IO, "%s: SQLite: %s", name, sqlite3_errmsg(db));
}

/* ---- reading ---- */

typedef struct reader {
  sqlite3 *db;
  const char *json, *name;
  size_t n_bytes;
  vs_err *err;
  vs_rc rc; /* helpers do nothing once it is set */
} reader;

/* Everything wrong ends here. A value may seem to be missing only because SQLite ran out of memory: that is no damage.
 */
static void bad(reader *r, const char *what) {
  if (r->rc) return;
  if (sqlite3_errcode(r->db) == SQLITE_NOMEM) r->rc = vs_nomem(r->err);
  else r->rc = vs_corrupt(r->err, "%s: damaged manifest: %s", r->name, what);
}

/* A statement with the text as ?1; NULL with the error set. */
static sqlite3_stmt *query(reader *r, const char *sql) {
  sqlite3_stmt *s = NULL;
  if (r->rc) return NULL;
  if (sqlite3_prepare_v2(r->db, sql, -1, &s, NULL) ||
      sqlite3_bind_text64(s, 1, r->json, r->n_bytes, SQLITE_STATIC, SQLITE_UTF8)) {
    r->rc = sql_failed(r->db, r->name, r->err);
    sqlite3_finalize(s);
    return NULL;
  }
  return s;
}

/* 1: a row; 0: the end, or an error that is now set. */
static int next_row(reader *r, sqlite3_stmt *s, const char *what) {
  if (r->rc) return 0;
  int rc = sqlite3_step(s);
  if (rc != SQLITE_ROW && rc != SQLITE_DONE) bad(r, what);
  return rc == SQLITE_ROW;
}

/* A value takes two columns of a statement: json_type at col, json_extract (of an array: its length) at col + 1. The
 * type matters because json_extract alone makes 1 of true and text of an array. */
#define VALUE(x, path) "json_type(" x ",'" path "'), json_extract(" x ",'" path "')"
#define ARRAY(x, path) "json_type(" x ",'" path "'), json_array_length(" x ",'" path "')"

static int has_type(sqlite3_stmt *s, int col, const char *type) {
  const char *have = (const char *)sqlite3_column_text(s, col);
  return have && !strcmp(have, type);
}

static uint64_t number_of(reader *r, sqlite3_stmt *s, int col, const char *type, uint64_t lo, uint64_t hi,
                          const char *what) {
  if (r->rc) return 0;
  /* 2^63 has the JSON type "integer" and arrives as a real: hence the second test. */
  int good = has_type(s, col, type) && sqlite3_column_type(s, col + 1) == SQLITE_INTEGER;
  sqlite3_int64 v = good ? sqlite3_column_int64(s, col + 1) : -1;
  if (v >= 0 && (uint64_t)v >= lo && (uint64_t)v <= hi) return (uint64_t)v;
  bad(r, what);
  return 0;
}
static uint64_t int_of(reader *r, sqlite3_stmt *s, int col, uint64_t lo, uint64_t hi, const char *what) {
  return number_of(r, s, col, "integer", lo, hi, what);
}
static size_t length_of(reader *r, sqlite3_stmt *s, int col, size_t max, const char *what) {
  return (size_t)number_of(r, s, col, "array", 0, max, what);
}

static int bool_of(reader *r, sqlite3_stmt *s, int col, const char *what) {
  if (r->rc) return 0;
  int yes = has_type(s, col, "true");
  if (!yes && !has_type(s, col, "false")) bad(r, what);
  return yes;
}

/* No overlong forms, no surrogates (SQLite makes one of a lone \ud800), nothing above U+10FFFF. */
static int valid_utf8(const unsigned char *s, size_t n) {
  static const uint32_t least[] = {0, 0x80, 0x800, 0x10000};
  for (size_t i = 0; i < n;) {
    size_t more = s[i] < 0x80             ? 0
                  : (s[i] & 0xe0) == 0xc0 ? 1
                  : (s[i] & 0xf0) == 0xe0 ? 2
                  : (s[i] & 0xf8) == 0xf0 ? 3
                                          : n;
    if (more >= n - i) return 0;
    uint32_t c = more ? s[i] & (0x3fu >> more) : s[i];
    for (size_t j = 1; j <= more; j++) {
      if ((s[i + j] & 0xc0) != 0x80) return 0;
      c = c << 6 | (s[i + j] & 0x3f);
    }
    if (c < least[more] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000)) return 0;
    i += more + 1;
  }
  return 1;
}

/* Non-empty UTF-8 of at most max bytes without NUL; it lives until the statement moves. NULL with the error set. */
static const char *text_of(reader *r, sqlite3_stmt *s, int col, size_t max, const char *what) {
  if (r->rc) return NULL;
  const char *text = has_type(s, col, "text") ? (const char *)sqlite3_column_text(s, col + 1) : NULL;
  size_t n = text ? (size_t)sqlite3_column_bytes(s, col + 1) : 0;
  if (text && n && n <= max && strlen(text) == n && valid_utf8((const unsigned char *)text, n)) return text;
  bad(r, what);
  return NULL;
}

enum { MAX_NAME = 255, MAX_WORD = 20 };

static char *name_of(reader *r, sqlite3_stmt *s, int col, const char *what) {
  const char *text = text_of(r, s, col, MAX_NAME, what);
  char *copy = text ? strdup(text) : NULL;
  if (text && !copy) r->rc = vs_nomem(r->err);
  return copy;
}

static unsigned word_of(reader *r, sqlite3_stmt *s, int col, const char *const *words, unsigned n, const char *what) {
  const char *text = text_of(r, s, col, MAX_WORD, what);
  for (unsigned i = 0; text && i < n; i++)
    if (!strcmp(text, words[i])) return i;
  bad(r, what);
  return 0;
}

/* What a newer writer says that a reader must understand: this build knows no such feature. */
static void check_required(reader *r) {
  sqlite3_stmt *s = query(r, "SELECT type, value FROM json_each(?1, '$.required')");
  if (s && next_row(r, s, "$.required")) {
    const char *feature = text_of(r, s, 0, MAX_NAME, "a name in $.required");
    if (feature)
      r->rc = vs_fail(r->err, VS_UNSUPPORTED,
                      "%s: needs the feature \"%s\", which this build lacks: use a newer vecshard", r->name, feature);
  }
  sqlite3_finalize(s);
}

static int valid_file(const char *name) {
  size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789._-");
  return n && !name[n] && n < SHARD_NAME_MAX && name[0] != '.';
}

/* Lower-case hex digits where the pattern has an x. */
static int valid_hex(const char *text, const char *pattern) {
  for (; *pattern; pattern++, text++)
    if (*pattern == 'x' ? !*text || !strchr("0123456789abcdef", *text) : *text != *pattern) return 0;
  return !*text;
}

/* One pass over an array, here and for segments: a look-up of $.columns[i] parses the whole text again. */
static const char columns_sql[] =
    "SELECT type, " VALUE("value", "$.name") ", " VALUE("value", "$.type") ", "
    VALUE("value", "$.filter") ", " VALUE("value", "$.index") " FROM json_each(?1, '$.columns')";
static const char segments_sql[] =
    "SELECT type, " VALUE("value", "$.file") ", " VALUE("value", "$.bytes") ", "
    VALUE("value", "$.checksum") ", " VALUE("value", "$.rows") " FROM json_each(?1, '$.segments')";

static void read_columns(reader *r, shard_manifest *m, size_t n) {
  sqlite3_stmt *s = query(r, columns_sql);
  if (s && !(m->columns = calloc(n + 1, sizeof *m->columns))) r->rc = vs_nomem(r->err);
  while (s && m->n_columns < n && next_row(r, s, "a column")) {
    shard_column *c = &m->columns[m->n_columns++];
    if (!has_type(s, 0, "object")) bad(r, "a column");
    c->name = name_of(r, s, 1, "the name of a column");
    c->type = (shard_type)word_of(r, s, 3, type_names, N_TYPES, "the type of a column");
    c->filter = bool_of(r, s, 5, "\"filter\" of a column");
    c->index = bool_of(r, s, 7, "\"index\" of a column");
    if (r->rc) break;
    if (!sqlite3_stricmp(c->name, m->id_name) || !sqlite3_stricmp(c->name, m->vector_name))
      bad(r, "two columns have one name");
    for (const shard_column *before = m->columns; before < c; before++)
      if (!sqlite3_stricmp(before->name, c->name)) bad(r, "two columns have one name");
  }
  sqlite3_finalize(s);
  if (!r->rc && m->n_columns != n) bad(r, "$.columns");
}

static int by_text(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* Sorted, because 10,000 segments make 50 million pairs. */
static void check_files_differ(reader *r, const shard_manifest *m) {
  const char **files = r->rc ? NULL : malloc((m->n_segments + 1) * sizeof *files);
  if (!files) {
    if (!r->rc) r->rc = vs_nomem(r->err);
    return;
  }
  for (size_t i = 0; i < m->n_segments; i++) files[i] = m->segments[i].file;
  qsort(files, m->n_segments, sizeof *files, by_text);
  for (size_t i = 1; i < m->n_segments; i++)
    if (!strcmp(files[i - 1], files[i])) bad(r, "a segment appears twice");
  free(files);
}

static void read_segment(reader *r, sqlite3_stmt *s, shard_segment_ref *g) {
  if (!has_type(s, 0, "object")) bad(r, "a segment");
  const char *file = text_of(r, s, 1, SHARD_NAME_MAX - 1, "the file name of a segment");
  if (file && !valid_file(file)) bad(r, "the file name of a segment");
  const char *sum = text_of(r, s, 5, 32, "the checksum of a segment");
  if (sum && !valid_hex(sum, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")) bad(r, "the checksum of a segment");
  g->n_bytes = int_of(r, s, 3, 0, INT64_MAX, "the bytes of a segment");
  g->n_rows = int_of(r, s, 7, 0, UINT32_MAX, "the rows of a segment");
  if (!r->rc) strcpy(g->file, file), strcpy(g->checksum, sum);
}

static void read_segments(reader *r, shard_manifest *m, size_t n) {
  uint64_t n_bytes = 0;
  sqlite3_stmt *s = query(r, segments_sql);
  if (s && !(m->segments = calloc(n + 1, sizeof *m->segments))) r->rc = vs_nomem(r->err);
  while (s && m->n_segments < n && next_row(r, s, "a segment")) {
    shard_segment_ref *g = &m->segments[m->n_segments++];
    read_segment(r, s, g);
    if (g->n_bytes > INT64_MAX - n_bytes) bad(r, "the bytes of all segments");
    n_bytes += g->n_bytes;
    m->n_rows += g->n_rows; /* cannot wrap: at most 10,000 times 2^32 */
  }
  sqlite3_finalize(s);
  if (!r->rc && m->n_segments != n) bad(r, "$.segments");
  check_files_differ(r, m);
}

static const char head_sql[] =
    "SELECT " VALUE("?1", "$.format") ", " ARRAY("?1", "$.required") ", " ARRAY("?1", "$.optional") ", "
    VALUE("?1", "$.version") ", " VALUE("?1", "$.shard") ", " VALUE("?1", "$.dim") ", " VALUE("?1", "$.metric") ", "
    ARRAY("?1", "$.vectors") ", " VALUE("?1", "$.vectors[0].name") ", " VALUE("?1", "$.vectors[0].dim") ", "
    VALUE("?1", "$.vectors[0].metric") ", " VALUE("?1", "$.vectors[0].store") ", " VALUE("?1", "$.id.name") ", "
    VALUE("?1", "$.id.type") ", " ARRAY("?1", "$.columns") ", " ARRAY("?1", "$.segments") ", "
    VALUE("?1", "$.built") ", " VALUE("?1", "$.built.rows") ", " VALUE("?1", "$.built.skipped") ", "
    VALUE("?1", "$.built.duplicates") ", " VALUE("?1", "$.built.files") ", " VALUE("?1", "$.built.options");
/* The columns of head_sql. */
enum {
  H_FORMAT = 0,
  H_REQUIRED = 2,
  H_OPTIONAL = 4,
  H_VERSION = 6,
  H_UUID = 8,
  H_DIM = 10,
  H_METRIC = 12,
  H_VECTORS = 14,
  H_VECTOR_NAME = 16,
  H_VECTOR_DIM = 18,
  H_VECTOR_METRIC = 20,
  H_STORE = 22,
  H_ID_NAME = 24,
  H_ID_TYPE = 26,
  H_COLUMNS = 28,
  H_SEGMENTS = 30,
  H_BUILT = 32,
  H_BUILT_ROWS = 34,
  H_BUILT_SKIPPED = 36,
  H_BUILT_DUPLICATES = 38,
  H_BUILT_FILES = 40,
  H_BUILT_OPTIONS = 42
};
enum { MAX_FEATURES = 1000, MAX_DIM = 16384 };

/* May this build read it at all? Asked before anything else: a newer format may give other keys another meaning. */
static void read_format(reader *r, sqlite3_stmt *s) {
  uint64_t format = int_of(r, s, H_FORMAT, 0, INT64_MAX, "$.format");
  if (!r->rc && format != SHARD_FORMAT)
    r->rc = vs_fail(r->err, VS_UNSUPPORTED,
                    "%s: shard format %" PRIu64 ", this build reads format %d: use a newer vecshard", r->name, format,
                    SHARD_FORMAT);
  length_of(r, s, H_REQUIRED, MAX_FEATURES, "$.required");
  check_required(r);
  length_of(r, s, H_OPTIONAL, MAX_FEATURES, "$.optional");
}

static void read_vector(reader *r, sqlite3_stmt *s, shard_manifest *m) {
  m->dim = (uint32_t)int_of(r, s, H_DIM, 1, MAX_DIM, "$.dim");
  m->metric = (shard_metric)word_of(r, s, H_METRIC, metric_names, N_METRICS, "$.metric");
  if (length_of(r, s, H_VECTORS, 1000, "$.vectors") != 1 && !r->rc)
    r->rc = vs_fail(r->err, VS_UNSUPPORTED, "%s: this build reads shards with one vector column", r->name);
  m->vector_name = name_of(r, s, H_VECTOR_NAME, "$.vectors[0].name");
  int_of(r, s, H_VECTOR_DIM, m->dim, m->dim, "$.vectors[0].dim");
  if (word_of(r, s, H_VECTOR_METRIC, metric_names, N_METRICS, "$.vectors[0].metric") != m->metric)
    bad(r, "$.vectors[0].metric");
  m->store = (shard_store)word_of(r, s, H_STORE, store_names, N_STORES, "$.vectors[0].store");
}

static void read_head(reader *r, sqlite3_stmt *s, shard_manifest *m) {
  m->version = int_of(r, s, H_VERSION, 1, INT64_MAX, "$.version");
  const char *uuid = text_of(r, s, H_UUID, 36, "$.shard");
  if (uuid && !valid_hex(uuid, "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")) bad(r, "$.shard");
  if (!r->rc) strcpy(m->uuid, uuid);
  read_vector(r, s, m);
  m->id_name = name_of(r, s, H_ID_NAME, "$.id.name");
  unsigned id = word_of(r, s, H_ID_TYPE, type_names, N_TYPES, "$.id.type");
  if (!r->rc && id != SHARD_TEXT && id != SHARD_INTEGER) bad(r, "$.id.type");
  m->id_text = id == SHARD_TEXT;
  if (!r->rc && !sqlite3_stricmp(m->id_name, m->vector_name)) bad(r, "two columns have one name");
}

static void hash_of(reader *r, sqlite3_stmt *s, int col, char out[33], const char *what) {
  if (r->rc || sqlite3_column_type(s, col) == SQLITE_NULL) return;
  const char *text = text_of(r, s, col, 32, what);
  if (text && !valid_hex(text, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx")) bad(r, what);
  if (!r->rc) strcpy(out, text);
}

static void read_origin(reader *r, sqlite3_stmt *s, shard_origin *o) {
  if (r->rc || sqlite3_column_type(s, H_BUILT) == SQLITE_NULL) return;
  if (!has_type(s, H_BUILT, "object")) bad(r, "$.built");
  o->known = 1;
  o->n_rows = int_of(r, s, H_BUILT_ROWS, 0, INT64_MAX, "$.built.rows");
  o->n_skipped = int_of(r, s, H_BUILT_SKIPPED, 0, o->n_rows, "$.built.skipped");
  o->n_duplicates = int_of(r, s, H_BUILT_DUPLICATES, 0, o->n_rows - o->n_skipped, "$.built.duplicates");
  hash_of(r, s, H_BUILT_FILES, o->files, "$.built.files");
  hash_of(r, s, H_BUILT_OPTIONS, o->options, "$.built.options");
}

static void read_all(reader *r, shard_manifest *m) {
  sqlite3_stmt *s = query(r, "SELECT json_valid(?1) AND json_type(?1) = 'object'");
  if (s && (!next_row(r, s, "not JSON") || sqlite3_column_int(s, 0) != 1)) bad(r, "not JSON");
  sqlite3_finalize(s);
  s = query(r, head_sql);
  if (!s || !next_row(r, s, "not JSON")) {
    sqlite3_finalize(s);
    return;
  }
  read_format(r, s);
  read_head(r, s, m);
  read_origin(r, s, &m->origin);
  size_t n_columns = length_of(r, s, H_COLUMNS, SHARD_MAX_COLUMNS, "$.columns");
  size_t n_segments = length_of(r, s, H_SEGMENTS, SHARD_MAX_SEGMENTS, "$.segments");
  sqlite3_finalize(s);
  read_columns(r, m, n_columns);
  read_segments(r, m, n_segments);
}

/* A NUL byte, or one written \u0000: SQLite 3.40 cuts text there without a word, so that "a\u0000b" would pass for "a".
 * In JSON a backslash stands only in strings, where it takes the next character with it. */
static int holds_nul(const char *json, size_t n_bytes) {
  if (memchr(json, 0, n_bytes)) return 1;
  for (size_t i = 0; i + 6 <= n_bytes; i++) {
    if (json[i] != '\\') continue;
    if (!memcmp(json + i, "\\u0000", 6)) return 1;
    i++;
  }
  return 0;
}

vs_rc shard_manifest_parse(const char *json, size_t n_bytes, const char *name, shard_manifest *out, vs_err *err) {
  reader r = {.json = json, .n_bytes = n_bytes, .name = name, .err = err};
  memset(out, 0, sizeof *out);
  if (!n_bytes) return vs_corrupt(err, "%s: damaged manifest: it is empty", name);
  if (n_bytes > SHARD_MAX_MANIFEST) return vs_corrupt(err, "%s: too large for a manifest", name);
  if (holds_nul(json, n_bytes)) return vs_corrupt(err, "%s: damaged manifest: a NUL character", name);
  if (sqlite3_open_v2(":memory:", &r.db, SQLITE_OPEN_READWRITE, NULL)) r.rc = sql_failed(r.db, name, err);
  if (!r.rc) read_all(&r, out);
  sqlite3_close(r.db);
  if (r.rc) shard_manifest_reset(out);
  return r.rc;
}

/* ---- writing ---- */

/* The patch leaves out what is null: hashes that are not there, and "built" as a whole. */
static const char print_sql[] =
    "SELECT json_patch(json_object('format', ?1, 'required', json_array(), 'optional', json_array(), 'version', ?2, "
    "'shard', ?3, 'dim', ?4, "
    "'metric', ?5, 'vectors', json_array(json_object('name', ?6, 'dim', ?4, 'metric', ?5, 'store', ?7)), "
    "'id', json_object('name', ?8, 'type', ?9), "
    "'columns', json((SELECT json_group_array(json_object('name', name, 'type', type, 'filter', json(filter), 'index', "
    "json(idx))) "
    "FROM (SELECT * FROM c ORDER BY rowid))), "
    "'segments', json((SELECT json_group_array(json_object('file', file, 'bytes', bytes, 'checksum', checksum, 'rows', "
    "rows)) "
    "FROM (SELECT * FROM s ORDER BY rowid)))), "
    "json_object('built', json(CASE WHEN ?10 IS NOT NULL THEN "
    "json_object('rows', ?10, 'skipped', ?11, 'duplicates', ?12, 'files', ?13, 'options', ?14) END)))";

/* A bind that failed for want of memory would print null: its code must not get lost. */
static int bind_text(sqlite3_stmt *s, int at, const char *text) {
  return sqlite3_bind_text(s, at, text, -1, SQLITE_STATIC);
}

static int insert_row(sqlite3_stmt *s) {
  sqlite3_step(s);
  return sqlite3_reset(s);
}

static int insert_columns(sqlite3 *db, const shard_manifest *m) {
  sqlite3_stmt *s = NULL;
  int rc = sqlite3_prepare_v2(db, "INSERT INTO c VALUES(?1,?2,?3,?4)", -1, &s, NULL);
  for (size_t i = 0; i < m->n_columns && !rc; i++) {
    const shard_column *c = &m->columns[i];
    rc = bind_text(s, 1, c->name);
    if (!rc) rc = bind_text(s, 2, type_names[c->type]);
    if (!rc) rc = bind_text(s, 3, c->filter ? "true" : "false");
    if (!rc) rc = bind_text(s, 4, c->index ? "true" : "false");
    if (!rc) rc = insert_row(s);
  }
  sqlite3_finalize(s);
  return rc;
}

static int insert_segments(sqlite3 *db, const shard_manifest *m) {
  sqlite3_stmt *s = NULL;
  int rc = sqlite3_prepare_v2(db, "INSERT INTO s VALUES(?1,?2,?3,?4)", -1, &s, NULL);
  for (size_t i = 0; i < m->n_segments && !rc; i++) {
    const shard_segment_ref *g = &m->segments[i];
    rc = bind_text(s, 1, g->file);
    if (!rc) rc = sqlite3_bind_int64(s, 2, (sqlite3_int64)g->n_bytes);
    if (!rc) rc = bind_text(s, 3, g->checksum);
    if (!rc) rc = sqlite3_bind_int64(s, 4, (sqlite3_int64)g->n_rows);
    if (!rc) rc = insert_row(s);
  }
  sqlite3_finalize(s);
  return rc;
}

static int bind_head(sqlite3_stmt *s, const shard_manifest *m) {
  int rc = sqlite3_bind_int(s, 1, SHARD_FORMAT);
  if (!rc) rc = sqlite3_bind_int64(s, 2, (sqlite3_int64)m->version);
  if (!rc) rc = bind_text(s, 3, m->uuid);
  if (!rc) rc = sqlite3_bind_int64(s, 4, m->dim);
  if (!rc) rc = bind_text(s, 5, metric_names[m->metric]);
  if (!rc) rc = bind_text(s, 6, m->vector_name);
  if (!rc) rc = bind_text(s, 7, store_names[m->store]);
  if (!rc) rc = bind_text(s, 8, m->id_name);
  if (!rc) rc = bind_text(s, 9, m->id_text ? "text" : "integer");
  return rc;
}

static int bind_origin(sqlite3_stmt *s, const shard_origin *o) {
  if (!o->known) return 0;
  int rc = sqlite3_bind_int64(s, 10, (sqlite3_int64)o->n_rows);
  if (!rc) rc = sqlite3_bind_int64(s, 11, (sqlite3_int64)o->n_skipped);
  if (!rc) rc = sqlite3_bind_int64(s, 12, (sqlite3_int64)o->n_duplicates);
  if (!rc && *o->files) rc = bind_text(s, 13, o->files);
  if (!rc && *o->options) rc = bind_text(s, 14, o->options);
  return rc;
}

/* What must hold before names are looked up in tables and versions go into signed integers. */
static vs_rc check_enums(const shard_manifest *m, vs_err *err) {
  int good =
      (unsigned)m->metric < N_METRICS && (unsigned)m->store < N_STORES && m->version >= 1 && m->version <= INT64_MAX;
  for (size_t i = 0; i < m->n_columns; i++)
    if ((unsigned)m->columns[i].type - 1 >= N_TYPES - 1) good = 0;
  return good ? VS_OK
              : vs_fail(err, VS_INVALID, "a manifest with a version, metric, store or type that does not exist");
}

vs_rc shard_manifest_print(const shard_manifest *m, char **json, vs_err *err) {
  sqlite3 *db = NULL;
  sqlite3_stmt *s = NULL;
  *json = NULL;
  vs_rc result = check_enums(m, err);
  if (result) return result;
  int rc = sqlite3_open_v2(":memory:", &db, SQLITE_OPEN_READWRITE, NULL);
  if (!rc)
    rc = sqlite3_exec(db, "CREATE TABLE c(name, type, filter, idx); CREATE TABLE s(file, bytes, checksum, rows)", NULL,
                      NULL, NULL);
  if (!rc) rc = insert_columns(db, m);
  if (!rc) rc = insert_segments(db, m);
  if (!rc) rc = sqlite3_prepare_v2(db, print_sql, -1, &s, NULL);
  if (!rc) rc = bind_head(s, m);
  if (!rc) rc = bind_origin(s, &m->origin);
  const char *text = !rc && sqlite3_step(s) == SQLITE_ROW ? (const char *)sqlite3_column_text(s, 0) : NULL;
  if (!text) result = sql_failed(db, "printing a manifest", err);
  else if (!(*json = strdup(text))) result = vs_nomem(err);
  sqlite3_finalize(s);
  sqlite3_close(db);
  return result;
}
