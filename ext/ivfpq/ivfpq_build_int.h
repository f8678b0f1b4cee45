/* ivfpq_build_int.h - what the passes of a build share: ivfpq_build.c reads and encodes, ivfpq_sections.c writes the file. */
#ifndef IVFPQ_BUILD_INT_H
#define IVFPQ_BUILD_INT_H
#include "ivfpq_build.h"
#include "ivfpq_calibrate.h"
#include "ivfpq_model.h"
#include "ivfpq_runs.h"
#include "ivfpq_write.h"

typedef struct part_entry {
  ivfpq_partition p;
  uint32_t centroid;
} part_entry;

/* One build on its way through the passes. */
typedef struct builder {
  input *in;
  const ivfpq_build_options *opt;
  ivfpq_build_result *out;
  vs_err *err;
  uint64_t memory;
  int threads;
  ivfpq_model model;
  ivfpq_runs *runs;
  ivfpq_sorter *sorter;
  uint32_t *row_of;  /* row of the segment by row number of the input, UINT32_MAX: none; NULL: ids go through the sorter */
  ivfpq_writer *writer;
  uint64_t *dropped; /* sequence numbers of duplicate rows, ascending */
  size_t n_dropped, dropped_room;
  float term_min[IVFPQ_BETAS], term_max[IVFPQ_BETAS]; /* of the terms, by beta */
  ivfpq_truth *truth; /* NULL: nothing to calibrate with */
  uint32_t id_max;   /* bytes of the longest text id */
  part_entry *parts;
  size_t n_parts, parts_room;
  ivfpq_params params;
  uint8_t *calibration; /* params.calibration_bytes */
  const char *path;
} builder;

static inline int build_text_ids(const builder *b) { return b->in->id_kind == INPUT_ID_TEXT; }
static inline size_t build_vector_bytes(const builder *b) { return (size_t)b->in->dim * (b->opt->store_f16 ? 2 : 4); }

static inline vs_rc build_stopped(builder *b) {
  return b->opt->stop && b->opt->stop(b->opt->ctx) ? vs_fail(b->err, VS_INTERRUPT, "interrupted") : VS_OK;
}
static inline void build_progress(builder *b, const char *stage, uint64_t done, uint64_t total) {
  if (b->opt->progress) b->opt->progress(b->opt->ctx, stage, done, total);
}
static inline ivfpq_runs_shape build_runs_shape(const builder *b) {
  return (ivfpq_runs_shape){.dir = b->opt->keep ? b->opt->keep : b->opt->tmpdir, .named = b->opt->keep != NULL, .n_centroids = b->model.nlist,
                            .code_bytes = b->model.m, .vector_bytes = build_vector_bytes(b), .memory = b->memory / 2, .n_rows = b->in->n_rows,
                            .threads = b->threads};
}
/* Was this row left out as a duplicate? */
int build_is_dropped(const builder *b, uint64_t seq);

/* ---- ivfpq_sections.c: passes 4 to 6, in this order ---- */
vs_rc build_write_scan(builder *b) VS_WARN_UNUSED;
vs_rc build_write_rows(builder *b) VS_WARN_UNUSED;
vs_rc build_write_small(builder *b) VS_WARN_UNUSED;

#endif
