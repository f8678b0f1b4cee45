/* shard.h - open shards and sets of shards, and the query executor over them.
 *
 * A shard handle is one version, immutable, shared by every connection and thread of the process: shard_open hands out the
 * same handle while the folder's newest version is the same, and reopens when a newer one was committed. A store is asked for
 * a newer version at most every VECSHARD_REFRESH_MS milliseconds (default 5,000; 0: with each statement). Handles are counted;
 * the last close of an old version closes its files.
 *
 * A source is what users name: the path or URI of a shard, of a database (a folder of shards), or a JSON list of such.
 */
#ifndef SHARD_H
#define SHARD_H
#include "../base/vs_scope.h"
#include "../ivfpq/ivfpq_search.h"
#include "shard_manifest.h"

typedef struct shard {
  char *path;               /* as opened */
  shard_manifest manifest;
  ivfpq_segment **segments; /* manifest.n_segments */
} shard;

/* The newest version (0) or the one asked for. Fails with VS_NOTFOUND and advice when there is no shard. */
vs_rc shard_open(const char *path, uint64_t version, shard **out, vs_err *err) VS_WARN_UNUSED;
void shard_close(shard *s); /* NULL is legal */
shard *shard_share(shard *s); /* one more owner */
int shard_is_fresh(const shard *s); /* 0: the folder may have a newer version */

typedef struct shard_stamp { uint64_t device, inode; int64_t mtime_ns, size; int settled; } shard_stamp;
/* A folder that was listed: of the file system with its stamp, of a store with its children's names and the time. */
typedef struct shard_folder { char *path; shard_stamp stamp; char **children; size_t n_children; int64_t checked_ms;
                              int no_shard; /* of a store: a folder in a database that was no shard when looked at */ } shard_folder;

typedef struct shard_set {
  shard **shards;
  char **names; /* the `shard` column: folder name, or the path as given where folder names repeat */
  size_t n;
  shard_folder *folders; /* databases that were listed */
  size_t n_folders;
} shard_set;
/* Opens every shard of a source (those in stores at the same time), in ascending name order within a database, in the given order for a list. All have one
 * dimension, metric and id type, else VS_INVALID naming two that differ. */
vs_rc shard_set_open(const char *source, shard_set *out, vs_err *err) VS_WARN_UNUSED;
int shard_set_is_fresh(const shard_set *s); /* 0: open it again for the newest versions */
void shard_set_reset(shard_set *s);
/* VS_INVALID naming two that differ in dimension, metric or id type. */
vs_rc shard_set_check(shard *const *shards, size_t n, vs_err *err) VS_WARN_UNUSED;
/* The paths that such a source names, for shard_names_free: the source itself, or the elements of the list. */
vs_rc shard_source_split(const char *source, char ***paths, size_t *n, vs_err *err) VS_WARN_UNUSED;
int shard_source_is_path(const char *source); /* contains '/' or ':' or starts with '[' */

/* ---- searching ---- */

enum { SHARD_DEFAULT_REFINE = 10 };

typedef struct shard_hit {
  float distance;
  uint32_t shard, segment, row; /* row of the segment */
} shard_hit;

typedef struct shard_search {
  shard *const *shards;
  size_t n_shards;
  const float *query;
  uint32_t dim;            /* of query; a mismatch is VS_INVALID naming both dimensions */
  uint64_t k;              /* clamped to the rows there are; 0 gives none */
  int64_t nprobe, refine;  /* -1: defaults; above range: all */
  double recall;           /* what nprobe and refine leave open is chosen so that mean recall@k is this, as each segment measured
                              when it was built; 1, and what was not reached: exact. 0: not given. */
  int own;                 /* 1: the query is a row of the shards that the caller takes out of the answer, and k counts it: spends what
                              a search for k - 1 does, and has room for it */
  int exact;
  const ivfpq_filter *const *filters; /* per shard; NULL or NULL entries: every row */
  const shard_hit *after;  /* only hits behind this one in (distance, shard, segment, row) order; NULL: all */
  int threads;             /* 0: vs_threads() */
} shard_search;

typedef struct shard_stats {
  uint64_t partitions, rows; /* probed and scanned */
  uint64_t refined;          /* rows compared by their stored vectors */
  vs_traffic refine;         /* what that read; the scope has the sum */
  int64_t refine_us;
} shard_stats;

/* The k nearest, ascending by (distance, shard, id). *hits is malloc'ed. Without `exact`, estimates of all shards are merged
 * first and only the best k*refine of them are compared by stored vectors. Ends with VS_INTERRUPT when the thread's vs_scope is
 * stopped; whether it is, is asked on this thread only. */
vs_rc shard_search_run(const shard_search *q, shard_hit **hits, size_t *n, shard_stats *stats, vs_err *err) VS_WARN_UNUSED;

/* ---- many searches ---- */

typedef struct shard_batch {
  shard_search search;     /* what they share: `query` is not looked at, `after` is NULL */
  const float *queries;    /* n x search.dim */
  size_t n;
  uint64_t first;          /* what messages call the first of them */
} shard_batch;

typedef struct shard_answers {
  shard_hit *hits;         /* query after query, each as shard_search_run gives them */
  size_t *first;           /* n + 1: where each query's begin */
  int64_t *ids;            /* of the hits; NULL where ids are texts, or would have to be read */
  size_t n;                /* queries */
} shard_answers;

/* As many queries as one call should get: its memory is bounded, and nothing is gained from more. */
size_t shard_batch_most(const shard_search *q);
/* The same rows as shard_search_run for one query after another. */
vs_rc shard_batch_run(const shard_batch *b, shard_answers *out, shard_stats *stats, vs_err *err) VS_WARN_UNUSED;
void shard_answers_reset(shard_answers *a); /* legal when zeroed */

/* Hands out the ids of hits, in their order; id is fn's during the call. Those in stores are read together. */
typedef vs_rc (*shard_id_fn)(void *ctx, size_t i, const ivfpq_id *id, vs_err *err);
vs_rc shard_ids(shard *const *shards, size_t n_shards, const shard_hit *hits, size_t n, shard_id_fn fn, void *ctx, vs_err *err) VS_WARN_UNUSED;

/* ---- single rows ---- */
/* Finds a row by id. */
vs_rc shard_find(shard *s, const ivfpq_id *id, uint32_t *segment, uint32_t *row, int *found, vs_err *err) VS_WARN_UNUSED;

#endif
