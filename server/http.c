/*
 * http.c - see http.h: routes, limits, and the way of a request through libmicrohttpd.
 *
 * One request is one struct exchange (exchange.h). libmicrohttpd calls handle() with the headers, with each piece of the body, and at the
 * end; a picture's request is then suspended and handle() is called once more when its job is DONE (images_wake resumed it). The
 * contract of libmicrohttpd 0.9.75 that shapes this file: a suspended connection neither times out nor notices a disconnect
 * (watch.c does both), a response may be queued at the first or the last call only, and stopping the daemon with suspended
 * connections is forbidden (serve.c ends all jobs first).
 *
 * Threads: everything but http_open, http_close and http_stopping runs on the HTTP thread.
 */
#include "server/http.h"

#include <errno.h>
#include <netdb.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "server/exchange.h"
#include "server/metrics.h"
#include "server/metrics_page.h"
#include "server/native.h"
#include "server/openai.h"
#include "server/page.h"
#include "server/sdapi.h"
#include "server/version.h"

/* A refused body is read to its end up to here, so that the client sees the answer instead of a reset connection. */
enum { SWALLOW_MAX = 8 << 20, HEADER_BYTES = 16 << 10 };

/* ---- routes that answer at once ---- */

static enum MHD_Result answer_health(struct exchange *x)
{
  return send_text(x, "{\"status\":\"ok\"}\n");
}

static enum MHD_Result answer_ready(struct exchange *x)
{
  const struct http *h = x->h;
  const char *no = atomic_load(&h->is_stopping)               ? "the server is stopping"
                   : worker_state(h->worker) == WORKER_LOADING ? "the model is loading"
                   : worker_state(h->worker) == WORKER_FAILED  ? "the device or the model failed"
                                                               : NULL;
  struct safety *s = worker_safety(h->worker);

  if (no)
    err_set(&x->err, E_NOTREADY, "%s", no);
  else if (!s)
    err_set(&x->err, E_NOTREADY, "the safety adapters are being loaded");
  if (x->err.code || safety_ready(s, &x->err))
    return send_error(x);
  return send_text(x, "{\"status\":\"ready\"}\n");
}

static enum MHD_Result answer_models(struct exchange *x)
{
  const char *names[SAMPLER_COUNT + 1] = {0};
  const struct serving *s = worker_serving(x->h->worker);
  struct buf b;

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
  const char *seen = exchange_header(x, MHD_HTTP_HEADER_IF_NONE_MATCH);
  int same = seen && !strcmp(seen, f->etag);
  struct MHD_Response *r = MHD_create_response_from_buffer(same ? 0 : f->len, (void *)(uintptr_t)f->data, MHD_RESPMEM_PERSISTENT);

  if (r) {
    add_header(r, MHD_HTTP_HEADER_ETAG, f->etag);
    add_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-cache");
    add_header(r, "Content-Security-Policy", PAGE_POLICY);
    add_header(r, "Referrer-Policy", "no-referrer");
  }
  return send_answer(x, same ? 304 : 200, page_type(f), r, f->len);
}

static enum MHD_Result answer_metrics(struct exchange *x)
{
  struct MHD_Response *r;
  struct buf b;
  size_t len;

  buf_init(&b, METRICS_PAGE_MAX);
  if (metrics_page(&b, x->h->worker, &x->err)) {
    buf_close(&b);
    return send_error(x);
  }
  r = response_take(&b, &len);
  return send_answer(x, 200, METRICS_PAGE_TYPE, r, len);
}

/* ---- the way of a request through handle() ---- */

static const struct route routes[] = {
    {.path = "/v1/images/generations", .method = "POST", .answer = answer_images, .body = BODY_JSON, .drawing = &openai_generations},
    {.path = "/v1/images/edits", .method = "POST", .answer = answer_images, .body = BODY_FORM, .takes_files = 1, .drawing = &openai_edits},
    {.path = "/v1/jobs", .method = "POST", .answer = answer_job_post, .body = BODY_JSON, .takes_files = 1, .drawing = &native_drawing},
    {.path = "/v1/jobs", .method = "GET", .answer = answer_job_list},
    {.path = "/v1/jobs/*", .method = "GET", .answer = answer_job_get},
    {.path = "/v1/jobs/*", .method = "DELETE", .answer = answer_job_cancel},
    {.path = "/v1/jobs/*/cancel", .method = "POST", .answer = answer_job_cancel},
    {.path = "/v1/jobs/*/events", .method = "GET", .answer = answer_job_events},
    {.path = "/v1/jobs/*/pictures/*", .method = "GET", .answer = answer_job_picture},
    {.path = "/v1/files/*", .method = "GET", .answer = answer_file},
    {.path = "/v1/models", .method = "GET", .answer = answer_models},
    {.path = "/healthz", .method = "GET", .answer = answer_health},
    {.path = "/readyz", .method = "GET", .answer = answer_ready},
    {.path = "/metrics", .method = "GET", .answer = answer_metrics},
};

/* Whether url is this path; what stands at each "*" goes into arg. */
static int is_path(const char *path, const char *url, char arg[EXCHANGE_ARGS][EXCHANGE_ARG_MAX])
{
  for (int i = 0; *path; path++) {
    size_t n = strcspn(url, "/");

    if (*path != '*') {
      if (*path != *url++)
        return 0;
      continue;
    }
    if (!n || n >= EXCHANGE_ARG_MAX)
      return 0;
    memcpy(arg[i], url, n);
    arg[i++][n] = 0;
    url += n;
  }
  return !*url;
}

static int is_get(const char *method)
{
  return !strcmp(method, "GET") || !strcmp(method, "HEAD");
}

/* The route among these for this path and method. What else the path takes is added to x->allow. */
static const struct route *route_among(struct exchange *x, const struct route *r, size_t n, const char *url, const char *method)
{
  for (const struct route *end = r + n; r < end; r++) {
    size_t at = strlen(x->allow);
    if (!is_path(r->path, url, x->arg))
      continue;
    if (!strcmp(r->method, method) || (!strcmp(r->method, "GET") && is_get(method)))
      return r;
    snprintf(x->allow + at, sizeof x->allow - at, "%s%s", at ? ", " : "", !strcmp(r->method, "GET") ? "GET, HEAD" : r->method);
  }
  return NULL;
}

/* Finds the route, or sets x->err to 404 or 405. The page's files are no routes: route stays NULL without an error. */
static void find_route(struct http *h, struct exchange *x, const char *url, const char *method)
{
  const struct page_file *f = h->cfg->page ? page_find(PAGE_PUBLIC, url) : NULL;

  x->route = route_among(x, routes, sizeof routes / sizeof *routes, url, method);
  if (!x->route)
    x->route = route_among(x, sdapi_routes, (size_t)sdapi_n_routes, url, method);
  if (x->route) {
    x->allow[0] = 0;
    return;
  }
  if (f && !is_get(method))
    snprintf(x->allow, sizeof x->allow, "GET, HEAD");
  if (*x->allow && !strcmp(method, "OPTIONS") && (h->cors.is_any || h->cors.n) && exchange_header(x, MHD_HTTP_HEADER_ORIGIN))
    x->is_preflight = 1;
  else if (*x->allow)
    err_set(&x->err, E_METHOD, "%s does not take %s; it takes %s", x->path, x->method, x->allow);
  else if (!f)
    err_set(&x->err, E_NOTFOUND, "there is nothing at %s", x->path);
}

static int is_type(const char *header, const char *type)
{
  size_t n = strlen(type);

  return header && !strncasecmp(header, type, n) && strchr(" \t;", header[n]);
}

/* The headers of a request that has a body: the type that the route takes, not compressed, not too long. */
static void check_body_headers(struct exchange *x)
{
  static const char *const types[] = {[BODY_JSON] = "application/json", [BODY_FORM] = "multipart/form-data"};
  const char *type = exchange_header(x, MHD_HTTP_HEADER_CONTENT_TYPE);
  const char *coding = exchange_header(x, MHD_HTTP_HEADER_CONTENT_ENCODING);
  const char *length = exchange_header(x, MHD_HTTP_HEADER_CONTENT_LENGTH);
  enum body_kind kind = x->route->body;

  if (kind != BODY_NONE && !is_type(type, types[kind]))
    err_set(&x->err, E_TYPE, "send the body as Content-Type: %s", types[kind]);
  else if (coding && strcasecmp(coding, "identity"))
    err_set(&x->err, E_TYPE, "send the body without Content-Encoding");
  else if (length && strtoull(length, NULL, 10) > x->body.max)
    err_set(&x->err, E_TOOBIG, "the body may have at most %zu bytes", x->body.max);
}

/* A client's own id is kept when it is made of safe characters; else one is drawn. */
static void set_id(struct exchange *x)
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  const char *id = exchange_header(x, "x-request-id");
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

/* The file that the client likes better than JSON; NULL: JSON. */
static const char *wanted_file(const struct exchange *x)
{
  static const char *const types[] = {"image/png", "image/jpeg", "image/webp"};
  const char *accept = exchange_header(x, MHD_HTTP_HEADER_ACCEPT), *best = NULL;
  double most = accept_quality(accept, "application/json");

  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (accept_quality(accept, types[i]) > most) {
      best = types[i];
      most = accept_quality(accept, types[i]);
    }
  return best;
}

/* The headers are in: everything that can be refused without the body is. */
static enum MHD_Result begin(struct http *h, struct MHD_Connection *c, const char *url, const char *method, void **cls)
{
  struct exchange *x = calloc(1, sizeof *x);
  const char *length;

  if (!x)
    return MHD_NO;
  *cls = x;
  atomic_fetch_add(&h->exchanges, 1);
  metric_move(METRIC_IN_FLIGHT, 0, 1);
  x->h = h;
  x->connection = c;
  x->watch_at = connection_entry(c);
  x->start_ns = clock_ns();
  set_id(x);
  trace_begin(&x->trace, exchange_header(x, "traceparent"));
  printable(x->method, sizeof x->method, method);
  printable(x->path, sizeof x->path, url);
  x->file_type = wanted_file(x);
  find_route(h, x, url, method);
  buf_init(&x->body, (size_t)(x->route && x->route->takes_files ? h->cfg->max_upload_kb : h->cfg->max_body_kb) << 10);
  if (x->route && x->route->body != BODY_NONE)
    check_body_headers(x);
  length = exchange_header(x, MHD_HTTP_HEADER_CONTENT_LENGTH);
  /* Answer now only where the client has not sent the body yet, or it is too long to be read to its end. */
  if (x->err.code && (exchange_header(x, MHD_HTTP_HEADER_EXPECT) || (length && strtoull(length, NULL, 10) > SWALLOW_MAX)))
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
  return x->swallowed > SWALLOW_MAX && x->swallowed > x->body.max ? MHD_NO : MHD_YES;
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
  if (x->then) {
    enum MHD_Result (*then)(struct exchange *) = x->then;
    x->then = NULL;
    return then(x);
  }
  if (x->err.code)
    return send_error(x);
  if (x->is_preflight)
    return send_preflight(x);
  if (x->route)
    return x->route->answer(x);
  return answer_page(x, page_find(PAGE_PUBLIC, url));
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
  stream_close(x);
  native_close(x);
  if (x->job)
    images_leave(x);
  l = &x->log;
  l->id = x->id;
  l->trace = &x->trace;
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
  if (cors_read(&h->cors, cfg->cors_origins, e) || peer_read_list(&h->proxies, cfg->trusted_proxies, e))
    return e->code;
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
  watch_poke_all(&h->watch); /* streams of jobs that others own end now */
}

void http_over(struct http *h)
{
  atomic_store(&h->is_over, 1);
}

int http_asking(struct http *h)
{
  return atomic_load(&h->asking) + atomic_load(&h->asleep);
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
