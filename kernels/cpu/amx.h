/*
 * amx.h - the AMX tiles of this thread, for kernels that use them directly (attn_amx.c).
 *
 * All eight tiles are 16 rows of 64 bytes: 16x32 bf16 on the left of a product, 16 pairs of rows x 16 columns of bf16 on
 * its right, 16x16 fp32 sums. The thread's earlier configuration is put back, for oneDNN may remember its own.
 *
 * Threads: the configuration belongs to the calling thread.
 */
#ifndef SAFELIGHT_KERNELS_CPU_AMX_H
#define SAFELIGHT_KERNELS_CPU_AMX_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 1024 /* bytes */, TILE_F = 256 /* fp32 sums */ };

#define AMX __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

/* The compiler does not know that tile loads read memory. */
#define FENCE() __asm__ volatile("" ::: "memory")
/* Nor that a tile configuration is read and written whole. */
#define WHOLE(p) __asm__ volatile("" : : "r"(p) : "memory")

struct tile_config {
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};

AMX static inline void tiles_begin(struct tile_config *before)
{
  struct tile_config config;

  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.colsb[i] = 64;
    config.rows[i] = 16;
  }
  WHOLE(before);
  _tile_storeconfig(before);
  WHOLE(&config);
  _tile_loadconfig(&config);
}

AMX static inline void tiles_end(const struct tile_config *before)
{
  WHOLE(before);
  _tile_loadconfig(before);
}

#endif
