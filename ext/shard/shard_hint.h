/* shard_hint.h - the object `latest` of a shard in a store: what a reader would ask for first, in one piece.
 *
 * It holds the newest manifest and, of its segments, the bytes that opening them reads (trailer, footer, parameters with the
 * centroids of the groups, mean), as far as they fit into SHARD_HINT_MAX. A reader lists the newest manifest and gets `latest`
 * in the same round, and uses the hint when both name the same manifest object (version and ETag). Missing, stale or damaged
 * it costs rounds and nothing else.
 *
 *   header (64 bytes)  magic "VSHINT\0\0" | u32 format 0 | u32 n_ranges | u64 version | u32 etag bytes | u32 manifest bytes |
 *                      u64 XXH3-64 of all that follows the header | 24 bytes reserved, zero
 *   the ETag of the manifest object | the manifest (JSON) | n_ranges x { u32 segment | u32 0 | u64 off | u64 len } |
 *   the bytes of the ranges, one after another
 */
#ifndef SHARD_HINT_H
#define SHARD_HINT_H
#include "../base/vs_io.h"
#include "shard_manifest.h"

#define SHARD_HINT_NAME "latest"
enum { SHARD_HINT_MAX = 1 << 20, SHARD_HINT_READ_MAX = 4 << 20 };

/* The hint for version m of the local shard in dir, whose manifest object has manifest_etag. *body is malloc'ed. */
vs_rc shard_hint_make(const char *dir, const shard_manifest *m, const char *manifest_etag, uint8_t **body, size_t *n,
                      vs_err *err) VS_WARN_UNUSED;

/* A hint as it came from a store: hostile. */
typedef struct shard_hint {
  const uint8_t *body;
  uint64_t version;
  uint32_t n_ranges, etag_len, manifest_len;
  const char *etag, *manifest; /* not NUL terminated; point into body */
  const uint8_t *ranges, *bytes;
} shard_hint;
/* 0: not to be used. out points into body. */
int shard_hint_read(const uint8_t *body, size_t n, shard_hint *out);
/* The i-th range: its segment (as numbered in the manifest), and a malloc'ed copy of its bytes for io_s3_prime. */
vs_rc shard_hint_range(const shard_hint *h, uint32_t i, uint32_t *segment, uint64_t *off, uint64_t *len, uint8_t **copy,
                       vs_err *err) VS_WARN_UNUSED;

#endif
