/* ivfpq_runs.h - rows on their way into partitions: collected in memory, spilled as runs sorted by centroid, read back
 * centroid by centroid in the order in which they were added.
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

typedef struct ivfpq_runs ivfpq_runs;
enum { IVFPQ_RUN_SCAN = 0, IVFPQ_RUN_ROWS = 1 };

typedef struct ivfpq_scan_head { uint64_t seq; float term, err2; uint32_t column_bytes, zero; } ivfpq_scan_head;
typedef struct ivfpq_row_head { uint64_t seq; uint32_t id_bytes, column_bytes; } ivfpq_row_head;

vs_rc ivfpq_runs_open(const char *dir, uint32_t n_centroids, size_t code_bytes, size_t vector_bytes, size_t memory,
                      ivfpq_runs **out, vs_err *err) VS_WARN_UNUSED;
/* Room for one row's two records; the caller fills them at once. Spills when the memory is used up. */
vs_rc ivfpq_runs_add(ivfpq_runs *r, uint32_t centroid, uint32_t id_bytes, uint32_t column_bytes, uint8_t **scan, uint8_t **row,
                     vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_runs_finish(ivfpq_runs *r, vs_err *err) VS_WARN_UNUSED;
/* Starts reading the records of one kind of one centroid, then hands them out one by one (NULL at the end); a record lives
 * until the next call. */
void ivfpq_runs_rewind(ivfpq_runs *r, int kind, uint32_t centroid);
vs_rc ivfpq_runs_next(ivfpq_runs *r, const uint8_t **record, vs_err *err) VS_WARN_UNUSED;
uint64_t ivfpq_runs_bytes(const ivfpq_runs *r); /* written to temporary files */
void ivfpq_runs_close(ivfpq_runs *r);

#endif
