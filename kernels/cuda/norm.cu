/*
 * norm.cu - group norm with the time embedding before and SiLU behind it, and layer norm. See kernels.h.
 *
 * Group norm, two kernels. stats: a block reads a stretch of pixels of one picture with all channels, 16 bytes a thread, and leaves mean and sum
 * of squared deviations of each group of that stretch. apply: every block first merges the stretches of its picture, in order, then
 * normalises its part. Sums are taken of x - (first pixel of the stretch) for each channel and merged by Chan's formula, so that a mean far
 * from zero costs no digits. The count of stretches follows from the size of one picture alone: bits do not depend on the batch.
 * Adding temb[c] moves a channel's mean and nothing else.
 *
 * Layer norm: a warp takes a row; mean, then squared deviations, then the result, the second and third reading out of the first-level cache.
 *
 * Roofline: group norm reads twice and writes once, 6 bytes an element at the copy peak (the second reading hits L2 up to some 40 MB), 8
 * operations an element; layer norm reads and writes once, 4 bytes. Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256, WARPS = THREADS / WARP, MOST_STRETCHES = 64, LEAST_PIXELS = 16, APPLY = 4 };

struct moments { /* of n numbers */
  float n, mean, m2;
};

/* Chan, Golub, LeVeque 1979. */
static __device__ __forceinline__ moments merge(moments a, moments b)
{
  float n = a.n + b.n, share = n > 0 ? b.n / n : 0, d = b.mean - a.mean;

  return {n, a.mean + d * share, a.m2 + b.m2 + d * d * a.n * share};
}

static __device__ __forceinline__ moments warp_merge(moments a)
{
  for (int step = WARP / 2; step > 0; step /= 2) {
    moments b = {__shfl_xor_sync(ALL_LANES, a.n, step), __shfl_xor_sync(ALL_LANES, a.mean, step), __shfl_xor_sync(ALL_LANES, a.m2, step)};

    a = merge(a, b);
  }
  return a; /* of lane 0: the same order every time */
}

static int64_t stretch_pixels(int64_t HW)
{
  int64_t pixels = div_up(HW, MOST_STRETCHES);

  return pixels < LEAST_PIXELS ? LEAST_PIXELS : pixels;
}

/* part (B, stretches, groups): mean and squared deviations. */
template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    stats_kernel(float2 *part, const T *x, const T *temb, int64_t HW, int C, int groups, int64_t pixels)
{
  __shared__ float s1[KERN_MAX_CHANNELS], s2[KERN_MAX_CHANNELS]; /* (lanes, C) sums of x - shift and of its square */
  int vecs = C / V, lanes = vecs < THREADS ? THREADS / vecs : 1, n = C / groups;
  int64_t b = blockIdx.y, first = blockIdx.x * pixels, count = HW - first < pixels ? HW - first : pixels;
  const T *from = x + (b * HW + first) * C;

  for (int item = threadIdx.x; item < vecs * lanes; item += THREADS) {
    int lane = item / vecs, c = item % vecs * V;
    pack<T, V> shift = load_pack<T, V>(from + c);
    float a1[V], a2[V];

    for (int j = 0; j < V; j++)
      a1[j] = a2[j] = 0;
    for (int64_t p = lane; p < count; p += lanes) {
      pack<T, V> v = load_pack<T, V>(from + p * C + c);

      for (int j = 0; j < V; j++) {
        float d = to_f32(v.v[j]) - to_f32(shift.v[j]);

        a1[j] += d;
        a2[j] += d * d;
      }
    }
    for (int j = 0; j < V; j++) {
      s1[lane * C + c + j] = a1[j];
      s2[lane * C + c + j] = a2[j];
    }
  }
  __syncthreads();
  for (int g = threadIdx.x / WARP; g < groups; g += WARPS) {
    moments all = {0, 0, 0};

    for (int c = g * n + threadIdx.x % WARP; c < (g + 1) * n; c += WARP) {
      float a1 = 0, a2 = 0;

      for (int lane = 0; lane < lanes; lane++) {
        a1 += s1[lane * C + c];
        a2 += s2[lane * C + c];
      }
      float off = a1 / (float)count, mean = to_f32(from[c]) + off + (temb ? to_f32(temb[b * C + c]) : 0.0f);
      all = merge(all, moments{(float)count, mean, a2 - a1 * off});
    }
    all = warp_merge(all);
    if (threadIdx.x % WARP == 0)
      part[(b * gridDim.x + blockIdx.x) * groups + g] = make_float2(all.mean, all.m2);
  }
}

template <typename T, int V, bool SILU>
static __global__ void __launch_bounds__(THREADS)
    apply_kernel(T *y, const T *x, const T *temb, const float *gamma, const float *beta, const float2 *part, int64_t HW, int C, int groups,
                 float eps, int64_t pixels, int stretches)
{
  __shared__ float mean[KERN_MAX_GROUPS], scale[KERN_MAX_GROUPS];
  int n = C / groups;
  int64_t b = blockIdx.y, total = HW * C;

  for (int g = threadIdx.x; g < groups; g += THREADS) {
    moments all = {0, 0, 0};

    for (int i = 0; i < stretches; i++) {
      float2 p = part[(b * stretches + i) * groups + g];
      int64_t left = HW - i * pixels;

      all = merge(all, moments{(float)((left < pixels ? left : pixels) * n), p.x, p.y});
    }
    mean[g] = all.mean;
    scale[g] = 1.0f / sqrtf(all.m2 / (float)(HW * n) + eps);
  }
  __syncthreads();
  for (int k = 0; k < APPLY; k++) {
    int64_t i = (((int64_t)blockIdx.x * APPLY + k) * THREADS + threadIdx.x) * V;

    if (i >= total)
      return;
    int c = (int)(i % C);
    pack<T, V> p = load_pack<T, V>(x + b * total + i);
    for (int j = 0; j < V; j++) {
      int g = (c + j) / n;
      float v = to_f32(p.v[j]) + (temb ? to_f32(temb[b * C + c + j]) : 0.0f);

      v = gamma[c + j] * ((v - mean[g]) * scale[g]) + beta[c + j];
      from_f32(&p.v[j], SILU ? silu(v) : v);
    }
    store_pack(y + b * total + i, p);
  }
}

template <typename T, int V>
static int groupnorm_of(cudaStream_t s, T *y, const T *x, const T *temb, const float *gamma, const float *beta, int64_t B, int64_t HW, int C,
                        int groups, float eps, int use_silu, float2 *part)
{
  int64_t pixels = stretch_pixels(HW), stretches = div_up(HW, pixels), blocks = div_up(HW * C, (int64_t)THREADS * V * APPLY);
  dim3 stats_grid((unsigned)stretches, (unsigned)B), apply_grid((unsigned)blocks, (unsigned)B);
  int r = launch(stats_kernel<T, V>, stats_grid, THREADS, s, part, x, temb, HW, C, groups, pixels);

  if (r)
    return r;
  if (use_silu)
    return launch(apply_kernel<T, V, true>, apply_grid, THREADS, s, y, x, temb, gamma, beta, (const float2 *)part, HW, C, groups, eps, pixels,
                  (int)stretches);
  return launch(apply_kernel<T, V, false>, apply_grid, THREADS, s, y, x, temb, gamma, beta, (const float2 *)part, HW, C, groups, eps, pixels,
                (int)stretches);
}

template <typename T>
static int groupnorm_any(cudaStream_t s, T *y, const T *x, const T *temb, const float *gamma, const float *beta, int64_t B, int64_t HW, int64_t C,
                         int groups, float eps, int use_silu, void *work)
{
  if (C > KERN_MAX_CHANNELS || groups > KERN_MAX_GROUPS)
    return cudaErrorInvalidValue;
  if (is_wide(y, x, NULL, C, 0))
    return groupnorm_of<T, 8>(s, y, x, temb, gamma, beta, B, HW, (int)C, groups, eps, use_silu, (float2 *)work);
  return groupnorm_of<T, 1>(s, y, x, temb, gamma, beta, B, HW, (int)C, groups, eps, use_silu, (float2 *)work);
}

size_t kern_groupnorm_bytes(int64_t B, int64_t HW, int64_t C, int groups)
{
  (void)C;
  return (size_t)(B * div_up(HW, stretch_pixels(HW)) * groups) * sizeof(float2);
}

int kern_groupnorm(cudaStream_t s, int act, void *y, const void *x, const void *temb, const float *gamma, const float *beta, int64_t B,
                   int64_t HW, int64_t C, int groups, float eps, int use_silu, void *work)
{
  if (act == KERN_F16)
    return groupnorm_any(s, (__half *)y, (const __half *)x, (const __half *)temb, gamma, beta, B, HW, C, groups, eps, use_silu, work);
  return groupnorm_any(s, (__nv_bfloat16 *)y, (const __nv_bfloat16 *)x, (const __nv_bfloat16 *)temb, gamma, beta, B, HW, C, groups, eps, use_silu,
                       work);
}

/* ---- layer norm ---- */

template <typename T, int V>
static __global__ void __launch_bounds__(THREADS)
    layernorm_kernel(T *y, const T *x, const float *gamma, const float *beta, int64_t rows, int64_t D, float eps)
{
  int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
  int64_t start = threadIdx.x % WARP * V, step = WARP * V;
  float sum = 0, squares = 0;

  if (row >= rows)
    return; /* a whole warp */
  x += row * D;
  y += row * D;
  for (int64_t i = start; i < D; i += step) {
    pack<T, V> p = load_pack<T, V>(x + i);

    for (int j = 0; j < V; j++)
      sum += to_f32(p.v[j]);
  }
  float mean = warp_sum(sum) / (float)D;
  for (int64_t i = start; i < D; i += step) {
    pack<T, V> p = load_pack<T, V>(x + i);

    for (int j = 0; j < V; j++) {
      float d = to_f32(p.v[j]) - mean;

      squares += d * d;
    }
  }
  float scale = 1.0f / sqrtf(warp_sum(squares) / (float)D + eps);
  for (int64_t i = start; i < D; i += step) {
    pack<T, V> p = load_pack<T, V>(x + i);

    for (int j = 0; j < V; j++)
      from_f32(&p.v[j], gamma[i + j] * ((to_f32(p.v[j]) - mean) * scale) + beta[i + j]);
    store_pack(y + i, p);
  }
}

template <typename T>
static int layernorm_any(cudaStream_t s, T *y, const T *x, const float *gamma, const float *beta, int64_t rows, int64_t D, float eps)
{
  dim3 grid((unsigned)div_up(rows, WARPS));

  if (is_wide(y, x, NULL, D, 0))
    return launch(layernorm_kernel<T, 8>, grid, THREADS, s, y, x, gamma, beta, rows, D, eps);
  return launch(layernorm_kernel<T, 1>, grid, THREADS, s, y, x, gamma, beta, rows, D, eps);
}

int kern_layernorm(cudaStream_t s, int act, void *y, const void *x, const float *gamma, const float *beta, int64_t rows, int64_t D, float eps)
{
  return act == KERN_F16 ? layernorm_any(s, (__half *)y, (const __half *)x, gamma, beta, rows, D, eps)
                         : layernorm_any(s, (__nv_bfloat16 *)y, (const __nv_bfloat16 *)x, gamma, beta, rows, D, eps);
}
