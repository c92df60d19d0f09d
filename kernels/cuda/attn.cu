/*
 * attn.cu - attention that cuDNN's operation does not take: causal (CLIP: 77 tokens, heads of 64), and head sizes that are no multiple of 8.
 * Keys and values come from a table, so that every picture may have its own count of them. See kernels.h.
 *
 * A block takes a few queries of one head of one picture and walks over the keys in tiles that it holds in shared memory. A warp computes
 * the scores of one query, one lane a key, keeps the running maximum and sum of the softmax, and adds up the output, one lane every
 * 32nd element. Everything is fp32 after the load; the order of all sums follows from T alone.
 *
 * Roofline: CLIP-L is 2*77*77/2*64*12 multiply-adds a layer, 9 MFLOP: the launch dominates, once a request. Share reached: not yet measured.
 */
#include "kernels/cuda/device.cuh"

enum { WARPS = 4, THREADS = WARPS * WARP };

/* MAXK: room for a head; KEYS: tile, at most a warp; EACH: queries of a warp. */
template <typename T, int MAXK, int KEYS, int EACH>
static __global__ void __launch_bounds__(THREADS, MAXK > 160 ? 1 : 4)
    attention_kernel(T *o, const T *q, kern_kv_rows kv, int64_t tokens, int heads, int K, float scale, int causal)
{
  enum { PAD = 2, DIMS = (MAXK + WARP - 1) / WARP, QUERIES = WARPS * EACH };
  __shared__ float qs[QUERIES][MAXK];
  __shared__ T ks[KEYS][MAXK + PAD], vs[KEYS][MAXK + PAD]; /* padded: lanes read down a column */
  int b = (int)(blockIdx.z), head = (int)blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const kern_kv from = row_of(kv, b);
  int64_t D = (int64_t)heads * K, t0 = (int64_t)blockIdx.x * QUERIES, keys = from.T;
  const T *k = (const T *)from.k + head * K, *v = (const T *)from.v + head * K;
  float acc[EACH][DIMS], top[EACH], sum[EACH];

  q += (int64_t)b * tokens * D + head * K;
  o += (int64_t)b * tokens * D + head * K;
  for (int i = threadIdx.x; i < QUERIES * K; i += THREADS)
    if (t0 + i / K < tokens)
      qs[i / K][i % K] = to_f32(q[(t0 + i / K) * D + i % K]);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    top[e] = -INFINITY;
    sum[e] = 0;
#pragma unroll
    for (int d = 0; d < DIMS; d++)
      acc[e][d] = 0;
  }
  for (int64_t j0 = 0; j0 < keys; j0 += KEYS) {
    int n = keys - j0 < KEYS ? (int)(keys - j0) : KEYS;

    __syncthreads(); /* nobody reads the tile before any more; at first, the queries are there */
    for (int i = threadIdx.x; i < n * K; i += THREADS) {
      ks[i / K][i % K] = k[(j0 + i / K) * D + i % K];
      vs[i / K][i % K] = v[(j0 + i / K) * D + i % K];
    }
    __syncthreads();
#pragma unroll
  for (int e = 0; e < EACH; e++) {
      int mine = warp * EACH + e;
      int64_t t = t0 + mine;
      int seen = causal && t + 1 - j0 < n ? (int)(t + 1 - j0) : n;
      float score = -INFINITY;

      if (t >= tokens || seen <= 0)
        continue; /* the whole warp */
      if (lane < seen) {
        score = 0;
        for (int d = 0; d < K; d++)
          score += qs[mine][d] * to_f32(ks[lane][d]);
        score *= scale;
      }
      float best = fmaxf(top[e], warp_max(score)), keep = expf(top[e] - best), p = lane < seen ? expf(score - best) : 0.0f;
      sum[e] = sum[e] * keep + warp_sum(p);
      top[e] = best;
#pragma unroll
      for (int d = 0; d < DIMS; d++)
        acc[e][d] *= keep;
      for (int j = 0; j < seen; j++) {
        float pj = __shfl_sync(ALL_LANES, p, j);

#pragma unroll
        for (int d = 0; d < DIMS; d++)
          if (d * WARP + lane < K)
            acc[e][d] += pj * to_f32(vs[j][d * WARP + lane]);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    int64_t t = t0 + warp * EACH + e;

#pragma unroll
    for (int d = 0; d < DIMS; d++)
      if (t < tokens && d * WARP + lane < K)
        from_f32(&o[t * D + d * WARP + lane], acc[e][d] / sum[e]);
  }
}

template <typename T>
static int attention_any(cudaStream_t s, T *o, const T *q, const kern_kv_rows *kv, int64_t B, int64_t tokens, int heads, int K, float scale, int causal)
{
  enum { FEW = WARPS, MANY = WARPS * 4 };
  dim3 many((unsigned)div_up(tokens, MANY), (unsigned)heads, (unsigned)B), few((unsigned)div_up(tokens, FEW), (unsigned)heads, (unsigned)B);

  if (K <= 64)
    return launch(attention_kernel<T, 64, 32, 4>, many, THREADS, s, o, q, *kv, tokens, heads, K, scale, causal);
  if (K <= 160)
    return launch(attention_kernel<T, 160, 32, 4>, many, THREADS, s, o, q, *kv, tokens, heads, K, scale, causal);
  if (K <= KERN_MAX_HEAD)
    return launch(attention_kernel<T, KERN_MAX_HEAD, 16, 1>, few, THREADS, s, o, q, *kv, tokens, heads, K, scale, causal);
  return cudaErrorInvalidValue;
}

int kern_attention(cudaStream_t s, int act, void *o, const void *q, const struct kern_kv_rows *kv, int64_t B, int64_t T, int heads, int64_t K,
                   float scale, int causal)
{
  if (act == KERN_F16)
    return attention_any(s, (__half *)o, (const __half *)q, kv, B, T, heads, (int)K, scale, causal);
  return attention_any(s, (__nv_bfloat16 *)o, (const __nv_bfloat16 *)q, kv, B, T, heads, (int)K, scale, causal);
}
