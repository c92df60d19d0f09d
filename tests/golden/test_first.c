/*
 * test_first.c - pictures that start from another one against diffusers' Img2Img and Inpaint pipelines (first.safetensors). Run from the root of
 * the repository.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/golden/tiny.h"

enum { WIDTH = 48, HEIGHT = 64, BYTES = WIDTH * HEIGHT * 3, STEPS = 5, LATENT = 4 * (WIDTH / 8) * (HEIGHT / 8) };

/* How far latents may be off as a share of the golden's largest value: before the first step and after the last; and what the picture must
 * reach, dB. 4 times what was measured: be_ref 7.2e-7, 1.7e-6 and 84.8 dB, be_cpu in bf16 0.0021, 0.025 and 44.0 dB; 12 dB below. */
struct bound {
  double first, last, psnr;
};

static const struct bound ref_bound = {4 * 7.2e-7, 4 * 1.7e-6, 72}, cpu_bound = {4 * 0.0021, 4 * 0.025, 32};

static const struct {
  const char *name, *sampler;
  float strength;
  int has_mask;
} cases[] = {{"ddim", "ddim", 0.6f, 0},          {"euler", "euler", 0.7f, 0},
             {"euler_karras", "euler_karras", 0.6f, 0}, {"euler_a", "euler_a", 0.8f, 0},
             {"dpmpp_2m", "dpmpp_2m", 0.6f, 0},  {"full", "dpmpp_2m_karras", 1, 0},
             {"mask_ddim", "ddim", 0.6f, 1},     {"mask_euler_a", "euler_a", 0.8f, 1},
             {"mask_dpmpp_2m", "dpmpp_2m", 0.8f, 1}, {"mask_full", "euler", 1, 1}};
enum { CASES = sizeof cases / sizeof *cases };

static const struct be_config any = {0};

static struct draw_params params(const struct tiny *t, int i)
{
  struct draw_params p = {.prompt = "a red car and a sunflower on a blue background", .negative = "blurry, low quality", .steps = STEPS,
                          .guidance = 3, .seed = 1234, .width = WIDTH, .height = HEIGHT, .strength = cases[i].strength};

  p.prompt_len = strlen(p.prompt);
  p.negative_len = strlen(p.negative);
  golden_sampler(&p, cases[i].sampler);
  p.init_rgb = st_find(t->st, "first")->data;
  p.mask = cases[i].has_mask ? st_find(t->st, "mask")->data : NULL;
  return p;
}

struct got {
  int steps;
  float first[LATENT], last[LATENT];
  uint8_t rgb[BYTES];
};

static void draw(struct model *m, const struct draw_params *p, struct got *g)
{
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, m, p, &e), &e);
  must(draw_start(d, model_lane(m), model_base(m), &e), &e);
  g->steps = draw_step_count(d);
  must(draw_latents(d, g->first, &e), &e);
  while (draw_step_index(d) < draw_step_count(d))
    must(draw_step(d, &e), &e);
  must(draw_latents(d, g->last, &e), &e);
  must(draw_decode(d, model_lane(m), g->rgb, &e), &e);
  draw_close(d);
}

static double off(const float *got, const float *want)
{
  double most = 0, worst = 0;

  for (int i = 0; i < LATENT; i++) {
    double diff = fabs((double)got[i] - (double)want[i]);

    most = fmax(most, fabs((double)want[i]));
    worst = diff <= worst ? worst : diff; /* a NaN stays */
  }
  return worst / most;
}

/* The golden's picture is the decoder's; where the mask keeps, the first picture lies over it. */
static void paste(uint8_t *rgb, const uint8_t *golden, const struct draw_params *p)
{
  for (int i = 0; i < BYTES; i++) {
    double anew = p->mask ? p->mask[i / 3] / 255.0 : 1;

    rgb[i] = (uint8_t)floor(golden[i] * anew + p->init_rgb[i] * (1 - anew) + 0.5);
  }
}

/* Draws p and holds it against golden i. Returns whether it is the same picture. */
static int fits(const struct tiny *t, const struct draw_params *p, int i, const struct bound *b, const char *label)
{
  const struct st_tensor *x = golden_tensor(t->st, cases[i].name, "x");
  const float *path = x->data;
  struct draw_params asked = params(t, i);
  static uint8_t want[BYTES];
  static struct got g;
  double first, last, psnr;

  draw(t->m, p, &g);
  paste(want, golden_tensor(t->st, cases[i].name, "image")->data, &asked);
  first = off(g.first, path);
  last = off(g.last, path + (x->shape[0] - 1) * LATENT);
  psnr = golden_psnr(g.rgb, want, BYTES);
  printf("  %-28s %d steps, latents off by %.3g and %.3g, %.1f dB\n", label, g.steps, first, last, psnr);
  return g.steps == x->shape[0] - 1 && first <= b->first && last <= b->last && psnr >= b->psnr;
}

static void check(const struct be_ops *ops, const struct bound *b)
{
  struct tiny t;

  tiny_open(&t, ops, &any, "sd15", "first.safetensors");
  assert_true(model_info(t.m)->has_encoder);
  for (int i = 0; i < CASES; i++) {
    struct draw_params p = params(&t, i);

    if (!fits(&t, &p, i, b, cases[i].name))
      fail_msg("%s is another picture", cases[i].name);
  }
  tiny_close(&t);
}

static void test_ref(void **state)
{
  (void)state;
  check(&be_ref, &ref_bound);
}

static void test_cpu(void **state)
{
  (void)state;
  check(&be_cpu, &cpu_bound);
}

/* Each differs from the golden in one thing that can be got wrong. */
static void test_bugs_are_seen(void **state)
{
  static const struct {
    const char *what;
    int golden;
  } bug[] = {{"a step too few", 0},           {"the next seed", 0},       {"the picture a pixel off", 0}, {"noise alone", 5},
             {"the mask dropped", 6},         {"the mask a latent off", 6}, {"the mask upside down", 8},  {"euler for euler_a", 7},
             {"noise of strength 1 as 0.99", 9}};
  static uint8_t shifted[BYTES], mask[BYTES];
  struct tiny t;

  (void)state;
  tiny_open(&t, &be_ref, &any, "sd15", "first.safetensors");
  for (int k = 0; k < (int)(sizeof bug / sizeof *bug); k++) {
    struct draw_params p = params(&t, bug[k].golden);

    memcpy(shifted, p.init_rgb + 3, BYTES - 3);
    for (int i = 0; p.mask && i < WIDTH * HEIGHT; i++)
      mask[i] = p.mask[k == 5 ? (i + 8) % (WIDTH * HEIGHT) : WIDTH * HEIGHT - 1 - i];
    switch (k) {
    case 0: p.strength = 0.4f; break;
    case 1: p.seed++; break;
    case 2: p.init_rgb = shifted; break;
    case 3: p.init_rgb = NULL; break;
    case 4: p.mask = NULL; break;
    case 5:
    case 6: p.mask = mask; break;
    case 7: p.sampler = SAMPLER_EULER; break;
    default: p.strength = 0.99f; p.steps = 6; break; /* five steps are done */
    }
    if (fits(&t, &p, bug[k].golden, &ref_bound, bug[k].what))
      fail_msg("a planted bug was not seen: %s", bug[k].what);
  }
  tiny_close(&t);
}

/* Pixels at 0 come back as they went in, on any backend; at 255 they are the decoder's. With leaves_pixels all of them are: the latents are the same. */
static void test_kept_pixels(void **state)
{
  static struct got g, whole, left;
  struct draw_params p;
  struct tiny t;
  int differ = 0, decoded = 0;

  (void)state;
  tiny_open(&t, &be_cpu, &any, "sd15", "first.safetensors");
  p = params(&t, 6);
  draw(t.m, &p, &g);
  for (int i = 0; i < BYTES; i++) {
    if (p.mask[i / 3] == 0)
      assert_int_equal(g.rgb[i], p.init_rgb[i]);
    differ += p.mask[i / 3] == 255 && abs(g.rgb[i] - p.init_rgb[i]) > 8;
  }
  assert_true(differ > 100);
  p.leaves_pixels = 1;
  draw(t.m, &p, &left);
  for (int i = 0; i < BYTES; i++) {
    if (p.mask[i / 3] == 255)
      assert_int_equal(left.rgb[i], g.rgb[i]);
    decoded += p.mask[i / 3] == 0 && left.rgb[i] != p.init_rgb[i];
  }
  assert_true(decoded > 100);
  p.leaves_pixels = 0;
  p.mask = NULL;
  draw(t.m, &p, &whole);
  assert_memory_not_equal(whole.rgb, g.rgb, BYTES);
  tiny_close(&t);
}

/* What Python's int(steps * strength) is, where a float would round the other way. */
static void test_strength(void **state)
{
  static const struct {
    int steps;
    float strength;
    int todo;
  } want[] = {{10, 0.7f, 7}, {20, 0.35f, 7}, {30, 0.1f, 3}, {100, 0.29f, 28}, {50, 0.3f, 15}, {20, 0.55f, 11}, {5, 1, 5}, {7, 0.999f, 6}};
  static const struct {
    float strength;
    int steps, has_rgb;
    const char *field;
  } bad[] = {{0, 5, 1, "strength"}, {-1, 5, 1, "strength"}, {1.01f, 5, 1, "strength"}, {NAN, 5, 1, "strength"}, {0.1f, 5, 1, "strength"},
             {0.5f, 5, 0, "mask"}};
  struct err e = {0};
  struct draw *d;
  struct tiny t;

  (void)state;
  tiny_open(&t, &be_cpu, &any, "sd15", "first.safetensors");
  for (int i = 0; i < (int)(sizeof want / sizeof *want); i++) {
    struct draw_params p = params(&t, 0);

    p.steps = want[i].steps;
    p.strength = want[i].strength;
    must(draw_prepare(&d, t.m, &p, &e), &e);
    assert_int_equal(draw_step_count(d), want[i].todo);
    draw_close(d);
  }
  for (int i = 0; i < (int)(sizeof bad / sizeof *bad); i++) {
    struct draw_params p = params(&t, 6);

    p.steps = bad[i].steps;
    p.strength = bad[i].strength;
    p.init_rgb = bad[i].has_rgb ? p.init_rgb : NULL;
    e = (struct err){0};
    assert_int_equal(draw_prepare(&d, t.m, &p, &e), E_ARG);
    assert_null(d);
    assert_string_equal(e.field, bad[i].field);
  }
  tiny_close(&t);
}

int main(int argc, char **argv)
{
  static const struct CMUnitTest tests[] = {cmocka_unit_test(test_ref), cmocka_unit_test(test_cpu), cmocka_unit_test(test_bugs_are_seen),
                                            cmocka_unit_test(test_kept_pixels), cmocka_unit_test(test_strength)};

  if (argc > 1)
    cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("first", tests, NULL, NULL);
}
