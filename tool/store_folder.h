/* store_folder.h - a prefix of a bucket as a folder: what lies in it, in one listing. */
#ifndef STORE_FOLDER_H
#define STORE_FOLDER_H
#include "../ext/s3vfs/s3_client.h"
#include "tool.h"

typedef struct store_object { char *name, *etag; uint64_t size; } store_object; /* name: without the folder's prefix */

typedef struct store_folder {
  s3_place *place;
  char *uri;             /* without '/' at its end */
  char *prefix;          /* of its objects' keys: "" or with '/' at its end */
  /* listed */
  store_object *objects; /* directly in it, ascending by name */
  size_t n_objects, room;
  tool_list folders;     /* names of those in it */
  uint64_t newest;       /* the version of its newest manifest; 0: it is no shard */
} store_folder;

/* uri: s3://bucket or s3://bucket/prefix. place: NULL, or the one of another folder of the bucket, to be shared. */
vs_rc store_folder_open(const char *uri, s3_place *place, store_folder *out, vs_err *err) VS_WARN_UNUSED;
vs_rc store_folder_list(store_folder *f, vs_err *err) VS_WARN_UNUSED;
const store_object *store_folder_find(const store_folder *f, const char *name); /* NULL: it was not listed */
char *store_folder_key(const store_folder *f, const char *name);                /* for free */
/* The text of a manifest, malloc'ed and NUL terminated, and its ETag. */
vs_rc store_folder_manifest(const store_folder *f, uint64_t version, char **text, char etag[S3_ETAG_MAX],
                            vs_err *err) VS_WARN_UNUSED;
void store_folder_reset(store_folder *f); /* legal on a zeroed struct */

/* May a segment be called so? A manifest could name files that mean something else in the folder of a shard. */
int store_is_segment_name(const char *name);
/* Is it like s3://bucket...? */
int store_is_uri(const char *text);

#endif
