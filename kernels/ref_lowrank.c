/*
 * ref_lowrank.c - be_ref's low-rank factors beside a linear or a convolution: y += up (down x), in double. See ref.h.
 *
 * For every output pixel z = down x, one sum per rank over the pixels that the kernel sees, then every number of y is raised by
 * up z and rounded once. Both factors lie with the index of the sum outermost, so that the inner loops run along memory.
 *
 * Called through be_ref's table. Threads: see ref.h; output pixels are split.
 */
#include "kernels/ref.h"

#include <assert.h>
#include <omp.h>
#include <stdlib.h>

struct lowrank {
  int64_t out, in, rank;
  int kh, kw, stride, pad_lo, pad_hi; /* a linear is a 1x1 convolution: 1 1 1 0 0 */
  float *down;                        /* (kh*kw, in, rank) */
  float *up;                          /* (rank, out) */
};

void ref_lowrank_free(struct be *be, struct lowrank *l)
{
  (void)be;
  if (!l)
    return;
  free(l->down);
  free(l->up);
  free(l);
}

int ref_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **out, struct err *e)
{
  int is_conv = d->kh > 0;
  struct lowrank *l = calloc(1, sizeof *l);
  int64_t taps;

  assert(d->out > 0 && d->in > 0 && d->rank > 0 && d->down && d->up);
  assert(!is_conv || (d->kw > 0 && d->stride > 0 && d->pad_lo >= 0 && d->pad_hi >= 0));
  *out = NULL;
  if (!l)
    return err_set(e, E_NOMEM, "out of memory for low-rank factors");
  *l = (struct lowrank){.out = d->out, .in = d->in, .rank = d->rank, .kh = 1, .kw = 1, .stride = 1};
  if (is_conv) {
    l->kh = d->kh;
    l->kw = d->kw;
    l->stride = d->stride;
    l->pad_lo = d->pad_lo;
    l->pad_hi = d->pad_hi;
  }
  taps = (int64_t)l->kh * l->kw;
  l->down = malloc((size_t)(taps * l->in * l->rank) * sizeof *l->down);
  l->up = malloc((size_t)(l->rank * l->out) * sizeof *l->up);
  if (!l->down || !l->up) {
    ref_lowrank_free(be, l);
    return err_set(e, E_NOMEM, "out of memory for low-rank factors of rank %lld", (long long)d->rank);
  }
  for (int64_t r = 0; r < l->rank; r++) {
    for (int64_t i = 0; i < l->in; i++)
      for (int64_t t = 0; t < taps; t++)
        l->down[(t * l->in + i) * l->rank + r] = d->down[(r * l->in + i) * taps + t];
    for (int64_t o = 0; o < l->out; o++)
      l->up[r * l->out + o] = d->up[o * l->rank + r];
  }
  *out = l;
  return 0;
}

/* z (rank) = down of what output pixel (oy, ox) of picture x (H, W, in) sees. */
static void shrink(double *z, const float *x, int64_t H, int64_t W, const struct lowrank *l, int64_t oy, int64_t ox)
{
  for (int64_t r = 0; r < l->rank; r++)
    z[r] = 0;
  for (int t = 0; t < l->kh * l->kw; t++) {
    int64_t iy = oy * l->stride - l->pad_lo + t / l->kw, ix = ox * l->stride - l->pad_lo + t % l->kw;

    if (iy < 0 || iy >= H || ix < 0 || ix >= W)
      continue;
    for (int64_t i = 0; i < l->in; i++) {
      double v = (double)x[(iy * W + ix) * l->in + i];
      const float *d = l->down + (t * l->in + i) * l->rank;

      for (int64_t r = 0; r < l->rank; r++)
        z[r] += v * (double)d[r];
    }
  }
}

/* y (out) += up z; sum: out doubles of working memory. */
static void expand(float *y, const double *z, const struct lowrank *l, double *sum)
{
  for (int64_t o = 0; o < l->out; o++)
    sum[o] = (double)y[o];
  for (int64_t r = 0; r < l->rank; r++)
    for (int64_t o = 0; o < l->out; o++)
      sum[o] += z[r] * (double)l->up[r * l->out + o];
  for (int64_t o = 0; o < l->out; o++)
    y[o] = (float)sum[o];
}

/* A linear does not care how the rows of a picture are arranged. */
static int is_linear(const struct lowrank *l)
{
  return l->kh == 1 && l->kw == 1 && l->stride == 1 && l->pad_lo == 0 && l->pad_hi == 0;
}

static void check(struct tensor y, struct tensor x, const struct lowrank *l)
{
  assert(x.d[3] == l->in && y.d[3] == l->out);
  if (is_linear(l))
    assert(y.d[1] * y.d[2] == x.d[1] * x.d[2]);
  else
    assert(y.d[1] == (x.d[1] + l->pad_lo + l->pad_hi - l->kh) / l->stride + 1 &&
           y.d[2] == (x.d[2] + l->pad_lo + l->pad_hi - l->kw) / l->stride + 1);
}

int ref_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  int64_t pixels = y.d[1] * y.d[2], most = 0, lane;
  double *scratch;

  assert(x.type == DT_F32 && y.type == DT_F32 && y.d[0] % x.d[0] == 0);
  for (int64_t b = 0; b < y.d[0]; b++)
    if (row[b]) {
      check(y, x, row[b]);
      most = row[b]->rank > most ? row[b]->rank : most;
    }
  lane = most + y.d[3]; /* per thread: z and the sums of a pixel */
  scratch = ref_scratch(be, (size_t)(be->threads * lane) * sizeof *scratch, e);
  if (!scratch)
    return E_NOMEM;
  for (int64_t b = 0; b < y.d[0]; b++) {
    const float *px = (const float *)x.p + b % x.d[0] * x.d[1] * x.d[2] * x.d[3];
    float *py = (float *)y.p + b * pixels * y.d[3];
    int flat = row[b] && is_linear(row[b]);
    int64_t H = flat ? 1 : x.d[1], W = flat ? pixels : x.d[2], Wo = flat ? pixels : y.d[2];

    if (!row[b])
      continue;
#pragma omp parallel for schedule(static) num_threads(be->threads)
    for (int64_t i = 0; i < pixels; i++) {
      double *z = scratch + omp_get_thread_num() * lane;

      shrink(z, px, H, W, row[b], i / Wo, i % Wo);
      expand(py + i * y.d[3], z, row[b], z + most);
    }
  }
  return 0;
}
