/* s3_engine.h - HTTP exchanges with retries, carried out by one thread per process that owns a libcurl multi handle.
 *
 * A job is one exchange: a request that is signed anew for each attempt, and its answer. Any number of threads submit jobs;
 * the engine keeps connections alive and shares them. An attempt that fails for a passing reason (429, 500, 502, 503, 504,
 * resets, short bodies, stalls) is repeated after a random delay between 0 and a bound that doubles ("full jitter": Brooker,
 * Exponential Backoff And Jitter, 2015), Retry-After honoured, until the job's deadline. A ranged GET goes on where it broke
 * off, pinned to the object's ETag. One wrong region, expired credential or skewed clock is put right and tried once more.
 *
 * The thread starts with the first job. It blocks all signals; it ends before the process's exit handlers run further; a
 * forked child has none of its parent's jobs and connections, and starts a thread of its own when it needs one.
 */
#ifndef S3_ENGINE_H
#define S3_ENGINE_H
#include <stddef.h>
#include <stdint.h>

#include "s3_client.h"

typedef enum s3_method { S3_GET, S3_HEAD, S3_PUT, S3_POST, S3_DELETE } s3_method;

/* Where bytes of a ranged answer go; pieces ascend by off and may leave gaps between them. */
typedef struct s3_piece { uint64_t off, len; uint8_t *dst; } s3_piece;

typedef struct s3_job s3_job;
struct s3_job {
  /* ---- the request: set before s3_submit; memory stays the submitter's until the job is done, except as said ---- */
  s3_place *place;         /* counted by the job */
  s3_method method;
  char *key;               /* copied by s3_job_new */
  char *query;             /* encoded, without '?'; malloc'ed, the job's; NULL: none */
  uint64_t off, len;       /* GET: a range, when len is not UINT64_MAX */
  int may_be_shorter;      /* the object may end within the range; else that is VS_CORRUPT */
  s3_piece *pieces;        /* malloc'ed, the job's: a ranged GET delivers here; NULL: into `data` */
  size_t n_pieces;
  char etag[S3_ETAG_MAX];  /* set: GET only this version of the object. After the job: the object's. */
  int exclusive;           /* PUT: If-None-Match: * */
  const uint8_t *body;     /* PUT, POST */
  size_t body_len;
  char payload_hash[65];   /* SHA-256 of the body in hex */
  size_t max_data;         /* a longer answer into `data` is an error */
  int64_t timeout_ms;      /* for everything, retries included */
  void (*done)(s3_job *);  /* called once by the engine's thread, which must not be kept; NULL: s3_job_wait tells */
  void *ctx;
  /* ---- the answer ---- */
  vs_rc rc;
  vs_err err;
  int status;              /* of the last answer, 0: none */
  char code[64];           /* S3's error code, "" when there is none */
  uint8_t *data;           /* malloc'ed, the job's */
  size_t n_data;
  uint64_t total;          /* bytes of the whole object, from Content-Range or Content-Length; UINT64_MAX unknown */
  int64_t modified;        /* Last-Modified, -1 unknown */
  unsigned tries;
  uint64_t round;          /* of the scope that submitted it, see vs_scope.h */
  /* ---- the engine's ---- */
  int refs, finished, cancelled, fixed_region, fixed_credentials, fixed_clock, connect_failures;
  int64_t deadline, not_before;
  uint64_t have;           /* bytes of the range that arrived */
  size_t room, n_error;
  char *error_body;
  void *easy, *headers;
  char curl_error[256];
  int refused;             /* the answer to this attempt was refused while it arrived: rc and err say why */
  s3_job *next;
};

/* A job with one owner; NULL without memory. key: unencoded for a bucket, as it is for a plain URL. */
s3_job *s3_job_new(s3_place *place, s3_method method, const char *key);
void s3_job_release(s3_job *j); /* NULL is legal */
/* Starts the job; it owns itself until it is done. A failure to start is reported like any other, as the job's end. */
void s3_submit(s3_job *j);
/* Waits for a job without `done`. When the thread's vs_scope is stopped the job is cancelled, which takes no network. Returns
 * the job's rc, with its text in err; counts the job into the scope. */
vs_rc s3_job_wait(s3_job *j, vs_err *err) VS_WARN_UNUSED;

/* For code that waits for jobs by other means (io_s3.c): a time limit for s3_job.timeout_ms from scope and environment. */
int64_t s3_timeout_ms(void);
int64_t s3_clock_ms(void); /* monotonic */

/* ---- places: what the engine needs to know of s3_place ---- */

typedef struct s3_attempt { char *url, *path, *ca_bundle; char *headers[8]; size_t n_headers; int is_plain; } s3_attempt;
/* URL and signed headers for one attempt, with the credentials and region of this moment. */
vs_rc s3_place_sign(s3_place *p, const s3_job *j, s3_attempt *out, vs_err *err) VS_WARN_UNUSED;
void s3_attempt_reset(s3_attempt *a);
int s3_place_new_region(s3_place *p, const char *region); /* 1: it was another one: try again */
int s3_place_new_credentials(s3_place *p);                /* 1: they changed */
int s3_place_set_clock(s3_place *p, int64_t server_time); /* 1: it was off by more than a minute */
int s3_place_knows(const s3_place *p, const char *text);  /* does the text hold a secret of ours? */
/* Tells objects of different stores apart: for caches, never for messages. malloc'ed. */
char *s3_place_identity(const s3_place *p, const char *key);

#endif
