/*
 * step.c - one step of one picture, or of several that share a pass of the UNet; see pipeline.h and draw.h.
 *
 * Called by pipeline's callers (draw_step) and batch.c. Invariants: a pass reads the draws and writes nothing of them, so that one that failed
 * may be tried again with fewer; after it each picture's update is its own business and its failure is its own. Threads: the lane's.
 */
#include "models/draw.h"

#include <assert.h>

/* The arrays of host memory that a pass reads, by row of the UNet. */
struct rows {
  const struct generation *generation[RUN_MAX_ROWS];
  const struct unet_context *context[RUN_MAX_ROWS];
  float t[RUN_MAX_ROWS];
  float size[RUN_MAX_ROWS * 6]; /* SDXL's added embedding, only reached by benchmarks: original size, crop, target size */
  int n;
  int is_mixed;                 /* more than one generation */
};

static const struct sampler_step *next_step(const struct draw *d)
{
  return &d->subject->plan.step[d->step];
}

static void rows_add(struct rows *rows, const struct draw *d)
{
  for (int k = 0; k < d->rows; k++) {
    int i = rows->n++;

    rows->generation[i] = d->g;
    rows->context[i] = &d->subject->context[k < d->rows - 1 ? SIDE_NEGATIVE : SIDE_PROMPT];
    rows->t[i] = next_step(d)->timestep;
    for (int j = 0; j < 6; j++)
      rows->size[i * 6 + j] = j == 2 || j == 3 ? 0 : (float)(j % 2 ? d->p.width : d->p.height);
    rows->is_mixed |= d->g != rows->generation[0];
  }
}

/* The models' inputs -> sample and, where there is one, embeds: every picture's latent and text embedding once for each of its rows. */
static void gather(struct run *r, struct tensor sample, struct tensor embeds, struct draw *const *d, int n)
{
  const int src[DRAW_ROWS] = {0, 0};
  const float whole[DRAW_ROWS] = {1, 1};
  int64_t row = 0;

  for (int i = 0; !r->code && i < n; i++) {
    float scale[DRAW_ROWS] = {next_step(d[i])->scale_in, next_step(d[i])->scale_in};

    r->code = r->be->ops->gather_scale(r->be, tensor_batch(sample, row, d[i]->rows), d[i]->x, src, scale, r->e);
    if (!r->code && embeds.d[0])
      r->code = r->be->ops->gather_scale(r->be, tensor_batch(embeds, row, d[i]->rows), d[i]->subject->pooled, src, whole, r->e);
    row += d[i]->rows;
  }
}

/* The UNet on the rows of all n pictures -> *out (rows, h, w, c), in the arena. */
MUST_CHECK static int predict(struct run *r, struct draw *const *d, int n, const struct rows *rows, struct tensor *out)
{
  struct model *m = d[0]->m;
  const struct unet_config *u = unet_config(m->unet);
  struct unet_input in = {.t = rows->t, .context = rows->context, .text_embeds = tensor_none()};

  in.sample = run_alloc(r, rows->n, d[0]->h, d[0]->w, d[0]->c);
  if (u->add_time_dim) {
    in.text_embeds = run_alloc(r, rows->n, 1, 1, u->add_in_dim - 6 * u->add_time_dim);
    in.time_ids = rows->size;
    in.n_time_ids = 6;
  }
  *out = run_alloc_type(r, DT_F32, rows->n, d[0]->h, d[0]->w, d[0]->c);
  gather(r, in.sample, in.text_embeds, d, n);
  return r->code ? r->code : unet_forward(r, m->unet, &in, *out);
}

/* The sampler's update of one picture from its rows of the UNet's output. */
MUST_CHECK static int update(struct draw *d, struct be *be, struct tensor out, struct err *e)
{
  struct step_coef coef = next_step(d)->coef;
  int r = 0;

  if (d->p.sampler == SAMPLER_EULER_A) /* every step, as diffusers does: the generator's place decides the next noise */
    r = be->ops->randn(be, d->noise, d->random, 1, e);
  if (r)
    return r;
  coef.guidance = d->p.guidance;
  coef.row_uncond = 0;
  coef.row_cond = d->rows - 1;
  r = be->ops->sampler_step(be, d->x, d->x0_old, out, coef.c_noise != 0 ? d->noise : tensor_none(), &coef, e);
  if (!r)
    d->step++;
  if (!r && d->subject->first && d->subject->first->mask)
    r = first_hold(d, be, e);
  if (!r && d->step == d->subject->plan.n)
    r = be->ops->mark_set(be, d->done, e); /* another lane decodes it */
  return r;
}

int step_draws(struct lane *l, struct draw *const *d, int n, struct err *err)
{
  struct rows rows = {.n = 0};
  struct err e = {0};
  struct tensor out;
  struct run run;
  int64_t row = 0;
  int r;

  for (int i = 0; i < n; i++) {
    assert(d[i]->rows + rows.n <= RUN_MAX_ROWS && d[i]->h == d[0]->h && d[i]->w == d[0]->w);
    rows_add(&rows, d[i]);
  }
  if (rows.is_mixed)
    run_init_rows(&run, l->be, &l->arena, rows.generation, rows.n, &e);
  else
    run_init(&run, l->be, &l->arena, d[0]->g, &e);
  r = predict(&run, d, n, &rows, &out);
  for (int i = 0; i < n; i++) {
    if (r)
      err[i] = e;
    else if (update(d[i], l->be, tensor_batch(out, row, d[i]->rows), &err[i]))
      assert(err[i].code);
    row += d[i]->rows;
  }
  run_reset(&run, 0);
  return r;
}

int draw_step(struct draw *d, struct err *e)
{
  struct err mine = {0};
  int r;

  if (d->step >= d->subject->plan.n)
    return err_set(e, E_INTERNAL, "the picture has no step left");
  r = step_draws(&d->m->lane, &d, 1, &mine);
  return r || mine.code ? err_field(e, mine.code, mine.field, "%s", mine.msg) : 0;
}
