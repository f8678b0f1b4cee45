/* vecshard.h - linking vecshard into an application (build/libvecshard.a).
 *
 *   #include <sqlite3.h>
 *   #include "vecshard.h"
 *   ...
 *   sqlite3_auto_extension((void (*)(void))sqlite3_vecshard_init);   // every connection opened from now on, or
 *   sqlite3_vecshard_init(db, &message, NULL);                       // this one
 *
 * Link with -lsqlite3 -lcurl -lexpat -lcrypto -lm -lpthread. SQLite 3.40 or later. The loadable form, build/vecshard.so, has
 * the same entry point.
 */
#ifndef VECSHARD_H
#define VECSHARD_H
#define VECSHARD_VERSION "0.1.0"

#ifdef __cplusplus
extern "C" {
#endif

struct sqlite3;
struct sqlite3_api_routines;

/* Registers modules and functions on db; may be called again on the same connection. Returns an SQLite result code (SQLITE_OK,
 * or SQLITE_OK_LOAD_PERMANENTLY from the loadable form); on failure *message is a text for sqlite3_free. */
int sqlite3_vecshard_init(struct sqlite3 *db, char **message, const struct sqlite3_api_routines *api);

#ifdef __cplusplus
}
#endif
#endif
