/*
 * generation.h - the weights the networks read: one entry per site, fixed once published.
 *
 * A *site* is one place of a network where a parameter is applied: a linear, a convolution, a norm or an embedding table. Its name
 * is the component and the diffusers parameter prefix ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"), its
 * number is its place in the table. The networks hold numbers only; which weight a number means is the generation's business, so
 * that a generation with adapters can stand in for the base one without the networks knowing.
 *
 * The life of a generation, and what may be trusted in each state, is drawn at the top of generation.c.
 *
 * Called by clip.c, unet.c, vae.c while they are built, by run.c on every op, by pipeline.c. Threads: built by one thread; after
 * that immutable and readable from any; the count is atomic. weight_free runs inside the last generation_unref, which therefore
 * belongs on the thread that owns the backend.
 */
#ifndef SAFELIGHT_MODELS_GENERATION_H
#define SAFELIGHT_MODELS_GENERATION_H

#include <stdatomic.h>

#include "kernels/backend.h"
#include "models/checkpoint.h"

struct site {
  char *name;
  enum weight_kind kind;
  int64_t out, in;          /* as struct weight_desc */
  int kh, kw, stride, pad_lo, pad_hi;
  int has_bias;
};

/* Pixels of the site's kernel: kh*kw, or 1. */
int64_t site_taps(const struct site *s);
/* Numbers of its weight that feed one output: in*kh*kw; 1 for a norm. The weight has out times as many. */
int64_t site_columns(const struct site *s);

/* How the adapters of a generation reach the arithmetic; fixed when it is built, so that its pictures keep their bytes. */
enum generation_form {
  FORM_BASE,      /* no adapters */
  FORM_RUNTIME,   /* base weights and stacked low-rank factors beside them; what is not low-rank is replaced */
  FORM_FOLDED     /* every touched site is replaced by the sum: nothing extra per step */
};

/* One adapter in the set of a generation. */
struct adapter_use {
  const struct adapter *adapter;  /* the caller's; need not outlive generation_build */
  float weight;
  int required;                   /* 1: the profile's safety; 0: a client's style adapter */
  const float *factor;            /* NULL, or adapter->n further factors of weight, one per delta: the guard's projection (guard.h) */
};

/* What is remembered of it. */
struct generation_member {
  char name[64], digest[65];
  float weight;
  int required;
};

struct generation {
  atomic_int refs;
  struct be *be;            /* made the weights that are its own, and frees them: the backend, or a lane of it; outlives the generation */
  struct generation *base;  /* whose site table and untouched weights this one borrows (a reference is held); NULL for the base itself */
  struct site *site;        /* n entries: the site table */
  struct weight **weight;   /* n entries: what the networks read at each site */
  struct lowrank **lowrank; /* n entries, NULL where a site has none; NULL altogether when there are none */
  int n, cap;
  int64_t params;           /* numbers in all */
  enum generation_form form;
  struct generation_member *member; /* members entries, ordered by digest: composition does not depend on the caller's order */
  int members;
  char digest[65];          /* over the base's digest, the form and the members: equal digests draw equal pictures. "" for an unnamed base */
  size_t bytes;             /* device memory of its own, by the size of its numbers: second packings not counted */
  /* Called instead of freeing when the last reference goes, on whatever thread that is; it must call generation_free later, on the
   * thread that owns `lane`. NULL: freed at once. */
  void (*retire)(void *arg, struct generation *g);
  void *retire_arg;
};

enum { SITE_NONE = -1 };    /* an optional layer that this configuration does not have */

/* A base generation without sites and with one reference. On failure *g is NULL. */
MUST_CHECK int generation_new(struct generation **g, struct be *be, struct err *e);
struct generation *generation_ref(struct generation *g);
void generation_unref(struct generation *g); /* takes NULL; with the last reference it is retired or freed */
void generation_free(struct generation *g);  /* for retire() alone: nobody holds a reference */

struct model_sources;
struct adapter;
/*
 * Builds, through `lane` (a context of its own beside the device thread's, see be_ops.open_lane), the generation that is the pristine base
 * plus the sum of weight * dW over the set. Sums are taken in fp32 or better from the checkpoint's own bytes, in the order of the members'
 * digests. The base is never written and never subtracted from. Checks ranks and norms against the bounds; a duplicate digest in the set is
 * E_ARG. n 0 gives a FORM_BASE generation of its own (digest and all). On failure *g is NULL and nothing is held. Loader thread.
 */
struct adapter_bounds;
MUST_CHECK int generation_build(struct generation **g, struct generation *base, struct model_sources *sources, struct be *lane,
                                const struct adapter_use *use, int n, enum generation_form form,
                                const struct adapter_bounds *bounds, struct err *e);
/* The digest that generation_build would give, without building. base_digest: model_info.digest. */
void generation_digest(char out[65], const char *base_digest, const struct adapter_use *use, int n, enum generation_form form);
/* The number of the site called name, or SITE_NONE. */
int generation_find(const struct generation *g, const char *name);

/*
 * A builder adds the sites of one component to a generation while its network is built: each call reads the parameter from the
 * source, packs it and lets the source's copy go, so that no more than one parameter is in memory twice. The first failure
 * sticks: later calls do nothing and return SITE_NONE, and builder_finish reports it. So building reads like a list of layers.
 */
struct builder {
  struct generation *g;
  struct source *source;
  struct err *e;
  int code;
  const char *component;    /* "unet", "vae", "text_encoder" */
  char prefix[256];         /* of the parameter names; see builder_enter */
  size_t len;
};

/* All pointers are the caller's and outlive the builder. */
void builder_init(struct builder *b, struct generation *g, struct source *source, const char *component, struct err *e);
/* Names that follow start with the formatted text and a dot, until builder_leave gets the returned mark. */
size_t builder_enter(struct builder *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void builder_leave(struct builder *b, size_t mark);
int builder_linear(struct builder *b, const char *name, int64_t in, int64_t out, int has_bias);
/* A k x k convolution with bias. k 1 with stride 1 becomes a linear. */
int builder_conv(struct builder *b, const char *name, int64_t in, int64_t out, int k, int stride, int pad_lo, int pad_hi);
int builder_norm(struct builder *b, const char *name, int64_t channels);
int builder_table(struct builder *b, const char *name, int64_t rows, int64_t columns);
/* 0, or the code of the first failure (already in e). */
MUST_CHECK int builder_finish(struct builder *b);
/* Records a failure of the caller's own, unless there is one already. */
void builder_fail(struct builder *b, int code, const char *what);

#endif
