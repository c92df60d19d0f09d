/*
 * safety.c - the part of the safety manager that other threads run: opening, resolving who asks into a target, pinning, asking the loader.
 *
 * Nothing here waits for the loader but the operator's commands. See safety.h for what it does and safety_state.h for how it holds together.
 * Called by serve.c, the surfaces, worker.c, device.c, admin_actions.c. Threads: as safety.h says.
 */
#include <errno.h>
#include <math.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "server/log.h"
#include "server/safety_state.h"

const char *adapter_state_name(enum adapter_state s)
{
  static const char *const names[] = {"absent", "loading", "verified", "live", "retiring", "failed"};

  return names[s];
}

/* ---- readers and messages ---- */

const struct active *active_enter(struct safety *s)
{
  atomic_fetch_add(&s->readers, 1); /* before the load: the loader looks for readers after its store */
  return atomic_load(&s->active);
}

void active_leave(struct safety *s)
{
  atomic_fetch_sub(&s->readers, 1);
}

void message_post(struct safety *s, struct message *m)
{
  uint64_t one = 1;
  ssize_t n;

  m->next = atomic_load(&s->inbox);
  while (!atomic_compare_exchange_weak(&s->inbox, &m->next, m))
    ;
  n = write(s->wake_fd, &one, sizeof one);
  (void)n; /* full: the loader is awake */
}

/* ---- references ---- */

struct live *live_ref(struct live *l)
{
  atomic_fetch_add(&l->refs, 1);
  return l;
}

/* The loader may free l as soon as the last of its generations is let go: nothing of it is read after. */
void live_unref(struct live *l)
{
  int n;

  if (!l || atomic_fetch_sub(&l->refs, 1) != 1)
    return;
  n = l->s->devices;
  for (int i = 0; i < n; i++)
    generation_unref(l->g[i]);
}

/* ---- open and close ---- */

int safety_open(struct safety **out, const struct config *cfg, const struct safety_device *device, int n, struct audit *audit, int event_fd,
                struct err *e)
{
  struct safety *s = calloc(1, sizeof *s);

  *out = NULL;
  if (!s)
    return err_set(e, E_NOMEM, "out of memory for the safety manager");
  s->cfg = cfg;
  assert(n >= 1 && n <= DEVICES_MAX);
  memcpy(s->device, device, (size_t)n * sizeof *device);
  s->devices = n;
  s->model = device->model;
  s->audit = audit;
  s->event_fd = event_fd;
  s->wake_fd = -1;
  lock_init(&s->lock, "safety");
  if (*cfg->policy)
    snprintf(s->policy_path, sizeof s->policy_path, "%s", cfg->policy);
  else if (policy_default_path(s->policy_path, cfg->model, e))
    goto fail;
  if (policy_read(&s->first, s->policy_path, e))
    goto fail;
  s->wake_fd = eventfd(0, EFD_CLOEXEC);
  if (s->wake_fd < 0) {
    err_set(e, E_INTERNAL, "cannot make an eventfd: %s", strerror(errno));
    goto fail;
  }
  if (thread_start(&s->thread, "loader", safety_loader, s, e))
    goto fail;
  s->is_running = 1;
  *out = s;
  return 0;
fail:
  safety_close(s);
  return e->code;
}

void safety_close(struct safety *s)
{
  struct message quit = {.kind = MESSAGE_QUIT};

  if (!s)
    return;
  if (s->is_running) {
    atomic_store(&s->is_closing, 1);
    message_post(s, &quit);
    pthread_join(s->thread, NULL); /* the loader has freed everything that it made */
  }
  policy_free(s->first);
  if (s->wake_fd >= 0)
    close(s->wake_fd);
  lock_fini(&s->lock);
  free(s);
}

/* ---- what serving asks ---- */

static int unavailable(const char *profile, const struct err *why, struct err *e)
{
  return err_set(e, E_POLICY, "safety_unavailable: the safety that profile %s requires is not live: %.300s", profile,
                 why && why->code ? why->msg : "it is being loaded");
}

int safety_ready(struct safety *s, struct err *e)
{
  const struct active *a = active_enter(s);
  int r = 0;

  if (!a)
    r = err_set(e, E_POLICY, "safety_unavailable: the safety adapters are being loaded");
  for (int i = 0; a && !r && i < a->policy->n_profiles; i++)
    if (!a->slot[i].live)
      r = unavailable(a->slot[i].name, &a->slot[i].why, e);
  active_leave(s);
  return r;
}

void composed_key(char key[65], const char *profile, const char *over, const struct style_use *style, int n)
{
  crypto_generichash_state h;
  unsigned char sum[32];
  int order[POLICY_STYLES_MAX], k;

  for (int i = 0; i < n; i++) { /* by digest, so that the client's order does not matter */
    for (k = i; k > 0 && strcmp(style[order[k - 1]].digest, style[i].digest) > 0; k--)
      order[k] = order[k - 1];
    order[k] = i;
  }
  crypto_generichash_init(&h, NULL, 0, sizeof sum);
  crypto_generichash_update(&h, (const unsigned char *)profile, strlen(profile) + 1);
  crypto_generichash_update(&h, (const unsigned char *)over, strlen(over) + 1);
  for (int i = 0; i < n; i++) {
    const struct style_use *u = &style[order[i]];
    if (u->style.weight == 0)
      continue;
    crypto_generichash_update(&h, (const unsigned char *)u->digest, 65);
    crypto_generichash_update(&h, (const unsigned char *)&u->style.weight, sizeof u->style.weight);
  }
  crypto_generichash_final(&h, sum, sizeof sum);
  sodium_bin2hex(key, 65, sum, sizeof sum);
}

struct live *composed_take(const struct active *a, const char *key, struct safety_target *t)
{
  struct live *l = NULL;

  for (int i = 0; !l && i < a->n_composed; i++)
    if (!strcmp(a->composed[i]->key, key))
      l = a->composed[i];
  if (!l)
    return NULL;
  live_ref(l);
  for (int k = 0; k < t->n_styles; k++)
    for (int j = 0; j < l->n_styles; j++)
      if (!strcmp(t->style[k].digest, l->style[j].digest))
        t->style[k].c = l->style[j].c;
  return l;
}

/* Names, weights and caps of the styles, into the target. */
static int resolve_styles(const struct active *a, const struct policy_profile *f, const struct safety_style *style, int n,
                          struct safety_target *t, struct err *e)
{
  char field[32];

  if (n > POLICY_STYLES_MAX)
    return err_field(e, E_ARG, "loras", "loras may have at most %d entries", POLICY_STYLES_MAX);
  for (int i = 0; i < n; i++) {
    const struct policy_adapter *d = NULL;
    for (int k = 0; k < f->n_style; k++)
      if (!strcmp(a->policy->adapter[f->style[k]].name, style[i].name))
        d = &a->policy->adapter[f->style[k]];
    snprintf(field, sizeof field, "loras[%d].name", i);
    if (!d)
      return err_field(e, E_ARG, field, "%s: \"%s\" is not a style that you may use; safety adapters and files cannot be named", field,
                       style[i].name);
    for (int k = 0; k < i; k++)
      if (!strcmp(style[k].name, style[i].name))
        return err_field(e, E_ARG, field, "%s: \"%s\" is there twice", field, style[i].name);
    snprintf(field, sizeof field, "loras[%d].scale", i);
    if (!(fabsf(style[i].weight) <= f->max_style_weight))
      return err_field(e, E_ARG, field, "%s must be between %g and %g", field, (double)-f->max_style_weight,
                       (double)f->max_style_weight);
    t->style[i].style = style[i];
    memcpy(t->style[i].digest, d->digest, sizeof d->digest);
  }
  t->n_styles = n;
  return 0;
}

static int has_styles(const struct safety_target *t)
{
  for (int i = 0; i < t->n_styles; i++)
    if (t->style[i].style.weight != 0)
      return 1;
  return 0;
}

/* A tenant by name: who showed a key once and is remembered. */
static int find_tenant(const struct policy *p, const char *name, int *profile, const char **tenant, struct err *e)
{
  for (int i = 0; i < p->n_tenants; i++)
    if (!strcmp(p->tenant[i].name, name)) {
      *profile = p->tenant[i].profile;
      *tenant = p->tenant[i].name;
      return 0;
    }
  return err_set(e, E_AUTH, "there is no tenant %s any more", name);
}

static int resolve(const struct active *a, const char *token, const char *name, const struct safety_style *style, int n, struct safety_target *t,
                   int *pending, struct err *e)
{
  const struct policy_profile *f;
  const char *tenant;
  char key[65];
  int at;

  if (!a)
    return err_set(e, E_POLICY, "safety_unavailable: the safety adapters are being loaded");
  if (name && *name ? find_tenant(a->policy, name, &at, &tenant, e) : policy_authenticate(a->policy, token, &at, &tenant, e))
    return e->code;
  f = &a->policy->profile[at];
  memcpy(t->tenant, tenant, strlen(tenant) + 1);
  memcpy(t->profile, f->name, sizeof t->profile);
  t->limits = a->policy->keyless;
  for (int i = 0; i < a->policy->n_tenants; i++)
    if (*tenant && !strcmp(a->policy->tenant[i].name, tenant)) {
      memcpy(t->key_hash, a->policy->tenant[i].key_hash, sizeof t->key_hash);
      t->limits = a->policy->tenant[i].limits;
    }
  if (!a->slot[at].live)
    return unavailable(f->name, &a->slot[at].why, e);
  if (resolve_styles(a, f, style, n, t, e))
    return e->code;
  if (!has_styles(t))
    return 0;
  composed_key(key, f->name, a->slot[at].live->stamp.id, t->style, t->n_styles);
  t->composed = composed_take(a, key, t);
  *pending = !t->composed;
  return 0;
}

static int make_target(struct safety *s, const char *token, const char *name, const struct safety_style *style, int n, struct safety_target **out,
                       int *pending, struct err *e)
{
  struct safety_target *t = calloc(1, sizeof *t);
  int r;

  *out = NULL;
  *pending = 0;
  if (!t)
    return err_set(e, E_NOMEM, "out of memory for a request");
  atomic_init(&t->refs, 1);
  t->message.kind = MESSAGE_PREPARE;
  r = resolve(active_enter(s), token, name, style, n, t, pending, e);
  active_leave(s);
  *out = t; /* also after failure: who asked is known, for the audit record */
  return r;
}

int safety_resolve(struct safety *s, const char *token, const struct safety_style *style, int n, struct safety_target **t, int *pending, struct err *e)
{
  return make_target(s, token, NULL, style, n, t, pending, e);
}

int safety_resolve_tenant(struct safety *s, const char *tenant, const struct safety_style *style, int n, struct safety_target **t, int *pending,
                          struct err *e)
{
  return make_target(s, NULL, tenant, style, n, t, pending, e);
}

void safety_prepare(struct safety *s, struct safety_target *t, const _Atomic int *stop, void (*ready)(void *arg, const struct err *err), void *arg)
{
  t->stop = stop;
  t->ready = ready;
  t->ready_arg = arg;
  message_post(s, &t->message);
}

const char *safety_target_tenant(const struct safety_target *t)
{
  return t->tenant;
}

const char *safety_target_profile(const struct safety_target *t)
{
  return t->profile;
}

const struct policy_limits *safety_target_limits(const struct safety_target *t)
{
  return &t->limits;
}

void safety_target_unref(struct safety_target *t)
{
  if (!t || atomic_fetch_sub(&t->refs, 1) != 1)
    return;
  live_unref(t->composed);
  free(t);
}

int safety_target_styles(const struct safety_target *t, struct audit_style *out, int n)
{
  for (int i = 0; i < t->n_styles && i < n; i++) {
    out[i] = (struct audit_style){.weight = t->style[i].style.weight, .c = t->style[i].c};
    memcpy(out[i].name, t->style[i].style.name, sizeof out[i].name);
    memcpy(out[i].digest, t->style[i].digest, sizeof out[i].digest);
  }
  return t->n_styles;
}

/* The tenant's profile by the policy of now: a key that was moved or taken away while its request waited has lost what it had. */
static int still_allowed(const struct policy *p, const struct safety_target *t)
{
  int profile = 0;

  if (*t->tenant) {
    int i = 0;
    while (i < p->n_tenants && (strcmp(p->tenant[i].name, t->tenant) || strcmp(p->tenant[i].key_hash, t->key_hash)))
      i++;
    if (i == p->n_tenants)
      return -1;
    profile = p->tenant[i].profile;
  }
  return strcmp(p->profile[profile].name, t->profile) ? -1 : profile;
}

/* The generation for t, or NULL with *stale or an error. The reader is counted in. */
static struct live *choose(const struct active *a, const struct safety_target *t, int *stale, struct err *e)
{
  int at = still_allowed(a->policy, t);

  if (at < 0) {
    err_set(e, E_POLICY, "safety_unavailable: the policy changed while this request waited; send it again");
    return NULL;
  }
  if (!a->slot[at].live) {
    unavailable(t->profile, &a->slot[at].why, e);
    return NULL;
  }
  if (!has_styles(t))
    return a->slot[at].live;
  *stale = !t->composed || strcmp(t->composed->over, a->slot[at].live->stamp.id) != 0;
  return *stale ? NULL : t->composed;
}

int safety_pin(struct safety *s, struct safety_target *t, int device, struct generation **g, struct safety_stamp *stamp, int *stale,
               struct err *e)
{
  const struct active *a = active_enter(s); /* not NULL: t was resolved under one */
  struct live *l;

  *g = NULL;
  *stale = 0;
  l = choose(a, t, stale, e);
  if (l) {
    *g = generation_ref(l->g[device]);
    *stamp = l->stamp;
    atomic_store_explicit(&l->used_ns, clock_ns(), memory_order_relaxed);
  }
  active_leave(s);
  return l || *stale ? 0 : e->code;
}

int safety_current(struct safety *s, struct safety_stamp *out, int cap)
{
  const struct active *a = active_enter(s);
  int n = 0;

  for (int i = 0; a && i < a->policy->n_profiles && n < cap; i++)
    if (a->slot[i].live)
      out[n++] = a->slot[i].live->stamp;
  active_leave(s);
  return n;
}

int safety_profiles(struct safety *s, struct safety_profile_status *out, int cap)
{
  const struct active *a = active_enter(s);
  int n = a ? a->policy->n_profiles : 0;

  for (int i = 0; i < n && i < cap; i++) {
    const struct slot *slot = &a->slot[i];
    snprintf(out[i].name, sizeof out[i].name, "%s", slot->name);
    snprintf(out[i].generation, sizeof out[i].generation, "%s", slot->live ? slot->live->stamp.id : "");
    snprintf(out[i].why, sizeof out[i].why, "%s", slot->live ? "" : slot->why.code ? slot->why.msg : "it is being loaded");
  }
  active_leave(s);
  return n;
}

int safety_profile_styles(struct safety *s, const char *profile, char (*name)[POLICY_NAME], int cap)
{
  const struct active *a = active_enter(s);
  int n = 0;

  for (int i = 0; a && i < a->policy->n_profiles; i++) {
    const struct policy_profile *f = &a->policy->profile[i];
    for (int k = 0; !strcmp(f->name, profile) && k < f->n_style && n < cap; k++)
      memcpy(name[n++], a->policy->adapter[f->style[k]].name, POLICY_NAME);
  }
  active_leave(s);
  return n;
}

uint64_t safety_swaps(const struct safety *s)
{
  return atomic_load(&s->swaps);
}
