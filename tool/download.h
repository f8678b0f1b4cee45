/* download.h - one object of a store into a file: in parallel, verified, resumable. */
#ifndef DOWNLOAD_H
#define DOWNLOAD_H
#include "../ext/s3vfs/s3_client.h"

typedef struct download {
  s3_place *place;
  const char *key, *path; /* the file appears when it is complete; until then it is PATH.part, with PATH.map beside it */
  uint64_t size;
  const char *checksum;   /* 32 hex digits: XXH3-128 of the content */
  int jobs;               /* requests at once */
  void (*progress)(void *ctx, uint64_t bytes); /* so many more are there; from any thread, not at once */
  void *ctx;
} download;

/* 1: path is a file with this size and checksum already. */
int download_is_done(const char *path, uint64_t size, const char *checksum);
/* Stopped or failing it leaves what arrived, for the next run. */
vs_rc download_file(download *d, vs_err *err) VS_WARN_UNUSED;

#endif
