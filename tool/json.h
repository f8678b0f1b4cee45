/* json.h - the JSON that the tool writes, and the little that it reads (through SQLite's own functions). */
#ifndef JSON_H
#define JSON_H
#include "tool.h"

void json_put(FILE *to, const char *text, size_t len); /* quoted and escaped */
void json_put_text(FILE *to, const char *text);

/* Appends the elements of the array at `path` ("$", "$.buckets[0].files"), which must all be texts. VS_NOTFOUND when
 * there is nothing at that path; `name` is for messages. */
vs_rc json_texts(const char *json, const char *path, const char *name, tool_list *out, vs_err *err) VS_WARN_UNUSED;
/* The number of elements of the array at `path`. */
vs_rc json_length(const char *json, const char *path, const char *name, uint64_t *n, vs_err *err) VS_WARN_UNUSED;

#endif
