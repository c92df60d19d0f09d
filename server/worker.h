/*
 * worker.h - the device thread: it opens the backend, loads the model, and draws.
 *
 * The model loads after the port listens, so that /readyz can tell. Up to `running` pictures are alive at once; each tick up to `batch` of them,
 * chosen by fair.h, make one step together, so that a new one joins at the next step and leaves when it is done. Stop requests are obeyed
 * between steps. Text encoding, decoding and previews are the stage thread's. Nobody else calls the engine, except for tokenising
 * (draw_prepare, HTTP thread) and reading model_info.
 *
 * Called by serve.c (init, start, stop), http.c (state). Threads: worker_state, worker_serving from any; the rest is in worker.c.
 */
#ifndef SAFELIGHT_SERVER_WORKER_H
#define SAFELIGHT_SERVER_WORKER_H

#include <pthread.h>
#include <stdatomic.h>

#include "kernels/backend.h"
#include "models/batch.h"
#include "models/pipeline.h"
#include "server/config.h"
#include "server/job.h"
#include "server/safety.h"
#include "server/stage.h"

#define WORKER_PLANS "plans" /* folder in the state folder, for what a backend compiles */

enum { WORKER_BATCH = 8 /* pictures in one step, when the operator does not say */ };

enum worker_state { WORKER_LOADING, WORKER_READY, WORKER_FAILED };

/* What a loaded model lets clients do; immutable once published. */
struct serving {
  struct model *model;
  const struct model_info *info;
  struct request_limits limits;
  int64_t loaded_s;       /* seconds since 1970 */
  char backend[160];      /* for people */
};

struct worker {
  const struct config *cfg;
  struct jobs *jobs;
  int event_fd;             /* written when state changes */
  pthread_t thread;
  int is_running;           /* thread exists; main */
  struct be be;
  char plan_cache[CONFIG_TEXT + 16]; /* the backend's folder for what it compiles; "" for one that compiles nothing */
  struct serving serving;
  _Atomic int state;
  struct safety *_Atomic safety; /* NULL until main has opened it over the loaded model */
  struct err why;           /* of WORKER_FAILED; written before state */
  struct stage stage;
  struct batch *batch;
  int batch_max;            /* pictures in one step */
  long plans_logged;        /* of the backend's, found and compiled */
  /* device thread */
  struct picture *ready[JOB_ALIVE_MAX]; /* started, with steps left, not with the stage thread */
  int n_ready, alive;       /* alive: ready, or with the stage thread */
  uint64_t tick;
  struct job *filling;      /* RUNNING, with pictures not yet started */
};

/* Before any other thread sees w. Main hears of every change of state through event_fd. */
void worker_init(struct worker *w, const struct config *cfg, struct jobs *js, int event_fd);
/* Starts the thread, which loads the model. */
MUST_CHECK int worker_start(struct worker *w, struct err *e);
/* HTTP and device thread: asks the loader to compose what the job needs; it comes back through job_submit or job_fail. */
void worker_prepare(struct worker *w, struct job *j);
/* A job that is complete goes its way: to the loader when a generation is to be composed first (pending, as drawing_read said), else into the queue. */
void worker_accept(struct worker *w, struct job *j, int pending);
/* Main thread, once, when the model is loaded: what jobs are drawn under. Without it none is admitted. */
void worker_set_safety(struct worker *w, struct safety *s);
/* After jobs_end: waits for the thread. Takes a worker that never started. */
void worker_join(struct worker *w);
/* After worker_join and safety_close: closes model and backend. */
void worker_close(struct worker *w);

enum worker_state worker_state(const struct worker *w);
const struct serving *worker_serving(const struct worker *w); /* NULL until the model is loaded */
struct safety *worker_safety(const struct worker *w);         /* NULL until it is open */

#endif
