/*
 * kernels.h - the C entry points of our own CUDA kernels, one op family per .cu file.
 *
 *   convert.cu    types of elements, packing of parameters      norm.cu     group norm + temb + SiLU, layer norm
 *   pointwise.cu  activations, GEGLU, sums                      shape.cu    concat, nearest upsampling, rows put together
 *   embed.cu      timestep sinusoids, token tables              latent.cu   sampler step, blends, 8-bit pictures, gathers
 *   attn.cu       attention that cuDNN does not take (causal)   lowrank.cu  LoRA: both products of each picture in one
 *   normal.cu     torch's random normals
 *
 * All of them: channels-last; 16-bit elements in and out with fp32 (or wider) arithmetic between; enqueue on the stream and return; take
 * no memory of their own. A row's bits depend neither on the other rows nor on their count: reductions run in an order that the shape
 * of one picture fixes, no float is ever added atomically, nothing is split along a sum but within a block.
 * Each returns 0 or a cudaError_t. Pointers are device memory unless a comment says host. Types of elements are `enum kern_type`, which
 * numbers them as enum dtype does (be_cuda.c asserts it); `act` is KERN_F16 or KERN_BF16.
 *
 * Small tables of the host (pointers and coefficients of each row) travel as kernel parameters, KERN_ROWS rows to a launch: no
 * copy, nothing to keep alive. In a captured pass (pass.c) `at` names them in device memory instead, so that they may change between replays.
 *
 * Callers: the C files of kernels/cuda. Built by nvcc, and by a host compiler for tests/cudasim. Threads: any, one stream each.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_KERNELS_H
#define SAFELIGHT_KERNELS_CUDA_KERNELS_H

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum kern_type { KERN_F32, KERN_F16, KERN_BF16, KERN_I32, KERN_U8 };
enum kern_act { KERN_SILU, KERN_GELU, KERN_QUICK_GELU };
enum { KERN_ROWS = 64, KERN_MAX_CHANNELS = 4096, KERN_MAX_GROUPS = 256, KERN_MAX_HEAD = 512, KERN_UP_STEP = 16 };

struct kern_kv { /* keys and values of a picture: (T, heads*K) */
  const void *k, *v;
  int64_t T;
};

struct kern_kv_rows {
  const struct kern_kv *at;
  struct kern_kv row[KERN_ROWS];
};

struct kern_gather {
  int src;
  float scale;
};

struct kern_gather_rows {
  const struct kern_gather *at;
  struct kern_gather row[KERN_ROWS];
};

struct kern_time_rows {
  const float *at;
  float row[KERN_ROWS];
};

struct kern_coef { /* as struct step_coef */
  float guidance, x0_x, x0_e, c_x, c_x0, c_old, c_noise;
  int row_cond, row_uncond;
};

struct kern_coef_rows {
  const struct kern_coef *at;
  struct kern_coef row[KERN_ROWS];
};

struct kern_blend { /* as struct blend_coef */
  float a, b;
};

struct kern_blend_rows {
  const struct kern_blend *at;
  struct kern_blend row[KERN_ROWS];
};

/* Low-rank factors of one site in device memory. Kernels read the slot when they run, not when they are launched: a captured step
 * follows a slot whose contents are replaced between steps. */
struct kern_slot {
  const void *down; /* (R, kh*kw*in) of type act */
  const void *up;   /* from kern_pack_up */
  int rank, width;  /* width: the rank, rounded up to a multiple of KERN_UP_STEP */
};

struct kern_slot_rows {
  const struct kern_slot *const *at;
  const struct kern_slot *row[KERN_ROWS]; /* NULL: this picture has no factors here */
};

struct kern_geometry { /* of a convolution; of a linear: H W Ho Wo = 1 T 1 T, kh kw stride 1, no padding */
  int H, W, Ho, Wo, kh, kw, stride, pad;
};

/* ---- convert.cu ---- */

/* n elements, float types only. */
int kern_convert(cudaStream_t s, void *dst, int dst_type, const void *src, int src_type, int64_t n);
/* (out, in, taps) of any float type to (out, taps, in) of type act; taps 1 is kern_convert. */
int kern_pack_conv(cudaStream_t s, void *dst, int act, const void *src, int src_type, int64_t out, int64_t in, int64_t taps);

/* ---- norm.cu ---- */

/* Bytes of working memory for kern_groupnorm. */
size_t kern_groupnorm_bytes(int64_t B, int64_t HW, int64_t C, int groups);
/* x, y (B, HW, C), y may be x; temb (B, C) or NULL; gamma, beta (C). */
int kern_groupnorm(cudaStream_t s, int act, void *y, const void *x, const void *temb, const float *gamma, const float *beta, int64_t B,
                   int64_t HW, int64_t C, int groups, float eps, int silu, void *work);
/* x, y (rows, D), y may be x. */
int kern_layernorm(cudaStream_t s, int act, void *y, const void *x, const float *gamma, const float *beta, int64_t rows, int64_t D, float eps);

/* ---- pointwise.cu ---- */

int kern_act(cudaStream_t s, int act, void *y, const void *x, int64_t n, int kind); /* y may be x */
int kern_add(cudaStream_t s, int act, void *y, const void *a, const void *b, int64_t n); /* y may be a or b */
int kern_geglu(cudaStream_t s, int act, void *y, const void *x, int64_t rows, int64_t F); /* x (rows, 2F), y (rows, F) */

/* ---- shape.cu: 16-bit elements, whatever they mean ---- */

int kern_concat(cudaStream_t s, void *y, const void *a, const void *b, int64_t rows, int64_t Ca, int64_t Cb);
/* k, v (B, n): the keys and values of the rows, n elements each, one behind the other. wide: all pointers and n are multiples of 8 elements. */
int kern_collect_kv(cudaStream_t s, void *k, void *v, const struct kern_kv_rows *rows, int64_t B, int64_t n, int wide);
/* x (B, (Ho+1)/2, (Wo+1)/2, C), y (B, Ho, Wo, C). */
int kern_upsample2x(cudaStream_t s, void *y, const void *x, int64_t B, int64_t Ho, int64_t Wo, int64_t C);

/* ---- embed.cu ---- */

/* y (B, D), B <= KERN_ROWS. */
int kern_timestep(cudaStream_t s, int act, void *y, const struct kern_time_rows *t, int64_t B, int64_t D, int flip, float freq_shift);
/* y (rows, D) = tokens[ids[r]] + positions[r % T]; ids: device. */
int kern_embed(cudaStream_t s, int act, void *y, const int32_t *ids, const void *tokens, int token_type, const void *positions,
               int position_type, int64_t rows, int64_t T, int64_t D);

/* ---- latent.cu ---- */

/* y (B, n) of type act, B <= KERN_ROWS; x F32, rows of n. */
int kern_gather_scale(cudaStream_t s, int act, void *y, const float *x, const struct kern_gather_rows *rows, int64_t B, int64_t n);
/* x, old, noise (B, n), B <= KERN_ROWS; model: rows of n. noise may be NULL when every c_noise is 0. */
int kern_sampler_step(cudaStream_t s, float *x, float *old, const float *model, const float *noise, const struct kern_coef_rows *coef, int64_t B,
                      int64_t n);
/* x, a, b (B, pixels, C), B <= KERN_ROWS; mask (B, pixels): where it is 0. */
int kern_blend(cudaStream_t s, float *x, const uint8_t *mask, const float *a, const float *b, const struct kern_blend_rows *coef, int64_t B,
               int64_t pixels, int64_t C);
int kern_to_rgb8(cudaStream_t s, uint8_t *y, const void *x, int type, int64_t n);
/* *count += how many of n are not finite. */
int kern_count_nonfinite(cudaStream_t s, unsigned long long *count, const void *x, int type, int64_t n);

/* ---- normal.cu ---- */

/* Bytes of working memory for kern_randn, n numbers a picture. */
size_t kern_randn_bytes(int64_t B, int64_t n);
/* y (B, pixels, C); states: B of struct normal_state. */
int kern_randn(cudaStream_t s, float *y, void *states, int64_t B, int64_t pixels, int64_t C, float scale, void *work);

/* ---- attn.cu ---- */

/* q, o (B, T, heads*K), B <= KERN_ROWS, K <= KERN_MAX_HEAD. */
int kern_attention(cudaStream_t s, int act, void *o, const void *q, const struct kern_kv_rows *kv, int64_t B, int64_t T, int heads, int64_t K,
                   float scale, int causal);

/* ---- lowrank.cu ---- */

/* src (out, rank) F32 to (out, width) BF16, zeros behind the rank; for act KERN_F16 followed by as many rests, which together have every bit of fp16. */
int kern_pack_up(cudaStream_t s, void *dst, int act, const float *src, int64_t out, int64_t rank, int64_t width);
/* y (B, Ho*Wo, out) += up . (down . patch of x (count, H, W, in)) for each row b that has a slot, which reads picture (first + b) % count of x; y is F32
 * or act. B <= KERN_ROWS; any rank. */
int kern_lowrank(cudaStream_t s, int act, void *y, int y_type, const void *x, const struct kern_slot_rows *slots, int64_t B, int64_t first,
                 int64_t count, const struct kern_geometry *g, int64_t in, int64_t out);

#ifdef __cplusplus
}
#endif

#endif
