/*
 * job_help.h - a job of one picture in the queue that counts how often it is woken, for test_job*.c. Threads: the test's; it may be woken on any.
 */
#ifndef SAFELIGHT_TESTS_UNIT_JOB_HELP_H
#define SAFELIGHT_TESTS_UNIT_JOB_HELP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "server/job.h"

static void count_wake(void *arg)
{
  atomic_fetch_add((_Atomic int *)arg, 1);
}

/* woken is the caller's, for as long as the job is alive. */
static struct job *submit(struct jobs *js, _Atomic int *woken)
{
  struct err e = {0};
  struct job *j;

  assert_int_equal(job_reserve(js, &j, &e), 0);
  j->req.n = 1;
  j->wake = count_wake;
  j->wake_arg = woken;
  job_submit(js, j);
  return j;
}

#endif
