/*
 * model.c - loads a checkpoint (or draws one in memory); see pipeline.h and model.h. Its activation memory: plan.c, lane.c.
 *
 * Called by server/device.c, server/generate.c, server/bench.c, tests. Invariants: a model that model_open returned is complete:
 * every tensor that its configuration needs was there, finite and of the right shape. Threads: the thread that owns the backend.
 */
#include "models/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "models/arch.h"
#include "models/digest.h"

static const char *last_component(const char *dir, size_t *len)
{
  const char *end = dir + strlen(dir), *p;

  while (end > dir + 1 && end[-1] == '/')
    end--;
  for (p = end; p > dir && p[-1] != '/'; p--)
    ;
  *len = (size_t)(end - p);
  return p;
}

MUST_CHECK static int join(char *out, size_t cap, const char *dir, const char *file, struct err *e)
{
  int n = snprintf(out, cap, "%s/%s", dir, file);

  if (n < 0 || (size_t)n >= cap)
    return err_field(e, E_FILE, "model", "the path of the model is longer than %zu bytes", cap);
  return 0;
}

/* The pad token: SD1.x pads with the end mark, SD2.x with "!"; the tokenizer's own files say which. */
MUST_CHECK static int load_pad(struct model *m, const char *dir, struct err *e)
{
  static const char *const files[] = {"special_tokens_map.json", "tokenizer_config.json"};
  char path[4096], token[128];
  int r = 0;

  m->pad = tokenizer_eos(m->tokenizer);
  *token = 0;
  for (size_t i = 0; !r && !*token && i < sizeof files / sizeof *files; i++) {
    if ((r = join(path, sizeof path, dir, files[i], e)) || (r = pad_token_load(token, sizeof token, path, e)))
      return r;
    if (*token && (m->pad = tokenizer_find(m->tokenizer, token)) < 0)
      r = err_field(e, E_FILE, path, "%s: the pad token \"%.40s\" is not in the vocabulary", path, token);
  }
  return r;
}

/* Fills m->info from the networks. */
static void describe(struct model *m, int default_size)
{
  const struct vae_config *v = vae_config(m->vae);

  m->info.vae_factor = v->factor;
  m->info.size_multiple = v->factor;
  m->info.latent_channels = v->latent_channels;
  m->info.default_size = default_size ? default_size : 512;
  m->info.is_v_prediction = m->schedule.is_v_prediction;
}

/* The parts must fit each other, whatever their files say. */
MUST_CHECK static int check_fit(const struct model *m, struct err *e)
{
  const struct unet_config *u = unet_config(m->unet);
  const struct vae_config *v = vae_config(m->vae);

  if (u->in_channels != v->latent_channels || u->out_channels != v->latent_channels)
    return err_field(e, E_FILE, "unet/config.json", "the UNet maps %d to %d channels but the VAE has %d latent channels",
                     u->in_channels, u->out_channels, v->latent_channels);
  if (v->out_channels != 3)
    return err_field(e, E_FILE, "vae/config.json", "the VAE makes %d channels; pictures have 3", v->out_channels);
  if (v->shift_factor != 0)
    return err_field(e, E_FILE, "vae/config.json", "shift_factor is not supported by this pipeline; it must be null");
  if (m->clip && clip_config(m->clip)->width != u->context_dim)
    return err_field(e, E_FILE, "unet/config.json", "cross_attention_dim is %d but the text encoder's width is %d",
                     u->context_dim, clip_config(m->clip)->width);
  if (m->clip && clip_config(m->clip)->positions < PROMPT_CHUNK)
    return err_field(e, E_FILE, "text_encoder/config.json", "max_position_embeddings must be at least %d", PROMPT_CHUNK);
  if (m->tokenizer && m->clip && tokenizer_size(m->tokenizer) > clip_config(m->clip)->vocab)
    return err_field(e, E_FILE, "text_encoder/config.json", "vocab_size is %d but the tokenizer knows %d tokens",
                     clip_config(m->clip)->vocab, (int)tokenizer_size(m->tokenizer));
  return 0;
}

/* A schedule that no sampler can follow is the checkpoint's fault, found at start and not by the first request. */
MUST_CHECK static int check_schedule(const struct model *m, struct err *e)
{
  for (int kind = 0; kind < SAMPLER_COUNT; kind++) {
    struct sampler_plan p = {0};
    int r = sampler_plan(&p, &m->schedule, (enum sampler_kind)kind, 0, 20, e);

    sampler_plan_close(&p);
    if (r)
      return err_wrap(e, "scheduler/scheduler_config.json");
  }
  return 0;
}

/* The components with weights, in the order they are loaded. */
enum part { PART_TEXT, PART_UNET, PART_VAE, PARTS };

static const char *const part_name[PARTS] = {"text_encoder", "unet", "vae"};

union part_config {
  struct clip_config text;
  struct unet_config unet;
  struct vae_config vae;
};

/* Builds one component from its source into the base generation, and counts its parameters. */
MUST_CHECK static int build_part(struct model *m, enum part part, const union part_config *c, struct source *s, struct err *e)
{
  int64_t *const params[PARTS] = {&m->info.text_params, &m->info.unet_params, &m->info.vae_params};
  int64_t before = m->base->params;
  struct builder b;
  int r;

  builder_init(&b, m->base, s, part_name[part], e);
  if (part == PART_TEXT)
    r = clip_new(&m->clip, &c->text, &b);
  else if (part == PART_UNET)
    r = unet_new(&m->unet, &c->unet, &b);
  else
    r = vae_new(&m->vae, &c->vae, m->info.has_encoder, &b);
  *params[part] = m->base->params - before;
  return r;
}

MUST_CHECK static int model_new(struct model **out, struct be *be, struct err *e)
{
  struct model *m = calloc(1, sizeof *m);
  int r;

  *out = NULL;
  if (!m)
    return err_set(e, E_NOMEM, "out of memory for a model");
  m->be = be;
  m->lane = (struct lane){.m = m, .be = be};
  r = generation_new(&m->base, be, e);
  if (r) {
    model_close(m);
    return r;
  }
  *out = m;
  return 0;
}

/* One component of a checkpoint folder: its config is parsed into *c, its files are opened, its network is built. */
MUST_CHECK static int open_part(struct model *m, enum part part, const char *dir, union part_config *c, struct err *e)
{
  char folder[4096], path[4200];
  struct source *s = NULL;
  int r;

  r = join(folder, sizeof folder, dir, part_name[part], e);
  if (!r)
    r = join(path, sizeof path, folder, "config.json", e);
  if (r)
    return r;
  if (part == PART_TEXT)
    r = clip_config_load(&c->text, path, e);
  else if (part == PART_UNET)
    r = unet_config_load(&c->unet, path, e);
  else
    r = vae_config_load(&c->vae, path, e);
  if (!r && part == PART_UNET && c->unet.add_time_dim)
    r = err_field(e, E_FILE, path, "%s: SDXL's UNet needs a pipeline that is not supported yet: serve an SD1.x checkpoint", path);
  if (!r)
    r = source_open_files(&s, folder, e);
  if (!r)
    r = sources_add(&m->sources, part_name[part], s, e);
  if (!r && part == PART_VAE)
    m->info.has_encoder = source_has(s, "encoder.conv_in.weight");
  return r ? r : build_part(m, part, c, s, e);
}

MUST_CHECK static int open_tokenizer(struct model *m, const char *dir, struct err *e)
{
  char path[4096];
  int r = join(path, sizeof path, dir, "tokenizer", e);

  if (!r)
    r = tokenizer_open(&m->tokenizer, path, e);
  return r ? r : load_pad(m, path, e);
}

int model_open(struct model **out, struct be *be, const char *dir, struct err *e)
{
  char path[4096];
  struct index_config index;
  union part_config c;
  struct model *m = NULL;
  const char *name;
  size_t len;
  int r, sample_size = 0;

  *out = NULL;
  if ((r = join(path, sizeof path, dir, "model_index.json", e)) || (r = index_config_load(&index, path, e)))
    goto out;
  if (index.kind != PIPELINE_SD || !index.has_text_encoder) {
    r = err_field(e, E_FILE, path, "%s: only the StableDiffusionPipeline of SD1.x is supported yet", path);
    goto out;
  }
  if ((r = model_new(&m, be, e)) || (r = join(path, sizeof path, dir, "scheduler/scheduler_config.json", e)) ||
      (r = schedule_config_load(&m->schedule, path, e)) || (r = check_schedule(m, e)) || (r = open_tokenizer(m, dir, e)))
    goto out;
  for (int part = 0; part < PARTS; part++) {
    r = open_part(m, (enum part)part, dir, &c, e);
    if (r)
      goto out;
    if (part == PART_UNET)
      sample_size = c.unet.sample_size;
  }
  if ((r = check_fit(m, e)) || (r = digest_model(m->info.digest, dir, e)))
    goto out;
  memcpy(m->base->digest, m->info.digest, sizeof m->base->digest);
  describe(m, sample_size * vae_config(m->vae)->factor);
  name = last_component(dir, &len);
  snprintf(m->info.name, sizeof m->info.name, "%.*s", (int)len, name);
  *out = m;
  m = NULL;
out:
  model_close(m);
  return r;
}

MUST_CHECK static int open_synthetic(struct model **out, struct be *be, const char *name, int has_encoder, struct err *e)
{
  struct arch a;
  struct source *s = NULL;
  struct model *m = NULL;
  int r;

  *out = NULL;
  if ((r = arch_find(&a, name, e)) || (r = model_new(&m, be, e)) || (r = digest_text(m->base->digest, "synthetic weights", name, e)))
    goto out;
  m->schedule = a.schedule;
  m->info.has_encoder = has_encoder;
  for (int part = a.has_clip ? PART_TEXT : PART_UNET; part < PARTS; part++) {
    union part_config c;

    if (part == PART_TEXT)
      c.text = a.clip;
    else if (part == PART_UNET)
      c.unet = a.unet;
    else
      c.vae = a.vae;
    if ((r = source_open_synthetic(&s, DT_F16, e)) || (r = sources_add(&m->sources, part_name[part], s, e)) ||
        (r = build_part(m, (enum part)part, &c, s, e)))
      goto out;
  }
  r = check_fit(m, e);
  if (r)
    goto out;
  describe(m, a.default_size);
  snprintf(m->info.name, sizeof m->info.name, "%.50s-synthetic", name);
  *out = m;
  m = NULL;
out:
  model_close(m);
  return r;
}

int model_open_synthetic(struct model **out, struct be *be, const char *name, struct err *e)
{
  return open_synthetic(out, be, name, 0, e);
}

int model_open_architecture(struct model **out, struct be *be, const char *name, struct err *e)
{
  return open_synthetic(out, be, name, 1, e);
}

void model_close(struct model *m)
{
  if (!m)
    return;
  lane_release(&m->lane);
  vae_free(m->vae);
  unet_free(m->unet);
  clip_free(m->clip);
  tokenizer_close(m->tokenizer);
  generation_unref(m->base);
  sources_close(&m->sources);
  free(m);
}

const struct model_info *model_info(const struct model *m)
{
  return &m->info;
}

struct generation *model_base(const struct model *m)
{
  return m->base;
}

struct model_sources *model_sources(const struct model *m)
{
  return (struct model_sources *)&m->sources; /* read only, but for the parts' opaque handles */
}

int model_layers_per_block(const struct model *m)
{
  return unet_config(m->unet)->layers[0];
}
