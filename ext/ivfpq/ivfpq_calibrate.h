/* ivfpq_calibrate.h - a build measures the recall of what it builds.
 *
 * Some rows of the sample are queries: while all rows stream by, the nearest others of each are kept, by true distance. From them
 * come beta, and, once the segment can be searched, which settings give which recall.
 */
#ifndef IVFPQ_CALIBRATE_H
#define IVFPQ_CALIBRATE_H
#include "ivfpq_model.h"
#include "ivfpq_segment.h"

/* What a search costs, in nanoseconds of one core: measured on sets of 128 and 960 dimensions. */
#define IVFPQ_ROW_NS(m) (.3 + .06 * ((m) + 2))            /* a row scanned */
#define IVFPQ_PART_NS 60.                                 /* a partition probed */
#define IVFPQ_CANDIDATE_NS(bytes) (60 + .05 * (bytes))    /* a candidate compared by so many bytes */

typedef struct ivfpq_truth ivfpq_truth;

/* The betas that are tried, 0 to 2 in steps of an eighth, and the place of the one that is taken when nothing can be measured. */
enum { IVFPQ_BETAS = 17, IVFPQ_USUAL_BETA = 12 };
static inline float ivfpq_beta(size_t i) { return (float)i / 8; }

/* Takes n rows of `dim` raw floats as queries, evenly from `sample`; their places in the input are in seq. */
vs_rc ivfpq_truth_open(const ivfpq_model *m, const float *sample, const uint64_t *seq, size_t n_sample, ivfpq_truth **out,
                       vs_err *err) VS_WARN_UNUSED;
void ivfpq_truth_close(ivfpq_truth *t); /* NULL is legal */
/* What a truth (NULL is legal) has seen so far, in a state file, and back. */
void ivfpq_truth_save(const ivfpq_truth *t, ivfpq_state *s);
vs_rc ivfpq_truth_load(const ivfpq_model *m, ivfpq_state *s, ivfpq_truth **out, vs_err *err) VS_WARN_UNUSED;

/* Shows n <= 256 rows before they are encoded (x: prepared, dim_padded apart), then, once they are, what their codes say:
 * threads may call it at once. The result does not depend on the order of the calls. */
typedef struct ivfpq_near ivfpq_near;
vs_rc ivfpq_truth_see(ivfpq_truth *t, const float *x, size_t n, const uint64_t *seq, ivfpq_near **near, vs_err *err) VS_WARN_UNUSED;
/* residuals: the rows minus their centroids; err2: |e|^2 of each as the term scales it; base_term: the term at beta 0. Frees near. */
vs_rc ivfpq_truth_add(ivfpq_truth *t, ivfpq_near *near, const uint8_t *codes, const uint32_t *centroid, const float *base_term,
                      const float *err2, vs_err *err) VS_WARN_UNUSED;

/* The place of the beta under which estimates put the true neighbours first. */
size_t ivfpq_truth_beta(ivfpq_truth *t);

/* Says which row of the segment a row of the input became. */
void ivfpq_truth_place(ivfpq_truth *t, uint64_t seq, uint32_t row);

/* Measures the segment: *out gets *n bytes of calibration (see ivfpq_setting.h), malloc'ed. */
vs_rc ivfpq_truth_measure(ivfpq_truth *t, ivfpq_segment *s, int threads, ivfpq_stop stop, void *stop_ctx, uint8_t **out, uint32_t *n,
                          vs_err *err) VS_WARN_UNUSED;

#endif
