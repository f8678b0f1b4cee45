/* input_hdf5_chunks.c - reads rows of a chunked dataset without libhdf5's filters and chunk cache.
 *
 * libhdf5 only tells where a chunk lies (input_hdf5_places.c, under the lock); chunks are read and decoded here, on the threads
 * of the pool, and every row's numbers go to their place as floats, checked while they are in the cache.
 *
 * A band is a row of chunks, side by side. Three ways to read:
 *   plain     chunks without filters: just the rows that are wanted are read.
 *   straight  every chunk that the wanted rows touch is decoded, and what is wanted of it is copied out. The caller asks for
 *             whole bands (input_h5_align), so that no chunk is decoded twice.
 *   held      one decoded band is kept as it was stored, and rows are taken out of it: for bands taller than a window, and for
 *             ids and columns, whose chunks end elsewhere than those of the vectors.
 * A band too large to be held (BAND_MAX) whose chunks stand side by side is read straight, its chunks again for each window;
 * one that is a single chunk is held whatever its size: the chunk has to be decoded whole anyway.
 *
 * Memory, beside the caller's rows: <= SCRATCH_MAX for chunks being decoded, or three times one chunk if that is more; the
 * band held, <= BAND_MAX or one chunk; 128 KiB of places. A filtered chunk has <= CHUNK_BYTES_MAX (512 MiB).
 *
 * Damage: of several damaged chunks the first in file order is reported, whatever the number of threads, and the rows before
 * its band are delivered.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "../base/vs_pool.h"
#include "input_hdf5_int.h"

#define SCRATCH_MAX ((size_t)48 << 20)
#define BAND_MAX ((size_t)64 << 20)
#define CHUNK_BYTES_MAX ((uint64_t)512 << 20)
#define TASK_BYTES ((size_t)256 << 10) /* of small chunks are decoded by one task */
enum {
  GROUP = 4096, /* chunks that are looked up, then decoded */
  LINE = 128,   /* bytes of a row that are worth writing at once */
  GANG = 16     /* chunks that are put there together */
};
#define STRIP_MAX ((size_t)2 << 20) /* bytes of them */

typedef struct scratch_node {
  input_h5_scratch s; /* first */
  struct scratch_node *next;
} scratch_node;

struct input_h5_chunks {
  const input_h5_dataset *d;
  hid_t places;
  input_h5_place *place; /* of a group */
  input_h5_filters filters;
  uint64_t across;       /* chunks side by side */
  int plain_edges;       /* chunks that reach over the edge were left unfiltered */
  size_t gang;           /* chunks to decode together; 1: they are wide enough */
  int workers;
  const int *cancel;     /* NULL, or set when the rows are not wanted any more */
  pthread_mutex_t m;     /* guards idle */
  scratch_node *idle;
  int hold;
  unsigned char *band;   /* held: decoded, as stored */
  uint64_t band_no;      /* UINT64_MAX: none */
  uint8_t band_flags;
};

static uint64_t rows_of(const input_h5_dataset *d) { return d->dims[0]; }
static uint64_t width_of(const input_h5_dataset *d) { return d->rank == 2 ? d->dims[1] : 1; }
static uint64_t chunk_width(const input_h5_dataset *d) { return d->rank == 2 ? d->chunk[1] : 1; }

int input_h5_chunks_whole(const input_h5_chunks *c) { return !c->hold && c->filters.n; }

/* 1 with the filters and what else the creation properties say, when everything is of a kind that is read here. */
static int can_read(const input_h5_dataset *d, input_h5_filters *filters, int *plain_edges) {
  uint64_t n_bytes;
  unsigned options = 0;
  hid_t props;
  int known;
  if (!d->chunk[0] || !rows_of(d) || !width_of(d) || d->fd < 0) return 0;
  if (d->chunk[0] > UINT32_MAX || chunk_width(d) > (uint64_t)INT64_MAX / (d->chunk[0] * d->elem)) return 0; /* elem < 2^20 */
  n_bytes = d->chunk[0] * d->elem * chunk_width(d);
  props = H5Dget_create_plist(d->id);
  if (props < 0) return 0;
  known = input_h5_filters_read(props, (size_t)n_bytes, filters) && H5Pget_chunk_opts(props, &options) >= 0;
  H5Pclose(props);
  *plain_edges = (options & H5D_CHUNK_DONT_FILTER_PARTIAL_CHUNKS) != 0;
  return known && (!filters->n || n_bytes <= CHUNK_BYTES_MAX);
}

vs_rc input_h5_chunks_open(input_h5_file *f, const input_h5_dataset *d, size_t window_rows, int threads, const int *cancel,
                           input_h5_chunks **out, vs_err *err) {
  input_h5_filters filters;
  int plain_edges;
  *out = NULL;
  if (!can_read(d, &filters, &plain_edges)) return VS_OK;
  hid_t places = input_h5_places_open(f, d);
  if (places < 0) return VS_OK;
  input_h5_chunks *c = calloc(1, sizeof *c);
  if (c) c->place = malloc(GROUP * sizeof *c->place);
  if (!c || !c->place) {
    H5Oclose(places);
    free(c);
    return vs_nomem(err);
  }
  pthread_mutex_init(&c->m, NULL);
  c->d = d, c->places = places, c->filters = filters, c->cancel = cancel, c->plain_edges = plain_edges;
  c->across = (width_of(d) - 1) / chunk_width(d) + 1;
  c->band_no = UINT64_MAX;
  c->hold = filters.n && d->chunk[0] > window_rows && (c->across == 1 || filters.chunk_bytes <= BAND_MAX / c->across);
  c->gang = c->across > 1 ? (LINE - 1) / ((size_t)chunk_width(d) * d->elem) + 1 : 1;
  if (c->gang > GANG) c->gang = GANG;
  while (c->gang > 1 && c->gang * filters.chunk_bytes > STRIP_MAX) c->gang--;
  size_t most = SCRATCH_MAX / ((filters.n ? filters.chunk_bytes * (2 + (filters.n_shuffles > 0)) : 1) + STRIP_MAX);
  c->workers = most >= (size_t)threads ? threads : most < 1 ? 1 : (int)most;
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
  H5Oclose(c->places);
  free(c->place);
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
  size_t group, group_end; /* the chunks whose places are known */
  pthread_mutex_t m;       /* guards what follows */
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

/* Where the chunk lies; in the file, and of a size that its shape allows. size 0: it was never written. With the lock held. */
static vs_rc find_chunk(const input_h5_chunks *c, const hsize_t at[2], input_h5_place *p, vs_err *err) {
  const input_h5_dataset *d = c->d;
  int found = input_h5_place_of(c->places, at, p);
  if (found < 0)
    return input_h5_fail(err, VS_CORRUPT, "%s: cannot find the chunk of rows from %llu on of '%s'", d->path,
                         (unsigned long long)at[0], d->shown);
  if (!found) return VS_OK;
  if (c->plain_edges && (at[0] + d->chunk[0] > rows_of(d) || at[1] + chunk_width(d) > width_of(d))) p->mask = UINT32_MAX;
  if (p->off > d->n_bytes || p->size > d->n_bytes - p->off) return damaged(c, at[0], "the chunk ends beyond the file", err);
  if (!c->filters.n && p->size != c->filters.chunk_bytes)
    return damaged(c, at[0], "another size than the chunk's shape needs", err);
  /* What deflate makes of noise is hardly more than the noise. */
  if (p->size > c->filters.chunk_bytes * 2 + 65536)
    return damaged(c, at[0], "the chunk claims more bytes than its shape can need", err);
  return VS_OK;
}

/* Where a chunk and the wanted rows meet. */
typedef struct meeting {
  hsize_t at[2];      /* the chunk's corner */
  uint64_t from, end; /* rows */
  size_t n;           /* numbers of each */
  int whole;          /* the numbers go out as they are, all of each row, and the rows lie together */
} meeting;

static meeting meet(const decode_job *j, size_t index) {
  const input_h5_chunks *c = j->c;
  const input_h5_dataset *d = c->d;
  uint64_t wide = chunk_width(d), width = width_of(d);
  meeting m = {.at = {(j->first_band + index / c->across) * d->chunk[0], index % c->across * wide}};
  m.from = m.at[0] > j->row ? m.at[0] : j->row;
  m.end = m.at[0] + d->chunk[0];
  if (m.end > j->row + j->n) m.end = j->row + j->n;
  if (m.end > rows_of(d)) m.end = rows_of(d);
  m.n = (size_t)(width - m.at[1] < wide ? width - m.at[1] : wide);
  m.whole = wide == width && (!j->num || *j->num == INPUT_F32);
  return m;
}

static inline void copy_piece(unsigned char *to, const unsigned char *from, size_t n) {
  if (n == 8) memcpy(to, from, 8);
  else if (n == 4) memcpy(to, from, 4);
  else memcpy(to, from, n);
}

/* Rows of n decoded chunks that stand side by side, the first of them at src[k], to their places. */
static void put_rows(const decode_job *j, const meeting *m, const unsigned char *const *src, size_t n) {
  const input_h5_dataset *d = j->c->d;
  size_t out_row = (size_t)width_of(d) * j->out_elem, in_row = (size_t)chunk_width(d) * d->elem;
  size_t numbers = (n - 1) * (size_t)chunk_width(d) + m[n - 1].n, last = m[n - 1].n * d->elem;
  unsigned char line[2 * LINE], *to = j->out + (size_t)(m->from - j->row) * out_row + (size_t)m->at[1] * j->out_elem;
  for (uint64_t r = m->from; r < m->end; r++, to += out_row) {
    size_t skip = (size_t)(r - m->from) * in_row;
    const unsigned char *from = n > 1 ? line : src[0] + skip;
    if (n > 1) {
      for (size_t k = 0; k + 1 < n; k++) copy_piece(line + k * in_row, src[k] + skip, in_row);
      copy_piece(line + (n - 1) * in_row, src[n - 1] + skip, last);
    }
    if (j->num) flag_row(j, (size_t)(r - j->row), input_to_floats(*j->num, from, (float *)to, numbers));
    else memcpy(to, from, numbers * d->elem);
  }
}

/* The same for rows that were put into their places as they are. */
static void check_rows(const decode_job *j, const meeting *m) {
  size_t width = (size_t)width_of(j->c->d);
  for (uint64_t r = m->from; r < m->end && j->num; r++) {
    size_t i = (size_t)(r - j->row);
    flag_row(j, i, input_check_floats((const float *)j->out + i * width, width));
  }
}

/* The rows of a chunk that are wanted, as stored: into `to` if that is given, else into scratch; *src says where. `to` has
 * room for them if the chunk has no filters, else for all of the chunk. */
static vs_rc load_chunk(const input_h5_chunks *c, const meeting *m, const input_h5_place *p, input_h5_scratch *s,
                        unsigned char *to, const unsigned char **src, vs_err *err) {
  const input_h5_dataset *d = c->d;
  size_t in_row = (size_t)chunk_width(d) * d->elem, skip = (size_t)(m->from - m->at[0]) * in_row;
  size_t n_bytes = c->filters.n ? (size_t)p->size : (size_t)(m->end - m->from) * in_row;
  unsigned char *raw = !c->filters.n && to ? to : input_h5_scratch_get(s, 0, n_bytes);
  if (!raw) return vs_nomem(err);
  vs_rc rc = input_pread(d->fd, d->path, raw, n_bytes, c->filters.n ? p->off : p->off + skip, err);
  *src = raw;
  if (rc || !c->filters.n) return rc;
  const char *why = input_h5_undo(&c->filters, p->mask, s, n_bytes, to, src);
  if (why == input_h5_no_memory) return vs_nomem(err);
  if (why) return damaged(c, m->at[0], why, err);
  *src += skip;
  return VS_OK;
}

static void put_hole(const decode_job *j, const meeting *m) {
  size_t out_row = (size_t)width_of(j->c->d) * j->out_elem;
  for (uint64_t r = m->from; r < m->end; r++) {
    memset(j->out + (size_t)(r - j->row) * out_row + (size_t)m->at[1] * j->out_elem, 0, m->n * j->out_elem);
    flag_row(j, (size_t)(r - j->row), INPUT_HAS_HOLE);
  }
}

static vs_rc decode_chunk(const decode_job *j, size_t index, input_h5_scratch *s, vs_err *err) {
  const input_h5_chunks *c = j->c;
  const input_h5_place *p = &c->place[index - j->group];
  meeting m = meet(j, index);
  unsigned char *to = NULL;
  const unsigned char *src;
  if (!p->size) {
    put_hole(j, &m);
    return VS_OK;
  }
  /* Straight to its place, when all of what is decoded has the room there. */
  if (m.whole && (!c->filters.n || (m.from == m.at[0] && m.at[0] + c->d->chunk[0] <= j->row + j->room)))
    to = j->out + (size_t)(m.from - j->row) * (size_t)width_of(c->d) * j->out_elem;
  vs_rc rc = load_chunk(c, &m, p, s, to, &src, err);
  if (rc) return rc;
  if (to) check_rows(j, &m);
  else put_rows(j, &m, &src, 1);
  return VS_OK;
}

/* Narrow chunks that stand side by side, together: putting a few bytes into every row, chunk after chunk, would fetch each
 * line of the rows from memory anew for each chunk (1,000,000 x 128 float32 in chunks of 15,625 x 2: 3.0 s of CPU time, 2.1 s
 * so). *index moves on to the chunk that failed. */
static vs_rc decode_gang(const decode_job *j, size_t *index, size_t n, input_h5_scratch *s, vs_err *err) {
  const input_h5_chunks *c = j->c;
  size_t chunk_bytes = c->filters.chunk_bytes, first = *index;
  unsigned char *strip = input_h5_scratch_get(s, 3, n * chunk_bytes);
  const unsigned char *src[GANG];
  meeting m[GANG];
  int hole = 0;
  if (!strip) return vs_nomem(err);
  for (size_t k = 0; k < n; k++) {
    const input_h5_place *p = &c->place[first + k - j->group];
    *index = first + k;
    m[k] = meet(j, first + k);
    src[k] = strip + k * chunk_bytes;
    hole |= !p->size;
    vs_rc rc = p->size ? load_chunk(c, &m[k], p, s, strip + k * chunk_bytes, &src[k], err) : VS_OK;
    if (rc) return rc;
  }
  for (size_t k = 0; k < n && hole; k++) put_hole(j, &m[k]); /* one hole makes holes of the rows */
  if (!hole) put_rows(j, m, src, n);
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

static int cancelled(const input_h5_chunks *c) { return c->cancel && __atomic_load_n(c->cancel, __ATOMIC_RELAXED); }

static void decode_task(void *ctx, size_t task) {
  decode_job *j = ctx;
  size_t first = j->group + task * j->per_task, end = j->group_end - first < j->per_task ? j->group_end : first + j->per_task;
  scratch_node *s = take_scratch(j->c);
  for (size_t i = first, n; i < end && i < __atomic_load_n(&j->bad, __ATOMIC_RELAXED); i += n) {
    size_t in_band = (size_t)(j->c->across - i % j->c->across), at = i;
    vs_err err = {0};
    vs_rc rc;
    n = end - i < j->c->gang ? end - i : j->c->gang;
    if (n > in_band) n = in_band;
    if (!s) rc = vs_nomem(&err);
    else if (cancelled(j->c)) rc = vs_fail(&err, VS_INTERRUPT, "interrupted");
    else if (n > 1) rc = decode_gang(j, &at, n, &s->s, &err);
    else rc = decode_chunk(j, i, &s->s, &err);
    if (rc) note_failure(j, at, rc, &err);
  }
  if (s) give_scratch(j->c, s);
}

/* Looks up the places of a group; the kernel is told what is going to be read. */
static void find_group(decode_job *j) {
  const input_h5_chunks *c = j->c;
  vs_err err = {0};
  vs_rc rc = VS_OK;
  size_t i = j->group;
  j->group_end = j->n_chunks - i < GROUP ? j->n_chunks : i + GROUP;
  input_h5_lock();
  for (; i < j->group_end && !rc; i++) {
    meeting m = meet(j, i);
    input_h5_place *p = &c->place[i - j->group];
    rc = cancelled(c) ? vs_fail(&err, VS_INTERRUPT, "interrupted") : find_chunk(c, m.at, p, &err);
    if (rc) note_failure(j, i, rc, &err);
    else if (p->size && c->filters.n) posix_fadvise(c->d->fd, (off_t)p->off, (off_t)p->size, POSIX_FADV_WILLNEED);
  }
  input_h5_unlock();
  if (rc) j->group_end = i - 1;
}

/* *n becomes the rows before the band of the first chunk that failed. */
static vs_rc decode_rows(decode_job *j, size_t *n, vs_err *err) {
  input_h5_chunks *c = j->c;
  uint64_t tall = c->d->chunk[0], bands;
  j->first_band = j->row / tall;
  bands = (j->row + j->n - 1) / tall - j->first_band + 1;
  j->n_chunks = j->bad = (size_t)(bands * c->across);
  j->per_task = c->filters.chunk_bytes < TASK_BYTES ? TASK_BYTES / c->filters.chunk_bytes : 1;
  j->per_task = (j->per_task + c->gang - 1) / c->gang * c->gang;
  pthread_mutex_init(&j->m, NULL);
  for (j->group = 0; j->group < j->n_chunks && j->bad == j->n_chunks; j->group += GROUP) {
    find_group(j);
    vs_pool_run((j->group_end - j->group + j->per_task - 1) / j->per_task, c->workers, decode_task, j);
  }
  pthread_mutex_destroy(&j->m);
  if (j->bad == j->n_chunks) return VS_OK;
  uint64_t first = (j->first_band + j->bad / c->across) * tall;
  *n = first > j->row ? (size_t)(first - j->row) : 0;
  return vs_fail(err, j->rc, "%s", j->err.text);
}

/* ---- the band held ---- */

static vs_rc hold_band(input_h5_chunks *c, uint64_t band, vs_err *err) {
  const input_h5_dataset *d = c->d;
  size_t n_bytes = (size_t)d->chunk[0] * (size_t)width_of(d) * d->elem, n;
  uint64_t first = band * d->chunk[0], left = rows_of(d) - first;
  if (c->band_no == band) return VS_OK;
  c->band_no = UINT64_MAX;
  if (!c->band && !(c->band = malloc(n_bytes))) return vs_nomem(err);
  c->band_flags = 0;
  decode_job j = {.c = c, .row = first, .n = (size_t)(left < d->chunk[0] ? left : d->chunk[0]), .room = (size_t)d->chunk[0],
                  .out = c->band, .out_elem = d->elem, .flags = &c->band_flags};
  vs_rc rc = decode_rows(&j, &n, err);
  if (rc) return rc;
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

static vs_rc read_held(input_h5_chunks *c, uint64_t row, size_t *n, const input_num *num, unsigned char *out,
                       uint8_t *flags, vs_err *err) {
  const input_h5_dataset *d = c->d;
  size_t width = (size_t)width_of(d), stored = width * d->elem, done = 0;
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
      take_job j = {.from = c->band + (size_t)skip * stored, .out = (float *)out + done * width, .flags = flags + done,
                    .num = *num, .width = width, .elem = d->elem, .n = m, .per_task = TASK_BYTES / stored + 1};
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
  decode_job j = {.c = c, .row = row, .n = *n, .room = *n, .num = num, .out = out, .out_elem = num ? 4 : c->d->elem,
                  .flags = flags, .flag_step = 1};
  return decode_rows(&j, n, err);
}
