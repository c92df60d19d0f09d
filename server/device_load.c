/*
 * device_load.c - how a device gets ready: backend, model, memory for the largest picture, plans. See device.h.
 *
 * All memory that a step works in is taken here. Where the backend compiles for its device, the plans for pictures of the default size are found or
 * compiled before the server says that it is ready, by a rehearsal (models/lane.h) of the UNet with every count of rows that a batch can have, and of the
 * VAE both ways: pictures of different generations share a call as far as they read the same weights, so that odd counts come as well. Plans for other
 * sizes are made when the first such picture comes.
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

/* What stays set aside on the device, for /metrics and the log. */
static int count_memory(struct device *d, int side, struct err *e)
{
  size_t slab = 0, batch = 0;

  if (model_plan_bytes(d->model, side, side, &slab, e) || batch_plan_bytes(d->model, side, side, d->batch_max, &batch, e))
    return e->code;
  d->activation_bytes = (int64_t)(slab + batch);
  d->weight_bytes = weight_bytes(d);
  metric_set(METRIC_DEVICE_BYTES, metric_on(MEMORY_ACTIVATIONS, d->at), d->activation_bytes);
  metric_set(METRIC_DEVICE_BYTES, metric_on(MEMORY_WEIGHTS, d->at), d->weight_bytes);
  return 0;
}

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

/* ---- plans ---- */

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

/* Plans for prompts of one chunk, which most are. */
MUST_CHECK static int make_plans(struct device *d, int side, struct err *e)
{
  struct lane_rehearsal of = {side, side, 0, 1};
  int last = batch_rows(d->batch);
  int64_t said = clock_ns();

  for (; of.rows <= last; of.rows++) {
    if (check_stop(d, e) || lane_rehearse(of.rows ? model_lane(d->model) : d->stage.lane, &of, REHEARSE_ALL, e))
      return e->code;
    if (clock_ns() - said < SAY_EVERY_NS)
      continue;
    log_event("device %d: plans for %dx%d: %d of %d counts of rows, %ld found and %ld compiled so far", d->number, side, side, of.rows, last,
              atomic_load(&d->be.plans->found), atomic_load(&d->be.plans->compiled));
    said = clock_ns();
  }
  return 0;
}

/* What the first pictures would have had to wait for. Nothing on backends that make nothing ahead. */
MUST_CHECK static int get_ready(struct device *d, const struct request_limits *l, struct err *e)
{
  int64_t t = clock_ns();

  if (!d->be.plans)
    return 0;
  if (take_memory(d, l->max_size, e) || make_plans(d, l->default_size, e))
    return e->code;
  log_event("device %d: everything is there for pictures of %dx%d, up to %d in a step, after %.0f ms", d->number, l->default_size, l->default_size,
            d->batch_max, (double)(clock_ns() - t) / 1e6);
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
  if (check_stop(d, e) || model_open(&d->model, &d->be, d->cfg->model, e))
    return e->code;
  info = model_info(d->model);
  if (worker_limits(w, info, &limits, e) || model_reserve_for(d->model, limits.max_size, limits.max_size, LANE_STEPS, e))
    return e->code;
  d->batch_max = batch_for(d);
  if (batch_open(&d->batch, d->model, d->batch_max, e) || stage_open(&d->stage, d->jobs, d->at, d->model, e) || count_memory(d, limits.max_size, e))
    return e->code;
  log_event("model %s loaded in %.0f ms: UNet %.1f M, text %.1f M, VAE %.1f M parameters, %d pixels, backend %s: %s", limits.model,
            (double)(clock_ns() - t) / 1e6, (double)info->unet_params / 1e6, (double)info->text_params / 1e6, (double)info->vae_params / 1e6,
            limits.default_size, w->ops->name, d->be.info);
  log_event("device %d: %.1f MB of weights and %.1f MB for activations set aside, for pictures up to %dx%d, %d of them in a step, %d at once", d->number,
            (double)d->weight_bytes / 1e6, (double)d->activation_bytes / 1e6, limits.max_size, limits.max_size, d->batch_max, d->cfg->running);
  return get_ready(d, &limits, e);
}
