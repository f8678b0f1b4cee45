/* s3_place.c - a bucket with its endpoint, region and credentials: everything that turns a job into a signed request.
 *
 * Shared by all who read from the bucket. Region, credentials and clock may be put right while requests run, so they are read
 * under a lock for each attempt. Messages get names from here, and never a secret.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "s3_config.h"
#include "s3_engine.h"
#include "s3_sign.h"

struct s3_place {
  pthread_mutex_t lock;
  int refs;
  s3_location location;
  s3_credentials credentials;
  int64_t clock_offset; /* the server's clock minus ours, seconds */
};

vs_rc s3_place_open(const char *uri, s3_place **out, char **key, vs_err *err) {
  s3_place *p = calloc(1, sizeof *p);
  *out = NULL, *key = NULL;
  if (!p) return vs_nomem(err);
  vs_rc rc = s3_locate(uri, &p->location, key, err);
  if (!rc && !p->location.anonymous) rc = s3_credentials_load(&p->credentials, err);
  if (rc) {
    s3_location_reset(&p->location);
    free(p), free(*key), *key = NULL;
    return rc;
  }
  pthread_mutex_init(&p->lock, NULL);
  p->refs = 1;
  *out = p;
  return VS_OK;
}

s3_place *s3_place_share(s3_place *p) {
  __atomic_fetch_add(&p->refs, 1, __ATOMIC_RELAXED);
  return p;
}

void s3_place_close(s3_place *p) {
  if (!p || __atomic_sub_fetch(&p->refs, 1, __ATOMIC_ACQ_REL)) return;
  s3_location_reset(&p->location);
  s3_credentials_reset(&p->credentials);
  pthread_mutex_destroy(&p->lock);
  free(p);
}

static char *print(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
static char *print(const char *fmt, ...) {
  char *text = NULL;
  va_list ap;
  va_start(ap, fmt);
  int n = vasprintf(&text, fmt, ap);
  va_end(ap);
  return n < 0 ? NULL : text;
}

int s3_place_is_plain(const s3_place *p) { return !p->location.bucket; }

char *s3_place_name(const s3_place *p, const char *key) {
  if (p->location.bucket) return print("s3://%s%s%s", p->location.bucket, *key ? "/" : "", key);
  return print("%s/%.*s", p->location.origin, (int)strcspn(key, "?#"), key);
}

/* What distinguishes one store's object from another's of the same name. */
char *s3_place_identity(const s3_place *p, const char *key) {
  return print("%s %s %s", p->location.origin, p->location.base_path, key);
}

/* ---- requests ---- */

void s3_attempt_reset(s3_attempt *a) {
  for (size_t i = 0; i < a->n_headers; i++) free(a->headers[i]);
  free(a->url), free(a->path), free(a->ca_bundle);
  memset(a, 0, sizeof *a);
}

static int add(s3_attempt *a, char *line) {
  if (line) a->headers[a->n_headers++] = line;
  return line != NULL;
}

static int set_url(const s3_location *l, const s3_job *j, s3_attempt *a) {
  char *encoded = l->bucket ? s3_encode(j->key, 1) : strdup(j->key);
  const char *base = l->base_path;
  if (!encoded) return 0;
  if (*encoded || !*base) a->path = print("%s/%s", base, encoded);
  else a->path = strdup(base);
  free(encoded);
  if (a->path) a->url = print("%s%s%s%s", l->origin, a->path, j->query ? "?" : "", j->query ? j->query : "");
  if (l->ca_bundle && !(a->ca_bundle = strdup(l->ca_bundle))) return 0;
  a->is_plain = !l->bucket;
  return a->url != NULL;
}

static vs_rc sign(s3_place *p, const s3_job *j, s3_attempt *a, vs_err *err) {
  static const char *const methods[] = {"GET", "HEAD", "PUT", "POST", "DELETE"};
  char date[17], *authorization = NULL;
  s3_sign_date((int64_t)time(NULL) + p->clock_offset, date);
  s3_header headers[4] = {{"host", p->location.host}, {"x-amz-content-sha256", j->payload_hash}, {"x-amz-date", date}};
  size_t n = 3;
  if (p->credentials.session_token) headers[n++] = (s3_header){"x-amz-security-token", p->credentials.session_token};
  s3_sign_input in = {.method = methods[j->method], .path = a->path, .query = j->query ? j->query : "", .headers = headers,
                      .n_headers = n, .payload_hash = j->payload_hash, .date = date, .region = p->location.region,
                      .service = "s3", .access_key = p->credentials.access_key, .secret_key = p->credentials.secret_key};
  vs_rc rc = s3_sign(&in, &authorization, err);
  if (rc) return rc;
  int ok = add(a, print("Authorization: %s", authorization));
  for (size_t i = 1; i < n && ok; i++) ok = add(a, print("%s: %s", headers[i].name, headers[i].value));
  free(authorization);
  return ok ? VS_OK : vs_nomem(err);
}

vs_rc s3_place_sign(s3_place *p, const s3_job *j, s3_attempt *a, vs_err *err) {
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&p->lock);
  vs_rc rc = set_url(&p->location, j, a) && (!j->exclusive || add(a, strdup("If-None-Match: *"))) ? VS_OK : vs_nomem(err);
  if (!rc && !p->location.anonymous) rc = sign(p, j, a, err);
  pthread_mutex_unlock(&p->lock);
  return rc;
}

/* ---- putting right ---- */

int s3_place_new_region(s3_place *p, const char *region) {
  vs_err ignored = {0};
  pthread_mutex_lock(&p->lock);
  int other = strcmp(p->location.region, region) && s3_relocate(&p->location, region, &ignored) == VS_OK;
  pthread_mutex_unlock(&p->lock);
  return other;
}

static int same(const char *a, const char *b) { return a && b ? !strcmp(a, b) : a == b; }

int s3_place_new_credentials(s3_place *p) {
  s3_credentials fresh = {0};
  vs_err ignored = {0};
  if (s3_credentials_load(&fresh, &ignored)) return 0;
  pthread_mutex_lock(&p->lock);
  int changed = !same(fresh.access_key, p->credentials.access_key) || !same(fresh.secret_key, p->credentials.secret_key) ||
                !same(fresh.session_token, p->credentials.session_token);
  s3_credentials old = p->credentials;
  p->credentials = fresh;
  pthread_mutex_unlock(&p->lock);
  s3_credentials_reset(&old);
  return changed;
}

int s3_place_set_clock(s3_place *p, int64_t server_time) {
  if (server_time < 0) return 0;
  int64_t offset = server_time - (int64_t)time(NULL);
  pthread_mutex_lock(&p->lock);
  int off = llabs(offset - p->clock_offset) > 60;
  p->clock_offset = offset;
  pthread_mutex_unlock(&p->lock);
  return off;
}

int s3_place_knows(const s3_place *p, const char *text) {
  s3_place *unlocked = (s3_place *)p;
  pthread_mutex_lock(&unlocked->lock);
  const s3_credentials *c = &p->credentials;
  int found = (c->secret_key && *c->secret_key && strstr(text, c->secret_key)) ||
              (c->session_token && *c->session_token && strstr(text, c->session_token)) ||
              (c->access_key && *c->access_key && strstr(text, c->access_key));
  pthread_mutex_unlock(&unlocked->lock);
  return found;
}
