/*
 * test_sim.c - would the simulator notice? Kernels that are wrong in one way each, memory used past its end, graphs that allocate, and a backend
 * whose device fails. Threads: one; cases that must end the program run in a child.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/half.h"
#include "kernels/backend.h"
#include "kernels/cuda/kernels.h"
#include "tests/cudasim/sim.h"
#include "tests/cudasim/wrong.h"

enum { N = 64 };

extern const struct be_ops be_cuda;
static cudaStream_t stream;
static float *y;

static int setup(void **state)
{
  (void)state;
  cudasim_reset();
  cudasim_seed(0);
  return cudaStreamCreateWithFlags(&stream, 0) || cudaMalloc((void **)&y, N * sizeof *y);
}

static int teardown(void **state)
{
  (void)state;
  cudasim_reset();
  cudaFree(y);
  cudaStreamDestroy(stream);
  return cudasim_counts().live != 0;
}

static void expect_fault(enum wrong what, int arg, const char *words)
{
  int r = wrong_launch(what, stream, y, arg);

  if (r != cudaErrorLaunchFailure || !strstr(cudasim_fault(), words))
    fail_msg("kernel %d: code %d, \"%s\" instead of \"%s\"", (int)what, r, cudasim_fault(), words);
  assert_int_equal(cudaStreamSynchronize(stream), cudaErrorLaunchFailure); /* it sticks */
  cudasim_reset();
  assert_int_equal(wrong_launch(REVERSE, stream, y, 1), 0); /* and the next kernel runs */
}

static void test_barriers(void **state)
{
  (void)state;
  expect_fault(BARRIER_SKIPPED, 0, "a thread that has left");
  expect_fault(LEFT_EARLY, 0, "a thread that has left");
  expect_fault(TWO_BARRIERS, 0, "different places");
}

static void test_shuffles(void **state)
{
  (void)state;
  assert_int_equal(wrong_launch(SHUFFLE_STEP, stream, y, 1), 0);
  assert_true(y[0] == 1 && y[1] == 0 && y[31] == 30);
  assert_int_equal(wrong_launch(SHUFFLE_MASK, stream, y, 0x0f), 0);
  expect_fault(SHUFFLE_MASK, 0x01, "outside of its mask");
  expect_fault(SHUFFLE_STEP, 32, "outside of its mask");
  expect_fault(MISSING_LANE, 0, "a lane that has left");
  expect_fault(CROSSED, 0, "wait for each other");
}

/* A missing barrier and shared memory that nobody wrote show in the numbers. */
static void test_races(void **state)
{
  int wrong = 0;

  (void)state;
  for (uint64_t seed = 0; seed < 3; seed++) {
    cudasim_seed(seed);
    assert_int_equal(wrong_launch(REVERSE, stream, y, 1), 0);
    for (int i = 0; i < N; i++)
      assert_true(y[i] == (float)(N - 1 - i));
    assert_int_equal(wrong_launch(REVERSE, stream, y, 0), 0);
    for (int i = 0; i < N; i++)
      wrong += !(y[i] == (float)(N - 1 - i));
  }
  assert_true(wrong > 0);
  assert_int_equal(wrong_launch(UNWRITTEN, stream, y, 0), 0);
  assert_true(isnan(y[0]) && y[1] == 1);
}

/* Whether the kernel ends the program, in a child whose report nobody needs to read. */
static int is_fatal(enum wrong what, int arg)
{
  int status;
  pid_t child;

  fflush(stdout);
  fflush(stderr);
  child = fork();
  if (child == 0) {
    if (!freopen("/dev/null", "w", stderr))
      _exit(0);
    (void)wrong_launch(what, stream, y, arg);
    _exit(0);
  }
  assert_true(child > 0);
  assert_int_equal(waitpid(child, &status, 0), child);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_bounds(void **state)
{
  (void)state;
  assert_false(is_fatal(WRITE_AT, N - 1));
  assert_true(is_fatal(WRITE_AT, N));
  assert_true(is_fatal(WRITE_AT, -1));
  assert_false(is_fatal(SHARED_AT, N - 1));
  assert_true(is_fatal(SHARED_AT, N));
  assert_false(is_fatal(WIDE_AT, 4));
  assert_true(is_fatal(WIDE_AT, 2)); /* misaligned */
  assert_true(is_fatal(WIDE_AT, N));
}

/* What another device owns is out of bounds, while that one's own work may use it. */
static void test_reach(void **state)
{
  cudaStream_t first = stream;
  cudaStream_t second;

  (void)state;
  cudasim_devices(2);
  assert_int_equal(cudaSetDevice(1), 0);
  assert_int_equal(cudaStreamCreateWithFlags(&second, 0), 0);
  stream = second;
  assert_true(is_fatal(WRITE_AT, 0)); /* y is of device 0 */
  assert_int_equal(cudaSetDevice(0), 0);
  stream = first;
  assert_false(is_fatal(WRITE_AT, 0));
  assert_int_equal(cudaStreamDestroy(second), 0);
  cudasim_devices(1);
}

static void test_limits(void **state)
{
  (void)state;
  assert_int_equal(wrong_launch(TOO_MANY_THREADS, stream, y, 0), cudaErrorInvalidConfiguration);
}

/* Tensor cores: a product of small numbers, no two rows or columns alike, is the plain one to the last bit; all lanes have to be there. */
static void test_products(void **state)
{
  uint16_t *a, *b;
  float *d;

  (void)state;
  assert_int_equal(cudaMalloc((void **)&a, 16 * 16 * sizeof *a), 0);
  assert_int_equal(cudaMalloc((void **)&b, 16 * 8 * sizeof *b), 0);
  assert_int_equal(cudaMalloc((void **)&d, 16 * 8 * sizeof *d), 0);
  for (int is_f16 = 0; is_f16 < 2; is_f16++) {
    float left[16 * 16], right[16 * 8];

    for (int i = 0; i < 16 * 16; i++)
      left[i] = (float)(i * i % 61 - 30);
    for (int i = 0; i < 16 * 8; i++)
      right[i] = (float)(i * i * 3 % 59 - 29);
    for (int i = 0; i < 16 * 16; i++)
      a[i] = is_f16 ? f32_to_f16(left[i]) : f32_to_bf16(left[i]);
    for (int i = 0; i < 16 * 8; i++) {
      b[i] = is_f16 ? f32_to_f16(right[i]) : f32_to_bf16(right[i]);
      d[i] = (float)i;
    }
    assert_int_equal(wrong_product(stream, d, a, b, is_f16, 0), 0);
    for (int i = 0; i < 16 * 8; i++) {
      float want = (float)i;

      for (int k = 0; k < 16; k++)
        want += left[i / 8 * 16 + k] * right[k * 8 + i % 8];
      assert_true(d[i] == want);
    }
  }
  assert_int_equal(wrong_product(stream, d, a, b, 0, 1), cudaErrorLaunchFailure);
  assert_non_null(strstr(cudasim_fault(), "a lane that has left"));
  cudasim_reset();
  cudaFree(a);
  cudaFree(b);
  cudaFree(d);
}

/* A graph runs when it is launched, as often as it is launched, on what the memory holds then; it must not allocate or wait. */
static void test_graph(void **state)
{
  struct kern_gather_rows rows = {.row = {{1, 2}, {0, 3}}};
  float in[2] = {10, 20}, out[2];
  uint16_t *h;
  float *x;
  cudaGraph_t g;
  cudaGraphExec_t exec;
  void *p;

  (void)state;
  assert_int_equal(cudaMalloc((void **)&x, sizeof in), 0);
  assert_int_equal(cudaMalloc((void **)&h, 2 * sizeof *h), 0);
  assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), 0);
  assert_int_equal(cudaMemcpyAsync(x, in, sizeof in, cudaMemcpyHostToDevice, stream), 0);
  assert_int_equal(kern_gather_scale(stream, KERN_F16, h, x, &rows, 2, 1), 0);
  assert_int_equal(kern_convert(stream, y, KERN_F32, h, KERN_F16, 2), 0);
  assert_int_equal(cudaMalloc(&p, 8), cudaErrorStreamCaptureUnsupported);
  assert_int_equal(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
  assert_int_equal(cudaStreamEndCapture(stream, &g), 0);
  assert_true(isnan(x[0])); /* nothing has run */
  assert_int_equal(cudaGraphInstantiate(&exec, g, 0), 0);
  assert_int_equal(cudaGraphLaunch(exec, stream), 0);
  assert_true(y[0] == 40 && y[1] == 30);
  in[0] = 1;
  rows.row[0].scale = 99; /* parameters were copied at the capture */
  assert_int_equal(cudaGraphLaunch(exec, stream), 0);
  assert_int_equal(cudaMemcpyAsync(out, y, sizeof out, cudaMemcpyDeviceToHost, stream), 0);
  assert_true(out[0] == 40 && out[1] == 3);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(g);
  cudaFree(x);
  cudaFree(h);
}

/* Memory of the pool that goes back on another stream: fine behind an event or a wait of the host, a fault while a stream may still use it; at
 * once on its own stream. A capture that another stream waits for is a fault. */
static void test_pool(void **state)
{
  cudaStream_t user;
  cudaStream_t other;
  cudaEvent_t event;
  void *p[4];

  (void)state;
  assert_int_equal(cudaStreamCreateWithFlags(&user, 0) || cudaStreamCreateWithFlags(&other, 0) || cudaEventCreateWithFlags(&event, 0), 0);
  for (int i = 0; i < 4; i++)
    assert_int_equal(cudaMallocAsync(&p[i], 64, stream), 0);
  assert_int_equal(cudaMemsetAsync(p[0], 1, 64, user), 0);
  assert_int_equal(cudaFreeAsync(p[3], stream), 0);
  assert_int_equal(cudaEventRecord(event, user) || cudaStreamWaitEvent(other, event, 0), 0);
  assert_int_equal(cudaFreeAsync(p[0], other), 0);
  assert_string_equal(cudasim_fault(), "");
  assert_int_equal(cudaMemsetAsync(p[1], 1, 64, user) || cudaStreamSynchronize(user), 0);
  assert_int_equal(cudaFreeAsync(p[1], other), 0);
  assert_string_equal(cudasim_fault(), "");
  assert_int_equal(cudaMemsetAsync(p[2], 1, 64, user), 0); /* after the event */
  (void)cudaFreeAsync(p[2], other);
  assert_non_null(strstr(cudasim_fault(), "may still use it"));
  cudasim_reset();
  assert_int_equal(cudaStreamBeginCapture(user, cudaStreamCaptureModeThreadLocal), 0);
  assert_int_not_equal(cudaEventRecord(event, user), 0);
  {
    cudaGraph_t g;

    assert_int_equal(cudaStreamEndCapture(user, &g), 0);
    cudaGraphDestroy(g);
  }
  cudasim_reset();
  cudaEventDestroy(event);
  cudaStreamDestroy(user);
  cudaStreamDestroy(other);
}

/* ---- the backend on a failing device ---- */

static void test_no_device(void **state)
{
  struct err e = {0};
  struct be be;

  (void)state;
  cudasim_devices(0);
  assert_int_equal(be_open(&be, &be_cuda, &(struct be_config){0}, &e), E_DEVICE);
  assert_non_null(strstr(e.msg, "no GPU"));
  cudasim_devices(1);
}

/* Every allocation of opening, loading and running fails once: E_NOMEM, nothing is lost, and the backend works afterwards. */
static void test_out_of_memory(void **state)
{
  static const float w[64 * 64], gamma[64], x[64];
  const struct weight_desc linear = {.kind = WEIGHT_LINEAR, .out = 64, .in = 64, .w = w, .bias = gamma};
  const struct weight_desc norm = {.kind = WEIGHT_NORM, .out = 64, .w = gamma, .bias = gamma};
  const struct lowrank_desc factors = {.out = 64, .in = 64, .rank = 4, .down = w, .up = w};
  long before = cudasim_counts().live;
  int failures = 0, r = 1;

  (void)state;
  for (int nth = 1; r && nth < 40; nth++) {
    struct weight *wl = NULL, *wn = NULL;
    struct lowrank *l = NULL;
    struct err e = {0};
    struct tensor t = {NULL, {1, 1, 1, 64}, DT_BF16};
    struct be be = {0};

    cudasim_fail_allocation(nth);
    if (!(r = be_open(&be, &be_cuda, &(struct be_config){0}, &e)) && !(r = be.ops->weight_load(&be, &linear, NULL, &wl, &e)) &&
        !(r = be.ops->weight_load(&be, &norm, NULL, &wn, &e)) && !(r = be.ops->lowrank_load(&be, &factors, &l, &e)) &&
        !(r = be.ops->mem_alloc(&be, tensor_bytes(t), &t.p, &e)) && !(r = be.ops->upload(&be, t, x, DT_F32, &e)) &&
        !(r = be.ops->groupnorm(&be, t, t, tensor_none(), wn, 8, 1e-5f, 0, &e)) &&
        !(r = be.ops->lowrank(&be, t, t, (const struct lowrank *const[]){l}, &e)))
      r = be.ops->sync(&be, &e);
    if (r) {
      assert_int_equal(r, E_NOMEM);
      failures++;
    }
    cudasim_fail_allocation(0);
    if (be.ops) {
      be.ops->mem_free(&be, t.p);
      be.ops->weight_free(&be, wl);
      be.ops->weight_free(&be, wn);
      be.ops->lowrank_free(&be, l);
    }
    be_close(&be);
    assert_int_equal(cudasim_counts().live, before);
  }
  assert_int_equal(r, 0);
  assert_true(failures >= 8);
}

/* An error of the device comes back from every later call. */
static void test_sticky(void **state)
{
  struct err e = {0}, later = {0};
  struct tensor t = {NULL, {1, 1, 1, 8}, DT_BF16};
  struct be be;

  (void)state;
  assert_int_equal(be_open(&be, &be_cuda, &(struct be_config){0}, &e), 0);
  assert_int_equal(be.ops->mem_alloc(&be, 16, &t.p, &e), 0);
  assert_int_equal(be.ops->act(&be, t, t, ACT_SILU, &e), 0);
  assert_int_equal(wrong_launch(LEFT_EARLY, stream, y, 0), cudaErrorLaunchFailure);
  assert_int_equal(be.ops->act(&be, t, t, ACT_SILU, &e), E_DEVICE);
  assert_int_equal(be.ops->sync(&be, &later), E_DEVICE);
  assert_non_null(strstr(later.msg, "launch failure"));
  be.ops->mem_free(&be, t.p);
  be_close(&be);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_barriers, setup, teardown), cmocka_unit_test_setup_teardown(test_shuffles, setup, teardown),
      cmocka_unit_test_setup_teardown(test_races, setup, teardown),    cmocka_unit_test_setup_teardown(test_bounds, setup, teardown),
      cmocka_unit_test_setup_teardown(test_reach, setup, teardown),
      cmocka_unit_test_setup_teardown(test_limits, setup, teardown),   cmocka_unit_test_setup_teardown(test_graph, setup, teardown),
      cmocka_unit_test_setup_teardown(test_products, setup, teardown), cmocka_unit_test_setup_teardown(test_pool, setup, teardown),
      cmocka_unit_test(test_no_device),                                cmocka_unit_test(test_out_of_memory),
      cmocka_unit_test_setup_teardown(test_sticky, setup, teardown),
  };

  return cmocka_run_group_tests_name("simulator", tests, NULL, NULL);
}
