/*
 * dry.c - be_dry: every op succeeds and does nothing. A forward pass run on it with NULL tensors asks for the same activation
 * memory in the same order as a real one, which is how the arena's size is measured before any memory is taken.
 *
 * Called by models/pipeline.c through struct be_ops. Invariants: no op reads or writes a tensor; mem_alloc gives NULL; a
 * caller may set be->act to the type of the backend it plans for. Threads: none of its own; no state.
 */
#include "kernels/backend.h"

#include <stdio.h>
#include <stdlib.h>

struct weight {
  enum weight_kind kind; /* nothing is kept; a distinct pointer is all that callers need */
};

struct lowrank {
  int64_t rank; /* as above */
};

static int dry_open(struct be *be, const struct be_config *cfg, struct err *e)
{
  (void)cfg, (void)e;
  be->act = DT_BF16;
  be->threads = 1;
  snprintf(be->info, sizeof be->info, "dry run: no arithmetic");
  return 0;
}

static void dry_close(struct be *be)
{
  (void)be;
}

static int dry_mem_alloc(struct be *be, size_t bytes, void **p, struct err *e)
{
  (void)be, (void)bytes, (void)e;
  *p = NULL;
  return 0;
}

static void dry_mem_free(struct be *be, void *p)
{
  (void)be, (void)p;
}

static int dry_upload(struct be *be, struct tensor dst, const void *src, enum dtype src_type, struct err *e)
{
  (void)be, (void)dst, (void)src, (void)src_type, (void)e;
  return 0;
}

static int dry_download(struct be *be, void *dst, enum dtype dst_type, struct tensor src, struct err *e)
{
  (void)be, (void)dst, (void)dst_type, (void)src, (void)e;
  return 0;
}

static int dry_sync(struct be *be, struct err *e)
{
  (void)be, (void)e;
  return 0;
}

static int dry_weight_load(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  (void)be, (void)like;
  *w = malloc(sizeof **w);
  if (!*w)
    return err_set(e, E_NOMEM, "out of memory for a parameter");
  (*w)->kind = d->kind;
  return 0;
}

static void dry_weight_free(struct be *be, struct weight *w)
{
  (void)be;
  free(w);
}

static int dry_open_lane(struct be *lane, struct be *be, int threads, struct err *e)
{
  (void)threads, (void)e;
  *lane = *be;
  return 0;
}

static void dry_set_threads(struct be *be, int threads)
{
  (void)be, (void)threads;
}

static int dry_lowrank_load(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e)
{
  (void)be;
  *l = malloc(sizeof **l);
  if (!*l)
    return err_set(e, E_NOMEM, "out of memory for low-rank factors");
  (*l)->rank = d->rank;
  return 0;
}

static void dry_lowrank_free(struct be *be, struct lowrank *l)
{
  (void)be;
  free(l);
}

static int dry_lowrank(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  (void)be, (void)y, (void)x, (void)row, (void)e;
  return 0;
}

static int dry_matmul(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                      struct err *e)
{
  (void)be, (void)y, (void)x, (void)w, (void)residual, (void)e;
  return 0;
}

static int dry_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                         int groups, float eps, int silu, struct err *e)
{
  (void)be, (void)y, (void)x, (void)temb, (void)w, (void)groups, (void)eps, (void)silu, (void)e;
  return 0;
}

static int dry_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e)
{
  (void)be, (void)y, (void)x, (void)w, (void)eps, (void)e;
  return 0;
}

static int dry_attention(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                         int causal, struct err *e)
{
  (void)be, (void)o, (void)q, (void)kv, (void)heads, (void)scale, (void)causal, (void)e;
  return 0;
}

static int dry_one(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  (void)be, (void)y, (void)x, (void)e;
  return 0;
}

static int dry_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  (void)be, (void)y, (void)x, (void)kind, (void)e;
  return 0;
}

static int dry_two(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  (void)be, (void)y, (void)a, (void)b, (void)e;
  return 0;
}

static int dry_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift,
                              struct err *e)
{
  (void)be, (void)y, (void)t, (void)flip_sin_to_cos, (void)freq_shift, (void)e;
  return 0;
}

static int dry_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens,
                     const struct weight *positions, struct err *e)
{
  (void)be, (void)y, (void)ids, (void)tokens, (void)positions, (void)e;
  return 0;
}

static int dry_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e)
{
  (void)be, (void)y, (void)x, (void)src, (void)scale, (void)e;
  return 0;
}

static int dry_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                            const struct step_coef *coef, struct err *e)
{
  (void)be, (void)x, (void)x0_old, (void)model, (void)noise, (void)coef, (void)e;
  return 0;
}

static int dry_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c, struct err *e)
{
  (void)be, (void)x, (void)mask, (void)a, (void)b, (void)c, (void)e;
  return 0;
}

static int dry_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  (void)be, (void)y, (void)state, (void)scale, (void)e;
  return 0;
}

static int dry_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e)
{
  (void)be, (void)x, (void)e;
  *bad = 0;
  return 0;
}

const struct be_ops be_dry = {
    .name = "dry",
    .rows_are_alone = 1,
    .open = dry_open,
    .close = dry_close,
    .mem_alloc = dry_mem_alloc,
    .mem_free = dry_mem_free,
    .upload = dry_upload,
    .download = dry_download,
    .sync = dry_sync,
    .memory = be_memory_none,
    .open_lane = dry_open_lane,
    .mark_open = be_mark_open,
    .mark_close = be_mark_close,
    .mark_set = be_mark_pass,
    .mark_wait = be_mark_pass,
    .set_threads = dry_set_threads,
    .pass_begin = be_pass_begin,
    .pass_end = be_pass_end,
    .rehearse = be_rehearse_nothing,
    .weight_load = dry_weight_load,
    .weight_free = dry_weight_free,
    .lowrank_load = dry_lowrank_load,
    .lowrank_free = dry_lowrank_free,
    .lowrank = dry_lowrank,
    .conv2d = dry_matmul,
    .linear = dry_matmul,
    .groupnorm = dry_groupnorm,
    .layernorm = dry_layernorm,
    .attention = dry_attention,
    .geglu = dry_one,
    .act = dry_act,
    .add = dry_two,
    .concat = dry_two,
    .upsample2x = dry_one,
    .timestep_embed = dry_timestep_embed,
    .embed = dry_embed,
    .gather_scale = dry_gather_scale,
    .sampler_step = dry_sampler_step,
    .blend = dry_blend,
    .randn = dry_randn,
    .to_rgb8 = dry_one,
    .count_nonfinite = dry_count_nonfinite,
};
