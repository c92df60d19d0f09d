/*
 * lowrank_amx.c - low-rank factors on AMX tiles: bf16 products, fp32 sums. See lowrank.h; tiles are amx.h's.
 *
 * A block is 32 rows, two tiles high. Shrinking sums 16 or 32 ranks at a time over the inputs in steps of 32. z stays as good as fp32: it
 * becomes two bf16 numbers, its rounding and what that leaves out, and the left operand of the expansion has both, 16 ranks of each in
 * a tile of 32; the right operand has its 16 ranks twice. From the last rank on z is exactly 0 (0 times an infinite input is not).
 * The expansion goes over 32 outputs at a time, packed with the even ones in one tile and the odd ones in the other: a word of y is
 * a pair of neighbours, so that a shift and a mask turn 32 numbers of y into two vectors that the sums are added to.
 *
 * Callers: lowrank.c. Threads: pure.
 */
#include <string.h>

#include "base/half.h"
#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/lowrank.h"

static int64_t ceil_div(int64_t n, int64_t unit)
{
  return (n + unit - 1) / unit;
}

/* Tiles of down: (ranks / 16, inputs / 32), each 16 pairs of inputs x 16 ranks. */
static size_t down_bytes(int64_t in, int64_t rank)
{
  return (size_t)(ceil_div(rank, 16) * ceil_div(in, 32)) * TILE;
}

/* Tiles of up: (outputs / 32, ranks / 16, 2), each 8 pairs of ranks, twice, x 16 outputs, the even ones and the odd ones. */
static size_t up_bytes(int64_t out, int64_t rank)
{
  return (size_t)(ceil_div(out, 32) * ceil_div(rank, 16) * 2) * TILE;
}

static void pack_down(void *to, const float *down, int64_t in, int64_t rank)
{
  int64_t steps = ceil_div(in, 32);

  memset(to, 0, down_bytes(in, rank));
  for (int64_t r = 0; r < rank; r++)
    for (int64_t i = 0; i < in; i++) {
      uint16_t *tile = (uint16_t *)((char *)to + (r / 16 * steps + i / 32) * TILE);

      tile[i % 32 / 2 * 32 + r % 16 * 2 + i % 2] = f32_to_bf16(down[r * in + i]);
    }
}

static void pack_up(void *to, const float *up, int64_t out, int64_t rank)
{
  int64_t steps = ceil_div(rank, 16);

  memset(to, 0, up_bytes(out, rank));
  for (int64_t o = 0; o < out; o++)
    for (int64_t r = 0; r < rank; r++) {
      uint16_t *tile = (uint16_t *)((char *)to + ((o / 32 * steps + r / 16) * 2 + o % 2) * TILE);
      uint16_t *at = tile + r % 16 / 2 * 32 + o % 32 / 2 * 2 + r % 2;

      at[0] = at[8 * 32] = f32_to_bf16(up[o * rank + r]);
    }
}

/* Work memory of one thread: four tiles of sums; z (LOWRANK_ROWS, z_width), 16 numbers and their 16 rests after another; and rows of x
 * where they must be padded. */
struct work {
  float *sum;
  char *z, *x;
};

static int64_t z_stride(const struct lowrank *l) /* in bytes */
{
  return l->z_width * 4;
}

static size_t work_bytes(const struct lowrank *l)
{
  return 4 * TILE + (size_t)(LOWRANK_ROWS * (z_stride(l) + (l->is_linear ? ceil_div(l->in, 32) * 64 : 0)));
}

/* sum = 32 rows of x times two tiles of ranks (one of them when `pair` is 0), as four tiles: rows outermost. */
AMX static inline void shrink_tiles(float *sum, const char *x, int64_t ldx, const char *down, int64_t steps, int pair)
{
  const char *down1 = down + steps * TILE;

  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k++) {
    _tile_loadd(4, x + k * 64, ldx);
    _tile_loadd(6, down + k * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x + 16 * ldx + k * 64, ldx);
    _tile_dpbf16ps(2, 5, 6);
    if (pair) {
      _tile_loadd(7, down1 + k * TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sum, 64);
  _tile_stored(1, sum + TILE_F, 64);
  _tile_stored(2, sum + 2 * TILE_F, 64);
  _tile_stored(3, sum + 3 * TILE_F, 64);
  FENCE();
}

/* 16 numbers of z as 16 bf16 numbers and the 16 that remain. An infinite one leaves nothing. */
AMX static inline void split(char *to, __m512 z)
{
  __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(z)), 16);
  __m512 rest = _mm512_sub_ps(z, _mm512_castsi512_ps(high));

  rest = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
  _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(rest, z));
}

/* Ranks r to r + 15 that are there. */
static inline __mmask16 ranks(const struct lowrank *l, int64_t r)
{
  return (__mmask16)(l->rank - r >= 16 ? 0xffff : (1u << (l->rank - r)) - 1);
}

/* z of the 32 rows at x. */
AMX static void shrink(const struct lowrank *l, const struct work *w, const char *x, int64_t ldx)
{
  int64_t steps = ceil_div(l->in, 32), ldz = z_stride(l);

  for (int64_t r = 0; r < l->rank; r += 32) {
    int pair = l->rank - r > 16;

    shrink_tiles(w->sum, x, ldx, (const char *)l->down + r / 16 * steps * TILE, steps, pair);
    for (int i = 0; i < LOWRANK_ROWS; i++) {
      const float *s = w->sum + i / 16 * 2 * TILE_F + i % 16 * 16;
      char *z = w->z + i * ldz + r * 4;

      split(z, _mm512_maskz_load_ps(ranks(l, r), s));
      if (pair)
        split(z + 64, _mm512_maskz_load_ps(ranks(l, r + 16), s + TILE_F));
    }
  }
}

/* z of n rows that a convolution has shrunk; the others are 0. */
AMX static void take(const struct lowrank *l, const struct work *w, const float *from, int64_t n)
{
  int64_t ldz = z_stride(l);

  for (int64_t i = 0; i < LOWRANK_ROWS; i++)
    for (int64_t r = 0; r < l->rank; r += 16)
      split(w->z + i * ldz + r * 4, _mm512_maskz_loadu_ps(i < n ? ranks(l, r) : 0, from + i * l->z_width + r));
}

/* sum = 32 rows of z times 32 outputs, as four tiles: rows outermost, then even and odd outputs. */
AMX static inline void expand_tiles(float *sum, const char *z, int64_t ldz, const char *up, int64_t steps, int z_is_loaded)
{
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k++, up += 2 * TILE) {
    if (!z_is_loaded) {
      _tile_loadd(4, z + k * 64, ldz);
      _tile_loadd(5, z + 16 * ldz + k * 64, ldz);
    }
    _tile_loadd(6, up, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, up + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sum, 64);
  _tile_stored(1, sum + TILE_F, 64);
  _tile_stored(2, sum + 2 * TILE_F, 64);
  _tile_stored(3, sum + 3 * TILE_F, 64);
  FENCE();
}

/* y (n rows, the columns of the mask) += sum, bf16. */
AMX static inline void raise_bf16(char *y, int64_t ldy, const float *sum, int64_t n, __mmask32 mask)
{
  const __m512i high = _mm512_set1_epi32((int)0xffff0000u);
  /* What the conversion gives as 16 even and 16 odd numbers, interleaved. */
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                                         19, 3, 18, 2, 17, 1, 16, 0);

  for (int64_t i = 0; i < n; i++) {
    const float *s = sum + i / 16 * 2 * TILE_F + i % 16 * 16;
    __m512i v = _mm512_maskz_loadu_epi16(mask, y + i * ldy);
    __m512 even = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)), _mm512_load_ps(s));
    __m512 odd = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(v, high)), _mm512_load_ps(s + TILE_F));

    v = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    _mm512_mask_storeu_epi16(y + i * ldy, mask, v);
  }
}

/* The same for a y of fp32. */
AMX static inline void raise_f32(char *y, int64_t ldy, const float *sum, int64_t n, __mmask32 mask)
{
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  __mmask16 lo = (__mmask16)mask, hi = (__mmask16)(mask >> 16);

  for (int64_t i = 0; i < n; i++) {
    const float *s = sum + i / 16 * 2 * TILE_F + i % 16 * 16;
    __m512 even = _mm512_load_ps(s), odd = _mm512_load_ps(s + TILE_F);
    float *to = (float *)(y + i * ldy);

    _mm512_mask_storeu_ps(to, lo, _mm512_add_ps(_mm512_maskz_loadu_ps(lo, to), _mm512_permutex2var_ps(even, first, odd)));
    _mm512_mask_storeu_ps(to + 16, hi,
                          _mm512_add_ps(_mm512_maskz_loadu_ps(hi, to + 16), _mm512_permutex2var_ps(even, second, odd)));
  }
}

/* n rows of y += z up. */
AMX static void expand(const struct lowrank *l, float *sum, char *y, enum dtype y_type, const char *z, int64_t n)
{
  int64_t steps = ceil_div(l->rank, 16), ldz = z_stride(l), size = y_type == DT_BF16 ? 2 : 4, ldy = l->out * size;
  const char *up = l->up;

  if (steps == 1) {
    _tile_loadd(4, z, ldz);
    _tile_loadd(5, z + 16 * ldz, ldz);
  }
  for (int64_t o = 0; o < l->out; o += 32, up += steps * 2 * TILE) {
    __mmask32 mask = l->out - o < 32 ? (1u << (l->out - o)) - 1 : 0xffffffff;

    if (steps == 1)
      expand_tiles(sum, z, ldz, up, 1, 1);
    else
      expand_tiles(sum, z, ldz, up, steps, 0);
    if (y_type == DT_BF16)
      raise_bf16(y + o * size, ldy, sum, n, mask);
    else
      raise_f32(y + o * size, ldy, sum, n, mask);
  }
}

/* Copies n rows of `real` bytes into LOWRANK_ROWS of `padded`, with zeros behind each and behind the last. */
static void pad_rows(char *to, int64_t padded, const char *from, int64_t real, int64_t n)
{
  for (int64_t i = 0; i < LOWRANK_ROWS; i++, to += padded) {
    int64_t there = i < n ? real : 0;

    if (there)
      memcpy(to, from + i * real, (size_t)there);
    memset(to + there, 0, (size_t)(padded - there));
  }
}

AMX static void run(const struct lowrank_rows *r, int64_t from, int64_t to, void *work)
{
  const struct lowrank *l = r->l;
  struct work w = {work, (char *)work + 4 * TILE, (char *)work + 4 * TILE + LOWRANK_ROWS * z_stride(l)};
  struct tile_config before;

  tiles_begin(&before);
  for (int64_t b = from; b < to; b++) {
    int64_t at = b * LOWRANK_ROWS, n = r->rows - at < LOWRANK_ROWS ? r->rows - at : LOWRANK_ROWS;
    int64_t in_bytes = l->in * 2, ldx = ceil_div(l->in, 32) * 64;

    if (l->is_linear) {
      const char *x = r->x + at * in_bytes;

      if (n < LOWRANK_ROWS || in_bytes != ldx) { /* tiles would read beyond a row, or beyond the picture */
        pad_rows(w.x, ldx, x, in_bytes, n);
        x = w.x;
      }
      FENCE();
      shrink(l, &w, x, ldx);
    } else {
      take(l, &w, r->z + at * l->z_width, n);
    }
    FENCE();
    expand(l, w.sum, r->y + at * l->out * (int64_t)dtype_size(r->y_type), r->y_type, w.z, n);
  }
  tiles_end(&before);
}

const struct lowrank_kernel lowrank_amx = {
  .down_bytes = down_bytes,
  .up_bytes = up_bytes,
  .pack_down = pack_down,
  .pack_up = pack_up,
  .work_bytes = work_bytes,
  .run = run,
};
