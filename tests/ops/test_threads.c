/*
 * test_threads.c - be_cpu's ops give the same bits on one thread and on several: what lets a batch hand its pictures to as many threads as are free
 * (models/batch.c). The shapes are those of the bundled model and of SD1.5 that tempt a library to split a sum: few rows, long sums.
 *
 * Not under ThreadSanitizer: gcc's OpenMP runtime is not built for it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/backend.h"

enum { MOST_THREADS = 4 };

static const struct shape {
  enum weight_kind kind;
  int64_t B, H, W, in, out;    /* linear: B * H * W rows */
  int stride;
} shapes[] = {
    {WEIGHT_LINEAR, 1, 1, 2, 320, 1280, 0},    {WEIGHT_LINEAR, 1, 1, 2, 1280, 1280, 0},   {WEIGHT_LINEAR, 1, 1, 1, 1280, 320, 0},
    {WEIGHT_LINEAR, 1, 1, 77, 768, 3072, 0},   {WEIGHT_LINEAR, 1, 1, 77, 3072, 768, 0},   {WEIGHT_LINEAR, 1, 1, 77, 768, 320, 0},
    {WEIGHT_LINEAR, 2, 1, 64, 5120, 1280, 0},  {WEIGHT_LINEAR, 2, 1, 35, 256, 96, 0},     {WEIGHT_LINEAR, 1, 1, 3, 96, 384, 0},
    {WEIGHT_CONV, 2, 8, 8, 1280, 640, 1},      {WEIGHT_CONV, 1, 4, 4, 2560, 320, 1},      {WEIGHT_CONV, 2, 16, 16, 640, 640, 2},
    {WEIGHT_CONV, 2, 7, 5, 96, 96, 1},         {WEIGHT_CONV, 1, 3, 2, 192, 96, 1},        {WEIGHT_CONV, 2, 64, 64, 4, 32, 1},
    {WEIGHT_CONV, 2, 32, 32, 64, 4, 1},        {WEIGHT_NORM, 2, 33, 17, 96, 96, 0},       {WEIGHT_NORM, 1, 64, 64, 320, 320, 0},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static void must(int rc, const struct err *e)
{
  if (rc)
    fail_msg("%s: %s", err_name(rc), e->msg);
}

static float *numbers(int64_t n, uint32_t seed, float gain)
{
  float *p = malloc((size_t)n * sizeof *p);

  assert_non_null(p);
  for (int64_t i = 0; i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    p[i] = gain * (float)(int32_t)seed * 0x1p-31f;
  }
  return p;
}

static struct tensor tensor_new(struct be *be, int64_t b, int64_t h, int64_t w, int64_t c, uint32_t seed)
{
  struct tensor t = {NULL, {b, h, w, c}, be->act};
  float *v = numbers(tensor_count(t), seed, 1);
  struct err e = {0};

  must(be->ops->mem_alloc(be, tensor_bytes(t), &t.p, &e), &e);
  must(be->ops->upload(be, t, v, DT_F32, &e), &e);
  free(v);
  return t;
}

/* The op of the shape on so many threads -> y. */
static void apply(struct be *be, const struct shape *s, int threads, struct tensor y, struct tensor x, const struct weight *w)
{
  const struct be_ops *o = be->ops;
  struct err e = {0};

  o->set_threads(be, threads);
  assert_int_equal(be->threads, threads);
  memset(y.p, 0xff, tensor_bytes(y));
  if (s->kind == WEIGHT_LINEAR)
    must(o->linear(be, y, x, w, tensor_none(), &e), &e);
  else if (s->kind == WEIGHT_CONV)
    must(o->conv2d(be, y, x, w, tensor_none(), &e), &e);
  else
    must(o->groupnorm(be, y, x, tensor_none(), w, 32, 1e-5f, 1, &e), &e);
}

static void check_shape(struct be *be, int number)
{
  const struct shape *s = &shapes[number];
  int is_conv = s->kind == WEIGHT_CONV, k = is_conv ? 3 : 1;
  struct weight_desc d = {.kind = s->kind, .out = s->out, .in = s->in, .kh = is_conv ? 3 : 0, .kw = is_conv ? 3 : 0, .stride = s->stride,
                          .pad_lo = is_conv, .pad_hi = is_conv, .w_type = DT_F32, .bias_type = DT_F32};
  int step = is_conv ? s->stride : 1;
  float *w = numbers(s->out * (s->kind == WEIGHT_NORM ? 1 : s->in * k * k), 3, 0.05f), *bias = numbers(s->out, 5, 0.1f);
  struct tensor x = tensor_new(be, s->B, s->H, s->W, s->in, 7), first, y;
  struct weight *packed;
  struct err e = {0};

  d.w = w;
  d.bias = bias;
  if (s->kind == WEIGHT_NORM)
    d.in = 0;
  first = tensor_new(be, s->B, s->H / step, s->W / step, s->out, 1);
  y = tensor_new(be, s->B, s->H / step, s->W / step, s->out, 1);
  must(be->ops->weight_load(be, &d, NULL, &packed, &e), &e);
  apply(be, s, 1, first, x, packed);
  for (int threads = 2; threads <= MOST_THREADS; threads++) {
    apply(be, s, threads, y, x, packed);
    if (memcmp(first.p, y.p, tensor_bytes(y)))
      fail_msg("shape %d: other bits on %d threads than on one", number, threads);
  }
  be->ops->weight_free(be, packed);
  be->ops->mem_free(be, x.p);
  be->ops->mem_free(be, y.p);
  be->ops->mem_free(be, first.p);
  free(w);
  free(bias);
}

/* Attention is split by heads, or by queries where heads are few. */
static void check_attention(struct be *be, int64_t T, int64_t Tk, int heads, int64_t K)
{
  int64_t D = heads * K;
  struct tensor q = tensor_new(be, 1, 1, T, D, 1), k = tensor_new(be, 1, 1, Tk, D, 2), v = tensor_new(be, 1, 1, Tk, D, 3),
                first = tensor_new(be, 1, 1, T, D, 4), y = tensor_new(be, 1, 1, T, D, 4);
  struct kv_row kv = {k.p, v.p, Tk};
  struct err e = {0};

  be->ops->set_threads(be, 1);
  must(be->ops->attention(be, first, q, &kv, heads, 0.2f, 0, &e), &e);
  for (int threads = 2; threads <= MOST_THREADS; threads++) {
    be->ops->set_threads(be, threads);
    memset(y.p, 0xff, tensor_bytes(y));
    must(be->ops->attention(be, y, q, &kv, heads, 0.2f, 0, &e), &e);
    if (memcmp(first.p, y.p, tensor_bytes(y)))
      fail_msg("attention of %d tokens to %d: other bits on %d threads than on one", (int)T, (int)Tk, threads);
  }
  be->ops->mem_free(be, q.p);
  be->ops->mem_free(be, k.p);
  be->ops->mem_free(be, v.p);
  be->ops->mem_free(be, y.p);
  be->ops->mem_free(be, first.p);
}

static void check(int force_f32)
{
  const struct be_config cfg = {.threads = 1, .force_f32 = force_f32};
  struct err e = {0};
  struct be be;

  must(be_open(&be, &be_cpu, &cfg, &e), &e);
  for (int i = 0; i < SHAPES; i++)
    check_shape(&be, i);
  check_attention(&be, 256, 77, 8, 40);
  check_attention(&be, 1000, 1000, 1, 64); /* the VAE: one head for all */
  check_attention(&be, 35, 35, 3, 32);
  be_close(&be);
}

static void test_bf16(void **state)
{
  (void)state;
  check(0);
}

static void test_f32(void **state)
{
  (void)state;
  check(1);
}

int main(void)
{
  static const struct CMUnitTest tests[] = {cmocka_unit_test(test_bf16), cmocka_unit_test(test_f32)};

  return cmocka_run_group_tests_name("threads", tests, NULL, NULL);
}
