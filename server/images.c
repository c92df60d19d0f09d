/*
 * images.c - a request for pictures, from its body to its answer: decode, resolve the safety, let the reader read a first picture, submit the job, wait, send.
 *
 * All surfaces that draw come through here; they differ in their struct drawing and struct surface. Called by http.c. Threads: the HTTP thread, but for
 * images_wake and wake_read.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "proto/base64.h"
#include "proto/image.h"
#include "server/drawing.h"
#include "server/encode.h"
#include "server/exchange.h"

/* ---- waiting ---- */

int exchange_sleep(struct exchange *x)
{
  atomic_fetch_add(&x->h->asleep, 1); /* before the look: who ends the server looks the other way round */
  if (atomic_load(&x->h->is_over)) {
    atomic_fetch_sub(&x->h->asleep, 1);
    return 0;
  }
  MHD_suspend_connection(x->connection);
  atomic_store(&x->is_asleep, 1);
  return 1;
}

void exchange_wake(struct exchange *x)
{
  struct http *h = x->h; /* what is resumed may be over at once */

  if (!atomic_exchange(&x->is_asleep, 0))
    return;
  MHD_resume_connection(x->connection);
  atomic_fetch_sub(&h->asleep, 1);
}

void images_wake(void *arg)
{
  struct exchange *x = arg;
  struct jobs *js = x->h->jobs;

  lock_take(&js->lock);
  x->is_done = 1;
  exchange_wake(x);
  lock_drop(&js->lock);
}

/* ---- body to job ---- */

/* "user:password" in base64, as A1111's clients show it: the password is the key, whoever the user is. */
static const char *basic_token(struct exchange *x, const char *text)
{
  size_t len = strlen(text), n;
  char *colon;

  if (base64_decode_bound(len) >= sizeof x->token || base64_decode((uint8_t *)x->token, &n, text, len, &(struct err){0}))
    return "";
  x->token[n] = 0;
  colon = strchr(x->token, ':');
  return colon && strlen(x->token) == n ? colon + 1 : "";
}

/* A wrong form of Authorization is nobody's key; an empty one, as Open WebUI sends it, is none. */
const char *exchange_token(struct exchange *x)
{
  const char *v = exchange_header(x, MHD_HTTP_HEADER_AUTHORIZATION);

  if (!v || !v[strspn(v, " \t")])
    return NULL;
  if (!strncasecmp(v, "Basic ", 6))
    return basic_token(x, v + 6);
  if (strncasecmp(v, "Bearer ", 7))
    return "";
  return v + 7 + strspn(v + 7, " ");
}

int exchange_target(struct exchange *x, struct safety_target **t, struct err *e)
{
  const struct serving *s;
  struct safety *safety;
  struct err why = {0};
  int pending;

  *t = NULL;
  if (images_serving(x->h, &s, &safety, e))
    return e->code;
  (void)!safety_resolve(safety, exchange_token(x), NULL, 0, t, &pending, &why);
  if (*t && why.code != E_AUTH)
    return 0;
  safety_target_unref(*t);
  *t = NULL;
  *e = why;
  return e->code;
}

static void peer_of(const struct exchange *x, char peer[PEER_TEXT])
{
  const union MHD_ConnectionInfo *info = MHD_get_connection_info(x->connection, MHD_CONNECTION_INFO_CLIENT_ADDRESS);

  peer_name(peer, info ? info->client_addr : NULL, exchange_header(x, "X-Forwarded-For"), &x->h->proxies);
}

void exchange_caller(const struct exchange *x, const struct safety_target *t, char caller[FAIR_NAME])
{
  const char *tenant = safety_target_tenant(t);
  char peer[PEER_TEXT];

  peer_of(x, peer);
  if (*tenant)
    snprintf(caller, FAIR_NAME, "%s", tenant);
  else
    snprintf(caller, FAIR_NAME, "peer %s", peer);
}

/* Whose job it is, and whether he may have one more. */
static int set_caller(struct exchange *x, struct job *j, struct err *e)
{
  const struct policy_limits *lim = safety_target_limits(j->target);
  const char *tenant = safety_target_tenant(j->target);
  char peer[PEER_TEXT];

  peer_of(x, peer);
  exchange_caller(x, j->target, j->caller);
  j->weight = (double)lim->weight;
  j->priority = lim->priority;
  return limits_admit(x->h->jobs->limits, lim, tenant, peer, j->req.n, clock_ns(), &j->ticket, &x->retry_ms, e);
}

int images_serving(struct http *h, const struct serving **s, struct safety **safety, struct err *e)
{
  *s = worker_serving(h->worker);
  *safety = worker_safety(h->worker);
  if (atomic_load(&h->is_stopping))
    return err_set(e, E_NOTREADY, "the server is stopping");
  if (!*s)
    return err_set(e, E_NOTREADY, worker_state(h->worker) == WORKER_FAILED ? "the device or the model failed"
                                                                           : "the model is still loading");
  if (!*safety)
    return err_set(e, E_NOTREADY, "the safety adapters are being loaded");
  return 0;
}

/* The picture itself is wanted: what cannot be one file, and which format it is. Accept has the last word over the body, since it names what the client
 * is ready to read. */
static int set_file(struct exchange *x, struct job *j, struct err *e)
{
  if (!j->wants_file)
    return 0;
  if (j->req.n != 1)
    return err_field(e, E_ARG, "n", "n must be 1 when the picture itself is asked for with Accept: %s", x->file_type);
  if (j->req.reply != REPLY_JSON)
    return err_field(e, E_ARG, j->req.reply == REPLY_STREAM ? "stream" : "response_format", "%s and Accept: %s exclude each other",
                     j->req.reply == REPLY_STREAM ? "stream" : "response_format url", x->file_type);
  for (int f = IMAGE_PNG; f <= IMAGE_WEBP; f++)
    if (!strcmp(x->file_type, image_mime((enum image_format)f)))
      j->req.format = (enum image_format)f;
  return 0;
}

/* What addresses in the answer begin with: what the operator says, else what the client calls this server. */
static void set_base(const struct exchange *x, struct job *j)
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]";
  const char *host = exchange_header(x, MHD_HTTP_HEADER_HOST), *url = x->h->cfg->public_url;

  if (*url)
    snprintf(j->base, sizeof j->base, "%s", url);
  else if (host && *host && strlen(host) < sizeof j->base - 8 && strspn(host, ok) == strlen(host))
    snprintf(j->base, sizeof j->base, "http://%s", host);
  else
    snprintf(j->base, sizeof j->base, "%s", x->h->url);
}

/* Body to job, but for what takes long. */
static int read_body(struct exchange *x, struct err *e)
{
  struct drawing_body body = {.p = x->body.p ? x->body.p : "", .len = x->body.len, .type = exchange_header(x, MHD_HTTP_HEADER_CONTENT_TYPE)};
  struct drawing_who who = {.token = exchange_token(x)};
  const struct serving *s;
  struct safety *safety;
  struct job *j;

  if (images_serving(x->h, &s, &safety, e) || job_reserve(x->h->jobs, &x->job, e))
    return e->code;
  j = x->job;
  memcpy(j->id, x->id, sizeof j->id);
  set_base(x, j);
  j->wants_file = x->file_type && x->route->answer == answer_images;
  if (drawing_read(j, x->route->drawing, &body, s, safety, &who, &x->pending, e) || set_file(x, j, e) || set_caller(x, j, e))
    return e->code;
  return drawing_has_first(j) ? 0 : drawing_prepare(j, s, e);
}

/* The table's lock is held: the job is the exchange's again. */
static void wake_read(void *arg)
{
  exchange_wake(arg);
}

/* The first picture is there, or is no picture, or somebody has stopped the job meanwhile. */
static enum MHD_Result was_read(struct exchange *x)
{
  struct job *j = x->job;
  int stop = atomic_load(&j->stop);

  watch_phase(&x->h->watch, x->watch_at, WATCH_READING, from_now(x->h->cfg->client_s));
  x->body = j->upload;
  buf_init(&j->upload, 0);
  if (!j->err.code && stop)
    job_stop_reason(&j->err, stop);
  return j->err.code ? answer_images_done(x) : x->built(x);
}

static enum MHD_Result read_later(struct exchange *x, enum MHD_Result (*built)(struct exchange *x))
{
  struct job *j = x->job;
  uint64_t serial = j->serial;

  j->upload = x->body;
  buf_init(&x->body, 0);
  j->read = wake_read;
  j->wake_arg = x;
  x->built = built;
  x->then = was_read;
  if (!exchange_sleep(x)) /* before the reader can wake it */
    return MHD_NO;
  job_read(x->h->jobs, j);
  watch_job(&x->h->watch, x->watch_at, j, serial, from_now(x->h->cfg->deadline_s));
  return MHD_YES;
}

enum MHD_Result images_build(struct exchange *x, enum MHD_Result (*built)(struct exchange *x))
{
  if (read_body(x, &x->err))
    return images_refuse(x);
  return drawing_has_first(x->job) ? read_later(x, built) : built(x);
}

enum MHD_Result images_refuse(struct exchange *x)
{
  images_refused(x);
  if (x->job)
    job_release(x->h->jobs, x->job);
  x->job = NULL;
  return send_error(x);
}

void images_refused(struct exchange *x)
{
  drawing_refused(x->h->audit, x->job ? x->job->target : NULL, "", x->id, &x->err);
}

/* ---- the answer ---- */

/* Appends what the job has to tell while and when it is done: previews, then the body that the encoder wrote, or the error. */
static int produce_images(struct exchange *x, struct buf *out)
{
  struct job *j = x->job;
  struct job_view v;
  struct err e = {0};
  int is_done;

  lock_take(&x->h->jobs->lock);
  is_done = x->is_done;
  lock_drop(&x->h->jobs->lock);
  while (job_look(x->h->jobs, j, j->serial, x->stream.seen_previews, 0, &v) && v.preview) {
    x->stream.seen_previews = v.preview->number;
    (void)!j->surface->encode_preview(out, j, v.preview, &e);
    blob_unref(v.preview);
  }
  if (!is_done)
    return 1;
  if (!e.code)
    e = j->err;
  if (!e.code && !buf_add(out, j->body.p, j->body.len, &e))
    return 0;
  (void)!j->surface->encode_error_event(out, &e, &(struct err){0}); /* no memory for it: the stream ends without */
  return 0;
}

/* The job is complete: it goes its way, and the connection waits for it. */
static enum MHD_Result submit(struct exchange *x)
{
  struct http *h = x->h;
  struct job *j;
  uint64_t serial;

  buf_close(&x->body);
  j = x->job;
  serial = j->serial;
  j->wake = images_wake;
  j->wake_arg = x;
  if (j->req.reply == REPLY_STREAM) {
    enum MHD_Result r = stream_open(x, produce_images);
    if (r == MHD_NO) {
      job_release(h->jobs, j);
      x->job = NULL;
      return r;
    }
  } else {
    /* Suspend first: the job may be done before job_submit returns, and then it finds the connection suspended. */
    x->then = answer_images_done;
    if (!exchange_sleep(x))
      return MHD_NO;
  }
  x->stream.listener.wake = stream_wake;
  worker_accept(h->worker, j, x->pending);
  watch_job(&h->watch, x->watch_at, j, serial, from_now(h->cfg->deadline_s)); /* who is seen to leave earlier would not be heard: the job was not submitted */
  if (j->req.reply == REPLY_STREAM)
    (void)!job_listen(h->jobs, j, serial, &x->stream.listener);
  return MHD_YES;
}

enum MHD_Result answer_images(struct exchange *x)
{
  return images_build(x, submit);
}

static void add_recipe_headers(struct MHD_Response *r, const struct job *j, const struct serving *s)
{
  struct recipe p = encoder_recipe(j, 0, s);

  add_headerf(r, "X-Safelight-Seed", "%llu", (unsigned long long)p.seed);
  add_headerf(r, "X-Safelight-Model", "%s", p.model);
  add_headerf(r, "X-Safelight-Steps", "%d", p.steps);
  add_headerf(r, "X-Safelight-Sampler", "%s%s", p.sampler, p.karras ? " karras" : "");
  add_headerf(r, "X-Safelight-Guidance", "%g", (double)p.guidance);
  add_headerf(r, "Content-Disposition", "inline; filename=\"safelight-%llu.%s\"", (unsigned long long)p.seed, openai_format_name(j->req.format));
}

void images_finish(struct exchange *x)
{
  struct job *j = x->job;

  x->times = j->times;
  x->err = j->err;
  x->log.times = &x->times;
  x->log.n = j->req.n;
  x->log.width = j->req.width;
  x->log.height = j->req.height;
  x->log.steps = atomic_load(&j->steps_done);
  if (x->h->cfg->log_prompts)
    x->log.prompt = x->prompt = strdup(j->req.prompt);
  if (x->err.code)
    images_refused(x);
  job_unlisten(x->h->jobs, &x->stream.listener);
  job_release(x->h->jobs, j);
  x->job = NULL;
}

void images_leave(struct exchange *x)
{
  struct jobs *js = x->h->jobs;
  int is_done = 0;

  x->log.n = x->job->req.n;
  x->log.width = x->job->req.width;
  x->log.height = x->job->req.height;
  x->log.steps = atomic_load(&x->job->steps_done); /* before it is somebody else's */
  if (job_disown(js, x->job)) { /* it is stopped at its next step, and frees itself */
    x->log.times = &x->times; /* which nobody waits for */
    x->job = NULL;
    return;
  }
  while (!is_done) { /* DONE: its waker is about to come by */
    lock_take(&js->lock);
    is_done = x->is_done || x->job->state == JOB_RESERVED;
    lock_drop(&js->lock);
  }
  images_finish(x);
}

/* Whether the body is an answer all the same. */
static int answer_stopped(struct job *j, const struct serving *s)
{
  struct err e = {0};

  if (j->err.code != E_CANCEL || j->wants_file || !j->surface->encode_stopped)
    return 0;
  return !j->surface->encode_stopped(j, s, &e);
}

enum MHD_Result answer_images_done(struct exchange *x)
{
  struct job *j = x->job;
  const char *type = j->wants_file ? x->file_type : "application/json";
  struct MHD_Response *r;
  size_t len;

  if (j->err.code && !answer_stopped(j, &x->h->worker->serving)) {
    images_finish(x);
    return send_error(x);
  }
  r = response_take(j->wants_file ? &j->file[0] : &j->body, &len);
  if (r) {
    add_headerf(r, "Server-Timing", "queue;dur=%.2f, text;dur=%.2f, unet;dur=%.2f, vae;dur=%.2f, png;dur=%.2f, total;dur=%.2f",
                j->times.queue, j->times.text, j->times.unet, j->times.vae, j->times.png, j->times.total);
    add_headerf(r, "X-Safelight-Generation", "%s", j->stamp.id);
    add_headerf(r, "X-Safelight-Generation-Digest", "%s", j->stamp.digest);
    add_headerf(r, "X-Safelight-Profile", "%s", j->stamp.profile);
    if (j->stamp.requires_nothing)
      add_header(r, "X-Safelight-Safety", IMAGE_UNSAFE);
    if (j->wants_file)
      add_recipe_headers(r, j, &x->h->worker->serving);
  }
  images_finish(x);
  return send_answer(x, 200, type, r, len);
}
