/*
 * openai.c - decoding the OpenAI routes and native jobs, which take the same fields: one table of fields, one function each. See openai.h for them.
 *
 * Called by server/http.c, proto/openai_edit.c and the fuzz targets. The jansson tree lives and dies in body_begin .. body_end.
 * Threads: pure functions.
 */
#include "proto/openai.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "proto/openai_fields.h"

/* ---- one function per field ---- */

static int decode_prompt(const struct field_in *f, struct request *r, struct err *e)
{
  return field_text(f, r->prompt, REQUEST_PROMPT_MAX, &r->prompt_len, e);
}

static int decode_negative(const struct field_in *f, struct request *r, struct err *e)
{
  return field_text(f, r->negative, REQUEST_PROMPT_MAX, &r->negative_len, e);
}

static int decode_model(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  if (!json_is_string(f->v))
    return field_wrong(f, e, "a string");
  if (strcmp(json_string_value(f->v), f->lim->model))
    return err_field(e, E_NOTFOUND, f->name, "model must be \"%s\", the one this server serves", f->lim->model);
  return 0;
}

static int decode_n(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, f->lim->max_n, &r->n, e);
}

/* "WxH" in plain decimal, nothing else. */
static int decode_size(const struct field_in *f, struct request *r, struct err *e)
{
  const char *s = json_string_value(f->v);
  long side[2] = {0, 0};
  char *end;
  int i;

  if (s && !strcmp(s, "auto"))
    return 0;
  for (i = 0; s && i < 2; i++) {
    if (*s < '0' || *s > '9')
      break;
    side[i] = strtol(s, &end, 10);
    if (*end != (i ? 0 : 'x'))
      break;
    s = end + 1;
  }
  if (i < 2)
    return err_field(e, E_ARG, f->name, "size must be \"WIDTHxHEIGHT\" in pixels, such as \"%dx%d\", or \"auto\"",
                     f->lim->default_size, f->lim->default_size);
  if (field_side(f, side[0], e) || field_side(f, side[1], e))
    return E_ARG;
  r->width = (int)side[0];
  r->height = (int)side[1];
  return 0;
}

static int decode_width(const struct field_in *f, struct request *r, struct err *e)
{
  return field_get_side(f, &r->width, e);
}

static int decode_height(const struct field_in *f, struct request *r, struct err *e)
{
  return field_get_side(f, &r->height, e);
}

static int decode_seed(const struct field_in *f, struct request *r, struct err *e)
{
  int64_t v;

  if (field_int(f, -1, INT64_MAX, &v, e))
    return E_ARG;
  r->has_seed = v >= 0;
  r->seed = v >= 0 ? (uint64_t)v : 0;
  return 0;
}

static int decode_steps(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, f->lim->max_steps, &r->steps, e);
}

static int decode_guidance(const struct field_in *f, struct request *r, struct err *e)
{
  double d;

  if (field_number(f, 0, (double)f->lim->max_guidance, &d, e))
    return E_ARG;
  r->guidance = (float)d;
  return 0;
}

static int decode_sampler(const struct field_in *f, struct request *r, struct err *e)
{
  return field_text(f, r->sampler, REQUEST_SAMPLER_MAX - 1, NULL, e);
}

static int decode_karras(const struct field_in *f, struct request *r, struct err *e)
{
  return field_flag(f, &r->karras, e);
}

static int decode_clip_skip(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 1, REQUEST_CLIP_SKIP_MAX, &r->clip_skip, e);
}

static int lora_entry(const char *field, const json_t *v, struct request_lora *l, struct err *e)
{
  static const char *const keys[] = {"name", "scale"};
  const json_t *name = json_object_get(v, keys[0]), *scale = json_object_get(v, keys[1]);
  struct field_in in = {field, name, NULL, NULL};

  if (!json_is_object(v) || json_object_size(v) != (size_t)(!!name + !!scale))
    return err_field(e, E_ARG, field, "%s must be an object with \"name\" and \"scale\" and nothing else", field);
  if (!name || field_text(&in, l->name, sizeof l->name - 1, NULL, e))
    return err_field(e, E_ARG, field, "%s needs a name", field);
  l->scale = scale ? (float)json_number_value(scale) : 1;
  if (scale && (!json_is_number(scale) || !(fabs(json_number_value(scale)) <= 100)))
    return err_field(e, E_ARG, field, "%s: scale must be a number between -100 and 100", field);
  return 0;
}

static int decode_loras(const struct field_in *f, struct request *r, struct err *e)
{
  size_t n = json_array_size(f->v);
  char field[32];

  if (!json_is_array(f->v) || n > REQUEST_LORAS_MAX)
    return err_field(e, E_ARG, f->name, "%s must be a list of at most %d entries", f->name, REQUEST_LORAS_MAX);
  for (size_t i = 0; i < n; i++) {
    snprintf(field, sizeof field, "loras[%zu]", i);
    if (lora_entry(field, json_array_get(f->v, i), &r->lora[i], e))
      return e->code;
  }
  r->n_loras = (int)n;
  return 0;
}

/* ---- the form of the answer ---- */

static int decode_response_format(const struct field_in *f, struct request *r, struct err *e)
{
  struct openai_more *m = f->more;

  (void)r;
  if (field_word(f, "b64_json|url", &m->is_url, e))
    return E_ARG;
  if (m->is_url && !(f->lim->offers & REQUEST_OFFERS_URL))
    return err_field(e, E_ARG, f->name, "response_format \"url\" is not supported: this server keeps no pictures; use "
                                        "\"b64_json\", or send \"Accept: image/png\" for the picture itself");
  return 0;
}

static int decode_output_format(const struct field_in *f, struct request *r, struct err *e)
{
  static const enum image_format formats[] = {IMAGE_PNG, IMAGE_JPEG, IMAGE_WEBP};
  int i;

  if (field_word(f, f->lim->offers & REQUEST_OFFERS_FORMATS ? "png|jpeg|webp" : "png", &i, e))
    return E_ARG;
  r->format = formats[i];
  return 0;
}

/* OpenAI's 0 is the smallest file, and 100 the best picture: our quality, but for its 0. */
static int decode_compression(const struct field_in *f, struct request *r, struct err *e)
{
  if (field_small(f, 0, 100, &r->quality, e))
    return E_ARG;
  r->quality = r->quality ? r->quality : 1;
  return 0;
}

static int decode_stream(const struct field_in *f, struct request *r, struct err *e)
{
  struct openai_more *m = f->more;

  (void)r;
  if (field_flag(f, &m->is_stream, e))
    return E_ARG;
  if (m->is_stream && m->surface == OPENAI_JOB)
    return err_field(e, E_ARG, f->name, "a job does not stream: leave stream out and read /v1/jobs/ID/events");
  if (m->is_stream && !(f->lim->offers & REQUEST_OFFERS_STREAM))
    return err_field(e, E_ARG, f->name, "stream true is not supported yet; leave it out");
  return 0;
}

static int decode_partial_images(const struct field_in *f, struct request *r, struct err *e)
{
  return field_small(f, 0, REQUEST_PREVIEWS_MAX, &r->previews, e);
}

/* ---- hints and labels, which change nothing here ---- */

static int decode_quality(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_word(f, "auto|low|medium|high|standard|hd", NULL, e);
}

static int decode_style(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_word(f, "vivid|natural", NULL, e);
}

static int decode_background(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_word(f, "auto|opaque", NULL, e);
}

static int decode_moderation(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_word(f, "auto|low", NULL, e);
}

static int decode_fidelity(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return field_word(f, "low|high", NULL, e);
}

static int decode_user(const struct field_in *f, struct request *r, struct err *e)
{
  char name[257];

  (void)r;
  return field_text(f, name, sizeof name - 1, NULL, e);
}

static int decode_metadata(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  if (!json_is_object(f->v))
    return field_wrong(f, e, "an object");
  if (((struct openai_more *)f->more)->surface == OPENAI_JOB && json_dumpb(f->v, NULL, 0, JSON_COMPACT) > OPENAI_METADATA_MAX)
    return err_field(e, E_ARG, f->name, "%s must be at most %d bytes of JSON", f->name, OPENAI_METADATA_MAX);
  return 0;
}

/* ---- a first picture ---- */

static int decode_strength(const struct field_in *f, struct request *r, struct err *e)
{
  struct openai_more *m = f->more;
  double d;

  if (field_number(f, 0, 1, &d, e))
    return E_ARG;
  if (!((float)d > 0))
    return field_wrong(f, e, "above 0: with nothing drawn anew there is nothing to do");
  r->strength = (float)d;
  m->has_strength = 1;
  return 0;
}

static int decode_image(const struct field_in *f, struct request *r, struct err *e)
{
  struct first *first = ((struct openai_more *)f->more)->first;

  (void)r;
  return first_take(first, FIRST_INIT, f, e);
}

static int decode_mask(const struct field_in *f, struct request *r, struct err *e)
{
  struct first *first = ((struct openai_more *)f->more)->first;

  (void)r;
  return first_take(first, FIRST_MASK, f, e);
}

static const struct field fields[] = {
    {"prompt", decode_prompt},
    {"model", decode_model},
    {"n", decode_n},
    {"size", decode_size},
    {"width", decode_width},
    {"height", decode_height},
    {"seed", decode_seed},
    {"steps", decode_steps},
    {"guidance_scale", decode_guidance},
    {"negative_prompt", decode_negative},
    {"sampler", decode_sampler},
    {"karras", decode_karras},
    {"clip_skip", decode_clip_skip},
    {"loras", decode_loras},
    {"response_format", decode_response_format},
    {"output_format", decode_output_format},
    {"output_compression", decode_compression},
    {"stream", decode_stream},
    {"partial_images", decode_partial_images},
    {"quality", decode_quality},
    {"style", decode_style},
    {"background", decode_background},
    {"moderation", decode_moderation},
    {"user", decode_user},
    {"metadata", decode_metadata},
};

/* What an edit takes beside them, as parts of a form whose files do not come here. */
static const struct field edit_fields[] = {
    {"strength", decode_strength},
    {"input_fidelity", decode_fidelity},
};

/* And a job, whose first picture is base64 in its JSON. */
static const struct field job_fields[] = {
    {"image", decode_image},
    {"mask", decode_mask},
    {"strength", decode_strength},
};

#define COUNT(a) (sizeof(a) / sizeof *(a))

/* Names that other servers use, so that the refusal can say ours. */
static const char *hint_for(const char *name)
{
  static const struct {
    const char *theirs, *ours;
  } hints[] = {
      {"cfg_scale", "guidance_scale"},  {"guidance", "guidance_scale"},      {"cfg", "guidance_scale"},
      {"num_inference_steps", "steps"}, {"num_steps", "steps"},              {"sampler_name", "sampler"},
      {"sampler_index", "sampler"},     {"scheduler", "sampler and karras"}, {"batch_size", "n"},
      {"n_iter", "n"},                  {"num_images", "n"},                 {"negative", "negative_prompt"},
      {"clipskip", "clip_skip"},        {"resolution", "size"},              {"denoising_strength", "strength"},
  };

  for (size_t i = 0; i < COUNT(hints); i++)
    if (!strcmp(name, hints[i].theirs))
      return hints[i].ours;
  return NULL;
}

static const struct field *find(const char *name, enum openai_surface surface)
{
  const struct field *f = field_find(fields, COUNT(fields), name);

  if (!f && surface == OPENAI_EDIT)
    f = field_find(edit_fields, COUNT(edit_fields), name);
  if (!f && surface == OPENAI_JOB)
    f = field_find(job_fields, COUNT(job_fields), name);
  return f;
}

/* What only the whole tells: how the answer is sent, and what goes with a first picture. */
static int finish(struct request *r, const struct openai_more *m, const struct request_limits *lim, struct err *e)
{
  int has_first = m->first && m->first->file[FIRST_INIT].p;
  int has_mask = m->first && m->first->file[FIRST_MASK].p;

  if (!r->width != !r->height)
    return err_field(e, E_ARG, r->width ? "height" : "width", "give width and height together");
  if (m->is_stream && m->is_url > 0)
    return err_field(e, E_ARG, "response_format", "a stream carries its pictures as b64_json; leave response_format out");
  if (r->previews && !m->is_stream && m->surface != OPENAI_JOB)
    return err_field(e, E_ARG, "partial_images", "partial_images needs stream true");
  if (!has_first && (has_mask || m->has_strength))
    return err_field(e, E_ARG, has_mask ? "mask" : "strength", "%s needs an image", has_mask ? "mask" : "strength");
  if (has_first && !m->has_strength)
    r->strength = has_mask ? 1 : 0.75f;
  if (!r->width && !has_first)
    r->width = r->height = lim->default_size;
  r->reply = m->is_stream ? REPLY_STREAM : m->is_url > 0 || (m->is_url < 0 && m->surface == OPENAI_JOB) ? REPLY_URL : REPLY_JSON;
  return 0;
}

int openai_fields_decode(struct request *r, json_t *root, struct openai_more *m, const struct request_limits *lim, struct err *e)
{
  const char *name;
  json_t *v;

  request_init(r, lim);
  m->is_url = -1;
  if (!json_object_get(root, "prompt"))
    return err_field(e, E_ARG, "prompt", "prompt is required: a string of at most %d bytes", REQUEST_PROMPT_MAX);
  if (json_object_get(root, "size") && (json_object_get(root, "width") || json_object_get(root, "height")))
    return err_field(e, E_ARG, "size", "give either size or width and height, not both");
  json_object_foreach(root, name, v) {
    const struct field *known = find(name, m->surface);
    struct field_in f = {name, v, lim, m};
    if (!known)
      return field_unknown(name, hint_for(name), e);
    /* SDKs send null for what was not given; a null prompt is a mistake. */
    if ((!json_is_null(v) || !strcmp(name, "prompt")) && known->decode(&f, r, e))
      return e->code;
  }
  return finish(r, m, lim, e);
}

static int decode_body(struct request *r, struct openai_more *m, const char *body, size_t len, const struct request_limits *lim, struct err *e)
{
  struct body b;
  struct err none = {0};
  int ret;

  e = e ? e : &none;
  if (body_begin(&b, body, len, e))
    return e->code;
  ret = openai_fields_decode(r, b.root, m, lim, e);
  return body_end(&b, ret, e);
}

int openai_decode(struct request *r, const char *body, size_t len, const struct request_limits *lim, struct err *e)
{
  struct openai_more m = {.surface = OPENAI_GENERATE};

  return decode_body(r, &m, body, len, lim, e);
}

int openai_decode_job(struct request *r, struct first *first, const char *body, size_t len, const struct request_limits *lim, struct err *e)
{
  struct openai_more m = {.surface = OPENAI_JOB, .first = first};
  int ret;

  first_init(first);
  ret = decode_body(r, &m, body, len, lim, e);
  if (ret)
    first_close(first);
  return ret;
}
