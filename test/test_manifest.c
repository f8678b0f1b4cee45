/* test_manifest.c - ext/shard's manifests: text, files and the exclusive commit. Linked with -DSQLITE_CORE and
 * libsqlite3.
 *
 * Proves: what is printed parses to the same thing, also with names that need escaping; every single check of a hostile
 * manifest refuses it with its own code and text (each case differs from a good manifest in one place); out of memory
 * is reported as that and as nothing else; of 2 or 8 writers, threads or processes, exactly one commits a version and
 * nothing of the others is left behind; the newest version is found among names that only look like manifests.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
/* cmocka wants these four first */
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../ext/shard/shard_manifest.h"
#include "sqlite3ext.h"

static char folder[64];

#define UUID "01234567-89ab-cdef-8123-456789abcdef"
#define SUM1 "0123456789abcdef0123456789abcdef"
#define SUM2 "ffffffffffffffff0000000000000000"

static const char good_json[] =
    "{\"format\":0,\"required\":[],\"optional\":[\"later\"],\"version\":7,\"shard\":\"" UUID
    "\",\"dim\":960,\"metric\":\"cosine\","
    "\"vectors\":[{\"name\":\"embedding\",\"dim\":960,\"metric\":\"cosine\",\"store\":\"f32\"}],"
    "\"id\":{\"name\":\"key\",\"type\":\"text\"},"
    "\"columns\":[{\"name\":\"organism\",\"type\":\"text\",\"filter\":true,\"index\":false},"
    "{\"name\":\"year\",\"type\":\"integer\",\"filter\":false,\"index\":true}],"
    "\"segments\":[{\"file\":\"seg-a.ivf\",\"bytes\":1000,\"checksum\":\"" SUM1
    "\",\"rows\":50},"
    "{\"file\":\"seg-b.ivf\",\"bytes\":2000,\"checksum\":\"" SUM2 "\",\"rows\":60}],"
    "\"built\":{\"rows\":120,\"skipped\":7,\"duplicates\":3,\"files\":\"" SUM1 "\",\"options\":\"" SUM2 "\"}}";

static vs_rc parse(const char *json, shard_manifest *m, vs_err *err) {
  memset(err, 0, sizeof *err);
  return shard_manifest_parse(json, strlen(json), "the test", m, err);
}

static void parse_good(shard_manifest *m) {
  vs_err err;
  if (parse(good_json, m, &err)) fail_msg("%s", err.text);
}

/* The good text with the first `from` replaced; malloc'ed. */
static char *replaced(const char *from, const char *to) {
  const char *at = strstr(good_json, from);
  if (!at) fail_msg("no such text in the good manifest: %s", from);
  char *out = malloc(sizeof good_json + strlen(to));
  sprintf(out, "%.*s%s%s", (int)(at - good_json), good_json, to, at + strlen(from));
  return out;
}

static void expect_refused(const char *json, vs_rc want, const char *text) {
  shard_manifest m;
  vs_err err;
  vs_rc rc = parse(json, &m, &err);
  if (rc != want || !strstr(err.text, text))
    fail_msg("got %d \"%s\", want %d \"%s\" for %.2000s", rc, err.text, want, text, json);
  assert_null(m.columns);
  assert_null(m.segments);
  assert_null(m.vector_name);
}

/* ---- text ---- */

static void good_manifest_is_read(void **state) {
  shard_manifest m;
  (void)state;
  parse_good(&m);
  assert_int_equal(m.version, 7);
  assert_string_equal(m.uuid, UUID);
  assert_int_equal(m.dim, 960);
  assert_int_equal(m.metric, SHARD_COSINE);
  assert_int_equal(m.store, SHARD_F32);
  assert_string_equal(m.vector_name, "embedding");
  assert_string_equal(m.id_name, "key");
  assert_int_equal(m.id_text, 1);
  assert_int_equal(m.n_columns, 2);
  assert_string_equal(m.columns[0].name, "organism");
  assert_int_equal(m.columns[0].type, SHARD_TEXT);
  assert_int_equal(m.columns[0].filter, 1);
  assert_int_equal(m.columns[0].index, 0);
  assert_string_equal(m.columns[1].name, "year");
  assert_int_equal(m.columns[1].type, SHARD_INTEGER);
  assert_int_equal(m.columns[1].filter, 0);
  assert_int_equal(m.columns[1].index, 1);
  assert_int_equal(m.n_segments, 2);
  assert_string_equal(m.segments[0].file, "seg-a.ivf");
  assert_int_equal(m.segments[1].n_bytes, 2000);
  assert_int_equal(m.segments[0].n_rows, 50);
  assert_string_equal(m.segments[1].checksum, SUM2);
  assert_int_equal(m.n_rows, 110);
  assert_int_equal(m.origin.known, 1);
  assert_int_equal(m.origin.n_rows, 120);
  assert_int_equal(m.origin.n_skipped, 7);
  assert_int_equal(m.origin.n_duplicates, 3);
  assert_string_equal(m.origin.files, SUM1);
  assert_string_equal(m.origin.options, SUM2);
  shard_manifest_reset(&m);
  shard_manifest_reset(&m); /* legal twice */
}

/* Printed, parsed and printed again: the same text, so nothing was lost or changed on the way. */
static void round_trip(const shard_manifest *m) {
  vs_err err = {0};
  char *one, *two;
  shard_manifest back;
  assert_int_equal(shard_manifest_print(m, &one, &err), VS_OK);
  if (parse(one, &back, &err)) fail_msg("%s: %s", err.text, one);
  assert_int_equal(shard_manifest_print(&back, &two, &err), VS_OK);
  assert_string_equal(one, two);
  assert_int_equal(back.n_columns, m->n_columns);
  for (size_t i = 0; i < m->n_columns; i++) assert_string_equal(back.columns[i].name, m->columns[i].name);
  assert_string_equal(back.vector_name, m->vector_name);
  assert_int_equal(back.n_segments, m->n_segments);
  assert_int_equal(back.n_rows, m->n_rows);
  shard_manifest_reset(&back);
  free(one), free(two);
}

static void printing_round_trips(void **state) {
  shard_manifest m;
  (void)state;
  parse_good(&m);
  round_trip(&m);
  m.metric = SHARD_DOT, m.store = SHARD_F16, m.id_text = 0, m.version = INT64_MAX, m.dim = 16384;
  m.segments[0].n_rows = UINT32_MAX, m.segments[0].n_bytes = (uint64_t)INT64_MAX - 2000, m.n_rows = 60ull + UINT32_MAX;
  round_trip(&m);
  m.version = 1, m.dim = 1, m.metric = SHARD_L2, m.columns[0].type = SHARD_REAL;
  round_trip(&m);
  size_t n_columns = m.n_columns, n_segments = m.n_segments;
  uint64_t n_rows = m.n_rows;
  m.n_columns = m.n_segments = 0, m.n_rows = 0; /* as the _config tables of the virtual tables keep it */
  round_trip(&m);
  m.n_columns = n_columns, m.n_segments = n_segments, m.n_rows = n_rows;
  shard_manifest_reset(&m);
}

static void names_need_escaping(void **state) {
  static const char *const names[] = {"\\u0000",
      "\"",       "\\",           "a\"b\\c",          "\x01\x1f\t\n", "'; DROP TABLE c; --", "]}",
      "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xef\xbf\xbf", "\xf4\x8f\xbf\xbf",    "\x7f",
      " "};
  shard_manifest m;
  char longest[256];
  (void)state;
  parse_good(&m);
  memset(longest, 'x', 255), longest[255] = 0;
  for (size_t i = 0; i <= sizeof names / sizeof *names; i++) {
    free(m.columns[0].name);
    m.columns[0].name = strdup(i < sizeof names / sizeof *names ? names[i] : longest);
    round_trip(&m);
  }
  shard_manifest_reset(&m);
}

static void unknown_keys_are_skipped(void **state) {
  shard_manifest m;
  vs_err err;
  char *json = replaced("\"dim\":960", "\"new\":{\"x\":[1,2]},\"dim\":960");
  (void)state;
  assert_int_equal(parse(json, &m, &err), VS_OK);
  shard_manifest_reset(&m);
  free(json);
}

/* Neither the whole nor the hashes need be there; what is not there is not printed. */
static void origin_may_be_missing(void **state) {
  static const char *const cut[] = {",\"files\":\"" SUM1 "\",\"options\":\"" SUM2 "\"",
                                    ",\"built\":{\"rows\":120,\"skipped\":7,\"duplicates\":3,\"files\":\"" SUM1
                                    "\",\"options\":\"" SUM2 "\"}"};
  (void)state;
  for (int i = 0; i < 2; i++) {
    shard_manifest m;
    vs_err err = {0};
    char *json = replaced(cut[i], ""), *printed;
    if (parse(json, &m, &err)) fail_msg("%s", err.text);
    assert_int_equal(m.origin.known, i == 0);
    assert_int_equal(m.origin.n_rows, i == 0 ? 120 : 0);
    assert_string_equal(m.origin.files, "");
    round_trip(&m);
    assert_int_equal(shard_manifest_print(&m, &printed, &err), VS_OK);
    assert_int_equal(!!strstr(printed, "\"built\""), i == 0);
    assert_null(strstr(printed, "null"));
    shard_manifest_reset(&m);
    free(json), free(printed);
  }
}

static void invalid_structs_are_not_printed(void **state) {
  vs_err err = {0};
  char *json;
  shard_manifest m;
  (void)state;
  parse_good(&m);
  const shard_manifest good = m;
  for (int i = 0; i < 5; i++) {
    m = good;
    if (i == 0) m.version = 0;
    if (i == 1) m.version = (uint64_t)INT64_MAX + 1;
    if (i == 2) m.metric = (shard_metric)3;
    if (i == 3) m.store = (shard_store)2;
    if (i == 4) m.columns[1].type = (shard_type)0;
    assert_int_equal(shard_manifest_print(&m, &json, &err), VS_INVALID);
    assert_null(json);
  }
  m = good;
  shard_manifest_reset(&m);
}

/* ---- hostile text: each case changes one thing ---- */

typedef struct hostile {
  const char *from, *to;
  vs_rc rc;
  const char *text;
} hostile;

static const hostile cases[] = {
    /* not JSON, not an object */
    {SUM2 "\"}}", SUM2 "\"}", VS_CORRUPT, "not JSON"},
    {"{\"format\":0", "x{\"format\":0", VS_CORRUPT, "not JSON"},
    {"{\"format\":0", "[{\"format\":0", VS_CORRUPT, "not JSON"},
    {SUM2 "\"}}", SUM2 "\"}}x", VS_CORRUPT, "not JSON"},
    /* format and features */
    {"\"format\":0", "\"format\":1", VS_UNSUPPORTED, "shard format 1, this build reads format 0"},
    {"\"format\":0", "\"format\":4294967296", VS_UNSUPPORTED, "shard format 4294967296"},
    {"\"format\":0", "\"format\":-1", VS_CORRUPT, "$.format"},
    {"\"format\":0", "\"format\":\"0\"", VS_CORRUPT, "$.format"},
    {"\"format\":0", "\"format\":0.0", VS_CORRUPT, "$.format"},
    {"\"format\":0", "\"format\":false", VS_CORRUPT, "$.format"},
    {"\"format\":0", "\"format\":null", VS_CORRUPT, "$.format"},
    {"\"format\":0,", "", VS_CORRUPT, "$.format"},
    {"\"required\":[]", "\"required\":[\"zstd-codes\"]", VS_UNSUPPORTED, "\"zstd-codes\""},
    {"\"required\":[]", "\"required\":[1]", VS_CORRUPT, "a name in $.required"},
    {"\"required\":[]", "\"required\":[null]", VS_CORRUPT, "a name in $.required"},
    {"\"required\":[]", "\"required\":{}", VS_CORRUPT, "$.required"},
    {"\"required\":[]", "\"required\":null", VS_CORRUPT, "$.required"},
    {"\"required\":[],", "", VS_CORRUPT, "$.required"},
    {"\"optional\":[\"later\"]", "\"optional\":\"later\"", VS_CORRUPT, "$.optional"},
    /* version */
    {"\"version\":7", "\"version\":0", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":-7", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":7.0", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":7e0", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":\"7\"", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":true", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":[7]", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":9223372036854775808", VS_CORRUPT, "$.version"},
    {"\"version\":7", "\"version\":18446744073709551623", VS_CORRUPT, "$.version"},
    /* the uuid: it is printed into other documents */
    {UUID, "01234567-89ab-cdef-8123-456789abcde", VS_CORRUPT, "$.shard"},
    {UUID, "01234567-89ab-cdef-8123-456789abcdef0", VS_CORRUPT, "$.shard"},
    {UUID, "01234567-89ab-cdef-8123-456789abcdeF", VS_CORRUPT, "$.shard"},
    {UUID, "01234567089ab-cdef-8123-456789abcdef", VS_CORRUPT, "$.shard"},
    {"\"" UUID "\"", "12", VS_CORRUPT, "$.shard"},
    /* vectors */
    {"\"dim\":960,\"metric\":\"cosine\",\"v", "\"dim\":0,\"metric\":\"cosine\",\"v", VS_CORRUPT, "$.dim"},
    {"\"dim\":960,\"metric\":\"cosine\",\"v", "\"dim\":16385,\"metric\":\"cosine\",\"v", VS_CORRUPT, "$.dim"},
    {"\"dim\":960,\"metric\":\"cosine\",\"v", "\"dim\":4294968256,\"metric\":\"cosine\",\"v", VS_CORRUPT, "$.dim"},
    {"\"dim\":960,\"metric\":\"cosine\",\"v", "\"dim\":960.5,\"metric\":\"cosine\",\"v", VS_CORRUPT, "$.dim"},
    {"\"cosine\",\"vectors\"", "\"hamming\",\"vectors\"", VS_CORRUPT, "$.metric"},
    {"\"cosine\",\"vectors\"", "1,\"vectors\"", VS_CORRUPT, "$.metric"},
    {"\"cosine\",\"vectors\"", "\"dot\",\"vectors\"", VS_CORRUPT, "$.vectors[0].metric"},
    {"\"dim\":960,\"metric\":\"cosine\",\"s", "\"dim\":961,\"metric\":\"cosine\",\"s", VS_CORRUPT, "$.vectors[0].dim"},
    {"\"store\":\"f32\"", "\"store\":\"f64\"", VS_CORRUPT, "$.vectors[0].store"},
    {"\"store\":\"f32\"}]", "\"store\":\"f32\"},{}]", VS_UNSUPPORTED, "one vector column"},
    {"[{\"name\":\"embedding\"", "[5,{\"name\":\"embedding\"", VS_UNSUPPORTED, "one vector column"},
    {"\"vectors\":[", "\"vectors\":[],\"x\":[", VS_UNSUPPORTED, "one vector column"},
    {"\"vectors\":[", "\"vectors\":7,\"x\":[", VS_CORRUPT, "$.vectors"},
    {"\"name\":\"embedding\"", "\"name\":\"\"", VS_CORRUPT, "$.vectors[0].name"},
    /* the id */
    {"\"id\":{", "\"id\":5,\"x\":{", VS_CORRUPT, "$.id.name"},
    {"\"key\",\"type\":\"text\"", "\"key\",\"type\":\"real\"", VS_CORRUPT, "$.id.type"},
    {"\"key\",\"type\":\"text\"", "\"key\",\"type\":\"\"", VS_CORRUPT, "$.id.type"},
    {"\"name\":\"key\"", "\"name\":\"EMBEDDING\"", VS_CORRUPT, "two columns have one name"},
    /* columns */
    {"\"columns\":[", "\"columns\":{},\"x\":[", VS_CORRUPT, "$.columns"},
    {"\"columns\":[", "\"columns\":[7,", VS_CORRUPT, "a column"},
    {"\"columns\":[",
     "\"columns\":[\"{\\\"name\\\":\\\"n\\\",\\\"type\\\":\\\"text\\\",\\\"filter\\\":true,\\\"index\\\":true}\",",
     VS_CORRUPT, "damaged manifest: a column"},
    {"\"organism\"", "\"\"", VS_CORRUPT, "the name of a column"},
    {"\"organism\"", "7", VS_CORRUPT, "the name of a column"},
    {"\"organism\"", "[\"a\"]", VS_CORRUPT, "the name of a column"},
    {"\"organism\"", "\"a\\u0000b\"", VS_CORRUPT, "a NUL character"},
    {"\"organism\"", "\"\\ud800\"", VS_CORRUPT, "the name of a column"},
    {"organism", "a\x80", VS_CORRUPT, "the name of a column"},
    {"organism", "\xc3" "A", VS_CORRUPT, "the name of a column"},
    {"organism", "\xc0\xaf", VS_CORRUPT, "the name of a column"},
    {"organism", "\xe0\x80\xaf", VS_CORRUPT, "the name of a column"},
    {"organism", "\xed\xa0\x80", VS_CORRUPT, "the name of a column"},
    {"organism", "\xf4\x90\x80\x80", VS_CORRUPT, "the name of a column"},
    {"organism", "\xf8\x88\x80\x80\x80", VS_CORRUPT, "the name of a column"},
    {"organism", "a\xe2\x82", VS_CORRUPT, "the name of a column"},
    {"organism", "YEAR", VS_CORRUPT, "two columns have one name"},
    {"organism", "Key", VS_CORRUPT, "two columns have one name"},
    {"organism", "Embedding", VS_CORRUPT, "two columns have one name"},
    {"\"type\":\"text\",\"filter\"", "\"type\":\"blob\",\"filter\"", VS_CORRUPT, "the type of a column"},
    {"\"type\":\"text\",\"filter\"", "\"type\":3,\"filter\"", VS_CORRUPT, "the type of a column"},
    {"\"filter\":true", "\"filter\":1", VS_CORRUPT, "\"filter\" of a column"},
    {"\"filter\":true,", "", VS_CORRUPT, "\"filter\" of a column"},
    {"\"index\":false", "\"index\":\"false\"", VS_CORRUPT, "\"index\" of a column"},
    /* segments */
    {"\"segments\":[", "\"segments\":null,\"x\":[", VS_CORRUPT, "$.segments"},
    {"\"segments\":[", "\"segments\":[7,", VS_CORRUPT, "a segment"},
    {"\"segments\":[",
     "\"segments\":[\"{\\\"file\\\":\\\"f\\\",\\\"bytes\\\":1,\\\"rows\\\":1,\\\"checksum\\\":\\\"" SUM1 "\\\"}\",",
     VS_CORRUPT, "damaged manifest: a segment"},
    {"seg-a.ivf", "../etc/passwd", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", "a/b", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", ".hidden", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", "Seg", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", "seg a", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", "", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", "seg-a.ivf\\u0000x", VS_CORRUPT, "a NUL character"},
    {"seg-a.ivf", "\\\\\\u0000", VS_CORRUPT, "a NUL character"},
    {"seg-a.ivf", "\\\\u0000", VS_CORRUPT, "the file name of a segment"},
    {"\"seg-a.ivf\"", "7", VS_CORRUPT, "the file name of a segment"},
    {"seg-a.ivf", "seg-b.ivf", VS_CORRUPT, "a segment appears twice"},
    {"\"bytes\":1000", "\"bytes\":-1", VS_CORRUPT, "the bytes of a segment"},
    {"\"bytes\":1000", "\"bytes\":1000.0", VS_CORRUPT, "the bytes of a segment"},
    {"\"bytes\":1000", "\"bytes\":\"1000\"", VS_CORRUPT, "the bytes of a segment"},
    {"\"bytes\":1000", "\"bytes\":true", VS_CORRUPT, "the bytes of a segment"},
    {"\"bytes\":1000", "\"bytes\":9223372036854775808", VS_CORRUPT, "the bytes of a segment"},
    {"\"bytes\":1000", "\"bytes\":9223372036854775807", VS_CORRUPT, "the bytes of all segments"},
    {"\"bytes\":1000,", "", VS_CORRUPT, "the bytes of a segment"},
    {SUM1, "0123456789abcdef0123456789abcde", VS_CORRUPT, "the checksum of a segment"},
    {SUM1, "0123456789abcdef0123456789abcdef0", VS_CORRUPT, "the checksum of a segment"},
    {SUM1, "0123456789abcdef0123456789abcdeF", VS_CORRUPT, "the checksum of a segment"},
    {"\"" SUM1 "\"", "7", VS_CORRUPT, "the checksum of a segment"},
    {"\"rows\":50", "\"rows\":4294967296", VS_CORRUPT, "the rows of a segment"},
    {"\"rows\":50", "\"rows\":-1", VS_CORRUPT, "the rows of a segment"},
    {"\"rows\":50", "\"rows\":50.0", VS_CORRUPT, "the rows of a segment"},
    {"\"rows\":50", "\"rows\":false", VS_CORRUPT, "the rows of a segment"},
    {",\"rows\":50", "", VS_CORRUPT, "the rows of a segment"},
    /* what it was built from */
    {"\"built\":{", "\"built\":null,\"x\":{", VS_CORRUPT, "$.built"},
    {"\"built\":{", "\"built\":[1],\"x\":{", VS_CORRUPT, "$.built"},
    {"\"rows\":120", "\"rows\":-1", VS_CORRUPT, "$.built.rows"},
    {"\"rows\":120", "\"rows\":\"120\"", VS_CORRUPT, "$.built.rows"},
    {"\"rows\":120,", "", VS_CORRUPT, "$.built.rows"},
    {"\"skipped\":7", "\"skipped\":121", VS_CORRUPT, "$.built.skipped"},
    {"\"skipped\":7,", "", VS_CORRUPT, "$.built.skipped"},
    {"\"duplicates\":3", "\"duplicates\":114", VS_CORRUPT, "$.built.duplicates"},
    {"\"files\":\"0", "\"files\":\"x", VS_CORRUPT, "$.built.files"},
    {"\"files\":\"0", "\"files\":\"", VS_CORRUPT, "$.built.files"},
    {"\"files\":", "\"files\":null,\"x\":", VS_CORRUPT, "$.built.files"},
    {"\"options\":\"", "\"options\":\"0", VS_CORRUPT, "$.built.options"},
};

static void hostile_manifests_are_refused(void **state) {
  (void)state;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    char *json = replaced(cases[i].from, cases[i].to);
    expect_refused(json, cases[i].rc, cases[i].text);
    free(json);
  }
}

/* A value that is too long by one, after one of the longest that is allowed. */
static void lengths_have_limits(void **state) {
  static const struct {
    const char *from, *text;
    size_t max;
  } names[] = {{"organism", "the name of a column", 255},
               {"key", "$.id.name", 255},
               {"embedding", "$.vectors[0].name", 255},
               {"seg-a.ivf", "the file name of a segment", SHARD_NAME_MAX - 1}};
  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    for (size_t n = names[i].max; n <= names[i].max + 1; n++) {
      char name[300];
      shard_manifest m;
      vs_err err;
      memset(name, 'z', n), name[n] = 0;
      char *json = replaced(names[i].from, name);
      if (n > names[i].max) expect_refused(json, VS_CORRUPT, names[i].text);
      else assert_int_equal(parse(json, &m, &err), VS_OK), shard_manifest_reset(&m);
      free(json);
    }
}

/* The good manifest with n further elements in an array; malloc'ed. */
static char *with_many(const char *array, const char *element, size_t n) {
  char *many = malloc(n * 200 + 100), *at = many, *json;
  if (!many) abort();
  at += sprintf(at, "\"%s\":[", array);
  for (size_t i = 0; i < n; i++) at += sprintf(at, element, i), at += sprintf(at, ",");
  char open[32];
  snprintf(open, sizeof open, "\"%s\":[", array);
  json = replaced(open, many);
  free(many);
  return json;
}

static void counts_have_limits(void **state) {
  static const char column[] = "{\"name\":\"c%zu\",\"type\":\"real\",\"filter\":true,\"index\":false}";
  static const char segment[] = "{\"file\":\"s%zu\",\"bytes\":1,\"checksum\":\"" SUM1 "\",\"rows\":4294967295}";
  shard_manifest m;
  vs_err err;
  (void)state;
  char *most_columns = with_many("columns", column, SHARD_MAX_COLUMNS - 2),
       *columns = with_many("columns", column, SHARD_MAX_COLUMNS - 1);
  char *most_segments = with_many("segments", segment, SHARD_MAX_SEGMENTS - 2),
       *segments = with_many("segments", segment, SHARD_MAX_SEGMENTS - 1);
  if (parse(most_columns, &m, &err)) fail_msg("%s", err.text);
  assert_int_equal(m.n_columns, SHARD_MAX_COLUMNS);
  shard_manifest_reset(&m);
  if (parse(most_segments, &m, &err)) fail_msg("%s", err.text);
  assert_int_equal(m.n_segments, SHARD_MAX_SEGMENTS);
  assert_true(m.n_rows == 110 + (uint64_t)(SHARD_MAX_SEGMENTS - 2) * UINT32_MAX);
  round_trip(&m);
  shard_manifest_reset(&m);
  expect_refused(columns, VS_CORRUPT, "$.columns");
  expect_refused(segments, VS_CORRUPT, "$.segments");
  free(most_columns), free(columns), free(most_segments), free(segments);
}

static void odd_bytes_are_refused(void **state) {
  shard_manifest m;
  vs_err err = {0};
  (void)state;
  assert_int_equal(shard_manifest_parse(good_json, sizeof good_json, "the test", &m, &err),
                   VS_CORRUPT); /* with its NUL */
  assert_non_null(strstr(err.text, "NUL"));
  expect_refused("", VS_CORRUPT, "empty");
  expect_refused("null", VS_CORRUPT, "not JSON");
  expect_refused("{}", VS_CORRUPT, "$.format");
  char *big = malloc((size_t)SHARD_MAX_MANIFEST + 1);
  memset(big, ' ', (size_t)SHARD_MAX_MANIFEST + 1);
  vs_err_reset(&err);
  assert_int_equal(shard_manifest_parse(big, (size_t)SHARD_MAX_MANIFEST + 1, "the test", &m, &err), VS_CORRUPT);
  assert_non_null(strstr(err.text, "too large"));
  free(big);
}

/* No prefix is a manifest, and no changed byte does more than change or refuse it: the sanitizers watch. */
static void cut_and_changed_texts_never_crash(void **state) {
  (void)state;
  for (size_t n = 0; n < sizeof good_json - 1; n++) {
    shard_manifest m;
    vs_err err = {0};
    char *cut = malloc(n + 1); /* exact size: an overrun is seen */
    memcpy(cut, good_json, n);
    assert_int_not_equal(shard_manifest_parse(cut, n, "the test", &m, &err), VS_OK);
    free(cut);
    static const char bytes[] = {'"', '0', '\\', '\xff', '}'};
    for (size_t b = 0; b < sizeof bytes; b++) {
      char *changed = strdup(good_json);
      changed[n] = bytes[b];
      if (!parse(changed, &m, &err)) round_trip(&m), shard_manifest_reset(&m);
      free(changed);
    }
  }
}

/* ---- out of memory: SQLite's n-th allocation fails ---- */

static sqlite3_mem_methods real_memory;
static int until_failure = -1; /* allocations that still succeed; -1: all */

static int may_allocate(void) {
  if (until_failure < 0) return 1;
  if (!until_failure) return 0; /* and all that follow */
  until_failure--;
  return 1;
}
static void *fail_malloc(int n) { return may_allocate() ? real_memory.xMalloc(n) : NULL; }
static void *fail_realloc(void *p, int n) { return may_allocate() ? real_memory.xRealloc(p, n) : NULL; }

static void out_of_memory_is_just_that(void **state) {
  static const char needs[] = "\"required\":[\"x\"]";
  char *newer = replaced("\"required\":[]", needs);
  shard_manifest m, good;
  vs_err err;
  vs_rc rc;
  (void)state;
  parse_good(&good);
  for (int n = 0;; n++) {
    until_failure = n;
    rc = parse(good_json, &m, &err);
    until_failure = -1;
    if (!rc) {
      assert_int_equal(m.n_rows, 110);
      shard_manifest_reset(&m);
      break;
    }
    if (rc != VS_NOMEM) fail_msg("allocation %d: %d %s", n, rc, err.text);
  }
  for (int n = 0;; n++) { /* a feature must not go unnoticed for want of memory */
    until_failure = n;
    rc = parse(newer, &m, &err);
    until_failure = -1;
    if (rc == VS_UNSUPPORTED) break;
    if (rc != VS_NOMEM) fail_msg("allocation %d: %d %s", n, rc, err.text);
  }
  char *want, *json;
  assert_int_equal(shard_manifest_print(&good, &want, NULL), VS_OK);
  for (int n = 0;; n++) {
    until_failure = n;
    rc = shard_manifest_print(&good, &json, NULL);
    until_failure = -1;
    if (!rc) break;
    assert_int_equal(rc, VS_NOMEM);
    assert_null(json);
  }
  assert_string_equal(json, want);
  shard_manifest_reset(&good);
  free(want), free(json), free(newer);
}

/* ---- files ---- */

static void path_in(char path[256], const char *dir, const char *name) {
  assert_in_range(snprintf(path, 256, "%s/%s", dir, name), 1, 255);
}

static void write_text(const char *dir, const char *name, const char *text) {
  char path[256];
  path_in(path, dir, name);
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
  assert_int_equal(fclose(f), 0);
}

static void write_version(const char *dir, uint64_t named, const char *version) {
  char name[64], text[64];
  shard_manifest_file(named, name);
  snprintf(text, sizeof text, "\"version\":%s", version);
  char *json = replaced("\"version\":7", text);
  write_text(dir, name, json);
  free(json);
}

/* Entries of a folder, hidden ones too. */
static int count_entries(const char *dir) {
  int n = 0;
  DIR *d = opendir(dir);
  assert_non_null(d);
  for (struct dirent *e; (e = readdir(d));) n += strcmp(e->d_name, ".") && strcmp(e->d_name, "..");
  closedir(d);
  return n;
}

static void new_shard(char dir[256], const char *name) {
  path_in(dir, folder, name);
  assert_int_equal(mkdir(dir, 0700), 0);
}

static void names_invert_the_version(void **state) {
  char name[64];
  (void)state;
  shard_manifest_file(1, name);
  assert_string_equal(name, "manifest-18446744073709551614.json");
  shard_manifest_file(UINT64_MAX - 42, name);
  assert_string_equal(name, "manifest-00000000000000000042.json");
}

static void newest_version_is_read(void **state) {
  static const char *const lookalikes[] = {"manifest-1.json",
                                           "manifest-0000000000000000000a.json",
                                           "manifest-000000000000000000001.json",
                                           "manifest-00000000000000000001.json.bak",
                                           "xmanifest-00000000000000000001.json",
                                           ".manifest-00000000000000000001.tmp-1-abcdef",
                                           "manifest-18446744073709551616.json",
                                           "manifest-99999999999999999999.json",
                                           "manifest-18446744073709551615.json",
                                           "Manifest-00000000000000000001.json",
                                           "manifest--0000000000000000001.json",
                                           "manifest-00000000000000000001_json",
                                           "latest"};
  char dir[256];
  shard_manifest m;
  vs_err err = {0};
  (void)state;
  new_shard(dir, "newest");
  for (size_t i = 0; i < sizeof lookalikes / sizeof *lookalikes; i++) write_text(dir, lookalikes[i], "{}");
  assert_false(shard_dir_is_shard(dir));
  assert_int_equal(shard_manifest_read(dir, 0, &m, &err), VS_NOTFOUND);
  assert_non_null(strstr(err.text, "is not a shard"));
  assert_non_null(strstr(err.text, "vecshard build"));
  const char *const versions[] = {"9", "2", "10", "1"};
  for (size_t i = 0; i < 4; i++) write_version(dir, strtoull(versions[i], NULL, 10), versions[i]);
  assert_true(shard_dir_is_shard(dir));
  for (uint64_t asked = 0; asked <= 2; asked++) {
    vs_err_reset(&err);
    if (shard_manifest_read(dir, asked, &m, &err)) fail_msg("%s", err.text);
    assert_int_equal(m.version, asked ? asked : 10);
    shard_manifest_reset(&m);
  }
  assert_int_equal(shard_manifest_read(dir, 3, &m, &err), VS_NOTFOUND);
  assert_non_null(strstr(err.text, "has no version 3"));
}

static void damaged_files_are_refused(void **state) {
  char dir[256], path[256], name[64];
  shard_manifest m;
  vs_err err = {0};
  (void)state;
  new_shard(dir, "damaged");
  write_version(dir, 5, "6"); /* renamed by somebody */
  assert_int_equal(shard_manifest_read(dir, 0, &m, &err), VS_CORRUPT);
  assert_non_null(strstr(err.text, "states version 6"));
  assert_null(m.columns);
  shard_manifest_file(6, name), path_in(path, dir, name);
  write_text(dir, name, "");
  vs_err_reset(&err);
  assert_int_equal(shard_manifest_read(dir, 0, &m, &err), VS_CORRUPT);
  assert_non_null(strstr(err.text, path));
  assert_int_equal(truncate(path, (off_t)1 << 40), 0); /* sparse; refused before memory is asked for */
  vs_err_reset(&err);
  assert_int_equal(shard_manifest_read(dir, 0, &m, &err), VS_CORRUPT);
  assert_non_null(strstr(err.text, "too large"));
  shard_manifest_file(7, name), path_in(path, dir, name);
  assert_int_equal(mkfifo(path, 0600), 0);
  vs_err_reset(&err);
  assert_int_equal(shard_manifest_read(dir, 0, &m, &err), VS_CORRUPT); /* and does not wait for a writer */
  assert_non_null(strstr(err.text, "regular file"));
  assert_int_equal(unlink(path), 0);
}

static void missing_folders_are_not_found(void **state) {
  char dir[256], file[256], **names = (char **)dir;
  size_t n = 9;
  shard_manifest m;
  vs_err err = {0};
  (void)state;
  path_in(dir, folder, "nowhere");
  assert_int_equal(shard_manifest_read(dir, 0, &m, &err), VS_NOTFOUND);
  assert_non_null(strstr(err.text, "is not a shard"));
  assert_false(shard_dir_is_shard(dir));
  assert_int_equal(shard_dir_list(dir, &names, &n, NULL), VS_NOTFOUND);
  assert_null(names);
  assert_int_equal(n, 0);
  write_text(folder, "plain", "x");
  path_in(file, folder, "plain");
  assert_int_equal(shard_manifest_read(file, 0, &m, NULL), VS_NOTFOUND);
  assert_int_equal(shard_dir_list(file, &names, &n, NULL), VS_NOTFOUND);
}

static void listing_is_sorted_and_holds_shards_only(void **state) {
  static const char *const shards[] = {"b", "a10", "a2", "\xc3\xa9", "Z"}, *const sorted[] = {"Z", "a10", "a2", "b",
                                                                                              "\xc3\xa9"};
  char dir[256], child[512], **names;
  size_t n;
  vs_err err = {0};
  (void)state;
  new_shard(dir, "list");
  assert_int_equal(shard_dir_list(dir, &names, &n, &err), VS_OK);
  assert_int_equal(n, 0);
  shard_names_free(names, n);
  for (size_t i = 0; i < 5; i++) {
    snprintf(child, sizeof child, "%s/%s", dir, shards[i]);
    assert_int_equal(mkdir(child, 0700), 0);
    write_version(child, 1, "1");
  }
  snprintf(child, sizeof child, "%s/.hidden", dir);
  assert_int_equal(mkdir(child, 0700), 0);
  write_version(child, 1, "1");
  snprintf(child, sizeof child, "%s/empty", dir);
  assert_int_equal(mkdir(child, 0700), 0);
  write_text(dir, "file", "x");
  assert_int_equal(shard_dir_list(dir, &names, &n, &err), VS_OK);
  assert_int_equal(n, 5);
  for (size_t i = 0; i < 5; i++) assert_string_equal(names[i], sorted[i]);
  shard_names_free(names, n);
}

/* ---- committing ---- */

static void commit_is_exclusive_and_tidy(void **state) {
  char dir[256];
  shard_manifest m, back;
  vs_err err = {0};
  (void)state;
  new_shard(dir, "commit");
  parse_good(&m);
  if (shard_manifest_commit(dir, &m, &err)) fail_msg("%s", err.text);
  assert_int_equal(count_entries(dir), 1);
  if (shard_manifest_read(dir, 0, &back, &err)) fail_msg("%s", err.text);
  assert_int_equal(back.n_rows, 110);
  shard_manifest_reset(&back);
  m.segments[0].n_rows = 51;
  assert_int_equal(shard_manifest_commit(dir, &m, &err), VS_EXISTS);
  assert_non_null(strstr(err.text, "version 7"));
  assert_int_equal(count_entries(dir), 1);
  assert_int_equal(shard_manifest_read(dir, 0, &back, NULL), VS_OK);
  assert_int_equal(back.segments[0].n_rows, 50); /* the first writer's */
  shard_manifest_reset(&back);
  m.version = 8;
  assert_int_equal(shard_manifest_commit(dir, &m, NULL), VS_OK);
  assert_int_equal(count_entries(dir), 2);
  shard_manifest_reset(&m);
}

static void what_no_reader_accepts_is_not_committed(void **state) {
  char dir[256];
  shard_manifest m;
  (void)state;
  new_shard(dir, "refused");
  for (int i = 0; i < 6; i++) {
    vs_err err = {0};
    parse_good(&m);
    if (i == 0) m.dim = 0;
    if (i == 1) strcpy(m.columns[0].name, "\xff");
    if (i == 2) strcpy(m.segments[0].file, "../x");
    if (i == 3) m.segments[0].n_rows = 1ull << 32;
    if (i == 4) m.segments[0].n_bytes = 1ull << 63;
    if (i == 5) m.version = 0;
    assert_int_equal(shard_manifest_commit(dir, &m, &err), VS_INVALID);
    assert_int_equal(count_entries(dir), 0);
    shard_manifest_reset(&m);
  }
}

static void failed_commits_leave_nothing(void **state) {
  char dir[256], name[64], path[256];
  shard_manifest m;
  vs_err err = {0};
  (void)state;
  parse_good(&m);
  path_in(dir, folder, "nowhere");
  assert_int_equal(shard_manifest_commit(dir, &m, &err), VS_IO);
  assert_non_null(strstr(err.text, dir));
  new_shard(dir, "blocked");
  shard_manifest_file(7, name), path_in(path, dir, name);
  assert_int_equal(symlink("/nonexistent", path), 0); /* in the way: link must not follow or replace it */
  assert_int_equal(shard_manifest_commit(dir, &m, NULL), VS_EXISTS);
  assert_int_equal(count_entries(dir), 1);
  assert_int_equal(unlink(path), 0);
  shard_manifest_reset(&m);
}

/* Write errors: the file size limit makes write fail after a few bytes. In a child, because the limit stays. */
static void full_disk_leaves_nothing(void **state) {
  char dir[256];
  (void)state;
  new_shard(dir, "full");
  pid_t pid = fork();
  if (!pid) {
    const struct rlimit few = {.rlim_cur = 100, .rlim_max = 100};
    shard_manifest m;
    vs_err err;
    if (parse(good_json, &m, &err)) _exit(2);
    signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &few)) _exit(3);
    _exit(shard_manifest_commit(dir, &m, &err) == VS_IO && strstr(err.text, "write failed") ? 0 : 4);
  }
  int status;
  assert_int_equal(waitpid(pid, &status, 0), pid);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 0);
  assert_int_equal(count_entries(dir), 0);
}

enum { MOST_WRITERS = 8, ROUNDS = 20 };

/* A writer's manifest is told from the others' by the rows of its first segment. */
static vs_rc commit_as(const char *dir, unsigned writer, uint64_t version) {
  shard_manifest m;
  vs_err err;
  if (parse(good_json, &m, &err)) return err.rc;
  m.version = version, m.segments[0].n_rows = 1000 + writer;
  vs_rc rc = shard_manifest_commit(dir, &m, NULL);
  shard_manifest_reset(&m);
  return rc;
}

static void check_winner(const char *dir, const vs_rc *rcs, unsigned n, uint64_t version) {
  unsigned winners = 0, winner = 0;
  shard_manifest m;
  vs_err err = {0};
  for (unsigned i = 0; i < n; i++) {
    if (rcs[i] == VS_OK) winners++, winner = i;
    else assert_int_equal(rcs[i], VS_EXISTS);
  }
  assert_int_equal(winners, 1);
  if (shard_manifest_read(dir, version, &m, &err)) fail_msg("%s", err.text);
  assert_int_equal(m.segments[0].n_rows, 1000 + winner);
  shard_manifest_reset(&m);
  assert_int_equal(count_entries(dir), version);
}

typedef struct writer {
  pthread_t thread;
  pthread_barrier_t *start;
  const char *dir;
  unsigned number;
  uint64_t version;
  vs_rc rc;
} writer;

static void *write_in_thread(void *p) {
  writer *w = p;
  pthread_barrier_wait(w->start);
  w->rc = commit_as(w->dir, w->number, w->version);
  return NULL;
}

static void threads_race(const char *dir, unsigned n) {
  for (uint64_t version = 1; version <= ROUNDS; version++) {
    writer w[MOST_WRITERS];
    vs_rc rcs[MOST_WRITERS];
    pthread_barrier_t start;
    pthread_barrier_init(&start, NULL, n);
    for (unsigned i = 0; i < n; i++) {
      w[i] = (writer){.start = &start, .dir = dir, .number = i, .version = version};
      assert_int_equal(pthread_create(&w[i].thread, NULL, write_in_thread, &w[i]), 0);
    }
    for (unsigned i = 0; i < n; i++) pthread_join(w[i].thread, NULL), rcs[i] = w[i].rc;
    pthread_barrier_destroy(&start);
    check_winner(dir, rcs, n, version);
  }
}

/* The children wait for the pipe to close, so that they start together. */
static void processes_race(const char *dir, unsigned n) {
  for (uint64_t version = 1; version <= ROUNDS; version++) {
    pid_t pids[MOST_WRITERS];
    vs_rc rcs[MOST_WRITERS];
    int gate[2], status;
    assert_int_equal(pipe(gate), 0);
    for (unsigned i = 0; i < n; i++) {
      if ((pids[i] = fork())) continue;
      char byte;
      close(gate[1]);
      while (read(gate[0], &byte, 1) < 0) continue;
      _exit((int)commit_as(dir, i, version));
    }
    close(gate[0]), close(gate[1]);
    for (unsigned i = 0; i < n; i++) {
      assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
      assert_true(WIFEXITED(status));
      rcs[i] = (vs_rc)WEXITSTATUS(status);
    }
    check_winner(dir, rcs, n, version);
  }
}

static void one_of_two_threads_wins(void **state) {
  char dir[256];
  (void)state;
  new_shard(dir, "threads2");
  threads_race(dir, 2);
}
static void one_of_eight_threads_wins(void **state) {
  char dir[256];
  (void)state;
  new_shard(dir, "threads8");
  threads_race(dir, 8);
}
static void one_of_two_processes_wins(void **state) {
  char dir[256];
  (void)state;
  new_shard(dir, "processes2");
  processes_race(dir, 2);
}
static void one_of_eight_processes_wins(void **state) {
  char dir[256];
  (void)state;
  new_shard(dir, "processes8");
  processes_race(dir, 8);
}

static int make_folder(void **state) {
  (void)state;
  strcpy(folder, "/tmp/vs_test_manifest-XXXXXX");
  return mkdtemp(folder) ? 0 : -1;
}
static int remove_folder(void **state) {
  char command[100];
  (void)state;
  snprintf(command, sizeof command, "rm -r '%s'", folder);
  return system(command);
}

int main(void) {
  sqlite3_mem_methods failing;
  if (sqlite3_config(SQLITE_CONFIG_GETMALLOC, &real_memory)) return 1;
  failing = real_memory;
  failing.xMalloc = fail_malloc, failing.xRealloc = fail_realloc;
  /* No lookaside: it would serve most allocations before they can fail. */
  if (sqlite3_config(SQLITE_CONFIG_MALLOC, &failing) || sqlite3_config(SQLITE_CONFIG_LOOKASIDE, 0, 0) ||
      sqlite3_initialize())
    return 1;
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(good_manifest_is_read),
      cmocka_unit_test(printing_round_trips),
      cmocka_unit_test(names_need_escaping),
      cmocka_unit_test(unknown_keys_are_skipped),
      cmocka_unit_test(origin_may_be_missing),
      cmocka_unit_test(invalid_structs_are_not_printed),
      cmocka_unit_test(hostile_manifests_are_refused),
      cmocka_unit_test(lengths_have_limits),
      cmocka_unit_test(counts_have_limits),
      cmocka_unit_test(odd_bytes_are_refused),
      cmocka_unit_test(cut_and_changed_texts_never_crash),
      cmocka_unit_test(out_of_memory_is_just_that),
      cmocka_unit_test(names_invert_the_version),
      cmocka_unit_test(newest_version_is_read),
      cmocka_unit_test(damaged_files_are_refused),
      cmocka_unit_test(missing_folders_are_not_found),
      cmocka_unit_test(listing_is_sorted_and_holds_shards_only),
      cmocka_unit_test(commit_is_exclusive_and_tidy),
      cmocka_unit_test(what_no_reader_accepts_is_not_committed),
      cmocka_unit_test(failed_commits_leave_nothing),
      cmocka_unit_test(full_disk_leaves_nothing),
      cmocka_unit_test(one_of_two_threads_wins),
      cmocka_unit_test(one_of_eight_threads_wins),
      cmocka_unit_test(one_of_two_processes_wins),
      cmocka_unit_test(one_of_eight_processes_wins),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
