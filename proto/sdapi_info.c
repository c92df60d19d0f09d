/*
 * sdapi_info.c - POST png-info: the recipe that a picture carries, as text and taken apart. See sdapi.h.
 *
 * The text's form is A1111's (modules/infotext_utils.py, parse_generation_parameters): lines of prompt, lines of negative prompt, and a last line of
 * "Key: value" pairs if it has three or more. Called by server/. Threads: pure functions.
 */
#include <ctype.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "base/json_load.h"
#include "proto/png_text.h"
#include "proto/sdapi.h"
#include "proto/json_add.h"

/* One pair of the last line. */
struct pair {
  const char *key, *value;
  size_t key_len, value_len;
};

static int is_key(char c)
{
  return isalnum((unsigned char)c) || (unsigned char)c >= 0x80 || c == '_' || c == ' ' || c == '-' || c == '/';
}

/* The end of a value: behind its closing quote, or at the comma. */
static const char *value_end(const char *s)
{
  const char *p = s + 1;

  if (*s != '"')
    return s + strcspn(s, ",");
  while (*p && *p != '"')
    p += *p == '\\' && p[1] ? 2 : 1;
  return *p == '"' && (!p[1] || p[1] == ',') ? p + 1 : s + strcspn(s, ",");
}

/* The next pair at *s, which moves behind it; 0 at the end. What is no pair is passed over. */
static int next_pair(struct pair *p, const char **s)
{
  while (**s) {
    const char *key = *s + strspn(*s, ", \t"), *end = key;
    while (is_key(*end))
      end++;
    if (*end == ':' && end - key >= 2) {
      p->key = key;
      p->key_len = (size_t)(end - key);
      p->value = end + 1 + strspn(end + 1, " \t");
      *s = value_end(p->value);
      p->value_len = (size_t)(*s - p->value);
      return 1;
    }
    end += strcspn(end, ",");
    *s = *end ? end + 1 : end;
  }
  return 0;
}

static int count_pairs(const char *s)
{
  struct pair p;
  int n = 0;

  while (next_pair(&p, &s))
    n++;
  return n;
}

/* A quoted value is a JSON string. */
static json_t *value_json(const struct pair *p)
{
  json_t *v = NULL;

  if (p->value_len >= 2 && *p->value == '"')
    v = json_load_whole(p->value, p->value_len, JSON_DECODE_ANY, NULL);
  return v ? v : json_stringn(p->value, p->value_len);
}

/* "512x768" as its own two entries, KEY-1 and KEY-2, as A1111 has it. */
static int add_size(json_t *to, const char *key, const char *value)
{
  size_t w = strspn(value, "0123456789"), h = value[w] == 'x' ? strspn(value + w + 1, "0123456789") : 0;
  char name[80];

  if (!w || !h || value[w + 1 + h])
    return 0;
  snprintf(name, sizeof name, "%s-1", key);
  json_object_set_new(to, name, json_stringn(value, w));
  snprintf(name, sizeof name, "%s-2", key);
  json_object_set_new(to, name, json_string(value + w + 1));
  return 1;
}

static int add_pairs(json_t *to, const char *s, struct err *e)
{
  struct pair p;
  char key[64];

  while (next_pair(&p, &s)) {
    json_t *v = value_json(&p);
    if (!v)
      return err_set(e, E_NOMEM, "no memory for the answer");
    snprintf(key, sizeof key, "%.*s", (int)p.key_len, p.key);
    if (json_is_string(v) && add_size(to, key, json_string_value(v)))
      json_decref(v);
    else
      json_object_set_new(to, key, v); /* a key that is cut within a character is left out */
  }
  return 0;
}

static int add_line(struct buf *to, const char *s, size_t n, struct err *e)
{
  while (n && strchr(" \t\r", *s))
    s++, n--;
  while (n && strchr(" \t\r", s[n - 1]))
    n--;
  return (to->len && buf_add_str(to, "\n", e)) || buf_add(to, s, n, e) ? e->code : 0;
}

static int parse(json_t *to, const char *text, struct err *e)
{
  static const char mark[] = "Negative prompt:";
  struct buf side[2];
  const char *last = strrchr(text, '\n'), *settings = last ? last + 1 : text;
  int is_negative = 0, ret = 0;

  buf_init(&side[0], PNG_TEXT_MAX);
  buf_init(&side[1], PNG_TEXT_MAX);
  if (count_pairs(settings) < 3)
    settings = text + strlen(text);
  for (size_t n; !ret && text < settings; text += n + (text[n] == '\n')) {
    int starts = !strncmp(text, mark, sizeof mark - 1);
    n = strcspn(text, "\n");
    is_negative |= starts;
    ret = add_line(&side[is_negative], starts ? text + sizeof mark - 1 : text, starts ? n - (sizeof mark - 1) : n, e);
  }
  json_object_set_new(to, "Prompt", json_make_text(side[0].p ? side[0].p : ""));
  json_object_set_new(to, "Negative prompt", json_make_text(side[1].p ? side[1].p : ""));
  ret = ret ? ret : add_pairs(to, settings, e);
  buf_close(&side[0]);
  buf_close(&side[1]);
  return ret;
}

int sdapi_encode_png_info(struct buf *out, const uint8_t *file, size_t len, struct err *e)
{
  struct err none = {0}, why = {0};
  struct buf text;
  json_t *items = json_object(), *parameters = json_object();
  json_t *info = NULL;
  int ret = 0;

  e = e ? e : &none;
  buf_init(&text, PNG_TEXT_MAX);
  if (!items || !parameters)
    ret = err_set(e, E_NOMEM, "no memory for the answer");
  if (!ret && png_text_find(&text, file, len, "parameters", &why))
    ret = err_field(e, why.code == E_NOMEM ? E_NOMEM : E_ARG, "image", "image: %s", why.code == E_TOOBIG ? "its parameters are too long" : why.msg);
  if (!ret && text.len) {
    info = json_make_text(text.p);
    json_object_set(items, "parameters", info);
    ret = parse(parameters, text.p, e);
  }
  if (!ret)
    ret = json_add_value(out, json_pack("{s:o,s:O,s:O}", "info", info ? json_incref(info) : json_string(""), "items", items, "parameters", parameters), 0, e);
  json_decref(info);
  json_decref(items);
  json_decref(parameters);
  buf_close(&text);
  return ret;
}
