/*
 * normal.h - torch's normal numbers, bit for bit on every machine: its mt19937 and its Box-Muller transforms, in arithmetic that is the same
 * wherever it runs. One header for C and for the .cu files.
 *
 * torch has two ways. Sixteen values and more are made in fp32, eight pairs at a time, with Cephes' logf, sinf and cosf as its vector path for
 * processors with AVX2 evaluates them: a product whose only use is a sum is fused with it. Fewer are made in double, one pair after the other.
 * Every fused product is written as fma here, no other product meets a sum (but those that are exact), and nothing is left to a library
 * but what IEEE 754 defines (fma, sqrt, division): no compiler and no processor can come to other bits. Checked by tests/golden/test_rng.c.
 *
 * Matsumoto, Nishimura, "Mersenne twister", ACM TOMACS 8, 1998. Moshier, Cephes mathematical library, 1989. Muller, "Elementary functions", 2016.
 *
 * Callers: kernels/normal.c, kernels/cuda/normal.cu, models/rng.h. Threads: pure functions.
 */
#ifndef SAFELIGHT_KERNELS_NORMAL_H
#define SAFELIGHT_KERNELS_NORMAL_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define NORMAL_FN static __device__ __forceinline__
#else
#define NORMAL_FN static inline
#endif

enum { NORMAL_N = 624, NORMAL_M = 397, NORMAL_BLOCK = 16 };

/* A generator, also in the memory of a device: NORMAL_WORDS words of 32 bits, as a tensor (1, 1, 1, NORMAL_WORDS) I32. */
struct normal_state {
  uint32_t word[NORMAL_N];
  uint32_t next;      /* of word; NORMAL_N: all are used */
  uint32_t has_kept;  /* the way for few values keeps the second normal of a pair */
  double kept;
};

enum { NORMAL_WORDS = sizeof(struct normal_state) / 4 };

/* ---- words ---- */

/* What a word is replaced by: far is NORMAL_M places on, above the next one. */
NORMAL_FN uint32_t normal_twist(uint32_t word, uint32_t above, uint32_t far)
{
  uint32_t y = (word & 0x80000000u) | (above & 0x7fffffffu);

  return far ^ y >> 1 ^ (above & 1 ? 0x9908b0dfu : 0);
}

NORMAL_FN uint32_t normal_temper(uint32_t y)
{
  y ^= y >> 11;
  y ^= y << 7 & 0x9d2c5680u;
  y ^= y << 15 & 0xefc60000u;
  return y ^ y >> 18;
}

/* How many words the next n normals take. */
NORMAL_FN size_t normal_words(size_t n, int has_kept)
{
  if (n >= NORMAL_BLOCK)
    return n % NORMAL_BLOCK ? n + NORMAL_BLOCK : n;
  return (n + !has_kept) / 2 * 4;
}

/* ---- sixteen and more: fp32 ---- */

/* u in [2^-24, 1]. */
NORMAL_FN float normal_log_f32(float u)
{
  float e, z, y, x;
  uint32_t bits;

  memcpy(&bits, &u, 4);
  e = (float)((int)(bits >> 23) - 126);
  bits = (bits & 0x7fffffu) | 0x3f000000u; /* the mantissa as 0.5 to 1 */
  memcpy(&x, &bits, 4);
  if (x < 0.70710678f) { /* sqrt(1/2) */
    e -= 1;
    x = x - 1 + x;
  } else {
    x -= 1;
  }
  z = x * x;
  y = fmaf(7.0376836292e-2f, x, -1.1514610310e-1f);
  y = fmaf(y, x, 1.1676998740e-1f);
  y = fmaf(y, x, -1.2420140846e-1f);
  y = fmaf(y, x, 1.4249322787e-1f);
  y = fmaf(y, x, -1.6668057665e-1f);
  y = fmaf(y, x, 2.0000714765e-1f);
  y = fmaf(y, x, -2.4999993993e-1f);
  y = fmaf(y, x, 3.3333331174e-1f);
  y = fmaf(y * x, z, e * -2.12194440e-4f); /* ln 2 in two parts: this one and 0.693359375 */
  y = fmaf(z, -0.5f, y);
  return fmaf(e, 0.693359375f, x + y);
}

/* a in [0, 2 pi]. */
NORMAL_FN void normal_sincos_f32(float a, float *sine, float *cosine)
{
  int octant = ((int)(a * 1.27323954473516f) + 1) & ~1; /* 4 / pi */
  float j = (float)octant, x, z, s, c;

  x = fmaf(j, -0.78515625f, a); /* pi / 4 in three parts */
  x = fmaf(j, -2.4187564849853515625e-4f, x);
  x = fmaf(j, -3.77489497744594108e-8f, x);
  z = x * x;
  c = fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f);
  c = fmaf(c, z, 4.166664568298827e-2f);
  c = fmaf(c * z, z, z * -0.5f) + 1;
  s = fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f);
  s = fmaf(s, z, -1.6666654611e-1f);
  s = fmaf(s * z, x, x);
  *sine = octant & 2 ? c : s;
  *cosine = octant & 2 ? s : c;
  if (octant & 4)
    *sine = -*sine;
  if ((octant + 2) & 4)
    *cosine = -*cosine;
}

/* Elements j and j + 8 of a block of sixteen, from the words in their places. 1 - u keeps the logarithm away from 0. */
NORMAL_FN void normal_pair_f32(uint32_t first, uint32_t second, float *a, float *b)
{
  float u1 = 1 - (float)(first & 0xffffff) * 0x1p-24f, u2 = (float)(second & 0xffffff) * 0x1p-24f;
  float radius = sqrtf(-2 * normal_log_f32(u1)), sine, cosine;

  normal_sincos_f32(6.283185307179586f * u2, &sine, &cosine);
  *a = radius * cosine;
  *b = radius * sine;
}

/* ---- fewer: double ---- */

/* v in [2^-53, 1]: twice the series of artanh. */
NORMAL_FN double normal_log_f64(double v)
{
  double e, s, z, y;
  uint64_t bits;

  memcpy(&bits, &v, 8);
  e = (double)((int)(bits >> 52) - 1022);
  bits = (bits & 0xfffffffffffffu) | 0x3fe0000000000000u; /* the mantissa as 0.5 to 1 */
  memcpy(&v, &bits, 8);
  if (v < 0.70710678118654752440) {
    v *= 2;
    e -= 1;
  }
  s = (v - 1) / (v + 1);
  z = s * s;
  y = 1.0 / 25;
  for (int k = 23; k > 1; k -= 2)
    y = fma(y, z, 1.0 / k);
  y = fma(2 * s * z, y, e * 1.90821492927058770002e-10); /* ln 2 in two parts: this one and 6.9314718036912381649e-1 */
  return fma(e, 6.93147180369123816490e-1, fma(2.0, s, y));
}

/* a in [0, 2 pi]. */
NORMAL_FN void normal_sincos_f64(double a, double *sine, double *cosine)
{
  int quarter = (int)fma(a, 0.63661977236758134308, 0.5); /* 2 / pi */
  double x = fma(-(double)quarter, 1.57079632679489655800, a), z, s, c;

  x = fma(-(double)quarter, 6.12323399573676603587e-17, x);
  z = x * x;
  s = 1 / 355687428096000.0; /* 17! */
  c = 1 / 6402373705728000.0; /* 18! */
  s = fma(-s, z, 1 / 1307674368000.0);
  s = fma(-s, z, 1 / 6227020800.0);
  s = fma(-s, z, 1 / 39916800.0);
  s = fma(-s, z, 1 / 362880.0);
  s = fma(-s, z, 1 / 5040.0);
  s = fma(-s, z, 1 / 120.0);
  s = fma(-s, z, 1 / 6.0);
  s = fma(-s * z, x, x);
  c = fma(-c, z, 1 / 20922789888000.0);
  c = fma(-c, z, 1 / 87178291200.0);
  c = fma(-c, z, 1 / 479001600.0);
  c = fma(-c, z, 1 / 3628800.0);
  c = fma(-c, z, 1 / 40320.0);
  c = fma(-c, z, 1 / 720.0);
  c = fma(-c, z, 1 / 24.0);
  c = fma(-c, z, 0.5);
  c = fma(-c, z, 1.0);
  *sine = quarter & 1 ? c : s;
  *cosine = quarter & 1 ? s : c;
  if (quarter & 2)
    *sine = -*sine;
  if ((quarter + 1) & 2)
    *cosine = -*cosine;
}

/* [0, 1) with 53 bits; the first word is the high half. */
NORMAL_FN double normal_uniform_f64(const uint32_t *word)
{
  uint64_t bits = (uint64_t)word[0] << 32 | word[1];

  return (double)(bits & ((1ull << 53) - 1)) * 0x1p-53;
}

/* A pair from four words. 1 - u has no rounding, so that its logarithm is log1p(-u). */
NORMAL_FN void normal_pair_f64(const uint32_t *word, double *a, double *b)
{
  double radius = sqrt(-2 * normal_log_f64(1 - normal_uniform_f64(word + 2))), sine, cosine;

  normal_sincos_f64(6.283185307179586476925286766559 * normal_uniform_f64(word), &sine, &cosine);
  *a = radius * cosine;
  *b = radius * sine;
}

/* The next n < 16 normals from normal_words(n, has_kept) words. */
NORMAL_FN void normal_few(uint32_t *has_kept, double *kept, const uint32_t *word, float *out, size_t n)
{
  for (size_t i = 0; i < n; i++) {
    double now = *kept;

    if (!*has_kept) {
      normal_pair_f64(word, &now, kept);
      word += 4;
    }
    *has_kept = !*has_kept;
    out[i] = (float)now;
  }
}

/* ---- host memory: normal.c ---- */

#ifdef __cplusplus
extern "C" {
#endif

/* The next word. */
uint32_t normal_next(struct normal_state *s);
/* What torch.randn(n, generator) returns next. */
void normal_fill(struct normal_state *s, float *out, size_t n);
/* y (pixels, C) = scale * what torch.randn(C, pixels, generator) returns next. work: pixels * C floats. */
void normal_fill_pixels(struct normal_state *s, float *y, size_t pixels, size_t C, float scale, float *work);

#ifdef __cplusplus
}
#endif

#endif
