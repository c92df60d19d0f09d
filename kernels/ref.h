/*
 * ref.h - what the files of be_ref share: ref.c (table, memory, parameters), ref_matmul.c (convolution, linear, attention),
 * ref_lowrank.c (low-rank factors), ref_ops.c (everything else). Nobody else includes it.
 *
 * be_ref is the specification: plain C, fp32 activations, sums in double, rounded to fp32 once at the end. -std=c11 keeps
 * the compiler from contracting a*b+c, so its numbers are the same on every machine, up to libm's last bit.
 *
 * Threads: OpenMP splits output elements, never a sum: each element is computed by one thread in a fixed order, so results
 * depend neither on the count of threads nor on the other rows of the batch.
 */
#ifndef SAFELIGHT_KERNELS_REF_H
#define SAFELIGHT_KERNELS_REF_H

#include "kernels/backend.h"

enum { REF_LANES = 16 }; /* output channels that ref_matmul.c computes side by side */

struct weight {
  enum weight_kind kind;
  int64_t out, in;
  int kh, kw, stride, pad_lo, pad_hi; /* a linear is a 1x1 convolution: 1 1 1 0 0 */
  float *w;    /* linear, conv: (ceil(out/LANES), kh*kw*in, LANES), zeros past out; norm: gamma (out); table: (in, out) */
  float *bias; /* (out rounded up to LANES); zeros where the parameter has none */
};

struct ref_priv {
  void *scratch; /* working memory of the running op; grows to the largest shape seen, then stays */
  size_t scratch_bytes;
};

/* At least bytes of working memory, 64-byte aligned, valid until the next call; NULL when memory is short (e is filled). */
void *ref_scratch(struct be *be, size_t bytes, struct err *e);

int ref_same_dims(struct tensor a, struct tensor b);

/* The entries of the table, as backend.h describes them. */
MUST_CHECK int ref_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                          struct err *e);
MUST_CHECK int ref_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                          struct err *e);
MUST_CHECK int ref_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e);
void ref_lowrank_free(struct be *be, struct lowrank *l);
MUST_CHECK int ref_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e);
MUST_CHECK int ref_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                             int causal, struct err *e);
MUST_CHECK int ref_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                             int groups, float eps, int silu, struct err *e);
MUST_CHECK int ref_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e);
MUST_CHECK int ref_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int ref_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e);
MUST_CHECK int ref_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
MUST_CHECK int ref_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
MUST_CHECK int ref_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int ref_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift,
                                  struct err *e);
MUST_CHECK int ref_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens,
                         const struct weight *positions, struct err *e);
MUST_CHECK int ref_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale,
                                struct err *e);
MUST_CHECK int ref_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                                const struct step_coef *coef, struct err *e);
MUST_CHECK int ref_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                         struct err *e);
MUST_CHECK int ref_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e);
MUST_CHECK int ref_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int ref_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e);

#endif
