/*
 * matmul.c - be_cuda's convolution, linear and attention on the vendor's libraries, and low-rank adapters on kernels of our own.
 *
 * Attention goes to cuDNN in runs of pictures whose keys lie one behind the other with the same length, as self-attention's do; to
 * attn.cu when it is causal or cuDNN has no such head.
 *
 * Called through be_cuda's table. Threads: see cuda.h.
 */
#include "kernels/cuda/cuda.h"

#include <assert.h>
#include <string.h>

static int same_dims(struct tensor a, struct tensor b)
{
  return memcmp(a.d, b.d, sizeof a.d) == 0;
}

int cuda_is_linear(const struct weight *w)
{
  return w->kind == WEIGHT_LINEAR || (w->kind == WEIGHT_CONV && w->kh == 1 && w->kw == 1 && w->stride == 1 && w->pad_lo == 0 && w->pad_hi == 0);
}

int cuda_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  struct cuda *c = cuda_of(be);
  struct gpu_linear l = {.y = y.p, .x = x.p, .w = w->w, .residual = residual.p, .rows = tensor_rows(x), .out = w->out, .in = w->in,
                         .act = be->act, .y_type = y.type};

  assert(cuda_is_linear(w) && x.type == be->act && (y.type == be->act || y.type == DT_F32));
  assert(x.d[3] == w->in && y.d[3] == w->out && tensor_rows(y) == l.rows);
  assert(!residual.p || (residual.type == y.type && same_dims(residual, y)));
  l.picture_rows = l.rows / x.d[0];
  l.bias = y.type == DT_F32 ? (const void *)w->bias_f32 : w->bias;
  if (c->pass.rehearsal == REHEARSE_ALL)
    return gpu_blas_ready(c->blas, &l, e);
  if (pass_skips(c, "linear", (struct tensor[]){y, x, residual}, 3, w, NULL, 0))
    return 0;
  return gpu_blas_linear(c->blas, c->stream, &l, e);
}

struct gpu_conv cuda_conv_of(const struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual)
{
  struct gpu_conv v = {.y = y.p, .x = x.p, .w = w->w, .bias = w->bias, .residual = residual.p, .B = x.d[0], .H = x.d[1], .W = x.d[2], .in = w->in,
                       .Ho = y.d[1], .Wo = y.d[2], .out = w->out, .kh = w->kh, .kw = w->kw, .stride = w->stride, .pad_lo = w->pad_lo,
                       .pad_hi = w->pad_hi, .act = be->act, .y_type = y.type};

  assert(w->kind == WEIGHT_CONV && x.type == be->act && (y.type == be->act || y.type == DT_F32) && x.d[3] == w->in && y.d[3] == w->out);
  assert(y.d[0] == v.B && v.Ho == (v.H + w->pad_lo + w->pad_hi - w->kh) / w->stride + 1 &&
         v.Wo == (v.W + w->pad_lo + w->pad_hi - w->kw) / w->stride + 1);
  assert(!residual.p || (residual.type == y.type && same_dims(residual, y)));
  return v;
}

int cuda_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  struct cuda *c = cuda_of(be);
  struct gpu_conv v;
  struct gpu_key k;

  if (cuda_is_linear(w))
    return cuda_linear(be, y, x, w, residual, e);
  v = cuda_conv_of(be, y, x, w, residual);
  if (c->pass.rehearsal == REHEARSE_ALL) {
    gpu_key_of_conv(&k, &v);
    return gpu_dnn_ready(c->dnn, &k, e);
  }
  if (pass_skips(c, "conv2d", (struct tensor[]){y, x, residual}, 3, w, NULL, 0))
    return 0;
  return gpu_dnn_conv(c->dnn, c->stream, &v, e);
}

/* Pictures first, first + 1, ... whose keys and values follow each other, all of one length. */
static int64_t run_length(const struct kv_row *kv, int64_t first, int64_t B, int64_t D)
{
  int64_t n = 1, step = kv[first].T * D * 2;

  while (first + n < B && kv[first + n].T == kv[first].T && (const char *)kv[first + n].k == (const char *)kv[first].k + n * step &&
         (const char *)kv[first + n].v == (const char *)kv[first].v + n * step)
    n++;
  return n;
}

/* The entries of n pictures. */
static void kv_rows(struct kern_kv_rows *rows, const struct kv_row *kv, int64_t n)
{
  memset(rows, 0, sizeof *rows);
  for (int64_t i = 0; i < n; i++)
    rows->row[i] = (struct kern_kv){kv[i].k, kv[i].v, kv[i].T};
}

static int attention_own(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal,
                         struct err *e)
{
  struct cuda *c = cuda_of(be);
  int r = 0;

  for (int64_t b = 0; b < q.d[0] && !r; b += KERN_ROWS) {
    int64_t n = q.d[0] - b < KERN_ROWS ? q.d[0] - b : KERN_ROWS;
    const float more[4] = {(float)heads, scale, (float)causal, (float)n};
    struct kern_kv_rows rows;

    kv_rows(&rows, kv + b, n);
    pass_table(c, rows.row, (size_t)n * sizeof *rows.row, (const void **)&rows.at);
    if (pass_skips(c, "attention", (struct tensor[]){tensor_batch(o, b, n), tensor_batch(q, b, n)}, 2, NULL, more, sizeof more))
      continue;
    r = cuda_check(kern_attention(c->stream, be->act, tensor_batch(o, b, n).p, tensor_batch(q, b, n).p, &rows, n, q.d[2], heads, q.d[3] / heads, scale,
                                  causal),
                   "attention", e);
  }
  return r;
}

/* Pictures first, first + 1, ... with as many keys, KERN_ROWS at most. */
static int64_t same_length(const struct kv_row *kv, int64_t first, int64_t B)
{
  int64_t n = 1;

  while (first + n < B && n < KERN_ROWS && kv[first + n].T == kv[first].T)
    n++;
  return n;
}

struct collect_numbers {
  int64_t n, elements, wide;
};

/* The keys and values of n pictures, n * T * D each, put together in scratch memory: where the next pass finds other prompts. */
static int collect_kv(struct be *be, const struct kv_row *kv, int64_t n, int64_t D, const void **k, const void **v, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t each = kv[0].T * D;
  size_t bytes = cuda_round((size_t)(n * each) * 2);
  struct collect_numbers more;
  struct kern_kv_rows rows;
  int wide = each % 8 == 0, r;
  void *at;

  r = cuda_scratch(c, 2 * bytes, &at, e);
  if (r)
    return r;
  for (int64_t i = 0; i < n; i++)
    wide = wide && ((uintptr_t)kv[i].k | (uintptr_t)kv[i].v) % 16 == 0;
  *k = at;
  *v = (char *)at + bytes;
  more = (struct collect_numbers){n, each, wide};
  kv_rows(&rows, kv, n);
  pass_table(c, rows.row, (size_t)n * sizeof *rows.row, (const void **)&rows.at);
  if (pass_skips(c, "keys and values", NULL, 0, NULL, &more, sizeof more))
    return 0;
  return cuda_check(kern_collect_kv(c->stream, (void *)(uintptr_t)*k, (void *)(uintptr_t)*v, &rows, n, each, wide), "keys and values", e);
}

struct attention_numbers {
  int64_t keys, heads;
  float scale, foreign;
  uint64_t own[2]; /* keys and values */
};

int cuda_attention_is_dnn(struct tensor q, int heads, int causal)
{
  return !causal && gpu_dnn_takes_head(q.d[3] / heads);
}

int cuda_attention_of(struct gpu_attention *a, struct cuda *c, enum dtype act, struct tensor o, struct tensor q, const struct kv_row *kv, int64_t b,
                      int heads, float scale)
{
  int64_t B = q.d[0], D = q.d[3];
  int foreign = pass_is_foreign(c, kv[b].k);

  *a = (struct gpu_attention){.k = kv[b].k, .v = kv[b].v, .T = q.d[2], .keys = kv[b].T, .heads = heads, .K = (int)(D / heads), .scale = scale, .act = act};
  a->B = foreign ? same_length(kv, b, B) : run_length(kv, b, B, D);
  a->o = tensor_batch(o, b, a->B).p;
  a->q = tensor_batch(q, b, a->B).p;
  return foreign;
}

int cuda_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t B = q.d[0], D = q.d[3], n;
  int r = 0;

  assert(q.type == be->act && o.type == be->act && same_dims(o, q) && q.d[1] == 1 && D % heads == 0 && D / heads <= KERN_MAX_HEAD);
  for (int64_t b = 0; b < B; b++)
    assert(kv[b].T >= 1 && kv[b].k && kv[b].v);
  if (!cuda_attention_is_dnn(q, heads, causal))
    return attention_own(be, o, q, kv, heads, scale, causal, e);
  for (int64_t b = 0; b < B && !r; b += n) {
    struct attention_numbers more;
    struct gpu_attention a;
    struct gpu_key k;
    int foreign = cuda_attention_of(&a, c, be->act, o, q, kv, b, heads, scale);

    n = a.B;
    if (foreign)
      r = collect_kv(be, kv + b, n, D, &a.k, &a.v, e);
    more = (struct attention_numbers){a.keys, heads, scale, (float)foreign, {0, 0}};
    if (!foreign) { /* else they lie in scratch memory */
      more.own[0] = (uintptr_t)a.k;
      more.own[1] = (uintptr_t)a.v;
    }
    if (!r && c->pass.rehearsal == REHEARSE_ALL) {
      gpu_key_of_attention(&k, &a);
      r = gpu_dnn_ready(c->dnn, &k, e);
    }
    if (!r && !pass_skips(c, "attention of cuDNN", (struct tensor[]){tensor_batch(o, b, n), tensor_batch(q, b, n)}, 2, NULL, &more, sizeof more))
      r = gpu_dnn_attention(c->dnn, c->stream, &a, e);
  }
  return r;
}

/* ---- low-rank adapters ---- */

/* Without a kernel, or with one of 1x1 and stride 1, rows are rows: those of a picture may be arranged in any way. */
static int is_flat(const struct lowrank *l)
{
  return l->kh == 1 && l->kw == 1 && l->stride == 1 && l->pad_lo == 0 && l->pad_hi == 0;
}

/* Of one picture, for kernels that know convolutions alone. */
static struct kern_geometry geometry(const struct lowrank *l, struct tensor y, struct tensor x)
{
  if (is_flat(l))
    return (struct kern_geometry){.H = 1, .W = (int)(tensor_rows(x) / x.d[0]), .Ho = 1, .Wo = (int)(tensor_rows(y) / y.d[0]), .kh = 1, .kw = 1, .stride = 1};
  return (struct kern_geometry){(int)x.d[1], (int)x.d[2], (int)y.d[1], (int)y.d[2], l->kh, l->kw, l->stride, l->pad_lo};
}

/* Whether the factors take x and give y. */
static int fits(const struct lowrank *l, struct tensor y, struct tensor x)
{
  if (x.d[3] != l->in || y.d[3] != l->out || y.d[0] % x.d[0])
    return 0;
  if (is_flat(l))
    return x.d[1] * x.d[2] == y.d[1] * y.d[2];
  return y.d[1] == (x.d[1] + l->pad_lo + l->pad_hi - l->kh) / l->stride + 1 && y.d[2] == (x.d[2] + l->pad_lo + l->pad_hi - l->kw) / l->stride + 1;
}

/* Whether two sets of factors of one site walk over x alike. */
static int same_walk(const struct lowrank *a, const struct lowrank *b)
{
  return a->kh == b->kh && a->kw == b->kw && a->stride == b->stride && a->pad_lo == b->pad_lo && a->pad_hi == b->pad_hi;
}

struct lowrank_numbers {
  int64_t in, first;
  struct kern_geometry g;
};

/* A captured pass has fixed the walk over x; which rows have factors, and of what rank, kernels read when they run. */
int cuda_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  struct cuda *c = cuda_of(be);
  const struct lowrank *any = NULL;
  struct lowrank_numbers more;
  int64_t B = y.d[0];
  int r = 0;

  assert(x.type == be->act && (y.type == be->act || y.type == DT_F32));
  for (int64_t b = 0; b < B; b++)
    if (row[b]) {
      assert(fits(row[b], y, x) && (!any || same_walk(any, row[b])));
      any = row[b];
    }
  if (!any)
    return 0;
  more = (struct lowrank_numbers){any->in, 0, geometry(any, y, x)};
  for (int64_t b = 0; b < B && !r; b += KERN_ROWS) {
    int64_t n = B - b < KERN_ROWS ? B - b : KERN_ROWS;
    struct kern_slot_rows slots;

    memset(&slots, 0, sizeof slots);
    for (int64_t i = 0; i < n; i++)
      slots.row[i] = row[b + i] ? row[b + i]->slot : NULL;
    pass_table(c, slots.row, (size_t)n * sizeof *slots.row, (const void **)&slots.at);
    more.first = b;
    if (pass_skips(c, "lowrank", (struct tensor[]){tensor_batch(y, b, n), x}, 2, NULL, &more, sizeof more))
      continue;
    r = cuda_check(kern_lowrank(c->stream, be->act, tensor_batch(y, b, n).p, y.type, x.p, &slots, n, b, x.d[0], &more.g, any->in, any->out), "lowrank", e);
  }
  return r;
}
