/*
 * test_networks.c - the networks on be_ref against diffusers and transformers: tests/golden/{text,unet,vae}_*.safetensors, and the
 * mistakes that must not pass. Run from the root of the repository.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/golden/networks.h"

/* Measured on be_ref (fp32 activations, double sums) against torch 2.7.1 in fp32, whose own rounding is most of it. */
static const struct expected {
  const char *checkpoint, *what;
  int cases;
  double max, rms;
} expected[] = {
  {"sd15", "text", 18, 6.63e-07, 5.08e-07},
  {"sd15", "unet", 9, 1.48e-06, 1.2e-06},
  {"sd15", "vae", 4, 1.51e-06, 1.54e-06},
  {"sd21", "text", 14, 6.99e-07, 6.52e-07},
  {"sd21", "unet", 9, 1.27e-06, 1.19e-06},
  {"sdxl", "unet", 9, 1.75e-06, 1.65e-06},
  {"sdxl", "vae", 4, 1.44e-06, 1.22e-06},
  {"sdxl_refiner", "unet", 9, 1.67e-06, 1.39e-06},
  {"odd", "unet", 9, 1.23e-06, 1.16e-06},
  {"odd", "vae", 4, 1.1e-06, 9.82e-07},
};
static const struct expected expected_bf16 = {"sd15", "bf16", 3, 1.49e-06, 1.17e-06};

static int passes(const struct expected *x, struct net_error got)
{
  int ok = 1;

  ok = ok && got.max <= 4 * x->max;
  ok = ok && got.rms <= 4 * x->rms;
  return ok;
}

static void expect(const struct expected *x, struct net_error got, int cases)
{
  printf("%-13s %-5s %2d cases: max %.3g, rms %.3g\n", x->checkpoint, x->what, cases, got.max, got.rms);
  assert_int_equal(cases, x->cases);
  if (!passes(x, got))
    fail_msg("%s %s is out of tolerance", x->checkpoint, x->what);
}

static void test_goldens(void **state)
{
  struct nets n;
  size_t i;

  (void)state;
  for (i = 0; i < sizeof expected / sizeof *expected; i++) {
    struct net_error got;
    int cases = 0;

    nets_open(&n, &be_ref, NULL, expected[i].checkpoint, expected[i].what, NULL);
    got = nets_check(&n, expected[i].what, &cases);
    nets_close(&n);
    expect(&expected[i], got, cases);
  }
}

static void test_bf16(void **state)
{
  struct net_error got;
  struct nets n;
  int cases = 0;

  (void)state;
  nets_open_bf16(&n, &be_ref);
  got = nets_check_bf16(&n, &cases);
  nets_close(&n);
  expect(&expected_bf16, got, cases);
}

static const struct expected *find(const char *checkpoint, const char *what)
{
  size_t i;

  for (i = 0; i < sizeof expected / sizeof *expected; i++)
    if (!strcmp(expected[i].checkpoint, checkpoint) && !strcmp(expected[i].what, what))
      return &expected[i];
  fail_msg("no golden for %s %s", checkpoint, what);
  return NULL;
}

static void test_bugs(void **state)
{
  struct nets n;
  int i, missed = 0;

  (void)state;
  for (i = 0; i < network_bug_count; i++) {
    const struct bug *b = &network_bugs[i];
    const struct expected *x = find(b->checkpoint, b->what);
    struct net_error got;
    int cases = 0, noticed;

    nets_open(&n, &be_ref, NULL, b->checkpoint, b->what, b);
    n.enough = 4 * x->max;
    got = nets_check(&n, b->what, &cases);
    nets_close(&n);
    noticed = !passes(x, got);
    printf("%s %s: %s: rms %.3g, %.1f times the tolerance%s\n", b->checkpoint, b->what, b->name, got.rms, got.rms / x->rms / 4,
           noticed ? "" : ": NOT NOTICED");
    missed += !noticed;
  }
  assert_int_equal(missed, 0);
}

/* The tiny checkpoints' activations are so large beside the epsilons that 1e-6 for 1e-5 hides in fp32's rounding: so what reaches
 * the op is checked against what diffusers' constructors say. */
static struct nets *watched;
static int wrong_eps;

static int groupnorm_watched(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                             int groups, float eps, int silu, struct err *e)
{
  double want = watched->has_vae ? 1e-6 : 1e-5;
  int i;

  for (i = 0; watched->g->weight[i] != w;)
    i++;
  if (strstr(watched->g->site[i].name, ".attentions."))
    want = 1e-6;
  wrong_eps += eps != (float)want;
  return be_ref.groupnorm(be, y, x, temb, w, groups, eps, silu, e);
}

static void watch_groupnorm(struct be_ops *ops)
{
  ops->groupnorm = groupnorm_watched;
}

static void test_norm_eps(void **state)
{
  static const struct bug watch = {.ops = watch_groupnorm};
  static const char *const what[] = {"unet", "vae"};
  struct nets n;
  int i, cases = 0;

  (void)state;
  wrong_eps = 0;
  watched = &n;
  for (i = 0; i < 2; i++) {
    nets_open(&n, &be_ref, NULL, "odd", what[i], &watch);
    (void)nets_check(&n, what[i], &cases);
    nets_close(&n);
  }
  assert_int_equal(wrong_eps, 0);
}

static void test_rows(void **state)
{
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  assert_true(nets_rows_independent(&n));
  nets_close(&n);
}

/* An arena one byte short is an error, not an overrun. */
static void test_small_arena(void **state)
{
  struct err e = {0};
  struct arena a;
  struct nets n;
  struct run r;
  int32_t ids[77] = {0};
  struct tensor hidden = {NULL, {1, 1, 77, 0}, DT_F32};
  float *memory;
  size_t need;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "text", NULL);
  hidden.d[3] = n.clip_config.width;
  arena_init(&a, NULL, 0);
  run_init(&r, &n.dry, &a, n.g, &e);
  assert_int_equal(clip_forward(&r, n.clip, ids, 1, hidden, tensor_none()), 0);
  need = a.peak;
  memory = test_malloc(need);
  hidden.p = test_malloc(tensor_bytes(hidden));
  arena_init(&a, memory, need - 1);
  run_init(&r, &n.be, &a, n.g, &e);
  assert_int_equal(clip_forward(&r, n.clip, ids, 1, hidden, tensor_none()), E_NOMEM);
  assert_int_equal(e.code, E_NOMEM);
  e = (struct err){0};
  ids[5] = n.clip_config.vocab;
  arena_init(&a, memory, need);
  run_init(&r, &n.be, &a, n.g, &e);
  assert_int_equal(clip_forward(&r, n.clip, ids, 1, hidden, tensor_none()), E_ARG);
  test_free(memory);
  test_free(hidden.p);
  nets_close(&n);
}

/* The Nth linear of a pass, or the Nth parameter of a network, fails: the cause comes back, once, and nothing leaks. */
static int until_failure;

static int linear_failing(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                          struct err *e)
{
  if (!until_failure--)
    return err_set(e, E_DEVICE, "planted");
  assert_true(until_failure >= 0); /* nothing runs after the first failure */
  return be_ref.linear(be, y, x, w, residual, e);
}

static int weight_load_failing(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  if (!until_failure--)
    return err_set(e, E_NOMEM, "planted");
  return be_ref.weight_load(be, d, like, w, e);
}

static void test_op_fails(void **state)
{
  static const int nth[] = {0, 3, 10};
  struct err e;
  struct nets n;
  size_t i;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "text", NULL);
  for (i = 0; i < sizeof nth / sizeof *nth; i++) {
    struct tensor hidden = {NULL, {1, 1, 77, n.clip_config.width}, DT_F32};
    int32_t ids[77] = {0};
    struct arena a;
    struct run r;

    e = (struct err){0};
    hidden.p = test_malloc(tensor_bytes(hidden));
    arena_init(&a, NULL, 0);
    run_init(&r, &n.dry, &a, n.g, &e);
    assert_int_equal(clip_forward(&r, n.clip, ids, 1, hidden, tensor_none()), 0);
    arena_init(&a, test_malloc(a.peak), a.peak);
    n.ops.linear = linear_failing;
    until_failure = nth[i];
    run_init(&r, &n.be, &a, n.g, &e);
    assert_int_equal(clip_forward(&r, n.clip, ids, 1, hidden, tensor_none()), E_DEVICE);
    assert_string_equal(e.msg, "planted");
    assert_true(a.top == 0);
    test_free(a.base);
    test_free(hidden.p);
  }
  nets_close(&n);
}

static void test_weight_fails(void **state)
{
  static const int nth[] = {0, 1, 100, 200};
  struct nets n;
  size_t i;

  (void)state;
  nets_open(&n, &be_ref, NULL, "odd", "unet", NULL);
  n.ops.weight_load = weight_load_failing;
  for (i = 0; i < sizeof nth / sizeof *nth && nth[i] < n.g->n; i++) {
    until_failure = nth[i];
    nets_expect_failure(&n, E_NOMEM, n.g->site[nth[i]].name);
  }
  assert_true(i >= 3);
  nets_close(&n);
}

/* A tensor that the configuration needs and the file lacks, or has in another shape, is named. */
static void test_missing_tensor(void **state)
{
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "odd", "unet", NULL);
  n.unet_config.layers[1] = 2;
  nets_expect_failure(&n, E_FILE, "down_blocks.1.resnets.1.norm1.weight");
  n.unet_config.layers[1] = 1;
  n.unet_config.channels[0] = 16;
  nets_expect_failure(&n, E_FILE, "conv_in.weight");
  nets_close(&n);
}

static int cleanup(void **state)
{
  (void)state;
  nets_cleanup();
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_goldens), cmocka_unit_test(test_bf16),
                                     cmocka_unit_test(test_bugs), cmocka_unit_test(test_norm_eps),
                                     cmocka_unit_test(test_rows), cmocka_unit_test(test_op_fails),
                                     cmocka_unit_test(test_weight_fails), cmocka_unit_test(test_small_arena),
                                     cmocka_unit_test(test_missing_tensor)};

  return cmocka_run_group_tests(tests, NULL, cleanup);
}
