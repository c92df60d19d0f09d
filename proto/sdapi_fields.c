/*
 * sdapi_fields.c - the fields of A1111 that have no effect here, override_settings, alwayson_scripts, and the tags in prompts. See sdapi_fields.h.
 *
 * Called by proto/sdapi.c. Threads: pure functions.
 */
#include "proto/sdapi_fields.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a field may say without changing a picture. */
enum idle {
  IDLE_ANY,     /* anything: it speaks of files, texts, or what another field has to switch on */
  IDLE_FALSE,   /* false */
  IDLE_TRUE,    /* true */
  IDLE_NOTHING, /* null, "", "None", [], {}, 0, false */
  IDLE_NUMBER   /* this number */
};

static const struct {
  const char *name;
  enum idle idle;
  double number;
} idle_fields[] = {
    /* files, answers and texts */
    {"do_not_save_samples", IDLE_ANY, 0}, {"do_not_save_grid", IDLE_ANY, 0}, {"save_images", IDLE_ANY, 0}, {"comments", IDLE_ANY, 0},
    {"force_task_id", IDLE_ANY, 0}, {"override_settings_restore_afterwards", IDLE_ANY, 0}, {"include_init_images", IDLE_ANY, 0},
    {"infotext", IDLE_NOTHING, 0}, {"styles", IDLE_NOTHING, 0},
    /* other noise */
    {"subseed", IDLE_ANY, 0}, {"subseed_strength", IDLE_NUMBER, 0}, {"seed_resize_from_h", IDLE_ANY, 0}, {"seed_resize_from_w", IDLE_ANY, 0},
    {"s_min_uncond", IDLE_NUMBER, 0}, {"s_churn", IDLE_NUMBER, 0}, {"s_tmax", IDLE_ANY, 0}, {"s_tmin", IDLE_ANY, 0}, {"s_noise", IDLE_NUMBER, 1},
    {"initial_noise_multiplier", IDLE_NUMBER, 1},
    /* passes behind and beside the first */
    {"restore_faces", IDLE_FALSE, 0}, {"tiling", IDLE_FALSE, 0}, {"enable_hr", IDLE_FALSE, 0}, {"hr_scale", IDLE_ANY, 0}, {"hr_upscaler", IDLE_ANY, 0},
    {"hr_second_pass_steps", IDLE_ANY, 0}, {"hr_resize_x", IDLE_ANY, 0}, {"hr_resize_y", IDLE_ANY, 0}, {"hr_checkpoint_name", IDLE_ANY, 0},
    {"hr_sampler_name", IDLE_ANY, 0}, {"hr_scheduler", IDLE_ANY, 0}, {"hr_prompt", IDLE_ANY, 0}, {"hr_negative_prompt", IDLE_ANY, 0},
    {"hr_cfg", IDLE_ANY, 0}, {"hr_distilled_cfg", IDLE_ANY, 0}, {"hr_additional_modules", IDLE_ANY, 0}, {"firstphase_width", IDLE_NUMBER, 0},
    {"firstphase_height", IDLE_NUMBER, 0}, {"firstpass_image", IDLE_NOTHING, 0}, {"refiner_checkpoint", IDLE_NOTHING, 0},
    {"refiner_switch_at", IDLE_ANY, 0}, {"script_name", IDLE_NOTHING, 0}, {"script_args", IDLE_ANY, 0},
    /* models of another kind */
    {"distilled_cfg_scale", IDLE_ANY, 0}, {"image_cfg_scale", IDLE_ANY, 0},
    /* img2img */
    {"latent_mask", IDLE_NOTHING, 0}, {"mask_round", IDLE_TRUE, 0},
};

static int is_nothing(const json_t *v)
{
  const char *s = json_string_value(v);

  if (s)
    return !*s || !strcasecmp(s, "none");
  if (json_is_array(v) || json_is_object(v))
    return !(json_is_array(v) ? json_array_size(v) : json_object_size(v));
  return !json_is_true(v) && (!json_is_number(v) || json_number_value(v) == 0);
}

static int idle_row(const char *name)
{
  for (size_t i = 0; i < sizeof idle_fields / sizeof *idle_fields; i++)
    if (!strcmp(name, idle_fields[i].name))
      return (int)i;
  return -1;
}

int sdapi_is_idle_field(const char *name)
{
  return idle_row(name) >= 0;
}

/* seed_resize_from_h and _w switch each other on, above 0. */
static int is_resized(const struct field_in *f)
{
  return !strncmp(f->name, "seed_resize_from_", 17) && json_number_value(f->v) > 0;
}

int sdapi_check_idle_field(const struct field_in *f, struct err *e)
{
  int i = idle_row(f->name);

  if (i < 0)
    return 1;
  if (is_resized(f))
    return err_field(e, E_ARG, f->name, "%s is not supported: leave it out or send -1", f->name);
  if (idle_fields[i].idle == IDLE_NUMBER && !(json_is_number(f->v) && json_number_value(f->v) == idle_fields[i].number))
    return err_field(e, E_ARG, f->name, "%s is not supported: leave it out or send %g", f->name, idle_fields[i].number);
  if (idle_fields[i].idle == IDLE_TRUE && !json_is_true(f->v))
    return err_field(e, E_ARG, f->name, "%s is not supported: leave it out or send true", f->name);
  if ((idle_fields[i].idle == IDLE_FALSE && !json_is_false(f->v)) || (idle_fields[i].idle == IDLE_NOTHING && !is_nothing(f->v)))
    return err_field(e, E_ARG, f->name, "%s is not supported: leave it out%s", f->name, idle_fields[i].idle == IDLE_FALSE ? " or send false" : "");
  return 0;
}

/* ---- override_settings ---- */

int sdapi_is_model(const char *name, const struct request_limits *lim)
{
  size_t n = strlen(lim->model);

  return !strncmp(name, lim->model, n) && (!name[n] || !strcmp(name + n, ".safetensors") || !strncmp(name + n, " [", 2) ||
                                           !strncmp(name + n, ".safetensors [", 14));
}

static int setting_model(const struct field_in *f, struct request *r, struct err *e)
{
  const char *s = json_string_value(f->v);

  (void)r;
  if (s && (!*s || sdapi_is_model(s, f->lim)))
    return 0;
  return err_field(e, E_ARG, f->name, "%s must be \"%s\", the one this server serves", f->name, f->lim->model);
}

static int setting_clip_skip(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, REQUEST_CLIP_SKIP_MAX, &r->clip_skip, e);
}

static int setting_format(const struct field_in *f, struct request *r, struct err *e)
{
  static const enum image_format formats[] = {IMAGE_PNG, IMAGE_JPEG, IMAGE_JPEG, IMAGE_WEBP};
  int i;

  if (field_word(f, f->lim->offers & REQUEST_OFFERS_FORMATS ? "png|jpg|jpeg|webp" : "png", &i, e))
    return E_ARG;
  r->format = formats[i];
  return 0;
}

static int setting_quality(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, 100, &r->quality, e);
}

static int setting_vae(const struct field_in *f, struct request *r, struct err *e)
{
  const char *s = json_string_value(f->v);

  (void)r;
  return is_nothing(f->v) || (s && !strcasecmp(s, "automatic")) ? 0 : field_wrong(f, e, "\"Automatic\": the model's own is the only one");
}

static int setting_random(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_word(f, "CPU", NULL, e);
}

static int setting_nothing(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return is_nothing(f->v) ? 0 : err_field(e, E_ARG, f->name, "%s is not supported: leave it out", f->name);
}

static const struct field settings[] = {
    {"sd_model_checkpoint", setting_model},
    {"CLIP_stop_at_last_layers", setting_clip_skip},
    {"samples_format", setting_format},
    {"jpeg_quality", setting_quality},
    {"sd_vae", setting_vae},
    {"randn_source", setting_random},
    {"eta_noise_seed_delta", setting_nothing},
    {"sd_lora", setting_nothing},
    {"forge_additional_modules", setting_nothing},
    {"sd_hypernetwork", setting_nothing},
    {"img2img_color_correction", setting_nothing},
    {"token_merging_ratio", setting_nothing},
    {"token_merging_ratio_img2img", setting_nothing},
};

/* Settings that speak of A1111's disk and page alone. */
static int is_housekeeping(const char *name)
{
  static const char *const start[] = {"save_", "grid_", "outdir_", "samples_save", "samples_filename", "live_preview",
                                      "show_progress", "do_not_", "return_", "use_original_name"};

  for (size_t i = 0; i < sizeof start / sizeof *start; i++)
    if (!strncmp(name, start[i], strlen(start[i])))
      return 1;
  return 0;
}

int sdapi_decode_override(const struct field_in *f, struct request *r, struct err *e)
{
  char field[sizeof e->field];
  const char *name;
  json_t *v;

  if (!json_is_object(f->v))
    return field_wrong(f, e, "an object");
  json_object_foreach((json_t *)(uintptr_t)f->v, name, v) {
    const struct field *known = field_find(settings, sizeof settings / sizeof *settings, name);
    struct field_in in = {field, v, f->lim, f->more};
    if (!known && is_housekeeping(name))
      continue;
    if (!known)
      return field_unknown(name, NULL, e), err_wrap(e, "override_settings");
    snprintf(field, sizeof field, "override_settings.%s", name);
    if (!json_is_null(v) && known->decode(&in, r, e))
      return e->code;
  }
  return 0;
}

/* ---- alwayson_scripts ---- */

/* A script is off when it has no arguments, its first one is false, or each of them is an object that says that it is not enabled: the ways in which
 * clients send ADetailer's and ControlNet's. */
static int is_off(const json_t *script)
{
  const json_t *args = json_is_object(script) ? json_object_get(script, "args") : script;
  size_t n = json_array_size(args);

  if (!args || json_is_null(args) || (json_is_array(args) && (!n || json_is_false(json_array_get(args, 0)))))
    return 1;
  for (size_t i = 0; i < n; i++)
    if (!json_is_false(json_object_get(json_array_get(args, i), "enabled")))
      return 0;
  return n > 0;
}

int sdapi_decode_scripts(const struct field_in *f, struct request *r, struct err *e)
{
  const char *name;
  json_t *v;

  (void)r;
  if (json_is_array(f->v) && !json_array_size(f->v))
    return 0; /* what PHP makes of an empty object */
  if (!json_is_object(f->v))
    return field_wrong(f, e, "an object");
  json_object_foreach((json_t *)(uintptr_t)f->v, name, v)
    if (!is_off(v))
      return err_field(e, E_ARG, f->name, "%s: the script \"%.40s\" is not supported: leave it out", f->name, name);
  return 0;
}

/* ---- tags in prompts ---- */

static int bad_tag(struct err *e, const char *tag, size_t n, const char *why)
{
  char shown[65];
  size_t cut = n < sizeof shown ? n : sizeof shown - 1;

  while (cut < n && cut && ((unsigned char)tag[cut] & 0xc0) == 0x80)
    cut--;
  memcpy(shown, tag, cut);
  shown[cut] = 0;
  return err_field(e, E_ARG, "prompt", "prompt: the tag %s %s", shown, why);
}

/* A number of a tag at s that ends at end; te= and unet= may stand before it. */
static int tag_weight(const char *s, const char *end, double *out)
{
  char text[32];
  char *stop;
  size_t skip = !strncmp(s, "te=", 3) ? 3 : !strncmp(s, "unet=", 5) ? 5 : 0, n = (size_t)(end - s);

  if (n <= skip || n - skip >= sizeof text || !strchr("+-.0123456789", s[skip]))
    return 0;
  memcpy(text, s + skip, n - skip);
  text[n - skip] = 0;
  *out = strtod(text, &stop);
  return !*stop && fabs(*out) <= 100; /* false for NaN */
}

/* One tag from < to behind its >: "lora:NAME", "lora:NAME:W", "lora:NAME:W:W". */
static int take_tag(struct request *r, const char *tag, size_t n, struct err *e)
{
  const char *name = memchr(tag, ':', n) + 1, *end = tag + n - 1, *at = memchr(name, ':', (size_t)(end - name));
  size_t len = (size_t)((at ? at : end) - name);
  struct request_lora *l = &r->lora[r->n_loras];
  double weight = 1, other;
  int k = 0;

  if (!len || len >= sizeof l->name)
    return bad_tag(e, tag, n, "needs a name of at most 63 bytes");
  while (at) {
    const char *next = memchr(at + 1, ':', (size_t)(end - at - 1));
    if (!tag_weight(at + 1, next ? next : end, &other))
      return bad_tag(e, tag, n, "must have the form <lora:NAME:WEIGHT> with a weight between -100 and 100");
    if (k++ && other != weight)
      return bad_tag(e, tag, n, "has two weights, which is not supported");
    weight = other;
    at = next;
  }
  if (r->n_loras == REQUEST_LORAS_MAX)
    return bad_tag(e, tag, n, "is one too many: 8 are allowed");
  memcpy(l->name, name, len);
  l->name[len] = 0;
  l->scale = (float)weight;
  r->n_loras++;
  return 0;
}

/* Length of the tag at s, 0 when there is none that has a meaning. A1111: <WORD:ANYTHING-BUT->>. */
static size_t tag_length(const char *s)
{
  static const char *const known[] = {"<lora:", "<lyco:", "<hypernet:"};
  const char *end;

  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    size_t n = strlen(known[i]);
    if (!strncmp(s, known[i], n) && (end = strchr(s + n, '>')) && end > s + n)
      return (size_t)(end - s) + 1;
  }
  return 0;
}

int sdapi_take_tags(struct request *r, int is_dropped, struct err *e)
{
  char *to = r->prompt;
  const char *from = r->prompt;

  while (*from) {
    size_t n = *from == '<' ? tag_length(from) : 0;
    if (!n) {
      *to++ = *from++;
      continue;
    }
    if (from[1] == 'h' && !is_dropped)
      return bad_tag(e, from, n, "is not supported: there are no hypernetworks here");
    if (!is_dropped && take_tag(r, from, n, e))
      return e->code;
    from += n;
  }
  *to = 0;
  r->prompt_len = (size_t)(to - r->prompt);
  return 0;
}
