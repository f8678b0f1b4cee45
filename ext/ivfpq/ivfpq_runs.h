/* ivfpq_runs.h - rows on their way into partitions: collected in memory, spilled as runs sorted by centroid, read back
 * centroid by centroid in the order in which they were added. What never had to be spilled is read back from memory.
 *
 * Each row has two records, kept apart so that the segment's two big sections can each be written front to back:
 *   scan record: u64 seq | f32 term at beta 0 | f32 what beta takes off | u32 column bytes | code bytes | columns
 *   row record:  u64 seq | u32 id bytes | u32 column bytes | vector | id | columns
 */
#ifndef IVFPQ_RUNS_H
#define IVFPQ_RUNS_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"
#include "ivfpq_state.h"

typedef struct ivfpq_runs ivfpq_runs;
enum { IVFPQ_RUN_SCAN = 0, IVFPQ_RUN_ROWS = 1 };

typedef struct ivfpq_scan_head { uint64_t seq; float term, err2; uint32_t column_bytes, zero; } ivfpq_scan_head;
typedef struct ivfpq_row_head { uint64_t seq; uint32_t id_bytes, column_bytes; } ivfpq_row_head;

typedef struct ivfpq_runs_shape {
  const char *dir;    /* of the files */
  int named;          /* 0: unnamed files that vanish with the process; 1: IVFPQ_RUN_FILES in dir, with checks for a later load */
  uint32_t n_centroids;
  size_t code_bytes, vector_bytes;
  size_t memory;      /* of the staging area */
  uint64_t n_rows;    /* expected; 0: not known */
  int threads;        /* that spill */
} ivfpq_runs_shape;
extern const char *const ivfpq_run_files[2];

vs_rc ivfpq_runs_open(const ivfpq_runs_shape *shape, ivfpq_runs **out, vs_err *err) VS_WARN_UNUSED;
/* Room for n rows whose records have so many bytes together, besides head, codes and vector: spills when the memory would be used
 * up. The rows are then added one by one, and what add returned stays where it is until the next reserve: threads may fill it. */
vs_rc ivfpq_runs_reserve(ivfpq_runs *r, size_t n, uint64_t id_bytes, uint64_t column_bytes, vs_err *err) VS_WARN_UNUSED;
/* Room for one row's two records. */
vs_rc ivfpq_runs_add(ivfpq_runs *r, uint32_t centroid, uint32_t id_bytes, uint32_t column_bytes, uint8_t **scan, uint8_t **row,
                     vs_err *err) VS_WARN_UNUSED;
/* After the last row. to_files: also what would fit into memory. */
vs_rc ivfpq_runs_finish(ivfpq_runs *r, int to_files, vs_err *err) VS_WARN_UNUSED;
uint64_t ivfpq_runs_bytes(const ivfpq_runs *r);    /* written to files */
int ivfpq_runs_in_files(const ivfpq_runs *r);      /* finished, and every row is in a file */
/* About so many bytes of one kind has a centroid; exactly, when they are in files. */
uint64_t ivfpq_runs_size(const ivfpq_runs *r, int kind, uint32_t centroid);

/* Records of one centroid, the next stretch of them. Threads may gather at once, each with its own. */
typedef struct ivfpq_gather {
  uint32_t centroid;
  size_t run;          /* where the next gather goes on; zeros: at the first record */
  uint64_t done;       /* bytes of that run; without files: records */
  size_t n, room;      /* records: at base + at[i] */
  size_t *at;
  const uint8_t *base;
  uint8_t *data;       /* as read from files */
  size_t used, data_room;
} ivfpq_gather;
typedef int (*ivfpq_runs_skip)(void *ctx, uint64_t seq);
/* Up to max_rows that are not skipped, at most about max_bytes of them (or one); *more: there are others. */
vs_rc ivfpq_runs_gather(const ivfpq_runs *r, int kind, size_t max_rows, size_t max_bytes, ivfpq_runs_skip skip, void *ctx, ivfpq_gather *g,
                        int *more, vs_err *err) VS_WARN_UNUSED;
void ivfpq_gather_reset(ivfpq_gather *g);

/* What finished runs in named files are, and back: load opens the files and checks all their bytes. */
void ivfpq_runs_save(const ivfpq_runs *r, ivfpq_state *s);
vs_rc ivfpq_runs_load(const ivfpq_runs_shape *shape, ivfpq_state *s, ivfpq_runs **out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_runs_close(ivfpq_runs *r);

#endif
