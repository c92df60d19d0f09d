/*
 * safety_commands.c - what an operator may do while pictures are drawn: reload, load, activate, roll back, retire; and what is shown to him.
 *
 * Each command has two halves: the public one, on the caller's thread, which waits, and the loader's, which does it. Called by admin.c, serve.c (SIGHUP).
 * Threads: safety_* on any but the device's and the loader's; do_* on the loader's.
 */
#include <stdlib.h>
#include <string.h>

#include "server/log.h"
#include "server/safety_state.h"

/* ---- asking ---- */

static int ask(struct safety *s, struct command *c, struct err *e)
{
  assert(thread_self != THREAD_DEVICE && thread_self != THREAD_LOADER);
  c->message.kind = MESSAGE_COMMAND;
  sem_init(&c->done, 0, 0);
  message_post(s, &c->message);
  while (sem_wait(&c->done))
    ; /* interrupted */
  sem_destroy(&c->done);
  if (c->err.code)
    *e = c->err;
  return c->err.code;
}

/* ---- reload ---- */

static int do_reload(struct safety *s, struct command *c, struct err *e)
{
  struct policy *p = NULL;
  char digest[65];

  (void)c;
  if (!policy_read(&p, s->policy_path, e)) {
    memcpy(digest, p->digest, sizeof digest);
    if (!rebuild(s, p, atomic_load(&s->active) != NULL, e))
      log_event("safety policy %s was read again", s->policy_path);
  }
  if (e->code)
    safety_note(s, AUDIT_POLICY, "failed", "%s", e->msg);
  else
    safety_note(s, AUDIT_POLICY, "read", "policy %s", digest);
  return e->code;
}

int safety_reload(struct safety *s, struct err *e)
{
  struct command c = {.run = do_reload};

  return ask(s, &c, e);
}

void safety_reload_later(struct safety *s)
{
  struct command *c = calloc(1, sizeof *c);

  if (!c) {
    log_event("out of memory: the policy was not read again");
    return;
  }
  c->message.kind = MESSAGE_COMMAND;
  c->run = do_reload;
  c->is_detached = 1;
  message_post(s, &c->message);
}

/* ---- load ---- */

static int find_adapter(const struct safety *s, const char *name, int *i, struct err *e)
{
  *i = s->policy ? policy_find_adapter(s->policy, name) : -1;
  if (*i < 0)
    return err_field(e, E_NOTFOUND, "name", "the policy knows no adapter \"%.60s\"", name);
  return 0;
}

static int find_profile(const struct safety *s, const char *name, int *i, struct err *e)
{
  *i = s->policy ? policy_find_profile(s->policy, name) : -1;
  if (*i < 0)
    return err_field(e, E_NOTFOUND, "profile", "the policy knows no profile \"%.60s\"", name);
  return 0;
}

/* The uploaded bytes, or the file at a path inside adapter_dir. */
static int take_bytes(struct safety *s, const struct command *c, struct adapter_files *b, struct err *e)
{
  if (!c->bytes)
    return verifier_read(&s->verifier, s->policy, c->path, b, e);
  buf_init(&b->file, s->verifier.bounds.max_bytes);
  buf_init(&b->config, 0);
  buf_init(&b->manifest, 16 << 20);
  if (buf_add(&b->file, c->bytes, c->n, e) || (c->manifest && buf_add_str(&b->manifest, c->manifest, e)))
    adapter_files_close(b);
  return e->code;
}

static void record_load(struct safety *s, const char *name, const struct held *h)
{
  const char *verdict = h->state == ADAPTER_VERIFIED ? "verified" : "failed", *what = h->state == ADAPTER_VERIFIED ? h->digest : h->why;

  log_event("adapter %s %s: %s", name, verdict, what);
  safety_note(s, AUDIT_ADAPTER, verdict, "%s: %s", name, what);
}

static int do_load(struct safety *s, struct command *c, struct err *e)
{
  struct adapter_files b = {0};
  struct adapter *a = NULL;
  struct held *h;
  struct entry *t;
  int i, r;

  if (find_adapter(s, c->name, &i, e))
    return e->code;
  t = &s->entry[i];
  h = held_new(s, c->name);
  if (!h)
    return err_set(e, E_NOMEM, "out of memory for adapter %s", c->name);
  r = take_bytes(s, c, &b, e);
  if (!r)
    r = verifier_check(&s->verifier, s->policy, c->name, s->policy->adapter[i].digest, &b, &a, e);
  if (!r)
    r = safety_store_bytes(s->cfg->state, a->digest, &b, e);
  adapter_files_close(&b);
  if (r) {
    s->is_sweep_due = 1; /* part of it may have been written */
    adapter_close(a);
    held_failed(s, h, e);
    held_unref(s, t->failed);
    t->failed = h;
  } else {
    h->is_kept = 1;
    held_verified(s, h, a);
    held_unref(s, t->failed);
    held_unref(s, t->chosen);
    t->failed = NULL;
    t->chosen = h;
  }
  record_load(s, c->name, h);
  return r;
}

int safety_load(struct safety *s, const char *name, const char *path, const void *bytes, size_t n, const char *manifest,
                struct err *e)
{
  struct command c = {.run = do_load, .name = name, .path = path, .bytes = bytes, .n = n, .manifest = manifest};

  return ask(s, &c, e);
}

/* ---- activate and roll back ---- */

/* Writes down which of the set's files are not the policy's, so that the set survives a restart. */
static int store_set(struct safety *s, const struct set *set, struct err *e)
{
  for (int i = 0; i < set->n; i++) {
    const struct held *h = set->held[i];
    int at = policy_find_adapter(s->policy, h->name);
    if (safety_store_live(s->cfg->state, h->name, h->is_kept ? h->digest : NULL, s->entry[at].seen, e))
      return e->code;
  }
  return 0;
}

/* Publishes the generation of set as profile i's, unless that is what is live. */
static int put_live(struct safety *s, int i, const struct set *set, struct safety_stamp *stamp, struct err *e)
{
  const struct policy_profile *f = &s->policy->profile[i];
  struct slot *slot = &atomic_load(&s->active)->slot[i];
  struct adapter_use use[POLICY_REQUIRED_MAX];
  struct live *l = NULL;
  int r;

  if (!slot->live || !set_equal(&slot->live->set, set)) {
    set_uses(set, use);
    if (live_build(s, &l, f, set, use, set->n, set->form, e))
      return err_wrap(e, "profile %s", f->name);
    r = store_set(s, set, e);
    if (r)
      live_unref(l);
    else
      r = publish_one(s, i, l, e);
    if (r) {
      if (slot->live && store_set(s, &slot->live->set, &(struct err){0}))
        log_event("after a restart profile %s may have what could not be activated now", f->name);
      return err_wrap(e, "profile %s", f->name);
    }
    slot = &atomic_load(&s->active)->slot[i];
  }
  *stamp = slot->live->stamp;
  return 0;
}

static int do_activate(struct safety *s, struct command *c, struct err *e)
{
  struct set set;
  int i, r;

  if (find_profile(s, c->name, &i, e) || set_of_profile(s->policy, s->entry, i, &set, e))
    return e->code;
  r = put_live(s, i, &set, c->stamp, e);
  set_release(s, &set);
  return r;
}

int safety_activate(struct safety *s, const char *profile, struct safety_stamp *stamp, struct err *e)
{
  struct command c = {.run = do_activate, .name = profile, .stamp = stamp};

  return ask(s, &c, e);
}

/* What was live before must still be what the policy of now requires: the same adapters, none lighter than its minimum, digests as pinned. */
static int check_past(const struct safety *s, int i, const struct set *past, struct err *e)
{
  const struct policy_profile *f = &s->policy->profile[i];
  int found = 0;

  for (int k = 0; k < f->n_required; k++) {
    const struct policy_adapter *d = &s->policy->adapter[f->required[k].adapter];
    for (int j = 0; j < past->n; j++)
      found += !strcmp(past->held[j]->name, d->name) && past->weight[j] >= f->required[k].min_weight &&
               (!*d->digest || !strcmp(d->digest, past->held[j]->digest));
  }
  if (found != f->n_required || past->n != found)
    return err_field(e, E_ARG, "profile", "what was live before no longer satisfies the policy of profile %s", f->name);
  return 0;
}

static int do_rollback(struct safety *s, struct command *c, struct err *e)
{
  struct set past;
  int i, r;

  if (find_profile(s, c->name, &i, e))
    return e->code;
  if (!s->past[i].set.n)
    return err_field(e, E_NOTFOUND, "profile", "nothing was live before in profile %s", c->name);
  if (check_past(s, i, &s->past[i].set, e))
    return e->code;
  set_copy(&past, &s->past[i].set); /* publishing puts another into its place */
  r = put_live(s, i, &past, c->stamp, e);
  for (int k = 0; !r && k < past.n; k++) { /* the next activation stays with what was rolled back to */
    struct entry *t = &s->entry[policy_find_adapter(s->policy, past.held[k]->name)];
    held_ref(past.held[k]);
    held_unref(s, t->chosen);
    t->chosen = past.held[k];
  }
  set_release(s, &past);
  return r;
}

int safety_rollback(struct safety *s, const char *profile, struct safety_stamp *stamp, struct err *e)
{
  struct command c = {.run = do_rollback, .name = profile, .stamp = stamp};

  return ask(s, &c, e);
}

/* ---- retire ---- */

static int is_live(const struct safety *s, const struct held *h)
{
  const struct active *a = atomic_load(&s->active);

  for (int i = 0; i < a->policy->n_profiles; i++)
    for (int k = 0; a->slot[i].live && k < a->slot[i].live->set.n; k++)
      if (a->slot[i].live->set.held[k] == h)
        return 1;
  return 0;
}

static int do_retire(struct safety *s, struct command *c, struct err *e)
{
  struct entry *t;
  int i, had_failed;

  if (find_adapter(s, c->name, &i, e))
    return e->code;
  t = &s->entry[i];
  had_failed = t->failed != NULL;
  held_unref(s, t->failed);
  t->failed = NULL;
  if (!t->chosen)
    return had_failed ? 0 : err_field(e, E_NOTFOUND, "name", "no file of adapter %s is held", c->name);
  if (is_live(s, t->chosen))
    return had_failed ? 0 : err_field(e, E_ARG, "name", "adapter %s is live and required; activate another file or change the policy first",
                                      c->name);
  if (forget_composed(s, t->chosen->digest, e))
    return e->code;
  held_unref(s, t->chosen);
  t->chosen = NULL;
  return 0;
}

int safety_retire(struct safety *s, const char *name, struct err *e)
{
  struct command c = {.run = do_retire, .name = name};

  return ask(s, &c, e);
}

/* ---- status ---- */

/* LIVE and RETIRING follow from who uses a verified file. The caller holds the lock. */
static enum adapter_state state_of(const struct safety *s, const struct held *h)
{
  int used = 0;

  HELD(&s->lock);
  for (const struct live *l = s->live; l && h->state == ADAPTER_VERIFIED; l = l->next)
    for (int i = 0; i < l->set.n; i++)
      if (l->set.held[i] == h) {
        if (l->is_current)
          return ADAPTER_LIVE;
        used |= !*l->over;
      }
  return used ? ADAPTER_RETIRING : h->state;
}

/* How many profiles require the adapter called name. */
static int required_by(const struct policy *p, const char *name)
{
  int n = 0;

  for (int i = 0; i < p->n_profiles; i++)
    for (int k = 0; k < p->profile[i].n_required; k++)
      n += !strcmp(p->adapter[p->profile[i].required[k].adapter].name, name);
  return n;
}

int safety_is_style(struct safety *s, const char *name)
{
  const struct active *a = active_enter(s);
  int i = a ? policy_find_adapter(a->policy, name) : -1, found = 0;

  for (int p = 0; i >= 0 && p < a->policy->n_profiles; p++)
    for (int k = 0; k < a->policy->profile[p].n_style; k++)
      found |= a->policy->profile[p].style[k] == i;
  if (found && required_by(a->policy, name))
    found = 0;
  active_leave(s);
  return found;
}

int safety_adapters(struct safety *s, struct safety_adapter_status *out, int cap)
{
  const struct active *a;
  int n = 0;

  lock_take(&s->lock);
  for (const struct held *h = s->held; h; h = h->next, n++)
    if (n < cap) {
      out[n] = (struct safety_adapter_status){.state = state_of(s, h), .sites = h->sites, .max_rank = h->max_rank};
      memcpy(out[n].name, h->name, sizeof out[n].name);
      memcpy(out[n].digest, h->digest, sizeof out[n].digest);
      memcpy(out[n].format, h->format, sizeof out[n].format);
      memcpy(out[n].why, h->why, sizeof out[n].why);
    }
  lock_drop(&s->lock);
  a = active_enter(s);
  for (int i = 0; a && i < n && i < cap; i++)
    out[i].required_by = required_by(a->policy, out[i].name);
  active_leave(s);
  return n;
}

/* Jobs that draw with it, and those that wait for what was composed for them; counts that move meanwhile make it no less than 0. The caller holds the lock. */
static int pins_of(const struct live *l)
{
  int refs = atomic_load(&l->refs), n = refs - l->is_current - l->is_cached;

  HELD(&l->s->lock);
  for (int i = 0; i < l->s->devices; i++)
    n += atomic_load(&l->g[i]->refs) - (refs > 0); /* but for l's own */
  return n > 0 ? n : 0;
}

int safety_generations(struct safety *s, struct safety_generation_status *out, int cap)
{
  int n = 0;

  lock_take(&s->lock);
  for (int current = 1; current >= 0; current--)
    for (const struct live *l = s->live; l; l = l->next)
      if (l->is_current == current) {
        if (n < cap)
          out[n] = (struct safety_generation_status){.stamp = l->stamp, .is_current = current, .bytes = l->g[0]->bytes, .pins = pins_of(l),
                                                     .activated_s = l->activated_s};
        n++;
      }
  lock_drop(&s->lock);
  return n;
}
