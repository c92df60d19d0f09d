/*
 * fuzz_admin.c - bodies of the admin listener, audit records, and the texts in a picture's file: whatever bytes come, they are decoded within their
 * bounds or refused with a sentence, and what is written is well formed. The first byte chooses.
 *
 * links: proto/admin.c proto/image_text.c server/audit_record.c base/buf.c base/err.c base/json_load.c
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "proto/admin.h"
#include "proto/image.h"
#include "server/audit_db.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(int ok)
{
  if (!ok)
    abort();
}

static void decode(const char *body, size_t size, int which)
{
  struct admin_load load;
  struct admin_lora lora;
  struct err e = {0};
  int r = which == 0 ? admin_decode_load(&load, body, size, &e) : admin_decode_lora(&lora, body, size, which == 1, &e);

  must(r ? e.code == E_ARG && *e.msg : !e.code);
  if (!r && which == 0)
    must(*load.path && strlen(load.path) < sizeof load.path);
  if (!r && which)
    must(*lora.name && strlen(lora.name) < sizeof lora.name && (which == 2 || *lora.path));
}

/* A NUL terminated text of any bytes. */
static void write_texts(const char *text, int which)
{
  struct recipe r = {.prompt = text, .negative = text, .sampler_label = "DDIM", .model = text, .model_digest = "", .version = "1", .profile = text,
                     .styles = text};
  struct audit_record a = {.kind = AUDIT_REFUSAL, .tenant = text, .prompt = text, .reason = text};
  struct err e = {0};
  struct buf b;
  json_t *root;

  buf_init(&b, 1 << 22);
  if (which == 3) {
    must(!buf_add_str(&b, "{\"kind\":\"refusal\"", &e) && !audit_record_body(&b, &a, NULL, &e));
    root = json_loads(b.p, JSON_REJECT_DUPLICATES, NULL);
    must(root != NULL);
    json_decref(root);
  } else {
    must(!image_xmp(&b, &r, &e) && !strpbrk(strstr(b.p, "safelight:Profile") ? strstr(b.p, "safelight:Profile") + 19 : "", "\x01\x1f\x7f"));
    must(!image_parameters(&b, &r, IMAGE_FULL, &e));
  }
  buf_close(&b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
  char *text;
  int which;

  if (!size)
    return 0;
  which = data[0] % 5;
  text = malloc(size); /* its own block, so that reading past the end shows */
  must(text != NULL);
  memcpy(text, data + 1, size - 1);
  if (which < 3) {
    decode(text, size - 1, which);
  } else {
    text[size - 1] = 0;
    write_texts(text, which);
  }
  free(text);
  return 0;
}
