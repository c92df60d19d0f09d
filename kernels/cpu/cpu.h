/*
 * cpu.h - what the files of be_cpu share: the backend's state, its weights, its scratch memory and how work is split.
 *
 * Threads: everything belongs to the thread that owns the struct be; ops start OpenMP regions of their own. A region has
 * cpu_threads() members: one when the work is too small to pay for waking the others. A lane (be_ops.open_lane) is a struct cpu of
 * its own for another thread; the two have nothing in common but the table of layouts in struct dnn and the weights. A weight is
 * immutable once loaded, except that packed copies are added to it: see struct weight_copy.
 */
#ifndef SAFELIGHT_KERNELS_CPU_CPU_H
#define SAFELIGHT_KERNELS_CPU_CPU_H

#include <stdatomic.h>

#include "kernels/backend.h"
#include "kernels/cpu/dnn.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/vec.h"

struct cpu {
  struct dnn *dnn;
  const struct vec_ops *vec;
  enum cpu_isa isa;
  enum dtype act;
  int threads;
  int device_threads;       /* of the context that was opened first, for which weights are packed; threads but for a lane */
  void *scratch;            /* for one op at a time; grows on first sight of a shape */
  size_t scratch_bytes;
};

/*
 * One packing of a matrix or kernel. The first is made when the weight is loaded; others follow when some shape runs much faster
 * with another layout, as many as oneDNN has favourites, which is two or three. They form a list that only grows at its end, by one
 * atomic store, and is freed with the weight: readers need no lock, and whoever loses the race to append drops his own copy.
 */
struct weight_copy {
  const struct dnn_layout *layout;
  void *packed;
  _Atomic(struct weight_copy *) next;
};

struct weight {
  enum weight_kind kind;
  int64_t out, in;
  int kh, kw, stride, pad_lo, pad_hi;
  int is_linear;            /* WEIGHT_LINEAR, or a 1x1 convolution that is one */
  struct weight_copy first; /* conv and linear */
  float *bias;              /* (out) or NULL; NORM: beta */
  float *gamma;             /* NORM only */
  void *table;              /* TABLE only: (in, out) */
  enum dtype table_type;
};

static inline struct cpu *cpu_of(struct be *be)
{
  return be->priv;
}

/* 64-byte aligned memory, in huge pages when it is large. NULL when there is none. Freed with free(). */
void *cpu_memory(size_t bytes);

/* At least `bytes` of scratch, 64-byte aligned, valid until the next call. */
MUST_CHECK int cpu_scratch(struct cpu *c, size_t bytes, void **p, struct err *e);

/* How many threads an op of so many nanoseconds on one thread deserves. Waking the others costs 2 us when they are idle and
 * milliseconds when another process sits on their core: what little a short op would win is not worth that risk. */
static inline int cpu_threads(const struct cpu *c, double nanoseconds)
{
  return nanoseconds < 40e3 ? 1 : c->threads;
}

/* The part of n items that belongs to thread i of count, in multiples of `unit`. */
static inline void cpu_split(int64_t n, int64_t unit, int i, int count, int64_t *from, int64_t *to)
{
  int64_t units = (n + unit - 1) / unit;

  *from = units * i / count * unit;
  *to = units * (i + 1) / count * unit;
  if (*to > n)
    *to = n;
}

/* weight.c */
MUST_CHECK int cpu_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e);
void cpu_weight_free(struct be *be, struct weight *w);
/* The packed copy in layout l, made when it does not exist yet. Any thread, for any w that nobody frees meanwhile. */
MUST_CHECK int cpu_weight_copy(struct cpu *c, struct weight *w, const struct dnn_layout *l, const void **p, struct err *e);

/* lowrank.c */
MUST_CHECK int cpu_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e);
void cpu_lowrank_free(struct be *be, struct lowrank *l);
MUST_CHECK int cpu_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e);

/* gemm.c */
MUST_CHECK int cpu_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
               struct err *e);
MUST_CHECK int cpu_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
               struct err *e);
/* The shape that a weight is packed for, before any picture was seen. */
struct dnn_shape cpu_typical_shape(const struct cpu *c, const struct weight *w);

/* norm.c */
MUST_CHECK int cpu_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w, int groups,
                  float eps, int silu, struct err *e);
MUST_CHECK int cpu_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps,
                  struct err *e);

/* attn.c */
MUST_CHECK int cpu_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal,
                  struct err *e);

/* pointwise.c */
void cpu_copy(const struct cpu *c, void *dst, const void *src, size_t bytes); /* no overlap */
MUST_CHECK int cpu_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int cpu_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e);
MUST_CHECK int cpu_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
MUST_CHECK int cpu_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
MUST_CHECK int cpu_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int cpu_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale,
                     struct err *e);
MUST_CHECK int cpu_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                     const struct step_coef *coef, struct err *e);
MUST_CHECK int cpu_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                         struct err *e);
MUST_CHECK int cpu_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e);
MUST_CHECK int cpu_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int cpu_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e);

/* embed.c */
MUST_CHECK int cpu_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift,
                       struct err *e);
MUST_CHECK int cpu_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens, const struct weight *positions,
              struct err *e);

#endif
