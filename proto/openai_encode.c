/*
 * openai_encode.c - results, errors and the model list as OpenAI clients read them. See openai.h.
 *
 * Called by server/encode.c and server/http.c. The pictures' base64 is written straight into the output, everything else
 * goes through jansson, so that no string of a client can break the JSON. Threads: pure functions.
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "proto/base64.h"
#include "proto/json_add.h"
#include "proto/openai.h"
#include "proto/sse.h"

/* One row per E_* code: what HTTP, people and the OpenAI SDKs are told. */
static const struct {
  int code, status;
  const char *type, *name;
} statuses[] = {
    {E_ARG, 400, "invalid_request_error", "invalid_value"},
    {E_AUTH, 401, "authentication_error", "invalid_api_key"},
    {E_NOTFOUND, 404, "invalid_request_error", "not_found"},
    {E_METHOD, 405, "invalid_request_error", "method_not_allowed"},
    {E_TOOBIG, 413, "invalid_request_error", "request_too_large"},
    {E_TYPE, 415, "invalid_request_error", "unsupported_media_type"},
    {E_CONFLICT, 422, "invalid_request_error", "idempotency_conflict"}, /* not 409, which SDKs try again */
    {E_BUSY, 429, "rate_limit_error", "queue_full"},
    {E_CANCEL, 499, "invalid_request_error", "cancelled"},
    {E_GONE, 499, "invalid_request_error", "client_closed_request"},
    {E_INTERNAL, 500, "server_error", "internal_error"},
    {E_FILE, 500, "server_error", "bad_file"},
    {E_CRASHED, 500, "server_error", "crashed"},
    {E_ABSENT, 501, "invalid_request_error", "not_implemented"},
    {E_NOMEM, 503, "server_error", "out_of_memory"},
    {E_POLICY, 503, "server_error", "safety_unavailable"},
    {E_DEVICE, 503, "server_error", "device_failed"},
    {E_NOTREADY, 503, "server_error", "not_ready"},
    {E_TIMEOUT, 504, "server_error", "deadline_exceeded"},
    {E_FULL, 507, "server_error", "disk_full"},
};

enum { STATUSES = sizeof statuses / sizeof *statuses };

static int status_row(int code)
{
  int internal = 0;

  for (int i = 0; i < STATUSES; i++) {
    if (statuses[i].code == code)
      return i;
    if (statuses[i].code == E_INTERNAL)
      internal = i;
  }
  return internal;
}

int openai_status(int code)
{
  return statuses[status_row(code)].status;
}

const char *openai_error_name(int code, const char *field)
{
  if (code == E_NOTFOUND && !strcmp(field, "model"))
    return "model_not_found"; /* the code that OpenAI's clients look for */
  return statuses[status_row(code)].name;
}

int openai_error_code(const char *name)
{
  for (int i = 0; i < STATUSES; i++)
    if (!strcmp(statuses[i].name, name))
      return statuses[i].code;
  return !strcmp(name, "model_not_found") ? E_NOTFOUND : E_INTERNAL;
}

int openai_encode_error(struct buf *out, const struct err *what, struct err *e)
{
  return json_add_value(out, json_pack("{s:{s:o,s:s,s:o,s:s}}", "error", "message", json_make_text(what->msg), "type",
                                 statuses[status_row(what->code)].type, "param", *what->field ? json_make_text(what->field) : json_null(),
                                 "code", openai_error_name(what->code, what->field)),
                  0, e);
}

const char *openai_format_name(enum image_format format)
{
  return format == IMAGE_JPEG ? "jpeg" : format == IMAGE_WEBP ? "webp" : "png";
}

static json_t *times_json(const struct stage_times *t)
{
  return json_pack("{s:f,s:f,s:f,s:f,s:f,s:f}", "queue_ms", t->queue, "text_ms", t->text, "unet_ms", t->unet, "vae_ms", t->vae,
                   "png_ms", t->png, "total_ms", t->total);
}

static json_t *optional_json(const char *s)
{
  return s && *s ? json_make_text(s) : json_null();
}

/* What a picture was drawn under, beside each. */
static json_t *drawn_under_json(const struct recipe *p)
{
  return json_pack("{s:o,s:o,s:o,s:b}", "generation_id", optional_json(p->generation_id), "generation_digest",
                   optional_json(p->generation_digest), "profile", optional_json(p->profile), "requires_nothing", p->requires_nothing);
}

/* Our own part of the answer: all that is needed to draw the picture again. */
static json_t *recipe_json(const struct openai_result *r)
{
  const struct recipe *p = r->recipe;

  return json_pack("{s:o,s:I,s:i,s:o,s:b,s:f,s:i,s:i,s:i,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:o,s:b}", "model", json_make_text(p->model), "seed",
                   (json_int_t)p->seed, "steps", p->steps, "sampler", json_make_text(p->sampler), "karras", p->karras,
                   "guidance_scale", (double)p->guidance, "width", p->width, "height", p->height, "clip_skip", p->clip_skip,
                   "negative_prompt", json_make_text(p->negative), "model_digest", json_make_text(p->model_digest), "version",
                   json_make_text(p->version), "request_id", json_make_text(r->request_id), "times", times_json(r->times), "generation_id",
                   optional_json(p->generation_id), "generation_digest", optional_json(p->generation_digest), "profile",
                   optional_json(p->profile), "styles", optional_json(p->styles), "requires_nothing", p->requires_nothing);
}

/* One entry of data: the file as base64 or where it is. */
static int add_picture(struct buf *out, const struct openai_picture *p, const struct recipe *recipe, struct err *e)
{
  if (p->url) {
    if (buf_add_str(out, "{\"b64_json\":null,\"url\":", e) || json_add_value(out, json_make_text(p->url), 0, e))
      return e->code;
  } else if (buf_add_str(out, "{\"b64_json\":\"", e) || base64_encode(out, p->file, p->len, e) || buf_add_str(out, "\",\"url\":null", e)) {
    return e->code;
  }
  if (buf_addf(out, e, ",\"revised_prompt\":null,\"seed\":%llu,\"safelight\":", (unsigned long long)p->seed) ||
      json_add_value(out, drawn_under_json(recipe), 0, e))
    return e->code;
  return buf_add_str(out, "}", e);
}

static json_t *usage_json(int text_tokens, int image_tokens)
{
  return json_pack("{s:i,s:{s:i,s:i},s:i,s:i,s:{s:i,s:i}}", "input_tokens", text_tokens, "input_tokens_details", "text_tokens", text_tokens,
                   "image_tokens", 0, "output_tokens", image_tokens, "total_tokens", text_tokens + image_tokens, "output_tokens_details",
                   "image_tokens", image_tokens, "text_tokens", 0);
}

int openai_encode_result(struct buf *out, const struct openai_result *r, struct err *e)
{
  char size[32];

  if (buf_addf(out, e, "{\"created\":%lld,\"data\":[", (long long)r->created))
    return e->code;
  for (int i = 0; i < r->n; i++)
    if ((i && buf_add_str(out, ",", e)) || add_picture(out, &r->picture[i], r->recipe, e))
      return e->code;
  if (buf_add_str(out, "],", e))
    return e->code;
  snprintf(size, sizeof size, "%dx%d", r->recipe->width, r->recipe->height);
  return json_add_value(out,
                  json_pack("{s:s,s:s,s:s,s:s,s:o,s:o}", "background", "opaque", "output_format", openai_format_name(r->format), "quality", "auto",
                            "size", size, "usage", usage_json(r->text_tokens, r->image_tokens), "safelight", recipe_json(r)),
                  1, e);
}

/* ---- events of a stream ---- */

/* The part of an event that its pictures share, between the base64 and the end. */
static json_t *event_json(const struct openai_event *v)
{
  char size[32];

  snprintf(size, sizeof size, "%dx%d", v->width, v->height);
  return json_pack("{s:I,s:s,s:s,s:s,s:s}", "created_at", (json_int_t)v->created, "size", size, "quality", "auto", "background", "opaque",
                   "output_format", openai_format_name(v->format));
}

static int begin_event(struct buf *out, const struct openai_event *v, const char *kind, struct err *e)
{
  char name[48];

  snprintf(name, sizeof name, "%s.%s", v->is_edit ? "image_edit" : "image_generation", kind);
  return sse_begin(out, name, -1, e) || buf_addf(out, e, "{\"type\":\"%s\",\"b64_json\":\"", name) || base64_encode(out, v->file, v->len, e) ||
                 buf_add_str(out, "\",", e)
             ? e->code
             : 0;
}

int openai_encode_partial(struct buf *out, const struct openai_event *v, int partial, struct err *e)
{
  json_t *rest = event_json(v);

  if (rest && (json_object_set_new(rest, "partial_image_index", json_integer(partial)) ||
               json_object_set_new(rest, "picture_index", json_integer(v->picture)))) {
    json_decref(rest);
    rest = NULL;
  }
  if (begin_event(out, v, "partial_image", e)) {
    json_decref(rest);
    return e->code;
  }
  return json_add_value(out, rest, 1, e) || sse_end(out, e) ? e->code : 0;
}

int openai_encode_completed(struct buf *out, const struct openai_event *v, const struct openai_result *r, struct err *e)
{
  json_t *rest = event_json(v);

  if (rest && (json_object_set_new(rest, "picture_index", json_integer(v->picture)) ||
               json_object_set_new(rest, "seed", json_integer((json_int_t)r->recipe->seed)) ||
               json_object_set_new(rest, "usage", usage_json(r->text_tokens, r->image_tokens)) ||
               json_object_set_new(rest, "safelight", recipe_json(r)))) {
    json_decref(rest);
    rest = NULL;
  }
  if (begin_event(out, v, "completed", e)) {
    json_decref(rest);
    return e->code;
  }
  return json_add_value(out, rest, 1, e) || sse_end(out, e) ? e->code : 0;
}

int openai_encode_error_event(struct buf *out, const struct err *what, struct err *e)
{
  return sse_begin(out, "error", -1, e) || openai_encode_error(out, what, e) || sse_end(out, e) ? e->code : 0;
}

static json_t *limits_json(const struct openai_model *m)
{
  const struct request_limits *l = m->lim;
  json_t *samplers = json_array();

  for (const char *const *s = m->samplers; *s; s++)
    json_array_append_new(samplers, json_string(*s));
  return json_pack("{s:i,s:i,s:i,s:i,s:i,s:f,s:f,s:i,s:o,s:o,s:i,s:o,s:o}", "default_size", l->default_size, "size_multiple",
                   l->size_multiple, "max_size", l->max_size, "default_steps", l->default_steps, "max_steps", l->max_steps,
                   "default_guidance", (double)l->default_guidance, "max_guidance", (double)l->max_guidance, "max_n", l->max_n,
                   "default_sampler", json_make_text(l->default_sampler), "samplers", samplers, "max_prompt_bytes",
                   REQUEST_PROMPT_MAX, "digest", json_make_text(m->digest), "version", json_make_text(m->version));
}

int openai_encode_models(struct buf *out, const struct openai_model *m, struct err *e)
{
  json_t *list = json_array();

  if (m)
    json_array_append_new(list, json_pack("{s:o,s:s,s:I,s:s,s:o}", "id", json_make_text(m->lim->model), "object", "model", "created",
                                          (json_int_t)m->created, "owned_by", "safelight", "safelight", limits_json(m)));
  return json_add_value(out, json_pack("{s:s,s:o}", "object", "list", "data", list), 0, e);
}
