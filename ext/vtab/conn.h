/* conn.h - what vecshard keeps per connection: its tables, settings, and the sources it has open.
 *
 * One conn is shared by all modules of a connection, counted by them, and freed with the last. Used on the connection's
 * thread only, as SQLite serialises calls into modules.
 */
#ifndef VTAB_CONN_H
#define VTAB_CONN_H
#include "../shard/shard.h"
#include "sqlite3ext.h"

typedef struct conn_table conn_table;
/* A vecshard table of this connection, in a list that shard_union looks names up in. */
struct conn_table {
  char *schema, *name;
  vs_rc (*open)(conn_table *, shard **out, vs_err *); /* the newest version, counted */
  conn_table *next;
};

enum { CONN_SOURCES = 4 };
typedef struct conn_source { char *name; shard_set set; uint64_t used; } conn_source;

/* What the last search of a connection did, phase by phase: the rows of shard_trace. */
typedef enum conn_phase { PHASE_OPEN, PHASE_SCAN, PHASE_REFINE, PHASE_ROWS, N_PHASES } conn_phase;
typedef struct conn_trace {
  uint64_t partitions, rows, requests, retries, rounds, bytes, hits;
  int64_t us;
} conn_trace;

typedef struct conn {
  sqlite3 *db;
  int refs;
  conn_table *tables;
  int threads;                        /* 0: vs_threads() */
  char **allowed;                     /* path prefixes that schemas may name although trusted_schema is off */
  size_t n_allowed;
  conn_source sources[CONN_SOURCES];  /* kept open between statements, least recently used goes first */
  uint64_t clock;
  int64_t timeout_ms;                 /* of a network operation; 0: VECSHARD_TIMEOUT_MS */
  uint64_t max_bytes;                 /* that a statement may read from stores; 0: VECSHARD_MAX_BYTES */
  struct { conn_trace phases[N_PHASES]; } trace;
} conn;

conn *conn_new(sqlite3 *db);
void conn_release(void *conn); /* a module destructor */

/* The table behind a table-valued function: all that it holds, or what it begins with, is the connection, counted. */
typedef struct conn_vtab { sqlite3_vtab base; conn *c; } conn_vtab;
/* What its xConnect does: declares the columns and gives size bytes, zero behind the conn_vtab; and its xDisconnect. */
int conn_vtab_open(conn *c, const char *declaration, size_t size, sqlite3_vtab **out);
int conn_vtab_close(sqlite3_vtab *v);

void conn_table_add(conn *c, conn_table *t);
void conn_table_remove(conn *c, conn_table *t);
/* By name or schema.name, as SQL finds it; NULL when there is no such vecshard table. Connects the table if the schema has it. */
conn_table *conn_table_find(conn *c, const char *name);

/* Opens a source: a path, a JSON list of paths, or names of vecshard tables separated by commas. Every shard is counted once
 * more for the caller: release with shard_set_reset. Paths stay open between statements while nothing in them changes. */
vs_rc conn_any_open(conn *c, const char *source, shard_set *out, vs_err *err) VS_WARN_UNUSED;
/* The same for shards that are listed, not searched: they may differ in dimension, metric and id type. */
vs_rc conn_each_open(conn *c, const char *source, shard_set *out, vs_err *err) VS_WARN_UNUSED;

/* Paths that a schema names: relative ones are relative to the database file, so that both can be moved together. */
vs_rc conn_path_resolve(const conn *c, const char *schema, const char *path, char **full, vs_err *err) VS_WARN_UNUSED;
/* With trusted_schema off, a path that somebody else's file names must stay beside that file or be allowed. */
vs_rc conn_path_check_trust(const conn *c, const char *table, const char *path, const char *full, vs_err *err) VS_WARN_UNUSED;

/* Answers "must I stop?" for a long computation inside a statement; asks SQLite every few milliseconds. */
typedef struct conn_stop { sqlite3 *db; int64_t last_ms; int hit; } conn_stop;
void conn_stop_init(conn_stop *s, sqlite3 *db);
int conn_stop_poll(void *stop);

/* SQLite's code for ours; text goes to *message (sqlite3_malloc'ed, an old one is freed). */
int conn_error(const vs_err *err, char **message);

int conn_config_register(conn *c); /* the SQL function vecshard_config */

#endif
