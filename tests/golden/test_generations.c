/*
 * test_generations.c - generations of the bundled model as a server has them: built on a lane while pictures are drawn, pinned, let go, a
 * thousand times over. Run from the root of the repository.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "models/adapter.h"
#include "models/pipeline.h"
#include "tests/golden/fail_alloc.h"
#include "tests/golden/make_adapter.h"

enum { SIDE = 64, CYCLES = 1000, WARM = 50 };

static struct err e;
static struct be be, lane;
static struct model *model;

static void must(int code)
{
  if (code)
    fail_msg("%s (%s)", e.msg, e.field);
}

static int setup(void **state)
{
  const struct be_config cfg = {.threads = 1};

  (void)state;
  return be_open(&be, &be_cpu, &cfg, &e) || model_open(&model, &be, "weights/emoji", &e) || model_reserve(model, SIDE, SIDE, &e) ||
         be.ops->open_lane(&lane, &be, 1, &e);
}

static int teardown(void **state)
{
  (void)state;
  model_close(model);
  be_close(&lane);
  be_close(&be);
  return 0;
}

/* Low-rank on every cross-attention. */
static struct adapter *make(const char *name)
{
  const struct adapter_plan plan = {name, 4, 0.25f, DELTA_LOWRANK, "unet", 1};

  return adapter_make(model_base(model), &plan);
}

static struct generation *build(const struct adapter *a, enum generation_form form)
{
  const struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  struct generation *g;

  must(generation_build(&g, model_base(model), model_sources(model), &lane, &use, 1, form, NULL, &e));
  return g;
}

static struct draw *start(struct generation *g)
{
  const struct draw_params p = {.prompt = "a red heart", .prompt_len = 11, .width = SIDE, .height = SIDE, .steps = 4, .guidance = 3,
                                .seed = 7, .sampler = SAMPLER_DPMPP_2M};
  struct draw *d;

  must(draw_prepare(&d, model, &p, &e));
  must(draw_start(d, model_lane(model), g, &e));
  return d;
}

static uint8_t *finish(struct draw *d)
{
  uint8_t *rgb = malloc(SIDE * SIDE * 3);

  assert_non_null(rgb);
  while (draw_step_index(d) < draw_step_count(d))
    must(draw_step(d, &e));
  must(draw_decode(d, model_lane(model), rgb, &e));
  draw_close(d);
  return rgb;
}

static int differ(const uint8_t *a, const uint8_t *b)
{
  return memcmp(a, b, SIDE * SIDE * 3) != 0;
}

/* There and back: every generation draws its own picture, and the base its own again. */
static void test_swaps(void **state)
{
  struct adapter *a = make("one"), *b = make("two");
  uint8_t *base = finish(start(model_base(model))), *again;
  uint8_t *of[4];

  (void)state;
  for (int round = 0; round < 2; round++)
    for (int k = 0; k < 4; k++) {
      struct generation *g = build(k % 2 ? b : a, k < 2 ? FORM_RUNTIME : FORM_FOLDED);
      uint8_t *rgb = finish(start(g));

      generation_unref(g);
      if (round) {
        assert_false(differ(rgb, of[k]));
        free(rgb);
      } else {
        of[k] = rgb;
        assert_true(differ(rgb, base));
      }
      again = finish(start(model_base(model)));
      assert_false(differ(again, base));
      free(again);
    }
  assert_true(differ(of[0], of[1]) && differ(of[2], of[3]));
  for (int k = 0; k < 4; k++)
    free(of[k]);
  free(base);
  adapter_close(a);
  adapter_close(b);
}

static int retired;

static void note_retired(void *arg, struct generation *g)
{
  (void)arg;
  retired++;
  generation_free(g);
}

/* A picture keeps what it was started with, to its last step and no longer. */
static void test_pinned(void **state)
{
  struct adapter *a = make("one"), *b = make("two");
  struct generation *g = build(a, FORM_RUNTIME), *h;
  uint8_t *alone = finish(start(g)), *rgb;
  struct draw *d = start(g);

  (void)state;
  retired = 0;
  g->retire = note_retired;
  must(draw_step(d, &e));
  h = build(b, FORM_FOLDED); /* what everybody else draws with from here on */
  generation_unref(g);
  assert_int_equal(retired, 0);
  free(finish(start(h)));
  must(draw_step(d, &e));
  assert_true(draw_generation(d) == g);
  rgb = finish(d);
  assert_false(differ(rgb, alone));
  assert_int_equal(retired, 1);
  free(rgb);
  free(alone);
  generation_unref(h);
  adapter_close(a);
  adapter_close(b);
}

struct builder_thread {
  const struct adapter *a;
  atomic_int stop;
  int built;
};

static void *build_and_free(void *arg)
{
  struct builder_thread *t = arg;

  while (!atomic_load(&t->stop)) {
    generation_unref(build(t->a, t->built % 2 ? FORM_RUNTIME : FORM_FOLDED));
    t->built++;
  }
  return NULL;
}

/* Building on the lane while this thread draws changes no picture. */
static void test_while_drawing(void **state)
{
  struct adapter *a = make("one"), *b = make("two");
  struct builder_thread t = {.a = b};
  struct generation *g = build(a, FORM_RUNTIME);
  uint8_t *alone = finish(start(g)), *rgb;
  pthread_t thread;

  (void)state;
  assert_int_equal(pthread_create(&thread, NULL, build_and_free, &t), 0);
  for (int i = 0; i < 3; i++) {
    rgb = finish(start(g));
    assert_false(differ(rgb, alone));
    free(rgb);
  }
  atomic_store(&t.stop, 1);
  assert_int_equal(pthread_join(thread, NULL), 0);
  printf("%d generations were built meanwhile\n", t.built);
  assert_true(t.built > 0);
  free(alone);
  generation_unref(g);
  adapter_close(a);
  adapter_close(b);
}

static long resident_pages(void)
{
  long pages = -1, size;
  FILE *f = fopen("/proc/self/statm", "re");
  char line[256];

  assert_non_null(f);
  assert_non_null(fgets(line, sizeof line, f));
  fclose(f);
  size = strtol(strchr(line, ' '), NULL, 10);
  pages = size;
  return pages;
}

static double seconds(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Memory comes back: not a block more, and no more pages than an allocator keeps. */
static void test_thousand(void **state)
{
  struct adapter *a = make("one");
  long live = 0, pages = 0, grown;
  double begin = seconds();
  int whole = a->n, cycles = fail_alloc_works() ? CYCLES : WARM + 10; /* a sanitizer is slow, and sees a leak at once */

  (void)state;
  a->n = 6; /* sites: enough for either form */
  for (int i = 0; i < cycles; i++) {
    if (i == WARM) {
      live = fail_alloc_live();
      pages = resident_pages();
    }
    generation_unref(build(a, i % 2 ? FORM_RUNTIME : FORM_FOLDED));
  }
  grown = (resident_pages() - pages) * sysconf(_SC_PAGESIZE) / 1024;
  printf("%d generations: %.2f ms each, resident memory grew by %ld KiB\n", cycles, (seconds() - begin) * 1e3 / cycles, grown);
  assert_int_equal(fail_alloc_live(), live);
  assert_int_equal(atomic_load(&model_base(model)->refs), 1);
  if (fail_alloc_works())
    assert_true(grown <= 4096);
  a->n = whole;
  adapter_close(a);
}

/* Names for what has no bytes of its own. */
static void test_digests(void **state)
{
  struct model *s, *t;

  (void)state;
  assert_string_equal(model_base(model)->digest, model_info(model)->digest);
  assert_int_equal(strlen(model_base(model)->digest), 64);
  assert_int_equal(model_layers_per_block(model), 1);
  must(model_open_synthetic(&s, &be, "emoji", &e));
  must(model_open_synthetic(&t, &be, "emoji", &e));
  assert_string_equal(model_base(s)->digest, model_base(t)->digest);
  assert_string_not_equal(model_base(s)->digest, model_base(model)->digest);
  assert_string_equal(model_info(s)->digest, "");
  model_close(s);
  model_close(t);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_swaps), cmocka_unit_test(test_pinned), cmocka_unit_test(test_while_drawing),
                                     cmocka_unit_test(test_thousand), cmocka_unit_test(test_digests)};

  return cmocka_run_group_tests(tests, setup, teardown);
}
