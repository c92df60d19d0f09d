/*
 * planted.c - a backend with one bug at a time, of the kind that people write. See harness.h: test_ops.c asserts that each is
 * found by the case that it names, with the same tolerances as the real backend gets.
 *
 * A bug wraps the real op of the backend under test. Those that write to tensors by hand need host memory.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "kernels/convert.h"
#include "tests/ops/harness.h"

static const struct be_ops *real;
static struct be_ops planted;

/* ---- parameters ---- */

static int load_without_bias(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  struct weight_desc bad = *d;

  bad.bias = NULL;
  return real->weight_load(be, &bad, like, w, e);
}

static int load_swapped(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  struct weight_desc bad = *d;

  bad.w = d->bias;
  bad.bias = d->w;
  return real->weight_load(be, &bad, like, w, e);
}

static int load_shifted(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  struct weight_desc bad = *d;

  bad.pad_lo--;
  bad.pad_hi++;
  return real->weight_load(be, &bad, like, w, e);
}

static int load_symmetric(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  struct weight_desc bad = *d;

  bad.pad_lo = d->pad_hi;
  bad.pad_hi = d->pad_lo;
  return real->weight_load(be, &bad, like, w, e);
}

/* Kernel rows and columns exchanged: what reading (kw, kh) for (kh, kw) does. */
static int load_transposed(struct be *be, const struct weight_desc *d, const struct weight *like, struct weight **w, struct err *e)
{
  int64_t planes = d->out * d->in, k = d->kh;
  float *turned = malloc((size_t)(planes * k * k) * sizeof *turned);
  struct weight_desc bad = *d;
  int r;

  if (!turned)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t p = 0; p < planes; p++)
    for (int64_t i = 0; i < k; i++)
      for (int64_t j = 0; j < k; j++)
        turned[(p * k + j) * k + i] = convert_get(d->w, d->w_type, (p * k + i) * k + j);
  bad.w = turned;
  bad.w_type = DT_F32;
  r = real->weight_load(be, &bad, like, w, e);
  free(turned);
  return r;
}

/* Factors with one more thing wrong; d's own stay as they are. */
static int load_unscaled(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e)
{
  int64_t n = d->out * d->rank;
  float *up = malloc((size_t)n * sizeof *up);
  struct lowrank_desc bad = *d;
  int r;

  if (!up)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t i = 0; i < n; i++)
    up[i] = d->up[i] * 1.25f;
  bad.up = up;
  r = real->lowrank_load(be, &bad, l, e);
  free(up);
  return r;
}

/* The last rank is lost; up keeps its rows. */
static int load_rank_short(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e)
{
  int64_t n = d->out * d->rank;
  float *up = malloc((size_t)n * sizeof *up);
  struct lowrank_desc bad = *d;
  int r;

  if (!up)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t i = 0; i < n; i++)
    up[i] = i % d->rank == d->rank - 1 ? 0 : d->up[i];
  bad.up = up;
  r = real->lowrank_load(be, &bad, l, e);
  free(up);
  return r;
}

static int load_factors_shifted(struct be *be, const struct lowrank_desc *d, struct lowrank **l, struct err *e)
{
  struct lowrank_desc bad = *d;

  bad.pad_lo--;
  bad.pad_hi++;
  return real->lowrank_load(be, &bad, l, e);
}

/* ---- ops ---- */

/* Every picture with factors gets those of the first. */
static int lowrank_first_row(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  const struct lowrank **bad = calloc((size_t)y.d[0], sizeof *bad);
  int r;

  if (!bad)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < y.d[0]; b++)
    bad[b] = row[b] ? row[0] : NULL;
  r = real->lowrank(be, y, x, bad, e);
  if (!r)
    r = real->sync(be, e);
  free(bad);
  return r;
}

/* A picture without factors gets those of its neighbour. */
static int lowrank_fills_gaps(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  const struct lowrank **bad = calloc((size_t)y.d[0], sizeof *bad);
  int r;

  if (!bad)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < y.d[0]; b++)
    bad[b] = row[b] || !b ? row[b] : bad[b - 1];
  r = real->lowrank(be, y, x, bad, e);
  if (!r)
    r = real->sync(be, e);
  free(bad);
  return r;
}

static int lowrank_overwrites(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  for (int64_t b = 0; b < y.d[0]; b++)
    if (row[b])
      memset(tensor_batch(y, b, 1).p, 0, tensor_bytes(y) / (size_t)y.d[0]);
  return real->lowrank(be, y, x, row, e);
}

/* Another picture's factors reach the last bit of the first, as a sum whose order depends on the batch does. */
static int lowrank_leaks(struct be *be, struct tensor y, struct tensor x, const struct lowrank *const *row, struct err *e)
{
  int r = real->lowrank(be, y, x, row, e);

  *(unsigned char *)y.p ^= (unsigned char)(y.d[0] > 1 && !row[1]);
  return r;
}

static int conv_no_residual(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                            struct err *e)
{
  (void)residual;
  return real->conv2d(be, y, x, w, tensor_none(), e);
}

static int linear_unwritten(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                            struct err *e)
{
  size_t last = tensor_bytes(y) - dtype_size(y.type), size = dtype_size(y.type);
  char keep[4];
  int r;

  memcpy(keep, (char *)y.p + last, size);
  r = real->linear(be, y, x, w, residual, e);
  memcpy((char *)y.p + last, keep, size);
  return r;
}

static int linear_one_past(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                           struct err *e)
{
  int r = real->linear(be, y, x, w, residual, e);

  convert_set(y.p, y.type, tensor_count(y), 0.5f);
  return r;
}

static int linear_touches_input(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                                struct err *e)
{
  int r = real->linear(be, y, x, w, residual, e);

  convert_set(x.p, x.type, 3, convert_get(x.p, x.type, 3) + 1);
  return r;
}

/* The last picture leaks into the first, by an amount far under any tolerance. */
static int linear_leaks(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                        struct err *e)
{
  int r = real->linear(be, y, x, w, residual, e);
  uint16_t low;

  memcpy(&low, y.p, sizeof low);
  low ^= (uint16_t)(f32_bits(convert_get(x.p, x.type, tensor_count(x) - 1)) >> 16 & 1);
  memcpy(y.p, &low, sizeof low);
  return r;
}

/* Another last bit at each call, as a sum whose order depends on timing gives. */
static int linear_restless(struct be *be, struct tensor y, struct tensor x, const struct weight *w, struct tensor residual,
                           struct err *e)
{
  static unsigned char count;
  int r = real->linear(be, y, x, w, residual, e);

  *(unsigned char *)y.p ^= count++ & 1;
  return r;
}

static int groupnorm_eps_outside(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                                 int groups, float eps, int silu, struct err *e)
{
  return real->groupnorm(be, y, x, temb, w, groups, eps * eps, silu, e); /* sqrt(var) + eps, nearly */
}

static int groupnorm_no_temb(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                             int groups, float eps, int silu, struct err *e)
{
  (void)temb;
  return real->groupnorm(be, y, x, tensor_none(), w, groups, eps, silu, e);
}

static int groupnorm_no_silu(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                             int groups, float eps, int silu, struct err *e)
{
  (void)silu;
  return real->groupnorm(be, y, x, temb, w, groups, eps, 0, e);
}

static int groupnorm_one_group_more(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w,
                                    int groups, float eps, int silu, struct err *e)
{
  return real->groupnorm(be, y, x, temb, w, groups * 2, eps, silu, e);
}

static int layernorm_eps_outside(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps,
                                 struct err *e)
{
  return real->layernorm(be, y, x, w, eps * eps, e);
}

static int attention_unscaled(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads, float scale,
                              int causal, struct err *e)
{
  (void)scale;
  return real->attention(be, o, q, kv, heads, 1.0f, causal, e);
}

static int attention_sees_future(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads,
                                 float scale, int causal, struct err *e)
{
  (void)causal;
  return real->attention(be, o, q, kv, heads, scale, 0, e);
}

static int attention_other_heads(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads,
                                 float scale, int causal, struct err *e)
{
  return real->attention(be, o, q, kv, heads / 2, scale, causal, e);
}

/* Every picture is taken to have as many keys as the first. */
static int attention_first_length(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads,
                                  float scale, int causal, struct err *e)
{
  struct kv_row *bad = calloc((size_t)q.d[0], sizeof *bad);
  int r;

  if (!bad)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < q.d[0]; b++)
    bad[b] = (struct kv_row){kv[b].k, kv[b].v, kv[0].T};
  r = real->attention(be, o, q, bad, heads, scale, causal, e);
  if (!r)
    r = real->sync(be, e);
  free(bad);
  return r;
}

static int attention_one_key_short(struct be *be, struct tensor o, struct tensor q, const struct kv_row *kv, int heads,
                                   float scale, int causal, struct err *e)
{
  struct kv_row *bad = calloc((size_t)q.d[0], sizeof *bad);
  int r;

  if (!bad)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < q.d[0]; b++)
    bad[b] = (struct kv_row){kv[b].k, kv[b].v, kv[b].T - 1};
  r = real->attention(be, o, q, bad, heads, scale, causal, e);
  if (!r)
    r = real->sync(be, e);
  free(bad);
  return r;
}

static int act_quick(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  return real->act(be, y, x, kind == ACT_GELU ? ACT_QUICK_GELU : kind, e);
}

/* A NaN becomes a number, as fmax and saturating conversions do. */
static int act_hides_nan(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  int r = real->act(be, y, x, kind, e);

  for (int64_t i = 0; i < tensor_count(y); i++)
    if (isnan(convert_get(y.p, y.type, i)))
      convert_set(y.p, y.type, i, 0);
  return r;
}

static int concat_allocates(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  void *volatile working = malloc(tensor_bytes(y));
  int r = real->concat(be, y, a, b, e);

  free(working);
  return r;
}

static int concat_exchanged(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  return real->concat(be, y, b, a, e);
}

static int timestep_unflipped(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift,
                              struct err *e)
{
  return real->timestep_embed(be, y, t, !flip_sin_to_cos, freq_shift, e);
}

static int timestep_no_shift(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift,
                             struct err *e)
{
  (void)freq_shift;
  return real->timestep_embed(be, y, t, flip_sin_to_cos, 0, e);
}

static int gather_in_order(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e)
{
  int *bad = calloc((size_t)y.d[0], sizeof *bad), r;

  if (!bad)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < y.d[0]; b++)
    bad[b] = (int)(b < x.d[0] ? b : src[b]);
  r = real->gather_scale(be, y, x, bad, scale, e);
  free(bad);
  return r;
}

static int sampler_exchanged(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                             const struct step_coef *coef, struct err *e)
{
  struct step_coef *bad = calloc((size_t)x.d[0], sizeof *bad);
  int r;

  if (!bad)
    return err_set(e, E_NOMEM, "out of memory");
  for (int64_t b = 0; b < x.d[0]; b++) {
    bad[b] = coef[b];
    bad[b].row_cond = coef[b].row_uncond;
    bad[b].row_uncond = coef[b].row_cond;
  }
  r = real->sampler_step(be, x, x0_old, model, noise, bad, e);
  free(bad);
  return r;
}

static int blend_exchanged(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                           struct err *e)
{
  return real->blend(be, x, mask, b, a, c, e);
}

static int blend_everywhere(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                            struct err *e)
{
  struct tensor none = mask;
  int r;

  none.p = calloc(1, tensor_bytes(mask));
  if (!none.p)
    return err_set(e, E_NOMEM, "out of memory");
  r = real->blend(be, x, none, a, b, c, e);
  if (!r)
    r = real->sync(be, e);
  free(none.p);
  return r;
}

/* Every picture is noised as far as the first. */
static int blend_first_coef(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *c,
                            struct err *e)
{
  int r = 0;

  for (int64_t i = 0; i < x.d[0] && !r; i++)
    r = real->blend(be, tensor_batch(x, i, 1), tensor_batch(mask, i, 1), tensor_batch(a, i, 1), tensor_batch(b, i, 1), c, e);
  return r;
}

/* The next noise is this one again. */
static int randn_stands_still(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  struct tensor copy = state;
  int r;

  copy.p = malloc(tensor_bytes(state));
  if (!copy.p)
    return err_set(e, E_NOMEM, "out of memory");
  memcpy(copy.p, state.p, tensor_bytes(state));
  r = real->randn(be, y, copy, scale, e);
  if (!r)
    r = real->sync(be, e);
  free(copy.p);
  return r;
}

static int randn_unscaled(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  (void)scale;
  return real->randn(be, y, state, 1, e);
}

/* Numbers in torch's order of channels. */
static int randn_planar(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  return real->randn(be, tensor_view(y, y.d[0], 1, y.d[1] * y.d[2] * y.d[3], 1), state, scale, e);
}

const struct bug bugs[] = {
    {.name = "the bias is dropped", .case_name = "conv 3x3 320>320 8x8",
     .wrong.weight_load = load_without_bias},
    {.name = "the bias of a linear is dropped", .case_name = "linear 320>1280 T=77",
     .wrong.weight_load = load_without_bias},
    {.name = "padding is off by one pixel", .case_name = "conv 3x3 320>320 8x8",
     .wrong.weight_load = load_shifted},
    {.name = "asymmetric padding on the wrong side", .case_name = "conv 3x3 s2 pad(0,1) 64",
     .wrong.weight_load = load_symmetric},
    {.name = "kernel rows and columns are exchanged", .case_name = "conv 3x3 4>320 9x7",
     .wrong.weight_load = load_transposed},
    {.name = "the residual is dropped", .case_name = "conv 3x3 64>64 residual",
     .wrong.conv2d = conv_no_residual},
    {.name = "the last output is not written", .case_name = "linear 320>1280 T=77",
     .wrong.linear = linear_unwritten},
    {.name = "one element past the end is written", .case_name = "linear 320>1280 T=77",
     .wrong.linear = linear_one_past},
    {.name = "an input is changed", .case_name = "linear 320>1280 T=77",
     .wrong.linear = linear_touches_input},
    {.name = "a picture leaks into another's last bit", .case_name = "linear 320>1280 T=77",
     .wrong.linear = linear_leaks},
    {.name = "a repeated call differs in the last bit", .case_name = "linear 320>1280 T=77",
     .wrong.linear = linear_restless},
    {.name = "the scale of the factors is dropped", .case_name = "lowrank 320>320 r4 T=64",
     .wrong.lowrank_load = load_unscaled},
    {.name = "the scale of a convolution's factors is dropped", .case_name = "lowrank 3x3 64>64 r4 9x7 mixed",
     .wrong.lowrank_load = load_unscaled},
    {.name = "the last rank is ignored", .case_name = "lowrank 320>320 r28 T=33 mixed",
     .wrong.lowrank_load = load_rank_short},
    {.name = "the last of a thousand ranks is ignored", .case_name = "lowrank 48>48 r1000 T=9",
     .wrong.lowrank_load = load_rank_short},
    {.name = "the factors' padding is off by one pixel", .case_name = "lowrank 3x3 s2 64>48 r8 9x11 mixed",
     .wrong.lowrank_load = load_factors_shifted},
    {.name = "all pictures have the first one's factors", .case_name = "lowrank 320>320 r28 T=33 mixed",
     .wrong.lowrank = lowrank_first_row},
    {.name = "all pictures have the first one's convolution", .case_name = "lowrank 3x3 64>64 r4 9x7 mixed",
     .wrong.lowrank = lowrank_first_row},
    {.name = "a picture without factors gets some", .case_name = "lowrank 320>320 r28 T=33 mixed",
     .wrong.lowrank = lowrank_fills_gaps},
    {.name = "y is overwritten", .case_name = "lowrank 320>320 r4 T=64",
     .wrong.lowrank = lowrank_overwrites},
    {.name = "another picture's factors reach the last bit", .case_name = "lowrank 320>320 r28 T=33 mixed",
     .wrong.lowrank = lowrank_leaks},
    {.name = "gamma and beta are exchanged", .case_name = "groupnorm 320 g32 silu",
     .wrong.weight_load = load_swapped},
    {.name = "gamma and beta of a layernorm are exchanged", .case_name = "layernorm 320 T=64",
     .wrong.weight_load = load_swapped},
    {.name = "eps outside of the root", .case_name = "groupnorm 64 g32 faint",
     .wrong.groupnorm = groupnorm_eps_outside},
    {.name = "eps of a layernorm outside of the root", .case_name = "layernorm 320 faint",
     .wrong.layernorm = layernorm_eps_outside},
    {.name = "the time embedding is not added", .case_name = "groupnorm 320 g32 temb silu",
     .wrong.groupnorm = groupnorm_no_temb},
    {.name = "SiLU is forgotten", .case_name = "groupnorm 320 g32 silu",
     .wrong.groupnorm = groupnorm_no_silu},
    {.name = "twice as many groups", .case_name = "groupnorm 96 g8",
     .wrong.groupnorm = groupnorm_one_group_more},
    {.name = "scores are not scaled", .case_name = "attention K=40 T=64",
     .wrong.attention = attention_unscaled},
    {.name = "tokens see the future", .case_name = "attention K=64 T=77 causal",
     .wrong.attention = attention_sees_future},
    {.name = "heads are cut elsewhere", .case_name = "attention K=40 T=64",
     .wrong.attention = attention_other_heads},
    {.name = "all pictures have the first one's keys", .case_name = "attention K=40 kv ragged",
     .wrong.attention = attention_first_length},
    {.name = "the last key is not seen", .case_name = "attention K=40 T=64",
     .wrong.attention = attention_one_key_short},
    {.name = "quick gelu for gelu", .case_name = "gelu 640",
     .wrong.act = act_quick},
    {.name = "NaN becomes a number", .case_name = "silu nan",
     .wrong.act = act_hides_nan},
    {.name = "working memory from the heap at each call", .case_name = "concat 64+64",
     .wrong.concat = concat_allocates, .is_heap_bug = 1},
    {.name = "concat the other way round", .case_name = "concat 64+64",
     .wrong.concat = concat_exchanged},
    {.name = "sin and cos exchanged", .case_name = "timestep 320 flip",
     .wrong.timestep_embed = timestep_unflipped},
    {.name = "freq_shift is ignored", .case_name = "timestep 64 shift 1",
     .wrong.timestep_embed = timestep_no_shift},
    {.name = "rows are not gathered", .case_name = "gather_scale B=4",
     .wrong.gather_scale = gather_in_order},
    {.name = "guidance the wrong way round", .case_name = "sampler_step B=3",
     .wrong.sampler_step = sampler_exchanged},
    {.name = "a mask blends the other way round", .case_name = "blend B=3",
     .wrong.blend = blend_exchanged},
    {.name = "the mask is not looked at", .case_name = "blend B=3",
     .wrong.blend = blend_everywhere},
    {.name = "all pictures are blended as the first", .case_name = "blend B=3",
     .wrong.blend = blend_first_coef},
    {.name = "the generator does not move on", .case_name = "randn B=3",
     .wrong.randn = randn_stands_still},
    {.name = "the noise is not scaled", .case_name = "randn 7x5",
     .wrong.randn = randn_unscaled},
    {.name = "noise in the order of planes", .case_name = "randn B=3",
     .wrong.randn = randn_planar},
};
const int bug_count = sizeof bugs / sizeof *bugs;

const struct be_ops *bug_plant(const struct bug *b, const struct be_ops *inner)
{
  real = inner;
  planted = *inner;
#define TAKE(entry)        \
  if (b->wrong.entry)      \
  planted.entry = b->wrong.entry
  TAKE(weight_load);
  TAKE(lowrank_load);
  TAKE(lowrank);
  TAKE(conv2d);
  TAKE(linear);
  TAKE(groupnorm);
  TAKE(layernorm);
  TAKE(attention);
  TAKE(act);
  TAKE(concat);
  TAKE(timestep_embed);
  TAKE(gather_scale);
  TAKE(sampler_step);
  TAKE(blend);
  TAKE(randn);
#undef TAKE
  return &planted;
}
