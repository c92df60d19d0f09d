/*
 * generation.c - see generation.h. This file holds the contract between a model's weights and the adapters on them.
 *
 * States of an adapter, and the function that makes each transition.
 *
 *             adapter_open        manifest_check,       one store of a pointer       another store       generation_free
 *                                 generation_build,     (server/safety.c)            of a pointer        (last reference)
 *                                 manifest_probe
 *      ABSENT ------------> LOADING -------------> VERIFIED ---------------> LIVE -------------> RETIRING ------------> ABSENT
 *                              |                      |
 *                              +------> FAILED <------+
 *
 *   ABSENT    nothing is known of it.
 *   LOADING   its file is being read by the loader thread. Nothing of it may be used.
 *   VERIFIED  digest, coverage of every site it names, shapes, finite values, rank and norm bounds and its probe have been
 *             checked; a new generation with it has been built from the pristine base. Nobody else sees it yet.
 *   LIVE      the generation is the one that new jobs pin.
 *   RETIRING  another generation is the one that new jobs pin; jobs that pinned this one still draw with it, to their last step.
 *   FAILED    reading or verifying went wrong; the cause is kept; the generation that was LIVE still is.
 *
 * States of a generation, which is what jobs see
 *
 *   building  generation_new and the builders (the base), generation_build (all others): one thread holds it.
 *   published readable from any thread. generation_ref pins it, generation_unref lets go.
 *   retired   its last reference went, on whatever thread that was; retire() has handed it to the thread that owns its lane, which calls
 *             generation_free.
 *
 * Invariants
 *   1. A generation never changes after it is published: networks read site[i] and weight[i] without a lock.
 *   2. Base weights are never written. A new generation is built from the checkpoint's own bytes in fp32, never from another generation
 *      and never by taking an adapter out again.
 *   3. Publishing is one pointer store, after verification. A failed load leaves the old generation serving.
 *   4. A job pins (generation_ref) the generation when its drawing starts and keeps it to the last step.
 *   5. Every generation of a model has the same sites with the same numbers: the networks hold numbers only.
 *   6. weight[i] is never NULL in a published generation; partial coverage of what an adapter names is FAILED, not a warning.
 *   7. The networks do not know what stands at a site: run_linear and run_conv (run.c) alone do.
 *   8. A generation frees only what it made: weights that equal its base's are the base's, on which it holds a reference.
 *   9. The bytes of a generation depend on the base, the form and the set alone, not on the order in which the set was written down: members
 *      are summed in the order of their digests. Equal digests mean equal bytes.
 */
#include "models/generation.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int generation_new(struct generation **g, struct be *be, struct err *e)
{
  *g = calloc(1, sizeof **g);
  if (!*g)
    return err_set(e, E_NOMEM, "no memory for a generation");
  atomic_init(&(*g)->refs, 1);
  (*g)->be = be;
  return 0;
}

struct generation *generation_ref(struct generation *g)
{
  atomic_fetch_add_explicit(&g->refs, 1, memory_order_relaxed);
  return g;
}

void generation_unref(struct generation *g)
{
  /* release: our reads come before the freeing; acquire: the freeing comes after everybody's. */
  if (!g || atomic_fetch_sub_explicit(&g->refs, 1, memory_order_acq_rel) != 1)
    return;
  if (g->retire)
    g->retire(g->retire_arg, g);
  else
    generation_free(g);
}

/* Takes half-built ones. */
void generation_free(struct generation *g)
{
  const struct be_ops *ops = g->be->ops;
  int i;

  for (i = 0; i < g->n; i++) {
    if (g->lowrank)
      ops->lowrank_free(g->be, g->lowrank[i]);
    if (!g->base || g->weight[i] != g->base->weight[i])
      ops->weight_free(g->be, g->weight[i]);
    if (!g->base)
      free(g->site[i].name);
  }
  if (!g->base)
    free(g->site);
  free(g->weight);
  free(g->lowrank);
  free(g->member);
  generation_unref(g->base);
  free(g);
}

int64_t site_taps(const struct site *s)
{
  return s->kind == WEIGHT_CONV ? (int64_t)s->kh * s->kw : 1;
}

int64_t site_columns(const struct site *s)
{
  return s->kind == WEIGHT_NORM ? 1 : s->in * site_taps(s);
}

int generation_find(const struct generation *g, const char *name)
{
  int i;

  for (i = 0; i < g->n; i++)
    if (!strcmp(g->site[i].name, name))
      return i;
  return SITE_NONE;
}

/* Room for one more site. */
static int grow(struct generation *g, struct err *e)
{
  int cap = g->cap ? 2 * g->cap : 256;
  struct site *site;
  struct weight **weight;

  if (g->n < g->cap)
    return 0;
  site = realloc(g->site, (size_t)cap * sizeof *site);
  if (site)
    g->site = site;
  weight = realloc(g->weight, (size_t)cap * sizeof *weight);
  if (weight)
    g->weight = weight;
  if (!site || !weight)
    return err_set(e, E_NOMEM, "no memory for a table of %d sites", cap);
  g->cap = cap;
  return 0;
}

/* ---- builder ---- */

void builder_init(struct builder *b, struct generation *g, struct source *source, const char *component, struct err *e)
{
  *b = (struct builder){.g = g, .source = source, .component = component, .e = e};
}

size_t builder_enter(struct builder *b, const char *fmt, ...)
{
  size_t mark = b->len, room = sizeof b->prefix - b->len;
  va_list ap;
  int n;

  va_start(ap, fmt);
  n = vsnprintf(b->prefix + b->len, room, fmt, ap);
  va_end(ap);
  if (n < 0 || (size_t)n + 1 >= room) {
    builder_fail(b, E_INTERNAL, "a parameter name is too long");
    b->prefix[mark] = '\0';
    return mark;
  }
  b->len += (size_t)n;
  b->prefix[b->len++] = '.';
  b->prefix[b->len] = '\0';
  return mark;
}

void builder_leave(struct builder *b, size_t mark)
{
  b->len = mark;
  b->prefix[mark] = '\0';
}

void builder_fail(struct builder *b, int code, const char *what)
{
  if (!b->code)
    b->code = err_set(b->e, code, "%s: %s", b->component, what);
}

int builder_finish(struct builder *b)
{
  return b->code;
}

/* Reads one parameter ("<prefix><name>.<part>") of the site. */
static int get_param(struct builder *b, const char *name, const char *part, int nd, const int64_t *shape, struct param *p)
{
  char full[sizeof b->prefix + 128];

  snprintf(full, sizeof full, "%s%s.%s", b->prefix, name, part);
  if (source_get(b->source, full, nd, shape, p, b->e))
    return err_wrap(b->e, "%s", b->component);
  return 0;
}

/* Appends the site s with its weight, taking the name over. */
static int load_site(struct builder *b, const char *name, const struct site *s, int nd, const int64_t *shape)
{
  struct generation *g = b->g;
  struct param w = {0}, bias = {0};
  struct weight_desc d = {.kind = s->kind, .out = s->out, .in = s->in, .kh = s->kh, .kw = s->kw, .stride = s->stride,
                          .pad_lo = s->pad_lo, .pad_hi = s->pad_hi};
  int code = grow(g, b->e);

  if (code)
    goto out;
  code = get_param(b, name, "weight", nd, shape, &w);
  if (code)
    goto out;
  d.w = w.data;
  d.w_type = w.type;
  if (s->has_bias) {
    code = get_param(b, name, "bias", 1, &s->out, &bias);
    if (code)
      goto out;
    d.bias = bias.data;
    d.bias_type = bias.type;
  }
  g->weight[g->n] = NULL;
  code = g->be->ops->weight_load(g->be, &d, NULL, &g->weight[g->n], b->e);
  if (code) {
    err_wrap(b->e, "%s", s->name);
    goto out;
  }
  g->site[g->n++] = *s;
out:
  param_release(&w);
  param_release(&bias);
  return code;
}

/* Adds the site called name, with a weight of the given shape. The number of the site, or SITE_NONE. */
static int add_site(struct builder *b, const char *name, struct site s, int nd, const int64_t *shape)
{
  int64_t count = 1;
  int i;

  if (b->code)
    return SITE_NONE;
  if (asprintf(&s.name, "%s.%s%s", b->component, b->prefix, name) < 0) {
    builder_fail(b, E_NOMEM, "no memory for a name");
    return SITE_NONE;
  }
  b->code = load_site(b, name, &s, nd, shape);
  if (b->code) {
    free(s.name);
    return SITE_NONE;
  }
  for (i = 0; i < nd; i++)
    count *= shape[i];
  b->g->params += count + (s.has_bias ? s.out : 0);
  return b->g->n - 1;
}

int builder_linear(struct builder *b, const char *name, int64_t in, int64_t out, int has_bias)
{
  struct site s = {.kind = WEIGHT_LINEAR, .out = out, .in = in, .has_bias = has_bias};

  return add_site(b, name, s, 2, (int64_t[]){out, in});
}

int builder_conv(struct builder *b, const char *name, int64_t in, int64_t out, int k, int stride, int pad_lo, int pad_hi)
{
  struct site s = {.kind = WEIGHT_CONV, .out = out, .in = in, .kh = k, .kw = k, .stride = stride,
                   .pad_lo = pad_lo, .pad_hi = pad_hi, .has_bias = 1};

  if (k == 1 && stride == 1)
    return builder_linear(b, name, in, out, 1);
  return add_site(b, name, s, 4, (int64_t[]){out, in, k, k});
}

int builder_norm(struct builder *b, const char *name, int64_t channels)
{
  struct site s = {.kind = WEIGHT_NORM, .out = channels, .in = 1, .has_bias = 1};

  return add_site(b, name, s, 1, (int64_t[]){channels});
}

int builder_table(struct builder *b, const char *name, int64_t rows, int64_t columns)
{
  struct site s = {.kind = WEIGHT_TABLE, .out = columns, .in = rows};

  return add_site(b, name, s, 2, (int64_t[]){rows, columns});
}
