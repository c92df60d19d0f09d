/*
 * log.c - see log.h.
 */
#include "server/log.h"

#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/utf8.h"

enum { LINE = 4000 }; /* under PIPE_BUF, so that lines of several threads never mix */

static int as_json;
static _Atomic long dropped;

struct line {
  char text[LINE];
  size_t len;
};

void log_open(int is_json)
{
  as_json = is_json;
}

static void put(struct line *l, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static void put(struct line *l, const char *fmt, ...)
{
  va_list ap;
  int n;

  va_start(ap, fmt);
  n = vsnprintf(l->text + l->len, sizeof l->text - l->len, fmt, ap);
  va_end(ap);
  if (n > 0)
    l->len += (size_t)n < sizeof l->text - l->len ? (size_t)n : sizeof l->text - l->len - 1;
}

/* A quoted string with JSON's escapes, at most max bytes of s and the rest of a character. Whole characters of UTF-8 pass as they are; a byte that is none,
 * as in a path that a client made up, is a question mark. */
static void put_quoted(struct line *l, const char *s, size_t max)
{
  size_t n;

  put(l, "\"");
  for (size_t i = 0; s[i] && i < max; i += n ? n : 1) {
    unsigned char c = (unsigned char)s[i];
    n = utf8_length(s + i);
    if (c == '"' || c == '\\')
      put(l, "\\%c", c);
    else if (c < 0x20 || c == 0x7f)
      put(l, "\\u%04x", c);
    else
      put(l, "%.*s", n ? (int)n : 1, n ? s + i : "?");
  }
  put(l, "\"");
}

static void put_time(struct line *l)
{
  struct timespec t;
  struct tm tm;
  char day[32];

  clock_gettime(CLOCK_REALTIME, &t);
  gmtime_r(&t.tv_sec, &tm);
  strftime(day, sizeof day, "%Y-%m-%dT%H:%M:%S", &tm);
  put(l, as_json ? "{\"time\":\"%s.%03ldZ\"," : "%s.%03ldZ ", day, t.tv_nsec / 1000000);
}

static void flush(struct line *l)
{
  struct pollfd p = {.fd = STDERR_FILENO, .events = POLLOUT};
  long lost;

  if (l->len > LINE - 2)
    l->len = LINE - 2;
  l->text[l->len++] = '\n';
  if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT) || write(STDERR_FILENO, l->text, l->len) < 0) {
    atomic_fetch_add(&dropped, 1);
    return;
  }
  lost = atomic_exchange(&dropped, 0);
  if (lost)
    log_event("%ld log lines were dropped because stderr was full", lost);
}

void log_event(const char *fmt, ...)
{
  struct line l = {.len = 0};
  char text[1024];
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  put_time(&l);
  if (as_json) {
    put(&l, "\"event\":");
    put_quoted(&l, text, sizeof text);
    put(&l, "}");
  } else {
    put(&l, "%s", text);
  }
  flush(&l);
}

static void request_json(struct line *l, const struct log_request *r)
{
  const struct stage_times *t = r->times;

  put(l, "\"id\":");
  put_quoted(l, r->id, 64);
  if (r->trace) {
    put(l, ",\"trace_id\":\"%s\",\"span_id\":\"%s\"", r->trace->id, r->trace->span);
    if (*r->trace->parent)
      put(l, ",\"parent_id\":\"%s\"", r->trace->parent);
  }
  put(l, ",\"method\":");
  put_quoted(l, r->method, 16);
  put(l, ",\"path\":");
  put_quoted(l, r->path, 100);
  put(l, ",\"status\":%d,\"total_ms\":%.2f", r->status, r->total_ms);
  if (t)
    put(l, ",\"n\":%d,\"width\":%d,\"height\":%d,\"steps\":%d,\"queue_ms\":%.2f,\"text_ms\":%.2f,\"unet_ms\":%.2f,"
           "\"vae_ms\":%.2f,\"png_ms\":%.2f", r->n, r->width, r->height, r->steps, t->queue, t->text, t->unet, t->vae, t->png);
  if (*r->error) {
    put(l, ",\"error\":");
    put_quoted(l, r->error, 300);
  }
  if (r->prompt) {
    put(l, ",\"prompt\":");
    put_quoted(l, r->prompt, 1000);
  }
  put(l, "}");
}

static void request_plain(struct line *l, const struct log_request *r)
{
  const struct stage_times *t = r->times;

  put(l, "%s %s %s %d %.2f ms", r->id, r->method, r->path, r->status, r->total_ms);
  if (t)
    put(l, " n=%d %dx%d steps=%d queue=%.2f text=%.2f unet=%.2f vae=%.2f png=%.2f", r->n, r->width, r->height, r->steps,
        t->queue, t->text, t->unet, t->vae, t->png);
  if (*r->error) {
    put(l, " error=");
    put_quoted(l, r->error, 300);
  }
  if (r->prompt) {
    put(l, " prompt=");
    put_quoted(l, r->prompt, 1000);
  }
}

void log_request(const struct log_request *r)
{
  struct line l = {.len = 0};

  put_time(&l);
  if (as_json)
    request_json(&l, r);
  else
    request_plain(&l, r);
  flush(&l);
}
