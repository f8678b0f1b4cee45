/* shard_manifest.h - the versions of a shard: what a manifest says, how the newest one is found, how a new one is committed.
 *
 * A shard is a folder of immutable files. manifest-<inverted version, 20 digits>.json lists the files of one version; the
 * name inverts the number (18446744073709551615 - version) so that the newest sorts first. A folder without a manifest is no
 * shard, whatever else it holds: a build that died leaves nothing that a reader accepts.
 *
 * {"format":0,"required":[],"optional":[],"version":1,"shard":"<uuid>","dim":960,"metric":"cosine",
 *  "vectors":[{"name":"embedding","dim":960,"metric":"cosine","store":"f32"}],
 *  "id":{"name":"id","type":"text"},
 *  "columns":[{"name":"organism","type":"text","filter":true,"index":false}],
 *  "segments":[{"file":"seg-<hash>.ivf","bytes":n,"checksum":"<32 hex>","rows":n}],
 *  "built":{"rows":n,"skipped":n,"duplicates":n,"files":"<32 hex>","options":"<32 hex>"}}
 *
 * "built" is for those who check a database against the plan it was built from (tool/plan.h); it may be missing.
 *
 * JSON is read through SQLite's own functions on a private in-memory connection; every value is checked here, once.
 */
#ifndef SHARD_MANIFEST_H
#define SHARD_MANIFEST_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

enum { SHARD_FORMAT = 0, SHARD_NAME_MAX = 128, SHARD_MAX_SEGMENTS = 10000, SHARD_MAX_COLUMNS = 1000, SHARD_MAX_MANIFEST = 64 << 20 };

typedef enum shard_metric { SHARD_L2 = 0, SHARD_COSINE = 1, SHARD_DOT = 2 } shard_metric;
typedef enum shard_type { SHARD_INTEGER = 1, SHARD_REAL = 2, SHARD_TEXT = 3 } shard_type;
typedef enum shard_store { SHARD_F32 = 0, SHARD_F16 = 1 } shard_store;

typedef struct shard_column {
  char *name;
  shard_type type;
  int filter; /* 1: also laid out by partition, so that filters read it before the top k is cut; 0: stored only */
  int index;  /* 1: has a value index */
} shard_column;

typedef struct shard_segment_ref {
  char file[SHARD_NAME_MAX]; /* [a-z0-9._-]+, never leaves the folder */
  uint64_t n_bytes, n_rows;
  char checksum[33];         /* 32 lower-case hex digits: XXH3-128 of the file */
} shard_segment_ref;

/* What a build made the shard from. */
typedef struct shard_origin {
  uint64_t n_rows;              /* in the input */
  uint64_t n_skipped, n_duplicates; /* of which not in the shard: bad rows, and all but one of an id */
  char files[33], options[33];  /* 32 hex digits over a plan's bucket, and over what else the build was told; "": no plan */
  int known;                    /* 0: the manifest does not say; the rest is 0 then */
} shard_origin;

typedef struct shard_manifest {
  uint64_t version;          /* >= 1 */
  char uuid[37];
  uint32_t dim;              /* 1..16384 */
  shard_metric metric;
  shard_store store;
  char *vector_name;         /* "embedding" unless told otherwise */
  char *id_name;             /* "id" */
  int id_text;               /* 1: TEXT ids, 0: INTEGER */
  size_t n_columns, n_segments;
  shard_column *columns;
  shard_segment_ref *segments;
  uint64_t n_rows;           /* the sum over the segments */
  shard_origin origin;
} shard_manifest;

/* Frees what is inside; the struct itself is the caller's. Legal on a zeroed struct. */
void shard_manifest_reset(shard_manifest *m);
/* Decodes hostile text; `name` (path) is for messages. */
vs_rc shard_manifest_parse(const char *json, size_t n_bytes, const char *name, shard_manifest *out, vs_err *err) VS_WARN_UNUSED;
/* The JSON text of m, malloc'ed, NUL terminated. */
vs_rc shard_manifest_print(const shard_manifest *m, char **json, vs_err *err) VS_WARN_UNUSED;
void shard_manifest_file(uint64_t version, char name[64]); /* "manifest-....json" */
uint64_t shard_manifest_version(const char *name);         /* of exactly such a name; 0: it is none */

/* Reads the newest version of a local shard (version 0), or the one asked for. VS_NOTFOUND when the folder is missing or has
 * no manifest ("... is not a shard: ..."), with what to do. */
vs_rc shard_manifest_read(const char *dir, uint64_t version, shard_manifest *out, vs_err *err) VS_WARN_UNUSED;
/* Creates the manifest of m->version exclusively (temporary file, fsync, link, fsync of the folder). VS_EXISTS, with advice,
 * when another writer committed that version first; nothing is lost then. */
vs_rc shard_manifest_commit(const char *dir, const shard_manifest *m, vs_err *err) VS_WARN_UNUSED;
/* The same with a text that the caller has parsed: a copy of a manifest keeps what this build does not know. */
vs_rc shard_manifest_commit_text(const char *dir, uint64_t version, const char *json, vs_err *err) VS_WARN_UNUSED;

/* Is there at least one manifest in this folder? */
int shard_dir_is_shard(const char *dir);
/* The child folders of dir that are shards, in ascending byte order: *names is malloc'ed, as is each name. VS_NOTFOUND when dir
 * is missing or not a folder. n may be 0. */
vs_rc shard_dir_list(const char *dir, char ***names, size_t *n, vs_err *err) VS_WARN_UNUSED;
/* The same of all child folders, and whatever else may be one. */
vs_rc shard_dir_children(const char *dir, char ***names, size_t *n, vs_err *err) VS_WARN_UNUSED;
void shard_names_free(char **names, size_t n);

#endif
