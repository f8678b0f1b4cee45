/* transfer.c - see transfer.h. */
#include "transfer.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "../ext/base/vs_scope.h"
#include "../ext/s3vfs/s3_engine.h"

enum { SLOWEST_BYTES_PER_MS = 256 };

struct transfer_hash { XXH3_state_t *state; };

transfer_hash *transfer_hash_new(void) {
  transfer_hash *h = calloc(1, sizeof *h);
  if (h && !(h->state = XXH3_createState())) free(h), h = NULL; /* apart: it wants an alignment of its own */
  if (h) XXH3_128bits_reset(h->state);
  return h;
}

void transfer_hash_add(transfer_hash *h, const void *p, size_t n) { XXH3_128bits_update(h->state, p, n); }

int transfer_hash_is(const transfer_hash *h, const char *hex) {
  char own[33];
  XXH128_hash_t v = XXH3_128bits_digest(h->state);
  snprintf(own, sizeof own, "%016llx%016llx", (unsigned long long)v.high64, (unsigned long long)v.low64);
  return !strcmp(own, hex);
}

void transfer_hash_free(transfer_hash *h) {
  if (h) XXH3_freeState(h->state);
  free(h);
}

int transfer_is_md5(const char *etag, const void *p, size_t n) {
  unsigned char md5[EVP_MAX_MD_SIZE];
  unsigned len = 0;
  char hex[33];
  if (*etag == '"') etag++;
  if (strspn(etag, "0123456789abcdef") != 32 || (etag[32] && strcmp(etag + 32, "\""))) return 0;
  if (!EVP_Digest(p, n, md5, &len, EVP_md5(), NULL) || len != 16) return 0; /* a library that refuses MD5 (FIPS) */
  for (unsigned i = 0; i < 16; i++) snprintf(hex + 2 * i, 3, "%02x", md5[i]);
  return !memcmp(hex, etag, 32);
}

int64_t transfer_allow_time(uint64_t n_bytes) {
  vs_scope *s = vs_scope_current();
  int64_t before = s->timeout_ms;
  s->timeout_ms = s3_timeout_ms() + (int64_t)(n_bytes / SLOWEST_BYTES_PER_MS);
  return before;
}

void transfer_reset_time(int64_t before) { vs_scope_current()->timeout_ms = before; }
