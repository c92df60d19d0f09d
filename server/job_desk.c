/*
 * job_desk.c - the desks of the devices: which device takes the next job, and how pictures pass between a device thread and its stage thread. See job.h.
 *
 * A device that has room takes the next job when no other that has room has fewer pictures. So the pictures spread evenly, and since the one with
 * the fewest is woken whenever a job waits, none sleeps while there is work. Whoever changes what the rule looks at wakes those whom it lets take:
 *
 *      what changes                               who wakes
 *      a job is queued                            job_submit
 *      a device has more pictures than before     job_take, while jobs wait
 *      a device has fewer pictures                nobody: it is awake, or pic_return wakes it
 *      a device fails                             jobs_leave
 *
 * Called by device.c, stage.c, job.c. Threads: as job.h says.
 */
#include "server/job.h"

/* ---- the rule ---- */

void desk_open(struct desk *d, int room)
{
  d->room = room;
  pthread_cond_init(&d->has_work, NULL);
  pthread_cond_init(&d->has_stage, NULL);
  d->back_end = &d->back;
  d->stage_end = &d->stage;
}

void desk_close(struct desk *d)
{
  pthread_cond_destroy(&d->has_work);
  pthread_cond_destroy(&d->has_stage);
}

int desk_may_take(const struct jobs *js, int device)
{
  const struct desk *d = &js->desk[device];

  HELD(&js->lock);
  for (int i = 0; i < js->devices; i++) {
    const struct desk *o = &js->desk[i];
    if (i == device || o->is_out)
      continue;
    if (d->is_out || (o->pictures < o->room && o->pictures < d->pictures))
      return 0;
  }
  return 1;
}

void desks_wake(struct jobs *js)
{
  HELD(&js->lock);
  for (int i = 0; i < js->devices; i++)
    if (desk_may_take(js, i))
      pthread_cond_signal(&js->desk[i].has_work);
}

void jobs_set_room(struct jobs *js, int device, int room)
{
  lock_take(&js->lock);
  js->desk[device].room = room;
  lock_drop(&js->lock);
}

void jobs_leave(struct jobs *js, int device)
{
  lock_take(&js->lock);
  js->desk[device].is_out = 1;
  if (js->queue)
    desks_wake(js);
  lock_drop(&js->lock);
}

/* ---- device thread ---- */

int jobs_wait(struct jobs *js, int device, int may_take)
{
  struct desk *d = &js->desk[device];
  int has;

  lock_take(&js->lock);
  while (!(has = d->back || (may_take && js->queue && desk_may_take(js, device))) && !js->is_over)
    lock_wait(&js->lock, &d->has_work);
  lock_drop(&js->lock);
  return has;
}

struct picture *pics_returned(struct jobs *js, int device)
{
  struct desk *d = &js->desk[device];
  struct picture *p;

  lock_take(&js->lock);
  p = d->back;
  d->back = NULL;
  d->back_end = &d->back;
  lock_drop(&js->lock);
  return p;
}

void pic_send(struct jobs *js, struct picture *p, enum stage_work work)
{
  struct stage_item *item = work == STAGE_PREVIEW ? &p->preview_item : &p->item;
  struct desk *d = &js->desk[p->job->device];

  lock_take(&js->lock);
  if (work == STAGE_START && p->job->ending == CUT_PICTURES && !atomic_load(&p->job->cut)) /* behind those that were cut */
    p->job->ending = CUT_NOTHING;
  item->work = work;
  item->next = NULL;
  *d->stage_end = item;
  d->stage_end = &item->next;
  pthread_cond_signal(&d->has_stage);
  lock_drop(&js->lock);
}

int jobs_choose(struct jobs *js, struct picture *const *ready, int n, int cap, struct picture **p)
{
  struct turn turn[JOB_ALIVE_MAX];
  int chosen[JOB_ALIVE_MAX];

  assert(n <= JOB_ALIVE_MAX);
  lock_take(&js->lock);
  for (int i = 0; i < n; i++) {
    const struct job *j = ready[i]->job;
    turn[i] = (struct turn){.share = j->share, .due_ns = j->due_ns, .last = ready[i]->last, .work = j->work};
  }
  n = fair_choose(turn, n, cap, chosen);
  lock_drop(&js->lock);
  for (int i = 0; i < n; i++)
    p[i] = ready[chosen[i]];
  return n;
}

/* ---- stage thread ---- */

struct stage_item *stage_next(struct jobs *js, int device)
{
  struct desk *d = &js->desk[device];
  struct stage_item *s;

  lock_take(&js->lock);
  while (!d->stage && !js->is_over)
    lock_wait(&js->lock, &d->has_stage);
  s = d->stage;
  if (s) {
    d->stage = s->next;
    if (!d->stage)
      d->stage_end = &d->stage;
  }
  lock_drop(&js->lock);
  return s;
}

void pic_return(struct jobs *js, struct picture *p)
{
  struct desk *d = &js->desk[p->job->device];

  lock_take(&js->lock);
  d->pictures -= !p->draw;
  p->next = NULL;
  *d->back_end = p;
  d->back_end = &p->next;
  pthread_cond_signal(&d->has_work);
  lock_drop(&js->lock);
}
