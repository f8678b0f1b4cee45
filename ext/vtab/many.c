/* many.c - see many.h. */
#include "many.h"

#include <stdlib.h>
#include <string.h>
SQLITE_EXTENSION_INIT3

static const float *query_at(const many *m, uint32_t i) { return m->queries + (size_t)i * m->opt.dim; }

static stream_options options_of(const many *m, uint32_t i) {
  stream_options o = m->opt;
  o.query = query_at(m, i);
  return o;
}

static void drop_row(many *m) {
  if (m->has_row) ivfpq_rows_release(m->segment, &m->row, 1);
  m->has_row = 0;
}

static int beyond(const stream_bound *limit, double d) { return limit->given && (limit->open ? d >= limit->at : d > limit->at); }

/* ---- blocks ---- */

static vs_rc next_stream(many *m, vs_err *err) {
  stream_options o = options_of(m, m->next);
  stream_reset(&m->stream);
  m->first_query = m->next++, m->query = 0;
  vs_rc rc = stream_open(&m->stream, m->statement, m->shards, m->n_shards, &o, err);
  m->n = rc ? 0 : m->stream.n;
  return rc;
}

static shard_batch batch_of(const many *m, size_t n) {
  const stream_options *o = &m->opt;
  return (shard_batch){.search = {.shards = m->shards, .n_shards = m->n_shards, .dim = o->dim, .k = o->k, .nprobe = o->nprobe,
                                  .refine = o->refine, .recall = o->recall, .exact = o->exact, .filters = m->filters, .threads = o->threads},
                       .queries = query_at(m, m->next), .n = n, .first = m->next};
}

static vs_rc next_batch(many *m, vs_err *err) {
  size_t left = m->n_queries - m->next, n = left < m->n_block ? left : m->n_block;
  shard_batch b = batch_of(m, n);
  shard_stats stats;
  shard_answers_reset(&m->answers);
  vs_rc rc = shard_batch_run(&b, &m->answers, &stats, err);
  statement_trace_search(m->statement, &stats);
  m->first_query = m->next, m->query = 0, m->next += (uint32_t)n;
  m->n = rc ? 0 : m->answers.first[n];
  return rc;
}

static void find_query(many *m) {
  while (m->at >= m->answers.first[m->query + 1]) m->query++;
}

/* Passes over rows beyond the limit of distance; then `query` is the current row's. */
static void settle(many *m) {
  while (!m->streams && m->at < m->n) {
    find_query(m);
    if (!beyond(&m->opt.limit, m->answers.hits[m->at].distance)) return;
    m->at = m->answers.first[m->query + 1]; /* farther rows follow, up to the next query */
  }
}

/* The first row of the next block that has one. */
static vs_rc next_block(many *m, vs_err *err) {
  vs_rc rc = VS_OK;
  m->at = m->n = 0;
  ahead_reset(&m->ahead);
  while (!rc && m->at >= m->n && m->next < m->n_queries) {
    m->at = 0;
    rc = m->streams ? next_stream(m, err) : next_batch(m, err);
    if (!rc) settle(m);
  }
  return rc;
}

/* ---- in order of distance ---- */

static int by_distance(const void *pa, const void *pb) {
  const many_row_at *a = pa, *b = pb;
  if (a->hit.distance != b->hit.distance) return a->hit.distance < b->hit.distance ? -1 : 1;
  return a->rank < b->rank ? -1 : a->rank > b->rank; /* by query, then as its search ranked them */
}

static vs_rc step(many *m, vs_err *err) {
  if (m->streams) {
    vs_rc rc = stream_next(&m->stream, err);
    m->at = m->stream.at, m->n = m->stream.n; /* a stream has batches of its own */
    if (rc || m->at < m->n) return rc;
  } else {
    m->at++;
    settle(m);
  }
  return m->at < m->n ? VS_OK : next_block(m, err);
}

static vs_rc find_all(many *m, vs_err *err) {
  size_t room = 0, n = 0;
  many_row_at *all = NULL;
  vs_rc rc = next_block(m, err);
  for (; !rc && !many_eof(m); rc = step(m, err)) {
    if (n == room) {
      many_row_at *grown = realloc(all, (room * 2 + 1024) * sizeof *grown);
      if (!grown) {
        rc = vs_nomem(err);
        break;
      }
      all = grown, room = room * 2 + 1024;
    }
    all[n] = (many_row_at){*many_hit(m), many_query_no(m), n}, n++;
  }
  if (!rc && n) qsort(all, n, sizeof *all, by_distance);
  m->sorted = 1, m->all = all, m->at = 0, m->n = m->n_all = rc ? 0 : n;
  return rc;
}

/* ---- the whole ---- */

vs_rc many_open(many *m, statement *owner, shard *const *shards, size_t n_shards, const stream_options *opt, uint32_t n_queries, int sorted,
                vs_err *err) {
  memset(m, 0, sizeof *m);
  m->shards = shards, m->n_shards = n_shards, m->opt = *opt, m->statement = owner;
  m->queries = opt->query, m->n_queries = n_queries;
  if (!opt->has_k) return vs_fail(err, VS_INVALID, "several queries at once need k");
  uint64_t n_rows = 0;
  for (size_t i = 0; i < n_shards; i++) n_rows += shards[i]->manifest.n_rows;
  if (m->opt.k > n_rows) m->opt.k = n_rows;
  m->streams = opt->floor.given || m->opt.k > STREAM_MOST || (opt->filter && filter_by_id(opt->filter));
  if (!m->streams && opt->filter && opt->filter->n) {
    if (!(m->filters = malloc((n_shards + 1) * sizeof *m->filters))) return vs_nomem(err);
    for (size_t i = 0; i < n_shards; i++) m->filters[i] = &opt->filter->base;
  }
  shard_batch b = batch_of(m, 0);
  m->n_block = shard_batch_most(&b.search);
  return sorted ? find_all(m, err) : next_block(m, err);
}

vs_rc many_next(many *m, vs_err *err) {
  drop_row(m);
  m->row_no++;
  if (!m->sorted) return step(m, err);
  m->at++;
  return VS_OK;
}

int many_step(many *m) {
  int last = m->at + 1 >= m->n;
  if (m->has_row || (!m->sorted && (m->streams || m->opt.limit.given || (last && m->next < m->n_queries)))) return 0;
  m->row_no++, m->at++;
  if (!m->sorted && !last) find_query(m);
  return 1;
}

int many_row_at_hand(many *m, ivfpq_segment **segment, const uint8_t **record, vs_rc *rc, vs_err *err) {
  const shard_hit *h = many_hit(m);
  *segment = m->shards[h->shard]->segments[h->segment];
  if (!ivfpq_rows_mapped(*segment)) return 0;
  *rc = ivfpq_row_at(*segment, h->row, record, err);
  return 1;
}

const shard_hit *many_hit(const many *m) {
  return m->sorted ? &m->all[m->at].hit : m->streams ? stream_hit(&m->stream) : &m->answers.hits[m->at];
}

uint32_t many_query_no(const many *m) { return m->sorted ? m->all[m->at].query_no : m->first_query + m->query; }

int many_id_at_hand(const many *m, sqlite3_int64 *id) {
  if (m->sorted || m->streams || !m->answers.ids) return 0;
  *id = m->answers.ids[m->at];
  return 1;
}

static const shard_hit *hit_at(void *ctx, size_t i) {
  const many *m = ctx;
  return m->sorted ? &m->all[i].hit : &m->answers.hits[i];
}

vs_rc many_row(many *m, int with_columns, ivfpq_segment **segment, const uint8_t **record, vs_err *err) {
  if (m->streams && !m->sorted) return stream_row(&m->stream, with_columns, segment, record, err);
  const shard_hit *h = many_hit(m);
  vs_rc rc = ahead_want(&m->ahead, m->shards, hit_at, m, m->at, m->n, with_columns, err);
  m->segment = m->shards[h->shard]->segments[h->segment];
  if (!rc && !m->has_row) {
    rc = ivfpq_rows_fetch(m->segment, &h->row, 1, &m->row, err);
    m->has_row = !rc;
  }
  *segment = m->segment, *record = m->row.record;
  return rc;
}

void many_reset(many *m) {
  drop_row(m);
  ahead_reset(&m->ahead);
  stream_reset(&m->stream);
  shard_answers_reset(&m->answers);
  free(m->filters), free(m->all);
  memset(m, 0, sizeof *m);
}
