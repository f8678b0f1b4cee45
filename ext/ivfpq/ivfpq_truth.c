/* ivfpq_truth.c - see ivfpq_truth.h.
 *
 * Rows and queries are compared as bytes first (kern: scores_i8), a product of rows x queries x dimensions that costs a fourth of one
 * with floats; what rounding leaves out is normal with a known deviation, and a pair that may be near within four of them is
 * compared with floats.
 *
 * Limits. How far a row may be is set once, from a part of the sample: where a good part more rows than are kept should be found.
 * So what is found does not depend on threads. Should it be fewer they are still the nearest.
 *
 * Memory: queries * 2 * IVFPQ_NEAR * (24 + code bytes), and queries / IVFPQ_DEEP_EVERY * 2 * IVFPQ_DEEP * 8.
 *
 * beta. Of the kept neighbours the WANTED nearest should be the first by estimate; the beta is taken under which most of them are
 * among the first AMONG. The others of the kept ones are the very rows that compete with them.
 */
#include "ivfpq_truth.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"

enum {
  QUERIES_MIN = 256,
  QUERIES_MAX = 512,
  ROOM = 2 * IVFPQ_NEAR,
  NEAR_BYTES = 48 << 20,     /* of neighbours kept: fewer queries where codes are long */
  DEEP_FROM = 16,            /* rows in all per row that a deep query keeps: where they are a larger part there is nothing to find out */
  LIMIT_LEAST = 16,          /* found in them: fewer are too uncertain */
  SLICE = 256,
  CHUNK = 64,                /* rows whose scores are made at once */
  WANTED = 10,
  AMONG = 30,
  FILTER_BITS = 1 << 22
};
#define WORK 3e10            /* multiply-adds of rows and queries: small sets can have more queries */
#define SIGMAS 4
#define LIMIT_MORE 1.5        /* times the rows that are kept */

/* A row near a query. */
typedef struct neighbour {
  uint64_t key;              /* kern_key(distance, number in the input): no two are equal */
  float term, err2;          /* as encoded: the term at beta 0, what beta takes off */
  uint32_t centroid;
  uint8_t codes[];
} neighbour;

static neighbour *near_of(const ivfpq_truth *t, size_t query, size_t i) {
  return (neighbour *)(t->near + (query * ROOM + i) * t->stride);
}

static size_t filter_bit(uint32_t seq) { return (size_t)((seq * 0x9e3779b97f4a7c15ull) >> 42); }

/* ---- opening ---- */

static size_t stride_of(const ivfpq_model *m) { return (sizeof(neighbour) + m->m + 7) / 8 * 8; }

static size_t how_many(const ivfpq_model *m, size_t n_sample, uint64_t n_rows) {
  double n = WORK / ((double)n_rows * m->dim + 1), most = (double)NEAR_BYTES / (double)(ROOM * stride_of(m));
  size_t q = n < QUERIES_MIN ? QUERIES_MIN : n > QUERIES_MAX ? QUERIES_MAX : (size_t)n;
  if ((double)q > most) q = (size_t)most;
  return q < n_sample / 8 ? q : n_sample / 8;
}

void ivfpq_truth_close(ivfpq_truth *t) {
  if (!t) return;
  pthread_mutex_destroy(&t->lock);
  free(t->raw), free(t->x), free(t->packed), free(t->scale), free(t->queries), free(t->near), free(t->deep), free(t->scratch);
  free(t->places), free(t->rows), free(t->filter), free(t);
}

static void take_query(ivfpq_truth *t, size_t i, const float *raw, uint64_t seq, int8_t *bytes) {
  const ivfpq_model *m = t->m;
  const kern *k = kern_get();
  float *x = t->x + i * m->dim_padded;
  memcpy(t->raw + i * m->dim, raw, m->dim * sizeof *raw);
  ivfpq_truth_query *q = &t->queries[i];
  *q = (ivfpq_truth_query){.seq = (uint32_t)seq, .term_scale = 1, .near_limit = INFINITY, .limit = INFINITY,
                           .deep = t->n_deep && i % IVFPQ_DEEP_EVERY == 0 ? t->deep + i / IVFPQ_DEEP_EVERY * 2 * t->n_deep : NULL};
  if (m->metric == IVFPQ_DOT) {
    memcpy(x, raw, m->dim * sizeof *raw);
    q->term_scale = sqrtf(k->l2sq_f32(raw, m->mean, m->dim));
  } else ivfpq_model_prepare(m, raw, x);
  float norm2 = k->dot_f32(x, x, m->dim_padded);
  q->qq = m->metric == IVFPQ_DOT ? 0 : norm2, q->norm = sqrtf(norm2);
  t->scale[i] = k->quantize_i8(x, m->dim_padded, bytes);
}

static vs_rc take_queries(ivfpq_truth *t, const float *sample, const uint64_t *seq, size_t n_sample, vs_err *err) {
  int8_t *bytes = calloc(t->n * t->coded + 1, 1);
  if (!bytes) return vs_nomem(err);
  for (size_t i = 0; i < t->n; i++) {
    size_t from = (size_t)((double)i * (double)n_sample / (double)t->n);
    take_query(t, i, sample + from * t->m->dim, seq[from], bytes + i * t->coded);
  }
  kern_pack_i8(bytes, t->n, t->coded, t->packed);
  free(bytes);
  return VS_OK;
}

/* ---- the nearest so far ---- */

static int by_key(const void *pa, const void *pb) {
  uint64_t a = ((const neighbour *)pa)->key, b = ((const neighbour *)pb)->key;
  return a < b ? -1 : a > b;
}

/* Keeps the IVFPQ_NEAR nearest. */
static void near_cut(ivfpq_truth *t, size_t i) {
  ivfpq_truth_query *q = &t->queries[i];
  if (q->n_near <= IVFPQ_NEAR) return;
  for (size_t j = 0; j < q->n_near; j++) t->scratch[j] = near_of(t, i, j)->key;
  uint64_t last = kern_get()->select_u64(t->scratch, q->n_near, IVFPQ_NEAR, t->scratch + ROOM);
  size_t kept = 0;
  for (size_t j = 0; j < q->n_near; j++) {
    if (near_of(t, i, j)->key > last) continue;
    if (kept != j) memcpy(near_of(t, i, kept), near_of(t, i, j), t->stride);
    kept++;
  }
  q->n_near = (uint32_t)kept, q->near_limit = kern_key_value(last);
}

static void deep_cut(ivfpq_truth *t, ivfpq_truth_query *q) {
  if (!q->deep || q->n_deep <= t->n_deep) return;
  kern_get()->select_u64(q->deep, q->n_deep, t->n_deep, t->scratch);
  q->n_deep = t->n_deep;
}

typedef struct seen { uint32_t query, row, seq; float d; } seen;
struct ivfpq_near {
  size_t n, room;
  seen *seen;
};

static void near_free(ivfpq_near *near) {
  if (near) free(near->seen);
  free(near);
}

static vs_rc near_room(ivfpq_near *near, size_t more, vs_err *err) {
  if (near->n + more <= near->room) return VS_OK;
  size_t room = (near->n + more) * 2;
  seen *grown = realloc(near->seen, room * sizeof *grown);
  if (!grown) return vs_nomem(err);
  near->seen = grown, near->room = room;
  return VS_OK;
}

/* Rows as bytes, and what the limits are with their rounding: of at most CHUNK rows. Limits do not change while rows pass by. */
typedef struct chunk {
  int8_t *bytes;
  int32_t *score;   /* CHUNK x lanes */
  float *limit;     /* lanes: negative, a pair's score is added to it */
  uint64_t *key;
  float step[CHUNK], norm2[CHUNK];
} chunk;

static vs_rc chunk_open(const ivfpq_truth *t, chunk *c, vs_err *err) {
  size_t lanes = (t->n + 15) / 16 * 16;
  c->bytes = calloc(CHUNK * t->coded + 64, 1), c->score = malloc(CHUNK * lanes * sizeof *c->score);
  c->limit = malloc(lanes * sizeof *c->limit), c->key = malloc((lanes + 16) * sizeof *c->key);
  return c->bytes && c->score && c->limit && c->key ? VS_OK : vs_nomem(err);
}
static void chunk_close(chunk *c) { free(c->bytes), free(c->score), free(c->limit), free(c->key); }

static void chunk_rows(const ivfpq_truth *t, chunk *c, const float *x, size_t n, const uint64_t *seq) {
  const kern *k = kern_get();
  size_t d = t->m->dim_padded;
  float step = 0, norm2 = 0;
  for (size_t i = 0; i < n; i++) {
    c->step[i] = c->norm2[i] = 0;
    if (seq[i] == UINT64_MAX) {
      memset(c->bytes + i * t->coded, 0, t->coded);
      continue;
    }
    c->step[i] = k->quantize_i8(x + i * d, d, c->bytes + i * t->coded), c->norm2[i] = k->dot_f32(x + i * d, x + i * d, d);
    step = fmaxf(step, c->step[i]), norm2 = fmaxf(norm2, c->norm2[i]);
  }
  /* -2 q.x is off by -2 (q.e_x + x.e_q), each product with a deviation of a norm times a step / sqrt(12) */
  const float off = SIGMAS * 2 / sqrtf(12), norm = sqrtf(norm2);
  for (size_t j = 0; j < t->n; j++) {
    const ivfpq_truth_query *q = &t->queries[j];
    c->limit[j] = q->qq - q->limit - off * (q->norm * step + norm * t->scale[j]) - 1e-5f * (q->qq + norm2);
  }
}

static float distance_of(const ivfpq_truth *t, size_t query, const float *x) {
  const float *q = t->x + query * t->m->dim_padded;
  return t->m->metric == IVFPQ_DOT ? -2 * kern_get()->dot_f32(q, x, t->m->dim_padded) : kern_get()->l2sq_f32(q, x, t->m->dim_padded);
}

vs_rc ivfpq_truth_see(const ivfpq_truth *t, const float *x, size_t n, const uint64_t *seq, ivfpq_near **out, vs_err *err) {
  const kern *k = kern_get();
  size_t d = t->m->dim_padded, lanes = (t->n + 15) / 16 * 16;
  int dot = t->m->metric == IVFPQ_DOT;
  chunk c = {0};
  ivfpq_near *near = calloc(1, sizeof *near);
  vs_rc rc = near ? chunk_open(t, &c, err) : vs_nomem(err);
  *out = NULL;
  for (size_t at = 0; at < n && !rc; at += CHUNK) {
    size_t rows = n - at < CHUNK ? n - at : CHUNK;
    chunk_rows(t, &c, x + at * d, rows, seq + at);
    kern_scores_i8(c.bytes, rows, t->coded, t->coded, t->packed, t->n, c.score, lanes);
    for (size_t i = 0; i < rows && !rc; i++) {
      if (seq[at + i] == UINT64_MAX) continue;
      size_t found = k->keys_i8(c.score + i * lanes, t->scale, c.limit, t->n, -2 * c.step[i], dot ? 0 : c.norm2[i], 0,
                                kern_key(0, UINT32_MAX), c.key);
      rc = near_room(near, found, err);
      for (size_t j = 0; j < found && !rc; j++) {
        uint32_t query = kern_key_number(c.key[j]);
        float dist = distance_of(t, query, x + (at + i) * d);
        if (dist <= t->queries[query].limit && seq[at + i] != t->queries[query].seq)
          near->seen[near->n++] = (seen){query, (uint32_t)(at + i), (uint32_t)seq[at + i], dist};
      }
    }
  }
  chunk_close(&c);
  if (rc) near_free(near);
  else *out = near;
  return rc;
}

void ivfpq_truth_add(ivfpq_truth *t, ivfpq_near *near, const uint8_t *codes, const uint32_t *centroid, const float *terms,
                     const float *err2) {
  size_t m = t->m->m;
  pthread_mutex_lock(&t->lock);
  for (size_t i = 0; i < near->n; i++) {
    const seen *s = &near->seen[i];
    ivfpq_truth_query *q = &t->queries[s->query];
    if (q->deep) {
      q->deep[q->n_deep++] = kern_key(s->d, s->seq);
      if (q->n_deep == 2 * t->n_deep) deep_cut(t, q);
    }
    if (s->d > q->near_limit) continue;
    neighbour *to = near_of(t, s->query, q->n_near++);
    to->key = kern_key(s->d, s->seq);
    to->term = terms[s->row], to->err2 = err2[s->row], to->centroid = centroid[s->row];
    memcpy(to->codes, codes + s->row * m, m);
    if (q->n_near == ROOM) near_cut(t, s->query);
  }
  pthread_mutex_unlock(&t->lock);
  near_free(near);
}

/* ---- limits ---- */

/* Of `sampled` rows of n, how many are as near as LIMIT_MORE * keep of all. */
static size_t rank_of(uint64_t keep, size_t sampled, uint64_t n_rows) {
  double rank = LIMIT_MORE * (double)keep * (double)sampled / (double)n_rows;
  return rank < LIMIT_LEAST ? LIMIT_LEAST : (size_t)rank;
}

/* Distances of one slice to all queries, to out[query * n + at ...]: as bytes say, which is near enough here. */
static void slice_distances(const ivfpq_truth *t, const chunk *c, size_t rows, size_t at, size_t n, float *out) {
  size_t lanes = (t->n + 15) / 16 * 16;
  int dot = t->m->metric == IVFPQ_DOT;
  for (size_t q = 0; q < t->n; q++)
    for (size_t i = 0; i < rows; i++)
      out[q * n + at + i] = (dot ? 0 : c->norm2[i] + t->queries[q].qq) - 2 * c->step[i] * t->scale[q] * (float)c->score[i * lanes + q];
}

static vs_rc set_limits(ivfpq_truth *t, const float *sample, size_t n_sample, uint64_t n_rows, vs_err *err) {
  const ivfpq_model *m = t->m;
  const kern *k = kern_get();
  size_t n = n_sample < IVFPQ_TRUTH_SAMPLE ? n_sample : IVFPQ_TRUTH_SAMPLE, lanes = (t->n + 15) / 16 * 16;
  float *x = malloc(CHUNK * m->dim_padded * sizeof *x), *d = malloc(t->n * n * sizeof *d);
  uint64_t *key = malloc((3 * n + 32) * sizeof *key), seq[CHUNK] = {0};
  chunk c = {0};
  vs_rc rc = x && d && key ? chunk_open(t, &c, err) : vs_nomem(err);
  for (size_t at = 0; at < n && !rc; at += CHUNK) {
    size_t rows = n - at < CHUNK ? n - at : CHUNK;
    for (size_t i = 0; i < rows; i++) { /* evenly: a file may be in order */
      size_t from = (size_t)((double)(at + i) * (double)n_sample / (double)n);
      ivfpq_model_prepare(m, sample + from * m->dim, x + i * m->dim_padded);
    }
    chunk_rows(t, &c, x, rows, seq);
    kern_scores_i8(c.bytes, rows, t->coded, t->coded, t->packed, t->n, c.score, lanes);
    slice_distances(t, &c, rows, at, n, d);
  }
  for (size_t q = 0; q < t->n && !rc; q++) {
    size_t near = rank_of(IVFPQ_NEAR, n, n_rows), deep = t->queries[q].deep ? rank_of(t->n_deep, n, n_rows) : near;
    for (size_t i = 0; i < n; i++) key[i] = kern_key(d[q * n + i], (uint32_t)i);
    if (deep < n) t->queries[q].limit = kern_key_value(k->select_u64(key, n, deep, key + n));
    if (near < n) t->queries[q].near_limit = kern_key_value(k->select_u64(key, n, near, key + n));
  }
  chunk_close(&c);
  free(x), free(d), free(key);
  return rc;
}

static vs_rc new_truth(const ivfpq_model *m, size_t n, uint32_t n_deep, ivfpq_truth **out, vs_err *err) {
  size_t d = m->dim_padded, lanes = ivfpq_round(n, 16);
  ivfpq_truth *t = calloc(1, sizeof *t);
  *out = t;
  if (!t) return vs_nomem(err);
  pthread_mutex_init(&t->lock, NULL);
  t->m = m, t->n = n, t->n_deep = n_deep, t->coded = ivfpq_round(d, 4), t->stride = stride_of(m);
  t->raw = malloc(n * m->dim * sizeof *t->raw), t->x = calloc(n * d, sizeof *t->x);
  t->packed = malloc(lanes * t->coded), t->scale = calloc(lanes, sizeof *t->scale);
  t->queries = calloc(n, sizeof *t->queries), t->near = calloc(n * ROOM, t->stride);
  t->deep = malloc((n / IVFPQ_DEEP_EVERY + 1) * 2 * n_deep * sizeof *t->deep + 1);
  t->scratch = malloc((4 * n_deep + 4 * ROOM + 64) * sizeof *t->scratch);
  return t->raw && t->x && t->packed && t->scale && t->queries && t->near && t->deep && t->scratch ? VS_OK : vs_nomem(err);
}

vs_rc ivfpq_truth_open(const ivfpq_model *m, const float *sample, const uint64_t *seq, size_t n_sample, uint64_t n_rows,
                       ivfpq_truth **out, vs_err *err) {
  size_t n = how_many(m, n_sample, n_rows);
  uint32_t n_deep = IVFPQ_DEEP;
  *out = NULL;
  if (!n) return VS_OK;
  while (n_deep > n_rows / DEEP_FROM) n_deep /= 10;
  vs_rc rc = new_truth(m, n, n_deep > IVFPQ_NEAR ? n_deep : 0, out, err);
  if (!rc) rc = take_queries(*out, sample, seq, n_sample, err);
  if (!rc) rc = set_limits(*out, sample, n_sample, n_rows, err);
  if (rc) ivfpq_truth_close(*out), *out = NULL;
  return rc;
}

/* ---- state files ---- */

void ivfpq_truth_save(const ivfpq_truth *t, ivfpq_state *s) {
  uint64_t n = t ? t->n : 0;
  ivfpq_state_put(s, &n, 8);
  if (t) ivfpq_state_put(s, &t->n_deep, 4);
  for (size_t i = 0; i < n; i++) {
    const ivfpq_truth_query *q = &t->queries[i];
    float limits[] = {q->near_limit, q->limit};
    uint32_t head[] = {q->seq, q->n_near, q->n_deep};
    ivfpq_state_put(s, head, sizeof head), ivfpq_state_put(s, limits, sizeof limits);
    ivfpq_state_put(s, t->raw + i * t->m->dim, t->m->dim * sizeof *t->raw);
    ivfpq_state_put(s, near_of(t, i, 0), q->n_near * t->stride);
    if (q->deep) ivfpq_state_put(s, q->deep, q->n_deep * sizeof *q->deep);
  }
}

static vs_rc load_query(ivfpq_truth *t, size_t i, float *raw, int8_t *bytes, ivfpq_state *s, vs_err *err) {
  uint32_t head[3];
  float limits[2];
  ivfpq_state_get(s, head, sizeof head), ivfpq_state_get(s, limits, sizeof limits), ivfpq_state_get(s, raw, t->m->dim * sizeof *raw);
  take_query(t, i, raw, head[0], bytes);
  ivfpq_truth_query *q = &t->queries[i];
  if (head[1] >= ROOM || (q->deep ? head[2] >= 2 * t->n_deep : head[2])) return vs_corrupt(err, "a kept query has too many neighbours");
  q->near_limit = limits[0], q->limit = limits[1], q->n_near = head[1], q->n_deep = head[2];
  ivfpq_state_get(s, near_of(t, i, 0), q->n_near * t->stride);
  if (q->deep) ivfpq_state_get(s, q->deep, q->n_deep * sizeof *q->deep);
  for (size_t j = 0; j < q->n_near; j++)
    if (near_of(t, i, j)->centroid >= t->m->nlist) return vs_corrupt(err, "a kept neighbour is of no partition");
  return VS_OK;
}

vs_rc ivfpq_truth_load(const ivfpq_model *m, ivfpq_state *s, ivfpq_truth **out, vs_err *err) {
  uint64_t n;
  uint32_t n_deep;
  ivfpq_state_get(s, &n, 8);
  *out = NULL;
  if (!n) return VS_OK;
  ivfpq_state_get(s, &n_deep, 4);
  if (n > QUERIES_MAX || n_deep > IVFPQ_DEEP) return vs_corrupt(err, "there are too many kept queries");
  float *raw = malloc(m->dim * sizeof *raw);
  int8_t *bytes = calloc(n * ivfpq_round(m->dim_padded, 4) + 1, 1);
  vs_rc rc = raw && bytes ? new_truth(m, n, n_deep, out, err) : vs_nomem(err);
  for (size_t i = 0; i < n && !rc; i++) rc = load_query(*out, i, raw, bytes + i * (*out)->coded, s, err);
  if (!rc) kern_pack_i8(bytes, n, (*out)->coded, (*out)->packed);
  free(raw), free(bytes);
  if (rc) ivfpq_truth_close(*out), *out = NULL;
  return rc;
}

/* ---- beta ---- */

/* What the codes say of a row: its words side by side. */
static void decode(const ivfpq_model *m, const neighbour *b, float *y) {
  size_t ds = m->sub_dim, words = ivfpq_words(m->bits);
  for (size_t j = 0; j < m->subs; j++) {
    unsigned code = m->bits == 4 ? b->codes[j / 2] >> (j % 2 ? 4 : 0) & 15u : b->codes[j];
    memcpy(y + j * ds, m->words + (j * words + code) * ds, ds * sizeof *y);
  }
}

/* The estimate at beta 0, less what is the same for all rows of a query, of which q is what the codes are of. */
static float estimate(const ivfpq_truth *t, size_t query, const float *q, const neighbour *b, float *y) {
  const ivfpq_model *m = t->m;
  size_t d = m->dim_padded;
  float cc = m->metric == IVFPQ_DOT ? 0 : -2 * m->bias[b->centroid];
  decode(m, b, y);
  float product = kern_get()->dot_f32(t->x + query * d, m->centroids + (size_t)b->centroid * d, d);
  return cc - 2 * (product + kern_get()->dot_f32(q, y, ivfpq_model_code_dim(m))) + t->queries[query].term_scale * b->term;
}

/* How many of the WANTED nearest are among the first by estimate, under each beta. Neighbours are sorted. */
static void count_hits(ivfpq_truth *t, size_t query, float *y, size_t hits[IVFPQ_BETAS]) {
  float est[IVFPQ_NEAR], off[IVFPQ_NEAR];
  const ivfpq_model *m = t->m;
  size_t n = t->queries[query].n_near;
  if (n < 2 * AMONG) return;
  const float *q = ivfpq_model_turned(m, t->x + query * m->dim_padded, y + m->dim_padded);
  for (size_t i = 0; i < n; i++) {
    const neighbour *b = near_of(t, query, i);
    est[i] = estimate(t, query, q, b, y), off[i] = t->queries[query].term_scale * b->err2;
  }
  for (size_t b = 0; b < IVFPQ_BETAS; b++) {
    uint64_t *key = t->scratch;
    for (size_t i = 0; i < n; i++) key[i] = kern_key(est[i] - ivfpq_beta(b) * off[i], (uint32_t)i);
    float border = kern_key_value(kern_get()->select_u64(key, n, AMONG, key + ROOM));
    for (size_t i = 0; i < WANTED; i++) hits[b] += est[i] - ivfpq_beta(b) * off[i] <= border;
  }
}

/* The nearest of a query, in order, to key; how many. */
static size_t nearest_of(ivfpq_truth *t, size_t i, uint64_t *key) {
  ivfpq_truth_query *q = &t->queries[i];
  size_t n = q->n_near < IVFPQ_TRUE ? q->n_near : IVFPQ_TRUE;
  for (size_t j = 0; j < n; j++) key[j] = near_of(t, i, j)->key;
  if (!q->deep) return n;
  deep_cut(t, q);
  n = q->n_deep;
  memcpy(key, q->deep, n * sizeof *key);
  kern_sort_u64(key, n, t->scratch);
  return n;
}

/* All rows were seen: sorts them, and notes whose places in the segment will be asked for. */
static vs_rc settle(ivfpq_truth *t, vs_err *err) {
  size_t most = (t->n_deep > IVFPQ_TRUE ? t->n_deep : IVFPQ_TRUE), room = t->n * (IVFPQ_TRUE + 1) + (t->n / IVFPQ_DEEP_EVERY + 1) * t->n_deep;
  uint64_t *key = malloc((most + 1) * sizeof *key), *sorted;
  if (t->places) {
    free(key);
    return VS_OK;
  }
  t->places = malloc(2 * room * sizeof *t->places), t->rows = malloc(room * sizeof *t->rows);
  t->filter = calloc(FILTER_BITS / 64, sizeof *t->filter);
  if (!key || !t->places || !t->rows || !t->filter) {
    free(key);
    return vs_nomem(err);
  }
  sorted = t->places + room;
  for (size_t i = 0; i < t->n; i++) {
    ivfpq_truth_query *q = &t->queries[i];
    near_cut(t, i);
    qsort(near_of(t, i, 0), q->n_near, t->stride, by_key);
    q->rows = t->rows + t->n_places + 1, q->n_rows = (uint32_t)nearest_of(t, i, key);
    t->rows[t->n_places] = UINT32_MAX, t->places[t->n_places] = (uint64_t)q->seq << 32 | t->n_places, t->n_places++;
    for (uint32_t j = 0; j < q->n_rows; j++, t->n_places++)
      t->rows[t->n_places] = UINT32_MAX, t->places[t->n_places] = (uint64_t)kern_key_number(key[j]) << 32 | t->n_places;
  }
  kern_sort_u64(t->places, t->n_places, sorted);
  for (size_t i = 0; i < t->n_places; i++) {
    size_t bit = filter_bit((uint32_t)(t->places[i] >> 32));
    t->filter[bit / 64] |= 1ull << bit % 64;
  }
  free(key);
  return VS_OK;
}

vs_rc ivfpq_truth_beta(ivfpq_truth *t, size_t *beta, vs_err *err) {
  size_t hits[IVFPQ_BETAS] = {0}, most = 0;
  float *y = malloc(2 * t->m->dim_padded * sizeof *y);
  vs_rc rc = y ? settle(t, err) : vs_nomem(err);
  *beta = IVFPQ_USUAL_BETA;
  for (size_t i = 0; i < t->n && !rc; i++) count_hits(t, i, y, hits);
  free(y);
  for (size_t b = 0; b < IVFPQ_BETAS; b++) { /* smoothed: neighbours on the grid vote, too */
    size_t smooth = 2 * hits[b] + hits[b ? b - 1 : b] + hits[b + 1 < IVFPQ_BETAS ? b + 1 : b];
    if (smooth > most) most = smooth, *beta = b;
  }
  return rc;
}

void ivfpq_truth_place(ivfpq_truth *t, uint64_t seq, uint32_t row) {
  size_t bit = filter_bit((uint32_t)seq), lo = 0;
  if (!t->places || !(t->filter[bit / 64] >> bit % 64 & 1)) return;
  uint64_t from = seq << 32;
  for (size_t hi = t->n_places; lo < hi;) {
    size_t mid = (lo + hi) / 2;
    if (t->places[mid] < from) lo = mid + 1;
    else hi = mid;
  }
  for (; lo < t->n_places && t->places[lo] >> 32 == seq; lo++) t->rows[(uint32_t)t->places[lo]] = row;
}
