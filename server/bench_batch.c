/*
 * bench_batch.c - see bench_batch.h. Both ways run in turn, so that what other processes take from the machine is taken from both.
 */
#include "server/bench_batch.h"

#include <stdlib.h>
#include <time.h>

#include "models/crew.h"
#include "server/bench_lora.h"

enum { MAX_ROUNDS = 100 };

/* The pictures of a round. */
struct round {
  struct model *m;
  struct batch *batch;
  struct crew *ends;       /* lanes for encoding and decoding */
  struct draw *d[BATCH_MAX];
  struct err err[BATCH_MAX];
  uint8_t *rgb;            /* of one picture for each: bytes apart */
  size_t bytes;
  int n;
};

static double now(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void start(void *arg, struct lane *l, int i)
{
  struct round *r = arg;

  if (draw_start(r->d[i], l, model_base(r->m), &r->err[i]))
    return; /* in err */
}

static void decode(void *arg, struct lane *l, int i)
{
  struct round *r = arg;

  if (draw_decode(r->d[i], l, r->rgb + (size_t)i * r->bytes, &r->err[i]))
    return; /* in err */
}

MUST_CHECK static int first_error(const struct round *r, struct err *e)
{
  for (int i = 0; i < r->n; i++)
    if (r->err[i].code)
      return err_set(e, r->err[i].code, "%s", r->err[i].msg);
  return 0;
}

static void close_all(struct round *r)
{
  for (int i = 0; i < r->n; i++) {
    draw_close(r->d[i]);
    r->d[i] = NULL;
  }
}

MUST_CHECK static int prepare_all(struct round *r, const struct draw_params *p, struct err *e)
{
  int code = 0;

  for (int i = 0; !code && i < r->n; i++) {
    struct draw_params mine = *p;

    mine.seed = (uint64_t)i;
    r->err[i] = (struct err){0};
    code = draw_prepare(&r->d[i], r->m, &mine, e);
  }
  return code;
}

/* All at once. Seconds in all and of the steps. */
MUST_CHECK static int together(struct round *r, const struct draw_params *p, double *all, double *steps, struct err *e)
{
  int code = prepare_all(r, p, e);
  double begun = now();

  if (code)
    return code;
  crew_run(r->ends, model_lane(r->m), r->n, 1, start, r);
  code = first_error(r, e);
  *steps = now();
  while (!code && draw_step_index(r->d[0]) < draw_step_count(r->d[0])) {
    batch_step(r->batch, r->d, r->n, r->err);
    code = first_error(r, e);
  }
  *steps = now() - *steps;
  if (!code) {
    crew_run(r->ends, model_lane(r->m), r->n, 1, decode, r);
    code = first_error(r, e);
  }
  *all = now() - begun;
  close_all(r);
  return code;
}

/* One after the other, on the main lane and all threads. */
MUST_CHECK static int alone(struct round *r, const struct draw_params *p, double *all, double *steps, struct err *e)
{
  int code = prepare_all(r, p, e);
  double begun = now();

  *steps = 0;
  for (int i = 0; !code && i < r->n; i++) {
    double mark;

    code = draw_start(r->d[i], model_lane(r->m), model_base(r->m), e);
    mark = now();
    while (!code && draw_step_index(r->d[i]) < draw_step_count(r->d[i]))
      code = draw_step(r->d[i], e);
    *steps += now() - mark;
    if (!code)
      code = draw_decode(r->d[i], model_lane(r->m), r->rgb, e);
  }
  *all = now() - begun;
  close_all(r);
  return code;
}

MUST_CHECK static int measure(struct round *r, const struct draw_params *p, int rounds, struct batch_gain *gain, struct err *e)
{
  double one[MAX_ROUNDS], many[MAX_ROUNDS], ratio[MAX_ROUNDS], step_ratio[MAX_ROUNDS];
  struct draw_params warm = *p;
  double t, s;
  int code;

  warm.steps = 1;
  if ((code = together(r, &warm, &t, &s, e)) || (code = alone(r, &warm, &t, &s, e)))
    return code;
  for (int i = 0; i < rounds; i++) {
    double steps_one, steps_many;

    if ((code = alone(r, p, &one[i], &steps_one, e)) || (code = together(r, p, &many[i], &steps_many, e)))
      return code;
    ratio[i] = one[i] / many[i];
    step_ratio[i] = steps_one / steps_many;
  }
  gain->gain = bench_median(ratio, rounds);
  gain->step_gain = bench_median(step_ratio, rounds);
  gain->alone = r->n / bench_median(one, rounds);
  gain->together = r->n / bench_median(many, rounds);
  return 0;
}

int bench_batch(struct batch_gain *gain, struct model *m, struct be *be, const struct draw_params *p, int n, int rounds, struct err *e)
{
  struct round r = {.m = m, .n = n, .bytes = (size_t)p->width * (size_t)p->height * 3};
  int helpers = be->ops->rows_are_alone ? 0 : be->threads - 1, code;

  r.rgb = malloc((size_t)n * r.bytes);
  if (!r.rgb)
    return err_set(e, E_NOMEM, "out of memory for the benchmark");
  code = batch_plan_bytes(m, p->width, p->height, n, &gain->bytes, e);
  if (!code)
    code = batch_open(&r.batch, m, n, e);
  if (!code)
    code = crew_open(&r.ends, m, helpers, LANE_ENDS, e);
  if (!code)
    code = measure(&r, p, rounds < MAX_ROUNDS ? rounds : MAX_ROUNDS, gain, e);
  crew_close(r.ends);
  batch_close(r.batch);
  free(r.rgb);
  return code;
}
