/*
 * run.c - see run.h. Called by the networks on the device thread.
 */
#include "models/run.h"

#include <assert.h>
#include <math.h>

void arena_init(struct arena *a, void *base, size_t size)
{
  *a = (struct arena){.base = base, .size = base ? size : SIZE_MAX};
}

void run_init(struct run *r, struct be *be, struct arena *a, const struct generation *g, struct err *e)
{
  *r = (struct run){.be = be, .arena = a, .generation = g, .e = e};
}

void run_init_rows(struct run *r, struct be *be, struct arena *a, const struct generation *const *row, int rows, struct err *e)
{
  assert(rows > 0 && rows <= RUN_MAX_ROWS);
  run_init(r, be, a, row[0], e);
  r->row = row;
  r->rows = rows;
}

size_t run_mark(const struct run *r)
{
  return r->arena->top;
}

void run_reset(struct run *r, size_t mark)
{
  assert(mark <= r->arena->top);
  r->arena->top = mark;
}

struct tensor run_alloc_type(struct run *r, enum dtype type, int64_t b, int64_t h, int64_t w, int64_t c)
{
  struct arena *a = r->arena;
  struct tensor t = {NULL, {b, h, w, c}, type};
  size_t n = (tensor_bytes(t) + RUN_ALIGN - 1) / RUN_ALIGN * RUN_ALIGN;

  if (n > a->size - a->top) {
    if (!r->code)
      r->code = err_set(r->e, E_NOMEM, "the activation memory of %zu bytes is too small for this pass", a->size);
    return t;
  }
  if (a->base)
    t.p = a->base + a->top;
  a->top += n;
  if (a->top > a->peak)
    a->peak = a->top;
  return t;
}

struct tensor run_alloc(struct run *r, int64_t b, int64_t h, int64_t w, int64_t c)
{
  return run_alloc_type(r, r->be->act, b, h, w, c);
}

void run_fail(struct run *r, int code, const char *what)
{
  if (!r->code)
    r->code = err_set(r->e, code, "%s", what);
}

/* ---- ops with a site ---- */

static const struct generation *generation_of(const struct run *r, int64_t row)
{
  return r->row ? r->row[row] : r->generation;
}

static const struct weight *weight_at(const struct run *r, int64_t row, int site)
{
  const struct generation *g = generation_of(r, row);

  assert(site >= 0 && site < g->n);
  return g->weight[site];
}

/* The first row from `row` on that reads another weight there; rows in all when there is none. */
static int64_t segment_end(const struct run *r, int64_t row, int64_t rows, int site)
{
  int64_t end = row + 1;

  if (!r->row)
    return rows;
  assert(rows == r->rows);
  while (end < rows && weight_at(r, end, site) == weight_at(r, row, site))
    end++;
  return end;
}

/* Some rows of an operand that may be absent. */
static struct tensor part(struct tensor t, int64_t from, int64_t to)
{
  return t.d[0] ? tensor_batch(t, from, to - from) : t;
}

/* y += the low-rank factors that the rows' generations have at the sites, applied to x; each site has its share of y, one behind the other. The
 * base's products are complete before. */
static void add_lowrank(struct run *r, struct tensor y, struct tensor x, const int *site)
{
  const struct lowrank *factors[RUN_LINEARS * RUN_MAX_ROWS];
  int64_t rows = x.d[0];
  int any = 0;

  if (r->code || (!r->row && !r->generation->lowrank))
    return;
  assert(rows <= RUN_MAX_ROWS && y.d[0] <= RUN_LINEARS * rows);
  for (int64_t i = 0; i < y.d[0]; i++) {
    const struct generation *g = generation_of(r, i % rows);

    factors[i] = g->lowrank ? g->lowrank[site[i / rows]] : NULL;
    any |= factors[i] != NULL;
  }
  if (any)
    r->code = r->be->ops->lowrank(r->be, y, x, factors, r->e);
}

/* The base's product alone. op: be_ops.linear or be_ops.conv2d. */
static void apply(struct run *r,
                  int (*op)(struct be *, struct tensor, struct tensor, const struct weight *, struct tensor, struct err *),
                  struct tensor y, struct tensor x, int site, struct tensor residual)
{
  int64_t rows = y.d[0], end;

  for (int64_t i = 0; !r->code && i < rows; i = end) {
    end = segment_end(r, i, rows, site);
    r->code = op(r->be, part(y, i, end), part(x, i, end), weight_at(r, i, site), part(residual, i, end), r->e);
  }
}

static void observe(struct run *r, int site, struct tensor x)
{
  if (r->observer && !r->code)
    r->observer->see(r->observer->arg, r, site, x);
}

void run_linear(struct run *r, struct tensor y, struct tensor x, int site, struct tensor residual)
{
  r->macs += (double)tensor_count(y) * (double)x.d[3];
  observe(r, site, x);
  apply(r, r->be->ops->linear, y, x, site, residual);
  add_lowrank(r, y, x, &site);
}

void run_linears(struct run *r, struct tensor y, struct tensor x, const int site[RUN_LINEARS])
{
  int64_t rows = x.d[0];

  assert(y.d[0] == RUN_LINEARS * rows);
  r->macs += (double)tensor_count(y) * (double)x.d[3];
  for (int i = 0; i < RUN_LINEARS; i++) {
    observe(r, site[i], x);
    apply(r, r->be->ops->linear, tensor_batch(y, i * rows, rows), x, site[i], tensor_none());
  }
  add_lowrank(r, y, x, site);
}

void run_conv(struct run *r, struct tensor y, struct tensor x, int site, struct tensor residual)
{
  const struct site *s = &r->generation->site[site];

  r->macs += (double)tensor_count(y) * (double)x.d[3] * s->kh * s->kw;
  observe(r, site, x);
  apply(r, r->be->ops->conv2d, y, x, site, residual);
  add_lowrank(r, y, x, &site);
}

void run_groupnorm(struct run *r, struct tensor y, struct tensor x, struct tensor temb, int site, int groups, double eps,
                   int silu)
{
  int64_t end;

  for (int64_t i = 0; !r->code && i < y.d[0]; i = end) {
    end = segment_end(r, i, y.d[0], site);
    r->code = r->be->ops->groupnorm(r->be, part(y, i, end), part(x, i, end), part(temb, i, end), weight_at(r, i, site), groups,
                                    (float)eps, silu, r->e);
  }
}

void run_layernorm(struct run *r, struct tensor y, struct tensor x, int site, double eps)
{
  int64_t end;

  for (int64_t i = 0; !r->code && i < y.d[0]; i = end) {
    end = segment_end(r, i, y.d[0], site);
    r->code = r->be->ops->layernorm(r->be, part(y, i, end), part(x, i, end), weight_at(r, i, site), (float)eps, r->e);
  }
}

void run_attention(struct run *r, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, int causal)
{
  float scale = (float)(1.0 / sqrt((double)(q.d[3] / heads)));

  for (int64_t b = 0; b < q.d[0]; b++) /* scores, then their product with v */
    r->macs += 2.0 * (double)q.d[2] * (double)kv[b].T * (double)q.d[3];
  if (!r->code)
    r->code = r->be->ops->attention(r->be, o, q, kv, heads, scale, causal, r->e);
}

void run_self_attention(struct run *r, struct tensor o, struct tensor q, struct tensor k, struct tensor v, int heads,
                        int causal)
{
  struct kv_row kv[RUN_MAX_ROWS];
  int64_t b;

  assert(q.d[0] <= RUN_MAX_ROWS);
  for (b = 0; b < q.d[0]; b++)
    kv[b] = (struct kv_row){tensor_batch(k, b, 1).p, tensor_batch(v, b, 1).p, k.d[2]};
  run_attention(r, o, q, kv, heads, causal);
}

void run_geglu(struct run *r, struct tensor y, struct tensor x)
{
  if (!r->code)
    r->code = r->be->ops->geglu(r->be, y, x, r->e);
}

void run_act(struct run *r, struct tensor y, struct tensor x, enum act_kind kind)
{
  if (!r->code)
    r->code = r->be->ops->act(r->be, y, x, kind, r->e);
}

void run_add(struct run *r, struct tensor y, struct tensor a, struct tensor b)
{
  if (!r->code)
    r->code = r->be->ops->add(r->be, y, a, b, r->e);
}

void run_concat(struct run *r, struct tensor y, struct tensor a, struct tensor b)
{
  if (!r->code)
    r->code = r->be->ops->concat(r->be, y, a, b, r->e);
}

void run_upsample2x(struct run *r, struct tensor y, struct tensor x)
{
  if (!r->code)
    r->code = r->be->ops->upsample2x(r->be, y, x, r->e);
}

void run_timestep_embed(struct run *r, struct tensor y, const float *t, int flip_sin_to_cos, double freq_shift)
{
  if (!r->code)
    r->code = r->be->ops->timestep_embed(r->be, y, t, flip_sin_to_cos, (float)freq_shift, r->e);
}

void run_embed(struct run *r, struct tensor y, const int32_t *ids, int tokens, int positions)
{
  int64_t end, other, T = y.d[2];

  for (int64_t i = 0; !r->code && i < y.d[0]; i = end) {
    end = segment_end(r, i, y.d[0], tokens);
    other = segment_end(r, i, y.d[0], positions);
    end = other < end ? other : end;
    r->code = r->be->ops->embed(r->be, part(y, i, end), ids + i * T, weight_at(r, i, tokens), weight_at(r, i, positions), r->e);
  }
}
