/*
 * device.h - one device: its thread opens the backend, loads the model, and draws the jobs that it takes from the one queue.
 *
 * The model loads after the port listens, and what a backend compiles is made, so that /readyz can tell. Up to `running` pictures are alive at once; each
 * tick up to `batch` of them, chosen by fair.h, make one step together, so that a new one joins at the next step and leaves when it is done. Stop requests are
 * obeyed between steps. Text encoding, decoding and previews are the stage thread's. A job stays on the device that took it: its generation, its latents and
 * its pictures are that device's. Which device draws a picture changes nothing in it, where they are of one kind.
 *
 * Called by worker.c. Threads: its own, but for start, join and close; what others may read says so.
 */
#ifndef SAFELIGHT_SERVER_DEVICE_H
#define SAFELIGHT_SERVER_DEVICE_H

#include <pthread.h>

#include "kernels/backend.h"
#include "models/batch.h"
#include "models/pipeline.h"
#include "server/config.h"
#include "server/job.h"
#include "server/stage.h"

struct worker;

struct device {
  struct worker *worker;
  int at;                   /* its place among worker.device; its desk (job.h); its place in the lists of the safety manager */
  int number;               /* what the operator calls it: which GPU */
  const struct config *cfg; /* the worker's, as is the next */
  struct jobs *jobs;
  struct desk *desk;        /* its own in jobs */
  pthread_t thread;
  int is_running;           /* thread exists; main */
  /* written before the worker is told that the device is ready (worker_loaded), fixed after */
  struct be be;
  struct model *model;
  struct stage stage;
  struct batch *batch;
  int batch_max;            /* pictures in one step */
  int running;              /* pictures alive at once: the operator's number, or fewer where its memory holds no more */
  struct device_plan {
    int64_t weights, activations, working; /* bytes that stay set aside on it; working: the backend's own, 0 where it has none */
    int64_t picture;        /* of the largest picture, while it is alive */
  } plan;
  /* device thread */
  struct picture *ready[JOB_ALIVE_MAX]; /* started, with steps left, not with the stage thread */
  int n_ready, alive;       /* alive: ready, or with the stage thread */
  uint64_t tick;
  struct job *filling;      /* RUNNING, with pictures not yet started */
  long plans_logged;        /* of the backend's, found and compiled */
};

/* Starts the thread, which loads the model and tells the worker how that went. worker_init has filled in who it is. */
MUST_CHECK int device_start(struct device *d, struct err *e);
/* After jobs_end: waits for the thread. Takes one that never started. */
void device_join(struct device *d);
/* After device_join and safety_close: closes model and backend. */
void device_close(struct device *d);

/* ---- device_load.c, for device.c; device thread ---- */

/* Opens and loads everything and makes it ready, but for the stage thread, which device.c starts. On failure device_close frees what there is. */
MUST_CHECK int device_load(struct device *d, struct err *e);
/* Says once for every spell of work whether the folder of plans had what was asked for: compiled ones cost seconds and are kept. */
void device_log_plans(struct device *d);

#endif
