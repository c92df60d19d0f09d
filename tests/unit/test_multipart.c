/*
 * test_multipart.c - forms as clients send them (bodies of the openai client 3.54, curl 7.88 and Python's requests, recorded), the rules of RFC 2046
 * and RFC 7578, and every form that must be refused. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/multipart.h"

#define TYPE "multipart/form-data; boundary=XX"

static void assert_span(struct multipart_span s, const char *want, size_t len)
{
  if (!want) {
    assert_null(s.p);
    return;
  }
  assert_non_null(s.p);
  assert_int_equal(s.len, len);
  assert_memory_equal(s.p, want, len);
}

#define ASSERT_SPAN(s, text) assert_span(s, text, sizeof(text) - 1)

/* Parses a copy that ends where its memory ends, so that a sanitizer sees a byte read too far. The copy lives until the next call. */
static int parse(struct multipart *m, const char *type, const char *body, size_t len, struct err *e)
{
  static char *copy;

  free(copy);
  copy = malloc(len ? len : 1);
  assert_non_null(copy);
  memcpy(copy, body, len);
  *e = (struct err){0};
  return multipart_parse(m, type, copy, len, e);
}

#define PARSE(m, type, text, e) parse(m, type, text, sizeof(text) - 1, e)

static void test_openai(void **state)
{
#define B "--2bbacf20c0eacff048ea4d9c7c3579b4"
  static const char body[] =
      B "\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\ncaf\xc3\xa9\r\n--x\r\n"
      B "\r\nContent-Disposition: form-data; name=\"n\"\r\n\r\n2\r\n"
      B "\r\nContent-Disposition: form-data; name=\"image[]\"; filename=\"a %22b%22.png\"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n\x1a\n1\r\n--2\r\n"
      B "\r\nContent-Disposition: form-data; name=\"image[]\"; filename=\"c.png\"\r\nContent-Type: image/png\r\n\r\ntwo\r\n"
      B "\r\nContent-Disposition: form-data; name=\"mask\"; filename=\"upload\"\r\nContent-Type: application/octet-stream\r\n\r\nmask\r\n\r\n"
      B "--\r\n";
#undef B
  const struct multipart_part *p;
  struct multipart m;
  struct err e;

  (void)state;
  assert_int_equal(PARSE(&m, "multipart/form-data; boundary=2bbacf20c0eacff048ea4d9c7c3579b4", body, &e), 0);
  assert_int_equal(m.n, 5);
  ASSERT_SPAN(multipart_find(&m, "prompt", 0)->data, "caf\xc3\xa9\r\n--x");
  assert_null(multipart_find(&m, "prompt", 0)->filename.p);
  assert_null(multipart_find(&m, "prompt", 0)->type.p);
  ASSERT_SPAN(multipart_find(&m, "n", 0)->data, "2");
  p = multipart_find(&m, "image[]", 0);
  ASSERT_SPAN(p->data, "\x89PNG\r\n\x1a\n1\r\n--2");
  ASSERT_SPAN(p->filename, "a %22b%22.png");
  ASSERT_SPAN(p->type, "image/png");
  p = multipart_find(&m, "image[]", (int)(p - m.part) + 1);
  ASSERT_SPAN(p->data, "two");
  assert_null(multipart_find(&m, "image[]", (int)(p - m.part) + 1));
  ASSERT_SPAN(multipart_find(&m, "mask", 0)->data, "mask\r\n");
  assert_null(multipart_find(&m, "mas", 0));
  assert_null(multipart_find(&m, "mask2", 0));
}

static void test_curl(void **state)
{
#define B "--------------------------0d7deaeece6eaa5e"
  static const char body[] = B "\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na \"cat\"\r\n"
                             B "\r\nContent-Disposition: form-data; name=\"image\"; filename=\"q%22x\\.png\"\r\nContent-Type: image/png\r\n\r\n\0\xff\r\n\r\n"
                             B "--\r\n";
  struct multipart m;
  struct err e;

  (void)state;
  assert_int_equal(PARSE(&m, "multipart/form-data; boundary=------------------------0d7deaeece6eaa5e", body, &e), 0);
#undef B
  assert_int_equal(m.n, 2);
  ASSERT_SPAN(m.part[0].data, "a \"cat\"");
  ASSERT_SPAN(m.part[1].filename, "q%22x\\.png");
  ASSERT_SPAN(m.part[1].data, "\0\xff\r\n");
}

/* What the RFCs allow beside what clients do. */
static void test_allowed(void **state)
{
  static const char body[] = "a preamble --XX\r\nof two lines\r\n"
                             "--XX \t\r\ncontent-disposition:form-data;name=a\r\n\r\n\r\n"          /* nothing in it */
                             "--XX\r\nX-Other: 1\r\nContent-Disposition: Form-Data; filename=f; name=\"b \\\" c\"; x=y;\r\n"
                             "Content-Type:  text/plain; charset=utf-8 \r\nContent-Transfer-Encoding: Binary\r\n\r\n --XX\n--X\r\r\n-XX\r\n"
                             "--XX\r\nContent-Disposition: form-data; name=\"d\"; filename*=utf-8''%e2%82%ac\r\n\r\n"  /* no line for data either */
                             "--XX-- \r\nan epilogue\r\n--XX\r\n";
  struct multipart m;
  struct err e;

  (void)state;
  assert_int_equal(PARSE(&m, "Multipart/Form-Data ; charset=utf-8; BOUNDARY=\"XX\"", body, &e), 0);
  assert_int_equal(m.n, 3);
  ASSERT_SPAN(m.part[0].name, "a");
  ASSERT_SPAN(m.part[0].data, "");
  ASSERT_SPAN(m.part[1].name, "b \\\" c");
  ASSERT_SPAN(m.part[1].filename, "f");
  ASSERT_SPAN(m.part[1].type, "text/plain; charset=utf-8");
  ASSERT_SPAN(m.part[1].data, " --XX\n--X\r\r\n-XX");
  ASSERT_SPAN(m.part[2].filename, "utf-8''%e2%82%ac");
  ASSERT_SPAN(m.part[2].data, "");
  assert_int_equal(PARSE(&m, TYPE, "--XX--", &e), 0); /* a form of no parts */
  assert_int_equal(m.n, 0);
}

static void test_types(void **state)
{
  static const struct {
    const char *type;
    int code;
  } bad[] = {{NULL, E_TYPE},
             {"", E_TYPE},
             {"application/json", E_TYPE},
             {"multipart/mixed; boundary=XX", E_TYPE},
             {"multipart/form-data2; boundary=XX", E_TYPE},
             {"multipart/form-data", E_ARG},
             {"multipart/form-data;", E_ARG},
             {"multipart/form-data boundary=XX", E_ARG},
             {"multipart/form-data; boundary", E_ARG},
             {"multipart/form-data; boundary=", E_ARG},
             {"multipart/form-data; boundary=\"XX", E_ARG},
             {"multipart/form-data; boundary=\"XX \"", E_ARG},
             {"multipart/form-data; boundary=\"X\xc3\xa9\"", E_ARG},
             {"multipart/form-data; boundary=XX; boundary=XX", E_ARG},
             {"multipart/form-data; boundary=12345678901234567890123456789012345678901234567890123456789012345678901", E_ARG}};
  struct multipart m;
  struct err e;

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    assert_int_equal(PARSE(&m, bad[i].type, "--XX--", &e), bad[i].code);
    assert_string_equal(e.field, "Content-Type");
  }
  assert_int_equal(PARSE(&m, "multipart/form-data; boundary=1234567890123456789012345678901234567890123456789012345678901234567890",
                         "--1234567890123456789012345678901234567890123456789012345678901234567890--", &e), 0);
}

static void test_refused(void **state)
{
#define HEAD "Content-Disposition: form-data; name=\"a\"\r\n\r\n"
  static const struct {
    const char *body, *why;
  } bad[] = {{"", "does not occur"},
             {"--X", "does not occur"},
             {"x--XX--", "does not occur"},
             {"\n--XX\n", "does not occur"},
             {"--XX", "goes on"},
             {"--XXX\r\n" HEAD "1\r\n--XXX--", "goes on"},
             {"--XX\n" HEAD "1\r\n--XX--", "goes on"},
             {"--XX\r\n" HEAD "1\r\n--XXY\r\n--XX--", "goes on"},
             {"--XX\r\n" HEAD "1\r\n--XX-\r\n", "goes on"},
             {"--XX\r\n" HEAD "1\r\n--XX--x", "goes on"},
             {"--XX\r\n" HEAD "1\r\n--XX", "goes on"},
             {"--XX\r\n", "cut off"},
             {"--XX\r\n" HEAD "1", "cut off"},
             {"--XX\r\n" HEAD "1\r\n--XX\r\n", "cut off"},
             {"--XX\r\n" HEAD "1\n--XX--\n", "cut off"},
             {"--XX\r\n--XX--", "cut off"},
             {"--XX\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Type: text/plain\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Disposition: form-data\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Disposition: form-data; name=\"\"\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Disposition: form-data; name=\"a\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Disposition: form-data; name=\"a\\\"\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Disposition: form-data, name=a\r\n\r\n1\r\n--XX--", "needs a header"},
             {"--XX\r\nContent-Disposition: attachment; name=a\r\n\r\n1\r\n--XX--", "must be form-data"},
             {"--XX\r\nContent-Disposition: form\r\n\r\n1\r\n--XX--", "must be form-data"},
             {"--XX\r\nContent-Disposition: form-data; name=a; name=b\r\n\r\n1\r\n--XX--", "two names"},
             {"--XX\r\nContent-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--XX--", "two Content"},
             {"--XX\r\nContent-Disposition: form-data; name=a\r\n folded\r\n\r\n1\r\n--XX--", "malformed header"},
             {"--XX\r\nContent-Disposition : form-data; name=a\r\n\r\n1\r\n--XX--", "malformed header"},
             {"--XX\r\nContent-Disposition: form-data; name=a\r\n--XX--", "no empty line"},
             {"--XX\r\nContent-Transfer-Encoding: base64\r\n" HEAD "1\r\n--XX--", "Transfer-Encoding"}};
#undef HEAD
  struct multipart m;
  struct err e;

  (void)state;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    int r = parse(&m, TYPE, bad[i].body, strlen(bad[i].body), &e);
    if (r != E_ARG || !strstr(e.msg, bad[i].why) || m.n)
      fail_msg("case %zu: %d %s", i, r, e.msg);
  }
}

/* A form of n parts whose names have name bytes and whose headers are padded by pad bytes. */
static int parse_sized(int n, int name, int pad, struct err *e)
{
  static char body[1 << 16];
  struct multipart m;
  size_t len = 0;

  for (int i = 0; i < n; i++)
    len += (size_t)snprintf(body + len, sizeof body - len, "--XX\r\nX: %0*d\r\nContent-Disposition: form-data; name=\"%0*d\"\r\n\r\n\r\n", pad, 0, name, 0);
  len += (size_t)snprintf(body + len, sizeof body - len, "--XX--");
  return parse(&m, TYPE, body, len, e);
}

static void test_bounds(void **state)
{
  struct err e;

  (void)state;
  assert_int_equal(parse_sized(MULTIPART_PARTS_MAX, 1, 1, &e), 0);
  assert_int_equal(parse_sized(MULTIPART_PARTS_MAX + 1, 1, 1, &e), E_ARG);
  assert_non_null(strstr(e.msg, "more than 64 parts"));
  assert_int_equal(parse_sized(1, MULTIPART_NAME_MAX, 1, &e), 0);
  assert_int_equal(parse_sized(1, MULTIPART_NAME_MAX + 1, 1, &e), E_ARG);
  assert_non_null(strstr(e.msg, "longer than 256"));
  assert_int_equal(parse_sized(1, 1, MULTIPART_HEADERS_MAX - 100, &e), 0);
  assert_int_equal(parse_sized(1, 1, MULTIPART_HEADERS_MAX, &e), E_ARG);
  assert_non_null(strstr(e.msg, "longer than 4096"));
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_openai), cmocka_unit_test(test_curl),    cmocka_unit_test(test_allowed),
      cmocka_unit_test(test_types),  cmocka_unit_test(test_refused), cmocka_unit_test(test_bounds),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
