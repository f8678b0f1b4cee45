/* ivfpq_format.h - the segment file, format 0.
 *
 * Conventions: little-endian; offsets from the start of the file unless said; `check` is XXH3-64 (xxHash 0.8) of the bytes
 * named, seed 0; `check32` its low half; reserved fields are written zero and refused otherwise; floats are IEEE 754.
 *
 *   +--------+------+------+--------+---------+-------+--------+-------+----------+--------+--------+---------+
 *   | header | SCAN | ROWS | IDHEAP | COLUMNS | IDDIR | GROUPS | MEAN  | CODEBOOK | PARAMS | footer | trailer |
 *   +--------+------+------+--------+---------+-------+--------+-------+----------+--------+--------+---------+
 *
 * header (64 bytes)   magic "VSIVFPQ\0" | u32 format | 52 bytes reserved
 * footer              n_sections x { u32 id | u32 flags | u64 off | u64 size | u64 check of the whole section }
 * trailer (64 bytes)  u64 footer off | u32 n_sections | u32 format | u64 check of the footer | u64 file size |
 *                     16 bytes reserved | u64 check of the 48 trailer bytes before | magic "VSIVFEND"
 * Section flags: 1 = a reader that does not know the section may ignore it; without it the reader must refuse the file.
 * Sections start at multiples of 64; the gaps are zero and `verify` checks that they are.
 *
 * What one query fetches: trailer + footer + PARAMS (+ MEAN, CODEBOOK) once; then GROUPS blocks of the nearest groups, then
 * SCAN blocks of the nprobe nearest partitions, then ROWS records of the k*refine best rows: three rounds, each in parallel.
 *
 * PARAMS: ivfpq_params (256 bytes), then n_columns descriptors, then the group table, then check of all before.
 *   descriptor  u8 type (1 integer, 2 real, 3 text) | u8 flags (1 filter, 2 index) | u16 name bytes | name
 *   padding to a multiple of 64, then the group table: n_groups x ivfpq_group (32 bytes), group bias f32[n_groups padded to
 *   16], group centroids packed (below). Empty when the segment is flat.
 * MEAN: f32[dim] | check.   CODEBOOK: m x packed words (n_words x sub_dim) | check. Both empty when flat.
 * "packed": rows interleaved by 16, element (c, j) at [((c/16)*dim + j)*16 + c%16], the last group of 16 filled with zeros;
 * the layout that kern_scores_f32 reads without a copy.
 *
 * GROUPS: per group one block: n_partitions x ivfpq_partition (48 bytes) | bias f32[n padded to 16] = -|c|^2/2 (0 for dot) |
 *   packed centroids, dim_padded wide | check of all before. Partition numbers run on from group to group.
 * SCAN: per partition one block at a multiple of 64: codes (layout: kern_code_offset, m bytes per row, rows padded to 64) |
 *   u16 terms[padded] ; then the filterable columns, each: null bitmap (bit = 1: NULL, (n+7)/8 bytes) | i64[n] or f64[n] or
 *   u32 end offsets[n] and the text bytes. Codes+terms and columns have a check each in the partition's entry.
 *   4-bit codes: byte j of a row holds sub-quantizers 2j (low nibble) and 2j+1, so that a scan looks 256-entry sums up.
 * ROWS: row_bytes per row, partition after partition: vector f32[dim] or f16[dim], as given by the user | id slot |
 *   u64 offset in COLUMNS, u32 size (only when there are columns) | check32 of the record before it.
 *   id slot: i64, or u32 length and id_width bytes; a longer text id has its u64 offset in IDHEAP there instead.
 * IDHEAP: text bytes | check32, one after another.
 * COLUMNS: per row, per column: u8 tag (0 NULL, 1 i64, 2 f64, 3 text) | 8 bytes, or u32 length and bytes; then check32.
 * IDDIR: pages of IVFPQ_PAGE bytes: u32 count | u32 reserved | entries | zeros | check of the page before it. Leaf entries are
 *   { u64 key, u32 row } ascending; above them levels of { u64 first key of a page }, until a level has one page.
 *   Leaves first, then each level up. key = id + 2^63 for integers, XXH3-64 of the bytes for text.
 *
 * Estimates (metrics: cosine rows are normalised, then the mean is subtracted; all that follows is squared L2):
 *   |q-x|^2 ~ |q-c|^2 + SUM_j T_j[code_j] + t,   T_j[w] = -2 q_j.word,   t = |r|^2 + 2 c.r' - beta |e|^2
 * with residual r = x - c, its coded image r' and e = r - r'; t is stored as term0 + term_step * u16.
 * For dot products -2 q.(x - mean) ~ -2 q.c + SUM_j T_j[code_j] + |q - mean| t,   t = -(2 c.e + beta |e|^2) / |x - mean|
 * (Jegou et al., Product Quantization for Nearest Neighbor Search, 2011). What an estimate leaves out is -2 (q-c).e, for dot
 * -2 q.e. For a true neighbour q points where x points, and r.e is about |e|^2: neighbours are over-estimated, strangers are
 * not. beta, and for dot the scale |q - mean| / |x - mean|, even that out.
 */
#ifndef IVFPQ_FORMAT_H
#define IVFPQ_FORMAT_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

enum {
  IVFPQ_FORMAT = 0,
  IVFPQ_HEADER = 64,
  IVFPQ_TRAILER = 64,
  IVFPQ_ALIGN = 64,
  IVFPQ_MAX_DIM = 16384,
  IVFPQ_MAX_M = 256,        /* 256 u8 table entries sum up below 2^16 */
  IVFPQ_MAX_NLIST = 1 << 22,
  IVFPQ_MAX_COLUMNS = 1000,
  IVFPQ_MAX_PARTITION = 1 << 18, /* rows; larger ones are cut in two entries with one centroid */
  IVFPQ_ID_INLINE = 64,     /* bytes of a text id kept in its row record */
  IVFPQ_MAX_TEXT = 1 << 24, /* bytes of one text value or id */
  IVFPQ_PAGE = 16384,
  IVFPQ_FLAT_ROWS = 4096    /* below this many rows a segment is flat: one partition, no codes, exact */
};
#define IVFPQ_MAGIC "VSIVFPQ"
#define IVFPQ_MAGIC_END "VSIVFEND"

typedef enum ivfpq_section_id {
  IVFPQ_SCAN = 1, IVFPQ_ROWS, IVFPQ_IDHEAP, IVFPQ_COLUMNS, IVFPQ_IDDIR, IVFPQ_GROUPS, IVFPQ_MEAN, IVFPQ_CODEBOOK, IVFPQ_PARAMS,
  IVFPQ_N_SECTIONS /* one more than the last known id */
} ivfpq_section_id;
enum { IVFPQ_IGNORABLE = 1 };

typedef struct ivfpq_section {
  uint32_t id, flags;
  uint64_t off, size, check;
} ivfpq_section;

typedef enum ivfpq_metric { IVFPQ_L2 = 0, IVFPQ_COSINE = 1, IVFPQ_DOT = 2 } ivfpq_metric;
typedef enum ivfpq_type { IVFPQ_INTEGER = 1, IVFPQ_REAL = 2, IVFPQ_TEXT = 3 } ivfpq_type;
enum { IVFPQ_FILTER = 1, IVFPQ_INDEX = 2 };

typedef struct ivfpq_params {
  uint64_t n_rows;      /* < 2^32 */
  uint32_t dim;         /* 1..IVFPQ_MAX_DIM */
  uint32_t dim_padded;  /* dim rounded up to a multiple of sub-quantizers; dim when flat */
  uint32_t metric;      /* ivfpq_metric */
  uint32_t store;       /* 0 f32, 1 f16 */
  uint32_t nlist;       /* partitions, >= 1 unless there are no rows */
  uint32_t n_groups;    /* 0 when flat */
  uint32_t bits;        /* 8 or 4; 0 when flat */
  uint32_t m;           /* code bytes per row; 0 when flat */
  uint32_t sub_dim;     /* dims of one sub-quantizer; 0 when flat */
  uint32_t id_text;     /* 1: text ids */
  uint32_t id_width;    /* bytes of a text id slot, 8..IVFPQ_ID_INLINE in steps of 4; 0 for integers */
  uint32_t row_bytes;   /* of a ROWS record */
  uint32_t n_columns;
  float beta, term0, term_step;
  uint32_t descriptor_bytes;
  uint32_t iddir_levels; /* 0 when there are no rows */
  uint64_t seed;         /* of the build */
  uint64_t n_padded;     /* rows with every partition padded to KERN_GROUP */
  uint32_t reserved[40];
} ivfpq_params;

typedef struct ivfpq_group {
  uint64_t off;             /* in GROUPS */
  uint64_t size;            /* with the check */
  uint32_t first, n;        /* partitions */
  uint64_t reserved;
} ivfpq_group;

typedef struct ivfpq_partition {
  uint64_t off;             /* in SCAN, a multiple of 64 */
  uint64_t row0;            /* number of its first row in the segment */
  uint32_t n_rows;
  uint32_t column_bytes;    /* follow codes and terms at a multiple of 8 */
  uint64_t check;           /* of codes and terms */
  uint64_t column_check;
  uint64_t reserved;
} ivfpq_partition;

_Static_assert(sizeof(ivfpq_section) == 32, "on-disk size");
_Static_assert(sizeof(ivfpq_params) == 256, "on-disk size");
_Static_assert(sizeof(ivfpq_group) == 32, "on-disk size");
_Static_assert(sizeof(ivfpq_partition) == 48, "on-disk size");
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the format is little-endian and so must the machine be"
#endif

typedef struct ivfpq_column {
  ivfpq_type type;
  int flags;      /* IVFPQ_FILTER, IVFPQ_INDEX */
  char *name;     /* NUL terminated UTF-8 */
} ivfpq_column;

static inline uint64_t ivfpq_round(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }
/* Bytes of codes and terms of a partition. */
static inline uint64_t ivfpq_code_bytes(uint64_t n_rows, uint32_t m) {
  return m ? ivfpq_round(n_rows, 64) * m + ivfpq_round(n_rows, 64) * 2 : 0;
}
static inline uint64_t ivfpq_group_bytes(uint32_t n, uint32_t dim_padded) {
  uint64_t lanes = ivfpq_round(n, 16);
  return n * sizeof(ivfpq_partition) + lanes * 4 + lanes * dim_padded * 4 + 8;
}
static inline uint32_t ivfpq_words(uint32_t bits) { return 1u << bits; }
/* Sub-quantizers: two to a byte with 4 bits. */
static inline uint32_t ivfpq_subs(uint32_t m, uint32_t bits) { return bits == 4 ? 2 * m : m; }

enum {
  IVFPQ_LEAF_ENTRY = 12,
  IVFPQ_LEAF_MAX = (IVFPQ_PAGE - 16) / IVFPQ_LEAF_ENTRY,
  IVFPQ_FENCE_MAX = (IVFPQ_PAGE - 16) / 8
};
/* Pages of each level of the id directory, leaves first; returns the number of levels (<= 8). */
uint32_t ivfpq_iddir_levels(uint64_t n_rows, uint64_t pages[8]);

uint64_t ivfpq_check(const void *p, size_t n);
static inline uint32_t ivfpq_check32(const void *p, size_t n) { return (uint32_t)ivfpq_check(p, n); }
uint64_t ivfpq_key_int(int64_t id);
uint64_t ivfpq_key_text(const void *text, size_t n);

/* The metric distance of the raw vectors; falls back to double precision where float over- or underflows.
 * l2: Euclidean; cosine: 1 - cos (1 when a vector is zero); dot: -a.b */
double ivfpq_distance(ivfpq_metric metric, const float *a, const float *b, uint32_t dim);

#endif
