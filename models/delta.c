/*
 * delta.c - what one delta adds to the weight of its site, and how much that is.
 *
 * The weight is walked in pieces of a row, in double, without allocating: delta_apply is void and may not fail. DoRA needs the norm of
 * a whole row or column of W0 + dW before its first number, so its walk computes the factors' product twice.
 *
 * Called by generation.c, guard.c, merge.c and the adapter reader. Threads: pure functions.
 * Sources: PEFT (tuners/lora/dora.py: norm per output row), LyCORIS (modules/locon.py: norm per input column).
 */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "models/adapter_impl.h"

enum { CHUNK = 256 }; /* numbers of a row in flight */

/* Where the walk goes. */
struct sink {
  float *w;                 /* NULL: only the norm is wanted */
  double weight, squares;
};

static void sink_take(struct sink *k, int64_t at, const double *dw, int64_t n)
{
  int64_t i;

  for (i = 0; i < n; i++)
    k->squares += dw[i] * dw[i];
  for (i = 0; i < n && k->w; i++)
    k->w[at + i] = (float)(k->w[at + i] + k->weight * dw[i]);
}

/* v = scale * up down, or scale * dense: n numbers of row o from column c. */
static void product(const struct delta *d, int64_t cols, int64_t o, int64_t c, int64_t n, double *v)
{
  int64_t i, r;

  if (d->dense) {
    for (i = 0; i < n; i++)
      v[i] = (double)d->scale * d->dense[o * cols + c + i];
    return;
  }
  memset(v, 0, (size_t)n * sizeof *v);
  for (r = 0; r < d->rank; r++) {
    const float *down = d->down + r * cols + c;
    double up = d->up[o * d->rank + r];

    for (i = 0; i < n; i++)
      v[i] += up * down[i];
  }
  for (i = 0; i < n; i++)
    v[i] *= d->scale;
}

static void walk_plain(const struct delta *d, const struct site *s, const float *w0, struct sink *k)
{
  int64_t cols = site_columns(s), o, c, i, n;
  double v[CHUNK];

  for (o = 0; o < s->out; o++)
    for (c = 0; c < cols; c += CHUNK) {
      n = cols - c < CHUNK ? cols - c : CHUNK;
      if (d->kind == DELTA_REPLACE)
        for (i = 0; i < n; i++)
          v[i] = (double)d->dense[o * cols + c + i] - w0[o * cols + c + i];
      else
        product(d, cols, o, c, n, v);
      sink_take(k, o * cols + c, v, n);
    }
}

/* What W0 + dW of this norm is multiplied by; a direction of no length stays 0. */
static double stretch(double squares, float magnitude)
{
  return squares > 0 ? magnitude / sqrt(squares) : 0;
}

/* W' - W0 with the norm taken over each output row. */
static void walk_rows(const struct delta *d, const struct site *s, const float *w0, struct sink *k)
{
  int64_t cols = site_columns(s), o, c, i, n;
  double v[CHUNK], squares, f;

  for (o = 0; o < s->out; o++) {
    squares = 0;
    for (c = 0; c < cols; c += CHUNK) {
      n = cols - c < CHUNK ? cols - c : CHUNK;
      product(d, cols, o, c, n, v);
      for (i = 0; i < n; i++)
        squares += (v[i] + w0[o * cols + c + i]) * (v[i] + w0[o * cols + c + i]);
    }
    f = stretch(squares, d->magnitude[o]);
    for (c = 0; c < cols; c += CHUNK) {
      n = cols - c < CHUNK ? cols - c : CHUNK;
      product(d, cols, o, c, n, v);
      for (i = 0; i < n; i++)
        v[i] = f * (v[i] + w0[o * cols + c + i]) - w0[o * cols + c + i];
      sink_take(k, o * cols + c, v, n);
    }
  }
}

/* W' - W0 with the norm taken over each input channel: all outputs and all pixels of the kernel. */
static void walk_columns(const struct delta *d, const struct site *s, const float *w0, struct sink *k)
{
  int64_t cols = site_columns(s), taps = site_taps(s), step = CHUNK / taps * taps, o, c, i, n;
  double v[CHUNK], f[CHUNK]; /* f: squares of the channels in flight, then their factors */

  assert(step > 0);
  for (c = 0; c < cols; c += step) {
    n = cols - c < step ? cols - c : step;
    memset(f, 0, sizeof f);
    for (o = 0; o < s->out; o++) {
      product(d, cols, o, c, n, v);
      for (i = 0; i < n; i++)
        f[i / taps] += (v[i] + w0[o * cols + c + i]) * (v[i] + w0[o * cols + c + i]);
    }
    for (i = 0; i < n / taps; i++)
      f[i] = stretch(f[i], d->magnitude[c / taps + i]);
    for (o = 0; o < s->out; o++) {
      product(d, cols, o, c, n, v);
      for (i = 0; i < n; i++)
        v[i] = f[i / taps] * (v[i] + w0[o * cols + c + i]) - w0[o * cols + c + i];
      sink_take(k, o * cols + c, v, n);
    }
  }
}

static void walk(const struct delta *d, const struct site *s, const float *w0, struct sink *k)
{
  assert(w0 || (d->kind != DELTA_DORA && d->kind != DELTA_REPLACE));
  if (d->kind != DELTA_DORA)
    walk_plain(d, s, w0, k);
  else if (d->magnitude_per_row)
    walk_rows(d, s, w0, k);
  else
    walk_columns(d, s, w0, k);
}

void delta_apply(const struct delta *d, const struct site *s, const float *w0, const float *bias0, float weight, float *w, float *bias)
{
  struct sink k = {.w = w, .weight = weight};
  int64_t o;

  walk(d, s, w0, &k);
  if (!d->bias || !bias)
    return;
  assert(bias0 || d->kind != DELTA_REPLACE);
  for (o = 0; o < s->out; o++)
    bias[o] = (float)(bias[o] + (double)weight * (d->kind == DELTA_REPLACE ? (double)d->bias[o] - bias0[o] : d->bias[o]));
}

/* ---- norm ---- */

/* The sum of x[i * step] * y[i * step]; four sums, so that the additions need not wait for each other. */
static double dot(const float *x, const float *y, int64_t n, int64_t step)
{
  double a[4] = {0};
  int64_t i, j;

  for (i = 0; i + 4 <= n; i += 4)
    for (j = 0; j < 4; j++)
      a[j] += (double)x[(i + j) * step] * y[(i + j) * step];
  for (; i < n; i++)
    a[0] += (double)x[i * step] * y[i * step];
  return (a[0] + a[1]) + (a[2] + a[3]);
}

/* |up down|^2 = sum over i, j of (up^T up)[i, j] (down down^T)[i, j]: the product itself is never made. */
static double factor_norm(const struct delta *d, const struct site *s)
{
  int64_t cols = site_columns(s), r = d->rank, i, j;
  double sum = 0;

  for (i = 0; i < r; i++)
    for (j = i; j < r; j++)
      sum += (i == j ? 1 : 2) * dot(d->up + i, d->up + j, s->out, r) * dot(d->down + i * cols, d->down + j * cols, cols, 1);
  return fabs(d->scale) * sqrt(sum > 0 ? sum : 0);
}

double delta_norm(const struct delta *d, const struct site *s, const float *w0)
{
  struct sink k = {0};

  if (d->kind == DELTA_LOWRANK)
    return factor_norm(d, s);
  walk(d, s, w0, &k);
  return sqrt(k.squares);
}
