/*
 * policy.h - who is drawn for under which safety: the operator's policy file, read and found where it lies.
 *
 * The file is JSON (docs/operating.md); what it decodes to is in proto/policy.h. Profiles say which adapters every picture needs and with what
 * least weight, which style adapters a client may add (by digest), and how far; tenants map the hash of an API key to a profile. The
 * default profile is everybody's who shows no key. Nothing in it comes from a client.
 *
 * Called by safety.c (what to build, who asks), serve.c and generate.c (early refusal). Threads: immutable once read; replaced as a whole by
 * safety_reload.
 */
#ifndef SAFELIGHT_SERVER_POLICY_H
#define SAFELIGHT_SERVER_POLICY_H

#include "base/buf.h"
#include "base/err.h"
#include "proto/policy.h"

/* E_FILE names the file and the field ("profiles.default.required[0].weight") and says what to change. Unknown fields are errors, and so is a
 * path that leads out of adapter_dir, through ".." or a link. adapter_dir is absolute and resolved after. */
MUST_CHECK int policy_read(struct policy **p, const char *path, struct err *e);
/* The policy file for a model when the operator names none: the bundled one for the bundled model. E_ARG for another model, with a sentence that
 * says how to write one. */
MUST_CHECK int policy_default_path(char out[POLICY_PATH], const char *model, struct err *e);
/* The profile for an Authorization header's bearer token (NULL: none given): its index; E_AUTH for an unknown key. tenant gets the
 * tenant's name, "" for none. Compares hashes in constant time. Without tenants in the policy keys mean nothing and everybody has the
 * default profile. */
MUST_CHECK int policy_authenticate(const struct policy *p, const char *token, int *profile, const char **tenant, struct err *e);

/* All bytes of a regular file at `path` below adapter_dir, read once. Refused are paths that lead out of it (whatever was opened is asked
 * where it lies, so that no link swapped in meanwhile helps), and what is longer than out's maximum. E_FILE, E_NOTFOUND. */
MUST_CHECK int policy_read_file(const struct policy *p, const char *path, struct buf *out, struct err *e);
/* 1 when path is a folder inside adapter_dir; when anything is there. */
int policy_is_folder(const struct policy *p, const char *path);
int policy_has(const struct policy *p, const char *path);

#endif
