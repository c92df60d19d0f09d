/*
 * cuda_fp16.h - stands in for CUDA's header of this name: __half with the two conversions that kernels/cuda uses, by base/half.h.
 * See tests/cudasim/sim.h. Threads: pure functions.
 */
#ifndef SAFELIGHT_TESTS_CUDASIM_CUDA_FP16_H
#define SAFELIGHT_TESTS_CUDASIM_CUDA_FP16_H

#include "base/half.h"

struct __half {
  uint16_t bits;
};

static inline float __half2float(__half h)
{
  return f16_to_f32(h.bits);
}

static inline __half __float2half_rn(float f)
{
  return {f32_to_f16(f)};
}

#endif
