/*
 * safety_store.c - see safety_store.h. Each file is written beside its place, made durable, and renamed into it, so that a crash leaves the old one
 * or the new one.
 *
 * Called by safety_loader.c, safety_rebuild.c and safety_commands.c. Threads: the loader's.
 */
#include "server/safety_store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "server/files.h"

enum { PATH_BYTES = 2 * POLICY_PATH };

#define HEX "0123456789abcdef"

static int put_file(const char *path, const char *p, size_t n, struct err *e)
{
  char new[PATH_BYTES + 8];
  int fd, r;

  snprintf(new, sizeof new, "%s.new", path);
  fd = open(new, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
  r = fd < 0 || files_write_all(fd, p, n) || fsync(fd) ? -1 : 0;
  if (fd >= 0 && close(fd))
    r = -1;
  if (!r)
    r = rename(new, path) || files_sync_folder(path) ? -1 : 0;
  if (!r)
    return 0;
  err_field(e, files_error(errno), "state", "cannot keep %s: %s", path, strerror(errno));
  unlink(new);
  return e->code;
}

int safety_store_bytes(const char *state, const char *digest, const struct adapter_files *b, struct err *e)
{
  char path[PATH_BYTES];

  snprintf(path, sizeof path, "%s/adapters", state);
  if (files_make_folder(path, e))
    return e->code;
  if (b->config.p) { /* PEFT keeps the scale beside the weights */
    snprintf(path, sizeof path, "%s/adapters/%s", state, digest);
    if (files_make_folder(path, e))
      return e->code;
    snprintf(path, sizeof path, "%s/adapters/%s/adapter_config.json", state, digest);
    if (put_file(path, b->config.p, b->config.len, e))
      return e->code;
  }
  snprintf(path, sizeof path, b->config.p ? "%s/adapters/%s/adapter_model.safetensors" : "%s/adapters/%s.safetensors", state, digest);
  if (put_file(path, b->file.p, b->file.len, e))
    return e->code;
  snprintf(path, sizeof path, "%s/adapters/%s.manifest.json", state, digest);
  if (b->manifest.p)
    return put_file(path, b->manifest.p, b->manifest.len, e);
  if (unlink(path) && errno != ENOENT)
    return err_field(e, E_FILE, "state", "cannot remove %s: %s", path, strerror(errno));
  return 0;
}

int safety_store_live(const char *state, const char *name, const char *digest, const char *seen, struct err *e)
{
  char path[PATH_BYTES], text[160];

  snprintf(path, sizeof path, "%s/adapters/%s.live", state, name);
  if (!digest) {
    if (unlink(path) && errno != ENOENT)
      return err_field(e, E_FILE, "state", "cannot remove %s: %s", path, strerror(errno));
    return 0;
  }
  snprintf(text, sizeof text, "%s\n%s\n", digest, seen);
  return put_file(path, text, strlen(text), e);
}

/* NAME.live, which is digest LF hash LF: 1 and the text with a NUL behind it, 0 when there is none or another thing in it, -1 when it cannot be read. */
static int read_live(const char *state, const char *name, char text[131])
{
  char path[PATH_BYTES];
  ssize_t n;
  int fd;

  snprintf(path, sizeof path, "%s/adapters/%s.live", state, name);
  fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return errno == ENOENT ? 0 : -1;
  n = read(fd, text, 130);
  close(fd);
  if (n < 0)
    return -1;
  text[n] = 0;
  return n == 130 && text[64] == '\n' && text[129] == '\n' && strspn(text, HEX) == 64;
}

void safety_store_find(const char *state, const char *name, const char *seen, char digest[65])
{
  char text[131];

  digest[0] = 0;
  if (read_live(state, name, text) == 1 && !memcmp(text + 65, seen, 64))
    snprintf(digest, 65, "%.64s", text);
}

int safety_store_named(const char *state, const char *name, char digest[65])
{
  char text[131];
  int r = read_live(state, name, text);

  digest[0] = 0;
  if (r == 1)
    snprintf(digest, 65, "%.64s", text);
  return r < 0 ? -1 : 0;
}

int safety_store_read(const char *state, const char *digest, const struct verifier *v, struct adapter_files *b, struct err *e)
{
  struct policy here = {0}; /* the store is a folder of adapters like the policy's */
  char path[PATH_BYTES], real[PATH_MAX];
  struct stat st;
  int is_folder;

  snprintf(path, sizeof path, "%s/adapters", state);
  if (!realpath(path, real) || strlen(real) >= sizeof here.adapter_dir)
    return err_field(e, E_FILE, "state", "cannot find %s", path);
  memcpy(here.adapter_dir, real, strlen(real) + 1);
  snprintf(path, sizeof path, "%s/%s", here.adapter_dir, digest);
  is_folder = !stat(path, &st) && S_ISDIR(st.st_mode);
  snprintf(path, sizeof path, is_folder ? "%.64s" : "%.64s.safetensors", digest);
  return verifier_read(v, &here, path, b, e);
}

/* ---- what is needed no longer ---- */

static int ends_in(const char *name, const char *ending)
{
  size_t n = strlen(name), k = strlen(ending);

  return n > k && !strcmp(name + n - k, ending);
}

/* 1 when name is a file or folder that safety_store_bytes made; its digest. */
static int is_bytes(const char *name, char digest[65])
{
  const char *rest = name + 64;

  if (strspn(name, HEX) != 64 || (*rest && strcmp(rest, ".safetensors") && strcmp(rest, ".manifest.json")))
    return 0;
  snprintf(digest, 65, "%.64s", name);
  return 1;
}

/* A PEFT adapter's folder; nothing else is in it. */
static int remove_folder(int at, const char *name)
{
  static const char *const inside[] = {"adapter_config.json", "adapter_model.safetensors", "adapter_config.json.new", "adapter_model.safetensors.new"};
  int dir = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

  if (dir < 0)
    return -1;
  for (size_t i = 0; i < sizeof inside / sizeof *inside; i++)
    unlinkat(dir, inside[i], 0);
  close(dir);
  return unlinkat(at, name, AT_REMOVEDIR);
}

/* 1 when the bytes of an adapter went with this entry of the folder. */
static int sweep_entry(int at, const char *entry, int (*is_needed)(void *arg, const char *digest, const char *name), void *arg)
{
  char digest[65], name[NAME_MAX + 1];

  if (ends_in(entry, ".new")) {
    unlinkat(at, entry, 0);
  } else if (ends_in(entry, ".live")) {
    snprintf(name, sizeof name, "%.*s", (int)(strlen(entry) - strlen(".live")), entry);
    if (!is_needed(arg, NULL, name))
      unlinkat(at, entry, 0);
  } else if (is_bytes(entry, digest) && !is_needed(arg, digest, NULL)) {
    if (!entry[64])
      return !remove_folder(at, entry);
    return !unlinkat(at, entry, 0) && ends_in(entry, ".safetensors");
  }
  return 0;
}

int safety_store_sweep(const char *state, int (*is_needed)(void *arg, const char *digest, const char *name), void *arg)
{
  char path[PATH_BYTES];
  struct dirent *d;
  int gone = 0;
  DIR *dir;

  snprintf(path, sizeof path, "%s/adapters", state);
  dir = opendir(path); /* NULL: nothing was ever kept */
  while (dir && (d = readdir(dir)))
    gone += sweep_entry(dirfd(dir), d->d_name, is_needed, arg);
  if (dir)
    closedir(dir);
  return gone;
}
