/* plan.h - what xBestIndex of the search tables tells xFilter, and the arguments that come with it.
 *
 * idxStr lists the arguments of xFilter in order, one entry each, ended by ';':
 *   q query | k | n nprobe | r refine | R recall | x exact | s source | S shard =
 *   d< d{  upper bound of distance (< or <=): lets a lazy stream end
 *   b> b}  lower bound of distance (> or >=): holds before k is cut
 *   i id = | w rowid = (plans without a query)
 *   f<op><column>  filter term: op is a filter_op letter, column a number, -1 the id
 * idxNum: PLAN_SCAN, PLAN_ID, PLAN_ROWID or PLAN_SEARCH, plus PLAN_SORTED when ORDER BY distance was consumed (by all queries
 * together). PLAN_NO_QUERY: a part of a search without its query; xFilter fails with advice (idxStr is the column it names).
 * It costs more than any other plan, so that an OR whose branches have the query still finds its own.
 */
#ifndef VTAB_PLAN_H
#define VTAB_PLAN_H
#include "filter.h"
#include "stream.h"

enum { PLAN_SCAN = 0, PLAN_ID = 1, PLAN_ROWID = 2, PLAN_SEARCH = 3, PLAN_NO_QUERY = 4, PLAN_KIND = 7, PLAN_SORTED = 8 };

/* Costs: one constant for every plan with a query, below any plan without one, or the OR optimisation breaks searches up.
 * In SQLite's unit, a step of a scan: with 10 it joined an unindexed table first and searched once for each of its rows. */
#define PLAN_SEARCH_COST 400.0
#define PLAN_LOOKUP_COST 500.0
#define PLAN_SCAN_COST 1e10
#define PLAN_NO_QUERY_COST 1e30

typedef struct plan {
  sqlite3_index_info *info;
  sqlite3_str *args;
  int n_args;
} plan;
void plan_begin(plan *p, sqlite3_index_info *info);
/* Hands constraint i to xFilter as `entry`. omit: SQLite need not check it again. */
void plan_use(plan *p, int i, int omit, const char *entry);
int plan_end(plan *p, int kind, double cost, sqlite3_int64 rows); /* an SQLite code */

/* Constraint i is `column = ...` of an IN list: takes all values at once. 1 when it is an IN. */
int plan_take_in(sqlite3_index_info *info, int i);
/* Handles a constraint on id or a metadata column; 1 when taken. */
int plan_filter(plan *p, int i, int column, shard_type type);

/* Does the constraint give its column a value: `=` or IS? */
int plan_gives(const struct sqlite3_index_constraint *c);
/* Beside a query: do the constraints on k, nprobe, refine, recall, exact (columns from `k` on) ask for what cannot be? A column
 * without a value is NULL, so that `k > 5` alone would silently leave no row. 1: *message says so. */
int plan_misused(sqlite3_index_info *info, int k, char **message);
int plan_without(sqlite3_index_info *info, const char *column); /* a PLAN_NO_QUERY */

/* Handles a bound on the distance column; 1 when taken. */
int plan_bound(plan *p, int i);
/* Is ascending distance all the order that is wanted of rows first..nOrderBy? Not for DISTINCT and GROUP BY (see stream.h). */
int plan_by_distance(sqlite3_index_info *info, int first, int column);

/* The decoded arguments of a search. Numbers: -1 not given. */
typedef struct plan_search {
  int has_k, exact;
  uint64_t k;
  int64_t nprobe, refine;
  double recall;             /* 0: not given */
  stream_bound floor, limit; /* of distance */
  sqlite3_value *query, *source, *shard, *id, *rowid;
  filter filter;
} plan_search;
/* type_of tells a metadata column's type (-1: the id). Release with plan_search_reset, also on failure. */
vs_rc plan_decode(const char *args, int argc, sqlite3_value **argv, shard_type (*type_of)(void *ctx, int column), void *ctx,
                  plan_search *out, vs_err *err) VS_WARN_UNUSED;
void plan_search_reset(plan_search *s);

/* A whole number of at least 0; beyond 64 bits it means all. NULL: not given (-1). */
vs_rc plan_whole_number(const char *name, sqlite3_value *v, int64_t *out, vs_err *err) VS_WARN_UNUSED;

/* The given k, nprobe, ... as column results; NULL when not given. */
void plan_result_number(sqlite3_context *ctx, int64_t v);
void plan_result_recall(sqlite3_context *ctx, double recall);

#endif
