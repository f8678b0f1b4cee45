/* db_interrupt.c - see db_interrupt.h.
 *
 * From 3.41 sqlite3_is_interrupted tells. Before, one space is prepared as a statement: the tokenizer looks for an interrupt at
 * each space, and nothing else happens, no code is made, no authorizer or trace is called. (Stepping a statement tells as well,
 * but one that is kept for that lets sqlite3_close fail.) Preparing takes the mutexes of shared caches, and may give up one in
 * between that a read in progress relies on: before 3.41 a VFS must not ask on behalf of a file opened with cache=shared.
 */
#include "db_interrupt.h"

#include <stddef.h>
#include <string.h>
SQLITE_EXTENSION_INIT3

/* For headers older than the library: the call table grows at its end. */
static int api_is_interrupted(sqlite3 *db) {
#if SQLITE_VERSION_NUMBER >= 3041000
  return sqlite3_is_interrupted(db);
#elif defined SQLITE_CORE
  extern int sqlite3_is_interrupted(sqlite3 *) __attribute__((weak));
  return sqlite3_is_interrupted && sqlite3_is_interrupted(db);
#else
  int (*is_interrupted)(sqlite3 *);
  memcpy(&is_interrupted, (const char *)sqlite3_api + offsetof(sqlite3_api_routines, value_encoding) + sizeof(void (*)(void)),
         sizeof is_interrupted);
  return is_interrupted(db);
#endif
}

int db_is_running(sqlite3 *db, const char *pattern) {
  for (sqlite3_stmt *s = sqlite3_next_stmt(db, NULL); s; s = sqlite3_next_stmt(db, s)) {
    const char *sql = sqlite3_sql(s);
    if (sqlite3_stmt_busy(s) && (!pattern || (sql && !sqlite3_strlike(pattern, sql, 0)))) return 1;
  }
  return 0;
}

int db_is_interrupted(sqlite3 *db) {
  if (sqlite3_libversion_number() >= DB_INTERRUPT_IS_PLAIN_SINCE) return api_is_interrupted(db) && db_is_running(db, NULL);
  sqlite3_stmt *nothing = NULL;
  int rc = sqlite3_prepare_v2(db, " ", -1, &nothing, NULL);
  sqlite3_finalize(nothing);
  return rc == SQLITE_INTERRUPT;
}
