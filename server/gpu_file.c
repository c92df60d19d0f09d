/*
 * gpu_file.c - see gpu_file.h.
 */
#include "server/gpu_file.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/own_folder.h"

enum { PATH = 4096, DESCRIPTION_MAX = 1 << 16, KNOWN_MAX = 200 };

static const char suffix[] = ".json";

static int is_name(const char *device)
{
  size_t n = strspn(device, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_");

  return n && !device[n];
}

/* The folder of descriptions: the first of the two that is there, or "". */
MUST_CHECK static int find_folder(char *path, size_t size, struct err *e)
{
  static const char *const places[] = {"../share/safelight/devices", "../../deploy/devices"};
  char own[PATH];
  int r = own_folder(own, sizeof own, e);

  *path = '\0';
  if (r)
    return r;
  for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
    int n = snprintf(path, size, "%s/%s", own, places[i]);
    if (n > 0 && (size_t)n < size && !access(path, X_OK))
      return 0;
    *path = '\0';
  }
  return 0;
}

static int is_description(const struct dirent *d)
{
  size_t n = strlen(d->d_name), end = sizeof suffix - 1;

  return n > end && !strcmp(d->d_name + n - end, suffix);
}

/* What a folder has, for people: "known are a100, h200". */
static void say_known(char *text, size_t size, const char *folder)
{
  struct dirent **entry = NULL;
  int n = *folder ? scandir(folder, &entry, is_description, alphasort) : 0;
  size_t at = (size_t)snprintf(text, size, "%s", n > 0 ? "known are " : "no description lies where the program was installed");

  for (int i = 0; i < n; i++) {
    const char *name = entry[i]->d_name;
    if (at < size)
      at += (size_t)snprintf(text + at, size - at, "%s%.*s", i ? ", " : "", (int)(strlen(name) - (sizeof suffix - 1)), name);
    free(entry[i]);
  }
  free(entry);
}

/* The file of a description, open; folder: of those that are known by name, or "". NULL with what there is instead. */
static FILE *open_file(char *path, size_t size, const char *folder, const char *device, struct err *e)
{
  int by_name = is_name(device), n = by_name ? snprintf(path, size, "%s/%s%s", folder, device, suffix) : snprintf(path, size, "%s", device);
  FILE *f = n < 0 || (size_t)n >= size || (by_name && !*folder) ? NULL : fopen(path, "rb");
  char known[KNOWN_MAX];
  int why = errno;

  if (f)
    return f;
  say_known(known, sizeof known, folder);
  if (n < 0 || (size_t)n >= size)
    (void)err_field(e, E_FILE, "--device", "the path of the description is longer than %zu bytes", size);
  else if (by_name && (!*folder || why == ENOENT))
    (void)err_field(e, E_FILE, "--device", "there is no GPU with the name \"%.60s\": %s; a path such as ./%.60s%s is read as it is", device, known, device,
                    suffix);
  else
    (void)err_field(e, E_FILE, "--device", "cannot read %.150s: %s; by name %s", path, strerror(why), known);
  return NULL;
}

int gpu_file_read(char **text, const char *device, struct err *e)
{
  char folder[PATH], path[2 * PATH], *p = NULL;
  size_t n = 0;
  FILE *f;
  int r;

  *text = NULL;
  r = find_folder(folder, sizeof folder, e);
  if (r)
    return r;
  f = open_file(path, sizeof path, folder, device, e);
  if (!f)
    return e->code;
  p = malloc(DESCRIPTION_MAX);
  if (!p)
    r = err_set(e, E_NOMEM, "out of memory for a description");
  else
    n = fread(p, 1, DESCRIPTION_MAX, f);
  if (!r && (ferror(f) || n == 0 || n == DESCRIPTION_MAX || memchr(p, 0, n)))
    r = err_field(e, E_FILE, "--device", "%.300s is not the description of a GPU: JSON of less than %d bytes", path, DESCRIPTION_MAX);
  fclose(f);
  if (r) {
    free(p);
    return r;
  }
  p[n] = '\0';
  *text = p;
  return 0;
}
