/* input_floats.c - numbers as files hold them to floats, and which rows no index can take.
 *
 * Numbers are converted in blocks of a constant length, each read whole before it is written: so the compiler vectorises the
 * loops at -O2, and the output may lie on the input wherever a walk from front to back never writes what it has yet to read.
 */
#include <math.h>
#include <string.h>

#include "input_int.h"

enum { BLOCK = 64, SMALL = 8 };
#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t is_special(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

/* n numbers of each kind, n a constant of the caller's and at most BLOCK. All return non-zero for NaN or Inf. */

INLINE uint32_t singles(const uint32_t *in, uint32_t *out, int n) {
  uint32_t bad = 0;
  for (int i = 0; i < n; i++) bad |= is_special(in[i]), out[i] = in[i];
  return bad;
}

INLINE uint32_t swapped_singles(const uint32_t *in, uint32_t *out, int n) {
  uint32_t bad = 0;
  for (int i = 0; i < n; i++) {
    uint32_t v = in[i];
    v = v << 24 | (v & 0xff00) << 8 | (v >> 8 & 0xff00) | v >> 24;
    bad |= is_special(v);
    out[i] = v;
  }
  return bad;
}

/* A normal half: exponent and fraction move to a float's place, the bias grows by 112. A subnormal one gets an implicit
 * one by the same move, which is then subtracted: no denormal arithmetic, which hosts that set FTZ/DAZ would lose. */
INLINE uint32_t halves(const uint16_t *in, uint32_t *out, int n) {
  uint32_t bad = 0;
  for (int i = 0; i < n; i++) {
    uint32_t h = in[i], mag = (h & 0x7fff) << 13, bits = mag + (113u << 23), small;
    float f;
    memcpy(&f, &bits, 4);
    f -= 0x1p-14f;
    memcpy(&small, &f, 4);
    bits = (h & 0x7c00) == 0 ? small : (h & 0x7c00) == 0x7c00 ? mag | 0x7f800000u : mag + (112u << 23);
    bad |= is_special(bits);
    out[i] = bits | (h & 0x8000) << 16;
  }
  return bad;
}

/* *over: a finite double became Inf. */
INLINE uint32_t doubles(const uint64_t *in, uint32_t *out, int n, uint32_t *over) {
  uint32_t bad = 0, inf = 0;
  for (int i = 0; i < n; i++) {
    double d;
    float f;
    uint32_t bits;
    memcpy(&d, &in[i], 8);
    f = (float)d;
    memcpy(&bits, &f, 4);
    bad |= (in[i] >> 52 & 0x7ff) == 0x7ff;
    inf |= is_special(bits);
    out[i] = bits;
  }
  *over |= inf;
  return bad;
}

INLINE void swap_halves(uint16_t *v, int n) {
  for (int i = 0; i < n; i++) v[i] = (uint16_t)(v[i] << 8 | v[i] >> 8);
}
INLINE void swap_doubles(uint64_t *v, int n) {
  for (int i = 0; i < n; i++) v[i] = __builtin_bswap64(v[i]);
}

INLINE uint32_t convert(input_num kind, const char *in, float *out, int n, uint32_t *over) {
  uint32_t to[BLOCK], bad = 0;
  union {
    uint16_t half[BLOCK];
    uint32_t single[BLOCK];
    uint64_t wide[BLOCK];
  } from;
  switch (kind) {
  case INPUT_F16:
  case INPUT_F16_BE:
    memcpy(from.half, in, (size_t)n * 2);
    if (kind == INPUT_F16_BE) swap_halves(from.half, n);
    bad = halves(from.half, to, n);
    break;
  case INPUT_F32:
    memcpy(from.single, in, (size_t)n * 4);
    bad = singles(from.single, to, n);
    break;
  case INPUT_F32_BE:
    memcpy(from.single, in, (size_t)n * 4);
    bad = swapped_singles(from.single, to, n);
    break;
  case INPUT_F64:
  case INPUT_F64_BE:
  default:
    memcpy(from.wide, in, (size_t)n * 8);
    if (kind == INPUT_F64_BE) swap_doubles(from.wide, n);
    bad = doubles(from.wide, to, n, over);
    break;
  }
  memcpy(out, to, (size_t)n * 4);
  return bad;
}

size_t input_num_bytes(input_num kind) { return kind < INPUT_F32 ? 2 : kind < INPUT_F64 ? 4 : 8; }

unsigned input_to_floats(input_num kind, const void *in, float *out, size_t n) {
  size_t width = input_num_bytes(kind), at = 0;
  uint32_t bad = 0, over = 0;
  for (; n - at >= BLOCK; at += BLOCK) bad |= convert(kind, (const char *)in + at * width, out + at, BLOCK, &over);
  for (; n - at >= SMALL; at += SMALL) bad |= convert(kind, (const char *)in + at * width, out + at, SMALL, &over);
  for (; at < n; at++) bad |= convert(kind, (const char *)in + at * width, out + at, 1, &over);
  return (bad ? INPUT_HAS_NAN : 0) | (over ? INPUT_HAS_OVERFLOW : 0);
}

unsigned input_check_floats(const float *row, size_t n) {
  uint32_t bad = 0;
  size_t at = 0;
  for (; n - at >= BLOCK; at += BLOCK) {
    uint32_t bits[BLOCK];
    memcpy(bits, row + at, sizeof bits);
    for (int i = 0; i < BLOCK; i++) bad |= is_special(bits[i]);
  }
  for (; at < n; at++) {
    uint32_t bits;
    memcpy(&bits, row + at, 4);
    bad |= is_special(bits);
  }
  return bad ? INPUT_HAS_NAN : 0;
}

void input_judge_rows(float *rows, uint32_t dim, uint8_t *flags, size_t n) {
  for (size_t i = 0; i < n; i++) {
    unsigned f = flags[i];
    if (!f) continue;
    flags[i] = f & INPUT_HAS_HOLE ? INPUT_HOLE : f & INPUT_HAS_NAN ? INPUT_NAN : INPUT_OVERFLOW;
    memset(rows + i * dim, 0, (size_t)dim * 4);
  }
}
