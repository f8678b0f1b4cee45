/* source.h - the folders of shards behind a source, without opening any: for commands that go on when one is damaged.
 */
#ifndef SOURCE_H
#define SOURCE_H
#include "tool.h"

/* A shard: itself. A database: its shards, in ascending order. A JSON list: its elements' shards, in order. VS_NOTFOUND
 * with advice when there is none. */
vs_rc source_expand(const char *source, tool_list *folders, vs_err *err) VS_WARN_UNUSED;
const char *source_metric(int metric); /* "l2", "cosine", "dot" */

#endif
