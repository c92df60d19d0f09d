/*
 * admin.h - the JSON of the admin listener: bodies in, status out. Routes and meanings stand in openapi.yaml and docs/operating.md.
 *
 * vLLM's two routes for adapters are spoken as vLLM speaks them: {"lora_name","lora_path"[,"load_inplace"]} to load, {"lora_name"} to unload, one line of
 * text back.
 *
 * Called by server/admin.c, server/admin_actions.c. Threads: pure functions.
 */
#ifndef SAFELIGHT_PROTO_ADMIN_H
#define SAFELIGHT_PROTO_ADMIN_H

#include <stddef.h>
#include <stdint.h>

#include "base/buf.h"
#include "base/err.h"

enum { ADMIN_NAME = 64, ADMIN_PATH = 512 };

/* {"path": "experts/nudity.safetensors"} */
struct admin_load {
  char path[ADMIN_PATH];
};

struct admin_lora {
  char name[ADMIN_NAME], path[ADMIN_PATH];
  int in_place;   /* "load_inplace": a loaded one is replaced instead of refused */
};

/* Bodies need not be NUL terminated. E_ARG names the field. Unknown fields are refused. */
MUST_CHECK int admin_decode_load(struct admin_load *l, const char *body, size_t len, struct err *e);
MUST_CHECK int admin_decode_lora(struct admin_lora *l, const char *body, size_t len, int with_path, struct err *e);

struct admin_adapter {
  const char *name, *state, *format, *digest, *why; /* "" when there is none */
  int sites, required_by;
  int64_t max_rank;
};

struct admin_generation {
  const char *id, *digest, *profile;
  int requires_nothing, is_current, pins;
  size_t bytes;
  int64_t activated_s;                              /* seconds since 1970, 0 when it never was (a composed one) */
};

struct admin_profile {
  const char *name, *generation, *why;              /* generation "": its required set is not live, and why says so */
};

struct admin_status {
  const char *version, *unready;                    /* why no picture can be drawn; NULL when one can */
  uint64_t swaps;
  const struct admin_adapter *adapter;
  const struct admin_generation *generation;
  const struct admin_profile *profile;
  int adapters, generations, profiles;
  int64_t audit_records;
  const char *audit_head;
  uint64_t audit_lost;
};

/* One accepted job. Times are seconds. */
struct admin_job {
  const char *id, *caller, *profile, *state;        /* profile "": not known yet */
  int width, height, steps, steps_done, pictures, drawn;
  int position;                                     /* 1: the next to start; 0: it does not wait */
  double age_s, wait_s;                             /* wait_s 0: nothing is known */
};

/* A number or a histogram by name and label ("" for one without). */
struct admin_count {
  const char *name, *label;
  int64_t value;
};
struct admin_histogram {
  const char *name, *label;
  const int64_t *bound;                             /* [buckets]; divided by unit they are what is shown */
  const uint64_t *count;                            /* [buckets + 1], of each bucket alone; the last has no bound */
  int buckets;
  uint64_t sum;
  double unit;
};

/* What the server does now. jobs may be fewer than active. */
struct admin_activity {
  double now_s;                                     /* seconds since 1970 */
  int waiting, capacity, running, max_running, active;
  const struct admin_job *job;
  const struct admin_count *count;
  const struct admin_histogram *histogram;
  int jobs, counts, histograms;
};

MUST_CHECK int admin_encode_activity(struct buf *out, const struct admin_activity *a, struct err *e);
MUST_CHECK int admin_encode_status(struct buf *out, const struct admin_status *s, struct err *e);
MUST_CHECK int admin_encode_generations(struct buf *out, const struct admin_generation *g, int n, struct err *e);
/* {"status":"ok", "adapter":...} or {"status":"ok","generation":{...}}: what an action left behind. NULLs are left out. */
MUST_CHECK int admin_encode_done(struct buf *out, const struct admin_adapter *a, const struct admin_generation *g, struct err *e);
/* {"status":"ok","records":[...]}: records is JSON already. */
MUST_CHECK int admin_encode_records(struct buf *out, const char *records, struct err *e);

#endif
