/*
 * test_job.c - the job table: bounds, order, every way a job can end, one wake each, and late stops that meet a stranger. test_job_storm.c has all its
 * threads at once. Threads: the tests'.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "server/job_list.h"
#include "server/metrics.h"
#include "tests/unit/job_help.h"

static void test_bound(void **state)
{
  struct jobs js;
  struct job *j[5];
  struct err e = {0};

  (void)state;
  assert_int_equal(jobs_open(&js, 3, 1, 1, &e), 0);
  for (int i = 0; i < 3; i++)
    assert_int_equal(job_reserve(&js, &j[i], &e), 0);
  assert_int_equal(job_reserve(&js, &j[3], &e), E_BUSY);
  assert_null(j[3]);
  assert_int_equal(jobs_count(&js).active, 3);
  job_release(&js, j[1]);
  e.code = 0;
  assert_int_equal(job_reserve(&js, &j[1], &e), 0);
  jobs_refuse(&js);
  job_release(&js, j[0]);
  assert_int_equal(job_reserve(&js, &j[0], &e), E_NOTREADY);
  job_release(&js, j[1]);
  job_release(&js, j[2]);
  assert_int_equal(jobs_count(&js).active, 0);
  jobs_close(&js);
}

/* An entry knows nothing of the job that had it before: who does not say what he wants gets the ordinary. */
static void test_entry_is_clean(void **state)
{
  struct jobs js;
  struct job *j, *again;
  struct err e = {0};

  (void)state;
  assert_int_equal(jobs_open(&js, 1, 1, 1, &e), 0);
  assert_int_equal(job_reserve(&js, &j, &e), 0);
  j->wants_file = j->is_durable = j->priority = j->steps = 1;
  atomic_store(&j->wants_preview, 1);
  snprintf(j->caller, sizeof j->caller, "somebody");
  job_release(&js, j);
  assert_int_equal(job_reserve(&js, &again, &e), 0);
  assert_ptr_equal(again, j);
  assert_true(!j->wants_file && !j->is_durable && !j->priority && !j->steps && !atomic_load(&j->wants_preview) && !*j->caller);
  job_release(&js, j);
  jobs_close(&js);
}

static void test_order_and_ends(void **state)
{
  struct jobs js;
  struct err e = {0};
  struct job *a, *b, *c;
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 1, &e), 0);
  a = submit(&js, &woken);
  b = submit(&js, &woken);
  c = submit(&js, &woken);
  assert_ptr_equal(job_take(&js, 0), a); /* the oldest first */
  assert_ptr_equal(job_take(&js, 0), b);
  assert_int_equal(a->state, JOB_RUNNING);
  job_drawn(&js, a);
  job_stop(&js, a, a->serial, E_CANCEL); /* drawn: too late */
  err_set(&b->err, E_INTERNAL, "broken");
  job_fail(&js, b);
  assert_int_equal(woken, 1);
  assert_ptr_equal(parcel_next(&js), &a->parcel);
  job_finish(&js, a);
  assert_int_equal(woken, 2);
  assert_int_equal(a->err.code, 0);
  assert_int_equal(b->err.code, E_INTERNAL);
  job_stop(&js, c, c->serial, E_TIMEOUT); /* waiting: ends at once */
  assert_int_equal(woken, 3);
  assert_int_equal(c->state, JOB_DONE);
  assert_int_equal(c->err.code, E_TIMEOUT);
  assert_null(job_take(&js, 0));
  job_stop(&js, c, c->serial, E_CANCEL); /* twice is once */
  assert_int_equal(woken, 3);
  job_release(&js, a);
  job_release(&js, b);
  job_release(&js, c);
  jobs_end(&js);
  assert_null(job_take(&js, 0));
  assert_int_equal(jobs_wait(&js, 0, 1), 0); /* returns although it may wait */
  assert_null(parcel_next(&js));
  assert_null(stage_next(&js, 0));
  jobs_close(&js);
}

static void test_stop_running(void **state)
{
  struct jobs js;
  struct err e = {0};
  struct job *a;
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 2, 1, 1, &e), 0);
  a = submit(&js, &woken);
  assert_ptr_equal(job_take(&js, 0), a);
  job_stop(&js, a, a->serial + 1, E_CANCEL); /* meant for another use of the entry */
  assert_int_equal(a->stop, 0);
  job_stop(&js, a, a->serial, E_TIMEOUT);
  job_stop(&js, a, a->serial, E_CANCEL);
  assert_int_equal(a->stop, E_TIMEOUT); /* the first reason stays */
  assert_int_equal(woken, 0);          /* only the device thread ends it */
  job_stop_reason(&a->err, a->stop);
  job_fail(&js, a);
  assert_int_equal(woken, 1);
  job_release(&js, a);
  jobs_close(&js);
}

static void count_read(void *arg)
{
  struct job *j = arg;

  assert_true(lock_is_held(&j->jobs->lock));
  atomic_fetch_add(&j->drawn, 1);
}

static struct job *begin_reading(struct jobs *js)
{
  struct err e = {0};
  struct job *j;

  assert_int_equal(job_reserve(js, &j, &e), 0);
  j->req.n = 1;
  j->read = count_read;
  j->wake_arg = j;
  snprintf(j->caller, sizeof j->caller, "peer");
  assert_int_equal(buf_add_str(&j->upload, "body", &e), 0);
  job_read(js, j);
  return j;
}

/* A job goes to the reader and comes back; meanwhile it counts, may be stopped or left, and is nobody's to look at. */
static void test_reading(void **state)
{
  struct job *a, *b, *c;
  struct job_glance *list;
  struct job_view v;
  struct jobs js;
  struct err e = {0};
  uint64_t serial;
  int n;

  (void)state;
  assert_int_equal(jobs_open(&js, 3, 1, 1, &e), 0);
  a = begin_reading(&js);
  b = begin_reading(&js);
  c = begin_reading(&js);
  assert_int_equal(jobs_count(&js).waiting, 3);
  assert_int_equal(job_look(&js, a, a->serial, 0, 0, &v), 0);
  assert_null(job_find_caller(&js, "peer", NULL, &serial));
  assert_int_equal(jobs_list(&js, &list, &n, &e), 0);
  assert_int_equal(n, 0);
  free(list);
  assert_ptr_equal(reading_next(&js), a);
  assert_ptr_equal(reading_next(&js), b);
  job_was_read(&js, a);
  assert_true(a->state == JOB_RESERVED && atomic_load(&a->drawn) == 1 && !atomic_load(&a->stop));
  job_release(&js, a);
  job_stop(&js, b, b->serial, E_TIMEOUT); /* its owner is told when the reader lets go */
  assert_true(b->state == JOB_READING && atomic_load(&b->stop) == E_TIMEOUT);
  job_was_read(&js, b);
  assert_true(b->state == JOB_RESERVED && atomic_load(&b->drawn) == 1);
  job_release(&js, b);
  assert_int_equal(job_disown(&js, c), 1); /* whose owner has left frees itself, and the owner hears nothing */
  assert_ptr_equal(reading_next(&js), c);
  assert_int_equal(jobs_count(&js).active, 1);
  job_was_read(&js, c);
  assert_int_equal(atomic_load(&c->drawn), 0);
  assert_int_equal(jobs_count(&js).active, 0);
  a = begin_reading(&js);
  assert_int_equal(jobs_cut_caller(&js, "peer", NULL), 1);
  jobs_end(&js);
  assert_ptr_equal(reading_next(&js), a); /* what is there is handed back first */
  job_was_read(&js, a);
  job_release(&js, a);
  assert_null(reading_next(&js));
  jobs_close(&js);
}

/* What runs is told how to end, and the more of two words counts; what waits ends; what is drawn stays. Each stop is counted for who did it. */
static void test_cut(void **state)
{
  int64_t clients = metric_value(METRIC_CANCELLED, CANCEL_CLIENT), gone = metric_value(METRIC_CANCELLED, CANCEL_DISCONNECT);
  struct job *a, *b, *c;
  struct jobs js;
  struct err e = {0};
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 4, 1, 1, &e), 0);
  a = submit(&js, &woken);
  b = submit(&js, &woken);
  c = submit(&js, &woken);
  snprintf(a->caller, sizeof a->caller, "peer");
  assert_ptr_equal(job_take(&js, 0), a);
  job_cut(&js, a, a->serial + 1, CUT_JOB); /* meant for another use of the entry */
  assert_int_equal(atomic_load(&a->cut), CUT_NOTHING);
  job_cut(&js, a, a->serial, CUT_PICTURES);
  assert_int_equal(jobs_cut_caller(&js, "peer", NULL), 1);
  job_cut(&js, a, a->serial, CUT_PICTURES);
  assert_true(atomic_load(&a->cut) == CUT_JOB && !atomic_load(&a->stop) && a->state == JOB_RUNNING);
  job_cut(&js, b, b->serial, CUT_JOB);
  assert_true(b->state == JOB_DONE && b->err.code == E_CANCEL && woken == 1);
  assert_int_equal(metric_value(METRIC_CANCELLED, CANCEL_CLIENT), clients + 1);
  assert_int_equal(job_disown(&js, c), 1);
  assert_int_equal(metric_value(METRIC_CANCELLED, CANCEL_DISCONNECT), gone + 1);
  job_drawn(&js, a);
  assert_int_equal(jobs_cut_caller(&js, "peer", NULL), 0);
  assert_ptr_equal(parcel_next(&js), &a->parcel);
  job_finish(&js, a);
  job_release(&js, a);
  a = submit(&js, &woken);
  assert_int_equal(atomic_load(&a->cut), CUT_NOTHING); /* the entry's last user is forgotten */
  job_stop(&js, a, a->serial, E_CANCEL);
  assert_int_equal(metric_value(METRIC_CANCELLED, CANCEL_CLIENT), clients + 2);
  job_release(&js, a);
  job_release(&js, b);
  jobs_close(&js);
}

/* Removing from head, middle and end keeps the queue whole. */
static void test_queue_removal(void **state)
{
  struct jobs js;
  struct err e = {0};
  struct job *j[6];
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 1, &e), 0);
  for (int i = 0; i < 5; i++)
    j[i] = submit(&js, &woken);
  job_stop(&js, j[0], j[0]->serial, E_CANCEL);
  job_stop(&js, j[2], j[2]->serial, E_CANCEL);
  job_stop(&js, j[4], j[4]->serial, E_CANCEL);
  j[5] = submit(&js, &woken);
  assert_ptr_equal(job_take(&js, 0), j[1]);
  assert_ptr_equal(job_take(&js, 0), j[3]);
  assert_ptr_equal(job_take(&js, 0), j[5]);
  assert_null(job_take(&js, 0));
  for (int i = 1; i < 6; i += 2) {
    job_stop_reason(&j[i]->err, E_CANCEL);
    job_fail(&js, j[i]);
  }
  for (int i = 0; i < 6; i++)
    job_release(&js, j[i]);
  assert_int_equal(woken, 6);
  assert_int_equal(js.waiting, 0);
  jobs_close(&js);
}

static void test_retry_after(void **state)
{
  struct jobs js;
  struct job *j;
  struct err e = {0};
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 1, &e), 0);
  assert_int_equal(jobs_retry_after(&js), 1);
  j = submit(&js, &woken);
  j->work = 1;
  j->steps = 10;
  js.ns_per_work = 500e6; /* 5 s for the job, whose half is what a place takes on average */
  assert_int_equal(jobs_retry_after(&js), 3);
  js.ns_per_work = 1e12;
  assert_int_equal(jobs_retry_after(&js), 60);
  job_stop(&js, j, j->serial, E_CANCEL);
  job_release(&js, j);
  jobs_close(&js);
}

/* ---- looking and listening ---- */

struct ear {
  struct listener l;
  int heard;
};

static void hear(struct listener *l)
{
  ((struct ear *)l)->heard++;
}

static struct blob *blob(int picture)
{
  struct blob *b = calloc(1, sizeof *b + 1);

  assert_non_null(b);
  b->refs = 1;
  b->picture = picture;
  b->len = 1;
  return b;
}

static void test_look(void **state)
{
  struct ear ear = {.l.wake = hear};
  struct job *a, *b, *found;
  struct job_view v;
  struct jobs js;
  struct err e = {0};
  _Atomic int woken = 0;
  uint64_t serial, first;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 1, &e), 0);
  a = submit(&js, &woken);
  b = submit(&js, &woken);
  snprintf(a->id, sizeof a->id, "one");
  snprintf(b->id, sizeof b->id, "two");
  snprintf(b->caller, sizeof b->caller, "peer");
  a->work = b->work = 1;
  a->steps = b->steps = 4;
  js.ns_per_work = 1e9;
  assert_null(job_find(&js, "two", &serial)); /* the id is what a client chose */
  a->is_durable = b->is_durable = 1;
  found = job_find(&js, "two", &serial);
  assert_ptr_equal(found, b);
  assert_int_equal(serial, b->serial);
  assert_ptr_equal(job_find_caller(&js, "peer", NULL, &serial), b);
  assert_null(job_find(&js, "three", &serial));
  assert_int_equal(job_look(&js, b, b->serial, 0, 0, &v), 1);
  assert_int_equal(v.position, 2);
  assert_true(v.wait_s > 7.9 && v.wait_s < 8.1);
  assert_int_equal(job_look(&js, b, b->serial + 1, 0, 0, &v), 0); /* somebody else's */

  assert_int_equal(job_listen(&js, a, a->serial, &ear.l), 1);
  assert_ptr_equal(job_take(&js, 0), a);
  assert_int_equal(ear.heard, 1);
  assert_int_equal(job_look(&js, a, a->serial, 0, 1, &v), 1);
  assert_null(v.preview);
  assert_int_equal(a->wants_preview, 1);
  for (int k = 1; k <= JOB_PREVIEWS + 2; k++) {
    job_add_preview(&js, a, blob(k));
    assert_int_equal(ear.heard, 1 + k);
  }
  assert_int_equal(job_look(&js, a, a->serial, 0, 0, &v), 1);
  assert_int_equal(v.preview->number, 3); /* the oldest that is kept */
  blob_unref(v.preview);
  assert_int_equal(job_look(&js, a, a->serial, JOB_PREVIEWS + 1, 0, &v), 1);
  assert_int_equal(v.preview->number, JOB_PREVIEWS + 2);
  assert_int_equal(v.preview->picture, JOB_PREVIEWS + 2);
  job_drawn(&js, a);
  assert_ptr_equal(parcel_next(&js), &a->parcel);
  job_finish(&js, a);
  first = a->serial;
  job_release(&js, a);
  assert_null(ear.l.job); /* its ear was taken off */
  assert_int_equal(job_listen(&js, a, first, &ear.l), 0);
  job_unlisten(&js, &ear.l);
  blob_unref(v.preview); /* outlives its job */

  assert_int_equal(jobs_cut_caller(&js, "nobody", NULL), 0);
  assert_int_equal(jobs_cut_caller(&js, "peer", NULL), 1);
  assert_int_equal(b->state, JOB_DONE);
  job_release(&js, b);
  jobs_close(&js);
}

static void test_list(void **state)
{
  struct job_glance *list;
  struct job *j[4];
  struct jobs js;
  struct err e = {0};
  _Atomic int woken = 0;
  int n;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 1, &e), 0);
  assert_int_equal(jobs_list(&js, &list, &n, &e), 0);
  assert_int_equal(n, 0);
  free(list);
  for (int i = 0; i < 3; i++) {
    j[i] = submit(&js, &woken);
    snprintf(j[i]->id, sizeof j[i]->id, "job-%d", i);
    j[i]->work = 1;
    j[i]->req.steps = 8;
    j[i]->steps = 4; /* it starts from another picture: half of what was asked for is to be done */
    j[i]->req.width = 64 * (i + 1);
  }
  assert_int_equal(job_reserve(&js, &j[3], &e), 0); /* its owner is still at it: not shown */
  js.ns_per_work = 1e9;
  assert_ptr_equal(job_take(&js, 0), j[0]);
  j[0]->steps_done = 3;
  j[2]->due_ns = j[1]->due_ns - 1; /* the younger one is due first */
  assert_int_equal(jobs_list(&js, &list, &n, &e), 0);
  assert_int_equal(n, 3);
  assert_string_equal(list[0].id, "job-0");
  assert_string_equal(list[1].id, "job-2");
  assert_string_equal(list[2].id, "job-1");
  assert_true(list[0].state == JOB_RUNNING && list[0].position == 0 && list[0].steps_done == 3 && list[0].steps == 4 && list[0].width == 64);
  assert_true(list[1].state == JOB_QUEUED && list[1].position == 1 && list[2].position == 2);
  for (int i = 0; i < 3; i++) { /* 1 step, then 4, then 4 more, of a second each */
    double want = 1 + 4 * i;
    assert_true(list[i].wait_s > want - 0.01 && list[i].wait_s < want + 0.01);
    assert_true(list[i].age_s >= 0);
  }
  free(list);
  err_set(&j[0]->err, E_INTERNAL, "broken");
  job_fail(&js, j[0]); /* DONE: its answer is being sent */
  assert_int_equal(jobs_list(&js, &list, &n, &e), 0);
  assert_int_equal(n, 2);
  free(list);
  for (int i = 1; i < 3; i++)
    job_stop(&js, j[i], j[i]->serial, E_CANCEL);
  for (int i = 0; i < 4; i++)
    job_release(&js, j[i]);
  jobs_close(&js);
}

/* Who leaves a job behind leaves nothing behind. */
static void test_disown(void **state)
{
  struct jobs js;
  struct err e = {0};
  struct job *a, *b;
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 1, &e), 0);
  a = submit(&js, &woken);
  b = submit(&js, &woken);
  assert_ptr_equal(job_take(&js, 0), a);
  assert_int_equal(job_disown(&js, b), 1); /* waits: ends now */
  assert_int_equal(jobs_count(&js).active, 1);
  assert_int_equal(job_disown(&js, a), 1);
  assert_int_equal(a->stop, E_GONE);
  job_stop_reason(&a->err, a->stop);
  job_fail(&js, a);
  assert_int_equal(jobs_count(&js).active, 0);
  a = submit(&js, &woken);
  assert_ptr_equal(job_take(&js, 0), a);
  err_set(&a->err, E_INTERNAL, "broken");
  job_fail(&js, a);
  assert_int_equal(job_disown(&js, a), 0); /* DONE: the owner was told and releases it */
  assert_int_equal(woken, 1);
  job_release(&js, a);
  jobs_close(&js);
}

static enum job_cut seen_ending(struct jobs *js, struct job *j)
{
  struct job_view v;

  assert_int_equal(job_look(js, j, j->serial, 0, 0, &v), 1);
  return v.ending;
}

/* The job's next picture, as the device thread starts it and the stage thread hands it back. */
static void start_picture(struct jobs *js, struct job *j)
{
  struct picture *p = &j->pic[j->started++];

  pic_send(js, p, STAGE_START);
  assert_ptr_equal(stage_next(js, 0)->pic, p);
}

/* Onlookers see that pictures were skipped until one is started that was not, and that a job was interrupted until it is done. */
static void test_ending_is_seen(void **state)
{
  struct jobs js;
  struct err e = {0};
  struct job *j;
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 4, 4, 1, &e), 0);
  j = submit(&js, &woken);
  j->req.n = 4;
  assert_ptr_equal(job_take(&js, 0), j);
  start_picture(&js, j);
  assert_int_equal(seen_ending(&js, j), CUT_NOTHING);
  job_cut(&js, j, j->serial, CUT_PICTURES);
  start_picture(&js, j); /* it is cut too: the device thread has not obeyed yet */
  assert_int_equal(seen_ending(&js, j), CUT_PICTURES);
  atomic_store(&j->cut, CUT_NOTHING);
  start_picture(&js, j);
  assert_int_equal(seen_ending(&js, j), CUT_NOTHING);
  job_cut(&js, j, j->serial, CUT_JOB);
  job_cut(&js, j, j->serial, CUT_PICTURES);
  atomic_store(&j->cut, CUT_NOTHING);
  start_picture(&js, j); /* it was on its way already */
  assert_int_equal(seen_ending(&js, j), CUT_JOB);
  for (int i = 0; i < 4; i++)
    pic_return(&js, &j->pic[i]);
  job_drawn(&js, j);
  assert_int_equal(seen_ending(&js, j), CUT_JOB);
  assert_ptr_equal(parcel_next(&js), &j->parcel);
  job_finish(&js, j);
  job_release(&js, j);
  assert_int_equal(job_reserve(&js, &j, &e), 0);
  assert_int_equal(j->ending, CUT_NOTHING); /* the entry's last user is forgotten */
  job_release(&js, j);
  jobs_close(&js);
}

/* ---- several devices ---- */

/* The job's pictures as the device and the stage thread see them come and go; none was ever drawn. */
static void end_pictures(struct jobs *js, struct job *j, int n)
{
  for (int i = 0; i < n; i++) {
    pic_send(js, &j->pic[j->started++], STAGE_CLOSE);
    assert_ptr_equal(stage_next(js, j->device)->pic, &j->pic[j->started - 1]);
    pic_return(js, &j->pic[j->started - 1]);
  }
}

/* A device whose memory holds less than the operator wished takes no more than that, and holds up nobody when it is full. */
static void test_small_device(void **state)
{
  struct job *j[5];
  struct jobs js;
  struct err e = {0};
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 3, 2, &e), 0);
  assert_int_equal(jobs_count(&js).room, 6);
  jobs_set_room(&js, 0, 1);
  assert_int_equal(jobs_count(&js).room, 4);
  for (int i = 0; i < 5; i++) {
    assert_int_equal(job_reserve(&js, &j[i], &e), 0);
    j[i]->req.n = 1;
    j[i]->wake = count_wake;
    j[i]->wake_arg = &woken;
    job_submit(&js, j[i]);
  }
  assert_ptr_equal(job_take(&js, 0), j[0]);
  for (int i = 1; i < 4; i++)
    assert_ptr_equal(job_take(&js, 1), j[i]); /* 1, 2 and 3 against 1, and that one is full */
  end_pictures(&js, j[0], 1);
  assert_ptr_equal(job_take(&js, 0), j[4]); /* 0 against 3 */
  for (int i = 0; i < 5; i++) {
    if (i)
      end_pictures(&js, j[i], 1);
    job_drawn(&js, j[i]);
    assert_ptr_equal(parcel_next(&js), &j[i]->parcel);
    job_finish(&js, j[i]);
    job_release(&js, j[i]);
  }
  assert_int_equal(woken, 5);
  jobs_close(&js);
}

/* One queue, two takers: the one with fewer pictures takes, whoever asks first. */
static void test_two_devices(void **state)
{
  struct job *j[8], *taken;
  struct jobs js;
  struct err e = {0};
  _Atomic int woken = 0;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 3, 2, &e), 0);
  for (int i = 0; i < 8; i++) {
    assert_int_equal(job_reserve(&js, &j[i], &e), 0);
    j[i]->req.n = i == 1 ? 2 : 1;
    j[i]->wake = count_wake;
    j[i]->wake_arg = &woken;
  }
  for (int i = 0; i < 7; i++)
    job_submit(&js, j[i]);
  assert_ptr_equal(job_take(&js, 0), j[0]);
  assert_null(job_take(&js, 0)); /* 1 against 0: the other one's turn */
  assert_int_equal(jobs_wait(&js, 1, 1), 1);
  assert_ptr_equal(job_take(&js, 1), j[1]);
  assert_true(j[0]->device == 0 && j[1]->device == 1);
  assert_null(job_take(&js, 1)); /* 2 against 1: a job counts with all its pictures */
  assert_ptr_equal(job_take(&js, 0), j[2]);
  assert_ptr_equal(job_take(&js, 1), j[3]); /* 2 against 2: who asks */
  assert_null(job_take(&js, 1));
  assert_ptr_equal(job_take(&js, 0), j[4]); /* 3 against 3, and both are full: only who has room of his own asks */

  end_pictures(&js, j[1], 1);
  assert_int_equal(jobs_wait(&js, 1, 0), 1);
  assert_ptr_equal(pics_returned(&js, 1), &j[1]->pic[0]);
  assert_null(pics_returned(&js, 1));
  assert_null(pics_returned(&js, 0)); /* not its own */
  assert_null(job_take(&js, 0));      /* 3 against 2 */
  taken = job_take(&js, 1);
  assert_ptr_equal(taken, j[5]);
  job_prepare(&js, taken); /* it has to be composed for first, and takes its picture along */
  assert_null(job_take(&js, 0));
  assert_ptr_equal(job_take(&js, 1), j[6]);
  job_submit(&js, j[5]);

  jobs_leave(&js, 1); /* it failed with what it has: the other one takes what waits */
  err_set(&j[6]->err, E_DEVICE, "broken");
  job_fail(&js, j[6]);
  assert_null(job_take(&js, 1));
  assert_ptr_equal(job_take(&js, 0), j[5]);
  job_submit(&js, j[7]);
  jobs_leave(&js, 0); /* both: what waits is taken, to fail */
  assert_ptr_equal(job_take(&js, 1), j[7]);

  for (int i = 0; i < 8; i++)
    if (j[i]->state == JOB_RUNNING) {
      end_pictures(&js, j[i], i == 0 ? 0 : j[i]->req.n - j[i]->started); /* the first one ends with a picture that was never started */
      job_drawn(&js, j[i]);
      assert_ptr_equal(parcel_next(&js), &j[i]->parcel);
      job_finish(&js, j[i]);
    }
  assert_true(js.desk[0].pictures == 0 && js.desk[1].pictures == 0);
  for (int i = 0; i < 8; i++)
    job_release(&js, j[i]);
  assert_int_equal(woken, 8);
  jobs_close(&js);
}

/* What is ahead of a job is shared by the devices; its own steps are not. */
static void test_two_devices_look(void **state)
{
  struct job *a, *b;
  struct job_glance *list;
  struct job_view v;
  struct jobs js;
  struct err e = {0};
  _Atomic int woken = 0;
  int n;

  (void)state;
  assert_int_equal(jobs_open(&js, 8, 1, 2, &e), 0);
  a = submit(&js, &woken);
  b = submit(&js, &woken);
  a->work = b->work = 1;
  a->steps = b->steps = a->req.steps = b->req.steps = 4;
  js.ns_per_work = 1e9;
  assert_int_equal(job_look(&js, b, b->serial, 0, 0, &v), 1);
  assert_true(v.wait_s > 5.9 && v.wait_s < 6.1);
  assert_int_equal(jobs_list(&js, &list, &n, &e), 0);
  assert_true(n == 2 && list[1].wait_s > 5.9 && list[1].wait_s < 6.1);
  free(list);
  assert_int_equal(jobs_retry_after(&js), 2); /* 8 s of work, 2 devices, 2 jobs and the new one */
  for (int i = 0; i < 2; i++) {
    struct job *j = i ? b : a;
    job_stop(&js, j, j->serial, E_CANCEL);
    job_release(&js, j);
  }
  jobs_close(&js);
}

/* ---- many threads ---- */

int main(void)
{
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_bound),           cmocka_unit_test(test_entry_is_clean), cmocka_unit_test(test_order_and_ends),
      cmocka_unit_test(test_stop_running),    cmocka_unit_test(test_reading),        cmocka_unit_test(test_cut),
      cmocka_unit_test(test_ending_is_seen),  cmocka_unit_test(test_queue_removal),  cmocka_unit_test(test_retry_after),
      cmocka_unit_test(test_look),            cmocka_unit_test(test_list),           cmocka_unit_test(test_disown),
      cmocka_unit_test(test_two_devices),     cmocka_unit_test(test_small_device),   cmocka_unit_test(test_two_devices_look),
  };

  return cmocka_run_group_tests(tests, NULL, NULL);
}
