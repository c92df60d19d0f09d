/*
 * reply.c - the answers of the HTTP server: headers that every one carries, JSON, errors.
 *
 * Called by http.c, images.c, stream.c and the surfaces. Threads: the HTTP thread.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "server/exchange.h"

enum { READ_RATE = 16 << 10 };

void add_header(struct MHD_Response *r, const char *name, const char *value)
{
  /* Fails only when memory is short or a value holds a newline, which none does; an answer without it is still an answer. */
  (void)MHD_add_response_header(r, name, value);
}

void add_headerf(struct MHD_Response *r, const char *name, const char *fmt, ...)
{
  char value[256];
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(value, sizeof value, fmt, ap);
  va_end(ap);
  add_header(r, name, value);
}

const char *exchange_header(const struct exchange *x, const char *name)
{
  return MHD_lookup_connection_value(x->connection, MHD_HEADER_KIND, name);
}

int64_t from_now(int seconds)
{
  return clock_ns() + (int64_t)seconds * 1000000000;
}

/* Who may read this answer from a page of another origin. */
static void add_origin(struct exchange *x, struct MHD_Response *r)
{
  const struct cors *c = &x->h->cors;
  const char *allowed = cors_allow(c, exchange_header(x, MHD_HTTP_HEADER_ORIGIN));

  if (cors_varies(c))
    add_header(r, MHD_HTTP_HEADER_VARY, MHD_HTTP_HEADER_ORIGIN);
  if (!allowed)
    return;
  add_header(r, "Access-Control-Allow-Origin", allowed);
  if (!x->is_preflight)
    add_header(r, "Access-Control-Expose-Headers", CORS_EXPOSED);
}

enum MHD_Result send_preflight(struct exchange *x)
{
  struct MHD_Response *r = MHD_create_response_from_buffer(0, NULL, MHD_RESPMEM_PERSISTENT);
  char names[CORS_HEADERS_MAX];

  if (r && cors_allow(&x->h->cors, exchange_header(x, MHD_HTTP_HEADER_ORIGIN))) {
    cors_headers(names, exchange_header(x, "Access-Control-Request-Headers"));
    add_header(r, "Access-Control-Allow-Methods", CORS_METHODS);
    if (*names)
      add_header(r, "Access-Control-Allow-Headers", names);
    add_header(r, "Access-Control-Max-Age", CORS_MAX_AGE);
  }
  return send_answer(x, 204, NULL, r, 0);
}

void exchange_sending(struct exchange *x, size_t len)
{
  watch_phase(&x->h->watch, x->watch_at, WATCH_SENDING, from_now(x->h->cfg->client_s + (int)(len / READ_RATE)));
}

enum MHD_Result send_answer(struct exchange *x, int status, const char *type, struct MHD_Response *r, size_t len)
{
  enum MHD_Result ret;
  char trace[TRACE_HEADER + 1];

  if (!r)
    return MHD_NO;
  x->status = status;
  if (type)
    add_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, type);
  add_header(r, "x-request-id", x->id);
  trace_header(trace, &x->trace);
  add_header(r, "traceparent", trace);
  add_origin(x, r);
  add_header(r, "X-Content-Type-Options", "nosniff");
  if (atomic_load(&x->h->is_stopping))
    add_header(r, MHD_HTTP_HEADER_CONNECTION, "close");
  exchange_sending(x, len);
  ret = MHD_queue_response(x->connection, (unsigned)status, r);
  MHD_destroy_response(r);
  return ret;
}

struct MHD_Response *response_take(struct buf *b, size_t *len)
{
  char *p = buf_take(b, len);
  struct MHD_Response *r = MHD_create_response_from_buffer(*len, p, MHD_RESPMEM_MUST_FREE);

  if (!r)
    free(p);
  else
    add_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
  return r;
}

enum MHD_Result send_json(struct exchange *x, int status, struct buf *b)
{
  size_t len;
  struct MHD_Response *r = response_take(b, &len);

  return send_answer(x, status, "application/json", r, len);
}

enum MHD_Result send_text(struct exchange *x, const char *json)
{
  struct buf b;

  buf_init(&b, 64 << 10);
  if (buf_add_str(&b, json, NULL))
    return MHD_NO;
  return send_json(x, 200, &b);
}

/* How errors are written where this request went, also when there is nothing. */
static const struct surface *surface_of(const struct exchange *x)
{
  if (x->route && x->route->surface)
    return x->route->surface;
  return strncmp(x->path, "/sdapi/", 7) ? &surface_openai : &surface_sdapi;
}

enum MHD_Result send_error(struct exchange *x)
{
  const struct surface *s = surface_of(x);
  struct err e = {0};
  struct buf b;
  struct MHD_Response *r;
  size_t len;
  int status = openai_status(x->err.code);

  buf_init(&b, 64 << 10);
  if (s->encode_error(&b, &x->err, &e)) {
    buf_close(&b);
    return MHD_NO; /* no memory for one sentence: the connection closes */
  }
  r = response_take(&b, &len);
  if (r && *x->allow)
    add_header(r, MHD_HTTP_HEADER_ALLOW, x->allow);
  if (r && status == 429) {
    int64_t ms = x->retry_ms ? x->retry_ms : 1000 * (int64_t)jobs_retry_after(x->h->jobs);
    add_headerf(r, MHD_HTTP_HEADER_RETRY_AFTER, "%lld", (long long)((ms + 999) / 1000));
    add_headerf(r, "retry-after-ms", "%lld", (long long)ms);
  } else if (r && status == 503) {
    add_header(r, MHD_HTTP_HEADER_RETRY_AFTER, "2");
  }
  return send_answer(x, status, "application/json", r, len);
}
