/* vecshard.c - the entry point: registers modules and functions, and holds no logic.
 *
 *   .load build/vecshard
 *   SELECT vecshard_version(), vecshard_cpu();
 */
#include "vecshard.h"

#include "s3vfs/s3_vfs.h"
#include "vtab/modules.h"
#include "vtab/vec_functions.h"
SQLITE_EXTENSION_INIT1

enum { OLDEST_SQLITE = 3040000 };

__attribute__((visibility("default"))) int sqlite3_vecshard_init(sqlite3 *db, char **message, const sqlite3_api_routines *api) {
  SQLITE_EXTENSION_INIT2(api);
  (void)api;
  if (sqlite3_libversion_number() < OLDEST_SQLITE) {
    if (message) *message = sqlite3_mprintf("vecshard needs SQLite 3.40 or later, this is %s", sqlite3_libversion());
    return SQLITE_ERROR;
  }
  conn *c = conn_new(db);
  if (!c) return SQLITE_NOMEM;
  int rc = vec_functions_register(db);
  if (!rc) rc = vec_each_register(db);
  if (!rc) rc = conn_config_register(c);
  if (!rc) rc = vecshard_table_register(c);
  if (!rc) rc = union_table_register(c);
  if (!rc) rc = info_tables_register(c);
  if (!rc) rc = recall_table_register(c);
  if (!rc) rc = s3_vfs_register();
  if (!rc) rc = s3_vfs_connect(db);
  if (!rc) rc = s3_functions_register(c);
  conn_release(c);
  if (rc) return rc;
#ifdef SQLITE_CORE
  return SQLITE_OK;
#else
  return SQLITE_OK_LOAD_PERMANENTLY; /* a thread or a fork handler in an unloaded library would crash the process */
#endif
}
