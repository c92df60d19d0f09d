/*
 * test_lowrank.c - what the op cases of tests/ops do not ask of low-rank factors on be_cuda: every size of a block and more ranks than one keeps,
 * numbers that bf16 does not have, how many launches they cost, and a slot that changes between two replays. Threads: one.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/half.h"
#include "kernels/backend.h"
#include "kernels/cuda/kernels.h"
#include "tests/cudasim/sim.h"

extern const struct be_ops be_cuda;

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s %s", err_name(r), e->msg, cudasim_fault());
}

/* ---- sizes ---- */

/* Pictures with factors of rank `rank`, none, and factors of five ranks more, in turn. y is fp32, so that nothing is hidden by its rounding. */
struct size {
  int B, T, in, out, rank;
  double error; /* measured: the largest of any element, relative to the RMS of all */
};

/* Numbers that bf16 has, about as large as 1 on the average. */
static float *numbers(int64_t n, double gain, uint32_t seed)
{
  float *v = malloc((size_t)n * sizeof *v);

  assert_non_null(v);
  for (int64_t i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    v[i] = bf16_to_f32(f32_to_bf16((float)(gain * ((double)(seed >> 8) * 0x1p-23 - 1))));
  }
  return v;
}

/* What `ops` makes of pictures first to first + B - 1 of s: (B, T, out), to be freed. */
static float *raised(const struct be_ops *ops, const struct size *s, int first, int B)
{
  struct tensor tx = {NULL, {B, 1, s->T, s->in}, DT_F32}, ty = {NULL, {B, 1, s->T, s->out}, DT_F32};
  float *x = numbers((int64_t)s->B * s->T * s->in, 1.7, 1), *y = numbers((int64_t)s->B * s->T * s->out, 1.7, 2);
  struct lowrank *l[2];
  const struct lowrank *row[8];
  struct err e = {0};
  struct be be;

  must(be_open(&be, ops, &(struct be_config){.threads = 1}, &e), &e);
  tx.type = be.act;
  for (int i = 0; i < 2; i++) {
    int64_t rank = s->rank + 5 * i;
    float *down = numbers(rank * s->in, 1.7 / sqrt(s->in), 3), *up = numbers(s->out * rank, 1.7 / sqrt((double)rank), 4);

    must(be.ops->lowrank_load(&be, &(struct lowrank_desc){.out = s->out, .in = s->in, .rank = rank, .down = down, .up = up}, &l[i], &e), &e);
    free(down);
    free(up);
  }
  for (int b = 0; b < B; b++)
    row[b] = (first + b) % 3 == 1 ? NULL : l[(first + b) % 3 / 2];
  must(be.ops->mem_alloc(&be, tensor_bytes(tx), &tx.p, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(ty), &ty.p, &e), &e);
  must(be.ops->upload(&be, tx, x + (int64_t)first * s->T * s->in, DT_F32, &e), &e);
  must(be.ops->upload(&be, ty, y + (int64_t)first * s->T * s->out, DT_F32, &e), &e);
  must(be.ops->lowrank(&be, ty, tx, row, &e), &e);
  must(be.ops->download(&be, y, DT_F32, ty, &e), &e);
  be.ops->mem_free(&be, tx.p);
  be.ops->mem_free(&be, ty.p);
  be.ops->lowrank_free(&be, l[0]);
  be.ops->lowrank_free(&be, l[1]);
  be_close(&be);
  free(x);
  return y;
}

/* Blocks of 16 and of 32 pixels, that have all columns or some: the result is be_ref's, and that of a picture alone has the bits of the same among others. */
static void test_sizes(void **state)
{
  static const struct size sizes[] = {
      {3, 2731, 96, 144, 9, 1.5e-5},   /* together large blocks, alone small ones; two walks over the columns */
      {3, 2731, 8, 8, 130, 8.6e-6},    /* more ranks than a block keeps, in large blocks */
      {2, 1030, 8, 136, 130, 1.2e-5},  /* and in small ones with two walks over the columns */
      {1, 17, 2000, 264, 128, 7.0e-6}, /* as many as it keeps; a block for each 128 columns */
      {3, 5, 31, 33, 1, 8.3e-6},       /* nothing is a multiple of anything */
  };

  (void)state;
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const struct size *s = &sizes[i];
    int64_t each = (int64_t)s->T * s->out, n = s->B * each;
    float *all = raised(&be_cuda, s, 0, s->B), *want = raised(&be_ref, s, 0, s->B);
    double worst = 0, squares = 0;

    for (int64_t k = 0; k < n; k++) {
      worst = fmax(worst, isfinite(all[k]) ? fabs((double)all[k] - (double)want[k]) : INFINITY);
      squares += (double)want[k] * (double)want[k];
    }
    assert_true(worst <= 4 * s->error * sqrt(squares / (double)n));
    for (int b = 0; b < s->B; b++) {
      float *alone = raised(&be_cuda, s, b, 1);

      assert_memory_equal(alone, all + b * each, (size_t)each * sizeof *all);
      free(alone);
    }
    free(all);
    free(want);
  }
}

/* ---- numbers ---- */

enum { IN = 40, OUT = 48, RANK = 20, T = 21, MOST = KERN_ROWS + 3 };

static float down[RANK * IN], up[OUT * RANK], x[T * IN], got[T * OUT];

/* got = up (down x) in fp32, of one picture in fp16. */
static void product(void)
{
  static const float zero[T * OUT];
  const struct lowrank_desc d = {.out = OUT, .in = IN, .rank = RANK, .down = down, .up = up};
  struct tensor tx = {NULL, {1, 1, T, IN}, DT_F16}, ty = {NULL, {1, 1, T, OUT}, DT_F32};
  struct lowrank *l;
  struct err e = {0};
  struct be be;

  must(be_open(&be, &be_cuda, &(struct be_config){.want_f16 = 1}, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(tx), &tx.p, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(ty), &ty.p, &e), &e);
  must(be.ops->upload(&be, tx, x, DT_F32, &e), &e);
  must(be.ops->upload(&be, ty, zero, DT_F32, &e), &e);
  must(be.ops->lowrank_load(&be, &d, &l, &e), &e);
  must(be.ops->lowrank(&be, ty, tx, (const struct lowrank *const[]){l}, &e), &e);
  must(be.ops->download(&be, got, DT_F32, ty, &e), &e);
  be.ops->lowrank_free(&be, l);
  be.ops->mem_free(&be, tx.p);
  be.ops->mem_free(&be, ty.p);
  be_close(&be);
}

static double wanted(int t, int o)
{
  double sum = 0;

  for (int r = 0; r < RANK; r++) {
    double z = 0;

    for (int i = 0; i < IN; i++)
      z += (double)down[r * IN + i] * (double)x[t * IN + i];
    sum += z * (double)up[o * RANK + r];
  }
  return sum;
}

/* up has all eleven bits of fp16, and t seven, so that every sum is exact. */
static void test_bits_of_fp16(void **state)
{
  (void)state;
  for (int i = 0; i < RANK * IN; i++)
    down[i] = (float)(i % 3 - 1);
  for (int i = 0; i < T * IN; i++)
    x[i] = (float)(i * 7 % 5 - 2);
  for (int i = 0; i < OUT * RANK; i++)
    up[i] = (float)(1025 + 2 * (i * 37 % 511)) / 1024 * (i % 2 ? -1 : 1);
  product();
  for (int i = 0; i < T * OUT; i++)
    assert_true((double)got[i] == wanted(i / OUT, i % OUT));
}

/* t is beyond the largest number of fp16, and what comes of it is not. */
static void test_beyond_fp16(void **state)
{
  double error = 0, largest = 0;

  (void)state;
  for (int i = 0; i < RANK * IN; i++)
    down[i] = (float)(1 + i * 31 % 7);
  for (int i = 0; i < T * IN; i++)
    x[i] = (float)(32 * (1024 + i * 7919 % 823)); /* fp16 has these */
  for (int i = 0; i < OUT * RANK; i++)
    up[i] = (float)(i % 9 - 3) / 8192;
  product();
  for (int i = 0; i < T * OUT; i++) {
    error = fmax(error, fabs((double)got[i] - wanted(i / OUT, i % OUT)));
    largest = fmax(largest, fabs(wanted(i / OUT, i % OUT)));
  }
  assert_true(error <= 4 * 3.6e-6 * largest); /* measured: 3.6e-6 */
}

/* An infinite x makes the row infinite, not undefined, and no other row anything. */
static void test_infinite(void **state)
{
  (void)state;
  for (int i = 0; i < RANK * IN; i++)
    down[i] = 1;
  for (int i = 0; i < T * IN; i++)
    x[i] = (float)(1 + i % 3);
  for (int i = 0; i < OUT * RANK; i++)
    up[i] = (float)(1025 + 2 * (i % 500)) / 1024;
  x[5 * IN + 7] = INFINITY;
  product();
  for (int i = 0; i < T * OUT; i++)
    assert_true(i / OUT == 5 ? isinf(got[i]) && got[i] > 0 : isfinite(got[i]));
}

/* ---- launches ---- */

/* One launch for as many rows as share it, none where no row has factors, no working memory. */
static void test_launches(void **state)
{
  static const struct {
    int rows, first; /* the first row with factors, and every other one after it */
    long launches;
  } cases[] = {{1, 0, 1}, {2, 1, 1}, {2, 2, 0}, {KERN_ROWS, 0, 1}, {KERN_ROWS, KERN_ROWS, 0}, {MOST, 0, 2}, {MOST, MOST, 0}};
  const struct lowrank_desc d = {.out = OUT, .in = IN, .rank = RANK, .down = down, .up = up};
  struct tensor tx = {NULL, {MOST, 1, 1, IN}, DT_BF16}, ty = {NULL, {MOST, 1, 1, OUT}, DT_BF16};
  struct lowrank *l;
  struct err e = {0};
  struct be be;

  (void)state;
  must(be_open(&be, &be_cuda, &(struct be_config){0}, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(tx), &tx.p, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(ty), &ty.p, &e), &e);
  must(be.ops->lowrank_load(&be, &d, &l, &e), &e);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const struct lowrank *row[MOST] = {NULL};
    struct cudasim_count before = cudasim_counts();

    for (int b = cases[i].first; b < cases[i].rows; b += 2)
      row[b] = l;
    must(be.ops->lowrank(&be, tensor_batch(ty, 0, cases[i].rows), tensor_batch(tx, 0, cases[i].rows), row, &e), &e);
    assert_int_equal(cudasim_counts().launches, before.launches + cases[i].launches);
    assert_int_equal(cudasim_counts().allocations, before.allocations);
  }
  be.ops->lowrank_free(&be, l);
  be.ops->mem_free(&be, tx.p);
  be.ops->mem_free(&be, ty.p);
  be_close(&be);
}

/* Three results of one x, more of them than a launch takes, have the bits of three calls. */
static void test_results(void **state)
{
  enum { B = 25, P = 3 };
  struct tensor tx = {NULL, {B, 1, 2, IN}, DT_BF16}, ty = {NULL, {P * B, 1, 2, OUT}, DT_BF16};
  float *xs = numbers(tensor_count(tx), 1, 1), *zero = calloc((size_t)tensor_count(ty), sizeof *zero), *ups = numbers(OUT * (RANK + P), 1, 2);
  float *downs = numbers((RANK + P) * IN, 1, 3), *want = numbers(tensor_count(ty), 1, 4), *all = numbers(tensor_count(ty), 1, 5);
  const struct lowrank *row[P * B] = {NULL};
  struct cudasim_count before;
  struct lowrank *l[P];
  struct err e = {0};
  struct be be;

  (void)state;
  assert_non_null(zero);
  must(be_open(&be, &be_cuda, &(struct be_config){0}, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(tx), &tx.p, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(ty), &ty.p, &e), &e);
  must(be.ops->upload(&be, tx, xs, DT_F32, &e), &e);
  for (int k = 0; k < P; k++) {
    must(be.ops->lowrank_load(&be, &(struct lowrank_desc){.out = OUT, .in = IN, .rank = RANK + k, .down = downs, .up = ups}, &l[k], &e), &e);
    for (int b = 0; b < B; b++)
      row[k * B + b] = b % 4 == k ? NULL : l[(b + k) % (k + 1)];
  }
  must(be.ops->upload(&be, ty, zero, DT_F32, &e), &e);
  for (int k = 0; k < P; k++)
    must(be.ops->lowrank(&be, tensor_batch(ty, k * B, B), tx, row + k * B, &e), &e);
  must(be.ops->download(&be, want, DT_F32, ty, &e), &e);
  must(be.ops->upload(&be, ty, zero, DT_F32, &e), &e);
  before = cudasim_counts();
  must(be.ops->lowrank(&be, ty, tx, row, &e), &e);
  assert_int_equal(cudasim_counts().launches, before.launches + 2);
  must(be.ops->download(&be, all, DT_F32, ty, &e), &e);
  assert_memory_equal(all, want, (size_t)tensor_count(ty) * sizeof *all);
  assert_true(want[tensor_count(ty) - 1] != 0);
  for (int k = 0; k < P; k++)
    be.ops->lowrank_free(&be, l[k]);
  be.ops->mem_free(&be, tx.p);
  be.ops->mem_free(&be, ty.p);
  be_close(&be);
  free(xs);
  free(zero);
  free(ups);
  free(downs);
  free(want);
  free(all);
}

/* bf16: 1 and 2. */
enum { ONE = 0x3f80, TWO = 0x4000 };

/* A captured launch follows its table and what the slots hold when it is replayed: another rank, other factors, none. */
static void test_slots(void **state)
{
  enum { C = 8, SETS = 2, MOST_RANK = 200 };
  const struct kern_geometry g = {.H = 1, .W = 1, .Ho = 1, .Wo = 1, .kh = 1, .kw = 1, .stride = 1};
  struct kern_slot_rows rows = {0};
  const struct kern_slot **table;
  struct kern_slot *slot;
  uint16_t *tx, *factors[SETS];
  float *ty;
  cudaStream_t s;
  cudaGraph_t graph;
  cudaGraphExec_t exec;

  (void)state;
  assert_int_equal(cudaStreamCreateWithFlags(&s, 0), 0);
  assert_int_equal(cudaMalloc((void **)&table, sizeof *table), 0);
  assert_int_equal(cudaMalloc((void **)&slot, sizeof *slot), 0);
  assert_int_equal(cudaMalloc((void **)&tx, C * sizeof *tx), 0);
  assert_int_equal(cudaMalloc((void **)&ty, C * sizeof *ty), 0);
  for (int k = 0; k < SETS; k++) {
    assert_int_equal(cudaMalloc((void **)&factors[k], C * 208 * sizeof **factors), 0);
    for (int i = 0; i < C * 208; i++)
      factors[k][i] = k ? TWO : ONE;
  }
  for (int i = 0; i < C; i++) {
    tx[i] = ONE;
    ty[i] = 0;
  }
  rows.at = table;
  *table = slot;
  *slot = (struct kern_slot){factors[0], factors[0], 3, 16};
  assert_int_equal(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal), 0);
  assert_int_equal(kern_lowrank(s, KERN_BF16, ty, KERN_F32, tx, &rows, 1, 0, 1, &g, C, C), 0);
  assert_int_equal(cudaStreamEndCapture(s, &graph), 0);
  assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), 0);
  assert_int_equal(cudaGraphLaunch(exec, s), 0);
  assert_true(ty[0] == 3 * C && ty[C - 1] == 3 * C);
  *slot = (struct kern_slot){factors[1], factors[0], MOST_RANK, 208};
  assert_int_equal(cudaGraphLaunch(exec, s), 0);
  assert_true(ty[0] == 3 * C + 2 * MOST_RANK * C);
  *table = NULL;
  assert_int_equal(cudaGraphLaunch(exec, s), 0);
  assert_true(ty[0] == 3 * C + 2 * MOST_RANK * C);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  for (int k = 0; k < SETS; k++)
    cudaFree(factors[k]);
  cudaFree(ty);
  cudaFree(tx);
  cudaFree(slot);
  cudaFree(table);
  cudaStreamDestroy(s);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_sizes),    cmocka_unit_test(test_bits_of_fp16), cmocka_unit_test(test_beyond_fp16),
                                     cmocka_unit_test(test_infinite), cmocka_unit_test(test_launches),     cmocka_unit_test(test_slots),
                                     cmocka_unit_test(test_results)};
  int failed = cmocka_run_group_tests_name("low-rank factors", tests, NULL, NULL);

  return failed || cudasim_counts().live;
}
