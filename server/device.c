/*
 * device.c - see device.h. How it loads is in device_load.c.
 *
 * Errors of the engine come in three classes: the request's (that job fails), a resource's (E_NOMEM: that job fails, the others
 * live) and the device's (E_DEVICE: everything on it fails with 503, the other devices finish what was accepted, main drains and exits for a restart).
 */
#include "server/device.h"

#include <stdio.h>
#include <stdlib.h>

#include "server/log.h"
#include "server/metrics.h"
#include "server/worker.h"

/* Looks are free, previews are not: one that nobody planned comes no sooner after another. */
static const int64_t PREVIEW_EVERY_NS = 300000000;

/* ---- drawing ---- */

/* The first thing that went wrong with a picture of this job ends the job. */
static void note_failure(struct device *d, struct job *j, const struct err *why)
{
  if (!j->err.code)
    j->err = *why;
  if (why->code == E_DEVICE) {
    jobs_leave(d->jobs, d->at);
    worker_fail(d->worker, d, why);
  }
}

/* Interrupt and skip: the pictures that were started end as they are; after an interrupt no other is. */
static void obey_cut(struct job *j)
{
  int cut = atomic_exchange(&j->cut, CUT_NOTHING);

  for (int i = 0; cut && i < j->started; i++)
    j->pic[i].is_cut = 1;
  j->is_cut |= cut == CUT_JOB;
}

/* Whether it was cut, and had more to do then. One that was stopped was counted when it was. */
static int is_short(const struct job *j)
{
  int finished = 0;

  for (int i = 0; i < j->req.n; i++)
    finished += j->pic[i].has_pixels && !j->pic[i].cut_at;
  return !j->err.code && finished < j->req.n;
}

/* No picture of the job is alive, and none is to be started: what they have in common on the device goes with the last of them. */
static void job_end(struct device *d, struct job *j)
{
  for (int i = j->started; i < j->req.n; i++) {
    draw_close(j->pic[i].draw);
    j->pic[i].draw = NULL;
  }
  if (d->filling == j)
    d->filling = NULL;
  if (is_short(j))
    metric_add(METRIC_CANCELLED, CANCEL_CLIENT, 1);
  generation_unref(j->generation);
  j->generation = NULL;
  job_drawn(d->jobs, j);
}

/* The picture's draw is closed; the job ends with its last one. */
static void picture_end(struct device *d, struct picture *p)
{
  struct job *j = p->job;

  d->alive--;
  metric_move(METRIC_RUNNING, metric_on(0, d->at), -1);
  if (p->err.code) {
    note_failure(d, j, &p->err);
    p->has_pixels = 0;
  }
  atomic_fetch_add(&j->drawn, p->has_pixels);
  if (!--j->live && (j->err.code || j->is_cut || j->started == j->req.n))
    job_end(d, j);
}

/* Pictures that the stage thread has done with: started ones become ready, closed ones end. */
static void take_back(struct device *d)
{
  struct picture *next;

  for (struct picture *p = pics_returned(d->jobs, d->at); p; p = next) {
    next = p->next;
    if (!p->draw)
      picture_end(d, p);
    else
      d->ready[d->n_ready++] = p;
  }
}

/* Nothing more is done to a picture, which is finished or cut: it is decoded as it is. Before its first step there is nothing of it. */
static void finish_picture(struct device *d, struct picture *p)
{
  int at = draw_step_index(p->draw), is_finished = at == draw_step_count(p->draw);

  p->cut_at = is_finished ? 0 : at;
  if (at && !is_finished && draw_cut(p->draw, &p->err))
    note_failure(d, p->job, &p->err);
  p->has_pixels = at && !p->err.code;
  pic_send(d->jobs, p, p->has_pixels ? STAGE_DECODE : STAGE_CLOSE);
}

/* Sends the pictures to their end that failed, were stopped or cut, belong to a job that did, or are finished. */
static void sort_out(struct device *d)
{
  int kept = 0;

  for (int i = 0; i < d->n_ready; i++) {
    struct picture *p = d->ready[i];
    struct job *j = p->job;
    int stop = atomic_load(&j->stop);

    obey_cut(j);
    if (!p->err.code && stop)
      job_stop_reason(&p->err, stop);
    if (p->err.code)
      note_failure(d, j, &p->err);
    else if (j->err.code)
      p->err = j->err;
    if (p->err.code)
      pic_send(d->jobs, p, STAGE_CLOSE);
    else if (p->is_cut || draw_step_index(p->draw) == draw_step_count(p->draw))
      finish_picture(d, p);
    else
      d->ready[kept++] = p;
  }
  d->n_ready = kept;
}

/* Whether somebody waits to see what this picture looks like now: a stream's planned previews, evenly over the steps, or a look. */
static int is_preview_due(struct job *j, struct picture *p)
{
  int step = draw_step_index(p->draw), steps = draw_step_count(p->draw);

  if (!step || step == steps || atomic_load(&j->is_previewing))
    return 0;
  if (j->previews_planned < j->req.previews && step * (j->req.previews + 1) >= steps * (j->previews_planned + 1)) {
    j->previews_planned++;
    return 1;
  }
  if (clock_ns() - j->preview_ns < PREVIEW_EVERY_NS)
    return 0;
  return atomic_exchange(&j->wants_preview, 0);
}

static void take_preview(struct device *d, struct picture *p)
{
  struct job *j = p->job;
  struct err ignored = {0}; /* a picture without previews is still a picture */

  if (!is_preview_due(j, p))
    return;
  if (!j->preview_rgb)
    j->preview_rgb = malloc((size_t)j->req.width * (size_t)j->req.height * 3);
  if (!j->preview_rgb || draw_snapshot(p->draw, &ignored))
    return;
  j->preview_ns = clock_ns();
  j->preview_step = draw_step_index(p->draw);
  j->preview_picture = (int)(p - j->pic);
  atomic_store(&j->is_previewing, 1);
  pic_send(d->jobs, p, STAGE_PREVIEW);
}

/* One step for the pictures whose turn it is. */
static void step(struct device *d)
{
  struct picture *p[JOB_ALIVE_MAX];
  struct draw *draw[JOB_ALIVE_MAX];
  struct err err[JOB_ALIVE_MAX];
  int n = jobs_choose(d->jobs, d->ready, d->n_ready, d->batch_max, p);
  int64_t t = clock_ns(), ns;

  for (int i = 0; i < n; i++) {
    p[i]->last = ++d->tick;
    draw[i] = p[i]->draw;
    err[i] = (struct err){0};
  }
  atomic_store(&d->desk->stepping, 1);
  batch_leave_free(d->batch, atomic_load(&d->desk->staging));
  batch_step(d->batch, draw, n, err);
  ns = clock_ns() - t;
  metric_observe(METRIC_STEP_SECONDS, metric_on(0, d->at), ns);
  metric_observe(METRIC_BATCH_SIZE, metric_on(0, d->at), n);
  metric_add(METRIC_STEPS, metric_on(0, d->at), (uint64_t)n);
  for (int i = 0; i < n; i++) {
    if (err[i].code) {
      p[i]->err = err[i];
      continue;
    }
    atomic_fetch_add(&p[i]->job->steps_done, 1);
    p[i]->job->times.unet += (double)ns / 1e6 / n;
    take_preview(d, p[i]);
  }
  jobs_stepped(d->jobs, p, n, ns);
}

/* Pins the generation that the job's pictures are all drawn under, as this device has it. Returns 0 when it cannot be drawn now: then it was sent on. */
static int begin_job(struct device *d, struct job *j)
{
  int stale = 0, stop = atomic_load(&j->stop);

  if (stop)
    job_stop_reason(&j->err, stop);
  else if (!safety_pin(worker_safety(d->worker), j->target, d->at, &j->generation, &j->stamp, &stale, &j->err) && !stale)
    return 1;
  if (j->err.code)
    job_fail(d->jobs, j);
  else
    worker_prepare(d->worker, j);
  return 0;
}

/* The job whose next picture starts: the one that was begun, while it has some left, else the next of the queue. NULL: none. */
static struct job *next_job(struct device *d)
{
  struct job *j = d->filling;
  int stop = j ? atomic_load(&j->stop) : 0;

  if (j)
    obey_cut(j);
  if (stop && !j->err.code)
    job_stop_reason(&j->err, stop);
  if (j && (j->err.code || j->is_cut) && !j->live)
    job_end(d, j);
  else if (j && !j->err.code && !j->is_cut && j->started < j->req.n)
    return j;
  while ((j = job_take(d->jobs, d->at)) && !begin_job(d, j))
    ;
  d->filling = j;
  if (j && j->taken)
    j->taken(j->wake_arg);
  return j;
}

static void fill(struct device *d)
{
  struct job *j;

  while (d->alive < d->running && (j = next_job(d))) {
    j->live++;
    d->alive++;
    metric_move(METRIC_RUNNING, metric_on(0, d->at), 1);
    pic_send(d->jobs, &j->pic[j->started++], STAGE_START);
  }
}

static void draw_all(struct device *d)
{
  for (;;) {
    take_back(d);
    sort_out(d);
    fill(d);
    if (d->n_ready) {
      step(d);
      continue;
    }
    atomic_store(&d->desk->stepping, 0);
    device_log_plans(d);
    if (!jobs_wait(d->jobs, d->at, d->alive < d->running) && !d->alive)
      return;
  }
}

static void *run(void *arg)
{
  struct device *d = arg;
  struct err why = {0};

  thread_self = THREAD_DEVICE;
  thread_gives_way();
  if (device_load(d, &why) || stage_start(&d->stage, &why))
    worker_fail(d->worker, d, &why);
  else
    worker_loaded(d->worker, d);
  draw_all(d); /* returns after jobs_end */
  return NULL;
}

int device_start(struct device *d, struct err *e)
{
  char name[16];

  snprintf(name, sizeof name, "device %d", d->number);
  if (thread_start(&d->thread, name, run, d, e))
    return e->code;
  d->is_running = 1;
  return 0;
}

void device_join(struct device *d)
{
  if (d->is_running)
    pthread_join(d->thread, NULL);
  d->is_running = 0;
}

void device_close(struct device *d)
{
  stage_close(&d->stage);
  batch_close(d->batch);
  d->batch = NULL;
  model_close(d->model);
  be_close(&d->be);
  d->model = NULL;
}
