/*
 * sdapi_lists.c - what GET /sdapi/v1/... lists of this server: models, samplers, style adapters, options, and the things that A1111 has and this has not,
 * as empty lists of the right kind. See sdapi.h.
 *
 * One table: name and function. Shapes are A1111's (modules/api/models.py). Threads: pure functions.
 */
#include <stdio.h>
#include <string.h>

#include "proto/sdapi_fields.h"
#include "proto/json_add.h"

static void model_title(char *out, size_t size, const struct sdapi_server *s)
{
  if (*s->digest)
    snprintf(out, size, "%s [%.10s]", s->lim->model, s->digest);
  else
    snprintf(out, size, "%s", s->lim->model);
}

static json_t *options_json(const struct sdapi_server *s)
{
  char title[REQUEST_MODEL_MAX + 16];

  model_title(title, sizeof title, s);
  return json_pack("{s:o,s:o,s:s,s:s,s:i,s:s,s:i,s:b,s:b,s:i,s:s}", "sd_model_checkpoint", json_make_text(title),
                   "sd_checkpoint_hash", json_make_text(s->digest), "sd_vae", "Automatic",
                   "samples_format", "png", "CLIP_stop_at_last_layers", 1, "randn_source", "CPU", "eta_noise_seed_delta", 0,
                   "img2img_color_correction", 0, "enable_pnginfo", 1, "jpeg_quality", 80, "sd_lora", "None");
}

static json_t *models_json(const struct sdapi_server *s)
{
  char title[REQUEST_MODEL_MAX + 16], hash[11];

  model_title(title, sizeof title, s);
  snprintf(hash, sizeof hash, "%.10s", s->digest);
  return json_pack("[{s:o,s:o,s:o,s:o,s:o,s:n}]", "title", json_make_text(title), "model_name", json_make_text(s->lim->model), "hash",
                   *hash ? json_make_text(hash) : json_null(), "sha256", json_null(), "filename", json_make_text(s->filename), "config");
}

static json_t *samplers_json(const struct sdapi_server *s)
{
  json_t *list = json_array();

  for (int i = 0; i < s->n_samplers; i++) {
    char k_name[REQUEST_SAMPLER_MAX + 2];
    snprintf(k_name, sizeof k_name, "k_%s", s->sampler[i].name);
    json_array_append_new(list, json_pack("{s:o,s:[o,o],s:{}}", "name", json_make_text(s->sampler[i].label), "aliases", json_make_text(s->sampler[i].name),
                                          json_make_text(k_name), "options"));
  }
  return list;
}

static json_t *schedulers_json(const struct sdapi_server *s)
{
  int has_karras = 0;
  json_t *list = json_pack("[{s:s,s:s,s:n,s:f,s:b},{s:s,s:s,s:[s],s:f,s:b}]", "name", "automatic", "label", "Automatic", "aliases", "default_rho", -1.0,
                           "need_inner_model", 0, "name", "uniform", "label", "Uniform", "aliases", "normal", "default_rho", -1.0, "need_inner_model", 1);

  for (int i = 0; i < s->n_samplers; i++)
    has_karras |= s->sampler[i].has_karras;
  if (list && has_karras)
    json_array_append_new(list, json_pack("{s:s,s:s,s:n,s:f,s:b}", "name", "karras", "label", "Karras", "aliases", "default_rho", 7.0, "need_inner_model", 0));
  return list;
}

static json_t *loras_json(const struct sdapi_server *s)
{
  json_t *list = json_array();

  for (int i = 0; i < s->n_loras; i++)
    json_array_append_new(list, json_pack("{s:o,s:o,s:o,s:{}}", "name", json_make_text(s->lora[i].name), "alias",
                                          json_make_text(s->lora[i].alias ? s->lora[i].alias : s->lora[i].name), "path",
                                          json_make_text(s->lora[i].name), "metadata"));
  return list;
}

static json_t *upscalers_json(const struct sdapi_server *s)
{
  (void)s;
  return json_pack("[{s:s,s:n,s:n,s:n,s:f}]", "name", "None", "model_name", "model_path", "model_url", "scale", 1.0);
}

static json_t *embeddings_json(const struct sdapi_server *s)
{
  (void)s;
  return json_pack("{s:{},s:{}}", "loaded", "skipped");
}

static json_t *scripts_json(const struct sdapi_server *s)
{
  (void)s;
  return json_pack("{s:[],s:[]}", "txt2img", "img2img");
}

static json_t *flags_json(const struct sdapi_server *s)
{
  return json_pack("{s:b,s:b,s:o,s:o}", "api", 1, "nowebui", 1, "safelight_version", json_make_text(s->version), "ckpt", json_make_text(s->lim->model));
}

static json_t *memory_json(const struct sdapi_server *s)
{
  return json_pack("{s:{s:I,s:I,s:I},s:{s:s}}", "ram", "free", (json_int_t)(s->memory_total - s->memory_used), "used", (json_int_t)s->memory_used, "total",
                   (json_int_t)s->memory_total, "cuda", "error", "not told to clients");
}

static json_t *empty_json(const struct sdapi_server *s)
{
  (void)s;
  return json_array();
}

static const struct {
  const char *name;
  json_t *(*make)(const struct sdapi_server *s);
} lists[] = {
    {"options", options_json},       {"sd-models", models_json},       {"samplers", samplers_json},        {"schedulers", schedulers_json},
    {"loras", loras_json},           {"upscalers", upscalers_json},    {"latent-upscale-modes", empty_json}, {"sd-vae", empty_json},
    {"sd-modules", empty_json},      {"embeddings", embeddings_json},  {"hypernetworks", empty_json},      {"face-restorers", empty_json},
    {"realesrgan-models", empty_json}, {"prompt-styles", empty_json},  {"scripts", scripts_json},          {"script-info", empty_json},
    {"extensions", empty_json},      {"cmd-flags", flags_json},       {"memory", memory_json},
};

int sdapi_encode_list(struct buf *out, const char *name, const struct sdapi_server *s, struct err *e)
{
  for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
    if (!strcmp(name, lists[i].name))
      return json_add_value(out, lists[i].make(s), 0, e);
  return err_set(e, E_NOTFOUND, "there is no /sdapi/v1/%.60s", name);
}

/* An option that says what is so already changes nothing. */
static int check_option(const char *name, const json_t *v, const json_t *ours, const struct sdapi_server *s, struct err *e)
{
  const json_t *mine = json_object_get(ours, name);
  const char *text = json_string_value(v);

  if (!strcmp(name, "sd_model_checkpoint")) {
    if (!text || sdapi_is_model(text, s->lim))
      return text || json_is_null(v) ? 0 : err_field(e, E_ARG, name, "%s must be a string", name);
    return err_field(e, E_ARG, name, "%s must be \"%s\", the one this server serves", name, s->lim->model);
  }
  if (!mine)
    return field_unknown(name, NULL, e);
  if (json_equal(mine, v) || (json_is_number(mine) && json_is_number(v) && json_number_value(mine) == json_number_value(v)))
    return 0;
  return err_field(e, E_ARG, name, "%s is the operator's option: one client may not change what others get; send it with each request in override_settings",
                   name);
}

int sdapi_decode_options(const char *body, size_t len, const struct sdapi_server *s, struct err *e)
{
  struct err none = {0};
  struct body b;
  json_t *ours, *v;
  const char *name;
  int ret = 0;

  e = e ? e : &none;
  if (body_begin(&b, body, len, e))
    return e->code;
  ours = options_json(s);
  if (!ours)
    ret = err_set(e, E_NOMEM, "no memory to read the body");
  if (!ret)
    json_object_foreach(b.root, name, v)
      if ((ret = check_option(name, v, ours, s, e)))
        break;
  json_decref(ours);
  return body_end(&b, ret, e);
}
