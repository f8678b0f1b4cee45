/* ivfpq_calibrate.h - measures what settings give which recall, on a segment that can be searched. */
#ifndef IVFPQ_CALIBRATE_H
#define IVFPQ_CALIBRATE_H
#include "ivfpq_segment.h"
#include "ivfpq_truth.h"

/* What a search costs, in nanoseconds of one core: measured on sets of 128 and 960 dimensions. */
#define IVFPQ_ROW_NS(m) (.3 + .06 * ((m) + 2))            /* a row scanned */
#define IVFPQ_PART_NS 60.                                 /* a partition probed */
#define IVFPQ_CANDIDATE_NS(bytes) (60 + .05 * (bytes))    /* a candidate compared by so many bytes */

/* The truth knows its rows' places. *out gets *n bytes of calibration (see ivfpq_setting.h), malloc'ed; none when there is nothing
 * to measure with. */
vs_rc ivfpq_calibrate(ivfpq_truth *t, ivfpq_segment *s, int threads, ivfpq_stop stop, void *stop_ctx, uint8_t **out, uint32_t *n,
                      vs_err *err) VS_WARN_UNUSED;

#endif
