/*
 * networks.c - see networks.h.
 */
#include "tests/golden/networks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/golden/write_ckpt.h"

#define GOLDEN "tests/golden"

static struct err e;

/* Fails the test with what the product said. */
static void must(int code)
{
  if (code)
    fail_msg("%s (%s)", e.msg, e.field);
}

/* ---- checkpoints, written once ---- */

enum { MAX_CKPT = 8 };

static struct {
  char name[32], dir[256];
  int bf16;
} written[MAX_CKPT];

static const char *checkpoint_dir(const char *name, int bf16)
{
  struct ckpt_form form = {.type = bf16 ? DT_BF16 : DT_F16};
  int i;

  for (i = 0; i < MAX_CKPT && written[i].name[0]; i++)
    if (!strcmp(written[i].name, name) && written[i].bf16 == bf16)
      return written[i].dir;
  assert_true(i < MAX_CKPT);
  must(ckpt_write(written[i].dir, GOLDEN, name, &form, &e));
  snprintf(written[i].name, sizeof written[i].name, "%s", name);
  written[i].bf16 = bf16;
  return written[i].dir;
}

const char *nets_dir(const struct nets *n)
{
  return checkpoint_dir(n->name, 0);
}

void nets_cleanup(void)
{
  int i;

  for (i = 0; i < MAX_CKPT; i++)
    ckpt_remove(written[i].dir);
  memset(written, 0, sizeof written);
}

static void read_configs(struct nets *n, const char *dir)
{
  char path[512];

  snprintf(path, sizeof path, "%s/unet/config.json", dir);
  if (n->has_unet)
    must(unet_config_load(&n->unet_config, path, &e));
  snprintf(path, sizeof path, "%s/vae/config.json", dir);
  if (n->has_vae)
    must(vae_config_load(&n->vae_config, path, &e));
  snprintf(path, sizeof path, "%s/text_encoder/config.json", dir);
  if (n->has_clip)
    must(clip_config_load(&n->clip_config, path, &e));
}

static struct source *part_open(const char *dir, const char *part)
{
  struct source *s;
  char path[512];

  snprintf(path, sizeof path, "%s/%s", dir, part);
  must(source_open_files(&s, path, &e));
  return s;
}

/* Sources stay open, as a model's do. */
static struct source *part_keep(struct nets *n, const char *dir, const char *part)
{
  struct source *s = part_open(dir, part);

  must(sources_add(&n->sources, part, s, &e));
  return s;
}

static void load(struct nets *n, const char *dir)
{
  struct source *s;
  struct builder b;

  must(generation_new(&n->g, &n->be, &e));
  if (n->has_unet) {
    s = part_keep(n, dir, "unet");
    builder_init(&b, n->g, s, "unet", &e);
    must(unet_new(&n->unet, &n->unet_config, &b));
  }
  if (n->has_vae) {
    s = part_keep(n, dir, "vae");
    builder_init(&b, n->g, s, "vae", &e);
    must(vae_new(&n->vae, &n->vae_config, 1, &b));
  }
  if (n->has_clip) {
    s = part_keep(n, dir, "text_encoder");
    builder_init(&b, n->g, s, "text_encoder", &e);
    must(clip_new(&n->clip, &n->clip_config, &b));
  }
}

/* n->name and n->has_... are set. */
static void open_from(struct nets *n, const struct be_ops *ops, const struct be_config *cfg, int bf16, const struct bug *bug)
{
  const struct be_config one_thread = {.threads = 1};
  const char *dir = checkpoint_dir(n->name, bf16);

  e = (struct err){0};
  n->enough = INFINITY;
  n->ops = *ops;
  if (bug && bug->ops)
    bug->ops(&n->ops);
  must(be_open(&n->be, &n->ops, cfg ? cfg : &one_thread, &e));
  must(be_open(&n->dry, &be_dry, &one_thread, &e));
  n->dry.act = n->be.act;
  read_configs(n, dir);
  if (bug && bug->config)
    bug->config(n);
  load(n, dir);
}

void nets_open(struct nets *n, const struct be_ops *ops, const struct be_config *cfg, const char *name, const char *what,
               const struct bug *bug)
{
  *n = (struct nets){.name = name,
                     .has_clip = strstr(what, "text") != NULL,
                     .has_unet = strstr(what, "unet") != NULL,
                     .has_vae = strstr(what, "vae") != NULL};
  open_from(n, ops, cfg, 0, bug);
}

void nets_open_bf16(struct nets *n, const struct be_ops *ops)
{
  *n = (struct nets){.name = "sd15", .has_clip = 1, .has_unet = 1, .has_vae = 1};
  open_from(n, ops, NULL, 1, NULL);
}

void nets_close(struct nets *n)
{
  clip_free(n->clip);
  unet_free(n->unet);
  vae_free(n->vae);
  generation_unref(n->g);
  sources_close(&n->sources);
  be_close(&n->dry);
  be_close(&n->be);
}

void nets_expect_failure(struct nets *n, int code, const char *name)
{
  struct source *s = part_open(checkpoint_dir(n->name, 0), "unet");
  struct err failure = {0};
  struct generation *g;
  struct unet *u;
  struct builder b;

  must(generation_new(&g, &n->be, &e));
  builder_init(&b, g, s, "unet", &failure);
  assert_int_equal(unet_new(&u, &n->unet_config, &b), code);
  assert_null(u);
  assert_non_null(strstr(failure.msg, name));
  generation_unref(g);
  source_close(s);
}

/* ---- golden files ---- */

static struct safetensors *golden_open(const char *what, const char *name)
{
  struct safetensors *st;
  char path[256];

  snprintf(path, sizeof path, GOLDEN "/%s%s%s.safetensors", what, *name ? "_" : "", name);
  must(st_open(&st, path, &e));
  return st;
}

static const struct st_tensor *golden(const struct safetensors *st, const char *case_name, const char *what)
{
  const struct st_tensor *t;
  char key[128];

  snprintf(key, sizeof key, "%s%s%s", case_name, *case_name ? "." : "", what);
  t = st_find(st, key);
  if (!t)
    fail_msg("%s is not in %s", key, st_path(st));
  return t;
}

/* The dims as ours: NCHW becomes (B, H, W, C), fewer dims are (1, 1, rows, D). */
static struct tensor shape_of(const struct st_tensor *t, enum dtype type)
{
  struct tensor s = {NULL, {1, 1, 1, 1}, type};
  int i;

  if (t->nd == 4)
    return (struct tensor){NULL, {t->shape[0], t->shape[2], t->shape[3], t->shape[1]}, type};
  for (i = 0; i < t->nd; i++)
    s.d[4 - t->nd + i] = t->shape[i];
  return s;
}

/* Where element i of ours (channels last) is in torch's order. */
static int64_t torch_index(const struct st_tensor *t, int64_t i)
{
  int64_t C, HW;

  if (t->nd != 4)
    return i;
  C = t->shape[1];
  HW = t->shape[2] * t->shape[3];
  return i / (HW * C) * HW * C + i % C * HW + i / C % HW;
}

static float golden_at(const struct st_tensor *t, int64_t i)
{
  float x;

  memcpy(&x, (const char *)t->data + 4 * torch_index(t, i), sizeof x);
  return x;
}

static struct net_error worse(struct net_error a, struct net_error b)
{
  return (struct net_error){a.max > b.max ? a.max : b.max, a.rms > b.rms ? a.rms : b.rms};
}

static struct net_error error_of(const struct st_tensor *want, const float *got, int64_t count)
{
  double worst = 0, largest = 0, squares = 0, sum = 0, rms;
  int64_t i;

  assert_int_equal(want->type, ST_F32);
  assert_true(want->bytes == 4 * (size_t)count);
  for (i = 0; i < count; i++) {
    double x = golden_at(want, i), diff = fabs(x - (double)got[i]);

    worst = diff <= worst ? worst : diff >= 0 ? diff : INFINITY;
    largest = fabs(x) > largest ? fabs(x) : largest;
    squares += diff * diff;
    sum += x * x;
  }
  rms = sqrt(squares / sum);
  return (struct net_error){worst / largest, rms >= 0 ? rms : INFINITY};
}

/* ---- tensors on the device ---- */

static struct tensor device(struct nets *n, struct tensor shape)
{
  must(n->be.ops->mem_alloc(&n->be, tensor_bytes(shape), &shape.p, &e));
  return shape;
}

static void drop(struct nets *n, struct tensor t)
{
  n->be.ops->mem_free(&n->be, t.p);
}

/* A golden tensor, as activations. */
static struct tensor upload(struct nets *n, const struct st_tensor *t)
{
  struct tensor x = device(n, shape_of(t, n->be.act));
  int64_t i, count = tensor_count(x);
  float *host = test_malloc((size_t)count * sizeof *host);

  assert_int_equal(t->type, ST_F32);
  for (i = 0; i < count; i++)
    host[i] = golden_at(t, i);
  must(n->be.ops->upload(&n->be, x, host, DT_F32, &e));
  test_free(host);
  return x;
}

static struct net_error error_on_device(struct nets *n, const struct st_tensor *want, struct tensor got)
{
  float *host = test_malloc((size_t)tensor_count(got) * sizeof *host);
  struct net_error error;

  must(n->be.ops->download(&n->be, host, DT_F32, got, &e));
  error = error_of(want, host, tensor_count(got));
  test_free(host);
  return error;
}

static void start_run(struct nets *n, struct run *r, struct be *be, struct arena *a)
{
  if (n->row)
    run_init_rows(r, be, a, n->row, n->rows, &e);
  else
    run_init(r, be, a, n->g, &e);
}

/* Runs forward twice: dry, to learn how much memory it takes, and then with exactly that. */
static void run_forward(struct nets *n, int (*forward)(struct run *, const struct nets *, const void *), const void *args)
{
  struct arena a;
  struct run r;
  void *slab;
  size_t need;

  arena_init(&a, NULL, 0);
  start_run(n, &r, &n->dry, &a);
  must(forward(&r, n, args));
  need = a.peak;
  must(n->be.ops->mem_alloc(&n->be, need, &slab, &e));
  arena_init(&a, slab, need);
  start_run(n, &r, &n->be, &a);
  must(forward(&r, n, args));
  must(n->be.ops->sync(&n->be, &e));
  assert_true(a.peak == need && a.top == 0);
  n->be.ops->mem_free(&n->be, slab);
}

/* ---- text encoder ---- */

struct clip_args {
  int32_t ids[77];
  int clip_skip;
  struct tensor hidden, pooled;
};

static int clip_run(struct run *r, const struct nets *n, const void *args)
{
  const struct clip_args *a = args;

  return clip_forward(r, n->clip, a->ids, a->clip_skip, a->hidden, a->pooled);
}

static void read_ids(const struct st_tensor *t, int32_t *ids)
{
  int64_t i, id;

  assert_true(t->type == ST_I64 && t->bytes == 77 * sizeof id);
  for (i = 0; i < 77; i++) {
    memcpy(&id, (const char *)t->data + 8 * i, sizeof id);
    ids[i] = (int32_t)id;
  }
}

static struct net_error check_text(struct nets *n, const struct safetensors *st, int *cases)
{
  static const char *const outputs[] = {"last", "skip1", "skip2"};
  struct net_error worst = {0, 0};
  char name[16], key[32];
  int i, skip, D = n->clip_config.width;

  for (i = 0; snprintf(name, sizeof name, "p%d", i), snprintf(key, sizeof key, "%s.input_ids", name), st_find(st, key); i++)
    for (skip = 0; skip < 3 && worst.max <= n->enough; skip++) {
      struct clip_args a = {.clip_skip = skip + 1 + n->wrong_skip};

      snprintf(key, sizeof key, "%s.%s", name, outputs[skip]);
      if (!st_find(st, key))
        continue;
      read_ids(golden(st, name, "input_ids"), a.ids);
      a.hidden = device(n, (struct tensor){NULL, {1, 1, 77, D}, n->be.act});
      a.pooled = device(n, (struct tensor){NULL, {1, 1, 1, D}, n->be.act});
      run_forward(n, clip_run, &a);
      worst = worse(worst, error_on_device(n, golden(st, name, outputs[skip]), a.hidden));
      worst = worse(worst, error_on_device(n, golden(st, name, "pooled"), a.pooled));
      drop(n, a.hidden);
      drop(n, a.pooled);
      *cases += 2;
    }
  return worst;
}

/* ---- UNet ---- */

struct unet_args {
  struct unet_input in;
  struct tensor out;
};

static int unet_pass(struct run *r, const struct nets *n, const void *args)
{
  const struct unet_args *a = args;

  return unet_forward(r, n->unet, &a->in, a->out);
}

/* Keys and values of row b of a golden prompt, under g. */
static struct unet_context fill_context_under(struct nets *n, const struct generation *g, struct tensor prompts, int64_t b)
{
  struct unet_context c = {NULL, prompts.d[2]};
  struct tensor prompt = tensor_batch(prompts, b, 1);
  struct arena a;
  struct run r;

  must(n->be.ops->mem_alloc(&n->be, unet_context_bytes(n->unet, c.T, n->be.act), &c.mem, &e));
  arena_init(&a, NULL, 0);
  run_init(&r, &n->be, &a, g, &e);
  must(unet_context_fill(&r, n->unet, &c, prompt));
  assert_true(a.peak == 0);
  return c;
}

static struct unet_context fill_context(struct nets *n, struct tensor prompts, int64_t b)
{
  return fill_context_under(n, n->g, prompts, b);
}

/* One case of a golden file, with the output that is wanted. prompts (rows, 1, T, D). */
static struct net_error check_unet_against(struct nets *n, const struct safetensors *st, const char *name, struct tensor prompts,
                                           const struct st_tensor *want)
{
  const struct st_tensor *times = golden(st, name, "timestep");
  int n_ids = n->unet_config.add_time_dim ? (int)golden(st, "", "time_ids")->shape[1] : 0;
  struct unet_context context[2];
  const struct unet_context *rows[2];
  float t[2], ids[2 * 6];
  struct unet_args a = {.in = {.t = t, .context = rows, .text_embeds = tensor_none(), .time_ids = ids, .n_time_ids = n_ids}};
  int64_t b, B = times->shape[0];
  struct net_error error;
  int i;

  for (b = 0; b < B; b++) {
    t[b] = golden_at(times, b);
    context[b] = fill_context(n, prompts, b);
    rows[b] = &context[n->wrong_rows ? B - 1 - b : b];
    for (i = 0; i < n_ids; i++)
      ids[b * n_ids + i] = golden_at(golden(st, "", "time_ids"), b * n_ids + (n->wrong_ids ? n_ids - 1 - i : i));
  }
  a.in.sample = upload(n, golden(st, name, "sample"));
  if (n_ids) {
    a.in.text_embeds = upload(n, golden(st, "", "text_embeds"));
    a.in.text_embeds = (struct tensor){a.in.text_embeds.p, {B, 1, 1, a.in.text_embeds.d[3]}, n->be.act};
  }
  a.out = device(n, shape_of(want, DT_F32));
  run_forward(n, unet_pass, &a);
  error = error_on_device(n, want, a.out);
  for (b = 0; b < B; b++)
    n->be.ops->mem_free(&n->be, context[b].mem);
  drop(n, a.in.sample);
  drop(n, a.in.text_embeds);
  drop(n, a.out);
  return error;
}

static struct net_error check_unet_case(struct nets *n, const struct safetensors *st, const char *name, struct tensor prompts)
{
  return check_unet_against(n, st, name, prompts, golden(st, name, "output"));
}

/* (rows, T, D) in the file is (rows, 1, T, D) here. */
static struct tensor upload_prompts(struct nets *n, const struct st_tensor *t)
{
  struct tensor x = upload(n, t);

  return t->nd == 3 ? tensor_view(x, t->shape[0], 1, t->shape[1], t->shape[2]) : x;
}

static struct net_error check_unet(struct nets *n, const struct safetensors *st, int *cases)
{
  static const char *const names[] = {"first", "mid", "last", "zero", "frac", "long", "wide", "ragged", "batch"};
  struct tensor short_prompts = upload_prompts(n, golden(st, "", "context.77"));
  struct tensor long_prompt = upload_prompts(n, golden(st, "", "context.154"));
  struct net_error worst = {0, 0};
  size_t i;

  for (i = 0; i < sizeof names / sizeof *names && worst.max <= n->enough; i++) {
    worst = worse(worst, check_unet_case(n, st, names[i], strcmp(names[i], "long") ? short_prompts : long_prompt));
    ++*cases;
  }
  drop(n, short_prompts);
  drop(n, long_prompt);
  return worst;
}

/* out (B, h, w, C) of the sample's rows from first on, in host memory that the caller frees. */
static float *unet_rows(struct nets *n, struct tensor samples, const float *t, const struct unet_context *const *rows,
                        int64_t first, int64_t B)
{
  struct unet_args a = {.in = {.sample = tensor_batch(samples, first, B), .t = t + first, .context = rows + first,
                               .text_embeds = tensor_none()}};
  struct tensor shape = {NULL, {B, samples.d[1], samples.d[2], n->unet_config.out_channels}, DT_F32};
  float *host = test_malloc(tensor_bytes(shape));

  a.out = device(n, shape);
  run_forward(n, unet_pass, &a);
  must(n->be.ops->download(&n->be, host, DT_F32, a.out, &e));
  drop(n, a.out);
  return host;
}

int nets_rows_independent(struct nets *n)
{
  struct safetensors *st = golden_open("unet", n->name);
  struct tensor samples = upload(n, golden(st, "batch", "sample"));
  struct tensor prompts[2] = {upload_prompts(n, golden(st, "", "context.77")), upload_prompts(n, golden(st, "", "context.154"))};
  struct unet_context context[2] = {fill_context(n, prompts[0], 0), fill_context(n, prompts[1], 0)};
  const struct unet_context *rows[2] = {&context[0], &context[1]};
  const float t[2] = {golden_at(golden(st, "batch", "timestep"), 0), golden_at(golden(st, "batch", "timestep"), 1)};
  float *both = unet_rows(n, samples, t, rows, 0, 2), *one;
  size_t each = (size_t)(samples.d[1] * samples.d[2] * n->unet_config.out_channels);
  int b, same = 1;

  for (b = 0; b < 2; b++) {
    one = unet_rows(n, samples, t, rows, b, 1);
    same = same && !memcmp(one, both + (size_t)b * each, each * sizeof *one);
    test_free(one);
    n->be.ops->mem_free(&n->be, context[b].mem);
    drop(n, prompts[b]);
  }
  test_free(both);
  drop(n, samples);
  st_close(st);
  return same;
}

/* ---- VAE ---- */

struct vae_args {
  struct tensor in, out;
};

static int decode_pass(struct run *r, const struct nets *n, const void *args)
{
  const struct vae_args *a = args;

  return vae_decode(r, n->vae, a->in, a->out);
}

static int encode_pass(struct run *r, const struct nets *n, const void *args)
{
  const struct vae_args *a = args;

  return vae_encode(r, n->vae, a->in, a->out);
}

static struct net_error check_decode(struct nets *n, const struct st_tensor *z, const struct st_tensor *want)
{
  struct vae_args a = {upload(n, z), device(n, shape_of(want, DT_F32))};
  struct net_error error;

  run_forward(n, decode_pass, &a);
  error = error_on_device(n, want, a.out);
  drop(n, a.in);
  drop(n, a.out);
  return error;
}

/* The moments hold mean and log variance side by side in the channels. */
static struct net_error check_encode(struct nets *n, const struct st_tensor *image, const struct st_tensor *mean,
                           const struct st_tensor *logvar)
{
  struct tensor shape = shape_of(mean, DT_F32);
  int64_t i, c, L = shape.d[3], count = tensor_count(shape);
  struct vae_args a = {upload(n, image), device(n, (struct tensor){NULL, {1, shape.d[1], shape.d[2], 2 * L}, DT_F32})};
  float *both = test_malloc(2 * (size_t)count * sizeof *both), *half = test_malloc((size_t)count * sizeof *half);
  struct net_error error[2];

  run_forward(n, encode_pass, &a);
  must(n->be.ops->download(&n->be, both, DT_F32, a.out, &e));
  for (c = 0; c < 2; c++) {
    for (i = 0; i < count; i++)
      half[i] = both[i / L * 2 * L + c * L + i % L];
    error[c] = error_of(c ? logvar : mean, half, count);
  }
  test_free(both);
  test_free(half);
  drop(n, a.in);
  drop(n, a.out);
  return worse(error[0], error[1]);
}

static struct net_error check_vae(struct nets *n, const struct safetensors *st, int *cases)
{
  static const char *const names[] = {"square", "wide"};
  struct net_error worst = {0, 0};
  size_t i;

  for (i = 0; i < 2; i++) {
    worst = worse(worst, check_encode(n, golden(st, names[i], "encode.image"), golden(st, names[i], "encode.mean"),
                                      golden(st, names[i], "encode.logvar")));
    worst = worse(worst, check_decode(n, golden(st, names[i], "decode.z"), golden(st, names[i], "decode.image")));
    *cases += 2;
  }
  return worst;
}

/* ---- all ---- */

struct net_error nets_check(struct nets *n, const char *what, int *cases)
{
  struct safetensors *st = golden_open(what, n->name);
  struct net_error worst = !strcmp(what, "text")   ? check_text(n, st, cases)
                           : !strcmp(what, "unet") ? check_unet(n, st, cases)
                                                   : check_vae(n, st, cases);

  st_close(st);
  return worst;
}

struct net_error nets_check_bf16(struct nets *n, int *cases)
{
  struct safetensors *st = golden_open("bf16", "");
  struct clip_args a = {.hidden = device(n, (struct tensor){NULL, {1, 1, 77, n->clip_config.width}, n->be.act}),
                        .pooled = tensor_none()};
  struct tensor prompt = upload(n, golden(st, "text", "last"));
  struct net_error worst;

  read_ids(golden(st, "text", "input_ids"), a.ids);
  run_forward(n, clip_run, &a);
  worst = error_on_device(n, golden(st, "text", "last"), a.hidden);
  worst = worse(worst, check_unet_case(n, st, "unet", prompt));
  worst = worse(worst, check_decode(n, golden(st, "vae", "z"), golden(st, "vae", "image")));
  *cases += 3;
  drop(n, a.hidden);
  drop(n, prompt);
  st_close(st);
  return worst;
}

/* ---- adapters ---- */

static struct net_error check_text_under(struct nets *n, const struct safetensors *st)
{
  struct clip_args a = {.hidden = device(n, (struct tensor){NULL, {1, 1, 77, n->clip_config.width}, n->be.act}),
                        .pooled = tensor_none()};
  struct net_error error;

  read_ids(golden(st, "text", "input_ids"), a.ids);
  run_forward(n, clip_run, &a);
  error = error_on_device(n, golden(st, "text", "last"), a.hidden);
  drop(n, a.hidden);
  return error;
}

struct net_error nets_check_lora(struct nets *n, const char *name)
{
  struct safetensors *st = golden_open("lora", "sd15");
  struct net_error error;
  struct tensor prompts;

  if (strcmp(name, "text")) {
    prompts = upload_prompts(n, golden(st, "", "context"));
    error = check_unet_case(n, st, name, prompts);
    drop(n, prompts);
  } else {
    error = check_text_under(n, st);
  }
  st_close(st);
  return error;
}

struct net_error nets_check_output(struct nets *n, const struct st_tensor *want)
{
  struct safetensors *st = golden_open("unet", n->name);
  struct tensor prompts = upload_prompts(n, golden(st, "", "context.77"));
  struct net_error error = check_unet_against(n, st, "mid", prompts, want);

  drop(n, prompts);
  st_close(st);
  return error;
}

enum { PREDICT_ROWS = 4 };

float *nets_predict(struct nets *n, const struct generation *const *row, const int *input, int rows, size_t *each)
{
  struct safetensors *st = golden_open("lora", "sd15");
  struct tensor golden_samples = upload(n, golden(st, "attn", "sample")), prompts = upload_prompts(n, golden(st, "", "context"));
  struct tensor samples = golden_samples;
  struct unet_context context[PREDICT_ROWS];
  const struct unet_context *at[PREDICT_ROWS];
  float t[PREDICT_ROWS], *out, *host;

  assert_true(rows <= PREDICT_ROWS);
  *each = (size_t)(tensor_count(samples) / samples.d[0]);
  samples.d[0] = rows;
  samples = device(n, samples);
  host = test_malloc(2 * *each * sizeof *host);
  must(n->be.ops->download(&n->be, host, DT_F32, golden_samples, &e));
  for (int b = 0; b < rows; b++) {
    int from = input ? input[b] : b;

    must(n->be.ops->upload(&n->be, tensor_batch(samples, b, 1), host + (size_t)from * *each, DT_F32, &e));
    t[b] = golden_at(golden(st, "attn", "timestep"), from);
    context[b] = fill_context_under(n, row[b], prompts, from);
    at[b] = &context[b];
  }
  n->row = row;
  n->rows = rows;
  out = unet_rows(n, samples, t, at, 0, rows);
  n->row = NULL;
  for (int b = 0; b < rows; b++)
    n->be.ops->mem_free(&n->be, context[b].mem);
  test_free(host);
  drop(n, golden_samples);
  drop(n, samples);
  drop(n, prompts);
  st_close(st);
  return out;
}
