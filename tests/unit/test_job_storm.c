/*
 * test_job_storm.c - the job table under all its threads at once: device, stage, encoder and stopper threads, thousands of jobs, one wake each.
 * Threads: the tests', and those that they start.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/job_help.h"

enum { STORM = 4000, STORM_ROOM = 2 };

static struct jobs storm;
static _Atomic int storm_taken[2]; /* by device */
static struct job *target;
static pthread_mutex_t target_mu = PTHREAD_MUTEX_INITIALIZER;
static uint64_t target_serial;
static _Atomic int storm_over;

/* The loop of device.c, with jobs of one picture that is closed at once. arg: its counter in storm_taken. */
static void *storm_device(void *arg)
{
  int at = (int)((_Atomic int *)arg - storm_taken), alive = 0;
  struct picture *next;
  struct job *j;

  do {
    for (struct picture *p = pics_returned(&storm, at); p; p = next, alive--) {
      next = p->next;
      job_drawn(&storm, p->job);
    }
    while (alive < STORM_ROOM && (j = job_take(&storm, at))) {
      int stop = atomic_load(&j->stop);
      atomic_fetch_add(&storm_taken[at], 1);
      if (stop) {
        job_stop_reason(&j->err, stop);
        job_fail(&storm, j);
        continue;
      }
      alive++;
      pic_send(&storm, &j->pic[j->started++], STAGE_CLOSE);
    }
  } while (jobs_wait(&storm, at, alive < STORM_ROOM) || alive);
  return arg;
}

static void *storm_stage(void *arg)
{
  struct stage_item *item;

  while ((item = stage_next(&storm, (int)((_Atomic int *)arg - storm_taken))))
    pic_return(&storm, item->pic);
  return arg;
}

static void *storm_encoder(void *arg)
{
  struct parcel *p;

  while ((p = parcel_next(&storm)))
    job_finish(&storm, p->job);
  return arg;
}

static void *storm_stopper(void *arg)
{
  while (!atomic_load(&storm_over)) {
    struct job *j;
    uint64_t serial;
    pthread_mutex_lock(&target_mu);
    j = target;
    serial = target_serial;
    pthread_mutex_unlock(&target_mu);
    if (j)
      job_stop(&storm, j, serial, E_CANCEL);
  }
  return arg;
}

/* Every job is woken exactly once, whoever wins: device, encoder or stopper. No device sleeps while a job waits for it: else this never ends. */
static void run_storm(int devices)
{
  static _Atomic int woken[STORM];
  struct job *window[4] = {0};
  int at[4] = {0}, ended = 0;
  pthread_t t[6];
  struct err e = {0};
  int threads = 0;

  target = NULL;
  storm_over = 0;
  assert_int_equal(jobs_open(&storm, 4, STORM_ROOM, devices, &e), 0);
  for (int i = 0; i < devices; i++) {
    storm_taken[i] = 0;
    assert_int_equal(thread_start(&t[threads++], "device", storm_device, &storm_taken[i], &e), 0);
    assert_int_equal(thread_start(&t[threads++], "stage", storm_stage, &storm_taken[i], &e), 0);
  }
  assert_int_equal(thread_start(&t[threads++], "encoder", storm_encoder, NULL, &e), 0);
  assert_int_equal(thread_start(&t[threads++], "stopper", storm_stopper, NULL, &e), 0);
  for (int i = 0; i < STORM; i++) {
    int k = i % 4;
    woken[i] = 0;
    if (window[k]) {
      while (!atomic_load(&woken[at[k]]))
        sched_yield();
      ended += window[k]->err.code == E_CANCEL;
      job_release(&storm, window[k]);
    }
    window[k] = submit(&storm, &woken[i]);
    at[k] = i;
    pthread_mutex_lock(&target_mu);
    target = window[k];
    target_serial = window[k]->serial;
    pthread_mutex_unlock(&target_mu);
  }
  for (int k = 0; k < 4; k++) {
    while (!atomic_load(&woken[at[k]]))
      sched_yield();
    job_release(&storm, window[k]);
  }
  atomic_store(&storm_over, 1);
  assert_int_equal(jobs_count(&storm).active, 0);
  jobs_end(&storm);
  for (int i = 0; i < threads; i++)
    pthread_join(t[i], NULL);
  for (int i = 0; i < STORM; i++)
    assert_int_equal(woken[i], 1);
  print_message("%d of %d jobs were stopped", ended, STORM);
  for (int i = 0; i < devices; i++) {
    print_message("%s %d", i ? " and" : "; taken:", storm_taken[i]);
    assert_true(storm_taken[i] > 0 && storm.desk[i].pictures == 0);
  }
  print_message("\n");
  jobs_close(&storm);
}

static void test_storm(void **state)
{
  (void)state;
  run_storm(1);
}

static void test_storm_two(void **state)
{
  (void)state;
  run_storm(2);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_storm), cmocka_unit_test(test_storm_two)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
