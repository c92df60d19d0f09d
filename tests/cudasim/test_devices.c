/*
 * test_devices.c - one server on two GPUs, as far as the simulator shows it: a picture that was prepared with the first one's model is drawn on either,
 * in turn with a picture on the other, under a generation of its own device, and has the same bytes; work and memory of the wrong device are reported.
 * Run from the root of the repository. Threads: one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/adapter.h"
#include "models/pipeline.h"
#include "tests/cudasim/sim.h"
#include "tests/golden/make_adapter.h"

enum { DEVICES = 2, SIDE = 32, STEPS = 2, PIXELS = SIDE * SIDE * 3 };

extern const struct be_ops be_cuda;

struct rig {
  struct be be, loader;     /* the device thread's, the loader's */
  struct model *m;
  struct lane *stage;
};

static struct rig rig[DEVICES];

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s %s", err_name(r), e->msg, cudasim_fault());
}

static int open_rigs(void **state)
{
  struct err e = {0};

  (void)state;
  cudasim_devices(DEVICES);
  for (int i = 0; i < DEVICES; i++) {
    struct rig *r = &rig[i];

    must(be_open(&r->be, &be_cuda, &(struct be_config){.device = i}, &e), &e);
    must(model_open(&r->m, &r->be, "weights/emoji", &e), &e);
    must(model_reserve_for(r->m, SIDE, SIDE, LANE_STEPS, &e), &e);
    must(lane_open(&r->stage, r->m, 0, LANE_ENDS, &e), &e);
    must(r->be.ops->open_lane(&r->loader, &r->be, 1, &e), &e);
  }
  return 0;
}

static int close_rigs(void **state)
{
  (void)state;
  for (int i = DEVICES; i-- > 0;) { /* device 0 is current again in the end */
    lane_close(rig[i].stage);
    be_close(&rig[i].loader);
    model_close(rig[i].m);
    be_close(&rig[i].be);
  }
  cudasim_devices(1);
  return cudasim_counts().live != 0;
}

/* Prepared as the HTTP thread does it: with the first device's model, whoever will draw it. */
static struct draw *prepared(uint64_t seed)
{
  static const char prompt[] = "a red apple";
  const struct draw_params p = {.prompt = prompt, .prompt_len = sizeof prompt - 1, .width = SIDE, .height = SIDE, .steps = STEPS, .guidance = 3,
                                .seed = seed, .sampler = SAMPLER_EULER_A};
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, rig[0].m, &p, &e), &e);
  return d;
}

/* The same set on device i, through its loader's lane. */
static struct generation *built(int i, const struct adapter *a, enum generation_form form)
{
  const struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  struct generation *g;
  struct err e = {0};

  must(generation_build(&g, model_base(rig[i].m), model_sources(rig[i].m), &rig[i].loader, &use, 1, form, NULL, &e), &e);
  return g;
}

/* One picture on each device, step by step in turn. */
static void draw_beside(struct generation *const *g, const uint64_t *seed, uint8_t (*rgb)[PIXELS])
{
  struct draw *d[DEVICES];
  struct err e = {0};

  for (int i = 0; i < DEVICES; i++) {
    d[i] = prepared(seed[i]);
    must(draw_start(d[i], rig[i].stage, g[i], &e), &e);
  }
  for (int k = 0; k < STEPS; k++)
    for (int i = 0; i < DEVICES; i++) {
      must(draw_step(d[i], &e), &e);
      must(draw_snapshot(d[i], &e), &e);
    }
  for (int i = 0; i < DEVICES; i++) {
    must(draw_preview(d[i], rig[i].stage, rgb[i], &e), &e);
    must(draw_decode(d[i], rig[i].stage, rgb[i], &e), &e);
    draw_close(d[i]);
  }
}

static void check_form(const struct adapter *a, enum generation_form form)
{
  static const uint64_t seeds[DEVICES] = {7, 8}, crossed[DEVICES] = {8, 7};
  static uint8_t one[DEVICES][PIXELS], other[DEVICES][PIXELS];
  struct generation *g[DEVICES];

  for (int i = 0; i < DEVICES; i++)
    g[i] = built(i, a, form);
  assert_string_equal(g[0]->digest, g[1]->digest);
  draw_beside(g, seeds, one);
  draw_beside(g, crossed, other);
  assert_memory_equal(one[0], other[1], PIXELS);
  assert_memory_equal(one[1], other[0], PIXELS);
  assert_memory_not_equal(one[0], one[1], PIXELS);
  for (int i = 0; i < DEVICES; i++)
    generation_unref(g[i]);
}

static void test_same_bytes(void **state)
{
  static const struct adapter_plan plan = {"two devices", 4, 0.25f, DELTA_LOWRANK, "unet", 1};
  struct adapter *a = adapter_make(model_base(rig[0].m), &plan); /* one file for both, as the loader has it */

  (void)state;
  check_form(a, FORM_RUNTIME);
  check_form(a, FORM_FOLDED);
  adapter_close(a);
}

/* Fail closed: what is not this device's is refused before anything of it is read, and the draw can still be started right. */
static void test_refusals(void **state)
{
  struct draw *d = prepared(1);
  struct model *another;
  struct lane *lane;
  struct err e = {0};

  (void)state;
  assert_int_equal(draw_start(d, rig[1].stage, model_base(rig[0].m), &e), E_INTERNAL);
  assert_non_null(strstr(e.msg, "another device"));
  e = (struct err){0};
  must(model_open_synthetic(&another, &rig[1].be, "emoji", &e), &e);
  must(model_reserve_for(another, SIDE, SIDE, LANE_STEPS, &e), &e);
  must(lane_open(&lane, another, 0, LANE_ENDS, &e), &e);
  assert_int_equal(draw_start(d, lane, model_base(another), &e), E_INTERNAL);
  assert_non_null(strstr(e.msg, "another checkpoint"));
  lane_close(lane);
  model_close(another);
  e = (struct err){0};
  must(draw_start(d, rig[1].stage, model_base(rig[1].m), &e), &e);
  draw_close(d);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_bytes), cmocka_unit_test(test_refusals)};

  return cmocka_run_group_tests_name("two devices", tests, open_rigs, close_rigs);
}
