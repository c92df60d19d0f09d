/*
 * vae.h - the autoencoder (diffusers' AutoencoderKL) between pictures and latents.
 *
 * Source: Rombach et al., 2022 (the KL-regularised first stage); MODEL.md. Called by pipeline.c. Threads: the device thread.
 */
#ifndef SAFELIGHT_MODELS_VAE_H
#define SAFELIGHT_MODELS_VAE_H

#include "models/config.h"
#include "models/run.h"

struct vae;

/* Adds the sites to b's generation (component "vae"): the decoder's, and the encoder's when with_encoder. On failure *v is NULL. */
MUST_CHECK int vae_new(struct vae **v, const struct vae_config *c, int with_encoder, struct builder *b);
void vae_free(struct vae *v); /* takes NULL */
const struct vae_config *vae_config(const struct vae *v);

/* z (B, h, w, latent_channels) act, unscaled (latent / scaling_factor + shift_factor) -> rgb (B, h*factor, w*factor,
 * out_channels) F32, about -1..1. */
MUST_CHECK int vae_decode(struct run *r, const struct vae *v, struct tensor z, struct tensor rgb);
/* rgb (B, H, W, in_channels) act in -1..1, H and W multiples of factor -> moments (B, H/factor, W/factor, 2*latent_channels)
 * F32: mean, then log variance (not clamped; diffusers clamps it to -30..20 before use). Needs with_encoder. */
MUST_CHECK int vae_encode(struct run *r, const struct vae *v, struct tensor rgb, struct tensor moments);

#endif
