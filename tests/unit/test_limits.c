/*
 * test_limits.c - tenants' limits with a clock of the test's own: rates, bounds, what a new policy changes, a full table, many threads; and whose address
 * counts behind which proxy. Threads: the tests; and those of test_threads.
 */
#include <arpa/inet.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "server/limits.h"
#include "server/metrics.h"
#include "server/peer.h"

enum { TICKETS = 200, THREADS = 4, ROUNDS = 3000 };

static const int64_t SECOND = 1000000000;

static struct limits *open_limits(int n)
{
  struct limits *l;
  struct err e = {0};

  assert_int_equal(limits_open(&l, n, &e), 0);
  return l;
}

static int admit(struct limits *l, const struct policy_limits *lim, const char *tenant, int n, int64_t now, struct limits_ticket *t, int64_t *retry)
{
  struct err e = {0};
  int r = limits_admit(l, lim, tenant, "10.0.0.1", n, now, t, retry, &e);

  assert_int_equal(r, e.code);
  assert_true((r != 0) == (*e.msg != 0));
  assert_true(r != E_BUSY || *retry > 0);
  assert_true(!r || !t->at);
  return r;
}

static void test_request_rate(void **state)
{
  struct policy_limits lim = {.per_minute = 6};
  struct limits *l = open_limits(8);
  struct limits_ticket t[TICKETS];
  int64_t retry, now = 1000 * SECOND;
  int in = 0;

  (void)state;
  for (int i = 0; i < 6; i++) /* a quiet minute's worth at once */
    assert_int_equal(admit(l, &lim, "a", 1, now, &t[in++], &retry), 0);
  assert_int_equal(admit(l, &lim, "a", 1, now, &t[in], &retry), E_BUSY);
  assert_in_range(retry, 10000, 10001); /* one every ten seconds */
  assert_int_equal(admit(l, &lim, "b", 1, now, &t[in++], &retry), 0); /* nobody else's business */
  assert_int_equal(admit(l, &lim, "a", 1, now + 9 * SECOND, &t[in], &retry), E_BUSY);
  assert_in_range(retry, 1000, 1001);
  assert_int_equal(admit(l, &lim, "a", 1, now + retry * 1000000 + 9 * SECOND, &t[in++], &retry), 0); /* the promise is kept */
  now += 10 * SECOND;
  for (int i = 1; i <= 100; i++) { /* a client that asks all the time has exactly his rate */
    int r = admit(l, &lim, "a", 1, now + i * SECOND, &t[in], &retry);
    assert_true(!r || r == E_BUSY);
    in += !r;
  }
  assert_int_equal(in, 6 + 1 + 1 + 10);
  while (in)
    limits_done(l, &t[--in]);
  limits_close(l);
}

static void test_picture_rate(void **state)
{
  struct policy_limits lim = {.pictures_per_minute = 10};
  struct limits *l = open_limits(8);
  struct limits_ticket t;
  int64_t retry, now = 5 * SECOND;

  (void)state;
  assert_int_equal(admit(l, &lim, "a", 11, now, &t, &retry), E_ARG);
  assert_int_equal(admit(l, &lim, "a", 8, now, &t, &retry), 0);
  limits_done(l, &t);
  assert_int_equal(admit(l, &lim, "a", 3, now, &t, &retry), E_BUSY);
  assert_in_range(retry, 6000, 6001);
  assert_int_equal(admit(l, &lim, "a", 2, now, &t, &retry), 0); /* what was refused cost nothing */
  limits_done(l, &t);
  assert_int_equal(admit(l, &lim, "a", 10, now + 60 * SECOND, &t, &retry), 0);
  limits_done(l, &t);
  limits_close(l);
}

static void test_concurrency_and_queue(void **state)
{
  struct policy_limits lim = {.concurrency = 3, .queue = 2}, tight = {.concurrency = 1}, wide = {0};
  struct limits *l = open_limits(8);
  struct limits_ticket t[4], more;
  int64_t retry, before = metric_value(METRIC_REFUSALS, REFUSAL_CONCURRENCY);
  int accepted, waiting;

  (void)state;
  assert_int_equal(admit(l, &lim, "a", 1, 0, &t[0], &retry), 0);
  assert_int_equal(admit(l, &lim, "a", 1, 0, &t[1], &retry), 0);
  assert_int_equal(admit(l, &lim, "a", 1, 0, &t[2], &retry), E_BUSY); /* two wait */
  limits_start(l, &t[0]);
  limits_start(l, &t[0]);
  assert_int_equal(admit(l, &lim, "a", 1, 0, &t[2], &retry), 0);
  limits_start(l, &t[1]);
  assert_int_equal(admit(l, &lim, "a", 1, 0, &t[3], &retry), E_BUSY); /* three are accepted */
  limits_count(l, "a", "", &accepted, &waiting);
  assert_true(accepted == 3 && waiting == 1);
  assert_int_equal(metric_value(METRIC_REFUSALS, REFUSAL_CONCURRENCY), before + 2);
  assert_int_equal(admit(l, &tight, "a", 1, 0, &more, &retry), E_BUSY); /* another policy: the same counts */
  assert_int_equal(admit(l, &wide, "a", 1, 0, &more, &retry), 0);
  limits_done(l, &more);
  for (int i = 0; i < 3; i++) {
    limits_done(l, &t[i]);
    limits_done(l, &t[i]); /* an empty ticket */
  }
  limits_count(l, "a", "", &accepted, &waiting);
  assert_true(!accepted && !waiting);
  assert_int_equal(admit(l, &tight, "a", 1, 0, &more, &retry), 0);
  limits_done(l, &more);
  limits_close(l);
}

/* A tenant cannot pass for an address, nor one address for another. */
static void test_names(void **state)
{
  struct policy_limits lim = {.concurrency = 1};
  struct limits *l = open_limits(8);
  struct limits_ticket t[3];
  struct err e = {0};
  int64_t retry;

  (void)state;
  assert_int_equal(limits_admit(l, &lim, "10.0.0.1", "x", 1, 0, &t[0], &retry, &e), 0);
  assert_int_equal(limits_admit(l, &lim, "", "10.0.0.1", 1, 0, &t[1], &retry, &e), 0);
  assert_int_equal(limits_admit(l, &lim, "", "10.0.0.2", 1, 0, &t[2], &retry, &e), 0);
  assert_int_equal(limits_admit(l, &lim, "", "10.0.0.2", 1, 0, &t[2], &retry, &e), E_BUSY);
  limits_done(l, &t[0]);
  limits_done(l, &t[1]);
  limits_close(l);
}

/* More names than places: who is bounded is refused rather than let by, who is idle gives his place, who is not bounded never notices. */
static void test_full_table(void **state)
{
  struct policy_limits lim = {.concurrency = 1}, wide = {0};
  struct limits *l = open_limits(1);
  static struct limits_ticket t[TICKETS];
  int64_t retry;
  int in = 0, busy = 0;
  char name[16];

  (void)state;
  for (int i = 0; i < TICKETS; i++) {
    int r;
    snprintf(name, sizeof name, "n%d", i);
    r = admit(l, &lim, name, 1, 0, &t[i], &retry);
    in += !r;
    busy += r == E_BUSY;
  }
  assert_true(in > 0 && busy > 0 && in + busy == TICKETS);
  assert_int_equal(admit(l, &wide, "someone", 1, 0, &(struct limits_ticket){0}, &retry), 0);
  for (int i = 0; i < TICKETS; i++)
    limits_done(l, &t[i]);
  for (int i = 0; i < TICKETS; i++) { /* one after the other there is room for all */
    snprintf(name, sizeof name, "m%d", i);
    assert_int_equal(admit(l, &lim, name, 1, 0, &t[i], &retry), 0);
    limits_done(l, &t[i]);
  }
  limits_close(l);
}

static void *churn(void *arg)
{
  struct policy_limits lim = {.concurrency = 3, .queue = 2};
  struct limits_ticket t;
  struct limits *l = arg;
  struct err e;
  int64_t retry;

  for (int i = 0; i < ROUNDS; i++) {
    e = (struct err){0};
    if (limits_admit(l, &lim, i % 3 ? "a" : "", "10.0.0.1", 1, i, &t, &retry, &e))
      continue;
    if (i % 2)
      limits_start(l, &t);
    limits_done(l, &t);
  }
  return NULL;
}

static void test_threads(void **state)
{
  struct limits *l = open_limits(8);
  pthread_t t[THREADS];
  int accepted, waiting;

  (void)state;
  for (int i = 0; i < THREADS; i++)
    assert_int_equal(pthread_create(&t[i], NULL, churn, l), 0);
  for (int i = 0; i < THREADS; i++)
    pthread_join(t[i], NULL);
  limits_count(l, "a", "", &accepted, &waiting);
  assert_true(!accepted && !waiting);
  limits_count(l, "", "10.0.0.1", &accepted, &waiting);
  assert_true(!accepted && !waiting);
  limits_close(l);
}

/* ---- addresses ---- */

static void peer_is(const char *from, const char *forwarded, const char *trusted, const char *want)
{
  struct sockaddr_in6 six = {.sin6_family = AF_INET6};
  struct sockaddr_in four = {.sin_family = AF_INET};
  struct peer_list l;
  struct err e = {0};
  char got[PEER_TEXT];

  assert_int_equal(peer_read_list(&l, trusted, &e), 0);
  if (inet_pton(AF_INET, from, &four.sin_addr) == 1) {
    peer_name(got, (struct sockaddr *)&four, forwarded, &l);
  } else {
    assert_int_equal(inet_pton(AF_INET6, from, &six.sin6_addr), 1);
    peer_name(got, (struct sockaddr *)&six, forwarded, &l);
  }
  assert_string_equal(got, want);
}

static void test_peers(void **state)
{
  struct peer_list none = {.n = 0};
  char got[PEER_TEXT];

  (void)state;
  peer_is("192.0.2.7", NULL, "", "192.0.2.7");
  peer_is("::ffff:192.0.2.7", NULL, "", "192.0.2.7");
  peer_is("2001:db8:1:2:3:4:5:6", NULL, "", "2001:db8:1:2::/64");
  peer_is("192.0.2.7", "198.51.100.1", "", "192.0.2.7"); /* anybody can write a header */
  peer_is("192.0.2.7", "198.51.100.1", "192.0.2.8", "192.0.2.7");
  peer_is("127.0.0.1", "198.51.100.1", "127.0.0.1", "198.51.100.1");
  peer_is("127.0.0.1", "6.6.6.6, 198.51.100.1", "127.0.0.1", "198.51.100.1"); /* what the client wrote stands first */
  peer_is("127.0.0.1", "6.6.6.6, 198.51.100.1 , 10.9.8.7", "127.0.0.1, 10.0.0.0/8", "198.51.100.1");
  peer_is("127.0.0.1", "10.1.1.1, 10.9.8.7", "127.0.0.1 10.0.0.0/8", "10.1.1.1");
  peer_is("::1", "2001:db8::1", "::1", "2001:db8::/64");
  peer_is("fd00::5", "198.51.100.1", "fd00::/8", "198.51.100.1");
  peer_is("127.0.0.1", "", "127.0.0.1", "127.0.0.1");
  peer_is("127.0.0.1", ",", "127.0.0.1", "127.0.0.1");
  peer_is("127.0.0.1", "6.6.6.6, unknown", "127.0.0.1", "127.0.0.1");
  peer_is("127.0.0.1", "6.6.6.6, 1.2.3.4:99", "127.0.0.1", "127.0.0.1");
  peer_is("192.0.2.130", "1.2.3.4", "192.0.2.128/25", "1.2.3.4");
  peer_is("192.0.2.127", "1.2.3.4", "192.0.2.128/25", "192.0.2.127");
  peer_is("192.0.2.127", "1.2.3.4", "0.0.0.0/0", "1.2.3.4");
  peer_is("2001:db8::1", "1.2.3.4", "0.0.0.0/0", "2001:db8::/64");
  peer_name(got, NULL, "1.2.3.4", &none);
  assert_string_equal(got, "local");
}

static void test_lists(void **state)
{
  static const char *const wrong[] = {"localhost", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/8x", "10.0.0.0/ 8", "::1/129", "10.0.0", "/8",
                                      "1 2", "10.0.0.1;10.0.0.2"};
  struct peer_list l;
  struct err e = {0};

  (void)state;
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    e = (struct err){0};
    if (peer_read_list(&l, wrong[i], &e) != E_ARG)
      fail_msg("\"%s\" was accepted", wrong[i]);
    assert_string_equal(e.field, "trusted_proxies");
  }
  e = (struct err){0};
  assert_int_equal(peer_read_list(&l, " ,::1, 10.0.0.1\t", &e), 0);
  assert_int_equal(l.n, 2);
  assert_int_equal(peer_read_list(&l, "1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 1.1.1.1 "
                                      "1.1.1.1 1.1.1.1 1.1.1.1", &e), E_ARG);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_request_rate), cmocka_unit_test(test_picture_rate), cmocka_unit_test(test_concurrency_and_queue),
      cmocka_unit_test(test_names),        cmocka_unit_test(test_full_table),   cmocka_unit_test(test_threads),
      cmocka_unit_test(test_peers),        cmocka_unit_test(test_lists),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
