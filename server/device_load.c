/*
 * device_load.c - how a device gets ready: backend, model, memory for the largest picture, plans. See device.h.
 *
 * All memory that a step works in is taken here, and how many pictures are drawn at once follows from what is left. Where the backend compiles for its
 * device, the plans for pictures of the default size are found or compiled before the server says that it is ready, by a rehearsal (models/lane.h) of the
 * UNet with every count of rows that a batch can have, and of the VAE both ways: pictures of different generations share a call as far as they read the same
 * weights, so that odd counts come as well. Plans for other sizes are made when the first such picture comes.
 *
 * Called by device.c. Threads: the device's; the stage thread, whose lane is opened and rehearsed here, starts afterwards.
 */
#include "server/device.h"

#include <sched.h>

#include "server/activations.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/worker.h"

static const int64_t SAY_EVERY_NS = 10000000000;

/* Threads for the engines of a processor: the operator's, or one for each processor that this process may use, in shares. */
static int threads_for(const struct device *d)
{
  int threads = d->cfg->threads, n = d->worker->devices;
  cpu_set_t set;

  if (n == 1)
    return threads; /* 0 is the backend's own business */
  if (!threads)
    threads = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
  return devices_threads(threads, n, d->at);
}

/* Where pictures of one pass wait for each other, no more in it than there are threads: a lane with memory of its own for each. */
static int batch_for(const struct device *d)
{
  const struct config *c = d->cfg;
  int n = c->batch ? c->batch : WORKER_BATCH;

  if (!c->batch && !d->be.ops->rows_are_alone && n > d->be.threads)
    n = d->be.threads;
  return n < c->running ? n : c->running;
}

/* ---- memory ---- */

/* Bytes of the base's weights by the size of their numbers, as generation.bytes counts those of a generation. */
static int64_t weight_bytes(const struct device *d)
{
  const struct generation *g = model_base(d->model);
  int64_t sum = 0;

  for (int i = 0; i < g->n; i++) {
    const struct site *s = &g->site[i];
    enum dtype type = s->kind == WEIGHT_LINEAR || s->kind == WEIGHT_CONV ? d->be.act : DT_F32;
    sum += s->out * site_columns(s) * (int64_t)dtype_size(type) + (s->has_bias ? s->out * (int64_t)sizeof(float) : 0);
  }
  return sum;
}

/* Lanes with activation memory for the largest picture. */
MUST_CHECK static int set_aside(struct device *d, int side, struct err *e)
{
  size_t batch = 0;

  if (model_reserve_for(d->model, side, side, LANE_STEPS, e))
    return e->code;
  d->plan.activations = (int64_t)lane_bytes(model_lane(d->model));
  d->batch_max = batch_for(d);
  if (batch_plan_bytes(d->model, side, side, d->batch_max, &batch, e) || batch_open(&d->batch, d->model, d->batch_max, e) ||
      stage_open(&d->stage, d->jobs, d->at, d->model, e))
    return e->code;
  d->plan.activations += (int64_t)(batch + lane_bytes(d->stage.lane));
  d->plan.weights = weight_bytes(d);
  d->plan.picture = (int64_t)draw_plan_bytes(d->model, side, side);
  return 0;
}

/* What is left on the device has to hold the pictures that are drawn at once, when all are the largest: as many as it holds are. Some is kept from them: the
 * loader's context, and a safety generation that replaces every weight of the UNet. E_NOMEM when there is none for a single picture. */
MUST_CHECK static int admit(struct device *d, int side, struct err *e)
{
  int64_t left, generation = model_info(d->model)->unet_params * (int64_t)dtype_size(d->be.act), fit, later;
  struct be_memory own, lane;

  lane_memory(model_lane(d->model), &own);
  lane_memory(d->stage.lane, &lane);
  if (!lane.total)
    return 0;
  later = (int64_t)lane.working + (int64_t)side * side * 3 * (int64_t)sizeof(float); /* the loader's is as the stage's; a first picture on its way */
  d->plan.working = (int64_t)(own.working + lane.working) + later;
  left = (int64_t)lane.free > later ? (int64_t)lane.free - later : 0;
  fit = (left - generation) / d->plan.picture;
  if (fit >= d->running)
    return 0;
  if (left < d->plan.picture)
    return err_set(e, E_NOMEM, "the %.0f MB that are left on device %d hold no picture of up to %dx%d, which takes %.0f MB: lower max_size or batch",
                   (double)left / 1e6, d->number, side, side, (double)d->plan.picture / 1e6);
  d->running = fit < 1 ? 1 : (int)fit;
  jobs_set_room(d->jobs, d->at, d->running);
  log_event("device %d: its %.0f MB that are left hold %d pictures of up to %dx%d at once, of %.0f MB each, beside a safety generation of up to %.0f MB, "
            "and not the %d of running: lower max_size or batch for more of them, or running to what there is",
            d->number, (double)left / 1e6, d->running, side, side, (double)d->plan.picture / 1e6, (double)generation / 1e6, d->cfg->running);
  return 0;
}

/* The plan of a device that is ready, for /metrics and the log. */
static void tell_plan(const struct device *d, int side)
{
  const struct device_plan *p = &d->plan;
  const int64_t bytes[MEMORY_COUNT] = {[MEMORY_WEIGHTS] = p->weights, [MEMORY_ACTIVATIONS] = p->activations, [MEMORY_WORKING] = p->working,
                                       [MEMORY_PICTURES] = d->running * p->picture};

  for (int i = 0; i < MEMORY_COUNT; i++)
    metric_set(METRIC_DEVICE_BYTES, metric_on(i, d->at), bytes[i]);
  log_event("device %d: %.1f MB of weights and %.1f MB for activations set aside, for pictures up to %dx%d, %d of them in a step; %.1f MB of working memory, "
            "and up to %.1f MB for the %d that are drawn at once",
            d->number, (double)p->weights / 1e6, (double)p->activations / 1e6, side, side, d->batch_max, (double)p->working / 1e6,
            (double)bytes[MEMORY_PICTURES] / 1e6, d->running);
}

/* ---- plans ---- */

void device_log_plans(struct device *d)
{
  const struct be_plans *p = d->be.plans;
  long found = p ? atomic_load(&p->found) : 0, compiled = p ? atomic_load(&p->compiled) : 0;

  if (found + compiled == d->plans_logged)
    return;
  d->plans_logged = found + compiled;
  log_event("plans for GPU %d since the start: %ld found in %s, %ld compiled", d->number, found,
            *d->worker->plan_cache ? d->worker->plan_cache : "no folder", compiled);
}

/* The server was told to stop, or cannot start any more. */
MUST_CHECK static int check_stop(const struct device *d, struct err *e)
{
  if (worker_state(d->worker) == WORKER_FAILED || jobs_are_refused(d->jobs))
    return err_set(e, E_NOTREADY, "the server is stopping");
  return 0;
}

/* Working memory for every picture that is admitted. */
MUST_CHECK static int take_memory(struct device *d, int side, struct err *e)
{
  struct lane_rehearsal of = {side, side, 0, PROMPT_MAX_CHUNKS};

  if (lane_rehearse(d->stage.lane, &of, REHEARSE_MEMORY, e))
    return e->code;
  of.rows = batch_rows(d->batch);
  return lane_rehearse(model_lane(d->model), &of, REHEARSE_MEMORY, e);
}

/* What the first pictures would have had to wait for, with prompts of one chunk, which most have. */
MUST_CHECK static int make_plans(struct device *d, int side, struct err *e)
{
  struct lane_rehearsal of = {side, side, 0, 1};
  int last = batch_rows(d->batch);
  int64_t start = clock_ns(), said = start;

  if (!d->be.plans) /* nothing is compiled */
    return 0;
  for (; of.rows <= last; of.rows++) {
    if (check_stop(d, e) || lane_rehearse(of.rows ? model_lane(d->model) : d->stage.lane, &of, REHEARSE_ALL, e))
      return e->code;
    if (clock_ns() - said < SAY_EVERY_NS)
      continue;
    log_event("device %d: plans for %dx%d: %d of %d counts of rows, %ld found and %ld compiled so far", d->number, side, side, of.rows, last,
              atomic_load(&d->be.plans->found), atomic_load(&d->be.plans->compiled));
    said = clock_ns();
  }
  log_event("device %d: plans for pictures of %dx%d, up to %d in a step, were there after %.0f ms", d->number, side, side, d->batch_max,
            (double)(clock_ns() - start) / 1e6);
  device_log_plans(d);
  return 0;
}

/* ---- loading ---- */

int device_load(struct device *d, struct err *e)
{
  const struct worker *w = d->worker;
  struct be_config bc = {.threads = threads_for(d), .device = d->number, .plan_cache = *w->plan_cache ? w->plan_cache : NULL};
  const struct model_info *info;
  struct request_limits limits;
  int64_t t = clock_ns();

  activations_ask(&bc, d->cfg->activations);
  if (be_open(&d->be, w->ops, &bc, e) || activations_check(&d->be, d->cfg->activations, e))
    return e->code;
  if (check_stop(d, e))
    return e->code;
  if (model_open(&d->model, &d->be, d->cfg->model, e)) {
    if (e->code == E_NOMEM)
      err_wrap(e, "the model does not fit on device %d", d->number);
    return e->code;
  }
  info = model_info(d->model);
  if (worker_limits(w, info, &limits, e))
    return e->code;
  if (set_aside(d, limits.max_size, e) || take_memory(d, limits.max_size, e)) {
    if (e->code == E_NOMEM)
      err_wrap(e, "device %d has too little memory for pictures up to %dx%d, %d in a step; lower max_size or batch", d->number, limits.max_size,
               limits.max_size, d->batch_max);
    return e->code;
  }
  log_event("model %s loaded in %.0f ms: UNet %.1f M, text %.1f M, VAE %.1f M parameters, %d pixels, backend %s: %s", limits.model,
            (double)(clock_ns() - t) / 1e6, (double)info->unet_params / 1e6, (double)info->text_params / 1e6, (double)info->vae_params / 1e6,
            limits.default_size, w->ops->name, d->be.info);
  if (make_plans(d, limits.default_size, e) || admit(d, limits.max_size, e))
    return e->code;
  tell_plan(d, limits.max_size);
  return 0;
}
