/* download.h - one object of a store into a file: in parallel, verified, resumable. */
#ifndef DOWNLOAD_H
#define DOWNLOAD_H
#include "../ext/s3vfs/s3_client.h"

typedef struct download {
  s3_place *place;
  const char *key, *etag; /* every read is pinned to this version */
  const char *path;       /* the file appears when it is complete; until then it is DIR/.NAME.part, with .NAME.map */
  uint64_t size;
  const char *checksum;   /* 32 hex digits: XXH3-128 of the content */
  int jobs;               /* requests at once, each with some 16 MiB in memory */
  void (*progress)(void *ctx, uint64_t n_bytes, int is_new); /* so many more are there, received or found; not at once */
  void *ctx;
} download;

/* *done: path is a file with this size and checksum already. Reads all of it; progress may be NULL. */
vs_rc download_is_done(const download *d, int *done, vs_err *err) VS_WARN_UNUSED;
/* Stopped or failing it leaves what arrived, for the next run. VS_EXISTS when another process is at the same file. */
vs_rc download_file(const download *d, vs_err *err) VS_WARN_UNUSED;
/* Bytes that are still to come. */
uint64_t download_missing(const download *d);
/* Removes parts of files that nobody is fetching any more: call it when all that is wanted is there. */
void download_drop_leftovers(const char *dir);

#endif
