/* upload.h - files into a store: whole or in parts, many at once, verified, resumable. */
#ifndef UPLOAD_H
#define UPLOAD_H
#include "../ext/s3vfs/s3_client.h"

typedef struct upload_file {
  char *key, *path;          /* the owner's */
  uint64_t size;             /* the file must have it */
  const char *checksum;      /* 32 hex digits: XXH3-128 of the content, checked before the object appears */
} upload_file;

typedef struct upload {
  s3_place *place;
  const upload_file *files;
  size_t n_files;
  int jobs;                  /* requests at once; 0: up to 8, as memory allows */
  uint64_t memory;           /* for what is under way: each request holds a part, or a file that is sent whole */
  uint64_t part_size;        /* of files that are larger; 0: by their size */
  void (*progress)(void *ctx, uint64_t n_bytes, int is_new); /* so many more are there, sent or found; not at once */
  void *ctx;
  uint64_t n_sent, n_reused; /* out: bytes, of these files and of parts that an earlier, unfinished upload had sent */
} upload;

/* Bytes of one part: at least 16 MiB, more where 10,000 parts would not reach. */
uint64_t upload_part_size(uint64_t size);

/* Sends the files, in their order as far as they begin. Stopped or failing it leaves the parts that were sent, for the
 * next run. A file whose content is not what its checksum says is VS_CORRUPT, and nothing of it appears. VS_INVALID,
 * with advice, when the memory does not hold the parts. */
vs_rc upload_files(upload *u, vs_err *err) VS_WARN_UNUSED;

#endif
