/* ivfpq_segment.c - opening a segment and reading its parts; see ivfpq_segment.h.
 *
 * What is checked when: sizes, counts and offsets of the fixed parts at open; a group's entries when the group is read; a
 * partition, a row record or a directory page by its check when it first enters the process (flags of what was seen are kept
 * here for a mapped file, and beside the bytes in a cache; memory that is new each time is checked each time).
 */
#include "ivfpq_segment.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
#include "ivfpq_int.h"
#include "ivfpq_sketch.h"

/* What is read again must come anew: bytes may have been damaged on their way, or been repaired since. */
static vs_rc damaged(const ivfpq_segment *s, vs_err *err, const char *what) {
  if (s->io->forget) vs_io_forget(s->io);
  return vs_corrupt(err, "%s: damaged: %s", s->io->name, what);
}

/* Reads [off, off+len) into fresh memory of len + VS_IO_PAD bytes. */
static vs_rc read_copy(vs_io *io, uint64_t off, uint64_t len, void **out, vs_err *err) {
  vs_range r = {.off = off, .len = len};
  *out = NULL;
  vs_rc rc = vs_io_fetch(io, &r, 1, err);
  if (rc) return rc;
  char *copy = malloc(len + VS_IO_PAD);
  if (copy) {
    memcpy(copy, r.ptr, len);
    memset(copy + len, 0, VS_IO_PAD);
  }
  vs_io_release(io, &r, 1);
  *out = copy;
  return copy ? VS_OK : vs_nomem(err);
}

/* ---- opening, stage by stage ---- */

static vs_rc open_footer(ivfpq_segment *s, vs_err *err) {
  vs_io *io = s->io;
  uint8_t *t = NULL, *f = NULL;
  uint64_t footer_off, footer_check, trailer_check, file_size;
  uint32_t n, format;
  if (io->size < IVFPQ_HEADER + IVFPQ_TRAILER) return damaged(s, err, "too short for a segment");
  vs_rc rc = read_copy(io, io->size - IVFPQ_TRAILER, IVFPQ_TRAILER, (void **)&t, err);
  if (rc) return rc;
  memcpy(&footer_off, t, 8), memcpy(&n, t + 8, 4), memcpy(&format, t + 12, 4), memcpy(&footer_check, t + 16, 8);
  memcpy(&file_size, t + 24, 8), memcpy(&trailer_check, t + 48, 8);
  if (memcmp(t + 56, IVFPQ_MAGIC_END, 8)) rc = damaged(s, err, "no segment trailer (cut short?)");
  else if (format != IVFPQ_FORMAT)
    rc = vs_fail(err, VS_UNSUPPORTED, "%s: segment format %u, this build reads format %d: use a newer vecshard", io->name,
                 format, IVFPQ_FORMAT);
  else if (trailer_check != ivfpq_check(t, 48)) rc = damaged(s, err, "trailer checksum");
  else if (file_size != io->size) rc = damaged(s, err, "the file has not the size that its trailer states");
  else if (n > 64 || footer_off > io->size - IVFPQ_TRAILER || io->size - IVFPQ_TRAILER - footer_off != (uint64_t)n * 32)
    rc = damaged(s, err, "footer size");
  free(t);
  if (rc) return rc;
  if ((rc = read_copy(io, footer_off, (uint64_t)n * 32, (void **)&f, err))) return rc;
  if (ivfpq_check(f, (size_t)n * 32) != footer_check) rc = damaged(s, err, "footer checksum");
  s->footer_check = footer_check;
  for (uint32_t i = 0; i < n && !rc; i++) {
    ivfpq_section x;
    memcpy(&x, f + 32 * (size_t)i, 32);
    if (x.off < IVFPQ_HEADER || x.off % IVFPQ_ALIGN || x.off > footer_off || x.size > footer_off - x.off)
      rc = damaged(s, err, "a section lies outside the file");
    else if (x.id == 0 || x.id >= IVFPQ_N_SECTIONS) {
      if (!(x.flags & IVFPQ_IGNORABLE))
        rc = vs_fail(err, VS_UNSUPPORTED, "%s: has a required section %u that this build does not know", io->name, x.id);
    } else if (s->section[x.id].id) rc = damaged(s, err, "a section appears twice");
    else s->section[x.id] = x;
  }
  free(f);
  return rc;
}

/* The relations between parameters that every later computation relies on. */
static const char *params_fault(const ivfpq_params *p) {
  if (p->n_rows >= 1ull << 32) return "row count";
  if (p->dim < 1 || p->dim > IVFPQ_MAX_DIM) return "dimension";
  if (p->metric > IVFPQ_DOT || p->store > 1 || p->id_text > 1) return "metric, store or id type";
  if (p->n_columns > IVFPQ_MAX_COLUMNS) return "column count";
  if (p->nlist > IVFPQ_MAX_NLIST || p->n_groups > p->nlist) return "partition count";
  if ((p->nlist == 0) != (p->n_rows == 0) || (p->n_groups == 0) != (p->n_rows == 0)) return "partition count";
  if (p->m) {
    if ((p->bits != 8 && p->bits != 4) || p->m > IVFPQ_MAX_M || p->sub_dim < 1 || p->sub_dim > IVFPQ_MAX_DIM)
      return "quantizer shape";
    if (p->dim_padded < p->dim || p->dim_padded > p->dim + 2 * IVFPQ_MAX_M) return "padded dimension";
    if (p->turn > IVFPQ_MAX_TURN || p->turn > p->dim_padded) return "turned dimension";
    if (ivfpq_code_dim(p) != ivfpq_subs(p->m, p->bits) * p->sub_dim) return "quantizer shape";
    if (!isfinite(p->term0) || !isfinite(p->term_step) || p->term_step < 0) return "row terms";
  } else if (p->bits || p->sub_dim || p->turn || p->dim_padded != p->dim || p->nlist > 1) return "flat segment with codes";
  if (p->id_text ? p->id_width < 8 || p->id_width > IVFPQ_ID_INLINE || p->id_width % 4 : p->id_width != 0) return "id width";
  if (p->project > 1024 || p->project % 16 || (p->project && !p->m)) return "projection";
  if (p->sketch_bytes && (!p->m || p->sketch_bytes != ivfpq_sketch_bytes(ivfpq_coded_dim(p)))) return "sketch size";
  if (p->row_bytes != ivfpq_row_bytes(p)) return "row size";
  uint64_t pages[8];
  if (p->iddir_levels != ivfpq_iddir_levels(p->n_rows, pages)) return "id directory levels";
  for (size_t i = 0; i < sizeof p->reserved / sizeof *p->reserved; i++)
    if (p->reserved[i]) return "a reserved field is not zero";
  return NULL;
}

static vs_rc open_columns(ivfpq_segment *s, const uint8_t *d, vs_err *err) {
  const uint8_t *end = d + s->params.descriptor_bytes;
  if (!(s->columns = calloc(s->params.n_columns + 1, sizeof *s->columns))) return vs_nomem(err);
  for (uint32_t i = 0; i < s->params.n_columns; i++) {
    uint16_t n;
    if (end - d < 4) return damaged(s, err, "column descriptors");
    memcpy(&n, d + 2, 2);
    if (d[0] < IVFPQ_INTEGER || d[0] > IVFPQ_TEXT || d[1] > 3 || end - d - 4 < n || n == 0 || memchr(d + 4, 0, n))
      return damaged(s, err, "column descriptors");
    s->columns[i].type = d[0], s->columns[i].flags = d[1];
    if (!(s->columns[i].name = strndup((const char *)d + 4, n))) return vs_nomem(err);
    d += 4 + n;
  }
  return d == end ? VS_OK : damaged(s, err, "column descriptors");
}

static vs_rc open_groups(ivfpq_segment *s, const uint8_t *p, uint64_t left, vs_err *err) {
  const ivfpq_params *h = &s->params;
  uint64_t lanes = ivfpq_round(h->n_groups, 16), bias = lanes * 4, cent = lanes * h->dim_padded * 4, next = 0;
  uint32_t coded = ivfpq_coded_dim(h);
  if (left != ivfpq_group_table_bytes(h)) return damaged(s, err, "group table size");
  s->groups = malloc((size_t)h->n_groups * sizeof *s->groups + 1);
  s->group_bias = malloc(bias + cent + VS_IO_PAD);
  s->first_lane = calloc(h->n_groups + 1, sizeof *s->first_lane);
  if (!s->groups || !s->group_bias || !s->first_lane) return vs_nomem(err);
  memcpy(s->groups, p, h->n_groups * sizeof *s->groups);
  memcpy(s->group_bias, p + h->n_groups * sizeof *s->groups, bias + cent);
  s->group_centroids = s->group_bias + lanes;
  for (uint32_t g = 0; g < h->n_groups; g++) {
    const ivfpq_group *x = &s->groups[g];
    uint64_t size = s->section[IVFPQ_GROUPS].size;
    if (x->first != next || x->n == 0 || x->n > h->nlist || x->reserved) return damaged(s, err, "group table order");
    if (x->off > size || x->size > size - x->off || x->off % 8 || x->size != ivfpq_group_shape(x->n, coded, h->project).size)
      return damaged(s, err, "group table ranges");
    s->first_lane[g + 1] = s->first_lane[g] + (uint32_t)ivfpq_round(x->n, 16);
    next += x->n;
  }
  if (next != h->nlist) return damaged(s, err, "groups do not add up to the partitions");
  if (!(s->lane_group = malloc(s->first_lane[h->n_groups] * sizeof *s->lane_group + 1))) return vs_nomem(err);
  for (uint32_t g = 0; g < h->n_groups; g++)
    for (uint32_t lane = s->first_lane[g]; lane < s->first_lane[g + 1]; lane++) s->lane_group[lane] = g;
  return VS_OK;
}

/* Settings are only ever a choice among valid ones; still no number here may be nonsense, and searches rely on the order. */
static const char *calibration_fault(const ivfpq_calibration *c, uint64_t size) {
  if (size < sizeof *c || c->n_reach > 1000 || c->n_levels > 1000) return "calibration size";
  if (size != sizeof *c + c->n_reach * sizeof(ivfpq_reach) + (uint64_t)IVFPQ_CURVES * c->n_levels * sizeof(ivfpq_level))
    return "calibration size";
  for (int i = 0; i < IVFPQ_CURVES; i++)
    if (c->k[i] < 1 || (i && c->k[i] <= c->k[i - 1])) return "calibration k";
  for (uint32_t i = 0; i < c->n_reach; i++) {
    const ivfpq_reach *r = &ivfpq_reaches(c)[i];
    if (!(r->reach >= 0) || !isfinite(r->reach) || (i && r->nprobe <= r[-1].nprobe)) return "calibrated reach";
  }
  for (uint32_t i = 0; i < IVFPQ_CURVES * c->n_levels; i++) {
    const ivfpq_level *l = &ivfpq_levels(c)[i];
    if (!(l->recall >= 0 && l->recall <= 1) || (i % c->n_levels && l->recall <= l[-1].recall)) return "calibrated recall";
    if (!(l->reach >= 0) || !isfinite(l->reach) || !(l->rows >= 0) || !isfinite(l->rows) || !l->nprobe != !l->n_candidates)
      return "calibrated settings";
  }
  return NULL;
}

static vs_rc open_calibration(ivfpq_segment *s, const uint8_t *p, vs_err *err) {
  uint32_t n = s->params.calibration_bytes;
  if (!n) return VS_OK;
  if (!(s->calibration = malloc(n))) return vs_nomem(err);
  memcpy(s->calibration, p, n);
  const char *fault = calibration_fault(s->calibration, n);
  return fault ? damaged(s, err, fault) : VS_OK;
}

static vs_rc open_params(ivfpq_segment *s, vs_err *err) {
  const ivfpq_section *x = &s->section[IVFPQ_PARAMS];
  uint8_t *p = NULL;
  const char *fault;
  if (x->size < sizeof s->params + 8 || x->size > (1u << 30)) return damaged(s, err, "parameter section size");
  vs_rc rc = read_copy(s->io, x->off, x->size, (void **)&p, err);
  if (rc) return rc;
  uint64_t check, body = x->size - 8, table;
  memcpy(&check, p + body, 8);
  memcpy(&s->params, p, sizeof s->params);
  table = ivfpq_round(sizeof s->params + (uint64_t)s->params.descriptor_bytes, 64);
  if (check != ivfpq_check(p, body)) rc = damaged(s, err, "parameter checksum");
  else if ((fault = params_fault(&s->params))) rc = damaged(s, err, fault);
  else if (table > body) rc = damaged(s, err, "parameter section size");
  if (!rc) rc = open_columns(s, p + sizeof s->params, err);
  if (!rc) rc = open_groups(s, p + table, body - table, err);
  if (!rc) rc = open_calibration(s, p + body - s->params.calibration_bytes, err);
  free(p);
  return rc;
}

/* A section that ends with its check: begins to read it, and tells its content once it is there. */
static vs_rc part_begin(ivfpq_segment *s, int id, uint64_t n, vs_range *r, vs_err *err) {
  const ivfpq_section *x = &s->section[id];
  if (x->size != n + 8) return damaged(s, err, "the size of mean, codebook or projection");
  *r = (vs_range){.off = x->off, .len = x->size};
  return vs_io_begin(s->io, r, 1, err);
}
static vs_rc part_wait(ivfpq_segment *s, vs_range *r, vs_err *err) {
  uint64_t check;
  vs_rc rc = vs_io_wait(s->io, r, 1, err);
  if (rc) return rc;
  memcpy(&check, r->ptr + r->len - 8, 8);
  if (check == ivfpq_check(r->ptr, r->len - 8)) return VS_OK;
  vs_io_release(s->io, r, 1);
  return damaged(s, err, "checksum of mean, codebook or projection");
}

static vs_rc open_mean(ivfpq_segment *s, vs_err *err) {
  vs_range r;
  uint64_t n = (uint64_t)s->params.dim * 4;
  vs_rc rc = part_begin(s, IVFPQ_MEAN, n, &r, err);
  if (!rc) rc = part_wait(s, &r, err);
  if (rc) return rc;
  if ((s->mean = calloc(s->params.dim_padded + 16, 4))) memcpy(s->mean, r.ptr, n);
  vs_io_release(s->io, &r, 1);
  return s->mean ? VS_OK : vs_nomem(err);
}

static uint64_t codebook_words(const ivfpq_params *p) {
  return (uint64_t)ivfpq_subs(p->m, p->bits) * ivfpq_words(p->bits) * p->sub_dim;
}

vs_rc ivfpq_codebook_begin(ivfpq_segment *s, vs_range r[2], vs_err *err) {
  const ivfpq_params *p = &s->params;
  memset(r, 0, 2 * sizeof *r);
  if (ivfpq_codebook_of(s)) return VS_OK;
  vs_rc rc = part_begin(s, IVFPQ_CODEBOOK, codebook_words(p) + ivfpq_turn_bytes(p) + (p->m + p->turn) * 4ull, &r[0], err);
  int held = !rc;
  if (!rc && p->project) rc = part_begin(s, IVFPQ_PROJECTION, (uint64_t)p->project * (ivfpq_coded_dim(p) + 4), &r[1], err);
  if (rc && held) vs_io_release(s->io, r, 1);
  if (rc) memset(r, 0, 2 * sizeof *r);
  return rc;
}

/* The 256 words of code byte j, table_dim bytes each. */
static void table_words(const ivfpq_params *p, const int8_t *words, uint32_t table_dim, int8_t *out) {
  size_t d = p->sub_dim;
  memset(out, 0, 256 * (size_t)table_dim);
  for (size_t w = 0; w < 256; w++, out += table_dim)
    if (p->bits == 8) memcpy(out, words + w * d, d);
    else memcpy(out, words + (w & 15) * d, d), memcpy(out + d, words + (16 + (w >> 4)) * d, d);
}

static vs_rc make_codebook(const ivfpq_params *p, const uint8_t *bytes, ivfpq_codebook **out, vs_err *err) {
  uint32_t per_byte = ivfpq_subs(p->m, p->bits) / p->m, table_dim = (uint32_t)ivfpq_round(per_byte * p->sub_dim, 4);
  size_t size = (size_t)p->m * 256 * table_dim, chunk = (size_t)codebook_words(p) / p->m, turn = ivfpq_turn_bytes(p);
  ivfpq_codebook *c = malloc(sizeof *c + size + turn + (p->m + p->turn) * sizeof(float));
  int8_t *words = malloc(256 * (size_t)table_dim);
  *out = c;
  if (!c || !words) {
    free(c), free(words);
    *out = NULL;
    return vs_nomem(err);
  }
  c->table_dim = table_dim, c->turn = c->packed + size, c->scale = (float *)(c->turn + turn), c->turn_scale = c->scale + p->m;
  memcpy(c->turn, bytes + codebook_words(p), turn + (p->m + p->turn) * sizeof(float));
  for (uint32_t j = 0; j < p->m; j++) {
    table_words(p, (const int8_t *)bytes + j * chunk, table_dim, words);
    kern_pack_i8(words, 256, table_dim, c->packed + (size_t)j * 256 * table_dim);
  }
  free(words);
  return VS_OK;
}

/* Published before the codebook: who sees that sees this. Of two threads' copies the first stays. */
static vs_rc publish_projection(ivfpq_segment *s, const vs_range *r, vs_err *err) {
  const ivfpq_params *p = &s->params;
  size_t size = (size_t)p->project * ivfpq_coded_dim(p);
  uint8_t *made = malloc(size + p->project * sizeof(float)), *have = NULL;
  if (!made) return vs_nomem(err);
  memcpy(made, r->ptr, size + p->project * sizeof(float));
  if (!__atomic_compare_exchange_n(&s->projection, &have, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) free(made), made = have;
  __atomic_store_n(&s->projection_scale, (float *)(made + size), __ATOMIC_RELEASE);
  return VS_OK;
}

vs_rc ivfpq_codebook_wait(ivfpq_segment *s, vs_range r[2], vs_err *err) {
  ivfpq_codebook *made = NULL, *have = NULL;
  if (!r[0].len) return VS_OK;
  vs_rc rc = part_wait(s, &r[0], err);
  if (rc) {
    if (r[1].len) vs_io_release(s->io, &r[1], 1);
    return rc;
  }
  if (r[1].len && !(rc = part_wait(s, &r[1], err))) {
    rc = publish_projection(s, &r[1], err);
    vs_io_release(s->io, &r[1], 1);
  }
  if (!rc) rc = make_codebook(&s->params, r[0].ptr, &made, err);
  vs_io_release(s->io, &r[0], 1);
  if (!rc && !__atomic_compare_exchange_n(&s->codebook, &have, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) free(made);
  return rc;
}

static vs_rc open_codebook(ivfpq_segment *s, vs_err *err) {
  vs_range r[2];
  vs_rc rc = ivfpq_codebook_begin(s, r, err);
  return rc ? rc : ivfpq_codebook_wait(s, r, err);
}

static vs_rc check_sizes(ivfpq_segment *s, vs_err *err) {
  const ivfpq_params *p = &s->params;
  uint64_t pages[8], n_pages = 0;
  if (s->section[IVFPQ_SKETCH].size != p->n_rows * p->sketch_bytes) return damaged(s, err, "sketch section size");
  if (s->section[IVFPQ_ROWS].size != p->n_rows * p->row_bytes) return damaged(s, err, "row section size");
  for (uint32_t i = ivfpq_iddir_levels(p->n_rows, pages); i-- > 0;) n_pages += pages[i];
  if (s->section[IVFPQ_IDDIR].size != n_pages * IVFPQ_PAGE) return damaged(s, err, "id directory size");
  return VS_OK;
}

/* A stable io hands out the same address each time: asked for once here. */
static vs_rc map_section(ivfpq_segment *s, ivfpq_section_id id, const uint8_t **at, vs_err *err) {
  vs_range r = {.off = s->section[id].off, .len = s->section[id].size};
  vs_rc rc = vs_io_fetch(s->io, &r, 1, err);
  if (!rc) *at = r.ptr, vs_io_release(s->io, &r, 1);
  return rc;
}

vs_rc ivfpq_segment_open(vs_io *io, ivfpq_segment **out, vs_err *err) {
  *out = NULL;
  ivfpq_segment *s = calloc(1, sizeof *s);
  if (!s) {
    vs_io_close(io);
    return vs_nomem(err);
  }
  s->io = io;
  vs_rc rc = open_footer(s, err);
  if (!rc) rc = open_params(s, err);
  if (!rc) rc = check_sizes(s, err);
  const ivfpq_params *p = &s->params;
  if (!rc && p->m) rc = open_mean(s, err);
  if (!rc && p->m && io->local) rc = open_codebook(s, err);
  if (!rc && io->stable) rc = map_section(s, IVFPQ_ROWS, &s->mapped_rows, err);
  if (!rc && io->stable && p->sketch_bytes) rc = map_section(s, IVFPQ_SKETCH, &s->mapped_sketches, err);
  if (!rc && io->stable) {
    s->group_checked = calloc(p->n_groups + 1, 1);
    s->part_checked = calloc((size_t)p->nlist + 1, 1);
    s->rows_checked = calloc(p->n_rows / IVFPQ_ROWS_PER_FLAGS + 1, sizeof *s->rows_checked);
    s->sketches_checked = calloc(p->n_rows / IVFPQ_ROWS_PER_FLAGS + 1, sizeof *s->sketches_checked);
    if (!s->group_checked || !s->part_checked || !s->rows_checked || !s->sketches_checked) rc = vs_nomem(err);
  }
  if (rc) {
    ivfpq_segment_close(s);
    return rc;
  }
  *out = s;
  return VS_OK;
}

void ivfpq_segment_close(ivfpq_segment *s) {
  if (!s) return;
  for (uint32_t i = 0; s->columns && i < s->params.n_columns; i++) free(s->columns[i].name);
  for (uint64_t i = 0; s->rows_checked && i <= s->params.n_rows / IVFPQ_ROWS_PER_FLAGS; i++) free(s->rows_checked[i]);
  for (uint64_t i = 0; s->sketches_checked && i <= s->params.n_rows / IVFPQ_ROWS_PER_FLAGS; i++) free(s->sketches_checked[i]);
  if (s->spare) s->free_spare(s->spare);
  if (s->resident) ivfpq_groups_release(s, s->resident, s->params.n_groups);
  free(s->columns), free(s->groups), free(s->group_bias), free(s->mean), free(s->codebook), free(s->projection);
  free(s->calibration), free(s->first_lane), free(s->lane_group), free(s->resident), free(s->resident_lanes);
  free(s->group_checked), free(s->part_checked), free(s->rows_checked), free(s->sketches_checked);
  vs_io_close(s->io);
  free(s);
}

/* ---- groups ---- */

static int flag_get(const unsigned char *flags, size_t i, unsigned bit) {
  return flags && (__atomic_load_n(&flags[i], __ATOMIC_RELAXED) & bit);
}
static void flag_set(unsigned char *flags, size_t i, unsigned bit) {
  if (flags) __atomic_fetch_or(&flags[i], bit, __ATOMIC_RELAXED);
}

/* Was it seen to be sound, by our flag or by the one beside the bytes? */
static int was_checked(const vs_range *r, const unsigned char *flags, size_t i, unsigned bit) {
  return (r->checked && __atomic_load_n(r->checked, __ATOMIC_RELAXED)) || flag_get(flags, i, bit);
}
static void set_checked(const vs_range *r, unsigned char *flags, size_t i, unsigned bit) {
  if (r->checked) __atomic_store_n(r->checked, 1, __ATOMIC_RELAXED);
  else flag_set(flags, i, bit);
}

static const char *entries_fault(const ivfpq_segment *s, const ivfpq_group_view *v) {
  uint64_t scan = s->section[IVFPQ_SCAN].size;
  for (uint32_t i = 0; i < v->n; i++) {
    const ivfpq_partition *e = &v->entries[i];
    uint64_t bytes = ivfpq_round(ivfpq_code_bytes(e->n_rows, s->params.m), 8) + e->column_bytes;
    if (e->n_rows > IVFPQ_MAX_PARTITION) return "a partition is too large";
    if (e->off % 64 || e->off > scan || bytes > scan - e->off || e->reserved) return "a partition lies outside the file";
    if (e->row0 > s->params.n_rows || e->n_rows > s->params.n_rows - e->row0) return "a partition claims rows that do not exist";
  }
  return NULL;
}

static vs_rc group_view(ivfpq_segment *s, ivfpq_group_view *v, vs_err *err) {
  const ivfpq_group *x = &s->groups[v->group];
  ivfpq_group_layout l = ivfpq_group_shape(x->n, ivfpq_coded_dim(&s->params), s->params.project);
  const uint8_t *p = v->range.ptr;
  uint64_t check;
  v->first = x->first, v->n = x->n;
  v->entries = (const ivfpq_partition *)p;
  v->norm2 = (const float *)(p + l.norm2), v->scale = (const float *)(p + l.scale), v->packed = p + l.packed;
  v->row_scale = (const float *)(p + l.row_scale), v->rows = s->params.project ? p + l.rows : NULL;
  if (was_checked(&v->range, s->group_checked, v->group, 1)) return VS_OK;
  memcpy(&check, p + x->size - 8, 8);
  if (check != ivfpq_check(p, x->size - 8)) return damaged(s, err, "checksum of a centroid group");
  const char *fault = entries_fault(s, v);
  if (fault) return damaged(s, err, fault);
  set_checked(&v->range, s->group_checked, v->group, 1);
  return VS_OK;
}

vs_rc ivfpq_groups_begin(ivfpq_segment *s, const uint32_t *groups, size_t n, ivfpq_group_view *out, vs_err *err) {
  vs_range *r = calloc(n + 1, sizeof *r);
  if (!r) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) {
    r[i].off = s->section[IVFPQ_GROUPS].off + s->groups[groups[i]].off;
    r[i].len = s->groups[groups[i]].size;
  }
  vs_rc rc = vs_io_begin(s->io, r, n, err);
  for (size_t i = 0; i < n && !rc; i++) out[i] = (ivfpq_group_view){.range = r[i], .group = groups[i]};
  free(r);
  return rc;
}

vs_rc ivfpq_groups_wait(ivfpq_segment *s, ivfpq_group_view *views, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    rc = vs_io_wait(s->io, &views[i].range, 1, err);
    if (!rc) rc = group_view(s, &views[i], err);
  }
  if (rc) ivfpq_groups_release(s, views, n);
  return rc;
}

vs_rc ivfpq_groups_fetch(ivfpq_segment *s, const uint32_t *groups, size_t n, ivfpq_group_view *out, vs_err *err) {
  vs_rc rc = ivfpq_groups_begin(s, groups, n, out, err);
  return rc ? rc : ivfpq_groups_wait(s, out, n, err);
}

void ivfpq_groups_release(ivfpq_segment *s, ivfpq_group_view *views, size_t n) {
  for (size_t i = 0; i < n; i++) vs_io_release(s->io, &views[i].range, 1);
}

/* The numbers that ranking needs of every centroid, side by side: one pass over all is far cheaper than one per group. */
static vs_rc lanes_together(const ivfpq_segment *s, ivfpq_group_view *views, float **out, vs_err *err) {
  size_t lanes = s->first_lane[s->params.n_groups];
  float *scale = malloc((2 * lanes + 1) * sizeof *scale), *norm2 = scale + lanes;
  if (!scale) return vs_nomem(err);
  for (uint32_t g = 0; g < s->params.n_groups; g++) {
    size_t first = s->first_lane[g], bytes = (s->first_lane[g + 1] - first) * sizeof *scale;
    memcpy(scale + first, views[g].scale, bytes), memcpy(norm2 + first, views[g].norm2, bytes);
    views[g].scale = scale + first, views[g].norm2 = norm2 + first;
  }
  *out = scale;
  return VS_OK;
}

vs_rc ivfpq_resident(ivfpq_segment *s, const ivfpq_group_view **views, vs_err *err) {
  ivfpq_group_view *have = __atomic_load_n(&s->resident, __ATOMIC_ACQUIRE), *made;
  uint32_t n = s->params.n_groups;
  *views = have;
  if (have || !s->io->stable) return VS_OK;
  uint32_t *all = malloc(n * sizeof *all + 1);
  made = calloc(n + 1, sizeof *made);
  vs_rc rc = all && made ? VS_OK : vs_nomem(err);
  for (uint32_t g = 0; g < n && !rc; g++) all[g] = g;
  if (!rc) rc = ivfpq_groups_fetch(s, all, n, made, err);
  float *lanes = NULL;
  if (!rc && (rc = lanes_together(s, made, &lanes, err))) ivfpq_groups_release(s, made, n);
  if (!rc && __atomic_compare_exchange_n(&s->resident, &have, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    *views = made, made = NULL;
    s->resident_lanes = lanes;
  } else if (!rc) {
    ivfpq_groups_release(s, made, n);
    free(lanes);
    *views = have;
  }
  free(all), free(made);
  return rc;
}

/* ---- partitions ---- */

static vs_rc check_part(ivfpq_segment *s, ivfpq_part *p, vs_err *err) {
  if (p->range[0].len && !was_checked(&p->range[0], s->part_checked, p->number, 1)) {
    if (ivfpq_check(p->codes, p->range[0].len) != p->entry.check)
      return vs_corrupt(err, "%s: damaged: checksum of the codes of partition %u", s->io->name, p->number);
    set_checked(&p->range[0], s->part_checked, p->number, 1);
  }
  if (p->range[1].len && !was_checked(&p->range[1], s->part_checked, p->number, 2)) {
    if (ivfpq_check(p->columns, p->range[1].len) != p->entry.column_check)
      return vs_corrupt(err, "%s: damaged: checksum of the columns of partition %u", s->io->name, p->number);
    set_checked(&p->range[1], s->part_checked, p->number, 2);
  }
  return VS_OK;
}

static void part_ranges(const ivfpq_segment *s, int want, const ivfpq_partition *e, vs_range r[2]) {
  uint64_t base = s->section[IVFPQ_SCAN].off, code_bytes = ivfpq_code_bytes(e->n_rows, s->params.m);
  r[0] = (vs_range){.off = base + e->off, .len = want & IVFPQ_WANT_CODES ? code_bytes : 0};
  r[1] = (vs_range){.off = base + e->off + ivfpq_round(code_bytes, 8), .len = want & IVFPQ_WANT_COLUMNS ? e->column_bytes : 0};
}

vs_rc ivfpq_parts_begin(ivfpq_segment *s, int want, ivfpq_part *parts, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  if (s->io->local) { /* one by one: there is nothing to be gained from asking for all of them at once */
    for (size_t i = 0; i < n && !rc; i++) {
      vs_range *r = parts[i].range;
      part_ranges(s, want, &parts[i].entry, r);
      rc = vs_io_begin(s->io, r, 2, err);
      for (int k = 0; k < 2 && !rc; k++)
        if (r[k].len && !flag_get(s->part_checked, parts[i].number, 1u << k)) vs_io_want(s->io, r[k].off, r[k].len);
      if (rc) ivfpq_parts_release(s, parts, i);
    }
    return rc;
  }
  vs_range *r = calloc(2 * n + 1, sizeof *r);
  if (!r) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) part_ranges(s, want, &parts[i].entry, r + 2 * i);
  rc = vs_io_begin(s->io, r, 2 * n, err);
  for (size_t i = 0; i < n && !rc; i++) memcpy(parts[i].range, r + 2 * i, sizeof parts[i].range);
  free(r);
  return rc;
}

vs_rc ivfpq_parts_wait(ivfpq_segment *s, ivfpq_part *parts, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    ivfpq_part *p = &parts[i];
    if ((rc = vs_io_wait(s->io, p->range, 2, err))) break;
    p->codes = p->range[0].ptr;
    p->terms = (const uint16_t *)(p->codes + ivfpq_term_offset(p->entry.n_rows, s->params.m));
    p->columns = p->range[1].len ? p->range[1].ptr : NULL;
    rc = check_part(s, p, err);
  }
  if (rc) ivfpq_parts_release(s, parts, n);
  return rc;
}

vs_rc ivfpq_parts_fetch(ivfpq_segment *s, int want, ivfpq_part *parts, size_t n, vs_err *err) {
  vs_rc rc = ivfpq_parts_begin(s, want, parts, n, err);
  return rc ? rc : ivfpq_parts_wait(s, parts, n, err);
}

void ivfpq_parts_release(ivfpq_segment *s, ivfpq_part *parts, size_t n) {
  for (size_t i = 0; i < n; i++) vs_io_release(s->io, parts[i].range, 2);
}

static uint32_t load_u32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}

vs_rc ivfpq_part_columns(ivfpq_segment *s, const ivfpq_part *part, ivfpq_column_view *view, size_t n_views, vs_err *err) {
  uint64_t n = part->entry.n_rows, left = part->columns ? part->entry.column_bytes : 0;
  const uint8_t *p = part->columns;
  size_t at = 0;
  for (uint32_t c = 0; c < s->params.n_columns && at < n_views; c++) {
    if (!(s->columns[c].flags & IVFPQ_FILTER)) continue;
    ivfpq_column_view *v = &view[at++];
    uint64_t nulls = (n + 7) / 8, values = s->columns[c].type == IVFPQ_TEXT ? n * 4 : n * 8, text = 0;
    if (left < nulls + values) return damaged(s, err, "column block size");
    *v = (ivfpq_column_view){.type = s->columns[c].type, .n_rows = (uint32_t)n, .nulls = p, .values = p + nulls};
    if (v->type == IVFPQ_TEXT) {
      v->ends = v->values;
      v->text = (const char *)p + nulls + values;
      for (uint64_t i = 0; i < n; i++) {
        uint64_t end = load_u32(v->ends + 4 * i);
        if (end < text) return damaged(s, err, "text column order");
        text = end;
      }
      if (left - nulls - values < text) return damaged(s, err, "text column size");
    }
    p += nulls + values + text;
    left -= nulls + values + text;
  }
  return at == n_views ? VS_OK : damaged(s, err, "column count");
}

/* ---- rows ---- */

size_t ivfpq_vector_bytes(const ivfpq_segment *s) { return (size_t)s->params.dim * (s->params.store ? 2 : 4); }

/* The bitmap of 65,536 rows, made on first use; NULL when memory is short: then rows are just checked again. */
static unsigned char *row_flags(unsigned char **flags, uint32_t row) {
  if (!flags) return NULL;
  unsigned char **slot = &flags[row / IVFPQ_ROWS_PER_FLAGS], *have = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
  if (have) return have;
  unsigned char *made = calloc(1, IVFPQ_ROWS_PER_FLAGS / 8);
  if (made && !__atomic_compare_exchange_n(slot, &have, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    free(made);
    return have;
  }
  return made;
}

static vs_rc check_row(ivfpq_segment *s, uint32_t row, const vs_range *r, const uint8_t *record, vs_err *err) {
  unsigned char *flags = row_flags(s->rows_checked, row);
  uint32_t at = row % IVFPQ_ROWS_PER_FLAGS, size = s->params.row_bytes;
  if (was_checked(r, flags, at / 8, 1u << at % 8)) return VS_OK;
  if (load_u32(record + size - 4) != ivfpq_check32(record, size - 4)) {
    if (s->io->forget) vs_io_forget(s->io);
    return vs_corrupt(err, "%s: damaged: checksum of row %u", s->io->name, row);
  }
  if (!r->checked) flag_set(flags, at / 8, 1u << at % 8);
  return VS_OK;
}

vs_rc ivfpq_sketch_mapped(ivfpq_segment *s, uint32_t row, const uint8_t **record, vs_err *err) {
  unsigned char *flags = row_flags(s->sketches_checked, row);
  uint32_t at = row % IVFPQ_ROWS_PER_FLAGS, size = s->params.sketch_bytes;
  *record = s->mapped_sketches + (uint64_t)row * size;
  if (flag_get(flags, at / 8, 1u << at % 8)) return VS_OK;
  if (load_u32(*record + size - 4) != ivfpq_check32(*record, size - 4))
    return vs_corrupt(err, "%s: damaged: checksum of the sketch of row %u", s->io->name, row);
  flag_set(flags, at / 8, 1u << at % 8);
  return VS_OK;
}

vs_rc ivfpq_row_mapped(ivfpq_segment *s, uint32_t row, const uint8_t **record, vs_err *err) {
  const vs_range none = {0};
  *record = s->mapped_rows + (uint64_t)row * s->params.row_bytes;
  return check_row(s, row, &none, *record, err);
}

vs_rc ivfpq_rows_begin(ivfpq_segment *s, const uint32_t *rows, size_t n, ivfpq_row *out, vs_err *err) {
  uint64_t base = s->section[IVFPQ_ROWS].off, size = s->params.row_bytes;
  vs_range *r = calloc(n + 1, sizeof *r);
  if (!r) return vs_nomem(err);
  for (size_t i = 0; i < n; i++) r[i] = (vs_range){.off = base + rows[i] * size, .len = size};
  vs_rc rc = vs_io_begin(s->io, r, n, err);
  for (size_t i = 0; i < n && !rc; i++) out[i].range = r[i];
  free(r);
  return rc;
}

vs_rc ivfpq_rows_fetch(ivfpq_segment *s, const uint32_t *rows, size_t n, ivfpq_row *out, vs_err *err) {
  vs_rc rc = ivfpq_rows_begin(s, rows, n, out, err);
  if (rc) return rc;
  for (size_t i = 0; i < n && !rc; i++) {
    if ((rc = vs_io_wait(s->io, &out[i].range, 1, err))) break;
    out[i].record = out[i].range.ptr;
    rc = check_row(s, rows[i], &out[i].range, out[i].record, err);
    if (!rc && out[i].range.checked) set_checked(&out[i].range, NULL, 0, 0);
  }
  if (rc) ivfpq_rows_release(s, out, n);
  return rc;
}

vs_rc ivfpq_rows_fetch_range(ivfpq_segment *s, uint32_t first, uint32_t n, ivfpq_row *out, vs_err *err) {
  uint64_t size = s->params.row_bytes;
  out->range = (vs_range){.off = s->section[IVFPQ_ROWS].off + first * size, .len = n * size};
  vs_rc rc = vs_io_fetch(s->io, &out->range, 1, err);
  if (rc) return rc;
  out->record = out->range.ptr;
  for (uint32_t i = 0; i < n && !rc; i++) rc = check_row(s, first + i, &out->range, out->record + i * size, err);
  if (rc) vs_io_release(s->io, &out->range, 1);
  else if (out->range.checked) set_checked(&out->range, NULL, 0, 0);
  return rc;
}

void ivfpq_rows_release(ivfpq_segment *s, ivfpq_row *rows, size_t n) {
  for (size_t i = 0; i < n; i++) vs_io_release(s->io, &rows[i].range, 1);
}

const float *ivfpq_row_vector(const ivfpq_segment *s, const uint8_t *record, float *buf) {
  if (!s->params.store && (uintptr_t)record % 4 == 0) return (const float *)record;
  if (!s->params.store) memcpy(buf, record, (size_t)s->params.dim * 4);
  else kern_get()->f16_to_f32((const uint16_t *)record, buf, s->params.dim);
  return buf;
}

vs_rc ivfpq_row_id(ivfpq_segment *s, const uint8_t *record, ivfpq_id *out, vs_err *err) {
  const uint8_t *slot = record + ivfpq_vector_bytes(s);
  memset(out, 0, sizeof *out);
  if (!s->params.id_text) {
    memcpy(&out->i, slot, 8);
    return VS_OK;
  }
  out->is_text = 1;
  out->len = load_u32(slot);
  out->text = (const char *)slot + 4;
  if (out->len <= s->params.id_width) return VS_OK;
  if (out->len > IVFPQ_MAX_TEXT) return damaged(s, err, "the length of a text id");
  const ivfpq_section *heap = &s->section[IVFPQ_IDHEAP];
  uint64_t off;
  memcpy(&off, slot + 4, 8);
  if (off > heap->size || out->len + 4ull > heap->size - off) return damaged(s, err, "a long id lies outside the file");
  vs_rc rc = read_copy(s->io, heap->off + off, out->len + 4ull, (void **)&out->heap, err);
  if (rc) return rc;
  if (load_u32((uint8_t *)out->heap + out->len) != ivfpq_check32(out->heap, out->len)) {
    ivfpq_id_free(out);
    return damaged(s, err, "checksum of a long id");
  }
  out->text = out->heap;
  return VS_OK;
}

void ivfpq_id_free(ivfpq_id *id) {
  free(id->heap);
  id->heap = NULL;
}

static vs_rc decode_columns(ivfpq_segment *s, const uint8_t *p, uint32_t left, ivfpq_value *values, vs_err *err) {
  for (uint32_t c = 0; c < s->params.n_columns; c++) {
    ivfpq_value *v = &values[c];
    memset(v, 0, sizeof *v);
    if (left < 1 || (*p && *p != s->columns[c].type)) return damaged(s, err, "a row's column values");
    v->tag = *p++, left--;
    if (v->tag == IVFPQ_TEXT) {
      if (left < 4 || load_u32(p) > left - 4) return damaged(s, err, "a row's column values");
      v->len = load_u32(p), v->text = (const char *)p + 4;
      if (v->len > IVFPQ_MAX_TEXT) return damaged(s, err, "the length of a text value");
      p += 4 + v->len, left -= 4 + v->len;
    } else if (v->tag) {
      if (left < 8) return damaged(s, err, "a row's column values");
      memcpy(v->tag == IVFPQ_INTEGER ? (void *)&v->i : (void *)&v->r, p, 8);
      p += 8, left -= 8;
    }
  }
  return left ? damaged(s, err, "a row's column values") : VS_OK;
}

vs_rc ivfpq_row_columns(ivfpq_segment *s, const uint8_t *record, ivfpq_value *values, uint8_t **buf, vs_err *err) {
  const ivfpq_section *x = &s->section[IVFPQ_COLUMNS];
  const uint8_t *slot = record + s->params.row_bytes - 16;
  uint64_t off;
  uint32_t size = load_u32(slot + 8);
  *buf = NULL;
  if (!s->params.n_columns) return VS_OK;
  memcpy(&off, slot, 8);
  if (size < 4 || off > x->size || size > x->size - off) return damaged(s, err, "a row's columns lie outside the file");
  vs_range r = {.off = x->off + off, .len = size};
  vs_rc rc = s->io->stable ? vs_io_fetch(s->io, &r, 1, err) : read_copy(s->io, r.off, size, (void **)buf, err);
  if (rc) return rc;
  const uint8_t *bytes = s->io->stable ? r.ptr : *buf; /* a stable range need not be held */
  if (load_u32(bytes + size - 4) != ivfpq_check32(bytes, size - 4)) rc = damaged(s, err, "checksum of a row's columns");
  else rc = decode_columns(s, bytes, size - 4, values, err);
  if (s->io->stable) vs_io_release(s->io, &r, 1);
  if (rc) free(*buf), *buf = NULL;
  return rc;
}

void ivfpq_row_extras(const ivfpq_segment *s, const uint8_t *record, vs_range out[2]) {
  const ivfpq_section *columns = &s->section[IVFPQ_COLUMNS], *heap = &s->section[IVFPQ_IDHEAP];
  const uint8_t *slot = record + s->params.row_bytes - 16, *id = record + ivfpq_vector_bytes(s);
  uint64_t off;
  memset(out, 0, 2 * sizeof *out);
  if (s->params.n_columns) {
    uint32_t size = load_u32(slot + 8);
    memcpy(&off, slot, 8);
    if (off <= columns->size && size <= columns->size - off) out[0] = (vs_range){.off = columns->off + off, .len = size};
  }
  if (s->params.id_text && load_u32(id) > s->params.id_width) {
    uint64_t size = load_u32(id) + 4ull;
    memcpy(&off, id + 4, 8);
    if (off <= heap->size && size <= heap->size - off && size <= IVFPQ_MAX_TEXT + 4ull)
      out[1] = (vs_range){.off = heap->off + off, .len = size};
  }
}

/* ---- the id directory ---- */

/* Reads page `at` of the level that starts at page `level0` and checks it. */
static vs_rc fetch_page(ivfpq_segment *s, uint64_t page, vs_range *r, uint32_t *count, uint32_t max, vs_err *err) {
  uint64_t check;
  *r = (vs_range){.off = s->section[IVFPQ_IDDIR].off + page * IVFPQ_PAGE, .len = IVFPQ_PAGE};
  vs_rc rc = vs_io_fetch(s->io, r, 1, err);
  if (rc) return rc;
  memcpy(&check, r->ptr + IVFPQ_PAGE - 8, 8);
  *count = load_u32(r->ptr);
  if (check != ivfpq_check(r->ptr, IVFPQ_PAGE - 8)) rc = damaged(s, err, "checksum of an id directory page");
  else if (*count < 1 || *count > max) rc = damaged(s, err, "an id directory page");
  if (rc) vs_io_release(s->io, r, 1);
  return rc;
}

static uint64_t load_u64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}

/* The leaf page where entries with `key` start, or would. Equal keys may run over several pages: the last fence below `key`
 * leads to the first of them. */
static vs_rc find_leaf(ivfpq_segment *s, uint64_t key, uint64_t *leaf, vs_err *err) {
  uint64_t pages[8], level0[8], at = 0;
  uint32_t levels = ivfpq_iddir_levels(s->params.n_rows, pages);
  level0[0] = 0;
  for (uint32_t l = 1; l < levels; l++) level0[l] = level0[l - 1] + pages[l - 1];
  for (uint32_t l = levels; l-- > 1;) {
    vs_range r;
    uint32_t n, lo = 0;
    vs_rc rc = fetch_page(s, level0[l] + at, &r, &n, IVFPQ_FENCE_MAX, err);
    if (rc) return rc;
    for (uint32_t hi = n; lo < hi;) {
      uint32_t mid = (lo + hi) / 2;
      if (load_u64(r.ptr + 8 + 8 * mid) < key) lo = mid + 1;
      else hi = mid;
    }
    vs_io_release(s->io, &r, 1);
    at = at * IVFPQ_FENCE_MAX + (lo ? lo - 1 : 0);
    if (at >= pages[l - 1]) return damaged(s, err, "id directory");
  }
  *leaf = at;
  return VS_OK;
}

static int id_equal(const ivfpq_id *a, const ivfpq_id *b) {
  if (a->is_text != b->is_text) return 0;
  return a->is_text ? a->len == b->len && !memcmp(a->text, b->text, a->len) : a->i == b->i;
}

static vs_rc row_has_id(ivfpq_segment *s, uint32_t row, const ivfpq_id *id, int *found, vs_err *err) {
  ivfpq_row r;
  ivfpq_id have;
  if (row >= s->params.n_rows) return damaged(s, err, "the id directory names a row that does not exist");
  vs_rc rc = ivfpq_rows_fetch(s, &row, 1, &r, err);
  if (rc) return rc;
  rc = ivfpq_row_id(s, r.record, &have, err);
  if (!rc) {
    *found = id_equal(&have, id);
    ivfpq_id_free(&have);
  }
  ivfpq_rows_release(s, &r, 1);
  return rc;
}

vs_rc ivfpq_find_id(ivfpq_segment *s, const ivfpq_id *id, uint32_t *row, int *found, vs_err *err) {
  uint64_t pages[8], leaf = 0, key;
  *found = 0, *row = 0;
  if (!s->params.n_rows || (id->is_text != 0) != (s->params.id_text != 0)) return VS_OK;
  key = id->is_text ? ivfpq_key_text(id->text, id->len) : ivfpq_key_int(id->i);
  ivfpq_iddir_levels(s->params.n_rows, pages);
  vs_rc rc = find_leaf(s, key, &leaf, err);
  for (; !rc && !*found && leaf < pages[0]; leaf++) {
    vs_range r;
    uint32_t n, lo = 0;
    if ((rc = fetch_page(s, leaf, &r, &n, IVFPQ_LEAF_MAX, err))) break;
    for (uint32_t hi = n; lo < hi;) {
      uint32_t mid = (lo + hi) / 2;
      if (load_u64(r.ptr + 8 + (size_t)IVFPQ_LEAF_ENTRY * mid) < key) lo = mid + 1;
      else hi = mid;
    }
    for (; lo < n && !rc && !*found; lo++) {
      const uint8_t *e = r.ptr + 8 + (size_t)IVFPQ_LEAF_ENTRY * lo;
      if (load_u64(e) != key) break;
      *row = load_u32(e + 8);
      rc = row_has_id(s, *row, id, found, err);
    }
    vs_io_release(s->io, &r, 1);
    if (lo < n) break; /* a greater key: no more equal ones */
  }
  return rc;
}
