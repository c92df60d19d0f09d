/*
 * be_cpu.c - the CPU backend: oneDNN for convolutions and matrix products, vector code of our own for the rest.
 *
 * This file holds the table, open and close, and memory. The ops are one family per file: gemm.c, norm.c, attn.c, pointwise.c,
 * lowrank.c, embed.c; weight.c packs parameters; dnn.c is all of oneDNN; vec*.c the vector kernels. kernels/SPEED.md has the
 * measurements behind the choices.
 *
 * Numbers: activations are bf16 where the machine multiplies bf16 (AVX512-BF16 or AMX), fp32 elsewhere; sums are fp32.
 * Determinism: work is split by shape and thread count alone, so the same call gives the same bits from run to run.
 * Threads: one thread owns the backend, another one its lane; ops run OpenMP regions of at most be->threads members and return
 * when all is done.
 */
#include "kernels/backend.h"

#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels/cpu/cpu.h"
#include "kernels/convert.h"

void *cpu_memory(size_t bytes)
{
  size_t huge = (size_t)2 << 20, align = bytes >= 4 * huge ? huge : 64;
  void *p = NULL;

  if (posix_memalign(&p, align, bytes ? bytes : 64))
    return NULL;
  if (align == huge)
    madvise(p, bytes / huge * huge, MADV_HUGEPAGE); /* only advice: nothing depends on it */
  return p;
}

int cpu_scratch(struct cpu *c, size_t bytes, void **p, struct err *e)
{
  if (bytes > c->scratch_bytes) {
    void *more = cpu_memory(bytes);

    if (!more)
      return err_set(e, E_NOMEM, "no memory for %zu bytes of scratch", bytes);
    free(c->scratch);
    c->scratch = more;
    c->scratch_bytes = bytes;
  }
  *p = c->scratch;
  return 0;
}

static void cpu_close(struct be *be)
{
  struct cpu *c = be->priv;

  if (!c)
    return;
  dnn_close(c->dnn);
  free(c->scratch);
  free(c);
  be->priv = NULL;
}

/* What be->priv says, for callers of the backend. */
static void describe(struct be *be)
{
  const struct cpu *c = be->priv;
  char version[32];

  be->act = c->act;
  be->threads = c->threads;
  dnn_version(version, sizeof version);
  snprintf(be->info, sizeof be->info, "%s, %s, %s activations, %d thread%s", version, isa_name(c->isa),
           c->act == DT_BF16 ? "bf16" : "fp32", c->threads, c->threads == 1 ? "" : "s");
}

static int cpu_open(struct be *be, const struct be_config *cfg, struct err *e)
{
  static const struct vec_ops *const tables[] = {&vec_base, &vec_avx2, &vec_avx512, &vec_avx512_bf16, &vec_avx512_bf16};
  struct cpu *c = calloc(1, sizeof *c);
  int rc;

  if (!c)
    return err_set(e, E_NOMEM, "no memory for the CPU backend");
  be->priv = c;
  c->isa = isa_detect((enum cpu_isa)dnn_isa_limit());
  c->vec = tables[c->isa];
  c->act = c->isa >= ISA_BF16 && !cfg->force_f32 ? DT_BF16 : DT_F32;
  c->threads = c->device_threads = cfg->threads > 0 ? cfg->threads : omp_get_num_procs();
  rc = dnn_open(&c->dnn, NULL, e);
  if (rc) {
    cpu_close(be);
    return rc;
  }
  describe(be);
  return 0;
}

static int cpu_open_lane(struct be *lane, struct be *be, int threads, struct err *e)
{
  const struct cpu *first = cpu_of(be);
  struct cpu *c = calloc(1, sizeof *c);
  int rc;

  *lane = (struct be){0};
  if (!c)
    return err_set(e, E_NOMEM, "no memory for a lane of the CPU backend");
  c->isa = first->isa;
  c->vec = first->vec;
  c->act = first->act;
  c->threads = threads > 0 ? threads : first->threads;
  c->device_threads = first->device_threads;
  rc = dnn_open(&c->dnn, first->dnn, e);
  if (rc) {
    free(c);
    return rc;
  }
  *lane = (struct be){.ops = be->ops, .priv = c};
  describe(lane);
  return 0;
}

static void cpu_set_threads(struct be *be, int threads)
{
  cpu_of(be)->threads = be->threads = threads;
}

static int cpu_mem_alloc(struct be *be, size_t bytes, void **p, struct err *e)
{
  (void)be;
  *p = cpu_memory(bytes);
  if (!*p)
    return err_set(e, E_NOMEM, "no memory for %zu bytes", bytes);
  return 0;
}

static void cpu_mem_free(struct be *be, void *p)
{
  (void)be;
  free(p);
}

/* Numbers go through vector code, integers and bytes are rare. */
static int copy_numbers(struct be *be, void *dst, enum dtype dt, const void *src, enum dtype st, size_t n)
{
  if (dt <= DT_BF16 && st <= DT_BF16)
    cpu_of(be)->vec->convert(dst, dt, src, st, n);
  else
    convert_array(dst, dt, src, st, (int64_t)n);
  return 0;
}

static int cpu_upload(struct be *be, struct tensor dst, const void *src, enum dtype src_type, struct err *e)
{
  (void)e;
  return copy_numbers(be, dst.p, dst.type, src, src_type, (size_t)tensor_count(dst));
}

static int cpu_download(struct be *be, void *dst, enum dtype dst_type, struct tensor src, struct err *e)
{
  (void)e;
  return copy_numbers(be, dst, dst_type, src.p, src.type, (size_t)tensor_count(src));
}

static int cpu_sync(struct be *be, struct err *e)
{
  (void)be;
  (void)e;
  return 0; /* every op has finished when it returns */
}

const struct be_ops be_cpu = {
  .name = "cpu",
  .rows_are_alone = 0, /* oneDNN blocks a product by its rows */
  .open = cpu_open,
  .close = cpu_close,
  .mem_alloc = cpu_mem_alloc,
  .mem_free = cpu_mem_free,
  .upload = cpu_upload,
  .download = cpu_download,
  .sync = cpu_sync,
  .memory = be_memory_none,
  .open_lane = cpu_open_lane,
  .mark_open = be_mark_open,
  .mark_close = be_mark_close,
  .mark_set = be_mark_pass,
  .mark_wait = be_mark_pass,
  .set_threads = cpu_set_threads,
  .pass_begin = be_pass_begin,
  .pass_end = be_pass_end,
  .rehearse = be_rehearse_nothing,
  .weight_load = cpu_weight_load,
  .weight_free = cpu_weight_free,
  .lowrank_load = cpu_lowrank_load,
  .lowrank_free = cpu_lowrank_free,
  .lowrank = cpu_lowrank,
  .conv2d = cpu_conv2d,
  .linear = cpu_linear,
  .groupnorm = cpu_groupnorm,
  .layernorm = cpu_layernorm,
  .attention = cpu_attention,
  .geglu = cpu_geglu,
  .act = cpu_act,
  .add = cpu_add,
  .concat = cpu_concat,
  .upsample2x = cpu_upsample2x,
  .timestep_embed = cpu_timestep_embed,
  .embed = cpu_embed,
  .gather_scale = cpu_gather_scale,
  .sampler_step = cpu_sampler_step,
  .blend = cpu_blend,
  .randn = cpu_randn,
  .to_rgb8 = cpu_to_rgb8,
  .count_nonfinite = cpu_count_nonfinite,
};
