/* input_hdf5_chunks.c - reads rows of a chunked dataset without libhdf5's filters and chunk cache.
 *
 * libhdf5 only finds a chunk and reads its bytes as they lie in the file (H5Dread_chunk, under the lock); they are decoded here,
 * on the threads of the pool, and every row's numbers go to their place as floats, checked while they are in the cache.
 *
 * A band is a row of chunks, side by side. Two ways to read:
 *   straight  every chunk that the wanted rows touch is decoded, and what is wanted of it is copied out. The caller asks for
 *             whole bands (input_h5_align), so that no chunk is decoded twice.
 *   held      one decoded band is kept as it was stored, and rows are taken out of it: for bands taller than a window, and for
 *             ids and columns, whose chunks end elsewhere than those of the vectors.
 * A band too large to be held (BAND_MAX) whose chunks stand side by side is read straight, its chunks again for each window; one
 * that is a single chunk is held whatever its size: the chunk has to be decoded whole anyway.
 *
 * Memory, beside the caller's rows: <= SCRATCH_MAX for chunks being decoded, or three times one chunk if that is more; the
 * band held, <= BAND_MAX or one chunk. A chunk has <= CHUNK_BYTES_MAX (512 MiB).
 *
 * Damage: of several damaged chunks the first in file order is reported, whatever the number of threads, and the rows before
 * its band are delivered.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../base/vs_pool.h"
#include "input_hdf5_int.h"

#define SCRATCH_MAX ((size_t)48 << 20)
#define BAND_MAX ((size_t)64 << 20)
#define CHUNK_BYTES_MAX ((uint64_t)512 << 20)
#define TASK_BYTES ((size_t)256 << 10) /* of small chunks are decoded by one task */

typedef struct scratch_node {
  input_h5_scratch s; /* first */
  struct scratch_node *next;
} scratch_node;

struct input_h5_chunks {
  const input_h5_dataset *d;
  input_h5_filters filters;
  size_t elem;         /* bytes of a stored number */
  uint64_t across;     /* chunks side by side */
  int plain_edges;     /* chunks that reach over the edge were left unfiltered */
  int workers;
  const int *cancel;   /* NULL, or set when the rows are not wanted any more */
  pthread_mutex_t m;   /* guards idle */
  scratch_node *idle;
  int hold;
  unsigned char *band; /* held: decoded, as stored */
  uint64_t band_no;    /* UINT64_MAX: none */
  uint8_t band_flags;
};

static uint64_t rows_of(const input_h5_dataset *d) { return d->dims[0]; }
static uint64_t width_of(const input_h5_dataset *d) { return d->rank == 2 ? d->dims[1] : 1; }
static uint64_t chunk_width(const input_h5_dataset *d) { return d->rank == 2 ? d->chunk[1] : 1; }

int input_h5_chunks_straight(const input_h5_chunks *c) { return c && !c->hold; }

vs_rc input_h5_chunks_open(const input_h5_dataset *d, size_t elem, size_t window_rows, int threads, const int *cancel,
                           input_h5_chunks **out, vs_err *err) {
  uint64_t across, n_bytes = d->chunk[0] * elem; /* chunk sides are below 2^32 in the format, elem is below 2^20 */
  unsigned options = 0;
  input_h5_filters filters;
  size_t per_task;
  hid_t props;
  int known;
  *out = NULL;
  if (!d->chunk[0] || !rows_of(d) || !width_of(d) || d->fd < 0 || n_bytes > CHUNK_BYTES_MAX || chunk_width(d) > CHUNK_BYTES_MAX)
    return VS_OK;
  n_bytes *= chunk_width(d);
  if (n_bytes > CHUNK_BYTES_MAX) return VS_OK;
  across = (width_of(d) - 1) / chunk_width(d) + 1;
  props = H5Dget_create_plist(d->id);
  if (props < 0) return VS_OK;
  known = input_h5_filters_read(props, (size_t)n_bytes, &filters);
  if (known && H5Pget_chunk_opts(props, &options) < 0) known = 0;
  H5Pclose(props);
  /* libhdf5 reads parts of an unfiltered chunk, so a large one is better left to it. */
  if (!known || (!filters.n && n_bytes > BAND_MAX / across)) return VS_OK;
  input_h5_chunks *c = calloc(1, sizeof *c);
  if (!c) return vs_nomem(err);
  pthread_mutex_init(&c->m, NULL);
  c->d = d, c->filters = filters, c->elem = elem, c->across = across, c->cancel = cancel, c->band_no = UINT64_MAX;
  c->plain_edges = (options & H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS) != 0;
  c->hold = d->chunk[0] > window_rows && (across == 1 || n_bytes <= BAND_MAX / across);
  per_task = (size_t)n_bytes * (2 + (filters.n_shuffles > 0));
  c->workers = SCRATCH_MAX / per_task < (size_t)threads ? (int)(SCRATCH_MAX / per_task) : threads;
  if (c->workers < 1) c->workers = 1;
  *out = c;
  return VS_OK;
}

void input_h5_chunks_close(input_h5_chunks *c) {
  if (!c) return;
  for (scratch_node *s = c->idle, *next; s; s = next) {
    next = s->next;
    input_h5_scratch_free(&s->s);
    free(s);
  }
  pthread_mutex_destroy(&c->m);
  free(c->band);
  free(c);
}

/* ---- one chunk ---- */

typedef struct decode_job {
  input_h5_chunks *c;
  uint64_t row; /* rows [row, row + n) are wanted; out has room for `room` of them */
  size_t n, room;
  const input_num *num; /* NULL: as stored */
  unsigned char *out;
  size_t out_elem;
  uint8_t *flags; /* of the wanted rows */
  size_t flag_step; /* 0: one for all */
  uint64_t first_band;
  size_t n_chunks, per_task;
  pthread_mutex_t m; /* guards what follows */
  size_t bad;        /* the first chunk that failed; n_chunks: none */
  vs_rc rc;
  vs_err err;
} decode_job;

static void flag_row(const decode_job *j, size_t i, unsigned bits) {
  if (bits) __atomic_fetch_or(j->flags + i * j->flag_step, (uint8_t)bits, __ATOMIC_RELAXED);
}

static vs_rc damaged(const input_h5_chunks *c, uint64_t row, const char *why, vs_err *err) {
  uint64_t last = row + c->d->chunk[0] - 1;
  if (last >= rows_of(c->d)) last = rows_of(c->d) - 1;
  return vs_corrupt(err, "%s: cannot read rows %llu to %llu of '%s': %s", c->d->path, (unsigned long long)row,
                    (unsigned long long)last, c->d->shown, why);
}

/* The chunk's bytes as stored, into `straight` when that is not NULL and they are not filtered, else into the first scratch buffer.
 * *n is 0 for a chunk that was never written. */
static vs_rc fetch(const input_h5_chunks *c, const hsize_t at[2], input_h5_scratch *s, unsigned char *straight, size_t *n,
                   uint32_t *mask, vs_err *err) {
  const input_h5_dataset *d = c->d;
  uint64_t most = (uint64_t)c->filters.chunk_bytes * 2 + 65536; /* what deflate makes of noise is hardly more than the noise */
  hsize_t size = 0;
  struct stat st;
  unsigned char *to;
  int found = input_h5_chunk_size(d, at, &size);
  *n = 0;
  if (found < 0) return input_h5_fail(err, VS_CORRUPT, "%s: cannot find the chunk of rows from %llu on of '%s'", d->path,
                                      (unsigned long long)at[0], d->shown);
  if (!found) return VS_OK;
  if (!c->filters.n && size != c->filters.chunk_bytes) return damaged(c, at[0], "another size than the chunk's shape needs", err);
  if (size > most) return damaged(c, at[0], "the chunk claims more bytes than its shape can need", err);
  to = !c->filters.n && straight ? straight : input_h5_scratch_get(s, 0, (size_t)size);
  if (!to) return vs_nomem(err);
  /* The size holds for this call: libhdf5 remembers the chunk that it found last. */
  if (H5Dread_chunk(d->id, H5P_DEFAULT, at, mask, to) < 0)
    return input_h5_fail(err, VS_CORRUPT, "%s: cannot read rows from %llu on of '%s'", d->path, (unsigned long long)at[0], d->shown);
  /* Beyond the end of a file that has shrunk libhdf5 reads zeros. */
  if (fstat(d->fd, &st) || (uint64_t)st.st_size < d->n_bytes)
    return vs_fail(err, VS_CORRUPT, "%s: ends at byte %llu, where more was expected: it was cut while being read", d->path,
                   (unsigned long long)st.st_size);
  *n = (size_t)size;
  return VS_OK;
}

static vs_rc decode_chunk(decode_job *j, size_t index, input_h5_scratch *s, vs_err *err) {
  const input_h5_chunks *c = j->c;
  const input_h5_dataset *d = c->d;
  uint64_t tall = d->chunk[0], wide = chunk_width(d), width = width_of(d);
  hsize_t at[2] = {(j->first_band + index / c->across) * tall, index % c->across * wide};
  uint64_t from = at[0] > j->row ? at[0] : j->row, end = at[0] + tall;
  size_t out_row = (size_t)width * j->out_elem, n_across = (size_t)(width - at[1] < wide ? width - at[1] : wide), n;
  int edge = end > rows_of(d) || at[1] + wide > width;
  unsigned char *straight = NULL;
  const unsigned char *data;
  const char *why = NULL;
  uint32_t mask = 0;
  vs_rc rc;
  /* As one piece, when it goes out as it is and has its place there. */
  if (c->across == 1 && wide == width && from == at[0] && end <= j->row + j->room && (!j->num || *j->num == INPUT_F32))
    straight = j->out + (size_t)(from - j->row) * out_row;
  if (end > j->row + j->n) end = j->row + j->n;
  if (end > rows_of(d)) end = rows_of(d);
  input_h5_lock();
  rc = fetch(c, at, s, straight, &n, &mask, err);
  input_h5_unlock();
  if (rc) return rc;
  if (!n) {
    for (uint64_t r = from; r < end; r++) flag_row(j, (size_t)(r - j->row), INPUT_HAS_HOLE);
    return VS_OK;
  }
  if (edge && c->plain_edges) mask = UINT32_MAX;
  if (!c->filters.n && straight) data = straight;
  else why = input_h5_undo(&c->filters, mask, s, n, straight, &data);
  if (why == input_h5_no_memory) return vs_nomem(err);
  if (why) return damaged(c, at[0], why, err);
  for (uint64_t r = from; r < end; r++) {
    size_t i = (size_t)(r - j->row);
    unsigned char *to = j->out + i * out_row + (size_t)at[1] * j->out_elem;
    const unsigned char *src = data + (size_t)(r - at[0]) * (size_t)wide * c->elem;
    if (straight) {
      if (!j->num) break;
      flag_row(j, i, input_check_floats((const float *)to, n_across));
    } else if (j->num) {
      flag_row(j, i, input_to_floats(*j->num, src, (float *)to, n_across));
    } else if (wide == width) { /* all rows lie together */
      memcpy(to, src, (size_t)(end - r) * out_row);
      break;
    } else {
      memcpy(to, src, n_across * c->elem);
    }
  }
  return VS_OK;
}

/* ---- many chunks ---- */

static scratch_node *take_scratch(input_h5_chunks *c) {
  pthread_mutex_lock(&c->m);
  scratch_node *s = c->idle;
  if (s) c->idle = s->next;
  pthread_mutex_unlock(&c->m);
  return s ? s : calloc(1, sizeof *s);
}

static void give_scratch(input_h5_chunks *c, scratch_node *s) {
  pthread_mutex_lock(&c->m);
  s->next = c->idle, c->idle = s;
  pthread_mutex_unlock(&c->m);
}

static void note_failure(decode_job *j, size_t index, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&j->m);
  if (index < j->bad) {
    __atomic_store_n(&j->bad, index, __ATOMIC_RELAXED);
    j->rc = rc, j->err = *err;
  }
  pthread_mutex_unlock(&j->m);
}

static void decode_task(void *ctx, size_t task) {
  decode_job *j = ctx;
  scratch_node *s = take_scratch(j->c);
  for (size_t i = task * j->per_task; i < (task + 1) * j->per_task && i < j->n_chunks; i++) {
    vs_err err = {0};
    vs_rc rc;
    if (i > __atomic_load_n(&j->bad, __ATOMIC_RELAXED)) break;
    if (!s) rc = vs_nomem(&err);
    else if (j->c->cancel && __atomic_load_n(j->c->cancel, __ATOMIC_RELAXED)) rc = vs_fail(&err, VS_INTERRUPT, "interrupted");
    else rc = decode_chunk(j, i, &s->s, &err);
    if (rc) note_failure(j, i, rc, &err);
  }
  if (s) give_scratch(j->c, s);
}

/* *n becomes the rows before the band of the first chunk that failed. */
static vs_rc decode_rows(decode_job *j, size_t *n, vs_err *err) {
  input_h5_chunks *c = j->c;
  uint64_t tall = c->d->chunk[0], bands;
  j->first_band = j->row / tall;
  bands = (j->row + j->n - 1) / tall - j->first_band + 1;
  j->n_chunks = j->bad = (size_t)(bands * c->across);
  j->per_task = c->filters.chunk_bytes < TASK_BYTES ? TASK_BYTES / c->filters.chunk_bytes : 1;
  pthread_mutex_init(&j->m, NULL);
  vs_pool_run((j->n_chunks + j->per_task - 1) / j->per_task, c->workers, decode_task, j);
  pthread_mutex_destroy(&j->m);
  if (j->bad == j->n_chunks) return VS_OK;
  uint64_t first = (j->first_band + j->bad / c->across) * tall;
  *n = first > j->row ? (size_t)(first - j->row) : 0;
  return vs_fail(err, j->rc, "%s", j->err.text);
}

/* ---- the band held ---- */

static vs_rc hold_band(input_h5_chunks *c, uint64_t band, vs_err *err) {
  const input_h5_dataset *d = c->d;
  size_t n_bytes = (size_t)d->chunk[0] * (size_t)width_of(d) * c->elem, n;
  uint64_t first = band * d->chunk[0], left = rows_of(d) - first;
  if (c->band_no == band) return VS_OK;
  c->band_no = UINT64_MAX;
  if (!c->band && !(c->band = malloc(n_bytes))) return vs_nomem(err);
  c->band_flags = 0;
  decode_job j = {.c = c, .row = first, .n = (size_t)(left < d->chunk[0] ? left : d->chunk[0]), .room = (size_t)d->chunk[0],
                  .out = c->band, .out_elem = c->elem, .flags = &c->band_flags};
  vs_rc rc = decode_rows(&j, &n, err);
  if (rc) return rc;
  if (c->band_flags) memset(c->band, 0, n_bytes); /* what was never written does not show what lay here before */
  c->band_no = band;
  return VS_OK;
}

typedef struct take_job {
  const unsigned char *from;
  float *out;
  uint8_t *flags;
  input_num num;
  size_t width, elem, n, per_task;
} take_job;

static void take_task(void *ctx, size_t task) {
  take_job *j = ctx;
  for (size_t i = task * j->per_task; i < (task + 1) * j->per_task && i < j->n; i++)
    j->flags[i] |= (uint8_t)input_to_floats(j->num, j->from + i * j->width * j->elem, j->out + i * j->width, j->width);
}

static vs_rc read_held(input_h5_chunks *c, uint64_t row, size_t *n, const input_num *num, unsigned char *out, uint8_t *flags,
                       vs_err *err) {
  const input_h5_dataset *d = c->d;
  size_t width = (size_t)width_of(d), stored = width * c->elem, done = 0;
  while (done < *n) {
    uint64_t band = (row + done) / d->chunk[0], skip = (row + done) % d->chunk[0];
    size_t m = d->chunk[0] - skip < *n - done ? (size_t)(d->chunk[0] - skip) : *n - done;
    vs_rc rc = hold_band(c, band, err);
    if (rc) {
      *n = done;
      return rc;
    }
    memset(flags + done, c->band_flags, m);
    if (num) {
      take_job j = {.from = c->band + (size_t)skip * stored, .out = (float *)out + done * width, .flags = flags + done, .num = *num,
                    .width = width, .elem = c->elem, .n = m, .per_task = TASK_BYTES / stored + 1};
      vs_pool_run((m + j.per_task - 1) / j.per_task, c->workers, take_task, &j);
    } else {
      memcpy(out + done * stored, c->band + (size_t)skip * stored, m * stored);
    }
    done += m;
  }
  return VS_OK;
}

vs_rc input_h5_chunks_read(input_h5_chunks *c, uint64_t row, size_t *n, const input_num *num, void *out, uint8_t *flags,
                           vs_err *err) {
  memset(flags, 0, *n);
  if (!*n) return VS_OK;
  if (c->hold) return read_held(c, row, n, num, out, flags, err);
  decode_job j = {.c = c, .row = row, .n = *n, .room = *n, .num = num, .out = out, .out_elem = num ? 4 : c->elem, .flags = flags,
                  .flag_step = 1};
  return decode_rows(&j, n, err);
}
