/*
 * job_look.c - see job.h: what one may know of a job that is somebody else's, and who is told of its news.
 *
 * Everything is read under the table's lock, or is atomic. Called by the surfaces and the operator's page. Threads: any.
 */
#include <string.h>

#include "server/job.h"

/* Between the owner's and the reader's hands: what others may look at. */
static int is_visible(const struct job *j)
{
  return j->state > JOB_READING;
}

static double work_left(const struct job *j)
{
  return j->work * (j->steps * j->req.n - atomic_load(&j->steps_done));
}

/* Whether the waiting job a starts before b, as far as one can tell. */
static int is_ahead(const struct job *a, const struct job *b)
{
  return a->due_ns < b->due_ns || (a->due_ns == b->due_ns && a->serial < b->serial);
}

/* Place and time until the job is done; the caller holds the lock. */
static void look_ahead(struct jobs *js, const struct job *j, struct job_view *v)
{
  double work = 0;

  for (int i = 0; i < js->n; i++) {
    const struct job *o = &js->job[i];
    if (o == j)
      continue;
    if (o->state == JOB_RUNNING || (o->state == JOB_QUEUED && is_ahead(o, j)))
      work += work_left(o);
    v->position += o->state == JOB_QUEUED && is_ahead(o, j);
  }
  if (j->state == JOB_QUEUED)
    v->position++;
  else
    v->position = 0;
  v->wait_s = (work / js->devices + work_left(j)) * js->ns_per_work / 1e9;
}

int job_look(struct jobs *js, struct job *j, uint64_t serial, int after_preview, int wants_preview, struct job_view *v)
{
  int is_there;

  *v = (struct job_view){0};
  lock_take(&js->lock);
  is_there = j->serial == serial && is_visible(j);
  if (is_there) {
    v->state = j->state;
    memcpy(v->id, j->id, sizeof v->id);
    v->submitted_ns = j->submitted_ns;
    v->pictures = j->req.n;
    v->steps = j->steps * j->req.n;
    v->steps_done = atomic_load(&j->steps_done);
    v->drawn = atomic_load(&j->drawn);
    v->ending = j->ending;
    if (j->state < JOB_DRAWN)
      look_ahead(js, j, v);
    for (int k = after_preview + 1; k <= j->previews && !v->preview; k++) {
      struct blob *b = j->preview[k % JOB_PREVIEWS];
      if (b->number == k)
        v->preview = blob_ref(b);
    }
    if (wants_preview && !v->preview)
      atomic_store(&j->wants_preview, 1);
  }
  lock_drop(&js->lock);
  return is_there;
}

struct job *job_find(struct jobs *js, const char *id, uint64_t *serial)
{
  struct job *found = NULL;

  lock_take(&js->lock);
  for (int i = 0; i < js->n; i++) {
    struct job *j = &js->job[i];
    if (is_visible(j) && j->is_durable && !strcmp(j->id, id) && (!found || j->serial > found->serial))
      found = j;
  }
  *serial = found ? found->serial : 0;
  lock_drop(&js->lock);
  return found;
}

/* Whether a is rather at hand than b, which may be NULL. */
static int is_nearer(const struct job *a, const struct job *b)
{
  if (!b || (a->state >= JOB_RUNNING) != (b->state >= JOB_RUNNING))
    return !b || a->state >= JOB_RUNNING;
  return a->serial < b->serial;
}

struct job *job_find_caller(struct jobs *js, const char *caller, const struct surface *surface, uint64_t *serial)
{
  struct job *found = NULL;

  lock_take(&js->lock);
  for (int i = 0; i < js->n; i++) {
    struct job *j = &js->job[i];
    if (is_visible(j) && j->state < JOB_DONE && j->surface == surface && !strcmp(j->caller, caller) && is_nearer(j, found))
      found = j;
  }
  *serial = found ? found->serial : 0;
  lock_drop(&js->lock);
  return found;
}

int job_listen(struct jobs *js, struct job *j, uint64_t serial, struct listener *l)
{
  int is_there;

  lock_take(&js->lock);
  is_there = j->serial == serial && is_visible(j);
  if (is_there) {
    l->job = j;
    l->next = j->listeners;
    j->listeners = l;
  }
  lock_drop(&js->lock);
  return is_there;
}

void job_unlisten(struct jobs *js, struct listener *l)
{
  lock_take(&js->lock);
  if (l->job) {
    struct listener **p = &l->job->listeners;
    while (*p != l)
      p = &(*p)->next;
    *p = l->next;
    l->job = NULL;
  }
  lock_drop(&js->lock);
}

struct jobs_count jobs_count(struct jobs *js)
{
  struct jobs_count c;

  lock_take(&js->lock);
  c = (struct jobs_count){.waiting = js->waiting, .running = js->running, .active = js->active};
  for (int i = 0; i < js->devices; i++)
    c.room += js->desk[i].room;
  lock_drop(&js->lock);
  return c;
}

int jobs_retry_after(struct jobs *js)
{
  double work = 0, s;
  int n = 1;

  lock_take(&js->lock);
  for (int i = 0; i < js->n; i++)
    if (js->job[i].state == JOB_RUNNING || js->job[i].state == JOB_QUEUED) {
      work += work_left(&js->job[i]);
      n++;
    }
  s = work * js->ns_per_work / 1e9 / n / js->devices;
  lock_drop(&js->lock);
  return s < 1 ? 1 : s > 60 ? 60 : (int)(s + 0.999);
}
