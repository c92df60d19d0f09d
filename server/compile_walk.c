/*
 * compile_walk.c - see compile_walk.h.
 *
 * Pictures of a batch that were pinned to different generations share a call as far as they read the same weights (models/run.h): any count of rows up
 * to the pass's. So every count is walked, although pictures with guidance alone would make even ones.
 */
#include "server/compile_walk.h"

#include <stdlib.h>
#include <string.h>

#include "models/batch.h"
#include "models/manifest.h"
#include "models/predict.h"
#include "models/run.h"

/* What a walk of one size repeats. */
struct walk {
  struct model *m;
  struct batch *b;
  int width, height;
  char prompt[2 * PROMPT_CHUNK * PROMPT_MAX_CHUNKS];
  uint8_t *rgb;                 /* a picture */
};

/* A prompt of so many chunks: each holds two tokens less than it has, for its marks. */
static void set_prompt(struct walk *w, int chunks)
{
  size_t words = (size_t)(chunks - 1) * (PROMPT_CHUNK - 2) + 1;

  for (size_t i = 0; i < words; i++)
    memcpy(w->prompt + 2 * i, "a ", 3);
}

/* A picture that has started. first: NULL, or the picture that it begins with. */
MUST_CHECK static int start(struct walk *w, struct draw **d, int rows, const uint8_t *first, struct err *e)
{
  size_t n = strlen(w->prompt);
  const struct draw_params p = {.prompt = w->prompt, .prompt_len = n, .negative = w->prompt, .negative_len = n, .width = w->width, .height = w->height,
                                .steps = 1, .guidance = rows == 2 ? 2 : 1, .sampler = SAMPLER_EULER, .init_rgb = first, .strength = 1};
  int r = draw_prepare(d, w->m, &p, e);

  return r ? r : draw_start(*d, model_lane(w->m), model_base(w->m), e);
}

/* A pass of the UNet with so many rows: pictures with guidance, and one without where rows is odd. */
MUST_CHECK static int walk_rows(struct walk *w, int rows, struct err *e)
{
  struct draw *d[BATCH_MAX] = {NULL};
  struct err err[BATCH_MAX] = {{0}};
  int n = (rows + 1) / 2, r = 0;

  for (int i = 0; i < n && !r; i++)
    r = start(w, &d[i], i == n - 1 && rows % 2 ? 1 : 2, NULL, e);
  if (!r)
    batch_step(w->b, d, n, err);
  for (int i = 0; i < n && !r; i++)
    r = err[i].code ? err_set(e, err[i].code, "%s", err[i].msg) : 0;
  if (!r)
    r = draw_decode(d[0], model_lane(w->m), w->rgb, e); /* a preview is the same work */
  for (int i = 0; i < n; i++)
    draw_close(d[i]);
  return r;
}

MUST_CHECK static int walk_encoder(struct walk *w, struct err *e)
{
  struct draw *d = NULL;
  int r;

  set_prompt(w, 1);
  r = start(w, &d, 2, w->rgb, e);
  draw_close(d);
  return r;
}

int compile_walk_size(struct model *m, int width, int height, int batch, int chunks, struct err *e)
{
  struct walk w = {.m = m, .width = width, .height = height};
  int rows = 2 * batch < RUN_MAX_ROWS ? 2 * batch : RUN_MAX_ROWS, r;

  if (chunks < 1 || chunks > PROMPT_MAX_CHUNKS)
    return err_field(e, E_ARG, "chunks", "prompts have 1 to %d chunks; got %d", PROMPT_MAX_CHUNKS, chunks);
  r = model_reserve(m, width, height, e);
  if (!r)
    r = batch_open(&w.b, m, batch, e);
  if (r)
    return r;
  w.rgb = calloc((size_t)width * (size_t)height, 3);
  if (!w.rgb)
    r = err_set(e, E_NOMEM, "out of memory for a picture");
  for (int c = 1; c <= chunks && !r; c++) {
    set_prompt(&w, c);
    for (int i = 1; i <= rows && !r; i++)
      r = walk_rows(&w, i, e);
  }
  if (!r && model_info(m)->has_encoder)
    r = walk_encoder(&w, e);
  free(w.rgb);
  batch_close(w.b);
  return r;
}

int compile_walk_canary(struct model *m, struct be *be, struct err *e)
{
  struct predictor *p = NULL;
  struct err why = {0};
  float *latent;
  int r = predictor_new(&p, m, be, MANIFEST_CANARY_SIDE, MANIFEST_CANARY_SIDE, &why);

  if (r == E_ARG) /* SDXL, which has no single predictions */
    return 0;
  if (r)
    return err_set(e, r, "%s", why.msg);
  latent = calloc(predictor_count(p), sizeof *latent);
  if (!latent)
    r = err_set(e, E_NOMEM, "out of memory for a latent");
  if (!r)
    r = predictor_prompt(p, model_base(m), "a", NULL, e);
  if (!r)
    r = predictor_run(p, latent, 1, NULL, latent, e);
  free(latent);
  predictor_free(p);
  return r;
}
