/*
 * test_worker.c - what the devices are together: the first failure is the worker's, names its device, and stays. Loading and drawing are tested over the
 * wire. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cmocka.h>

#include "server/worker.h"

struct rig {
  struct config cfg;
  struct jobs jobs;
  struct worker worker;
  int event_fd;
};

static void rig_open(struct rig *r, const char *devices)
{
  struct device_list list;
  struct err e = {0};

  config_defaults(&r->cfg);
  assert_int_equal(devices_read(&list, devices, &e), 0);
  assert_int_equal(jobs_open(&r->jobs, 4, 2, list.n, &e), 0);
  r->event_fd = eventfd(0, EFD_NONBLOCK);
  assert_true(r->event_fd >= 0);
  worker_init(&r->worker, &r->cfg, &list, &r->jobs, r->event_fd);
}

static void rig_close(struct rig *r)
{
  worker_close(&r->worker);
  jobs_close(&r->jobs);
  close(r->event_fd);
}

/* How often main was told. */
static int told(const struct rig *r)
{
  uint64_t n = 0;

  return read(r->event_fd, &n, sizeof n) == sizeof n ? (int)n : 0;
}

static void test_who_is_who(void **state)
{
  static struct rig r;

  (void)state;
  rig_open(&r, "4,9");
  assert_int_equal(r.worker.devices, 2);
  for (int i = 0; i < 2; i++) {
    const struct device *d = &r.worker.device[i];
    assert_true(d->worker == &r.worker && d->at == i && d->number == (i ? 9 : 4) && d->desk == &r.jobs.desk[i]);
  }
  assert_int_equal(worker_state(&r.worker), WORKER_LOADING);
  assert_null(worker_serving(&r.worker));
  worker_loaded(&r.worker, &r.worker.device[1]); /* one of two */
  assert_int_equal(worker_state(&r.worker), WORKER_LOADING);
  assert_int_equal(told(&r), 0);
  rig_close(&r);
}

static void test_first_failure_stays(void **state)
{
  static struct rig r;
  struct err why = {0}, later = {0}, e = {0};
  struct job *j;

  (void)state;
  rig_open(&r, "4,9");
  err_set(&why, E_DEVICE, "the GPU: unspecified launch failure");
  err_set(&later, E_NOTREADY, "the server is stopping");
  worker_fail(&r.worker, &r.worker.device[1], &why);
  assert_int_equal(told(&r), 1);
  worker_fail(&r.worker, &r.worker.device[0], &later);
  worker_loaded(&r.worker, &r.worker.device[0]);
  assert_int_equal(told(&r), 0);
  assert_int_equal(worker_state(&r.worker), WORKER_FAILED);
  assert_int_equal(r.worker.why.code, E_DEVICE);
  assert_string_equal(r.worker.why.msg, "device 9: the GPU: unspecified launch failure");
  assert_int_equal(job_reserve(&r.jobs, &j, &e), E_NOTREADY); /* no new work */
  rig_close(&r);
}

/* Who has one device is told which only where it is the device's fault. */
static void test_one_device(void **state)
{
  static const struct {
    int code;
    const char *says;
  } cases[] = {{E_FILE, "no such folder"}, {E_DEVICE, "device 0: no such folder"}};

  (void)state;
  for (size_t i = 0; i < 2; i++) {
    static struct rig r;
    struct err why = {0};

    rig_open(&r, "0");
    err_set(&why, cases[i].code, "no such folder");
    worker_fail(&r.worker, &r.worker.device[0], &why);
    assert_string_equal(r.worker.why.msg, cases[i].says);
    rig_close(&r);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_who_is_who), cmocka_unit_test(test_first_failure_stays), cmocka_unit_test(test_one_device)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
