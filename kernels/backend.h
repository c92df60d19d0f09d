/*
 * backend.h - THE seam between the models and the machine: one table of function pointers.
 *
 * Instances: be_ref (ref.c: plain C with double accumulators, the specification), be_cpu (cpu/: oneDNN and vector code),
 * be_cuda (cuda/, a shared object of its own), and be_dry (dry.c: every op does nothing, to measure how much activation
 * memory a forward pass needs). No registry, no optional entries: every table fills every entry.
 *
 * Rules
 *  1. Ops are mathematics (linear, groupnorm, attention), never parts of a model. The models decide the order.
 *  2. Every op enqueues or runs at once; results are in place after sync(). Errors that surface late surface in sync().
 *  3. No op allocates once a shape has been seen (primitives, workspaces and thread pools are cached on first use).
 *  4. Shapes and types are the caller's duty and are checked by assert, which stays on in release. Bad numbers from outside
 *     never reach an op: checkpoint and request are validated before.
 *  5. The result of a row of the first dimension (one picture) depends on that row alone, bit for bit, for a fixed count of
 *     rows in the op call, whatever the other rows hold. Where the table says rows_are_alone (be_ref, be_cuda):
 *     for any count. Never on how many threads a lane has.
 *  6. An output never overlaps an input unless the op says "in place".
 *  7. Activations have the type be->act (F32 for be_ref); `x` and `y` of an op have that type unless it says otherwise.
 *
 * Callers: models/ only (and tests/ops). Threads: one thread owns a struct be and everything made by it.
 */
#ifndef SAFELIGHT_KERNELS_BACKEND_H
#define SAFELIGHT_KERNELS_BACKEND_H

#include <stdatomic.h>

#include "base/err.h"
#include "kernels/normal.h"
#include "kernels/tensor.h"

struct be;
struct weight; /* a parameter in the backend's own packing; opaque outside the backend that made it */
struct lowrank; /* packed low-rank factors of a site */
struct mark;    /* a place in what a context has enqueued */

enum weight_kind {
  WEIGHT_LINEAR, /* w (out, in), bias (out) or none */
  WEIGHT_CONV,   /* w (out, in, kh, kw), bias (out) or none */
  WEIGHT_NORM,   /* w = gamma (out), bias = beta (out): both present */
  WEIGHT_TABLE   /* w (in rows, out columns): an embedding table, gathered by row; no bias */
};

/* A parameter as the checkpoint holds it, in the torch layout. The data is read during weight_load only. */
struct weight_desc {
  enum weight_kind kind;
  int64_t out, in;            /* see weight_kind */
  int kh, kw;                 /* conv only */
  int stride;                 /* conv only: 1 or 2 */
  int pad_lo, pad_hi;         /* conv only: zeros before (top and left) and after (bottom and right) */
  const void *w;
  enum dtype w_type;          /* F32, F16 or BF16; w need not be aligned */
  const void *bias;           /* NULL when there is none */
  enum dtype bias_type;
};

/*
 * Low-rank factors of one site, all adapters of a generation stacked along R: dy = up (down x). Scales and weights are already in `up`,
 * multiplied in fp32 before any rounding. linear: kh = kw = 0. A convolution's down has the geometry of the site; up is 1x1.
 */
struct lowrank_desc {
  int64_t out, in, rank;      /* rank as it is; backends pad */
  int kh, kw, stride, pad_lo, pad_hi;
  const float *down;          /* (rank, in) or (rank, in, kh, kw); read during lowrank_load only */
  const float *up;            /* (out, rank) */
};

enum act_kind { ACT_SILU, ACT_GELU /* exact, erf */, ACT_QUICK_GELU /* x * sigmoid(1.702 x) */ };

/* One row (picture) of keys and values for attention; rows of a batch may have different lengths and owners. */
struct kv_row {
  const void *k, *v; /* (T, N*K) of type be->act */
  int64_t T;
};

/* What one sampler step does to one latent row; see be_ops.sampler_step. */
struct step_coef {
  float guidance;      /* e = e_uncond + guidance * (e_cond - e_uncond); with cond == uncond rows e is e_cond */
  float x0_x, x0_e;    /* x0 = x0_x * x + x0_e * e: the model's idea of the finished latent */
  float c_x, c_x0, c_old, c_noise; /* x' = c_x * x + c_x0 * x0 + c_old * x0_old + c_noise * noise */
  int row_cond, row_uncond; /* rows of the model output that belong to this latent; equal when there is no guidance */
};

/* What blend makes of a picture where its mask is 0: a * one picture + b * another. */
struct blend_coef {
  float a, b;
};

/* What is made in a rehearsal of what ops need on the first sight of a shape. */
enum be_rehearsal {
  REHEARSE_NOTHING, /* there is none: ops compute */
  REHEARSE_MEMORY,  /* working memory */
  REHEARSE_ALL      /* that, and what is compiled or chosen for the shape */
};

/* Device memory, in bytes; zeros where memory is the operating system's business. */
struct be_memory {
  size_t working;     /* that this context has taken beside what mem_alloc, weight_load and lowrank_load gave out */
  size_t free, total; /* of the device: what nobody has, other processes included; all that it has */
};

struct be_config {
  int threads;      /* 0: as many as the machine has */
  int force_f32;    /* be_cpu: keep activations in fp32 where bf16 would be chosen */
  int want_f16;     /* be_cuda: activations in fp16 instead of bf16 */
  int device;       /* be_cuda: which GPU, from 0; lanes are on the device of what they are opened beside */
  const char *plan_cache; /* be_cuda: a folder that exists, for compiled plans; NULL: none is kept. Read until close */
  int no_capture;   /* be_cuda: launches every op of a pass anew instead of replaying captured ones */
};

struct be_ops {
  const char *name; /* "ref", "cpu", "cuda", "dry" */
  int rows_are_alone; /* rule 5 holds for any count of rows: pictures may share a call */

  /* Fills be->act, be->info and be->priv. On failure nothing is held. close() takes a half-open one. */
  MUST_CHECK int (*open)(struct be *be, const struct be_config *cfg, struct err *e);
  void (*close)(struct be *be);

  /* Memory of the device, 64-byte aligned. The contents of fresh memory are undefined, and it is the context's own until its next sync or mark. free
   * takes NULL, on any thread; what is enqueued on any context by then may still use the memory, and neither call waits for that. */
  MUST_CHECK int (*mem_alloc)(struct be *be, size_t bytes, void **p, struct err *e);
  void (*mem_free)(struct be *be, void *p);
  /* Copies count(dst) elements from host memory of type src_type, converting; the reverse for download, which also syncs. */
  MUST_CHECK int (*upload)(struct be *be, struct tensor dst, const void *src, enum dtype src_type, struct err *e);
  MUST_CHECK int (*download)(struct be *be, void *dst, enum dtype dst_type, struct tensor src, struct err *e);
  MUST_CHECK int (*sync)(struct be *be, struct err *e);
  /* May wait for what is enqueued: for the start of a server. Zeros as well when the device does not say. */
  void (*memory)(struct be *be, struct be_memory *m);

  /* Another context on the same device over the same weights, for another thread (the loader's): its ops, weight_load and lowrank_load
   * may run while be's do. threads: for its own work, 0 as be. Weights and memory made through one may be used and freed through the
   * other; what an op of one wrote the other may read after sync() on the first, or a mark, and a hand-over between the threads (a lock).
   * Closed with be_close, before be. */
  MUST_CHECK int (*open_lane)(struct be *lane, struct be *be, int threads, struct err *e);

  /* A mark keeps the order between two contexts of a device without anybody waiting for it. set, on the thread of the context that it marks,
   * again and again; wait, on the thread of another one after a hand-over: later ops there come after all that was enqueued before the last set, and
   * may read what that wrote. A mark that was never set holds nobody up. open: on either thread; the mark is the caller's, NULL after
   * failure. close takes NULL, on any thread, before the contexts are closed. */
  MUST_CHECK int (*mark_open)(struct be *be, struct mark **m, struct err *e);
  void (*mark_close)(struct be *be, struct mark *m);
  MUST_CHECK int (*mark_set)(struct be *be, struct mark *m, struct err *e);
  MUST_CHECK int (*mark_wait)(struct be *be, struct mark *m, struct err *e);

  /* At most so many threads (>= 1) for the later ops of this context. No result depends on it. A call that changes nothing costs nothing;
   * shapes are seen anew for each count. */
  void (*set_threads)(struct be *be, int threads);

  /*
   * A pass: ops that are called again and again in the same order with other numbers, as the UNet's are in every step. A backend may remember
   * their launches. Between begin and end only ops are called: no transfer, no sync, no embed, no count_nonfinite. `own` is memory
   * (own_bytes of it) whose addresses mean the same in every such pass, as those of an arena do; what lies elsewhere may have moved by the next.
   * `code`: 0, or the first failure of an op of this pass. After end with *again set nothing has been computed and no failure counts: the
   * caller makes the same calls once more, from pass_begin on; that happens twice in a row at most, for a shape that is new. Else
   * end returns code, or a failure of its own, and the results are in place after sync().
   */
  MUST_CHECK int (*pass_begin)(struct be *be, const void *own, size_t own_bytes, struct err *e);
  MUST_CHECK int (*pass_end)(struct be *be, int code, int *again, struct err *e);

  /*
   * A rehearsal begins, or ends with REHEARSE_NOTHING. In it ops compute nothing and neither read nor write a tensor, whose address may be any that is
   * aligned and not NULL; what they would take and make on the first sight of a shape is there afterwards. Only what a pass may hold is called, inside of
   * one or not, and fails as it would later. Returns whether there is such a thing: 0 where ops compute all the same, of backends that have nothing to make.
   */
  int (*rehearse)(struct be *be, enum be_rehearsal what);

  /* Packs a parameter. like: NULL, or a weight of the same shape whose packing, second copies included, is reproduced, so that
   * its first use costs the device thread nothing that `like` has already paid. After success *w belongs to the caller
   * (weight_free, which takes NULL); after failure *w is NULL. */
  MUST_CHECK int (*weight_load)(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w,
                                struct err *e);
  void (*weight_free)(struct be *be, struct weight *w);

  /* Low-rank factors; ownership as with weights. */
  MUST_CHECK int (*lowrank_load)(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e);
  void (*lowrank_free)(struct be *be, struct lowrank *l);
  /* y (P*B, Ho, Wo, out) += up_i (down_i x) for every entry i, which reads picture i % B of x (B, H, W, in): shrink, scale and expand
   * in one op. P is 1, or as many results of one x as lie one behind the other (q, k, v). row: P*B entries (host memory), NULL where
   * a picture has no factors here and its y is not touched; entries may have different factors of different ranks. Sums in fp32
   * over all of R; y is rounded once more. y may be F32. Factors without a kernel (kh 0) and those of a 1x1 one of stride 1 take
   * any arrangement of a picture's rows. No allocation once the shapes were seen; the bits of a picture depend neither on the
   * other entries of row nor on their count. */
  MUST_CHECK int (*lowrank)(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e);

  /* y (B, Ho, Wo, out) = conv(x (B, H, W, in)) + bias [+ residual (as y)]. y may be F32. residual.p NULL: none; residual may
   * be y itself (in place). Geometry from the weight. 1x1 convolutions with stride 1 are linears: same result. */
  MUST_CHECK int (*conv2d)(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                           struct err *e);
  /* y (..., out) = x (..., in) W^T + bias [+ residual]; residual may be y. y may be F32. */
  MUST_CHECK int (*linear)(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                           struct err *e);
  /* Per picture and group of C/groups channels over H*W: y = gamma * (x' - mean) / sqrt(var + eps) + beta, then SiLU if
   * silu; x' = x + temb (B, 1, 1, C) broadcast over H, W when temb.p. In place allowed. */
  MUST_CHECK int (*groupnorm)(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                              int groups, float eps, int silu, struct err *e);
  /* Per row of the last dimension. In place allowed. */
  MUST_CHECK int (*layernorm)(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps,
                              struct err *e);
  /* o (B, 1, T, N*K) = softmax(scale * q k^T) v per head, heads side by side in the last dimension; kv[B], one entry per
   * picture of q. causal: token t sees keys 0..t. The score matrix is never held whole (be_ref may hold one row). */
  MUST_CHECK int (*attention)(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                              int causal, struct err *e);
  /* y (..., F) = x[..., :F] * gelu(x[..., F:]), exact erf; x has last dimension 2F. */
  MUST_CHECK int (*geglu)(struct be *be, struct tensor y, struct tensor x, struct err *e);
  MUST_CHECK int (*act)(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e); /* in place ok */
  MUST_CHECK int (*add)(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);    /* in place ok */
  /* y (B, H, W, Ca+Cb) = a beside b along the last dimension. */
  MUST_CHECK int (*concat)(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e);
  /* y (B, 2H or 2H-1, 2W or 2W-1, C): each pixel of x four times (nearest), the last row or column once where y is odd: what
   * interpolating to an odd size comes to. */
  MUST_CHECK int (*upsample2x)(struct be *be, struct tensor y, struct tensor x, struct err *e);
  /* y (B, 1, 1, D): sinusoids of t[B] (host memory), D even, half = D/2, f_i = exp(-ln(10000) * i / (half - freq_shift));
   * [cos | sin] when flip_sin_to_cos, else [sin | cos]. diffusers get_timestep_embedding. */
  MUST_CHECK int (*timestep_embed)(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift,
                                   struct err *e);
  /* y (B, 1, T, D) = tokens[ids[b*T + t]] + positions[t]; ids (B*T, host memory) were checked against the table. */
  MUST_CHECK int (*embed)(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens,
                          const struct weight *positions, struct err *e);
  /* y row i = scale[i] * x row src[i]: the model's input from F32 latents x; y has type act. scale, src: host, y.d[0] entries. */
  MUST_CHECK int (*gather_scale)(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale,
                                 struct err *e);
  /* One step of any sampler whose update is linear, for every latent row b of x (B, H, W, C) F32, in place; model (rows, H,
   * W, C) F32; noise F32 as x, or p NULL when all c_noise are 0; x0_old F32 as x, read and then replaced by x0. What has
   * coefficient 0 is not read, so x0_old may hold anything before the first step. coef: host, B entries. e and x0 as struct
   * step_coef says. */
  MUST_CHECK int (*sampler_step)(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model,
                                 struct tensor noise, const struct step_coef *coef, struct err *e);
  /* Where mask (B, H, W, 1) U8 is 0, x = c[b].a * a + c[b].b * b, rounded once; elsewhere x stays as it is. x, a, b (B, H, W, C) F32. What has
   * coefficient 0 is not read. c: host, B entries. */
  MUST_CHECK int (*blend)(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                          struct err *e);
  /* y (B, H, W, C) F32 = scale * the next normals of each picture's generator, which moves on: the numbers that torch.randn(C, H, W) draws, laid
   * out as ours. state (B, 1, 1, NORMAL_WORDS) I32, 8-byte aligned: a struct normal_state for each picture. The same bits on every backend. */
  MUST_CHECK int (*randn)(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e);
  /* y U8 = round(255 * clamp(x/2 + 0.5, 0, 1)), x any float type, same dims. NaN becomes 0; the pipeline refuses
   * non-finite latents before. */
  MUST_CHECK int (*to_rgb8)(struct be *be, struct tensor y, struct tensor x, struct err *e);
  /* *bad = how many elements of x (F32 or act) are not finite; syncs. */
  MUST_CHECK int (*count_nonfinite)(struct be *be, struct tensor x, int64_t *bad, struct err *e);
};

/* What a backend that compiles for its device has done so far, all of its lanes together. */
struct be_plans {
  atomic_long found, compiled; /* plans: on disk (be_config.plan_cache), and made anew */
  atomic_long chosen;          /* of the compiled ones: where an engine had to be chosen first */
};

struct be {
  const struct be_ops *ops;
  enum dtype act;     /* type of activations */
  int threads;
  char info[128];     /* for people: library versions, instruction set, threads */
  const struct be_plans *plans; /* NULL where nothing is compiled */
  void *priv;         /* the backend's own */
};

extern const struct be_ops be_ref, be_cpu, be_dry;

/* Opens ops as be. On success be must be closed with be_close. be_dry has act BF16-sized elements unless changed by the caller. */
MUST_CHECK int be_open(struct be *be, const struct be_ops *ops, const struct be_config *cfg, struct err *e);
void be_close(struct be *be); /* NULL, zeroed and half-open are fine */

/* pass_begin and pass_end of a backend that remembers nothing (backend.c). */
MUST_CHECK int be_pass_begin(struct be *be, const void *own, size_t own_bytes, struct err *e);
MUST_CHECK int be_pass_end(struct be *be, int code, int *again, struct err *e);

/* memory of a backend that has none of its own (backend.c). */
void be_memory_none(struct be *be, struct be_memory *m);

/* rehearse of a backend that has nothing to make ahead (backend.c). */
int be_rehearse_nothing(struct be *be, enum be_rehearsal what);

/* Marks of a backend that has done everything when an op returns (backend.c): none. */
MUST_CHECK int be_mark_open(struct be *be, struct mark **m, struct err *e);
void be_mark_close(struct be *be, struct mark *m);
MUST_CHECK int be_mark_pass(struct be *be, struct mark *m, struct err *e); /* set and wait */

/* The backend named by --backend: "ref", "cpu", "cuda", or "auto" (the best that this machine runs). E_ARG names the choices. */
MUST_CHECK int be_find(const char *name, const struct be_ops **ops, struct err *e);
/* be_cuda; or E_DEVICE with one sentence that says why not: no GPU, not built, which library is missing. */
MUST_CHECK int be_find_cuda(const struct be_ops **ops, struct err *e);
/* The same where a GPU is known to be there, with safelight-cuda.so of this folder; for be_find_cuda and tests. */
MUST_CHECK int be_find_cuda_in(const char *folder, const struct be_ops **ops, struct err *e);

#endif
