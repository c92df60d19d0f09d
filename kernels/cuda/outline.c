/*
 * outline.c - see outline.h. Called by vendor_compile.c and tests/cudasim/test_outline.c through struct be_ops.
 */
#include "kernels/cuda/outline.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Where the addresses begin, and how they are rounded: far from NULL, and as aligned as those of a device. */
static const uintptr_t first_address = (uintptr_t)1 << 40;
enum { ALIGNMENT = 256, MOST_KEYS = 1 << 20 };

static struct outline *outline_of(struct be *be)
{
  return be->priv;
}

/* ---- notes ---- */

MUST_CHECK static int note(struct outline *o, const struct gpu_key *k, struct err *e)
{
  int room = o->room ? 2 * o->room : 256;
  struct gpu_key *more;

  if (plans_find(&o->seen, k))
    return 0;
  if (o->keys == MOST_KEYS)
    return err_set(e, E_ARG, "more than %d plans: ask for fewer sizes or a smaller batch", MOST_KEYS);
  if (o->keys == o->room) {
    more = realloc(o->key, (size_t)room * sizeof *more);
    if (!more)
      return err_set(e, E_NOMEM, "out of memory for a list of plans");
    o->key = more;
    o->room = room;
  }
  memcpy(&o->key[o->keys++], k, sizeof *k);
  return plans_add(&o->seen, k, o, e);
}

/* Table entries own nothing. */
static void drop(void *value)
{
  (void)value;
}

static int outline_conv2d(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual, struct err *e)
{
  struct gpu_conv v;
  struct gpu_key k;

  if (cuda_is_linear(w))
    return 0;
  v = cuda_conv_of(be, y, x, w, residual);
  gpu_key_of_conv(&k, &v);
  return note(outline_of(be), &k, e);
}

static int outline_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale, int causal, struct err *e)
{
  struct gpu_attention a;
  struct gpu_key k;
  int r = 0;

  if (!cuda_attention_is_dnn(q, heads, causal))
    return 0;
  for (int64_t b = 0; b < q.d[0] && !r; b += a.B) {
    (void)cuda_attention_of(&a, &outline_of(be)->cuda, be->act, o, q, kv, b, heads, scale);
    gpu_key_of_attention(&k, &a);
    r = note(outline_of(be), &k, e);
  }
  return r;
}

/* ---- memory ---- */

static int outline_mem_alloc(struct be *be, size_t bytes, void **p, struct err *e)
{
  struct outline *o = outline_of(be);

  (void)e;
  *p = (void *)o->top;
  o->top += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  return 0;
}

static void outline_mem_free(struct be *be, void *p)
{
  (void)be, (void)p;
}

static int outline_download(struct be *be, void *dst, enum dtype dst_type, struct tensor src, struct err *e)
{
  (void)be, (void)e;
  memset(dst, 0, (size_t)tensor_count(src) * dtype_size(dst_type));
  return 0;
}

static int outline_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  int r = cuda_weight_describe(w, be, d, e);

  (void)like;
  if (r)
    return r;
  (*w)->w = *w; /* whether they are there is all that a plan knows of them */
  (*w)->bias = d->bias ? *w : NULL;
  return 0;
}

static void outline_weight_free(struct be *be, struct weight *w)
{
  (void)be;
  free(w);
}

/* ---- passes: whether keys and values lie inside of one decides as on the device ---- */

static int outline_pass_begin(struct be *be, const void *own, size_t own_bytes, struct err *e)
{
  struct pass *p = &outline_of(be)->cuda.pass;

  (void)e;
  p->own = own;
  p->own_bytes = own_bytes;
  p->mode = PASS_PLAIN;
  return 0;
}

static int outline_pass_end(struct be *be, int code, int *again, struct err *e)
{
  (void)e;
  outline_of(be)->cuda.pass.mode = PASS_NONE;
  *again = 0;
  return code;
}

/* Its owner closes it. */
static void outline_be_close(struct be *be)
{
  (void)be;
}

void outline_open(struct outline *o, int want_f16)
{
  *o = (struct outline){.ops = be_dry, .top = first_address};
  o->ops.name = "outline";
  o->ops.close = outline_be_close;
  o->ops.mem_alloc = outline_mem_alloc;
  o->ops.mem_free = outline_mem_free;
  o->ops.download = outline_download;
  o->ops.pass_begin = outline_pass_begin;
  o->ops.pass_end = outline_pass_end;
  o->ops.weight_load = outline_weight_load;
  o->ops.weight_free = outline_weight_free;
  o->ops.conv2d = outline_conv2d;
  o->ops.attention = outline_attention;
  o->be = (struct be){.ops = &o->ops, .act = want_f16 ? DT_F16 : DT_BF16, .threads = 1, .priv = o};
  snprintf(o->be.info, sizeof o->be.info, "an outline: no arithmetic");
  plans_init(&o->seen, sizeof(struct gpu_key), MOST_KEYS, drop);
}

void outline_close(struct outline *o)
{
  if (o->ops.name)
    plans_clear(&o->seen);
  free(o->key);
  *o = (struct outline){0};
}
