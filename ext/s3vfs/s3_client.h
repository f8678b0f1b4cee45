/* s3_client.h - operations on objects of an S3 store.
 *
 * Each waits for its answer, retries what may be retried (429, 5xx, resets, short bodies, stalls; full jitter, Retry-After)
 * within the time limit of the thread's vs_scope (default VECSHARD_TIMEOUT_MS or 60 s), and returns VS_INTERRUPT soon after
 * the scope is stopped. Errors name the object (s3://bucket/key) and what the store said (status, code, message), never a
 * secret. Safe to call from any number of threads at once: all go through one libcurl multi thread (s3_engine.h).
 */
#ifndef S3_CLIENT_H
#define S3_CLIENT_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

typedef struct s3_place s3_place; /* a bucket (or web server) with endpoint, region and credentials: counted, thread-safe */

/* uri: s3://bucket[/key], http(s)://host/path. *key: the unencoded key, malloc'ed (see s3_locate). */
vs_rc s3_place_open(const char *uri, s3_place **out, char **key, vs_err *err) VS_WARN_UNUSED;
s3_place *s3_place_share(s3_place *p);
void s3_place_close(s3_place *p); /* NULL is legal */
int s3_place_is_plain(const s3_place *p); /* a web server, no bucket: nothing is signed, and there are no lists */
/* "s3://bucket/key" for messages: malloc'ed; a plain URL is cut before its query, which may hold a signature. */
char *s3_place_name(const s3_place *p, const char *key);

enum { S3_ETAG_MAX = 256 };
typedef struct s3_meta {
  uint64_t size;
  char etag[S3_ETAG_MAX]; /* with its quotes, as sent */
  int64_t modified;       /* seconds since 1970, -1 unknown */
} s3_meta;

/* VS_NOTFOUND when there is no such object or bucket; VS_IO for everything else the store refuses. */
vs_rc s3_head(s3_place *p, const char *key, s3_meta *out, vs_err *err) VS_WARN_UNUSED;
/* [off, off+len) of an object, or all of it (off 0, len UINT64_MAX). *body is malloc'ed. More than max bytes is VS_INVALID.
 * if_match: an ETag, or NULL; another object behind the name is VS_IO "changed while it was read". meta may be NULL. */
vs_rc s3_get(s3_place *p, const char *key, uint64_t off, uint64_t len, const char *if_match, uint64_t max, uint8_t **body, size_t *n,
             s3_meta *meta, vs_err *err) VS_WARN_UNUSED;
/* The first len bytes of an object, or all of a shorter one, and what it is: one request where a HEAD and a GET would be two, and
 * all that a URL signed for GET allows. */
vs_rc s3_get_start(s3_place *p, const char *key, uint64_t len, uint8_t **body, size_t *n, s3_meta *meta, vs_err *err) VS_WARN_UNUSED;

/* body stays the caller's. exclusive: only when there is no such object (If-None-Match: *): VS_EXISTS when there is one,
 * VS_UNSUPPORTED when the store does not know the condition. etag may be NULL. */
vs_rc s3_put(s3_place *p, const char *key, const void *body, size_t n, int exclusive, char etag[S3_ETAG_MAX], vs_err *err) VS_WARN_UNUSED;
vs_rc s3_delete(s3_place *p, const char *key, vs_err *err) VS_WARN_UNUSED; /* an absent object is no error */

/* Multipart upload: parts of 5 MiB .. 5 GiB (the last may be smaller), numbered from 1, in any order, from any threads. */
vs_rc s3_multipart_begin(s3_place *p, const char *key, char **upload_id, vs_err *err) VS_WARN_UNUSED;
vs_rc s3_multipart_part(s3_place *p, const char *key, const char *upload_id, int number, const void *body, size_t n,
                        char etag[S3_ETAG_MAX], vs_err *err) VS_WARN_UNUSED;
vs_rc s3_multipart_finish(s3_place *p, const char *key, const char *upload_id, char (*etags)[S3_ETAG_MAX], size_t n_parts,
                          char etag[S3_ETAG_MAX], vs_err *err) VS_WARN_UNUSED;
vs_rc s3_multipart_abort(s3_place *p, const char *key, const char *upload_id, vs_err *err) VS_WARN_UNUSED;
/* Parts that the store already has of an upload: to resume it. Calls back in ascending order. */
typedef vs_rc (*s3_part_fn)(void *ctx, int number, uint64_t size, const char *etag, vs_err *err);
vs_rc s3_multipart_parts(s3_place *p, const char *key, const char *upload_id, s3_part_fn fn, void *ctx, vs_err *err) VS_WARN_UNUSED;
/* Unfinished uploads whose key is exactly `key`. */
typedef vs_rc (*s3_upload_fn)(void *ctx, const char *upload_id, int64_t started, vs_err *err);
vs_rc s3_multipart_uploads(s3_place *p, const char *key, s3_upload_fn fn, void *ctx, vs_err *err) VS_WARN_UNUSED;

/* ListObjectsV2, page by page, in ascending key order. delimiter "/" folds what lies below into common prefixes: then fn is
 * called with is_prefix. max 0: all. after: only keys behind it (start-after), or NULL. fn's failure ends the walk and is returned. */
typedef struct s3_entry { const char *key; int is_prefix; uint64_t size; const char *etag; int64_t modified; } s3_entry;
typedef vs_rc (*s3_list_fn)(void *ctx, const s3_entry *e, vs_err *err);
vs_rc s3_list(s3_place *p, const char *prefix, const char *delimiter, const char *after, uint64_t max, s3_list_fn fn, void *ctx,
              vs_err *err) VS_WARN_UNUSED;
/* The halves of one page, for callers that run the exchange beside others: the query (malloc'ed), and the reading of its answer. */
char *s3_list_query(const char *prefix, const char *delimiter, uint64_t max);
vs_rc s3_list_read(const uint8_t *body, size_t n, s3_list_fn fn, void *ctx, int *more, vs_err *err) VS_WARN_UNUSED;

#endif
