/* ivfpq_profile.h - what one search tells about all settings at once: which recall a query has with so many partitions, that reach,
 * that many candidates. Used by ivfpq_calibrate.c alone.
 */
#ifndef IVFPQ_PROFILE_H
#define IVFPQ_PROFILE_H
#include "ivfpq_segment.h"
#include "ivfpq_truth.h"

enum {
  IVFPQ_TRUE_CURVES = 3,         /* k up to IVFPQ_TRUE: every query serves them, the others deep ones only */
  IVFPQ_RANKED = 1000,           /* k of the first of these */
  IVFPQ_PROFILE_CANDIDATES = 4096, /* that a search keeps */
  IVFPQ_DEEP_CANDIDATES = 16384, /* of a deep one */
  IVFPQ_PROFILE_PROBES = 48,     /* numbers of partitions at most */
  IVFPQ_PROFILE_MOST = 2048,     /* the largest */
  IVFPQ_REACHES = 15             /* that are tried; the last is 0: every partition */
};
extern const uint32_t ivfpq_curve_k[IVFPQ_CURVES];

/* How a segment is looked at. */
typedef struct ivfpq_profiler {
  const ivfpq_truth *t;
  ivfpq_segment *s;
  uint32_t probes[IVFPQ_PROFILE_PROBES]; /* numbers of partitions, ascending; the last is the most */
  size_t n_probes, n_true_probes;        /* of them for searches that are not deep */
  uint8_t level[IVFPQ_PROFILE_MOST + 1]; /* the place of the first number of partitions that is n or more */
} ivfpq_profiler;

typedef struct ivfpq_profile {
  uint32_t n_true, n_parts;
  uint32_t part[IVFPQ_TRUE];    /* of the true neighbours, nearest first: the how many-th; UINT32_MAX: never */
  uint16_t need[IVFPQ_TRUE][IVFPQ_PROFILE_PROBES]; /* candidates to be kept that keep it, of so many partitions */
  uint32_t *rows;               /* scanned so far, n_parts */
  float *beyond[IVFPQ_CURVES];  /* n_parts: the reach that leads past it, the greatest so far. NULL for curves that it does not serve */
  uint32_t *inside[IVFPQ_CURVES]; /* n_parts + 1, of a deep one: how many of its k nearest lie in the first so many partitions */
  uint32_t n_inside[IVFPQ_CURVES]; /* of how many that are there; 0: not k of them are known */
  uint16_t rank[IVFPQ_RANKED];  /* of a deep one: where its nearest stand by estimate, from 1; 0: behind all that were kept */
  uint32_t limit[IVFPQ_CURVES][IVFPQ_REACHES]; /* partitions within each reach: filled by the user */
} ivfpq_profile;

/* Searches with a query of the truth. A deep one sees more partitions, for the curves beyond IVFPQ_TRUE_CURVES, too. */
vs_rc ivfpq_profile_make(const ivfpq_profiler *x, size_t query, ivfpq_profile *out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_profile_reset(ivfpq_profile *p); /* legal on a zeroed one */

#endif
