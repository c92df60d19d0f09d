/*
 * test_retire.c - the last reference on a generation: who gives it back, and when. Called by tests/run; one thread, and those of the test.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/adapter.h"
#include "tests/golden/make_adapter.h"
#include "tests/golden/networks.h"

static const struct adapter_plan plan = {"attn", 4, 0.25f, DELTA_LOWRANK, "unet", 1};

struct shelf {
  struct generation *g;
  int retired;
};

static void put_on_shelf(void *arg, struct generation *g)
{
  struct shelf *s = arg;

  s->g = g;
  s->retired++;
}

static void *let_go(void *arg)
{
  generation_unref(arg);
  return NULL;
}

/* The last reference hands it over, on whatever thread that is; it is whole until generation_free. */
static void test_retire(void **state)
{
  struct shelf shelf = {0};
  struct adapter *a;
  struct err e = {0};
  struct adapter_use use;
  struct generation *g;
  struct nets n;
  pthread_t thread[4];
  size_t count;
  float *x, *y;

  (void)state;
  nets_open(&n, &be_ref, NULL, "sd15", "unet", NULL);
  a = adapter_make(n.g, &plan);
  use = (struct adapter_use){.adapter = a, .weight = 1, .required = 1};
  assert_int_equal(generation_build(&g, n.g, &n.sources, &n.be, &use, 1, FORM_FOLDED, NULL, &e), 0);
  adapter_close(a); /* need not outlive it */
  g->retire = put_on_shelf;
  g->retire_arg = &shelf;
  assert_int_equal(atomic_load(&n.g->refs), 2);
  x = nets_predict(&n, (const struct generation *const[]){g}, NULL, 1, &count);
  for (int i = 0; i < 4; i++)
    assert_int_equal(pthread_create(&thread[i], NULL, let_go, generation_ref(g)), 0);
  for (int i = 0; i < 4; i++)
    assert_int_equal(pthread_join(thread[i], NULL), 0);
  assert_int_equal(shelf.retired, 0);
  assert_int_equal(pthread_create(&thread[0], NULL, let_go, g), 0);
  assert_int_equal(pthread_join(thread[0], NULL), 0);
  assert_int_equal(shelf.retired, 1);
  assert_true(shelf.g == g);
  y = nets_predict(&n, (const struct generation *const[]){g}, NULL, 1, &count);
  assert_memory_equal(x, y, count * sizeof *x);
  test_free(x);
  test_free(y);
  generation_free(g);
  assert_int_equal(shelf.retired, 1);
  assert_int_equal(atomic_load(&n.g->refs), 1);
  nets_close(&n);
}

static int cleanup(void **state)
{
  (void)state;
  nets_cleanup();
  return 0;
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_retire)};

  return cmocka_run_group_tests(tests, NULL, cleanup);
}
