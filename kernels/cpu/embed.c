/*
 * embed.c - where numbers enter the networks: token and timestep embeddings of be_cpu.
 *
 * Both are tiny (a few thousand numbers a request or step): plain loops in fp32 and double, no threads of their own.
 * Callers: be_cpu.c. Threads: the owner's.
 */
#include <assert.h>
#include <math.h>

#include "kernels/cpu/cpu.h"

enum { PIECE = 512 /* numbers on the stack at a time */ };

int cpu_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t D = y.d[3], half = D / 2, B = tensor_rows(y);
  size_t size = dtype_size(y.type);

  (void)e;
  assert(D % 2 == 0 && (y.type == DT_F32 || y.type == c->act));
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < half; i++) {
      /* Rounded to fp32 where diffusers rounds: late timesteps turn an ulp of the frequency into 1e-4 of the angle. */
      float exponent = -9.210340371976184f * (float)i / ((float)half - freq_shift); /* ln(10000) */
      float f = (float)exp((double)exponent), angle = t[b] * f;
      float s = (float)sin((double)angle), k = (float)cos((double)angle);
      char *row = (char *)y.p + (size_t)(b * D) * size;

      c->vec->convert(row + (size_t)i * size, y.type, flip_sin_to_cos ? &k : &s, DT_F32, 1);
      c->vec->convert(row + (size_t)(half + i) * size, y.type, flip_sin_to_cos ? &s : &k, DT_F32, 1);
    }
  return 0;
}

int cpu_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens, const struct weight *positions,
              struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t T = y.d[2], D = y.d[3], rows = tensor_rows(y);
  size_t ts = dtype_size(tokens->table_type), ps = dtype_size(positions->table_type), size = dtype_size(y.type);

  (void)e;
  assert(tokens->kind == WEIGHT_TABLE && positions->kind == WEIGHT_TABLE && y.type == c->act);
  assert(tokens->out == D && positions->out == D && positions->in >= T);
  for (int64_t r = 0; r < rows; r++) {
    assert(ids[r] >= 0 && ids[r] < tokens->in);
    for (int64_t i = 0; i < D; i += PIECE) {
      size_t n = (size_t)(D - i < PIECE ? D - i : PIECE);
      float a[PIECE], b[PIECE];

      c->vec->convert(a, DT_F32, (const char *)tokens->table + (size_t)(ids[r] * D + i) * ts, tokens->table_type, n);
      c->vec->convert(b, DT_F32, (const char *)positions->table + (size_t)(r % T * D + i) * ps, positions->table_type, n);
      for (size_t j = 0; j < n; j++)
        a[j] += b[j];
      c->vec->convert((char *)y.p + (size_t)(r * D + i) * size, y.type, a, DT_F32, n);
    }
  }
  return 0;
}
