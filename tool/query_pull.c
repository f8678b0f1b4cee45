/* query_pull.c - see query_pull.h.
 *
 * What n queries read of a segment: the centroids once; of its partitions those that any query probes; of its rows those that any
 * compares. A query probes nprobe of nlist partitions; taken as drawn by chance, n queries touch nlist * (1 - (1 - nprobe/nlist)^n)
 * of them, and so with rows. Queries that lie together touch fewer, so this is rather too much; but what a cache does not hold
 * from one block of queries to the next is read again, so it is counted per block when it is more than the cache.
 * Those bytes come in small pieces, each a request, and are gone afterwards; pulled ones come in large pieces and stay. So half of
 * what is missing is taken to be as dear as all of it.
 */
#include "query_pull.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../ext/s3vfs/io_s3.h"
#include "../ext/shard/shard_spend.h"
#include "output.h"
#include "pull.h"

#define PIECES_COST 2 /* a byte read in small pieces, in bytes pulled */

typedef struct estimate { double bytes; uint64_t n_queries; } estimate;

/* Of n things, how many are touched when each of `draws` touches `each` of them. */
static double touched(double n, double each, double draws) {
  if (n <= 0) return 0;
  return each >= n ? n : n * -expm1(draws * log1p(-each / n));
}

static double segment_bytes(const ivfpq_segment *s, const ivfpq_setting *spend, double share, int exact, double n_queries) {
  double rows = (double)s->section[IVFPQ_ROWS].size, row = (double)s->params.row_bytes;
  if (exact || ivfpq_is_flat(s) || !spend->nprobe) return rows;
  double scan = (double)s->section[IVFPQ_SCAN].size / s->params.nlist;
  return (double)s->section[IVFPQ_GROUPS].size + (double)s->section[IVFPQ_CODEBOOK].size + (double)s->section[IVFPQ_PROJECTION].size +
         scan * touched(s->params.nlist, spend->nprobe, n_queries) +
         row * touched((double)s->params.n_rows, (double)spend->n_candidates * share, n_queries);
}

/* Of all segments, for n_queries at once. */
static double bytes_at_once(const shard_search *q, ivfpq_segment **segments, const ivfpq_setting *spend, size_t n, int exact,
                            double n_rows, double n_queries) {
  double bytes = 0;
  for (size_t i = 0; i < n; i++)
    bytes += segment_bytes(segments[i], &spend[i], n_rows > 0 ? (double)segments[i]->params.n_rows / n_rows : 0, exact || q->exact, n_queries);
  return bytes;
}

static double estimate_bytes(const shard_search *q, uint64_t n_queries) {
  size_t n = 0, most = shard_batch_most(q);
  uint64_t n_rows = 0;
  for (size_t i = 0; i < q->n_shards; i++) n += q->shards[i]->manifest.n_segments, n_rows += q->shards[i]->manifest.n_rows;
  ivfpq_segment **segments = tool_alloc(n, sizeof *segments);
  ivfpq_setting *spend = tool_alloc(n, sizeof *spend);
  for (size_t i = 0, at = 0; i < q->n_shards; i++)
    for (size_t g = 0; g < q->shards[i]->manifest.n_segments; g++) segments[at++] = q->shards[i]->segments[g];
  shard_spend all = shard_spend_plan(q, q->k < n_rows ? q->k : n_rows, n_rows, segments, n, spend);
  double whole = bytes_at_once(q, segments, spend, n, all.exact, (double)n_rows, (double)n_queries), blocks = ceil((double)n_queries / (double)most);
  if (whole > (double)io_s3_cache_state().limit && blocks > 1)
    whole = blocks * bytes_at_once(q, segments, spend, n, all.exact, (double)n_rows, (double)n_queries / blocks);
  free(segments), free(spend);
  return whole;
}

static int worth(void *ctx, uint64_t missing) {
  estimate *e = ctx;
  char read[32], pull[32];
  output_size((uint64_t)e->bytes, read), output_size(missing, pull);
  if (!missing) {
    tool_note("the shards are there already: nothing is read from the store");
    return 1;
  }
  int yes = (double)missing <= PIECES_COST * e->bytes;
  tool_note("%llu queries would read about %s from the store, pulling the shards first %s: %s", (unsigned long long)e->n_queries, read, pull,
            yes ? "they are pulled" : "they stay there");
  return yes;
}

/* DIR, or DIR/NAME for a single shard. */
static char *target_of(const char *source, const char *dir, const shard_search *q) {
  size_t n = strlen(source);
  while (n && source[n - 1] == '/') n--;
  size_t from = n;
  while (from && source[from - 1] != '/') from--;
  int single = q->n_shards == 1 && strlen(q->shards[0]->path) >= n && !strncmp(q->shards[0]->path, source, n) &&
               strspn(q->shards[0]->path + n, "/") == strlen(q->shards[0]->path + n);
  return single ? tool_format("%s/%.*s", dir, (int)(n - from), source + from) : tool_format("%s", dir);
}

vs_rc query_pull(const char *source, const char *dir, const shard_search *q, uint64_t n_queries, char **local, vs_err *err) {
  estimate e = {.bytes = estimate_bytes(q, n_queries), .n_queries = n_queries};
  char *target = target_of(source, dir, q);
  int pulled = 0;
  *local = NULL;
  vs_rc rc = pull_when_worth(source, target, worth, &e, &pulled, err);
  if (!rc && pulled) *local = target, target = NULL;
  free(target);
  return rc;
}
