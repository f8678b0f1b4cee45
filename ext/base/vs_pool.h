/* vs_pool.h - one lazily started thread pool per process.
 *
 * vs_pool_run calls fn(ctx, i) once for every i in [0, n), on the caller's thread and on the pool's, and returns when all
 * calls have returned. The caller always works too, so a run makes progress when no thread can be had, and a run inside a run
 * cannot deadlock. `threads` caps the workers of this run, the caller included; 0 means vs_threads(). After fork the child
 * starts without threads and makes its own when needed. Pool threads block all signals.
 */
#ifndef VS_POOL_H
#define VS_POOL_H
#include <stddef.h>

typedef void (*vs_task)(void *ctx, size_t i);
void vs_pool_run(size_t n, int threads, vs_task fn, void *ctx);

/* How the names of all our threads begin, as debuggers and /proc show them. */
#define VS_THREAD_NAME "vecshard"

/* Threads that work may use by default: VECSHARD_THREADS, else the affinity mask capped by the cgroup's CPU quota; >= 1. */
int vs_threads(void);

#endif
