/* vecshard_hdf5.c - entry point of vecshard_hdf5.so: registers the table-valued function hdf5_vectors. Apart from
 * vecshard.so, so that a deployment that only queries does not need libhdf5.
 *
 *   .load build/vecshard_hdf5
 */
#include <sqlite3ext.h>
SQLITE_EXTENSION_INIT1

int hdf5_vectors_register(sqlite3 *db); /* ext/vtab/hdf5_vectors.c */

__attribute__((visibility("default"))) int sqlite3_vecshardhdf_init(sqlite3 *db, char **errmsg,
                                                                    const sqlite3_api_routines *api);

int sqlite3_vecshardhdf_init(sqlite3 *db, char **errmsg, const sqlite3_api_routines *api) {
  int rc;
  SQLITE_EXTENSION_INIT2(api);
  if (sqlite3_libversion_number() < 3040000) {
    if (errmsg) *errmsg = sqlite3_mprintf("vecshard_hdf5 needs SQLite 3.40 or later, this is %s", sqlite3_libversion());
    return SQLITE_ERROR;
  }
  rc = hdf5_vectors_register(db);
  /* libhdf5 registers exit handlers and keeps state: it must not be unloaded. */
  return rc ? rc : SQLITE_OK_LOAD_PERMANENTLY;
}
