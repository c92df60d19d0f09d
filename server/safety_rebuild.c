/*
 * safety_rebuild.c - from a policy to what is served: every adapter read and verified, every profile's generation built, then one pointer
 * store. What has not changed is kept, generation and number included.
 *
 * Called by safety_loader.c (start) and safety_commands.c (reload, activate, rollback). Threads: the loader's.
 */
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "server/log.h"
#include "server/safety_state.h"

void entries_free(struct safety *s, struct entry *entry, int n)
{
  for (int i = 0; entry && i < n; i++) {
    held_unref(s, entry[i].chosen);
    held_unref(s, entry[i].failed);
  }
  free(entry);
}

void pasts_free(struct safety *s, struct past *past, int n)
{
  for (int i = 0; past && i < n; i++)
    set_release(s, &past[i].set);
  free(past);
}

/* ---- adapters ---- */

static void hash_bytes(char out[65], const struct adapter_files *b)
{
  const struct buf *part[] = {&b->file, &b->config, &b->manifest};
  crypto_generichash_state h;
  unsigned char sum[32];

  crypto_generichash_init(&h, NULL, 0, sizeof sum);
  for (int i = 0; i < 3; i++) {
    uint64_t n = part[i]->len;
    crypto_generichash_update(&h, (const unsigned char *)&n, sizeof n);
    if (n)
      crypto_generichash_update(&h, (const unsigned char *)part[i]->p, n);
  }
  crypto_generichash_final(&h, sum, sizeof sum);
  sodium_bin2hex(out, 65, sum, sizeof sum);
}

/* What was verified under the old policy holds under the new one. */
static int same_rules(const struct policy *a, const struct policy *b)
{
  return a->require_manifest == b->require_manifest && a->require_signature == b->require_signature &&
         !strcmp(a->public_key, b->public_key);
}

/* The old entry of this name whose verdict still holds, when what lies at the policy's path is what it was. */
static const struct entry *unchanged(const struct safety *s, const struct policy *p, int i, const char *seen)
{
  int at = s->policy ? policy_find_adapter(s->policy, p->adapter[i].name) : -1;
  const struct entry *old = at >= 0 ? &s->entry[at] : NULL;

  if (!old || !old->chosen || strcmp(old->seen, seen) || !same_rules(s->policy, p))
    return NULL;
  return *p->adapter[i].digest && strcmp(p->adapter[i].digest, old->chosen->digest) ? NULL : old;
}

static void record_failure(struct safety *s, const char *name, const struct err *why)
{
  log_event("adapter %s failed: %s", name, why->msg);
  safety_note(s, AUDIT_ADAPTER, "failed", "%s: %s", name, why->msg);
}

/* After a restart: the file that an operator had put in the place of the policy's, while that one is what it was. NULL: there is none. */
static struct held *restore(struct safety *s, const struct policy *p, int i, const char *seen)
{
  const struct policy_adapter *d = &p->adapter[i];
  struct adapter *a = NULL;
  struct adapter_files b;
  struct err why = {0};
  struct held *h;
  char digest[65];
  int r;

  if (s->policy) /* only at the start */
    return NULL;
  safety_store_find(s->cfg->state, d->name, seen, digest);
  if (!*digest || (*d->digest && strcmp(d->digest, digest)))
    return NULL;
  r = safety_store_read(s->cfg->state, digest, &s->verifier, &b, &why);
  if (!r) {
    r = verifier_check(&s->verifier, p, d->name, digest, &b, &a, &why);
    adapter_files_close(&b);
  }
  h = r ? NULL : held_new(s, d->name);
  if (h) {
    h->is_kept = 1;
    held_verified(s, h, a);
    return h;
  }
  adapter_close(a);
  log_event("the file of adapter %s that was live before the restart cannot be used; the policy's is taken", d->name);
  if (r)
    record_failure(s, d->name, &why);
  return NULL;
}

/* Reads and verifies adapter i of p. An adapter that fails is an entry that says so; only a lack of memory is an error. */
static int make_entry(struct safety *s, const struct policy *p, int i, struct entry *t, struct err *e)
{
  const struct policy_adapter *d = &p->adapter[i];
  const struct entry *old;
  struct held *h = NULL;
  struct adapter *a = NULL;
  struct adapter_files b;
  struct err why = {0};
  int r;

  memcpy(t->name, d->name, sizeof t->name);
  r = verifier_read(&s->verifier, p, d->path, &b, &why);
  if (!r) {
    hash_bytes(t->seen, &b);
    old = unchanged(s, p, i, t->seen);
    t->chosen = old ? held_ref(old->chosen) : restore(s, p, i, t->seen);
    if (t->chosen) {
      adapter_files_close(&b);
      return 0;
    }
  }
  h = held_new(s, d->name);
  if (!h) {
    if (!r)
      adapter_files_close(&b);
    return err_set(e, E_NOMEM, "out of memory for adapter %s", d->name);
  }
  if (!r) {
    r = verifier_check(&s->verifier, p, d->name, d->digest, &b, &a, &why);
    adapter_files_close(&b);
  }
  if (!r) {
    held_verified(s, h, a);
    t->chosen = h;
    return 0;
  }
  held_failed(s, h, &why);
  record_failure(s, d->name, &why);
  t->failed = h;
  return 0;
}

static int make_entries(struct safety *s, const struct policy *p, struct entry **out, struct err *e)
{
  *out = calloc((size_t)p->n_adapters + 1, sizeof **out);
  if (!*out)
    return err_set(e, E_NOMEM, "out of memory for the adapters");
  for (int i = 0; i < p->n_adapters && !atomic_load(&s->is_closing); i++)
    if (make_entry(s, p, i, &(*out)[i], e))
      return e->code;
  return 0;
}

int set_of_profile(const struct policy *p, const struct entry *entry, int i, struct set *set, struct err *e)
{
  const struct policy_profile *f = &p->profile[i];

  *set = (struct set){.form = !f->n_required ? FORM_BASE : f->form_runtime ? FORM_RUNTIME : FORM_FOLDED};
  for (int k = 0; k < f->n_required; k++) {
    const struct entry *t = &entry[f->required[k].adapter];
    if (!t->chosen)
      return err_field(e, E_FILE, t->name, "%s", t->failed ? t->failed->why : "the adapter was not loaded");
  }
  for (int k = 0; k < f->n_required; k++) {
    set->held[k] = held_ref(entry[f->required[k].adapter].chosen);
    set->weight[k] = f->required[k].weight;
  }
  set->n = f->n_required;
  return 0;
}

/* ---- profiles ---- */

static struct slot *slot_of(struct safety *s, const char *profile)
{
  struct active *a = atomic_load(&s->active);
  int i = a ? policy_find_profile(a->policy, profile) : -1;

  return i >= 0 ? &a->slot[i] : NULL;
}

/* What was loaded and not activated stays so: an adapter that has not changed goes on with the file that is live. */
static void keep_live(struct safety *s, const struct active *a, const struct entry *entry, const struct slot *old, struct set *set)
{
  for (int k = 0; k < set->n; k++) {
    int now = policy_find_adapter(a->policy, set->held[k]->name), was = policy_find_adapter(s->policy, set->held[k]->name);
    const char *pin = a->policy->adapter[now].digest;
    if (was < 0 || entry[now].chosen != s->entry[was].chosen)
      continue;
    for (int j = 0; j < old->live->set.n; j++) {
      struct held *h = old->live->set.held[j];
      if (strcmp(h->name, set->held[k]->name) || (*pin && strcmp(pin, h->digest)))
        continue;
      held_ref(h);
      held_unref(s, set->held[k]);
      set->held[k] = h;
      break;
    }
  }
}

/* Fills slot i of a: with the generation that is live already when it is the same, else with one that is built now. */
static int fill_slot(struct safety *s, struct active *a, const struct entry *entry, int i, struct err *e)
{
  const struct policy_profile *f = &a->policy->profile[i];
  struct slot *old = slot_of(s, f->name);
  struct adapter_use use[POLICY_REQUIRED_MAX];
  struct set set;
  int64_t t = clock_ns();
  int r;

  if (set_of_profile(a->policy, entry, i, &set, e))
    return e->code;
  if (old && old->live)
    keep_live(s, a, entry, old, &set);
  if (old && old->live && set_equal(&old->live->set, &set)) {
    a->slot[i].live = old->live;
    live_ref(old->live);
    r = 0;
  } else {
    set_uses(&set, use);
    r = live_build(s, &a->slot[i].live, f, &set, use, set.n, set.form, e);
    if (!r)
      log_event("profile %s: %d adapters built in %.0f ms, %s, %.1f MB%s", f->name, set.n, (double)(clock_ns() - t) / 1e6,
                set.form == FORM_BASE ? "no safety" : set.form == FORM_FOLDED ? "folded" : "runtime",
                (double)a->slot[i].live->g[0]->bytes / 1e6, s->devices > 1 ? " on each device" : "");
  }
  set_release(s, &set);
  return r;
}

static void refuse_slot(struct slot *t, const struct err *why)
{
  live_unref(t->live);
  t->live = NULL;
  t->why = *why;
  log_event("profile %s is not live: %s", t->name, why->msg);
}

/* Builds all, then records all that are new: an activation is in the history only when nothing but a pointer store is left to do. */
static int fill_slots(struct safety *s, struct active *a, const struct entry *entry, int strict, struct err *e)
{
  for (int i = 0; i < a->policy->n_profiles && !atomic_load(&s->is_closing); i++) {
    struct err why = {0};
    if (!fill_slot(s, a, entry, i, &why))
      continue;
    if (strict) {
      *e = why;
      return err_wrap(e, "profile %s", a->slot[i].name);
    }
    refuse_slot(&a->slot[i], &why);
  }
  for (int i = 0; i < a->policy->n_profiles; i++) {
    struct live *l = a->slot[i].live;
    struct err why = {0};
    if (!l || l->number || !live_record(s, l, &why))
      continue;
    if (strict) {
      *e = why;
      return err_wrap(e, "profile %s", a->slot[i].name);
    }
    refuse_slot(&a->slot[i], &why);
  }
  return 0;
}

/* The sets that were live before, for rollback: of the profiles that a replaces, and what was remembered of the others. */
static struct past *make_pasts(struct safety *s, const struct active *a)
{
  struct past *past = calloc((size_t)a->policy->n_profiles + 1, sizeof *past);

  for (int i = 0; past && i < a->policy->n_profiles; i++) {
    struct slot *old = slot_of(s, a->slot[i].name);
    memcpy(past[i].profile, a->slot[i].name, sizeof past[i].profile);
    if (s->policy && !same_rules(s->policy, a->policy))
      continue; /* it was verified under other rules: not what a rollback may publish */
    if (old && old->live && old->live != a->slot[i].live)
      set_copy(&past[i].set, &old->live->set);
    else
      for (int k = 0; s->policy && k < s->policy->n_profiles; k++)
        if (!strcmp(s->past[k].profile, past[i].profile))
          set_copy(&past[i].set, &s->past[k].set);
  }
  return past;
}

static void tell(struct safety *s)
{
  uint64_t one = 1;
  ssize_t n = write(s->event_fd, &one, sizeof one);

  (void)n; /* full: main is awake */
}

/* From here on nothing can fail: what serving reads, and what the loader remembers, become a's. */
static void install(struct safety *s, struct active *a, struct entry *entry, struct past *past)
{
  struct active *old = atomic_load(&s->active);

  for (int i = 0; i < a->policy->n_profiles; i++) {
    struct slot *was = slot_of(s, a->slot[i].name);
    if (a->slot[i].live && was && was->live && was->live != a->slot[i].live)
      atomic_fetch_add(&s->swaps, 1);
    if (a->slot[i].live && (!was || was->live != a->slot[i].live))
      log_event("profile %s: generation %s is live%s", a->slot[i].name, a->slot[i].live->stamp.id,
                a->slot[i].live->stamp.requires_nothing ? ", WITHOUT ANY SAFETY (evaluation profile)" : "");
  }
  for (int i = 0; entry != s->entry && i < a->policy->n_adapters; i++) /* the policy's files are in force again */
    if (entry[i].chosen && !entry[i].chosen->is_kept && safety_store_live(s->cfg->state, entry[i].name, NULL, NULL, &(struct err){0}))
      log_event("what was loaded for adapter %s could not be forgotten", entry[i].name);
  if (old && entry != s->entry)
    entries_free(s, s->entry, s->policy->n_adapters);
  if (old)
    pasts_free(s, s->past, s->policy->n_profiles);
  s->entry = entry;
  s->past = past;
  s->policy = a->policy;
  active_publish(s, a);
  tell(s);
}

int rebuild(struct safety *s, struct policy *p, int strict, struct err *e)
{
  struct active *a = active_new(p);
  struct entry *entry = NULL;
  struct past *past = NULL;

  if (!a)
    err_set(e, E_NOMEM, "out of memory for the profiles");
  if (!a || make_entries(s, p, &entry, e) || fill_slots(s, a, entry, strict, e))
    goto fail;
  if (atomic_load(&s->is_closing)) {
    err_set(e, E_NOTREADY, "the server is stopping");
    goto fail;
  }
  past = make_pasts(s, a);
  if (!past) {
    err_set(e, E_NOMEM, "out of memory for the profiles");
    goto fail;
  }
  install(s, a, entry, past);
  return 0;
fail:
  active_free(a);
  entries_free(s, entry, p->n_adapters);
  policy_free(p);
  return e->code;
}

int publish_one(struct safety *s, int i, struct live *l, struct err *e)
{
  struct active *old = atomic_load(&s->active), *a = active_new(s->policy);
  struct past *past;

  if (!a) {
    live_unref(l);
    return err_set(e, E_NOMEM, "out of memory for the profiles");
  }
  for (int k = 0; k < s->policy->n_profiles; k++) {
    a->slot[k].live = k == i ? l : old->slot[k].live;
    a->slot[k].why = old->slot[k].why;
    if (k != i && a->slot[k].live)
      live_ref(a->slot[k].live);
  }
  a->slot[i].why = (struct err){0};
  past = make_pasts(s, a);
  if (!past)
    err_set(e, E_NOMEM, "out of memory for the profiles");
  if (!past || live_record(s, l, e)) { /* recorded last: what is in the history is live */
    pasts_free(s, past, s->policy->n_profiles);
    active_free(a);
    return e->code;
  }
  install(s, a, s->entry, past);
  return 0;
}
