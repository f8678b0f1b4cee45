/* plan.c - see plan.h. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>
SQLITE_EXTENSION_INIT3

void plan_begin(plan *p, sqlite3_index_info *info) { *p = (plan){.info = info, .args = sqlite3_str_new(NULL)}; }

void plan_use(plan *p, int i, int omit, const char *entry) {
  p->info->aConstraintUsage[i].argvIndex = ++p->n_args;
  p->info->aConstraintUsage[i].omit = (unsigned char)omit;
  sqlite3_str_appendall(p->args, entry);
  sqlite3_str_appendchar(p->args, 1, ';');
}

int plan_end(plan *p, int kind, double cost, sqlite3_int64 rows) {
  int rc = sqlite3_str_errcode(p->args);
  p->info->idxNum = kind;
  p->info->estimatedCost = cost;
  p->info->estimatedRows = rows;
  p->info->idxStr = sqlite3_str_finish(p->args);
  p->info->needToFreeIdxStr = 1;
  return rc;
}

int plan_take_in(sqlite3_index_info *info, int i) {
  if (info->aConstraint[i].op != SQLITE_INDEX_CONSTRAINT_EQ || !sqlite3_vtab_in(info, i, -1)) return 0;
  sqlite3_vtab_in(info, i, 1);
  return 1;
}

int plan_filter(plan *p, int i, int column, shard_type type) {
  char entry[32];
  const struct sqlite3_index_constraint *c = &p->info->aConstraint[i];
  if (!c->usable) return 0;
  const char *collation = sqlite3_vtab_collation(p->info, i);
  if (type == SHARD_TEXT && collation && sqlite3_stricmp(collation, "BINARY")) return 0;
  int op = filter_op_of(c->op, 0, type);
  if (!op) return 0;
  if (plan_take_in(p->info, i)) op = FILTER_IN;
  sqlite3_snprintf(sizeof entry, entry, "f%c%d", op, column);
  plan_use(p, i, 0, entry);
  return 1;
}

int plan_gives(const struct sqlite3_index_constraint *c) {
  return c->op == SQLITE_INDEX_CONSTRAINT_EQ || c->op == SQLITE_INDEX_CONSTRAINT_IS;
}

static int compares(int op) {
  switch (op) {
    case SQLITE_INDEX_CONSTRAINT_LT:
    case SQLITE_INDEX_CONSTRAINT_LE:
    case SQLITE_INDEX_CONSTRAINT_GT:
    case SQLITE_INDEX_CONSTRAINT_GE:
    case SQLITE_INDEX_CONSTRAINT_NE:
    case SQLITE_INDEX_CONSTRAINT_LIKE:
    case SQLITE_INDEX_CONSTRAINT_GLOB:
    case SQLITE_INDEX_CONSTRAINT_REGEXP: return 1;
    default: return 0;
  }
}

static int is_given(const sqlite3_index_info *info, int column) {
  for (int i = 0; i < info->nConstraint; i++)
    if (info->aConstraint[i].iColumn == column && plan_gives(&info->aConstraint[i])) return 1;
  return 0;
}

int plan_misused(sqlite3_index_info *info, int k, char **message) {
  static const char *const names[] = {"k", "nprobe", "refine", "recall", "exact"};
  char *text = NULL;
  for (int i = 0; i < info->nConstraint && !text; i++) {
    int column = info->aConstraint[i].iColumn, n = column - k;
    if (n < 0 || n >= (int)(sizeof names / sizeof *names)) continue;
    if (n == 0 && sqlite3_vtab_in(info, i, -1)) text = sqlite3_mprintf("k IN (...): one k per search");
    else if (compares(info->aConstraint[i].op) && !is_given(info, column))
      text = sqlite3_mprintf("%s takes only `%s = n`: it is an argument of the search, not a column to compare", names[n],
                             names[n]);
  }
  if (!text) return 0;
  sqlite3_free(*message);
  *message = text;
  return 1;
}

int plan_without(sqlite3_index_info *info, const char *column) {
  info->idxNum = PLAN_NO_QUERY;
  info->idxStr = sqlite3_mprintf("%s", column);
  info->needToFreeIdxStr = 1;
  info->estimatedCost = PLAN_NO_QUERY_COST;
  info->estimatedRows = (sqlite3_int64)1 << 40;
  return info->idxStr ? SQLITE_OK : SQLITE_NOMEM;
}

int plan_bound(plan *p, int i) {
  static const struct { int op; const char *entry; } bounds[] = {
      {SQLITE_INDEX_CONSTRAINT_LT, "d<"}, {SQLITE_INDEX_CONSTRAINT_LE, "d{"},
      {SQLITE_INDEX_CONSTRAINT_GT, "b>"}, {SQLITE_INDEX_CONSTRAINT_GE, "b}"}};
  for (size_t b = 0; b < sizeof bounds / sizeof *bounds; b++)
    if (p->info->aConstraint[i].op == bounds[b].op) {
      plan_use(p, i, 0, bounds[b].entry);
      return 1;
    }
  return 0;
}

int plan_by_distance(sqlite3_index_info *info, int first, int column) {
  const struct sqlite3_index_orderby *o = info->aOrderBy + first;
  return info->nOrderBy == first + 1 && o->iColumn == column && !o->desc && sqlite3_vtab_distinct(info) == 0;
}

/* ---- decoding ---- */

vs_rc plan_whole_number(const char *name, sqlite3_value *v, int64_t *out, vs_err *err) {
  *out = -1;
  switch (sqlite3_value_numeric_type(v)) {
    case SQLITE_NULL: return VS_OK;
    case SQLITE_INTEGER: *out = sqlite3_value_int64(v); break;
    case SQLITE_FLOAT: {
      double d = sqlite3_value_double(v);
      if (d >= 9.2e18) *out = INT64_MAX;
      else if (d >= 0 && d == (double)(int64_t)d) *out = (int64_t)d;
      else return vs_fail(err, VS_INVALID, "%s must be a whole number of at least 0, not %g", name, d);
      break;
    }
    default: return vs_fail(err, VS_INVALID, "%s must be a whole number of at least 0, not text or a blob", name);
  }
  if (*out < 0) return vs_fail(err, VS_INVALID, "%s must be a whole number of at least 0, not %lld", name, (long long)*out);
  return VS_OK;
}

/* A share: above 0, at most 1. NULL (as which SQLite hands on a NaN): not given. */
static vs_rc decode_recall(sqlite3_value *v, double *out, vs_err *err) {
  int type = sqlite3_value_numeric_type(v);
  *out = 0;
  if (type == SQLITE_NULL) return VS_OK;
  if (type != SQLITE_INTEGER && type != SQLITE_FLOAT)
    return vs_fail(err, VS_INVALID, "recall must be a number above 0 and at most 1, not text or a blob");
  double r = sqlite3_value_double(v);
  if (!(r > 0 && r <= 1)) return vs_fail(err, VS_INVALID, "recall must be above 0 and at most 1, not %g", r);
  *out = r;
  return VS_OK;
}

/* Bounds of distance, which has numeric affinity: '5' is 5. Values that are no number SQLite compares itself. */
static void decode_bound(const char *entry, sqlite3_value *v, plan_search *s) {
  int type = sqlite3_value_numeric_type(v), open = entry[1] == '<' || entry[1] == '>';
  if (type != SQLITE_INTEGER && type != SQLITE_FLOAT) return;
  double d = sqlite3_value_double(v);
  stream_bound *b = *entry == 'd' ? &s->limit : &s->floor;
  int tighter = *entry == 'd' ? d < b->at : d > b->at;
  if (!b->given || tighter || (d == b->at && open)) *b = (stream_bound){1, open, d};
}

static vs_rc decode_one(const char *e, sqlite3_value *v, shard_type (*type_of)(void *, int), void *ctx, plan_search *s, vs_err *err) {
  int64_t n;
  vs_rc rc = VS_OK;
  switch (*e) {
    case 'q': s->query = v; break;
    case 's': s->source = v; break;
    case 'S': s->shard = v; break;
    case 'i': s->id = v; break;
    case 'w': s->rowid = v; break;
    case 'k':
      rc = plan_whole_number("k", v, &n, err);
      s->has_k = n >= 0, s->k = n >= 0 ? (uint64_t)n : 0;
      break;
    case 'n': rc = plan_whole_number("nprobe", v, &s->nprobe, err); break;
    case 'r': rc = plan_whole_number("refine", v, &s->refine, err); break;
    case 'R': rc = decode_recall(v, &s->recall, err); break;
    case 'x':
      rc = plan_whole_number("exact", v, &n, err);
      s->exact = n > 0;
      break;
    case 'd':
    case 'b': decode_bound(e, v, s); break;
    case 'f': {
      int column = atoi(e + 2);
      rc = filter_add(&s->filter, column, (filter_op)e[1], type_of(ctx, column), v, err);
      break;
    }
    default: break;
  }
  return rc;
}

vs_rc plan_decode(const char *args, int argc, sqlite3_value **argv, shard_type (*type_of)(void *, int), void *ctx, plan_search *out,
                  vs_err *err) {
  memset(out, 0, sizeof *out);
  out->nprobe = out->refine = -1;
  for (int i = 0; i < argc && args && *args; i++) {
    vs_rc rc = decode_one(args, argv[i], type_of, ctx, out, err);
    if (rc) return rc;
    args = strchr(args, ';') + 1;
  }
  return VS_OK;
}

void plan_search_reset(plan_search *s) {
  filter_reset(&s->filter);
  memset(s, 0, sizeof *s);
}

void plan_result_number(sqlite3_context *ctx, int64_t v) {
  if (v >= 0) sqlite3_result_int64(ctx, v);
}

void plan_result_recall(sqlite3_context *ctx, double recall) {
  if (recall > 0) sqlite3_result_double(ctx, recall);
}
