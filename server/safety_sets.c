/*
 * safety_sets.c - the things the loader makes: files that were read, sets of them, generations, and the structure that serving reads.
 *
 * Each arrow of an adapter's life is one function here:
 *
 *      ABSENT --held_new--> LOADING --held_verified--> VERIFIED --active_publish--> LIVE --active_publish--> RETIRING --live_free--> ABSENT
 *                              |                          |
 *                              +-------held_failed--------+-----> FAILED --held_unref--> ABSENT
 *
 *   LOADING   being read and checked. Nothing of it may be used.
 *   VERIFIED  its adapter may be used to build generations.
 *   LIVE      a generation that new jobs pin has it. (Follows from the generations; not stored.)
 *   RETIRING  only generations that no new job pins have it; jobs draw with them to their last step.
 *   FAILED    what was wrong is kept, the adapter is not.
 *
 * Called by safety_loader.c, safety_rebuild.c, safety_compose.c and safety_commands.c. Threads: the loader's.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "server/log.h"
#include "server/safety_state.h"

void safety_note(struct safety *s, enum audit_kind kind, const char *verdict, const char *fmt, ...)
{
  struct err e = {0};
  char reason[POLICY_NAME + sizeof e.msg];
  struct audit_record r = {.kind = kind, .verdict = verdict, .reason = reason};
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(reason, sizeof reason, fmt, ap);
  va_end(ap);
  if (audit_note(s->audit, &r, &e))
    log_event("the audit log lacks \"%s: %.200s\": %s", verdict, reason, e.msg);
}

/* ---- files ---- */

struct held *held_new(struct safety *s, const char *name)
{
  struct held *h = calloc(1, sizeof *h);

  if (!h)
    return NULL;
  h->refs = 1;
  h->state = ADAPTER_LOADING;
  snprintf(h->name, sizeof h->name, "%s", name);
  lock_take(&s->lock);
  h->next = s->held;
  s->held = h;
  lock_drop(&s->lock);
  return h;
}

void held_verified(struct safety *s, struct held *h, struct adapter *a)
{
  lock_take(&s->lock);
  h->adapter = a;
  h->state = ADAPTER_VERIFIED;
  h->sites = a->n;
  h->max_rank = a->max_rank;
  memcpy(h->digest, a->digest, sizeof h->digest);
  memcpy(h->format, a->format, sizeof h->format);
  lock_drop(&s->lock);
}

void held_failed(struct safety *s, struct held *h, const struct err *why)
{
  lock_take(&s->lock);
  h->state = ADAPTER_FAILED;
  snprintf(h->why, sizeof h->why, "%.255s", why->msg);
  lock_drop(&s->lock);
}

struct held *held_ref(struct held *h)
{
  ON_THREAD(THREAD_LOADER);
  h->refs++;
  return h;
}

void held_unref(struct safety *s, struct held *h)
{
  struct held **p = &s->held;

  ON_THREAD(THREAD_LOADER);
  if (!h || --h->refs)
    return;
  lock_take(&s->lock);
  while (*p != h)
    p = &(*p)->next;
  *p = h->next;
  lock_drop(&s->lock);
  s->is_sweep_due |= h->is_kept;
  adapter_close(h->adapter);
  free(h);
}

void set_copy(struct set *to, const struct set *from)
{
  *to = *from;
  for (int i = 0; i < to->n; i++)
    held_ref(to->held[i]);
}

void set_release(struct safety *s, struct set *set)
{
  for (int i = 0; i < set->n; i++)
    held_unref(s, set->held[i]);
  *set = (struct set){0};
}

int set_equal(const struct set *a, const struct set *b)
{
  if (a->n != b->n || a->form != b->form)
    return 0;
  for (int i = 0; i < a->n; i++)
    if (strcmp(a->held[i]->digest, b->held[i]->digest) || a->weight[i] != b->weight[i])
      return 0;
  return 1;
}

/* ---- generations ---- */

/* The last reference to one of its generations went, on whatever thread: with the last of them the loader frees all. */
static void on_retire(void *arg, struct generation *g)
{
  struct live *l = arg;

  (void)g; /* one of l->g */
  if (atomic_fetch_sub(&l->left, 1) == 1)
    message_post(l->s, &l->retire);
}

void live_free(struct live *l)
{
  struct safety *s = l->s;
  struct live **p = &s->live;

  ON_THREAD(THREAD_LOADER);
  lock_take(&s->lock);
  while (*p && *p != l)
    p = &(*p)->next;
  if (*p) /* it got as far as a number */
    *p = l->next;
  lock_drop(&s->lock);
  for (int i = 0; i < s->devices; i++)
    generation_free(l->g[i]);
  set_release(s, &l->set);
  free(l);
}

void live_stamp(struct live *l, int64_t number)
{
  struct safety *s = l->s;

  l->number = number;
  l->activated_s = (int64_t)time(NULL);
  snprintf(l->stamp.id, sizeof l->stamp.id, "%" PRId64 "-%.8s", number, l->stamp.digest);
  lock_take(&s->lock);
  l->next = s->live;
  s->live = l;
  lock_drop(&s->lock);
}

void set_uses(const struct set *set, struct adapter_use *use)
{
  for (int i = 0; i < set->n; i++)
    use[i] = (struct adapter_use){.adapter = set->held[i]->adapter, .weight = set->weight[i], .required = 1};
}

/* What is built on each device. */
struct build {
  const struct safety *s;
  struct live *l;
  const struct adapter_use *use;
  int n;
  enum generation_form form;
};

static int build_on(void *arg, int i, struct err *e)
{
  const struct build *b = arg;
  const struct proving *on = &b->s->on[i];

  return generation_build(&b->l->g[i], model_base(on->model), model_sources(on->model), on->lane, b->use, b->n, b->form, &b->s->verifier.bounds, e);
}

/* A digest tells base, form and members: one that differs from the first device's is another generation. */
static int check_same(const struct safety *s, const struct live *l, struct err *e)
{
  for (int i = 1; i < s->devices; i++)
    if (strcmp(l->g[i]->digest, l->g[0]->digest))
      return err_set(e, E_INTERNAL, "device %d: the generation has another digest than on device %d", s->on[i].number, s->on[0].number);
  return 0;
}

int live_build(struct safety *s, struct live **out, const struct policy_profile *f, const struct set *set,
               const struct adapter_use *use, int n, enum generation_form form, struct err *e)
{
  struct live *l = calloc(1, sizeof *l);
  int r;

  ON_THREAD(THREAD_LOADER);
  *out = NULL;
  if (!l)
    return err_set(e, E_NOMEM, "out of memory for a generation");
  r = proving_run(s->on, s->devices, build_on, &(struct build){s, l, use, n, form}, e);
  if (!r)
    r = check_same(s, l, e);
  if (r) {
    for (int i = 0; i < s->devices; i++)
      generation_unref(l->g[i]); /* freed: nobody else has seen it */
    free(l);
    return r;
  }
  l->s = s;
  l->retire.kind = MESSAGE_RETIRE;
  atomic_init(&l->refs, 1);
  atomic_init(&l->left, s->devices);
  for (int i = 0; i < s->devices; i++) {
    l->g[i]->retire = on_retire;
    l->g[i]->retire_arg = l;
  }
  set_copy(&l->set, set);
  memcpy(l->stamp.digest, l->g[0]->digest, sizeof l->stamp.digest);
  memcpy(l->stamp.profile, f->name, sizeof l->stamp.profile);
  l->stamp.requires_nothing = f->requires_nothing;
  *out = l;
  return 0;
}

/* [{"name":...,"digest":...,"weight":...,"required":true}]: names are plain and digests hexadecimal, so nothing needs quoting. */
static int members_json(const struct live *l, struct buf *out, struct err *e)
{
  const struct generation *g = l->g[0];

  if (buf_add_str(out, "[", e))
    return e->code;
  for (int i = 0; i < g->members; i++)
    if (buf_addf(out, e, "%s{\"name\":\"%s\",\"digest\":\"%s\",\"weight\":%.9g}", i ? "," : "", g->member[i].name,
                 g->member[i].digest, (double)g->member[i].weight))
      return e->code;
  return buf_add_str(out, "]", e);
}

int live_record(struct safety *s, struct live *l, struct err *e)
{
  struct buf members;
  char digest[65] = "", text[8192];
  int64_t number = 0;
  int r;

  if (audit_last_activation(s->audit, l->stamp.profile, &number, digest, text, sizeof text, e))
    return e->code;
  if (!number || strcmp(digest, l->stamp.digest)) { /* else it is what was live before the restart */
    buf_init(&members, sizeof text - 1);
    r = members_json(l, &members, e);
    if (!r)
      r = audit_activated(s->audit, l->stamp.profile, l->stamp.digest, members.p, &number, e);
    buf_close(&members);
    if (r)
      return r;
  }
  live_stamp(l, number);
  return 0;
}

/* ---- what serving reads ---- */

struct active *active_new(struct policy *p)
{
  struct active *a = calloc(1, sizeof *a);

  if (!a || !(a->slot = calloc((size_t)p->n_profiles, sizeof *a->slot))) {
    free(a);
    return NULL;
  }
  a->policy = p;
  for (int i = 0; i < p->n_profiles; i++)
    memcpy(a->slot[i].name, p->profile[i].name, sizeof a->slot[i].name);
  return a;
}

struct active *active_clone(const struct active *from)
{
  struct active *a = active_new(from->policy);

  for (int i = 0; a && i < from->policy->n_profiles; i++) {
    a->slot[i] = from->slot[i];
    if (a->slot[i].live)
      live_ref(a->slot[i].live);
  }
  for (int i = 0; a && i < from->n_composed; i++) {
    a->composed[a->n_composed++] = from->composed[i];
    live_ref(from->composed[i]);
  }
  return a;
}

void active_free(struct active *a)
{
  if (!a)
    return;
  for (int i = 0; i < a->policy->n_profiles; i++)
    live_unref(a->slot[i].live);
  for (int i = 0; i < a->n_composed; i++)
    live_unref(a->composed[i]);
  free(a->slot);
  free(a);
}

void active_publish(struct safety *s, struct active *a)
{
  static const struct timespec moment = {.tv_nsec = 20000};
  struct active *old;

  ON_THREAD(THREAD_LOADER);
  old = atomic_exchange(&s->active, a);
  while (atomic_load(&s->readers)) /* whoever comes in now sees a; those who were in are out in microseconds */
    nanosleep(&moment, NULL);
  lock_take(&s->lock);
  for (struct live *l = s->live; l; l = l->next)
    l->is_current = l->is_cached = 0;
  for (int i = 0; a && i < a->policy->n_profiles; i++)
    if (a->slot[i].live)
      a->slot[i].live->is_current = 1;
  for (int i = 0; a && i < a->n_composed; i++)
    a->composed[i]->is_cached = 1;
  lock_drop(&s->lock);
  if (old) {
    struct policy *p = old->policy;
    active_free(old);
    if (!a || a->policy != p)
      policy_free(p);
  }
}
