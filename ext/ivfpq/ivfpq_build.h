/* ivfpq_build.h - builds one segment file from an input. */
#ifndef IVFPQ_BUILD_H
#define IVFPQ_BUILD_H
#include "../base/vs_io.h"
#include "../input/input.h"
#include "ivfpq_format.h"

typedef enum ivfpq_duplicates { IVFPQ_DUP_FAIL = 0, IVFPQ_DUP_FIRST, IVFPQ_DUP_LAST } ivfpq_duplicates;

typedef struct ivfpq_build_options {
  ivfpq_metric metric;
  int store_f16;            /* 0: f32, the input's values unchanged */
  uint32_t nlist;           /* 0: ivfpq_default_nlist */
  uint32_t subs;            /* sub-quantizers; 0: by dimension */
  uint32_t bits;            /* 8 or 4; 0: 8 */
  uint64_t memory;          /* bytes; 0: 1 GiB */
  int threads;              /* 0: vs_threads() */
  const char *tmpdir;       /* for unnamed temporary files; required */
  const char *keep;         /* a private folder for what finished stages leave (ivfpq_stages.h), and for the large temporary files;
                               NULL: these have no names, and nothing is left. Its files stay: the caller removes them */
  const char *key;          /* with keep: a text that is another one when inputs or options are, as far as they decide the bytes */
  int resume;               /* with keep: go on after the last finished stage found there */
  int keep_rows;            /* with keep: rows go to files also when they would fit into memory */
  uint64_t seed;
  int skip_bad;             /* 1: bad rows are left out and counted, 0: the first one fails the build */
  ivfpq_duplicates duplicates;
  const char *const *column_names; /* in->n_columns */
  const uint8_t *column_flags;     /* IVFPQ_FILTER, IVFPQ_INDEX */
  vs_rc (*open)(const char *path, vs_io **out, vs_err *err); /* a file for reading, so that the build can measure what it built;
                               NULL: no calibration */
  void *ctx;                /* for the calls below, each of which may be NULL */
  int (*stop)(void *ctx);   /* polled on the caller's thread; non-zero: VS_INTERRUPT */
  void (*progress)(void *ctx, const char *stage, uint64_t done, uint64_t total);
  void (*resumed)(void *ctx, const char *stage);                        /* stages up to this one were not done again */
  void (*bad_row)(void *ctx, uint64_t row, const char *why);            /* of the input, when skipped */
  void (*describe)(void *ctx, uint64_t row, char *buf, size_t n);       /* "file.h5: row 17"; default "row N" */
} ivfpq_build_options;

typedef struct ivfpq_build_result {
  uint64_t n_rows, n_bad, n_duplicates, n_bytes, temp_bytes;
  uint32_t nlist, m, bits;
  char checksum[33]; /* XXH3-128 of the file, lower-case hex */
} ivfpq_build_result;

/* Partitions for n rows: 4*sqrt(n) while lists keep about 128 rows, 8,000 from 4 to 64 million rows, then sqrt(n). */
uint32_t ivfpq_default_nlist(uint64_t n_rows);
/* Sub-quantizers: dim/8 below 512 dimensions, else dim/16, rounded, 1..256. */
uint32_t ivfpq_default_subs(uint32_t dim);
/* What a build will choose for such rows: metric, dim, dim_padded, nlist, bits, m, sub_dim. */
void ivfpq_build_shape(const ivfpq_build_options *opt, uint32_t dim, uint64_t n_rows, ivfpq_params *out);
/* The least memory that a build of that shape can do with. */
uint64_t ivfpq_least_memory(const ivfpq_build_options *opt, uint32_t dim, uint64_t n_rows);
/* Bytes of temporary space the build will need at most (long ids and columns aside). */
uint64_t ivfpq_temp_bytes(const input *in, const ivfpq_build_options *opt);

/* Writes a whole segment to `path` (created exclusively) and syncs it. On failure the file is removed. */
vs_rc ivfpq_build(input *in, const ivfpq_build_options *opt, const char *path, ivfpq_build_result *out, vs_err *err) VS_WARN_UNUSED;

#endif
