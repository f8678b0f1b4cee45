/* ivfpq_calibrate.c - see ivfpq_calibrate.h.
 *
 * Truth. QUERIES rows of the sample; as the rows stream by, each query keeps its KEEP nearest others by true distance, with what
 * their codes say of them. Cost: QUERIES multiply-adds per row and dimension, a matrix product beside the one that assigns rows to
 * partitions (QUERIES / nlist of it). Memory: QUERIES * KEEP * 48 bytes.
 *
 * beta. Of the kept neighbours the WANTED nearest should be the first by estimate; the beta is taken under which most of them are among the
 * first AMONG. The others of the kept ones are the very rows that compete with them.
 *
 * Settings. Every query scans the segment, partition by partition, without a threshold. For each true neighbour this tells in which
 * partition it lies and how many rows of the first P partitions have a smaller estimate: so recall is known for every number of
 * partitions, reach and number of candidates at once, and the cheapest setting can be picked for each level of recall. The cost of
 * a setting is counted in nanoseconds of one core; the constants were measured on sets of 128 and 960 dimensions. A query does
 * not find itself: it stands for a query from outside.
 */
#include "ivfpq_calibrate.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"
#include "ivfpq_search.h"
#include "ivfpq_setting.h"

enum {
  QUERIES = 256,
  KEEP = 256,           /* nearest rows kept per query */
  TRUE_MAX = 100,       /* of which so many are looked for */
  WANTED = 10,
  AMONG = 30,
  SLICE_MAX = 256,
  ROWS_MAX = 8 << 20    /* scanned per query at most */
};

static const uint32_t curve_k[IVFPQ_CURVES] = {1, 10, TRUE_MAX};
static const uint32_t probes[] = {1,  2,  3,  4,  6,   8,   12,  16,  20,  24,  32,  40,  48,
                                  64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024};
static const float reaches[] = {1.25f, 1.5f, 1.75f, 2, 2.25f, 2.5f, 2.75f, 3, 3.5f, 4, 5, 6, 8, 0};
static const float factors[] = {1, 1.25f, 1.5f, 2, 2.5f, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 64};
static const float levels[] = {.5f,  .6f,  .7f,   .75f, .8f,   .85f, .875f, .9f,   .925f, .94f,   .95f,
                               .96f, .97f, .975f, .98f, .985f, .99f, .9925f, .995f, .9975f, .999f};
#define COUNT(a) (sizeof(a) / sizeof *(a))
#define MARGIN .002f        /* measured above a level, because the measure itself varies */
#define MISS_PART .15       /* of what nprobe partitions miss may a reach add */

/* ---- truth ---- */

typedef struct neighbour {
  float d, est, err2; /* true; estimate at beta 0; what beta takes off */
  uint32_t row;       /* of the segment; UINT32_MAX: none */
  uint64_t seq;
} neighbour;

typedef struct query {
  uint64_t seq;
  float qq, term_scale, worst; /* worst: distances beyond it do not count any more */
  uint32_t row;
  size_t n;
  neighbour *near;             /* room for 2 * KEEP */
} query;

typedef struct place { uint64_t seq; uint32_t query, at; } place; /* at: in near, or UINT32_MAX: the query itself */

struct ivfpq_truth {
  const ivfpq_model *m;
  size_t n, lanes;
  float *raw, *x, *packed, *zero; /* n x dim; n x dim_padded; packed */
  query *queries;
  neighbour *near;
  pthread_mutex_t lock;
  place *places;                  /* sorted by seq once the truth is settled */
  size_t n_places;
  uint64_t *filter;               /* bits of hashed seqs: most rows are none of them */
};

enum { FILTER_BITS = 1 << 20 };
static size_t filter_bit(uint64_t seq) { return (size_t)((seq * 0x9e3779b97f4a7c15ull) >> 44); }

void ivfpq_truth_close(ivfpq_truth *t) {
  if (!t) return;
  pthread_mutex_destroy(&t->lock);
  free(t->raw), free(t->x), free(t->packed), free(t->zero), free(t->queries), free(t->near), free(t->places), free(t->filter);
  free(t);
}

static void take_query(ivfpq_truth *t, size_t i, const float *raw, uint64_t seq) {
  const ivfpq_model *m = t->m;
  const kern *k = kern_get();
  float *x = t->x + i * m->dim_padded;
  memcpy(t->raw + i * m->dim, raw, m->dim * sizeof *raw);
  query *q = &t->queries[i];
  *q = (query){.seq = seq, .term_scale = 1, .worst = INFINITY, .row = UINT32_MAX, .near = t->near + i * 2 * KEEP};
  if (m->metric == IVFPQ_DOT) {
    memcpy(x, raw, m->dim * sizeof *raw);
    q->term_scale = sqrtf(k->l2sq_f32(raw, m->mean, m->dim));
  } else {
    ivfpq_model_prepare(m, raw, x);
    q->qq = k->dot_f32(x, x, m->dim_padded);
  }
}

static vs_rc new_truth(const ivfpq_model *m, size_t n, ivfpq_truth **out, vs_err *err) {
  size_t d = m->dim_padded;
  ivfpq_truth *t = calloc(1, sizeof *t);
  *out = NULL;
  if (!t) return vs_nomem(err);
  pthread_mutex_init(&t->lock, NULL);
  t->m = m, t->n = n, t->lanes = ivfpq_round(n, 16);
  t->raw = malloc(n * m->dim * sizeof *t->raw), t->x = calloc(n * d, sizeof *t->x);
  t->packed = malloc(kern_packed_len(n, d) * sizeof *t->packed), t->zero = calloc(t->lanes, sizeof *t->zero);
  t->queries = calloc(n, sizeof *t->queries), t->near = malloc(n * 2 * KEEP * sizeof *t->near);
  if (!t->raw || !t->x || !t->packed || !t->zero || !t->queries || !t->near) {
    ivfpq_truth_close(t);
    return vs_nomem(err);
  }
  *out = t;
  return VS_OK;
}

vs_rc ivfpq_truth_open(const ivfpq_model *m, const float *sample, const uint64_t *seq, size_t n_sample, ivfpq_truth **out, vs_err *err) {
  size_t n = n_sample / 8 < QUERIES ? n_sample / 8 : QUERIES;
  *out = NULL;
  if (!n) return VS_OK;
  vs_rc rc = new_truth(m, n, out, err);
  if (rc) return rc;
  for (size_t i = 0; i < n; i++) {
    size_t from = (size_t)((double)i * (double)n_sample / (double)n);
    take_query(*out, i, sample + from * m->dim, seq[from]);
  }
  kern_pack_f32((*out)->x, n, m->dim_padded, (*out)->packed);
  return VS_OK;
}

void ivfpq_truth_save(const ivfpq_truth *t, ivfpq_state *s) {
  uint64_t n = t ? t->n : 0;
  ivfpq_state_put(s, &n, 8);
  for (size_t i = 0; i < n; i++) {
    const query *q = &t->queries[i];
    uint64_t head[] = {q->seq, q->n};
    ivfpq_state_put(s, head, sizeof head), ivfpq_state_put(s, &q->worst, 4);
    ivfpq_state_put(s, t->raw + i * t->m->dim, t->m->dim * 4);
    for (size_t j = 0; j < q->n; j++) {
      const neighbour *b = &q->near[j];
      float of[] = {b->d, b->est, b->err2};
      ivfpq_state_put(s, of, sizeof of), ivfpq_state_put(s, &b->seq, 8);
    }
  }
}

static vs_rc load_query(ivfpq_truth *t, size_t i, float *raw, ivfpq_state *s, vs_err *err) {
  uint64_t head[2];
  float worst;
  ivfpq_state_get(s, head, sizeof head), ivfpq_state_get(s, &worst, 4), ivfpq_state_get(s, raw, t->m->dim * 4);
  if (head[1] > 2 * KEEP) return vs_corrupt(err, "a kept query has too many neighbours");
  take_query(t, i, raw, head[0]);
  query *q = &t->queries[i];
  q->n = head[1], q->worst = worst;
  for (size_t j = 0; j < q->n; j++) {
    float of[3];
    q->near[j].row = UINT32_MAX;
    ivfpq_state_get(s, of, sizeof of), ivfpq_state_get(s, &q->near[j].seq, 8);
    q->near[j].d = of[0], q->near[j].est = of[1], q->near[j].err2 = of[2];
  }
  return VS_OK;
}

vs_rc ivfpq_truth_load(const ivfpq_model *m, ivfpq_state *s, ivfpq_truth **out, vs_err *err) {
  uint64_t n;
  ivfpq_state_get(s, &n, 8);
  *out = NULL;
  if (!n) return VS_OK;
  if (n > QUERIES) return vs_corrupt(err, "there are too many kept queries");
  float *raw = malloc(m->dim * sizeof *raw);
  vs_rc rc = raw ? new_truth(m, n, out, err) : vs_nomem(err);
  for (size_t i = 0; i < n && !rc; i++) rc = load_query(*out, i, raw, s, err);
  if (!rc) kern_pack_f32((*out)->x, n, m->dim_padded, (*out)->packed);
  free(raw);
  if (rc) ivfpq_truth_close(*out), *out = NULL;
  return rc;
}

typedef struct seen { uint32_t query, row; float d; uint64_t seq; } seen;
struct ivfpq_near {
  size_t n, room;
  seen *seen;
};

static void near_free(ivfpq_near *near) {
  if (near) free(near->seen);
  free(near);
}

static vs_rc near_add(ivfpq_near *near, seen s, vs_err *err) {
  if (near->n == near->room) {
    size_t room = near->room * 2 + 64;
    seen *grown = realloc(near->seen, room * sizeof *grown);
    if (!grown) return vs_nomem(err);
    near->seen = grown, near->room = room;
  }
  near->seen[near->n++] = s;
  return VS_OK;
}

/* Is any of the distances of sixteen queries below its limit? In a form that compilers make vector code of. */
static int any_below(const float *score, const float *qq, const float *worst, float xx) {
  int any = 0;
  for (int c = 0; c < 16; c++) any |= xx + qq[c] - 2 * score[c] <= worst[c];
  return any;
}

vs_rc ivfpq_truth_see(ivfpq_truth *t, const float *x, size_t n, const uint64_t *seq, ivfpq_near **out, vs_err *err) {
  size_t d = t->m->dim_padded, lanes = t->lanes;
  float *score = malloc((n * lanes + 2 * lanes) * sizeof *score), *qq = score + n * lanes, *worst = qq + lanes;
  ivfpq_near *near = calloc(1, sizeof *near);
  vs_rc rc = score && near ? VS_OK : vs_nomem(err);
  *out = NULL;
  if (!rc) {
    pthread_mutex_lock(&t->lock);
    for (size_t c = 0; c < lanes; c++) qq[c] = c < t->n ? t->queries[c].qq : 0, worst[c] = c < t->n ? t->queries[c].worst : -INFINITY;
    pthread_mutex_unlock(&t->lock);
    kern_get()->scores_many_f32(x, n, d, d, t->packed, t->zero, t->n, score, lanes);
  }
  for (size_t i = 0; i < n && !rc; i++) {
    const float *s = score + i * lanes;
    float xx = t->m->metric == IVFPQ_DOT ? 0 : kern_get()->dot_f32(x + i * d, x + i * d, d);
    for (size_t c = 0; c < lanes && !rc; c += 16) {
      if (!any_below(s + c, qq + c, worst + c, xx)) continue;
      for (size_t j = c; j < c + 16 && !rc; j++) {
        float dist = xx + qq[j] - 2 * s[j];
        if (dist <= worst[j] && seq[i] != t->queries[j].seq) rc = near_add(near, (seen){(uint32_t)j, (uint32_t)i, dist, seq[i]}, err);
      }
    }
  }
  free(score);
  if (rc) near_free(near);
  else *out = near;
  return rc;
}

static int by_distance(const void *pa, const void *pb) {
  const neighbour *a = pa, *b = pb;
  if (a->d != b->d) return a->d < b->d ? -1 : 1;
  return a->seq < b->seq ? -1 : a->seq > b->seq;
}

static void query_cut(query *q) {
  qsort(q->near, q->n, sizeof *q->near, by_distance);
  if (q->n > KEEP) q->n = KEEP;
  if (q->n == KEEP) q->worst = q->near[KEEP - 1].d;
}

/* What the codes say a row is: centroid plus words. */
static void decode(const ivfpq_model *m, const uint8_t *codes, uint32_t centroid, float *y) {
  size_t ds = m->sub_dim, words = ivfpq_words(m->bits);
  memcpy(y, m->centroids + (size_t)centroid * m->dim_padded, m->dim_padded * sizeof *y);
  for (size_t j = 0; j < m->subs; j++) {
    unsigned code = m->bits == 4 ? codes[j / 2] >> (j % 2 ? 4 : 0) & 15u : codes[j];
    const float *w = m->words + (j * words + code) * ds;
    for (size_t e = 0; e < ds; e++) y[j * ds + e] += w[e];
  }
}

vs_rc ivfpq_truth_add(ivfpq_truth *t, ivfpq_near *near, const uint8_t *codes, const uint32_t *centroid, const float *base_term,
                      const float *err2, vs_err *err) {
  const ivfpq_model *m = t->m;
  size_t d = m->dim_padded, last = SIZE_MAX;
  float *y = malloc(d * sizeof *y);
  neighbour *made = malloc((near->n + 1) * sizeof *made);
  if (!y || !made) {
    free(y), free(made), near_free(near);
    return vs_nomem(err);
  }
  for (size_t i = 0; i < near->n; i++) { /* rows ascend: each is decoded once */
    const seen *s = &near->seen[i];
    const query *q = &t->queries[s->query];
    if (s->row != last) decode(m, codes + s->row * (size_t)m->m, centroid[s->row], y), last = s->row;
    float cc = m->metric == IVFPQ_DOT ? 0 : -2 * m->bias[centroid[s->row]];
    float est = q->qq - 2 * kern_get()->dot_f32(t->x + s->query * d, y, d) + cc + q->term_scale * base_term[s->row];
    made[i] = (neighbour){s->d, est, q->term_scale * err2[s->row], UINT32_MAX, s->seq};
  }
  pthread_mutex_lock(&t->lock);
  for (size_t i = 0; i < near->n; i++) {
    query *q = &t->queries[near->seen[i].query];
    if (made[i].d > q->worst) continue; /* it has become better meanwhile */
    q->near[q->n++] = made[i];
    if (q->n == 2 * KEEP) query_cut(q);
  }
  pthread_mutex_unlock(&t->lock);
  free(y), free(made), near_free(near);
  return VS_OK;
}

/* ---- beta ---- */

static int ascending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return x < y ? -1 : x > y;
}

/* How many of the WANTED nearest are among the first by estimate. */
static size_t hits_under(const query *q, float beta) {
  float est[KEEP], sorted[KEEP];
  size_t hits = 0;
  if (q->n < 2 * AMONG) return 0;
  for (size_t i = 0; i < q->n; i++) sorted[i] = est[i] = q->near[i].est - beta * q->near[i].err2;
  qsort(sorted, q->n, sizeof *sorted, ascending);
  for (size_t i = 0; i < WANTED; i++) hits += est[i] <= sorted[AMONG - 1];
  return hits;
}

static int by_seq(const void *pa, const void *pb) {
  const place *a = pa, *b = pb;
  if (a->seq != b->seq) return a->seq < b->seq ? -1 : 1;
  return a->query < b->query ? -1 : a->query > b->query;
}

static void settle(ivfpq_truth *t) {
  if (t->places) return;
  t->places = malloc(t->n * (TRUE_MAX + 1) * sizeof *t->places), t->filter = calloc(FILTER_BITS / 64, sizeof *t->filter);
  for (size_t i = 0; i < t->n; i++) {
    query *q = &t->queries[i];
    query_cut(q);
    if (!t->places || !t->filter) continue; /* nothing will be found then, and nothing calibrated */
    t->places[t->n_places++] = (place){q->seq, (uint32_t)i, UINT32_MAX};
    for (size_t j = 0; j < q->n && j < TRUE_MAX; j++) t->places[t->n_places++] = (place){q->near[j].seq, (uint32_t)i, (uint32_t)j};
  }
  qsort(t->places, t->n_places, sizeof *t->places, by_seq);
  for (size_t i = 0; i < t->n_places; i++) t->filter[filter_bit(t->places[i].seq) / 64] |= 1ull << filter_bit(t->places[i].seq) % 64;
}

size_t ivfpq_truth_beta(ivfpq_truth *t) {
  size_t hits[IVFPQ_BETAS] = {0}, best = 0;
  settle(t);
  for (size_t b = 0; b < IVFPQ_BETAS; b++)
    for (size_t i = 0; i < t->n; i++) hits[b] += hits_under(&t->queries[i], ivfpq_beta(b));
  size_t most = 0;
  for (size_t b = 0; b < IVFPQ_BETAS; b++) { /* smoothed: neighbours on the grid vote, too */
    size_t smooth = 2 * hits[b] + hits[b ? b - 1 : b] + hits[b + 1 < IVFPQ_BETAS ? b + 1 : b];
    if (smooth > most) most = smooth, best = b;
  }
  return most ? best : IVFPQ_USUAL_BETA;
}

void ivfpq_truth_place(ivfpq_truth *t, uint64_t seq, uint32_t row) {
  if (!t->filter || !(t->filter[filter_bit(seq) / 64] >> filter_bit(seq) % 64 & 1)) return;
  size_t lo = 0;
  for (size_t hi = t->n_places; lo < hi;) {
    size_t mid = (lo + hi) / 2;
    if (t->places[mid].seq < seq) lo = mid + 1;
    else hi = mid;
  }
  for (; lo < t->n_places && t->places[lo].seq == seq; lo++) {
    query *q = &t->queries[t->places[lo].query];
    if (t->places[lo].at == UINT32_MAX) q->row = row;
    else q->near[t->places[lo].at].row = row;
  }
}

/* ---- settings ---- */

/* What a scan told of one query. */
typedef struct profile {
  const query *q;
  uint32_t n_true;
  uint32_t row[TRUE_MAX], part[TRUE_MAX]; /* of the true neighbours, nearest first; part: the how many-th, UINT32_MAX: never */
  uint64_t key[TRUE_MAX];
  uint32_t need[TRUE_MAX][COUNT(probes)]; /* candidates that must be kept to keep it, of so many partitions */
  uint32_t n_parts;
  uint32_t *rows;                         /* scanned so far, per partition probed */
  float *ratio[IVFPQ_CURVES];             /* of coarse distance and k-th best estimate: the greatest so far */
  uint64_t best[TRUE_MAX];                /* estimates, ascending */
  uint32_t n_best;
  /* second pass */
  uint64_t sorted[TRUE_MAX];
  uint32_t order[TRUE_MAX], count[TRUE_MAX + 1], n_found, level;
} profile;

typedef struct measure {
  ivfpq_truth *t;
  ivfpq_segment *s;
  uint32_t most;     /* partitions */
  profile *profiles;
  ivfpq_stop stop;
  void *stop_ctx;
  vs_rc rc;
  vs_err err;
  pthread_mutex_t lock;
} measure;

static void note_best(profile *p, uint64_t key) {
  if (p->n_best == TRUE_MAX && key >= p->best[TRUE_MAX - 1]) return;
  uint32_t at = p->n_best < TRUE_MAX ? p->n_best++ : TRUE_MAX - 1;
  for (; at && p->best[at - 1] > key; at--) p->best[at] = p->best[at - 1];
  p->best[at] = key;
}

/* First pass: where the true neighbours are, and what the best estimates are after each partition. */
static void see_partition(void *ctx, const ivfpq_part *part, float coarse, const uint64_t *keys) {
  profile *p = ctx;
  uint32_t n = part->entry.n_rows, i = p->n_parts++;
  uint64_t row0 = part->entry.row0;
  p->rows[i] = (i ? p->rows[i - 1] : 0) + n;
  for (int c = 0; c < IVFPQ_CURVES; c++) {
    float kth = p->n_best >= curve_k[c] ? kern_key_value(p->best[curve_k[c] - 1]) : INFINITY;
    float ratio = kth > 0 ? coarse / kth : coarse > 0 ? INFINITY : 0, before = i ? p->ratio[c][i - 1] : 0;
    p->ratio[c][i] = ratio > before ? ratio : before;
  }
  for (uint32_t t = 0; t < p->n_true; t++)
    if (p->row[t] >= row0 && p->row[t] - row0 < n) p->part[t] = i, p->key[t] = keys[p->row[t] - row0];
  for (uint32_t r = 0; r < n; r++)
    if (row0 + r != p->q->row) note_best(p, keys[r]);
}

/* Second pass: how many rows stand before each. */
static void count_partition(void *ctx, const ivfpq_part *part, float coarse, const uint64_t *keys) {
  profile *p = ctx;
  uint32_t i = p->n_parts++;
  uint64_t most = p->n_found ? p->sorted[p->n_found - 1] : 0;
  (void)coarse;
  for (uint32_t r = 0; r < part->entry.n_rows; r++) {
    if (keys[r] >= most || part->entry.row0 + r == p->q->row) continue;
    uint32_t lo = 0;
    for (uint32_t hi = p->n_found; lo < hi;) {
      uint32_t mid = (lo + hi) / 2;
      if (p->sorted[mid] <= keys[r]) lo = mid + 1;
      else hi = mid;
    }
    p->count[lo]++; /* it stands before sorted[lo] and what follows */
  }
  for (; p->level < COUNT(probes) && probes[p->level] == i + 1; p->level++)
    for (uint32_t t = 0, before = 0; t < p->n_found; t++) before += p->count[t], p->need[p->order[t]][p->level] = before + 1;
}

static int by_key(const void *pa, const void *pb, void *ctx) {
  const uint64_t *key = ctx;
  uint64_t a = key[*(const uint32_t *)pa], b = key[*(const uint32_t *)pb];
  return a < b ? -1 : a > b;
}

static vs_rc scan_once(measure *m, size_t i, void (*probe)(void *, const ivfpq_part *, float, const uint64_t *), vs_err *err) {
  ivfpq_keys keys = {0};
  ivfpq_stats stats = {0};
  ivfpq_query q = {.vector = m->t->raw + i * m->t->m->dim, .nprobe = m->most, .n_candidates = 1, .k = 1, .probe = probe,
                   .probe_ctx = &m->profiles[i]};
  vs_rc rc = ivfpq_scan(m->s, &q, &keys, &stats, err);
  ivfpq_keys_reset(&keys);
  return rc;
}

static vs_rc profile_query(measure *m, size_t i, vs_err *err) {
  profile *p = &m->profiles[i];
  p->q = &m->t->queries[i];
  for (size_t t = 0; t < p->q->n && t < TRUE_MAX; t++)
    if (p->q->near[t].row != UINT32_MAX) p->row[p->n_true] = p->q->near[t].row, p->part[p->n_true++] = UINT32_MAX;
  vs_rc rc = scan_once(m, i, see_partition, err);
  for (uint32_t t = 0; t < p->n_true; t++)
    if (p->part[t] != UINT32_MAX) p->order[p->n_found++] = t;
  qsort_r(p->order, p->n_found, sizeof *p->order, by_key, p->key);
  for (uint32_t t = 0; t < p->n_found; t++) p->sorted[t] = p->key[p->order[t]];
  uint32_t n = p->n_parts;
  p->n_parts = 0;
  if (!rc) rc = scan_once(m, i, count_partition, err);
  if (!rc && p->n_parts != n) rc = vs_fail(err, VS_CORRUPT, "calibration: two scans differ");
  for (; p->level < COUNT(probes); p->level++) /* more partitions than there are */
    for (uint32_t t = 0, before = 0; t < p->n_found; t++) before += p->count[t], p->need[p->order[t]][p->level] = before + 1;
  return rc;
}

static void profile_task(void *ctx, size_t i) {
  measure *m = ctx;
  vs_err err = {0};
  if (__atomic_load_n(&m->rc, __ATOMIC_RELAXED)) return;
  vs_rc rc = profile_query(m, i, &err);
  if (!rc) return;
  pthread_mutex_lock(&m->lock);
  if (!m->rc) m->err = err, __atomic_store_n(&m->rc, rc, __ATOMIC_RELAXED);
  pthread_mutex_unlock(&m->lock);
}

/* Partitions that a query touches. */
static uint32_t touched(const profile *p, int curve, uint32_t nprobe, float reach) {
  uint32_t n = nprobe < p->n_parts ? nprobe : p->n_parts;
  if (reach == 0) return n;
  const float *ratio = p->ratio[curve];
  uint32_t lo = 0; /* the first whose ratio is beyond reach: ratios ascend */
  for (uint32_t hi = n; lo < hi;) {
    uint32_t mid = (lo + hi) / 2;
    if (ratio[mid] <= reach) lo = mid + 1;
    else hi = mid;
  }
  return lo;
}

typedef struct outcome {
  double recall[COUNT(factors)], rows, parts; /* recall by number of candidates; means per query */
  double found;                               /* recall with candidates without end */
} outcome;

static uint32_t candidates_of(uint32_t k, size_t f) { return (uint32_t)ceilf(factors[f] * (float)k); }

static outcome evaluate(const measure *m, int curve, size_t probe, float reach) {
  outcome o = {0};
  uint32_t k = curve_k[curve];
  size_t total = 0, hits[COUNT(factors) + 1] = {0};
  for (size_t i = 0; i < m->t->n; i++) {
    const profile *p = &m->profiles[i];
    uint32_t n = touched(p, curve, probes[probe], reach), level = 0;
    if (!n) continue;
    while (level + 1 < COUNT(probes) && probes[level] < n) level++;
    o.rows += p->rows[n - 1], o.parts += n;
    for (uint32_t t = 0; t < k && t < p->n_true; t++, total++) {
      if (p->part[t] >= n) continue; /* UINT32_MAX, too */
      size_t f = 0;
      while (f < COUNT(factors) && candidates_of(k, f) < p->need[t][level]) f++;
      hits[f]++;
    }
  }
  for (size_t f = 0, sum = 0; f <= COUNT(factors); f++) {
    sum += hits[f];
    double recall = total ? (double)sum / (double)total : 0;
    if (f < COUNT(factors)) o.recall[f] = recall;
    o.found = recall;
  }
  o.rows /= (double)m->t->n, o.parts /= (double)m->t->n;
  return o;
}

static void fill_levels(const measure *m, int curve, ivfpq_level *out) {
  const ivfpq_params *p = &m->s->params;
  double cost[COUNT(levels)];
  for (size_t l = 0; l < COUNT(levels); l++) cost[l] = INFINITY, out[l] = (ivfpq_level){.recall = levels[l]};
  for (size_t b = 0; b < COUNT(probes) && probes[b] <= m->most; b++)
    for (size_t r = 0; r < COUNT(reaches); r++) {
      if (p->metric == IVFPQ_DOT && reaches[r] != 0) continue; /* ratios of what may be negative mean nothing */
      outcome o = evaluate(m, curve, b, reaches[r]);
      for (size_t f = 0; f < COUNT(factors); f++) {
        uint32_t n = candidates_of(curve_k[curve], f);
        double ns = o.rows * IVFPQ_ROW_NS(p->m) + o.parts * IVFPQ_PART_NS + n * IVFPQ_CANDIDATE_NS(p->sketch_bytes ? p->sketch_bytes : p->row_bytes);
        for (size_t l = 0; l < COUNT(levels) && o.recall[f] >= levels[l] + (levels[l] < .99f ? MARGIN : 0); l++)
          if (ns < cost[l]) cost[l] = ns, out[l] = (ivfpq_level){levels[l], probes[b], n, reaches[r], (float)o.rows};
      }
    }
}

static void fill_reaches(const measure *m, ivfpq_reach *out) {
  for (size_t b = 0; b < COUNT(probes); b++) {
    out[b] = (ivfpq_reach){probes[b], 0};
    if (m->s->params.metric == IVFPQ_DOT || probes[b] > m->most) continue;
    double all = evaluate(m, 1, b, 0).found;
    for (size_t r = 0; r + 1 < COUNT(reaches); r++)
      if (all - evaluate(m, 1, b, reaches[r]).found <= MISS_PART * (1 - all)) {
        out[b].reach = reaches[r];
        break;
      }
  }
}

static vs_rc open_profiles(measure *m, vs_err *err) {
  size_t n = m->t->n;
  m->profiles = calloc(n, sizeof *m->profiles);
  for (size_t i = 0; m->profiles && i < n; i++) {
    profile *p = &m->profiles[i];
    p->rows = malloc(m->most * (sizeof *p->rows + IVFPQ_CURVES * sizeof(float)));
    if (!p->rows) return vs_nomem(err);
    for (int c = 0; c < IVFPQ_CURVES; c++) p->ratio[c] = (float *)(p->rows + m->most) + (size_t)c * m->most;
  }
  return m->profiles ? VS_OK : vs_nomem(err);
}

vs_rc ivfpq_truth_measure(ivfpq_truth *t, ivfpq_segment *s, int threads, ivfpq_stop stop, void *stop_ctx, uint8_t **out, uint32_t *n,
                          vs_err *err) {
  measure m = {.t = t, .s = s, .stop = stop, .stop_ctx = stop_ctx, .lock = PTHREAD_MUTEX_INITIALIZER};
  uint64_t average = s->params.n_rows / s->params.nlist + 1, most = ROWS_MAX / average;
  const uint32_t last = probes[COUNT(probes) - 1];
  *out = NULL, *n = 0;
  if (!t->places) return VS_OK;
  m.most = most > last ? last : most < 16 ? 16 : (uint32_t)most;
  if (m.most > s->params.nlist) m.most = s->params.nlist;
  vs_rc rc = open_profiles(&m, err);
  for (size_t at = 0; at < t->n && !rc; at += 16) { /* in stretches, so that a Ctrl-C is seen soon */
    measure part = m;
    ivfpq_truth view = *t;
    view.raw += at * t->m->dim, view.queries += at, part.t = &view, part.profiles += at;
    vs_pool_run(t->n - at < 16 ? t->n - at : 16, threads, profile_task, &part);
    if (part.rc) rc = vs_fail(err, part.rc, "%s", part.err.text);
    else if (stop && stop(stop_ctx)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  if (!rc) {
    ivfpq_calibration head = {.n_queries = (uint32_t)t->n, .n_reach = COUNT(probes), .n_levels = COUNT(levels)};
    memcpy(head.k, curve_k, sizeof head.k);
    *n = (uint32_t)(sizeof head + sizeof(ivfpq_reach) * head.n_reach + IVFPQ_CURVES * head.n_levels * sizeof(ivfpq_level));
    if (!(*out = malloc(*n))) rc = vs_nomem(err);
    else {
      memcpy(*out, &head, sizeof head);
      const ivfpq_calibration *c = (const ivfpq_calibration *)*out;
      fill_reaches(&m, (ivfpq_reach *)ivfpq_reaches(c));
      for (int curve = 0; curve < IVFPQ_CURVES; curve++) fill_levels(&m, curve, (ivfpq_level *)ivfpq_levels(c) + (size_t)curve * head.n_levels);
    }
  }
  for (size_t i = 0; m.profiles && i < t->n; i++) free(m.profiles[i].rows);
  free(m.profiles);
  return rc;
}
