/*
 * adapter.c - see adapter.h: from a path or bytes to a checked list of deltas.
 *
 * The file is read once and completely, with its size and time checked before and after, and everything is decided on those bytes: who
 * replaces the file meanwhile changes nothing. A file that is refused leaves nothing behind.
 *
 * Called by server/, merge.c, tests. Threads: no state.
 */
#include "models/adapter.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "models/adapter_impl.h"

enum { HASH = 32, CONFIG_BYTES = 1 << 20 };

static const char peft_weights[] = "adapter_model.safetensors", peft_config[] = "adapter_config.json",
                  diffusers_weights[] = "pytorch_lora_weights.safetensors";

void adapter_bounds_default(struct adapter_bounds *b)
{
  *b = (struct adapter_bounds){.max_rank = 1024, .max_norm_ratio = 4, .max_bytes = (size_t)4 << 30};
}

/* ---- bytes ---- */

/* The end of a path, so that a long one leaves room for the message. */
static const char *tail(const char *path)
{
  size_t n = strlen(path);

  return n > 160 ? path + n - 160 : path;
}

static int file_fail(const char *path, struct err *e, const char *what)
{
  return err_field(e, E_FILE, tail(path), "%s: %s", tail(path), what);
}

/* Exactly st->st_size bytes, and then the end. */
static int read_exactly(int fd, const struct stat *st, unsigned char *p, const char *path, struct err *e)
{
  size_t n = (size_t)st->st_size, at = 0;
  struct stat after;
  ssize_t got;
  char one;

  while (at < n) {
    got = read(fd, p + at, n - at);
    if (got < 0 && errno == EINTR)
      continue;
    if (got < 0)
      return file_fail(path, e, strerror(errno));
    if (!got)
      return file_fail(path, e, "became shorter while it was read; write adapters beside their place and rename them");
    at += (size_t)got;
  }
  if (read(fd, &one, 1) != 0 || fstat(fd, &after) || after.st_size != st->st_size || after.st_mtim.tv_sec != st->st_mtim.tv_sec ||
      after.st_mtim.tv_nsec != st->st_mtim.tv_nsec)
    return file_fail(path, e, "changed while it was read; write adapters beside their place and rename them");
  return 0;
}

/* The whole regular file `name` in the folder dir (or AT_FDCWD), with a NUL behind it. *p is the caller's after success. */
static int read_file(int dir, const char *name, const char *path, size_t max, unsigned char **p, size_t *n, struct err *e)
{
  int code = 0, fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* NONBLOCK: a fifo must not hold us up */
  struct stat st;

  *p = NULL;
  if (fd < 0)
    return file_fail(path, e, strerror(errno));
  if (fstat(fd, &st) || !S_ISREG(st.st_mode))
    code = file_fail(path, e, "is no regular file");
  else if ((uint64_t)st.st_size > max)
    code = err_field(e, E_FILE, tail(path), "%s: holds %lld bytes; at most %zu are read", tail(path), (long long)st.st_size, max);
  else if (!(*p = malloc((size_t)st.st_size + 1)))
    code = err_set(e, E_NOMEM, "%s: no memory for %lld bytes", tail(path), (long long)st.st_size);
  else
    code = read_exactly(fd, &st, *p, path, e);
  close(fd);
  if (code) {
    free(*p);
    *p = NULL;
    return code;
  }
  (*p)[st.st_size] = 0;
  *n = (size_t)st.st_size;
  return 0;
}

/* The last part of the path without ".safetensors", printable. */
static void name_of(char out[64], const char *path)
{
  size_t n = strlen(path), begin, len;
  char text[64];

  while (n > 1 && path[n - 1] == '/')
    n--;
  for (begin = n; begin && path[begin - 1] != '/'; begin--)
    ;
  len = n - begin;
  if (len > 12 && !strncmp(path + n - 12, ".safetensors", 12))
    len -= 12;
  snprintf(text, sizeof text, "%.*s", (int)(len < 63 ? len : 63), path + begin);
  st_printable(out, 64, text);
}

/* A folder as PEFT or diffusers writes it. */
static int read_folder(struct adapter_bytes *b, int dir, const char *path, size_t max, struct err *e)
{
  int is_peft = !faccessat(dir, peft_weights, F_OK, 0), is_diffusers = !faccessat(dir, diffusers_weights, F_OK, 0), code;
  unsigned char *config;

  if (is_peft == is_diffusers)
    return file_fail(path, e, is_peft ? "holds both adapter_model.safetensors and pytorch_lora_weights.safetensors; name one of them"
                                      : "holds neither adapter_model.safetensors nor pytorch_lora_weights.safetensors");
  code = read_file(dir, is_peft ? peft_weights : diffusers_weights, path, max, &b->p, &b->n, e);
  if (code || !is_peft)
    return code;
  code = read_file(dir, peft_config, peft_config, CONFIG_BYTES, &config, &b->config_n, e);
  if (code)
    return err_wrap(e, "%.150s", tail(path));
  b->config = (char *)config;
  if (memchr(b->config, 0, b->config_n))
    return file_fail(peft_config, e, "holds a zero byte");
  return 0;
}

int adapter_bytes_read(struct adapter_bytes *b, const char *path, size_t max, struct err *e)
{
  int code, dir = open(path, O_RDONLY | O_CLOEXEC | O_DIRECTORY);

  *b = (struct adapter_bytes){0};
  name_of(b->name, path);
  code = dir < 0 ? read_file(AT_FDCWD, path, path, max, &b->p, &b->n, e) : read_folder(b, dir, path, max, e);
  if (dir >= 0)
    close(dir);
  if (code)
    adapter_bytes_free(b);
  return code;
}

void adapter_bytes_free(struct adapter_bytes *b)
{
  free(b->p);
  free(b->config);
  *b = (struct adapter_bytes){0};
}

int adapter_digest(char out[65], const void *p, size_t n, const char *config, struct err *e)
{
  crypto_generichash_state h;
  unsigned char sum[HASH];

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  crypto_generichash_init(&h, NULL, 0, HASH);
  crypto_generichash_update(&h, p, n);
  if (config) /* a safetensors file says itself where it ends, so nothing need stand between */
    crypto_generichash_update(&h, (const unsigned char *)config, strlen(config));
  crypto_generichash_final(&h, sum, HASH);
  sodium_bin2hex(out, 65, sum, HASH);
  return 0;
}

/* ---- deltas ---- */

void adapter_format_name(char out[32], const struct adapter_groups *g, int has_config)
{
  static const char *const names[] = {[NAME_DIFFUSERS] = "diffusers", [NAME_BARE] = "diffusers", [NAME_PROCESSOR] = "processor",
                                      [NAME_PEFT] = "peft", [NAME_KOHYA] = "kohya", [NAME_SGM] = "kohya-sgm",
                                      [NAME_LYCORIS] = "lycoris", [NAME_LDM] = "ldm"};
  int i, style = 0, family = 0, kinds = 0;

  for (i = 1; i < NAME_STYLES; i++)
    style = g->styles[i] > g->styles[style] ? i : style;
  for (i = 0; i < FAMILIES; i++) {
    family = g->families[i] > g->families[family] ? i : family;
    kinds += g->families[i] > 0;
  }
  if (family == FAMILY_OVERLAY && kinds == 1)
    snprintf(out, 32, "overlay");
  else if (family == FAMILY_LORA && kinds == 1)
    snprintf(out, 32, "%s", has_config ? "peft" : names[style]);
  else
    snprintf(out, 32, "%s %s", has_config ? "peft" : names[style], kinds == 1 ? adapter_family_name((enum adapter_family)family) : "mixed");
}

/* PEFT's own layout has its scale beside the file; without it any scale would be a guess. */
static int check_peft(const struct adapter_groups *g, const struct adapter *a, const char *config, struct err *e)
{
  int i;

  for (i = 0; i < g->n && g->styles[NAME_PEFT] && !config; i++)
    if (a->delta[i].rule == SCALE_NONE && g->group[i].family == FAMILY_LORA)
      return adapter_fail(g->group[i].part[ROLE_DOWN], e, "is in PEFT's layout, whose scale stands in adapter_config.json: "
                                                          "name the folder that holds both");
  return 0;
}

static int64_t numbers_in(const struct adapter_group *g)
{
  int64_t n = 0, k;
  int r, i;

  for (r = 0; r < ROLES; r++) {
    if (!g->part[r] || r == ROLE_ALPHA || r == ROLE_SCALE)
      continue;
    for (k = 1, i = 0; i < g->part[r]->nd; i++)
      k *= g->part[r]->shape[i];
    n += k;
  }
  return n;
}

static int build(struct adapter *a, const struct adapter_groups *g, const struct adapter_scale *scale, const char *config,
                 const struct generation *base, const struct adapter_bounds *bounds, struct err *e)
{
  int i, code;

  a->delta = calloc((size_t)g->n + 1, sizeof *a->delta);
  if (!a->delta)
    return err_set(e, E_NOMEM, "no memory for an adapter");
  for (i = 0; i < g->n; i++) {
    const struct site *s = &base->site[g->group[i].site];

    a->n = i + 1;
    code = adapter_delta_build(&a->delta[i], &g->group[i], s, scale, bounds, e);
    if (code)
      return code;
    a->params += numbers_in(&g->group[i]);
    a->max_rank = a->delta[i].rank > a->max_rank ? a->delta[i].rank : a->max_rank;
    a->targets_text |= !strncmp(s->name, "text_encoder", 12);
  }
  adapter_format_name(a->format, g, config != NULL);
  return check_peft(g, a, config, e);
}

int adapter_open_memory(struct adapter **adapter, const char *name, const void *p, size_t bytes, const char *config,
                        const struct adapter_names *names, const struct adapter_bounds *bounds, struct err *e)
{
  struct adapter *a = calloc(1, sizeof *a);
  struct safetensors *st = NULL;
  struct adapter_groups g = {0};
  struct adapter_scale *scale = NULL;
  int code;

  *adapter = NULL;
  if (!a)
    return err_set(e, E_NOMEM, "no memory for an adapter");
  st_printable(a->name, sizeof a->name, name);
  if (bytes > bounds->max_bytes) {
    code = err_field(e, E_FILE, a->name, "%s: holds %zu bytes; at most %zu are read", a->name, bytes, bounds->max_bytes);
    goto out;
  }
  code = adapter_digest(a->digest, p, bytes, config, e);
  if (!code)
    code = st_open_memory(&st, p, bytes, a->name, e);
  if (!code)
    code = adapter_groups_read(&g, st, names, e);
  if (!code)
    code = adapter_scale_read(&scale, st, config, e);
  if (!code)
    code = build(a, &g, scale, config, adapter_names_base(names), bounds, e);
out:
  adapter_scale_free(scale);
  adapter_groups_free(&g);
  st_close(st);
  if (code) {
    adapter_close(a);
    return code;
  }
  *adapter = a;
  return 0;
}

int adapter_open(struct adapter **a, const char *path, const struct adapter_names *names, const struct adapter_bounds *bounds,
                 struct err *e)
{
  struct adapter_bytes b;
  int code;

  *a = NULL;
  code = adapter_bytes_read(&b, path, bounds->max_bytes, e);
  if (code)
    return code;
  code = adapter_open_memory(a, b.name, b.p, b.n, b.config, names, bounds, e);
  adapter_bytes_free(&b);
  return code;
}

void adapter_close(struct adapter *a)
{
  int i;

  if (!a)
    return;
  for (i = 0; i < a->n; i++)
    adapter_delta_free(&a->delta[i]);
  free(a->delta);
  free(a);
}

const struct delta *adapter_at(const struct adapter *a, int site)
{
  int lo = 0, hi = a->n;

  while (lo < hi) {
    int mid = lo + (hi - lo) / 2;

    if (a->delta[mid].site < site)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo < a->n && a->delta[lo].site == site ? &a->delta[lo] : NULL;
}
