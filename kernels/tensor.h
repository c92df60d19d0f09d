/*
 * tensor.h - the view that models and kernels exchange: where numbers are, how many, of what type.
 *
 * Dims are single letters everywhere: B batch, C channels, H W, T tokens, D width, N heads, K head dim, R rank.
 * Layout is channels-last: pictures are (B, H, W, C), token sequences (B, T, D). A tensor is a view: it owns nothing, it
 * is passed by value, and only the backend that owns the memory may follow `p`.
 *
 * Threads: only the thread that owns the device touches what `p` points to.
 */
#ifndef SAFELIGHT_KERNELS_TENSOR_H
#define SAFELIGHT_KERNELS_TENSOR_H

#include <stddef.h>
#include <stdint.h>

enum dtype { DT_F32, DT_F16, DT_BF16, DT_I32, DT_U8 };

struct tensor {
  void *p;          /* first element; NULL marks an absent optional operand, and every tensor of a dry run */
  int64_t d[4];     /* (B, H, W, C); a sequence is (B, 1, T, D); a matrix (1, 1, rows, D); always four, all >= 1 */
  enum dtype type;
};

static inline size_t dtype_size(enum dtype t)
{
  return t == DT_U8 ? 1 : t == DT_F16 || t == DT_BF16 ? 2 : 4;
}

/* Elements in all. */
static inline int64_t tensor_count(struct tensor t)
{
  return t.d[0] * t.d[1] * t.d[2] * t.d[3];
}

/* Rows of the last dimension: B*H*W of a picture, B*T of a sequence. */
static inline int64_t tensor_rows(struct tensor t)
{
  return t.d[0] * t.d[1] * t.d[2];
}

static inline size_t tensor_bytes(struct tensor t)
{
  return (size_t)tensor_count(t) * dtype_size(t.type);
}

/* The same numbers seen with other dims; the count must stay the same. */
static inline struct tensor tensor_view(struct tensor t, int64_t b, int64_t h, int64_t w, int64_t c)
{
  return (struct tensor){t.p, {b, h, w, c}, t.type};
}

/* n consecutive entries of the first dimension, from index i on. */
static inline struct tensor tensor_batch(struct tensor t, int64_t i, int64_t n)
{
  size_t each = tensor_bytes(t) / (size_t)t.d[0];

  return (struct tensor){t.p ? (char *)t.p + (size_t)i * each : NULL, {n, t.d[1], t.d[2], t.d[3]}, t.type};
}

static inline struct tensor tensor_none(void)
{
  return (struct tensor){NULL, {0, 0, 0, 0}, DT_F32};
}

#endif
