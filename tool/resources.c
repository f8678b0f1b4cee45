/* resources.c - see resources.h. */
#include "resources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tool.h"

/* The number in a limit file; UINT64_MAX when there is none ("max", or no such file). */
static uint64_t read_limit(const char *path) {
  unsigned long long n;
  FILE *f = fopen(path, "re");
  int ok = f && fscanf(f, "%llu", &n) == 1;
  if (f) fclose(f);
  return ok ? n : UINT64_MAX;
}

/* The least memory.max between our cgroup and the root: any of them can be the one that kills. */
static uint64_t cgroup_limit(void) {
  char line[1024], group[1024] = "/";
  uint64_t least = read_limit("/sys/fs/cgroup/memory/memory.limit_in_bytes"); /* version 1 */
  FILE *f = fopen("/proc/self/cgroup", "re");
  while (f && fgets(line, sizeof line, f))
    if (!strncmp(line, "0::", 3)) line[strcspn(line, "\n")] = 0, snprintf(group, sizeof group, "%s", line + 3);
  if (f) fclose(f);
  for (;;) {
    char *path = tool_format("/sys/fs/cgroup%s/memory.max", group);
    uint64_t n = read_limit(path);
    free(path);
    if (n < least) least = n;
    char *slash = strrchr(group, '/');
    if (!slash) break;
    *slash = 0;
  }
  return least;
}

uint64_t resources_default_memory(void) {
  uint64_t all = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE), limit = cgroup_limit();
  uint64_t quarter = (limit < all ? limit : all) / 4, low = (uint64_t)256 << 20, high = (uint64_t)8 << 30;
  return quarter < low ? low : quarter > high ? high : quarter;
}

uint64_t resources_peak_bytes(void) {
  struct rusage u;
  return getrusage(RUSAGE_SELF, &u) ? 0 : (uint64_t)u.ru_maxrss * 1024;
}
