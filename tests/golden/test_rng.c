/*
 * test_rng.c - models/rng.c against torch.Generator("cpu") and torch.randn: tests/golden/rng.safetensors.
 *
 * Run from the root of the repository. Every bit must be equal: words, and normals as torch 2.7.1 makes them on a processor with AVX2.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/rng.h"
#include "models/safetensors.h"

/* The golden's sums of 16384 normals are fp32 in torch's order of adding; that of the absolute values is near 13,000, where fp32 steps by 9.8e-4.
 * Times 4. */
static const double sum_tolerance = 4 * 1.23e-5, sum_abs_tolerance = 4 * 4.71e-4;

static struct safetensors *golden;
static int compared; /* normals, printed at the end */

static const float *values(const char *name, size_t count)
{
  const struct st_tensor *t = st_find(golden, name);
  float *copy;

  if (!t || t->type != ST_F32 || t->bytes != count * 4)
    fail_msg("%s is not in the golden file with %zu values", name, count);
  copy = test_malloc(t->bytes);
  memcpy(copy, t->data, t->bytes);
  return copy;
}

static int is(const float *got, const char *name, size_t count)
{
  const float *want = values(name, count);
  int ok = memcmp(got, want, count * sizeof *got) == 0;

  compared += (int)count;
  test_free((void *)want);
  return ok;
}

static void test_words(void **state)
{
  const struct st_tensor *t = st_find(golden, "raw.seed42.u32");
  struct rng r;
  int64_t want;

  (void)state;
  assert_non_null(t);
  assert_int_equal(t->bytes, 32 * 8);
  rng_seed(&r, 42);
  for (int i = 0; i < 32; i++) {
    memcpy(&want, (const char *)t->data + 8 * i, 8);
    assert_int_equal(rng_u32(&r), want);
  }
  rng_seed(&r, (1ull << 32) + 42); /* torch keeps the low half */
  memcpy(&want, t->data, 8);
  assert_int_equal(rng_u32(&r), want);
}

static const uint64_t seeds[] = {0, 1, 42, 1ull << 31, (1ull << 32) + 42, (1ull << 53) + 1, (1ull << 63) - 1};

static void test_sizes(void **state)
{
  static const size_t sizes[] = {1, 2, 15, 16, 17, 31, 1024};
  float got[1024];
  char name[64];
  struct rng r;

  (void)state;
  for (size_t s = 0; s < sizeof seeds / sizeof *seeds; s++)
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
      snprintf(name, sizeof name, "seed%llu.n%zu", (unsigned long long)seeds[s], sizes[i]);
      rng_seed(&r, seeds[s]);
      rng_randn(&r, got, sizes[i]);
      if (!is(got, name, sizes[i]))
        fail_msg("%s differs", name);
    }
}

/* The noise of a 512x512 picture. */
static void test_large(void **state)
{
  enum { COUNT = 16384 };
  float *got = test_malloc(COUNT * sizeof *got);
  char name[64];
  struct rng r;

  (void)state;
  for (size_t s = 0; s < sizeof seeds / sizeof *seeds; s++) {
    const float *want;
    double sum = 0, sum_abs = 0;
    int ok;

    rng_seed(&r, seeds[s]);
    rng_randn(&r, got, COUNT);
    for (int i = 0; i < COUNT; i++) {
      sum += (double)got[i];
      sum_abs += fabs((double)got[i]);
    }
    snprintf(name, sizeof name, "seed%llu.n16384.head", (unsigned long long)seeds[s]);
    ok = is(got, name, 64);
    snprintf(name, sizeof name, "seed%llu.n16384.tail", (unsigned long long)seeds[s]);
    ok = ok && is(got + COUNT - 32, name, 32);
    snprintf(name, sizeof name, "seed%llu.n16384.sum", (unsigned long long)seeds[s]);
    want = values(name, 1);
    ok = ok && fabs(sum - (double)*want) <= sum_tolerance;
    test_free((void *)want);
    snprintf(name, sizeof name, "seed%llu.n16384.sum_abs", (unsigned long long)seeds[s]);
    want = values(name, 1);
    ok = ok && fabs(sum_abs - (double)*want) <= sum_abs_tolerance;
    test_free((void *)want);
    if (!ok)
      fail_msg("seed %llu differs", (unsigned long long)seeds[s]);
  }
  test_free(got);
}

/* What one call leaves behind for the next: the kept normal, and that a large draw does not touch it. */
static void test_sequence(void **state)
{
  static const size_t counts[] = {3, 4, 16, 1, 20, 2, 1};
  static const uint64_t from[] = {7, (1ull << 40) + 5};
  float got[20];
  char name[64];
  struct rng r;

  (void)state;
  for (int s = 0; s < 2; s++) {
    rng_seed(&r, from[s]);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
      snprintf(name, sizeof name, "sequence%llu.%zu", (unsigned long long)from[s], i);
      rng_randn(&r, got, counts[i]);
      if (!is(got, name, counts[i]))
        fail_msg("%s differs", name);
    }
  }
}

/* Every angle and radius that the way for many values knows is right, wherever it falls between two octants or exponents; and the way for few agrees
 * with the library's log1p, sin and cos in every bit, which are what torch takes there. */
static void test_arithmetic(void **state)
{
  double worst_log = 0, worst_angle = 0;
  int differ = 0;
  struct rng r;

  (void)state;
  for (uint32_t i = 0; i < 1u << 24; i += i < 5000 || i > (1u << 24) - 5000 ? 1 : 13) {
    float u = (float)i * 0x1p-24f, angle = 6.283185307179586f * u, s, c;
    double v = (double)normal_log_f32(1 - u), want = log(1 - (double)u);

    normal_sincos_f32(angle, &s, &c);
    worst_log = fmax(worst_log, fabs(v - want) / (want < 0 ? -want : 1));
    worst_angle = fmax(worst_angle, fmax(fabs((double)s - sin((double)angle)), fabs((double)c - cos((double)angle))));
  }
  print_message("log off by %.3g, sine and cosine by %.3g\n", worst_log, worst_angle);
  assert_true(worst_log <= 4 * 7.87e-8 && worst_angle <= 4 * 7.68e-8);
  rng_seed(&r, 99);
  for (int i = 0; i < 1000000; i++) {
    uint32_t w[4] = {rng_u32(&r), rng_u32(&r), rng_u32(&r), rng_u32(&r)};
    double a, b, radius = sqrt(-2 * log1p(-normal_uniform_f64(w + 2))), theta = 6.283185307179586476925286766559 * normal_uniform_f64(w);

    normal_pair_f64(w, &a, &b);
    differ += (float)a != (float)(radius * cos(theta));
    differ += (float)b != (float)(radius * sin(theta));
  }
  assert_int_equal(differ, 0);
}

/* Planted bugs that the comparison must see. */
static void test_bugs_are_seen(void **state)
{
  float got[32], shifted[16];
  struct rng r;

  (void)state;
  rng_seed(&r, 43); /* another seed */
  rng_randn(&r, got, 16);
  assert_false(is(got, "seed42.n16", 16));
  rng_seed(&r, 42); /* one word too far */
  rng_u32(&r);
  rng_randn(&r, got, 16);
  assert_false(is(got, "seed42.n16", 16));
  rng_seed(&r, 42); /* the last block not drawn anew */
  rng_randn(&r, got, 32);
  assert_false(is(got, "seed42.n17", 17));
  rng_seed(&r, 42); /* a NaN */
  rng_randn(&r, shifted, 16);
  shifted[5] = NAN;
  assert_false(is(shifted, "seed42.n16", 16));
}

static int open_golden(void **state)
{
  struct err e = {0};

  (void)state;
  if (st_open(&golden, "tests/golden/rng.safetensors", &e))
    fprintf(stderr, "%s\n", e.msg);
  return golden ? 0 : -1;
}

static int close_golden(void **state)
{
  (void)state;
  st_close(golden);
  return 0;
}

static int print_count(void **state)
{
  (void)state;
  print_message("%d normals have torch's bits\n", compared);
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_words),
      cmocka_unit_test(test_sizes),
      cmocka_unit_test(test_large),
      cmocka_unit_test_setup_teardown(test_sequence, NULL, print_count),
      cmocka_unit_test(test_arithmetic),
      cmocka_unit_test(test_bugs_are_seen),
  };

  return cmocka_run_group_tests(tests, open_golden, close_golden);
}
