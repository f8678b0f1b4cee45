/* ivfpq_size.c - see ivfpq_size.h. Checked against built segments by test/test_cost.py. */
#include "ivfpq_size.h"

#include <string.h>

#include "ivfpq_model.h"
#include "ivfpq_sketch.h"

void ivfpq_size_params(const ivfpq_build_options *opt, const ivfpq_outline *o, ivfpq_params *p) {
  memset(p, 0, sizeof *p);
  p->n_rows = o->n_rows, p->store = opt->store_f16 != 0;
  ivfpq_build_shape(opt, o->dim, o->n_rows, p);
  p->n_groups = o->n_rows ? ivfpq_default_groups(p->nlist) : 0;
  if (!o->n_rows) p->nlist = 0;
  p->id_text = o->text_id != 0, p->id_width = ivfpq_id_width(o->text_id);
  p->n_columns = o->filter_numbers;
  p->row_bytes = (uint32_t)ivfpq_row_bytes(p);
  p->sketch_bytes = ivfpq_default_sketch(p);
  p->iddir_levels = ivfpq_iddir_levels(o->n_rows, (uint64_t[8]){0});
}

uint64_t ivfpq_size_partition(const ivfpq_params *p, const ivfpq_outline *o) {
  uint64_t n = p->nlist ? (p->n_rows + p->nlist / 2) / p->nlist : 0;
  return ivfpq_round(ivfpq_code_bytes(n, p->m), 8) + o->filter_numbers * ((n + 7) / 8 + 8 * n);
}

/* All partitions. They differ in size, so the gap behind one is on average half of what it can be. */
static uint64_t scan_bytes(const ivfpq_params *p, const ivfpq_outline *o) {
  uint64_t rows = p->n_rows * (p->m ? p->m + 2 : 0) + o->filter_numbers * (p->n_rows / 8 + 8 * p->n_rows);
  return rows + (uint64_t)p->nlist * (IVFPQ_ALIGN / 2);
}

static uint64_t group_bytes(const ivfpq_params *p) {
  uint64_t n = 0;
  for (uint32_t g = 0; g < p->n_groups; g++) {
    uint32_t in = (uint32_t)((uint64_t)p->nlist * (g + 1) / p->n_groups - (uint64_t)p->nlist * g / p->n_groups);
    n += ivfpq_round(ivfpq_group_shape(in, ivfpq_coded_dim(p), p->project).size, IVFPQ_ALIGN);
  }
  return n;
}

static uint64_t iddir_bytes(const ivfpq_params *p) {
  uint64_t pages[8], n = 0;
  for (uint32_t i = ivfpq_iddir_levels(p->n_rows, pages); i-- > 0;) n += pages[i];
  return n * IVFPQ_PAGE;
}

uint64_t ivfpq_size_sections(const ivfpq_params *p, const ivfpq_outline *o, uint64_t bytes[IVFPQ_N_SECTIONS]) {
  uint64_t n = p->n_rows, sum = 0;
  uint32_t coded = ivfpq_coded_dim(p);
  memset(bytes, 0, IVFPQ_N_SECTIONS * sizeof *bytes);
  bytes[0] = IVFPQ_HEADER + (IVFPQ_N_SECTIONS - 1) * sizeof(ivfpq_section) + IVFPQ_TRAILER;
  bytes[IVFPQ_SCAN] = scan_bytes(p, o);
  bytes[IVFPQ_ROWS] = n * p->row_bytes;
  bytes[IVFPQ_SKETCH] = n * p->sketch_bytes;
  bytes[IVFPQ_IDHEAP] = o->text_id > IVFPQ_ID_INLINE ? n * (o->text_id + 4ull) : 0;
  bytes[IVFPQ_COLUMNS] = o->filter_numbers ? n * (9ull * o->filter_numbers + 4) : 0;
  bytes[IVFPQ_IDDIR] = iddir_bytes(p);
  bytes[IVFPQ_GROUPS] = group_bytes(p);
  if (p->m) {
    bytes[IVFPQ_MEAN] = p->dim * 4ull + 8;
    bytes[IVFPQ_CODEBOOK] = (uint64_t)ivfpq_subs(p->m, p->bits) * ivfpq_words(p->bits) * p->sub_dim + ivfpq_turn_bytes(p) +
                            (p->m + p->turn) * 4ull + 8;
  }
  if (p->project) bytes[IVFPQ_PROJECTION] = p->project * (coded + 4ull) + 8;
  bytes[IVFPQ_PARAMS] = sizeof(ivfpq_params) + ivfpq_round(p->descriptor_bytes, IVFPQ_ALIGN) + ivfpq_group_table_bytes(p) + 8;
  for (int i = 0; i < IVFPQ_N_SECTIONS; i++) bytes[i] = ivfpq_round(bytes[i], IVFPQ_ALIGN), sum += bytes[i];
  return sum;
}

uint64_t ivfpq_size_temp(const ivfpq_build_options *opt, const ivfpq_outline *o) {
  input in = {.n_rows = o->n_rows, .dim = o->dim, .id_kind = o->text_id ? INPUT_ID_TEXT : INPUT_ID_ROW};
  return ivfpq_temp_bytes(&in, opt);
}
