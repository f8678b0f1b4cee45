/* statement.c - see statement.h. */
#include "statement.h"

#include <string.h>
#include <time.h>
SQLITE_EXTENSION_INIT3

static int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int must_stop(void *ctx) {
  statement *s = ctx;
  return pthread_equal(pthread_self(), s->thread) && conn_stop_poll(&s->stop);
}

void statement_open(statement *s, conn *c) {
  memset(s, 0, sizeof *s);
  s->c = c;
  s->scope.stop = must_stop, s->scope.stop_ctx = s;
  conn_stop_init(&s->stop, c->db);
}

/* Books what was done since the mark, and sets it anew. */
static void book(statement *s) {
  conn_trace *t = &s->c->trace.phases[s->phase];
  const vs_traffic *now = &s->scope.traffic;
  int64_t us = now_us();
  t->requests += now->requests - s->mark.requests, t->retries += now->retries - s->mark.retries;
  t->rounds += now->rounds - s->mark.rounds, t->bytes += now->bytes - s->mark.bytes;
  t->hits += now->hits - s->mark.hits, t->us += us - s->mark_us;
  s->mark = *now, s->mark_us = us;
}

void statement_enter(statement *s, conn_phase phase) {
  if (s->depth++) return;
  s->thread = pthread_self();
  s->scope.timeout_ms = s->c->timeout_ms, s->scope.max_bytes = s->c->max_bytes;
  s->before = vs_scope_enter(&s->scope);
  s->phase = phase, s->mark = s->scope.traffic, s->mark_us = now_us();
}

void statement_phase(statement *s, conn_phase phase) {
  book(s);
  s->phase = phase;
}

void statement_leave(statement *s) {
  if (--s->depth) return;
  book(s);
  vs_scope_enter(s->before);
}

void statement_close(statement *s) { memset(s, 0, sizeof *s); }

void statement_trace_begin(statement *s) { memset(&s->c->trace, 0, sizeof s->c->trace); }

void statement_trace_search(statement *s, const shard_stats *x) {
  conn_trace *scan = &s->c->trace.phases[PHASE_SCAN], *refine = &s->c->trace.phases[PHASE_REFINE];
  scan->partitions += x->partitions, scan->rows += x->rows, refine->rows += x->refined;
  /* the refining is booked on the phase of this time, or will be when that ends */
  conn_trace *mixed = &s->c->trace.phases[s->phase];
  mixed->requests -= x->refine.requests, mixed->retries -= x->refine.retries, mixed->rounds -= x->refine.rounds;
  mixed->bytes -= x->refine.bytes, mixed->hits -= x->refine.hits, mixed->us -= x->refine_us;
  refine->requests += x->refine.requests, refine->retries += x->refine.retries, refine->rounds += x->refine.rounds;
  refine->bytes += x->refine.bytes, refine->hits += x->refine.hits, refine->us += x->refine_us;
}
