/*
 * test_outline.c - does the outline note what be_cuda asks cuDNN for? The bundled model is walked twice as `safelight compile` does, on an outline and
 * on be_cuda in the simulator, whose dnn.h tells every key that it is asked for: the two lists must be the same. Then pictures as a daemon mixes them must
 * ask for nothing else. Run from the root of the repository. Threads: one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cuda/outline.h"
#include "models/batch.h"
#include "server/compile_walk.h"
#include "tests/cudasim/sim.h"

enum { SIDE = 32, BATCH = 2, CHUNKS = 2, MOST = 4096 };

extern const struct be_ops be_cuda;

static struct gpu_key asked[MOST];
static int asked_n;

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s %s", err_name(r), e->msg, cudasim_fault());
}

static int holds(const struct gpu_key *list, int n, const struct gpu_key *k)
{
  for (int i = 0; i < n; i++)
    if (!memcmp(&list[i], k, sizeof *k))
      return 1;
  return 0;
}

static void see(const struct gpu_key *k)
{
  if (holds(asked, asked_n, k))
    return;
  assert_true(asked_n < MOST);
  memcpy(&asked[asked_n++], k, sizeof *k);
}

/* How many of the n are not in the list, each by name. */
static int missing(const struct gpu_key *of, int n, const struct gpu_key *list, int m, const char *where)
{
  int count = 0;

  for (int i = 0; i < n; i++)
    if (!holds(list, m, &of[i])) {
      char name[160];

      gpu_key_name(name, sizeof name, &of[i]);
      if (!count++)
        printf("not in the list of %s: %s\n", where, name);
    }
  return count;
}

/* ---- the two lists ---- */

static void outline_of_walk(struct outline *o, int batch, int chunks, int want_f16)
{
  struct err e = {0};
  struct model *m;

  outline_open(o, want_f16);
  must(model_open(&m, &o->be, "weights/emoji", &e), &e);
  must(compile_walk_size(m, SIDE, SIDE, batch, chunks, &e), &e);
  must(compile_walk_canary(m, &o->be, &e), &e);
  model_close(m);
}

static void same_list(int want_f16, int batch, int chunks)
{
  struct be_config cfg = {.threads = 1, .want_f16 = want_f16};
  struct outline o;
  struct err e = {0};
  struct model *m;
  struct be be;

  outline_of_walk(&o, batch, chunks, want_f16);
  asked_n = 0;
  cudasim_watch_dnn(see);
  must(be_open(&be, &be_cuda, &cfg, &e), &e);
  must(model_open(&m, &be, "weights/emoji", &e), &e);
  must(compile_walk_size(m, SIDE, SIDE, batch, chunks, &e), &e);
  must(compile_walk_canary(m, &be, &e), &e);
  model_close(m);
  be_close(&be);
  cudasim_watch_dnn(NULL);
  printf("%d plans noted, %d asked for\n", o.keys, asked_n);
  assert_int_equal(missing(asked, asked_n, o.key, o.keys, "the outline"), 0);
  assert_int_equal(missing(o.key, o.keys, asked, asked_n, "be_cuda"), 0);
  assert_true(o.keys > 60);
  outline_close(&o);
}

static void test_same_list(void **state)
{
  (void)state;
  same_list(0, 1, CHUNKS);
}

static void test_same_list_f16(void **state)
{
  (void)state;
  same_list(1, 1, 1);
}

/* ---- pictures as they come ---- */

static void start(struct draw **d, struct model *m, const char *prompt, float guidance, const uint8_t *first)
{
  const struct draw_params p = {.prompt = prompt, .prompt_len = strlen(prompt), .negative = "", .width = SIDE, .height = SIDE, .steps = 2,
                                .guidance = guidance, .seed = 3, .sampler = SAMPLER_EULER_A, .init_rgb = first, .strength = 1};
  struct err e = {0};

  must(draw_prepare(d, m, &p, &e), &e);
  must(draw_start(*d, model_lane(m), model_base(m), &e), &e);
}

/* A long prompt beside a short one, with and without guidance, from another picture, a preview on the way: what be_cuda is asked for. */
static void draw_mixed(void)
{
  static uint8_t rgb[SIDE * SIDE * 3];
  struct be_config cfg = {.threads = 1};
  struct err err[BATCH], e = {0};
  struct draw *d[BATCH];
  char text[2 * 80 + 1];
  struct model *m;
  struct batch *b;
  struct be be;

  for (int i = 0; i < 80; i++) /* two chunks */
    memcpy(text + 2 * i, "a ", 3);
  must(be_open(&be, &be_cuda, &cfg, &e), &e);
  must(model_open(&m, &be, "weights/emoji", &e), &e);
  must(model_reserve(m, SIDE, SIDE, &e), &e);
  must(batch_open(&b, m, BATCH, &e), &e);
  start(&d[0], m, text, 3, NULL);
  start(&d[1], m, "a red apple", 1, rgb);
  batch_step(b, d, 2, err);
  must(err[0].code, &err[0]);
  must(err[1].code, &err[1]);
  must(draw_snapshot(d[0], &e), &e);
  must(draw_preview(d[0], model_lane(m), rgb, &e), &e);
  batch_step(b, d, 1, err);
  must(err[0].code, &err[0]);
  must(draw_decode(d[0], model_lane(m), rgb, &e), &e);
  draw_close(d[0]);
  draw_close(d[1]);
  batch_close(b);
  model_close(m);
  be_close(&be);
}

/* Nothing of it is new to a list that was made for two pictures and two chunks; lists for less lack something, or this test could not fail. */
static void test_mixed(void **state)
{
  struct outline o;

  (void)state;
  asked_n = 0;
  cudasim_watch_dnn(see);
  draw_mixed();
  cudasim_watch_dnn(NULL);
  outline_of_walk(&o, BATCH, CHUNKS, 0);
  assert_int_equal(missing(asked, asked_n, o.key, o.keys, "the outline"), 0);
  outline_close(&o);
  outline_of_walk(&o, 1, CHUNKS, 0);
  assert_true(missing(asked, asked_n, o.key, o.keys, "one picture") > 0);
  outline_close(&o);
  outline_of_walk(&o, BATCH, 1, 0);
  assert_true(missing(asked, asked_n, o.key, o.keys, "one chunk") > 0);
  outline_close(&o);
}

static void test_bounds(void **state)
{
  struct outline o;
  struct err e = {0};
  struct model *m;

  (void)state;
  outline_open(&o, 0);
  must(model_open(&m, &o.be, "weights/emoji", &e), &e);
  assert_int_equal(compile_walk_size(m, SIDE + 1, SIDE, 1, 1, &e), E_ARG);
  assert_string_equal(e.field, "size");
  e = (struct err){0};
  assert_int_equal(compile_walk_size(m, SIDE, SIDE, BATCH_MAX + 1, 1, &e), E_ARG);
  assert_string_equal(e.field, "batch");
  e = (struct err){0};
  assert_int_equal(compile_walk_size(m, SIDE, SIDE, 1, 0, &e), E_ARG);
  assert_int_equal(compile_walk_size(m, SIDE, SIDE, 1, PROMPT_MAX_CHUNKS + 1, &e), E_ARG);
  assert_string_equal(e.field, "chunks");
  model_close(m);
  outline_close(&o);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_same_list),
      cmocka_unit_test(test_same_list_f16),
      cmocka_unit_test(test_mixed),
      cmocka_unit_test(test_bounds),
  };

  return cmocka_run_group_tests_name("outline", tests, NULL, NULL);
}
