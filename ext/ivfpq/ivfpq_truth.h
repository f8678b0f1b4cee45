/* ivfpq_truth.h - while a build streams its rows: the true nearest rows of some of them, so that it can measure what it builds.
 *
 * Some rows of the sample are queries; of all rows that pass by, each keeps the nearest others by true distance, with what their
 * codes say of them. From these comes beta; where the rows end up in the segment tells, later, which settings find them.
 */
#ifndef IVFPQ_TRUTH_H
#define IVFPQ_TRUTH_H
#include <pthread.h>

#include "ivfpq_model.h"

enum {
  IVFPQ_TRUE = 100,       /* nearest rows of a query that count for recall */
  IVFPQ_NEAR = 256,       /* that are kept with their codes: the others compete with them */
  IVFPQ_DEEP_EVERY = 8,   /* one query of so many is deep: it keeps far more rows, without codes */
  IVFPQ_DEEP = 10000
};

/* The betas that are tried, 0 to 2 in steps of an eighth, and the place of the one that is taken when nothing can be measured. */
enum { IVFPQ_BETAS = 17, IVFPQ_USUAL_BETA = 12 };
static inline float ivfpq_beta(size_t i) { return (float)i / 8; }

typedef struct ivfpq_truth_query {
  float qq, norm, term_scale; /* |x|^2 for l2 and cosine; |x|; what terms are multiplied with */
  float near_limit, limit;    /* distances beyond which no row counts: with its codes; at all */
  uint32_t seq;               /* in the input */
  uint32_t n_near, n_deep;
  uint64_t *deep;             /* kern_key(distance, number in the input); NULL: not deep */
  /* once all rows were seen */
  uint32_t n_rows, *rows;     /* nearest first, of the segment; UINT32_MAX: it holds no such row. rows[-1] is the query itself */
} ivfpq_truth_query;

typedef struct ivfpq_truth {
  const ivfpq_model *m;
  size_t n, coded, stride;    /* queries; bytes of a row as bytes, a multiple of 4; bytes of a neighbour */
  uint32_t n_deep;            /* rows that a deep query keeps; 0: none is deep */
  float *raw, *x;             /* n x dim, n x dim_padded */
  uint8_t *packed;            /* the queries as bytes */
  float *scale;               /* of those */
  ivfpq_truth_query *queries;
  uint8_t *near;              /* neighbours: see ivfpq_truth.c */
  uint64_t *deep, *scratch;
  pthread_mutex_t lock;       /* queries, near and deep, while threads add */
  uint64_t *places;           /* (number in the input, place in `rows`), ascending, once all rows were seen */
  uint32_t *rows;
  size_t n_places;
  uint64_t *filter;           /* bits of hashed numbers: most rows are none of them */
} ivfpq_truth;

enum { IVFPQ_TRUTH_SAMPLE = 16384 }; /* rows that open looks at, at most */
/* Takes queries evenly from n_sample raw rows, whose places in the input are in seq; n_rows will stream by. *out is NULL when the
 * sample is too small. */
vs_rc ivfpq_truth_open(const ivfpq_model *m, const float *sample, const uint64_t *seq, size_t n_sample, uint64_t n_rows,
                       ivfpq_truth **out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_truth_close(ivfpq_truth *t); /* NULL is legal */
/* What a truth (NULL is legal) has seen so far, in a state file, and back. */
void ivfpq_truth_save(const ivfpq_truth *t, ivfpq_state *s);
vs_rc ivfpq_truth_load(const ivfpq_model *m, ivfpq_state *s, ivfpq_truth **out, vs_err *err) VS_WARN_UNUSED;

/* Shows n <= 256 rows before they are encoded (x: prepared, dim_padded apart; seq UINT64_MAX: not to be looked at), then, once they
 * are, what their codes say: threads may call it at once, what is kept does not depend on the order. */
typedef struct ivfpq_near ivfpq_near;
vs_rc ivfpq_truth_see(const ivfpq_truth *t, const float *x, size_t n, const uint64_t *seq, ivfpq_near **near,
                      vs_err *err) VS_WARN_UNUSED;
/* terms: at beta 0; err2: |e|^2 of each as the term scales it. Frees near. */
void ivfpq_truth_add(ivfpq_truth *t, ivfpq_near *near, const uint8_t *codes, const uint32_t *centroid, const float *terms,
                     const float *err2);

/* All rows were seen. The place of the beta under which estimates put the true neighbours first. */
vs_rc ivfpq_truth_beta(ivfpq_truth *t, size_t *beta, vs_err *err) VS_WARN_UNUSED;

/* Says which row of the segment a row of the input became. */
void ivfpq_truth_place(ivfpq_truth *t, uint64_t seq, uint32_t row);

#endif
