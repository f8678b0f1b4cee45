/* modules.h - the virtual table modules, each registered by one call. The conn gains an owner per registration. */
#ifndef VTAB_MODULES_H
#define VTAB_MODULES_H
#include "conn.h"

int vecshard_table_register(conn *c); /* vecshard */
int union_table_register(conn *c);    /* shard_union */
int s3_functions_register(conn *c);   /* s3_head, s3_get, s3_list */
int info_tables_register(conn *c);    /* shard_list, shard_info, shard_partitions, shard_verify, shard_trace */
int recall_table_register(conn *c);   /* shard_recall */

/* The metadata values of a cursor's row, decoded once for however many columns are asked for. */
typedef struct row_values {
  ivfpq_value *values;
  uint8_t *buf;
  int valid; /* cleared by the cursor when it moves on */
} row_values;
void row_values_reset(row_values *v); /* legal on a zeroed struct */

/* Shared by the tables: a row's id and vector as column results. */
int result_id(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, vs_err *err);
int result_vector(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record);
/* Appends text as a JSON string. */
void result_json_text(sqlite3_str *s, const char *text, uint32_t n);
/* Metadata column c of a row. */
int result_column(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, uint32_t c, row_values *kept, vs_err *err);

#endif
