/* s3_reader.h - an object read as a file is: here and there, or from one end to the other.
 *
 * Opening is one request, which brings the size, the ETag and the first block. After that blocks of 64 KiB come through io_s3
 * (shared cache, pinned to the ETag). A reader that goes on where it stopped gets twice as much each time, up to 8 MiB in
 * parallel requests, and the next such window is on its way while the present one is used.
 *
 * Threads: one at a time per reader, as SQLite uses a file. Waits obey the vs_scope of the calling thread.
 */
#ifndef S3_READER_H
#define S3_READER_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

typedef struct s3_reader s3_reader;

vs_rc s3_reader_open(const char *uri, s3_reader **out, vs_err *err) VS_WARN_UNUSED;
uint64_t s3_reader_size(const s3_reader *r);
const char *s3_reader_name(const s3_reader *r); /* for messages: never a secret */
/* [off, off + n) must lie inside the object. */
vs_rc s3_reader_read(s3_reader *r, uint64_t off, size_t n, void *dst, vs_err *err) VS_WARN_UNUSED;
void s3_reader_close(s3_reader *r); /* NULL is legal */

#endif
