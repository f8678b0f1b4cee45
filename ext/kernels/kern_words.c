/* kern_words.c - the nearest code words: the tables of the integer way, and the fp32 way; see kern.h and kern_words_avx512.c.
 *
 * Integers. A row is q * step * 2^level with |q| < 2^15 / sub_dim, a word is b * scale with bytes b, so the score r.w - |w|^2/2 is
 * (SUM q b + start) * step * 2^level * scale with start = -|w|^2/2 in the same unit. Words are stored times 256: then the low byte
 * of every sum is free, start puts the word's number there, and the greatest sum brings its word along.
 * Overflow: |SUM q b| < 2^15 * 127 < 2^22; step is such that |start| <= 2^22; times 256 that is below 2^31.
 */
#include <math.h>
#include <string.h>
#include "kern_int.h"

enum { ALIGN = 64 };

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static void *aligned(void *p) { return (void *)(((uintptr_t)p + ALIGN - 1) / ALIGN * ALIGN); }

#if defined(__x86_64__)
static int use_integers(size_t sub_dim) { return strcmp(kern_get()->name, "avx512") == 0 && sub_dim <= KERN_WORDS_MAX_DIM; }
static size_t pairs_len(size_t n_words, size_t sub_dim) { return round_up(sub_dim, 2) * round_up(n_words, 16); }
#endif

size_t kern_words_bytes(size_t n_subs, size_t n_words, size_t sub_dim) {
  size_t fp32 = (kern_packed_len(n_words, sub_dim) + round_up(n_words, 16)) * sizeof(float);
#if defined(__x86_64__)
  size_t integers = pairs_len(n_words, sub_dim) * sizeof(int16_t) + KERN_WORDS_LEVELS * n_words * sizeof(int32_t);
  if (use_integers(sub_dim)) return n_subs * round_up(integers, ALIGN) + ALIGN;
#endif
  return n_subs * round_up(fp32, ALIGN) + ALIGN;
}

static void init_fp32(kern_words *w, const float *words) {
  size_t lanes = round_up(w->n_words, 16), len = kern_packed_len(w->n_words, w->sub_dim);
  w->bias = w->packed + w->n_subs * len;
  for (size_t j = 0; j < w->n_subs; j++, words += w->n_words * w->sub_dim) {
    kern_pack_f32(words, w->n_words, w->sub_dim, w->packed + j * len);
    for (size_t i = 0; i < lanes; i++) {
      const float *word = words + i * w->sub_dim;
      w->bias[j * lanes + i] = i < w->n_words ? -0.5f * kern_get()->dot_f32(word, word, w->sub_dim) : 0;
    }
  }
}

#if defined(__x86_64__)
#define START_MAX 4194304.f /* 2^22 */

/* The scale of a sub-quantizer's words, and the greatest |b|^2 of them. */
static float scale_of(const kern_words *w, const float *words, float *most) {
  float top = 0;
  for (size_t i = 0; i < w->n_words * w->sub_dim; i++) top = fabsf(words[i]) > top ? fabsf(words[i]) : top;
  float scale = top >= 1e-30f ? top / 127 : 0, inv = scale > 0 ? 1 / scale : 0;
  *most = 0;
  for (size_t i = 0; i < w->n_words; i++) {
    float sum = 0;
    for (size_t e = 0; e < w->sub_dim; e++) {
      float b = rintf(words[i * w->sub_dim + e] * inv);
      sum += b * b;
    }
    *most = sum > *most ? sum : *most;
  }
  return scale;
}

static void init_sub(kern_words *w, const float *words, size_t j) {
  size_t len = pairs_len(w->n_words, w->sub_dim);
  int16_t *pairs = w->pairs + j * len;
  int32_t *start = w->start + j * KERN_WORDS_LEVELS * w->n_words;
  float most, scale = scale_of(w, words, &most), inv = scale > 0 ? 1 / scale : 0;
  memset(pairs, 0, len * sizeof *pairs);
  for (size_t i = 0; i < w->n_words; i++) {
    float norm2 = 0;
    for (size_t e = 0; e < w->sub_dim; e++) {
      float b = rintf(words[i * w->sub_dim + e] * inv);
      norm2 += b * b;
      pairs[(i / 16 * ((w->sub_dim + 1) / 2) + e / 2) * 32 + i % 16 * 2 + e % 2] = (int16_t)(256 * (int)b);
    }
    float unit = w->step;
    for (size_t level = 0; level < KERN_WORDS_LEVELS; level++, unit *= 2)
      start[level * w->n_words + i] = (int32_t)lrintf(-.5f * norm2 * (scale / unit)) * 256 + (int32_t)i;
  }
}
#endif

void kern_words_init(kern_words *w, const float *words, size_t n_subs, size_t n_words, size_t sub_dim, void *mem) {
  *w = (kern_words){.n_subs = n_subs, .n_words = n_words, .sub_dim = sub_dim};
#if defined(__x86_64__)
  if (use_integers(sub_dim)) {
    size_t size = n_words * sub_dim;
    w->pairs = aligned(mem), w->start = (int32_t *)(w->pairs + n_subs * pairs_len(n_words, sub_dim)), w->step = 1e-30f;
    for (size_t j = 0; j < n_subs; j++) {
      float most, scale = scale_of(w, words + j * size, &most), step = .5f * most * scale / START_MAX * 1.001f;
      w->step = step > w->step ? step : w->step;
    }
    for (size_t j = 0; j < n_subs; j++) init_sub(w, words + j * size, j);
    return;
  }
#endif
  w->packed = aligned(mem);
  init_fp32(w, words);
}

static void find_fp32(const kern_words *w, const float *x, size_t n, size_t stride, uint8_t *code, size_t code_stride) {
  enum { ROWS = 256 };
  size_t lanes = round_up(w->n_words, 16), len = kern_packed_len(w->n_words, w->sub_dim);
  for (size_t first = 0; first < n; first += ROWS)
    for (size_t j = 0; j < w->n_subs; j++) { /* sub-quantizer outside: its words stay in L1 */
      uint32_t id[ROWS];
      size_t rows = n - first < ROWS ? n - first : ROWS;
      kern_get()->argmax_f32(x + first * stride + j * w->sub_dim, rows, stride, w->sub_dim, w->packed + j * len, w->bias + j * lanes,
                             w->n_words, id, NULL);
      for (size_t r = 0; r < rows; r++) code[(first + r) * code_stride + j] = (uint8_t)id[r];
    }
}

void kern_words_find(const kern_words *w, const float *x, size_t n, size_t stride, uint8_t *code, size_t code_stride) {
#if defined(__x86_64__)
  if (w->pairs) {
    kern_words512_find(w, x, n, stride, code, code_stride);
    return;
  }
#endif
  find_fp32(w, x, n, stride, code, code_stride);
}
