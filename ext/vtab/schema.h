/* schema.h - the words of CREATE VIRTUAL TABLE ... USING vecshard(...): column definitions and options. */
#ifndef VTAB_SCHEMA_H
#define VTAB_SCHEMA_H
#include "../shard/shard_manifest.h"

typedef struct schema_def {
  char *path;          /* NULL: the default path */
  uint64_t version;    /* 0: the newest */
  int n_defined;       /* column definitions given; 0: all columns come from the shard */
  shard_manifest want; /* what they say: names, types, dim, metric; dim 0 without definitions */
  int has_id;
} schema_def;

/* Parses the arguments behind `USING vecshard(`. Errors quote the argument. */
vs_rc schema_parse(int argc, const char *const *argv, schema_def *out, vs_err *err) VS_WARN_UNUSED;
void schema_reset(schema_def *d);

/* Does the shard have exactly the defined columns? */
vs_rc schema_compare(const schema_def *d, const shard_manifest *have, vs_err *err) VS_WARN_UNUSED;

/* Have two shards (or versions) the same id type, dimension, metric and metadata columns? */
int schema_same(const shard_manifest *a, const shard_manifest *b);
int schema_same_columns(const shard_manifest *a, const shard_manifest *b); /* the metadata columns only */

/* Hidden columns, in this order behind the shard's own: the query (named after the table), k, ... distance. */
enum { HIDDEN_QUERY, HIDDEN_K, HIDDEN_NPROBE, HIDDEN_REFINE, HIDDEN_RECALL, HIDDEN_EXACT, HIDDEN_DISTANCE, N_HIDDEN };

/* The CREATE TABLE text for sqlite3_declare_vtab, for sqlite3_free; an error when a column takes a hidden column's name. */
vs_rc schema_declare(const shard_manifest *m, const char *table, char **sql, vs_err *err) VS_WARN_UNUSED;

#endif
