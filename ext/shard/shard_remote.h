/* shard_remote.h - finding and opening shards in a store, many at once: what can go out together is one round.
 *
 * Round 1: the listing that names the newest manifest, and `latest` beside it. Round 2, only for shards whose hint does not
 * serve: the manifest. Round 3, only for those again: the ends of their segments. For ext/shard only.
 */
#ifndef SHARD_REMOTE_H
#define SHARD_REMOTE_H
#include "../s3vfs/s3_client.h"
#include "shard.h"

typedef struct remote_shard {
  char *uri;               /* without '/' at the end */
  uint64_t want;           /* the version asked for; 0: the newest */
  int look_below;          /* it may be a database: list what it holds */
  /* found */
  s3_place *place;
  char *prefix;            /* of its objects' keys, with '/' at the end unless empty */
  uint64_t version;        /* 0: there is no manifest */
  char etag[S3_ETAG_MAX];  /* of the manifest */
  char **children;         /* look_below: folders in it, in order */
  size_t n_children;
  /* loaded */
  shard_manifest manifest;
  ivfpq_segment **segments;
  /* under way */
  struct s3_job *list, *hint, *get;
  int more;
} remote_shard;

/* place: NULL, or the one of the database it lies in. uri is copied. */
vs_rc remote_shard_init(remote_shard *r, const char *uri, s3_place *place, vs_err *err) VS_WARN_UNUSED;
void remote_shard_reset(remote_shard *r); /* legal on a zeroed struct */

/* Finds version and ETag of each (or its children); what is no shard is no failure here. `with_hint`: asks for `latest` too. */
vs_rc remote_find(remote_shard **r, size_t n, int with_hint, vs_err *err) VS_WARN_UNUSED;
/* Reads manifest and opens segments of each; they were found. */
vs_rc remote_load(remote_shard **r, size_t n, vs_err *err) VS_WARN_UNUSED;

/* The halves of it: the manifests; one segment, with nothing known of it but what its manifest says. */
vs_rc remote_manifests(remote_shard **r, size_t n, vs_err *err) VS_WARN_UNUSED;
vs_rc remote_segment(const remote_shard *r, const shard_segment_ref *ref, vs_io **out, vs_err *err) VS_WARN_UNUSED;

vs_rc remote_no_shard(const char *uri, vs_err *err); /* VS_NOTFOUND with advice */

#endif
