/*
 * weight.c - parameters in be_cpu's packing: made once from the checkpoint's bytes, without a plain copy in between.
 *
 * oneDNN says where each element of a weight goes (dnn_layout_offsets: the sum of four small tables); this file reads a block of
 * rows of the mapped checkpoint, converts it with vector code into a buffer that stays in the cache, and scatters it. That is
 * several times faster than converting everything and asking oneDNN to reorder it, and it needs no second copy of a
 * model of gigabytes. bf16 layouts hold pairs of neighbouring inputs side by side, so pairs are written as one word.
 *
 * Callers: the table in be_cpu.c, gemm.c for further copies. Threads: that of the context that is passed; packing itself uses all of
 * its threads. Two contexts may add copies to one weight at the same time.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum {
  ROWS = 64,    /* outputs packed together */
  CHUNK = 1152  /* numbers of one row converted at a time: 128 inputs of a 3x3 kernel, even for every kernel size */
};

/* What one thread needs to pack: a converted block, and where things go. */
struct packer {
  const struct cpu *c;
  const struct weight_desc *d;
  struct dnn_offsets at;
  char *dst;
  int pairs;    /* input 2i+1 lies directly behind input 2i, and numbers are bf16 */
};

/* Spreads rows o0.. (n of them) and inputs i0.. (m of them) from the converted block tmp. The inputs go outermost: the
 * lines of tmp that one input touches are then used for every kernel position while they are in the first-level cache. */
static void scatter(const struct packer *k, const void *tmp, int64_t o0, int64_t n, int64_t i0, int64_t m)
{
  int area = k->d->kh * k->d->kw, kw = k->d->kw, wide = k->c->act == DT_F32;
  const int32_t *out = k->at.out + o0;

  for (int64_t i = 0; i < m; i++) {
    int both = k->pairs && i + 1 < m;

    for (int a = 0; a < area; a++) {
      int64_t base = (int64_t)k->at.ky[a / kw] + k->at.kx[a % kw] + k->at.in[i0 + i], from = i * area + a;

      if (wide) {
        for (int64_t o = 0; o < n; o++)
          ((float *)k->dst)[base + out[o]] = ((const float *)tmp)[o * CHUNK + from];
      } else if (both) {
        for (int64_t o = 0; o < n; o++) {
          const uint16_t *s = (const uint16_t *)tmp + o * CHUNK + from;
          uint32_t pair = (uint32_t)s[0] | (uint32_t)s[area] << 16;

          memcpy((uint16_t *)k->dst + base + out[o], &pair, 4);
        }
      } else {
        for (int64_t o = 0; o < n; o++)
          ((uint16_t *)k->dst)[base + out[o]] = ((const uint16_t *)tmp)[o * CHUNK + from];
      }
    }
    i += both;
  }
}

static void pack_rows(const struct packer *k, int64_t from, int64_t to, void *tmp)
{
  const struct weight_desc *d = k->d;
  int64_t area = (int64_t)d->kh * d->kw, step = CHUNK / area & ~(int64_t)1;
  size_t from_size = dtype_size(d->w_type), to_size = dtype_size(k->c->act);

  assert(step >= 2);
  for (int64_t o0 = from; o0 < to; o0 += ROWS) {
    int64_t n = to - o0 < ROWS ? to - o0 : ROWS;

    for (int64_t i0 = 0; i0 < d->in; i0 += step) {
      int64_t m = d->in - i0 < step ? d->in - i0 : step;

      for (int64_t o = 0; o < n; o++)
        k->c->vec->convert((char *)tmp + (size_t)(o * CHUNK) * to_size, k->c->act,
                           (const char *)d->w + (size_t)(((o0 + o) * d->in + i0) * area) * from_size, d->w_type,
                           (size_t)(m * area));
      scatter(k, tmp, o0, n, i0, m);
    }
  }
}

static int is_paired(const struct weight_desc *d, const struct dnn_offsets *at)
{
  for (int64_t i = 0; i + 1 < d->in; i += 2)
    if (at->in[i + 1] != at->in[i] + 1)
      return 0;
  return 1;
}

/* Packs the matrix or kernel of d into `to`, which has a layout and gets memory. On failure to->packed is NULL. */
static int pack(struct cpu *c, const struct weight_desc *d, struct weight_copy *to, struct err *e)
{
  size_t bytes = dnn_layout_bytes(to->layout);
  struct packer k = {c, d, {NULL, NULL, NULL, NULL}, NULL, 0};
  size_t tables = (size_t)(d->out + d->in + d->kh + d->kw) * sizeof(int32_t), tmp_bytes = (size_t)ROWS * CHUNK * 4;
  int32_t *t = malloc(tables);
  int threads = cpu_threads(c, (double)(d->out * d->in) * d->kh * d->kw);
  size_t real = (size_t)(d->out * d->in) * (size_t)(d->kh * d->kw) * dtype_size(c->act);
  void *tmp = NULL;
  int rc;

  rc = t ? cpu_scratch(c, tmp_bytes * (size_t)threads, &tmp, e) : err_set(e, E_NOMEM, "no memory to pack a weight");
  if (rc)
    goto out;
  to->packed = k.dst = cpu_memory(bytes);
  if (!to->packed) {
    rc = err_set(e, E_NOMEM, "no memory for a weight of %zu bytes", bytes);
    goto out;
  }
  k.at = (struct dnn_offsets){t, t + d->out, t + d->out + d->in, t + d->out + d->in + d->kh};
  dnn_layout_offsets(to->layout, &k.at);
  k.pairs = c->act == DT_BF16 && is_paired(d, &k.at);
  if (bytes != real)
    memset(to->packed, 0, bytes); /* padding is read and must be zero */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int i = 0; i < threads; i++) {
    int64_t from, to_row;

    cpu_split(d->out, ROWS, i, threads, &from, &to_row);
    pack_rows(&k, from, to_row, (char *)tmp + (size_t)i * tmp_bytes);
  }
out:
  free(t);
  return rc;
}

/* n numbers as fp32 in memory of their own. */
static int load_floats(struct cpu *c, float **out, const void *src, enum dtype type, int64_t n, struct err *e)
{
  *out = cpu_memory((size_t)n * sizeof **out);
  if (!*out)
    return err_set(e, E_NOMEM, "no memory for %lld parameters", (long long)n);
  c->vec->convert(*out, DT_F32, src, type, (size_t)n);
  return 0;
}

static void copy_free(struct weight_copy *k)
{
  if (k)
    free(k->packed);
  free(k);
}

static struct weight_copy *copy_next(const struct weight_copy *k)
{
  /* C11's atomic_load takes no pointer to const, though it only reads */
  return atomic_load_explicit((_Atomic(struct weight_copy *) *)(uintptr_t)&k->next, memory_order_acquire);
}

/* Appends k to w unless a copy with that layout is there already; returns the one that is there now. */
static struct weight_copy *copy_append(struct weight *w, struct weight_copy *k)
{
  struct weight_copy *at = &w->first;

  for (;;) {
    struct weight_copy *next = NULL;

    if (at->layout == k->layout) {
      copy_free(k);
      return at;
    }
    if (atomic_compare_exchange_strong(&at->next, &next, k))
      return k;
    at = next;
  }
}

/* The copies that `like` has beyond its first one. Another thread may be adding to them: what it has so far is what counts. */
static int load_copies(struct cpu *c, const struct weight_desc *d, struct weight *w, const struct weight *like, struct err *e)
{
  for (const struct weight_copy *have = &like->first; have; have = copy_next(have)) {
    struct weight_copy *k;
    int rc;

    if (have->layout == w->first.layout)
      continue;
    k = calloc(1, sizeof *k);
    if (!k)
      return err_set(e, E_NOMEM, "no memory for another copy of a weight");
    k->layout = have->layout;
    rc = pack(c, d, k, e);
    if (rc) {
      copy_free(k);
      return rc;
    }
    copy_append(w, k);
  }
  return 0;
}

static int load_matrix(struct cpu *c, const struct weight_desc *d, struct weight *w, const struct weight *like, struct err *e)
{
  struct weight_desc flat = *d;
  struct dnn_shape s;
  int rc = 0;

  w->is_linear = d->kind == WEIGHT_LINEAR || (d->kh == 1 && d->kw == 1 && d->stride == 1 && d->pad_lo == 0 && d->pad_hi == 0);
  if (d->kind == WEIGHT_LINEAR)
    flat.kh = flat.kw = 1;
  s = cpu_typical_shape(c, w);
  if (like)
    w->first.layout = like->first.layout;
  else
    rc = dnn_layout_for(c->dnn, &s, &w->first.layout, e);
  if (!rc)
    rc = pack(c, &flat, &w->first, e);
  if (!rc && like)
    rc = load_copies(c, &flat, w, like, e);
  if (!rc && d->bias)
    rc = load_floats(c, &w->bias, d->bias, d->bias_type, d->out, e);
  return rc;
}

int cpu_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **out, struct err *e)
{
  struct cpu *c = cpu_of(be);
  struct weight *w = calloc(1, sizeof *w);
  int rc;

  *out = NULL;
  assert(d->out > 0 && (d->kind == WEIGHT_NORM || d->in > 0) && d->w && d->w_type <= DT_BF16);
  assert(!like || (like->kind == d->kind && like->out == d->out && (d->kind == WEIGHT_NORM || like->in == d->in)));
  if (!w)
    return err_set(e, E_NOMEM, "no memory for a weight");
  w->kind = d->kind;
  w->out = d->out;
  w->in = d->in;
  w->kh = d->kind == WEIGHT_CONV ? d->kh : 1;
  w->kw = d->kind == WEIGHT_CONV ? d->kw : 1;
  w->stride = d->kind == WEIGHT_CONV ? d->stride : 1;
  w->pad_lo = d->kind == WEIGHT_CONV ? d->pad_lo : 0;
  w->pad_hi = d->kind == WEIGHT_CONV ? d->pad_hi : 0;
  if (d->kind == WEIGHT_TABLE) { /* kept as it is: rows are converted when they are read */
    w->table_type = d->w_type;
    w->table = cpu_memory((size_t)(d->in * d->out) * dtype_size(d->w_type));
    rc = w->table ? 0 : err_set(e, E_NOMEM, "no memory for a table of %lld rows", (long long)d->in);
    if (!rc)
      memcpy(w->table, d->w, (size_t)(d->in * d->out) * dtype_size(d->w_type));
  } else if (d->kind == WEIGHT_NORM) {
    assert(d->bias);
    rc = load_floats(c, &w->gamma, d->w, d->w_type, d->out, e);
    if (!rc)
      rc = load_floats(c, &w->bias, d->bias, d->bias_type, d->out, e);
  } else {
    rc = load_matrix(c, d, w, like, e);
  }
  if (rc) {
    cpu_weight_free(be, w);
    return rc;
  }
  *out = w;
  return 0;
}

void cpu_weight_free(struct be *be, struct weight *w)
{
  struct weight_copy *k;

  (void)be;
  if (!w)
    return;
  k = copy_next(&w->first);
  while (k) {
    struct weight_copy *next = copy_next(k);

    copy_free(k);
    k = next;
  }
  free(w->first.packed);
  free(w->bias);
  free(w->gamma);
  free(w->table);
  free(w);
}

int cpu_weight_copy(struct cpu *c, struct weight *w, const struct dnn_layout *l, const void **p, struct err *e)
{
  struct weight_copy *k = &w->first;
  int rc;

  for (; k; k = copy_next(k))
    if (k->layout == l) {
      *p = k->packed;
      return 0;
    }
  k = calloc(1, sizeof *k);
  if (!k)
    return err_set(e, E_NOMEM, "no memory for another copy of a weight");
  k->layout = l;
  k->packed = cpu_memory(dnn_layout_bytes(l));
  if (!k->packed)
    rc = err_set(e, E_NOMEM, "no memory for another copy of a weight, %zu bytes", dnn_layout_bytes(l));
  else
    rc = dnn_repack(c->dnn, k->packed, l, w->first.packed, w->first.layout, c->threads, e);
  if (rc) {
    copy_free(k);
    return rc;
  }
  *p = copy_append(w, k)->packed;
  return 0;
}
