/* s3_xml.h - the few XML answers of S3, read with expat. What a server sends is hostile: no document type (and so no entities),
 * bounded depth and text. */
#ifndef S3_XML_H
#define S3_XML_H
#include <stddef.h>
#include <stdint.h>

#include "../base/vs_err.h"

typedef struct s3_xml_error { char code[64], message[400], region[64]; } s3_xml_error;
/* Empty texts where the body is no S3 error: a HEAD has none, a proxy sends HTML. */
void s3_xml_read_error(const char *body, size_t n, s3_xml_error *out);

/* Calls fn at the end of each element, with the names of its parent and itself and its own text (UTF-8, trimmed by nobody).
 * VS_CORRUPT for what is no XML; fn's failure ends the walk and is returned. */
typedef vs_rc (*s3_xml_fn)(void *ctx, const char *parent, const char *name, const char *text, vs_err *err);
vs_rc s3_xml_walk(const uint8_t *body, size_t n, s3_xml_fn fn, void *ctx, vs_err *err) VS_WARN_UNUSED;

int64_t s3_xml_time(const char *text); /* "2026-01-31T23:59:59.000Z" in seconds since 1970; -1 for another form */

#endif
