/*
 * blas.h - matrix products, the vendor's: the one door to cuBLASLt (vendor_blas.c) and to its stand-in in tests/cudasim.
 *
 * The algorithm of a product is chosen once for each class (out, in, rows of one picture, types, what is fused) and used for every count of
 * pictures, without split sums: a row's bits do not depend on the batch.
 *
 * Callers: kernels/cuda/matmul.c. Threads: one owner each; several may exist on a device.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_BLAS_H
#define SAFELIGHT_KERNELS_CUDA_BLAS_H

#include <cuda_runtime_api.h>

#include "base/err.h"
#include "kernels/tensor.h"

struct gpu_blas;

enum { GPU_BLAS_WORKSPACE = 32 << 20 /* bytes of device memory, taken by gpu_blas_open */ };

struct gpu_linear {
  void *y;                      /* (rows, out) of y_type */
  const void *x;                /* (rows, in) of type act */
  const void *w;                /* (out, in) of type act */
  const void *bias;             /* (out) of y_type, or NULL */
  const void *residual;         /* as y, may be y; or NULL */
  int64_t rows, picture_rows, out, in;
  enum dtype act, y_type;
};

MUST_CHECK int gpu_blas_open(struct gpu_blas **b, struct err *e);
void gpu_blas_close(struct gpu_blas *b); /* takes NULL */
/* y = x w^T [+ bias] [+ residual], summed in fp32, rounded once. Enqueues. */
MUST_CHECK int gpu_blas_linear(struct gpu_blas *b, cudaStream_t s, const struct gpu_linear *l, struct err *e);
/* The algorithm of this product is there for later calls, as the first of them would have chosen it. */
MUST_CHECK int gpu_blas_ready(struct gpu_blas *b, const struct gpu_linear *l, struct err *e);
/* Name and version, for people. */
void gpu_blas_version(char *text, size_t size);

#endif
