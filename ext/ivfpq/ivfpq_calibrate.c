/* ivfpq_calibrate.c - see ivfpq_calibrate.h.
 *
 * Each query of the truth searches the segment once (ivfpq_profile.c); so recall is known for every number of partitions, reach and
 * number of candidates at once, and the cheapest setting can be picked for each level of recall. Reaches are tried where half of the
 * queries end at so many partitions.
 *
 * Beyond k = 100 some queries serve, the deep ones: in which partitions their nearest lie is known up to k = 10,000, how many
 * candidates keep them up to k = 1,000; beyond, it is concluded (EASING).
 *
 * Margin. The mean over some hundred queries is uncertain by its standard error. A level counts as reached when the true mean is
 * less than .01 below it for as good as sure (99 in 100), and half an error above it: the best of many settings is a lucky one.
 *
 * The cost of a setting is counted in nanoseconds of one core: on sets of 1,000,000 x 128 and 300,000 x 960 what it picked took
 * .9 to 1.12 times as long as the fastest of 64 pairs of nprobe and refine with that recall.
 */
#include "ivfpq_calibrate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "ivfpq_profile.h"
#include "ivfpq_setting.h"

enum {
  STRETCH = 16,           /* queries between two looks at `stop` */
  MOST_TRUE = 1024,       /* partitions that others look at */
  ROWS_MAX = 8 << 20      /* scanned per query at most */
};
static const uint32_t probes[] = {1,  2,  3,   4,   5,   6,   8,   10,  12,  14,  16,  20,  24,  28,   32,   40,   48,   56,   64,  80,
                                  96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536};
static const float factors[] = {1,  1.2f, 1.4f, 1.7f,  2,  2.4f, 2.8f, 3.4f, 4,  4.8f, 5.6f, 6.7f, 8,   9.5f, 11.3f,
                                13.5f, 16, 19, 22.6f, 27, 32, 38, 45, 54, 64, 90, 128, 180, 256};
static const float levels[] = {.5f,  .6f,  .7f,   .75f, .8f,   .85f, .875f, .9f,   .925f, .94f,   .95f,
                               .96f, .97f, .975f, .98f, .985f, .99f, .9925f, .995f, .9975f, .999f};
#define COUNT(a) (sizeof(a) / sizeof *(a))
_Static_assert(COUNT(probes) < IVFPQ_PROFILE_PROBES, "room for all partitions, too");
#define EASING .85      /* of the logarithm of the factor that is needed, from k to 10 k: .65 and .75 were measured from 10 to 100 */
#define MISS_PART .15   /* of what nprobe partitions miss may a reach add */
#define TOLERATED .01   /* that a level may be missed by */
#define SURE 2.33       /* standard errors: 99 % on one side */
#define LUCK .5


typedef struct measure {
  ivfpq_profiler p;
  ivfpq_profile *profiles;
  size_t from;       /* first query of this stretch */
  float reaches[IVFPQ_CURVES][IVFPQ_REACHES];
  double kept[IVFPQ_CURVES][COUNT(factors)]; /* of what is found, by number of candidates: for k beyond IVFPQ_TRUE */
  vs_rc rc;
  vs_err err;
  pthread_mutex_t lock;
} measure;

/* ---- searching ---- */

static void choose_probes(ivfpq_profiler *x) {
  const ivfpq_params *p = &x->s->params;
  uint64_t average = p->n_rows / p->nlist + 1, most = ROWS_MAX / average;
  if (most < 16) most = 16;
  if (most > p->nlist) most = p->nlist;
  if (most > IVFPQ_PROFILE_MOST) most = IVFPQ_PROFILE_MOST;
  for (size_t i = 0; i < COUNT(probes) && probes[i] < most; i++) x->probes[x->n_probes++] = probes[i];
  x->probes[x->n_probes++] = (uint32_t)most;
  for (uint32_t n = 0, l = 0; n <= most; n++) {
    while (x->probes[l] < n) l++;
    x->level[n] = (uint8_t)l;
  }
  x->n_true_probes = x->level[most < MOST_TRUE ? most : MOST_TRUE] + 1u;
}

static void profile_task(void *ctx, size_t i) {
  measure *m = ctx;
  vs_err err = {0};
  if (__atomic_load_n(&m->rc, __ATOMIC_RELAXED)) return;
  vs_rc rc = ivfpq_profile_make(&m->p, m->from + i, &m->profiles[m->from + i], &err);
  if (!rc) return;
  pthread_mutex_lock(&m->lock);
  if (!m->rc) m->err = err, __atomic_store_n(&m->rc, rc, __ATOMIC_RELAXED);
  pthread_mutex_unlock(&m->lock);
}

static vs_rc search_all(measure *m, int threads, ivfpq_stop stop, void *stop_ctx, vs_err *err) {
  size_t n = m->p.t->n;
  vs_rc rc = VS_OK;
  for (; m->from < n && !rc; m->from += STRETCH) {
    vs_pool_run(n - m->from < STRETCH ? n - m->from : STRETCH, threads, profile_task, m);
    if (m->rc) rc = vs_fail(err, m->rc, "%s", m->err.text);
    else if (stop && stop(stop_ctx)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  return rc;
}

/* ---- reaches ---- */

static int ascending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return x < y ? -1 : x > y;
}

/* How far the at-th partition lies beyond, for the median query. */
static float median_beyond(const measure *m, int curve, uint32_t at, float *buf) {
  size_t n = 0;
  for (size_t i = 0; i < m->p.t->n; i++)
    if (m->profiles[i].beyond[curve] && m->profiles[i].n_parts > at) buf[n++] = m->profiles[i].beyond[curve][at];
  if (n) qsort(buf, n, sizeof *buf, ascending);
  return n ? buf[n / 2] : 0;
}

static uint32_t parts_within(const ivfpq_profile *p, int curve, float reach) {
  uint32_t lo = 0;
  for (uint32_t hi = p->n_parts; lo < hi && reach > 0;) { /* they ascend */
    uint32_t mid = (lo + hi) / 2;
    if (p->beyond[curve][mid] <= reach) lo = mid + 1;
    else hi = mid;
  }
  return reach > 0 ? lo : p->n_parts;
}

/* The reaches to try, ascending, then 0, and where each query ends with them. */
static vs_rc choose_reaches(measure *m, vs_err *err) {
  static const uint32_t at[IVFPQ_REACHES - 1] = {1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 150, 300, 600};
  float *buf = malloc(m->p.t->n * sizeof *buf);
  if (!buf) return vs_nomem(err);
  for (int c = 0; c < IVFPQ_CURVES; c++)
    for (int r = 0; r + 1 < IVFPQ_REACHES; r++) {
      float x = median_beyond(m, c, at[r] * (c < IVFPQ_TRUE_CURVES ? 1 : 4), buf), before = r ? m->reaches[c][r - 1] : 0;
      m->reaches[c][r] = isfinite(x) && x > before ? x : before;
    }
  free(buf);
  for (size_t i = 0; i < m->p.t->n; i++)
    for (int c = 0; c < IVFPQ_CURVES; c++)
      for (int r = 0; r < IVFPQ_REACHES && m->profiles[i].beyond[c]; r++)
        m->profiles[i].limit[c][r] = parts_within(&m->profiles[i], c, m->reaches[c][r]);
  return VS_OK;
}

/* ---- outcomes ---- */

typedef struct outcome {
  double sure[COUNT(factors)]; /* recall that counts as reached, by number of candidates */
  double found;                /* mean recall with candidates without end */
  double rows, parts;          /* means per query */
  int same;                    /* no query saw another partition than with fewer */
} outcome;

static uint32_t candidates_of(uint32_t k, size_t f) { return (uint32_t)ceil(factors[f] * (double)k); }

/* Which factor keeps what stands at a place, by place; one more than there are: none. */
typedef struct factor_table { uint8_t of[IVFPQ_PROFILE_CANDIDATES + 2]; } factor_table;

static void fill_factors(uint32_t k, factor_table *out) {
  size_t f = 0;
  for (uint32_t need = 0; need <= IVFPQ_PROFILE_CANDIDATES + 1; need++) {
    while (f < COUNT(factors) && candidates_of(k, f) < need) f++;
    out->of[need] = (uint8_t)(need <= IVFPQ_PROFILE_CANDIDATES ? f : COUNT(factors));
  }
}

/* Means and what they are sure of, from sums over n queries; the last sum is of what was found at all. */
static void conclude(const double sum[COUNT(factors) + 1], const double squares[COUNT(factors)], double n, outcome *o) {
  for (size_t f = 0; f < COUNT(factors); f++) {
    double mean = sum[f] / n, spread = squares[f] / n - mean * mean;
    double error = sqrt((spread > 0 ? spread : 0) / n), margin = SURE * error - TOLERATED;
    o->sure[f] = mean - (margin > LUCK * error ? margin : LUCK * error);
  }
  o->found = sum[COUNT(factors)] / n, o->rows /= n, o->parts /= n;
}

/* Adds the share of true neighbours that n partitions hold and so many candidates keep. */
static void add_true(const measure *m, const ivfpq_profile *p, int curve, uint32_t n, const factor_table *factor, double *sum,
                     double *squares) {
  uint32_t k = ivfpq_curve_k[curve], wanted = k < p->n_true ? k : p->n_true, hits[COUNT(factors) + 1] = {0}, so_far = 0;
  size_t level = m->p.level[n];
  for (uint32_t t = 0; t < wanted; t++)
    if (p->part[t] < n) hits[factor->of[p->need[t][level]]]++; /* UINT32_MAX, too, is not */
  for (size_t f = 0; f < COUNT(factors); f++) {
    so_far += hits[f];
    double share = (double)so_far / wanted;
    sum[f] += share, squares[f] += share * share;
  }
  sum[COUNT(factors)] += (double)(so_far + hits[COUNT(factors)]) / wanted;
}

static void add_deep(const measure *m, const ivfpq_profile *p, int curve, uint32_t n, double *sum, double *squares) {
  double found = (double)p->inside[curve][n] / p->n_inside[curve];
  for (size_t f = 0; f < COUNT(factors); f++) {
    double share = found * m->kept[curve][f];
    sum[f] += share, squares[f] += share * share;
  }
  sum[COUNT(factors)] += found;
}

static void evaluate(const measure *m, int curve, size_t probe, int reach, const factor_table *factor, outcome *o) {
  double sum[COUNT(factors) + 1] = {0}, squares[COUNT(factors)] = {0}, queries = 0;
  uint32_t most = m->p.probes[probe], before = probe ? m->p.probes[probe - 1] : 0;
  int deep = curve >= IVFPQ_TRUE_CURVES;
  *o = (outcome){.same = 1};
  for (size_t i = 0; i < m->p.t->n; i += deep ? IVFPQ_DEEP_EVERY : 1) {
    const ivfpq_profile *p = &m->profiles[i];
    uint32_t n = p->limit[curve][reach] < most ? p->limit[curve][reach] : most;
    if (!n || (deep ? !p->n_inside[curve] : !p->n_true)) continue;
    if (n > before) o->same = 0;
    o->rows += p->rows[n - 1], o->parts += n, queries++;
    if (deep) add_deep(m, p, curve, n, sum, squares);
    else add_true(m, p, curve, n, factor, sum, squares);
  }
  if (queries > 0) conclude(sum, squares, queries, o);
}

/* What candidates keep of what is found: measured for the first of the large k, or, when no query is deep, for the largest of the
 * others; concluded for the next. */
static void measure_kept(measure *m, const factor_table *factor) {
  enum { FIRST = IVFPQ_TRUE_CURVES };
  size_t found = 0, hits[COUNT(factors) + 1] = {0};
  for (size_t i = 0; i < m->p.t->n; i++) {
    const ivfpq_profile *p = &m->profiles[i];
    for (uint32_t t = 0; t < p->n_inside[FIRST]; t++) {
      size_t f = 0;
      while (f < COUNT(factors) && candidates_of(IVFPQ_RANKED, f) < p->rank[t]) f++;
      found++, hits[p->rank[t] ? f : COUNT(factors)]++;
    }
  }
  for (size_t i = 0; i < m->p.t->n && !m->p.t->n_deep; i++)
    for (uint32_t t = 0; t < m->profiles[i].n_true; t++)
      if (m->profiles[i].part[t] != UINT32_MAX) found++, hits[factor->of[m->profiles[i].need[t][m->p.n_true_probes - 1]]]++;
  for (size_t f = 0, sum = 0; f < COUNT(factors); f++) sum += hits[f], m->kept[FIRST][f] = found ? (double)sum / (double)found : 0;
  for (int c = FIRST + 1; c < IVFPQ_CURVES; c++)
    for (size_t f = 0, as = 0; f < COUNT(factors); f++) { /* what a larger factor keeps there */
      while (as + 1 < COUNT(factors) && log(factors[as + 1]) * EASING <= log(factors[f]) + 1e-6) as++;
      m->kept[c][f] = m->kept[c - 1][as];
    }
}

/* ---- the table ---- */

static void fill_levels(const measure *m, int curve, const factor_table *factor, ivfpq_level *out) {
  const ivfpq_params *p = &m->p.s->params;
  size_t n_probes = curve < IVFPQ_TRUE_CURVES ? m->p.n_true_probes : m->p.n_probes;
  double cost[COUNT(levels)], candidate = IVFPQ_CANDIDATE_NS(p->sketch_bytes ? p->sketch_bytes : p->row_bytes);
  for (size_t l = 0; l < COUNT(levels); l++) cost[l] = INFINITY, out[l] = (ivfpq_level){.recall = levels[l]};
  for (int r = 0; r < IVFPQ_REACHES; r++) {
    if (r && m->reaches[curve][r] == m->reaches[curve][r - 1]) continue;
    for (size_t b = 0; b < n_probes; b++) {
      outcome o;
      evaluate(m, curve, b, r, factor, &o);
      if (o.same) break;
      for (size_t f = 0; f < COUNT(factors); f++) {
        uint32_t n = candidates_of(ivfpq_curve_k[curve], f);
        double ns = o.rows * IVFPQ_ROW_NS(p->m) + o.parts * IVFPQ_PART_NS + n * candidate;
        for (size_t l = 0; l < COUNT(levels) && o.sure[f] >= (double)levels[l]; l++)
          if (ns < cost[l]) cost[l] = ns, out[l] = (ivfpq_level){levels[l], m->p.probes[b], n, m->reaches[curve][r], (float)o.rows};
      }
    }
  }
}

/* So many of all rows lie in all partitions: only candidates matter. */
static void fill_all(const measure *m, int curve, ivfpq_level *out) {
  const ivfpq_params *p = &m->p.s->params;
  for (size_t l = 0, f = 0; l < COUNT(levels); l++) {
    while (f < COUNT(factors) && m->kept[curve][f] < (double)levels[l]) f++;
    out[l] = (ivfpq_level){.recall = levels[l]};
    if (f < COUNT(factors))
      out[l] = (ivfpq_level){levels[l], p->nlist, candidates_of(ivfpq_curve_k[curve], f), 0, (float)p->n_rows};
  }
}

static void fill_reaches(const measure *m, const factor_table *factor, ivfpq_reach *out) {
  enum { CURVE = 1 };
  for (size_t b = 0; b < m->p.n_probes; b++) {
    outcome all, o;
    out[b] = (ivfpq_reach){m->p.probes[b], 0};
    if (b >= m->p.n_true_probes) continue;
    evaluate(m, CURVE, b, IVFPQ_REACHES - 1, factor, &all);
    for (int r = 0; r + 1 < IVFPQ_REACHES; r++) {
      evaluate(m, CURVE, b, r, factor, &o);
      if (all.found - o.found > MISS_PART * (1 - all.found)) continue;
      out[b].reach = m->reaches[CURVE][r];
      break;
    }
  }
}

static vs_rc fill(measure *m, uint8_t **out, uint32_t *n, vs_err *err) {
  ivfpq_calibration head = {.n_queries = (uint32_t)m->p.t->n, .n_reach = (uint32_t)m->p.n_probes, .n_levels = COUNT(levels)};
  uint32_t size = (uint32_t)(sizeof head + sizeof(ivfpq_reach) * head.n_reach + IVFPQ_CURVES * head.n_levels * sizeof(ivfpq_level));
  factor_table *factor = malloc(sizeof *factor);
  memcpy(head.k, ivfpq_curve_k, sizeof head.k);
  *out = malloc(size);
  if (!factor || !*out) {
    free(factor), free(*out);
    *out = NULL;
    return vs_nomem(err);
  }
  memcpy(*out, &head, sizeof head);
  const ivfpq_calibration *c = (const ivfpq_calibration *)*out;
  for (int curve = 0; curve < IVFPQ_CURVES; curve++) {
    ivfpq_level *to = (ivfpq_level *)ivfpq_levels(c) + (size_t)curve * head.n_levels;
    if (curve < IVFPQ_TRUE_CURVES) fill_factors(ivfpq_curve_k[curve], factor);
    if (curve == 1) fill_reaches(m, factor, (ivfpq_reach *)ivfpq_reaches(c));
    if (curve == IVFPQ_TRUE_CURVES - 1) measure_kept(m, factor);
    if (curve < IVFPQ_TRUE_CURVES || ivfpq_curve_k[curve] <= m->p.t->n_deep) fill_levels(m, curve, factor, to);
    else fill_all(m, curve, to);
  }
  free(factor);
  *n = size;
  return VS_OK;
}

vs_rc ivfpq_calibrate(ivfpq_truth *t, ivfpq_segment *s, int threads, ivfpq_stop stop, void *stop_ctx, uint8_t **out, uint32_t *n,
                      vs_err *err) {
  measure m = {.p = {.t = t, .s = s}, .lock = PTHREAD_MUTEX_INITIALIZER};
  *out = NULL, *n = 0;
  if (!t->places || !s->params.nlist) return VS_OK;
  choose_probes(&m.p);
  m.profiles = calloc(t->n, sizeof *m.profiles);
  vs_rc rc = m.profiles ? search_all(&m, threads, stop, stop_ctx, err) : vs_nomem(err);
  if (!rc) rc = choose_reaches(&m, err);
  if (!rc) rc = fill(&m, out, n, err);
  for (size_t i = 0; m.profiles && i < t->n; i++) ivfpq_profile_reset(&m.profiles[i]);
  free(m.profiles);
  return rc;
}
