/*
 * test_base64.c - base64 both ways, against the examples of RFC 4648 and a round trip of every length; what is refused. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/base64.h"

static void test_rfc(void **state)
{
  static const char *const pair[][2] = {{"", ""},         {"f", "Zg=="},         {"fo", "Zm8="},         {"foo", "Zm9v"},
                                        {"foob", "Zm9vYg=="}, {"fooba", "Zm9vYmE="}, {"foobar", "Zm9vYmFy"}};
  uint8_t bytes[32];
  struct err e = {0};
  struct buf b;
  size_t n;

  (void)state;
  for (size_t i = 0; i < sizeof pair / sizeof *pair; i++) {
    buf_init(&b, 64);
    assert_int_equal(base64_encode(&b, pair[i][0], strlen(pair[i][0]), &e), 0);
    assert_string_equal(b.p ? b.p : "", pair[i][1]);
    assert_int_equal(base64_decode(bytes, &n, pair[i][1], strlen(pair[i][1]), &e), 0);
    assert_int_equal(n, strlen(pair[i][0]));
    assert_memory_equal(bytes, pair[i][0], n);
    buf_close(&b);
  }
}

/* The output has exactly the room that the bound promises, so that a sanitizer sees a byte too much. */
static void test_round_trip(void **state)
{
  static uint8_t data[9000];
  struct err e = {0};
  struct buf b;

  (void)state;
  for (size_t i = 0; i < sizeof data; i++)
    data[i] = (uint8_t)(i * 2654435761u >> 11);
  buf_init(&b, 1 << 16);
  for (size_t len = 0; len < sizeof data; len = len < 70 ? len + 1 : len + 1021) {
    size_t n;
    b.len = 0;
    assert_int_equal(base64_encode(&b, data, len, &e), 0);
    assert_int_equal(b.len, (len + 2) / 3 * 4);
    uint8_t *got = malloc(base64_decode_bound(b.len));
    assert_non_null(got);
    assert_int_equal(base64_decode(got, &n, b.p, b.len, &e), 0);
    assert_int_equal(n, len);
    assert_memory_equal(got, data, len);
    free(got);
  }
  buf_close(&b);
}

static void test_refused(void **state)
{
  static const char *const bad[] = {"Z", "Zg", "Zg=", "Zg===", "Zm8", "=", "====", "Zm9v=", "Zm9v====", "Zg======", "Zm8=====", "Zg==\n====", "Zg=a", "Zg== =",
                                    "Zh==", "Zm9=", "Zm-v", "Zm_v", "Zg==Zg==", "Zm9v\"", "Zm\xc3\xa9"};
  uint8_t bytes[32];
  size_t n;

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    struct err e = {0};
    if (!base64_decode(bytes, &n, bad[i], strlen(bad[i]), &e))
      fail_msg("%s was accepted", bad[i]);
    assert_int_equal(e.code, E_ARG);
  }
}

static void test_lines_and_urls(void **state)
{
  static const char lines[] = " Zm9\tv\r\nY mFyZm9vYmFyZg\n=\n=\n", url[] = "data:image/png;base64,Zm9v", other[] = "data:text/plain,Zm9v";
  uint8_t bytes[32];
  struct err e = {0};
  size_t n, len = sizeof url - 1;
  const char *s = base64_of_url(url, &len);

  (void)state;
  assert_string_equal(s, "Zm9v");
  assert_int_equal(len, 4);
  len = sizeof other - 1;
  assert_ptr_equal(base64_of_url(other, &len), other);
  assert_int_equal(len, sizeof other - 1);
  assert_int_equal(base64_decode(bytes, &n, lines, sizeof lines - 1, &e), 0);
  assert_int_equal(n, 13);
  assert_memory_equal(bytes, "foobarfoobarf", 13);
}

/* A text that does not fit leaves nothing of itself. */
static void test_maximum(void **state)
{
  static const char data[8000];
  struct err e = {0};
  struct buf b;

  (void)state;
  buf_init(&b, 5000);
  assert_int_equal(buf_add_str(&b, "x", &e), 0);
  assert_int_equal(base64_encode(&b, data, sizeof data, &e), E_TOOBIG);
  assert_string_equal(b.p, "x");
  assert_int_equal(b.len, 1);
  buf_close(&b);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_rfc), cmocka_unit_test(test_round_trip), cmocka_unit_test(test_refused),
      cmocka_unit_test(test_lines_and_urls), cmocka_unit_test(test_maximum),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
