/*
 * test_proving.c - work on several devices (server/proving.c): side by side on what calls itself a GPU, one after the other on a processor; what is built side
 * by side is what is built alone; and a failure anywhere ends in one sentence and nothing left. The devices are engines on the processor. Run from the
 * root of the repository. Threads: those of proving_run, and what the sanitizers find in them.
 */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "server/safety_verify.h"
#include "tests/golden/make_adapter.h"
#include "tests/golden/tiny.h"

enum { N = 3, SIDE = 32, RGB = SIDE * SIDE * 3, PATIENCE_S = 60 };

static struct be_ops gpu; /* be_cpu by another name */

struct rig {
  struct tiny t[N];
  struct be lane[N];
  struct proving on[N];
};

static void rig_open(struct rig *r, const struct be_ops *ops)
{
  struct err e = {0};

  for (int i = 0; i < N; i++) {
    tiny_open(&r->t[i], ops, &(struct be_config){.threads = 1}, "sd15", NULL);
    must(ops->open_lane(&r->lane[i], &r->t[i].be, 1, &e), &e);
    r->on[i] = (struct proving){.model = r->t[i].m, .lane = &r->lane[i], .number = 10 + i};
  }
}

static void rig_close(struct rig *r)
{
  for (int i = 0; i < N; i++) {
    model_close(r->t[i].m);
    r->t[i].m = NULL;
    be_close(&r->lane[i]);
    tiny_close(&r->t[i]);
  }
}

/* ---- what is done at once ---- */

/* fails: a bit for each device that does. */
struct meeting {
  _Atomic int in, calls, most, idle;
  int waits, fails;
};

/* Waits, where it is told to, until all are in. */
static int meet(void *arg, int i, struct err *e)
{
  static const struct timespec moment = {.tv_nsec = 1000000};
  struct meeting *m = arg;
  time_t end = time(NULL) + PATIENCE_S;
  int in = atomic_fetch_add(&m->in, 1) + 1, most = atomic_load(&m->most);

  atomic_fetch_add(&m->idle, sched_getscheduler(0) == SCHED_IDLE);
  atomic_fetch_add(&m->calls, 1);
  while (in > most && !atomic_compare_exchange_weak(&m->most, &most, in))
    ;
  while (m->waits && atomic_load(&m->calls) < N && time(NULL) < end)
    nanosleep(&moment, NULL);
  atomic_fetch_sub(&m->in, 1);
  return m->fails >> i & 1 ? err_set(e, E_NOMEM, "full up") : 0;
}

static void test_who_works_beside_whom(void **state)
{
  struct be beside = {.ops = &gpu}, after = {.ops = &be_cpu};
  struct proving on[N];
  struct err e = {0};

  (void)state;
  for (int is_gpu = 0; is_gpu < 2; is_gpu++) {
    struct meeting m = {.waits = is_gpu};

    for (int i = 0; i < N; i++)
      on[i] = (struct proving){.lane = is_gpu ? &beside : &after, .number = 10 + i};
    must(proving_run(on, N, meet, &m, &e), &e);
    assert_int_equal(m.calls, N);
    assert_int_equal(m.most, is_gpu ? N : 1);
    m = (struct meeting){0};
    must(proving_run(on, 1, meet, &m, &e), &e);
    assert_int_equal(m.calls, 1);
  }
}

static void *run_idle(void *arg)
{
  struct be beside = {.ops = &gpu};
  const struct proving on[N] = {{.lane = &beside}, {.lane = &beside}, {.lane = &beside}};
  struct sched_param p = {0};
  struct err e = {0};

  must(pthread_setschedparam(pthread_self(), SCHED_IDLE, &p), &e);
  must(proving_run(on, N, meet, arg, &e), &e);
  return NULL;
}

/* What the loader may not take from those who draw, its threads do not take either. */
static void test_threads_give_way(void **state)
{
  struct meeting m = {.waits = 1};
  pthread_t t;

  (void)state;
  assert_int_equal(pthread_create(&t, NULL, run_idle, &m), 0);
  pthread_join(t, NULL);
  assert_int_equal(m.idle, N);
}

/* The first device that failed has the word, all were waited for, and on a processor nobody begins after it. */
static void test_failures(void **state)
{
  struct be beside = {.ops = &gpu}, after = {.ops = &be_cpu};
  struct proving on[N];

  (void)state;
  for (int fails = 1; fails < 1 << N; fails++)
    for (int is_gpu = 0; is_gpu < 2; is_gpu++) {
      struct meeting m = {.waits = is_gpu, .fails = fails};
      int first = fails & 1 ? 0 : fails & 2 ? 1 : 2;
      struct err e = {0};
      char says[40];

      for (int i = 0; i < N; i++)
        on[i] = (struct proving){.lane = is_gpu ? &beside : &after, .number = 10 + i};
      assert_int_equal(proving_run(on, N, meet, &m, &e), E_NOMEM);
      snprintf(says, sizeof says, "device %d: full up", 10 + first);
      assert_string_equal(e.msg, says);
      assert_int_equal(m.in, 0);
      assert_int_equal(m.calls, is_gpu ? N : first + 1);
    }
  struct meeting m = {.fails = 1};
  struct err e = {0};
  assert_int_equal(proving_run(on, 1, meet, &m, &e), E_NOMEM);
  assert_string_equal(e.msg, "full up"); /* one device needs no number */
}

/* ---- generations ---- */

struct build {
  const struct rig *r;
  struct adapter_use use;
  enum generation_form form;
  struct generation *g[N];
};

static int build_on(void *arg, int i, struct err *e)
{
  struct build *b = arg;
  const struct proving *on = &b->r->on[i];

  return generation_build(&b->g[i], model_base(on->model), model_sources(on->model), on->lane, &b->use, 1, b->form, NULL, e);
}

static void draw(struct model *m, struct generation *g, uint8_t *rgb)
{
  const struct draw_params p = {.prompt = "a red heart", .prompt_len = 11, .width = SIDE, .height = SIDE, .steps = 2, .guidance = 3, .seed = 7,
                                .sampler = SAMPLER_DPMPP_2M};
  struct err e = {0};
  struct draw *d;

  must(draw_prepare(&d, m, &p, &e), &e);
  must(draw_start(d, model_lane(m), g, &e), &e);
  while (draw_step_index(d) < draw_step_count(d))
    must(draw_step(d, &e), &e);
  must(draw_decode(d, model_lane(m), rgb, &e), &e);
  draw_close(d);
}

/* Of one adapter, again and again: each device has the picture that the same generation draws where it was built alone, and another one than the base's. */
static void test_built_side_by_side(void **state)
{
  static const struct adapter_plan plan = {"proved", 4, 1, DELTA_LOWRANK, "unet", 1};
  static uint8_t want[2][RGB], got[RGB];
  static struct rig r;
  struct err e = {0};

  (void)state;
  for (int is_gpu = 0; is_gpu < 2; is_gpu++) {
    rig_open(&r, is_gpu ? &gpu : &be_cpu);
    for (int k = 0; k < (is_gpu ? 4 : 2); k++) {
      struct adapter *a = adapter_make(model_base(r.t[0].m), &plan);
      struct build b = {.r = &r, .use = {.adapter = a, .weight = 1, .required = 1}, .form = k % 2 ? FORM_FOLDED : FORM_RUNTIME};

      must(proving_run(r.on, N, build_on, &b, &e), &e);
      for (int i = 0; i < N; i++) {
        assert_string_equal(b.g[i]->digest, b.g[0]->digest);
        draw(r.t[i].m, b.g[i], is_gpu || i ? got : want[k % 2]);
        if (is_gpu || i)
          assert_memory_equal(got, want[k % 2], RGB);
      }
      for (int i = 0; i < N; i++)
        generation_unref(b.g[i]);
      draw(r.t[0].m, model_base(r.t[0].m), got);
      assert_memory_not_equal(got, want[k % 2], RGB);
      adapter_close(a);
    }
    rig_close(&r);
  }
}

/* The bundled model's safety with its manifest and canary: proven on each of two devices at once, and refused by both where the bounds are narrower. */
static void test_proven_side_by_side(void **state)
{
  static struct be be[2], lane[2];
  struct proving on[2];
  struct policy *p;
  struct verifier v;
  struct adapter *a;
  struct err e = {0};

  (void)state;
  must(policy_read(&p, "weights/safety/policy.json", &e), &e);
  for (int i = 0; i < 2; i++) {
    on[i] = (struct proving){.lane = &lane[i], .number = i};
    must(be_open(&be[i], &gpu, &(struct be_config){.threads = 1}, &e), &e);
    must(model_open(&on[i].model, &be[i], "weights/emoji", &e), &e);
    must(gpu.open_lane(&lane[i], &be[i], 1, &e), &e);
  }
  must(verifier_open(&v, on, 2, &e), &e);
  must(verifier_adapter(&v, p, 0, &a, &e), &e);
  adapter_close(a);
  v.bounds.max_norm_ratio = 1e-6;
  assert_int_equal(verifier_adapter(&v, p, 0, &a, &e), E_FILE);
  assert_null(a);
  assert_non_null(strstr(e.msg, "device 0: "));
  verifier_close(&v);
  for (int i = 0; i < 2; i++) {
    model_close(on[i].model);
    be_close(&lane[i]);
    be_close(&be[i]);
  }
  policy_free(p);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_who_works_beside_whom), cmocka_unit_test(test_threads_give_way), cmocka_unit_test(test_failures),
                                     cmocka_unit_test(test_built_side_by_side), cmocka_unit_test(test_proven_side_by_side)};

  gpu = be_cpu;
  gpu.name = "cuda";
  return cmocka_run_group_tests_name("proving", tests, NULL, NULL);
}
