/*
 * synth.c - parameters drawn from their names (see checkpoint.h): the formula of tools/reference/synth.py, bit for bit.
 *
 * Called by checkpoint.c (the synthetic source) and by the test that writes checkpoint files. Threads: OpenMP over chunks of
 * one tensor; every element depends on its index alone, so the result does not depend on the number of threads.
 *
 * splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. FNV-1a: Fowler, Noll, Vo.
 */
#include <math.h>

#include "base/half.h"
#include "models/checkpoint.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

enum { CHUNK = 1 << 15 }; /* elements per task: some 50 us */

static uint64_t fnv1a64(const char *s)
{
  uint64_t h = 0xcbf29ce484222325u;

  for (; *s; s++)
    h = (h ^ (unsigned char)*s) * 0x100000001b3u;
  return h;
}

/* The uniform in [-1, 1) of element i of the stream, exact in fp32. */
static inline float uniform(uint64_t stream, uint64_t i)
{
  uint64_t z = stream + (i + 1) * 0x9e3779b97f4a7c15u;
  float u;

  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  u = (float)(int32_t)(z >> 40) * 0x1p-23f;
  return u - 1.0f;
}

static void fill_plain(uint64_t stream, float base, float scale, int64_t from, int64_t to, enum dtype type, void *out)
{
  for (int64_t i = from; i < to; i++) {
    float v = uniform(stream, (uint64_t)i) * scale;

    v += base; /* a statement of its own: never fused with the product */
    if (type == DT_F32)
      ((float *)out)[i] = v;
    else
      ((uint16_t *)out)[i] = type == DT_F16 ? f32_to_f16(v) : f32_to_bf16(v);
  }
}

#ifdef __x86_64__
/* The same for sixteen elements at a time, bit for bit: SDXL has 2.6 billion. Measured on a core of a Xeon with AMX: 860 million
 * values in 1.0 s instead of 5.1. */
#define WITH_AVX512 __attribute__((target("avx512f,avx512dq")))

WITH_AVX512 static inline __m256i mix8(__m512i z)
{
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64((int64_t)0xbf58476d1ce4e5b9u));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64((int64_t)0x94d049bb133111ebu));
  z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
  return _mm512_cvtepi64_epi32(_mm512_srli_epi64(z, 40));
}

/* Whole sixteens only; returns the first element that is left. */
WITH_AVX512 static int64_t fill_avx512(uint64_t stream, float base, float scale, int64_t from, int64_t to, enum dtype type,
                                       void *out)
{
  const uint64_t golden = 0x9e3779b97f4a7c15u;
  __m512i steps = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64((int64_t)golden));
  int64_t i;

  for (i = from; i + 16 <= to; i += 16) {
    __m512i low = _mm512_add_epi64(steps, _mm512_set1_epi64((int64_t)(stream + ((uint64_t)i + 1) * golden)));
    __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64((int64_t)(8 * golden)));
    __m512 v = _mm512_cvtepi32_ps(_mm512_inserti64x4(_mm512_castsi256_si512(mix8(low)), mix8(high), 1));
    __m512i bits;

    v = _mm512_sub_ps(_mm512_mul_ps(v, _mm512_set1_ps(0x1p-23f)), _mm512_set1_ps(1));
    v = _mm512_mul_ps(v, _mm512_set1_ps(scale));
    v = _mm512_add_ps(v, _mm512_set1_ps(base));
    if (type == DT_F32) {
      _mm512_storeu_ps((float *)out + i, v);
    } else if (type == DT_F16) {
      _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else { /* there is no NaN here */
      bits = _mm512_castps_si512(v);
      bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)),
                              _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1)));
      _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
  }
  return i;
}
#endif

static void fill_chunk(uint64_t stream, float base, float scale, int64_t from, int64_t to, enum dtype type, void *out)
{
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
    from = fill_avx512(stream, base, scale, from, to, type, out);
#endif
  fill_plain(stream, base, scale, from, to, type, out);
}

void synth_fill(const char *name, int nd, const int64_t *shape, enum dtype type, void *out)
{
  uint64_t stream = fnv1a64(name);
  size_t len = strlen(name);
  int64_t count = 1, chunks;
  float base = 0, scale = 0.05f;

  for (int i = 0; i < nd; i++)
    count *= shape[i];
  if (nd >= 2) {
    scale = (float)sqrt(3.0 / ((double)count / (double)shape[0]));
  } else if (len >= 6 && !strcmp(name + len - 6, "weight")) {
    base = 1;
    scale = 0.1f;
  }
  chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (int64_t c = 0; c < chunks; c++)
    fill_chunk(stream, base, scale, c * CHUNK, c + 1 < chunks ? (c + 1) * CHUNK : count, type, out);
}
