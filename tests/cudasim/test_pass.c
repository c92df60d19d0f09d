/*
 * test_pass.c - captured passes (kernels/cuda/pass.h): whatever changes between two passes, a replay gives the bits of launches one by one, and
 * nothing is allocated in it. Ops alone first, then batches of the bundled model with a swap of generations between two steps.
 * Run from the root of the repository. Threads: one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/adapter.h"
#include "models/batch.h"
#include "models/pipeline.h"
#include "tests/cudasim/sim.h"
#include "tests/golden/make_adapter.h"

extern const struct be_ops be_cuda;

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s %s", err_name(r), e->msg, cudasim_fault());
}

/* ---- ops ---- */

enum { B = 3, D = 32, T = 5, KEYS = 7, HEADS = 2, WEIGHTS = 2, PROMPTS = 4, FACTORS = 3 };

/* A backend with everything that a small pass reads; `own` is the pass's memory. */
struct bench {
  struct be be;
  struct weight *w[WEIGHTS], *norm;
  struct lowrank *l[FACTORS];
  void *prompt[PROMPTS]; /* keys, then values */
  char *own;
};

enum { OWN = 1 << 16, PROMPT = KEYS * D * 2 };

/* What may change from one pass to the next. */
struct numbers {
  float t[B];
  int prompt[B], factors[B], weight;
  int64_t tokens; /* of the queries */
};

static float *noise(int64_t n, int seed)
{
  float *v = malloc((size_t)n * sizeof *v);

  assert_non_null(v);
  for (int64_t i = 0; i < n; i++)
    v[i] = (float)((i * 7919 + seed * 104729) % 1009) / 504.5f - 1;
  return v;
}

static void bench_open(struct bench *b, int no_capture)
{
  struct err e = {0};

  must(be_open(&b->be, &be_cuda, &(struct be_config){.no_capture = no_capture}, &e), &e);
  for (int i = 0; i < WEIGHTS; i++) {
    float *w = noise(D * D, i + 1);
    const struct weight_desc d = {.kind = WEIGHT_LINEAR, .out = D, .in = D, .w = w, .bias = w};

    must(b->be.ops->weight_load(&b->be, &d, NULL, &b->w[i], &e), &e);
    free(w);
  }
  {
    float *gamma = noise(D, 3);
    const struct weight_desc d = {.kind = WEIGHT_NORM, .out = D, .w = gamma, .bias = gamma};

    must(b->be.ops->weight_load(&b->be, &d, NULL, &b->norm, &e), &e);
    free(gamma);
  }
  for (int i = 0; i < FACTORS; i++) {
    float *down = noise((4 + i) * D, i + 10), *up = noise(D * (4 + i), i + 20);
    const struct lowrank_desc d = {.out = D, .in = D, .rank = 4 + i, .down = down, .up = up};

    must(b->be.ops->lowrank_load(&b->be, &d, &b->l[i], &e), &e);
    free(down);
    free(up);
  }
  for (int i = 0; i < PROMPTS; i++) {
    float *kv = noise(2 * KEYS * D, i + 30);
    struct tensor t = {NULL, {1, 1, 2 * KEYS, D}, b->be.act};

    must(b->be.ops->mem_alloc(&b->be, 2 * PROMPT, &b->prompt[i], &e), &e);
    t.p = b->prompt[i];
    must(b->be.ops->upload(&b->be, t, kv, DT_F32, &e), &e);
    free(kv);
  }
  must(b->be.ops->mem_alloc(&b->be, OWN, (void **)&b->own, &e), &e);
}

static void bench_close(struct bench *b)
{
  for (int i = 0; i < WEIGHTS; i++)
    b->be.ops->weight_free(&b->be, b->w[i]);
  b->be.ops->weight_free(&b->be, b->norm);
  for (int i = 0; i < FACTORS; i++)
    b->be.ops->lowrank_free(&b->be, b->l[i]);
  for (int i = 0; i < PROMPTS; i++)
    b->be.ops->mem_free(&b->be, b->prompt[i]);
  b->be.ops->mem_free(&b->be, b->own);
  be_close(&b->be);
}

static struct tensor at(struct bench *b, int slot, int64_t tokens)
{
  return (struct tensor){b->own + slot * (OWN / 8), {B, 1, tokens, D}, b->be.act};
}

/* A little of everything: times, a norm that takes them, a weight, factors, attention to prompts and to itself. */
static int ops(struct bench *b, const struct numbers *n, struct err *e)
{
  const struct be_ops *o = b->be.ops;
  struct tensor time = at(b, 0, 1), x = at(b, 1, n->tokens), y = at(b, 2, n->tokens), a = at(b, 3, n->tokens);
  const struct lowrank *factors[B];
  struct kv_row kv[B], self[B];
  int r;

  for (int i = 0; i < B; i++) {
    factors[i] = n->factors[i] < 0 ? NULL : b->l[n->factors[i]];
    kv[i] = (struct kv_row){b->prompt[n->prompt[i]], (char *)b->prompt[n->prompt[i]] + PROMPT, KEYS};
    self[i] = (struct kv_row){tensor_batch(y, i, 1).p, tensor_batch(y, i, 1).p, n->tokens};
  }
  if ((r = o->timestep_embed(&b->be, time, n->t, 1, 0, e)) || (r = o->groupnorm(&b->be, a, x, time, b->norm, 4, 1e-5f, 1, e)) ||
      (r = o->linear(&b->be, y, a, b->w[n->weight], tensor_none(), e)) || (r = o->lowrank(&b->be, y, a, factors, e)) ||
      (r = o->attention(&b->be, a, y, kv, HEADS, 0.25f, 0, e)) || (r = o->add(&b->be, y, y, a, e)) ||
      (r = o->attention(&b->be, a, y, self, HEADS, 0.25f, 0, e)))
    return r;
  return o->act(&b->be, a, a, ACT_SILU, e);
}

/* Puts the input in place, walks the pass as often as it wants, and downloads what comes out; got has B * tokens * D floats. */
static void pass(struct bench *b, const struct numbers *n, float *got)
{
  const struct be_ops *o = b->be.ops;
  float *x = noise(B * n->tokens * D, 99);
  struct err e = {0};
  int again = 1, walks = 0;

  must(o->upload(&b->be, at(b, 1, n->tokens), x, DT_F32, &e), &e);
  while (again) {
    must(o->pass_begin(&b->be, b->own, OWN, &e), &e);
    must(o->pass_end(&b->be, ops(b, n, &e), &again, &e), &e);
    assert_true(++walks <= 3);
  }
  must(o->download(&b->be, got, DT_F32, at(b, 3, n->tokens), &e), &e);
  free(x);
}

/* Both backends draw the same; the captured one replays, and does not allocate. */
static void expect_replay(struct bench *captured, struct bench *plain, const struct numbers *n)
{
  static float got[B * T * D], want[B * T * D];
  struct cudasim_count before, after;

  pass(plain, n, want);
  memset(got, 0xff, sizeof got);
  before = cudasim_counts();
  pass(captured, n, got);
  after = cudasim_counts();
  assert_memory_equal(got, want, (size_t)(B * n->tokens * D) * sizeof *got);
  assert_int_equal(after.replays, before.replays + 1);
  assert_int_equal(after.graphs, before.graphs);
  assert_int_equal(after.allocations, before.allocations);
}

static const struct numbers start = {.t = {1, 500, 999}, .prompt = {0, 1, 2}, .factors = {0, -1, 1}, .weight = 0, .tokens = T};

/* A first and a second time, after which it is captured. */
static void warm_up(struct bench *captured, struct bench *plain, const struct numbers *n)
{
  static float got[B * T * D], want[B * T * D];

  for (int i = 0; i < 2; i++) {
    pass(plain, n, want);
    pass(captured, n, got);
    assert_memory_equal(got, want, (size_t)(B * n->tokens * D) * sizeof *got);
  }
}

static void test_replays(void **state)
{
  struct bench captured, plain;
  struct numbers n = start;

  (void)state;
  bench_open(&captured, 0);
  bench_open(&plain, 1);
  warm_up(&captured, &plain, &n);
  assert_int_equal(cudasim_counts().live_graphs, 1);
  expect_replay(&captured, &plain, &n);
  n.t[1] = 3;
  expect_replay(&captured, &plain, &n);
  n.prompt[0] = 3; /* not behind each other any more */
  n.prompt[2] = 3;
  expect_replay(&captured, &plain, &n);
  n.factors[0] = 2; /* of another rank */
  n.factors[1] = 2;
  n.factors[2] = -1;
  expect_replay(&captured, &plain, &n);
  expect_replay(&captured, &plain, &start);
  bench_close(&captured);
  bench_close(&plain);
  assert_true(cudasim_counts().live == 0 && cudasim_counts().live_graphs == 0);
}

/* Another weight or another shape is another graph, and the first one is found again. */
static void test_other_graphs(void **state)
{
  struct bench captured, plain;
  struct numbers other = start, shorter = start;

  (void)state;
  bench_open(&captured, 0);
  bench_open(&plain, 1);
  warm_up(&captured, &plain, &start);
  other.weight = 1;
  shorter.tokens = 2;
  warm_up(&captured, &plain, &other);
  warm_up(&captured, &plain, &shorter);
  assert_int_equal(cudasim_counts().live_graphs, 3);
  expect_replay(&captured, &plain, &start);
  expect_replay(&captured, &plain, &shorter);
  expect_replay(&captured, &plain, &other);
  bench_close(&captured);
  bench_close(&plain);
  assert_int_equal(cudasim_counts().live, 0);
}

/* Working memory that moves takes its graphs along: nothing runs on the old address. */
static void test_moved_scratch(void **state)
{
  float *x = noise(64 * 64 * 512, 1);
  struct bench captured, plain;
  struct tensor big = {NULL, {1, 64, 64, 512}, DT_BF16};
  struct err e = {0};
  struct weight *w;
  const struct weight_desc norm = {.kind = WEIGHT_NORM, .out = 512, .w = x, .bias = x};

  (void)state;
  bench_open(&captured, 0);
  bench_open(&plain, 1);
  warm_up(&captured, &plain, &start);
  must(captured.be.ops->weight_load(&captured.be, &norm, NULL, &w, &e), &e);
  must(captured.be.ops->mem_alloc(&captured.be, tensor_bytes(big), &big.p, &e), &e);
  must(captured.be.ops->upload(&captured.be, big, x, DT_F32, &e), &e);
  must(captured.be.ops->groupnorm(&captured.be, big, big, tensor_none(), w, 32, 1e-5f, 0, &e), &e);
  warm_up(&captured, &plain, &start);
  expect_replay(&captured, &plain, &start);
  captured.be.ops->mem_free(&captured.be, big.p);
  captured.be.ops->weight_free(&captured.be, w);
  free(x);
  bench_close(&captured);
  bench_close(&plain);
}

/* A driver that does not take the graph costs speed, not pictures; and it is not asked a second time. */
static void test_refused(void **state)
{
  static float got[B * T * D], want[B * T * D];
  struct bench captured, plain;
  long graphs;

  (void)state;
  bench_open(&captured, 0);
  bench_open(&plain, 1);
  graphs = cudasim_counts().graphs;
  cudasim_fail_graphs(1);
  warm_up(&captured, &plain, &start);
  for (int i = 0; i < 3; i++) {
    pass(&plain, &start, want);
    pass(&captured, &start, got);
    assert_memory_equal(got, want, sizeof got);
  }
  assert_int_equal(cudasim_counts().graphs, graphs);
  bench_close(&captured);
  bench_close(&plain);
}

/* Short memory at the wrong moment, wherever it is: that pass is done without a graph, or fails as itself; later ones are right. */
static void test_no_memory(void **state)
{
  static float got[B * T * D], want[B * T * D];
  struct bench captured, plain;

  (void)state;
  bench_open(&plain, 1);
  pass(&plain, &start, want);
  for (int nth = 1; nth < 4; nth++) {
    bench_open(&captured, 0);
    pass(&captured, &start, got);
    cudasim_fail_allocation(nth);
    pass(&captured, &start, got);
    cudasim_fail_allocation(0);
    assert_memory_equal(got, want, sizeof got);
    pass(&captured, &start, got);
    assert_memory_equal(got, want, sizeof got);
    bench_close(&captured);
  }
  bench_close(&plain);
  assert_int_equal(cudasim_counts().live, 0);
}

/* A capture that cannot begin ends its pass, and leaves nothing to the next one, which has other numbers. */
static void test_no_capture(void **state)
{
  static float got[B * T * D], want[B * T * D];
  struct bench captured, plain;
  const struct be_ops *o;
  struct numbers n = start;
  struct err e = {0};
  int again = 0;

  (void)state;
  bench_open(&captured, 0);
  bench_open(&plain, 1);
  o = captured.be.ops;
  pass(&captured, &start, got);
  cudasim_fail_captures(1);
  must(o->pass_begin(&captured.be, captured.own, OWN, &e), &e);
  must(o->pass_end(&captured.be, ops(&captured, &start, &e), &again, &e), &e);
  assert_true(again);
  assert_int_equal(o->pass_begin(&captured.be, captured.own, OWN, &e), E_NOMEM);
  n.t[1] = 3;
  n.prompt[0] = 3;
  for (int i = 0; i < 2; i++) {
    pass(&plain, &n, want);
    pass(&captured, &n, got);
    assert_memory_equal(got, want, sizeof got);
  }
  expect_replay(&captured, &plain, &start);
  bench_close(&captured);
  bench_close(&plain);
  assert_true(cudasim_counts().live == 0 && cudasim_counts().live_graphs == 0);
}

/* More shapes than there is room for: the graph that was not used for longest goes. */
static void test_many_shapes(void **state)
{
  enum { SHAPES = 60 };
  static float got[B * SHAPES * D];
  struct bench captured;
  struct numbers n = start;

  (void)state;
  bench_open(&captured, 0);
  for (int i = 1; i <= SHAPES; i++) {
    n.tokens = 1 + i % 9;
    n.weight = i / 9 % 2;
    for (int k = 0; k < 3; k++)
      pass(&captured, &n, got);
  }
  assert_in_range(cudasim_counts().live_graphs, 18, 48);
  bench_close(&captured);
  assert_true(cudasim_counts().live == 0 && cudasim_counts().live_graphs == 0);
}

/* What copies or waits has no place in a pass. */
static void test_outside_only(void **state)
{
  struct bench b;
  struct tensor t;
  struct err e = {0};
  float x[B * D];
  int64_t bad;
  int again;

  (void)state;
  bench_open(&b, 0);
  t = at(&b, 0, 1);
  must(b.be.ops->pass_begin(&b.be, b.own, OWN, &e), &e);
  assert_int_equal(b.be.ops->upload(&b.be, t, x, DT_F32, &e), E_INTERNAL);
  assert_int_equal(b.be.ops->download(&b.be, x, DT_F32, t, &e), E_INTERNAL);
  assert_int_equal(b.be.ops->sync(&b.be, &e), E_INTERNAL);
  assert_int_equal(b.be.ops->count_nonfinite(&b.be, t, &bad, &e), E_INTERNAL);
  assert_int_equal(b.be.ops->pass_end(&b.be, E_INTERNAL, &again, &e), E_INTERNAL);
  assert_int_equal(again, 0);
  bench_close(&b);
}

/* ---- the bundled model ---- */

enum { SIDE = 64, STEPS = 4, PICTURES = 3, PIXELS = SIDE * SIDE * 3 };

struct rig {
  struct be be, lane;
  struct model *m;
  struct batch *batch;
  struct adapter *a, *b;
};

static void rig_open(struct rig *r, int no_capture)
{
  const struct adapter_plan first = {"one", 4, 0.25f, DELTA_LOWRANK, "unet", 1}, second = {"two", 7, 0.25f, DELTA_LOWRANK, "unet", 1};
  struct err e = {0};

  must(be_open(&r->be, &be_cuda, &(struct be_config){.no_capture = no_capture}, &e), &e);
  must(model_open(&r->m, &r->be, "weights/emoji", &e), &e);
  must(model_reserve(r->m, SIDE, SIDE, &e), &e);
  must(batch_open(&r->batch, r->m, PICTURES, &e), &e);
  must(r->be.ops->open_lane(&r->lane, &r->be, 0, &e), &e);
  r->a = adapter_make(model_base(r->m), &first);
  r->b = adapter_make(model_base(r->m), &second);
}

static void rig_close(struct rig *r)
{
  adapter_close(r->a);
  adapter_close(r->b);
  batch_close(r->batch);
  model_close(r->m);
  be_close(&r->lane);
  be_close(&r->be);
}

static struct generation *published(struct rig *r, const struct adapter *a, enum generation_form form)
{
  const struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  struct generation *g;
  struct err e = {0};

  must(generation_build(&g, model_base(r->m), model_sources(r->m), &r->lane, &use, 1, form, NULL, &e), &e);
  return g;
}

static struct draw *started(struct rig *r, struct generation *g, int seed)
{
  const struct draw_params p = {.prompt = "a red heart", .prompt_len = 11, .width = SIDE, .height = SIDE, .steps = STEPS, .guidance = 4,
                                .seed = (uint64_t)seed, .sampler = SAMPLER_DPMPP_2M};
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, r->m, &p, &e), &e);
  must(draw_start(d, model_lane(r->m), g, &e), &e);
  return d;
}

static void step(struct rig *r, struct draw *const *d, int n)
{
  struct err e[PICTURES];

  batch_step(r->batch, d, n, e);
  for (int i = 0; i < n; i++)
    must(e[i].code, &e[i]);
}

static void finish(struct rig *r, struct draw *d, uint8_t *rgb)
{
  struct err e = {0};

  must(draw_decode(d, model_lane(r->m), rgb, &e), &e);
  draw_close(d);
}

/* Four pictures that overlap: two under one generation, one under a generation published between two of their steps, one under folded weights. The
 * picture on its way keeps the generation that it has pinned. Returns how many graphs the swap from factors to factors has cost. */
static long draw_swaps(struct rig *r, uint8_t (*rgb)[PIXELS])
{
  struct generation *one = published(r, r->a, FORM_RUNTIME), *two, *folded;
  struct draw *d[2] = {started(r, one, 7), NULL};
  long graphs;

  step(r, d, 1);
  step(r, d, 1);
  d[1] = started(r, one, 8);
  step(r, d, 2);
  step(r, d, 2);
  finish(r, d[0], rgb[0]);
  two = published(r, r->b, FORM_RUNTIME);
  d[0] = started(r, two, 9);
  graphs = cudasim_counts().graphs;
  step(r, d, 2);
  step(r, d, 2);
  graphs = cudasim_counts().graphs - graphs;
  finish(r, d[1], rgb[1]);
  step(r, d, 1); /* working memory has moved since one picture was alone: captured anew */
  step(r, d, 1);
  finish(r, d[0], rgb[2]);
  folded = published(r, r->a, FORM_FOLDED);
  d[0] = started(r, folded, 9);
  for (int i = 0; i < STEPS; i++)
    step(r, d, 1);
  finish(r, d[0], rgb[3]);
  generation_unref(one);
  generation_unref(two);
  generation_unref(folded);
  return graphs;
}

static void test_model(void **state)
{
  static uint8_t want[4][PIXELS], got[4][PIXELS];
  struct rig plain, captured;
  long replays = cudasim_counts().replays;

  (void)state;
  rig_open(&plain, 1);
  draw_swaps(&plain, want);
  rig_close(&plain);
  assert_int_equal(cudasim_counts().replays, replays);
  rig_open(&captured, 0);
  assert_int_equal(draw_swaps(&captured, got), 0); /* the captured pass of two pictures survives the swap */
  rig_close(&captured);
  assert_true(cudasim_counts().replays >= replays + 8);
  for (int k = 0; k < 4; k++)
    assert_memory_equal(got[k], want[k], PIXELS);
  assert_memory_not_equal(want[2], want[3], PIXELS);
  assert_int_equal(cudasim_counts().live, 0);
}

static long launches_of_step(struct rig *r, struct generation *const *g, int n)
{
  struct draw *d[PICTURES];
  long before;

  for (int i = 0; i < n; i++)
    d[i] = started(r, g[i], i);
  before = cudasim_counts().launches;
  step(r, d, n);
  before = cudasim_counts().launches - before;
  for (int i = 0; i < n; i++)
    draw_close(d[i]);
  return before;
}

/* The sites with factors that a step applies, q, k and v of one input as one; the keys and values of the prompt were made before. */
static long sites_of_step(const struct generation *g)
{
  long n = 0;

  for (int i = 0; i < g->n; i++)
    n += g->lowrank[i] && !strstr(g->site[i].name, ".to_k") && !strstr(g->site[i].name, ".to_v");
  return n;
}

/* Factors beside the weights cost a launch for each site, whatever the batch, and for the pictures of the base beside them nothing; folded ones none. */
static void test_launches(void **state)
{
  struct generation *g[PICTURES], *base, *runtime, *folded;
  struct rig r;
  long plain, pair;

  (void)state;
  rig_open(&r, 1);
  base = model_base(r.m);
  runtime = published(&r, r.a, FORM_RUNTIME);
  folded = published(&r, r.a, FORM_FOLDED);
  assert_true(sites_of_step(runtime) > 20);
  plain = launches_of_step(&r, &base, 1);
  assert_int_equal(launches_of_step(&r, &folded, 1), plain);
  assert_int_equal(launches_of_step(&r, &runtime, 1), plain + sites_of_step(runtime));
  g[0] = g[1] = base;
  pair = launches_of_step(&r, g, 2);
  g[1] = runtime;
  assert_int_equal(launches_of_step(&r, g, 2), pair + sites_of_step(runtime));
  g[0] = runtime;
  assert_int_equal(launches_of_step(&r, g, 2), pair + sites_of_step(runtime));
  generation_unref(runtime);
  generation_unref(folded);
  rig_close(&r);
  assert_int_equal(cudasim_counts().live, 0);
}

/* test_pass ops: without the model. */
int main(int argc, char **argv)
{
  const struct CMUnitTest model[] = {cmocka_unit_test(test_model), cmocka_unit_test(test_launches)}, tests[] = {
      cmocka_unit_test(test_replays), cmocka_unit_test(test_other_graphs), cmocka_unit_test(test_moved_scratch), cmocka_unit_test(test_refused),
      cmocka_unit_test(test_no_memory), cmocka_unit_test(test_no_capture), cmocka_unit_test(test_many_shapes), cmocka_unit_test(test_outside_only),
  };

  int failed = cmocka_run_group_tests_name("passes", tests, NULL, NULL);

  return argc > 1 && !strcmp(argv[1], "ops") ? failed : failed + cmocka_run_group_tests_name("passes of the model", model, NULL, NULL);
}
