/*
 * policy.c - see policy.h. Files are opened first and asked where they lie afterwards: a check of the name before opening could be
 * outrun by whoever replaces a link.
 *
 * Called by safety_*.c, serve.c, generate.c. Threads: pure functions over the file system.
 */
#include "server/policy.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char bundled_model[] = "weights/emoji", bundled_policy[] = "weights/safety/policy.json";

enum { POLICY_BYTES = 4 << 20 };

static void hash_hex(char out[65], const void *p, size_t n)
{
  unsigned char h[32];

  crypto_generichash(h, sizeof h, p, n, NULL, 0); /* fails for impossible sizes only */
  sodium_bin2hex(out, 65, h, sizeof h);
}

/* ---- files inside adapter_dir ---- */

enum { OUTSIDE = -2 };

/* Opens path below dir; its real place must be dir or below. flags: O_RDONLY, O_DIRECTORY or O_PATH. OUTSIDE when it is elsewhere, -1 when it cannot be
 * opened. */
static int open_inside(const char *dir, const char *path, int flags, struct err *e)
{
  char name[2 * POLICY_PATH + 2], link[64], real[PATH_MAX];
  size_t n = strlen(dir);
  ssize_t got;
  int fd;

  snprintf(name, sizeof name, "%s/%s", dir, path);
  fd = open(name, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); /* a pipe must not hold us up */
  if (fd < 0) {
    err_field(e, errno == ENOENT ? E_NOTFOUND : E_FILE, path, "cannot open %s: %s", path, strerror(errno));
    return -1;
  }
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  got = readlink(link, real, sizeof real - 1);
  if (got > 0)
    real[got] = 0;
  if (got <= 0 || strncmp(real, dir, n) || (real[n] && real[n] != '/' && strcmp(dir, "/"))) {
    close(fd);
    err_field(e, E_FILE, path, "%s leads out of adapter_dir", path);
    return OUTSIDE;
  }
  return fd;
}

static int read_all(int fd, const char *path, struct buf *out, struct err *e)
{
  struct stat st;
  char *chunk;
  ssize_t n;
  enum { CHUNK = 1 << 18 };

  if (fstat(fd, &st) || !S_ISREG(st.st_mode))
    return err_field(e, E_FILE, path, "%s is not a file", path);
  if ((uint64_t)st.st_size > out->max)
    return err_field(e, E_FILE, path, "%s has %lld bytes; at most %zu are allowed", path, (long long)st.st_size, out->max);
  chunk = malloc(CHUNK);
  if (!chunk)
    return err_set(e, E_NOMEM, "out of memory to read %s", path);
  while ((n = read(fd, chunk, CHUNK)) > 0 || (n < 0 && errno == EINTR))
    if (n > 0 && buf_add(out, chunk, (size_t)n, e))
      break;
  if (n < 0)
    err_field(e, E_FILE, path, "cannot read %s: %s", path, strerror(errno));
  free(chunk);
  return n ? e->code : 0;
}

int policy_read_file(const struct policy *p, const char *path, struct buf *out, struct err *e)
{
  int fd = open_inside(p->adapter_dir, path, O_RDONLY, e), r;

  if (fd < 0)
    return e->code;
  r = read_all(fd, path, out, e);
  close(fd);
  return r;
}

static int can_open(const struct policy *p, const char *path, int flags)
{
  struct err ignored = {0};
  int fd = open_inside(p->adapter_dir, path, flags, &ignored);

  if (fd >= 0)
    close(fd);
  return fd >= 0;
}

int policy_is_folder(const struct policy *p, const char *path)
{
  return can_open(p, path, O_RDONLY | O_DIRECTORY);
}

int policy_has(const struct policy *p, const char *path)
{
  return can_open(p, path, O_PATH);
}

/* ---- the policy file ---- */

/* adapter_dir as an absolute path without links; relative ones start at the policy file. */
static int resolve_dir(struct policy *p, const char *path, struct err *e)
{
  const char *slash = strrchr(path, '/');
  char name[2 * POLICY_PATH + 2], real[PATH_MAX];

  if (*p->adapter_dir == '/' || !slash)
    snprintf(name, sizeof name, "%s", p->adapter_dir);
  else
    snprintf(name, sizeof name, "%.*s/%s", (int)(slash - path < POLICY_PATH ? slash - path : POLICY_PATH), path, p->adapter_dir);
  if (!realpath(name, real))
    return err_field(e, E_FILE, "adapter_dir", "adapter_dir: cannot find the folder %s: %s", name, strerror(errno));
  if (strlen(real) >= sizeof p->adapter_dir)
    return err_field(e, E_FILE, "adapter_dir", "adapter_dir: the path is longer than %d bytes", POLICY_PATH - 1);
  snprintf(p->adapter_dir, sizeof p->adapter_dir, "%.*s", POLICY_PATH - 1, real);
  return 0;
}

/* A file that is not there, or not good, is its adapter's failure; one outside is the policy's. */
static int check_places(const struct policy *p, struct err *e)
{
  for (int i = 0; i < p->n_adapters; i++) {
    struct err why = {0};
    char field[POLICY_NAME + 32];
    int fd = open_inside(p->adapter_dir, p->adapter[i].path, O_RDONLY, &why);
    snprintf(field, sizeof field, "adapters.%s.path", p->adapter[i].name);
    if (fd >= 0)
      close(fd);
    else if (fd == OUTSIDE)
      return err_field(e, E_FILE, field, "%s: %s", field, why.msg);
  }
  return 0;
}

int policy_read(struct policy **p, const char *path, struct err *e)
{
  struct buf text;
  char digest[65];
  int fd, r;

  *p = NULL;
  buf_init(&text, POLICY_BYTES);
  fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0)
    return err_field(e, E_FILE, "policy", "cannot read the policy %s: %s", path, strerror(errno));
  r = read_all(fd, path, &text, e);
  close(fd);
  if (!r && !(r = policy_decode(p, text.p ? text.p : "", text.len, e))) {
    hash_hex(digest, text.p, text.len);
    memcpy((*p)->digest, digest, sizeof digest);
    if ((r = resolve_dir(*p, path, e)) || (r = check_places(*p, e))) {
      policy_free(*p);
      *p = NULL;
    }
  }
  if (r)
    err_wrap(e, "%s", path);
  buf_close(&text);
  return r;
}

int policy_default_path(char out[POLICY_PATH], const char *model, struct err *e)
{
  char ours[PATH_MAX], theirs[PATH_MAX];

  if (realpath(bundled_model, ours) && realpath(model, theirs) && !strcmp(ours, theirs)) {
    snprintf(out, POLICY_PATH, "%s", bundled_policy);
    return 0;
  }
  return err_field(e, E_ARG, "policy",
                   "there is no safety policy for the model %.80s: write one (docs/operating.md, \"Policy\") and name it with --policy "
                   "FILE. To evaluate the model without any safety, the policy must say so in so many words: "
                   "{\"profiles\": {\"default\": {\"requires_nothing\": true}}}",
                   model);
}

int policy_authenticate(const struct policy *p, const char *token, int *profile, const char **tenant, struct err *e)
{
  char hash[65];
  int found = -1;

  *profile = 0;
  *tenant = "";
  if (!token || !p->n_tenants)
    return 0;
  hash_hex(hash, token, strlen(token));
  for (int i = 0; i < p->n_tenants && *token; i++) /* all of them, so that the time tells nothing */
    if (!sodium_memcmp(hash, p->tenant[i].key_hash, 64))
      found = i;
  if (found < 0)
    return err_field(e, E_AUTH, "Authorization", "this API key is not known here; send it as Authorization: Bearer KEY");
  *profile = p->tenant[found].profile;
  *tenant = p->tenant[found].name;
  return 0;
}
