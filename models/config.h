/*
 * config.h - what a checkpoint's config.json files say about its networks, read once and never trusted.
 *
 * The options are those of diffusers' UNet2DConditionModel and AutoencoderKL and transformers' CLIPTextModel as the published
 * SD1.x, SD2.x and SDXL (base and refiner) checkpoints use them; a missing key has the library's default. A value that these
 * networks do not implement and that would change the picture is E_FILE naming file, key and value; so is a key of the UNet or
 * VAE that nobody here has heard of, unless it is null, false or a label. Every number is bounded, so that no product of them
 * overflows.
 *
 * Called by pipeline.c, arch.c and tests. Threads: pure functions; a config is plain data.
 */
#ifndef SAFELIGHT_MODELS_CONFIG_H
#define SAFELIGHT_MODELS_CONFIG_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/backend.h"
#include "models/sampler.h"

enum {
  CONFIG_MAX_LEVELS = 8,       /* resolutions of a UNet or VAE */
  CONFIG_MAX_LAYERS = 8,       /* resnets per block */
  CONFIG_MAX_DEPTH = 32,       /* transformer layers per attention */
  CONFIG_MAX_CHANNELS = 16384, /* any width */
  CONFIG_MAX_HEADS = 256,
  CONFIG_MAX_CLIP_LAYERS = 64,
  CONFIG_MAX_POSITIONS = 1024,
  CONFIG_MAX_VOCAB = 1000000,
  CONFIG_MAX_BYTES = 1 << 20   /* of a config file */
};

/* UNet2DConditionModel. Level 0 has the full resolution; up block i works on level levels-1-i. */
struct unet_config {
  int in_channels, out_channels;
  int levels;
  int channels[CONFIG_MAX_LEVELS];    /* block_out_channels */
  int layers[CONFIG_MAX_LEVELS];      /* layers_per_block: resnets of the down block; its up block has one more */
  int down_attn[CONFIG_MAX_LEVELS];   /* down block i is a CrossAttnDownBlock2D */
  int up_attn[CONFIG_MAX_LEVELS];     /* up block i (diffusers' order: deepest first) is a CrossAttnUpBlock2D */
  int has_mid;                        /* mid_block_type is not null: UNetMidBlock2DCrossAttn */
  int heads[CONFIG_MAX_LEVELS];       /* attention_head_dim, which despite its name counts heads */
  int depth[CONFIG_MAX_LEVELS];       /* transformer_layers_per_block */
  int context_dim;                    /* cross_attention_dim, the same on every level */
  int groups;                         /* norm_num_groups */
  double norm_eps;                    /* of the resnets and the output; transformers use 1e-6 */
  int flip_sin_to_cos;
  double freq_shift;
  int add_time_dim;                   /* addition_time_embed_dim; 0: no added embedding (addition_embed_type null) */
  int add_in_dim;                     /* projection_class_embeddings_input_dim = pooled text + ids * add_time_dim */
  int sample_size;                    /* latent pixels it was trained for; 0: not said */
};

/* AutoencoderKL. Level 0 has the picture's resolution. */
struct vae_config {
  int in_channels, out_channels;
  int latent_channels;
  int levels;
  int channels[CONFIG_MAX_LEVELS];    /* block_out_channels */
  int layers;                         /* layers_per_block: resnets of an encoder block; a decoder block has one more */
  int groups;
  int mid_attn;                       /* mid_block_add_attention */
  int use_quant_conv, use_post_quant_conv;
  double scaling_factor;              /* the UNet sees (z - shift_factor) * scaling_factor */
  double shift_factor;
  int factor;                         /* 2^(levels-1): pixels per latent */
};

/* CLIPTextModel. */
struct clip_config {
  int vocab;
  int width;                          /* hidden_size */
  int hidden;                         /* intermediate_size */
  int layers, heads;
  int positions;                      /* max_position_embeddings */
  enum act_kind act;                  /* ACT_QUICK_GELU or ACT_GELU */
  double norm_eps;
  int eos;                            /* eos_token_id; 2 means "the largest id", see clip_forward */
};

enum pipeline_kind { PIPELINE_SD, PIPELINE_SDXL };

/* model_index.json: what the checkpoint is made of. */
struct index_config {
  enum pipeline_kind kind;
  int has_text_encoder, has_text_encoder_2;
};

/* Each fills *c from a file. E_FILE: e->field is the key (or the path, when the file is not one JSON object), the message names
 * file, key, value and what would do. */
MUST_CHECK int unet_config_load(struct unet_config *c, const char *path, struct err *e);
MUST_CHECK int vae_config_load(struct vae_config *c, const char *path, struct err *e);
MUST_CHECK int clip_config_load(struct clip_config *c, const char *path, struct err *e);
MUST_CHECK int schedule_config_load(struct schedule_config *c, const char *path, struct err *e);
MUST_CHECK int index_config_load(struct index_config *c, const char *path, struct err *e);
/* The pad token that special_tokens_map.json or tokenizer_config.json names; "" when the file does not say, or is not there. */
MUST_CHECK int pad_token_load(char *token, size_t cap, const char *path, struct err *e);

/* The same from n bytes in memory; label stands for the path in messages. */
MUST_CHECK int unet_config_parse(struct unet_config *c, const char *text, size_t n, const char *label, struct err *e);
MUST_CHECK int vae_config_parse(struct vae_config *c, const char *text, size_t n, const char *label, struct err *e);
MUST_CHECK int clip_config_parse(struct clip_config *c, const char *text, size_t n, const char *label, struct err *e);
MUST_CHECK int schedule_config_parse(struct schedule_config *c, const char *text, size_t n, const char *label, struct err *e);
MUST_CHECK int index_config_parse(struct index_config *c, const char *text, size_t n, const char *label, struct err *e);

#endif
