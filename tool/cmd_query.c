/* cmd_query.c - searches with every vector of a file; rows of the answer go out as they are found.
 *
 * Output: query_no (from 0), shard, id, distance; nearest first per query. csv follows RFC 4180 with one header line,
 * jsonl is one object per line.
 * Queries go in blocks: while one is searched, the answers of the block before it are written and the block behind it is read. So
 * any number of them takes the memory of three blocks.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/base/vs_pool.h"
#include "../ext/s3vfs/s3_config.h"
#include "../ext/shard/shard.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "progress.h"
#include "query_input.h"
#include "query_pull.h"
#include "store_folder.h"

enum { FORMAT_CSV = 0, FORMAT_JSONL = 1, BLOCK_BYTES = 64 << 20 /* of vectors */ };

typedef struct query_options {
  int json, exact, format;
  int64_t k, nprobe, refine, threads;
  double recall;
  const char *queries, *out, *embedding_dataset, *pull;
} query_options;

static const option_row rows[] = {
    {"--queries", OPTION_TEXT, "FILE", 0, 0, NULL, 1, offsetof(query_options, queries),
     "HDF5, .npy, .fvecs or .f32 with the query vectors"},
    {"-k", OPTION_COUNT, "K", 0, INT64_MAX, NULL, 1, offsetof(query_options, k), "rows per query"},
    {"--nprobe", OPTION_COUNT, "N", 1, INT64_MAX, NULL, 0, offsetof(query_options, nprobe),
     "partitions to search (default: by their number)"},
    {"--refine", OPTION_COUNT, "N", 0, INT64_MAX, NULL, 0, offsetof(query_options, refine),
     "k * N candidates are compared by stored vectors (default: 10)"},
    {"--recall", OPTION_SHARE, "R", 0, 0, NULL, 0, offsetof(query_options, recall),
     "as many of the true nearest on average, at the least cost (instead of --nprobe and --refine)"},
    {"--exact", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(query_options, exact),
     "brute force over all rows: the truth"},
    {"--format", OPTION_CHOICE, "csv|jsonl", 0, 0, "csv", 0, offsetof(query_options, format), "of the answer"},
    {"--out", OPTION_TEXT, "FILE", 0, 0, NULL, 0, offsetof(query_options, out),
     "where the answer goes (default: standard output)"},
    {"--threads", OPTION_COUNT, "N", 1, 4096, "all CPUs allowed", 0, offsetof(query_options, threads), "threads"},
    {"--pull", OPTION_TEXT, "DIR", 0, 0, NULL, 0, offsetof(query_options, pull),
     "gets the shards out of the store first, into DIR, when the queries would read more of them than that; says what it did"},
    OPTION_EMBEDDING(query_options),
    {"--json", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(query_options, json), "the same as --format jsonl"},
};
static const option_command command = {"query",
                                       "SOURCE --queries FILE -k K",
                                       "Searches a shard or a database with every vector of a file and writes "
                                       "query_no,shard,id,distance, nearest first per query.",
                                       "  vecshard query db --queries q.fvecs -k 10 --nprobe 32 --out hits.csv\n"
                                       "  vecshard query s3://my-bucket/db --queries q.npy -k 10 --recall 0.95 --pull db",
                                       1,
                                       1,
                                       rows,
                                       sizeof rows / sizeof *rows};

/* Some queries and their answers. */
typedef struct block {
  float *vectors;
  size_t n;
  uint64_t first;         /* number of the first query */
  shard_answers answers;
} block;

typedef struct query_job {
  const query_options *o;
  shard_set set;
  input *in;
  output out;
  size_t block_size;
  block blocks[3];        /* written, searched, read; they take turns */
  block *done, *now, *next;
  vs_rc search_rc, other_rc;
  vs_err search_err, other_err;
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

typedef struct place { query_job *j; const block *b; size_t query; } place;

static vs_rc put_hit(void *ctx, size_t i, const ivfpq_id *id, vs_err *err) {
  place *p = ctx;
  const shard_answers *a = &p->b->answers;
  const char *name = p->j->set.names[a->hits[i].shard];
  (void)err;
  while (i >= a->first[p->query + 1]) p->query++;
  uint64_t number = p->b->first + p->query;
  if (p->j->o->format == FORMAT_JSONL) put_jsonl(p->j->out.file, number, name, id, a->hits[i].distance);
  else put_csv(p->j->out.file, number, name, id, a->hits[i].distance);
  return VS_OK;
}

static vs_rc write_block(query_job *j, block *b, vs_err *err) {
  place p = {.j = j, .b = b};
  vs_rc rc = VS_OK;
  size_t n = b->n ? b->answers.first[b->n] : 0;
  if (b->answers.ids) {
    for (size_t i = 0; i < n; i++) {
      ivfpq_id id = {.i = b->answers.ids[i]};
      rc = put_hit(&p, i, &id, err);
    }
  } else if (n) rc = shard_ids(j->set.shards, j->set.n, b->answers.hits, n, put_hit, &p, err);
  shard_answers_reset(&b->answers);
  b->n = 0;
  return !rc && ferror(j->out.file) ? vs_fail(err, VS_IO, "cannot write the answer") : rc;
}

/* ---- the queries ---- */

static shard_search search_of(const query_job *j) {
  const query_options *o = j->o;
  return (shard_search){.shards = j->set.shards, .n_shards = j->set.n, .dim = j->set.shards[0]->manifest.dim, .k = (uint64_t)o->k,
                        .nprobe = o->nprobe, .refine = o->refine, .recall = o->recall, .exact = o->exact, .threads = (int)o->threads};
}

static vs_rc read_block(query_job *j, block *b, vs_err *err) {
  return query_input_read(j->in, j->o->queries, b->vectors, j->block_size, &b->n, &b->first, err);
}

static vs_rc search_block(query_job *j, block *b, vs_err *err) {
  shard_batch batch = {.search = search_of(j), .queries = b->vectors, .n = b->n, .first = b->first};
  shard_stats stats;
  vs_err why = {0};
  if (!b->n) return VS_OK;
  vs_rc rc = shard_batch_run(&batch, &b->answers, &stats, &why);
  if (rc == VS_INTERRUPT) return vs_fail(err, rc, "interrupted");
  return rc ? vs_fail(err, rc, "%s: %s", j->o->queries, why.text) : VS_OK;
}

/* Two tasks at once: this block is searched; the one before is written, and then the next is read. */
static void step_task(void *ctx, size_t i) {
  query_job *j = ctx;
  if (i == 0) {
    j->search_rc = search_block(j, j->now, &j->search_err);
    return;
  }
  vs_rc rc = write_block(j, j->done, &j->other_err);
  j->other_rc = rc ? rc : read_block(j, j->next, &j->other_err);
}

static vs_rc failure_of(query_job *j, vs_err *err) {
  /* what the user needs is what comes first in the file: the block that is read lies behind the one that is searched */
  if (tool_stop(NULL)) return vs_fail(err, VS_INTERRUPT, "interrupted");
  if (j->search_rc) return vs_fail(err, j->search_rc, "%s", j->search_err.text);
  return j->other_rc ? vs_fail(err, j->other_rc, "%s", j->other_err.text) : VS_OK;
}

static vs_rc run_all(query_job *j, vs_err *err) {
  vs_rc rc = read_block(j, j->now, err);
  if (j->o->format == FORMAT_CSV) fputs("query_no,shard,id,distance\n", j->out.file);
  while (!rc && (j->now->n || j->done->n)) {
    block *free_one = j->done;
    progress_show(NULL, "search", j->now->first, j->in->n_rows);
    vs_pool_run(2, (int)j->o->threads, step_task, j);
    rc = failure_of(j, err);
    j->done = j->now, j->now = j->next, j->next = free_one;
  }
  return rc;
}

static void blocks_open(query_job *j) {
  shard_search q = search_of(j);
  size_t most = BLOCK_BYTES / (q.dim * sizeof(float)) + 1;
  j->block_size = shard_batch_most(&q);
  if (j->block_size > most) j->block_size = most;
  if (j->block_size > j->in->n_rows) j->block_size = j->in->n_rows ? (size_t)j->in->n_rows : 1;
  for (size_t i = 0; i < 3; i++) j->blocks[i].vectors = tool_alloc(j->block_size * q.dim, sizeof(float));
  j->done = &j->blocks[0], j->now = &j->blocks[1], j->next = &j->blocks[2];
}

/* ---- the whole ---- */

static vs_rc open_source(query_job *j, const char *source, vs_err *err) {
  vs_rc rc = shard_set_open(source, &j->set, err);
  return !rc && !j->set.n ? vs_fail(err, VS_NOTFOUND, "%s: holds no shard", source) : rc;
}

/* From here on the shards in DIR are searched, if they were pulled. */
static vs_rc pull_first(query_job *j, const char *source, vs_err *err) {
  shard_search q = search_of(j);
  char *local = NULL;
  vs_rc rc = query_pull(source, j->o->pull, &q, j->in->n_rows, &local, err);
  if (!rc && local) {
    shard_set_reset(&j->set);
    rc = open_source(j, local, err);
  }
  free(local);
  return rc;
}

static vs_rc run(const char *source, const query_options *o, vs_err *err) {
  query_job j = {.o = o};
  vs_rc rc = open_source(&j, source, err);
  if (!rc) rc = query_input_open(o->queries, o->embedding_dataset, j.set.shards[0]->manifest.dim, &j.in, err);
  if (!rc && o->pull) rc = pull_first(&j, source, err);
  if (!rc) rc = output_open(o->out, &j.out, err);
  if (!rc) {
    blocks_open(&j);
    rc = output_close(&j.out, run_all(&j, err), err);
  }
  for (size_t i = 0; i < 3; i++) free(j.blocks[i].vectors), shard_answers_reset(&j.blocks[i].answers);
  input_close(j.in);
  shard_set_reset(&j.set);
  return rc;
}

int cmd_query(int argc, char **argv) {
  query_options o = {.nprobe = -1, .refine = -1};
  tool_list args = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0 && o.pull && (!store_is_uri(args.items[0]) || s3_is_uri(o.pull) || !*o.pull))
    status = (int)options_wrong(&command, "--pull DIR gets shards out of a store: the source must be like s3://bucket/prefix, DIR a folder");
  if (status < 0) {
    if (o.json) o.format = FORMAT_JSONL;
    vs_rc rc = run(args.items[0], &o, &err);
    status = rc ? (int)tool_report(&err) : (progress_clear(), TOOL_DONE);
  }
  tool_list_reset(&args);
  return status;
}
