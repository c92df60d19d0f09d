/*
 * thread.c - see thread.h. Called by all of server/.
 */
#include "server/thread.h"

#include <signal.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { COMPUTING = 5 /* niceness beyond the process's own: a third of the weight of a thread that answers */ };

_Thread_local enum thread_kind thread_self;
static _Thread_local const struct lock *holding;

void lock_init(struct lock *l, const char *name)
{
  pthread_mutex_init(&l->mu, NULL);
  l->name = name;
}

void lock_fini(struct lock *l)
{
  pthread_mutex_destroy(&l->mu);
}

void lock_take(struct lock *l)
{
  assert(!holding);
  pthread_mutex_lock(&l->mu);
  holding = l;
}

void lock_drop(struct lock *l)
{
  HELD(l);
  holding = NULL;
  pthread_mutex_unlock(&l->mu);
}

void lock_wait(struct lock *l, pthread_cond_t *cv)
{
  HELD(l);
  holding = NULL;
  pthread_cond_wait(cv, &l->mu);
  holding = l;
}

void lock_wait_for(struct lock *l, pthread_cond_t *cv, int ms)
{
  int64_t until = clock_ns() + (int64_t)ms * 1000000;
  struct timespec t = {.tv_sec = until / 1000000000, .tv_nsec = until % 1000000000};

  HELD(l);
  holding = NULL;
  pthread_cond_clockwait(cv, &l->mu, CLOCK_MONOTONIC, &t);
  holding = l;
}

int lock_is_held(const struct lock *l)
{
  return holding == l;
}

int thread_start(pthread_t *t, const char *name, void *(*run)(void *), void *arg, struct err *e)
{
  sigset_t all, old;
  int r;

  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the main thread's signalfd */
  r = pthread_create(t, NULL, run, arg);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  if (r)
    return err_set(e, E_NOMEM, "cannot start the %s thread", name);
  pthread_setname_np(*t, name);
  return 0;
}

void thread_gives_way(void)
{
  id_t self = (id_t)gettid();

  (void)setpriority(PRIO_PROCESS, self, getpriority(PRIO_PROCESS, self) + COMPUTING);
}

int64_t clock_ns(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
