/* shard_int.h - what only ext/shard needs. */
#ifndef SHARD_INT_H
#define SHARD_INT_H
#include "shard.h"

/* Takes a folder's stamp; 0 when it cannot be read. */
int shard_stamp_take(const char *path, shard_stamp *out);
/* 1 when nothing in the folder can have been added or removed since the stamp was taken. */
int shard_stamp_holds(const char *path, const shard_stamp *then);

/* What the manifest promises of a segment must be what the segment says. */
vs_rc shard_check_segment(const shard_manifest *m, const shard_segment_ref *ref, const ivfpq_segment *s, vs_err *err) VS_WARN_UNUSED;

/* Shards in a store, all in the same rounds: *out[i] is counted, or NULL where `optional` and there is no shard. The uris and
 * places are those of `at`; what was found of a database is left in it. */
struct remote_shard;
vs_rc shard_open_remote(struct remote_shard **at, size_t n, int optional, shard **out, vs_err *err) VS_WARN_UNUSED;
/* 1 when it was looked at less than VECSHARD_REFRESH_MS ago. */
int shard_recently(int64_t checked_ms);
/* Are all these shards in stores (others are skipped), and those folders, what they were? Asks the stores in one round about
 * what was not looked at recently. An answer that cannot be had counts as no. */
int shard_remote_fresh(shard *const *shards, size_t n, shard_folder *folders, size_t n_folders);

#endif
