/*
 * test_base.c - base/: the first cause of an error wins, nothing overflows, a full or failing buffer keeps what it has, and JSON that could
 * not be read for want of memory says so.
 *
 * Threads: one.
 */
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include <cmocka.h>

#include "base/buf.h"
#include "base/err.h"
#include "base/json_load.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif

/* ---- err ---- */

static void test_err_set(void **state)
{
  struct err e = {0};

  (void)state;
  assert_int_equal(err_set(&e, E_FILE, "no %s in %d", "tensor", 7), E_FILE);
  assert_int_equal(e.code, E_FILE);
  assert_string_equal(e.msg, "no tensor in 7");
  assert_string_equal(e.field, "");
  e = (struct err){0};
  assert_int_equal(err_field(&e, E_ARG, "width", "must be a multiple of %d", 8), E_ARG);
  assert_string_equal(e.field, "width");
  assert_string_equal(e.msg, "must be a multiple of 8");
}

static void test_err_first_cause_wins(void **state)
{
  struct err e = {0};

  (void)state;
  err_field(&e, E_NOMEM, "slab", "first");
  assert_int_equal(err_set(&e, E_INTERNAL, "second"), E_NOMEM);
  assert_int_equal(err_field(&e, E_ARG, "other", "third"), E_NOMEM);
  assert_int_equal(e.code, E_NOMEM);
  assert_string_equal(e.field, "slab");
  assert_string_equal(e.msg, "first");
}

static void test_err_without_struct(void **state)
{
  (void)state;
  assert_int_equal(err_set(NULL, E_BUSY, "full"), E_BUSY);
  assert_int_equal(err_field(NULL, E_ARG, "f", "bad"), E_ARG);
  assert_true(err_wrap(NULL, "while %d", 1) < 0);
}

static void test_err_wrap(void **state)
{
  struct err e = {0};

  (void)state;
  err_field(&e, E_FILE, "unet", "too short");
  assert_int_equal(err_wrap(&e, "loading %s", "model"), E_FILE);
  assert_string_equal(e.msg, "loading model: too short");
  assert_string_equal(e.field, "unet");
  assert_int_equal(err_wrap(&e, "start"), E_FILE);
  assert_string_equal(e.msg, "start: loading model: too short");
}

/* Whatever the lengths, both texts end with NUL inside of their arrays. */
static void test_err_long_text(void **state)
{
  char text[2000];
  struct err e[3]; /* the neighbours would notice */

  (void)state;
  memset(text, 'x', sizeof text - 1);
  text[sizeof text - 1] = 0;
  memset(e, 0, sizeof e);
  err_field(&e[1], E_ARG, text, "%s", text);
  assert_int_equal(strlen(e[1].field), sizeof e[1].field - 1);
  assert_int_equal(strlen(e[1].msg), sizeof e[1].msg - 1);
  for (int i = 0; i < 5; i++) {
    assert_int_equal(err_wrap(&e[1], "%s", text), E_ARG);
    assert_true(strlen(e[1].msg) < sizeof e[1].msg);
  }
  assert_int_equal(e[0].code, 0);
  assert_string_equal(e[0].msg, "");
  assert_int_equal(e[2].code, 0);
  assert_string_equal(e[2].field, "");
}

static void test_err_name(void **state)
{
  (void)state;
  for (int code = E_ABSENT; code <= E_OK; code++) {
    assert_string_not_equal(err_name(code), "unknown");
    for (int other = code + 1; other <= E_OK; other++)
      assert_string_not_equal(err_name(code), err_name(other));
  }
  assert_string_equal(err_name(E_OK), "ok");
  assert_string_equal(err_name(E_ARG), "arg");
  assert_string_equal(err_name(E_AUTH), "auth");
  assert_string_equal(err_name(E_ABSENT - 1), "unknown");
  assert_string_equal(err_name(1), "unknown");
  assert_string_equal(err_name(INT_MIN), "unknown");
  assert_string_equal(err_name(INT_MAX), "unknown");
}

/* ---- buf ---- */

static void test_buf_grows(void **state)
{
  struct err e = {0};
  struct buf b;
  char *p;
  size_t len;

  (void)state;
  buf_init(&b, 100000);
  assert_null(b.p);
  for (int i = 0; i < 1000; i++) {
    assert_int_equal(buf_addf(&b, &e, "%03d,", i), 0);
    assert_int_equal(b.len, (size_t)(i + 1) * 4);
    assert_int_equal(b.p[b.len], 0);
  }
  assert_memory_equal(b.p, "000,001,002,", 12);
  assert_memory_equal(b.p + 3996, "999,", 5);
  p = buf_take(&b, &len);
  assert_int_equal(len, 4000);
  assert_null(b.p);
  assert_int_equal(b.len, 0);
  assert_int_equal(buf_add_str(&b, "again", &e), 0);
  assert_string_equal(b.p, "again");
  free(p);
  buf_close(&b);
}

/* Exactly the maximum fits; one more does not, and changes nothing. */
static void test_buf_limit(void **state)
{
  static const size_t limits[] = {0, 1, 255, 256, 257, 1000};
  char text[1001];

  (void)state;
  memset(text, 'y', sizeof text);
  for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
    size_t max = limits[i];
    struct err e = {0};
    struct buf b;

    buf_init(&b, max);
    assert_int_equal(buf_add(&b, text, max + 1, &e), E_TOOBIG);
    assert_int_equal(b.len, 0);
    e = (struct err){0};
    assert_int_equal(buf_add(&b, text, max, &e), 0);
    assert_int_equal(b.len, max);
    assert_int_equal(buf_add(&b, "z", 1, &e), E_TOOBIG);
    assert_true(e.msg[0] != 0);
    e = (struct err){0};
    assert_int_equal(buf_addf(&b, &e, "%d", 7), E_TOOBIG);
    e = (struct err){0};
    assert_int_equal(buf_add(&b, text, SIZE_MAX, &e), E_TOOBIG); /* len + n would wrap around */
    e = (struct err){0};
    assert_int_equal(buf_add(&b, NULL, 0, &e), 0); /* nothing always fits */
    assert_int_equal(buf_add_str(&b, "", &e), 0);
    assert_int_equal(b.len, max);
    assert_memory_equal(b.p, text, max);
    assert_int_equal(b.p[max], 0);
    buf_close(&b);
  }
}

static void test_buf_bytes(void **state)
{
  struct err e = {0};
  struct buf b;

  (void)state;
  buf_init(&b, 10);
  assert_int_equal(buf_add(&b, "a\0b", 3, &e), 0);
  assert_int_equal(buf_add(&b, "\0", 1, &e), 0);
  assert_int_equal(b.len, 4);
  assert_memory_equal(b.p, "a\0b\0\0", 5);
  buf_close(&b);
}

static void test_buf_close(void **state)
{
  struct err e = {0};
  struct buf never = {0}, b;
  size_t len = 7;

  (void)state;
  buf_close(NULL);
  buf_close(&never);
  buf_init(&b, 5);
  assert_null(buf_take(&b, &len));
  assert_int_equal(len, 0);
  buf_close(&b);
  buf_close(&b);
  assert_int_equal(buf_add_str(&b, "12345", &e), 0); /* usable again, with the same maximum */
  assert_int_equal(buf_add_str(&b, "6", &e), E_TOOBIG);
  buf_close(&b);
}

/* When memory is short the buffer keeps its content. Sanitizers end the program instead of returning NULL. */
static void test_buf_no_memory(void **state)
{
#ifdef SANITIZED
  (void)state;
  skip();
#else
  struct rlimit before, small;
  struct err e = {0};
  struct buf b;
  static char block[1 << 20];
  int r = 0;

  (void)state;
  buf_init(&b, (size_t)1 << 40);
  assert_int_equal(buf_add_str(&b, "kept", &e), 0);
  assert_int_equal(getrlimit(RLIMIT_AS, &before), 0);
  small = before;
  small.rlim_cur = (rlim_t)1 << 30;
  assert_int_equal(setrlimit(RLIMIT_AS, &small), 0);
  while (!r)
    r = buf_add(&b, block, sizeof block, &e);
  assert_int_equal(setrlimit(RLIMIT_AS, &before), 0);
  assert_int_equal(r, E_NOMEM);
  assert_int_equal(b.len % sizeof block, 4);
  assert_memory_equal(b.p, "kept", 4);
  assert_int_equal(b.p[b.len], 0);
  buf_close(&b);
#endif
}

/* What the caller learns does not depend on what was in its json_error_t before. */
static void test_json_no_memory(void **state)
{
#ifdef SANITIZED
  (void)state;
  skip();
#else
  enum { SPACES = 32 << 20 };
  struct rlimit before, small;
  char *text = malloc(SPACES + 2);
  json_error_t why;
  json_t *root;

  (void)state;
  assert_non_null(text);
  memset(text, ' ', SPACES);
  memcpy(text + SPACES, "{}", 2);
  memset(&why, 0x5a, sizeof why);
  assert_int_equal(getrlimit(RLIMIT_AS, &before), 0);
  small = before;
  small.rlim_cur = (rlim_t)1 << 30;
  assert_int_equal(setrlimit(RLIMIT_AS, &small), 0);
  root = json_load_whole(text, SPACES + 2, 0, &why);
  assert_int_equal(setrlimit(RLIMIT_AS, &before), 0);
  assert_null(root);
  assert_int_equal(json_error_code(&why), json_error_out_of_memory);
  assert_string_equal(why.text, "");
  root = json_load_whole(text, SPACES + 2, 0, &why);
  assert_true(json_is_object(root));
  json_decref(root);
  free(text);
#endif
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_err_set),       cmocka_unit_test(test_err_first_cause_wins),
      cmocka_unit_test(test_err_wrap),      cmocka_unit_test(test_err_without_struct),
      cmocka_unit_test(test_err_long_text), cmocka_unit_test(test_err_name),
      cmocka_unit_test(test_buf_grows),     cmocka_unit_test(test_buf_limit),
      cmocka_unit_test(test_buf_bytes),     cmocka_unit_test(test_buf_close),
      cmocka_unit_test(test_buf_no_memory), cmocka_unit_test(test_json_no_memory),
  };

  return cmocka_run_group_tests_name("base", tests, NULL, NULL);
}
