/* filter.h - conditions on metadata columns and ids, applied before the top k is cut.
 *
 * A filter is a conjunction of terms that SQLite handed to xBestIndex. Values are taken out of their sqlite3_value once, with
 * the column's affinity applied (id = '7' arrives as text), so that worker threads compare plain structs. SQLite checks every
 * term again (omit = 0), so a term may let too much through but never too little.
 */
#ifndef VTAB_FILTER_H
#define VTAB_FILTER_H
#include "../shard/shard.h"
#include "sqlite3ext.h"

typedef enum filter_op {
  FILTER_EQ = 'a', FILTER_NE, FILTER_LT, FILTER_LE, FILTER_GT, FILTER_GE, FILTER_IS, FILTER_ISNOT, FILTER_ISNULL, FILTER_NOTNULL,
  FILTER_LIKE, FILTER_GLOB, FILTER_IN
} filter_op;

enum { FILTER_ID = -1 }; /* column number of the id; metadata columns count from 0 */

typedef struct filter_value { int type; sqlite3_int64 i; double r; char *text; uint32_t len; } filter_value; /* type: SQLITE_... */
typedef struct filter_term { int column; filter_op op; filter_value *values; size_t n; } filter_term;

typedef struct filter {
  filter_term *terms;
  size_t n;
  ivfpq_filter base; /* what searches take; ctx is this filter */
} filter;

/* The operator for an SQLITE_INDEX_CONSTRAINT_..., or 0 when we leave it to SQLite. */
int filter_op_of(int constraint_op, int is_in, shard_type type);
/* Adds a term. For FILTER_IN, value is what sqlite3_vtab_in_first iterates over. `type` is the column's. */
vs_rc filter_add(filter *f, int column, filter_op op, shard_type type, sqlite3_value *value, vs_err *err) VS_WARN_UNUSED;
void filter_reset(filter *f);

/* A term that names ids (= or IN), or NULL: then looking those rows up beats scanning. */
const filter_term *filter_by_id(const filter *f);
/* Does this row satisfy every term? */
vs_rc filter_row(const filter *f, ivfpq_segment *s, uint32_t row, int *pass, vs_err *err) VS_WARN_UNUSED;

#endif
