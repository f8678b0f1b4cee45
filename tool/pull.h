/* pull.h - `vecshard pull` as a part of other commands. */
#ifndef PULL_H
#define PULL_H
#include "tool.h"

/* Looks at the shard or database at `from` and at what DIR holds of it, and asks `worth` with the bytes that are missing; pulls
 * when it says 1. *pulled: all of it is in DIR now. Interrupted, it leaves what arrived for the next run. */
vs_rc pull_when_worth(const char *from, const char *dir, int (*worth)(void *ctx, uint64_t missing), void *ctx, int *pulled,
                      vs_err *err) VS_WARN_UNUSED;

#endif
