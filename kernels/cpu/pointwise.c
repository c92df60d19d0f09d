/*
 * pointwise.c - the ops of be_cpu that touch each number once: activations, sums, copies, the sampler's step, pixels.
 *
 * All of them are bound by memory. Work is split into contiguous runs, one per thread. Callers: be_cpu.c. Threads: the owner's.
 */
#include <assert.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

/* Runs `body` for each thread's part [from, to) of n items, cut at multiples of 64 so that no cache line is shared. */
#define SPLIT(threads, n, body)                                                       \
  do {                                                                                \
    int threads_ = (threads);                                                         \
    int64_t n_ = (n);                                                                 \
    _Pragma("omp parallel for num_threads(threads_) schedule(static) if (threads_ > 1)") \
    for (int i_ = 0; i_ < threads_; i_++) {                                           \
      int64_t from, to;                                                               \
                                                                                      \
      cpu_split(n_, 64, i_, threads_, &from, &to);                                    \
      body;                                                                           \
    }                                                                                 \
  } while (0)

static int is_float(enum dtype t)
{
  return t == DT_F32 || t == DT_BF16;
}

void cpu_copy(const struct cpu *c, void *dst, const void *src, size_t bytes)
{
  SPLIT(cpu_threads(c, (double)bytes * 0.1), (int64_t)bytes,
        memcpy((char *)dst + from, (const char *)src + from, (size_t)(to - from)));
}

int cpu_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t F = y.d[3], rows = tensor_rows(y);
  int threads = cpu_threads(c, (double)tensor_count(y) * 0.8);
  size_t size = dtype_size(c->act);

  (void)e;
  assert(x.d[3] == 2 * F && tensor_rows(x) == rows && x.type == c->act && y.type == c->act);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++) {
    int64_t from, to;

    cpu_split(rows, 1, i, threads, &from, &to);
    c->vec->geglu((char *)y.p + (size_t)(from * F) * size, (const char *)x.p + (size_t)(from * 2 * F) * size, c->act,
                  to - from, F);
  }
  return 0;
}

int cpu_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t n = tensor_count(x);
  size_t size = dtype_size(c->act);

  (void)e;
  assert(x.type == c->act && y.type == c->act && tensor_count(y) == n);
  SPLIT(cpu_threads(c, (double)n * 0.5), n,
        c->vec->act((char *)y.p + (size_t)from * size, (const char *)x.p + (size_t)from * size, c->act, to - from, kind));
  return 0;
}

int cpu_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t n = tensor_count(y);
  size_t size = dtype_size(y.type);

  (void)e;
  assert(is_float(y.type) && a.type == y.type && b.type == y.type && tensor_count(a) == n && tensor_count(b) == n);
  SPLIT(cpu_threads(c, (double)n * 0.2), n,
        c->vec->add((char *)y.p + (size_t)from * size, (const char *)a.p + (size_t)from * size,
                    (const char *)b.p + (size_t)from * size, y.type, to - from));
  return 0;
}

int cpu_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  struct cpu *c = cpu_of(be);
  size_t wa = (size_t)a.d[3] * dtype_size(y.type), wb = (size_t)b.d[3] * dtype_size(y.type);
  int64_t rows = tensor_rows(y);
  int threads = cpu_threads(c, (double)tensor_count(y) * 0.2);

  (void)e;
  assert(y.d[3] == a.d[3] + b.d[3] && tensor_rows(a) == rows && tensor_rows(b) == rows);
  assert(a.type == y.type && b.type == y.type);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++) {
    int64_t from, to;

    cpu_split(rows, 1, i, threads, &from, &to);
    for (int64_t r = from; r < to; r++) {
      char *row = (char *)y.p + (size_t)r * (wa + wb);

      memcpy(row, (const char *)a.p + (size_t)r * wa, wa);
      memcpy(row + wa, (const char *)b.p + (size_t)r * wb, wb);
    }
  }
  return 0;
}

int cpu_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  struct cpu *c = cpu_of(be);
  size_t pixel = (size_t)x.d[3] * dtype_size(x.type), line = pixel * (size_t)y.d[2];
  int64_t H = x.d[1], lines = x.d[0] * H, W = x.d[2], Ho = y.d[1];
  int odd = (int)(y.d[2] % 2);
  int threads = cpu_threads(c, (double)tensor_count(y) * 0.2);

  (void)e;
  assert(y.d[0] == x.d[0] && (Ho + 1) / 2 == H && (y.d[2] + 1) / 2 == W && y.d[3] == x.d[3] && y.type == x.type);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++) {
    int64_t from, to;

    cpu_split(lines, 1, i, threads, &from, &to);
    for (int64_t h = from; h < to; h++) {
      int64_t b = h / H, row = b * Ho + h % H * 2;
      char *out = (char *)y.p + (size_t)row * line;
      const char *in = (const char *)x.p + (size_t)(h * W) * pixel;

      for (int64_t w = 0; w < W; w++) {
        memcpy(out + (size_t)w * 2 * pixel, in + (size_t)w * pixel, pixel);
        if (!odd || w + 1 < W)
          memcpy(out + (size_t)w * 2 * pixel + pixel, in + (size_t)w * pixel, pixel);
      }
      if (row + 1 < (b + 1) * Ho)
        memcpy(out + line, out, line);
    }
  }
  return 0;
}

int cpu_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t row = tensor_count(y) / y.d[0];

  (void)e;
  assert(x.type == DT_F32 && y.type == c->act && tensor_count(x) / x.d[0] == row);
  for (int64_t b = 0; b < y.d[0]; b++) {
    assert(src[b] >= 0 && src[b] < x.d[0]);
    c->vec->scale((char *)y.p + (size_t)(b * row) * dtype_size(y.type), y.type, (const float *)x.p + src[b] * row, scale[b],
                  row);
  }
  return 0;
}

int cpu_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                     const struct step_coef *coef, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t row = tensor_count(x) / x.d[0];

  (void)e;
  assert(x.type == DT_F32 && x0_old.type == DT_F32 && model.type == DT_F32 && (!noise.p || noise.type == DT_F32));
  assert(tensor_count(x0_old) == tensor_count(x) && tensor_count(model) / model.d[0] == row);
  assert(!noise.p || tensor_count(noise) == tensor_count(x));
  for (int64_t b = 0; b < x.d[0]; b++) {
    const struct step_coef *k = &coef[b];

    assert(k->row_cond >= 0 && k->row_cond < model.d[0] && k->row_uncond >= 0 && k->row_uncond < model.d[0]);
    assert(noise.p || k->c_noise == 0.0f);
    c->vec->sampler((float *)x.p + b * row, (float *)x0_old.p + b * row, (const float *)model.p + k->row_cond * row,
                    (const float *)model.p + k->row_uncond * row, k->c_noise != 0.0f ? (const float *)noise.p + b * row : NULL, k,
                    row);
  }
  return 0;
}

int cpu_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c, struct err *e)
{
  int64_t n = x.d[1] * x.d[2], C = x.d[3];

  (void)be, (void)e;
  assert(x.type == DT_F32 && a.type == DT_F32 && b.type == DT_F32 && tensor_count(a) == tensor_count(x) && tensor_count(b) == tensor_count(x));
  assert(mask.type == DT_U8 && mask.d[3] == 1 && tensor_rows(mask) == x.d[0] * n);
  for (int64_t i = 0; i < x.d[0] * n; i++) { /* a latent is small: one thread */
    const float *pa = (const float *)a.p + i * C, *pb = (const float *)b.p + i * C;
    double ka = (double)c[i / n].a, kb = (double)c[i / n].b;

    if (((const uint8_t *)mask.p)[i])
      continue;
    for (int64_t k = 0; k < C; k++)
      ((float *)x.p)[i * C + k] = (float)((ka != 0 ? ka * (double)pa[k] : 0) + (kb != 0 ? kb * (double)pb[k] : 0));
  }
  return 0;
}

int cpu_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  int64_t n = y.d[1] * y.d[2], C = y.d[3];
  struct normal_state *s = state.p;
  void *work;
  int r;

  assert(y.type == DT_F32 && state.type == DT_I32 && state.d[0] == y.d[0] && tensor_count(state) == y.d[0] * NORMAL_WORDS);
  r = cpu_scratch(cpu_of(be), (size_t)(n * C) * sizeof(float), &work, e);
  for (int64_t b = 0; b < y.d[0] && !r; b++)
    normal_fill_pixels(&s[b], (float *)y.p + b * n * C, (size_t)n, (size_t)C, scale, work);
  return r;
}

int cpu_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t n = tensor_count(x);
  size_t size = dtype_size(x.type);

  (void)e;
  assert(y.type == DT_U8 && is_float(x.type) && tensor_count(y) == n);
  SPLIT(cpu_threads(c, (double)n * 1.0), n,
        c->vec->rgb8((uint8_t *)y.p + from, (const char *)x.p + (size_t)from * size, x.type, to - from));
  return 0;
}

int cpu_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e)
{
  (void)e;
  assert(is_float(x.type));
  *bad = cpu_of(be)->vec->nonfinite(x.p, x.type, tensor_count(x));
  return 0;
}
