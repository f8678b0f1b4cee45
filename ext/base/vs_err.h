/* vs_err.h - result codes and error text of the lower folders (they know nothing of SQLite).
 *
 * Everything that can fail returns a vs_rc; VS_OK is 0. Text goes into a caller's vs_err, which may be NULL. The first
 * error wins: a later vs_fail on the same vs_err keeps the earlier text, because the first cause is what the user needs.
 */
#ifndef VS_ERR_H
#define VS_ERR_H
#include <stdarg.h>

typedef enum vs_rc {
  VS_OK = 0,
  VS_NOMEM,        /* an allocation failed */
  VS_IO,           /* the operating system or the store refused; the text names the object */
  VS_CORRUPT,      /* bytes that cannot be right */
  VS_INVALID,      /* the caller's argument or input; the text says what would be right */
  VS_NOTFOUND,     /* no such shard, file or row */
  VS_EXISTS,       /* an exclusive creation met an existing object */
  VS_INTERRUPT,    /* the caller asked to stop */
  VS_UNSUPPORTED   /* a format version or feature this build does not know */
} vs_rc;

#define VS_WARN_UNUSED __attribute__((warn_unused_result))

typedef struct vs_err {
  vs_rc rc;
  char text[1000]; /* UTF-8, NUL terminated, "" when rc is VS_OK */
} vs_err;

/* Records rc with a printf text and returns rc, so that `return vs_fail(err, VS_IO, "...")` reads well. */
vs_rc vs_fail(vs_err *err, vs_rc rc, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* The one way to report damaged data: a breakpoint here finds the first sign of damage. */
vs_rc vs_corrupt(vs_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
vs_rc vs_nomem(vs_err *err);
/* Makes err say nothing, also one that was never set: cheaper than {0}, which clears a kilobyte. */
static inline void vs_err_reset(vs_err *err) {
  if (err) err->rc = VS_OK, err->text[0] = 0;
}

#endif
