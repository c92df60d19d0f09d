/*
 * test_guard.c - models/guard.c: what is found to take the safety away, in whatever clothes, what is left alone, and what projection makes of it.
 *
 * The sites and the safety are made up: no network is needed to compare adapters.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/guard.h"
#include "models/sources.h"

enum { SITES = 6, SAFE_SITES = 4 /* the first ones are the safety's */, RANK = 3, STYLES = 8 };

static struct site sites[SITES] = {
  {.name = (char *)"unet.a.to_q", .kind = WEIGHT_LINEAR, .out = 40, .in = 32},
  {.name = (char *)"unet.a.to_out.0", .kind = WEIGHT_LINEAR, .out = 32, .in = 40, .has_bias = 1},
  {.name = (char *)"unet.conv", .kind = WEIGHT_CONV, .out = 24, .in = 16, .kh = 3, .kw = 3, .stride = 1, .pad_lo = 1, .pad_hi = 1, .has_bias = 1},
  {.name = (char *)"text_encoder.q_proj", .kind = WEIGHT_LINEAR, .out = 32, .in = 32, .has_bias = 1},
  {.name = (char *)"unet.b.to_q", .kind = WEIGHT_LINEAR, .out = 40, .in = 32},
  {.name = (char *)"unet.norm", .kind = WEIGHT_NORM, .out = 24, .in = 1, .has_bias = 1},
};

static struct generation base = {.site = sites, .n = SITES};
static struct model_sources sources;
static struct err e;

static void must(int code)
{
  if (code)
    fail_msg("%s (%s)", e.msg, e.field);
}

static float *drawn(const char *name, int site, const char *part, int64_t count)
{
  float *v = malloc((size_t)count * sizeof *v);
  char full[128];

  assert_non_null(v);
  snprintf(full, sizeof full, "%s.%d.%s", name, site, part);
  synth_fill(full, 2, (int64_t[]){1, count}, DT_F32, v);
  return v;
}

static int64_t columns(const struct site *s)
{
  return site_count(s) / s->out;
}

/* An adapter of low-rank deltas at sites from..to-1, the same for the same name. */
static struct adapter *make(const char *name, int from, int to)
{
  struct adapter *a = calloc(1, sizeof *a);

  assert_non_null(a);
  a->delta = calloc(SITES, sizeof *a->delta);
  assert_non_null(a->delta);
  snprintf(a->name, sizeof a->name, "%s", name);
  for (int i = from; i < to; i++)
    a->delta[a->n++] = (struct delta){.site = i, .kind = DELTA_LOWRANK, .rank = RANK, .scale = 0.5f,
                                      .down = drawn(name, i, "down", RANK * columns(&sites[i])),
                                      .up = drawn(name, i, "up", sites[i].out * RANK)};
  return a;
}

static void setup_sources(void)
{
  static const char *const parts[] = {"unet", "text_encoder"};

  for (int i = 0; i < 2; i++) {
    struct source *s;

    must(source_open_synthetic(&s, DT_F32, &e));
    must(sources_add(&sources, parts[i], s, &e));
  }
}

/* ---- disguises: each makes -S of S, at weight 1 ---- */

static void negate_scale(struct delta *d, const struct site *s)
{
  (void)s;
  d->scale = -d->scale;
}

static void negate_down(struct delta *d, const struct site *s)
{
  for (int64_t i = 0; i < d->rank * columns(s); i++)
    d->down[i] = -d->down[i];
}

/* up R and R^-1 down, with R a rotation of the first two ranks times unequal lengths. */
static void rotate(struct delta *d, const struct site *s)
{
  const double c = 0.6, w = 0.8, long_ = 3, short_ = 0.25;
  int64_t in = columns(s);

  negate_scale(d, s);
  for (int64_t o = 0; o < s->out; o++) {
    double x = d->up[o * RANK], y = d->up[o * RANK + 1];

    d->up[o * RANK] = (float)(long_ * (c * x + w * y));
    d->up[o * RANK + 1] = (float)(short_ * (c * y - w * x));
  }
  for (int64_t i = 0; i < in; i++) {
    double x = d->down[i], y = d->down[in + i];

    d->down[i] = (float)((c * x + w * y) / long_);
    d->down[in + i] = (float)((c * y - w * x) / short_);
  }
}

/* Twice the rank: rows that nothing reads, and columns that read nothing. */
static void pad(struct delta *d, const struct site *s)
{
  int64_t in = columns(s);
  float *down = drawn("junk", d->site, "down", 2 * RANK * in), *up = calloc((size_t)(s->out * 2 * RANK), sizeof *up);

  assert_non_null(up);
  memcpy(down, d->down, (size_t)(RANK * in) * sizeof *down);
  for (int64_t o = 0; o < s->out; o++)
    for (int64_t r = 0; r < RANK; r++)
      up[o * 2 * RANK + r] = -d->up[o * RANK + r];
  free(d->down);
  free(d->up);
  d->down = down;
  d->up = up;
  d->rank = 2 * RANK;
}

static float *dense_of(const struct delta *d, const struct site *s, double k)
{
  float *v = calloc((size_t)site_count(s), sizeof *v);

  assert_non_null(v);
  delta_apply(d, s, NULL, NULL, (float)k, v, NULL);
  return v;
}

static void drop_factors(struct delta *d)
{
  free(d->up);
  free(d->down);
  d->up = d->down = NULL;
  d->rank = 0;
}

static void as_dense(struct delta *d, const struct site *s)
{
  d->dense = dense_of(d, s, -4);
  drop_factors(d);
  d->kind = DELTA_DENSE;
  d->scale = 0.25f;
}

/* W' = W0 - S. */
static void as_overlay(struct delta *d, const struct site *s)
{
  struct pristine p;

  must(sources_read(&sources, s, &p, &e));
  d->dense = dense_of(d, s, -1);
  for (int64_t i = 0; i < p.count; i++)
    d->dense[i] += p.w[i];
  d->bias = p.bias; /* as it was */
  p.bias = NULL;
  pristine_free(&p);
  drop_factors(d);
  d->kind = DELTA_REPLACE;
  d->scale = 1;
}

/* Magnitudes that leave W0 - S as long as it is. */
static void as_dora(struct delta *d, const struct site *s)
{
  int64_t in = columns(s);
  struct pristine p;
  float *v;

  negate_scale(d, s);
  must(sources_read(&sources, s, &p, &e));
  v = dense_of(d, s, 1);
  d->magnitude = malloc((size_t)s->out * sizeof *d->magnitude);
  assert_non_null(d->magnitude);
  for (int64_t o = 0; o < s->out; o++) {
    double sum = 0;

    for (int64_t i = 0; i < in; i++)
      sum += pow((double)v[o * in + i] + (double)p.w[o * in + i], 2);
    d->magnitude[o] = (float)sqrt(sum);
  }
  d->kind = DELTA_DORA;
  d->magnitude_per_row = 1;
  free(v);
  pristine_free(&p);
}

static const struct disguise {
  const char *name;
  void (*wear)(struct delta *d, const struct site *s);
} disguises[] = {{"negated scale", negate_scale}, {"negated factor", negate_down}, {"turned factors", rotate},
                 {"padded ranks", pad},           {"full difference", as_dense},   {"overlay", as_overlay},
                 {"DoRA", as_dora}};
enum { DISGUISES = sizeof disguises / sizeof *disguises };

static struct adapter *disguised(const struct disguise *how)
{
  struct adapter *a = make("safety", 0, SAFE_SITES);

  for (int i = 0; i < a->n; i++)
    how->wear(&a->delta[i], &sites[a->delta[i].site]);
  return a;
}

/* ---- measuring ---- */

static struct guard_report measure(const struct adapter_use *use, int n, double tau)
{
  struct guard_report r;

  must(guard_measure(&r, &base, &sources, use, n, tau, &e));
  return r;
}

static double furthest;

static void near(double got, double want)
{
  furthest = fmax(furthest, fabs(got - want));
  if (!(fabs(got - want) <= 4 * 4.77e-8)) /* measured over all of this file: weights and factors are fp32 */
    fail_msg("%.9g is not %.9g", got, want);
}

static void test_disguises(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES);

  (void)state;
  for (int i = 0; i < DISGUISES; i++) {
    struct adapter *style = disguised(&disguises[i]);
    struct adapter_use use[2] = {{.adapter = safety, .weight = 0.8f, .required = 1}, {.adapter = style, .weight = 0.8f}};
    struct guard_report r = measure(use, 2, 0.1);

    printf("%s: c %.9f, over all sites %.9f\n", disguises[i].name, r.c, r.c_all);
    near(r.c, -1);
    near(r.c_all, -1);
    near(r.of[1].c, -1);
    assert_true(r.site >= 0 && r.site < SAFE_SITES && guard_cancels(&r, 0.1));
    assert_int_equal(r.of[0].site, SITE_NONE);
    guard_free(&r);
    use[1].weight = -0.8f; /* the other way round it adds to the safety */
    r = measure(use, 2, 0.1);
    near(r.of[1].c_all, 1);
    assert_true(r.c == 0 && !guard_cancels(&r, 0.1));
    guard_free(&r);
    adapter_close(style);
  }
  adapter_close(safety);
}

/* The safety's own file, at weights of either sign. */
static void test_same_file(void **state)
{
  static const float weights[] = {-1, -0.05f, 0, 0.5f, 2};
  struct adapter *safety = make("safety", 0, SAFE_SITES);

  (void)state;
  for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
    struct adapter_use use[2] = {{.adapter = safety, .weight = 1, .required = 1}, {.adapter = safety, .weight = weights[i]}};
    struct guard_report r = measure(use, 2, 0.1);

    near(r.c_all, (double)weights[i]);
    near(r.c, fmin(0, (double)weights[i]));
    assert_int_equal(guard_cancels(&r, 0.1), weights[i] < -0.1f);
    guard_free(&r);
  }
  adapter_close(safety);
}

/* Each takes an eighth, which alone would pass. */
static void test_many_small(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES), *style[STYLES];
  struct adapter_use use[STYLES + 1] = {{.adapter = safety, .weight = 1, .required = 1}};
  struct guard_report r;

  (void)state;
  for (int i = 0; i < STYLES; i++) {
    style[i] = disguised(&disguises[i % DISGUISES]);
    use[i + 1] = (struct adapter_use){.adapter = style[i], .weight = 0.125f};
  }
  r = measure(use, 2, 0.2);
  near(r.c, -0.125);
  assert_false(guard_cancels(&r, 0.2));
  guard_free(&r);
  r = measure(use, STYLES + 1, 0.2);
  near(r.c, -1);
  assert_int_equal(r.style, -1); /* it takes all of them */
  assert_true(guard_cancels(&r, 0.2));
  for (int i = 0; i < STYLES; i++) {
    near(r.of[i + 1].c, -0.125);
    adapter_close(style[i]);
  }
  guard_free(&r);
  adapter_close(safety);
}

/* One does it, another hides it in the sum: found alone. */
static void test_hidden_in_sum(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES), *against = disguised(&disguises[0]);
  struct adapter_use use[3] = {{.adapter = safety, .weight = 1, .required = 1},
                               {.adapter = against, .weight = 1},
                               {.adapter = safety, .weight = 1}};
  struct guard_report r = measure(use, 3, 0.1);

  (void)state;
  near(r.c, -1);
  assert_int_equal(r.style, 1);
  near(r.c_together, 0);
  assert_null(r.factor[0]); /* nothing to mend: the sum is whole */
  guard_free(&r);
  adapter_close(safety);
  adapter_close(against);
}

/* At one site alone, and that one in the text encoder: small in the whole, total there. */
static void test_one_site(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES), *style = make("safety", 3, 4);
  struct adapter_use use[2] = {{.adapter = safety, .weight = 1, .required = 1}, {.adapter = style, .weight = -1}};
  struct guard_report r = measure(use, 2, 0.1);

  (void)state;
  near(r.c, -1);
  assert_int_equal(r.site, 3);
  assert_true(r.c_all > -0.6 && r.c_all < -0.05);
  guard_free(&r);
  adapter_close(safety);
  adapter_close(style);
}

/* Where the safety is nothing everything is allowed, but for the norm. */
static void test_elsewhere(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES), *style = make("style", SAFE_SITES, SITES);
  struct adapter_use use[2] = {{.adapter = safety, .weight = 1, .required = 1}, {.adapter = style, .weight = 1}};
  struct guard_report r = measure(use, 2, 0);

  (void)state;
  assert_true(r.c == 0 && r.c_all == 0 && r.site == SITE_NONE && !guard_cancels(&r, 0));
  assert_true(r.norm_ratio > 0 && r.norm_site >= SAFE_SITES);
  guard_free(&r);
  use[0].weight = 0; /* a safety of nothing: nothing to take, and no division by it */
  use[1].adapter = safety;
  r = measure(use, 2, 0);
  assert_true(r.c == 0 && r.c_all == 0);
  guard_free(&r);
  adapter_close(safety);
  adapter_close(style);
}

/* Some other style is not mistaken for an enemy. */
static void test_bystander(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES);
  char name[16];

  (void)state;
  for (int i = 0; i < 20; i++) {
    struct adapter *style;
    struct adapter_use use[2];
    struct guard_report r;

    snprintf(name, sizeof name, "style %d", i);
    style = make(name, 0, SITES);
    use[0] = (struct adapter_use){.adapter = safety, .weight = 1, .required = 1};
    use[1] = (struct adapter_use){.adapter = style, .weight = 1};
    r = measure(use, 2, 0.1);
    assert_true(fabs(r.c_all) < 0.05 && !guard_cancels(&r, 0.3)); /* 32 x 40 numbers: chance alone gives 0.07 and less */
    guard_free(&r);
    adapter_close(style);
  }
  adapter_close(safety);
}

/* Two required ones: it is their sum that counts. */
static void test_two_required(void **state)
{
  struct adapter *one = make("safety", 0, SAFE_SITES), *two = make("other", 1, SITES), *dense = disguised(&disguises[4]);
  struct adapter_use use[4] = {{.adapter = one, .weight = 0.5f, .required = 1},
                               {.adapter = two, .weight = 1.5f, .required = 1},
                               {.adapter = one, .weight = -0.25f},
                               {.adapter = two, .weight = -0.75f}};
  struct guard_report r = measure(use, 4, 0.1);

  (void)state;
  near(r.c_all, -0.5);
  assert_true(r.c_together <= -0.5 && r.c <= r.c_together);
  guard_free(&r);
  use[2] = (struct adapter_use){.adapter = dense, .weight = 0.25f}; /* the same from whole matrices */
  r = measure(use, 4, 0.1);
  near(r.c_all, -0.5);
  assert_true(r.c_together <= -0.5 && r.c <= r.c_together);
  guard_free(&r);
  adapter_close(one);
  adapter_close(two);
  adapter_close(dense);
}

/* Required ones that cancel each other are no safety to take away: what rounding leaves of them decides nothing. */
static void test_required_cancel(void **state)
{
  struct adapter *one = make("safety", 0, SAFE_SITES), *minus, *style = make("style", 0, SITES);

  (void)state;
  for (int i = 0; i < DISGUISES; i++) {
    struct adapter_use use[3] = {{.adapter = one, .weight = 1, .required = 1}, {.weight = 1, .required = 1}, {.adapter = style, .weight = -1}};
    struct guard_report r;

    minus = disguised(&disguises[i]);
    use[1].adapter = minus;
    r = measure(use, 3, 0.1);
    assert_true(r.c == 0 && r.c_all == 0);
    guard_free(&r);
    adapter_close(minus);
  }
  adapter_close(one);
  adapter_close(style);
}

/* Biases are part of the vector. */
static void test_bias(void **state)
{
  struct adapter *safety = make("safety", 1, 2), *style = make("safety", 1, 2);
  struct adapter_use use[2] = {{.adapter = safety, .weight = 1, .required = 1}, {.adapter = style, .weight = 1}};
  struct guard_report r;

  (void)state;
  safety->delta[0].bias = drawn("safety", 1, "bias", sites[1].out);
  style->delta[0].bias = drawn("safety", 1, "bias", sites[1].out);
  style->delta[0].scale = 0;
  for (int64_t i = 0; i < sites[1].out; i++)
    style->delta[0].bias[i] *= -1;
  r = measure(use, 2, 0.01);
  assert_true(r.c < -0.01 && r.c > -1);
  guard_free(&r);
  style->delta[0].scale = -safety->delta[0].scale;
  r = measure(use, 2, 0.01);
  near(r.c, -1);
  guard_free(&r);
  as_dense(&style->delta[0], &sites[1]); /* and again from whole matrices */
  style->delta[0].scale *= -1;
  r = measure(use, 2, 0.01);
  near(r.c, -1);
  guard_free(&r);
  adapter_close(safety);
  adapter_close(style);
}

/* |U| / |W0|, styles added up. */
static void test_norms(void **state)
{
  struct adapter *safety = make("safety", 0, 1), *style = make("style", 0, SITES);
  struct adapter_use use[3] = {{.adapter = safety, .weight = 1, .required = 1},
                               {.adapter = style, .weight = 0.5f},
                               {.adapter = style, .weight = -0.25f}};
  struct guard_report r = measure(use, 3, 0.1);
  struct pristine p;
  double want = 0;

  (void)state;
  for (int i = 0; i < SITES; i++) {
    double sum = 0;

    must(sources_read(&sources, &sites[i], &p, &e));
    for (int64_t k = 0; k < p.count; k++)
      sum += (double)p.w[k] * (double)p.w[k];
    for (int64_t k = 0; p.bias && k < sites[i].out; k++)
      sum += (double)p.bias[k] * (double)p.bias[k];
    want = fmax(want, delta_norm(&style->delta[i], &sites[i], NULL) / sqrt(sum));
    pristine_free(&p);
  }
  near(r.norm_ratio / want, 0.75); /* in opposite directions, but together */
  near(r.of[1].norm_ratio / want, 0.5);
  near(r.of[2].norm_ratio / want, 0.25);
  guard_free(&r);
  adapter_close(safety);
  adapter_close(style);
}

/* After projection exactly tau of S is taken, at every site where more was. */
static void test_projection(void **state)
{
  const double tau = 0.1;
  struct adapter *safety = make("safety", 0, SAFE_SITES), *style = make("safety", 1, SITES);
  struct adapter_use use[2] = {{.adapter = safety, .weight = 0.8f, .required = 1}, {.adapter = style, .weight = -0.6f}};
  struct guard_report r = measure(use, 2, tau);

  (void)state;
  near(r.c, -0.75);
  assert_null(use[0].factor);
  guard_project(&r, use);
  assert_non_null(use[0].factor);
  assert_null(use[1].factor);
  for (int i = 0; i < SAFE_SITES; i++) {
    const struct site *s = &sites[i];
    float *sum = calloc((size_t)site_count(s), sizeof *sum), *safe = dense_of(&safety->delta[i], s, 0.8);
    double us = 0, ss = 0;

    assert_non_null(sum);
    delta_apply(&safety->delta[i], s, NULL, NULL, use[0].weight * use[0].factor[i], sum, NULL);
    if (i)
      delta_apply(&style->delta[i - 1], s, NULL, NULL, use[1].weight, sum, NULL);
    for (int64_t k = 0; k < site_count(s); k++) {
      us += ((double)sum[k] - (double)safe[k]) * (double)safe[k];
      ss += (double)safe[k] * (double)safe[k];
    }
    near(us / ss, i ? -tau : 0);
    free(sum);
    free(safe);
  }
  guard_free(&r);
  r = measure(use, 2, 0.75 + 1e-3); /* within what may be taken: nothing to mend */
  assert_null(r.factor[0]);
  guard_free(&r);
  adapter_close(safety);
  adapter_close(style);
}

/* A member that is weak beside the other is taken out whole: hardly seen in the sum, plain against the member. */
static void test_weak_member(void **state)
{
  struct adapter *weak = make("safety", 0, SAFE_SITES), *strong = make("other", 0, SAFE_SITES);
  struct adapter_use use[3] = {{.adapter = weak, .weight = 0.1f, .required = 1},
                               {.adapter = strong, .weight = 1, .required = 1},
                               {.adapter = weak, .weight = -0.1f}};
  struct guard_report r = measure(use, 3, 0.3);

  (void)state;
  assert_true(r.c_all > -0.1);
  near(r.c, -1);
  assert_int_equal(r.member, 0);
  assert_true(guard_cancels(&r, 0.3) && r.can_project && r.factor[0]);
  near((double)r.factor[0][0], 1.7);
  guard_free(&r);
  use[2].weight = 0.1f; /* the other way round nothing is taken but by chance */
  r = measure(use, 3, 0.3);
  assert_false(guard_cancels(&r, 0.3));
  guard_free(&r);
  adapter_close(weak);
  adapter_close(strong);
}

/* <W - W0 - S, V> / |V|^2 at a site for V: member `of` of the first `required` uses, or their sum for -1. */
static double taken(const struct adapter_use *use, int n, int required, int site, int of)
{
  const struct site *s = &sites[site];
  int64_t count = site_count(s);
  float *more = calloc((size_t)count, sizeof *more), *v = calloc((size_t)count, sizeof *v);
  double us = 0, vv = 0;

  assert_non_null(more);
  assert_non_null(v);
  for (int i = 0; i < n; i++) {
    const struct delta *d = &use[i].adapter->delta[site]; /* all of them start at site 0 */
    double f = use[i].factor ? (double)use[i].factor[site] : 1;

    delta_apply(d, s, NULL, NULL, (float)((double)use[i].weight * (i < required ? f - 1 : f)), more, NULL);
    if (i < required && (of < 0 || of == i))
      delta_apply(d, s, NULL, NULL, use[i].weight, v, NULL);
  }
  for (int64_t k = 0; k < count; k++) {
    us += (double)more[k] * (double)v[k];
    vv += (double)v[k] * (double)v[k];
  }
  free(more);
  free(v);
  return us / vv;
}

/* b - a/2, as whole matrices. */
static struct adapter *pull_against(const struct adapter *a, const struct adapter *b)
{
  struct adapter *m = make("mixed", 0, SAFE_SITES);

  for (int i = 0; i < m->n; i++) {
    const struct site *s = &sites[i];

    drop_factors(&m->delta[i]);
    m->delta[i].dense = dense_of(&b->delta[i], s, 1);
    delta_apply(&a->delta[i], s, NULL, NULL, -0.5f, m->delta[i].dense, NULL);
    m->delta[i].kind = DELTA_DENSE;
    m->delta[i].scale = 1;
  }
  return m;
}

/* Two members that pull against each other, so that raising one lowers the other: no more than tau of either and of their sum is left taken. */
static void test_project_members(void **state)
{
  const double tau = 0.1;
  struct adapter *one = make("safety", 0, SAFE_SITES), *two = make("other", 0, SAFE_SITES), *mixed = pull_against(one, two);
  struct adapter_use use[4] = {{.adapter = one, .weight = 1, .required = 1},
                               {.adapter = mixed, .weight = 1, .required = 1},
                               {.adapter = one, .weight = -0.6f},
                               {.adapter = mixed, .weight = -0.5f}};
  struct guard_report r = measure(use, 4, tau);

  (void)state;
  assert_true(guard_cancels(&r, tau) && r.can_project);
  for (int i = 0; i < SAFE_SITES; i++)
    assert_true(taken(use, 4, 2, i, -1) < -tau);
  guard_project(&r, use);
  for (int i = 0; i < SAFE_SITES; i++)
    for (int of = -1; of < 2; of++)
      if (!(taken(use, 4, 2, i, of) >= -tau - 1e-6))
        fail_msg("site %d, member %d: %.9g", i, of, taken(use, 4, 2, i, of));
  guard_free(&r);
  adapter_close(one);
  adapter_close(two);
  adapter_close(mixed);
}

/* Hardly anything is required: no factor in reason makes up for what the style does to it. */
static void test_beyond_projection(void **state)
{
  struct adapter *one = make("safety", 0, SAFE_SITES), *anti = make("safety", 0, SAFE_SITES);
  struct adapter_use use[3] = {{.adapter = one, .weight = 1, .required = 1},
                               {.adapter = anti, .weight = -0.999f, .required = 1},
                               {.adapter = one, .weight = -0.6f}};
  struct guard_report r = measure(use, 3, 0.1);

  (void)state;
  assert_true(guard_cancels(&r, 0.1) && !r.can_project);
  guard_free(&r);
  adapter_close(one);
  adapter_close(anti);
}

static void test_not_finite(void **state)
{
  struct adapter *safety = make("safety", 0, SAFE_SITES), *style = make("style", 0, SITES);
  struct adapter_use use[2] = {{.adapter = safety, .weight = 1, .required = 1}, {.adapter = style, .weight = 1}};
  struct guard_report r = {.c = NAN};

  (void)state;
  assert_true(guard_cancels(&r, 0.1));
  style->delta[2].up[5] = INFINITY;
  assert_int_equal(guard_measure(&r, &base, &sources, use, 2, 0.1, &e), E_FILE);
  assert_string_equal(e.field, sites[2].name);
  assert_null(r.of);
  e = (struct err){0};
  adapter_close(safety);
  adapter_close(style);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_disguises), cmocka_unit_test(test_same_file),  cmocka_unit_test(test_many_small),
    cmocka_unit_test(test_hidden_in_sum), cmocka_unit_test(test_one_site), cmocka_unit_test(test_elsewhere),
    cmocka_unit_test(test_bystander), cmocka_unit_test(test_two_required), cmocka_unit_test(test_required_cancel),
    cmocka_unit_test(test_bias),
    cmocka_unit_test(test_norms),     cmocka_unit_test(test_projection), cmocka_unit_test(test_weak_member),
    cmocka_unit_test(test_project_members), cmocka_unit_test(test_beyond_projection),
    cmocka_unit_test(test_not_finite)};
  int failed;

  setup_sources();
  failed = cmocka_run_group_tests(tests, NULL, NULL);
  sources_close(&sources);
  printf("off by %.3g at most\n", furthest);
  return failed;
}
