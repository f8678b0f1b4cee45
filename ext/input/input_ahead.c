/* input_ahead.c - an input as windows of rows, of which the next is loaded while the caller works on this one.
 *
 * Two windows. The caller's batches are slices of the front one; a reader thread of this input fills the other, once two
 * windows in a row were wanted one behind the other (a caller who jumps about loads what he asks for and nothing else). When
 * the front one is used up the two change places. Windows grow from what the caller asks for towards window_max, so that a
 * small batch size does not make small reads.
 *
 * One load runs at a time, on the reader or on the caller's thread, so that loaders need no locks of their own; both use the
 * pool. What is delivered does not depend on who loaded: a failed load is kept with its row and reported when that row is asked
 * for. While it waits for the reader the caller asks every STOP_POLL_MS whether to stop. A load that nobody wants any more is
 * told so through `cancel`.
 *
 * Where windows end depends on how a file is stored and on who loads. A caller who takes a few rows here and there, to learn
 * from them, must not see that, or he would learn something else from the same rows: a batch of up to ACROSS_BYTES is joined
 * from several windows, by copying. Larger ones end with the window.
 *
 * Fork: the child has no reader. An input that was loading at that moment cannot be read there (nobody knows what half a load
 * left behind) and is not freed; any other goes on by itself. The thread blocks all signals and is joined by close.
 *
 * Memory: two windows as the format fills them; the second is given back when the last rows are in the first. ACROSS_BYTES and
 * the texts of as many rows.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../base/vs_pool.h"
#include "../base/vs_scope.h"
#include "input_int.h"

enum { STOP_POLL_MS = 20, STREAK = 1 };
#define ACROSS_BYTES ((size_t)1 << 20)       /* of vectors */
#define ACROSS_TEXT_BYTES ((size_t)32 << 20) /* of texts; nobody learns from rows of so much text */

typedef enum reader_state { READER_IDLE, READER_ASKED, READER_LOADED } reader_state;

typedef struct input_reader {
  pthread_t thread;
  pid_t pid;
  pthread_mutex_t m; /* guards the rest; the window being loaded is the reader's while state is READER_ASKED */
  pthread_cond_t changed;
  reader_state state;
  int quit;
  uint64_t row; /* asked for */
  size_t want;
  vs_rc rc;
  vs_err err;
} input_reader;

static void *read_loop(void *ctx) {
  input_ahead *a = ctx;
  input_reader *r = a->reader;
  pthread_setname_np(pthread_self(), VS_THREAD_NAME " read");
  pthread_mutex_lock(&r->m);
  while (!r->quit) {
    if (r->state != READER_ASKED) {
      pthread_cond_wait(&r->changed, &r->m);
      continue;
    }
    input_window *w = &a->window[!a->front];
    pthread_mutex_unlock(&r->m);
    vs_err err = {0};
    w->n = 0;
    vs_rc rc = a->load(a, w, r->row, r->want, &err);
    if (rc) w->n = 0;
    pthread_mutex_lock(&r->m);
    r->rc = rc, r->err = err;
    r->state = READER_LOADED;
    pthread_cond_broadcast(&r->changed);
  }
  pthread_mutex_unlock(&r->m);
  return NULL;
}

/* NULL: no reader can be had, everything is loaded by the caller. */
static input_reader *start_reader(input_ahead *a) {
  input_reader *r = calloc(1, sizeof *r);
  pthread_condattr_t monotonic;
  sigset_t all, before;
  if (!r) return NULL;
  pthread_mutex_init(&r->m, NULL);
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&r->changed, &monotonic);
  pthread_condattr_destroy(&monotonic);
  r->pid = getpid();
  a->reader = r;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  int failed = pthread_create(&r->thread, NULL, read_loop, a);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (!failed) return r;
  pthread_cond_destroy(&r->changed);
  pthread_mutex_destroy(&r->m);
  free(r);
  a->reader = NULL;
  a->no_reader = 1;
  return NULL;
}

/* In a forked child: 1 when the reader was loading then. Else the child goes on without it. */
static int lost_reader(input_ahead *a) {
  input_reader *r = a->reader;
  if (!r || r->pid == getpid()) return 0;
  if (r->state == READER_ASKED) return 1;
  a->window[!a->front].n = 0;
  a->reader = NULL; /* its lock may be held by a thread that is not here */
  return 0;
}

/* Waits until the reader has loaded what it was asked for. */
static vs_rc wait_for_reader(input_reader *r, vs_err *err) {
  vs_rc rc = VS_OK;
  pthread_mutex_lock(&r->m);
  while (r->state == READER_ASKED && !rc) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += STOP_POLL_MS * 1000000;
    if (until.tv_nsec >= 1000000000) until.tv_nsec -= 1000000000, until.tv_sec++;
    if (pthread_cond_timedwait(&r->changed, &r->m, &until) != ETIMEDOUT) continue;
    pthread_mutex_unlock(&r->m);
    if (vs_scope_stopped()) rc = vs_fail(err, VS_INTERRUPT, "interrupted");
    pthread_mutex_lock(&r->m);
  }
  pthread_mutex_unlock(&r->m);
  return rc;
}

static int holds(const input_window *w, uint64_t row) { return row >= w->row && row - w->row < w->n; }

/* Takes what the reader has, if that is what is wanted; then *taken is set. */
static vs_rc take_loaded(input_ahead *a, int *taken, vs_err *err) {
  input_reader *r = a->reader;
  uint64_t asked = r->row;
  size_t want = r->want;
  int wanted = a->pos >= asked && a->pos - asked < want;
  if (!wanted) __atomic_store_n(&a->cancel, 1, __ATOMIC_RELAXED);
  vs_rc rc = wait_for_reader(r, err);
  if (rc) return rc;
  __atomic_store_n(&a->cancel, 0, __ATOMIC_RELAXED);
  pthread_mutex_lock(&r->m);
  int loaded = r->state == READER_LOADED;
  r->state = READER_IDLE;
  pthread_mutex_unlock(&r->m);
  if (!loaded) return VS_OK;
  if (r->rc && a->pos == asked && r->rc != VS_INTERRUPT) return vs_fail(err, r->rc, "%s", r->err.text);
  *taken = !r->rc && holds(&a->window[!a->front], a->pos);
  if (*taken) a->front = !a->front;
  return VS_OK;
}

static void ask_reader(input_ahead *a, uint64_t row, size_t want) {
  input_reader *r = a->reader ? a->reader : start_reader(a);
  if (!r) return;
  pthread_mutex_lock(&r->m);
  r->row = row, r->want = want;
  r->state = READER_ASKED;
  pthread_cond_broadcast(&r->changed);
  pthread_mutex_unlock(&r->m);
  a->base.loaded_end = a->base.n_rows - row < want ? a->base.n_rows : row + want;
}

static size_t at_most(const input_ahead *a, uint64_t row, size_t want) {
  if (want > a->window_max) want = a->window_max;
  return a->base.n_rows - row < want ? (size_t)(a->base.n_rows - row) : want;
}

/* The front window holds a->pos afterwards. */
static vs_rc next_window(input_ahead *a, size_t max_rows, vs_err *err) {
  input_window *w = &a->window[a->front];
  uint64_t end = w->row + w->n;
  int was_full = w->n > 0, taken = 0;
  if (lost_reader(a))
    return vs_fail(err, VS_IO, "%s: the process was forked while this file was being read: open it again in the child",
                   a->base.path);
  vs_rc rc = a->reader ? take_loaded(a, &taken, err) : VS_OK;
  if (rc) return rc;
  w = &a->window[a->front];
  if (!taken) {
    w->n = 0;
    rc = a->load(a, w, a->pos, at_most(a, a->pos, max_rows), err);
    if (!rc && !holds(w, a->pos))
      rc = vs_fail(err, VS_IO, "%s: row %llu cannot be read", a->base.path, (unsigned long long)a->pos);
    if (rc) {
      w->n = 0, a->streak = 0;
      return rc;
    }
  }
  a->streak = taken ? STREAK : was_full && w->row == end ? a->streak + 1 : 0;
  end = w->row + w->n;
  a->base.loaded_end = end;
  if (end >= a->base.n_rows) {
    input_window *other = &a->window[!a->front];
    input_rows_free(&other->rows);
    if (a->free_own) a->free_own(other->own);
    memset(other, 0, sizeof *other);
  } else if (a->streak >= STREAK && !a->no_reader) {
    ask_reader(a, end, at_most(a, end, w->n < a->window_max / 2 ? 2 * w->n : a->window_max));
  }
  return VS_OK;
}

static void slice(const input_ahead *a, const input_rows *rows, size_t skip, size_t n, input_batch *batch) {
  batch->n = n;
  batch->vectors = rows->vectors + skip * a->base.dim;
  batch->ids = rows->ids + skip;
  batch->columns = rows->columns + skip * a->base.n_columns;
  batch->faults = rows->faults + skip;
}

/* ---- batches across windows ---- */

struct input_text_block {
  struct input_text_block *next;
  size_t total; /* bytes in this block and those after it */
  char text[];
};

static void free_texts(input_ahead *a) {
  while (a->texts) {
    struct input_text_block *next = a->texts->next;
    free(a->texts);
    a->texts = next;
  }
}

/* The texts of n values into a block of their own. */
static vs_rc keep_texts(input_ahead *a, input_value *v, size_t n, vs_err *err) {
  size_t n_bytes = 0, at = 0;
  for (size_t i = 0; i < n; i++)
    if (v[i].type == INPUT_TEXT) n_bytes += v[i].len;
  struct input_text_block *b = malloc(sizeof *b + n_bytes);
  if (!b) return vs_nomem(err);
  b->next = a->texts;
  b->total = n_bytes + (a->texts ? a->texts->total : 0);
  a->texts = b;
  for (size_t i = 0; i < n; i++) {
    if (v[i].type != INPUT_TEXT) continue;
    memcpy(b->text + at, v[i].text, v[i].len);
    v[i].text = b->text + at;
    at += v[i].len;
  }
  return VS_OK;
}

/* Copies n rows of a window behind the `have` rows of a->across. */
static vs_rc copy_rows(input_ahead *a, const input_rows *from, size_t skip, size_t have, size_t n, vs_err *err) {
  size_t dim = a->base.dim, cols = a->base.n_columns;
  input_rows *to = &a->across;
  memcpy(to->vectors + have * dim, from->vectors + skip * dim, n * dim * 4);
  memcpy(to->ids + have, from->ids + skip, n * sizeof *to->ids);
  if (cols) memcpy(to->columns + have * cols, from->columns + skip * cols, n * cols * sizeof *to->columns);
  memcpy(to->faults + have, from->faults + skip, n);
  vs_rc rc = keep_texts(a, to->ids + have, n, err);
  return rc || !cols ? rc : keep_texts(a, to->columns + have * cols, n * cols, err);
}

static vs_rc read_across(input_ahead *a, size_t max_rows, input_batch *batch, vs_err *err) {
  uint64_t start = a->pos;
  size_t have = 0;
  vs_err why = {0};
  vs_rc rc = input_rows_reserve(&a->across, max_rows, a->base.dim, 4, a->base.n_columns, &why);
  while (!rc && have < max_rows && a->pos < a->base.n_rows) {
    if (!holds(&a->window[a->front], a->pos)) rc = next_window(a, max_rows - have, &why);
    if (rc) break;
    const input_window *w = &a->window[a->front];
    size_t skip = (size_t)(a->pos - w->row), n = w->n - skip < max_rows - have ? w->n - skip : max_rows - have;
    rc = copy_rows(a, &w->rows, skip, have, n, &why);
    if (!rc) have += n, a->pos += n;
    if (!rc && a->texts->total > ACROSS_TEXT_BYTES) break;
  }
  /* Damage further on is reported when it is the next row. */
  if (rc && (!have || rc == VS_NOMEM || rc == VS_INTERRUPT)) {
    a->pos = start;
    return vs_fail(err, rc, "%s", why.text);
  }
  slice(a, &a->across, 0, have, batch);
  return VS_OK;
}

static vs_rc ahead_read(input *base, size_t max_rows, input_batch *batch, vs_err *err) {
  input_ahead *a = (input_ahead *)base;
  memset(batch, 0, sizeof *batch);
  batch->first_row = a->pos;
  free_texts(a);
  if (!max_rows || a->pos >= base->n_rows) return VS_OK;
  if (!holds(&a->window[a->front], a->pos)) {
    vs_rc rc = next_window(a, max_rows, err);
    if (rc) return rc;
  }
  const input_window *w = &a->window[a->front];
  size_t skip = (size_t)(a->pos - w->row), n = w->n - skip < max_rows ? w->n - skip : max_rows;
  if (n < max_rows && w->row + w->n < base->n_rows && max_rows <= ACROSS_BYTES / ((size_t)base->dim * 4))
    return read_across(a, max_rows, batch, err);
  slice(a, &w->rows, skip, n, batch);
  a->pos += n;
  return VS_OK;
}

static vs_rc ahead_seek(input *base, uint64_t row, vs_err *err) {
  if (row > base->n_rows)
    return vs_fail(err, VS_INVALID, "%s: no row %llu, the file has %llu", base->path, (unsigned long long)row,
                   (unsigned long long)base->n_rows);
  ((input_ahead *)base)->pos = row;
  return VS_OK;
}

static void ahead_start(input *base, size_t max_rows) {
  input_ahead *a = (input_ahead *)base;
  if (a->reader || a->no_reader || a->pos >= base->n_rows || holds(&a->window[a->front], a->pos) || !max_rows) return;
  ask_reader(a, a->pos, at_most(a, a->pos, max_rows));
}

static void ahead_close(input *base) {
  input_ahead *a = (input_ahead *)base;
  input_reader *r;
  if (lost_reader(a)) return;
  r = a->reader;
  if (r) {
    __atomic_store_n(&a->cancel, 1, __ATOMIC_RELAXED);
    pthread_mutex_lock(&r->m);
    r->quit = 1;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->m);
    pthread_join(r->thread, NULL);
    pthread_cond_destroy(&r->changed);
    pthread_mutex_destroy(&r->m);
    free(r);
  }
  free_texts(a);
  input_rows_free(&a->across);
  for (int i = 0; i < 2; i++) {
    input_rows_free(&a->window[i].rows);
    if (a->free_own) a->free_own(a->window[i].own);
  }
  a->destroy(a);
}

void input_ahead_init(input_ahead *a) {
  if (a->threads <= 0) a->threads = vs_threads();
  if (a->threads == 1) a->no_reader = 1;
  a->base.read = ahead_read;
  a->base.seek = ahead_seek;
  a->base.start = a->no_reader ? NULL : ahead_start;
  a->base.close = ahead_close;
}
