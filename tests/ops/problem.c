/*
 * problem.c - a case and a seed become numbers. See harness.h.
 */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "kernels/convert.h"
#include "tests/ops/harness.h"

struct dice {
  uint64_t s;
};

static uint64_t roll(struct dice *d) /* splitmix64 */
{
  uint64_t z = d->s += 0x9e3779b97f4a7c15u;

  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static double uniform(struct dice *d)
{
  return ((double)(roll(d) >> 11) + 0.5) * 0x1p-53;
}

static double normal(struct dice *d)
{
  double r = sqrt(-2 * log(uniform(d)));

  return r * cos(6.283185307179586 * uniform(d));
}

static void *must_alloc(size_t n, size_t each)
{
  void *p = calloc(n ? n : 1, each);

  if (!p)
    abort();
  return p;
}

int64_t operand_count(const struct operand *o)
{
  return o->role == ABSENT ? 0 : o->d[0] * o->d[1] * o->d[2] * o->d[3];
}

static void set(struct problem *p, enum slot s, enum role role, enum elem elem, int64_t b, int64_t h, int64_t w, int64_t c)
{
  p->op[s] = (struct operand){role, elem, {b, h, w, c}, NULL};
}

enum slot problem_alias(const struct op_case *c)
{
  if (c->flags & F_IN_PLACE)
    return c->op == OP_CONV2D || c->op == OP_LINEAR ? A : X;
  return c->flags & F_IN_PLACE2 ? A : Y;
}

/* Which tensors the op has, of what shape and type. */
static void lay_out(struct problem *p)
{
  const struct op_case *c = p->c;
  int64_t B = c->B, H = c->H, W = c->W, C = c->C;
  enum elem out = c->flags & F_OUT_F32 ? ELEM_F32 : ELEM_ACT, in = c->flags & F_X_F32 ? ELEM_F32 : ELEM_ACT;

  set(p, X, IN, in, B, H, W, C);
  set(p, Y, OUT, out, B, H, W, C);
  switch (c->op) {
  case OP_CONV2D:
    set(p, Y, OUT, out, B, (H + c->lo + c->hi - c->k) / c->stride + 1, (W + c->lo + c->hi - c->k) / c->stride + 1, c->out);
    break;
  case OP_LINEAR:
    p->op[Y].d[3] = c->out;
    break;
  case OP_LOWRANK:
    set(p, Y, INOUT, out, B, H, W, c->out);
    if (c->k) {
      p->op[Y].d[1] = (H + c->lo + c->hi - c->k) / c->stride + 1;
      p->op[Y].d[2] = (W + c->lo + c->hi - c->k) / c->stride + 1;
    }
    break;
  case OP_GROUPNORM:
    if (c->flags & F_TEMB)
      set(p, A, IN, ELEM_ACT, B, 1, 1, C);
    break;
  case OP_ATTENTION:
    set(p, A, IN, ELEM_ACT, B, 1, c->keys, C);
    set(p, V, IN, ELEM_ACT, B, 1, c->keys, C);
    break;
  case OP_GEGLU:
    p->op[X].d[3] = 2 * C;
    break;
  case OP_ADD:
    set(p, A, IN, ELEM_ACT, B, H, W, C);
    break;
  case OP_CONCAT:
    set(p, A, IN, ELEM_ACT, B, H, W, c->out);
    p->op[Y].d[3] = C + c->out;
    break;
  case OP_UPSAMPLE:
    set(p, Y, OUT, ELEM_ACT, B, 2 * H, 2 * W, C);
    break;
  case OP_TIMESTEP:
  case OP_EMBED:
    p->op[X].role = ABSENT;
    break;
  case OP_GATHER: /* fewer latents than rows */
    set(p, X, IN, ELEM_F32, (B + 1) / 2, H, W, C);
    break;
  case OP_SAMPLER:
    p->op[X].role = ABSENT;
    set(p, Y, INOUT, ELEM_F32, B, H, W, C);
    set(p, A, IN, ELEM_F32, 2 * B, H, W, C);
    if (!(c->flags & F_NO_NOISE))
      set(p, V, IN, ELEM_F32, B, H, W, C);
    set(p, OLD, INOUT, ELEM_F32, B, H, W, C);
    break;
  case OP_BLEND:
    set(p, X, IN, ELEM_U8, B, H, W, 1);
    set(p, Y, INOUT, ELEM_F32, B, H, W, C);
    set(p, A, IN, ELEM_F32, B, H, W, C);
    set(p, V, IN, ELEM_F32, B, H, W, C);
    break;
  case OP_RANDN:
    p->op[X].role = ABSENT;
    set(p, Y, OUT, ELEM_F32, B, H, W, C);
    set(p, OLD, INOUT, ELEM_I32, B, 1, 1, NORMAL_WORDS);
    break;
  case OP_RGB8:
    p->op[Y].elem = ELEM_U8;
    break;
  case OP_NONFINITE:
    p->op[Y].role = ABSENT;
    break;
  case OP_LAYERNORM:
  case OP_ACT:
    break;
  }
  if (c->flags & F_RESIDUAL)
    p->op[A] = p->op[Y], p->op[A].role = IN;
  if (problem_alias(c) != Y) {
    p->op[Y].role = INOUT;
    p->op[problem_alias(c)].role = ABSENT;
  }
}

static float round_if(float v, int round_bf16)
{
  return round_bf16 ? bf16_to_f32(f32_to_bf16(v)) : v;
}

/* n parameters offset + gain * normal, stored as type at an odd address when that is fp16; *f32 gets what they stand for. */
static const void *draw_weights(void **raw, float **f32, enum dtype type, int64_t n, double gain, double offset, struct dice *d,
                                int round_bf16)
{
  int odd = type == DT_F16;
  char *bytes = must_alloc((size_t)n * dtype_size(type) + 1, 1);

  *raw = bytes;
  *f32 = must_alloc((size_t)n, sizeof **f32);
  for (int64_t i = 0; i < n; i++) {
    convert_set(bytes + odd, type, i, round_if((float)(offset + gain * normal(d)), round_bf16));
    (*f32)[i] = convert_get(bytes + odd, type, i);
  }
  return bytes + odd;
}

/* Both sets of factors; each raises y by about as much as y holds. */
static void draw_factors(struct problem *p, struct dice *d, int round_bf16)
{
  const struct op_case *c = p->c;
  int64_t area = c->k ? (int64_t)c->k * c->k : 1;

  for (int i = 0; i < 2; i++) {
    struct lowrank_desc *l = &p->factors[i];

    *l = (struct lowrank_desc){.out = c->out, .in = c->C, .rank = c->rank + 5 * i, .kh = c->k, .kw = c->k, .stride = c->stride,
                               .pad_lo = c->lo, .pad_hi = c->hi};
    l->down = draw_weights(&p->raw[i], &p->w_f32[i], DT_F32, l->rank * l->in * area, 1 / sqrt((double)(l->in * area)), 0, d,
                           round_bf16);
    l->up = draw_weights(&p->raw_up[i], &p->bias_f32[i], DT_F32, l->out * l->rank, 1 / sqrt((double)l->rank), 0, d, round_bf16);
  }
}

static void draw_parameters(struct problem *p, struct dice *d, int round_bf16)
{
  const struct op_case *c = p->c;
  enum dtype type = c->flags & F_W_F16 ? DT_F16 : c->flags & F_W_BF16 ? DT_BF16 : DT_F32;
  int64_t count;
  struct weight_desc *w = &p->w[0];

  switch (c->op) {
  case OP_CONV2D:
  case OP_LINEAR:
    *w = (struct weight_desc){.kind = WEIGHT_LINEAR, .out = c->out, .in = c->C, .w_type = type, .bias_type = type};
    count = w->out * w->in;
    if (c->op == OP_CONV2D) {
      w->kind = WEIGHT_CONV;
      w->kh = w->kw = c->k;
      w->stride = c->stride;
      w->pad_lo = c->lo;
      w->pad_hi = c->hi;
      count *= c->k * c->k;
    }
    w->w = draw_weights(&p->raw[0], &p->w_f32[0], type, count, 1 / sqrt((double)count / (double)w->out), 0, d, round_bf16);
    if (c->flags & F_BIAS)
      w->bias = draw_weights(&p->raw[1], &p->bias_f32[0], type, w->out, 0.5, 0, d, round_bf16);
    return;
  case OP_GROUPNORM:
  case OP_LAYERNORM:
    *w = (struct weight_desc){.kind = WEIGHT_NORM, .out = c->C, .w_type = type, .bias_type = type};
    w->w = draw_weights(&p->raw[0], &p->w_f32[0], type, c->C, 0.3, 1, d, round_bf16);
    w->bias = draw_weights(&p->raw[1], &p->bias_f32[0], type, c->C, 0.5, 0, d, round_bf16);
    return;
  case OP_EMBED:
    *w = (struct weight_desc){.kind = WEIGHT_TABLE, .out = c->C, .in = c->out, .w_type = type};
    w->w = draw_weights(&p->raw[0], &p->w_f32[0], type, (int64_t)c->out * c->C, 1, 0, d, round_bf16);
    p->w[1] = (struct weight_desc){.kind = WEIGHT_TABLE, .out = c->C, .in = c->W + 1, .w_type = type};
    p->w[1].w = draw_weights(&p->raw[1], &p->w_f32[1], type, (int64_t)(c->W + 1) * c->C, 1, 0, d, round_bf16);
    return;
  case OP_LOWRANK:
    draw_factors(p, d, round_bf16);
    return;
  default:
    return;
  }
}

/* A generator somewhere in its words, which are whole in fp32; nothing is kept, or 0. */
static void draw_state(float *state, int64_t b, struct dice *d)
{
  for (int i = 0; i < NORMAL_WORDS; i++)
    state[i] = i < NORMAL_N ? (float)(roll(d) & 0xffffff) : 0;
  state[NORMAL_N] = (float)(NORMAL_N - 37 * b);
  state[NORMAL_N + 1] = (float)(b % 2);
}

/* The numbers of every operand's rows of pictures from first on. */
static void draw_rows(struct problem *p, int64_t first, struct dice *d, int round_bf16)
{
  const struct op_case *c = p->c;
  double gain = c->gain != 0 ? (double)c->gain : 1;

  for (int s = 0; s < SLOTS; s++) {
    struct operand *o = &p->op[s];
    int64_t n = operand_count(o), from = n ? n / p->B * first : 0;

    if (!o->data)
      continue;
    for (int64_t i = from; i < n; i++)
      o->data[i] = o->elem == ELEM_U8 ? (float)(roll(d) % 3) : round_if((float)((double)c->offset + gain * normal(d)), round_bf16 && o->elem == ELEM_ACT);
    for (int64_t b = first; o->elem == ELEM_I32 && b < p->B; b++)
      draw_state(o->data + b * NORMAL_WORDS, b, d);
  }
  for (int64_t b = first; b < p->B; b++) {
    p->t[b] = b == 0 ? 999.0f : (float)(uniform(d) * 999.0);
    p->scale[b] = (float)(0.5 + uniform(d));
    for (int64_t i = 0; c->op == OP_EMBED && i < c->W; i++)
      p->ids[b * c->W + i] = (int32_t)(roll(d) % (uint64_t)c->out);
  }
}

/* One NaN and one +inf in the last picture of the first input, and NaN where attention and the sampler must not look. */
static void spoil(struct problem *p)
{
  const struct op_case *c = p->c;
  enum slot at = c->op == OP_SAMPLER || c->op == OP_BLEND || problem_alias(c) == X ? Y : X;
  int64_t n = operand_count(&p->op[at]), each = n / p->B;

  if (c->flags & F_NAN) {
    p->op[at].data[n - each + each / 3] = NAN;
    p->op[at].data[n - 1 - each / 7] = INFINITY;
  }
  for (int64_t b = 0; c->op == OP_ATTENTION && b < p->B; b++)
    for (int64_t i = p->keys[b] * c->C; i < (int64_t)c->keys * c->C; i++)
      p->op[A].data[b * c->keys * c->C + i] = p->op[V].data[b * c->keys * c->C + i] = NAN;
  for (int64_t b = 0; c->op == OP_SAMPLER && b < p->B; b++)
    for (int64_t i = b * each; i < (b + 1) * each && p->coef[b].c_old == 0; i++)
      p->op[OLD].data[i] = NAN; /* the first step: there is no x0 yet */
  for (int64_t b = 0; c->op == OP_BLEND && b < p->B; b++)
    for (int64_t i = b * each; i < (b + 1) * each && p->blend[b].b == 0; i++)
      p->op[V].data[i] = NAN;
}

static void make_host_arrays(struct problem *p)
{
  const struct op_case *c = p->c;
  size_t B = (size_t)p->B;

  p->keys = must_alloc(B, sizeof *p->keys);
  p->owner = must_alloc(B, sizeof *p->owner);
  p->t = must_alloc(B, sizeof *p->t);
  p->scale = must_alloc(B, sizeof *p->scale);
  p->src = must_alloc(B, sizeof *p->src);
  p->coef = must_alloc(B, sizeof *p->coef);
  p->blend = must_alloc(B, sizeof *p->blend);
  p->row = must_alloc(B, sizeof *p->row);
  p->ids = must_alloc(B * (size_t)c->W, sizeof *p->ids);
  for (int64_t b = 0; b < p->B; b++) {
    int guided = b % 2 == 0;

    p->keys[b] = c->flags & F_RAGGED ? c->keys - b * (c->keys / 3) : c->keys;
    p->owner[b] = c->flags & F_SHARED_KV ? p->B - 1 : b;
    assert(p->keys[b] >= 0);
    p->src[b] = (int)((p->B - 1 - b) / 2);
    p->row[b] = !(c->flags & F_MIXED) || b % 3 == 0 ? 0 : b % 3 == 1 ? -1 : 1;
    p->blend[b] = (struct blend_coef){guided ? 0.7f : 1, guided ? 0.4f : 0};
    p->coef[b] = (struct step_coef){.guidance = 7.5f, .row_cond = (int)(2 * b), .row_uncond = (int)(2 * b + guided),
                                    .x0_x = 1.25f, .x0_e = -0.75f, .c_x = 0.7f, .c_x0 = 0.4f, .c_old = guided ? -0.2f : 0.0f,
                                    .c_noise = guided && !(c->flags & F_NO_NOISE) ? 0.3f : 0.0f};
  }
}

void problem_init(struct problem *p, const struct op_case *c, uint64_t seed, int round_bf16)
{
  struct dice d = {seed * 1000003 + 17};

  for (const char *s = c->name; *s; s++)
    d.s = d.s * 31 + (unsigned char)*s;
  *p = (struct problem){.c = c, .B = c->B};
  lay_out(p);
  for (int s = 0; s < SLOTS; s++)
    if (p->op[s].role == IN || p->op[s].role == INOUT)
      p->op[s].data = must_alloc((size_t)operand_count(&p->op[s]), sizeof(float));
  draw_parameters(p, &d, round_bf16);
  make_host_arrays(p);
  draw_rows(p, 0, &d, round_bf16);
  spoil(p);
}

void problem_change_others(struct problem *p, uint64_t seed)
{
  struct dice d = {seed};

  draw_rows(p, 1, &d, 1);
  for (int64_t b = 1; b < p->B; b++)
    p->row[b] = p->row[b] == 1 ? -1 : p->row[b] + 1;
  spoil(p);
}

struct problem problem_first(const struct problem *p)
{
  struct problem one = *p;

  one.B = 1;
  for (int s = 0; s < SLOTS; s++)
    one.op[s].d[0] /= p->B;
  return one;
}

int problem_rows_independent(const struct problem *p)
{
  return p->B > 1 && p->c->op != OP_GATHER && p->c->op != OP_NONFINITE && !(p->c->flags & F_SHARED_KV);
}

void problem_close(struct problem *p)
{
  for (int s = 0; s < SLOTS; s++)
    free(p->op[s].data);
  for (int i = 0; i < 2; i++) {
    free(p->w_f32[i]);
    free(p->bias_f32[i]);
    free(p->raw[i]);
    free(p->raw_up[i]);
  }
  free(p->keys);
  free(p->owner);
  free(p->t);
  free(p->scale);
  free(p->ids);
  free(p->src);
  free(p->row);
  free(p->coef);
  free(p->blend);
  *p = (struct problem){0};
}

double problem_macs(const struct problem *p)
{
  const struct op_case *c = p->c;
  double y = (double)operand_count(&p->op[Y]);

  if (c->op == OP_CONV2D)
    return y * c->C * c->k * c->k;
  if (c->op == OP_LINEAR)
    return y * c->C;
  if (c->op == OP_LOWRANK)
    return y * c->rank * (1 + (double)c->C / c->out * (c->k ? c->k * c->k : 1));
  if (c->op == OP_ATTENTION)
    return y * c->keys * 2;
  return 0;
}

double problem_bytes(const struct problem *p, size_t act_bytes)
{
  double sum = 0, w = 0;

  for (int s = 0; s < SLOTS; s++) {
    const struct operand *o = &p->op[s];
    size_t each = o->elem == ELEM_ACT ? act_bytes : o->elem == ELEM_U8 ? 1 : 4;

    sum += (double)operand_count(o) * (double)each * (o->role == INOUT ? 2 : 1);
  }
  if (p->c->op == OP_CONV2D || p->c->op == OP_LINEAR)
    w = (double)p->w[0].out * (double)p->w[0].in * (p->c->op == OP_CONV2D ? p->c->k * p->c->k : 1);
  return sum + w * (double)act_bytes;
}
