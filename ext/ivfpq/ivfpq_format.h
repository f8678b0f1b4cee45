/* ivfpq_format.h - the segment file, format 0.
 *
 * Conventions: little-endian; offsets from the start of the file unless said; `check` is XXH3-64 (xxHash 0.8) of the bytes
 * named, seed 0; `check32` its low half; reserved fields are written zero and refused otherwise; floats are IEEE 754.
 *
 *   +--------+------+------+--------+--------+---------+-------+--------+------+----------+------------+--------+--------+---------+
 *   | header | SCAN | ROWS | SKETCH | IDHEAP | COLUMNS | IDDIR | GROUPS | MEAN | CODEBOOK | PROJECTION | PARAMS | footer | trailer |
 *   +--------+------+------+--------+--------+---------+-------+--------+------+----------+------------+--------+--------+---------+
 *
 * header (64 bytes)   magic "VSIVFPQ\0" | u32 format | 52 bytes reserved
 * footer              n_sections x { u32 id | u32 flags | u64 off | u64 size | u64 check of the whole section }
 * trailer (64 bytes)  u64 footer off | u32 n_sections | u32 format | u64 check of the footer | u64 file size |
 *                     16 bytes reserved | u64 check of the 48 trailer bytes before | magic "VSIVFEND"
 * Section flags: 1 = a reader that does not know the section may ignore it; without it the reader must refuse the file.
 * Sections start at multiples of 64; the gaps are zero and `verify` checks that they are.
 *
 * What one query fetches: trailer + footer + PARAMS (+ MEAN, CODEBOOK, PROJECTION) once; then GROUPS blocks of the nearest groups, then
 * SCAN blocks of the nprobe nearest partitions, then ROWS records of the k*refine best rows: three rounds, each in parallel.
 *
 * PARAMS: ivfpq_params (256 bytes), then n_columns descriptors, then the group table, then check of all before.
 *   descriptor  u8 type (1 integer, 2 real, 3 text) | u8 flags (1 filter, 2 index) | u16 name bytes | name
 *   padding to a multiple of 64, then the group table: n_groups x ivfpq_group (32 bytes), group bias f32[n_groups padded to
 *   16], group centroids packed (below). Empty when the segment is flat. Then the calibration: ivfpq_calibration, n_reach
 *   ivfpq_reach ascending by nprobe, and for each of the k n_levels ivfpq_level ascending by recall.
 *   The group centroids are "packed": rows interleaved by 16, element (c, j) at [((c/16)*dim + j)*16 + c%16], the last group of 16
 *   filled with zeros; the layout that scores_f32 (kern.h) reads without a copy.
 * MEAN: f32[dim] | check.
 * CODEBOOK: i8 words[sub-quantizers][n_words][sub_dim] | i8 turn[turn][coded dims], packed by kern_pack_i8 | f32 scale[m] |
 *   f32 turn_scale[turn] | check. A word is its bytes times the scale of its code byte. Words and directions are rounded to this
 *   before anything is encoded, and so lose nothing. With `turn` codes are of y, a residual's coordinates in so many orthonormal
 *   directions (a word's elements stand for these), else of the residual itself.
 * PROJECTION: i8 directions[project][coded dims], packed by kern_pack_i8 | f32 scale[project] | check. Orthonormal; absent when
 *   project is 0. "Coded dims" is dim_padded rounded up to 4.
 *
 * GROUPS: per group one block at a multiple of 64: n ivfpq_partition (48 bytes each) | zeros to a multiple of 64 |
 *   f32 norm2[lanes] = |c|^2 (0 for dot, 1e38 behind n) | f32 scale[lanes], of the bytes that follow | packed bytes (kern_pack_i8) |
 *   check of all before. lanes is n rounded up to 16. What is packed: the centroids, coded dims wide; with a projection the
 *   projected centroids, project wide, and behind them f32 row_scale[lanes] | the centroids row by row as bytes 128 + value.
 *   Centroids are rounded to bytes before anything is encoded. Partition numbers run on from group to group. Flat segments: 0 dims.
 * SCAN: per partition one block at a multiple of 64: codes (layout: kern_code_offset, m bytes per row) | u16 terms[n_rows] | zeros
 *   to a multiple of 8; then the filterable columns, each: null bitmap (bit = 1: NULL, (n+7)/8 bytes) | i64[n] or f64[n] or
 *   u32 end offsets[n] and the text bytes. Codes+terms and columns have a check each in the partition's entry.
 *   4-bit codes: byte j of a row holds sub-quantizers 2j (low nibble) and 2j+1, so that a scan looks 256-entry sums up.
 * ROWS: row_bytes per row, partition after partition: vector f32[dim] or f16[dim], as given by the user | id slot |
 *   u64 offset in COLUMNS, u32 size (only when there are columns) | check32 of the record before it.
 *   id slot: i64, or u32 length and id_width bytes; a longer text id has its u64 offset in IDHEAP there instead.
 * SKETCH: per row, in the order of ROWS: u8 128 + value [coded dims] | f32 scale | f32 |x'|^2 + |x-x'|^2 (0 for dot) | check32 of the
 *   record before it, where x is the row in the model's space and x' what bytes and scale say. Absent when sketch_bytes is 0: rows
 *   are small, or there are no codes. Only readers of a mapped file look at it.
 * IDHEAP: text bytes | check32, one after another.
 * COLUMNS: per row, per column: u8 tag (0 NULL, 1 i64, 2 f64, 3 text) | 8 bytes, or u32 length and bytes; then check32.
 * IDDIR: pages of IVFPQ_PAGE bytes: u32 count | u32 reserved | entries | zeros | check of the page before it. Leaf entries are
 *   { u64 key, u32 row } ascending; above them levels of { u64 first key of a page }, until a level has one page.
 *   Leaves first, then each level up. key = id + 2^63 for integers, XXH3-64 of the bytes for text.
 *
 * Estimates (metrics: cosine rows are normalised, then the mean is subtracted; all that follows is squared L2):
 *   |q-x|^2 ~ |q-c|^2 + SUM_j T_j[code_j] + t,   T_j[w] = -2 q_j.word,   t = |r|^2 + 2 c.r' - beta |e|^2
 * with residual r = x - c, its coded image r' and e = r - r'; t is stored as term0 + term_step * u16. With `turn`, q_j are
 * coordinates of q in the directions, and r' is what the words' elements say along them.
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
  IVFPQ_MAX_TURN = 1024,
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
  IVFPQ_PROJECTION, IVFPQ_SKETCH,
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
  uint32_t dim_padded;  /* without turn dim rounded up to a multiple of sub-quantizers; dim when flat */
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
  uint32_t project;      /* dims of the projection that ranks the centroids, a multiple of 16; 0: none */
  uint32_t sketch_bytes; /* of a SKETCH record; 0: none */
  uint32_t calibration_bytes; /* behind the group table; 0: the segment was not calibrated */
  uint32_t turn;         /* directions that codes are of, sub-quantizers * sub_dim; 0: codes are of the dimensions as they are */
  uint32_t reserved[38];
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

enum { IVFPQ_CURVES = 5 };
typedef struct ivfpq_calibration {
  uint32_t n_queries, n_reach, n_levels; /* held-out rows; entries that follow */
  uint32_t k[IVFPQ_CURVES];              /* ascending */
} ivfpq_calibration;
typedef struct ivfpq_reach { /* up to so many partitions, this reach (see ivfpq_table.h) misses hardly more than they do */
  uint32_t nprobe;
  float reach;
} ivfpq_reach;
typedef struct ivfpq_level { /* the cheapest setting with this mean recall@k or more; nprobe 0: none was found */
  float recall;
  uint32_t nprobe, n_candidates;
  float reach;               /* 0: all nprobe partitions */
  float rows;                /* scanned, on average */
} ivfpq_level;
_Static_assert(sizeof(ivfpq_calibration) == 32 && sizeof(ivfpq_reach) == 8 && sizeof(ivfpq_level) == 20, "on-disk size");

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

static inline const ivfpq_reach *ivfpq_reaches(const ivfpq_calibration *c) { return (const ivfpq_reach *)(c + 1); }
static inline const ivfpq_level *ivfpq_levels(const ivfpq_calibration *c) { return (const ivfpq_level *)(ivfpq_reaches(c) + c->n_reach); }

static inline uint64_t ivfpq_round(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }
/* Bytes of the codes of a partition; of codes and terms. */
/* Dimensions that codes are of. */
static inline uint32_t ivfpq_code_dim(const ivfpq_params *p) { return p->turn ? p->turn : p->dim_padded; }
static inline uint64_t ivfpq_term_offset(uint64_t n_rows, uint32_t m) { return ivfpq_round(n_rows, 2) * m; }
static inline uint64_t ivfpq_code_bytes(uint64_t n_rows, uint32_t m) { return m ? ivfpq_term_offset(n_rows, m) + n_rows * 2 : 0; }

/* Where the parts of a group block lie. */
typedef struct ivfpq_group_layout {
  uint64_t lanes, norm2, scale, packed, row_scale, rows, size; /* row_scale == rows when there is no projection */
} ivfpq_group_layout;
static inline ivfpq_group_layout ivfpq_group_shape(uint32_t n, uint32_t coded_dim, uint32_t project) {
  ivfpq_group_layout l = {.lanes = ivfpq_round(n, 16)};
  l.norm2 = ivfpq_round(n * sizeof(ivfpq_partition), 64);
  l.scale = l.norm2 + l.lanes * 4;
  l.packed = l.scale + l.lanes * 4;
  l.row_scale = l.packed + l.lanes * (project ? project : coded_dim);
  l.rows = l.row_scale + (project ? l.lanes * 4 : 0);
  l.size = ivfpq_round(l.rows + (project ? (uint64_t)n * coded_dim : 0), 8) + 8;
  return l;
}
#define IVFPQ_NOWHERE 1e38f /* norm2 of the lanes behind the last centroid */
static inline uint32_t ivfpq_words(uint32_t bits) { return 1u << bits; }
static inline uint32_t ivfpq_coded_dim(const ivfpq_params *p) { return p->m ? (uint32_t)ivfpq_round(p->dim_padded, 4) : 0; }
/* Of the directions in CODEBOOK. */
static inline uint64_t ivfpq_turn_bytes(const ivfpq_params *p) { return ivfpq_round(p->turn, 16) * ivfpq_coded_dim(p); }
/* Bytes of the slot of text ids of which the longest has so many; 0 when there are none. */
static inline uint32_t ivfpq_id_width(uint32_t longest) {
  return !longest ? 0 : longest > IVFPQ_ID_INLINE ? IVFPQ_ID_INLINE : longest < 8 ? 8 : (uint32_t)ivfpq_round(longest, 4);
}
/* Bytes of a ROWS record. */
static inline uint64_t ivfpq_row_bytes(const ivfpq_params *p) {
  return (uint64_t)p->dim * (p->store ? 2 : 4) + (p->id_text ? 4 + p->id_width : 8) + (p->n_columns ? 12 : 0) + 4;
}
/* Bytes of PARAMS between the descriptors and the check. */
static inline uint64_t ivfpq_group_table_bytes(const ivfpq_params *p) {
  uint64_t lanes = ivfpq_round(p->n_groups, 16);
  return p->n_groups * sizeof(ivfpq_group) + lanes * 4 + lanes * p->dim_padded * 4 + p->calibration_bytes;
}
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

/* Squares of floats leave the normal range beyond these; then double precision decides. */
#define IVFPQ_SAFE_MIN 1e-30f
#define IVFPQ_SAFE_MAX 1e37f

/* The metric distance of the raw vectors; falls back to double precision where float over- or underflows.
 * l2: Euclidean; cosine: 1 - cos (1 when a vector is zero); dot: -a.b */
double ivfpq_distance(ivfpq_metric metric, const float *a, const float *b, uint32_t dim);
struct kern;
/* k: kern_get(). next: NULL, or a vector that is needed soon, which is brought into the cache. */
double ivfpq_distance_by(const struct kern *k, ivfpq_metric metric, const float *a, const float *b, uint32_t dim, const void *next);

#endif
