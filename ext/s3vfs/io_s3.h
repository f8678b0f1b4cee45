/* io_s3.h - objects of a store behind vs_io, and the RAM cache that all of them share.
 *
 * Each range that is fetched becomes an extent of the cache, found again by (object, offset, length): index files are read in
 * natural pieces (a partition, a row), so extents hold what a later query asks for and nothing else. Ranges that several
 * threads want at once are read once. Ranges that lie close together travel in one request, large ones in several. Every read is
 * pinned to the object's ETag.
 *
 * The cache holds at most VECSHARD_CACHE_MB (default: the smaller of 1 GiB and a quarter of the memory that this process may
 * have); extents in use do not count as evictable, so a query's working set may exceed a very small limit while it runs.
 */
#ifndef IO_S3_H
#define IO_S3_H
#include "../base/vs_io.h"
#include "s3_client.h"

enum {
  IO_S3_MERGE_GAP = 32 << 10, /* ranges closer than this travel together ... */
  IO_S3_MERGE_MAX = 8 << 20,  /* ... up to this size; larger ranges are split in pieces of ... */
  IO_S3_SPLIT = 4 << 20
};

typedef struct io_s3_known {
  uint64_t size;        /* UINT64_MAX: unknown */
  const char *etag;     /* NULL: taken from the first answer */
  const char *checksum; /* of the content, from a manifest: names the extents in the cache. NULL: the ETag does */
} io_s3_known;

/* known may be NULL, or may not know size or both names: then the object's head is asked for. The place gains an owner. */
vs_rc io_s3_open(s3_place *place, const char *key, const io_s3_known *known, vs_io **out, vs_err *err) VS_WARN_UNUSED;

/* Bytes of the object that are known already: ranges inside are answered from here until io_s3_unprime. bytes is malloc'ed and
 * taken, also on failure. Not for use beside other threads. */
vs_rc io_s3_prime(vs_io *io, uint64_t off, uint64_t len, uint8_t *bytes, vs_err *err) VS_WARN_UNUSED;
void io_s3_unprime(vs_io *io);

typedef struct io_s3_cache { uint64_t limit, bytes, extents, pinned; } io_s3_cache; /* bytes of data; pinned: in use */
io_s3_cache io_s3_cache_state(void);
void io_s3_cache_limit(uint64_t bytes); /* evicts down to it */
uint64_t io_s3_max_bytes(void);         /* of the scope, else VECSHARD_MAX_BYTES, else 4 GiB; 0 in either: no limit */

#endif
