/*
 * rng.c - see rng.h. Called by pipeline.c and tests. No state beside the struct.
 *
 * Uniforms and the normals of short tensors are bit-exact. The normals of long ones are torch's to 4.8e-7: torch has two
 * paths with other approximations of log, sin and cos. We follow the one that vector machines take (an angle rounded to fp32
 * before and after the product with 2 pi), since nobody draws pictures on the other, which differs from it by 2.3e-6.
 *
 * Matsumoto, Nishimura, "Mersenne twister", ACM TOMACS 8, 1998; constants as in the authors' mt19937ar.c.
 */
#include "models/rng.h"

#include <math.h>

enum { N = 624, M = 397, BLOCK = 16 };

static const double two_pi = 6.283185307179586476925286766559;
static const float two_pi_f32 = 6.283185307179586476925286766559f;

void rng_seed(struct rng *r, uint64_t seed)
{
  r->state[0] = (uint32_t)seed; /* torch keeps the low 32 bits */
  for (uint32_t i = 1; i < N; i++)
    r->state[i] = 1812433253u * (r->state[i - 1] ^ r->state[i - 1] >> 30) + i;
  r->next = N;
  r->has_cached = 0;
  r->cached = 0;
}

static uint32_t twist(uint32_t high, uint32_t low)
{
  uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);

  return y >> 1 ^ (low & 1 ? 0x9908b0dfu : 0);
}

static void refill(struct rng *r)
{
  for (int i = 0; i < N; i++)
    r->state[i] = r->state[(i + M) % N] ^ twist(r->state[i], r->state[(i + 1) % N]);
  r->next = 0;
}

uint32_t rng_u32(struct rng *r)
{
  uint32_t y;

  if (r->next == N)
    refill(r);
  y = r->state[r->next++];
  y ^= y >> 11;
  y ^= y << 7 & 0x9d2c5680u;
  y ^= y << 15 & 0xefc60000u;
  return y ^ y >> 18;
}

/* [0, 1) with 24 bits. */
static float uniform_f32(struct rng *r)
{
  return (float)(rng_u32(r) & 0xffffff) * 0x1p-24f;
}

/* [0, 1) with 53 bits; the first word is the high half. */
static double uniform_f64(struct rng *r)
{
  uint64_t high = rng_u32(r), low = rng_u32(r);

  return (double)((high << 32 | low) & ((1ull << 53) - 1)) * 0x1p-53;
}

/* at::normal_distribution<double>: two normals per pair of uniforms, the second kept for the next call. */
static float normal_one(struct rng *r)
{
  double u1, u2, radius;

  if (r->has_cached) {
    r->has_cached = 0;
    return (float)r->cached;
  }
  u1 = uniform_f64(r);
  u2 = uniform_f64(r);
  radius = sqrt(-2.0 * log1p(-u2));
  r->cached = radius * sin(two_pi * u1);
  r->has_cached = 1;
  return (float)(radius * cos(two_pi * u1));
}

/* normal_fill_16: element j and j + 8 of the block are one pair. 1 - u keeps the logarithm away from 0. */
static void box_muller(float *v)
{
  for (int j = 0; j < BLOCK / 2; j++) {
    float u1 = 1 - v[j], u2 = v[j + 8];
    float radius = sqrtf(-2 * logf(u1)), theta = two_pi_f32 * u2;

    v[j] = radius * cosf(theta);
    v[j + 8] = radius * sinf(theta);
  }
}

void rng_randn(struct rng *r, float *out, size_t n)
{
  if (n < BLOCK) {
    for (size_t i = 0; i < n; i++)
      out[i] = normal_one(r);
    return;
  }
  for (size_t i = 0; i < n; i++) /* all uniforms are drawn before the first is used */
    out[i] = uniform_f32(r);
  for (size_t i = 0; i + BLOCK <= n; i += BLOCK)
    box_muller(out + i);
  if (n % BLOCK) { /* the last 16 anew, over what was there */
    for (size_t i = n - BLOCK; i < n; i++)
      out[i] = uniform_f32(r);
    box_muller(out + n - BLOCK);
  }
}
