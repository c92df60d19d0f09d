/*
 * latent.cu - what happens to latents and finished pictures: the model's input gathered from them, guidance + sampler step in one pass with
 * coefficients for each row, two latents blended by a mask, 8-bit RGB, and the count of numbers that are not finite. See kernels.h.
 *
 * The sampler step computes in double: a latent of 64x64x4 is 16 thousand numbers, so that the launch costs more than the arithmetic on
 * any card, and the result is rounded once, as be_ref's. A term whose coefficient is 0 is not read.
 * Roofline: bytes at the copy peak; 24 an element for a step with history and noise. Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256 };

template <typename T>
static __global__ void __launch_bounds__(THREADS) gather_kernel(T *y, const float *x, kern_gather_rows rows, int64_t n)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  int b = (int)blockIdx.y;
  const kern_gather g = row_of(rows, b);

  if (i < n)
    from_f32(&y[b * n + i], g.scale * x[g.src * n + i]);
}

int kern_gather_scale(cudaStream_t s, int act, void *y, const float *x, const struct kern_gather_rows *rows, int64_t B, int64_t n)
{
  dim3 grid((unsigned)div_up(n, THREADS), (unsigned)B);

  return act == KERN_F16 ? launch(gather_kernel<__half>, grid, THREADS, s, (__half *)y, x, *rows, n)
                         : launch(gather_kernel<__nv_bfloat16>, grid, THREADS, s, (__nv_bfloat16 *)y, x, *rows, n);
}

static __global__ void __launch_bounds__(THREADS)
    sampler_kernel(float *x, float *old, const float *model, const float *noise, kern_coef_rows coef, int64_t n)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, at = (int64_t)blockIdx.y * n + i;
  const kern_coef k = row_of(coef, blockIdx.y);

  if (i >= n)
    return;
  double c = (double)model[k.row_cond * n + i], e = c;
  if (k.row_uncond != k.row_cond) {
    double u = (double)model[k.row_uncond * n + i];

    e = u + (double)k.guidance * (c - u);
  }
  double x0 = (double)k.x0_x * (double)x[at] + (double)k.x0_e * e;
  double next = (double)k.c_x * (double)x[at] + (double)k.c_x0 * x0;
  if (k.c_old != 0)
    next += (double)k.c_old * (double)old[at];
  if (k.c_noise != 0)
    next += (double)k.c_noise * (double)noise[at];
  x[at] = (float)next;
  old[at] = (float)x0;
}

int kern_sampler_step(cudaStream_t s, float *x, float *old, const float *model, const float *noise, const struct kern_coef_rows *coef, int64_t B,
                      int64_t n)
{
  return launch(sampler_kernel, dim3((unsigned)div_up(n, THREADS), (unsigned)B), THREADS, s, x, old, model, noise, *coef, n);
}

/* A pixel's latent to a thread and channel. In double, rounded once: a product of two fp32 numbers is exact, so that contraction changes nothing. */
static __global__ void __launch_bounds__(THREADS)
    blend_kernel(float *x, const uint8_t *mask, const float *a, const float *b, kern_blend_rows coef, int64_t pixels, int64_t C)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, pixel = (int64_t)blockIdx.y * pixels + i / C, at = (int64_t)blockIdx.y * pixels * C + i;
  const struct kern_blend k = row_of(coef, blockIdx.y);

  if (i >= pixels * C || mask[pixel])
    return;
  double from_a = k.a != 0 ? (double)k.a * (double)a[at] : 0, from_b = k.b != 0 ? (double)k.b * (double)b[at] : 0;

  x[at] = (float)(from_a + from_b);
}

int kern_blend(cudaStream_t s, float *x, const uint8_t *mask, const float *a, const float *b, const struct kern_blend_rows *coef, int64_t B,
               int64_t pixels, int64_t C)
{
  return launch(blend_kernel, dim3((unsigned)div_up(pixels * C, THREADS), (unsigned)B), THREADS, s, x, mask, a, b, *coef, pixels, C);
}

/* In fp32 and ties to even, as be_ref and diffusers do it. Halving is exact, so that contraction to one operation changes nothing. */
template <typename T> static __global__ void __launch_bounds__(THREADS) rgb8_kernel(uint8_t *y, const T *x, int64_t n)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;

  if (i >= n)
    return;
  float v = to_f32(x[i]) * 0.5f + 0.5f;
  v = v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; /* NaN fails both and becomes 0 */
  y[i] = (uint8_t)rintf(v * 255.0f);
}

int kern_to_rgb8(cudaStream_t s, uint8_t *y, const void *x, int type, int64_t n)
{
  dim3 grid((unsigned)div_up(n, THREADS));

  if (type == KERN_F32)
    return launch(rgb8_kernel<float>, grid, THREADS, s, y, (const float *)x, n);
  return type == KERN_F16 ? launch(rgb8_kernel<__half>, grid, THREADS, s, y, (const __half *)x, n)
                          : launch(rgb8_kernel<__nv_bfloat16>, grid, THREADS, s, y, (const __nv_bfloat16 *)x, n);
}

/* Integers may be added in any order: the only atomic of this backend. */
template <typename T> static __global__ void __launch_bounds__(THREADS) nonfinite_kernel(unsigned long long *count, const T *x, int64_t n)
{
  float bad = 0; /* exact: a thread sees far fewer than 2^24 */

  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
    float v = to_f32(x[i]);

    bad += v - v == 0.0f ? 0.0f : 1.0f; /* inf - inf and NaN - NaN are NaN */
  }
  bad = warp_sum(bad);
  if (threadIdx.x % WARP == 0 && bad > 0)
    atomicAdd(count, (unsigned long long)bad);
}

int kern_count_nonfinite(cudaStream_t s, unsigned long long *count, const void *x, int type, int64_t n)
{
  int64_t blocks = div_up(n, THREADS * 8);
  dim3 grid((unsigned)(blocks < 1024 ? blocks : 1024));

  if (type == KERN_F32)
    return launch(nonfinite_kernel<float>, grid, THREADS, s, count, (const float *)x, n);
  return type == KERN_F16 ? launch(nonfinite_kernel<__half>, grid, THREADS, s, count, (const __half *)x, n)
                          : launch(nonfinite_kernel<__nv_bfloat16>, grid, THREADS, s, count, (const __nv_bfloat16 *)x, n);
}
