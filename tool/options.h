/* options.h - arguments of a command, from a table: one row per option.
 *
 * A value is stored in a field of the command's own struct, by type:
 *   OPTION_FLAG int (1 when given)   OPTION_COUNT, OPTION_SIZE int64_t   OPTION_TEXT const char *
 *   OPTION_CHOICE int (index)        OPTION_LIST tool_list, repeatable    OPTION_SHARE double, above 0 up to 1
 * An option that is not given takes its fallback; without one the field stays as the caller set it.
 */
#ifndef OPTIONS_H
#define OPTIONS_H
#include "tool.h"

typedef enum option_type {
  OPTION_FLAG, OPTION_COUNT, OPTION_SIZE, OPTION_TEXT, OPTION_CHOICE, OPTION_LIST, OPTION_SHARE
} option_type;

typedef struct option_row {
  const char *name;     /* with its dashes */
  option_type type;
  const char *value;    /* "N", "FILE"; the words of a choice: "l2|cosine|dot" */
  int64_t min, max;     /* OPTION_COUNT, OPTION_SIZE */
  const char *fallback; /* NULL: none */
  int required;
  size_t field;         /* offsetof */
  const char *help;
} option_row;

typedef struct option_command {
  const char *name, *arguments, *summary, *example;
  size_t min_args, max_args;
  const option_row *rows;
  size_t n_rows;
} option_command;

/* Everything that a shape of files has in common goes into each table that needs it by these rows. */
#define OPTION_JSON(type) \
  { "--json", OPTION_FLAG, NULL, 0, 0, NULL, 0, offsetof(type, json), "the result as one JSON object" }
#define OPTION_EMBEDDING(type)                                                                    \
  {                                                                                               \
    "--embedding-dataset", OPTION_TEXT, "PATH", 0, 0, NULL, 0, offsetof(type, embedding_dataset), \
        "HDF5: the dataset with the vectors (found by the usual names)"                           \
  }
#define OPTION_ID(type) {"--id-dataset", OPTION_TEXT, "PATH", 0, 0, NULL, 0, offsetof(type, id_dataset), \
  "HDF5: the dataset with the ids; none: row numbers"}

typedef enum option_result { OPTIONS_GO, OPTIONS_HELP, OPTIONS_WRONG } option_result;
/* Fills the struct at `values` and the arguments that are no options. OPTIONS_HELP: --help was printed, leave with 0.
 * OPTIONS_WRONG: the reason was printed, leave with 2. */
option_result options_parse(const option_command *c, int argc, char **argv, void *values, tool_list *args);
/* The same, as the exit status to leave with; -1: go on. */
int options_read(const option_command *c, int argc, char **argv, void *values, tool_list *args);
/* A plain number in [min, max]: 1, else 0. With `units`, K, M, G or T (powers of 1,024) may follow. */
int options_number(const char *text, int units, int64_t min, int64_t max, int64_t *out);
/* "wrong usage" found by the command itself: prints the text with a pointer to --help, returns TOOL_USAGE. */
tool_status options_wrong(const option_command *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
