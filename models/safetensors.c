/*
 * safetensors.c - see safetensors.h.
 *
 * Called by checkpoint.c, by the adapter loader and by tests. A handle is built in one go by open_checked() and never changes
 * afterwards. Invariant: a handle that was given out holds only tensors whose bytes lie inside the mapping and belong to no
 * other tensor. Names live in the jansson tree, which the handle keeps.
 *
 * A mapping cannot survive a file that shrinks beneath it (the kernel answers with SIGBUS): model files are replaced by
 * rename, never rewritten in place.
 */
#include "models/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/json_load.h"

/* The format allows 100 MB. The largest published header of a diffusion model is under 1 MB; jansson needs some 20 times the
 * text, so this bound keeps a hostile header from taking gigabytes. */
enum { HEADER_MAX = 8 << 20, NAME_MAX_BYTES = 255 };

struct safetensors {
  char *path;
  const unsigned char *map; /* the whole file */
  size_t size;
  int is_mapped;            /* munmap at close */
  int fd;                   /* of the mapped file, to see whether somebody writes it */
  struct stat opened;       /* what it was */
  json_t *root;             /* keeps the names alive */
  const json_t *metadata;   /* inside root, or NULL */
  struct st_tensor *tensor; /* count entries, in name order */
  size_t count;
};

static const struct {
  const char *name;
  size_t size;
} dtypes[] = {
    [ST_BOOL] = {"BOOL", 1}, [ST_U8] = {"U8", 1},   [ST_I8] = {"I8", 1},   [ST_I16] = {"I16", 2}, [ST_U16] = {"U16", 2},
    [ST_F16] = {"F16", 2},   [ST_BF16] = {"BF16", 2}, [ST_I32] = {"I32", 4}, [ST_U32] = {"U32", 4}, [ST_F32] = {"F32", 4},
    [ST_F64] = {"F64", 8},   [ST_I64] = {"I64", 8}, [ST_U64] = {"U64", 8},
};

const char *st_dtype_name(enum st_dtype t)
{
  return dtypes[t].name;
}

size_t st_dtype_size(enum st_dtype t)
{
  return dtypes[t].size;
}

void st_printable(char *out, size_t cap, const char *s)
{
  size_t i;

  for (i = 0; s[i] && i + 1 < cap; i++)
    out[i] = s[i] >= ' ' && s[i] <= '~' ? s[i] : '?';
  out[i] = 0;
}

/* E_FILE that names the file and, unless NULL, the tensor. A very long path keeps its end, which tells files apart. */
__attribute__((format(printf, 4, 5)))
static int fail(const struct safetensors *st, const char *tensor, struct err *e, const char *fmt, ...)
{
  char what[200], name[sizeof e->field];
  size_t len = strlen(st->path);
  const char *path = len > 160 ? st->path + len - 160 : st->path;
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(what, sizeof what, fmt, ap);
  va_end(ap);
  if (!tensor)
    return err_field(e, E_FILE, path, "%s: %s", path, what);
  st_printable(name, sizeof name, tensor);
  return err_field(e, E_FILE, name[0] ? name : path, "%s: tensor \"%s\" %s", path, name, what);
}

/* ---- one entry of the header ---- */

static int parse_dtype(const struct safetensors *st, const char *name, const json_t *j, enum st_dtype *type, struct err *e)
{
  const char *s = json_string_value(j);
  char shown[24];

  if (!s)
    return fail(st, name, e, "has no dtype");
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
    if (!strcmp(s, dtypes[i].name)) {
      *type = (enum st_dtype)i;
      return 0;
    }
  st_printable(shown, sizeof shown, s);
  return fail(st, name, e, "has the unknown dtype \"%s\"", shown);
}

/* Fills nd, shape and bytes. A dimension of 0 is allowed by the format and makes the tensor empty; the others must still
 * multiply to something that fits, so that no reader of the shape can overflow. */
static int parse_shape(const struct safetensors *st, const json_t *j, struct st_tensor *t, struct err *e)
{
  int64_t count = 1, bytes;
  int is_empty = 0;

  if (!json_is_array(j))
    return fail(st, t->name, e, "has no shape");
  if (json_array_size(j) > ST_MAX_DIMS)
    return fail(st, t->name, e, "has %zu dimensions; at most %d are read", json_array_size(j), ST_MAX_DIMS);
  t->nd = (int)json_array_size(j);
  for (int i = 0; i < t->nd; i++) {
    const json_t *d = json_array_get(j, (size_t)i);

    if (!json_is_integer(d) || json_integer_value(d) < 0)
      return fail(st, t->name, e, "has a shape that is not a list of whole numbers");
    t->shape[i] = json_integer_value(d);
    is_empty |= t->shape[i] == 0;
    if (__builtin_mul_overflow(count, t->shape[i] ? t->shape[i] : 1, &count))
      return fail(st, t->name, e, "has a shape that overflows 64 bits");
  }
  if (__builtin_mul_overflow(count, (int64_t)st_dtype_size(t->type), &bytes))
    return fail(st, t->name, e, "has a shape that overflows 64 bits");
  t->bytes = is_empty ? 0 : (size_t)bytes;
  return 0;
}

/* The two ends must lie in the data section and be exactly dtype x shape apart. */
static int parse_offsets(const struct safetensors *st, const json_t *j, const unsigned char *data, size_t data_size,
                         struct st_tensor *t, struct err *e)
{
  const json_t *a = json_array_get(j, 0), *b = json_array_get(j, 1);
  json_int_t begin, end;

  if (!json_is_array(j) || json_array_size(j) != 2 || !json_is_integer(a) || !json_is_integer(b))
    return fail(st, t->name, e, "has no pair of data_offsets");
  begin = json_integer_value(a);
  end = json_integer_value(b);
  if (begin < 0 || end < begin)
    return fail(st, t->name, e, "has data_offsets out of order: [%lld, %lld]", (long long)begin, (long long)end);
  if ((uint64_t)end > data_size)
    return fail(st, t->name, e, "ends at byte %lld of the data, but the file holds %zu (is it truncated?)", (long long)end,
                data_size);
  if ((uint64_t)(end - begin) != t->bytes)
    return fail(st, t->name, e, "has %lld bytes where its dtype and shape need %zu", (long long)(end - begin), t->bytes);
  t->data = data + begin;
  return 0;
}

/* Names go into logs, errors and metrics, so they must be printable ASCII; every published checkpoint keeps to that. */
static int check_name(const struct safetensors *st, const char *name, struct err *e)
{
  size_t n = strlen(name);

  if (n == 0 || n > NAME_MAX_BYTES)
    return fail(st, name, e, "has a name of %zu bytes; 1 to %d are allowed", n, NAME_MAX_BYTES);
  for (size_t i = 0; i < n; i++)
    if (name[i] <= ' ' || name[i] > '~')
      return fail(st, name, e, "has a name with characters outside printable ASCII");
  return 0;
}

static int parse_tensor(const struct safetensors *st, const char *name, const json_t *j, const unsigned char *data,
                        size_t data_size, struct st_tensor *t, struct err *e)
{
  int rc;

  t->name = name;
  if ((rc = check_name(st, name, e)))
    return rc;
  if (!json_is_object(j))
    return fail(st, name, e, "is not described by an object");
  if ((rc = parse_dtype(st, name, json_object_get(j, "dtype"), &t->type, e)))
    return rc;
  if ((rc = parse_shape(st, json_object_get(j, "shape"), t, e)))
    return rc;
  if ((rc = parse_offsets(st, json_object_get(j, "data_offsets"), data, data_size, t, e)))
    return rc;
  if (json_object_size(j) != 3)
    return fail(st, name, e, "has fields other than dtype, shape and data_offsets");
  return 0;
}

/* ---- the header as a whole ---- */

static int check_metadata(struct safetensors *st, json_t *meta, struct err *e)
{
  const char *key;
  json_t *value;

  if (!json_is_object(meta))
    return fail(st, "__metadata__", e, "is not an object of strings");
  json_object_foreach(meta, key, value)
    if (!json_is_string(value))
      return fail(st, "__metadata__", e, "holds a value that is not a string");
  st->metadata = meta;
  return 0;
}

static int by_name(const void *a, const void *b)
{
  return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

/* Empty tensors sort before the one that starts where they lie. */
static int by_place(const void *a, const void *b)
{
  const struct st_tensor *x = a, *y = b;

  if (x->data != y->data)
    return (const unsigned char *)x->data < (const unsigned char *)y->data ? -1 : 1;
  if (x->bytes != y->bytes)
    return x->bytes < y->bytes ? -1 : 1;
  return by_name(a, b); /* so that the message does not depend on the sort */
}

/* The tensors must tile the data section: no byte in two of them, none in none. */
static int check_tiling(struct safetensors *st, const unsigned char *data, size_t data_size, struct err *e)
{
  size_t at = 0;

  if (st->count)
    qsort(st->tensor, st->count, sizeof *st->tensor, by_place);
  for (size_t i = 0; i < st->count; i++) {
    const struct st_tensor *t = &st->tensor[i];
    size_t begin = (size_t)((const unsigned char *)t->data - data);

    if (begin < at)
      return fail(st, t->name, e, "overlaps tensor \"%.60s\"", st->tensor[i - 1].name);
    if (begin > at)
      return fail(st, t->name, e, "leaves a hole of %zu bytes before it", begin - at);
    at = begin + t->bytes;
  }
  if (at != data_size)
    return fail(st, NULL, e, "%zu bytes follow the last tensor", data_size - at);
  return 0;
}

static int parse_entries(struct safetensors *st, const unsigned char *data, size_t data_size, struct err *e)
{
  const char *name;
  json_t *value;
  int rc;

  st->tensor = calloc(json_object_size(st->root) + 1, sizeof *st->tensor);
  if (!st->tensor)
    return err_set(e, E_NOMEM, "%s: no memory for the header", st->path);
  json_object_foreach(st->root, name, value) {
    if (!strcmp(name, "__metadata__"))
      rc = check_metadata(st, value, e);
    else
      rc = parse_tensor(st, name, value, data, data_size, &st->tensor[st->count++], e);
    if (rc)
      return rc;
  }
  if ((rc = check_tiling(st, data, data_size, e)))
    return rc;
  if (st->count)
    qsort(st->tensor, st->count, sizeof *st->tensor, by_name);
  return 0;
}

static int parse_header(struct safetensors *st, struct err *e)
{
  const unsigned char *p = st->map;
  uint64_t n = 0;
  json_error_t je;
  char shown[80];

  if (st->size < 8)
    return fail(st, NULL, e, "%zu bytes are too few for a safetensors file", st->size);
  for (int i = 7; i >= 0; i--)
    n = n << 8 | p[i];
  if (n > st->size - 8)
    return fail(st, NULL, e, "the header claims %llu bytes, but the file holds %zu (is it truncated?)", (unsigned long long)n,
                st->size - 8);
  if (n > HEADER_MAX)
    return fail(st, NULL, e, "the header of %llu bytes is over the limit of %d", (unsigned long long)n, HEADER_MAX);
  if (n < 2 || p[8] != '{')
    return fail(st, NULL, e, "the header is not a JSON object");
  st->root = json_load_whole((const char *)p + 8, (size_t)n, JSON_REJECT_DUPLICATES, &je);
  if (!st->root && !je.text[0]) /* no words: memory is short */
    return err_set(e, E_NOMEM, "%s: no memory for the header", st->path);
  if (!st->root) {
    st_printable(shown, sizeof shown, je.text); /* names the duplicate key, when that is the fault */
    return fail(st, NULL, e, "the header is not valid JSON: %s at byte %d", shown, je.position);
  }
  return parse_entries(st, p + 8 + n, st->size - 8 - (size_t)n, e);
}

/* ---- open and close ---- */

static int map_file(struct safetensors *st, struct err *e)
{
  struct stat sb;
  void *p;
  int rc = 0, fd = open(st->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* NONBLOCK: a fifo must not hold us up */

  if (fd < 0)
    return fail(st, NULL, e, "%s", strerror(errno));
  if (fstat(fd, &sb) || !S_ISREG(sb.st_mode)) {
    rc = fail(st, NULL, e, "not a regular file");
    goto out;
  }
  if (sb.st_size < 8) { /* an empty file cannot be mapped */
    rc = fail(st, NULL, e, "%lld bytes are too few for a safetensors file", (long long)sb.st_size);
    goto out;
  }
  p = mmap(NULL, (size_t)sb.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (p == MAP_FAILED) {
    rc = err_set(e, E_NOMEM, "%s: cannot map %lld bytes: %s", st->path, (long long)sb.st_size, strerror(errno));
    goto out;
  }
  st->map = p;
  st->size = (size_t)sb.st_size;
  st->is_mapped = 1;
  st->fd = fd;
  st->opened = sb;
  return 0;
out:
  close(fd);
  return rc;
}

/* p NULL: map the file called label. */
static int open_checked(struct safetensors **out, const void *p, size_t n, const char *label, struct err *e)
{
  struct safetensors *st = calloc(1, sizeof *st);
  int rc = 0;

  *out = NULL;
  if (!st || !(st->path = strdup(label))) {
    rc = err_set(e, E_NOMEM, "%s: no memory to open it", label);
    goto out;
  }
  st->map = p;
  st->size = n;
  if (!p && (rc = map_file(st, e)))
    goto out;
  if ((rc = parse_header(st, e)))
    goto out;
  *out = st;
  return 0;
out:
  st_close(st);
  return rc;
}

int st_open(struct safetensors **out, const char *path, struct err *e)
{
  return open_checked(out, NULL, 0, path, e);
}

int st_open_memory(struct safetensors **out, const void *p, size_t n, const char *label, struct err *e)
{
  return open_checked(out, p ? p : "", p ? n : 0, label, e);
}

void st_close(struct safetensors *st)
{
  if (!st)
    return;
  if (st->is_mapped) {
    munmap((void *)st->map, st->size);
    close(st->fd);
  }
  json_decref(st->root);
  free(st->tensor);
  free(st->path);
  free(st);
}

/* ---- reading ---- */

size_t st_count(const struct safetensors *st)
{
  return st->count;
}

const struct st_tensor *st_at(const struct safetensors *st, size_t i)
{
  return &st->tensor[i];
}

const struct st_tensor *st_find(const struct safetensors *st, const char *name)
{
  struct st_tensor key = {.name = name};

  return st->count ? bsearch(&key, st->tensor, st->count, sizeof key, by_name) : NULL;
}

const char *st_metadata(const struct safetensors *st, const char *key)
{
  return json_string_value(json_object_get(st->metadata, key));
}

const char *st_path(const struct safetensors *st)
{
  return st->path;
}

int st_unchanged(const struct safetensors *st, struct err *e)
{
  const struct stat *was = &st->opened;
  struct stat now;

  if (!st->is_mapped || (!fstat(st->fd, &now) && now.st_size == was->st_size && now.st_mtim.tv_sec == was->st_mtim.tv_sec &&
                         now.st_mtim.tv_nsec == was->st_mtim.tv_nsec))
    return 0;
  return err_field(e, E_FILE, st->path, "%s: was rewritten in place since it was opened; start again with the new file", st->path);
}

void st_forget(const struct safetensors *st, const struct st_tensor *t)
{
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin, end;

  if (!st->is_mapped || !t->bytes)
    return;
  begin = (uintptr_t)t->data & ~(page - 1);
  end = ((uintptr_t)t->data + t->bytes + page - 1) & ~(page - 1);
  madvise((void *)begin, end - begin, MADV_DONTNEED); /* only advice: nothing to do when refused */
}

/* ---- finite values ---- */

/* A float is not finite when all bits of its exponent are set: then exponent + its lowest bit carries into the sign's place.
 * Masking first keeps the carry inside the lane, so that one 64-bit addition tests four halves or two floats. The carries of
 * a block are OR-ed and looked at once: 0.17 s of a core per GB on plain x86-64, page faults of the mapping included. */
static int block_is_finite(const unsigned char *p, size_t words, uint64_t exponent, uint64_t lowest, uint64_t sign)
{
  uint64_t a = 0, b = 0, c = 0, d = 0, w[4];
  size_t i = 0;

  for (; i + 4 <= words; i += 4) {
    memcpy(w, p + i * 8, sizeof w);
    a |= (w[0] & exponent) + lowest;
    b |= (w[1] & exponent) + lowest;
    c |= (w[2] & exponent) + lowest;
    d |= (w[3] & exponent) + lowest;
  }
  for (; i < words; i++) {
    memcpy(w, p + i * 8, 8);
    a |= (w[0] & exponent) + lowest;
  }
  return ((a | b | c | d) & sign) == 0;
}

static int element_is_finite(const unsigned char *p, size_t width, uint64_t exponent)
{
  uint32_t v = 0;

  memcpy(&v, p, width); /* little-endian, like the file */
  return (v & (uint32_t)exponent) != (uint32_t)exponent;
}

int64_t st_nonfinite(const struct st_tensor *t)
{
  enum { BLOCK = 4096 };
  const unsigned char *p = t->data;
  size_t width = st_dtype_size(t->type), at = 0;
  uint32_t exponent, lanes; /* of one element; then over 64 bits */
  uint64_t every;

  switch (t->type) {
  case ST_F32: exponent = 0x7f800000; break;
  case ST_F16: exponent = 0x7c00; break;
  case ST_BF16: exponent = 0x7f80; break;
  default: return -1; /* whole numbers; F64 is refused before anybody asks */
  }
  lanes = exponent & (~exponent + 1); /* its lowest bit */
  every = width == 2 ? 0x0001000100010001u : 0x0000000100000001u;
  while (at < t->bytes) {
    size_t n = t->bytes - at < BLOCK ? t->bytes - at : BLOCK;

    if (n < 8 || n % 8 || !block_is_finite(p + at, n / 8, exponent * every, lanes * every, ((uint64_t)exponent + lanes) * every))
      for (size_t i = 0; i < n; i += width)
        if (!element_is_finite(p + at + i, width, exponent))
          return (int64_t)((at + i) / width);
    at += n;
  }
  return -1;
}
