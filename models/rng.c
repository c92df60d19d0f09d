/*
 * rng.c - see rng.h. No state beside the struct.
 */
#include "models/rng.h"

void rng_seed(struct rng *r, uint64_t seed)
{
  uint32_t *word = r->state.word;

  word[0] = (uint32_t)seed; /* torch keeps the low 32 bits */
  for (uint32_t i = 1; i < NORMAL_N; i++)
    word[i] = 1812433253u * (word[i - 1] ^ word[i - 1] >> 30) + i;
  r->state.next = NORMAL_N;
  r->state.has_kept = 0;
  r->state.kept = 0;
}

uint32_t rng_u32(struct rng *r)
{
  return normal_next(&r->state);
}

void rng_randn(struct rng *r, float *out, size_t n)
{
  normal_fill(&r->state, out, n);
}
