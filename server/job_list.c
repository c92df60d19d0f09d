/*
 * job_list.c - see job_list.h.
 */
#include "server/job_list.h"

#include <stdio.h>
#include <stdlib.h>

/* The caller holds the lock. A job between READING and DONE has its request, its steps and its target, which do not change. */
static void glance(struct job_glance *g, const struct job *j, int64_t now)
{
  const struct request *q = &j->req;

  *g = (struct job_glance){.state = j->state, .width = q->width, .height = q->height, .steps = j->steps * q->n, .pictures = q->n,
                           .steps_done = atomic_load(&j->steps_done), .drawn = atomic_load(&j->drawn), .due_ns = j->due_ns, .serial = j->serial};
  snprintf(g->id, sizeof g->id, "%s", j->id);
  snprintf(g->caller, sizeof g->caller, "%s", j->caller);
  snprintf(g->profile, sizeof g->profile, "%s", j->target ? safety_target_profile(j->target) : "");
  g->age_s = j->submitted_ns ? (double)(now - j->submitted_ns) / 1e9 : 0;
  g->work = j->state == JOB_DRAWN ? 0 : j->work * (g->steps - g->steps_done);
}

static int is_waiting(const struct job_glance *g)
{
  return g->state < JOB_RUNNING;
}

/* Running before waiting; what is being composed for comes after what could start now. */
static int compare(const void *one, const void *two)
{
  const struct job_glance *a = one, *b = two;

  if (is_waiting(a) != is_waiting(b))
    return is_waiting(a) - is_waiting(b);
  if (is_waiting(a) && a->state != b->state)
    return a->state == JOB_PREPARING ? 1 : -1;
  if (is_waiting(a) && a->due_ns != b->due_ns)
    return a->due_ns < b->due_ns ? -1 : 1;
  return a->serial < b->serial ? -1 : a->serial > b->serial;
}

int jobs_list(struct jobs *js, struct job_glance **list, int *n, struct err *e)
{
  struct job_glance *g = malloc((size_t)js->n * sizeof *g);
  double ns_per_work, work = 0;
  int64_t now = clock_ns();
  int count = 0, place = 0;

  *list = NULL;
  *n = 0;
  if (!g)
    return err_set(e, E_NOMEM, "out of memory for the list of jobs");
  lock_take(&js->lock);
  for (int i = 0; i < js->n; i++)
    if (js->job[i].state > JOB_READING && js->job[i].state < JOB_DONE)
      glance(&g[count++], &js->job[i], now);
  ns_per_work = js->ns_per_work;
  lock_drop(&js->lock);
  qsort(g, (size_t)count, sizeof *g, compare);
  for (int i = 0; i < count; i++)
    work += is_waiting(&g[i]) ? 0 : g[i].work;
  for (int i = 0; i < count; i++) { /* work: of all before it, which the devices share */
    double own = is_waiting(&g[i]) ? g[i].work : 0;

    g[i].wait_s = (g[i].state == JOB_DRAWN ? 0 : work / js->devices + own) * ns_per_work / 1e9;
    work += own;
    if (is_waiting(&g[i]))
      g[i].position = ++place;
  }
  *list = g;
  *n = count;
  return 0;
}
