/*
 * metrics_page.h - GET /metrics: the table of metrics.c, and what only the running server can say: which generations are live, what it is.
 *
 * Called by http.c on the HTTP thread. Takes no lock of the engine: everything is read from atomics, from what is immutable, or as a counted reader
 * (safety_current). Threads: any.
 */
#ifndef SAFELIGHT_SERVER_METRICS_PAGE_H
#define SAFELIGHT_SERVER_METRICS_PAGE_H

#include "base/buf.h"
#include "base/err.h"
#include "server/worker.h"

enum { METRICS_PAGE_MAX = 1 << 20 };
#define METRICS_PAGE_TYPE "text/plain; version=0.0.4; charset=utf-8"

/* Appends the page. E_NOMEM, E_TOOBIG. */
MUST_CHECK int metrics_page(struct buf *out, const struct worker *w, struct err *e);

#endif
