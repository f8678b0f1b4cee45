/* ivfpq_stages.c - see ivfpq_stages.h. */
#include "ivfpq_stages.h"

#include <stdlib.h>
#include <string.h>

static const char model_file[] = "model.state", rows_file[] = "rows.state", segment_file[] = "segment.state";

/* ---- keeping ---- */

vs_rc build_keep_model(builder *b) {
  ivfpq_state *s;
  if (!b->opt->keep) return VS_OK;
  vs_rc rc = ivfpq_state_create(b->opt->keep, model_file, b->opt->key, &s, b->err);
  if (rc) return rc;
  ivfpq_model_save(&b->model, s);
  ivfpq_truth_save(b->truth, s);
  return ivfpq_state_commit(s, b->err);
}

vs_rc build_keep_rows(builder *b) {
  ivfpq_state *s;
  uint64_t head[] = {b->in->n_rows, b->out->n_bad, b->out->n_duplicates, b->id_max, b->n_dropped};
  if (!b->opt->keep || !ivfpq_runs_in_files(b->runs)) return VS_OK;
  vs_rc rc = ivfpq_state_create(b->opt->keep, rows_file, b->opt->key, &s, b->err);
  if (rc) return rc;
  ivfpq_state_put(s, head, sizeof head);
  ivfpq_state_put(s, b->term_min, sizeof b->term_min), ivfpq_state_put(s, b->term_max, sizeof b->term_max);
  ivfpq_state_put(s, b->dropped, b->n_dropped * sizeof *b->dropped);
  ivfpq_truth_save(b->truth, s);
  ivfpq_runs_save(b->runs, s);
  return ivfpq_state_commit(s, b->err);
}

vs_rc build_keep_segment(builder *b) {
  ivfpq_state *s;
  if (!b->opt->keep) return VS_OK;
  vs_rc rc = ivfpq_state_create(b->opt->keep, segment_file, b->opt->key, &s, b->err);
  if (rc) return rc;
  ivfpq_state_put(s, b->out, sizeof *b->out);
  return ivfpq_state_commit(s, b->err);
}

/* ---- loading ---- */

/* Errors that mean "not usable", as opposed to those that end the build. */
static vs_rc not_usable(vs_rc rc, int *found) {
  *found = !rc;
  return rc == VS_NOMEM ? rc : VS_OK;
}

static vs_rc load_segment(builder *b, int *found) {
  ivfpq_state *s;
  ivfpq_build_result r;
  char hex[33];
  uint64_t size;
  vs_err why = {0};
  vs_rc rc = ivfpq_state_open(b->opt->keep, segment_file, b->opt->key, &s, &why);
  if (!rc) {
    ivfpq_state_get(s, &r, sizeof r);
    rc = ivfpq_state_close(s, &why);
  }
  if (!rc) rc = ivfpq_file_check(b->path, &size, hex, &why);
  if (!rc && (size != r.n_bytes || memcmp(hex, r.checksum, sizeof hex))) rc = vs_corrupt(&why, "%s: is damaged", b->path);
  if (!rc) *b->out = r;
  return not_usable(rc, found);
}

static vs_rc load_model(builder *b, int *found) {
  ivfpq_state *s;
  ivfpq_model shape = b->model;
  vs_err why = {0};
  vs_rc rc = ivfpq_state_open(b->opt->keep, model_file, b->opt->key, &s, &why);
  if (rc) return not_usable(rc, found);
  rc = ivfpq_model_load(&b->model, s, &why);
  if (!rc) rc = ivfpq_truth_load(&b->model, s, &b->truth, &why);
  vs_rc end = ivfpq_state_close(s, &why);
  if (!rc) rc = end;
  if (rc) {
    ivfpq_truth_close(b->truth), b->truth = NULL;
    ivfpq_model_reset(&b->model), b->model = shape;
  }
  return not_usable(rc, found);
}

static vs_rc read_rows(builder *b, ivfpq_state *s, ivfpq_truth **truth, vs_err *why) {
  uint64_t head[5], last = 0;
  ivfpq_runs_shape shape = build_runs_shape(b);
  ivfpq_state_get(s, head, sizeof head);
  if (head[0] != b->in->n_rows || head[3] > IVFPQ_MAX_TEXT || head[4] > b->in->n_rows || head[4] > ivfpq_state_left(s) / 8)
    return vs_corrupt(why, "kept rows are of another input");
  b->out->n_bad = head[1], b->out->n_duplicates = head[2], b->id_max = (uint32_t)head[3];
  ivfpq_state_get(s, b->term_min, sizeof b->term_min), ivfpq_state_get(s, b->term_max, sizeof b->term_max);
  if (!(b->dropped = malloc((head[4] + 1) * sizeof *b->dropped))) return vs_nomem(why);
  b->n_dropped = b->dropped_room = head[4];
  ivfpq_state_get(s, b->dropped, head[4] * sizeof *b->dropped);
  for (size_t i = 0; i < b->n_dropped; last = b->dropped[i++])
    if (i && b->dropped[i] <= last) return vs_corrupt(why, "dropped rows are not in order");
  vs_rc rc = ivfpq_truth_load(&b->model, s, truth, why);
  return rc ? rc : ivfpq_runs_load(&shape, s, &b->runs, why);
}

static vs_rc load_rows(builder *b, int *found) {
  ivfpq_state *s;
  ivfpq_truth *truth = NULL;
  vs_err why = {0};
  vs_rc rc = ivfpq_state_open(b->opt->keep, rows_file, b->opt->key, &s, &why);
  if (rc) return not_usable(rc, found);
  rc = read_rows(b, s, &truth, &why);
  vs_rc end = ivfpq_state_close(s, &why);
  if (!rc) rc = end;
  if (rc) {
    free(b->dropped), b->dropped = NULL, b->n_dropped = b->dropped_room = 0, b->id_max = 0;
    ivfpq_runs_close(b->runs), b->runs = NULL;
    memset(b->out, 0, sizeof *b->out);
  } else {
    ivfpq_truth *old = b->truth; /* which had seen no rows */
    b->truth = truth, truth = old;
  }
  ivfpq_truth_close(truth);
  return not_usable(rc, found);
}

vs_rc build_stages_load(builder *b, build_stage *stage) {
  int found = 0;
  *stage = STAGE_NONE;
  if (!b->opt->keep || !b->opt->resume) return VS_OK;
  vs_rc rc = load_segment(b, &found);
  if (!rc && found) *stage = STAGE_SEGMENT;
  if (rc || found) return rc;
  rc = load_model(b, &found);
  if (rc || !found) return rc;
  *stage = STAGE_MODEL;
  rc = load_rows(b, &found);
  if (!rc && found) *stage = STAGE_ROWS;
  return rc;
}
