/*
 * http.c - see http.h.
 *
 * One request is one struct exchange. libmicrohttpd calls handle() with the headers, with each piece of the body, and at the
 * end; a picture's request is then suspended and handle() is called once more when its job is DONE (wake() resumed it). The
 * contract of libmicrohttpd 0.9.75 that shapes this file: a suspended connection neither times out nor notices a disconnect
 * (watch.c does both), a response may be queued at the first or the last call only, and stopping the daemon with suspended
 * connections is forbidden (serve.c ends all jobs first).
 *
 * Threads: everything but http_open, http_close, http_stopping and wake() runs on the HTTP thread.
 */
#include "server/http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "proto/openai.h"
#include "server/encode.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/metrics_page.h"
#include "server/page.h"
#include "server/version.h"

/* A refused body is read to its end up to here, so that the client sees the answer instead of a reset connection. */
enum { SWALLOW_MAX = 8 << 20, HEADER_BYTES = 16 << 10, READ_RATE = 16 << 10, PATH_SHOWN = 96 };

struct exchange;

struct route {
  const char *path, *method;                 /* GET implies HEAD */
  enum MHD_Result (*answer)(struct http *h, struct MHD_Connection *c, struct exchange *x);
};

struct exchange {
  struct http *h;
  struct MHD_Connection *connection;
  int watch_at;                  /* the connection's entry */
  int64_t start_ns;
  char id[JOB_ID_MAX + 1];
  char method[12], path[PATH_SHOWN];  /* for the log: printable, cut */
  const struct route *route;     /* NULL when err is set from the start */
  const char *allow;             /* of a 405 */
  int wants_png;
  struct buf body;
  size_t swallowed;
  struct err err;
  struct job *job;
  int status;
  struct log_request log;        /* what is known of the picture */
  char *prompt;                  /* for the log, when it is wanted */
  struct stage_times times;
};

/* ---- answers ---- */

static void add_header(struct MHD_Response *r, const char *name, const char *value)
{
  /* Fails only when memory is short or a value holds a newline, which none does; an answer without it is still an answer. */
  (void)MHD_add_response_header(r, name, value);
}

static void add_headerf(struct MHD_Response *r, const char *name, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static void add_headerf(struct MHD_Response *r, const char *name, const char *fmt, ...)
{
  char value[256];
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(value, sizeof value, fmt, ap);
  va_end(ap);
  add_header(r, name, value);
}

static int64_t from_now(int seconds)
{
  return clock_ns() + (int64_t)seconds * 1000000000;
}

/* Adds what every answer carries, hands it over and drops it. A body of len bytes has its time to be read. */
static enum MHD_Result send_answer(struct exchange *x, int status, const char *type, struct MHD_Response *r, size_t len)
{
  enum MHD_Result ret;

  if (!r)
    return MHD_NO;
  x->status = status;
  add_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, type);
  add_header(r, "x-request-id", x->id);
  add_header(r, "X-Content-Type-Options", "nosniff");
  if (atomic_load(&x->h->is_stopping))
    add_header(r, MHD_HTTP_HEADER_CONNECTION, "close");
  watch_phase(&x->h->watch, x->watch_at, WATCH_SENDING, from_now(x->h->cfg->client_s + (int)(len / READ_RATE)));
  ret = MHD_queue_response(x->connection, (unsigned)status, r);
  MHD_destroy_response(r);
  return ret;
}

/* The buffer's bytes become the answer's; b is empty after. */
static struct MHD_Response *response_take(struct buf *b, size_t *len)
{
  char *p = buf_take(b, len);
  struct MHD_Response *r = MHD_create_response_from_buffer(*len, p, MHD_RESPMEM_MUST_FREE);

  if (!r)
    free(p);
  else
    add_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
  return r;
}

static enum MHD_Result send_json(struct exchange *x, int status, struct buf *b)
{
  size_t len;
  struct MHD_Response *r = response_take(b, &len);

  return send_answer(x, status, "application/json", r, len);
}

static enum MHD_Result send_error(struct exchange *x)
{
  struct err e = {0};
  struct buf b;
  struct MHD_Response *r;
  size_t len;
  int status = openai_status(x->err.code);

  buf_init(&b, 64 << 10);
  if (openai_encode_error(&b, &x->err, &e)) {
    buf_close(&b);
    return MHD_NO; /* no memory for one sentence: the connection closes */
  }
  r = response_take(&b, &len);
  if (r && x->allow)
    add_header(r, MHD_HTTP_HEADER_ALLOW, x->allow);
  if (r && status == 429)
    add_headerf(r, MHD_HTTP_HEADER_RETRY_AFTER, "%d", jobs_retry_after(x->h->jobs));
  else if (r && status == 503)
    add_header(r, MHD_HTTP_HEADER_RETRY_AFTER, "2");
  return send_answer(x, status, "application/json", r, len);
}

/* ---- routes that answer at once ---- */

static enum MHD_Result answer_health(struct http *h, struct MHD_Connection *c, struct exchange *x)
{
  struct buf b;

  (void)h, (void)c;
  buf_init(&b, 256);
  if (buf_add_str(&b, "{\"status\":\"ok\"}\n", NULL))
    return MHD_NO;
  return send_json(x, 200, &b);
}

static enum MHD_Result answer_ready(struct http *h, struct MHD_Connection *c, struct exchange *x)
{
  const char *no = atomic_load(&h->is_stopping)               ? "the server is stopping"
                   : worker_state(h->worker) == WORKER_LOADING ? "the model is loading"
                   : worker_state(h->worker) == WORKER_FAILED  ? "the device or the model failed"
                                                               : NULL;
  struct safety *s = worker_safety(h->worker);
  struct buf b;

  (void)c;
  if (no)
    err_set(&x->err, E_NOTREADY, "%s", no);
  else if (!s)
    err_set(&x->err, E_NOTREADY, "the safety adapters are being loaded");
  if (x->err.code || safety_ready(s, &x->err))
    return send_error(x);
  buf_init(&b, 256);
  if (buf_add_str(&b, "{\"status\":\"ready\"}\n", NULL))
    return MHD_NO;
  return send_json(x, 200, &b);
}

static enum MHD_Result answer_models(struct http *h, struct MHD_Connection *c, struct exchange *x)
{
  const char *names[SAMPLER_COUNT + 1] = {0};
  const struct serving *s = worker_serving(h->worker);
  struct buf b;

  (void)c;
  for (int i = 0; i < SAMPLER_COUNT; i++)
    names[i] = sampler_name((enum sampler_kind)i);
  buf_init(&b, 64 << 10);
  if (openai_encode_models(&b,
                           s ? &(struct openai_model){.lim = &s->limits,
                                                      .created = s->loaded_s,
                                                      .samplers = names,
                                                      .digest = s->info->digest,
                                                      .version = SAFELIGHT_VERSION}
                             : NULL,
                           &x->err)) {
    buf_close(&b);
    return send_error(x);
  }
  return send_json(x, 200, &b);
}

static enum MHD_Result answer_page(struct exchange *x, const struct page_file *f)
{
  const char *seen = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_IF_NONE_MATCH);
  int same = seen && !strcmp(seen, f->etag);
  struct MHD_Response *r = MHD_create_response_from_buffer(same ? 0 : f->len, (void *)(uintptr_t)f->data, MHD_RESPMEM_PERSISTENT);

  if (r) {
    add_header(r, MHD_HTTP_HEADER_ETAG, f->etag);
    add_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
    add_header(r, "Content-Security-Policy",
               "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
    add_header(r, "Referrer-Policy", "no-referrer");
  }
  return send_answer(x, same ? 304 : 200, page_type(f), r, f->len);
}

static enum MHD_Result answer_metrics(struct http *h, struct MHD_Connection *c, struct exchange *x)
{
  struct MHD_Response *r;
  struct buf b;
  size_t len;

  (void)c;
  buf_init(&b, METRICS_PAGE_MAX);
  if (metrics_page(&b, h->worker, &x->err)) {
    buf_close(&b);
    return send_error(x);
  }
  r = response_take(&b, &len);
  return send_answer(x, 200, METRICS_PAGE_TYPE, r, len);
}

/* ---- a picture ---- */

/* How much the client likes this media type: the q of its exact entry in Accept, 0 when it is not named. */
static double accept_quality(const char *accept, const char *type)
{
  size_t n = strlen(type);

  while (accept && *accept) {
    accept += strspn(accept, " \t,");
    if (!strncasecmp(accept, type, n) && strchr(" \t;,", accept[n])) { /* strchr finds the NUL too */
      const char *q = strcasestr(accept + n, "q=");
      return q && q < accept + strcspn(accept, ",") ? strtod(q + 2, NULL) : 1;
    }
    accept += strcspn(accept, ",");
  }
  return 0;
}

/* Called once, by whoever made the job DONE. */
static void wake(void *arg)
{
  struct exchange *x = arg;

  MHD_resume_connection(x->connection);
}

static int draw_seed(struct request *q, struct err *e)
{
  uint32_t seed;

  if (q->has_seed)
    return 0;
  if (getrandom(&seed, sizeof seed, 0) != sizeof seed)
    return err_set(e, E_INTERNAL, "no random numbers: %s", strerror(errno));
  q->seed = seed; /* 32 bits: every client and every A1111 user can send it back */
  return 0;
}

/* Memory and tokens for each picture; the job owns them, also after failure. */
static int prepare_pictures(struct job *j, const struct serving *s, struct err *e)
{
  const struct request *q = &j->req;
  size_t bytes = (size_t)q->width * (size_t)q->height * 3;
  struct draw_params p = {
      .prompt = q->prompt,
      .negative = q->negative,
      .prompt_len = q->prompt_len,
      .negative_len = q->negative_len,
      .width = q->width,
      .height = q->height,
      .steps = q->steps,
      .guidance = q->guidance,
      .sampler = j->sampler,
      .karras = j->karras,
      .clip_skip = q->clip_skip,
  };

  j->pixels = malloc(bytes * (size_t)q->n);
  if (!j->pixels)
    return err_set(e, E_NOMEM, "out of memory for %d pictures of %dx%d", q->n, q->width, q->height);
  for (int i = 0; i < q->n; i++) {
    j->pic[i].rgb = j->pixels + bytes * (size_t)i;
    j->pic[i].seed = p.seed = q->seed + (uint64_t)i;
    if (draw_prepare(&j->pic[i].draw, s->model, &p, e))
      return e->code;
  }
  j->tokens = draw_prompt_tokens(j->pic[0].draw);
  return 0;
}

/* What stands after "Bearer" in Authorization; "", which is nobody's key, when it is something else. NULL: there is none. */
static const char *bearer_token(struct exchange *x)
{
  const char *v = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_AUTHORIZATION);

  if (!v)
    return NULL;
  if (strncasecmp(v, "Bearer ", 7))
    return "";
  return v + 7 + strspn(v + 7, " ");
}

/* Decodes the body and finds under which safety its pictures are to be drawn. Who may not ask, or cannot be drawn for now, is told so first. */
static int decode_body(struct exchange *x, struct job *j, const struct serving *s, struct safety *safety, int *pending, struct err *e)
{
  struct safety_style style[REQUEST_LORAS_MAX];
  struct err why = {0};
  int n = 0;

  if (!openai_decode(&j->req, x->body.p ? x->body.p : "", x->body.len, &s->limits, &why))
    for (; n < j->req.n_loras; n++) {
      memcpy(style[n].name, j->req.lora[n].name, sizeof style[n].name);
      style[n].weight = j->req.lora[n].scale;
    }
  if (safety_resolve(safety, bearer_token(x), style, n, &j->target, pending, e))
    return e->code;
  if (why.code)
    *e = why;
  return e->code;
}

/* Body to job, RESERVED and complete. x->job is the exchange's, also after failure. */
static int build_job(struct http *h, struct exchange *x, int *pending, struct err *e)
{
  const struct serving *s = worker_serving(h->worker);
  struct safety *safety = worker_safety(h->worker);
  struct job *j;

  if (atomic_load(&h->is_stopping))
    return err_set(e, E_NOTREADY, "the server is stopping");
  if (!s)
    return err_set(e, E_NOTREADY, worker_state(h->worker) == WORKER_FAILED ? "the device or the model failed"
                                                                          : "the model is still loading");
  if (!safety)
    return err_set(e, E_NOTREADY, "the safety adapters are being loaded");
  if (job_reserve(h->jobs, &x->job, e))
    return e->code;
  j = x->job;
  if (decode_body(x, j, s, safety, pending, e))
    return e->code;
  j->karras = 0;
  if (sampler_find(j->req.sampler, &j->sampler, &j->karras, e)) {
    snprintf(e->field, sizeof e->field, "sampler");
    return e->code;
  }
  if (j->req.karras >= 0)
    j->karras = j->req.karras;
  if (j->karras && !sampler_has_karras(j->sampler))
    return err_field(e, E_ARG, "karras", "karras must be false: sampler %s has no Karras form", sampler_name(j->sampler));
  j->wants_png = x->wants_png;
  if (j->wants_png && j->req.n != 1)
    return err_field(e, E_ARG, "n", "n must be 1 when the picture itself is asked for with Accept: image/png");
  memcpy(j->id, x->id, sizeof j->id);
  j->styles[0] = 0;
  for (int i = 0, at = 0; i < j->req.n_loras; i++)
    at += snprintf(j->styles + at, sizeof j->styles - (size_t)at, "%s%s:%g", i ? " " : "", j->req.lora[i].name, (double)j->req.lora[i].scale);
  if (draw_seed(&j->req, e))
    return e->code;
  return prepare_pictures(j, s, e);
}

/* Refusals of what was asked for, and of who asked, are in the audit log; overload and shutdown are not anybody's doing. */
static void record_refusal(struct exchange *x)
{
  const struct safety_target *t = x->job ? x->job->target : NULL;
  struct audit_style style[POLICY_STYLES_MAX];
  char reason[sizeof x->err.msg + sizeof x->err.field];
  struct audit_record r = {
      .kind = AUDIT_REFUSAL,
      .tenant = t ? safety_target_tenant(t) : "",
      .profile = t ? safety_target_profile(t) : "",
      .request_id = x->id,
      .style = style,
      .n_styles = t ? safety_target_styles(t, style, POLICY_STYLES_MAX) : 0,
      .verdict = "refused",
      .reason = reason,
  };
  struct err ignored = {0};

  metric_refuse(x->err.code);
  if (x->err.code == E_BUSY || x->err.code == E_NOTREADY || x->err.code == E_CANCEL || x->err.code == E_TIMEOUT)
    return;
  snprintf(reason, sizeof reason, "%s", x->err.msg);
  if (audit_note(x->h->audit, &r, &ignored))
    log_event("a refusal could not be recorded: %s", ignored.msg);
}

static enum MHD_Result answer_images(struct http *h, struct MHD_Connection *c, struct exchange *x)
{
  struct job *j;
  uint64_t serial;
  int pending = 0;

  if (build_job(h, x, &pending, &x->err)) {
    record_refusal(x);
    if (x->job)
      job_release(h->jobs, x->job);
    x->job = NULL;
    return send_error(x);
  }
  buf_close(&x->body);
  j = x->job;
  serial = j->serial;
  j->wake = wake;
  j->wake_arg = x;
  /* Suspend first: the job may be done before job_submit returns, and then wake() finds the connection suspended. */
  MHD_suspend_connection(c);
  if (pending)
    worker_prepare(h->worker, j);
  else
    job_submit(h->jobs, j);
  watch_job(&h->watch, x->watch_at, j, serial, from_now(h->cfg->deadline_s));
  return MHD_YES;
}

static void add_recipe_headers(struct MHD_Response *r, const struct job *j, const struct serving *s)
{
  struct recipe p = encoder_recipe(j, 0, s);

  add_headerf(r, "X-Safelight-Seed", "%llu", (unsigned long long)p.seed);
  add_headerf(r, "X-Safelight-Model", "%s", p.model);
  add_headerf(r, "X-Safelight-Steps", "%d", p.steps);
  add_headerf(r, "X-Safelight-Sampler", "%s%s", p.sampler, p.karras ? " karras" : "");
  add_headerf(r, "X-Safelight-Guidance", "%g", (double)p.guidance);
  add_headerf(r, "Content-Disposition", "inline; filename=\"safelight-%llu.png\"", (unsigned long long)p.seed);
}

/* The job is DONE and the exchange's: its answer leaves, the job is free again. */
static enum MHD_Result answer_done(struct http *h, struct exchange *x)
{
  struct job *j = x->job;
  struct MHD_Response *r;
  enum MHD_Result ret;
  size_t len;

  x->times = j->times;
  x->err = j->err;
  x->log.times = &x->times;
  x->log.n = j->req.n;
  x->log.width = j->req.width;
  x->log.height = j->req.height;
  x->log.steps = j->steps_done;
  if (h->cfg->log_prompts)
    x->log.prompt = x->prompt = strdup(j->req.prompt);
  if (x->err.code) {
    record_refusal(x);
    ret = send_error(x);
  } else {
    r = response_take(&j->body, &len);
    if (r) {
      add_headerf(r, "Server-Timing", "queue;dur=%.2f, text;dur=%.2f, unet;dur=%.2f, vae;dur=%.2f, png;dur=%.2f, total;dur=%.2f",
                  j->times.queue, j->times.text, j->times.unet, j->times.vae, j->times.png, j->times.total);
      add_headerf(r, "X-Safelight-Generation", "%s", j->stamp.id);
      add_headerf(r, "X-Safelight-Generation-Digest", "%s", j->stamp.digest);
      add_headerf(r, "X-Safelight-Profile", "%s", j->stamp.profile);
      if (j->stamp.requires_nothing)
        add_header(r, "X-Safelight-Safety", "unsafe-evaluation");
      if (j->wants_png)
        add_recipe_headers(r, j, &h->worker->serving);
    }
    ret = send_answer(x, 200, j->wants_png ? "image/png" : "application/json", r, len);
  }
  job_release(h->jobs, j);
  x->job = NULL;
  return ret;
}

/* ---- the way of a request through handle() ---- */

static const struct route routes[] = {
    {"/v1/images/generations", "POST", answer_images},
    {"/v1/models", "GET", answer_models},
    {"/healthz", "GET", answer_health},
    {"/readyz", "GET", answer_ready},
    {"/metrics", "GET", answer_metrics},
};

static int is_get(const char *method)
{
  return !strcmp(method, "GET") || !strcmp(method, "HEAD");
}

/* Finds the route, or sets x->err to 404 or 405. The page's files are no routes: route stays NULL without an error. */
static void find_route(struct http *h, struct exchange *x, const char *url, const char *method)
{
  const struct page_file *f = h->cfg->page ? page_find(url) : NULL;

  for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) {
    const struct route *r = &routes[i];
    if (strcmp(url, r->path))
      continue;
    if (!strcmp(r->method, method) || (!strcmp(r->method, "GET") && is_get(method))) {
      x->route = r;
      return;
    }
    x->allow = !strcmp(r->method, "GET") ? "GET, HEAD" : r->method;
  }
  if (f && !is_get(method))
    x->allow = "GET, HEAD";
  if (x->allow)
    err_set(&x->err, E_METHOD, "%s does not take %s; it takes %s", x->path, x->method, x->allow);
  else if (!f)
    err_set(&x->err, E_NOTFOUND, "there is nothing at %s", x->path);
}

/* The headers of a request that has a body: JSON, not compressed, not too long. */
static void check_body_headers(struct exchange *x)
{
  const char *type = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_TYPE);
  const char *coding = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_ENCODING);
  const char *length = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_LENGTH);
  static const char json[] = "application/json";

  if (!type || strncasecmp(type, json, sizeof json - 1) || !strchr(" \t;", type[sizeof json - 1]))
    err_set(&x->err, E_TYPE, "send the body as Content-Type: application/json");
  else if (coding && strcasecmp(coding, "identity"))
    err_set(&x->err, E_TYPE, "send the body without Content-Encoding");
  else if (length && strtoull(length, NULL, 10) > x->body.max)
    err_set(&x->err, E_TOOBIG, "the body may have at most %zu bytes", x->body.max);
}

/* A client's own id is kept when it is made of safe characters; else one is drawn. */
static void set_id(struct exchange *x)
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  const char *id = MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, "x-request-id");
  unsigned char random[12] = {0};

  if (id && *id && strlen(id) <= JOB_ID_MAX && strspn(id, ok) == strlen(id)) {
    snprintf(x->id, sizeof x->id, "%s", id);
    return;
  }
  if (getrandom(random, sizeof random, 0) < 0)
    memcpy(random, &x->start_ns, sizeof x->start_ns); /* an id, not a secret */
  memcpy(x->id, "req_", 4);
  for (size_t i = 0; i < sizeof random; i++)
    snprintf(x->id + 4 + 2 * i, 3, "%02x", random[i]);
}

static void printable(char *out, size_t size, const char *s)
{
  size_t i;

  for (i = 0; s[i] && i + 1 < size; i++)
    out[i] = s[i] > ' ' && s[i] < 0x7f ? s[i] : '?';
  out[i] = 0;
}

/* The connection's entry in the watcher. */
static int connection_entry(struct MHD_Connection *c)
{
  const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

  return info && info->socket_context ? (int)(intptr_t)info->socket_context - 1 : -1;
}

/* The headers are in: everything that can be refused without the body is. */
static enum MHD_Result begin(struct http *h, struct MHD_Connection *c, const char *url, const char *method, void **cls)
{
  struct exchange *x = calloc(1, sizeof *x);
  const char *expect = MHD_lookup_connection_value(c, MHD_HEADER_KIND, MHD_HTTP_HEADER_EXPECT);
  const char *length = MHD_lookup_connection_value(c, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_LENGTH);
  const char *accept = MHD_lookup_connection_value(c, MHD_HEADER_KIND, MHD_HTTP_HEADER_ACCEPT);

  if (!x)
    return MHD_NO;
  *cls = x;
  atomic_fetch_add(&h->exchanges, 1);
  metric_move(METRIC_IN_FLIGHT, 0, 1);
  x->h = h;
  x->connection = c;
  x->watch_at = connection_entry(c);
  x->start_ns = clock_ns();
  buf_init(&x->body, (size_t)h->cfg->max_body_kb << 10);
  set_id(x);
  printable(x->method, sizeof x->method, method);
  printable(x->path, sizeof x->path, url);
  x->wants_png = accept_quality(accept, "image/png") > accept_quality(accept, "application/json");
  find_route(h, x, url, method);
  if (x->route && x->route->answer == answer_images)
    check_body_headers(x);
  /* Answer now only where the client has not sent the body yet, or it is too long to be read to its end. */
  if (x->err.code && (expect || (length && strtoull(length, NULL, 10) > SWALLOW_MAX)))
    return send_error(x);
  return MHD_YES;
}

static enum MHD_Result take_body(struct exchange *x, const char *data, size_t *len)
{
  x->swallowed += *len;
  if (!x->err.code && buf_add(&x->body, data, *len, NULL)) {
    if (x->body.len + *len > x->body.max)
      err_set(&x->err, E_TOOBIG, "the body may have at most %zu bytes", x->body.max);
    else
      err_set(&x->err, E_NOMEM, "out of memory for the body");
    buf_close(&x->body);
  }
  *len = 0;
  return x->swallowed > SWALLOW_MAX ? MHD_NO : MHD_YES;
}

static enum MHD_Result handle(void *cls, struct MHD_Connection *c, const char *url, const char *method, const char *version,
                              const char *data, size_t *len, void **con_cls)
{
  struct http *h = cls;
  struct exchange *x = *con_cls;

  (void)version;
  thread_self = THREAD_HTTP;
  if (!x)
    return begin(h, c, url, method, con_cls);
  if (*len)
    return take_body(x, data, len);
  if (x->status)
    return MHD_YES; /* answered already */
  if (x->job)
    return answer_done(h, x);
  if (x->err.code)
    return send_error(x);
  if (x->route)
    return x->route->answer(h, c, x);
  return answer_page(x, page_find(url));
}

/* ---- what libmicrohttpd tells about connections ---- */

static void on_connection(void *cls, struct MHD_Connection *c, void **ctx, enum MHD_ConnectionNotificationCode what)
{
  struct http *h = cls;
  int at;

  if (what == MHD_CONNECTION_NOTIFY_STARTED) {
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
    at = watch_add(&h->watch, info->connect_fd, from_now(h->cfg->client_s));
    *ctx = (void *)(intptr_t)(at + 1);
    metric_move(METRIC_CONNECTIONS, 0, 1);
  } else {
    metric_move(METRIC_CONNECTIONS, 0, -1);
    watch_remove(&h->watch, (int)(intptr_t)*ctx - 1);
  }
}

/* The request line is in: from now on the client has its time to send the rest. */
static void *on_request_line(void *cls, const char *uri, struct MHD_Connection *c)
{
  struct http *h = cls;

  (void)uri;
  watch_phase(&h->watch, connection_entry(c), WATCH_READING, from_now(h->cfg->client_s));
  return NULL;
}

static void on_completed(void *cls, struct MHD_Connection *c, void **con_cls, enum MHD_RequestTerminationCode code)
{
  struct http *h = cls;
  struct exchange *x = *con_cls;
  struct log_request *l;

  watch_phase(&h->watch, connection_entry(c), WATCH_IDLE, from_now(h->cfg->client_s));
  if (!x)
    return;
  *con_cls = NULL;
  l = &x->log;
  l->id = x->id;
  l->method = x->method;
  l->path = x->path;
  l->status = x->status ? x->status : 499;
  l->error = x->err.code                               ? x->err.msg
             : code == MHD_REQUEST_TERMINATED_COMPLETED_OK ? ""
             : x->status                                   ? "the client did not read the whole answer"
                                                           : "the client did not send the whole request";
  l->total_ms = (double)(clock_ns() - x->start_ns) / 1e6;
  log_request(l);
  metric_request(x->route || x->err.code ? metric_surface_of(x->path) : SURFACE_PAGE, l->status, clock_ns() - x->start_ns);
  metric_move(METRIC_IN_FLIGHT, 0, -1);
  free(x->prompt);
  buf_close(&x->body);
  if (x->job)
    job_release(h->jobs, x->job);
  free(x);
  atomic_fetch_sub(&h->exchanges, 1);
}

/* Paths are compared as they came: %XX has no meaning in ours, and a decoded NUL would cut them short. */
static size_t keep_escapes(void *cls, struct MHD_Connection *c, char *text)
{
  (void)cls, (void)c;
  return strlen(text);
}

static void on_trouble(void *cls, const char *fmt, va_list ap)
{
  char text[256];

  (void)cls;
  vsnprintf(text, sizeof text, fmt, ap);
  text[strcspn(text, "\n")] = 0;
  log_event("http: %s", text);
}

/* ---- open and close ---- */

static int listen_on(const struct config *cfg, char *url, size_t url_size, struct err *e)
{
  struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_PASSIVE, .ai_socktype = SOCK_STREAM}, *a = NULL;
  struct sockaddr_storage got;
  socklen_t got_len = sizeof got;
  char port[8], host[64];
  int fd = -1, on = 1;

  snprintf(port, sizeof port, "%d", cfg->port);
  if (getaddrinfo(cfg->host, port, &hints, &a))
    return err_field(e, E_ARG, "host", "host must be a numeric address such as 127.0.0.1 or ::, not \"%s\"", cfg->host);
  fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) || bind(fd, a->ai_addr, a->ai_addrlen) ||
      listen(fd, 1024) || getsockname(fd, (struct sockaddr *)&got, &got_len) ||
      getnameinfo((struct sockaddr *)&got, got_len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV)) {
    err_field(e, E_ARG, "port", "cannot listen on %s port %d: %s%s", cfg->host, cfg->port, strerror(errno),
              errno == EADDRINUSE ? "; another server runs there, so stop it or choose another --port" : "");
    if (fd >= 0)
      close(fd);
    fd = -1;
  } else {
    snprintf(url, url_size, strchr(host, ':') ? "http://[%s]:%s" : "http://%s:%s", host, port);
  }
  freeaddrinfo(a);
  return fd;
}

int http_open(struct http *h, const struct config *cfg, struct jobs *js, struct worker *w, struct audit *audit, struct err *e)
{
  *h = (struct http){.cfg = cfg, .jobs = js, .worker = w, .audit = audit, .listen_fd = -1};
  h->listen_fd = listen_on(cfg, h->url, sizeof h->url, e);
  if (h->listen_fd < 0 || watch_open(&h->watch, js, cfg->max_connections + 16, e))
    return e->code;
  h->daemon = MHD_start_daemon(
      MHD_USE_EPOLL_INTERNAL_THREAD | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, handle, h,
      MHD_OPTION_EXTERNAL_LOGGER, on_trouble, h, MHD_OPTION_LISTEN_SOCKET, h->listen_fd, MHD_OPTION_CONNECTION_LIMIT,
      (unsigned)cfg->max_connections, MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HEADER_BYTES,
      MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)cfg->client_s + 1, MHD_OPTION_NOTIFY_CONNECTION, on_connection, h,
      MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, h, MHD_OPTION_URI_LOG_CALLBACK, on_request_line, h,
      MHD_OPTION_NOTIFY_COMPLETED, on_completed, h, MHD_OPTION_END);
  if (!h->daemon)
    return err_set(e, E_NOMEM, "the HTTP server did not start");
  return 0;
}

void http_stopping(struct http *h)
{
  atomic_store(&h->is_stopping, 1);
}

int http_exchanges(struct http *h)
{
  return atomic_load(&h->exchanges);
}

void http_close(struct http *h)
{
  if (h->daemon)
    MHD_stop_daemon(h->daemon); /* closes the listening socket and every connection */
  else if (h->cfg && h->listen_fd >= 0)
    close(h->listen_fd);
  watch_close(&h->watch);
  *h = (struct http){.listen_fd = -1};
}
