/*
 * arch.c - see arch.h. The numbers are those of the published config.json files of runwayml/stable-diffusion-v1-5,
 * stabilityai/stable-diffusion-2-1 and stabilityai/stable-diffusion-xl-base-1.0, and of the bundled model in weights/emoji.
 */
#include "models/arch.h"

#include <string.h>

/* The AutoencoderKL of all three Stable Diffusions; only the scaling factor differs. */
#define SD_VAE(scaling)                                                                                                        \
  {                                                                                                                            \
    .in_channels = 3, .out_channels = 3, .latent_channels = 4, .levels = 4, .channels = {128, 256, 512, 512}, .layers = 2,     \
    .groups = 32, .mid_attn = 1, .use_quant_conv = 1, .use_post_quant_conv = 1, .scaling_factor = scaling, .factor = 8         \
  }

#define SD_SCHEDULE(v_prediction, how)                                                                                         \
  {                                                                                                                            \
    .train_steps = 1000, .beta_start = 0.00085, .beta_end = 0.012, .is_scaled_linear = 1, .is_v_prediction = v_prediction,     \
    .steps_offset = 1, .spacing = how                                                                                          \
  }

static const struct {
  const char *name;
  struct arch arch;
} known[] = {
  {"emoji",
   {.unet = {.in_channels = 4, .out_channels = 4, .levels = 3, .channels = {64, 128, 192}, .layers = {1, 1, 1},
             .down_attn = {0, 1, 1}, .up_attn = {1, 1, 0}, .has_mid = 1, .heads = {2, 4, 6}, .depth = {1, 1, 1},
             .context_dim = 96, .groups = 32, .norm_eps = 1e-5, .flip_sin_to_cos = 1, .sample_size = 16},
    .vae = {.in_channels = 3, .out_channels = 3, .latent_channels = 4, .levels = 4, .channels = {32, 64, 64, 96}, .layers = 1,
            .groups = 16, .mid_attn = 1, .use_quant_conv = 1, .use_post_quant_conv = 1, .scaling_factor = 0.18215, .factor = 8},
    .clip = {.vocab = 49408, .width = 96, .hidden = 384, .layers = 3, .heads = 3, .positions = 77, .act = ACT_QUICK_GELU,
             .norm_eps = 1e-5, .eos = 49407},
    .schedule = SD_SCHEDULE(1, SPACING_LEADING), .has_clip = 1, .default_size = 128}},
  {"sd15",
   {.unet = {.in_channels = 4, .out_channels = 4, .levels = 4, .channels = {320, 640, 1280, 1280}, .layers = {2, 2, 2, 2},
             .down_attn = {1, 1, 1, 0}, .up_attn = {0, 1, 1, 1}, .has_mid = 1, .heads = {8, 8, 8, 8}, .depth = {1, 1, 1, 1},
             .context_dim = 768, .groups = 32, .norm_eps = 1e-5, .flip_sin_to_cos = 1, .sample_size = 64},
    .vae = SD_VAE(0.18215),
    .clip = {.vocab = 49408, .width = 768, .hidden = 3072, .layers = 12, .heads = 12, .positions = 77, .act = ACT_QUICK_GELU,
             .norm_eps = 1e-5, .eos = 2},
    .schedule = SD_SCHEDULE(0, SPACING_DEFAULT), .has_clip = 1, .default_size = 512}},
  {"sd21",
   {.unet = {.in_channels = 4, .out_channels = 4, .levels = 4, .channels = {320, 640, 1280, 1280}, .layers = {2, 2, 2, 2},
             .down_attn = {1, 1, 1, 0}, .up_attn = {0, 1, 1, 1}, .has_mid = 1, .heads = {5, 10, 20, 20}, .depth = {1, 1, 1, 1},
             .context_dim = 1024, .groups = 32, .norm_eps = 1e-5, .flip_sin_to_cos = 1, .sample_size = 96},
    .vae = SD_VAE(0.18215),
    .clip = {.vocab = 49408, .width = 1024, .hidden = 4096, .layers = 23, .heads = 16, .positions = 77, .act = ACT_GELU,
             .norm_eps = 1e-5, .eos = 2},
    .schedule = SD_SCHEDULE(1, SPACING_DEFAULT), .has_clip = 1, .default_size = 768}},
  {"sdxl",
   {.unet = {.in_channels = 4, .out_channels = 4, .levels = 3, .channels = {320, 640, 1280}, .layers = {2, 2, 2},
             .down_attn = {0, 1, 1}, .up_attn = {1, 1, 0}, .has_mid = 1, .heads = {5, 10, 20}, .depth = {1, 2, 10},
             .context_dim = 2048, .groups = 32, .norm_eps = 1e-5, .flip_sin_to_cos = 1, .add_time_dim = 256,
             .add_in_dim = 2816, .sample_size = 128},
    .vae = SD_VAE(0.13025),
    .schedule = SD_SCHEDULE(0, SPACING_LEADING), .has_clip = 0, .default_size = 1024}},
};

int arch_find(struct arch *a, const char *name, struct err *e)
{
  size_t i;

  for (i = 0; i < sizeof known / sizeof *known; i++)
    if (!strcmp(known[i].name, name)) {
      *a = known[i].arch;
      return 0;
    }
  *a = (struct arch){0};
  return err_field(e, E_ARG, "arch", "unknown architecture \"%.40s\": choose emoji, sd15, sd21 or sdxl", name);
}
