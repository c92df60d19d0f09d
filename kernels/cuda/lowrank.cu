/*
 * lowrank.cu - low-rank adapters at run time: y += up (down x), rows of a batch each with factors of their own. See kernels.h.
 *
 * Segmented shrink and expand (performance notes: docs/performance.md), no tensor cores. shrink: a warp takes 4 pixels and 4 ranks at a time, its
 * lanes walk along the input channels; each element of `down` is read once for 4 pixels. expand: a thread takes one output channel of 8
 * pixels, their shrunk values in shared memory. Both read their row's slot from device memory when they run. Values between the two are
 * fp32 and every sum covers the whole rank, so that y is rounded once.
 *
 * Roofline: x read once and y read and written once for each op, at the copy peak, and 2*R*(in + out) multiply-adds a pixel in fp32 outside of the tensor
 * cores: bound by bytes up to a rank of about 10 on an H200, by arithmetic above. Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { SHRINK_WARPS = 4, SHRINK_THREADS = SHRINK_WARPS * WARP, PIXELS = 4, RANKS = 4, SHRINK_TILE = SHRINK_WARPS * PIXELS };
enum { EXPAND_THREADS = 256, EXPAND_PIXELS = 8, RANK_TILE = 128 };

/* Adds the products of one tap: x at `from` (PIXELS pointers, NULL where the patch hangs over the edge), n channels. */
template <typename T, int V>
static __device__ __forceinline__ void shrink_tap(float acc[PIXELS][RANKS], const T *const from[PIXELS], const T *down, int64_t n, int64_t stride,
                                                  int ranks, int lane)
{
  for (int64_t i = lane * V; i < n; i += WARP * V) {
    pack<T, V> w[RANKS];

    for (int r = 0; r < RANKS; r++)
      if (r < ranks)
        w[r] = load_pack<T, V>(down + r * stride + i);
    for (int p = 0; p < PIXELS; p++) {
      if (!from[p])
        continue;
      pack<T, V> x = load_pack<T, V>(from[p] + i);
      for (int r = 0; r < RANKS; r++)
        for (int j = 0; r < ranks && j < V; j++)
          acc[p][r] += to_f32(x.v[j]) * to_f32(w[r].v[j]);
    }
  }
}

template <typename T, int V>
static __global__ void __launch_bounds__(SHRINK_THREADS)
    shrink_kernel(float *t, const T *x, kern_slot_rows slots, kern_geometry g, int64_t in, int64_t most)
{
  int b = (int)blockIdx.y, lane = threadIdx.x % WARP, taps = g.kh * g.kw;
  int64_t pixels = (int64_t)g.Ho * g.Wo, first = (int64_t)blockIdx.x * SHRINK_TILE + threadIdx.x / WARP * PIXELS, stride = taps * in;
  const kern_slot *slot = row_of(slots, b);
  int rank = slot ? slot->rank : 0;

  x += (int64_t)b * g.H * g.W * in;
  for (int r0 = 0; r0 < rank; r0 += RANKS) {
    int ranks = rank - r0 < RANKS ? rank - r0 : RANKS;
    float acc[PIXELS][RANKS] = {};

    for (int tap = 0; tap < taps; tap++) {
      const T *from[PIXELS];

      for (int p = 0; p < PIXELS; p++) {
        int64_t pixel = first + p, iy = pixel / g.Wo * g.stride - g.pad + tap / g.kw, ix = pixel % g.Wo * g.stride - g.pad + tap % g.kw;

        from[p] = pixel < pixels && iy >= 0 && iy < g.H && ix >= 0 && ix < g.W ? x + (iy * g.W + ix) * in : NULL;
      }
      shrink_tap<T, V>(acc, from, (const T *)slot->down + r0 * stride + tap * in, in, stride, ranks, lane);
    }
    for (int p = 0; p < PIXELS; p++)
      for (int r = 0; r < ranks; r++) {
        float sum = warp_sum(acc[p][r]);

        if (lane == 0 && first + p < pixels)
          t[((int64_t)b * pixels + first + p) * most + r0 + r] = sum;
      }
  }
}

template <typename T, typename Y>
static __global__ void __launch_bounds__(EXPAND_THREADS)
    expand_kernel(Y *y, const float *t, kern_slot_rows slots, int64_t pixels, int64_t out, int64_t most)
{
  __shared__ float ts[EXPAND_PIXELS][RANK_TILE];
  int b = (int)blockIdx.z;
  int64_t first = (int64_t)blockIdx.x * EXPAND_PIXELS, o = (int64_t)blockIdx.y * EXPAND_THREADS + threadIdx.x;
  int n = pixels - first < EXPAND_PIXELS ? (int)(pixels - first) : EXPAND_PIXELS;
  const kern_slot *slot = row_of(slots, b);
  int rank = slot ? slot->rank : 0;
  float acc[EXPAND_PIXELS] = {};

  if (rank == 0)
    return; /* the whole block */
  t += ((int64_t)b * pixels + first) * most;
  y += ((int64_t)b * pixels + first) * out + o;
  for (int r0 = 0; r0 < rank; r0 += RANK_TILE) {
    int ranks = rank - r0 < RANK_TILE ? rank - r0 : RANK_TILE;
    const T *up = (const T *)slot->up + r0 * out + o;

    __syncthreads();
    for (int i = threadIdx.x; i < n * ranks; i += EXPAND_THREADS)
      ts[i / ranks][i % ranks] = t[i / ranks * most + r0 + i % ranks];
    __syncthreads();
    for (int r = 0; r < ranks && o < out; r++) {
      float u = to_f32(up[r * out]);

      for (int p = 0; p < EXPAND_PIXELS; p++)
        if (p < n)
          acc[p] += ts[p][r] * u;
    }
  }
  for (int p = 0; p < EXPAND_PIXELS; p++)
    if (p < n && o < out)
      from_f32(&y[p * out], to_f32(y[p * out]) + acc[p]);
}

template <typename T>
static int shrink_any(cudaStream_t s, float *t, const T *x, const kern_slot_rows *slots, int64_t B, const kern_geometry *g, int64_t in, int64_t most)
{
  dim3 grid((unsigned)div_up((int64_t)g->Ho * g->Wo, SHRINK_TILE), (unsigned)B);

  if (is_wide(x, NULL, NULL, in, 0))
    return launch(shrink_kernel<T, 8>, grid, SHRINK_THREADS, s, t, x, *slots, *g, in, most);
  return launch(shrink_kernel<T, 1>, grid, SHRINK_THREADS, s, t, x, *slots, *g, in, most);
}

int kern_shrink(cudaStream_t s, int act, float *t, const void *x, const struct kern_slot_rows *slots, int64_t B, const struct kern_geometry *g,
                int64_t in, int64_t most)
{
  return act == KERN_F16 ? shrink_any(s, t, (const __half *)x, slots, B, g, in, most)
                         : shrink_any(s, t, (const __nv_bfloat16 *)x, slots, B, g, in, most);
}

int kern_expand(cudaStream_t s, int act, void *y, int y_type, const float *t, const struct kern_slot_rows *slots, int64_t B, int64_t pixels,
                int64_t out, int64_t most)
{
  dim3 grid((unsigned)div_up(pixels, EXPAND_PIXELS), (unsigned)div_up(out, EXPAND_THREADS), (unsigned)B);

  if (act == KERN_F16)
    return y_type == KERN_F32 ? launch(expand_kernel<__half, float>, grid, EXPAND_THREADS, s, (float *)y, t, *slots, pixels, out, most)
                              : launch(expand_kernel<__half, __half>, grid, EXPAND_THREADS, s, (__half *)y, t, *slots, pixels, out, most);
  return y_type == KERN_F32
             ? launch(expand_kernel<__nv_bfloat16, float>, grid, EXPAND_THREADS, s, (float *)y, t, *slots, pixels, out, most)
             : launch(expand_kernel<__nv_bfloat16, __nv_bfloat16>, grid, EXPAND_THREADS, s, (__nv_bfloat16 *)y, t, *slots, pixels, out, most);
}
