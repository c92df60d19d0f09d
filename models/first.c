/*
 * first.c - a picture that starts from another one, all of it or where a mask says; see pipeline.h and draw.h.
 *
 * Follows diffusers' StableDiffusionImg2ImgPipeline and, with a mask, StableDiffusionInpaintPipeline with a UNet of four channels, random
 * numbers included: the generator draws the sample of the encoder's distribution, then the noise, and with a mask once more for the masked
 * picture, which such a UNet does not look at. Meng et al., "SDEdit", 2022; Lugmayr et al., "RePaint", 2022, 4.1 (without resampling).
 *
 * Invariants: nothing of the first picture changes after the first draw_start of its request. Called by pipeline.c, subject.c, step.c, picture.c.
 * Threads: as the callers.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/draw.h"

enum { ANEW = 128 /* of 255: from here on a pixel's latent is drawn anew */ };

/* ---- preparation: no device ---- */

/* diffusers' get_timesteps: int(steps * strength) steps are done. A float that came from a short decimal is that decimal again: 0.7f * 10 would
 * fall short of 7. */
MUST_CHECK static int count_steps(const struct draw_params *p, int *skip, struct err *e)
{
  double strength = rint((double)p->strength * 1e7) / 1e7;
  int todo;

  if (!(p->strength > 0 && p->strength <= 1))
    return err_field(e, E_ARG, "strength", "strength must be above 0 and at most 1: how much of the picture may change");
  todo = (int)(p->steps * strength);
  if (todo < 1)
    return err_field(e, E_ARG, "strength", "strength %.4g of %d steps leaves no step to do; raise one of them until their product is 1",
                     strength, p->steps);
  *skip = p->steps - todo;
  return 0;
}

int first_prepare(struct draw *d, const struct draw_params *p, int *skip, struct err *e)
{
  size_t pixels = (size_t)p->width * (size_t)p->height, moments = 2 * (size_t)(d->h * d->w * d->c);
  struct first *f;
  int r;

  if (!p->init_rgb)
    return err_field(e, E_ARG, "mask", "a mask needs a picture that it belongs to");
  if (!d->m->info.has_encoder)
    return err_field(e, E_ARG, "image", "this server's model cannot start from a picture: its checkpoint has no VAE encoder");
  r = count_steps(p, skip, e);
  if (r)
    return r;
  f = malloc(sizeof *f + moments * sizeof *f->moments + pixels * (p->mask ? 4 : 3));
  if (!f)
    return err_set(e, E_NOMEM, "out of memory for the first picture");
  d->subject->first = f;
  f->moments = (float *)(f + 1);
  f->rgb = (uint8_t *)(f->moments + moments);
  f->mask = p->mask ? f->rgb + 3 * pixels : NULL;
  memcpy(f->rgb, p->init_rgb, 3 * pixels);
  if (f->mask)
    memcpy(f->mask, p->mask, pixels);
  return 0;
}

/* ---- start ---- */

int first_encode(struct draw *d, struct run *run)
{
  struct be *be = run->be;
  size_t mark = run_mark(run), n = (size_t)d->p.width * (size_t)d->p.height * 3;
  struct tensor x = run_alloc(run, 1, d->p.height, d->p.width, 3);
  struct tensor y = run_alloc_type(run, DT_F32, 1, d->h, d->w, 2 * d->c);
  float *rgb = malloc(n * sizeof *rgb);
  int64_t bad = 0;
  int r = run->code;

  if (!rgb)
    r = err_set(run->e, E_NOMEM, "out of memory for the first picture");
  for (size_t i = 0; !r && i < n; i++)
    rgb[i] = 2 * ((float)d->subject->first->rgb[i] / 255) - 1;
  if (!r)
    r = be->ops->upload(be, x, rgb, DT_F32, run->e);
  if (!r)
    r = vae_encode(run, d->m->vae, x, y);
  if (!r)
    r = be->ops->count_nonfinite(be, y, &bad, run->e);
  if (!r && bad)
    r = err_set(run->e, E_INTERNAL, "%lld values of the first picture's latent are not finite", (long long)bad);
  if (!r)
    r = be->ops->download(be, d->subject->first->moments, DT_F32, y, run->e);
  free(rgb);
  run_reset(run, mark);
  return r;
}

/* clean = scaling_factor * (mean + std * normal), the normals in clean. */
static void sample(const struct draw *d, float *clean)
{
  const float *moments = d->subject->first->moments;
  double factor = vae_config(d->m->vae)->scaling_factor;

  for (int64_t i = 0; i < d->h * d->w; i++)
    for (int64_t c = 0; c < d->c; c++) {
      double mean = moments[i * 2 * d->c + c], log_var = moments[i * 2 * d->c + d->c + c];

      log_var = log_var < -30 ? -30 : log_var > 20 ? 20 : log_var;
      clean[i * d->c + c] = (float)(factor * (mean + exp(0.5 * log_var) * (double)clean[i * d->c + c]));
    }
}

/* How the clean latent is noised as far as the sampler's next step expects; after the last step it is clean. */
static struct blend_coef held(const struct draw *d)
{
  if (d->step >= d->subject->plan.n)
    return (struct blend_coef){1, 0};
  return (struct blend_coef){d->subject->plan.step[d->step].hold_x, d->subject->plan.step[d->step].hold_noise};
}

/* diffusers shrinks the mask to latents by taking the first pixel of each square. */
static uint8_t is_anew(const struct draw *d, int64_t y, int64_t x)
{
  int64_t k = d->m->info.vae_factor;

  return d->subject->first->mask[y * k * d->p.width + x * k] >= ANEW;
}

/* What first_hold reads. anew: h*w bytes of working memory. */
MUST_CHECK static int upload_held(struct draw *d, struct be *be, const float *clean, const float *noise, uint8_t *anew, struct err *e)
{
  int r;

  for (int64_t i = 0; i < d->h * d->w; i++)
    anew[i] = is_anew(d, i / d->w, i % d->w);
  r = be->ops->upload(be, d->anew, anew, DT_U8, e);
  if (!r)
    r = be->ops->upload(be, d->clean, clean, DT_F32, e);
  return r ? r : be->ops->upload(be, d->added, noise, DT_F32, e);
}

int first_start(struct draw *d, struct run *run)
{
  size_t pixels = (size_t)(d->h * d->w), C = (size_t)d->c, latent = pixels * C;
  float *x = malloc(4 * latent * sizeof *x), *clean, *noise, *spare; /* (h, w, C) each */
  int has_mask = d->subject->first->mask != NULL, is_noise_alone = has_mask && d->p.strength >= 1;
  struct blend_coef k = held(d);
  int r;

  if (!x)
    return err_set(run->e, E_NOMEM, "out of memory for the first picture");
  clean = x + latent;
  noise = clean + latent;
  spare = noise + latent;
  normal_fill_pixels(&d->rng.state, clean, pixels, C, 1, spare);
  sample(d, clean);
  normal_fill_pixels(&d->rng.state, noise, pixels, C, 1, spare);
  for (size_t i = 0; i < latent; i++)
    x[i] = is_noise_alone ? d->subject->plan.init_scale * noise[i] : (float)((double)k.a * (double)clean[i] + (double)k.b * (double)noise[i]);
  r = run->be->ops->upload(run->be, d->x, x, DT_F32, run->e);
  if (!r && has_mask)
    r = upload_held(d, run->be, clean, noise, (uint8_t *)spare, run->e);
  if (!r)
    r = run->be->ops->sync(run->be, run->e); /* before x is freed */
  if (has_mask)
    rng_randn(&d->rng, noise, latent); /* the sample of the masked picture */
  free(x);
  return r;
}

/* ---- while it is drawn ---- */

int first_hold(struct draw *d, struct be *be, struct err *e)
{
  const struct blend_coef k = held(d);

  return be->ops->blend(be, d->x, d->anew, d->clean, d->added, &k, e);
}

void first_paste(const struct draw *d, uint8_t *rgb)
{
  const struct first *f = d->subject->first;
  size_t pixels = (size_t)d->p.width * (size_t)d->p.height;

  for (size_t i = 0; i < pixels; i++)
    for (size_t c = 3 * i; f->mask[i] < 255 && c < 3 * i + 3; c++)
      rgb[c] = (uint8_t)((rgb[c] * f->mask[i] + f->rgb[c] * (255 - f->mask[i]) + 127) / 255);
}
