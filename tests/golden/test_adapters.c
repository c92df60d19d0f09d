/*
 * test_adapters.c - every format of adapter files against the library that defines it: the files of tests/golden/adapters, what
 * diffusers, PEFT and LyCORIS add to each weight (adapters.safetensors), and the UNet's output under them. Then the mistakes that must not
 * pass. Run from the root of the repository.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/adapter.h"
#include "models/sources.h"
#include "tests/golden/fail_alloc.h"
#include "tests/golden/networks.h"

#define FOLDER "tests/golden/adapters/"

/* What a file must be read as, and what was measured: the largest difference of dW as a share of the largest value, and of the output.
 * Where a difference is exact, 3e-8, half a step of fp32, stands for 0. */
static const struct golden_case {
  const char *name, *path, *ckpt, *format;
  enum scale_rule rule;
  double dw, epsilon;               /* epsilon 0: there is no golden of the output */
} cases[] = {
  {"diffusers_new", "diffusers_new.safetensors", "sd15", "diffusers", SCALE_NONE, 9.41e-08, 1.16e-06},
  {"diffusers_mixed", "diffusers_mixed.safetensors", "sd15", "diffusers", SCALE_NONE, 1.55e-07, 8.29e-07},
  {"diffusers_text", "diffusers_text.safetensors", "sd15", "diffusers", SCALE_NONE, 7.29e-08, 1.41e-06},
  {"diffusers_old", "diffusers_old.safetensors", "sd15", "processor", SCALE_NONE, 8.62e-08, 1.25e-06},
  {"diffusers_bare", "diffusers_bare.safetensors", "sd15", "processor", SCALE_NONE, 9.71e-08, 1.25e-06},
  {"diffusers_metadata", "diffusers_metadata.safetensors", "sd15", "diffusers", SCALE_METADATA, 1.26e-07, 9.3e-07},
  {"peft_folder", "peft_folder", "sd15", "peft", SCALE_CONFIG, 8.46e-08, 1.97e-06},
  {"peft_default", "peft_default", "sd15", "peft", SCALE_CONFIG, 1.69e-07, 1.31e-06},
  {"peft_patterns", "peft_patterns", "sd15", "peft", SCALE_CONFIG, 9.15e-08, 1.11e-06},
  {"peft_dora", "peft_dora", "sd15", "peft", SCALE_CONFIG, 1.42e-07, 1.3e-06},
  {"peft_bias", "peft_bias", "sd15", "peft", SCALE_CONFIG, 1.19e-07, 8.53e-07},
  {"kohya_sd15", "kohya_sd15.safetensors", "sd15", "kohya", SCALE_ALPHA, 1.87e-07, 1.03e-06},
  {"kohya_half", "kohya_half.safetensors", "sd15", "kohya", SCALE_NONE, 1.1e-07, 0},
  {"kohya_sdxl", "kohya_sdxl.safetensors", "sdxl", "kohya-sgm", SCALE_ALPHA, 1.17e-07, 1.56e-06},
  {"kohya_locon", "kohya_locon.safetensors", "sd15", "kohya", SCALE_ALPHA, 1.23e-07, 1.23e-06},
  {"lycoris_lora", "lycoris_lora.safetensors", "sd15", "lycoris", SCALE_ALPHA, 1.01e-07, 8.41e-07},
  {"lycoris_loha", "lycoris_loha.safetensors", "sd15", "lycoris loha", SCALE_ALPHA, 1.86e-07, 1.49e-06},
  {"lycoris_loha_tucker", "lycoris_loha_tucker.safetensors", "sd15", "lycoris loha", SCALE_ALPHA, 5.97e-07, 1.09e-06},
  {"lycoris_lokr", "lycoris_lokr.safetensors", "sd15", "lycoris lokr", SCALE_ALPHA, 1.7e-07, 1.04e-06},
  {"lycoris_lokr_both", "lycoris_lokr_both.safetensors", "sd15", "lycoris lokr", SCALE_ALPHA, 3.26e-07, 9.54e-07},
  {"lycoris_lokr_full", "lycoris_lokr_full.safetensors", "sd15", "lycoris lokr", SCALE_NONE, 8.38e-08, 1e-06},
  {"lycoris_lokr_tucker", "lycoris_lokr_tucker.safetensors", "sd15", "lycoris lokr", SCALE_ALPHA, 1.74e-07, 1.26e-06},
  {"lycoris_full", "lycoris_full.safetensors", "sd15", "lycoris full", SCALE_NONE, 3e-08, 1.16e-06},
  {"lycoris_dora_in", "lycoris_dora_in.safetensors", "sd15", "lycoris", SCALE_ALPHA, 4.7e-07, 1.08e-06},
  {"lycoris_dora_out", "lycoris_dora_out.safetensors", "sd15", "lycoris", SCALE_ALPHA, 3.62e-07, 9.43e-07},
  {"lycoris_dora_loha", "lycoris_dora_loha.safetensors", "sd15", "lycoris loha", SCALE_ALPHA, 6.1e-07, 1.57e-06},
  {"overlay_attn1", "overlay_attn1.safetensors", "sd15", "overlay", SCALE_NONE, 3e-08, 1.44e-06},
  {"overlay_half", "overlay_half.safetensors", "sd15", "overlay", SCALE_NONE, 3e-08, 1.19e-06},
  {"overlay_bf16", "overlay_bf16.safetensors", "sd15", "overlay", SCALE_NONE, 3e-08, 1.04e-06},
};

enum { CASES = sizeof cases / sizeof *cases };

/* What the tests share: both tiny checkpoints, and the goldens. */
static struct nets sd15, sdxl;
static struct safetensors *goldens, *metadata;
static struct err e;

static void must(int code)
{
  if (code)
    fail_msg("%s (%s)", e.msg, e.field);
}

static const struct st_tensor *golden(const struct golden_case *c, const char *what)
{
  char key[256];

  snprintf(key, sizeof key, "%s.%s", c->name, what);
  return st_find(strcmp(c->name, "diffusers_metadata") ? goldens : metadata, key);
}

/* Golden tensors of the case, the output left out. */
static int golden_count(const struct golden_case *c)
{
  const struct safetensors *st = strcmp(c->name, "diffusers_metadata") ? goldens : metadata;
  size_t i, len = strlen(c->name);
  int n = 0;

  for (i = 0; i < st_count(st); i++)
    n += !strncmp(st_at(st, i)->name, c->name, len) && st_at(st, i)->name[len] == '.' && strcmp(st_at(st, i)->name + len, ".epsilon");
  return n;
}

static struct adapter *open_case(const struct golden_case *c)
{
  struct nets *n = strcmp(c->ckpt, "sdxl") ? &sd15 : &sdxl;
  struct adapter_names *names;
  struct adapter_bounds bounds;
  struct adapter *a;
  char path[128];

  snprintf(path, sizeof path, FOLDER "%s", c->path);
  adapter_bounds_default(&bounds);
  must(adapter_names_new(&names, n->g, 2, &e));
  must(adapter_open(&a, path, names, &bounds, &e));
  adapter_names_free(names);
  return a;
}

/* The largest difference from t as a share of t's largest value; infinite when shapes or numbers do not fit. */
static double difference(const float *got, int64_t n, const struct st_tensor *t)
{
  double most = 0, worst = 0, d;
  int64_t i;
  float want;

  if (t->type != ST_F32 || (int64_t)t->bytes != 4 * n)
    return INFINITY;
  for (i = 0; i < n; i++) {
    memcpy(&want, (const char *)t->data + 4 * i, 4);
    most = fmax(most, fabs((double)want));
    d = fabs((double)got[i] - want);
    worst = d <= worst ? worst : d; /* a NaN goes in and stays */
  }
  return worst / most;
}

static double frobenius(const float *p, int64_t n)
{
  double sum = 0;
  int64_t i;

  for (i = 0; i < n; i++)
    sum += (double)p[i] * p[i];
  return sqrt(sum);
}

/* The worst error of dW and of its norm over all layers of the case; infinite when a layer is missing or one too many. */
static double weights_error(const struct golden_case *c, const struct adapter *a, int *golden_tensors)
{
  struct nets *n = strcmp(c->ckpt, "sdxl") ? &sd15 : &sdxl;
  double worst = 0, d;
  int i, seen = 0;

  for (i = 0; i < a->n; i++) {
    const struct site *s = &n->g->site[a->delta[i].site];
    const struct st_tensor *t = golden(c, s->name);
    char bias_name[200];
    const struct st_tensor *tb;
    struct pristine p;
    float *w, *b;

    snprintf(bias_name, sizeof bias_name, "%s.bias", s->name);
    tb = golden(c, bias_name);
    must(sources_read(&n->sources, s, &p, &e));
    w = test_calloc((size_t)p.count, sizeof *w);
    b = test_calloc((size_t)s->out, sizeof *b);
    delta_apply(&a->delta[i], s, p.w, p.bias, 1, w, b);
    d = t ? difference(w, p.count, t) : INFINITY;
    worst = d <= worst ? worst : d;
    d = fabs(delta_norm(&a->delta[i], s, p.w) / frobenius(w, p.count) - 1);
    worst = d <= worst ? worst : d;
    if (tb)
      d = a->delta[i].bias ? difference(b, s->out, tb) : INFINITY;
    else
      d = a->delta[i].bias && frobenius(b, s->out) > 0 ? INFINITY : 0;
    worst = d <= worst ? worst : d;
    seen += 1 + (tb != NULL);
    test_free(w);
    test_free(b);
    pristine_free(&p);
  }
  *golden_tensors = seen;
  return seen == golden_count(c) ? worst : INFINITY;
}

static void test_weights(void **state)
{
  int i, seen, bad = 0;

  (void)state;
  for (i = 0; i < CASES; i++) {
    const struct golden_case *c = &cases[i];
    struct adapter *a = open_case(c);
    double error = weights_error(c, a, &seen);
    int ok = 1, k;

    ok = ok && error <= 4 * c->dw;
    ok = ok && !strcmp(a->format, c->format);
    for (k = 0; k < a->n; k++)
      ok = ok && a->delta[k].rule == c->rule;
    printf("%-20s %-14s %2d tensors, %.3g%s\n", c->name, a->format, seen, error, ok ? "" : ": WRONG");
    bad += !ok;
    adapter_close(a);
  }
  assert_int_equal(bad, 0);
}

/* The UNet under the adapter alone, in both forms. */
static double output_error(const struct golden_case *c, const struct adapter *a, enum generation_form form)
{
  struct nets *n = strcmp(c->ckpt, "sdxl") ? &sd15 : &sdxl;
  struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  struct generation *base = n->g;
  struct adapter_bounds bounds;
  struct net_error got;

  adapter_bounds_default(&bounds);
  bounds.max_norm_ratio = 100; /* these differences are as large as the weights, so that errors show */
  must(generation_build(&n->g, base, &n->sources, &n->be, &use, 1, form, &bounds, &e));
  got = nets_check_output(n, golden(c, "epsilon"));
  generation_unref(n->g);
  n->g = base;
  return got.max;
}

static void test_outputs(void **state)
{
  int i, bad = 0, checked = 0;

  (void)state;
  for (i = 0; i < CASES; i++) {
    const struct golden_case *c = &cases[i];
    struct adapter *a = open_case(c);
    enum generation_form form;

    for (form = FORM_RUNTIME; form <= FORM_FOLDED && golden(c, "epsilon"); form++) {
      double error = output_error(c, a, form);
      int ok = 1;

      ok = ok && error <= 4 * c->epsilon;
      printf("%-20s %s %.3g%s\n", c->name, form == FORM_FOLDED ? "folded " : "runtime", error, ok ? "" : ": WRONG");
      bad += !ok;
      checked++;
    }
    adapter_close(a);
  }
  assert_true(checked > 2 * (CASES - 3));
  assert_int_equal(bad, 0);
}

/* ---- mistakes ---- */

static void ignore_scale(struct delta *d, const struct site *s)
{
  (void)s;
  d->scale = 1;
}

/* sqrt(r) for r, or the reverse. */
static void scale_by_root(struct delta *d, const struct site *s)
{
  (void)s;
  d->scale /= sqrtf((float)d->rank);
}

/* up taken for down: of a square layer, dW transposed. */
static void swap_factors(struct delta *d, const struct site *s)
{
  float *down = test_malloc((size_t)(d->rank * s->in) * sizeof *down);
  int64_t i, r;

  if (s->in == s->out && s->kind == WEIGHT_LINEAR) {
    for (i = 0; i < s->in; i++)
      for (r = 0; r < d->rank; r++)
        down[r * s->in + i] = d->up[i * d->rank + r];
    for (i = 0; i < s->in; i++)
      for (r = 0; r < d->rank; r++)
        d->up[i * d->rank + r] = d->down[r * s->in + i];
    memcpy(d->down, down, (size_t)(d->rank * s->in) * sizeof *down);
  }
  test_free(down);
}

/* kron(w2, w1) for kron(w1, w2), w1 4 x 4. */
static void swap_kron(struct delta *d, const struct site *s)
{
  int64_t taps = s->kind == WEIGHT_CONV ? (int64_t)s->kh * s->kw : 1, n = s->out * s->in * taps, C = s->out / 4, D = s->in / 4, o, i, k;
  float *w = test_malloc((size_t)n * sizeof *w);

  for (o = 0; o < s->out; o++)
    for (i = 0; i < s->in; i++)
      for (k = 0; k < taps; k++)
        w[((o % C * 4 + o / C) * s->in + i % D * 4 + i / D) * taps + k] = d->dense[(o * s->in + i) * taps + k];
  memcpy(d->dense, w, (size_t)n * sizeof *w);
  test_free(w);
}

static void turn_magnitude(struct delta *d, const struct site *s)
{
  if (s->in == s->out)
    d->magnitude_per_row = !d->magnitude_per_row;
}

/* A kernel read as (ky, kx, in). */
static void turn_kernel(struct delta *d, const struct site *s)
{
  int64_t taps = s->kind == WEIGHT_CONV ? (int64_t)s->kh * s->kw : 1, n = d->rank * s->in * taps, i;
  float *down = test_malloc((size_t)n * sizeof *down);

  for (i = 0; i < n; i++)
    down[i] = d->down[(i / (s->in * taps) * taps + i % taps) * s->in + i / taps % s->in];
  memcpy(d->down, down, (size_t)n * sizeof *down);
  test_free(down);
}

static void add_overlay(struct delta *d, const struct site *s)
{
  (void)s;
  d->kind = DELTA_DENSE; /* W0 + W' in place of W' */
}

static void drop_bias(struct delta *d, const struct site *s)
{
  (void)s;
  free(d->bias);
  d->bias = NULL;
}

static const struct mistake {
  const char *name, *golden;
  void (*spoil)(struct delta *d, const struct site *s);
} mistakes[] = {
  {"alpha ignored", "kohya_sd15", ignore_scale},
  {"alpha ignored, SGM names", "kohya_sdxl", ignore_scale},
  {"alpha ignored, LoHa", "lycoris_loha", ignore_scale},
  {"alpha ignored, LoKr", "lycoris_lokr", ignore_scale},
  {"metadata ignored", "diffusers_metadata", ignore_scale},
  {"adapter_config.json ignored", "peft_folder", ignore_scale},
  {"rslora misread", "peft_patterns", scale_by_root},
  {"up and down swapped", "diffusers_new", swap_factors},
  {"up and down swapped, DoRA", "peft_dora", swap_factors},
  {"kernel turned", "kohya_sd15", turn_kernel},
  {"kernel of a core turned", "kohya_locon", turn_kernel},
  {"order of the Kronecker product", "lycoris_lokr", swap_kron},
  {"order of the Kronecker product, both whole", "lycoris_lokr_full", swap_kron},
  {"wrong axis of DoRA, LyCORIS' rows", "lycoris_dora_out", turn_magnitude},
  {"wrong axis of DoRA, columns", "lycoris_dora_in", turn_magnitude},
  {"wrong axis of DoRA, PEFT", "peft_dora", turn_magnitude},
  {"overlay added", "overlay_attn1", add_overlay},
  {"bias of an overlay forgotten", "overlay_attn1", drop_bias},
  {"bias of full differences forgotten", "lycoris_full", drop_bias},
  {"bias of PEFT forgotten", "peft_bias", drop_bias},
};

static void test_mistakes(void **state)
{
  int missed = 0, seen, k;
  size_t i;

  (void)state;
  for (i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
    const struct mistake *m = &mistakes[i];
    const struct golden_case *c = cases;
    struct adapter *a;
    double error;
    int ok = 1;

    while (strcmp(c->name, m->golden))
      c++;
    a = open_case(c);
    for (k = 0; k < a->n; k++)
      m->spoil(&a->delta[k], &(strcmp(c->ckpt, "sdxl") ? &sd15 : &sdxl)->g->site[a->delta[k].site]);
    error = weights_error(c, a, &seen);
    ok = ok && error <= 4 * c->dw;
    printf("%s: %.3g%s\n", m->name, error, ok ? ": NOT NOTICED" : "");
    missed += ok;
    adapter_close(a);
  }
  assert_int_equal(missed, 0);
}

/* ---- memory that runs out ---- */

/* Every allocation while a file is opened, one after the other: refused with nothing lost, or, where the C library can do without (qsort), opened
 * as ever. Under a sanitizer nothing fails here. */
static void test_alloc_fails(void **state)
{
  struct adapter_names *names;
  struct adapter_bounds bounds;
  long failed = 0, nth, held;
  int i, seen;

  (void)state;
  if (!fail_alloc_works())
    skip();
  adapter_bounds_default(&bounds);
  must(adapter_names_new(&names, sd15.g, 2, &e));
  for (i = 0; i < CASES; i++) {
    char path[128];
    int fired = 1;

    if (strcmp(cases[i].ckpt, "sd15"))
      continue;
    snprintf(path, sizeof path, FOLDER "%s", cases[i].path);
    for (nth = 0; fired; nth++) {
      struct adapter *a = NULL;
      struct err one = {0};
      int code;

      held = fail_alloc_live();
      fail_alloc_after(nth);
      code = adapter_open(&a, path, names, &bounds, &one);
      fired = fail_alloc_stop();
      if (code ? !fired || a || !one.msg[0] : !(weights_error(&cases[i], a, &seen) <= 4 * cases[i].dw))
        fail_msg("%s, allocation %ld: code %d, %s", cases[i].name, nth, code, one.msg);
      adapter_close(a);
      assert_int_equal(fail_alloc_live(), held);
      failed += code != 0;
    }
  }
  printf("%ld allocations failed in turn\n", failed);
  assert_true(failed > 500);
  adapter_names_free(names);
}

/* And while the names are made. */
static void test_names_alloc_fails(void **state)
{
  struct adapter_names *names;
  long failed = 0, nth, held;
  int fired = 1;

  (void)state;
  if (!fail_alloc_works())
    skip();
  for (nth = 0; fired; nth += 1 + nth / 4) {
    struct err one = {0};
    int code;

    held = fail_alloc_live();
    fail_alloc_after(nth);
    code = adapter_names_new(&names, sd15.g, 2, &one);
    fired = fail_alloc_stop();
    assert_true(code == 0 || (code == E_NOMEM && fired)); /* vasprintf can do without its last */
    assert_true(!code == (names != NULL));
    assert_true(code || adapter_names_find(names, "lora_te_text_model_encoder_layers_0_self_attn_q_proj") != SITE_NONE);
    adapter_names_free(names);
    assert_int_equal(fail_alloc_live(), held);
    failed += code != 0;
  }
  assert_true(failed > 5);
}

/* ---- */

static int setup(void **state)
{
  (void)state;
  nets_open(&sd15, &be_ref, NULL, "sd15", "unet text", NULL);
  nets_open(&sdxl, &be_ref, NULL, "sdxl", "unet", NULL);
  must(st_open(&goldens, "tests/golden/adapters.safetensors", &e));
  must(st_open(&metadata, "tests/golden/adapters_metadata.safetensors", &e));
  return 0;
}

static int cleanup(void **state)
{
  (void)state;
  st_close(goldens);
  st_close(metadata);
  nets_close(&sd15);
  nets_close(&sdxl);
  nets_cleanup();
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_weights), cmocka_unit_test(test_outputs), cmocka_unit_test(test_mistakes),
                                     cmocka_unit_test(test_alloc_fails), cmocka_unit_test(test_names_alloc_fails)};

  return cmocka_run_group_tests(tests, setup, cleanup);
}
