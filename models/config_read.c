/*
 * config_read.c - see config_read.h.
 */
#include "models/config_read.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json_load.h"

int config_open(struct config_reader *r, const char *text, size_t n, const char *file, struct err *e)
{
  json_error_t at;

  *r = (struct config_reader){.file = file, .e = e};
  r->root = json_load_whole(text, n, JSON_REJECT_DUPLICATES, &at);
  if (!r->root && !at.text[0])
    return r->code = err_set(e, E_NOMEM, "%.150s: no memory to read it", file);
  if (!r->root)
    return r->code = err_field(e, E_FILE, file, "%.150s: line %d: %.150s", file, at.line, at.text);
  if (!json_is_object(r->root))
    return r->code = err_field(e, E_FILE, file, "%.150s: must hold one JSON object", file);
  return 0;
}

void config_close(struct config_reader *r)
{
  json_decref(r->root);
  r->root = NULL;
}

/* Takes key out of the object. NULL when it is not there. The caller releases it. */
static json_t *take(struct config_reader *r, const char *key)
{
  json_t *v = r->code ? NULL : json_object_get(r->root, key);

  if (!v)
    return NULL;
  json_incref(v);
  json_object_del(r->root, key);
  return v;
}

/* "file: key = value: why". */
static void refuse_value(struct config_reader *r, const char *key, const json_t *v, const char *why)
{
  char *text;

  if (r->code)
    return;
  text = v ? json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII) : NULL;
  if (text)
    r->code = err_field(r->e, E_FILE, key, "%.150s: %.60s = %.80s: %s", r->file, key, text, why);
  else
    r->code = err_field(r->e, E_FILE, key, "%.150s: %.60s: %s", r->file, key, why);
  free(text);
}

void config_refuse(struct config_reader *r, const char *key, const char *why)
{
  refuse_value(r, key, NULL, why);
}

/* v as an integer within the bounds. A real without a fraction counts. */
static int as_int(struct config_reader *r, const char *key, const json_t *v, int lo, int hi)
{
  char why[80];
  double x = json_is_number(v) ? json_number_value(v) : NAN;

  if (x >= lo && x <= hi && x == floor(x))
    return (int)x;
  snprintf(why, sizeof why, "must be an integer from %d to %d", lo, hi);
  refuse_value(r, key, v, why);
  return lo;
}

int config_int(struct config_reader *r, const char *key, int def, int lo, int hi)
{
  json_t *v = take(r, key);
  int x = v ? as_int(r, key, v, lo, hi) : def;

  json_decref(v);
  return x;
}

int config_int_or_null(struct config_reader *r, const char *key, int def, int lo, int hi)
{
  json_t *v = take(r, key);
  int x = v && !json_is_null(v) ? as_int(r, key, v, lo, hi) : def;

  json_decref(v);
  return x;
}

double config_real(struct config_reader *r, const char *key, double def, double lo, double hi)
{
  json_t *v = take(r, key);
  double x = def;
  char why[96];

  if (v && !json_is_null(v)) {
    x = json_is_number(v) ? json_number_value(v) : NAN;
    if (!(x >= lo && x <= hi)) {
      snprintf(why, sizeof why, "must be a number from %g to %g", lo, hi);
      refuse_value(r, key, v, why);
      x = def;
    }
  }
  json_decref(v);
  return x;
}

int config_bool(struct config_reader *r, const char *key, int def)
{
  json_t *v = take(r, key);
  int x = def;

  if (json_is_boolean(v))
    x = json_is_true(v);
  else if (v)
    refuse_value(r, key, v, "must be true or false");
  json_decref(v);
  return x;
}

void config_ints(struct config_reader *r, const char *key, int n, int *out, int def, int lo, int hi)
{
  json_t *v = take(r, key);
  int i, is_list = json_is_array(v);

  if (is_list && json_array_size(v) != (size_t)n)
    refuse_value(r, key, v, "must have one entry per block");
  for (i = 0; i < n; i++) {
    out[i] = def;
    if (v && !r->code)
      out[i] = as_int(r, key, is_list ? json_array_get(v, (size_t)i) : v, lo, hi);
  }
  json_decref(v);
}

int config_list(struct config_reader *r, const char *key, int *out, int max, const int *def, int n_def, int lo, int hi)
{
  json_t *v = take(r, key);
  int i, n = n_def;
  char why[80];

  if (!v) {
    for (i = 0; i < n; i++)
      out[i] = def[i];
    return r->code ? 0 : n;
  }
  if (!json_is_array(v) || json_array_size(v) < 1 || json_array_size(v) > (size_t)max) {
    snprintf(why, sizeof why, "must be a list of 1 to %d entries", max);
    refuse_value(r, key, v, why);
  }
  n = r->code ? 0 : (int)json_array_size(v);
  for (i = 0; i < n && !r->code; i++)
    out[i] = as_int(r, key, json_array_get(v, (size_t)i), lo, hi);
  json_decref(v);
  return r->code ? 0 : n;
}

/* How a value reads in a list of choices: strings as they are, the rest in JSON. */
static void spell(const json_t *v, char *text, size_t size)
{
  if (json_is_string(v))
    snprintf(text, size, "%s", json_string_value(v));
  else if (json_is_number(v))
    snprintf(text, size, "%g", json_number_value(v));
  else if (json_is_boolean(v))
    snprintf(text, size, "%s", json_is_true(v) ? "true" : "false");
  else
    snprintf(text, size, "%s", json_is_null(v) ? "null" : "?");
}

int config_find_choice(const char *choices, const char *text)
{
  size_t n = strlen(text);
  int i;

  for (i = 0;; i++) {
    size_t len = strcspn(choices, "|");

    if (len == n && !memcmp(choices, text, n))
      return i;
    if (!choices[len])
      return -1;
    choices += len + 1;
  }
}

static int as_choice(struct config_reader *r, const char *key, const json_t *v, const char *choices, int def)
{
  char text[64], why[224];
  int i;

  spell(v, text, sizeof text);
  i = config_find_choice(choices, text);
  if (i >= 0)
    return i;
  snprintf(why, sizeof why, "not supported; known: %s", choices);
  refuse_value(r, key, v, why);
  return def;
}

int config_choice(struct config_reader *r, const char *key, const char *choices, int def)
{
  json_t *v = take(r, key);
  int x = v ? as_choice(r, key, v, choices, def) : def;

  json_decref(v);
  return x;
}

void config_choices(struct config_reader *r, const char *key, const char *choices, int n, int *out)
{
  json_t *v = take(r, key);
  int i;

  if (v && (!json_is_array(v) || json_array_size(v) != (size_t)n))
    refuse_value(r, key, v, "must be a list with one entry per block");
  for (i = 0; v && i < n && !r->code; i++)
    out[i] = as_choice(r, key, json_array_get(v, (size_t)i), choices, 0);
  json_decref(v);
}

void config_only(struct config_reader *r, const char *key, const char *choices)
{
  (void)config_choice(r, key, choices, 0);
}

void config_ignore(struct config_reader *r, const char *keys)
{
  char key[64];

  while (*keys) {
    size_t n = strcspn(keys, "|");

    snprintf(key, sizeof key, "%.*s", (int)n, keys);
    json_decref(take(r, key));
    keys += keys[n] ? n + 1 : n;
  }
}

int config_done(struct config_reader *r, int strict)
{
  const char *key;
  json_t *v;

  if (strict && !r->code)
    json_object_foreach(r->root, key, v)
      if (key[0] != '_' && !json_is_null(v) && !json_is_false(v)) {
        refuse_value(r, key, v, "this option is not known here");
        break;
      }
  return r->code;
}
