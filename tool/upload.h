/* upload.h - one file into a store: whole or in parts, verified, resumable. */
#ifndef UPLOAD_H
#define UPLOAD_H
#include "../ext/s3vfs/s3_client.h"

typedef struct upload {
  s3_place *place;
  const char *key, *path;
  uint64_t size;             /* the file must have it */
  const char *checksum;      /* 32 hex digits: XXH3-128 of the content, checked before the object appears */
  int jobs;                  /* parts under way at once; each is held in memory */
  uint64_t part_size;        /* 0: from the size */
  void (*progress)(void *ctx, uint64_t bytes); /* so many more were sent, or found there; from any thread, not at once */
  void *ctx;
  uint64_t n_reused;         /* out: bytes of parts that an earlier, unfinished upload had sent */
} upload;

/* Bytes of one part: at least 16 MiB, more where 10,000 parts would not reach. */
uint64_t upload_part_size(uint64_t size);
/* Stopped or failing it leaves the parts that were sent, for the next run. A file whose content is not what the checksum says is
 * VS_CORRUPT, and nothing of it appears. */
vs_rc upload_file(upload *u, vs_err *err) VS_WARN_UNUSED;

#endif
