/*
 * async.c - see async.h.
 */
#include "server/async.h"

#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/drawing.h"
#include "server/log.h"
#include "server/native.h"

enum { ROOM_MS = 50 /* between two looks whether the table has room for the backlog */ };

/* What the service holds for a job in the table, from its acceptance to the record of its end. */
struct running {
  struct async *a;
  struct job *job;
  struct store_op start, end;
};

int async_make_id(char id[ASYNC_ID + 1], struct err *e)
{
  unsigned char random[12];

  if (sodium_init() < 0)
    return err_set(e, E_INTERNAL, "libsodium does not start");
  randombytes_buf(random, sizeof random);
  memcpy(id, "job_", 4);
  sodium_bin2hex(id + 4, 25, random, sizeof random);
  return 0;
}

/* Store thread. An attempt that was not counted is no reason to stop drawing. */
static void started(struct store_op *op)
{
  if (op->err.code)
    log_event("the start of %s was not recorded: %s", op->job.id, op->err.msg);
}

/* Device thread: the job was taken. */
static void on_taken(void *arg)
{
  struct running *r = arg;

  store_submit(r->a->store, &r->start);
}

/* Store thread: its end is recorded, or cannot be before the next start. The files were the store's until now. */
static void ended(struct store_op *op)
{
  struct running *r = op->arg;

  if (op->err.code)
    log_event("the end of %s is not recorded, it will be drawn again: %s", op->job.id, op->err.msg);
  job_release(r->a->jobs, r->job);
  free(r);
}

/* How it ended, in the store's words. */
static void describe_end(struct store_job *s, const struct job *j)
{
  s->state = !j->err.code ? STORE_SUCCEEDED : j->err.code == E_CANCEL ? STORE_CANCELLED : STORE_FAILED;
  snprintf(s->generation_id, sizeof s->generation_id, "%s", j->stamp.id);
  snprintf(s->generation_digest, sizeof s->generation_digest, "%s", j->stamp.digest);
  if (j->err.code) {
    snprintf(s->error_code, sizeof s->error_code, "%s", openai_error_name(j->err.code, j->err.field));
    snprintf(s->error_text, sizeof s->error_text, "%s", j->err.msg);
    return;
  }
  s->answer = j->body.p;
  s->n_files = j->req.n;
  for (int i = 0; i < j->req.n; i++)
    s->file[i] = (struct store_file){.format = j->req.format, .data = j->file[i].p, .bytes = j->file[i].len};
}

/* Whoever made the job DONE. What the server's end or the device's interrupted is not the job's failure. */
static void on_done(void *arg)
{
  struct running *r = arg;
  struct job *j = r->job;

  r->end.verb = j->err.code == E_NOTREADY ? STORE_PUT_BACK : STORE_FINISH;
  if (j->err.code == E_DEVICE) { /* it stays RUNNING there: the next start counts the attempt */
    job_release(r->a->jobs, j);
    free(r);
    return;
  }
  describe_end(&r->end.job, j);
  store_submit(r->a->store, &r->end);
}

int async_adopt(struct async *a, struct job *j, struct err *e)
{
  struct running *r = calloc(1, sizeof *r);

  if (!r)
    return err_set(e, E_NOMEM, "out of memory for a job");
  *r = (struct running){.a = a, .job = j};
  r->start = (struct store_op){.verb = STORE_START, .done = started};
  r->end = (struct store_op){.done = ended, .arg = r};
  snprintf(r->start.job.id, sizeof r->start.job.id, "%s", j->id);
  snprintf(r->end.job.id, sizeof r->end.job.id, "%s", j->id);
  j->taken = on_taken;
  j->wake = on_done;
  j->wake_arg = r;
  return 0;
}

void async_drop(struct async *a, struct job *j)
{
  free(j->wake_arg);
  job_release(a->jobs, j);
}

void async_begin(struct async *a, struct job *j, int pending)
{
  if (pending)
    worker_prepare(a->worker, j);
  else
    job_submit(a->jobs, j);
}

/* ---- the backlog ---- */

static void nap(void)
{
  nanosleep(&(struct timespec){.tv_nsec = ROOM_MS * 1000000L}, NULL);
}

/* The job cannot be drawn any more, and whoever asks is told why. */
static void give_up(struct async *a, const struct store_job *s, const struct err *why)
{
  struct store_op op = {.verb = STORE_FINISH};
  struct err e = {0};

  memcpy(op.job.id, s->id, sizeof op.job.id);
  op.job.state = STORE_FAILED;
  snprintf(op.job.error_code, sizeof op.job.error_code, "%s", openai_error_name(why->code, why->field));
  snprintf(op.job.error_text, sizeof op.job.error_text, "%s", why->msg);
  if (store_run(a->store, &op, &e))
    log_event("the end of %s is not recorded: %s", s->id, e.msg);
  store_job_close(&op.found);
}

/* 1 when it is on its way or cannot ever be; 0: not now. */
static int feed(struct async *a, const struct store_job *s)
{
  struct drawing_who who = {.tenant = s->tenant, .seed = &s->seed};
  struct drawing_body body = {.p = s->body, .len = s->body_len, .type = s->type};
  struct err e = {0};
  struct first first;
  struct job *j;
  int pending = 0, r;

  if (job_reserve(a->jobs, &j, &e))
    return 0;
  snprintf(j->id, sizeof j->id, "%s", s->id);
  snprintf(j->caller, sizeof j->caller, "%s", *s->tenant ? s->tenant : "backlog");
  first_init(&first);
  r = drawing_read(j, &native_drawing, &first, &body, worker_serving(a->worker), worker_safety(a->worker), &who, &pending, &e);
  if (!r) {
    j->weight = (double)safety_target_limits(j->target)->weight;
    j->priority = safety_target_limits(j->target)->priority;
    r = drawing_prepare(j, &first, worker_serving(a->worker), &e);
  }
  first_close(&first);
  if (!r && !async_adopt(a, j, &e)) {
    async_begin(a, j, pending);
    return 1;
  }
  job_release(a->jobs, j);
  if (e.code == E_POLICY || e.code == E_NOMEM || e.code == E_NOTREADY)
    return 0; /* the safety may become live, memory free */
  give_up(a, s, &e);
  return 1;
}

static void *run(void *arg)
{
  struct async *a = arg;
  struct store_op op = {.verb = STORE_NEXT};
  struct err e = {0};
  int64_t fed = 0;

  thread_self = THREAD_ASYNC;
  while (!atomic_load(&a->is_over) && !store_run(a->store, &op, &e)) {
    while (!atomic_load(&a->is_over) && !feed(a, &op.found))
      nap();
    op.job.seq = op.found.seq;
    store_job_close(&op.found);
    fed++;
  }
  if (e.code && e.code != E_NOTFOUND)
    log_event("unfinished jobs cannot be read: %s", e.msg);
  if (fed)
    log_event("%lld unfinished jobs of an earlier run are drawn again", (long long)fed);
  return NULL;
}

int async_open(struct async *a, struct jobs *js, struct worker *w, struct store *store, struct err *e)
{
  *a = (struct async){.jobs = js, .worker = w, .store = store};
  if (thread_start(&a->thread, "async", run, a, e))
    return e->code;
  a->is_running = 1;
  return 0;
}

void async_stop(struct async *a)
{
  atomic_store(&a->is_over, 1);
  if (a->is_running)
    pthread_join(a->thread, NULL);
  a->is_running = 0;
}

void async_close(struct async *a)
{
  async_stop(a);
  *a = (struct async){0};
}
