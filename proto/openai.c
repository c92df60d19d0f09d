/*
 * openai.c - decoding POST /v1/images/generations: one table of fields, one function each. See openai.h for the fields.
 *
 * Called by server/http.c and tests/fuzz/fuzz_json.c. The jansson tree lives and dies in openai_decode.
 * Threads: pure functions.
 */
#include "proto/openai.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/json_load.h"

/* What a field's function sees. */
struct field_in {
  const char *name;
  const json_t *v;
  const struct request_limits *lim;
};

static int wrong(const struct field_in *f, struct err *e, const char *want)
{
  return err_field(e, E_ARG, f->name, "%s must be %s", f->name, want);
}

/* Numbers that are whole count as integers, as JSON has only one kind of number. */
static int get_int(const struct field_in *f, int64_t lo, int64_t hi, int64_t *out, struct err *e)
{
  double d;

  if (json_is_integer(f->v)) {
    *out = json_integer_value(f->v);
  } else if (json_is_real(f->v)) {
    d = json_real_value(f->v);
    if (!(d == floor(d)))
      return err_field(e, E_ARG, f->name, "%s must be a whole number", f->name);
    if (!(d >= (double)lo && d <= (double)hi && fabs(d) < 9.2e18))
      return err_field(e, E_ARG, f->name, "%s must be between %lld and %lld", f->name, (long long)lo, (long long)hi);
    *out = (int64_t)d;
  } else {
    return wrong(f, e, "an integer");
  }
  if (*out < lo || *out > hi)
    return err_field(e, E_ARG, f->name, "%s must be between %lld and %lld", f->name, (long long)lo, (long long)hi);
  return 0;
}

static int get_small(const struct field_in *f, int lo, int hi, int *out, struct err *e)
{
  int64_t v;
  int r = get_int(f, lo, hi, &v, e);

  if (!r)
    *out = (int)v;
  return r;
}

static int get_text(const struct field_in *f, char *out, size_t max, size_t *len, struct err *e)
{
  size_t n;

  if (!json_is_string(f->v))
    return wrong(f, e, "a string");
  n = json_string_length(f->v);
  if (n > max)
    return err_field(e, E_ARG, f->name, "%s must be at most %zu bytes long; it has %zu", f->name, max, n);
  memcpy(out, json_string_value(f->v), n);
  out[n] = 0;
  if (len)
    *len = n;
  return 0;
}

/* The value must be one of the words in a "a|b|c" list. */
static int get_word(const struct field_in *f, const char *words, struct err *e)
{
  const char *s = json_string_value(f->v), *w = words;
  size_t n = s ? strlen(s) : 0;

  while (s && *w) {
    size_t len = strcspn(w, "|");
    if (len == n && !memcmp(w, s, n))
      return 0;
    w += len + (w[len] == '|');
  }
  return err_field(e, E_ARG, f->name, "%s must be one of %s", f->name, words);
}

static int side_check(const struct field_in *f, int64_t v, struct err *e)
{
  int m = f->lim->size_multiple;

  if (v < m || v > f->lim->max_size)
    return err_field(e, E_ARG, f->name, "%s: a side must be between %d and %d pixels", f->name, m, f->lim->max_size);
  if (v % m)
    return err_field(e, E_ARG, f->name, "%s: a side must be a multiple of %d pixels", f->name, m);
  return 0;
}

/* ---- one function per field ---- */

static int field_prompt(const struct field_in *f, struct request *r, struct err *e)
{
  return get_text(f, r->prompt, REQUEST_PROMPT_MAX, &r->prompt_len, e);
}

static int field_negative(const struct field_in *f, struct request *r, struct err *e)
{
  return get_text(f, r->negative, REQUEST_PROMPT_MAX, &r->negative_len, e);
}

static int field_model(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  if (!json_is_string(f->v))
    return wrong(f, e, "a string");
  if (strcmp(json_string_value(f->v), f->lim->model))
    return err_field(e, E_NOTFOUND, f->name, "model must be \"%s\", the one this server serves", f->lim->model);
  return 0;
}

static int field_n(const struct field_in *f, struct request *r, struct err *e)
{
  return get_small(f, 1, f->lim->max_n, &r->n, e);
}

/* "WxH" in plain decimal, nothing else. */
static int field_size(const struct field_in *f, struct request *r, struct err *e)
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
  if (side_check(f, side[0], e) || side_check(f, side[1], e))
    return E_ARG;
  r->width = (int)side[0];
  r->height = (int)side[1];
  return 0;
}

static int get_side(const struct field_in *f, int *out, struct err *e)
{
  int64_t v;

  if (get_int(f, 1, f->lim->max_size, &v, e) || side_check(f, v, e))
    return E_ARG;
  *out = (int)v;
  return 0;
}

static int field_width(const struct field_in *f, struct request *r, struct err *e)
{
  return get_side(f, &r->width, e);
}

static int field_height(const struct field_in *f, struct request *r, struct err *e)
{
  return get_side(f, &r->height, e);
}

static int field_seed(const struct field_in *f, struct request *r, struct err *e)
{
  int64_t v;

  if (get_int(f, -1, INT64_MAX, &v, e))
    return E_ARG;
  r->has_seed = v >= 0;
  r->seed = v >= 0 ? (uint64_t)v : 0;
  return 0;
}

static int field_steps(const struct field_in *f, struct request *r, struct err *e)
{
  return get_small(f, 1, f->lim->max_steps, &r->steps, e);
}

static int field_guidance(const struct field_in *f, struct request *r, struct err *e)
{
  double d = json_number_value(f->v);

  if (!json_is_number(f->v))
    return wrong(f, e, "a number");
  if (!(d >= 0 && d <= (double)f->lim->max_guidance))
    return err_field(e, E_ARG, f->name, "%s must be between 0 and %g", f->name, (double)f->lim->max_guidance);
  r->guidance = (float)d;
  return 0;
}

static int field_sampler(const struct field_in *f, struct request *r, struct err *e)
{
  return get_text(f, r->sampler, REQUEST_SAMPLER_MAX - 1, NULL, e);
}

static int field_karras(const struct field_in *f, struct request *r, struct err *e)
{
  if (!json_is_boolean(f->v))
    return wrong(f, e, "true or false");
  r->karras = json_is_true(f->v);
  return 0;
}

static int field_clip_skip(const struct field_in *f, struct request *r, struct err *e)
{
  return get_small(f, 1, REQUEST_CLIP_SKIP_MAX, &r->clip_skip, e);
}

static int lora_entry(const char *field, const json_t *v, struct request_lora *l, struct err *e)
{
  static const char *const keys[] = {"name", "scale"};
  const json_t *name = json_object_get(v, keys[0]), *scale = json_object_get(v, keys[1]);
  struct field_in in = {field, name, NULL};

  if (!json_is_object(v) || json_object_size(v) != (size_t)(!!name + !!scale))
    return err_field(e, E_ARG, field, "%s must be an object with \"name\" and \"scale\" and nothing else", field);
  if (!name || get_text(&in, l->name, sizeof l->name - 1, NULL, e))
    return err_field(e, E_ARG, field, "%s needs a name", field);
  l->scale = scale ? (float)json_number_value(scale) : 1;
  if (scale && (!json_is_number(scale) || !(fabs(json_number_value(scale)) <= 100)))
    return err_field(e, E_ARG, field, "%s: scale must be a number between -100 and 100", field);
  return 0;
}

static int field_loras(const struct field_in *f, struct request *r, struct err *e)
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

static int field_response_format(const struct field_in *f, struct request *r, struct err *e)
{
  const char *s = json_string_value(f->v);

  (void)r;
  if (s && !strcmp(s, "url"))
    return err_field(e, E_ARG, f->name, "response_format \"url\" is not supported: this server keeps no pictures; use "
                                        "\"b64_json\", or send \"Accept: image/png\" for the picture itself");
  return get_word(f, "b64_json", e);
}

static int field_output_format(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return get_word(f, "png", e);
}

static int field_stream(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  if (!json_is_boolean(f->v))
    return wrong(f, e, "true or false");
  if (json_is_true(f->v))
    return err_field(e, E_ARG, f->name, "stream true is not supported yet; leave it out");
  return 0;
}

static int field_partial_images(const struct field_in *f, struct request *r, struct err *e)
{
  int64_t v;

  (void)r;
  if (get_int(f, 0, 3, &v, e))
    return E_ARG;
  return v ? err_field(e, E_ARG, f->name, "partial_images must be 0: streaming is not supported yet") : 0;
}

static int field_compression(const struct field_in *f, struct request *r, struct err *e)
{
  int64_t v;

  (void)r;
  return get_int(f, 0, 100, &v, e);
}

static int field_quality(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return get_word(f, "auto|low|medium|high|standard|hd", e);
}

static int field_style(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return get_word(f, "vivid|natural", e);
}

static int field_background(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return get_word(f, "auto|opaque", e);
}

static int field_moderation(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return get_word(f, "auto|low", e);
}

static int field_user(const struct field_in *f, struct request *r, struct err *e)
{
  char name[257];

  (void)r;
  return get_text(f, name, sizeof name - 1, NULL, e);
}

static int field_metadata(const struct field_in *f, struct request *r, struct err *e)
{
  (void)r;
  return json_is_object(f->v) ? 0 : wrong(f, e, "an object");
}

static const struct {
  const char *name;
  int (*decode)(const struct field_in *f, struct request *r, struct err *e);
} fields[] = {
    {"prompt", field_prompt},
    {"model", field_model},
    {"n", field_n},
    {"size", field_size},
    {"width", field_width},
    {"height", field_height},
    {"seed", field_seed},
    {"steps", field_steps},
    {"guidance_scale", field_guidance},
    {"negative_prompt", field_negative},
    {"sampler", field_sampler},
    {"karras", field_karras},
    {"clip_skip", field_clip_skip},
    {"loras", field_loras},
    {"response_format", field_response_format},
    {"output_format", field_output_format},
    {"output_compression", field_compression},
    {"stream", field_stream},
    {"partial_images", field_partial_images},
    {"quality", field_quality},
    {"style", field_style},
    {"background", field_background},
    {"moderation", field_moderation},
    {"user", field_user},
    {"metadata", field_metadata},
};

/* Names that other servers use, so that the refusal can say ours. */
static const struct {
  const char *theirs, *ours;
} hints[] = {
    {"cfg_scale", "guidance_scale"},  {"guidance", "guidance_scale"},      {"cfg", "guidance_scale"},
    {"num_inference_steps", "steps"}, {"num_steps", "steps"},              {"sampler_name", "sampler"},
    {"sampler_index", "sampler"},     {"scheduler", "sampler and karras"}, {"batch_size", "n"},
    {"n_iter", "n"},                  {"num_images", "n"},                 {"negative", "negative_prompt"},
    {"clipskip", "clip_skip"},        {"resolution", "size"},
};

/* Fields that would have to do with adapters or safety; a client has no say in either. */
static int is_about_safety(const char *name)
{
  static const char *const words[] = {"safe", "lora", "adapter", "nsfw", "checker", "override_settings"};

  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    if (strcasestr(name, words[i]))
      return 1;
  return 0;
}

static int refuse_unknown(const char *name, struct err *e)
{
  char shown[sizeof e->field];

  /* Cut between characters: the name goes back to the client as JSON. */
  size_t n = strlen(name);
  if (n >= sizeof shown)
    for (n = sizeof shown - 1; n && ((unsigned char)name[n] & 0xc0) == 0x80; n--)
      ;
  memcpy(shown, name, n);
  shown[n] = 0;
  if (is_about_safety(name))
    return err_field(e, E_ARG, shown, "%s is not a field of this server: safety and adapters are the operator's policy and no "
                                      "request can name, scale or switch them off", shown);
  for (size_t i = 0; i < sizeof hints / sizeof *hints; i++)
    if (!strcmp(name, hints[i].theirs))
      return err_field(e, E_ARG, shown, "unknown field %s; the name here is %s", shown, hints[i].ours);
  return err_field(e, E_ARG, shown, "unknown field %s; it would be ignored, so it is refused", shown);
}

static int decode_field(const char *name, const json_t *v, struct request *r, const struct request_limits *lim, struct err *e)
{
  for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
    if (!strcmp(name, fields[i].name)) {
      struct field_in f = {name, v, lim};
      /* SDKs send null for what was not given; a null prompt is a mistake. */
      return json_is_null(v) && strcmp(name, "prompt") ? 0 : fields[i].decode(&f, r, e);
    }
  return refuse_unknown(name, e);
}

static int decode_object(struct request *r, json_t *root, const struct request_limits *lim, struct err *e)
{
  const char *name;
  json_t *v;

  if (!json_is_object(root))
    return err_set(e, E_ARG, "the body must be a JSON object");
  r->karras = -1;
  r->has_seed = 0;
  r->seed = 0;
  r->clip_skip = 0;
  r->n_loras = 0;
  r->format = IMAGE_PNG;
  r->quality = r->previews = 0;
  r->reply = REPLY_JSON;
  r->init = r->mask = NULL;
  r->strength = 1;
  r->n = 1;
  r->width = r->height = 0;
  r->steps = lim->default_steps;
  r->guidance = lim->default_guidance;
  r->prompt_len = r->negative_len = 0;
  r->prompt[0] = r->negative[0] = 0;
  memcpy(r->sampler, lim->default_sampler, sizeof r->sampler);
  if (!json_object_get(root, "prompt"))
    return err_field(e, E_ARG, "prompt", "prompt is required: a string of at most %d bytes", REQUEST_PROMPT_MAX);
  if (json_object_get(root, "size") && (json_object_get(root, "width") || json_object_get(root, "height")))
    return err_field(e, E_ARG, "size", "give either size or width and height, not both");
  json_object_foreach(root, name, v)
    if (decode_field(name, v, r, lim, e))
      return e->code;
  if (!r->width != !r->height)
    return err_field(e, E_ARG, r->width ? "height" : "width", "give width and height together");
  if (!r->width)
    r->width = r->height = lim->default_size;
  return 0;
}

/* ---- the ways a body can fail to be JSON ---- */

/* The offset of the first byte that is not UTF-8, or len. */
static size_t bad_utf8(const char *s, size_t len)
{
  size_t at = 0;
  utf8proc_int32_t c;

  while (at < len) {
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)s + at, (utf8proc_ssize_t)(len - at), &c);
    if (n <= 0)
      return at;
    at += (size_t)n;
  }
  return len;
}

/* Names the field that holds the bad byte: the byte becomes a control character escape-free marker that no valid body can
 * hold (U+FDD0, a noncharacter, three times), and the field whose value shows it is the one. */
static int refuse_utf8(const char *body, size_t len, size_t at, struct err *e)
{
  static const char mark[] = "\xef\xb7\x90\xef\xb7\x90\xef\xb7\x90";
  const char *name, *field = "";
  char *copy = malloc(len + sizeof mark);
  json_t *root = NULL, *v;
  size_t n = at;

  if (copy) {
    memcpy(copy, body, at);
    memcpy(copy + n, mark, sizeof mark - 1);
    n += sizeof mark - 1;
    for (size_t i = at + 1; i < len; i++) /* what follows may be bad too; ASCII keeps the structure */
      copy[n++] = (unsigned char)body[i] < 0x80 ? body[i] : '?';
    root = json_load_whole(copy, n, 0, NULL);
  }
  json_object_foreach(root, name, v)
    if (json_is_string(v) && strstr(json_string_value(v), mark)) {
      field = name;
      break;
    }
  err_field(e, E_ARG, field, "%s is not valid UTF-8 (byte 0x%02x at offset %zu of the body)", *field ? field : "the body",
            (unsigned char)body[at], at);
  json_decref(root);
  free(copy);
  return E_ARG;
}

/* A number too large for jansson's integers: read again as floating point, where the field's own bounds name it. */
static int refuse_overflow(struct request *r, const char *body, size_t len, const struct request_limits *lim, const char *text,
                           struct err *e)
{
  json_t *root = json_load_whole(body, len, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, NULL);

  if (root)
    (void)!decode_object(r, root, lim, e);
  json_decref(root);
  return err_set(e, E_ARG, "malformed JSON: %s", text); /* e keeps the field's sentence when there is one */
}

int openai_decode(struct request *r, const char *body, size_t len, const struct request_limits *lim, struct err *e)
{
  json_error_t je;
  json_t *root;
  size_t bad = bad_utf8(body, len);
  int ret;

  if (bad < len)
    return refuse_utf8(body, len, bad, e);
  root = json_load_whole(body, len, JSON_REJECT_DUPLICATES, &je);
  if (!root && json_error_code(&je) == json_error_numeric_overflow)
    return refuse_overflow(r, body, len, lim, je.text, e);
  if (!root && json_error_code(&je) == json_error_out_of_memory)
    return err_set(e, E_NOMEM, "no memory to read the body");
  if (!root)
    return err_set(e, E_ARG, "malformed JSON at line %d, column %d: %s", je.line, je.column, je.text);
  ret = decode_object(r, root, lim, e);
  json_decref(root);
  return ret;
}
