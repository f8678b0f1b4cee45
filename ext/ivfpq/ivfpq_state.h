/* ivfpq_state.h - what a build leaves in its working folder after each finished stage, so that a later one can go on from there.
 *
 * A state file appears whole or not at all (write, fsync, rename, fsync of the folder), names the build that it belongs to, and
 * ends with a check of all its bytes. It is read twice: first for that check, then for its values; so whoever reads values knows
 * that they are what was written, and still checks counts against what the build expects.
 *
 *   "VSBUILD" 0 | u64 hash of the build's key | values | u64, u64 XXH3-128 of all before
 */
#ifndef IVFPQ_STATE_H
#define IVFPQ_STATE_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

typedef struct ivfpq_state ivfpq_state;

/* Writing: puts remember the first failure, commit reports it. Commit and abort free. */
vs_rc ivfpq_state_create(const char *folder, const char *name, const char *key, ivfpq_state **out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_state_put(ivfpq_state *s, const void *p, size_t n);
vs_rc ivfpq_state_commit(ivfpq_state *s, vs_err *err) VS_WARN_UNUSED;
void ivfpq_state_abort(ivfpq_state *s); /* NULL is legal */

/* Reading: VS_NOTFOUND when there is no such file, VS_INVALID when it is of another build, VS_CORRUPT when it is damaged. A get
 * behind the end gives zeros; close tells (VS_CORRUPT, also when bytes are left). */
vs_rc ivfpq_state_open(const char *folder, const char *name, const char *key, ivfpq_state **out, vs_err *err) VS_WARN_UNUSED;
void ivfpq_state_get(ivfpq_state *s, void *p, size_t n);
uint64_t ivfpq_state_left(const ivfpq_state *s); /* bytes of values; 0 once a get failed: a limit for counts before they are used */
vs_rc ivfpq_state_close(ivfpq_state *s, vs_err *err) VS_WARN_UNUSED;

/* Adds the bytes of a whole file to *size and its XXH3-128 to hex. */
vs_rc ivfpq_file_check(const char *path, uint64_t *size, char hex[33], vs_err *err) VS_WARN_UNUSED;

#endif
