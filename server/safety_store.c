/*
 * safety_store.c - see safety_store.h. Each file is written beside its place, made durable, and renamed into it, so that a crash leaves the old one
 * or the new one.
 *
 * Called by safety_rebuild.c and safety_commands.c. Threads: the loader's.
 */
#include "server/safety_store.h"

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

int safety_store_bytes(const char *state, const char *digest, const struct adapter_bytes *b, struct err *e)
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

void safety_store_find(const char *state, const char *name, const char *seen, char digest[65])
{
  char path[PATH_BYTES], text[131] = "";
  ssize_t n;
  int fd;

  digest[0] = 0;
  snprintf(path, sizeof path, "%s/adapters/%s.live", state, name);
  fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return;
  n = read(fd, text, sizeof text - 1);
  close(fd);
  if (n == 130 && text[64] == '\n' && text[129] == '\n' && !memcmp(text + 65, seen, 64) &&
      strspn(text, "0123456789abcdef") == 64) {
    memcpy(digest, text, 64);
    digest[64] = 0;
  }
}

int safety_store_read(const char *state, const char *digest, const struct verifier *v, struct adapter_bytes *b, struct err *e)
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
