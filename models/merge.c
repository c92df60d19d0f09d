/*
 * merge.c - sums, means and TIES of experts; the frame of every method; see merge.h. Co-Merge is in merge_co.c.
 *
 * Called by the command line and tests. Threads: OpenMP over sites, each with memory of its own; no state.
 */
#include "models/merge.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/adapter_write.h"
#include "models/merge_impl.h"
#include "models/svd.h"

static const char *const names[MERGE_METHODS] = {"concat", "weighted", "mean", "ties", "co-merge", "co-merge-rows"};

const char *merge_method_name(enum merge_method m)
{
  return names[m];
}

int merge_method_find(const char *name, enum merge_method *m, struct err *e)
{
  for (int i = 0; i < MERGE_METHODS; i++)
    if (!strcmp(names[i], name)) {
      *m = (enum merge_method)i;
      return 0;
    }
  return err_field(e, E_ARG, "method", "the method must be concat, weighted, mean, ties, co-merge or co-merge-rows, not \"%.40s\"", name);
}

int merge_needs_counts(enum merge_method m)
{
  return m == MERGE_CO || m == MERGE_CO_ROWS;
}

/* ---- dense sums ---- */

void merge_add_dense(double *w, const struct delta *d, const struct site *s, double f)
{
  int64_t columns = site_columns(s);

  for (int64_t i = 0; i < s->out; i++)
    for (int64_t k = 0; k < d->rank; k++) {
      double g = f * (double)d->scale * (double)d->up[i * d->rank + k];

      for (int64_t c = 0; c < columns; c++)
        w[i * columns + c] += g * (double)d->down[k * columns + c];
    }
}

int64_t merge_rank(const struct merge_site *m)
{
  int64_t rank = 0;

  for (int i = 0; i < m->n; i++) {
    const struct delta *d = adapter_at(m->expert[i].a, m->site);

    rank = d && d->rank > rank ? d->rank : rank;
  }
  return m->o->rank ? m->o->rank : rank;
}

/* The triplets become the site's factors. */
MUST_CHECK static int store(struct merge_site *m, const struct svd *x, struct err *e)
{
  struct delta *d = &m->out->delta[m->at];
  int r = adapter_set_lowrank(m->out, m->at, m->base, m->site, x->r, e);

  if (r)
    return r;
  svd_factors(x, x->r, d->up, d->down);
  for (int64_t i = 0; m->o->scale != 1 && i < x->m * x->r; i++)
    d->up[i] = (float)(m->o->scale * (double)d->up[i]);
  return 0;
}

int merge_cut(struct merge_site *m, const double *w, struct err *e)
{
  const struct site *s = &m->base->site[m->site];
  int64_t columns = site_columns(s);
  struct svd x;
  int r = svd_dense(&x, w, s->out, columns, merge_rank(m), e);

  if (r)
    return r;
  for (int64_t i = 0; i < s->out * columns; i++)
    m->total += w[i] * w[i];
  m->captured = svd_energy(&x, x.r);
  r = store(m, &x, e);
  svd_free(&x);
  return r;
}

/* ---- stacks of factors: concat, weighted, mean ---- */

/* The factors of all experts at the site, stacked along the rank: up (out, R) with every weight and scale in it, down (R, columns), in
 * double. The caller frees both, also after failure. */
MUST_CHECK static int stack(const struct merge_site *m, double f, double **up, double **down, int64_t *R, struct err *e)
{
  const struct site *s = &m->base->site[m->site];
  int64_t columns = site_columns(s), at = 0;

  *R = 0;
  for (int i = 0; i < m->n; i++) {
    const struct delta *d = adapter_at(m->expert[i].a, m->site);

    *R += d ? d->rank : 0;
  }
  *up = calloc((size_t)(s->out * *R) + 1, sizeof **up);
  *down = calloc((size_t)(columns * *R) + 1, sizeof **down);
  if (!*up || !*down)
    return err_field(e, E_NOMEM, s->name, "%s: out of memory for its factors", s->name);
  for (int i = 0; i < m->n; i++) {
    const struct delta *d = adapter_at(m->expert[i].a, m->site);

    for (int64_t k = 0; d && k < d->rank; k++, at++) {
      for (int64_t c = 0; c < columns; c++)
        (*down)[at * columns + c] = (double)d->down[k * columns + c];
      for (int64_t o = 0; o < s->out; o++)
        (*up)[o * *R + at] = f * (double)m->expert[i].weight * (double)d->scale * (double)d->up[o * d->rank + k];
    }
  }
  return 0;
}

/* |up down|_F^2 = sum of (up^T up) .* (down down^T). */
static double product_energy(const double *up, const double *down, int64_t m, int64_t R, int64_t n)
{
  double sum = 0;

  for (int64_t a = 0; a < R; a++)
    for (int64_t b = 0; b < R; b++) {
      double uu = 0, dd = 0;

      for (int64_t i = 0; i < m; i++)
        uu += up[i * R + a] * up[i * R + b];
      for (int64_t i = 0; i < n; i++)
        dd += down[a * n + i] * down[b * n + i];
      sum += uu * dd;
    }
  return sum;
}

MUST_CHECK static int merge_stack(struct merge_site *m, struct err *e)
{
  const struct site *s = &m->base->site[m->site];
  double f = m->o->method == MERGE_MEAN ? 1.0 / m->n : 1, *up = NULL, *down = NULL;
  struct svd x = {0};
  int64_t R;
  int r = stack(m, f, &up, &down, &R, e);

  if (!r && m->o->method == MERGE_CONCAT) {
    r = adapter_set_lowrank(m->out, m->at, m->base, m->site, R, e);
    for (int64_t i = 0; !r && i < s->out * R; i++)
      m->out->delta[m->at].up[i] = (float)(m->o->scale * up[i]);
    for (int64_t i = 0; !r && i < site_columns(s) * R; i++)
      m->out->delta[m->at].down[i] = (float)down[i]; /* was fp32 */
    /* total and captured stay 0: nothing was cut */
  } else if (!r) {
    r = svd_product(&x, up, down, s->out, R, site_columns(s), merge_rank(m), e);
    if (!r) {
      m->total = product_energy(up, down, s->out, R, site_columns(s));
      m->captured = svd_energy(&x, x.r);
      r = store(m, &x, e);
    }
  }
  svd_free(&x);
  free(up);
  free(down);
  return r;
}

/* ---- TIES ---- */

/* The k-th largest (k from 1) of n numbers, which are put in another order. Hoare's selection. */
static double kth_largest(double *x, int64_t n, int64_t k)
{
  int64_t lo = 0, hi = n - 1;

  while (lo < hi) {
    double pivot = x[lo + (hi - lo) / 2];
    int64_t i = lo, j = hi;

    while (i <= j) {
      while (x[i] > pivot)
        i++;
      while (x[j] < pivot)
        j--;
      if (i <= j) {
        double t = x[i];

        x[i++] = x[j];
        x[j--] = t;
      }
    }
    if (k - 1 <= j)
      hi = j;
    else if (k - 1 >= i)
      lo = i;
    else
      break;
  }
  return x[k - 1];
}

/* Zeroes all but the largest `keep` of the n numbers by magnitude (and what equals the smallest of these). scratch: room for n. */
static void trim(double *w, int64_t n, double keep, double *scratch)
{
  int64_t k = (int64_t)ceil(keep * (double)n);
  double least;

  if (k >= n)
    return;
  for (int64_t i = 0; i < n; i++)
    scratch[i] = fabs(w[i]);
  least = kth_largest(scratch, n, k < 1 ? 1 : k);
  for (int64_t i = 0; i < n; i++)
    if (!(fabs(w[i]) >= least))
      w[i] = 0;
}

MUST_CHECK static int merge_ties(struct merge_site *m, struct err *e)
{
  const struct site *s = &m->base->site[m->site];
  int64_t count = s->out * site_columns(s);
  double *w = calloc((size_t)(count * (m->n + 1)), sizeof *w), *merged = w ? w + count * m->n : NULL; /* an expert's each, and the result */
  int r;

  if (!w)
    return err_field(e, E_NOMEM, s->name, "%s: out of memory for %d weight changes", s->name, m->n);
  for (int i = 0; i < m->n; i++) {
    const struct delta *d = adapter_at(m->expert[i].a, m->site);

    if (d)
      merge_add_dense(w + i * count, d, s, (double)m->expert[i].weight);
    trim(w + i * count, count, m->o->keep, merged);
  }
  for (int64_t j = 0; j < count; j++) {
    double sum = 0, with = 0;
    int agree = 0;

    for (int i = 0; i < m->n; i++)
      sum += w[i * count + j];
    for (int i = 0; i < m->n; i++)
      if (w[i * count + j] * sum > 0) {
        with += w[i * count + j];
        agree++;
      }
    merged[j] = agree ? with / agree : 0;
  }
  r = merge_cut(m, merged, e);
  free(w);
  return r;
}

/* ---- the frame ---- */

/* The sites of all experts: their numbers in order, how many. */
MUST_CHECK static int list_sites(int **sites, int *count, const struct generation *base, const struct merge_expert *expert, int n,
                                 struct err *e)
{
  *count = 0;
  *sites = calloc((size_t)base->n + 1, sizeof **sites);
  if (!*sites)
    return err_set(e, E_NOMEM, "out of memory for a table of sites");
  for (int site = 0; site < base->n; site++) {
    int touched = 0;

    for (int i = 0; i < n; i++) {
      const struct delta *d = adapter_at(expert[i].a, site);

      if (d && (d->kind != DELTA_LOWRANK || d->bias))
        return err_field(e, E_ARG, expert[i].a->name, "%s: %s is not a plain LoRA there: make one with `safelight adapter extract` first",
                         expert[i].a->name, base->site[site].name);
      touched |= d != NULL;
    }
    if (touched)
      (*sites)[(*count)++] = site;
  }
  return 0;
}

MUST_CHECK static int check_options(const struct merge_expert *expert, int n, const struct merge_options *o,
                                    const struct merge_counts *counts, struct err *e)
{
  if (n < 1 || n > MERGE_EXPERTS_MAX)
    return err_set(e, E_ARG, "a merge takes 1 to %d experts; got %d", MERGE_EXPERTS_MAX, n);
  for (int i = 0; i < n; i++)
    if (!isfinite(expert[i].weight))
      return err_field(e, E_ARG, "weight", "the weight of %s must be finite", expert[i].a->name);
  if (!(o->keep > 0 && o->keep <= 1))
    return err_field(e, E_ARG, "keep", "keep must be above 0 and at most 1; got %g", o->keep);
  if (!isfinite(o->scale))
    return err_field(e, E_ARG, "scale", "scale must be finite");
  if (o->rank < 0 || (o->rank && (o->method == MERGE_CONCAT || o->method == MERGE_CO)))
    return err_field(e, E_ARG, "rank", "a rank cannot be chosen for %s: it is %s", merge_method_name(o->method),
                     o->method == MERGE_CO ? "the experts'" : "the sum of the experts'; weighted is the same sum, cut to a rank");
  if (merge_needs_counts(o->method) && (!counts || counts->experts != n))
    return err_set(e, E_INTERNAL, "%s needs the counts of a calibration with these experts", merge_method_name(o->method));
  return 0;
}

MUST_CHECK static int merge_one(struct merge_site *m, const struct merge_counts *counts, struct err *e)
{
  switch (m->o->method) {
  case MERGE_TIES: return merge_ties(m, e);
  case MERGE_CO: return merge_co(m, &counts->at[m->at], e);
  case MERGE_CO_ROWS: return merge_co_rows(m, &counts->at[m->at], e);
  default: return merge_stack(m, e);
  }
}

static void sum_up(struct merge_report *report, const struct merge_site *m, int n, const struct generation *base)
{
  double total = 0, captured = 0, places = 0, kept = 0;

  *report = (struct merge_report){.energy = 1, .worst = 1};
  for (int i = 0; i < n; i++) {
    double share = m[i].total > 0 ? m[i].captured / m[i].total : 1;

    total += m[i].total;
    captured += m[i].captured;
    places += m[i].places;
    kept += m[i].kept;
    if (share < report->worst || !report->worst_site[0]) {
      report->worst = share;
      snprintf(report->worst_site, sizeof report->worst_site, "%s", base->site[m[i].site].name);
    }
  }
  report->energy = total > 0 ? captured / total : 1;
  report->kept = places > 0 ? kept / places : 0;
}

/* Every site on its own; the first failure in table order is the one that is told. */
MUST_CHECK static int merge_all(struct merge_site *m, int count, const struct merge_counts *counts, struct err *e)
{
  struct err *errors = calloc((size_t)count + 1, sizeof *errors);
  int r = 0;

  if (!errors)
    return err_set(e, E_NOMEM, "out of memory for a merge");
#pragma omp parallel for schedule(dynamic)
  for (int i = 0; i < count; i++)
    errors[i].code = merge_one(&m[i], counts, &errors[i]);
  for (int i = 0; !r && i < count; i++)
    if (errors[i].code)
      r = err_field(e, errors[i].code, errors[i].field, "%s", errors[i].msg);
  free(errors);
  return r;
}

int merge_run(struct adapter **out, const struct generation *base, const struct merge_expert *expert, int n,
              const struct merge_options *o, const struct merge_counts *counts, struct merge_report *report, struct err *e)
{
  struct merge_site *m = NULL;
  struct adapter *a = NULL;
  int *sites = NULL, count = 0, r;

  *out = NULL;
  if ((r = check_options(expert, n, o, counts, e)) || (r = list_sites(&sites, &count, base, expert, n, e)))
    goto out;
  m = calloc((size_t)count + 1, sizeof *m);
  a = adapter_new_lowrank("merged", count);
  if (!m || !a) {
    r = err_set(e, E_NOMEM, "out of memory for a merge");
    goto out;
  }
  if (merge_needs_counts(o->method) && counts->sites != count) {
    r = err_set(e, E_INTERNAL, "the calibration saw %d sites of %d", counts->sites, count);
    goto out;
  }
  for (int i = 0; i < count; i++)
    m[i] = (struct merge_site){.expert = expert, .n = n, .o = o, .base = base, .site = sites[i], .out = a, .at = i};
  if ((r = merge_all(m, count, counts, e)) || (r = adapter_finish(a, base, e)))
    goto out;
  if (report)
    sum_up(report, m, count, base);
  *out = a;
  a = NULL;
out:
  adapter_close(a);
  free(sites);
  free(m);
  return r;
}
