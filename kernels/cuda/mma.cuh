/*
 * mma.cuh - a product on the tensor cores: D (16, 8) += A (16, 16) B (16, 8), elements of 16 bits, sums in fp32. The one place with inline assembly.
 *
 * A warp has the matrices in the registers of its lanes, two neighbours along K in each, the first in the low half. With g = lane / 4, q = lane % 4:
 *
 *   a[0] A[g][2q, 2q+1]     a[1] A[g+8][2q, 2q+1]     a[2] A[g][2q+8, 2q+9]     a[3] A[g+8][2q+8, 2q+9]
 *   b[0] B[2q, 2q+1][g]     b[1] B[2q+8, 2q+9][g]     d[0, 1] D[g][2q, 2q+1]    d[2, 3] D[g+8][2q, 2q+1]
 *
 * (PTX, mma.sync.m16n8k16: sm_80 and all that came after.) K may be in any order, the same one in A and B. A row of D depends on that row of A alone,
 * whatever the others hold. All lanes of a warp call together: volatile, lest the compiler moves it to where only some of them use D. In the
 * simulator the same layout as loops; test_sim.c holds it to a plain product.
 *
 * Included by .cu files. Threads: a warp.
 */
#ifndef SAFELIGHT_KERNELS_CUDA_MMA_H
#define SAFELIGHT_KERNELS_CUDA_MMA_H

#include "kernels/cuda/device.cuh"

#ifdef __CUDACC__

/* T: of the elements of A and B. */
template <typename T> static __device__ __forceinline__ void mma(float d[4], const uint32_t a[4], const uint32_t b[2]);

template <> __device__ __forceinline__ void mma<__half>(float d[4], const uint32_t a[4], const uint32_t b[2])
{
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <> __device__ __forceinline__ void mma<__nv_bfloat16>(float d[4], const uint32_t a[4], const uint32_t b[2])
{
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

template <typename T> static inline float mma_element(uint32_t pair, int second)
{
  uint16_t bits = (uint16_t)(pair >> 16 * second);
  T v;

  memcpy(&v, &bits, sizeof v);
  return to_f32(v);
}

template <typename T> static inline void mma(float d[4], const uint32_t a[4], const uint32_t b[2])
{
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const uint32_t(*lane)[CUDASIM_POSTED] = cudasim_post(mine, 6, __FILE__, __LINE__);
  int g = threadIdx.x % WARP / 4, q = threadIdx.x % WARP % 4;

  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) {
      int row = g + i / 2 * 8, column = 2 * q + i % 2, from = k % 8 / 2;

      d[i] += mma_element<T>(lane[row % 8 * 4 + from][row / 8 + k / 8 * 2], k % 2) * mma_element<T>(lane[column * 4 + from][4 + k / 8], k % 2);
    }
  __syncwarp(); /* before anybody posts again */
}

#endif

#endif
