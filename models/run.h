/*
 * run.h - one forward pass: which backend, which generation, where the activations live, and whether something failed.
 *
 * The networks write formulas with these helpers. They are the only places where a site's weight is applied, so that what a generation
 * holds at a site (a packed weight, perhaps low-rank factors beside it) is known here alone.
 *
 * A pass may serve rows (entries of the first dimension) that were pinned to different generations. Rows in a row that read the same
 * weight go through one call of the op, and the low-rank factors of all rows through one more. By rule 5 of kernels/backend.h the bits
 * of a row then depend on be_cpu on how many of its neighbours share its weight; on be_ref and be_cuda on nothing but itself.
 *
 * Errors stick: after the first failure every helper does nothing, and the forward function returns r->code. Host arrays that are
 * handed to a helper are read before it returns.
 *
 * The arena is one slab and a bump pointer: run_mark, run_alloc..., run_reset, in stack order. The size a pass needs is exact and found
 * by running it: on be_dry with an arena whose base is NULL, after which arena.peak is the number of bytes. be_dry must have the
 * activation type of the real backend.
 *
 * Called by clip.c, unet.c, vae.c, blocks.c, pipeline.c. Threads: the device thread.
 */
#ifndef SAFELIGHT_MODELS_RUN_H
#define SAFELIGHT_MODELS_RUN_H

#include "models/generation.h"

enum { RUN_ALIGN = 64, RUN_MAX_ROWS = 64 /* pictures (rows of a batch) in one pass */, RUN_LINEARS = 3 };

struct run;

struct arena {
  char *base;     /* 64-byte aligned device memory, owned by the caller; NULL in a dry run */
  size_t size;    /* bytes; SIZE_MAX in a dry run */
  size_t top;     /* bytes in use */
  size_t peak;    /* the most that ever was */
};

/* Sees the input of every linear and convolution before it is applied: calibration of merges (merge_stats.c). `x` as the op takes it. */
struct run_observer {
  void (*see)(void *arg, struct run *r, int site, struct tensor x); /* may run_fail */
  void *arg;
};

struct run {
  struct be *be;
  struct arena *arena;
  const struct generation *generation; /* of every row when row is NULL; else of the first */
  const struct generation *const *row; /* rows entries: whose weights each row of every tensor with rows reads */
  int rows;
  struct err *e;
  int code;       /* 0 or the first failure, already in e */
  const struct run_observer *observer; /* NULL: nobody looks, which costs a comparison per op */
  double macs;    /* multiply-adds of the linears, convolutions and attentions so far; a dry run counts what a real one would do */
};

/* base NULL: a dry run. */
void arena_init(struct arena *a, void *base, size_t size);
void run_init(struct run *r, struct be *be, struct arena *a, const struct generation *g, struct err *e);
/* A pass whose tensors all have `rows` entries in the first dimension (the UNet's), each drawn under its own generation of one model. row is the
 * caller's and outlives the pass. */
void run_init_rows(struct run *r, struct be *be, struct arena *a, const struct generation *const *row, int rows, struct err *e);

size_t run_mark(const struct run *r);
void run_reset(struct run *r, size_t mark);
/* A tensor of the backend's activation type, or of another. Contents undefined. Too small an arena is E_NOMEM, and p is NULL. */
struct tensor run_alloc(struct run *r, int64_t b, int64_t h, int64_t w, int64_t c);
struct tensor run_alloc_type(struct run *r, enum dtype type, int64_t b, int64_t h, int64_t w, int64_t c);

/* The ops of kernels/backend.h with a site in place of a weight; see there for shapes. */
void run_linear(struct run *r, struct tensor y, struct tensor x, int site, struct tensor residual);
/* RUN_LINEARS linears of one x, as q, k and v are: y (RUN_LINEARS*B, ...) has their results one behind the other. Low-rank factors are one op for all. */
void run_linears(struct run *r, struct tensor y, struct tensor x, const int site[RUN_LINEARS]);
void run_conv(struct run *r, struct tensor y, struct tensor x, int site, struct tensor residual);
void run_groupnorm(struct run *r, struct tensor y, struct tensor x, struct tensor temb, int site, int groups, double eps,
                   int silu);
void run_layernorm(struct run *r, struct tensor y, struct tensor x, int site, double eps);
void run_attention(struct run *r, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, int causal);
/* Attention of each picture to its own tokens: k and v (B, 1, T, D) beside q. */
void run_self_attention(struct run *r, struct tensor o, struct tensor q, struct tensor k, struct tensor v, int heads,
                        int causal);
void run_geglu(struct run *r, struct tensor y, struct tensor x);
void run_act(struct run *r, struct tensor y, struct tensor x, enum act_kind kind);
void run_add(struct run *r, struct tensor y, struct tensor a, struct tensor b);
void run_concat(struct run *r, struct tensor y, struct tensor a, struct tensor b);
void run_upsample2x(struct run *r, struct tensor y, struct tensor x);
void run_timestep_embed(struct run *r, struct tensor y, const float *t, int flip_sin_to_cos, double freq_shift);
void run_embed(struct run *r, struct tensor y, const int32_t *ids, int tokens, int positions);
/* Records a failure of the caller's own. */
void run_fail(struct run *r, int code, const char *what);

#endif
