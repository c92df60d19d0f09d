/*
 * stream.c - answers that are made while they are sent: server-sent events.
 *
 * libmicrohttpd asks for more bytes; when there is no news the connection is suspended, as it is before an answer, and whoever has news
 * resumes it. While it waits the watcher minds the client: one that leaves ends its own job, and a comment goes out now and then
 * so that proxies do not take the silence for death.
 *
 * Called by images.c and the surfaces. Threads: the HTTP thread.
 */
#include <string.h>

#include "proto/sse.h"
#include "server/exchange.h"

enum { EVENTS_MAX = 64 << 20, SEEK_S = 1 };

/* Fills the buffer with what there is. 0: nothing. With the last of it the job has told all: who reads slowly holds no entry of the table, which others
 * wait for, and no end of the server. */
static int look_for_news(struct exchange *x)
{
  struct stream *s = &x->stream;

  s->at = s->out.len = 0;
  s->is_time = atomic_exchange(&x->is_poked, 0);
  if (s->is_time)
    (void)!buf_add_str(&s->out, SSE_KEEP_ALIVE, NULL); /* without memory this sign of life is left out, and not the news: nobody pokes again before it sleeps */
  if (!s->produce(x, &s->out)) {
    s->is_over = 1;
    if (x->job)
      images_finish(x);
  }
  return s->out.len > 0 || s->is_over;
}

/* The watcher thread: the client is gone, or it is time for a sign of life, which then does not reach it. */
static void poke(void *arg)
{
  struct exchange *x = arg;

  atomic_store(&x->is_poked, 1);
  exchange_wake(x);
}

static void mind(struct exchange *x)
{
  if (x->job)
    watch_job(&x->h->watch, x->watch_at, x->job, x->job->serial, x->stream.deadline_ns);
  else
    watch_stream(&x->h->watch, x->watch_at, poke, x, from_now(x->stream.is_seeking ? SEEK_S : x->h->cfg->alive_s));
}

static ssize_t read_events(void *cls, uint64_t pos, char *buf, size_t max)
{
  struct exchange *x = cls;
  struct stream *s = &x->stream;
  size_t n;

  (void)pos;
  if (s->at == s->out.len && !s->is_over && !look_for_news(x)) {
    mind(x);
    if (!exchange_sleep(x))
      return MHD_CONTENT_READER_END_WITH_ERROR;
    if (look_for_news(x)) /* what came before it slept woke nobody */
      exchange_wake(x);
    return 0;
  }
  if (s->at == s->out.len)
    return s->is_over ? MHD_CONTENT_READER_END_OF_STREAM : 0;
  if (!s->at)
    exchange_sending(x, s->out.len);
  n = s->out.len - s->at < max ? s->out.len - s->at : max;
  memcpy(buf, s->out.p + s->at, n);
  s->at += n;
  return (ssize_t)n;
}

void stream_wake(struct listener *l)
{
  exchange_wake((struct exchange *)((char *)l - offsetof(struct exchange, stream.listener)));
}

enum MHD_Result stream_open(struct exchange *x, int (*produce)(struct exchange *x, struct buf *out))
{
  struct MHD_Response *r;

  x->stream.produce = produce;
  x->stream.deadline_ns = from_now(x->h->cfg->deadline_s);
  buf_init(&x->stream.out, EVENTS_MAX);
  r = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 32 << 10, read_events, x, NULL);
  if (r) {
    add_header(r, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    add_header(r, "X-Accel-Buffering", "no"); /* nginx would hold events back */
  }
  return send_answer(x, 200, SSE_TYPE, r, 0);
}

void stream_close(struct exchange *x)
{
  job_unlisten(x->h->jobs, &x->stream.listener);
  buf_close(&x->stream.out);
}
