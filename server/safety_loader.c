/*
 * safety_loader.c - the loader thread: opens a lane beside each device, builds what the policy asks for, then does what it is asked, one thing at a time.
 *
 * It runs at the lowest priority that the system has, so that building takes time from nobody; threads that it starts (proving.c) inherit that. It alone
 * makes, changes and frees adapters, generations and what serving reads; see safety_state.h. It may block on its eventfd, on files, on the audit log, never
 * on a job or a lock that another thread holds for long. Called by safety.c. Threads: this file is the loader's.
 */
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/log.h"
#include "server/safety_state.h"

static void be_idle(void)
{
  struct sched_param p = {0};

  if (pthread_setschedparam(pthread_self(), SCHED_IDLE, &p))
    log_event("the loader thread runs at normal priority: the system refused SCHED_IDLE");
}

static int open_all(struct safety *s, struct err *e)
{
  for (int i = 0; i < s->devices; i++) {
    const struct safety_device *d = &s->device[i];

    if (d->be->ops->open_lane(&s->lane[i], d->be, 1, e))
      return e->code;
    s->on[i] = (struct proving){.model = d->model, .lane = &s->lane[i], .number = d->number};
  }
  return verifier_open(&s->verifier, s->on, s->devices, e);
}

/* All messages, oldest first. */
static struct message *take_messages(struct safety *s)
{
  struct message *m = atomic_exchange(&s->inbox, NULL), *in_order = NULL;

  while (m) {
    struct message *next = m->next;
    m->next = in_order;
    in_order = m;
    m = next;
  }
  return in_order;
}

static void run_command(struct safety *s, struct command *c)
{
  struct err *e = &c->err;

  if (!s->verifier.names)
    err_set(e, E_NOMEM, "the safety manager could not start; see the log");
  else if (c->run(s, c, e) && c->is_detached)
    log_event("reload failed, everything stays as it was: %s", e->msg);
  if (c->is_detached)
    free(c);
  else
    sem_post(&c->done); /* the caller's stack: c is gone after */
}

/* Returns 1 when it is over. */
static int handle(struct safety *s, struct message *m)
{
  switch (m->kind) {
  case MESSAGE_QUIT:
    return 1;
  case MESSAGE_RETIRE:
    live_free((struct live *)m);
    break;
  case MESSAGE_PREPARE:
    compose(s, (struct safety_target *)m);
    break;
  case MESSAGE_COMMAND:
    run_command(s, (struct command *)m);
    break;
  }
  return 0;
}

/* Whether what lies in the state folder is wanted: the bytes of a digest, or the NAME.live of a name; see safety_store.h. */
static int is_needed(void *arg, const char *digest, const char *name)
{
  const struct safety *s = arg;
  char named[65];

  if (name)
    return policy_find_adapter(s->policy, name) >= 0;
  for (const struct held *h = s->held; h; h = h->next) /* without the lock: nobody else changes the list */
    if (h->is_kept && !strcmp(h->digest, digest))
      return 1;
  for (int i = 0; i < s->policy->n_adapters; i++)
    if (safety_store_named(s->cfg->state, s->policy->adapter[i].name, named) || !strcmp(named, digest) ||
        !strcmp(s->policy->adapter[i].digest, digest))
      return 1;
  return 0;
}

static void sweep(struct safety *s)
{
  int gone;

  if (!s->is_sweep_due || !s->policy)
    return;
  s->is_sweep_due = 0;
  gone = safety_store_sweep(s->cfg->state, is_needed, s);
  if (gone)
    log_event("adapters that had been loaded and are needed no longer, removed from the state folder: %d", gone);
}

static void serve_messages(struct safety *s)
{
  uint64_t count;
  int over = 0;

  while (!over) {
    struct message *m = take_messages(s);
    while (m) {
      struct message *next = m->next; /* handling may free m */
      over |= handle(s, m);
      m = next;
    }
    if (!over)
      sweep(s);
    if (!over && !atomic_load(&s->inbox) && read(s->wake_fd, &count, sizeof count) < 0)
      log_event("the loader's eventfd failed");
  }
}

/* Nobody else is left: what was published goes, and with the last references the generations come back to be freed. */
static void let_go(struct safety *s)
{
  int n = s->policy ? s->policy->n_adapters : 0, profiles = s->policy ? s->policy->n_profiles : 0;
  struct message *m;

  entries_free(s, s->entry, n);
  pasts_free(s, s->past, profiles);
  s->entry = NULL;
  s->past = NULL;
  s->policy = NULL;
  active_publish(s, NULL);
  while ((m = take_messages(s)))
    while (m) {
      struct message *next = m->next;
      (void)handle(s, m);
      m = next;
    }
  assert(!s->live && !s->held);
  verifier_close(&s->verifier);
  for (int i = 0; i < s->devices; i++)
    be_close(&s->lane[i]);
}

void *safety_loader(void *arg)
{
  struct safety *s = arg;
  struct policy *first = s->first;
  struct err e = {0};
  int64_t t = clock_ns();

  thread_self = THREAD_LOADER;
  be_idle();
  safety_note(s, AUDIT_POLICY, "read", "policy %s", first->digest);
  if (!open_all(s, &e)) {
    s->first = NULL; /* rebuild takes it */
    s->is_sweep_due = 1; /* what a crash, or another policy, left there */
    if (!rebuild(s, first, 0, &e))
      log_event("safety policy %s in force after %.0f ms", s->policy_path, (double)(clock_ns() - t) / 1e6);
  }
  if (e.code && e.code != E_NOTREADY)
    log_event("no safety can be served: %s", e.msg);
  serve_messages(s);
  let_go(s);
  return NULL;
}
