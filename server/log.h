/*
 * log.h - one line per event, to stderr. Plain or JSON by configuration; what clients sent is escaped, prompts only when asked.
 *
 * A line that stderr does not take at once (a full pipe) is dropped and counted, so that no thread ever waits for a reader.
 *
 * Called by http.c, worker.c, device.c, serve.c. Threads: any; log_open before they start.
 */
#ifndef SAFELIGHT_SERVER_LOG_H
#define SAFELIGHT_SERVER_LOG_H

#include "proto/openai.h"
#include "server/trace.h"

void log_open(int is_json);

/* An event of the server itself, such as "model loaded". */
void log_event(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* One finished request. */
struct log_request {
  const char *id, *method, *path, *error; /* error "" when there is none */
  const struct trace *trace;              /* NULL: none */
  int status;
  const struct stage_times *times;        /* NULL: no picture was asked for */
  int n, width, height, steps;            /* steps: how many the device did, of all pictures */
  const char *prompt;                     /* NULL: not logged */
  double total_ms;
};
void log_request(const struct log_request *r);

#endif
