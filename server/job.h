/*
 * job.h - one request on its way through the server, and the bounded queue that all of them wait in.
 *
 * Jobs are entries of a fixed array. Who may touch a job follows from its state alone; the transitions are these functions:
 *
 *      FREE --job_reserve--> RESERVED --job_submit--> QUEUED --job_take--> RUNNING --job_drawn--> DRAWN --job_finish--> DONE
 *       ^                       | |                   ^ |                   | |                                          |
 *       |                       | +-job_prepare-> PREPARING <-job_prepare---+ |                                          |
 *       |                       |                       | job_stop        job_fail (PREPARING too)                       |
 *       |                       |                       +---------------------+------------------------------> DONE      |
 *       +---------------------- job_release -----------------------------------------------------------------------------+
 *
 *      state     belongs to       what may be trusted
 *      FREE      the table        nothing
 *      RESERVED  HTTP thread      it counts against the queue's bound; the HTTP thread decodes the body into it
 *      PREPARING loader thread    request, pictures and recipe are complete; the generation that it needs is being composed; stop may be set
 *      QUEUED    the queue        request, pictures and recipe are complete; nothing is started
 *      RUNNING   device thread    pixels appear; stop may be set by others and is obeyed at the next step
 *      DRAWN     encoder thread   all pixels are there and no draw is alive; it can no longer be stopped
 *      DONE      HTTP thread      either err.code or the answer in body; the owner was woken once
 *
 * Only three fields are shared between threads: state and the queue links under the table's lock, and `stop`, which is atomic.
 * wake is called once per job, without the lock, by whoever makes it DONE.
 *
 * Called by http.c, worker.c, encode.c, watch.c, serve.c. Threads: as the states say.
 */
#ifndef SAFELIGHT_SERVER_JOB_H
#define SAFELIGHT_SERVER_JOB_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"
#include "models/pipeline.h"
#include "proto/openai.h"
#include "proto/request.h"
#include "server/safety.h"
#include "server/thread.h"

enum job_state { JOB_FREE, JOB_RESERVED, JOB_PREPARING, JOB_QUEUED, JOB_RUNNING, JOB_DRAWN, JOB_DONE };

enum { JOB_ID_MAX = 64 };

struct picture {
  struct draw *draw;   /* prepared on the HTTP thread, alive on the device thread, NULL once decoded */
  uint8_t *rgb;        /* width*height*3, inside job.pixels */
  uint64_t seed;
};

struct job {
  enum job_state state;           /* lock */
  struct jobs *jobs;              /* the table that it is in */
  struct job *next;               /* lock: free list, queue or drawn list */
  uint64_t serial;                /* changes with every use of the entry, so that a late job_stop meets no stranger */
  _Atomic int stop;               /* 0, or the E_* why it must end */

  char id[JOB_ID_MAX + 1];        /* x-request-id */
  struct request req;
  enum sampler_kind sampler;
  int karras;
  int wants_png;                  /* the picture itself instead of JSON */
  char styles[REQUEST_LORAS_MAX * (REQUEST_LORA_NAME + 16)]; /* "name:weight name:weight", for people */
  struct picture pic[REQUEST_N_MAX];
  uint8_t *pixels;
  int tokens;                     /* of the prompt */
  struct safety_target *target;   /* what it is to be drawn under; a reference */
  struct generation *generation;  /* pinned by the device thread when it starts the job, a reference until the job is drawn */
  struct safety_stamp stamp;      /* of what was pinned; id "" before */
  int started, live, drawn;       /* pictures; device thread */
  int steps_done;                 /* of all pictures; device thread */

  int64_t submitted_ns, taken_ns; /* clock_ns() */
  struct stage_times times;       /* ms; text, unet and vae summed over the pictures */

  struct err err;
  struct buf body;                /* the answer */

  void (*wake)(void *arg);
  void *wake_arg;
};

struct jobs {
  struct lock lock;
  pthread_cond_t has_work, has_drawn;
  struct job *job;                /* n entries */
  int n;
  struct job *free;
  struct job *queue, **queue_end; /* QUEUED, oldest first */
  struct job *done, **done_end;   /* DRAWN, oldest first */
  int waiting, max_waiting;       /* RESERVED and QUEUED */
  int active;                     /* everything that is not FREE */
  int is_closed;                  /* job_reserve refuses with E_NOTREADY */
  int is_over;                    /* job_take and job_next_drawn return NULL when there is nothing left */
  uint64_t serial;
  double mean_ms;                 /* what a job takes on the device, smoothed */
};

/* max_waiting jobs may wait while `running` pictures are drawn. E_NOMEM. jobs_close after. */
MUST_CHECK int jobs_open(struct jobs *js, int max_waiting, int running, struct err *e);
void jobs_close(struct jobs *js); /* takes zeroed; every job is FREE and no thread uses it */

/* HTTP thread. E_BUSY when the queue is full, E_NOTREADY when the server stops. On success the job is the caller's until
 * job_submit or job_release. */
MUST_CHECK int job_reserve(struct jobs *js, struct job **j, struct err *e);
void job_submit(struct jobs *js, struct job *j); /* loader thread: what it was given to prepare */
/* HTTP thread, or the device thread with a job that it cannot start yet: the loader is asked next, and hands it to job_submit or job_fail. */
void job_prepare(struct jobs *js, struct job *j);
/* HTTP thread. Frees pixels, body and draws that never started. */
void job_release(struct jobs *js, struct job *j);

/* Device thread: the oldest waiting job. wait: sleep until there is one; NULL then means that it is all over. */
struct job *job_take(struct jobs *js, int wait);
void job_drawn(struct jobs *js, struct job *j);
void job_fail(struct jobs *js, struct job *j); /* j->err says why; loader thread too */

/* Encoder thread: the oldest drawn job, sleeping until there is one; NULL: it is all over. */
struct job *job_next_drawn(struct jobs *js);
void job_finish(struct jobs *js, struct job *j); /* body is the answer, unless j->err says what went wrong */

/* Any thread: ends the job that had this serial, now when it waits, at the next step when it runs. */
void job_stop(struct jobs *js, struct job *j, uint64_t serial, int code);

/* Main thread, at the end: admit no more; stop all with E_NOTREADY; let the device and encoder threads return. */
void jobs_refuse(struct jobs *js);
void jobs_stop_all(struct jobs *js, int code);
void jobs_end(struct jobs *js);

int jobs_active(struct jobs *js);        /* how many are not FREE */
int jobs_retry_after(struct jobs *js);   /* seconds until a place is likely, 1..60 */
/* The sentence for a client whose job was stopped with this code. */
int job_stop_reason(struct err *e, int code);

#endif
