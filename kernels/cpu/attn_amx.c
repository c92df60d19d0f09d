/*
 * attn_amx.c - attention on AMX tiles: bf16 products, fp32 sums, one block of scores at a time.
 *
 * Tiles are amx.h's. Everything is computed transposed, with the 16 lanes of a vector being 16 queries:
 *   scores  S' = K Q'      16 keys x 16 queries a tile; the head dim in steps of 32, padded with zeros (40 costs as 64)
 *   softmax P' = 2^(c S' - m), m and the sums are one vector per 16 queries: nothing is ever added across lanes
 *   values  O' += V' P'    16 dims x 16 queries a tile; two rows of P' rounded to bf16 and interleaved are the right operand
 * The running maximum m makes it exact in one pass (Milakov and Gimelshein 2018; Dao et al. 2022). 32 queries are worked on
 * together against blocks of 64 to 256 keys. The phases do not overlap: a tile product keeps port 5 busy for its 16 cycles, and
 * half of all 512-bit instructions need that port too (measured, see SPEED.md). The exponential is 2^x = 2^floor(x) p(x - floor(x)) with a cubic p
 * good to 9e-5, far below the bf16 rounding of P' (2e-3).
 *
 * Keys and values of a head stay in the second-level cache (4096 x 112 x 2 bytes for a head dim of 40), scores and weights of a
 * block in the first. Callers: attn.c. Threads: pure.
 */
#include <math.h>
#include <string.h>

#include "kernels/cpu/amx.h"
#include "kernels/cpu/attn.h"
#include "kernels/cpu/cpu.h"

enum { QUERIES = 32, GROUPS = 2 /* of 16 queries */ };

static const float SLACK = 8;

/* Work memory of one thread, all in tiles. */
struct work {
  uint16_t *q;              /* (GROUPS, Kq/32): 16 pairs of dims x 16 queries */
  float *s;                 /* (keys/16, GROUPS): 16 keys x 16 queries of scores */
  uint32_t *p;              /* (keys/32, GROUPS): 16 pairs of keys x 16 queries */
  float *o;                 /* (Kv/16, GROUPS): 16 dims x 16 queries */
  __m512 max[GROUPS], sum[GROUPS]; /* reference points (not above the maximum, at most SLACK below), sums of weights */
};

static int64_t round_up(int64_t n, int64_t unit)
{
  return (n + unit - 1) / unit * unit;
}

/* Keys per block: few enough that keys, values, scores and weights fit the first-level cache, but enough to pay for loading
 * and storing the sums of the values, which grow with the head dim. */
static int64_t block_keys(int64_t K)
{
  return K <= 64 ? 64 : K <= 160 ? 128 : 256;
}

static struct attn_sizes sizes(int64_t Tk, int64_t K)
{
  int64_t Kq = round_up(K, 32), Kv = round_up(K, 16), Tp = round_up(Tk, 32);
  struct attn_sizes s;

  s.pack_bytes = (size_t)(Tp * (Kq + Kv)) * 2;
  s.work_bytes = (size_t)QUERIES * (size_t)(Kq * 2 + block_keys(K) * 6 + Kv * 4);
  s.queries = QUERIES;
  return s;
}

/* ---- packing ---- */

/* r[i] lane j becomes r[j] lane i. */
AMX static inline void transpose16(__m512 *r)
{
  __m512 t[16];

  for (int i = 0; i < 16; i += 4) { /* 2x2 blocks, then 4x4, within each quarter of a vector */
    __m512 a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    __m512 c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);

    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
  }
  for (int i = 0; i < 4; i++) { /* the quarters */
    __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);

    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

/* Tiles of keys: (Tp/16, Kq/32), 16 keys x 32 dims. */
AMX static void pack_keys(const struct attn_head *h, char *tile, int64_t from, int64_t to)
{
  int64_t steps = round_up(h->K, 32) / 32;

  for (int64_t n = from; n < to; n++)
    for (int64_t s = 0; s < steps; s++) {
      int64_t dims = h->K - s * 32 < 32 ? h->K - s * 32 : 32;
      __mmask32 mask = (__mmask32)((1ull << dims) - 1);

      for (int64_t j = 0; j < 16; j++) {
        int64_t t = n * 16 + j;
        const uint16_t *row = (const uint16_t *)h->k + t * h->stride + s * 32;

        _mm512_storeu_si512(tile + (n * steps + s) * TILE + j * 64,
                            t < h->Tk ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512());
      }
    }
}

/* Tiles of values: (Tp/32, Kv/16), 16 dims x 32 keys. Pairs of keys are one word, then it is a transposition of words. */
AMX static void pack_values(const struct attn_head *h, char *tile, int64_t from, int64_t to)
{
  int64_t tiles = round_up(h->K, 16) / 16;

  for (int64_t n = from; n < to; n++)
    for (int64_t c = 0; c < tiles; c++) {
      int64_t dims = h->K - c * 16 < 16 ? h->K - c * 16 : 16;
      __mmask16 mask = (__mmask16)((1u << dims) - 1);
      __m512 r[16];

      for (int64_t i = 0; i < 16; i++) {
        int64_t t = n * 32 + 2 * i;
        const uint16_t *row = (const uint16_t *)h->v + t * h->stride + c * 16;
        __m256i a = t < h->Tk ? _mm256_maskz_loadu_epi16(mask, row) : _mm256_setzero_si256();
        __m256i b = t + 1 < h->Tk ? _mm256_maskz_loadu_epi16(mask, row + h->stride) : _mm256_setzero_si256();

        r[i] = _mm512_castsi512_ps(
          _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
      }
      transpose16(r);
      for (int64_t i = 0; i < 16; i++)
        _mm512_storeu_ps(tile + (n * tiles + c) * TILE + i * 64, r[i]);
    }
}

/* Tiles of queries; those that are not there are zero. */
AMX static void pack_queries(uint16_t *to, const struct attn_head *h, int64_t t0, int nq)
{
  int64_t steps = round_up(h->K, 32) / 32;

  for (int g = 0; g < GROUPS; g++)
    for (int64_t s = 0; s < steps; s++) {
      int64_t dims = h->K - s * 32 < 32 ? h->K - s * 32 : 32;
      __mmask32 mask = (__mmask32)((1ull << dims) - 1);
      __m512 r[16];

      for (int i = 0; i < 16; i++) {
        const uint16_t *row = (const uint16_t *)h->q + (t0 + g * 16 + i) * h->stride + s * 32;

        r[i] = g * 16 + i < nq ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, row)) : _mm512_setzero_ps();
      }
      transpose16(r);
      for (int i = 0; i < 16; i++)
        _mm512_storeu_ps((char *)to + (g * steps + s) * TILE + i * 64, r[i]);
    }
}

static const char *values_of(const void *packed, const struct attn_head *h)
{
  return (const char *)packed + round_up(h->Tk, 32) * round_up(h->K, 32) * 2;
}

static void pack(const struct attn_head *h, void *packed, int part, int parts)
{
  int64_t pairs = round_up(h->Tk, 32) / 32, from, to;

  cpu_split(pairs, 1, part, parts, &from, &to);
  pack_keys(h, packed, 2 * from, 2 * to);
  pack_values(h, (char *)(uintptr_t)values_of(packed, h), from, to);
}

/* ---- the three parts of a block ---- */

/* Scores of 32 keys against all queries: two key tiles, four tiles of sums. */
AMX static inline void scores(float *s, const uint16_t *q, const char *k, int64_t steps)
{
  const char *q0 = (const char *)q, *q1 = q0 + steps * TILE, *k1 = k + steps * TILE;

  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; i++) {
    _tile_loadd(4, k + i * TILE, 64);
    _tile_loadd(6, q0 + i * TILE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, q1 + i * TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, k1 + i * TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, s, 64);
  _tile_stored(1, s + TILE_F, 64);
  _tile_stored(2, s + 2 * TILE_F, 64);
  _tile_stored(3, s + 3 * TILE_F, 64);
}

/* 2^x; 0 for -inf, NaN for NaN. Cubic from the FlashAttention-4 sources, relative error 8.8e-5. */
AMX static inline __m512 exp2_cubic(__m512 x)
{
  __m512 f = _mm512_reduce_ps(x, 1); /* x - floor(x) */
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.077119089f), _mm512_set1_ps(0.227564394f));

  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695146143f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

/* The lanes of group g whose query sees key j; t is the block's first query. */
AMX static inline __mmask16 sees(int causal, int64_t t, int g, int64_t j)
{
  int64_t hidden = j - t - 16 * g; /* lanes below this do not */

  return (__mmask16)(!causal || hidden <= 0 ? 0xffff : hidden >= 16 ? 0 : 0xffffu << hidden);
}

/* Where a block stands: its keys are j0 .. j0 + left - 1, those of the head that the last query sees. */
struct span {
  int64_t t, j0, left;
  int causal;              /* some query does not see all of them */
};

/* Raises the reference point m of group g, in powers of two, to the largest score where that is far above it, and rescales what
 * was summed before. Weights up to 2^SLACK are as exact as weights up to 1, so almost no block pays for this. */
AMX static void raise_max(struct work *w, int g, const struct span *b, float c, int64_t Kv)
{
  const float *s = w->s + g * TILE_F;
  __m512 m0 = _mm512_set1_ps(-INFINITY), m1 = m0, factor;
  __mmask16 raised;
  int64_t j = 0;

  if (b->causal)
    for (; j < b->left; j++)
      m0 = _mm512_mask_max_ps(m0, sees(1, b->t, g, b->j0 + j), m0, _mm512_load_ps(s + j / 16 * 2 * TILE_F + j % 16 * 16));
  for (; j + 16 <= b->left; j += 16)
    for (int i = 0; i < 16; i += 2) {
      m0 = _mm512_max_ps(m0, _mm512_load_ps(s + j * 2 * 16 + i * 16));
      m1 = _mm512_max_ps(m1, _mm512_load_ps(s + j * 2 * 16 + i * 16 + 16));
    }
  for (; j < b->left; j++)
    m0 = _mm512_max_ps(m0, _mm512_load_ps(s + j / 16 * 2 * TILE_F + j % 16 * 16));
  m0 = _mm512_mul_ps(_mm512_max_ps(m0, m1), _mm512_set1_ps(c));
  raised = _mm512_cmp_ps_mask(m0, _mm512_add_ps(w->max[g], _mm512_set1_ps(SLACK)), _CMP_GT_OQ);
  if (!raised)
    return;
  m0 = _mm512_mask_mov_ps(w->max[g], raised, m0);
  factor = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), raised, exp2_cubic(_mm512_sub_ps(w->max[g], m0)));
  w->max[g] = m0;
  w->sum[g] = _mm512_mul_ps(w->sum[g], factor);
  for (int64_t d = 0; d < Kv; d++) {
    float *o = w->o + (d / 16 * GROUPS + g) * TILE_F + d % 16 * 16;

    _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), factor));
  }
}

/* Two rows of weights as bf16, the first in the low halves: rounded by adding half a unit and cutting. The instructions that
 * round to bf16 take two cycles each and would still need a shuffle. */
AMX static inline __m512i pair(__m512 a, __m512 b)
{
  __m512i half = _mm512_set1_epi32(0x8000);
  __m512i lo = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);

  return _mm512_mask_blend_epi16(0xaaaaaaaa, lo, _mm512_add_epi32(_mm512_castps_si512(b), half));
}

/* sum += both halves of p. */
AMX static inline __m512 add_pair(__m512 sum, __m512i p)
{
  return _mm512_dpbf16_ps(sum, (__m512bh)p, (__m512bh)_mm512_set1_epi32(0x3f803f80));
}

/* Weights of 32 keys, n the first of the block, for group g. */
AMX static inline void weights(struct work *w, int g, int64_t n, __m512 c)
{
  const float *s = w->s + (n / 16 * GROUPS + g) * TILE_F;
  uint32_t *p = w->p + (n / 32 * GROUPS + g) * TILE_F;
  __m512 m = w->max[g], sum0 = w->sum[g], sum1 = _mm512_setzero_ps();

  for (int i = 0; i < 16; i += 2) {
    const float *t = s + i / 8 * GROUPS * TILE_F + i % 8 * 32;
    __m512 x0 = exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(t), c, m));
    __m512 x1 = exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(t + 16), c, m));
    __m512 x2 = exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(t + 32), c, m));
    __m512 x3 = exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(t + 48), c, m));
    __m512i p0 = pair(x0, x1), p1 = pair(x2, x3);

    sum0 = add_pair(sum0, p0);
    sum1 = add_pair(sum1, p1);
    _mm512_store_si512(p + i * 16, p0);
    _mm512_store_si512(p + i * 16 + 16, p1);
  }
  w->sum[g] = _mm512_add_ps(sum0, sum1);
}

/* The same where keys end or are hidden. */
AMX static void weights_masked(struct work *w, int g, int64_t n, __m512 c, const struct span *b)
{
  for (int i = 0; i < 32; i += 2) {
    __m512 x[2];
    __m512i p;

    for (int k = 0; k < 2; k++) {
      int64_t j = n + i + k;
      const float *s = w->s + (j / 16 * GROUPS + g) * TILE_F + j % 16 * 16;
      __mmask16 here = j < b->left ? sees(b->causal, b->t, g, b->j0 + j) : 0;

      x[k] = _mm512_maskz_mov_ps(here, exp2_cubic(_mm512_fmsub_ps(_mm512_load_ps(s), c, w->max[g])));
    }
    p = pair(x[0], x[1]);
    w->sum[g] = add_pair(w->sum[g], p);
    _mm512_store_si512(w->p + (n / 32 * GROUPS + g) * TILE_F + i * 8, p);
  }
}

/* o += v p over `keys` keys for 1 to 3 tiles of dims; both groups. Tiles 0 to 5 are the sums, by dims then group. */
#define VALUES_MOVE(TILES, MOVE)                                     \
  do {                                                               \
    MOVE(0, o, 64);                                                  \
    MOVE(1, o + TILE_F, 64);                                         \
    if (TILES > 1) {                                                 \
      MOVE(2, o + 2 * TILE_F, 64);                                   \
      MOVE(3, o + 3 * TILE_F, 64);                                   \
    }                                                                \
    if (TILES > 2) {                                                 \
      MOVE(4, o + 4 * TILE_F, 64);                                   \
      MOVE(5, o + 5 * TILE_F, 64);                                   \
    }                                                                \
  } while (0)

AMX static void values3(float *o, const uint32_t *p, const char *v, int64_t keys, int64_t step)
{
  VALUES_MOVE(3, _tile_loadd);
  for (int64_t n = 0; n < keys / 32; n++, p += 2 * TILE_F, v += step) {
    /* There and back again: the two spare tiles need seven loads for six products. */
    _tile_loadd(7, p, 64);
    _tile_loadd(6, v, 64);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, v + TILE, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, v + 2 * TILE, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, p + TILE_F, 64);
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(6, v + TILE, 64);
    _tile_dpbf16ps(3, 6, 7);
    _tile_loadd(6, v, 64);
    _tile_dpbf16ps(1, 6, 7);
  }
  VALUES_MOVE(3, _tile_stored);
}

AMX static void values2(float *o, const uint32_t *p, const char *v, int64_t keys, int64_t step)
{
  VALUES_MOVE(2, _tile_loadd);
  for (int64_t n = 0; n < keys / 32; n++, p += 2 * TILE_F, v += step) {
    _tile_loadd(6, p, 64);
    _tile_loadd(4, v, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, v + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, p + TILE_F, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  VALUES_MOVE(2, _tile_stored);
}

AMX static void values1(float *o, const uint32_t *p, const char *v, int64_t keys, int64_t step)
{
  VALUES_MOVE(1, _tile_loadd);
  for (int64_t n = 0; n < keys / 32; n++, p += 2 * TILE_F, v += step) {
    _tile_loadd(4, v, 64);
    _tile_loadd(6, p, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, p + TILE_F, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  VALUES_MOVE(1, _tile_stored);
}

AMX static void values(float *o, const uint32_t *p, const char *v, int64_t keys, int64_t Kv)
{
  int64_t tiles = Kv / 16, step = tiles * TILE, c = 0;

  /* Threes, and at the end two twos rather than a three and a one. */
  for (; tiles - c >= 5 || tiles - c == 3; c += 3)
    values3(o + c * GROUPS * TILE_F, p, v + c * TILE, keys, step);
  for (; tiles - c >= 2; c += 2)
    values2(o + c * GROUPS * TILE_F, p, v + c * TILE, keys, step);
  if (c < tiles)
    values1(o + c * GROUPS * TILE_F, p, v + c * TILE, keys, step);
}

/* ---- a block of queries ---- */

/* One block of keys: tiles of keys from k on, of values from v on. */
AMX static void block(const struct attn_head *h, struct work *w, const struct span *b, int nq, const char *k, const char *v)
{
  int64_t Kv = round_up(h->K, 16), steps = round_up(h->K, 32) / 32, keys = round_up(b->left, 32);
  float c = h->scale * 1.44269504f;
  __m512 cv = _mm512_set1_ps(c);

  FENCE();
  for (int64_t n = 0; n < keys; n += 32)
    scores(w->s + n / 16 * GROUPS * TILE_F, w->q, k + n / 16 * steps * TILE, steps);
  FENCE();
  for (int g = 0; g < GROUPS; g++)
    if (g * 16 < nq)
      raise_max(w, g, b, c, Kv);
  for (int64_t n = 0; n < keys; n += 32)
    for (int g = 0; g < GROUPS; g++)
      if (g * 16 < nq && !b->causal && n + 32 <= b->left)
        weights(w, g, n, cv);
      else if (g * 16 < nq)
        weights_masked(w, g, n, cv, b);
  FENCE();
  values(w->o, w->p, v, keys, Kv);
  FENCE();
}

/* Divides by the sums, turns back and rounds. */
AMX static void store_rows(const struct attn_head *h, const struct work *w, int64_t t0, int nq)
{
  for (int g = 0; g * 16 < nq; g++) {
    __m512 inv = _mm512_div_ps(_mm512_set1_ps(1.0f), w->sum[g]);

    for (int64_t x = 0; x < h->K; x += 16) {
      __mmask16 mask = (__mmask16)(h->K - x >= 16 ? 0xffff : (1u << (h->K - x)) - 1);
      const float *o = w->o + (x / 16 * GROUPS + g) * TILE_F;
      __m512 r[16];

      for (int i = 0; i < 16; i++)
        r[i] = _mm512_mul_ps(_mm512_load_ps(o + i * 16), inv);
      transpose16(r);
      for (int i = 0; i < 16 && g * 16 + i < nq; i++)
        _mm256_mask_storeu_epi16((uint16_t *)h->o + (t0 + g * 16 + i) * h->stride + x, mask,
                                 (__m256i)_mm512_cvtneps_pbh(r[i]));
    }
  }
}

/* Queries t .. t + nq - 1 against all their keys. */
AMX static void queries(const struct attn_head *h, const char *packed, struct work *w, int64_t t, int nq)
{
  int64_t Kv = round_up(h->K, 16), steps = round_up(h->K, 32) / 32;
  int64_t last = h->causal && t + nq < h->Tk ? t + nq : h->Tk, keys = block_keys(h->K);

  pack_queries(w->q, h, t, nq);
  memset(w->o, 0, (size_t)(QUERIES * Kv) * sizeof *w->o);
  for (int g = 0; g < GROUPS; g++) {
    w->max[g] = _mm512_set1_ps(-INFINITY);
    w->sum[g] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < last; j += keys) {
    struct span b = {t, j, last - j < keys ? last - j : keys, 0};

    b.causal = h->causal && j + b.left - 1 > t;
    block(h, w, &b, nq, packed + j / 16 * steps * TILE, values_of(packed, h) + j / 32 * (Kv / 16) * TILE);
  }
  store_rows(h, w, t, nq);
}

AMX static void run(const struct attn_head *h, const void *packed, int64_t t0, int64_t t1, void *memory)
{
  struct tile_config before;
  int64_t keys = block_keys(h->K);
  struct work w;

  w.s = memory;
  w.o = w.s + QUERIES * keys;
  w.p = (uint32_t *)(w.o + QUERIES * round_up(h->K, 16));
  w.q = (uint16_t *)(w.p + QUERIES * keys / 2);
  memset(w.p, 0, (size_t)(QUERIES * keys) * 2); /* a group that is not there is multiplied too: it must be numbers */
  tiles_begin(&before);
  for (int64_t t = t0; t < t1; t += QUERIES)
    queries(h, packed, &w, t, t1 - t < QUERIES ? (int)(t1 - t) : QUERIES);
  tiles_end(&before);
}

const struct attn_kernel attn_amx = {sizes, pack, run};
