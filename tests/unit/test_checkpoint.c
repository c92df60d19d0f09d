/*
 * test_checkpoint.c - models/checkpoint.c and models/synth.c: which files are found, what is refused and by which name, the old
 * names, shards, and the formula.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/half.h"
#include "models/checkpoint.h"

static char folder[64];

/* ---- files, by hand ---- */

static const char *in_folder(const char *name)
{
  static char path[256];

  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static void write_file(const char *name, const void *p, size_t n)
{
  FILE *f = fopen(in_folder(name), "wb");

  assert_non_null(f);
  assert_int_equal(fwrite(p, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

static void write_text(const char *name, const char *text)
{
  write_file(name, text, strlen(text));
}

struct entry {
  const char *name, *dtype, *shape;
  size_t bytes;
  const void *data; /* NULL: zeros */
};

/* A safetensors file of the entries up to one without a name. */
static void write_tensors(const char *file, const struct entry *t)
{
  static char bytes[4096];
  size_t len = 8, at = 0, end;

  memset(bytes, 0, sizeof bytes);
  bytes[len++] = '{';
  for (int i = 0; t[i].name; i++) {
    len += (size_t)snprintf(bytes + len, 2000 - len, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                            i ? "," : "", t[i].name, t[i].dtype, t[i].shape, at, at + t[i].bytes);
    at += t[i].bytes;
  }
  bytes[len++] = '}';
  bytes[0] = (char)((len - 8) & 255);
  bytes[1] = (char)((len - 8) >> 8);
  end = len;
  for (int i = 0; t[i].name; i++) {
    assert_true(end + t[i].bytes <= sizeof bytes);
    if (t[i].data)
      memcpy(bytes + end, t[i].data, t[i].bytes);
    end += t[i].bytes;
  }
  write_file(file, bytes, end);
}

static void empty_folder(void)
{
  char command[128];

  snprintf(command, sizeof command, "rm -rf '%s'/*", folder);
  assert_int_equal(system(command), 0);
}

static struct source *open_folder(void)
{
  struct source *s;
  struct err e = {0};

  if (source_open_files(&s, folder, &e))
    fail_msg("%s", e.msg);
  return s;
}

static void expect_folder_refused(const char *field, const char *says)
{
  struct source *s = (struct source *)1;
  struct err e = {0};

  assert_int_equal(source_open_files(&s, folder, &e), E_FILE);
  assert_null(s);
  assert_string_equal(e.field, field);
  assert_non_null(strstr(e.msg, folder));
  if (!strstr(e.msg, says))
    fail_msg("\"%s\" does not say \"%s\"", e.msg, says);
}

/* shape ends with 0 */
static int get(struct source *s, const char *name, const int64_t *shape, struct param *p, struct err *e)
{
  int nd = 0;

  while (shape[nd])
    nd++;
  memset(e, 0, sizeof *e);
  return source_get(s, name, nd, shape, p, e);
}

static void expect_refused(struct source *s, const char *name, const int64_t *shape, const char *says)
{
  struct param p;
  struct err e;

  memset(&p, 0xff, sizeof p);
  assert_int_equal(get(s, name, shape, &p, &e), E_FILE);
  assert_string_equal(e.field, name);
  assert_non_null(strstr(e.msg, name));
  assert_non_null(strstr(e.msg, folder));
  if (!strstr(e.msg, says))
    fail_msg("\"%s\" does not say \"%s\"", e.msg, says);
  assert_null(p.data);
  param_release(&p); /* of a failed get: nothing */
}

/* Gets a tensor whose first byte is `first`. */
static void expect_got(struct source *s, const char *name, const int64_t *shape, int first)
{
  struct param p;
  struct err e;

  if (get(s, name, shape, &p, &e))
    fail_msg("%s", e.msg);
  assert_int_equal(*(const unsigned char *)p.data, first);
  assert_true(source_has(s, name));
  param_release(&p);
  assert_null(p.data);
  param_release(&p);
}

#define S(...) ((const int64_t[]){__VA_ARGS__, 0})

/* ---- files ---- */

static void test_file_names(void **state)
{
  static const char *const names[] = {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
                                      "model.safetensors", "model.fp16.safetensors"};

  (void)state;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    struct source *s;

    empty_folder();
    write_tensors(names[i], (struct entry[]){{"w", "F16", "[2]", 4, "\1\0\0\0"}, {0}});
    s = open_folder();
    expect_got(s, "w", S(2), 1);
    source_close(s);
  }
  /* full precision is preferred */
  empty_folder();
  write_tensors("model.fp16.safetensors", (struct entry[]){{"w", "F16", "[2]", 4, "\1\0\0\0"}, {0}});
  write_tensors("model.safetensors", (struct entry[]){{"w", "F32", "[1]", 4, "\2\0\0\0"}, {0}});
  {
    struct source *s = open_folder();

    expect_got(s, "w", S(1), 2);
    source_close(s);
  }
  source_close(NULL);
}

static void test_nothing_readable(void **state)
{
  struct source *s;
  struct err e = {0};

  (void)state;
  empty_folder();
  expect_folder_refused(folder, "holds neither");
  write_text("diffusion_pytorch_model.bin", "pickle");
  expect_folder_refused(folder, ".bin files are never read");
  assert_int_equal(source_open_files(&s, in_folder("absent"), &e), E_FILE);
  assert_null(s);
  /* what is there but broken is an error, not a reason to look further */
  write_tensors("model.safetensors", (struct entry[]){{"w", "F16", "[2]", 4, "\1\0\0\0"}, {0}});
  write_text("diffusion_pytorch_model.safetensors", "");
  {
    char path[160];

    snprintf(path, sizeof path, "%s/diffusion_pytorch_model.safetensors", folder);
    expect_folder_refused(path, "too few");
    unlink(path);
    assert_int_equal(symlink("gone", path), 0);
    expect_folder_refused(path, "No such file");
    unlink(path);
    assert_int_equal(mkdir(path, 0700), 0);
    expect_folder_refused(path, "not a regular file");
  }
}

/* ---- tensors ---- */

static void test_refusals(void **state)
{
  static const uint16_t inf16[4] = {0, 0x7c00, 0, 0}, nan16[2] = {0x3f80, 0x7fc0};
  static const uint32_t nan32[3] = {0, 0, 0xffc00000};
  struct source *s;

  (void)state;
  empty_folder();
  write_tensors("model.safetensors", (struct entry[]){{"good", "F16", "[2,3]", 12, NULL},
                                                      {"inf", "F16", "[4]", 8, inf16},
                                                      {"nan", "BF16", "[2]", 4, nan16},
                                                      {"nan32", "F32", "[3]", 12, nan32},
                                                      {"double", "F64", "[2]", 16, NULL},
                                                      {"whole", "I32", "[2]", 8, NULL},
                                                      {"ids", "I64", "[1,2]", 16, NULL},
                                                      {"scalar", "F32", "[]", 4, NULL},
                                                      {"empty", "F32", "[0]", 0, NULL},
                                                      {"conv", "F16", "[2,3,3,3]", 108, NULL},
                                                      {0}});
  s = open_folder();
  expect_got(s, "good", S(2, 3), 0);
  expect_refused(s, "absent.weight", S(2), "is missing");
  assert_false(source_has(s, "absent.weight"));
  expect_refused(s, "good", S(3, 2), "has shape (2, 3) where the configuration needs (3, 2)");
  expect_refused(s, "good", S(6), "needs (6)");
  expect_refused(s, "good", S(2, 3, 1), "needs (2, 3, 1)");
  expect_refused(s, "good", S(2, 3, 1, 2), "needs (2, 3, 1, 2)");
  expect_refused(s, "conv", S(2, 3), "has shape (2, 3, 3, 3)");
  expect_refused(s, "scalar", S(1), "has shape ()");
  expect_refused(s, "empty", S(1), "has shape (0)");
  expect_refused(s, "inf", S(4), "not finite (element 1)");
  expect_refused(s, "nan", S(2), "not finite (element 1)");
  expect_refused(s, "nan32", S(3), "not finite (element 2)");
  expect_refused(s, "double", S(2), "has dtype F64");
  expect_refused(s, "whole", S(2), "has dtype I32");
  expect_refused(s, "ids", S(1, 2), "has dtype I64");
  source_close(s);
}

static void test_types(void **state)
{
  static const float f32 = 0.5f;
  static const uint16_t f16 = 0x3800, bf16 = 0x3f00;
  struct source *s;
  struct param p;
  struct err e;
  float v;

  (void)state;
  empty_folder();
  write_tensors("model.safetensors",
                (struct entry[]){{"b", "BF16", "[1]", 2, &bf16}, {"f", "F32", "[1]", 4, &f32}, {"h", "F16", "[1]", 2, &f16}, {0}});
  s = open_folder();
  assert_int_equal(get(s, "f", S(1), &p, &e), 0);
  assert_int_equal(p.type, DT_F32);
  assert_int_equal(p.nd, 1);
  assert_int_equal(p.shape[0], 1);
  memcpy(&v, p.data, 4); /* need not be aligned */
  assert_true(v == 0.5f);
  param_release(&p);
  assert_int_equal(get(s, "h", S(1), &p, &e), 0);
  assert_int_equal(p.type, DT_F16);
  assert_memory_equal(p.data, &f16, 2);
  param_release(&p);
  assert_int_equal(get(s, "b", S(1), &p, &e), 0);
  assert_int_equal(p.type, DT_BF16);
  assert_memory_equal(p.data, &bf16, 2);
  param_release(&p);
  source_close(s);
}

static void test_aliases(void **state)
{
  struct source *s;

  (void)state;
  empty_folder();
  write_tensors("diffusion_pytorch_model.safetensors",
                (struct entry[]){{"mid_block.attentions.0.query.weight", "F16", "[2,2,1,1]", 8, "\1\0\0\0\0\0\0\0"},
                                 {"mid_block.attentions.0.key.weight", "F16", "[2,2]", 8, "\2\0\0\0\0\0\0\0"},
                                 {"mid_block.attentions.0.value.bias", "F16", "[2]", 4, "\3\0\0\0"},
                                 {"mid_block.attentions.0.proj_attn.weight", "F16", "[2,2]", 8, "\4\0\0\0\0\0\0\0"},
                                 {"encoder.layers.0.fc1.bias", "F16", "[2]", 4, "\5\0\0\0"},
                                 {"text_model.final_layer_norm.bias", "F16", "[2]", 4, "\6\0\0\0"},
                                 {"both.to_q.bias", "F16", "[2]", 4, "\7\0\0\0"},
                                 {"both.query.bias", "F16", "[2]", 4, "\10\0\0\0"},
                                 {0}});
  s = open_folder();
  expect_got(s, "mid_block.attentions.0.to_q.weight", S(2, 2), 1);       /* stored as a 1x1 convolution */
  expect_got(s, "mid_block.attentions.0.to_q.weight", S(2, 2, 1, 1), 1); /* wanted as one */
  expect_got(s, "mid_block.attentions.0.to_k.weight", S(2, 2, 1, 1), 2);
  expect_got(s, "mid_block.attentions.0.to_v.bias", S(2), 3);
  expect_got(s, "mid_block.attentions.0.to_out.0.weight", S(2, 2), 4);
  expect_got(s, "text_model.encoder.layers.0.fc1.bias", S(2), 5);
  expect_got(s, "final_layer_norm.bias", S(2), 6);
  expect_got(s, "both.to_q.bias", S(2), 7); /* the new name first */
  expect_refused(s, "mid_block.attentions.0.to_v.weight", S(2, 2), "is missing");
  expect_refused(s, "mid_block.attentions.0.to_q.weight", S(2, 4), "has shape (2, 2, 1, 1)"); /* the name that was asked for */
  assert_false(source_has(s, "to_q"));
  source_close(s);
}

/* ---- shards ---- */

static const char index_name[] = "diffusion_pytorch_model.safetensors.index.json";

static void write_shards(void)
{
  empty_folder();
  write_tensors("one-1.safetensors", (struct entry[]){{"a", "F16", "[2]", 4, "\1\0\0\0"}, {"b", "F16", "[2]", 4, "\2\0\0\0"}, {0}});
  write_tensors("two-2.safetensors", (struct entry[]){{"c", "F16", "[2]", 4, "\3\0\0\0"}, {0}});
  write_text(index_name, "{\"metadata\":{},\"weight_map\":{\"c\":\"two-2.safetensors\",\"a\":\"one-1.safetensors\","
                         "\"b\":\"one-1.safetensors\"}}");
}

static void expect_index_refused(const char *text, const char *field, const char *says)
{
  write_shards();
  write_text(index_name, text);
  expect_folder_refused(field, says);
}

static void test_shards(void **state)
{
  char path[160], gone[] = "{\"weight_map\":{\"a\":\"one-1.safetensors\",\"b\":\"one-1.safetensors\",\"c\":\"gone.safetensors\"}}";
  struct source *s;

  (void)state;
  write_shards();
  s = open_folder();
  expect_got(s, "a", S(2), 1);
  expect_got(s, "b", S(2), 2);
  expect_got(s, "c", S(2), 3);
  expect_refused(s, "d", S(2), "is missing");
  source_close(s);

  snprintf(path, sizeof path, "%s/%s", folder, index_name);
  expect_index_refused("", path, "not valid JSON");
  expect_index_refused("{\"weight_map\":{\"a\":1,\"a\":2}}", path, "not valid JSON");
  expect_index_refused("{}", index_name, "no weight_map");
  expect_index_refused("{\"weight_map\":{}}", index_name, "no weight_map");
  expect_index_refused("{\"weight_map\":{\"a\":7}}", index_name, "not a plain");
  expect_index_refused("{\"weight_map\":{\"a\":\"../one-1.safetensors\"}}", index_name, "not a plain");
  expect_index_refused("{\"weight_map\":{\"a\":\"/etc/one.safetensors\"}}", index_name, "not a plain");
  expect_index_refused("{\"weight_map\":{\"a\":\".hidden.safetensors\"}}", index_name, "not a plain");
  expect_index_refused("{\"weight_map\":{\"a\":\"one-1.bin\"}}", index_name, "not a plain");
  expect_index_refused("{\"weight_map\":{\"a\":\".safetensors\"}}", index_name, "not a plain");
  expect_index_refused(gone, "gone.safetensors", "missing");
  /* the index and the shards disagree */
  expect_index_refused("{\"weight_map\":{\"a\":\"two-2.safetensors\"}}", "a", "missing");
  expect_index_refused("{\"weight_map\":{\"a\\n\":\"two-2.safetensors\"}}", "a?", "missing");
  expect_index_refused("{\"weight_map\":{\"a\":\"one-1.safetensors\",\"c\":\"two-2.safetensors\"}}", index_name, "hold 3");
  write_shards(); /* a tensor in two shards */
  write_tensors("two-2.safetensors", (struct entry[]){{"a", "F16", "[2]", 4, NULL}, {"c", "F16", "[2]", 4, NULL}, {0}});
  expect_folder_refused(index_name, "hold 4");
  write_shards(); /* a damaged shard */
  write_text("two-2.safetensors", "x");
  snprintf(path, sizeof path, "%s/two-2.safetensors", folder);
  expect_folder_refused(path, "too few");
}

/* ---- the formula ---- */

/* Element i, once more from the text of tools/reference/synth.py, for a 1-D tensor that is no weight. */
static float bias_value(const char *name, uint64_t i)
{
  uint64_t h = 0xcbf29ce484222325u, z;
  volatile float v; /* every step rounded to fp32 */

  for (; *name; name++) {
    h ^= (unsigned char)*name;
    h *= 0x100000001b3u;
  }
  z = h + (i + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z = z ^ (z >> 31);
  v = (float)(z >> 40) * 0x1p-23f - 1.0f;
  v = v * 0.05f;
  return v;
}

/* The scalar and the vector code, each with every length of its rest, in all types. */
static void test_formula_every_length(void **state)
{
  float v[100];
  uint16_t half[100];

  (void)state;
  for (int64_t n = 1; n < 100; n++) {
    synth_fill("some.bias", 1, &n, DT_F32, v);
    for (int i = 0; i < n; i++)
      assert_int_equal(f32_bits(v[i]), f32_bits(bias_value("some.bias", (uint64_t)i)));
    synth_fill("some.bias", 1, &n, DT_F16, half);
    for (int i = 0; i < n; i++)
      assert_int_equal(half[i], f32_to_f16(v[i]));
    synth_fill("some.bias", 1, &n, DT_BF16, half);
    for (int i = 0; i < n; i++)
      assert_int_equal(half[i], f32_to_bf16(v[i]));
  }
}

static void test_formula(void **state)
{
  static const int64_t shape[] = {320, 4, 3, 3}, large[] = {300, 400};
  struct source *s;
  struct param p;
  struct err e = {0};
  float v[11520], *many, sum = 0;
  uint16_t half[11520];

  (void)state;
  /* The first values of tools/reference/synth.py, as bits. */
  synth_fill("conv_in.weight", 4, shape, DT_F32, v);
  assert_int_equal(f32_bits(v[0]), 0x3d287e74);
  assert_int_equal(f32_bits(v[11519]), 0x3d810b10);
  synth_fill("norm.weight", 1, S(4), DT_F32, v);
  assert_int_equal(f32_bits(v[3]), 0x3f76a5bd);
  synth_fill("norm.bias", 1, S(4), DT_F32, v);
  assert_int_equal(f32_bits(v[3]), 0xbd283b8f);

  synth_fill("x", 4, shape, DT_F32, v);
  synth_fill("x", 4, shape, DT_F16, half);
  for (int i = 0; i < 11520; i++)
    assert_int_equal(half[i], f32_to_f16(v[i]));
  synth_fill("x", 4, shape, DT_BF16, half);
  for (int i = 0; i < 11520; i++)
    assert_int_equal(half[i], f32_to_bf16(v[i]));

  /* more than one chunk: variance 1 / fan_in, and every chunk of its own */
  many = test_malloc(120000 * sizeof *many);
  synth_fill("large", 2, large, DT_F32, many);
  for (int i = 0; i < 120000; i++)
    sum += many[i] * many[i];
  assert_true(fabsf(sum / 300 - 1) <= 0.02f);
  assert_true(many[0] != many[32768]);
  test_free(many);

  assert_int_equal(source_open_synthetic(&s, DT_BF16, &e), 0);
  assert_true(source_has(s, "anything"));
  assert_int_equal(source_get(s, "x", 4, shape, &p, &e), 0);
  assert_int_equal(p.type, DT_BF16);
  assert_memory_equal(p.data, half, sizeof half);
  param_release(&p);
  assert_int_equal(source_get(s, "x", 1, S(INT64_MAX), &p, &e), E_ARG); /* overflows */
  memset(&e, 0, sizeof e);
  assert_int_equal(source_get(s, "x", 5, shape, &p, &e), E_ARG);
  source_close(s);
  memset(&e, 0, sizeof e);
  assert_int_equal(source_open_synthetic(&s, DT_U8, &e), E_ARG);
  assert_null(s);
}

/* base/half.h: every half comes back, and what lies between rounds to the nearest, ties to even. */
static void test_half(void **state)
{
  (void)state;
  for (uint32_t h = 0; h < 65536; h++) {
    float f = f16_to_f32((uint16_t)h), b = bf16_to_f32((uint16_t)h);

    if (isnan(f))
      assert_true(isnan(f16_to_f32(f32_to_f16(f))));
    else
      assert_int_equal(f32_to_f16(f), h);
    if (isnan(b))
      assert_true(isnan(bf16_to_f32(f32_to_bf16(b))));
    else
      assert_int_equal(f32_to_bf16(b), h);
    if ((h & 0x7fff) < 0x7bff) { /* halfway to the next, and a hair to each side */
      float next = f16_to_f32((uint16_t)(h + 1)), middle = (f + next) / 2;

      assert_int_equal(f32_to_f16(middle), h + (h & 1));
      assert_int_equal(f32_to_f16(nextafterf(middle, f)), h);
      assert_int_equal(f32_to_f16(nextafterf(middle, next)), h + 1);
    }
  }
  assert_int_equal(f32_to_f16(65504), 0x7bff);
  assert_int_equal(f32_to_f16(65519.996f), 0x7bff);
  assert_int_equal(f32_to_f16(65520), 0x7c00); /* ties to even is infinity */
  assert_int_equal(f32_to_f16(-INFINITY), 0xfc00);
  assert_int_equal(f32_to_f16(0x1p-25f), 0); /* half of the smallest, to even */
  assert_int_equal(f32_to_f16(0x1.000002p-25f), 1);
  assert_int_equal(f32_to_bf16(f32_from_bits(0x3f808000)), 0x3f80);
  assert_int_equal(f32_to_bf16(f32_from_bits(0x3f818000)), 0x3f82);
  assert_int_equal(f32_to_bf16(f32_from_bits(0x7f7fffff)), 0x7f80);
  assert_int_equal(f32_to_bf16(f32_from_bits(0x7f800001)), 0x7fc0); /* not an infinity */
}

static int make_folder(void **state)
{
  (void)state;
  snprintf(folder, sizeof folder, "%s/safelight-source-XXXXXX", P_tmpdir);
  return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
  (void)state;
  empty_folder();
  return rmdir(folder);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_file_names), cmocka_unit_test(test_nothing_readable), cmocka_unit_test(test_refusals),
      cmocka_unit_test(test_types),      cmocka_unit_test(test_aliases),          cmocka_unit_test(test_shards),
      cmocka_unit_test(test_formula),    cmocka_unit_test(test_formula_every_length), cmocka_unit_test(test_half),
  };

  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
