/* s3_vfs.h - the SQLite VFS "s3": databases on a store, read-only.
 *
 *   ATTACH 'file:s3://bucket/any.db?vfs=s3' AS cold;
 *   ATTACH 'file:https://host/path/any.db?vfs=s3' AS cold;
 *   ATTACH 'file:https://host/any.db%3FX-Amz-Signature=...%26X-Amz-Expires=...?vfs=s3' AS cold;  -- a signed URL
 *   SELECT s3_last_error();   -- why an ATTACH or a read of this connection failed last; NULL: none did
 *
 * The connection must allow URIs (C: SQLITE_OPEN_URI, Python: uri=True). In a signed URL '?' is written %3F, '&' %26, '%' %25.
 */
#ifndef S3_VFS_H
#define S3_VFS_H
#include "sqlite3ext.h"

/* Registers the VFS, once per process (and per copy of SQLite in it); not as the default. Starts nothing. */
int s3_vfs_register(void);
/* Makes a connection known to the VFS: it gets s3_last_error(), and an ATTACH on it can be interrupted. */
int s3_vfs_connect(sqlite3 *db);

#endif
