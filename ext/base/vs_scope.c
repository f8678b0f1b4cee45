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
