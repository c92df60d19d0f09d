/*
 * safety_compose.c - a client's style adapters over what its profile requires: measured, refused or projected, built, and kept for the next.
 *
 * W0 + sum(w_i * dW_safety_i) + sum(s_j * dW_style_j), on the runtime path. A composed generation belongs to the published one that it was composed
 * over: when that one is replaced it is stale, and is composed anew for the request that comes with it. The last few are kept, so that a client who draws
 * many pictures in one style waits once. It is composed on every device, since which one will take the job is not known before it is taken, and the next
 * job in this style may be another's. Called by safety_loader.c. Threads: the loader's.
 */
#include <stdio.h>
#include <string.h>

#include "models/guard.h"
#include "server/log.h"
#include "server/safety_state.h"

/* What is being composed. */
struct work {
  const struct policy_profile *f;
  struct live *over;               /* the profile's current generation */
  struct adapter_use use[POLICY_REQUIRED_MAX + POLICY_STYLES_MAX];
  int style[POLICY_STYLES_MAX];    /* of the target, for the uses after the required ones */
  int n;
};

/* The style adapter as it is held now; the target's digest is what its policy pinned when the request came. */
static int add_style(struct safety *s, struct work *w, const struct safety_target *t, int i, struct err *e)
{
  const char *name = t->style[i].style.name;
  int at = policy_find_adapter(s->policy, name), is_allowed = 0;
  const struct entry *en = at >= 0 ? &s->entry[at] : NULL;
  char field[32];

  snprintf(field, sizeof field, "loras[%d].name", i);
  for (int k = 0; k < w->f->n_style; k++)
    is_allowed |= w->f->style[k] == at;
  if (!is_allowed || !en->chosen || strcmp(en->chosen->digest, t->style[i].digest))
    return err_field(e, E_ARG, field, "%s: style \"%s\" cannot be used now%s%.200s", field, name, en && en->failed ? ": " : "",
                     en && en->failed ? en->failed->why : "");
  for (int k = 0; k < w->over->set.n; k++)
    if (!strcmp(w->over->set.held[k]->digest, t->style[i].digest))
      return err_field(e, E_ARG, field, "%s: \"%s\" is a safety adapter", field, name);
  w->style[w->n - w->over->set.n] = i;
  w->use[w->n++] = (struct adapter_use){.adapter = en->chosen->adapter, .weight = t->style[i].style.weight};
  return 0;
}

static int gather(struct safety *s, struct work *w, const struct safety_target *t, struct err *e)
{
  const struct active *a = atomic_load(&s->active);
  int i = a ? policy_find_profile(a->policy, t->profile) : -1;

  if (i < 0 || !a->slot[i].live)
    return err_set(e, E_POLICY, "safety_unavailable: the safety that profile %s requires is not live", t->profile);
  w->f = &a->policy->profile[i];
  w->over = a->slot[i].live;
  set_uses(&w->over->set, w->use);
  w->n = w->over->set.n;
  for (int k = 0; k < t->n_styles; k++)
    if (t->style[k].style.weight != 0 && add_style(s, w, t, k, e))
      return e->code;
  return 0;
}

/* Caps and cancellation, measured on the sum that would be drawn with. */
static int judge(struct safety *s, struct work *w, struct safety_target *t, struct guard_report *r, struct err *e)
{
  const struct policy_profile *f = w->f;
  double tau = (double)f->cancel_threshold;

  if (guard_measure(r, model_base(s->model), model_sources(s->model), w->use, w->n, tau, e))
    return e->code;
  for (int k = w->over->set.n; k < w->n; k++)
    t->style[w->style[k - w->over->set.n]].c = r->of[k].c;
  if (!(r->norm_ratio <= (double)f->max_style_norm_ratio))
    return err_field(e, E_ARG, "loras", "loras: together the styles change a layer by %.3g of its norm; at most %.3g is allowed: lower the scales",
                     r->norm_ratio, (double)f->max_style_norm_ratio);
  if (!guard_cancels(r, tau))
    return 0;
  log_event("styles take back %.3g of the safety of profile %s (threshold %.3g): %s", -r->c, f->name, tau,
            f->project && r->can_project ? "projected" : "refused");
  if (!f->project || !r->can_project)
    return err_field(e, E_ARG, "loras", "loras: %s would take back %.0f %% of a safety adapter at a layer; this is refused",
                     r->style >= 0 ? t->style[w->style[r->style - w->over->set.n]].style.name : "these styles together", -100 * r->c);
  guard_project(r, w->use);
  return 0;
}

/* Puts l among what is kept, in the place of the one that was not used for longest. Its reference is the active's; without memory it is not kept. */
static void keep(struct safety *s, struct live *l)
{
  struct active *a = active_clone(atomic_load(&s->active));
  int at = 0;

  if (!a)
    return;
  if (a->n_composed < COMPOSED_MAX) {
    at = a->n_composed++;
  } else {
    for (int i = 1; i < a->n_composed; i++)
      if (atomic_load(&a->composed[i]->used_ns) < atomic_load(&a->composed[at]->used_ns))
        at = i;
    live_unref(a->composed[at]);
  }
  a->composed[at] = l;
  live_ref(l);
  active_publish(s, a);
}

int forget_composed(struct safety *s, const char *digest, struct err *e)
{
  struct active *a = active_clone(atomic_load(&s->active));
  int kept = 0;

  if (!a)
    return err_set(e, E_NOMEM, "out of memory for the profiles");
  for (int i = 0; i < a->n_composed; i++) {
    struct live *l = a->composed[i];
    int has_it = 0;

    for (int k = 0; k < l->n_styles; k++)
      has_it |= !strcmp(l->style[k].digest, digest);
    if (has_it)
      live_unref(l);
    else
      a->composed[kept++] = l;
  }
  a->n_composed = kept;
  active_publish(s, a);
  return 0;
}

/* The composed generation, with a reference for the caller. */
static int compose_live(struct safety *s, struct safety_target *t, struct live **out, struct err *e)
{
  struct guard_report report = {0};
  struct work w = {0};
  char key[65];
  int64_t began = clock_ns();
  struct live *l;
  int r;

  if (gather(s, &w, t, e))
    return e->code;
  composed_key(key, w.f->name, w.over->stamp.id, t->style, t->n_styles);
  *out = composed_take(atomic_load(&s->active), key, t);
  if (*out) /* composed for another request while this one waited */
    return 0;
  r = judge(s, &w, t, &report, e);
  if (!r)
    r = live_build(s, &l, w.f, &w.over->set, w.use, w.n, FORM_RUNTIME, e);
  guard_free(&report);
  if (r)
    return r;
  memcpy(l->over, w.over->stamp.id, sizeof l->over);
  memcpy(l->key, key, sizeof l->key);
  memcpy(l->style, t->style, sizeof l->style);
  l->n_styles = t->n_styles;
  atomic_store(&l->used_ns, began);
  live_stamp(l, w.over->number);
  log_event("profile %s: generation %s composed in %.0f ms", w.f->name, l->stamp.id, (double)(clock_ns() - began) / 1e6);
  *out = l;
  keep(s, l);
  return 0;
}

void compose(struct safety *s, struct safety_target *t)
{
  int stop = atomic_load(t->stop);
  struct err e = {0};
  struct live *l = NULL;

  live_unref(t->composed);
  t->composed = NULL;
  if (stop)
    err_set(&e, stop, "nobody waits for it any more");
  else if (!compose_live(s, t, &l, &e))
    t->composed = l;
  t->ready(t->ready_arg, &e);
}
