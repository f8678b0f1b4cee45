/* transfer.h - what uploads and downloads have in common: checksums of files, ETags, time limits. */
#ifndef TRANSFER_H
#define TRANSFER_H
#include <stddef.h>
#include <stdint.h>

/* The XXH3-128 of bytes that come in order. */
typedef struct transfer_hash transfer_hash;
transfer_hash *transfer_hash_new(void); /* NULL without memory */
void transfer_hash_add(transfer_hash *h, const void *p, size_t n);
int transfer_hash_is(const transfer_hash *h, const char *hex); /* 32 lower-case digits, as in a manifest */
void transfer_hash_free(transfer_hash *h);                     /* NULL is legal */

/* Does a store's ETag, with or without its quotes, prove that it has these very bytes? Most give the MD5 of what one
 * request sent. Encrypted buckets and multipart objects have other ETags: a no proves nothing. */
int transfer_is_md5(const char *etag, const void *p, size_t n);

/* Gives requests of this thread, and of the pool for it, the time that a slow line needs for so many bytes under way at
 * once: a second per 256 KiB on top of the usual limit. Returns the value to go back to with transfer_reset_time. */
int64_t transfer_allow_time(uint64_t n_bytes);
void transfer_reset_time(int64_t before);

#endif
