/* hdf5_vectors.c - the vectors of an HDF5 file as a table.
 *
 *   CREATE TABLE x(id, embedding,
 *                  file HIDDEN, embedding_dataset HIDDEN, id_dataset HIDDEN, bad_rows HIDDEN);
 *
 *   SELECT id, embedding FROM hdf5_vectors('proteins.h5');
 *   SELECT count(*) FROM hdf5_vectors('x.h5', '/data/emb/embedding', '/data/meta/id');
 *   INSERT INTO proteins(id, embedding) SELECT id, embedding FROM hdf5_vectors('proteins.h5');
 *   SELECT id, embedding FROM hdf5_vectors('raw.h5', NULL, 'none');         -- row numbers as ids
 *   SELECT id, embedding FROM hdf5_vectors('raw.h5', NULL, NULL, 'skip');   -- leave out rows that hold no vector
 *
 * id is INTEGER or TEXT, embedding a BLOB of little-endian float32, rowid the row's number in the file. Layouts and names
 * that are found by themselves: ext/input/input_hdf5.c; what its messages call --embedding-dataset and --id-dataset are the
 * second and third argument here. Arguments that are NULL count as not given; a NULL file gives no rows.
 *
 * bad_rows: 'fail' (default): the first row with NaN, Inf, a value beyond float32, another length, an invalid id or no data
 * at all is an error that names it; 'skip': such rows are left out, their numbers are missing among the rowids.
 *
 * idxNum bits, one per argument that is given, in the order of argv:
 *   1 file   2 embedding_dataset   4 id_dataset   8 bad_rows
 *
 * Rows come in file order, a batch at a time; nothing is pushed down, so that WHERE id = 'x' reads the whole file.
 * SQLITE_DIRECTONLY: views and triggers of a hostile schema must not read files. .npy and .fvecs files open as well.
 */
#include <sqlite3ext.h>
SQLITE_EXTENSION_INIT3

#include <stdlib.h>
#include <string.h>

#include "../input/input.h"

int hdf5_vectors_register(sqlite3 *db);

enum { COL_ID, COL_EMBEDDING, COL_FILE, COL_EMBEDDING_DATASET, COL_ID_DATASET, COL_BAD_ROWS };
enum { N_ARGS = 4 };

/* Rows per read: some 4 MB at 1024 dimensions. A LIMIT that stops early wastes little. */
#define BATCH_ROWS 1024

typedef struct hdf5_cursor {
  sqlite3_vtab_cursor base; /* first: SQLite's pointer is to this */
  input *in;                /* NULL: no rows */
  input_batch batch;
  size_t at; /* row within the batch */
  int skip;  /* bad_rows = 'skip' */
  int eof;
  char *args[N_ARGS]; /* as given, NULL when not */
} hdf5_cursor;

static int hdf5_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out,
                        char **errmsg) {
  int rc = sqlite3_declare_vtab(
      db, "CREATE TABLE x(id, embedding, file HIDDEN, embedding_dataset HIDDEN, id_dataset HIDDEN, "
          "bad_rows HIDDEN)");
  (void)aux, (void)argc, (void)argv, (void)errmsg;
  if (rc) return rc;
  rc = sqlite3_vtab_config(db, SQLITE_VTAB_DIRECTONLY);
  if (rc) return rc;
  *out = sqlite3_malloc(sizeof **out);
  if (!*out) return SQLITE_NOMEM;
  memset(*out, 0, sizeof **out);
  return SQLITE_OK;
}

static int hdf5_disconnect(sqlite3_vtab *vtab) {
  sqlite3_free(vtab);
  return SQLITE_OK;
}

static int set_error(sqlite3_vtab *vtab, char *message) {
  sqlite3_free(vtab->zErrMsg);
  vtab->zErrMsg = message;
  return message ? SQLITE_ERROR : SQLITE_NOMEM;
}

static int hdf5_best_index(sqlite3_vtab *vtab, sqlite3_index_info *info) {
  int term[N_ARGS] = {-1, -1, -1, -1}, n = 0, unusable = 0;
  for (int i = 0; i < info->nConstraint; i++) {
    int arg = info->aConstraint[i].iColumn - COL_FILE;
    if (arg < 0 || arg >= N_ARGS || info->aConstraint[i].op != SQLITE_INDEX_CONSTRAINT_EQ) continue;
    if (!info->aConstraint[i].usable) unusable = 1;
    else term[arg] = i;
  }
  /* An argument that comes from a table not yet visited: there is a better order of the join. */
  if (unusable) return SQLITE_CONSTRAINT;
  if (term[0] < 0) return set_error(vtab, sqlite3_mprintf("hdf5_vectors needs a file: hdf5_vectors('vectors.h5')"));
  for (int arg = 0; arg < N_ARGS; arg++) {
    if (term[arg] < 0) continue;
    info->aConstraintUsage[term[arg]].argvIndex = ++n;
    info->aConstraintUsage[term[arg]].omit = 1;
    info->idxNum |= 1 << arg;
  }
  info->estimatedCost = 1e6;
  info->estimatedRows = 100000;
  return SQLITE_OK;
}

static int hdf5_open(sqlite3_vtab *vtab, sqlite3_vtab_cursor **out) {
  hdf5_cursor *c = sqlite3_malloc(sizeof *c);
  (void)vtab;
  if (!c) return SQLITE_NOMEM;
  memset(c, 0, sizeof *c);
  c->eof = 1;
  *out = &c->base;
  return SQLITE_OK;
}

static void reset_cursor(hdf5_cursor *c) {
  input_close(c->in);
  c->in = NULL;
  memset(&c->batch, 0, sizeof c->batch);
  for (int i = 0; i < N_ARGS; i++) {
    sqlite3_free(c->args[i]);
    c->args[i] = NULL;
  }
  c->at = 0;
  c->skip = 0;
  c->eof = 1;
}

static int hdf5_close(sqlite3_vtab_cursor *cursor) {
  reset_cursor((hdf5_cursor *)cursor);
  sqlite3_free(cursor);
  return SQLITE_OK;
}

static int map_error(hdf5_cursor *c, vs_rc rc, const vs_err *err) {
  if (rc == VS_NOMEM) return SQLITE_NOMEM;
  return set_error(c->base.pVtab, sqlite3_mprintf("%s", err->text));
}

/* Moves on, from c->at, to a row that can be shown. */
static int settle(hdf5_cursor *c) {
  for (;;) {
    vs_err err = {0};
    vs_rc rc;
    for (; c->at < c->batch.n; c->at++) {
      input_fault fault = (input_fault)c->batch.faults[c->at];
      if (fault == INPUT_FINE) return SQLITE_OK;
      if (!c->skip)
        return set_error(
            c->base.pVtab,
            sqlite3_mprintf("%s: row %lld: %s (bad_rows 'skip' as the fourth argument leaves such rows out)",
                            c->in->path, (sqlite3_int64)(c->batch.first_row + c->at), input_fault_text(fault)));
    }
    rc = c->in->read(c->in, BATCH_ROWS, &c->batch, &err);
    c->at = 0;
    if (rc) return map_error(c, rc, &err);
    if (!c->batch.n) {
      c->eof = 1;
      return SQLITE_OK;
    }
  }
}

static int hdf5_filter(sqlite3_vtab_cursor *cursor, int idx, const char *idx_text, int argc, sqlite3_value **argv) {
  hdf5_cursor *c = (hdf5_cursor *)cursor;
  input_options opt = {0};
  vs_err err = {0};
  vs_rc rc;
  int n = 0;
  (void)idx_text;
  reset_cursor(c);
  for (int arg = 0; arg < N_ARGS && n < argc; arg++) {
    const char *text;
    if (!(idx & 1 << arg)) continue;
    text = (const char *)sqlite3_value_text(argv[n]);
    if (text && strlen(text) != (size_t)sqlite3_value_bytes(argv[n]))
      return set_error(cursor->pVtab, sqlite3_mprintf("hdf5_vectors: an argument has an embedded NUL"));
    if (sqlite3_value_type(argv[n++]) == SQLITE_NULL) continue;
    c->args[arg] = text ? sqlite3_mprintf("%s", text) : NULL;
    if (!c->args[arg]) return SQLITE_NOMEM;
  }
  if (!c->args[0]) return SQLITE_OK;
  if (c->args[3]) {
    c->skip = !strcmp(c->args[3], "skip");
    if (!c->skip && strcmp(c->args[3], "fail"))
      return set_error(cursor->pVtab,
                       sqlite3_mprintf("hdf5_vectors: bad_rows is 'fail' or 'skip', not '%s'", c->args[3]));
  }
  opt.embedding_dataset = c->args[1];
  opt.id_dataset = c->args[2];
  rc = input_open(c->args[0], &opt, &c->in, &err);
  if (rc) return map_error(c, rc, &err);
  c->eof = 0;
  return settle(c);
}

static int hdf5_next(sqlite3_vtab_cursor *cursor) {
  hdf5_cursor *c = (hdf5_cursor *)cursor;
  c->at++;
  return settle(c);
}

static int hdf5_eof(sqlite3_vtab_cursor *cursor) { return ((hdf5_cursor *)cursor)->eof; }

static int hdf5_column(sqlite3_vtab_cursor *cursor, sqlite3_context *ctx, int column) {
  hdf5_cursor *c = (hdf5_cursor *)cursor;
  const input_value *id = c->batch.ids + c->at;
  size_t dim = c->in->dim;
  if (column == COL_EMBEDDING) {
    sqlite3_result_blob64(ctx, c->batch.vectors + c->at * dim, dim * sizeof(float), SQLITE_TRANSIENT);
  } else if (column == COL_ID) {
    if (id->type == INPUT_INT) sqlite3_result_int64(ctx, id->i);
    else if (id->type == INPUT_TEXT) sqlite3_result_text64(ctx, id->text, id->len, SQLITE_TRANSIENT, SQLITE_UTF8);
  } else if (c->args[column - COL_FILE]) {
    sqlite3_result_text(ctx, c->args[column - COL_FILE], -1, SQLITE_TRANSIENT);
  }
  return SQLITE_OK;
}

static int hdf5_rowid(sqlite3_vtab_cursor *cursor, sqlite3_int64 *rowid) {
  hdf5_cursor *c = (hdf5_cursor *)cursor;
  *rowid = (sqlite3_int64)(c->batch.first_row + c->at);
  return SQLITE_OK;
}

/* Eponymous only: xCreate is NULL, so there is no CREATE VIRTUAL TABLE that a schema could hide a path in. */
static const sqlite3_module hdf5_module = {
    .xConnect = hdf5_connect,
    .xBestIndex = hdf5_best_index,
    .xDisconnect = hdf5_disconnect,
    .xOpen = hdf5_open,
    .xClose = hdf5_close,
    .xFilter = hdf5_filter,
    .xNext = hdf5_next,
    .xEof = hdf5_eof,
    .xColumn = hdf5_column,
    .xRowid = hdf5_rowid,
};

int hdf5_vectors_register(sqlite3 *db) { return sqlite3_create_module(db, "hdf5_vectors", &hdf5_module, NULL); }
