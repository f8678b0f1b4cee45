/* cmd_cost.c - what a database of a planned size takes. How it is reckoned, and from which constants: cost.c. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cost.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "source.h"

typedef struct cost_options {
  int json, metric, store, bits;
  int64_t rows, dim, bucket_rows, subvectors, id_bytes, columns, k, nprobe, refine, queries, vcpus, speed;
  const char *partitions, *price[4];
} cost_options;

/* S3 Standard (the first 50 TB) and a vCPU of EC2's c7i.8xlarge on demand ($1.428 for 32), in us-east-1: list prices of
 * 2025. Reading within the region costs no more than its requests. */
#define PRICE_GB_MONTH "0.023"
#define PRICE_1000_GETS "0.0004"
#define PRICE_1000_PUTS "0.005"
#define PRICE_VCPU_HOUR "0.044625"

static const option_row rows[] = {
    {"--rows", OPTION_COUNT, "N", 1, INT64_C(1000000000000000), NULL, 1, offsetof(cost_options, rows), "vectors"},
    {"--dim", OPTION_COUNT, "D", 1, IVFPQ_MAX_DIM, NULL, 1, offsetof(cost_options, dim), "their dimension"},
    {"--bucket-rows", OPTION_COUNT, "N", 1, UINT32_MAX, "200000000", 0,
     offsetof(cost_options, bucket_rows), "rows of a shard at most"},
    {"--metric", OPTION_CHOICE, "l2|cosine|dot", 0, 0, "cosine", 0, offsetof(cost_options, metric), "the distance"},
    {"--store", OPTION_CHOICE, "f32|f16", 0, 0, "f32", 0, offsetof(cost_options, store), "how vectors are kept"},
    {"--bits", OPTION_CHOICE, "8|4", 0, 0, "8", 0, offsetof(cost_options, bits), "bits of a sub-vector's code"},
    {"--partitions", OPTION_TEXT, "N|sqrt", 0, 0, NULL, 0,
     offsetof(cost_options, partitions), "inverted lists of a shard, as for vecshard build"},
    {"--subvectors", OPTION_COUNT, "N", 1, 2 * IVFPQ_MAX_M, NULL, 0,
     offsetof(cost_options, subvectors), "as for vecshard build"},
    {"--id-bytes", OPTION_COUNT, "N", 0, IVFPQ_MAX_TEXT, "0", 0,
     offsetof(cost_options, id_bytes), "length of a text id; 0: integers"},
    {"--columns", OPTION_COUNT, "N", 0, IVFPQ_MAX_COLUMNS, "0", 0,
     offsetof(cost_options, columns), "filterable metadata columns with numbers"},
    {"-k", OPTION_COUNT, "K", 1, INT64_MAX, "10", 0, offsetof(cost_options, k), "rows that a query wants"},
    {"--nprobe", OPTION_COUNT, "N", 1, INT64_MAX, NULL, 0,
     offsetof(cost_options, nprobe), "partitions searched in each shard (default: by their number)"},
    {"--refine", OPTION_COUNT, "N", 0, INT64_MAX, NULL, 0,
     offsetof(cost_options, refine), "k * refine rows are compared by their vectors"},
    {"--queries-per-month", OPTION_COUNT, "N", 0, INT64_MAX, "0", 0,
     offsetof(cost_options, queries), "for the sum of a month"},
    {"--vcpus", OPTION_COUNT, "N", 1, 1000000, "32", 0, offsetof(cost_options, vcpus), "that build at the same time"},
    {"--vectors-per-second", OPTION_COUNT, "N", 1, INT64_MAX, NULL, 0, offsetof(cost_options, speed),
     "of one vCPU, measured on your machine (default: from builds of the nearest shape)"},
    {"--price-storage", OPTION_TEXT, "DOLLARS", 0, 0, PRICE_GB_MONTH, 0,
     offsetof(cost_options, price[0]), "a GB (2^30 bytes) for a month"},
    {"--price-get", OPTION_TEXT, "DOLLARS", 0, 0, PRICE_1000_GETS, 0,
     offsetof(cost_options, price[1]), "1,000 GET requests"},
    {"--price-put", OPTION_TEXT, "DOLLARS", 0, 0, PRICE_1000_PUTS, 0,
     offsetof(cost_options, price[2]), "1,000 PUT or LIST requests"},
    {"--price-vcpu", OPTION_TEXT, "DOLLARS", 0, 0, PRICE_VCPU_HOUR, 0,
     offsetof(cost_options, price[3]), "an hour of one vCPU"},
    OPTION_JSON(cost_options),
};
static const option_command command = {
    "cost",
    "--rows N --dim D [OPTIONS]",
    "Storage, build time, requests and dollars for a database of a planned size on S3. Prices are those of S3 Standard and "
    "of EC2's c7i.8xlarge on demand in us-east-1, 2025. Where builds and searches were measured: tool/cost.c.",
    "  vecshard cost --rows 3500000000 --dim 960\n"
    "  vecshard cost --rows 3500000000 --dim 960 --store f16 --nprobe 20 --queries-per-month 1000000",
    0,
    0,
    rows,
    sizeof rows / sizeof *rows};

/* ---- what was asked ---- */

static tool_status read_price(const char *name, const char *text, double *out) {
  char *end;
  errno = 0;
  *out = strtod(text, &end);
  if (errno || end == text || *end || !(*out >= 0) || !isfinite(*out))
    return options_wrong(&command, "%s is a number of dollars, not '%s'", name, text);
  return TOOL_DONE;
}

static tool_status read_question(const cost_options *o, cost_question *q) {
  static const char *const names[] = {"--price-storage", "--price-get", "--price-put", "--price-vcpu"};
  double *price[] = {&q->prices.gb_month, &q->prices.gets_1000, &q->prices.puts_1000, &q->prices.vcpu_hour};
  int64_t nlist = 0;
  *q = (cost_question){.build = {.metric = (ivfpq_metric)o->metric,
                                 .store_f16 = o->store,
                                 .subs = (uint32_t)o->subvectors,
                                 .bits = o->bits ? 4 : 8},
                       .rows = {.n_rows = (uint64_t)o->rows,
                                .dim = (uint32_t)o->dim,
                                .text_id = (uint32_t)o->id_bytes,
                                .filter_numbers = (uint32_t)o->columns},
                       .bucket_rows = (uint64_t)o->bucket_rows,
                       .k = (uint64_t)o->k,
                       .nprobe = o->nprobe,
                       .refine = o->refine,
                       .vectors_per_cpu_second = (double)o->speed};
  for (int i = 0; i < 4; i++) {
    tool_status status = read_price(names[i], o->price[i], price[i]);
    if (status) return status;
  }
  if (!o->partitions) return TOOL_DONE;
  q->sqrt_nlist = !strcmp(o->partitions, "sqrt");
  if (!q->sqrt_nlist && !options_number(o->partitions, 0, 1, IVFPQ_MAX_NLIST, &nlist))
    return options_wrong(&command, "--partitions is sqrt or a whole number from 1 to %d, not '%s'", IVFPQ_MAX_NLIST,
                         o->partitions);
  q->build.nlist = (uint32_t)nlist;
  return TOOL_DONE;
}

/* ---- the answer as text ---- */

/* "3,500,000,000"; some at once in one line. */
static const char *grouped(double n) {
  static char buf[8][40];
  static int next;
  char digits[40], *out = buf[next = (next + 1) % 8], *to = out;
  int len = snprintf(digits, sizeof digits, "%.0f", n < 1e18 ? n : 1e18);
  for (int i = 0; i < len; i++) {
    if (i && (len - i) % 3 == 0) *to++ = ',';
    *to++ = digits[i];
  }
  *to = 0;
  return out;
}

/* Three digits that matter. */
static const char *dollars(double x) {
  static char buf[8][40];
  static int next;
  char *out = buf[next = (next + 1) % 8];
  if (x >= 100) snprintf(out, 40, "$%s", grouped(x));
  else if (x >= 0.01 || x == 0) snprintf(out, 40, "$%.2f", x);
  else snprintf(out, 40, "$%.2g", x);
  return out;
}

static const char *size(double n_bytes) {
  static char buf[8][32];
  static int next;
  char *out = buf[next = (next + 1) % 8];
  return output_size((uint64_t)n_bytes, out);
}

static void storage_line(const cost_answer *a, const char *name, double of_shard) {
  if (of_shard > 0)
    printf("  %-26s %10s %12.1f bytes a row\n", name, size(of_shard * (double)a->n_shards), of_shard / (double)a->shard.n_rows);
}

static void print_storage(const cost_question *q, const cost_answer *a) {
  const uint64_t *s = a->section;
  double other = (double)(s[0] + s[IVFPQ_MEAN] + s[IVFPQ_CODEBOOK] + s[IVFPQ_PROJECTION] + s[IVFPQ_PARAMS] + a->hint_bytes);
  printf("storage\n");
  storage_line(a, "vectors and ids", (double)(s[IVFPQ_ROWS] + s[IVFPQ_IDHEAP]));
  storage_line(a, "vectors as bytes", (double)s[IVFPQ_SKETCH]);
  storage_line(a, "codes", (double)s[IVFPQ_SCAN]);
  storage_line(a, "metadata", (double)s[IVFPQ_COLUMNS]);
  storage_line(a, "directory of ids", (double)s[IVFPQ_IDDIR]);
  storage_line(a, "centroids", (double)s[IVFPQ_GROUPS]);
  storage_line(a, "parameters", other);
  storage_line(a, "all", (double)a->shard_bytes);
  printf("  %-26s %10s a month ($%g a GB)\n", "price", dollars(a->storage_dollars), q->prices.gb_month);
}

static void print_build(const cost_question *q, const cost_answer *a, const cost_options *o) {
  printf("build\n");
  printf("  %-26s %10s a second of one vCPU", "vectors", grouped(a->vectors_per_cpu_second));
  if (a->measured_dim)
    printf(" (scaled from a build of dimension %u with %u partitions)\n", a->measured_dim, a->measured_nlist);
  else printf(" (given)\n");
  printf("  %-26s %10s hours: %.1f hours of %lld vCPUs\n", "vCPU time", grouped(a->cpu_hours),
         a->cpu_hours / (double)o->vcpus, (long long)o->vcpus);
  printf("  %-26s %10s ($%g a vCPU hour)\n", "price", dollars(a->build_dollars), q->prices.vcpu_hour);
  printf("  %-26s %10s a shard, besides its %s\n", "temporary space", size((double)a->temp_bytes),
         size((double)a->segment_bytes));
  printf("  %-26s %10s requests, %s\n", "publishing", grouped(a->put_requests), dollars(a->put_dollars));
}

static void reads_line(const char *name, const cost_answer *a, const cost_reads *r) {
  printf("  %-26s %10s requests in %.0f rounds, %s, %s\n", name, grouped(r->requests), r->rounds, size(r->bytes),
         dollars(r->dollars + a->query_cpu_dollars));
}

static void print_text(const cost_question *q, const cost_answer *a, const cost_options *o) {
  const ivfpq_params *p = &a->params;
  printf("%s rows of dimension %u, %s, %s, in %s shard%s of %s rows\n", grouped((double)q->rows.n_rows), p->dim,
         source_metric((int)p->metric), p->store ? "f16" : "f32", grouped((double)a->n_shards),
         a->n_shards == 1 ? "" : "s", grouped((double)a->shard.n_rows));
  if (p->m)
    printf("a shard: %s partitions in %u groups, %u bytes of %u-bit codes a row\n", grouped(p->nlist), p->n_groups, p->m,
           p->bits);
  else printf("a shard: flat, every answer is exact\n");
  print_storage(q, a);
  print_build(q, a, o);
  printf("a query of all shards, about (k %s", grouped((double)q->k));
  if (p->m)
    printf(", nprobe %s, %s rows compared by their vectors", grouped(a->nprobe), grouped((double)a->n_candidates));
  printf(")\n");
  reads_line("cold", a, &a->cold);
  reads_line("warm", a, &a->warm);
  printf("  %-26s %10s ms of one vCPU, %s\n", "cached, and its CPU", grouped(a->query_cpu_s * 1000),
         dollars(a->query_cpu_dollars));
  if (o->queries)
    printf("a month with %s warm queries: %s\n", grouped((double)o->queries),
           dollars(a->storage_dollars + (double)o->queries * (a->warm.dollars + a->query_cpu_dollars)));
}

/* ---- and as JSON ---- */

static void json_reads(const char *name, const cost_answer *a, const cost_reads *r) {
  printf("\"%s\":{\"rounds\":%.0f,\"requests\":%.0f,\"bytes\":%.0f,\"dollars\":%.9g},", name, r->rounds, r->requests,
         r->bytes, r->dollars + a->query_cpu_dollars);
}

static void json_sizes(const cost_answer *a) {
  const ivfpq_params *p = &a->params;
  const uint64_t *s = a->section;
  double shards = (double)a->n_shards;
  printf("\"shard\":{\"rows\":%" PRIu64 ",\"partitions\":%u,\"groups\":%u,\"m\":%u,\"bits\":%u,\"row_bytes\":%u,",
         a->shard.n_rows, p->nlist, p->n_groups, p->m, p->bits, p->row_bytes);
  printf("\"segment_bytes\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"temp_bytes\":%" PRIu64 "},", a->segment_bytes,
         a->shard_bytes, a->temp_bytes);
  printf("\"storage\":{\"bytes\":%.0f,\"vectors\":%.0f,\"sketches\":%.0f,\"codes\":%.0f,\"metadata\":%.0f,", a->n_bytes,
         shards * (double)(s[IVFPQ_ROWS] + s[IVFPQ_IDHEAP]), shards * (double)s[IVFPQ_SKETCH],
         shards * (double)s[IVFPQ_SCAN], shards * (double)s[IVFPQ_COLUMNS]);
  printf("\"ids\":%.0f,\"centroids\":%.0f,\"dollars_per_month\":%.9g},", shards * (double)s[IVFPQ_IDDIR],
         shards * (double)s[IVFPQ_GROUPS], a->storage_dollars);
}

static void print_json(const cost_question *q, const cost_answer *a, const cost_options *o) {
  const ivfpq_params *p = &a->params;
  printf("{\"rows\":%" PRIu64 ",\"dim\":%u,\"metric\":\"%s\",\"store\":\"%s\",\"shards\":%" PRIu64 ",", q->rows.n_rows,
         p->dim, source_metric((int)p->metric), p->store ? "f16" : "f32", a->n_shards);
  json_sizes(a);
  printf("\"build\":{\"vectors_per_cpu_second\":%.9g,\"measured_dim\":%u,\"measured_partitions\":%u,\"cpu_hours\":%.9g,",
         a->vectors_per_cpu_second, a->measured_dim, a->measured_nlist, a->cpu_hours);
  printf("\"vcpus\":%lld,\"hours\":%.9g,\"dollars\":%.9g},", (long long)o->vcpus, a->cpu_hours / (double)o->vcpus,
         a->build_dollars);
  printf("\"publish\":{\"requests\":%.0f,\"dollars\":%.9g},", a->put_requests, a->put_dollars);
  printf("\"query\":{\"k\":%" PRIu64 ",\"nprobe\":%u,\"candidates\":%" PRIu64 ",", q->k, a->nprobe, a->n_candidates);
  json_reads("cold", a, &a->cold), json_reads("warm", a, &a->warm);
  printf("\"rows_scanned\":%.0f,\"cpu_ms\":%.9g,\"cpu_dollars\":%.9g},", a->rows_scanned, a->query_cpu_s * 1000,
         a->query_cpu_dollars);
  printf("\"month\":{\"queries\":%lld,\"dollars\":%.9g},", (long long)o->queries,
         a->storage_dollars + (double)o->queries * (a->warm.dollars + a->query_cpu_dollars));
  printf("\"prices\":{\"gb_month\":%.9g,\"gets_1000\":%.9g,\"puts_1000\":%.9g,\"vcpu_hour\":%.9g}}\n",
         q->prices.gb_month, q->prices.gets_1000, q->prices.puts_1000, q->prices.vcpu_hour);
}

int cmd_cost(int argc, char **argv) {
  cost_options o = {.nprobe = -1, .refine = -1};
  cost_question q;
  cost_answer a;
  tool_list none = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &none);
  if (status < 0 && !(status = (int)read_question(&o, &q))) {
    vs_rc rc = cost_estimate(&q, &a, &err);
    status = (int)tool_report(&err);
    if (!rc && o.json) print_json(&q, &a, &o);
    else if (!rc) print_text(&q, &a, &o);
  }
  tool_list_reset(&none);
  return status;
}
