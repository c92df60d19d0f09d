/*
 * blocks.c - see blocks.h. Formulas: diffusers' ResnetBlock2D, Transformer2DModel, BasicTransformerBlock; MODEL.md.
 */
#include "models/blocks.h"

#include <assert.h>

#include "models/unet.h"

struct tensor tensor_within(struct tensor memory, int64_t b, int64_t h, int64_t w, int64_t c)
{
  struct tensor t = {memory.p, {b, h, w, c}, memory.type};

  assert(tensor_count(t) <= tensor_count(memory));
  return t;
}

/* ---- residual block ---- */

void resnet_build(struct resnet *n, struct builder *b, int in, int out, int temb_dim)
{
  n->in = in;
  n->out = out;
  n->norm1 = builder_norm(b, "norm1", in);
  n->conv1 = builder_conv(b, "conv1", in, out, 3, 1, 1, 1);
  n->temb = temb_dim ? builder_linear(b, "time_emb_proj", temb_dim, out, 1) : SITE_NONE;
  n->norm2 = builder_norm(b, "norm2", out);
  n->conv2 = builder_conv(b, "conv2", out, out, 3, 1, 1, 1);
  n->shortcut = in != out ? builder_conv(b, "conv_shortcut", in, out, 1, 1, 0, 0) : SITE_NONE;
}

void resnet_forward(struct run *r, const struct resnet *n, struct tensor y, struct tensor x, struct tensor temb,
                    struct group_norm norm)
{
  size_t mark = run_mark(r);
  int64_t B = x.d[0], H = x.d[1], W = x.d[2];
  struct tensor a = run_alloc(r, B, H, W, n->in);  /* (B, H, W, in) */
  struct tensor h = run_alloc(r, B, H, W, n->out); /* (B, H, W, out) */
  struct tensor t = tensor_none(), skip = x;

  run_groupnorm(r, a, x, tensor_none(), n->norm1, norm.groups, norm.eps, 1);
  run_conv(r, h, a, n->conv1, tensor_none());
  if (n->temb != SITE_NONE) {
    t = run_alloc(r, B, 1, 1, n->out); /* (B, 1, 1, out), added to every pixel */
    run_linear(r, t, temb, n->temb, tensor_none());
  }
  run_groupnorm(r, h, h, t, n->norm2, norm.groups, norm.eps, 1);
  if (n->shortcut != SITE_NONE) {
    run_linear(r, y, x, n->shortcut, tensor_none());
    skip = y;
  }
  run_conv(r, y, h, n->conv2, skip);
  run_reset(r, mark);
}

/* ---- transformer ---- */

static void layer_build(struct transformer_layer *l, struct builder *b, int C, int context_dim)
{
  l->width = C;
  l->norm1 = builder_norm(b, "norm1", C);
  l->q1 = builder_linear(b, "attn1.to_q", C, C, 0);
  l->k1 = builder_linear(b, "attn1.to_k", C, C, 0);
  l->v1 = builder_linear(b, "attn1.to_v", C, C, 0);
  l->out1 = builder_linear(b, "attn1.to_out.0", C, C, 1);
  l->norm2 = builder_norm(b, "norm2", C);
  l->q2 = builder_linear(b, "attn2.to_q", C, C, 0);
  l->k2 = builder_linear(b, "attn2.to_k", context_dim, C, 0);
  l->v2 = builder_linear(b, "attn2.to_v", context_dim, C, 0);
  l->out2 = builder_linear(b, "attn2.to_out.0", C, C, 1);
  l->norm3 = builder_norm(b, "norm3", C);
  l->ff_in = builder_linear(b, "ff.net.0.proj", C, 8 * C, 1); /* value and gate, 4C each */
  l->ff_out = builder_linear(b, "ff.net.2", 4 * C, C, 1);
}

void transformer_build(struct transformer *t, struct transformer_layer *layer, struct builder *b, int channels, int heads,
                       int depth, int context_dim, int64_t *kv_at)
{
  int i;

  *t = (struct transformer){.heads = heads, .depth = depth, .layer = layer};
  t->norm = builder_norm(b, "norm", channels);
  t->proj_in = builder_linear(b, "proj_in", channels, channels, 1);
  for (i = 0; i < depth; i++) {
    size_t mark = builder_enter(b, "transformer_blocks.%d", i);

    layer_build(&layer[i], b, channels, context_dim);
    layer[i].kv_at = *kv_at;
    *kv_at += 2 * channels;
    builder_leave(b, mark);
  }
  t->proj_out = builder_linear(b, "proj_out", channels, channels, 1);
}

int64_t unet_context_stride(int64_t T)
{
  return (T + 31) / 32 * 32; /* 32 numbers of 2 bytes: 64 bytes whatever the width */
}

struct tensor unet_context_tensor(const struct unet_context *c, int64_t kv_at, int64_t width, enum dtype act)
{
  size_t at = (size_t)(kv_at * unet_context_stride(c->T)) * dtype_size(act);

  return (struct tensor){c->mem ? (char *)c->mem + at : NULL, {1, 1, c->T, width}, act};
}

/* h (B, 1, T, C) in place; n: scratch of the same shape. */
static void layer_forward(struct run *r, const struct transformer_layer *l, struct tensor h, struct tensor n, int heads,
                          const struct unet_context *const *prompt)
{
  const double eps = 1e-5; /* torch's default for LayerNorm; no config changes it */
  struct kv_row kv[RUN_MAX_ROWS];
  size_t mark = run_mark(r);
  int64_t b, B = h.d[0], T = h.d[2], C = h.d[3];
  struct tensor qkv = run_alloc(r, RUN_LINEARS * B, 1, T, C), q = tensor_batch(qkv, 0, B); /* q (B, 1, T, N*K), then k and v */
  struct tensor g, f;

  /* h += attention(h, h) */
  run_layernorm(r, n, h, l->norm1, eps);
  run_linears(r, qkv, n, (const int[]){l->q1, l->k1, l->v1});
  run_self_attention(r, n, q, tensor_batch(qkv, B, B), tensor_batch(qkv, 2 * B, B), heads, 0);
  run_linear(r, h, n, l->out1, h);

  /* h += attention(h, prompt) */
  for (b = 0; b < B; b++) {
    kv[b].k = unet_context_tensor(prompt[b], l->kv_at, C, h.type).p;
    kv[b].v = unet_context_tensor(prompt[b], l->kv_at + C, C, h.type).p;
    kv[b].T = prompt[b]->T;
  }
  run_layernorm(r, n, h, l->norm2, eps);
  run_linear(r, q, n, l->q2, tensor_none());
  run_attention(r, n, q, kv, heads, 0);
  run_linear(r, h, n, l->out2, h);
  run_reset(r, mark);

  /* h += feed-forward(h) */
  g = run_alloc(r, B, 1, T, 8 * C); /* (B, 1, T, 4C | 4C) */
  f = run_alloc(r, B, 1, T, 4 * C); /* (B, 1, T, 4C) */
  run_layernorm(r, n, h, l->norm3, eps);
  run_linear(r, g, n, l->ff_in, tensor_none());
  run_geglu(r, f, g);
  run_linear(r, h, f, l->ff_out, h);
  run_reset(r, mark);
}

void transformer_forward(struct run *r, const struct transformer *t, struct tensor x,
                         const struct unet_context *const *prompt, int groups)
{
  size_t mark = run_mark(r);
  int64_t B = x.d[0], H = x.d[1], W = x.d[2], C = x.d[3];
  struct tensor tokens = tensor_view(x, B, 1, H * W, C); /* pixels are tokens: channels-last needs no transpose */
  struct tensor h = run_alloc(r, B, 1, H * W, C);
  struct tensor n = run_alloc(r, B, 1, H * W, C);
  int i;

  assert(B <= RUN_MAX_ROWS);
  run_groupnorm(r, tensor_view(n, B, H, W, C), x, tensor_none(), t->norm, groups, 1e-6, 0);
  run_linear(r, h, n, t->proj_in, tensor_none());
  for (i = 0; i < t->depth; i++)
    layer_forward(r, &t->layer[i], h, n, t->heads, prompt);
  run_linear(r, tokens, h, t->proj_out, tokens);
  run_reset(r, mark);
}
