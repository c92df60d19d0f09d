/*
 * safety_verify.h - from a name in the policy to an adapter that may be trusted: read once, checked against digest, model, manifest,
 * signature and canary.
 *
 * Called by safety_*.c on the loader thread and by generate.c, which has no loader: both draw under the same verified set. Threads: a verifier
 * belongs to the thread that owns its lanes.
 */
#ifndef SAFELIGHT_SERVER_SAFETY_VERIFY_H
#define SAFELIGHT_SERVER_SAFETY_VERIFY_H

#include "models/adapter.h"
#include "models/manifest.h"
#include "models/pipeline.h"
#include "server/policy.h"
#include "server/proving.h"

struct verifier {
  const struct proving *on;     /* n entries; an adapter is good when it is good on each of them */
  int n;
  struct adapter_names *names;
  struct adapter_bounds bounds;
};

/* For n >= 1 devices whose models are the same checkpoint. On failure nothing is held. on, and what it names, outlives v. */
MUST_CHECK int verifier_open(struct verifier *v, const struct proving *on, int n, struct err *e);
void verifier_close(struct verifier *v); /* takes zeroed */

/* The bytes of an adapter as they were read, before anything is decided about them. */
struct adapter_files {
  struct buf file, config, manifest;   /* config and manifest: p NULL when there is none */
};
void adapter_files_close(struct adapter_files *b);

/* Reads the adapter at path inside the policy's adapter_dir, a file or a PEFT or diffusers folder, with its manifest where there is one: NAME.manifest.json
 * beside NAME.safetensors or beside the folder NAME. */
MUST_CHECK int verifier_read(const struct verifier *v, const struct policy *p, const char *path, struct adapter_files *b, struct err *e);
/* Parses (every key found, shapes, finite values, ranks; pinned: the digest it must have, "" for any), then proves: the manifest and its signature as
 * the policy requires, norms, and the canary of a manifest, these two on every device. A manifest that is there is checked even where none is required. *a
 * is the caller's; NULL after failure. */
MUST_CHECK int verifier_check(const struct verifier *v, const struct policy *p, const char *name, const char *pinned,
                              const struct adapter_files *b, struct adapter **a, struct err *e);
/* Both for adapter i of the policy. *a is the caller's, who closes it with adapter_close. */
MUST_CHECK int verifier_adapter(const struct verifier *v, const struct policy *p, int i, struct adapter **a, struct err *e);

#endif
