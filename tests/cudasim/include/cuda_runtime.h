/*
 * cuda_runtime.h - stands in for CUDA's header of this name: the language of the .cu files as C++17 of a host compiler. A thread of a
 * block is a fiber; a barrier or shuffle gives way to the others. See tests/cudasim/sim.h.
 *
 * Shared memory is static, in a section of its own that the simulator fills with NaN before a block starts; blocks run one after the
 * other. Only clang puts the statics of templates there, so clang it is.
 */
#ifndef SAFELIGHT_TESTS_CUDASIM_CUDA_RUNTIME_H
#define SAFELIGHT_TESTS_CUDASIM_CUDA_RUNTIME_H

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cudasim_shared")))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

struct alignas(8) float2 {
  float x, y;
};

static inline float2 make_float2(float x, float y)
{
  return {x, y};
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void *attrs;
  unsigned numAttrs;
};

/* ---- what the running fiber sees ---- */

struct cudasim_where {
  uint3 thread, block, threads, blocks;
};

enum cudasim_shuffle { CUDASIM_INDEX, CUDASIM_XOR, CUDASIM_DOWN, CUDASIM_WARP };

extern "C" {
extern struct cudasim_where cudasim_here;
void cudasim_barrier(const char *file, int line);
uint32_t cudasim_shuffle(uint32_t mask, uint32_t value, enum cudasim_shuffle kind, int arg, const char *file, int line);
int cudasim_launch(struct cudasim_stream *s, const unsigned blocks[3], const unsigned threads[3], size_t shared, void (*run)(void *), const void *call,
                   size_t bytes);
}

[[maybe_unused]] static constexpr const uint3 &threadIdx = cudasim_here.thread;
[[maybe_unused]] static constexpr const uint3 &blockIdx = cudasim_here.block;
[[maybe_unused]] static constexpr const uint3 &blockDim = cudasim_here.threads;
[[maybe_unused]] static constexpr const uint3 &gridDim = cudasim_here.blocks;

#define __syncthreads() cudasim_barrier(__FILE__, __LINE__)
#define __syncwarp() ((void)cudasim_shuffle(0xffffffffu, 0, CUDASIM_WARP, 0, __FILE__, __LINE__))
#define __shfl_sync(mask, v, lane) cudasim_shuffled((mask), (v), CUDASIM_INDEX, (lane), __FILE__, __LINE__)
#define __shfl_xor_sync(mask, v, lanes) cudasim_shuffled((mask), (v), CUDASIM_XOR, (lanes), __FILE__, __LINE__)
#define __shfl_down_sync(mask, v, lanes) cudasim_shuffled((mask), (v), CUDASIM_DOWN, (lanes), __FILE__, __LINE__)

template <typename V> static inline V cudasim_shuffled(uint32_t mask, V v, enum cudasim_shuffle kind, int arg, const char *file, int line)
{
  static_assert(sizeof(V) == 4, "shuffles move 4 bytes");
  uint32_t bits;

  std::memcpy(&bits, &v, 4);
  bits = cudasim_shuffle(mask, bits, kind, arg, file, line);
  std::memcpy(&v, &bits, 4);
  return v;
}

/* What all lanes of the caller's warp have posted, n registers each. The warp meets here, and has to once more before anybody posts again. */
enum { CUDASIM_POSTED = 8 };
static inline const uint32_t (*cudasim_post(const uint32_t *mine, int n, const char *file, int line))[CUDASIM_POSTED]
{
  static uint32_t board[1024][CUDASIM_POSTED];
  unsigned i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);

  std::memcpy(board[i], mine, (size_t)n * sizeof *mine);
  (void)cudasim_shuffle(0xffffffffu, 0, CUDASIM_WARP, 0, file, line);
  return board + i / 32 * 32;
}

/* Fibers do not run at the same time, and give way only at barriers and shuffles. */
template <typename V> static inline V atomicAdd(V *p, V v)
{
  V before = *p;

  *p = before + v;
  return before;
}

static inline float __fmul_rn(float a, float b)
{
  return a * b;
}

static inline float __fdiv_rn(float a, float b)
{
  return a / b;
}

/* ---- launching ---- */

template <typename... P> struct cudasim_call {
  void (*kernel)(P...);
  std::tuple<std::decay_t<P>...> args;

  static void run(void *p)
  {
    cudasim_call *c = static_cast<cudasim_call *>(p);

    std::apply(c->kernel, c->args);
  }
};

template <typename... P, typename... A> static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...args)
{
  cudasim_call<P...> call = {kernel, std::tuple<std::decay_t<P>...>(std::forward<A>(args)...)};
  const unsigned blocks[3] = {c->gridDim.x, c->gridDim.y, c->gridDim.z}, threads[3] = {c->blockDim.x, c->blockDim.y, c->blockDim.z};

  static_assert(sizeof call <= 4096, "more than 4 kB of kernel parameters");
  return cudasim_launch(c->stream, blocks, threads, c->dynamicSmemBytes, cudasim_call<P...>::run, &call, sizeof call);
}

#endif
