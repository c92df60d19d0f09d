/*
 * worker.c - see worker.h.
 *
 * Errors of the engine come in three classes: the request's (that job fails), a resource's (E_NOMEM: that job fails, the others
 * live) and the device's (E_DEVICE: everything fails with 503, main drains and exits for a restart).
 */
#include "server/worker.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "server/log.h"

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

static int load(struct worker *w, struct err *e)
{
  struct be_config bc = {.threads = w->cfg->threads};
  const struct be_ops *ops;
  struct serving *s = &w->serving;
  int64_t t = clock_ns();

  if (be_find(w->cfg->backend, &ops, e))
    return e->code;
  log_choice(w->cfg, ops);
  if (be_open(&w->be, ops, &bc, e) || model_open(&s->model, &w->be, w->cfg->model, e))
    return e->code;
  s->info = model_info(s->model);
  if (set_limits(w, e) || model_reserve(s->model, s->limits.max_size, s->limits.max_size, e))
    return e->code;
  s->loaded_s = (int64_t)time(NULL);
  snprintf(s->backend, sizeof s->backend, "%s: %s", w->be.ops->name, w->be.info);
  log_event("model %s loaded in %.0f ms: UNet %.1f M, text %.1f M, VAE %.1f M parameters, %d pixels, backend %s", s->limits.model,
            (double)(clock_ns() - t) / 1e6, (double)s->info->unet_params / 1e6, (double)s->info->text_params / 1e6,
            (double)s->info->vae_params / 1e6, s->limits.default_size, s->backend);
  return 0;
}

/* ---- drawing ---- */

/* The picture's draw ends here, whatever came of it; the job when it was the last one. */
static void slot_end(struct worker *w, struct slot *s)
{
  struct job *j = s->job;

  draw_close(s->pic->draw);
  s->pic->draw = NULL;
  if (--j->live || (!j->err.code && j->drawn < j->req.n))
    return; /* others of this job are alive, or to be started */
  if (w->filling == j)
    w->filling = NULL;
  generation_unref(j->generation);
  j->generation = NULL;
  if (j->err.code)
    job_fail(w->jobs, j);
  else
    job_drawn(w->jobs, j);
}

/* One call of the engine for one picture, timed. Returns 1 while the picture lives. */
static int slot_advance(struct worker *w, struct slot *s)
{
  struct job *j = s->job;
  struct err *e = &j->err;
  int64_t t = clock_ns();
  int stop = atomic_load(&j->stop), r;

  if (!e->code && stop)
    job_stop_reason(e, stop);
  if (!e->code && !s->is_started) {
    r = draw_start(s->pic->draw, model_lane(w->serving.model), j->generation, e);
    s->is_started = 1;
    j->times.text += (double)(clock_ns() - t) / 1e6;
    if (!r)
      return 1;
  } else if (!e->code && draw_step_index(s->pic->draw) < draw_step_count(s->pic->draw)) {
    r = draw_step(s->pic->draw, e);
    j->steps_done += !r;
    j->times.unet += (double)(clock_ns() - t) / 1e6;
    if (!r)
      return 1;
  } else if (!e->code) {
    r = draw_decode(s->pic->draw, model_lane(w->serving.model), s->pic->rgb, e);
    j->times.vae += (double)(clock_ns() - t) / 1e6;
    j->drawn += !r;
  }
  if (e->code == E_DEVICE && worker_state(w) == WORKER_READY) {
    w->why = *e;
    jobs_refuse(w->jobs);
    set_state(w, WORKER_FAILED);
  }
  slot_end(w, s);
  return 0;
}

/* The loader has composed what the job needs, or could not. */
static void on_prepared(void *arg, const struct err *err)
{
  struct job *j = arg;

  if (err->code) {
    j->err = *err;
    job_fail(j->jobs, j);
  } else {
    job_submit(j->jobs, j);
  }
}

void worker_prepare(struct worker *w, struct job *j)
{
  job_prepare(w->jobs, j);
  safety_prepare(worker_safety(w), j->target, on_prepared, j);
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

/* Fills free slots: first the pictures of the job that is being started, then the next job. Sleeps only when nothing runs. */
static void fill_slots(struct worker *w)
{
  while (w->slots < w->cfg->running) {
    struct job *j = w->filling;
    if (j && (j->started == j->req.n || j->err.code))
      j = w->filling = NULL;
    if (!j)
      j = w->filling = job_take(w->jobs, w->slots == 0);
    if (!j)
      return;
    if (!j->started && !begin_job(w, j)) {
      w->filling = NULL;
      continue;
    }
    j->live++;
    w->slot[w->slots++] = (struct slot){.job = j, .pic = &j->pic[j->started++]};
  }
}

static void draw_all(struct worker *w)
{
  int kept;

  for (;;) {
    fill_slots(w);
    if (!w->slots)
      return;
    kept = 0;
    for (int i = 0; i < w->slots; i++) {
      struct slot s = w->slot[i];
      if (slot_advance(w, &s))
        w->slot[kept++] = s;
    }
    w->slots = kept;
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
  model_close(w->serving.model);
  be_close(&w->be);
  w->serving.model = NULL;
}
