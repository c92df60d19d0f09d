/*
 * test_backend.c - what be_cuda's host code promises besides arithmetic: its bounded tables, arrangements of rows that the models never use, and which
 * errors it makes of the device's. Threads: one.
 */
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#include "kernels/backend.h"
#include "kernels/cuda/device_id.h"
#include "kernels/cuda/dnn.h"
#include "kernels/cuda/plan_file.h"
#include "kernels/cuda/plans.h"
#include "models/rng.h"
#include "server/activations.h"
#include "tests/cudasim/sim.h"
#include "tests/cudasim/wrong.h"

extern const struct be_ops be_cuda;

static void must(int r, const struct err *e)
{
  if (r)
    fail_msg("%s: %s %s", err_name(r), e->msg, cudasim_fault());
}

/* ---- plans.h ---- */

static int dropped;

static void drop(void *value)
{
  dropped++;
  free(value);
}

static void add(struct plans *t, int64_t a, int64_t b)
{
  int64_t key[2] = {a, b}, *value = malloc(sizeof *value);
  struct err e = {0};

  assert_non_null(value);
  *value = a * 1000 + b;
  must(plans_add(t, key, value, &e), &e);
}

static int64_t find(const struct plans *t, int64_t a, int64_t b)
{
  const int64_t key[2] = {a, b}, *value = plans_find(t, key);

  return value ? *value : -1;
}

/* Everything that was added is found, whatever shares its bucket; a full table drops everything once, and serves on. */
static void test_plans(void **state)
{
  enum { MOST = 3 * PLANS_BUCKETS };
  struct plans t;

  (void)state;
  dropped = 0;
  plans_init(&t, 16, MOST, drop);
  assert_int_equal(find(&t, 1, 2), -1);
  for (int i = 0; i < MOST; i++)
    add(&t, i, 7);
  for (int i = 0; i < MOST; i++)
    assert_int_equal(find(&t, i, 7), i * 1000 + 7);
  assert_int_equal(find(&t, 7, 1), -1);
  assert_true(plans_is_full(&t) && dropped == 0 && t.dropped == 0);
  add(&t, 5, 5);
  assert_true(dropped == MOST && t.dropped == 1 && t.n == 1);
  assert_int_equal(find(&t, 5, 5), 5005);
  assert_int_equal(find(&t, 1, 7), -1);
  plans_clear(&t);
  assert_int_equal(dropped, MOST + 1);
}

/* ---- plan_file.h ---- */

static void poke(const char *folder, const char *name, long at, int by)
{
  char path[400];
  FILE *f;
  int c;

  snprintf(path, sizeof path, "%s/%s", folder, name);
  f = fopen(path, "r+b");
  assert_non_null(f);
  fseek(f, at, SEEK_SET);
  c = fgetc(f);
  fseek(f, at, SEEK_SET);
  fputc(c ^ by, f);
  fclose(f);
}

/* What was written comes back for its own key alone, and nothing comes back from a file that is damaged anywhere. */
static void test_plan_files(void **state)
{
  static const char text[] = "{\"a plan\": 1}";
  const int64_t key[2] = {1, 2}, other[2] = {1, 3};
  char folder[] = "build/plans-XXXXXX", name[64] = "", path[400], *got;
  struct dirent *d;
  size_t n;
  DIR *dir;

  (void)state;
  assert_non_null(mkdtemp(folder));
  assert_null(plan_file_read(folder, key, sizeof key, &n));
  assert_true(plan_file_write(folder, key, sizeof key, text, sizeof text));
  assert_null(plan_file_read(folder, other, sizeof other, &n));
  got = plan_file_read(folder, key, sizeof key, &n);
  assert_true(got && n == sizeof text && !memcmp(got, text, n));
  free(got);
  dir = opendir(folder);
  while ((d = readdir(dir)))
    if (d->d_name[0] != '.') {
      assert_int_equal(name[0], 0); /* one file, and nothing beside it */
      snprintf(name, sizeof name, "%.60s", d->d_name);
    }
  closedir(dir);
  snprintf(path, sizeof path, "%s/%s", folder, name);
  for (long at = 0; at < 8 * 4 + 16 + 0; at++) { /* magic, sizes, checksum, key */
    poke(folder, name, at, 0x41);
    assert_null(plan_file_read(folder, key, sizeof key, &n));
    poke(folder, name, at, 0x41);
  }
  poke(folder, name, 8 * 4 + PLAN_FILE_KEY + 3, 1); /* the text */
  assert_null(plan_file_read(folder, key, sizeof key, &n));
  assert_int_equal(truncate(path, 8 * 4 + PLAN_FILE_KEY + 3), 0);
  assert_null(plan_file_read(folder, key, sizeof key, &n));
  assert_true(plan_file_write(folder, key, sizeof key, text, sizeof text)); /* written anew */
  got = plan_file_read(folder, key, sizeof key, &n);
  assert_non_null(got);
  free(got);
  assert_false(plan_file_write("/nowhere/at/all", key, sizeof key, text, sizeof text));
  unlink(path);
  rmdir(folder);
}

/* ---- device_id.h and the keys of dnn.h ---- */

static void refuses(const char *description, const char *field)
{
  struct device_id id;
  struct err e = {0};

  assert_int_equal(device_id_read(&id, description, &e), E_ARG);
  assert_string_equal(e.field, field);
  assert_non_null(strstr(e.msg, field));
}

/* A description and a driver that say the same give the same bytes. */
static void test_device_id(void **state)
{
  struct device_id told, read;
  struct err e = {0};
  char text[4096] = "", long_name[200], *other;
  FILE *f = fopen("deploy/devices/rtx4090.json", "r");

  (void)state;
  assert_non_null(f);
  assert_true(fread(text, 1, sizeof text - 1, f) > 0);
  fclose(f);
  memset(&told, 0xaa, sizeof told);
  memset(&read, 0x55, sizeof read);
  device_id_set(&told, "NVIDIA GeForce RTX 4090", 8, 9, 128, 13000);
  must(device_id_read(&read, text, &e), &e);
  assert_memory_equal(&told, &read, sizeof told);
  must(device_id_read(&read, "{\"x\":\"deviceName\",\"deviceName\" : \"A\",\n\"driverVer\":12080,\"deviceVer\":1210,\"multiProcessorCount\":\t7}", &e), &e);
  device_id_set(&told, "A", 12, 1, 7, 12080);
  assert_memory_equal(&told, &read, sizeof told);
  must(device_id_with_driver(&other, text, 12090, &e), &e);
  must(device_id_read(&read, other, &e), &e);
  device_id_set(&told, "NVIDIA GeForce RTX 4090", 8, 9, 128, 12090);
  assert_memory_equal(&told, &read, sizeof told);
  free(other);
  must(device_id_with_driver(&other, text, 0, &e), &e);
  assert_string_equal(other, text);
  free(other);
  assert_int_equal(device_id_with_driver(&other, "{\"deviceName\": \"A\"}", 12090, &e), E_ARG);
  assert_null(other);
  refuses("{}", "deviceName");
  refuses("", "deviceName");
  refuses("{\"deviceName\": \"\"}", "deviceName");
  refuses("{\"deviceName\": \"a\\\"b\", \"deviceVer\": 900, \"multiProcessorCount\": 1}", "deviceName");
  refuses("{\"deviceName\": \"not closed", "deviceName");
  refuses("{\"deviceName\": 7}", "deviceName");
  refuses("{\"deviceName\": \"A\"}", "deviceVer");
  refuses("{\"deviceName\": \"A\", \"deviceVer\": \"900\", \"multiProcessorCount\": 1}", "deviceVer");
  refuses("{\"deviceName\": \"A\", \"deviceVer\": 900, \"multiProcessorCount\": 0}", "multiProcessorCount");
  refuses("{\"deviceName\": \"A\", \"deviceVer\": 900, \"multiProcessorCount\": 99999999999}", "multiProcessorCount");
  refuses("{\"deviceName\": \"A\", \"deviceVer\": 900, \"multiProcessorCount\": 9}", "driverVer");
  snprintf(long_name, sizeof long_name, "{\"deviceName\": \"%064d\", \"deviceVer\": 900, \"multiProcessorCount\": 1}", 0);
  refuses(long_name, "deviceName");
}

/* Keys are bytes: what lay in their memory before, and where operands lie, does not show; whether there is a bias does. */
static void test_keys(void **state)
{
  struct gpu_conv c = {.y = &c, .x = &c, .w = &c, .bias = &c, .B = 3, .H = 8, .W = 4, .in = 16, .Ho = 8, .Wo = 4, .out = 32, .kh = 3, .kw = 3, .stride = 1,
                       .pad_lo = 1, .pad_hi = 1, .act = DT_BF16, .y_type = DT_BF16};
  struct gpu_attention a = {.o = &c, .q = &c, .k = &c, .v = &c, .B = 1, .T = 64, .keys = 77, .heads = 1, .K = 40, .scale = 0.5f, .act = DT_F16};
  struct gpu_key one, two;
  char name[160];

  (void)state;
  memset(&one, 0xaa, sizeof one);
  memset(&two, 0x55, sizeof two);
  gpu_key_of_conv(&one, &c);
  c.x = c.bias = &a;
  gpu_key_of_conv(&two, &c);
  assert_memory_equal(&one, &two, sizeof one);
  gpu_key_name(name, sizeof name, &one);
  assert_string_equal(name, "convolution 16>32 3x3 of 4x8, bf16, 3 pictures");
  c.bias = NULL;
  gpu_key_of_conv(&two, &c);
  assert_memory_not_equal(&one, &two, sizeof one);
  c.B = 2;
  gpu_key_of_conv(&one, &c);
  gpu_key_class(&two, &two);
  assert_memory_equal(&one, &two, sizeof one);
  gpu_key_of_attention(&one, &a);
  gpu_key_name(name, sizeof name, &one);
  assert_string_equal(name, "attention of 1 head of 40, 64 queries, 77 keys, fp16, 1 picture");
  a.scale = 0.25f; /* a number that the plan is handed, no part of it */
  gpu_key_of_attention(&two, &a);
  assert_memory_equal(&one, &two, sizeof one);
}

/* ---- low-rank factors ---- */

enum { IN = 8, OUT = 16, H = 3, W = 5, ROWS = H * W, B = 2 };

static void lowrank_of(struct be *be, const struct lowrank *l, struct tensor y, struct tensor x, float *got)
{
  const struct lowrank *row[B] = {l, l};
  static float zero[B * ROWS * OUT];
  struct err e = {0};

  must(be->ops->upload(be, y, zero, DT_F32, &e), &e);
  must(be->ops->lowrank(be, y, x, row, &e), &e);
  must(be->ops->download(be, got, DT_F32, y, &e), &e);
}

/* Factors of a linear, or of a 1x1 convolution of stride 1, take the rows of a picture as H x W, as T, or one on each side. */
static void test_flat(void **state)
{
  static float down[4 * IN], up[OUT * 4], x[B * ROWS * IN], want[B * ROWS * OUT], got[B * ROWS * OUT];
  struct lowrank_desc d = {.out = OUT, .in = IN, .rank = 4, .down = down, .up = up};
  struct tensor tx = {NULL, {B, H, W, IN}, DT_F32}, ty = {NULL, {B, H, W, OUT}, DT_F32};
  struct err e = {0};
  struct be be;

  (void)state;
  for (int i = 0; i < 4 * IN; i++)
    down[i] = (float)(i % 5 - 2);
  for (int i = 0; i < OUT * 4; i++)
    up[i] = (float)(i % 7 - 3);
  for (int i = 0; i < B * ROWS * IN; i++)
    x[i] = (float)(i % 11 - 5);
  must(be_open(&be, &be_cuda, &(struct be_config){0}, &e), &e);
  tx.type = ty.type = be.act;
  must(be.ops->mem_alloc(&be, tensor_bytes(tx), &tx.p, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(ty), &ty.p, &e), &e);
  must(be.ops->upload(&be, tx, x, DT_F32, &e), &e);
  for (int k = 0; k < 2; k++) {
    struct lowrank *l;

    d.kh = d.kw = d.stride = k;
    must(be.ops->lowrank_load(&be, &d, &l, &e), &e);
    lowrank_of(&be, l, ty, tx, want);
    assert_true(want[1] != 0);
    lowrank_of(&be, l, tensor_view(ty, B, 1, ROWS, OUT), tensor_view(tx, B, 1, ROWS, IN), got);
    assert_memory_equal(got, want, sizeof got);
    lowrank_of(&be, l, tensor_view(ty, B, H, W, OUT), tensor_view(tx, B, 1, ROWS, IN), got);
    assert_memory_equal(got, want, sizeof got);
    lowrank_of(&be, l, tensor_view(ty, B, W, H, OUT), tensor_view(tx, B, H, W, IN), got);
    assert_memory_equal(got, want, sizeof got);
    be.ops->lowrank_free(&be, l);
  }
  be.ops->mem_free(&be, tx.p);
  be.ops->mem_free(&be, ty.p);
  be_close(&be);
}

/* ---- random numbers ---- */

/* A generator that goes on in the device's memory draws what it would have drawn in the host's, bit for bit, whatever sizes come after each other:
 * both ways of torch, tails, words that end in the middle of a block, what one call keeps for a later one. Two pictures at once. */
static void test_randn(void **state)
{
  static const int64_t sizes[] = {3, 4, 16, 1, 20, 2, 1, 17, 31, 15, 7, 624, 640, 5, 1000, 4096, 9, 16};
  enum { MOST = 4096 };
  static float got[2 * MOST], want[MOST];
  struct tensor y = {NULL, {2, 1, MOST, 1}, DT_F32}, on_device = {NULL, {2, 1, 1, NORMAL_WORDS}, DT_I32};
  struct err e = {0};
  struct rng r[2];
  struct be be;

  (void)state;
  must(be_open(&be, &be_cuda, &(struct be_config){0}, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(y), &y.p, &e), &e);
  must(be.ops->mem_alloc(&be, tensor_bytes(on_device), &on_device.p, &e), &e);
  rng_seed(&r[0], 7);
  rng_seed(&r[1], 1ull << 31);
  (void)rng_u32(&r[1]);
  must(be.ops->upload(&be, on_device, r, DT_I32, &e), &e);
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    int64_t n = sizes[i];
    struct tensor now = tensor_view(y, 2, 1, n, 1);

    cudasim_seed(i % 3);
    must(be.ops->randn(&be, now, on_device, 1, &e), &e);
    must(be.ops->download(&be, got, DT_F32, now, &e), &e);
    for (int b = 0; b < 2; b++) {
      rng_randn(&r[b], want, (size_t)n);
      if (memcmp(got + b * n, want, (size_t)n * sizeof *want))
        fail_msg("draw %zu, of %lld numbers, of generator %d is another one", i, (long long)n, b);
    }
  }
  be.ops->mem_free(&be, y.p);
  be.ops->mem_free(&be, on_device.p);
  be_close(&be);
  cudasim_seed(0);
  assert_int_equal(cudasim_counts().live, 0);
}

/* ---- memory ---- */

/* What one lane took and another wrote goes back without a wait of the host, and behind the work of both (else sim.h's fault); the pool holds no more
 * when it is taken again. Nothing of it stops the device. A pool in pieces is trimmed before memory counts as short. */
static void test_memory(void **state)
{
  static const float x[64];
  struct tensor t = {NULL, {1, 1, 1, 64}, DT_F32};
  struct cudasim_count first, now;
  struct err e = {0};
  struct be be, lane;
  struct mark *m;

  (void)state;
  must(be_open(&be, &be_cuda, &(struct be_config){0}, &e), &e);
  must(be.ops->open_lane(&lane, &be, 0, &e), &e);
  must(be.ops->mark_open(&be, &m, &e), &e);
  must(be.ops->mark_wait(&be, m, &e), &e); /* never set */
  first = cudasim_counts();
  for (int i = 0; i < 3; i++) {
    must(lane.ops->mem_alloc(&lane, tensor_bytes(t), &t.p, &e), &e);
    must(lane.ops->upload(&lane, t, x, DT_F32, &e) || lane.ops->mark_set(&lane, m, &e), &e);
    must(be.ops->mark_wait(&be, m, &e) || be.ops->upload(&be, t, x, DT_F32, &e), &e);
    lane.ops->mem_free(&lane, t.p);
    now = cudasim_counts();
    assert_string_equal(cudasim_fault(), "");
    assert_true(now.stops == first.stops && now.waits == first.waits && (!i || now.reserved == first.reserved));
    first.reserved = now.reserved;
  }
  must(be.ops->pass_begin(&be, x, 1, &e), &e);
  assert_int_equal(be.ops->mark_set(&be, m, &e), E_INTERNAL);
  assert_int_equal(be.ops->pass_end(&be, E_INTERNAL, &(int){0}, &e), E_INTERNAL);
  be.ops->mark_close(&be, m);
  be.ops->mark_close(&be, NULL);
  be_close(&lane);
  be_close(&be);
  assert_int_equal(cudasim_counts().live, 0);
}

/* ---- errors ---- */

/* Short memory is E_NOMEM and passes; a device that has failed says so to allocations as well: waiting for memory would never end. */
static void test_allocation_errors(void **state)
{
  struct err e = {0}, sticky = {0};
  cudaStream_t s;
  struct be be;
  float *y;
  void *p;

  (void)state;
  must(be_open(&be, &be_cuda, &(struct be_config){0}, &e), &e);
  assert_int_equal(cudaStreamCreateWithFlags(&s, 0), 0);
  assert_int_equal(cudaMalloc((void **)&y, 64 * sizeof *y), 0);
  cudasim_fail_allocation(1);
  assert_int_equal(be.ops->mem_alloc(&be, 64, &p, &e), E_NOMEM);
  assert_null(p);
  e = (struct err){0};
  must(be.ops->mem_alloc(&be, 64, &p, &e), &e);
  be.ops->mem_free(&be, p);
  assert_int_equal(wrong_launch(LEFT_EARLY, s, y, 0), cudaErrorLaunchFailure);
  assert_int_equal(be.ops->mem_alloc(&be, 64, &p, &sticky), E_DEVICE);
  assert_null(p);
  assert_int_equal(be.ops->mem_alloc(&be, 64, &p, NULL), E_DEVICE);
  cudasim_reset();
  cudaFree(y);
  cudaStreamDestroy(s);
  be_close(&be);
  assert_int_equal(cudasim_counts().live, 0);
}

/* Two devices served by one thread, op by op in turn: each call finds its own. A number too high is an error that names the bounds. */
static void test_devices(void **state)
{
  static const float x[8] = {1, -2, 3, 4, 5, 6, 7, 8};
  struct be be[2] = {{0}}, none;
  struct tensor t[2] = {{NULL, {1, 1, 1, 8}, DT_BF16}, {NULL, {1, 1, 1, 8}, DT_BF16}};
  struct err e = {0};
  float y[8];

  (void)state;
  cudasim_devices(2);
  assert_int_equal(be_open(&none, &be_cuda, &(struct be_config){.device = 2}, &e), E_ARG);
  assert_non_null(strstr(e.msg, "no GPU 2"));
  assert_non_null(strstr(e.msg, "offers 2"));
  e = (struct err){0};
  for (int i = 0; i < 2; i++)
    must(be_open(&be[i], &be_cuda, &(struct be_config){.device = i}, &e), &e);
  for (int i = 0; i < 2; i++)
    must(be[i].ops->mem_alloc(&be[i], 16, &t[i].p, &e), &e);
  for (int i = 0; i < 2; i++)
    must(be[i].ops->upload(&be[i], t[i], x, DT_F32, &e), &e);
  for (int k = 0; k < 4; k++)
    must(be[k % 2].ops->add(&be[k % 2], t[k % 2], t[k % 2], t[k % 2], &e), &e);
  for (int i = 0; i < 2; i++) {
    must(be[i].ops->download(&be[i], y, DT_F32, t[i], &e), &e);
    assert_true(y[0] == 4 && y[1] == -8 && y[7] == 32);
    be[i].ops->mem_free(&be[i], t[i].p);
  }
  be_close(&be[0]);
  be_close(&be[1]);
  must(be_open(&be[0], &be_cuda, &(struct be_config){0}, &e), &e); /* device 0 is current again for those who come after */
  be_close(&be[0]);
  cudasim_devices(1);
  assert_int_equal(cudasim_counts().live, 0);
}

/* The option `activations` on a GPU: what it chooses, and that fp32 is refused instead of taken for something else. */
static void test_activations(void **state)
{
  static const struct {
    const char *word, *said;
    enum dtype act;
  } cases[] = {{"auto", ", bf16", DT_BF16}, {"bf16", ", bf16", DT_BF16}, {"fp16", ", fp16", DT_F16}, {"fp32", NULL, DT_F32}};

  (void)state;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    struct be_config cfg = {0};
    struct err e = {0};
    struct be be, lane;

    activations_ask(&cfg, cases[i].word);
    must(be_open(&be, &be_cuda, &cfg, &e), &e);
    if (cases[i].said) {
      must(activations_check(&be, cases[i].word, &e), &e);
      must(be.ops->open_lane(&lane, &be, 1, &e), &e);
      assert_true(be.act == cases[i].act && lane.act == cases[i].act);
      assert_string_equal(be.info + strlen(be.info) - strlen(cases[i].said), cases[i].said);
      be_close(&lane);
    } else {
      assert_int_equal(activations_check(&be, cases[i].word, &e), E_ARG);
      assert_string_equal(e.field, "activations");
      assert_non_null(strstr(e.msg, "cannot be fp32 with the backend cuda"));
    }
    be_close(&be);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_plans), cmocka_unit_test(test_plan_files), cmocka_unit_test(test_device_id),
                                     cmocka_unit_test(test_keys), cmocka_unit_test(test_flat), cmocka_unit_test(test_randn), cmocka_unit_test(test_memory),
                                     cmocka_unit_test(test_devices), cmocka_unit_test(test_activations),
                                     cmocka_unit_test(test_allocation_errors)};

  return cmocka_run_group_tests_name("backend", tests, NULL, NULL);
}
