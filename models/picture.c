/*
 * picture.c - from latents to pixels: the finished picture, and what it looks like on its way. See pipeline.h.
 *
 * Invariant: a picture whose latents or pixels are not finite never leaves. Threads: the lane's; draw_cut and draw_snapshot the device thread's.
 */
#include "models/draw.h"

MUST_CHECK static int check_finite(struct be *be, struct tensor t, const char *what, struct err *e)
{
  int64_t bad = 0;
  int r = be->ops->count_nonfinite(be, t, &bad, e);

  if (!r && bad)
    r = err_set(e, E_INTERNAL, "%lld values of the %s are not finite: the picture is withheld", (long long)bad, what);
  return r;
}

/* y: the VAE's input from a latent. */
MUST_CHECK static int unscale(const struct draw *d, struct be *be, struct tensor y, struct tensor latent, struct err *e)
{
  const float scale = (float)(1 / vae_config(d->m->vae)->scaling_factor);
  const int src = 0;

  return be->ops->gather_scale(be, y, latent, &src, &scale, e);
}

MUST_CHECK static int check_lane(const struct lane *l, struct err *e)
{
  return l->work & LANE_ENDS ? 0 : err_set(e, E_INTERNAL, "this lane has no memory for decoding");
}

/* The VAE on z (1, h, w, c) -> rgb. Of the draw only what never changes after draw_start is read. */
MUST_CHECK static int decode(const struct draw *d, struct run *run, struct tensor z, uint8_t *rgb)
{
  struct be *be = run->be;
  struct tensor picture = run_alloc_type(run, DT_F32, 1, d->p.height, d->p.width, 3);
  struct tensor bytes = run_alloc_type(run, DT_U8, 1, d->p.height, d->p.width, 3);
  int r = run->code ? run->code : vae_decode(run, d->m->vae, z, picture);

  if (!r)
    r = check_finite(be, picture, "picture", run->e);
  if (!r)
    r = be->ops->to_rgb8(be, bytes, picture, run->e);
  if (!r)
    r = be->ops->download(be, rgb, DT_U8, bytes, run->e);
  if (!r && d->subject->first && d->subject->first->mask && !d->p.leaves_pixels)
    first_paste(d, rgb);
  return r;
}

int draw_decode(struct draw *d, struct lane *l, uint8_t *rgb, struct err *e)
{
  struct tensor z, latent = d->is_cut ? d->x0_old : d->x;
  struct run run;
  int r = check_lane(l, e);

  if (r)
    return r;
  if (d->step < d->subject->plan.n && !d->is_cut)
    return err_set(e, E_INTERNAL, "the picture is not finished");
  run_init(&run, l->be, &l->arena, d->g, e);
  z = run_alloc(&run, 1, d->h, d->w, d->c);
  r = run.code ? run.code : l->be->ops->mark_wait(l->be, d->done, e);
  if (!r)
    r = check_finite(l->be, latent, "latent", e);
  if (!r)
    r = unscale(d, l->be, z, latent, e);
  if (!r)
    r = decode(d, &run, z, rgb);
  run_reset(&run, 0);
  return r;
}

int draw_cut(struct draw *d, struct err *e)
{
  if (!d->step)
    return err_set(e, E_INTERNAL, "there is nothing to see before the first step");
  d->is_cut = 1;
  return d->m->be->ops->mark_set(d->m->be, d->done, e); /* another lane decodes it */
}

int draw_snapshot(struct draw *d, struct err *e)
{
  struct be *be = d->m->be;
  int r;

  if (!d->step)
    return err_set(e, E_INTERNAL, "there is nothing to see before the first step");
  r = unscale(d, be, d->snapshot, d->x0_old, e);
  if (!r)
    r = be->ops->mark_set(be, d->seen, e); /* another lane reads it */
  d->has_snapshot = !r;
  return r;
}

int draw_preview(struct draw *d, struct lane *l, uint8_t *rgb, struct err *e)
{
  struct run run;
  int r = check_lane(l, e);

  if (r)
    return r;
  if (!d->has_snapshot)
    return err_set(e, E_INTERNAL, "the picture has no snapshot to look at");
  run_init(&run, l->be, &l->arena, d->g, e);
  r = l->be->ops->mark_wait(l->be, d->seen, e);
  if (!r)
    r = check_finite(l->be, d->snapshot, "latent", e);
  if (!r)
    r = decode(d, &run, d->snapshot, rgb);
  run_reset(&run, 0);
  return r;
}
