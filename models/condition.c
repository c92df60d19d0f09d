/*
 * condition.c - see condition.h. Called by subject.c and predict.c.
 */
#include "models/condition.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* Synthetic weights come without a tokenizer: any text is the same chunk. */
MUST_CHECK static int stand_in_tokens(struct prompt_tokens *t, struct err *e)
{
  t->chunk = calloc(1, sizeof *t->chunk);
  if (!t->chunk)
    return err_set(e, E_NOMEM, "out of memory for a prompt");
  for (int i = 0; i < PROMPT_CHUNK; i++) {
    t->chunk->ids[i] = i;
    t->chunk->weights[i] = 1;
  }
  t->n = 1;
  return 0;
}

int condition_tokenize(struct prompt_tokens *t, const struct model *m, const char *text, size_t n, const char *field, struct err *e)
{
  int r;

  if (!m->tokenizer)
    return stand_in_tokens(t, e);
  r = prompt_tokenize(t, m->tokenizer, text, n, m->pad, e);
  if (r == E_ARG && e && !e->field[0])
    snprintf(e->field, sizeof e->field, "%s", field);
  return r;
}

/* A1111's emphasis on one encoded chunk (77, D): every token times its weight, then the chunk's mean back to what it was. */
static void apply_weights(float *z, const float *weights, int64_t D)
{
  double before = 0, after = 0;

  for (int64_t i = 0; i < PROMPT_CHUNK * D; i++)
    before += z[i];
  for (int64_t t = 0; t < PROMPT_CHUNK; t++)
    for (int64_t i = 0; i < D; i++)
      after += z[t * D + i] *= weights[t];
  if (after == 0)
    return;
  for (int64_t i = 0; i < PROMPT_CHUNK * D; i++)
    z[i] *= (float)(before / after);
}

MUST_CHECK static int weigh(struct run *r, struct tensor hidden, const struct prompt_tokens *t)
{
  struct be *be = r->be;
  int64_t D = hidden.d[3];
  float *z = malloc((size_t)tensor_count(hidden) * sizeof *z);
  int code;

  if (!z)
    return err_set(r->e, E_NOMEM, "out of memory for a prompt");
  code = be->ops->download(be, z, DT_F32, hidden, r->e);
  for (int i = 0; !code && i < t->n; i++)
    apply_weights(z + i * PROMPT_CHUNK * D, t->chunk[i].weights, D);
  if (!code)
    code = be->ops->upload(be, hidden, z, DT_F32, r->e);
  free(z);
  return code;
}

/* A sine of the element's number: small, and different everywhere. */
int condition_stand_in(struct run *r, struct tensor hidden)
{
  float *z = malloc((size_t)tensor_count(hidden) * sizeof *z);
  int code;

  if (!z)
    return err_set(r->e, E_NOMEM, "out of memory for a prompt");
  for (int64_t i = 0; i < tensor_count(hidden); i++)
    z[i] = sinf((float)i);
  code = r->be->ops->upload(r->be, hidden, z, DT_F32, r->e);
  free(z);
  return code;
}

int condition_fill(struct run *r, const struct model *m, const struct prompt_tokens *t, int clip_skip, struct unet_context *c)
{
  size_t mark = run_mark(r);
  struct tensor hidden = run_alloc(r, t->n, 1, PROMPT_CHUNK, unet_config(m->unet)->context_dim); /* (n, 77, D) */
  int code = r->code;

  if (!code && !m->clip)
    code = condition_stand_in(r, hidden);
  for (int i = 0; !code && m->clip && i < t->n; i++)
    code = clip_forward(r, m->clip, t->chunk[i].ids, clip_skip, tensor_batch(hidden, i, 1), tensor_none());
  if (!code && t->is_weighted)
    code = weigh(r, hidden, t);
  if (!code) {
    hidden = tensor_view(hidden, 1, 1, t->n * PROMPT_CHUNK, hidden.d[3]);
    code = unet_context_fill(r, m->unet, c, hidden);
  }
  run_reset(r, mark);
  return code;
}
