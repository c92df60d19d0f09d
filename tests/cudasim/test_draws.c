/*
 * test_draws.c - pictures in company on be_cuda: whatever a picture shares its steps with, and whichever of them are replayed, it has the bits that it
 * has alone, launched op by op. What the device thread does for a step: it takes no memory, transfers nothing and waits for nothing. And a picture whose
 * numbers go beyond fp16 is withheld.
 *
 * The pictures differ in prompt, seed, steps, sampler, guidance, size and generation, and in what they start from: noise, a picture, a picture under
 * a mask. The tiny checkpoint of tests/golden draws them. Run from the root of the repository. Threads: one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/batch.h"
#include "tests/cudasim/sim.h"
#include "tests/golden/make_adapter.h"
#include "tests/golden/tiny.h"

enum { SIDE = 24, /* a latent of 3x3x4 */  MOST = 6, RGB = SIDE * SIDE * 3, GENERATIONS = 4, SWAPPED = 3, ALIVE = 4, SEEDS = 3 };

extern const struct be_ops be_cuda;

static uint8_t first_rgb[RGB], first_mask[SIDE * SIDE], want[MOST][RGB];

static struct draw_params params(int i)
{
  static const char *const prompt[] = {"a red heart", "two cats (and a dog:1.3) under a tree", "a bell BREAK made of gold", ""};
  static const enum sampler_kind sampler[] = {SAMPLER_EULER_A, SAMPLER_DDIM, SAMPLER_DPMPP_2M, SAMPLER_EULER, SAMPLER_EULER_A};
  struct draw_params p = {.prompt = prompt[i % 4], .prompt_len = strlen(prompt[i % 4]), .negative = i % 2 ? "blurry" : "", .negative_len = i % 2 ? 6 : 0,
                          .width = SIDE, .height = i % 5 == 4 ? 16 : SIDE, .steps = 2 + i % 2, .guidance = i % 4 == 3 ? 1 : 3 + (float)(i % 3),
                          .seed = (uint64_t)(100 + i), .sampler = sampler[i % 5], .strength = 0.8f};

  if (i % 3 == 1) { /* a step less */
    p.init_rgb = first_rgb;
    p.mask = i % 2 ? first_mask : NULL;
    p.steps++;
  }
  return p;
}

struct stage {
  struct tiny t;
  struct lane *ends;                   /* where pictures are started and decoded */
  struct be loader;                    /* where generations are built */
  struct generation *g[GENERATIONS];   /* base, factors, other factors, folded; the last one is published while others draw */
  struct batch *batch;
};

/* Generation i of the stage. */
static struct generation *build(struct stage *s, int i)
{
  static const char *const name[] = {"", "one", "two", "three"};
  const struct adapter_plan plan = {name[i], 4 + i, 0.25f, DELTA_LOWRANK, "unet", 1};
  struct adapter *a = i ? adapter_make(model_base(s->t.m), &plan) : NULL;
  const struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  struct generation *g;
  struct err e = {0};

  if (!i)
    return generation_ref(model_base(s->t.m));
  must(generation_build(&g, model_base(s->t.m), model_sources(s->t.m), &s->loader, &use, 1, i == SWAPPED ? FORM_FOLDED : FORM_RUNTIME, NULL, &e), &e);
  adapter_close(a);
  return g;
}

static void stage_open(struct stage *s, int no_capture)
{
  struct err e = {0};

  *s = (struct stage){.g = {NULL}};
  tiny_open(&s->t, &be_cuda, &(struct be_config){.no_capture = no_capture}, "sd15", NULL);
  must(lane_open(&s->ends, s->t.m, 1, LANE_ENDS, &e), &e);
  must(s->t.be.ops->open_lane(&s->loader, &s->t.be, 1, &e), &e);
  must(batch_open(&s->batch, s->t.m, ALIVE, &e), &e);
  for (int i = 0; i < SWAPPED; i++)
    s->g[i] = build(s, i);
}

static void stage_close(struct stage *s)
{
  for (int i = 0; i < GENERATIONS; i++)
    generation_unref(s->g[i]);
  batch_close(s->batch);
  lane_close(s->ends);
  model_close(s->t.m);
  be_close(&s->loader);
  s->t.m = NULL;
  tiny_close(&s->t);
  assert_string_equal(cudasim_fault(), "");
  assert_int_equal(cudasim_counts().live, 0);
}

static struct draw *start(struct stage *s, int i)
{
  struct draw_params p = params(i);
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, s->t.m, &p, &e), &e);
  must(draw_start(d, s->ends, s->g[i % GENERATIONS], &e), &e);
  return d;
}

static int is_done(const struct draw *d)
{
  return draw_step_index(d) == draw_step_count(d);
}

static void finish(struct stage *s, struct draw *d, uint8_t *rgb)
{
  struct err e = {0};

  memset(rgb, 0, RGB);
  must(draw_decode(d, s->ends, rgb, &e), &e);
  draw_close(d);
}

/* A step of all n; is_quiet: the device thread must do nothing for it that another one could wait for. */
static void step(struct stage *s, struct draw *const *d, int n, int is_quiet)
{
  struct cudasim_count before = cudasim_counts(), after;
  struct err err[ALIVE];

  batch_step(s->batch, d, n, err);
  after = cudasim_counts();
  for (int i = 0; i < n; i++)
    must(err[i].code, &err[i]);
  assert_int_equal(after.stops, before.stops);
  assert_int_equal(after.waits, before.waits);
  assert_int_equal(after.pageable, before.pageable);
  if (is_quiet)
    assert_int_equal(after.allocations, before.allocations);
}

/* ---- the same bits ---- */

static void draw_alone(void)
{
  struct stage s;

  stage_open(&s, 1);
  s.g[SWAPPED] = build(&s, SWAPPED);
  for (int i = 0; i < MOST; i++) {
    struct draw *d = start(&s, i);

    while (!is_done(d))
      step(&s, &d, 1, 0);
    finish(&s, d, want[i]);
    for (int k = 0; k < i; k++)
      assert_memory_not_equal(want[i], want[k], RGB / 2);
  }
  stage_close(&s);
}

/* All pictures, up to ALIVE at once, in another order than alone, two of them joining at a step; the last generation is published between two steps
 * and retired at the end. */
static void draw_together(struct stage *s)
{
  static uint8_t rgb[RGB];
  struct draw *d[ALIVE];
  int number[ALIVE], n = 0, next = 0;

  while (n || next < MOST) {
    int kept = 0;

    for (int joined = 0; n < ALIVE && next < MOST && joined < 2; joined++, next++) {
      number[n] = next * 7 % MOST;
      if (number[n] % GENERATIONS == SWAPPED && !s->g[SWAPPED])
        s->g[SWAPPED] = build(s, SWAPPED);
      d[n] = start(s, number[n]);
      n++;
    }
    step(s, d, n, 0);
    for (int i = 0; i < n; i++)
      if (is_done(d[i])) {
        finish(s, d[i], rgb);
        if (memcmp(rgb, want[number[i]], RGB))
          fail_msg("picture %d is another one in a batch of %d", number[i], n);
      } else {
        number[kept] = number[i];
        d[kept++] = d[i];
      }
    n = kept;
  }
  generation_unref(s->g[SWAPPED]);
  s->g[SWAPPED] = NULL;
}

static void test_together(void **state)
{
  struct stage s;
  long replays = cudasim_counts().replays;

  (void)state;
  draw_alone();
  assert_int_equal(cudasim_counts().replays, replays);
  stage_open(&s, 0);
  for (int i = 0; i < 2; i++) /* launched one by one, then as graphs */
    draw_together(&s);
  assert_true(cudasim_counts().replays >= replays + 4);
  stage_close(&s);
}

/* ---- the pictures of one request ---- */

/* SEEDS pictures of this kind with seeds that count up, in steps together; of one request, or each of its own. What the steps cost. */
static struct cudasim_count draw_seeds(struct stage *s, int kind, int is_shared, uint8_t rgb[SEEDS][RGB])
{
  struct draw_params p = params(kind);
  struct cudasim_count before, after;
  struct draw *d[SEEDS];
  struct err e = {0};

  for (int i = 0; i < SEEDS; i++, p.seed++)
    must(is_shared && i ? draw_prepare_like(&d[i], d[0], p.seed, &e) : draw_prepare(&d[i], s->t.m, &p, &e), &e);
  for (int i = 0; i < SEEDS; i++)
    must(draw_start(d[i], s->ends, s->g[1], &e), &e);
  before = cudasim_counts();
  while (!is_done(d[0]))
    step(s, d, SEEDS, 0);
  after = cudasim_counts();
  for (int i = 0; i < SEEDS; i++)
    finish(s, d[i], rgb[i]);
  return (struct cudasim_count){.graphs = after.graphs - before.graphs, .replays = after.replays - before.replays};
}

/* They read the same keys and values at one address: the same bits as with keys and values of their own, by the same graphs, and so by as many
 * launches. */
static void test_request(void **state)
{
  static const int kinds[] = {1, 2}; /* a mask; prompts of two lengths */
  static uint8_t apart[SEEDS][RGB], together[SEEDS][RGB];
  struct stage s;

  (void)state;
  stage_open(&s, 0);
  for (int k = 0; k < (int)(sizeof kinds / sizeof *kinds); k++) {
    struct cudasim_count first = draw_seeds(&s, kinds[k], 0, apart), again = draw_seeds(&s, kinds[k], 1, together);

    assert_int_equal(first.graphs, 1);
    assert_int_equal(again.graphs, 0);
    assert_int_equal(again.replays, params(kinds[k]).steps - (kinds[k] == 1)); /* with the first picture a step less */
    for (int i = 0; i < SEEDS; i++) {
      assert_memory_equal(together[i], apart[i], RGB);
      if (i)
        assert_memory_not_equal(apart[i], apart[i - 1], RGB);
    }
  }
  stage_close(&s);
}

/* ---- a picture that there is no memory for ---- */

/* Wherever memory is short while a picture starts, it fails alone, and the one that is being drawn stays what it is; tried again it is what it is
 * alone. It is the first of its kind, so that working memory is among what is short. */
static void test_short_memory(void **state)
{
  static uint8_t rgb[RGB];
  struct draw *d[2], *failed;
  struct draw_params p = params(1);
  struct err e = {0}, short_of = {0};
  struct stage s;
  int failures = 0;

  (void)state;
  stage_open(&s, 0);
  d[0] = start(&s, 0);
  step(&s, d, 1, 0);
  for (int nth = 1; nth < 4; nth++) {
    must(draw_prepare(&failed, s.t.m, &p, &e), &e);
    cudasim_fail_allocation(nth);
    short_of = (struct err){0};
    if (draw_start(failed, s.ends, s.g[1], &short_of)) {
      failures++;
      assert_int_equal(short_of.code, E_NOMEM);
    }
    cudasim_fail_allocation(0);
    draw_close(failed);
  }
  assert_true(failures > 0);
  d[1] = start(&s, 1);
  step(&s, d, 2, 0);
  assert_true(is_done(d[0]));
  while (!is_done(d[1]))
    step(&s, &d[1], 1, 0);
  for (int i = 0; i < 2; i++) {
    finish(&s, d[i], rgb);
    assert_memory_equal(rgb, want[i], RGB);
  }
  stage_close(&s);
}

/* ---- what a picture costs the others ---- */

/* From its second time on a picture of any kind takes no memory from the driver from its start to its end, and its steps take none at all; the pool
 * has what it needs. A picture that is given up between two steps does not hold up anybody either. */
static void test_quiet(void **state)
{
  static const int kinds[] = {0, 1, 4}; /* noise in every step; a mask; a picture, and noise in every step */
  static uint8_t rgb[RGB];
  struct stage s;

  (void)state;
  stage_open(&s, 0);
  s.g[SWAPPED] = build(&s, SWAPPED);
  for (int k = 0; k < (int)(sizeof kinds / sizeof *kinds); k++)
    for (int times = 0; times < 3; times++) {
      struct cudasim_count before = cudasim_counts(), after;
      struct draw *d = start(&s, kinds[k]);
      struct err e = {0};

      while (!is_done(d) && (times < 2 || draw_step_index(d) < 1)) {
        step(&s, &d, 1, times > 0);
        must(draw_snapshot(d, &e), &e);
      }
      if (times < 2) {
        must(draw_preview(d, s.ends, rgb, &e), &e);
        finish(&s, d, rgb);
      } else {
        draw_close(d);
      }
      after = cudasim_counts();
      if (times > 0) {
        assert_int_equal(after.stops, before.stops);
        assert_int_equal(after.reserved, before.reserved);
        assert_true(after.replays > before.replays);
      }
    }
  stage_close(&s);
}

/* Devices without pools draw the same, and free everything. */
static void test_without_pools(void **state)
{
  static uint8_t with[RGB], without[RGB];
  struct stage s;

  (void)state;
  for (int pools = 1; pools >= 0; pools--) {
    struct err e = {0};
    struct draw *d;

    cudasim_pools(pools);
    stage_open(&s, 0);
    d = start(&s, 1);
    while (!is_done(d))
      must(draw_step(d, &e), &e);
    finish(&s, d, pools ? with : without);
    stage_close(&s);
  }
  cudasim_pools(1);
  assert_memory_equal(without, with, RGB);
}

/* The VAE's configuration says that latents are smaller than they are: the decoder gets numbers around 1e5. */
static void swell(const char *dir)
{
  char path[300], text[4096] = "";
  FILE *f;

  snprintf(path, sizeof path, "%s/vae/config.json", dir);
  f = fopen(path, "r+");
  assert_non_null(f);
  assert_true(fread(text, 1, sizeof text - 1, f) > 2 && text[0] == '{');
  rewind(f);
  fprintf(f, "{\"scaling_factor\": 1e-5, %s", text + 1);
  assert_int_equal(fclose(f), 0);
}

/* A decoder whose numbers end beyond 65504, as that of SDXL's own VAE: bf16 draws it, and fp16 has an error instead of a black picture. */
static void test_beyond_f16(void **state)
{
  static uint8_t rgb[RGB];

  (void)state;
  for (int want_f16 = 0; want_f16 < 2; want_f16++) {
    const struct draw_params p = params(0);
    struct err e = {0};
    struct tiny t;
    struct draw *d;
    int r;

    tiny_open(&t, &be_cuda, &(struct be_config){.want_f16 = want_f16}, "sd15", NULL);
    model_close(t.m);
    swell(t.dir);
    must(model_open(&t.m, &t.be, t.dir, &e), &e);
    must(model_reserve(t.m, SIDE, SIDE, &e), &e);
    must(draw_prepare(&d, t.m, &p, &e), &e);
    must(draw_start(d, model_lane(t.m), model_base(t.m), &e), &e);
    while (!is_done(d))
      must(draw_step(d, &e), &e);
    r = draw_decode(d, model_lane(t.m), rgb, &e);
    assert_int_equal(r, want_f16 ? E_INTERNAL : 0);
    assert_true(!want_f16 || strstr(e.msg, "values of the picture are not finite: the picture is withheld"));
    draw_close(d);
    tiny_close(&t);
  }
}

static int draw_first(void **state)
{
  (void)state;
  tiny_first(first_rgb, first_mask, SIDE);
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_together), cmocka_unit_test(test_request), cmocka_unit_test(test_short_memory),
                                     cmocka_unit_test(test_quiet), cmocka_unit_test(test_without_pools), cmocka_unit_test(test_beyond_f16)};

  return cmocka_run_group_tests_name("draws", tests, draw_first, NULL);
}
