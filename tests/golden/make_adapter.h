/*
 * make_adapter.h - adapters made in memory from their names, as tools/reference/gen_lora.py makes them, for tests of generations.
 *
 * Linked to every golden test. Threads: none.
 */
#ifndef SAFELIGHT_TESTS_MAKE_ADAPTER_H
#define SAFELIGHT_TESTS_MAKE_ADAPTER_H

#include "models/adapter.h"

struct adapter_plan {
  const char *name;       /* what the factors are drawn from */
  int64_t rank;
  float scale;
  enum delta_kind kind;   /* LOWRANK, DENSE (the product of the same factors), DORA (per row) or REPLACE (a weight of its own) */
  const char *component;  /* "unet", "text_encoder" */
  int attention;          /* 1: the attentions' linears; 0: every other linear and convolution */
};

/* The plans of lora_sd15.safetensors: "attn", "wide" (of the UNet), "text" ("wide" of the text encoder), "dora". NULL: no such. */
const struct adapter_plan *adapter_plan_find(const char *name);
/* Fails the test when there is no memory. The digest is a hash of the plan. adapter_close frees it. */
struct adapter *adapter_make(const struct generation *base, const struct adapter_plan *p);
/* A copy with another name and digest. */
struct adapter *adapter_copy(const struct generation *base, const struct adapter *a, const char *name);

#endif
