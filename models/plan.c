/*
 * plan.c - how much activation memory a model's passes need, and how much work they are: the same walk as theirs, on be_dry. And that walk on a lane, for
 * a backend that makes something ahead.
 *
 * Called by lane.c, batch.c, the server through pipeline.h and lane.h. Invariant: what is walked here is what subject.c, first.c, step.c and picture.c ask
 * of an arena, in their order; a pass that needs more is refused by the arena (E_NOMEM) and never writes past it. Threads: any; a lane's own for lane_rehearse.
 */
#include "models/model.h"

/* What draw_start asks for: the longest prompt. */
MUST_CHECK static int walk_text(struct run *r, const struct model *m)
{
  static const int32_t ids[PROMPT_CHUNK];
  size_t mark = run_mark(r);
  struct tensor hidden = run_alloc(r, PROMPT_MAX_CHUNKS, 1, PROMPT_CHUNK, unet_config(m->unet)->context_dim);
  int code = 0;

  if (m->clip)
    code = clip_forward(r, m->clip, ids, 1, tensor_batch(hidden, 0, 1), tensor_none());
  run_reset(r, mark);
  return code;
}

/* Of prompts of so many chunks, whose keys and values lie nowhere: they are not read. */
MUST_CHECK static int walk_step(struct run *r, const struct model *m, int rows, int chunks, int64_t h, int64_t w)
{
  const struct unet_config *u = unet_config(m->unet);
  struct unet_context none = {(void *)(uintptr_t)RUN_ALIGN, (int64_t)chunks * PROMPT_CHUNK};
  const struct unet_context *context[RUN_MAX_ROWS];
  static const float t[RUN_MAX_ROWS], time_ids[RUN_MAX_ROWS * 6];
  struct unet_input in = {.t = t, .context = context, .text_embeds = tensor_none()};
  size_t mark = run_mark(r);
  struct tensor out;
  int code;

  for (int i = 0; i < rows; i++)
    context[i] = &none;
  in.sample = run_alloc(r, rows, h, w, m->info.latent_channels);
  if (u->add_time_dim) {
    in.n_time_ids = 6;
    in.time_ids = time_ids;
    in.text_embeds = run_alloc(r, rows, 1, 1, u->add_in_dim - 6 * u->add_time_dim);
  }
  out = run_alloc_type(r, DT_F32, rows, h, w, m->info.latent_channels);
  code = unet_forward(r, m->unet, &in, out);
  run_reset(r, mark);
  return code;
}

MUST_CHECK static int walk_decode(struct run *r, const struct model *m, int64_t h, int64_t w)
{
  size_t mark = run_mark(r);
  int f = m->info.vae_factor, code;
  struct tensor z = run_alloc(r, 1, h, w, m->info.latent_channels);
  struct tensor rgb = run_alloc_type(r, DT_F32, 1, h * f, w * f, 3);

  run_alloc_type(r, DT_U8, 1, h * f, w * f, 3);
  code = vae_decode(r, m->vae, z, rgb);
  run_reset(r, mark);
  return code;
}

MUST_CHECK static int walk_encode(struct run *r, const struct model *m, int64_t h, int64_t w)
{
  size_t mark = run_mark(r);
  int f = m->info.vae_factor, code;
  struct tensor rgb = run_alloc(r, 1, h * f, w * f, 3);
  struct tensor moments = run_alloc_type(r, DT_F32, 1, h, w, 2 * m->info.latent_channels);

  code = vae_encode(r, m->vae, rgb, moments);
  run_reset(r, mark);
  return code;
}

MUST_CHECK static int check_size(const struct model *m, int width, int height, struct err *e)
{
  int k = m->info.size_multiple;

  if (width < k || height < k || width % k || height % k || width > MODEL_MAX_SIDE || height > MODEL_MAX_SIDE)
    return err_field(e, E_ARG, "size", "width and height must be multiples of %d from %d to %d; got %dx%d", k, k,
                     MODEL_MAX_SIDE, width, height);
  return 0;
}

int plan_arena(struct model *m, int width, int height, int rows, int work, size_t *bytes, double *step_macs, struct err *e)
{
  int64_t h = height / m->info.vae_factor, w = width / m->info.vae_factor;
  struct be_config cfg = {0};
  struct arena arena;
  struct run run;
  struct be dry;
  int r;

  *bytes = 0;
  *step_macs = 0;
  r = check_size(m, width, height, e);
  if (r)
    return r;
  r = be_open(&dry, &be_dry, &cfg, e);
  if (r)
    return r;
  dry.act = m->be->act;
  arena_init(&arena, NULL, SIZE_MAX);
  run_init(&run, &dry, &arena, m->base, e);
  if (work & LANE_STEPS)
    r = walk_step(&run, m, rows, 1, h, w);
  *step_macs = run.macs;
  if (!r && work & LANE_ENDS)
    r = walk_text(&run, m);
  if (!r && work & LANE_ENDS)
    r = walk_decode(&run, m, h, w);
  if (!r && work & LANE_ENDS && m->info.has_encoder)
    r = walk_encode(&run, m, h, w);
  be_close(&dry);
  *bytes = arena.peak;
  return r;
}

/* The noise of a sampler, whose working memory is the latent's. */
MUST_CHECK static int walk_noise(struct run *r, const struct model *m, int64_t h, int64_t w)
{
  size_t mark = run_mark(r);
  struct tensor noise = run_alloc_type(r, DT_F32, 1, h, w, m->info.latent_channels), state = run_alloc_type(r, DT_I32, 1, 1, 1, NORMAL_WORDS);
  int code = r->code ? r->code : r->be->ops->randn(r->be, noise, state, 1, r->e);

  run_reset(r, mark);
  return code;
}

int lane_rehearse(struct lane *l, const struct lane_rehearsal *of, enum be_rehearsal what, struct err *e)
{
  const struct model *m = l->m;
  int64_t h = of->height / m->info.vae_factor, w = of->width / m->info.vae_factor;
  struct run run;
  int r = check_size(m, of->width, of->height, e);

  if (r || !l->be->ops->rehearse(l->be, what))
    return r;
  run_init(&run, l->be, &l->arena, m->base, e);
  if (of->rows) {
    r = walk_step(&run, m, of->rows, of->chunks, h, w);
    if (!r)
      r = walk_noise(&run, m, h, w);
  } else {
    r = walk_decode(&run, m, h, w);
    if (!r && m->info.has_encoder)
      r = walk_encode(&run, m, h, w);
  }
  run_reset(&run, 0);
  (void)l->be->ops->rehearse(l->be, REHEARSE_NOTHING);
  return r;
}

int model_plan_bytes(struct model *m, int width, int height, size_t *bytes, struct err *e)
{
  double macs;

  return plan_arena(m, width, height, DRAW_ROWS, LANE_ALL, bytes, &macs, e);
}

int model_step_flops(struct model *m, int width, int height, double *flops, struct err *e)
{
  size_t bytes;
  int r = plan_arena(m, width, height, DRAW_ROWS, LANE_STEPS, &bytes, flops, e);

  *flops *= 2;
  return r;
}
