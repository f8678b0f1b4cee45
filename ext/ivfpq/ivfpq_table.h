/* ivfpq_table.h - a query as a scan needs it: in the model's space, as bytes, and as a table of code distances. */
#ifndef IVFPQ_TABLE_H
#define IVFPQ_TABLE_H
#include "ivfpq_segment.h"

typedef struct ivfpq_table {
  float *x;              /* the query in the model's space, zeros behind dim_padded */
  int8_t *bytes;         /* the same in steps of `step8`, coded dims */
  int8_t *by_code;       /* the same, laid out for the codebook: m x table_dim */
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

#endif
