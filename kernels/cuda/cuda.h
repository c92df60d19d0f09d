/*
 * cuda.h - what the C files of be_cuda share: be_cuda.c (table, memory, transfers), weight.c (parameters), matmul.c (convolution, linear,
 * attention, low-rank adapters), ops.c (the rest), pass.c (captured passes), memory.c (device memory) and outline.c (what they would ask cuDNN for).
 * Nobody else includes it.
 *
 * Threads: a struct cuda belongs to the thread that opened it and has a stream of its own; ops enqueue there and return. A lane
 * (open_lane) is another struct cuda on the same device. Weights are written before weight_load returns and never after.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_CUDA_H
#define SAFELIGHT_KERNELS_CUDA_CUDA_H

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/dnn.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/pass.h"

struct cuda {
  int device;
  const char *plan_cache;       /* or NULL */
  struct be_plans own_plans, *plans; /* plans: of the backend that this is a lane of, or &own_plans */
  cudaStream_t stream;
  struct memory *memory;        /* shared with the lanes; closed by the context that opened it */
  int owns_memory;
  struct cuda *next_context;    /* memory.c */
  struct gpu_blas *blas;
  struct gpu_dnn *dnn;
  void *scratch, *staging;      /* device: working memory of the running op; numbers on their way through a conversion */
  size_t scratch_bytes, staging_bytes;
  unsigned long long *count;    /* device: count_nonfinite */
  unsigned long long *count_host; /* pinned */
  struct pass pass;
};

struct weight {
  enum weight_kind kind;
  int64_t out, in;
  int kh, kw, stride, pad_lo, pad_hi;
  void *block;                  /* device: everything below */
  void *w;                      /* linear: (out, in); conv: (out, kh, kw, in), both of type act; table: (in, out) of type `type` */
  enum dtype type;
  void *bias;                   /* (out) of type act, NULL when there is none */
  float *bias_f32, *gamma;      /* (out); norm: bias_f32 is beta */
};

struct lowrank {
  int64_t out, in;
  int rank, kh, kw, stride, pad_lo, pad_hi; /* a linear is a 1x1 convolution */
  void *block;                  /* device: the slot, down, up */
  struct kern_slot *slot;
};

/* be_cuda.c: makes the device current in the calling thread; a failure comes back from the next call that needs it. */
void cuda_use(int device);

/* Every entry of the table starts here: CUDA's current device belongs to the thread, and a thread may serve several. */
static inline struct cuda *cuda_of(struct be *be)
{
  struct cuda *c = be->priv;

  cuda_use(c->device);
  return c;
}

static inline size_t cuda_round(size_t bytes) /* parts of a block start at multiples of this */
{
  return (bytes + 255) / 256 * 256;
}

/* be_cuda.c */

/* 0, or the error recorded: E_NOMEM when memory is short, else E_DEVICE. what: "cudaMalloc", "groupnorm". */
MUST_CHECK int cuda_check(int code, const char *what, struct err *e);
/* At least bytes of device memory, valid until the next call; grows on the first sight of a shape. */
MUST_CHECK int cuda_scratch(struct cuda *c, size_t bytes, void **p, struct err *e);
MUST_CHECK int cuda_staging(struct cuda *c, size_t bytes, void **p, struct err *e);

/* weight.c */

/* The geometry of a parameter, without memory; freed with free(). */
MUST_CHECK int cuda_weight_describe(struct weight **w, const struct be *be, const struct weight_desc *d, struct err *e);
MUST_CHECK int cuda_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e);
void cuda_weight_free(struct be *be, struct weight *w);
MUST_CHECK int cuda_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e);
void cuda_lowrank_free(struct be *be, struct lowrank *l);

/* matmul.c */

/* Whether a convolution is a product of matrices. */
int cuda_is_linear(const struct weight *w);
/* The call that conv2d makes of its operands, which it checks. */
struct gpu_conv cuda_conv_of(const struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual);
/* Whether cuDNN takes this attention. */
int cuda_attention_is_dnn(struct tensor q, int heads, int causal);
/* The call that attention makes for the pictures from b on whose keys lie together; a->B of them. Returns whether their keys and values have to be put
 * together first, because the next pass finds them elsewhere. */
int cuda_attention_of(struct gpu_attention *a, struct cuda *c, enum dtype act, struct tensor o, struct tensor q, const struct kv_row *kv, int64_t b,
                      int heads, float scale);
MUST_CHECK int cuda_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e);
MUST_CHECK int cuda_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e);
MUST_CHECK int cuda_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal,
                              struct err *e);
MUST_CHECK int cuda_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e);

/* ops.c */
MUST_CHECK int cuda_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w, int groups,
                              float eps, int silu, struct err *e);
MUST_CHECK int cuda_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e);
MUST_CHECK int cuda_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int cuda_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e);
MUST_CHECK int cuda_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
MUST_CHECK int cuda_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
MUST_CHECK int cuda_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int cuda_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift, struct err *e);
MUST_CHECK int cuda_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens, const struct weight *positions,
                          struct err *e);
MUST_CHECK int cuda_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e);
MUST_CHECK int cuda_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                                 const struct step_coef *coef, struct err *e);
MUST_CHECK int cuda_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                          struct err *e);
MUST_CHECK int cuda_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e);
MUST_CHECK int cuda_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e);
MUST_CHECK int cuda_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e);

#endif
