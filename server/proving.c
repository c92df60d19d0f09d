/*
 * proving.c - see proving.h.
 */
#include "server/proving.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "server/thread.h"

/* The work on one device. */
struct share {
  int (*work)(void *arg, int i, struct err *e);
  void *arg;
  int i;
  struct err err;
  pthread_t thread;
  int is_running;           /* thread is there */
};

static void *run(void *arg)
{
  struct share *t = arg;

  if (t->work(t->arg, t->i, &t->err))
    err_set(&t->err, E_INTERNAL, "failed without a reason");
  return NULL;
}

static int is_side_by_side(const struct proving *on, int n)
{
  return n > 1 && !strcmp(on->lane->ops->name, "cuda");
}

/* The first device's share is the caller's. */
static void run_all(struct share *share, const struct proving *on, int n)
{
  char name[16];

  for (int i = 1; i < n; i++) {
    snprintf(name, sizeof name, "loader %d", on[i].number);
    share[i].is_running = !thread_start(&share[i].thread, name, run, &share[i], &share[i].err);
  }
  run(&share[0]);
  for (int i = 1; i < n; i++)
    if (share[i].is_running)
      pthread_join(share[i].thread, NULL);
}

int proving_run(const struct proving *on, int n, int (*work)(void *arg, int i, struct err *e), void *arg, struct err *e)
{
  struct share share[DEVICES_MAX] = {{.i = 0}};
  int failed = 0;

  for (int i = 0; i < n; i++)
    share[i] = (struct share){.work = work, .arg = arg, .i = i};
  if (is_side_by_side(on, n))
    run_all(share, on, n);
  else
    for (int i = 0; i < n && (!i || !share[i - 1].err.code); i++)
      run(&share[i]);
  while (failed < n && !share[failed].err.code)
    failed++;
  if (failed == n)
    return 0;
  *e = share[failed].err;
  return n > 1 ? err_wrap(e, "device %d", on[failed].number) : e->code;
}
