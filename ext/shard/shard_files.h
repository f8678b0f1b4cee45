/* shard_files.h - the files of a shard, in a folder or a store, one by one: for verifying and showing what a shard that may not
 * even open consists of. */
#ifndef SHARD_FILES_H
#define SHARD_FILES_H
#include "../base/vs_io.h"
#include "shard_manifest.h"

/* The shards that a path names: itself or, when it is a database, those in it in order. For shard_names_free. VS_NOTFOUND, with
 * advice, when there are none. */
vs_rc shard_paths(const char *path, char ***paths, size_t *n, vs_err *err) VS_WARN_UNUSED;

struct remote_shard;
typedef struct shard_files {
  char *path;
  shard_manifest manifest;     /* the newest */
  struct remote_shard *remote; /* NULL: a folder */
} shard_files;
vs_rc shard_files_open(const char *path, shard_files *out, vs_err *err) VS_WARN_UNUSED;
/* The i-th segment of the manifest. A local file is not mapped: one that is cut meanwhile is an error, not a SIGBUS. */
vs_rc shard_files_segment(const shard_files *f, size_t i, vs_io **out, vs_err *err) VS_WARN_UNUSED;
/* In a store: where the i-th segment is. *place gains an owner, *key is malloc'ed. VS_INVALID for a folder. */
struct s3_place;
vs_rc shard_files_locate(const shard_files *f, size_t i, struct s3_place **place, char **key, vs_err *err) VS_WARN_UNUSED;
void shard_files_reset(shard_files *f); /* legal on a zeroed struct */

#endif
