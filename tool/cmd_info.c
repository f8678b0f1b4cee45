/* cmd_info.c - what a shard or a database holds, from its manifests and the parameters of its segments. The shards
 * of a source may differ in what a search of all of them needs to be the same. */
#include <stdlib.h>
#include <string.h>

#include "../ext/ivfpq/ivfpq_setting.h"
#include "../ext/shard/shard.h"
#include "json.h"
#include "options.h"
#include "output.h"
#include "source.h"

typedef struct info_options { int json; } info_options;

static const option_row rows[] = {OPTION_JSON(info_options)};
static const option_command command = {
  "info", "SOURCE", "What a shard or a database (a folder of shards) holds. SOURCE is a path, or a JSON list of paths.",
  "  vecshard info db\n  vecshard info db --json | jq .rows", 1, 1, rows, sizeof rows / sizeof *rows};

static uint64_t total_rows(const shard_set *set) {
  uint64_t n = 0;
  for (size_t i = 0; i < set->n; i++) n += set->shards[i]->manifest.n_rows;
  return n;
}

/* Rows that it was calibrated with; 0: it was not. */
static unsigned calibrated(const ivfpq_segment *s) { return s->calibration ? s->calibration->n_queries : 0; }
/* With as many partitions as a search takes when nobody says. */
static double reach(const ivfpq_segment *s) { return (double)ivfpq_reach_for(s, ivfpq_default_nprobe(s->params.nlist)); }

static void json_segments(const shard *s) {
  for (size_t g = 0; g < s->manifest.n_segments; g++) {
    const shard_segment_ref *r = &s->manifest.segments[g];
    const ivfpq_params *p = &s->segments[g]->params;
    printf("%s{\"file\":\"%s\",\"rows\":%llu,\"nlist\":%u,\"m\":%u,\"bits\":%u,\"bytes\":%llu", g ? "," : "", r->file,
           (unsigned long long)r->n_rows, p->nlist, p->m, p->bits, (unsigned long long)r->n_bytes);
    printf(",\"calibrated\":%u,\"beta\":%.9g,\"reach\":%.9g}", calibrated(s->segments[g]), (double)p->beta, reach(s->segments[g]));
  }
}

static void json_columns(const shard_manifest *m) {
  static const char *const types[] = {"", "integer", "real", "text"};
  for (size_t c = 0; c < m->n_columns; c++) {
    printf("%s{\"name\":", c ? "," : "");
    json_put_text(stdout, m->columns[c].name);
    printf(",\"type\":\"%s\",\"filter\":%s,\"index\":%s}", types[m->columns[c].type],
           m->columns[c].filter ? "true" : "false", m->columns[c].index ? "true" : "false");
  }
}

static void print_json(const shard_set *set) {
  printf("{\"rows\":%llu,\"shards\":[", (unsigned long long)total_rows(set));
  for (size_t i = 0; i < set->n; i++) {
    const shard_manifest *m = &set->shards[i]->manifest;
    printf("%s{\"name\":", i ? "," : "");
    json_put_text(stdout, set->names[i]);
    printf(",\"path\":");
    json_put_text(stdout, set->shards[i]->path);
    printf(
        ",\"rows\":%llu,\"version\":%llu,\"uuid\":\"%s\",\"dim\":%u,\"metric\":\"%s\",\"store\":\"%s\",\"id\":\"%s\","
        "\"columns\":[",
        (unsigned long long)m->n_rows, (unsigned long long)m->version, m->uuid, m->dim, source_metric((int)m->metric),
        m->store == SHARD_F16 ? "f16" : "f32", m->id_text ? "text" : "integer");
    json_columns(m);
    printf("],\"segments\":[");
    json_segments(set->shards[i]);
    putchar(']');
    if (m->origin.known)
      printf(",\"built\":{\"rows\":%llu,\"skipped\":%llu,\"duplicates\":%llu}", (unsigned long long)m->origin.n_rows,
             (unsigned long long)m->origin.n_skipped, (unsigned long long)m->origin.n_duplicates);
    putchar('}');
  }
  printf("]}\n");
}

static void print_table(const shard_set *set) {
  char size[32];
  printf("%-24s %12s %7s %6s %-6s %-7s %9s %5s %4s %10s %10s %5s %8s\n", "shard", "rows", "version", "dim", "metric", "id",
         "nlist", "m", "bits", "size", "calibrated", "beta", "reach");
  for (size_t i = 0; i < set->n; i++) {
    const shard_manifest *m = &set->shards[i]->manifest;
    for (size_t g = 0; g < m->n_segments; g++) {
      const ivfpq_params *p = &set->shards[i]->segments[g]->params;
      printf("%-24s %12llu %7llu %6u %-6s %-7s %9u %5u %4u %10s %10u %5.3g %8.4g\n", g ? "" : set->names[i],
             (unsigned long long)m->segments[g].n_rows, (unsigned long long)m->version, m->dim,
             source_metric((int)m->metric), m->id_text ? "text" : "integer", p->nlist, p->m, p->bits,
             output_size(m->segments[g].n_bytes, size), calibrated(set->shards[i]->segments[g]), (double)p->beta,
             reach(set->shards[i]->segments[g]));
    }
  }
  printf("%llu rows in %zu shard%s\n", (unsigned long long)total_rows(set), set->n, set->n == 1 ? "" : "s");
}

/* ---- opening ---- */

static int name_repeats(const shard_set *set, size_t i) {
  for (size_t j = 0; j < set->n; j++)
    if (j != i && !strcmp(set->names[i], set->names[j])) return 1;
  return 0;
}

/* Where folders share a name, the path is shown instead. */
static void tell_apart(shard_set *set) {
  char *repeats = tool_alloc(set->n, 1);
  for (size_t i = 0; i < set->n; i++) repeats[i] = (char)name_repeats(set, i);
  for (size_t i = 0; i < set->n; i++)
    if (repeats[i]) free(set->names[i]), set->names[i] = tool_format("%s", set->shards[i]->path);
  free(repeats);
}

static vs_rc open_each(const char *source, shard_set *set, vs_err *err) {
  tool_list folders = {0};
  vs_rc rc = source_expand(source, &folders, err);
  *set = (shard_set){.shards = tool_alloc(folders.n, sizeof *set->shards),
                     .names = tool_alloc(folders.n, sizeof *set->names)};
  for (size_t i = 0; i < folders.n && !rc; i++) {
    const char *slash = strrchr(folders.items[i], '/');
    rc = shard_open(folders.items[i], 0, &set->shards[i], err);
    if (!rc) set->names[i] = tool_format("%s", slash ? slash + 1 : folders.items[i]), set->n++;
  }
  tool_list_reset(&folders);
  if (!rc) tell_apart(set);
  else shard_set_reset(set);
  return rc;
}

/* All at once first: what lies in stores is then opened in the same rounds. */
static vs_rc open_source(const char *source, shard_set *set, vs_err *err) {
  vs_err why = {0};
  size_t n = strlen(source);
  while (n > 1 && source[n - 1] == '/' && !strstr(source, "://")) n--; /* as it will be shown */
  char *shown = tool_format("%.*s", (int)n, source);
  vs_rc rc = shard_set_open(shown, set, &why);
  free(shown);
  if (rc == VS_INVALID) return open_each(source, set, err);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

int cmd_info(int argc, char **argv) {
  info_options o = {0};
  tool_list args = {0};
  shard_set set = {0};
  vs_err err = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0) {
    vs_rc rc = open_source(args.items[0], &set, &err);
    status = tool_report(&err);
    if (!rc && o.json) print_json(&set);
    else if (!rc) print_table(&set);
    if (!rc) shard_set_reset(&set);
  }
  tool_list_reset(&args);
  return status;
}
