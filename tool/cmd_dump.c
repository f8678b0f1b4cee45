/* cmd_dump.c - prints a segment file in the words of ivfpq_format.h: header, sections, parameters, columns, groups,
 * partitions, and row records when asked. What cannot be read is said, and the next segment follows.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../ext/ivfpq/ivfpq_segment.h"
#include "../ext/s3vfs/io_local.h"
#include "../ext/shard/shard_files.h"
#include "options.h"
#include "source.h"

enum { VECTOR_SHOWN = 4 };

typedef struct dump_options { int64_t rows; } dump_options;

static const option_row rows[] = {
    {"--rows", OPTION_COUNT, "N", 0, UINT32_MAX, "0", 0, offsetof(dump_options, rows),
     "row records to print per segment"},
};
static const option_command command = {
  "dump", "SOURCE", "Prints the structure of the segments of a shard or a database, or of one .ivf file.",
  "  vecshard dump db/bucket1 --rows 5", 1, 1, rows, sizeof rows / sizeof *rows};

static const char *section_name(uint32_t id) {
  static const char *const names[IVFPQ_N_SECTIONS] = {
    [IVFPQ_SCAN] = "SCAN", [IVFPQ_ROWS] = "ROWS", [IVFPQ_IDHEAP] = "IDHEAP", [IVFPQ_COLUMNS] = "COLUMNS",
    [IVFPQ_IDDIR] = "IDDIR", [IVFPQ_GROUPS] = "GROUPS", [IVFPQ_MEAN] = "MEAN", [IVFPQ_CODEBOOK] = "CODEBOOK",
    [IVFPQ_PARAMS] = "PARAMS"};
  return id < IVFPQ_N_SECTIONS && names[id] ? names[id] : "?";
}

static vs_rc print_header(const ivfpq_segment *s, vs_err *err) {
  vs_range r = {.off = 0, .len = IVFPQ_HEADER};
  uint32_t format;
  vs_rc rc = vs_io_fetch(s->io, &r, 1, err);
  if (rc) return rc;
  memcpy(&format, r.ptr + 8, 4);
  printf("header   magic \"%.7s\", format %u\nfile     %llu bytes, footer check %016llx\n", (const char *)r.ptr, format,
         (unsigned long long)s->io->size, (unsigned long long)s->footer_check);
  vs_io_release(s->io, &r, 1);
  return VS_OK;
}

static void print_sections(const ivfpq_segment *s) {
  for (uint32_t i = 1; i < IVFPQ_N_SECTIONS; i++) {
    const ivfpq_section *x = &s->section[i];
    if (x->id)
      printf("section  %-8s id %u, flags %u, off %llu, size %llu, check %016llx\n", section_name(x->id), x->id,
             x->flags, (unsigned long long)x->off, (unsigned long long)x->size, (unsigned long long)x->check);
  }
}

static void print_params(const ivfpq_segment *s) {
  const ivfpq_params *p = &s->params;
  printf(
      "params   n_rows %llu, dim %u, dim_padded %u, metric %s, store %s, nlist %u, n_groups %u, bits %u, m %u, "
      "sub_dim %u\n",
      (unsigned long long)p->n_rows, p->dim, p->dim_padded, source_metric((int)p->metric), p->store ? "f16" : "f32",
      p->nlist, p->n_groups, p->bits, p->m, p->sub_dim);
  printf(
      "params   id %s, id_width %u, row_bytes %u, n_columns %u, beta %.9g, term0 %.9g, term_step %.9g, "
      "iddir_levels %u, seed %llu, project %u, turn %u\n",
      p->id_text ? "text" : "integer", p->id_width, p->row_bytes, p->n_columns, (double)p->beta, (double)p->term0,
      (double)p->term_step, p->iddir_levels, (unsigned long long)p->seed, p->project, p->turn);
}

static void print_columns(const ivfpq_segment *s) {
  static const char *const types[] = {"?", "integer", "real", "text"};
  for (uint32_t c = 0; c < s->params.n_columns; c++)
    printf("column   %u: %s %s%s%s\n", c, s->columns[c].name, types[s->columns[c].type & 3],
           s->columns[c].flags & IVFPQ_FILTER ? ", filter" : "", s->columns[c].flags & IVFPQ_INDEX ? ", index" : "");
}

static void print_partitions(const ivfpq_group_view *v) {
  for (uint32_t i = 0; i < v->n; i++) {
    const ivfpq_partition *e = &v->entries[i];
    printf("partition %u: off %llu, row0 %llu, n_rows %u, column_bytes %u, check %016llx, column_check %016llx\n",
           v->first + i, (unsigned long long)e->off, (unsigned long long)e->row0, e->n_rows, e->column_bytes,
           (unsigned long long)e->check, (unsigned long long)e->column_check);
  }
}

static vs_rc print_groups(ivfpq_segment *s, vs_err *err) {
  vs_rc rc = VS_OK;
  for (uint32_t g = 0; g < s->params.n_groups && !rc && !tool_stop(NULL); g++) {
    ivfpq_group_view view;
    const ivfpq_group *at = &s->groups[g];
    printf("group    %u: off %llu, size %llu, first %u, n %u\n", g, (unsigned long long)at->off,
           (unsigned long long)at->size, at->first, at->n);
    if ((rc = ivfpq_groups_fetch(s, &g, 1, &view, err))) break;
    print_partitions(&view);
    ivfpq_groups_release(s, &view, 1);
  }
  return rc;
}

static vs_rc print_values(ivfpq_segment *s, const uint8_t *record, vs_err *err) {
  uint32_t n = s->params.n_columns;
  ivfpq_value *v = tool_alloc(n, sizeof *v);
  uint8_t *buf = NULL;
  vs_rc rc = ivfpq_row_columns(s, record, v, &buf, err);
  for (uint32_t c = 0; c < n && !rc; c++) {
    printf(", %s = ", s->columns[c].name);
    if (v[c].tag == IVFPQ_INTEGER) printf("%lld", (long long)v[c].i);
    else if (v[c].tag == IVFPQ_REAL) printf("%.17g", v[c].r);
    else if (v[c].tag == IVFPQ_TEXT) printf("'%.*s'", (int)v[c].len, v[c].text);
    else printf("NULL");
  }
  free(buf), free(v);
  return rc;
}

static vs_rc print_row(ivfpq_segment *s, uint32_t number, float *buf, vs_err *err) {
  ivfpq_row row;
  ivfpq_id id = {0};
  vs_rc rc = ivfpq_rows_fetch(s, &number, 1, &row, err);
  if (rc) return rc;
  if (!(rc = ivfpq_row_id(s, row.record, &id, err))) {
    const float *x = ivfpq_row_vector(s, row.record, buf);
    printf("row      %u: id ", number);
    if (id.is_text) printf("'%.*s'", (int)id.len, id.text);
    else printf("%lld", (long long)id.i);
    printf(", vector [");
    for (uint32_t i = 0; i < s->params.dim && i < VECTOR_SHOWN; i++) printf("%s%.9g", i ? ", " : "", (double)x[i]);
    printf("%s]", s->params.dim > VECTOR_SHOWN ? ", ..." : "");
    if (s->params.n_columns) rc = print_values(s, row.record, err);
    putchar('\n');
  }
  ivfpq_id_free(&id);
  ivfpq_rows_release(s, &row, 1);
  return rc;
}

static vs_rc print_rows(ivfpq_segment *s, uint64_t n, vs_err *err) {
  float *buf = tool_alloc(s->params.dim, sizeof *buf);
  vs_rc rc = VS_OK;
  if (n > s->params.n_rows) n = s->params.n_rows;
  for (uint64_t r = 0; r < n && !rc && !tool_stop(NULL); r++) rc = print_row(s, (uint32_t)r, buf, err);
  free(buf);
  return rc;
}

/* Takes the io. */
static vs_rc dump_io(vs_io *io, const dump_options *o, vs_err *err) {
  ivfpq_segment *s = NULL;
  vs_rc rc = ivfpq_segment_open(io, &s, err);
  if (!rc) rc = print_header(s, err);
  if (!rc) {
    print_sections(s);
    print_params(s);
    print_columns(s);
    rc = print_groups(s, err);
  }
  if (!rc) rc = print_rows(s, (uint64_t)o->rows, err);
  ivfpq_segment_close(s);
  return rc;
}

static tool_status dump_file(const char *path, const dump_options *o) {
  vs_io *io;
  vs_err err = {0};
  printf("segment  %s\n", path);
  vs_rc rc = io_local_open(path, -1, &io, &err);
  if (!rc) rc = dump_io(io, o, &err);
  return rc ? tool_report(&err) : TOOL_DONE;
}

static tool_status dump_segment(const shard_files *f, size_t i, const dump_options *o) {
  vs_io *io;
  vs_err err = {0};
  printf("segment  %s/%s\n", f->path, f->manifest.segments[i].file);
  vs_rc rc = shard_files_segment(f, i, &io, &err);
  if (!rc) rc = dump_io(io, o, &err);
  return rc ? tool_report(&err) : TOOL_DONE;
}

static tool_status dump_shard(const char *path, const dump_options *o) {
  shard_files f = {0};
  char *json = NULL;
  vs_err err = {0};
  vs_rc rc = shard_files_open(path, &f, &err);
  if (!rc) rc = shard_manifest_print(&f.manifest, &json, &err);
  if (!rc) printf("shard    %s\nmanifest %s\n", path, json);
  tool_status status = tool_report(&err);
  for (size_t i = 0; !rc && i < f.manifest.n_segments && !tool_stop(NULL); i++)
    if (dump_segment(&f, i, o)) status = TOOL_FAILED;
  free(json);
  shard_files_reset(&f);
  return status;
}

static tool_status dump_source(const char *source, const dump_options *o) {
  tool_list folders = {0};
  tool_status status = TOOL_DONE;
  struct stat st;
  vs_err err = {0};
  if (!stat(source, &st) && S_ISREG(st.st_mode)) return dump_file(source, o);
  if (source_expand(source, &folders, &err)) status = tool_report(&err);
  for (size_t i = 0; !err.rc && i < folders.n && !tool_stop(NULL); i++)
    if (dump_shard(folders.items[i], o)) status = TOOL_FAILED;
  tool_list_reset(&folders);
  return status;
}

int cmd_dump(int argc, char **argv) {
  dump_options o = {0};
  tool_list args = {0};
  int status = options_read(&command, argc, argv, &o, &args);
  if (status < 0) status = dump_source(args.items[0], &o);
  tool_list_reset(&args);
  return status;
}
