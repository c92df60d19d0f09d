/*
 * ref_ops.c - be_ref's norms, activations, copies and the arithmetic of the sampler, by definition. See ref.h.
 *
 * Called through be_ref's table. Threads: see ref.h.
 */
#include "kernels/ref.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "kernels/convert.h"

static double silu(double v)
{
  return v / (1.0 + exp(-v));
}

static double gelu(double v)
{
  return 0.5 * v * (1.0 + erf(v * 0.70710678118654752440)); /* 1/sqrt(2) */
}

static double quick_gelu(double v)
{
  return v / (1.0 + exp(-1.702 * v));
}

/* One group of one picture: x, y at its first channel, C channels to the pixel, n in the group; temb NULL or at the group. */
static void norm_group(float *y, const float *x, const float *temb, const float *gamma, const float *beta, int64_t HW, int64_t C,
                       int64_t n, double eps, int use_silu)
{
  double mean = 0, var = 0, inv;

  for (int64_t i = 0; i < HW; i++)
    for (int64_t c = 0; c < n; c++)
      mean += (double)x[i * C + c] + (temb ? (double)temb[c] : 0.0);
  mean /= (double)(HW * n);
  for (int64_t i = 0; i < HW; i++)
    for (int64_t c = 0; c < n; c++) {
      double d = (double)x[i * C + c] + (temb ? (double)temb[c] : 0.0) - mean;

      var += d * d;
    }
  var /= (double)(HW * n);
  inv = 1.0 / sqrt(var + eps);
  for (int64_t i = 0; i < HW; i++)
    for (int64_t c = 0; c < n; c++) {
      double v = (double)x[i * C + c] + (temb ? (double)temb[c] : 0.0);

      v = (double)gamma[c] * (v - mean) * inv + (double)beta[c];
      y[i * C + c] = (float)(use_silu ? silu(v) : v);
    }
}

int ref_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w, int groups,
                  float eps, int silu_after, struct err *e)
{
  int64_t C = x.d[3], HW = x.d[1] * x.d[2], n = C / groups, jobs = x.d[0] * groups;
  const float *px = x.p, *pt = temb.p;
  float *py = y.p;

  (void)e;
  assert(w->kind == WEIGHT_NORM && w->out == C && C % groups == 0 && x.type == DT_F32 && y.type == DT_F32);
  assert(ref_same_dims(y, x));
  assert(!pt || (temb.type == DT_F32 && temb.d[0] == x.d[0] && temb.d[3] == C && tensor_count(temb) == x.d[0] * C));
#pragma omp parallel for schedule(static) num_threads(be->threads)
  for (int64_t j = 0; j < jobs; j++) {
    int64_t b = j / groups, c = j % groups * n, at = b * HW * C + c;

    norm_group(py + at, px + at, pt ? pt + b * C + c : NULL, w->w + c, w->bias + c, HW, C, n, (double)eps, silu_after);
  }
  return 0;
}

int ref_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e)
{
  int64_t D = x.d[3], rows = tensor_rows(x);
  const float *px = x.p;
  float *py = y.p;

  (void)e;
  assert(w->kind == WEIGHT_NORM && w->out == D && x.type == DT_F32 && y.type == DT_F32 && ref_same_dims(y, x));
#pragma omp parallel for schedule(static) num_threads(be->threads)
  for (int64_t r = 0; r < rows; r++) /* a row is one group of one pixel */
    norm_group(py + r * D, px + r * D, NULL, w->w, w->bias, 1, D, D, (double)eps, 0);
  return 0;
}

int ref_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  int64_t F = y.d[3], rows = tensor_rows(x);
  const float *px = x.p;
  float *py = y.p;

  (void)e;
  assert(x.type == DT_F32 && y.type == DT_F32 && x.d[3] == 2 * F && tensor_rows(y) == rows);
#pragma omp parallel for schedule(static) num_threads(be->threads)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < F; i++)
      py[r * F + i] = (float)((double)px[r * 2 * F + i] * gelu((double)px[r * 2 * F + F + i]));
  return 0;
}

int ref_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  int64_t n = tensor_count(x);
  const float *px = x.p;
  float *py = y.p;

  (void)e;
  assert(x.type == DT_F32 && y.type == DT_F32 && tensor_count(y) == n);
#pragma omp parallel for schedule(static) num_threads(be->threads)
  for (int64_t i = 0; i < n; i++) {
    double v = (double)px[i];

    py[i] = (float)(kind == ACT_SILU ? silu(v) : kind == ACT_GELU ? gelu(v) : quick_gelu(v));
  }
  return 0;
}

int ref_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  const float *pa = a.p, *pb = b.p;
  float *py = y.p;

  (void)be, (void)e;
  assert(a.type == DT_F32 && b.type == DT_F32 && y.type == DT_F32 && ref_same_dims(a, y) && ref_same_dims(b, y));
  for (int64_t i = 0, n = tensor_count(y); i < n; i++)
    py[i] = pa[i] + pb[i];
  return 0;
}

int ref_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  size_t na = (size_t)a.d[3] * sizeof(float), nb = (size_t)b.d[3] * sizeof(float);
  const char *pa = a.p, *pb = b.p;
  char *py = y.p;

  (void)be, (void)e;
  assert(a.type == DT_F32 && b.type == DT_F32 && y.type == DT_F32 && y.d[3] == a.d[3] + b.d[3]);
  assert(tensor_rows(a) == tensor_rows(y) && tensor_rows(b) == tensor_rows(y));
  for (int64_t r = 0, rows = tensor_rows(y); r < rows; r++, pa += na, pb += nb, py += na + nb) {
    memcpy(py, pa, na);
    memcpy(py + na, pb, nb);
  }
  return 0;
}

int ref_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  int64_t Ho = y.d[1], Wo = y.d[2], C = x.d[3];
  const float *px = x.p;
  float *py = y.p;

  (void)be, (void)e;
  assert(x.type == DT_F32 && y.type == DT_F32 && y.d[0] == x.d[0] && y.d[3] == C);
  assert((Ho + 1) / 2 == x.d[1] && (Wo + 1) / 2 == x.d[2]);
  for (int64_t b = 0; b < y.d[0]; b++)
    for (int64_t oy = 0; oy < Ho; oy++)
      for (int64_t ox = 0; ox < Wo; ox++, py += C)
        memcpy(py, px + ((b * x.d[1] + oy / 2) * x.d[2] + ox / 2) * C, (size_t)C * sizeof *py);
  return 0;
}

/* Rounded to fp32 where torch does: t reaches 999, so the rounding of f shows in the 5th digit of the highest frequencies, and
 * the networks were trained with it. */
int ref_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift, struct err *e)
{
  int64_t D = y.d[3], half = D / 2;
  float *py = y.p;

  (void)be, (void)e;
  assert(y.type == DT_F32 && D % 2 == 0 && tensor_rows(y) == y.d[0]);
  for (int64_t b = 0; b < y.d[0]; b++)
    for (int64_t i = 0; i < half; i++) {
      float exponent = -9.210340371976184f * (float)i / ((float)half - freq_shift); /* ln(10000) */
      float f = (float)exp((double)exponent), angle = t[b] * f;
      float s = (float)sin((double)angle), c = (float)cos((double)angle);

      py[b * D + i] = flip_sin_to_cos ? c : s;
      py[b * D + half + i] = flip_sin_to_cos ? s : c;
    }
  return 0;
}

int ref_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens, const struct weight *positions,
              struct err *e)
{
  int64_t T = y.d[2], D = y.d[3];
  float *py = y.p;

  (void)be, (void)e;
  assert(tokens->kind == WEIGHT_TABLE && positions->kind == WEIGHT_TABLE && y.type == DT_F32 && y.d[1] == 1);
  assert(tokens->out == D && positions->out == D && positions->in >= T);
  for (int64_t r = 0; r < y.d[0] * T; r++) {
    assert(ids[r] >= 0 && ids[r] < tokens->in);
    for (int64_t i = 0; i < D; i++)
      py[r * D + i] = tokens->w[ids[r] * D + i] + positions->w[r % T * D + i];
  }
  return 0;
}

int ref_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e)
{
  int64_t n = tensor_count(y) / y.d[0];
  const float *px = x.p;
  float *py = y.p;

  (void)be, (void)e;
  assert(x.type == DT_F32 && y.type == DT_F32 && tensor_count(x) / x.d[0] == n);
  for (int64_t b = 0; b < y.d[0]; b++) {
    assert(src[b] >= 0 && src[b] < x.d[0]);
    for (int64_t i = 0; i < n; i++)
      py[b * n + i] = scale[b] * px[src[b] * n + i];
  }
  return 0;
}

/* A term whose coefficient is 0 is not read: x0_old holds nothing before the first step, and 0 * NaN is NaN. */
int ref_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                     const struct step_coef *coef, struct err *e)
{
  int64_t n = tensor_count(x) / x.d[0];

  (void)be, (void)e;
  assert(x.type == DT_F32 && x0_old.type == DT_F32 && model.type == DT_F32 && ref_same_dims(x0_old, x));
  assert(tensor_count(model) / model.d[0] == n && (!noise.p || (noise.type == DT_F32 && ref_same_dims(noise, x))));
  for (int64_t b = 0; b < x.d[0]; b++) {
    const struct step_coef *k = &coef[b];
    const float *cond = (const float *)model.p + k->row_cond * n, *uncond = (const float *)model.p + k->row_uncond * n;
    const float *pn = k->c_noise != 0 ? (const float *)noise.p + b * n : NULL;
    float *px = (float *)x.p + b * n, *old = (float *)x0_old.p + b * n;

    assert(k->row_cond >= 0 && k->row_cond < model.d[0] && k->row_uncond >= 0 && k->row_uncond < model.d[0]);
    assert(k->c_noise == 0 || noise.p);
    for (int64_t i = 0; i < n; i++) {
      double c = (double)cond[i], u = (double)uncond[i];
      double eps = k->row_cond == k->row_uncond ? c : u + (double)k->guidance * (c - u);
      double x0 = (double)k->x0_x * (double)px[i] + (double)k->x0_e * eps;
      double next = (double)k->c_x * (double)px[i] + (double)k->c_x0 * x0;

      if (k->c_old != 0)
        next += (double)k->c_old * (double)old[i];
      if (pn)
        next += (double)k->c_noise * (double)pn[i];
      px[i] = (float)next;
      old[i] = (float)x0;
    }
  }
  return 0;
}

int ref_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c, struct err *e)
{
  int64_t C = x.d[3], n = x.d[1] * x.d[2];
  const uint8_t *pm = mask.p;
  const float *pa = a.p, *pb = b.p;
  float *px = x.p;

  (void)be, (void)e;
  assert(x.type == DT_F32 && a.type == DT_F32 && b.type == DT_F32 && ref_same_dims(a, x) && ref_same_dims(b, x));
  assert(mask.type == DT_U8 && mask.d[3] == 1 && tensor_rows(mask) == tensor_rows(x));
  for (int64_t i = 0, rows = x.d[0] * n; i < rows; i++)
    for (int64_t k = i * C; !pm[i] && k < i * C + C; k++) {
      double from_a = c[i / n].a != 0 ? (double)c[i / n].a * (double)pa[k] : 0;
      double from_b = c[i / n].b != 0 ? (double)c[i / n].b * (double)pb[k] : 0;

      px[k] = (float)(from_a + from_b);
    }
  return 0;
}

int ref_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  int64_t n = y.d[1] * y.d[2], C = y.d[3];
  struct normal_state *s = state.p;
  float *work = ref_scratch(be, (size_t)(n * C) * sizeof *work, e);

  assert(y.type == DT_F32 && state.type == DT_I32 && state.d[0] == y.d[0] && tensor_count(state) == y.d[0] * NORMAL_WORDS);
  if (!work)
    return E_NOMEM;
  for (int64_t b = 0; b < y.d[0]; b++)
    normal_fill_pixels(&s[b], (float *)y.p + b * n * C, (size_t)n, (size_t)C, scale, work);
  return 0;
}

/* In fp32 and ties to even, as diffusers and numpy do it: a double would decide some ties otherwise. */
int ref_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  uint8_t *py = y.p;

  (void)be, (void)e;
  assert(y.type == DT_U8 && tensor_count(y) == tensor_count(x));
  for (int64_t i = 0, n = tensor_count(y); i < n; i++) {
    float v = convert_get(x.p, x.type, i) / 2.0f + 0.5f;

    v = v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; /* NaN fails both and becomes 0 */
    py[i] = (uint8_t)rintf(v * 255.0f);
  }
  return 0;
}

int ref_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e)
{
  (void)be, (void)e;
  *bad = 0;
  for (int64_t i = 0, n = tensor_count(x); i < n; i++)
    *bad += !isfinite(convert_get(x.p, x.type, i));
  return 0;
}
