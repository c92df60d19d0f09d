/*
 * networks_bugs.c - mistakes that one makes when writing these networks; each must push its golden out of tolerance.
 *
 * Planted from outside: in the configuration after it was read, or in entries of be_ref's table, whose F32 tensors in host memory are
 * computed on directly. Linked to the golden tests; see networks.h. Threads: none.
 */
#include <string.h>

#include "tests/golden/networks.h"

/* ---- configurations misread ---- */

static void sin_before_cos(struct nets *n)
{
  n->unet_config.flip_sin_to_cos = 0;
}

static void freq_shift_one(struct nets *n)
{
  n->unet_config.freq_shift = 1;
}

/* attention_head_dim taken by its name. */
static void heads_are_dims(struct nets *n)
{
  int i;

  for (i = 0; i < n->unet_config.levels; i++)
    n->unet_config.heads[i] = n->unet_config.channels[i] / n->unet_config.heads[i];
}

static void half_the_groups(struct nets *n)
{
  n->unet_config.groups /= 2;
}

static void unet_eps(struct nets *n)
{
  n->unet_config.norm_eps = 1e-6;
}

static void exact_gelu(struct nets *n)
{
  n->clip_config.act = ACT_GELU;
}

static void quick_gelu(struct nets *n)
{
  n->clip_config.act = ACT_QUICK_GELU;
}

/* sd21 pads with id 0: a wrong end mark pools the wrong row. */
static void wrong_eos(struct nets *n)
{
  n->clip_config.eos = 0;
}

static void skip_one_less(struct nets *n)
{
  n->wrong_skip = -1;
}

static void rows_mixed_up(struct nets *n)
{
  n->wrong_rows = 1;
}

static void time_ids_backwards(struct nets *n)
{
  n->wrong_ids = 1;
}

/* ---- wrong arithmetic ---- */

static int concat_backwards(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  return be_ref.concat(be, y, b, a, e);
}

static void skip_order(struct be_ops *ops)
{
  ops->concat = concat_backwards;
}

/* y = x[:F], without the gate. */
static int geglu_ungated(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  int64_t i, F = y.d[3];

  (void)be, (void)e;
  for (i = 0; i < tensor_rows(y); i++)
    memcpy((float *)y.p + i * F, (const float *)x.p + i * 2 * F, (size_t)F * sizeof(float));
  return 0;
}

static void no_gate(struct be_ops *ops)
{
  ops->geglu = geglu_ungated;
}

/* The two halves the other way round. */
static int geglu_swapped(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  int64_t i, j, F = y.d[3];

  for (i = 0; i < tensor_rows(x); i++)
    for (j = 0; j < F; j++) {
      float *row = (float *)x.p + i * 2 * F, t = row[j];

      row[j] = row[F + j];
      row[F + j] = t;
    }
  return be_ref.geglu(be, y, x, e);
}

static void gate_first(struct be_ops *ops)
{
  ops->geglu = geglu_swapped;
}

static int attention_unscaled(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                              int causal, struct err *e)
{
  (void)scale;
  return be_ref.attention(be, o, q, kv, heads, 1, causal, e);
}

static void no_scale(struct be_ops *ops)
{
  ops->attention = attention_unscaled;
}

static int attention_sees_all(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                              int causal, struct err *e)
{
  (void)causal;
  return be_ref.attention(be, o, q, kv, heads, scale, 0, e);
}

static void not_causal(struct be_ops *ops)
{
  ops->attention = attention_sees_all;
}

static int groupnorm_plain(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                           int groups, float eps, int silu, struct err *e)
{
  (void)silu;
  return be_ref.groupnorm(be, y, x, temb, w, groups, eps, 0, e);
}

static void no_silu(struct be_ops *ops)
{
  ops->groupnorm = groupnorm_plain;
}

static int groupnorm_timeless(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                              int groups, float eps, int silu, struct err *e)
{
  (void)temb;
  return be_ref.groupnorm(be, y, x, tensor_none(), w, groups, eps, silu, e);
}

static void no_temb(struct be_ops *ops)
{
  ops->groupnorm = groupnorm_timeless;
}

/* Of the transformers, which alone have no SiLU. */
static int groupnorm_large_eps(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                             int groups, float eps, int silu, struct err *e)
{
  return be_ref.groupnorm(be, y, x, temb, w, groups, silu ? eps : 1e-4f, silu, e);
}

static void transformer_eps(struct be_ops *ops)
{
  ops->groupnorm = groupnorm_large_eps;
}

static int layernorm_eps(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e)
{
  return be_ref.layernorm(be, y, x, w, eps * 10, e);
}

static void wrong_layernorm_eps(struct be_ops *ops)
{
  ops->layernorm = layernorm_eps;
}

static int linear_alone(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                        struct err *e)
{
  (void)residual;
  return be_ref.linear(be, y, x, w, tensor_none(), e);
}

static void no_residual(struct be_ops *ops)
{
  ops->linear = linear_alone;
}

/* The picture one pixel further right. */
static int upsample_shifted(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  int code = be_ref.upsample2x(be, y, x, e);
  int64_t i, row = y.d[2] * y.d[3];

  for (i = 0; !code && i < y.d[0] * y.d[1]; i++)
    memmove((float *)y.p + i * row + y.d[3], (float *)y.p + i * row, (size_t)(row - y.d[3]) * sizeof(float));
  return code;
}

static void upsample_off_by_one(struct be_ops *ops)
{
  ops->upsample2x = upsample_shifted;
}

/* Every strided convolution padded the other way: one zero on each side for the VAE, none before for the UNet. */
static int weight_padded_wrongly(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  struct weight_desc other = *d;

  if (d->kind == WEIGHT_CONV && d->stride == 2) {
    other.pad_lo = !d->pad_lo;
    other.pad_hi = 1;
  }
  return be_ref.weight_load(be, &other, like, w, e);
}

static void wrong_padding(struct be_ops *ops)
{
  ops->weight_load = weight_padded_wrongly;
}

const struct bug network_bugs[] = {
  {"sine before cosine", "sd15", "unet", sin_before_cos, NULL},
  {"freq_shift 1", "sd15", "unet", freq_shift_one, NULL},
  {"attention_head_dim read as a size", "sd15", "unet", heads_are_dims, NULL},
  {"attention_head_dim read as a size", "sdxl", "unet", heads_are_dims, NULL},
  {"half the norm groups", "sd21", "unet", half_the_groups, NULL},
  {"resnet eps 1e-6", "sd15", "unet", unet_eps, NULL},
  {"transformer norm eps 1e-4", "sd15", "unet", NULL, transformer_eps},
  {"layer norm eps 1e-4", "sd15", "unet", NULL, wrong_layernorm_eps},
  {"layer norm eps 1e-4", "sd15", "text", NULL, wrong_layernorm_eps},
  {"exact gelu for quick_gelu", "sd15", "text", exact_gelu, NULL},
  {"quick_gelu for exact gelu", "sd21", "text", quick_gelu, NULL},
  {"wrong end mark", "sd21", "text", wrong_eos, NULL},
  {"diffusers' clip skip for A1111's", "sd15", "text", skip_one_less, NULL},
  {"no causal mask", "sd15", "text", NULL, not_causal},
  {"no attention scale", "sd15", "text", NULL, no_scale},
  {"no attention scale", "sd15", "unet", NULL, no_scale},
  {"no attention scale", "sd15", "vae", NULL, no_scale},
  {"prompts of two rows swapped", "sd15", "unet", rows_mixed_up, NULL},
  {"size ids in reverse", "sdxl", "unet", time_ids_backwards, NULL},
  {"skip before what comes up", "sd15", "unet", NULL, skip_order},
  {"no gate in the feed-forward", "sd15", "unet", NULL, no_gate},
  {"gate and value swapped", "sd15", "unet", NULL, gate_first},
  {"no SiLU after the norms", "sd15", "unet", NULL, no_silu},
  {"no SiLU after the norms", "sd15", "vae", NULL, no_silu},
  {"no time embedding in the resnets", "odd", "unet", NULL, no_temb},
  {"no residuals around linears", "sd15", "unet", NULL, no_residual},
  {"upsampling shifted by a pixel", "sd15", "unet", NULL, upsample_off_by_one},
  {"upsampling shifted by a pixel", "odd", "vae", NULL, upsample_off_by_one},
  {"symmetric padding in the encoder", "sd15", "vae", NULL, wrong_padding},
  {"asymmetric padding in the UNet", "odd", "unet", NULL, wrong_padding},
};
const int network_bug_count = sizeof network_bugs / sizeof *network_bugs;
