/* ivfpq_model.h - what training learns, and how rows are turned into codes with it. */
#ifndef IVFPQ_MODEL_H
#define IVFPQ_MODEL_H
#include "ivfpq_int.h"
#include "ivfpq_state.h"

typedef struct ivfpq_model {
  ivfpq_metric metric;
  uint32_t dim, dim_padded, nlist, n_groups, bits, subs, sub_dim, m; /* m: code bytes; 0 when flat */
  float beta;
  float *mean;            /* dim_padded */
  float *centroids;       /* nlist x dim_padded, ordered by group; what 8 bits per element can say */
  float *bias;            /* of the centroids: -|c|^2/2 for every metric: rows go to the nearest one */
  ivfpq_finder finder;    /* of the centroids */
  uint32_t *group_first;  /* n_groups + 1 */
  float *group_centroids; /* n_groups x dim_padded */
  uint32_t turn;          /* directions that codes are of, subs x sub_dim; 0: codes are of the dimensions as they are */
  float *turned;          /* turn x dim_padded, about orthonormal; what 8 bits per element can say */
  float *turned_packed;   /* the same for scores_f32, */
  uint8_t *turned_bytes;  /* for scores_i8, */
  float *turned_scale;    /* and what a byte of each is */
  float *turned_centroids; /* nlist x turn */
  float *words;           /* subs x words x sub_dim; what 8 bits per element can say */
  uint32_t project;       /* directions that rank the centroids; 0: none pay */
  float *directions;      /* project x dim_padded, orthonormal */
  kern_words coder;       /* of the words */
  void *coder_mem;
} ivfpq_model;

typedef struct ivfpq_learn {
  float *sample;          /* n raw rows, dim_padded apart; is overwritten (that saves a copy) */
  size_t n;
  uint64_t seed;
  int threads;
  ivfpq_stop stop;
  void *ctx;
  void (*progress)(void *ctx, const char *stage, uint64_t done, uint64_t total);
} ivfpq_learn;

/* Groups of so many partitions (fewer when some turn out empty). */
uint32_t ivfpq_default_groups(uint32_t nlist);
/* Fills a model whose scalars are set. A flat model needs no sample. */
vs_rc ivfpq_model_learn(ivfpq_model *m, const ivfpq_learn *p, vs_err *err) VS_WARN_UNUSED;
void ivfpq_model_reset(ivfpq_model *m);

/* A learned model in a state file, and back into one whose scalars are set as for learning. */
void ivfpq_model_save(const ivfpq_model *m, ivfpq_state *s);
vs_rc ivfpq_model_load(ivfpq_model *m, ivfpq_state *s, vs_err *err) VS_WARN_UNUSED;

/* Raw row -> the space of the model: normalised for cosine, mean subtracted, zero padded. out may be x. */
void ivfpq_model_prepare(const ivfpq_model *m, const float *x, float *out);
/* What codes are of: a prepared row or residual itself, or out with its coordinates in the codes' directions. */
const float *ivfpq_model_turned(const ivfpq_model *m, const float *x, float *out);
static inline uint32_t ivfpq_model_code_dim(const ivfpq_model *m) { return m->turn ? m->turn : m->dim_padded; }
/* The partitions of n prepared rows (stride dim_padded), exactly. KERN_NEAREST_ROWS at a time is the fastest. */
vs_rc ivfpq_model_assign(const ivfpq_model *m, const float *x, size_t n, uint32_t *centroid, vs_err *err) VS_WARN_UNUSED;
/* n <= 256 prepared rows (stride dim_padded, overwritten by their residuals) -> code bytes (m each), terms at beta 0, and what
 * is taken off times beta. */
vs_rc ivfpq_model_encode(const ivfpq_model *m, float *x, size_t n, const uint32_t *centroid, uint8_t *codes, float *terms, float *err2,
                         vs_err *err) VS_WARN_UNUSED;

#endif
