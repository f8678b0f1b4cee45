/* ivfpq_segment.h - an open segment: sections, partitions, rows, ids. Read-only and shared by threads.
 *
 * ivfpq_segment_open decodes and checks trailer, footer, parameters, group table and mean; what depends on a row or a partition is
 * checked when it is read. Nothing per row stays in memory.
 *
 * A partition is also known by its lane: groups are padded to lanes of 16, and lanes run on from group to group.
 */
#ifndef IVFPQ_SEGMENT_H
#define IVFPQ_SEGMENT_H
#include "../base/vs_io.h"
#include "ivfpq_format.h"

enum { IVFPQ_ROWS_PER_FLAGS = 65536 };

/* The words as a scan's table is made from them: per code byte 256 words of table_dim bytes, packed by kern_pack_i8. With 4 bits a
 * byte is two words side by side: 256 pairs. */
typedef struct ivfpq_codebook {
  uint32_t table_dim;
  float *scale;      /* m */
  uint8_t *turn;     /* the directions that codes are of, packed */
  float *turn_scale; /* params.turn */
  uint8_t packed[];  /* m x 256 x table_dim */
} ivfpq_codebook;

/* A group block: directory entries and centroids of some partitions. */
typedef struct ivfpq_group_view {
  vs_range range;
  uint32_t group, first, n;       /* partitions */
  const ivfpq_partition *entries; /* n, checked against the sections */
  const float *norm2, *scale, *row_scale;
  const uint8_t *packed, *rows;   /* rows: NULL without a projection */
} ivfpq_group_view;

typedef struct ivfpq_segment {
  vs_io *io;                    /* owned */
  ivfpq_params params;
  ivfpq_section section[IVFPQ_N_SECTIONS]; /* by id; size 0 when absent */
  uint64_t footer_check;        /* names the content */
  ivfpq_column *columns;        /* params.n_columns */
  ivfpq_group *groups;          /* n_groups */
  float *group_bias, *group_centroids; /* packed, dim_padded wide */
  float *mean;                  /* dim_padded, zeros behind dim */
  ivfpq_codebook *codebook;     /* read with ivfpq_codebook_of */
  uint8_t *projection;          /* packed directions; NULL: none */
  float *projection_scale;
  ivfpq_calibration *calibration; /* NULL: none */
  uint32_t *first_lane;         /* n_groups + 1 */
  uint32_t *lane_group;         /* of each lane */
  const uint8_t *mapped_rows;   /* the ROWS section of a stable io, else NULL */
  const uint8_t *mapped_sketches; /* the SKETCH section of a stable io, else NULL */
  ivfpq_group_view *resident;   /* all groups, once ivfpq_resident made them (stable io only) */
  float *resident_lanes;        /* scale and norm2 of its lanes */
  void *spare;                  /* a scan's memory, kept for the next one: see ivfpq_scan.c */
  void (*free_spare)(void *);
  unsigned char *group_checked; /* n_groups flags: the block was verified (stable io only) */
  unsigned char *part_checked;  /* nlist: bit 0 codes, bit 1 columns were verified (stable io only) */
  unsigned char **rows_checked, **sketches_checked; /* per IVFPQ_ROWS_PER_FLAGS a lazily made bitmap (stable io only) */
} ivfpq_segment;

/* Takes the io, also on failure. */
vs_rc ivfpq_segment_open(vs_io *io, ivfpq_segment **out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_segment_close(ivfpq_segment *s);
static inline int ivfpq_is_flat(const ivfpq_segment *s) { return s->params.m == 0; }

vs_rc ivfpq_groups_fetch(ivfpq_segment *s, const uint32_t *groups, size_t n, ivfpq_group_view *out, vs_err *err) VS_WARN_UNUSED;
/* Its halves: begin starts the reads, wait completes and checks them. Between the two only _release is legal. */
vs_rc ivfpq_groups_begin(ivfpq_segment *s, const uint32_t *groups, size_t n, ivfpq_group_view *out, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_groups_wait(ivfpq_segment *s, ivfpq_group_view *views, size_t n, vs_err *err) VS_WARN_UNUSED;
void ivfpq_groups_release(ivfpq_segment *s, ivfpq_group_view *views, size_t n);

/* All groups, when they can stay at their addresses: *views is NULL when the io is not stable. Made by the first call. */
vs_rc ivfpq_resident(ivfpq_segment *s, const ivfpq_group_view **views, vs_err *err) VS_WARN_UNUSED;

/* Codebook and projection are large, and all that opening a segment does not need: they are read with the first groups and then
 * stay. */
vs_rc ivfpq_codebook_begin(ivfpq_segment *s, vs_range r[2], vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_codebook_wait(ivfpq_segment *s, vs_range r[2], vs_err *err) VS_WARN_UNUSED; /* releases r */
/* NULL until ivfpq_codebook_wait first succeeded, on any thread; the projection is there as well then. */
static inline const ivfpq_codebook *ivfpq_codebook_of(const ivfpq_segment *s) { return __atomic_load_n(&s->codebook, __ATOMIC_ACQUIRE); }

/* One partition's bytes. */
typedef struct ivfpq_part {
  uint32_t number;
  ivfpq_partition entry;
  vs_range range[2];      /* codes+terms, columns; len 0 when not fetched */
  const uint8_t *codes;
  const uint16_t *terms;
  const uint8_t *columns; /* entry.column_bytes, or NULL */
} ivfpq_part;
enum { IVFPQ_WANT_CODES = 1, IVFPQ_WANT_COLUMNS = 2 };
/* The caller has set number and entry of parts[0..n); fetches their bytes in one round and checks them. */
vs_rc ivfpq_parts_fetch(ivfpq_segment *s, int want, ivfpq_part *parts, size_t n, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_parts_begin(ivfpq_segment *s, int want, ivfpq_part *parts, size_t n, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_parts_wait(ivfpq_segment *s, ivfpq_part *parts, size_t n, vs_err *err) VS_WARN_UNUSED;
void ivfpq_parts_release(ivfpq_segment *s, ivfpq_part *parts, size_t n);

/* One column of one partition, decoded in place: views into the fetched bytes. */
typedef struct ivfpq_column_view {
  ivfpq_type type;
  uint32_t n_rows;
  const uint8_t *nulls;   /* bit per row */
  const uint8_t *values;  /* unaligned i64 or f64 */
  const uint8_t *ends;    /* text: unaligned u32 end offsets */
  const char *text;
} ivfpq_column_view;
/* Walks the filterable columns of a part; view[i] belongs to the i-th column with IVFPQ_FILTER, n_views of them. */
vs_rc ivfpq_part_columns(ivfpq_segment *s, const ivfpq_part *part, ivfpq_column_view *view, size_t n_views, vs_err *err) VS_WARN_UNUSED;

/* Row records, fetched in one round; record r of the segment. Each is checked. */
typedef struct ivfpq_row {
  vs_range range;
  const uint8_t *record;
} ivfpq_row;
vs_rc ivfpq_rows_fetch(ivfpq_segment *s, const uint32_t *rows, size_t n, ivfpq_row *out, vs_err *err) VS_WARN_UNUSED;
/* Starts reading records that a later fetch will want, so that one round brings all; hold them until then with
 * ivfpq_rows_release. They are not checked. */
vs_rc ivfpq_rows_begin(ivfpq_segment *s, const uint32_t *rows, size_t n, ivfpq_row *out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_rows_release(ivfpq_segment *s, ivfpq_row *rows, size_t n);
/* A stretch of consecutive records, for scans: checked, contiguous. */
vs_rc ivfpq_rows_fetch_range(ivfpq_segment *s, uint32_t first, uint32_t n, ivfpq_row *out, vs_err *err) VS_WARN_UNUSED;

/* Rows of a mapped file: checked once, addressed without a fetch. */
static inline int ivfpq_rows_mapped(const ivfpq_segment *s) { return s->mapped_rows != NULL; }
static inline void ivfpq_row_prefetch(const ivfpq_segment *s, uint32_t row) {
  const uint8_t *p = s->mapped_rows + (uint64_t)row * s->params.row_bytes;
  for (uint32_t z = 0; z < s->params.row_bytes; z += 64) __builtin_prefetch(p + z);
}
static inline const uint8_t *ivfpq_row_id_place(const ivfpq_segment *s, uint32_t row) {
  return s->mapped_rows + (uint64_t)row * s->params.row_bytes + (uint64_t)s->params.dim * (s->params.store ? 2 : 4);
}
static inline void ivfpq_row_id_prefetch(const ivfpq_segment *s, uint32_t row) {
  const uint8_t *p = ivfpq_row_id_place(s, row);
  __builtin_prefetch(p);
  if (s->params.id_text) __builtin_prefetch(p + 4 + s->params.id_width);
  __asm__ volatile("" : : "r"(p)); /* else GCC takes this for a function without effect, and leaves it out */
}
vs_rc ivfpq_row_mapped(ivfpq_segment *s, uint32_t row, const uint8_t **record, vs_err *err) VS_WARN_UNUSED;
/* The same, quick where the row was checked before. */
static inline VS_WARN_UNUSED vs_rc ivfpq_row_at(ivfpq_segment *s, uint32_t row, const uint8_t **record, vs_err *err) {
  const unsigned char *flags = __atomic_load_n(&s->rows_checked[row / IVFPQ_ROWS_PER_FLAGS], __ATOMIC_ACQUIRE);
  uint32_t at = row % IVFPQ_ROWS_PER_FLAGS;
  *record = s->mapped_rows + (uint64_t)row * s->params.row_bytes;
  return flags && __atomic_load_n(&flags[at / 8], __ATOMIC_RELAXED) >> at % 8 & 1 ? VS_OK : ivfpq_row_mapped(s, row, record, err);
}

/* A row, its sketch, of a mapped file: it is about to be looked at. */
static inline void ivfpq_want_unseen(ivfpq_segment *s, unsigned char **flags, uint32_t section, uint32_t row, uint32_t size) {
  const unsigned char *have = flags ? __atomic_load_n(&flags[row / IVFPQ_ROWS_PER_FLAGS], __ATOMIC_ACQUIRE) : NULL;
  uint32_t at = row % IVFPQ_ROWS_PER_FLAGS;
  if (have && __atomic_load_n(&have[at / 8], __ATOMIC_RELAXED) >> at % 8 & 1) return;
  vs_io_want(s->io, s->section[section].off + (uint64_t)row * size, size);
}
static inline void ivfpq_row_want(ivfpq_segment *s, uint32_t row) {
  ivfpq_want_unseen(s, s->rows_checked, IVFPQ_ROWS, row, s->params.row_bytes);
}
static inline void ivfpq_sketch_want(ivfpq_segment *s, uint32_t row) {
  ivfpq_want_unseen(s, s->sketches_checked, IVFPQ_SKETCH, row, s->params.sketch_bytes);
}

static inline void ivfpq_sketch_prefetch(const ivfpq_segment *s, uint32_t row) {
  const uint8_t *p = s->mapped_sketches + (uint64_t)row * s->params.sketch_bytes;
  for (uint32_t z = 0; z < s->params.sketch_bytes; z += 64) __builtin_prefetch(p + z);
}
vs_rc ivfpq_sketch_mapped(ivfpq_segment *s, uint32_t row, const uint8_t **record, vs_err *err) VS_WARN_UNUSED;

/* The stored vector as floats: a pointer into the record when it is stored so and aligned, else decoded into buf (dim). */
const float *ivfpq_row_vector(const ivfpq_segment *s, const uint8_t *record, float *buf);
size_t ivfpq_vector_bytes(const ivfpq_segment *s);

typedef struct ivfpq_id {
  int is_text;
  int64_t i;
  const char *text; /* not NUL terminated; points into the record, or into *heap */
  uint32_t len;
  char *heap;       /* freed with ivfpq_id_free; NULL mostly */
} ivfpq_id;
vs_rc ivfpq_row_id(ivfpq_segment *s, const uint8_t *record, ivfpq_id *out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_id_free(ivfpq_id *id);

/* Metadata values of a row, all columns in order. They point into *buf, which is malloc'ed, or into a mapped file: then *buf is
 * NULL. */
typedef struct ivfpq_value {
  int tag;          /* 0 NULL, else ivfpq_type */
  int64_t i;
  double r;
  const char *text;
  uint32_t len;
} ivfpq_value;
vs_rc ivfpq_row_columns(ivfpq_segment *s, const uint8_t *record, ivfpq_value *values, uint8_t **buf, vs_err *err) VS_WARN_UNUSED;

/* Where what a record refers to lies in the file: its column values, its long id. Ranges of length 0 where there is none (or where
 * the record is damaged, which its reader reports). For vs_io_begin. */
void ivfpq_row_extras(const ivfpq_segment *s, const uint8_t *record, vs_range out[2]);

/* Rows whose id equals the given one: *row, *found. (Ids are unique in a segment.) */
vs_rc ivfpq_find_id(ivfpq_segment *s, const ivfpq_id *id, uint32_t *row, int *found, vs_err *err) VS_WARN_UNUSED;

/* Walks every byte: section checks, gaps, blocks, codes, ids, directory. One call of report per fault; stops when it returns
 * non-zero. VS_OK when the walk came to its end, whatever it found. */
typedef int (*ivfpq_report)(void *ctx, const char *fault);
vs_rc ivfpq_verify(ivfpq_segment *s, ivfpq_report report, void *ctx, vs_err *err) VS_WARN_UNUSED;

#endif
