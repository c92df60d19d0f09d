/*
 * gemm.c - convolutions and linear layers of be_cpu: which oneDNN primitive a call gets, and on how many threads.
 *
 * A 1x1 convolution of stride 1 is a matrix product. A residual that is y itself becomes oneDNN's sum; another one is a binary
 * add for matrix products, and is copied to y first for convolutions, whose AMX code does not know binary adds.
 *
 * Callers: the table in be_cpu.c. Threads: the owner's.
 */
#include <assert.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

/* Nanoseconds that a product of so many multiply-adds takes one thread, roughly: what decides on threads, not what is paid. */
static double nanoseconds(const struct cpu *c, double macs, double bytes)
{
  return macs / (c->act == DT_BF16 ? 500.0 : 60.0) + bytes / 10.0;
}

static struct dnn_shape shape_of(const struct cpu *c, const struct weight *w, int64_t B, int64_t H, int64_t W)
{
  struct dnn_shape s = {0};
  double macs;

  s.B = B;
  s.H = H;
  s.W = W;
  s.in = w->in;
  s.out = w->out;
  s.kh = w->kh;
  s.kw = w->kw;
  s.stride = w->stride;
  s.pad_lo = w->pad_lo;
  s.pad_hi = w->pad_hi;
  s.kind = w->is_linear ? DNN_LINEAR : DNN_CONV;
  s.x_type = s.y_type = (int32_t)c->act;
  s.bias = w->bias != NULL;
  macs = (double)(B * H * W) / (w->stride * w->stride) * (double)(w->in * w->out) * w->kh * w->kw;
  s.threads = cpu_threads(c, nanoseconds(c, macs, (double)(w->in * w->out) * w->kh * w->kw * 2));
  return s;
}

struct dnn_shape cpu_typical_shape(const struct cpu *c, const struct weight *w)
{
  struct dnn_shape s = w->is_linear ? shape_of(c, w, 512, 1, 1) : shape_of(c, w, 2, 32, 32);

  s.bias = 1;
  s.threads = c->device_threads;
  return s;
}

/* Finds, provides and runs. The weight is const to the caller; what may grow are its packed copies. */
static int run(struct cpu *c, struct dnn_shape *s, struct tensor y, struct tensor x, const struct weight *w,
               struct tensor residual, struct err *e)
{
  const struct dnn_layout *need;
  const void *packed = w->first.packed;
  struct dnn_prim *p;
  int rc;

  assert(y.type == c->act || y.type == DT_F32);
  assert(x.type == c->act);
  s->y_type = (int32_t)y.type;
  if (residual.p) {
    assert(residual.type == y.type && tensor_count(residual) == tensor_count(y));
    if (residual.p != y.p && s->kind == DNN_CONV) {
      cpu_copy(c, y.p, residual.p, tensor_bytes(y));
      residual = y;
    }
    s->residual = residual.p == y.p ? DNN_IN_PLACE : DNN_SEPARATE;
  }
  rc = dnn_find(c->dnn, s, w->first.layout, &p, &need, e);
  if (!rc && need != w->first.layout)
    rc = cpu_weight_copy(c, (struct weight *)(uintptr_t)w, need, &packed, e);
  return rc ? rc : dnn_run(c->dnn, p, y.p, x.p, packed, w->bias, residual.p, e);
}

int cpu_linear(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  struct cpu *c = cpu_of(be);
  struct dnn_shape s;

  assert(w->is_linear && x.d[3] == w->in && y.d[3] == w->out && tensor_rows(x) == tensor_rows(y));
  s = shape_of(c, w, tensor_rows(x), 1, 1);
  return run(c, &s, y, x, w, residual, e);
}

int cpu_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  struct cpu *c = cpu_of(be);
  struct dnn_shape s;

  assert(w->kind == WEIGHT_CONV || w->is_linear);
  if (w->is_linear)
    return cpu_linear(be, y, x, w, residual, e);
  assert(x.d[3] == w->in && y.d[3] == w->out && y.d[0] == x.d[0]);
  assert(y.d[1] == (x.d[1] + w->pad_lo + w->pad_hi - w->kh) / w->stride + 1);
  assert(y.d[2] == (x.d[2] + w->pad_lo + w->pad_hi - w->kw) / w->stride + 1);
  s = shape_of(c, w, x.d[0], x.d[1], x.d[2]);
  return run(c, &s, y, x, w, residual, e);
}
