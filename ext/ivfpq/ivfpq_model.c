/* ivfpq_model.c - training (mean, coarse centroids in two levels, code words) and encoding; see ivfpq_model.h. */
#include "ivfpq_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../kernels/kern.h"

/* k-means. recall@10 at equal settings of 1,000,000 x 128 and 300,000 x 960, by rows per centroid (ivfpq_build.c) and iterations: 40 and 5
 * .953/.952; 26 and 5 .943/.939; 40 and 3 .951/.946; 64 and 5 .955/.949; 100 and 2 .954/.956; 100 and 3, half as much work again,
 * .957/.961. Other clusterings of the same kind differ by .003. */
enum {
  COARSE_ITERATIONS = 5,
  WORD_ITERATIONS = 4,
  WORD_SAMPLE = 32768,  /* rows that train the code words: 128 per word of 8 bits */
  GROUPS_FROM = 257,    /* fewer partitions make one group: a cold reader fetches them at once */
  PROJECT_MAX = 128,    /* directions */
  PROJECT_STEP = 16,
  PROJECT_FROM = 96,    /* dimensions, */
  PROJECT_TO = 4096,    /* the Gram matrix then has 64 MiB (for the codes' directions, too); and */
  PROJECT_NLIST = 512,  /* partitions: below, ranking is cheap as it is */
  PROJECT_SAMPLE = 4096, /* centroids that are looked at */
  PROJECT_ITERATIONS = 8,
  TURN_ROWS = 4         /* rows per dimension that the directions are learned from, at least */
};
#define PROJECT_ENERGY 0.98 /* of the centroids, that the directions must hold */
#define TURN_ENERGY 0.85    /* of the residuals: .86 won on image descriptors, .71 lost on word vectors */
#define TURN_SLIM_ENERGY 0.98
#define TURN_COST 1.25      /* multiply-adds of a query's table, against the table without directions */

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
  kern_scale_sub_f32(x, scale, m->mean, m->dim, out);
  for (uint32_t j = m->dim; j < m->dim_padded; j++) out[j] = 0;
}

/* Prepares the sample in place. Its mean: in double, in a fixed order. */
static vs_rc learn_mean(ivfpq_model *m, float *x, size_t n, vs_err *err) {
  enum { ROWS = 64 };
  double *sum = calloc(m->dim, sizeof *sum);
  float *part = malloc(m->dim * sizeof *part);
  for (size_t at = 0; at < n && sum && part; at += ROWS) { /* the mean is still zero here */
    uint32_t row[ROWS], rows = n - at < ROWS ? (uint32_t)(n - at) : ROWS;
    float *to = x + at * m->dim_padded;
    for (uint32_t r = 0; r < rows; r++) ivfpq_model_prepare(m, to + r * m->dim_padded, to + r * m->dim_padded), row[r] = r;
    kern_sum_rows_f32(to, m->dim_padded, row, rows, m->dim, part);
    for (uint32_t j = 0; j < m->dim; j++) sum[j] += part[j];
  }
  for (uint32_t j = 0; j < m->dim && sum && part; j++) m->mean[j] = (float)(sum[j] / (double)n);
  for (size_t i = 0; i < n; i++) kern_scale_sub_f32(x + i * m->dim_padded, 1, m->mean, m->dim, x + i * m->dim_padded);
  vs_rc rc = sum && part ? VS_OK : vs_nomem(err);
  free(sum), free(part);
  return rc;
}

/* Clusters the centroids themselves and puts them in the order of their groups. */
static vs_rc learn_groups(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) {
  size_t d = m->dim_padded, k = m->n_groups;
  ivfpq_kmeans km = {.x = m->centroids, .n = m->nlist, .stride = d, .dim = d, .k = k, .iterations = 8, .threads = p->threads,
                     .seed = p->seed + 1, .stop = p->stop, .stop_ctx = p->ctx};
  uint32_t *id = malloc(m->nlist * sizeof *id);
  float *copy = malloc(m->nlist * d * sizeof *copy);
  ivfpq_finder f = {.mem = NULL};
  vs_rc rc = id && copy ? ivfpq_kmeans_run(&km, m->group_centroids, err) : vs_nomem(err);
  if (!rc) rc = ivfpq_finder_open(&f, m->group_centroids, k, d, err);
  if (!rc) rc = ivfpq_finder_find_all(&f, m->centroids, m->nlist, d, 1, p->threads, p->stop, p->ctx, id, err);
  if (!rc) {
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
  ivfpq_finder_close(&f);
  free(id), free(copy);
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

/* gram = SUM x x' over n_x rows (an even choice of PROJECT_SAMPLE of them when there are more), d x d. */
static vs_rc gram_matrix(const float *x, size_t n_x, size_t d, float *gram, vs_err *err) {
  enum { BLOCK = 256, ROWS = 48 };
  size_t lanes = ivfpq_round(d, 16), n = n_x < PROJECT_SAMPLE ? n_x : PROJECT_SAMPLE;
  float *turned = malloc(d * BLOCK * 4), *packed = malloc(kern_packed_len(d, BLOCK) * 4), *zero = calloc(lanes, 4), *part = malloc(ROWS * lanes * 4);
  vs_rc rc = turned && packed && zero && part ? VS_OK : vs_nomem(err);
  memset(gram, 0, d * d * sizeof *gram);
  for (size_t first = 0; first < n && !rc; first += BLOCK) {
    for (size_t i = 0; i < BLOCK; i++) {
      const float *c = x + (size_t)((double)(first + i < n ? first + i : 0) * (double)n_x / (double)n) * d;
      for (size_t j = 0; j < d; j++) turned[j * BLOCK + i] = first + i < n ? c[j] : 0;
    }
    kern_pack_f32(turned, d, BLOCK, packed);
    for (size_t j = 0; j < d; j += ROWS) {
      size_t rows = d - j < ROWS ? d - j : ROWS;
      kern_get()->scores_many_f32(turned + j * BLOCK, rows, BLOCK, BLOCK, packed, zero, d, part, lanes);
      for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < d; i++) gram[(j + r) * d + i] += part[r * lanes + i];
    }
  }
  free(turned), free(packed), free(zero), free(part);
  return rc;
}

/* Gram-Schmidt; a direction that vanishes becomes zero. Their signs do not matter. */
static void orthonormalize(float *v, size_t n, size_t d) {
  const kern *k = kern_get();
  for (size_t u = 0; u < n; u++) {
    float *a = v + u * d;
    for (size_t w = 0; w < u; w++) kern_scale_sub_f32(v + w * d, k->dot_f32(a, v + w * d, d), a, d, a); /* minus what is left of a */
    float norm = sqrtf(k->dot_f32(a, a, d)), inv = norm > 1e-20f ? 1 / norm : 0;
    for (size_t j = 0; j < d; j++) a[j] *= inv;
  }
}

/* The n leading eigenvectors of gram by block power iteration, and their eigenvalues. */
static vs_rc leading_directions(const float *gram, size_t d, size_t n, const ivfpq_learn *p, uint64_t seed, float *v, float *value,
                                vs_err *err) {
  size_t lanes = ivfpq_round(d, 16);
  float *z = malloc(n * lanes * 4), *packed = malloc(kern_packed_len(d, d) * 4), *zero = calloc(lanes, 4);
  vs_rc rc = z && packed && zero ? VS_OK : vs_nomem(err);
  ivfpq_rng rng = {seed};
  if (!rc) kern_pack_f32(gram, d, d, packed);
  for (size_t i = 0; i < n * d && !rc; i++) v[i] = (float)(ivfpq_rng_next(&rng) >> 40) / 16777216.f - .5f;
  for (int t = 0; t <= PROJECT_ITERATIONS && !rc; t++) {
    orthonormalize(v, n, d);
    kern_get()->scores_many_f32(v, n, d, d, packed, zero, d, z, lanes);
    for (size_t u = 0; u < n; u++) value[u] = kern_get()->dot_f32(v + u * d, z + u * lanes, d);
    for (size_t u = 0; u < n && t < PROJECT_ITERATIONS; u++) memcpy(v + u * d, z + u * lanes, d * sizeof *v);
    if (p->stop && p->stop(p->ctx)) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  free(z), free(packed), free(zero);
  return rc;
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
  size_t d = m->dim_padded, lanes = ivfpq_round(d, 16), n = d / 2 / PROJECT_STEP * PROJECT_STEP;
  if (n > PROJECT_MAX) n = PROJECT_MAX;
  if (d < PROJECT_FROM || d > PROJECT_TO || m->nlist < PROJECT_NLIST || m->metric == IVFPQ_DOT) return VS_OK;
  float *v = malloc(n * d * 4), *value = malloc(n * 4), *gram = malloc(d * d * 4), *packed = malloc(kern_packed_len(n, d) * 4);
  float *zero = calloc(lanes, 4), *y = malloc(m->nlist * n * 4);
  vs_rc rc = v && value && gram && packed && zero && y ? gram_matrix(m->centroids, m->nlist, d, gram, err) : vs_nomem(err);
  if (!rc) rc = leading_directions(gram, d, n, p, p->seed + 2, v, value, err);
  if (!rc) {
    kern_pack_f32(v, n, d, packed);
    kern_get()->scores_many_f32(m->centroids, m->nlist, d, d, packed, zero, n, y, n);
    m->project = directions_needed(m, y, n);
    if (m->project) m->directions = v, v = NULL;
  }
  free(v), free(value), free(gram), free(packed), free(zero), free(y);
  return rc;
}

/* n rows (stride d) -> their coordinates in the codes' directions, side by side. out may be x: coordinates are fewer than dims. */
static void turn_many(const ivfpq_model *m, const float *x, size_t n, size_t d, float *out) {
  enum { ROWS = 16 };
  float part[ROWS * IVFPQ_MAX_TURN];
  static const float zero[IVFPQ_MAX_TURN + 16];
  size_t k = m->turn, lanes = ivfpq_round(k, 16);
  for (size_t i = 0; i < n; i += ROWS) {
    size_t rows = n - i < ROWS ? n - i : ROWS;
    kern_get()->scores_many_f32(x + i * d, rows, d, d, m->turned_packed, zero, k, part, lanes);
    for (size_t r = 0; r < rows; r++) memcpy(out + (i + r) * k, part + r * lanes, k * sizeof *out);
  }
}

/* Residuals, in place, by bytes: what these leave out is a hundredth of what codes do. Rows stay as they are when codes are of the
 * dimensions themselves. */
static vs_rc turn_rows(const ivfpq_model *m, float *x, size_t n, vs_err *err) {
  enum { ROWS = 64 };
  size_t d = m->dim_padded, k = m->turn, lanes = ivfpq_round(k, 16), coded = ivfpq_round(d, 4);
  if (!k) return VS_OK;
  int8_t *bytes = calloc(ROWS * coded + 64, 1);
  int32_t *score = malloc(ROWS * lanes * sizeof *score);
  for (size_t i = 0; i < n && bytes && score; i += ROWS) {
    size_t rows = n - i < ROWS ? n - i : ROWS;
    float step[ROWS];
    for (size_t r = 0; r < rows; r++) step[r] = kern_get()->quantize_i8(x + (i + r) * d, d, bytes + r * coded);
    kern_scores_i8(bytes, rows, coded, coded, m->turned_bytes, k, score, lanes);
    for (size_t r = 0; r < rows; r++)
      for (size_t j = 0; j < k; j++) x[(i + r) * k + j] = (float)score[r * lanes + j] * step[r] * m->turned_scale[j];
  }
  vs_rc rc = bytes && score ? VS_OK : vs_nomem(err);
  free(bytes), free(score);
  return rc;
}

const float *ivfpq_model_turned(const ivfpq_model *m, const float *x, float *out) {
  if (!m->turn) return x;
  turn_many(m, x, 1, m->dim_padded, out);
  return out;
}

static vs_rc learn_coarse(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) {
  size_t d = m->dim_padded;
  ivfpq_kmeans km = {.x = p->sample, .n = p->n, .stride = d, .dim = d, .k = m->nlist, .iterations = COARSE_ITERATIONS,
                     .threads = p->threads, .seed = p->seed, .stop = p->stop, .stop_ctx = p->ctx};
  vs_rc rc = ivfpq_kmeans_run(&km, m->centroids, err);
  if (!rc) rc = learn_groups(m, p, err);
  if (!rc) rc = round_rows(m->centroids, m->nlist, d, err);
  if (rc) return rc;
  ivfpq_half_norms(m->centroids, m->nlist, d, m->bias);
  rc = ivfpq_finder_open(&m->finder, m->centroids, m->nlist, d, err);
  return rc ? rc : learn_projection(m, p, err);
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
  ivfpq_kmeans km = {.x = w->x + j * m->sub_dim, .n = w->n, .stride = ivfpq_model_code_dim(m), .dim = m->sub_dim, .k = words,
                     .iterations = WORD_ITERATIONS, .threads = 1, .seed = w->p->seed + 100 + j};
  if (ivfpq_words_run(&km, m->words + j * size, NULL)) __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
}

/* One scale per code byte: with 4 bits two sub-quantizers share it, so that a table of their sums can be made of integers. */
static vs_rc round_words(ivfpq_model *m, vs_err *err) {
  size_t words = ivfpq_words(m->bits), size = words * m->sub_dim;
  vs_rc rc = round_rows(m->words, m->m, m->subs / m->m * size, err);
  if (!rc) kern_words_init(&m->coder, m->words, m->subs, words, m->sub_dim, m->coder_mem);
  return rc;
}

/* Deals directions out, the largest first, to the code byte whose product of variances is the smallest and that has room: then all
 * bytes have about as much to say (the parametric solution of Ge et al., Optimized Product Quantization, 2013). */
static vs_rc deal(const float *v, const float *value, size_t bytes, size_t each, size_t d, float *out, vs_err *err) {
  double *load = calloc(bytes, sizeof *load);
  size_t *used = calloc(bytes, sizeof *used), n = bytes * each;
  uint64_t *order = malloc(2 * n * sizeof *order);
  vs_rc rc = load && used && order ? VS_OK : vs_nomem(err);
  for (size_t u = 0; u < n && !rc; u++) order[u] = kern_key(-value[u], (uint32_t)u);
  if (!rc) kern_sort_u64(order, n, order + n);
  for (size_t i = 0; i < n && !rc; i++) {
    size_t u = kern_key_number(order[i]), to = bytes;
    for (size_t b = 0; b < bytes; b++)
      if (used[b] < each && (to == bytes || load[b] < load[to])) to = b;
    memcpy(out + (to * each + used[to]++) * d, v + u * d, d * sizeof *out);
    load[to] += log(value[u] > 1e-30f ? value[u] : 1e-30f);
  }
  free(load), free(used), free(order);
  return rc;
}

/* What follows from the directions. */
static vs_rc ready_turn(ivfpq_model *m, vs_err *err) {
  size_t d = m->dim_padded, coded = ivfpq_round(d, 4), words = ivfpq_words(m->bits);
  if (!m->turn) return VS_OK;
  free(m->coder_mem);
  m->coder_mem = malloc(kern_words_bytes(m->subs, words, m->sub_dim) + 1);
  m->turned_packed = malloc(kern_packed_len(m->turn, d) * 4), m->turned_centroids = malloc(m->nlist * (size_t)m->turn * 4);
  m->turned_bytes = malloc(ivfpq_round(m->turn, 16) * coded), m->turned_scale = malloc(m->turn * sizeof *m->turned_scale);
  int8_t *bytes = calloc(m->turn * coded + 1, 1);
  if (!m->coder_mem || !m->turned_packed || !m->turned_centroids || !m->turned_bytes || !m->turned_scale || !bytes) {
    free(bytes);
    return vs_nomem(err);
  }
  for (size_t u = 0; u < m->turn; u++) m->turned_scale[u] = kern_get()->quantize_i8(m->turned + u * d, d, bytes + u * coded);
  kern_pack_i8(bytes, m->turn, coded, m->turned_bytes);
  free(bytes);
  kern_pack_f32(m->turned, m->turn, d, m->turned_packed);
  turn_many(m, m->centroids, m->nlist, d, m->turned_centroids);
  return VS_OK;
}

/* Directions per code byte: two where these hold nearly all of the energy, four where these hold most of it, none where neither
 * does; fewer directions cost a query less. value: eigenvalues, falling but for what the iteration left undone. */
static size_t turn_width(const float *value, size_t bytes, size_t width, double all) {
  double kept = 0;
  for (size_t u = 0; u < bytes * width; u++) {
    kept += value[u];
    if (u + 1 == 2 * bytes && kept >= TURN_SLIM_ENERGY * all) return 2;
  }
  return width == 4 && kept >= TURN_ENERGY * all ? 4 : 0;
}

/* Principal directions of the residuals, where so few of them hold most of their energy that codes of them leave out less than codes
 * of all dimensions do, and cost a query no more than the wider words would.
 *
 * Measured at equal bytes, as the share of the true 10 among the best 20, 30 and 50 by estimate (float tables): a set of 128 dims made
 * from 48 .881/.937/.980 -> .985/.996/.999, image descriptors (128) .882/.944/.981 -> .920/.970/.995, images of letters (784)
 * .977/.992/.998 -> .996/.998/.999. Word vectors (304), whose spectrum is flat, lose with half of the directions: .963 -> .926.
 * Tried and left: iterations of OPQ behind these directions (-.007 to +.008), random and Hadamard rotations (-.05 to -.07 on images:
 * they mix what lies in order), codes of rows instead of residuals (.881 -> .600, .875 -> .784), 4-bit codes of twice as many
 * sub-quantizers (-.027 to -.080 on six sets). A second list per row (Sun et al., SOAR, 2023) saved 22 to 27 % of the rows scanned
 * on word vectors, where twice the lists save 38 %, and nothing on image descriptors, at twice the bytes of codes. */
static vs_rc learn_turn(ivfpq_model *m, const ivfpq_learn *p, const float *x, size_t n, vs_err *err) {
  size_t d = m->dim_padded, most = TURN_COST * 256 * (double)d / (double)(d + 256), width = m->m * 4 <= most ? 4 : 2, k = m->m * width;
  if (d > PROJECT_TO || k >= d || k > most || k > IVFPQ_MAX_TURN || n < TURN_ROWS * d) return VS_OK;
  float *v = malloc(k * d * 4), *value = malloc(k * 4), *gram = malloc(d * d * 4);
  vs_rc rc = v && value && gram ? gram_matrix(x, n, d, gram, err) : vs_nomem(err);
  if (!rc) rc = leading_directions(gram, d, k, p, p->seed + 3, v, value, err);
  double all = 0;
  for (size_t j = 0; j < d && !rc; j++) all += gram[j * d + j];
  width = rc || !(all < 1e30) ? 0 : turn_width(value, m->m, width, all), k = m->m * width;
  if (k && !(m->turned = malloc(k * d * 4))) rc = vs_nomem(err);
  if (!rc && k) rc = deal(v, value, m->m, width, d, m->turned, err);
  if (!rc && k) rc = round_rows(m->turned, k, d, err);
  if (!rc && k) {
    m->turn = (uint32_t)k, m->sub_dim = (uint32_t)(k / m->subs);
    rc = ready_turn(m, err);
  }
  free(v), free(value), free(gram);
  return rc;
}

/* Code words learn from residuals. */
static vs_rc learn_words(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) {
  float *x = p->sample;
  size_t n = p->n < WORD_SAMPLE ? p->n : WORD_SAMPLE, d = m->dim_padded;
  uint32_t *id = malloc(n * sizeof *id + 1);
  if (!id) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) { /* evenly over the sample; rows move forward only, so nothing is overwritten early */
    size_t from = (size_t)((double)i * (double)p->n / (double)n);
    if (from != i) memcpy(x + i * d, x + from * d, d * sizeof *x);
  }
  vs_rc rc = ivfpq_finder_find_all(&m->finder, x, n, d, 1, p->threads, p->stop, p->ctx, id, err);
  for (size_t i = 0; i < n && !rc; i++) kern_scale_sub_f32(x + i * d, 1, m->centroids + id[i] * d, d, x + i * d);
  free(id);
  if (!rc) rc = learn_turn(m, p, x, n, err);
  if (!rc) rc = turn_rows(m, x, n, err);
  if (rc) return rc;
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
  m->bias = calloc(lanes + 16, 4);
  m->group_first = calloc(m->n_groups + 1, 4);
  m->group_centroids = calloc(m->n_groups * d + 1, 4);
  m->words = calloc(words * m->sub_dim + 1, 4);
  m->coder_mem = malloc(kern_words_bytes(m->subs, ivfpq_words(m->bits ? m->bits : 1), m->sub_dim) + 1);
  return m->mean && m->centroids && m->bias && m->group_first && m->group_centroids && m->words && m->coder_mem ? VS_OK : vs_nomem(err);
}

uint32_t ivfpq_default_groups(uint32_t nlist) { return nlist < GROUPS_FROM ? 1 : (uint32_t)ceil(sqrt(nlist)); }

vs_rc ivfpq_model_learn(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) {
  m->n_groups = ivfpq_default_groups(m->nlist);
  vs_rc rc = allocate(m, err);
  if (rc || !m->m) {
    if (!rc) m->group_first[1] = m->nlist;
    return rc;
  }
  if ((rc = learn_mean(m, p->sample, p->n, err))) return rc;
  if (p->progress) p->progress(p->ctx, "train centroids", 0, 1);
  if ((rc = learn_coarse(m, p, err))) return rc;
  if (p->progress) p->progress(p->ctx, "train centroids", 1, 1);
  return learn_words(m, p, err);
}

void ivfpq_model_reset(ivfpq_model *m) {
  free(m->mean), free(m->centroids), free(m->bias), free(m->group_first), free(m->group_centroids);
  free(m->words), free(m->coder_mem), free(m->directions), free(m->turned), free(m->turned_packed), free(m->turned_centroids);
  free(m->turned_bytes), free(m->turned_scale);
  ivfpq_finder_close(&m->finder);
  memset(m, 0, sizeof *m);
}

/* What was learned; the rest of a model follows from it. */
void ivfpq_model_save(const ivfpq_model *m, ivfpq_state *s) {
  size_t d = m->dim_padded;
  uint32_t head[] = {m->metric, m->dim, m->dim_padded, m->nlist, m->bits, m->m, m->n_groups, m->project, m->turn};
  ivfpq_state_put(s, head, sizeof head);
  ivfpq_state_put(s, m->mean, d * 4);
  ivfpq_state_put(s, m->centroids, m->nlist * d * 4);
  ivfpq_state_put(s, m->group_first, ((size_t)m->n_groups + 1) * 4);
  ivfpq_state_put(s, m->group_centroids, m->n_groups * d * 4);
  if (m->m) ivfpq_state_put(s, m->words, (size_t)m->subs * ivfpq_words(m->bits) * m->sub_dim * 4);
  ivfpq_state_put(s, m->directions, m->project * d * 4);
  ivfpq_state_put(s, m->turned, m->turn * d * 4);
}

vs_rc ivfpq_model_load(ivfpq_model *m, ivfpq_state *s, vs_err *err) {
  size_t d = m->dim_padded;
  uint32_t head[9], same[] = {m->metric, m->dim, m->dim_padded, m->nlist, m->bits, m->m};
  ivfpq_state_get(s, head, sizeof head);
  if (memcmp(head, same, sizeof same) || head[6] < 1 || head[6] > m->nlist || head[7] > PROJECT_MAX ||
      (head[8] && (head[8] % m->subs || head[8] >= d || head[8] > IVFPQ_MAX_TURN)))
    return vs_corrupt(err, "the kept model is of another shape");
  m->n_groups = head[6];
  vs_rc rc = allocate(m, err);
  if (!rc && head[7] && !(m->directions = malloc(head[7] * d * 4))) rc = vs_nomem(err);
  if (!rc && head[8] && !(m->turned = malloc(head[8] * d * 4))) rc = vs_nomem(err);
  if (rc) return rc;
  m->project = head[7], m->turn = head[8];
  if (m->turn) m->sub_dim = m->turn / m->subs;
  ivfpq_state_get(s, m->mean, d * 4);
  ivfpq_state_get(s, m->centroids, m->nlist * d * 4);
  ivfpq_state_get(s, m->group_first, ((size_t)m->n_groups + 1) * 4);
  ivfpq_state_get(s, m->group_centroids, m->n_groups * d * 4);
  if (m->m) ivfpq_state_get(s, m->words, (size_t)m->subs * ivfpq_words(m->bits) * m->sub_dim * 4);
  ivfpq_state_get(s, m->directions, m->project * d * 4);
  ivfpq_state_get(s, m->turned, m->turn * d * 4);
  for (uint32_t g = 0; g < m->n_groups; g++)
    if (m->group_first[g] > m->group_first[g + 1]) return vs_corrupt(err, "the kept model's groups overlap");
  if (m->group_first[0] || m->group_first[m->n_groups] != m->nlist) return vs_corrupt(err, "the kept model's groups have gaps");
  if (!m->m) return VS_OK;
  if ((rc = ready_turn(m, err))) return rc;
  kern_words_init(&m->coder, m->words, m->subs, ivfpq_words(m->bits), m->sub_dim, m->coder_mem);
  ivfpq_half_norms(m->centroids, m->nlist, d, m->bias);
  return ivfpq_finder_open(&m->finder, m->centroids, m->nlist, d, err);
}

vs_rc ivfpq_model_assign(const ivfpq_model *m, const float *x, size_t n, uint32_t *centroid, vs_err *err) {
  return ivfpq_finder_find(&m->finder, x, n, m->dim_padded, 1, centroid, err);
}

/* The squared error of a row's image by words, and what the image has in common with c. Words are put side by side for the kernels;
 * wider ones than PART lie so already. */
static void measure_image(const ivfpq_model *m, const uint8_t *id, const float *r, const float *c, float *e2, float *cr) {
  enum { PART = 1024 };
  const kern *k = kern_get();
  size_t ds = m->sub_dim, size = ivfpq_words(m->bits) * ds;
  float image[PART];
  *e2 = *cr = 0;
  for (size_t j = 0; j < m->subs;) {
    const float *w = m->words + j * size + id[j] * ds;
    size_t at = j * ds, len = ds;
    if (ds <= PART) {
      for (len = 0; j < m->subs && len + ds <= PART; j++, len += ds) {
        w = m->words + j * size + id[j] * ds;
        if (ds == 8) memcpy(image + len, w, 32);
        else if (ds == 16) memcpy(image + len, w, 64);
        else memcpy(image + len, w, ds * sizeof *w);
      }
      w = image;
    } else j++;
    *e2 += k->l2sq_f32(r + at, w, len);
    *cr += k->dot_f32(w, c + at, len);
  }
}

/* r: what the codes are of; rr = |residual|^2, cx = residual . c. c: the centroid as the codes see it. */
static void encode_row(const ivfpq_model *m, const uint8_t *id, const float *r, const float *c, float bias, float rr, float cx,
                       float *term, float *err2) {
  float e2, cr;
  measure_image(m, id, r, c, &e2, &cr);
  if (m->turn) { /* what lies outside of the directions is an error, too */
    float rest = rr - kern_get()->dot_f32(r, r, m->turn);
    e2 += rest > 0 ? rest : 0;
  }
  if (m->metric != IVFPQ_DOT) {
    *term = rr + 2 * cr, *err2 = e2;
    return;
  }
  float norm2 = rr + 2 * cx - 2 * bias; /* |c + r|^2 */
  float inv = norm2 > 1e-30f ? 1 / sqrtf(norm2) : 0;
  *term = -2 * (cx - cr) * inv, *err2 = e2 * inv;
}

vs_rc ivfpq_model_encode(const ivfpq_model *m, float *x, size_t n, const uint32_t *centroid, uint8_t *codes, float *terms, float *err2,
                         vs_err *err) {
  enum { ROWS = 16 };
  const kern *k = kern_get();
  size_t d = m->dim_padded, dc = ivfpq_model_code_dim(m);
  uint8_t id[ROWS * 2 * IVFPQ_MAX_M];
  for (size_t i = 0; i < n; i++) {
    const float *c = m->centroids + centroid[i] * d;
    float *r = x + i * d;
    kern_scale_sub_f32(r, 1, c, d, r);
    terms[i] = k->dot_f32(r, r, d), err2[i] = m->metric == IVFPQ_DOT ? k->dot_f32(r, c, d) : 0;
  }
  vs_rc rc = turn_rows(m, x, n, err);
  if (rc) return rc;
  if (m->bits == 8) kern_words_find(&m->coder, x, n, dc, codes, m->m);
  for (size_t i = 0; i < n; i++, codes += m->m) {
    const uint8_t *row_id = codes;
    if (m->bits == 4) {
      if (i % ROWS == 0) kern_words_find(&m->coder, x + i * dc, n - i < ROWS ? n - i : ROWS, dc, id, m->subs);
      row_id = id + i % ROWS * m->subs;
      for (size_t j = 0; j < m->m; j++) codes[j] = (uint8_t)(row_id[2 * j] | row_id[2 * j + 1] << 4);
    }
    const float *c = m->turn ? m->turned_centroids + (size_t)centroid[i] * dc : m->centroids + centroid[i] * d;
    encode_row(m, row_id, x + i * dc, c, m->bias[centroid[i]], terms[i], err2[i], terms + i, err2 + i);
  }
  return VS_OK;
}
