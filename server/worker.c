/*
 * worker.c - see worker.h. What a device does is in device.c.
 */
#include "server/worker.h"

#include <errno.h>
#include <stdio.h>
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

int worker_safety_devices(struct worker *w, struct safety_device *out)
{
  for (int i = 0; i < w->devices; i++)
    out[i] = (struct safety_device){.model = w->device[i].model, .be = &w->device[i].be, .number = w->device[i].number};
  return w->devices;
}

/* A device may have failed before the last one is ready: FAILED stays. */
static void set_state(struct worker *w, enum worker_state state)
{
  uint64_t one = 1;
  int loading = WORKER_LOADING;
  ssize_t n;

  if (state == WORKER_FAILED)
    atomic_store(&w->state, state);
  else if (!atomic_compare_exchange_strong(&w->state, &loading, state))
    return;
  n = write(w->event_fd, &one, sizeof one);
  (void)n; /* an eventfd that is full has already woken main */
}

/* ---- loading ---- */

int worker_limits(const struct worker *w, const struct model_info *info, struct request_limits *l, struct err *e)
{
  const struct config *c = w->cfg;

  *l = (struct request_limits){.offers = REQUEST_OFFERS_FORMATS | REQUEST_OFFERS_URL | REQUEST_OFFERS_STREAM};
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

/* Pictures must not depend on who draws them: files that were exchanged while one device loaded and another had are found here. */
static int check_same(const struct worker *w, struct err *e)
{
  const struct device *first = &w->device[0];

  for (int i = 1; i < w->devices; i++) {
    const struct device *d = &w->device[i];
    if (strcmp(model_info(d->model)->digest, model_info(first->model)->digest))
      return err_field(e, E_FILE, "model", "device %d loaded another checkpoint than device %d: its files changed meanwhile; start again", d->number,
                       first->number);
    if (d->be.act != first->be.act)
      return err_field(e, E_ARG, "devices", "device %d does not compute in the number format of device %d: serve them apart", d->number, first->number);
    if (!strcmp(w->ops->name, "cuda") && strcmp(d->be.info, first->be.info))
      log_event("device %d (%s) is of another kind than device %d (%s): which one draws a picture may change its last bits", d->number, d->be.info,
                first->number, first->be.info);
  }
  return 0;
}

/* What clients see, of the first device for all of them. */
static int publish(struct worker *w, struct err *e)
{
  struct serving *s = &w->serving;
  const struct device *first = &w->device[0];
  char count[40] = "";

  s->model = first->model;
  s->info = model_info(s->model);
  if (check_same(w, e) || worker_limits(w, s->info, &s->limits, e))
    return e->code;
  s->loaded_s = (int64_t)time(NULL);
  if (w->devices > 1)
    snprintf(count, sizeof count, "%d devices, each ", w->devices);
  snprintf(s->backend, sizeof s->backend, "%s%s: %.110s", count, w->ops->name, first->be.info);
  return 0;
}

void worker_loaded(struct worker *w, struct device *d)
{
  struct err why = {0};

  if (atomic_fetch_add(&w->loaded, 1) + 1 < w->devices)
    return;
  if (publish(w, &why))
    worker_fail(w, d, &why);
  else
    set_state(w, WORKER_READY);
}

void worker_fail(struct worker *w, const struct device *d, const struct err *why)
{
  if (atomic_exchange(&w->is_failed, 1))
    return;
  w->why = *why;
  if (w->devices > 1 || why->code == E_DEVICE)
    err_wrap(&w->why, "device %d", d->number);
  jobs_refuse(w->jobs);
  set_state(w, WORKER_FAILED);
}

/* ---- jobs on their way to a device ---- */

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

/* ---- start and stop ---- */

void worker_init(struct worker *w, const struct config *cfg, const struct device_list *list, struct jobs *js, int event_fd)
{
  *w = (struct worker){.cfg = cfg, .jobs = js, .event_fd = event_fd, .devices = list->n};
  for (int i = 0; i < list->n; i++)
    w->device[i] = (struct device){.worker = w, .at = i, .number = list->number[i], .cfg = cfg, .jobs = js, .desk = &js->desk[i],
                                   .running = cfg->running};
  metric_devices(list->number, list->n);
}

/* Why "auto" came to the CPU, in one line. */
static void log_choice(const struct worker *w)
{
  const struct be_ops *cuda;
  struct err why = {0};

  if (!strcmp(w->cfg->backend, "auto") && w->ops == &be_cpu && be_find_cuda(&cuda, &why))
    log_event("the CPU computes: %s", why.msg);
}

/* A folder in the state folder, for the backend that compiles for its devices. Without it every start compiles anew. */
static void open_plan_cache(struct worker *w)
{
  if (strcmp(w->ops->name, "cuda"))
    return;
  snprintf(w->plan_cache, sizeof w->plan_cache, "%s/" WORKER_PLANS, w->cfg->state);
  if (mkdir(w->plan_cache, 0700) && errno != EEXIST) {
    log_event("compiled plans are not kept: %s: %s", w->plan_cache, strerror(errno));
    *w->plan_cache = 0;
  }
}

int worker_start(struct worker *w, struct err *e)
{
  if (be_find(w->cfg->backend, &w->ops, e))
    return e->code;
  log_choice(w);
  open_plan_cache(w);
  for (int i = 0; i < w->devices; i++)
    if (device_start(&w->device[i], e))
      return e->code;
  return 0;
}

void worker_join(struct worker *w)
{
  for (int i = 0; i < w->devices; i++)
    device_join(&w->device[i]);
}

void worker_close(struct worker *w)
{
  for (int i = 0; i < w->devices; i++)
    device_close(&w->device[i]);
  w->serving.model = NULL;
}
