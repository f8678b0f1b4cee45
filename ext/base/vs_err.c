/* vs_err.c - see vs_err.h. */
#include "vs_err.h"

#include <stdio.h>

static void record(vs_err *err, vs_rc rc, const char *fmt, va_list ap) {
  if (!err || err->rc != VS_OK) return;
  err->rc = rc;
  vsnprintf(err->text, sizeof err->text, fmt, ap);
}

vs_rc vs_fail(vs_err *err, vs_rc rc, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  record(err, rc, fmt, ap);
  va_end(ap);
  return rc;
}

vs_rc vs_corrupt(vs_err *err, const char *fmt, ...) {
  va_list ap;
  va_start(ap, fmt);
  record(err, VS_CORRUPT, fmt, ap);
  va_end(ap);
  return VS_CORRUPT;
}

vs_rc vs_nomem(vs_err *err) { return vs_fail(err, VS_NOMEM, "out of memory"); }
