/* ivfpq_sketch.h - rows as bytes: a quarter of a stored vector decides that most candidates need no look at the rest. */
#ifndef IVFPQ_SKETCH_H
#define IVFPQ_SKETCH_H
#include "ivfpq_segment.h"

/* Estimates far sharper than those of codes, on the same scale, of rows of a segment with mapped sketches: the true value lies
 * within est[i] +- width[i]. query: params.dim floats. */
vs_rc ivfpq_sketch_estimate(ivfpq_segment *s, const float *query, const uint32_t *rows, size_t n, float *est, float *width,
                            vs_err *err) VS_WARN_UNUSED;
/* The same piece by piece, for many queries: a query against one record after another. */
typedef struct ivfpq_sketch_query {
  int8_t *bytes, *fine;      /* two planes of coded dims: fine is what the first plane left */
  float step, fine_step;
  float norm, qq, constant;  /* |x|, |x|^2 (0 for dot), what dot adds for the mean */
} ivfpq_sketch_query;
/* x: scratch of coded dims + 16 floats, zeros behind dim. bytes and fine have room for coded dims rounded up to 64. */
void ivfpq_sketch_query_make(const ivfpq_segment *s, const float *query, float *x, ivfpq_sketch_query *out);
void ivfpq_sketch_compare(const ivfpq_segment *s, const ivfpq_sketch_query *q, const uint8_t *record, float *est, float *width);

static inline int ivfpq_sketches_mapped(const ivfpq_segment *s) { return s->mapped_sketches != NULL; }

/* A row in the model's space (params.dim_padded floats) -> its sketch record of ivfpq_sketch_bytes. q: scratch of so many bytes. */
void ivfpq_sketch_make(ivfpq_metric metric, const float *x, uint32_t dim_padded, uint8_t *record, int8_t *q);
static inline uint32_t ivfpq_sketch_bytes(uint32_t coded_dim) { return coded_dim + 12; }

/* Bytes of a stored vector from which on a sketch of a quarter of that saves more reading than it costs space. With rows of 512 bytes
 * (1,000,000 x 128) a search took 97 to 101 % of its time without them. */
enum { IVFPQ_SKETCH_FROM = 1024 };
/* What a build gives such a segment: ivfpq_sketch_bytes or 0. */
static inline uint32_t ivfpq_default_sketch(const ivfpq_params *p) {
  return p->m && p->dim * (p->store ? 2u : 4u) >= IVFPQ_SKETCH_FROM ? ivfpq_sketch_bytes(ivfpq_coded_dim(p)) : 0;
}

#endif
