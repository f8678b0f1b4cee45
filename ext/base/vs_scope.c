/* vs_scope.c - see vs_scope.h. */
#include "vs_scope.h"

#include <stddef.h>

static _Thread_local vs_scope *current;

vs_scope *vs_scope_enter(vs_scope *s) {
  vs_scope *before = current;
  current = s;
  return before;
}

vs_scope *vs_scope_current(void) { return current; }

int vs_scope_stopped(void) { return current && current->stop && current->stop(current->stop_ctx); }

uint64_t vs_scope_next_round(void) { return current ? __atomic_load_n(&current->traffic.rounds, __ATOMIC_RELAXED) + 1 : 0; }

void vs_scope_round(uint64_t round) {
  uint64_t have = current ? __atomic_load_n(&current->traffic.rounds, __ATOMIC_RELAXED) : UINT64_MAX;
  while (have < round &&
         !__atomic_compare_exchange_n(&current->traffic.rounds, &have, round, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
    continue;
}
