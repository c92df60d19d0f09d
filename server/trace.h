/*
 * trace.h - W3C Trace Context: which trace a request belongs to, so that its log line can be found from another system's.
 *
 * A traceparent that is well formed is continued, under a span of our own; anything else is as none (the recommendation asks for that), and a new
 * trace begins. The answer's traceparent names the trace and our span; tracestate is passed on to nobody, since nobody is called.
 *
 * Called by http.c and log.c. Threads: pure functions but for the system's random numbers.
 */
#ifndef SAFELIGHT_SERVER_TRACE_H
#define SAFELIGHT_SERVER_TRACE_H

enum { TRACE_ID = 32, TRACE_SPAN = 16, TRACE_HEADER = 55 };

struct trace {
  char id[TRACE_ID + 1];        /* lower-case hexadecimal, never all zeros */
  char span[TRACE_SPAN + 1];    /* of this request here */
  char parent[TRACE_SPAN + 1];  /* the caller's span; "" when the trace began here */
  int is_sampled;               /* the caller keeps it; of a new trace 0 */
};

/* 1 when the header is a traceparent that can be continued: t gets id, parent and is_sampled, and span "". Else 0 and t is all "". */
int trace_parse(struct trace *t, const char *header);
/* The request's trace: the header's (NULL: none) or a new one, with a span of its own. */
void trace_begin(struct trace *t, const char *header);
/* "00-ID-SPAN-01", for the answer. */
void trace_header(char out[TRACE_HEADER + 1], const struct trace *t);

#endif
