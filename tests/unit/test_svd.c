/*
 * test_svd.c - models/svd.c: what comes out is orthonormal, falls, and multiplies to what went in; known spectra are found; and the three
 * ways agree.
 *
 * Matrices with a known spectrum are made of reflections: A = H1 H2 diag(s) H3 H4, with H = 1 - 2 x x^T / |x|^2 for random x.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/rng.h"
#include "models/svd.h"

static double *random_matrix(int64_t m, int64_t n, uint64_t seed)
{
  double *a = test_malloc((size_t)(m * n) * sizeof *a);
  struct rng r;

  rng_seed(&r, seed);
  for (int64_t i = 0; i < m * n; i++)
    a[i] = (double)rng_u32(&r) * 0x1p-31 - 1;
  return a;
}

/* a (m, n) reflected in a random direction, from the left (of its columns) or the right. */
static void reflect(double *a, int64_t m, int64_t n, int is_left, uint64_t seed)
{
  int64_t len = is_left ? m : n, other = is_left ? n : m;
  double *x = random_matrix(1, len, seed), norm = 0;

  for (int64_t i = 0; i < len; i++)
    norm += x[i] * x[i];
  for (int64_t k = 0; k < other; k++) {
    double g = 0;

    for (int64_t i = 0; i < len; i++)
      g += x[i] * a[is_left ? i * n + k : k * n + i];
    for (int64_t i = 0; i < len; i++)
      a[is_left ? i * n + k : k * n + i] -= 2 * g / norm * x[i];
  }
  test_free(x);
}

static double *with_spectrum(int64_t m, int64_t n, const double *s, int64_t count)
{
  double *a = test_calloc((size_t)(m * n), sizeof *a);

  for (int64_t i = 0; i < count; i++)
    a[i * n + i] = s[i];
  reflect(a, m, n, 1, 11);
  reflect(a, m, n, 1, 12);
  reflect(a, m, n, 0, 13);
  reflect(a, m, n, 0, 14);
  return a;
}

/* Largest | <row i, row k> - (i == k) |; rows whose s is 0 must be 0. */
static double off_orthonormal(const double *w, const double *s, int64_t k, int64_t len)
{
  double worst = 0;

  for (int64_t i = 0; i < k; i++)
    for (int64_t j = 0; j < k; j++) {
      double g = 0, want = i == j && s[i] > 0;

      for (int64_t c = 0; c < len; c++)
        g += w[i * len + c] * w[j * len + c];
      worst = fmax(worst, fabs(g - want));
    }
  return worst;
}

/* |a - sum s u v^T|_F / |a|_F */
static double rest(const struct svd *x, const double *a)
{
  double sum = 0, all = 0;

  for (int64_t i = 0; i < x->m; i++)
    for (int64_t c = 0; c < x->n; c++) {
      double g = a[i * x->n + c];

      all += g * g;
      for (int64_t k = 0; k < x->r; k++)
        g -= x->s[k] * x->u[k * x->m + i] * x->v[k * x->n + c];
      sum += g * g;
    }
  return all > 0 ? sqrt(sum / all) : sqrt(sum);
}

static void expect_sound(const struct svd *x)
{
  assert_true(off_orthonormal(x->u, x->s, x->r, x->m) <= 1e-12); /* 3e-15 to 3e-13 measured over all cases here */
  assert_true(off_orthonormal(x->v, x->s, x->r, x->n) <= 1e-12);
  for (int64_t k = 0; k < x->r; k++) {
    double largest = 0;

    assert_true(x->s[k] >= 0 && (!k || x->s[k] <= x->s[k - 1]));
    for (int64_t i = 0; i < x->m; i++)
      if (fabs(x->u[k * x->m + i]) > fabs(largest))
        largest = x->u[k * x->m + i];
    assert_true(x->s[k] > 0 ? largest > 0 : largest == 0);
  }
}

static void test_dense(void **state)
{
  static const int64_t shape[][2] = {{1, 1}, {1, 5}, {5, 1}, {2, 2}, {7, 5}, {5, 7}, {64, 96}, {130, 40}};
  struct err e = {0};
  struct svd x;

  (void)state;
  for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
    double *a = random_matrix(shape[i][0], shape[i][1], i + 1);

    assert_int_equal(svd_dense(&x, a, shape[i][0], shape[i][1], 1000, &e), 0);
    assert_int_equal(x.r, shape[i][0] < shape[i][1] ? shape[i][0] : shape[i][1]);
    expect_sound(&x);
    assert_true(rest(&x, a) <= 4e-14); /* 5e-16 to 6e-15 */
    svd_free(&x);
    test_free(a);
  }
}

/* By hand: [[3, 0], [4, 5]] has s = sqrt(45), sqrt(5), u1 = (1, 3) / sqrt(10), v1 = (1, 1) / sqrt(2). */
static void test_by_hand(void **state)
{
  static const double a[] = {3, 0, 4, 5};
  struct err e = {0};
  struct svd x;

  (void)state;
  assert_int_equal(svd_dense(&x, a, 2, 2, 2, &e), 0);
  assert_true(fabs(x.s[0] - sqrt(45)) <= 1e-14 && fabs(x.s[1] - sqrt(5)) <= 1e-14);
  assert_true(fabs(x.u[0] - 1 / sqrt(10)) <= 1e-14 && fabs(x.u[1] - 3 / sqrt(10)) <= 1e-14);
  assert_true(fabs(x.v[0] - 1 / sqrt(2)) <= 1e-14 && fabs(x.v[1] - 1 / sqrt(2)) <= 1e-14);
  assert_true(fabs(svd_energy(&x, 1) - 45) <= 1e-12 && fabs(svd_energy(&x, 9) - 50) <= 1e-12);
  svd_free(&x);
}

static void test_known_spectrum(void **state)
{
  static const double s[] = {100, 99.999, 10, 1, 1, 0.01};
  struct err e = {0};
  double *a = with_spectrum(40, 30, s, 6);
  struct svd x;

  (void)state;
  assert_int_equal(svd_dense(&x, a, 40, 30, 10, &e), 0);
  expect_sound(&x);
  for (int i = 0; i < 6; i++)
    assert_true(fabs(x.s[i] - s[i]) <= 1e-12); /* 6e-14 */
  for (int i = 6; i < 10; i++)
    assert_true(x.s[i] <= 1e-12);
  svd_free(&x);
  /* cut at 2, what is left out is the rest of the spectrum */
  assert_int_equal(svd_dense(&x, a, 40, 30, 2, &e), 0);
  assert_true(fabs(rest(&x, a) - sqrt((100 + 1 + 1 + 1e-4) / (1e4 + 99.999 * 99.999 + 100 + 1 + 1 + 1e-4))) <= 1e-12);
  svd_free(&x);
  test_free(a);
}

/* The way for large matrices: exact where the rank is small, near the best where the spectrum falls slowly. */
static void test_large(void **state)
{
  const int64_t m = 400, n = 300;
  struct err e = {0};
  struct svd x;
  double s[300], all = 0, best = 0, *a;

  (void)state;
  for (int i = 0; i < 300; i++)
    s[i] = i < 8 ? 8 - i : 0;
  a = with_spectrum(m, n, s, 300);
  assert_int_equal(svd_dense(&x, a, m, n, 8, &e), 0);
  expect_sound(&x);
  assert_true(rest(&x, a) <= 1e-12); /* 2e-14 */
  svd_free(&x);
  test_free(a);

  for (int i = 0; i < 300; i++) {
    s[i] = 1 / sqrt(1 + i);
    all += s[i] * s[i];
    best += i < 8 ? s[i] * s[i] : 0;
  }
  a = with_spectrum(m, n, s, 300);
  assert_int_equal(svd_dense(&x, a, m, n, 8, &e), 0);
  expect_sound(&x);
  assert_true(fabs(svd_energy(&x, 8) - best) <= 1e-4 * all); /* 2e-9 */
  assert_true(fabs(rest(&x, a) - sqrt(1 - best / all)) <= 1e-4);
  svd_free(&x);
  test_free(a);
}

static void test_product(void **state)
{
  static const int64_t shape[][3] = {{20, 3, 30}, {30, 3, 20}, {6, 6, 9}, {5, 8, 4}, {1, 1, 1}, {300, 12, 280}};
  struct err e = {0};
  struct svd x, y;

  (void)state;
  for (size_t i = 0; i < sizeof shape / sizeof *shape; i++) {
    int64_t m = shape[i][0], R = shape[i][1], n = shape[i][2];
    double *up = random_matrix(m, R, 5), *down = random_matrix(R, n, 6), *a = test_calloc((size_t)(m * n), sizeof *a);

    for (int64_t r = 0; r < m; r++)
      for (int64_t k = 0; k < R; k++)
        for (int64_t c = 0; c < n; c++)
          a[r * n + c] += up[r * R + k] * down[k * n + c];
    assert_int_equal(svd_product(&x, up, down, m, R, n, R, &e), 0);
    assert_int_equal(svd_dense(&y, a, m, n, R, &e), 0);
    expect_sound(&x);
    assert_int_equal(x.m, m);
    assert_int_equal(x.n, n);
    assert_true(rest(&x, a) <= 1e-13); /* 3e-15 */
    assert_int_equal(x.r, y.r);
    for (int64_t k = 0; k < x.r; k++)
      assert_true(fabs(x.s[k] - y.s[k]) <= 1e-12 * y.s[0]);
    svd_free(&x);
    svd_free(&y);
    test_free(up);
    test_free(down);
    test_free(a);
  }
}

/* Equal rows, dependent factors and nothing at all. */
static void test_deficient(void **state)
{
  double a[12] = {1, 2, 3, 1, 2, 3, 2, 4, 6, 0, 0, 0}, up[8] = {1, 1, 2, 2, 3, 3, 4, 4}, down[6] = {1, 0, 1, 1, 0, 1}, zero[12] = {0};
  struct err e = {0};
  struct svd x;

  (void)state;
  assert_int_equal(svd_dense(&x, a, 4, 3, 3, &e), 0);
  expect_sound(&x);
  assert_true(fabs(x.s[0] - sqrt(84)) <= 1e-13 && x.s[1] == 0 && x.s[2] == 0);
  assert_true(rest(&x, a) <= 1e-14);
  svd_free(&x);
  assert_int_equal(svd_product(&x, up, down, 4, 2, 3, 2, &e), 0); /* (1 2 3 4)^T (2 0 2) */
  expect_sound(&x);
  assert_true(fabs(x.s[0] - sqrt(30 * 8)) <= 1e-13 && x.s[1] <= 1e-13);
  svd_free(&x);
  assert_int_equal(svd_dense(&x, zero, 3, 4, 2, &e), 0);
  expect_sound(&x);
  assert_true(x.s[0] == 0 && svd_energy(&x, 2) == 0);
  svd_free(&x);
}

static void test_factors(void **state)
{
  static const double s[] = {9, 4, 1};
  struct err e = {0};
  double *a = with_spectrum(12, 10, s, 3), worst = 0;
  float up[12 * 3], down[3 * 10];
  struct svd x;

  (void)state;
  assert_int_equal(svd_dense(&x, a, 12, 10, 5, &e), 0);
  svd_factors(&x, 3, up, down);
  for (int i = 0; i < 12; i++)
    for (int c = 0; c < 10; c++) {
      double g = 0;

      for (int k = 0; k < 3; k++)
        g += (double)up[i * 3 + k] * (double)down[k * 10 + c];
      worst = fmax(worst, fabs(g - a[i * 10 + c]));
    }
  assert_true(worst <= 2e-6); /* 4e-7 */
  svd_free(&x);
  test_free(a);
}

static void test_refuses_nan(void **state)
{
  double a[4] = {1, NAN, 0, 1};
  struct err e = {0};
  struct svd x;

  (void)state;
  assert_int_equal(svd_dense(&x, a, 2, 2, 2, &e), E_INTERNAL);
  assert_null(x.u);
  memset(&e, 0, sizeof e);
  a[1] = INFINITY;
  assert_int_equal(svd_product(&x, a, a, 2, 2, 2, 2, &e), E_INTERNAL);
  assert_null(x.u);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_dense),
    cmocka_unit_test(test_by_hand),
    cmocka_unit_test(test_known_spectrum),
    cmocka_unit_test(test_large),
    cmocka_unit_test(test_product),
    cmocka_unit_test(test_deficient),
    cmocka_unit_test(test_factors),
    cmocka_unit_test(test_refuses_nan),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
