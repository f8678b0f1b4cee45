/* progress.c - see progress.h. One bar per process: a command does one thing at a time. */
#include "progress.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tool.h"

enum { BAR_CELLS = 24 };
static const double REDRAW_S = 0.1;

static struct {
  int terminal; /* 0 not asked yet, 1 yes, -1 no */
  int shown;
  char stage[64];
  double started, drawn;
} bar;

static int on_terminal(void) {
  if (!bar.terminal) bar.terminal = isatty(STDERR_FILENO) ? 1 : -1;
  return bar.terminal > 0;
}

static void draw(const char *stage, uint64_t done, uint64_t total, double elapsed, const char *unit) {
  char cells[BAR_CELLS + 1];
  double share = total ? (double)done / (double)total : 0, rate = elapsed > 0 ? (double)done / elapsed : 0;
  if (share > 1) share = 1;
  size_t full = (size_t)(share * BAR_CELLS);
  memset(cells, '.', BAR_CELLS), memset(cells, '#', full);
  cells[BAR_CELLS] = 0;
  fprintf(stderr, "\r%-16.40s [%s] %3.0f %%", stage, cells, 100 * share);
  if (total > 1 && rate > 0) {
    unsigned long left = (unsigned long)((double)(total > done ? total - done : 0) / rate + 0.5);
    if (!unit) fprintf(stderr, "  %.1f MB/s, %lu:%02lu left", rate / 1e6, left / 60, left % 60);
    else fprintf(stderr, "  %.*f %s/s, %lu:%02lu left", rate < 10, rate, unit, left / 60, left % 60);
  }
  fputs("\033[K", stderr);
  fflush(stderr);
}

/* unit NULL: bytes */
static void show(const char *stage, uint64_t done, uint64_t total, const char *unit) {
  if (!on_terminal()) return;
  double now = tool_seconds();
  if (strcmp(stage, bar.stage)) {
    snprintf(bar.stage, sizeof bar.stage, "%s", stage);
    bar.started = now, bar.drawn = 0;
  }
  if (bar.drawn && now - bar.drawn < REDRAW_S && done < total) return;
  bar.drawn = now, bar.shown = 1;
  draw(stage, done, total, now - bar.started, unit);
}

void progress_show(void *ctx, const char *stage, uint64_t done, uint64_t total) {
  (void)ctx;
  show(stage, done, total, "rows");
}

void progress_bytes(const char *stage, uint64_t done, uint64_t total) { show(stage, done, total, NULL); }

void progress_count(const char *stage, uint64_t done, uint64_t total, const char *unit) {
  show(stage, done, total, unit);
}

void progress_clear(void) {
  if (bar.shown) fputs("\r\033[K", stderr);
  bar.shown = 0, bar.drawn = 0;
}
