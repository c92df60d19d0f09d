/*
 * manifest_parts.h - what a manifest is made of; shared by manifest.c (reads and checks it), manifest_probe.c (runs it) and
 * manifest_write.c (makes it), nobody else. Threads: immutable once read.
 */
#ifndef SAFELIGHT_MODELS_MANIFEST_PARTS_H
#define SAFELIGHT_MODELS_MANIFEST_PARTS_H

#include <jansson.h>

#include "models/manifest.h"

#define MANIFEST_FORMAT "safelight-manifest-1"

enum { MANIFEST_PROMPT_MAX = 1024, MANIFEST_NOTE_MAX = 4096, MANIFEST_SIDE_MAX = 64, MANIFEST_CHANNELS_MAX = 16,
       MANIFEST_BYTES_MAX = 16 << 20, MANIFEST_TRAIN_STEPS = 1000 };

/* The widest tolerances that a manifest may ask for, and what manifest_write says. In fp32 be_cpu is 1.8e-6 from be_ref on the bundled
 * model, in bf16 0.0050 (tests/unit/test_manifest.c); both leave room for other models and other orders of summation. */
#define MANIFEST_TOLERANCE_F32 1e-4
#define MANIFEST_TOLERANCE_BF16 0.03

struct manifest_probe_point {
  uint64_t seed;          /* the latent is rng_randn of it */
  float timestep;
  char *prompt;
  float *expected, *base; /* channels * height * width each, torch's order */
};

struct manifest {
  char label[160];        /* the file, for messages */
  char name[64], digest[65], base_name[64], base_digest[65], targets_digest[65];
  int64_t targets, max_rank, params;
  char *note;
  int channels, height, width;
  double tolerance_f32, tolerance_bf16;
  struct manifest_probe_point probe[MANIFEST_PROBES_MAX];
  int probes;
  char public_key[65], signature[129]; /* "" when not signed */
  char *canonical;        /* what is signed */
};

/* The text that is signed: root without "signature", members sorted, nothing between them. The caller frees it; NULL when
 * memory is short. */
char *manifest_canonical(const json_t *root);
/* BLAKE2b-256 in hexadecimal over "SITE RANK\n" of each delta of a. */
void manifest_targets(char out[65], const struct adapter *a, const struct generation *base);
/* The sites' table of g must hold a's sites, and g must be a alone at weight 1. digest: of the adapter. */
MUST_CHECK int manifest_check_generation(const struct generation *g, const char *digest, struct err *e);

struct predictor;
/* One probe point of the canary through g: fills out (channels * height * width floats). */
MUST_CHECK int manifest_predict(struct predictor *p, const struct manifest_probe_point *point, struct generation *g, float *out,
                                struct err *e);

#endif
