/*
 * attn_vec.c - attention without matrix tiles: fp32 arithmetic on vectors, for activations of either type.
 *
 * Packs keys transposed block by block and values padded, both as fp32, and calls the vector kernel of the machine's
 * instruction set (vec_attn_body.h). Callers: attn.c. Threads: see attn.h.
 */
#include <string.h>

#include "kernels/cpu/attn.h"
#include "kernels/cpu/cpu.h"

static int64_t round_up(int64_t n, int64_t unit)
{
  return (n + unit - 1) / unit * unit;
}

static size_t key_floats(int64_t Tk, int64_t K)
{
  return (size_t)(round_up(Tk, VEC_ATTN_KEYS) * K);
}

static struct attn_sizes sizes(int64_t Tk, int64_t K)
{
  struct attn_sizes s;
  int64_t Kp = round_up(K, 16);

  s.pack_bytes = (key_floats(Tk, round_up(K, 16)) + (size_t)(round_up(Tk, VEC_ATTN_KEYS) * Kp)) * sizeof(float);
  s.work_bytes = (size_t)(VEC_ATTN_QUERIES * (VEC_ATTN_KEYS + Kp + round_up(K, 16))) * sizeof(float);
  s.queries = VEC_ATTN_QUERIES;
  return s;
}

static float *values_of(const void *packed, const struct attn_head *h)
{
  return (float *)(uintptr_t)packed + key_floats(h->Tk, round_up(h->K, 16));
}

static void pack(const struct attn_head *h, void *packed, int part, int parts)
{
  int64_t blocks = round_up(h->Tk, VEC_ATTN_KEYS) / VEC_ATTN_KEYS, Kp = round_up(h->K, 16), from, to;
  size_t size = dtype_size(h->type);

  cpu_split(blocks, 1, part, parts, &from, &to);
  for (int64_t b = from; b < to; b++) {
    float *kt = (float *)packed + b * VEC_ATTN_KEYS * h->K, *v = values_of(packed, h) + b * VEC_ATTN_KEYS * Kp;
    float row[512];

    for (int64_t j = 0; j < VEC_ATTN_KEYS; j++) {
      int64_t t = b * VEC_ATTN_KEYS + j;

      memset(v + j * Kp, 0, (size_t)Kp * sizeof *v);
      if (t < h->Tk)
        h->vec->convert(v + j * Kp, DT_F32, h->v + (size_t)(t * h->stride) * size, h->type, (size_t)h->K);
      for (int64_t k0 = 0; k0 < h->K; k0 += 512) {
        int64_t n = h->K - k0 < 512 ? h->K - k0 : 512;

        memset(row, 0, sizeof row);
        if (t < h->Tk)
          h->vec->convert(row, DT_F32, h->k + (size_t)(t * h->stride + k0) * size, h->type, (size_t)n);
        for (int64_t k = 0; k < n; k++)
          kt[(k0 + k) * VEC_ATTN_KEYS + j] = row[k];
      }
    }
  }
}

static void run(const struct attn_head *h, const void *packed, int64_t t0, int64_t t1, void *work)
{
  int64_t Kp = round_up(h->K, 16);
  struct vec_attn a = {packed, values_of(packed, h), h->Tk, round_up(h->Tk, VEC_ATTN_KEYS), h->K, Kp, h->scale, h->causal};
  float *q = (float *)work + VEC_ATTN_QUERIES * (VEC_ATTN_KEYS + Kp);
  size_t size = dtype_size(h->type);

  for (int64_t t = t0; t < t1; t += VEC_ATTN_QUERIES) {
    int n = t1 - t < VEC_ATTN_QUERIES ? (int)(t1 - t) : VEC_ATTN_QUERIES;

    memset(q, 0, (size_t)(VEC_ATTN_QUERIES * h->K) * sizeof *q);
    for (int i = 0; i < n; i++)
      h->vec->convert(q + i * h->K, DT_F32, h->q + (size_t)((t + i) * h->stride) * size, h->type, (size_t)h->K);
    h->vec->attention(&a, h->o + (size_t)(t * h->stride) * size, h->type, h->stride, q, n, t, work);
  }
}

const struct attn_kernel attn_vec = {sizes, pack, run};
