/* ivfpq_model.c - training (mean, coarse centroids in two levels, code words) and encoding; see ivfpq_model.h. */
#include "ivfpq_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"

enum {
  COARSE_ITERATIONS = 8,
  WORD_ITERATIONS = 8,
  WORD_SAMPLE = 32768,  /* rows that train the code words: 128 per word of 8 bits */
  GROUPS_FROM = 257,    /* fewer partitions make one group: a cold reader fetches them at once */
  PROJECT_MAX = 128,    /* directions */
  PROJECT_STEP = 16,
  PROJECT_FROM = 96,    /* dimensions, and */
  PROJECT_NLIST = 512,  /* partitions: below, ranking is cheap as it is */
  PROJECT_ITERATIONS = 8
};
#define PROJECT_ENERGY 0.98 /* of the centroids, that the directions must hold */

void ivfpq_model_prepare(const ivfpq_model *m, const float *x, float *out) {
  float scale = 1;
  if (m->metric == IVFPQ_COSINE) {
    double s = 0; /* double: squares of ordinary floats may leave the float range */
    float f = kern_get()->dot_f32(x, x, m->dim);
    if (f > 1e-30f && f < 1e37f) s = f;
    else
      for (uint32_t j = 0; j < m->dim; j++) s += (double)x[j] * x[j];
    scale = s > 0 ? (float)(1 / sqrt(s)) : 0;
  }
  for (uint32_t j = 0; j < m->dim; j++) out[j] = x[j] * scale - m->mean[j];
  for (uint32_t j = m->dim; j < m->dim_padded; j++) out[j] = 0;
}

/* The mean of the prepared sample, in double and in a fixed order. */
static vs_rc learn_mean(ivfpq_model *m, const ivfpq_learn *p, float *x, vs_err *err) {
  double *sum = calloc(m->dim, sizeof *sum);
  if (!sum) return vs_nomem(err);
  for (size_t i = 0; i < p->n; i++) { /* the mean is still zero here */
    ivfpq_model_prepare(m, p->sample + i * m->dim, x + i * m->dim_padded);
    for (uint32_t j = 0; j < m->dim; j++) sum[j] += x[i * m->dim_padded + j];
  }
  for (uint32_t j = 0; j < m->dim; j++) m->mean[j] = (float)(sum[j] / (double)p->n);
  for (size_t i = 0; i < p->n; i++)
    for (uint32_t j = 0; j < m->dim; j++) x[i * m->dim_padded + j] -= m->mean[j];
  free(sum);
  return VS_OK;
}

/* Clusters the centroids themselves and puts them in the order of their groups. */
static vs_rc learn_groups(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) {
  size_t d = m->dim_padded, k = m->n_groups;
  ivfpq_kmeans km = {.x = m->centroids, .n = m->nlist, .stride = d, .dim = d, .k = k, .iterations = 8, .threads = p->threads,
                     .seed = p->seed + 1, .stop = p->stop, .stop_ctx = p->ctx};
  uint32_t *id = malloc(m->nlist * sizeof *id);
  float *copy = malloc(m->nlist * d * sizeof *copy), *packed = malloc(kern_packed_len(k, d) * 4), *bias = malloc(ivfpq_round(k, 16) * 4);
  vs_rc rc = id && copy && packed && bias ? ivfpq_kmeans_run(&km, m->group_centroids, err) : vs_nomem(err);
  if (!rc) {
    kern_pack_f32(m->group_centroids, k, d, packed);
    ivfpq_half_norms(m->group_centroids, k, d, bias);
    ivfpq_assign(m->centroids, m->nlist, d, d, packed, bias, k, p->threads, id);
    memcpy(copy, m->centroids, m->nlist * d * sizeof *copy);
    uint32_t at = 0, g_out = 0;
    for (uint32_t g = 0; g < k; g++) {
      uint32_t first = at;
      for (uint32_t c = 0; c < m->nlist; c++)
        if (id[c] == g) memcpy(m->centroids + at++ * d, copy + c * d, d * sizeof *copy);
      if (at == first) continue; /* an empty group is dropped */
      memmove(m->group_centroids + g_out * d, m->group_centroids + g * d, d * sizeof *copy);
      m->group_first[g_out++] = first;
    }
    m->n_groups = g_out;
    m->group_first[g_out] = m->nlist;
  }
  free(id), free(copy), free(packed), free(bias);
  return rc;
}

/* Rounds n rows to what a signed byte times one scale per row can say. */
static vs_rc round_rows(float *x, size_t n, size_t len, vs_err *err) {
  int8_t *q = malloc(len + 1);
  if (!q) return vs_nomem(err);
  for (size_t i = 0; i < n; i++, x += len) {
    float scale = kern_get()->quantize_i8(x, len, q);
    for (size_t j = 0; j < len; j++) x[j] = scale * q[j];
  }
  free(q);
  return VS_OK;
}

/* One step of block power iteration: z = (C'C) v for `project` directions v (rows); y is scratch of nlist x lanes. */
static void multiply_directions(const ivfpq_model *m, const float *v, size_t n_v, float *packed, const float *zero, float *y, float *z) {
  size_t d = m->dim_padded, lanes = ivfpq_round(n_v, 16);
  kern_pack_f32(v, n_v, d, packed);
  kern_get()->scores_many_f32(m->centroids, m->nlist, d, d, packed, zero, n_v, y, lanes);
  memset(z, 0, n_v * d * sizeof *z);
  for (size_t c = 0; c < m->nlist; c++) {
    const float *x = m->centroids + c * d;
    for (size_t u = 0; u < n_v; u++) {
      float s = y[c * lanes + u], *to = z + u * d;
      for (size_t j = 0; j < d; j++) to[j] += s * x[j];
    }
  }
}

/* Gram-Schmidt; a direction that vanishes becomes zero. */
static void orthonormalize(float *v, size_t n, size_t d) {
  const kern *k = kern_get();
  for (size_t u = 0; u < n; u++) {
    float *a = v + u * d;
    for (size_t w = 0; w < u; w++) {
      const float *b = v + w * d;
      float s = k->dot_f32(a, b, d);
      for (size_t j = 0; j < d; j++) a[j] -= s * b[j];
    }
    float norm = sqrtf(k->dot_f32(a, a, d)), inv = norm > 1e-20f ? 1 / norm : 0;
    for (size_t j = 0; j < d; j++) a[j] *= inv;
  }
}

/* How many of the leading directions hold enough of the energy, a multiple of PROJECT_STEP; 0: all together do not. y: the centroids'
 * coordinates in them. */
static uint32_t directions_needed(const ivfpq_model *m, const float *y, size_t n) {
  double energy[PROJECT_MAX] = {0}, all = 0, kept = 0;
  for (size_t c = 0; c < m->nlist; c++) {
    all += -2 * (double)m->bias[c];
    for (size_t u = 0; u < n; u++) energy[u] += (double)y[c * n + u] * y[c * n + u];
  }
  for (size_t u = 0; u < n; u++) {
    kept += energy[u];
    if ((u + 1) % PROJECT_STEP == 0 && kept >= PROJECT_ENERGY * all) return (uint32_t)(u + 1);
  }
  return 0;
}

/* The leading principal directions of the centroids, kept when a few of them hold nearly all of their energy: ranking then reads a
 * fraction of the bytes. Sets of low intrinsic dimension allow that, most text embeddings do not. */
static vs_rc learn_projection(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) {
  size_t d = m->dim_padded, n = d / 2 / PROJECT_STEP * PROJECT_STEP;
  if (n > PROJECT_MAX) n = PROJECT_MAX;
  if (d < PROJECT_FROM || m->nlist < PROJECT_NLIST || m->metric == IVFPQ_DOT) return VS_OK;
  float *v = malloc(n * d * 4), *z = malloc(n * d * 4), *packed = malloc(kern_packed_len(n, d) * 4), *zero = calloc(n, 4);
  float *y = malloc(m->nlist * n * 4);
  vs_rc rc = v && z && packed && zero && y ? VS_OK : vs_nomem(err);
  ivfpq_rng rng = {p->seed + 2};
  for (size_t i = 0; i < n * d && !rc; i++) v[i] = (float)(ivfpq_rng_next(&rng) >> 40) / 16777216.f - .5f;
  for (int t = 0; t < PROJECT_ITERATIONS && !rc; t++) {
    orthonormalize(v, n, d);
    multiply_directions(m, v, n, packed, zero, y, z);
    memcpy(v, z, n * d * 4);
    if (p->stop && p->stop(p->ctx)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  if (!rc) {
    orthonormalize(v, n, d);
    multiply_directions(m, v, n, packed, zero, y, z);
    m->project = directions_needed(m, y, n);
    if (m->project) m->directions = v, v = NULL;
  }
  free(v), free(z), free(packed), free(zero), free(y);
  return rc;
}

/* What assignment reads, from what was learned. */
static void pack_centroids(ivfpq_model *m) {
  kern_pack_f32(m->centroids, m->nlist, m->dim_padded, m->packed);
  ivfpq_half_norms(m->centroids, m->nlist, m->dim_padded, m->bias);
}

/* What encoding reads. */
static void pack_words(ivfpq_model *m) {
  size_t words = ivfpq_words(m->bits), size = words * m->sub_dim;
  for (size_t j = 0; j < m->subs; j++) {
    kern_pack_f32(m->words + j * size, words, m->sub_dim, m->words_packed + j * size);
    ivfpq_half_norms(m->words + j * size, words, m->sub_dim, m->words_bias + j * words);
  }
}

static vs_rc learn_coarse(ivfpq_model *m, const ivfpq_learn *p, const float *x, vs_err *err) {
  size_t d = m->dim_padded;
  ivfpq_kmeans km = {.x = x, .n = p->n, .stride = d, .dim = d, .k = m->nlist, .iterations = COARSE_ITERATIONS,
                     .threads = p->threads, .seed = p->seed, .stop = p->stop, .stop_ctx = p->ctx};
  vs_rc rc = ivfpq_kmeans_run(&km, m->centroids, err);
  if (!rc) rc = learn_groups(m, p, err);
  if (!rc) rc = round_rows(m->centroids, m->nlist, d, err);
  if (rc) return rc;
  pack_centroids(m);
  return learn_projection(m, p, err);
}

typedef struct words_job {
  ivfpq_model *m;
  const ivfpq_learn *p;
  const float *x;
  size_t n;
  int failed;
} words_job;

static void words_of_sub(void *ctx, size_t j) {
  words_job *w = ctx;
  ivfpq_model *m = w->m;
  size_t words = ivfpq_words(m->bits), size = words * m->sub_dim;
  ivfpq_kmeans km = {.x = w->x + j * m->sub_dim, .n = w->n, .stride = m->dim_padded, .dim = m->sub_dim, .k = words,
                     .iterations = WORD_ITERATIONS, .threads = 1, .seed = w->p->seed + 100 + j};
  if (ivfpq_kmeans_run(&km, m->words + j * size, NULL)) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
}

/* One scale per code byte: with 4 bits two sub-quantizers share it, so that a table of their sums can be made of integers. */
static vs_rc round_words(ivfpq_model *m, vs_err *err) {
  size_t words = ivfpq_words(m->bits), size = words * m->sub_dim;
  vs_rc rc = round_rows(m->words, m->m, m->subs / m->m * size, err);
  if (!rc) pack_words(m);
  return rc;
}

/* Code words learn from residuals. */
static vs_rc learn_words(ivfpq_model *m, const ivfpq_learn *p, float *x, vs_err *err) {
  size_t n = p->n < WORD_SAMPLE ? p->n : WORD_SAMPLE, d = m->dim_padded;
  uint32_t *id = malloc(n * sizeof *id + 1);
  if (!id) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) { /* evenly over the sample; rows move forward only, so nothing is overwritten early */
    size_t from = (size_t)((double)i * (double)p->n / (double)n);
    if (from != i) memcpy(x + i * d, x + from * d, d * sizeof *x);
  }
  ivfpq_assign(x, n, d, d, m->packed, m->bias, m->nlist, p->threads, id);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < d; j++) x[i * d + j] -= m->centroids[id[i] * d + j];
  free(id);
  words_job w = {m, p, x, n, 0};
  for (size_t j = 0; j < m->subs && !w.failed; j += 8) {
    /* eight at a time, so that a Ctrl-C is seen soon */
    words_job part = w;
    ivfpq_model view = *m;
    size_t k = m->subs - j < 8 ? m->subs - j : 8, size = ivfpq_words(m->bits) * (size_t)m->sub_dim;
    view.words += j * size;
    ivfpq_learn shifted = *p;
    shifted.seed += j;
    part.m = &view, part.p = &shifted, part.x = x + j * m->sub_dim;
    vs_pool_run(k, p->threads, words_of_sub, &part);
    w.failed = part.failed;
    if (p->progress) p->progress(p->ctx, "train code words", j + k, m->subs);
    if (p->stop && p->stop(p->ctx)) return vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  return w.failed ? vs_nomem(err) : round_words(m, err);
}

static vs_rc allocate(ivfpq_model *m, vs_err *err) {
  size_t d = m->dim_padded, k = m->nlist, lanes = ivfpq_round(k, 16), words = (size_t)m->subs * ivfpq_words(m->bits ? m->bits : 1);
  m->mean = calloc(d, 4);
  m->centroids = calloc(k * d + 1, 4);
  m->packed = calloc(lanes * d + 16, 4);
  m->bias = calloc(lanes + 16, 4);
  m->group_first = calloc(m->n_groups + 1, 4);
  m->group_centroids = calloc(m->n_groups * d + 1, 4);
  m->words = calloc(words * m->sub_dim + 1, 4);
  m->words_packed = calloc(words * m->sub_dim + 16, 4);
  m->words_bias = calloc(words + 16, 4);
  return m->mean && m->centroids && m->packed && m->bias && m->group_first && m->group_centroids && m->words &&
                 m->words_packed && m->words_bias
             ? VS_OK
             : vs_nomem(err);
}

uint32_t ivfpq_default_groups(uint32_t nlist) { return nlist < GROUPS_FROM ? 1 : (uint32_t)ceil(sqrt(nlist)); }

vs_rc ivfpq_model_learn(ivfpq_model *m, const ivfpq_learn *p, float *x, vs_err *err) {
  m->n_groups = ivfpq_default_groups(m->nlist);
  vs_rc rc = allocate(m, err);
  if (rc || !m->m) {
    if (!rc) m->group_first[1] = m->nlist;
    return rc;
  }
  if ((rc = learn_mean(m, p, x, err))) return rc;
  if (p->progress) p->progress(p->ctx, "train centroids", 0, 1);
  if ((rc = learn_coarse(m, p, x, err))) return rc;
  if (p->progress) p->progress(p->ctx, "train centroids", 1, 1);
  return learn_words(m, p, x, err);
}

void ivfpq_model_reset(ivfpq_model *m) {
  free(m->mean), free(m->centroids), free(m->packed), free(m->bias), free(m->group_first), free(m->group_centroids);
  free(m->words), free(m->words_packed), free(m->words_bias), free(m->directions);
  memset(m, 0, sizeof *m);
}

/* What was learned; the rest of a model follows from it. */
void ivfpq_model_save(const ivfpq_model *m, ivfpq_state *s) {
  size_t d = m->dim_padded;
  uint32_t head[] = {m->metric, m->dim, m->dim_padded, m->nlist, m->bits, m->m, m->n_groups, m->project};
  ivfpq_state_put(s, head, sizeof head);
  ivfpq_state_put(s, m->mean, d * 4);
  ivfpq_state_put(s, m->centroids, m->nlist * d * 4);
  ivfpq_state_put(s, m->group_first, ((size_t)m->n_groups + 1) * 4);
  ivfpq_state_put(s, m->group_centroids, m->n_groups * d * 4);
  if (m->m) ivfpq_state_put(s, m->words, (size_t)m->subs * ivfpq_words(m->bits) * m->sub_dim * 4);
  ivfpq_state_put(s, m->directions, m->project * d * 4);
}

vs_rc ivfpq_model_load(ivfpq_model *m, ivfpq_state *s, vs_err *err) {
  size_t d = m->dim_padded;
  uint32_t head[8], same[] = {m->metric, m->dim, m->dim_padded, m->nlist, m->bits, m->m};
  ivfpq_state_get(s, head, sizeof head);
  if (memcmp(head, same, sizeof same) || head[6] < 1 || head[6] > m->nlist || head[7] > PROJECT_MAX)
    return vs_corrupt(err, "the kept model is of another shape");
  m->n_groups = head[6];
  vs_rc rc = allocate(m, err);
  if (!rc && head[7] && !(m->directions = malloc(head[7] * d * 4))) rc = vs_nomem(err);
  if (rc) return rc;
  m->project = head[7];
  ivfpq_state_get(s, m->mean, d * 4);
  ivfpq_state_get(s, m->centroids, m->nlist * d * 4);
  ivfpq_state_get(s, m->group_first, ((size_t)m->n_groups + 1) * 4);
  ivfpq_state_get(s, m->group_centroids, m->n_groups * d * 4);
  if (m->m) ivfpq_state_get(s, m->words, (size_t)m->subs * ivfpq_words(m->bits) * m->sub_dim * 4);
  ivfpq_state_get(s, m->directions, m->project * d * 4);
  for (uint32_t g = 0; g < m->n_groups; g++)
    if (m->group_first[g] > m->group_first[g + 1]) return vs_corrupt(err, "the kept model's groups overlap");
  if (m->group_first[0] || m->group_first[m->n_groups] != m->nlist) return vs_corrupt(err, "the kept model's groups have gaps");
  if (!m->m) return VS_OK;
  pack_centroids(m);
  pack_words(m);
  return VS_OK;
}

void ivfpq_model_encode(const ivfpq_model *m, float *x, size_t n, const uint32_t *centroid, uint8_t *codes, float *terms, float *err2) {
  const kern *k = kern_get();
  size_t d = m->dim_padded, ds = m->sub_dim, words = ivfpq_words(m->bits);
  float rr[256], e2[256], cr[256], cx[256];
  uint32_t id[256];
  memset(codes, 0, n * m->m);
  for (size_t i = 0; i < n; i++) {
    const float *c = m->centroids + centroid[i] * d;
    float *r = x + i * d;
    for (size_t j = 0; j < d; j++) r[j] -= c[j];
    rr[i] = k->dot_f32(r, r, d), cx[i] = k->dot_f32(r, c, d), e2[i] = cr[i] = 0;
  }
  for (size_t j = 0; j < m->subs; j++) { /* sub-quantizer outside: its words stay in L1 */
    const float *w = m->words + j * words * ds;
    k->argmax_f32(x + j * ds, n, d, ds, m->words_packed + j * words * ds, m->words_bias + j * words, words, id, NULL);
    for (size_t i = 0; i < n; i++) {
      const float *word = w + id[i] * ds, *c = m->centroids + centroid[i] * d + j * ds, *r = x + i * d + j * ds;
      if (m->bits == 4) codes[i * m->m + j / 2] |= (uint8_t)(id[i] << (j % 2 ? 4 : 0));
      else codes[i * m->m + j] = (uint8_t)id[i];
      for (size_t e = 0; e < ds; e++) {
        float v = r[e] - word[e];
        e2[i] += v * v, cr[i] += word[e] * c[e];
      }
    }
  }
  for (size_t i = 0; i < n; i++) {
    if (m->metric != IVFPQ_DOT) {
      terms[i] = rr[i] + 2 * cr[i], err2[i] = e2[i];
      continue;
    }
    float norm2 = rr[i] + 2 * cx[i] - 2 * m->bias[centroid[i]]; /* |c + r|^2 */
    float inv = norm2 > 1e-30f ? 1 / sqrtf(norm2) : 0;
    terms[i] = -2 * (cx[i] - cr[i]) * inv, err2[i] = e2[i] * inv;
  }
}
