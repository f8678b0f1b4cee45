/* upload.c - see upload.h.
 *
 * Workers take turns to read the next piece (a part, or a file that is small enough to go whole), so that every file is
 * read once and in order and its checksum computed on the way; they send their pieces at the same time, across the
 * files' borders. Whoever sent the last piece of a file in parts completes it. A file's last piece is sent only when
 * the checksum of the whole is right, so nothing damaged is ever completed.
 *
 * Parts of an unfinished upload of the same object are used again when the store's ETag is the MD5 of the very bytes
 * (it is, but for encrypted buckets: then they are sent anew). Two runs that publish the same file at the same time may
 * thus share an upload: when one completes it, the other finds the upload gone and the object there, and is content.
 *
 * Two locks: `reading` is held while a piece is read and an upload begun, `state` for a few instructions.
 */
#include "upload.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../ext/base/vs_pool.h"
#include "output.h"
#include "tool.h"
#include "transfer.h"

enum { DEFAULT_JOBS = 8, MIB = 1 << 20, MIN_PART = 16 * MIB, MAX_PARTS = 10000 };

typedef char etag[S3_ETAG_MAX];

/* One file under way. */
typedef struct sending {
  const upload_file *file;
  int fd;
  uint64_t part_size, n_parts;
  char *upload_id;      /* NULL: it goes whole */
  transfer_hash *hash;
  uint64_t next;        /* the piece to read; `reading` guards it */
  etag *etags;          /* of finished parts; before, of an earlier upload's */
  uint64_t *found;      /* sizes of an earlier upload's parts; 0: none */
  tool_list earlier;    /* ids of unfinished uploads */
  const char *newest;   /* of these */
  int64_t newest_began;
  int misfit;           /* it has parts of other sizes */
  uint64_t n_left;      /* pieces not sent yet; `state` guards what follows */
  int elsewhere;        /* another run completed it */
} sending;

typedef struct run {
  upload *u;
  size_t piece_max;
  pthread_mutex_t reading, state;
  size_t next_file;     /* `reading` guards these */
  sending *current;
  sending **open;       /* by the number of the file; NULL: not begun, or done */
  sending *damaged;     /* its upload is to be aborted when nobody sends parts of it any more */
  vs_rc rc;             /* of the first that failed; `state` guards it */
  vs_err err;
} run;

typedef struct piece { sending *s; uint64_t number; size_t n; } piece;

uint64_t upload_part_size(uint64_t size) {
  uint64_t least = (size + MAX_PARTS - 1) / MAX_PARTS;
  return least <= MIN_PART ? MIN_PART : (least + MIB - 1) / MIB * MIB;
}

/* The part size asked for, unless the file then had too many parts. */
static uint64_t part_size_of(const upload *u, uint64_t size) {
  return u->part_size && (size + u->part_size - 1) / u->part_size <= MAX_PARTS ? u->part_size : upload_part_size(size);
}

static size_t piece_bytes(const sending *s, uint64_t number) {
  uint64_t left = s->file->size - number * s->part_size;
  return (size_t)(left < s->part_size ? left : s->part_size);
}

/* ---- failing ---- */

static int has_failed(run *r) {
  pthread_mutex_lock(&r->state);
  int failed = r->rc != VS_OK;
  pthread_mutex_unlock(&r->state);
  return failed;
}

static void fail_run(run *r, vs_rc rc, const vs_err *err) {
  pthread_mutex_lock(&r->state);
  if (!r->rc) r->rc = rc, r->err = *err;
  pthread_mutex_unlock(&r->state);
}

/* ---- earlier uploads ---- */

static vs_rc keep_upload(void *ctx, const char *id, int64_t started, vs_err *err) {
  sending *s = ctx;
  (void)err;
  tool_list_add(&s->earlier, id);
  if (s->newest && started <= s->newest_began) return VS_OK;
  s->newest = s->earlier.items[s->earlier.n - 1], s->newest_began = started;
  return VS_OK;
}

static vs_rc keep_part(void *ctx, int number, uint64_t size, const char *tag, vs_err *err) {
  sending *s = ctx;
  (void)err;
  if (number < 1 || (uint64_t)number > s->n_parts || size != piece_bytes(s, (uint64_t)number - 1)) {
    s->misfit = 1;
    return VS_OK;
  }
  s->found[number - 1] = size;
  snprintf(s->etags[number - 1], S3_ETAG_MAX, "%s", tag);
  return VS_OK;
}

/* Goes on with the newest unfinished upload of the object, if it was cut into the same parts: radosgw completes none
 * that has others as well. Rights that do not reach that far, or a store that does not list uploads, cost nothing but
 * what was sent. */
static vs_rc begin_upload(run *r, sending *s, vs_err *err) {
  vs_err ignored = {0};
  s3_place *place = r->u->place;
  const char *key = s->file->key;
  s->etags = tool_alloc(s->n_parts, sizeof *s->etags), s->found = tool_alloc(s->n_parts, sizeof *s->found);
  vs_rc rc = s3_multipart_uploads(place, key, keep_upload, s, &ignored);
  if (!rc && s->newest) rc = s3_multipart_parts(place, key, s->newest, keep_part, s, &ignored);
  if (!rc && s->newest && !s->misfit) {
    s->upload_id = tool_format("%s", s->newest);
    return VS_OK;
  }
  memset(s->found, 0, s->n_parts * sizeof *s->found);
  return rc == VS_INTERRUPT ? vs_fail(err, rc, "interrupted") : s3_multipart_begin(place, key, &s->upload_id, err);
}

/* The object is there: what else was begun for it only costs. A run that is still at one finds the object. */
static void abort_others(run *r, const sending *s) {
  for (size_t i = 0; i < s->earlier.n; i++) {
    vs_err ignored = {0};
    if (strcmp(s->earlier.items[i], s->upload_id) &&
        s3_multipart_abort(r->u->place, s->file->key, s->earlier.items[i], &ignored))
      break;
  }
}

/* ---- reading ---- */

static void close_file(run *r, sending *s) {
  r->open[s->file - r->u->files] = NULL;
  if (s->fd >= 0) close(s->fd);
  transfer_hash_free(s->hash);
  tool_list_reset(&s->earlier);
  free(s->upload_id), free(s->etags), free(s->found), free(s);
}

static vs_rc open_file(run *r, size_t i, vs_err *err) {
  struct stat st;
  const upload_file *file = &r->u->files[i];
  sending *s = r->current = r->open[i] = tool_alloc(1, sizeof *s);
  *s = (sending){.file = file, .fd = open(file->path, O_RDONLY | O_CLOEXEC), .part_size = part_size_of(r->u, file->size)};
  s->n_parts = file->size ? (file->size + s->part_size - 1) / s->part_size : 1; /* an empty file is a piece, too */
  s->n_left = s->n_parts;
  if (s->fd < 0 || fstat(s->fd, &st)) return vs_fail(err, VS_IO, "%s: %s", file->path, strerror(errno));
  if ((uint64_t)st.st_size != file->size)
    return vs_corrupt(err, "%s: damaged: it has %lld bytes, %" PRIu64 " in the manifest; nothing of it was published",
                      file->path, (long long)st.st_size, file->size);
  if (!(s->hash = transfer_hash_new())) return vs_nomem(err);
  return s->n_parts > 1 ? begin_upload(r, s, err) : VS_OK;
}

static vs_rc read_piece(const sending *s, uint64_t number, uint8_t *buf, size_t n, vs_err *err) {
  for (size_t at = 0; at < n;) {
    ssize_t got = pread(s->fd, buf + at, n - at, (off_t)(number * s->part_size + at));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      return vs_fail(err, VS_IO, "%s: %s", s->file->path, got ? strerror(errno) : "cut short while it was read");
    at += (size_t)got;
  }
  return VS_OK;
}

/* Reads the next piece of the current file, which ends with its last one. */
static vs_rc read_next(run *r, uint8_t *buf, piece *p, vs_err *err) {
  sending *s = r->current;
  *p = (piece){s, s->next, piece_bytes(s, s->next)};
  vs_rc rc = read_piece(s, p->number, buf, p->n, err);
  if (rc) return rc;
  transfer_hash_add(s->hash, buf, p->n);
  if (++s->next < s->n_parts) return VS_OK;
  if (!transfer_hash_is(s->hash, s->file->checksum)) {
    r->damaged = s;
    return vs_corrupt(err, "%s: damaged: its checksum is not the one in the manifest; nothing of it was published",
                      s->file->path);
  }
  r->current = NULL;
  return VS_OK;
}

/* 0: there is none, or the run failed. */
static int take_piece(run *r, uint8_t *buf, piece *p) {
  vs_err err = {0};
  vs_rc rc = VS_OK;
  pthread_mutex_lock(&r->reading);
  int go = !has_failed(r) && (r->current || r->next_file < r->u->n_files);
  if (go && tool_stop(NULL)) rc = vs_fail(&err, VS_INTERRUPT, "interrupted");
  if (go && !rc && !r->current) rc = open_file(r, r->next_file++, &err);
  if (go && !rc) rc = read_next(r, buf, p, &err);
  if (rc) fail_run(r, rc, &err);
  pthread_mutex_unlock(&r->reading);
  return go && !rc;
}

/* ---- sending ---- */

static int is_elsewhere(run *r, sending *s) {
  pthread_mutex_lock(&r->state);
  int yes = s->elsewhere;
  pthread_mutex_unlock(&r->state);
  return yes;
}

/* The upload is gone: because another run completed it, or because somebody aborted it. */
static vs_rc look_elsewhere(run *r, sending *s, const vs_err *why, vs_err *err) {
  s3_meta meta;
  vs_err ignored = {0};
  if (s3_head(r->u->place, s->file->key, &meta, &ignored) || meta.size != s->file->size)
    return vs_fail(err, VS_IO, "%s; run the command again to begin anew", why->text);
  pthread_mutex_lock(&r->state);
  s->elsewhere = 1;
  pthread_mutex_unlock(&r->state);
  return VS_OK;
}

/* What the store has must have the right size. */
static vs_rc check_size(run *r, const sending *s, vs_err *err) {
  s3_meta meta;
  vs_rc rc = s3_head(r->u->place, s->file->key, &meta, err);
  if (rc || meta.size == s->file->size) return rc;
  char *name = s3_place_name(r->u->place, s->file->key);
  rc = vs_fail(err, VS_IO, "%s: the store says %" PRIu64 " bytes, %" PRIu64 " were sent", name ? name : s->file->key,
               meta.size, s->file->size);
  free(name);
  return rc;
}

static vs_rc send_whole(run *r, const piece *p, const uint8_t *buf, vs_err *err) {
  etag tag = "";
  vs_rc rc = s3_put(r->u->place, p->s->file->key, buf, p->n, 0, tag, err);
  return rc || transfer_is_md5(tag, buf, p->n) ? rc : check_size(r, p->s, err);
}

static vs_rc send_part(run *r, const piece *p, const uint8_t *buf, int *found, vs_err *err) {
  sending *s = p->s;
  vs_err why = {0};
  *found = is_elsewhere(r, s) || (s->found[p->number] == p->n && transfer_is_md5(s->etags[p->number], buf, p->n));
  if (*found) return VS_OK;
  vs_rc rc = s3_multipart_part(r->u->place, s->file->key, s->upload_id, (int)p->number + 1, buf, p->n,
                               s->etags[p->number], &why);
  if (rc == VS_NOTFOUND) rc = look_elsewhere(r, s, &why, err);
  else if (rc) vs_fail(err, rc, "%s", why.text);
  return rc;
}

static vs_rc complete(run *r, sending *s, vs_err *err) {
  vs_err why = {0};
  if (is_elsewhere(r, s)) return VS_OK;
  vs_rc rc = s3_multipart_finish(r->u->place, s->file->key, s->upload_id, s->etags, s->n_parts, NULL, &why);
  if (rc == VS_NOTFOUND) return look_elsewhere(r, s, &why, err);
  if (!rc) abort_others(r, s);
  return rc ? vs_fail(err, rc, "%s", why.text) : check_size(r, s, err);
}

/* Counts a piece that the store has; 1: it was the file's last. */
static int count_piece(run *r, const piece *p, int found) {
  upload *u = r->u;
  pthread_mutex_lock(&r->state);
  int last = --p->s->n_left == 0;
  if (found) u->n_reused += p->n;
  else u->n_sent += p->n;
  u->progress(u->ctx, p->n, !found);
  pthread_mutex_unlock(&r->state);
  return last;
}

static void send_piece(run *r, const piece *p, const uint8_t *buf) {
  vs_err err = {0};
  int found = 0;
  vs_rc rc = p->s->upload_id ? send_part(r, p, buf, &found, &err) : send_whole(r, p, buf, &err);
  if (!rc && count_piece(r, p, found)) {
    if (p->s->upload_id) rc = complete(r, p->s, &err);
    if (!rc) close_file(r, p->s);
  }
  if (rc) fail_run(r, rc, &err);
}

static void work(void *ctx, size_t worker) {
  run *r = ctx;
  piece p;
  vs_err err = {0};
  uint8_t *buf = malloc(r->piece_max + 1);
  (void)worker;
  if (!buf) fail_run(r, vs_nomem(&err), &err);
  while (buf && take_piece(r, buf, &p)) send_piece(r, &p, buf);
  free(buf);
}

/* ---- the whole ---- */

/* Requests at once that the memory allows; 0: it does not hold what was asked for. */
static size_t count_jobs(const upload *u, size_t piece_max, size_t n_pieces, vs_err *err) {
  char part[32], memory[32];
  uint64_t fit = u->memory / (piece_max ? piece_max : 1), jobs = u->jobs ? (uint64_t)u->jobs : DEFAULT_JOBS;
  if (jobs > n_pieces) jobs = n_pieces;
  if (jobs <= fit) return (size_t)jobs;
  if (fit && !u->jobs) return (size_t)fit;
  output_size(piece_max, part), output_size(u->memory, memory);
  if (fit)
    vs_fail(err, VS_INVALID,
            "%" PRIu64 " parts of %s at once need more than %s of memory: choose --jobs %" PRIu64 ", or more --memory",
            jobs, part, memory, fit);
  else
    vs_fail(err, VS_INVALID, "a part of %s needs more than %s of memory: choose --memory %" PRIu64 "M or more", part,
            memory, ((uint64_t)piece_max + MIB - 1) / MIB);
  return 0;
}

static void abort_damaged(run *r) {
  vs_err ignored = {0};
  if (!r->damaged || !r->damaged->upload_id || tool_stop(NULL)) return;
  if (s3_multipart_abort(r->u->place, r->damaged->file->key, r->damaged->upload_id, &ignored))
    tool_note("warning: the unfinished upload stays in the store: %s", ignored.text);
}

vs_rc upload_files(upload *u, vs_err *err) {
  run r = {.u = u, .reading = PTHREAD_MUTEX_INITIALIZER, .state = PTHREAD_MUTEX_INITIALIZER};
  size_t n_pieces = 0;
  for (size_t i = 0; i < u->n_files; i++) {
    uint64_t size = u->files[i].size, part = part_size_of(u, size);
    if ((size < part ? size : part) > r.piece_max) r.piece_max = (size_t)(size < part ? size : part);
    n_pieces += size ? (size_t)((size + part - 1) / part) : 1;
  }
  if (!n_pieces) return VS_OK;
  size_t jobs = count_jobs(u, r.piece_max, n_pieces, err);
  if (!jobs) return VS_INVALID;
  r.open = tool_alloc(u->n_files, sizeof *r.open);
  int64_t before = transfer_allow_time(jobs * (uint64_t)r.piece_max);
  vs_pool_run(jobs, (int)jobs, work, &r);
  transfer_reset_time(before);
  abort_damaged(&r);
  for (size_t i = 0; i < u->n_files; i++)
    if (r.open[i]) close_file(&r, r.open[i]);
  free(r.open);
  return r.rc ? vs_fail(err, r.rc, "%s", r.err.text) : VS_OK;
}
