/* options.c - see options.h. Options may stand anywhere, as `--name value` or `--name=value`; `--` ends them. */
#include "options.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

int options_number(const char *text, int units, int64_t min, int64_t max, int64_t *out) {
  static const char letters[] = "KMGT";
  char *end;
  errno = 0;
  if (*text < '0' || *text > '9') return 0;
  unsigned long long n = strtoull(text, &end, 10);
  if (errno || n > INT64_MAX) return 0;
  if (units && *end) {
    const char *letter = strchr(letters, *end >= 'a' ? *end - 32 : *end);
    if (!letter) return 0;
    int shift = 10 * (int)(letter - letters + 1);
    if (n > (unsigned long long)INT64_MAX >> shift) return 0;
    n <<= shift, end++;
    if (*end == 'i') end++;
    if (*end == 'B') end++;
  }
  if (*end || (int64_t)n < min || (int64_t)n > max) return 0;
  *out = (int64_t)n;
  return 1;
}

tool_status options_wrong(const option_command *c, const char *fmt, ...) {
  char text[1000];
  va_list args;
  va_start(args, fmt);
  vsnprintf(text, sizeof text, fmt, args);
  va_end(args);
  tool_note("%s; see vecshard %s --help", text, c->name);
  return TOOL_USAGE;
}

/* ---- help ---- */

static void print_row(const option_row *r) {
  char left[80];
  snprintf(left, sizeof left, "%s%s%s", r->name, r->value ? " " : "", r->value ? r->value : "");
  if (strlen(left) > 28) printf("  %s\n%31s%s", left, "", r->help);
  else printf("  %-28s %s", left, r->help);
  if (r->fallback) printf(" (default %s)", r->fallback);
  if (r->required) printf(" (required)");
  putchar('\n');
}

static void print_help(const option_command *c) {
  printf("usage: vecshard %s %s\n\n%s\n\n", c->name, c->arguments, c->summary);
  for (size_t i = 0; i < c->n_rows; i++) print_row(&c->rows[i]);
  printf("  %-28s %s\n\nexample:\n%s\n", "--help", "this text", c->example);
}

/* ---- unknown options ---- */

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Edits from a to b (Levenshtein), one row of the table at a time; long words are never alike. */
static size_t distance(const char *a, const char *b) {
  size_t row[64], nb = strlen(b);
  if (nb >= 64 || strlen(a) >= 64) return 64;
  for (size_t j = 0; j <= nb; j++) row[j] = j;
  for (size_t i = 1; a[i - 1]; i++) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= nb; j++) {
      size_t above = row[j];
      row[j] = least(least(above, row[j - 1]) + 1, diagonal + (a[i - 1] != b[j - 1]));
      diagonal = above;
    }
  }
  return row[nb];
}

static option_result unknown(const option_command *c, const char *name) {
  const option_row *best = NULL;
  size_t nearest = 4; /* more edits than three are another word */
  for (size_t i = 0; i < c->n_rows; i++) {
    size_t d = distance(name, c->rows[i].name);
    if (d < nearest && d < strlen(name) - 1) nearest = d, best = &c->rows[i];
  }
  if (best) options_wrong(c, "there is no option %s; did you mean %s?", name, best->name);
  else options_wrong(c, "there is no option %s", name);
  return OPTIONS_WRONG;
}

/* ---- values ---- */

/* A number like 0.95, above 0 and up to 1. */
static int share_of(const char *text, double *out) {
  char *end;
  if ((*text < '0' || *text > '9') && *text != '.') return 0;
  *out = strtod(text, &end);
  return !*end && *out > 0 && *out <= 1;
}

/* The index of text among the words of "a|b|c", or -1. */
static int choice_of(const char *words, const char *text) {
  size_t len = strlen(text);
  for (int i = 0; *words; i++) {
    size_t n = strcspn(words, "|");
    if (n == len && !memcmp(words, text, n)) return i;
    words += n + (words[n] == '|');
  }
  return -1;
}

static option_result store(const option_command *c, const option_row *r, const char *text, void *values) {
  void *field = (char *)values + r->field;
  int choice;
  switch (r->type) {
  case OPTION_FLAG: *(int *)field = 1; return OPTIONS_GO;
  case OPTION_TEXT: *(const char **)field = text; return OPTIONS_GO;
  case OPTION_LIST: tool_list_add(field, text); return OPTIONS_GO;
  case OPTION_CHOICE:
    choice = choice_of(r->value, text);
    if (choice < 0) break;
    *(int *)field = choice;
    return OPTIONS_GO;
  case OPTION_SHARE:
    if (share_of(text, field)) return OPTIONS_GO;
    break;
  case OPTION_COUNT:
  case OPTION_SIZE:
    if (options_number(text, r->type == OPTION_SIZE, r->min, r->max, field)) return OPTIONS_GO;
    break;
  }
  if (r->type == OPTION_CHOICE) options_wrong(c, "%s is one of %s, not '%s'", r->name, r->value, text);
  else if (r->type == OPTION_SIZE) options_wrong(c, "%s is a size like 256M or 2G, at least %lldM, not '%s'", r->name,
                                                 (long long)(r->min >> 20), text);
  else if (r->type == OPTION_SHARE) options_wrong(c, "%s is a number above 0 and up to 1, not '%s'", r->name, text);
  else if (r->max == INT64_MAX)
    options_wrong(c, "%s is a whole number from %lld, not '%s'", r->name, (long long)r->min, text);
  else
    options_wrong(c, "%s is a whole number from %lld to %lld, not '%s'", r->name, (long long)r->min, (long long)r->max,
                  text);
  return OPTIONS_WRONG;
}

/* ---- parsing ---- */

static const option_row *find_row(const option_command *c, const char *arg, size_t len) {
  for (size_t i = 0; i < c->n_rows; i++)
    if (strlen(c->rows[i].name) == len && !memcmp(c->rows[i].name, arg, len)) return &c->rows[i];
  return NULL;
}

/* argv[*at] is an option; moves *at to the last word that belongs to it. */
static option_result parse_option(const option_command *c, int argc, char **argv, int *at, void *values,
                                  unsigned char *given) {
  const char *arg = argv[*at];
  size_t len = strcspn(arg, "=");
  const option_row *r = find_row(c, arg, len);
  const char *text = arg[len] ? arg + len + 1 : NULL;
  if (!r) return unknown(c, arg);
  if (r->type == OPTION_FLAG && text) return options_wrong(c, "%s takes no value", r->name), OPTIONS_WRONG;
  if (given[r - c->rows] && r->type != OPTION_LIST)
    return options_wrong(c, "%s is given twice", r->name), OPTIONS_WRONG;
  given[r - c->rows] = 1;
  if (r->type != OPTION_FLAG && !text) {
    if (*at + 1 >= argc) return options_wrong(c, "%s needs a value: %s", r->name, r->value), OPTIONS_WRONG;
    text = argv[++*at];
  }
  return store(c, r, text, values);
}

static option_result check_all(const option_command *c, const unsigned char *given, void *values, size_t n_args) {
  for (size_t i = 0; i < c->n_rows; i++) {
    const option_row *r = &c->rows[i];
    if (given[i]) continue;
    if (r->required) return options_wrong(c, "%s %s is missing", r->name, r->value), OPTIONS_WRONG;
    /* A fallback in words ("a quarter of the memory") is for the reader; only the others can be stored. */
    if (r->fallback && r->fallback[strcspn(r->fallback, " ")] == 0 && store(c, r, r->fallback, values))
      return OPTIONS_WRONG;
  }
  if (n_args < c->min_args) return options_wrong(c, "%s is missing", c->arguments), OPTIONS_WRONG;
  if (n_args > c->max_args) return options_wrong(c, "too many arguments"), OPTIONS_WRONG;
  return OPTIONS_GO;
}

option_result options_parse(const option_command *c, int argc, char **argv, void *values, tool_list *args) {
  unsigned char *given = tool_alloc(c->n_rows, 1);
  option_result result = OPTIONS_GO;
  int only_args = 0;
  for (int i = 0; i < argc; i++)
    if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
      print_help(c);
      free(given);
      return OPTIONS_HELP;
    }
  for (int i = 0; i < argc && result == OPTIONS_GO; i++) {
    if (!only_args && !strcmp(argv[i], "--")) only_args = 1;
    else if (only_args || argv[i][0] != '-' || !argv[i][1]) tool_list_add(args, argv[i]);
    else result = parse_option(c, argc, argv, &i, values, given);
  }
  if (result == OPTIONS_GO) result = check_all(c, given, values, args->n);
  free(given);
  return result;
}

int options_read(const option_command *c, int argc, char **argv, void *values, tool_list *args) {
  option_result r = options_parse(c, argc, argv, values, args);
  return r == OPTIONS_GO ? -1 : r == OPTIONS_HELP ? TOOL_DONE : TOOL_USAGE;
}
