/* s3_exchange.h - one attempt of a job: its request as curl options, its answer as it arrives, and what an answer means. For
 * s3_engine.c, which owns the handles, the queue and the retries. All of it runs on the engine's thread. */
#ifndef S3_EXCHANGE_H
#define S3_EXCHANGE_H
#include <curl/curl.h>

#include "s3_engine.h"
#include "s3_xml.h"

static inline int exchange_is_ranged(const s3_job *j) { return j->method == S3_GET && j->len != UINT64_MAX; }
static inline int exchange_is_at_end(const s3_job *j) { return j->total != UINT64_MAX && j->off + j->have >= j->total; }

void exchange_fail(s3_job *j, vs_rc rc, const char *what); /* sets rc and a text with the object's name; does not end the job */
void exchange_forget(s3_job *j);                            /* nothing of an earlier attempt remains but bytes of a ranged answer */
int exchange_prepare(s3_job *j, const s3_attempt *a, long stall_s, long connect_ms); /* j->easy; 0: no memory */

void exchange_look_at_status(s3_job *j);  /* of a whole answer, or before its first byte */
void exchange_look_at_refusal(s3_job *j); /* of an answer that broke off: a refusal needs no body */

const char *exchange_header(CURL *easy, const char *name);
int exchange_code_passes(CURLcode c);         /* may another attempt do better? */
int exchange_status_passes(const s3_job *j);
vs_rc exchange_rc(const s3_job *j);
int64_t exchange_retry_after_ms(CURL *easy);
/* What the store says of a refusal, fit for a terminal: no control characters, never one of our secrets. */
void exchange_describe(s3_job *j, const s3_xml_error *x, char *what, size_t n);

#endif
