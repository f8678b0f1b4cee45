/* ivfpq_segment.h - an open segment: sections, partitions, rows, ids. Read-only and shared by threads.
 *
 * ivfpq_segment_open decodes and checks trailer, footer, parameters, group table, mean and codebook; what depends on a row or
 * a partition is checked when it is read. Nothing per row stays in memory.
 */
#ifndef IVFPQ_SEGMENT_H
#define IVFPQ_SEGMENT_H
#include "../base/vs_io.h"
#include "ivfpq_format.h"

typedef struct ivfpq_segment {
  vs_io *io;                    /* owned */
  ivfpq_params params;
  ivfpq_section section[IVFPQ_N_SECTIONS]; /* by id; size 0 when absent */
  uint64_t footer_check;        /* names the content */
  ivfpq_column *columns;        /* params.n_columns */
  ivfpq_group *groups;          /* n_groups */
  float *group_bias, *group_centroids; /* packed, dim_padded wide */
  float *mean;                  /* dim_padded, zeros behind dim */
  float *codebook;              /* read with ivfpq_codebook */
  unsigned char *group_checked; /* n_groups flags: the block was verified (stable io only) */
  unsigned char *part_checked;  /* nlist: bit 0 codes, bit 1 columns were verified (stable io only) */
  unsigned char **rows_checked; /* per 65,536 rows a lazily made bitmap (stable io only) */
} ivfpq_segment;

/* Takes the io, also on failure. */
vs_rc ivfpq_segment_open(vs_io *io, ivfpq_segment **out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_segment_close(ivfpq_segment *s);
static inline int ivfpq_is_flat(const ivfpq_segment *s) { return s->params.m == 0; }

/* A group block: directory entries and centroids of some partitions. */
typedef struct ivfpq_group_view {
  vs_range range;
  uint32_t group, first, n;      /* partitions */
  const ivfpq_partition *entries; /* n, checked against the sections */
  const float *bias, *centroids; /* packed */
} ivfpq_group_view;
vs_rc ivfpq_groups_fetch(ivfpq_segment *s, const uint32_t *groups, size_t n, ivfpq_group_view *out, vs_err *err) VS_WARN_UNUSED;
/* Its halves: begin starts the reads, wait completes and checks them. Between the two only _release is legal. */
vs_rc ivfpq_groups_begin(ivfpq_segment *s, const uint32_t *groups, size_t n, ivfpq_group_view *out, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_groups_wait(ivfpq_segment *s, ivfpq_group_view *views, size_t n, vs_err *err) VS_WARN_UNUSED;
void ivfpq_groups_release(ivfpq_segment *s, ivfpq_group_view *views, size_t n);

/* The codebook is large, and all that opening a segment does not need: it is read with the first groups and then stays. */
vs_rc ivfpq_codebook_begin(ivfpq_segment *s, vs_range *r, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_codebook_wait(ivfpq_segment *s, vs_range *r, vs_err *err) VS_WARN_UNUSED; /* releases r */
/* subs x packed words; NULL until ivfpq_codebook_wait first succeeded, on any thread. */
static inline const float *ivfpq_codebook(const ivfpq_segment *s) { return __atomic_load_n(&s->codebook, __ATOMIC_ACQUIRE); }

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

/* Metadata values of a row, all columns in order; *buf is malloc'ed and holds the record that the values point into. */
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
