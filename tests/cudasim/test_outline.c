/*
 * test_outline.c - does the outline note what be_cuda asks cuDNN for? The bundled model is walked twice as `safelight compile` does, on an outline and
 * on be_cuda in the simulator, whose dnn.h tells every key that it is asked for: the two lists must be the same. Then pictures as a daemon mixes them must
 * ask for nothing else. And a rehearsal, as a daemon has one before it is ready: it asks for the same list and launches nothing, after it pictures ask for
 * nothing else, and no step takes memory, not even the first of a kind. Run from the root of the repository. Threads: one.
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

enum { SIDE = 32, LARGEST = 48, BATCH = 2, CHUNKS = 2, MOST = 4096 };

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

/* ---- a rehearsal ---- */

/* A device as the daemon sets it up. */
struct rig {
  struct be be;
  struct model *m;
  struct lane *ends;
  struct batch *b;
};

static void rig_open(struct rig *r)
{
  struct err e = {0};

  must(be_open(&r->be, &be_cuda, &(struct be_config){.threads = 1}, &e), &e);
  must(model_open(&r->m, &r->be, "weights/emoji", &e), &e);
  must(model_reserve_for(r->m, LARGEST, LARGEST, LANE_STEPS, &e), &e);
  must(batch_open(&r->b, r->m, BATCH, &e), &e);
  must(lane_open(&r->ends, r->m, 1, LANE_ENDS, &e), &e);
}

static void rig_close(struct rig *r)
{
  lane_close(r->ends);
  batch_close(r->b);
  model_close(r->m);
  be_close(&r->be);
  assert_string_equal(cudasim_fault(), "");
  assert_int_equal(cudasim_counts().live, 0);
}

static void rehearse(struct rig *r)
{
  struct lane_rehearsal of = {LARGEST, LARGEST, batch_rows(r->b), PROMPT_MAX_CHUNKS};
  struct err e = {0};

  must(lane_rehearse(model_lane(r->m), &of, REHEARSE_MEMORY, &e), &e);
  of = (struct lane_rehearsal){SIDE, SIDE, 0, 1};
  must(lane_rehearse(r->ends, &of, REHEARSE_ALL, &e), &e);
  for (of.rows = 1; of.rows <= batch_rows(r->b); of.rows++)
    must(lane_rehearse(model_lane(r->m), &of, REHEARSE_ALL, &e), &e);
}

static struct draw *started(struct rig *r, const char *prompt, float guidance, int side, const uint8_t *first)
{
  const struct draw_params p = {.prompt = prompt, .prompt_len = strlen(prompt), .negative = "", .width = side, .height = side, .steps = 2,
                                .guidance = guidance, .seed = 3, .sampler = SAMPLER_EULER_A, .init_rgb = first, .strength = 1};
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, r->m, &p, &e), &e);
  must(draw_start(d, r->ends, model_base(r->m), &e), &e);
  return d;
}

/* Two steps of up to BATCH pictures, the second without the last of them; returns how often memory was taken for them. They are decoded and closed. */
static long steps(struct rig *r, struct draw **d, int n)
{
  static uint8_t rgb[LARGEST * LARGEST * 3];
  long before = cudasim_counts().allocations, taken;
  struct err err[BATCH], e = {0};

  for (int k = 0; k < 2; k++) {
    batch_step(r->b, d, k && n > 1 ? n - 1 : n, err);
    for (int i = 0; i < n - (k && n > 1); i++)
      must(err[i].code, &err[i]);
  }
  taken = cudasim_counts().allocations - before;
  must(draw_decode(d[0], r->ends, rgb, &e), &e);
  for (int i = 0; i < n; i++)
    draw_close(d[i]);
  return taken;
}

static void test_rehearsal(void **state)
{
  static uint8_t rgb[SIDE * SIDE * 3];
  struct cudasim_count before, after;
  char text[2 * 80 + 1];
  struct gpu_key *list;
  struct draw *d[BATCH];
  struct outline o;
  struct model *m;
  struct rig r;
  struct err e = {0};
  int n;

  (void)state;
  rig_open(&r);
  asked_n = 0;
  cudasim_watch_dnn(see);
  before = cudasim_counts();
  rehearse(&r);
  after = cudasim_counts();
  assert_int_equal(after.launches, before.launches);
  assert_int_equal(after.waits, before.waits);
  outline_open(&o, 0);
  must(model_open(&m, &o.be, "weights/emoji", &e), &e);
  must(compile_walk_size(m, SIDE, SIDE, BATCH, 1, &e), &e);
  model_close(m);
  assert_int_equal(missing(asked, asked_n, o.key, o.keys, "the outline"), 0);
  assert_int_equal(missing(o.key, o.keys, asked, asked_n, "the rehearsal"), 0);
  outline_close(&o);
  n = asked_n;
  list = malloc((size_t)n * sizeof *list);
  assert_non_null(list);
  memcpy(list, asked, (size_t)n * sizeof *list);

  d[0] = started(&r, "a red apple", 3, SIDE, NULL);
  d[1] = started(&r, "a bell", 1, SIDE, rgb);
  assert_int_equal(steps(&r, d, 2), 0);
  assert_int_equal(missing(asked, asked_n, list, n, "the rehearsal"), 0);
  for (int i = 0; i < 80; i++) /* two chunks, which were not rehearsed: their plans are new, their memory is not */
    memcpy(text + 2 * i, "a ", 3);
  d[0] = started(&r, text, 3, LARGEST, NULL);
  assert_int_equal(steps(&r, d, 1), 0);
  assert_true(missing(asked, asked_n, list, n, "the rehearsal") > 0);
  cudasim_watch_dnn(NULL);
  free(list);
  rig_close(&r);
}

/* Else the first steps take memory, or the test above could not fail; and a rehearsal refuses what computes nothing of a pass. */
static void test_no_rehearsal(void **state)
{
  struct lane_rehearsal of = {SIDE + 1, SIDE, 1, 1};
  struct draw *d[BATCH];
  struct err e = {0};
  struct rig r;

  (void)state;
  rig_open(&r);
  d[0] = started(&r, "a red apple", 3, SIDE, NULL);
  assert_true(steps(&r, d, 1) > 0);
  assert_int_equal(lane_rehearse(model_lane(r.m), &of, REHEARSE_ALL, &e), E_ARG);
  assert_string_equal(e.field, "size");
  e = (struct err){0};
  of = (struct lane_rehearsal){LARGEST, LARGEST, 64, 1};
  assert_int_equal(lane_rehearse(model_lane(r.m), &of, REHEARSE_ALL, &e), E_NOMEM);
  e = (struct err){0};
  assert_int_equal(r.be.ops->rehearse(&r.be, REHEARSE_MEMORY), 1);
  assert_int_equal(r.be.ops->sync(&r.be, &e), E_INTERNAL);
  assert_int_equal(r.be.ops->rehearse(&r.be, REHEARSE_NOTHING), 1);
  e = (struct err){0};
  must(r.be.ops->sync(&r.be, &e), &e);
  rig_close(&r);
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
      cmocka_unit_test(test_rehearsal),
      cmocka_unit_test(test_no_rehearsal),
      cmocka_unit_test(test_bounds),
  };

  return cmocka_run_group_tests_name("outline", tests, NULL, NULL);
}
