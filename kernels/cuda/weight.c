/*
 * weight.c - parameters and low-rank factors in device memory: the checkpoint's bytes go up as they are and are converted and rearranged there.
 *
 * Each parameter is one allocation. A load has finished on the device when it returns, so that any stream may use the result.
 *
 * Called through be_cuda's table. Threads: see cuda.h; a lane loads while the device thread draws.
 */
#include "kernels/cuda/cuda.h"

#include <assert.h>
#include <stdlib.h>

/* n numbers of the host, of src_type, as type at `to` on the device, rearranged from (out, in, taps) to (out, taps, in). */
static int put(struct be *be, void *to, enum dtype type, const void *src, enum dtype src_type, int64_t out, int64_t in, int64_t taps, struct err *e)
{
  struct cuda *c = cuda_of(be);
  size_t bytes = (size_t)(out * in * taps) * dtype_size(src_type);
  void *raw = to;
  int r = 0, as_it_is = taps == 1 && type == src_type;

  if (!as_it_is)
    r = cuda_staging(c, bytes, &raw, e);
  if (!r)
    r = cuda_check(cudaMemcpyAsync(raw, src, bytes, cudaMemcpyHostToDevice, c->stream), "upload of a parameter", e);
  if (!r && !as_it_is)
    r = cuda_check(taps == 1 ? kern_convert(c->stream, to, type, raw, src_type, out * in)
                             : kern_pack_conv(c->stream, to, type, raw, src_type, out, in, taps),
                   "packing a parameter", e);
  return r;
}

static int fill(struct be *be, struct weight *p, const struct weight_desc *d, struct err *e)
{
  int r;

  if (d->kind == WEIGHT_NORM)
    r = put(be, p->gamma, DT_F32, d->w, d->w_type, d->out, 1, 1, e);
  else if (d->kind == WEIGHT_TABLE)
    r = put(be, p->w, p->type, d->w, d->w_type, d->in, d->out, 1, e);
  else
    r = put(be, p->w, p->type, d->w, d->w_type, d->out, d->in, (int64_t)p->kh * p->kw, e);
  if (!r && p->bias_f32)
    r = put(be, p->bias_f32, DT_F32, d->bias, d->bias_type, d->out, 1, 1, e);
  if (!r && p->bias)
    r = put(be, p->bias, be->act, d->bias, d->bias_type, d->out, 1, 1, e);
  return r ? r : be->ops->sync(be, e);
}

int cuda_weight_describe(struct weight **w, const struct be *be, const struct weight_desc *d, struct err *e)
{
  int is_conv = d->kind == WEIGHT_CONV;
  struct weight *p = calloc(1, sizeof *p);

  assert(d->out > 0 && (d->in > 0 || d->kind == WEIGHT_NORM));
  assert(d->kind != WEIGHT_NORM || d->bias);
  assert(!is_conv || (d->kh > 0 && d->kw > 0 && d->stride > 0 && d->pad_lo >= 0 && d->pad_hi >= 0));
  *w = p;
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for a parameter");
  *p = (struct weight){.kind = d->kind, .out = d->out, .in = d->in, .kh = 1, .kw = 1, .stride = 1};
  if (is_conv) {
    p->kh = d->kh;
    p->kw = d->kw;
    p->stride = d->stride;
    p->pad_lo = d->pad_lo;
    p->pad_hi = d->pad_hi;
  }
  p->type = is_conv || d->kind == WEIGHT_LINEAR ? be->act : d->w_type;
  return 0;
}

int cuda_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  int is_matrix = d->kind == WEIGHT_CONV || d->kind == WEIGHT_LINEAR, r;
  size_t main_bytes, bias_bytes, act_bytes;
  struct weight *p;
  char *at;

  (void)like; /* there is one packing */
  *w = NULL;
  r = cuda_weight_describe(&p, be, d, e);
  if (r)
    return r;
  main_bytes = d->kind == WEIGHT_NORM ? (size_t)d->out * 4 : (size_t)(d->out * d->in) * (size_t)(p->kh * p->kw) * dtype_size(p->type);
  main_bytes = cuda_round(main_bytes);
  bias_bytes = d->bias ? cuda_round((size_t)d->out * 4) : 0;
  act_bytes = d->bias && is_matrix ? (size_t)d->out * dtype_size(be->act) : 0;
  r = be->ops->mem_alloc(be, main_bytes + bias_bytes + act_bytes, &p->block, e);
  if (r)
    goto out;
  at = p->block;
  if (d->kind == WEIGHT_NORM)
    p->gamma = (float *)(void *)at;
  else
    p->w = at;
  if (bias_bytes)
    p->bias_f32 = (float *)(void *)(at + main_bytes);
  if (act_bytes)
    p->bias = at + main_bytes + bias_bytes;
  r = fill(be, p, d, e);
  if (r)
    goto out;
  *w = p;
  p = NULL;
out:
  cuda_weight_free(be, p);
  return r;
}

void cuda_weight_free(struct be *be, struct weight *w)
{
  if (!w)
    return;
  be->ops->mem_free(be, w->block);
  free(w);
}

int cuda_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e)
{
  struct lowrank *p = calloc(1, sizeof *p);
  int64_t width = (d->rank + KERN_UP_STEP - 1) / KERN_UP_STEP * KERN_UP_STEP;
  size_t slot_bytes = cuda_round(sizeof *p->slot), down_bytes, up_bytes = (size_t)(d->out * width) * (be->act == DT_F16 ? 4 : 2);
  size_t raw_bytes = (size_t)(d->out * d->rank) * sizeof(float);
  struct cuda *c = cuda_of(be);
  struct kern_slot slot;
  void *raw = NULL;
  int64_t taps;
  int r;

  assert(d->out > 0 && d->in > 0 && d->rank > 0);
  *l = NULL;
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for low-rank factors");
  *p = (struct lowrank){.out = d->out, .in = d->in, .rank = (int)d->rank, .kh = 1, .kw = 1, .stride = 1};
  if (d->kh) {
    p->kh = d->kh;
    p->kw = d->kw;
    p->stride = d->stride;
    p->pad_lo = d->pad_lo;
    p->pad_hi = d->pad_hi;
  }
  taps = (int64_t)p->kh * p->kw;
  down_bytes = cuda_round((size_t)(d->rank * d->in * taps) * dtype_size(be->act));
  r = be->ops->mem_alloc(be, slot_bytes + down_bytes + up_bytes, &p->block, e);
  if (r)
    goto out;
  p->slot = p->block;
  slot = (struct kern_slot){(char *)p->block + slot_bytes, (char *)p->block + slot_bytes + down_bytes, p->rank, (int)width};
  r = put(be, (void *)(uintptr_t)slot.down, be->act, d->down, DT_F32, d->rank, d->in, taps, e);
  if (!r)
    r = cuda_staging(c, raw_bytes, &raw, e);
  if (!r)
    r = cuda_check(cudaMemcpyAsync(raw, d->up, raw_bytes, cudaMemcpyHostToDevice, c->stream), "upload of factors", e);
  if (!r)
    r = cuda_check(kern_pack_up(c->stream, (void *)(uintptr_t)slot.up, be->act, raw, d->out, d->rank, width), "packing factors", e);
  if (!r)
    r = cuda_check(cudaMemcpyAsync(p->slot, &slot, sizeof slot, cudaMemcpyHostToDevice, c->stream), "upload of a slot", e);
  if (!r)
    r = be->ops->sync(be, e);
  if (r)
    goto out;
  *l = p;
  p = NULL;
out:
  cuda_lowrank_free(be, p);
  return r;
}

void cuda_lowrank_free(struct be *be, struct lowrank *l)
{
  if (!l)
    return;
  be->ops->mem_free(be, l->block);
  free(l);
}
