/* vs_io.h - "read these bytes": the one interface through which index files are read.
 *
 * A vs_io is an open immutable object of known size. vs_io_fetch hands back pointers to the bytes of several ranges at once
 * (one round on a network store); vs_io_release gives them back. A mapped local file returns pointers into the map, a plain
 * file reads into fresh memory, a store returns cached extents: callers cannot tell. Every range is followed by at least
 * VS_IO_PAD readable bytes, so that a vector load on the last element stays inside the allocation.
 *
 * A fetch is vs_io_begin, which starts the reads and returns, and vs_io_wait. Beginning the reads of many objects before
 * waiting for the first of them makes one round of all. Where there is nothing to wait for (`local`), begin does the reading.
 *
 * Threads: every call may be made from any thread at the same time. close needs every fetch to be released.
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
  unsigned char *checked; /* out: a flag that lives as long as these bytes stay in memory, 0 at first: set it once their
                             checksum held, and skip the check when it is set. NULL: memory that is new each time. */
} vs_range;

typedef struct vs_io vs_io;
struct vs_io {
  uint64_t size; /* bytes of the whole object */
  int stable;    /* 1: pointers address the same memory each time (a map), so that a check made once holds */
  int local;     /* 1: begin reads; there is no waiting worth to be shared */
  const char *name; /* for messages: path or URI; never a secret; owned by the implementation */
  vs_rc (*begin)(vs_io *, vs_range *, size_t n, vs_err *);
  vs_rc (*wait)(vs_io *, vs_range *, size_t n, vs_err *); /* NULL where local */
  void (*release)(vs_io *, vs_range *, size_t n);
  void (*want)(vs_io *, uint64_t off, uint64_t len); /* of a stable io: bytes that are about to be looked at for the first time; reading
                                                       begins if they are not in memory. NULL: nothing to be gained. */
  void (*forget)(vs_io *); /* what was read may be damaged: read it anew next time. NULL: nothing is kept. */
  void (*close)(vs_io *);
};

/* Starts reading all ranges, or none on failure. A range outside the object is VS_CORRUPT: offsets come from files. ptr is set
 * by vs_io_wait; release is legal in between. */
static inline vs_rc vs_io_begin(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  for (size_t i = 0; i < n; i++) r[i].ptr = NULL, r[i].owner = NULL, r[i].checked = NULL;
  for (size_t i = 0; i < n; i++)
    if (r[i].off > io->size || r[i].len > io->size - r[i].off)
      return vs_corrupt(err, "%s: a range at %llu of %llu bytes lies outside the file of %llu bytes", io->name,
                        (unsigned long long)r[i].off, (unsigned long long)r[i].len, (unsigned long long)io->size);
  return io->begin(io, r, n, err);
}
/* Completes what was begun; on failure all of it is released (releasing it again is legal). */
static inline vs_rc vs_io_wait(vs_io *io, vs_range *r, size_t n, vs_err *err) { return io->wait ? io->wait(io, r, n, err) : VS_OK; }
static inline vs_rc vs_io_fetch(vs_io *io, vs_range *r, size_t n, vs_err *err) {
  vs_rc rc = vs_io_begin(io, r, n, err);
  return rc ? rc : vs_io_wait(io, r, n, err);
}
static inline void vs_io_release(vs_io *io, vs_range *r, size_t n) { io->release(io, r, n); }
static inline void vs_io_want(vs_io *io, uint64_t off, uint64_t len) {
  if (io->want) io->want(io, off, len);
}
static inline void vs_io_forget(vs_io *io) {
  if (io->forget) io->forget(io);
}
static inline void vs_io_close(vs_io *io) {
  if (io) io->close(io);
}

#endif
