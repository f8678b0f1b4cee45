/* io_local.h - local files behind vs_io: mapped by default, read with pread when VECSHARD_MMAP=0 or the map fails. */
#ifndef IO_LOCAL_H
#define IO_LOCAL_H
#include "../base/vs_io.h"

/* Opens a regular file read-only (O_CLOEXEC). use_mmap: 1 or 0; -1 asks the environment. */
vs_rc io_local_open(const char *path, int use_mmap, vs_io **out, vs_err *err) VS_WARN_UNUSED;

#endif
