/* ivfpq_stages.h - the finished stages of a build, kept in its working folder; see ivfpq_build.h, opt->keep.
 *
 *   key          what the build is (its own line per option and input), written before anything else
 *   model.state  after training: the model, and the queries that will measure it
 *   rows.state   after streaming: tables of the runs in scan.runs and row.runs, what was learned on the way, dropped rows; only when
 *                the rows are in files: what fits into memory is kept when opt->keep_rows asks for it
 *   segment.state  after the segment is complete and synced: its size and checksum
 */
#ifndef IVFPQ_STAGES_H
#define IVFPQ_STAGES_H
#include "ivfpq_build_int.h"

/* How far the folder's build has come, with what it learned put into b. Anything damaged or from another build counts as not there,
 * and b stays as it was before that stage. */
typedef enum build_stage { STAGE_NONE = 0, STAGE_MODEL, STAGE_ROWS, STAGE_SEGMENT } build_stage;
vs_rc build_stages_load(builder *b, build_stage *stage) VS_WARN_UNUSED;

vs_rc build_keep_model(builder *b) VS_WARN_UNUSED;
vs_rc build_keep_rows(builder *b) VS_WARN_UNUSED;
vs_rc build_keep_segment(builder *b) VS_WARN_UNUSED;

#endif
