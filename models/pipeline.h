/*
 * pipeline.h - the engine's public header: a prompt becomes a picture, one step at a time.
 *
 * A `struct model` is one loaded checkpoint and is immutable. A `struct draw` is one picture on its way: its latents, its
 * encoded prompts, its place in the sampler's plan. It is prepared on any thread, started and decoded on the thread of a lane
 * (lane.h), and stepped by the device thread, alone (draw_step) or with others (batch.h). Where several devices hold the same checkpoint, each has a
 * model of its own, and a picture becomes that one's when it is started.
 *
 * Called by server/device.c, server/generate.c, server/bench.c and tests. Threads: a draw is used by one thread at a time, and handed over
 * under a lock. What takes a lane runs on that lane's thread. draw_preview alone may run beside steps; see there.
 */
#ifndef SAFELIGHT_MODELS_PIPELINE_H
#define SAFELIGHT_MODELS_PIPELINE_H

#include <stdint.h>

#include "base/err.h"
#include "kernels/backend.h"
#include "models/generation.h"
#include "models/lane.h"
#include "models/prompt.h"
#include "models/sampler.h"

struct model; /* tokenizer, text encoder, UNet, VAE, schedule, base generation */
struct draw;  /* one picture being drawn */

struct model_info {
  char name[64];              /* folder name, or what the model card says */
  char digest[65];            /* over every byte of the weight and config files (digest.h); "" for synthetic weights */
  int default_size;           /* pixels, width and height */
  int size_multiple;          /* width and height must be multiples of this */
  int vae_factor;             /* pixels per latent */
  int latent_channels;
  int is_v_prediction;
  int has_encoder;            /* of the VAE: pictures can start from another one */
  int64_t unet_params, text_params, vae_params;
};

/* What decides a picture. Strings and pictures belong to the caller; draw_prepare keeps what it needs of them. */
struct draw_params {
  const char *prompt, *negative;      /* UTF-8 */
  size_t prompt_len, negative_len;
  int width, height;                  /* pixels, multiples of info.size_multiple */
  int steps;
  float guidance;                     /* <= 1: no negative pass */
  uint64_t seed;
  enum sampler_kind sampler;
  int karras;
  int clip_skip;                      /* 0 or 1: last layer; 2: the one before */
  /* Image to image, as diffusers' Img2Img and (with a mask) Inpaint pipelines do it. NULL: from noise alone. */
  const uint8_t *init_rgb;            /* width*height*3: the picture to start from */
  const uint8_t *mask;                /* width*height: 255 draw anew, 0 keep; NULL: all anew. Pixels at 0 come back as they were, those between
                                         are blended; the latent under a pixel is drawn anew from 128 on */
  int leaves_pixels;                  /* with mask: it acts on latents alone; whoever set this puts kept pixels back himself */
  float strength;                     /* with init_rgb: above 0 to 1, the share of the steps that is done */
};

/* Loads the checkpoint in dir (diffusers layout) for be. be outlives the model. E_FILE names file and tensor. */
MUST_CHECK int model_open(struct model **m, struct be *be, const char *dir, struct err *e);
/* The architecture "emoji", "sd15", "sd21" or "sdxl" with weights drawn in memory, for benchmarks. "sdxl" has no text encoder. */
MUST_CHECK int model_open_synthetic(struct model **m, struct be *be, const char *arch, struct err *e);
/* The same with the VAE's encoder, as checkpoints have it. */
MUST_CHECK int model_open_architecture(struct model **m, struct be *be, const char *arch, struct err *e);
void model_close(struct model *m); /* takes NULL; every draw of it is closed before */
const struct model_info *model_info(const struct model *m);
/* The base generation (no adapters; only tools and an operator's evaluation profile draw with it) and what generation_build reads the
 * pristine weights from: files stay mapped for as long as the model is open. The model's. */
struct generation *model_base(const struct model *m);
struct model_sources *model_sources(const struct model *m);
int model_layers_per_block(const struct model *m); /* of the UNet, for adapter_names_new */

/* Bytes of activation memory that a picture of this size needs on the backend (UNet, VAE and text encoder share one slab). */
MUST_CHECK int model_plan_bytes(struct model *m, int width, int height, size_t *bytes, struct err *e);
/* Floating point operations (two a multiply-add) of one UNet step with guidance, by an exact walk over its layers. */
MUST_CHECK int model_step_flops(struct model *m, int width, int height, double *flops, struct err *e);
/* Makes the main lane's slab large enough for pictures up to width x height pixels; called once before serving. model_reserve_for: for some of
 * the work alone (enum lane_work, or'ed), when other lanes do the rest. */
MUST_CHECK int model_reserve(struct model *m, int width, int height, struct err *e);
MUST_CHECK int model_reserve_for(struct model *m, int width, int height, int work, struct err *e);

/* Checks the params against the model, tokenises and plans; no device work, any thread. *d is NULL after failure. E_ARG names
 * the field ("width", "steps", "prompt", ...) and the bound. */
MUST_CHECK int draw_prepare(struct draw **d, struct model *m, const struct draw_params *p, struct err *e);
/* Another picture of the request that `other` is of, with a seed of its own, else the same. What they share (tokens, keys and values, the first picture) they
 * hold together: it is made once, by the first of them that is started. They are prepared and started one at a time, and started under one generation on
 * lanes of one model. *d is NULL after failure: E_NOMEM. */
MUST_CHECK int draw_prepare_like(struct draw **d, const struct draw *other, uint64_t seed, struct err *e);
/* Pins the generation g (a reference of its own, until draw_close), encodes the prompts through it and draws the initial noise, on a lane with
 * LANE_ENDS. Every later call for this picture reads g's weights, VAE included. The lane's model may be another one than the picture was prepared with, if it
 * is the same checkpoint, reserved for the same size: from here on the picture is that model's, and g must be built over its base (else E_INTERNAL). */
MUST_CHECK int draw_start(struct draw *d, struct lane *l, struct generation *g, struct err *e);
const struct generation *draw_generation(const struct draw *d); /* NULL before draw_start */
size_t draw_bytes(const struct draw *d);     /* of device memory of its own, from draw_start to draw_close */
size_t draw_shared_bytes(const struct draw *d); /* and of all pictures of its request together, from the first draw_start to the last draw_close */
/* Both for the largest picture with so many pixels, alone in its request: guidance, the longest prompts, a mask where the model can start from a picture. */
size_t draw_plan_bytes(struct model *m, int width, int height);
/* Device thread: one step on the main lane. */
MUST_CHECK int draw_step(struct draw *d, struct err *e);
int draw_step_index(const struct draw *d);   /* steps done */
int draw_step_count(const struct draw *d);   /* steps in all */
int draw_prompt_tokens(const struct draw *d);
/* Device thread, after a step: the picture ends here, and draw_decode gives the sampler's present idea of it. E_INTERNAL before the first step. */
MUST_CHECK int draw_cut(struct draw *d, struct err *e);
/* After the last step: pixels, width*height*3 bytes RGB, on a lane with LANE_ENDS. E_INTERNAL when latents or picture are not finite: such a
 * picture is never shown. rgb is the caller's. */
MUST_CHECK int draw_decode(struct draw *d, struct lane *l, uint8_t *rgb, struct err *e);
/* Device thread, after a step: keeps the sampler's present idea of the finished latent in the draw, for draw_preview. Cheap. */
MUST_CHECK int draw_snapshot(struct draw *d, struct err *e);
/* The last snapshot as pixels, like draw_decode (E_INTERNAL when it is not finite, or there is none). May run on its lane's thread while the
 * device thread steps the same draw; not beside another call of draw_snapshot, draw_preview, draw_decode or draw_close for it. */
MUST_CHECK int draw_preview(struct draw *d, struct lane *l, uint8_t *rgb, struct err *e);
/* The latents as torch lays them out (C, h, w), for tests; out holds C*h*w floats. */
MUST_CHECK int draw_latents(struct draw *d, float *out, struct err *e);
void draw_close(struct draw *d); /* takes NULL; any thread */

#endif
