/*
 * outline.h - a backend that computes nothing and notes which plans be_cuda would ask cuDNN for.
 *
 * Its convolutions and attentions describe their calls by be_cuda's own functions (matmul.c), so that what is noted is what be_cuda asks for on a device;
 * everything else is be_dry's. Unlike be_dry it gives out addresses, because be_cuda decides by them which keys and values lie together; nobody may
 * follow them. Downloads are zeros.
 *
 * Callers: vendor_compile.c, tests. Threads: one owner, lanes included.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_OUTLINE_H
#define SAFELIGHT_KERNELS_CUDA_OUTLINE_H

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/plans.h"

struct outline {
  struct be be;                 /* models are opened on it */
  struct be_ops ops;
  struct cuda cuda;             /* without a device */
  uintptr_t top;                /* the next address */
  struct plans seen;            /* noted keys */
  struct gpu_key *key;          /* `keys` of them, in the order of their first call */
  int keys, room;
};

void outline_open(struct outline *o, int want_f16);
void outline_close(struct outline *o); /* takes a zeroed one */

#endif
