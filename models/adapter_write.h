/*
 * adapter_write.h - writes a LoRA as diffusers does: one safetensors file of `unet.NAME.lora_A.weight` (rank, in) and `lora_B.weight` (out,
 * rank) in fp32, without alphas, with __metadata__ that says where it comes from.
 *
 * Called by the command line (`safelight adapter merge|extract`) and tests. Invariants: equal adapters and metadata give equal bytes on
 * every machine; the file appears under its name when it is complete. Threads: no state. Format: diffusers 0.33,
 * PeftAdapterMixin.load_lora_adapter; safetensors' README.
 */
#ifndef SAFELIGHT_MODELS_ADAPTER_WRITE_H
#define SAFELIGHT_MODELS_ADAPTER_WRITE_H

#include "models/adapter.h"

/* One entry of __metadata__; "format": "pt" is added. */
struct adapter_meta {
  const char *key, *value;  /* UTF-8 */
};

/* Writes a, whose deltas are all low-rank and without bias (E_ARG names the site of one that is not). A scale other than 1 is multiplied
 * into lora_B in fp32. base: the site table. sources: which sites are 1x1 convolutions in the checkpoint, whose factors have four
 * dimensions there; NULL: none. E_FILE names the path. */
MUST_CHECK int adapter_write(const char *path, const struct adapter *a, const struct generation *base,
                             const struct model_sources *sources, const struct adapter_meta *meta, int n_meta, struct err *e);

/* An adapter in memory with n empty low-rank deltas, to be filled and closed with adapter_close. name is cut to fit. NULL when memory is
 * short. */
struct adapter *adapter_new_lowrank(const char *name, int n);
/* Allocates the factors of delta i at this site, zeroed. E_NOMEM. */
MUST_CHECK int adapter_set_lowrank(struct adapter *a, int i, const struct generation *base, int site, int64_t rank, struct err *e);
/* Sums up params, ranks and norms once the factors are filled, and gives it a digest over them (not a file's: adapter_open gives that). */
MUST_CHECK int adapter_finish(struct adapter *a, const struct generation *base, struct err *e);

#endif
