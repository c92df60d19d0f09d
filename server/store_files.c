/*
 * store_files.c - see store_files.h. Called by store.c. Threads: the store's.
 */
#include "server/store_files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/files.h"

enum { RANDOM_BYTES = 16, RANDOM_HEX = 2 * RANDOM_BYTES };

static const char *const ending[] = {[IMAGE_PNG] = ".png", [IMAGE_JPEG] = ".jpg", [IMAGE_WEBP] = ".webp"};

int store_is_name(const char *name)
{
  if (strspn(name, "0123456789abcdef") != RANDOM_HEX)
    return 0;
  for (size_t i = 0; i < sizeof ending / sizeof *ending; i++)
    if (!strcmp(name + RANDOM_HEX, ending[i]))
      return 1;
  return 0;
}

int store_folder_open(struct store_folder *f, const char *dir, struct err *e)
{
  struct stat st;

  f->fd = -1;
  if ((size_t)snprintf(f->path, sizeof f->path, "%s/results", dir) >= sizeof f->path)
    return err_field(e, E_ARG, "state", "the path of the state folder is too long");
  if (files_make_folder(f->path, e))
    return e->code;
  f->fd = open(f->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
  if (f->fd < 0 || fstat(f->fd, &st) || files_sync_folder(f->path)) {
    err_field(e, files_error(errno), "state", "cannot use %s: %s", f->path, strerror(errno));
  } else if (st.st_mode & (S_IWGRP | S_IWOTH)) {
    err_field(e, E_FILE, "state", "others may write to %s: chmod 700 %s", f->path, f->path);
  } else {
    return 0;
  }
  store_folder_close(f);
  return e->code;
}

void store_folder_close(struct store_folder *f)
{
  if (f->fd >= 0)
    close(f->fd);
  f->fd = -1;
}

static void name_file(struct store_file *file)
{
  unsigned char random[RANDOM_BYTES], hash[32];
  char hex[RANDOM_HEX + 1];

  randombytes_buf(random, sizeof random);
  sodium_bin2hex(hex, sizeof hex, random, sizeof random);
  snprintf(file->name, sizeof file->name, "%s%s", hex, ending[file->format]);
  crypto_generichash(hash, sizeof hash, file->data, file->bytes, NULL, 0);
  sodium_bin2hex(file->digest, sizeof file->digest, hash, sizeof hash);
}

int store_folder_write(struct store_folder *f, struct store_file *file, struct err *e)
{
  int fd, failed;

  name_file(file);
  fd = openat(f->fd, file->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  failed = fd < 0 || files_write_all(fd, file->data, file->bytes) || fsync(fd);
  if (failed)
    err_field(e, files_error(errno), "results", "cannot write to %s: %s", f->path, files_error(errno) == E_FULL ? "the disk is full" : strerror(errno));
  if (fd >= 0 && close(fd) && !failed)
    failed = err_field(e, files_error(errno), "results", "cannot write to %s: %s", f->path, strerror(errno));
  if (!failed)
    return 0;
  store_folder_remove(f, file->name);
  file->name[0] = 0;
  return e->code;
}

int store_folder_sync(struct store_folder *f, struct err *e)
{
  return fsync(f->fd) ? err_field(e, files_error(errno), "results", "cannot write to %s: %s", f->path, strerror(errno)) : 0;
}

int store_folder_read(struct store_folder *f, const char *name, size_t bytes, int *fd, struct err *e)
{
  struct stat st;

  *fd = openat(f->fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (*fd < 0)
    return err_field(e, errno == ENOENT ? E_NOTFOUND : E_FILE, "name", "cannot read %s: %s", name, strerror(errno));
  if (!fstat(*fd, &st) && S_ISREG(st.st_mode) && (uint64_t)st.st_size == bytes)
    return 0;
  close(*fd);
  *fd = -1;
  return err_field(e, E_NOTFOUND, "name", "%s is damaged", name);
}

void store_folder_remove(struct store_folder *f, const char *name)
{
  if (name[0])
    unlinkat(f->fd, name, 0); /* what stays is named by no row, and store_open tries again */
}

int store_folder_clean(struct store_folder *f, int (*is_known)(void *arg, const char *name, struct err *e), void *arg, int *removed, struct err *e)
{
  DIR *dir = opendir(f->path);
  struct dirent *entry;
  int r = 0;

  *removed = 0;
  if (!dir)
    return err_field(e, E_FILE, "state", "cannot read %s: %s", f->path, strerror(errno));
  while (r >= 0 && (entry = readdir(dir))) {
    if (!store_is_name(entry->d_name))
      continue; /* not ours */
    r = is_known(arg, entry->d_name, e);
    if (r)
      continue;
    store_folder_remove(f, entry->d_name);
    ++*removed;
  }
  closedir(dir);
  return r < 0 ? e->code : 0;
}
