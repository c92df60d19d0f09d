/*
 * json_add.c - see json_add.h.
 */
#include "proto/json_add.h"

#include <stdlib.h>

int json_add_value(struct buf *out, json_t *root, size_t skip, struct err *e)
{
  char *text = root ? json_dumps(root, JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(7)) : NULL;
  int r;

  json_decref(root);
  if (!text)
    return err_set(e, E_NOMEM, "out of memory for the answer");
  r = buf_add_str(out, text + skip, e);
  free(text);
  return r;
}

json_t *json_make_text(const char *s)
{
  json_t *v = json_string(s);

  return v ? v : json_string("(not valid UTF-8)");
}
