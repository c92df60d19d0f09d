/*
 * merge_co.c - Co-Merge: the experts' most active weights; see merge.h.
 *
 * Called by merge.c and merge_stats.c. What is counted: at each calibration input every weight of a factor has one winner, the expert with
 * the largest |weight| * mean |input of that weight|. Input of `down` is what enters the layer, input of `up` is what leaves `down`, both
 * as that expert sees them when it is active. Threads: merge_counts_add belongs to one thread at a time; the rest has no state.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/adapter_write.h"
#include "models/merge_impl.h"

/* ---- counts ---- */

MUST_CHECK static int check_expert(const struct generation *base, const struct merge_expert *expert, int i, enum merge_method method,
                                   struct err *e)
{
  const struct adapter *first = expert[0].a, *a = expert[i].a;

  for (int k = 0; k < a->n; k++) {
    const struct site *s = &base->site[a->delta[k].site];

    if (s->kind != WEIGHT_LINEAR || a->delta[k].kind != DELTA_LOWRANK || a->delta[k].bias)
      return err_field(e, E_ARG, a->name, "%s: Co-Merge is of plain LoRAs on linear layers, which %s is not", a->name, s->name);
    if (k >= first->n || a->delta[k].site != first->delta[k].site ||
        (method == MERGE_CO && a->delta[k].rank != first->delta[k].rank))
      return err_field(e, E_ARG, a->name, "%s: Co-Merge needs experts of one architecture, and at %s it differs from %s", a->name, s->name,
                       first->name);
  }
  if (a->n != first->n)
    return err_field(e, E_ARG, a->name, "%s: Co-Merge needs experts of one architecture; it has %d sites and %s %d", a->name, a->n,
                     first->name, first->n);
  return 0;
}

int merge_counts_new(struct merge_counts **out, enum merge_method method, const struct generation *base, const struct merge_expert *expert,
                     int n, struct err *e)
{
  struct merge_counts *c;
  int ok, r;

  *out = NULL;
  for (int i = 0; i < n; i++)
    if ((r = check_expert(base, expert, i, method, e)))
      return r;
  c = calloc(1, sizeof *c);
  ok = c && (c->at = calloc((size_t)expert[0].a->n + 1, sizeof *c->at));
  if (ok) {
    c->experts = n;
    c->sites = expert[0].a->n;
  }
  for (int i = 0; ok && i < c->sites; i++) {
    const struct delta *d = &expert[0].a->delta[i];
    const struct site *s = &base->site[d->site];
    struct merge_counts_site *x = &c->at[i];

    *x = (struct merge_counts_site){.site = d->site, .rank = d->rank, .in = s->in, .out = s->out};
    if (method == MERGE_CO) {
      x->down = calloc((size_t)(n * d->rank * s->in) + 1, sizeof *x->down);
      x->up = calloc((size_t)(n * s->out * d->rank) + 1, sizeof *x->up);
      ok = x->down && x->up;
    } else {
      x->rows = calloc((size_t)(n * s->out) + 1, sizeof *x->rows);
      ok = x->rows != NULL;
    }
  }
  if (!ok) {
    merge_counts_free(c);
    return err_set(e, E_NOMEM, "out of memory for the counts of a merge");
  }
  *out = c;
  return 0;
}

void merge_counts_free(struct merge_counts *c)
{
  if (!c)
    return;
  for (int i = 0; i < c->sites; i++) {
    free(c->at[i].down);
    free(c->at[i].up);
    free(c->at[i].rows);
  }
  free(c->at);
  free(c);
}

/* best[i], at (signal, expert) of the strongest so far, learns of another signal. */
static void contend(double *best, int *who, double signal, int expert)
{
  if (signal > *best) {
    *best = signal;
    *who = expert;
  }
}

static void count_factors(struct merge_counts_site *x, const struct merge_expert *expert, int n, const struct merge_activation *act)
{
  for (int64_t i = 0; i < x->rank * x->in; i++) {
    double best = 0;
    int who = -1;

    for (int k = 0; k < n; k++)
      contend(&best, &who, fabs((double)adapter_at(expert[k].a, x->site)->down[i]) * act[k].x[i % x->in], k);
    if (who >= 0)
      x->down[who * x->rank * x->in + i]++;
  }
  for (int64_t i = 0; i < x->out * x->rank; i++) {
    double best = 0;
    int who = -1;

    for (int k = 0; k < n; k++) {
      const struct delta *d = adapter_at(expert[k].a, x->site);

      contend(&best, &who, fabs((double)expert[k].weight * (double)d->scale * (double)d->up[i]) * act[k].hidden[i % x->rank], k);
    }
    if (who >= 0)
      x->up[who * x->out * x->rank + i]++;
  }
}

/* sum over j of |dW[row][j]| * x[j], without the dense matrix. */
static double row_signal(const struct delta *d, int64_t row, int64_t in, const double *x, double weight)
{
  double sum = 0;

  for (int64_t j = 0; j < in; j++) {
    double w = 0;

    for (int64_t k = 0; k < d->rank; k++)
      w += (double)d->up[row * d->rank + k] * (double)d->down[k * in + j];
    sum += fabs(w) * x[j];
  }
  return sum * fabs(weight * (double)d->scale);
}

static void count_rows(struct merge_counts_site *x, const struct merge_expert *expert, int n, const struct merge_activation *act)
{
#pragma omp parallel for
  for (int64_t i = 0; i < x->out; i++) {
    double best = 0;
    int who = -1;

    for (int k = 0; k < n; k++)
      contend(&best, &who, row_signal(adapter_at(expert[k].a, x->site), i, x->in, act[k].x, (double)expert[k].weight), k);
    if (who >= 0)
      x->rows[who * x->out + i]++;
  }
}

void merge_counts_add(struct merge_counts *c, const struct merge_expert *expert, int n, const struct merge_activation *act)
{
  for (int i = 0; i < c->sites; i++) {
    int seen = 1;

    for (int k = 0; k < n; k++)
      seen = seen && act[i * n + k].x && act[i * n + k].hidden;
    if (seen && c->at[i].rows)
      count_rows(&c->at[i], expert, n, act + i * n);
    else if (seen)
      count_factors(&c->at[i], expert, n, act + i * n);
  }
}

/* ---- what an expert keeps ---- */

struct candidate {
  uint32_t wins;
  double size;
  int64_t at;
};

/* Most wins first; among equals the larger weight, then the earlier place: a total order, so that every machine sorts alike. */
static int by_activity(const void *a, const void *b)
{
  const struct candidate *x = a, *y = b;

  if (x->wins != y->wins)
    return x->wins < y->wins ? 1 : -1;
  if (x->size != y->size)
    return x->size < y->size ? 1 : -1;
  return x->at < y->at ? -1 : x->at > y->at;
}

/* keep[i] = 1 for the most active ceil(fraction * count). size[i]: magnitude. */
MUST_CHECK static int choose(unsigned char *keep, const uint32_t *wins, const double *size, int64_t count, double fraction, struct err *e)
{
  struct candidate *x = malloc((size_t)count * sizeof *x + 1);
  int64_t k = (int64_t)ceil(fraction * (double)count);

  if (!x)
    return err_set(e, E_NOMEM, "out of memory for a merge");
  for (int64_t i = 0; i < count; i++)
    x[i] = (struct candidate){wins[i], size[i], i};
  qsort(x, (size_t)count, sizeof *x, by_activity);
  for (int64_t i = 0; i < k && i < count; i++)
    keep[x[i].at] = 1;
  free(x);
  return 0;
}

/*
 * values (n, count, width): of each expert; wins (n, count). out (count, width): the mean over the experts that keep each place. A place is
 * `width` numbers that stay together: a weight, or a row.
 */
MUST_CHECK static int mean_of_keepers(struct merge_site *m, double *out, const double *values, const uint32_t *wins, int64_t count,
                                      int64_t width, struct err *e)
{
  unsigned char *keep = calloc((size_t)(m->n * count) + 1, 1);
  double *size = calloc((size_t)count + 1, sizeof *size);
  int r = keep && size ? 0 : err_set(e, E_NOMEM, "out of memory for a merge");

  for (int k = 0; !r && k < m->n; k++) {
    for (int64_t i = 0; i < count; i++) {
      size[i] = 0;
      for (int64_t c = 0; c < width; c++)
        size[i] += fabs(values[(k * count + i) * width + c]);
    }
    r = choose(keep + k * count, wins + k * count, size, count, m->o->keep, e);
  }
  for (int64_t i = 0; !r && i < count; i++) {
    int keepers = 0;

    for (int k = 0; k < m->n; k++)
      keepers += keep[k * count + i];
    m->places++;
    m->kept += keepers > 0;
    for (int64_t c = 0; c < width; c++) {
      double sum = 0;

      for (int k = 0; k < m->n; k++)
        if (keep[k * count + i] || (!keepers && m->o->fill_mean))
          sum += values[(k * count + i) * width + c];
      out[i * width + c] = sum / (keepers ? keepers : m->n);
    }
  }
  free(keep);
  free(size);
  return r;
}

/* One factor: is_up 0: down, as it is; 1: up, with weight and scale in it. */
MUST_CHECK static int merge_factor(struct merge_site *m, const struct merge_counts_site *c, int is_up, float *to, struct err *e)
{
  int64_t count = c->rank * (is_up ? c->out : c->in);
  double *values = malloc((size_t)((m->n + 1) * count) * sizeof *values + 1), *merged;
  int r;

  if (!values)
    return err_set(e, E_NOMEM, "out of memory for a merge");
  merged = values + m->n * count;
  for (int k = 0; k < m->n; k++) {
    const struct delta *d = adapter_at(m->expert[k].a, m->site);
    double f = is_up ? (double)m->expert[k].weight * (double)d->scale : 1;

    for (int64_t i = 0; i < count; i++)
      values[k * count + i] = f * (double)(is_up ? d->up : d->down)[i];
  }
  r = mean_of_keepers(m, merged, values, is_up ? c->up : c->down, count, 1, e);
  for (int64_t i = 0; !r && i < count; i++)
    to[i] = (float)((is_up ? m->o->scale : 1) * merged[i]);
  free(values);
  return r;
}

int merge_co(struct merge_site *m, const struct merge_counts_site *c, struct err *e)
{
  struct delta *d = &m->out->delta[m->at];
  int r = adapter_set_lowrank(m->out, m->at, m->base, m->site, c->rank, e);

  if (!r)
    r = merge_factor(m, c, 0, d->down, e);
  return r ? r : merge_factor(m, c, 1, d->up, e);
}

int merge_co_rows(struct merge_site *m, const struct merge_counts_site *c, struct err *e)
{
  const struct site *s = &m->base->site[m->site];
  int64_t count = c->out * c->in;
  double *w = calloc((size_t)((m->n + 1) * count) + 1, sizeof *w);
  int r;

  if (!w)
    return err_field(e, E_NOMEM, s->name, "%s: out of memory for %d weight changes", s->name, m->n);
  for (int k = 0; k < m->n; k++)
    merge_add_dense(w + k * count, adapter_at(m->expert[k].a, m->site), s, (double)m->expert[k].weight);
  r = mean_of_keepers(m, w + m->n * count, w, c->rows, c->out, c->in, e);
  if (!r)
    r = merge_cut(m, w + m->n * count, e);
  free(w);
  return r;
}
