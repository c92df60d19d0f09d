/*
 * wrong.h - the kernels of wrong.cu, and products on simulated tensor cores. Called by test_sim.c. Threads: one.
 */
#ifndef SAFELIGHT_TESTS_CUDASIM_WRONG_H
#define SAFELIGHT_TESTS_CUDASIM_WRONG_H

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wrong {
  BARRIER_SKIPPED, LEFT_EARLY, TWO_BARRIERS, REVERSE /* arg: with its barrier */, UNWRITTEN, SHUFFLE_MASK /* arg */, SHUFFLE_STEP /* arg */,
  MISSING_LANE, CROSSED, WRITE_AT /* arg */, SHARED_AT /* arg */, WIDE_AT /* arg */, TOO_MANY_THREADS
};

/* Two blocks of it; y has at least 64 floats where the kernel writes all. */
int wrong_launch(enum wrong what, cudaStream_t s, float *y, int arg);

/* d (16, 8) += a (16, 16) b (16, 8): mma.cuh, of fp16 or bf16 bits, all rows outermost. half: only 16 lanes of the warp call, which is a fault. */
int wrong_product(cudaStream_t s, float *d, const uint16_t *a, const uint16_t *b, int is_f16, int half);

#ifdef __cplusplus
}
#endif

#endif
