/*
 * convert.cu - one element type as another, and parameters from the checkpoint's layout to ours. See kernels.h.
 *
 * Rounding is to nearest, ties to even. Roofline: bytes in + bytes out at the copy peak; used when weights are loaded and at the ends of
 * a request. Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256 };

/* dst[o][t][i] = src[o][i][t], one block row of i for each (o, t). */
template <typename D, typename S>
static __global__ void __launch_bounds__(THREADS) pack_kernel(D *dst, const S *src, int64_t in, int64_t taps)
{
  int64_t o = blockIdx.y, t = blockIdx.z;

  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < in; i += (int64_t)gridDim.x * THREADS)
    from_f32(&dst[(o * taps + t) * in + i], to_f32(src[(o * in + i) * taps + t]));
}

template <typename D, typename S> static __global__ void __launch_bounds__(THREADS) convert_kernel(D *dst, const S *src, int64_t n)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;

  if (i < n)
    from_f32(&dst[i], to_f32(src[i]));
}

template <typename D, typename S> static int convert_to(cudaStream_t s, D *dst, const void *src, int64_t n)
{
  return launch(convert_kernel<D, S>, dim3((unsigned)div_up(n, THREADS)), THREADS, s, dst, (const S *)src, n);
}

template <typename D> static int convert_from(cudaStream_t s, D *dst, const void *src, int src_type, int64_t n)
{
  switch (src_type) {
  case KERN_F32:
    return convert_to<D, float>(s, dst, src, n);
  case KERN_F16:
    return convert_to<D, __half>(s, dst, src, n);
  case KERN_BF16:
    return convert_to<D, __nv_bfloat16>(s, dst, src, n);
  }
  return cudaErrorInvalidValue;
}

int kern_convert(cudaStream_t s, void *dst, int dst_type, const void *src, int src_type, int64_t n)
{
  switch (dst_type) {
  case KERN_F32:
    return convert_from(s, (float *)dst, src, src_type, n);
  case KERN_F16:
    return convert_from(s, (__half *)dst, src, src_type, n);
  case KERN_BF16:
    return convert_from(s, (__nv_bfloat16 *)dst, src, src_type, n);
  }
  return cudaErrorInvalidValue;
}

/* Outputs go to grid.y, which is at most 65535. */
template <typename D, typename S> static int pack_to(cudaStream_t s, D *dst, const void *src, int64_t out, int64_t in, int64_t taps)
{
  enum { MOST = 65535 };
  int r = 0;

  for (int64_t o = 0; o < out && !r; o += MOST) {
    int64_t n = out - o < MOST ? out - o : MOST;

    r = launch(pack_kernel<D, S>, dim3((unsigned)div_up(in, THREADS), (unsigned)n, (unsigned)taps), THREADS, s, dst + o * in * taps,
               (const S *)src + o * in * taps, in, taps);
  }
  return r;
}

template <typename D> static int pack_from(cudaStream_t s, D *dst, const void *src, int src_type, int64_t out, int64_t in, int64_t taps)
{
  switch (src_type) {
  case KERN_F32:
    return pack_to<D, float>(s, dst, src, out, in, taps);
  case KERN_F16:
    return pack_to<D, __half>(s, dst, src, out, in, taps);
  case KERN_BF16:
    return pack_to<D, __nv_bfloat16>(s, dst, src, out, in, taps);
  }
  return cudaErrorInvalidValue;
}

int kern_pack_conv(cudaStream_t s, void *dst, int act, const void *src, int src_type, int64_t out, int64_t in, int64_t taps)
{
  if (taps == 1)
    return kern_convert(s, dst, act, src, src_type, out * in);
  return act == KERN_F16 ? pack_from(s, (__half *)dst, src, src_type, out, in, taps)
                         : pack_from(s, (__nv_bfloat16 *)dst, src, src_type, out, in, taps);
}
