/*
 * config.c - see config.h. Defaults are those of diffusers 0.33 and transformers 4.49; the tables of what is refused were read off
 * the constructors of UNet2DConditionModel, AutoencoderKL and CLIPTextConfig.
 */
#include "models/config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "models/config_read.h"

/* ---- UNet ---- */

/* Options that exist in one form only here. */
static void unet_refusals(struct config_reader *r)
{
  config_only(r, "act_fn", "silu|swish");
  config_only(r, "addition_embed_type", "text_time|null");
  config_only(r, "attention_type", "default");
  config_only(r, "center_input_sample", "false");
  config_only(r, "class_embed_type", "null");
  config_only(r, "class_embeddings_concat", "false");
  config_only(r, "conv_in_kernel", "3");
  config_only(r, "conv_out_kernel", "3");
  config_only(r, "cross_attention_norm", "null");
  config_only(r, "downsample_padding", "1");
  config_only(r, "dual_cross_attention", "false");
  config_only(r, "encoder_hid_dim", "null");
  config_only(r, "encoder_hid_dim_type", "null");
  config_only(r, "mid_block_scale_factor", "1");
  config_only(r, "num_class_embeds", "null");
  config_only(r, "only_cross_attention", "false");
  config_only(r, "resnet_out_scale_factor", "1");
  config_only(r, "resnet_skip_time_act", "false");
  config_only(r, "resnet_time_scale_shift", "default");
  config_only(r, "reverse_transformer_layers_per_block", "null");
  config_only(r, "time_cond_proj_dim", "null");
  config_only(r, "time_embedding_act_fn", "null");
  config_only(r, "time_embedding_dim", "null");
  config_only(r, "time_embedding_type", "positional");
  config_only(r, "timestep_post_act", "null");
  /* use_linear_projection only says how proj_in is stored (a 1x1 convolution is a linear); upcast_attention is about precision,
   * which is the backend's business; the rest does nothing without options that are refused above. */
  config_ignore(r, "use_linear_projection|upcast_attention|addition_embed_type_num_heads|mid_block_only_cross_attention|dropout");
}

/* sample_size: null, a number or a pair. */
static int read_sample_size(struct config_reader *r)
{
  const json_t *v = r->code ? NULL : json_object_get(r->root, "sample_size");
  int pair[2] = {0, 0};

  if (!json_is_array(v))
    return config_int_or_null(r, "sample_size", 0, 1, CONFIG_MAX_CHANNELS);
  config_ints(r, "sample_size", 2, pair, 0, 1, CONFIG_MAX_CHANNELS);
  return pair[0] > pair[1] ? pair[0] : pair[1];
}

/* cross_attention_dim: one prompt serves every level, so a list must be uniform. */
static int read_context_dim(struct config_reader *r, int levels)
{
  int i, dim[CONFIG_MAX_LEVELS] = {0};

  config_ints(r, "cross_attention_dim", levels, dim, 1280, 1, CONFIG_MAX_CHANNELS);
  for (i = 1; i < levels; i++)
    if (dim[i] != dim[0])
      config_refuse(r, "cross_attention_dim", "different widths per block are not supported");
  return dim[0];
}

static void check_unet(struct config_reader *r, const struct unet_config *c)
{
  int i, last = c->levels - 1;

  for (i = 0; i < c->levels && !r->code; i++) {
    if (c->channels[i] % c->groups)
      config_refuse(r, "block_out_channels", "must be multiples of norm_num_groups");
    if (!c->down_attn[i] && !c->up_attn[last - i] && !(c->has_mid && i == last))
      continue; /* no attention on this level: its head count means nothing */
    if (c->channels[i] % c->heads[i])
      config_refuse(r, "attention_head_dim", "the number of heads must divide block_out_channels");
  }
  if (c->channels[0] % 2)
    config_refuse(r, "block_out_channels", "the first must be even: it is the width of the time embedding");
  if (c->add_time_dim % 2)
    config_refuse(r, "addition_time_embed_dim", "must be even");
  if (c->add_time_dim && c->add_in_dim <= c->add_time_dim)
    config_refuse(r, "projection_class_embeddings_input_dim", "must be larger than addition_time_embed_dim");
  if (c->freq_shift >= c->channels[0] / 2 || (c->add_time_dim && c->freq_shift >= c->add_time_dim / 2))
    config_refuse(r, "freq_shift", "must be smaller than half the width of the time embeddings");
}

static void read_unet(struct config_reader *r, struct unet_config *c)
{
  static const int channels[] = {320, 640, 1280, 1280};
  int i, has_add;

  c->in_channels = config_int(r, "in_channels", 4, 1, 64);
  c->out_channels = config_int(r, "out_channels", 4, 1, 64);
  c->levels = config_list(r, "block_out_channels", c->channels, CONFIG_MAX_LEVELS, channels, 4, 1, CONFIG_MAX_CHANNELS);
  for (i = 0; i < c->levels; i++) {
    c->down_attn[i] = i < c->levels - 1; /* diffusers' default has four blocks of this pattern */
    c->up_attn[i] = i > 0;
  }
  config_choices(r, "down_block_types", "DownBlock2D|CrossAttnDownBlock2D", c->levels, c->down_attn);
  config_choices(r, "up_block_types", "UpBlock2D|CrossAttnUpBlock2D", c->levels, c->up_attn);
  c->has_mid = config_choice(r, "mid_block_type", "null|UNetMidBlock2DCrossAttn", 1);
  config_ints(r, "layers_per_block", c->levels, c->layers, 2, 1, CONFIG_MAX_LAYERS);
  config_ints(r, "transformer_layers_per_block", c->levels, c->depth, 1, 1, CONFIG_MAX_DEPTH);
  config_ints(r, "attention_head_dim", c->levels, c->heads, 8, 1, CONFIG_MAX_HEADS);
  /* diffusers refuses any num_attention_heads but null; a file that has it means what it says. */
  if (json_is_null(json_object_get(r->root, "num_attention_heads")))
    config_ignore(r, "num_attention_heads");
  else if (json_object_get(r->root, "num_attention_heads"))
    config_ints(r, "num_attention_heads", c->levels, c->heads, 8, 1, CONFIG_MAX_HEADS);
  c->context_dim = read_context_dim(r, c->levels);
  c->groups = config_int(r, "norm_num_groups", 32, 1, CONFIG_MAX_CHANNELS);
  c->norm_eps = config_real(r, "norm_eps", 1e-5, 1e-12, 1e-1);
  c->flip_sin_to_cos = config_bool(r, "flip_sin_to_cos", 1);
  c->freq_shift = config_real(r, "freq_shift", 0, 0, 1);
  has_add = json_is_string(json_object_get(r->root, "addition_embed_type"));
  c->add_time_dim = config_int_or_null(r, "addition_time_embed_dim", 0, 2, CONFIG_MAX_CHANNELS);
  c->add_in_dim = config_int_or_null(r, "projection_class_embeddings_input_dim", 0, 1, CONFIG_MAX_CHANNELS);
  if (!has_add)
    c->add_time_dim = c->add_in_dim = 0; /* diffusers does not look at them either */
  else if (!c->add_time_dim || !c->add_in_dim)
    config_refuse(r, "addition_embed_type", "needs addition_time_embed_dim and projection_class_embeddings_input_dim");
  c->sample_size = read_sample_size(r);
  unet_refusals(r);
}

int unet_config_parse(struct unet_config *c, const char *text, size_t n, const char *label, struct err *e)
{
  struct config_reader r;
  int code;

  *c = (struct unet_config){0};
  code = config_open(&r, text, n, label, e);
  if (!code) {
    read_unet(&r, c);
    if (!r.code)
      check_unet(&r, c);
    code = config_done(&r, 1);
  }
  config_close(&r);
  return code;
}

/* ---- VAE ---- */

static void read_vae(struct config_reader *r, struct vae_config *c)
{
  static const int channels[] = {64};
  int i, only[CONFIG_MAX_LEVELS] = {0};

  c->in_channels = config_int(r, "in_channels", 3, 1, 64);
  c->out_channels = config_int(r, "out_channels", 3, 1, 64);
  c->latent_channels = config_int(r, "latent_channels", 4, 1, 64);
  c->levels = config_list(r, "block_out_channels", c->channels, CONFIG_MAX_LEVELS, channels, 1, 1, CONFIG_MAX_CHANNELS);
  config_choices(r, "down_block_types", "DownEncoderBlock2D", c->levels, only);
  config_choices(r, "up_block_types", "UpDecoderBlock2D", c->levels, only);
  c->layers = config_int(r, "layers_per_block", 1, 1, CONFIG_MAX_LAYERS);
  c->groups = config_int(r, "norm_num_groups", 32, 1, CONFIG_MAX_CHANNELS);
  c->mid_attn = config_bool(r, "mid_block_add_attention", 1);
  c->use_quant_conv = config_bool(r, "use_quant_conv", 1);
  c->use_post_quant_conv = config_bool(r, "use_post_quant_conv", 1);
  c->scaling_factor = config_real(r, "scaling_factor", 0.18215, 1e-6, 1e6);
  c->shift_factor = config_real(r, "shift_factor", 0, -1e6, 1e6);
  config_only(r, "act_fn", "silu");
  config_only(r, "latents_mean", "null");
  config_only(r, "latents_std", "null");
  config_ignore(r, "sample_size|force_upcast"); /* the size it was trained for; a matter of precision */
  for (i = 0; i < c->levels && !r->code; i++)
    if (c->channels[i] % c->groups)
      config_refuse(r, "block_out_channels", "must be multiples of norm_num_groups");
}

int vae_config_parse(struct vae_config *c, const char *text, size_t n, const char *label, struct err *e)
{
  struct config_reader r;
  int code;

  *c = (struct vae_config){0};
  code = config_open(&r, text, n, label, e);
  if (!code) {
    read_vae(&r, c);
    code = config_done(&r, 1);
    c->factor = code ? 0 : 1 << (c->levels - 1);
  }
  config_close(&r);
  return code;
}

/* ---- CLIP ---- */

static void read_clip(struct config_reader *r, struct clip_config *c)
{
  c->vocab = config_int(r, "vocab_size", 49408, 1, CONFIG_MAX_VOCAB);
  c->width = config_int(r, "hidden_size", 512, 1, CONFIG_MAX_CHANNELS);
  c->hidden = config_int(r, "intermediate_size", 2048, 1, 4 * CONFIG_MAX_CHANNELS);
  c->layers = config_int(r, "num_hidden_layers", 12, 1, CONFIG_MAX_CLIP_LAYERS);
  c->heads = config_int(r, "num_attention_heads", 8, 1, CONFIG_MAX_HEADS);
  c->positions = config_int(r, "max_position_embeddings", 77, 1, CONFIG_MAX_POSITIONS);
  c->act = config_choice(r, "hidden_act", "quick_gelu|gelu", 0) ? ACT_GELU : ACT_QUICK_GELU;
  c->norm_eps = config_real(r, "layer_norm_eps", 1e-5, 1e-12, 1e-1);
  c->eos = config_int(r, "eos_token_id", c->vocab > 49407 ? 49407 : c->vocab - 1, 0, c->vocab - 1);
  config_only(r, "model_type", "clip_text_model");
  config_only(r, "quantization_config", "null");
  if (!r->code && c->width % c->heads)
    config_refuse(r, "num_attention_heads", "must divide hidden_size");
}

/* Keys that are left are what transformers writes for every model (generation settings, dropout, versions): they do not reach the
 * encoder, so they are not looked at. */
int clip_config_parse(struct clip_config *c, const char *text, size_t n, const char *label, struct err *e)
{
  struct config_reader r;
  int code;

  *c = (struct clip_config){0};
  code = config_open(&r, text, n, label, e);
  if (!code) {
    read_clip(&r, c);
    code = config_done(&r, 0);
  }
  config_close(&r);
  return code;
}

/* ---- schedule ---- */

static void read_schedule(struct config_reader *r, struct schedule_config *c)
{
  config_only(r, "_class_name",
              "DDIMScheduler|PNDMScheduler|DDPMScheduler|EulerDiscreteScheduler|EulerAncestralDiscreteScheduler|"
              "DPMSolverMultistepScheduler|DPMSolverSinglestepScheduler|LMSDiscreteScheduler|HeunDiscreteScheduler|"
              "KDPM2DiscreteScheduler|KDPM2AncestralDiscreteScheduler|UniPCMultistepScheduler|DEISMultistepScheduler");
  c->train_steps = config_int(r, "num_train_timesteps", 1000, 2, 100000);
  c->beta_start = config_real(r, "beta_start", 0.0001, 1e-9, 0.5);
  c->beta_end = config_real(r, "beta_end", 0.02, 1e-9, 0.999);
  c->is_scaled_linear = config_choice(r, "beta_schedule", "linear|scaled_linear", 0);
  c->is_v_prediction = config_choice(r, "prediction_type", "epsilon|v_prediction", 0);
  c->set_alpha_to_one = config_bool(r, "set_alpha_to_one", 1); /* DDIM's default; the only sampler that asks */
  c->spacing = config_choice(r, "timestep_spacing", "leading|trailing|linspace", SPACING_DEFAULT);
  config_only(r, "trained_betas", "null");
  config_only(r, "rescale_betas_zero_snr", "false");
  config_only(r, "thresholding", "false");
  config_only(r, "use_flow_sigmas", "false");
  config_only(r, "timestep_type", "discrete");
  config_only(r, "sigma_min", "null");
  config_only(r, "sigma_max", "null");
  /* diffusers' StableDiffusionPipeline sets steps_offset to 1 and clip_sample to false whatever the file says: both were
   * forgotten in the first published files. */
  c->steps_offset = 1;
  c->clip_sample = 0;
  if (c->beta_end < c->beta_start)
    config_refuse(r, "beta_end", "must not be smaller than beta_start");
}

/* Keys that are left belong to the sampler that the file names; which sampler draws is the request's choice. */
int schedule_config_parse(struct schedule_config *c, const char *text, size_t n, const char *label, struct err *e)
{
  struct config_reader r;
  int code;

  *c = (struct schedule_config){0};
  code = config_open(&r, text, n, label, e);
  if (!code) {
    read_schedule(&r, c);
    code = config_done(&r, 0);
  }
  config_close(&r);
  return code;
}

/* ---- model_index.json ---- */

/* Whether the pipeline has the component; its value is [library, class], with nulls where there is none. */
static int has_component(struct config_reader *r, const char *name, const char *classes)
{
  const json_t *v = r->code ? NULL : json_object_get(r->root, name);
  const char *class = json_string_value(json_array_get(v, 1));
  char why[160];

  if (!v || json_is_null(json_array_get(v, 1)))
    return 0;
  if (class && config_find_choice(classes, class) >= 0)
    return 1;
  snprintf(why, sizeof why, "this component must be a %s", classes);
  config_refuse(r, name, why);
  return 0;
}

static void read_index(struct config_reader *r, struct index_config *c)
{
  static const char text[] = "CLIPTextModel|CLIPTextModelWithProjection";
  int kind = config_choice(r, "_class_name",
                           "StableDiffusionPipeline|StableDiffusionImg2ImgPipeline|StableDiffusionXLPipeline|"
                           "StableDiffusionXLImg2ImgPipeline",
                           0);

  c->kind = kind < 2 ? PIPELINE_SD : PIPELINE_SDXL;
  c->has_text_encoder = has_component(r, "text_encoder", text);
  c->has_text_encoder_2 = has_component(r, "text_encoder_2", text);
  if (!has_component(r, "unet", "UNet2DConditionModel"))
    config_refuse(r, "unet", "a checkpoint must have one");
  (void)has_component(r, "vae", "AutoencoderKL");
}

int index_config_parse(struct index_config *c, const char *text, size_t n, const char *label, struct err *e)
{
  struct config_reader r;
  int code;

  *c = (struct index_config){0};
  code = config_open(&r, text, n, label, e);
  if (!code) {
    read_index(&r, c);
    code = config_done(&r, 0);
  }
  config_close(&r);
  return code;
}

/* ---- files ---- */

/* The whole file, malloc'ed. */
static int read_file(const char *path, char **text, size_t *n, struct err *e)
{
  FILE *f = fopen(path, "rb");
  int code = 0;

  *text = NULL;
  if (!f)
    return err_field(e, E_FILE, path, "%.150s: cannot be opened: %s", path, strerror(errno));
  *text = malloc(CONFIG_MAX_BYTES + 1);
  if (!*text) {
    code = err_set(e, E_NOMEM, "no memory to read %s", path);
    goto out;
  }
  *n = fread(*text, 1, CONFIG_MAX_BYTES + 1, f);
  if (ferror(f))
    code = err_field(e, E_FILE, path, "%.150s: cannot be read: %s", path, strerror(errno));
  else if (*n > CONFIG_MAX_BYTES)
    code = err_field(e, E_FILE, path, "%.150s: larger than %d bytes", path, CONFIG_MAX_BYTES);
out:
  fclose(f);
  return code;
}

int unet_config_load(struct unet_config *c, const char *path, struct err *e)
{
  char *text;
  size_t n;
  int code = read_file(path, &text, &n, e);

  if (!code)
    code = unet_config_parse(c, text, n, path, e);
  free(text);
  return code;
}

int vae_config_load(struct vae_config *c, const char *path, struct err *e)
{
  char *text;
  size_t n;
  int code = read_file(path, &text, &n, e);

  if (!code)
    code = vae_config_parse(c, text, n, path, e);
  free(text);
  return code;
}

int clip_config_load(struct clip_config *c, const char *path, struct err *e)
{
  char *text;
  size_t n;
  int code = read_file(path, &text, &n, e);

  if (!code)
    code = clip_config_parse(c, text, n, path, e);
  free(text);
  return code;
}

int schedule_config_load(struct schedule_config *c, const char *path, struct err *e)
{
  char *text;
  size_t n;
  int code = read_file(path, &text, &n, e);

  if (!code)
    code = schedule_config_parse(c, text, n, path, e);
  free(text);
  return code;
}

int index_config_load(struct index_config *c, const char *path, struct err *e)
{
  char *text;
  size_t n;
  int code = read_file(path, &text, &n, e);

  if (!code)
    code = index_config_parse(c, text, n, path, e);
  free(text);
  return code;
}

int pad_token_load(char *token, size_t cap, const char *path, struct err *e)
{
  struct config_reader r = {0};
  const json_t *v;
  char *text;
  size_t n;
  int code;

  token[0] = 0;
  if (access(path, F_OK) && errno == ENOENT)
    return 0;
  code = read_file(path, &text, &n, e);
  if (!code)
    code = config_open(&r, text, n, path, e);
  v = json_object_get(r.root, "pad_token"); /* a string, or an object with "content" */
  if (json_is_object(v))
    v = json_object_get(v, "content");
  if (!code && v && !json_is_null(v) && (!json_is_string(v) || json_string_length(v) >= cap))
    code = err_field(e, E_FILE, path, "%.150s: pad_token is not a string of at most %zu bytes", path, cap - 1);
  else if (!code && json_is_string(v))
    snprintf(token, cap, "%s", json_string_value(v));
  config_close(&r);
  free(text);
  return code;
}
