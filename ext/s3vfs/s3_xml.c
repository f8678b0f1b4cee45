/* s3_xml.c - see s3_xml.h. */
#include "s3_xml.h"

#include <expat.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_DEPTH = 16, MAX_NAME = 64, MAX_TEXT = 8192 }; /* a key has up to 1,024 bytes, tripled when it is URL-encoded */

typedef struct walk {
  XML_Parser parser;
  s3_xml_fn fn;
  void *ctx;
  vs_err *err;
  vs_rc rc;
  int depth;
  char names[MAX_DEPTH][MAX_NAME];
  char text[MAX_TEXT + 1];
  size_t n;
} walk;

static void give_up(walk *w, vs_rc rc) {
  if (!w->rc) w->rc = rc;
  XML_StopParser(w->parser, XML_FALSE);
}

static void on_start(void *ctx, const XML_Char *name, const XML_Char **attributes) {
  walk *w = ctx;
  (void)attributes;
  if (w->depth >= MAX_DEPTH || strlen(name) >= MAX_NAME) {
    give_up(w, VS_CORRUPT);
    return;
  }
  strcpy(w->names[w->depth++], name);
  w->n = 0;
}

static void on_text(void *ctx, const XML_Char *p, int n) {
  walk *w = ctx;
  if ((size_t)n > MAX_TEXT - w->n) give_up(w, VS_CORRUPT);
  else memcpy(w->text + w->n, p, (size_t)n), w->n += (size_t)n;
}

static void on_end(void *ctx, const XML_Char *name) {
  walk *w = ctx;
  w->text[w->n] = 0;
  vs_rc rc = w->fn(w->ctx, w->depth > 1 ? w->names[w->depth - 2] : "", name, w->text, w->err);
  w->depth--, w->n = 0;
  if (rc) give_up(w, rc);
}

static void on_doctype(void *ctx, const XML_Char *name, const XML_Char *sysid, const XML_Char *pubid, int internal) {
  (void)name, (void)sysid, (void)pubid, (void)internal;
  give_up(ctx, VS_CORRUPT);
}

vs_rc s3_xml_walk(const uint8_t *body, size_t n, s3_xml_fn fn, void *ctx, vs_err *err) {
  walk *w = calloc(1, sizeof *w);
  XML_Parser parser = w ? XML_ParserCreate("UTF-8") : NULL;
  if (!parser || n > INT32_MAX) {
    if (parser) XML_ParserFree(parser);
    free(w);
    return vs_nomem(err);
  }
  w->parser = parser, w->fn = fn, w->ctx = ctx, w->err = err;
  XML_SetUserData(parser, w);
  XML_SetElementHandler(parser, on_start, on_end);
  XML_SetCharacterDataHandler(parser, on_text);
  XML_SetStartDoctypeDeclHandler(parser, on_doctype);
  int ok = XML_Parse(parser, (const char *)body, (int)n, 1) == XML_STATUS_OK;
  vs_rc rc = w->rc ? w->rc : ok ? VS_OK : XML_GetErrorCode(parser) == XML_ERROR_NO_MEMORY ? VS_NOMEM : VS_CORRUPT;
  XML_ParserFree(parser);
  free(w);
  if (rc == VS_NOMEM) return vs_nomem(err);
  return rc == VS_CORRUPT ? vs_corrupt(err, "an answer that is not the XML of S3") : rc;
}

static vs_rc error_element(void *ctx, const char *parent, const char *name, const char *text, vs_err *err) {
  s3_xml_error *x = ctx;
  (void)err;
  if (strcmp(parent, "Error")) return VS_OK;
  if (!strcmp(name, "Code")) snprintf(x->code, sizeof x->code, "%s", text);
  else if (!strcmp(name, "Message")) snprintf(x->message, sizeof x->message, "%s", text);
  else if (!strcmp(name, "Region")) snprintf(x->region, sizeof x->region, "%s", text);
  return VS_OK;
}

void s3_xml_read_error(const char *body, size_t n, s3_xml_error *out) {
  vs_err ignored = {0};
  memset(out, 0, sizeof *out);
  if (n && s3_xml_walk((const uint8_t *)body, n, error_element, out, &ignored)) memset(out, 0, sizeof *out);
}

int64_t s3_xml_time(const char *text) {
  struct tm t = {0};
  int end = 0;
  if (sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d%n", &t.tm_year, &t.tm_mon, &t.tm_mday, &t.tm_hour, &t.tm_min, &t.tm_sec, &end) != 6 || !end)
    return -1;
  t.tm_year -= 1900, t.tm_mon -= 1;
  return (int64_t)timegm(&t);
}
