/*
 * predict.c - see predict.h. Called by manifest.c and merge_stats.c.
 *
 * Invariants: the arena holds the prompt's keys and values at the bottom (from predictor_prompt to the next one) and the pass above them;
 * its size is what a dry run of exactly these calls asked for, with the longest prompt that there is.
 */
#include "models/predict.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/condition.h"

struct predictor {
  const struct model *m;
  struct be *be;
  int64_t h, w, c;
  struct arena arena;         /* base from be's mem_alloc */
  struct generation *g;       /* of the prompt; a reference */
  struct unet_context context; /* in the arena; mem NULL before predictor_prompt */
  size_t mark;                /* top of the arena above the context */
  float *host;                /* one latent in our order (h, w, C) */
};

size_t predictor_count(const struct predictor *p)
{
  return (size_t)(p->h * p->w * p->c);
}

/* Lays the context out at the bottom of the arena and fills it. */
MUST_CHECK static int fill_context(struct predictor *p, struct run *r, const struct prompt_tokens *tokens)
{
  int64_t T = (int64_t)tokens->n * PROMPT_CHUNK;
  int64_t bytes = (int64_t)unet_context_bytes(p->m->unet, T, r->be->act);

  run_reset(r, 0);
  p->context = (struct unet_context){run_alloc_type(r, DT_U8, 1, 1, 1, bytes).p, T};
  p->mark = run_mark(r);
  return r->code ? r->code : condition_fill(r, p->m, tokens, 0, &p->context);
}

/* The UNet on p->host -> p->host. */
MUST_CHECK static int pass(struct predictor *p, struct run *r, float t)
{
  const struct unet_context *context = &p->context;
  struct unet_input in = {.t = &t, .context = &context, .text_embeds = tensor_none()};
  struct tensor out;
  int code;

  run_reset(r, p->mark);
  in.sample = run_alloc(r, 1, p->h, p->w, p->c);
  out = run_alloc_type(r, DT_F32, 1, p->h, p->w, p->c);
  if (!r->code)
    r->code = r->be->ops->upload(r->be, in.sample, p->host, DT_F32, r->e);
  code = r->code ? r->code : unet_forward(r, p->m->unet, &in, out);
  if (!code)
    code = r->be->ops->download(r->be, p->host, DT_F32, out, r->e);
  run_reset(r, p->mark);
  return code;
}

/* How large the arena must be, by walking through both calls on be_dry with the longest prompt. */
MUST_CHECK static int measure(struct predictor *p, size_t *bytes, struct err *e)
{
  struct prompt_tokens longest = {.n = PROMPT_MAX_CHUNKS};
  struct be_config cfg = {0};
  struct be dry;
  struct run run;
  int r;

  longest.chunk = calloc(PROMPT_MAX_CHUNKS, sizeof *longest.chunk);
  if (!longest.chunk)
    return err_set(e, E_NOMEM, "out of memory for a prompt");
  r = be_open(&dry, &be_dry, &cfg, e);
  if (r)
    goto out;
  dry.act = p->be->act;
  arena_init(&p->arena, NULL, SIZE_MAX);
  run_init(&run, &dry, &p->arena, p->m->base, e);
  r = fill_context(p, &run, &longest);
  if (!r)
    r = pass(p, &run, 0);
  be_close(&dry);
  *bytes = p->arena.peak;
  p->context.mem = NULL;
out:
  prompt_tokens_close(&longest);
  return r;
}

int predictor_new(struct predictor **out, const struct model *m, struct be *be, int h, int w, struct err *e)
{
  struct predictor *p = NULL;
  size_t bytes = 0;
  void *base = NULL;
  int r = 0;

  *out = NULL;
  if (unet_config(m->unet)->add_time_dim)
    return err_set(e, E_ARG, "single predictions of a model with added embeddings (SDXL) are not supported");
  if (h < 1 || w < 1 || h > MODEL_MAX_SIDE || w > MODEL_MAX_SIDE)
    return err_set(e, E_ARG, "a latent of %dx%d cannot be predicted", w, h);
  p = calloc(1, sizeof *p);
  if (p) {
    *p = (struct predictor){.m = m, .be = be, .h = h, .w = w, .c = m->info.latent_channels};
    p->host = calloc(predictor_count(p), sizeof *p->host);
  }
  if (!p || !p->host)
    r = err_set(e, E_NOMEM, "out of memory for a prediction");
  if (!r)
    r = measure(p, &bytes, e);
  if (!r)
    r = be->ops->mem_alloc(be, bytes, &base, e);
  if (!r) {
    arena_init(&p->arena, base, bytes);
    *out = p;
    p = NULL;
  }
  predictor_free(p);
  return r;
}

void predictor_free(struct predictor *p)
{
  if (!p)
    return;
  if (p->arena.base)
    p->be->ops->mem_free(p->be, p->arena.base);
  generation_unref(p->g);
  free(p->host);
  free(p);
}

int predictor_prompt(struct predictor *p, struct generation *g, const char *prompt, const struct run_observer *observer,
                     struct err *e)
{
  struct prompt_tokens tokens = {0};
  struct generation *old = p->g;
  struct run run;
  int r;

  p->g = generation_ref(g);
  generation_unref(old);
  p->context.mem = NULL;
  r = condition_tokenize(&tokens, p->m, prompt, strlen(prompt), "prompt", e);
  if (r)
    return r;
  run_init(&run, p->be, &p->arena, g, e);
  run.observer = observer;
  r = fill_context(p, &run, &tokens);
  if (r)
    p->context.mem = NULL;
  prompt_tokens_close(&tokens);
  return r;
}

int predictor_run(struct predictor *p, const float *latent, float t, const struct run_observer *observer, float *out, struct err *e)
{
  int64_t n = p->h * p->w;
  struct run run;
  int r;

  if (!p->context.mem)
    return err_set(e, E_INTERNAL, "a prediction needs a prompt first");
  for (int64_t c = 0; c < p->c; c++)
    for (int64_t i = 0; i < n; i++)
      p->host[i * p->c + c] = latent[c * n + i];
  run_init(&run, p->be, &p->arena, p->g, e);
  run.observer = observer;
  r = pass(p, &run, t);
  for (int64_t c = 0; !r && c < p->c; c++)
    for (int64_t i = 0; !r && i < n; i++) {
      out[c * n + i] = p->host[i * p->c + c];
      if (!isfinite(out[c * n + i]))
        r = err_set(e, E_INTERNAL, "the model's prediction is not finite");
    }
  return r;
}
