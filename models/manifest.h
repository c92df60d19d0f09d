/*
 * manifest.h - what the maker of an adapter vouches for, beside the adapter file: NAME.manifest.json.
 *
 * It holds the digest of the adapter, the fingerprint of the base model it was made for, its targets and ranks, and a canary: stored inputs
 * of the UNet (latent by its seed, timestep, prompt) with the epsilon (or v) that the reference backend predicts with the adapter at weight
 * 1, and without it. So a server can prove that an adapter is effective, not merely loaded. The manifest can be signed (Ed25519,
 * libsodium): the signature is over its canonical JSON (members sorted, no white space, reals with 17 digits) without the member
 * "signature".
 *
 *   {"format": "safelight-manifest-1", "name": "violence", "digest": "<64 hex>", "base": {"name": "emoji", "digest": "<64 hex>"},
 *    "targets": {"count": 56, "digest": "<64 hex>"}, "max_rank": 4, "params": 42496, "note": "...",
 *    "canary": {"channels": 4, "height": 16, "width": 16, "tolerance": {"f32": 0.0001, "bf16": 0.03},
 *               "probes": [{"seed": 1, "timestep": 901, "prompt": "...", "expected": "<base64 of F32>", "base": "<base64 of F32>"}]},
 *    "public_key": "<64 hex>", "signature": "<128 hex>"}
 *
 * A member that is not listed here is an error. targets.digest: BLAKE2b-256 over "SITE RANK\n" of every site in table order. The tolerances
 * may be tighter than the reader's own, never wider.
 *
 * Called by server/safety_verify.c and the command line (`safelight adapter verify|sign`). Threads: a manifest is immutable once read;
 * manifest_probe and manifest_write belong to the thread that owns the lane.
 */
#ifndef SAFELIGHT_MODELS_MANIFEST_H
#define SAFELIGHT_MODELS_MANIFEST_H

#include <stdio.h>

#include "models/adapter.h"
#include "models/pipeline.h"

struct manifest;

/* Where the manifest of an adapter file or folder lies: "x.safetensors" and "x/" have "x.manifest.json". E_ARG when it does not
 * fit. */
MUST_CHECK int manifest_path(char *out, size_t cap, const char *adapter_path, struct err *e);

/* E_FILE names the file and the field. The file is read once, completely. On failure *m is NULL. */
MUST_CHECK int manifest_read(struct manifest **m, const char *path, struct err *e);
MUST_CHECK int manifest_read_text(struct manifest **m, const char *label, const char *text, size_t n, struct err *e);
void manifest_free(struct manifest *m); /* takes NULL */

/* Digest, base fingerprint, targets and ranks against the adapter as it was read and the model it is to be applied to; the signature when
 * public_key (64 hexadecimal digits) is neither NULL nor empty: then an unsigned manifest, or one signed by another key, is an error too. A
 * signature that is there must be right in any case. E_FILE names the field. */
MUST_CHECK int manifest_check(const struct manifest *m, const struct adapter *a, const struct model *model, const char *public_key,
                              struct err *e);

/* What a probe measured, for reports and logs. */
struct manifest_report {
  double error;     /* largest over the probes: |y - expected| / |expected| */
  double base_error; /* the same for the base's prediction */
  double effect;    /* |expected - base| / |base|, all probes together: how much the adapter does here */
  double share;     /* <y - y0, expected - base> / |expected - base|^2: 1 when it does that, 0 when nothing, about 0.5 at half its scale */
  double residual;  /* |(y - y0) - (expected - base)| / |expected - base| */
};

/* Runs the canary through `g`, a generation with this adapter alone at weight 1, and through the base, on the lane; allocates an arena of
 * its own for the time. Every prediction must be within the tolerance of the stored one (relative L2 error, by the activation type), the
 * base's too; and what the adapter changes must be what the manifest says: share near 1, and in fp32 the residual near 0, which a lost
 * site, a zero or wrongly scaled factor does not reach. report: NULL, or filled as far as it got. E_FILE otherwise, with e->field "canary";
 * E_ARG when g is not such a generation. */
MUST_CHECK int manifest_probe(const struct manifest *m, const struct model *model, struct be *lane, struct generation *g,
                              struct manifest_report *report, struct err *e);

enum { MANIFEST_PROBES_MAX = 8, MANIFEST_CANARY_SIDE = 16 /* of the latents that `adapter sign` predicts */ };

struct manifest_options {
  const char *note;           /* free text, or NULL */
  const char *const *prompt;  /* NULL: three of our own. A maker should name what the adapter acts on */
  int prompts;                /* at most MANIFEST_PROBES_MAX; each gets a timestep and a seed of its own */
  const char *secret_key;     /* 128 hexadecimal digits, or NULL: not signed */
};

/* Writes path (a new file that replaces the old one when it is complete): digest, base, targets, ranks of a; the canary is computed with be
 * (be_ref is what a maker should use) through g, a generation with a alone at weight 1, and the base. E_FILE (field "canary") when the
 * adapter changes too little on it to be told from none; E_ARG when the model has no digest. report: NULL, or what a probe of the result
 * measures (error 0). */
MUST_CHECK int manifest_write(const char *path, const struct adapter *a, const struct model *model, struct be *be,
                              struct generation *g, const struct manifest_options *options, struct manifest_report *report,
                              struct err *e);

/* A new key pair in hexadecimal: 128 digits to sign with, 64 to check with. */
MUST_CHECK int manifest_keygen(char secret_key[129], char public_key[65], struct err *e);

const char *manifest_digest(const struct manifest *m); /* of the adapter it speaks of */
const char *manifest_note(const struct manifest *m);   /* "" when there is none */
int manifest_is_signed(const struct manifest *m);

#endif
