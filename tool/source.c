/* source.c - see source.h. */
#include "source.h"

#include <stdlib.h>
#include <string.h>

#include "../ext/shard/shard_manifest.h"
#include "json.h"

static vs_rc expand_path(const char *path, tool_list *folders, vs_err *err) {
  char **names;
  size_t n, len = strlen(path);
  while (len > 1 && path[len - 1] == '/') len--;
  char *folder = tool_format("%.*s", (int)len, path);
  vs_rc rc = VS_OK;
  if (shard_dir_is_shard(folder)) tool_list_add(folders, folder);
  else if (!(rc = shard_dir_list(folder, &names, &n, err))) {
    if (!n) rc = vs_fail(err, VS_NOTFOUND, "%s: is no shard and holds none; vecshard build makes one", folder);
    for (size_t i = 0; i < n; i++) {
      char *child = tool_format("%s/%s", folder, names[i]);
      tool_list_add(folders, child);
      free(child);
    }
    shard_names_free(names, n);
  }
  free(folder);
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
