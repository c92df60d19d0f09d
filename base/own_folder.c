/*
 * own_folder.c - see own_folder.h.
 */
#include "base/own_folder.h"

#include <string.h>
#include <unistd.h>

int own_folder(char *path, size_t size, struct err *e)
{
  ssize_t n = readlink("/proc/self/exe", path, size - 1);
  char *slash;

  path[n > 0 && (size_t)n < size - 1 ? n : 0] = '\0'; /* one that fills it may be cut off */
  slash = strrchr(path, '/');
  if (!slash)
    return err_set(e, E_DEVICE, "the program's own folder is not known, so that nothing is found beside it");
  *slash = '\0';
  return 0;
}
