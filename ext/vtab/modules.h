/* modules.h - the virtual table modules, each registered by one call. The conn gains an owner per registration. */
#ifndef VTAB_MODULES_H
#define VTAB_MODULES_H
#include "conn.h"

int vecshard_table_register(conn *c); /* vecshard */
int union_table_register(conn *c);    /* shard_union */
int s3_functions_register(conn *c);   /* s3_head, s3_get, s3_list */
int info_tables_register(conn *c);    /* shard_list, shard_info, shard_partitions, shard_verify */

/* Shared by the tables: a row's id and vector as column results. */
int result_id(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, vs_err *err);
int result_vector(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record);
/* Appends text as a JSON string. */
void result_json_text(sqlite3_str *s, const char *text, uint32_t n);
/* Metadata column c of a row. */
int result_column(sqlite3_context *ctx, ivfpq_segment *s, const uint8_t *record, uint32_t c, vs_err *err);

#endif
