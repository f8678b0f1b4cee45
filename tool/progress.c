/* progress.c - see progress.h. One bar per process: a command does one thing at a time. */
#include "progress.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "json.h"
#include "tool.h"

enum { BAR_CELLS = 24 };
static const double REDRAW_S = 0.1, LINE_S = 1;

static struct {
  int terminal; /* 0 not asked yet, 1 yes, -1 no */
  int shown, json;
  uint64_t row_bytes; /* of the input; 0: not known */
  char stage[64];
  double started, drawn;
} bar;

static int on_terminal(void) {
  if (!bar.terminal) bar.terminal = isatty(STDERR_FILENO) ? 1 : -1;
  return bar.terminal > 0;
}

/* Training and calibration count other things, or nothing. */
static int counts_rows(const char *stage, uint64_t total) {
  return total > 1 && strncmp(stage, "train", 5) && strncmp(stage, "open", 4) && strncmp(stage, "calibrate", 9);
}

static double seconds_left(uint64_t done, uint64_t total, double rate) {
  return rate > 0 ? (double)(total > done ? total - done : 0) / rate : 0;
}

static void line(const char *stage, uint64_t done, uint64_t total, double elapsed) {
  double rate = elapsed > 0 ? (double)done / elapsed : 0;
  fputs("{\"stage\":", stderr);
  json_put_text(stderr, stage);
  fprintf(stderr, ",\"done\":%llu,\"total\":%llu", (unsigned long long)done, (unsigned long long)total);
  if (counts_rows(stage, total)) {
    fprintf(stderr, ",\"rows_per_second\":%.0f", rate);
    if (bar.row_bytes) fprintf(stderr, ",\"mb_per_second\":%.1f", rate * (double)bar.row_bytes / 1e6);
  }
  if (rate > 0) fprintf(stderr, ",\"seconds_left\":%.0f", seconds_left(done, total, rate));
  fputs("}\n", stderr);
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
    unsigned long left = (unsigned long)(seconds_left(done, total, rate) + 0.5);
    int rows = unit && !strcmp(unit, "rows");
    if (!unit) fprintf(stderr, "  %.1f MB/s,", rate / 1e6);
    else if (!rows || counts_rows(stage, total)) fprintf(stderr, "  %.*f %s/s,", rate < 10, rate, unit);
    if (rows && bar.row_bytes && counts_rows(stage, total)) fprintf(stderr, " %.1f MB/s,", rate * (double)bar.row_bytes / 1e6);
    fprintf(stderr, " %lu:%02lu left", left / 60, left % 60);
  }
  fputs("\033[K", stderr);
  fflush(stderr);
}

/* unit NULL: bytes */
static void show(const char *stage, uint64_t done, uint64_t total, const char *unit) {
  if (!bar.json && !on_terminal()) return;
  double now = tool_seconds();
  if (strcmp(stage, bar.stage)) {
    snprintf(bar.stage, sizeof bar.stage, "%s", stage);
    bar.started = now, bar.drawn = 0;
  }
  if (bar.drawn && now - bar.drawn < (bar.json ? LINE_S : REDRAW_S) && done < total) return;
  bar.drawn = now;
  if (bar.json) {
    line(stage, done, total, now - bar.started);
    return;
  }
  bar.shown = 1;
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

void progress_json(int on) { bar.json = on; }
void progress_plan(uint64_t n_rows, uint64_t row_bytes) { bar.row_bytes = n_rows ? row_bytes : 0; }

void progress_say(const char *fmt, ...) {
  char *text = NULL;
  va_list args;
  if (!bar.json && !on_terminal()) return;
  va_start(args, fmt);
  int n = vasprintf(&text, fmt, args);
  va_end(args);
  if (n < 0) return;
  if (!bar.json) tool_note("%s", text);
  else fputs("{\"plan\":", stderr), json_put_text(stderr, text), fputs("}\n", stderr);
  free(text);
}

void progress_clear(void) {
  if (bar.shown) fputs("\r\033[K", stderr);
  bar.shown = 0, bar.drawn = 0;
}
