/* input_hdf5_places.c - where the chunks of a dataset lie in the file.
 *
 * libhdf5 1.10 has no call that tells it without walking the index from the first chunk on (H5Dget_chunk_info). It has
 * H5Dread_chunk, which looks one chunk up, whatever the form of the index, and has its file driver read as many bytes as the
 * index says: into a buffer whose length it does not know, and in an unfiltered dataset H5Dget_chunk_storage_size tells another
 * number (one changed byte in a B-tree made it write beyond the buffer; test_input.c, test_damage).
 *
 * So the file is opened a second time, with a driver of our own on the same descriptor. It reads what libhdf5 needs to know and
 * leaves out the data: it notes which bytes were wanted. These numbers are checked by who reads them.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "input_hdf5_int.h"
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif

typedef struct lookup_file {
  H5FD_t base; /* first: libhdf5's */
  int fd;
  haddr_t eoa, eof;
} lookup_file;

/* All guarded by the lock of libhdf5. */
static hid_t driver = -1;
static int open_fd = -1;          /* what the driver's next open is to use */
static input_h5_place *noted;     /* where the driver's next read of data is to be noted; NULL: it fails */

static H5FD_t *lookup_open(const char *name, unsigned flags, hid_t access, haddr_t max) {
  lookup_file *f;
  struct stat st;
  (void)name, (void)access, (void)max;
  if (flags & H5F_ACC_RDWR || open_fd < 0 || fstat(open_fd, &st)) return NULL;
  f = calloc(1, sizeof *f);
  if (!f) return NULL;
  f->fd = fcntl(open_fd, F_DUPFD_CLOEXEC, 0);
  f->eof = (haddr_t)st.st_size;
  if (f->fd >= 0) return &f->base;
  free(f);
  return NULL;
}

static herr_t lookup_close(H5FD_t *file) {
  lookup_file *f = (lookup_file *)file;
  close(f->fd);
  free(f);
  return 0;
}

static herr_t lookup_query(const H5FD_t *file, unsigned long *flags) {
  (void)file;
  *flags = H5FD_FEAT_ACCUMULATE_METADATA_READ | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
  return 0;
}

static haddr_t lookup_eoa(const H5FD_t *file, H5FD_mem_t type) {
  (void)type;
  return ((const lookup_file *)file)->eoa;
}
static herr_t lookup_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t addr) {
  (void)type;
  ((lookup_file *)file)->eoa = addr;
  return 0;
}
static haddr_t lookup_eof(const H5FD_t *file, H5FD_mem_t type) {
  (void)type;
  return ((const lookup_file *)file)->eof;
}

static herr_t lookup_read(H5FD_t *file, H5FD_mem_t type, hid_t transfer, haddr_t addr, size_t size, void *buf) {
  lookup_file *f = (lookup_file *)file;
  (void)transfer;
  if (type == H5FD_MEM_DRAW) {
    if (!noted) return -1;
    noted->off = addr, noted->size = size;
    return 0;
  }
  if (addr > f->eof || size > f->eof - addr) return -1;
  return input_pread(f->fd, "", buf, size, addr, NULL) ? -1 : 0;
}

static herr_t lookup_write(H5FD_t *file, H5FD_mem_t type, hid_t transfer, haddr_t addr, size_t size, const void *buf) {
  (void)file, (void)type, (void)transfer, (void)addr, (void)size, (void)buf;
  return -1;
}

static const H5FD_class_t lookup_class = {
#if H5_VERSION_GE(1, 13, 0)
    .version = H5FD_CLASS_VERSION,
    .value = (H5FD_class_value_t)511, /* of those that nobody has registered */
#endif
    .name = "vecshard-lookup",
    .maxaddr = (haddr_t)INT64_MAX,
    .fc_degree = H5F_CLOSE_STRONG,
    .open = lookup_open,
    .close = lookup_close,
    .query = lookup_query,
    .get_eoa = lookup_eoa,
    .set_eoa = lookup_set_eoa,
    .get_eof = lookup_eof,
    .read = lookup_read,
    .write = lookup_write,
};

/* The file once more, with that driver; opened when first needed. < 0: it cannot be had. */
static hid_t lookup_of(input_h5_file *f, int fd) {
  hid_t access;
  if (f->lookup >= 0) return f->lookup;
  if (driver < 0 || H5Iget_type(driver) != H5I_VFL) driver = H5FDregister(&lookup_class); /* the host may have closed libhdf5 */
  access = driver < 0 ? -1 : H5Pcreate(H5P_FILE_ACCESS);
  if (access < 0) return -1;
  open_fd = fd;
  if (H5Pset_driver(access, driver, NULL) >= 0 && H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) >= 0)
    f->lookup = H5Fopen(f->path, H5F_ACC_RDONLY, access);
  open_fd = -1;
  H5Pclose(access);
  return f->lookup;
}

hid_t input_h5_places_open(input_h5_file *f, const input_h5_dataset *d) {
  hid_t file = lookup_of(f, d->fd);
#if H5_VERSION_GE(1, 12, 0)
  H5O_info2_t info;
  if (file < 0 || H5Oget_info3(d->id, &info, H5O_INFO_BASIC) < 0) return -1;
  return H5Oopen_by_token(file, info.token);
#else
  H5O_info_t info;
  if (file < 0 || H5Oget_info2(d->id, &info, H5O_INFO_BASIC) < 0) return -1;
  return H5Oopen_by_addr(file, info.addr);
#endif
}

int input_h5_place_of(hid_t places, const hsize_t at[2], input_h5_place *p) {
  unsigned char nothing;
  hsize_t size;
  int found = input_h5_chunk_size(places, at, &size), failed;
  *p = (input_h5_place){0};
  if (found <= 0) return found;
  noted = p;
  failed = H5Dread_chunk(places, H5P_DEFAULT, at, &p->mask, &nothing) < 0; /* nothing is written there */
  noted = NULL;
  return failed || !p->size ? -1 : 1;
}
