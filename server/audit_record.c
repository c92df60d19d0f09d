/*
 * audit_record.c - an audit record as canonical JSON: fixed order of fields, no spaces, one way to write each string and number, so that its hash can be
 * computed again by anybody (docs/operating.md shows how with b2sum). Written by hand: a library's next version might write another form.
 *
 * Called by audit.c. Threads: pure functions.
 */
#include <math.h>
#include <sodium.h>
#include <string.h>

#include "base/utf8.h"
#include "server/audit_db.h"

const char *audit_kind_name(enum audit_kind kind)
{
  static const char *const name[] = {"image", "refusal", "activation", "policy", "start", "adapter", "admin"};

  return name[kind];
}

int audit_record_quote(struct buf *out, const char *text, struct err *e)
{
  const unsigned char *s = (const unsigned char *)text;
  int r = buf_add_str(out, "\"", e);

  while (!r && *s) {
    size_t n = utf8_length((const char *)s);
    if (n == 0)
      r = buf_add_str(out, "\xef\xbf\xbd", e);
    else if (*s == '"' || *s == '\\')
      r = buf_addf(out, e, "\\%c", *s);
    else if (*s < 0x20 || *s == 0x7f)
      r = buf_addf(out, e, "\\u%04x", *s);
    else
      r = buf_add(out, s, n, e);
    s += n ? n : 1;
  }
  return r ? r : buf_add_str(out, "\"", e);
}

/* Nothing for NULL and "". */
static int add_text(struct buf *out, const char *name, const char *value, struct err *e)
{
  if (!value || !*value)
    return 0;
  if (buf_addf(out, e, ",\"%s\":", name))
    return e->code;
  return audit_record_quote(out, value, e);
}

/* As it is, or its keyed hash under NAME_hash: equal prompts can be found, and not read. */
static int add_prompt(struct buf *out, const char *name, const char *text, const unsigned char *key, struct err *e)
{
  unsigned char hash[32];
  char hex[65], field[40];

  if (!text || !*text)
    return 0;
  if (!key)
    return add_text(out, name, text, e);
  crypto_generichash(hash, sizeof hash, (const unsigned char *)text, strlen(text), key, AUDIT_KEY);
  sodium_bin2hex(hex, sizeof hex, hash, sizeof hash);
  snprintf(field, sizeof field, "%s_hash", name);
  return add_text(out, field, hex, e);
}

/* JSON has no NaN: null says that there was no number. */
static int add_number(struct buf *out, const char *name, double value, int digits, struct err *e)
{
  return isfinite(value) ? buf_addf(out, e, ",\"%s\":%.*g", name, digits, value) : buf_addf(out, e, ",\"%s\":null", name);
}

static int add_styles(struct buf *out, const struct audit_style *style, int n, struct err *e)
{
  if (!n)
    return 0;
  if (buf_add_str(out, ",\"styles\":[", e))
    return e->code;
  for (int i = 0; i < n; i++)
    if (buf_add_str(out, i ? ",{\"name\":" : "{\"name\":", e) || audit_record_quote(out, style[i].name, e) ||
        add_text(out, "digest", style[i].digest, e) || add_number(out, "weight", (double)style[i].weight, 9, e) ||
        add_number(out, "c", style[i].c, 17, e) || buf_add_str(out, "}", e))
      return e->code;
  return buf_add_str(out, "]", e);
}

int audit_record_body(struct buf *out, const struct audit_record *r, const unsigned char *prompt_key, struct err *e)
{
  if (add_text(out, "tenant", r->tenant, e) || add_text(out, "profile", r->profile, e) || add_text(out, "request_id", r->request_id, e) ||
      add_prompt(out, "prompt", r->prompt, prompt_key, e) || add_prompt(out, "negative_prompt", r->negative, prompt_key, e))
    return e->code;
  if ((r->kind == AUDIT_IMAGE || r->seed) && buf_addf(out, e, ",\"seed\":%llu", (unsigned long long)r->seed)) /* a picture's 0 is a seed */
    return e->code;
  if (add_text(out, "model_digest", r->model_digest, e) || add_text(out, "generation_id", r->generation_id, e) ||
      add_text(out, "generation_digest", r->generation_digest, e) || add_styles(out, r->style, r->n_styles, e) ||
      add_text(out, "verdict", r->verdict, e) || add_text(out, "reason", r->reason, e) || add_text(out, "image_digest", r->image_digest, e))
    return e->code;
  return buf_add_str(out, "}", e);
}
