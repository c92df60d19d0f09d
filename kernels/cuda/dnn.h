/*
 * dnn.h - convolution and attention, the vendor's: the one door to cuDNN (vendor_dnn.c) and to its stand-in in tests/cudasim.
 *
 * As in blas.h an engine with its settings is chosen once for each class of shapes, the count of pictures left out, and kept. Working memory is taken when
 * a gpu_dnn is opened and never again: an engine that needs more, be it for the most pictures there are, is not chosen.
 *
 * Callers: kernels/cuda/matmul.c; outline.c and vendor_compile.c, which make plans ahead for a GPU that is only described. Threads: one owner each;
 * several may exist on a device.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_DNN_H
#define SAFELIGHT_KERNELS_CUDA_DNN_H

#include <cuda_runtime_api.h>

#include "base/err.h"
#include "kernels/tensor.h"

struct be_plans;
struct gpu_dnn;

enum {
  GPU_DNN_WORKSPACE = 32 << 20, /* bytes that a plan may work in: SD1.5 and SDXL take up to 17 MB, two of their pictures up to 2 */
  GPU_DNN_ROWS = 64             /* pictures in a call at most */
};

struct gpu_conv {
  void *y;                      /* (B, Ho, Wo, out) of y_type */
  const void *x;                /* (B, H, W, in) of type act */
  const void *w;                /* (out, kh, kw, in) of type act */
  const void *bias;             /* (out) of type act, or NULL */
  const void *residual;         /* as y, may be y; or NULL */
  int64_t B, H, W, in, Ho, Wo, out;
  int kh, kw, stride, pad_lo, pad_hi;
  enum dtype act, y_type;
};

struct gpu_attention {
  void *o;                      /* (B, T, heads*K) of type act */
  const void *q, *k, *v;        /* (B, T, heads*K), (B, keys, heads*K) twice */
  int64_t B, T, keys;
  int heads, K;                 /* K: see gpu_dnn_takes_head */
  float scale;
  enum dtype act;
};

/* What a plan is known by: the call with pointers replaced by whether they are there, and no padding that is not zero, so that keys are compared byte
 * by byte, in this process and in files of others. One of the two is filled: conv.B > 0 or attention.B > 0. */
struct gpu_key {
  struct gpu_conv conv;
  struct gpu_attention attention;
};

/* dnn_key.c */
void gpu_key_of_conv(struct gpu_key *k, const struct gpu_conv *c);
void gpu_key_of_attention(struct gpu_key *k, const struct gpu_attention *a);
/* The key of its class: the same with two pictures, for which its engine is chosen. class may be k. */
void gpu_key_class(struct gpu_key *class, const struct gpu_key *k);
/* For people: "convolution 320>320 3x3 of 64x64, residual, bf16, 2 pictures". */
void gpu_key_name(char *text, size_t size, const struct gpu_key *k);

/* For the current device. plan_cache: a folder for compiled plans, the caller's until gpu_dnn_close; or NULL. counts: moved as plans are found and
 * compiled, the caller's; several may share it. */
MUST_CHECK int gpu_dnn_open(struct gpu_dnn **d, const char *plan_cache, struct be_plans *counts, struct err *e);
void gpu_dnn_close(struct gpu_dnn *d); /* takes NULL */
/* y = conv(x, w) [+ residual] [+ bias], summed in fp32, rounded once. Enqueues. */
MUST_CHECK int gpu_dnn_conv(struct gpu_dnn *d, cudaStream_t s, const struct gpu_conv *c, struct err *e);
/* o = softmax(scale q k^T) v, head by head. Enqueues. */
MUST_CHECK int gpu_dnn_attention(struct gpu_dnn *d, cudaStream_t s, const struct gpu_attention *a, struct err *e);
/* The plan of this key is there for later calls, found or compiled, as the first of them would have done. */
MUST_CHECK int gpu_dnn_ready(struct gpu_dnn *d, const struct gpu_key *k, struct err *e);
/* Changes whenever kernels that earlier calls used have gone: what was captured before does not run any more. */
long gpu_dnn_epoch(const struct gpu_dnn *d);
/* Name and version, for people. */
void gpu_dnn_version(char *text, size_t size);

/* For a GPU that is described by a text (deploy/devices) and need not be there: gpu_dnn_prepare alone may be called. E_ARG for a description that is
 * not understood. */
MUST_CHECK int gpu_dnn_open_described(struct gpu_dnn **d, const char *description, const char *plan_cache, struct be_plans *counts, struct err *e);
/* The plan of this key is in plan_cache afterwards, with the engine of its class, as gpu_dnn_conv and gpu_dnn_attention would have compiled it.
 * *bytes: of its text. E_FILE when the folder does not take it; E_INTERNAL for a graph that cuDNN does not take. */
MUST_CHECK int gpu_dnn_prepare(struct gpu_dnn *d, const struct gpu_key *k, size_t *bytes, struct err *e);

/* Head sizes of cuDNN's attention. */
static inline int gpu_dnn_takes_head(int64_t K)
{
  return K % 8 == 0 && K <= 512;
}

#endif
