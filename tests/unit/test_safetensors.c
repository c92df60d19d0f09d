/*
 * test_safetensors.c - models/safetensors.c: what is legal is read, and every lie in a header is refused with the names of the
 * file and of the tensor. The files are made by hand, byte by byte.
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
#include "models/safetensors.h"

static char folder[64], path[96];

/* A file image: length, header, and `data` bytes counting up. */
static unsigned char *image(const char *header, size_t data, size_t *n)
{
  size_t len = strlen(header);
  unsigned char *p = test_malloc(8 + len + data + 1);

  for (int i = 0; i < 8; i++)
    p[i] = (unsigned char)((uint64_t)len >> 8 * i);
  memcpy(p + 8, header, len);
  for (size_t i = 0; i < data; i++)
    p[8 + len + i] = (unsigned char)i;
  *n = 8 + len + data;
  return p;
}

static void write_file(const void *p, size_t n)
{
  FILE *f = fopen(path, "wb");

  assert_non_null(f);
  assert_int_equal(fwrite(p, 1, n, f), n);
  assert_int_equal(fclose(f), 0);
}

/* Opens the bytes as memory and as a file; both must be refused with E_FILE, the file's name, `tensor` (or the file when
 * NULL) as the field, and a message with `says`. */
static void expect_bytes_refused(const void *p, size_t n, const char *tensor, const char *says)
{
  struct safetensors *st = (struct safetensors *)1;
  struct err e = {0};

  assert_int_equal(st_open_memory(&st, p, n, path, &e), E_FILE);
  assert_null(st);
  for (int pass = 0; pass < 2; pass++) {
    if (!strstr(e.msg, says))
      fail_msg("\"%s\" does not say \"%s\"", e.msg, says);
    assert_non_null(strstr(e.msg, path));
    assert_string_equal(e.field, tensor ? tensor : path);
    if (tensor)
      assert_non_null(strstr(e.msg, tensor));
    memset(&e, 0, sizeof e);
    write_file(p, n);
    assert_int_equal(st_open(&st, path, &e), E_FILE);
    assert_null(st);
  }
}

static void expect_refused(const char *header, size_t data, const char *tensor, const char *says)
{
  size_t n;
  unsigned char *p = image(header, data, &n);

  expect_bytes_refused(p, n, tensor, says);
  test_free(p);
}

static struct safetensors *expect_opened(const char *header, size_t data, unsigned char **bytes)
{
  struct safetensors *st;
  struct err e = {0};
  size_t n;

  *bytes = image(header, data, &n);
  if (st_open_memory(&st, *bytes, n, "memory", &e))
    fail_msg("%s", e.msg);
  return st;
}

/* ---- what is legal ---- */

static void test_reads(void **state)
{
  unsigned char *p;
  struct safetensors *st;
  const struct st_tensor *t;

  (void)state;
  /* any order in the header, a scalar, empty tensors, an odd offset, padding */
  st = expect_opened("{\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[1,25]},"
                     "\"__metadata__\":{\"format\":\"pt\",\"\":\"x\"},"
                     "\"none\":{\"dtype\":\"F64\",\"shape\":[4,0,2],\"data_offsets\":[25,25]},"
                     "\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                     "\"scalar\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[25,27]}}      ",
                     27, &p);
  assert_int_equal(st_count(st), 4);
  assert_string_equal(st_at(st, 0)->name, "a"); /* in name order */
  assert_string_equal(st_at(st, 1)->name, "b");
  assert_string_equal(st_at(st, 2)->name, "none");
  assert_string_equal(st_at(st, 3)->name, "scalar");
  t = st_find(st, "b");
  assert_ptr_equal(t, st_at(st, 1));
  assert_int_equal(t->type, ST_F32);
  assert_int_equal(t->nd, 2);
  assert_int_equal(t->shape[0], 2);
  assert_int_equal(t->shape[1], 3);
  assert_int_equal(t->bytes, 24);
  assert_int_equal(*(const unsigned char *)t->data, 1);
  assert_int_equal(st_find(st, "none")->bytes, 0);
  assert_int_equal(st_find(st, "scalar")->nd, 0);
  assert_int_equal(st_find(st, "scalar")->bytes, 2);
  assert_null(st_find(st, "c"));
  assert_null(st_find(st, ""));
  assert_null(st_find(st, "__metadata__"));
  assert_string_equal(st_metadata(st, "format"), "pt");
  assert_null(st_metadata(st, "absent"));
  assert_string_equal(st_path(st), "memory");
  assert_string_equal(st_dtype_name(t->type), "F32");
  st_forget(st, t); /* nothing to forget in memory */
  st_close(st);
  test_free(p);

  st = expect_opened("{}", 0, &p);
  assert_int_equal(st_count(st), 0);
  assert_null(st_find(st, "a"));
  assert_null(st_metadata(st, "a"));
  st_close(st);
  test_free(p);
  st_close(NULL);
}

static void test_reads_file(void **state)
{
  enum { COUNT = 5000 }; /* more than a page, and no whole number of pages */
  struct safetensors *st;
  struct err e = {0};
  size_t n;
  unsigned char *p = image("{\"t\":{\"dtype\":\"U8\",\"shape\":[5000],\"data_offsets\":[0,5000]}}", COUNT, &n);

  (void)state;
  write_file(p, n);
  assert_int_equal(st_open(&st, path, &e), 0);
  assert_memory_equal(st_at(st, 0)->data, p + n - COUNT, COUNT);
  st_forget(st, st_at(st, 0)); /* the pages come back */
  assert_memory_equal(st_at(st, 0)->data, p + n - COUNT, COUNT);
  st_close(st);
  test_free(p);
}

static void test_every_dtype(void **state)
{
  static const struct {
    const char *name;
    enum st_dtype type;
    size_t size;
  } all[] = {{"BOOL", ST_BOOL, 1}, {"U8", ST_U8, 1},     {"I8", ST_I8, 1},   {"I16", ST_I16, 2}, {"U16", ST_U16, 2},
             {"F16", ST_F16, 2},   {"BF16", ST_BF16, 2}, {"I32", ST_I32, 4}, {"U32", ST_U32, 4}, {"F32", ST_F32, 4},
             {"F64", ST_F64, 8},   {"I64", ST_I64, 8},   {"U64", ST_U64, 8}};
  char header[128];

  (void)state;
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    unsigned char *p;
    struct safetensors *st;

    snprintf(header, sizeof header, "{\"t\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[0,%zu]}}", all[i].name,
             3 * all[i].size);
    st = expect_opened(header, 3 * all[i].size, &p);
    assert_int_equal(st_at(st, 0)->type, all[i].type);
    assert_string_equal(st_dtype_name(all[i].type), all[i].name);
    assert_int_equal(st_dtype_size(all[i].type), all[i].size);
    st_close(st);
    test_free(p);
  }
}

/* ---- what is not ---- */

static void test_length_lies(void **state)
{
  unsigned char p[64] = {0};

  (void)state;
  expect_bytes_refused(p, 0, NULL, "0 bytes are too few");
  expect_bytes_refused(p, 7, NULL, "7 bytes are too few");
  expect_bytes_refused(p, 8, NULL, "not a JSON object"); /* a header of 0 bytes */
  p[0] = 57;
  expect_bytes_refused(p, 64, NULL, "claims 57 bytes");
  memset(p, 0xff, 8);
  expect_bytes_refused(p, 64, NULL, "claims 18446744073709551615 bytes");
  memset(p, 0, 8);
  p[7] = 0x80;
  expect_bytes_refused(p, 64, NULL, "claims 9223372036854775808 bytes");
}

static void test_huge_header(void **state)
{
  size_t n = 8 + (9u << 20);
  unsigned char *p = test_malloc(n);

  (void)state;
  memset(p, ' ', n);
  memcpy(p, "\0\0\x90\0\0\0\0\0{", 9);
  expect_bytes_refused(p, n, NULL, "over the limit");
  test_free(p);
}

static void test_bad_json(void **state)
{
  static const char *const other[] = {"[]", "null", " {}", "\xef\xbb\xbf{}"};
  static const char *const broken[] = {"{ ", "{} x", "{\"a\":}", "{\"a\":{}}{", "{'a':{}}", "{\"\xff\":{}}"};
  char deep[5000];

  (void)state;
  for (size_t i = 0; i < sizeof other / sizeof *other; i++)
    expect_refused(other[i], 0, NULL, "not a JSON object");
  for (size_t i = 0; i < sizeof broken / sizeof *broken; i++)
    expect_refused(broken[i], 0, NULL, "not valid JSON");
  memcpy(deep, "{\"a\":", 5);
  memset(deep + 5, '[', 4900);
  deep[4905] = 0;
  expect_refused(deep, 0, NULL, "not valid JSON");
  expect_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[99999999999999999999],\"data_offsets\":[0,1]}}", 1, NULL, "not valid JSON");
  expect_refused("{\"nul\\u0000\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, NULL, "not valid JSON");
  /* duplicates: of a tensor, and within one; the name of the key is in the message */
  expect_refused("{\"twin\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                 "\"twin\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
                 2, NULL, "twin");
  expect_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[2],\"data_offsets\":[0,1]}}", 1, NULL, "shape");
}

#define T(dtype, shape, offsets) "{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_bad_entries(void **state)
{
  static const struct {
    const char *entry, *says;
  } bad[] = {
      {"[]", "not described by an object"},
      {"7", "not described by an object"},
      {"{}", "no dtype"},
      {T("7", "[4]", "[0,4]"), "no dtype"},
      {T("\"F8_E4M3\"", "[4]", "[0,4]"), "unknown dtype \"F8_E4M3\""},
      {T("\"f16\"", "[2]", "[0,4]"), "unknown dtype"},
      {T("\"\"", "[2]", "[0,4]"), "unknown dtype"},
      {T("\"F\\n1\"", "[2]", "[0,4]"), "unknown dtype \"F?1\""},
      {"{\"dtype\":\"U8\",\"data_offsets\":[0,4]}", "no shape"},
      {T("\"U8\"", "4", "[0,4]"), "no shape"},
      {T("\"U8\"", "[4.0]", "[0,4]"), "not a list of whole numbers"},
      {T("\"U8\"", "[\"4\"]", "[0,4]"), "not a list of whole numbers"},
      {T("\"U8\"", "[-4]", "[0,4]"), "not a list of whole numbers"},
      {T("\"U8\"", "[-2,-2]", "[0,4]"), "not a list of whole numbers"},
      {T("\"U8\"", "[1,1,1,1,1,1,1,1,4]", "[0,4]"), "9 dimensions"},
      {T("\"U8\"", "[4294967296,4294967296]", "[0,4]"), "overflows"},
      {T("\"U8\"", "[4611686018427387904,4]", "[0,4]"), "overflows"},
      {T("\"U8\"", "[4294967296,4294967296,0]", "[0,0]"), "overflows"},
      {T("\"U8\"", "[0,4294967296,4294967296]", "[0,0]"), "overflows"},
      {T("\"F64\"", "[2305843009213693952]", "[0,4]"), "overflows"},
      {T("\"F32\"", "[4611686018427387905]", "[0,4]"), "overflows"}, /* 4 * this wraps to 4 */
      {"{\"dtype\":\"U8\",\"shape\":[4]}", "no pair of data_offsets"},
      {T("\"U8\"", "[4]", "4"), "no pair of data_offsets"},
      {T("\"U8\"", "[4]", "[4]"), "no pair of data_offsets"},
      {T("\"U8\"", "[4]", "[0,2,4]"), "no pair of data_offsets"},
      {T("\"U8\"", "[4]", "[0,4.0]"), "no pair of data_offsets"},
      {T("\"U8\"", "[4]", "[4,0]"), "out of order"},
      {T("\"U8\"", "[4]", "[-4,0]"), "out of order"},
      {T("\"U8\"", "[4]", "[-9223372036854775808,9223372036854775807]"), "out of order"},
      {T("\"U8\"", "[5]", "[0,5]"), "ends at byte 5"},
      {T("\"U8\"", "[4]", "[9223372036854775803,9223372036854775807]"), "ends at byte"},
      {T("\"U8\"", "[3]", "[0,4]"), "4 bytes where its dtype and shape need 3"},
      {T("\"F32\"", "[]", "[0,2]"), "2 bytes where its dtype and shape need 4"},
      {T("\"U8\"", "[0]", "[0,4]"), "4 bytes where its dtype and shape need 0"},
      {"{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"extra\":1}", "fields other than"},
  };
  char header[256];

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    snprintf(header, sizeof header, "{\"net.weight\":%s}", bad[i].entry);
    expect_refused(header, 4, "net.weight", bad[i].says);
  }
}

static void test_bad_names(void **state)
{
  char header[700], name[400];

  (void)state;
  expect_refused("{\"\":" T("\"U8\"", "[4]", "[0,4]") "}", 4, NULL, "tensor \"\" has a name of 0 bytes");
  expect_refused("{\"caf\xc3\xa9\":" T("\"U8\"", "[4]", "[0,4]") "}", 4, "caf??", "printable ASCII");
  expect_refused("{\"a\\u001b[31m\":" T("\"U8\"", "[4]", "[0,4]") "}", 4, "a?[31m", "printable ASCII");
  expect_refused("{\"a b\":" T("\"U8\"", "[4]", "[0,4]") "}", 4, "a b", "printable ASCII");
  memset(name, 'n', 300);
  name[300] = 0;
  snprintf(header, sizeof header, "{\"%s\":" T("\"U8\"", "[4]", "[0,4]") "}", name);
  name[127] = 0; /* what fits e->field */
  expect_refused(header, 4, name, "name of 300 bytes");
}

static void test_tiling(void **state)
{
  (void)state;
  expect_refused("{\"a\":" T("\"U8\"", "[4]", "[0,4]") ",\"b\":" T("\"U8\"", "[4]", "[3,7]") "}", 7, "b", "overlaps tensor \"a\"");
  expect_refused("{\"b\":" T("\"U8\"", "[4]", "[0,4]") ",\"a\":" T("\"U8\"", "[4]", "[0,4]") "}", 4, "b", "overlaps tensor \"a\"");
  expect_refused("{\"a\":" T("\"U8\"", "[8]", "[0,8]") ",\"b\":" T("\"U8\"", "[4]", "[2,6]") "}", 8, "b", "overlaps tensor \"a\"");
  expect_refused("{\"a\":" T("\"U8\"", "[4]", "[0,4]") ",\"b\":" T("\"U8\"", "[3]", "[5,8]") "}", 8, "b", "hole of 1 bytes");
  expect_refused("{\"a\":" T("\"U8\"", "[4]", "[1,5]") "}", 5, "a", "hole of 1 bytes");
  expect_refused("{\"a\":" T("\"U8\"", "[4]", "[0,4]") ",\"z\":" T("\"U8\"", "[0]", "[2,2]") "}", 4, "z", "overlaps");
  expect_refused("{\"a\":" T("\"U8\"", "[4]", "[0,4]") "}", 5, NULL, "1 bytes follow the last tensor");
  expect_refused("{}", 5, NULL, "5 bytes follow the last tensor");
}

static void test_metadata(void **state)
{
  (void)state;
  expect_refused("{\"__metadata__\":[]}", 0, "__metadata__", "not an object of strings");
  expect_refused("{\"__metadata__\":\"pt\"}", 0, "__metadata__", "not an object of strings");
  expect_refused("{\"__metadata__\":{\"format\":1}}", 0, "__metadata__", "not a string");
  expect_refused("{\"__metadata__\":" T("\"U8\"", "[4]", "[0,4]") "}", 4, "__metadata__", "not a string");
}

/* A valid file cut at every length is refused, whatever is cut. */
static void test_every_truncation(void **state)
{
  size_t n;
  unsigned char *p = image("{\"a\":" T("\"U8\"", "[4]", "[0,4]") ",\"b\":" T("\"F16\"", "[2]", "[4,8]") "}", 8, &n), *copy;

  (void)state;
  for (size_t cut = 0; cut < n; cut++) {
    struct safetensors *st;
    struct err e = {0};

    copy = test_malloc(cut + 1); /* so that ASan sees a read past the end */
    memcpy(copy, p, cut);
    assert_int_equal(st_open_memory(&st, copy, cut, "cut", &e), E_FILE);
    assert_null(st);
    test_free(copy);
  }
  test_free(p);
}

/* No single changed byte of the header may crash, and what is accepted must still tile the file. */
static void test_every_changed_byte(void **state)
{
  size_t n;
  unsigned char *p = image("{\"a\":" T("\"U8\"", "[4]", "[0,4]") ",\"b\":" T("\"F16\"", "[2]", "[4,8]") "}", 8, &n);
  static const unsigned char with[] = {0, '0', '9', '-', '"', '{', '}', '[', ']', ',', ' ', 0x80, 0xff, 'e'};

  (void)state;
  for (size_t i = 0; i + 8 < n; i++)
    for (size_t w = 0; w < sizeof with; w++) {
      struct safetensors *st;
      struct err e = {0};
      unsigned char was = p[i];
      size_t bytes = 0;

      p[i] = with[w];
      if (!st_open_memory(&st, p, n, "changed", &e)) {
        for (size_t k = 0; k < st_count(st); k++)
          bytes += st_at(st, k)->bytes;
        assert_int_equal(bytes, 8);
        st_close(st);
      } else {
        assert_int_equal(e.code, E_FILE);
      }
      p[i] = was;
    }
  test_free(p);
}

static void test_not_a_file(void **state)
{
  struct safetensors *st = (struct safetensors *)1;
  struct err e = {0};

  (void)state;
  assert_int_equal(st_open(&st, folder, &e), E_FILE);
  assert_null(st);
  assert_non_null(strstr(e.msg, "not a regular file"));
  assert_string_equal(e.field, folder);
  memset(&e, 0, sizeof e);
  unlink(path);
  assert_int_equal(st_open(&st, path, &e), E_FILE);
  assert_non_null(strstr(e.msg, "No such file"));
  memset(&e, 0, sizeof e);
  assert_int_equal(mkfifo(path, 0600), 0);
  assert_int_equal(st_open(&st, path, &e), E_FILE); /* and does not wait for a writer */
  assert_non_null(strstr(e.msg, "not a regular file"));
  unlink(path);
  memset(&e, 0, sizeof e);
  assert_int_equal(st_open_memory(&st, NULL, 0, "nothing", &e), E_FILE);
}

/* ---- finite values ---- */

/* Puts one bad element at every place of tensors of several sizes and misalignments. */
static void expect_found(enum st_dtype type, uint32_t bad)
{
  static const size_t counts[] = {1, 3, 4, 5, 8, 31, 64, 2047, 2048, 2049, 4099};
  size_t width = st_dtype_size(type);

  for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
    for (size_t shift = 0; shift < 2; shift++) {
      unsigned char *p = test_malloc(counts[c] * width + shift);
      struct st_tensor t = {.type = type, .nd = 1, .shape = {(int64_t)counts[c]}, .data = p + shift, .bytes = counts[c] * width};
      size_t at = c < 7 ? 0 : counts[c] - 40;

      memset(p, 0x7b, counts[c] * width + shift); /* large, finite, all mantissa and sign patterns near the limit are below */
      assert_int_equal(st_nonfinite(&t), -1);
      for (; at < counts[c]; at++) {
        unsigned char keep[4];

        memcpy(keep, p + shift + at * width, width);
        memcpy(p + shift + at * width, &bad, width);
        assert_int_equal(st_nonfinite(&t), at);
        memcpy(p + shift + at * width, keep, width);
      }
      test_free(p);
    }
}

static void test_nonfinite(void **state)
{
  static const uint32_t f16[] = {0x7c00, 0xfc00, 0x7e00, 0xfe00, 0x7c01, 0xffff},
                        bf16[] = {0x7f80, 0xff80, 0x7fc0, 0xffc0, 0x7f81, 0xffff},
                        f32[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000, 0x7f800001, 0xffffffff};

  (void)state;
  for (int i = 0; i < 6; i++) {
    expect_found(ST_F16, f16[i]);
    expect_found(ST_BF16, bf16[i]);
    expect_found(ST_F32, f32[i]);
  }
}

/* Every 16-bit pattern: found exactly when it is not finite, with finite neighbours of all kinds. */
static void test_nonfinite_every_half(void **state)
{
  static const uint16_t near[] = {0, 0x7bff, 0xfbff, 0x8000, 0x7f7f, 0xff7f};

  (void)state;
  for (uint32_t bits = 0; bits < 65536; bits++)
    for (int type = 0; type < 2; type++)
      for (int n = 0; n < 4; n++) {
        uint16_t around = type ? near[n == 1 ? 4 : n == 2 ? 5 : n] : near[n], v[8] = {around, around, around, (uint16_t)bits,
                                                                               around, around, around, around};
        struct st_tensor t = {.type = type ? ST_BF16 : ST_F16, .data = v, .bytes = sizeof v};
        int finite = isfinite(type ? bf16_to_f32((uint16_t)bits) : f16_to_f32((uint16_t)bits)) != 0;

        if (st_nonfinite(&t) != (finite ? -1 : 3))
          fail_msg("pattern %04x of %s", bits, st_dtype_name(t.type));
      }
}

static int make_folder(void **state)
{
  (void)state;
  snprintf(folder, sizeof folder, "%s/safelight-st-XXXXXX", P_tmpdir);
  if (!mkdtemp(folder))
    return -1;
  snprintf(path, sizeof path, "%s/model.safetensors", folder);
  return 0;
}

static int remove_folder(void **state)
{
  (void)state;
  unlink(path);
  return rmdir(folder);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_reads),           cmocka_unit_test(test_reads_file),       cmocka_unit_test(test_every_dtype),
      cmocka_unit_test(test_length_lies),     cmocka_unit_test(test_huge_header),      cmocka_unit_test(test_bad_json),
      cmocka_unit_test(test_bad_entries),     cmocka_unit_test(test_bad_names),        cmocka_unit_test(test_tiling),
      cmocka_unit_test(test_metadata),        cmocka_unit_test(test_every_truncation), cmocka_unit_test(test_every_changed_byte),
      cmocka_unit_test(test_not_a_file),      cmocka_unit_test(test_nonfinite),        cmocka_unit_test(test_nonfinite_every_half),
  };

  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
