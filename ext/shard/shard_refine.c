/* shard_refine.c - see shard_refine.h.
 *
 * Where vectors are large and files are mapped, sketches (ivfpq_sketch.h) first say which candidates can be among the k nearest: a
 * few more than k, and never too few, so that stores, which have no use for a second round of reads, give the same rows.
 *
 * Tried and dropped: comparing candidates in the order of their estimates until the rest lies farther than the k-th true distance
 * allows. Estimates of codes lie so close together that at equal recall it saved 5 % of a search at 128 dimensions, and 10 % of
 * one at 960, before there were sketches.
 */
#include "shard_refine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "../ivfpq/ivfpq_sketch.h"
#include "../kernels/kern.h"

enum {
  SLICE = 256,          /* rows per task */
  SKETCH_SLICE = 1024,  /* the same for sketches: each task prepares the query */
  FEW = 48,             /* hits that an insertion sort puts in order faster than others */
  MANY = SHARD_MANY
};

int shard_hit_order(const void *pa, const void *pb) {
  const shard_hit *a = pa, *b = pb;
  uint64_t x = kern_key(a->distance, a->shard), y = kern_key(b->distance, b->shard);
  if (x != y) return x < y ? -1 : 1;
  if (a->segment != b->segment) return a->segment < b->segment ? -1 : 1;
  return a->row < b->row ? -1 : a->row > b->row;
}

static void sort_few(shard_hit *hits, size_t n) {
  for (size_t i = 1; i < n; i++) {
    shard_hit h = hits[i];
    size_t at = i;
    for (; at && shard_hit_order(&hits[at - 1], &h) > 0; at--) hits[at] = hits[at - 1];
    hits[at] = h;
  }
}

int shard_storage_order(const void *pa, const void *pb) {
  const shard_hit *a = pa, *b = pb;
  if (a->shard != b->shard) return a->shard < b->shard ? -1 : 1;
  if (a->segment != b->segment) return a->segment < b->segment ? -1 : 1;
  return a->row < b->row ? -1 : a->row > b->row;
}

static ivfpq_segment *segment_of(const shard_search *q, const shard_hit *h) { return q->shards[h->shard]->segments[h->segment]; }

static int same_segment(const shard_hit *a, const shard_hit *b) { return a->shard == b->shard && a->segment == b->segment; }

/* Hits from h on, of n, that lie in one segment. */
static size_t stretch(const shard_hit *h, size_t n) {
  size_t m = 1;
  while (m < n && same_segment(h, h + m)) m++;
  return m;
}

vs_rc shard_hits_nearest(shard_hit *hits, size_t *n, uint64_t k, ivfpq_keys *work, vs_err *err) {
  vs_rc rc = *n ? ivfpq_keys_room(work, *n, err) : VS_OK;
  if (rc || !*n) return rc;
  uint64_t *key = work->key;
  for (size_t i = 0; i < *n; i++) key[i] = kern_key(hits[i].distance, (uint32_t)i);
  if (*n > k) kern_get()->select_u64(key, *n, (size_t)k, work->scratch), *n = (size_t)k;
  kern_sort_u64(key, *n, work->scratch);
  shard_hit *sorted = (shard_hit *)work->scratch; /* a hit is as large as two keys */
  for (size_t i = 0; i < *n; i++) sorted[i] = hits[kern_key_number(key[i])];
  memcpy(hits, sorted, *n * sizeof *hits);
  return VS_OK;
}

/* Rows of one segment, ascending; returns how many, which is n unless a damaged file names a row twice. A good part of the rows of a
 * segment is marked in a bitmap, and read off it. */
static size_t order_rows(shard_hit *h, size_t n, ivfpq_keys *work) {
  uint32_t first = UINT32_MAX, last = 0;
  for (size_t i = 0; i < n; i++) {
    if (h[i].row < first) first = h[i].row;
    if (h[i].row > last) last = h[i].row;
  }
  size_t words = (last - first) / 64 + 1, m = 0;
  if (words > 2 * n) {
    for (size_t i = 0; i < n; i++) work->key[i] = h[i].row;
    kern_sort_u64(work->key, n, work->scratch);
    for (size_t i = 0; i < n; i++) h[i].row = (uint32_t)work->key[i];
    return n;
  }
  uint64_t *bits = work->scratch; /* room for 2 n keys */
  memset(bits, 0, words * sizeof *bits);
  for (size_t i = 0; i < n; i++) bits[(h[i].row - first) / 64] |= 1ull << (h[i].row - first) % 64;
  for (size_t w = 0; w < words; w++)
    for (uint64_t left = bits[w]; left; left &= left - 1) h[m++].row = first + (uint32_t)w * 64 + (uint32_t)__builtin_ctzll(left);
  return m;
}

/* Files are then read from front to back, and ties come as they are to be returned. The estimates are lost. Segments mostly come
 * in order already, each with all of its hits. */
static vs_rc order_by_storage(shard_hit *hits, size_t *n_hits, ivfpq_keys *work, vs_err *err) {
  size_t n = *n_hits, kept = 0;
  vs_rc rc = ivfpq_keys_room(work, n, err);
  if (rc) return rc;
  for (size_t i = 1; i < n; i++)
    if (hits[i].shard < hits[i - 1].shard || (hits[i].shard == hits[i - 1].shard && hits[i].segment < hits[i - 1].segment)) {
      qsort(hits, n, sizeof *hits, shard_storage_order);
      return VS_OK;
    }
  for (size_t at = 0, m; at < n; at += m) {
    m = stretch(hits + at, n - at);
    size_t ordered = order_rows(hits + at, m, work);
    if (kept < at) memmove(hits + kept, hits + at, ordered * sizeof *hits);
    kept += ordered;
  }
  *n_hits = kept;
  return VS_OK;
}

/* ---- slices ---- */

typedef struct job {
  const shard_refine *r;
  vs_rc (*run)(struct job *, size_t at, size_t n, vs_err *);
  shard_hit *hits;    /* estimates become distances */
  size_t n, slice;
  vs_rc rc;
  vs_err err;
  pthread_mutex_t lock;
} job;

static vs_rc run_slice(job *j, size_t i, vs_err *err) {
  size_t at = i * j->slice, n = j->n - at < j->slice ? j->n - at : j->slice;
  vs_rc rc = j->run(j, at, n, err);
  return !rc && n == j->slice && j->r->stop(j->r->stop_ctx) ? vs_fail(err, VS_INTERRUPT, "interrupted") : rc;
}

static void slice_task(void *ctx, size_t i) {
  job *j = ctx;
  vs_err err;
  vs_err_reset(&err);
  vs_rc rc = run_slice(j, i, &err);
  if (!rc) return;
  pthread_mutex_lock(&j->lock);
  if (!j->rc) j->rc = rc, j->err = err;
  pthread_mutex_unlock(&j->lock);
}

static vs_rc run_job(job *j, vs_err *err) {
  if (!j->n) return VS_OK;
  if (j->n <= j->slice) return run_slice(j, 0, err);
  j->rc = VS_OK;
  pthread_mutex_init(&j->lock, NULL);
  vs_pool_run((j->n + j->slice - 1) / j->slice, j->r->q->threads, slice_task, j);
  pthread_mutex_destroy(&j->lock);
  return j->rc ? vs_fail(err, j->rc, "%s", j->err.text) : VS_OK;
}

/* ---- comparing ---- */

static int all_mapped(const shard_search *q, const shard_hit *hits, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!(i && same_segment(&hits[i - 1], &hits[i])) && !ivfpq_rows_mapped(segment_of(q, &hits[i]))) return 0;
  return 1;
}

/* Stretches of one segment, each addressed, or read in one round. */
static vs_rc compare(job *j, size_t at, size_t n, vs_err *err) {
  const shard_search *q = j->r->q;
  shard_hit *hits = j->hits + at;
  uint32_t rows[SLICE];
  float distance[SLICE];
  vs_rc rc = VS_OK;
  if (!all_mapped(q, hits, n)) qsort(hits, n, sizeof *hits, shard_storage_order);
  for (size_t from = 0, m; from < n && !rc; from += m) {
    shard_hit *h = hits + from;
    ivfpq_segment *s = segment_of(q, h);
    m = stretch(h, n - from);
    for (size_t i = 0; i < m; i++) rows[i] = h[i].row;
    rc = ivfpq_rows_mapped(s) ? ivfpq_distances_mapped(s, q->query, rows, m, distance, err) : ivfpq_distances(s, q->query, rows, m, distance, err);
    for (size_t i = 0; i < m && !rc; i++) h[i].distance = distance[i];
  }
  return rc;
}

static vs_rc compare_all(const shard_refine *r, shard_hit *hits, size_t n, vs_err *err) {
  job j;
  j.r = r, j.run = compare, j.hits = hits, j.n = n, j.slice = SLICE;
  return run_job(&j, err);
}

/* ---- rows in stores ---- */

vs_rc shard_hold(const shard_search *q, const shard_hit *hits, size_t n, shard_held *h, vs_err *err) {
  int any = 0;
  for (size_t i = 0; i < n && !any; i++) any = !segment_of(q, &hits[i])->io->local;
  if (!any) return VS_OK;
  uint32_t *rows = malloc((n + 1) * sizeof *rows);
  h->hits = malloc((n + 1) * sizeof *h->hits), h->rows = calloc(n + 1, sizeof *h->rows);
  vs_rc rc = rows && h->hits && h->rows ? VS_OK : vs_nomem(err);
  if (!rc) {
    memcpy(h->hits, hits, n * sizeof *hits);
    qsort(h->hits, n, sizeof *hits, shard_storage_order);
    h->n = n;
  }
  for (size_t at = 0, m; at < n && !rc; at += m) {
    const shard_hit *first = h->hits + at;
    m = stretch(first, n - at);
    for (size_t i = 0; i < m; i++) rows[i] = first[i].row;
    ivfpq_segment *s = segment_of(q, first);
    if (!s->io->local) rc = ivfpq_rows_begin(s, rows, m, h->rows + at, err);
  }
  free(rows);
  return rc;
}

void shard_release(const shard_search *q, shard_held *h) {
  for (size_t i = 0; i < h->n; i++)
    if (h->rows[i].range.len) ivfpq_rows_release(segment_of(q, &h->hits[i]), &h->rows[i], 1);
  free(h->hits), free(h->rows);
}

/* ---- sketches ---- */

static int all_sketched(const shard_search *q, const shard_hit *hits, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (!(i && same_segment(&hits[i - 1], &hits[i])) && !ivfpq_sketches_mapped(segment_of(q, &hits[i]))) return 0;
  return 1;
}

/* How near every hit may be (its `distance`), and how far (its key); hits of a segment lie together. */
static vs_rc bound(job *j, size_t at, size_t n, vs_err *err) {
  uint32_t rows[SKETCH_SLICE];
  float est[SKETCH_SLICE], width[SKETCH_SLICE];
  uint64_t *key = j->r->work->key;
  vs_rc rc = VS_OK;
  for (size_t end = at + n, m; at < end && !rc; at += m) {
    shard_hit *h = j->hits + at;
    m = stretch(h, end - at);
    for (size_t i = 0; i < m; i++) rows[i] = h[i].row;
    rc = ivfpq_sketch_estimate(segment_of(j->r->q, h), j->r->q->query, rows, m, est, width, err);
    for (size_t i = 0; i < m && !rc; i++) {
      h[i].distance = est[i] - width[i];
      key[at + i] = kern_key(est[i] + width[i], (uint32_t)(at + i));
    }
  }
  return rc;
}

/* Leaves out the hits that are farther than the k-th nearest for sure. */
static vs_rc drop_far(const shard_refine *r, shard_hit *hits, size_t *n_hits, vs_err *err) {
  size_t n = *n_hits, kept = 0;
  int one = r->q->n_shards == 1 && r->q->shards[0]->manifest.n_segments == 1;
  if (!shard_sketches_pay(n, r->k) || !all_sketched(r->q, hits, n)) return VS_OK;
  if (!one && n < MANY) qsort(hits, n, sizeof *hits, shard_storage_order);
  vs_rc rc = ivfpq_keys_room(r->work, n, err);
  job j;
  j.r = r, j.run = bound, j.hits = hits, j.n = n, j.slice = SKETCH_SLICE;
  if (!rc) rc = run_job(&j, err);
  if (rc) return rc;
  float border = kern_key_value(kern_get()->select_u64(r->work->key, n, (size_t)r->k, r->work->scratch));
  for (size_t i = 0; i < n; i++)
    if (hits[i].distance <= border) hits[kept++] = hits[i];
  *n_hits = kept;
  return VS_OK;
}

/* ---- the whole ---- */

/* Only they are sorted, and what ties with the last of them: ties are decided by storage order. */
vs_rc shard_keep_nearest(const shard_refine *r, shard_hit *hits, size_t *n_hits, vs_err *err) {
  size_t n = *n_hits, m = 0;
  if (n > r->k) {
    vs_rc rc = ivfpq_keys_room(r->work, n, err);
    if (rc) return rc;
    uint64_t *key = r->work->key;
    for (size_t i = 0; i < n; i++) key[i] = kern_key(hits[i].distance, (uint32_t)i);
    float border = kern_key_value(kern_get()->select_u64(key, n, (size_t)r->k, r->work->scratch));
    for (size_t i = 0; i < n; i++)
      if (!(hits[i].distance > border)) hits[m++] = hits[i];
    n = m, *n_hits = (size_t)r->k;
  }
  if (n <= FEW) sort_few(hits, n);
  else qsort(hits, n, sizeof *hits, shard_hit_order);
  return VS_OK;
}

vs_rc shard_refine_run(const shard_refine *r, shard_hit *hits, size_t *n, uint64_t *refined, vs_err *err) {
  shard_held h = {0};
  int many = *n >= MANY;
  vs_rc rc = many ? order_by_storage(hits, n, r->work, err) : VS_OK;
  if (!rc) rc = drop_far(r, hits, n, err);
  if (!rc) rc = shard_hold(r->q, hits, *n, &h, err);
  if (!rc) rc = compare_all(r, hits, *n, err);
  shard_release(r->q, &h);
  *refined = *n;
  if (rc) return rc;
  return many ? shard_hits_nearest(hits, n, r->k, r->work, err) : shard_keep_nearest(r, hits, n, err);
}
