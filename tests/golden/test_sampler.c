/*
 * test_sampler.c - models/sampler.c against diffusers: tests/golden/samplers.safetensors.
 *
 * Every case runs its plan in fp32 with the stand-in for the UNet that the README describes and compares every latent on the
 * way. Errors are relative to the largest value of the trajectory. Run from the root of the repository.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/safetensors.h"
#include "models/sampler.h"

enum { COUNT = 64 }; /* values of a (1, 4, 4, 4) latent */

/* Times 4. Measured against diffusers 0.33.1, torch 2.7.1. */
static const double x_tolerance = 4 * 8.24e-7;
static const double timestep_tolerance = 4 * 6.1e-5; /* absolute: the last bit of an fp32 near 999, through Karras */
static const double scale_tolerance = 4 * 9.12e-8;

static struct safetensors *golden;
static double worst_x, worst_t, worst_scale;

/* What SD1.5's scheduler_config.json says. */
static const struct schedule_config sd15 = {.train_steps = 1000,
                                            .beta_start = 0.00085,
                                            .beta_end = 0.012,
                                            .is_scaled_linear = 1,
                                            .steps_offset = 1,
                                            .spacing = SPACING_DEFAULT};

static const struct {
  const char *name;
  enum sampler_kind kind;
  int karras;
} samplers[] = {{"ddim", SAMPLER_DDIM, 0},         {"euler", SAMPLER_EULER, 0},       {"euler_karras", SAMPLER_EULER, 1},
                {"euler_a", SAMPLER_EULER_A, 0},   {"dpmpp_2m", SAMPLER_DPMPP_2M, 0}, {"dpmpp_2m_karras", SAMPLER_DPMPP_2M, 1}};
static const struct {
  const char *name;
  int spacing;
} spacings[] = {{"default", SPACING_DEFAULT}, {"leading", SPACING_LEADING}, {"trailing", SPACING_TRAILING}};

static const float *floats(const char *name, size_t count)
{
  const struct st_tensor *t = st_find(golden, name);

  if (!t || t->type != ST_F32 || t->bytes != count * 4 || (uintptr_t)t->data % 4)
    fail_msg("%s is not in the golden file with %zu values", name, count);
  return t->data;
}

static int near(double got, double want, double scale, double tolerance, double *worst)
{
  double diff = fabs(got - want) / scale;

  if (!(diff <= *worst))
    *worst = diff;
  return diff <= tolerance;
}

/* One step as struct step_coef says, on the stand-in. */
static void step(const struct sampler_step *s, float *x, float *x0_old, const float *noise)
{
  const struct step_coef *k = &s->coef;
  float a = (float)(0.5 * sin(0.01 * (double)s->timestep));

  for (int i = 0; i < COUNT; i++) {
    float e = a * (x[i] * s->scale_in) + 0.1f;
    float x0 = k->x0_x * x[i] + k->x0_e * e;

    x[i] = k->c_x * x[i] + k->c_x0 * x0 + k->c_old * x0_old[i] + k->c_noise * noise[i];
    x0_old[i] = x0;
  }
}

/* 1 when the plan's trajectory is the golden's. */
static int follows(const struct sampler_plan *p, const char *case_name)
{
  const float *noise = floats("noise", 31 * COUNT), *want;
  float x[COUNT], x0_old[COUNT] = {0};
  double largest = 0;
  char name[128];
  int ok = 1;

  snprintf(name, sizeof name, "%s.x", case_name);
  want = floats(name, (size_t)(p->n + 1) * COUNT);
  for (int i = 0; i < (p->n + 1) * COUNT; i++)
    largest = fmax(largest, fabs((double)want[i]));
  for (int i = 0; i < COUNT; i++)
    x[i] = noise[i] * p->init_scale;
  for (int s = 0; s <= p->n; s++) {
    for (int i = 0; i < COUNT; i++)
      ok = near((double)x[i], (double)want[s * COUNT + i], largest, x_tolerance, &worst_x) && ok;
    if (s < p->n)
      step(&p->step[s], x, x0_old, noise + (s + 1) * COUNT);
  }
  return ok;
}

static int times_match(const struct sampler_plan *p, const char *case_name)
{
  const float *want, *scale;
  char name[128];
  int ok;

  snprintf(name, sizeof name, "%s.timesteps", case_name);
  want = floats(name, (size_t)p->n);
  snprintf(name, sizeof name, "%s.init_noise_sigma", case_name);
  scale = floats(name, 1);
  ok = near((double)p->init_scale, (double)*scale, (double)*scale, scale_tolerance, &worst_scale);
  for (int i = 0; i < p->n; i++)
    ok = near((double)p->step[i].timestep, (double)want[i], 1, timestep_tolerance, &worst_t) && ok;
  return ok;
}

static struct sampler_plan plan(enum sampler_kind kind, int karras, int spacing, int is_v, int steps)
{
  struct schedule_config cfg = sd15;
  struct sampler_plan p;
  struct err e = {0};

  cfg.spacing = spacing;
  cfg.is_v_prediction = is_v;
  if (sampler_plan(&p, &cfg, kind, karras, steps, &e))
    fail_msg("%s", e.msg);
  return p;
}

static void test_trajectories(void **state)
{
  static const int all_steps[] = {1, 2, 5, 20, 30}, some_steps[] = {5, 20};
  char name[80];
  int cases = 0;

  (void)state;
  for (size_t s = 0; s < sizeof samplers / sizeof *samplers; s++)
    for (int is_v = 0; is_v < 2; is_v++)
      for (int sp = 0; sp < 3; sp++)
        for (int n = 0; n < (sp ? 2 : 5); n++, cases++) {
          int steps = sp ? some_steps[n] : all_steps[n];
          struct sampler_plan p = plan(samplers[s].kind, samplers[s].karras, spacings[sp].spacing, is_v, steps);

          snprintf(name, sizeof name, "%s.%s.%s.%d", samplers[s].name, is_v ? "v_prediction" : "epsilon", spacings[sp].name,
                   steps);
          if (!follows(&p, name))
            fail_msg("%s: the latents differ, %.3g of the largest so far", name, worst_x);
          if (!is_v && !times_match(&p, name))
            fail_msg("%s: timesteps or first scale differ (%.3g, %.3g)", name, worst_t, worst_scale);
          sampler_plan_close(&p);
        }
  assert_int_equal(cases, 6 * 2 * 9);
}

/* A changed plan must be seen by the comparison. */
static void expect_seen(struct sampler_plan p, const char *case_name, const char *what)
{
  if (follows(&p, case_name))
    fail_msg("%s: a planted bug was not seen: %s", case_name, what);
  sampler_plan_close(&p);
}

static void test_bugs_are_seen(void **state)
{
  struct sampler_plan p;

  (void)state;
  p = plan(SAMPLER_DDIM, 0, SPACING_DEFAULT, 0, 20);
  p.step[19].coef.c_x = 1, p.step[19].coef.c_x0 = 0;
  expect_seen(p, "ddim.epsilon.default.20", "last step skipped");
  expect_seen(plan(SAMPLER_DDIM, 0, SPACING_DEFAULT, 1, 20), "ddim.epsilon.default.20", "v for epsilon");
  expect_seen(plan(SAMPLER_DDIM, 0, SPACING_TRAILING, 0, 20), "ddim.epsilon.leading.20", "wrong spacing");
  p = plan(SAMPLER_DDIM, 0, SPACING_DEFAULT, 0, 20);
  p.step[3].coef.x0_e *= -1;
  expect_seen(p, "ddim.epsilon.default.20", "sign of epsilon");
  p = plan(SAMPLER_EULER, 0, SPACING_DEFAULT, 0, 20);
  p.step[10].scale_in = 1;
  expect_seen(p, "euler.epsilon.default.20", "input not scaled");
  p = plan(SAMPLER_EULER, 0, SPACING_LEADING, 0, 20);
  p.init_scale -= 0.03f;
  expect_seen(p, "euler.epsilon.leading.20", "sigma_max instead of sqrt(sigma_max^2 + 1)");
  expect_seen(plan(SAMPLER_EULER, 0, SPACING_DEFAULT, 0, 20), "euler_karras.epsilon.default.20", "no Karras sigmas");
  p = plan(SAMPLER_EULER_A, 0, SPACING_DEFAULT, 0, 20);
  p.step[5].coef.c_noise = 0;
  expect_seen(p, "euler_a.epsilon.default.20", "noise forgotten");
  expect_seen(plan(SAMPLER_EULER, 0, SPACING_DEFAULT, 0, 20), "euler_a.epsilon.default.20", "not ancestral");
  p = plan(SAMPLER_DPMPP_2M, 0, SPACING_DEFAULT, 0, 20);
  for (int i = 0; i < p.n; i++)
    p.step[i].coef.c_x0 += p.step[i].coef.c_old, p.step[i].coef.c_old = 0;
  expect_seen(p, "dpmpp_2m.epsilon.default.20", "first order only");
  p = plan(SAMPLER_DPMPP_2M, 1, SPACING_DEFAULT, 0, 20);
  p.step[7].timestep += 1;
  expect_seen(p, "dpmpp_2m_karras.epsilon.default.20", "timestep off by one");
  p = plan(SAMPLER_DPMPP_2M, 0, SPACING_DEFAULT, 0, 20);
  p.step[0].coef.c_x = NAN;
  expect_seen(p, "dpmpp_2m.epsilon.default.20", "a NaN");
}

static int open_golden(void **state)
{
  struct err e = {0};

  (void)state;
  if (st_open(&golden, "tests/golden/samplers.safetensors", &e))
    fprintf(stderr, "%s\n", e.msg);
  return golden ? 0 : -1;
}

static int close_golden(void **state)
{
  (void)state;
  st_close(golden);
  return 0;
}

static int print_worst(void **state)
{
  (void)state;
  print_message("largest differences: latents %.3g, timesteps %.3g, first scale %.3g\n", worst_x, worst_t, worst_scale);
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_trajectories, NULL, print_worst),
      cmocka_unit_test(test_bugs_are_seen),
  };

  return cmocka_run_group_tests(tests, open_golden, close_golden);
}
