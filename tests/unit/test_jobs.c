/*
 * test_jobs.c - native jobs as JSON: each status, the echo of a request, lists, and server-sent events as a reader takes them apart. Threads: none.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "proto/jobs.h"
#include "proto/sse.h"

static const char body[] = "{\"prompt\":\"a\",\"image\":\"Zm9v\",\"metadata\":{\"k\":[1]}}";
static const struct jobs_view queued = {.id = "job_1", .status = JOBS_QUEUED, .created = 5, .queue_position = 3, .wait_s = 1.5, .progress = {0, 20, 0, 2},
                                        .body = body, .len = sizeof body - 1};

static json_t *encode(const struct jobs_view *v)
{
  struct err e = {0};
  struct buf b;
  json_t *j;

  buf_init(&b, 1 << 16);
  assert_int_equal(jobs_encode(&b, v, &e), 0);
  j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
  if (!j)
    fail_msg("no JSON: %s", b.p);
  buf_close(&b);
  return j;
}

static int is_null(const json_t *j, const char *key)
{
  if (!json_object_get(j, key))
    fail_msg("%s is not there", key);
  return json_is_null(json_object_get(j, key));
}

static void test_queued(void **state)
{
  json_t *j = encode(&queued), *q = json_object_get(j, "request");

  (void)state;
  assert_string_equal(json_string_value(json_object_get(j, "object")), "job");
  assert_string_equal(json_string_value(json_object_get(j, "status")), "queued");
  assert_int_equal(json_integer_value(json_object_get(j, "queue_position")), 3);
  assert_true(json_real_value(json_object_get(j, "estimated_wait_s")) == 1.5);
  assert_true(is_null(j, "started") && is_null(j, "finished") && is_null(j, "result") && is_null(j, "error"));
  assert_int_equal(json_integer_value(json_object_get(json_object_get(j, "progress"), "pictures")), 2);
  assert_int_equal(json_integer_value(json_array_get(json_object_get(json_object_get(j, "metadata"), "k"), 0)), 1);
  assert_null(json_object_get(q, "metadata"));
  assert_string_equal(json_string_value(json_object_get(q, "prompt")), "a");
  assert_string_equal(json_string_value(json_object_get(q, "image")), "(4 characters of base64)");
  assert_int_equal(json_object_size(j), 13);
  json_decref(j);
}

static void test_ended(void **state)
{
  struct jobs_view v = queued;
  struct err what = {0};
  json_t *j;

  (void)state;
  v.started = 6, v.finished = 7, v.queue_position = -1, v.wait_s = -1;
  v.status = JOBS_SUCCEEDED;
  v.result = "{\"created\":1}";
  j = encode(&v);
  assert_int_equal(json_integer_value(json_object_get(json_object_get(j, "result"), "created")), 1);
  assert_true(is_null(j, "queue_position") && is_null(j, "estimated_wait_s"));
  assert_int_equal(json_integer_value(json_object_get(j, "finished")), 7);
  json_decref(j);
  v.status = JOBS_FAILED;
  v.result = NULL;
  v.body = NULL;
  err_field(&what, E_NOMEM, "size", "too \"large\"");
  v.err = &what;
  j = encode(&v);
  assert_string_equal(json_string_value(json_object_get(json_object_get(j, "error"), "code")), "out_of_memory");
  assert_string_equal(json_string_value(json_object_get(json_object_get(j, "error"), "param")), "size");
  assert_true(is_null(j, "request") && is_null(j, "metadata"));
  json_decref(j);
  for (int i = 0; i < JOBS_STATUSES; i++)
    assert_int_equal(jobs_status_find(jobs_status_name((enum jobs_status)i)), i);
  assert_int_equal(jobs_status_find("done"), -1);
}

static void test_list(void **state)
{
  struct err e = {0};
  struct buf b;
  json_t *j;

  (void)state;
  buf_init(&b, 1 << 16);
  for (int n = 0; n < 3; n++) {
    b.len = 0;
    assert_int_equal(jobs_list_begin(&b, &e), 0);
    for (int i = 0; i < n; i++)
      assert_int_equal(jobs_list_add(&b, &queued, &e), 0);
    assert_int_equal(jobs_list_end(&b, n == 2, &e), 0);
    j = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
    assert_int_equal(json_array_size(json_object_get(j, "data")), n);
    assert_int_equal(json_is_true(json_object_get(j, "has_more")), n == 2);
    json_decref(j);
  }
  buf_close(&b);
  buf_init(&b, 100); /* the maximum holds */
  assert_int_equal(jobs_list_begin(&b, &e), 0);
  assert_int_equal(jobs_list_add(&b, &queued, &e), E_TOOBIG);
  buf_close(&b);
}

/* Takes one event off *s: its name and id must be these; its data as JSON. */
static json_t *take(const char **s, const char *name, int id)
{
  char head[64];
  json_t *j;

  snprintf(head, sizeof head, "id: %d\nevent: %s\ndata: ", id, name);
  assert_memory_equal(*s, head, strlen(head));
  *s += strlen(head);
  j = json_loadb(*s, strcspn(*s, "\n"), JSON_REJECT_DUPLICATES, NULL);
  assert_non_null(j);
  *s += strcspn(*s, "\n");
  assert_memory_equal(*s, "\n\n", 2);
  *s += 2;
  return j;
}

static void test_events(void **state)
{
  static const struct jobs_progress p = {3, 20, 1, 2};
  struct err e = {0}, what = {0};
  struct buf b;
  const char *s;
  json_t *j;

  (void)state;
  err_set(&what, E_TIMEOUT, "late\nvery");
  buf_init(&b, 1 << 16);
  assert_int_equal(jobs_event_status(&b, 1, &queued, &e), 0);
  assert_int_equal(jobs_event_step(&b, 2, &p, &e), 0);
  assert_int_equal(jobs_event_preview(&b, 3, &p, IMAGE_JPEG, "foo", 3, &e), 0);
  assert_int_equal(jobs_event_result(&b, 4, &queued, &e), 0);
  assert_int_equal(jobs_event_error(&b, 5, &what, &e), 0);
  s = b.p;
  json_decref(take(&s, "status", 1));
  j = take(&s, "step", 2);
  assert_int_equal(json_integer_value(json_object_get(j, "step")), 3);
  json_decref(j);
  j = take(&s, "preview", 3);
  assert_string_equal(json_string_value(json_object_get(j, "b64_json")), "Zm9v");
  assert_string_equal(json_string_value(json_object_get(j, "output_format")), "jpeg");
  assert_int_equal(json_integer_value(json_object_get(j, "picture")), 1);
  json_decref(j);
  json_decref(take(&s, "result", 4));
  j = take(&s, "error", 5);
  assert_string_equal(json_string_value(json_object_get(json_object_get(j, "error"), "code")), "deadline_exceeded");
  json_decref(j);
  assert_int_equal(*s, 0);
  buf_close(&b);
}

static void test_last_id(void **state)
{
  (void)state;
  assert_int_equal(sse_last_id("0"), 0);
  assert_int_equal(sse_last_id("9223372036854775807"), INT64_MAX);
  assert_int_equal(sse_last_id("9223372036854775808"), -1);
  assert_int_equal(sse_last_id("1x"), -1);
  assert_int_equal(sse_last_id("-1"), -1);
  assert_int_equal(sse_last_id(""), -1);
  assert_int_equal(sse_last_id(NULL), -1);
}

int main(void)
{
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_queued), cmocka_unit_test(test_ended), cmocka_unit_test(test_list), cmocka_unit_test(test_events),
                                     cmocka_unit_test(test_last_id)};

  return cmocka_run_group_tests(tests, NULL, NULL);
}
