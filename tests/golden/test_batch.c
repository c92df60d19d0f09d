/*
 * test_batch.c - batches: the bits of a picture are the same alone and in any company, on any lane, with any number of threads; one that fails
 * touches no neighbour; previews run beside steps. `make SAN=thread` runs this program too. Run from the root of the repository.
 *
 * Under ThreadSanitizer every context has one computing thread, because gcc's OpenMP runtime is not built for it (OMP_NUM_THREADS=1 for the rest);
 * the threads of a batch are ordinary ones and are watched. What has no threads then is left out: whole pictures take minutes there.
 */
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/batch.h"
#include "tests/golden/make_adapter.h"
#include "tests/golden/tiny.h"

enum { MOST = 20, RGB = 64 * 64 * 3, STEPS = 4 };

#ifdef __SANITIZE_THREAD__
enum { HAS_TEAMS = 0 };
#else
enum { HAS_TEAMS = 1 };
#endif

/* ---- pictures that differ in everything ---- */

static struct draw_params params(int i)
{
  static const char *const prompt[] = {"a red heart", "two cats (and a dog:1.3) under a tree", "a bell BREAK made of gold", "", "a fish"};
  static const enum sampler_kind sampler[] = {SAMPLER_DDIM, SAMPLER_EULER_A, SAMPLER_DPMPP_2M, SAMPLER_EULER};
  struct draw_params p = {.prompt = prompt[i % 5], .prompt_len = strlen(prompt[i % 5]), .negative = i % 2 ? "blurry" : "",
                          .negative_len = i % 2 ? 6 : 0, .width = i % 3 == 2 ? 40 : 64, .height = i % 3 == 2 ? 56 : 64, .steps = 1 + i % STEPS,
                          .guidance = i % 4 == 3 ? 1 : 3 + (float)(i % 3), .seed = (uint64_t)(100 + i), .sampler = sampler[i % 4], .karras = 0};

  p.karras = p.sampler == SAMPLER_DPMPP_2M && i % 8 == 2;
  return p;
}

struct stage {
  struct tiny t;
  struct generation *g[3];     /* the base, and two with an adapter */
  uint8_t *alone[MOST];
  int n;
  int believed;                /* threads that batch_open believes the backend to have; 0: as it has */
};

static struct generation *generation(struct model *m, struct be *be, const char *name, enum generation_form form)
{
  const struct adapter_plan plan = {name, 4, 0.25f, DELTA_LOWRANK, "unet", 1};
  struct adapter *a = adapter_make(model_base(m), &plan);
  const struct adapter_use use = {.adapter = a, .weight = 1, .required = 1};
  struct generation *g;
  struct err e = {0};

  must(generation_build(&g, model_base(m), model_sources(m), be, &use, 1, form, NULL, &e), &e);
  adapter_close(a);
  return g;
}

static struct draw *start(struct stage *s, int i, struct lane *l)
{
  struct draw_params p = params(i);
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, s->t.m, &p, &e), &e);
  must(draw_start(d, l, s->g[i % 3], &e), &e);
  return d;
}

static int is_done(const struct draw *d)
{
  return draw_step_index(d) == draw_step_count(d);
}

static uint8_t *finish(struct draw *d, struct lane *l)
{
  uint8_t *rgb = calloc(1, RGB);
  struct err e = {0};

  assert_non_null(rgb);
  must(draw_decode(d, l, rgb, &e), &e);
  draw_close(d);
  return rgb;
}

static void stage_open(struct stage *s, const struct be_ops *ops, int threads, int f32, int n)
{
  const struct be_config cfg = {.threads = threads, .force_f32 = f32};
  struct err e = {0};

  *s = (struct stage){.n = n};
  tiny_open(&s->t, ops, &cfg, "sd15", NULL);
  s->g[0] = generation_ref(model_base(s->t.m));
  s->g[1] = generation(s->t.m, &s->t.be, "one", FORM_RUNTIME);
  s->g[2] = generation(s->t.m, &s->t.be, "two", FORM_FOLDED);
  for (int i = 0; i < n; i++) {
    struct draw *d = start(s, i, model_lane(s->t.m));

    while (!is_done(d))
      must(draw_step(d, &e), &e);
    s->alone[i] = finish(d, model_lane(s->t.m));
    for (int k = 0; k < i; k++)
      assert_memory_not_equal(s->alone[i], s->alone[k], 40 * 56 * 3);
  }
}

static void stage_close(struct stage *s)
{
  for (int i = 0; i < 3; i++)
    generation_unref(s->g[i]);
  for (int i = 0; i < s->n; i++)
    free(s->alone[i]);
  tiny_close(&s->t);
}

/* All n pictures through batches of up to `alive`, in an order that starts them at different times; each must be what it is alone. */
static void draw_all(struct stage *s, int max_pictures, int alive)
{
  struct draw *d[MOST];
  int number[MOST], n = 0, next = 0;
  struct err err[MOST], e = {0};
  struct batch *b;

  if (s->believed)
    s->t.be.threads = s->believed;
  must(batch_open(&b, s->t.m, max_pictures, &e), &e);
  if (s->believed)
    s->t.be.threads = 1;
  while (n || next < s->n) {
    int kept = 0;

    for (int joined = 0; n < alive && next < s->n && joined < 1 + alive / 4; joined++, next++) {
      number[n] = next * 7 % s->n; /* another order than alone */
      d[n] = start(s, number[n], model_lane(s->t.m));
      n++;
    }
    batch_step(b, d, n, err);
    for (int i = 0; i < n; i++) {
      must(err[i].code, &err[i]);
      if (is_done(d[i])) {
        uint8_t *rgb = finish(d[i], model_lane(s->t.m));

        if (memcmp(rgb, s->alone[number[i]], RGB))
          fail_msg("picture %d is another one in a batch of %d", number[i], n);
        free(rgb);
      } else {
        number[kept] = number[i];
        d[kept++] = d[i];
      }
    }
    n = kept;
  }
  batch_close(b);
}

static void test_ref(void **state)
{
  struct stage s;

  (void)state;
  if (!HAS_TEAMS)
    skip();
  stage_open(&s, &be_ref, 2, 0, 10);
  draw_all(&s, 6, 10); /* more pictures than a pass has room for */
  draw_all(&s, 20, 5);
  stage_close(&s);
}

static void test_cpu(void **state)
{
  struct stage s;

  (void)state;
  if (!HAS_TEAMS)
    skip();
  for (int f32 = 0; f32 < 2; f32++) {
    stage_open(&s, &be_cpu, 4, f32, MOST);
    draw_all(&s, 20, 20);
    draw_all(&s, 8, 3); /* fewer pictures than threads */
    stage_close(&s);
  }
}

/* Helpers without OpenMP's teams: every lane has one thread, and the batch believes that there are four. */
static void test_helpers(void **state)
{
  struct stage s;

  (void)state;
  stage_open(&s, &be_cpu, 1, 0, 6);
  s.believed = 4;
  draw_all(&s, 8, 6);
  stage_close(&s);
}

/* ---- a picture that fails ---- */

static struct be_ops broken;
static const void *victim;     /* the latent whose update fails */
static int failing_code;

static int failing_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                        const struct step_coef *coef, struct err *e)
{
  if (failing_code && x.p == victim)
    return err_set(e, failing_code, "this one fails");
  if (!victim)
    victim = x.p;
  return (be_ref.name == broken.name ? be_ref : be_cpu).sampler_step(be, x, x0_old, model, noise, coef, e);
}

static int failing_linears;    /* how many passes with several pictures fail */

static int failing_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  if (failing_linears && x.d[0] > 2) {
    failing_linears--;
    return err_set(e, E_NOMEM, "this pass fails");
  }
  return be_ref.linear(be, y, x, w, residual, e);
}

static void one_fails(const struct be_ops *ops, int threads)
{
  static const int of[] = {6, 1, 7, 3}; /* three steps, two, four, four */
  struct draw *d[4];
  struct err err[4], e = {0};
  struct batch *b;
  struct stage s;

  stage_open(&s, ops, threads, 0, 8);
  must(batch_open(&b, s.t.m, 4, &e), &e);
  broken = *ops;
  broken.sampler_step = failing_step;
  broken.linear = ops == &be_ref ? failing_linear : ops->linear;
  for (int i = 0; i < 4; i++)
    d[i] = start(&s, of[i], model_lane(s.t.m));
  victim = NULL;
  failing_code = 0;
  s.t.be.ops = &broken;
  batch_step(b, d, 1, err); /* finds out where the first one's latent is */
  must(err[0].code, &err[0]);
  assert_non_null(victim);
  failing_code = E_INTERNAL;
  failing_linears = 1;
  batch_step(b, d, 4, err);
  assert_int_equal(err[0].code, E_INTERNAL);
  assert_string_equal(err[0].msg, "this one fails");
  assert_int_equal(failing_linears, ops != &be_ref); /* the shared pass failed too, and each was tried alone */
  for (int i = 1; i < 4; i++)
    must(err[i].code, &err[i]);
  draw_close(d[0]);
  d[0] = d[3];
  failing_code = 0;
  for (int live = 1; live;) {
    struct draw *left[3];
    int n = 0;

    for (int i = 0; i < 3; i++)
      if (!is_done(d[i]))
        left[n++] = d[i];
    batch_step(b, left, n, err);
    for (int i = 0; i < n; i++)
      must(err[i].code, &err[i]);
    live = n > 0;
  }
  for (int i = 0; i < 3; i++) {
    int number = of[i ? i : 3];
    uint8_t *rgb = finish(d[i], model_lane(s.t.m));

    assert_memory_equal(rgb, s.alone[number], RGB);
    free(rgb);
  }
  /* a device that is gone is gone for all */
  d[0] = start(&s, 7, model_lane(s.t.m));
  d[1] = start(&s, 3, model_lane(s.t.m));
  victim = NULL;
  batch_step(b, d, 1, err);
  failing_code = E_DEVICE;
  batch_step(b, d, 2, err);
  assert_int_equal(err[0].code, E_DEVICE);
  assert_int_equal(err[1].code, E_DEVICE);
  /* and one that has no step left, or never began, is refused without harm */
  failing_code = 0;
  while (!is_done(d[0]))
    must(draw_step(d[0], &e), &e);
  batch_step(b, d, 1, err);
  assert_int_equal(err[0].code, E_INTERNAL);
  draw_close(d[0]);
  draw_close(d[1]);
  s.t.be.ops = ops;
  batch_close(b);
  stage_close(&s);
}

static void test_one_fails(void **state)
{
  (void)state;
  if (!HAS_TEAMS)
    skip();
  one_fails(&be_ref, 1);
  one_fails(&be_cpu, 1);
}

/* ---- lanes ---- */

/* A thread that decodes previews of one picture, again and again, while it is stepped. */
struct watcher {
  struct draw *d;
  struct lane *lane;
  pthread_mutex_t lock;
  pthread_cond_t change;
  int is_due, is_ending, seen, bad;
  uint8_t rgb[RGB];
};

static void *watch(void *arg)
{
  struct watcher *w = arg;
  struct err e = {0};

  pthread_mutex_lock(&w->lock);
  for (;;) {
    while (!w->is_due && !w->is_ending)
      pthread_cond_wait(&w->change, &w->lock);
    if (!w->is_due)
      break;
    pthread_mutex_unlock(&w->lock);
    e.code = draw_preview(w->d, w->lane, w->rgb, &e);
    pthread_mutex_lock(&w->lock);
    w->bad |= e.code;
    w->seen++;
    w->is_due = 0;
    pthread_cond_signal(&w->change);
  }
  pthread_mutex_unlock(&w->lock);
  return NULL;
}

/* Started on one lane, stepped on the main one, watched and decoded on another: the same picture; the last preview is the picture itself. */
static void lanes(const struct be_ops *ops)
{
  struct watcher w = {.lock = PTHREAD_MUTEX_INITIALIZER, .change = PTHREAD_COND_INITIALIZER};
  struct lane *text, *steps;
  struct err e = {0};
  uint8_t early[RGB], *rgb;
  struct stage s;
  pthread_t t;
  int previews = 0;

  stage_open(&s, ops, 1, 0, 8);
  must(lane_open(&text, s.t.m, 1, LANE_ENDS, &e), &e);
  must(lane_open(&w.lane, s.t.m, 1, LANE_ENDS, &e), &e);
  must(lane_open(&steps, s.t.m, 1, LANE_STEPS, &e), &e);
  assert_true(lane_bytes(text) > 0 && lane_bytes(text) <= lane_bytes(model_lane(s.t.m)));
  w.d = start(&s, 7, text);
  assert_int_equal(draw_preview(w.d, w.lane, early, &e), E_INTERNAL); /* nothing to see yet */
  e = (struct err){0};
  assert_int_equal(draw_snapshot(w.d, &e), E_INTERNAL);
  e = (struct err){0};
  assert_int_equal(draw_decode(w.d, steps, early, &e), E_INTERNAL); /* no memory for that */
  e = (struct err){0};
  assert_int_equal(pthread_create(&t, NULL, watch, &w), 0);
  while (!is_done(w.d)) {
    must(draw_step(w.d, &e), &e);
    pthread_mutex_lock(&w.lock);
    while (w.is_due && is_done(w.d))
      pthread_cond_wait(&w.change, &w.lock);
    if (!w.is_due) {
      must(draw_snapshot(w.d, &e), &e);
      w.is_due = 1;
      previews++;
      pthread_cond_signal(&w.change);
    }
    pthread_mutex_unlock(&w.lock);
  }
  pthread_mutex_lock(&w.lock);
  w.is_ending = 1;
  pthread_cond_signal(&w.change);
  pthread_mutex_unlock(&w.lock);
  pthread_join(t, NULL);
  assert_int_equal(w.bad, 0);
  assert_int_equal(w.seen, previews);
  assert_memory_equal(w.rgb, s.alone[7], RGB);
  rgb = finish(w.d, w.lane);
  assert_memory_equal(rgb, s.alone[7], RGB);
  free(rgb);
  lane_close(text);
  lane_close(steps);
  lane_close(w.lane);
  lane_close(model_lane(s.t.m)); /* does nothing */
  stage_close(&s);
}

/* A picture that is cut at a step is what a preview shows there, and not before the first; the others of its batch do not notice. */
static void cuts(const struct be_ops *ops)
{
  uint8_t seen[RGB], *rgb;
  struct err e = {0};
  struct lane *ends;
  struct draw *d;
  struct stage s;

  stage_open(&s, ops, 1, 0, 8);
  must(lane_open(&ends, s.t.m, 1, LANE_ENDS, &e), &e);
  d = start(&s, 7, ends);
  assert_int_equal(draw_cut(d, &e), E_INTERNAL);
  e = (struct err){0};
  assert_int_equal(draw_decode(d, ends, seen, &e), E_INTERNAL); /* that was no cut */
  e = (struct err){0};
  must(draw_step(d, &e), &e);
  must(draw_snapshot(d, &e), &e);
  must(draw_preview(d, ends, seen, &e), &e);
  must(draw_cut(d, &e), &e);
  rgb = finish(d, ends);
  assert_memory_equal(rgb, seen, RGB);
  assert_memory_not_equal(rgb, s.alone[7], RGB);
  free(rgb);
  lane_close(ends);
  stage_close(&s);
}

static void test_cuts(void **state)
{
  (void)state;
  if (HAS_TEAMS)
    cuts(&be_ref);
  cuts(&be_cpu);
}

static void test_lanes(void **state)
{
  (void)state;
  if (HAS_TEAMS)
    lanes(&be_ref);
  lanes(&be_cpu);
}

/* ---- threads ---- */

/* One picture of each kind with 1 to 4 threads: the same bytes. */
static void test_thread_counts(void **state)
{
  (void)state;
  if (!HAS_TEAMS)
    skip();
  for (int f32 = 0; f32 < 2; f32++) {
    struct stage s;

    stage_open(&s, &be_cpu, 1, f32, 6);
    for (int threads = 2; threads <= 4; threads++) {
      s.t.be.ops->set_threads(&s.t.be, threads);
      for (int i = 0; i < s.n; i++) {
        struct draw *d = start(&s, i, model_lane(s.t.m));
        struct err e = {0};
        uint8_t *rgb;

        while (!is_done(d))
          must(draw_step(d, &e), &e);
        rgb = finish(d, model_lane(s.t.m));
        if (memcmp(rgb, s.alone[i], RGB))
          fail_msg("picture %d is another one on %d threads", i, threads);
        free(rgb);
      }
    }
    stage_close(&s);
  }
}

static void test_limits(void **state)
{
  struct draw_params p = params(0);
  struct stage s;
  struct batch *b;
  struct draw *d;
  struct err e = {0};
  size_t few, many;

  (void)state;
  stage_open(&s, &be_ref, 1, 0, 0);
  assert_int_equal(batch_open(&b, s.t.m, 0, &e), E_ARG);
  e = (struct err){0};
  assert_int_equal(batch_open(&b, s.t.m, BATCH_MAX + 1, &e), E_ARG);
  assert_null(b);
  e = (struct err){0};
  must(batch_plan_bytes(s.t.m, 128, 128, 8, &few, &e), &e);
  must(batch_plan_bytes(s.t.m, 128, 128, 16, &many, &e), &e);
  assert_true(few > 0 && many > few);
  p.width = 128 * 128 / 8;
  p.height = 8;
  assert_int_equal(draw_prepare(&d, s.t.m, &p, &e), E_ARG); /* no more pixels than reserved, but more memory */
  assert_string_equal(e.field, "size");
  e = (struct err){0};
  p.width = 192;
  p.height = 64;
  must(draw_prepare(&d, s.t.m, &p, &e), &e);
  must(draw_start(d, model_lane(s.t.m), s.g[0], &e) || draw_step(d, &e), &e);
  assert_true(draw_bytes(d) > 0);
  draw_close(d);
  batch_close(NULL);
  lane_close(NULL);
  stage_close(&s);
}

/* What a server plans for a picture: no picture takes more, and the largest takes exactly that. */
static void test_plan(void **state)
{
  static uint8_t rgb[64 * 64 * 3];
  static char longest[2 * PROMPT_CHUNK * PROMPT_MAX_CHUNKS];
  struct stage s;
  struct err e = {0};
  size_t plan;

  (void)state;
  for (int i = 0; i < (PROMPT_MAX_CHUNKS - 1) * (PROMPT_CHUNK - 2) + 1; i++)
    memcpy(longest + 2 * i, "a ", 3);
  stage_open(&s, &be_cpu, 1, 0, 0);
  plan = draw_plan_bytes(s.t.m, 64, 64);
  for (int kind = 0; kind < 32; kind++) {
    struct draw_params p = {.prompt = kind & 1 ? longest : "a bell", .negative = kind & 2 ? longest : "", .width = kind & 4 ? 64 : 128,
                            .height = kind & 4 ? 64 : 32, .steps = 1, .guidance = kind & 8 ? 3 : 1, .sampler = SAMPLER_EULER, .strength = 1};
    struct draw *d;

    p.prompt_len = strlen(p.prompt);
    p.negative_len = strlen(p.negative);
    if (kind & 16) {
      p.init_rgb = rgb;
      p.mask = rgb;
    }
    must(draw_prepare(&d, s.t.m, &p, &e), &e);
    must(draw_start(d, model_lane(s.t.m), s.g[0], &e), &e);
    assert_in_range(draw_bytes(d) + draw_shared_bytes(d), 1, plan);
    if (kind == 31)
      assert_int_equal(draw_bytes(d) + draw_shared_bytes(d), plan);
    draw_close(d);
  }
  assert_true(draw_plan_bytes(s.t.m, 128, 128) > plan);
  stage_close(&s);
}

int main(int argc, char **argv)
{
  static const struct CMUnitTest tests[] = {cmocka_unit_test(test_cpu),       cmocka_unit_test(test_helpers), cmocka_unit_test(test_ref),
                                            cmocka_unit_test(test_one_fails), cmocka_unit_test(test_lanes),   cmocka_unit_test(test_thread_counts),
                                            cmocka_unit_test(test_limits),    cmocka_unit_test(test_cuts),
                                            cmocka_unit_test(test_plan)};

  if (argc > 1)
    cmocka_set_test_filter(argv[1]);
  return cmocka_run_group_tests_name("batch", tests, NULL, NULL);
}
