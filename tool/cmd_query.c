/* cmd_query.c - searches with every vector of a file; rows of the answer go out as they are found.
 *
 * Output: query_no (from 0), shard, id, distance; nearest first per query. csv follows RFC 4180 with one header line,
 * jsonl is one object per line.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/input/input.h"
#include "../ext/shard/shard.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"

enum { FORMAT_CSV = 0, FORMAT_JSONL = 1, BATCH_QUERIES = 1024 };

typedef struct query_options {
  int json, exact, format;
  int64_t k, nprobe, refine, threads;
  const char *queries, *out, *embedding_dataset;
} query_options;

static const option_row rows[] = {
    {"--queries", OPTION_TEXT, "FILE", 0, 0, NULL, 1, offsetof(query_options, queries),
     "HDF5, .npy, .fvecs or .f32 with the query vectors"},
    {"-k", OPTION_COUNT, "K", 0, INT64_MAX, NULL, 1, offsetof(query_options, k), "rows per query"},
    {"--nprobe", OPTION_COUNT, "N", 1, INT64_MAX, NULL, 0, offsetof(query_options, nprobe),
     "partitions to search (default: by their number)"},
    {"--refine", OPTION_COUNT, "N", 0, INT64_MAX, NULL, 0, offsetof(query_options, refine),
     "k * N candidates are compared by stored vectors (default: 10)"},
    {"--exact", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(query_options, exact),
     "brute force over all rows: the truth"},
    {"--format", OPTION_CHOICE, "csv|jsonl", 0, 0, "csv", 0, offsetof(query_options, format), "of the answer"},
    {"--out", OPTION_TEXT, "FILE", 0, 0, NULL, 0, offsetof(query_options, out),
     "where the answer goes (default: standard output)"},
    {"--threads", OPTION_COUNT, "N", 1, 4096, "all CPUs allowed", 0, offsetof(query_options, threads), "threads"},
    OPTION_EMBEDDING(query_options),
    {"--json", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(query_options, json), "the same as --format jsonl"},
};
static const option_command command = {"query",
                                       "SOURCE --queries FILE -k K",
                                       "Searches a shard or a database with every vector of a file and writes "
                                       "query_no,shard,id,distance, nearest first per query.",
                                       "  vecshard query db --queries q.fvecs -k 10 --nprobe 32 --out hits.csv",
                                       1,
                                       1,
                                       rows,
                                       sizeof rows / sizeof *rows};

typedef struct query_job {
  const query_options *o;
  shard_set set;
  input *in;
  output out;
} query_job;

/* ---- the answer ---- */

static void csv_put(FILE *to, const char *text, size_t len) {
  int plain = 1;
  for (size_t i = 0; i < len && plain; i++) plain = !strchr("\",\r\n", text[i]);
  if (plain) {
    fwrite(text, 1, len, to);
    return;
  }
  fputc('"', to);
  for (size_t i = 0; i < len; i++) {
    if (text[i] == '"') fputc('"', to);
    fputc(text[i], to);
  }
  fputc('"', to);
}

static void put_csv(FILE *to, uint64_t query, const char *name, const ivfpq_id *id, float distance) {
  fprintf(to, "%llu,", (unsigned long long)query);
  csv_put(to, name, strlen(name));
  fputc(',', to);
  if (id->is_text) csv_put(to, id->text, id->len);
  else fprintf(to, "%lld", (long long)id->i);
  fprintf(to, ",%.9g\n", (double)distance);
}

static void put_jsonl(FILE *to, uint64_t query, const char *name, const ivfpq_id *id, float distance) {
  fprintf(to, "{\"query_no\":%llu,\"shard\":", (unsigned long long)query);
  json_put_text(to, name);
  fputs(",\"id\":", to);
  if (id->is_text) json_put(to, id->text, id->len);
  else fprintf(to, "%lld", (long long)id->i);
  /* JSON has no infinity; a distance that overflows float is that of rows far apart. */
  if (isfinite(distance)) fprintf(to, ",\"distance\":%.9g}\n", (double)distance);
  else fputs(",\"distance\":null}\n", to);
}

static vs_rc put_hit(query_job *j, uint64_t query, const shard_hit *hit, vs_err *err) {
  ivfpq_segment *s = j->set.shards[hit->shard]->segments[hit->segment];
  ivfpq_row row;
  ivfpq_id id = {0};
  vs_rc rc = ivfpq_rows_fetch(s, &hit->row, 1, &row, err);
  if (rc) return rc;
  rc = ivfpq_row_id(s, row.record, &id, err);
  if (!rc) {
    const char *name = j->set.names[hit->shard];
    if (j->o->format == FORMAT_JSONL) put_jsonl(j->out.file, query, name, &id, hit->distance);
    else put_csv(j->out.file, query, name, &id, hit->distance);
  }
  ivfpq_id_free(&id);
  ivfpq_rows_release(s, &row, 1);
  return rc;
}

/* ---- the queries ---- */

static vs_rc run_query(query_job *j, uint64_t number, const float *vector, uint8_t fault, vs_err *err) {
  shard_search q = {.shards = j->set.shards,
                    .n_shards = j->set.n,
                    .query = vector,
                    .dim = j->in->dim,
                    .k = (uint64_t)j->o->k,
                    .nprobe = j->o->nprobe,
                    .refine = j->o->refine,
                    .exact = j->o->exact,
                    .threads = (int)j->o->threads};
  shard_hit *hits = NULL;
  shard_stats stats;
  vs_err why = {0};
  size_t n = 0;
  vs_rc rc = fault ? vs_fail(&why, VS_INVALID, "%s", input_fault_text(fault)) : shard_search_run(&q, &hits, &n, &stats, &why);
  for (size_t i = 0; i < n && !rc; i++) rc = put_hit(j, number, &hits[i], &why);
  free(hits);
  if (rc == VS_INTERRUPT) return vs_fail(err, rc, "interrupted");
  return rc ? vs_fail(err, rc, "%s: query %llu: %s", j->o->queries, (unsigned long long)number, why.text) : VS_OK;
}

static vs_rc run_all(query_job *j, vs_err *err) {
  input_batch batch;
  vs_rc rc = VS_OK;
  if (j->o->format == FORMAT_CSV) fputs("query_no,shard,id,distance\n", j->out.file);
  for (;;) {
    rc = j->in->read(j->in, BATCH_QUERIES, &batch, err);
    if (rc || !batch.n) return rc;
    for (size_t i = 0; i < batch.n && !rc; i++) {
      progress_show(NULL, "search", batch.first_row + i, j->in->n_rows);
      if (tool_stop(NULL)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
      else rc = run_query(j, batch.first_row + i, batch.vectors + i * j->in->dim, batch.faults[i], err);
    }
    if (!rc && ferror(j->out.file)) rc = vs_fail(err, VS_IO, "cannot write the answer");
    if (rc) return rc;
  }
}

static vs_rc run(const char *source, const query_options *o, vs_err *err) {
  query_job j = {.o = o};
  vs_rc rc = shard_set_open(source, &j.set, err);
  if (rc) return rc;
  if (!j.set.n) rc = vs_fail(err, VS_NOTFOUND, "%s: holds no shard", source);
  uint32_t dim = rc ? 0 : j.set.shards[0]->manifest.dim;
  input_options opt = {.embedding_dataset = o->embedding_dataset, .id_dataset = "none", .dim = dim};
  if (!rc) rc = input_open(o->queries, &opt, &j.in, err);
  if (!rc && j.in->dim != dim)
    rc = vs_fail(err, VS_INVALID, "%s: its vectors have dimension %u, the shards %u", o->queries, j.in->dim, dim);
  if (!rc) rc = output_open(o->out, &j.out, err);
  if (!rc) rc = output_close(&j.out, run_all(&j, err), err);
  input_close(j.in);
  shard_set_reset(&j.set);
  return rc;
}

int cmd_query(int argc, char **argv) {
  query_options o = {.nprobe = -1, .refine = -1};
  tool_list args = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0) {
    if (o.json) o.format = FORMAT_JSONL;
    vs_rc rc = run(args.items[0], &o, &err);
    status = rc ? (int)tool_report(&err) : (progress_clear(), TOOL_DONE);
  }
  tool_list_reset(&args);
  return status;
}
