/*
 * manifest_probe.c - runs a manifest's canary: does the adapter do here what its maker saw it do? See manifest.h.
 *
 * Called by server/safety.c (on the loader's lane) and the command line. Threads: the one that owns the lane.
 *
 * Two questions are asked of the same predictions. The first is absolute: is every prediction, with the adapter and without it, what is
 * stored? That catches a wrong base, a wrong prompt, a wrong schedule. An adapter that moves epsilon by 5 % can be lost within a tolerance
 * of 3 % (bf16), so the second is about the difference alone: d = expected - base as stored, z = y - y0 as measured here. Rounding is much
 * the same in y and y0 and spreads over thousands of numbers, while the adapter's work lies along d; <z, d> / |d|^2 therefore tells half
 * the scale from the whole even where |y - expected| cannot.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/manifest_parts.h"
#include "models/predict.h"
#include "models/rng.h"

/* share must be within this of 1. Half the scale is 0.5 off and twice 1; rounding moves it by less than 1e-5 in fp32 and by 0.009 in bf16
 * on the bundled model where the adapter changes 6 % of the prediction (tests/unit/test_manifest.c), and by more where it changes less. */
#define SHARE_F32 0.02
#define SHARE_BF16 0.15
/* |z - d| / |d| in fp32: what one site does is 0.0016 and more on the bundled model, rounding 2.1e-5 where the adapter changes 4 % of the
 * prediction, and so 1.8e-4 at the least effect. */
#define RESIDUAL_F32 5e-4
/* Below this effect a canary proves nothing. */
#define MIN_EFFECT 0.005

int manifest_predict(struct predictor *p, const struct manifest_probe_point *point, struct generation *g, float *out, struct err *e)
{
  struct rng rng;
  int r;

  rng_seed(&rng, point->seed);
  rng_randn(&rng, out, predictor_count(p));
  r = predictor_prompt(p, g, point->prompt, NULL, e);
  return r ? r : predictor_run(p, out, point->timestep, NULL, out, e);
}

int manifest_check_generation(const struct generation *g, const char *digest, struct err *e)
{
  if (g->members != 1 || strcmp(g->member[0].digest, digest) || g->member[0].weight != 1)
    return err_set(e, E_ARG, "a canary runs through a generation that holds its adapter alone, at weight 1");
  return 0;
}

/* Sums over all probes. */
struct sums {
  double zd, dd, zz_dd; /* <z, d>, |d|^2, |z - d|^2 */
  double bb;            /* |base|^2 */
};

/* Relative L2 distance of y from what is stored. A stored zero vector is nothing that any prediction is near to: infinity. */
static double distance(const float *y, const float *stored, size_t n)
{
  double d = 0, s = 0;

  for (size_t i = 0; i < n; i++) {
    d += ((double)y[i] - (double)stored[i]) * ((double)y[i] - (double)stored[i]);
    s += (double)stored[i] * (double)stored[i];
  }
  return s > 0 ? sqrt(d / s) : INFINITY;
}

static void add_up(struct sums *s, const struct manifest_probe_point *p, const float *y, const float *y0, size_t n)
{
  for (size_t i = 0; i < n; i++) {
    double z = (double)y[i] - (double)y0[i], d = (double)p->expected[i] - (double)p->base[i];

    s->zd += z * d;
    s->dd += d * d;
    s->zz_dd += (z - d) * (z - d);
    s->bb += (double)p->base[i] * (double)p->base[i];
  }
}

/* Measures; judges nothing. y, y0: room for one latent each. */
MUST_CHECK static int run_probes(const struct manifest *m, const struct model *model, struct predictor *p, struct generation *g, float *y,
                                 float *y0, struct manifest_report *report, struct err *e)
{
  size_t n = predictor_count(p);
  struct sums s = {0};
  int r = 0;

  for (int i = 0; !r && i < m->probes; i++) {
    const struct manifest_probe_point *point = &m->probe[i];

    r = manifest_predict(p, point, g, y, e);
    if (!r)
      r = manifest_predict(p, point, model_base(model), y0, e);
    if (r)
      break;
    report->error = fmax(report->error, distance(y, point->expected, n));
    report->base_error = fmax(report->base_error, distance(y0, point->base, n));
    add_up(&s, point, y, y0, n);
  }
  report->effect = sqrt(s.dd / s.bb);
  report->share = s.zd / s.dd;
  report->residual = sqrt(s.zz_dd / s.dd);
  return r;
}

/* Every comparison is written so that a NaN fails. */
MUST_CHECK static int judge(const struct manifest *m, const struct manifest_report *x, enum dtype act, struct err *e)
{
  int f32 = act == DT_F32;
  double tolerance = f32 ? m->tolerance_f32 : m->tolerance_bf16, share = f32 ? SHARE_F32 : SHARE_BF16;

  if (!(x->effect >= MIN_EFFECT))
    return err_field(e, E_FILE, "canary", "%s: by its own numbers the adapter changes the prediction by %.2g of its size: that proves "
                     "nothing; at least %g is needed", m->label, x->effect, MIN_EFFECT);
  if (!(x->base_error <= tolerance))
    return err_field(e, E_FILE, "canary", "%s: without the adapter the prediction is %.3g from what the manifest says (tolerance %g): "
                     "not the model it was made for", m->label, x->base_error, tolerance);
  if (!(fabs(x->share - 1) <= share))
    return err_field(e, E_FILE, "canary", "%s: the adapter does %.3g times what the manifest says (1 within %g): it is missing, in part "
                     "or as a whole, not at its scale, or another one", m->label, x->share, share);
  if (f32 && !(x->residual <= RESIDUAL_F32))
    return err_field(e, E_FILE, "canary", "%s: what the adapter changes differs by %.3g of its size from what the manifest says (at most "
                     "%g): a part of it is missing", m->label, x->residual, RESIDUAL_F32);
  if (!(x->error <= tolerance))
    return err_field(e, E_FILE, "canary", "%s: with the adapter the prediction is %.3g from what the manifest says (tolerance %g)",
                     m->label, x->error, tolerance);
  return 0;
}

int manifest_probe(const struct manifest *m, const struct model *model, struct be *lane, struct generation *g,
                   struct manifest_report *report, struct err *e)
{
  size_t n = (size_t)m->channels * (size_t)m->height * (size_t)m->width;
  struct manifest_report own, *out = report ? report : &own;
  struct predictor *p = NULL;
  float *y = NULL;
  int r;

  *out = (struct manifest_report){0};
  r = manifest_check_generation(g, m->digest, e);
  if (r)
    return r;
  if (m->channels != model_info(model)->latent_channels)
    return err_field(e, E_FILE, "canary.channels", "%s: \"canary.channels\" is %d, but the model's latents have %d", m->label, m->channels,
                     model_info(model)->latent_channels);
  y = malloc(2 * n * sizeof *y);
  if (!y)
    return err_set(e, E_NOMEM, "out of memory for a canary");
  r = predictor_new(&p, model, lane, m->height, m->width, e);
  if (!r)
    r = run_probes(m, model, p, g, y, y + n, out, e);
  if (!r)
    r = judge(m, out, lane->act, e);
  predictor_free(p);
  free(y);
  return r;
}
