/*
 * dnn.h - everything be_cpu asks of oneDNN: convolutions and matrix products with fused bias and residual, by shape.
 *
 * The one place that knows oneDNN's C API, whose versions 2 and 3 differ. A primitive is made on the first sight of a shape and
 * kept with its argument array, so that a later call costs a table lookup, six pointer stores and the execution.
 * A `struct dnn_layout` says how a weight lies in memory; oneDNN chooses it, dnn_pack writes it straight from the checkpoint.
 *
 * Threads: a struct dnn belongs to the thread that owns the backend. What several of them share, the engine and the known layouts,
 * is behind a lock that no call takes whose shape has been seen.
 */
#ifndef SAFELIGHT_KERNELS_CPU_DNN_H
#define SAFELIGHT_KERNELS_CPU_DNN_H

#include "base/err.h"
#include "kernels/tensor.h"

struct dnn;        /* stream, cached primitives, scratch; engine and known layouts, perhaps shared with others */
struct dnn_layout; /* how a weight lies in memory; lives as long as the struct dnn that was opened first; equal layouts are the same
                      pointer, for all that share */
struct dnn_prim;   /* a ready primitive; lives until the next dnn_find */

enum dnn_kind { DNN_CONV, DNN_LINEAR };
enum dnn_residual { DNN_NO_RESIDUAL, DNN_IN_PLACE /* y += ... */, DNN_SEPARATE /* y = ... + r */ };

/* What a primitive is made for. Compared byte for byte: fill it from {0}. */
struct dnn_shape {
  int64_t B, H, W;                /* linear: B rows, H = W = 1 */
  int64_t in, out;
  int32_t kh, kw, stride, pad_lo, pad_hi; /* convolution only */
  int32_t kind;                   /* enum dnn_kind */
  int32_t x_type, y_type;         /* enum dtype: F32 or BF16; weights have x_type */
  int32_t bias;                   /* 1: an fp32 bias is added */
  int32_t residual;               /* enum dnn_residual */
  int32_t threads;                /* how many work on it */
};

/* beside: NULL, or an open one whose engine and layouts are shared, and which is closed after this one. */
MUST_CHECK int dnn_open(struct dnn **d, struct dnn *beside, struct err *e);
void dnn_close(struct dnn *d); /* takes NULL */

/* "oneDNN 2.6.3". */
void dnn_version(char *out, size_t size);
/* The highest instruction set that oneDNN was told to use, as an enum cpu_isa. */
int dnn_isa_limit(void);

/* The layout that oneDNN would choose for the weights of this shape. It belongs to d. */
MUST_CHECK int dnn_layout_for(struct dnn *d, const struct dnn_shape *s, const struct dnn_layout **l, struct err *e);
size_t dnn_layout_bytes(const struct dnn_layout *l);

/* Where weight element (o, i, y, x) lies, in elements: the sum of out[o], in[i], ky[y] and kx[x]. The tables have room for
 * the real dims; the caller owns them. */
struct dnn_offsets {
  int32_t *out, *in, *ky, *kx;
};
void dnn_layout_offsets(const struct dnn_layout *l, const struct dnn_offsets *t);

/* The primitive for a shape whose weights lie as `have`. *need is `have` when that is as good as what oneDNN prefers, else the
 * layout that the weights must be given in (dnn_repack). E_NOMEM; E_INTERNAL when oneDNN refuses. */
MUST_CHECK int dnn_find(struct dnn *d, const struct dnn_shape *s, const struct dnn_layout *have, struct dnn_prim **p,
                        const struct dnn_layout **need, struct err *e);
/* Copies weights from one layout to another, on so many threads. */
MUST_CHECK int dnn_repack(struct dnn *d, void *dst, const struct dnn_layout *to, const void *src,
                          const struct dnn_layout *from, int threads, struct err *e);

/* Runs it. bias and residual as the shape said (else NULL). Weights in the layout that dnn_find asked for. */
MUST_CHECK int dnn_run(struct dnn *d, struct dnn_prim *p, void *y, const void *x, const void *w, const float *bias,
                       const void *residual, struct err *e);

/* The implementation that oneDNN chose, for the speed log. */
const char *dnn_prim_name(const struct dnn_prim *p);

#endif
