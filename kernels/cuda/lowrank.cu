/*
 * lowrank.cu - low-rank adapters at run time: y += up (down x), rows of a batch each with factors of their own. See kernels.h.
 *
 * One kernel for both products, on tensor cores. A block takes 16 or 32 pixels of a picture. Its warps take turns at stretches of 32 channels of x
 * and add up their parts of t = down x in shared memory; t never leaves the chip. Then each warp takes 32 columns of y at a time. Operands come
 * straight from memory: the order of K in a product is free, so a lane takes 8 neighbouring channels of x and of `down`, and 4 neighbouring
 * ranks of `up`; so is the order of columns, and a lane has 8 neighbours of y. A convolution's pixels are gathered on the way.
 *
 * t stays as good as fp32: it becomes two bf16 numbers, its rounding and what that leaves out, which is a second product. bf16 because t may be too
 * large for fp16; the fp16 numbers of `up` then are two as well (kern_pack_up), and a third product. Sums cover the whole rank: y is rounded
 * once. From the last rank on t is exactly 0 (0 times an infinite x is not). A block has room for KEPT ranks; above, t is computed again for
 * each 128 columns.
 *
 * Several results of one x (q, k, v) are one launch: their rows are rows of the grid, and x comes from the second-level cache after the first time.
 *
 * A row's bits follow from its own x, y and factors: tiles and splits change which block computes it, never the order of a sum.
 * The slot is read from device memory when the kernel runs.
 *
 * Roofline: 2*P*(in + 2*out) bytes (bf16, P pixels: x read once, y read and written once) for a result alone, the factors besides; 2*P*R*(in + 2*out)
 * operations on tensor cores. With R = 28 that is 28 operations a byte, and an H200 has 180: bound by bytes, and at the small levels of a UNet by
 * the launch. Share reached: not yet measured. SPEED.md has the sum over a step, and what other ways would cost.
 */
#include <type_traits>

#include "kernels/cuda/mma.cuh"

enum { WARPS = 4, THREADS = WARPS * WARP };
enum { HIGH = 16 /* pixels of a product */, STEP = 32 /* channels of two */, RANKS = 32 /* of a walk over x */, KEPT = 128, COLUMNS = 32 /* of a warp */ };
enum { ENOUGH = 128 /* blocks: about one for each multiprocessor of the largest cards */ };

/* MT: how often HIGH pixels. Rows are padded so that lanes of a warp find their words in different banks. */
template <int MT> struct room {
  float part[WARPS][MT * HIGH][RANKS + 8];
  alignas(8) uint32_t t[2][MT * HIGH][KEPT / 2 + 8]; /* pairs of ranks: roundings, rests */
};

/* 8 neighbours, n of them there: zeros for the others, and for all where p is NULL. */
template <bool WIDE> static __device__ __forceinline__ void load_8(uint32_t v[4], const uint16_t *p, int n)
{
  v[0] = v[1] = v[2] = v[3] = 0;
  if (!p || n <= 0)
    return;
  if (WIDE) {
    const pack<uint32_t, 4> w = load_pack<uint32_t, 4>((const uint32_t *)(const void *)p);

    for (int i = 0; i < 4; i++)
      v[i] = w.v[i];
  } else {
    for (int i = 0; i < 8; i++)
      if (i < n)
        v[i / 2] |= (uint32_t)p[i] << i % 2 * 16;
  }
}

/* Where a tap finds the channels of an output pixel; NULL over the edge. */
static __device__ __forceinline__ const uint16_t *tap_of(const uint16_t *x, const kern_geometry &g, int pixel, int tap, int in)
{
  int iy = pixel / g.Wo * g.stride - g.pad + tap / g.kw, ix = pixel % g.Wo * g.stride - g.pad + tap % g.kw;

  return pixel < g.Ho * g.Wo && iy >= 0 && iy < g.H && ix >= 0 && ix < g.W ? x + ((int64_t)iy * g.W + ix) * in : NULL;
}

/* This warp's part of t, of ranks r0 to r0 + RANKS - 1 and the pixels from `first` on. AHEAD: steps whose loads may be under way together. */
template <typename T, int MT, int AHEAD, bool WIDE>
static __device__ __forceinline__ void shrink(float (*part)[RANKS + 8], const uint16_t *x, const kern_slot &slot, const kern_geometry &g, int in, int first,
                                              int r0)
{
  int warp = threadIdx.x / WARP, row = threadIdx.x % WARP / 4, q = threadIdx.x % 4, taps = g.kh * g.kw;
  int tiles = slot.rank - r0 < RANKS ? (slot.rank - r0 + 7) / 8 : RANKS / 8;
  const uint16_t *down = (const uint16_t *)slot.down;
  float acc[MT][RANKS / 8][4] = {};

  for (int tap = 0; tap < taps; tap++) {
    const uint16_t *from[MT][2];

#pragma unroll
    for (int i = 0; i < 2 * MT; i++)
      from[i / 2][i % 2] = tap_of(x, g, first + i * 8 + row, tap, in);
#pragma unroll AHEAD
    for (int k = warp * STEP; k < in; k += WARPS * STEP) {
      int mine = k + q * 8;
      uint32_t a[MT][2][4], b[RANKS / 8][4];

#pragma unroll
      for (int i = 0; i < 2 * MT; i++)
        load_8<WIDE>(a[i / 2][i % 2], from[i / 2][i % 2] ? from[i / 2][i % 2] + mine : NULL, in - mine);
#pragma unroll
      for (int j = 0; j < RANKS / 8; j++) {
        int r = r0 + j * 8 + row;

        if (j < tiles) /* behind the last rank the last one again: nobody reads what comes of it */
          load_8<WIDE>(b[j], down + ((int64_t)(r < slot.rank ? r : slot.rank - 1) * taps + tap) * in + mine, in - mine);
      }
#pragma unroll
      for (int j = 0; j < RANKS / 8; j++)
        if (j < tiles)
#pragma unroll
          for (int i = 0; i < 2 * MT; i++) {
            const uint32_t left[4] = {a[i / 2][0][i % 2 * 2], a[i / 2][1][i % 2 * 2], a[i / 2][0][i % 2 * 2 + 1], a[i / 2][1][i % 2 * 2 + 1]};

            mma<T>(acc[i / 2][j], left, b[j] + i % 2 * 2);
          }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int j = 0; j < RANKS / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        part[m * HIGH + i / 2 * 8 + row][j * 8 + q * 2 + i % 2] = acc[m][j][i];
}

static __device__ __forceinline__ uint32_t bf16_bits(float v)
{
  __nv_bfloat16 b;
  uint16_t bits;

  from_f32(&b, v);
  memcpy(&bits, &b, sizeof bits);
  return bits;
}

static __device__ __forceinline__ float bf16_value(uint32_t bits)
{
  uint32_t word = bits << 16;
  float v;

  memcpy(&v, &word, sizeof v);
  return v;
}

/* What bf16 leaves out of v, as another one. An infinite number leaves nothing. */
static __device__ __forceinline__ uint32_t rest_bits(float v, uint32_t bits)
{
  float rest = v - bf16_value(bits);

  return bf16_bits(fabsf(rest) < INFINITY ? rest : 0);
}

/* t[..][..][at + i]: the parts of all warps together, split in two. Ranks that are not there are 0. */
template <int MT> static __device__ __forceinline__ void keep(room<MT> *s, int at, int ranks)
{
  for (int i = threadIdx.x; i < MT * HIGH * RANKS / 2; i += THREADS) {
    int row = i / (RANKS / 2), r = i % (RANKS / 2) * 2;
    uint32_t high = 0, low = 0;

    for (int e = 0; e < 2; e++)
      if (r + e < ranks) {
        float sum = 0;
        uint32_t bits;

        for (int w = 0; w < WARPS; w++)
          sum += s->part[w][row][r + e];
        bits = bf16_bits(sum);
        high |= bits << 16 * e;
        low |= rest_bits(sum, bits) << 16 * e;
      }
    s->t[0][row][(at + r) / 2] = high;
    s->t[1][row][(at + r) / 2] = low;
  }
}

/* A pair of bf16 numbers, with 0 for an infinite one: times the rest of a number it would be no number. */
static __device__ __forceinline__ uint32_t finite(uint32_t pair)
{
  if ((pair & 0x7f80u) == 0x7f80u)
    pair &= 0xffff0000u;
  if ((pair & 0x7f800000u) == 0x7f800000u)
    pair &= 0x0000ffffu;
  return pair;
}

/* acc += t up for the columns that begin at `column` for lane 0, and `ranks` ranks from r0 on: those that t has. */
template <int MT, bool RESTS>
static __device__ __forceinline__ void expand(float acc[MT][COLUMNS / 8][4], const room<MT> *s, const kern_slot &slot, int out, int column, int r0, int ranks)
{
  int row = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  int64_t width = slot.width;

  for (int r = 0; r < ranks; r += KERN_UP_STEP) {
    uint32_t t[2][MT][4];

#pragma unroll
    for (int i = 0; i < 4 * MT; i++) {
      const pack<uint32_t, 2> v = load_pack<uint32_t, 2>(&s->t[i / (2 * MT)][i % (2 * MT) * 8 + row][r / 2 + q * 2]);

      t[i / (2 * MT)][i % (2 * MT) / 2][i % 2] = v.v[0];
      t[i / (2 * MT)][i % (2 * MT) / 2][i % 2 + 2] = v.v[1];
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) {
      int64_t o = column + row / 2 * 8 + j * 2 + row % 2;
      const uint32_t *up = (const uint32_t *)slot.up + (o * width + r0 + r) / 2 + q * 2;
      pack<uint32_t, 2> b = {}, rest = {};

      if (o < out) {
        b = load_pack<uint32_t, 2>(up);
        if (RESTS)
          rest = load_pack<uint32_t, 2>(up + out * width / 2);
      }
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma<__nv_bfloat16>(acc[m][j], t[0][m], b.v);
        mma<__nv_bfloat16>(acc[m][j], t[1][m], b.v);
        if (RESTS) {
          const uint32_t high[4] = {finite(t[0][m][0]), finite(t[0][m][1]), finite(t[0][m][2]), finite(t[0][m][3])};

          mma<__nv_bfloat16>(acc[m][j], high, rest.v);
        }
      }
    }
  }
}

/* 8 neighbours of y in as few accesses as their alignment allows. */
template <typename Y, bool WIDE> struct eight {
  enum { V = WIDE ? 16 / sizeof(Y) : 1, N = 8 / V };
  pack<Y, V> part[N];

  __device__ __forceinline__ void load(const Y *y, int n)
  {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i * V < n)
        part[i] = load_pack<Y, V>(y + i * V);
  }

  /* Stored with v[j][half + i] added to element 2 * j + i. */
  __device__ __forceinline__ void store_sum(Y *y, int n, const float (*v)[4], int half)
  {
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
      for (int e = 0; e < V; e++)
        from_f32(&part[i].v[e], to_f32(part[i].v[e]) + v[(i * V + e) / 2][half + (i * V + e) % 2]);
      if (i * V < n)
        store_pack(y + i * V, part[i]);
    }
  }
};

/* Of x: how many there are, and which of them the first row of y reads. */
struct pictures {
  int first, count;
  kern_geometry g;
};

/* Where a block works: pixels from `first` on of one picture, all of them in y and x. */
template <typename Y> struct place {
  Y *y;
  const uint16_t *x;
  kern_geometry g;
  int in, out, first;
};

/* t of `ranks` ranks from r0 on, KEPT at most. */
template <typename T, int MT, int AHEAD, bool WIDE, typename Y>
static __device__ __forceinline__ void shrink_all(room<MT> *s, const place<Y> &at, const kern_slot &slot, int r0, int ranks)
{
  for (int r = 0; r < ranks; r += RANKS) {
    shrink<T, MT, AHEAD, WIDE>(s->part[threadIdx.x / WARP], at.x, slot, at.g, at.in, at.first, r0 + r);
    __syncthreads(); /* the parts are there, and nobody reads the t before any more */
    keep<MT>(s, r, ranks - r);
    __syncthreads(); /* t is there, and the parts are free */
  }
}

/* COLUMNS columns of y, from `column` on for the whole warp. more(acc) adds what there is to add, while y is under way unless it is read LATE. */
template <typename Y, int MT, bool LATE, bool WIDE, typename F> static __device__ __forceinline__ void raise(const place<Y> &at, int column, F more)
{
  int row = at.first + threadIdx.x % WARP / 4, mine = column + threadIdx.x % 4 * 8, pixels = at.g.Ho * at.g.Wo;
  float acc[MT][COLUMNS / 8][4] = {};
  eight<Y, WIDE> old[MT * 2] = {};

  if (LATE)
    more(acc);
#pragma unroll
  for (int i = 0; i < 2 * MT; i++)
    if (row + i * 8 < pixels)
      old[i].load(at.y + (int64_t)(row + i * 8) * at.out + mine, at.out - mine);
  if (!LATE)
    more(acc);
#pragma unroll
  for (int i = 0; i < 2 * MT; i++)
    if (row + i * 8 < pixels)
      old[i].store_sum(at.y + (int64_t)(row + i * 8) * at.out + mine, at.out - mine, acc[i / 2], i % 2 * 2);
}

template <typename T, typename Y, int MT, bool WIDE>
static __global__ void __launch_bounds__(THREADS, MT > 1 ? 3 : 4) lowrank_kernel(Y *y, const uint16_t *x, kern_slot_rows slots, pictures p, int in, int out)
{
  constexpr bool RESTS = std::is_same_v<T, __half>;
  __shared__ room<MT> s;
  int64_t b = blockIdx.z;
  int from = (int)(blockIdx.y * WARPS * COLUMNS), by = (int)(gridDim.y * WARPS * COLUMNS), own = (int)threadIdx.x / WARP * COLUMNS;
  place<Y> at = {y + b * p.g.Ho * p.g.Wo * out, x + (p.first + b) % p.count * p.g.H * p.g.W * in, p.g, in, out, (int)blockIdx.x * MT * HIGH};
  const kern_slot *entry = row_of(slots, b);

  if (!entry)
    return; /* the whole block */
  const kern_slot slot = *entry;

  if (slot.rank <= KEPT) {
    shrink_all<T, MT, 2, WIDE>(&s, at, slot, 0, slot.rank);
    for (int c = from + own; c < out; c += by)
      raise<Y, MT, false, WIDE>(at, c, [&](float acc[MT][COLUMNS / 8][4]) { expand<MT, RESTS>(acc, &s, slot, out, c, 0, slot.rank); });
    return;
  }
  for (int m = 0; m < MT; m++, at.first += HIGH) /* in turn: they need the registers */
    for (int c = from; c < out; c += by)
      raise<Y, 1, true, WIDE>(at, c + own, [&](float acc[1][COLUMNS / 8][4]) {
        room<1> *one = (room<1> *)(void *)&s;

        for (int r0 = 0; r0 < slot.rank; r0 += KEPT) {
          int ranks = slot.rank - r0 < KEPT ? slot.rank - r0 : KEPT;

          shrink_all<T, 1, 1, WIDE>(one, at, slot, r0, ranks);
          expand<1, RESTS>(acc, one, slot, out, c + own, r0, ranks);
        }
      });
}

template <typename T, typename Y, int MT, bool WIDE>
static int launch_tiles(cudaStream_t s, void *y, const void *x, const kern_slot_rows *slots, int64_t B, const pictures *p, int64_t in, int64_t out)
{
  int64_t tiles = div_up((int64_t)p->g.Ho * p->g.Wo, MT * HIGH), columns = div_up(out, WARPS * COLUMNS), splits = ENOUGH / (tiles * B);
  dim3 grid((unsigned)tiles, (unsigned)(splits < 1 ? 1 : splits > columns ? columns : splits), (unsigned)B);

  return launch(lowrank_kernel<T, Y, MT, WIDE>, grid, THREADS, s, (Y *)y, (const uint16_t *)x, *slots, *p, (int)in, (int)out);
}

template <typename T, typename Y>
static int lowrank_any(cudaStream_t s, void *y, const void *x, const kern_slot_rows *slots, int64_t B, const pictures *p, int64_t in, int64_t out)
{
  if (!is_wide(x, y, NULL, in, out))
    return launch_tiles<T, Y, 1, false>(s, y, x, slots, B, p, in, out);
  if (div_up((int64_t)p->g.Ho * p->g.Wo, 2 * HIGH) * B >= 2 * ENOUGH)
    return launch_tiles<T, Y, 2, true>(s, y, x, slots, B, p, in, out);
  return launch_tiles<T, Y, 1, true>(s, y, x, slots, B, p, in, out);
}

int kern_lowrank(cudaStream_t s, int act, void *y, int y_type, const void *x, const struct kern_slot_rows *slots, int64_t B, int64_t first,
                 int64_t count, const struct kern_geometry *g, int64_t in, int64_t out)
{
  const pictures p = {(int)(first % count), (int)count, *g};

  if (act == KERN_F16)
    return y_type == KERN_F32 ? lowrank_any<__half, float>(s, y, x, slots, B, &p, in, out) : lowrank_any<__half, __half>(s, y, x, slots, B, &p, in, out);
  return y_type == KERN_F32 ? lowrank_any<__nv_bfloat16, float>(s, y, x, slots, B, &p, in, out)
                            : lowrank_any<__nv_bfloat16, __nv_bfloat16>(s, y, x, slots, B, &p, in, out);
}

/* ---- packing ---- */

static __global__ void __launch_bounds__(THREADS) pack_up_kernel(uint16_t *dst, const float *src, int64_t out, int64_t rank, int64_t width, int with_rests)
{
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;

  if (i < out * width) {
    float v = i % width < rank ? src[i / width * rank + i % width] : 0;
    uint32_t bits = bf16_bits(v);

    dst[i] = (uint16_t)bits;
    if (with_rests)
      dst[out * width + i] = (uint16_t)rest_bits(v, bits);
  }
}

int kern_pack_up(cudaStream_t s, void *dst, int act, const float *src, int64_t out, int64_t rank, int64_t width)
{
  return launch(pack_up_kernel, dim3((unsigned)div_up(out * width, THREADS)), THREADS, s, (uint16_t *)dst, src, out, rank, width, (int)(act == KERN_F16));
}
