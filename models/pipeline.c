/*
 * pipeline.c - the two ends of a picture's life; see pipeline.h.
 *
 *   draw_prepare                  any thread     check, tokenise, plan the sampler
 *   draw_start                    a lane         both prompts encoded, with keys and values of every cross-attention (subject.c); initial noise
 *   draw_step, batch_step         device thread  one UNet pass, one linear update of the latent (step.c, batch.c)
 *   draw_snapshot, draw_preview   a lane         what it looks like so far (picture.c)
 *   draw_decode                   a lane         VAE, pixels (picture.c)
 *   draw_close                    any thread
 *
 * Invariants: see draw.h.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/draw.h"

/* ---- preparation: no device ---- */

/* A picture longer than the reserved one may need more memory though it has no more pixels: its small levels are rounded up. */
MUST_CHECK static int check_long(struct model *m, const struct draw_params *p, struct err *e)
{
  size_t ends, steps;
  double macs;
  int r = plan_arena(m, p->width, p->height, DRAW_ROWS, LANE_ENDS, &ends, &macs, e);

  if (!r)
    r = plan_arena(m, p->width, p->height, DRAW_ROWS, LANE_STEPS, &steps, &macs, e);
  if (!r && (ends > m->reserved_ends || steps > m->reserved_steps))
    r = err_field(e, E_ARG, "size", "%dx%d is too narrow: it needs more memory than the %dx%d that this server is set up for", p->width,
                  p->height, m->reserved_width, m->reserved_height);
  return r;
}

MUST_CHECK static int check_params(struct model *m, const struct draw_params *p, struct err *e)
{
  int k = m->info.size_multiple;

  if (p->width < k || p->height < k || p->width % k || p->height % k)
    return err_field(e, E_ARG, "size", "width and height must be multiples of %d; got %dx%d", k, p->width, p->height);
  if ((int64_t)p->width * p->height > (int64_t)m->reserved_width * m->reserved_height)
    return err_field(e, E_ARG, "size", "%dx%d is larger than this server's %lld pixels a picture", p->width, p->height,
                     (long long)m->reserved_width * m->reserved_height);
  if (p->width > m->reserved_width || p->height > m->reserved_height) {
    int r = check_long(m, p, e);

    if (r)
      return r;
  }
  if (p->steps < 1 || p->steps > SAMPLER_MAX_STEPS)
    return err_field(e, E_ARG, "steps", "steps must be from 1 to %d; got %d", SAMPLER_MAX_STEPS, p->steps);
  if (!(p->guidance >= 0 && p->guidance <= 100))
    return err_field(e, E_ARG, "guidance_scale", "guidance_scale must be from 0 to 100");
  if (m->clip && (p->clip_skip < 0 || p->clip_skip > clip_config(m->clip)->layers))
    return err_field(e, E_ARG, "clip_skip", "clip_skip must be from 1 to %d; got %d", clip_config(m->clip)->layers,
                     p->clip_skip);
  return 0;
}

int draw_prepare(struct draw **out, struct model *m, const struct draw_params *p, struct err *e)
{
  struct draw *d = NULL;
  int r;

  *out = NULL;
  r = check_params(m, p, e);
  if (r)
    goto out;
  d = calloc(1, sizeof *d);
  if (!d) {
    r = err_set(e, E_NOMEM, "out of memory for a picture");
    goto out;
  }
  d->m = m;
  d->p = *p;
  d->p.prompt = d->p.negative = NULL;
  d->p.init_rgb = d->p.mask = NULL;
  d->rows = p->guidance > 1 ? 2 : 1;
  d->h = p->height / m->info.vae_factor;
  d->w = p->width / m->info.vae_factor;
  d->c = m->info.latent_channels;
  r = subject_prepare(d, p, e);
  if (r)
    goto out;
  rng_seed(&d->rng, p->seed);
  *out = d;
  d = NULL;
out:
  draw_close(d);
  return r;
}

int draw_prepare_like(struct draw **out, const struct draw *other, uint64_t seed, struct err *e)
{
  struct draw *d = calloc(1, sizeof *d);

  *out = d;
  if (!d)
    return err_set(e, E_NOMEM, "out of memory for a picture");
  *d = (struct draw){.m = other->m, .p = other->p, .subject = subject_ref(other->subject), .rows = other->rows, .h = other->h, .w = other->w, .c = other->c};
  d->p.seed = seed;
  rng_seed(&d->rng, seed);
  return 0;
}

int draw_step_index(const struct draw *d)
{
  return d->step;
}

int draw_step_count(const struct draw *d)
{
  return d->subject->plan.n;
}

const struct generation *draw_generation(const struct draw *d)
{
  return d->g;
}

int draw_prompt_tokens(const struct draw *d)
{
  return d->subject->tokens[SIDE_PROMPT].tokens;
}

/* ---- start: encode, noise ---- */

struct tensor draw_place(char *mem, size_t *top, enum dtype type, int64_t b, int64_t h, int64_t w, int64_t c)
{
  struct tensor t = {mem ? mem + *top : NULL, {b, h, w, c}, type};

  *top += (tensor_bytes(t) + RUN_ALIGN - 1) / RUN_ALIGN * RUN_ALIGN;
  return t;
}

/* Lays out the device slab; called once to size it and once to fill in the pointers. */
static size_t lay_out(struct draw *d, char *mem)
{
  size_t top = 0;

  d->x = draw_place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  d->x0_old = draw_place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  d->noise = draw_place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  d->snapshot = draw_place(mem, &top, d->m->be->act, 1, d->h, d->w, d->c);
  d->random = draw_place(mem, &top, DT_I32, 1, 1, 1, NORMAL_WORDS);
  if (d->subject->first && d->subject->first->mask) {
    d->anew = draw_place(mem, &top, DT_U8, 1, d->h, d->w, 1);
    d->clean = draw_place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
    d->added = draw_place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  }
  return top;
}

size_t draw_bytes(const struct draw *d)
{
  struct draw sized = *d;

  return lay_out(&sized, NULL);
}

size_t draw_shared_bytes(const struct draw *d)
{
  return subject_bytes(d->subject, d->m);
}

size_t draw_plan_bytes(struct model *m, int width, int height)
{
  int f = m->info.vae_factor, chunks = m->tokenizer ? PROMPT_MAX_CHUNKS : 1;
  struct first masked = {.mask = (uint8_t[1]){0}};
  struct subject longest = {.tokens = {{.n = chunks}, {.n = chunks}}, .first = m->info.has_encoder ? &masked : NULL};
  struct draw largest = {.m = m, .subject = &longest, .rows = DRAW_ROWS, .h = height / f, .w = width / f, .c = m->info.latent_channels};

  return lay_out(&largest, NULL) + subject_bytes(&longest, m);
}

/* The first latent, and the generator of the noise of later steps. */
MUST_CHECK static int start_latent(struct draw *d, struct run *run)
{
  struct be *be = run->be;
  int has_first = d->subject->first != NULL, r = has_first ? first_start(d, run) : 0;

  if (!r)
    r = be->ops->upload(be, d->random, &d->rng.state, DT_I32, run->e);
  return r || has_first ? r : be->ops->randn(be, d->x, d->random, d->subject->plan.init_scale, run->e);
}

int draw_start(struct draw *d, struct lane *l, struct generation *g, struct err *e)
{
  struct be *be = l->be;
  struct run run;
  int r;

  if (!(l->work & LANE_ENDS))
    return err_set(e, E_INTERNAL, "this lane has no memory for encoding a prompt");
  if (strcmp(d->m->base->digest, l->m->base->digest))
    return err_set(e, E_INTERNAL, "the picture was prepared for another checkpoint");
  if ((g->base ? g->base : g) != l->m->base)
    return err_set(e, E_INTERNAL, "the generation was built on another device than the one that draws");
  d->m = l->m;
  r = subject_start(d, l, g, e);
  if (!r)
    r = be->ops->mem_alloc(be, lay_out(d, NULL), &d->mem, e);
  if (r)
    return r;
  lay_out(d, d->mem);
  d->g = generation_ref(g);
  run_init(&run, be, &l->arena, g, e);
  r = be->ops->mark_open(be, &d->seen, e);
  if (!r)
    r = be->ops->mark_open(be, &d->done, e);
  if (!r)
    r = start_latent(d, &run);
  run_reset(&run, 0);
  return r ? r : be->ops->sync(be, e); /* another lane goes on */
}

int draw_latents(struct draw *d, float *out, struct err *e)
{
  int64_t n = d->h * d->w, C = d->c;
  float *ours = malloc((size_t)(n * C) * sizeof *ours);
  int r;

  if (!ours)
    return err_set(e, E_NOMEM, "out of memory for a latent");
  r = d->m->be->ops->download(d->m->be, ours, DT_F32, d->x, e);
  for (int64_t c = 0; !r && c < C; c++)
    for (int64_t i = 0; i < n; i++)
      out[c * n + i] = ours[i * C + c];
  free(ours);
  return r;
}

void draw_close(struct draw *d)
{
  if (!d)
    return;
  if (d->mem)
    d->m->be->ops->mem_free(d->m->be, d->mem);
  generation_unref(d->g);
  subject_unref(d->subject);
  d->m->be->ops->mark_close(d->m->be, d->seen);
  d->m->be->ops->mark_close(d->m->be, d->done);
  free(d);
}
