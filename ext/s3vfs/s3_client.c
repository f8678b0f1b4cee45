/* s3_client.c - see s3_client.h: each operation is a job of the engine and a wait for it. */
#include "s3_client.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "s3_engine.h"
#include "s3_sign.h"
#include "s3_xml.h"

enum { MAX_XML = 16 << 20 };

static void fill_meta(const s3_job *j, uint64_t size, s3_meta *out) {
  out->size = size, out->modified = j->modified;
  memcpy(out->etag, j->etag, sizeof out->etag);
}

/* Submits, waits; the job stays the caller's. */
static vs_rc run(s3_job *j, vs_err *err) {
  s3_submit(j);
  return s3_job_wait(j, err);
}

vs_rc s3_head(s3_place *p, const char *key, s3_meta *out, vs_err *err) {
  s3_job *j = s3_job_new(p, S3_HEAD, key);
  if (!j) return vs_nomem(err);
  vs_rc rc = run(j, err);
  if (!rc && j->total == UINT64_MAX) rc = vs_fail(err, VS_IO, "%s: the server does not tell its size", key);
  if (!rc) fill_meta(j, j->total, out);
  s3_job_release(j);
  return rc;
}

/* Runs a GET and hands out its body. */
static vs_rc take_body(s3_job *j, uint8_t **body, size_t *n, vs_err *err) {
  vs_rc rc = run(j, err);
  if (!rc && !j->data && !(j->data = calloc(1, 1))) rc = vs_nomem(err);
  if (rc) return rc;
  *body = j->data, *n = j->n_data;
  j->data = NULL;
  return VS_OK;
}

vs_rc s3_get(s3_place *p, const char *key, uint64_t off, uint64_t len, const char *if_match, uint64_t max, uint8_t **body, size_t *n,
             s3_meta *meta, vs_err *err) {
  s3_job *j = s3_job_new(p, S3_GET, key);
  *body = NULL, *n = 0;
  if (!j) return vs_nomem(err);
  j->off = off, j->len = len, j->max_data = max < SIZE_MAX ? (size_t)max : SIZE_MAX;
  if (if_match) snprintf(j->etag, sizeof j->etag, "%s", if_match);
  vs_rc rc = take_body(j, body, n, err);
  if (!rc && meta) fill_meta(j, len == UINT64_MAX ? *n : j->total, meta);
  s3_job_release(j);
  return rc;
}

vs_rc s3_get_start(s3_place *p, const char *key, uint64_t len, uint8_t **body, size_t *n, s3_meta *meta, vs_err *err) {
  s3_job *j = s3_job_new(p, S3_GET, key);
  vs_err why = {0};
  *body = NULL, *n = 0;
  if (!j) return vs_nomem(err);
  j->off = 0, j->len = len, j->max_data = (size_t)len, j->may_be_shorter = 1;
  vs_rc rc = take_body(j, body, n, &why);
  if (rc && j->status == 416) { /* nothing has no first byte */
    rc = (*body = calloc(1, 1)) ? VS_OK : VS_NOMEM;
    j->total = 0;
  }
  if (!rc) fill_meta(j, j->total, meta);
  s3_job_release(j);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

/* ---- writing ---- */

static s3_job *writing(s3_place *p, s3_method method, const char *key, const void *body, size_t n) {
  s3_job *j = s3_job_new(p, method, key);
  if (!j) return NULL;
  j->body = body, j->body_len = n, j->max_data = MAX_XML;
  s3_sha256_hex(body, n, j->payload_hash); /* here, on the caller's thread: the engine's has others to serve */
  return j;
}

/* A first attempt may have written the object and lost its answer on the way: then the second one meets our own bytes. */
static int is_already_ours(s3_place *p, const char *key, const void *body, size_t n, char *etag) {
  uint8_t *have;
  size_t n_have;
  s3_meta meta;
  vs_err ignored = {0};
  if (s3_get(p, key, 0, UINT64_MAX, NULL, n, &have, &n_have, &meta, &ignored)) return 0;
  int same = n_have == n && !memcmp(have, body, n);
  free(have);
  if (same && etag) strcpy(etag, meta.etag);
  return same;
}

vs_rc s3_put(s3_place *p, const char *key, const void *body, size_t n, int exclusive, char etag[S3_ETAG_MAX], vs_err *err) {
  s3_job *j = writing(p, S3_PUT, key, body, n);
  vs_err why = {0};
  if (!j) return vs_nomem(err);
  j->exclusive = exclusive;
  vs_rc rc = run(j, &why);
  if (!rc && etag) strcpy(etag, j->etag);
  if (rc == VS_EXISTS && j->tries > 1 && is_already_ours(p, key, body, n, etag)) rc = VS_OK;
  s3_job_release(j);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

vs_rc s3_delete(s3_place *p, const char *key, vs_err *err) {
  s3_job *j = s3_job_new(p, S3_DELETE, key);
  vs_err why = {0};
  if (!j) return vs_nomem(err);
  vs_rc rc = run(j, &why);
  if (rc == VS_NOTFOUND && strcmp(j->code, "NoSuchBucket")) rc = VS_OK;
  s3_job_release(j);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

/* ---- multipart ---- */

static char *upload_query(const char *upload_id, int number, const char *marker) {
  char *id = s3_encode(upload_id, 0), *after = marker ? s3_encode(marker, 0) : NULL, *q = NULL;
  int n = -1;
  if (id && number) n = asprintf(&q, "partNumber=%d&uploadId=%s", number, id);
  else if (id && after) n = asprintf(&q, "part-number-marker=%s&uploadId=%s", after, id);
  else if (id) n = asprintf(&q, "uploadId=%s", id);
  free(id), free(after);
  return n < 0 ? NULL : q;
}

static vs_rc take_text(char **out, const char *text, vs_err *err) {
  free(*out);
  *out = strdup(text);
  return *out ? VS_OK : vs_nomem(err);
}

static vs_rc upload_id_element(void *ctx, const char *parent, const char *name, const char *text, vs_err *err) {
  (void)parent;
  return strcmp(name, "UploadId") ? VS_OK : take_text(ctx, text, err);
}

static vs_rc bad_answer(s3_place *p, const char *key, const vs_err *why, vs_err *err) {
  char *name = s3_place_name(p, key);
  vs_rc rc = vs_fail(err, why->rc ? why->rc : VS_IO, "%s: %s", name ? name : "S3", why->rc ? why->text : "an answer that S3 does not give");
  free(name);
  return rc;
}

vs_rc s3_multipart_begin(s3_place *p, const char *key, char **upload_id, vs_err *err) {
  s3_job *j = writing(p, S3_POST, key, "", 0);
  vs_err why = {0};
  *upload_id = NULL;
  if (!j) return vs_nomem(err);
  if (!(j->query = strdup("uploads="))) {
    s3_job_release(j);
    return vs_nomem(err);
  }
  vs_rc rc = run(j, err);
  if (!rc && (s3_xml_walk(j->data, j->n_data, upload_id_element, upload_id, &why) || !*upload_id)) rc = bad_answer(p, key, &why, err);
  s3_job_release(j);
  if (rc) free(*upload_id), *upload_id = NULL;
  return rc;
}

vs_rc s3_multipart_part(s3_place *p, const char *key, const char *upload_id, int number, const void *body, size_t n,
                        char etag[S3_ETAG_MAX], vs_err *err) {
  s3_job *j = writing(p, S3_PUT, key, body, n);
  if (!j) return vs_nomem(err);
  vs_rc rc = (j->query = upload_query(upload_id, number, NULL)) ? run(j, err) : vs_nomem(err);
  if (!rc && !j->etag[0]) rc = bad_answer(p, key, &(vs_err){0}, err);
  if (!rc) strcpy(etag, j->etag);
  s3_job_release(j);
  return rc;
}

/* The list of parts that completes an upload. ETags come from a server: what XML gives a meaning is escaped. */
static char *complete_body(char (*etags)[S3_ETAG_MAX], size_t n, size_t *n_bytes) {
  char *text = NULL;
  FILE *f = open_memstream(&text, n_bytes);
  if (!f) return NULL;
  fputs("<CompleteMultipartUpload>", f);
  for (size_t i = 0; i < n; i++) {
    fprintf(f, "<Part><PartNumber>%zu</PartNumber><ETag>", i + 1);
    for (const char *c = etags[i]; *c; c++) {
      if (*c == '"') fputs("&quot;", f);
      else if (*c == '<') fputs("&lt;", f);
      else if (*c == '&') fputs("&amp;", f);
      else fputc(*c, f);
    }
    fputs("</ETag></Part>", f);
  }
  fputs("</CompleteMultipartUpload>", f);
  int bad = ferror(f);
  if (fclose(f) || bad) free(text), text = NULL;
  return text;
}

typedef struct finished { char etag[S3_ETAG_MAX]; int is_result; } finished;

static vs_rc finished_element(void *ctx, const char *parent, const char *name, const char *text, vs_err *err) {
  finished *f = ctx;
  (void)err;
  if (!strcmp(name, "ETag") && !strcmp(parent, "CompleteMultipartUploadResult")) snprintf(f->etag, sizeof f->etag, "%s", text);
  if (!strcmp(name, "CompleteMultipartUploadResult") && !*parent) f->is_result = 1;
  return VS_OK;
}

/* Sends the list of parts. S3 may answer 200 and tell of its failure in the body. */
static vs_rc complete(s3_job *j, finished *f, vs_err *err) {
  vs_err why = {0};
  s3_xml_error x;
  vs_rc rc = run(j, err);
  if (rc) return rc;
  if (s3_xml_walk(j->data, j->n_data, finished_element, f, &why)) return bad_answer(j->place, j->key, &why, err);
  if (f->is_result) return VS_OK;
  s3_xml_read_error((const char *)j->data, j->n_data, &x);
  snprintf(why.text, sizeof why.text, "the upload was not completed: %s %s", x.code, x.message);
  why.rc = VS_IO;
  return bad_answer(j->place, j->key, &why, err);
}

vs_rc s3_multipart_finish(s3_place *p, const char *key, const char *upload_id, char (*etags)[S3_ETAG_MAX], size_t n_parts,
                          char etag[S3_ETAG_MAX], vs_err *err) {
  size_t n = 0;
  finished f = {0};
  s3_meta meta;
  vs_err why = {0};
  char *body = complete_body(etags, n_parts, &n);
  s3_job *j = body ? writing(p, S3_POST, key, body, n) : NULL;
  vs_rc rc = j && (j->query = upload_query(upload_id, 0, NULL)) ? complete(j, &f, &why) : vs_nomem(&why);
  /* completed by an attempt whose answer was lost: the upload is gone and the object is there. radosgw tells no ETag. */
  int was_done = rc == VS_NOTFOUND && j->tries > 1;
  if (was_done || (!rc && !f.etag[0])) {
    vs_err_reset(&why);
    if (!(rc = s3_head(p, key, &meta, &why))) strcpy(f.etag, meta.etag);
  }
  if (!rc && etag) strcpy(etag, f.etag);
  s3_job_release(j);
  free(body);
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}

vs_rc s3_multipart_abort(s3_place *p, const char *key, const char *upload_id, vs_err *err) {
  s3_job *j = s3_job_new(p, S3_DELETE, key);
  if (!j) return vs_nomem(err);
  vs_rc rc = (j->query = upload_query(upload_id, 0, NULL)) ? run(j, err) : vs_nomem(err);
  s3_job_release(j);
  return rc;
}

/* ---- listings ---- */

typedef struct parts_page { s3_part_fn fn; void *ctx; int number; uint64_t size; char etag[S3_ETAG_MAX], *next; int more; } parts_page;

static vs_rc part_element(void *ctx, const char *parent, const char *name, const char *text, vs_err *err) {
  parts_page *g = ctx;
  if (!strcmp(name, "Part")) return g->fn(g->ctx, g->number, g->size, g->etag, err);
  if (!strcmp(name, "PartNumber")) g->number = atoi(text);
  else if (!strcmp(name, "Size")) g->size = strtoull(text, NULL, 10);
  else if (!strcmp(name, "ETag")) snprintf(g->etag, sizeof g->etag, "%s", text);
  else if (!strcmp(name, "NextPartNumberMarker")) return take_text(&g->next, text, err);
  else if (!strcmp(name, "IsTruncated")) g->more = !strcmp(text, "true");
  (void)parent;
  return VS_OK;
}

/* One GET whose answer is XML. query is taken. */
static vs_rc get_xml(s3_place *p, const char *key, char *query, s3_xml_fn fn, void *ctx, vs_err *err) {
  s3_job *j = query ? s3_job_new(p, S3_GET, key) : NULL;
  vs_err why = {0};
  if (!j) {
    free(query);
    return vs_nomem(err);
  }
  j->query = query, j->max_data = MAX_XML;
  vs_rc rc = run(j, err);
  if (!rc && (rc = s3_xml_walk(j->data, j->n_data, fn, ctx, &why))) rc = bad_answer(p, key, &why, err);
  s3_job_release(j);
  return rc;
}

vs_rc s3_multipart_parts(s3_place *p, const char *key, const char *upload_id, s3_part_fn fn, void *ctx, vs_err *err) {
  parts_page g = {.fn = fn, .ctx = ctx};
  vs_rc rc = VS_OK;
  do {
    char *query = upload_query(upload_id, 0, g.next);
    free(g.next);
    g.next = NULL, g.more = 0;
    rc = get_xml(p, key, query, part_element, &g, err);
  } while (!rc && g.more && g.next);
  free(g.next);
  return rc;
}

typedef struct uploads_page {
  const char *key;
  s3_upload_fn fn;
  void *ctx;
  char *upload_key, *id, *next_key, *next_id;
  int64_t started;
  int more;
} uploads_page;

static vs_rc upload_element(void *ctx, const char *parent, const char *name, const char *text, vs_err *err) {
  uploads_page *g = ctx;
  if (!strcmp(name, "Upload")) return g->upload_key && g->id && !strcmp(g->upload_key, g->key) ? g->fn(g->ctx, g->id, g->started, err) : VS_OK;
  if (!strcmp(name, "Key") && !strcmp(parent, "Upload")) return take_text(&g->upload_key, text, err);
  if (!strcmp(name, "UploadId")) return take_text(&g->id, text, err);
  if (!strcmp(name, "NextKeyMarker")) return take_text(&g->next_key, text, err);
  if (!strcmp(name, "NextUploadIdMarker")) return take_text(&g->next_id, text, err);
  if (!strcmp(name, "Initiated")) g->started = s3_xml_time(text);
  else if (!strcmp(name, "IsTruncated")) g->more = !strcmp(text, "true");
  return VS_OK;
}

vs_rc s3_multipart_uploads(s3_place *p, const char *key, s3_upload_fn fn, void *ctx, vs_err *err) {
  uploads_page g = {.key = key, .fn = fn, .ctx = ctx, .started = -1};
  vs_rc rc = VS_OK;
  do {
    char *prefix = s3_encode(key, 0), *k = g.next_key ? s3_encode(g.next_key, 0) : NULL, *i = g.next_id ? s3_encode(g.next_id, 0) : NULL, *q = NULL;
    int n = !prefix ? -1 : k && i ? asprintf(&q, "key-marker=%s&prefix=%s&upload-id-marker=%s&uploads=", k, prefix, i)
                                  : asprintf(&q, "prefix=%s&uploads=", prefix);
    free(prefix), free(k), free(i);
    g.more = 0;
    rc = get_xml(p, "", n < 0 ? NULL : q, upload_element, &g, err);
  } while (!rc && g.more && g.next_key && g.next_id);
  free(g.upload_key), free(g.id), free(g.next_key), free(g.next_id);
  return rc;
}

typedef struct list_page {
  s3_list_fn fn;
  void *ctx;
  uint64_t left;       /* entries still wanted */
  char *key, *prefix, *token;
  uint64_t size;
  char etag[S3_ETAG_MAX];
  int64_t modified;
  int more;
} list_page;

static vs_rc give_entry(list_page *g, char *encoded, int is_prefix, vs_err *err) {
  char *key = NULL;
  if (!g->left) return VS_OK;
  for (char *c = encoded; *c; c++)
    if (*c == '+') *c = ' '; /* AWS encodes as forms do; a plus is %2B there */
  vs_rc rc = s3_decode(encoded, strlen(encoded), &key, err);
  s3_entry e = {.key = key, .is_prefix = is_prefix, .size = is_prefix ? 0 : g->size, .etag = is_prefix ? "" : g->etag,
                .modified = is_prefix ? -1 : g->modified};
  if (!rc) rc = g->fn(g->ctx, &e, err);
  free(key);
  g->left--;
  return rc;
}

static vs_rc list_element(void *ctx, const char *parent, const char *name, const char *text, vs_err *err) {
  list_page *g = ctx;
  int of_object = !strcmp(parent, "Contents");
  if (!strcmp(name, "Contents")) return g->key ? give_entry(g, g->key, 0, err) : VS_OK;
  if (of_object && !strcmp(name, "Key")) return take_text(&g->key, text, err);
  if (of_object && !strcmp(name, "Size")) g->size = strtoull(text, NULL, 10);
  else if (of_object && !strcmp(name, "ETag")) snprintf(g->etag, sizeof g->etag, "%s", text);
  else if (of_object && !strcmp(name, "LastModified")) g->modified = s3_xml_time(text);
  else if (!strcmp(parent, "CommonPrefixes") && !strcmp(name, "Prefix")) return give_entry(g, (char *)text, 1, err);
  else if (!strcmp(name, "NextContinuationToken")) return take_text(&g->token, text, err);
  else if (!strcmp(parent, "ListBucketResult") && !strcmp(name, "IsTruncated")) g->more = !strcmp(text, "true");
  return VS_OK;
}

/* Parameters in the order of their names, as the signature wants them. encoding-type=url: a key may hold what XML cannot. */
static char *list_query(const list_page *g, const char *prefix, const char *delimiter, const char *after) {
  char *p = s3_encode(prefix, 0), *d = s3_encode(delimiter ? delimiter : "", 0), *a = s3_encode(after ? after : "", 0),
       *t = s3_encode(g->token ? g->token : "", 0), *q = NULL;
  uint64_t keys = g->left < 1000 ? g->left : 1000;
  int n = !p || !d || !a || !t ? -1
                               : asprintf(&q, "%s%s%s%s%s%sencoding-type=url&list-type=2&max-keys=%" PRIu64 "&prefix=%s%s%s",
                                          *t ? "continuation-token=" : "", t, *t ? "&" : "", *d ? "delimiter=" : "", d, *d ? "&" : "", keys, p,
                                          *a && !*t ? "&start-after=" : "", *t ? "" : a);
  free(p), free(d), free(a), free(t);
  return n < 0 ? NULL : q;
}

char *s3_list_query(const char *prefix, const char *delimiter, uint64_t max) {
  list_page g = {.left = max};
  return list_query(&g, prefix, delimiter, NULL);
}

vs_rc s3_list_read(const uint8_t *body, size_t n, s3_list_fn fn, void *ctx, int *more, vs_err *err) {
  list_page g = {.fn = fn, .ctx = ctx, .left = UINT64_MAX, .modified = -1};
  vs_rc rc = s3_xml_walk(body, n, list_element, &g, err);
  if (more) *more = g.more;
  free(g.key), free(g.token);
  return rc;
}

vs_rc s3_list(s3_place *p, const char *prefix, const char *delimiter, const char *after, uint64_t max, s3_list_fn fn, void *ctx,
              vs_err *err) {
  list_page g = {.fn = fn, .ctx = ctx, .left = max ? max : UINT64_MAX, .modified = -1};
  vs_rc rc = VS_OK;
  do {
    char *query = list_query(&g, prefix, delimiter, after);
    free(g.token);
    g.token = NULL, g.more = 0;
    rc = get_xml(p, "", query, list_element, &g, err);
  } while (!rc && g.more && g.token && g.left);
  free(g.key), free(g.token);
  return rc;
}
