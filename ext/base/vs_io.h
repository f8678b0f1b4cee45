/* vs_io.h - "read these bytes": the one interface through which index files are read.
 *
 * A vs_io is an open immutable object of known size. vs_io_fetch hands back pointers to the bytes of several ranges at once
 * (one round on a network store); vs_io_release gives them back. A mapped local file returns pointers into the map, a plain
 * file reads into fresh memory, a store returns cached blocks: callers cannot tell. Every range is followed by at least
 * VS_IO_PAD readable bytes, so that a vector load on the last element stays inside the allocation.
 *
 * Threads: fetch and release may be called from any thread at the same time. close needs every fetch to be released.
 */
#ifndef VS_IO_H
#define VS_IO_H
#include <stddef.h>
#include <stdint.h>

#include "vs_err.h"

enum { VS_IO_PAD = 64 };

typedef struct vs_range {
  uint64_t off;
  uint64_t len;       /* bytes; 0 is legal and yields a non-NULL ptr */
  const uint8_t *ptr; /* out: the bytes, until release */
  void *owner;        /* out: private to the implementation */
} vs_range;

typedef struct vs_io vs_io;
struct vs_io {
  uint64_t size; /* bytes of the whole object */
  int stable;    /* 1: pointers address the same memory each time (a map), so that a check made once holds */
  const char *name; /* for messages: path or URI; never a secret; owned by the implementation */
  vs_rc (*fetch)(vs_io *, vs_range *, size_t n, vs_err *);
  void (*release)(vs_io *, vs_range *, size_t n);
  void (*close)(vs_io *);
};

/* Fetches all ranges or none. A range outside the object is VS_CORRUPT: offsets come from files. */
static inline vs_rc vs_io_fetch(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  for (size_t i = 0; i < n; i++) {
    r[i].ptr = NULL, r[i].owner = NULL;
    if (r[i].off > io->size || r[i].len > io->size - r[i].off)
      return vs_corrupt(err, "%s: a range at %llu of %llu bytes lies outside the file of %llu bytes", io->name,
                        (unsigned long long)r[i].off, (unsigned long long)r[i].len, (unsigned long long)io->size);
  }
  return io->fetch(io, r, n, err);
}
static inline void vs_io_release(vs_io *io, vs_range *r, size_t n) { io->release(io, r, n); }
static inline void vs_io_close(vs_io *io) {
  if (io) io->close(io);
}

#endif
