/*
 * pointwise.cu - activations, GEGLU and sums, element by element. See kernels.h.
 *
 * Each thread takes 8 neighbouring elements (16 bytes) where the shape allows, one where it does not. Roofline: bytes at the copy peak, 4 a
 * result for kern_act, 6 for kern_add and kern_geglu; the arithmetic (about 20 operations for erf) hides behind it.
 * Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { THREADS = 256 };

template <typename T, int V, int KIND> static __global__ void __launch_bounds__(THREADS) act_kernel(T *y, const T *x, int64_t n)
{
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;

  if (i >= n)
    return;
  pack<T, V> p = load_pack<T, V>(x + i);
  for (int j = 0; j < V; j++) {
    float v = to_f32(p.v[j]);

    from_f32(&p.v[j], KIND == KERN_SILU ? silu(v) : KIND == KERN_GELU ? gelu(v) : quick_gelu(v));
  }
  store_pack(y + i, p);
}

template <typename T, int V> static __global__ void __launch_bounds__(THREADS) add_kernel(T *y, const T *a, const T *b, int64_t n)
{
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;

  if (i >= n)
    return;
  pack<T, V> p = load_pack<T, V>(a + i), q = load_pack<T, V>(b + i);
  for (int j = 0; j < V; j++)
    from_f32(&p.v[j], to_f32(p.v[j]) + to_f32(q.v[j]));
  store_pack(y + i, p);
}

template <typename T, int V> static __global__ void __launch_bounds__(THREADS) geglu_kernel(T *y, const T *x, int64_t n, int64_t F)
{
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;

  if (i >= n)
    return;
  const T *row = x + i / F * 2 * F + i % F;
  pack<T, V> p = load_pack<T, V>(row), gate = load_pack<T, V>(row + F);
  for (int j = 0; j < V; j++)
    from_f32(&p.v[j], to_f32(p.v[j]) * gelu(to_f32(gate.v[j])));
  store_pack(y + i, p);
}

template <typename T, int V> static int act_of(cudaStream_t s, T *y, const T *x, int64_t n, int kind)
{
  dim3 grid((unsigned)div_up(n, THREADS * V));

  if (kind == KERN_SILU)
    return launch(act_kernel<T, V, KERN_SILU>, grid, THREADS, s, y, x, n);
  if (kind == KERN_GELU)
    return launch(act_kernel<T, V, KERN_GELU>, grid, THREADS, s, y, x, n);
  return launch(act_kernel<T, V, KERN_QUICK_GELU>, grid, THREADS, s, y, x, n);
}

template <typename T> static int act_any(cudaStream_t s, T *y, const T *x, int64_t n, int kind)
{
  return is_wide(y, x, NULL, n, 0) ? act_of<T, 8>(s, y, x, n, kind) : act_of<T, 1>(s, y, x, n, kind);
}

int kern_act(cudaStream_t s, int act, void *y, const void *x, int64_t n, int kind)
{
  return act == KERN_F16 ? act_any(s, (__half *)y, (const __half *)x, n, kind)
                         : act_any(s, (__nv_bfloat16 *)y, (const __nv_bfloat16 *)x, n, kind);
}

template <typename T> static int add_any(cudaStream_t s, T *y, const T *a, const T *b, int64_t n)
{
  if (is_wide(y, a, b, n, 0))
    return launch(add_kernel<T, 8>, dim3((unsigned)div_up(n, THREADS * 8)), THREADS, s, y, a, b, n);
  return launch(add_kernel<T, 1>, dim3((unsigned)div_up(n, THREADS)), THREADS, s, y, a, b, n);
}

int kern_add(cudaStream_t s, int act, void *y, const void *a, const void *b, int64_t n)
{
  return act == KERN_F16 ? add_any(s, (__half *)y, (const __half *)a, (const __half *)b, n)
                         : add_any(s, (__nv_bfloat16 *)y, (const __nv_bfloat16 *)a, (const __nv_bfloat16 *)b, n);
}

template <typename T> static int geglu_any(cudaStream_t s, T *y, const T *x, int64_t n, int64_t F)
{
  if (is_wide(y, x, NULL, F, 0))
    return launch(geglu_kernel<T, 8>, dim3((unsigned)div_up(n, THREADS * 8)), THREADS, s, y, x, n, F);
  return launch(geglu_kernel<T, 1>, dim3((unsigned)div_up(n, THREADS)), THREADS, s, y, x, n, F);
}

int kern_geglu(cudaStream_t s, int act, void *y, const void *x, int64_t rows, int64_t F)
{
  return act == KERN_F16 ? geglu_any(s, (__half *)y, (const __half *)x, rows * F, F)
                         : geglu_any(s, (__nv_bfloat16 *)y, (const __nv_bfloat16 *)x, rows * F, F);
}
