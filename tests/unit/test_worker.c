/*
 * test_worker.c - what the devices are together: the first failure is the worker's, names its device, and stays. And what the option `activations` comes to
 * on a processor. Loading and drawing are tested over the wire. Threads: none.
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

#include "server/activations.h"
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

/* A backend that computes in anything but what was asked for is refused, and the sentence says what it does. bf16 is had where auto is bf16. */
static void test_activations(void **state)
{
  static const struct be_ops *const ops[] = {&be_cpu, &be_ref};
  static const char *const words[] = {"auto", "bf16", "fp16", "fp32"};

  (void)state;
  for (int i = 0; i < 2; i++) {
    int has_bf16 = 0;

    for (int k = 0; k < 4; k++) {
      struct be_config cfg = {.threads = 1};
      struct err e = {0};
      struct be be;
      int r;

      activations_ask(&cfg, words[k]);
      assert_int_equal(be_open(&be, ops[i], &cfg, &e), 0);
      r = activations_check(&be, words[k], &e);
      if (k == 0)
        has_bf16 = be.act == DT_BF16;
      assert_int_equal(r, k == 2 || (k == 1 && !has_bf16) ? E_ARG : 0);
      assert_true(k != 3 || be.act == DT_F32);
      assert_true(!r || (!strcmp(e.field, "activations") && strstr(e.msg, words[k]) && strstr(e.msg, has_bf16 ? "auto is bf16" : "auto is fp32")));
      be_close(&be);
    }
    assert_true(ops[i] == &be_cpu || !has_bf16);
  }
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_who_is_who), cmocka_unit_test(test_first_failure_stays), cmocka_unit_test(test_one_device),
                                     cmocka_unit_test(test_activations)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
