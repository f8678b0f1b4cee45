/* ivfpq_profile.c - see ivfpq_profile.h.
 *
 * One search with many partitions and many candidates is told which partition comes when. The rows that it kept say the rest: for each
 * true neighbour, the partition it lies in and how many rows of the first P partitions have a smaller estimate; for each partition, how
 * far it lies beyond the k-th best estimate of those before it. A query does not find itself: it stands for one from outside.
 */
#include "ivfpq_profile.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kern.h"
#include "ivfpq_search.h"
#include "ivfpq_table.h"

enum { AT_LEAST = 64 }; /* partitions that are looked at for their distance */

const uint32_t ivfpq_curve_k[IVFPQ_CURVES] = {1, 10, IVFPQ_TRUE, 1000, 10000};

typedef struct visited { uint64_t row0; uint32_t n_rows, rank; float coarse; } visited;

/* Rows by row number: open addressing. */
enum { SLOTS = 4096 };
_Static_assert(IVFPQ_TRUE < SLOTS / 2 && IVFPQ_RANKED < SLOTS / 2, "half of the slots are free");
typedef struct row_table { uint32_t row[SLOTS]; uint16_t at[SLOTS]; } row_table;

/* A search under way. */
typedef struct search {
  const ivfpq_profiler *p;
  size_t query;
  int deep;
  uint32_t most;           /* partitions */
  ivfpq_table table;       /* of the query: what distances count from */
  visited *parts, *by_row;
  size_t n_parts;
  row_table rows;          /* the IVFPQ_TRUE nearest, of a deep query IVFPQ_RANKED */
  uint32_t true_row[IVFPQ_TRUE], n_true, n_seen; /* ascending; how many of them it met */
  ivfpq_keys keys;
  uint64_t *scratch;
  uint32_t *part, *order, *head; /* of each key; keys by partition, where each partition's begin */
} search;

/* ---- the search ---- */

static int ascending(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return x < y ? -1 : x > y;
}

static unsigned slot_of(uint32_t row) { return row * 0x9e3779b1u >> 20; }

static int find_row(const search *x, uint32_t row, uint32_t *at) {
  for (unsigned slot = slot_of(row); x->rows.row[slot] != UINT32_MAX; slot = (slot + 1) % SLOTS)
    if (x->rows.row[slot] == row) {
      *at = x->rows.at[slot];
      return 1;
    }
  return 0;
}

/* Rows that the segment does not hold are left out: the other one of two with one id. */
static void take_true(search *x) {
  const ivfpq_truth_query *q = &x->p->t->queries[x->query];
  uint32_t most = x->deep ? IVFPQ_RANKED : IVFPQ_TRUE, n = 0;
  memset(x->rows.row, 0xff, sizeof x->rows.row);
  for (uint32_t i = 0; i < q->n_rows && n < most; i++) {
    unsigned slot = slot_of(q->rows[i]);
    if (q->rows[i] == UINT32_MAX) continue;
    while (x->rows.row[slot] != UINT32_MAX) slot = (slot + 1) % SLOTS;
    x->rows.row[slot] = q->rows[i], x->rows.at[slot] = (uint16_t)n++;
    if (n <= IVFPQ_TRUE) x->true_row[x->n_true++] = q->rows[i];
  }
  qsort(x->true_row, x->n_true, sizeof *x->true_row, ascending);
}

/* True rows in [row0, row0 + n). */
static uint32_t count_between(const search *x, uint64_t row0, uint32_t n) {
  uint32_t lo = 0, found = 0;
  for (uint32_t hi = x->n_true; lo < hi;) {
    uint32_t mid = (lo + hi) / 2;
    if (x->true_row[mid] < row0) lo = mid + 1;
    else hi = mid;
  }
  while (lo + found < x->n_true && x->true_row[lo + found] - row0 < n) found++;
  return found;
}

/* A scan ends when it has seen all that it looks for: what would follow is guessed. */
static int visit(void *ctx, const ivfpq_part *part, float coarse) {
  search *x = ctx;
  if (x->n_parts == x->most) return 0; /* more are scanned while rows are few */
  x->parts[x->n_parts] = (visited){part->entry.row0, part->entry.n_rows, (uint32_t)x->n_parts, coarse};
  x->n_parts++;
  x->n_seen += count_between(x, part->entry.row0, part->entry.n_rows);
  return !x->deep && x->n_seen == x->n_true && x->n_parts >= AT_LEAST;
}

static int by_row0(const void *pa, const void *pb) {
  const visited *a = pa, *b = pb;
  if (a->row0 != b->row0) return a->row0 < b->row0 ? -1 : 1;
  return a->n_rows < b->n_rows ? -1 : a->n_rows > b->n_rows; /* an empty one may start where the next does */
}

/* The how many-th partition holds this row; UINT32_MAX: none. */
static uint32_t part_of(const search *x, uint32_t row) {
  size_t lo = 0;
  for (size_t hi = x->n_parts; lo < hi;) { /* the first that starts behind it */
    size_t mid = (lo + hi) / 2;
    if (x->by_row[mid].row0 <= row) lo = mid + 1;
    else hi = mid;
  }
  return lo && row - x->by_row[lo - 1].row0 < x->by_row[lo - 1].n_rows ? x->by_row[lo - 1].rank : UINT32_MAX;
}

static vs_rc search_run(search *x, vs_err *err) {
  const ivfpq_truth *t = x->p->t;
  uint32_t keep = x->deep ? IVFPQ_DEEP_CANDIDATES : IVFPQ_PROFILE_CANDIDATES;
  ivfpq_stats stats = {0};
  ivfpq_query q = {.vector = t->raw + x->query * t->m->dim, .nprobe = x->most, .n_candidates = keep, .k = 1, .visit = visit,
                   .visit_ctx = x};
  x->parts = malloc((x->most + 1) * sizeof *x->parts), x->by_row = malloc((x->most + 1) * sizeof *x->by_row);
  x->scratch = malloc((2 * keep + 64) * sizeof *x->scratch), x->part = malloc((keep + 1) * sizeof *x->part);
  x->order = malloc((keep + 1) * sizeof *x->order), x->head = malloc((x->most + 1) * sizeof *x->head);
  int ok = x->parts && x->by_row && x->scratch && x->part && x->order && x->head;
  vs_rc rc = ok ? ivfpq_table_allocate(&x->p->s->params, &x->table, err) : vs_nomem(err);
  if (rc) return rc;
  ivfpq_table_query(x->p->s, q.vector, &x->table);
  take_true(x);
  rc = ivfpq_scan(x->p->s, &q, &x->keys, &stats, err);
  if (rc || !x->n_parts) return rc;
  memcpy(x->by_row, x->parts, x->n_parts * sizeof *x->parts);
  qsort(x->by_row, x->n_parts, sizeof *x->by_row, by_row0);
  return VS_OK;
}

static void search_reset(search *x) {
  free(x->parts), free(x->by_row), free(x->scratch), free(x->part), free(x->order), free(x->head);
  ivfpq_table_reset(&x->table);
  ivfpq_keys_reset(&x->keys);
}

/* ---- what it found ---- */

/* Leaves the rows that matter, in order: up to the last true neighbour, and those that a reach is measured from; of a deep search all.
 * Without the query itself. */
static size_t keep_relevant(search *x) {
  uint32_t self = x->p->t->queries[x->query].rows[-1], at;
  uint64_t *key = x->keys.key, last = 0;
  size_t n = 0, kept = 0;
  for (size_t i = 0; i < x->keys.n; i++) {
    uint32_t row = kern_key_number(key[i]);
    if (row == self) continue;
    if (key[i] > last && find_row(x, row, &at) && at < IVFPQ_TRUE) last = key[i];
    key[n++] = key[i];
  }
  if (n > IVFPQ_TRUE && !x->deep) {
    uint64_t nearest = kern_get()->select_u64(key, n, IVFPQ_TRUE, x->scratch);
    if (nearest > last) last = nearest;
  } else last = UINT64_MAX;
  for (size_t i = 0; i < n; i++)
    if (key[i] <= last) key[kept++] = key[i];
  kern_sort_u64(key, kept, x->scratch);
  n = 0;
  for (size_t i = 0; i < kept; i++)
    if ((x->part[n] = part_of(x, kern_key_number(key[i]))) != UINT32_MAX) key[n++] = key[i];
  return n;
}

/* Where each true neighbour stands among what the first so many partitions brought. */
static void rank_true(const search *x, size_t n, ivfpq_profile *out) {
  uint32_t before[IVFPQ_PROFILE_PROBES] = {0}, at; /* rows so far, by the level from which on they are there */
  for (size_t i = 0; i < n; i++) {
    int is_near = find_row(x, kern_key_number(x->keys.key[i]), &at);
    if (is_near && x->deep) out->rank[at] = (uint16_t)(i + 1);
    if (is_near && at < IVFPQ_TRUE) {
      uint32_t sum = 0;
      out->part[at] = x->part[i];
      for (size_t l = 0; l < x->p->n_probes; l++) {
        sum += before[l];
        out->need[at][l] = (uint16_t)(sum < IVFPQ_PROFILE_CANDIDATES ? sum + 1 : IVFPQ_PROFILE_CANDIDATES + 1);
      }
    }
    before[x->p->level[x->part[i] + 1]]++;
  }
}

/* order: the rows by partition, head[i] where those of partition i begin. */
static void sort_by_part(const search *x, size_t n) {
  memset(x->head, 0, (x->n_parts + 1) * sizeof *x->head);
  for (size_t i = 0; i < n; i++) x->head[x->part[i]]++;
  for (size_t i = 0, sum = 0; i <= x->n_parts; i++) {
    size_t here = i < x->n_parts ? x->head[i] : 0;
    x->head[i] = (uint32_t)sum, sum += here;
  }
  for (size_t i = 0; i < n; i++) x->order[x->head[x->part[i]]++] = (uint32_t)i;
  for (size_t i = x->n_parts; i > 0; i--) x->head[i] = x->head[i - 1];
  x->head[0] = 0;
}

static float beyond(const search *x, uint32_t part, uint64_t key) {
  return ivfpq_table_beyond(x->p->s, &x->table, x->parts[part].coarse, kern_key_value(key));
}

static void note_reach(ivfpq_profile *out, int curve, uint32_t part, float far) {
  float before = part ? out->beyond[curve][part - 1] : 0;
  out->beyond[curve][part] = far > before ? far : before;
}

/* How far each partition lies beyond the k-th best estimate of those before it. */
static void measure_reach(const search *x, size_t n, ivfpq_profile *out) {
  uint64_t best[IVFPQ_TRUE];
  uint32_t n_best = 0;
  sort_by_part(x, n);
  for (uint32_t i = 0; i < x->n_parts; i++) {
    for (int c = 0; c < IVFPQ_TRUE_CURVES; c++)
      note_reach(out, c, i, n_best >= ivfpq_curve_k[c] ? beyond(x, i, best[ivfpq_curve_k[c] - 1]) : 0);
    for (uint32_t at = x->head[i]; at < x->head[i + 1]; at++) {
      uint64_t key = x->keys.key[x->order[at]];
      if (n_best == IVFPQ_TRUE && key >= best[n_best - 1]) continue;
      uint32_t to = n_best < IVFPQ_TRUE ? n_best++ : n_best - 1;
      for (; to && best[to - 1] > key; to--) best[to] = best[to - 1];
      best[to] = key;
    }
  }
}

/* The same for a large k. The k-th best estimate is taken at a few numbers of partitions: in between it is a little too far, which
 * a scan's is as well. */
static void measure_deep_reach(const search *x, size_t n, int curve, ivfpq_profile *out) {
  uint32_t k = ivfpq_curve_k[curve], found[IVFPQ_PROFILE_PROBES] = {0};
  uint64_t kth[IVFPQ_PROFILE_PROBES] = {0};
  for (size_t i = 0; i < n; i++)
    for (size_t l = x->p->level[x->part[i] + 1]; l < x->p->n_probes && found[l] < k; l++)
      if (++found[l] == k) kth[l] = x->keys.key[i]; /* more partitions have more: those behind are full */
  for (uint32_t i = 0, l = 0; i < x->n_parts; i++) {
    while (l < x->p->n_probes && x->p->probes[l] <= i) l++; /* the last level whose partitions came before it */
    note_reach(out, curve, i, l && kth[l - 1] ? beyond(x, i, kth[l - 1]) : 0);
  }
}

/* Which partitions hold the k nearest. */
static void count_inside(const search *x, int curve, ivfpq_profile *out) {
  const ivfpq_truth_query *q = &x->p->t->queries[x->query];
  uint32_t k = ivfpq_curve_k[curve];
  if (q->n_rows < k - k / 20) return; /* a few less will do */
  for (uint32_t i = 0; i < q->n_rows && i < k; i++) {
    uint32_t part = q->rows[i] == UINT32_MAX ? UINT32_MAX : part_of(x, q->rows[i]);
    if (part != UINT32_MAX) out->inside[curve][part + 1]++;
    out->n_inside[curve] += q->rows[i] != UINT32_MAX;
  }
  for (size_t i = 0; i < x->n_parts; i++) out->inside[curve][i + 1] += out->inside[curve][i];
}

static vs_rc allocate(ivfpq_profile *p, uint32_t n_parts, int deep, vs_err *err) {
  int curves = deep ? IVFPQ_CURVES : IVFPQ_TRUE_CURVES, ok = (p->rows = calloc(n_parts, sizeof *p->rows)) != NULL;
  for (int c = 0; c < curves; c++) {
    ok = ok && (p->beyond[c] = calloc(n_parts, sizeof **p->beyond));
    if (c >= IVFPQ_TRUE_CURVES) ok = ok && (p->inside[c] = calloc(n_parts + 1, sizeof **p->inside));
  }
  return ok ? VS_OK : vs_nomem(err);
}

void ivfpq_profile_reset(ivfpq_profile *p) {
  free(p->rows);
  for (int c = 0; c < IVFPQ_CURVES; c++) free(p->beyond[c]), free(p->inside[c]);
  memset(p, 0, sizeof *p);
}

/* Partitions that were not looked at are like those that were. */
static void guess_rest(const search *x, ivfpq_profile *p) {
  uint32_t n = (uint32_t)x->n_parts;
  for (uint32_t i = 0; i < p->n_parts; i++)
    p->rows[i] = (i ? p->rows[i - 1] : 0) + (i < n ? x->parts[i].n_rows : p->rows[n - 1] / n);
  for (uint32_t i = n; i < p->n_parts; i++)
    for (int c = 0; c < IVFPQ_CURVES; c++) {
      if (p->beyond[c]) p->beyond[c][i] = p->beyond[c][i - 1];
      if (p->inside[c]) p->inside[c][i + 1] = p->inside[c][i];
    }
}

vs_rc ivfpq_profile_make(const ivfpq_profiler *p, size_t query, ivfpq_profile *out, vs_err *err) {
  int deep = p->t->queries[query].deep != NULL;
  search x = {.p = p, .query = query, .deep = deep, .most = p->probes[(deep ? p->n_probes : p->n_true_probes) - 1]};
  memset(out, 0, sizeof *out);
  memset(out->part, 0xff, sizeof out->part);
  vs_rc rc = search_run(&x, err);
  if (!rc && x.n_parts) rc = allocate(out, x.most, deep, err);
  if (!rc && x.n_parts) {
    size_t n = keep_relevant(&x);
    out->n_true = x.n_true, out->n_parts = x.most;
    rank_true(&x, n, out);
    measure_reach(&x, n, out);
    for (int c = IVFPQ_TRUE_CURVES; c < IVFPQ_CURVES && deep; c++) measure_deep_reach(&x, n, c, out), count_inside(&x, c, out);
    guess_rest(&x, out);
  }
  search_reset(&x);
  return rc;
}
