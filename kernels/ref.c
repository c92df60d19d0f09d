/*
 * ref.c - be_ref, the specification of every op: its table, its memory and its packed parameters. The arithmetic is in
 * ref_matmul.c, ref_lowrank.c and ref_ops.c; see ref.h for what all of it keeps to.
 *
 * Called through struct be_ops only. Threads: see ref.h.
 */
#include "kernels/ref.h"

#include <assert.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/convert.h"

/* NULL when there is no memory or the size overflows. */
static void *alloc64(size_t bytes)
{
  if (bytes > SIZE_MAX / 2)
    return NULL;
  return aligned_alloc(64, (bytes + 64) / 64 * 64); /* never 0 bytes */
}

static int ref_open(struct be *be, const struct be_config *cfg, struct err *e)
{
  be->priv = calloc(1, sizeof(struct ref_priv));
  if (!be->priv)
    return err_set(e, E_NOMEM, "out of memory for the backend");
  be->act = DT_F32;
  be->threads = cfg->threads > 0 ? cfg->threads : omp_get_max_threads();
  snprintf(be->info, sizeof be->info, "reference: plain C, fp32 with double sums, %d threads", be->threads);
  return 0;
}

/* Weights are only read once they are packed, so that a lane is a context like any other. */
static int ref_open_lane(struct be *lane, struct be *be, int threads, struct err *e)
{
  *lane = (struct be){.ops = be->ops};
  return ref_open(lane, &(struct be_config){.threads = threads > 0 ? threads : be->threads}, e);
}

static void ref_set_threads(struct be *be, int threads)
{
  be->threads = threads;
}

static void ref_close(struct be *be)
{
  struct ref_priv *p = be->priv;

  if (p)
    free(p->scratch);
  free(p);
  be->priv = NULL;
}

void *ref_scratch(struct be *be, size_t bytes, struct err *e)
{
  struct ref_priv *p = be->priv;
  void *grown;

  if (p->scratch && bytes <= p->scratch_bytes)
    return p->scratch;
  grown = alloc64(bytes);
  if (!grown) {
    err_set(e, E_NOMEM, "out of memory for %zu bytes of working memory", bytes);
    return NULL;
  }
  free(p->scratch);
  p->scratch = grown;
  p->scratch_bytes = bytes;
  return grown;
}

int ref_same_dims(struct tensor a, struct tensor b)
{
  return memcmp(a.d, b.d, sizeof a.d) == 0;
}

static int ref_mem_alloc(struct be *be, size_t bytes, void **p, struct err *e)
{
  (void)be;
  *p = alloc64(bytes);
  return *p ? 0 : err_set(e, E_NOMEM, "out of memory for %zu bytes", bytes);
}

static void ref_mem_free(struct be *be, void *p)
{
  (void)be;
  free(p);
}

static int ref_upload(struct be *be, struct tensor dst, const void *src, enum dtype src_type, struct err *e)
{
  (void)be, (void)e;
  convert_array(dst.p, dst.type, src, src_type, tensor_count(dst));
  return 0;
}

static int ref_download(struct be *be, void *dst, enum dtype dst_type, struct tensor src, struct err *e)
{
  (void)be, (void)e;
  convert_array(dst, dst_type, src.p, src.type, tensor_count(src));
  return 0;
}

static int ref_sync(struct be *be, struct err *e)
{
  (void)be, (void)e;
  return 0;
}

static void ref_weight_free(struct be *be, struct weight *w)
{
  (void)be;
  if (!w)
    return;
  free(w->w);
  free(w->bias);
  free(w);
}

/* From torch's (out, in, kh, kw) to (out/LANES, kh, kw, in, LANES): a column of LANES outputs lies side by side, and a patch
 * of the picture, which is (kh, kw, in), runs along it. row: (in, kh, kw) floats of working memory. */
static void pack_matrix(struct weight *p, const struct weight_desc *d, float *row)
{
  int64_t taps = (int64_t)p->kh * p->kw, k = taps * p->in;
  size_t row_bytes = (size_t)k * dtype_size(d->w_type);

  for (int64_t o = 0; o < p->out; o++) {
    float *col = p->w + o / REF_LANES * k * REF_LANES + o % REF_LANES;

    convert_array(row, DT_F32, (const char *)d->w + (size_t)o * row_bytes, d->w_type, k);
    for (int64_t t = 0; t < taps; t++)
      for (int64_t i = 0; i < p->in; i++)
        col[(t * p->in + i) * REF_LANES] = row[i * taps + t];
  }
}

static int ref_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  int is_conv = d->kind == WEIGHT_CONV, is_matrix = is_conv || d->kind == WEIGHT_LINEAR, r = 0;
  int64_t lanes = (d->out + REF_LANES - 1) / REF_LANES * REF_LANES, k, count;
  struct weight *p = calloc(1, sizeof *p);
  float *row = NULL;

  (void)like; /* there is one packing */
  assert(d->out > 0 && (d->in > 0 || d->kind == WEIGHT_NORM));
  assert(d->kind != WEIGHT_NORM || d->bias);
  assert(!is_conv || (d->kh > 0 && d->kw > 0 && d->stride > 0 && d->pad_lo >= 0 && d->pad_hi >= 0));
  *w = NULL;
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
  k = (int64_t)p->kh * p->kw * p->in;
  count = is_matrix ? lanes * k : d->kind == WEIGHT_TABLE ? d->in * d->out : d->out;
  p->w = alloc64((size_t)count * sizeof *p->w);
  p->bias = alloc64((size_t)lanes * sizeof *p->bias);
  row = is_matrix ? alloc64((size_t)k * sizeof *row) : NULL;
  if (!p->w || !p->bias || (is_matrix && !row)) {
    r = err_set(e, E_NOMEM, "out of memory for a parameter of %lld elements", (long long)count);
    goto out;
  }
  memset(p->bias, 0, (size_t)lanes * sizeof *p->bias);
  if (d->bias)
    convert_array(p->bias, DT_F32, d->bias, d->bias_type, d->out);
  if (is_matrix) {
    memset(p->w, 0, (size_t)count * sizeof *p->w);
    pack_matrix(p, d, row);
  } else {
    convert_array(p->w, DT_F32, d->w, d->w_type, count);
  }
  *w = p;
  p = NULL;
out:
  free(row);
  ref_weight_free(be, p);
  return r;
}

const struct be_ops be_ref = {
    .name = "ref",
    .rows_are_alone = 1,
    .open = ref_open,
    .close = ref_close,
    .mem_alloc = ref_mem_alloc,
    .mem_free = ref_mem_free,
    .upload = ref_upload,
    .download = ref_download,
    .sync = ref_sync,
    .memory = be_memory_none,
    .open_lane = ref_open_lane,
    .mark_open = be_mark_open,
    .mark_close = be_mark_close,
    .mark_set = be_mark_pass,
    .mark_wait = be_mark_pass,
    .set_threads = ref_set_threads,
    .pass_begin = be_pass_begin,
    .pass_end = be_pass_end,
    .rehearse = be_rehearse_nothing,
    .weight_load = ref_weight_load,
    .weight_free = ref_weight_free,
    .lowrank_load = ref_lowrank_load,
    .lowrank_free = ref_lowrank_free,
    .lowrank = ref_lowrank,
    .conv2d = ref_conv2d,
    .linear = ref_linear,
    .groupnorm = ref_groupnorm,
    .layernorm = ref_layernorm,
    .attention = ref_attention,
    .geglu = ref_geglu,
    .act = ref_act,
    .add = ref_add,
    .concat = ref_concat,
    .upsample2x = ref_upsample2x,
    .timestep_embed = ref_timestep_embed,
    .embed = ref_embed,
    .gather_scale = ref_gather_scale,
    .sampler_step = ref_sampler_step,
    .blend = ref_blend,
    .randn = ref_randn,
    .to_rgb8 = ref_to_rgb8,
    .count_nonfinite = ref_count_nonfinite,
};
