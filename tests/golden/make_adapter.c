/*
 * make_adapter.c - see make_adapter.h. Memory is malloc's: adapter_close frees what is made here.
 */
#include "tests/golden/make_adapter.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "models/checkpoint.h"
#include "models/digest.h"
#include "models/sources.h"

static const struct adapter_plan plans[] = {
  {"attn", 4, 1.0f / 4, DELTA_LOWRANK, "unet", 1},
  {"wide", 3, 2.0f / 3, DELTA_LOWRANK, "unet", 0},
  {"wide", 3, 2.0f / 3, DELTA_LOWRANK, "text_encoder", 0},
  {"dora", 4, 2.0f / 4, DELTA_DORA, "unet", 1},
};

const struct adapter_plan *adapter_plan_find(const char *name)
{
  static const char *const names[] = {"attn", "wide", "text", "dora"};

  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!strcmp(names[i], name))
      return &plans[i];
  return NULL;
}

/* The numbers that the formula gives the tensor "<name>.<site>.<part>". */
static float *draw(const char *name, const struct site *s, const char *part, int nd, const int64_t *shape)
{
  int64_t count = 1;
  char full[512];
  float *v;

  for (int i = 0; i < nd; i++)
    count *= shape[i];
  v = malloc((size_t)count * sizeof *v);
  assert_non_null(v);
  snprintf(full, sizeof full, "%s.%s.%s", name, s->name, part);
  synth_fill(full, nd, shape, DT_F32, v);
  return v;
}

static int wanted(const struct site *s, const struct adapter_plan *p)
{
  size_t n = strlen(p->component);
  int attention = strstr(s->name, ".attn1.") || strstr(s->name, ".attn2.");

  return (s->kind == WEIGHT_LINEAR || s->kind == WEIGHT_CONV) && !strncmp(s->name, p->component, n) && s->name[n] == '.' &&
         attention == p->attention;
}

/* dense = up down. */
static void multiply(struct delta *d, int64_t out, int64_t in)
{
  d->dense = malloc((size_t)(out * in) * sizeof *d->dense);
  assert_non_null(d->dense);
  for (int64_t o = 0; o < out; o++)
    for (int64_t i = 0; i < in; i++) {
      double sum = 0;

      for (int64_t r = 0; r < d->rank; r++)
        sum += (double)d->up[o * d->rank + r] * (double)d->down[r * in + i];
      d->dense[o * in + i] = (float)sum;
    }
  free(d->up);
  free(d->down);
  d->up = d->down = NULL;
  d->rank = 0;
}

static struct delta make_delta(const struct site *s, int site, const struct adapter_plan *p)
{
  int64_t in = site_count(s) / s->out;
  struct delta d = {.site = site, .kind = p->kind, .rank = p->rank, .scale = p->scale, .rule = SCALE_ALPHA, .norm = -1};

  if (p->kind == DELTA_REPLACE) {
    d.rank = 0;
    d.dense = draw(p->name, s, "whole", 2, (int64_t[]){s->out, in});
    if (s->has_bias)
      d.bias = draw(p->name, s, "bias", 1, &s->out);
    return d;
  }
  d.down = draw(p->name, s, "down", 2, (int64_t[]){p->rank, in});
  d.up = draw(p->name, s, "up", 2, (int64_t[]){s->out, p->rank});
  if (p->kind == DELTA_DENSE)
    multiply(&d, s->out, in);
  if (p->kind == DELTA_DORA) {
    d.magnitude = draw(p->name, s, "magnitude.weight", 1, &s->out);
    d.magnitude_per_row = 1;
  }
  return d;
}

struct adapter *adapter_make(const struct generation *base, const struct adapter_plan *p)
{
  struct adapter *a = calloc(1, sizeof *a);
  struct err e;
  char text[256];

  assert_non_null(a);
  a->delta = calloc((size_t)base->n, sizeof *a->delta);
  assert_non_null(a->delta);
  snprintf(a->name, sizeof a->name, "%s", p->name);
  snprintf(a->format, sizeof a->format, "test");
  snprintf(text, sizeof text, "%s %d %a %d %s %d", p->name, (int)p->rank, (double)p->scale, (int)p->kind, p->component, p->attention);
  assert_int_equal(digest_text(a->digest, "test", text, &e), 0);
  for (int i = 0; i < base->n; i++)
    if (wanted(&base->site[i], p))
      a->delta[a->n++] = make_delta(&base->site[i], i, p);
  assert_true(a->n > 0);
  a->max_rank = p->rank;
  return a;
}

static float *copy(const float *v, int64_t n)
{
  float *to = v ? malloc((size_t)n * sizeof *to) : NULL;

  assert_true(!v || to);
  if (v)
    memcpy(to, v, (size_t)n * sizeof *to);
  return to;
}

struct adapter *adapter_copy(const struct generation *base, const struct adapter *a, const char *name)
{
  struct adapter *c = calloc(1, sizeof *c);
  struct err e;

  assert_non_null(c);
  *c = *a;
  c->delta = calloc((size_t)a->n, sizeof *c->delta);
  assert_non_null(c->delta);
  snprintf(c->name, sizeof c->name, "%s", name);
  assert_int_equal(digest_text(c->digest, name, a->digest, &e), 0);
  for (int i = 0; i < a->n; i++) {
    const struct site *s = &base->site[a->delta[i].site];
    int64_t in = site_count(s) / s->out;
    struct delta *d = &c->delta[i];

    *d = a->delta[i];
    d->down = copy(d->down, d->rank * in);
    d->up = copy(d->up, s->out * d->rank);
    d->dense = copy(d->dense, s->out * in);
    d->bias = copy(d->bias, s->out);
    d->magnitude = copy(d->magnitude, s->out);
  }
  return c;
}
