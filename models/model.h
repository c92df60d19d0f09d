/*
 * model.h - what a loaded checkpoint is made of; shared by model.c (loads it), plan.c and lane.c (memory to run it
 * in), the files of a draw (draw.h), batch.c, condition.c and predict.c (run parts of it), nobody else.
 *
 * Invariants: everything but the main lane is immutable after model_open, and what model_reserve fills is after that. A lane's arena is scratch
 * of the thread that owns the lane: nothing lives in it from one call of pipeline.h to the next.
 */
#ifndef SAFELIGHT_MODELS_MODEL_H
#define SAFELIGHT_MODELS_MODEL_H

#include "models/clip.h"
#include "models/lane.h"
#include "models/pipeline.h"
#include "models/sources.h"
#include "models/tokenizer.h"
#include "models/unet.h"
#include "models/vae.h"

enum {
  DRAW_ROWS = 2,              /* rows of one picture in the UNet: with the negative prompt and with the prompt */
  MODEL_MAX_SIDE = 4096       /* pixels; keeps every product of dims far from overflow */
};

struct lane {
  struct model *m;
  struct be *be;              /* &own, or the model's */
  struct be own;              /* zeroed in the main lane */
  int work;                   /* enum lane_work that the arena has room for */
  int threads;                /* that it was opened with */
  struct arena arena;
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
  struct lane lane;           /* the main one */
  int reserved_width, reserved_height; /* pixels: what model_reserve was asked for; 0 before */
  size_t reserved_ends, reserved_steps; /* bytes that its LANE_ENDS and LANE_STEPS need */
};

/* plan.c: bytes of activation memory for the work (enum lane_work) on one picture of this size, with `rows` in a pass of the UNet; *step_macs:
 * multiply-adds of such a pass. E_ARG for an impossible size. */
MUST_CHECK int plan_arena(struct model *m, int width, int height, int rows, int work, size_t *bytes, double *step_macs, struct err *e);

/* lane.c */
MUST_CHECK int lane_reserve(struct lane *l, size_t bytes, struct err *e); /* at least so many; what was there is given back first */
void lane_release(struct lane *l);                                       /* memory and context; takes a zeroed one */

#endif
