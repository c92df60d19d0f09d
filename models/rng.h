/*
 * rng.h - the random numbers of a torch CPU generator: the same seed starts from the same noise.
 *
 * mt19937 seeded as torch.Generator("cpu").manual_seed(seed); normals as torch.randn draws them in fp32: sixteen at a time by
 * Box-Muller on a block of 24-bit uniforms when the tensor has 16 elements or more (the last block overlaps the one before),
 * one by one with double precision and a cached partner below that, which large draws leave alone. ATen: aten/src/ATen/native/cpu/DistributionTemplates.h,
 * aten/src/ATen/core/MT19937RNGEngine.h. The arithmetic is kernels/normal.h's, so that a backend can go on with a generator (be_ops.randn).
 *
 * Called by pipeline.c, first.c, merge_stats.c, manifest_probe.c, svd.c. Threads: a generator belongs to one job. Golden: tests/golden (rng).
 */
#ifndef SAFELIGHT_MODELS_RNG_H
#define SAFELIGHT_MODELS_RNG_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/normal.h"

struct rng {
  struct normal_state state;
};

void rng_seed(struct rng *r, uint64_t seed); /* the low 32 bits count, as in torch */
uint32_t rng_u32(struct rng *r);
/* What torch.randn(n, generator=g) returns next, in row-major order: its bits on a processor with AVX2. Elsewhere torch takes other
 * approximations of log, sin and cos, which differ by 2.3e-6. */
void rng_randn(struct rng *r, float *out, size_t n);

#endif
