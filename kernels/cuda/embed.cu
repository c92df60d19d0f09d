/*
 * embed.cu - timestep sinusoids and the sum of token and position embeddings. See kernels.h.
 *
 * The sinusoids are computed in double and rounded to fp32 where torch rounds, as be_ref does it: t reaches 999, so that a fast sine of the
 * highest frequencies would be off in the third digit. It is B*D numbers a step; its time is the launch.
 * Roofline of the gather: 2 reads + 1 write of a row for each token, once a request. Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256 };

template <typename T>
static __global__ void __launch_bounds__(THREADS) timestep_kernel(T *y, kern_time_rows rows, int64_t B, int64_t D, int flip, float freq_shift)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, half = D / 2;

  if (i >= B * half)
    return;
  int64_t b = i / half, j = i % half;
  float exponent = __fdiv_rn(__fmul_rn(-9.210340371976184f, (float)j), (float)half - freq_shift); /* ln(10000) */
  float f = (float)exp((double)exponent), angle = __fmul_rn(row_of(rows, b), f);
  float si = (float)sin((double)angle), co = (float)cos((double)angle);

  from_f32(&y[b * D + j], flip ? co : si);
  from_f32(&y[b * D + half + j], flip ? si : co);
}

int kern_timestep(cudaStream_t s, int act, void *y, const struct kern_time_rows *t, int64_t B, int64_t D, int flip, float freq_shift)
{
  dim3 grid((unsigned)div_up(B * (D / 2), THREADS));

  return act == KERN_F16 ? launch(timestep_kernel<__half>, grid, THREADS, s, (__half *)y, *t, B, D, flip, freq_shift)
                         : launch(timestep_kernel<__nv_bfloat16>, grid, THREADS, s, (__nv_bfloat16 *)y, *t, B, D, flip, freq_shift);
}

static __device__ __forceinline__ float element(const void *p, int type, int64_t i)
{
  return type == KERN_F32   ? ((const float *)p)[i]
         : type == KERN_F16 ? to_f32(((const __half *)p)[i])
                            : to_f32(((const __nv_bfloat16 *)p)[i]);
}

/* One block for each token. */
template <typename T>
static __global__ void __launch_bounds__(THREADS)
    embed_kernel(T *y, const int32_t *ids, const void *tokens, int token_type, const void *positions, int position_type, int64_t T_, int64_t D)
{
  int64_t r = blockIdx.x, id = ids[r];

#pragma unroll 1 /* unrolled, it spills on sm_80 */
  for (int64_t i = threadIdx.x; i < D; i += THREADS)
    from_f32(&y[r * D + i], element(tokens, token_type, id * D + i) + element(positions, position_type, r % T_ * D + i));
}

int kern_embed(cudaStream_t s, int act, void *y, const int32_t *ids, const void *tokens, int token_type, const void *positions,
               int position_type, int64_t rows, int64_t T, int64_t D)
{
  dim3 grid((unsigned)rows);

  return act == KERN_F16 ? launch(embed_kernel<__half>, grid, THREADS, s, (__half *)y, ids, tokens, token_type, positions, position_type, T, D)
                         : launch(embed_kernel<__nv_bfloat16>, grid, THREADS, s, (__nv_bfloat16 *)y, ids, tokens, token_type, positions,
                                  position_type, T, D);
}
