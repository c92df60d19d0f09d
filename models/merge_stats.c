/*
 * merge_stats.c - see merge_stats.h. Called by `safelight adapter merge`. Threads: the one that owns the backend.
 *
 * A slot is one input: slot 0 is what is seen while a prompt is encoded, slot 1 + i is step i. A site is seen in one of both kinds only, so
 * what is missing in a slot is not an error.
 */
#include "models/merge_stats.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/model.h"
#include "models/predict.h"
#include "models/rng.h"

/* Sums over tokens of one expert at one site in one slot. */
struct sums {
  double *x, *hidden;       /* (in), (rank) */
  int64_t tokens;
};

struct calibration {
  const struct merge_counts *c;
  const struct merge_expert *expert;
  int n, slots;
  int *place;               /* of a site of the model in c, or -1 */
  struct sums *sums;        /* (slots, sites, n) */
  double *numbers;          /* what all of them point into */
  size_t count;
  /* where the observer writes now */
  int now_slot, now_expert;
  float *host;              /* grown as needed */
  size_t room;
};

static struct sums *sums_at(const struct calibration *k, int slot, int site, int expert)
{
  return &k->sums[((size_t)slot * (size_t)k->c->sites + (size_t)site) * (size_t)k->n + (size_t)expert];
}

static void clear(struct calibration *k)
{
  memset(k->numbers, 0, k->count * sizeof *k->numbers);
  for (int i = 0; i < k->slots * k->c->sites * k->n; i++)
    k->sums[i].tokens = 0;
}

/* x (tokens, in) into the sums: |x_j| and |(down x)_r|. */
static void add_tokens(struct sums *s, const struct delta *d, const float *x, int64_t tokens, int64_t in)
{
  for (int64_t t = 0; t < tokens; t++, x += in) {
    for (int64_t j = 0; j < in; j++)
      s->x[j] += fabs((double)x[j]);
    for (int64_t r = 0; r < d->rank; r++) {
      double h = 0;

      for (int64_t j = 0; j < in; j++)
        h += (double)d->down[r * in + j] * (double)x[j];
      s->hidden[r] += fabs(h);
    }
  }
  s->tokens += tokens;
}

static void see(void *arg, struct run *r, int site, struct tensor x)
{
  struct calibration *k = arg;
  size_t count = (size_t)tensor_count(x);
  int place = k->place[site];

  if (place < 0)
    return;
  if (count > k->room) {
    float *more = realloc(k->host, count * sizeof *more);

    if (!more) {
      run_fail(r, E_NOMEM, "out of memory for the input of a layer");
      return;
    }
    k->host = more;
    k->room = count;
  }
  r->code = r->be->ops->download(r->be, k->host, DT_F32, x, r->e);
  if (!r->code)
    add_tokens(sums_at(k, k->now_slot, place, k->now_expert), &k->expert[k->now_expert].a->delta[place], k->host,
               (int64_t)count / x.d[3], x.d[3]);
}

MUST_CHECK static int open_calibration(struct calibration *k, const struct merge_counts *c, const struct merge_expert *expert, int n,
                                       int sites, int slots, struct err *e)
{
  size_t at = 0;

  *k = (struct calibration){.c = c, .expert = expert, .n = n, .slots = slots};
  for (int i = 0; i < c->sites; i++)
    for (int j = 0; j < n; j++)
      k->count += (size_t)slots * (size_t)(c->at[i].in + expert[j].a->delta[i].rank);
  k->place = malloc((size_t)sites * sizeof *k->place);
  k->sums = calloc((size_t)slots * (size_t)c->sites * (size_t)n + 1, sizeof *k->sums);
  k->numbers = calloc(k->count + 1, sizeof *k->numbers);
  if (!k->place || !k->sums || !k->numbers)
    return err_set(e, E_NOMEM, "out of memory for a calibration");
  for (int i = 0; i < sites; i++)
    k->place[i] = -1;
  for (int i = 0; i < c->sites; i++)
    k->place[c->at[i].site] = i;
  for (int slot = 0; slot < slots; slot++)
    for (int i = 0; i < c->sites; i++)
      for (int j = 0; j < n; j++) {
        struct sums *s = sums_at(k, slot, i, j);

        s->x = k->numbers + at;
        s->hidden = s->x + c->at[i].in;
        at += (size_t)(c->at[i].in + expert[j].a->delta[i].rank);
      }
  return 0;
}

static void close_calibration(struct calibration *k)
{
  free(k->place);
  free(k->sums);
  free(k->numbers);
  free(k->host);
}

/* One picture's worth of predictions under expert k->now_expert. x, model_out: room for a latent each. */
MUST_CHECK static int draw(struct calibration *k, struct predictor *p, struct generation *g, const struct sampler_plan *plan,
                           const char *prompt, uint64_t seed, float *x, float *y, struct err *e)
{
  const struct run_observer observer = {see, k};
  size_t n = predictor_count(p);
  struct rng rng;
  int r;

  rng_seed(&rng, seed);
  rng_randn(&rng, x, n);
  for (size_t i = 0; i < n; i++)
    x[i] *= plan->init_scale;
  k->now_slot = 0;
  r = predictor_prompt(p, g, prompt, &observer, e);
  for (int i = 0; !r && i < plan->n; i++) {
    const struct sampler_step *s = &plan->step[i];

    for (size_t j = 0; j < n; j++)
      y[j] = s->scale_in * x[j];
    k->now_slot = 1 + i;
    r = predictor_run(p, y, s->timestep, &observer, y, e);
    for (size_t j = 0; j < n; j++) /* DDIM without eta: no noise, nothing of the step before */
      x[j] = s->coef.c_x * x[j] + s->coef.c_x0 * (s->coef.x0_x * x[j] + s->coef.x0_e * y[j]);
  }
  return r;
}

/* The slots of one prompt become counts. act: room for sites * n. */
static void count_slots(const struct calibration *k, struct merge_counts *c, struct merge_activation *act)
{
  for (int slot = 0; slot < k->slots; slot++) {
    for (int i = 0; i < c->sites; i++)
      for (int j = 0; j < k->n; j++) {
        struct sums *s = sums_at(k, slot, i, j);

        act[i * k->n + j] = (struct merge_activation){s->tokens ? s->x : NULL, s->tokens ? s->hidden : NULL};
        for (int64_t q = 0; s->tokens && q < c->at[i].in + k->expert[j].a->delta[i].rank; q++)
          s->x[q] /= (double)s->tokens; /* hidden lies behind x */
      }
    merge_counts_add(c, k->expert, k->n, act);
  }
}

MUST_CHECK static int build_generations(struct generation **g, struct model *m, struct be *be, const struct merge_expert *expert, int n,
                                        struct err *e)
{
  int r = 0;

  for (int i = 0; !r && i < n; i++) {
    struct adapter_use use = {.adapter = expert[i].a, .weight = expert[i].weight, .required = 1};

    r = generation_build(&g[i], model_base(m), model_sources(m), be, &use, 1, FORM_RUNTIME, NULL, e);
    if (r)
      err_wrap(e, "%s", expert[i].a->name);
  }
  return r;
}

int merge_calibrate(struct merge_counts *c, struct model *m, struct be *be, const struct merge_expert *expert, int n,
                    const struct merge_calibration *k, int *inputs, struct err *e)
{
  int side = model_info(m)->default_size / model_info(m)->vae_factor, r;
  struct generation *g[MERGE_EXPERTS_MAX] = {NULL};
  struct merge_activation *act = NULL;
  struct calibration x = {0};
  struct sampler_plan plan = {0};
  struct predictor *p = NULL;
  float *latent = NULL;

  *inputs = 0;
  if (n < 1 || n > MERGE_EXPERTS_MAX || k->steps < 1 || k->steps > 100)
    return err_set(e, E_ARG, "a calibration takes 1 to %d experts and 1 to 100 steps", MERGE_EXPERTS_MAX);
  if ((r = build_generations(g, m, be, expert, n, e)) || (r = predictor_new(&p, m, be, side, side, e)) ||
      (r = sampler_plan(&plan, &m->schedule, SAMPLER_DDIM, 0, k->steps, e)) ||
      (r = open_calibration(&x, c, expert, n, model_base(m)->n, 1 + plan.n, e)))
    goto out;
  latent = malloc(2 * predictor_count(p) * sizeof *latent);
  act = calloc((size_t)c->sites * (size_t)n + 1, sizeof *act);
  if (!latent || !act) {
    r = err_set(e, E_NOMEM, "out of memory for a calibration");
    goto out;
  }
  for (int i = 0; !r && i < k->prompts; i++) {
    clear(&x);
    for (x.now_expert = 0; !r && x.now_expert < n; x.now_expert++)
      r = draw(&x, p, g[x.now_expert], &plan, k->prompt[i], k->seed + (uint64_t)i, latent, latent + predictor_count(p), e);
    if (r) {
      err_wrap(e, "calibration prompt %d", i + 1);
      break;
    }
    count_slots(&x, c, act);
    *inputs += plan.n;
    if (k->progress)
      k->progress(k->arg, i + 1, k->prompts);
  }
out:
  for (int i = 0; i < n; i++)
    generation_unref(g[i]);
  predictor_free(p);
  sampler_plan_close(&plan);
  close_calibration(&x);
  free(latent);
  free(act);
  return r;
}
