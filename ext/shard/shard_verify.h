/* shard_verify.h - finds every fault of a source: manifests, file sizes and checksums, and the inside of each segment. */
#ifndef SHARD_VERIFY_H
#define SHARD_VERIFY_H
#include "../base/vs_err.h"

typedef struct shard_verifier {
  void *ctx;
  /* One fault; segment is "" for faults of the shard itself. Non-zero stops the walk. */
  int (*fault)(void *ctx, const char *shard, const char *segment, const char *text);
  int (*stop)(void *ctx); /* NULL, or polled: non-zero ends with VS_INTERRUPT */
} shard_verifier;

/* A shard that cannot be opened is a fault, not the end. VS_NOTFOUND when the source itself does not exist. */
vs_rc shard_verify(const char *source, const shard_verifier *v, vs_err *err) VS_WARN_UNUSED;

#endif
