/*
 * shape.cu - concatenation along channels, nearest upsampling, keys and values put together: 16-bit elements are moved, not looked at. See kernels.h.
 *
 * Each thread writes 16 bytes where the shape allows, one element where it does not. Roofline: bytes read + written at the copy peak (the
 * upsampler's reads are a quarter of its writes). Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256 };

template <int V>
static __global__ void __launch_bounds__(THREADS) concat_kernel(uint16_t *y, const uint16_t *a, const uint16_t *b, int64_t n, int64_t Ca, int64_t Cb)
{
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;

  if (i >= n)
    return;
  int64_t row = i / (Ca + Cb), c = i % (Ca + Cb);
  store_pack(y + i, load_pack<uint16_t, V>(c < Ca ? a + row * Ca + c : b + row * Cb + c - Ca));
}

template <int V>
static __global__ void __launch_bounds__(THREADS) upsample_kernel(uint16_t *y, const uint16_t *x, int64_t n, int64_t Ho, int64_t Wo, int64_t C)
{
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V, H = (Ho + 1) / 2, W = (Wo + 1) / 2;

  if (i >= n)
    return;
  int64_t c = i % C, ox = i / C % Wo, oy = i / (C * Wo) % Ho, b = i / (C * Wo * Ho);
  store_pack(y + i, load_pack<uint16_t, V>(x + ((b * H + oy / 2) * W + ox / 2) * C + c));
}

template <int V>
static __global__ void __launch_bounds__(THREADS) collect_kernel(uint16_t *k, uint16_t *v, kern_kv_rows rows, int64_t n)
{
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V, b = blockIdx.y;
  const kern_kv mine = row_of(rows, b);

  if (i >= n)
    return;
  store_pack(k + b * n + i, load_pack<uint16_t, V>((const uint16_t *)mine.k + i));
  store_pack(v + b * n + i, load_pack<uint16_t, V>((const uint16_t *)mine.v + i));
}

int kern_collect_kv(cudaStream_t s, void *k, void *v, const struct kern_kv_rows *rows, int64_t B, int64_t n, int wide)
{
  if (wide)
    return launch(collect_kernel<8>, dim3((unsigned)div_up(n, THREADS * 8), (unsigned)B), THREADS, s, (uint16_t *)k, (uint16_t *)v, *rows, n);
  return launch(collect_kernel<1>, dim3((unsigned)div_up(n, THREADS), (unsigned)B), THREADS, s, (uint16_t *)k, (uint16_t *)v, *rows, n);
}

int kern_concat(cudaStream_t s, void *y, const void *a, const void *b, int64_t rows, int64_t Ca, int64_t Cb)
{
  int64_t n = rows * (Ca + Cb);

  if (is_wide(y, a, b, Ca, Cb))
    return launch(concat_kernel<8>, dim3((unsigned)div_up(n, THREADS * 8)), THREADS, s, (uint16_t *)y, (const uint16_t *)a, (const uint16_t *)b, n,
                  Ca, Cb);
  return launch(concat_kernel<1>, dim3((unsigned)div_up(n, THREADS)), THREADS, s, (uint16_t *)y, (const uint16_t *)a, (const uint16_t *)b, n, Ca,
                Cb);
}

int kern_upsample2x(cudaStream_t s, void *y, const void *x, int64_t B, int64_t Ho, int64_t Wo, int64_t C)
{
  int64_t n = B * Ho * Wo * C;

  if (is_wide(y, x, NULL, C, 0))
    return launch(upsample_kernel<8>, dim3((unsigned)div_up(n, THREADS * 8)), THREADS, s, (uint16_t *)y, (const uint16_t *)x, n, Ho, Wo, C);
  return launch(upsample_kernel<1>, dim3((unsigned)div_up(n, THREADS)), THREADS, s, (uint16_t *)y, (const uint16_t *)x, n, Ho, Wo, C);
}
