/* cost.c - see cost.h.
 *
 * Sizes come from the builder's choices and the format's arithmetic (ivfpq_size.h): test/test_cost.py builds shards of
 * several dimensions and compares. A shard in a store is its segment, a manifest (some 1,000 bytes, left out) and `latest`
 * (shard_hint.h).
 *
 * Build time. CPU seconds of a vector = 1 / speed, where the speed is that of the measured build whose shape is nearest,
 * in proportion to dim * (nlist + 256): the multiply-adds that find a row's partition among nlist centroids and its code
 * words, 256 for each part of the vector. The table below is all there is to update after a new measurement.
 *
 * Requests of a query. Reads of one round that lie close together share a request (io_s3.h). n of N blocks of s bytes,
 * taken at random, lie in n * (1 - n/N)^(1 + gap/s) stretches. Partitions are taken to be of one size, and all nprobe of
 * them to be read: in practice those that are probed lie together more often, are larger than others, and easy queries
 * stop before the last. A query of the whole database takes
 *   cold   1 LIST of the database; per shard 1 LIST, 1 GET of `latest`, 1 of the codebook, the nearest groups of
 *          centroids; then what a warm one takes
 *   warm   (what never changes is in memory) per shard the nprobe nearest partitions; of all shards together the
 *          k * refine best rows
 * and what is asked again within VECSHARD_REFRESH_MS, or is in the cache, is not read at all.
 *
 * CPU of a query: rows scanned, partitions probed and candidates compared, in the nanoseconds that calibration counts with
 * (ivfpq_calibrate.h).
 */
#include "cost.h"

#include <math.h>
#include <string.h>

#include "../ext/ivfpq/ivfpq_calibrate.h"
#include "../ext/ivfpq/ivfpq_search.h"
#include "../ext/s3vfs/io_s3.h"
#include "../ext/shard/shard_hint.h"
#include "../ext/shard/shard_spend.h"
#include "upload.h"

/* Vectors per CPU second of builds with the defaults, f32, reading and writing included; Xeon with AVX-512, 2 vCPUs. */
typedef struct speed { uint32_t dim, nlist; double per_cpu_s; } speed;
static const speed measured[] = {
    {128, 4000, 145000},  /* 1,000,000 rows, l2: 6.9 CPU seconds */
    {960, 2191, 22000},   /* 300,000 rows, cosine: 13.5 CPU seconds */
    {960, 14142, 18000},  /* a shard of 200,000,000 rows: 300,000 of them assigned, encoded and written; training is little there */
};

static double work(uint32_t dim, uint32_t nlist) { return dim * (nlist + 256.); }

static const speed *nearest_speed(uint32_t dim, uint32_t nlist) {
  const speed *best = measured;
  double least = INFINITY;
  for (size_t i = 0; i < sizeof measured / sizeof *measured; i++) {
    double d = fabs(log((double)dim / measured[i].dim)) + fabs(log((nlist + 256.) / (measured[i].nlist + 256.)));
    if (d < least) least = d, best = &measured[i];
  }
  return best;
}

static void estimate_build(const cost_question *q, cost_answer *a) {
  const speed *s = nearest_speed(a->params.dim, a->params.nlist);
  a->vectors_per_cpu_second = q->vectors_per_cpu_second;
  if (!(a->vectors_per_cpu_second > 0)) {
    a->vectors_per_cpu_second = s->per_cpu_s * work(s->dim, s->nlist) / work(a->params.dim, a->params.nlist);
    a->measured_dim = s->dim, a->measured_nlist = s->nlist;
  }
  a->cpu_hours = (double)q->rows.n_rows / a->vectors_per_cpu_second / 3600;
  a->build_dollars = a->cpu_hours * q->prices.vcpu_hour;
}

/* ---- storage and publishing ---- */

static void estimate_storage(const cost_question *q, cost_answer *a) {
  a->segment_bytes = ivfpq_size_sections(&a->params, &a->shard, a->section);
  a->hint_bytes = a->section[0] + a->section[IVFPQ_PARAMS] + a->section[IVFPQ_MEAN];
  if (a->hint_bytes > SHARD_HINT_MAX) a->hint_bytes = 0;
  a->shard_bytes = a->segment_bytes + a->hint_bytes;
  a->temp_bytes = ivfpq_size_temp(&q->build, &a->shard);
  a->n_bytes = (double)a->shard_bytes * (double)a->n_shards;
  a->storage_dollars = a->n_bytes / (double)(1 << 30) * q->prices.gb_month;
  uint64_t part = upload_part_size(a->segment_bytes), parts = (a->segment_bytes + part - 1) / part;
  /* With more than one part two requests begin and end the upload; manifest and `latest`. */
  a->put_requests = (double)a->n_shards * ((double)parts + (parts > 1 ? 2 : 0) + 2);
  a->put_dollars = a->put_requests * q->prices.puts_1000 / 1000;
}

/* ---- queries ---- */

/* Requests for n of n_all blocks that lie one behind another. */
static double stretches(double n, double n_all, double block) {
  double bytes = n * block, least = ceil(bytes / IO_S3_MERGE_MAX), found;
  if (n <= 0) return 0;
  if (block > IO_S3_MERGE_MAX) return n * ceil(block / IO_S3_SPLIT);
  found = n * pow(1 - n / n_all, 1 + floor(IO_S3_MERGE_GAP / block));
  return found > least ? found : least;
}

static void price_reads(const cost_question *q, cost_reads *r) {
  r->dollars = (r->lists * q->prices.puts_1000 + (r->requests - r->lists) * q->prices.gets_1000) / 1000;
}

static double groups_to_read(const cost_answer *a) {
  const ivfpq_params *p = &a->params;
  if (a->section[IVFPQ_GROUPS] <= IVFPQ_ALL_GROUPS_BYTES || a->n_candidates > p->n_rows / 8) return p->n_groups;
  double n = ceil((double)ivfpq_enough_centroids(p->nlist, a->nprobe) / p->nlist * p->n_groups);
  return n < p->n_groups ? n : p->n_groups;
}

static void estimate_reads(const cost_question *q, cost_answer *a) {
  const ivfpq_params *p = &a->params;
  double shards = (double)a->n_shards, candidates = (double)a->n_candidates;
  double part = (double)ivfpq_size_partition(p, &a->shard);
  double group = (double)a->section[IVFPQ_GROUPS] / (p->n_groups ? p->n_groups : 1);
  cost_reads warm = {0}, cold;
  if (p->m) {
    double bytes = a->nprobe * part, n_groups = groups_to_read(a);
    warm.rounds = ceil(bytes / IVFPQ_PARTS_BYTES) + 1;
    warm.requests = shards * stretches(a->nprobe, p->nlist, part) + candidates;
    warm.bytes = shards * bytes + candidates * p->row_bytes;
    cold = warm;
    cold.rounds += 2; /* { LIST, latest }, groups */
    cold.requests += shards * (stretches(n_groups, p->n_groups, group) + 1 + (p->project != 0));
    cold.bytes += shards * (n_groups * group + (double)(a->section[IVFPQ_CODEBOOK] + a->section[IVFPQ_PROJECTION]));
  } else { /* flat: all rows */
    warm.rounds = 1;
    warm.requests = shards * stretches(1, 1, (double)a->section[IVFPQ_ROWS]);
    warm.bytes = shards * (double)a->section[IVFPQ_ROWS];
    cold = warm;
    cold.rounds += 2;
    cold.requests += shards * stretches(p->n_groups, p->n_groups, group);
    cold.bytes += shards * (double)a->section[IVFPQ_GROUPS];
  }
  cold.rounds += a->n_shards > 1;
  cold.lists = shards + (a->n_shards > 1);
  /* `latest`; where it has no room for them, the manifest, the ends and the parameters */
  cold.requests += cold.lists + shards * (a->hint_bytes ? 1 : 4);
  cold.bytes += shards * (double)(a->section[0] + a->section[IVFPQ_PARAMS] + a->section[IVFPQ_MEAN]);
  price_reads(q, &warm), price_reads(q, &cold);
  a->warm = warm, a->cold = cold;
}

static void estimate_queries(const cost_question *q, cost_answer *a) {
  const ivfpq_params *p = &a->params;
  double shards = (double)a->n_shards;
  a->nprobe = p->nlist ? shard_spend_nprobe(q->k, q->nprobe, p->nlist) : 0;
  a->n_candidates = shard_spend_candidates(q->k < q->rows.n_rows ? q->k : q->rows.n_rows, q->refine, q->rows.n_rows);
  a->rows_scanned = !p->nlist ? 0 : shards * (double)p->n_rows * a->nprobe / p->nlist;
  double ns = a->rows_scanned * (p->m ? IVFPQ_ROW_NS(p->m) : IVFPQ_CANDIDATE_NS(p->row_bytes)) +
              shards * a->nprobe * IVFPQ_PART_NS + (double)a->n_candidates * IVFPQ_CANDIDATE_NS(p->row_bytes);
  a->query_cpu_s = ns * 1e-9;
  a->query_cpu_dollars = a->query_cpu_s / 3600 * q->prices.vcpu_hour;
  estimate_reads(q, a);
}

/* ---- the whole ---- */

vs_rc cost_estimate(const cost_question *q, cost_answer *a, vs_err *err) {
  memset(a, 0, sizeof *a);
  a->n_shards = (q->rows.n_rows + q->bucket_rows - 1) / q->bucket_rows;
  a->shard = q->rows;
  a->shard.n_rows = (q->rows.n_rows + a->n_shards - 1) / a->n_shards;
  if (a->shard.n_rows > UINT32_MAX)
    return vs_fail(err, VS_INVALID, "shards of %llu rows: they take fewer than 2^32; give a smaller --bucket-rows",
                   (unsigned long long)a->shard.n_rows);
  ivfpq_build_options build = q->build;
  if (q->sqrt_nlist && a->shard.n_rows >= IVFPQ_FLAT_ROWS) build.nlist = (uint32_t)lround(sqrt((double)a->shard.n_rows));
  if (build.subs > q->rows.dim) return vs_fail(err, VS_INVALID, "--subvectors: 1 to %u here, not %u", q->rows.dim, build.subs);
  ivfpq_size_params(&build, &a->shard, &a->params);
  if (a->params.m > IVFPQ_MAX_M)
    return vs_fail(err, VS_INVALID, "--subvectors: a row takes at most %d bytes of codes, not %u", IVFPQ_MAX_M, a->params.m);
  estimate_storage(q, a);
  estimate_build(q, a);
  estimate_queries(q, a);
  return VS_OK;
}
