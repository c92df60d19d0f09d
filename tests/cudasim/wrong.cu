/*
 * wrong.cu - small kernels, right ones and wrong ones, to show what the simulator notices. See test_sim.c.
 */
#include "kernels/cuda/mma.cuh"
#include "tests/cudasim/wrong.h"

enum { N = 64 };

static void __global__ barrier_skipped_kernel(float *y)
{
  if (threadIdx.x < N / 2)
    __syncthreads();
  y[threadIdx.x] = 1;
}

static void __global__ left_early_kernel(float *y)
{
  if (threadIdx.x == 3)
    return;
  __syncthreads();
  y[threadIdx.x] = 1;
}

static void __global__ two_barriers_kernel(float *y)
{
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

static void __global__ reverse_kernel(float *y, int with_barrier)
{
  __shared__ float s[N];

  s[threadIdx.x] = (float)threadIdx.x;
  if (with_barrier)
    __syncthreads();
  y[threadIdx.x] = s[N - 1 - threadIdx.x];
}

static void __global__ unwritten_kernel(float *y)
{
  __shared__ float s[N];

  if (threadIdx.x > 0)
    s[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}

static void __global__ shuffle_kernel(float *y, unsigned mask, int step)
{
  if (mask >> threadIdx.x & 1)
    y[threadIdx.x] = __shfl_xor_sync(mask, (float)threadIdx.x, step);
}

static void __global__ missing_lane_kernel(float *y)
{
  if (threadIdx.x == 5)
    return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, (float)threadIdx.x, 1);
}

static void __global__ crossed_kernel(float *y)
{
  float v = 1;

  if (threadIdx.x < 16)
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  else
    v = __shfl_xor_sync(0xffffffffu, v, 2);
  y[threadIdx.x] = v;
}

static void __global__ write_kernel(float *y, int at)
{
  y[at] = 1;
}

static void __global__ shared_bounds_kernel(float *y, int at)
{
  __shared__ float s[N];

  s[at] = 1;
  __syncthreads();
  y[0] = s[at];
}

static void __global__ wide_kernel(float *y, int at)
{
  store_pack(y + at, pack<float, 4>{{1, 2, 3, 4}});
}

/* Element i of a lane, as PTX has it: of A, B and D for m16n8k16. */
template <typename T> static void __global__ product_kernel(float *d, const uint16_t *a, const uint16_t *b, int lanes)
{
  int group = (int)threadIdx.x >> 2, in_group = (int)threadIdx.x % 4;
  uint32_t left[4] = {}, right[2] = {};
  float sum[4];

  if ((int)threadIdx.x >= lanes)
    return;
  for (int i = 0; i < 8; i++) {
    int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);

    left[i / 2] |= (uint32_t)a[row * 16 + column] << (i & 1) * 16;
  }
  for (int i = 0; i < 4; i++) {
    int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);

    right[i / 2] |= (uint32_t)b[row * 8 + group] << (i & 1) * 16;
  }
  for (int i = 0; i < 4; i++)
    sum[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  mma<T>(sum, left, right);
  for (int i = 0; i < 4; i++)
    d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sum[i];
}

int wrong_product(cudaStream_t s, float *d, const uint16_t *a, const uint16_t *b, int is_f16, int half)
{
  return launch(is_f16 ? product_kernel<__half> : product_kernel<__nv_bfloat16>, dim3(1), WARP, s, d, a, b, half ? WARP / 2 : WARP);
}

template <typename... P, typename... A> static int run(void (*kernel)(P...), int threads, cudaStream_t s, A... args)
{
  cudaLaunchConfig_t c = {};

  c.gridDim = dim3(2);
  c.blockDim = dim3((unsigned)threads);
  c.stream = s;
  return cudaLaunchKernelEx(&c, kernel, args...);
}

int wrong_launch(enum wrong what, cudaStream_t s, float *y, int arg)
{
  switch (what) {
  case BARRIER_SKIPPED:
    return run(barrier_skipped_kernel, N, s, y);
  case LEFT_EARLY:
    return run(left_early_kernel, N, s, y);
  case TWO_BARRIERS:
    return run(two_barriers_kernel, N, s, y);
  case REVERSE:
    return run(reverse_kernel, N, s, y, arg);
  case UNWRITTEN:
    return run(unwritten_kernel, N, s, y);
  case SHUFFLE_MASK:
    return run(shuffle_kernel, 32, s, y, (unsigned)arg, 1);
  case SHUFFLE_STEP:
    return run(shuffle_kernel, 32, s, y, 0xffffffffu, arg);
  case MISSING_LANE:
    return run(missing_lane_kernel, 32, s, y);
  case CROSSED:
    return run(crossed_kernel, 32, s, y);
  case WRITE_AT:
    return run(write_kernel, 1, s, y, arg);
  case SHARED_AT:
    return run(shared_bounds_kernel, 1, s, y, arg);
  case WIDE_AT:
    return run(wide_kernel, 1, s, y, arg);
  case TOO_MANY_THREADS:
    return run(write_kernel, 2048, s, y, 0);
  }
  return -1;
}
