/* ivfpq_scan_int.h - a scan from the inside: what ivfpq_scan.c and ivfpq_batch.c share. */
#ifndef IVFPQ_SCAN_INT_H
#define IVFPQ_SCAN_INT_H
#include "ivfpq_search.h"
#include "ivfpq_table.h"

/* What was begun and not yet worked on. */
typedef enum ivfpq_pending { IVFPQ_NOTHING, IVFPQ_GROUPS_COME, IVFPQ_PARTS_COME } ivfpq_pending;

struct ivfpq_scan_state {
  ivfpq_segment *s;
  const ivfpq_query *q;
  ivfpq_keys *out;
  ivfpq_stats *stats;
  ivfpq_table table;
  /* ranking: keys of (distance, lane) */
  const ivfpq_group_view *resident; /* by number; NULL: `views` has them */
  int elsewhere;           /* ranked by a batch: order and place say nothing */
  int held;                /* by a batch, which holds what the first round reads: no need to wait for it together */
  uint32_t *order;         /* all groups; the first n_views of them are read */
  ivfpq_group_view *views; /* by place in `order` */
  uint32_t *place;         /* of a group in `order` */
  size_t n_views;
  float *projected;
  int8_t *projected8;
  int32_t *score;
  float *slots;
  uint64_t *rank, *rank_scratch;
  size_t n_ranked, next;   /* rank[0..next) went out to be probed */
  size_t settled, scored;  /* rank[0..settled) is in its final order; with a projection rank[0..scored) was looked at in full */
  int cut;                 /* only the nearest were kept */
  uint64_t seen;           /* rows that pass the filter */
  uint64_t worst;          /* key; UINT64_MAX while the buffer was not cut */
  float limit;             /* partitions with greater coarse distances lie out of reach; INFINITY: none */
  uint32_t *out_row;
  uint16_t *out_sum;
  uint64_t *bitmap;
  uint64_t *done;          /* lanes that went out before the ranks were made anew; has_done: it says something */
  int has_done;
  /* reads under way */
  ivfpq_pending pending;
  int has_table, probed, arrived; /* arrived: what is left lies out of reach */
  vs_range codebook[2];
  size_t n_begun;          /* GROUPS: views behind n_views */
  size_t to_probe;         /* partitions of this round that are not begun yet */
  ivfpq_part *parts;       /* PARTS */
  uint64_t *part_keys;
  size_t n_parts, parts_room;
  vs_range *flat;          /* a flat segment's rows, stretch by stretch */
  size_t n_flat;
};

/* The nearest centroids of one query, while lanes of groups are shown one after another, in any order: the `want` nearest of all
 * are the same in the end. key has room for 2 * want + 128 and the lanes shown at once, scratch for twice that.
 *
 * Lanes may be looked at before they are added: the want-th smallest of slots that each hold the least of many distances is a limit
 * that few but the nearest pass. 4,000 lanes cost 0.6 us so; with a limit that only selections tighten 1.6 us. */
enum { IVFPQ_RANKING_SLOTS = 1024 };
typedef struct ivfpq_ranking {
  uint64_t *key, *scratch;
  size_t n, want;
  float step, qq;          /* of the query's bytes; its |x|^2 */
  uint64_t limit;          /* keys above it are not among them; UINT64_MAX at first */
  float *slots;            /* IVFPQ_RANKING_SLOTS */
  size_t n_slots, at;      /* 0: not worth a look; the next slot */
} ivfpq_ranking;
static inline size_t ivfpq_ranking_room(size_t want, size_t lanes) { return 2 * want + 128 + lanes + 32; }
/* Before a look at so many lanes. */
void ivfpq_ranking_begin_look(ivfpq_ranking *r, size_t lanes);
/* Some lanes of a group. score: q.c of each. */
void ivfpq_ranking_look(ivfpq_ranking *r, const int32_t *score, const float *scale, const float *norm2, uint32_t lanes);
void ivfpq_ranking_end_look(ivfpq_ranking *r);
/* Adds some lanes of a group, of which the first is `first`. */
void ivfpq_ranking_add(ivfpq_ranking *r, const int32_t *score, const float *scale, const float *norm2, uint32_t lanes, uint32_t first);
void ivfpq_ranking_end(ivfpq_ranking *r); /* no more than `want` stay */

/* How many partitions of a query are ranked at once. */
size_t ivfpq_ranks_wanted(const ivfpq_segment *s, const ivfpq_query *q);
/* Are all centroids ranked, or those of some groups? */
int ivfpq_ranks_all(const ivfpq_segment *s, const ivfpq_query *q);
/* All groups by their distance from x (see ivfpq_table), of which the first *n are ranked; place: of each group in `order`. */
vs_rc ivfpq_choose_groups(const ivfpq_segment *s, const ivfpq_query *q, const float *x, uint32_t *order, uint32_t *place, size_t *n,
                          vs_err *err) VS_WARN_UNUSED;
/* The query in the directions of the projection, as bytes; returns their step. scratch: `project` of each, rounded up to 16. */
float ivfpq_project(const ivfpq_segment *s, const ivfpq_table *t, int32_t *score, float *projected, int8_t *out);

/* True distances become what the estimates of codes are comparable with. */
void ivfpq_flat_estimates(const ivfpq_segment *s, ivfpq_keys *k);

/* A query that was ranked elsewhere. */
typedef struct ivfpq_ranked {
  const ivfpq_group_view *views; /* by number of the group: those that were ranked. They stay until the end. */
  size_t n_groups;               /* so many were ranked */
  const int8_t *bytes;           /* coded dims; with it the numbers of ivfpq_table that ivfpq_table_query finds */
  const int8_t *turned8;         /* params.turn: the query along the codes' directions */
  float step8, turned_step, qq, constant, term_scale;
  const uint64_t *key;           /* the nearest lanes, in any order */
  size_t n;
  int cut;                       /* there are more than these */
} ivfpq_ranked;

/* The segment's spare scan or a new one; NULL: no memory. Closed with ivfpq_scan_close. */
ivfpq_scan_state *ivfpq_scan_take(ivfpq_segment *s);
/* Makes it the scan of a query whose partitions can all be had without waiting. What the scan held before must be released. */
vs_rc ivfpq_scan_ranked(ivfpq_scan_state *c, const ivfpq_query *q, ivfpq_keys *out, ivfpq_stats *stats, const ivfpq_ranked *r,
                        vs_err *err) VS_WARN_UNUSED;
/* The lanes of its first n partitions, nearest first; returns how many. Then the scan must begin anew. */
size_t ivfpq_scan_first(ivfpq_scan_state *c, size_t n, const uint64_t **keys);

#endif
