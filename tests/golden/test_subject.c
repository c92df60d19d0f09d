/*
 * test_subject.c - the pictures of one request: each has the bits that it has alone, in whatever order they come and go; what they share is made once, held
 * once and freed with the last; what fails in it fails for all of them. The tiny checkpoint of tests/golden draws them on be_cpu, through a table that
 * counts. Run from the root of the repository. Threads: one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/batch.h"
#include "tests/golden/make_adapter.h"
#include "tests/golden/tiny.h"

enum { N = 4, SIDE = 64, RGB = SIDE * SIDE * 3, KINDS = 5, WORDS = 1 /* a kind with both prompts, of one and two chunks */, FROM_PICTURE = 3 };

static uint8_t first_rgb[RGB], first_mask[SIDE * SIDE];

static struct draw_params params(int kind, int i)
{
  static const char *const prompt[KINDS] = {"a red heart", "two (cats:1.3) BREAK under a tree", "", "a fish", "a bell"};
  static const enum sampler_kind sampler[KINDS] = {SAMPLER_DPMPP_2M, SAMPLER_EULER_A, SAMPLER_DDIM, SAMPLER_EULER_A, SAMPLER_EULER};
  struct draw_params p = {.prompt = prompt[kind], .prompt_len = strlen(prompt[kind]), .negative = "blurry", .negative_len = 6, .width = SIDE, .height = SIDE,
                          .steps = 4, .guidance = kind == 2 ? 1 : 3, .seed = (uint64_t)(40 + i), .sampler = sampler[kind], .strength = 0.8f};

  if (kind >= FROM_PICTURE) {
    p.init_rgb = first_rgb;
    p.mask = kind == 4 ? first_mask : NULL;
  }
  return p;
}

/* ---- a table that counts, and fails where it is told to ---- */

static struct be_ops counting;
static struct {
  long embeds, convs, live;    /* live: pieces of memory that are not freed */
  size_t bytes;                /* that were asked for */
  int fail_embed, fail_alloc;  /* the n-th from now on; 0: none */
} seen;

static int counted_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens, const struct weight *positions, struct err *e)
{
  seen.embeds++;
  if (seen.fail_embed && !--seen.fail_embed)
    return err_set(e, E_NOMEM, "no room for words");
  return be_cpu.embed(be, y, ids, tokens, positions, e);
}

static int counted_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  seen.convs++;
  return be_cpu.conv2d(be, y, x, w, residual, e);
}

static int counted_alloc(struct be *be, size_t bytes, void **p, struct err *e)
{
  int r;

  *p = NULL;
  if (seen.fail_alloc && !--seen.fail_alloc)
    return err_set(e, E_NOMEM, "no room for pictures");
  r = be_cpu.mem_alloc(be, bytes, p, e);
  seen.live += !r;
  seen.bytes += bytes;
  return r;
}

static void counted_free(struct be *be, void *p)
{
  seen.live -= p != NULL;
  be_cpu.mem_free(be, p);
}

/* ---- the rig ---- */

struct rig {
  struct tiny t;
  struct batch *batch;
  struct generation *g;        /* an adapter beside the base */
  long live;                   /* before the first picture */
};

static void rig_open(struct rig *r)
{
  const struct adapter_plan plan = {"one", 4, 0.25f, DELTA_LOWRANK, "unet", 1};
  struct adapter_use use = {.weight = 1, .required = 1};
  struct adapter *a;
  struct err e = {0};

  counting = be_cpu;
  counting.embed = counted_embed;
  counting.conv2d = counted_conv2d;
  counting.mem_alloc = counted_alloc;
  counting.mem_free = counted_free;
  memset(&seen, 0, sizeof seen);
  tiny_open(&r->t, &counting, &(struct be_config){.threads = 1}, "sd15", NULL);
  use.adapter = a = adapter_make(model_base(r->t.m), &plan);
  must(generation_build(&r->g, model_base(r->t.m), model_sources(r->t.m), &r->t.be, &use, 1, FORM_RUNTIME, NULL, &e), &e);
  adapter_close(a);
  must(batch_open(&r->batch, r->t.m, N, &e), &e);
  r->live = seen.live;
}

static void rig_close(struct rig *r)
{
  assert_int_equal(seen.live, r->live);
  batch_close(r->batch);
  generation_unref(r->g);
  tiny_close(&r->t);
  assert_int_equal(seen.live, 0);
}

/* The N pictures of a request. */
static void prepare(struct rig *r, int kind, struct draw **d)
{
  struct draw_params p = params(kind, 0);
  struct err e = {0};

  must(draw_prepare(&d[0], r->t.m, &p, &e), &e);
  for (int i = 1; i < N; i++)
    must(draw_prepare_like(&d[i], d[i - 1], (uint64_t)(40 + i), &e), &e);
}

static void start(struct rig *r, struct draw *d)
{
  struct err e = {0};

  must(draw_start(d, model_lane(r->t.m), r->g, &e), &e);
}

static void close_all(struct draw **d)
{
  for (int i = 0; i < N; i++)
    draw_close(d[i]);
}

/* Steps until it is finished, if it is not yet. */
static void finish(struct rig *r, struct draw *d, uint8_t *rgb)
{
  struct err e = {0};

  while (draw_step_index(d) < draw_step_count(d))
    must(draw_step(d, &e), &e);
  must(draw_decode(d, model_lane(r->t.m), rgb, &e), &e);
}

/* Picture i of a request of its own. */
static void draw_alone(struct rig *r, int kind, int i, uint8_t *rgb)
{
  struct draw_params p = params(kind, i);
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, r->t.m, &p, &e), &e);
  start(r, d);
  finish(r, d, rgb);
  draw_close(d);
}

/* Picture i of a request, started before, comes out as it does alone. */
static void expect_as_alone(struct rig *r, int kind, int i, struct draw *d)
{
  static uint8_t want[RGB], got[RGB];

  draw_alone(r, kind, i, want);
  finish(r, d, got);
  assert_memory_equal(got, want, RGB);
}

/* ---- the same bits ---- */

/* Two requests at once, whose pictures take their steps together. Those of one join one by one, and each leaves when it is finished. */
static void draw_together(struct rig *r, const int kind[2], uint8_t rgb[2][N][RGB])
{
  struct draw *d[2][N], *at_work[2 * N];
  struct err err[2 * N];
  int left = 2 * N, started = 0;

  for (int k = 0; k < 2; k++)
    prepare(r, kind[k], d[k]);
  while (left) {
    int n = 0;

    for (int k = 0; k < 2 && started < N; k++)
      start(r, d[k][started]);
    started += started < N;
    for (int i = 0; i < 2 * started; i++)
      if (d[i % 2][i / 2])
        at_work[n++] = d[i % 2][i / 2];
    batch_step(r->batch, at_work, n, err);
    for (int i = 0; i < n; i++)
      must(err[i].code, &err[i]);
    for (int i = 0; i < 2 * started; i++) {
      struct draw **p = &d[i % 2][i / 2];

      if (!*p || draw_step_index(*p) < draw_step_count(*p))
        continue;
      finish(r, *p, rgb[i % 2][i / 2]);
      draw_close(*p);
      *p = NULL;
      left--;
    }
  }
}

static void test_same_bits(void **state)
{
  static uint8_t want[N][RGB], got[2][N][RGB];
  struct rig r;

  (void)state;
  rig_open(&r);
  for (int kind = 0; kind < KINDS; kind++) {
    const int kinds[2] = {kind, (kind + 1) % KINDS};

    draw_together(&r, kinds, got);
    for (int k = 0; k < 2; k++)
      for (int i = 0; i < N; i++) {
        draw_alone(&r, kinds[k], i, want[i]);
        if (memcmp(got[k][i], want[i], RGB))
          fail_msg("picture %d of a request of kind %d is another one than alone", i, kinds[k]);
        if (i)
          assert_memory_not_equal(want[i], want[i - 1], RGB);
      }
  }
  rig_close(&r);
}

/* ---- once ---- */

/* The text encoder runs for the first picture alone, as does the encoder of pictures; memory is what draw_bytes and draw_shared_bytes say. */
static void test_made_once(void **state)
{
  struct draw *d[N];
  struct rig r;

  (void)state;
  rig_open(&r);
  for (int kind = WORDS; kind < KINDS; kind++) {
    long embeds = seen.embeds, convs = seen.convs;
    size_t bytes = seen.bytes;

    prepare(&r, kind, d);
    assert_int_equal(seen.bytes, bytes);
    start(&r, d[0]);
    assert_int_equal(seen.embeds - embeds, kind == WORDS ? 3 : kind == 2 ? 1 : 2);
    assert_int_equal(seen.convs > convs, kind >= FROM_PICTURE);
    embeds = seen.embeds;
    convs = seen.convs;
    for (int i = 1; i < N; i++)
      start(&r, d[i]);
    assert_int_equal(seen.embeds, embeds);
    assert_int_equal(seen.convs, convs);
    assert_int_equal(seen.live, r.live + N + 1);
    assert_int_equal(seen.bytes - bytes, draw_shared_bytes(d[0]) + N * draw_bytes(d[0]));
    for (int i = 1; i < N; i++)
      assert_true(draw_bytes(d[i]) == draw_bytes(d[0]) && draw_shared_bytes(d[i]) == draw_shared_bytes(d[0]));
    close_all(d);
    assert_int_equal(seen.live, r.live);
  }
  rig_close(&r);
}

/* What is shared stays for those that come later, and goes with the last of them, also when that one was never started. */
static void test_held(void **state)
{
  static uint8_t want[RGB], got[RGB];
  struct draw *d[N];
  struct rig r;

  (void)state;
  rig_open(&r);
  draw_alone(&r, WORDS, 2, want);
  prepare(&r, WORDS, d);
  start(&r, d[1]);
  draw_close(d[1]);
  assert_int_equal(seen.live, r.live + 1);
  start(&r, d[2]);
  draw_close(d[0]);
  finish(&r, d[2], got);
  draw_close(d[2]);
  assert_memory_equal(got, want, RGB);
  assert_int_equal(seen.live, r.live + 1);
  draw_close(d[3]);
  assert_int_equal(seen.live, r.live);
  prepare(&r, FROM_PICTURE, d); /* and nothing is held of a request of which nothing was started */
  close_all(d);
  rig_close(&r);
}

/* ---- what fails ---- */

/* A prompt that cannot be encoded is tried once; all pictures of its request fail with that error and hold nothing. */
static void test_prompt_fails(void **state)
{
  struct draw *d[N];
  struct rig r;

  (void)state;
  rig_open(&r);
  for (int nth = 1; nth <= 4; nth++) { /* of the words, and of the memory for them */
    long embeds = seen.embeds;

    prepare(&r, WORDS, d);
    seen.fail_embed = nth < 4 ? nth : 0;
    seen.fail_alloc = nth == 4;
    for (int i = 0; i < N; i++) {
      struct err e = {0};

      assert_int_equal(draw_start(d[i], model_lane(r.t.m), r.g, &e), E_NOMEM);
      assert_string_equal(e.msg, nth < 4 ? "no room for words" : "no room for pictures");
      assert_null(draw_generation(d[i]));
      assert_int_equal(seen.embeds - embeds, nth % 4);
      assert_int_equal(seen.live, r.live);
    }
    close_all(d);
  }
  rig_close(&r);
}

/* A picture that there is no memory for fails alone, the first one too. */
static void test_picture_fails(void **state)
{
  struct err e = {0};
  struct draw *d[N];
  struct rig r;

  (void)state;
  rig_open(&r);
  prepare(&r, WORDS, d);
  seen.fail_alloc = 2; /* the first is for what they share */
  assert_int_equal(draw_start(d[0], model_lane(r.t.m), r.g, &e), E_NOMEM);
  start(&r, d[1]);
  seen.fail_alloc = 1;
  assert_int_equal(draw_start(d[2], model_lane(r.t.m), r.g, &e), E_NOMEM);
  start(&r, d[3]);
  for (int i = 1; i < N; i += 2)
    expect_as_alone(&r, WORDS, i, d[i]);
  close_all(d);
  rig_close(&r);
}

/* Keys and values of one generation are never read under another. */
static void test_one_generation(void **state)
{
  struct err e = {0};
  struct draw *d[N];
  struct rig r;

  (void)state;
  rig_open(&r);
  prepare(&r, WORDS, d);
  start(&r, d[0]);
  assert_int_equal(draw_start(d[1], model_lane(r.t.m), model_base(r.t.m), &e), E_INTERNAL);
  assert_null(draw_generation(d[1]));
  start(&r, d[1]);
  expect_as_alone(&r, WORDS, 1, d[1]);
  close_all(d);
  rig_close(&r);
}

static int draw_first(void **state)
{
  (void)state;
  tiny_first(first_rgb, first_mask, SIDE);
  return 0;
}

int main(int argc, char **argv)
{
  static const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_bits),    cmocka_unit_test(test_made_once),     cmocka_unit_test(test_held),
                                            cmocka_unit_test(test_prompt_fails), cmocka_unit_test(test_picture_fails), cmocka_unit_test(test_one_generation)};

  if (argc > 1)
    cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("subject", tests, draw_first, NULL);
}
