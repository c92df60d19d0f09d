/*
 * plans.h - a bounded table of what was made for a shape: products, cuDNN plans, choices of engines; found by the bytes of its key.
 *
 * A server meets few shapes; a client that asks for every size meets thousands. When `most` are held and another one comes, all are dropped and made
 * anew as they are needed, as be_cpu does: what is made depends on the key alone, so that pictures keep their bits. `dropped` counts how often,
 * for those who remember an entry (captured steps).
 *
 * Callers: vendor_blas.c, vendor_dnn.c, pass.c. Threads: one owner.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_PLANS_H
#define SAFELIGHT_KERNELS_CUDA_PLANS_H

#include <stddef.h>

#include "base/err.h"

enum { PLANS_BUCKETS = 256 };

struct plan_entry;

struct plans {
  struct plan_entry *bucket[PLANS_BUCKETS];
  int n, most;
  size_t key_bytes;
  void (*drop)(void *value);    /* frees a value; nothing on the device uses it any more */
  long dropped;                 /* how often the table was full */
};

/* An empty table that owns nothing. key_bytes: a multiple of 8; keys are compared byte by byte, so that callers zero them before filling them. */
void plans_init(struct plans *t, size_t key_bytes, int most, void (*drop)(void *value));
/* NULL when there is none. */
void *plans_find(const struct plans *t, const void *key);
/* Whether plans_add would drop everything: the caller waits for the device first. */
int plans_is_full(const struct plans *t);
/* Owns value after success; after failure the caller still does. */
MUST_CHECK int plans_add(struct plans *t, const void *key, void *value, struct err *e);
/* Drops everything; the table stays usable. */
void plans_clear(struct plans *t);

#endif
