/* resources.h - how much of this machine the tool may take, and has taken. */
#ifndef RESOURCES_H
#define RESOURCES_H
#include <stdint.h>

/* A quarter of the memory of the machine or of the cgroup, at least 256 MiB, at most 8 GiB. */
uint64_t resources_default_memory(void);
uint64_t resources_peak_bytes(void); /* largest resident set of this process so far */

#endif
