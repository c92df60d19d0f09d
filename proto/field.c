/*
 * field.c - see field.h.
 */
#include "proto/field.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/json_load.h"
#include "proto/base64.h"

/* ---- one field ---- */

int field_wrong(const struct field_in *f, struct err *e, const char *want)
{
  return err_field(e, E_ARG, f->name, "%s must be %s", f->name, want);
}

/* Numbers that are whole count as integers, as JSON has only one kind of number. */
int field_int(const struct field_in *f, int64_t lo, int64_t hi, int64_t *out, struct err *e)
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
    return field_wrong(f, e, "an integer");
  }
  if (*out < lo || *out > hi)
    return err_field(e, E_ARG, f->name, "%s must be between %lld and %lld", f->name, (long long)lo, (long long)hi);
  return 0;
}

int field_small(const struct field_in *f, int lo, int hi, int *out, struct err *e)
{
  int64_t v;
  int r = field_int(f, lo, hi, &v, e);

  if (!r)
    *out = (int)v;
  return r;
}

int field_text(const struct field_in *f, char *out, size_t max, size_t *len, struct err *e)
{
  size_t n;

  if (!json_is_string(f->v))
    return field_wrong(f, e, "a string");
  n = json_string_length(f->v);
  if (n > max)
    return err_field(e, E_ARG, f->name, "%s must be at most %zu bytes long; it has %zu", f->name, max, n);
  memcpy(out, json_string_value(f->v), n);
  out[n] = 0;
  if (len)
    *len = n;
  return 0;
}

int field_number(const struct field_in *f, double lo, double hi, double *out, struct err *e)
{
  double d = json_number_value(f->v);

  if (!json_is_number(f->v))
    return field_wrong(f, e, "a number");
  if (!(d >= lo && d <= hi))
    return err_field(e, E_ARG, f->name, "%s must be between %g and %g", f->name, lo, hi);
  *out = d;
  return 0;
}

int field_flag(const struct field_in *f, int *out, struct err *e)
{
  if (!json_is_boolean(f->v))
    return field_wrong(f, e, "true or false");
  *out = json_is_true(f->v);
  return 0;
}

int field_word(const struct field_in *f, const char *words, int *which, struct err *e)
{
  const char *s = json_string_value(f->v), *w = words;
  size_t n = s ? strlen(s) : 0;

  for (int i = 0; s && *w; i++) {
    size_t len = strcspn(w, "|");
    if (len == n && !memcmp(w, s, n)) {
      if (which)
        *which = i;
      return 0;
    }
    w += len + (w[len] == '|');
  }
  return err_field(e, E_ARG, f->name, "%s must be one of %s", f->name, words);
}

int field_side(const struct field_in *f, int64_t v, struct err *e)
{
  int m = f->lim->size_multiple;

  if (v < m || v > f->lim->max_size)
    return err_field(e, E_ARG, f->name, "%s: a side must be between %d and %d pixels", f->name, m, f->lim->max_size);
  if (v % m)
    return err_field(e, E_ARG, f->name, "%s: a side must be a multiple of %d pixels", f->name, m);
  return 0;
}

int field_get_side(const struct field_in *f, int *out, struct err *e)
{
  int64_t v;

  if (field_int(f, 1, f->lim->max_size, &v, e) || field_side(f, v, e))
    return E_ARG;
  *out = (int)v;
  return 0;
}

int field_file(const struct field_in *f, uint8_t **bytes, size_t *len, struct err *e)
{
  struct err why = {0};
  const char *text = json_string_value(f->v);
  size_t n = json_string_length(f->v);

  if (!text || !n)
    return field_wrong(f, e, "a picture in base64");
  text = base64_of_url(text, &n);
  *bytes = malloc(base64_decode_bound(n));
  if (!*bytes)
    return err_set(e, E_NOMEM, "no memory for the picture in %s", f->name);
  if (!base64_decode(*bytes, len, text, n, &why))
    return 0;
  free(*bytes);
  *bytes = NULL;
  return err_field(e, E_ARG, f->name, "%s must be a picture in base64: %s", f->name, why.msg);
}

int field_is_safety(const char *name)
{
  static const char *const words[] = {"safe", "lora", "adapter", "nsfw", "checker", "override_settings"};

  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    if (strcasestr(name, words[i]))
      return 1;
  return 0;
}

int field_unknown(const char *name, const char *hint, struct err *e)
{
  char shown[sizeof e->field];
  size_t n = strlen(name);

  if (n >= sizeof shown)
    for (n = sizeof shown - 1; n && ((unsigned char)name[n] & 0xc0) == 0x80; n--)
      ;
  memcpy(shown, name, n);
  shown[n] = 0;
  if (field_is_safety(name))
    return err_field(e, E_ARG, shown, "%s is not a field of this server: safety and adapters are the operator's policy and no "
                                      "request can name, scale or switch them off", shown);
  if (hint)
    return err_field(e, E_ARG, shown, "unknown field %s; the name here is %s", shown, hint);
  return err_field(e, E_ARG, shown, "unknown field %s; it would be ignored, so it is refused", shown);
}

const struct field *field_find(const struct field *table, size_t n, const char *name)
{
  for (size_t i = 0; i < n; i++)
    if (!strcmp(name, table[i].name))
      return &table[i];
  return NULL;
}

/* ---- the body ---- */

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

/* A number too large for jansson's integers: read again as floating point. */
static int load_overflow(struct body *b, const char *text, size_t len, struct err *e)
{
  b->root = json_load_whole(text, len, JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, NULL);
  b->has_overflow = 1;
  return b->root ? 0 : err_set(e, E_ARG, "malformed JSON: a number is too large");
}

int body_begin(struct body *b, const char *text, size_t len, struct err *e)
{
  json_error_t je;
  size_t bad = bad_utf8(text, len);

  *b = (struct body){NULL, 0};
  if (bad < len)
    return refuse_utf8(text, len, bad, e);
  b->root = json_load_whole(text, len, JSON_REJECT_DUPLICATES, &je);
  if (!b->root && json_error_code(&je) == json_error_numeric_overflow && load_overflow(b, text, len, e))
    return e->code;
  if (!b->root && json_error_code(&je) == json_error_out_of_memory)
    return err_set(e, E_NOMEM, "no memory to read the body");
  if (!b->root)
    return err_set(e, E_ARG, "malformed JSON at line %d, column %d: %s", je.line, je.column, je.text);
  if (json_is_object(b->root))
    return 0;
  json_decref(b->root);
  b->root = NULL;
  return err_set(e, E_ARG, "the body must be a JSON object");
}

int body_end(struct body *b, int r, struct err *e)
{
  json_decref(b->root);
  b->root = NULL;
  return r || !b->has_overflow ? r : err_set(e, E_ARG, "malformed JSON: a number is too large");
}
