/*
 * stage.c - see stage.h.
 */
#include "server/stage.h"

static double ms_since(int64_t t)
{
  return (double)(clock_ns() - t) / 1e6;
}

/* A snapshot that cannot be decoded is no picture and no failure of one: there is no preview then. */
static void preview(struct stage *s, struct picture *p)
{
  struct err ignored = {0};

  if (draw_preview(p->draw, s->lane, p->job->preview_rgb, &ignored))
    job_add_preview(s->jobs, p->job, NULL);
  else
    job_send_preview(s->jobs, p->job);
}

static void work(struct stage *s, struct stage_item *item)
{
  struct picture *p = item->pic;
  struct job *j = p->job;
  int64_t t = clock_ns();

  if (item->work == STAGE_PREVIEW) {
    preview(s, p);
    return;
  }
  if (item->work == STAGE_START) {
    if (!p->err.code)
      (void)!draw_start(p->draw, s->lane, j->generation, &p->err);
    j->times.text += ms_since(t);
  } else {
    if (item->work == STAGE_DECODE && !draw_decode(p->draw, s->lane, p->rgb, &p->err))
      j->times.vae += ms_since(t);
    draw_close(p->draw);
    p->draw = NULL;
  }
  pic_return(s->jobs, p);
}

/* Beside the steps of others one thread: two teams of threads on the same cores wait for each other. */
static void work_beside(struct stage *s, struct stage_item *item)
{
  struct desk *d = &s->jobs->desk[s->device];

  atomic_store(&d->staging, 1);
  lane_use_threads(s->lane, atomic_load(&d->stepping) ? 1 : 0);
  work(s, item);
  atomic_store(&d->staging, 0);
}

static void *run(void *arg)
{
  struct stage *s = arg;
  struct stage_item *item;

  thread_self = THREAD_STAGE;
  thread_gives_way();
  while ((item = stage_next(s->jobs, s->device)))
    work_beside(s, item);
  return NULL;
}

int stage_open(struct stage *s, struct jobs *js, int device, struct model *m, struct err *e)
{
  *s = (struct stage){.jobs = js, .device = device};
  return lane_open(&s->lane, m, 0, LANE_ENDS, e);
}

int stage_start(struct stage *s, struct err *e)
{
  if (thread_start(&s->thread, "stage", run, s, e))
    return e->code;
  s->is_running = 1;
  return 0;
}

void stage_close(struct stage *s)
{
  if (s->is_running)
    pthread_join(s->thread, NULL);
  lane_close(s->lane);
  *s = (struct stage){0};
}
