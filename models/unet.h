/*
 * unet.h - the denoiser (diffusers' UNet2DConditionModel): from a noisy latent, a time and a prompt to the predicted noise (or v).
 *
 * Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022; Podell et al., "SDXL", 2023;
 * MODEL.md. Called by pipeline.c. Threads: the device thread.
 */
#ifndef SAFELIGHT_MODELS_UNET_H
#define SAFELIGHT_MODELS_UNET_H

#include "models/config.h"
#include "models/run.h"

struct unet;

/* Adds the network's sites to b's generation (component "unet"). On failure *u is NULL; E_FILE names the tensor. */
MUST_CHECK int unet_new(struct unet **u, const struct unet_config *c, struct builder *b);
void unet_free(struct unet *u); /* takes NULL */
const struct unet_config *unet_config(const struct unet *u);

/*
 * What the UNet needs to know of one prompt: the keys and values of every cross-attention. They depend on the prompt and on the
 * generation alone, so they are computed once per prompt instead of once per step. The memory is the caller's.
 */
struct unet_context {
  void *mem;      /* unet_context_bytes bytes of device memory, 64-byte aligned */
  int64_t T;      /* tokens */
};

size_t unet_context_bytes(const struct unet *u, int64_t T, enum dtype act);
/* Fills c->mem (c->T == T) from the encoded prompt (1, 1, T, context_dim) act. Uses no arena. */
MUST_CHECK int unet_context_fill(struct run *r, const struct unet *u, struct unet_context *c, struct tensor prompt);

/* One batch of B rows, B <= RUN_MAX_ROWS. Arrays are host memory, read before unet_forward returns. */
struct unet_input {
  struct tensor sample;                       /* (B, h, w, in_channels) act; any h and w */
  const float *t;                             /* B timesteps */
  const struct unet_context *const *context;  /* B prompts, of any lengths */
  struct tensor text_embeds;                  /* (B, 1, 1, P) act when the config has added embeddings, else tensor_none() */
  const float *time_ids;                      /* B * n_time_ids: SDXL's sizes, crops and target; P + n * add_time_dim = add_in_dim */
  int n_time_ids;
};

/* out (B, h, w, out_channels) F32. */
MUST_CHECK int unet_forward(struct run *r, const struct unet *u, const struct unet_input *in, struct tensor out);

#endif
