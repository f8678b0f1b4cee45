/* build_folder.h - the working folder of a build: `.vecshard-build-<hash of the shard's folder>` below the temporary folder.
 *
 * It holds the large temporary files and, after each finished stage, what a later build needs to go on from there (ivfpq_stages.h).
 * Only its owner may write in it: who could put files there could steer a build. A lock on it tells a build at work from one that
 * was killed; what that one left is used by --resume when its key is the same, and removed otherwise. The file `key` tells what
 * was being built: a line for each option and input that decides the bytes.
 */
#ifndef BUILD_FOLDER_H
#define BUILD_FOLDER_H
#include "tool.h"

typedef struct build_folder {
  char *path; /* NULL: not open */
  int lock;
} build_folder;

/* Makes or takes over the folder for a build of `out` (which exists). *resume goes in as whether --resume was given, and out as
 * whether what is there is of the same build; notes say why not, and what was removed. */
vs_rc build_folder_open(build_folder *f, const char *tmpdir, const char *out, const char *key, int *resume, vs_err *err) VS_WARN_UNUSED;
/* Bytes of the files in it. */
uint64_t build_folder_bytes(const build_folder *f);
int build_folder_has(const build_folder *f, const char *name);
/* keep: leave the folder when a stage was finished in it, and say so; else it is removed. */
void build_folder_close(build_folder *f, int keep);
/* What a killed build of `out` left, once there is a shard. */
void build_folder_drop(const char *tmpdir, const char *out);

#endif
