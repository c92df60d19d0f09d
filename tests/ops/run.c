/*
 * run.c - runs a problem on a backend between guard bands and measures results. See harness.h.
 *
 * Works through the backend's own memory, upload and download, so that it holds for a device as well as for the host.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kernels/convert.h"
#include "tests/ops/harness.h"

enum { GUARD = 256 }; /* bytes before and after every tensor; keeps the tensor 64-byte aligned */

/* A problem's tensors in the backend's memory. */
struct stage {
  struct be *be;
  const struct problem *p;
  struct weight *w[2];
  void *block[SLOTS];         /* GUARD, tensor, GUARD */
  unsigned char *before[SLOTS]; /* what was uploaded */
  size_t bytes[SLOTS];        /* of the tensor alone */
  struct tensor t[SLOTS];
  struct kv_row *kv;          /* attention: one per picture */
  struct lowrank *factors[2];
  const struct lowrank **row; /* lowrank: one per picture */
  int64_t bad;                /* count_nonfinite's answer */
};

static enum dtype type_of(const struct be *be, enum elem e)
{
  return e == ELEM_ACT ? be->act : e == ELEM_F32 ? DT_F32 : e == ELEM_I32 ? DT_I32 : DT_U8;
}

static struct tensor block_tensor(const struct stage *s, int i)
{
  return (struct tensor){s->block[i], {1, 1, 1, (int64_t)(s->bytes[i] + 2 * GUARD)}, DT_U8};
}

static void stage_close(struct stage *s)
{
  for (int i = 0; i < SLOTS; i++) {
    s->be->ops->mem_free(s->be, s->block[i]);
    free(s->before[i]);
  }
  for (int i = 0; i < 2; i++)
    s->be->ops->weight_free(s->be, s->w[i]);
  for (int i = 0; i < 2; i++)
    s->be->ops->lowrank_free(s->be, s->factors[i]);
  free(s->row);
  free(s->kv);
}

/* Factors, and which of them each picture has. */
static int stage_factors(struct stage *s, struct err *e)
{
  const struct problem *p = s->p;
  int r = 0;

  for (int i = 0; i < 2 && !r; i++)
    r = s->be->ops->lowrank_load(s->be, &p->factors[i], &s->factors[i], e);
  s->row = calloc((size_t)p->B, sizeof *s->row);
  if (!s->row)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < p->B; b++)
    s->row[b] = p->row[b] < 0 ? NULL : s->factors[p->row[b]];
  return r;
}

static int stage_open(struct stage *s, struct be *be, const struct problem *p, int poison, struct err *e)
{
  int r = 0;

  *s = (struct stage){.be = be, .p = p};
  for (int i = 0; i < SLOTS && !r; i++) {
    const struct operand *o = &p->op[i];
    enum dtype type = type_of(be, o->elem);
    size_t all;

    s->t[i] = tensor_none();
    if (o->role == ABSENT)
      continue;
    s->bytes[i] = (size_t)operand_count(o) * dtype_size(type);
    all = s->bytes[i] + 2 * GUARD;
    s->before[i] = malloc(all);
    if (!s->before[i])
      return err_set(e, E_NOMEM, "out of memory");
    for (size_t j = 0; j < all; j++)
      s->before[i][j] = (unsigned char)(0xa5 + 7 * j);
    if (o->role == OUT)
      memset(s->before[i] + GUARD, poison, s->bytes[i]);
    else
      convert_array(s->before[i] + GUARD, type, o->data, DT_F32, operand_count(o));
    r = be->ops->mem_alloc(be, all, &s->block[i], e);
    if (!r)
      r = be->ops->upload(be, block_tensor(s, i), s->before[i], DT_U8, e);
    s->t[i] = (struct tensor){(char *)s->block[i] + GUARD, {o->d[0], o->d[1], o->d[2], o->d[3]}, type};
  }
  for (int i = 0; i < 2 && !r; i++)
    if (p->w[i].w)
      r = be->ops->weight_load(be, &p->w[i], NULL, &s->w[i], e);
  if (!r && p->c->op == OP_LOWRANK)
    r = stage_factors(s, e);
  if (problem_alias(p->c) != Y)
    s->t[problem_alias(p->c)] = s->t[Y];
  if (!r && p->c->op == OP_ATTENTION) {
    s->kv = calloc((size_t)p->B, sizeof *s->kv);
    if (!s->kv)
      return err_set(e, E_NOMEM, "out of memory");
    for (int64_t b = 0; b < p->B; b++)
      s->kv[b] = (struct kv_row){tensor_batch(s->t[A], p->owner[b], 1).p, tensor_batch(s->t[V], p->owner[b], 1).p,
                                 p->keys[p->owner[b]]};
  }
  return r;
}

static int call(struct stage *s, struct err *e)
{
  const struct problem *p = s->p;
  const struct op_case *c = p->c;
  const struct be_ops *o = s->be->ops;
  struct be *be = s->be;
  struct tensor y = s->t[Y], x = s->t[X], a = s->t[A];

  switch (c->op) {
  case OP_CONV2D:
    return o->conv2d(be, y, x, s->w[0], a, e);
  case OP_LINEAR:
    return o->linear(be, y, x, s->w[0], a, e);
  case OP_LOWRANK:
    return o->lowrank(be, y, x, s->row, e);
  case OP_GROUPNORM:
    return o->groupnorm(be, y, x, a, s->w[0], c->groups, c->arg, (c->flags & F_SILU) != 0, e);
  case OP_LAYERNORM:
    return o->layernorm(be, y, x, s->w[0], c->arg, e);
  case OP_ATTENTION:
    return o->attention(be, y, x, s->kv, c->heads, c->arg != 0 ? c->arg : 1 / sqrtf((float)c->C / (float)c->heads),
                        (c->flags & F_CAUSAL) != 0, e);
  case OP_GEGLU:
    return o->geglu(be, y, x, e);
  case OP_ACT:
    return o->act(be, y, x, (enum act_kind)c->act, e);
  case OP_ADD:
    return o->add(be, y, x, a, e);
  case OP_CONCAT:
    return o->concat(be, y, x, a, e);
  case OP_UPSAMPLE:
    return o->upsample2x(be, y, x, e);
  case OP_TIMESTEP:
    return o->timestep_embed(be, y, p->t, (c->flags & F_FLIP) != 0, c->arg, e);
  case OP_EMBED:
    return o->embed(be, y, p->ids, s->w[0], s->w[1], e);
  case OP_GATHER:
    return o->gather_scale(be, y, x, p->src, p->scale, e);
  case OP_SAMPLER:
    return o->sampler_step(be, y, s->t[OLD], a, s->t[V], p->coef, e);
  case OP_BLEND:
    return o->blend(be, y, x, a, s->t[V], p->blend, e);
  case OP_RANDN:
    return o->randn(be, y, s->t[OLD], c->arg, e);
  case OP_RGB8:
    return o->to_rgb8(be, y, x, e);
  case OP_NONFINITE:
    return o->count_nonfinite(be, x, &s->bad, e);
  }
  return err_set(e, E_INTERNAL, "no such op");
}

/* Whether now, the bytes of y, still holds what it held where a picture has no factors. */
static int spared(const struct stage *s, const unsigned char *now)
{
  size_t each = s->bytes[Y] / (size_t)s->p->B;

  for (int64_t b = 0; b < s->p->B; b++)
    if (!s->row[b] && memcmp(now + (size_t)b * each, s->before[Y] + GUARD + (size_t)b * each, each))
      return 0;
  return 1;
}

/* Takes the outputs over into r and looks at everything that the op must not have touched. */
static int collect(struct stage *s, struct result *r, struct err *e)
{
  static const char *const names[] = {"y", "x", "a", "v", "old"};
  int rc = 0, outs = 0;

  for (int i = 0; i < SLOTS && !rc; i++) {
    const struct operand *o = &s->p->op[i];
    size_t n = s->bytes[i], all = n + 2 * GUARD;
    unsigned char *now;
    int is_out = o->role == OUT || o->role == INOUT;

    if (o->role == ABSENT)
      continue;
    now = malloc(all);
    if (!now)
      return err_set(e, E_NOMEM, "out of memory");
    rc = s->be->ops->download(s->be, now, DT_U8, block_tensor(s, i), e);
    if (!rc && (memcmp(now, s->before[i], GUARD) || memcmp(now + GUARD + n, s->before[i] + GUARD + n, GUARD)))
      snprintf(r->fault, sizeof r->fault, "wrote outside of %s", names[i]);
    if (!rc && !is_out && memcmp(now, s->before[i], all))
      snprintf(r->fault, sizeof r->fault, "changed its input %s", names[i]);
    if (!rc && s->p->c->op == OP_LOWRANK && i == Y && !spared(s, now + GUARD))
      snprintf(r->fault, sizeof r->fault, "changed a picture without factors");
    if (!rc && is_out) {
      r->count[outs] = operand_count(o);
      r->row[outs] = o->d[3];
      r->raw_bytes[outs] = n;
      r->type[outs] = s->t[i].type;
      memmove(now, now + GUARD, n);
      r->raw[outs] = now;
      r->v[outs] = malloc((size_t)r->count[outs] * sizeof(float));
      if (!r->v[outs])
        return err_set(e, E_NOMEM, "out of memory");
      convert_array(r->v[outs], DT_F32, now, s->t[i].type, r->count[outs]);
      outs++;
      now = NULL;
    }
    free(now);
  }
  return rc;
}

static int collect_count(struct stage *s, struct result *r, struct err *e)
{
  r->v[0] = malloc(sizeof(float));
  r->raw[0] = malloc(sizeof s->bad);
  if (!r->v[0] || !r->raw[0])
    return err_set(e, E_NOMEM, "out of memory");
  r->v[0][0] = (float)s->bad;
  memcpy(r->raw[0], &s->bad, sizeof s->bad);
  r->raw_bytes[0] = sizeof s->bad;
  r->count[0] = r->row[0] = 1;
  return 0;
}

static int call_and_sync(struct stage *s, struct err *e)
{
  int r = call(s, e);

  return r ? r : s->be->ops->sync(s->be, e);
}

/* Puts everything back to what it was before the call. */
static int stage_again(struct stage *s, struct err *e)
{
  int r = 0;

  for (int i = 0; i < SLOTS && !r; i++)
    if (s->block[i])
      r = s->be->ops->upload(s->be, block_tensor(s, i), s->before[i], DT_U8, e);
  return r;
}

void problem_run(struct result *r, struct be *be, const struct problem *p, int poison, int warm)
{
  struct err e = {0};
  struct stage s;
  int rc;

  *r = (struct result){0};
  rc = stage_open(&s, be, p, poison, &e);
  if (!rc && warm)
    rc = call_and_sync(&s, &e);
  if (!rc && warm)
    rc = stage_again(&s, &e);
  r->allocs = alloc_count();
  if (!rc)
    rc = call_and_sync(&s, &e);
  r->allocs = alloc_count() - r->allocs;
  if (!rc)
    rc = collect(&s, r, &e);
  if (!rc && p->c->op == OP_NONFINITE)
    rc = collect_count(&s, r, &e);
  if (rc)
    snprintf(r->fault, sizeof r->fault, "%s: %.120s", err_name(rc), e.msg);
  stage_close(&s);
}

void result_close(struct result *r)
{
  for (int i = 0; i < 2; i++) {
    free(r->v[i]);
    free(r->raw[i]);
  }
  *r = (struct result){0};
}

static double now_s(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double problem_time(struct be *be, const struct problem *p, double budget_s)
{
  struct err e = {0};
  struct stage s;
  double best = INFINITY, start = now_s(), from, took;
  int rc = stage_open(&s, be, p, 0, &e);

  do {
    from = now_s();
    rc = rc ? rc : call_and_sync(&s, &e);
    took = now_s() - from;
    best = took < best ? took : best;
  } while (!rc && now_s() - start < budget_s);
  stage_close(&s);
  return rc ? NAN : best;
}

void result_doubles(const struct result *r, double *out[2])
{
  for (int i = 0; i < 2; i++) {
    out[i] = r->count[i] ? malloc((size_t)r->count[i] * sizeof(double)) : NULL;
    for (int64_t j = 0; out[i] && j < r->count[i]; j++)
      out[i][j] = (double)r->v[i][j];
  }
}

/* The same kind of number: both finite, both NaN, or the same infinity. */
static int same_kind(double a, double b)
{
  if (isnan(a) || isnan(b))
    return isnan(a) && isnan(b);
  return (isinf(a) || isinf(b)) ? a == b : 1;
}

/* How far want is from the numbers that a backend may round to got. */
static double distance(double got, double want, enum dtype type)
{
  double d = fabs(got - want);
  int exponent;

  if ((type == DT_BF16 || type == DT_F16) && got != 0) {
    frexp(got, &exponent);
    if (type == DT_F16 && exponent < -13)
      exponent = -13; /* subnormal */
    d -= ldexp(1, exponent - (type == DT_F16 ? 12 : 9)); /* half of the last of 11 or 8 bits */
  }
  return d > 0 ? d : 0;
}

struct measure result_measure(const struct result *got, double *const want[2])
{
  struct measure m = {1, 0, 0};
  double err_sum = 0, sum = 0;

  for (int i = 0; i < 2; i++) {
    int64_t row = got->row[i] < 32 ? got->count[i] : got->row[i];

    for (int64_t at = 0; at < got->count[i]; at += row) {
      double row_sum = 0, top = 0, rms, rel;

      for (int64_t j = at; j < at + row; j++) {
        double g = (double)got->v[i][j], w = want[i][j], d;

        m.same_mask = m.same_mask && same_kind(g, w);
        if (!isfinite(w) || !isfinite(g))
          continue;
        d = distance(g, w, got->type[i]);
        row_sum += w * w;
        err_sum += d * d;
        top = d > top ? d : top;
      }
      sum += row_sum;
      rms = sqrt(row_sum / (double)row);
      rel = top > 0 ? top / rms : 0;
      m.worst = rel <= m.worst ? m.worst : rel;
    }
  }
  m.nmse = err_sum > 0 ? err_sum / sum : 0;
  return m;
}
