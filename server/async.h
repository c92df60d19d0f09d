/*
 * async.h - durable jobs: what was accepted with 202 is drawn, or reported as failed, also after kill -9.
 *
 * The store (store.h) keeps the truth; the job table draws. A durable job's way:
 *
 *      HTTP thread   body to job (drawing.h), STORE_ADD, and only when that is on the disk: the job is handed over here, and 202
 *      device        takes it: STORE_START
 *      encoder       its files are there: STORE_FINISH with them; failures and cancellations too
 *      store         recorded: the entry of the table is free again
 *
 * A job that the server's end interrupts is put back and drawn after the next start, with the same bytes. The backlog of a start is fed into the table
 * by a thread of its own, as there is room; what cannot be drawn yet (its safety is not live) is passed by and tried again.
 *
 * Called by native.c, serve.c. Threads: as the table says; async_adopt on the HTTP thread, async_begin and
 * async_drop on the store's too.
 */
#ifndef SAFELIGHT_SERVER_ASYNC_H
#define SAFELIGHT_SERVER_ASYNC_H

#include <pthread.h>
#include <stdatomic.h>

#include "server/job.h"
#include "server/store.h"
#include "server/worker.h"

enum { ASYNC_ID = 28 /* "job_" and 24 hexadecimal digits */ };

struct async {
  struct jobs *jobs;
  struct worker *worker;
  struct store *store;
  struct audit *audit;
  pthread_t thread;        /* feeds the backlog */
  int is_running;
  _Atomic int is_over;
};

/* Main thread, when the safety manager is open. w's model and safety outlive it. async_close after, also after failure. */
MUST_CHECK int async_open(struct async *a, struct jobs *js, struct worker *w, struct store *store, struct audit *audit,
                          struct err *e);
/* Main thread: feeds no more. Before the last jobs are waited for. */
void async_stop(struct async *a);
void async_close(struct async *a); /* takes a zeroed one; every job is FREE */

/* A fresh id for a durable job. */
MUST_CHECK int async_make_id(char id[ASYNC_ID + 1], struct err *e);
/* j is built and RESERVED: the service will own it. E_NOMEM: it is still the caller's. Then one of: */
MUST_CHECK int async_adopt(struct async *a, struct job *j, struct err *e);
void async_begin(struct async *a, struct job *j, int pending); /* its row is in the store under j->id: it is drawn. pending: as drawing_build said */
void async_drop(struct async *a, struct job *j);               /* it is not: the entry is free again */

#endif
