/* source.c - see source.h. */
#include "source.h"

#include <stdlib.h>
#include <string.h>

#include "../ext/shard/shard_files.h"
#include "json.h"

static vs_rc expand_path(const char *path, tool_list *folders, vs_err *err) {
  char **paths;
  size_t n;
  vs_rc rc = shard_paths(path, &paths, &n, err);
  for (size_t i = 0; i < n; i++) tool_list_add(folders, paths[i]);
  shard_names_free(paths, n);
  return rc;
}

vs_rc source_expand(const char *source, tool_list *folders, vs_err *err) {
  tool_list paths = {0};
  vs_rc rc = VS_OK;
  if (source[0] == '[') rc = json_texts(source, "$", "the list of sources", &paths, err);
  else tool_list_add(&paths, source);
  for (size_t i = 0; i < paths.n && !rc; i++) rc = expand_path(paths.items[i], folders, err);
  if (!rc && !folders->n) rc = vs_fail(err, VS_NOTFOUND, "the list of sources is empty");
  tool_list_reset(&paths);
  return rc;
}

const char *source_metric(int metric) {
  return metric == SHARD_COSINE ? "cosine" : metric == SHARD_DOT ? "dot" : "l2";
}
