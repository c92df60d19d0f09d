/*
 * test_metrics.c - the counters behind /metrics: what each family shows, histograms that add up, escaping, and counters that only grow while many
 * threads count. Threads: the tests; and counters and readers of test_threads. The format as a whole is held to Prometheus' own parser in
 * tests/wire/test_metrics.py.
 */
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/metrics.h"

enum { PAGE = 1 << 20, COUNTERS = 4, ROUNDS = 20000 };

static char *page(void)
{
  struct err e = {0};
  struct buf b;
  size_t len;

  buf_init(&b, PAGE);
  assert_int_equal(metrics_encode(&b, &e), 0);
  return buf_take(&b, &len);
}

/* The number behind a series, which must be there exactly once at the start of a line; -1 when it is not there. */
static double series(const char *text, const char *name)
{
  size_t n = strlen(name);
  double found = -1;

  for (const char *p = text; (p = strstr(p, name)); p += n)
    if ((p == text || p[-1] == '\n') && p[n] == ' ') {
      assert_true(found < 0);
      found = strtod(p + n, NULL);
    }
  return found;
}

static void shows(const char *name, double want)
{
  char *text = page();
  double got = series(text, name);

  if (got != want)
    fail_msg("%s is %g, expected %g", name, got, want);
  free(text);
}

static void test_counters_and_gauges(void **state)
{
  (void)state;
  shows("safelight_pictures_total", 0);
  metric_add(METRIC_PICTURES, 0, 3);
  shows("safelight_pictures_total", 3);
  metric_move(METRIC_QUEUED, 0, 5);
  metric_move(METRIC_QUEUED, 0, -7);
  shows("safelight_jobs_queued", -2); /* shown as it is: a gauge that is wrong must be seen */
  metric_set(METRIC_QUEUED, 0, 4);
  shows("safelight_jobs_queued", 4);
  assert_int_equal(metric_value(METRIC_QUEUED, 0), 4);
  metric_set(METRIC_SWAPS, 0, 9);
  shows("safelight_swaps_total", 9);
  metric_add(METRIC_REFUSALS, REFUSAL_CONFLICT, 1);
  shows("safelight_refusals_total{reason=\"conflict\"}", 1);
  shows("safelight_refusals_total{reason=\"bad_request\"}", 0);
  metric_add(METRIC_CANCELLED, CANCEL_SHUTDOWN, 2);
  shows("safelight_jobs_cancelled_total{by=\"shutdown\"}", 2);
  metric_set(METRIC_DURABLE, DURABLE_CANCELLED, 6);
  shows("safelight_durable_jobs{state=\"cancelled\"}", 6);
  metric_set(METRIC_DEVICE_BYTES, metric_on(MEMORY_ACTIVATIONS, 0), 1LL << 40);
  shows("safelight_device_memory_planned_bytes{what=\"activations\",device=\"0\"}", 1099511627776.0);
}

static void test_requests(void **state)
{
  (void)state;
  shows("safelight_requests_total{surface=\"openai\",status=\"200\"}", -1); /* never happened: not shown */
  metric_request(SURFACE_OPENAI, 200, 1000000);
  metric_request(SURFACE_OPENAI, 507, 26000000);
  metric_request(SURFACE_OTHER, 507, 0);
  metric_request(SURFACE_OTHER, 599, 0);
  shows("safelight_requests_total{surface=\"openai\",status=\"200\"}", 1);
  shows("safelight_requests_total{surface=\"openai\",status=\"507\"}", 1);
  shows("safelight_requests_total{surface=\"other\",status=\"507\"}", 1);
  shows("safelight_requests_total{surface=\"other\",status=\"other\"}", 1);
  shows("safelight_request_seconds_bucket{surface=\"openai\",le=\"0.001\"}", 1); /* the bound belongs to its bucket */
  shows("safelight_request_seconds_bucket{surface=\"openai\",le=\"0.025\"}", 1);
  shows("safelight_request_seconds_bucket{surface=\"openai\",le=\"0.05\"}", 2);
  shows("safelight_request_seconds_bucket{surface=\"openai\",le=\"+Inf\"}", 2);
  shows("safelight_request_seconds_count{surface=\"openai\"}", 2);
  shows("safelight_request_seconds_sum{surface=\"openai\"}", 0.027);
}

static void test_histograms(void **state)
{
  struct metric_histogram h;

  (void)state;
  metric_observe(METRIC_BATCH_SIZE, 0, 1);
  metric_observe(METRIC_BATCH_SIZE, 0, 5);
  metric_observe(METRIC_BATCH_SIZE, 0, 1000);
  metric_observe(METRIC_BATCH_SIZE, 0, -4); /* counts as 0 */
  shows("safelight_batch_size_bucket{device=\"0\",le=\"1\"}", 2);
  shows("safelight_batch_size_bucket{device=\"0\",le=\"4\"}", 2);
  shows("safelight_batch_size_bucket{device=\"0\",le=\"6\"}", 3);
  shows("safelight_batch_size_bucket{device=\"0\",le=\"64\"}", 3);
  shows("safelight_batch_size_bucket{device=\"0\",le=\"+Inf\"}", 4);
  shows("safelight_batch_size_sum{device=\"0\"}", 1006);
  metric_look(METRIC_BATCH_SIZE, 0, &h);
  assert_true(h.buckets == 12 && h.bound[4] == 6 && h.sum == 1006 && !h.is_seconds);
  assert_true(h.count[0] == 2 && h.count[3] == 0 && h.count[4] == 1 && h.count[12] == 1); /* of each bucket alone */
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_AUDIT, 4.5);
  metric_observe_ms(METRIC_STAGE_SECONDS, STAGE_AUDIT, 0.0 / 0.0);
  shows("safelight_stage_seconds_bucket{stage=\"audit\",le=\"0.0025\"}", 1);
  shows("safelight_stage_seconds_bucket{stage=\"audit\",le=\"0.005\"}", 2);
  shows("safelight_stage_seconds_sum{stage=\"audit\"}", 0.0045);
  shows("safelight_stage_seconds_count{stage=\"text\"}", 0);
  metric_look(METRIC_STAGE_SECONDS, STAGE_AUDIT, &h);
  assert_true(h.is_seconds && h.sum == 4500000);
  assert_string_equal(metric_label(METRIC_STAGE_SECONDS, STAGE_AUDIT), "audit");
  assert_null(metric_label(METRIC_STAGE_SECONDS, STAGE_COUNT));
  assert_null(metric_label(METRIC_BATCH_SIZE, 0));
  assert_null(metric_label(METRIC_REQUESTS, 0)); /* two labels */
}

/* Shown under the operator's numbers, those that are there alone; looked at, they are one. */
static void test_devices(void **state)
{
  static const int one[] = {0}, numbers[] = {3, 12};
  struct metric_histogram h, both;

  (void)state;
  shows("safelight_pictures_running{device=\"12\"}", -1);
  metric_devices(numbers, 2);
  metric_move(METRIC_RUNNING, metric_on(0, 0), 2);
  metric_move(METRIC_RUNNING, metric_on(0, 1), 3);
  shows("safelight_pictures_running{device=\"3\"}", 2);
  shows("safelight_pictures_running{device=\"12\"}", 3);
  shows("safelight_pictures_running{device=\"0\"}", -1);
  shows("safelight_pictures_running{device=\"\"}", -1); /* a third */
  assert_int_equal(metric_value(METRIC_RUNNING, 0), 5);
  metric_set(METRIC_DEVICE_BYTES, metric_on(MEMORY_WEIGHTS, 0), 7);
  metric_set(METRIC_DEVICE_BYTES, metric_on(MEMORY_WEIGHTS, 1), 8);
  shows("safelight_device_memory_planned_bytes{what=\"weights\",device=\"12\"}", 8);
  assert_int_equal(metric_value(METRIC_DEVICE_BYTES, MEMORY_WEIGHTS), 15);
  assert_string_equal(metric_label(METRIC_DEVICE_BYTES, MEMORY_WEIGHTS), "weights");
  assert_null(metric_label(METRIC_DEVICE_BYTES, MEMORY_COUNT));
  metric_look(METRIC_BATCH_SIZE, 0, &h);
  for (int i = 0; i < 2; i++)
    metric_observe(METRIC_BATCH_SIZE, metric_on(0, i), 64);
  shows("safelight_batch_size_bucket{device=\"12\",le=\"48\"}", 0);
  shows("safelight_batch_size_bucket{device=\"12\",le=\"64\"}", 1);
  shows("safelight_batch_size_sum{device=\"12\"}", 64);
  metric_look(METRIC_BATCH_SIZE, 0, &both);
  assert_true(both.sum == h.sum + 128 && both.count[11] == h.count[11] + 2);
  metric_devices(one, 1);
  metric_move(METRIC_RUNNING, metric_on(0, 0), -2);
}

static void test_names(void **state)
{
  (void)state;
  assert_int_equal(metric_surface_of("/v1/images/generations"), SURFACE_OPENAI);
  assert_int_equal(metric_surface_of("/v1/jobs/17/events"), SURFACE_NATIVE);
  assert_int_equal(metric_surface_of("/sdapi/v1/txt2img"), SURFACE_SDAPI);
  assert_int_equal(metric_surface_of("/metrics"), SURFACE_OPS);
  assert_int_equal(metric_surface_of("/v2"), SURFACE_OTHER);
  assert_int_equal(metric_surface_of(""), SURFACE_OTHER);
  metric_refuse(E_AUTH);
  metric_refuse(E_BUSY);
  metric_refuse(E_INTERNAL);
  metric_refuse(-1000);
  shows("safelight_refusals_total{reason=\"unauthorized\"}", 1);
  shows("safelight_refusals_total{reason=\"queue_full\"}", 0);
}

static void test_process(void **state)
{
  char *first = page(), *second = page();

  (void)state;
  assert_true(series(first, "process_resident_memory_bytes") > 1 << 20);
  assert_true(series(first, "process_virtual_memory_bytes") >= series(first, "process_resident_memory_bytes"));
  assert_true(series(first, "process_open_fds") >= 3);
  assert_true(series(first, "process_cpu_seconds_total") >= 0);
  assert_true(series(first, "process_start_time_seconds") > 1.6e9);
  assert_true(series(first, "process_start_time_seconds") == series(second, "process_start_time_seconds"));
  free(first);
  free(second);
}

static void test_info(void **state)
{
  static const char *const odd[] = {"a", "back\\slash \"quote\"\nline", "b", "\xff\xc3\xa4", NULL}, *const none[] = {NULL};
  struct err e = {0};
  struct buf b;

  (void)state;
  buf_init(&b, 1000);
  assert_int_equal(metrics_encode_head(&b, "x_info", "About x.", "gauge", &e), 0);
  assert_int_equal(metrics_encode_info(&b, "x_info", odd, &e), 0);
  assert_int_equal(metrics_encode_info(&b, "y", none, &e), 0);
  assert_string_equal(b.p, "# HELP x_info About x.\n# TYPE x_info gauge\nx_info{a=\"back\\\\slash \\\"quote\\\"\\nline\",b=\"?\xc3\xa4\"} 1\ny 1\n");
  buf_close(&b);
}

/* A page that does not fit is an error wherever it is cut; the numbers at its end may be shorter or longer by a few digits. */
static void test_no_room(void **state)
{
  char *whole = page();
  size_t len = strlen(whole);

  (void)state;
  assert_true(len > 5000);
  for (size_t max = 0; max < len - 100; max += 97) {
    struct err e = {0};
    struct buf b;
    buf_init(&b, max);
    assert_int_equal(metrics_encode(&b, &e), E_TOOBIG);
    assert_int_equal(e.code, E_TOOBIG);
    buf_close(&b);
  }
  free(whole);
}

static _Atomic int counting;

static void *count(void *arg)
{
  (void)arg;
  for (int i = 0; i < ROUNDS; i++) {
    metric_add(METRIC_STEPS, 0, 2);
    metric_observe(METRIC_STEP_SECONDS, 0, (int64_t)(i % 7) * 1000000);
    metric_move(METRIC_RUNNING, 0, i % 2 ? -1 : 1);
  }
  atomic_fetch_sub(&counting, 1);
  return NULL;
}

/* While others count, no counter goes back, and buckets are never more than the bucket above them. */
static void test_threads(void **state)
{
  static const char *const grows[] = {"safelight_steps_total{device=\"0\"}",
                                      "safelight_step_seconds_bucket{device=\"0\",le=\"0.001\"}",
                                      "safelight_step_seconds_bucket{device=\"0\",le=\"0.002\"}",
                                      "safelight_step_seconds_bucket{device=\"0\",le=\"0.01\"}",
                                      "safelight_step_seconds_count{device=\"0\"}",
                                      "safelight_step_seconds_sum{device=\"0\"}"};
  double last[6] = {0};
  pthread_t t[COUNTERS];

  (void)state;
  atomic_store(&counting, COUNTERS);
  for (int i = 0; i < COUNTERS; i++)
    assert_int_equal(pthread_create(&t[i], NULL, count, NULL), 0);
  do {
    char *text = page();
    double now[6];
    for (int i = 0; i < 6; i++) {
      now[i] = series(text, grows[i]);
      assert_true(now[i] >= last[i]);
      last[i] = now[i];
    }
    assert_true(now[1] <= now[2] && now[2] <= now[3] && now[3] <= now[4]);
    free(text);
  } while (atomic_load(&counting));
  for (int i = 0; i < COUNTERS; i++)
    pthread_join(t[i], NULL);
  shows("safelight_steps_total{device=\"0\"}", 2.0 * COUNTERS * ROUNDS);
  shows("safelight_step_seconds_count{device=\"0\"}", (double)COUNTERS * ROUNDS);
  shows("safelight_pictures_running{device=\"0\"}", 0);
}

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_counters_and_gauges), cmocka_unit_test(test_requests), cmocka_unit_test(test_histograms),
      cmocka_unit_test(test_process),             cmocka_unit_test(test_info),     cmocka_unit_test(test_no_room),
      cmocka_unit_test(test_threads), cmocka_unit_test(test_devices), cmocka_unit_test(test_names),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
