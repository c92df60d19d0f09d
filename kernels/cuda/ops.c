/*
 * ops.c - be_cuda's remaining ops: what they ask of their operands, and the kernels that do them.
 *
 * Called through be_cuda's table. Threads: see cuda.h.
 */
#include "kernels/cuda/cuda.h"

#include <assert.h>
#include <string.h>

static int same_dims(struct tensor a, struct tensor b)
{
  return memcmp(a.d, b.d, sizeof a.d) == 0;
}

struct groupnorm_numbers {
  int32_t groups, silu;
  float eps;
};

int cuda_groupnorm(struct be *be, struct tensor y, struct tensor x, struct tensor temb, const struct weight *w, int groups, float eps, int silu,
                   struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t B = x.d[0], HW = x.d[1] * x.d[2], C = x.d[3];
  struct groupnorm_numbers more;
  void *work;
  int r;

  assert(w->kind == WEIGHT_NORM && w->out == C && C % groups == 0 && x.type == be->act && y.type == be->act && same_dims(y, x));
  assert(!temb.p || (temb.type == be->act && temb.d[0] == B && temb.d[3] == C && tensor_count(temb) == B * C));
  assert(C <= KERN_MAX_CHANNELS && groups <= KERN_MAX_GROUPS);
  r = cuda_scratch(c, kern_groupnorm_bytes(B, HW, C, groups), &work, e);
  more = (struct groupnorm_numbers){groups, silu, eps};
  if (r || pass_skips(c, "groupnorm", (struct tensor[]){y, x, temb}, 3, w, &more, sizeof more))
    return r;
  return cuda_check(kern_groupnorm(c->stream, be->act, y.p, x.p, temb.p, w->gamma, w->bias_f32, B, HW, C, groups, eps, silu, work), "groupnorm", e);
}

int cuda_layernorm(struct be *be, struct tensor y, struct tensor x, const struct weight *w, float eps, struct err *e)
{
  assert(w->kind == WEIGHT_NORM && w->out == x.d[3] && x.type == be->act && y.type == be->act && same_dims(y, x));
  if (pass_skips(cuda_of(be), "layernorm", (struct tensor[]){y, x}, 2, w, &eps, sizeof eps))
    return 0;
  return cuda_check(kern_layernorm(cuda_of(be)->stream, be->act, y.p, x.p, w->gamma, w->bias_f32, tensor_rows(x), x.d[3], eps), "layernorm", e);
}

int cuda_geglu(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  assert(x.type == be->act && y.type == be->act && x.d[3] == 2 * y.d[3] && tensor_rows(y) == tensor_rows(x));
  if (pass_skips(cuda_of(be), "geglu", (struct tensor[]){y, x}, 2, NULL, NULL, 0))
    return 0;
  return cuda_check(kern_geglu(cuda_of(be)->stream, be->act, y.p, x.p, tensor_rows(x), y.d[3]), "geglu", e);
}

int cuda_act(struct be *be, struct tensor y, struct tensor x, enum act_kind kind, struct err *e)
{
  int k = kind == ACT_SILU ? KERN_SILU : kind == ACT_GELU ? KERN_GELU : KERN_QUICK_GELU;

  assert(x.type == be->act && y.type == be->act && tensor_count(y) == tensor_count(x));
  if (pass_skips(cuda_of(be), "act", (struct tensor[]){y, x}, 2, NULL, &k, sizeof k))
    return 0;
  return cuda_check(kern_act(cuda_of(be)->stream, be->act, y.p, x.p, tensor_count(x), k), "act", e);
}

int cuda_add(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  assert(a.type == be->act && b.type == be->act && y.type == be->act && same_dims(a, y) && same_dims(b, y));
  if (pass_skips(cuda_of(be), "add", (struct tensor[]){y, a, b}, 3, NULL, NULL, 0))
    return 0;
  return cuda_check(kern_add(cuda_of(be)->stream, be->act, y.p, a.p, b.p, tensor_count(y)), "add", e);
}

int cuda_concat(struct be *be, struct tensor y, struct tensor a, struct tensor b, struct err *e)
{
  assert(a.type == be->act && b.type == be->act && y.type == be->act && y.d[3] == a.d[3] + b.d[3]);
  assert(tensor_rows(a) == tensor_rows(y) && tensor_rows(b) == tensor_rows(y));
  if (pass_skips(cuda_of(be), "concat", (struct tensor[]){y, a, b}, 3, NULL, NULL, 0))
    return 0;
  return cuda_check(kern_concat(cuda_of(be)->stream, y.p, a.p, b.p, tensor_rows(y), a.d[3], b.d[3]), "concat", e);
}

int cuda_upsample2x(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  assert(x.type == be->act && y.type == be->act && y.d[0] == x.d[0] && y.d[3] == x.d[3]);
  assert((y.d[1] + 1) / 2 == x.d[1] && (y.d[2] + 1) / 2 == x.d[2]);
  if (pass_skips(cuda_of(be), "upsample2x", (struct tensor[]){y, x}, 2, NULL, NULL, 0))
    return 0;
  return cuda_check(kern_upsample2x(cuda_of(be)->stream, y.p, x.p, y.d[0], y.d[1], y.d[2], y.d[3]), "upsample2x", e);
}

int cuda_timestep_embed(struct be *be, struct tensor y, const float *t, int flip_sin_to_cos, float freq_shift, struct err *e)
{
  int r = 0;

  assert(y.type == be->act && y.d[3] % 2 == 0 && tensor_rows(y) == y.d[0]);
  for (int64_t b = 0; b < y.d[0] && !r; b += KERN_ROWS) {
    int64_t n = y.d[0] - b < KERN_ROWS ? y.d[0] - b : KERN_ROWS;
    const float more[2] = {(float)flip_sin_to_cos, freq_shift};
    struct kern_time_rows rows;

    memset(&rows, 0, sizeof rows);
    memcpy(rows.row, t + b, (size_t)n * sizeof *t);
    pass_table(cuda_of(be), rows.row, (size_t)n * sizeof *rows.row, (const void **)&rows.at);
    if (pass_skips(cuda_of(be), "timestep_embed", (struct tensor[]){tensor_batch(y, b, n)}, 1, NULL, more, sizeof more))
      continue;
    r = cuda_check(kern_timestep(cuda_of(be)->stream, be->act, tensor_batch(y, b, n).p, &rows, n, y.d[3], flip_sin_to_cos, freq_shift),
                   "timestep_embed", e);
  }
  return r;
}

int cuda_embed(struct be *be, struct tensor y, const int32_t *ids, const struct weight *tokens, const struct weight *positions, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t rows = tensor_rows(y), T = y.d[2], D = y.d[3];
  void *on_device;
  int r;

  assert(tokens->kind == WEIGHT_TABLE && positions->kind == WEIGHT_TABLE && y.type == be->act && y.d[1] == 1);
  assert(tokens->out == D && positions->out == D && positions->in >= T);
  for (int64_t i = 0; i < rows; i++)
    assert(ids[i] >= 0 && ids[i] < tokens->in);
  r = pass_refuses(c, "embed", e);
  if (!r)
    r = cuda_scratch(c, (size_t)rows * sizeof *ids, &on_device, e);
  if (!r)
    r = cuda_check(cudaMemcpyAsync(on_device, ids, (size_t)rows * sizeof *ids, cudaMemcpyHostToDevice, c->stream), "upload of token ids", e);
  if (!r)
    r = cuda_check(kern_embed(c->stream, be->act, y.p, on_device, tokens->w, tokens->type, positions->w, positions->type, rows, T, D), "embed", e);
  return r;
}

int cuda_gather_scale(struct be *be, struct tensor y, struct tensor x, const int *src, const float *scale, struct err *e)
{
  int64_t each = tensor_count(y) / y.d[0];
  int r = 0;

  assert(x.type == DT_F32 && y.type == be->act && tensor_count(x) / x.d[0] == each);
  for (int64_t b = 0; b < y.d[0] && !r; b += KERN_ROWS) {
    int64_t n = y.d[0] - b < KERN_ROWS ? y.d[0] - b : KERN_ROWS;
    struct kern_gather_rows rows;

    memset(&rows, 0, sizeof rows);
    for (int64_t i = 0; i < n; i++) {
      assert(src[b + i] >= 0 && src[b + i] < x.d[0]);
      rows.row[i] = (struct kern_gather){src[b + i], scale[b + i]};
    }
    pass_table(cuda_of(be), rows.row, (size_t)n * sizeof *rows.row, (const void **)&rows.at);
    if (pass_skips(cuda_of(be), "gather_scale", (struct tensor[]){tensor_batch(y, b, n), x}, 2, NULL, NULL, 0))
      continue;
    r = cuda_check(kern_gather_scale(cuda_of(be)->stream, be->act, tensor_batch(y, b, n).p, x.p, &rows, n, each), "gather_scale", e);
  }
  return r;
}

int cuda_sampler_step(struct be *be, struct tensor x, struct tensor x0_old, struct tensor model, struct tensor noise,
                      const struct step_coef *coef, struct err *e)
{
  int64_t each = tensor_count(x) / x.d[0];
  int r = 0;

  assert(x.type == DT_F32 && x0_old.type == DT_F32 && model.type == DT_F32 && same_dims(x0_old, x));
  assert(tensor_count(model) / model.d[0] == each && (!noise.p || (noise.type == DT_F32 && same_dims(noise, x))));
  for (int64_t b = 0; b < x.d[0] && !r; b += KERN_ROWS) {
    int64_t n = x.d[0] - b < KERN_ROWS ? x.d[0] - b : KERN_ROWS;
    struct kern_coef_rows rows;

    memset(&rows, 0, sizeof rows);
    for (int64_t i = 0; i < n; i++) {
      const struct step_coef *k = &coef[b + i];

      assert(k->row_cond >= 0 && k->row_cond < model.d[0] && k->row_uncond >= 0 && k->row_uncond < model.d[0]);
      assert(k->c_noise == 0 || noise.p);
      rows.row[i] = (struct kern_coef){k->guidance, k->x0_x, k->x0_e, k->c_x, k->c_x0, k->c_old, k->c_noise, k->row_cond, k->row_uncond};
    }
    pass_table(cuda_of(be), rows.row, (size_t)n * sizeof *rows.row, (const void **)&rows.at);
    if (pass_skips(cuda_of(be), "sampler_step", (struct tensor[]){tensor_batch(x, b, n), tensor_batch(x0_old, b, n), model, noise}, 4, NULL, &n, sizeof n))
      continue;
    r = cuda_check(kern_sampler_step(cuda_of(be)->stream, tensor_batch(x, b, n).p, tensor_batch(x0_old, b, n).p, model.p,
                                     noise.p ? tensor_batch(noise, b, n).p : NULL, &rows, n, each),
                   "sampler_step", e);
  }
  return r;
}

int cuda_blend(struct be *be, struct tensor x, struct tensor mask, struct tensor a, struct tensor b, const struct blend_coef *k, struct err *e)
{
  int64_t pixels = x.d[1] * x.d[2];
  int r = 0;

  assert(x.type == DT_F32 && a.type == DT_F32 && b.type == DT_F32 && same_dims(a, x) && same_dims(b, x));
  assert(mask.type == DT_U8 && mask.d[3] == 1 && tensor_rows(mask) == tensor_rows(x));
  for (int64_t i = 0; i < x.d[0] && !r; i += KERN_ROWS) {
    int64_t n = x.d[0] - i < KERN_ROWS ? x.d[0] - i : KERN_ROWS;
    struct tensor t[4] = {tensor_batch(x, i, n), tensor_batch(mask, i, n), tensor_batch(a, i, n), tensor_batch(b, i, n)};
    struct kern_blend_rows rows;

    memset(&rows, 0, sizeof rows);
    for (int64_t j = 0; j < n; j++)
      rows.row[j] = (struct kern_blend){k[i + j].a, k[i + j].b};
    pass_table(cuda_of(be), rows.row, (size_t)n * sizeof *rows.row, (const void **)&rows.at);
    if (pass_skips(cuda_of(be), "blend", t, 4, NULL, NULL, 0))
      continue;
    r = cuda_check(kern_blend(cuda_of(be)->stream, t[0].p, t[1].p, t[2].p, t[3].p, &rows, n, pixels, x.d[3]), "blend", e);
  }
  return r;
}

int cuda_randn(struct be *be, struct tensor y, struct tensor state, float scale, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int64_t pixels = y.d[1] * y.d[2];
  void *work;
  int r;

  assert(y.type == DT_F32 && state.type == DT_I32 && state.d[0] == y.d[0] && tensor_count(state) == y.d[0] * NORMAL_WORDS);
  assert((uintptr_t)state.p % _Alignof(struct normal_state) == 0);
  r = cuda_scratch(c, kern_randn_bytes(y.d[0], pixels * y.d[3]), &work, e);
  if (r || pass_skips(c, "randn", (struct tensor[]){y, state}, 2, NULL, &scale, sizeof scale))
    return r;
  return cuda_check(kern_randn(c->stream, y.p, state.p, y.d[0], pixels, y.d[3], scale, work), "randn", e);
}

int cuda_to_rgb8(struct be *be, struct tensor y, struct tensor x, struct err *e)
{
  assert(y.type == DT_U8 && tensor_count(y) == tensor_count(x) && (x.type == DT_F32 || x.type == be->act));
  if (pass_skips(cuda_of(be), "to_rgb8", (struct tensor[]){y, x}, 2, NULL, NULL, 0))
    return 0;
  return cuda_check(kern_to_rgb8(cuda_of(be)->stream, y.p, x.p, x.type, tensor_count(x)), "to_rgb8", e);
}

int cuda_count_nonfinite(struct be *be, struct tensor x, int64_t *bad, struct err *e)
{
  struct cuda *c = cuda_of(be);
  int r;

  assert(x.type == DT_F32 || x.type == be->act);
  *bad = 0;
  r = pass_refuses(c, "count_nonfinite", e);
  if (!r)
    r = cuda_check(cudaMemsetAsync(c->count, 0, sizeof *c->count, c->stream), "count_nonfinite", e);
  if (!r)
    r = cuda_check(kern_count_nonfinite(c->stream, c->count, x.p, x.type, tensor_count(x)), "count_nonfinite", e);
  if (!r)
    r = cuda_check(cudaMemcpyAsync(c->count_host, c->count, sizeof *c->count, cudaMemcpyDeviceToHost, c->stream), "count_nonfinite", e);
  if (!r)
    r = be->ops->sync(be, e);
  if (!r)
    *bad = (int64_t)*c->count_host;
  return r;
}
