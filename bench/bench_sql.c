/* bench_sql.c - searches as an application makes them, timed: SQLite, the loadable extension, a prepared statement.
 *
 *   bench_sql EXTENSION SHARD QUERIES.f32 DIM
 *
 * Loads EXTENSION (build/vecshard, as sqlite3_load_extension takes it), makes SHARD the table t, prints one JSON line, then answers
 * each line of words name=value with one JSON line:
 *
 *   run first=F n=N k=K [nprobe=P] [refine=R] [recall=X] [exact=1] threads=T batch=0|1 passes=C [core=1] out=FILE
 *       SELECT id FROM t WHERE embedding MATCH ?1 AND k = ?2 [AND nprobe = ?3] [AND refine = ?4] [AND recall = ?5] [AND exact = ?6]
 *       for queries F..F+N, prepared once; with batch=1 one SELECT from shard_union with all of them by vec_pack; with core=1
 *       shard_search_run, the C function below, instead. The best of C passes counts.
 *   trace ...  the same once, untimed, with the sums of what shard_trace says after every statement, and what this process read by
 *       system calls (a segment's own reads only with VECSHARD_MMAP=0)
 *   share ...  SQL's part: every query through SQL, through SQL prepared anew, and by shard_search_run, in turns of whole passes;
 *       of each query the fastest of C counts
 *
 * FILE gets N*K int64 ids (-1: none), then, without batch, N uint64 nanoseconds. CPU time is that of all threads.
 */
#include <errno.h>
#include <inttypes.h>
#include <sqlite3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../ext/shard/shard.h"

typedef struct bench {
  sqlite3 *db;
  shard *shard;     /* for core=1: a handle of the linked library's own */
  float *queries;
  size_t n_queries, dim;
  char error[1200]; /* "" : none */
} bench;

typedef struct settings {
  size_t first, n, k;
  int64_t nprobe, refine; /* -1: not given */
  double recall;          /* < 0: not given */
  int exact, threads, batch, passes, core;
  const char *out;
} settings;

typedef struct times { double wall_s, cpu_s; uint64_t *ns; /* per query; NULL: not wanted */ } times;

static int fail(bench *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fail(bench *b, const char *format, ...) {
  va_list ap;
  va_start(ap, format);
  if (!b->error[0]) vsnprintf(b->error, sizeof b->error, format, ap);
  va_end(ap);
  return 1;
}
static int fail_sql(bench *b) { return fail(b, "%s", sqlite3_errmsg(b->db)); }

static uint64_t clock_ns(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void print_error(const char *text) {
  printf("{\"error\":\"");
  for (; *text; text++)
    if (*text == '"' || *text == '\\') printf("\\%c", *text);
    else putchar((unsigned char)*text < 32 ? ' ' : *text);
  printf("\"}\n");
}

/* ---- opening ---- */

static int run_sql(bench *b, char *sql) { /* sql by sqlite3_mprintf; freed here */
  int rc = sql ? sqlite3_exec(b->db, sql, NULL, NULL, NULL) : SQLITE_NOMEM;
  sqlite3_free(sql);
  return rc ? fail_sql(b) : 0;
}

static int read_queries(bench *b, const char *path) {
  FILE *f = fopen(path, "rb");
  if (!f) return fail(b, "%s: %s", path, strerror(errno));
  fseek(f, 0, SEEK_END);
  long size = ftell(f);
  rewind(f);
  b->n_queries = size > 0 ? (size_t)size / (b->dim * sizeof(float)) : 0;
  b->queries = malloc(size > 0 ? (size_t)size : 1);
  int good = b->queries && b->n_queries && fread(b->queries, b->dim * sizeof(float), b->n_queries, f) == b->n_queries;
  fclose(f);
  return good ? 0 : fail(b, "%s: no rows of %zu float32 can be read", path, b->dim);
}

static const float *query(const bench *b, size_t i) { return b->queries + i * b->dim; }

/* The queries as a table, for vec_pack. */
static int fill_table(bench *b) {
  sqlite3_stmt *s = NULL;
  int rc = sqlite3_exec(b->db, "CREATE TABLE queries(n INTEGER PRIMARY KEY, v BLOB); BEGIN", NULL, NULL, NULL);
  if (!rc) rc = sqlite3_prepare_v2(b->db, "INSERT INTO queries VALUES(?, ?)", -1, &s, NULL);
  for (size_t i = 0; i < b->n_queries && !rc; i++) {
    sqlite3_bind_int64(s, 1, (sqlite3_int64)i);
    sqlite3_bind_blob64(s, 2, query(b, i), b->dim * sizeof(float), SQLITE_STATIC);
    if (sqlite3_step(s) != SQLITE_DONE) rc = SQLITE_ERROR;
    sqlite3_reset(s);
  }
  if (rc) fail_sql(b);
  sqlite3_finalize(s);
  return rc ? 1 : run_sql(b, sqlite3_mprintf("COMMIT"));
}

static int open_all(bench *b, char **arg) {
  char *message = NULL;
  vs_err err = {0};
  b->dim = (size_t)strtoul(arg[4], NULL, 10);
  if (!b->dim) return fail(b, "%s: no dimension", arg[4]);
  if (sqlite3_open(":memory:", &b->db)) return fail(b, "cannot open a database in memory");
  sqlite3_enable_load_extension(b->db, 1);
  if (sqlite3_load_extension(b->db, arg[1], NULL, &message)) {
    fail(b, "%s", message ? message : arg[1]);
    sqlite3_free(message);
    return 1;
  }
  if (read_queries(b, arg[3]) || fill_table(b)) return 1;
  if (run_sql(b, sqlite3_mprintf("CREATE VIRTUAL TABLE t USING vecshard(path=%Q)", arg[2]))) return 1;
  if (shard_open(arg[2], 0, &b->shard, &err)) return fail(b, "%s", err.text);
  if (b->shard->manifest.dim != b->dim) return fail(b, "%s has %u dimensions", arg[2], b->shard->manifest.dim);
  return 0;
}

static void close_all(bench *b) {
  shard_close(b->shard);
  sqlite3_close(b->db);
  free(b->queries);
}

static int say_hello(bench *b) {
  sqlite3_stmt *s = NULL;
  const char *sql = "SELECT vecshard_version(), vecshard_cpu(), sqlite_version()";
  if (sqlite3_prepare_v2(b->db, sql, -1, &s, NULL) || sqlite3_step(s) != SQLITE_ROW) {
    sqlite3_finalize(s);
    return fail_sql(b);
  }
  printf("{\"version\":\"%s\",\"cpu\":\"%s\",\"sqlite\":\"%s\",\"rows\":%" PRIu64 ",\"segments\":[", sqlite3_column_text(s, 0),
         sqlite3_column_text(s, 1), sqlite3_column_text(s, 2), b->shard->manifest.n_rows);
  for (size_t i = 0; i < b->shard->manifest.n_segments; i++) {
    const ivfpq_params *p = &b->shard->segments[i]->params;
    printf("%s{\"rows\":%" PRIu64 ",\"nlist\":%u,\"code_bytes\":%u,\"bits\":%u,\"term_bytes\":%u,\"row_bytes\":%u,\"sketch_bytes\":%u,"
           "\"file_bytes\":%" PRIu64 "}", i ? "," : "", p->n_rows, p->nlist, p->m, p->bits, p->m ? 2 : 0, p->row_bytes, p->sketch_bytes,
           b->shard->manifest.segments[i].n_bytes);
  }
  printf("]}\n");
  sqlite3_finalize(s);
  return 0;
}

/* ---- statements ---- */

static sqlite3_stmt *prepare(bench *b, const settings *w) {
  sqlite3_stmt *s = NULL;
  char *sql = sqlite3_mprintf(
      "%s%s%s%s%s",
      w->batch ? "SELECT query_no, id FROM shard_union WHERE source = 't' AND k = ?2 "
                 "AND query = (SELECT vec_pack(v) FROM queries WHERE n BETWEEN ?7 AND ?8)"
               : "SELECT id FROM t WHERE embedding MATCH ?1 AND k = ?2",
      w->nprobe >= 0 ? " AND nprobe = ?3" : "", w->refine >= 0 ? " AND refine = ?4" : "", w->recall >= 0 ? " AND recall = ?5" : "",
      w->exact ? " AND exact = ?6" : "");
  if (!sql || sqlite3_prepare_v2(b->db, sql, -1, &s, NULL)) fail_sql(b);
  sqlite3_free(sql);
  return s;
}

static void bind(const bench *b, sqlite3_stmt *s, const settings *w, size_t i) {
  const int last = sqlite3_bind_parameter_count(s); /* the highest number */
  if (!w->batch) sqlite3_bind_blob64(s, 1, query(b, i), b->dim * sizeof(float), SQLITE_STATIC);
  sqlite3_bind_int64(s, 2, (sqlite3_int64)w->k);
  if (w->nprobe >= 0) sqlite3_bind_int64(s, 3, w->nprobe);
  if (w->refine >= 0) sqlite3_bind_int64(s, 4, w->refine);
  if (w->recall >= 0) sqlite3_bind_double(s, 5, w->recall);
  if (w->exact) sqlite3_bind_int(s, 6, 1);
  if (last >= 8) sqlite3_bind_int64(s, 7, (sqlite3_int64)w->first), sqlite3_bind_int64(s, 8, (sqlite3_int64)(w->first + w->n - 1));
}

/* One query; ids has room for k. */
static int step_single(bench *b, sqlite3_stmt *s, const settings *w, size_t i, int64_t *ids) {
  int rc;
  size_t n = 0;
  bind(b, s, w, i);
  while ((rc = sqlite3_step(s)) == SQLITE_ROW)
    if (n < w->k) ids[n++] = sqlite3_column_int64(s, 0);
  if (rc != SQLITE_DONE) fail_sql(b);
  sqlite3_reset(s);
  return rc != SQLITE_DONE;
}

/* All at once; query_no counts from 0 and comes in ascending order or not. */
static int step_batch(bench *b, sqlite3_stmt *s, const settings *w, size_t *counts, int64_t *ids) {
  int rc;
  memset(counts, 0, w->n * sizeof *counts);
  bind(b, s, w, 0);
  while ((rc = sqlite3_step(s)) == SQLITE_ROW) {
    sqlite3_int64 no = sqlite3_column_int64(s, 0);
    if (no >= 0 && (size_t)no < w->n && counts[no] < w->k) ids[(size_t)no * w->k + counts[no]++] = sqlite3_column_int64(s, 1);
  }
  if (rc != SQLITE_DONE) fail_sql(b);
  sqlite3_reset(s);
  return rc != SQLITE_DONE;
}

/* The same by the function that the table calls; row numbers are what a shard of raw rows has for ids. */
static int step_core(bench *b, const settings *w, size_t i, int64_t *ids) {
  shard_search q = {.shards = &b->shard, .n_shards = 1, .query = query(b, i), .dim = (uint32_t)b->dim, .k = w->k, .nprobe = w->nprobe,
                    .refine = w->refine, .exact = w->exact, .threads = w->threads};
  shard_hit *hits = NULL;
  shard_stats stats;
  vs_err err = {0};
  size_t n = 0;
  vs_rc rc = shard_search_run(&q, &hits, &n, &stats, &err);
  if (rc) return fail(b, "%s", err.text);
  for (size_t j = 0; j < n && j < w->k; j++) ids[j] = hits[j].row;
  free(hits);
  return 0;
}

/* One pass over the queries. */
static int pass(bench *b, sqlite3_stmt *s, const settings *w, size_t *counts, int64_t *ids, times *t) {
  uint64_t cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID), start = clock_ns(CLOCK_MONOTONIC), at = start;
  int bad = 0;
  if (w->batch) bad = step_batch(b, s, w, counts, ids);
  for (size_t i = 0; i < w->n && !w->batch && !bad; i++) {
    bad = w->core ? step_core(b, w, w->first + i, ids + i * w->k) : step_single(b, s, w, w->first + i, ids + i * w->k);
    uint64_t now = clock_ns(CLOCK_MONOTONIC);
    t->ns[i] = now - at;
    at = now;
  }
  t->wall_s = (double)(clock_ns(CLOCK_MONOTONIC) - start) * 1e-9;
  t->cpu_s = (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) * 1e-9;
  return bad;
}

static int set_threads(bench *b, int threads) {
  return run_sql(b, sqlite3_mprintf("SELECT vecshard_config('threads', '%d')", threads));
}

static int write_out(bench *b, const settings *w, const int64_t *ids, const uint64_t *ns) {
  if (!w->out) return 0;
  FILE *f = fopen(w->out, "wb");
  if (!f) return fail(b, "%s: %s", w->out, strerror(errno));
  size_t n = w->n * w->k;
  int good = fwrite(ids, sizeof *ids, n, f) == n && (!ns || fwrite(ns, sizeof *ns, w->n, f) == w->n);
  if (fclose(f)) good = 0;
  return good ? 0 : fail(b, "%s: %s", w->out, strerror(errno));
}

typedef struct buffers { int64_t *ids; size_t *counts; uint64_t *ns, *best_ns; } buffers;

static void buffers_free(buffers *m) { free(m->ids), free(m->counts), free(m->ns), free(m->best_ns); }

static int buffers_make(bench *b, const settings *w, buffers *m) {
  *m = (buffers){malloc(w->n * w->k * sizeof *m->ids), malloc(w->n * sizeof *m->counts), malloc(w->n * sizeof *m->ns),
                 malloc(w->n * sizeof *m->best_ns)};
  if (m->ids && m->counts && m->ns && m->best_ns) {
    memset(m->ids, 0xff, w->n * w->k * sizeof *m->ids);
    return 0;
  }
  buffers_free(m);
  return fail(b, "out of memory for %zu x %zu rows", w->n, w->k);
}

static int do_run(bench *b, const settings *w) {
  buffers m;
  double wall = 1e30, cpu = 1e30;
  if (set_threads(b, w->threads) || buffers_make(b, w, &m)) return 1;
  sqlite3_stmt *s = w->core ? NULL : prepare(b, w);
  int bad = !s && !w->core;
  for (int i = 0; i < w->passes && !bad; i++) {
    times t = {.ns = m.ns};
    bad = pass(b, s, w, m.counts, m.ids, &t);
    if (t.cpu_s < cpu) cpu = t.cpu_s;
    if (t.wall_s < wall) wall = t.wall_s, memcpy(m.best_ns, m.ns, w->n * sizeof *m.ns);
  }
  sqlite3_finalize(s);
  if (!bad) bad = write_out(b, w, m.ids, w->batch ? NULL : m.best_ns);
  if (!bad) printf("{\"wall_s\":%.9f,\"cpu_s\":%.9f}\n", wall, cpu);
  buffers_free(&m);
  return bad;
}

/* ---- what the searches did ---- */

static uint64_t bytes_by_calls(void) { /* 0: not known */
  uint64_t n = 0;
  char line[100];
  FILE *f = fopen("/proc/self/io", "r");
  while (f && fgets(line, sizeof line, f))
    if (!strncmp(line, "rchar:", 6)) n = strtoull(line + 6, NULL, 10);
  if (f) fclose(f);
  return n;
}

enum { SCAN_PARTITIONS, SCAN_ROWS, REFINE_ROWS, SCAN_MS, REFINE_MS, ROWS_MS, N_SUMS };
static int add_trace(bench *b, sqlite3_stmt *s, double *sums) {
  if (sqlite3_step(s) != SQLITE_ROW) return fail_sql(b);
  for (int i = 0; i < N_SUMS; i++) sums[i] += sqlite3_column_double(s, i);
  sqlite3_reset(s);
  return 0;
}

static int do_trace(bench *b, const settings *w) {
  buffers m;
  double sums[N_SUMS] = {0};
  uint64_t read = 0;
  sqlite3_stmt *trace = NULL;
  if (set_threads(b, w->threads) || buffers_make(b, w, &m)) return 1;
  sqlite3_stmt *s = prepare(b, w);
  int bad = !s;
  if (!bad && sqlite3_prepare_v2(b->db, "SELECT sum(partitions) FILTER (WHERE phase = 'scan'), sum(rows) FILTER (WHERE phase = 'scan'), "
                                        "sum(rows) FILTER (WHERE phase = 'refine'), sum(ms) FILTER (WHERE phase = 'scan'), "
                                        "sum(ms) FILTER (WHERE phase = 'refine'), sum(ms) FILTER (WHERE phase = 'rows') FROM shard_trace",
                                 -1, &trace, NULL))
    bad = fail_sql(b);
  for (size_t i = 0; i < (w->batch ? 1 : w->n) && !bad; i++) {
    uint64_t before = bytes_by_calls();
    bad = w->batch ? step_batch(b, s, w, m.counts, m.ids) : step_single(b, s, w, w->first + i, m.ids + i * w->k);
    uint64_t after = bytes_by_calls(); /* the file itself is read, too: some 100 bytes */
    read += after - before;
    if (!bad) bad = add_trace(b, trace, sums);
  }
  sqlite3_finalize(trace);
  sqlite3_finalize(s);
  if (!bad) bad = write_out(b, w, m.ids, w->batch ? NULL : m.ns);
  if (!bad)
    printf("{\"partitions\":%.0f,\"rows\":%.0f,\"refined\":%.0f,\"scan_ms\":%.6f,\"refine_ms\":%.6f,\"rows_ms\":%.6f,\"read\":%"
           PRIu64 "}\n", sums[SCAN_PARTITIONS], sums[SCAN_ROWS], sums[REFINE_ROWS], sums[SCAN_MS], sums[REFINE_MS], sums[ROWS_MS], read);
  buffers_free(&m);
  return bad;
}

/* ---- SQL's share ---- */

static void keep_fastest(uint64_t *best, const uint64_t *ns, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (ns[i] < best[i]) best[i] = ns[i];
}
static double mean_us(const uint64_t *ns, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += (double)ns[i];
  return sum / (double)n / 1000;
}

static int pass_prepared_anew(bench *b, const settings *w, int64_t *ids, uint64_t *ns) {
  for (size_t i = 0; i < w->n; i++) {
    uint64_t start = clock_ns(CLOCK_MONOTONIC);
    sqlite3_stmt *s = prepare(b, w);
    int bad = !s || step_single(b, s, w, w->first + i, ids + i * w->k);
    sqlite3_finalize(s);
    ns[i] = clock_ns(CLOCK_MONOTONIC) - start;
    if (bad) return 1;
  }
  return 0;
}

static int do_share(bench *b, const settings *given) {
  enum { SQL, ANEW, CORE, N_WAYS };
  settings w = *given;
  uint64_t *best = NULL;
  buffers m;
  w.batch = 0;
  if (set_threads(b, w.threads) || buffers_make(b, &w, &m)) return 1;
  sqlite3_stmt *s = prepare(b, &w);
  int bad = !s;
  if (!bad && !(best = malloc(N_WAYS * w.n * sizeof *best))) bad = fail(b, "out of memory");
  if (best) memset(best, 0xff, N_WAYS * w.n * sizeof *best);
  for (int i = 0; i < w.passes && !bad; i++)
    for (int way = 0; way < N_WAYS && !bad; way++) {
      times t = {.ns = m.ns};
      w.core = way == CORE;
      bad = way == ANEW ? pass_prepared_anew(b, &w, m.ids, m.ns) : pass(b, s, &w, m.counts, m.ids, &t);
      keep_fastest(best + (size_t)way * w.n, m.ns, w.n);
    }
  sqlite3_finalize(s);
  if (!bad)
    printf("{\"sql_us\":%.4f,\"prepared_anew_us\":%.4f,\"core_us\":%.4f}\n", mean_us(best, w.n), mean_us(best + w.n, w.n),
           mean_us(best + 2 * w.n, w.n));
  free(best);
  buffers_free(&m);
  return bad;
}

/* ---- the protocol ---- */

static int parse(bench *b, char *line, char **command, settings *w) {
  char *save = NULL;
  *w = (settings){.n = 1, .k = 10, .nprobe = -1, .refine = -1, .recall = -1, .threads = 1, .passes = 1};
  *command = strtok_r(line, " \n", &save);
  for (char *word; (word = strtok_r(NULL, " \n", &save));) {
    char *value = strchr(word, '=');
    if (!value) return fail(b, "%s: no name=value", word);
    *value++ = 0;
    long number = strtol(value, NULL, 10);
    if (!strcmp(word, "first")) w->first = (size_t)number;
    else if (!strcmp(word, "n")) w->n = (size_t)number;
    else if (!strcmp(word, "k")) w->k = (size_t)number;
    else if (!strcmp(word, "nprobe")) w->nprobe = number;
    else if (!strcmp(word, "refine")) w->refine = number;
    else if (!strcmp(word, "recall")) w->recall = strtod(value, NULL);
    else if (!strcmp(word, "exact")) w->exact = (int)number;
    else if (!strcmp(word, "threads")) w->threads = (int)number;
    else if (!strcmp(word, "batch")) w->batch = (int)number;
    else if (!strcmp(word, "passes")) w->passes = (int)number;
    else if (!strcmp(word, "core")) w->core = (int)number;
    else if (!strcmp(word, "out")) w->out = value;
    else return fail(b, "%s: unknown", word);
  }
  if (!w->n || !w->k || w->n > b->n_queries || w->first > b->n_queries - w->n) return fail(b, "queries out of range");
  if (w->k > (size_t)1 << 32 || w->passes < 1) return fail(b, "k or passes out of range");
  return 0;
}

int main(int argc, char **argv) {
  static bench b;
  char *line = NULL, *command = NULL;
  size_t room = 0;
  if (argc != 5) {
    fprintf(stderr, "usage: bench_sql EXTENSION SHARD QUERIES.f32 DIM\n");
    return 2;
  }
  int bad = open_all(&b, argv) || say_hello(&b);
  if (bad) fprintf(stderr, "bench_sql: %s\n", b.error);
  fflush(stdout);
  while (!bad && getline(&line, &room, stdin) > 0) {
    settings w;
    b.error[0] = 0;
    int refused = parse(&b, line, &command, &w);
    if (!refused && !command) refused = fail(&b, "no command");
    if (!refused)
      refused = !strcmp(command, "run") ? do_run(&b, &w) : !strcmp(command, "trace") ? do_trace(&b, &w)
              : !strcmp(command, "share") ? do_share(&b, &w) : fail(&b, "%s: unknown command", command);
    if (refused) print_error(b.error);
    fflush(stdout);
  }
  free(line);
  close_all(&b);
  return bad;
}
