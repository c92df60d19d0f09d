/*
 * sampler.h - the arithmetic of diffusion samplers: pure numbers, no tensors.
 *
 * A plan lists, for every step, the timestep the network is asked for, how the latent is scaled on its way in, and the linear
 * update (struct step_coef without rows and guidance) that be_ops.sampler_step applies. Everything is computed in double and
 * follows diffusers' schedulers (DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler,
 * DPMSolverMultistepScheduler dpmsolver++ midpoint order 2), so that a seed gives the same picture there and here.
 *
 * Called by pipeline.c. Threads: pure functions. Golden: tests/golden (sampler).
 */
#ifndef SAFELIGHT_MODELS_SAMPLER_H
#define SAFELIGHT_MODELS_SAMPLER_H

#include "base/err.h"
#include "kernels/backend.h"

enum sampler_kind { SAMPLER_DDIM, SAMPLER_EULER, SAMPLER_EULER_A, SAMPLER_DPMPP_2M, SAMPLER_COUNT };

enum { SAMPLER_MAX_STEPS = 1000 };

/* What a checkpoint's scheduler_config.json says about its noise. */
struct schedule_config {
  int train_steps;              /* 1000 */
  double beta_start, beta_end;
  int is_scaled_linear;         /* else linear */
  int is_v_prediction;          /* else epsilon */
  int steps_offset;             /* 1 for SD */
  int set_alpha_to_one;         /* DDIM's final alpha */
  int spacing;                  /* enum below */
  int clip_sample;              /* must be 0: refused otherwise */
};
/* SPACING_DEFAULT: the file does not say; then DDIM uses leading and the others linspace, as their diffusers classes do. */
enum { SPACING_LEADING, SPACING_TRAILING, SPACING_LINSPACE, SPACING_DEFAULT };

struct sampler_step {
  float timestep;               /* what the UNet is told; fractional for the Euler samplers with linspace or Karras */
  float scale_in;               /* latent * scale_in enters the UNet */
  struct step_coef coef;        /* x0_x, x0_e, c_x, c_x0, c_old, c_noise; guidance and rows are the caller's */
  float hold_x, hold_noise;     /* hold_x * a clean latent + hold_noise * noise is noised as far as this step expects (add_noise) */
};

struct sampler_plan {
  int n;                        /* steps that call the network */
  float init_scale;             /* initial noise * init_scale is the first latent */
  struct sampler_step *step;    /* n entries, malloc'ed */
};

/* skip: leading steps of `steps` that are left out, 0..steps-1, for a picture that starts from another one; p->n is steps - skip.
 * steps 1..SAMPLER_MAX_STEPS (and at most train_steps). E_ARG when the sampler has no Karras form (field "sampler") or steps is out
 * of bounds ("steps"), E_FILE when the config itself is impossible. Every number of a plan is finite. On success
 * sampler_plan_close after; on failure *p is zeroed. The latents are diffusers': DDIM and DPM++ variance preserving (init_scale 1,
 * scale_in 1), Euler and Euler a variance exploding. */
MUST_CHECK int sampler_plan(struct sampler_plan *p, const struct schedule_config *cfg, enum sampler_kind kind, int karras,
                            int steps, struct err *e);
MUST_CHECK int sampler_plan_from(struct sampler_plan *p, const struct schedule_config *cfg, enum sampler_kind kind, int karras,
                                 int steps, int skip, struct err *e);
void sampler_plan_close(struct sampler_plan *p); /* takes NULL and zeroed */

/* Names: "ddim", "euler", "euler_a", "dpmpp_2m"; aliases of other servers ("Euler a", "k_euler_a", "DPM++ 2M", "DPM++ 2M Karras",
 * "dpm++2m", "DDIM", diffusers' class names) are known, in any case; a Karras alias sets *karras to 1 and leaves it alone
 * otherwise. E_ARG (field "sampler") lists the names. */
MUST_CHECK int sampler_find(const char *name, enum sampler_kind *kind, int *karras, struct err *e);
const char *sampler_name(enum sampler_kind kind);      /* "euler_a" */
const char *sampler_label(enum sampler_kind kind);     /* "Euler a", as A1111 writes it */
int sampler_has_karras(enum sampler_kind kind);

#endif
