/*
 * bench_lora.c - see bench_lora.h. Threads: none of its own.
 */
#include "server/bench_lora.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "models/adapter.h"

static double now(clockid_t clock)
{
  struct timespec t;

  clock_gettime(clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
  double x = *(const double *)a, y = *(const double *)b;

  return (x > y) - (x < y);
}

double bench_median(double *v, int n)
{
  qsort(v, (size_t)n, sizeof *v, by_value);
  return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

/* The projections that the safety experts change. */
static int is_projection(const struct site *s)
{
  static const char *const ends[] = {"to_q", "to_k", "to_v", "to_out.0"};

  if (s->kind != WEIGHT_LINEAR || strncmp(s->name, "unet.", 5) || !strstr(s->name, ".attn"))
    return 0;
  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
    if (strlen(s->name) > strlen(ends[i]) && !strcmp(s->name + strlen(s->name) - strlen(ends[i]), ends[i]))
      return 1;
  return 0;
}

/* n numbers of about `size`, never 0: some chips are faster on zeros. NULL: no memory. */
static float *factors(int64_t n, float size, uint32_t seed)
{
  float *v = malloc((size_t)n * sizeof *v);

  for (int64_t i = 0; v && i < n; i++) {
    seed = seed * 1664525u + 1013904223u;
    v[i] = size * ((float)(seed >> 8) * 0x1p-24f - 0.5f + 0x1p-26f);
  }
  return v;
}

/* An adapter that no file holds: one delta for each projection. Small enough for every bound. */
MUST_CHECK static int synthesize(struct adapter **out, const struct generation *base, int rank, struct err *e)
{
  struct adapter *a = calloc(1, sizeof *a);

  *out = NULL;
  if (!a || !(a->delta = calloc((size_t)base->n, sizeof *a->delta))) {
    adapter_close(a);
    return err_set(e, E_NOMEM, "out of memory for an adapter");
  }
  snprintf(a->name, sizeof a->name, "benchmark");
  snprintf(a->format, sizeof a->format, "none");
  memset(a->digest, '0', sizeof a->digest - 1);
  a->max_rank = rank;
  for (int i = 0; i < base->n; i++) {
    const struct site *s = &base->site[i];
    struct delta *d = &a->delta[a->n];

    if (!is_projection(s))
      continue;
    a->n++;
    *d = (struct delta){.site = i, .kind = DELTA_LOWRANK, .rank = rank, .scale = 1, .rule = SCALE_EXPLICIT, .norm = -1};
    d->down = factors(rank * s->in, 1e-2f, (uint32_t)i);
    d->up = factors(s->out * rank, 1e-2f, (uint32_t)i + 1);
    if (!d->down || !d->up) {
      adapter_close(a);
      return err_set(e, E_NOMEM, "out of memory for an adapter of rank %d", rank);
    }
    d->norm = delta_norm(d, s, NULL);
    a->params += rank * (s->in + s->out);
  }
  *out = a;
  return 0;
}

/* How long a step took on the wall, and by the clock that steps are compared with. */
struct lap {
  clockid_t clock;
  double wall, own;
};

MUST_CHECK static int timed_step(struct draw *d, struct lap *l, struct err *e)
{
  double wall = now(CLOCK_MONOTONIC), own = now(l->clock);
  int r = draw_step(d, e);

  l->own = now(l->clock) - own;
  l->wall = now(CLOCK_MONOTONIC) - wall;
  return r;
}

/* Draws both pictures in turn; who goes first alternates. The first step of each is not counted: it makes what is cached. One thread's
 * steps are compared by the processor time they take, which a busy machine changes less. */
MUST_CHECK static int step_in_turn(struct lora_cost *cost, struct draw *with, struct draw *without, int threads, struct err *e)
{
  int n = draw_step_count(with) - 1, r = 0;
  double *step = calloc((size_t)n + 1, sizeof *step), *ratio = calloc((size_t)n + 1, sizeof *ratio);

  if (!step || !ratio)
    r = err_set(e, E_NOMEM, "out of memory for the benchmark");
  for (int i = -1; !r && i < n; i++) {
    struct lap a = {threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, 0, 0}, b = a;

    if (i % 2)
      r = timed_step(with, &a, e);
    if (!r)
      r = timed_step(without, &b, e);
    if (!r && i % 2 == 0)
      r = timed_step(with, &a, e);
    if (i >= 0) {
      step[i] = a.wall;
      ratio[i] = a.own / b.own;
    }
  }
  if (!r) {
    cost->step = bench_median(step, n);
    cost->overhead = bench_median(ratio, n) - 1;
  }
  free(step);
  free(ratio);
  return r;
}

int bench_lora(struct lora_cost *cost, struct model *m, struct be *be, const struct draw_params *p, int rank, struct err *e)
{
  struct draw_params two = *p;
  struct generation *g = NULL;
  struct adapter *a = NULL;
  struct draw *with = NULL, *without = NULL;
  struct adapter_use use = {.weight = 1, .required = 1};
  int r;

  two.steps = p->steps < SAMPLER_MAX_STEPS ? p->steps + 1 : p->steps; /* the first is not counted */
  r = synthesize(&a, model_base(m), rank, e);
  if (r)
    return r;
  cost->sites = a->n;
  use.adapter = a;
  if ((r = generation_build(&g, model_base(m), model_sources(m), be, &use, 1, FORM_RUNTIME, NULL, e)) ||
      (r = draw_prepare(&with, m, &two, e)) || (r = draw_prepare(&without, m, &two, e)) || (r = draw_start(with, model_lane(m), g, e)) ||
      (r = draw_start(without, model_lane(m), model_base(m), e)))
    goto out;
  r = step_in_turn(cost, with, without, be->threads, e);
out:
  draw_close(with);
  draw_close(without);
  generation_unref(g);
  adapter_close(a);
  return r;
}
