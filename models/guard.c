/*
 * guard.c - see guard.h. Called by the loader.
 *
 * A site is looked at once: all inner products between its deltas go into one small table, from which everything else is arithmetic.
 * Invariants: sums are in double and in the order of the uses; no more than two weights of a site are in memory beside W0. Threads: no state.
 */
#include "models/guard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/sources.h"

/* Below this share of what its members have each, S is what rounding left of members that cancel each other. */
static const double NOTHING = 1e-12;

/* Projection gives up above this factor, or after so many sweeps: required adapters that nearly cancel each other. */
static const double MOST = 16;
enum { SWEEPS = 200 };

/* A delta at the site in hand. */
struct part {
  const struct delta *d;
  double k;               /* weight */
  int use, at;            /* which use; which of its deltas */
};

struct guard {
  struct guard_report *r;
  const struct generation *base;
  const struct model_sources *sources;
  const struct adapter_use *use;
  int n;
  double tau;
  int *at;                /* n: the next delta of each use */
  struct part *part;      /* n: of the site in hand */
  int parts;              /* at the site in hand */
  double *gram;           /* n * n, parts * parts in use: <part i, part j> */
  double *us;             /* n: <U, S_i> of all styles together, for part i */
  double *p;              /* n: what projection adds to the factor of part i */
  double *us_all;         /* n: of use i, the sum of <U_i, S> over the sites */
  double ss_all;
  struct err *e;
};

/* ---- inner products at one site ---- */

static double dot(const float *a, int64_t a_step, const float *b, int64_t b_step, int64_t n)
{
  double sum = 0;

  for (int64_t i = 0; i < n; i++)
    sum += (double)a[i * a_step] * (double)b[i * b_step];
  return sum;
}

/* Between two low-rank deltas, from their factors. */
static double factor_product(const struct delta *a, const struct delta *b, const struct site *s)
{
  int64_t in = site_columns(s);
  double sum = 0;

  for (int64_t i = 0; i < a->rank; i++)
    for (int64_t j = 0; j < b->rank; j++)
      sum += dot(a->up + i, a->rank, b->up + j, b->rank, s->out) * dot(a->down + i * in, 1, b->down + j * in, 1, in);
  return sum * (double)a->scale * (double)b->scale;
}

/* Low-rank deltas add the same bias whatever their scale. */
static double bias_product(const struct delta *a, const struct delta *b, const struct site *s)
{
  return a->bias && b->bias ? dot(a->bias, 1, b->bias, 1, s->out) : 0;
}

static double product(const struct part *a, const struct part *b, const struct site *s)
{
  return a->k * b->k * (factor_product(a->d, b->d, s) + bias_product(a->d, b->d, s));
}

static int is_required(const struct guard *g, int part)
{
  return g->use[g->part[part].use].required;
}

static double gram(const struct guard *g, int i, int j)
{
  return g->gram[i * g->parts + j];
}

static void set_gram(struct guard *g, int i, int j, double v)
{
  g->gram[i * g->parts + j] = g->gram[j * g->parts + i] = v;
}

static void measure_factors(struct guard *g, const struct site *s)
{
  for (int i = 0; i < g->parts; i++)
    for (int j = 0; j <= i; j++)
      set_gram(g, i, j, product(&g->part[i], &g->part[j], s));
}

/* v = the dW of a part, bias behind the weight. */
static void make_dense(const struct part *p, const struct site *s, const struct pristine *w0, float *v)
{
  memset(v, 0, (size_t)(w0->count + (s->has_bias ? s->out : 0)) * sizeof *v);
  delta_apply(p->d, s, w0->w, w0->bias, (float)p->k, v, s->has_bias ? v + w0->count : NULL);
}

/* The same from whole matrices, for what has no factors: made again for every pair, which takes time where holding all would take memory. */
MUST_CHECK static int measure_dense(struct guard *g, const struct site *s, const struct pristine *w0)
{
  int64_t n = w0->count + (s->has_bias ? s->out : 0);
  float *a = malloc((size_t)n * sizeof *a), *b = malloc((size_t)n * sizeof *b);
  int rc = 0;

  if (!a || !b) {
    rc = err_set(g->e, E_NOMEM, "%s: no memory to compare adapters", s->name);
    goto out;
  }
  for (int i = 0; i < g->parts; i++) {
    make_dense(&g->part[i], s, w0, a);
    set_gram(g, i, i, dot(a, 1, a, 1, n));
    for (int j = 0; j < i; j++) {
      make_dense(&g->part[j], s, w0, b);
      set_gram(g, i, j, dot(a, 1, b, 1, n));
    }
  }
out:
  free(a);
  free(b);
  return rc;
}

/* ---- what follows from them ---- */

static void note_norms(struct guard *g, int site, double w0)
{
  double sum = 0;

  for (int i = 0; i < g->parts; i++) {
    struct guard_style *k = &g->r->of[g->part[i].use];
    double ratio;

    if (is_required(g, i))
      continue;
    ratio = sqrt(gram(g, i, i));
    if (ratio > 0)
      ratio /= w0; /* infinite where a style touches a weight of zeros */
    k->norm_ratio = ratio <= k->norm_ratio ? k->norm_ratio : ratio;
    sum += ratio;
  }
  if (!(sum <= g->r->norm_ratio)) {
    g->r->norm_ratio = sum;
    g->r->norm_site = site;
  }
}

/* c of a style alone (part `style`) or of all (-1), against a member (part `member`) or S (-1). */
static void note_c(struct guard *g, int site, int style, int member, double c)
{
  struct guard_report *r = g->r;
  struct guard_style *k = style >= 0 ? &r->of[g->part[style].use] : NULL;

  if (k && c < k->c) {
    k->c = c;
    k->site = site;
  }
  if (!k && c < r->c_together)
    r->c_together = c;
  if (c < r->c) {
    r->c = c;
    r->site = site;
    r->style = k ? g->part[style].use : -1;
    r->member = member >= 0 ? g->part[member].use : -1;
  }
}

/* Every style, and all of them, against one member, or against S for member -1; size: |member|^2. */
static void note_against(struct guard *g, int site, int member, double size)
{
  double together = 0;

  for (int k = 0; k < g->parts; k++) {
    double us = 0;

    if (is_required(g, k))
      continue;
    for (int i = 0; i < g->parts; i++)
      us += is_required(g, i) && (member < 0 || member == i) ? gram(g, i, k) : 0;
    together += us;
    if (member < 0)
      g->us_all[g->part[k].use] += us;
    note_c(g, site, k, member, us / size);
  }
  note_c(g, site, -1, member, together / size);
}

/* <U + sum of p_j S_j, S_i>: what all styles and the projection come to along a member. */
static double along(const struct guard *g, int i)
{
  double v = g->us[i];

  for (int j = 0; j < g->parts; j++)
    v += g->p[j] * gram(g, i, j);
  return v;
}

/* One sweep of raising each member, then all of them alike, to what is allowed. 1 when nothing was left to raise. */
static int raise_all(struct guard *g, double ss)
{
  double all = 0, lacks;
  int done = 1;

  for (int i = 0; i < g->parts; i++) {
    if (!is_required(g, i) || !(gram(g, i, i) > 0))
      continue;
    lacks = -g->tau - along(g, i) / gram(g, i, i);
    if (lacks > 1e-9) {
      g->p[i] += lacks;
      done = 0;
    }
  }
  for (int i = 0; i < g->parts; i++)
    all += is_required(g, i) ? along(g, i) : 0;
  lacks = -g->tau - all / ss;
  for (int i = 0; i < g->parts && lacks > 1e-9; i++) {
    g->p[i] += is_required(g, i) ? lacks : 0;
    done = 0;
  }
  return done;
}

/* The required deltas of this site get 1 + p. */
MUST_CHECK static int note_factors(struct guard *g)
{
  for (int i = 0; i < g->parts; i++) {
    const struct part *p = &g->part[i];
    int deltas = g->use[p->use].adapter->n;
    float **f = &g->r->factor[p->use];

    if (!is_required(g, i) || !(g->p[i] > 0))
      continue;
    if (!*f) {
      *f = malloc((size_t)deltas * sizeof **f);
      if (!*f)
        return err_set(g->e, E_NOMEM, "no memory for the factors of %d sites", deltas);
      for (int k = 0; k < deltas; k++)
        (*f)[k] = 1;
    }
    (*f)[p->at] = (float)(1 + g->p[i]);
    if (!(g->p[i] < MOST))
      g->r->can_project = 0;
  }
  return 0;
}

/* The coefficients of a site where S is something, and what would mend them. */
MUST_CHECK static int note_site(struct guard *g, int site, double ss)
{
  int done = 0;

  note_against(g, site, -1, ss);
  for (int i = 0; i < g->parts; i++) {
    g->p[i] = g->us[i] = 0;
    if (is_required(g, i) && gram(g, i, i) > 0)
      note_against(g, site, i, gram(g, i, i));
    for (int k = 0; k < g->parts; k++)
      g->us[i] += is_required(g, k) ? 0 : gram(g, i, k);
  }
  for (int sweep = 0; sweep < SWEEPS && !done; sweep++)
    done = raise_all(g, ss);
  if (!done)
    g->r->can_project = 0;
  return note_factors(g);
}

/* Collects the deltas that touch the site; *styles: how many of them are styles'; *lowrank: all of them are factors. */
static void collect(struct guard *g, int site, int *styles, int *lowrank)
{
  g->parts = 0;
  *styles = 0;
  *lowrank = 1;
  for (int i = 0; i < g->n; i++) {
    const struct adapter *a = g->use[i].adapter;
    int at = g->at[i];

    if (at == a->n || a->delta[at].site != site)
      continue;
    g->part[g->parts++] = (struct part){&a->delta[at], (double)g->use[i].weight, i, at};
    g->at[i]++;
    *styles += !g->use[i].required;
    *lowrank &= a->delta[at].kind == DELTA_LOWRANK;
  }
}

MUST_CHECK static int measure_site(struct guard *g, int site)
{
  const struct site *s = &g->base->site[site];
  struct pristine w0 = {0};
  double ss = 0, apart = 0, total = 0;
  int styles, lowrank, rc = 0;

  collect(g, site, &styles, &lowrank);
  if (!g->parts)
    return 0;
  if (styles || !lowrank)
    rc = sources_read(g->sources, s, &w0, g->e);
  if (!rc && lowrank)
    measure_factors(g, s);
  else if (!rc)
    rc = measure_dense(g, s, &w0);
  if (rc)
    goto out;
  for (int i = 0; i < g->parts; i++)
    for (int j = 0; j < g->parts; j++) {
      total += gram(g, i, j);
      ss += is_required(g, i) && is_required(g, j) ? gram(g, i, j) : 0;
      apart += is_required(g, i) && i == j ? gram(g, i, j) : 0;
    }
  if (!isfinite(total)) {
    rc = err_field(g->e, E_FILE, s->name, "%s: the adapters are too large to be compared", s->name);
    goto out;
  }
  if (styles)
    note_norms(g, site, sqrt(dot(w0.w, 1, w0.w, 1, w0.count) + (w0.bias ? dot(w0.bias, 1, w0.bias, 1, s->out) : 0)));
  if (ss > NOTHING * apart) {
    g->ss_all += ss;
    rc = note_site(g, site, ss);
  }
out:
  pristine_free(&w0);
  return rc;
}

/* ---- the whole ---- */

static void note_all(struct guard *g)
{
  for (int i = 0; i < g->n && g->ss_all > 0; i++) {
    g->r->of[i].c_all = g->us_all[i] / g->ss_all;
    g->r->c_all += g->r->of[i].c_all;
  }
}

int guard_measure(struct guard_report *r, const struct generation *base, const struct model_sources *sources,
                  const struct adapter_use *use, int n, double tau, struct err *e)
{
  struct guard g = {.r = r, .base = base, .sources = sources, .use = use, .n = n, .tau = tau, .e = e};
  size_t entries = (size_t)(n ? n : 1);
  int rc = 0;

  *r = (struct guard_report){.site = SITE_NONE, .style = -1, .member = -1, .can_project = 1, .norm_site = SITE_NONE, .n = n};
  r->of = calloc(entries, sizeof *r->of);
  r->factor = calloc(entries, sizeof *r->factor);
  g.at = calloc(entries, sizeof *g.at);
  g.part = calloc(entries, sizeof *g.part);
  g.gram = calloc(entries * entries, sizeof *g.gram);
  g.us = calloc(3 * entries, sizeof *g.us);
  if (!r->of || !r->factor || !g.at || !g.part || !g.gram || !g.us) {
    rc = err_set(e, E_NOMEM, "no memory to compare %d adapters", n);
    goto out;
  }
  g.p = g.us + entries;
  g.us_all = g.p + entries;
  for (int i = 0; i < n; i++)
    r->of[i].site = SITE_NONE;
  for (int i = 0; !rc && i < base->n; i++)
    rc = measure_site(&g, i);
  if (!rc)
    note_all(&g);
out:
  free(g.at);
  free(g.part);
  free(g.gram);
  free(g.us);
  if (rc)
    guard_free(r);
  return rc;
}

int guard_cancels(const struct guard_report *r, double tau)
{
  return !(r->c >= -tau);
}

void guard_project(const struct guard_report *r, struct adapter_use *use)
{
  for (int i = 0; i < r->n; i++)
    use[i].factor = r->factor[i];
}

void guard_free(struct guard_report *r)
{
  for (int i = 0; r->factor && i < r->n; i++)
    free(r->factor[i]);
  free(r->factor);
  free(r->of);
  *r = (struct guard_report){0};
}
