/*
 * compose.c - builds a generation: the pristine base plus the weighted sum of a set of adapters. See generation.h.
 *
 *      W = W0 + sum over the members, in the order of their digests, of weight * factor * dW
 *
 * Each site goes through alone: collect the deltas that touch it, read W0 from the checkpoint, check the bounds, then either stack the
 * low-rank factors beside the base's packed weight or pack the sum as a weight of its own. So no more than one site is in memory in
 * fp32, and nothing that a running picture reads is touched.
 *
 * Called by server/safety.c, the manifest's probe and the command line. Invariants: those of generation.c; this file is where 2, 6, 8
 * and 9 are kept. Threads: the one that owns the lane.
 */
#include <math.h>
#include <sodium.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/adapter.h"
#include "models/sources.h"

/* A delta at the site in hand, and how much of it. */
struct touch {
  const struct delta *d;
  const struct adapter *adapter;
  float weight;
};

/* What a build needs at every site. */
struct compose {
  struct generation *g;
  const struct generation *base;
  const struct model_sources *sources;
  struct be *lane;
  const struct adapter_use **use; /* n, ordered by digest */
  int *at;                        /* n: the next delta of each */
  struct touch *touch;            /* n: of the site in hand */
  int n;
  const struct adapter_bounds *bounds;
  struct err *e;
};

/* ---- the set ---- */

static int by_digest(const void *a, const void *b)
{
  const struct adapter_use *const *x = a, *const *y = b;

  return strcmp((*x)->adapter->digest, (*y)->adapter->digest);
}

static void sort_uses(const struct adapter_use **out, const struct adapter_use *use, int n)
{
  for (int i = 0; i < n; i++)
    out[i] = &use[i];
  qsort(out, (size_t)n, sizeof *out, by_digest);
}

static float factor_of(const struct adapter_use *u, int delta)
{
  return u->factor ? u->factor[delta] : 1;
}

/* Everything that can be refused without looking at a weight. */
MUST_CHECK static int check_set(const struct compose *c)
{
  for (int i = 0; i < c->n; i++) {
    const struct adapter_use *u = c->use[i];
    const struct adapter *a = u->adapter;

    if (i && !strcmp(a->digest, c->use[i - 1]->adapter->digest))
      return err_field(c->e, E_ARG, a->name, "adapter %s is twice in the set (digest %.16s...)", a->name, a->digest);
    if (!isfinite(u->weight))
      return err_field(c->e, E_ARG, a->name, "the weight of adapter %s is not a finite number", a->name);
    for (int k = 0; k < a->n; k++) {
      const struct delta *d = &a->delta[k];

      if (d->site < 0 || d->site >= c->base->n || (k && d->site <= a->delta[k - 1].site) || !isfinite(factor_of(u, k)))
        return err_field(c->e, E_INTERNAL, a->name, "adapter %s is not ordered by the sites of this model", a->name);
      if (d->rank > c->bounds->max_rank)
        return err_field(c->e, E_FILE, c->base->site[d->site].name, "%s: adapter %s has rank %lld; at most %lld is allowed",
                         c->base->site[d->site].name, a->name, (long long)d->rank, (long long)c->bounds->max_rank);
    }
  }
  return 0;
}

/* The digest: fields of fixed size, numbers as little-endian bits, so that it is the same everywhere. */
static void hash_u32(crypto_generichash_state *h, uint32_t v)
{
  unsigned char b[4] = {(unsigned char)v, (unsigned char)(v >> 8), (unsigned char)(v >> 16), (unsigned char)(v >> 24)};

  crypto_generichash_update(h, b, sizeof b);
}

static void hash_float(crypto_generichash_state *h, float f)
{
  uint32_t u;

  memcpy(&u, &f, sizeof u);
  hash_u32(h, u);
}

static void hash_text(crypto_generichash_state *h, const char *s)
{
  crypto_generichash_update(h, (const unsigned char *)s, strlen(s) + 1);
}

static void hash_use(crypto_generichash_state *h, const struct adapter_use *u)
{
  hash_text(h, u->adapter->digest);
  hash_float(h, u->weight);
  hash_u32(h, (uint32_t)(u->required != 0));
  hash_u32(h, (uint32_t)(u->factor ? u->adapter->n : 0));
  for (int k = 0; u->factor && k < u->adapter->n; k++)
    hash_float(h, u->factor[k]);
}

/* Whether a comes before b in a generation. */
static int is_before(const struct adapter_use *a, const struct adapter_use *b)
{
  int order = strcmp(a->adapter->digest, b->adapter->digest);

  return order ? order < 0 : a < b;
}

void generation_digest(char out[65], const char *base_digest, const struct adapter_use *use, int n, enum generation_form form)
{
  const struct adapter_use *last = NULL, *next;
  crypto_generichash_state h;
  unsigned char sum[32];

  crypto_generichash_init(&h, NULL, 0, sizeof sum);
  hash_text(&h, "safelight generation 1");
  hash_text(&h, base_digest);
  hash_u32(&h, n ? (uint32_t)form : FORM_BASE);
  hash_u32(&h, (uint32_t)n);
  for (int k = 0; k < n; k++, last = next) { /* sets are small: look for the next one instead of sorting a copy */
    next = NULL;
    for (int i = 0; i < n; i++)
      if ((!last || is_before(last, &use[i])) && (!next || is_before(&use[i], next)))
        next = &use[i];
    hash_use(&h, next);
  }
  crypto_generichash_final(&h, sum, sizeof sum);
  sodium_bin2hex(out, 65, sum, sizeof sum);
}

/* ---- one site ---- */

static double norm_of(const float *v, int64_t n)
{
  double sum = 0;

  for (int64_t i = 0; v && i < n; i++)
    sum += (double)v[i] * (double)v[i];
  return sqrt(sum);
}

/* |dB| of the delta: what it does to the bias. */
static double bias_norm(const struct delta *d, const struct pristine *p, int64_t out)
{
  double sum = 0;

  for (int64_t i = 0; d->bias && i < out; i++) {
    double b = (double)d->bias[i] - (d->kind == DELTA_REPLACE && p->bias ? (double)p->bias[i] : 0);

    sum += b * b;
  }
  return sqrt(sum);
}

/* Weight and bias are measured together: a bias is often near nothing by itself. */
MUST_CHECK static int check_norms(const struct compose *c, const struct site *s, const struct pristine *p, int touches)
{
  double base = hypot(norm_of(p->w, p->count), norm_of(p->bias, s->out));

  for (int i = 0; i < touches; i++) {
    const struct touch *t = &c->touch[i];
    double norm = hypot(delta_norm(t->d, s, p->w), bias_norm(t->d, p, s->out));

    if (!(norm <= c->bounds->max_norm_ratio * base)) /* also when it is not a number */
      return err_field(c->e, E_FILE, s->name, "%s: adapter %s changes the weight by %.3g times its norm; at most %.3g is allowed",
                       s->name, t->adapter->name, norm / base, c->bounds->max_norm_ratio);
    if (t->d->bias && !s->has_bias)
      return err_field(c->e, E_FILE, s->name, "%s: adapter %s has a bias where the model has none", s->name, t->adapter->name);
  }
  return 0;
}

/* Whether the site's deltas are applied as stacked factors, and of which rank in all. */
static int is_stacked(const struct compose *c, const struct site *s, int touches, int64_t *rank)
{
  *rank = 0;
  for (int i = 0; i < touches; i++) {
    if (c->touch[i].d->kind != DELTA_LOWRANK || c->touch[i].d->bias)
      return 0;
    *rank += c->touch[i].d->rank;
  }
  return c->g->form == FORM_RUNTIME && (s->kind == WEIGHT_LINEAR || s->kind == WEIGHT_CONV) &&
         *rank * (s->out + site_columns(s)) < s->out * site_columns(s);
}

MUST_CHECK static int check_finite(const struct compose *c, const struct site *s, const float *v, int64_t n)
{
  for (int64_t i = 0; v && i < n; i++)
    if (!isfinite(v[i]))
      return err_field(c->e, E_FILE, s->name, "%s: the sum of the adapters is not finite", s->name);
  return 0;
}

/* down: the members' rows one below the other; up: their columns side by side, times scale and weight. */
static void stack(const struct compose *c, const struct site *s, int touches, int64_t rank, float *down, float *up)
{
  int64_t in = site_columns(s), at = 0;

  for (int i = 0; i < touches; i++) {
    const struct delta *d = c->touch[i].d;
    double k = (double)d->scale * (double)c->touch[i].weight;

    memcpy(down + at * in, d->down, (size_t)(d->rank * in) * sizeof *down);
    for (int64_t o = 0; o < s->out; o++)
      for (int64_t r = 0; r < d->rank; r++)
        up[o * rank + at + r] = (float)(k * (double)d->up[o * d->rank + r]);
    at += d->rank;
  }
}

MUST_CHECK static int load_stacked(const struct compose *c, int site, int touches, int64_t rank)
{
  const struct site *s = &c->base->site[site];
  int64_t in = site_columns(s);
  float *down = malloc((size_t)(rank * in) * sizeof *down), *up = malloc((size_t)(s->out * rank) * sizeof *up);
  struct lowrank_desc d = {.out = s->out, .in = s->in, .rank = rank, .down = down, .up = up};
  int rc;

  if (!down || !up) {
    rc = err_set(c->e, E_NOMEM, "%s: no memory for factors of rank %lld", s->name, (long long)rank);
    goto out;
  }
  if (s->kind == WEIGHT_CONV) {
    d.kh = s->kh;
    d.kw = s->kw;
    d.stride = s->stride;
    d.pad_lo = s->pad_lo;
    d.pad_hi = s->pad_hi;
  }
  stack(c, s, touches, rank, down, up);
  rc = check_finite(c, s, up, s->out * rank);
  if (!rc)
    rc = check_finite(c, s, down, rank * in);
  if (rc)
    goto out;
  rc = c->lane->ops->lowrank_load(c->lane, &d, &c->g->lowrank[site], c->e);
  if (rc)
    err_wrap(c->e, "%s", s->name);
  else
    c->g->bytes += (size_t)(rank * (s->out + in)) * dtype_size(c->lane->act);
out:
  free(down);
  free(up);
  return rc;
}

/* Replaces the weight by the sum; p is W0, and stays it: every delta is evaluated on the pristine base. */
MUST_CHECK static int load_replaced(const struct compose *c, int site, int touches, const struct pristine *p)
{
  const struct site *s = &c->base->site[site];
  struct weight_desc d = {.kind = s->kind, .out = s->out, .in = s->in, .kh = s->kh, .kw = s->kw, .stride = s->stride,
                          .pad_lo = s->pad_lo, .pad_hi = s->pad_hi, .w_type = DT_F32, .bias_type = DT_F32};
  float *w = malloc((size_t)p->count * sizeof *w), *bias = p->bias ? malloc((size_t)s->out * sizeof *bias) : NULL;
  struct weight *made = NULL;
  int rc;

  if (!w || (p->bias && !bias)) {
    rc = err_set(c->e, E_NOMEM, "%s: no memory for a weight of %lld numbers", s->name, (long long)p->count);
    goto out;
  }
  memcpy(w, p->w, (size_t)p->count * sizeof *w);
  if (bias)
    memcpy(bias, p->bias, (size_t)s->out * sizeof *bias);
  for (int i = 0; i < touches; i++)
    delta_apply(c->touch[i].d, s, p->w, p->bias, c->touch[i].weight, w, bias);
  rc = check_finite(c, s, w, p->count);
  if (!rc)
    rc = check_finite(c, s, bias, s->out);
  if (rc)
    goto out;
  d.w = w;
  d.bias = bias;
  rc = c->lane->ops->weight_load(c->lane, &d, c->base->weight[site], &made, c->e);
  if (rc) {
    err_wrap(c->e, "%s", s->name);
    goto out;
  }
  c->g->weight[site] = made;
  c->g->bytes += (size_t)p->count * dtype_size(s->kind == WEIGHT_LINEAR || s->kind == WEIGHT_CONV ? c->lane->act : DT_F32) +
                 (bias ? (size_t)s->out * sizeof *bias : 0);
out:
  free(w);
  free(bias);
  return rc;
}

MUST_CHECK static int compose_site(struct compose *c, int site)
{
  const struct site *s = &c->base->site[site];
  struct pristine p = {0};
  int64_t rank;
  int rc, touches = 0;

  for (int i = 0; i < c->n; i++) {
    const struct adapter *a = c->use[i]->adapter;
    int at = c->at[i];

    if (at == a->n || a->delta[at].site != site)
      continue;
    c->touch[touches++] = (struct touch){&a->delta[at], a, c->use[i]->weight * factor_of(c->use[i], at)};
    c->at[i]++;
  }
  if (!touches)
    return 0;
  rc = sources_read(c->sources, s, &p, c->e);
  if (!rc)
    rc = check_norms(c, s, &p, touches);
  if (!rc)
    rc = is_stacked(c, s, touches, &rank) ? load_stacked(c, site, touches, rank) : load_replaced(c, site, touches, &p);
  pristine_free(&p);
  return rc;
}

/* ---- the whole ---- */

/* A generation that is the base still: its sites, its weights, a reference on it. */
MUST_CHECK static int borrow(struct generation **out, struct generation *base, struct be *lane, enum generation_form form, struct err *e)
{
  size_t n = (size_t)(base->n ? base->n : 1);
  struct generation *g;
  int rc = generation_new(&g, lane, e);

  *out = NULL;
  if (rc)
    return rc;
  g->form = form;
  g->base = generation_ref(base);
  g->site = base->site;
  g->params = base->params;
  g->weight = malloc(n * sizeof(struct weight *));
  g->lowrank = form == FORM_RUNTIME ? calloc(n, sizeof(struct lowrank *)) : NULL;
  if (!g->weight || (form == FORM_RUNTIME && !g->lowrank)) {
    generation_free(g);
    return err_set(e, E_NOMEM, "no memory for a generation of %d sites", base->n);
  }
  memcpy(g->weight, base->weight, (size_t)base->n * sizeof(struct weight *));
  g->n = g->cap = base->n;
  *out = g;
  return 0;
}

MUST_CHECK static int remember_members(struct compose *c)
{
  struct generation *g = c->g;

  g->member = calloc((size_t)(c->n ? c->n : 1), sizeof *g->member);
  if (!g->member)
    return err_set(c->e, E_NOMEM, "no memory for the members of a generation");
  g->members = c->n;
  for (int i = 0; i < c->n; i++) {
    memcpy(g->member[i].name, c->use[i]->adapter->name, sizeof g->member[i].name);
    memcpy(g->member[i].digest, c->use[i]->adapter->digest, sizeof g->member[i].digest);
    g->member[i].weight = c->use[i]->weight;
    g->member[i].required = c->use[i]->required;
  }
  return 0;
}

MUST_CHECK static int compose_all(struct compose *c)
{
  int rc = check_set(c);

  if (!rc)
    rc = remember_members(c);
  for (int i = 0; !rc && i < c->base->n; i++)
    rc = compose_site(c, i);
  return rc;
}

int generation_build(struct generation **out, struct generation *base, struct model_sources *sources, struct be *lane,
                     const struct adapter_use *use, int n, enum generation_form form, const struct adapter_bounds *bounds,
                     struct err *e)
{
  struct compose c = {.base = base, .sources = sources, .lane = lane, .n = n, .bounds = bounds, .e = e};
  size_t entries = (size_t)(n ? n : 1);
  struct adapter_bounds defaults;
  int rc;

  *out = NULL;
  adapter_bounds_default(&defaults);
  if (!bounds)
    c.bounds = &defaults;
  if (base->base || (n && form == FORM_BASE))
    return err_set(e, E_INTERNAL, "a generation is built from the base, in a form that can hold adapters");
  rc = borrow(&c.g, base, lane, n ? form : FORM_BASE, e);
  if (rc)
    return rc;
  c.use = malloc(entries * sizeof *c.use);
  c.at = calloc(entries, sizeof *c.at);
  c.touch = calloc(entries, sizeof *c.touch);
  if (c.use && c.at && c.touch) {
    sort_uses(c.use, use, n);
    generation_digest(c.g->digest, base->digest, use, n, form);
    rc = compose_all(&c);
  } else {
    rc = err_set(e, E_NOMEM, "no memory for a set of %d adapters", n);
  }
  free(c.use);
  free(c.at);
  free(c.touch);
  if (rc)
    generation_free(c.g);
  else
    *out = c.g;
  return rc;
}
