/*
 * safety_state.h - what the safety manager is made of; for safety*.c alone.
 *
 * What serving reads is one immutable structure, `struct active`, behind one atomic pointer. Readers (device, HTTP, admin threads) never wait:
 * they count themselves in and out around a few instructions, and the loader, having stored a new pointer, waits until nobody is in before
 * it lets the old structure go. So the device thread cannot be held up by a loader that runs at the lowest priority. What others ask of the
 * loader goes through a stack of messages that is pushed without a lock; the messages lie inside the things they are about, so that asking
 * cannot fail. The lock guards what status pages read: the lists of files and of generations, and nothing else.
 *
 * A swap never mixes versions: what is in an active is there for every device. The device thread that pins takes its own part of it and draws all of the
 * job with that part, whatever is published meanwhile.
 *
 *      thing          made and freed by   read by
 *      struct held    loader              loader; status under the lock
 *      struct live    loader              anybody who holds a reference to it or to a generation of it, or counts himself in
 *      struct active  loader              anybody who counts himself in
 *      target         HTTP thread         its holders; the loader while it is being prepared
 */
#ifndef SAFELIGHT_SERVER_SAFETY_STATE_H
#define SAFELIGHT_SERVER_SAFETY_STATE_H

#include <semaphore.h>
#include <stdatomic.h>

#include "server/safety.h"
#include "server/safety_store.h"
#include "server/safety_verify.h"
#include "server/thread.h"

enum { COMPOSED_MAX = 8 /* composed generations kept */ };

enum message_kind { MESSAGE_QUIT, MESSAGE_RETIRE, MESSAGE_PREPARE, MESSAGE_COMMAND };

struct message {
  struct message *next;
  enum message_kind kind;
};

/* One adapter file that was read, and what it was found to be. */
struct held {
  int refs;                 /* loader */
  struct held *next;        /* list; lock */
  char name[POLICY_NAME];   /* the policy's name for it */
  struct adapter *adapter;  /* VERIFIED only */
  int is_kept;              /* an operator loaded it: its bytes lie in the state folder (safety_store.h) */
  enum adapter_state state; /* LOADING, VERIFIED or FAILED; lock. LIVE and RETIRING follow from the generations that use it */
  char digest[65], format[32], why[256];
  int sites;
  int64_t max_rank;
};

/* What the policy's adapter of this name is at present. Loader. */
struct entry {
  char name[POLICY_NAME];
  struct held *chosen;      /* what the next activation uses: VERIFIED; or NULL */
  struct held *failed;      /* the file that was refused last; or NULL */
  char seen[65];            /* hash of what the policy's path held when it was read last, manifest included; "" when it could not be read */
};

/* The required adapters of a generation with their weights. */
struct set {
  struct held *held[POLICY_REQUIRED_MAX];
  float weight[POLICY_REQUIRED_MAX];
  int n;
  enum generation_form form;
};

/* A style adapter in a composed generation or a target. */
struct style_use {
  struct safety_style style;
  char digest[65];
  double c;                 /* cancellation coefficient, once known */
};

/*
 * A generation that was published, or composed over a published one: the same set on every device, all of them built before anybody sees it.
 *
 *      refs     whoever may hand it out again: an active, a kept composition, a target that is to be drawn under it
 *      g[i]     jobs that device i draws with it (safety_pin); and this struct, until refs is 0
 *      left     how many g are still referenced: who lets go of the last one sends `retire`, and the loader frees all of it
 */
struct live {
  struct message retire;
  struct live *next;        /* list of those that have a number; lock */
  struct safety *s;
  _Atomic int refs;
  struct generation *g[DEVICES_MAX]; /* devices entries */
  _Atomic int left;
  struct safety_stamp stamp;
  struct set set;           /* holds a reference to each held */
  int is_current, is_cached; /* lock: what the active holds a reference for */
  int64_t number, activated_s;
  char over[32];            /* composed: stamp.id of what it was composed over; else "" */
  char key[65];             /* composed: what it was composed of */
  struct style_use style[POLICY_STYLES_MAX];
  int n_styles;
  _Atomic int64_t used_ns;
};

/* What a profile's generation consisted of before the current one. Loader. */
struct past {
  char profile[POLICY_NAME];
  struct set set;
};

struct slot { /* one profile */
  char name[POLICY_NAME];
  struct live *live;        /* a reference; NULL: not live, and why says so */
  struct err why;
};

struct active {
  struct policy *policy;    /* shared between one active and the next unless it is replaced; the newest frees it */
  struct slot *slot;        /* policy->n_profiles, in its order */
  struct live *composed[COMPOSED_MAX];
  int n_composed;
};

struct safety {
  const struct config *cfg;
  struct safety_device device[DEVICES_MAX]; /* devices entries */
  int devices;
  struct model *model;      /* the first device's: for what is asked of the checkpoint, not of a device */
  struct audit *audit;
  int event_fd, wake_fd;
  char policy_path[POLICY_PATH];
  _Atomic(struct active *) active; /* NULL until the loader has built for the first time */
  _Atomic int readers;
  _Atomic(struct message *) inbox;
  _Atomic uint64_t swaps;
  _Atomic int is_closing;
  pthread_t thread;
  int is_running;

  /* loader */
  struct policy *policy;    /* the active's */
  struct policy *first;     /* what safety_open read, until the first rebuild takes it */
  struct be lane[DEVICES_MAX]; /* one beside each device */
  struct proving on[DEVICES_MAX];
  struct verifier verifier; /* on all of them */
  struct entry *entry;      /* policy->n_adapters, in its order */
  struct past *past;        /* policy->n_profiles, in its order */
  int is_sweep_due;         /* something in the state folder may be needed no longer */

  struct lock lock;
  struct held *held;        /* all */
  struct live *live;        /* all */
};

struct safety_target {
  struct message message;
  atomic_int refs;
  char tenant[POLICY_NAME], key_hash[65], profile[POLICY_NAME];
  struct policy_limits limits;
  struct style_use style[POLICY_STYLES_MAX];
  int n_styles;
  struct live *composed;    /* a reference */
  const _Atomic int *stop;  /* while it is being prepared */
  void (*ready)(void *arg, const struct err *err);
  void *ready_arg;
};

/* Something the loader is asked to do while the caller waits. */
struct command {
  struct message message;
  int (*run)(struct safety *s, struct command *c, struct err *e);
  const char *name, *path, *manifest;
  const void *bytes;
  size_t n;
  struct safety_stamp *stamp;
  struct err err;
  int is_detached;          /* nobody waits: freed by the loader */
  sem_t done;
};

/* safety.c; any thread */
const struct active *active_enter(struct safety *s); /* NULL: nothing was built yet; active_leave in any case */
void active_leave(struct safety *s);
struct live *live_ref(struct live *l);
void live_unref(struct live *l);   /* takes NULL; with the last reference jobs alone keep it */
void message_post(struct safety *s, struct message *m);
/* What is kept under key, with a reference for the caller and its coefficients copied into t; NULL: nothing. The reader is counted in, or the loader. */
struct live *composed_take(const struct active *a, const char *key, struct safety_target *t);
void composed_key(char key[65], const char *profile, const char *over, const struct style_use *style, int n);

/* safety_sets.c; loader */
/* A record of a policy or an adapter in the audit log, without waiting for it; the reason is the formatted text. */
void safety_note(struct safety *s, enum audit_kind kind, const char *verdict, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
struct held *held_new(struct safety *s, const char *name); /* LOADING, one reference; NULL without memory */
void held_verified(struct safety *s, struct held *h, struct adapter *a); /* takes a */
void held_failed(struct safety *s, struct held *h, const struct err *why);
struct held *held_ref(struct held *h);
void held_unref(struct safety *s, struct held *h); /* takes NULL */
void set_copy(struct set *to, const struct set *from); /* references of its own */
void set_release(struct safety *s, struct set *set);
int set_equal(const struct set *a, const struct set *b);
/* The uses of a set, in [set->n]. */
void set_uses(const struct set *set, struct adapter_use *use);
/* Builds the generation of n uses, the first of which are set's, in form, on every device; when one fails there is none. It is nobody's yet, with one
 * reference: live_unref, or a number and then a place in an active. */
MUST_CHECK int live_build(struct safety *s, struct live **l, const struct policy_profile *f, const struct set *set,
                          const struct adapter_use *use, int n, enum generation_form form, struct err *e);
/* Gives it its number in the activation history, durably. An activation that was the last one already keeps its number. */
MUST_CHECK int live_record(struct safety *s, struct live *l, struct err *e);
/* Its number, and with it its place in the list that status pages read: call it once, when all else of l is there. */
void live_stamp(struct live *l, int64_t number);
void live_free(struct live *l);    /* for MESSAGE_RETIRE: nobody holds a reference */
/* Slots without generations; NULL without memory. */
struct active *active_new(struct policy *p);
/* The same slots and what is composed over them, with references of its own. */
struct active *active_clone(const struct active *from);
void active_free(struct active *a); /* drops its references */
/* One pointer store; then waits for the readers of the one before and frees it, and its policy where a has another. */
void active_publish(struct safety *s, struct active *a);

/* safety_rebuild.c; loader: makes the policy p the one that is served. strict: any adapter that a profile requires and that fails, fails the
 * whole, and nothing has changed; else that profile is not live. Takes p, also after failure. */
MUST_CHECK int rebuild(struct safety *s, struct policy *p, int strict, struct err *e);
/* The required set of profile i as its adapters are now; E_FILE when one of them is not VERIFIED. */
MUST_CHECK int set_of_profile(const struct policy *p, const struct entry *entry, int i, struct set *set, struct err *e);
/* Publishes l (taken, also after failure) as profile i's, leaving the others; remembers what was before. */
MUST_CHECK int publish_one(struct safety *s, int i, struct live *l, struct err *e);
void entries_free(struct safety *s, struct entry *entry, int n);
void pasts_free(struct safety *s, struct past *past, int n);

/* safety_compose.c; loader. forget_composed: no kept composition has a style of this digest any more. */
MUST_CHECK int forget_composed(struct safety *s, const char *digest, struct err *e);
void compose(struct safety *s, struct safety_target *t);

/* safety_loader.c */
void *safety_loader(void *safety);

#endif
