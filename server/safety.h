/*
 * safety.h - what every picture is drawn under: the adapters that the policy requires, their generations, and their swap while serving.
 *
 * The loader thread owns every transition: it reads and verifies adapters, builds generations through lanes of its own, publishes them with
 * one pointer store, and frees retired ones. All others only pin. With several devices a generation is the same set built on each of them, with one
 * id and one digest: it is verified and built on all before that one store, and when one device fails, nothing is published anywhere.
 *
 * For each profile there is at most one current generation; if its required set is not LIVE there is none, and pinning fails with E_POLICY: nothing
 * is drawn. A composed generation (the profile's set and a client's style adapters) is built by the loader before the request's job is queued, and counts
 * as stale when the profile's current generation is no longer the one it was composed over: the device thread then sends the job back instead of drawing
 * with it.
 *
 *      adapter:  ABSENT -> LOADING -> VERIFIED -> LIVE -> RETIRING -> ABSENT        any -> FAILED (the reason is kept)
 *
 * Called by serve.c (open, close), the surfaces (resolve, refusals), worker.c (prepare), device.c (pin), admin_actions.c (everything an operator may do).
 * Threads: as each function says. Serving reads without a lock (safety_state.h); one lock, never held while building, reading files or drawing,
 * guards what status pages show.
 */
#ifndef SAFELIGHT_SERVER_SAFETY_H
#define SAFELIGHT_SERVER_SAFETY_H

#include <stdint.h>

#include "models/generation.h"
#include "models/pipeline.h"
#include "server/audit.h"
#include "server/config.h"
#include "server/devices.h"
#include "server/policy.h"

struct safety;

enum adapter_state { ADAPTER_ABSENT, ADAPTER_LOADING, ADAPTER_VERIFIED, ADAPTER_LIVE, ADAPTER_RETIRING, ADAPTER_FAILED };
const char *adapter_state_name(enum adapter_state s); /* "absent", "loading", ... */

/* A published (or composed) generation as pictures report it. */
struct safety_stamp {
  char id[32];            /* "7-3fa9c1d2": the activation's number, which survives restarts, and the digest's first 8 digits */
  char digest[65];        /* generation.digest */
  char profile[POLICY_NAME];
  int requires_nothing;   /* the operator's evaluation profile: the picture says so */
};

/* A style adapter that a client asked for. */
struct safety_style {
  char name[POLICY_NAME];
  float weight;
};

struct safety_target; /* what one job is to be drawn under: profile and styles, resolved; reference counted */

/* A device that pictures are drawn on, as its thread has loaded it; all hold the same checkpoint. */
struct safety_device {
  struct model *model;
  struct be *be;            /* the device thread's, which a lane is opened beside */
  int number;               /* for people */
};

/* Main thread, after the models are loaded by the device threads: opens the state, reads the policy, starts the loader, which builds every profile's
 * generation. event_fd is written whenever readiness changes. What the n devices name outlives it. A policy that cannot be read is an error; adapters that
 * cannot be verified are not: the server then answers 503 and /readyz says why. */
MUST_CHECK int safety_open(struct safety **s, const struct config *cfg, const struct safety_device *device, int n, struct audit *audit,
                           int event_fd, struct err *e);
void safety_close(struct safety *s); /* takes NULL; no job is alive */

/* Any thread: 0 when every profile's required set is LIVE, else E_POLICY with the reason ("safety_unavailable: ..."). */
MUST_CHECK int safety_ready(struct safety *s, struct err *e);

/*
 * HTTP thread: resolves who asks (bearer token or NULL) and the styles into a target. E_AUTH, E_POLICY (required set not live), E_ARG (style unknown or
 * not allowed, weight over the cap, not finite). When a composed generation has to be built first, *pending is 1 and the target is not ready:
 * hand it to safety_prepare. After failure *t is NULL or a target that says who asked, as far as that is known, and is good for nothing else.
 */
MUST_CHECK int safety_resolve(struct safety *s, const char *token, const struct safety_style *style, int n,
                              struct safety_target **t, int *pending, struct err *e);
/* The same for a durable job after a restart: the tenant of that name, "" for who showed no key. E_AUTH: the policy has no such tenant any more. */
MUST_CHECK int safety_resolve_tenant(struct safety *s, const char *tenant, const struct safety_style *style, int n, struct safety_target **t,
                                     int *pending, struct err *e);
/* Calls ready(arg, err) once, from the loader thread, when t can be drawn or cannot (err->code: E_ARG for a cancelling style, E_POLICY, ...). */
/* *stop: 0, or the E_* why it is not wanted any more; lives until ready is called. What is not wanted when its turn comes is not composed: err->code is
 * that. */
void safety_prepare(struct safety *s, struct safety_target *t, const _Atomic int *stop, void (*ready)(void *arg, const struct err *err), void *arg);
const char *safety_target_tenant(const struct safety_target *t);
const char *safety_target_profile(const struct safety_target *t);
/* What the policy of then lets him take (limits.h). */
const struct policy_limits *safety_target_limits(const struct safety_target *t);
void safety_target_unref(struct safety_target *t); /* takes NULL; any thread */

/* Device thread, when it starts a job: the generation to pin, as the device'th of those that safety_open got has it (a reference for the caller), and its
 * stamp, which is the same on all. E_POLICY when the required set is not live; *stale 1 with code 0 and *g NULL when a composed generation must be rebuilt
 * over a newer one. */
MUST_CHECK int safety_pin(struct safety *s, struct safety_target *t, int device, struct generation **g, struct safety_stamp *stamp, int *stale,
                          struct err *e);
/* A target's styles for the audit record, with their cancellation coefficients (the smallest c over the sites); how many there are. */
int safety_target_styles(const struct safety_target *t, struct audit_style *out, int n);

/* ---- what an operator may do (admin.c, SIGHUP); they run on the loader thread, the caller waits (never the device thread) ---- */

/* Reads the policy file again and rebuilds what changed. On failure the old policy and its generations stay. */
MUST_CHECK int safety_reload(struct safety *s, struct err *e);
/* The same without waiting (SIGHUP): the outcome is logged. */
void safety_reload_later(struct safety *s);
/* Verifies the adapter file at `path` (inside adapter_dir) or the uploaded bytes (path is then a name) and makes it the file of the policy's adapter `name`,
 * without activating it. */
MUST_CHECK int safety_load(struct safety *s, const char *name, const char *path, const void *bytes, size_t n, const char *manifest,
                           struct err *e);
/* Builds, verifies and publishes profile's generation with the VERIFIED file of each required adapter; weight overrides must not go below min_weight.
 * The stamp of what is live now. */
MUST_CHECK int safety_activate(struct safety *s, const char *profile, struct safety_stamp *stamp, struct err *e);
/* Publishes the generation that was live before the current one. */
MUST_CHECK int safety_rollback(struct safety *s, const char *profile, struct safety_stamp *stamp, struct err *e);
/* Forgets a VERIFIED or FAILED adapter file; a LIVE one that a profile requires is E_ARG. */
MUST_CHECK int safety_retire(struct safety *s, const char *name, struct err *e);

/* For status pages and metrics: copies of what is. */
struct safety_adapter_status {
  char name[POLICY_NAME], digest[65], format[32];
  enum adapter_state state;
  int sites, required_by;   /* profiles */
  int64_t max_rank;
  char why[256];            /* of FAILED */
};
struct safety_generation_status {
  struct safety_stamp stamp;
  int is_current, pins;     /* jobs that draw with it now */
  size_t bytes;             /* on each device */
  int64_t activated_s;
};
/* 1 when a profile lists the adapter among its styles and none requires it. */
int safety_is_style(struct safety *s, const char *name);
int safety_adapters(struct safety *s, struct safety_adapter_status *out, int cap);       /* how many there are */
int safety_generations(struct safety *s, struct safety_generation_status *out, int cap); /* current ones first, then retiring and history */
/* The live generation of each profile, in the policy's order; how many there are, at most cap. Takes no lock, waits for nobody. */
int safety_current(struct safety *s, struct safety_stamp *out, int cap);
/* Every profile, in the policy's order; how many there are. Waits for nobody. */
struct safety_profile_status {
  char name[POLICY_NAME];
  char generation[32];      /* id of what is live; "" when its required set is not */
  char why[448];            /* it is not */
};
int safety_profiles(struct safety *s, struct safety_profile_status *out, int cap);
/* The style adapters that clients of a profile may use, by name; how many there are, at most cap. */
int safety_profile_styles(struct safety *s, const char *profile, char (*name)[POLICY_NAME], int cap);
uint64_t safety_swaps(const struct safety *s);

#endif
