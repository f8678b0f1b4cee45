/* s3_threads.c - several threads of one process, a connection each, search the same source; for TSan and for long runs.
 *
 *   s3_threads SOURCE LOCAL DIM THREADS QUERIES
 *
 * Each thread asks QUERIES times about one of 64 vectors, and then about all of them at once, and compares with what LOCAL, the
 * same shards in a folder, gave at first. Prints "ok" and what the process holds at the end, or the first difference; exit status 0 or 1.
 */
#include <dirent.h>
#include <pthread.h>
#include <sqlite3.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/vecshard.h"

enum { VECTORS = 64, MAX_DIM = 4096, ANSWER = 4096 };

static char answers[VECTORS][ANSWER];
static int dim, n_queries, n_wrong;
static const char *source;

static uint64_t next_random(uint64_t *state) {
  *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17;
  return *state;
}

static void make_vector(int n, float *v) {
  uint64_t state = 0x9E3779B97F4A7C15ull + (uint64_t)n * 7919;
  for (int i = 0; i < 20; i++) next_random(&state);
  for (int i = 0; i < dim; i++) v[i] = (float)(next_random(&state) % 2001) / 500 - 2;
}

/* The rows of one search as text; an error's message instead. */
static void ask(sqlite3_stmt *s, const char *where, int n, char out[ANSWER]) {
  float v[MAX_DIM];
  size_t at = 0;
  make_vector(n, v);
  sqlite3_bind_text(s, 1, where, -1, SQLITE_STATIC);
  sqlite3_bind_blob(s, 2, v, dim * (int)sizeof *v, SQLITE_TRANSIENT);
  out[0] = 0;
  int rc;
  while ((rc = sqlite3_step(s)) == SQLITE_ROW && at < ANSWER - 200)
    at += (size_t)snprintf(out + at, ANSWER - at, "%.40s|%.80s|%.9g\n", sqlite3_column_text(s, 0), sqlite3_column_text(s, 1),
                           sqlite3_column_double(s, 2));
  if (rc != SQLITE_DONE) snprintf(out, ANSWER, "error: %s", sqlite3_errmsg(sqlite3_db_handle(s)));
  sqlite3_reset(s);
}

static sqlite3_stmt *prepare(sqlite3 **db) {
  sqlite3_stmt *s = NULL;
  const char *sql = "SELECT shard, id, distance FROM shard_union WHERE source = ?1 AND query = ?2 AND k = 10 AND nprobe = 12 AND refine = 8";
  if (sqlite3_open_v2(":memory:", db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_FULLMUTEX | SQLITE_OPEN_URI, NULL) ||
      sqlite3_prepare_v2(*db, sql, -1, &s, NULL)) {
    fprintf(stderr, "%s\n", sqlite3_errmsg(*db));
    exit(1);
  }
  return s;
}

static void check(const char *what, int n, const char *got) {
  if (strcmp(got, answers[n]) && !__atomic_fetch_add(&n_wrong, 1, __ATOMIC_RELAXED))
    fprintf(stderr, "%s %d:\n%sinstead of\n%s", what, n, got, answers[n]);
}

/* All vectors as one batch, whose scans share the pool's threads. */
static void ask_all(sqlite3 *db) {
  static const char *sql = "SELECT query_no, shard, id, distance FROM shard_union WHERE source = ?1 AND query = (SELECT vec_pack(e) FROM v) "
                           "AND k = 10 AND nprobe = 12 AND refine = 8 ORDER BY query_no, distance";
  static _Thread_local char got[VECTORS][ANSWER];
  size_t at[VECTORS] = {0};
  float v[MAX_DIM];
  sqlite3_stmt *s;
  memset(got, 0, sizeof got);
  sqlite3_exec(db, "CREATE TEMP TABLE v(e BLOB)", NULL, NULL, NULL);
  sqlite3_prepare_v2(db, "INSERT INTO v VALUES(?)", -1, &s, NULL);
  for (int i = 0; i < VECTORS; i++) {
    make_vector(i, v);
    sqlite3_bind_blob(s, 1, v, dim * (int)sizeof *v, SQLITE_TRANSIENT);
    sqlite3_step(s), sqlite3_reset(s);
  }
  sqlite3_finalize(s);
  int rc = sqlite3_prepare_v2(db, sql, -1, &s, NULL);
  sqlite3_bind_text(s, 1, source, -1, SQLITE_STATIC);
  while (!rc && (rc = sqlite3_step(s)) == SQLITE_ROW) {
    int n = sqlite3_column_int(s, 0);
    at[n] += (size_t)snprintf(got[n] + at[n], ANSWER - at[n], "%.40s|%.80s|%.9g\n", sqlite3_column_text(s, 1), sqlite3_column_text(s, 2),
                              sqlite3_column_double(s, 3));
    rc = 0;
  }
  if (rc != SQLITE_DONE) snprintf(got[0], ANSWER, "error: %s\n", sqlite3_errmsg(db));
  sqlite3_finalize(s);
  for (int i = 0; i < VECTORS; i++) check("of a batch, query", i, got[i]);
}

static void *work(void *arg) {
  uint64_t state = 88172645463325252ull + (uintptr_t)arg * 104729;
  char got[ANSWER];
  sqlite3 *db;
  sqlite3_stmt *s = prepare(&db);
  for (int i = 0; i < n_queries; i++) {
    int n = (int)(next_random(&state) % VECTORS);
    ask(s, source, n, got);
    check("query", n, got);
  }
  sqlite3_finalize(s);
  ask_all(db);
  sqlite3_close(db);
  return NULL;
}

static long resident_kb(void) {
  char line[256];
  long kb = 0;
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f)) sscanf(line, "VmRSS: %ld", &kb);
  if (f) fclose(f);
  return kb;
}

static int open_files(void) {
  int n = 0;
  DIR *d = opendir("/proc/self/fd");
  while (d && readdir(d)) n++;
  if (d) closedir(d);
  return n;
}

int main(int argc, char **argv) {
  pthread_t threads[64];
  if (argc != 6 || atoi(argv[3]) > MAX_DIM || atoi(argv[4]) > 64) return 2;
  source = argv[1], dim = atoi(argv[3]), n_queries = atoi(argv[5]);
  int n = atoi(argv[4]);
  sqlite3_auto_extension((void (*)(void))sqlite3_vecshard_init);
  sqlite3 *db;
  sqlite3_stmt *s = prepare(&db);
  for (int i = 0; i < VECTORS; i++) ask(s, argv[2], i, answers[i]);
  sqlite3_finalize(s);
  sqlite3_close(db);
  long kb = 0;
  int files = 0;
  for (int round = 0; round < 2; round++) { /* what the first leaves behind is the measure for the second */
    kb = resident_kb(), files = open_files();
    for (int i = 0; i < n; i++) pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)(i + round * n));
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
  }
  printf("%s: %d threads x 2 x %d queries, resident %ld -> %ld KB, descriptors %d -> %d\n", n_wrong ? "WRONG" : "ok", n, n_queries, kb,
         resident_kb(), files, open_files());
  return n_wrong != 0;
}
