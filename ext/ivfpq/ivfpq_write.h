/* ivfpq_write.h - writes a segment front to back: sections with their checks, and the hash of the whole. */
#ifndef IVFPQ_WRITE_H
#define IVFPQ_WRITE_H
#include "ivfpq_format.h"

typedef struct ivfpq_writer ivfpq_writer;
vs_rc ivfpq_writer_open(const char *path, ivfpq_writer **out, vs_err *err) VS_WARN_UNUSED; /* creates exclusively, writes the header */
vs_rc ivfpq_writer_begin(ivfpq_writer *w, ivfpq_section_id id, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_writer_put(ivfpq_writer *w, const void *p, size_t n, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_writer_pad(ivfpq_writer *w, size_t to, vs_err *err) VS_WARN_UNUSED; /* zeros up to a multiple, inside the section */
/* Bytes of a section that comes later, put in their place at once: at `off` of the file, beyond what was written so far. Adopt then
 * makes the n bytes at the current end, all of which must have been put ahead, a section of that id. */
vs_rc ivfpq_writer_ahead(ivfpq_writer *w, const void *p, size_t n, uint64_t off, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_writer_adopt(ivfpq_writer *w, ivfpq_section_id id, uint64_t n, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_writer_copy(ivfpq_writer *w, int fd, uint64_t n, vs_err *err) VS_WARN_UNUSED; /* the first n bytes of a file */
void ivfpq_writer_end(ivfpq_writer *w);
uint64_t ivfpq_writer_tell(const ivfpq_writer *w); /* bytes since begin */
uint64_t ivfpq_writer_start(const ivfpq_writer *w); /* where the open section began in the file */
/* A file that can be opened, to be looked at before its last sections are written: mark where they begin, write them, preview
 * (footer and trailer; nothing is synced), and go back to the mark. */
vs_rc ivfpq_writer_mark(ivfpq_writer *w, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_writer_preview(ivfpq_writer *w, vs_err *err) VS_WARN_UNUSED;
vs_rc ivfpq_writer_back(ivfpq_writer *w, vs_err *err) VS_WARN_UNUSED;
/* Footer, trailer, fsync, close. The hash and size of the file go out. Frees w, also on failure. */
vs_rc ivfpq_writer_finish(ivfpq_writer *w, char checksum[33], uint64_t *n_bytes, vs_err *err) VS_WARN_UNUSED;
void ivfpq_writer_abort(ivfpq_writer *w); /* removes the file; NULL is legal */

#endif
