/*
 * ref_matmul.c - be_ref's convolution, linear and attention: sums of products, in double, in a fixed order. See ref.h.
 *
 * A convolution copies the patch of the picture that an output pixel sees, zeros where it hangs over the edge, and takes its
 * product with the weight matrix; a linear's patch is the row itself. PIXELS patches are done together so that a weight is
 * read once for all of them, LANES output channels side by side so that the compiler uses vector registers.
 *
 * Called through be_ref's table. Threads: see ref.h.
 */
#include "kernels/ref.h"

#include <assert.h>
#include <math.h>
#include <omp.h>
#include <string.h>

enum { PIXELS = 4, VEC = 8 };

typedef double vec_d __attribute__((vector_size(VEC * sizeof(double))));
typedef float vec_f __attribute__((vector_size(VEC * sizeof(float)), aligned(sizeof(float)), may_alias));

/* The inner loops exist once per instruction set and the loader picks one. Their results are the same bits: each lane
 * multiplies, rounds, adds, rounds. Sanitizers cannot stand in the loader's resolvers, and clang 14 has no such attribute. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define PER_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_ISA
#endif

/* sum[p][o] = sum over i of x[p*n + i] * w[i*LANES + o], i ascending. */
PER_ISA static void dot_tile(double *sum, const double *x, const float *w, int64_t n)
{
  vec_d a0 = {0}, a1 = {0}, b0 = {0}, b1 = {0}, c0 = {0}, c1 = {0}, d0 = {0}, d1 = {0};

  for (int64_t i = 0; i < n; i++) {
    vec_d w0 = __builtin_convertvector(*(const vec_f *)(w + i * REF_LANES), vec_d);
    vec_d w1 = __builtin_convertvector(*(const vec_f *)(w + i * REF_LANES + VEC), vec_d);

    a0 += x[i] * w0;
    a1 += x[i] * w1;
    b0 += x[n + i] * w0;
    b1 += x[n + i] * w1;
    c0 += x[2 * n + i] * w0;
    c1 += x[2 * n + i] * w1;
    d0 += x[3 * n + i] * w0;
    d1 += x[3 * n + i] * w1;
  }
  vec_d all[PIXELS][REF_LANES / VEC] = {{a0, a1}, {b0, b1}, {c0, c1}, {d0, d1}};
  memcpy(sum, all, sizeof all);
}

/* y[i] += a * x[i] */
PER_ISA static void add_scaled(double *y, double a, const float *x, int64_t n)
{
  int64_t i = 0;

  for (; i + VEC <= n; i += VEC) {
    vec_d v;

    memcpy(&v, y + i, sizeof v);
    v += a * __builtin_convertvector(*(const vec_f *)(x + i), vec_d);
    memcpy(y + i, &v, sizeof v);
  }
  for (; i < n; i++)
    y[i] += a * (double)x[i];
}

/* Rows of y: count <= PIXELS patches of n doubles, times the matrix, plus bias and residual, rounded once. */
static void rows_times_weight(float *y, const float *residual, const double *patch, const struct weight *w, int64_t n, int count)
{
  double sum[PIXELS][REF_LANES];

  for (int64_t o = 0; o < w->out; o += REF_LANES) {
    int64_t lanes = w->out - o < REF_LANES ? w->out - o : REF_LANES;

    dot_tile(sum[0], patch, w->w + o * n, n);
    for (int p = 0; p < count; p++)
      for (int64_t l = 0; l < lanes; l++) {
        int64_t at = p * w->out + o + l;

        y[at] = (float)(sum[p][l] + (double)w->bias[o + l] + (residual ? (double)residual[at] : 0.0));
      }
  }
}

/* What output pixel (oy, ox) of picture x (H, W, in) sees, as (kh, kw, in). */
static void copy_patch(double *patch, const float *x, int64_t H, int64_t W, const struct weight *w, int64_t oy, int64_t ox)
{
  for (int i = 0; i < w->kh; i++)
    for (int j = 0; j < w->kw; j++, patch += w->in) {
      int64_t iy = oy * w->stride - w->pad_lo + i, ix = ox * w->stride - w->pad_lo + j;

      if (iy < 0 || iy >= H || ix < 0 || ix >= W)
        memset(patch, 0, (size_t)w->in * sizeof *patch);
      else
        for (int64_t c = 0; c < w->in; c++)
          patch[c] = (double)x[(iy * W + ix) * w->in + c];
    }
}

int ref_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  int64_t H = x.d[1], W = x.d[2], Ho = y.d[1], Wo = y.d[2], n = (int64_t)w->kh * w->kw * w->in, rows = y.d[0] * Ho;
  const float *px = x.p, *pr = residual.p;
  float *py = y.p;
  double *scratch;

  assert(w->kind == WEIGHT_CONV && x.type == DT_F32 && y.type == DT_F32 && x.d[3] == w->in && y.d[3] == w->out);
  assert(y.d[0] == x.d[0] && Ho == (H + w->pad_lo + w->pad_hi - w->kh) / w->stride + 1 &&
         Wo == (W + w->pad_lo + w->pad_hi - w->kw) / w->stride + 1);
  assert(!pr || (residual.type == DT_F32 && ref_same_dims(residual, y)));
  scratch = ref_scratch(be, (size_t)be->threads * PIXELS * (size_t)n * sizeof *scratch, e);
  if (!scratch)
    return E_NOMEM;
#pragma omp parallel for schedule(static) num_threads(be->threads)
  for (int64_t row = 0; row < rows; row++) {
    double *patch = scratch + omp_get_thread_num() * PIXELS * n;
    const float *picture = px + row / Ho * H * W * w->in;

    for (int64_t ox = 0; ox < Wo; ox += PIXELS) {
      int count = Wo - ox < PIXELS ? (int)(Wo - ox) : PIXELS;
      int64_t at = (row * Wo + ox) * w->out;

      for (int p = 0; p < PIXELS; p++) /* past the end of the row: the last pixel again, not used */
        copy_patch(patch + p * n, picture, H, W, w, row % Ho, ox + (p < count ? p : count - 1));
      rows_times_weight(py + at, pr ? pr + at : NULL, patch, w, n, count);
    }
  }
  return 0;
}

int ref_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  int64_t rows = tensor_rows(x), n = w->in;
  const float *px = x.p, *pr = residual.p;
  float *py = y.p;
  double *scratch;

  assert(x.type == DT_F32 && y.type == DT_F32 && x.d[3] == w->in && y.d[3] == w->out && tensor_rows(y) == rows);
  assert(w->kind == WEIGHT_LINEAR || (w->kind == WEIGHT_CONV && w->kh == 1 && w->kw == 1 && w->stride == 1));
  assert(!pr || (residual.type == DT_F32 && ref_same_dims(residual, y)));
  scratch = ref_scratch(be, (size_t)be->threads * PIXELS * (size_t)n * sizeof *scratch, e);
  if (!scratch)
    return E_NOMEM;
#pragma omp parallel for schedule(static) num_threads(be->threads)
  for (int64_t row = 0; row < rows; row += PIXELS) {
    double *patch = scratch + omp_get_thread_num() * PIXELS * n;
    int count = rows - row < PIXELS ? (int)(rows - row) : PIXELS;

    for (int p = 0; p < PIXELS; p++) /* past the last row: that row again, not used */
      for (int64_t i = 0; i < n; i++)
        patch[p * n + i] = (double)px[(row + (p < count ? p : count - 1)) * n + i];
    rows_times_weight(py + row * w->out, pr ? pr + row * w->out : NULL, patch, w, n, count);
  }
  return 0;
}

/* One token of one head: o[K] = softmax(scale * q k^T) v over the first n keys. kt is k transposed, (K, stride); v has rows of
 * D. score: n doubles, sum: K doubles. */
static void attend_token(float *o, const float *q, const float *kt, int64_t stride, const float *v, int64_t D, int64_t K,
                         int64_t n, double scale, double *score, double *sum)
{
  double top = -INFINITY, total = 0;

  memset(score, 0, (size_t)n * sizeof *score);
  memset(sum, 0, (size_t)K * sizeof *sum);
  for (int64_t c = 0; c < K; c++)
    add_scaled(score, (double)q[c], kt + c * stride, n);
  for (int64_t j = 0; j < n; j++) {
    score[j] *= scale;
    top = score[j] > top ? score[j] : top;
  }
  for (int64_t j = 0; j < n; j++) {
    score[j] = exp(score[j] - top);
    total += score[j];
    add_scaled(sum, score[j], v + j * D, K);
  }
  for (int64_t c = 0; c < K; c++)
    o[c] = (float)(sum[c] / total);
}

int ref_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal,
                  struct err *e)
{
  int64_t B = q.d[0], T = q.d[2], D = q.d[3], K = D / heads, most = 0, lane;
  double *scratch;
  float *kt;

  assert(q.type == DT_F32 && o.type == DT_F32 && ref_same_dims(o, q) && q.d[1] == 1 && D % heads == 0);
  for (int64_t b = 0; b < B; b++) {
    assert(kv[b].T >= 1 && kv[b].k && kv[b].v);
    most = kv[b].T > most ? kv[b].T : most;
  }
  lane = most + K; /* per thread: scores and sums */
  scratch = ref_scratch(be, (size_t)(be->threads * lane) * sizeof *scratch + (size_t)(most * K) * sizeof *kt, e);
  if (!scratch)
    return E_NOMEM;
  kt = (float *)(scratch + be->threads * lane);
  for (int64_t bh = 0; bh < B * heads; bh++) {
    const struct kv_row *row = &kv[bh / heads];
    int64_t at = bh % heads * K, Tk = row->T;
    const float *pk = (const float *)row->k + at, *pv = (const float *)row->v + at;
    const float *pq = (const float *)q.p + bh / heads * T * D + at;
    float *po = (float *)o.p + bh / heads * T * D + at;

#pragma omp parallel num_threads(be->threads)
    {
      double *mine = scratch + omp_get_thread_num() * lane;

#pragma omp for schedule(static)
      for (int64_t j = 0; j < Tk; j++)
        for (int64_t c = 0; c < K; c++)
          kt[c * Tk + j] = pk[j * D + c];
#pragma omp for schedule(static)
      for (int64_t t = 0; t < T; t++)
        attend_token(po + t * D, pq + t * D, kt, Tk, pv, D, K, causal && t + 1 < Tk ? t + 1 : Tk, (double)scale, mine,
                     mine + most);
    }
  }
  return 0;
}
