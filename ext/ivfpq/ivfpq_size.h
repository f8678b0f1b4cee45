/* ivfpq_size.h - how large a segment will be, before it is built: the builder's own choices and the format's own arithmetic. */
#ifndef IVFPQ_SIZE_H
#define IVFPQ_SIZE_H
#include "ivfpq_build.h"

typedef struct ivfpq_outline {
  uint64_t n_rows;
  uint32_t dim;
  uint32_t text_id;         /* bytes of a text id on average; 0: integers */
  uint32_t filter_numbers;  /* metadata columns with numbers, filterable */
} ivfpq_outline;

/* What a build with these options makes of such rows: opt's metric, store_f16, nlist, subs and bits count. What only the data
 * tells is left out: the projection, the codes' directions and the calibration are 0. */
void ivfpq_size_params(const ivfpq_build_options *opt, const ivfpq_outline *o, ivfpq_params *out);

/* Bytes of each section, by its id, with the padding behind it; partitions are taken to be of equal size. [0]: header, footer,
 * trailer. A projection and a calibration count as out says. Returns the sum. */
uint64_t ivfpq_size_sections(const ivfpq_params *p, const ivfpq_outline *o, uint64_t bytes[IVFPQ_N_SECTIONS]);

/* Bytes of codes, terms and filterable columns of an average partition: what probing it reads. */
uint64_t ivfpq_size_partition(const ivfpq_params *p, const ivfpq_outline *o);

/* Bytes of temporary files of the build. */
uint64_t ivfpq_size_temp(const ivfpq_build_options *opt, const ivfpq_outline *o);

#endif
