/*
 * device.cuh - what the kernels share: 16-bit elements as fp32, aligned packs of them, sums over a warp, and the launch.
 *
 * Included by the .cu files only. Nothing here knows whether nvcc or the simulator of tests/cudasim compiles it: both supply the CUDA headers
 * by name. Kernels keep to what both understand: static shared memory, no inline assembly (but mma.cuh's), cudaLaunchKernelEx instead of <<< >>>.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_DEVICE_H
#define SAFELIGHT_KERNELS_CUDA_DEVICE_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels/cuda/kernels.h"

enum { WARP = 32 };
static constexpr unsigned ALL_LANES = 0xffffffffu;

/* ---- elements ---- */

static __device__ __forceinline__ float to_f32(float v)
{
  return v;
}

static __device__ __forceinline__ float to_f32(__half v)
{
  return __half2float(v);
}

static __device__ __forceinline__ float to_f32(__nv_bfloat16 v)
{
  return __bfloat162float(v);
}

static __device__ __forceinline__ void from_f32(float *to, float v)
{
  *to = v;
}

static __device__ __forceinline__ void from_f32(__half *to, float v)
{
  *to = __float2half_rn(v);
}

static __device__ __forceinline__ void from_f32(__nv_bfloat16 *to, float v)
{
  *to = __float2bfloat16_rn(v);
}

/* V elements that are read and written as one: 16 bytes where the shape allows it. A misaligned one is a fault of the device; saying so here
 * lets UBSan see it in the simulator. */
template <typename T, int V> struct alignas(sizeof(T) * V) pack {
  T v[V];
};

template <typename T, int V> static __device__ __forceinline__ pack<T, V> load_pack(const T *p)
{
  return *static_cast<const pack<T, V> *>(__builtin_assume_aligned(p, sizeof(T) * V));
}

template <typename T, int V> static __device__ __forceinline__ void store_pack(T *p, const pack<T, V> &v)
{
  *static_cast<pack<T, V> *>(__builtin_assume_aligned(p, sizeof(T) * V)) = v;
}

/* Whether everything is a multiple of 8 16-bit elements. NULL is. */
static inline bool is_wide(const void *a, const void *b, const void *c, int64_t n, int64_t m)
{
  return ((uintptr_t)a | (uintptr_t)b | (uintptr_t)c) % 16 == 0 && n % 8 == 0 && m % 8 == 0;
}

/* ---- rows ---- */

/* The entry of a row: from a table in device memory, or from the kernel's parameters. */
template <typename Rows> static __device__ __forceinline__ auto row_of(const Rows &rows, int64_t b)
{
  auto entry = rows.row[0];

  if (rows.at)
    entry = rows.at[b];
  else
    entry = rows.row[b];
  return entry;
}

/* ---- sums ---- */

/* The sum of all lanes, in every lane: a butterfly, so that each lane adds the same numbers in the same order up to exchange of the two
 * summands, which does not change a bit. */
static __device__ __forceinline__ float warp_sum(float v)
{
  for (int step = WARP / 2; step > 0; step /= 2)
    v += __shfl_xor_sync(ALL_LANES, v, step);
  return v;
}

static __device__ __forceinline__ float warp_max(float v)
{
  for (int step = WARP / 2; step > 0; step /= 2)
    v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
  return v;
}

/* ---- nonlinearities, exact to fp32 ---- */

static __device__ __forceinline__ float silu(float v)
{
  return v / (1.0f + expf(-v));
}

static __device__ __forceinline__ float gelu(float v)
{
  return 0.5f * v * (1.0f + erff(v * 0.70710678f)); /* 1/sqrt(2) */
}

static __device__ __forceinline__ float quick_gelu(float v)
{
  return v / (1.0f + expf(-1.702f * v));
}

/* ---- launching ---- */

static inline int64_t div_up(int64_t a, int64_t b)
{
  return (a + b - 1) / b;
}

template <typename... P, typename... A> static int launch(void (*kernel)(P...), dim3 grid, int threads, cudaStream_t s, A... args)
{
  cudaLaunchConfig_t config = {};

  config.gridDim = grid;
  config.blockDim = dim3((unsigned)threads);
  config.stream = s;
  return (int)cudaLaunchKernelEx(&config, kernel, args...);
}

#endif
