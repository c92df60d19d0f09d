/*
 * policy.c - see policy.h. Decodes with a cursor that knows where in the file it is, so that every error names its field in full.
 *
 * Called by server/policy.c. The jansson tree lives and dies in policy_decode. Threads: pure functions.
 */
#include "proto/policy.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json_load.h"

enum { ADAPTERS_MAX = 256, PROFILES_MAX = 64, TENANTS_MAX = 4096, LIMIT_MAX = 1000000 };

/* A value and the way to it. */
struct at {
  json_t *v;
  char path[128];
};

static struct at at_key(const struct at *in, const char *key)
{
  struct at out = {.v = json_object_get(in->v, key)};

  snprintf(out.path, sizeof out.path, "%.80s%s%.45s", in->path, *in->path ? "." : "", key);
  return out;
}

static struct at at_index(const struct at *in, size_t i)
{
  struct at out = {.v = json_array_get(in->v, i)};

  snprintf(out.path, sizeof out.path, "%.100s[%zu]", in->path, i);
  return out;
}

static int bad(const struct at *a, struct err *e, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

static int bad(const struct at *a, struct err *e, const char *fmt, ...)
{
  char text[300];
  va_list ap;

  va_start(ap, fmt);
  vsnprintf(text, sizeof text, fmt, ap);
  va_end(ap);
  return err_field(e, E_FILE, a->path, "%s %s", *a->path ? a->path : "the policy", text);
}

/* An object that holds nothing but these keys (NULL at the end). */
static int check_keys(const struct at *a, const char *const *keys, struct err *e)
{
  const char *name;
  json_t *v;

  if (!json_is_object(a->v))
    return bad(a, e, "must be an object");
  json_object_foreach(a->v, name, v) {
    const char *const *k = keys;
    struct at wrong = at_key(a, name);
    while (*k && strcmp(*k, name))
      k++;
    if (!*k)
      return bad(&wrong, e, "is not a field of a policy; see docs/operating.md for what is");
  }
  return 0;
}

static int get_text(const struct at *a, char *out, size_t size, struct err *e)
{
  const char *s = json_string_value(a->v);

  if (!s || !*s || strlen(s) >= size || strlen(s) != json_string_length(a->v))
    return bad(a, e, "must be a text of 1 to %zu bytes", size - 1);
  memcpy(out, s, strlen(s) + 1);
  return 0;
}

/* Names are shown in headers and logs, so they are plain. */
static int check_name(const struct at *a, const char *name, struct err *e)
{
  static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";

  if (!*name || strlen(name) >= POLICY_NAME || strspn(name, ok) != strlen(name) || *name == '.')
    return bad(a, e, "needs a name of 1 to %d letters, digits, dots, dashes or underscores", POLICY_NAME - 1);
  return 0;
}

/* 64 hexadecimal digits, made lower case; optional unless must. */
static int get_hex(const struct at *a, int must, char out[65], struct err *e)
{
  const char *s = json_string_value(a->v);

  out[0] = 0;
  if (!a->v && !must)
    return 0;
  if (!s || strlen(s) != 64 || strspn(s, "0123456789abcdefABCDEF") != 64)
    return bad(a, e, "must be 64 hexadecimal digits");
  for (int i = 0; i < 65; i++)
    out[i] = (char)(s[i] >= 'A' && s[i] <= 'F' ? s[i] + ('a' - 'A') : s[i]);
  return 0;
}

static int get_bool(const struct at *a, int def, int *out, struct err *e)
{
  *out = def;
  if (!a->v)
    return 0;
  if (!json_is_boolean(a->v))
    return bad(a, e, "must be true or false");
  *out = json_is_true(a->v);
  return 0;
}

static int get_number(const struct at *a, float def, double lo, double hi, float *out, struct err *e)
{
  double d = json_number_value(a->v);

  *out = def;
  if (!a->v)
    return 0;
  if (!json_is_number(a->v) || !(d >= lo && d <= hi))
    return bad(a, e, "must be a number between %g and %g", lo, hi);
  *out = (float)d;
  return 0;
}

static int get_int(const struct at *a, int def, int lo, int hi, int *out, struct err *e)
{
  json_int_t v = json_integer_value(a->v);

  *out = def;
  if (!a->v)
    return 0;
  if (!json_is_integer(a->v) || v < lo || v > hi)
    return bad(a, e, "must be a whole number between %d and %d", lo, hi);
  *out = (int)v;
  return 0;
}

/* The number of entries of an optional object or array, and zeroed memory for them. */
static int get_room(const struct at *a, int is_object, int max, size_t size, void *out, int *n, struct err *e)
{
  void *p;
  size_t have;

  *n = 0;
  if (!a->v)
    return 0;
  if (is_object ? !json_is_object(a->v) : !json_is_array(a->v))
    return bad(a, e, "must be %s", is_object ? "an object of names" : "a list");
  have = is_object ? json_object_size(a->v) : json_array_size(a->v);
  if (have > (size_t)max)
    return bad(a, e, "has %zu entries; at most %d are allowed", have, max);
  p = calloc(have + 1, size);
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for the policy");
  memcpy(out, &p, sizeof p);
  *n = (int)have;
  return 0;
}

int policy_find_adapter(const struct policy *p, const char *name)
{
  for (int i = 0; i < p->n_adapters; i++)
    if (!strcmp(p->adapter[i].name, name))
      return i;
  return -1;
}

int policy_find_profile(const struct policy *p, const char *name)
{
  for (int i = 0; i < p->n_profiles; i++)
    if (!strcmp(p->profile[i].name, name))
      return i;
  return -1;
}

/* ---- adapters ---- */

/* A path may not climb: whether it leaves adapter_dir through a link is found when it is opened. */
static int check_path(const struct at *a, const char *path, struct err *e)
{
  if (*path == '/')
    return bad(a, e, "must be relative to adapter_dir");
  for (const char *s = path; s; s = strchr(s, '/') ? strchr(s, '/') + 1 : NULL)
    if (!strncmp(s, "..", 2) && (!s[2] || s[2] == '/'))
      return bad(a, e, "must lie inside adapter_dir; \"..\" leaves it");
  return 0;
}

static int decode_adapters(struct policy *p, const struct at *root, struct err *e)
{
  static const char *const keys[] = {"path", "digest", NULL};
  struct at list = at_key(root, "adapters");
  const char *name;
  json_t *v;
  int n, i = 0;

  if (get_room(&list, 1, ADAPTERS_MAX, sizeof *p->adapter, &p->adapter, &n, e))
    return e->code;
  json_object_foreach(list.v, name, v) {
    struct policy_adapter *d = &p->adapter[i++];
    struct at a = at_key(&list, name), path = at_key(&a, "path"), digest = at_key(&a, "digest");
    if (check_name(&a, name, e) || check_keys(&a, keys, e) || get_text(&path, d->path, sizeof d->path, e) ||
        check_path(&path, d->path, e) || get_hex(&digest, 0, d->digest, e))
      return e->code;
    snprintf(d->name, sizeof d->name, "%s", name);
  }
  p->n_adapters = n;
  return 0;
}

/* ---- profiles ---- */

static int get_adapter(const struct policy *p, const struct at *a, int *out, struct err *e)
{
  char name[POLICY_NAME];

  if (get_text(a, name, sizeof name, e))
    return e->code;
  *out = policy_find_adapter(p, name);
  return *out < 0 ? bad(a, e, "names \"%s\", which is not among \"adapters\"", name) : 0;
}

static int decode_required(const struct policy *p, struct policy_profile *f, const struct at *profile, struct err *e)
{
  static const char *const keys[] = {"adapter", "weight", "min_weight", NULL};
  struct at list = at_key(profile, "required"), nothing = at_key(profile, "requires_nothing");
  int n;

  if (get_bool(&nothing, 0, &f->requires_nothing, e) ||
      get_room(&list, 0, POLICY_REQUIRED_MAX, sizeof *f->required, &f->required, &n, e))
    return e->code;
  for (int i = 0; i < n; i++) {
    struct policy_required *q = &f->required[i];
    struct at a = at_index(&list, (size_t)i), adapter = at_key(&a, "adapter"), weight = at_key(&a, "weight");
    struct at least = at_key(&a, "min_weight");
    if (check_keys(&a, keys, e) || get_adapter(p, &adapter, &q->adapter, e) || get_number(&weight, 1, 0.001, 8, &q->weight, e) ||
        get_number(&least, q->weight, 0.001, 8, &q->min_weight, e))
      return e->code;
    if (!(q->weight >= q->min_weight))
      return bad(&weight, e, "is %g, below its min_weight %g", (double)q->weight, (double)q->min_weight);
    for (int k = 0; k < i; k++)
      if (f->required[k].adapter == q->adapter)
        return bad(&adapter, e, "requires \"%s\" twice", p->adapter[q->adapter].name);
  }
  f->n_required = n;
  if (f->requires_nothing && n)
    return bad(&nothing, e, "is true and adapters are required; take one of them away");
  if (!f->requires_nothing && !n)
    return bad(&nothing, e, "is not true and no adapter is required: pictures would be drawn without any safety. If that is meant, "
                            "for evaluation, say \"requires_nothing\": true in this profile");
  return 0;
}

static int decode_styles(const struct policy *p, struct policy_profile *f, const struct at *profile, struct err *e)
{
  struct at list = at_key(profile, "styles");
  int n;

  if (get_room(&list, 0, ADAPTERS_MAX, sizeof *f->style, &f->style, &n, e))
    return e->code;
  for (int i = 0; i < n; i++) {
    struct at a = at_index(&list, (size_t)i);
    struct at pinned = {.v = NULL};
    if (get_adapter(p, &a, &f->style[i], e))
      return e->code;
    snprintf(pinned.path, sizeof pinned.path, "adapters.%s.digest", p->adapter[f->style[i]].name);
    if (!*p->adapter[f->style[i]].digest)
      return bad(&pinned, e, "is missing: an adapter that clients may add must be pinned by its digest (`safelight adapter inspect`)");
    for (int k = 0; k < i; k++)
      if (f->style[k] == f->style[i])
        return bad(&a, e, "names \"%s\" twice", p->adapter[f->style[i]].name);
  }
  f->n_style = n;
  return 0;
}

/* The word's number in the list, def when the field is absent. */
static int get_word(const struct at *a, const char *const *words, int def, int *out, struct err *e)
{
  const char *s = json_string_value(a->v);

  *out = def;
  if (!a->v)
    return 0;
  for (int i = 0; s && words[i]; i++)
    if (!strcmp(s, words[i])) {
      *out = i;
      return 0;
    }
  return bad(a, e, "must be \"%s\" or \"%s\"", words[0], words[1]);
}

static int decode_profile(struct policy *p, struct policy_profile *f, const struct at *a, struct err *e)
{
  static const char *const keys[] = {"required", "requires_nothing", "styles", "max_style_weight", "max_style_norm_ratio",
                                     "cancel_threshold", "on_cancel", "form", NULL};
  static const char *const cancel[] = {"refuse", "project", NULL}, *const form[] = {"folded", "runtime", NULL};
  struct at weight = at_key(a, "max_style_weight"), norm = at_key(a, "max_style_norm_ratio"), tau = at_key(a, "cancel_threshold");
  struct at on_cancel = at_key(a, "on_cancel"), how = at_key(a, "form");

  if (check_keys(a, keys, e) || decode_required(p, f, a, e) || decode_styles(p, f, a, e) ||
      get_number(&weight, 1.5f, 0, 8, &f->max_style_weight, e) || get_number(&norm, 1, 0, 100, &f->max_style_norm_ratio, e) ||
      get_number(&tau, 0.1f, 0, 1, &f->cancel_threshold, e) || get_word(&on_cancel, cancel, 0, &f->project, e))
    return e->code;
  return get_word(&how, form, 0, &f->form_runtime, e);
}

static int decode_profiles(struct policy *p, const struct at *root, struct err *e)
{
  struct at list = at_key(root, "profiles");
  struct policy_profile first;
  const char *name;
  json_t *v;
  int n, i = 0, def;

  if (get_room(&list, 1, PROFILES_MAX, sizeof *p->profile, &p->profile, &n, e))
    return e->code;
  p->n_profiles = n; /* before they are decoded: policy_free frees what they hold */
  json_object_foreach(list.v, name, v) {
    struct policy_profile *f = &p->profile[i++];
    struct at a = at_key(&list, name);
    if (check_name(&a, name, e) || decode_profile(p, f, &a, e))
      return e->code;
    snprintf(f->name, sizeof f->name, "%s", name);
  }
  def = policy_find_profile(p, "default");
  if (def < 0)
    return bad(&list, e, "must hold a profile \"default\": it applies to everyone who shows no key");
  first = p->profile[def];
  memmove(p->profile + 1, p->profile, (size_t)def * sizeof first);
  p->profile[0] = first;
  return 0;
}

/* Clients may not name what any profile requires: its weight is not theirs. */
static int check_styles(const struct policy *p, struct err *e)
{
  for (int i = 0; i < p->n_profiles; i++)
    for (int s = 0; s < p->profile[i].n_style; s++)
      for (int k = 0; k < p->n_profiles; k++)
        for (int r = 0; r < p->profile[k].n_required; r++) {
          const struct policy_adapter *style = &p->adapter[p->profile[i].style[s]];
          const struct policy_adapter *required = &p->adapter[p->profile[k].required[r].adapter];
          struct at a = {.v = NULL};
          snprintf(a.path, sizeof a.path, "profiles.%.70s.styles[%d]", p->profile[i].name, s);
          if (style == required || !strcmp(style->path, required->path) ||
              (*required->digest && !strcmp(style->digest, required->digest)))
            return bad(&a, e, "is \"%s\", which profile \"%s\" requires: a safety adapter cannot be a style", style->name,
                       p->profile[k].name);
        }
  return 0;
}

/* ---- tenants ---- */

/* The optional object "limits" in a; without one nothing is bounded. */
static int decode_limits(struct policy_limits *l, const struct at *in, struct err *e)
{
  static const char *const keys[] = {"concurrency", "queue", "per_minute", "pictures_per_minute", "weight", "priority", NULL};
  struct at a = at_key(in, "limits"), concurrency = at_key(&a, "concurrency"), queue = at_key(&a, "queue"), minute = at_key(&a, "per_minute");
  struct at pictures = at_key(&a, "pictures_per_minute"), weight = at_key(&a, "weight"), priority = at_key(&a, "priority");

  *l = (struct policy_limits){.weight = 1};
  if (!a.v)
    return 0;
  if (check_keys(&a, keys, e) || get_int(&concurrency, 0, 1, LIMIT_MAX, &l->concurrency, e) || get_int(&queue, 0, 1, LIMIT_MAX, &l->queue, e) ||
      get_int(&minute, 0, 1, LIMIT_MAX, &l->per_minute, e) || get_int(&pictures, 0, 1, LIMIT_MAX, &l->pictures_per_minute, e) ||
      get_number(&weight, 1, 0.01, 100, &l->weight, e))
    return e->code;
  return get_int(&priority, 0, -10, 10, &l->priority, e);
}

static int decode_tenants(struct policy *p, const struct at *root, struct err *e)
{
  static const char *const keys[] = {"key_hash", "profile", "limits", NULL};
  struct at list = at_key(root, "tenants");
  char profile[POLICY_NAME];
  const char *name;
  json_t *v;
  int n, i = 0;

  if (get_room(&list, 1, TENANTS_MAX, sizeof *p->tenant, &p->tenant, &n, e))
    return e->code;
  json_object_foreach(list.v, name, v) {
    struct policy_tenant *t = &p->tenant[i];
    struct at a = at_key(&list, name), hash = at_key(&a, "key_hash"), which = at_key(&a, "profile");
    if (check_name(&a, name, e) || check_keys(&a, keys, e) || get_hex(&hash, 1, t->key_hash, e) || decode_limits(&t->limits, &a, e) ||
        get_text(&which, profile, sizeof profile, e))
      return e->code;
    t->profile = policy_find_profile(p, profile);
    if (t->profile < 0)
      return bad(&which, e, "names \"%s\", which is not among \"profiles\"", profile);
    snprintf(t->name, sizeof t->name, "%s", name);
    for (int k = 0; k < i; k++)
      if (!strcmp(p->tenant[k].key_hash, t->key_hash))
        return bad(&hash, e, "is the key of tenant \"%s\" too", p->tenant[k].name);
    i++;
  }
  p->n_tenants = n;
  return 0;
}

/* ---- the whole ---- */

static int decode_root(struct policy *p, const struct at *root, struct err *e)
{
  static const char *const keys[] = {"adapter_dir", "require_manifest", "require_signature", "public_key", "adapters", "profiles",
                                     "tenants", "keyless", NULL};
  static const char *const keyless_keys[] = {"limits", NULL};
  struct at dir = at_key(root, "adapter_dir"), manifest = at_key(root, "require_manifest");
  struct at signature = at_key(root, "require_signature"), key = at_key(root, "public_key"), keyless = at_key(root, "keyless");

  memcpy(p->adapter_dir, ".", 2);
  if (check_keys(root, keys, e) || (dir.v && get_text(&dir, p->adapter_dir, sizeof p->adapter_dir, e)) ||
      get_bool(&manifest, 1, &p->require_manifest, e) || get_bool(&signature, 0, &p->require_signature, e) ||
      get_hex(&key, p->require_signature, p->public_key, e))
    return e->code;
  if (p->require_signature && !p->require_manifest)
    return bad(&manifest, e, "is false and signatures are required: a signature is part of a manifest");
  if ((keyless.v && check_keys(&keyless, keyless_keys, e)) || decode_limits(&p->keyless, &keyless, e))
    return e->code;
  if (decode_adapters(p, root, e) || decode_profiles(p, root, e) || decode_tenants(p, root, e))
    return e->code;
  return check_styles(p, e);
}

/* jansson says: duplicate object key near '"default"'. */
static int refuse_json(const json_error_t *je, struct err *e)
{
  const char *open = strchr(je->text, '"'), *close = open ? strchr(open + 1, '"') : NULL;
  char name[64] = "";

  if (json_error_code(je) == json_error_duplicate_key && close)
    snprintf(name, sizeof name, "%.*s", (int)(close - open - 1), open + 1);
  if (*name)
    return err_field(e, E_FILE, name, "\"%s\" is there twice (line %d)", name, je->line);
  if (json_error_code(je) == json_error_out_of_memory)
    return err_set(e, E_NOMEM, "no memory to read it");
  return err_set(e, E_FILE, "malformed JSON at line %d, column %d: %s", je->line, je->column, je->text);
}

int policy_decode(struct policy **out, const char *text, size_t len, struct err *e)
{
  struct policy *p = calloc(1, sizeof *p);
  struct at root = {.v = NULL};
  json_error_t je;
  json_t *tree = NULL;
  int r;

  *out = NULL;
  if (!p)
    return err_set(e, E_NOMEM, "out of memory for the policy");
  tree = json_load_whole(text, len, JSON_REJECT_DUPLICATES, &je);
  root.v = tree;
  r = tree ? decode_root(p, &root, e) : refuse_json(&je, e);
  json_decref(tree);
  if (r)
    policy_free(p);
  else
    *out = p;
  return r;
}

void policy_free(struct policy *p)
{
  if (!p)
    return;
  for (int i = 0; i < p->n_profiles; i++) {
    free(p->profile[i].required);
    free(p->profile[i].style);
  }
  free(p->adapter);
  free(p->profile);
  free(p->tenant);
  free(p);
}
