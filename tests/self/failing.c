/*
 * failing.c - what tests/run must not call a success: with the argument "fail" one test of two fails, with "crash" the
 * second one kills the program, with "none" there are no tests, with "pass" both pass. With "overflow", "leak", "signed" and
 * "race" both pass unless the right sanitizer is built in. Called by tests/self/check only.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

static const char *mode = "fail";

static void passes(void **state)
{
  (void)state;
}

static int shared;
static char *volatile memory;
static volatile int number;

static void *add(void *arg)
{
  (void)arg;
  shared++;
  return NULL;
}

/* Each of these is wrong and goes unnoticed without its sanitizer. */
static void misbehave(void)
{
  pthread_t t;

  memory = malloc(8);
  if (!strcmp(mode, "overflow"))
    memory[8 + number] = 1;
  if (strcmp(mode, "leak"))
    free(memory);
  memory = NULL;
  if (!strcmp(mode, "signed"))
    number = INT_MAX - number + (int)strlen(mode);
  if (!strcmp(mode, "race") && !pthread_create(&t, NULL, add, NULL)) {
    add(NULL);
    pthread_join(t, NULL);
  }
}

static void does_as_told(void **state)
{
  (void)state;
  if (!strcmp(mode, "crash"))
    raise(SIGKILL);
  misbehave();
  assert_string_not_equal(mode, "fail");
}

int main(int argc, char **argv)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(passes), cmocka_unit_test(does_as_told)};

  if (argc > 1)
    mode = argv[1];
  if (!strcmp(mode, "none"))
    return 0;
  return cmocka_run_group_tests_name("self", tests, NULL, NULL);
}
