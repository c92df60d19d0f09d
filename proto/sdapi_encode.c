/*
 * sdapi_encode.c - results, progress and errors as A1111's clients read them. See sdapi.h.
 *
 * Keys and their order are A1111's (modules/api/api.py, processing.py). Base64 is written straight into the output, everything else goes through jansson.
 * Threads: pure functions.
 */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "proto/base64.h"
#include "proto/image.h"
#include "proto/sdapi.h"
#include "proto/json_add.h"

enum { INFOTEXT_MAX = 4 * REQUEST_PROMPT_MAX };

/* ---- results ---- */

/* The prompt as it was sent, as near as it matters: the tags that were taken out stand behind it. */
static int add_prompt(struct buf *out, const struct request *q, struct err *e)
{
  if (buf_add_str(out, q->prompt, e))
    return e->code;
  for (int i = 0; i < q->n_loras; i++)
    if (buf_addf(out, e, "%s<lora:%s:%g>", i || *q->prompt ? " " : "", q->lora[i].name, (double)q->lora[i].scale))
      return e->code;
  return 0;
}

/* A list of n times the same. */
static json_t *repeat(const char *s, int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++)
    json_array_append_new(list, json_make_text(s));
  return list;
}

static json_t *seeds_json(const struct sdapi_result *r)
{
  json_t *list = json_array();

  for (int i = 0; i < r->n; i++)
    json_array_append_new(list, json_integer((json_int_t)r->picture[i].seed));
  return list;
}

/* A1111 counts a variation seed of its own for each picture; there are none here. */
static json_t *subseeds_json(int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++)
    json_array_append_new(list, json_integer(-1));
  return list;
}

/* One for each picture that there is. */
static json_t *infotexts_json(const struct sdapi_result *r, const char *prompt)
{
  json_t *list = json_array();
  struct recipe recipe = *r->recipe;
  struct err e = {0};
  struct buf text;
  int n = 0;

  recipe.prompt = prompt;
  for (int i = 0; i < r->n; i++) {
    if (!r->picture[i].file)
      continue;
    n++;
    buf_init(&text, INFOTEXT_MAX);
    recipe.seed = r->picture[i].seed;
    recipe.cut_at = r->picture[i].cut_at;
    if (!image_parameters(&text, &recipe, IMAGE_FULL, &e))
      json_array_append_new(list, json_make_text(text.p));
    buf_close(&text);
  }
  if ((int)json_array_size(list) == n)
    return list;
  json_decref(list);
  return NULL;
}

static json_t *generation_json(const struct recipe *p)
{
  return json_pack("{s:s?,s:s?,s:s?,s:b}", "Generation", p->generation_id, "Generation digest", p->generation_digest, "Safety profile", p->profile,
                   "Drawn without safety", p->requires_nothing);
}

static json_t *info_json(const struct sdapi_result *r, const char *prompt)
{
  const struct recipe *p = r->recipe;
  char stamp[32], hash[11];
  time_t created = (time_t)r->created;
  struct tm tm;

  gmtime_r(&created, &tm);
  strftime(stamp, sizeof stamp, "%Y%m%d%H%M%S", &tm);
  snprintf(hash, sizeof hash, "%.10s", p->model_digest);
  return json_pack("{s:o,s:o,s:o,s:o,s:I,s:o,s:i,s:o,s:i,s:i,s:i,s:o,s:f,s:i,s:i,s:b,s:n,s:o,s:s,s:n,s:n,s:i,s:i,s:o,s:o,s:i,s:o,s:[],s:s,s:i,s:b,s:o}",
                   "prompt", json_make_text(prompt), "all_prompts", repeat(prompt, r->n), "negative_prompt", json_make_text(p->negative),
                   "all_negative_prompts", repeat(p->negative, r->n), "seed", (json_int_t)r->picture[0].seed, "all_seeds", seeds_json(r),
                   "subseed", -1, "all_subseeds", subseeds_json(r->n), "subseed_strength", 0, "width", p->width, "height", p->height,
                   "sampler_name", json_make_text(p->sampler_label), "cfg_scale", (double)p->guidance, "steps", p->steps, "batch_size",
                   r->x->batch_size, "restore_faces", 0, "face_restoration_model", "sd_model_name", json_make_text(p->model), "sd_model_hash", hash,
                   "sd_vae_name", "sd_vae_hash", "seed_resize_from_w", -1, "seed_resize_from_h", -1, "denoising_strength",
                   r->x->is_img2img ? json_real((double)r->x->denoising) : json_null(), "extra_generation_params", generation_json(p),
                   "index_of_first_image", 0, "infotexts", infotexts_json(r, prompt), "styles", "job_timestamp", stamp, "clip_skip",
                   p->clip_skip ? p->clip_skip : 1, "is_using_inpainting_conditioning", 0, "version", json_make_text(p->version));
}

/* What was asked for, with A1111's names; what was not said has the value that was used. */
static json_t *parameters_json(const struct sdapi_result *r, const char *prompt)
{
  const struct request *q = r->req;
  const struct recipe *p = r->recipe;
  json_t *j = json_pack("{s:o,s:o,s:[],s:I,s:i,s:f,s:i,s:i,s:o,s:s,s:i,s:i,s:i,s:f,s:i,s:i,s:b,s:b,s:{},s:b,s:b,s:f,s:b,s:{},s:o}", "prompt",
                        json_make_text(prompt), "negative_prompt", json_make_text(p->negative), "styles", "seed",
                        q->has_seed ? (json_int_t)q->seed : (json_int_t)-1, "subseed", -1, "subseed_strength", 0.0, "seed_resize_from_h", -1,
                        "seed_resize_from_w", -1, "sampler_name", json_make_text(p->sampler_label), "scheduler", p->karras ? "Karras" : "Automatic",
                        "batch_size", r->x->batch_size, "n_iter", r->x->n_iter, "steps", p->steps, "cfg_scale", (double)p->guidance, "width",
                        p->width, "height", p->height, "restore_faces", 0, "tiling", 0, "override_settings", "override_settings_restore_afterwards", 1,
                        "enable_hr", 0, "denoising_strength", (double)r->x->denoising, "send_images", r->x->sends_images, "alwayson_scripts",
                        "sampler_index", json_make_text(p->sampler_label));

  if (j && r->x->is_img2img && (json_object_set_new(j, "init_images", json_null()) || json_object_set_new(j, "mask", json_null()))) {
    json_decref(j);
    return NULL;
  }
  return j;
}

/* info is JSON in a JSON string. */
static int add_info(struct buf *out, const struct sdapi_result *r, const char *prompt, struct err *e)
{
  struct buf info;
  int ret;

  buf_init(&info, out->max);
  ret = json_add_value(&info, info_json(r, prompt), 0, e);
  if (!ret)
    ret = json_add_value(out, json_string(info.p), 0, e);
  buf_close(&info);
  return ret;
}

static int add_images(struct buf *out, const struct sdapi_result *r, struct err *e)
{
  const char *before = "\"";

  for (int i = 0; r->x->sends_images && i < r->n; i++) {
    if (!r->picture[i].file)
      continue;
    if (buf_add_str(out, before, e) || base64_encode(out, r->picture[i].file, r->picture[i].len, e) || buf_add_str(out, "\"", e))
      return e->code;
    before = ",\"";
  }
  return 0;
}

int sdapi_encode_result(struct buf *out, const struct sdapi_result *r, struct err *e)
{
  struct err none = {0};
  struct buf prompt;
  int ret;

  e = e ? e : &none;
  buf_init(&prompt, 2 * REQUEST_PROMPT_MAX);
  ret = add_prompt(&prompt, r->req, e);
  if (!ret)
    ret = buf_add_str(out, "{\"images\":[", e);
  if (!ret)
    ret = add_images(out, r, e);
  if (!ret)
    ret = buf_add_str(out, "],\"parameters\":", e);
  if (!ret)
    ret = json_add_value(out, parameters_json(r, prompt.p ? prompt.p : ""), 0, e);
  if (!ret)
    ret = buf_add_str(out, ",\"info\":", e);
  if (!ret)
    ret = add_info(out, r, prompt.p ? prompt.p : "", e);
  if (!ret)
    ret = buf_add_str(out, "}", e);
  buf_close(&prompt);
  return ret;
}

/* ---- progress ---- */

double sdapi_progress_of(int picture, int n, int step, int steps)
{
  double p = 0.01 + (double)picture / n + (steps ? (double)step / steps / n : 0);

  return p < 1 ? p : 1;
}

static json_t *state_json(const struct sdapi_progress *p)
{
  char stamp[32] = "0";
  time_t started = (time_t)p->started;
  struct tm tm;

  if (p->job) {
    gmtime_r(&started, &tm);
    strftime(stamp, sizeof stamp, "%Y%m%d%H%M%S", &tm);
  }
  return json_pack("{s:b,s:b,s:b,s:o,s:i,s:s,s:i,s:i,s:i}", "skipped", p->is_skipped, "interrupted", p->is_interrupted, "stopping_generation", 0, "job",
                   json_make_text(p->job ? p->job : ""), "job_count", p->job ? p->n : 0, "job_timestamp", stamp, "job_no", p->job ? p->picture : 0,
                   "sampling_step", p->job ? p->step : 0, "sampling_steps", p->job ? p->steps : 0);
}

int sdapi_encode_progress(struct buf *out, const struct sdapi_progress *p, struct err *e)
{
  struct err none = {0};

  e = e ? e : &none;
  if (buf_add_str(out, "{\"current_image\":", e) || (p->file ? buf_add_str(out, "\"", e) || base64_encode(out, p->file, p->len, e) || buf_add_str(out, "\",", e)
                                                              : buf_add_str(out, "null,", e)))
    return e->code;
  return json_add_value(out,
                        json_pack("{s:f,s:f,s:o,s:o}", "progress", p->progress, "eta_relative", p->eta_s, "state", state_json(p), "textinfo",
                                  p->text ? json_make_text(p->text) : json_null()),
                        1, e);
}

/* ---- what SD.Next and gradio tell ---- */

static json_t *memory_json(const struct sdapi_server *s)
{
  const double gib = 1 << 30;

  return json_pack("{s:{s:f,s:f,s:f}}", "ram", "free", (double)(s->memory_total - s->memory_used) / gib, "used", (double)s->memory_used / gib, "total",
                   (double)s->memory_total / gib);
}

int sdapi_encode_status(struct buf *out, const struct sdapi_status *s, struct err *e)
{
  char uptime[32], stamp[32];
  time_t now = (time_t)s->now;
  struct tm tm;

  gmtime_r(&now, &tm);
  strftime(stamp, sizeof stamp, "%Y-%m-%d %H:%M:%S", &tm);
  snprintf(uptime, sizeof uptime, "%lld:%02d:%02d", (long long)s->up_s / 3600, (int)(s->up_s / 60 % 60), (int)(s->up_s % 60));
  return json_add_value(out,
                        json_pack("{s:{s:s,s:o},s:s,s:s,s:o,s:o,s:n,s:n,s:n,s:n,s:n,s:n,s:n,s:n}", "version", "app", "safelight", "version",
                                  json_make_text(s->server->version), "uptime", uptime, "timestamp", stamp, "state",
                                  s->has_state ? state_json(s->progress) : json_null(), "memory", s->has_memory ? memory_json(s->server) : json_null(),
                                  "platform", "torch", "gpu", "optimizations", "crossatention", "device", "backend", "pipeline"),
                        0, e);
}

int sdapi_encode_queue(struct buf *out, int waiting, double eta_s, struct err *e)
{
  return json_add_value(out,
                        json_pack("{s:s,s:n,s:i,s:n,s:n,s:n,s:f}", "msg", "estimation", "rank", "queue_size", waiting, "avg_event_process_time",
                                  "avg_event_concurrent_process_time", "rank_eta", "queue_eta", eta_s),
                        0, e);
}

int sdapi_encode_error(struct buf *out, const struct err *what, struct err *e)
{
  return json_add_value(out,
                        json_pack("{s:s,s:o,s:s,s:o,s:o}", "error", openai_error_name(what->code, what->field), "detail", json_make_text(what->msg), "body", "",
                                  "errors", json_make_text(what->msg), "param", *what->field ? json_make_text(what->field) : json_null()),
                        0, e);
}
