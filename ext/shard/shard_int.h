/* shard_int.h - what only ext/shard needs. */
#ifndef SHARD_INT_H
#define SHARD_INT_H
#include "shard.h"

/* Takes a folder's stamp; 0 when it cannot be read. */
int shard_stamp_take(const char *path, shard_stamp *out);
/* 1 when nothing in the folder can have been added or removed since the stamp was taken. */
int shard_stamp_holds(const char *path, const shard_stamp *then);

#endif
