/*
 * cuda_bf16.h - stands in for CUDA's header of this name: __nv_bfloat16 with the two conversions that kernels/cuda uses, by base/half.h.
 * See tests/cudasim/sim.h. Threads: pure functions.
 */
#ifndef SAFELIGHT_TESTS_CUDASIM_CUDA_BF16_H
#define SAFELIGHT_TESTS_CUDASIM_CUDA_BF16_H

#include "base/half.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

static inline float __bfloat162float(__nv_bfloat16 b)
{
  return bf16_to_f32(b.bits);
}

static inline __nv_bfloat16 __float2bfloat16_rn(float f)
{
  return {f32_to_bf16(f)};
}

#endif
