/* input_floats.c - numbers as files hold them to floats, and which rows no index can take.
 *
 * All loops run over blocks of a constant length and copy a block before they write it: so the compiler vectorises them at -O2,
 * and the output may lie on the input wherever a walk from front to back never writes what it has yet to read.
 */
#include <math.h>
#include <string.h>

#include "input_int.h"

enum { BLOCK = 64 };

static inline uint32_t is_special(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u; }

/* Up to BLOCK numbers of each kind; the rest of a block is zeros. All return non-zero for NaN or Inf. */

static uint32_t single_block(const uint32_t in[BLOCK], uint32_t out[BLOCK]) {
  uint32_t bad = 0;
  for (int i = 0; i < BLOCK; i++) bad |= is_special(in[i]), out[i] = in[i];
  return bad;
}

static uint32_t swapped_single_block(const uint32_t in[BLOCK], uint32_t out[BLOCK]) {
  uint32_t bad = 0;
  for (int i = 0; i < BLOCK; i++) {
    uint32_t v = in[i];
    v = v << 24 | (v & 0xff00) << 8 | (v >> 8 & 0xff00) | v >> 24;
    bad |= is_special(v);
    out[i] = v;
  }
  return bad;
}

/* A normal half: exponent and fraction move to a float's place, the bias grows by 112. A subnormal one gets an implicit
 * one by the same move, which is then subtracted: no denormal arithmetic, which hosts that set FTZ/DAZ would lose. */
static uint32_t half_block(const uint16_t in[BLOCK], uint32_t out[BLOCK]) {
  uint32_t bad = 0;
  for (int i = 0; i < BLOCK; i++) {
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
static uint32_t double_block(const uint64_t in[BLOCK], uint32_t out[BLOCK], uint32_t *over) {
  uint32_t bad = 0, inf = 0;
  for (int i = 0; i < BLOCK; i++) {
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
  *over = inf;
  return bad;
}

static void swap_halves(uint16_t v[BLOCK]) {
  for (int i = 0; i < BLOCK; i++) v[i] = (uint16_t)(v[i] << 8 | v[i] >> 8);
}
static void swap_doubles(uint64_t v[BLOCK]) {
  for (int i = 0; i < BLOCK; i++) v[i] = __builtin_bswap64(v[i]);
}

size_t input_num_bytes(input_num kind) { return kind < INPUT_F32 ? 2 : kind < INPUT_F64 ? 4 : 8; }

unsigned input_to_floats(input_num kind, const void *in, float *out, size_t n) {
  size_t width = input_num_bytes(kind);
  uint32_t bad = 0, over = 0;
  for (size_t at = 0; at < n; at += BLOCK) {
    size_t m = n - at < BLOCK ? n - at : BLOCK;
    union {
      uint16_t half[BLOCK];
      uint32_t single[BLOCK];
      uint64_t wide[BLOCK];
    } from;
    uint32_t to[BLOCK], inf = 0;
    if (m == BLOCK) memcpy(&from, (const char *)in + at * width, BLOCK * width);
    else memset(&from, 0, sizeof from), memcpy(&from, (const char *)in + at * width, m * width);
    switch (kind) {
    case INPUT_F16_BE: swap_halves(from.half); /* fall through */
    case INPUT_F16: bad |= half_block(from.half, to); break;
    case INPUT_F32: bad |= single_block(from.single, to); break;
    case INPUT_F32_BE: bad |= swapped_single_block(from.single, to); break;
    case INPUT_F64_BE: swap_doubles(from.wide); /* fall through */
    case INPUT_F64: bad |= double_block(from.wide, to, &inf); break;
    }
    over |= inf;
    if (m == BLOCK) memcpy(out + at, to, sizeof to);
    else memcpy(out + at, to, m * 4);
  }
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
