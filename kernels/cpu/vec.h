/*
 * vec.h - the vector kernels of be_cpu that oneDNN does not have, as one table per instruction set.
 *
 * vec_body.h holds every kernel once, written over a vector of VL floats; vec_base.c, vec_avx2.c and vec_avx512.c compile
 * it for 4, 8 and 16 of them. be_cpu chooses a table at open. Each kernel works on one contiguous piece and starts no
 * thread: the ops split the work. `type` is DT_F32 or DT_BF16; arithmetic is fp32, results are rounded to nearest even.
 *
 * Threads: pure functions, any thread. Nothing allocates.
 */
#ifndef SAFELIGHT_KERNELS_CPU_VEC_H
#define SAFELIGHT_KERNELS_CPU_VEC_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/tensor.h"

/* Keys per block of the online softmax in the vector attention, and queries worked on together. */
enum { VEC_ATTN_KEYS = 128, VEC_ATTN_QUERIES = 8 };
/* Rows and ranks that a low-rank product works on together. */
enum { VEC_SHRINK_ROWS = 4, VEC_SHRINK_RANKS = 4 };

/* One block of queries of one head against all its keys; see vec_ops.attention. */
struct vec_attn {
  const float *kt;   /* (Tp / VEC_ATTN_KEYS, K, VEC_ATTN_KEYS): keys, each block transposed, zeros beyond T */
  const float *v;    /* (Tp, Kp): values, Kp a multiple of 16, zeros beyond */
  int64_t T, Tp;     /* keys, and rounded up */
  int64_t K, Kp;     /* head dim, and rounded up to 16 */
  float scale;
  int causal;
};

struct vec_ops {
  /* n numbers from src to dst; any of F32, F16, BF16 to any of them. */
  void (*convert)(void *dst, enum dtype dst_type, const void *src, enum dtype src_type, size_t n);
  /* sum[c] += x[c] - shift[c], sq[c] += its square, over `pixels` rows of C. */
  void (*gn_stats)(float *sum, float *sq, const void *x, enum dtype type, int64_t pixels, int64_t C, const float *shift);
  /* y = x * scale[c] + offset[c], then SiLU. y may be x. */
  void (*gn_apply)(void *y, const void *x, enum dtype type, int64_t pixels, int64_t C, const float *scale,
                   const float *offset, int silu);
  void (*layernorm)(void *y, const void *x, enum dtype type, int64_t rows, int64_t D, const float *gamma, const float *beta,
                    float eps);
  void (*geglu)(void *y, const void *x, enum dtype type, int64_t rows, int64_t F);
  void (*act)(void *y, const void *x, enum dtype type, int64_t n, enum act_kind kind);
  void (*add)(void *y, const void *a, const void *b, enum dtype type, int64_t n);
  /* y (type) = s * x (fp32). */
  void (*scale)(void *y, enum dtype type, const float *x, float s, int64_t n);
  /* be_ops.sampler_step for one row; noise may be NULL. */
  void (*sampler)(float *x, float *x0_old, const float *cond, const float *uncond, const float *noise,
                  const struct step_coef *c, int64_t n);
  void (*rgb8)(uint8_t *y, const void *x, enum dtype type, int64_t n);
  int64_t (*nonfinite)(const void *x, enum dtype type, int64_t n);
  /* z (rows, ldz) = x (rows, in) down', fp32. down: (rank rounded up to VEC_SHRINK_RANKS, in rounded up to 16), zeros beyond.
   * work: VEC_SHRINK_ROWS * (in rounded up to 16) floats. Numbers of z from rank on are not written. */
  void (*shrink)(float *z, int64_t ldz, const void *x, enum dtype type, int64_t rows, int64_t in, const float *down, int64_t rank,
                 float *work);
  /* y (rows, out) += z (rows, ldz) up, fp32 sums that begin with y. up: (rank, out rounded up to 16), zeros beyond. */
  void (*expand)(void *y, enum dtype type, const float *z, int64_t ldz, int64_t rows, int64_t out, const float *up, int64_t rank);
  /* o (rows of `o_stride` elements of `type`, K used) = softmax(scale q kt) v for nq <= VEC_ATTN_QUERIES queries, the first of
   * which is token t0. q: (VEC_ATTN_QUERIES, K) fp32, zeros beyond nq. work: VEC_ATTN_QUERIES * (VEC_ATTN_KEYS + Kp) floats,
   * 64-byte aligned. */
  void (*attention)(const struct vec_attn *a, void *o, enum dtype type, int64_t o_stride, const float *q, int nq, int64_t t0,
                    float *work);
};

extern const struct vec_ops vec_base, vec_avx2, vec_avx512, vec_avx512_bf16;

#endif
