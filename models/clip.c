/*
 * clip.c - see clip.h. Formulas and names: transformers' CLIPTextTransformer; MODEL.md.
 */
#include "models/clip.h"

#include <assert.h>
#include <stdlib.h>

struct layer {
  int norm1, q, k, v, out;
  int norm2, fc1, fc2;
};

struct clip {
  struct clip_config c;
  int tokens, positions;  /* embedding tables */
  struct layer *layer;    /* c.layers entries */
  int norm;               /* final_layer_norm */
};

/* ---- building ---- */

static void layer_build(struct layer *l, struct builder *b, const struct clip_config *c)
{
  int D = c->width;

  l->norm1 = builder_norm(b, "layer_norm1", D);
  l->q = builder_linear(b, "self_attn.q_proj", D, D, 1);
  l->k = builder_linear(b, "self_attn.k_proj", D, D, 1);
  l->v = builder_linear(b, "self_attn.v_proj", D, D, 1);
  l->out = builder_linear(b, "self_attn.out_proj", D, D, 1);
  l->norm2 = builder_norm(b, "layer_norm2", D);
  l->fc1 = builder_linear(b, "mlp.fc1", D, c->hidden, 1);
  l->fc2 = builder_linear(b, "mlp.fc2", c->hidden, D, 1);
}

int clip_new(struct clip **clip, const struct clip_config *c, struct builder *b)
{
  struct clip *m = calloc(1, sizeof *m);
  size_t mark = builder_enter(b, "text_model"), inner;
  int i;

  *clip = NULL;
  if (m)
    m->layer = calloc((size_t)c->layers, sizeof *m->layer);
  if (m && m->layer) {
    m->c = *c;
    m->tokens = builder_table(b, "embeddings.token_embedding", c->vocab, c->width);
    m->positions = builder_table(b, "embeddings.position_embedding", c->positions, c->width);
    for (i = 0; i < c->layers; i++) {
      inner = builder_enter(b, "encoder.layers.%d", i);
      layer_build(&m->layer[i], b, c);
      builder_leave(b, inner);
    }
    m->norm = builder_norm(b, "final_layer_norm", c->width);
  } else {
    builder_fail(b, E_NOMEM, "no memory for the network");
  }
  builder_leave(b, mark);
  if (builder_finish(b)) {
    clip_free(m);
    return b->code;
  }
  *clip = m;
  return 0;
}

void clip_free(struct clip *m)
{
  if (!m)
    return;
  free(m->layer);
  free(m);
}

const struct clip_config *clip_config(const struct clip *m)
{
  return &m->c;
}

/* ---- forward ---- */

/* x (B, 1, T, D) in place. */
static void layer_forward(struct run *r, const struct clip_config *c, const struct layer *l, struct tensor x)
{
  size_t mark = run_mark(r);
  int64_t B = x.d[0], T = x.d[2], D = x.d[3];
  struct tensor n = run_alloc(r, B, 1, T, D); /* (B, 1, T, D), as q, k and v */
  struct tensor q = run_alloc(r, B, 1, T, D);
  struct tensor k = run_alloc(r, B, 1, T, D);
  struct tensor v = run_alloc(r, B, 1, T, D);
  struct tensor h = run_alloc(r, B, 1, T, c->hidden); /* (B, 1, T, hidden) */

  /* x += attention(norm1(x)), each token seeing itself and those before */
  run_layernorm(r, n, x, l->norm1, c->norm_eps);
  run_linear(r, q, n, l->q, tensor_none());
  run_linear(r, k, n, l->k, tensor_none());
  run_linear(r, v, n, l->v, tensor_none());
  run_self_attention(r, n, q, k, v, c->heads, 1);
  run_linear(r, x, n, l->out, x);

  /* x += mlp(norm2(x)) */
  run_layernorm(r, n, x, l->norm2, c->norm_eps);
  run_linear(r, h, n, l->fc1, tensor_none());
  run_act(r, h, h, c->act);
  run_linear(r, x, h, l->fc2, x);
  run_reset(r, mark);
}

/* Which token stands for the whole prompt: the first eos, or the first of the largest ids. */
static int64_t end_position(const struct clip_config *c, const int32_t *ids, int64_t T)
{
  int64_t t, best = 0;

  for (t = 0; t < T; t++) {
    if (c->eos != 2 && ids[t] == c->eos)
      return t;
    if (c->eos == 2 && ids[t] > ids[best])
      best = t;
  }
  return best;
}

/* pooled (B, 1, 1, D): the final norm works row by row, so it needs only the row of the end mark. x (B, 1, T, D). */
static void pool(struct run *r, const struct clip *m, const int32_t *ids, struct tensor x, struct tensor pooled)
{
  int64_t b, T = x.d[2], D = x.d[3];

  for (b = 0; b < x.d[0]; b++) {
    struct tensor rows = tensor_view(tensor_batch(x, b, 1), T, 1, 1, D);

    run_layernorm(r, tensor_batch(pooled, b, 1), tensor_batch(rows, end_position(&m->c, ids + b * T, T), 1), m->norm,
                  m->c.norm_eps);
  }
}

int clip_forward(struct run *r, const struct clip *m, const int32_t *ids, int clip_skip, struct tensor hidden,
                 struct tensor pooled)
{
  const struct clip_config *c = &m->c;
  size_t mark = run_mark(r);
  int64_t i, B = hidden.d[0], T = hidden.d[2];
  int wants_pooled = pooled.d[0] > 0;
  int layers = c->layers - (clip_skip > 1 ? clip_skip - 1 : 0); /* whose output is wanted */
  struct tensor x = run_alloc(r, B, 1, T, c->width);            /* (B, 1, T, D) */

  assert(B <= RUN_MAX_ROWS);
  if (clip_skip < 0 || layers < 1 || T > c->positions)
    run_fail(r, E_ARG, "clip_skip or the number of tokens is out of range for this text encoder");
  for (i = 0; i < B * T; i++)
    if (ids[i] < 0 || ids[i] >= c->vocab)
      run_fail(r, E_ARG, "a token id is not in the text encoder's vocabulary");

  run_embed(r, x, ids, m->tokens, m->positions);
  for (i = 0; i < (wants_pooled ? c->layers : layers); i++) {
    layer_forward(r, c, &m->layer[i], x);
    if (i == layers - 1)
      run_layernorm(r, hidden, x, m->norm, c->norm_eps);
  }
  if (wants_pooled)
    pool(r, m, ids, x, pooled);
  run_reset(r, mark);
  return r->code;
}
