/*
 * reader.c - see reader.h.
 */
#include "server/reader.h"

#include "server/drawing.h"

static void *run(void *arg)
{
  struct reader *r = arg;
  struct job *j;

  thread_self = THREAD_READ;
  while ((j = reading_next(r->jobs))) {
    if (!atomic_load(&j->stop))
      (void)!drawing_prepare(j, &r->worker->serving, &j->err); /* published before the first job was admitted */
    job_was_read(r->jobs, j);
  }
  return NULL;
}

int reader_start(struct reader *r, struct jobs *js, const struct worker *w, struct err *e)
{
  *r = (struct reader){.jobs = js, .worker = w};
  if (thread_start(&r->thread, "reader", run, r, e))
    return e->code;
  r->is_running = 1;
  return 0;
}

void reader_join(struct reader *r)
{
  if (r->is_running)
    pthread_join(r->thread, NULL);
  *r = (struct reader){0};
}
