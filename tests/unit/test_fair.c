/*
 * test_fair.c - who comes next: weights between tenants, due times within one, and nobody who waits for ever.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "server/fair.h"

enum { MOST = 16 };

static struct share room[MOST];

static struct shares clean(void)
{
  memset(room, 0, sizeof room);
  return (struct shares){.share = room, .n = MOST};
}

/* One turn at a time for `turns`; how many each got. */
static void play(struct turn *t, int n, int turns, int *got)
{
  static uint64_t tick;
  int chosen;

  memset(got, 0, (size_t)n * sizeof *got);
  for (int i = 0; i < turns; i++) {
    assert_int_equal(fair_choose(t, n, 1, &chosen), 1);
    got[chosen]++;
    t[chosen].last = ++tick;
    share_use(t[chosen].share, t[chosen].work);
  }
}

static void test_weights(void **state)
{
  struct shares s = clean();
  struct share *a = share_enter(&s, "a", 1), *b = share_enter(&s, "b", 3);
  struct turn t[5] = {{.share = b, .work = 1}};
  int got[5];

  (void)state;
  for (int i = 1; i < 5; i++) /* a sends four jobs and is no better off for it */
    t[i] = (struct turn){.share = a, .work = 1, .due_ns = -i};
  play(t, 5, 400, got);
  assert_in_range(got[0], 299, 301);
  for (int i = 1; i < 5; i++)
    assert_true(got[i] > 0);
}

static void test_priority(void **state)
{
  struct shares s = clean();
  struct turn t[3] = {{.share = share_enter(&s, "low", 100), .work = 1}, {.share = share_enter(&s, "high", 0.01), .work = 1},
                      {.share = share_enter(&s, "also high", 0.01), .work = 1}};
  int got[3], chosen[3];

  (void)state;
  t[1].share->priority = t[2].share->priority = 1;
  play(t, 3, 100, got);
  assert_true(!got[0] && got[1] == 50 && got[2] == 50); /* equals share; weight does not outdo priority */
  assert_int_equal(fair_choose(t, 3, 3, chosen), 3);
  assert_int_equal(chosen[2], 0); /* what the others leave is his */
}

static void test_work_counts(void **state)
{
  struct shares s = clean();
  struct turn t[2] = {{.share = share_enter(&s, "large", 1), .work = 9}, {.share = share_enter(&s, "small", 1), .work = 1}};
  int got[2];

  (void)state;
  play(t, 2, 1000, got);
  assert_in_range(got[0], 98, 102); /* the same work, not the same turns */
}

/* A pause is not saved up, and who comes new does not get all that others had before. */
static void test_coming_back(void **state)
{
  struct shares s = clean();
  struct share *a = share_enter(&s, "a", 1), *b;

  (void)state;
  share_use(a, 1000);
  b = share_enter(&s, "b", 1);
  assert_true(b->used == a->used);
  share_leave(b);
  share_use(a, 500);
  assert_ptr_equal(share_enter(&s, "b", 1), b);
  assert_true(b->used == a->used);
  share_use(b, 100);
  share_leave(b);
  assert_ptr_equal(share_enter(&s, "b", 1), b); /* leaving for a moment wipes nothing out */
  assert_true(b->used == a->used + 100);
  share_leave(NULL);
}

static void test_due_first(void **state)
{
  struct shares s = clean();
  struct share *a = share_enter(&s, "", 1);
  struct turn t[3] = {{.share = a, .work = 1, .due_ns = 30}, {.share = a, .work = 1, .due_ns = 10}, {.share = a, .work = 1, .due_ns = 20}};
  int got[3];

  (void)state;
  play(t, 3, 100, got);
  assert_int_equal(got[1], 75); /* three of four turns; the fourth is for who waits */
  assert_in_range(got[0], 12, 13);
  assert_in_range(got[2], 12, 13);
}

static void test_batch(void **state)
{
  struct shares s = clean();
  struct share *a = share_enter(&s, "a", 1), *b = share_enter(&s, "b", 1);
  struct turn t[6];
  int chosen[6], of_b = 0, seen = 0;

  (void)state;
  for (int i = 0; i < 6; i++)
    t[i] = (struct turn){.share = i == 5 ? b : a, .work = 1, .due_ns = i};
  assert_int_equal(fair_choose(t, 6, 2, chosen), 2);
  for (int i = 0; i < 2; i++)
    of_b += chosen[i] == 5;
  assert_int_equal(of_b, 1); /* half of the batch is b's */
  assert_int_equal(fair_choose(t, 6, 9, chosen), 6);
  for (int i = 0; i < 6; i++)
    seen |= 1 << chosen[i];
  assert_int_equal(seen, 63); /* each once */
  assert_true(a->ahead == 0 && b->ahead == 0);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_weights),   cmocka_unit_test(test_work_counts), cmocka_unit_test(test_coming_back),
      cmocka_unit_test(test_due_first), cmocka_unit_test(test_batch),       cmocka_unit_test(test_priority),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
