/* ivfpq_search.h - the two phases of a search on one segment: estimates by codes, distances by stored vectors. */
#ifndef IVFPQ_SEARCH_H
#define IVFPQ_SEARCH_H
#include "ivfpq_segment.h"

/* Decides which rows of a partition may be returned: sets bit r for those that may (the bitmap comes zeroed, with room for
 * the rows rounded up to 64). Called from several threads at once. */
typedef struct ivfpq_filter {
  void *ctx;
  vs_rc (*eval)(void *ctx, ivfpq_segment *s, const ivfpq_part *part, uint64_t *bitmap, vs_err *err);
} ivfpq_filter;

typedef struct ivfpq_query {
  const float *vector;        /* params.dim raw floats, finite */
  uint32_t nprobe;            /* partitions, nearest first; easy queries need fewer: see `reach` */
  uint64_t k;                 /* rows that are wanted in the end */
  float reach;                /* leave out partitions that lie so far beyond the k-th best estimate (ivfpq_table.h); 0: none */
  uint64_t n_candidates;      /* keep so many of the best estimates */
  int brute;                  /* compares all stored vectors instead, on `threads` (0: vs_threads()): as exact as a flat segment */
  int threads;
  const ivfpq_filter *filter; /* NULL: every row */
  int (*visit)(void *ctx, const ivfpq_part *part, float coarse); /* for measuring: told of each partition that is scanned, and its
                                 centroid's distance; non-zero: it is the last. NULL mostly. */
  void *visit_ctx;
  int (*stop)(void *ctx);     /* polled now and then; non-zero: VS_INTERRUPT. May be NULL. */
  void *stop_ctx;
} ivfpq_query;

typedef struct ivfpq_stats { uint64_t partitions, rows; } ivfpq_stats;

/* Keys (kern_key) of (estimate, row), unordered. */
typedef struct ivfpq_keys {
  uint64_t *key, *scratch;
  size_t n, room;
} ivfpq_keys;
void ivfpq_keys_reset(ivfpq_keys *k);
vs_rc ivfpq_keys_room(ivfpq_keys *k, size_t room, vs_err *err) VS_WARN_UNUSED; /* for so many keys */
/* Keeps the best `want`; returns the worst key kept, or UINT64_MAX while there are fewer. */
uint64_t ivfpq_keys_cut(ivfpq_keys *k, uint64_t want);

/* Probes nprobe partitions, and more until n_candidates rows that pass the filter were seen or none is left. The estimates
 * are squared distances (twice the distance for cosine and dot), comparable across segments of one metric. */
vs_rc ivfpq_scan(ivfpq_segment *s, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, vs_err *err) VS_WARN_UNUSED;

/* The same in steps, so that the scans of many segments share their rounds of reads: each step works on what the step before
 * began to read, and begins the next reads. With a local segment there is one step. s, q, out and stats must outlive the scan. */
typedef struct ivfpq_scan_state ivfpq_scan_state;
vs_rc ivfpq_scan_open(ivfpq_segment *s, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, ivfpq_scan_state **scan,
                      vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_scan_step(ivfpq_scan_state *scan, int *more, vs_err *err) VS_WARN_UNUSED;
void ivfpq_scan_close(ivfpq_scan_state *scan); /* NULL is legal */

/* Brute force over the stored vectors, on several threads: the n_candidates nearest rows as keys of (distance, row),
 * unordered. Keys <= *after are left out when after is not NULL. */
vs_rc ivfpq_exact(ivfpq_segment *s, const ivfpq_query *q, const uint64_t *after, int threads, ivfpq_keys *out, ivfpq_stats *stats,
                  vs_err *err) VS_WARN_UNUSED;

/* The same for n queries (q->vector is not looked at): out[i] are the rows nearest to vectors + i * dim. Each row is read once. */
vs_rc ivfpq_exact_many(ivfpq_segment *s, const ivfpq_query *q, const float *vectors, size_t n, int threads, ivfpq_keys *out,
                       ivfpq_stats *stats, vs_err *err) VS_WARN_UNUSED;

uint32_t ivfpq_stretch_rows(const ivfpq_params *p); /* rows that it reads at once */

/* The true distances of some rows, read in one round. */
vs_rc ivfpq_distances(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *out, vs_err *err) VS_WARN_UNUSED;

/* The same of one row, of rows, of a mapped file, without fetching. next: NULL, or a row that will be needed soon. */
vs_rc ivfpq_distance_mapped(ivfpq_segment *s, const float *query, uint32_t row, const uint32_t *next, float *out, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_distances_mapped(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *out, vs_err *err) VS_WARN_UNUSED;

/* The bitmap of all rows of a segment that pass the filter (by row number): for exact searches and full scans. */
vs_rc ivfpq_filter_all(ivfpq_segment *s, const ivfpq_filter *f, uint64_t **bitmap, vs_err *err) VS_WARN_UNUSED;

/* What a search reads: the centroids of all groups up to so many bytes, beyond that those of the nearest groups until there are
 * enough; partitions in rounds of so many bytes. */
enum { IVFPQ_ALL_GROUPS_BYTES = 32 << 20, IVFPQ_PARTS_BYTES = 64 << 20 };
static inline uint64_t ivfpq_enough_centroids(uint32_t nlist, uint32_t nprobe) {
  uint64_t enough = (uint64_t)nprobe * 32 + 64;
  return enough < nlist / 2 ? nlist / 2 : enough;
}

/* Partitions to probe when nobody says how many. */
uint32_t ivfpq_default_nprobe(uint32_t nlist);

#endif
