/*
 * worker.c - see worker.h.
 *
 * Errors of the engine come in three classes: the request's (that job fails), a resource's (E_NOMEM: that job fails, the others
 * live) and the device's (E_DEVICE: everything fails with 503, main drains and exits for a restart).
 */
#include "server/worker.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "server/log.h"
#include "server/metrics.h"

enum worker_state worker_state(const struct worker *w)
{
  return (enum worker_state)atomic_load(&w->state);
}

const struct serving *worker_serving(const struct worker *w)
{
  return atomic_load(&w->state) == WORKER_READY ? &w->serving : NULL;
}

struct safety *worker_safety(const struct worker *w)
{
  return atomic_load(&w->safety);
}

void worker_set_safety(struct worker *w, struct safety *s)
{
  atomic_store(&w->safety, s);
}

/* Looks are free, previews are not: one that nobody planned comes no sooner after another. */
static const int64_t PREVIEW_EVERY_NS = 300000000;

static void set_state(struct worker *w, enum worker_state state)
{
  uint64_t one = 1;
  ssize_t n;

  atomic_store(&w->state, state);
  n = write(w->event_fd, &one, sizeof one);
  (void)n; /* an eventfd that is full has already woken main */
}

/* ---- loading ---- */

/* The operator's bounds, where he gave some, else the model's. */
static int set_limits(struct worker *w, struct err *e)
{
  struct request_limits *l = &w->serving.limits;
  const struct model_info *info = w->serving.info;
  const struct config *c = w->cfg;

  l->offers = REQUEST_OFFERS_FORMATS | REQUEST_OFFERS_URL | REQUEST_OFFERS_STREAM;
  l->size_multiple = info->size_multiple;
  l->default_size = c->size ? c->size : info->default_size;
  l->max_size = c->max_size ? c->max_size : 2 * info->default_size;
  if (l->default_size > l->max_size || l->default_size % l->size_multiple || l->max_size % l->size_multiple)
    return err_field(e, E_ARG, "size", "size (%d) and max_size (%d) must be multiples of %d for this model, and size not the larger",
                     l->default_size, l->max_size, l->size_multiple);
  l->default_steps = c->steps;
  l->max_steps = c->max_steps;
  l->max_guidance = c->max_guidance;
  l->default_guidance = c->guidance > 0 ? c->guidance : info->default_size < 256 ? 3 : 7.5f;
  if (l->default_guidance > l->max_guidance)
    l->default_guidance = l->max_guidance;
  l->max_n = c->max_n;
  snprintf(l->default_sampler, sizeof l->default_sampler, "%.31s", c->sampler);
  snprintf(l->model, sizeof l->model, "%.63s", *c->name ? c->name : info->name);
  return 0;
}

/* Why "auto" came to the CPU, in one line. */
static void log_choice(const struct config *c, const struct be_ops *chosen)
{
  const struct be_ops *cuda;
  struct err why = {0};

  if (!strcmp(c->backend, "auto") && chosen == &be_cpu && be_find_cuda(&cuda, &why))
    log_event("the CPU computes: %s", why.msg);
}

/* Bytes of the base's weights by the size of their numbers, as generation.bytes counts those of a generation. */
static int64_t weight_bytes(const struct worker *w)
{
  const struct generation *g = model_base(w->serving.model);
  int64_t sum = 0;

  for (int i = 0; i < g->n; i++) {
    const struct site *s = &g->site[i];
    enum dtype type = s->kind == WEIGHT_LINEAR || s->kind == WEIGHT_CONV ? w->be.act : DT_F32;
    sum += s->out * site_columns(s) * (int64_t)dtype_size(type) + (s->has_bias ? s->out * (int64_t)sizeof(float) : 0);
  }
  return sum;
}

/* What stays set aside on the device, for /metrics. */
static int count_memory(struct worker *w, struct err *e)
{
  struct serving *s = &w->serving;
  size_t slab = 0, batch = 0;
  int side = s->limits.max_size;

  if (model_plan_bytes(s->model, side, side, &slab, e) || batch_plan_bytes(s->model, side, side, w->batch_max, &batch, e))
    return e->code;
  metric_set(METRIC_DEVICE_BYTES, MEMORY_ACTIVATIONS, (int64_t)(slab + batch));
  metric_set(METRIC_DEVICE_BYTES, MEMORY_WEIGHTS, weight_bytes(w));
  return 0;
}

/* A folder in the state folder, for the backend that compiles for its device. Without it every start compiles anew. */
static void open_plan_cache(struct worker *w, const struct be_ops *ops, struct be_config *bc)
{
  if (strcmp(ops->name, "cuda"))
    return;
  snprintf(w->plan_cache, sizeof w->plan_cache, "%s/" WORKER_PLANS, w->cfg->state);
  if (mkdir(w->plan_cache, 0700) && errno != EEXIST)
    log_event("compiled plans are not kept: %s: %s", w->plan_cache, strerror(errno));
  else
    bc->plan_cache = w->plan_cache;
}

static int load(struct worker *w, struct err *e)
{
  struct be_config bc = {.threads = w->cfg->threads};
  const struct be_ops *ops;
  struct serving *s = &w->serving;
  int64_t t = clock_ns();

  if (be_find(w->cfg->backend, &ops, e))
    return e->code;
  log_choice(w->cfg, ops);
  open_plan_cache(w, ops, &bc);
  if (be_open(&w->be, ops, &bc, e) || model_open(&s->model, &w->be, w->cfg->model, e))
    return e->code;
  s->info = model_info(s->model);
  if (set_limits(w, e) || model_reserve_for(s->model, s->limits.max_size, s->limits.max_size, LANE_STEPS, e))
    return e->code;
  w->batch_max = w->cfg->batch ? w->cfg->batch : WORKER_BATCH;
  if (!w->cfg->batch && !ops->rows_are_alone && w->batch_max > w->be.threads) /* a lane with memory of its own for each */
    w->batch_max = w->be.threads;
  if (w->batch_max > w->cfg->running)
    w->batch_max = w->cfg->running;
  if (batch_open(&w->batch, s->model, w->batch_max, e) || stage_open(&w->stage, w->jobs, s->model, e) ||
      count_memory(w, e))
    return e->code;
  s->loaded_s = (int64_t)time(NULL);
  snprintf(s->backend, sizeof s->backend, "%s: %s", w->be.ops->name, w->be.info);
  log_event("model %s loaded in %.0f ms: UNet %.1f M, text %.1f M, VAE %.1f M parameters, %d pixels, backend %s", s->limits.model,
            (double)(clock_ns() - t) / 1e6, (double)s->info->unet_params / 1e6, (double)s->info->text_params / 1e6,
            (double)s->info->vae_params / 1e6, s->limits.default_size, s->backend);
  return 0;
}

/* Says once for every spell of work whether the folder of plans had what it asked for: compiled ones cost seconds and are kept. */
static void log_plans(struct worker *w)
{
  const struct be_plans *p = w->be.plans;
  long found = p ? atomic_load(&p->found) : 0, compiled = p ? atomic_load(&p->compiled) : 0;

  if (found + compiled == w->plans_logged)
    return;
  w->plans_logged = found + compiled;
  log_event("plans for this GPU since the start: %ld found in %s, %ld compiled", found, *w->plan_cache ? w->plan_cache : "no folder", compiled);
}

/* ---- drawing ---- */

/* The first thing that went wrong with a picture of this job ends the job. */
static void note_failure(struct worker *w, struct job *j, const struct err *why)
{
  if (!j->err.code)
    j->err = *why;
  if (why->code == E_DEVICE && worker_state(w) == WORKER_READY) {
    w->why = *why;
    jobs_refuse(w->jobs);
    set_state(w, WORKER_FAILED);
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

/* No picture of the job is alive, and none is to be started. */
static void job_end(struct worker *w, struct job *j)
{
  if (w->filling == j)
    w->filling = NULL;
  if (is_short(j))
    metric_add(METRIC_CANCELLED, CANCEL_CLIENT, 1);
  generation_unref(j->generation);
  j->generation = NULL;
  job_drawn(w->jobs, j);
}

/* The picture's draw is closed; the job ends with its last one. */
static void picture_end(struct worker *w, struct picture *p)
{
  struct job *j = p->job;

  w->alive--;
  metric_move(METRIC_RUNNING, 0, -1);
  if (p->err.code) {
    note_failure(w, j, &p->err);
    p->has_pixels = 0;
  }
  atomic_fetch_add(&j->drawn, p->has_pixels);
  if (!--j->live && (j->err.code || j->is_cut || j->started == j->req.n))
    job_end(w, j);
}

/* Pictures that the stage thread has done with: started ones become ready, closed ones end. */
static void take_back(struct worker *w)
{
  struct picture *next;

  for (struct picture *p = pics_returned(w->jobs); p; p = next) {
    next = p->next;
    if (!p->draw)
      picture_end(w, p);
    else
      w->ready[w->n_ready++] = p;
  }
}

/* Nothing more is done to a picture, which is finished or cut: it is decoded as it is. Before its first step there is nothing of it. */
static void finish_picture(struct worker *w, struct picture *p)
{
  int at = draw_step_index(p->draw), is_finished = at == draw_step_count(p->draw);

  p->cut_at = is_finished ? 0 : at;
  if (at && !is_finished && draw_cut(p->draw, &p->err))
    note_failure(w, p->job, &p->err);
  p->has_pixels = at && !p->err.code;
  pic_send(w->jobs, p, p->has_pixels ? STAGE_DECODE : STAGE_CLOSE);
}

/* Sends the pictures to their end that failed, were stopped or cut, belong to a job that did, or are finished. */
static void sort_out(struct worker *w)
{
  int kept = 0;

  for (int i = 0; i < w->n_ready; i++) {
    struct picture *p = w->ready[i];
    struct job *j = p->job;
    int stop = atomic_load(&j->stop);

    obey_cut(j);
    if (!p->err.code && stop)
      job_stop_reason(&p->err, stop);
    if (p->err.code)
      note_failure(w, j, &p->err);
    else if (j->err.code)
      p->err = j->err;
    if (p->err.code)
      pic_send(w->jobs, p, STAGE_CLOSE);
    else if (p->is_cut || draw_step_index(p->draw) == draw_step_count(p->draw))
      finish_picture(w, p);
    else
      w->ready[kept++] = p;
  }
  w->n_ready = kept;
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

static void take_preview(struct worker *w, struct picture *p)
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
  pic_send(w->jobs, p, STAGE_PREVIEW);
}

/* One step for the pictures whose turn it is. */
static void step(struct worker *w)
{
  struct picture *p[JOB_ALIVE_MAX];
  struct draw *d[JOB_ALIVE_MAX];
  struct err err[JOB_ALIVE_MAX];
  int n = jobs_choose(w->jobs, w->ready, w->n_ready, w->batch_max, p);
  int64_t t = clock_ns(), ns;

  for (int i = 0; i < n; i++) {
    p[i]->last = ++w->tick;
    d[i] = p[i]->draw;
    err[i] = (struct err){0};
  }
  atomic_store(&w->jobs->stepping, 1);
  batch_leave_free(w->batch, atomic_load(&w->jobs->staging));
  batch_step(w->batch, d, n, err);
  ns = clock_ns() - t;
  metric_observe(METRIC_STEP_SECONDS, 0, ns);
  metric_observe(METRIC_BATCH_SIZE, 0, n);
  metric_add(METRIC_STEPS, 0, (uint64_t)n);
  for (int i = 0; i < n; i++) {
    if (err[i].code) {
      p[i]->err = err[i];
      continue;
    }
    atomic_fetch_add(&p[i]->job->steps_done, 1);
    p[i]->job->times.unet += (double)ns / 1e6 / n;
    take_preview(w, p[i]);
  }
  jobs_stepped(w->jobs, p, n, ns);
}

/* The loader has composed what the job needs, or could not, or need not. */
static void on_prepared(void *arg, const struct err *err)
{
  struct job *j = arg;
  int stop = atomic_load(&j->stop);

  if (stop)
    job_stop_reason(&j->err, stop);
  else if (err->code)
    j->err = *err;
  if (j->err.code)
    job_fail(j->jobs, j);
  else
    job_submit(j->jobs, j);
}

void worker_prepare(struct worker *w, struct job *j)
{
  job_prepare(w->jobs, j);
  safety_prepare(worker_safety(w), j->target, &j->stop, on_prepared, j);
}

void worker_accept(struct worker *w, struct job *j, int pending)
{
  if (pending)
    worker_prepare(w, j);
  else
    job_submit(w->jobs, j);
}

/* Pins the generation that the job's pictures are all drawn under. Returns 0 when it cannot be drawn now: then it was sent on. */
static int begin_job(struct worker *w, struct job *j)
{
  int stale = 0, stop = atomic_load(&j->stop);

  if (stop)
    job_stop_reason(&j->err, stop);
  else if (!safety_pin(worker_safety(w), j->target, &j->generation, &j->stamp, &stale, &j->err) && !stale)
    return 1;
  if (j->err.code)
    job_fail(w->jobs, j);
  else
    worker_prepare(w, j);
  return 0;
}

/* The job whose next picture starts: the one that was begun, while it has some left, else the next of the queue. NULL: none. */
static struct job *next_job(struct worker *w)
{
  struct job *j = w->filling;
  int stop = j ? atomic_load(&j->stop) : 0;

  if (j)
    obey_cut(j);
  if (stop && !j->err.code)
    job_stop_reason(&j->err, stop);
  if (j && (j->err.code || j->is_cut) && !j->live)
    job_end(w, j);
  else if (j && !j->err.code && !j->is_cut && j->started < j->req.n)
    return j;
  while ((j = job_take(w->jobs)) && !begin_job(w, j))
    ;
  w->filling = j;
  if (j && j->taken)
    j->taken(j->wake_arg);
  return j;
}

static void fill(struct worker *w)
{
  struct job *j;

  while (w->alive < w->cfg->running && (j = next_job(w))) {
    j->live++;
    w->alive++;
    metric_move(METRIC_RUNNING, 0, 1);
    pic_send(w->jobs, &j->pic[j->started++], STAGE_START);
  }
}

static void draw_all(struct worker *w)
{
  for (;;) {
    take_back(w);
    sort_out(w);
    fill(w);
    if (w->n_ready) {
      step(w);
      continue;
    }
    atomic_store(&w->jobs->stepping, 0);
    log_plans(w);
    if (!jobs_wait(w->jobs, w->alive < w->cfg->running) && !w->alive)
      return;
  }
}

static void *run(void *arg)
{
  struct worker *w = arg;

  thread_self = THREAD_DEVICE;
  if (load(w, &w->why)) {
    jobs_refuse(w->jobs);
    set_state(w, WORKER_FAILED);
  } else {
    set_state(w, WORKER_READY);
  }
  draw_all(w); /* returns after jobs_end */
  return NULL;
}

void worker_init(struct worker *w, const struct config *cfg, struct jobs *js, int event_fd)
{
  *w = (struct worker){.cfg = cfg, .jobs = js, .event_fd = event_fd};
}

int worker_start(struct worker *w, struct err *e)
{
  if (thread_start(&w->thread, "device", run, w, e))
    return e->code;
  w->is_running = 1;
  return 0;
}

void worker_join(struct worker *w)
{
  if (w->is_running)
    pthread_join(w->thread, NULL);
  w->is_running = 0;
}

void worker_close(struct worker *w)
{
  stage_close(&w->stage);
  batch_close(w->batch);
  w->batch = NULL;
  model_close(w->serving.model);
  be_close(&w->be);
  w->serving.model = NULL;
}
