/*
 * vae.c - see vae.h. Formulas and names: diffusers' AutoencoderKL, Encoder, Decoder; MODEL.md.
 *
 * Encoder and decoder are the same list of blocks walked in opposite directions. The picture on its way lies in one of two pieces
 * of memory: residual blocks work in place where the channels stay the same, and move to the other piece where they change.
 */
#include "models/vae.h"

#include <assert.h>
#include <stdlib.h>

#include "models/blocks.h"

enum { MAX_BLOCK = CONFIG_MAX_LAYERS + 1 };

/* Attention over all pixels with one head. */
struct pixel_attention {
  int norm, q, k, v, out;
};

struct coder_block {
  int n;
  struct resnet resnet[MAX_BLOCK];
  int resample;                /* the convolution of the up- or downsampler, or SITE_NONE */
};

struct coder {
  int is_decoder;
  int conv_in, norm_out, conv_out;
  int in;                      /* channels after conv_in */
  int mid_channels;
  struct resnet mid[2];
  struct pixel_attention attn;
  struct coder_block block[CONFIG_MAX_LEVELS];
};

struct vae {
  struct vae_config c;
  int has_encoder;
  struct coder encoder, decoder;
  int quant, post_quant;       /* 1x1 convolutions on the moments and on the latent, or SITE_NONE */
};

static const double norm_eps = 1e-6; /* everywhere in the VAE; no config changes it */

/* ---- building ---- */

static void mid_build(struct coder *k, const struct vae_config *c, struct builder *b)
{
  int C = k->mid_channels = c->channels[c->levels - 1];
  size_t mark = builder_enter(b, "mid_block"), inner;
  int j;

  for (j = 0; j < 2; j++) {
    inner = builder_enter(b, "resnets.%d", j);
    resnet_build(&k->mid[j], b, C, C, 0);
    builder_leave(b, inner);
  }
  if (c->mid_attn) {
    inner = builder_enter(b, "attentions.0");
    k->attn.norm = builder_norm(b, "group_norm", C);
    k->attn.q = builder_linear(b, "to_q", C, C, 1);
    k->attn.k = builder_linear(b, "to_k", C, C, 1);
    k->attn.v = builder_linear(b, "to_v", C, C, 1);
    k->attn.out = builder_linear(b, "to_out.0", C, C, 1);
    builder_leave(b, inner);
  }
  builder_leave(b, mark);
}

static void block_build(struct coder_block *k, struct builder *b, int n, int in, int out)
{
  int j;

  k->n = n;
  for (j = 0; j < n; j++) {
    size_t mark = builder_enter(b, "resnets.%d", j);

    resnet_build(&k->resnet[j], b, j ? out : in, out, 0);
    builder_leave(b, mark);
  }
}

static void encoder_build(struct coder *k, const struct vae_config *c, struct builder *b)
{
  size_t mark = builder_enter(b, "encoder");
  int i, last = c->levels - 1;

  k->in = c->channels[0];
  k->conv_in = builder_conv(b, "conv_in", c->in_channels, k->in, 3, 1, 1, 1);
  for (i = 0; i <= last; i++) {
    size_t inner = builder_enter(b, "down_blocks.%d", i);
    int C = c->channels[i];

    block_build(&k->block[i], b, c->layers, c->channels[i ? i - 1 : 0], C);
    /* One row and column of zeros after the picture, none before: what the first VAE was trained with. */
    k->block[i].resample = i < last ? builder_conv(b, "downsamplers.0.conv", C, C, 3, 2, 0, 1) : SITE_NONE;
    builder_leave(b, inner);
  }
  mid_build(k, c, b);
  k->norm_out = builder_norm(b, "conv_norm_out", k->mid_channels);
  k->conv_out = builder_conv(b, "conv_out", k->mid_channels, 2 * c->latent_channels, 3, 1, 1, 1);
  builder_leave(b, mark);
}

static void decoder_build(struct coder *k, const struct vae_config *c, struct builder *b)
{
  size_t mark = builder_enter(b, "decoder");
  int i, last = c->levels - 1;

  k->is_decoder = 1;
  k->in = c->channels[last];
  k->conv_in = builder_conv(b, "conv_in", c->latent_channels, k->in, 3, 1, 1, 1);
  mid_build(k, c, b);
  for (i = 0; i <= last; i++) {
    size_t inner = builder_enter(b, "up_blocks.%d", i);
    int C = c->channels[last - i];

    block_build(&k->block[i], b, c->layers + 1, c->channels[i ? last - i + 1 : last], C);
    k->block[i].resample = i < last ? builder_conv(b, "upsamplers.0.conv", C, C, 3, 1, 1, 1) : SITE_NONE;
    builder_leave(b, inner);
  }
  k->norm_out = builder_norm(b, "conv_norm_out", c->channels[0]);
  k->conv_out = builder_conv(b, "conv_out", c->channels[0], c->out_channels, 3, 1, 1, 1);
  builder_leave(b, mark);
}

int vae_new(struct vae **vae, const struct vae_config *c, int with_encoder, struct builder *b)
{
  struct vae *v = calloc(1, sizeof *v);
  int L = c->latent_channels;

  *vae = NULL;
  if (v) {
    v->c = *c;
    v->has_encoder = with_encoder;
    v->quant = v->post_quant = SITE_NONE;
    if (with_encoder) {
      encoder_build(&v->encoder, c, b);
      v->quant = c->use_quant_conv ? builder_conv(b, "quant_conv", 2 * L, 2 * L, 1, 1, 0, 0) : SITE_NONE;
    }
    v->post_quant = c->use_post_quant_conv ? builder_conv(b, "post_quant_conv", L, L, 1, 1, 0, 0) : SITE_NONE;
    decoder_build(&v->decoder, c, b);
  } else {
    builder_fail(b, E_NOMEM, "no memory for the network");
  }
  if (builder_finish(b)) {
    vae_free(v);
    return b->code;
  }
  *vae = v;
  return 0;
}

void vae_free(struct vae *v)
{
  free(v);
}

const struct vae_config *vae_config(const struct vae *v)
{
  return &v->c;
}

/* ---- forward ---- */

/* The two pieces of memory, and which one holds the picture now. */
struct pair {
  struct tensor memory[2];
  int at;
};

static struct tensor here(const struct pair *m, int64_t B, int64_t H, int64_t W, int64_t C)
{
  return tensor_within(m->memory[m->at], B, H, W, C);
}

static struct tensor there(struct pair *m, int64_t B, int64_t H, int64_t W, int64_t C)
{
  m->at ^= 1;
  return here(m, B, H, W, C);
}

/* How large each piece must be for blocks_forward: the same walk, with sizes only. need: numbers per row of the batch. */
static void measure(const struct vae *v, const struct coder *k, int64_t pixels, int64_t need[2])
{
  int i, j, at = 0;

  need[0] = k->in * pixels;
  need[1] = 1;
  for (i = 0; i < v->c.levels; i++) {
    const struct coder_block *b = &k->block[i];
    int64_t n = 0;

    for (j = 0; j < b->n; j++) {
      at ^= b->resnet[j].in != b->resnet[j].out;
      n = b->resnet[j].out * pixels;
      need[at] = n > need[at] ? n : need[at];
    }
    if (b->resample == SITE_NONE)
      continue;
    pixels = k->is_decoder ? pixels * 4 : pixels / 4;
    n = k->is_decoder ? n * 4 : n / 4;
    at ^= !k->is_decoder; /* a convolution with a stride cannot write where it reads */
    need[at] = n > need[at] ? n : need[at];
  }
}

static struct pair pair_alloc(struct run *r, const struct vae *v, const struct coder *k, int64_t B, int64_t H, int64_t W)
{
  struct pair m = {.at = 0};
  int64_t need[2];

  measure(v, k, H * W, need);
  m.memory[0] = run_alloc(r, B, 1, 1, need[0]);
  m.memory[1] = run_alloc(r, B, 1, 1, need[1]);
  return m;
}

/* x (B, h, w, C) += out(attention(norm(x))), one head as wide as C. */
static void attention_forward(struct run *r, const struct vae *v, const struct pixel_attention *a, struct tensor x)
{
  size_t mark = run_mark(r);
  int64_t B = x.d[0], T = x.d[1] * x.d[2], C = x.d[3];
  struct tensor tokens = tensor_view(x, B, 1, T, C);
  struct tensor n = run_alloc(r, B, 1, T, C); /* (B, 1, T, C), as q, k and v */
  struct tensor q = run_alloc(r, B, 1, T, C);
  struct tensor k = run_alloc(r, B, 1, T, C);
  struct tensor w = run_alloc(r, B, 1, T, C);

  run_groupnorm(r, tensor_view(n, B, x.d[1], x.d[2], C), x, tensor_none(), a->norm, v->c.groups, norm_eps, 0);
  run_linear(r, q, n, a->q, tensor_none());
  run_linear(r, k, n, a->k, tensor_none());
  run_linear(r, w, n, a->v, tensor_none());
  run_self_attention(r, n, q, k, w, 1, 0);
  run_linear(r, tokens, n, a->out, tokens);
  run_reset(r, mark);
}

static void mid_forward(struct run *r, const struct vae *v, const struct coder *k, struct tensor x)
{
  struct group_norm norm = {v->c.groups, norm_eps};

  resnet_forward(r, &k->mid[0], x, x, tensor_none(), norm);
  if (v->c.mid_attn)
    attention_forward(r, v, &k->attn, x);
  resnet_forward(r, &k->mid[1], x, x, tensor_none(), norm);
}

/* (B, H, W, C) -> (B, 2H, 2W, C) in the same memory: the enlarged copy is read instead. */
static struct tensor up_forward(struct run *r, const struct coder_block *b, struct pair *m, struct tensor x)
{
  size_t mark = run_mark(r);
  struct tensor large = run_alloc(r, x.d[0], 2 * x.d[1], 2 * x.d[2], x.d[3]);

  run_upsample2x(r, large, x);
  x = here(m, large.d[0], large.d[1], large.d[2], large.d[3]);
  run_conv(r, x, large, b->resample, tensor_none());
  run_reset(r, mark);
  return x;
}

static struct tensor blocks_forward(struct run *r, const struct vae *v, const struct coder *k, struct pair *m, struct tensor x)
{
  struct group_norm norm = {v->c.groups, norm_eps};
  int i, j;

  for (i = 0; i < v->c.levels; i++) {
    const struct coder_block *b = &k->block[i];

    for (j = 0; j < b->n; j++) {
      const struct resnet *n = &b->resnet[j];
      struct tensor y = n->in == n->out ? x : there(m, x.d[0], x.d[1], x.d[2], n->out);

      resnet_forward(r, n, y, x, tensor_none(), norm);
      x = y;
    }
    if (b->resample != SITE_NONE && k->is_decoder) {
      x = up_forward(r, b, m, x);
    } else if (b->resample != SITE_NONE) {
      struct tensor y = there(m, x.d[0], x.d[1] / 2, x.d[2] / 2, x.d[3]);

      run_conv(r, y, x, b->resample, tensor_none());
      x = y;
    }
  }
  return x;
}

int vae_decode(struct run *r, const struct vae *v, struct tensor z, struct tensor rgb)
{
  const struct coder *k = &v->decoder;
  size_t mark = run_mark(r);
  int64_t B = z.d[0], H = z.d[1], W = z.d[2];
  struct pair m = pair_alloc(r, v, k, B, H, W);
  struct tensor x, n;

  if (v->post_quant != SITE_NONE) {
    n = run_alloc(r, B, H, W, v->c.latent_channels); /* (B, h, w, L) */
    run_linear(r, n, z, v->post_quant, tensor_none());
    z = n;
  }
  x = here(&m, B, H, W, k->in); /* (B, h, w, C_last) */
  run_conv(r, x, z, k->conv_in, tensor_none());
  mid_forward(r, v, k, x);
  x = blocks_forward(r, v, k, &m, x); /* (B, h*f, w*f, C_0) */
  run_groupnorm(r, x, x, tensor_none(), k->norm_out, v->c.groups, norm_eps, 1);
  run_conv(r, rgb, x, k->conv_out, tensor_none());
  run_reset(r, mark);
  return r->code;
}

int vae_encode(struct run *r, const struct vae *v, struct tensor rgb, struct tensor moments)
{
  const struct coder *k = &v->encoder;
  size_t mark = run_mark(r);
  int64_t B = rgb.d[0], H = rgb.d[1], W = rgb.d[2];
  struct pair m = pair_alloc(r, v, k, B, H, W);
  struct tensor x, n;

  assert(v->has_encoder && H % v->c.factor == 0 && W % v->c.factor == 0);
  x = here(&m, B, H, W, k->in); /* (B, H, W, C_0) */
  run_conv(r, x, rgb, k->conv_in, tensor_none());
  x = blocks_forward(r, v, k, &m, x); /* (B, H/f, W/f, C_last) */
  mid_forward(r, v, k, x);
  run_groupnorm(r, x, x, tensor_none(), k->norm_out, v->c.groups, norm_eps, 1);
  if (v->quant != SITE_NONE) {
    n = run_alloc(r, B, x.d[1], x.d[2], 2 * v->c.latent_channels); /* (B, h, w, 2L) */
    run_conv(r, n, x, k->conv_out, tensor_none());
    run_linear(r, moments, n, v->quant, tensor_none());
  } else {
    run_conv(r, moments, x, k->conv_out, tensor_none());
  }
  run_reset(r, mark);
  return r->code;
}
