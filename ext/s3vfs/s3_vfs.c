/* s3_vfs.c - see s3_vfs.h.
 *
 * Names that begin with s3://, http:// or https:// are opened here; every other name (temporary files, local databases that are
 * attached beside) goes to the VFS that was the default when this one was registered. What SQLite reads comes from an s3_reader:
 * the bytes of one version of the object, whatever happens to it meanwhile, or an error.
 *
 * The file says SQLITE_IOCAP_IMMUTABLE: SQLite then takes no locks, looks for no journal and opens a database in WAL mode
 * without its -wal and -shm files. What is in a -wal or a journal that was uploaded beside a database is not read: a database
 * is closed or checkpointed before it is uploaded.
 *
 * Interrupts. While a read waits, the engine asks every 20 ms whether to stop (see db_interrupt.c). Which connection reads is
 * told by SQLITE_FCNTL_PDB, the address of a variable that SQLite keeps up to date. It comes when the file is open, too late for
 * the opening itself: there the connection is the one that this thread may lock and that runs an ATTACH, among those that
 * loaded the extension. A connection without mutex (SQLITE_OPEN_NOMUTEX, and in the sqlite3 shell) is looked at only in a
 * process without other threads than ours; elsewhere its ATTACH goes on until it has its answer or its time is over.
 *
 * Errors. SQLite words them itself ("unable to open database", "disk I/O error"), whatever a VFS says: neither ATTACH nor a
 * failing step keeps a text set from here. The reason goes to sqlite3_log and to s3_last_error().
 *
 * One mutex guards the list of connections and the texts; nothing waits while it is held.
 */
#include "s3_vfs.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../base/vs_pool.h"
#include "../base/vs_scope.h"
#include "db_interrupt.h"
#include "s3_config.h"
#include "s3_reader.h"
SQLITE_EXTENSION_INIT3

enum { MAX_NAME = 8192 /* a signed URL with a session token has about 2,000 bytes */ };

typedef struct s3_file {
  sqlite3_file base;
  s3_reader *reader;
  sqlite3 **db; /* SQLite's variable; NULL: not told */
  int is_shared;
} s3_file;

typedef struct connection {
  sqlite3 *db;
  char *error; /* NULL: none */
  struct connection *next;
} connection;

static struct {
  pthread_mutex_t lock;
  connection *connections;
  char *error; /* of a connection that is not known */
} V = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- interrupts ---- */

static int must_stop(void *db) { return db_is_interrupted(db); }

/* Are all other threads of the process ours? Then no connection is in use but by this thread. */
static int is_only_thread(void) {
  DIR *d = opendir("/proc/self/task");
  int alone = d != NULL;
  char path[64], name[32];
  for (struct dirent *e; alone && (e = readdir(d));) {
    if (e->d_name[0] == '.' || atoi(e->d_name) == gettid()) continue;
    snprintf(path, sizeof path, "/proc/self/task/%.20s/comm", e->d_name);
    FILE *f = fopen(path, "re");
    if (!f) alone = errno == ENOENT; /* it has ended */
    else alone = fgets(name, sizeof name, f) && !strncmp(name, VS_THREAD_NAME, strlen(VS_THREAD_NAME));
    if (f) fclose(f);
  }
  if (d) closedir(d);
  return alone;
}

/* Takes the connection's mutex, unless another thread uses it (0). alone: is_only_thread(), -1 not known yet. */
static int try_lock(sqlite3_mutex *m, int *alone) {
  if (m) return sqlite3_mutex_try(m) == SQLITE_OK;
  if (*alone < 0) *alone = is_only_thread();
  return *alone;
}

/* The connection on whose behalf this thread opens a file, or NULL. */
static sqlite3 *attaching_connection(void) {
  sqlite3 *found = NULL;
  int alone = -1;
  pthread_mutex_lock(&V.lock);
  for (connection *c = V.connections; c && !found; c = c->next) {
    sqlite3_mutex *m = sqlite3_db_mutex(c->db);
    if (!try_lock(m, &alone)) continue;
    if (db_is_running(c->db, "%attach%")) found = c->db; /* also what VACUUM INTO runs */
    sqlite3_mutex_leave(m);
  }
  pthread_mutex_unlock(&V.lock);
  return found;
}

/* A scope for what is done for db (or NULL), with the time limit of the one around it: a statement of ours may be reading. */
typedef struct guard { vs_scope scope, *before; } guard;

static void guard_enter(guard *g, const s3_file *f, sqlite3 *db) {
  const vs_scope *around = vs_scope_current();
  *g = (guard){.scope = {.timeout_ms = around ? around->timeout_ms : 0}};
  int may_ask = db && (!f->is_shared || sqlite3_libversion_number() >= DB_INTERRUPT_IS_PLAIN_SINCE);
  if (may_ask) g->scope.stop = must_stop, g->scope.stop_ctx = db;
  g->before = vs_scope_enter(&g->scope);
}
static void guard_leave(guard *g) { vs_scope_enter(g->before); }

/* ---- errors ---- */

static void keep_error(sqlite3 *db, const char *text) {
  pthread_mutex_lock(&V.lock);
  connection *c = V.connections;
  while (c && c->db != db) c = c->next;
  char **to = c ? &c->error : &V.error;
  free(*to);
  *to = strdup(text);
  pthread_mutex_unlock(&V.lock);
}

/* SQLite's code for ours; `otherwise` where there is no special one. */
static int report(sqlite3 *db, const vs_err *err, int otherwise) {
  if (err->rc == VS_INTERRUPT) return SQLITE_INTERRUPT;
  if (err->rc == VS_NOMEM) return otherwise == SQLITE_CANTOPEN ? SQLITE_NOMEM : SQLITE_IOERR_NOMEM;
  keep_error(db, err->text);
  sqlite3_log(otherwise, "%s", err->text);
  return otherwise;
}

/* ---- the file ---- */

static int f_close(sqlite3_file *file) {
  s3_reader_close(((s3_file *)file)->reader);
  return SQLITE_OK;
}

static int f_read(sqlite3_file *file, void *to, int n, sqlite3_int64 off) {
  s3_file *f = (s3_file *)file;
  sqlite3 *db = f->db ? *f->db : NULL;
  uint64_t size = s3_reader_size(f->reader), at = (uint64_t)off;
  uint64_t have = at >= size ? 0 : size - at < (uint64_t)n ? size - at : (uint64_t)n;
  vs_err err = {0};
  guard g;
  guard_enter(&g, f, db);
  vs_rc rc = s3_reader_read(f->reader, at, (size_t)have, to, &err);
  guard_leave(&g);
  if (rc) return report(db, &err, SQLITE_IOERR_READ);
  if (have == (uint64_t)n) return SQLITE_OK;
  memset((char *)to + have, 0, (size_t)((uint64_t)n - have));
  return SQLITE_IOERR_SHORT_READ;
}

static int f_write(sqlite3_file *file, const void *from, int n, sqlite3_int64 off) {
  (void)file, (void)from, (void)n, (void)off;
  return SQLITE_READONLY;
}
static int f_truncate(sqlite3_file *file, sqlite3_int64 size) {
  (void)file, (void)size;
  return SQLITE_READONLY;
}
/* Of xSync, xLock and xUnlock: there is nothing to do. */
static int f_nothing(sqlite3_file *file, int what) {
  (void)file, (void)what;
  return SQLITE_OK;
}
static int f_size(sqlite3_file *file, sqlite3_int64 *size) {
  *size = (sqlite3_int64)s3_reader_size(((s3_file *)file)->reader);
  return SQLITE_OK;
}
static int f_check_reserved(sqlite3_file *file, int *out) {
  (void)file;
  *out = 0;
  return SQLITE_OK;
}
static int f_control(sqlite3_file *file, int op, void *arg) {
  if (op == SQLITE_FCNTL_PDB) ((s3_file *)file)->db = arg;
  else if (op == SQLITE_FCNTL_VFSNAME) *(char **)arg = sqlite3_mprintf("s3");
  else return SQLITE_NOTFOUND;
  return SQLITE_OK;
}
static int f_sector(sqlite3_file *file) {
  (void)file;
  return 4096;
}
static int f_characteristics(sqlite3_file *file) {
  (void)file;
  return SQLITE_IOCAP_IMMUTABLE;
}

static const sqlite3_io_methods methods = {
    .iVersion = 1, .xClose = f_close, .xRead = f_read, .xWrite = f_write, .xTruncate = f_truncate, .xSync = f_nothing,
    .xFileSize = f_size, .xLock = f_nothing, .xUnlock = f_nothing, .xCheckReservedLock = f_check_reserved,
    .xFileControl = f_control, .xSectorSize = f_sector, .xDeviceCharacteristics = f_characteristics};

/* ---- the VFS ---- */

static sqlite3_vfs *below(sqlite3_vfs *v) { return v->pAppData; }

static int v_open(sqlite3_vfs *v, const char *name, sqlite3_file *file, int flags, int *out_flags) {
  if (!name || !s3_is_uri(name)) return below(v)->xOpen(below(v), name, file, flags, out_flags);
  s3_file *f = (s3_file *)file;
  vs_err err = {0};
  guard g;
  *f = (s3_file){0};
  if (!(flags & SQLITE_OPEN_MAIN_DB)) return SQLITE_CANTOPEN; /* a journal: nothing is ever written */
  const char *cache = sqlite3_uri_parameter(name, "cache");
  f->is_shared = cache && !strcmp(cache, "shared");
  sqlite3 *db = attaching_connection();
  guard_enter(&g, f, db);
  vs_rc rc = s3_reader_open(name, &f->reader, &err);
  guard_leave(&g);
  if (rc) return report(db, &err, SQLITE_CANTOPEN);
  f->base.pMethods = &methods;
  if (out_flags) *out_flags = (flags & ~(SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE)) | SQLITE_OPEN_READONLY;
  return SQLITE_OK;
}

static int v_delete(sqlite3_vfs *v, const char *name, int sync) {
  return s3_is_uri(name) ? SQLITE_IOERR_DELETE_NOENT : below(v)->xDelete(below(v), name, sync);
}

/* Asked for journals only: there are none. */
static int v_access(sqlite3_vfs *v, const char *name, int flags, int *out) {
  *out = 0;
  return s3_is_uri(name) ? SQLITE_OK : below(v)->xAccess(below(v), name, flags, out);
}

/* SQLite keeps names within our mxPathname, which is more than the VFS below may have buffers for, journals included. */
static int local_pathname(sqlite3_vfs *v, const char *name, int room, char *out) {
  int max = below(v)->mxPathname;
  int rc = below(v)->xFullPathname(below(v), name, room > max ? max + 1 : room, out);
  if (rc & 0xff) return rc;
  return strlen(out) + strlen("-journal") > (size_t)max ? SQLITE_CANTOPEN : rc;
}

static int v_full_pathname(sqlite3_vfs *v, const char *name, int room, char *out) {
  if (!s3_is_uri(name)) return local_pathname(v, name, room, out);
  if (strlen(name) >= (size_t)room) return SQLITE_CANTOPEN;
  strcpy(out, name);
  return SQLITE_OK;
}

static void *v_dl_open(sqlite3_vfs *v, const char *name) { return below(v)->xDlOpen(below(v), name); }
static void v_dl_error(sqlite3_vfs *v, int n, char *text) { below(v)->xDlError(below(v), n, text); }
static void (*v_dl_sym(sqlite3_vfs *v, void *library, const char *name))(void) { return below(v)->xDlSym(below(v), library, name); }
static void v_dl_close(sqlite3_vfs *v, void *library) { below(v)->xDlClose(below(v), library); }
static int v_randomness(sqlite3_vfs *v, int n, char *out) { return below(v)->xRandomness(below(v), n, out); }
static int v_sleep(sqlite3_vfs *v, int us) { return below(v)->xSleep(below(v), us); }
static int v_time(sqlite3_vfs *v, double *out) { return below(v)->xCurrentTime(below(v), out); }
static int v_time_64(sqlite3_vfs *v, sqlite3_int64 *out) { return below(v)->xCurrentTimeInt64(below(v), out); }
static int v_last_error(sqlite3_vfs *v, int n, char *out) {
  return below(v)->xGetLastError ? below(v)->xGetLastError(below(v), n, out) : 0;
}

/* A struct of its own for each copy of SQLite: it is a link of that copy's list. Never freed, as it is never unregistered. */
static int register_vfs(void) {
  sqlite3_vfs *base = sqlite3_vfs_find(NULL), *v;
  if (sqlite3_vfs_find("s3")) return SQLITE_OK; /* ours, or of another copy of this library, or what the application calls so */
  if (!base) return SQLITE_ERROR;
  if (!(v = malloc(sizeof *v))) return SQLITE_NOMEM;
  *v = (sqlite3_vfs){
      .iVersion = base->iVersion >= 2 ? 2 : 1, .mxPathname = base->mxPathname > MAX_NAME ? base->mxPathname : MAX_NAME,
      .szOsFile = base->szOsFile > (int)sizeof(s3_file) ? base->szOsFile : (int)sizeof(s3_file), .zName = "s3", .pAppData = base,
      .xOpen = v_open, .xDelete = v_delete, .xAccess = v_access, .xFullPathname = v_full_pathname, .xDlOpen = v_dl_open,
      .xDlError = v_dl_error, .xDlSym = v_dl_sym, .xDlClose = v_dl_close, .xRandomness = v_randomness, .xSleep = v_sleep,
      .xCurrentTime = v_time, .xGetLastError = v_last_error, .xCurrentTimeInt64 = v_time_64};
  int rc = sqlite3_vfs_register(v, 0);
  if (rc) free(v);
  return rc;
}

int s3_vfs_register(void) {
  pthread_mutex_lock(&V.lock);
  int rc = register_vfs();
  pthread_mutex_unlock(&V.lock);
  return rc;
}

/* ---- connections ---- */

static void last_error(sqlite3_context *ctx, int argc, sqlite3_value **argv) {
  const connection *c = sqlite3_user_data(ctx);
  (void)argc, (void)argv;
  pthread_mutex_lock(&V.lock);
  const char *text = c->error ? c->error : V.error;
  if (text) sqlite3_result_text(ctx, text, -1, SQLITE_TRANSIENT);
  pthread_mutex_unlock(&V.lock);
}

/* SQLite calls it when the connection is closed, and when the function is registered anew. */
static void disconnect(void *p) {
  connection *c = p;
  pthread_mutex_lock(&V.lock);
  connection **at = &V.connections;
  while (*at && *at != c) at = &(*at)->next;
  if (*at) *at = c->next;
  pthread_mutex_unlock(&V.lock);
  free(c->error), free(c);
}

int s3_vfs_connect(sqlite3 *db) {
  connection *c = calloc(1, sizeof *c);
  if (!c) return SQLITE_NOMEM;
  c->db = db;
  int flags = SQLITE_UTF8 | SQLITE_DIRECTONLY;
  int rc = sqlite3_create_function_v2(db, "s3_last_error", 0, flags, c, last_error, NULL, NULL, disconnect);
  if (rc) return rc;
  pthread_mutex_lock(&V.lock);
  c->next = V.connections, V.connections = c;
  pthread_mutex_unlock(&V.lock);
  return SQLITE_OK;
}
