/*
 * half.h - fp16 and bf16 as 16-bit patterns, one number at a time.
 *
 * Exact and portable: rounding to nearest, ties to even, subnormals kept, overflow to infinity, NaN stays a (quiet) NaN, so
 * that the bits equal torch's `.to(torch.float16)` and `.to(torch.bfloat16)`. For loading, tests and the reference backend;
 * fast paths have their own instructions. Threads: pure functions.
 */
#ifndef SAFELIGHT_BASE_HALF_H
#define SAFELIGHT_BASE_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t f32_bits(float f)
{
  uint32_t u;

  memcpy(&u, &f, sizeof u);
  return u;
}

static inline float f32_from_bits(uint32_t u)
{
  float f;

  memcpy(&f, &u, sizeof f);
  return f;
}

static inline uint16_t f32_to_f16(float f)
{
  uint32_t u = f32_bits(f), sign = u & 0x80000000u, h;

  u ^= sign;
  if (u >= 143u << 23) /* 65536 and up, infinities, NaN */
    h = u > 255u << 23 ? 0x7e00 : 0x7c00;
  else if (u < 113u << 23) /* a subnormal half or zero: adding 0.5 lets the FPU shift and round it into the low bits */
    h = f32_bits(f32_from_bits(u) + 0.5f) - f32_bits(0.5f);
  else /* rebias the exponent; 0xfff + (odd?) rounds to even and may carry into the exponent, as it should */
    h = (u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13;
  return (uint16_t)(h | sign >> 16);
}

static inline float f16_to_f32(uint16_t h)
{
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;

  if (exponent == 0) /* zero and subnormals: mantissa * 2^-24, exact */
    return f32_from_bits(f32_bits((float)mantissa * 0x1p-24f) | sign);
  if (exponent == 31)
    return f32_from_bits(sign | 0x7f800000u | mantissa << 13);
  return f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline uint16_t f32_to_bf16(float f)
{
  uint32_t u = f32_bits(f);

  if ((u & 0x7fffffffu) > 0x7f800000u)
    return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float bf16_to_f32(uint16_t b)
{
  return f32_from_bits((uint32_t)b << 16);
}

#endif
