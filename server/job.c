/*
 * job.c - see job.h: the table, the queues between threads (but for those at a device's desk: job_desk.c), and nothing that knows HTTP or the engine
 * beyond closing a draw. job_look.c is for onlookers.
 */
#include "server/job.h"

#include <stdlib.h>
#include <string.h>

#include "server/metrics.h"

/* DRAWN and DONE jobs leave within milliseconds; this many may do so at once before new ones are refused. */
enum { SPARE_JOBS = 16 };

/* A job is due after this many times its own service time (fair.h). */
static const double STRETCH = 4;
static const size_t BODY_MAX = (size_t)256 << 20;

/* ---- blobs ---- */

struct blob *blob_ref(struct blob *b)
{
  atomic_fetch_add(&b->refs, 1);
  return b;
}

void blob_unref(struct blob *b)
{
  if (b && atomic_fetch_sub(&b->refs, 1) == 1)
    free(b);
}

/* ---- the table ---- */

int jobs_open(struct jobs *js, int max_waiting, int running, int devices, struct err *e)
{
  assert(devices >= 1 && devices <= DEVICES_MAX);
  *js = (struct jobs){.max_waiting = max_waiting, .n = max_waiting + running * devices + SPARE_JOBS, .devices = devices};
  lock_init(&js->lock, "jobs");
  for (int i = 0; i < devices; i++)
    desk_open(&js->desk[i], running);
  pthread_cond_init(&js->has_parcel, NULL);
  pthread_cond_init(&js->has_reading, NULL);
  js->job = calloc((size_t)js->n, sizeof *js->job);
  js->shares.share = calloc((size_t)js->n, sizeof *js->shares.share);
  js->shares.n = js->n;
  if (!js->job || !js->shares.share) {
    jobs_close(js);
    return err_set(e, E_NOMEM, "out of memory for a queue of %d jobs", max_waiting);
  }
  metric_set(METRIC_QUEUE_CAPACITY, 0, max_waiting);
  js->reading_end = &js->reading;
  js->queue_end = &js->queue;
  js->parcel_end = &js->parcel;
  for (int i = js->n; i-- > 0;) {
    js->job[i].jobs = js;
    js->job[i].next = js->free;
    js->free = &js->job[i];
  }
  return 0;
}

void jobs_close(struct jobs *js)
{
  if (!js->n)
    return;
  assert(!js->active);
  free(js->job);
  free(js->shares.share);
  for (int i = 0; i < js->devices; i++)
    desk_close(&js->desk[i]);
  pthread_cond_destroy(&js->has_parcel);
  pthread_cond_destroy(&js->has_reading);
  lock_fini(&js->lock);
  *js = (struct jobs){0};
}

static void waiting_moves(struct jobs *js, int by)
{
  HELD(&js->lock);
  js->waiting += by;
  metric_move(METRIC_QUEUED, 0, by);
}

static void queue_remove(struct jobs *js, struct job *j)
{
  struct job **p = &js->queue;

  while (*p != j)
    p = &(*p)->next;
  *p = j->next;
  if (!*p)
    js->queue_end = p;
  j->next = NULL;
}

/* Everything that is not what the owner will fill in. The caller holds the lock. */
static void job_clear(struct job *j)
{
  atomic_store(&j->stop, 0);
  atomic_store(&j->cut, CUT_NOTHING);
  j->is_cut = 0;
  j->ending = CUT_NOTHING;
  memset(j->pic, 0, sizeof j->pic);
  memset(j->preview, 0, sizeof j->preview);
  j->surface = NULL;
  j->is_durable = j->wants_file = 0;
  j->caller[0] = j->base[0] = 0;
  j->weight = 1;
  j->priority = 0;
  j->ticket = (struct limits_ticket){0};
  j->share = NULL;
  j->steps = 0;
  j->work = 0;
  j->pixels = j->preview_rgb = NULL;
  j->req.init = j->req.mask = NULL;
  j->req.whole = (struct request_whole){0};
  first_init(&j->first);
  buf_init(&j->upload, BODY_MAX);
  j->target = NULL;
  j->device = 0;
  j->generation = NULL;
  j->stamp = (struct safety_stamp){0};
  j->submitted_ns = j->taken_ns = 0;
  j->tokens = j->started = j->live = 0;
  j->preview_ns = 0;
  j->previews_planned = j->previews = j->is_preview_recorded = 0;
  atomic_store(&j->drawn, 0);
  atomic_store(&j->steps_done, 0);
  atomic_store(&j->wants_preview, 0);
  atomic_store(&j->is_previewing, 0);
  j->listeners = NULL;
  j->read = j->taken = NULL;
  j->times = (struct stage_times){0};
  j->err = (struct err){0};
  j->parcel = (struct parcel){.job = j};
  j->preview_parcel = (struct parcel){.job = j, .is_preview = 1};
  buf_init(&j->body, BODY_MAX);
  for (int i = 0; i < REQUEST_N_MAX; i++) {
    buf_init(&j->file[i], BODY_MAX);
    j->pic[i].job = j;
    j->pic[i].item.pic = j->pic[i].preview_item.pic = &j->pic[i];
    j->pic[i].preview_item.work = STAGE_PREVIEW;
  }
}

int job_reserve(struct jobs *js, struct job **out, struct err *e)
{
  struct job *j = NULL;
  int r = 0;

  lock_take(&js->lock);
  if (js->is_closed)
    r = err_set(e, E_NOTREADY, "the server is stopping");
  else if (js->waiting >= js->max_waiting || !js->free)
    r = err_set(e, E_BUSY, "the queue is full: %d requests are waiting; try again later", js->waiting);
  if (r == E_BUSY)
    metric_add(METRIC_REFUSALS, REFUSAL_QUEUE_FULL, 1);
  if (!r) {
    j = js->free;
    js->free = j->next;
    waiting_moves(js, 1);
    js->active++;
    j->state = JOB_RESERVED;
    j->next = NULL;
    j->serial = ++js->serial;
    job_clear(j);
  }
  lock_drop(&js->lock);
  *out = j;
  return r;
}

/* The first time that a job leaves its owner: it counts for its tenant, and it is known when it is due. */
static void enter(struct jobs *js, struct job *j)
{
  HELD(&js->lock);
  if (j->submitted_ns)
    return;
  j->submitted_ns = clock_ns();
  j->share = share_enter(&js->shares, j->caller, j->weight);
  j->share->priority = j->priority;
  j->due_ns = j->submitted_ns + (int64_t)(STRETCH * js->ns_per_work * j->work * j->steps * j->req.n);
}

void job_read(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert(j->state == JOB_RESERVED && j->read);
  j->state = JOB_READING;
  j->next = NULL;
  *js->reading_end = j;
  js->reading_end = &j->next;
  pthread_cond_signal(&js->has_reading);
  lock_drop(&js->lock);
}

void job_submit(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert((j->state == JOB_RESERVED || j->state == JOB_PREPARING) && j->wake);
  j->state = JOB_QUEUED;
  enter(js, j);
  j->next = NULL;
  *js->queue_end = j;
  js->queue_end = &j->next;
  desks_wake(js);
  lock_drop(&js->lock);
}

/* The job is its device's no more. Pictures that were started have left the desk one by one (pic_return). */
static void leave_device(struct jobs *js, struct job *j)
{
  HELD(&js->lock);
  js->running--;
  js->desk[j->device].pictures -= j->req.n - j->started;
}

void job_prepare(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert((j->state == JOB_RESERVED || j->state == JOB_RUNNING) && j->wake);
  waiting_moves(js, j->state == JOB_RUNNING);
  if (j->state == JOB_RUNNING)
    leave_device(js, j);
  j->state = JOB_PREPARING;
  enter(js, j);
  lock_drop(&js->lock);
}

/* The caller holds the lock. */
static void tell(struct job *j)
{
  for (struct listener *l = j->listeners; l; l = l->next)
    l->wake(l);
}

/* What the job holds beside its entry. Nobody else can reach it any more but by job_look and job_listen, which see its state. */
static void free_contents(struct job *j)
{
  for (int i = 0; i < REQUEST_N_MAX; i++) {
    draw_close(j->pic[i].draw); /* never started: a started one ends on the stage thread */
    j->pic[i].draw = NULL;
    buf_close(&j->file[i]);
  }
  free(j->pixels);
  free(j->preview_rgb);
  request_close(&j->req);
  first_close(&j->first);
  buf_close(&j->upload);
  buf_close(&j->body);
  j->pixels = j->preview_rgb = NULL;
  generation_unref(j->generation); /* of a job that ended before it was drawn; retiring is not freeing, so any thread may */
  j->generation = NULL;
  safety_target_unref(j->target);
  j->target = NULL;
}

void job_release(struct jobs *js, struct job *j)
{
  struct blob *gone[JOB_PREVIEWS];

  free_contents(j);
  if (js->limits)
    limits_done(js->limits, &j->ticket);
  lock_take(&js->lock);
  assert(j->state == JOB_RESERVED || j->state == JOB_DONE);
  tell(j);
  while (j->listeners) {
    struct listener *l = j->listeners;
    j->listeners = l->next;
    l->job = NULL;
  }
  memcpy(gone, j->preview, sizeof gone);
  memset(j->preview, 0, sizeof j->preview);
  share_leave(j->share);
  j->share = NULL;
  waiting_moves(js, -(j->state == JOB_RESERVED));
  js->active--;
  j->state = JOB_FREE;
  j->wake = NULL;
  j->next = js->free;
  js->free = j;
  lock_drop(&js->lock);
  for (int i = 0; i < JOB_PREVIEWS; i++)
    blob_unref(gone[i]);
}

/* ---- reader thread ---- */

struct job *reading_next(struct jobs *js)
{
  struct job *j;

  lock_take(&js->lock);
  while (!js->reading && !js->is_over)
    lock_wait(&js->lock, &js->has_reading);
  j = js->reading;
  if (j) {
    js->reading = j->next;
    if (!js->reading)
      js->reading_end = &js->reading;
    j->next = NULL;
  }
  lock_drop(&js->lock);
  return j;
}

void job_was_read(struct jobs *js, struct job *j)
{
  int is_left;

  lock_take(&js->lock);
  assert(j->state == JOB_READING);
  j->state = JOB_RESERVED;
  is_left = !j->read;
  if (!is_left)
    j->read(j->wake_arg);
  lock_drop(&js->lock);
  if (is_left)
    job_release(js, j);
}

/* ---- device thread ---- */

/* Who of the waiting is next, NULL when none waits. The caller holds the lock. */
static struct job *next_waiting(struct jobs *js)
{
  struct job *found = NULL;
  struct turn best = {0};

  for (struct job *j = js->queue; j; j = j->next) {
    struct turn t = {.share = j->share, .due_ns = j->due_ns, .last = j->serial};
    if (!found || fair_is_before(&t, &best)) {
      found = j;
      best = t;
    }
  }
  return found;
}

struct job *job_take(struct jobs *js, int device)
{
  struct job *j = NULL;

  lock_take(&js->lock);
  if (js->queue && desk_may_take(js, device))
    j = next_waiting(js);
  if (j) {
    j->share->turns++;
    queue_remove(js, j);
    waiting_moves(js, -1);
    js->running++;
    js->desk[device].pictures += j->req.n;
    j->device = device;
    j->state = JOB_RUNNING;
    j->taken_ns = clock_ns();
    j->times.queue = (double)(j->taken_ns - j->submitted_ns) / 1e6;
    tell(j);
    if (js->queue)
      desks_wake(js);
  }
  lock_drop(&js->lock);
  if (j && js->limits)
    limits_start(js->limits, &j->ticket);
  return j;
}

void jobs_stepped(struct jobs *js, struct picture *const *p, int n, int64_t ns)
{
  double work = 0, rate;

  lock_take(&js->lock);
  for (int i = 0; i < n; i++) {
    struct job *j = p[i]->job;
    work += j->work;
    share_use(j->share, j->work);
    tell(j);
  }
  rate = (double)ns / work;
  js->ns_per_work = js->ns_per_work > 0 ? js->ns_per_work + 0.05 * (rate - js->ns_per_work) : rate;
  lock_drop(&js->lock);
}

static void parcel_add(struct jobs *js, struct parcel *p)
{
  HELD(&js->lock);
  p->next = NULL;
  *js->parcel_end = p;
  js->parcel_end = &p->next;
  pthread_cond_signal(&js->has_parcel);
}

void job_drawn(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  assert(j->state == JOB_RUNNING);
  j->state = JOB_DRAWN;
  leave_device(js, j);
  parcel_add(js, &j->parcel);
  lock_drop(&js->lock);
}

/* Who is to hear that a job is DONE: read when it becomes so, and called without the lock. */
struct waker {
  void (*wake)(void *arg);
  void *arg;
};

/* The job is its owner's again; the caller holds the lock, and calls the waker when it has dropped it. */
static struct waker make_done(struct jobs *js, struct job *j)
{
  HELD(&js->lock);
  j->state = JOB_DONE;
  tell(j);
  return (struct waker){j->wake, j->wake_arg};
}

static void call(struct waker w)
{
  if (w.wake)
    w.wake(w.arg);
}

void job_fail(struct jobs *js, struct job *j)
{
  struct waker w;

  lock_take(&js->lock);
  assert((j->state == JOB_RUNNING || j->state == JOB_PREPARING) && j->err.code);
  waiting_moves(js, -(j->state == JOB_PREPARING));
  if (j->state == JOB_RUNNING)
    leave_device(js, j);
  w = make_done(js, j);
  lock_drop(&js->lock);
  call(w);
}

/* ---- stage and encoder thread ---- */

void job_send_preview(struct jobs *js, struct job *j)
{
  lock_take(&js->lock);
  parcel_add(js, &j->preview_parcel);
  lock_drop(&js->lock);
}

struct parcel *parcel_next(struct jobs *js)
{
  struct parcel *p;

  lock_take(&js->lock);
  while (!js->parcel && !js->is_over)
    lock_wait(&js->lock, &js->has_parcel);
  p = js->parcel;
  if (p) {
    js->parcel = p->next;
    if (!js->parcel)
      js->parcel_end = &js->parcel;
  }
  lock_drop(&js->lock);
  return p;
}

void job_add_preview(struct jobs *js, struct job *j, struct blob *b)
{
  struct blob *old = NULL;

  lock_take(&js->lock);
  if (b) {
    struct blob **at = &j->preview[++j->previews % JOB_PREVIEWS];
    b->number = j->previews;
    old = *at;
    *at = b;
    tell(j);
  }
  lock_drop(&js->lock);
  blob_unref(old);
  atomic_store(&j->is_previewing, 0);
}

void job_finish(struct jobs *js, struct job *j)
{
  struct waker w;

  lock_take(&js->lock);
  assert(j->state == JOB_DRAWN);
  w = make_done(js, j);
  lock_drop(&js->lock);
  call(w);
}

/* ---- any thread ---- */

int job_stop_reason(struct err *e, int code)
{
  if (code == E_CANCEL)
    return err_set(e, code, "the request was cancelled");
  if (code == E_GONE)
    return err_set(e, code, "the client closed the connection");
  if (code == E_TIMEOUT)
    return err_set(e, code, "the request was not finished within the server's deadline");
  return err_set(e, code, "the server is stopping");
}

static void count_stop(int code)
{
  static const struct {
    int code;
    enum metric_cancel by;
  } known[] = {{E_GONE, CANCEL_DISCONNECT}, {E_CANCEL, CANCEL_CLIENT}, {E_TIMEOUT, CANCEL_DEADLINE}, {E_NOTREADY, CANCEL_SHUTDOWN}};

  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].code == code)
      metric_add(METRIC_CANCELLED, (int)known[i].by, 1);
}

/* Ends a waiting job or marks a running one; the caller holds the lock, and calls the waker after. */
static struct waker stop_locked(struct jobs *js, struct job *j, int code)
{
  int unset = 0;

  HELD(&js->lock);
  if ((j->state == JOB_RUNNING || j->state == JOB_PREPARING || j->state == JOB_READING) && atomic_compare_exchange_strong(&j->stop, &unset, code))
    count_stop(code); /* the first reason stays */
  if (j->state != JOB_QUEUED)
    return (struct waker){0};
  count_stop(code);
  queue_remove(js, j);
  waiting_moves(js, -1);
  job_stop_reason(&j->err, code);
  j->times.queue = (double)(clock_ns() - j->submitted_ns) / 1e6;
  return make_done(js, j);
}

void job_stop(struct jobs *js, struct job *j, uint64_t serial, int code)
{
  struct waker w = {0};

  lock_take(&js->lock);
  if (j->serial == serial)
    w = stop_locked(js, j, code);
  lock_drop(&js->lock);
  call(w);
}

static void release_itself(void *arg)
{
  struct job *j = arg;

  job_release(j->jobs, j);
}

int job_disown(struct jobs *js, struct job *j)
{
  struct waker w = {0};
  int is_alive;

  lock_take(&js->lock);
  is_alive = j->state > JOB_RESERVED && j->state < JOB_DONE;
  if (is_alive) {
    j->read = NULL;
    j->wake = release_itself;
    j->wake_arg = j;
    w = stop_locked(js, j, E_GONE);
  }
  lock_drop(&js->lock);
  call(w);
  return is_alive;
}

/* What waits ends now, without a picture; the caller holds the lock, and calls the waker after. */
static struct waker cut_locked(struct jobs *js, struct job *j, enum job_cut how)
{
  HELD(&js->lock);
  if (j->state < JOB_DRAWN && j->ending < how)
    j->ending = how;
  if (j->state != JOB_RUNNING)
    return stop_locked(js, j, E_CANCEL);
  if (atomic_load(&j->cut) < (int)how) /* no other thread makes it more: the device thread takes it */
    atomic_store(&j->cut, how);
  return (struct waker){0};
}

void job_cut(struct jobs *js, struct job *j, uint64_t serial, enum job_cut how)
{
  struct waker w = {0};

  lock_take(&js->lock);
  if (j->serial == serial)
    w = cut_locked(js, j, how);
  lock_drop(&js->lock);
  call(w);
}

int jobs_cut_caller(struct jobs *js, const char *caller, const struct surface *surface)
{
  int cut = 0;

  for (int i = 0; i < js->n; i++) {
    struct job *j = &js->job[i];
    struct waker w = {0};

    lock_take(&js->lock);
    if (j->state > JOB_RESERVED && j->state < JOB_DRAWN && j->surface == surface && !strcmp(j->caller, caller)) {
      w = cut_locked(js, j, CUT_JOB);
      cut++;
    }
    lock_drop(&js->lock);
    call(w);
  }
  return cut;
}

void jobs_stop_all(struct jobs *js, int code)
{
  for (int i = 0; i < js->n; i++) {
    struct waker w;
    lock_take(&js->lock);
    w = stop_locked(js, &js->job[i], code);
    lock_drop(&js->lock);
    call(w);
  }
}

/* ---- the end ---- */

void jobs_refuse(struct jobs *js)
{
  lock_take(&js->lock);
  js->is_closed = 1;
  lock_drop(&js->lock);
}

int jobs_are_refused(struct jobs *js)
{
  int are;

  lock_take(&js->lock);
  are = js->is_closed;
  lock_drop(&js->lock);
  return are;
}

void jobs_end(struct jobs *js)
{
  lock_take(&js->lock);
  js->is_closed = js->is_over = 1;
  for (int i = 0; i < js->devices; i++) {
    pthread_cond_broadcast(&js->desk[i].has_work);
    pthread_cond_broadcast(&js->desk[i].has_stage);
  }
  pthread_cond_broadcast(&js->has_parcel);
  pthread_cond_broadcast(&js->has_reading);
  lock_drop(&js->lock);
}
