/* statement.h - what runs for a statement: when it must stop, how much it may read, what it did.
 *
 * A cursor owns a statement and enters it around every call of SQLite that may compute or read for long; below, it is the
 * vs_scope of the thread. What is done between _enter and _leave is booked on the phase of that time and shows in shard_trace,
 * which keeps the connection's last search.
 */
#ifndef VTAB_STATEMENT_H
#define VTAB_STATEMENT_H
#include <pthread.h>

#include "../base/vs_scope.h"
#include "conn.h"

typedef struct statement {
  vs_scope scope; /* first: a scope is its statement */
  vs_scope *before;
  conn *c;
  conn_stop stop;
  pthread_t thread; /* that entered: only there SQLite may be asked */
  int depth;
  conn_phase phase;
  vs_traffic mark;  /* at the last change of phase */
  int64_t mark_us;
} statement;

void statement_open(statement *s, conn *c);
void statement_enter(statement *s, conn_phase phase);
void statement_phase(statement *s, conn_phase phase); /* between enter and leave */
void statement_leave(statement *s);
void statement_close(statement *s); /* legal on a zeroed statement */

/* Begins the connection's trace anew, and books what searches did. */
void statement_trace_begin(statement *s);
void statement_trace_search(statement *s, const shard_stats *stats);

#endif
