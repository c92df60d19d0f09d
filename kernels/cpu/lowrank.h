/*
 * lowrank.h - the kernels of low-rank factors for one block of rows, behind the splitting of lowrank.c.
 *
 * y += up (down x): a block of x is shrunk to a few numbers per row, which stay in the first-level cache, and the same block of y is
 * raised by their expansion. Nothing of the size of x or y is written but y itself.
 *
 * Threads: run is a pure function of its arguments; each thread brings its own work memory.
 */
#ifndef SAFELIGHT_KERNELS_CPU_LOWRANK_H
#define SAFELIGHT_KERNELS_CPU_LOWRANK_H

#include "kernels/backend.h"
#include "kernels/cpu/vec.h"

enum { LOWRANK_ROWS = 32 /* of a block */, LOWRANK_RANKS = 16 /* what z is padded to */ };

struct lowrank_kernel;

struct lowrank {
  const struct lowrank_kernel *kernel;
  int64_t out, in, rank;
  int kh, kw, stride, pad_lo, pad_hi;
  int is_linear;            /* no kernel, or a 1x1 one of stride 1 without padding */
  void *down;               /* linear: in the packing of `kernel` */
  void *up;
  struct weight *conv;      /* otherwise: down as a convolution with z_width outputs, zeros from rank on */
  int64_t z_width;          /* rank rounded up to LOWRANK_RANKS */
};

/* The rows of one picture. */
struct lowrank_rows {
  const struct vec_ops *vec;
  const struct lowrank *l;
  const char *x;            /* linear: (rows, in) of `type` */
  const float *z;           /* otherwise: (rows, z_width); numbers from rank on may be anything */
  char *y;                  /* (rows, out) of y_type */
  enum dtype type, y_type;
  int64_t rows;
};

struct lowrank_kernel {
  size_t (*down_bytes)(int64_t in, int64_t rank);
  size_t (*up_bytes)(int64_t out, int64_t rank);
  /* From the layout of struct lowrank_desc; all of the memory is written. */
  void (*pack_down)(void *to, const float *down, int64_t in, int64_t rank);
  void (*pack_up)(void *to, const float *up, int64_t out, int64_t rank);
  /* Working memory of one thread, 64-byte aligned. */
  size_t (*work_bytes)(const struct lowrank *l);
  /* Blocks from..to-1. A row's bits depend on that row alone. */
  void (*run)(const struct lowrank_rows *r, int64_t from, int64_t to, void *work);
};

extern const struct lowrank_kernel lowrank_vec, lowrank_amx; /* lowrank_amx: bf16 on machines with AMX */

#endif
