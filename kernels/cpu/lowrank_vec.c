/*
 * lowrank_vec.c - low-rank factors in fp32 vectors, for machines without AMX and for fp32 activations. See lowrank.h.
 *
 * Factors are fp32 whatever the activations are: (rank, inputs) and (rank, outputs), rows padded with zeros to whole vectors, the
 * ranks of the first to a multiple of VEC_SHRINK_RANKS. The arithmetic is vec_lowrank_body.h's. Threads: pure.
 */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lowrank.h"

enum { WIDEST = 16 }; /* floats of the widest vector */

static int64_t round_up(int64_t n, int64_t unit)
{
  return (n + unit - 1) / unit * unit;
}

static size_t down_bytes(int64_t in, int64_t rank)
{
  return (size_t)(round_up(rank, VEC_SHRINK_RANKS) * round_up(in, WIDEST)) * sizeof(float);
}

static size_t up_bytes(int64_t out, int64_t rank)
{
  return (size_t)(rank * round_up(out, WIDEST)) * sizeof(float);
}

static void pack_down(void *to, const float *down, int64_t in, int64_t rank)
{
  memset(to, 0, down_bytes(in, rank));
  for (int64_t r = 0; r < rank; r++)
    memcpy((float *)to + r * round_up(in, WIDEST), down + r * in, (size_t)in * sizeof(float));
}

static void pack_up(void *to, const float *up, int64_t out, int64_t rank)
{
  memset(to, 0, up_bytes(out, rank));
  for (int64_t r = 0; r < rank; r++)
    for (int64_t o = 0; o < out; o++)
      ((float *)to)[r * round_up(out, WIDEST) + o] = up[o * rank + r];
}

/* A block of z, and some rows of x as fp32. */
static size_t work_bytes(const struct lowrank *l)
{
  return (size_t)(LOWRANK_ROWS * l->z_width + (l->is_linear ? VEC_SHRINK_ROWS * round_up(l->in, WIDEST) : 0)) * sizeof(float);
}

static void run(const struct lowrank_rows *r, int64_t from, int64_t to, void *work)
{
  const struct lowrank *l = r->l;
  float *own = work;

  for (int64_t b = from; b < to; b++) {
    int64_t at = b * LOWRANK_ROWS, n = r->rows - at < LOWRANK_ROWS ? r->rows - at : LOWRANK_ROWS;
    const float *z = l->is_linear ? own : r->z + at * l->z_width;

    if (l->is_linear)
      r->vec->shrink(own, l->z_width, r->x + (size_t)(at * l->in) * dtype_size(r->type), r->type, n, l->in, l->down, l->rank,
                     own + LOWRANK_ROWS * l->z_width);
    r->vec->expand(r->y + (size_t)(at * l->out) * dtype_size(r->y_type), r->y_type, z, l->z_width, n, l->out, l->up, l->rank);
  }
}

const struct lowrank_kernel lowrank_vec = {
  .down_bytes = down_bytes,
  .up_bytes = up_bytes,
  .pack_down = pack_down,
  .pack_up = pack_up,
  .work_bytes = work_bytes,
  .run = run,
};
