/*
 * test_networks_cpu.c - the networks on be_cpu against the same goldens as test_networks.c: in fp32, and in bf16 where the machine
 * has it. Run from the root of the repository.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "tests/golden/networks.h"

/* Measured with oneDNN 2.6.3, one thread, on a Xeon with AMX. bf16 keeps 8 bits of every activation, and the tiny checkpoints have
 * random weights, which average nothing out: their 2 percent say nothing about a trained network. */
static const struct expected {
  const char *checkpoint, *what;
  struct net_error f32, bf16;
} expected[] = {
  {"sd15", "text", {5.77e-07, 4.95e-07}, {0.013, 0.00901}},  {"sd15", "unet", {2.11e-06, 2.07e-06}, {0.0213, 0.0182}},
  {"sd15", "vae", {2.18e-06, 2.55e-06}, {0.0192, 0.0177}},   {"sd21", "text", {7.68e-07, 5.75e-07}, {0.0119, 0.0109}},
  {"sd21", "unet", {1.95e-06, 1.85e-06}, {0.0187, 0.0175}},  {"sdxl", "unet", {3.45e-06, 2.4e-06}, {0.0305, 0.024}},
  {"sdxl", "vae", {2.26e-06, 2.07e-06}, {0.0174, 0.0158}},   {"sdxl_refiner", "unet", {2.35e-06, 2.07e-06}, {0.0206, 0.0168}},
  {"odd", "unet", {1.91e-06, 1.72e-06}, {0.019, 0.016}},     {"odd", "vae", {1.16e-06, 1.17e-06}, {0.0137, 0.0131}},
};

static void check(int force_f32)
{
  const struct be_config cfg = {.threads = 1, .force_f32 = force_f32};
  size_t i;

  for (i = 0; i < sizeof expected / sizeof *expected; i++) {
    const struct expected *x = &expected[i];
    struct net_error got, limit;
    struct nets n;
    int cases = 0, ok = 1;

    nets_open(&n, &be_cpu, &cfg, x->checkpoint, x->what, NULL);
    if (!i)
      printf("%s\n", n.be.info);
    limit = n.be.act == DT_BF16 ? x->bf16 : x->f32;
    got = nets_check(&n, x->what, &cases);
    nets_close(&n);
    printf("%-13s %-5s %2d cases: max %.3g, rms %.3g\n", x->checkpoint, x->what, cases, got.max, got.rms);
    ok = ok && got.max <= 4 * limit.max;
    ok = ok && got.rms <= 4 * limit.rms;
    if (!ok)
      fail_msg("%s %s is out of tolerance", x->checkpoint, x->what);
  }
}

static void test_f32(void **state)
{
  (void)state;
  check(1);
}

static void test_best(void **state)
{
  (void)state;
  check(0);
}

static int cleanup(void **state)
{
  (void)state;
  nets_cleanup();
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_f32), cmocka_unit_test(test_best)};

  return cmocka_run_group_tests(tests, NULL, cleanup);
}
