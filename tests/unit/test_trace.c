/*
 * test_trace.c - traceparent as the recommendation has it, character by character, and which origins may read what. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "server/cors.h"
#include "server/trace.h"

#define ID "0af7651916cd43dd8448eb211c80319c"
#define SPAN "b7ad6b7169203331"
#define GOOD "00-" ID "-" SPAN "-01"

static void test_good(void **state)
{
  static const struct { const char *header; int is_sampled; } good[] = {
      {GOOD, 1},
      {"00-" ID "-" SPAN "-00", 0},
      {"00-" ID "-" SPAN "-ff", 1},           /* only the one bit is known */
      {"00-" ID "-" SPAN "-fe", 0},
      {"cc-" ID "-" SPAN "-01", 1},           /* a later version is read as 00 */
      {"cc-" ID "-" SPAN "-01-what-comes", 1},
      {"01-" ID "-" SPAN "-01-", 1},
      {"00-00000000000000000000000000000001-0000000000000001-01", 1},
  };
  struct trace t;

  (void)state;
  for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
    if (!trace_parse(&t, good[i].header))
      fail_msg("%s was refused", good[i].header);
    assert_memory_equal(t.id, good[i].header + 3, 32);
    assert_memory_equal(t.parent, good[i].header + 36, 16);
    assert_int_equal(t.is_sampled, good[i].is_sampled);
    assert_string_equal(t.span, "");
  }
}

static void refused(const char *header)
{
  struct trace t;

  if (trace_parse(&t, header))
    fail_msg("%s was accepted", header);
  assert_true(!*t.id && !*t.parent && !*t.span && !t.is_sampled);
}

static void test_bad(void **state)
{
  char text[128];

  (void)state;
  refused(NULL);
  refused("");
  refused("00");
  refused("ff-" ID "-" SPAN "-01");
  refused("00-" ID "-" SPAN "-01-");
  refused("00-" ID "-" SPAN "-01x");
  refused("cc-" ID "-" SPAN "-01.x");
  refused("cc-" ID "-" SPAN "-0");
  refused(" " GOOD);
  refused("00-00000000000000000000000000000000-" SPAN "-01");
  refused("00-" ID "-0000000000000000-01");
  refused("0-" ID "-" SPAN "-01-");
  refused("00-0AF7651916CD43DD8448EB211C80319C-" SPAN "-01"); /* upper case */
  for (size_t n = 0; n < strlen(GOOD); n++) { /* every prefix, and every place with a wrong character */
    snprintf(text, sizeof text, "%.*s", (int)n, GOOD);
    refused(text);
    snprintf(text, sizeof text, "%s", GOOD);
    text[n] = text[n] == '-' ? '0' : 'G';
    refused(text);
  }
}

static void test_begin(void **state)
{
  struct trace t, u;
  char header[TRACE_HEADER + 1];

  (void)state;
  trace_begin(&t, GOOD);
  assert_string_equal(t.id, ID);
  assert_string_equal(t.parent, SPAN);
  assert_int_equal(strlen(t.span), 16);
  assert_string_not_equal(t.span, SPAN);
  trace_header(header, &t);
  assert_true(trace_parse(&u, header) && !strcmp(u.id, ID) && !strcmp(u.parent, t.span) && u.is_sampled);
  trace_begin(&t, "00-nonsense");
  trace_begin(&u, NULL);
  assert_string_equal(t.parent, "");
  assert_string_not_equal(t.id, u.id);
  trace_header(header, &t);
  assert_int_equal(strlen(header), TRACE_HEADER);
  assert_true(trace_parse(&u, header) && !u.is_sampled);
}

static void test_origins(void **state)
{
  static const char *const wrong[] = {
      "null", "https://a.example/", "https://", "http://:80", "ftp://a.example", "a.example", "https://A.example", "https://a.example:",
      "https://a.example:123456", "https://a.example:80x", "https://*.example", "https://u@a.example", "http://[::1", "http://[]",
      "* https://a.example", "https://a.example?x", "https://a.example#x"};
  struct cors c;
  struct err e = {0};

  (void)state;
  assert_int_equal(cors_read(&c, "", &e), 0);
  assert_true(!cors_allow(&c, "https://a.example") && !cors_allow(&c, NULL) && !cors_varies(&c));
  assert_int_equal(cors_read(&c, "https://a.example, http://localhost:3000 http://[::1]:80,", &e), 0);
  assert_string_equal(cors_allow(&c, "https://a.example"), "https://a.example");
  assert_string_equal(cors_allow(&c, "http://localhost:3000"), "http://localhost:3000");
  assert_string_equal(cors_allow(&c, "http://[::1]:80"), "http://[::1]:80");
  assert_true(cors_varies(&c));
  assert_null(cors_allow(&c, "http://a.example"));
  assert_null(cors_allow(&c, "https://a.example.evil.example"));
  assert_null(cors_allow(&c, "https://a.exampl"));
  assert_null(cors_allow(&c, "http://localhost:30001"));
  assert_null(cors_allow(&c, "null"));
  assert_null(cors_allow(&c, ""));
  assert_null(cors_allow(&c, NULL));
  assert_int_equal(cors_read(&c, "*", &e), 0);
  assert_string_equal(cors_allow(&c, "https://anyone.example"), "*"); /* never the origin itself */
  assert_true(!cors_varies(&c) && !cors_allow(&c, NULL));
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    e = (struct err){0};
    if (cors_read(&c, wrong[i], &e) != E_ARG)
      fail_msg("\"%s\" was accepted", wrong[i]);
    assert_string_equal(e.field, "cors_origins");
  }
}

static void headers_are(const char *wanted, const char *expected)
{
  char out[CORS_HEADERS_MAX];

  cors_headers(out, wanted);
  assert_string_equal(out, expected);
}

static void test_headers(void **state)
{
  char many[4000] = "", out[CORS_HEADERS_MAX];

  (void)state;
  headers_are(NULL, "");
  headers_are("", "");
  headers_are("authorization,content-type", "authorization, content-type");
  headers_are("Authorization, x-evil ,Idempotency-Key", "Authorization, Idempotency-Key");
  headers_are("x-stainless-os,x-stainless-retry-count", "x-stainless-os, x-stainless-retry-count");
  headers_are("x-stainless-,cookie,x-stainless-a\r\nb", "");
  for (int i = 0; i < 200; i++)
    memcpy(many + 14 * i, "authorization,", 14);
  cors_headers(out, many);
  assert_true(strlen(out) < CORS_HEADERS_MAX && strlen(out) > CORS_HEADERS_MAX - 40 && !strcmp(out + strlen(out) - 13, "authorization"));
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_good),    cmocka_unit_test(test_bad),     cmocka_unit_test(test_begin),
      cmocka_unit_test(test_origins), cmocka_unit_test(test_headers),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
