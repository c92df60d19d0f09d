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

enum { ROOM_MS = 50 /* between two looks whether the table has room for the backlog */, ROUND_MS = 500 /* between two tries of what cannot be drawn yet */ };

/* What the service holds for a job in the table, from its acceptance to the record of its end. */
struct running {
  struct async *a;
  struct job *job;
  uint64_t serial;           /* of the job: a late START meets no stranger */
  _Atomic int refs;          /* the job's, and that of a START on its way */
  struct store_op start, end;
};

static void running_unref(struct running *r)
{
  if (atomic_fetch_sub(&r->refs, 1) == 1)
    free(r);
}

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

/* Store thread. An attempt that was not counted is no reason to stop drawing; a job that had ended before, such as one of the backlog that was cancelled
 * while it was fed, is drawn for nobody. */
static void started(struct store_op *op)
{
  struct running *r = op->arg;

  if (op->err.code == E_NOTFOUND)
    job_stop(r->a->jobs, r->job, r->serial, E_CANCEL);
  else if (op->err.code)
    log_event("the start of %s was not recorded: %s", op->job.id, op->err.msg);
  running_unref(r);
}

/* Device thread: the job was taken. */
static void on_taken(void *arg)
{
  struct running *r = arg;

  atomic_fetch_add(&r->refs, 1);
  store_submit(r->a->store, &r->start);
}

/* How it failed, in the store's words. */
static void describe_failure(struct store_job *s, const struct err *why)
{
  s->state = why->code == E_CANCEL ? STORE_CANCELLED : STORE_FAILED;
  s->answer = NULL;
  s->n_files = 0;
  snprintf(s->error_code, sizeof s->error_code, "%s", openai_error_name(why->code, why->field));
  snprintf(s->error_text, sizeof s->error_text, "%s", why->msg);
}

/* Store thread: its end is recorded, or cannot be before the next start. The files were the store's until now. */
static void ended(struct store_op *op)
{
  struct running *r = op->arg;
  struct err why = op->err;

  if (why.code == E_TOOBIG && op->job.n_files) { /* its files can never be kept: then that is how it ended */
    describe_failure(&op->job, &why);
    store_submit(r->a->store, op);
    return;
  }
  if (why.code && !(op->verb == STORE_PUT_BACK && why.code == E_NOTFOUND)) /* a job that never started is queued as it is */
    log_event("the end of %s is not recorded, it will be drawn again: %s", op->job.id, why.msg);
  job_release(r->a->jobs, r->job);
  running_unref(r);
}

/* How it ended, in the store's words. */
static void describe_end(struct store_job *s, const struct job *j)
{
  snprintf(s->generation_id, sizeof s->generation_id, "%s", j->stamp.id);
  snprintf(s->generation_digest, sizeof s->generation_digest, "%s", j->stamp.digest);
  if (j->err.code) {
    describe_failure(s, &j->err);
    return;
  }
  s->state = STORE_SUCCEEDED;
  s->answer = j->body.p;
  s->n_files = j->req.n;
  for (int i = 0; i < j->req.n; i++)
    s->file[i] = (struct store_file){.format = j->req.format, .data = j->file[i].p, .bytes = j->file[i].len};
}

/* A line as a request's, with the job's id. */
static void log_end(const struct async *a, const struct job *j)
{
  struct log_request l = {
      .id = j->id,
      .method = "JOB",
      .path = "/v1/jobs",
      .error = j->err.code ? j->err.msg : "",
      .status = j->err.code ? openai_status(j->err.code) : 200,
      .times = &j->times,
      .n = j->req.n,
      .width = j->req.width,
      .height = j->req.height,
      .steps = atomic_load(&j->steps_done),
      .prompt = a->worker->cfg->log_prompts ? j->req.prompt : NULL,
      .total_ms = (double)(clock_ns() - j->submitted_ns) / 1e6,
  };

  log_request(&l);
}

/* Whoever made the job DONE. What the server's end or the device's interrupted is not the job's failure. */
static void on_done(void *arg)
{
  struct running *r = arg;
  struct job *j = r->job;
  int code = j->err.code;

  log_end(r->a, j);
  if (code)
    drawing_refused(r->a->audit, j->target, "", j->id, &j->err);
  if (code == E_DEVICE) { /* it stays RUNNING there: the next start counts the attempt */
    job_release(r->a->jobs, j);
    running_unref(r);
    return;
  }
  r->end.verb = code == E_NOTREADY ? STORE_PUT_BACK : STORE_FINISH;
  describe_end(&r->end.job, j);
  store_submit(r->a->store, &r->end);
}

int async_adopt(struct async *a, struct job *j, struct err *e)
{
  struct running *r = calloc(1, sizeof *r);

  if (!r)
    return err_set(e, E_NOMEM, "out of memory for a job");
  *r = (struct running){.a = a, .job = j, .serial = j->serial, .refs = 1};
  r->start = (struct store_op){.verb = STORE_START, .done = started, .arg = r};
  r->end = (struct store_op){.done = ended, .arg = r};
  snprintf(r->start.job.id, sizeof r->start.job.id, "%s", j->id);
  snprintf(r->end.job.id, sizeof r->end.job.id, "%s", j->id);
  j->is_durable = 1;
  j->taken = on_taken;
  j->wake = on_done;
  j->wake_arg = r;
  return 0;
}

void async_drop(struct async *a, struct job *j)
{
  running_unref(j->wake_arg);
  job_release(a->jobs, j);
}

void async_begin(struct async *a, struct job *j, int pending)
{
  worker_accept(a->worker, j, pending);
}

/* ---- the backlog ---- */

enum fed { FED, FED_LATER };

static void nap(int ms)
{
  nanosleep(&(struct timespec){.tv_nsec = ms * 1000000L}, NULL);
}

static void gave_up(struct store_op *op)
{
  if (op->err.code)
    log_event("the end of %s is not recorded: %s", op->job.id, op->err.msg);
  free(op);
}

/* The job cannot be drawn any more, and whoever asks is told why. Nobody waits for the record: there may be no room for it now. */
static enum fed give_up(struct async *a, const struct store_job *s, const struct safety_target *t, const struct err *why)
{
  struct store_op *op = calloc(1, sizeof *op);

  if (!op)
    return FED_LATER;
  *op = (struct store_op){.verb = STORE_FINISH, .done = gave_up};
  memcpy(op->job.id, s->id, sizeof op->job.id);
  describe_failure(&op->job, why);
  log_event("%s cannot be drawn any more: %s", s->id, why->msg);
  drawing_refused(a->audit, t, s->tenant, s->id, why);
  store_submit(a->store, op);
  return FED;
}

/* The backlog takes half of the queue at most: who comes now does not wait behind all that an earlier run left. */
static int wait_for_room(struct async *a)
{
  struct jobs *js = a->jobs;
  int waiting;

  while (!atomic_load(&a->is_over)) {
    waiting = jobs_count(js).waiting;
    if (!waiting || waiting * 2 < js->max_waiting)
      return 1;
    nap(ROOM_MS);
  }
  return 0;
}

/* Body to job, as images_build makes one; there are no limits for what was accepted before. */
static int build(struct async *a, const struct store_job *s, struct job *j, int *pending, struct err *e)
{
  struct drawing_who who = {.tenant = s->tenant, .seed = &s->seed};
  struct drawing_body body = {.p = s->body, .len = s->body_len, .type = s->type};
  int r;

  snprintf(j->id, sizeof j->id, "%s", s->id);
  snprintf(j->caller, sizeof j->caller, "%s", *s->tenant ? s->tenant : "backlog");
  r = drawing_read(j, &native_drawing, &body, worker_serving(a->worker), worker_safety(a->worker), &who, pending, e);
  if (!r) {
    j->weight = (double)safety_target_limits(j->target)->weight;
    j->priority = safety_target_limits(j->target)->priority;
    r = drawing_prepare(j, worker_serving(a->worker), e);
  }
  first_close(&j->first); /* it borrows from the store's body */
  return r ? r : async_adopt(a, j, e);
}

static enum fed feed(struct async *a, const struct store_job *s)
{
  struct err e = {0};
  enum fed r = FED_LATER;
  uint64_t serial;
  struct job *j;
  int pending = 0;

  if (job_find(a->jobs, s->id, &serial)) /* fed in an earlier round */
    return FED;
  if (job_reserve(a->jobs, &j, &e))
    return FED_LATER;
  if (!build(a, s, j, &pending, &e)) {
    async_begin(a, j, pending);
    return FED;
  }
  if (e.code != E_POLICY && e.code != E_NOMEM && e.code != E_NOTREADY) /* the safety may become live, memory free */
    r = give_up(a, s, j->target, &e);
  job_release(a->jobs, j);
  return r;
}

/* Feeds what can be drawn now, in order of arrival. Returns how many could not. */
static int feed_round(struct async *a, struct err *e)
{
  struct store_op op = {.verb = STORE_NEXT};
  int later = 0;

  while (wait_for_room(a) && !store_run(a->store, &op, e)) {
    later += feed(a, &op.found) == FED_LATER;
    op.job.seq = op.found.seq;
    store_job_close(&op.found);
  }
  return later;
}

static void *run(void *arg)
{
  struct async *a = arg;
  int later, was_failing = 0, is_failing;

  thread_self = THREAD_ASYNC;
  do {
    struct err e = {0};
    later = feed_round(a, &e);
    is_failing = e.code && e.code != E_NOTFOUND;
    if (is_failing && !was_failing)
      log_event("unfinished jobs cannot be read, which is tried again: %s", e.msg);
    was_failing = is_failing;
    for (int ms = 0; (later || is_failing) && ms < ROUND_MS && !atomic_load(&a->is_over); ms += ROOM_MS)
      nap(ROOM_MS);
  } while ((later || is_failing) && !atomic_load(&a->is_over));
  return NULL;
}

int async_open(struct async *a, struct jobs *js, struct worker *w, struct store *store, struct audit *audit, struct err *e)
{
  *a = (struct async){.jobs = js, .worker = w, .store = store, .audit = audit};
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
