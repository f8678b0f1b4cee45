/* ivfpq_verify.c - the validator of a segment: walks everything that ivfpq_format.h describes; see ivfpq_verify.
 *
 * The walk, in this order: header, trailer and footer | every section's checksum | no overlaps, zeros between sections
 * | floats that must be finite | groups and partitions | row records | sketches | id directory. Bytes that hash right can still
 * tell nonsense (a faulty writer, a forged file), so every stage reads the meaning too, and reads it without the "was
 * checked" flags that queries leave behind.
 *
 * Damaged data is a fault: reported with section and place, and the walk goes on behind it. What the store or the
 * allocator refuses ends the walk with their code. Memory: one bit per row, one partition, and about a MiB of whatever
 * is read.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../kernels/kern.h"
#include "ivfpq_model.h"
#include "ivfpq_segment.h"

enum {
  PIECE = 1 << 20,     /* bytes read at once */
  MAX_SECTIONS = 64,   /* what ivfpq_segment_open accepts */
  MAX_ROUND_ROWS = 256,
  MAX_FAULTS = 1000    /* nobody reads more, and a damaged directory alone may have one per row */
};

static const char *const section_names[IVFPQ_N_SECTIONS] = {
    [IVFPQ_SCAN] = "SCAN",       [IVFPQ_ROWS] = "ROWS",         [IVFPQ_IDHEAP] = "IDHEAP",
    [IVFPQ_COLUMNS] = "COLUMNS", [IVFPQ_IDDIR] = "IDDIR",       [IVFPQ_GROUPS] = "GROUPS",
    [IVFPQ_MEAN] = "MEAN",       [IVFPQ_CODEBOOK] = "CODEBOOK", [IVFPQ_PARAMS] = "PARAMS",
    [IVFPQ_PROJECTION] = "PROJECTION", [IVFPQ_SKETCH] = "SKETCH"};

typedef struct walk {
  ivfpq_segment *s;
  ivfpq_report report;
  void *ctx;
  vs_err *err;
  int n_faults, stop; /* stop: the caller or MAX_FAULTS ended the walk */
} walk;

static void fault(walk *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void fault(walk *w, const char *fmt, ...) {
  char text[1200];
  va_list ap;
  if (w->stop) return;
  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  w->stop = w->report(w->ctx, text) != 0 || ++w->n_faults == MAX_FAULTS;
}

/* Turns "corrupt" into a fault and lets everything else through. */
static vs_rc judge(walk *w, vs_rc rc, const vs_err *e, const char *place, uint64_t number) {
  if (rc == VS_CORRUPT) {
    fault(w, "%s %llu: %s", place, (unsigned long long)number, e->text);
    return VS_OK;
  }
  return rc ? vs_fail(w->err, rc, "%s", e->text) : VS_OK;
}

static uint32_t load_u32(const uint8_t *p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
static uint64_t load_u64(const uint8_t *p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
/* Index of the first byte that is not zero, or n. */
static size_t first_nonzero(const uint8_t *p, size_t n) {
  size_t i = 0;
  while (i < n && !p[i]) i++;
  return i;
}

/* ---- header, footer, sections as bytes ---- */

/* Open has checked the trailer and the footer; left are the fields that say nothing to it, and sections it does not
 * know. */
static vs_rc read_footer(walk *w, ivfpq_section *sections, uint32_t *n, uint64_t *footer_off) {
  vs_io *io = w->s->io;
  vs_range r[2] = {{.off = 0, .len = IVFPQ_HEADER}, {.off = io->size - IVFPQ_TRAILER, .len = IVFPQ_TRAILER}};
  vs_rc rc = vs_io_fetch(io, r, 2, w->err);
  if (rc) return rc;
  if (memcmp(r[0].ptr, IVFPQ_MAGIC, 8)) fault(w, "header: magic");
  if (load_u32(r[0].ptr + 8) != IVFPQ_FORMAT) fault(w, "header: format %u", load_u32(r[0].ptr + 8));
  if (first_nonzero(r[0].ptr + 12, IVFPQ_HEADER - 12) != IVFPQ_HEADER - 12)
    fault(w, "header: a reserved byte is not zero");
  if (first_nonzero(r[1].ptr + 32, 16) != 16) fault(w, "trailer: a reserved byte is not zero");
  *footer_off = load_u64(r[1].ptr), *n = load_u32(r[1].ptr + 8);
  vs_io_release(io, r, 2);
  if (*n > MAX_SECTIONS) return vs_corrupt(w->err, "%s: the file changed while it was read", io->name);
  vs_range f = {.off = *footer_off, .len = *n * sizeof *sections};
  if ((rc = vs_io_fetch(io, &f, 1, w->err))) return rc;
  memcpy(sections, f.ptr, f.len);
  vs_io_release(io, &f, 1);
  return VS_OK;
}

static const char *section_name(uint32_t id) {
  return id && id < IVFPQ_N_SECTIONS ? section_names[id] : "an unknown section";
}

static vs_rc check_section(walk *w, const ivfpq_section *x, XXH3_state_t *state) {
  XXH3_64bits_reset(state);
  for (uint64_t at = 0; at < x->size; at += PIECE) {
    vs_range r = {.off = x->off + at, .len = x->size - at < PIECE ? x->size - at : PIECE};
    vs_rc rc = vs_io_fetch(w->s->io, &r, 1, w->err);
    if (rc) return rc;
    XXH3_64bits_update(state, r.ptr, r.len);
    vs_io_release(w->s->io, &r, 1);
  }
  if (XXH3_64bits_digest(state) != x->check)
    fault(w, "%s: checksum of the section of %llu bytes at %llu", section_name(x->id), (unsigned long long)x->size,
          (unsigned long long)x->off);
  if (x->flags & ~(uint32_t)IVFPQ_IGNORABLE) fault(w, "%s: unknown section flags %u", section_name(x->id), x->flags);
  return VS_OK;
}

static vs_rc check_gap(walk *w, uint64_t from, uint64_t to) {
  while (from < to) {
    vs_range r = {.off = from, .len = to - from < PIECE ? to - from : PIECE};
    vs_rc rc = vs_io_fetch(w->s->io, &r, 1, w->err);
    if (rc) return rc;
    size_t at = first_nonzero(r.ptr, r.len);
    vs_io_release(w->s->io, &r, 1);
    if (at < r.len) {
      fault(w, "the gap between sections has a byte that is not zero at %llu", (unsigned long long)(from + at));
      return VS_OK;
    }
    from += r.len;
  }
  return VS_OK;
}

static int by_offset(const void *pa, const void *pb) {
  const ivfpq_section *a = pa, *b = pb;
  if (a->off != b->off) return a->off < b->off ? -1 : 1;
  return a->size < b->size ? -1 : a->size > b->size; /* an empty section may share the offset of the next */
}

static vs_rc verify_bytes(walk *w) {
  ivfpq_section sections[MAX_SECTIONS];
  uint64_t footer_off, end = IVFPQ_HEADER;
  uint32_t n;
  vs_rc rc = read_footer(w, sections, &n, &footer_off);
  if (rc) return rc;
  XXH3_state_t *state = XXH3_createState();
  if (!state) return vs_nomem(w->err);
  for (uint32_t i = 0; i < n && !rc && !w->stop; i++) rc = check_section(w, &sections[i], state);
  XXH3_freeState(state);
  qsort(sections, n, sizeof *sections, by_offset);
  for (uint32_t i = 0; i < n && !rc && !w->stop; i++) {
    const ivfpq_section *x = &sections[i];
    if (x->off < end && x->size) fault(w, "%s: overlaps the section before it", section_name(x->id));
    else if (x->off > end) rc = check_gap(w, end, x->off);
    if (x->off + x->size > end) end = x->off + x->size;
  }
  return rc ? rc : check_gap(w, end, footer_off);
}

/* ---- floats ---- */

static void check_finite(walk *w, const char *what, const float *v, uint64_t n) {
  if (v && !kern_get()->all_finite_f32(v, n)) fault(w, "%s: a value is NaN or infinite", what);
}

/* An object of a store is opened without it. */
static vs_rc verify_codebook(walk *w) {
  vs_range r[2];
  vs_err why = {0};
  if (!w->s->params.m) return VS_OK;
  vs_rc rc = ivfpq_codebook_begin(w->s, r, &why);
  if (!rc) rc = ivfpq_codebook_wait(w->s, r, &why);
  if (rc == VS_CORRUPT) {
    fault(w, "%s", why.text);
    return VS_OK;
  }
  return rc ? vs_fail(w->err, rc, "%s", why.text) : VS_OK;
}

static void verify_floats(walk *w) {
  const ivfpq_params *p = &w->s->params;
  const float scalars[3] = {p->beta, p->term0, p->term_step};
  uint64_t lanes = ivfpq_round(p->n_groups, 16);
  check_finite(w, "PARAMS", scalars, 3);
  check_finite(w, "PARAMS, group centroids", w->s->group_bias, lanes + lanes * p->dim_padded);
  if (!p->m) return;
  check_finite(w, "MEAN", w->s->mean, p->dim);
  if (ivfpq_codebook_of(w->s)) check_finite(w, "CODEBOOK", ivfpq_codebook_of(w->s)->scale, p->m + (uint64_t)p->turn);
  if (w->s->projection) check_finite(w, "PROJECTION", w->s->projection_scale, p->project);
}

/* ---- GROUPS and SCAN ---- */

typedef struct totals {
  uint64_t rows, scan_end, groups_end; /* of what was walked so far */
  int broken; /* a group could not be read: the sums mean nothing */
} totals;

static uint64_t view_bytes(const ivfpq_column_view *v) {
  uint64_t n = v->n_rows, nulls = (n + 7) / 8;
  if (v->type != IVFPQ_TEXT) return nulls + n * 8;
  return nulls + n * 4 + (n ? load_u32(v->ends + 4 * (n - 1)) : 0);
}

static vs_rc verify_columns(walk *w, const ivfpq_part *part, ivfpq_column_view *views, size_t n_views) {
  vs_err e = {0};
  uint64_t used = 0;
  vs_rc rc = ivfpq_part_columns(w->s, part, views, n_views, &e);
  if (rc) return judge(w, rc, &e, "SCAN, partition", part->number);
  for (size_t i = 0; i < n_views; i++) used += view_bytes(&views[i]);
  if (used != part->entry.column_bytes) fault(w, "SCAN, partition %u: bytes behind its columns", part->number);
  return VS_OK;
}

static vs_rc verify_part(walk *w, uint32_t number, const ivfpq_partition *e, ivfpq_column_view *views, size_t n_views) {
  const ivfpq_section *x = &w->s->section[IVFPQ_SCAN];
  ivfpq_part part = {.number = number, .entry = *e};
  uint64_t code_bytes = ivfpq_code_bytes(e->n_rows, w->s->params.m), at = ivfpq_round(code_bytes, 8);
  vs_range r = {.off = x->off + e->off, .len = at + e->column_bytes};
  vs_rc rc = vs_io_fetch(w->s->io, &r, 1, w->err);
  if (rc) return rc;
  if (ivfpq_check(r.ptr, code_bytes) != e->check) fault(w, "SCAN, partition %u: checksum of the codes", number);
  if (ivfpq_check(r.ptr + at, e->column_bytes) != e->column_check) {
    fault(w, "SCAN, partition %u: checksum of the columns", number);
  } else if (e->n_rows || e->column_bytes) {
    part.columns = e->column_bytes ? r.ptr + at : NULL;
    rc = verify_columns(w, &part, views, n_views);
  }
  vs_io_release(w->s->io, &r, 1);
  return rc;
}

static vs_rc verify_group(walk *w, const ivfpq_group_view *v, totals *t, ivfpq_column_view *views, size_t n_views) {
  uint64_t lanes = ivfpq_round(v->n, 16);
  vs_rc rc = VS_OK;
  check_finite(w, "GROUPS, norms and scales", v->norm2, 2 * lanes);
  if (v->rows) check_finite(w, "GROUPS, row scales", v->row_scale, v->n);
  for (uint64_t i = v->n; i < lanes && w->s->params.m; i++)
    if (v->norm2[i] != IVFPQ_NOWHERE) fault(w, "GROUPS, group %u: a lane behind its partitions", v->group);
  for (uint32_t i = 0; i < v->n && !rc && !w->stop; i++) {
    const ivfpq_partition *e = &v->entries[i];
    uint32_t number = v->first + i;
    if (e->row0 != t->rows)
      fault(w, "GROUPS, partition %u: starts at row %llu, not %llu", number, (unsigned long long)e->row0,
            (unsigned long long)t->rows);
    if (e->off < t->scan_end) fault(w, "GROUPS, partition %u: overlaps the one before it", number);
    t->rows = e->row0 + e->n_rows;
    t->scan_end = e->off + ivfpq_round(ivfpq_code_bytes(e->n_rows, w->s->params.m), 8) + e->column_bytes;
    rc = verify_part(w, number, e, views, n_views);
  }
  return rc;
}

static vs_rc verify_partitions(walk *w) {
  const ivfpq_params *p = &w->s->params;
  size_t n_views = 0;
  totals t = {0};
  vs_rc rc = VS_OK;
  for (uint32_t c = 0; c < p->n_columns; c++) n_views += w->s->columns[c].flags & IVFPQ_FILTER ? 1 : 0;
  ivfpq_column_view *views = calloc(n_views + 1, sizeof *views);
  if (!views) return vs_nomem(w->err);
  for (uint32_t g = 0; g < p->n_groups && !rc && !w->stop; g++) {
    ivfpq_group_view v;
    vs_err e = {0};
    if (w->s->groups[g].off < t.groups_end) fault(w, "PARAMS, group %u: overlaps the one before it", g);
    t.groups_end = w->s->groups[g].off + w->s->groups[g].size;
    if ((rc = ivfpq_groups_fetch(w->s, &g, 1, &v, &e))) {
      t.broken = 1;
      rc = judge(w, rc, &e, "GROUPS, group", g);
      continue;
    }
    rc = verify_group(w, &v, &t, views, n_views);
    ivfpq_groups_release(w->s, &v, 1);
  }
  free(views);
  if (rc || t.broken) return rc;
  if (t.rows != p->n_rows)
    fault(w, "GROUPS: the partitions hold %llu rows, PARAMS says %llu", (unsigned long long)t.rows,
          (unsigned long long)p->n_rows);
  return VS_OK;
}

/* ---- ROWS, IDHEAP, COLUMNS ---- */

/* No overlong forms, no surrogates, nothing above U+10FFFF, no NUL: what input.h admits as an id. */
static int valid_text(const uint8_t *p, size_t n) {
  for (size_t i = 0; i < n;) {
    uint8_t c = p[i++];
    size_t more = c < 0x80 ? 0 : c < 0xe0 ? 1 : c < 0xf0 ? 2 : 3;
    if (c == 0 || (c >= 0x80 && c < 0xc2) || c > 0xf4 || n - i < more) return 0;
    uint8_t low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80, high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
    for (; more; more--, i++, low = 0x80, high = 0xbf)
      if (p[i] < low || p[i] > high) return 0;
  }
  return 1;
}

typedef struct rows_walk {
  float *vector;
  ivfpq_value *values;
  uint64_t heap_bytes, column_bytes; /* that the rows account for */
  int broken;
} rows_walk;

static vs_rc verify_row_values(walk *w, rows_walk *t, uint64_t row, const uint8_t *record) {
  const ivfpq_params *p = &w->s->params;
  vs_err e = {0};
  ivfpq_id id;
  uint8_t *buf;
  if (!kern_get()->all_finite_f32(ivfpq_row_vector(w->s, record, t->vector), p->dim))
    fault(w, "ROWS, row %llu: a value is NaN or infinite", (unsigned long long)row);
  vs_rc rc = ivfpq_row_id(w->s, record, &id, &e);
  if (rc) {
    t->broken = 1;
    if ((rc = judge(w, rc, &e, "ROWS, id of row", row))) return rc;
  } else {
    if (id.is_text && id.len > p->id_width) t->heap_bytes += id.len + 4ull;
    if (id.is_text && (id.len > IVFPQ_MAX_TEXT || !valid_text((const uint8_t *)id.text, id.len)))
      fault(w, "ROWS, row %llu: the id is not valid text", (unsigned long long)row);
    ivfpq_id_free(&id);
  }
  if (!p->n_columns) return VS_OK;
  e = (vs_err){0};
  t->column_bytes += load_u32(record + p->row_bytes - 8);
  rc = ivfpq_row_columns(w->s, record, t->values, &buf, &e);
  free(buf);
  return judge(w, rc, &e, "COLUMNS, row", row);
}

static vs_rc verify_records(walk *w, rows_walk *t) {
  uint64_t base = w->s->section[IVFPQ_ROWS].off, size = w->s->params.row_bytes, n_rows = w->s->params.n_rows;
  uint64_t per = PIECE / size ? PIECE / size : 1;
  for (uint64_t row = 0; row < n_rows && !w->stop; row += per) {
    uint64_t n = n_rows - row < per ? n_rows - row : per;
    vs_range r = {.off = base + row * size, .len = n * size};
    vs_rc rc = vs_io_fetch(w->s->io, &r, 1, w->err);
    if (rc) return rc;
    for (uint64_t i = 0; i < n && !rc && !w->stop; i++) {
      const uint8_t *record = r.ptr + i * size;
      if (load_u32(record + size - 4) == ivfpq_check32(record, size - 4)) {
        rc = verify_row_values(w, t, row + i, record);
      } else {
        t->broken = 1;
        fault(w, "ROWS, row %llu: checksum", (unsigned long long)(row + i));
      }
    }
    vs_io_release(w->s->io, &r, 1);
    if (rc) return rc;
  }
  return VS_OK;
}

static vs_rc verify_rows(walk *w) {
  const ivfpq_params *p = &w->s->params;
  rows_walk t = {.vector = malloc((size_t)p->dim * sizeof(float)),
                 .values = calloc(p->n_columns + 1, sizeof(ivfpq_value))};
  vs_rc rc = t.vector && t.values ? verify_records(w, &t) : vs_nomem(w->err);
  free(t.vector), free(t.values);
  if (rc || t.broken) return rc;
  if (t.heap_bytes != w->s->section[IVFPQ_IDHEAP].size) fault(w, "IDHEAP: the rows do not account for its bytes");
  if (t.column_bytes != w->s->section[IVFPQ_COLUMNS].size) fault(w, "COLUMNS: the rows do not account for its bytes");
  return VS_OK;
}

/* ---- SKETCH ---- */

typedef struct sketch_walk {
  float *raw, *x;  /* a row as stored, and in the model's space */
  ivfpq_model space;
} sketch_walk;

/* What a sketch may differ from its row: half a step, and what floats round. */
#define SKETCH_SLACK 1e-5f

/* Does a sketch say what its row is? */
static const char *sketch_fault(const walk *w, sketch_walk *t, const uint8_t *record, const uint8_t *sketch) {
  const ivfpq_params *p = &w->s->params;
  uint32_t coded = ivfpq_coded_dim(p);
  float scale, norm, want = 0, largest = 0;
  memcpy(&scale, sketch + coded, 4), memcpy(&norm, sketch + coded + 4, 4);
  if (load_u32(sketch + coded + 8) != ivfpq_check32(sketch, coded + 8)) return "checksum";
  if (!isfinite(scale) || scale < 0 || !isfinite(norm)) return "a value is NaN or infinite";
  ivfpq_model_prepare(&t->space, ivfpq_row_vector(w->s, record, t->raw), t->x);
  for (uint32_t j = 0; j < p->dim_padded; j++) largest = fmaxf(largest, fabsf(t->x[j]));
  for (uint32_t j = 0; j < coded; j++) {
    float x = j < p->dim_padded ? t->x[j] : 0, y = scale * ((int)sketch[j] - 128), e = x - y;
    if (!(fabsf(e) <= .5f * scale + SKETCH_SLACK * largest)) return "it is not what the row says";
    want += y * y + e * e;
  }
  if (p->metric == IVFPQ_DOT) want = 0;
  return fabsf(norm - want) <= 1e-3f * want + 1e-30f ? NULL : "its norm is not what the row says";
}

static vs_rc walk_sketches(walk *w, sketch_walk *t) {
  const ivfpq_params *p = &w->s->params;
  uint64_t per = PIECE / p->row_bytes ? PIECE / p->row_bytes : 1;
  for (uint64_t row = 0; row < p->n_rows && !w->stop; row += per) {
    uint64_t n = p->n_rows - row < per ? p->n_rows - row : per;
    vs_range r[2] = {{.off = w->s->section[IVFPQ_ROWS].off + row * p->row_bytes, .len = n * p->row_bytes},
                     {.off = w->s->section[IVFPQ_SKETCH].off + row * p->sketch_bytes, .len = n * p->sketch_bytes}};
    vs_rc rc = vs_io_fetch(w->s->io, r, 2, w->err);
    if (rc) return rc;
    for (uint64_t i = 0; i < n && !w->stop; i++) {
      const uint8_t *record = r[0].ptr + i * p->row_bytes;
      if (load_u32(record + p->row_bytes - 4) != ivfpq_check32(record, p->row_bytes - 4)) continue; /* ROWS told */
      const char *what = sketch_fault(w, t, record, r[1].ptr + i * p->sketch_bytes);
      if (what) fault(w, "SKETCH, row %llu: %s", (unsigned long long)(row + i), what);
    }
    vs_io_release(w->s->io, r, 2);
  }
  return VS_OK;
}

static vs_rc verify_sketches(walk *w) {
  const ivfpq_params *p = &w->s->params;
  if (!p->sketch_bytes) return VS_OK;
  sketch_walk t = {.raw = malloc((size_t)p->dim * sizeof(float)), .x = malloc((size_t)p->dim_padded * sizeof(float)),
                   .space = {.metric = (ivfpq_metric)p->metric, .dim = p->dim, .dim_padded = p->dim_padded, .mean = w->s->mean}};
  vs_rc rc = t.raw && t.x ? walk_sketches(w, &t) : vs_nomem(w->err);
  free(t.raw), free(t.x);
  return rc;
}

/* ---- IDDIR ---- */

typedef struct dir_walk {
  uint8_t *seen;       /* a bit per row */
  vs_range *ranges;    /* room for IVFPQ_FENCE_MAX */
  int have;            /* an entry came before: */
  uint64_t key;
  uint32_t row;
} dir_walk;

static vs_rc fetch_page(walk *w, uint64_t page, uint64_t expected, uint32_t entry_bytes, vs_range *r, int *ok) {
  *r = (vs_range){.off = w->s->section[IVFPQ_IDDIR].off + page * IVFPQ_PAGE, .len = IVFPQ_PAGE};
  vs_rc rc = vs_io_fetch(w->s->io, r, 1, w->err);
  if (rc) return rc;
  size_t used = 8 + (size_t)expected * entry_bytes;
  const char *what = load_u64(r->ptr + IVFPQ_PAGE - 8) != ivfpq_check(r->ptr, IVFPQ_PAGE - 8) ? "checksum"
                     : load_u32(r->ptr) != expected                                           ? "entry count"
                     : load_u32(r->ptr + 4) ? "a reserved byte is not zero"
                     : first_nonzero(r->ptr + used, IVFPQ_PAGE - 8 - used) != IVFPQ_PAGE - 8 - used
                         ? "bytes behind the entries"
                         : NULL;
  *ok = !what;
  if (!what) return VS_OK;
  fault(w, "IDDIR, page %llu: %s", (unsigned long long)page, what);
  vs_io_release(w->s->io, r, 1);
  return VS_OK;
}

/* The id of a row has the key that its entry states. */
static vs_rc verify_key(walk *w, const uint8_t *record, uint32_t row, uint64_t key) {
  vs_err e = {0};
  ivfpq_id id;
  vs_rc rc = ivfpq_row_id(w->s, record, &id, &e);
  if (rc) return judge(w, rc, &e, "IDDIR, id of row", row);
  if (key != (id.is_text ? ivfpq_key_text(id.text, id.len) : ivfpq_key_int(id.i)))
    fault(w, "IDDIR, row %u: its id has another key", row);
  ivfpq_id_free(&id);
  return VS_OK;
}

/* Keys of the rows of entries [0, n) of a leaf, in one round. */
static vs_rc verify_keys(walk *w, dir_walk *d, const uint8_t *entries, size_t n) {
  uint64_t base = w->s->section[IVFPQ_ROWS].off, size = w->s->params.row_bytes;
  size_t m = 0;
  for (size_t i = 0; i < n; i++) {
    uint32_t row = load_u32(entries + i * IVFPQ_LEAF_ENTRY + 8);
    if (row < w->s->params.n_rows) d->ranges[m++] = (vs_range){.off = base + row * size, .len = size};
  }
  vs_rc rc = vs_io_fetch(w->s->io, d->ranges, m, w->err);
  if (rc) return rc;
  for (size_t i = 0, at = 0; i < n && !rc && !w->stop; i++) {
    uint32_t row = load_u32(entries + i * IVFPQ_LEAF_ENTRY + 8);
    if (row < w->s->params.n_rows)
      rc = verify_key(w, d->ranges[at++].ptr, row, load_u64(entries + i * IVFPQ_LEAF_ENTRY));
  }
  vs_io_release(w->s->io, d->ranges, m);
  return rc;
}

static void verify_entry(walk *w, dir_walk *d, uint64_t key, uint32_t row) {
  if (d->have && (key < d->key || (key == d->key && row <= d->row)))
    fault(w, "IDDIR, row %u: its entry is out of order", row);
  else if (d->have && key == d->key && !w->s->params.id_text)
    fault(w, "IDDIR, rows %u and %u have one id", d->row, row);
  d->have = 1, d->key = key, d->row = row;
  if (row >= w->s->params.n_rows) fault(w, "IDDIR: row %u does not exist", row);
  else if (d->seen[row / 8] >> row % 8 & 1) fault(w, "IDDIR, row %u: has two entries", row);
  else d->seen[row / 8] |= (uint8_t)(1u << row % 8);
}

static vs_rc verify_leaf(walk *w, dir_walk *d, uint64_t page) {
  uint64_t left = w->s->params.n_rows - page * IVFPQ_LEAF_MAX, n = left < IVFPQ_LEAF_MAX ? left : IVFPQ_LEAF_MAX;
  uint64_t per = PIECE / w->s->params.row_bytes;
  vs_range r;
  int ok;
  vs_rc rc = fetch_page(w, page, n, IVFPQ_LEAF_ENTRY, &r, &ok);
  if (rc || !ok) return rc;
  per = per < 1 ? 1 : per > MAX_ROUND_ROWS ? MAX_ROUND_ROWS : per;
  for (uint64_t i = 0; i < n && !w->stop; i++) {
    const uint8_t *e = r.ptr + 8 + i * IVFPQ_LEAF_ENTRY;
    verify_entry(w, d, load_u64(e), load_u32(e + 8));
  }
  for (uint64_t i = 0; i < n && !rc && !w->stop; i += per)
    rc = verify_keys(w, d, r.ptr + 8 + i * IVFPQ_LEAF_ENTRY, n - i < per ? n - i : per);
  vs_io_release(w->s->io, &r, 1);
  return rc;
}

/* Page `page` of IDDIR lists the first keys of n pages from `below` on. Leaves and fences start at the same place. */
static vs_rc verify_fences(walk *w, dir_walk *d, uint64_t page, uint64_t below, uint64_t n) {
  vs_range r;
  int ok;
  vs_rc rc = fetch_page(w, page, n, 8, &r, &ok);
  if (rc || !ok) return rc;
  for (uint64_t i = 0; i < n; i++)
    d->ranges[i] = (vs_range){.off = w->s->section[IVFPQ_IDDIR].off + (below + i) * IVFPQ_PAGE + 8, .len = 8};
  if (!(rc = vs_io_fetch(w->s->io, d->ranges, n, w->err))) {
    for (uint64_t i = 0; i < n && !w->stop; i++)
      if (memcmp(d->ranges[i].ptr, r.ptr + 8 + 8 * i, 8))
        fault(w, "IDDIR, page %llu: entry %llu is not the first key of its page", (unsigned long long)page,
              (unsigned long long)i);
    vs_io_release(w->s->io, d->ranges, n);
  }
  vs_io_release(w->s->io, &r, 1);
  return rc;
}

/* Rows that no leaf names cannot be found by their id. */
static void verify_seen(walk *w, const dir_walk *d) {
  uint64_t missing = 0, first = 0;
  for (uint64_t row = 0; row < w->s->params.n_rows; row++)
    if (!(d->seen[row / 8] >> row % 8 & 1) && !missing++) first = row;
  if (missing) fault(w, "IDDIR: has no entry for %llu rows, the first is row %llu", (unsigned long long)missing,
                     (unsigned long long)first);
}

static vs_rc verify_iddir(walk *w) {
  uint64_t pages[8] = {0}, base = 0;
  uint32_t levels = ivfpq_iddir_levels(w->s->params.n_rows, pages);
  dir_walk d = {.seen = calloc(w->s->params.n_rows / 8 + 1, 1), .ranges = malloc(IVFPQ_FENCE_MAX * sizeof *d.ranges)};
  vs_rc rc = d.seen && d.ranges ? VS_OK : vs_nomem(w->err);
  for (uint64_t page = 0; page < pages[0] && !rc && !w->stop; page++) rc = verify_leaf(w, &d, page);
  for (uint32_t l = 1; l < levels && !rc; base += pages[l - 1], l++)
    for (uint64_t i = 0; i < pages[l] && !rc && !w->stop; i++) {
      uint64_t at = i * IVFPQ_FENCE_MAX, n = pages[l - 1] - at < IVFPQ_FENCE_MAX ? pages[l - 1] - at : IVFPQ_FENCE_MAX;
      rc = verify_fences(w, &d, base + pages[l - 1] + i, base + at, n);
    }
  if (!rc && !w->stop) verify_seen(w, &d);
  free(d.seen), free(d.ranges);
  return rc;
}

vs_rc ivfpq_verify(ivfpq_segment *s, ivfpq_report report, void *ctx, vs_err *err) {
  walk w = {.s = s, .report = report, .ctx = ctx, .err = err};
  vs_rc rc = verify_bytes(&w);
  if (!rc && !w.stop) rc = verify_codebook(&w);
  if (!rc && !w.stop) verify_floats(&w);
  if (!rc && !w.stop) rc = verify_partitions(&w);
  if (!rc && !w.stop) rc = verify_rows(&w);
  if (!rc && !w.stop) rc = verify_sketches(&w);
  if (!rc && !w.stop) rc = verify_iddir(&w);
  return rc;
}
