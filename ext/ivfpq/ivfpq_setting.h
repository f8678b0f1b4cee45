/* ivfpq_setting.h - what a segment learned about its own recall: settings that reach it, and how far a search must look.
 *
 * Calibration is stored behind the group table of PARAMS, calibration_bytes of it: ivfpq_calibration, n_reach ivfpq_reach, then for
 * each k of ivfpq_calibration.k n_levels ivfpq_level, ascending by recall. How it is measured: ivfpq_calibrate.c.
 */
#ifndef IVFPQ_SETTING_H
#define IVFPQ_SETTING_H
#include "ivfpq_segment.h"

/* What a search of one segment may spend. */
typedef struct ivfpq_setting {
  uint32_t nprobe;
  uint64_t n_candidates;
  float reach;           /* 0: every one of the nprobe partitions */
} ivfpq_setting;

/* The cheapest setting whose mean recall@k was r or more on held-out rows. 0: there is none (no calibration, or it never reached r):
 * only an exact search is sure. */
int ivfpq_setting_for(const ivfpq_segment *s, uint64_t k, double recall, ivfpq_setting *out);

/* The reach that costs at most a small part of what nprobe partitions miss anyway; 0 when unknown. */
float ivfpq_reach_for(const ivfpq_segment *s, uint32_t nprobe);

#endif
