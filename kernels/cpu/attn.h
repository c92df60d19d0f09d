/*
 * attn.h - attention kernels of be_cpu for one block of queries, behind the splitting of attn.c.
 *
 * A kernel packs the keys and values of one head into a buffer once, then works through blocks of queries against it.
 * Threads: pack and run are pure functions of their arguments; each thread brings its own work memory.
 */
#ifndef SAFELIGHT_KERNELS_CPU_ATTN_H
#define SAFELIGHT_KERNELS_CPU_ATTN_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/vec.h"
#include "kernels/tensor.h"

/* One head of one picture. */
struct attn_head {
  const struct vec_ops *vec;
  const char *q, *k, *v;    /* first token's K numbers of this head; type `type` */
  char *o;
  int64_t stride;           /* numbers between tokens, N*K, of all four */
  int64_t Tq, Tk, K;
  enum dtype type;
  float scale;
  int causal;
};

/* Bytes of packed keys and values of a head, and of one thread's work memory; queries per block. */
struct attn_sizes {
  size_t pack_bytes, work_bytes;
  int64_t queries;
};

struct attn_kernel {
  struct attn_sizes (*sizes)(int64_t Tk, int64_t K);
  /* Packs part i of n; the parts together cover the head. */
  void (*pack)(const struct attn_head *h, void *packed, int i, int n);
  /* Queries t0..t1-1, in blocks of `queries` from t0, which is a multiple of it. */
  void (*run)(const struct attn_head *h, const void *packed, int64_t t0, int64_t t1, void *work);
};

extern const struct attn_kernel attn_vec, attn_amx; /* attn_amx: bf16 on machines with AMX */

#endif
