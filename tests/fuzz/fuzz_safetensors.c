/*
 * fuzz_safetensors.c - libFuzzer over models/safetensors.c: no bytes may crash the reader, and what it accepts must lie inside
 * the bytes and tile them.
 *
 * links: models/safetensors.c base/json_load.c base/err.c
 *
 * Every input is read twice: as it is, and with the length of the header set to where its first NUL is, since a mutator
 * seldom gets those eight bytes right. Seeds: tests/fuzz/seeds_safetensors.py FOLDER.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "models/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile uint8_t sink; /* so that the reads stay */

static void check_tensor(const struct safetensors *st, const struct st_tensor *t)
{
  const uint8_t *p = t->data;
  uint64_t count = 1;

  for (size_t i = 0; i < t->bytes; i++)
    sink ^= p[i];
  for (int i = 0; i < t->nd; i++)
    count *= (uint64_t)t->shape[i];
  if (t->nd > ST_MAX_DIMS || count * st_dtype_size(t->type) != t->bytes || st_find(st, t->name) != t)
    abort();
  if (st_nonfinite(t) >= (int64_t)count)
    abort();
  st_forget(st, t);
}

static void open_once(const uint8_t *data, size_t size)
{
  struct safetensors *st;
  struct err e = {0};
  uint64_t header = 0;
  size_t bytes = 0;
  int rc = st_open_memory(&st, data, size, "fuzz", &e);

  if (rc) {
    if (rc != E_FILE || e.code != E_FILE || !e.msg[0] || !e.field[0] || st)
      abort();
    for (const char *s = e.msg; *s; s++)
      if (*s < ' ' || *s > '~')
        abort();
    return;
  }
  for (size_t i = 0; i < st_count(st); i++) {
    check_tensor(st, st_at(st, i));
    bytes += st_at(st, i)->bytes;
  }
  memcpy(&header, data, 8);
  if (8 + header + bytes != size)
    abort();
  st_metadata(st, "format");
  st_close(st);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  const uint8_t *end;
  uint64_t header;
  uint8_t *copy;

  open_once(data, size);
  if (size < 10)
    return 0;
  copy = malloc(size); /* of its own size, so that ASan sees a read past the end */
  if (!copy)
    abort();
  memcpy(copy, data, size);
  end = memchr(copy + 8, 0, size - 8);
  header = end ? (uint64_t)(end - copy) - 8 : size - 8;
  memcpy(copy, &header, 8);
  open_once(copy, size);
  free(copy);
  return 0;
}
