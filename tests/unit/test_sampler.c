/*
 * test_sampler.c - models/sampler.c: every plan that can be asked for is finite, bounds, names. That the numbers are right is
 * the matter of tests/golden/test_sampler.c.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include "models/sampler.h"

static const struct schedule_config sd15 = {.train_steps = 1000,
                                            .beta_start = 0.00085,
                                            .beta_end = 0.012,
                                            .is_scaled_linear = 1,
                                            .steps_offset = 1,
                                            .spacing = SPACING_DEFAULT};

static int is_fine(const struct sampler_plan *p)
{
  int ok = p->init_scale > 0 && isfinite(p->init_scale);
  float last = INFINITY;

  for (int i = 0; i < p->n; i++) {
    const struct sampler_step *s = &p->step[i];
    const struct step_coef *k = &s->coef;

    ok = ok && s->timestep >= 0 && s->timestep <= 1000 && s->timestep <= last && s->scale_in > 0 && s->scale_in <= 1;
    ok = ok && isfinite(k->x0_x) && isfinite(k->x0_e) && isfinite(k->c_x) && isfinite(k->c_x0) && isfinite(k->c_old) &&
         isfinite(k->c_noise) && k->c_noise >= 0;
    last = s->timestep;
  }
  ok = ok && p->step[0].coef.c_old == 0;        /* there is no x0 before the first */
  ok = ok && p->step[p->n - 1].coef.c_noise == 0; /* nothing is left in the picture */
  return ok;
}

/* Also the counts at which timesteps repeat or run out, where diffusers divides by zero. */
static void test_every_plan_is_finite(void **state)
{
  struct schedule_config cfg = sd15;
  struct sampler_plan p;
  struct err e = {0};

  (void)state;
  for (int kind = 0; kind < SAMPLER_COUNT; kind++)
    for (int karras = 0; karras <= sampler_has_karras(kind); karras++)
      for (int spacing = SPACING_LEADING; spacing <= SPACING_DEFAULT; spacing++)
        for (int steps = 1; steps <= SAMPLER_MAX_STEPS; steps += steps < 60 || steps > 980 ? 1 : 37) {
          cfg.spacing = spacing;
          cfg.is_v_prediction = steps & 1;
          assert_int_equal(sampler_plan(&p, &cfg, kind, karras, steps, &e), 0);
          assert_int_equal(p.n, steps);
          if (!is_fine(&p))
            fail_msg("%s karras %d spacing %d steps %d", sampler_name(kind), karras, spacing, steps);
          sampler_plan_close(&p);
        }
}

/* A model that always answers with the same, true noise: the latents then run along a straight line from noise to picture, so
 * the deterministic samplers must see the same picture at every step, whatever their step sizes, and end on it. */
static void test_straight_line(void **state)
{
  static const enum sampler_kind kinds[] = {SAMPLER_DDIM, SAMPLER_EULER, SAMPLER_DPMPP_2M};
  const double picture = 0.75, noise = 1.5;
  double worst = 0;

  (void)state;
  for (int kind = 0; kind < 3; kind++)
    for (int steps = 1; steps <= 50; steps += 7) {
      struct schedule_config cfg = sd15;
      struct sampler_plan p;
      struct err e = {0};
      double x = 0, old = 0;

      cfg.set_alpha_to_one = 1; /* else DDIM stops one training step short */
      cfg.spacing = SPACING_LEADING; /* with the others diffusers' DDIM goes to t - 1000 / steps, which need not be the next t */
      assert_int_equal(sampler_plan(&p, &cfg, kinds[kind], 0, steps, &e), 0);
      for (int i = 0; i < p.n; i++) {
        const struct step_coef *k = &p.step[i].coef;
        double x0;

        if (i == 0)
          x = (picture - (double)k->x0_e * noise) / (double)k->x0_x;
        x0 = (double)k->x0_x * x + (double)k->x0_e * noise;
        worst = fmax(worst, fabs(x0 - picture));
        x = (double)k->c_x * x + (double)k->c_x0 * x0 + (double)k->c_old * old;
        old = x0;
      }
      worst = fmax(worst, fabs(x - picture));
      if (!(worst <= 4 * 1.33e-6))
        fail_msg("%s, %d steps: off by %.3g", sampler_name(kinds[kind]), steps, worst);
      sampler_plan_close(&p);
    }
  print_message("largest difference %.3g\n", worst);
}

static void expect_refused(struct schedule_config cfg, enum sampler_kind kind, int karras, int steps, int code,
                           const char *field)
{
  struct sampler_plan p;
  struct err e = {0};

  memset(&p, 0xff, sizeof p);
  assert_int_equal(sampler_plan(&p, &cfg, kind, karras, steps, &e), code);
  assert_string_equal(e.field, field);
  assert_null(p.step);
  sampler_plan_close(&p);
}

static void test_bounds(void **state)
{
  struct schedule_config c = sd15;

  (void)state;
  expect_refused(c, SAMPLER_DDIM, 0, 0, E_ARG, "steps");
  expect_refused(c, SAMPLER_DDIM, 0, 1001, E_ARG, "steps");
  expect_refused(c, SAMPLER_DDIM, 0, -5, E_ARG, "steps");
  expect_refused(c, SAMPLER_DDIM, 1, 20, E_ARG, "sampler");
  expect_refused(c, SAMPLER_EULER_A, 1, 20, E_ARG, "sampler");
  expect_refused(c, SAMPLER_COUNT, 0, 20, E_ARG, "sampler");
  c.train_steps = 100;
  expect_refused(c, SAMPLER_EULER, 0, 101, E_ARG, "steps");
  c.train_steps = 1;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "num_train_timesteps");
  c = sd15, c.train_steps = 1 << 30;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "num_train_timesteps");
  c = sd15, c.beta_start = 0;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "beta_start");
  c = sd15, c.beta_end = NAN;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "beta_start");
  c = sd15, c.beta_end = 0.9; /* no signal left after 1000 such steps: sigma would be infinite */
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "beta_start");
  c = sd15, c.beta_start = 1e-12; /* 1 - beta rounds to 1: sigma would be 0 */
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "beta_start");
  c = sd15, c.steps_offset = 1000;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "steps_offset");
  c = sd15, c.steps_offset = -1;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "steps_offset");
  c = sd15, c.clip_sample = 1;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "clip_sample");
  c = sd15, c.spacing = 7;
  expect_refused(c, SAMPLER_EULER, 0, 1, E_FILE, "timestep_spacing");
  sampler_plan_close(NULL);
}

static void test_names(void **state)
{
  static const struct {
    const char *name;
    enum sampler_kind kind;
    int karras;
  } known[] = {{"ddim", SAMPLER_DDIM, 0},
               {"DDIM", SAMPLER_DDIM, 0},
               {"euler", SAMPLER_EULER, 0},
               {"Euler", SAMPLER_EULER, 0},
               {"k_euler", SAMPLER_EULER, 0},
               {"Euler Karras", SAMPLER_EULER, 1},
               {"Euler a", SAMPLER_EULER_A, 0},
               {"euler_a", SAMPLER_EULER_A, 0},
               {"k_euler_a", SAMPLER_EULER_A, 0},
               {"k_euler_ancestral", SAMPLER_EULER_A, 0},
               {"EulerAncestralDiscreteScheduler", SAMPLER_EULER_A, 0},
               {"DPM++ 2M", SAMPLER_DPMPP_2M, 0},
               {"dpm++2m", SAMPLER_DPMPP_2M, 0},
               {"dpmpp_2m", SAMPLER_DPMPP_2M, 0},
               {"K_DPMPP_2M", SAMPLER_DPMPP_2M, 0},
               {"DPM++ 2M Karras", SAMPLER_DPMPP_2M, 1},
               {"dpmpp_2m_karras", SAMPLER_DPMPP_2M, 1}};
  static const char *const unknown[] = {
      "", " ", "karras", "heun", "euler b", "DPM++ 2M SDE", "ddim karras", "Euler a Karras", "eul\xc3\xa9r",
      "euler_______________________________________________________________________________________________________x"};
  enum sampler_kind kind;
  int karras;

  (void)state;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    struct err e = {0};

    kind = SAMPLER_COUNT;
    karras = 0;
    assert_int_equal(sampler_find(known[i].name, &kind, &karras, &e), 0);
    assert_int_equal(kind, known[i].kind);
    assert_int_equal(karras, known[i].karras);
  }
  for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
    struct err e = {0};

    assert_int_equal(sampler_find(unknown[i], &kind, &karras, &e), E_ARG);
    assert_string_equal(e.field, "sampler");
    assert_non_null(strstr(e.msg, "dpmpp_2m"));
  }
  karras = 1; /* left alone by a name without it */
  assert_int_equal(sampler_find("DPM++ 2M", &kind, &karras, NULL), 0);
  assert_int_equal(karras, 1);
  for (int k = 0; k < SAMPLER_COUNT; k++) { /* what we print can be read back */
    assert_int_equal(sampler_find(sampler_name(k), &kind, &karras, NULL), 0);
    assert_int_equal(kind, k);
    assert_int_equal(sampler_find(sampler_label(k), &kind, &karras, NULL), 0);
    assert_int_equal(kind, k);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_plan_is_finite),
      cmocka_unit_test(test_straight_line),
      cmocka_unit_test(test_bounds),
      cmocka_unit_test(test_names),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
