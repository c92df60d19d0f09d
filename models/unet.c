/*
 * unet.c - see unet.h. Formulas and names: diffusers' UNet2DConditionModel; MODEL.md.
 */
#include "models/unet.h"

#include <assert.h>
#include <stdlib.h>

#include "models/blocks.h"

enum { MAX_BLOCK = CONFIG_MAX_LAYERS + 1, MAX_SKIPS = 1 + CONFIG_MAX_LEVELS * MAX_BLOCK };

/* A down or up block; the middle block has n = 2 and one attention. */
struct block {
  int n;
  struct resnet resnet[MAX_BLOCK];
  int has_attn;
  struct transformer attn[MAX_BLOCK]; /* one per resnet */
  int resample;                       /* the convolution of the down- or upsampler, or SITE_NONE */
};

struct unet {
  struct unet_config c;
  int time1, time2, add1, add2;       /* time embedding, added embedding */
  int conv_in, norm_out, conv_out;
  struct block down[CONFIG_MAX_LEVELS], mid, up[CONFIG_MAX_LEVELS];
  struct transformer_layer *layer;    /* of all transformers, in the order they run */
  int n_layers;
  int64_t kv_width;                   /* numbers per prompt token in a unet_context */
};

/* ---- building ---- */

static int count_layers(const struct unet_config *c)
{
  int i, n = c->has_mid ? c->depth[c->levels - 1] : 0;

  for (i = 0; i < c->levels; i++) {
    n += c->down_attn[i] ? c->layers[i] * c->depth[i] : 0;
    n += c->up_attn[c->levels - 1 - i] ? (c->layers[i] + 1) * c->depth[i] : 0;
  }
  return n;
}

/* Attention j of a block on the given level. */
static void attn_build(struct unet *u, struct builder *b, struct block *k, int j, int level)
{
  const struct unet_config *c = &u->c;
  size_t mark = builder_enter(b, "attentions.%d", j);

  transformer_build(&k->attn[j], u->layer + u->n_layers, b, c->channels[level], c->heads[level], c->depth[level],
                    c->context_dim, &u->kv_width);
  u->n_layers += c->depth[level];
  builder_leave(b, mark);
}

static void resnet_build_at(struct builder *b, struct block *k, int j, int in, int out, int temb_dim)
{
  size_t mark = builder_enter(b, "resnets.%d", j);

  resnet_build(&k->resnet[j], b, in, out, temb_dim);
  builder_leave(b, mark);
}

static void down_build(struct unet *u, struct builder *b, int i)
{
  const struct unet_config *c = &u->c;
  struct block *k = &u->down[i];
  size_t mark = builder_enter(b, "down_blocks.%d", i);
  int j, in = c->channels[i ? i - 1 : 0], out = c->channels[i];

  k->n = c->layers[i];
  k->has_attn = c->down_attn[i];
  for (j = 0; j < k->n; j++) {
    resnet_build_at(b, k, j, j ? out : in, out, 4 * c->channels[0]);
    if (k->has_attn)
      attn_build(u, b, k, j, i);
  }
  k->resample = i < c->levels - 1 ? builder_conv(b, "downsamplers.0.conv", out, out, 3, 2, 1, 1) : SITE_NONE;
  builder_leave(b, mark);
}

static void mid_build(struct unet *u, struct builder *b)
{
  int level = u->c.levels - 1, C = u->c.channels[level];
  size_t mark = builder_enter(b, "mid_block");

  u->mid.n = 2;
  resnet_build_at(b, &u->mid, 0, C, C, 4 * u->c.channels[0]);
  attn_build(u, b, &u->mid, 0, level);
  resnet_build_at(b, &u->mid, 1, C, C, 4 * u->c.channels[0]);
  builder_leave(b, mark);
}

static void up_build(struct unet *u, struct builder *b, int i)
{
  const struct unet_config *c = &u->c;
  struct block *k = &u->up[i];
  size_t mark = builder_enter(b, "up_blocks.%d", i);
  int level = c->levels - 1 - i, out = c->channels[level];
  int before = c->channels[i ? level + 1 : level]; /* what comes up from below */
  int last_skip = c->channels[level ? level - 1 : 0]; /* the first thing the down path made on this level */
  int j;

  k->n = c->layers[level] + 1;
  k->has_attn = c->up_attn[i];
  for (j = 0; j < k->n; j++) {
    resnet_build_at(b, k, j, (j ? out : before) + (j == k->n - 1 ? last_skip : out), out, 4 * c->channels[0]);
    if (k->has_attn)
      attn_build(u, b, k, j, level);
  }
  k->resample = level ? builder_conv(b, "upsamplers.0.conv", out, out, 3, 1, 1, 1) : SITE_NONE;
  builder_leave(b, mark);
}

static void build(struct unet *u, struct builder *b)
{
  const struct unet_config *c = &u->c;
  int i, C = c->channels[0];

  u->conv_in = builder_conv(b, "conv_in", c->in_channels, C, 3, 1, 1, 1);
  u->time1 = builder_linear(b, "time_embedding.linear_1", C, 4 * C, 1);
  u->time2 = builder_linear(b, "time_embedding.linear_2", 4 * C, 4 * C, 1);
  u->add1 = c->add_time_dim ? builder_linear(b, "add_embedding.linear_1", c->add_in_dim, 4 * C, 1) : SITE_NONE;
  u->add2 = c->add_time_dim ? builder_linear(b, "add_embedding.linear_2", 4 * C, 4 * C, 1) : SITE_NONE;
  for (i = 0; i < c->levels; i++)
    down_build(u, b, i);
  if (c->has_mid)
    mid_build(u, b);
  for (i = 0; i < c->levels; i++)
    up_build(u, b, i);
  u->norm_out = builder_norm(b, "conv_norm_out", C);
  u->conv_out = builder_conv(b, "conv_out", C, c->out_channels, 3, 1, 1, 1);
}

int unet_new(struct unet **unet, const struct unet_config *c, struct builder *b)
{
  struct unet *u = calloc(1, sizeof *u);

  *unet = NULL;
  if (u)
    u->layer = calloc((size_t)count_layers(c) + 1, sizeof *u->layer);
  if (u && u->layer) {
    u->c = *c;
    build(u, b);
  } else {
    builder_fail(b, E_NOMEM, "no memory for the network");
  }
  if (builder_finish(b)) {
    unet_free(u);
    return b->code;
  }
  *unet = u;
  return 0;
}

void unet_free(struct unet *u)
{
  if (!u)
    return;
  free(u->layer);
  free(u);
}

const struct unet_config *unet_config(const struct unet *u)
{
  return &u->c;
}

/* ---- the prompt ---- */

size_t unet_context_bytes(const struct unet *u, int64_t T, enum dtype act)
{
  return (size_t)(u->kv_width * unet_context_stride(T)) * dtype_size(act);
}

int unet_context_fill(struct run *r, const struct unet *u, struct unet_context *c, struct tensor prompt)
{
  int i;

  assert(prompt.d[2] == c->T && prompt.d[3] == u->c.context_dim);
  for (i = 0; i < u->n_layers; i++) {
    const struct transformer_layer *l = &u->layer[i];

    run_linear(r, unet_context_tensor(c, l->kv_at, l->width, prompt.type), prompt, l->k2, tensor_none());
    run_linear(r, unet_context_tensor(c, l->kv_at + l->width, l->width, prompt.type), prompt, l->v2, tensor_none());
  }
  return r->code;
}

/* ---- forward ---- */

/* What every block of one pass sees. */
struct pass {
  struct run *r;
  const struct unet *u;
  struct group_norm norm;                /* of the resnets */
  struct tensor temb;                    /* (B, 1, 1, 4*C0), after SiLU */
  const struct unet_context *const *prompt; /* one per row */
  struct tensor skip[MAX_SKIPS];         /* what the down path leaves for the up path, last first */
  size_t mark[MAX_SKIPS];                /* the arena below each */
  int n_skips;
};

static struct tensor push_skip(struct pass *p, int64_t B, int64_t H, int64_t W, int64_t C)
{
  p->mark[p->n_skips] = run_mark(p->r);
  p->skip[p->n_skips] = run_alloc(p->r, B, H, W, C);
  return p->skip[p->n_skips++];
}

/* emb (B, 1, 1, 4*C0) = MLP(sinusoids of t) [+ MLP(pooled text | sinusoids of the sizes)], then the SiLU that every resnet
 * puts in front of its own projection. */
static void embed_time(struct pass *p, const struct unet_input *in, struct tensor emb)
{
  struct run *r = p->r;
  const struct unet_config *c = &p->u->c;
  size_t mark = run_mark(r);
  int64_t B = emb.d[0], n = in->n_time_ids;
  struct tensor t = run_alloc(r, B, 1, 1, c->channels[0]);     /* (B, 1, 1, C0) */
  struct tensor h = run_alloc(r, B, 1, 1, 4 * c->channels[0]); /* (B, 1, 1, 4*C0) */

  run_timestep_embed(r, t, in->t, c->flip_sin_to_cos, c->freq_shift);
  run_linear(r, h, t, p->u->time1, tensor_none());
  run_act(r, h, h, ACT_SILU);
  run_linear(r, emb, h, p->u->time2, tensor_none());
  if (c->add_time_dim) {
    struct tensor ids = run_alloc(r, B * n, 1, 1, c->add_time_dim); /* (B*n, 1, 1, D) = (B, 1, 1, n*D) */
    struct tensor cat = run_alloc(r, B, 1, 1, c->add_in_dim);       /* (B, 1, 1, P + n*D) */

    assert(in->text_embeds.d[3] + n * c->add_time_dim == c->add_in_dim);
    run_timestep_embed(r, ids, in->time_ids, c->flip_sin_to_cos, c->freq_shift);
    run_concat(r, cat, in->text_embeds, tensor_view(ids, B, 1, 1, n * c->add_time_dim));
    run_linear(r, h, cat, p->u->add1, tensor_none());
    run_act(r, h, h, ACT_SILU);
    run_linear(r, emb, h, p->u->add2, emb);
  }
  run_act(r, emb, emb, ACT_SILU);
  run_reset(r, mark);
}

/* Resnet j of the block, then its attention: x (B, H, W, in) -> y (B, H, W, out). */
static void block_layer(struct pass *p, const struct block *k, int j, struct tensor y, struct tensor x)
{
  resnet_forward(p->r, &k->resnet[j], y, x, p->temb, p->norm);
  if (k->has_attn)
    transformer_forward(p->r, &k->attn[j], y, p->prompt, p->u->c.groups);
}

/* Every output of the block becomes a skip; the last one goes on. */
static struct tensor down_forward(struct pass *p, const struct block *k, struct tensor x)
{
  int j;

  for (j = 0; j < k->n; j++) {
    struct tensor y = push_skip(p, x.d[0], x.d[1], x.d[2], k->resnet[j].out);

    block_layer(p, k, j, y, x);
    x = y;
  }
  if (k->resample != SITE_NONE) {
    struct tensor y = push_skip(p, x.d[0], (x.d[1] + 1) / 2, (x.d[2] + 1) / 2, x.d[3]);

    run_conv(p->r, y, x, k->resample, tensor_none());
    x = y;
  }
  return x;
}

/* x (the deepest skip) stays as it is; the result lies in the memory of h. */
static struct tensor mid_forward(struct pass *p, struct tensor h, struct tensor x)
{
  const struct block *k = &p->u->mid;

  h = tensor_within(h, x.d[0], x.d[1], x.d[2], x.d[3]);
  resnet_forward(p->r, &k->resnet[0], h, x, p->temb, p->norm);
  transformer_forward(p->r, &k->attn[0], h, p->prompt, p->u->c.groups);
  resnet_forward(p->r, &k->resnet[1], h, h, p->temb, p->norm);
  return h;
}

/* Each resnet takes what came so far beside the newest skip that is left. x lies in the memory of h or is a skip; so does the
 * result: concat and upsample copy x before h is written. */
static struct tensor up_forward(struct pass *p, const struct block *k, struct tensor h, struct tensor x)
{
  int64_t B = x.d[0], H = x.d[1], W = x.d[2];
  int j;

  for (j = 0; j < k->n; j++) {
    struct tensor skip = p->skip[--p->n_skips];
    struct tensor cat = run_alloc(p->r, B, H, W, x.d[3] + skip.d[3]); /* (B, H, W, in) */

    run_concat(p->r, cat, x, skip);
    x = tensor_within(h, B, H, W, k->resnet[j].out);
    block_layer(p, k, j, x, cat);
    run_reset(p->r, p->mark[p->n_skips]); /* the skip is spent */
  }
  if (k->resample != SITE_NONE) {
    size_t mark = run_mark(p->r);
    struct tensor next = p->skip[p->n_skips - 1]; /* its size decides: odd ones were rounded up on the way down */
    struct tensor large = run_alloc(p->r, B, next.d[1], next.d[2], x.d[3]);

    run_upsample2x(p->r, large, x);
    x = tensor_within(h, B, next.d[1], next.d[2], x.d[3]);
    run_conv(p->r, x, large, k->resample, tensor_none());
    run_reset(p->r, mark);
  }
  return x;
}

/* The most numbers of one picture that the up path ever holds: after an upsampler, a level's channels at the size above. */
static int64_t up_numbers(const struct unet_config *c, int64_t H, int64_t W)
{
  int64_t most = H * W * c->channels[0];
  int level;

  for (level = 1; level < c->levels; level++) {
    int64_t n = H * W * c->channels[level];

    most = n > most ? n : most;
    H = (H + 1) / 2;
    W = (W + 1) / 2;
  }
  return most;
}

MUST_CHECK static int forward(struct run *r, const struct unet *u, const struct unet_input *in, struct tensor out)
{
  const struct unet_config *c = &u->c;
  struct pass p = {.r = r, .u = u, .norm = {c->groups, c->norm_eps}, .prompt = in->context};
  size_t mark = run_mark(r);
  int64_t B = in->sample.d[0], H = in->sample.d[1], W = in->sample.d[2], C = c->channels[0];
  struct tensor h, x, n; /* h: memory of the up path */
  int i;

  assert(B <= RUN_MAX_ROWS);
  p.temb = run_alloc(r, B, 1, 1, 4 * C);
  embed_time(&p, in, p.temb);
  h = run_alloc(r, B, 1, 1, up_numbers(c, H, W));

  x = push_skip(&p, B, H, W, C); /* (B, H, W, C0) */
  run_conv(r, x, in->sample, u->conv_in, tensor_none());
  for (i = 0; i < c->levels; i++)
    x = down_forward(&p, &u->down[i], x); /* (B, H/2^i, W/2^i, C_i) */
  if (c->has_mid)
    x = mid_forward(&p, h, x);
  for (i = 0; i < c->levels; i++)
    x = up_forward(&p, &u->up[i], h, x);

  n = run_alloc(r, B, H, W, C); /* (B, H, W, C0) */
  run_groupnorm(r, n, x, tensor_none(), u->norm_out, c->groups, c->norm_eps, 1);
  run_conv(r, out, n, u->conv_out, tensor_none());
  run_reset(r, mark);
  return r->code;
}

/* A pass of backend.h, walked again as often as the backend asks for it. */
int unet_forward(struct run *r, const struct unet *u, const struct unet_input *in, struct tensor out)
{
  const struct be_ops *ops = r->be->ops;
  double macs = r->macs;
  int again = 1;

  if (r->observer) /* looks at numbers meanwhile */
    return forward(r, u, in, out);
  while (again && !r->code) {
    r->macs = macs;
    r->code = ops->pass_begin(r->be, r->arena->base, r->arena->size, r->e);
    if (r->code)
      return r->code;
    r->code = ops->pass_end(r->be, forward(r, u, in, out), &again, r->e);
    if (again && r->e)
      *r->e = (struct err){0}; /* of a walk that does not count */
  }
  return r->code;
}
