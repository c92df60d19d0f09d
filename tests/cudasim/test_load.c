/*
 * test_load.c - a device of the daemon gets ready on be_cuda: server/device_load.c as it is, one thread, no HTTP. What pictures of the default size ask
 * cuDNN for has been asked before the device is ready, and a server that is told to stop meanwhile does not go on compiling. And a device draws as many
 * pictures at once as its memory holds: so many of the largest are drawn without a failure beside what the plan keeps for others, and one that holds none, or
 * not even the model, is refused with what to lower.
 *
 * Run from the root of the repository. Threads: one; stage threads are not started.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/cuda/dnn.h"
#include "server/worker.h"
#include "tests/cudasim/sim.h"

enum { SIDE = 32, LARGEST = 48, PIXELS = LARGEST * LARGEST * 3 };

extern const struct be_ops be_cuda;

static struct worker worker;
static struct config cfg;
static struct jobs jobs;
static long asked;

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s %s", err_name(r), e->msg, cudasim_fault());
}

static void see(const struct gpu_key *k)
{
  (void)k;
  asked++;
}

static void prepare(int running, int batch, int max_size)
{
  struct device_list list;
  struct err e = {0};

  config_defaults(&cfg);
  cfg.running = running;
  cfg.batch = batch;
  cfg.size = SIDE;
  cfg.max_size = max_size;
  must(devices_read(&list, "0", &e), &e);
  must(jobs_open(&jobs, 4, cfg.running, 1, &e), &e);
  worker_init(&worker, &cfg, &list, &jobs, -1);
  worker.ops = &be_cuda;
  asked = 0;
  cudasim_watch_dnn(see);
}

static void finish(void)
{
  cudasim_watch_dnn(NULL);
  device_close(&worker.device[0]);
  jobs_close(&jobs);
  assert_int_equal(cudasim_counts().live, 0);
}

/* The largest picture there is: guidance, a mask, the longest prompts. */
static struct draw *largest(struct device *d, int side, uint64_t seed)
{
  static uint8_t rgb[PIXELS];
  static char text[2 * PROMPT_CHUNK * PROMPT_MAX_CHUNKS];
  struct draw_params p = {.prompt = text, .negative = text, .width = side, .height = side, .steps = 2, .guidance = 3, .seed = seed, .sampler = SAMPLER_EULER_A,
                          .init_rgb = rgb, .mask = rgb, .strength = 1};
  struct err e = {0};
  struct draw *draw;

  for (int i = 0; i < (PROMPT_MAX_CHUNKS - 1) * (PROMPT_CHUNK - 2) + 1; i++)
    memcpy(text + 2 * i, "a ", 3);
  p.prompt_len = p.negative_len = strlen(text);
  must(draw_prepare(&draw, d->model, &p, &e), &e);
  must(draw_start(draw, d->stage.lane, model_base(d->model), &e), &e);
  return draw;
}

static void test_ready(void **state)
{
  struct device *d = &worker.device[0];
  struct cudasim_count before;
  struct err e = {0}, err[1];
  struct draw *draw;
  long all;

  (void)state;
  prepare(2, 2, LARGEST);
  must(device_load(d, &e), &e);
  assert_int_equal(batch_rows(d->batch), 4);
  all = asked;
  assert_true(all > 100);
  draw = largest(d, LARGEST, 1);
  before = cudasim_counts();
  batch_step(d->batch, &draw, 1, err);
  must(err[0].code, &err[0]);
  assert_int_equal(cudasim_counts().allocations, before.allocations);
  assert_true(asked > all);
  draw_close(draw);
  finish();
}

/* Refused before it begins, and within the rehearsal: each count of rows asks anew whether it is to go on. */
static void stop(const struct gpu_key *k)
{
  (void)k;
  if (++asked == 60)
    jobs_refuse(&jobs);
}

static void test_stop(void **state)
{
  struct err e = {0};
  long all;

  (void)state;
  prepare(2, 2, LARGEST);
  must(device_load(&worker.device[0], &e), &e);
  all = asked;
  finish();
  prepare(2, 2, LARGEST);
  cudasim_watch_dnn(stop);
  assert_int_equal(device_load(&worker.device[0], &e), E_NOTREADY);
  assert_in_range(asked, 60, all - 20);
  finish();
}

/* ---- memory ---- */

/* What the plan keeps for others: the loader's context, which has no working memory of vendors here, and a safety generation. */
static void take(struct device *d, size_t bytes, void **p)
{
  struct err e = {0};

  must(d->be.ops->mem_alloc(&d->be, bytes, p, &e), &e);
}

/* Loads the device with so much memory. When it does, and is_full: all pictures that it runs at once, the largest ones, are started and make a step. Returns
 * how many. */
static int admitted(size_t bytes, int is_full, struct err *e)
{
  struct device *d = &worker.device[0];
  struct draw *draw[JOB_ALIVE_MAX];
  struct err err[JOB_ALIVE_MAX];
  struct be_memory lane;
  void *loader, *generation;
  int n = 0;

  prepare(2, 2, LARGEST);
  cudasim_memory(bytes);
  *e = (struct err){0};
  if (!device_load(d, e)) {
    n = d->running;
    assert_int_equal(jobs_count(&jobs).room, n);
  }
  if (n && is_full) {
    lane_memory(d->stage.lane, &lane);
    take(d, lane.working, &loader);
    take(d, (size_t)model_info(d->model)->unet_params * 2, &generation);
    for (int i = 0; i < n; i++)
      draw[i] = largest(d, LARGEST, (uint64_t)i);
    batch_step(d->batch, draw, n, err);
    for (int i = 0; i < n; i++) {
      must(err[i].code, &err[i]);
      assert_int_equal(draw_bytes(draw[i]) + draw_shared_bytes(draw[i]), d->plan.picture);
      draw_close(draw[i]);
    }
    d->be.ops->mem_free(&d->be, loader);
    d->be.ops->mem_free(&d->be, generation);
  }
  cudasim_memory((size_t)8 << 30);
  finish();
  return n;
}

static void test_admission(void **state)
{
  struct device *d = &worker.device[0];
  size_t used, later, generation, picture;
  struct be_memory lane;
  struct err e = {0};

  (void)state;
  prepare(2, 2, LARGEST);
  must(device_load(d, &e), &e);
  lane_memory(d->stage.lane, &lane);
  used = lane.total - lane.free;
  later = lane.working + LARGEST * LARGEST * 3 * sizeof(float);
  picture = (size_t)d->plan.picture;
  generation = (size_t)model_info(d->model)->unet_params * 2;
  assert_true(picture > 1 << 20 && used > (size_t)d->plan.weights + (size_t)d->plan.activations);
  assert_true(used < (size_t)(d->plan.weights + d->plan.activations + d->plan.working));
  finish();
  assert_int_equal(admitted(used + later + generation + 2 * picture, 1, &e), 2);
  assert_int_equal(admitted(used + later + generation + 2 * picture - 1, 1, &e), 1);
  assert_int_equal(admitted(used + later + generation, 0, &e), 1);
  assert_int_equal(admitted(used + later + picture - 1, 0, &e), 0);
  assert_int_equal(e.code, E_NOMEM);
  assert_non_null(strstr(e.msg, "hold no picture of up to 48x48"));
  assert_non_null(strstr(e.msg, "lower max_size or batch"));
  assert_int_equal(admitted(used - 1, 0, &e), 0);
  assert_int_equal(e.code, E_NOMEM);
  assert_non_null(strstr(e.msg, "too little memory for pictures up to 48x48, 2 in a step; lower max_size or batch"));
  assert_int_equal(admitted((size_t)70 << 20, 0, &e), 0);
  assert_int_equal(e.code, E_NOMEM);
  assert_non_null(strstr(e.msg, "the model does not fit on device 0"));
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_ready), cmocka_unit_test(test_stop), cmocka_unit_test(test_admission)};

  return cmocka_run_group_tests_name("a device loads", tests, NULL, NULL);
}
