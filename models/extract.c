/*
 * extract.c - see extract.h. Called by `safelight adapter extract` and tests. Threads: OpenMP over sites, each with memory of its own.
 */
#include "models/extract.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "models/adapter_write.h"
#include "models/svd.h"

/* One site of the UNet. */
struct change {
  int site;
  int is_chosen;
  double norm2, base2;      /* |dW|^2, |W0|^2 */
  double bias2;             /* |d bias|^2 */
  double captured;          /* of norm2, by the first `rank` triplets */
  int64_t rank;             /* 0: no factors */
  struct svd svd;
};

static int is_attention(const char *name)
{
  static const char *const ends[] = {".to_q", ".to_k", ".to_v", ".to_out.0"};
  size_t n = strlen(name);

  if (!strstr(name, ".attn1.") && !strstr(name, ".attn2."))
    return 0;
  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
    if (n > strlen(ends[i]) && !strcmp(name + n - strlen(ends[i]), ends[i]))
      return 1;
  return 0;
}

static int is_chosen(const struct site *s, enum extract_sites sites)
{
  return (s->kind == WEIGHT_LINEAR || s->kind == WEIGHT_CONV) && (sites == EXTRACT_ALL || is_attention(s->name));
}

/* The least rank, at most o->rank, that holds the share asked for. */
static int64_t choose_rank(const struct svd *x, double norm2, const struct extract_options *o)
{
  for (int64_t k = 1; k < x->r; k++)
    if (o->energy < 1 && svd_energy(x, k) >= o->energy * norm2)
      return k;
  return x->r;
}

/* Reads both weights and takes their difference apart. */
MUST_CHECK static int look(struct change *c, const struct generation *base, const struct model_sources *pristine,
                           const struct model_sources *tuned, const struct extract_options *o, struct err *e)
{
  const struct site *s = &base->site[c->site];
  struct pristine was = {0}, is = {0};
  double *w = NULL;
  int r;

  if ((r = sources_read(pristine, s, &was, e)) || (r = sources_read(tuned, s, &is, e)))
    goto out;
  w = malloc((size_t)was.count * sizeof *w + 1);
  if (!w) {
    r = err_field(e, E_NOMEM, s->name, "%s: out of memory for its change", s->name);
    goto out;
  }
  for (int64_t i = 0; i < was.count; i++) {
    w[i] = (double)is.w[i] - (double)was.w[i];
    c->norm2 += w[i] * w[i];
    c->base2 += (double)was.w[i] * (double)was.w[i];
  }
  for (int64_t i = 0; was.bias && i < s->out; i++)
    c->bias2 += ((double)is.bias[i] - (double)was.bias[i]) * ((double)is.bias[i] - (double)was.bias[i]);
  if (c->is_chosen && c->norm2 > 0) {
    r = svd_dense(&c->svd, w, s->out, was.count / s->out, o->rank, e);
    if (r)
      goto out;
    c->rank = choose_rank(&c->svd, c->norm2, o);
    c->captured = svd_energy(&c->svd, c->rank);
  }
out:
  pristine_free(&was);
  pristine_free(&is);
  free(w);
  return r;
}

/* Every site of the UNet, in table order; the caller frees *list and the decompositions in it, also after failure. */
MUST_CHECK static int look_at_all(struct change **list, int *count, const struct generation *base, const struct model_sources *pristine,
                                  const struct model_sources *tuned, const struct extract_options *o, struct err *e)
{
  struct err *errors = calloc((size_t)base->n + 1, sizeof *errors);
  struct change *c = calloc((size_t)base->n + 1, sizeof *c);
  int n = 0, r = 0;

  *list = c;
  *count = 0;
  if (!c || !errors) {
    free(errors);
    return err_set(e, E_NOMEM, "out of memory for a table of sites");
  }
  for (int i = 0; i < base->n; i++)
    if (!strncmp(base->site[i].name, "unet.", 5))
      c[n++] = (struct change){.site = i, .is_chosen = is_chosen(&base->site[i], o->sites)};
  *count = n;
#pragma omp parallel for schedule(dynamic)
  for (int i = 0; i < n; i++)
    errors[i].code = look(&c[i], base, pristine, tuned, o, &errors[i]);
  for (int i = 0; !r && i < n; i++)
    if (errors[i].code)
      r = err_field(e, errors[i].code, errors[i].field, "%s", errors[i].msg);
  free(errors);
  return r;
}

/* Factors of every changed site. */
MUST_CHECK static int collect(struct adapter **out, const struct change *c, int n, const struct generation *base, struct err *e)
{
  struct adapter *a;
  int changed = 0, at = 0, r = 0;

  for (int i = 0; i < n; i++)
    changed += c[i].rank > 0;
  *out = NULL;
  if (!changed)
    return err_set(e, E_ARG, "the tuned UNet does not differ from the base at the chosen sites");
  a = adapter_new_lowrank("extracted", changed);
  if (!a)
    return err_set(e, E_NOMEM, "out of memory for an adapter");
  for (int i = 0; !r && i < n; i++)
    if (c[i].rank) {
      r = adapter_set_lowrank(a, at, base, c[i].site, c[i].rank, e);
      if (!r)
        svd_factors(&c[i].svd, c[i].rank, a->delta[at].up, a->delta[at].down);
      at++;
    }
  if (!r)
    r = adapter_finish(a, base, e);
  if (r)
    adapter_close(a);
  else
    *out = a;
  return r;
}

MUST_CHECK static int describe(struct extract_report *x, const struct change *c, int n, int sites, struct err *e)
{
  double chosen = 0, captured = 0, all = 0;

  *x = (struct extract_report){.site = calloc((size_t)sites + 1, sizeof *x->site)};
  if (!x->site)
    return err_set(e, E_NOMEM, "out of memory for a report");
  for (int i = 0; i < n; i++) {
    all += c[i].norm2 + c[i].bias2;
    chosen += c[i].is_chosen ? c[i].norm2 : 0;
    captured += c[i].captured;
    x->unchanged += c[i].is_chosen && !c[i].rank;
    if (c[i].rank)
      x->site[x->n++] = (struct extract_site){c[i].site, c[i].rank, sqrt(c[i].norm2), sqrt(c[i].norm2 / c[i].base2),
                                              c[i].captured / c[i].norm2};
  }
  x->energy = captured / chosen;
  x->energy_all = captured / all;
  x->outside = 1 - chosen / all;
  return 0;
}

int extract_run(struct adapter **out, const struct generation *base, const struct model_sources *pristine,
                const struct model_sources *tuned, const struct extract_options *o, struct extract_report *report, struct err *e)
{
  struct change *c = NULL;
  int n = 0, r;

  *out = NULL;
  *report = (struct extract_report){0};
  if (o->rank < 1 || !(o->energy > 0 && o->energy <= 1))
    return err_set(e, E_ARG, "an extraction takes a rank of at least 1 and an energy above 0 and at most 1");
  r = look_at_all(&c, &n, base, pristine, tuned, o, e);
  if (!r)
    r = collect(out, c, n, base, e);
  if (!r)
    r = describe(report, c, n, (*out)->n, e);
  if (r) {
    adapter_close(*out);
    *out = NULL;
  }
  for (int i = 0; i < n; i++)
    svd_free(&c[i].svd);
  free(c);
  return r;
}

void extract_report_free(struct extract_report *r)
{
  free(r->site);
  *r = (struct extract_report){0};
}
