/*
 * sse.h - server-sent events, as WHATWG's HTML (9.2, server-sent events) has browsers read them.
 *
 * An event is sse_begin, its data, sse_end. Data is JSON on one line: jansson's compact form has no line ends, base64 none either.
 *
 * Called by proto/openai_encode.c and proto/jobs.c; server/ sends the comment. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_SSE_H
#define SAFELIGHT_PROTO_SSE_H

#include <stdint.h>

#include "base/buf.h"

#define SSE_TYPE "text/event-stream"

/* What keeps a proxy from closing a stream that says nothing for a while; readers ignore it. */
#define SSE_KEEP_ALIVE ": alive\n\n"

/* Appends the lines before the data. name: of the event, no line ends; id: what a reader that lost its connection sends back as Last-Event-ID, none below 0. */
MUST_CHECK int sse_begin(struct buf *out, const char *name, int64_t id, struct err *e);
MUST_CHECK int sse_end(struct buf *out, struct err *e);

/* The number in a Last-Event-ID header; -1 for NULL and what is no number. */
int64_t sse_last_id(const char *header);

#endif
