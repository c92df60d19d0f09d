/*
 * test_compose.c - generations as such: what they depend on, what they leave alone, what they refuse, and that nothing is lost when one
 * cannot be built. That their numbers are right is test_lora.c's. Run from the root of the repository.
 */
#include <fcntl.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "models/guard.h"
#include "tests/golden/fail_alloc.h"
#include "tests/golden/make_adapter.h"
#include "tests/golden/networks.h"

static struct err e;

static void must(int code)
{
  if (code)
    fail_msg("%s (%s)", e.msg, e.field);
}

static struct generation *build(struct nets *n, const struct adapter_use *use, int count, enum generation_form form)
{
  struct generation *g;

  must(generation_build(&g, n->g, &n->sources, &n->be, use, count, form, NULL, &e));
  return g;
}

static struct adapter_use use_of(const struct adapter *a, float weight)
{
  return (struct adapter_use){.adapter = a, .weight = weight, .required = 1};
}

/* The largest difference between two predictions, as a share of the largest value of a. */
static double distance(const float *a, const float *b, size_t count)
{
  double worst = 0, largest = 0;

  for (size_t i = 0; i < count; i++) {
    double diff = fabs((double)a[i] - (double)b[i]);

    worst = diff <= worst ? worst : diff >= 0 ? diff : INFINITY;
    largest = fmax(largest, fabs((double)a[i]));
  }
  return worst / largest;
}

/* Three adapters that overlap: two low-rank ones on the attentions, a dense one there too, one elsewhere. */
enum { ADAPTERS = 4 };

static const struct adapter_plan plans[ADAPTERS] = {
  {"attn", 4, 0.25f, DELTA_LOWRANK, "unet", 1},
  {"other", 2, 0.5f, DELTA_LOWRANK, "unet", 1},
  {"dense", 2, 0.125f, DELTA_DENSE, "unet", 1},
  {"wide", 3, 0.25f, DELTA_LOWRANK, "unet", 0},
};

static void make_all(const struct generation *base, struct adapter *a[ADAPTERS])
{
  for (int i = 0; i < ADAPTERS; i++)
    a[i] = adapter_make(base, &plans[i]);
}

static void close_all(struct adapter *a[ADAPTERS])
{
  for (int i = 0; i < ADAPTERS; i++)
    adapter_close(a[i]);
}

/* One row of the golden's input under g. */
static float *predict(struct nets *n, const struct generation *g, size_t *count)
{
  return nets_predict(n, &g, NULL, 1, count);
}

/* ---- what it depends on ---- */

static void test_order(void **state)
{
  static const int order[][ADAPTERS] = {{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}};
  struct adapter *a[ADAPTERS];
  struct adapter_use use[ADAPTERS];
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  for (enum generation_form form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
    float *first = NULL;
    char digest[65] = "", foretold[65];
    size_t count;

    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
      struct generation *g;
      float *out;

      for (int k = 0; k < ADAPTERS; k++)
        use[k] = use_of(a[order[i][k]], 0.5f + 0.1f * (float)order[i][k]);
      g = build(&n, use, ADAPTERS, form);
      generation_digest(foretold, n.g->digest, use, ADAPTERS, form);
      assert_string_equal(foretold, g->digest);
      assert_int_equal(g->members, ADAPTERS);
      for (int k = 1; k < ADAPTERS; k++)
        assert_true(strcmp(g->member[k - 1].digest, g->member[k].digest) < 0);
      out = predict(&n, g, &count);
      if (first) {
        assert_memory_equal(out, first, count * sizeof *out);
        assert_string_equal(g->digest, digest);
        test_free(out);
      } else {
        first = out;
        memcpy(digest, g->digest, sizeof digest);
      }
      generation_unref(g);
    }
    test_free(first);
  }
  close_all(a);
  nets_close(&n);
}

static void test_digest(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use[2], base[2];
  float factor[512];
  char d[9][65];
  struct nets n;
  int k = 0;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  base[0] = use_of(a[0], 1);
  base[1] = use_of(a[1], 0.5f);
  for (int i = 0; i < 512; i++)
    factor[i] = 1;
  factor[7] = 1.25f;
  generation_digest(d[k++], "base", base, 2, FORM_RUNTIME);
  generation_digest(d[k++], "esab", base, 2, FORM_RUNTIME);
  generation_digest(d[k++], "base", base, 2, FORM_FOLDED);
  generation_digest(d[k++], "base", base, 1, FORM_RUNTIME);
  generation_digest(d[k++], "base", base, 0, FORM_RUNTIME);
  memcpy(use, base, sizeof use);
  use[1].weight = nextafterf(0.5f, 1);
  generation_digest(d[k++], "base", use, 2, FORM_RUNTIME);
  memcpy(use, base, sizeof use);
  use[1].required = 0;
  generation_digest(d[k++], "base", use, 2, FORM_RUNTIME);
  memcpy(use, base, sizeof use);
  use[0].factor = factor;
  generation_digest(d[k++], "base", use, 2, FORM_RUNTIME);
  use[0].weight = 0.5f; /* the weights the other way round */
  use[0].factor = NULL;
  use[1].weight = 1;
  generation_digest(d[k++], "base", use, 2, FORM_RUNTIME);
  assert_int_equal(k, 9);
  for (int i = 0; i < k; i++)
    for (int j = 0; j < i; j++)
      assert_string_not_equal(d[i], d[j]);
  generation_digest(d[0], "base", NULL, 0, FORM_FOLDED);
  assert_string_equal(d[0], d[4]); /* a set of none is the base, whatever its form would have been */
  close_all(a);
  nets_close(&n);
}

/* A factor of a delta is that share of its weight. */
static void test_factor(void **state)
{
  struct adapter *a[ADAPTERS];
  float factor[512];
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  for (int i = 0; i < 512; i++)
    factor[i] = 2; /* a power of two: not a bit may differ */
  for (enum generation_form form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
    struct adapter_use once = use_of(a[0], 0.5f), twice = use_of(a[0], 1);
    struct generation *g, *h;
    size_t count;
    float *x, *y;

    once.factor = factor;
    g = build(&n, &once, 1, form);
    h = build(&n, &twice, 1, form);
    x = predict(&n, g, &count);
    y = predict(&n, h, &count);
    assert_memory_equal(x, y, count * sizeof *x);
    test_free(x);
    test_free(y);
    generation_unref(g);
    generation_unref(h);
  }
  close_all(a);
  nets_close(&n);
}

/* ---- forms and rows ---- */

/* Of one set, runtime against folded: as far apart as rounding puts them. Measured: be_ref, be_cpu in fp32, in bf16. */
static void test_forms(void **state)
{
  static const struct {
    const struct be_ops *ops;
    int force_f32;
    double f32, bf16;
  } on[] = {{&be_ref, 0, 3.27e-7, 0}, {&be_cpu, 1, 2.21e-6, 0}, {&be_cpu, 0, 2.21e-6, 0.0331}};

  (void)state;
  for (size_t i = 0; i < sizeof on / sizeof *on; i++) {
    const struct be_config cfg = {.threads = 1, .force_f32 = on[i].force_f32};
    struct adapter *a[ADAPTERS];
    struct adapter_use use[ADAPTERS];
    struct generation *runtime, *folded;
    struct nets n;
    size_t count;
    float *x, *y;
    double far, limit;

    nets_open(&n, on[i].ops, &cfg, "sd15", "unet", NULL);
    make_all(n.g, a);
    for (int k = 0; k < ADAPTERS; k++)
      use[k] = use_of(a[k], k % 2 ? -0.5f : 0.75f);
    runtime = build(&n, use, ADAPTERS, FORM_RUNTIME);
    folded = build(&n, use, ADAPTERS, FORM_FOLDED);
    x = predict(&n, runtime, &count);
    y = predict(&n, folded, &count);
    far = distance(x, y, count);
    limit = n.be.act == DT_BF16 ? on[i].bf16 : on[i].f32;
    printf("%s%s: runtime and folded are %.3g apart\n", on[i].ops->name, on[i].force_f32 ? " fp32" : "", far);
    assert_true(far <= 4 * limit);
    test_free(x);
    test_free(y);
    generation_unref(runtime);
    generation_unref(folded);
    close_all(a);
    nets_close(&n);
  }
}

/* Rows of one pass under different generations. be_ref: each as it is alone, whatever its neighbours. be_cpu: as among rows of its own
 * kind when the base's weights are shared, so that every op sees the same count of rows. */
static void test_rows(void **state)
{
  static const int input[4] = {0, 1, 0, 1};
  struct adapter *a[ADAPTERS];
  struct adapter_use use[ADAPTERS];
  struct generation *g[4];
  struct nets n;
  size_t each;

  (void)state;
  for (int cpu = 0; cpu < 2; cpu++) {
    const struct generation *row[4], *same[4];
    float *mixed, *alone;

    nets_open(&n, cpu ? &be_cpu : &be_ref, NULL, "sd15", "unet", NULL);
    make_all(n.g, a);
    for (int k = 0; k < ADAPTERS; k++)
      use[k] = use_of(a[k], 0.5f);
    g[0] = build(&n, &use[0], 1, FORM_RUNTIME);
    g[1] = build(&n, cpu ? &use[3] : use, cpu ? 1 : ADAPTERS, FORM_RUNTIME); /* replaces the attentions' weights where there is a dense member */
    g[2] = generation_ref(n.g);
    g[3] = build(&n, &use[0], 2, cpu ? FORM_RUNTIME : FORM_FOLDED);
    for (int b = 0; b < 4; b++)
      row[b] = g[b];
    mixed = nets_predict(&n, row, input, 4, &each);
    for (int b = 0; b < 4; b++) {
      for (int k = 0; k < 4; k++)
        same[k] = g[b];
      alone = cpu ? nets_predict(&n, same, input, 4, &each) : nets_predict(&n, &row[b], &input[b], 1, &each);
      assert_memory_equal(mixed + (size_t)b * each, alone + (cpu ? (size_t)b * each : 0), each * sizeof *mixed);
      test_free(alone);
    }
    for (int b = 0; b < 2; b++) /* the generations do differ, on the same input */
      assert_true(distance(mixed + (size_t)b * each, mixed + (size_t)(b + 2) * each, each) > 0.01);
    test_free(mixed);
    for (int b = 0; b < 4; b++)
      generation_unref(g[b]);
    close_all(a);
    nets_close(&n);
  }
}

/* ---- what it leaves alone ---- */

static void test_base_stays(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use[ADAPTERS];
  struct weight **before;
  struct nets n;
  size_t count, bytes;
  float *x, *y;

  (void)state;
  nets_open(&n, &be_cpu, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  for (int k = 0; k < ADAPTERS; k++)
    use[k] = use_of(a[k], 0.5f);
  bytes = (size_t)n.g->n * sizeof *before;
  before = test_malloc(bytes);
  memcpy(before, n.g->weight, bytes);
  x = predict(&n, n.g, &count);
  for (int form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
    struct generation *g = build(&n, use, ADAPTERS, (enum generation_form)form);

    y = predict(&n, g, &count);
    assert_true(distance(x, y, count) > 0.01);
    test_free(y);
    y = predict(&n, n.g, &count);
    assert_memory_equal(x, y, count * sizeof *x);
    test_free(y);
    generation_unref(g);
    y = predict(&n, n.g, &count);
    assert_memory_equal(x, y, count * sizeof *x);
    test_free(y);
    assert_memory_equal(before, n.g->weight, bytes);
    assert_int_equal(atomic_load(&n.g->refs), 1);
  }
  test_free(before);
  test_free(x);
  close_all(a);
  nets_close(&n);
}

/* Sites that nothing touches are the base's; low-rank ones keep its weight; the rest have one of their own. */
static void test_borrows(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use[ADAPTERS];
  struct generation *runtime, *folded, *dense, *none;
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  for (int k = 0; k < ADAPTERS; k++)
    use[k] = use_of(a[k], 0.5f);
  runtime = build(&n, use, 1, FORM_RUNTIME);
  folded = build(&n, use, 1, FORM_FOLDED);
  dense = build(&n, &use[1], 2, FORM_RUNTIME);
  none = build(&n, NULL, 0, FORM_RUNTIME);
  assert_int_equal(none->form, FORM_BASE);
  assert_string_not_equal(none->digest, "");
  for (int i = 0; i < n.g->n; i++) {
    int touched = adapter_at(a[0], i) != NULL;

    assert_true(runtime->weight[i] == n.g->weight[i]);
    assert_int_equal(runtime->lowrank[i] != NULL, touched);
    assert_int_equal(folded->weight[i] != n.g->weight[i], touched);
    assert_null(folded->lowrank);
    assert_int_equal(dense->weight[i] != n.g->weight[i], touched); /* low-rank and dense at one site: the sum is dense */
    assert_null(dense->lowrank[i]);
    assert_true(none->weight[i] == n.g->weight[i]);
  }
  assert_true(runtime->bytes > 0 && folded->bytes > runtime->bytes && none->bytes == 0);
  generation_unref(runtime);
  generation_unref(folded);
  generation_unref(dense);
  generation_unref(none);
  close_all(a);
  nets_close(&n);
}

/* Factors that are no smaller than the weight are folded even in the runtime form. */
static void test_large_rank(void **state)
{
  static const struct adapter_plan large = {"large", 24, 0.05f, DELTA_LOWRANK, "unet", 1};
  struct generation *g;
  struct adapter *a;
  struct adapter_use use;
  struct nets n;
  int stacked = 0, replaced = 0;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  a = adapter_make(n.g, &large);
  use = use_of(a, 1);
  g = build(&n, &use, 1, FORM_RUNTIME);
  for (int i = 0; i < a->n; i++) {
    int site = a->delta[i].site;
    const struct site *s = &n.g->site[site];
    int small = 24 * (s->in + s->out) < s->in * s->out;

    assert_int_equal(g->lowrank[site] != NULL, small);
    assert_int_equal(g->weight[site] == n.g->weight[site], small);
    stacked += small;
    replaced += !small;
  }
  assert_true(stacked > 0 && replaced > 0);
  generation_unref(g);
  adapter_close(a);
  nets_close(&n);
}

/* An overlay of every parameter, norms and tables too, with what the base has: not a bit changes. With one gamma more, all does. */
static void test_overlay(void **state)
{
  struct adapter_use use;
  struct adapter *a;
  struct generation *g;
  struct nets n;
  size_t count;
  float *x, *y;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  a = adapter_make(n.g, &plans[0]);
  for (int i = 0; i < a->n; i++)
    free(a->delta[i].up), free(a->delta[i].down);
  a->n = n.g->n;
  a->max_rank = 0;
  for (int i = 0; i < a->n; i++) {
    struct pristine p;

    must(sources_read(&n.sources, &n.g->site[i], &p, &e));
    a->delta[i] = (struct delta){.site = i, .kind = DELTA_REPLACE, .dense = p.w, .bias = p.bias, .scale = 1, .norm = -1};
  }
  use = use_of(a, 1);
  x = predict(&n, n.g, &count);
  for (int changed = 0; changed < 2; changed++) {
    g = build(&n, &use, 1, FORM_RUNTIME);
    for (int i = 0; i < n.g->n; i++)
      assert_true(g->weight[i] != n.g->weight[i] && !g->lowrank[i]);
    y = predict(&n, g, &count);
    assert_int_equal(memcmp(x, y, count * sizeof *x) != 0, changed);
    test_free(y);
    generation_unref(g);
    for (int i = 0; i < n.g->n; i++)
      if (n.g->site[i].kind == WEIGHT_NORM)
        a->delta[i].dense[0] += 0.5f;
  }
  test_free(x);
  adapter_close(a);
  nets_close(&n);
}

/* ---- what it refuses ---- */

static void refused(struct nets *n, const struct adapter_use *use, int count, const struct adapter_bounds *bounds, int code, const char *field)
{
  struct generation *g = n->g;

  for (enum generation_form form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
    e = (struct err){0};
    assert_int_equal(generation_build(&g, n->g, &n->sources, &n->be, use, count, form, bounds, &e), code);
    assert_null(g);
    assert_string_equal(e.field, field);
    assert_int_equal(atomic_load(&n->g->refs), 1);
  }
  e = (struct err){0};
}

static void test_refusals(void **state)
{
  struct adapter_bounds bounds;
  struct adapter *a[ADAPTERS];
  struct adapter_use use[2];
  struct delta saved;
  struct nets n;
  const char *site;
  float *big;

  (void)state;
  adapter_bounds_default(&bounds);
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  use[0] = use[1] = use_of(a[0], 1);
  refused(&n, use, 2, NULL, E_ARG, "attn"); /* twice the same */
  use[0].weight = NAN;
  refused(&n, use, 1, NULL, E_ARG, "attn");
  use[0].weight = -INFINITY;
  refused(&n, use, 1, NULL, E_ARG, "attn");
  use[0].weight = 1;
  site = n.g->site[a[0]->delta[0].site].name;
  bounds.max_rank = 3;
  refused(&n, use, 1, &bounds, E_FILE, site);
  bounds.max_rank = 4;
  saved = a[0]->delta[5];
  a[0]->delta[5].scale = 1000;
  refused(&n, use, 1, &bounds, E_FILE, n.g->site[saved.site].name); /* 250 times the weight's norm */
  a[0]->delta[5].scale = NAN;
  refused(&n, use, 1, &bounds, E_FILE, n.g->site[saved.site].name);
  a[0]->delta[5].scale = 100;
  bounds.max_norm_ratio = 1e30;
  use[0].weight = 1e37f; /* each is finite; the product is not */
  refused(&n, use, 1, &bounds, E_FILE, n.g->site[saved.site].name);
  use[0].weight = 1;
  a[0]->delta[5] = saved;
  big = calloc((size_t)n.g->site[saved.site].out, sizeof *big);
  assert_non_null(big);
  a[0]->delta[5].bias = big;
  assert_int_equal(n.g->site[saved.site].has_bias, 0);
  refused(&n, use, 1, NULL, E_FILE, n.g->site[saved.site].name); /* a bias where there is none */
  free(big);
  a[0]->delta[5] = saved;
  a[0]->delta[5].site = saved.site - 1; /* out of order */
  a[0]->delta[4].site = saved.site;
  refused(&n, use, 1, NULL, E_INTERNAL, "attn");
  close_all(a);
  nets_close(&n);
}

/* A bias alone can be out of bounds too. */
static void test_bias_bound(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use;
  struct nets n;
  struct delta *d;
  int k = 0;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  while (!n.g->site[a[3]->delta[k].site].has_bias)
    k++;
  d = &a[3]->delta[k];
  d->bias = calloc((size_t)n.g->site[d->site].out, sizeof *d->bias);
  assert_non_null(d->bias);
  use = use_of(a[3], 1);
  generation_unref(build(&n, &use, 1, FORM_RUNTIME));
  d->bias[1] = 1e6f;
  refused(&n, &use, 1, NULL, E_FILE, n.g->site[d->site].name);
  close_all(a);
  nets_close(&n);
}

static void test_misuse(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use;
  struct generation *g, *over;
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  use = use_of(a[0], 1);
  g = build(&n, &use, 1, FORM_FOLDED);
  assert_int_equal(generation_build(&over, g, &n.sources, &n.be, &use, 1, FORM_FOLDED, NULL, &e), E_INTERNAL); /* never on another */
  assert_int_equal(generation_build(&over, n.g, &n.sources, &n.be, &use, 1, FORM_BASE, NULL, &e), E_INTERNAL);
  e = (struct err){0};
  generation_unref(g);
  close_all(a);
  nets_close(&n);
}

/* A checkpoint that somebody rewrites while it is served: an error at the next build, and not a crash. */
static void test_rewritten(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use;
  struct generation *g;
  struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 1000}};
  char path[512];
  struct nets n;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  use = use_of(a[0], 1);
  snprintf(path, sizeof path, "%s/unet/diffusion_pytorch_model.safetensors", nets_dir(&n));
  assert_int_equal(utimensat(AT_FDCWD, path, times, 0), 0);
  assert_int_equal(generation_build(&g, n.g, &n.sources, &n.be, &use, 1, FORM_FOLDED, NULL, &e), E_FILE);
  assert_non_null(strstr(e.msg, "rewritten"));
  e = (struct err){0};
  close_all(a);
  nets_close(&n);
  nets_cleanup(); /* other tests write it again */
}

/* ---- what goes wrong ---- */

static int until_failure;

static int weight_load_failing(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *err)
{
  *w = NULL;
  if (!until_failure--)
    return err_set(err, E_NOMEM, "planted");
  return be_ref.weight_load(be, d, like, w, err);
}

static int lowrank_load_failing(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *err)
{
  *l = NULL;
  if (!until_failure--)
    return err_set(err, E_NOMEM, "planted");
  return be_ref.lowrank_load(be, d, l, err);
}

/* Each load of the backend fails in turn: the cause comes back, nothing is held, and the base is what it was. */
static void test_load_fails(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use[2];
  struct nets n;
  size_t count;
  float *x, *y;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  use[0] = use_of(a[3], 1); /* factors */
  use[1] = use_of(a[2], 1); /* weights */
  x = predict(&n, n.g, &count);
  generation_unref(build(&n, use, 2, FORM_RUNTIME)); /* what the backend keeps is kept */
  n.ops.weight_load = weight_load_failing;
  n.ops.lowrank_load = lowrank_load_failing;
  for (int nth = 0;; nth += 1 + nth / 3) {
    struct generation *g = n.g;
    long held = fail_alloc_live();
    int code;

    until_failure = nth;
    e = (struct err){0};
    code = generation_build(&g, n.g, &n.sources, &n.be, use, 2, FORM_RUNTIME, NULL, &e);
    if (!code) {
      assert_true(nth > a[2]->n && until_failure >= 0);
      generation_unref(g);
      break;
    }
    assert_int_equal(code, E_NOMEM);
    assert_non_null(strstr(e.msg, "planted"));
    assert_null(g);
    assert_int_equal(atomic_load(&n.g->refs), 1);
    assert_int_equal(fail_alloc_live(), held);
  }
  y = predict(&n, n.g, &count);
  assert_memory_equal(x, y, count * sizeof *x);
  test_free(x);
  test_free(y);
  close_all(a);
  nets_close(&n);
}

/* The same with every allocation of the program. Under a sanitizer nothing fails here. */
static void test_alloc_fails(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use[2];
  struct nets n;
  long failed = 0;

  (void)state;
  if (!fail_alloc_works())
    skip();
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  use[0] = use_of(a[3], 1);
  use[1] = use_of(a[2], 1);
  generation_unref(build(&n, use, 2, FORM_RUNTIME)); /* what is cached is cached */
  for (long nth = 0;; nth += 1 + nth / 4) {
    struct generation *g = n.g;
    long held = fail_alloc_live();
    int code, fired;

    e = (struct err){0};
    fail_alloc_after(nth);
    code = generation_build(&g, n.g, &n.sources, &n.be, use, 2, FORM_RUNTIME, NULL, &e);
    fired = fail_alloc_stop();
    if (!fired) {
      must(code);
      generation_unref(g);
      break;
    }
    assert_int_equal(code, E_NOMEM);
    assert_null(g);
    assert_int_equal(atomic_load(&n.g->refs), 1);
    assert_int_equal(fail_alloc_live(), held);
    failed++;
  }
  printf("%ld allocations failed in turn\n", failed);
  assert_true(failed > 15);
  close_all(a);
  nets_close(&n);
}

/* And while a set is measured for the guard, with factors to be kept. */
static void test_guard_alloc_fails(void **state)
{
  struct adapter *a[ADAPTERS];
  struct adapter_use use[3];
  struct nets n;
  long failed = 0;

  (void)state;
  if (!fail_alloc_works())
    skip();
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  make_all(n.g, a);
  use[0] = use_of(a[0], 1);
  use[1] = (struct adapter_use){.adapter = a[0], .weight = -0.5f};
  use[2] = (struct adapter_use){.adapter = a[2], .weight = 0.25f}; /* without factors */
  for (long nth = 0;; nth += 1 + nth / 4) {
    struct guard_report r;
    long held = fail_alloc_live();
    int code, fired;

    e = (struct err){0};
    fail_alloc_after(nth);
    code = guard_measure(&r, n.g, &n.sources, use, 3, 0.1, &e);
    fired = fail_alloc_stop();
    if (!fired) {
      must(code);
      assert_non_null(r.factor[0]);
      guard_free(&r);
      assert_int_equal(fail_alloc_live(), held);
      break;
    }
    assert_int_equal(code, E_NOMEM);
    assert_null(r.of);
    assert_int_equal(fail_alloc_live(), held);
    failed++;
  }
  assert_true(failed > 10);
  close_all(a);
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
  const struct CMUnitTest tests[] = {
    cmocka_unit_test(test_order),      cmocka_unit_test(test_digest),     cmocka_unit_test(test_factor),
    cmocka_unit_test(test_forms),      cmocka_unit_test(test_rows),       cmocka_unit_test(test_base_stays),
    cmocka_unit_test(test_borrows),    cmocka_unit_test(test_large_rank), cmocka_unit_test(test_overlay),
    cmocka_unit_test(test_refusals),
    cmocka_unit_test(test_bias_bound), cmocka_unit_test(test_misuse),     cmocka_unit_test(test_rewritten),
    cmocka_unit_test(test_load_fails), cmocka_unit_test(test_alloc_fails), cmocka_unit_test(test_guard_alloc_fails)};

  return cmocka_run_group_tests(tests, NULL, cleanup);
}
