/*
 * model.h - what a loaded checkpoint is made of; shared by model.c (loads it), pipeline.c (draws with it),
 * condition.c and predict.c (run parts of it), nobody else.
 *
 * Invariants: everything but the arena is immutable after model_open. The arena is scratch of the device thread: nothing lives in
 * it from one call of pipeline.c to the next.
 */
#ifndef SAFELIGHT_MODELS_MODEL_H
#define SAFELIGHT_MODELS_MODEL_H

#include "models/clip.h"
#include "models/pipeline.h"
#include "models/sources.h"
#include "models/tokenizer.h"
#include "models/unet.h"
#include "models/vae.h"

enum {
  DRAW_ROWS = 2,              /* rows of one picture in the UNet: with the negative prompt and with the prompt */
  MODEL_MAX_SIDE = 4096       /* pixels; keeps every product of dims far from overflow */
};

struct model {
  struct be *be;              /* the caller's */
  struct tokenizer *tokenizer; /* NULL for synthetic weights: then prompts become one chunk of fixed tokens */
  int32_t pad;                /* id after the end mark */
  struct clip *clip;          /* NULL when the architecture has none here (sdxl): a fixed context stands in */
  struct unet *unet;
  struct vae *vae;
  struct schedule_config schedule;
  struct generation *base;
  struct model_sources sources; /* of the base's weights, one per component */
  struct model_info info;
  struct arena arena;         /* slab of model_reserve */
  int64_t reserved_pixels;    /* width * height that the slab is good for */
};

#endif
