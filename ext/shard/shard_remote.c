/* shard_remote.c - see shard_remote.h. */
#include "shard_remote.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../s3vfs/io_s3.h"
#include "../s3vfs/s3_engine.h"
#include "shard_hint.h"
#include "shard_int.h"

enum {
  TAIL_BYTES = 256 << 10, /* of a segment: trailer, footer and mostly all parameters */
  MAX_CHILDREN = 20000    /* folders of a database */
};

vs_rc remote_shard_init(remote_shard *r, const char *uri, s3_place *place, vs_err *err) {
  char *key = NULL;
  size_t n = strlen(uri);
  memset(r, 0, sizeof *r);
  if (strncmp(uri, "s3://", 5) && strpbrk(uri, "?#")) /* not shown: a query may be a signature */
    return vs_fail(err, VS_INVALID, "a shard has many objects, so no URL with a query or a fragment leads to one: write s3://bucket/prefix");
  while (n && uri[n - 1] == '/') n--;
  if (!(r->uri = strndup(uri, n))) return vs_nomem(err);
  s3_place *own = NULL;
  vs_rc rc = s3_place_open(r->uri, &own, &key, err); /* of a known place only the key is wanted */
  if (rc) return rc;
  if (place) s3_place_close(own), own = s3_place_share(place);
  r->place = own;
  if (asprintf(&r->prefix, "%s%s", key, *key ? "/" : "") < 0) r->prefix = NULL, rc = vs_nomem(err);
  free(key);
  return rc;
}

void remote_shard_reset(remote_shard *r) {
  for (size_t i = 0; r->segments && i < r->manifest.n_segments; i++) ivfpq_segment_close(r->segments[i]);
  free(r->segments);
  shard_manifest_reset(&r->manifest);
  shard_names_free(r->children, r->n_children);
  s3_job_release(r->list), s3_job_release(r->hint), s3_job_release(r->get);
  s3_place_close(r->place);
  free(r->uri), free(r->prefix);
  memset(r, 0, sizeof *r);
}

vs_rc remote_no_shard(const char *uri, vs_err *err) {
  return vs_fail(err, VS_NOTFOUND, "%s is not a shard: there is no manifest; is the path right? `vecshard publish DIR %s` puts one there",
                 uri, uri);
}

/* A job for an object of the shard; NULL without memory. */
static s3_job *get_job(const remote_shard *r, const char *name, size_t max) {
  char *key;
  if (asprintf(&key, "%s%s", r->prefix, name) < 0) return NULL;
  s3_job *j = s3_job_new(r->place, S3_GET, key);
  if (j) j->max_data = max;
  free(key);
  return j;
}

static vs_rc submit(s3_job *j, vs_err *err) {
  if (!j) return vs_nomem(err);
  s3_submit(j);
  return VS_OK;
}

/* ---- finding ---- */

static vs_rc begin_list(remote_shard *r, vs_err *err) {
  char *prefix = NULL;
  s3_job *j = s3_job_new(r->place, S3_GET, "");
  r->list = j;
  if (!j || asprintf(&prefix, "%s%s", r->prefix, r->look_below ? "" : "manifest-") < 0) return vs_nomem(err);
  j->query = s3_list_query(prefix, r->look_below ? "/" : NULL, r->look_below ? 1000 : 1);
  j->max_data = SHARD_MAX_MANIFEST;
  free(prefix);
  return j->query ? submit(j, err) : vs_nomem(err);
}

static vs_rc begin_find(remote_shard *r, int with_hint, vs_err *err) {
  char name[64];
  vs_rc rc = VS_OK;
  if (r->want) {
    shard_manifest_file(r->want, name);
    rc = submit(r->get = get_job(r, name, SHARD_MAX_MANIFEST), err);
  } else rc = begin_list(r, err);
  if (!rc && with_hint) rc = submit(r->hint = get_job(r, SHARD_HINT_NAME, SHARD_HINT_READ_MAX), err);
  return rc;
}

/* One entry of a listing: the newest manifest sorts before the others; a prefix is a folder. */
static vs_rc take_entry(void *ctx, const s3_entry *e, vs_err *err) {
  remote_shard *r = ctx;
  size_t n = strlen(r->prefix), len = strlen(e->key);
  if (len <= n || strncmp(e->key, r->prefix, n)) return VS_OK;
  if (!e->is_prefix) {
    uint64_t v = shard_manifest_version(e->key + n);
    if (v > r->version && strlen(e->etag) < sizeof r->etag) r->version = v, strcpy(r->etag, e->etag);
    return VS_OK;
  }
  if (e->key[n] == '.' || e->key[n] == '/') return VS_OK; /* as in folders; ".." must never become a path */
  if (r->n_children >= MAX_CHILDREN) return vs_fail(err, VS_INVALID, "more than %d folders below it", MAX_CHILDREN);
  char **grown = realloc(r->children, (r->n_children + 1) * sizeof *grown);
  if (!grown) return vs_nomem(err);
  r->children = grown;
  if (!(grown[r->n_children] = strndup(e->key + n, len - n - 1))) return vs_nomem(err);
  r->n_children++;
  return VS_OK;
}

static vs_rc list_more(remote_shard *r, vs_err *err) {
  shard_names_free(r->children, r->n_children);
  r->children = NULL, r->n_children = 0, r->version = 0;
  return s3_list(r->place, r->prefix, "/", NULL, 0, take_entry, r, err);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static vs_rc end_list(remote_shard *r, vs_err *err) {
  vs_err why = {0};
  int more = 0;
  vs_rc rc = s3_job_wait(r->list, err);
  if (rc) return rc;
  if ((rc = s3_list_read(r->list->data, r->list->n_data, take_entry, r, &more, &why))) return vs_fail(err, rc, "%s: %s", r->uri, why.text);
  if (more && !r->version && (rc = list_more(r, err))) return rc; /* a stray object may sort before the manifests */
  if (r->n_children) qsort(r->children, r->n_children, sizeof *r->children, by_name); /* the store sorts "a-b/" before "a/" */
  return VS_OK;
}

/* A version that was asked for: its manifest came with the first round. */
static vs_rc end_version(remote_shard *r, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = s3_job_wait(r->get, &why);
  if (rc == VS_NOTFOUND && strcmp(r->get->code, "NoSuchBucket"))
    return vs_fail(err, rc, "%s has no version %" PRIu64 ": it was never published, or was vacuumed", r->uri, r->want);
  if (rc) return vs_fail(err, rc, "%s", why.text);
  r->version = r->want;
  strcpy(r->etag, r->get->etag);
  return VS_OK;
}

vs_rc remote_find(remote_shard **r, size_t n, int with_hint, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) rc = begin_find(r[i], with_hint, err);
  for (size_t i = 0; i < n && !rc; i++) {
    vs_err ignored = {0};
    rc = r[i]->want ? end_version(r[i], err) : end_list(r[i], err);
    if (!rc && r[i]->hint && s3_job_wait(r[i]->hint, &ignored) == VS_INTERRUPT) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
  }
  return rc;
}

/* ---- loading ---- */

static vs_rc parse(remote_shard *r, const char *json, size_t n, vs_err *err) {
  char name[64], *path;
  shard_manifest_file(r->version, name);
  if (asprintf(&path, "%s/%s", r->uri, name) < 0) return vs_nomem(err);
  vs_rc rc = shard_manifest_parse(json, n, path, &r->manifest, err);
  if (!rc && r->manifest.version != r->version) {
    rc = vs_corrupt(err, "%s: damaged manifest: it states version %" PRIu64, path, r->manifest.version);
    shard_manifest_reset(&r->manifest);
  }
  free(path);
  return rc;
}

/* 1: the hint speaks of the very manifest that was found. */
static int hint_serves(const remote_shard *r, shard_hint *h) {
  if (!r->hint || r->hint->rc || !r->hint->data || !shard_hint_read(r->hint->data, r->hint->n_data, h)) return 0;
  return h->version == r->version && h->etag_len && h->etag_len == strlen(r->etag) && !memcmp(h->etag, r->etag, h->etag_len);
}

vs_rc remote_manifests(remote_shard **r, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    shard_hint h;
    char name[64];
    vs_err ignored = {0};
    if (!r[i]->get && hint_serves(r[i], &h) && !parse(r[i], h.manifest, h.manifest_len, &ignored)) continue;
    shard_manifest_file(r[i]->version, name);
    if (!r[i]->get) rc = submit(r[i]->get = get_job(r[i], name, SHARD_MAX_MANIFEST), err);
  }
  for (size_t i = 0; i < n && !rc; i++) {
    s3_job *j = r[i]->get;
    if (!j) continue;
    rc = s3_job_wait(j, err);
    if (!rc) rc = parse(r[i], j->data ? (char *)j->data : "", j->n_data, err);
  }
  return rc;
}

vs_rc remote_segment(const remote_shard *r, const shard_segment_ref *ref, vs_io **out, vs_err *err) {
  io_s3_known known = {.size = ref->n_bytes, .checksum = ref->checksum};
  char *key;
  if (asprintf(&key, "%s%s", r->prefix, ref->file) < 0) return vs_nomem(err);
  vs_rc rc = io_s3_open(r->place, key, &known, out, err);
  free(key);
  return rc;
}

static vs_rc open_ios(remote_shard *r, vs_io **ios, vs_err *err) {
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < r->manifest.n_segments && !rc; i++) rc = remote_segment(r, &r->manifest.segments[i], &ios[i], err);
  return rc;
}

static vs_rc prime_from_hint(const remote_shard *r, vs_io **ios, int *primed, vs_err *err) {
  shard_hint h;
  vs_rc rc = VS_OK;
  *primed = hint_serves(r, &h);
  for (uint32_t i = 0; *primed && i < h.n_ranges && !rc; i++) {
    uint32_t segment;
    uint64_t off, len;
    uint8_t *copy;
    rc = shard_hint_range(&h, i, &segment, &off, &len, &copy, err);
    if (rc) break;
    if (segment < r->manifest.n_segments) rc = io_s3_prime(ios[segment], off, len, copy, err);
    else free(copy);
  }
  return rc;
}

/* The ends of segments without a hint, all in one round. */
static vs_rc prime_from_tails(vs_io **ios, vs_range *tails, const unsigned char *primed, size_t n, vs_err *err) {
  vs_rc rc = VS_OK;
  size_t begun = 0;
  for (; begun < n && !rc; begun++) {
    uint64_t len = ios[begun]->size < TAIL_BYTES ? ios[begun]->size : TAIL_BYTES;
    tails[begun] = (vs_range){.off = ios[begun]->size - len, .len = primed[begun] ? 0 : len};
    rc = vs_io_begin(ios[begun], &tails[begun], 1, err);
  }
  for (size_t i = 0; i < begun; i++) {
    vs_range *t = &tails[i];
    if (!rc) rc = vs_io_wait(ios[i], t, 1, err);
    uint8_t *copy = !rc && t->len ? malloc(t->len) : NULL;
    if (!rc && t->len) rc = copy ? VS_OK : vs_nomem(err);
    if (copy) {
      memcpy(copy, t->ptr, t->len);
      rc = io_s3_prime(ios[i], t->off, t->len, copy, err);
    }
    vs_io_release(ios[i], t, 1);
  }
  return rc;
}

static vs_rc open_segments(remote_shard *r, vs_io **ios, vs_err *err) {
  vs_rc rc = VS_OK;
  if (!(r->segments = calloc(r->manifest.n_segments + 1, sizeof *r->segments))) return vs_nomem(err);
  for (size_t i = 0; i < r->manifest.n_segments && !rc; i++) {
    vs_io *io = ios[i];
    ios[i] = NULL;
    rc = ivfpq_segment_open(io, &r->segments[i], err); /* takes the io */
    if (!rc) rc = shard_check_segment(&r->manifest, &r->manifest.segments[i], r->segments[i], err);
    if (!rc) io_s3_unprime(io);
  }
  return rc;
}

typedef struct loading { vs_io **ios; vs_range *tails; unsigned char *primed; size_t n; } loading;

static vs_rc open_all(remote_shard **r, size_t n, loading *l, vs_err *err) {
  size_t at = 0;
  vs_rc rc = VS_OK;
  for (size_t i = 0; i < n && !rc; i++) {
    size_t m = r[i]->manifest.n_segments;
    int primed = 0;
    rc = open_ios(r[i], l->ios + at, err);
    if (!rc) rc = prime_from_hint(r[i], l->ios + at, &primed, err);
    memset(l->primed + at, primed, m);
    at += m;
  }
  if (!rc) rc = prime_from_tails(l->ios, l->tails, l->primed, l->n, err);
  at = 0;
  for (size_t i = 0; i < n && !rc; i++) {
    rc = open_segments(r[i], l->ios + at, err);
    at += r[i]->manifest.n_segments;
  }
  return rc;
}

static vs_rc load_once(remote_shard **r, size_t n, vs_err *err) {
  loading l = {0};
  vs_rc rc = remote_manifests(r, n, err);
  for (size_t i = 0; i < n && !rc; i++) l.n += r[i]->manifest.n_segments;
  if (rc) return rc;
  l.ios = calloc(l.n + 1, sizeof *l.ios), l.tails = calloc(l.n + 1, sizeof *l.tails), l.primed = calloc(l.n + 1, 1);
  rc = l.ios && l.tails && l.primed ? open_all(r, n, &l, err) : vs_nomem(err);
  for (size_t i = 0; l.ios && i < l.n; i++) vs_io_close(l.ios[i]);
  free(l.ios), free(l.tails), free(l.primed);
  return rc;
}

/* Nothing of a first attempt remains, and no hint is used. 1: there was one. */
static int drop_hints(remote_shard **r, size_t n) {
  int any = 0;
  for (size_t i = 0; i < n; i++) {
    for (size_t g = 0; r[i]->segments && g < r[i]->manifest.n_segments; g++) ivfpq_segment_close(r[i]->segments[g]);
    free(r[i]->segments);
    r[i]->segments = NULL;
    shard_manifest_reset(&r[i]->manifest);
    any |= r[i]->hint != NULL;
    s3_job_release(r[i]->hint);
    r[i]->hint = NULL;
  }
  return any;
}

/* A hint that is sound in itself may still be forged: what does not open with it is opened without. */
vs_rc remote_load(remote_shard **r, size_t n, vs_err *err) {
  vs_err why = {0};
  vs_rc rc = load_once(r, n, &why);
  if ((rc == VS_CORRUPT || rc == VS_NOTFOUND || rc == VS_UNSUPPORTED) && drop_hints(r, n)) {
    vs_err_reset(&why);
    rc = load_once(r, n, &why);
  }
  return rc ? vs_fail(err, rc, "%s", why.text) : VS_OK;
}
