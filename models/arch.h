/*
 * arch.h - the architectures that Safelight knows by name, at their real dimensions, for benchmarks without a checkpoint.
 *
 * Called by pipeline.c (model_open_synthetic) and tests. Threads: pure functions.
 */
#ifndef SAFELIGHT_MODELS_ARCH_H
#define SAFELIGHT_MODELS_ARCH_H

#include "models/config.h"

struct arch {
  struct unet_config unet;
  struct vae_config vae;
  struct clip_config clip;        /* layers 0 when has_clip is 0 */
  struct schedule_config schedule;
  int has_clip;
  int default_size;               /* pixels */
};

/* "emoji", "sd15", "sd21" (the 768-pixel v-prediction one) or "sdxl" (base, without text encoders). E_ARG lists the names. */
MUST_CHECK int arch_find(struct arch *a, const char *name, struct err *e);

#endif
