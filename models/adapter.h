/*
 * adapter.h - one adapter file, read, checked and brought to a single form: what it does to each site of the model.
 *
 * Whatever the file's format (diffusers, PEFT, kohya, LyCORIS, LoHa, LoKr, DoRA, full differences, weight overlays), what leaves
 * this file is a list of deltas, one per site, in fp32. Keys are found through a table of aliases that is built from the model's own
 * sites, never by un-mangling names. A file is taken whole or not at all: a key that matches nothing, a factor without its
 * partner, a wrong shape or a value that is not finite is an error that names the tensor.
 *
 * Called by generation.c (stacks or folds the deltas), guard.c (cancellation), manifest.c, merge.c, server/safety_verify.c, the
 * command line. Threads: an adapter is immutable after adapter_open; any thread may read it.
 * Sources: the formats as diffusers, PEFT, kohya's sd-scripts and LyCORIS write them; see MODEL.md.
 */
#ifndef SAFELIGHT_MODELS_ADAPTER_H
#define SAFELIGHT_MODELS_ADAPTER_H

#include <stdio.h>

#include "models/generation.h"

enum delta_kind {
  DELTA_LOWRANK,  /* dW = scale * up down (LoRA; LoCon, with a Tucker core already multiplied into down) */
  DELTA_DENSE,    /* dW = scale * dense (LoHa, LoKr, full differences) */
  DELTA_DORA,     /* W' = magnitude-normalised (W0 + scale * up down, or scale * dense); dW = W' - W0, evaluated on the pristine base */
  DELTA_REPLACE   /* W' = dense (weight overlays: SafeGen's attn1, ESD's partial state dict); dW = W' - W0 */
};

/* Where the scale of a delta came from; the first that is there wins, in this order. */
enum scale_rule { SCALE_EXPLICIT, SCALE_ALPHA, SCALE_METADATA, SCALE_CONFIG, SCALE_NONE };

struct delta {
  int site;                 /* of the base generation */
  enum delta_kind kind;
  int64_t rank;             /* LOWRANK, DORA of such; else 0 */
  float *down;              /* (rank, in*kh*kw), the torch layout of a kernel flattened: in outermost, then ky, kx */
  float *up;                /* (out, rank) */
  float *dense;             /* DENSE, REPLACE, DORA of such: (out, in*kh*kw); a norm: (out, 1) */
  float *bias;              /* (out) or NULL. REPLACE: stands for the base's; else added as it is, times the weight of use alone */
  float *magnitude;         /* DORA: (out) when per_row, else (in*kh*kw for LyCORIS' column norm: (in)) */
  int magnitude_per_row;
  float scale;              /* as the file's rule says; not yet the weight somebody gives the adapter; never folded into a factor */
  enum scale_rule rule;
  double norm;              /* Frobenius norm of dW at weight 1 for LOWRANK and DENSE; of W' - W0 for the others once known, else -1 */
};

struct adapter {
  char name[64];            /* file or folder name without its ending, printable */
  char format[32];          /* "diffusers", "peft", "kohya", "lycoris", "overlay", ... for people */
  char digest[65];          /* BLAKE2b-256 over every byte of the weight file (and of adapter_config.json of a PEFT folder) */
  struct delta *delta;      /* n entries, ordered by site, one per site */
  int n;
  int64_t params;           /* numbers in all factors */
  int64_t max_rank;
  int targets_text;         /* 1 when a site of a text encoder is among them */
};

/* What is refused even though it parses. */
struct adapter_bounds {
  int64_t max_rank;         /* of one site; default 1024 */
  double max_norm_ratio;    /* |dW|_F at weight 1 over |W0|_F of its site; default 4; checked where W0 is at hand (generation_build) */
  size_t max_bytes;         /* of the file; default 4 GiB */
};
void adapter_bounds_default(struct adapter_bounds *b);

/* The table of aliases of a model's sites: every name by which some trainer calls each of them. */
struct adapter_names;
/* base: the site table, which outlives the names. layers_per_block: of the UNet, for the SGM names of SDXL; 0: without those. The names
 * outlive every adapter_open with them. Embedding tables and the VAE have no aliases. */
MUST_CHECK int adapter_names_new(struct adapter_names **n, const struct generation *base, int layers_per_block, struct err *e);
void adapter_names_free(struct adapter_names *n); /* takes NULL */
/* The site that `alias` (a key without its suffix) stands for, or SITE_NONE. */
int adapter_names_find(const struct adapter_names *n, const char *alias);

/*
 * Reads path: a .safetensors file, or a folder in PEFT's layout (adapter_model.safetensors beside adapter_config.json) or diffusers'
 * (pytorch_lora_weights.safetensors). The file is read once, completely, into memory of our own before anything is decided, so that
 * a file replaced or cut meanwhile cannot change what was checked. On failure *a is NULL; E_FILE, with e->field naming the tensor or the
 * key of the configuration.
 */
MUST_CHECK int adapter_open(struct adapter **a, const char *path, const struct adapter_names *names,
                            const struct adapter_bounds *bounds, struct err *e);
/* The same from bytes in memory (an upload); config: adapter_config.json's text or NULL. Nothing of both is kept. */
MUST_CHECK int adapter_open_memory(struct adapter **a, const char *name, const void *p, size_t bytes, const char *config,
                                   const struct adapter_names *names, const struct adapter_bounds *bounds, struct err *e);
void adapter_close(struct adapter *a); /* takes NULL */
/* The delta at a site, or NULL. */
const struct delta *adapter_at(const struct adapter *a, int site);

/* w (out, in*kh*kw) += weight * dW, in double per element. w0: the pristine base weight in fp32, needed by DORA and REPLACE (else may be
 * NULL). bias, bias0: the same for the bias, (out) or both NULL. */
void delta_apply(const struct delta *d, const struct site *s, const float *w0, const float *bias0, float weight, float *w,
                 float *bias);
/* Frobenius norm of the whole dW: from the factors alone where there are any. w0 as above. */
double delta_norm(const struct delta *d, const struct site *s, const float *w0);

/* What `safelight adapter inspect` prints, as text or as one JSON object: format, digest, ranks, scale rules, coverage by kind of layer and norms,
 * relative to the base's where sources is not NULL; of a file that adapter_open refuses the reason, and every key that names no layer with
 * the nearest that does. 0 when the file is fit for use; E_FILE when it was described and is not, or cannot be read at all (then nothing is
 * printed). */
struct model_sources;
MUST_CHECK int adapter_inspect(const char *path, const struct adapter_names *names, const struct model_sources *sources, int as_json,
                               FILE *out, struct err *e);

#endif
