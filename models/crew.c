/*
 * crew.c - see crew.h.
 *
 *   thread       owns                           waits for                          never
 *   owner        its own lane, the round        helpers that still work            touches a helper's lane
 *   helper i     lane[i]                        the next round, asleep             starts a piece outside a round
 *
 * A round: the owner sets the work under the lock and wakes as many helpers as there are pieces for; all take pieces from one atomic counter; the
 * last helper to find none left wakes the owner. What a helper wrote, the owner sees, because both took the lock in between.
 */
#include "models/crew.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#include "models/model.h"

struct helper {
  struct crew *crew;
  pthread_t thread;
  struct lane *lane;
  int number;
};

struct crew {
  pthread_mutex_t lock;
  pthread_cond_t go, done;
  struct helper *helper;       /* `helpers` entries */
  int helpers, running;        /* threads that were started */
  /* under the lock */
  unsigned round;
  int wanted, busy;            /* of the round: helpers that take part; those of them that have not finished */
  int is_ending;
  /* of the round: written before it begins, read by all in it */
  void (*work)(void *arg, struct lane *l, int i);
  void *arg;
  int n, threads;
  atomic_int next;
};

static void take_pieces(struct crew *c, struct lane *l)
{
  l->be->ops->set_threads(l->be, c->threads);
  for (int i; (i = atomic_fetch_add_explicit(&c->next, 1, memory_order_relaxed)) < c->n;)
    c->work(c->arg, l, i);
}

static void *run(void *arg)
{
  struct helper *h = arg;
  struct crew *c = h->crew;
  unsigned seen = 0;

  pthread_mutex_lock(&c->lock);
  for (;;) {
    while (!c->is_ending && c->round == seen)
      pthread_cond_wait(&c->go, &c->lock);
    if (c->is_ending)
      break;
    seen = c->round;
    if (h->number >= c->wanted)
      continue;
    pthread_mutex_unlock(&c->lock);
    take_pieces(c, h->lane);
    pthread_mutex_lock(&c->lock);
    if (--c->busy == 0)
      pthread_cond_signal(&c->done);
  }
  pthread_mutex_unlock(&c->lock);
  return NULL;
}

/* Signals are other threads' business. */
MUST_CHECK static int start(struct helper *h, struct err *e)
{
  sigset_t all, old;
  int r;

  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  r = pthread_create(&h->thread, NULL, run, h);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (r)
    return err_set(e, E_NOMEM, "cannot start thread %d of %d for the steps of a batch", h->number + 1, h->crew->helpers);
  pthread_setname_np(h->thread, "step");
  h->crew->running++;
  return 0;
}

int crew_open(struct crew **out, struct model *m, int helpers, int lane_work, struct err *e)
{
  struct crew *c = calloc(1, sizeof *c);
  int r = 0;

  *out = NULL;
  if (c)
    c->helper = calloc((size_t)helpers + 1, sizeof *c->helper);
  if (!c || !c->helper) {
    free(c);
    return err_set(e, E_NOMEM, "out of memory for the threads of a batch");
  }
  pthread_mutex_init(&c->lock, NULL);
  pthread_cond_init(&c->go, NULL);
  pthread_cond_init(&c->done, NULL);
  c->helpers = helpers;
  for (int i = 0; !r && i < helpers; i++) {
    c->helper[i] = (struct helper){.crew = c, .number = i};
    r = lane_open(&c->helper[i].lane, m, 1, lane_work, e);
    if (!r)
      r = start(&c->helper[i], e);
  }
  if (r) {
    crew_close(c);
    return r;
  }
  *out = c;
  return 0;
}

void crew_close(struct crew *c)
{
  if (!c)
    return;
  pthread_mutex_lock(&c->lock);
  c->is_ending = 1;
  pthread_cond_broadcast(&c->go);
  pthread_mutex_unlock(&c->lock);
  for (int i = 0; i < c->running; i++)
    pthread_join(c->helper[i].thread, NULL);
  for (int i = 0; i < c->helpers; i++)
    lane_close(c->helper[i].lane);
  pthread_mutex_destroy(&c->lock);
  pthread_cond_destroy(&c->go);
  pthread_cond_destroy(&c->done);
  free(c->helper);
  free(c);
}

void crew_run(struct crew *c, struct lane *own, int n, int threads, void (*work)(void *arg, struct lane *l, int i), void *arg)
{
  int before = own->be->threads;

  pthread_mutex_lock(&c->lock);
  c->work = work;
  c->arg = arg;
  c->n = n;
  c->threads = threads;
  atomic_store_explicit(&c->next, 0, memory_order_relaxed);
  c->wanted = c->busy = n - 1 < c->helpers ? n - 1 : c->helpers;
  c->round++;
  if (c->busy > 0)
    pthread_cond_broadcast(&c->go);
  pthread_mutex_unlock(&c->lock);
  take_pieces(c, own);
  own->be->ops->set_threads(own->be, before);
  pthread_mutex_lock(&c->lock);
  while (c->busy > 0)
    pthread_cond_wait(&c->done, &c->lock);
  pthread_mutex_unlock(&c->lock);
}
