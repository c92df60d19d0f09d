/*
 * test_lora.c - generations with adapters against PEFT: tests/golden/lora_sd15.safetensors on be_ref and be_cpu, in both forms, and the
 * mistakes that must not pass. Run from the root of the repository.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/golden/make_adapter.h"
#include "tests/golden/networks.h"

enum { MEMBERS = 2, CASES = 5 };

/* A set, and what was measured: be_ref and be_cpu in fp32 and in bf16, the worse of both forms. */
static const struct golden_case {
  const char *name, *what;
  const char *plan[MEMBERS];
  float weight[MEMBERS];
  struct net_error ref, f32, bf16;
} cases[CASES] = {
  {"attn", "unet", {"attn"}, {1}, {8.67e-07, 9.84e-07}, {1.73e-06, 1.67e-06}, {0.0156, 0.0187}},
  {"wide", "unet", {"wide"}, {1}, {1.56e-06, 1.3e-06}, {2.41e-06, 2.28e-06}, {0.0239, 0.0274}},
  {"two", "unet", {"attn", "wide"}, {0.7f, -0.4f}, {8.67e-07, 9.84e-07}, {1.73e-06, 1.67e-06}, {0.0156, 0.0187}},
  {"dora", "unet", {"dora"}, {1}, {9.33e-07, 9.56e-07}, {1.41e-06, 1.63e-06}, {0.0145, 0.0165}},
  {"text", "text", {"text"}, {1}, {7.11e-07, 4.31e-07}, {9.92e-07, 5.6e-07}, {0.011, 0.0082}},
};

static const char *const form_name[] = {[FORM_RUNTIME] = "runtime", [FORM_FOLDED] = "folded"};

static int within(struct net_error got, struct net_error measured)
{
  int ok = 1;

  ok = ok && got.max <= 4 * measured.max;
  ok = ok && got.rms <= 4 * measured.rms;
  return ok;
}

/* ---- mistakes ---- */

struct mistake {
  const char *name;
  const char *golden;               /* the case that must notice */
  void (*spoil)(struct adapter *a, const struct generation *base);
  void (*set)(struct adapter_use *use, int *n);
  int twice;                        /* the first member again: what comes of a base that is folded already */
};

static void drop_scale(struct adapter *a, const struct generation *base)
{
  (void)base;
  for (int i = 0; i < a->n; i++)
    a->delta[i].scale = 1;
}

/* alpha divided by a rank of the whole file in place of the module's. */
static void scale_by_two(struct adapter *a, const struct generation *base)
{
  (void)base;
  for (int i = 0; i < a->n; i++)
    a->delta[i].scale *= 0.75f;
}

/* up read as (rank, out). */
static void transpose_up(struct adapter *a, const struct generation *base)
{
  for (int i = 0; i < a->n; i++) {
    struct delta *d = &a->delta[i];
    int64_t out = base->site[d->site].out;
    float *up = malloc((size_t)(out * d->rank) * sizeof *up);

    assert_non_null(up);
    for (int64_t k = 0; k < out * d->rank; k++)
      up[k] = d->up[k % d->rank * out + k / d->rank];
    free(d->up);
    d->up = up;
  }
}

/* The kernel of down read as (ky, kx, in). */
static void transpose_down(struct adapter *a, const struct generation *base)
{
  for (int i = 0; i < a->n; i++) {
    struct delta *d = &a->delta[i];
    const struct site *s = &base->site[d->site];
    int64_t taps = s->kind == WEIGHT_CONV ? (int64_t)s->kh * s->kw : 1;
    float *down = malloc((size_t)(d->rank * s->in * taps) * sizeof *down);

    assert_non_null(down);
    for (int64_t k = 0; k < d->rank * s->in * taps; k++) {
      int64_t r = k / (s->in * taps), c = k / taps % s->in, tap = k % taps;

      down[k] = d->down[(r * taps + tap) * s->in + c];
    }
    free(d->down);
    d->down = down;
  }
}

static void lose_last_site(struct adapter *a, const struct generation *base)
{
  (void)base;
  a->n -= 1; /* its memory goes with the copy that the test holds */
}

static void norm_over_columns(struct adapter *a, const struct generation *base)
{
  for (int i = 0; i < a->n; i++)
    a->delta[i].magnitude_per_row &= base->site[a->delta[i].site].in != base->site[a->delta[i].site].out;
}

static void subtract(struct adapter_use *use, int *n)
{
  for (int i = 0; i < *n; i++)
    use[i].weight = -use[i].weight;
}

static void forget_one(struct adapter_use *use, int *n)
{
  (void)use;
  --*n;
}

static void forget_weight(struct adapter_use *use, int *n)
{
  (void)n;
  use[0].weight = 1;
}

static const struct mistake mistakes[] = {
  {.name = "scale dropped", .golden = "attn", .spoil = drop_scale},
  {.name = "wrong rank under alpha", .golden = "wide", .spoil = scale_by_two},
  {.name = "up transposed", .golden = "attn", .spoil = transpose_up},
  {.name = "kernel of down transposed", .golden = "wide", .spoil = transpose_down},
  {.name = "one site not covered", .golden = "attn", .spoil = lose_last_site},
  {.name = "DoRA normalised over columns", .golden = "dora", .spoil = norm_over_columns},
  {.name = "delta subtracted", .golden = "attn", .set = subtract},
  {.name = "delta subtracted, text encoder", .golden = "text", .set = subtract},
  {.name = "one member forgotten", .golden = "two", .set = forget_one},
  {.name = "weight forgotten", .golden = "two", .set = forget_weight},
  {.name = "built on a folded generation", .golden = "attn", .twice = 1},
};

/* ---- running a case ---- */

/* n's base is in n->g before and after. */
static struct net_error run_case(struct nets *n, const struct golden_case *c, enum generation_form form, const struct mistake *m)
{
  struct adapter *made[MEMBERS + 1] = {NULL};
  struct adapter_use use[MEMBERS + 1];
  struct generation *base = n->g;
  struct net_error got;
  struct err e = {0};
  int count = 0, used, last = 0;

  for (; count < MEMBERS && c->plan[count]; count++) {
    made[count] = adapter_make(base, adapter_plan_find(c->plan[count]));
    last = made[count]->n;
    if (m && m->spoil)
      m->spoil(made[count], base);
    use[count] = (struct adapter_use){.adapter = made[count], .weight = c->weight[count], .required = 1};
  }
  if (m && m->twice) {
    made[count] = adapter_copy(base, made[0], "again");
    use[count] = (struct adapter_use){.adapter = made[count], .weight = c->weight[0], .required = 1};
    last = made[count++]->n;
  }
  used = count;
  if (m && m->set)
    m->set(use, &used);
  if (generation_build(&n->g, base, &n->sources, &n->be, use, used, form, NULL, &e))
    fail_msg("%s: %s", c->name, e.msg);
  got = nets_check_lora(n, c->name);
  generation_unref(n->g);
  n->g = base;
  for (int i = 0; i < count; i++) {
    made[i]->n = i == count - 1 ? last : made[i]->n;
    adapter_close(made[i]);
  }
  return got;
}

static void check(const struct be_ops *ops, int force_f32)
{
  const struct be_config cfg = {.threads = 1, .force_f32 = force_f32};
  struct nets n;

  for (int i = 0; i < CASES; i++) {
    const struct golden_case *c = &cases[i];

    nets_open(&n, ops, &cfg, "sd15", c->what, NULL);
    for (enum generation_form form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
      struct net_error got = run_case(&n, c, form, NULL);
      struct net_error limit = ops == &be_ref ? c->ref : n.be.act == DT_BF16 ? c->bf16 : c->f32;

      printf("%-4s %-4s %-7s max %.3g, rms %.3g\n", ops->name, c->name, form_name[form], got.max, got.rms);
      if (!within(got, limit))
        fail_msg("%s on %s is out of tolerance", c->name, ops->name);
    }
    nets_close(&n);
  }
}

static void test_ref(void **state)
{
  (void)state;
  check(&be_ref, 0);
}

static void test_cpu_f32(void **state)
{
  (void)state;
  check(&be_cpu, 1);
}

static void test_cpu(void **state)
{
  (void)state;
  check(&be_cpu, 0);
}

static void test_mistakes(void **state)
{
  struct nets n;
  int missed = 0;

  (void)state;
  for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
    const struct mistake *m = &mistakes[i];
    const struct golden_case *c = cases;

    while (strcmp(c->name, m->golden))
      c++;
    nets_open(&n, &be_ref, NULL, "sd15", c->what, NULL);
    for (enum generation_form form = FORM_RUNTIME; form <= FORM_FOLDED; form++) {
      struct net_error got = run_case(&n, c, form, m);
      int noticed = !within(got, c->ref);

      printf("%s, %s: rms %.3g%s\n", m->name, form_name[form], got.rms, noticed ? "" : ": NOT NOTICED");
      missed += !noticed;
    }
    nets_close(&n);
  }
  assert_int_equal(missed, 0);
}

static int cleanup(void **state)
{
  (void)state;
  nets_cleanup();
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_ref), cmocka_unit_test(test_cpu_f32), cmocka_unit_test(test_cpu),
                                     cmocka_unit_test(test_mistakes)};

  return cmocka_run_group_tests(tests, NULL, cleanup);
}
