/* test_embed.c - vecshard linked into a program: as an automatic extension of every connection, and on one connection; loading it
 * twice is harmless; an allocation that fails anywhere gives an error, not a crash. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/vecshard.h"

static char *scalar(sqlite3 *db, const char *sql) {
  sqlite3_stmt *s = NULL;
  char *text = NULL;
  if (sqlite3_prepare_v2(db, sql, -1, &s, NULL) == SQLITE_OK && sqlite3_step(s) == SQLITE_ROW && sqlite3_column_text(s, 0))
    text = strdup((const char *)sqlite3_column_text(s, 0));
  sqlite3_finalize(s);
  return text;
}

static void expect(sqlite3 *db, const char *sql, const char *want) {
  char *have = scalar(db, sql);
  assert_non_null(have);
  assert_string_equal(have, want);
  free(have);
}

static void test_one_connection(void **state) {
  sqlite3 *db;
  (void)state;
  assert_int_equal(sqlite3_open(":memory:", &db), SQLITE_OK);
  assert_null(scalar(db, "SELECT vecshard_version()"));
  assert_int_equal(sqlite3_vecshard_init(db, NULL, NULL), SQLITE_OK);
  expect(db, "SELECT vecshard_version()", VECSHARD_VERSION);
  expect(db, "SELECT vec_to_json(vec_add('[1,2]', '[3,4]'))", "[4,6]");
  assert_int_equal(sqlite3_vecshard_init(db, NULL, NULL), SQLITE_OK); /* once more */
  expect(db, "SELECT vecshard_version()", VECSHARD_VERSION);
  assert_int_equal(sqlite3_close(db), SQLITE_OK);
}

static void test_every_connection(void **state) {
  sqlite3 *db[3];
  (void)state;
  assert_int_equal(sqlite3_auto_extension((void (*)(void))sqlite3_vecshard_init), SQLITE_OK);
  for (int i = 0; i < 3; i++) {
    assert_int_equal(sqlite3_open(":memory:", &db[i]), SQLITE_OK);
    expect(db[i], "SELECT vec_length('[1,2,3]')", "3");
    expect(db[i], "SELECT count(*) FROM shard_trace", "5");
  }
  for (int i = 0; i < 3; i++) assert_int_equal(sqlite3_close(db[i]), SQLITE_OK);
  sqlite3_reset_auto_extension();
}

/* ---- allocations that fail ---- */

static sqlite3_mem_methods real;
static long fail_at = -1, allocations;

static int fails(void) { return fail_at >= 0 && allocations++ == fail_at; }
static void *failing_malloc(int n) { return fails() ? NULL : real.xMalloc(n); }
static void *failing_realloc(void *p, int n) { return fails() ? NULL : real.xRealloc(p, n); }

static void run_statements(sqlite3 *db) {
  static const char *const statements[] = {
      "SELECT vec_to_json(vec_normalize('[3,4]')), vec_distance_l2('[1,2]', x'0000803f00000040')",
      "SELECT count(*) FROM vec_each('[1,2,3]')",
      "SELECT length(vec_pack(value, rowid)) FROM (SELECT '[1,2]' AS value, 1 AS rowid UNION ALL SELECT '[3,4]', 2)",
      "SELECT * FROM shard_list('/nonexistent/place')",
      "SELECT * FROM shard_union('[\"/nonexistent/a\", \"/nonexistent/b\"]', '[1,2]', 3)",
      "CREATE VIRTUAL TABLE t USING vecshard(id TEXT PRIMARY KEY, embedding FLOAT[4], path='/nonexistent/place')",
      "SELECT vecshard_config('threads'), vecshard_cpu()",
  };
  for (size_t i = 0; i < sizeof statements / sizeof *statements; i++) {
    sqlite3_stmt *s = NULL;
    if (sqlite3_prepare_v2(db, statements[i], -1, &s, NULL) == SQLITE_OK)
      while (sqlite3_step(s) == SQLITE_ROW) continue;
    sqlite3_finalize(s);
  }
}

/* SQLite's allocator fails once, at every place in turn; afterwards the connection answers as before. */
static void test_failing_allocations(void **state) {
  (void)state;
  sqlite3_shutdown();
  assert_int_equal(sqlite3_config(SQLITE_CONFIG_GETMALLOC, &real), SQLITE_OK);
  sqlite3_mem_methods failing = real;
  failing.xMalloc = failing_malloc, failing.xRealloc = failing_realloc;
  assert_int_equal(sqlite3_config(SQLITE_CONFIG_MALLOC, &failing), SQLITE_OK);
  long total = 1;
  for (long at = 0; at < total; at += at < 3000 ? 1 : 7) {
    sqlite3 *db = NULL;
    fail_at = -1;
    assert_int_equal(sqlite3_open(":memory:", &db), SQLITE_OK);
    allocations = 0, fail_at = at;
    int rc = sqlite3_vecshard_init(db, NULL, NULL);
    assert_true(rc == SQLITE_OK || rc == SQLITE_NOMEM || rc == SQLITE_ERROR);
    run_statements(db);
    if (allocations > total) total = allocations;
    fail_at = -1;
    if (rc == SQLITE_OK) expect(db, "SELECT vec_to_json('[1,2]')", "[1,2]");
    assert_int_equal(sqlite3_close(db), SQLITE_OK);
  }
  assert_true(total > 500);
  sqlite3_shutdown();
  sqlite3_config(SQLITE_CONFIG_MALLOC, &real);
  sqlite3_initialize();
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_one_connection), cmocka_unit_test(test_every_connection),
                                     cmocka_unit_test(test_failing_allocations)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
