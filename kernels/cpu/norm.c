/*
 * norm.c - group and layer normalisation of be_cpu.
 *
 * GroupNorm over channels-last pictures: the sums are kept per channel, which is contiguous, and folded into groups at the
 * end. They are sums of x - shift, where shift is the channel's first pixel: then mean^2 does not swallow the variance however
 * far the data lies from zero. Pictures are cut into fixed chunks of pixels, summed in fp32 within a chunk and in double
 * across chunks; the cut depends on the picture alone, so its bits do not depend on the batch or on the threads. The time
 * embedding is added to every pixel of a channel, so it only moves the channel's mean: it costs nothing per pixel.
 *
 * Bound: memory. One read for the sums, one read and one write to apply. Callers: be_cpu.c. Threads: the owner's.
 */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { GN_PIXELS = 256 /* per chunk, fewer only in the last one */ };

struct gn {
  const struct cpu *c;
  const char *x;
  char *y;
  const float *gamma, *beta;
  const void *temb;        /* (B, C) of type act, or NULL */
  int64_t pixels, C, chunks;
  int groups, silu;
  float eps;
  float *partial;          /* (B, chunks, 2, C): sum and sum of squares of x - shift */
  float *shift;            /* (B, C) */
  float *coef;             /* (B, 2, C): scale and offset */
};

static void gn_shift(const struct gn *g, int64_t b)
{
  size_t size = dtype_size(g->c->act);

  g->c->vec->convert(g->shift + b * g->C, DT_F32, g->x + (size_t)(b * g->pixels * g->C) * size, g->c->act, (size_t)g->C);
}

static void gn_chunk(const struct gn *g, int64_t b, int64_t chunk)
{
  float *sum = g->partial + (b * g->chunks + chunk) * 2 * g->C;
  int64_t from = chunk * GN_PIXELS, n = g->pixels - from < GN_PIXELS ? g->pixels - from : GN_PIXELS;

  memset(sum, 0, (size_t)(2 * g->C) * sizeof *sum);
  g->c->vec->gn_stats(sum, sum + g->C, g->x + (size_t)((b * g->pixels + from) * g->C) * dtype_size(g->c->act), g->c->act, n,
                      g->C, g->shift + b * g->C);
}

/* Folds the chunks of picture b into one scale and one offset per channel. Until the group is known, the channel's time
 * embedding waits in the scale row and its mean in the offset row. */
static void gn_fold(const struct gn *g, int64_t b)
{
  const float *partial = g->partial + b * g->chunks * 2 * g->C, *shift = g->shift + b * g->C;
  float *scale = g->coef + b * 2 * g->C, *offset = scale + g->C;
  int64_t per = g->C / g->groups;
  double n = (double)g->pixels;

  memset(scale, 0, (size_t)g->C * sizeof *scale);
  if (g->temb)
    g->c->vec->convert(scale, DT_F32, (const char *)g->temb + (size_t)(b * g->C) * dtype_size(g->c->act), g->c->act,
                       (size_t)g->C);
  for (int64_t c0 = 0; c0 < g->C; c0 += per) {
    double mean = 0, m2 = 0, rstd;

    for (int64_t c = c0; c < c0 + per; c++) {
      double s = 0, q = 0;

      for (int64_t k = 0; k < g->chunks; k++) {
        s += (double)partial[k * 2 * g->C + c];
        q += (double)partial[k * 2 * g->C + g->C + c];
      }
      m2 += q - s * s / n; /* around the channel's own mean */
      offset[c] = (float)(s / n + (double)shift[c] + (double)scale[c]);
      mean += (double)offset[c];
    }
    mean /= (double)per;
    for (int64_t c = c0; c < c0 + per; c++)
      m2 += n * ((double)offset[c] - mean) * ((double)offset[c] - mean);
    m2 = m2 < 0.0 ? 0.0 : m2; /* a NaN stays */
    rstd = 1.0 / sqrt(m2 / (n * (double)per) + (double)g->eps);
    for (int64_t c = c0; c < c0 + per; c++) {
      offset[c] = (float)((double)g->beta[c] + ((double)scale[c] - mean) * rstd * (double)g->gamma[c]);
      scale[c] = (float)((double)g->gamma[c] * rstd);
    }
  }
}

static void gn_apply(const struct gn *g, int64_t b, int64_t from, int64_t n)
{
  size_t at = (size_t)((b * g->pixels + from) * g->C) * dtype_size(g->c->act);
  const float *scale = g->coef + b * 2 * g->C;

  g->c->vec->gn_apply(g->y + at, g->x + at, g->c->act, n, g->C, scale, scale + g->C, g->silu);
}

/* One thread's share: whole pictures when there are enough (then nothing waits), else chunks of each with barriers between. */
static void gn_pictures(const struct gn *g, int64_t from, int64_t to)
{
  for (int64_t b = from; b < to; b++) {
    gn_shift(g, b);
    for (int64_t k = 0; k < g->chunks; k++)
      gn_chunk(g, b, k);
    gn_fold(g, b);
    gn_apply(g, b, 0, g->pixels);
  }
}

static void gn_shared(const struct gn *g, int64_t B, int threads)
{
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++)
      gn_shift(g, b);
#pragma omp for schedule(static) collapse(2)
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < g->chunks; k++)
        gn_chunk(g, b, k);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < B; b++)
      gn_fold(g, b);
#pragma omp for schedule(static) collapse(2)
    for (int64_t b = 0; b < B; b++)
      for (int64_t k = 0; k < g->chunks; k++)
        gn_apply(g, b, k * GN_PIXELS, g->pixels - k * GN_PIXELS < GN_PIXELS ? g->pixels - k * GN_PIXELS : GN_PIXELS);
  }
}

int cpu_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w, int groups,
                  float eps, int silu, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t B = x.d[0], C = x.d[3], pixels = x.d[1] * x.d[2], chunks = (pixels + GN_PIXELS - 1) / GN_PIXELS;
  int threads = cpu_threads(c, (double)tensor_count(x) * (silu ? 1.0 : 0.6));
  size_t floats = (size_t)(B * (chunks * 2 + 3) * C);
  struct gn g = {c, x.p, y.p, w->gamma, w->bias, temb.p, pixels, C, chunks, groups, silu, eps, NULL, NULL, NULL};
  void *s;
  int rc;

  assert(w->kind == WEIGHT_NORM && w->out == C && groups > 0 && C % groups == 0);
  assert(x.type == c->act && y.type == c->act && tensor_count(y) == tensor_count(x));
  assert(!temb.p || (temb.type == c->act && tensor_count(temb) == B * C));
  rc = cpu_scratch(c, floats * sizeof(float), &s, e);
  if (rc)
    return rc;
  g.partial = s;
  g.shift = g.partial + B * chunks * 2 * C;
  g.coef = g.shift + B * C;
  if (threads == 1) {
    gn_pictures(&g, 0, B);
  } else if (B % threads == 0) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < threads; i++)
      gn_pictures(&g, B / threads * i, B / threads * (i + 1));
  } else {
    gn_shared(&g, B, threads);
  }
  return 0;
}

int cpu_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e)
{
  struct cpu *c = cpu_of(be);
  int64_t rows = tensor_rows(x), D = x.d[3];
  int threads = cpu_threads(c, (double)tensor_count(x) * 0.4);
  size_t row_bytes = (size_t)D * dtype_size(c->act);

  (void)e;
  assert(w->kind == WEIGHT_NORM && w->out == D && x.type == c->act && y.type == c->act && tensor_count(y) == tensor_count(x));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++) {
    int64_t from, to;

    cpu_split(rows, 1, i, threads, &from, &to);
    c->vec->layernorm((char *)y.p + (size_t)from * row_bytes, (const char *)x.p + (size_t)from * row_bytes, c->act, to - from,
                      D, w->gamma, w->bias, eps);
  }
  return 0;
}
