/*
 * naive.c - what each op means, written down once more in the plainest way: one output element at a time, in double, with no
 * thought for speed and nothing shared with any backend. See harness.h.
 */
#include <math.h>
#include <stdlib.h>

#include "tests/ops/harness.h"

/* Element (b, h, w, c) of an operand. In place ops: what stood there before the call. */
static double at(const struct operand *o, int64_t b, int64_t h, int64_t w, int64_t c)
{
  return (double)o->data[((b * o->d[1] + h) * o->d[2] + w) * o->d[3] + c];
}

static const struct operand *input(const struct problem *p, enum slot s)
{
  return problem_alias(p->c) == s ? &p->op[Y] : &p->op[s];
}

static double conv(const struct problem *p, int64_t b, int64_t oy, int64_t ox, int64_t o)
{
  const struct op_case *c = p->c;
  const struct operand *x = &p->op[X], *res = input(p, A);
  int64_t k = c->op == OP_CONV2D ? c->k : 1, stride = c->op == OP_CONV2D ? c->stride : 1;
  double sum = 0;

  for (int64_t in = 0; in < x->d[3]; in++)
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < k; j++) {
        int64_t iy = oy * stride + i - c->lo, ix = ox * stride + j - c->lo;

        if (iy >= 0 && iy < x->d[1] && ix >= 0 && ix < x->d[2])
          sum += at(x, b, iy, ix, in) * (double)p->w_f32[0][((o * x->d[3] + in) * k + i) * k + j];
      }
  if (c->flags & F_BIAS)
    sum += (double)p->bias_f32[0][o];
  return c->flags & F_RESIDUAL ? sum + at(res, b, oy, ox, o) : sum;
}

/* y + up (down x), with picture b's factors. */
static double lowrank(const struct problem *p, int64_t b, int64_t oy, int64_t ox, int64_t o)
{
  const struct op_case *c = p->c;
  const struct operand *x = &p->op[X];
  int64_t k = c->k ? c->k : 1, stride = c->k ? c->stride : 1;
  double sum = at(&p->op[Y], b, oy, ox, o);
  int f = p->row[b];

  for (int64_t r = 0; f >= 0 && r < p->factors[f].rank; r++) {
    double z = 0;

    for (int64_t in = 0; in < x->d[3]; in++)
      for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < k; j++) {
          int64_t iy = oy * stride + i - c->lo, ix = ox * stride + j - c->lo;

          if (iy >= 0 && iy < x->d[1] && ix >= 0 && ix < x->d[2])
            z += at(x, b, iy, ix, in) * (double)p->w_f32[f][((r * x->d[3] + in) * k + i) * k + j];
        }
    sum += z * (double)p->bias_f32[f][o * p->factors[f].rank + r];
  }
  return sum;
}

/* One group: channels c0 to c1 of the pixels h0 to h1, w0 to w1 of picture b. */
static void norm_group(const struct problem *p, double *out, int64_t b, int64_t h0, int64_t h1, int64_t w0, int64_t w1,
                       int64_t c0, int64_t c1)
{
  const struct op_case *k = p->c;
  const struct operand *x = input(p, X), *temb = &p->op[A];
  double mean = 0, var = 0, count = (double)((h1 - h0) * (w1 - w0) * (c1 - c0));

  for (int pass = 0; pass < 3; pass++)
    for (int64_t h = h0; h < h1; h++)
      for (int64_t w = w0; w < w1; w++)
        for (int64_t c = c0; c < c1; c++) {
          double v = at(x, b, h, w, c) + (temb->data ? at(temb, b, 0, 0, c) : 0);

          if (pass == 0) {
            mean += v / count;
          } else if (pass == 1) {
            var += (v - mean) * (v - mean) / count;
          } else {
            v = (double)p->w_f32[0][c] * ((v - mean) / sqrt(var + (double)k->arg)) + (double)p->bias_f32[0][c];
            out[((b * k->H + h) * k->W + w) * k->C + c] = k->flags & F_SILU ? v * (1 / (1 + exp(-v))) : v;
          }
        }
}

static void norm(const struct problem *p, double *out)
{
  const struct op_case *k = p->c;
  int64_t n = k->op == OP_GROUPNORM ? k->C / k->groups : k->C;

  for (int64_t b = 0; b < p->B; b++)
    for (int64_t c = 0; c < k->C; c += n)
      if (k->op == OP_GROUPNORM)
        norm_group(p, out, b, 0, k->H, 0, k->W, c, c + n);
      else
        for (int64_t pixel = 0; pixel < k->H * k->W; pixel++)
          norm_group(p, out, b, pixel / k->W, pixel / k->W + 1, pixel % k->W, pixel % k->W + 1, 0, n);
}

/* Head after head, token after token; the weights of one token's keys are in s. */
static void attend(const struct problem *p, double *out)
{
  const struct op_case *k = p->c;
  int64_t K = k->C / k->heads;
  double scale = k->arg != 0 ? (double)k->arg : (double)(1 / sqrtf((float)K));
  double *s = calloc((size_t)k->keys, sizeof *s);

  for (int64_t b = 0; s && b < p->B; b++)
    for (int64_t head = 0; head < k->heads; head++)
      for (int64_t t = 0; t < k->W; t++) {
        int64_t owner = p->owner[b], n = p->keys[owner];
        double top = -INFINITY, sum = 0;

        if (k->flags & F_CAUSAL && t + 1 < n)
          n = t + 1;
        for (int64_t j = 0; j < n; j++) {
          s[j] = 0;
          for (int64_t i = 0; i < K; i++)
            s[j] += scale * at(&p->op[X], b, 0, t, head * K + i) * at(&p->op[A], owner, 0, j, head * K + i);
          top = fmax(top, s[j]);
        }
        for (int64_t j = 0; j < n; j++)
          sum += s[j] = exp(s[j] - top);
        for (int64_t i = 0; i < K; i++) {
          double *o = &out[(b * k->W + t) * k->C + head * K + i];

          for (int64_t j = 0; j < n; j++)
            *o += s[j] / sum * at(&p->op[V], owner, 0, j, head * K + i);
        }
      }
  free(s);
}

static double gelu(double v)
{
  return v * 0.5 * erfc(-v / sqrt(2));
}

static double activation(int kind, double v)
{
  return kind == ACT_GELU ? gelu(v) : v * (1 / (1 + exp(kind == ACT_SILU ? -v : -1.702 * v)));
}

static double timestep(const struct problem *p, int64_t b, int64_t c)
{
  int64_t half = p->c->C / 2, i = c % half;
  double angle = (double)p->t[b] * exp(-log(10000) * (double)i / ((double)half - (double)p->c->arg));
  int is_cos = (c < half) == ((p->c->flags & F_FLIP) != 0);

  return is_cos ? cos(angle) : sin(angle);
}

static double rgb8(double x)
{
  double v = x / 2 + 0.5;

  return isnan(v) ? 0 : rint(255 * fmin(fmax(v, 0), 1));
}

/* Element (b, h, w, c) of y for every op that is defined element by element. */
static double element(const struct problem *p, int64_t b, int64_t h, int64_t w, int64_t c)
{
  const struct op_case *k = p->c;

  switch (k->op) {
  case OP_CONV2D:
  case OP_LINEAR:
    return conv(p, b, h, w, c);
  case OP_LOWRANK:
    return lowrank(p, b, h, w, c);
  case OP_GEGLU:
    return at(&p->op[X], b, h, w, c) * gelu(at(&p->op[X], b, h, w, k->C + c));
  case OP_ACT:
    return activation(k->act, at(input(p, X), b, h, w, c));
  case OP_ADD:
    return at(input(p, X), b, h, w, c) + at(input(p, A), b, h, w, c);
  case OP_CONCAT:
    return c < k->C ? at(&p->op[X], b, h, w, c) : at(&p->op[A], b, h, w, c - k->C);
  case OP_UPSAMPLE:
    return at(&p->op[X], b, h / 2, w / 2, c);
  case OP_TIMESTEP:
    return timestep(p, b, c);
  case OP_EMBED:
    return (double)p->w_f32[0][p->ids[b * k->W + w] * k->C + c] + (double)p->w_f32[1][w * k->C + c];
  case OP_GATHER:
    return (double)p->scale[b] * at(&p->op[X], p->src[b], h, w, c);
  case OP_RGB8:
    return rgb8(at(&p->op[X], b, h, w, c));
  case OP_BLEND:
    if (at(&p->op[X], b, h, w, 0) != 0)
      return at(&p->op[Y], b, h, w, c);
    return (double)p->blend[b].a * at(&p->op[A], b, h, w, c) + (p->blend[b].b != 0 ? (double)p->blend[b].b * at(&p->op[V], b, h, w, c) : 0);
  case OP_GROUPNORM:
  case OP_LAYERNORM:
  case OP_ATTENTION:
  case OP_SAMPLER:
  case OP_NONFINITE:
  case OP_RANDN:
    break; /* functions of their own */
  }
  return NAN;
}

static void sampler(const struct problem *p, double *x_new, double *x0_new)
{
  int64_t n = operand_count(&p->op[Y]) / p->B;

  for (int64_t b = 0; b < p->B; b++)
    for (int64_t i = 0; i < n; i++) {
      const struct step_coef *k = &p->coef[b];
      double cond = (double)p->op[A].data[k->row_cond * n + i], uncond = (double)p->op[A].data[k->row_uncond * n + i];
      double x = (double)p->op[Y].data[b * n + i], e = uncond + (double)k->guidance * (cond - uncond);
      double x0 = (double)k->x0_x * x + (double)k->x0_e * e;

      x_new[b * n + i] = (double)k->c_x * x + (double)k->c_x0 * x0 +
                         (k->c_old != 0 ? (double)k->c_old * (double)p->op[OLD].data[b * n + i] : 0) +
                         (k->c_noise != 0 ? (double)k->c_noise * (double)p->op[V].data[b * n + i] : 0);
      x0_new[b * n + i] = x0;
    }
}

/* ---- random numbers: sixteen and more ---- */

static uint32_t next_word(uint32_t *s)
{
  uint32_t y;

  if (s[624] == 624) {
    for (int i = 0; i < 624; i++) {
      y = (s[i] & 0x80000000u) | (s[(i + 1) % 624] & 0x7fffffffu);
      s[i] = s[(i + 397) % 624] ^ y >> 1 ^ (y % 2 ? 0x9908b0dfu : 0);
    }
    s[624] = 0;
  }
  y = s[s[624]++];
  y ^= y >> 11;
  y ^= y << 7 & 0x9d2c5680u;
  y ^= y << 15 & 0xefc60000u;
  return y ^ y >> 18;
}

/* Box and Muller's transform of sixteen uniforms, halves against each other; v in the order of torch. */
static void sixteen(double *v)
{
  for (int j = 0; j < 8; j++) {
    double r = sqrt(-2 * log1p(-v[j])), a = 2 * acos(-1) * v[j + 8];

    v[j] = r * cos(a);
    v[j + 8] = r * sin(a);
  }
}

static void randn(const struct problem *p, double *out, double *moved)
{
  int64_t C = p->c->C, HW = (int64_t)p->c->H * p->c->W, n = HW * C, at = n - 16;
  double *v = calloc((size_t)n, sizeof *v);
  uint32_t s[NORMAL_WORDS];

  for (int64_t b = 0; b < p->B && n >= 16; b++) {
    for (int i = 0; i < NORMAL_WORDS; i++)
      s[i] = (uint32_t)p->op[OLD].data[b * NORMAL_WORDS + i];
    for (int64_t i = 0; i < n; i++)
      v[i] = next_word(s) % (1 << 24) * 0x1p-24;
    for (int64_t i = 0; i + 16 <= n; i += 16)
      sixteen(v + i);
    for (int64_t i = at; n % 16 && i < n; i++)
      v[i] = next_word(s) % (1 << 24) * 0x1p-24;
    if (n % 16)
      sixteen(v + at);
    for (int64_t i = 0; i < n; i++)
      out[b * n + i % HW * C + i / HW] = (double)p->c->arg * v[i];
    for (int i = 0; i < NORMAL_WORDS; i++)
      moved[b * NORMAL_WORDS + i] = (double)(float)(int32_t)s[i];
  }
  free(v);
}

void naive_solve(const struct problem *p, double *out[2])
{
  const struct operand *y = &p->op[Y];
  int64_t n = operand_count(y), i = 0;

  out[0] = calloc(n ? (size_t)n : 1, sizeof(double));
  out[1] = p->c->op == OP_SAMPLER || p->c->op == OP_RANDN ? calloc((size_t)operand_count(&p->op[OLD]), sizeof(double)) : NULL;
  switch (p->c->op) {
  case OP_GROUPNORM:
  case OP_LAYERNORM:
    norm(p, out[0]);
    return;
  case OP_ATTENTION:
    attend(p, out[0]);
    return;
  case OP_SAMPLER:
    sampler(p, out[0], out[1]);
    return;
  case OP_RANDN:
    randn(p, out[0], out[1]);
    return;
  case OP_NONFINITE:
    for (i = 0; i < operand_count(&p->op[X]); i++)
      out[0][0] += !isfinite(p->op[X].data[i]);
    return;
  default:
    break;
  }
  for (int64_t b = 0; b < y->d[0]; b++)
    for (int64_t h = 0; h < y->d[1]; h++)
      for (int64_t w = 0; w < y->d[2]; w++)
        for (int64_t c = 0; c < y->d[3]; c++)
          out[0][i++] = element(p, b, h, w, c);
}
