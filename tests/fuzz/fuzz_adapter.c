/*
 * fuzz_adapter.c - libFuzzer over adapter_open_memory: no bytes may crash the reader, and what it accepts must be whole: sites in order, factors
 * of the right kind, finite, and a change of the weight that can be computed.
 *
 * links: models/adapter.c models/adapter_read.c models/adapter_scale.c models/adapter_forms.c models/adapter_names.c models/delta.c
 * links: models/safetensors.c models/config_read.c models/generation.c models/checkpoint.c models/synth.c base/json_load.c base/err.c
 *
 * The last byte of an input says how long an adapter_config.json stands before it (0: none). Every input is read twice: as it is, and with the
 * length of the header set to where its first NUL is. Seeds: tests/fuzz/seeds_adapter.py FOLDER.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "models/adapter.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SITES = 6, MOST = 8 * 8 * 9 };

/* The layers that the seeds touch, by their names in tests/golden/adapters, tiny. */
static struct site sites[SITES] = {
    {.name = (char *)"unet.a.attn1.to_q", .kind = WEIGHT_LINEAR, .out = 4, .in = 8},
    {.name = (char *)"unet.a.attn1.to_out.0", .kind = WEIGHT_LINEAR, .out = 8, .in = 8, .has_bias = 1},
    {.name = (char *)"unet.conv_in", .kind = WEIGHT_CONV, .out = 8, .in = 4, .kh = 3, .kw = 3, .has_bias = 1},
    {.name = (char *)"unet.norm", .kind = WEIGHT_NORM, .out = 8, .in = 1, .has_bias = 1},
    {.name = (char *)"unet.conv_out", .kind = WEIGHT_CONV, .out = 4, .in = 8, .kh = 3, .kw = 3, .has_bias = 1},
    {.name = (char *)"text_encoder.t.self_attn.q_proj", .kind = WEIGHT_LINEAR, .out = 8, .in = 8, .has_bias = 1},
};
static struct generation base = {.site = sites, .n = SITES};
static struct adapter_names *names;

static void check(const struct adapter *a)
{
  static float w0[MOST], w[MOST], bias0[8], bias[8];

  if (a->n < 1 || strlen(a->digest) != 64 || !a->format[0])
    abort();
  for (int i = 0; i < MOST; i++)
    w0[i] = w[i] = 1 + (float)(i % 7);
  for (int i = 0; i < a->n; i++) {
    const struct delta *d = &a->delta[i];

    if (d->site < 0 || d->site >= SITES || (i && d->site <= a->delta[i - 1].site) || adapter_at(a, d->site) != d)
      abort();
    if (!(d->scale > 0) || (d->kind == DELTA_LOWRANK) != (d->rank > 0 && !d->magnitude) || (d->kind == DELTA_DORA) != (d->magnitude != NULL))
      abort();
    if (!(delta_norm(d, &sites[d->site], w0) < HUGE_VAL))
      abort();
    delta_apply(d, &sites[d->site], w0, bias0, 0.5f, w, bias);
  }
}

static void open_once(const uint8_t *data, size_t size, const char *config)
{
  struct adapter_bounds bounds;
  struct adapter *a;
  struct err e = {0};
  int code;

  adapter_bounds_default(&bounds);
  bounds.max_rank = 16;
  code = adapter_open_memory(&a, "fuzz", data, size, config, names, &bounds, &e);
  if (!code) {
    check(a);
    adapter_close(a);
    return;
  }
  if (code != E_FILE || e.code != E_FILE || !e.msg[0] || !e.field[0] || a)
    abort();
  for (const char *s = e.msg; *s; s++)
    if (*s < ' ' || *s > '~')
      abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  size_t config_n = size ? data[size - 1] : 0;
  const uint8_t *end;
  uint64_t header;
  char config[256];
  uint8_t *copy;

  if (!names && adapter_names_new(&names, &base, 2, NULL))
    abort();
  if (!size || config_n + 1 > size)
    return 0;
  size -= config_n + 1;
  memcpy(config, data + size, config_n);
  config[config_n] = 0;
  copy = malloc(size + 1); /* of its own size, so that ASan sees a read past the end */
  if (!copy)
    abort();
  memcpy(copy, data, size);
  open_once(copy, size, config_n ? config : NULL);
  if (size >= 10) {
    end = memchr(copy + 8, 0, size - 8);
    header = end ? (uint64_t)(end - copy) - 8 : size - 8;
    memcpy(copy, &header, 8);
    open_once(copy, size, config_n ? config : NULL);
  }
  free(copy);
  return 0;
}
