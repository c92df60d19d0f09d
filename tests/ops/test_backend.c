/*
 * test_backend.c - what backends promise besides arithmetic: names, opening and closing, memory, conversion, the dry run, and
 * that be_ref's results do not depend on the count of threads.
 *
 * Threads: those of the backends.
 */
#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/half.h"
#include "kernels/convert.h"
#include "tests/ops/harness.h"

static const struct be_config one_thread = {.threads = 1};

static void test_find(void **state)
{
  const struct be_ops *ops = NULL;
  struct err e = {0};

  (void)state;
  assert_int_equal(be_find("ref", &ops, &e), 0);
  assert_ptr_equal(ops, &be_ref);
  assert_int_equal(be_find("cpu", &ops, &e), 0);
  assert_ptr_equal(ops, &be_cpu);
  assert_int_equal(be_find("auto", &ops, &e), 0);
  assert_non_null(ops);
  assert_int_equal(be_find("gpu", &ops, &e), E_ARG);
  assert_null(ops);
  assert_string_equal(e.field, "backend");
  assert_non_null(strstr(e.msg, "\"gpu\""));
  assert_non_null(strstr(e.msg, "auto, cpu, cuda or ref"));
}

/* Without a GPU, or without safelight-cuda.so: one sentence, and "auto" is the CPU. */
static void test_find_cuda(void **state)
{
  const struct be_ops *ops = &be_ref, *best;
  struct err e = {0};
  int r = be_find("cuda", &ops, &e);

  (void)state;
  assert_int_equal(be_find("auto", &best, NULL), 0);
  if (!r) {
    assert_string_equal(ops->name, "cuda");
    assert_ptr_equal(best, ops);
    return;
  }
  assert_int_equal(r, E_DEVICE);
  assert_null(ops);
  assert_non_null(strstr(e.msg, "GPU"));
  assert_ptr_equal(best, &be_cpu);
}

/* A folder with a safelight-cuda.so that the compiler makes of this text. */
static void make_so(const char *folder, const char *text, const char *with)
{
  char command[1000];

  assert_true(snprintf(command, sizeof command, "cd %s && echo '%s' | ${CC:-cc} -x c -shared -fPIC -o safelight-cuda.so - %s", folder, text, with) <
              (int)sizeof command);
  assert_int_equal(system(command), 0);
}

static void finds_not(const char *folder, const char *words, const char *more)
{
  const struct be_ops *ops = &be_ref;
  struct err e = {0};

  assert_int_equal(be_find_cuda_in(folder, &ops, &e), E_DEVICE);
  assert_null(ops);
  if (!strstr(e.msg, words) || !strstr(e.msg, more))
    fail_msg("\"%s\" does not say \"%s\" and \"%s\"", e.msg, words, more);
}

/* With a GPU, and something missing: the sentence names what. Each in a folder of its own, since a library is loaded once. */
static void test_find_cuda_in(void **state)
{
  char folder[] = "build/find-XXXXXX", sub[64], command[200];

  (void)state;
  assert_non_null(mkdtemp(folder));
  finds_not(folder, "safelight-cuda.so is missing", "make cuda");
  snprintf(command, sizeof command, "cd %s && mkdir a b c && echo 'int f(void) { return 0; }' | ${CC:-cc} -x c -shared -fPIC -o b/libvanished.so -", folder);
  assert_int_equal(system(command), 0);
  snprintf(sub, sizeof sub, "%s/a", folder);
  make_so(sub, "int g(void) { return 1; }", "");
  finds_not(sub, "is damaged", "be_cuda_find");
  snprintf(sub, sizeof sub, "%s/b", folder);
  make_so(sub, "int f(void); int be_cuda_find(void) { return f(); }", "-L. -lvanished && rm libvanished.so");
  finds_not(sub, "there is a GPU but a library is missing", "libvanished.so");
  snprintf(sub, sizeof sub, "%s/c", folder);
  make_so(sub, "int be_cuda_find(void) { return 0; }", "&& echo damage >safelight-cuda.so");
  finds_not(sub, "there is a GPU but a library is missing", "safelight-cuda.so");
  snprintf(command, sizeof command, "rm -r %s", folder);
  assert_int_equal(system(command), 0);
}

/* In a process of its own, whose driver is the stand-in: what the real shared object then says must have these words. */
static int child_says(const char *words)
{
  const struct be_ops *ops = &be_ref;
  struct err e = {0};
  int status = 0;
  pid_t pid = fork();

  if (pid == 0) {
    int ok = dlopen("build/release/safelight-no-driver.so", RTLD_NOW | RTLD_GLOBAL) && be_find_cuda_in("build/release", &ops, &e) == E_DEVICE && !ops &&
             strstr(e.msg, words);

    if (!ok)
      fprintf(stderr, "%s\n", e.msg);
    _exit(ok ? 0 : 1);
  }
  return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* The real one, where it was built and there is no GPU: without a driver that is what is missing, and one that refuses has its words handed on. */
static void test_find_cuda_driver(void **state)
{
  const struct be_ops *ops = &be_ref;
  struct err e = {0};

  (void)state;
  if (!access("/dev/nvidiactl", F_OK) || !access("/dev/dxg", F_OK) || access("build/release/safelight-cuda.so", F_OK) ||
      access("build/release/safelight-no-driver.so", F_OK))
    skip();
  assert_true(child_says("the CUDA driver offers no GPU: CUDA driver is a stub library"));
  assert_int_equal(be_find_cuda_in("build/release", &ops, &e), E_DEVICE);
  assert_null(ops);
  assert_string_equal(e.msg, "there is a GPU but a library is missing: the driver's libcuda.so.1");
}

static void test_close(void **state)
{
  const struct be_ops *all[] = {&be_ref, &be_cpu, &be_dry};
  struct be zero = {0};

  (void)state;
  be_close(NULL);
  be_close(&zero);
  for (int i = 0; i < 3; i++) {
    struct be half_open = {.ops = all[i]}, be;
    struct err e = {0};

    be_close(&half_open);
    assert_null(half_open.ops);
    assert_int_equal(be_open(&be, all[i], &one_thread, &e), 0);
    assert_ptr_equal(be.ops, all[i]);
    assert_int_equal(be.threads, 1);
    assert_true(strlen(be.info) > 0);
    be_close(&be);
    assert_null(be.ops);
    be_close(&be);
  }
}

static int open_fails(struct be *be, const struct be_config *cfg, struct err *e)
{
  (void)be, (void)cfg;
  return err_set(e, E_DEVICE, "no such device");
}

static void test_open_failure(void **state)
{
  struct be_ops broken = be_ref;
  struct err e = {0};
  struct be be;

  (void)state;
  broken.open = open_fails;
  assert_int_equal(be_open(&be, &broken, &one_thread, &e), E_DEVICE);
  assert_null(be.ops);
  be_close(&be);
}

/* No table may leave an entry out. */
static void test_complete(void **state)
{
  const struct be_ops *all[] = {&be_ref, &be_cpu, &be_dry};

  (void)state;
  for (int i = 0; i < 3; i++) {
    void (*entry[(sizeof(struct be_ops) - offsetof(struct be_ops, open)) / sizeof(void (*)(void))])(void); /* open is the first of the functions */

    memcpy(entry, (const char *)all[i] + offsetof(struct be_ops, open), sizeof entry);
    assert_non_null(all[i]->name);
    for (size_t j = 0; j < sizeof entry / sizeof *entry; j++)
      assert_true(entry[j] != NULL);
  }
}

static void test_memory(void **state)
{
  const struct be_ops *all[] = {&be_ref, &be_cpu};

  (void)state;
  for (int i = 0; i < 2; i++) {
    static const size_t sizes[] = {0, 1, 63, 64, 65, 1000003};
    struct err e = {0};
    struct be be;
    void *p = NULL;

    assert_int_equal(be_open(&be, all[i], &one_thread, &e), 0);
    for (size_t j = 0; j < sizeof sizes / sizeof *sizes; j++) {
      assert_int_equal(be.ops->mem_alloc(&be, sizes[j], &p, &e), 0);
      assert_int_equal((uintptr_t)p % 64, 0);
      memset(p, 1, sizes[j]);
      be.ops->mem_free(&be, p);
    }
    be.ops->mem_free(&be, NULL);
    be.ops->weight_free(&be, NULL);
#ifndef SANITIZED
    assert_int_equal(be.ops->mem_alloc(&be, SIZE_MAX, &p, &e), E_NOMEM);
    assert_null(p);
    e = (struct err){0};
    assert_int_equal(be.ops->mem_alloc(&be, SIZE_MAX / 4, &p, &e), E_NOMEM);
    assert_null(p);
    assert_true(e.msg[0] != 0);
#endif
    be_close(&be);
  }
}

/* Host to device and back, through every pair of types, must give what two conversions by hand give. Numbers under 2^-126 are
 * left out: the processor's own conversion to bf16 makes them 0. */
static void transfer(struct be *be, enum dtype host, enum dtype dev)
{
  enum { N = 300 };
  static const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-37f, 65504.0f, 65520.0f, 3e38f, 5.9e-8f, 2.9e-8f};
  char src[N * 4 + 1], want[N * 4], got[N * 4], mid[N * 4];
  struct tensor t = {NULL, {1, 3, 10, 10}, dev};
  struct err e = {0};

  for (int i = 0; i < N; i++)
    convert_set(src + 1, host, i, i < (int)(sizeof special / sizeof *special) ? special[i] : sinf((float)i * 7.3f) * 100);
  convert_array(mid, dev, src + 1, host, N);
  convert_array(want, host, mid, dev, N);
  assert_int_equal(be->ops->mem_alloc(be, tensor_bytes(t), &t.p, &e), 0);
  assert_int_equal(be->ops->upload(be, t, src + 1, host, &e), 0); /* host memory need not be aligned */
  memset(got, 0xee, sizeof got);
  assert_int_equal(be->ops->download(be, got, host, t, &e), 0);
  for (int i = 0; i < N; i++) {
    float a = convert_get(got, host, i), b = convert_get(want, host, i);

    if (isnan(b))
      assert_true(isnan(a));
    else
      assert_memory_equal(got + (size_t)i * dtype_size(host), want + (size_t)i * dtype_size(host), dtype_size(host));
  }
  be->ops->mem_free(be, t.p);
}

static void test_transfer(void **state)
{
  static const enum dtype floats[] = {DT_F32, DT_F16, DT_BF16};
  const struct be_ops *all[] = {&be_ref, &be_cpu};

  (void)state;
  for (int i = 0; i < 2; i++) {
    struct err e = {0};
    struct be be;

    assert_int_equal(be_open(&be, all[i], &one_thread, &e), 0);
    for (int a = 0; a < 3; a++)
      for (int b = 0; b < 3; b++)
        transfer(&be, floats[a], floats[b]);
    transfer(&be, DT_U8, DT_U8);
    transfer(&be, DT_I32, DT_I32);
    be_close(&be);
  }
}

/* Every 16-bit pattern survives; a number half way between two of them goes to the even one, one beside it to the nearer. */
static void test_half(void **state)
{
  (void)state;
  for (unsigned h = 0; h < 65536; h++) {
    float f = f16_to_f32((uint16_t)h), b = bf16_to_f32((uint16_t)h);
    float f_next = f16_to_f32((uint16_t)(h + 1)), f_mid = (f + f_next) / 2;

    if (isnan(f))
      assert_true(isnan(f16_to_f32(f32_to_f16(f))));
    else
      assert_int_equal(f32_to_f16(f), h);
    if (isnan(b))
      assert_true(isnan(bf16_to_f32(f32_to_bf16(b))));
    else
      assert_int_equal(f32_to_bf16(b), h);
    if ((h & 0x7fff) < 0x7bff) { /* the sum of neighbours is exact */
      assert_int_equal(f32_to_f16(f_mid), h % 2 ? h + 1 : h);
      assert_int_equal(f32_to_f16(nextafterf(f_mid, f)), h);
      assert_int_equal(f32_to_f16(nextafterf(f_mid, f_next)), h + 1);
    }
    if ((h & 0x7fff) < 0x7f7f) {
      float mid = f32_from_bits((uint32_t)h << 16 | 0x8000);

      assert_int_equal(f32_to_bf16(mid), h % 2 ? h + 1 : h);
      assert_int_equal(f32_to_bf16(f32_from_bits(f32_bits(mid) - 1)), h);
      assert_int_equal(f32_to_bf16(f32_from_bits(f32_bits(mid) + 1)), h + 1);
    }
  }
  assert_int_equal(f32_to_f16(65519.9f), 0x7bff);
  assert_int_equal(f32_to_f16(65520.0f), 0x7c00);
  assert_true(isnan(bf16_to_f32(f32_to_bf16(f32_from_bits(0x7f800001))))); /* a NaN whose payload bf16 cannot hold */
}

static void test_convert_integers(void **state)
{
  static const float v[] = {-1, 0.5f, 1.5f, 254.5f, 255.4f, 256, 3e9f, -3e9f, NAN, INFINITY, -INFINITY};
  static const int32_t u8[] = {0, 0, 2, 254, 255, 255, 255, 0, 0, 255, 0};
  static const int32_t i32[] = {-1, 0, 2, 254, 255, 256, INT32_MAX, INT32_MIN, 0, INT32_MAX, INT32_MIN};
  enum { N = sizeof v / sizeof *v };
  uint8_t bytes[N];
  int32_t ints[N];

  (void)state;
  convert_array(bytes, DT_U8, v, DT_F32, N);
  convert_array(ints, DT_I32, v, DT_F32, N);
  for (int i = 0; i < N; i++) {
    assert_int_equal(bytes[i], u8[i]);
    assert_int_equal(ints[i], i32[i]);
  }
}

/* Every op on tensors without memory, as the arena's measurement calls them. */
static void test_dry(void **state)
{
  struct tensor t = {NULL, {2, 8, 8, 64}, DT_BF16}, none = tensor_none();
  struct weight_desc d = {.kind = WEIGHT_LINEAR, .out = 64, .in = 64};
  struct weight *w = NULL, *w2 = NULL;
  struct err e = {0};
  struct be be;
  int64_t bad = 7;
  void *p = &be;

  (void)state;
  assert_int_equal(be_open(&be, &be_dry, &one_thread, &e), 0);
  assert_int_equal(be.act, DT_BF16);
  assert_int_equal(be.ops->mem_alloc(&be, SIZE_MAX, &p, &e), 0);
  assert_null(p);
  be.ops->mem_free(&be, p);
  assert_int_equal(be.ops->weight_load(&be, &d, NULL, &w, &e), 0);
  assert_int_equal(be.ops->weight_load(&be, &d, NULL, &w2, &e), 0);
  assert_true(w && w2 && w != w2);
  assert_int_equal(be.ops->upload(&be, t, NULL, DT_F32, &e), 0);
  assert_int_equal(be.ops->download(&be, NULL, DT_F32, t, &e), 0);
  assert_int_equal(be.ops->conv2d(&be, t, t, w, none, &e), 0);
  assert_int_equal(be.ops->linear(&be, t, t, w, t, &e), 0);
  assert_int_equal(be.ops->groupnorm(&be, t, t, none, w, 32, 1e-5f, 1, &e), 0);
  assert_int_equal(be.ops->layernorm(&be, t, t, w, 1e-5f, &e), 0);
  assert_int_equal(be.ops->attention(&be, t, t, NULL, 8, 1, 0, &e), 0);
  assert_int_equal(be.ops->geglu(&be, t, t, &e), 0);
  assert_int_equal(be.ops->act(&be, t, t, ACT_SILU, &e), 0);
  assert_int_equal(be.ops->add(&be, t, t, t, &e), 0);
  assert_int_equal(be.ops->concat(&be, t, t, t, &e), 0);
  assert_int_equal(be.ops->upsample2x(&be, t, t, &e), 0);
  assert_int_equal(be.ops->timestep_embed(&be, t, NULL, 1, 0, &e), 0);
  assert_int_equal(be.ops->embed(&be, t, NULL, w, w, &e), 0);
  assert_int_equal(be.ops->gather_scale(&be, t, t, NULL, NULL, &e), 0);
  assert_int_equal(be.ops->sampler_step(&be, t, t, t, none, NULL, &e), 0);
  assert_int_equal(be.ops->to_rgb8(&be, t, t, &e), 0);
  assert_int_equal(be.ops->count_nonfinite(&be, t, &bad, &e), 0);
  assert_int_equal(bad, 0);
  assert_int_equal(be.ops->sync(&be, &e), 0);
  be.ops->weight_free(&be, w);
  be.ops->weight_free(&be, w2);
  be.ops->weight_free(&be, NULL);
  be_close(&be);
}

/* be_ref: the same bits with one thread and with three. */
static void test_ref_threads(void **state)
{
  struct err e = {0};
  struct be one, three;

  (void)state;
  assert_int_equal(be_open(&one, &be_ref, &one_thread, &e), 0);
  assert_int_equal(be_open(&three, &be_ref, &(struct be_config){.threads = 3}, &e), 0);
  for (int i = 0; i < op_case_count; i++) {
    struct result a, b;
    struct problem p;

    if (op_cases[i].flags & F_BENCH)
      continue;
    problem_init(&p, &op_cases[i], 5, 0);
    if (problem_macs(&p) < 2e7) {
      problem_run(&a, &one, &p, 0xff, 0);
      problem_run(&b, &three, &p, 0xff, 0);
      if (a.fault[0] || b.fault[0])
        fail_msg("%s: %s%s", op_cases[i].name, a.fault, b.fault);
      assert_true(a.raw_bytes[0] > 0);
      for (int j = 0; j < 2; j++)
        if (a.raw_bytes[j] && memcmp(a.raw[j], b.raw[j], a.raw_bytes[j]))
          fail_msg("%s: another result with three threads", op_cases[i].name);
      result_close(&a);
      result_close(&b);
    }
    problem_close(&p);
  }
  be_close(&one);
  be_close(&three);
}

/* y (P*B, ...) += the factors of each entry, all of one x, in one op or in P. */
static void raise_results(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, int is_one, float *got)
{
  int64_t B = x.d[0], n = tensor_count(y);
  float *zero = calloc((size_t)n, sizeof *zero);
  struct err e = {0};

  assert_non_null(zero);
  assert_int_equal(be->ops->upload(be, y, zero, DT_F32, &e), 0);
  if (is_one)
    assert_int_equal(be->ops->lowrank(be, y, x, row, &e), 0);
  for (int64_t b = 0; b < y.d[0] && !is_one; b += B)
    assert_int_equal(be->ops->lowrank(be, tensor_batch(y, b, B), x, row + b, &e), 0);
  assert_int_equal(be->ops->download(be, got, DT_F32, y, &e), 0);
  free(zero);
}

/* Three results of one x have the bits of three calls, of factors of a linear and of a convolution. */
static void test_results_of_one(void **state)
{
  enum { B = 2, P = 3, H = 5, W = 4, INS = 24, OUTS = 40, RANK = 9, TAPS = 9 };
  static const struct be_ops *const all[] = {&be_ref, &be_cpu};
  static float down[RANK * INS * TAPS], up[OUTS * RANK], xs[B * H * W * INS], one[P * B * H * W * OUTS], three[P * B * H * W * OUTS];

  (void)state;
  for (int i = 0; i < RANK * INS * TAPS; i++)
    down[i] = (float)(i * 37 % 101 - 50) / 500;
  for (int i = 0; i < OUTS * RANK; i++)
    up[i] = (float)(i * 53 % 89 - 44) / 50;
  for (int i = 0; i < B * H * W * INS; i++)
    xs[i] = (float)(i * 71 % 97 - 48) / 48;
  for (int k = 0; k < 4; k++) {
    struct tensor x = {NULL, {B, H, W, INS}, DT_F32}, y = {NULL, {P * B, H, W, OUTS}, DT_F32};
    struct lowrank_desc d = {.out = OUTS, .in = INS, .rank = RANK, .down = down, .up = up};
    struct lowrank *l[2];
    struct err e = {0};
    struct be be;

    if (k / 2)
      d.kh = d.kw = 3, d.stride = d.pad_lo = d.pad_hi = 1;
    assert_int_equal(be_open(&be, all[k % 2], &one_thread, &e), 0);
    x.type = y.type = be.act;
    assert_int_equal(be.ops->mem_alloc(&be, tensor_bytes(x), &x.p, &e), 0);
    assert_int_equal(be.ops->mem_alloc(&be, tensor_bytes(y), &y.p, &e), 0);
    assert_int_equal(be.ops->upload(&be, x, xs, DT_F32, &e), 0);
    for (int i = 0; i < 2; i++) {
      assert_int_equal(be.ops->lowrank_load(&be, &d, &l[i], &e), 0);
      d.rank = 3;
    }
    {
      const struct lowrank *const row[P * B] = {l[0], l[1], NULL, l[0], l[1], NULL};

      raise_results(&be, y, x, row, 0, three);
      raise_results(&be, y, x, row, 1, one);
    }
    assert_memory_equal(one, three, sizeof one);
    assert_true(one[H * W * OUTS + 1] != 0 && one[4 * H * W * OUTS + 1] != 0 && one[5 * H * W * OUTS] == 0);
    for (int i = 0; i < 2; i++)
      be.ops->lowrank_free(&be, l[i]);
    be.ops->mem_free(&be, x.p);
    be.ops->mem_free(&be, y.p);
    be_close(&be);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_find),     cmocka_unit_test(test_find_cuda), cmocka_unit_test(test_find_cuda_in), cmocka_unit_test(test_find_cuda_driver),
      cmocka_unit_test(test_close),    cmocka_unit_test(test_open_failure),
      cmocka_unit_test(test_complete), cmocka_unit_test(test_memory),  cmocka_unit_test(test_transfer),
      cmocka_unit_test(test_half),     cmocka_unit_test(test_convert_integers), cmocka_unit_test(test_dry),
      cmocka_unit_test(test_ref_threads), cmocka_unit_test(test_results_of_one),
  };

  return cmocka_run_group_tests_name("backend", tests, NULL, NULL);
}
