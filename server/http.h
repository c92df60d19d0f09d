/*
 * http.h - the HTTP server: routes, limits, suspended connections.
 *
 * Called by serve.c on the main thread. Everything else runs on the one HTTP thread that libmicrohttpd starts.
 */
#ifndef SAFELIGHT_SERVER_HTTP_H
#define SAFELIGHT_SERVER_HTTP_H

#include <stdatomic.h>

#include "server/config.h"
#include "server/cors.h"
#include "server/job.h"
#include "server/peer.h"
#include "server/watch.h"
#include "server/worker.h"

struct http {
  const struct config *cfg;
  struct jobs *jobs;
  struct worker *worker;
  struct audit *audit;
  struct async *_Atomic async; /* NULL until durable jobs are taken */
  _Atomic int asking;       /* questions to the store that are not answered */
  _Atomic int asleep;       /* connections that are suspended */
  struct watch watch;
  struct cors cors;
  struct peer_list proxies;
  void *daemon;             /* struct MHD_Daemon */
  int listen_fd;
  char url[96];             /* "http://127.0.0.1:8080" */
  _Atomic int is_stopping;  /* answers say Connection: close, /readyz says no */
  _Atomic int is_over;      /* no connection goes to sleep any more */
  _Atomic int exchanges;    /* requests between their first byte and their last */
};

/* Listens, prints nothing. E_ARG with a sentence that says what to change when the address cannot be had. On success http_close
 * after every job is FREE; after failure too. */
MUST_CHECK int http_open(struct http *h, const struct config *cfg, struct jobs *js, struct worker *w, struct audit *audit,
                         struct err *e);
void http_stopping(struct http *h); /* any thread */
/* Main thread, when no job is left: whoever would sleep is closed instead. When nobody is asking any more http_close may come. */
void http_over(struct http *h);
int http_asking(struct http *h);    /* any thread: questions to the store and connections that sleep; http_close waits for none */
int http_exchanges(struct http *h); /* any thread: requests that are not fully answered */
void http_close(struct http *h);    /* takes zeroed and half-open */

#endif
