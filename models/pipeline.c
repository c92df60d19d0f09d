/*
 * pipeline.c - a prompt becomes a picture; see pipeline.h.
 *
 *   draw_prepare   any thread     check, tokenise, plan the sampler
 *   draw_start     device thread  encode both prompts, keys and values of every cross-attention, initial noise
 *   draw_step      device thread  one UNet pass over the picture's rows, one linear update of its latent
 *   draw_decode    device thread  VAE, pixels
 *
 * Invariants: a draw holds all its device memory from draw_start on, and no call allocates after that. Rows of the UNet are in the
 * order (negative, prompt), or only (prompt) without guidance. A picture whose latents or pixels are not finite never leaves.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/condition.h"
#include "models/model.h"
#include "models/rng.h"

enum { SIDE_PROMPT, SIDE_NEGATIVE, SIDES };

struct draw {
  struct model *m;
  struct generation *g;                 /* pinned by draw_start; a reference */
  struct draw_params p;                 /* prompt texts are not kept */
  struct sampler_plan plan;
  struct prompt_tokens tokens[SIDES];   /* [SIDE_NEGATIVE] unused without guidance */
  struct rng rng;
  int rows;                             /* of the UNet: 1 or 2 */
  int step;                             /* done */
  int64_t h, w, c;                      /* of the latent */
  void *mem;                            /* device slab that everything below lives in */
  struct unet_context context[SIDES];
  struct tensor x, x0_old, noise;       /* (1, h, w, c) F32 */
  struct tensor model_out;              /* (rows, h, w, c) F32 */
  float *host;                          /* two latents of scratch: torch's order and ours */
};

/* ---- preparation: no device ---- */

MUST_CHECK static int check_params(const struct model *m, const struct draw_params *p, struct err *e)
{
  int k = m->info.size_multiple;

  if (p->width < k || p->height < k || p->width % k || p->height % k)
    return err_field(e, E_ARG, "size", "width and height must be multiples of %d; got %dx%d", k, p->width, p->height);
  if ((int64_t)p->width * p->height > m->reserved_pixels)
    return err_field(e, E_ARG, "size", "%dx%d is larger than this server's %lld pixels a picture", p->width, p->height,
                     (long long)m->reserved_pixels);
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
  d->rows = p->guidance > 1 ? 2 : 1;
  d->h = p->height / m->info.vae_factor;
  d->w = p->width / m->info.vae_factor;
  d->c = m->info.latent_channels;
  d->host = malloc(2 * (size_t)(d->h * d->w * d->c) * sizeof *d->host);
  if (!d->host) {
    r = err_set(e, E_NOMEM, "out of memory for a picture");
    goto out;
  }
  r = condition_tokenize(&d->tokens[SIDE_PROMPT], m, p->prompt, p->prompt_len, "prompt", e);
  if (!r && d->rows > 1)
    r = condition_tokenize(&d->tokens[SIDE_NEGATIVE], m, p->negative ? p->negative : "", p->negative_len, "negative_prompt", e);
  if (!r)
    r = sampler_plan(&d->plan, &m->schedule, p->sampler, p->karras, p->steps, e);
  if (r)
    goto out;
  rng_seed(&d->rng, p->seed);
  *out = d;
  d = NULL;
out:
  draw_close(d);
  return r;
}

int draw_step_index(const struct draw *d)
{
  return d->step;
}

int draw_step_count(const struct draw *d)
{
  return d->plan.n;
}

const struct generation *draw_generation(const struct draw *d)
{
  return d->g;
}

int draw_prompt_tokens(const struct draw *d)
{
  return d->tokens[SIDE_PROMPT].tokens;
}

/* ---- start: encode, noise ---- */

/* Places one tensor at *top of the slab; with mem NULL only *top moves. */
static struct tensor place(char *mem, size_t *top, enum dtype type, int64_t b, int64_t h, int64_t w, int64_t c)
{
  struct tensor t = {mem ? mem + *top : NULL, {b, h, w, c}, type};

  *top += (tensor_bytes(t) + RUN_ALIGN - 1) / RUN_ALIGN * RUN_ALIGN;
  return t;
}

/* Lays out the device slab; called once to size it and once to fill in the pointers. */
static size_t lay_out(struct draw *d, char *mem)
{
  enum dtype act = d->m->be->act;
  size_t top = 0;

  for (int i = 0; i < d->rows; i++) {
    int64_t T = (int64_t)d->tokens[i].n * PROMPT_CHUNK;
    int64_t bytes = (int64_t)unet_context_bytes(d->m->unet, T, act);

    d->context[i] = (struct unet_context){place(mem, &top, DT_U8, 1, 1, 1, bytes).p, T};
  }
  d->x = place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  d->x0_old = place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  d->noise = place(mem, &top, DT_F32, 1, d->h, d->w, d->c);
  d->model_out = place(mem, &top, DT_F32, d->rows, d->h, d->w, d->c);
  return top;
}

/* Normals in torch's order (C, h, w), times scale, into a latent (h, w, C). */
MUST_CHECK static int upload_noise(struct draw *d, struct tensor to, float scale, struct err *e)
{
  int64_t n = d->h * d->w, C = d->c;
  float *torch = d->host, *ours = d->host + n * C;

  rng_randn(&d->rng, torch, (size_t)(n * C));
  for (int64_t c = 0; c < C; c++)
    for (int64_t i = 0; i < n; i++)
      ours[i * C + c] = scale * torch[c * n + i];
  return d->m->be->ops->upload(d->m->be, to, ours, DT_F32, e);
}

int draw_start(struct draw *d, struct generation *g, struct err *e)
{
  struct model *m = d->m;
  struct run run;
  int r;

  r = m->be->ops->mem_alloc(m->be, lay_out(d, NULL), &d->mem, e);
  if (r)
    return r;
  lay_out(d, d->mem);
  d->g = generation_ref(g);
  run_init(&run, m->be, &m->arena, g, e);
  for (int i = 0; !r && i < d->rows; i++)
    r = condition_fill(&run, m, &d->tokens[i], d->p.clip_skip, &d->context[i]);
  return r ? r : upload_noise(d, d->x, d->plan.init_scale, e);
}

/* ---- steps ---- */

/* The UNet on this picture's rows -> d->model_out. */
MUST_CHECK static int predict(struct draw *d, struct run *r, const struct sampler_step *s)
{
  struct model *m = d->m;
  const struct unet_config *u = unet_config(m->unet);
  /* SDXL's added embedding, only reached by benchmarks: original size, crop, target size */
  float t[DRAW_ROWS] = {s->timestep, s->timestep}, scale[DRAW_ROWS] = {s->scale_in, s->scale_in};
  float size[DRAW_ROWS * 6];
  int src[DRAW_ROWS] = {0, 0};
  const struct unet_context *context[DRAW_ROWS] = {&d->context[d->rows > 1 ? SIDE_NEGATIVE : SIDE_PROMPT],
                                                   &d->context[SIDE_PROMPT]};
  struct unet_input in = {.t = t, .context = context, .text_embeds = tensor_none()};
  size_t mark = run_mark(r);
  int code;

  in.sample = run_alloc(r, d->rows, d->h, d->w, d->c);
  if (u->add_time_dim) {
    in.text_embeds = run_alloc(r, d->rows, 1, 1, u->add_in_dim - 6 * u->add_time_dim);
    for (int i = 0; i < DRAW_ROWS * 6; i++)
      size[i] = i % 6 == 2 || i % 6 == 3 ? 0 : (float)(i % 2 ? d->p.width : d->p.height);
    in.time_ids = size;
    in.n_time_ids = 6;
    if (!r->code)
      r->code = condition_stand_in(r, in.text_embeds);
  }
  if (!r->code)
    r->code = r->be->ops->gather_scale(r->be, in.sample, d->x, src, scale, r->e);
  code = r->code ? r->code : unet_forward(r, m->unet, &in, d->model_out);
  run_reset(r, mark);
  return code;
}

int draw_step(struct draw *d, struct err *e)
{
  const struct sampler_step *s = &d->plan.step[d->step];
  struct be *be = d->m->be;
  struct step_coef coef = s->coef;
  struct run run;
  int r;

  if (d->step >= d->plan.n)
    return err_set(e, E_INTERNAL, "the picture has no step left");
  run_init(&run, be, &d->m->arena, d->g, e);
  r = predict(d, &run, s);
  if (!r && d->p.sampler == SAMPLER_EULER_A)
    r = upload_noise(d, d->noise, 1, e); /* every step, as diffusers does: the generator's place decides the next noise */
  if (r)
    return r;
  coef.guidance = d->p.guidance;
  coef.row_uncond = 0;
  coef.row_cond = d->rows - 1;
  r = be->ops->sampler_step(be, d->x, d->x0_old, d->model_out, coef.c_noise != 0 ? d->noise : tensor_none(), &coef, e);
  if (!r)
    d->step++;
  return r;
}

/* ---- the picture ---- */

MUST_CHECK static int check_finite(struct be *be, struct tensor t, const char *what, struct err *e)
{
  int64_t bad = 0;
  int r = be->ops->count_nonfinite(be, t, &bad, e);

  if (!r && bad)
    r = err_set(e, E_INTERNAL, "%lld values of the %s are not finite: the picture is withheld", (long long)bad, what);
  return r;
}

int draw_decode(struct draw *d, uint8_t *rgb, struct err *e)
{
  struct model *m = d->m;
  struct be *be = m->be;
  const float scale = (float)(1 / vae_config(m->vae)->scaling_factor);
  const int src = 0;
  struct tensor z, picture, bytes;
  struct run run;
  int r;

  if (d->step < d->plan.n)
    return err_set(e, E_INTERNAL, "the picture is not finished");
  run_init(&run, be, &m->arena, d->g, e);
  z = run_alloc(&run, 1, d->h, d->w, d->c);
  picture = run_alloc_type(&run, DT_F32, 1, d->p.height, d->p.width, 3);
  bytes = run_alloc_type(&run, DT_U8, 1, d->p.height, d->p.width, 3);
  r = run.code ? run.code : check_finite(be, d->x, "latent", e);
  if (!r)
    r = be->ops->gather_scale(be, z, d->x, &src, &scale, e);
  if (!r)
    r = vae_decode(&run, m->vae, z, picture);
  if (!r)
    r = check_finite(be, picture, "picture", e);
  if (!r)
    r = be->ops->to_rgb8(be, bytes, picture, e);
  if (!r)
    r = be->ops->download(be, rgb, DT_U8, bytes, e);
  run_reset(&run, 0);
  return r;
}

int draw_latents(struct draw *d, float *out, struct err *e)
{
  int64_t n = d->h * d->w, C = d->c;
  int r = d->m->be->ops->download(d->m->be, d->host, DT_F32, d->x, e);

  for (int64_t c = 0; !r && c < C; c++)
    for (int64_t i = 0; i < n; i++)
      out[c * n + i] = d->host[i * C + c];
  return r;
}

void draw_close(struct draw *d)
{
  if (!d)
    return;
  if (d->mem)
    d->m->be->ops->mem_free(d->m->be, d->mem);
  generation_unref(d->g);
  for (int i = 0; i < SIDES; i++)
    prompt_tokens_close(&d->tokens[i]);
  sampler_plan_close(&d->plan);
  free(d->host);
  free(d);
}
