/*
 * files.c - see files.h. Called by safety_store.c and store_files.c. Threads: any.
 */
#include "server/files.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int files_write_all(int fd, const void *bytes, size_t n)
{
  const char *p = bytes;

  while (n) {
    ssize_t done = write(fd, p, n);
    if (done < 0 && errno == EINTR)
      continue;
    if (!done)
      errno = ENOSPC; /* no file does this; a device may */
    if (done <= 0)
      return -1;
    p += done;
    n -= (size_t)done;
  }
  return 0;
}

int files_sync_folder(const char *path)
{
  char folder[PATH_MAX];
  const char *slash = strrchr(path, '/');
  int fd, r, why;

  if (!slash || (size_t)(slash - path) >= sizeof folder) {
    errno = EINVAL;
    return -1;
  }
  snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
  fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    return -1;
  r = fsync(fd);
  why = errno;
  close(fd);
  errno = why;
  return r;
}

int files_make_folder(const char *path, struct err *e)
{
  if (mkdir(path, 0700) && errno != EEXIST)
    return err_field(e, files_error(errno), "state", "cannot make %s: %s", path, strerror(errno));
  return 0;
}

int files_error(int number)
{
  return number == ENOSPC || number == EDQUOT || number == EFBIG ? E_FULL : E_FILE;
}
