/*
 * admin.c - see admin.h.
 */
#include "proto/admin.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "base/json_load.h"

/* ---- bodies ---- */

static json_t *read_object(const char *body, size_t len, struct err *e)
{
  json_error_t why;
  json_t *root = json_load_whole(body, len, JSON_REJECT_DUPLICATES, &why);

  if (json_is_object(root))
    return root;
  if (root)
    err_set(e, E_ARG, "the body must be a JSON object");
  else if (json_error_code(&why) == json_error_out_of_memory)
    err_set(e, E_NOMEM, "no memory to read the body");
  else
    err_set(e, E_ARG, "the body is not JSON: %.200s", why.text);
  json_decref(root);
  return NULL;
}

/* Copies a text of 1 to size - 1 bytes. */
static int get_text(const json_t *root, const char *field, char *out, size_t size, struct err *e)
{
  const json_t *v = json_object_get(root, field);
  const char *s = json_string_value(v);

  if (!s || !*s || strlen(s) != json_string_length(v) || strlen(s) >= size)
    return err_field(e, E_ARG, field, "%s must be a text of 1 to %zu bytes", field, size - 1);
  memcpy(out, s, strlen(s) + 1);
  return 0;
}

static int check_fields(json_t *root, const char *const *known, struct err *e)
{
  const char *name;
  json_t *v;

  json_object_foreach(root, name, v) {
    const char *const *k = known;
    while (*k && strcmp(*k, name))
      k++;
    if (!*k)
      return err_field(e, E_ARG, name, "unknown field \"%.80s\"", name);
  }
  return 0;
}

int admin_decode_load(struct admin_load *l, const char *body, size_t len, struct err *e)
{
  static const char *const known[] = {"path", NULL};
  json_t *root = read_object(body, len, e);
  int r;

  *l = (struct admin_load){{0}};
  if (!root)
    return e->code;
  r = check_fields(root, known, e) || get_text(root, "path", l->path, sizeof l->path, e) ? e->code : 0;
  json_decref(root);
  return r;
}

/* A flag that is absent or null is 0. */
static int get_flag(const json_t *root, const char *field, int *out, struct err *e)
{
  const json_t *v = json_object_get(root, field);

  *out = json_is_true(v);
  return v && !json_is_boolean(v) && !json_is_null(v) ? err_field(e, E_ARG, field, "%s must be true or false", field) : 0;
}

int admin_decode_lora(struct admin_lora *l, const char *body, size_t len, int with_path, struct err *e)
{
  static const char *const load[] = {"lora_name", "lora_path", "load_inplace", "is_3d_lora_weight", NULL};
  static const char *const unload[] = {"lora_name", "lora_int_id", NULL};
  json_t *root = read_object(body, len, e);
  int r, is_3d = 0;

  *l = (struct admin_lora){{0}, {0}, 0};
  if (!root)
    return e->code;
  r = check_fields(root, with_path ? load : unload, e);
  if (!r && with_path && (!json_object_get(root, "lora_name") || !json_object_get(root, "lora_path")))
    r = err_field(e, E_ARG, json_object_get(root, "lora_name") ? "lora_path" : "lora_name", "Both 'lora_name' and 'lora_path' must be provided.");
  if (!r)
    r = get_text(root, "lora_name", l->name, sizeof l->name, e);
  if (!r && with_path && (get_text(root, "lora_path", l->path, sizeof l->path, e) || get_flag(root, "load_inplace", &l->in_place, e) ||
                          get_flag(root, "is_3d_lora_weight", &is_3d, e)))
    r = e->code;
  if (!r && is_3d)
    r = err_field(e, E_ARG, "is_3d_lora_weight", "is_3d_lora_weight is for models of another kind");
  json_decref(root);
  return r;
}

/* ---- answers ---- */

/* Appends root as compact JSON with a newline and drops it. */
static int add_json(struct buf *out, json_t *root, struct err *e)
{
  char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
  int r;

  json_decref(root);
  if (!text)
    return err_set(e, E_NOMEM, "out of memory for the answer");
  r = buf_add_str(out, text, e) || buf_add_str(out, "\n", e) ? e->code : 0;
  free(text);
  return r;
}

/* A reason that was cut may end within a character; JSON must not. */
static json_t *text_json(const char *s)
{
  json_t *v = *s ? json_string(s) : json_null();
  size_t n = strlen(s);

  for (int i = 0; !v && i < 4 && n; i++)
    v = json_stringn(s, --n);
  return v ? v : json_string("(not valid UTF-8)");
}

static json_t *adapter_json(const struct admin_adapter *a)
{
  return json_pack("{s:o,s:s,s:o,s:o,s:i,s:I,s:i,s:o}", "name", text_json(a->name), "state", a->state, "format", text_json(a->format), "digest",
                   text_json(a->digest), "sites", a->sites, "max_rank", (json_int_t)a->max_rank, "required_by", a->required_by, "why",
                   text_json(a->why));
}

static json_t *generation_json(const struct admin_generation *g)
{
  return json_pack("{s:o,s:o,s:o,s:b,s:b,s:i,s:I,s:I}", "id", text_json(g->id), "digest", text_json(g->digest), "profile", text_json(g->profile),
                   "requires_nothing", g->requires_nothing, "current", g->is_current, "pins", g->pins, "bytes", (json_int_t)g->bytes, "activated",
                   (json_int_t)g->activated_s);
}

static json_t *generations_json(const struct admin_generation *g, int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++)
    json_array_append_new(list, generation_json(&g[i]));
  return list;
}

static json_t *profiles_json(const struct admin_profile *p, int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++)
    json_array_append_new(list, json_pack("{s:o,s:b,s:o,s:o}", "name", text_json(p[i].name), "live", *p[i].generation != 0, "generation",
                                          text_json(p[i].generation), "why", text_json(p[i].why)));
  return list;
}

int admin_encode_status(struct buf *out, const struct admin_status *s, struct err *e)
{
  json_t *adapters = json_array();

  for (int i = 0; i < s->adapters; i++)
    json_array_append_new(adapters, adapter_json(&s->adapter[i]));
  return add_json(out, json_pack("{s:s,s:o,s:s,s:I,s:o,s:o,s:o,s:{s:I,s:s,s:I}}", "status", s->unready ? "unavailable" : "ready", "why",
                                 s->unready ? text_json(s->unready) : json_null(), "version", s->version, "swaps", (json_int_t)s->swaps, "adapters",
                                 adapters, "generations", generations_json(s->generation, s->generations), "profiles",
                                 profiles_json(s->profile, s->profiles), "audit", "records", (json_int_t)s->audit_records, "head", s->audit_head,
                                 "lost", (json_int_t)s->audit_lost), e);
}

int admin_encode_generations(struct buf *out, const struct admin_generation *g, int n, struct err *e)
{
  return add_json(out, json_pack("{s:o}", "generations", generations_json(g, n)), e);
}

int admin_encode_done(struct buf *out, const struct admin_adapter *a, const struct admin_generation *g, struct err *e)
{
  json_t *root = json_pack("{s:s}", "status", "ok");

  if (a)
    json_object_set_new(root, "adapter", adapter_json(a));
  if (g)
    json_object_set_new(root, "generation", generation_json(g));
  return add_json(out, root, e);
}

int admin_encode_records(struct buf *out, const char *records, struct err *e)
{
  return buf_addf(out, e, "{\"records\":%s}\n", records);
}

/* ---- activity ---- */

static json_t *jobs_json(const struct admin_job *j, int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++)
    json_array_append_new(list, json_pack("{s:o,s:o,s:o,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:o,s:f,s:f}", "id", text_json(j[i].id), "caller", text_json(j[i].caller),
                                          "profile", text_json(j[i].profile), "state", j[i].state, "width", j[i].width, "height", j[i].height, "steps",
                                          j[i].steps, "steps_done", j[i].steps_done, "pictures", j[i].pictures, "drawn", j[i].drawn, "position",
                                          j[i].position ? json_integer(j[i].position) : json_null(), "age_s", j[i].age_s, "wait_s", j[i].wait_s));
  return list;
}

static json_t *counts_json(const struct admin_count *c, int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++)
    json_array_append_new(list, json_pack("{s:s,s:o,s:I}", "name", c[i].name, "label", text_json(c[i].label), "value", (json_int_t)c[i].value));
  return list;
}

static json_t *histograms_json(const struct admin_histogram *h, int n)
{
  json_t *list = json_array();

  for (int i = 0; i < n; i++) {
    json_t *bounds = json_array(), *counts = json_array();
    for (int k = 0; k <= h[i].buckets; k++) {
      if (k < h[i].buckets)
        json_array_append_new(bounds, json_real((double)h[i].bound[k] / h[i].unit));
      json_array_append_new(counts, json_integer((json_int_t)h[i].count[k]));
    }
    json_array_append_new(list, json_pack("{s:s,s:o,s:o,s:o,s:f}", "name", h[i].name, "label", text_json(h[i].label), "bounds", bounds, "counts", counts,
                                          "sum", (double)h[i].sum / h[i].unit));
  }
  return list;
}

int admin_encode_activity(struct buf *out, const struct admin_activity *a, struct err *e)
{
  return add_json(out, json_pack("{s:f,s:{s:i,s:i},s:{s:i,s:i},s:i,s:o,s:o,s:o}", "now", a->now_s, "queue", "waiting", a->waiting, "capacity",
                                 a->capacity, "running", "pictures", a->running, "capacity", a->max_running, "active", a->active, "jobs",
                                 jobs_json(a->job, a->jobs), "counts", counts_json(a->count, a->counts), "histograms",
                                 histograms_json(a->histogram, a->histograms)), e);
}
