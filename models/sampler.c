/*
 * sampler.c - see sampler.h.
 *
 * Called by pipeline.c (plans) and proto/ through it (names). Pure functions.
 *
 * Each sampler is written as x' = c_x x + c_x0 x0 + c_old x0_old + c_noise n in the space in which diffusers keeps its latents:
 * variance preserving for DDIM and DPM++ (scale_in 1), variance exploding for the two Euler (scale_in 1/sqrt(sigma^2 + 1)).
 * The schedule is rounded to fp32 where diffusers rounds it (betas, cumulated alphas, sigmas), because 1 - alpha loses four
 * digits at the small timesteps; everything else is double.
 *
 * DDIM: Song, Meng, Ermon 2020, (12) with eta 0. Euler, Euler a and the spacing of sigmas: Karras et al. 2022; k-diffusion.
 * DPM++ 2M: Lu et al. 2022, "DPM-Solver++", algorithm 2, midpoint. Spacings: Lin et al. 2023, table 2.
 */
#include "models/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* 10,000 would already be ten times what any published model was trained with. */
enum { TRAIN_MAX = 10000 };

/* Scratch while a plan is made. */
struct schedule {
  int train;       /* training steps */
  float *alpha;    /* (train) cumulated product of 1 - beta */
  float *sigma;    /* (train) sqrt((1 - alpha) / alpha), rising */
  double *t;       /* (steps) timesteps, falling */
  double *s;       /* (steps + 1) sigmas that belong to t, then 0; unused by DDIM */
};

/* ---- the noise of training ---- */

static void fill_alphas(struct schedule *c, const struct schedule_config *cfg)
{
  float from = (float)(cfg->is_scaled_linear ? sqrt(cfg->beta_start) : cfg->beta_start);
  float to = (float)(cfg->is_scaled_linear ? sqrt(cfg->beta_end) : cfg->beta_end);
  float step = c->train > 1 ? (to - from) / (float)(c->train - 1) : 0;
  double product = 1;

  for (int i = 0; i < c->train; i++) {
    /* torch.linspace works from both ends towards the middle */
    float beta = i < c->train / 2 || c->train == 1 ? from + step * (float)i : to - step * (float)(c->train - 1 - i);

    if (cfg->is_scaled_linear)
      beta *= beta;
    product *= (double)(1 - beta);
    c->alpha[i] = (float)product;
    c->sigma[i] = sqrtf((1 - c->alpha[i]) / c->alpha[i]);
  }
}

/* sigma at a timestep between training steps; outside, that of the end. */
static double sigma_at(const struct schedule *c, double t)
{
  int i = (int)t;

  if (t <= 0)
    return c->sigma[0];
  if (i >= c->train - 1)
    return c->sigma[c->train - 1];
  return (double)c->sigma[i] + (t - i) * ((double)c->sigma[i + 1] - (double)c->sigma[i]);
}

/* The inverse, linear in log sigma. */
static double timestep_of(const struct schedule *c, double sigma)
{
  double log_sigma = log(sigma > 1e-10 ? sigma : 1e-10), low, high, w;
  int lo = 0, hi = c->train - 1;

  while (hi - lo > 1) { /* the last training step that is not above sigma, or the first of all */
    int mid = (lo + hi) / 2;

    if (logf(c->sigma[mid]) <= log_sigma)
      lo = mid;
    else
      hi = mid;
  }
  low = logf(c->sigma[lo]);
  high = logf(c->sigma[lo + 1]);
  w = (low - log_sigma) / (low - high);
  w = w < 0 ? 0 : w > 1 ? 1 : w;
  return (1 - w) * lo + w * (lo + 1);
}

/* ---- which timesteps ---- */

/* i-th of n numbers from 0 to last, as numpy.linspace has it. */
static double linspace(double last, int n, int i)
{
  return n == 1 ? 0 : i == n - 1 ? last : i * (last / (n - 1));
}

/* DPM++ leaves the end that its first step comes from out of n + 1 numbers, where the others take n; only Euler keeps
 * fractions. */
static void fill_timesteps(struct schedule *c, const struct schedule_config *cfg, enum sampler_kind kind, int spacing, int n)
{
  int extra = kind == SAMPLER_DPMPP_2M, keeps_fraction = kind == SAMPLER_EULER || kind == SAMPLER_EULER_A;
  double ratio = (double)c->train / n, down = (c->train - ratio) - c->train; /* rounded as numpy.arange rounds it */

  for (int i = 0; i < n; i++) {
    int from_end = n - 1 - i + extra;

    if (spacing == SPACING_LINSPACE) {
      double t = linspace(c->train - 1, n + extra, from_end);

      c->t[i] = keeps_fraction ? (double)(float)t : rint(t);
    } else if (spacing == SPACING_LEADING) {
      c->t[i] = from_end * (c->train / (n + extra)) + cfg->steps_offset;
    } else {
      c->t[i] = rint(c->train + i * down) - 1;
    }
  }
}

/* Karras et al. 2022, (5), rho 7, between the two ends; the timesteps follow. */
static void space_karras(struct schedule *c, double most, double least, int n, int is_whole)
{
  double a = pow(most, 1 / 7.0), b = pow(least, 1 / 7.0);

  for (int i = 0; i < n; i++) {
    c->s[i] = pow(a + linspace(1, n, i) * (b - a), 7);
    c->t[i] = timestep_of(c, c->s[i]);
    c->t[i] = is_whole ? rint(c->t[i]) : (double)(float)c->t[i];
  }
}

static void fill_sigmas(struct schedule *c, enum sampler_kind kind, int karras, int n)
{
  for (int i = 0; i < n; i++)
    c->s[i] = sigma_at(c, c->t[i]);
  if (karras && kind == SAMPLER_DPMPP_2M)
    space_karras(c, c->sigma[c->train - 1], c->sigma[0], n, 1);
  else if (karras)
    space_karras(c, c->s[0], c->s[n - 1], n, 0);
  for (int i = 0; i < n; i++)
    c->s[i] = (double)(float)c->s[i];
  c->s[n] = 0;
}

/* ---- the four updates ---- */

/* x0 from x and the model's answer where x = alpha x0 + sigma e (variance preserving). */
static void predict_vp(struct step_coef *k, double alpha, double sigma, int is_v)
{
  k->x0_x = (float)(is_v ? alpha : 1 / alpha);
  k->x0_e = (float)(is_v ? -sigma : -sigma / alpha);
}

/* The same where x = x0 + sigma e (variance exploding). */
static void predict_ve(struct step_coef *k, double sigma, int is_v)
{
  double whole = sigma * sigma + 1;

  k->x0_x = (float)(is_v ? 1 / whole : 1);
  k->x0_e = (float)(is_v ? -sigma / sqrt(whole) : -sigma);
}

static double alpha_at(const struct schedule *c, const struct schedule_config *cfg, int t)
{
  if (t < 0)
    return cfg->set_alpha_to_one ? 1 : c->alpha[0];
  return c->alpha[t < c->train ? t : c->train - 1]; /* steps_offset reaches one past the end with as many steps as training */
}

static void plan_ddim(struct sampler_plan *p, const struct schedule *c, const struct schedule_config *cfg)
{
  for (int i = 0; i < p->n; i++) {
    struct sampler_step *st = &p->step[i];
    double a = alpha_at(c, cfg, (int)c->t[i]), next = alpha_at(c, cfg, (int)c->t[i] - c->train / p->n);
    double keep = sqrt((1 - next) / (1 - a)); /* of x, whose noise is (x - sqrt(a) x0) / sqrt(1 - a) */

    predict_vp(&st->coef, sqrt(a), sqrt(1 - a), cfg->is_v_prediction);
    st->coef.c_x = (float)keep;
    st->coef.c_x0 = (float)(sqrt(next) - sqrt(a) * keep);
    st->hold_x = (float)sqrt(a);
    st->hold_noise = (float)sqrt(1 - a);
  }
}

static void plan_euler(struct sampler_plan *p, const struct schedule *c, int is_v, int is_ancestral)
{
  for (int i = 0; i < p->n; i++) {
    struct sampler_step *st = &p->step[i];
    double from = c->s[i], to = c->s[i + 1], up = 0, down = to;

    if (is_ancestral) { /* go down further than asked and come back up with fresh noise */
      down = to * to / from;
      up = to * sqrt(1 - to / from * (to / from)); /* down^2 + up^2 = to^2 */
    }
    st->scale_in = (float)(1 / sqrt(from * from + 1));
    predict_ve(&st->coef, from, is_v);
    st->coef.c_x = (float)(down / from);
    st->coef.c_x0 = (float)(1 - down / from);
    st->coef.c_noise = (float)up;
    st->hold_x = 1;
    st->hold_noise = (float)from;
  }
}

static void plan_dpmpp_2m(struct sampler_plan *p, const struct schedule *c, int is_v, int skip)
{
  double last_h = 0; /* length of the step before, in log signal to noise; 0: none */

  for (int i = skip; i < p->n; i++) {
    struct sampler_step *st = &p->step[i];
    double from = c->s[i], to = c->s[i + 1];
    double alpha_from = 1 / sqrt(from * from + 1), alpha_to = 1 / sqrt(to * to + 1);
    double h = to > 0 ? log(from) - log(to) : 0;
    double gain = to > 0 ? -alpha_to * expm1(-h) : 1; /* of x0; the last step lands on x0 itself */
    double bend = 0;                                   /* of the difference to the x0 before */

    /* First order where there is no step before (or an empty one, when rounding makes timesteps repeat) and at the end. */
    if (last_h > 0 && to > 0)
      bend = 0.5 * gain * h / last_h;
    predict_vp(&st->coef, alpha_from, from * alpha_from, is_v);
    st->coef.c_x = (float)((to * alpha_to) / (from * alpha_from));
    st->coef.c_x0 = (float)(gain + bend);
    st->coef.c_old = (float)-bend;
    st->hold_x = (float)alpha_from;
    st->hold_noise = (float)(from * alpha_from);
    last_h = h;
  }
}

/* ---- the plan ---- */

static int check(const struct schedule_config *cfg, enum sampler_kind kind, int karras, int steps, struct err *e)
{
  if (cfg->train_steps < 2 || cfg->train_steps > TRAIN_MAX)
    return err_field(e, E_FILE, "num_train_timesteps", "scheduler_config.json: num_train_timesteps must be 2 to %d", TRAIN_MAX);
  /* written so that a NaN fails */
  if (!(cfg->beta_start > 0 && cfg->beta_start <= cfg->beta_end && cfg->beta_end < 1))
    return err_field(e, E_FILE, "beta_start", "scheduler_config.json: needs 0 < beta_start <= beta_end < 1");
  if (cfg->steps_offset < 0 || cfg->steps_offset >= cfg->train_steps)
    return err_field(e, E_FILE, "steps_offset", "scheduler_config.json: steps_offset must be 0 to num_train_timesteps - 1");
  if (cfg->spacing != SPACING_LEADING && cfg->spacing != SPACING_TRAILING && cfg->spacing != SPACING_LINSPACE &&
      cfg->spacing != SPACING_DEFAULT)
    return err_field(e, E_FILE, "timestep_spacing", "scheduler_config.json: unknown timestep_spacing");
  if (cfg->clip_sample)
    return err_field(e, E_FILE, "clip_sample", "scheduler_config.json: clip_sample is for pixels and is not supported");
  if (kind < 0 || kind >= SAMPLER_COUNT)
    return err_field(e, E_ARG, "sampler", "there is no such sampler");
  if (karras && !sampler_has_karras(kind))
    return err_field(e, E_ARG, "sampler", "%s has no Karras sigmas; euler and dpmpp_2m have", sampler_name(kind));
  if (steps < 1 || steps > SAMPLER_MAX_STEPS || steps > cfg->train_steps)
    return err_field(e, E_ARG, "steps", "steps must be 1 to %d",
                     cfg->train_steps < SAMPLER_MAX_STEPS ? cfg->train_steps : SAMPLER_MAX_STEPS);
  return 0;
}

int sampler_plan(struct sampler_plan *p, const struct schedule_config *cfg, enum sampler_kind kind, int karras, int steps,
                 struct err *e)
{
  return sampler_plan_from(p, cfg, kind, karras, steps, 0, e);
}

int sampler_plan_from(struct sampler_plan *p, const struct schedule_config *cfg, enum sampler_kind kind, int karras, int steps,
                      int skip, struct err *e)
{
  struct schedule c = {.train = cfg->train_steps};
  int rc, spacing = cfg->spacing;

  memset(p, 0, sizeof *p);
  if ((rc = check(cfg, kind, karras, steps, e)))
    return rc;
  if (skip < 0 || skip >= steps)
    return err_field(e, E_ARG, "steps", "%d of %d steps cannot be left out", skip, steps);
  c.alpha = malloc((size_t)c.train * sizeof *c.alpha);
  c.sigma = malloc((size_t)c.train * sizeof *c.sigma);
  c.t = malloc((size_t)steps * sizeof *c.t);
  c.s = malloc(((size_t)steps + 1) * sizeof *c.s);
  p->step = calloc((size_t)steps, sizeof *p->step);
  if (!c.alpha || !c.sigma || !c.t || !c.s || !p->step) {
    rc = err_set(e, E_NOMEM, "no memory for a plan of %d steps", steps);
    sampler_plan_close(p);
    goto out;
  }
  if (spacing == SPACING_DEFAULT) /* diffusers' classes differ in what they do when the file is silent */
    spacing = kind == SAMPLER_DDIM ? SPACING_LEADING : SPACING_LINSPACE;
  p->n = steps;
  p->init_scale = 1;
  fill_alphas(&c, cfg);
  if (!(c.sigma[0] > 0 && c.alpha[c.train - 1] > 1e-9f)) {
    rc = err_field(e, E_FILE, "beta_start", "scheduler_config.json: its betas leave no noise at the first training step or no "
                                            "signal at the last");
    sampler_plan_close(p);
    goto out;
  }
  fill_timesteps(&c, cfg, kind, spacing, steps);
  fill_sigmas(&c, kind, karras, steps);
  for (int i = 0; i < steps; i++)
    p->step[i] = (struct sampler_step){.timestep = (float)c.t[i], .scale_in = 1};
  if (kind == SAMPLER_DDIM) {
    plan_ddim(p, &c, cfg);
  } else if (kind == SAMPLER_DPMPP_2M) {
    plan_dpmpp_2m(p, &c, cfg->is_v_prediction, skip);
  } else {
    plan_euler(p, &c, cfg->is_v_prediction, kind == SAMPLER_EULER_A);
    p->init_scale = (float)(spacing == SPACING_LEADING ? sqrt(c.s[0] * c.s[0] + 1) : c.s[0]);
  }
  p->n -= skip;
  memmove(p->step, p->step + skip, (size_t)p->n * sizeof *p->step);
out:
  free(c.alpha);
  free(c.sigma);
  free(c.t);
  free(c.s);
  return rc;
}

void sampler_plan_close(struct sampler_plan *p)
{
  if (!p)
    return;
  free(p->step);
  memset(p, 0, sizeof *p);
}

/* ---- names ---- */

static const struct {
  const char *name, *label;
  int has_karras;
} samplers[SAMPLER_COUNT] = {[SAMPLER_DDIM] = {"ddim", "DDIM", 0},
                             [SAMPLER_EULER] = {"euler", "Euler", 1},
                             [SAMPLER_EULER_A] = {"euler_a", "Euler a", 0},
                             [SAMPLER_DPMPP_2M] = {"dpmpp_2m", "DPM++ 2M", 1}};

/* What other servers call them, folded as fold() folds. */
static const struct {
  const char *folded;
  enum sampler_kind kind;
} aliases[] = {{"ddim", SAMPLER_DDIM},
               {"ddimscheduler", SAMPLER_DDIM},
               {"euler", SAMPLER_EULER},
               {"keuler", SAMPLER_EULER},
               {"eulerdiscretescheduler", SAMPLER_EULER},
               {"eulera", SAMPLER_EULER_A},
               {"keulera", SAMPLER_EULER_A},
               {"eulerancestral", SAMPLER_EULER_A},
               {"keulerancestral", SAMPLER_EULER_A},
               {"eulerancestraldiscretescheduler", SAMPLER_EULER_A},
               {"dpmpp2m", SAMPLER_DPMPP_2M},
               {"kdpmpp2m", SAMPLER_DPMPP_2M},
               {"dpmsolverppmultistep", SAMPLER_DPMPP_2M},
               {"dpmsolvermultistepscheduler", SAMPLER_DPMPP_2M}};

/* Lower case, without spaces, '_' and '-', '+' as p: "DPM++ 2M" and "dpmpp_2m" become one. 0 when it does not fit. */
static int fold(char out[48], const char *name)
{
  size_t n = 0;

  for (; *name; name++) {
    if (*name == ' ' || *name == '_' || *name == '-')
      continue;
    if (n == 47)
      return 0;
    out[n++] = *name == '+' ? 'p' : *name >= 'A' && *name <= 'Z' ? (char)(*name - 'A' + 'a') : *name;
  }
  out[n] = 0;
  return 1;
}

int sampler_find(const char *name, enum sampler_kind *kind, int *karras, struct err *e)
{
  char folded[48];
  size_t n;
  int wants_karras = 0;

  if (fold(folded, name)) {
    n = strlen(folded);
    wants_karras = n > 6 && !strcmp(folded + n - 6, "karras");
    if (wants_karras)
      folded[n - 6] = 0;
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++)
      if (!strcmp(folded, aliases[i].folded) && (!wants_karras || sampler_has_karras(aliases[i].kind))) {
        *kind = aliases[i].kind;
        if (wants_karras)
          *karras = 1;
        return 0;
      }
  }
  return err_field(e, E_ARG, "sampler", "unknown sampler; known are ddim, euler, euler_a and dpmpp_2m (euler and dpmpp_2m also "
                                        "with \" karras\" behind)");
}

const char *sampler_name(enum sampler_kind kind)
{
  return samplers[kind].name;
}

const char *sampler_label(enum sampler_kind kind)
{
  return samplers[kind].label;
}

int sampler_has_karras(enum sampler_kind kind)
{
  return samplers[kind].has_karras;
}
