/* shard_spend.c - see shard_spend.h.
 *
 * recall = r. Each segment spends what its own calibration says recall@k of r costs: who holds r of each segment's k nearest holds r
 * of those of all. The candidates of all segments are merged by estimate, and as many of them are compared as the segment wants that
 * wants most: among more rows more of them come between by mistake, but fewer of each segment's rows are wanted.
 * A segment that never measured r (above .999, or without a calibration) is searched exactly; flat segments always are.
 * nprobe and refine win over recall, each for what it says.
 *
 * Nothing given. The rule of thumb below, but not less than a calibration says recall@k of USUAL_RECALL costs: of 200,000,000 rows of 16
 * dimensions, whose codes are of two bytes, the rule of thumb alone finds .45.
 */
#include "shard_spend.h"

#include <math.h>

#define USUAL_RECALL .95
#define MANY_RECALL .99
enum {
  FEW_CANDIDATES = 100,   /* at least so many when refine is not given: k = 1 is as good as k = 10 */
  EASED_FROM = 100,       /* beyond this k the default refine falls from 10 to EASED, and nprobe grows with the root of k */
  EASED = 4,
  MEASURED_TO = 1000,     /* up to this k calibrations, which are of k = 10 and 100, say enough about the default */
  MANY_FROM = 10000,      /* beyond this k they grow like measured_candidates, or many_candidates */
  MANY_OF = 100           /* the largest k that calibrations measure */
};

/* Without a calibration. Among k rows of n that are wanted, those whose codes put them on the wrong side lie near the border: how many
 * that may be grows with the root of k and n, not with k. Recall@k with .3: .994 and .992 at k = 20,000, .995 and .996 at 50,000 on the
 * two sets below
 * (before, with 4 k candidates, .998 to 1), .995 to .999 with k from 2 % to 20 % of smaller sets of SIFT and of pixels. */
static uint64_t many_candidates(uint64_t k, uint64_t n_rows) {
  return k + (uint64_t)(0.3 * sqrt((double)k * (double)n_rows));
}

/* Both defaults were set on two clustered sets (1,000,000 x 128 l2, 300,000 x 960 cosine), k = 100 ... 10,000: recall@k .95 to .99. */
uint64_t shard_spend_candidates(uint64_t k, int64_t refine, uint64_t n_rows) {
  uint64_t want;
  if (refine >= 0) {
    uint64_t factor = refine ? (uint64_t)refine : 1;
    want = k > n_rows / factor ? n_rows : k * factor;
  } else if (k >= n_rows) {
    want = n_rows;
  } else {
    uint64_t eased = k < MANY_FROM ? k : MANY_FROM;
    want = k <= EASED_FROM ? k * SHARD_DEFAULT_REFINE : EASED_FROM * SHARD_DEFAULT_REFINE + (eased - EASED_FROM) * EASED;
    if (want < FEW_CANDIDATES) want = FEW_CANDIDATES;
    if (k > MANY_FROM && want < many_candidates(k, n_rows)) want = many_candidates(k, n_rows);
  }
  return want < n_rows ? want : n_rows;
}

uint32_t shard_spend_nprobe(uint64_t k, int64_t nprobe, uint32_t nlist) {
  uint64_t n = nprobe < 0 ? ivfpq_default_nprobe(nlist) : (uint64_t)nprobe;
  if (nprobe < 0 && k > EASED_FROM) n = (uint64_t)((double)n * sqrt((double)k / EASED_FROM));
  if (n < 1) n = 1;
  return n > nlist ? nlist : (uint32_t)n;
}

/* The same by what a segment measured at k = MANY_OF: with good codes far fewer, with poor ones more. The rows that are on the wrong side
 * of the border become a smaller part of k as k grows. With the power -.3 of k, recall@k of 20,000 ... 100,000 is .988 to 1 on the two
 * sets below with codes of 16 and 60 bytes, and .993 to 1 on 200,000 rows of 16 dimensions with codes of 1, 2 and 4 bytes, where
 * many_candidates finds .90 to .998. 0: nothing was measured. */
static uint64_t measured_candidates(uint64_t k, uint64_t n_rows, const ivfpq_segment *s) {
  ivfpq_setting at;
  if (!ivfpq_setting_for(s, MANY_OF, MANY_RECALL, &at)) return 0;
  double beyond = fmax((double)at.n_candidates / MANY_OF - 1, 0) * pow((double)MANY_OF / (double)k, 0.3), want = (double)k * (1 + beyond);
  uint64_t least = shard_spend_candidates(MANY_FROM, -1, n_rows);
  return want > (double)n_rows ? n_rows : want > (double)least ? (uint64_t)want : least;
}

/* By nprobe and refine, given or not. */
static ivfpq_setting usual(const shard_search *q, uint64_t k, uint64_t n_rows, const ivfpq_segment *s) {
  uint32_t nprobe = shard_spend_nprobe(k, q->nprobe, s->params.nlist);
  ivfpq_setting x = {nprobe, shard_spend_candidates(k, q->refine, n_rows), ivfpq_reach_for(s, nprobe)}, least;
  uint64_t many = k > MANY_FROM && q->refine < 0 && q->recall <= 0 ? measured_candidates(k, n_rows, s) : 0;
  if (many) x.n_candidates = many;
  if (q->nprobe >= 0 || q->refine >= 0 || q->recall > 0 || k > MEASURED_TO || !ivfpq_setting_for(s, k, USUAL_RECALL, &least)) return x;
  if (least.nprobe > x.nprobe) x.nprobe = least.nprobe, x.reach = least.reach;
  if (least.n_candidates > x.n_candidates) x.n_candidates = least.n_candidates;
  return x;
}

/* By recall; what is given beside it wins. */
static ivfpq_setting asked(const shard_search *q, uint64_t k, uint64_t n_rows, const ivfpq_segment *s) {
  ivfpq_setting x, given = usual(q, k, n_rows, s);
  if (ivfpq_is_flat(s)) return given; /* exact whatever is spent */
  if (!ivfpq_setting_for(s, k, q->recall, &x)) {
    if (q->nprobe >= 0) return given;
    return q->refine >= 0 ? (ivfpq_setting){s->params.nlist, given.n_candidates, 0} : (ivfpq_setting){0};
  }
  if (q->nprobe >= 0) x.nprobe = given.nprobe, x.reach = given.reach;
  if (q->refine >= 0) x.n_candidates = given.n_candidates;
  return x;
}

shard_spend shard_spend_plan(const shard_search *q, uint64_t k, uint64_t n_rows, ivfpq_segment *const *segments, size_t n,
                             ivfpq_setting *out) {
  int by_recall = q->recall > 0 && (q->nprobe < 0 || q->refine < 0), own = q->own && k > 1;
  shard_spend all = {0, by_recall && n > 0};
  k -= (uint64_t)own;
  for (size_t i = 0; i < n; i++) {
    out[i] = by_recall ? asked(q, k, n_rows, segments[i]) : usual(q, k, n_rows, segments[i]);
    if (out[i].nprobe) all.exact = 0;
    if (out[i].n_candidates > all.n_candidates) all.n_candidates = out[i].n_candidates;
  }
  if (all.n_candidates < k) all.n_candidates = k;
  all.n_candidates += (uint64_t)own;
  for (size_t i = 0; i < n; i++) {
    if (q->filters) out[i].reach = 0; /* it was measured with rows that all may be returned */
    out[i].n_candidates = out[i].nprobe ? out[i].n_candidates + (uint64_t)own : all.n_candidates;
  }
  return all;
}
