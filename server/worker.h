/*
 * worker.h - what draws: the devices, and what they share: what clients may ask for, the safety, the state of the whole.
 *
 * The server is ready when every device is, and failed as soon as one has: then it drains and exits for a restart (serve.c). Nobody but a device's own
 * threads calls its engine, except for tokenising (draw_prepare, HTTP thread), which any device's model does as well as another's, and reading
 * model_info.
 *
 * Called by serve.c (init, start, stop), http.c (state), device.c (loaded, failed). Threads: worker_state, worker_serving from any; the rest says so.
 */
#ifndef SAFELIGHT_SERVER_WORKER_H
#define SAFELIGHT_SERVER_WORKER_H

#include <stdatomic.h>

#include "server/config.h"
#include "server/device.h"
#include "server/devices.h"
#include "server/job.h"
#include "server/safety.h"

#define WORKER_PLANS "plans" /* folder in the state folder, for what a backend compiles */

enum { WORKER_BATCH = 8 /* pictures in one step, when the operator does not say */ };

enum worker_state { WORKER_LOADING, WORKER_READY, WORKER_FAILED };

/* What the loaded model lets clients do; immutable once published. */
struct serving {
  struct model *model;    /* the first device's: pictures are prepared with it, wherever they are drawn */
  const struct model_info *info;
  struct request_limits limits;
  int64_t loaded_s;       /* seconds since 1970 */
  char backend[160];      /* for people */
};

struct worker {
  const struct config *cfg;
  struct jobs *jobs;
  int event_fd;             /* written when state changes */
  struct device device[DEVICES_MAX]; /* `devices` entries */
  int devices;
  const struct be_ops *ops; /* of all devices */
  char plan_cache[CONFIG_TEXT + 16]; /* the backend's folder for what it compiles, of all devices; "" for one that compiles nothing */
  struct serving serving;
  _Atomic int state;
  _Atomic int loaded;       /* devices that are ready */
  _Atomic int is_failed;    /* one of them set why, or is about to */
  struct safety *_Atomic safety; /* NULL until main has opened it over the loaded models */
  struct err why;           /* of WORKER_FAILED: the first failure, with its device; written before state */
};

/* Before any other thread sees w, for the devices of the list. Main hears of every change of state through event_fd. */
void worker_init(struct worker *w, const struct config *cfg, const struct device_list *list, struct jobs *js, int event_fd);
/* Finds the backend and starts the devices' threads, which load the model. */
MUST_CHECK int worker_start(struct worker *w, struct err *e);
/* HTTP and device thread: asks the loader to compose what the job needs; it comes back through job_submit or job_fail. */
void worker_prepare(struct worker *w, struct job *j);
/* A job that is complete goes its way: to the loader when a generation is to be composed first (pending, as drawing_read said), else into the queue. */
void worker_accept(struct worker *w, struct job *j, int pending);
/* Main thread, once, when the model is loaded: what jobs are drawn under. Without it none is admitted. */
void worker_set_safety(struct worker *w, struct safety *s);
/* Main thread, when READY: the devices as the safety manager takes them. Returns how many. */
int worker_safety_devices(struct worker *w, struct safety_device *out);
/* After jobs_end: waits for the threads. Takes a worker that never started. */
void worker_join(struct worker *w);
/* After worker_join and safety_close: closes models and backends. */
void worker_close(struct worker *w);

enum worker_state worker_state(const struct worker *w);
const struct serving *worker_serving(const struct worker *w); /* NULL until the model is loaded */
struct safety *worker_safety(const struct worker *w);         /* NULL until it is open */

/* ---- device thread ---- */

/* What clients may ask for: the operator's bounds, where he gave some, else the model's. E_ARG when they do not fit each other. */
MUST_CHECK int worker_limits(const struct worker *w, const struct model_info *info, struct request_limits *l, struct err *e);
/* The device has loaded; the last to say so makes the worker READY, when all have loaded the same. */
void worker_loaded(struct worker *w, struct device *d);
/* The device cannot go on: the worker is FAILED with the first such reason, and admits no more jobs. */
void worker_fail(struct worker *w, const struct device *d, const struct err *why);

#endif
