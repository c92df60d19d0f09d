/*
 * policy.h - the operator's policy file, decoded: who is drawn for under which safety adapters.
 *
 * The file is one JSON object; every field it may hold is in docs/operating.md. What is decoded here is complete and bounded: names refer
 * to things that exist, weights are not below their minimum, a style adapter has a digest, and a profile that requires nothing says so in
 * so many words. Unknown fields are errors, because a misspelt safety setting must not pass for one that was made.
 *
 * Called by server/policy.c, which also knows where the file lies. Threads: pure functions; a policy is immutable once decoded.
 */
#ifndef SAFELIGHT_PROTO_POLICY_H
#define SAFELIGHT_PROTO_POLICY_H

#include <stddef.h>

#include "base/err.h"

enum {
  POLICY_NAME = 64,
  POLICY_PATH = 512,
  POLICY_STYLES_MAX = 8,     /* style adapters in one request */
  POLICY_REQUIRED_MAX = 16   /* required adapters of one profile */
};

/* An adapter as the policy names it. */
struct policy_adapter {
  char name[POLICY_NAME];
  char path[POLICY_PATH];       /* file or folder, inside adapter_dir; with a manifest beside it unless manifests are not required */
  char digest[65];              /* "" when the policy does not pin one */
};

struct policy_required {
  int adapter;                  /* index in policy.adapter */
  float weight, min_weight;     /* what it is applied with; an activation with less than min_weight is refused */
};

struct policy_profile {
  char name[POLICY_NAME];
  struct policy_required *required;
  int n_required;
  int requires_nothing;         /* said in so many words; then n_required is 0 and pictures are marked as drawn without safety */
  int *style;                   /* indexes of allowed style adapters; a digest is mandatory for each */
  int n_style;
  float max_style_weight;       /* |weight| of one; default 1.5 */
  float max_style_norm_ratio;   /* sum over the styles of |w dU| over |W0|, per site; default 1 */
  float cancel_threshold;       /* tau: c = <U,S>/|S|^2 below -tau at a site is cancellation; default 0.1 */
  int project;                  /* 0: such a request is refused; 1: U's part along -S beyond tau is removed */
  int form_runtime;             /* "form": "runtime" instead of "folded" */
};

/* How much of the server one tenant, or one address of those who show no key, may take. 0: no bound but the server's own. */
struct policy_limits {
  int concurrency;              /* requests that are accepted and not answered */
  int queue;                    /* of these, those that wait */
  int per_minute;               /* requests */
  int pictures_per_minute;
  float weight;                 /* share of the device beside others of the same priority; default 1 */
  int priority;                 /* higher goes first; default 0 */
};

struct policy_tenant {
  char name[POLICY_NAME];
  char key_hash[65];            /* BLAKE2b-256 of the API key, lower-case hexadecimal */
  int profile;
  struct policy_limits limits;
};

struct policy {
  char adapter_dir[POLICY_PATH];  /* everything an adapter may be read from lies in here; relative paths start at the policy file */
  int require_manifest, require_signature;
  char public_key[65];            /* Ed25519, hexadecimal; "" when signatures are not required */
  struct policy_adapter *adapter;
  int n_adapters;
  struct policy_profile *profile; /* [0] is the default one */
  int n_profiles;
  struct policy_tenant *tenant;
  int n_tenants;
  struct policy_limits keyless;   /* for each address of those who show no key */
  char digest[65];                /* of the file's bytes, for the audit log */
};

/* adapter_dir is as the file says and digest is empty. E_FILE with e->field naming the field ("profiles.default.required[0].weight"). On failure
 * *p is NULL. */
MUST_CHECK int policy_decode(struct policy **p, const char *text, size_t len, struct err *e);
void policy_free(struct policy *p); /* takes NULL and half-built */
/* The adapter called name, or -1. */
int policy_find_adapter(const struct policy *p, const char *name);
int policy_find_profile(const struct policy *p, const char *name);

#endif
