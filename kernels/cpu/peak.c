/*
 * peak.c - measures oneDNN's best matrix product and convolution on this machine; see peak.h.
 *
 * A peak is the best of a few shapes and many short runs: the shapes are large enough to hide the start of the threads and small
 * enough for the caches, and the best run is the one that no other process disturbed. Operands are random: some chips
 * run faster on zeros. oneDNN chooses the layout of the weights freely here, unlike in the product.
 */
#include "kernels/cpu/peak.h"

#include <omp.h>
#include <stdlib.h>

#include "kernels/cpu/cpu.h"

static const double budget_s = 0.15; /* per shape */

/* Operands of one shape: numbers in [-1, 1) by a linear congruence, which no chip finds easy. */
static void fill(const struct cpu *c, void *p, size_t bytes)
{
  size_t n = bytes / dtype_size(c->act);
  uint32_t s = 12345;

  for (size_t i = 0; i < n; i++) {
    float f;

    s = s * 1664525u + 1013904223u;
    f = (float)(int32_t)s * 0x1p-31f;
    c->vec->convert((char *)p + i * dtype_size(c->act), c->act, &f, DT_F32, 1);
  }
}

/* The best rate of one shape. */
static int measure(struct cpu *c, const struct dnn_shape *s, double *best, struct err *e)
{
  int64_t pixels = s->B * s->H * s->W;
  size_t size = dtype_size(c->act), xs = (size_t)(pixels * s->in) * size, ys = (size_t)(pixels * s->out) * size, ws;
  double flops = 2.0 * (double)(pixels * s->in * s->out) * (double)(s->kh * s->kw), until;
  const struct dnn_layout *l, *need;
  struct dnn_prim *p;
  void *x = NULL, *y = NULL, *w = NULL;
  int rc = dnn_layout_for(c->dnn, s, &l, e);

  if (!rc)
    rc = dnn_find(c->dnn, s, l, &p, &need, e);
  if (rc)
    return rc;
  ws = dnn_layout_bytes(l);
  x = cpu_memory(xs);
  y = cpu_memory(ys);
  w = cpu_memory(ws);
  if (!x || !y || !w) {
    rc = err_set(e, E_NOMEM, "no memory to measure the machine's peak");
    goto out;
  }
  fill(c, x, xs);
  fill(c, w, ws);
  until = omp_get_wtime() + budget_s;
  for (int i = 0; i < 3 || omp_get_wtime() < until; i++) {
    double t = omp_get_wtime();

    rc = dnn_run(c->dnn, p, y, x, w, NULL, NULL, e);
    t = omp_get_wtime() - t;
    if (rc)
      break;
    if (i && flops / t > *best)
      *best = flops / t;
  }
out:
  free(x);
  free(y);
  free(w);
  return rc;
}

int cpu_measure_peaks(struct be *be, double *matmul_flops, double *conv_flops, struct err *e)
{
  static const struct {
    int kind, B, HW, in, out, k;
  } shapes[] = {{DNN_LINEAR, 1024, 1, 1024, 1024, 1}, {DNN_LINEAR, 2048, 1, 640, 640, 1},  {DNN_LINEAR, 2048, 1, 2048, 2048, 1},
                {DNN_CONV, 2, 64, 320, 320, 3},       {DNN_CONV, 2, 32, 640, 640, 3},      {DNN_CONV, 2, 16, 1280, 1280, 3},
                {DNN_CONV, 1, 128, 256, 256, 3}};
  struct cpu *c = cpu_of(be);
  double best[2] = {0, 0};

  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    struct dnn_shape s = {0};
    int rc;

    s.kind = shapes[i].kind;
    s.B = shapes[i].B;
    s.H = s.W = shapes[i].HW;
    s.in = shapes[i].in;
    s.out = shapes[i].out;
    s.kh = s.kw = shapes[i].k;
    s.stride = 1;
    s.pad_lo = s.pad_hi = shapes[i].k / 2;
    s.x_type = s.y_type = (int32_t)c->act;
    s.threads = c->threads;
    rc = measure(c, &s, &best[s.kind == DNN_CONV], e);
    if (rc)
      return rc;
  }
  *matmul_flops = best[0];
  *conv_flops = best[1];
  return 0;
}
