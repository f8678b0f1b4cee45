/* s3_exchange.c - see s3_exchange.h. */
#include "s3_exchange.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ERROR_BODY = 65536 };

void exchange_fail(s3_job *j, vs_rc rc, const char *what) {
  char *name = s3_place_name(j->place, j->key);
  vs_err_reset(&j->err);
  if (j->tries > 1) j->rc = vs_fail(&j->err, rc, "%s: %s (tried %u times)", name ? name : "S3", what, j->tries);
  else j->rc = vs_fail(&j->err, rc, "%s: %s", name ? name : "S3", what);
  free(name);
}

/* ---- what arrives ---- */

const char *exchange_header(CURL *easy, const char *name) {
  struct curl_header *h;
  return curl_easy_header(easy, name, 0, CURLH_HEADER, -1, &h) == CURLHE_OK ? h->value : NULL;
}

static void refuse(s3_job *j, vs_rc rc, const char *what) {
  j->refused = 1;
  exchange_fail(j, rc, what);
}

/* Reads "bytes 5-9/100". */
static int parse_content_range(const char *text, uint64_t *first, uint64_t *total) {
  unsigned long long a, b, t;
  int end = 0;
  if (!text || sscanf(text, "bytes %llu-%llu/%llu%n", &a, &b, &t, &end) != 3 || text[end]) return 0;
  *first = a, *total = t;
  return 1;
}

/* The head of a good answer, before its first body byte: is it what was asked for? */
static void take_head(s3_job *j) {
  const char *etag = exchange_header(j->easy, "ETag"), *modified = exchange_header(j->easy, "Last-Modified");
  uint64_t first;
  if (j->status == 206 && exchange_is_ranged(j) && !exchange_header(j->easy, "Content-Range")) {
    j->cut = 1; /* a head that broke off, most likely: nothing in it counts */
    return;
  }
  if (etag && strlen(etag) < sizeof j->etag) {
    if (j->method == S3_GET && j->etag[0] && strcmp(j->etag, etag)) {
      refuse(j, VS_IO, "the object changed while it was read: open it again");
      return;
    }
    strcpy(j->etag, etag);
  }
  if (modified) j->modified = (int64_t)curl_getdate(modified, NULL);
  if (j->status == 206 && exchange_is_ranged(j)) {
    if (!parse_content_range(exchange_header(j->easy, "Content-Range"), &first, &j->total) || first != j->off + j->have)
      refuse(j, VS_IO, "the server answered with another range than the one asked for");
    return;
  }
  curl_off_t n = -1;
  curl_easy_getinfo(j->easy, CURLINFO_CONTENT_LENGTH_DOWNLOAD_T, &n);
  if (n >= 0) j->total = (uint64_t)n;
  /* the whole object instead of a range of it: welcome where the range holds it all */
  if (exchange_is_ranged(j) && (j->off + j->have > 0 || n > (curl_off_t)j->len)) refuse(j, VS_UNSUPPORTED, "the server does not serve ranges");
}

static void take_pieces(s3_job *j, const uint8_t *p, uint64_t n) {
  uint64_t at = j->off + j->have, end = at + n;
  for (size_t i = 0; i < j->n_pieces; i++) {
    const s3_piece *x = &j->pieces[i];
    uint64_t from = at > x->off ? at : x->off, to = end < x->off + x->len ? end : x->off + x->len;
    if (from < to) memcpy(x->dst + (from - x->off), p + (from - at), to - from);
  }
}

static int take_data(s3_job *j, const void *p, size_t n) {
  if (n > j->max_data - j->n_data) {
    refuse(j, VS_INVALID, "the object is larger than this place allows");
    return 0;
  }
  if (j->n_data + n + 1 > j->room) {
    size_t room = (j->n_data + n + 1) * 2;
    uint8_t *grown = realloc(j->data, room);
    if (!grown) {
      j->refused = 1, j->rc = vs_nomem(&j->err);
      return 0;
    }
    j->data = grown, j->room = room;
  }
  memcpy(j->data + j->n_data, p, n);
  j->n_data += n;
  return 1;
}

/* 0: that is enough of it. */
static int take_error_text(s3_job *j, const char *p, size_t n) {
  if (!j->error_body && !(j->error_body = malloc(ERROR_BODY + 1))) return 1;
  int fits = n <= ERROR_BODY - j->n_error;
  if (!fits) n = ERROR_BODY - j->n_error;
  memcpy(j->error_body + j->n_error, p, n);
  j->n_error += n;
  j->error_body[j->n_error] = 0;
  return fits;
}

void exchange_look_at_status(s3_job *j) {
  long status = 0;
  if (j->status) return;
  curl_easy_getinfo(j->easy, CURLINFO_RESPONSE_CODE, &status);
  j->status = (int)status;
  if (status / 100 == 2) take_head(j);
}

/* CURLOPT_WRITEFUNCTION. Another length than size * n ends the transfer. */
static size_t on_body(char *p, size_t size, size_t n, void *ctx) {
  s3_job *j = ctx;
  n *= size;
  exchange_look_at_status(j);
  if (j->refused || j->cut) return 0;
  if (j->status / 100 != 2) {
    return take_error_text(j, p, n) ? n : 0;
  }
  if (exchange_is_ranged(j) && n > j->len - j->have) {
    refuse(j, VS_IO, "the server sent more than the range asked for");
    return 0;
  }
  if (j->pieces) take_pieces(j, (uint8_t *)p, n);
  else if (!take_data(j, p, n)) return 0;
  j->have += n;
  return n;
}

static size_t on_read(char *p, size_t size, size_t n, void *ctx) {
  s3_job *j = ctx;
  size_t left = j->body_len - j->sent;
  n *= size;
  if (n > left) n = left;
  if (n) memcpy(p, j->body + j->sent, n);
  j->sent += n;
  return n;
}

static int on_seek(void *ctx, curl_off_t off, int origin) {
  s3_job *j = ctx;
  if (origin != SEEK_SET || off < 0 || (uint64_t)off > j->body_len) return CURL_SEEKFUNC_CANTSEEK;
  j->sent = (size_t)off;
  return CURL_SEEKFUNC_OK;
}

/* ---- the request ---- */

static int add_header(s3_job *j, const char *line) {
  struct curl_slist *grown = curl_slist_append(j->headers, line);
  if (grown) j->headers = grown;
  return grown != NULL;
}

static void set_method(s3_job *j, CURL *easy) {
  static const char *const names[] = {"GET", "HEAD", "PUT", "POST", "DELETE"};
  if (j->method == S3_HEAD) curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
  else if (j->method == S3_PUT || j->method == S3_POST) {
    curl_easy_setopt(easy, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, names[j->method]);
    curl_easy_setopt(easy, CURLOPT_INFILESIZE_LARGE, (curl_off_t)j->body_len);
    curl_easy_setopt(easy, CURLOPT_READFUNCTION, on_read);
    curl_easy_setopt(easy, CURLOPT_READDATA, j);
    curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, on_seek);
    curl_easy_setopt(easy, CURLOPT_SEEKDATA, j);
    curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, 262144L);
  } else if (j->method == S3_DELETE) curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, "DELETE");
}

static void set_options(s3_job *j, CURL *easy, const s3_attempt *a, long stall_s, long connect_ms) {
  int64_t left = j->deadline - s3_clock_ms();
  curl_easy_setopt(easy, CURLOPT_URL, a->url);
  curl_easy_setopt(easy, CURLOPT_PATH_AS_IS, 1L); /* a key may hold /../ */
  curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
  curl_easy_setopt(easy, CURLOPT_REDIR_PROTOCOLS_STR, strncmp(a->url, "https:", 6) ? "http,https" : "https");
  curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, a->is_plain ? 1L : 0L); /* nothing signed goes to another host */
  curl_easy_setopt(easy, CURLOPT_MAXREDIRS, 5L);
  curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
  curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);
  curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
  curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, 32768L);
  curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, connect_ms);
  curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, (long)(left > 1 ? left : 1));
  curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
  curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, stall_s);
  curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, on_body);
  curl_easy_setopt(easy, CURLOPT_WRITEDATA, j);
  curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, j->curl_error);
  curl_easy_setopt(easy, CURLOPT_PRIVATE, j);
  if (a->ca_bundle) curl_easy_setopt(easy, CURLOPT_CAINFO, a->ca_bundle);
  set_method(j, easy);
}

/* Headers beside the signed ones. The range is among them: it needs no signature, and each attempt may have another. */
static int set_headers(s3_job *j, const s3_attempt *a) {
  char line[S3_ETAG_MAX + 100];
  int ok = 1;
  for (size_t i = 0; i < a->n_headers && ok; i++) ok = add_header(j, a->headers[i]);
  if (ok && exchange_is_ranged(j)) {
    snprintf(line, sizeof line, "Range: bytes=%llu-%llu", (unsigned long long)(j->off + j->have), (unsigned long long)(j->off + j->len - 1));
    ok = add_header(j, line);
  }
  if (ok && j->method == S3_GET && j->etag[0] && strncmp(j->etag, "W/", 2)) { /* a weak one never matches: take_head compares */
    snprintf(line, sizeof line, "If-Match: %s", j->etag);
    ok = add_header(j, line);
  }
  if (ok && (j->method == S3_PUT || j->method == S3_POST)) ok = add_header(j, "Content-Type: application/octet-stream");
  if (ok) curl_easy_setopt(j->easy, CURLOPT_HTTPHEADER, j->headers);
  return ok;
}

int exchange_prepare(s3_job *j, const s3_attempt *a, long stall_s, long connect_ms) {
  set_options(j, j->easy, a, stall_s, connect_ms);
  return set_headers(j, a);
}

void exchange_forget(s3_job *j) {
  j->status = 0, j->code[0] = 0, j->refused = 0, j->n_error = 0, j->curl_error[0] = 0;
  j->sent = 0, j->cut = 0;
  if (!exchange_is_ranged(j) || !j->etag[0]) j->have = 0, j->n_data = 0; /* without an ETag nobody knows that both halves belong together */
}

/* ---- what it means ---- */

int exchange_code_passes(CURLcode c) {
  switch (c) {
    case CURLE_COULDNT_RESOLVE_HOST: case CURLE_COULDNT_CONNECT: case CURLE_OPERATION_TIMEDOUT: case CURLE_PARTIAL_FILE:
    case CURLE_GOT_NOTHING: case CURLE_SEND_ERROR: case CURLE_RECV_ERROR: case CURLE_SSL_CONNECT_ERROR: case CURLE_HTTP2:
    case CURLE_WEIRD_SERVER_REPLY: case CURLE_SEND_FAIL_REWIND: case CURLE_COULDNT_RESOLVE_PROXY: return 1;
    default: return 0;
  }
}

int64_t exchange_retry_after_ms(CURL *easy) {
  curl_off_t s = 0;
  curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &s);
  return s > 0 && s < 86400 ? (int64_t)s * 1000 : 0;
}

vs_rc exchange_rc(const s3_job *j) {
  if (j->status == 404 || j->status == 410) return VS_NOTFOUND;
  if (j->status == 412 && j->exclusive) return VS_EXISTS;
  if (j->status == 501) return VS_UNSUPPORTED;
  return VS_IO;
}

void exchange_describe(s3_job *j, const s3_xml_error *x, char *what, size_t n) {
  const char *hint = "";
  if (j->status == 412 && j->method == S3_GET) {
    snprintf(what, n, "the object changed while it was read (HTTP 412): open it again");
    return;
  }
  if (!strcmp(x->code, "NoSuchBucket")) hint = ": is the bucket's name right, and AWS_ENDPOINT_URL?";
  else if (j->status == 404 && !x->code[0]) hint = " Not Found";
  else if (j->status == 403 && !x->code[0]) hint = " Forbidden: the credentials may not read this, or it does not exist";
  snprintf(what, n, "HTTP %d%s%s%s%s%s", j->status, x->code[0] ? " " : "", x->code, x->message[0] ? ": " : "", x->message, hint);
  for (char *p = what; *p; p++)
    if ((unsigned char)*p < 32 || *p == 127) *p = ' ';
  if (j->n_error && s3_place_knows(j->place, j->error_body)) snprintf(what, n, "HTTP %d", j->status);
}

int exchange_status_passes(const s3_job *j) {
  int s = j->status;
  if (s == 429 || s == 500 || s == 502 || s == 503 || s == 504 || s == 408) return 1;
  return (s == 400 && !strcmp(j->code, "RequestTimeout")) || (s == 409 && !strcmp(j->code, "ConditionalRequestConflict"));
}

/* The status of a head that arrived whole, though its body did not: a refusal needs no body. */
void exchange_look_at_refusal(s3_job *j) {
  long status = 0;
  curl_easy_getinfo(j->easy, CURLINFO_RESPONSE_CODE, &status);
  if (!j->status && status >= 300) j->status = (int)status;
}
