/* vs_scope.h - what the work on this thread is done for: who may stop it, how long and how much it may read, what it has read.
 *
 * A statement (or the tool) makes a vs_scope and enters it on its thread; code far below that waits for a network asks the
 * scope of its thread, so that no signature between them carries it. A task of the pool enters the scope of its run. Without
 * a scope nothing stops the work, defaults hold and nothing is counted.
 */
#ifndef VS_SCOPE_H
#define VS_SCOPE_H
#include <stdint.h>

/* Counted with relaxed atomics: several threads work for one scope. */
typedef struct vs_traffic {
  uint64_t requests;   /* answered or failed exchanges, retries included */
  uint64_t retries;
  uint64_t rounds;     /* the longest chain of exchanges each of which began after the one before had ended */
  uint64_t bytes;      /* received */
  uint64_t hits;       /* reads answered by the cache */
} vs_traffic;

typedef struct vs_scope {
  int (*stop)(void *ctx); /* non-zero: give up with VS_INTERRUPT. NULL: never. Called on any thread that entered the scope. */
  void *stop_ctx;
  int64_t timeout_ms;     /* of one network operation with its retries; 0: the default */
  uint64_t max_bytes;     /* received by the whole scope; 0: the default */
  vs_traffic traffic;
} vs_scope;

/* Makes s (or NULL) the scope of this thread and returns the one before, to be entered again at the end. */
vs_scope *vs_scope_enter(vs_scope *s);
vs_scope *vs_scope_current(void);
int vs_scope_stopped(void); /* asks the current scope */

/* Rounds: what begins now is in round vs_scope_next_round(); whoever waited for it says so with vs_scope_round(that number). */
uint64_t vs_scope_next_round(void);
void vs_scope_round(uint64_t round);

#endif
