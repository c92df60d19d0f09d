/*
 * dnn.c - oneDNN behind dnn.h, for its C API of version 2 (Debian 12: 2.6) and of version 3.
 *
 * The versions differ in three ways that matter here: a memory descriptor is a struct in 2 and a handle in 3; a primitive descriptor
 * is made from an operation descriptor in 2 and by one call in 3; and the layout of a descriptor is read from the struct
 * in 2 and queried in 3. Each difference is one short function in the first half of this file; the second half is common.
 *
 * Invariants: primitives use one scratchpad that belongs to struct dnn and grows on first sight of a shape; the number of
 * OpenMP threads is set before a primitive is made and before it runs, because oneDNN reads it at both times; tables are
 * bounded: when MAX_PRIMS shapes have been seen, all are dropped and seen anew. A layout never changes and is never freed before
 * the struct dnn that was opened first, so that pointers to it may be compared and followed without a lock. Threads: see dnn.h.
 */
#include "kernels/cpu/dnn.h"

#include <dnnl.h>
#include <dnnl_version.h>
#include <omp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/isa.h"

enum { MAX_PRIMS = 4096, MAX_LAYOUTS = 4096, MAX_ARGS = 6 };

#if DNNL_VERSION_MAJOR >= 3
#define MD const_dnnl_memory_desc_t /* a descriptor that is only read */
#else
#define MD const dnnl_memory_desc_t *
#endif

/* A descriptor that is owned. */
struct mdesc {
  dnnl_memory_desc_t d;
};

struct dnn_layout {
  struct mdesc md;
  int dims;                 /* 4: (out, in, ky, kx); 2: (in, out) as a matrix product has them */
  int64_t extent[4], stride[4];
  int nblk;                 /* inner blocks, outermost first */
  int64_t blk[12];
  int blk_dim[12];
  size_t bytes;
};

struct dnn_prim {
  struct dnn_shape shape;
  const struct dnn_layout *have, *need;
  dnnl_primitive_t prim;
  dnnl_memory_t x, w, bias, y, residual, scratch;
  dnnl_exec_arg_t args[MAX_ARGS];
  int nargs;
  char name[48];
  struct dnn_prim *next;    /* of the same bucket */
};

/* What the contexts of one backend have in common. Layouts are only ever added. */
struct dnn_shared {
  dnnl_engine_t engine;
  pthread_mutex_t lock;     /* of the table; an entry itself never changes */
  struct dnn_layout *layout[MAX_LAYOUTS];
  int nlayouts;
};

struct dnn {
  struct dnn_shared *shared;
  int owns_shared;
  dnnl_engine_t engine;     /* shared->engine */
  dnnl_stream_t stream;
  struct dnn_prim *bucket[1024];
  int nprims;
  void *scratch;
  size_t scratch_bytes;
};

/* ---- what differs between the versions ---- */

static dnnl_data_type_t data_type(int t)
{
  return t == DT_BF16 ? dnnl_bf16 : dnnl_f32;
}

#if DNNL_VERSION_MAJOR >= 3

static MD md_ref(const struct mdesc *m)
{
  return m->d;
}

static dnnl_status_t md_tag(struct mdesc *m, int ndims, const int64_t *dims, int type, dnnl_format_tag_t tag)
{
  return dnnl_memory_desc_create_with_tag(&m->d, ndims, dims, data_type(type), tag);
}

static dnnl_status_t md_copy(struct mdesc *m, MD from)
{
  return dnnl_memory_desc_clone(&m->d, from);
}

static void md_free(struct mdesc *m)
{
  if (m->d)
    dnnl_memory_desc_destroy(m->d);
  m->d = NULL;
}

static int md_layout(struct dnn_layout *l, MD m)
{
  dnnl_format_kind_t kind = dnnl_format_kind_undef;
  dnnl_dims_t *dims, *strides, *blks, *idxs;
  dnnl_dim_t n = 0;

  if (dnnl_memory_desc_query(m, dnnl_query_format_kind, &kind) || kind != dnnl_blocked ||
      dnnl_memory_desc_query(m, dnnl_query_ndims_s32, &l->dims) || l->dims > 4 ||
      dnnl_memory_desc_query(m, dnnl_query_dims, &dims) || dnnl_memory_desc_query(m, dnnl_query_strides, &strides))
    return -1;
  {
    int nblk = 0;

    if (dnnl_memory_desc_query(m, dnnl_query_inner_nblks_s32, &nblk) || nblk > 12)
      return -1;
    n = nblk;
  }
  if (n && (dnnl_memory_desc_query(m, dnnl_query_inner_blks, &blks) || dnnl_memory_desc_query(m, dnnl_query_inner_idxs, &idxs)))
    return -1;
  l->nblk = (int)n;
  for (int i = 0; i < l->dims; i++) {
    l->extent[i] = (*dims)[i];
    l->stride[i] = (*strides)[i];
  }
  for (int i = 0; i < l->nblk; i++) {
    l->blk[i] = (*blks)[i];
    l->blk_dim[i] = (int)(*idxs)[i];
  }
  return 0;
}

static dnnl_status_t append_sum(dnnl_post_ops_t po)
{
  return dnnl_post_ops_append_sum(po, 1.0f, 0, dnnl_data_type_undef);
}

static dnnl_status_t make_conv(dnnl_primitive_desc_t *pd, dnnl_engine_t eng, dnnl_primitive_attr_t attr, MD x, MD w, MD b, MD y,
                               const struct dnn_shape *s)
{
  dnnl_dims_t st = {s->stride, s->stride}, dil = {0, 0}, lo = {s->pad_lo, s->pad_lo}, hi = {s->pad_hi, s->pad_hi};

  return dnnl_convolution_forward_primitive_desc_create(pd, eng, dnnl_forward_inference, dnnl_convolution_direct, x, w, b, y,
                                                        st, dil, lo, hi, attr);
}

static dnnl_status_t make_matmul(dnnl_primitive_desc_t *pd, dnnl_engine_t eng, dnnl_primitive_attr_t attr, MD x, MD w, MD b,
                                 MD y)
{
  return dnnl_matmul_primitive_desc_create(pd, eng, x, w, b, y, attr);
}

#else

static MD md_ref(const struct mdesc *m)
{
  return &m->d;
}

static dnnl_status_t md_tag(struct mdesc *m, int ndims, const int64_t *dims, int type, dnnl_format_tag_t tag)
{
  return dnnl_memory_desc_init_by_tag(&m->d, ndims, dims, data_type(type), tag);
}

static dnnl_status_t md_copy(struct mdesc *m, MD from)
{
  m->d = *from;
  return dnnl_success;
}

static void md_free(struct mdesc *m)
{
  memset(m, 0, sizeof *m);
}

static int md_layout(struct dnn_layout *l, MD m)
{
  const dnnl_blocking_desc_t *b = &m->format_desc.blocking;

  if (m->format_kind != dnnl_blocked || m->ndims > 4)
    return -1;
  l->dims = m->ndims;
  l->nblk = b->inner_nblks;
  for (int i = 0; i < m->ndims; i++) {
    l->extent[i] = m->dims[i];
    l->stride[i] = b->strides[i];
  }
  for (int i = 0; i < b->inner_nblks; i++) {
    l->blk[i] = b->inner_blks[i];
    l->blk_dim[i] = (int)b->inner_idxs[i];
  }
  return 0;
}

static dnnl_status_t append_sum(dnnl_post_ops_t po)
{
  return dnnl_post_ops_append_sum(po, 1.0f);
}

static dnnl_status_t make_conv(dnnl_primitive_desc_t *pd, dnnl_engine_t eng, dnnl_primitive_attr_t attr, MD x, MD w, MD b, MD y,
                               const struct dnn_shape *s)
{
  dnnl_dims_t st = {s->stride, s->stride}, lo = {s->pad_lo, s->pad_lo}, hi = {s->pad_hi, s->pad_hi};
  dnnl_convolution_desc_t op;
  dnnl_status_t r =
    dnnl_convolution_forward_desc_init(&op, dnnl_forward_inference, dnnl_convolution_direct, x, w, b, y, st, lo, hi);

  return r ? r : dnnl_primitive_desc_create(pd, &op, attr, eng, NULL);
}

static dnnl_status_t make_matmul(dnnl_primitive_desc_t *pd, dnnl_engine_t eng, dnnl_primitive_attr_t attr, MD x, MD w, MD b,
                                 MD y)
{
  dnnl_matmul_desc_t op;
  dnnl_status_t r = dnnl_matmul_desc_init(&op, x, w, b, y);

  return r ? r : dnnl_primitive_desc_create(pd, &op, attr, eng, NULL);
}

#endif

/* ---- common ---- */

static int fail(struct err *e, dnnl_status_t r, const char *what)
{
  if (r == dnnl_out_of_memory)
    return err_set(e, E_NOMEM, "oneDNN ran out of memory: %s", what);
  return err_set(e, E_INTERNAL, "oneDNN status %d: %s", (int)r, what);
}

void dnn_version(char *out, size_t size)
{
  const dnnl_version_t *v = dnnl_version();

  snprintf(out, size, "oneDNN %d.%d.%d", v->major, v->minor, v->patch);
}

int dnn_isa_limit(void)
{
  unsigned have = (unsigned)dnnl_get_effective_cpu_isa();
  static const struct {
    unsigned need;
    int isa;
  } table[] = {{dnnl_cpu_isa_avx512_core_amx, ISA_AMX},
               {dnnl_cpu_isa_avx512_core_bf16, ISA_BF16},
               {dnnl_cpu_isa_avx512_core, ISA_AVX512},
               {dnnl_cpu_isa_avx2, ISA_AVX2}};

  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if ((have & table[i].need) == table[i].need)
      return table[i].isa;
  return ISA_BASE;
}

static void shared_close(struct dnn_shared *s)
{
  if (!s)
    return;
  for (int i = 0; i < s->nlayouts; i++) {
    md_free(&s->layout[i]->md);
    free(s->layout[i]);
  }
  if (s->engine)
    dnnl_engine_destroy(s->engine);
  pthread_mutex_destroy(&s->lock);
  free(s);
}

static int shared_open(struct dnn_shared **out, struct err *e)
{
  struct dnn_shared *s = calloc(1, sizeof *s);
  dnnl_status_t r;

  *out = NULL;
  if (!s)
    return err_set(e, E_NOMEM, "no memory for the oneDNN tables");
  pthread_mutex_init(&s->lock, NULL); /* cannot fail without attributes */
  r = dnnl_engine_create(&s->engine, dnnl_cpu, 0);
  if (r) {
    shared_close(s);
    return fail(e, r, "creating the CPU engine");
  }
  *out = s;
  return 0;
}

int dnn_open(struct dnn **out, struct dnn *beside, struct err *e)
{
  struct dnn *d = calloc(1, sizeof *d);
  dnnl_status_t r;
  int rc = 0;

  *out = NULL;
  if (!d)
    return err_set(e, E_NOMEM, "no memory for the oneDNN tables");
  d->owns_shared = !beside;
  if (beside)
    d->shared = beside->shared;
  else
    rc = shared_open(&d->shared, e);
  if (!rc) {
    d->engine = d->shared->engine;
    r = dnnl_stream_create(&d->stream, d->engine, dnnl_stream_default_flags);
    rc = r ? fail(e, r, "creating a stream") : 0;
  }
  if (rc) {
    dnn_close(d);
    return rc;
  }
  *out = d;
  return 0;
}

static void prim_free(struct dnn_prim *p)
{
  dnnl_memory_t mem[] = {p->x, p->w, p->bias, p->y, p->residual, p->scratch};

  for (size_t i = 0; i < sizeof mem / sizeof *mem; i++)
    if (mem[i])
      dnnl_memory_destroy(mem[i]);
  if (p->prim)
    dnnl_primitive_destroy(p->prim);
  free(p);
}

static void drop_prims(struct dnn *d)
{
  for (size_t i = 0; i < sizeof d->bucket / sizeof *d->bucket; i++)
    while (d->bucket[i]) {
      struct dnn_prim *p = d->bucket[i];

      d->bucket[i] = p->next;
      prim_free(p);
    }
  d->nprims = 0;
}

void dnn_close(struct dnn *d)
{
  if (!d)
    return;
  drop_prims(d);
  if (d->stream)
    dnnl_stream_destroy(d->stream);
  if (d->owns_shared)
    shared_close(d->shared);
  free(d->scratch);
  free(d);
}

static int layout_new(MD m, struct dnn_layout **out, struct err *e)
{
  struct dnn_layout *l = calloc(1, sizeof *l);
  dnnl_status_t r;

  if (!l)
    return err_set(e, E_NOMEM, "no memory for a weight layout");
  l->bytes = dnnl_memory_desc_get_size(m);
  r = md_copy(&l->md, m);
  if (r || md_layout(l, m)) {
    md_free(&l->md);
    free(l);
    return r ? fail(e, r, "copying a weight layout") : err_set(e, E_INTERNAL, "oneDNN chose a weight layout that is not blocked");
  }
  *out = l;
  return 0;
}

/* The table entry for a descriptor, made when it is new. */
static int layout_intern(struct dnn *d, MD m, const struct dnn_layout **out, struct err *e)
{
  struct dnn_shared *s = d->shared;
  struct dnn_layout *l = NULL;
  int rc = 0;

  pthread_mutex_lock(&s->lock);
  for (int i = 0; i < s->nlayouts && !l; i++)
    if (dnnl_memory_desc_equal(md_ref(&s->layout[i]->md), m))
      l = s->layout[i];
  if (!l && s->nlayouts == MAX_LAYOUTS) {
    rc = err_set(e, E_NOMEM, "more than %d weight layouts", MAX_LAYOUTS);
  } else if (!l) {
    rc = layout_new(m, &l, e);
    if (!rc)
      s->layout[s->nlayouts++] = l;
  }
  pthread_mutex_unlock(&s->lock);
  *out = l;
  return rc;
}

size_t dnn_layout_bytes(const struct dnn_layout *l)
{
  return l->bytes;
}

/* Offsets of indices 0..extent-1 of one dim: the digits of the index in the inner blocks, the rest times the stride. */
static void dim_offsets(const struct dnn_layout *l, int dim, int32_t *t)
{
  for (int64_t x = 0; x < l->extent[dim]; x++) {
    int64_t rest = x, off = 0, unit = 1;

    for (int i = l->nblk - 1; i >= 0; i--) {
      if (l->blk_dim[i] == dim) {
        off += rest % l->blk[i] * unit;
        rest /= l->blk[i];
      }
      unit *= l->blk[i];
    }
    t[x] = (int32_t)(off + rest * l->stride[dim]);
  }
}

void dnn_layout_offsets(const struct dnn_layout *l, const struct dnn_offsets *t)
{
  if (l->dims == 2) { /* a matrix product has its weights as (in, out) */
    dim_offsets(l, 0, t->in);
    dim_offsets(l, 1, t->out);
    t->ky[0] = t->kx[0] = 0;
    return;
  }
  dim_offsets(l, 0, t->out);
  dim_offsets(l, 1, t->in);
  dim_offsets(l, 2, t->ky);
  dim_offsets(l, 3, t->kx);
}

/* ---- making primitives ---- */

/* oneDNN uses as many threads as OpenMP offers. Returns what to put back, for others use OpenMP too. */
static int use_threads(int n)
{
  int before = omp_get_max_threads();

  omp_set_num_threads(n);
  return before;
}

/* The primitive descriptor of a shape, with weights in layout w or (NULL) in the layout of oneDNN's choice. */
static dnnl_status_t make_desc(struct dnn *d, const struct dnn_shape *s, const struct dnn_layout *w, dnnl_primitive_desc_t *pd)
{
  int64_t Ho = (s->H + s->pad_lo + s->pad_hi - s->kh) / s->stride + 1, Wo = (s->W + s->pad_lo + s->pad_hi - s->kw) / s->stride + 1;
  int conv = s->kind == DNN_CONV;
  dnnl_dims_t xd = {s->B, s->in, s->H, s->W}, wd = {s->out, s->in, s->kh, s->kw}, yd = {s->B, s->out, Ho, Wo}, bd = {s->out};
  dnnl_dims_t xm = {s->B, s->in}, wm = {s->in, s->out}, ym = {s->B, s->out}, bm = {1, s->out};
  struct mdesc x = {0}, wt = {0}, b = {0}, y = {0};
  dnnl_primitive_attr_t attr = NULL;
  dnnl_post_ops_t po = NULL;
  dnnl_status_t r;

  r = md_tag(&x, conv ? 4 : 2, conv ? xd : xm, s->x_type, conv ? dnnl_nhwc : dnnl_ab);
  r = r ? r : md_tag(&y, conv ? 4 : 2, conv ? yd : ym, s->y_type, conv ? dnnl_nhwc : dnnl_ab);
  r = r ? r : md_tag(&wt, conv ? 4 : 2, conv ? wd : wm, s->x_type, dnnl_format_tag_any);
  r = r ? r : md_tag(&b, conv ? 1 : 2, conv ? bd : bm, DT_F32, conv ? dnnl_a : dnnl_ab);
  r = r ? r : dnnl_primitive_attr_create(&attr);
  r = r ? r : dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user);
  if (!r && s->residual) {
    r = dnnl_post_ops_create(&po);
    if (!r)
      r = s->residual == DNN_IN_PLACE ? append_sum(po) : dnnl_post_ops_append_binary(po, dnnl_binary_add, md_ref(&y));
    r = r ? r : dnnl_primitive_attr_set_post_ops(attr, po);
  }
  if (!r) {
    MD wr = md_ref(w ? &w->md : &wt);
    MD br = s->bias ? md_ref(&b) : NULL;

    r = conv ? make_conv(pd, d->engine, attr, md_ref(&x), wr, br, md_ref(&y), s)
             : make_matmul(pd, d->engine, attr, md_ref(&x), wr, br, md_ref(&y));
  }
  if (po)
    dnnl_post_ops_destroy(po);
  if (attr)
    dnnl_primitive_attr_destroy(attr);
  md_free(&x);
  md_free(&wt);
  md_free(&b);
  md_free(&y);
  return r;
}

int dnn_layout_for(struct dnn *d, const struct dnn_shape *s, const struct dnn_layout **l, struct err *e)
{
  dnnl_primitive_desc_t pd = NULL;
  dnnl_status_t r;
  int before = use_threads(s->threads), rc;

  r = make_desc(d, s, NULL, &pd);
  omp_set_num_threads(before);
  if (r)
    return fail(e, r, "choosing a weight layout");
  rc = layout_intern(d, dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0), l, e);
  dnnl_primitive_desc_destroy(pd);
  return rc;
}

/* 2: blocked matrix instructions; 1: generated code of another kind; 0: gemm or reference loops. */
static int quality(dnnl_primitive_desc_t pd)
{
  const char *name = "";

  if (dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, &name))
    return 0;
  return strstr(name, "brg") ? 2 : strstr(name, "jit") && !strstr(name, "gemm") ? 1 : 0;
}

/* The descriptor with the layout at hand, unless oneDNN's favourite layout leads to better code. */
static dnnl_status_t best_desc(struct dnn *d, const struct dnn_shape *s, const struct dnn_layout *have, dnnl_primitive_desc_t *pd)
{
  dnnl_primitive_desc_t any = NULL;
  dnnl_status_t r = make_desc(d, s, have, pd);

  if (!r && quality(*pd) == 2)
    return r;
  if (make_desc(d, s, NULL, &any))
    return r;
  if (!r && quality(*pd) >= quality(any)) {
    dnnl_primitive_desc_destroy(any);
    return r;
  }
  if (!r)
    dnnl_primitive_desc_destroy(*pd);
  *pd = any;
  return dnnl_success;
}

static int grow_scratch(struct dnn *d, size_t bytes, struct err *e)
{
  void *p;

  if (bytes <= d->scratch_bytes)
    return 0;
  p = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!p)
    return err_set(e, E_NOMEM, "no memory for a oneDNN scratchpad of %zu bytes", bytes);
  free(d->scratch);
  d->scratch = p;
  d->scratch_bytes = bytes;
  return 0;
}

static dnnl_status_t add_arg(struct dnn *d, struct dnn_prim *p, dnnl_primitive_desc_t pd, int arg, dnnl_query_t what, int index,
                             dnnl_memory_t *mem)
{
  dnnl_status_t r = dnnl_memory_create(mem, dnnl_primitive_desc_query_md(pd, what, index), d->engine, DNNL_MEMORY_NONE);

  if (!r)
    p->args[p->nargs++] = (dnnl_exec_arg_t){arg, *mem};
  return r;
}

static dnnl_status_t fill_prim(struct dnn *d, struct dnn_prim *p, dnnl_primitive_desc_t pd)
{
  const struct dnn_shape *s = &p->shape;
  const char *name = "?";
  dnnl_status_t r = dnnl_primitive_create(&p->prim, pd);

  r = r ? r : add_arg(d, p, pd, DNNL_ARG_SRC, dnnl_query_src_md, 0, &p->x);
  r = r ? r : add_arg(d, p, pd, DNNL_ARG_WEIGHTS, dnnl_query_weights_md, 0, &p->w);
  r = r ? r : add_arg(d, p, pd, DNNL_ARG_DST, dnnl_query_dst_md, 0, &p->y);
  r = r ? r : add_arg(d, p, pd, DNNL_ARG_SCRATCHPAD, dnnl_query_scratchpad_md, 0, &p->scratch);
  if (s->bias)
    r = r ? r : add_arg(d, p, pd, DNNL_ARG_BIAS, dnnl_query_weights_md, 1, &p->bias);
  if (s->residual == DNN_SEPARATE)
    r = r ? r : add_arg(d, p, pd, DNNL_ARG_ATTR_MULTIPLE_POST_OP(0) | DNNL_ARG_SRC_1, dnnl_query_dst_md, 0, &p->residual);
  dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, &name);
  snprintf(p->name, sizeof p->name, "%s", name);
  return r;
}

static unsigned hash(const struct dnn_shape *s, const struct dnn_layout *l)
{
  uint64_t h = (uintptr_t)l, word[sizeof *s / 8];

  _Static_assert(sizeof *s % 8 == 0, "hashed by words of eight");
  memcpy(word, s, sizeof *s);
  for (size_t i = 0; i < sizeof word / sizeof *word; i++)
    h = (h ^ word[i]) * 0x9e3779b97f4a7c15u;
  return (unsigned)(h >> 40) & 1023;
}

int dnn_find(struct dnn *d, const struct dnn_shape *s, const struct dnn_layout *have, struct dnn_prim **out,
             const struct dnn_layout **need, struct err *e)
{
  unsigned h = hash(s, have);
  dnnl_primitive_desc_t pd = NULL;
  struct dnn_prim *p;
  dnnl_status_t r;
  int before, rc;

  for (p = d->bucket[h]; p; p = p->next)
    if (p->have == have && memcmp(&p->shape, s, sizeof *s) == 0) {
      *out = p;
      *need = p->need;
      return 0;
    }
  if (d->nprims == MAX_PRIMS)
    drop_prims(d);
  p = calloc(1, sizeof *p);
  if (!p)
    return err_set(e, E_NOMEM, "no memory for a oneDNN primitive");
  p->shape = *s;
  p->have = have;
  before = use_threads(s->threads);
  r = best_desc(d, s, have, &pd);
  if (r) {
    omp_set_num_threads(before);
    prim_free(p);
    return fail(e, r, "no implementation for this shape");
  }
  rc = layout_intern(d, dnnl_primitive_desc_query_md(pd, dnnl_query_weights_md, 0), &p->need, e);
  if (!rc) {
    r = fill_prim(d, p, pd);
    rc = r ? fail(e, r, "creating a primitive") : 0;
  }
  if (!rc)
    rc = grow_scratch(d, dnnl_memory_desc_get_size(dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0)), e);
  omp_set_num_threads(before);
  dnnl_primitive_desc_destroy(pd);
  if (rc) {
    prim_free(p);
    return rc;
  }
  p->next = d->bucket[h];
  d->bucket[h] = p;
  d->nprims++;
  *out = p;
  *need = p->need;
  return 0;
}

int dnn_repack(struct dnn *d, void *dst, const struct dnn_layout *to, const void *src, const struct dnn_layout *from,
               int threads, struct err *e)
{
  int before = use_threads(threads);
  dnnl_primitive_desc_t pd = NULL;
  dnnl_primitive_t prim = NULL;
  dnnl_memory_t a = NULL, b = NULL;
  dnnl_status_t r = dnnl_memory_create(&a, md_ref(&from->md), d->engine, (void *)(uintptr_t)src);

  r = r ? r : dnnl_memory_create(&b, md_ref(&to->md), d->engine, dst);
  r = r ? r : dnnl_reorder_primitive_desc_create(&pd, md_ref(&from->md), d->engine, md_ref(&to->md), d->engine, NULL);
  r = r ? r : dnnl_primitive_create(&prim, pd);
  if (!r) {
    dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, a}, {DNNL_ARG_TO, b}};

    r = dnnl_primitive_execute(prim, d->stream, 2, args);
    r = r ? r : dnnl_stream_wait(d->stream);
  }
  omp_set_num_threads(before);
  if (prim)
    dnnl_primitive_destroy(prim);
  if (pd)
    dnnl_primitive_desc_destroy(pd);
  if (a)
    dnnl_memory_destroy(a);
  if (b)
    dnnl_memory_destroy(b);
  return r ? fail(e, r, "repacking a weight") : 0;
}

int dnn_run(struct dnn *d, struct dnn_prim *p, void *y, const void *x, const void *w, const float *bias, const void *residual,
            struct err *e)
{
  dnnl_status_t r;

  /* oneDNN's handles are not const; it only reads these. */
  r = dnnl_memory_set_data_handle(p->x, (void *)(uintptr_t)x);
  r = r ? r : dnnl_memory_set_data_handle(p->w, (void *)(uintptr_t)w);
  r = r ? r : dnnl_memory_set_data_handle(p->y, y);
  r = r ? r : dnnl_memory_set_data_handle(p->scratch, d->scratch);
  if (p->bias)
    r = r ? r : dnnl_memory_set_data_handle(p->bias, (void *)(uintptr_t)bias);
  if (p->residual)
    r = r ? r : dnnl_memory_set_data_handle(p->residual, (void *)(uintptr_t)residual);
  if (!r) {
    int before = use_threads(p->shape.threads);

    r = dnnl_primitive_execute(p->prim, d->stream, p->nargs, p->args);
    omp_set_num_threads(before);
  }
  return r ? fail(e, r, "running a primitive") : 0;
}

const char *dnn_prim_name(const struct dnn_prim *p)
{
  return p->name;
}
