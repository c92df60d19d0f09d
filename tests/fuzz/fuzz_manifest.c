/*
 * fuzz_manifest.c - libFuzzer over models/manifest.c: no bytes may crash the reader, what it refuses is told in printable words with a
 * field, and what it accepts holds numbers that are finite, and survives being held against an adapter.
 *
 * links: models/manifest.c models/safetensors.c base/json_load.c base/err.c base/buf.c
 *
 * Seeds: tests/fuzz/seeds_manifest.py FOLDER.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "models/manifest_parts.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* manifest_check asks the model for these two things alone; the engine itself stays out of this program. */
static struct site table[] = {{.name = (char *)"unet.a.attn1.to_q", .kind = WEIGHT_LINEAR, .out = 2, .in = 2}};
static struct generation base = {.site = table, .n = 1};
static const struct model_info info = {.name = "fuzz", .digest = "0000000000000000000000000000000000000000000000000000000000000000"};

const struct model_info *model_info(const struct model *m)
{
  (void)m;
  return &info;
}

struct generation *model_base(const struct model *m)
{
  (void)m;
  return &base;
}

static void check_message(const struct err *e)
{
  if (!e->msg[0] || (e->code != E_NOMEM && !e->field[0]))
    abort();
  for (const char *s = e->msg; *s; s++)
    if (*s < ' ' || *s > '~')
      abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  struct delta delta = {.site = 0, .kind = DELTA_LOWRANK, .rank = 1};
  struct adapter a = {.digest = "0000000000000000000000000000000000000000000000000000000000000000", .delta = &delta, .n = 1, .params = 4,
                      .max_rank = 1};
  struct manifest *m;
  struct err e = {0};
  int rc = manifest_read_text(&m, "fuzz", (const char *)data, size, &e);

  if (rc) {
    if (m || e.code != rc)
      abort();
    check_message(&e);
    return 0;
  }
  for (int i = 0; i < m->probes; i++)
    for (int j = 0; j < m->channels * m->height * m->width; j++)
      if (!isfinite(m->probe[i].expected[j]) || !isfinite(m->probe[i].base[j]))
        abort();
  if (!(m->tolerance_f32 <= MANIFEST_TOLERANCE_F32 && m->tolerance_bf16 <= MANIFEST_TOLERANCE_BF16))
    abort();
  if (manifest_check(m, &a, NULL, NULL, &e))
    check_message(&e);
  manifest_free(m);
  return 0;
}
