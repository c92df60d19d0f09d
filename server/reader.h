/*
 * reader.h - the reader thread: first pictures and masks from outside become pixels of the request's size, off the HTTP thread, one request at a time.
 *
 * A thread of its own, since a picture at the limit takes half a second: finished pictures (encode.h) and everybody's prompts (stage.h) do not wait behind
 * what one client sends. What is refused is refused before its job is in the queue, and answered as it would be without this thread.
 *
 * Called by serve.c. Threads: it owns a job that is READING until job_was_read.
 */
#ifndef SAFELIGHT_SERVER_READER_H
#define SAFELIGHT_SERVER_READER_H

#include <pthread.h>

#include "server/job.h"
#include "server/worker.h"

struct reader {
  struct jobs *jobs;
  const struct worker *worker;   /* for the model and its limits */
  pthread_t thread;
  int is_running;
};

MUST_CHECK int reader_start(struct reader *r, struct jobs *js, const struct worker *w, struct err *e);
void reader_join(struct reader *r); /* after jobs_end; takes one that never started */

#endif
