/*
 * adapter_scale.c - by which number the factors of a layer are multiplied.
 *
 * In this order: an explicit ".scale"; the layer's own ".alpha" over its rank; lora_adapter_metadata in the file (diffusers 0.34 on);
 * adapter_config.json (PEFT); 1. The rank is always read from the layer's own factors, never from a number that stands for all; where a
 * configuration says another rank, the file contradicts itself and is refused.
 *
 * Called by adapter.c and adapter_forms.c. Threads: immutable once read. Sources: PEFT (tuners/lora: LoraConfig, get_pattern_key,
 * scaling = lora_alpha / r, or / sqrt(r) with use_rslora), diffusers (loaders/lora_base.py: pack and unpack of the metadata).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "models/adapter_impl.h"
#include "models/config_read.h"

/* What one LoraConfig says. */
struct lora_config {
  int is_there;
  int64_t r;
  double alpha;
  int rslora, dora;
  json_t *ranks, *alphas;   /* pattern -> number; owned, or NULL */
};

enum { COMPONENTS = 3 };
static const char *const components[COMPONENTS] = {"unet", "text_encoder", "text_encoder_2"};

struct adapter_scale {
  struct lora_config metadata[COMPONENTS], config;
};

static const char *const rule_names[] = {[SCALE_EXPLICIT] = "scale", [SCALE_ALPHA] = "alpha", [SCALE_METADATA] = "metadata",
                                         [SCALE_CONFIG] = "config", [SCALE_NONE] = "none"};

const char *adapter_scale_rule_name(enum scale_rule r)
{
  return rule_names[r];
}

/* ---- patterns ---- */

/* One character of a pattern, p..end: does it match c? *end is behind it. -1: not read here. */
static int match_one(const char *p, const char **end, char c)
{
  *end = p + 1;
  if (*p == '\\') {
    *end = p + 2;
    if (p[1] == 'd')
      return c >= '0' && c <= '9';
    if (p[1] == '.' || p[1] == '-' || p[1] == '_')
      return c == p[1];
    return -1;
  }
  if (*p == '[') {
    int is_in = 0;

    for (p++; *p && *p != ']'; p++) {
      if (*p == '\\' || *p == '^' || *p == '[')
        return -1;
      if (p[1] == '-' && p[2] && p[2] != ']') {
        is_in |= c >= p[0] && c <= p[2];
        p += 2;
      } else {
        is_in |= c == *p;
      }
    }
    *end = p + 1;
    return *p ? is_in : -1;
  }
  if (strchr("(){}|^$*+?", *p))
    return -1;
  return *p == '.' ? c != '\0' : c == *p;
}

/* The whole of s against the whole of p. *steps bounds the work. */
static int match_here(const char *p, const char *s, int *steps)
{
  const char *end;
  int one, least, most, i, r;

  if (--*steps < 0)
    return -1;
  if (!*p)
    return !*s;
  one = match_one(p, &end, *s);
  if (one < 0)
    return -1;
  if (*end != '*' && *end != '+' && *end != '?')
    return one && *s ? match_here(end, s + 1, steps) : 0;
  least = *end == '+';
  most = *end == '?';
  for (i = 0; i <= (most ? 1 : (int)strlen(s)); i++) {
    if (i >= least && (r = match_here(end + 1, s + i, steps)))
      return r;
    if (!s[i] || match_one(p, &end, s[i]) != 1)
      break;
  }
  return 0;
}

/* A pattern that is not read is not read whatever the name. */
static int is_readable(const char *p)
{
  const char *end;

  for (; *p; p = end) {
    if (match_one(p, &end, 'x') < 0)
      return 0;
    end += *end == '*' || *end == '+' || *end == '?';
  }
  return 1;
}

int adapter_pattern_match(const char *pattern, const char *name)
{
  int steps = 100000, r;

  if (!*pattern || strlen(pattern) > 255 || !is_readable(pattern))
    return -1;
  for (;;) { /* PEFT: (.*\.)?(pattern)$ */
    r = match_here(pattern, name, &steps);
    name = strchr(name, '.');
    if (r || !name)
      return r;
    name++;
  }
}

/* ---- reading ---- */

static int pattern_value_is_ok(const json_t *v)
{
  double x = json_is_number(v) ? json_number_value(v) : NAN;

  return x > 0 && x < 1e9;
}

/* Takes {pattern: number} under key; NULL in *out when there is none. */
static void take_patterns(struct config_reader *r, const char *key, json_t **out)
{
  json_t *v = r->code ? NULL : json_object_get(r->root, key), *number;
  const char *pattern;

  *out = NULL;
  if (!v)
    return;
  if (!json_is_object(v) && !json_is_null(v)) {
    config_refuse(r, key, "must be an object of patterns and numbers");
    return;
  }
  json_object_foreach(v, pattern, number) {
    if (adapter_pattern_match(pattern, "x") < 0)
      config_refuse(r, key, "holds a pattern that is not read here; write the names of the layers out");
    else if (!pattern_value_is_ok(number))
      config_refuse(r, key, "holds a value that is not a positive number");
  }
  if (r->code)
    return;
  *out = json_is_object(v) && json_object_size(v) ? json_incref(v) : NULL;
  json_object_del(r->root, key);
}

/* prefix: "" or "unet.". A key without which the scale would be a guess must be there. */
static void take_lora(struct config_reader *r, const char *prefix, struct lora_config *c)
{
  char key[64];

  c->is_there = 1;
  snprintf(key, sizeof key, "%sr", prefix);
  if (!r->code && !json_object_get(r->root, key))
    config_refuse(r, key, "is missing");
  c->r = config_int(r, key, 1, 1, 1 << 20);
  snprintf(key, sizeof key, "%slora_alpha", prefix);
  if (!r->code && !json_object_get(r->root, key))
    config_refuse(r, key, "is missing");
  c->alpha = config_real(r, key, 1, 1e-9, 1e9);
  snprintf(key, sizeof key, "%suse_rslora", prefix);
  c->rslora = config_bool(r, key, 0);
  snprintf(key, sizeof key, "%suse_dora", prefix);
  c->dora = config_bool(r, key, 0);
  snprintf(key, sizeof key, "%srank_pattern", prefix);
  take_patterns(r, key, &c->ranks);
  snprintf(key, sizeof key, "%salpha_pattern", prefix);
  take_patterns(r, key, &c->alphas);
}

/* What is left of a LoraConfig: keys that do not change what the factors mean, and keys that would if they were set. */
static void check_rest(struct config_reader *r, const char *prefix)
{
  static const char *const harmless[] = {
      "target_modules", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout",
      "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "lora_bias", "megatron_core", "peft_version",
      "loftq_config", "eva_config", "corda_config", "runtime_config", "ensure_weight_tying", "trainable_token_indices",
      "qalora_group_size"};
  char key[64];
  size_t i;

  for (i = 0; i < sizeof harmless / sizeof *harmless; i++) {
    snprintf(key, sizeof key, "%s%s", prefix, harmless[i]);
    config_ignore(r, key);
  }
  snprintf(key, sizeof key, "%speft_type", prefix);
  config_only(r, key, "LORA");
  snprintf(key, sizeof key, "%sbias", prefix);
  config_only(r, key, "none");
  snprintf(key, sizeof key, "%sinit_lora_weights", prefix); /* the others change the base weights as well */
  config_only(r, key, "true|false|gaussian|eva");
}

static int read_config(struct lora_config *c, const char *text, struct err *e)
{
  struct config_reader r;
  int code = config_open(&r, text, strlen(text), "adapter_config.json", e);

  if (!code) {
    take_lora(&r, "", c);
    check_rest(&r, "");
    code = config_done(&r, 1);
  }
  config_close(&r);
  return code;
}

static int read_metadata(struct adapter_scale *s, const char *text, struct err *e)
{
  struct config_reader r;
  char prefix[32], key[64];
  int i, code = config_open(&r, text, strlen(text), "lora_adapter_metadata", e);

  for (i = 0; i < COMPONENTS && !code; i++) {
    snprintf(prefix, sizeof prefix, "%s.", components[i]);
    snprintf(key, sizeof key, "%s.r", components[i]);
    if (json_object_get(r.root, key))
      take_lora(&r, prefix, &s->metadata[i]);
    check_rest(&r, prefix);
  }
  if (!code)
    code = config_done(&r, 1);
  config_close(&r);
  return code;
}

/* Keys and JSON's own words may hold anything; messages go into logs and terminals. */
static void make_printable(struct err *e)
{
  if (!e)
    return;
  st_printable(e->msg, sizeof e->msg, e->msg);
  st_printable(e->field, sizeof e->field, e->field);
}

int adapter_scale_read(struct adapter_scale **scale, const struct safetensors *st, const char *config, struct err *e)
{
  const char *metadata = st_metadata(st, "lora_adapter_metadata");
  struct adapter_scale *s = calloc(1, sizeof *s);
  int code = 0;

  *scale = NULL;
  if (!s)
    return err_set(e, E_NOMEM, "no memory for the scales of an adapter");
  if (metadata)
    code = read_metadata(s, metadata, e);
  if (!code && config)
    code = read_config(&s->config, config, e);
  if (code) {
    make_printable(e);
    adapter_scale_free(s);
    return code;
  }
  *scale = s;
  return 0;
}

static void lora_config_free(struct lora_config *c)
{
  json_decref(c->ranks);
  json_decref(c->alphas);
}

void adapter_scale_free(struct adapter_scale *s)
{
  int i;

  if (!s)
    return;
  for (i = 0; i < COMPONENTS; i++)
    lora_config_free(&s->metadata[i]);
  lora_config_free(&s->config);
  free(s);
}

/* ---- finding ---- */

/* A tensor of one number. */
static int read_scalar(const struct st_tensor *t, double *x, struct err *e)
{
  const unsigned char *p = t->data;
  int i;
  float f;
  uint16_t h;
  int64_t n = 1, whole;

  for (i = 0; i < t->nd; i++)
    n *= t->shape[i] == 1;
  if (n != 1)
    return adapter_fail(t, e, "must hold one number");
  switch (t->type) {
  case ST_F32: memcpy(&f, p, sizeof f); *x = f; break;
  case ST_F16: memcpy(&h, p, sizeof h); *x = f16_to_f32(h); break;
  case ST_BF16: memcpy(&h, p, sizeof h); *x = bf16_to_f32(h); break;
  case ST_F64: memcpy(x, p, sizeof *x); break;
  case ST_I64: memcpy(&whole, p, sizeof whole); *x = (double)whole; break;
  default: return adapter_fail(t, e, "has the type %s; F32, F16, BF16, F64 or I64 are read", st_dtype_name(t->type));
  }
  if (!(*x > 0 && *x < 1e9))
    return adapter_fail(t, e, "is %g; it must be a positive number", *x);
  return 0;
}

/* The number of the first pattern that matches, or def. */
static double by_pattern(const json_t *patterns, const char *name, double def)
{
  const char *pattern;
  json_t *v;

  json_object_foreach((json_t *)patterns, pattern, v)
    if (adapter_pattern_match(pattern, name) == 1)
      return json_number_value(v);
  return def;
}

/* name: of the layer, without its component. */
static int config_scale(const struct lora_config *c, const struct adapter_group *g, const char *where, const char *name, int64_t r,
                        float *scale, struct err *e)
{
  const struct st_tensor *down = g->part[ROLE_DOWN];
  double alpha = by_pattern(c->alphas, name, c->alpha), said = by_pattern(c->ranks, name, (double)c->r);
  int has_magnitude = g->part[ROLE_MAGNITUDE] || g->part[ROLE_DORA_SCALE];

  if (g->family != FAMILY_LORA)
    return err_field(e, E_FILE, name, "\"%.120s\" has %s factors where %s promises LoRA", name, adapter_family_name(g->family), where);
  if (said != (double)r)
    return adapter_fail(down, e, "has rank %lld where %s says %g", (long long)r, where, said);
  if (c->dora != has_magnitude)
    return adapter_fail(down, e, "has %s magnitude, against use_dora in %s", has_magnitude ? "a" : "no", where);
  *scale = (float)(c->rslora ? alpha / sqrt((double)r) : alpha / (double)r);
  return 0;
}

int adapter_scale_find(const struct adapter_scale *s, const struct adapter_group *g, const struct site *site, int64_t r,
                       float *scale, enum scale_rule *rule, struct err *e)
{
  size_t len = strcspn(site->name, ".");
  double x = 1;
  int i, code = 0;

  *scale = 1;
  *rule = SCALE_NONE;
  if (g->part[ROLE_ALPHA]) { /* read even where it does not count: a bad number in a file is a bad file */
    code = read_scalar(g->part[ROLE_ALPHA], &x, e);
    if (code)
      return code;
    if (r) {
      *scale = (float)(x / (double)r);
      *rule = SCALE_ALPHA;
    }
  }
  if (g->part[ROLE_SCALE]) {
    code = read_scalar(g->part[ROLE_SCALE], &x, e);
    *scale = (float)x;
    *rule = SCALE_EXPLICIT;
  }
  if (code || *rule != SCALE_NONE || !r)
    return code;
  for (i = 0; i < COMPONENTS; i++) {
    if (!s->metadata[i].is_there || strlen(components[i]) != len || strncmp(site->name, components[i], len))
      continue;
    *rule = SCALE_METADATA;
    return config_scale(&s->metadata[i], g, "lora_adapter_metadata", site->name + len + 1, r, scale, e);
  }
  if (s->config.is_there) {
    *rule = SCALE_CONFIG;
    return config_scale(&s->config, g, "adapter_config.json", site->name + len + 1, r, scale, e);
  }
  return 0;
}
