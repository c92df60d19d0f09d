/*
 * native.c - see native.h.
 *
 * What is known of a job lies in the store; what happens to it now, in the job table. Each route asks the store first, which also says whether the job
 * is the asker's, and then looks at the table. The connection sleeps while the store works.
 */
#include "server/native.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "proto/jobs.h"
#include "server/async.h"
#include "server/metrics.h"
#include "server/openai.h"

enum { KEY_MAX = 255, LIST_MAX = 100, LIST_DEFAULT = 20 };

static const int64_t EVENT_ID_MAX = (int64_t)1 << 53; /* what every client can count to */

/* ---- asking the store ---- */

/* A question to the store. It may outlive its exchange, when the reader of a stream leaves. */
struct asked {
  struct store_op op;
  struct http *h;
  struct exchange *x;  /* job table's lock; NULL: nobody waits any more */
  int is_sent;
  int is_done;         /* job table's lock */
  struct job *job;     /* ADD: drawn once it is in the store */
  int pending;         /* ADD: a generation is to be composed first */
  struct buf note;     /* ADD: the metadata */
};

static void asked_free(struct asked *a)
{
  if (!a)
    return;
  store_job_close(&a->op.found);
  for (int i = 0; i < a->op.listed; i++)
    store_job_close(&a->op.list[i]);
  free(a->op.list);
  if (a->op.fd >= 0)
    close(a->op.fd);
  buf_close(&a->note);
  free(a);
}

/* Store thread. A job that was added is on its way from here on, whether or not its client still waits. */
static void on_answer(struct store_op *op)
{
  struct asked *a = op->arg;
  struct http *h = a->h;

  if (a->job && !op->err.code && !op->is_existing)
    async_begin(h->async, a->job, a->pending);
  else if (a->job)
    async_drop(h->async, a->job);
  lock_take(&h->jobs->lock);
  a->is_done = 1;
  if (a->x)
    exchange_wake(a->x);
  else
    op = NULL;
  lock_drop(&h->jobs->lock);
  if (!op)
    asked_free(a);
  atomic_fetch_sub(&h->asking, 1);
}

/* A question about this job, of this exchange, ready to be sent. NULL: out of memory. */
static struct asked *ask(struct exchange *x, enum store_verb verb, const char *tenant, const char *id)
{
  struct asked *a = calloc(1, sizeof *a);

  if (!a)
    return NULL;
  asked_free(x->asked);
  x->asked = a;
  a->h = x->h;
  a->x = x;
  buf_init(&a->note, OPENAI_METADATA_MAX + 1);
  a->op = (struct store_op){.verb = verb, .fd = -1, .done = on_answer, .arg = a};
  snprintf(a->op.job.tenant, sizeof a->op.job.tenant, "%s", tenant);
  snprintf(a->op.job.id, sizeof a->op.job.id, "%s", id);
  return a;
}

/* The same question once more. */
static struct asked *ask_again(struct exchange *x)
{
  struct store_job was = x->asked->op.job;

  return ask(x, x->asked->op.verb, was.tenant, was.id);
}

static void submit(struct asked *a)
{
  a->is_sent = 1;
  atomic_fetch_add(&a->h->asking, 1);
  store_submit(a->h->async->store, &a->op);
}

/* The connection sleeps until the store has answered, and goes on with then. */
static enum MHD_Result wait_for(struct exchange *x, struct asked *a, enum MHD_Result (*then)(struct exchange *x))
{
  x->then = then;
  if (!exchange_sleep(x)) /* then there is no job that waits for its ADD: the server ends after the last */
    return MHD_NO;
  submit(a);
  return MHD_YES;
}

void native_close(struct exchange *x)
{
  struct asked *a = x->asked;

  if (!a)
    return;
  lock_take(&x->h->jobs->lock);
  if (a->is_sent && !a->is_done) { /* on_answer frees it */
    a->x = NULL;
    a = NULL;
  }
  lock_drop(&x->h->jobs->lock);
  asked_free(a);
  x->asked = NULL;
}

static enum MHD_Result fail(struct exchange *x, const struct err *e)
{
  x->err = *e;
  return send_error(x);
}

static enum MHD_Result fail_memory(struct exchange *x)
{
  return fail(x, &(struct err){.code = E_NOMEM, .msg = "out of memory for the request"});
}

/* Whose jobs this asker may see: the tenant's name, "" for who shows no key. E_AUTH. */
static int find_tenant(struct exchange *x, char tenant[POLICY_NAME], struct err *e)
{
  struct safety_target *t;

  if (exchange_target(x, &t, e)) /* without safety nothing is drawn, but jobs are told of */
    return e->code;
  snprintf(tenant, POLICY_NAME, "%s", safety_target_tenant(t));
  safety_target_unref(t);
  return 0;
}

/* Asks for the job that the path names. */
static enum MHD_Result find_job(struct exchange *x, enum MHD_Result (*then)(struct exchange *x))
{
  char tenant[POLICY_NAME];
  struct err e = {0};
  struct asked *a;

  if (!x->h->async)
    return fail(x, &(struct err){.code = E_NOTREADY, .msg = "the model is still loading"});
  if (find_tenant(x, tenant, &e))
    return fail(x, &e);
  a = ask(x, STORE_FIND, tenant, x->arg[0]);
  return a ? wait_for(x, a, then) : fail_memory(x);
}

/* ---- what is told of a job ---- */

static void add_live(struct jobs_view *v, const struct job_view *now)
{
  int each = now->pictures ? now->steps / now->pictures : 0;
  int at = now->steps_done < now->steps ? now->steps_done : now->steps; /* pictures of a job are drawn side by side: told as if one after the other */
  int picture = each && at ? (at - 1) / each : 0;

  v->status = now->state >= JOB_RUNNING ? JOBS_RUNNING : JOBS_QUEUED;
  v->queue_position = now->position - 1;
  v->wait_s = now->position ? now->wait_s : -1;
  v->progress = (struct jobs_progress){.step = at - picture * each, .steps = each, .picture = picture, .pictures = now->pictures};
}

/* The store's record. err has room for the failure. */
static struct jobs_view recorded(const struct store_job *s, struct err *err)
{
  struct jobs_view v = {
      .id = s->id,
      .status = (enum jobs_status)s->state,
      .created = s->created_ms / 1000,
      .started = s->started_ms / 1000,
      .finished = s->finished_ms / 1000,
      .queue_position = -1,
      .wait_s = -1,
      .body = s->body,
      .len = s->body_len,
      .metadata = s->note && *s->note ? s->note : NULL,
      .result = s->answer && *s->answer ? s->answer : NULL,
  };

  if (s->state == STORE_FAILED || s->state == STORE_CANCELLED) {
    *err = (struct err){.code = s->state == STORE_CANCELLED ? E_CANCEL : openai_error_code(s->error_code)};
    snprintf(err->msg, sizeof err->msg, "%s", *s->error_text ? s->error_text : "the job was cancelled");
    v.err = err;
  }
  return v;
}

/* The same, and what the table says beside it. */
static struct jobs_view view_of(struct http *h, const struct store_job *s, struct err *err)
{
  struct jobs_view v = recorded(s, err);
  struct job_view now;
  uint64_t serial;
  struct job *j;

  if (s->state > STORE_RUNNING)
    return v;
  j = job_find(h->jobs, s->id, &serial);
  if (j && job_look(h->jobs, j, serial, 0, 0, &now)) {
    add_live(&v, &now);
    blob_unref(now.preview);
  }
  return v;
}

static enum MHD_Result send_view(struct exchange *x, int status, const struct store_job *s, int is_replay)
{
  struct err why, e = {0};
  struct jobs_view v = view_of(x->h, s, &why);
  struct MHD_Response *r;
  struct buf b;
  size_t len;

  buf_init(&b, 4 << 20);
  if (jobs_encode(&b, &v, &e)) {
    buf_close(&b);
    return fail(x, &e);
  }
  r = response_take(&b, &len);
  if (r)
    add_headerf(r, MHD_HTTP_HEADER_LOCATION, "/v1/jobs/%s", s->id);
  if (r && is_replay)
    add_header(r, "Idempotent-Replayed", "true");
  return send_answer(x, status, "application/json", r, len);
}

static enum MHD_Result send_found(struct exchange *x)
{
  struct store_op *op = &x->asked->op;

  return op->err.code ? fail(x, &op->err) : send_view(x, 200, &op->found, 0);
}

enum MHD_Result answer_job_get(struct exchange *x)
{
  return find_job(x, send_found);
}

/* ---- the list ---- */

static int encode_list(struct exchange *x, struct buf *b, struct err *e)
{
  const struct store_op *op = &x->asked->op;
  int n = op->listed < op->cap ? op->listed : op->cap - 1; /* one more was asked for, to know whether there is more */
  int r = jobs_list_begin(b, e);

  for (int i = 0; i < n && !r; i++) {
    struct err why = {0};
    struct jobs_view v = view_of(x->h, &op->list[i], &why);
    r = jobs_list_add(b, &v, e);
  }
  return r ? r : jobs_list_end(b, op->listed > n, e);
}

static enum MHD_Result send_list(struct exchange *x)
{
  struct err e = x->asked->op.err;
  struct buf b;

  buf_init(&b, 16 << 20);
  if (!e.code && !encode_list(x, &b, &e))
    return send_json(x, 200, &b);
  buf_close(&b);
  return fail(x, &e);
}

static const char *query(const struct exchange *x, const char *name)
{
  return MHD_lookup_connection_value(x->connection, MHD_GET_ARGUMENT_KIND, name);
}

/* What the list's query asks for: *wanted as struct store_op has it. */
static int read_query(const struct exchange *x, int *limit, int *wanted, const char **after, struct err *e)
{
  const char *text = query(x, "limit"), *status = query(x, "status");
  char *end;
  long n = LIST_DEFAULT;
  int state;

  if (text) {
    n = strtol(text, &end, 10);
    if (!*text || *end || n < 1 || n > LIST_MAX)
      return err_field(e, E_ARG, "limit", "limit must be a whole number from 1 to %d", LIST_MAX);
  }
  if (status) {
    state = jobs_status_find(status);
    if (state < 0)
      return err_field(e, E_ARG, "status", "status must be queued, running, succeeded, failed or cancelled");
    *wanted = 1 << state;
  }
  *limit = (int)n;
  *after = query(x, "after");
  return 0;
}

/* Only who shows a key has a list: strangers are not told apart, and a job's id is what shows that it is theirs. */
enum MHD_Result answer_job_list(struct exchange *x)
{
  char tenant[POLICY_NAME];
  const char *after = NULL;
  struct err e = {0};
  struct asked *a;
  int limit = 0, wanted = 0;

  if (!x->h->async)
    return fail(x, &(struct err){.code = E_NOTREADY, .msg = "the model is still loading"});
  if (find_tenant(x, tenant, &e) || read_query(x, &limit, &wanted, &after, &e))
    return fail(x, &e);
  if (!*tenant)
    return fail(x, &(struct err){.code = E_AUTH, .msg = "jobs are listed for API keys only: without one ask for a job by its id"});
  a = ask(x, STORE_LIST, tenant, after ? after : "");
  if (!a)
    return fail_memory(x);
  a->op.cap = limit + 1;
  a->op.wanted = wanted;
  a->op.list = calloc((size_t)a->op.cap, sizeof *a->op.list);
  return a->op.list ? wait_for(x, a, send_list) : fail_memory(x);
}

/* ---- POST ---- */

static enum MHD_Result send_accepted(struct exchange *x)
{
  struct asked *a = x->asked;

  if (a->op.err.code) {
    drawing_refused(x->h->audit, NULL, a->op.job.tenant, x->id, &a->op.err);
    return fail(x, &a->op.err);
  }
  if (!a->op.found.body) { /* what was asked for is told again once */
    a->op.found.body = x->body.p;
    a->op.found.body_len = x->body.len;
  }
  return send_view(x, a->op.is_existing ? 200 : 202, &a->op.found, a->op.is_existing);
}

/* The job is complete: it is accepted when it is in the store. */
static enum MHD_Result accept_job(struct exchange *x)
{
  const char *key = exchange_header(x, "Idempotency-Key");
  struct asked *a = NULL;
  struct job *j;

  if (async_make_id(x->job->id, &x->err) || async_adopt(x->h->async, x->job, &x->err))
    return images_refuse(x);
  j = x->job;
  x->job = NULL; /* the service's from here on */
  a = ask(x, STORE_ADD, safety_target_tenant(j->target), j->id);
  if (!a || jobs_metadata(&a->note, x->body.p, x->body.len, &x->err)) {
    async_drop(x->h->async, j);
    return a ? send_error(x) : fail_memory(x);
  }
  a->job = j;
  a->pending = x->pending;
  if (key) /* without a key of their own, strangers do not share the keys of idempotency */
    snprintf(a->op.job.key, sizeof a->op.job.key, "%s %s", j->caller, key);
  snprintf(a->op.job.profile, sizeof a->op.job.profile, "%s", safety_target_profile(j->target));
  snprintf(a->op.job.type, sizeof a->op.job.type, "application/json"); /* without parameters, which change nothing */
  a->op.job.note = a->note.p;
  a->op.job.body = x->body.p;
  a->op.job.body_len = x->body.len;
  a->op.job.seed = j->req.seed;
  a->op.job.priority = j->priority;
  return wait_for(x, a, send_accepted);
}

enum MHD_Result answer_job_post(struct exchange *x)
{
  const char *key = exchange_header(x, "Idempotency-Key");

  x->file_type = NULL; /* the answer is JSON whatever Accept says: the pictures come later */
  if (!x->h->async)
    err_set(&x->err, E_NOTREADY, "the model is still loading");
  else if (key && (!*key || strlen(key) > KEY_MAX))
    err_field(&x->err, E_ARG, "Idempotency-Key", "Idempotency-Key must have 1 to %d bytes", KEY_MAX);
  return x->err.code ? images_refuse(x) : images_build(x, accept_job);
}

static int decode_job(struct job *j, struct first *first, const struct drawing_body *b, const struct request_limits *lim, struct err *e)
{
  return openai_decode_job(&j->req, first, b->p, b->len, lim, e);
}

/* The result as POST /v1/images/generations answers it, with the addresses of the pictures. */
static int encode(struct job *j, const struct serving *s, struct err *e)
{
  char url[REQUEST_N_MAX][EXCHANGE_ARG_MAX + 32];
  const char *urls[REQUEST_N_MAX];

  for (int i = 0; i < j->req.n; i++) {
    snprintf(url[i], sizeof url[i], "/v1/jobs/%s/pictures/%d", j->id, i);
    urls[i] = url[i];
  }
  return openai_encode_job(j, s, urls, e);
}

const struct surface surface_native = {.name = "native", .encode = encode, .encode_error = openai_encode_error};
const struct drawing native_drawing = {.surface = &surface_native, .decode = decode_job};

/* ---- cancel ---- */

static enum MHD_Result send_cancelled(struct exchange *x)
{
  struct store_op *op = &x->asked->op;

  return op->err.code ? fail(x, &op->err) : send_view(x, op->found.state > STORE_RUNNING ? 200 : 202, &op->found, 0);
}

/* Stops the job in the table, if it is there; then the store is asked how it stands. */
static enum MHD_Result stop_and_look(struct exchange *x)
{
  uint64_t serial;
  struct job *j;

  if (x->asked->op.err.code)
    return fail(x, &x->asked->op.err);
  j = job_find(x->h->jobs, x->arg[0], &serial);
  if (j)
    job_stop(x->h->jobs, j, serial, E_CANCEL);
  return find_job(x, send_cancelled);
}

/* A job that runs ends at its next step, one that waits now; one of the backlog is recorded as cancelled before it is fed. */
static enum MHD_Result cancel_found(struct exchange *x)
{
  struct store_op *op = &x->asked->op;
  char tenant[STORE_WORD];
  struct asked *a;
  uint64_t serial;

  if (op->err.code || op->found.state > STORE_RUNNING)
    return send_cancelled(x);
  if (job_find(x->h->jobs, op->found.id, &serial))
    return stop_and_look(x);
  memcpy(tenant, op->job.tenant, sizeof tenant);
  a = ask(x, STORE_FINISH, tenant, x->arg[0]);
  if (!a)
    return fail_memory(x);
  a->op.job.state = STORE_CANCELLED;
  a->op.is_impatient = 1;
  return wait_for(x, a, stop_and_look); /* it may have been fed meanwhile */
}

enum MHD_Result answer_job_cancel(struct exchange *x)
{
  return find_job(x, cancel_found);
}

/* ---- pictures ---- */

static enum MHD_Result send_file(struct exchange *x)
{
  static const char *const types[] = {[IMAGE_PNG] = "image/png", [IMAGE_JPEG] = "image/jpeg", [IMAGE_WEBP] = "image/webp"};
  struct store_op *op = &x->asked->op;
  const struct store_file *f = &op->job.file[0];
  struct MHD_Response *r;

  if (op->err.code)
    return fail(x, &op->err);
  r = MHD_create_response_from_fd(f->bytes, op->fd);
  if (r)
    op->fd = -1; /* the answer's */
  if (r)
    add_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "private, max-age=3600, immutable");
  return send_answer(x, 200, types[f->format], r, f->bytes);
}

static enum MHD_Result open_file(struct exchange *x, const char *name)
{
  struct asked *a = ask(x, STORE_OPEN_FILE, "", "");

  if (!a)
    return fail_memory(x);
  snprintf(a->op.job.file[0].name, sizeof a->op.job.file[0].name, "%s", name);
  return wait_for(x, a, send_file);
}

static enum MHD_Result open_found(struct exchange *x)
{
  struct store_op *op = &x->asked->op;
  char name[STORE_NAME], *end;
  long i = strtol(x->arg[1], &end, 10);

  if (op->err.code)
    return fail(x, &op->err);
  if (*end || i < 0 || i >= op->found.n_files || !*op->found.file[i].name) {
    err_set(&x->err, E_NOTFOUND, "this job has no picture %s: it is not finished, failed, or its pictures have expired", x->arg[1]);
    return send_error(x);
  }
  memcpy(name, op->found.file[i].name, sizeof name);
  return open_file(x, name);
}

enum MHD_Result answer_job_picture(struct exchange *x)
{
  return find_job(x, open_found);
}

enum MHD_Result answer_file(struct exchange *x)
{
  if (!x->h->async)
    return fail(x, &(struct err){.code = E_NOTREADY, .msg = "the model is still loading"});
  if (atomic_load(&x->h->is_stopping))
    return fail(x, &(struct err){.code = E_NOTREADY, .msg = "the server is stopping"});
  if (!store_is_name(x->arg[0]))
    return fail(x, &(struct err){.code = E_NOTFOUND, .msg = "there is no such file"});
  return open_file(x, x->arg[0]);
}

/* ---- events ---- */

/* Attaches to the job in the table, once it is there. Should it leave at this moment, add_news says so. */
static int attach(struct exchange *x, const struct store_job *s)
{
  struct stream *st = &x->stream;

  if (!st->job)
    st->job = job_find(x->h->jobs, s->id, &st->serial);
  if (st->job && !st->is_listening) {
    st->listener.wake = stream_wake;
    (void)!job_listen(x->h->jobs, st->job, st->serial, &st->listener);
    st->is_listening = 1;
  }
  return st->job != NULL;
}

/* What is new of a job in the table. 0: it is not there any more. */
static int add_news(struct exchange *x, const struct store_job *s, struct buf *out, struct err *e)
{
  struct stream *st = &x->stream;
  struct job_view now;
  struct jobs_view v;
  struct err why;

  if (!job_look(x->h->jobs, st->job, st->serial, st->seen_previews, 1, &now))
    return 0;
  v = recorded(s, &why);
  add_live(&v, &now);
  if (st->seen_state != (int)v.status + 1 || st->seen_position != v.queue_position) {
    st->seen_state = (int)v.status + 1;
    st->seen_position = v.queue_position;
    (void)!jobs_event_status(out, ++st->events, &v, e);
  }
  if (now.steps_done != st->seen_steps) {
    st->seen_steps = now.steps_done;
    (void)!jobs_event_step(out, ++st->events, &v.progress, e);
  }
  if (now.preview) {
    struct jobs_progress p = {.step = now.preview->step, .steps = v.progress.steps, .picture = now.preview->picture, .pictures = now.pictures};
    st->seen_previews = now.preview->number;
    (void)!jobs_event_preview(out, ++st->events, &p, now.preview->format, now.preview->data, now.preview->len, e);
    blob_unref(now.preview);
  }
  return 1;
}

/* How it ended; or how it stands, when its end is not on the disk yet. */
static int add_end(struct exchange *x, const struct store_job *s, struct buf *out, struct err *e)
{
  struct err why;
  struct jobs_view v = view_of(x->h, s, &why);
  int64_t id = ++x->stream.events;

  if (s->state == STORE_SUCCEEDED)
    return jobs_event_result(out, id, &v, e);
  if (jobs_event_status(out, id, &v, e) || !v.err)
    return e->code;
  return jobs_event_error(out, ++x->stream.events, &why, e);
}

/* The stream sleeps, and goes on when the store has answered. 0: out of memory. */
static int look_again(struct exchange *x)
{
  struct asked *a = ask_again(x);

  if (a)
    submit(a);
  return a != NULL;
}

/* A job that was not finished when the store was asked and is not in the table: it ended in between, or is of the backlog and not fed yet. */
static int seek(struct exchange *x, const struct store_job *s, struct buf *out, struct err *e)
{
  struct stream *st = &x->stream;

  if (atomic_load(&x->h->is_stopping))
    return 0;
  if (!st->is_seeking || st->is_time) {
    st->is_seeking = 1;
    st->is_time = 0;
    return look_again(x);
  }
  if (!st->seen_state) {
    st->seen_state = JOBS_QUEUED + 1;
    st->seen_position = -1;
    (void)!add_end(x, s, out, e);
  }
  return 1;
}

static int produce_events(struct exchange *x, struct buf *out)
{
  struct asked *a = x->asked;
  struct err e = {0};
  int is_done;

  lock_take(&x->h->jobs->lock);
  is_done = a->is_done;
  lock_drop(&x->h->jobs->lock);
  if (!is_done)
    return 1; /* the store is asked how it ended */
  if (a->op.err.code || a->op.found.state > STORE_RUNNING || x->stream.is_last) {
    (void)!(a->op.err.code ? jobs_event_error(out, ++x->stream.events, &a->op.err, &e) : add_end(x, &a->op.found, out, &e));
    return 0;
  }
  if (!attach(x, &a->op.found))
    return seek(x, &a->op.found, out, &e);
  x->stream.is_seeking = 0;
  if (add_news(x, &a->op.found, out, &e))
    return 1;
  x->stream.is_last = 1;
  return look_again(x);
}

static enum MHD_Result open_events(struct exchange *x)
{
  const char *last = exchange_header(x, "Last-Event-ID");
  struct store_op *op = &x->asked->op;

  if (op->err.code)
    return fail(x, &op->err);
  if (last && strspn(last, "0123456789") == strlen(last)) /* events tell how a job stands: who comes back gets that, under the next numbers */
    x->stream.events = strtoll(last, NULL, 10) % EVENT_ID_MAX;
  return stream_open(x, produce_events);
}

enum MHD_Result answer_job_events(struct exchange *x)
{
  return find_job(x, open_events);
}
