/* ivfpq_table.h - a query as a scan needs it: in the model's space, as bytes, and as a table of code distances. */
#ifndef IVFPQ_TABLE_H
#define IVFPQ_TABLE_H
#include <math.h>

#include "ivfpq_segment.h"

typedef struct ivfpq_table {
  float *x;              /* the query in the model's space, zeros behind dim_padded */
  int8_t *bytes;         /* the same in steps of `step8`, coded dims */
  int8_t *by_code;       /* what the codes are of, laid out for the codebook: m x table_dim */
  int32_t *turn_score;   /* the query along the codes' directions: products of bytes, */
  float *turned;         /* what they say, */
  int8_t *turned8;       /* and that as bytes */
  float turned_step;     /* their step; 0: ivfpq_table_make has still to find them */
  float step8;
  float qq, constant;    /* |x|^2 for l2 and cosine; what dot adds for the mean */
  float term_scale;      /* what stored terms are multiplied with: 1, for dot |query - mean| */
  float *raw, *low, *factor;
  uint8_t *table;        /* m x 256 */
  float min_sum, step;   /* an estimate is base + step * sum, base holding min_sum */
  uint16_t term_mul;
} ivfpq_table;

vs_rc ivfpq_table_allocate(const ivfpq_params *p, ivfpq_table *t, vs_err *err) VS_WARN_UNUSED;
void ivfpq_table_reset(ivfpq_table *t);

/* Takes a query of params.dim floats: x, bytes, qq, constant. */
void ivfpq_table_query(const ivfpq_segment *s, const float *query, ivfpq_table *t);
/* Makes the table; needs the codebook. */
void ivfpq_table_make(const ivfpq_segment *s, ivfpq_table *t);

/* What the estimates of a partition at coarse distance d start from. */
static inline float ivfpq_table_base(const ivfpq_segment *s, const ivfpq_table *t, float d) {
  return d + t->constant + t->min_sum + s->params.term0 * t->term_scale;
}

/* How far a partition at coarse distance d lies beyond an estimate E, and which d lies so far: a scan ends at the first partition beyond
 * its reach (query-aware pruning as in SPANN, Chen et al. 2021, but against estimates). Squared distances: (d - 3/4 E) / sqrt(E), about
 * the distance that a row lies on this side of its centroid. At equal recall that scans 10 to 40 % fewer rows than the ratio d / E
 * (1,000,000 x 128, 300,000 x 960, real sets of 128, 300 and 784 dimensions); with all of E it is negative for text embeddings.
 * Products, which may be negative: the difference in units of |query - mean|. */
#define IVFPQ_REACH_PART .75f
static inline float ivfpq_table_beyond(const ivfpq_segment *s, const ivfpq_table *t, float d, float estimate) {
  if (s->params.metric == IVFPQ_DOT) return t->term_scale > 0 ? (d + t->constant - estimate) / t->term_scale : 0;
  return estimate > 0 ? (d - IVFPQ_REACH_PART * estimate) / sqrtf(estimate) : d > 0 ? INFINITY : 0;
}
static inline float ivfpq_table_reach(const ivfpq_segment *s, const ivfpq_table *t, float reach, float estimate) {
  if (s->params.metric == IVFPQ_DOT) return estimate - t->constant + reach * t->term_scale;
  return estimate > 0 ? IVFPQ_REACH_PART * estimate + reach * sqrtf(estimate) : 0;
}

#endif
