/*
 * vec_body.h - the bodies of vec.h's kernels, over a vector of VL floats. No include guard: each vec_*.c includes it once with
 *
 *   VL        floats in a vector: 4, 8 or 16
 *   V_TARGET  the function attribute that lets the compiler use that instruction set
 *   V_TABLE   the table to define
 *   V_BF16    defined when the bf16 conversion instructions exist
 *
 * Two rules keep it fast without macros: every helper is inlined by force, and every kernel has a body that takes the
 * element type as a constant, so that each type gets a loop of its own. max and min return their second operand when one is
 * NaN, which is written here so that a NaN of the data survives.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "kernels/cpu/vec.h"

#define INLINE static inline __attribute__((always_inline)) V_TARGET

#if VL == 16
#define VEC __m512
#define V_SET(x) _mm512_set1_ps(x)
#define V_LOAD(p) _mm512_loadu_ps(p)
#define V_STORE(p, v) _mm512_storeu_ps(p, v)
#define V_MAX(a, b) _mm512_max_ps(a, b)
#define V_MIN(a, b) _mm512_min_ps(a, b)
#define V_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define VECI __m512i
#define V_INT(v) _mm512_castps_si512(v)
#define V_FLT(v) _mm512_castsi512_ps(v)
#define VI_SET(x) _mm512_set1_epi32(x)
#define VI_ADD(a, b) _mm512_add_epi32(a, b)
#define VI_AND(a, b) _mm512_and_si512(a, b)
#define VI_OR(a, b) _mm512_or_si512(a, b)
#define VI_SHL(a, n) _mm512_slli_epi32(a, n)
#define VI_SHR(a, n) _mm512_srli_epi32(a, n)
#elif VL == 8
#define VEC __m256
#define V_SET(x) _mm256_set1_ps(x)
#define V_LOAD(p) _mm256_loadu_ps(p)
#define V_STORE(p, v) _mm256_storeu_ps(p, v)
#define V_MAX(a, b) _mm256_max_ps(a, b)
#define V_MIN(a, b) _mm256_min_ps(a, b)
#define V_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define VECI __m256i
#define V_INT(v) _mm256_castps_si256(v)
#define V_FLT(v) _mm256_castsi256_ps(v)
#define VI_SET(x) _mm256_set1_epi32(x)
#define VI_ADD(a, b) _mm256_add_epi32(a, b)
#define VI_AND(a, b) _mm256_and_si256(a, b)
#define VI_OR(a, b) _mm256_or_si256(a, b)
#define VI_SHL(a, n) _mm256_slli_epi32(a, n)
#define VI_SHR(a, n) _mm256_srli_epi32(a, n)
#else
#define VEC __m128
#define V_SET(x) _mm_set1_ps(x)
#define V_LOAD(p) _mm_loadu_ps(p)
#define V_STORE(p, v) _mm_storeu_ps(p, v)
#define V_MAX(a, b) _mm_max_ps(a, b)
#define V_MIN(a, b) _mm_min_ps(a, b)
#define V_FMA(a, b, c) _mm_add_ps(_mm_mul_ps(a, b), c)
#define VECI __m128i
#define V_INT(v) _mm_castps_si128(v)
#define V_FLT(v) _mm_castsi128_ps(v)
#define VI_SET(x) _mm_set1_epi32(x)
#define VI_ADD(a, b) _mm_add_epi32(a, b)
#define VI_AND(a, b) _mm_and_si128(a, b)
#define VI_OR(a, b) _mm_or_si128(a, b)
#define VI_SHL(a, n) _mm_slli_epi32(a, n)
#define VI_SHR(a, n) _mm_srli_epi32(a, n)
#endif

/* ---- numbers ---- */

INLINE VEC load_bf16(const uint16_t *p)
{
#if VL == 16
  return V_FLT(VI_SHL(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16));
#elif VL == 8
  return V_FLT(VI_SHL(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16));
#else
  return V_FLT(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const void *)p)));
#endif
}

/* The bf16 bits of v in the low half of each lane. */
INLINE VECI round_bf16(VEC v)
{
  VECI u = V_INT(v), odd = VI_AND(VI_SHR(u, 16), VI_SET(1));
  VECI r = VI_SHR(VI_ADD(u, VI_ADD(odd, VI_SET(0x7fff))), 16);
  VECI quiet = VI_OR(VI_SHR(u, 16), VI_SET(0x40));

#if VL == 16
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), r, quiet);
#elif VL == 8
  return _mm256_blendv_epi8(r, quiet, V_INT(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
#else
  VECI nan = V_INT(_mm_cmpunord_ps(v, v));

  return VI_OR(VI_AND(nan, quiet), _mm_andnot_si128(nan, r));
#endif
}

INLINE void store_bf16(uint16_t *p, VEC v)
{
#if defined(V_BF16)
  _mm256_storeu_si256((void *)p, (__m256i)_mm512_cvtneps_pbh(v));
#elif VL == 16
  _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(round_bf16(v)));
#elif VL == 8
  VECI r = round_bf16(v);

  _mm_storeu_si128((void *)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
#else
  uint32_t r[4];

  _mm_storeu_si128((void *)r, round_bf16(v));
  for (int i = 0; i < 4; i++)
    p[i] = (uint16_t)r[i];
#endif
}

INLINE VEC load(const void *p, int64_t i, enum dtype type)
{
  return type == DT_BF16 ? load_bf16((const uint16_t *)p + i) : V_LOAD((const float *)p + i);
}

INLINE void store(void *p, int64_t i, enum dtype type, VEC v)
{
  if (type == DT_BF16)
    store_bf16((uint16_t *)p + i, v);
  else
    V_STORE((float *)p + i, v);
}

/* The first n < VL numbers; the rest of the vector is 0. */
INLINE VEC load_part(const void *p, int64_t i, enum dtype type, int64_t n)
{
  float t[VL] = {0};

  for (int64_t j = 0; j < n; j++)
    t[j] = type == DT_BF16 ? bf16_to_f32(((const uint16_t *)p)[i + j]) : ((const float *)p)[i + j];
  return V_LOAD(t);
}

INLINE void store_part(void *p, int64_t i, enum dtype type, VEC v, int64_t n)
{
  float t[VL];

  V_STORE(t, v);
  for (int64_t j = 0; j < n; j++)
    if (type == DT_BF16)
      ((uint16_t *)p)[i + j] = f32_to_bf16(t[j]);
    else
      ((float *)p)[i + j] = t[j];
}

INLINE float sum_lanes(VEC v)
{
  float t[VL];

  V_STORE(t, v);
  for (int w = VL / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++)
      t[i] += t[i + w];
  return t[0];
}

/* ---- functions of one vector ---- */

/* e^x to 2 ulp for x in [-87.3, 88]; clamped outside. Reduction by ln 2 in two parts, then Cephes' expf polynomial. */
INLINE VEC v_exp(VEC x)
{
  const VEC magic = V_SET(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer held in the low bits */
  VEC n, f, p;

  x = V_MAX(V_SET(-87.3f), V_MIN(V_SET(88.0f), x));
  n = V_FMA(x, V_SET(1.44269504f), magic);
  p = n - magic;
  f = V_FMA(p, V_SET(-0.693359375f), x);
  f = V_FMA(p, V_SET(2.12194440e-4f), f);
  p = V_FMA(f, V_SET(1.9875691500e-4f), V_SET(1.3981999507e-3f));
  p = V_FMA(p, f, V_SET(8.3334519073e-3f));
  p = V_FMA(p, f, V_SET(4.1665795894e-2f));
  p = V_FMA(p, f, V_SET(1.6666665459e-1f));
  p = V_FMA(p, f, V_SET(5.0000001201e-1f));
  p = V_FMA(p * f, f, f) + V_SET(1.0f);
  return V_FLT(VI_ADD(V_INT(p), VI_SHL(V_INT(n), 23)));
}

INLINE VEC v_silu(VEC x)
{
  return x / (V_SET(1.0f) + v_exp(V_SET(0.0f) - x));
}

/* x/2 (1 + erf(x / sqrt 2)). With z = |x| / sqrt 2, erfc(z) = (a1 t + ... + a5 t^5) e^(-z^2), t = 1 / (1 + p z), to 1.5e-7
 * (Abramowitz and Stegun 7.1.26); used as max(x, 0) - |x|/2 erfc(z), nothing cancels for negative x. */
INLINE VEC v_gelu(VEC x)
{
  VEC a = V_MIN(V_SET(3e38f), V_FLT(VI_AND(V_INT(x), VI_SET(0x7fffffff)))); /* inf * erfc(inf) would be NaN; NaN passes */
  VEC z = a * V_SET(0.70710678118f);
  VEC t = V_SET(1.0f) / V_FMA(z, V_SET(0.3275911f), V_SET(1.0f));
  VEC q = V_FMA(t, V_SET(1.061405429f), V_SET(-1.453152027f));

  q = V_FMA(q, t, V_SET(1.421413741f));
  q = V_FMA(q, t, V_SET(-0.284496736f));
  q = V_FMA(q, t, V_SET(0.254829592f));
  q = q * t * v_exp(V_SET(0.0f) - z * z);
  return V_MAX(V_SET(0.0f), x) - V_SET(0.5f) * a * q;
}

INLINE VEC v_act(VEC x, enum act_kind kind)
{
  if (kind == ACT_SILU)
    return v_silu(x);
  if (kind == ACT_GELU)
    return v_gelu(x);
  return x / (V_SET(1.0f) + v_exp(x * V_SET(-1.702f)));
}

/* ---- conversion ---- */

INLINE VEC load_any(const char *p, size_t i, enum dtype type)
{
  if (type != DT_F16)
    return load(p, (int64_t)i, type);
#if VL == 16
  return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(p + 2 * i)));
#elif VL == 8
  return _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 2 * i)));
#else
  float t[VL];
  uint16_t h[VL];

  memcpy(h, p + 2 * i, sizeof h);
  for (int j = 0; j < VL; j++)
    t[j] = f16_to_f32(h[j]);
  return V_LOAD(t);
#endif
}

INLINE void store_any(char *p, size_t i, enum dtype type, VEC v)
{
  float t[VL];
  uint16_t h[VL];

  if (type != DT_F16) {
    store(p, (int64_t)i, type, v);
    return;
  }
  V_STORE(t, v);
  for (int j = 0; j < VL; j++)
    h[j] = f32_to_f16(t[j]);
  memcpy(p + 2 * i, h, sizeof h);
}

/* src may be unaligned, as bytes of a mapped file are: scalars go through memcpy. */
INLINE void convert_body(char *dst, enum dtype dt, const char *src, enum dtype st, size_t n)
{
  size_t i = 0;

  for (; i + VL <= n; i += VL)
    store_any(dst, i, dt, load_any(src, i, st));
  for (; i < n; i++) {
    uint16_t h = 0;
    float f;

    memcpy(st == DT_F32 ? (void *)&f : (void *)&h, src + i * dtype_size(st), dtype_size(st));
    if (st != DT_F32)
      f = st == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
    h = dt == DT_F16 ? f32_to_f16(f) : f32_to_bf16(f);
    memcpy(dst + i * dtype_size(dt), dt == DT_F32 ? (void *)&f : (void *)&h, dtype_size(dt));
  }
}

V_TARGET static void convert(void *dst, enum dtype dt, const void *src, enum dtype st, size_t n)
{
  if (dt == st)
    memcpy(dst, src, n * dtype_size(st));
  else if (st == DT_F16 && dt == DT_BF16)
    convert_body(dst, DT_BF16, src, DT_F16, n);
  else if (st == DT_F16)
    convert_body(dst, DT_F32, src, DT_F16, n);
  else if (st == DT_BF16 && dt == DT_F32)
    convert_body(dst, DT_F32, src, DT_BF16, n);
  else if (st == DT_BF16)
    convert_body(dst, DT_F16, src, DT_BF16, n);
  else if (dt == DT_BF16)
    convert_body(dst, DT_BF16, src, DT_F32, n);
  else
    convert_body(dst, DT_F16, src, DT_F32, n);
}

/* ---- normalisation ---- */

/* W vectors of channels over all pixels, sums in registers. */
#define GN_STATS(W)                                                          \
  do {                                                                       \
    VEC s[W], q[W], h[W];                                                    \
    for (int j = 0; j < W; j++) {                                            \
      s[j] = q[j] = V_SET(0.0f);                                             \
      h[j] = V_LOAD(shift + c + j * VL);                                     \
    }                                                                        \
    for (int64_t p = 0; p < pixels; p++)                                     \
      for (int j = 0; j < W; j++) {                                          \
        VEC d = load(x, p * C + c + j * VL, type) - h[j];                    \
        s[j] = s[j] + d;                                                     \
        q[j] = V_FMA(d, d, q[j]);                                            \
      }                                                                      \
    for (int j = 0; j < W; j++) {                                            \
      V_STORE(sum + c + j * VL, V_LOAD(sum + c + j * VL) + s[j]);            \
      V_STORE(sq + c + j * VL, V_LOAD(sq + c + j * VL) + q[j]);              \
    }                                                                        \
  } while (0)

INLINE void gn_stats_body(float *sum, float *sq, const void *x, enum dtype type, int64_t pixels, int64_t C, const float *shift)
{
  int64_t c = 0;

  for (; c + 4 * VL <= C; c += 4 * VL)
    GN_STATS(4);
  for (; c + VL <= C; c += VL)
    GN_STATS(1);
  for (; c < C; c++)
    for (int64_t p = 0; p < pixels; p++) {
      float v = type == DT_BF16 ? bf16_to_f32(((const uint16_t *)x)[p * C + c]) : ((const float *)x)[p * C + c];

      v -= shift[c];
      sum[c] += v;
      sq[c] += v * v;
    }
}

V_TARGET static void gn_stats(float *sum, float *sq, const void *x, enum dtype type, int64_t pixels, int64_t C,
                              const float *shift)
{
  if (type == DT_BF16)
    gn_stats_body(sum, sq, x, DT_BF16, pixels, C, shift);
  else
    gn_stats_body(sum, sq, x, DT_F32, pixels, C, shift);
}

INLINE void gn_apply_body(void *y, const void *x, enum dtype type, int64_t pixels, int64_t C, const float *scale,
                          const float *offset, int silu)
{
  for (int64_t p = 0; p < pixels; p++) {
    int64_t at = p * C, c = 0;

    for (; c + VL <= C; c += VL) {
      VEC v = V_FMA(load(x, at + c, type), V_LOAD(scale + c), V_LOAD(offset + c));

      store(y, at + c, type, silu ? v_silu(v) : v);
    }
    if (c < C) {
      VEC v = V_FMA(load_part(x, at + c, type, C - c), load_part(scale, c, DT_F32, C - c),
                    load_part(offset, c, DT_F32, C - c));

      store_part(y, at + c, type, silu ? v_silu(v) : v, C - c);
    }
  }
}

V_TARGET static void gn_apply(void *y, const void *x, enum dtype type, int64_t pixels, int64_t C, const float *scale,
                              const float *offset, int silu)
{
  if (type == DT_BF16 && silu)
    gn_apply_body(y, x, DT_BF16, pixels, C, scale, offset, 1);
  else if (type == DT_BF16)
    gn_apply_body(y, x, DT_BF16, pixels, C, scale, offset, 0);
  else
    gn_apply_body(y, x, DT_F32, pixels, C, scale, offset, silu);
}

/* Mean first, then the variance around it: the row stays in the first-level cache between the passes. */
INLINE void layernorm_row(void *y, const void *x, enum dtype type, int64_t at, int64_t D, const float *gamma, const float *beta,
                          float eps)
{
  VEC s0 = V_SET(0.0f), s1 = s0, m;
  int64_t i = 0;
  float mean, rstd;

  for (; i + 2 * VL <= D; i += 2 * VL) {
    s0 = s0 + load(x, at + i, type);
    s1 = s1 + load(x, at + i + VL, type);
  }
  for (; i < D; i += VL)
    s0 = s0 + (i + VL <= D ? load(x, at + i, type) : load_part(x, at + i, type, D - i));
  mean = sum_lanes(s0 + s1) / (float)D;
  m = V_SET(mean);
  s0 = s1 = V_SET(0.0f);
  for (i = 0; i + VL <= D; i += VL) {
    VEC d = load(x, at + i, type) - m;

    s0 = V_FMA(d, d, s0);
  }
  rstd = sum_lanes(s0);
  for (; i < D; i++) {
    float d = (type == DT_BF16 ? bf16_to_f32(((const uint16_t *)x)[at + i]) : ((const float *)x)[at + i]) - mean;

    rstd += d * d;
  }
  rstd = 1.0f / sqrtf(rstd / (float)D + eps);
  for (i = 0; i + VL <= D; i += VL)
    store(y, at + i, type, V_FMA((load(x, at + i, type) - m) * V_SET(rstd), V_LOAD(gamma + i), V_LOAD(beta + i)));
  if (i < D)
    store_part(y, at + i, type,
               V_FMA((load_part(x, at + i, type, D - i) - m) * V_SET(rstd), load_part(gamma, i, DT_F32, D - i),
                     load_part(beta, i, DT_F32, D - i)),
               D - i);
}

V_TARGET static void layernorm(void *y, const void *x, enum dtype type, int64_t rows, int64_t D, const float *gamma,
                               const float *beta, float eps)
{
  for (int64_t r = 0; r < rows; r++)
    if (type == DT_BF16)
      layernorm_row(y, x, DT_BF16, r * D, D, gamma, beta, eps);
    else
      layernorm_row(y, x, DT_F32, r * D, D, gamma, beta, eps);
}

/* ---- one number at a time ---- */

INLINE void geglu_body(void *y, const void *x, enum dtype type, int64_t rows, int64_t F)
{
  for (int64_t r = 0; r < rows; r++) {
    int64_t a = r * 2 * F, g = a + F, at = r * F, i = 0;

    for (; i + VL <= F; i += VL)
      store(y, at + i, type, load(x, a + i, type) * v_gelu(load(x, g + i, type)));
    if (i < F)
      store_part(y, at + i, type, load_part(x, a + i, type, F - i) * v_gelu(load_part(x, g + i, type, F - i)), F - i);
  }
}

V_TARGET static void geglu(void *y, const void *x, enum dtype type, int64_t rows, int64_t F)
{
  if (type == DT_BF16)
    geglu_body(y, x, DT_BF16, rows, F);
  else
    geglu_body(y, x, DT_F32, rows, F);
}

INLINE void act_body(void *y, const void *x, enum dtype type, int64_t n, enum act_kind kind)
{
  int64_t i = 0;

  for (; i + VL <= n; i += VL)
    store(y, i, type, v_act(load(x, i, type), kind));
  if (i < n)
    store_part(y, i, type, v_act(load_part(x, i, type, n - i), kind), n - i);
}

V_TARGET static void act(void *y, const void *x, enum dtype type, int64_t n, enum act_kind kind)
{
  enum dtype t = type == DT_BF16 ? DT_BF16 : DT_F32;

  if (kind == ACT_SILU)
    act_body(y, x, t, n, ACT_SILU);
  else if (kind == ACT_GELU)
    act_body(y, x, t, n, ACT_GELU);
  else
    act_body(y, x, t, n, ACT_QUICK_GELU);
}

INLINE void add_body(void *y, const void *a, const void *b, enum dtype type, int64_t n)
{
  int64_t i = 0;

  for (; i + VL <= n; i += VL)
    store(y, i, type, load(a, i, type) + load(b, i, type));
  if (i < n)
    store_part(y, i, type, load_part(a, i, type, n - i) + load_part(b, i, type, n - i), n - i);
}

V_TARGET static void add(void *y, const void *a, const void *b, enum dtype type, int64_t n)
{
  if (type == DT_BF16)
    add_body(y, a, b, DT_BF16, n);
  else
    add_body(y, a, b, DT_F32, n);
}

V_TARGET static void scale(void *y, enum dtype type, const float *x, float s, int64_t n)
{
  int64_t i = 0;

  for (; i + VL <= n; i += VL)
    store(y, i, type, V_LOAD(x + i) * V_SET(s));
  if (i < n)
    store_part(y, i, type, load_part(x, i, DT_F32, n - i) * V_SET(s), n - i);
}

/* A plain loop: the latents of a picture are 64 kB. In double, like the reference, because a sampler's errors add up. What has
 * coefficient 0 is not read. */
V_TARGET static void sampler(float *x, float *x0_old, const float *cond, const float *uncond, const float *noise,
                             const struct step_coef *c, int64_t n)
{
  for (int64_t i = 0; i < n; i++) {
    double e = cond == uncond ? (double)cond[i] : (double)uncond[i] + (double)c->guidance * ((double)cond[i] - (double)uncond[i]);
    double x0 = (double)c->x0_x * (double)x[i] + (double)c->x0_e * e;
    double next = (double)c->c_x * (double)x[i] + (double)c->c_x0 * x0;

    if (c->c_old != 0.0f)
      next += (double)c->c_old * (double)x0_old[i];
    if (noise)
      next += (double)c->c_noise * (double)noise[i];
    x[i] = (float)next;
    x0_old[i] = (float)x0;
  }
}

V_TARGET static void rgb8(uint8_t *y, const void *x, enum dtype type, int64_t n)
{
  for (int64_t i = 0; i < n; i++) {
    float v = type == DT_BF16 ? bf16_to_f32(((const uint16_t *)x)[i]) : ((const float *)x)[i];

    v = v * 0.5f + 0.5f;
    v = v > 0.0f ? v : 0.0f; /* NaN becomes 0 */
    v = v < 1.0f ? v : 1.0f;
    y[i] = (uint8_t)lrintf(v * 255.0f);
  }
}

V_TARGET static int64_t nonfinite(const void *x, enum dtype type, int64_t n)
{
  int64_t bad = 0;

  if (type == DT_BF16)
    for (int64_t i = 0; i < n; i++)
      bad += (((const uint16_t *)x)[i] & 0x7f80) == 0x7f80;
  else
    for (int64_t i = 0; i < n; i++)
      bad += (((const uint32_t *)x)[i] & 0x7f800000) == 0x7f800000;
  return bad;
}

#include "kernels/cpu/vec_attn_body.h"
#include "kernels/cpu/vec_lowrank_body.h"

const struct vec_ops V_TABLE = {
  .convert = convert,
  .gn_stats = gn_stats,
  .gn_apply = gn_apply,
  .layernorm = layernorm,
  .geglu = geglu,
  .act = act,
  .add = add,
  .scale = scale,
  .sampler = sampler,
  .rgb8 = rgb8,
  .nonfinite = nonfinite,
  .shrink = shrink,
  .expand = expand,
  .attention = attention,
};
