/*
 * wrong.h - the kernels of wrong.cu. Called by test_sim.c. Threads: one.
 */
#ifndef SAFELIGHT_TESTS_CUDASIM_WRONG_H
#define SAFELIGHT_TESTS_CUDASIM_WRONG_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

enum wrong {
  BARRIER_SKIPPED, LEFT_EARLY, TWO_BARRIERS, REVERSE /* arg: with its barrier */, UNWRITTEN, SHUFFLE_MASK /* arg */, SHUFFLE_STEP /* arg */,
  MISSING_LANE, CROSSED, WRITE_AT /* arg */, SHARED_AT /* arg */, WIDE_AT /* arg */, TOO_MANY_THREADS
};

/* Two blocks of it; y has at least 64 floats where the kernel writes all. */
int wrong_launch(enum wrong what, cudaStream_t s, float *y, int arg);

#ifdef __cplusplus
}
#endif

#endif
