/*
 * openai_edit.c - decoding POST /v1/images/edits: a form whose parts become the JSON that the other routes take. See openai.h.
 *
 * A form has only texts. What a field means by its text is said here: numbers, booleans, lists and objects are read as JSON, everything else is a
 * string; then one table of fields (openai_fields.h) judges both. Called by server/. Threads: pure functions.
 */
#include <stdio.h>
#include <string.h>

#include "base/json_load.h"
#include "proto/multipart.h"
#include "proto/openai.h"
#include "proto/openai_fields.h"

static int is_json_field(const char *name)
{
  static const char *const names[] = {"n",     "width",  "height",             "seed",   "steps",          "guidance_scale", "karras",
                                      "clip_skip", "loras", "output_compression", "stream", "partial_images", "metadata",       "strength"};

  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!strcmp(name, names[i]))
      return 1;
  return 0;
}

/* A text that is no JSON stays one: its field then says what it must be. NULL: no memory, or not UTF-8. */
static json_t *value_of(const char *name, const struct multipart_span *data)
{
  json_t *v = is_json_field(name) ? json_load_whole(data->p, data->len, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, NULL) : NULL;

  return v ? v : json_stringn(data->p, data->len);
}

static int add_text(json_t *root, const struct multipart_part *part, struct err *e)
{
  char name[MULTIPART_NAME_MAX + 1];
  json_t *v;

  if (part->name.len >= sizeof name || memchr(part->name.p, 0, part->name.len))
    return err_set(e, E_ARG, "a part of the form has a name that no field has");
  memcpy(name, part->name.p, part->name.len);
  name[part->name.len] = 0;
  if (part->filename.p)
    return err_field(e, E_ARG, name, "%s is sent as a file; only image and mask are files", name);
  if (part->data.len > REQUEST_PROMPT_MAX)
    return err_field(e, E_ARG, name, "%s must be at most %d bytes long; it has %zu", name, REQUEST_PROMPT_MAX, part->data.len);
  if (memchr(part->data.p, 0, part->data.len))
    return err_field(e, E_ARG, name, "%s holds a NUL byte", name);
  if (json_object_get(root, name))
    return err_field(e, E_ARG, name, "%s is there twice", name);
  v = value_of(name, &part->data);
  if (!v)
    return err_field(e, E_ARG, name, "%s is not valid UTF-8", name);
  if (json_object_set_new(root, name, v))
    return err_set(e, E_ARG, "a part's name is not valid UTF-8");
  return 0;
}

static int add_file(struct first *first, int which, const struct multipart_part *part, struct err *e)
{
  static const char *const names[FIRST_FILES] = {"image", "mask"};
  struct first_file *file = &first->file[which];

  if (file->p)
    return err_field(e, E_ARG, names[which], "%s is there twice; this server edits one picture at a time", names[which]);
  if (!part->data.len)
    return err_field(e, E_ARG, names[which], "%s is empty", names[which]);
  file->p = (const uint8_t *)part->data.p;
  file->len = part->data.len;
  snprintf(file->field, sizeof file->field, "%s", names[which]);
  return 0;
}

static int is_named(const struct multipart_part *part, const char *name)
{
  return part->name.len == strlen(name) && !memcmp(part->name.p, name, part->name.len);
}

static int decode_parts(json_t *root, struct first *first, const struct multipart *form, struct err *e)
{
  for (int i = 0; i < form->n; i++) {
    const struct multipart_part *part = &form->part[i];
    int is_image = is_named(part, "image") || is_named(part, "image[]");
    if (is_image || is_named(part, "mask") ? add_file(first, is_image ? FIRST_INIT : FIRST_MASK, part, e) : add_text(root, part, e))
      return e->code;
  }
  if (!first->file[FIRST_INIT].p)
    return err_field(e, E_ARG, "image", "image is required: the picture to edit, as a file");
  return 0;
}

int openai_decode_edit(struct request *r, struct first *first, const struct multipart *form, const struct request_limits *lim, struct err *e)
{
  struct openai_more m = {.surface = OPENAI_EDIT, .first = first};
  struct err none = {0};
  json_t *root = json_object();
  int ret;

  e = e ? e : &none;
  first_init(first);
  if (!root)
    return err_set(e, E_NOMEM, "no memory to read the form");
  ret = decode_parts(root, first, form, e);
  if (!ret)
    ret = openai_fields_decode(r, root, &m, lim, e);
  json_decref(root);
  if (ret)
    first_close(first);
  return ret;
}
