/*
 * blocks.h - the two blocks that Stable Diffusion's networks are made of: the residual block and the transformer.
 *
 * Build functions add sites through a builder, forward functions apply them through a run; errors stick in those (generation.h,
 * run.h), so nothing is returned. Shapes: x, y (B, H, W, C).
 *
 * Called by unet.c and vae.c. Threads: the device thread.
 */
#ifndef SAFELIGHT_MODELS_BLOCKS_H
#define SAFELIGHT_MODELS_BLOCKS_H

#include "models/run.h"

/* How the group norms of a network are set. */
struct group_norm {
  int groups;
  double eps;
};

/* ResnetBlock2D: y = conv2(norm2(conv1(norm1(x)) + temb)) + x, with SiLU after each norm. */
struct resnet {
  int norm1, conv1;
  int temb;       /* linear on the time embedding; SITE_NONE in a VAE */
  int norm2, conv2;
  int shortcut;   /* linear on x when in and out differ, else SITE_NONE */
  int in, out;
};

/* temb_dim 0: no time embedding. */
void resnet_build(struct resnet *n, struct builder *b, int in, int out, int temb_dim);
/* temb (B, 1, 1, temb_dim), after SiLU, or tensor_none(). y may be x when in equals out. */
void resnet_forward(struct run *r, const struct resnet *n, struct tensor y, struct tensor x, struct tensor temb,
                    struct group_norm norm);

/* BasicTransformerBlock: attention to the picture, attention to the prompt, feed-forward. */
struct transformer_layer {
  int norm1, q1, k1, v1, out1;
  int norm2, q2, k2, v2, out2;
  int norm3, ff_in, ff_out;
  int width;      /* C = heads * head dim */
  int64_t kv_at;  /* where K of the prompt starts in a unet_context, per token; V follows width numbers per token later */
};

/* Transformer2DModel. */
struct transformer {
  int norm, proj_in, proj_out;
  int heads, depth;
  const struct transformer_layer *layer; /* depth entries, owned by the network */
};

/* Fills t and depth entries of layer, whose first kv_at is *kv_at; moves *kv_at behind them. */
void transformer_build(struct transformer *t, struct transformer_layer *layer, struct builder *b, int channels, int heads,
                       int depth, int context_dim, int64_t *kv_at);

struct unet_context;

/* x in place. prompt: B entries. */
void transformer_forward(struct run *r, const struct transformer *t, struct tensor x,
                         const struct unet_context *const *prompt, int groups);

/* The keys or values at kv_at of a prompt's memory: a (1, 1, T, width) tensor; p NULL in a dry run. */
struct tensor unet_context_tensor(const struct unet_context *c, int64_t kv_at, int64_t width, enum dtype act);
/* T rounded up so that every tensor in a prompt's memory is aligned: the memory holds numbers-per-token times this. */
int64_t unet_context_stride(int64_t T);

/* A tensor in memory that was allocated for one at least as large. */
struct tensor tensor_within(struct tensor memory, int64_t b, int64_t h, int64_t w, int64_t c);

#endif
