/*
 * test_merge.c - models/merge.c, merge_co.c, merge_stats.c: each method against examples worked out by hand, what must hold for any
 * experts, and a calibration on the bundled model whose votes are counted.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/adapter_write.h"
#include "models/merge.h"
#include "models/merge_stats.h"
#include "models/model.h"
#include "models/rng.h"

/* ---- a table of two sites, and experts on it ---- */

static struct site table[] = {
    {.name = (char *)"unet.a.attn1.to_q", .kind = WEIGHT_LINEAR, .out = 2, .in = 2},
    {.name = (char *)"unet.b.attn1.to_q", .kind = WEIGHT_LINEAR, .out = 3, .in = 4},
    {.name = (char *)"unet.c.conv", .kind = WEIGHT_CONV, .out = 2, .in = 1, .kh = 3, .kw = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1},
};
static struct generation base = {.site = table, .n = 3};

static int64_t columns(int site)
{
  return table[site].in * (table[site].kind == WEIGHT_CONV ? 9 : 1);
}

/* An expert whose dW at site 0 is w (2, 2): up is w, down the unit matrix. */
static struct adapter *plain(const char *name, const float w[4], float scale)
{
  struct adapter *a = adapter_new_lowrank(name, 1);
  struct err e = {0};

  assert_non_null(a);
  assert_int_equal(adapter_set_lowrank(a, 0, &base, 0, 2, &e), 0);
  memcpy(a->delta[0].up, w, 4 * sizeof *w);
  a->delta[0].down[0] = a->delta[0].down[3] = 1;
  a->delta[0].scale = scale;
  assert_int_equal(adapter_finish(a, &base, &e), 0);
  return a;
}

/* Random factors at `sites` sites from the first on. */
static struct adapter *random_expert(const char *name, int sites, int64_t rank, uint64_t seed)
{
  struct adapter *a = adapter_new_lowrank(name, sites);
  struct err e = {0};
  struct rng r;

  rng_seed(&r, seed);
  for (int i = 0; i < sites; i++) {
    assert_int_equal(adapter_set_lowrank(a, i, &base, i, rank, &e), 0);
    rng_randn(&r, a->delta[i].down, (size_t)(rank * columns(i)));
    rng_randn(&r, a->delta[i].up, (size_t)(rank * table[i].out));
    a->delta[i].scale = 0.5f;
  }
  assert_int_equal(adapter_finish(a, &base, &e), 0);
  return a;
}

/* dW at a site, dense; NULL a or no delta there: 0. */
static void dense(double *w, const struct adapter *a, int site, double f)
{
  const struct delta *d = adapter_at(a, site);

  for (int64_t i = 0; d && i < table[site].out; i++)
    for (int64_t c = 0; c < columns(site); c++)
      for (int64_t k = 0; k < d->rank; k++)
        w[i * columns(site) + c] += f * (double)d->scale * (double)d->up[i * d->rank + k] * (double)d->down[k * columns(site) + c];
}

/* Largest difference of the merged dW from want (2, 2) at site 0. */
static double off(const struct adapter *a, const double want[4])
{
  double w[4] = {0}, worst = 0;

  dense(w, a, 0, 1);
  for (int i = 0; i < 4; i++)
    worst = fmax(worst, fabs(w[i] - want[i]));
  return worst;
}

static struct adapter *must_merge(const struct merge_expert *x, int n, struct merge_options o, const struct merge_counts *c,
                                  struct merge_report *report)
{
  struct adapter *a = NULL;
  struct err e = {0};

  o.keep = o.keep > 0 ? o.keep : 1;
  o.scale = o.scale != 0 ? o.scale : 1;
  if (merge_run(&a, &base, x, n, &o, c, report, &e))
    fail_msg("%s", e.msg);
  return a;
}

/* ---- sums ---- */

static void test_concat_is_exact(void **state)
{
  struct adapter *e1 = random_expert("one", 3, 2, 1), *e2 = random_expert("two", 2, 3, 2), *m;
  const struct merge_expert x[] = {{e1, 0.7f}, {e2, -1.25f}};
  struct merge_report report;

  (void)state;
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CONCAT, .scale = 2}, NULL, &report);
  assert_int_equal(m->n, 3); /* the union of both */
  assert_int_equal(m->delta[0].rank, 5);
  assert_int_equal(m->delta[2].rank, 2);
  assert_true(report.energy == 1);
  for (int site = 0; site < 3; site++) {
    double got[18] = {0}, want[18] = {0}, worst = 0;

    dense(got, m, site, 1);
    dense(want, e1, site, 2 * (double)0.7f);
    dense(want, e2, site, 2 * -1.25);
    for (int i = 0; i < 18; i++)
      worst = fmax(worst, fabs(got[i] - want[i]));
    assert_true(worst <= 2e-6); /* 4e-7: up is rounded once */
  }
  adapter_close(m);
  adapter_close(e1);
  adapter_close(e2);
}

static void test_mean_of_equals(void **state)
{
  struct adapter *e1 = random_expert("one", 3, 1, 3), *m;
  const struct merge_expert x[] = {{e1, 1}, {e1, 1}, {e1, 1}};
  static const enum merge_method method[] = {MERGE_MEAN, MERGE_TIES};
  struct merge_report report;

  (void)state;
  for (size_t k = 0; k < sizeof method / sizeof *method; k++) {
    m = must_merge(x, 3, (struct merge_options){.method = method[k]}, NULL, &report);
    assert_true(fabs(report.energy - 1) <= 1e-12);
    for (int site = 0; site < 3; site++) {
      double got[18] = {0}, want[18] = {0}, worst = 0;

      assert_int_equal(m->delta[site].rank, 1);
      dense(got, m, site, 1);
      dense(want, e1, site, 1);
      for (int i = 0; i < 18; i++)
        worst = fmax(worst, fabs(got[i] - want[i]));
      assert_true(worst <= 2e-6); /* 3e-7 */
    }
    adapter_close(m);
  }
  adapter_close(e1);
}

/* The sum is [[3, 0], [4, 5]], whose best rank 1 is 1.5 [[1, 1], [3, 3]] and holds 45 of 50. */
static void test_weighted_cuts(void **state)
{
  struct adapter *e1 = plain("one", (float[]){1, 0, 2, 0}, 1), *e2 = plain("two", (float[]){4, 0, 4, 10}, 0.5f), *m;
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  struct merge_report report;

  (void)state;
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_WEIGHTED, .rank = 1}, NULL, &report);
  assert_true(off(m, (double[]){1.5, 1.5, 4.5, 4.5}) <= 2e-6); /* 5e-7 */
  assert_true(fabs(report.energy - 0.9) <= 1e-12 && fabs(report.worst - 0.9) <= 1e-12);
  assert_string_equal(report.worst_site, "unet.a.attn1.to_q");
  adapter_close(m);
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_MEAN}, NULL, &report);
  assert_true(off(m, (double[]){1.5, 0, 2, 2.5}) <= 2e-6);
  adapter_close(m);
  adapter_close(e1);
  adapter_close(e2);
}

/* [[4, -1], [2, 0]] and [[2, 3], [-2, 1]]: the sums elect + + 0 +; where the experts cancel out nothing is left. */
static void test_ties_by_hand(void **state)
{
  struct adapter *e1 = plain("one", (float[]){4, -1, 2, 0}, 1), *e2 = plain("two", (float[]){4, 6, -4, 2}, 0.5f), *m;
  struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  struct merge_report report;

  (void)state;
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_TIES, .keep = 1}, NULL, &report);
  assert_true(off(m, (double[]){3, 3, 0, 1}) <= 2e-6);
  adapter_close(m);
  /* trimmed to the largest half: [[4, 0], [2, 0]] and [[2, 3], [-2, 0]], where 2 and -2 tie and both stay */
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_TIES, .keep = 0.5}, NULL, &report);
  assert_true(off(m, (double[]){3, 3, 0, 0}) <= 2e-6);
  adapter_close(m);
  /* a weight comes before the election: 2 and -2 * 3 elect -, and lambda last */
  x[1].weight = 3;
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_TIES, .keep = 1, .scale = 10}, NULL, &report);
  assert_true(off(m, (double[]){50, 90, -60, 30}) <= 5e-5); /* 8e-6 */
  adapter_close(m);
  adapter_close(e1);
  adapter_close(e2);
}

/* The selection under the trim, over many sizes: as many as asked for stay when all differ. */
static void test_ties_keeps_its_share(void **state)
{
  struct adapter *e1 = random_expert("one", 2, 4, 9), *m;
  const struct merge_expert x[] = {{e1, 1}};

  (void)state;
  for (int keep = 1; keep <= 12; keep++) {
    double got[12] = {0}, want[12] = {0};
    int kept = 0;

    m = must_merge(x, 1, (struct merge_options){.method = MERGE_TIES, .keep = keep / 12.0}, NULL, NULL);
    dense(got, m, 1, 1);
    dense(want, e1, 1, 1);
    for (int i = 0; i < 12; i++) {
      int larger = 0;

      for (int j = 0; j < 12; j++)
        larger += fabs(want[j]) > fabs(want[i]);
      assert_true(fabs(got[i] - (larger < keep ? want[i] : 0)) <= 4e-6); /* 9e-7 */
      kept += larger < keep;
    }
    assert_int_equal(kept, keep);
    adapter_close(m);
  }
  adapter_close(e1);
}

/* ---- Co-Merge ---- */

static struct adapter *rank1(const char *name, const float down[2], const float up[2])
{
  struct adapter *a = adapter_new_lowrank(name, 1);
  struct err e = {0};

  assert_int_equal(adapter_set_lowrank(a, 0, &base, 0, 1, &e), 0);
  memcpy(a->delta[0].down, down, 2 * sizeof *down);
  memcpy(a->delta[0].up, up, 2 * sizeof *up);
  assert_int_equal(adapter_finish(a, &base, &e), 0);
  return a;
}

static struct merge_counts *must_count(enum merge_method method, const struct merge_expert *x, int n)
{
  struct merge_counts *c;
  struct err e = {0};

  if (merge_counts_new(&c, method, &base, x, n, &e))
    fail_msg("%s", e.msg);
  return c;
}

static void expect_factors(const struct adapter *a, float d0, float d1, float u0, float u1)
{
  const struct delta *d = &a->delta[0];

  assert_true(d->down[0] == d0 && d->down[1] == d1);
  assert_true(d->up[0] == u0 && d->up[1] == u1);
}

/*
 * down (3, 1) and (1, -2), up (2, 1) and (1, 0.1), inputs (1, 1) for both, hidden 1 and 4. Signals of down: 3 > 1 and 1 < 2; of up: 2 < 4
 * and 1 > 0.4. With half kept each expert keeps the one place that it won.
 */
static void test_co_by_hand(void **state)
{
  struct adapter *e1 = rank1("one", (float[]){3, 1}, (float[]){2, 1}), *e2 = rank1("two", (float[]){1, -2}, (float[]){1, 0.1f}), *m;
  struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  const double one[] = {1, 1}, h1[] = {1}, h2[] = {4};
  const struct merge_activation act[] = {{one, h1}, {one, h2}};
  struct merge_counts *c = must_count(MERGE_CO, x, 2);
  struct merge_report report;

  (void)state;
  merge_counts_add(c, x, 2, act);
  assert_int_equal(c->at[0].down[0], 1); /* expert 0, place 0 */
  assert_int_equal(c->at[0].down[1], 0);
  assert_int_equal(c->at[0].down[2], 0);
  assert_int_equal(c->at[0].down[3], 1);
  assert_int_equal(c->at[0].up[0], 0);
  assert_int_equal(c->at[0].up[1], 1);
  assert_int_equal(c->at[0].up[2], 1);
  assert_int_equal(c->at[0].up[3], 0);
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO, .keep = 0.5}, c, &report);
  expect_factors(m, 3, -2, 1, 1);
  assert_true(report.kept == 1);
  adapter_close(m);
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO, .keep = 1}, c, &report); /* both keep all: the means */
  expect_factors(m, 2, -0.5f, 1.5f, (float)((1 + (double)0.1f) / 2));
  adapter_close(m);
  /* the weight of an expert is in up alone */
  x[0].weight = 10;
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO, .keep = 0.5, .scale = 3}, c, &report);
  expect_factors(m, 3, -2, 3, 30);
  adapter_close(m);
  merge_counts_free(c);
  adapter_close(e1);
  adapter_close(e2);
}

/* Both experts win place 0 most often, each in another factor: nobody keeps place 1. */
static void test_co_unkept(void **state)
{
  struct adapter *e1 = rank1("one", (float[]){3, 1}, (float[]){2, 4}), *e2 = rank1("two", (float[]){5, 1}, (float[]){8, 6}), *m;
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  struct merge_counts *c = must_count(MERGE_CO, x, 2);
  struct merge_report report;

  (void)state;
  c->at[0].down[0] = 2; /* expert 0, place 0 */
  c->at[0].down[2] = 3; /* expert 1, place 0 */
  c->at[0].up[0] = 1;
  c->at[0].up[2] = 1;
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO, .keep = 0.5}, c, &report);
  expect_factors(m, 4, 0, 5, 0);
  assert_true(report.kept == 0.5);
  adapter_close(m);
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO, .keep = 0.5, .fill_mean = 1}, c, &report);
  expect_factors(m, 4, 1, 5, 5);
  adapter_close(m);
  merge_counts_free(c);
  adapter_close(e1);
  adapter_close(e2);
}

/* The majority of inputs decides, not the strongest; without signal nobody wins; equal signals are the first expert's; an input that one
 * expert did not see does not count. */
static void test_co_votes(void **state)
{
  struct adapter *e1 = rank1("one", (float[]){1, 1}, (float[]){1, 1}), *e2 = rank1("two", (float[]){1, 1}, (float[]){1, 1});
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  const double weak[] = {1, 0}, strong[] = {100, 0}, less[] = {0.5, 0}, h[] = {1};
  struct merge_counts *c = must_count(MERGE_CO, x, 2);

  (void)state;
  merge_counts_add(c, x, 2, (struct merge_activation[]){{less, h}, {weak, h}});
  merge_counts_add(c, x, 2, (struct merge_activation[]){{less, h}, {weak, h}});
  merge_counts_add(c, x, 2, (struct merge_activation[]){{strong, h}, {weak, h}});
  merge_counts_add(c, x, 2, (struct merge_activation[]){{strong, h}, {NULL, NULL}});
  assert_int_equal(c->at[0].down[0], 1);
  assert_int_equal(c->at[0].down[2], 2);
  assert_int_equal(c->at[0].down[1], 0); /* place 1 never had a signal */
  assert_int_equal(c->at[0].down[3], 0);
  assert_int_equal(c->at[0].up[0], 3); /* equal: the first */
  assert_int_equal(c->at[0].up[2], 0);
  merge_counts_free(c);
  adapter_close(e1);
  adapter_close(e2);
}

static void test_co_rows_by_hand(void **state)
{
  struct adapter *e1 = plain("one", (float[]){1, -3, 2, 1}, 1), *e2 = plain("two", (float[]){2, 1, 1, 4}, 1), *m;
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  const double in[] = {3, 0.5}, h[] = {0, 0};
  const struct merge_activation act[] = {{in, h}, {in, h}};
  struct merge_counts *c = must_count(MERGE_CO_ROWS, x, 2);
  struct merge_report report;

  (void)state;
  merge_counts_add(c, x, 2, act); /* row 0: 3 + 1.5 < 6 + 0.5; row 1: 6 + 0.5 > 3 + 2; both the other way round without the inputs */
  assert_int_equal(c->at[0].rows[0], 0);
  assert_int_equal(c->at[0].rows[1], 1);
  assert_int_equal(c->at[0].rows[2], 1);
  assert_int_equal(c->at[0].rows[3], 0);
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO_ROWS, .keep = 0.5}, c, &report);
  assert_true(off(m, (double[]){2, 1, 2, 1}) <= 2e-6);
  adapter_close(m);
  m = must_merge(x, 2, (struct merge_options){.method = MERGE_CO_ROWS, .keep = 1}, c, &report);
  assert_true(off(m, (double[]){1.5, -1, 1.5, 2.5}) <= 2e-6);
  adapter_close(m);
  merge_counts_free(c);
  adapter_close(e1);
  adapter_close(e2);
}

/* ---- what is refused ---- */

static void expect_refused(const struct merge_expert *x, int n, struct merge_options o, const char *says)
{
  struct adapter *a = (struct adapter *)1;
  struct err e = {0};

  assert_int_equal(merge_run(&a, &base, x, n, &o, NULL, NULL, &e), E_ARG);
  assert_null(a);
  if (!strstr(e.msg, says))
    fail_msg("\"%s\" does not say \"%s\"", e.msg, says);
}

static void test_refusals(void **state)
{
  struct adapter *e1 = random_expert("one", 2, 2, 1), *e2 = random_expert("two", 2, 3, 2), *e3 = random_expert("three", 3, 2, 3);
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}}, y[] = {{e1, 1}, {e3, 1}}, z[] = {{e3, 1}};
  struct merge_expert nan = {e1, NAN};
  struct merge_options o = {.method = MERGE_MEAN, .keep = 1, .scale = 1};
  struct merge_counts *c = (struct merge_counts *)1;
  enum merge_method method;
  struct err e = {0};

  (void)state;
  expect_refused(x, 0, o, "experts");
  expect_refused(&nan, 1, o, "finite");
  o.keep = 0;
  expect_refused(x, 2, o, "keep");
  o.keep = NAN;
  expect_refused(x, 2, o, "keep");
  o.keep = 1;
  o.scale = INFINITY;
  expect_refused(x, 2, o, "scale");
  o = (struct merge_options){.method = MERGE_CONCAT, .keep = 1, .scale = 1, .rank = 3};
  expect_refused(x, 2, o, "rank");
  e1->delta[1].bias = calloc(3, sizeof(float));
  o.rank = 0;
  expect_refused(x, 2, o, "unet.b.attn1.to_q");
  free(e1->delta[1].bias);
  e1->delta[1].bias = NULL;

  assert_int_equal(merge_counts_new(&c, MERGE_CO, &base, x, 2, &e), E_ARG); /* other ranks */
  assert_null(c);
  assert_non_null(strstr(e.msg, "two"));
  assert_int_equal(merge_counts_new(&c, MERGE_CO_ROWS, &base, x, 2, &e), 0); /* which do not matter there */
  merge_counts_free(c);
  memset(&e, 0, sizeof e);
  assert_int_equal(merge_counts_new(&c, MERGE_CO, &base, y, 2, &e), E_ARG); /* other sites */
  assert_non_null(strstr(e.msg, "three"));
  memset(&e, 0, sizeof e);
  assert_int_equal(merge_counts_new(&c, MERGE_CO, &base, z, 1, &e), E_ARG); /* a convolution */
  assert_non_null(strstr(e.msg, "unet.c.conv"));
  memset(&e, 0, sizeof e);
  assert_int_equal(merge_method_find("average", &method, &e), E_ARG);
  for (int i = 0; i < MERGE_METHODS; i++) {
    assert_int_equal(merge_method_find(merge_method_name((enum merge_method)i), &method, &e), 0);
    assert_int_equal(method, i);
  }
  adapter_close(e1);
  adapter_close(e2);
  adapter_close(e3);
}

/* ---- the calibration, on the bundled model ---- */

static struct be be;
static struct model *model;

static int open_model(void **state)
{
  const struct be_config cfg = {.threads = 1};
  struct err e = {0};

  (void)state;
  return be_open(&be, &be_cpu, &cfg, &e) || model_open(&model, &be, "weights/emoji", &e);
}

static int close_model(void **state)
{
  (void)state;
  model_close(model);
  be_close(&be);
  return 0;
}

/* Random factors on to_q and to_k of every attn1 and attn2: layers of both kinds, inside a step and of the prompt. */
static struct adapter *model_expert(const char *name, uint64_t seed)
{
  const struct generation *g = model_base(model);
  struct adapter *a;
  struct err e = {0};
  struct rng r;
  int n = 0, at = 0;

  for (int pass = 0; pass < 2; pass++) {
    a = pass ? adapter_new_lowrank(name, n) : NULL;
    rng_seed(&r, seed);
    for (int i = 0; i < g->n; i++) {
      const struct site *s = &g->site[i];

      if (strncmp(s->name, "unet.", 5) || (!strstr(s->name, ".to_q") && !strstr(s->name, ".to_k")))
        continue;
      n += !pass;
      if (!pass)
        continue;
      assert_int_equal(adapter_set_lowrank(a, at, g, i, 2, &e), 0);
      rng_randn(&r, a->delta[at].down, (size_t)(2 * s->in));
      rng_randn(&r, a->delta[at].up, (size_t)(2 * s->out));
      a->delta[at++].scale = 0.01f;
    }
  }
  assert_int_equal(adapter_finish(a, g, &e), 0);
  return a;
}

/* Every weight has exactly one winner for each input that its layer saw: a step, or for keys of cross-attention a prompt. */
static void test_calibration(void **state)
{
  struct adapter *e1 = model_expert("one", 1), *e2 = model_expert("two", 2), *m = NULL;
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  static const char *const prompts[] = {"a red apple", "a happy face"};
  const struct merge_calibration k = {.prompt = prompts, .prompts = 2, .steps = 3, .seed = 1};
  struct merge_options o = {.method = MERGE_CO, .keep = 1, .scale = 1};
  struct merge_counts *c = NULL, *again = NULL;
  struct err e = {0};
  int inputs = 0, wins[2] = {0};

  (void)state;
  assert_int_equal(merge_counts_new(&c, MERGE_CO, model_base(model), x, 2, &e), 0);
  if (merge_calibrate(c, model, &be, x, 2, &k, &inputs, &e))
    fail_msg("%s", e.msg);
  assert_int_equal(inputs, 6);
  for (int i = 0; i < c->sites; i++) {
    const struct merge_counts_site *s = &c->at[i];
    const char *name = model_base(model)->site[s->site].name;
    uint32_t seen = strstr(name, ".attn2.to_k") ? 2 : 6;

    for (int64_t j = 0; j < s->rank * s->in; j++) {
      assert_int_equal(s->down[j] + s->down[s->rank * s->in + j], seen);
      wins[0] += (int)s->down[j];
      wins[1] += (int)s->down[s->rank * s->in + j];
    }
    for (int64_t j = 0; j < s->rank * s->out; j++)
      assert_int_equal(s->up[j] + s->up[s->rank * s->out + j], seen);
  }
  assert_true(wins[0] > wins[1] / 2 && wins[1] > wins[0] / 2); /* two of a kind */

  /* the same again gives the same, and each prompt counts for itself: nothing of one is left for the next */
  assert_int_equal(merge_counts_new(&again, MERGE_CO, model_base(model), x, 2, &e), 0);
  for (int i = 0; i < 2; i++) {
    const struct merge_calibration one = {.prompt = prompts + i, .prompts = 1, .steps = 3, .seed = 1 + (uint64_t)i};

    assert_int_equal(merge_calibrate(again, model, &be, x, 2, &one, &inputs, &e), 0);
  }
  for (int i = 0; i < c->sites; i++)
    assert_memory_equal(c->at[i].down, again->at[i].down, (size_t)(2 * c->at[i].rank * c->at[i].in) * sizeof *c->at[i].down);
  merge_counts_free(again);
  merge_counts_free(c);

  /* one expert that keeps all is the expert */
  assert_int_equal(merge_counts_new(&c, MERGE_CO, model_base(model), x, 1, &e), 0);
  assert_int_equal(merge_calibrate(c, model, &be, x, 1, &k, &inputs, &e), 0);
  if (merge_run(&m, model_base(model), x, 1, &o, c, NULL, &e))
    fail_msg("%s", e.msg);
  assert_int_equal(m->n, e1->n);
  for (int i = 0; i < m->n; i++) {
    const struct site *s = &model_base(model)->site[m->delta[i].site];

    assert_memory_equal(m->delta[i].down, e1->delta[i].down, (size_t)(2 * s->in) * sizeof(float));
    for (int64_t j = 0; j < 2 * s->out; j++)
      assert_true(m->delta[i].up[j] == (float)((double)0.01f * (double)e1->delta[i].up[j]));
  }
  merge_counts_free(c);
  adapter_close(m);
  adapter_close(e1);
  adapter_close(e2);
}

/* Two experts that do the same to the picture, one with four times the down and a quarter of the scale: both see the same inputs, so the
 * larger weights win everywhere. */
static void test_calibration_sees_strength(void **state)
{
  struct adapter *e1 = model_expert("one", 1), *e2 = model_expert("two", 1);
  const struct merge_expert x[] = {{e1, 1}, {e2, 1}};
  static const char *const prompts[] = {"a red apple"};
  const struct merge_calibration k = {.prompt = prompts, .prompts = 1, .steps = 1, .seed = 1};
  struct merge_counts *c = NULL;
  struct err e = {0};
  int inputs = 0;

  (void)state;
  for (int i = 0; i < e2->n; i++) { /* exact: powers of two */
    const struct site *s = &model_base(model)->site[e2->delta[i].site];

    for (int64_t j = 0; j < 2 * s->in; j++)
      e2->delta[i].down[j] *= 4;
    e2->delta[i].scale /= 4;
  }
  e2->digest[0] ^= 1;
  assert_int_equal(merge_counts_new(&c, MERGE_CO, model_base(model), x, 2, &e), 0);
  if (merge_calibrate(c, model, &be, x, 2, &k, &inputs, &e))
    fail_msg("%s", e.msg);
  for (int i = 0; i < c->sites; i++)
    for (int64_t j = 0; j < c->at[i].rank * c->at[i].in; j++)
      assert_int_equal(c->at[i].down[j], 0); /* expert 0 never wins */
  merge_counts_free(c);
  adapter_close(e1);
  adapter_close(e2);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_concat_is_exact),
    cmocka_unit_test(test_mean_of_equals),
    cmocka_unit_test(test_weighted_cuts),
    cmocka_unit_test(test_ties_by_hand),
    cmocka_unit_test(test_ties_keeps_its_share),
    cmocka_unit_test(test_co_by_hand),
    cmocka_unit_test(test_co_unkept),
    cmocka_unit_test(test_co_votes),
    cmocka_unit_test(test_co_rows_by_hand),
    cmocka_unit_test(test_refusals),
    cmocka_unit_test(test_calibration),
    cmocka_unit_test(test_calibration_sees_strength),
  };

  return cmocka_run_group_tests(tests, open_model, close_model);
}
