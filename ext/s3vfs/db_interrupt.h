/* db_interrupt.h - was sqlite3_interrupt called for what a connection does now? */
#ifndef DB_INTERRUPT_H
#define DB_INTERRUPT_H
#include "sqlite3ext.h"

enum { DB_INTERRUPT_IS_PLAIN_SINCE = 3041000 }; /* SQLite's version: see below */

/* To be asked every few milliseconds on the thread that uses the connection, also from inside a VFS method. Only a running
 * statement can be interrupted: what is left of a call that met none counts for nothing. */
int db_is_interrupted(sqlite3 *db);
/* Is a statement running (one whose text is LIKE `pattern`, if that is not NULL)? */
int db_is_running(sqlite3 *db, const char *pattern);

#endif
