/*
 * job.c - see job.h: the table, the queue, and nothing that knows HTTP or the engine beyond closing a draw.
 */
#include "server/job.h"

#include <stdlib.h>
#include <string.h>

/* DRAWN and DONE jobs leave within milliseconds; this many may do so at once before new ones are refused. */
enum { SPARE_JOBS = 16 };

static const size_t BODY_MAX = (size_t)256 << 20;

int jobs_open(struct jobs *js, int max_waiting, int running, struct err *e)
{
  *js = (struct jobs){.max_waiting = max_waiting, .n = max_waiting + running + SPARE_JOBS, .mean_ms = 1000};
  js->job = calloc((size_t)js->n, sizeof *js->job);
  if (!js->job)
    return err_set(e, E_NOMEM, "out of memory for a queue of %d jobs", max_waiting);
  lock_init(&js->lock, "jobs");
  pthread_cond_init(&js->has_work, NULL);
  pthread_cond_init(&js->has_drawn, NULL);
  js->queue_end = &js->queue;
  js->done_end = &js->done;
  for (int i = js->n; i-- > 0;) {
    js->job[i].jobs = js;
    js->job[i].next = js->free;
    js->free = &js->job[i];
  }
  return 0;
}

void jobs_close(struct jobs *js)
{
  if (!js->job)
    return;
  assert(!js->active);
  free(js->job);
  pthread_cond_destroy(&js->has_work);
  pthread_cond_destroy(&js->has_drawn);
  lock_fini(&js->lock);
  *js = (struct jobs){0};
}

/* ---- lists; the caller holds the lock ---- */

static void list_add(struct job ***end, struct job *j)
{
  j->next = NULL;
  **end = j;
  *end = &j->next;
}

static struct job *list_pop(struct job **head, struct job ***end)
{
  struct job *j = *head;

  if (j) {
    *head = j->next;
    if (!*head)
      *end = head;
    j->next = NULL;
  }
  return j;
}

static void list_remove(struct job **head, struct job ***end, struct job *j)
{
  struct job **p = head;

  while (*p != j)
    p = &(*p)->next;
  *p = j->next;
  if (!*p)
    *end = p;
  j->next = NULL;
}

/* ---- HTTP thread ---- */

int job_reserve(struct jobs *js, struct job **out, struct err *e)
{
  struct job *j = NULL;
  int r = 0;

  lock_take(&js->lock);
  if (js->is_closed)
    r = err_set(e, E_NOTREADY, "the server is stopping");
  else if (js->waiting >= js->max_waiting || !js->free)
    r = err_set(e, E_BUSY, "the queue is full: %d requests are waiting; try again later", js->waiting);
  if (!r) {
    j = js->free;
    js->free = j->next;
    js->waiting++;
    js->active++;
    j->state = JOB_RESERVED;
    j->next = NULL;
    j->serial = ++js->serial;
    atomic_store(&j->stop, 0);
    memset(j->pic, 0, sizeof j->pic);
    j->pixels = NULL;
    j->req.init = j->req.mask = NULL;
    j->target = NULL;
    j->generation = NULL;
    j->stamp = (struct safety_stamp){0};
    j->submitted_ns = 0;
    j->tokens = j->started = j->live = j->drawn = j->steps_done = 0;
    j->times = (struct stage_times){0};
    j->err = (struct err){0};
    buf_init(&j->body, BODY_MAX);
  }
  lock_drop(&js->lock);
  *out = j;
  return r;
}

void job_submit(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert((j->state == JOB_RESERVED || j->state == JOB_PREPARING) && j->wake);
  j->state = JOB_QUEUED;
  if (!j->submitted_ns)
    j->submitted_ns = clock_ns();
  list_add(&js->queue_end, j);
  pthread_cond_signal(&js->has_work);
  lock_drop(&js->lock);
}

void job_prepare(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert((j->state == JOB_RESERVED || j->state == JOB_RUNNING) && j->wake);
  js->waiting += j->state == JOB_RUNNING;
  j->state = JOB_PREPARING;
  if (!j->submitted_ns)
    j->submitted_ns = clock_ns();
  lock_drop(&js->lock);
}

void job_release(struct jobs *js, struct job *j)
{
  for (int i = 0; i < REQUEST_N_MAX; i++)
    draw_close(j->pic[i].draw); /* never started: a started one ends on the device thread */
  free(j->pixels);
  request_close(&j->req);
  buf_close(&j->body);
  memset(j->pic, 0, sizeof j->pic);
  j->pixels = NULL;
  generation_unref(j->generation); /* of a job that ended before it was drawn; retiring is not freeing, so any thread may */
  j->generation = NULL;
  safety_target_unref(j->target);
  j->target = NULL;
  lock_take(&js->lock);
  assert(j->state == JOB_RESERVED || j->state == JOB_DONE);
  js->waiting -= j->state == JOB_RESERVED;
  js->active--;
  j->state = JOB_FREE;
  j->wake = NULL;
  j->next = js->free;
  js->free = j;
  lock_drop(&js->lock);
}

/* ---- device thread ---- */

struct job *job_take(struct jobs *js, int wait)
{
  struct job *j;

  lock_take(&js->lock);
  while (wait && !js->queue && !js->is_over)
    lock_wait(&js->lock, &js->has_work);
  j = list_pop(&js->queue, &js->queue_end);
  if (j) {
    js->waiting--;
    j->state = JOB_RUNNING;
    j->taken_ns = clock_ns();
    j->times.queue = (double)(j->taken_ns - j->submitted_ns) / 1e6;
  }
  lock_drop(&js->lock);
  return j;
}

void job_drawn(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert(j->state == JOB_RUNNING);
  j->state = JOB_DRAWN;
  js->mean_ms += 0.2 * ((double)(clock_ns() - j->taken_ns) / 1e6 - js->mean_ms);
  list_add(&js->done_end, j);
  pthread_cond_signal(&js->has_drawn);
  lock_drop(&js->lock);
}

/* The last thing any thread but HTTP's does with a job. The caller holds no lock. */
static void wake(struct job *j)
{
  j->wake(j->wake_arg);
}

void job_fail(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert((j->state == JOB_RUNNING || j->state == JOB_PREPARING) && j->err.code);
  js->waiting -= j->state == JOB_PREPARING;
  j->state = JOB_DONE;
  lock_drop(&js->lock);
  wake(j);
}

/* ---- encoder thread ---- */

struct job *job_next_drawn(struct jobs *js)
{
  struct job *j;

  lock_take(&js->lock);
  while (!js->done && !js->is_over)
    lock_wait(&js->lock, &js->has_drawn);
  j = list_pop(&js->done, &js->done_end);
  lock_drop(&js->lock);
  return j;
}

void job_finish(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert(j->state == JOB_DRAWN);
  j->state = JOB_DONE;
  lock_drop(&js->lock);
  wake(j);
}

/* ---- any thread ---- */

int job_stop_reason(struct err *e, int code)
{
  if (code == E_CANCEL)
    return err_set(e, code, "the client closed the connection");
  if (code == E_TIMEOUT)
    return err_set(e, code, "the request was not finished within the server's deadline");
  return err_set(e, code, "the server is stopping");
}

/* Ends a waiting job or marks a running one; the caller holds the lock. Returns 1 when the caller must wake it. */
static int stop_locked(struct jobs *js, struct job *j, int code)
{
  int unset = 0;

  HELD(&js->lock);
  if (j->state == JOB_RUNNING || j->state == JOB_PREPARING) {
    atomic_compare_exchange_strong(&j->stop, &unset, code); /* the first reason stays */
    return 0;
  }
  if (j->state != JOB_QUEUED)
    return 0;
  list_remove(&js->queue, &js->queue_end, j);
  js->waiting--;
  job_stop_reason(&j->err, code);
  j->times.queue = (double)(clock_ns() - j->submitted_ns) / 1e6;
  j->state = JOB_DONE;
  return 1;
}

void job_stop(struct jobs *js, struct job *j, uint64_t serial, int code)
{
  int must_wake;

  lock_take(&js->lock);
  must_wake = j->serial == serial && stop_locked(js, j, code);
  lock_drop(&js->lock);
  if (must_wake)
    wake(j);
}

void jobs_refuse(struct jobs *js)
{
  lock_take(&js->lock);
  js->is_closed = 1;
  lock_drop(&js->lock);
}

void jobs_stop_all(struct jobs *js, int code)
{
  for (int i = 0; i < js->n; i++) {
    int must_wake;
    lock_take(&js->lock);
    must_wake = stop_locked(js, &js->job[i], code);
    lock_drop(&js->lock);
    if (must_wake)
      wake(&js->job[i]);
  }
}

void jobs_end(struct jobs *js)
{
  lock_take(&js->lock);
  js->is_closed = js->is_over = 1;
  pthread_cond_broadcast(&js->has_work);
  pthread_cond_broadcast(&js->has_drawn);
  lock_drop(&js->lock);
}

int jobs_active(struct jobs *js)
{
  int n;

  lock_take(&js->lock);
  n = js->active;
  lock_drop(&js->lock);
  return n;
}

int jobs_retry_after(struct jobs *js)
{
  double s;

  lock_take(&js->lock);
  s = (js->waiting + 1) * js->mean_ms / 1000;
  lock_drop(&js->lock);
  return s < 1 ? 1 : s > 60 ? 60 : (int)(s + 0.999);
}
