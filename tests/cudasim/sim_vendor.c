/*
 * sim_vendor.c - the vendor's libraries as plain loops: kernels/cuda/blas.h and dnn.h for the simulator. See sim.h.
 *
 * Numbers are those of the real thing up to the order of sums: 16-bit operands, products and sums in fp32, bias and residual added in fp32, one
 * rounding. A stand-in reads every operand that the call names and nothing else, so that ASan sees sizes that are wrong. Arguments are
 * copied when a call is made and used when the stream runs it.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/dnn.h"
#include "tests/cudasim/sim.h"

struct gpu_blas {
  int unused;
};

struct gpu_dnn {
  long epoch;
};

static void (*watcher)(const struct gpu_key *k);

void cudasim_watch_dnn(void (*see)(const struct gpu_key *k))
{
  watcher = see;
}

static float *must_floats(int64_t n)
{
  float *p = malloc((size_t)n * sizeof *p);

  if (!p)
    abort();
  return p;
}

/* Loads and stores that ASan watches: the product's convert.c is not built for it. */
static float get(const void *p, enum dtype type, int64_t i)
{
  return type == DT_F32 ? ((const float *)p)[i] : type == DT_F16 ? f16_to_f32(((const uint16_t *)p)[i]) : bf16_to_f32(((const uint16_t *)p)[i]);
}

static void set(void *p, enum dtype type, int64_t i, float v)
{
  if (type == DT_F32)
    ((float *)p)[i] = v;
  else
    ((uint16_t *)p)[i] = type == DT_F16 ? f32_to_f16(v) : f32_to_bf16(v);
}

static float *as_floats(const void *p, enum dtype type, int64_t n)
{
  float *f = must_floats(n);

  for (int64_t i = 0; i < n; i++)
    f[i] = get(p, type, i);
  return f;
}

/* (rows, columns) of any type as (columns, rows) floats: sums then run over neighbouring outputs side by side. */
static float *transposed(const void *p, enum dtype type, int64_t rows, int64_t columns)
{
  float *plain = as_floats(p, type, rows * columns), *t = must_floats(rows * columns);

  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++)
      t[c * rows + r] = plain[r * columns + c];
  free(plain);
  return t;
}

/* Between arrays of the stand-in's own: unwatched, so that it becomes vector code. */
__attribute__((no_sanitize("address", "undefined"))) static void add_scaled(float *restrict sum, float x, const float *restrict w, int64_t n)
{
  for (int64_t i = 0; i < n; i++)
    sum[i] += x * w[i];
}

/* One row of outputs, finished. */
static void finish(void *y, enum dtype type, int64_t at, const float *sum, const void *bias, enum dtype bias_type, const void *residual, int64_t n)
{
  for (int64_t i = 0; i < n; i++) {
    float v = sum[i];

    if (bias)
      v += get(bias, bias_type, i);
    if (residual)
      v += get(residual, type, at + i);
    set(y, type, at + i, v);
  }
}

/* ---- blas.h ---- */

int gpu_blas_open(struct gpu_blas **b, struct err *e)
{
  *b = calloc(1, sizeof **b);
  return *b ? 0 : err_set(e, E_NOMEM, "out of memory");
}

void gpu_blas_close(struct gpu_blas *b)
{
  free(b);
}

void gpu_blas_version(char *text, size_t size)
{
  snprintf(text, size, "simulated products");
}

int gpu_blas_ready(struct gpu_blas *b, const struct gpu_linear *l, struct err *e)
{
  (void)b, (void)l, (void)e;
  return 0;
}

static int run_linear(void *arg)
{
  const struct gpu_linear *l = arg;
  float *w = transposed(l->w, l->act, l->out, l->in), *x = as_floats(l->x, l->act, l->rows * l->in), *sum = must_floats(l->out);

  for (int64_t r = 0; r < l->rows; r++) {
    memset(sum, 0, (size_t)l->out * sizeof *sum);
    for (int64_t i = 0; i < l->in; i++)
      add_scaled(sum, x[r * l->in + i], w + i * l->out, l->out);
    finish(l->y, l->y_type, r * l->out, sum, l->bias, l->y_type, l->residual, l->out);
  }
  free(w);
  free(x);
  free(sum);
  return 0;
}

int gpu_blas_linear(struct gpu_blas *b, cudaStream_t s, const struct gpu_linear *l, struct err *e)
{
  (void)b;
  return cudasim_enqueue(s, run_linear, l, sizeof *l) ? err_set(e, E_DEVICE, "%s", cudasim_fault()) : 0;
}

/* ---- dnn.h ---- */

int gpu_dnn_open(struct gpu_dnn **d, const char *plan_cache, struct be_plans *counts, struct err *e)
{
  (void)plan_cache, (void)counts;
  *d = calloc(1, sizeof **d);
  return *d ? 0 : err_set(e, E_NOMEM, "out of memory");
}

void gpu_dnn_close(struct gpu_dnn *d)
{
  free(d);
}

long gpu_dnn_epoch(const struct gpu_dnn *d)
{
  return d->epoch;
}

void gpu_dnn_version(char *text, size_t size)
{
  snprintf(text, size, "simulated convolutions");
}

int gpu_dnn_ready(struct gpu_dnn *d, const struct gpu_key *k, struct err *e)
{
  (void)d, (void)e;
  if (watcher)
    watcher(k);
  return 0;
}

/* One output pixel: (oy, ox) of a picture x (H, W, in) as floats. */
static void conv_pixel(float *sum, const struct gpu_conv *c, const float *x, const float *w, int64_t oy, int64_t ox)
{
  memset(sum, 0, (size_t)c->out * sizeof *sum);
  for (int i = 0; i < c->kh; i++)
    for (int j = 0; j < c->kw; j++) {
      int64_t iy = oy * c->stride - c->pad_lo + i, ix = ox * c->stride - c->pad_lo + j;

      if (iy < 0 || iy >= c->H || ix < 0 || ix >= c->W)
        continue;
      for (int64_t k = 0; k < c->in; k++)
        add_scaled(sum, x[(iy * c->W + ix) * c->in + k], w + ((i * c->kw + j) * c->in + k) * c->out, c->out);
    }
}

static int run_conv(void *arg)
{
  const struct gpu_conv *c = arg;
  int64_t taps = (int64_t)c->kh * c->kw, picture = c->H * c->W * c->in;
  float *w = transposed(c->w, c->act, c->out, taps * c->in), *x = as_floats(c->x, c->act, c->B * picture), *sum = must_floats(c->out);

  for (int64_t b = 0; b < c->B; b++)
    for (int64_t p = 0; p < c->Ho * c->Wo; p++) {
      conv_pixel(sum, c, x + b * picture, w, p / c->Wo, p % c->Wo);
      finish(c->y, c->y_type, (b * c->Ho * c->Wo + p) * c->out, sum, c->bias, c->act, c->residual, c->out);
    }
  free(w);
  free(x);
  free(sum);
  return 0;
}

int gpu_dnn_conv(struct gpu_dnn *d, cudaStream_t s, const struct gpu_conv *c, struct err *e)
{
  struct gpu_key k;

  (void)d;
  gpu_key_of_conv(&k, c);
  if (watcher)
    watcher(&k);
  return cudasim_enqueue(s, run_conv, c, sizeof *c) ? err_set(e, E_DEVICE, "%s", cudasim_fault()) : 0;
}

/* One query: o[K] over `keys` keys; kt (K, keys), v rows of D. */
static void attend(float *o, const float *q, const float *kt, const float *v, int64_t D, int64_t K, int64_t keys, float scale, float *score)
{
  float top = -INFINITY, total = 0;

  memset(score, 0, (size_t)keys * sizeof *score);
  memset(o, 0, (size_t)K * sizeof *o);
  for (int64_t d = 0; d < K; d++)
    add_scaled(score, q[d], kt + d * keys, keys);
  for (int64_t j = 0; j < keys; j++)
    top = score[j] * scale > top ? score[j] * scale : top;
  for (int64_t j = 0; j < keys; j++) {
    float p = expf(score[j] * scale - top);

    total += p;
    add_scaled(o, p, v + j * D, K);
  }
  for (int64_t d = 0; d < K; d++)
    o[d] /= total;
}

static int run_attention(void *arg)
{
  const struct gpu_attention *a = arg;
  int64_t D = (int64_t)a->heads * a->K;
  float *q = as_floats(a->q, a->act, a->B * a->T * D), *k = as_floats(a->k, a->act, a->B * a->keys * D),
        *v = as_floats(a->v, a->act, a->B * a->keys * D), *kt = must_floats(a->K * a->keys), *score = must_floats(a->keys), *o = must_floats(a->K);

  for (int64_t bh = 0; bh < a->B * a->heads; bh++) {
    int64_t b = bh / a->heads, at = bh % a->heads * a->K;

    for (int64_t j = 0; j < a->keys; j++)
      for (int64_t d = 0; d < a->K; d++)
        kt[d * a->keys + j] = k[(b * a->keys + j) * D + at + d];
    for (int64_t t = 0; t < a->T; t++) {
      attend(o, q + (b * a->T + t) * D + at, kt, v + b * a->keys * D + at, D, a->K, a->keys, a->scale, score);
      for (int64_t d = 0; d < a->K; d++)
        set(a->o, a->act, (b * a->T + t) * D + at + d, o[d]);
    }
  }
  free(q);
  free(k);
  free(v);
  free(kt);
  free(score);
  free(o);
  return 0;
}

int gpu_dnn_attention(struct gpu_dnn *d, cudaStream_t s, const struct gpu_attention *a, struct err *e)
{
  struct gpu_key k;

  (void)d;
  gpu_key_of_attention(&k, a);
  if (watcher)
    watcher(&k);
  return cudasim_enqueue(s, run_attention, a, sizeof *a) ? err_set(e, E_DEVICE, "%s", cudasim_fault()) : 0;
}
